"""The components of a mixture act are listed in the order of their means."""

import pytest
import torch
from torch.distributions import Categorical, Cauchy, MixtureSameFamily, MultivariateNormal, Normal

from rkl import KL, ReverseKL
from rkl.bayes import bayes_act

LOC = torch.tensor([-3.0, 0.0, 4.0], dtype=torch.float64)


def posterior(seed: int, switching: bool) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def noise(size: int) -> torch.Tensor:
        return torch.randn(2, 60, size, generator=generator, dtype=torch.float64)

    order = torch.rand(2, 60, 3, generator=generator).argsort(-1)
    order = order if switching else torch.tensor([2, 0, 1]).expand(2, 60, 3)
    loc = LOC + 0.2 * noise(3)
    weight = (torch.tensor([0.5, 0.3, 0.2]).log().double() + 0.1 * noise(3)).softmax(-1)
    return {"loc": loc.gather(-1, order), "weight": weight.gather(-1, order), "s": noise(3).exp()}


def mixture(kind):
    return lambda theta: MixtureSameFamily(Categorical(theta.weight), kind(theta.loc, 1.0))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_two_losses_list_the_components_of_a_switching_mixture_alike(seed):
    draws = posterior(seed, switching=True)
    for divergence in (ReverseKL(), KL()):
        act = bayes_act(draws, mixture(Normal), divergence).act
        assert torch.allclose(act["loc"], LOC, atol=0.2)
        assert torch.allclose(act["weight"], torch.tensor([0.5, 0.3, 0.2]).double(), atol=0.05)
        assert torch.equal(act.distribution.component_distribution.loc, act["loc"])
        assert (act.error["loc"] < 0.1).all()


def test_components_without_a_mean_are_sorted_by_their_location():
    act = bayes_act(posterior(0, switching=True), mixture(Cauchy)).act
    assert torch.allclose(act["loc"], LOC, atol=0.2)


def test_vectors_are_sorted_by_their_first_coordinate():
    def law(theta):
        loc = torch.stack([theta.loc, -theta.loc], -1)
        parts = MultivariateNormal(loc, torch.eye(2, dtype=torch.float64))
        return MixtureSameFamily(Categorical(theta.weight), parts)

    act = bayes_act(posterior(0, switching=True), law).act
    assert torch.allclose(act["loc"], LOC, atol=0.2)


def test_labels_that_do_not_change_places_stay():
    act = bayes_act(posterior(0, switching=False), mixture(Normal)).act
    assert torch.allclose(act["loc"], LOC[[2, 0, 1]], atol=0.2)


def test_a_variable_of_as_many_numbers_that_no_component_has_is_left_alone():
    def law(theta):
        fixed = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
        scale = (theta.s * fixed).sum(-1, keepdim=True) / 100 + 1
        return MixtureSameFamily(Categorical(theta.weight), Normal(theta.loc, scale))

    estimate = bayes_act(posterior(1, switching=True), law)
    act = estimate.act
    assert torch.allclose(act["loc"], LOC, atol=0.3)
    assert torch.allclose(estimate.problem.losses(dict(act)).mean(), estimate.risk.value)

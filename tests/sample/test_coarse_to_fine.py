"""The coarse-to-fine flow: it is a normalised law with the symmetries and gradients it claims."""

import math

import pytest
import torch

from rkl.sample.lattice import CoarseToFine
from rkl.sample.targets import XY

KINDS = {
    "half": CoarseToFine(width=8, knots=6),
    "quarter": CoarseToFine(width=8, knots=6, ring_exchange=None),
    "none": CoarseToFine(width=8, knots=6, integrate="none"),
}


def conditions(kind, *shape):
    torch.manual_seed(1)
    t = 0.3 + 1.7 * torch.rand(*shape, 1, dtype=torch.float64)
    return torch.cat([t, torch.rand_like(t)], -1) if kind == "quarter" else t


def built(kind, side, dtype=torch.float64, noise=0.3):
    """A flow with random weights: at its start, it does not depend on what is near."""
    torch.manual_seed(0)
    flow = KINDS[kind].build((side**2,), conditions(kind).shape[-1])
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    return flow.to(dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_the_flow_integrates_to_one_at_every_condition(kind):
    """Over three angles of 2 x 2, the fourth being free to turn."""
    points = 40
    grid = torch.arange(points, dtype=torch.float64) * (2 * math.pi / points)
    theta = torch.cartesian_prod(torch.zeros(1, dtype=torch.float64), grid, grid, grid)
    flow = built(kind, 2, noise=0.2)
    for condition in conditions(kind, 2) + 1:  # warm, so that the grid resolves every law
        log_q = flow(condition.expand(len(theta), -1)).log_prob(theta)
        total = log_q.exp().mean() * (2 * math.pi) ** 4
        assert total.item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 3e-5)])
def test_the_density_of_draws_is_that_of_their_angles(kind, dtype, tolerance):
    law = built(kind, 8, dtype)(conditions(kind, 50).to(dtype))
    x, log_q = law.sample_and_log_prob((10,))
    assert x.shape == (10, 50, 64)
    assert x.abs().max() <= math.pi + 1e-6
    again = law.log_prob(x)
    assert (again - log_q).abs().median() < tolerance
    assert (again - log_q).abs().max() < 30 * tolerance


@pytest.mark.parametrize("kind", KINDS)
def test_single_precision_agrees_with_double(kind):
    double, single = built(kind, 8), built(kind, 8, torch.float32)
    condition = conditions(kind, 200)
    x, log_q = double(condition).sample_and_log_prob()
    assert (single(condition.float()).log_prob(x.float()) - log_q).abs().max() < 1e-3


def test_an_antiferromagnetic_state_has_a_density_like_its_neighbours():
    """Where the sum of the neighbours vanishes there is no frame, and any will do."""
    law = built("none", 4)(conditions("none"))
    state = math.pi * torch.tensor([(i + j) % 2 for i in range(4) for j in range(4)]).double()
    stripes = math.pi * torch.tensor([i % 2 for i in range(4) for j in range(4)]).double()
    for x in (state, stripes, 0.5 * (state + stripes)):
        assert law.log_prob(x).isfinite()


@pytest.mark.parametrize("kind", KINDS)
def test_turning_all_angles_or_one_of_them_round_changes_nothing(kind):
    law = built(kind, 4)(conditions(kind, 20))
    x, log_q = law.sample_and_log_prob()
    assert torch.allclose(law.log_prob(x + 1.234), log_q, atol=1e-9)
    x[:, 5] += 2 * math.pi
    assert torch.allclose(law.log_prob(x), log_q, atol=1e-9)


@pytest.mark.parametrize(
    ("kind", "target"), [("half", XY(side=4)), ("quarter", XY(side=4, ring_exchange=None))]
)
def test_redrawing_the_integrated_sites_changes_no_weight(kind, target):
    flow = built(kind, 4)
    condition = conditions(kind, 6)
    law = flow(condition)
    assert law.integrates(target.log_prob)
    x, log_q = law.sample_and_log_prob()
    weight = target.log_prob(x, condition) - log_q
    sites = flow.ordering.site[-flow.ordering.integrated :]
    x[:, sites] += torch.randn(6, len(sites), dtype=x.dtype)
    assert torch.allclose(target.log_prob(x, condition) - law.log_prob(x), weight, atol=1e-9)


def test_another_model_than_the_one_integrated_is_noticed():
    law = built("half", 4)(conditions("half", 6))
    assert not law.integrates(XY(side=4, coupling=1.1).log_prob)
    assert not law.integrates(XY(side=4, ring_exchange=0.2).log_prob)
    assert built("none", 4)(conditions("none", 6)).integrates(XY(side=4, coupling=1.1).log_prob)


def reverse_kl_by_quadrature(flow, target, condition, points=40):
    grid = torch.arange(points, dtype=torch.float64) * (2 * math.pi / points)
    theta = torch.cartesian_prod(torch.zeros(1, dtype=torch.float64), grid, grid, grid)
    given = condition.expand(len(theta), -1)
    log_q = flow(given).log_prob(theta)
    return ((log_q - target.log_prob(theta, given)) * log_q.exp()).mean() * (2 * math.pi) ** 4


@pytest.mark.parametrize(
    ("kind", "target"), [("half", XY(side=2)), ("quarter", XY(side=2, ring_exchange=None))]
)
def test_the_path_gradient_is_that_of_the_reverse_kl(kind, target):
    """Along the gradient by quadrature, to 5 standard errors, and these are small."""
    flow, condition = built(kind, 2), conditions(kind)
    parameters = list(flow.parameters())
    exact = torch.autograd.grad(
        reverse_kl_by_quadrature(flow, target, condition), parameters, allow_unused=True
    )
    way = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, exact, strict=True)]
    size = sum(it.square().sum() for it in way).item()
    slopes = []
    for _ in range(10):
        ratio = flow(condition).path_log_ratio(target.log_prob, (2000,))
        found = torch.autograd.grad(-ratio.mean(), parameters, allow_unused=True)
        slopes.append(
            sum((g * w).sum().item() for g, w in zip(found, way, strict=True) if g is not None)
        )
    slopes = torch.tensor(slopes)
    error = slopes.std().item() / 10**0.5
    assert abs(slopes.mean().item() - size) < 5 * error
    assert error < 0.1 * size


def test_a_flow_starts_from_the_weights_of_a_smaller_side():
    small = built("half", 4)
    large = KINDS["half"].build((64,), 1).double().start_from(small)
    assert torch.equal(large.sites[3].first, small.sites[3].first)
    level = large.sites[0].level
    assert torch.equal(level[:3], small.sites[0].level)
    assert torch.equal(level[3], level[2])


@pytest.mark.parametrize(
    ("settings", "shape", "count", "says"),
    [
        ({}, (36,), 1, "Sides 4 and 8"),
        ({}, (15,), 1, "square lattice"),
        ({}, (4, 4), 1, "square lattice"),
        ({}, (16,), 2, "conditions must be 1"),
    ],
)
def test_what_cannot_be_built_is_refused(settings, shape, count, says):
    with pytest.raises(ValueError, match=says):
        CoarseToFine(**settings).build(shape, count)


def test_half_the_sites_cannot_be_integrated_with_ring_exchange():
    with pytest.raises(ValueError, match="interact"):
        CoarseToFine(ring_exchange=0.5, integrate="half")

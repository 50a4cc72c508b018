"""Place, width and tails of flows in few coordinates, against quadrature and closed forms."""

import math

import pytest
import torch

from rkl.flows import NSF
from rkl.flows.architectures import Conditioned
from rkl.flows.architectures.placed import FURTHEST, TAILS, Placed
from rkl.sample import evaluate_on_target, fit_to_target, reweight
from rkl.sample.targets import Condition, Density


def placed(event=(2,), conditions=1):
    torch.manual_seed(0)
    flow = NSF(transforms=1, hidden=(8,)).build(event, conditions)
    if conditions:
        ends = torch.full((conditions,), 0.1), torch.full((conditions,), 10.0)
        flow = Conditioned(flow, *ends)
    return Placed(flow, event, conditions)


def test_its_density_integrates_to_one_and_its_draws_follow_it():
    flow = placed((1,))
    condition = torch.tensor([0.1])
    flow.place(0.1 * torch.randn(500, 1) + 2, condition.expand(500, 1))
    law = flow(condition)
    assert isinstance(flow.flow, Conditioned)
    width = law.log_scale.exp().item()
    z = torch.linspace(-12, 12, 200_001).double().sinh()[:, None] * 0.1  # far into both tails
    x = law.shift.double() + width * z
    density = law.log_prob(x).double().exp()
    mass = torch.trapezoid(density, x[:, 0])
    assert mass.item() == pytest.approx(1, abs=1e-3)  # single precision inside
    torch.manual_seed(1)
    drawn = law.sample((40_000,))[:, 0]
    share = ((drawn - law.shift).abs() > 20 * width).double().mean()
    exact = TAILS * (1 - math.atan(20) / math.atan(FURTHEST))
    assert abs(share - exact) < 5 * math.sqrt(exact / 40_000)


def test_place_and_width_follow_the_conditions_also_under_heavy_tails():
    """x = 3 + s t with t of Cauchy, whose deviations have the median s: at both ends of s."""
    torch.manual_seed(0)
    scale = 10 ** (2 * torch.rand(20_000, 1) - 1)
    x = 3 + scale * torch.distributions.Cauchy(0.0, 1.0).sample((20_000, 2))
    flow = placed()
    flow.place(x, scale)
    law = flow(torch.tensor([[0.1], [10.0]]))
    ratio = law.log_scale[1].exp() / law.log_scale[0].exp()
    assert ((ratio > 70) & (ratio < 140)).all()  # 100
    assert not flow.fresh


def test_weights_are_bounded_where_the_tails_of_the_flow_end():
    """A Gaussian whose flow is four times too narrow: log Z within 5 errors of log 2π."""
    flow = placed(conditions=0)
    flow.place(0.25 * torch.randn(2_000, 2, generator=torch.Generator().manual_seed(0)))
    torch.manual_seed(1)
    x, log_q = flow().rsample_and_log_prob((40_000,))
    found = reweight((-x.square().sum(-1) / 2 - log_q).detach())
    assert (found.log_z.value - math.log(2 * math.pi)).abs() < 5 * found.log_z.error
    assert found.log_z.error < 0.1


def student(x, condition):
    return -1.5 * torch.log1p(x.square() / 2).sum(-1)


def gaussian(x, condition):
    return -x.square().sum(-1) / (2 * condition[..., 0].square())


LINE = {
    "student": (Density(student, (2,)), None, lambda: 2 * math.log(2 * math.sqrt(2))),
    "gaussian": (
        Density(gaussian, (2,), "line", (Condition("s", 0.1, 10.0),)),
        torch.tensor([[0.1], [1.0], [10.0]]),
        lambda: (2 * math.pi * torch.tensor([0.01, 1.0, 100.0])).log(),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LINE)
def test_log_z_of_wide_ranges_and_heavy_tails_is_within_its_errors(name):
    target, condition, exact = LINE[name]
    flow = fit_to_target(NSF(transforms=3, hidden=(64, 64)), target, steps=300, batch=256).flow
    log_z = evaluate_on_target(flow, target, condition).thermodynamics.log_z
    assert ((log_z.value - exact()).abs() < 4 * log_z.error).all()
    assert (log_z.error < 0.02).all()


def gamma(x, condition):
    """A gamma density of shape 3, on the half line: log Z = log Γ(3) − 3 log rate."""
    log_p = 2 * x[..., 0].clamp_min(1e-30).log() - x[..., 0] * condition[..., 0]
    return torch.where(x[..., 0] > 0, log_p, -math.inf)


def banana(x, condition):
    bent = x[..., 1] - condition[..., 0] * (x[..., 0].square() - 1)
    return -x[..., 0].square() / 2 - 2 * bent.square()


def test_draws_without_density_do_not_stop_a_fit():
    """Whatever constant log p has."""
    target = Density(
        lambda x, c: gamma(x, c) - 5_000, (1,), "line", (Condition("rate", 1.0, 4.0),)
    )
    architecture = NSF(transforms=1, hidden=(16,))
    fitted = fit_to_target(architecture, target, steps=60, strata=4, batch=256)
    assert fitted.training.stopped is None
    assert fitted.training.steps == 60
    found = evaluate_on_target(fitted.flow, target, torch.tensor([[2.0]]), draws=250)
    assert found.weights.ess.value > 0.3


@pytest.mark.slow
def test_draws_from_heavy_tails_do_not_outweigh_all_others():
    """Without a floor their log p of −10⁹ left an effective share of 0.02."""
    target = Density(banana, (2,), "line", (Condition("bend", 0.2, 2.0),))
    fitted = fit_to_target(NSF(transforms=3, hidden=(128, 128), bins=16), target, steps=300)
    found = evaluate_on_target(fitted.flow, target, torch.tensor([[2.0]]), draws=1_000)
    log_z = found.thermodynamics.log_z
    assert found.weights.ess.value > 0.7
    assert abs(log_z.value - math.log(math.pi)) < 4 * log_z.error

"""A fit asked for an operating point reaches it or says so, and rejection is distilled away."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from torch.distributions import Normal

from rkl.fit import Method, fit_to_samples
from rkl.fit.operating import DEARER, check_point, distil_rejection, draw_kept
from rkl.fit.result import Reached
from rkl.fit.settings import SampleSettings
from rkl.flows import Coupling, Critic, critic, draw
from rkl.metrics.precision_recall import OperatingPoint
from rkl.stats import Mean

SMALL = Coupling(transforms=2, hidden=(8,))


@pytest.fixture(scope="module")
def crossed():
    """Points on two crossing lines, which two couplings of eight units cannot meet."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        along, across = torch.randn(2, 3000)
        rows = torch.stack([along, 0.15 * across + along.sign() * along.abs()], 1)
        rows[::2, 1] *= -1
    return rows


@pytest.fixture(scope="module")
def fitted(crossed):
    how = {"steps": 150, "method": Method(batch=256, critic=Critic(lessons=150))}
    bought = fit_to_samples(SMALL, crossed, budget=2.0, **how)
    aimed = fit_to_samples(SMALL, crossed, target_precision=0.65, **how)
    beyond = fit_to_samples(SMALL, crossed, target_precision=0.999, budget=1.2, **how)
    return bought, aimed, beyond


def test_a_budget_is_spent_and_its_precision_told(fitted):
    bought = fitted[0].reached
    assert bought.met
    assert bought.point.budget == pytest.approx(2.0)
    assert 0.5 < bought.precision.value.item() < 1
    assert 0 < bought.precision.error.item() < 0.06
    assert "at 2 draws per sample" in str(bought)


def test_a_precision_is_reached_at_less_cost_than_all_of_it(fitted):
    aimed = fitted[1].reached
    assert aimed.met
    assert aimed.precision.value.item() - 2 * aimed.precision.error.item() >= 0.65
    assert aimed.point.budget < 20


def test_what_is_out_of_reach_is_said_with_how_far_it_got(fitted):
    beyond = fitted[2].reached
    assert not beyond.met
    assert beyond.point.budget <= 1.2 * DEARER
    assert "out of its reach" in str(beyond)


def test_an_operating_point_counts_as_met_by_the_lower_end_of_its_bound():
    point = OperatingPoint(1.0, 1.0, 0.9)
    for value, met in ((0.89, False), (0.91, False), (0.93, True)):
        mean = Mean(torch.tensor(value), torch.tensor(0.01))
        assert Reached(0.9, mean, point).met is met
        assert "precision at most" in str(Reached(0.9, mean, point))


def test_the_claim_of_a_critic_never_exceeds_one(fitted):
    for fit in fitted:
        assert fit.reached.point.target_precision <= 1
        assert fit.reached.judged[-1][0] <= 20


def test_draws_are_kept_by_the_ratio_row_by_row():
    """At λ = 1/2 and a ratio of 2 on one side, 0 on the other: that side, at two draws each."""
    law = Normal(torch.zeros(4000, 1), 1.0)
    law = torch.distributions.Independent(law, 1)
    torch.manual_seed(0)

    def ratio(value, condition):
        return torch.where(value[:, 0] * condition[:, 0] > 0, math.log(2), -math.inf)

    sides = torch.tensor([[1.0], [-1.0]]).repeat(2000, 1)
    kept, made = draw_kept(law, ratio, math.log(0.5), 4000, sides)
    assert bool((kept * sides > 0).all())
    assert made / 4000 == pytest.approx(2.0, abs=0.1)
    assert kept[:, 0].abs().mean().item() == pytest.approx(math.sqrt(2 / math.pi), abs=0.04)


def test_samples_are_drawn_at_a_budget_or_at_a_precision():
    with pytest.raises(ValueError, match=r"one of budget and target_precision; got 2 and 0\.9"):
        SampleSettings(budget=2, target_precision=0.9)


@pytest.mark.parametrize("wrong", [{"target_precision": 1.2}, {"budget": 0.5}], ids=str)
def test_points_that_there_are_not_are_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
        check_point(**{"target_precision": None, "budget": None} | wrong)
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
        fit_to_samples(SMALL, torch.randn(100, 2), steps=1, **wrong)


def test_a_flow_distilled_from_rejection_draws_what_it_keeps():
    """A flow of the wrong scale, σ = 2: what rejection keeps at K = 2 is the data, σ = 1."""

    class Known(torch.nn.Module):
        def forward(self, value, condition=None):
            p, q = Normal(0.0, 1.0), Normal(0.0, 2**0.5)
            return (p.log_prob(value) - q.log_prob(value)).sum(-1)

    torch.manual_seed(0)
    rows = torch.randn(2000, 2) * 2**0.5
    fitted = fit_to_samples(SMALL, rows, steps=300, with_critic=True, method=Method(batch=256))
    object.__setattr__(fitted, "critic", Known())
    distilled = distil_rejection(fitted, budget=1.99, anchor=0.0, steps=400, lr=5e-3, batch=256)
    value, _ = draw(distilled.flow(), (5000,))
    assert value.std().item() == pytest.approx(1.0, abs=0.06)
    assert draw(fitted.flow(), (5000,))[0].std().item() == pytest.approx(2**0.5, abs=0.1)
    assert distilled.critic is None
    assert distilled.training.history[-1].keys() >= {"accepted", "likelihood"}


def test_any_ratio_can_be_distilled_from(crossed):
    """One that lets nothing of the left half through moves the flow to the right."""
    fitted = fit_to_samples(SMALL, crossed, steps=60, method=Method(batch=128))
    right = distil_rejection(
        fitted,
        budget=1.9,
        anchor=0.0,
        steps=60,
        lr=1e-2,
        critic=lambda x, condition: torch.where(x[:, 0] > 0, 0.0, -20.0),
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        before, after = (it.flow().sample((2000,))[:, 0].mean() for it in (fitted, right))
    assert after > before + 0.3


def test_what_has_no_critic_or_no_knob_cannot_be_distilled(crossed):
    plain = fit_to_samples(SMALL, crossed, steps=2, method=Method(batch=64))
    with pytest.raises(ValueError, match="fitted has no critic"):
        distil_rejection(plain, budget=2.0, steps=1)
    critic = fit_to_samples(SMALL, crossed, steps=2, with_critic=True, method=Method(batch=64))
    with pytest.raises(ValueError, match="exactly one of accept_lam, budget"):
        distil_rejection(critic, steps=1)
    with pytest.raises(ValueError, match="anchor must be"):
        distil_rejection(critic, budget=2.0, anchor=math.nan, steps=1)


def test_critics_end_with_the_minutes_and_a_judge_in_a_hurry_shows_nothing(crossed):
    """100,000 lessons would take many minutes."""
    method = Method(batch=256, critic=Critic(lessons=100_000))
    fitted = fit_to_samples(SMALL, crossed, target_precision=0.2, minutes=0.01, method=method)
    assert fitted.reached is not None
    assert fitted.reached.hurried
    assert not fitted.reached.met
    assert not fitted.reached.judged
    assert "Give it more minutes" in str(fitted.reached)


def test_lessons_are_counted_or_end_with_their_seconds(monkeypatch):
    clock = itertools.count()  # a second from one look to the next
    looks = SimpleNamespace(perf_counter=lambda: float(next(clock)))
    monkeypatch.setattr(critic, "time", looks)  # and not that of the progress shown beside it
    assert list(critic.lessons("critic", 4)) == [0, 0.25, 0.5, 0.75]
    assert list(critic.lessons("critic", 100, 2.0)) == [0, 0.5]

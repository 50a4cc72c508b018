"""Rejection against what the two laws say it must keep, and at which cost."""

import math

import pytest
import torch
from torch.distributions import Categorical, MultivariateNormal, Normal

from rkl.fit.rejection import reject
from rkl.metrics.precision_recall import operating_point, pr_curve, pr_curve_sampled

P = torch.tensor([0.40, 0.25, 0.20, 0.10, 0.05, 0.0], dtype=torch.float64)
Q = torch.tensor([0.10, 0.15, 0.15, 0.20, 0.25, 0.15], dtype=torch.float64)
N = 40_000


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def finite(n=N, **knob):
    ratio = P.log() - Q.log()
    return reject(Categorical(probs=Q), lambda x: ratio[x], n=n, pilot=200_000, **knob)


def alpha(lam):
    slopes = torch.tensor([lam], dtype=torch.float64)
    return pr_curve(p=P.log(), q=Q.log(), slopes=slopes).precision.item()


def chi_square(counts, expected):
    """Of counts against a law; its mean is the number of cells less 1."""
    there = expected > 0
    assert not counts[~there].any()
    wanted = counts.sum() * expected[there]
    return ((counts[there] - wanted).square() / wanted).sum().item()


@pytest.mark.parametrize("lam", [0.1, 0.7, 3.0])
def test_the_accepted_law_is_the_least_of_both_and_its_cost_is_one_over_alpha(lam):
    found = finite(accept_lam=lam)
    accepted = torch.minimum(lam * P, Q) / alpha(lam)
    counts = found.samples.bincount(minlength=6).double()
    assert chi_square(counts, accepted) < 30  # 4 degrees of freedom: 5e-6 of chance
    assert chi_square(counts, Q) > 1_000  # the same cannot be said of what was not rejected
    assert abs(found.acceptance.value - alpha(lam)) < 5 * found.acceptance.error
    assert found.cost == pytest.approx(1 / alpha(lam), rel=0.03)


@pytest.mark.parametrize("budget", [1.5, 2.0, 3.5])
def test_a_budget_is_what_an_accepted_sample_costs(budget):
    found = finite(budget=budget)
    assert found.point.budget == budget
    # n samples cost n K with a relative error of 1/√n, and the pilot adds 1/√200,000
    assert found.cost == pytest.approx(budget, rel=5 * math.sqrt(1 / N + 1 / 200_000))


@pytest.mark.parametrize("lam", [0.1, 0.7])
def test_the_accepted_law_has_the_precision_that_alpha_of_alpha_gives(lam):
    found = finite(accept_lam=lam)
    expected = alpha(alpha(lam)) / alpha(lam)
    shares = found.samples.bincount(minlength=6) / N
    precision = torch.minimum(P, shares).sum().item()
    assert precision == pytest.approx(expected, abs=0.01)  # five times 0.5/√n, and a bias of less
    assert found.point.target_precision == pytest.approx(expected, abs=0.01)


def test_a_target_precision_is_that_of_what_is_accepted():
    shares = finite(target_precision=0.8).samples.bincount(minlength=6) / N
    assert torch.minimum(P, shares).sum().item() == pytest.approx(0.8, abs=0.015)


def test_between_densities_the_accepted_law_has_its_precision_too():
    p, q = Normal(torch.zeros((), dtype=torch.float64), 1.0), Normal(0.7, 1.6)

    def ratio(x):
        return p.log_prob(x) - q.log_prob(x)

    found = reject(q, ratio, n=N, budget=1.6)
    # log p/q of the accepted law min(λp, q)/α; its precision at slope 1 is by Monte Carlo
    lam, cost = found.point.accept_lam, found.point.budget
    anew = ratio(found.samples)
    torch.testing.assert_close(anew, found.log_ratio, rtol=1e-12, atol=1e-12)
    against = anew - (math.log(lam) + anew).clamp_max(0) - math.log(cost)
    one = torch.ones(1, dtype=torch.float64)
    curve = pr_curve_sampled(log_ratio_q=against, slopes=one)
    error = math.hypot(curve.precision.error.item(), 0.01)  # and that of the pilot
    assert abs(curve.precision.value.item() - found.point.target_precision) < 5 * error


def test_rejection_without_limit_draws_from_p():
    found = finite(accept_lam=0.2)  # below the least q/p, 1/4
    assert found.cost == pytest.approx(5, rel=0.05)
    assert chi_square(found.samples.bincount(minlength=6).double(), P) < 30


def test_events_of_any_shape_and_as_many_as_asked_for():
    law = MultivariateNormal(torch.zeros(3), torch.eye(3))
    found = reject(law, lambda x: -x.square().sum(-1) / 2, n=17, budget=2.0)
    assert found.samples.shape == (17, 3)
    assert found.log_ratio.shape == (17,)
    assert found.draws >= 17


@pytest.mark.parametrize("n", [1, 2, 17, 5_000])
def test_draws_are_counted_up_to_the_last_accepted_one(n):
    """Every third draw has the ratio 3 and is kept for certain, the others have no mass."""
    drawn = [0]

    def ratio(x):
        places = torch.arange(drawn[0], drawn[0] + len(x))
        drawn[0] += len(x)
        return torch.where(places % 3 == 2, math.log(3.0), -math.inf).double()

    found = reject(Normal(0.0, 1.0), ratio, n=n, accept_lam=1.0, pilot=9_999)
    assert len(found.samples) == len(found.log_ratio) == n
    assert found.draws == 3 * n
    assert found.cost == 3.0
    equal = reject(Normal(0.0, 1.0), torch.zeros_like, n=n, accept_lam=1.0)
    assert equal.draws == n  # p is q: nothing is refused


def test_the_constant_is_fitted_exactly_on_the_pilot():
    law = Normal(0.0, 1.0)
    torch.manual_seed(3)
    x = law.sample(torch.Size([500]))
    torch.manual_seed(3)
    found = reject(law, lambda x: x, n=1, budget=2.5, pilot=500)
    assert found.point == operating_point(x.double(), budget=2.5)


def test_what_cannot_be_met_is_said():
    with pytest.raises(ValueError, match=r"budget must be at least 1\.1\d*, for p has no mass"):
        finite(budget=1.05)
    with pytest.raises(ValueError, match="target_precision must lie between"):
        finite(target_precision=0.3)
    with pytest.warns(UserWarning, match=r"budget=8 buys nothing beyond (3\.99|4|4\.0)"):
        finite(n=10, budget=8.0)
    with pytest.raises(ValueError, match="exactly one of .*; got accept_lam, budget"):
        finite(budget=2.0, accept_lam=1.0)
    with pytest.raises(ValueError, match=r"budget must be at most the 500 draws .* got 1e\+09"):
        reject(Normal(0.0, 1.0), lambda x: x, n=1, budget=1e9, pilot=500)


def test_a_ratio_that_changes_its_mind_is_noticed():
    calls = []

    def ratio(x):
        calls.append(x)
        return x if len(calls) == 1 else torch.full((len(x),), -1e3)

    with pytest.raises(RuntimeError, match="only 0 of .* where the pilot promised one in 2"):
        reject(Normal(0.0, 1.0), ratio, n=5, budget=2.0)

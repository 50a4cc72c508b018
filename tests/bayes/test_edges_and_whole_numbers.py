"""Acts where some draws lie on the edge of the family, or where a parameter is a whole number."""

import itertools
import math

import numpy as np
import pytest
import torch

from rkl.bayes import Intrinsic, bayes_act
from rkl.divergences import KL, JensenShannon, ReverseKL

RANDOM = np.random.default_rng(0)
CHAINS = 4, 50
INDICATOR = RANDOM.integers(0, 2, size=CHAINS)
SHARE = RANDOM.beta(30, 70, size=CHAINS)
TRIALS = RANDOM.integers(20, 24, size=CHAINS)
RATE = np.where(RANDOM.random(CHAINS) < 0.3, 0.0, RANDOM.gamma(3, size=CHAINS))
ROWS = RANDOM.dirichlet([5, 3, 2], size=CHAINS)
ROWS[RANDOM.random(CHAINS) < 0.3] = [0.5, 0.5, 0.0]


def entropy(p):
    return -np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0).sum(-1)


@pytest.mark.parametrize(
    ("family", "values", "mean"),
    [
        ("bernoulli(probs=x)", INDICATOR, INDICATOR.mean()),
        ("categorical(probs=x)", ROWS, ROWS.mean((0, 1))),
        ("poisson(rate=x)", RATE, RATE.mean()),
        ("geometric(probs=x)", np.where(INDICATOR, 1.0, SHARE), None),
    ],
)
def test_forward_kl_averages_the_mean_parameter_of_draws_on_the_edge(family, values, mean):
    estimate = bayes_act({"x": values}, family, KL())
    if mean is None:  # failures before the first success
        mean = 1 / (1 + ((1 - values) / values).mean())
    np.testing.assert_allclose(estimate.act["x"].numpy(), mean, rtol=1e-12)
    assert estimate.risk.value.isfinite()
    assert estimate.risk.error.isfinite()


def test_the_risk_of_indicators_under_forward_kl_is_the_entropy_of_their_share():
    share = INDICATOR.mean()
    found = bayes_act({"x": INDICATOR}, "bernoulli(probs=x)", KL()).risk.value.item()
    assert found == pytest.approx(entropy(np.array([share, 1 - share])), rel=1e-12)


@pytest.mark.parametrize("loss", [Intrinsic(), JensenShannon()])
def test_losses_that_are_finite_on_the_edge_have_the_least_risk_of_a_grid(loss):
    estimate = bayes_act({"x": ROWS}, "categorical(probs=x)", loss)
    rows = ROWS.reshape(-1, 3)

    def kl(p, q):
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(p > 0, p * np.log(p / q), 0).sum(-1)

    def risk(q):
        if isinstance(loss, Intrinsic):
            return np.minimum(kl(rows, q), kl(q, rows)).mean()
        middle = (rows + q) / 2
        return (kl(rows, middle) / 2 + kl(q, middle) / 2).mean()

    act = estimate.act["x"].numpy()
    assert estimate.risk.value.item() == pytest.approx(risk(act), abs=1e-9)
    steps = (-2e-3, 0.0, 2e-3)
    around = [
        risk(act + np.array([a, b, -a - b])) for a, b in itertools.product(steps, steps) if a or b
    ]
    assert min(around) > risk(act)


def test_reverse_kl_of_draws_on_the_edge_is_refused_and_leads_to_what_is_finite():
    with pytest.raises(ValueError, match=r"same edge; KL\(\) averages the mean parameter"):
        bayes_act({"x": RATE}, "poisson(rate=x)", ReverseKL())


def log_binomials(n, p):
    """Log mass of 0, ..., 30 under Binomial(n, p)."""
    x = np.arange(31)
    choose = np.array(
        [
            math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) if k <= n else -np.inf
            for k in x
        ]
    )
    return choose + x * np.log(p) + (n - x) * np.log1p(-p)


def intrinsic_risk(n, p, laws):
    q = log_binomials(n, p)
    with np.errstate(invalid="ignore"):
        forward = np.where(laws > -np.inf, np.exp(laws) * (laws - q), 0).sum(-1)
        reverse = np.where(q > -np.inf, np.exp(q) * (q - laws), 0).sum(-1)
    return np.minimum(forward, reverse).mean()


def test_a_binomial_with_an_unknown_number_of_trials_is_answered_under_intrinsic():
    estimate = bayes_act(
        {"n": TRIALS, "p": SHARE}, "binomial(total_count=n, probs=p)", Intrinsic()
    )
    n, p = estimate.act["n"].item(), estimate.act["p"].item()
    pairs = zip(TRIALS.flat, SHARE.flat, strict=True)
    laws = np.stack([log_binomials(int(a), b) for a, b in pairs])
    best = min(
        (intrinsic_risk(a, b, laws), a, b)
        for a in range(20, 24)
        for b in np.arange(0.25, 0.36, 0.002)
    )
    assert n == best[1]
    assert p == pytest.approx(best[2], abs=0.002)
    assert estimate.risk.value.item() == pytest.approx(intrinsic_risk(int(n), p, laws), abs=1e-9)
    assert estimate.risk.value.item() <= best[0]
    assert estimate.act.error["n"].isnan()
    assert estimate.act.error["p"].isfinite()


def test_a_function_and_a_batch_of_trials_give_the_acts_of_its_members():
    few = slice(0, 12)
    both, share = np.stack([TRIALS, TRIALS + 3], -1)[:, few], SHARE[:, few]
    family = lambda theta: torch.distributions.Binomial(theta.n, theta.p)  # noqa: E731
    single = [
        bayes_act({"n": both[..., i], "p": share}, family, JensenShannon()) for i in range(2)
    ]
    draws = {"n": both, "p": np.stack([share, share], -1)}
    batch = bayes_act(draws, family, JensenShannon())
    assert batch.act["n"].tolist() == [one.act["n"].item() for one in single]
    alone = torch.stack([one.act["p"] for one in single])
    torch.testing.assert_close(batch.act["p"], alone, atol=1e-5, rtol=0)


def test_what_both_kls_refuse_of_trials_names_a_loss_that_answers():
    draws = {"n": TRIALS, "p": SHARE}
    for loss in (ReverseKL(), KL()):
        with pytest.raises(ValueError, match=r"use Intrinsic\(\), or the bounded JensenShannon"):
            bayes_act(draws, "binomial(total_count=n, probs=p)", loss)


def test_a_support_that_no_loss_follows_is_refused_in_our_own_words_under_every_loss():
    def shifted(theta):
        shift = torch.distributions.AffineTransform(theta.start, 1.0)
        base = torch.distributions.Exponential(theta.rate)
        return torch.distributions.TransformedDistribution(base, [shift])

    draws = {"start": SHARE, "rate": 1 + SHARE}
    for loss in (ReverseKL(), KL(), Intrinsic(), JensenShannon()):
        with pytest.raises(ValueError, match="[Hh]old the edge fixed"):
            bayes_act(draws, shifted, loss)


def test_the_posterior_mean_of_trials_is_compared_without_an_excess():
    draws = {"n": TRIALS[:, :12], "p": SHARE[:, :12]}
    estimate = bayes_act(draws, "binomial(total_count=n, probs=p)", Intrinsic())
    table = estimate.compare(losses=[Intrinsic()])
    cells = {row[0]: row[-1] for row in table.rows}
    assert cells["posterior mean"] is None
    assert any("must be whole" in note for note in table.notes)

"""Merging atoms lowers f-divergences and what increases with them; others it may raise."""

import pytest
from catalogued import pair

import rkl


@pytest.mark.parametrize(
    "divergence", [rkl.NegLogAcceptance(), *map(rkl.LKHybrid, (0.0, 0.5, 2.0, 10.0))], ids=repr
)
def test_merging_atoms_cannot_increase_a_function_that_increases_in_f_divergences(divergence):
    assert divergence.increasing_in
    for scale in (0.3, 1.0, 3.0, 6.0):
        # A value of at most about 20 nats is the sum of 4 terms, rounded at 2e-16 each.
        assert gain_by_merging(divergence, scale) < 1e-13


@pytest.mark.parametrize("divergence", [rkl.TAID(), rkl.AMiD(), rkl.AKL()], ids=repr)
def test_merging_atoms_may_increase_what_weighs_them_by_whole_distributions(divergence):
    assert divergence.increasing_in == ()
    assert gain_by_merging(divergence, 3.0) > 0.01


def gain_by_merging(divergence, scale):
    """The most that a divergence grows where 4 atoms are merged into 2, over many pairs."""
    logp, logq = pair(20_000, 4, scale=scale)
    merged = [x.unflatten(-1, (-1, 2)).logsumexp(-1) for x in (logp, logq)]
    return float((divergence(*merged) - divergence(logp, logq)).max())

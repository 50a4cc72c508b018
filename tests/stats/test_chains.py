import itertools
import math

import pytest
import torch

from rkl.stats import (
    autocorrelation_time,
    ess,
    ess_and_rhat,
    ess_tail,
    integrated_time,
    jackknife,
    rhat,
)


def autoregressive(chains, draws, rho, columns=(), seed=0):
    """Stationary AR(1) chains of unit innovations: variance 1/(1 - rho²), τ = (1+rho)/(1-rho)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(chains, draws, *columns, generator=generator, dtype=torch.float64)
    x[:, 0] /= math.sqrt(1 - rho**2)
    for t in range(1, draws):
        x[:, t] += rho * x[:, t - 1]
    return x


RHO = torch.tensor([-0.5, 0.0, 0.5, 0.9], dtype=torch.float64)


def test_the_time_of_an_autoregressive_chain_is_its_closed_form():
    x = torch.stack([autoregressive(4, 20_000, rho) for rho in RHO.tolist()], -1)
    # sqrt(2 (2M + 1) / n) with M about 5 τ pairs: 2 % for the first three, 7 % for the last
    torch.testing.assert_close(
        autocorrelation_time(x), (1 + RHO) / (1 - RHO), rtol=0.15, atol=0.02
    )


def test_the_time_of_madras_and_sokal_is_the_closed_form_and_sees_within_chains_alone():
    x = torch.stack([autoregressive(4, 20_000, rho) for rho in RHO[1:].tolist()], -1)
    # sqrt(2 (2M + 1) / n) with M = 5 τ: 2 % for the first two, 7 % for the last
    torch.testing.assert_close(
        integrated_time(x), ((1 + RHO) / (1 - RHO))[1:], rtol=0.15, atol=0.03
    )
    apart = x + torch.arange(4)[:, None, None]
    torch.testing.assert_close(integrated_time(apart), integrated_time(x), rtol=1e-9, atol=0)
    assert (autocorrelation_time(apart) > 10 * integrated_time(x)).all()
    assert integrated_time(torch.ones(2, 10)).isnan()


def test_the_window_is_that_of_emcee():
    """emcee 3.1.6, autocorr.integrated_time(x, tol=0) of one chain of lattice(1, 2000, 0.8)."""
    x = lattice(1, 2000, 0.8, False)
    assert integrated_time(x).item() == pytest.approx(7.887654693538149, rel=1e-9)


def test_the_error_of_a_variance_of_dependent_draws_is_its_scatter():
    def spread(mean):
        return mean[..., 1] - mean[..., 0] ** 2

    x = autoregressive(4, 2_000, 0.6, columns=(60,))
    found = jackknife(spread, torch.stack([x, x.square()], -1))
    scatter = (found.value - 1 / (1 - 0.6**2)).square().mean().sqrt()
    # 60 columns tell a scatter to 9 %, and a mean error to less
    assert found.error.square().mean().sqrt() == pytest.approx(scatter.item(), rel=0.3)
    blind = (found.value**2 * 2 / (4 * 2_000)).mean().sqrt()  # as of independent draws
    assert scatter > 1.3 * blind


def test_weights_of_one_are_no_weights_to_a_jackknife():
    x = autoregressive(3, 100, 0.5, columns=(2,))
    plain, weighted = (
        jackknife(lambda mean: mean.prod(-1), x, w) for w in (None, torch.ones(3, 100))
    )
    torch.testing.assert_close(plain, weighted)


# ArviZ 0.23.4 on lattice(chains, draws, rho, ties): ess of method bulk, tail and mean, and rhat.
ARVIZ = {
    (4, 200, 0.0, False): (
        748.4015577370345,
        736.4061443999979,
        766.7213084296175,
        1.0009215057707446,
    ),
    (4, 200, 0.9, False): (
        48.20899159686089,
        142.774598242202,
        47.44965993152593,
        1.0226285717897252,
    ),
    (2, 300, -0.6, False): (
        1666.890750230186,
        569.8701322523309,
        1666.890750230186,
        0.999940617633958,
    ),
    (3, 100, 0.5, True): (
        83.67167384998949,
        138.72726623887698,
        84.27418434252618,
        1.0111274933944152,
    ),
    (4, 10, 0.5, True): (
        20.950852212414166,
        25.897435897435898,
        21.34700371221495,
        1.1662867047750092,
    ),
    (4, 201, 0.9, False): (
        48.49214685997404,
        148.68713372852926,
        47.91215461950359,
        1.0260475546671022,
    ),
    (3, 101, 0.5, True): (
        98.22813586989042,
        167.01713347797548,
        99.86791851686559,
        1.0082630927046354,
    ),
    (2, 11, 0.5, False): (
        9.342988729093385,
        9.852216748768472,
        9.200012104555848,
        1.21644207084612,
    ),
}


def lattice(chains, draws, rho, ties):
    """Dependent draws of simple arithmetic, alike on every machine."""
    state, x = 1, torch.zeros(chains, draws, dtype=torch.float64)
    for chain, t in itertools.product(range(chains), range(draws)):
        state = 48271 * state % 2147483647
        x[chain, t] = state / 2147483647 - 0.5 + (rho * x[chain, t - 1] if t else 0)
    return (4 * x).round() if ties else x


@pytest.mark.parametrize("case", ARVIZ)
def test_effective_numbers_and_rhat_are_those_of_arviz(case):
    x = lattice(*case)
    bulk, tail, mean, ratio = ARVIZ[case]
    assert ess(x).item() == pytest.approx(bulk, rel=1e-9)
    assert ess_tail(x).item() == pytest.approx(tail, rel=1e-9)
    chains, draws, *_ = case
    whole = chains * (draws - draws % 2)  # halves of an odd number leave the middle out
    assert whole / autocorrelation_time(x).item() == pytest.approx(mean, rel=1e-9)
    assert rhat(x).item() == pytest.approx(ratio, rel=1e-12)


def test_ranks_make_effective_numbers_indifferent_to_monotone_maps():
    x = autoregressive(4, 500, 0.6)
    for statistic in (ess, ess_tail):
        torch.testing.assert_close(statistic(x.exp()), statistic(x), rtol=1e-12, atol=0)
    assert (autocorrelation_time(x.mul(3).exp()) - autocorrelation_time(x)).abs() > 0.1


@pytest.mark.parametrize("draws", [100, 101])
@pytest.mark.parametrize("ties", [False, True])
def test_one_ranking_gives_the_effective_numbers_and_the_rhat_of_two(draws, ties, monkeypatch):
    monkeypatch.setattr("rkl.stats.chains.NUMBERS", 500)  # one column at a time
    x = autoregressive(4, draws, 0.5, columns=(2, 3), seed=1)
    x = x.round() if ties else x
    x[..., 1, 2] = 3.0  # a constant, of which both are nan
    for found, expected in zip(ess_and_rhat(x), (ess(x), rhat(x)), strict=True):
        # the same ranks, whose sums are taken in another order
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0, equal_nan=True)
        assert found.isnan().tolist() == [[False] * 3, [False, False, True]]


def test_columns_are_judged_one_by_one(monkeypatch):
    monkeypatch.setattr("rkl.stats.chains.NUMBERS", 1_000)  # two columns at a time
    x = autoregressive(2, 250, 0.5, columns=(3, 2))
    for statistic in (autocorrelation_time, ess, ess_tail, rhat):
        together = statistic(x)
        assert together.shape == (3, 2)
        for i, j in itertools.product(range(3), range(2)):
            torch.testing.assert_close(together[i, j], statistic(x[:, :, i, j]))


def test_chains_that_disagree_in_location_or_in_scale_alone_are_noticed():
    x = autoregressive(4, 1_000, 0.3)
    apart, wide = x.clone(), x.clone()
    apart[0] += 2
    wide[0] *= 3
    assert rhat(x) < 1.01
    assert rhat(apart) > 1.1
    assert rhat(wide) > 1.1
    assert ess(apart) < 50 < 1_000 < ess(x)


@pytest.mark.parametrize("statistic", [autocorrelation_time, integrated_time, ess, ess_tail, rhat])
def test_of_a_sampler_that_never_moved_nothing_is_known(statistic):
    x = torch.stack([torch.full((4, 100), 0.1), autoregressive(4, 100, 0.0)], -1)
    assert statistic(x).isnan().tolist() == [True, False]


def test_chains_stuck_at_different_places_are_worth_no_more_than_their_number():
    x = torch.tensor([[0.1], [0.2], [0.3], [0.7]]).expand(4, 1000)
    assert rhat(x) == math.inf
    assert ess(x) <= 8  # halves of chains count as chains
    assert integrated_time(x).isnan()


def test_the_unit_of_a_quantity_does_not_matter():
    x = autoregressive(4, 1000, 0.5)
    for statistic in (autocorrelation_time, integrated_time, ess, ess_tail, rhat):
        scaled = statistic(1e-30 * x.double())
        torch.testing.assert_close(scaled, statistic(x.double()), rtol=1e-9, atol=0)


def test_weights_of_half_the_draws_leave_half_the_effective_number():
    x = autoregressive(4, 500, 0.0)
    weights = torch.zeros(4, 500)
    weights[:, ::2] = 1
    half = ess(x).item() / 2
    assert 0.7 * half < ess(x, weights).item() <= half * (1 + 1e-12)  # 5 standard errors of τ
    assert ess(x, torch.ones(4, 500)).item() == pytest.approx(ess(x).item(), rel=1e-9)


@pytest.mark.parametrize("every", [1, 100])
def test_the_correlations_that_count_are_those_of_draws_with_a_weight(every):
    """Weights that are 0 in every other block; the mean over columns has an error of 2 %."""
    chosen = (torch.arange(600) // every % 2 == 0).double()
    weights = chosen.expand(4, 600)
    columns = [autoregressive(4, 600, -0.5 if every == 1 else 0.8, seed=k) for k in range(32)]
    x = torch.stack(columns, -1).double()
    if every == 1:  # of every second draw: an autoregression of a quarter
        expected = 4 * 300 / ((1 + 0.25) / (1 - 0.25))
    else:
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).double()
        x = torch.where(chosen[:, None] > 0, x, noise)
        expected = 4 * 300 / ((1 + 0.8) / (1 - 0.8))
    assert ess(x, weights).mean().item() == pytest.approx(expected, rel=0.15)


def test_a_draw_with_all_the_weight_is_one_draw():
    x = autoregressive(4, 500, 0.0)
    weights = torch.full((4, 500), 1e-6)
    weights[1, 7] = 1.0
    assert ess(x, weights).item() < 2


@pytest.mark.parametrize("statistic", [autocorrelation_time, integrated_time, ess, ess_tail, rhat])
def test_of_no_columns_there_are_no_figures(statistic):
    for shape in ((0,), (3, 0), (0, 2)):
        for draws in (8, 9):
            assert statistic(torch.zeros(2, draws, *shape)).shape == shape
    assert [it.shape for it in ess_and_rhat(torch.zeros(2, 8, 3, 0))] == [(3, 0), (3, 0)]


@pytest.mark.parametrize("statistic", [autocorrelation_time, ess, ess_tail, rhat])
def test_draws_that_cannot_be_judged_are_refused(statistic):
    with pytest.raises(ValueError, match=r"at least 4 draws each; got \[2, 3\]"):
        statistic(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"x must be \[chains, draws, ...\] .* got \[9\]"):
        statistic(torch.zeros(9))
    with pytest.raises(ValueError, match="x must be finite; got 1 that are not"):
        statistic(torch.tensor([[1.0, 2.0, 3.0, math.nan]]))

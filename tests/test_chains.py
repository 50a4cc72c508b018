import itertools
import math

import pytest
import torch

from rkl.metrics import Mean
from rkl.metrics.chains import BatchMeans, autocorrelation_time, ess, ess_tail, rhat, slots_of


def autoregressive(chains, draws, rho, columns=(), seed=0):
    """Stationary AR(1) chains of unit innovations: variance 1/(1 - rho²), τ = (1+rho)/(1-rho)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(chains, draws, *columns, generator=generator, dtype=torch.float64)
    x[:, 0] /= math.sqrt(1 - rho**2)
    for t in range(1, draws):
        x[:, t] += rho * x[:, t - 1]
    return x


def error_of(x, weights=None, length=1):
    means = BatchMeans(len(x), x.shape[2:], length)
    for chain, draws in enumerate(x):
        means.push(chain, draws, None if weights is None else weights[chain])
    return means.total()


RHO = torch.tensor([-0.5, 0.0, 0.5, 0.9], dtype=torch.float64)


def test_the_time_of_an_autoregressive_chain_is_its_closed_form():
    x = torch.stack([autoregressive(4, 20_000, rho) for rho in RHO.tolist()], -1)
    # sqrt(2 (2M + 1) / n) with M about 5 τ pairs: 2 % for the first three, 7 % for the last
    torch.testing.assert_close(
        autocorrelation_time(x), (1 + RHO) / (1 - RHO), rtol=0.15, atol=0.02
    )


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
    assert x.numel() / autocorrelation_time(x).item() == pytest.approx(mean, rel=1e-9)
    assert rhat(x).item() == pytest.approx(ratio, rel=1e-12)


def test_ranks_make_effective_numbers_indifferent_to_monotone_maps():
    x = autoregressive(4, 500, 0.6)
    for statistic in (ess, ess_tail):
        torch.testing.assert_close(statistic(x.exp()), statistic(x), rtol=1e-12, atol=0)
    assert (autocorrelation_time(x.mul(3).exp()) - autocorrelation_time(x)).abs() > 0.1


def test_columns_are_judged_one_by_one(monkeypatch):
    monkeypatch.setattr("rkl.metrics.chains.NUMBERS", 1_000)  # two columns at a time
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


def test_a_constant_is_as_good_as_independent_draws():
    x = torch.full((2, 100), 3.0)
    assert (autocorrelation_time(x), ess(x), rhat(x)) == (1, 200, 1)


def test_weights_of_half_the_draws_leave_half_the_effective_number():
    x = autoregressive(4, 500, 0.0)
    weights = torch.zeros(4, 500)
    weights[:, ::2] = 1
    assert ess(x, weights).item() == pytest.approx(ess(x).item() / 2, rel=1e-12)
    assert ess(x, torch.ones(4, 500)).item() == pytest.approx(ess(x).item(), rel=1e-12)


@pytest.mark.parametrize("statistic", [autocorrelation_time, ess, ess_tail, rhat])
def test_draws_that_cannot_be_judged_are_refused(statistic):
    with pytest.raises(ValueError, match=r"at least 4 draws each; got \[2, 3\]"):
        statistic(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"x must be \[chains, draws, ...\] .* got \[9\]"):
        statistic(torch.zeros(9))
    with pytest.raises(ValueError, match="x must be finite; got 1 that are not"):
        statistic(torch.tensor([[1.0, 2.0, 3.0, math.nan]]))


# Batch means


def test_the_error_is_that_of_batches_counted_by_hand():
    x = autoregressive(2, 8 * slots_of(2), 0.5)  # 8 draws to half a batch, none left over
    halves = x.reshape(2, -1, 8).mean(-1).flatten()
    batches = x.reshape(2, -1, 16).mean(-1).flatten()
    by_half, by_batch = (m.var() / len(m) for m in (halves, batches))
    found = error_of(x)
    assert by_half < by_batch < 1.4 * by_half
    torch.testing.assert_close(found.value, x.mean())
    torch.testing.assert_close(found.error.square(), 2 * by_batch - by_half, rtol=1e-12, atol=0)


@pytest.mark.parametrize("size", [1, 7, 64, 10_000])
def test_how_the_draws_arrive_changes_nothing(size):
    x = autoregressive(3, 1_001, 0.5, columns=(2,))
    means = BatchMeans(3, (2,))
    for start in range(0, 1_001, size):
        for chain in (2, 0, 1):
            means.push(chain, x[chain, start : start + size])
    torch.testing.assert_close(means.total(), error_of(x), rtol=1e-12, atol=1e-15)


def test_sums_over_runs_are_as_good_as_the_draws_themselves():
    x = autoregressive(2, 1_024, 0.5)
    means = BatchMeans(2, length=8)
    for chain in range(2):
        for start in range(0, 1_024, 256):
            sums = x[chain, start : start + 256].reshape(-1, 8).sum(1)
            means.add(chain, start, 8, sums, torch.full((32,), 8.0, dtype=torch.float64))
    torch.testing.assert_close(means.total(), error_of(x, length=8), rtol=1e-12, atol=0)


def test_memory_does_not_grow_with_the_draws():
    means = BatchMeans(1, (3,))
    before = means.sums.shape
    for _ in range(20):
        means.push(0, torch.zeros(5_000, 3))
    assert means.sums.shape == before == (1, 128, 3)
    assert means.length == 1_024  # 128 half batches hold 100,000 draws
    assert BatchMeans(1_000).sums.shape == (1_000, 4)


def test_equal_weights_change_nothing_and_zero_weights_are_as_if_not_drawn():
    x = autoregressive(2, 512, 0.5)
    plain = error_of(x)
    torch.testing.assert_close(error_of(x, torch.full((2, 512), 0.3)), plain)
    padded, weights = torch.full((2, 1024), 1e3, dtype=torch.float64), torch.zeros(2, 1024)
    padded[:, ::2], weights[:, ::2] = x, 1.0
    torch.testing.assert_close(error_of(padded, weights, length=2), plain)


def test_a_mean_that_hangs_on_one_draw_has_a_large_error():
    x = autoregressive(4, 1_000, 0.0)
    weights = torch.ones(4, 1_000, dtype=torch.float64)
    weights[1, 500], x[1, 500] = 4_000, 1.0
    even, heavy = error_of(x), error_of(x, weights)
    assert heavy.error > 10 * even.error


def test_the_error_along_slopes_is_that_of_the_projected_draws():
    x = autoregressive(4, 500, 0.7, columns=(3, 5))
    slopes = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(1)).double()
    means = BatchMeans(4, (3, 5))
    projected = BatchMeans(4, (2, 5))
    for chain in range(4):
        means.push(chain, x[chain])
        projected.push(chain, torch.einsum("dck,ock->dok", x[chain], slopes))
    torch.testing.assert_close(means.along(slopes), projected.error, rtol=1e-12, atol=0)


def test_chains_that_sit_apart_are_the_batches():
    x = autoregressive(4, 1_000, 0.0)
    x += torch.tensor([-3.0, -1.0, 1.0, 3.0])[:, None]
    means = x.mean(1)
    torch.testing.assert_close(error_of(x).error, means.std() / 2, rtol=1e-9, atol=0)


def test_batches_grow_where_draws_depend_on_each_other_over_longer():
    x = torch.stack([autoregressive(1, 1_000, rho, (400,), seed=3) for rho in (0.0, 0.95)], -1)
    error = error_of(x).error.square().mean(0).sqrt()
    truth = torch.tensor([1.0, 1 / (1 - 0.95)]) / math.sqrt(1_000)
    assert ((error / truth - 1).abs() < 0.15).all()  # 0.67 of the truth without growing


def test_a_single_batch_has_no_error():
    assert error_of(torch.ones(1, 1, dtype=torch.float64)).error.isnan()
    assert error_of(torch.ones(4, 10, dtype=torch.float64)) == Mean(
        torch.tensor(1.0, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64)
    )


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="at least 1; got 0 and 1"):
        BatchMeans(0)
    with pytest.raises(ValueError, match=r"values must be \[draws, 2\]; got \[5, 3\]"):
        BatchMeans(1, (2,)).push(0, torch.zeros(5, 3))


@pytest.mark.statistical
@pytest.mark.parametrize(("chains", "draws"), [(4, 1_000), (1, 4_000), (20, 200)])
@pytest.mark.parametrize("rho", [-0.5, 0.0, 0.5, 0.9])
def test_intervals_of_two_errors_hold_the_mean_as_often_as_they_say(chains, draws, rho):
    """A t interval of 2.02 errors and about 40 degrees of freedom claims 95 %.

    Of 4,000 replications, 0.0035 is one standard error; the window's own bias may take 2 %.
    """
    x = autoregressive(chains, draws, rho, columns=(4_000,), seed=7)
    found = error_of(x)
    covered = (found.value.abs() < 2.02 * found.error).double().mean().item()
    assert 0.925 < covered < 0.975
    assert (found.error / x.mean((0, 1)).std()).square().mean().sqrt() == pytest.approx(1, abs=0.1)


@pytest.mark.statistical
@pytest.mark.parametrize(("chains", "draws", "rho"), [(4, 250, 0.95), (4, 1_000, 0.99)])
def test_intervals_hold_the_mean_nine_times_in_ten_from_six_effective_draws_a_chain(
    chains, draws, rho
):
    """Fixed batches would hold it 8 times in 10: 0.82 and 0.77."""
    x = autoregressive(chains, draws, rho, columns=(4_000,), seed=9)
    found = error_of(x)
    assert (found.value.abs() < 1.96 * found.error).double().mean() > 0.9


@pytest.mark.statistical
def test_weighted_intervals_hold_the_mean_as_often_as_they_say():
    """Importance weights of a standard normal for draws of N(0, 1.5²) that depend."""
    x = autoregressive(4, 1_000, 0.5, columns=(3_000,), seed=8) * math.sqrt(1 - 0.25) * 1.5
    weights = (-x.square() / 2 + x.square() / (2 * 1.5**2)).exp()
    covered = []
    for column in range(3_000):
        found = error_of(x[..., column], weights[..., column])
        covered.append(bool(found.value.abs() < 2.02 * found.error))
    assert 0.925 < sum(covered) / 3_000 < 0.975  # one standard error is 0.004

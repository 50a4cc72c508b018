import math

import pytest
import torch
from test_chains import autoregressive

from rkl.stats import BatchMeans, Mean
from rkl.stats.batch_means import beside, slots_of


def error_of(x, weights=None, length=1):
    means = BatchMeans(len(x), x.shape[2:], length)
    for chain, draws in enumerate(x):
        means.push(chain, draws, None if weights is None else weights[chain])
    return means.total()


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


def test_sums_written_in_their_place_are_as_good_as_added():
    x = autoregressive(2, 1_024, 0.5)
    means = BatchMeans(2, length=16)
    for chain in range(2):
        place = means.room(chain, 0, run=16, runs=64)
        place.copy_(x[chain].reshape(-1, 16).sum(1))
    torch.testing.assert_close(means.total(), error_of(x, length=16), rtol=1e-12, atol=0)
    assert means.room(0, 0, run=8, runs=4) is None  # half a half batch
    assert means.room(0, 8, run=16, runs=4) is None  # across two of them
    assert means.room(0, 1_008, run=16, runs=2) is None  # beyond the last


def test_memory_does_not_grow_with_the_draws():
    means = BatchMeans(1, (3,))
    before = means.sums.shape
    for _ in range(20):
        means.push(0, torch.zeros(5_000, 3))
    assert means.sums.shape == before == (1, 128, 3)
    assert means.length == 1_024  # 128 half batches hold 100,000 draws
    assert BatchMeans(1_000).sums.shape == (1_000, 4)
    assert BatchMeans(2, length=10, draws=31).sums.shape == (2, 4)


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


def test_the_error_of_a_function_is_that_of_the_projected_draws():
    x = autoregressive(4, 500, 0.7, columns=(3, 5))
    x[:2, :, :, :2] += 20  # chains that disagree, in some columns
    slopes = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(1)).double()
    means, projected = BatchMeans(4, (3, 5)), BatchMeans(4, (2, 5))
    for chain in range(4):
        means.push(chain, x[chain])
        projected.push(chain, torch.einsum("dck,ock->dok", x[chain], slopes))
    moved = torch.einsum("hck,ock->hok", means.shifts, slopes)
    torch.testing.assert_close(means.error_of(moved), projected.error, rtol=1e-10, atol=0)


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


@pytest.mark.parametrize("chains", [1, 4])
@pytest.mark.parametrize("rho", [0.0, 0.95])
def test_errors_from_covariances_are_those_from_the_shifts_of_each_function(chains, rho):
    x = autoregressive(chains, 1_000, rho, columns=(3, 5))
    x[:, :, 2] = x[:, :, 0] - 2 * x[:, :, 1]  # no direction of its own
    x[: chains // 2, :, :, :2] += 20  # chains that disagree, in some columns
    weights = torch.rand(chains, 1_000, generator=torch.Generator().manual_seed(2)).double()
    slopes = torch.randn(3, 5, 2, generator=torch.Generator().manual_seed(1)).double()
    means = BatchMeans(chains, (3, 5))
    for chain in range(chains):
        means.push(chain, x[chain], weights[chain])
    wanted = means.error_of(torch.einsum("hck,cko->hko", means.shifts, slopes))
    scatter = means.covariances()
    changes = torch.einsum("dck,cko->dko", scatter.directions, slopes)
    torch.testing.assert_close(scatter.error_of(changes), wanted, rtol=1e-7, atol=0)


def test_means_beside_each_other_are_those_of_their_draws_together():
    x = autoregressive(2, 200, 0.5, columns=(4,))
    parts = [BatchMeans(2, (n,)) for n in (1, 3)]
    for chain in range(2):
        for means, draws in zip(parts, x[chain].split((1, 3), -1), strict=True):
            means.push(chain, draws)
    torch.testing.assert_close(beside(parts).total(), error_of(x), rtol=0, atol=0)

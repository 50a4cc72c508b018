import inspect
import math

import pytest
import torch

from rkl.stats import clustered_mean, mean


def test_a_mean_has_the_textbook_error_of_independent_draws():
    values = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    found = mean(values)
    torch.testing.assert_close(found.value, values.double().mean(0))
    torch.testing.assert_close(found.error, values.double().std(0) / 50**0.5)


def test_copies_of_a_token_within_its_row_add_nothing_to_what_is_known():
    values = torch.randn(20, generator=torch.Generator().manual_seed(1))
    copies = clustered_mean(8 * values, torch.full((20,), 8.0))
    torch.testing.assert_close(copies, mean(values))


def test_the_error_of_a_ratio_is_its_linearisation_written_out():
    total = torch.tensor([3.0, 10.0, 2.0, 7.0], dtype=torch.float64)
    count = torch.tensor([1.0, 4.0, 2.0, 5.0], dtype=torch.float64)
    ratio = 22 / 12
    residual = [t - ratio * n for t, n in zip(total.tolist(), count.tolist(), strict=True)]
    error = math.sqrt(4 / 3 * sum(it**2 for it in residual)) / 12
    found = clustered_mean(total, count)
    assert [it.item() for it in found] == pytest.approx([ratio, error], rel=1e-12)


@pytest.mark.statistical
def test_clustered_errors_are_the_spread_of_repeated_experiments():
    draw = torch.Generator().manual_seed(2)
    rows, tokens, repeats = 60, 10, 2000
    shared = torch.randn(repeats, rows, 1, generator=draw)
    values = 1 + shared + 0.5 * torch.randn(repeats, rows, tokens, generator=draw)
    count = torch.full((rows,), float(tokens))
    found = [clustered_mean(it.sum(-1), count) for it in values]
    spread = torch.stack([it.value for it in found]).std()
    claimed = torch.stack([it.error for it in found]).mean()
    assert claimed == pytest.approx(spread.item(), rel=0.05)  # sd of sd: 1/sqrt(2 * 2000) = 0.016
    naive = (values.flatten(1).std(-1) / (rows * tokens) ** 0.5).mean()
    assert naive < 0.5 * spread


def test_a_mean_says_what_it_cannot_know():
    assert mean(torch.tensor([2.0])).error.isnan()
    infinite = mean(torch.tensor([1.0, math.inf]))
    assert infinite.value == math.inf
    assert infinite.error.isnan()
    with pytest.raises(ValueError, match="values must hold at least one draw"):
        mean(torch.zeros(0))
    with pytest.raises(ValueError, match="total has 2 clusters but count has 3"):
        inspect.unwrap(clustered_mean)(torch.zeros(2), torch.ones(3))
    with pytest.raises(ValueError, match="count must hold at least one member; got 0"):
        clustered_mean(torch.zeros(2), torch.zeros(2))

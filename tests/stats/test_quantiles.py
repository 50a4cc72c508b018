import inspect
import math

import numpy as np
import pytest
import torch

from rkl.stats import interpolated_quantile, quantile


@pytest.mark.parametrize("at", [0.01, 0.05, 0.5, 0.9, 1.0])
def test_a_quantile_is_that_of_numpy_by_inversion_with_and_without_weights(at):
    draw = torch.Generator().manual_seed(0)
    values = torch.randn(200, 3, generator=draw, dtype=torch.float64)
    weights = torch.rand(200, generator=draw, dtype=torch.float64)
    for w in (None, weights):
        expected = np.quantile(
            values.numpy(), at, 0, method="inverted_cdf", weights=None if w is None else w.numpy()
        )
        assert quantile(values, at, w).tolist() == expected.tolist()


def test_equal_weights_change_no_quantile_and_weights_count_as_copies_do():
    values = torch.tensor([4.0, 1.0, 3.0, 2.0])
    counts = torch.tensor([3, 1, 2, 4])
    for at in torch.arange(1, 41).div(40).tolist():
        assert quantile(values, at, torch.full((4,), 7.0)) == quantile(values, at)
        copies = values.repeat_interleave(counts)
        assert quantile(values, at, counts.double()) == quantile(copies, at)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_weights_of_any_precision_give_the_same_quantile(dtype):
    values = torch.arange(100_000.0)
    assert quantile(values, 0.5, torch.ones(100_000, dtype=dtype)) == 49_999


def test_an_interpolated_quantile_is_numpys_default():
    values = torch.randn(101, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for at in (0.0, 0.05, 0.37, 1.0):
        found = interpolated_quantile(values, at)
        torch.testing.assert_close(found, torch.from_numpy(np.quantile(values.numpy(), at, 0)))


@pytest.mark.parametrize(
    ("values", "at", "weights", "told"),
    [
        (torch.zeros(0), 0.5, None, "values must be .*not empty; got \\[0\\]"),
        (torch.zeros(3), 0.0, None, "at must be finite, above 0, at most 1; got 0.0"),
        (torch.zeros(3), 0.5, torch.ones(2), r"weights must be \[3\]; got \[2\]"),
        (torch.zeros(3), 0.5, torch.zeros(3), "weights must be finite, .* not all 0"),
        (torch.zeros(2), 0.5, torch.tensor([-1.0, 2.0]), "weights must be .*from -1 to 2"),
        (torch.zeros(2), 0.5, torch.tensor([1.0, math.nan]), "weights must be finite"),
    ],
)
def test_a_quantile_refuses_what_has_none(values, at, weights, told):
    with pytest.raises(ValueError, match=told):
        inspect.unwrap(quantile)(values, at, weights)

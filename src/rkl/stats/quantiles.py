"""Quantiles of draws, weighted or not, column by column."""

import math

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from rkl.checks import floats, number

ROUNDING = 1e-12  # of a share, by which a sum of weights may miss it


def quantile(
    values: Float[Tensor, "draws *columns"],
    at: float,
    weights: Float[Tensor, " draws"] | None = None,
) -> Float[Tensor, "*columns"]:
    """The smallest draw at which the cumulated weight reaches the share ``at``.

    It is one of the draws, so that monotone maps take it along.

    Args:
        values: Draws along the first axis.
        at: Share of the weight, above 0 and at most 1.
        weights: Weight of each draw, at least 0; all the same if None.

    >>> quantile(torch.tensor([3.0, 1.0, 2.0, 4.0]), 0.5)
    tensor(2.)
    >>> quantile(torch.tensor([3.0, 1.0, 2.0]), 0.5, torch.tensor([0.6, 0.2, 0.2]))
    tensor(3.)
    """
    floats("values", values)
    number("at", at, above=0, at_most=1)
    if not values.ndim or not len(values):
        raise ValueError(f"values must be [draws, ...], not empty; got {list(values.shape)}.")
    ordered = values.sort(0)
    if weights is None:
        return ordered.values[math.ceil(at * len(values) * (1 - ROUNDING)) - 1]
    floats("weights", weights)
    if weights.shape != values.shape[:1]:
        raise ValueError(f"weights must be [{len(values)}]; got {list(weights.shape)}.")
    weights = weights.double()
    if not (weights >= 0).all() or not 0 < weights.sum() < math.inf:
        raise ValueError(
            "weights must be finite, at least 0, and not all 0; "
            f"got values from {weights.min():.4g} to {weights.max():.4g}."
        )
    share = (weights / weights.sum())[ordered.indices].cumsum(0)
    place = (share < at * (1 - ROUNDING)).sum(0, keepdim=True).clamp_max(len(values) - 1)
    return ordered.values.gather(0, place)[0]


def interpolated_quantile(
    values: Float[Tensor, "draws columns"], at: float
) -> Float[Tensor, " columns"]:
    """The quantile of equally weighted draws, linear between neighbours, as NumPy's default.

    >>> interpolated_quantile(torch.tensor([[3.0], [1.0], [2.0], [4.0]]), 0.5)
    tensor([2.5000])
    """
    # NumPy selects faster than torch, whose quantile takes no more than 2^24 numbers
    rows = values.mT.contiguous().numpy()
    place = at * (rows.shape[1] - 1)
    ends = [math.floor(place), math.ceil(place)]
    low, high = torch.from_numpy(np.partition(rows, ends, -1)[:, ends]).unbind(-1)
    return low + (place - math.floor(place)) * (high - low)

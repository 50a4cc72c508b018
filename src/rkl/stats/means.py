"""A mean with its standard error."""

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from rkl.checks import floats
from rkl.tables import table_of


class Mean(NamedTuple):
    """A mean and its standard error, of one shape: one number or one per column."""

    value: Float[Tensor, "*columns"]
    error: Float[Tensor, "*columns"]

    def pair(self) -> tuple[float, float]:
        """Value and error of a single number, as a cell of a table holds them."""
        return self.value.item(), self.error.item()

    def _repr_html_(self) -> str:
        return table_of("Mean and standard error", {"mean": tuple(self)})._repr_html_()


def mean(values: Float[Tensor, "draws *columns"]) -> Mean:
    """The mean of independent draws and its standard error, s/√n.

    The error of a single draw is nan. An infinite draw makes the mean
    infinite and its error nan.

    Args:
        values: Independent draws, along the first axis.

    Returns:
        Mean and standard error in the unit of the values, in double precision.

    >>> mean(torch.tensor([1.0, 2.0, 6.0]))
    Mean(value=tensor(3., dtype=torch.float64), error=tensor(1.5275, dtype=torch.float64))
    """
    floats("values", values)
    if not values.ndim or not len(values):
        raise ValueError("values must hold at least one draw; got none.")
    return clustered_mean(values, torch.ones(len(values), device=values.device))


def clustered_mean(
    total: Float[Tensor, "clusters *columns"], count: Float[Tensor, " clusters"]
) -> Mean:
    r"""The mean over the members of clusters, with an error that accounts for the clusters.

        m = Σ total / Σ count,    error² = R/(R − 1) Σ (total − m count)² / (Σ count)²

    The tokens of one row resemble each other, and dividing by the root of their number claims
    more than was measured. Only the R clusters are taken as independent: the linearised error
    of a ratio, which for clusters of one member is s/√n.

    Source: Miller (2024), arXiv 2411.00640, section 2.2; Cochran (1977), section 6.3.

    Args:
        total: Sum over the members of each cluster.
        count: Number of members of each cluster.

    Returns:
        Mean and standard error per member, in double precision; the error of a single cluster
        is nan, and so is that of an infinite mean.

    >>> rows = torch.tensor([[1.0, 3.0], [4.0, 9.0]])
    >>> clustered_mean(rows.sum(1), torch.tensor([2.0, 2.0]))
    Mean(value=tensor(4.2500, dtype=torch.float64), error=tensor(2.2500, dtype=torch.float64))
    """
    clusters = _clusters(total, count)
    total, count = total.double(), count.double()
    members = count.sum()
    if not members > 0:
        raise ValueError(f"count must hold at least one member; got {members:.0f} in all.")
    if (count < 0).any():
        raise ValueError(f"count must be at least 0 for every cluster; got {count.min():.0f}.")
    value = total.sum(0) / members
    by_cluster = count.reshape(-1, *[1] * value.ndim)
    spread = (total - value * by_cluster).square().sum(0).sqrt() / members
    return Mean(
        value, spread * (math.sqrt(clusters / (clusters - 1)) if clusters > 1 else math.nan)
    )


def _clusters(total: Tensor, count: Tensor) -> int:
    floats("total", total)
    floats("count", count)
    if count.ndim != 1 or not total.ndim:
        raise ValueError(
            "total must be [clusters, ...] and count [clusters]; "
            f"got {list(total.shape)} and {list(count.shape)}."
        )
    if len(count) != len(total):
        raise ValueError(f"total has {len(total)} clusters but count has {len(count)}.")
    return len(total)


def to_json(mean: Mean) -> dict[str, Any]:
    """A mean as JSON can hold it: numbers, or lists of them.

    >>> {name: round(x, 6) for name, x in to_json(mean(torch.tensor([1.0, 3.0]))).items()}
    {'value': 2.0, 'error': 1.0}
    """
    return {"value": mean.value.tolist(), "error": mean.error.tolist()}

"""Similarity of two sets of numbers: overlap of histograms, earth mover's distance."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from rkl.checks import floats, integer, number
from rkl.stats import Mean


def histogram_overlap(
    a: Float[Tensor, " draws"],
    b: Float[Tensor, " others"],
    *,
    low: float,
    high: float,
    bins: int = 100,
) -> Mean:
    """Σ min(share of a, share of b) over bins of one width: 1 for equal histograms.

    Two samples of one distribution overlap by less than 1, the less so the finer the bins: compare
    with the overlap of halves of one sample. Draws out of range are in no bin, and so do not
    overlap.

    Args:
        a: Independent draws.
        b: Others.
        low: Where the first bin begins.
        high: Where the last one ends.
        bins: Their number.

    Returns:
        The overlap in [0, 1] and its standard error, the bins being held.

    >>> a = torch.tensor([0.1, 0.1, 0.6, 0.6])
    >>> histogram_overlap(a, a[1:], low=0.0, high=1.0, bins=2).value
    tensor(0.8333, dtype=torch.float64)
    """
    a, b = _check_draws(a, b)
    number("low", low)
    number("high", high, above=low)
    integer("bins", bins, at_least=1)
    share_a, share_b = (torch.histc(it, bins, low, high) / len(it) for it in (a, b))
    below = share_a < share_b
    counted = share_a[below].sum(), share_b[~below].sum()
    variances = [s * (1 - s) / len(it) for s, it in zip(counted, (a, b), strict=True)]
    return Mean(counted[0] + counted[1], (variances[0] + variances[1]).sqrt())


def earth_mover(a: Float[Tensor, " draws"], b: Float[Tensor, " others"]) -> Mean:
    r"""Earth mover's distance: the mean distance that draws of a are moved to those of b.

        W₁ = ∫ |F_a(t) − F_b(t)| dt

    Two samples of one distribution are some 1/√n apart: compare with halves of one sample. The
    error is that of the linearised distance, and too small where the two distributions are the
    same.

    Source: Ramdas, García Trillos and Cuturi (2017), Entropy 19, 47, proposition 1.

    Args:
        a: Independent draws.
        b: Others, of any number.

    Returns:
        The distance in the unit of the draws, and its standard error.

    >>> earth_mover(torch.tensor([0.0, 1.0]), torch.tensor([2.0, 2.0, 4.0, 4.0])).value
    tensor(2.5000, dtype=torch.float64)
    """
    a, b = _check_draws(a, b)
    edges = torch.cat([a, b]).sort().values
    width = edges.diff()
    gap = _below(a, edges[:-1]) - _below(b, edges[:-1])
    area = torch.cat([gap.new_zeros(1), (gap.sign() * width).cumsum(0)])
    moved = [area[torch.searchsorted(edges, it.contiguous())] for it in (a, b)]
    errors = [it.std() / math.sqrt(len(it)) for it in moved]
    return Mean((gap.abs() * width).sum(), torch.hypot(errors[0], errors[1]))


def _below(x: Tensor, edges: Tensor) -> Tensor:
    """Share of x at or below each edge."""
    return torch.searchsorted(x.sort().values, edges, right=True) / len(x)


def _check_draws(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    for name, draws in (("a", a), ("b", b)):
        floats(name, draws)
        if draws.ndim != 1 or len(draws) < 2:
            raise ValueError(f"{name} must be [draws], two at least; got {list(draws.shape)}.")
        if not draws.isfinite().all():
            raise ValueError(
                f"{name} must be finite; got {int((~draws.isfinite()).sum())} not so."
            )
    return a.detach().double(), b.detach().double()

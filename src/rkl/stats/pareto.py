"""Tail indices of draws, and which moments they let exist."""

import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rkl.checks import choice, floats

PRIOR, GRID = 3, 30  # of Zhang and Stephens
WEIGHT, TOWARDS = 10, 0.5  # the fit is drawn to 0.5 as if by ten more draws
MIN_DRAWS = 25  # draws, for a tail of five
NUMBERS = 2**22  # terms of the fit held at a time
FACTORS_PER_LOG = 8  # factors 1 − θ x of which one logarithm is taken
NO_MEAN, NO_ERROR = 1.0, 0.5  # shapes from which there is no mean, and no normal error of it
PARTS = 2, 4  # parts of the tail that are fitted too
MAX_DISTANCE = 1.2  # √n times Kolmogorov's distance to the fit: 0.1 % of Pareto tails exceed it
Z_CLUSTER = -3.719  # normal quantile of 1e-4, for the spacings of one length


def pareto_k(
    values: Float[Tensor, "draws *columns"], *, side: Literal["both", "upper"] = "both"
) -> Float[Tensor, "*columns"]:
    r"""Shape k of a generalised Pareto tail: moments below the 1/k-th exist, no others.

    At k ≥ 1 there is no mean, at k ≥ 0.5 no variance, hence no error of normal theory. The
    3 √n largest draws and the 3 √n smallest (a fifth of them, up to 225 draws) are fitted
    by Zhang and Stephens' near-Bayesian estimate, and the heavier tail counts. Above k = 0.7
    means of fewer than a million draws are worth little. The estimate has an error of about
    (1 + k) / √(3 √n): 0.1 for 10,000 draws.

    For weighted draws, judge the upper tail of the weights, as small ones cannot hurt a mean, and
    both tails of values times weights.

    Source: Zhang and Stephens (2009), Technometrics 51, 316; Vehtari et al. (2024), arXiv
    1507.02646, for the number of draws and the weak prior.

    Args:
        values: Draws of one or many quantities.
        side: "upper" judges the largest draws alone.

    Returns:
        Shape k, 1/a for a tail like x^(−a − 1), about 0 for one like exp(−x), below 0 for a
        bounded one; −inf where the extreme draws are all the same, inf where one is infinite,
        nan for fewer than 25 draws.

    >>> uniform = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    >>> pareto_k(uniform**-0.7)
    tensor(0.6900, dtype=torch.float64)
    """
    choice("side", side, ("both", "upper"))
    columns, length, rows = _rows(values)
    if not length:
        return torch.full(columns, math.nan, dtype=torch.float64)
    ends = 1 if side == "upper" else 2
    k = [torch.stack([_shape(top) for top in _ends(part, length)[:ends]]).amax(0) for part in rows]
    return torch.cat(k).where(~_infinite(values), math.inf).reshape(columns)


class Tail(NamedTuple):
    """The tail of a quantity, from its draws.

    Attributes:
        k: Shape of the longest part of the tail that a generalised Pareto distribution fits, of
            the heavier side; nan where none does, as where draws are tied or lie in clusters.
        infinite_mean: True where the draws indicate an infinite mean.
    """

    k: Float[Tensor, "*columns"]
    infinite_mean: Bool[Tensor, "*columns"]


def tail(values: Float[Tensor, "draws *columns"]) -> Tail:
    r"""The shape of the tails, and a test for an infinite mean.

    A generalised Pareto distribution fitted to ties, or to a cluster of draws that lies apart, has
    a large shape that does not reflect moments. So its fit is tested (Kolmogorov's distance),
    and an infinite mean is concluded only where the whole tail is fitted with k ≥ 1, its outer
    half and quarter agree, and no number of the largest draws lie closer together than Pareto
    draws do: above the r-th largest of them the mean of log x exceeds its least by Gamma(r, r)
    times k.

    Source: as :func:`pareto_k`; Hill (1975), Annals of Statistics 3, 1163, for the spacings.

    Args:
        values: Independent draws of one or many quantities. Correlated ones are fitted worse, so
            that an infinite mean is concluded less often.

    >>> cluster = torch.cat([torch.linspace(-1, 1, 3960), torch.linspace(14, 15, 40)]).double()
    >>> pareto_k(cluster).item() > 1, tail(cluster).infinite_mean.item()
    (True, False)
    """
    columns, length, rows = _rows(values)
    if not length:
        unknown = torch.full(columns, math.nan, dtype=torch.float64)
        return Tail(unknown, torch.zeros(columns, dtype=torch.bool))
    k, infinite = [], []
    for part in rows:
        middle = part[:, (part.shape[1] - 1) // 2, None]
        sides = [_side(top) for top in _ends(part - middle, length)]
        both = torch.stack([side.k for side in sides])
        larger = both.where(~both.isnan(), -math.inf).amax(0)
        k.append(torch.where(both.isnan().any(0) & (larger < NO_ERROR), math.nan, larger))
        infinite.append(sides[0].infinite_mean | sides[1].infinite_mean)
    endless = _infinite(values)
    shape = torch.cat(k).where(~endless, math.inf).reshape(columns)
    return Tail(shape, (torch.cat(infinite) | endless).reshape(columns))


def _rows(values: Tensor) -> tuple[torch.Size, int, Iterator[Tensor]]:
    """The shape of the columns, the length of a tail (0 for too few), and rows of rising draws."""
    floats("values", values)
    if not values.ndim:
        raise ValueError("values must be [draws, ...]; got a single number.")
    if values.isnan().any():
        raise ValueError(f"values must be numbers; got {int(values.isnan().sum())} nan.")
    columns, count = values.shape[1:], len(values)
    if count < MIN_DRAWS:
        return columns, 0, iter(())
    length = math.ceil(3 * math.sqrt(count)) if count > 225 else count // 5
    rows = values.detach().cpu().double().reshape(count, -1).mT.contiguous()
    rows = torch.from_numpy(np.sort(rows.numpy(), -1))  # NumPy sorts faster than torch selects
    rows = torch.where(rows[:, :1].isinf() | rows[:, -1:].isinf(), 0.0, rows)
    return columns, length, iter(rows.split(max(1, NUMBERS // (length * _points(length)))))


def _infinite(values: Tensor) -> Tensor:
    return values.detach().cpu().isinf().reshape(len(values), -1).any(0)


def _ends(rows: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """The largest values of every rising row; the smallest with their sign changed, rising."""
    return rows[:, -length - 1 :], -rows[:, : length + 1].flip(-1)


def _side(top: Tensor) -> Tail:
    """The tail of one side, from its largest values less the median, rising."""
    length = top.shape[1] - 1
    k, distance = _fit(top)
    fitted = distance <= MAX_DISTANCE
    infinite = ~_has_cluster(top, NO_MEAN) & (k >= NO_MEAN) & fitted
    k = torch.where(fitted, k, math.nan)
    for part in PARTS:
        size = max(length // part, 5)
        asked = (k.isnan() | infinite).nonzero()[:, 0]  # for the others the whole tail decides
        shape, distance = _fit(top[asked, -size - 1 :])
        infinite[asked] &= shape >= NO_MEAN - 2 * (1 + NO_MEAN) / math.sqrt(size)
        shorter = torch.where(distance <= MAX_DISTANCE, shape, math.nan)
        k[asked] = torch.where(k[asked].isnan(), shorter, k[asked])
    k = torch.where((k >= NO_ERROR) & _has_cluster(top, NO_ERROR), math.nan, k)
    return Tail(torch.where(top[:, -1] <= top[:, 0], -math.inf, k), infinite)


def _has_cluster(top: Tensor, k: float) -> Tensor:
    """True where some of the largest values lie closer together than in a tail of shape k."""
    logs = top.clamp_min(torch.finfo(top.dtype).tiny).log().flip(-1)
    counts = torch.arange(1, logs.shape[1], dtype=top.dtype)
    above = logs[:, :-1].cumsum(-1) / counts - logs[:, 1:]  # a mean of r exponentials, times k
    # Wilson and Hilferty's quantile of Gamma(r) / r, which errs towards 0 here
    least = (1 - 1 / (9 * counts) + Z_CLUSTER / (3 * counts.sqrt())).clamp_min(0).pow(3)
    return (above < k * least)[:, 3:].any(-1)


def _points(length: int) -> int:
    return GRID + math.isqrt(length)


def _shape(top: Tensor) -> Tensor:
    """Shape k of excesses over the smallest of the top draws, which come in rising order."""
    excess, flat = _excesses(top)
    return torch.where(flat, -math.inf, _shrunk_mean(_logs(excess)))


def _fit(top: Tensor) -> tuple[Tensor, Tensor]:
    """Shape k, and √n times Kolmogorov's distance of the excesses from their fit."""
    excess, flat = _excesses(top)
    logs, count = _logs(excess), excess.shape[1]
    below = -torch.expm1(-logs / logs.mean(-1, keepdim=True))
    middles = (torch.arange(count, dtype=excess.dtype) + 0.5) / count
    distance = ((below - middles).abs().amax(-1) + 0.5 / count) * math.sqrt(count)
    return torch.where(flat, -math.inf, _shrunk_mean(logs)), distance


def _excesses(top: Tensor) -> tuple[Tensor, Tensor]:
    """Excesses [rows, draws] over the smallest of the top draws, and the rows that have none."""
    excess = top[:, 1:] - top[:, :1]
    flat = excess[:, -1] <= 0
    return torch.where(flat[:, None], 1.0, excess), flat


def _shrunk_mean(logs: Tensor) -> Tensor:
    """Shape k, the mean of the logarithms, shrunk to that of the prior."""
    count = logs.shape[1]
    return (count * logs.mean(-1) + WEIGHT * TOWARDS) / (count + WEIGHT)


def _logs(excess: Tensor) -> Tensor:
    """Log(1 − θ x) at the estimate of θ; their mean is k.

    With θ = −k/σ and k(θ) = mean log(1 − θ x), the profile log-likelihood of θ is
    n (log(−θ/k) − k − 1); θ is averaged over it on a grid.
    """
    count, points = excess.shape[1], _points(excess.shape[1])
    excess = excess / excess[:, -1:]  # k has no unit; now neither have the excesses
    quartile = excess[:, math.floor(count / 4 + 0.5) - 1, None]
    quartile = torch.where(quartile > 0, quartile, 1.0)
    grid = torch.arange(points, dtype=excess.dtype, device=excess.device) + 0.5
    theta = 1 + (1 - (points / grid).sqrt()) / (PRIOR * quartile)
    shape = _mean_log(theta, excess)
    scale = torch.where(theta == 0, excess.mean(-1, keepdim=True), -shape / theta)
    likelihood = -count * (scale.log() + shape + 1)
    mean = (theta * likelihood.softmax(-1)).sum(-1, keepdim=True)
    return torch.log1p(-mean * excess)


def _mean_log(theta: Tensor, excess: Tensor) -> Tensor:
    """The mean [rows, points] of log(1 − θ x), by one logarithm for eight excesses."""
    count = excess.shape[1]
    padded = torch.nn.functional.pad(excess, (0, -count % FACTORS_PER_LOG))
    product = torch.ones((), dtype=excess.dtype)
    for part in padded.unflatten(1, (FACTORS_PER_LOG, -1)).unbind(1):
        product = product * (1 - theta[:, :, None] * part[:, None])
    if product.isfinite().all() and (product > 0).all():
        return product.log().sum(-1) / count
    return torch.log1p(-theta[:, :, None] * excess[:, None]).mean(-1)

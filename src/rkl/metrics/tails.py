"""How heavy tails are: which moments exist, judged from draws."""

import math

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from rkl.divergences.base import floats

PRIOR, GRID = 3, 30  # of Zhang and Stephens
WEIGHT, TOWARDS = 10, 0.5  # the fit is drawn to 0.5 as if by ten more draws
FEWEST = 25  # draws, for a tail of five
NUMBERS = 2**22  # terms of the fit held at a time


def pareto_k(values: Float[Tensor, "draws *columns"]) -> Float[Tensor, "*columns"]:
    r"""Shape k of a generalised Pareto tail: moments below the 1/k-th exist, no others.

    At k ≥ 1 there is no mean, at k ≥ 0.5 no variance, hence no error of normal theory. The
    3 √n largest draws and the 3 √n smallest (a fifth of them, up to 225 draws) are fitted
    by Zhang and Stephens' near-Bayesian estimate, and the heavier tail counts. Above k = 0.7
    means of fewer than a million draws are worth little. The estimate has an error of about
    (1 + k) / √(3 √n): 0.1 for 10,000 draws.

    For weighted draws, judge the weights, and values times weights.

    Source: Zhang and Stephens (2009), Technometrics 51, 316; Vehtari et al. (2024), arXiv
    1507.02646, for the number of draws and the weak prior.

    Args:
        values: Draws of one or many quantities.

    Returns:
        k: 1/a for a tail like x^(−a − 1), about 0 for one like exp(−x), below 0 for a bounded
        one; −inf where the extreme draws are all the same, inf where one is infinite, nan for
        fewer than 25 draws.

    >>> uniform = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    >>> pareto_k(uniform**-0.7)
    tensor(0.6900, dtype=torch.float64)
    """
    floats("values", values)
    if not values.ndim:
        raise ValueError("values must be [draws, ...]; got a single number.")
    if values.isnan().any():
        raise ValueError(f"values must be numbers; got {int(values.isnan().sum())} nan.")
    columns, count = values.shape[1:], len(values)
    if count < FEWEST:
        return torch.full(columns, math.nan, dtype=torch.float64)
    length = math.ceil(3 * math.sqrt(count)) if count > 225 else count // 5
    rows = values.detach().cpu().double().reshape(count, -1).mT.contiguous()
    at_once = max(1, NUMBERS // (length * _points(length)))
    k = [_heavier(part, length) for part in rows.split(at_once)]
    return torch.cat(k).reshape(columns)


def _points(length: int) -> int:
    return GRID + math.isqrt(length)


def _heavier(rows: Tensor, length: int) -> Tensor:
    """The larger k of both tails of every row."""
    infinite = rows.isinf().any(-1)
    rows = torch.where(infinite[:, None], 0.0, rows)
    ordered = torch.from_numpy(np.sort(rows.numpy(), -1))  # NumPy sorts faster than torch selects
    ends = ordered[:, -length - 1 :], -ordered[:, : length + 1].flip(-1)
    k = torch.maximum(*map(_of_tail, ends))
    return torch.where(infinite, math.inf, k)


def _of_tail(top: Tensor) -> Tensor:
    """K of excesses over the smallest of the top draws, which come in rising order."""
    excess = top[:, 1:] - top[:, :1]
    flat = excess[:, -1] <= 0
    k = _fitted(torch.where(flat[:, None], 1.0, excess))
    return torch.where(flat, -math.inf, k)


def _fitted(excess: Tensor) -> Tensor:
    """K of a generalised Pareto law, from rising excesses [rows, draws].

    With θ = −k/σ and k(θ) = mean log(1 − θ x), the profile log-likelihood of θ is
    n (log(−θ/k) − k − 1); θ is averaged over it on a grid.
    """
    count, points = excess.shape[1], _points(excess.shape[1])
    excess = excess / excess[:, -1:]  # k has no unit; now neither have the excesses
    quartile = excess[:, math.floor(count / 4 + 0.5) - 1, None]
    quartile = torch.where(quartile > 0, quartile, 1.0)
    grid = torch.arange(points, dtype=excess.dtype, device=excess.device) + 0.5
    theta = 1 + (1 - (points / grid).sqrt()) / (PRIOR * quartile)
    shape = torch.log1p(-theta[:, :, None] * excess[:, None]).mean(-1)
    scale = torch.where(theta == 0, excess.mean(-1, keepdim=True), -shape / theta)
    likelihood = -count * (scale.log() + shape + 1)
    mean = (theta * likelihood.softmax(-1)).sum(-1, keepdim=True)
    k = torch.log1p(-mean * excess).mean(-1)
    return (count * k + WEIGHT * TOWARDS) / (count + WEIGHT)

"""Functions of one number that keep their digits: excesses, and inverses of digamma."""

import torch
from torch import Tensor


def log_gap(u: Tensor) -> Tensor:
    """U − log(1 + u), at least 0, to relative precision.

    Near 0 from log(1 + u) = 2 artanh s with s = u / (2 + u).
    """
    s = torch.where(u.abs() < 0.1, u / (2 + u), 0.0)
    t = s * s
    series = 1 / 3 + t * (1 / 5 + t * (1 / 7 + t * (1 / 9 + t * (1 / 11 + t / 13))))
    return torch.where(u.abs() < 0.1, s * (u - 2 * t * series), u - torch.log1p(u))


def exp_gap(t: Tensor) -> Tensor:
    """exp(t) − 1 − t, at least 0, to relative precision."""
    near = torch.where(t.abs() < 0.1, t, 0.0)
    series = 1.0 + near / 10
    for k in range(9, 2, -1):
        series = 1 + near / k * series
    return torch.where(t.abs() < 0.1, near * near / 2 * series, torch.expm1(t) - t)


def trigamma(x: Tensor) -> Tensor:
    """ψ′(x)."""
    return torch.polygamma(1, x)


def digamma_inverse(y: Tensor) -> Tensor:
    """X with ψ(x) = y, by Newton's method from Minka's start.

    Source: Minka (2000), "Estimating a Dirichlet distribution", appendix C.
    """
    x = torch.where(y > -2.22, y.exp() + 0.5, -1 / (y + 0.5772156649015329))
    for _ in range(6):
        x = x - (torch.digamma(x) - y) / trigamma(x)
    return x


def shape_of_gap(gap: Tensor) -> Tensor:
    """The shape x of a Gamma law, log x − ψ(x) = gap, by Minka's generalised Newton method.

    Source: Minka (2002), "Estimating a Gamma distribution", eq. (10).
    """
    x = (3 - gap + ((gap - 3).square() + 24 * gap).sqrt()) / (12 * gap)
    for _ in range(6):
        short = x.log() - torch.digamma(x) - gap
        x = 1 / (1 / x + short / (x - x * x * trigamma(x)))
    return x

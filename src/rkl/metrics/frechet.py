"""The Fréchet distance of samples on features of the user's choice."""

import torch
from jaxtyping import Float
from torch import Tensor

from rkl.metrics.neighbours import checked_pair, common_unit
from rkl.stats import Mean


def frechet_distance(
    *, real: Float[Tensor, "reals features"], fake: Float[Tensor, "fakes features"]
) -> Mean:
    r"""Squared Fréchet distance between Gaussians with the moments of the samples.

        |m − n|² + tr(C + D − 2 (C^½ D C^½)^½)

    On Inception features this is the FID. It is one number for all ways of being wrong:
    distributions too narrow and distributions too wide can have the same. It is biased upwards by
    about 1/N, which is what two halves of the real samples show; compare at equal numbers only.

    The error is that of the linearised distance, whose slope is the optimal transport between
    the Gaussians. It vanishes where the distributions are equal: near the bias it is no evidence.

    Source: Dowson and Landau (1982); Heusel et al. (2017), arXiv 1706.08500, eq. (6).

    Args:
        real: Features of samples of the target.
        fake: Features of samples of the model.

    Returns:
        The squared distance and its standard error, in squared units of the features.

    Raises:
        TypeError: The features are no tensors of floats.
        ValueError: They are not [samples, features], alike in features and finite, or there are
            fewer than two samples of a kind.

    >>> x = torch.tensor([[-1.0], [1.0]])
    >>> frechet_distance(real=x, fake=1.5 * x + 1).value
    tensor(1.5000, dtype=torch.float64)
    """
    real, fake = (it.double() for it in checked_pair(real, fake))
    for name, features in (("real", real), ("fake", fake)):
        if len(features) < 2:
            raise ValueError(f"{name} must hold two samples at least; got {len(features)}.")
    unit = common_unit(real, fake)
    real, fake = real / unit, fake / unit
    (m, c), (n, d) = ((it.mean(0), torch.atleast_2d(it.T.cov())) for it in (real, fake))
    root, inverse = _roots(c)
    middle, middle_inverse = _roots(root @ d @ root)
    value = (m - n).square().sum() + c.trace() + d.trace() - 2 * middle.trace()
    there = inverse @ middle @ inverse  # C to D
    back = root @ middle_inverse @ root  # D to C
    slopes = (_slope(real - m, m - n, there), _slope(fake - n, n - m, back))
    error = torch.stack([it.var() / len(it) for it in slopes]).sum().sqrt()
    value = value.clamp_min(0.0)  # rounding may undercut it
    return Mean(*(unit * (unit * it).cpu() for it in (value, error)))


def frechet_bias(
    *, real: Float[Tensor, "reals features"], fake: Float[Tensor, "fakes features"]
) -> float:
    r"""The mean Fréchet distance of two samples of one distribution, of these sizes.

        (1/N + 1/M) [tr C + ½ Σ λ_i λ_j (1 + δ_ij) / (λ_i + λ_j)]

    with the eigenvalues λ of the pooled covariance C: the second order of the distance, with
    the fluctuations that moments of normal samples have.

    >>> x = torch.randn(500, 8, generator=torch.Generator().manual_seed(0))
    >>> round(frechet_bias(real=x, fake=x), 2)  # 0.104 for a unit covariance
    0.1
    """
    real, fake = (it.double() for it in checked_pair(real, fake))
    unit = common_unit(real, fake)
    both = torch.cat([(it / unit) - (it / unit).mean(0) for it in (real, fake)])
    values = torch.linalg.eigvalsh(torch.atleast_2d(both.T.cov())).clamp_min(0.0)
    sums = values[:, None] + values
    pairs = torch.where(sums > 0, values[:, None] * values / sums.clamp_min(1e-300), 0.0)
    total = values.sum() + (pairs.sum() + pairs.diagonal().sum()) / 2
    return unit * (unit * total.item() * (1 / len(real) + 1 / len(fake)))


def _roots(c: Tensor) -> tuple[Tensor, Tensor]:
    """C^½ and C^−½, the latter 0 where C is singular."""
    values, vectors = torch.linalg.eigh(c)
    floor = values[-1].clamp_min(0.0) * len(c) * torch.finfo(c.dtype).eps
    root = values.clamp_min(0.0).sqrt()
    inverse = torch.where(values > floor, 1 / root, 0.0)
    return (vectors * root) @ vectors.T, (vectors * inverse) @ vectors.T


def _slope(centred: Tensor, shift: Tensor, transport: Tensor) -> Tensor:
    """Derivative of the distance in the weight of each sample, up to a constant and 1/N."""
    remaining = centred - centred @ transport
    return 2 * centred @ shift + (centred * remaining).sum(1)

"""The precision-recall curve of samples, from the histograms of their clusters."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from rkl.metrics import Mean
from rkl.metrics.neighbours import centred, checked_pair, common_unit
from rkl.metrics.precision_recall import SampledCurve
from rkl.metrics.precision_recall.curve import checked_slopes

ROUNDS = 100  # of Lloyd's algorithm at most


def prd_curve(
    *,
    real: Float[Tensor, "reals features"],
    fake: Float[Tensor, "fakes features"],
    clusters: int = 20,
    runs: int = 10,
    slopes: Float[Tensor, " slopes"] | None = None,
    seed: int = 0,
) -> SampledCurve:
    r"""The precision–recall curve of samples, with clusters as atoms.

        α(λ) = Σ min(λp, q) over clusters,    β(λ) = α(λ)/λ

    p and q are the shares of real and of fake samples in clusters that k-means finds in both
    together; the curve is the mean over several runs of it. It can only be too high: a cluster
    does not see what differs within. Errors are pointwise, of the sampling of shares in given
    clusters.

    Source: Sajjadi et al. (2018), arXiv 1806.00035, section 4: 20 clusters, 10 runs.

    Args:
        real: Features of samples of the target.
        fake: Features of samples of the model.
        clusters: How many clusters each run looks for.
        runs: How many clusterings are averaged.
        slopes: The λ, positive and finite; by default 33 of them, from 1/256 to 256.
        seed: Of the centres that k-means starts from.

    Raises:
        TypeError: The features are no tensors of floats.
        ValueError: They are not [samples, features], alike in features and finite, or fewer
            than the clusters.

    >>> x = torch.tensor([[0.0], [0.0], [9.0], [9.0]])
    >>> curve = prd_curve(real=x, fake=x[:2], clusters=2, slopes=torch.tensor([0.5, 1.0, 2.0]))
    >>> curve.precision.value
    tensor([0.2500, 0.5000, 1.0000], dtype=torch.float64)
    """
    real, fake = checked_pair(real, fake)
    slopes = checked_slopes(slopes)
    unit = common_unit(real, fake)
    both = torch.cat(centred(real / unit, fake / unit))
    for name, value, most in (("clusters", clusters, len(both)), ("runs", runs, math.inf)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an integer; got {value!r}.")
        if not 1 <= value <= most:
            raise ValueError(f"{name} must lie between 1 and {most}; got {value}.")
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(runs):
        member = _clustered(both, clusters, generator)
        in_real, in_fake = member[: len(real)], member[len(real) :]
        counts = (it.bincount(minlength=clusters).cpu() for it in (in_real, in_fake))
        found.append(torch.stack(_precision(torch.stack(list(counts)), slopes)))
    precision = Mean(*torch.stack(found).mean(0))
    return SampledCurve(slopes, precision, Mean(*(part / slopes for part in precision)))


def _precision(counts: Tensor, slopes: Tensor) -> Mean:
    """Σ min(λp, q) from counts [2, clusters], and its error: two regions' shares of samples."""
    size = counts.sum(1).double()
    p, q = counts / size[:, None]
    scarce = q < slopes[:, None] * p  # clusters whose fakes all count
    a, b = (q * scarce).sum(1), (p * ~scarce).sum(1)
    variance = a * (1 - a) / size[1] + slopes.square() * b * (1 - b) / size[0]
    return Mean(a + slopes * b, variance.clamp_min(0.0).sqrt())  # 1 − a may round below 0


def _clustered(x: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """The cluster of each row, by Lloyd's algorithm from centres far apart."""
    centres = _far_apart(x, clusters, generator)
    member = _nearest(x, centres)
    for _ in range(ROUNDS):
        counts = member.bincount(minlength=clusters)
        sums = torch.zeros_like(centres).index_add_(0, member, x)
        centres = torch.where(counts[:, None] > 0, sums / counts.clamp_min(1)[:, None], centres)
        before, member = member, _nearest(x, centres)
        if torch.equal(before, member):
            break
    return member


def _nearest(x: Tensor, centres: Tensor) -> Tensor:
    return torch.addmm(centres.square().sum(1), x, centres.T, alpha=-2).argmin(1)


def _far_apart(x: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """Rows drawn one after the other, by the square of their distance to those drawn."""
    first = int(torch.randint(len(x), (1,), generator=generator))
    chosen, distance = [x[first]], (x - x[first]).square().sum(1)
    for _ in range(clusters - 1):
        if not distance.any():  # there are no more rows that differ
            break
        drawn = int(torch.multinomial(distance.double().cpu(), 1, generator=generator))
        chosen.append(x[drawn])
        distance = torch.minimum(distance, (x - x[drawn]).square().sum(1))
    chosen += [chosen[0]] * (clusters - len(chosen))
    return torch.stack(chosen)

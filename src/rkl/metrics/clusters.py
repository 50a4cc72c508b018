"""The precision-recall curve of samples, from the histograms of their clusters."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from rkl.checks import integer, warn
from rkl.metrics.neighbours import centre, checked_pair, common_unit
from rkl.metrics.precision_recall import SampledCurve
from rkl.metrics.precision_recall.curve import checked_slopes
from rkl.stats import Mean

MIN_CLUSTERS = 5  # clusters with real samples, below which a curve is meaningless
HELD, FARTHEST = 0.9, 10.0  # share of the reals within a radius, and its multiple drawn in to
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
    together; the curve is the mean over several runs of it. It is too high by what differs
    within a cluster, and too low by the noise of the shares: :func:`equal_precision` says how low
    two samples of one distribution are. Errors are pointwise, of the sampling of shares in given
    clusters.

    Samples farther from the median of the real ones than ten times the radius that holds
    nine tenths of these are drawn in to there, so that a few of them do not take all centres.

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

    Warns:
        UserWarning: Fewer than five clusters hold real samples, so that the curve says little.

    >>> x = torch.tensor([[0.0], [0.0], [9.0], [9.0]])
    >>> curve = prd_curve(real=x, fake=x[:2], clusters=2, slopes=torch.tensor([0.5, 1.0, 2.0]))
    >>> curve.precision.value
    tensor([0.2500, 0.5000, 1.0000], dtype=torch.float64)
    """
    real, fake = checked_pair(real, fake)
    slopes = checked_slopes(slopes)
    unit = common_unit(real, fake)
    both = torch.cat(_clip_outliers(*centre(real / unit, fake / unit)))
    integer("clusters", clusters, at_least=1, at_most=len(both))
    integer("runs", runs, at_least=1)
    generator = torch.Generator().manual_seed(seed)
    curves, held_out = [], []
    for _ in range(runs):
        member = _cluster_of_rows(both, clusters, generator)
        in_real, in_fake = member[: len(real)], member[len(real) :]
        counts = (it.bincount(minlength=clusters).cpu() for it in (in_real, in_fake))
        counts = torch.stack(list(counts))
        held_out.append(int((counts[0] > 0).sum()))
        curves.append(torch.stack(_precision(counts, slopes)))
    if clusters >= 2 * MIN_CLUSTERS and max(held_out) < min(MIN_CLUSTERS, len(real.unique(dim=0))):
        warn(
            f"real samples lie in {max(held_out)} of {clusters} clusters: a curve of so few says "
            "nothing."
        )
    precision = Mean(*torch.stack(curves).mean(0))
    return SampledCurve(slopes, precision, Mean(*(part / slopes for part in precision)))


def _precision(counts: Tensor, slopes: Tensor) -> Mean:
    """Σ min(λp, q) from counts [2, clusters], and its error: two regions' shares of samples."""
    size = counts.sum(1).double()
    p, q = counts / size[:, None]
    scarce = q < slopes[:, None] * p  # clusters whose fakes all count
    a, b = (q * scarce).sum(1), (p * ~scarce).sum(1)
    variance = a * (1 - a) / size[1] + slopes.square() * b * (1 - b) / size[0]
    # Where all samples agree, as with one case more on either side.
    least = torch.stack([_least(a, size[1]), slopes.square() * _least(b, size[0])]).sum(0)
    return Mean(a + slopes * b, torch.maximum(variance, least).sqrt())


def _least(share: Tensor, size: Tensor) -> Tensor:
    inner = (share.clamp(0, 1) * size + 1) / (size + 2)
    edge = (share * size < 0.5) | ((1 - share) * size < 0.5)
    return torch.where(edge & (share > 0), inner * (1 - inner) / size, 0.0)


def equal_precision(reals: int, fakes: int, clusters: int = 20) -> float:
    """The mean of the curve at slope 1 for two samples of one distribution, in equal clusters.

    By the normal approximation, 1 − Σ s/√(2π), with s² = p(1 − p)(1/reals + 1/fakes) and
    p = 1/clusters.

    >>> round(equal_precision(1000, 1000), 3)
    0.922
    """
    for name, value in (("reals", reals), ("fakes", fakes), ("clusters", clusters)):
        integer(name, value, at_least=1)
    share = 1 / clusters
    spread = math.sqrt(share * (1 - share) * (1 / reals + 1 / fakes))
    return max(0.0, 1 - clusters * spread / math.sqrt(2 * math.pi))


def _clip_outliers(real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    """Both samples, with outliers moved towards the median of the reals."""
    middle = real.median(0).values
    far = [(it - middle).norm(dim=1) for it in (real, fake)]
    radius = far[0].sort().values[round(HELD * (len(real) - 1))]
    if not radius > 0:
        return real, fake
    parts = []
    for x, distance in zip((real, fake), far, strict=True):
        share = (FARTHEST * radius / distance.clamp_min(radius)).clamp_max(1.0)[:, None]
        parts.append(torch.where(share < 1, middle + share * (x - middle), x))
    return parts[0], parts[1]


def _cluster_of_rows(x: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
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

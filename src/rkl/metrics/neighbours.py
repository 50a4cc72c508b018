"""Precision, recall, density and coverage of samples, from balls about nearest neighbours."""

import math
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from rkl.checks import floats, integer, warn
from rkl.stats import Mean
from rkl.tables import Table, table_of

BLOCK = 2**21  # distances that exist at one time
GROUPS = 16  # of columns, whose minima are looked at first
HIGH = 32  # intrinsic dimension from which precision and recall are warned of
COPY_DISTANCE = 0.1  # of the usual distance to a neighbour, below which a sample may be a copy
POINTS = 0.9  # share of balls without a radius, from which that is warned of
SURE = 1e-4  # of a squared radius, which rounding may be before more digits are taken
ROUNDED = 8  # units in the last place, of sums of products
FARTHEST = 56  # binary digits between a spread of 1 and features whose squares still are numbers


class PRDC(NamedTuple):
    """Four scores of samples, each with its standard error.

    Attributes:
        precision: Share of fakes inside a ball about a real sample.
        recall: Share of reals inside a ball about a fake one.
        density: Balls about real samples that a fake lies in, over k.
        coverage: Share of reals whose ball holds a fake.
    """

    precision: Mean
    recall: Mean
    density: Mean
    coverage: Mean

    def table(self) -> Table:
        """The four scores with their errors."""
        return table_of("Scores by nearest neighbours", self._asdict())

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


def prdc(
    *,
    real: Float[Tensor, "reals features"],
    fake: Float[Tensor, "fakes features"],
    k: int = 5,
    inclusive: bool = False,
    subsamples: int = 20,
    seed: int = 0,
) -> PRDC:
    r"""Improved precision and recall, density and coverage, by k nearest neighbours.

    The ball about a sample reaches to its k-th nearest neighbour of its own kind. The search is
    exhaustive, in blocks, in the precision of the features, or in double precision where balls
    are too small beside the spread of the samples for theirs: hand over float64 for scores equal
    to a reference bit by bit.

    Radii shrink as samples grow in number: compare scores at equal numbers only, and read them
    beside :func:`prdc_ceiling`, what real samples reach against each other. Errors come from
    subsets of a quarter of either side, drawn without replacement, the spread being scaled to
    the whole; drawing with replacement would put neighbours at distance 0. They cost about what
    the scores cost, and are good to a quarter of themselves.

    In high dimension the two sides are not alike: samples a little inside the support of the
    others lose recall and keep precision, samples a little outside the reverse. That is warned
    of from an intrinsic dimension of 32, as estimated from the distances.

    Source: Kynkäänniemi et al. (2019), arXiv 1904.06991; Naeem et al. (2020), arXiv 2002.09797,
    whose ``prdc`` takes k = 5 and open balls; torch-fidelity takes k = 3 and closed ones;
    Khayatkhoei and AbdAlmageed (2023), arXiv 2306.09618, for high dimension; MacKay and
    Ghahramani (2005), after Levina and Bickel, for the estimate of it.

    Args:
        real: Features of samples of the target.
        fake: Features of samples of the model.
        k: Which neighbour a ball reaches to.
        inclusive: Whether a sample on the surface of a ball lies in it.
        subsamples: How many subsets the errors come from; 0 for none, and errors of nan. So
            they are where a quarter of a side holds no more than k.
        seed: Of the subsets.

    Raises:
        TypeError: The features are no tensors of floats.
        ValueError: They are not [samples, features], alike in features and finite, or there
            are no more than k samples of a kind.

    >>> x = torch.arange(8.0)[:, None]
    >>> scores = prdc(real=x, fake=x[:4] + 0.25, k=1, subsamples=0)
    >>> scores.precision.value, scores.coverage.value
    (tensor(1., dtype=torch.float64), tensor(0.6250, dtype=torch.float64))
    """
    real, fake = checked_pair(real, fake)
    _check_counts(real, fake, k, subsamples)
    unit = common_unit(real, fake)
    real, fake = real / unit, fake / unit
    values, dimension, points = _scores(real, fake, k, inclusive)
    _warn(real, fake, dimension, points)
    error = _errors(real, fake, k, inclusive, subsamples, seed)
    error = torch.maximum(error, _least_errors(values, len(real), len(fake), k))
    return PRDC(*(Mean(*both) for both in zip(values, error, strict=True)))


def prdc_ceiling(
    *,
    real: Float[Tensor, "reals features"],
    k: int = 5,
    inclusive: bool = False,
    subsamples: int = 20,
    seed: int = 0,
) -> PRDC:
    """The scores of a perfect model: one random half of the real samples against the other.

    Each side has half as many samples as there are, and so larger balls: in few dimensions that
    matters little; where it does, give :func:`prdc` halves too.

    Raises:
        TypeError: The features are no tensor of floats.
        ValueError: They are not [samples, features] and finite, or too few.

    >>> x = torch.randn(400, 2, generator=torch.Generator().manual_seed(0))
    >>> prdc_ceiling(real=x, subsamples=0).precision.value > 0.9
    tensor(True)
    """
    real, _ = checked_pair(real, real)
    mixed = real[torch.randperm(len(real), generator=torch.Generator().manual_seed(seed))]
    half, other = mixed.tensor_split(2)
    if len(other) <= (k if isinstance(k, int) else 0):
        raise ValueError(f"real must hold more than {2 * k + 1} samples; got {len(real)}.")
    with warnings.catch_warnings():
        # said of the scores themselves
        warnings.filterwarnings("ignore", r"in high dimension|.* balls have a radius of 0")
        how: dict[str, Any] = {"k": k, "inclusive": inclusive, "subsamples": subsamples}
        return prdc(real=half, fake=other, seed=seed, **how)


def checked_pair(real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    """Features in single precision or better, no longer tracked.

    Raises:
        TypeError: They are no tensors of floats.
        ValueError: They are not [samples, features], alike in features and finite.
    """
    one, other = _checked_sides(real=real, fake=fake)
    return one, other


def _checked_sides(**sides: Tensor) -> list[Tensor]:
    first, *others = sides
    for name, features in sides.items():
        floats(name, features)
        if features.ndim != 2 or not features.numel():
            raise ValueError(
                f"{name} must be [samples, features], not empty; got {list(features.shape)}."
            )
        wrong = int((~features.isfinite()).any(1).sum())
        if wrong:
            raise ValueError(f"{name} must be finite; {wrong} of {len(features)} samples are not.")
    size = sides[first].shape[1]
    for name in others:
        if sides[name].shape[1] != size:
            raise ValueError(
                f"{name} must have the {size} features of {first}; got {sides[name].shape[1]}."
            )
    kind = torch.float32
    for features in sides.values():
        kind = torch.promote_types(kind, features.dtype)
    return [features.detach().to(kind) for features in sides.values()]


def common_unit(real: Tensor, fake: Tensor) -> float:
    """A power of two near the largest spread of the real features, to divide both sides by.

    The squares of features of size 1e19 or 1e-23 exceed single precision. A power of two rounds
    nothing. It is larger than the spread where a sample lies so far out that its square would
    overflow.
    """
    peak = max(it.abs().max().item() for it in (real, fake))
    if not peak:
        return 1.0
    size = math.frexp(peak)[1] - 1
    spread = (real.double() / 2.0**size).std(0, correction=0).max().item()
    digits = math.frexp(spread)[1] - 1 if spread else -FARTHEST
    most = math.frexp(torch.finfo(real.dtype).max)[1] - 2  # its reciprocal is a normal number
    return 2.0 ** max(min(size + max(digits, -FARTHEST), most), -most)


def _check_counts(real: Tensor, fake: Tensor, k: int, subsamples: int) -> None:
    integer("k", k, at_least=1)
    integer("subsamples", subsamples, at_least=0)
    for name, features in (("real", real), ("fake", fake)):
        if len(features) <= k:
            raise ValueError(
                f"{name} must hold more than k = {k} samples, for each to have a k-th neighbour; "
                f"got {len(features)}."
            )
    if subsamples == 1:
        raise ValueError("subsamples must be 0, or 2 at least to have a spread; got 1.")


def _least_errors(values: Tensor, reals: int, fakes: int, k: int) -> Tensor:
    """Errors of shares that are equal in all subsets: those of one case more on either side."""
    size = torch.tensor([fakes, reals, fakes * k, reals], dtype=torch.float64)
    share = (values.clamp(0, 1) * size + 1) / (size + 2)
    return (share * (1 - share) / size).sqrt()


def _warn(real: Tensor, fake: Tensor, dimension: float, points: int) -> None:
    if points >= POINTS * (len(real) + len(fake)):
        warn(
            f"{points:,} of {len(real) + len(fake):,} balls have a radius of 0, as samples are "
            "equal: open balls hold nothing then, closed ones (inclusive) their equals."
        )
    if real.shape == fake.shape and torch.equal(real, fake):
        warn("real and fake are the same samples: no score means anything.")
    if dimension >= HIGH:
        warn(
            f"in high dimension (about {dimension:.0f}, of {real.shape[1]} features) precision "
            "and recall are not alike: samples slightly inside the others lose recall "
            "alone, slightly outside them precision alone (arXiv 2306.09618)."
        )


def _errors(real, fake, k: int, inclusive: bool, subsamples: int, seed: int) -> Tensor:
    """The spread of the scores of quarters: (1/n − 1/N) σ², which is three times σ²/N."""
    quarters = [len(it) // 4 for it in (real, fake)]
    if not subsamples or min(quarters) <= k:
        return torch.full((4,), math.nan, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    scores = []
    for _ in range(subsamples):
        some_real, some_fake = (
            it[torch.randperm(len(it), generator=generator)[:size].to(it.device)]
            for it, size in zip((real, fake), quarters, strict=True)
        )
        scores.append(_scores(some_real, some_fake, k, inclusive)[0])
    return torch.stack(scores).std(0) / math.sqrt(3)


def _scores(real: Tensor, fake: Tensor, k: int, inclusive: bool) -> tuple[Tensor, float, int]:
    """The four scores, the intrinsic dimension of the reals, and the number of balls of radius 0.

    All comparisons are of |y|² − 2xy with R² − |x|²: one matrix product, and no norm to add.
    """
    real, fake = centre(real, fake)
    norm_real, norm_fake = (it.square().sum(1) for it in (real, fake))
    near_real, near_fake = _nearest(real, norm_real, k), _nearest(fake, norm_fake, k)
    reach_real, reach_fake = near_real[:, -1], near_fake[:, -1]
    within = torch.le if inclusive else torch.lt
    noise = _noise(norm_real, reach_real), _noise(norm_fake, reach_fake)
    if not (_is_sure(norm_real, reach_real) and _is_sure(norm_fake, reach_fake)):
        return _scores(real.double(), fake.double(), k, inclusive)
    sign = 1 if inclusive else -1  # equal distances are equal, whatever products round them to
    reach_real, reach_fake = (
        reach + sign * it for reach, it in zip((reach_real, reach_fake), noise, strict=True)
    )
    balls, inside = torch.zeros_like(norm_fake), None
    reached, covered = torch.zeros_like(norm_real), torch.zeros_like(norm_real)
    for mine, block in _products(real, fake, norm_fake):
        covered[mine] = within(block.amin(1), reach_real[mine]).to(real)
        inside = torch.empty_like(block) if inside is None else inside[: len(block)]
        within(block, reach_real[mine, None], out=inside)  # floats sum faster than truth values
        balls += inside.sum(0)
        block -= norm_fake + reach_fake
        reached[mine] = within(block.amin(1), -norm_real[mine]).to(real)
    parts = [balls > 0, reached, balls / k, covered]
    scores = torch.stack([part.double().mean() for part in parts]).cpu()
    points = sum(
        int((near[:, -1] + norms <= it).sum())
        for near, norms, it in zip(
            (near_real, near_fake), (norm_real, norm_fake), noise, strict=True
        )
    )
    return scores, _dimension(near_real + norm_real[:, None]), points


def _noise(norms: Tensor, reach: Tensor) -> Tensor:
    """Bound on the rounding of |y|² − 2xy, of y near the surface of a ball about x."""
    radius = (reach + norms).clamp_min(0)
    return ROUNDED * torch.finfo(norms.dtype).eps * (3 * norms + 2 * radius)


def _is_sure(norms: Tensor, reach: Tensor) -> bool:
    """True if rounding matters to no ball, or there are no more digits to take."""
    return norms.dtype == torch.float64 or not _unsure(norms, reach).any()


def _unsure(norms: Tensor, reach: Tensor) -> Tensor:
    """Balls whose radius rounding may change, by so much that scores notice."""
    return _noise(norms, reach) > SURE * (reach + norms)


def centre(real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    """Both moved near the origin, where |x|² + |y|² − 2xy loses few digits.

    By a multiple of a power of two, so that distances between integers remain exact.
    """
    spread = real.std(0, correction=0).clamp_min(torch.finfo(torch.float32).tiny)
    unit = 2.0 ** spread.log2().floor()
    centre = (real.mean(0) / unit).round() * unit
    return real - centre, fake - centre


def _products(x: Tensor, y: Tensor, norms: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """|y|² − 2xy for blocks of rows of x, in memory that the next block reuses."""
    size = max(16, BLOCK // len(y))
    block = x.new_empty(min(size, len(x)), len(y))
    for start in range(0, len(x), size):
        rows = x[start : start + size]
        part = block[: len(rows)]
        torch.addmm(norms, rows, y.T, alpha=-2, out=part)
        yield slice(start, start + len(rows)), part


def _nearest(x: Tensor, norms: Tensor, k: int) -> Tensor:
    """|y|² − 2xy of the k nearest other rows y of each row x, rising."""
    nearest = x.new_empty(len(x), k)
    for mine, block in _products(x, x, norms):
        block.diagonal(offset=mine.start).fill_(math.inf)
        nearest[mine] = _smallest(block, k)
    return nearest


def _smallest(block: Tensor, k: int) -> Tensor:
    """The k smallest of each row: they lie in the k groups of columns with the least minima."""
    width = block.shape[1] // GROUPS
    if width < 8 * k:
        return block.topk(k, largest=False).values
    whole = width * GROUPS
    minima = block[:, :whole].unflatten(1, (GROUPS, width)).amin(1)
    best = minima.topk(k, largest=False, sorted=False).indices
    columns = best[:, :, None] + width * torch.arange(GROUPS, device=block.device)
    likely = torch.cat([block.gather(1, columns.flatten(1)), block[:, whole:]], 1)
    return likely.topk(k, largest=False).values


def _dimension(square: Tensor) -> float:
    """1/mean log R_k/R_j over the nearer neighbours j, from squared distances [samples, k]."""
    logs = square.double().clamp_min(0.0).log()  # rounding may undercut the distance of twins
    ratios = (logs[:, -1:] - logs[:, :-1])[logs[:, :-1] > -math.inf] / 2
    return 1 / ratios.mean().item() if ratios.numel() and ratios.mean() > 0 else 0.0


class Copies(NamedTuple):
    """Evidence that fakes are copies of the rows that a model was trained on.

    Attributes:
        nearer: Share of fakes that lie nearer to a row trained on than to one held out, of as
            many of either; 1/2 where the model knows no more of the former.
        near: Number of fakes at less than a tenth of the usual distance from a row trained on.
        honest: Number of rows held out so near to one, of as many.
        fakes: Number of fakes that were looked at.
    """

    nearer: Mean
    near: int
    honest: float
    fakes: int

    def table(self) -> Table:
        """The evidence, a row for each figure."""
        figures = {
            "nearer to rows trained on": self.nearer,
            "within a tenth of the usual distance": self.near,
            "of real samples": self.honest,
            "fakes looked at": self.fakes,
        }
        return table_of("Copies of rows trained on", figures)

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


def copies(
    *,
    train: Float[Tensor, "rows features"],
    held_out: Float[Tensor, "others features"],
    fake: Float[Tensor, "fakes features"],
    seed: int = 0,
) -> Copies:
    """Distances of fakes to the nearest row trained on, beside those to rows held out.

    The usual distance is the median one of rows held out to the nearest row trained on.

    Source: the distance to the closest record, against a hold-out: Platzer and Reutterer (2021),
    arXiv 2104.00635.

    Args:
        train: What the model was trained on.
        held_out: Rows of the same distribution that it was not trained on.
        fake: Samples of the model.
        seed: Of the subset of the rows trained on, as many as are held out.

    >>> x = torch.randn(600, 2, generator=torch.Generator().manual_seed(0))
    >>> copies(train=x[:300], held_out=x[300:], fake=x[:300] + 1e-4).nearer.value.item()
    1.0
    """
    train, held_out, fake = _checked_sides(train=train, held_out=held_out, fake=fake)
    unit = common_unit(held_out, fake)
    train, held_out, fake = train / unit, held_out / unit, fake / unit
    to_train, between = _distances(fake, train), _distances(held_out, train)
    size = min(len(train), len(held_out))
    generator = torch.Generator().manual_seed(seed)
    some = train[torch.randperm(len(train), generator=generator)[:size].to(train.device)]
    others = held_out[torch.randperm(len(held_out), generator=generator)[:size].to(train.device)]
    one, other = _distances(fake, some), _distances(fake, others)
    share = ((one < other).double() + 0.5 * (one == other).double()).cpu()
    usual = between.median()
    close = (
        to_train <= COPY_DISTANCE * usual,
        (between <= COPY_DISTANCE * usual).double().mean().item(),
    )
    count = len(fake)
    least = (share.mean().item() * count + 1) / (count + 2)
    error = max(
        share.std().item() / math.sqrt(count) if count > 1 else math.nan,
        math.sqrt(least * (1 - least) / count),
    )
    nearer = Mean(share.mean(), torch.tensor(error, dtype=torch.float64))
    return Copies(nearer, int(close[0].sum()), close[1] * count, count)


def _distances(x: Tensor, y: Tensor) -> Tensor:
    """The distance of each row of x to the nearest of y, without the rounding of products."""
    (x, y), distances = centre(x, y), []
    for rows, block in _products(x, y, y.square().sum(1)):
        distances.append((x[rows] - y[block.argmin(1)]).norm(dim=1))
    distance, norms = torch.cat(distances), x.square().sum(1)
    unsure = _unsure(norms, distance.square() - norms)
    if x.dtype != torch.float64 and unsure.any():
        distance[unsure] = _distances(x[unsure].double(), y.double()).to(distance)
    return distance

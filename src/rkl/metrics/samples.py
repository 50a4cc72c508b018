"""Distances between the distributions of two arrays of samples, as ``rkl metrics`` prints them."""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from rkl.checks import warn
from rkl.metrics.clusters import equal_precision, prd_curve
from rkl.metrics.frechet import frechet_bias, frechet_distance
from rkl.metrics.neighbours import checked_pair, copies, prdc
from rkl.readers import Contents, as_floats, place_of_nan, read
from rkl.stats import Mean
from rkl.tables import Table

CLUSTERS = 20
SLOPES = (0.25, 1.0, 4.0)
MAX_SPREADS = (
    10.0  # spreads, the radius about the median that holds nine tenths of the real samples
)
MAX_FAKES = 2_000  # samples whose copies are looked for


@dataclass(frozen=True)
class Measured:
    """Scores of samples, beside those of real samples against each other.

    Attributes:
        scores: Under each name, the score and its standard error.
        halves: The same of one half of either side against the other, as many as in ``ceiling``.
        ceiling: The same of one half of the real samples against the other; empty, as ``halves``
            are, where they are too few.
        about: What was compared.
        notes: What the reader should know.
    """

    scores: Mapping[str, Mean]
    halves: Mapping[str, Mean]
    ceiling: Mapping[str, Mean]
    about: str
    notes: Sequence[str]

    def table(self) -> Table:
        """A row for each score, beside those of halves and of real samples alone."""
        sides = self.scores, self.halves, self.ceiling
        rows = [
            (name, *(side[name].pair() if name in side else None for side in sides))
            for name in self.scores
        ]
        return Table(self.about, ("", "score", "of halves", "real against real"), rows, self.notes)

    def __str__(self) -> str:
        return self.table().text()

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()

    def to_dict(self) -> dict[str, Any]:
        """The scores as JSON can hold them; one that is not known, or its error, is null."""
        sides = {"scores": self.scores, "halves": self.halves}
        sides |= {"real_against_real": self.ceiling}
        written = {
            side: {name: _numbers(score) for name, score in them.items()}
            for side, them in sides.items()
        }
        return {"about": self.about, **written, "notes": list(self.notes)}


def measure(
    *,
    real: Float[Tensor, "reals features"],
    fake: Float[Tensor, "fakes features"],
    train: Float[Tensor, "rows features"] | None = None,
    standardise: bool = False,
    columns: Sequence[str] = (),
    k: int = 5,
    inclusive: bool = False,
    seed: int = 0,
) -> Measured:
    """Neighbours, clusters and moments: every score of samples, and its ceiling.

    Distances are Euclidean: of columns in several units the one with the largest spread counts
    alone. ``standardise`` divides each by its own, so that no score depends on units.

    Args:
        real: Features of samples of the target.
        fake: Features of samples of the model.
        train: Features of what the model was trained on, which real ones are not; then how many
            fakes are copies of them is measured.
        standardise: Whether to divide each feature by its spread among the real samples.
        columns: Names of the features, for notes.
        k: Which neighbour a ball reaches to.
        inclusive: Whether a sample on the surface of a ball lies in it.
        seed: Of subsets, halves and clusters.

    Returns:
        Precision, recall, density and coverage by :func:`prdc`; precision at slope 4, recall at
        slope 1/4 and both at slope 1 by :func:`prd_curve`; the Fréchet distance.

    Raises:
        TypeError: The features are no tensors of floats.
        ValueError: They are not [samples, features], alike in features and finite, or too few.

    >>> x = torch.randn(300, 2, generator=torch.Generator().manual_seed(0))
    >>> measured = measure(real=x[:200], fake=x[200:] / 2)
    >>> measured.scores["precision"].value > measured.scores["recall"].value
    tensor(True)
    """
    real, fake = checked_pair(real, fake)
    notes = [] if standardise else _units(real, columns)
    if standardise:
        shift, spread = _spread(real)
        real, fake = ((it - shift) / spread for it in (real, fake))
        train = train if train is None else (train - shift) / spread
    scores, dimension = _scores(real, fake, k, inclusive, seed)
    notes = [*notes, *dimension, *_beyond(real, fake), *_near_copies(real, fake, seed)]
    if train is not None:
        name, score, note = _copy_score(train, real, fake, seed)
        scores, notes = {**scores, name: score}, [*notes, note]
    halves, ceiling = {}, {}
    if len(real) // 2 > max(k, CLUSTERS) and len(fake) // 2 > k:
        one, other = real[_permutation(len(real), seed)].tensor_split(2)
        some = fake[_permutation(len(fake), seed)][: len(other)]
        ceiling = _scores(one, other, k, inclusive, seed)[0]
        halves = _scores(one, some, k, inclusive, seed)[0]
        notes.append(
            f"Real against real: one half against the other, {len(one):,} and {len(other):,}. "
            f"Scores depend on numbers of samples: beside it read the scores of halves, "
            f"{len(some):,} fakes against {len(one):,} reals."
        )
    notes.append(_level(real, fake))
    balls = "closed" if inclusive else "open"
    about = (
        f"{len(fake):,} fake against {len(real):,} real samples of {real.shape[1]:,} features; "
        f"{balls} balls to neighbour {k}"
    )
    about += ", in units of the real spread" * standardise
    return Measured(scores, halves, ceiling, about, notes)


def _spread(real: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each feature; 1 of those that are constant."""
    spread = real.double().std(0, correction=0)
    spread = torch.where(spread > 0, spread, 1.0)
    return real.double().mean(0).to(real.dtype), spread.to(real.dtype)


def _units(real: Tensor, columns: Sequence[str]) -> list[str]:
    variance = real.double().var(0, correction=0)
    share, index = (variance / variance.sum()).max(0)
    count = len(variance)
    if count < 2 or not share > max(0.5, 2 / count) or share > 1 - 1e-15 and count == 1:
        return []
    if share < 0.9 and count < 4:
        return []
    index = int(index)
    name = columns[index] if len(columns) == count else str(index)
    return [
        f"Column {name} has {100 * share.item():.3g} % of the variance, and the scores see it "
        "almost alone: --standardise (standardise=True) divides each column by its spread."
    ]


def _beyond(real: Tensor, fake: Tensor) -> list[str]:
    middle = real.median(0).values
    spread = (real - middle).norm(dim=1).sort().values[round(0.9 * (len(real) - 1))]
    if not spread > 0:
        return []
    far = fake[(fake - middle).norm(dim=1) > MAX_SPREADS * spread]
    away = sum(
        int((torch.cdist(it, real).amin(1) > MAX_SPREADS * spread).sum()) for it in far.split(500)
    )
    if not away:
        return []
    return [
        f"{away:,} of {len(fake):,} fakes lie more than {MAX_SPREADS:g} spreads from every real "
        "sample; the balls of neighbours about them may hold all of these, and recall be too high."
    ]


def _near_copies(real: Tensor, fake: Tensor, seed: int) -> list[str]:
    reals = real[_permutation(len(real), seed)[:MAX_FAKES]]
    fakes = fake[_permutation(len(fake), seed)[:MAX_FAKES]]
    if len(reals) < 4:
        return []
    one, other = reals.tensor_split(2)
    result = copies(train=one, held_out=other, fake=fakes, seed=seed)
    honest = result.honest / len(fakes)
    error = math.sqrt((honest * (1 - honest) + 1 / len(other)) / len(other))
    if result.near / len(fakes) <= honest + 4 * error + 0.02:
        return []
    usual = "a tenth of the usual distance between samples"
    return [
        f"{result.near:,} of {len(fakes):,} fakes lie within {usual} of a real one, of one half "
        f"of these, where {result.honest:.0f} would of honest ones: are they copies?"
    ]


def _copy_score(train: Tensor, real: Tensor, fake: Tensor, seed: int) -> tuple[str, Mean, str]:
    train, real, fake = (it[_permutation(len(it), seed)[:MAX_FAKES]] for it in (train, real, fake))
    result = copies(train=train, held_out=real, fake=fake, seed=seed)
    note = (
        f"Nearer to a row trained on than to a real one, of as many: 1/2 is right, more are "
        f"copies. {result.near:,} of {result.fakes:,} fakes lie within a tenth of the usual "
        f"distance of a row trained on; of real samples {result.honest:.0f} would."
    )
    return "nearer to rows trained on", result.nearer, note


def _level(real: Tensor, fake: Tensor) -> str:
    clusters = min(CLUSTERS, len(real) + len(fake))
    equal = equal_precision(len(real), len(fake), clusters)
    bias = frechet_bias(real=real, fake=fake)
    return (
        f"Two samples of one distribution of these sizes score {equal:.3f} in 'both, slope 1' on "
        f"average, not 1, and {bias:.3g} in the Fréchet distance, not 0."
    )


def _scores(
    real: Tensor, fake: Tensor, k: int, inclusive: bool, seed: int
) -> tuple[dict[str, Mean], list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        near = prdc(real=real, fake=fake, k=k, inclusive=inclusive, seed=seed)
        others = _others(real, fake, seed)
    return {**near._asdict(), **others}, [_upper(str(it.message)) for it in caught]


def _others(real: Tensor, fake: Tensor, seed: int) -> dict[str, Mean]:
    clusters = min(CLUSTERS, len(real) + len(fake))
    slopes = torch.tensor(SLOPES, dtype=torch.float64)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        curve = prd_curve(real=real, fake=fake, clusters=clusters, slopes=slopes, seed=seed)
    precision, recall = (torch.stack(warning) for warning in (curve.precision, curve.recall))
    for warning in caught:
        warn(str(warning.message))
        precision, recall = (part.new_full(part.shape, math.nan) for part in (precision, recall))
    return {
        "precision of clusters, slope 4": Mean(*precision[:, 2]),
        "recall of clusters, slope 1/4": Mean(*recall[:, 0]),
        "both, slope 1": Mean(*precision[:, 1]),
        "Fréchet distance": frechet_distance(real=real, fake=fake),
    }


def _permutation(count: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def _upper(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]


def _numbers(score: Mean) -> dict[str, float | None]:
    named = zip(("value", "error"), score.pair(), strict=True)
    return {name: it if math.isfinite(it) else None for name, it in named}


def read_features(name: str, path: Path) -> Float[Tensor, "samples features"]:
    """The rows of a file of numbers, flattened to features and floating-point.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It holds no finite numbers with samples along its first axis.
    """
    return torch.from_numpy(_features(name, read(path, name=name), path))


def read_both(
    real: Path, fake: Path, train: Path | None = None
) -> tuple[dict[str, Any], list[str]]:
    """The features of the files in one precision, the names of the columns, and notes on reading.

    Columns that files name are compared by name.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: One cannot be read, or their columns are called otherwise.
    """
    places = {"real": real, "fake": fake} | ({} if train is None else {"train": train})
    contents = {name: read(path, name=name) for name, path in places.items()}
    _check_axes(contents, places)
    arrays = {name: _features(name, it, places[name]) for name, it in contents.items()}
    one = contents["real"].columns
    for name in list(places)[1:]:
        other = contents[name].columns
        if not one or not other or one == other:
            continue
        if set(one) != set(other):
            raise ValueError(
                f"{name}: {places[name]} must have the columns of {real}, {', '.join(one[:8])}; "
                f"got {', '.join(other[:8])}."
            )
        arrays[name] = arrays[name][:, [other.index(column) for column in one]]
    for name in list(places)[1:]:
        if arrays[name].shape[1] != arrays["real"].shape[1]:
            raise ValueError(
                f"{name} must have the {arrays['real'].shape[1]} features of real; got "
                f"{arrays[name].shape[1]}."
            )
    kind = np.result_type(*(it.dtype for it in arrays.values()))
    sides: dict[str, Any] = {
        name: torch.from_numpy(it.astype(kind)) for name, it in arrays.items()
    }
    notes = [f"{places[name]}: {note}." for name, it in contents.items() for note in it.notes]
    return {**sides, "columns": one}, notes


def _check_axes(contents: Mapping[str, Contents], places: Mapping[str, Path]) -> None:
    """Refuse images whose axes come in another order: flattened, their pixels would not match."""
    shapes = {name: [n for n in it.values.shape[1:] if n > 1] for name, it in contents.items()}
    shapes = {name: shape for name, shape in shapes.items() if len(shape) > 1}
    for name, shape in shapes.items():
        first, expected = next(iter(shapes.items()))
        if shape != expected:
            raise ValueError(
                f"{name}: samples of {places[name]} must have the shape of those of "
                f"{places[first]}, {list(contents[first].values.shape[1:])}, channels in the same "
                f"place; got {list(contents[name].values.shape[1:])}."
            )


def _features(name: str, contents: Contents, path: Path) -> np.ndarray:
    array = contents.values
    if array.ndim < 2 or not array.size:
        raise ValueError(
            f"{name}: {path} must hold [samples, features], not empty; got {list(array.shape)}."
        )
    where = place_of_nan(array, contents.columns)
    if where is not None:
        raise ValueError(f"{name}: {path} must hold finite numbers; {where}.")
    try:
        return np.require(as_floats(array).reshape(len(array), -1), requirements=["C", "W"])
    except ValueError as error:
        raise ValueError(f"{name}: {path}: {error}.") from None

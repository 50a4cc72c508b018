"""All that two arrays of samples say of how near the laws are, as ``rkl metrics`` prints it."""

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

from rkl.metrics import Mean
from rkl.metrics.clusters import prd_curve
from rkl.metrics.frechet import frechet_distance
from rkl.metrics.neighbours import prdc, prdc_ceiling
from rkl.metrics.written import parenthesised
from rkl.readers import Contents, as_floats, place_of_nan, read

CLUSTERS = 20
SLOPES = (0.25, 1.0, 4.0)


@dataclass(frozen=True)
class Measured:
    """Scores of samples, beside those of real samples against each other.

    Attributes:
        scores: Under each name, the score and its standard error.
        ceiling: The same of one half of the real samples against the other; empty where they
            are too few.
        about: What was compared.
        notes: What the reader should know.
    """

    scores: Mapping[str, Mean]
    ceiling: Mapping[str, Mean]
    about: str
    notes: Sequence[str]

    def __str__(self) -> str:
        rows = [("", "score", "real against real")]
        for name, score in self.scores.items():
            rows.append((name, _text(score), _text(self.ceiling.get(name))))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = (
            "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
            for row in rows
        )
        return "\n".join([self.about, "", *lines, "", *self.notes])

    def to_dict(self) -> dict[str, Any]:
        """The scores as JSON can hold them; an error that is not known is null."""
        sides = {"scores": self.scores, "real_against_real": self.ceiling}
        written = {
            side: {name: _numbers(score) for name, score in them.items()}
            for side, them in sides.items()
        }
        return {"about": self.about, **written, "notes": list(self.notes)}


def measure(
    *,
    real: Float[Tensor, "reals features"],
    fake: Float[Tensor, "fakes features"],
    k: int = 5,
    inclusive: bool = False,
    seed: int = 0,
) -> Measured:
    """Neighbours, clusters and moments: every score of samples, and its ceiling.

    Args:
        real: Features of samples of the target.
        fake: Features of samples of the model.
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
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        near = prdc(real=real, fake=fake, k=k, inclusive=inclusive, seed=seed)
    scores = {**near._asdict(), **_others(real, fake, seed)}
    notes = [_upper(str(it.message)) for it in said]
    ceiling = {}
    if len(real) // 2 > max(k, CLUSTERS):
        best = prdc_ceiling(real=real, k=k, inclusive=inclusive, seed=seed)
        one, other = real[_mixed(len(real), seed)].tensor_split(2)
        ceiling = {**best._asdict(), **_others(one, other, seed)}
        notes.append(
            f"Real against real: one half against the other, {len(one):,} each. Neighbours lie "
            "farther apart among fewer samples, so that this ceiling is a little too high or low."
        )
    balls = "closed" if inclusive else "open"
    about = (
        f"{len(fake):,} fake against {len(real):,} real samples of {real.shape[1]:,} features; "
        f"{balls} balls to neighbour {k}"
    )
    return Measured(scores, ceiling, about, notes)


def _others(real: Tensor, fake: Tensor, seed: int) -> dict[str, Mean]:
    clusters = min(CLUSTERS, len(real) + len(fake))
    slopes = torch.tensor(SLOPES, dtype=torch.float64)
    curve = prd_curve(real=real, fake=fake, clusters=clusters, slopes=slopes, seed=seed)
    precision, recall = (torch.stack(it) for it in (curve.precision, curve.recall))
    return {
        "precision of clusters, slope 4": Mean(*precision[:, 2]),
        "recall of clusters, slope 1/4": Mean(*recall[:, 0]),
        "both, slope 1": Mean(*precision[:, 1]),
        "Fréchet distance": frechet_distance(real=real, fake=fake),
    }


def _mixed(count: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def _upper(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]


def _text(score: Mean | None) -> str:
    return parenthesised(None if score is None else (score.value.item(), score.error.item()))


def _numbers(score: Mean) -> dict[str, float | None]:
    value, error = score.value.item(), score.error.item()
    return {"value": value, "error": error if math.isfinite(error) else None}


def read_features(name: str, path: Path) -> Float[Tensor, "samples features"]:
    """The rows of a file of numbers, flattened to features and floating-point.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It holds no finite numbers with samples along its first axis.
    """
    return torch.from_numpy(_features(name, read(path, name=name), path))


def read_both(real: Path, fake: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The features of both files in one precision, and notes on how they were read.

    Columns that both files name are compared by name.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: One cannot be read, or their columns are called otherwise.
    """
    places = {"real": real, "fake": fake}
    found = {name: read(path, name=name) for name, path in places.items()}
    arrays = {name: _features(name, it, places[name]) for name, it in found.items()}
    one, other = found["real"].columns, found["fake"].columns
    if one and other and one != other:
        if set(one) != set(other):
            raise ValueError(
                f"fake: {fake} must have the columns of {real}, {', '.join(one[:8])}; got "
                f"{', '.join(other[:8])}."
            )
        arrays["fake"] = arrays["fake"][:, [other.index(name) for name in one]]
    kind = np.result_type(*(it.dtype for it in arrays.values()))
    tensors = {name: torch.from_numpy(it.astype(kind)) for name, it in arrays.items()}
    notes = [f"{places[name]}: {note}." for name, it in found.items() for note in it.notes]
    return tensors, notes


def _features(name: str, found: Contents, path: Path) -> np.ndarray:
    array = found.values
    if array.ndim < 2 or not array.size:
        raise ValueError(
            f"{name}: {path} must hold [samples, features], not empty; got {list(array.shape)}."
        )
    where = place_of_nan(array, found.columns)
    if where is not None:
        raise ValueError(f"{name}: {path} must hold finite numbers; {where}.")
    try:
        return np.require(as_floats(array).reshape(len(array), -1), requirements=["C", "W"])
    except ValueError as error:
        raise ValueError(f"{name}: {path}: {error}.") from None

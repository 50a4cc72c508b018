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
    """The rows of an array of NumPy in a file, flattened to features and floating-point.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It holds no array of numbers with samples along its first axis.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{name}: there is no file {path}.")
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise ValueError(f"{name}: {path} holds no array of NumPy: {reason}.") from None
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiub":
        kind = array.dtype if isinstance(array, np.ndarray) else "several arrays"
        raise ValueError(f"{name}: {path} must hold one array of real numbers; got {kind}.")
    if array.ndim < 2 or not array.size:
        raise ValueError(
            f"{name}: {path} must hold [samples, features], not empty; got {list(array.shape)}."
        )
    kept = array if array.dtype == np.float64 else array.astype(np.float32)
    return torch.from_numpy(kept.reshape(len(array), -1))

"""Result of one fit of the study of precision and recall, and the table of all."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rkl.studies.study import Pair, mean_over_seeds, paired_gain

ML = "maximum likelihood"
COLUMNS = "method", "ratio", "quantity", "seeds", "mean", "se", "se_samples", "gain", "gain_se"


@dataclass(frozen=True)
class Seed:
    """One distribution, fitted or sampled in one way from one seed.

    Attributes:
        method: Name of the way.
        ratio: Source of p/q: "exact", "critic", or "none" where it was not needed.
        seed: Seed of data and fit.
        figures: Under each quantity its value and its error from the samples, 0 where exact.
        curve: Slopes and the precision at each; empty where it is not known.
        samples: A few draws.
        history: History of its training.
    """

    method: str
    ratio: str
    seed: int
    figures: dict[str, Pair]
    curve: tuple[list[float], list[float]] = ((), ())  # type: ignore[assignment]
    samples: list[Any] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def read(cls, entries: Mapping[str, Any]) -> "Seed":
        """The distribution from its fields in JSON."""
        figures = {name: (value, error) for name, (value, error) in entries["figures"].items()}
        slopes, precision = entries["curve"]
        return cls(**{**entries, "figures": figures, "curve": (slopes, precision)})


@dataclass(frozen=True)
class Row:
    """One quantity of one method over the seeds.

    Attributes:
        method: Name of the way to fit or to sample.
        ratio: Source of p/q.
        quantity: Name of the quantity.
        values: Its value from each seed.
        errors: Error of each value due to its finite number of samples.
        reference: The value of maximum likelihood from the same seed.
    """

    method: str
    ratio: str
    quantity: str
    values: tuple[float, ...]
    errors: tuple[float, ...]
    reference: tuple[float, ...]

    @property
    def mean(self) -> Pair:
        """Mean over seeds, with the larger of its error over them and of that from the samples."""
        value, spread = mean_over_seeds(self.values)
        return value, max(spread, self.sampling_error)

    @property
    def gain(self) -> Pair:
        """Gain over maximum likelihood, pair by pair."""
        return paired_gain(self.values, self.reference)

    @property
    def sampling_error(self) -> float:
        """Error of the mean due to the samples alone."""
        return math.sqrt(sum(it**2 for it in self.errors)) / len(self.errors)

    def cells(self) -> list[str]:
        """Cells of the csv."""
        words = [self.method, self.ratio, self.quantity, str(len(self.values))]
        numbers = *mean_over_seeds(self.values), self.sampling_error, *self.gain
        return words + [f"{it:.6g}" for it in numbers]


def rows_of(seeds: Sequence[Seed]) -> list[Row]:
    """Rows of all methods, in the order in which they were tried."""
    before = {it.seed: it.figures for it in seeds if it.method == ML}
    rows = []
    for method, ratio in dict.fromkeys((it.method, it.ratio) for it in seeds):
        mine = [it for it in seeds if (it.method, it.ratio) == (method, ratio)]
        for quantity in mine[0].figures:
            values, errors = zip(*(it.figures[quantity] for it in mine), strict=True)
            reference = tuple(before[it.seed].get(quantity, (math.nan,))[0] for it in mine)
            rows.append(Row(method, ratio, quantity, values, errors, reference))
    return rows

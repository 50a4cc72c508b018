"""What a fit of the study of precision and recall came to, and the table of them all."""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from rkl.stats import mean

ML = "maximum likelihood"
COLUMNS = "method", "ratio", "quantity", "seeds", "mean", "se", "se_samples", "gain", "gain_se"

Pair = tuple[float, float]


@dataclass(frozen=True)
class Seed:
    """One law, fitted or sampled in one way from one seed.

    Attributes:
        method: How.
        ratio: How p/q was known: "exact", "critic", or "none" where it was not needed.
        seed: Of data and fit.
        found: Under each quantity its value and its error from the samples, 0 where exact.
        curve: Slopes and the precision at each; empty where it is not known.
        samples: A few draws.
        history: Of its training.
    """

    method: str
    ratio: str
    seed: int
    found: dict[str, Pair]
    curve: tuple[list[float], list[float]] = ((), ())  # type: ignore[assignment]
    samples: list[Any] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Row:
    """One quantity of one method over the seeds.

    Attributes:
        method: How the law was fitted or sampled.
        ratio: How p/q was known.
        quantity: What was measured.
        values: Its value from each seed.
        errors: The error of each from the samples it was measured on.
        gains: By how much each exceeds maximum likelihood of the same seed.
    """

    method: str
    ratio: str
    quantity: str
    values: tuple[float, ...]
    errors: tuple[float, ...]
    gains: tuple[float, ...]

    @property
    def mean(self) -> Pair:
        """Over seeds, with the larger of its error over them and of that from the samples."""
        value, spread = _mean(self.values)
        return value, max(spread, self.sampled)

    @property
    def gain(self) -> Pair:
        """Over maximum likelihood, pair by pair."""
        return _mean(self.gains)

    @property
    def sampled(self) -> float:
        """The error of the mean from the samples alone."""
        return math.sqrt(sum(it**2 for it in self.errors)) / len(self.errors)

    def cells(self) -> list[str]:
        """As the csv has it."""
        numbers = *_mean(self.values), self.sampled, *self.gain
        told = [self.method, self.ratio, self.quantity, str(len(self.values))]
        return told + [f"{it:.6g}" for it in numbers]


def rows_of(seeds: Sequence[Seed]) -> list[Row]:
    """The rows of all methods, in the order in which they were tried."""
    before = {it.seed: it.found for it in seeds if it.method == ML}
    found = []
    for method, ratio in dict.fromkeys((it.method, it.ratio) for it in seeds):
        mine = [it for it in seeds if (it.method, it.ratio) == (method, ratio)]
        for quantity in mine[0].found:
            values, errors = zip(*(it.found[quantity] for it in mine), strict=True)
            gains = tuple(
                it.found[quantity][0] - before[it.seed].get(quantity, (math.nan,))[0]
                for it in mine
            )
            found.append(Row(method, ratio, quantity, values, errors, gains))
    return found


def to_csv(rows: Sequence[Row]) -> str:
    """The rows as text."""
    page = io.StringIO()
    table = csv.writer(page, lineterminator="\n")
    table.writerow(COLUMNS)
    table.writerows(it.cells() for it in rows)
    return page.getvalue()


def _mean(values: Sequence[float]) -> Pair:
    value, error = mean(torch.tensor(values, dtype=torch.float64))
    return value.item(), error.item()

"""Rows of a data set for flows, and their classes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from rkl.tables import Table, table_of

MOST_LEVELS = 4_096  # of a column that are kept one by one
FEW = 8  # coordinates up to which rows of levels are equal by chance


@dataclass(frozen=True)
class Data:
    """Rows in the user's units, on the CPU.

    Attributes:
        values: The rows; integers are already floating-point numbers.
        condition: One column per class, 1 where the row is of it; None without labels.
        classes: Their names.
        step: Spacing of the levels of quantised values, over which a batch is spread, half to
            either side: one number, or one for each column of a table; 0 of continuous values.
        columns: Names of the columns, where the data have some.
        notes: Notes for the user on how the data were read.
    """

    values: Float[Tensor, "rows *event"]
    condition: Float[Tensor, "rows conditions"] | None = None
    classes: tuple[str, ...] = ()
    step: Float[Tensor, "*steps"] = field(default_factory=lambda: torch.zeros(()))
    columns: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.values)

    def table(self) -> Table:
        """Number and shape of the rows, names of columns and classes, and notes on reading."""
        figures = {
            "rows": len(self),
            "shape of a row": " x ".join(map(str, self.event_shape)) or "number",
            "columns": ", ".join(self.columns) or None,
            "classes": ", ".join(self.classes) or None,
        }
        return table_of("Data", figures, self.notes)

    def __str__(self) -> str:
        return str(self.table())

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()

    @property
    def event_shape(self) -> tuple[int, ...]:
        """The shape of one row."""
        return tuple(self.values.shape[1:])

    @property
    def conditions(self) -> int:
        """Number of conditions."""
        return 0 if self.condition is None else self.condition.shape[1]

    def rows(self, index: Tensor) -> "Data":
        """Some of the rows."""
        given = None if self.condition is None else self.condition[index]
        return replace(self, values=self.values[index], condition=given)

    def batch(self, size: int) -> "Data":
        """Random rows, with replacement, their levels spread evenly (uniform dequantisation)."""
        return self.rows(torch.randint(len(self), (size,), device=self.values.device)).spread()

    def spread(self) -> "Data":
        """The rows with uniform noise of one step, half to either side, on quantised values."""
        if not self.step.any():
            return self
        noise = torch.rand_like(self.values) - 0.5
        return replace(self, values=self.values + self.step.to(self.values) * noise)

    @property
    def ties(self) -> bool:
        """True if rows may be equal by chance: few coordinates, all of them quantised."""
        return self.values[0].numel() <= FEW and bool((self.step > 0).all())

    def step_of_columns(self) -> Tensor:
        """The step of each coordinate of a row."""
        return self.step.to(self.values).expand(self.event_shape)

    def to(self, device: torch.device) -> "Data":
        """The same on another device."""
        given = None if self.condition is None else self.condition.to(device)
        return replace(self, values=self.values.to(device), condition=given)

    def split(self, share: float, seed: int) -> tuple["Data", "Data"]:
        """Rows to train on, and a share of rows held out, at random; equal rows on one side.

        Rows of few coordinates, all quantised, are equal by chance, and are split like others.

        Raises:
            ValueError: Too few rows are left, or a column is constant among them.
        """
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self), generator=generator).tolist()
        wanted = max(1, round(share * len(self)))
        group = list(range(len(self))) if self.ties else equal_rows(self.values)
        held_out, rest = _apart(order, group, wanted)
        if len(rest) < 2:
            raise ValueError(
                f"held_out must leave two rows to learn from; got {share} of {len(self):,} rows."
            )
        training = self.rows(torch.tensor(rest))
        _check_spread(training.values, self.columns, self.step_of_columns(), of=len(self))
        return training, self.rows(torch.tensor(held_out, dtype=torch.long))

    def centre_and_spread(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation: of each coordinate of a vector, of all pixels of images."""
        values = self.values.double()
        which = [0] if values.ndim == 2 else list(range(values.ndim))
        noise = self.step.double().square() / 12
        deviation = (values.var(which) + (noise if values.ndim == 2 else noise.mean())).sqrt()
        shape, dtype = self.event_shape, self.values.dtype
        mean = values.mean(which)
        return mean.expand(shape).to(dtype).clone(), deviation.expand(shape).to(dtype).clone()

    def level_range(self) -> tuple[Tensor, Tensor]:
        """The lowest and the highest level of each coordinate; of images, of all of them."""
        low, high = self.values.amin(0), self.values.amax(0)
        if self.values.ndim > 2:
            low, high = low.min().expand_as(low), high.max().expand_as(high)
        return low.clone(), high.clone()

    def levels_of_columns(self) -> Tensor | None:
        """The levels of each quantised column of vectors, rising, [columns, levels].

        Shorter rows are filled up by their last level. A column without levels, or with too many
        to keep, has nan.
        """
        if self.values.ndim != 2:
            return None
        rows = [
            _levels(column, step) if step > 0 else column.new_full((1,), math.nan)
            for column, step in zip(self.values.T, self.step_of_columns(), strict=True)
        ]
        most = max(map(len, rows))
        return torch.stack([torch.cat([it, it[-1:].expand(most - len(it))]) for it in rows])


def _levels(column: Tensor, step: Tensor) -> Tensor:
    """Values that are half a step apart at least; nan of more than are kept."""
    values = column.unique()
    first = values.diff(prepend=values[:1] - step) > step / 2
    return values[first] if first.sum() <= MOST_LEVELS else values.new_full((1,), math.nan)


def equal_rows(values: Tensor) -> list[int]:
    """A number for each row, the same for equal ones."""
    numbers: dict[bytes, int] = {}
    rows = (values + 0.0).cpu().numpy()  # -0.0 is 0.0
    return [numbers.setdefault(row.tobytes(), len(numbers)) for row in rows]


def _apart(order: list[int], group: list[int], wanted: int) -> tuple[list[int], list[int]]:
    """About so many rows, and the rest, with each group of equal rows on one side."""
    size: dict[int, int] = {}
    for number in group:
        size[number] = size.get(number, 0) + 1
    chosen: set[int] = set()
    taken = 0
    for row in order:
        if taken >= wanted:
            break
        number = group[row]
        fits = size[number] == 1 or taken + size[number] <= 1.5 * wanted
        if number not in chosen and fits:
            chosen.add(number)
            taken += size[number]
    if not chosen:  # all groups are large
        number = min(size, key=lambda it: size[it])
        chosen.add(number)
    held_out = [row for row in order if group[row] in chosen]
    return held_out, [row for row in order if group[row] not in chosen]


def _check_spread(
    values: Tensor, columns: Sequence[str], step: Tensor | None = None, of: int | None = None
) -> None:
    low, high = values.amin(0), values.amax(0)
    constant = low == high
    if step is not None:
        constant &= step == 0
    index = constant.flatten().nonzero().flatten().tolist()
    if index and (values.ndim == 2 or len(index) == low.numel()):
        named = [*columns] if len(columns) == low.numel() else [*map(str, range(low.numel()))]
        which = some_of([named[it] for it in index])
        where = "" if of is None else f" among the {len(values):,} of {of:,} rows to learn from"
        raise ValueError(
            f"data has {len(index)} constant columns{where}: {which}. Their density is infinite; "
            "leave them out."
        )


def some_of(names: Sequence[str]) -> str:
    """The first names of a list, for a message."""
    return ", ".join(names[:8]) + ", ..." * (len(names) > 8)

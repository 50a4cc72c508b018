"""Tables of numbers with their errors: as text, as HTML and as a data frame of pandas."""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rkl.metrics.written import Cell, parenthesised

LONGEST = 40  # rows that are printed
ROUNDING = 1e-12  # nats, or posterior standard deviations, that are none


@dataclass(frozen=True)
class Table:
    """One row for each thing compared.

    Attributes:
        title: What is compared.
        columns: What the cells of a row are, with units.
        rows: Text, a number, a value with its standard error, or None, for each column.
        notes: What was left out and why, and what the reader should know.
        acts: Under the name of a row, the parameters it stands for, where it has any.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    notes: Sequence[str] = ()
    acts: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [list(self.columns), *([parenthesised(c) for c in row] for row in self._shown())]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        numeric = [isinstance(c, tuple | float) for c in self.rows[0]] if self.rows else []

        def laid_out(line):
            cells = zip(line, widths, numeric or [False] * len(widths), strict=True)
            return "  ".join(c.rjust(w) if n else c.ljust(w) for c, w, n in cells).rstrip()

        return "\n".join([self.title, *map(laid_out, lines), *self._said()])

    def _repr_html_(self) -> str:
        def row(cells, tag):
            return "".join(f"<{tag}>{html.escape(parenthesised(c))}</{tag}>" for c in cells)

        body = "".join(f"<tr>{row(cells, 'td')}</tr>" for cells in self._shown())
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in self._said())
        return (
            f"<table><caption>{html.escape(self.title)}</caption>"
            f"<thead><tr>{row(self.columns, 'th')}</tr></thead>"
            f"<tbody>{body}</tbody></table>{notes}"
        )

    def _shown(self) -> Sequence[Sequence[Cell]]:
        return self.rows[:LONGEST]

    def _said(self) -> list[str]:
        hidden = len(self.rows) - LONGEST
        return [*([f"... and {hidden:,} more rows"] if hidden > 0 else []), *self.notes]

    def to_dict(self) -> dict[str, Any]:
        """The table as JSON can hold it: a value with an error is a list of the two."""
        rows = [[list(c) if isinstance(c, tuple) else c for c in row] for row in self.rows]
        return {
            "title": self.title,
            "columns": list(self.columns),
            "rows": rows,
            "notes": list(self.notes),
            "acts": {name: written(act) for name, act in self.acts.items()},
        }

    @classmethod
    def of(cls, kept: Mapping[str, Any]) -> "Table":
        """The table that ``to_dict`` was made of."""
        rows = [tuple(tuple(c) if isinstance(c, list) else c for c in row) for row in kept["rows"]]
        acts = {
            name: {key: number_or_nan(x) for key, x in act.items()}
            for name, act in kept["acts"].items()
        }
        return cls(kept["title"], kept["columns"], rows, kept["notes"], acts)

    def to_dataframe(self) -> Any:
        """A data frame of pandas; a value with an error becomes two columns.

        Raises:
            ImportError: There is no pandas.
        """
        try:
            import pandas
        except ImportError as error:
            raise ImportError("to_dataframe needs pandas: pip install pandas.") from error
        wide: dict[str, list] = {}
        for name, cells in zip(self.columns, zip(*self.rows, strict=True), strict=True):
            pairs = [isinstance(cell, tuple) for cell in cells]
            wide[name] = [c[0] if p else c for c, p in zip(cells, pairs, strict=True)]
            if any(pairs):
                wide[f"{name}, error"] = [
                    c[1] if p else None for c, p in zip(cells, pairs, strict=True)
                ]
        return pandas.DataFrame(wide)


def zero_rounding(value: Tensor) -> Tensor:
    """The same, 0 where it is 0 but for rounding."""
    return torch.where(value.abs() < ROUNDING, 0.0, value)


def number_or_nan(kept: Any) -> Tensor:
    """Numbers that JSON held, nan where it held null."""
    return torch.from_numpy(np.array(kept, np.float64))


def written(values: Mapping[str, Tensor]) -> dict[str, Any]:
    """Tensors as JSON can hold them."""
    return {name: value.tolist() for name, value in values.items()}

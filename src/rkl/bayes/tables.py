"""Tables of estimates, with the parameters that their rows stand for."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rkl import tables

ROUNDING = 1e-12  # nats, or posterior standard deviations, that are none


@dataclass(frozen=True)
class Table(tables.Table):
    """One row for each thing compared.

    Attributes:
        title: What is compared.
        columns: What the cells of a row are, with units.
        rows: Text, a number, a value with its standard error, or None, for each column.
        notes: What was left out and why, and what the reader should know.
        acts: Under the name of a row, the parameters it stands for, where it has any.
    """

    acts: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The table as JSON can hold it: a value with an error is a list of the two."""
        return super().to_dict() | {
            "acts": {name: to_lists(act) for name, act in self.acts.items()}
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> "Table":
        """The table that ``to_dict`` was made of."""
        plain = tables.Table.from_dict(record)
        acts = {
            name: {key: number_or_nan(x) for key, x in act.items()}
            for name, act in record["acts"].items()
        }
        return cls(plain.title, plain.columns, plain.rows, plain.notes, acts)


def zero_rounding(value: Tensor) -> Tensor:
    """The same, 0 where it is 0 but for rounding."""
    return torch.where(value.abs() < ROUNDING, 0.0, value)


def number_or_nan(record: Any) -> Tensor:
    """Numbers that JSON held, nan where it held null."""
    return torch.from_numpy(np.array(record, np.float64))


def to_lists(values: Mapping[str, Tensor]) -> dict[str, Any]:
    """Tensors as JSON can hold them."""
    return {name: value.tolist() for name, value in values.items()}

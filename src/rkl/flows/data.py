"""Data that flows are fitted to: from arrays and files, checked, split and made continuous."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from rkl.readers import (
    Contents,
    as_floats,
    as_numbers,
    class_names,
    natural_order,
    place_of_nan,
    read,
    read_labels,
)

FEWEST = 20  # rows, below which a fit says nothing
LEVELS = 256  # so few distinct values among many numbers are levels of a grid


@dataclass(frozen=True)
class Data:
    """Rows in the user's units, on the CPU.

    Attributes:
        values: The rows; integers are already floating-point numbers.
        condition: One column per class, 1 where the row is of it; None without labels.
        classes: Their names.
        step: Spacing of the levels of quantised values, over which a batch is spread; 0 for
            continuous ones.
        columns: Names of the columns, where the data have some.
        notes: What a user should know of how the data were read.
    """

    values: Float[Tensor, "rows *event"]
    condition: Float[Tensor, "rows conditions"] | None = None
    classes: tuple[str, ...] = ()
    step: float = 0.0
    columns: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.values)

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
        """The rows with uniform noise of one step added to quantised values."""
        if not self.step:
            return self
        return replace(self, values=self.values + self.step * torch.rand_like(self.values))

    def to(self, device: torch.device) -> "Data":
        """The same on another device."""
        given = None if self.condition is None else self.condition.to(device)
        return replace(self, values=self.values.to(device), condition=given)

    def split(self, share: float, seed: int) -> tuple["Data", "Data"]:
        """Rows to train on, and a share of rows held out, at random."""
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self), generator=generator)
        held_out = max(1, round(share * len(self)))
        if held_out >= len(self) - 1:
            raise ValueError(
                f"held_out must leave two rows to learn from; got {share} of {len(self):,} rows."
            )
        return self.rows(order[held_out:]), self.rows(order[:held_out])

    def centre_and_spread(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation: of each coordinate of a vector, of all pixels of images."""
        values = self.values.double()
        which = [0] if values.ndim == 2 else list(range(values.ndim))
        mean = values.mean(which) + self.step / 2
        deviation = (values.var(which) + self.step**2 / 12).sqrt()
        shape, dtype = self.event_shape, self.values.dtype
        return mean.expand(shape).to(dtype).clone(), deviation.expand(shape).to(dtype).clone()


def read_data(
    source: Any,
    labels: Any = None,
    *,
    dequantise: bool | None = None,
    classes: Sequence[str] | None = None,
) -> Data:
    """Rows from wherever they are, looked at before anything is learnt from them.

    Quantised values, such as the 256 grey levels of images, have no density: a flow would put
    ever narrower peaks on them. Dequantised, uniform noise of one step is added to every batch,
    and minus the log-density then bounds the code length of the levels, in nats.

    Args:
        source: A tensor, an array or a data frame [rows, *event]; a file or a folder of images
            that :func:`rkl.readers.read` reads; a Dataset or a DataLoader of torch, which is
            read once, labels beside the values included. Integers of more than 16 bits become
            float64.
        labels: Class of each row: an array, a file of one, or the name of a column.
        dequantise: Whether to spread quantised values. By default image files are, and other
            quantised values are refused.
        classes: Names of all classes, in the order of their columns; the rows may lack some. By
            default those of the labels, in natural order.

    Raises:
        FileNotFoundError: There is no such file.
        ImportError: Reading it needs a package that is not installed.
        TypeError: The source or the labels are of no kind that can be read.
        ValueError: The rows cannot be learnt from; the message says which and why.

    >>> data = read_data(torch.randn(100, 2), labels=["a", "b"] * 50)
    >>> data.event_shape, data.classes
    ((2,), ('a', 'b'))
    """
    found = _read(source, labels)
    notes, columns = found.notes, found.columns
    array = found.values
    _check_rows(array, columns)
    step = _step(array, True if found.images and dequantise is None else dequantise)
    try:
        values = torch.from_numpy(np.require(as_floats(array), requirements=["C", "W"]))
    except ValueError as error:
        raise ValueError(f"data: {error}.") from None
    _check_spread(values)
    unasked = labels is None and classes is not None and not len(classes)
    condition, names = _one_hot(None if unasked else found.labels, len(values), classes)
    return Data(values, condition, names, step, columns, notes)


def check_device(name: str) -> torch.device:
    """The device of this name.

    Raises:
        ValueError: There is none.
    """
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError):  # the latter where torch is built without CUDA
        raise ValueError(
            f"device must be one that torch finds here, as cpu; got {name!r}."
        ) from None


def _read(source: Any, labels: Any) -> Contents:
    """The values, and the labels that came with them or were given."""
    named = labels if isinstance(labels, str | os.PathLike) else None
    if isinstance(source, str | os.PathLike):
        found, given = _read_file(Path(source), named)
    else:
        found, given = _read_object(source), None
    if named is not None and given is None:
        given = read_labels(named, rows=len(found.values))
    elif labels is not None and named is None:
        given = labels
    return found if given is None else replace(found, labels=given)


def _read_file(path: Path, labels: str | os.PathLike | None) -> tuple[Contents, Any]:
    """A file with the labels in it: those of the column or array of this name, if it has it."""
    if labels is None or isinstance(labels, os.PathLike):
        found = read(path)
        return found, None if labels is not None else found.labels
    try:
        found = read(path, labels=labels)
    except ValueError as error:
        if not Path(labels).is_file():
            raise
        try:
            return read(path), None
        except ValueError:
            raise error from None
    return found, found.labels


def _read_object(source: Any) -> Contents:
    if isinstance(source, DataLoader | Dataset):
        values, labels = _collected(source)
        found = replace(_numbers(values), labels=labels)
    elif isinstance(source, Tensor | np.ndarray) or type(source).__module__.startswith("pandas"):
        found = _numbers(source)
    else:
        raise TypeError(
            "data must be an array, a path, a Dataset or a DataLoader; got a "
            f"{type(source).__name__}."
        )
    return found


def _numbers(source: Any) -> Contents:
    if isinstance(source, Tensor):
        if source.is_complex() or source.dtype == torch.bool:
            raise TypeError(f"data must hold real numbers; got {source.dtype}.")
        source = source.detach().cpu()
        source = (source.float() if source.dtype == torch.bfloat16 else source).numpy()
    names = tuple(map(str, getattr(source, "columns", ())))
    if len(set(names)) < len(names):
        raise ValueError(f"data: columns must have names of their own; got {', '.join(names)}.")
    if isinstance(source, np.ndarray) and source.dtype == bool:
        raise TypeError(f"data must hold real numbers; got {source.dtype}.")
    try:
        return as_numbers(source if isinstance(source, np.ndarray) else np.asarray(source), names)
    except (TypeError, ValueError) as error:
        raise type(error)(f"data: {error}.") from None


def _collected(source: Any) -> tuple[Tensor, Tensor | None]:
    """All that a Dataset or a DataLoader gives, as rows and, from pairs, labels."""
    loaded = isinstance(source, DataLoader)
    items = list(source) if loaded else [source[i] for i in range(len(source))]
    if not items:
        raise ValueError("data has no rows.")
    join = torch.cat if loaded else torch.stack
    paired = isinstance(items[0], list | tuple)
    values = join([torch.as_tensor(item[0] if paired else item) for item in items])
    if not paired or len(items[0]) < 2:
        return values, None
    return values, join([torch.as_tensor(item[1]) for item in items])


def _check_rows(values: np.ndarray, columns: Sequence[str]) -> None:
    if values.ndim < 2 or not math.prod(values.shape[1:]):
        raise ValueError(f"data must be [rows, *event]; got the shape {list(values.shape)}.")
    if len(values) < FEWEST:
        raise ValueError(f"data must have at least {FEWEST} rows; got {len(values)}.")
    where = place_of_nan(values, columns)
    if where is not None:
        raise ValueError(f"data must be finite; {where}.")


def _check_spread(values: Tensor) -> None:
    """Refuse coordinates without variation: their density is infinite."""
    low, high = values.amin(0), values.amax(0)
    constant = (low == high).flatten().nonzero().flatten().tolist()
    vectors = values.ndim == 2
    if constant and (vectors or len(constant) == low.numel()):
        which = ", ".join(map(str, constant[:5])) + ", ..." * (len(constant) > 5)
        raise ValueError(
            f"data has {len(constant)} constant columns: {which}. Their density is infinite; "
            "leave them out."
        )


def _step(values: np.ndarray, wanted: bool | None) -> float:
    """The spacing of levels to spread values over; 0 where they are continuous."""
    spacing = _spacing(values)
    if spacing is None or (wanted is False and values.dtype.kind == "f"):
        return 0.0
    if not wanted:
        raise ValueError(
            f"data holds levels {spacing:.4g} apart ({values.dtype}), "
            "which have no density: say dequantise=True (--dequantise) to spread each over one "
            "step, or, if they are as good as continuous, turn them into floats and say "
            "dequantise=False (--no-dequantise)."
        )
    return spacing


def _spacing(values: np.ndarray) -> float | None:
    """The distance between levels, where the values are integers or few beside their number."""
    if values.dtype.kind != "f":
        return 1.0
    levels = np.unique(values.reshape(-1)[: 512 * LEVELS])
    if 2 <= len(levels) <= LEVELS and 16 * len(levels) <= min(values.size, 512 * LEVELS):
        return float(np.diff(levels.astype(np.float64)).min())
    # All floats from 2**23 on, or 2**52 in double precision, are integers: that says nothing.
    small = np.abs(values) < 2.0 ** np.finfo(values.dtype).nmant
    return 1.0 if small.any() and bool((values[small] == values[small].round()).all()) else None


def _one_hot(
    labels: Any, rows: int, classes: Sequence[str] | None
) -> tuple[Tensor | None, tuple[str, ...]]:
    """A column for each class, and the names of the classes."""
    if labels is None and not classes:
        return None, ()
    if labels is None:
        raise ValueError(f"labels must be given, of the classes {_some(classes or ())}.")
    if isinstance(labels, Tensor):
        labels = labels.cpu().numpy()
    names = class_names(labels, rows=rows)
    known = sorted(set(names), key=natural_order) if classes is None else list(classes)
    place = {name: i for i, name in enumerate(known)}
    others = sorted(set(names) - place.keys(), key=natural_order)
    if others:
        raise ValueError(
            f"labels must be of the classes {_some(known) or 'none'}; got {_some(others)}."
        )
    if len(known) > math.sqrt(rows) * 4 and classes is None:
        raise ValueError(f"labels name {len(known)} classes for {rows} rows; too many to learn.")
    index = torch.tensor([place[name] for name in names])
    return torch.nn.functional.one_hot(index, len(known)).float(), tuple(known)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + ", ..." * (len(names) > 8)

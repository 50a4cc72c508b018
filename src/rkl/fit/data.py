"""Data that flows are fitted to: from arrays and files, checked, split and made continuous."""

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from rkl.flows.rows import Data, _check_spread, equal_rows, some_of
from rkl.readers import (
    Contents,
    as_floats,
    as_numbers,
    class_names,
    masked_numbers,
    natural_order,
    place_of_nan,
    read,
    read_labels,
)

FEWEST = 20  # rows, below which a fit says nothing
LEVELS = 256  # so few distinct values among many numbers are levels of a grid
PER_LEVEL = 16  # rows on each of them
PIXELS = 16  # columns, from which levels in common are those of an image laid flat
ROUNDED = 8  # units in the last place, by which one level may differ from row to row
OFF_GRID = 1e-3  # of a gap, by which levels on a grid may miss it
CHANCE = 1e-3  # that the levels of an image's columns are as far apart as those of one column
RARE = 10  # rows of a class, below which that is said


def read_data(
    source: Any,
    labels: Any = None,
    *,
    dequantise: bool | None = None,
    classes: Sequence[str] | None = None,
    step: Tensor | None = None,
) -> Data:
    """Rows of an array, a file or a Dataset, checked before a fit.

    Quantised values, such as the 256 grey levels of images, have no density: a flow would put
    ever narrower peaks on them. Dequantised, uniform noise of one step, half to either side, is
    added to every batch, and minus the log-density then bounds the code length of the levels, in
    nats.

    Args:
        source: A tensor, an array, a list or a data frame [rows, *event]; a file or a folder of
            images that :func:`rkl.readers.read` reads; a Dataset or a DataLoader of torch, which
            is read once, labels beside the values included. Integers of more than 16 bits become
            float64.
        labels: Class of each row: an array, a file of one, or the name of a column of the file
            or data frame.
        dequantise: Whether to spread quantised values, each column of a table by its own step.
            By default image files are; tables of nothing but levels are refused, and columns of
            levels beside continuous ones are named in the notes.
        classes: Names of all classes, in the order of their columns; the rows may lack some. By
            default those of the labels, in natural order.
        step: Spacing of the levels, if known from a fit; levels are then not searched for, and
            neither few rows nor constant columns are refused.

    Raises:
        FileNotFoundError: There is no such file.
        ImportError: Reading it needs a package that is not installed.
        TypeError: The source or the labels have a type that cannot be read.
        ValueError: A fit to the rows is not possible; the message has the reason.

    >>> data = read_data(torch.randn(100, 2), labels=["a", "b"] * 50)
    >>> data.event_shape, data.classes
    ((2,), ('a', 'b'))
    """
    rows = _read(source, labels)
    notes, columns = rows.notes, rows.columns
    array = rows.values
    _check_rows(array, columns, 1 if step is not None else FEWEST)
    if step is None:
        steps, notes_on_levels = _steps(
            array, True if rows.images and dequantise is None else dequantise, columns
        )
        notes = (*notes, *notes_on_levels)
    else:
        steps = step.cpu().numpy()
    try:
        values = torch.from_numpy(np.require(as_floats(array), requirements=["C", "W"]))
    except ValueError as error:
        raise ValueError(f"data: {error}.") from None
    unasked = labels is None and classes is not None and not len(classes)
    condition, names = _one_hot(None if unasked else rows.labels, len(values), classes)
    steps = torch.as_tensor(steps).to(values)
    if step is None:
        _check_spread(values, columns, steps)
    steps = steps.flatten()[0] if (steps == steps.flatten()[0]).all() else steps
    data = Data(values, condition, names, steps, columns)
    return replace(data, notes=(*notes, *_equal(data), *_rare(condition, names)))


def _equal(data: Data) -> list[str]:
    if data.ties:
        return []
    values = data.values
    equal = len(values) - len(set(equal_rows(values)))
    if not equal:
        return []
    return [
        f"{equal:,} of {len(values):,} rows equal an earlier one: equal rows are held out "
        "together or trained on together"
    ]


def _rare(condition: Tensor | None, names: Sequence[str]) -> list[str]:
    if condition is None:
        return []
    counts = condition.sum(0).long().tolist()
    rare = [
        f"{name} ({count})" for name, count in zip(names, counts, strict=True) if 0 < count < RARE
    ]
    return [f"too few rows to learn a class from: {some_of(rare)}"] if rare else []


def _read(source: Any, labels: Any) -> Contents:
    named = labels if isinstance(labels, str | os.PathLike) else None
    if isinstance(source, str | os.PathLike):
        rows, given = _read_file(Path(source), named)
    elif _of_pandas(source) and hasattr(source, "columns"):
        rows, given = _read_frame(source, named)
    else:
        rows, given = _read_object(source), None
    if named is not None and given is None:
        given = read_labels(named, rows=len(rows.values))
    elif labels is not None and named is None:
        given = labels
    return rows if given is None else replace(rows, labels=given)


def _read_file(path: Path, labels: str | os.PathLike | None) -> tuple[Contents, Any]:
    """The values of a file, and its labels: those of this column or array, if it has it."""
    if labels is None or isinstance(labels, os.PathLike):
        rows = read(path)
        return rows, None if labels is not None else rows.labels
    try:
        rows = read(path, labels=labels)
    except ValueError as error:
        if not Path(labels).is_file():
            raise
        try:
            return read(path), None
        except ValueError:
            raise error from None
    return rows, rows.labels


def _of_pandas(source: Any) -> bool:
    return type(source).__module__.startswith("pandas")


def _read_frame(frame: Any, labels: Any) -> tuple[Contents, Any]:
    """The numbers of a data frame, and its column of labels, if it has it."""
    names = tuple(map(str, frame.columns))
    if len(set(names)) < len(names):
        raise ValueError(f"data: columns must have names of their own; got {', '.join(names)}.")
    columns = {name: frame.iloc[:, place] for place, name in enumerate(names)}
    chosen = columns.pop(labels, None)
    if isinstance(labels, str) and chosen is None and not Path(labels).is_file():
        raise ValueError(f"labels: data has no column {labels!r}; it has {some_of(names)}.")
    if not columns:
        raise ValueError("data must have a column of numbers beside the labels.")
    arrays = [_frame_column(name, column) for name, column in columns.items()]
    booleans = [name for name, column in columns.items() if column.dtype.kind == "b"]
    notes = tuple(f"column {name}: true and false were read as 1 and 0" for name in booleans)
    kind = np.result_type(*arrays)
    rows = as_numbers(np.stack([it.astype(kind) for it in arrays], 1), tuple(columns))
    return replace(rows, notes=notes), None if chosen is None else chosen.tolist()


def _frame_column(name: str, column: Any) -> np.ndarray:
    """The numbers of a column of a data frame, nan where one is missing."""
    if column.dtype.kind not in "fiub":
        raise TypeError(
            f"data: column {name} must hold numbers; got {column.dtype}. Turn it into numbers, "
            f"leave it out or, if it holds classes, say labels={name!r}."
        )
    inner = getattr(column.dtype, "numpy_dtype", None)  # of pandas' own types
    if inner is not None and column.isna().any():
        return column.to_numpy(dtype=np.float64, na_value=np.nan)
    array = np.asarray(column, dtype=inner)
    return array.astype(np.uint8) if array.dtype == bool else array


def _read_object(source: Any) -> Contents:
    if isinstance(source, DataLoader | Dataset):
        values, labels = _collect(source)
        rows = replace(_numbers(values), labels=labels)
    elif isinstance(source, Tensor | np.ndarray) or _of_pandas(source):
        rows = _numbers(source)
    elif isinstance(source, list | tuple):
        _refuse_masked(source)
        try:
            rows = _numbers(np.asarray(source))
        except ValueError as error:  # of lengths that differ
            raise ValueError(f"data must hold rows of one length; {error}") from None
    else:
        raise TypeError(
            "data must be an array, rows in a list, a path, a Dataset or a DataLoader; got a "
            f"{type(source).__name__}."
        )
    return rows


def _numbers(source: Any) -> Contents:
    if isinstance(source, Tensor):
        if source.is_complex() or source.dtype == torch.bool:
            raise TypeError(f"data must hold real numbers; got {source.dtype}.")
        source = source.detach().cpu()
        source = (source.float() if source.dtype == torch.bfloat16 else source).numpy()
    if isinstance(source, np.ndarray) and source.dtype == bool:
        raise TypeError(f"data must hold real numbers; got {source.dtype}.")
    try:
        return as_numbers(source if isinstance(source, np.ndarray) else np.asarray(source))
    except (TypeError, ValueError) as error:
        raise type(error)(f"data: {error}.") from None


def _collect(source: Any) -> tuple[Tensor, list[Any] | None]:
    loaded = isinstance(source, DataLoader)
    if isinstance(source, DataLoader | IterableDataset):
        items = list(source)
    else:
        items = [source[i] for i in range(len(source))]
    if not items:
        raise ValueError("data has no rows.")
    join = torch.cat if loaded else torch.stack
    paired = isinstance(items[0], list | tuple)
    rows = [item[0] if paired else item for item in items]
    _refuse_masked(rows)
    values = join([_row_of_dataset(row) for row in rows])
    if not paired or len(items[0]) < 2:
        return values, None
    labels: list[Any] = []
    for item in items:
        one = item[1].tolist() if hasattr(item[1], "tolist") else item[1]
        labels.extend(one if loaded else [one])
    return values, labels


def _row_of_dataset(row: Any) -> Tensor:
    """The row as a tensor; that of an image in colours has its channels first."""
    if isinstance(row, Tensor):
        return row
    array = np.asarray(row)
    if array.dtype.kind not in "fiub":
        raise TypeError(
            "data: a Dataset must yield tensors, arrays, numbers or images, alone or before a "
            f"label; got a {type(row).__name__}."
        )
    if hasattr(row, "getbands") and array.ndim == 3:  # an image of PIL in colours
        array = np.moveaxis(array, -1, 0)
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))


def _refuse_masked(rows: Sequence[Any]) -> None:
    if masked := masked_numbers(rows):
        raise ValueError(f"data: {masked}.")


def _check_rows(values: np.ndarray, columns: Sequence[str], at_least: int) -> None:
    if values.ndim < 2 or not math.prod(values.shape[1:]):
        column = " A single column is [rows, 1], as data[:, None] is." * (values.ndim == 1)
        raise ValueError(
            f"data must be [rows, *event]; got the shape {list(values.shape)}.{column}"
        )
    if len(values) < at_least:
        rows = "1 row" if at_least == 1 else f"{at_least} rows"
        raise ValueError(f"data must have at least {rows}; got {len(values)}.")
    where = place_of_nan(values, columns)
    if where is not None:
        raise ValueError(f"data must be finite; {where}.")


def _steps(
    values: np.ndarray, wanted: bool | None, columns: Sequence[str]
) -> tuple[Any, list[str]]:
    """The spacing of levels to spread values over, 0 where they are continuous; and notes."""
    pixels = values.ndim > 2 or values.dtype == np.uint8
    if pixels or (values.shape[1] >= PIXELS and _few_levels(values) is not None):
        step = _step(values, wanted)  # of one unit, as those of an image laid flat
        return (_with_wider(values, step) if step and values.ndim == 2 else step), []
    if wanted is False and values.dtype.kind == "f":
        return np.zeros(values.shape[1]), []
    levels = [_column(column) for column in values.T]
    named = list(columns) if len(columns) == len(levels) else list(map(str, range(len(levels))))
    coarse = [it for it, one in enumerate(levels) if one is not None and one.coarse]
    if not wanted:
        every = all(it is not None and (it.coarse or it.whole) for it in levels)
        if every and (coarse or values.dtype.kind != "f" or _whole(values)):
            spacing = min(it.step for it in levels if it is not None)
            raise ValueError(_REFUSED.format(spacing, values.dtype))
        return np.zeros(values.shape[1]), _unspread(coarse, levels, named)
    steps = np.array([0.0 if it is None else it.step for it in levels])
    none = ["dequantise: no column holds levels, so that nothing was spread"]
    return steps, [] if steps.any() else none


def _unspread(coarse: list[int], levels: list[Any], names: Sequence[str]) -> list[str]:
    if not coarse:
        return []
    columns = some_of([f"{names[it]} ({levels[it].levels} levels)" for it in coarse])
    return [
        f"columns of levels have no density, and their log-density rises without bound: "
        f"{columns}; "
        "dequantise=True (--dequantise) spreads each over one step"
    ]


_REFUSED = (
    "data holds levels {:.4g} apart ({}), "
    "which have no density: say dequantise=True (--dequantise) to spread each over one "
    "step, or, if they are as good as continuous, turn them into floats and say "
    "dequantise=False (--no-dequantise)."
)


class _Column(NamedTuple):
    """A column of levels: their spacing and number, and the evidence for levels."""

    step: float
    levels: int
    coarse: bool  # so few that a flow puts a peak on each
    whole: bool  # integers


def _column(column: np.ndarray) -> _Column | None:
    """Levels of a column, if it has any: integers, few values, or rounded ones with ties."""
    levels = _distinct(column)
    count, rows = len(levels), len(column)
    if count < 2:
        return _Column(1.0, count, False, True) if column.dtype.kind != "f" else None
    gaps = np.diff(levels)
    whole = _whole(column)
    few_levels = count <= LEVELS and PER_LEVEL * count <= rows
    if whole:
        # Of few levels a wider spacing may be chance.
        step = float(np.gcd.reduce(gaps.astype(np.int64))) if count >= 5 else 1.0
        return _Column(step, count, few_levels or (4 * count <= rows and count <= LEVELS), True)
    step = float(gaps.min())
    apart = gaps / step
    on_grid = bool(
        (np.abs(apart - apart.round()) < OFF_GRID * apart + _rounding(column) / step).all()
    )
    if on_grid:  # to more digits than those of one gap
        step = float((levels[-1] - levels[0]) / apart.round().sum())
    tied = 2 * count <= rows and on_grid
    return _Column(step, count, few_levels, False) if few_levels or tied else None


def _distinct(column: np.ndarray) -> np.ndarray:
    """The different values, rising; those of floats as one where they differ by rounding alone."""
    levels = np.unique(column)
    if column.dtype.kind != "f":
        return levels
    levels = levels.astype(np.float64)
    apart = np.diff(levels) > _rounding(column, np.abs(levels[1:]))
    return levels[np.concatenate([[True], apart])]


def _rounding(column: np.ndarray, size: Any = 0.0) -> Any:
    """Bound on the rounding of values of this size, computed from others as large as usual."""
    usual = float(np.median(np.abs(column)))
    return ROUNDED * np.finfo(column.dtype).eps * np.maximum(size, usual)


def _with_wider(values: np.ndarray, step: float) -> np.ndarray:
    """A step in common, but for columns whose levels are too far apart for that to be chance."""
    steps = np.full(values.shape[1], step)
    for place, one in enumerate(map(_column, values.T)):
        if one is not None and one.step > step:
            chance = values.shape[1] * (step / one.step) ** (one.levels - 1)
            steps[place] = one.step if chance < CHANCE else step
    return steps


def _whole(values: np.ndarray) -> bool:
    """True if all are integers; floats too large to be anything else do not count."""
    if values.dtype.kind != "f":
        return True
    small = np.abs(values) < 2.0 ** np.finfo(values.dtype).nmant
    return bool(small.any()) and bool((values[small] == values[small].round()).all())


def _step(values: np.ndarray, wanted: bool | None) -> float:
    """The spacing of the levels of images; 0 where they are continuous."""
    spacing = _spacing(values)
    if spacing is None or (wanted is False and values.dtype.kind == "f"):
        return 0.0
    if not wanted:
        raise ValueError(_REFUSED.format(spacing, values.dtype))
    return spacing


def _spacing(values: np.ndarray) -> float | None:
    """The distance between levels, of integers or of few values for their number; else 0."""
    if values.dtype.kind != "f":
        return 1.0
    spacing = _few_levels(values)
    return spacing or (1.0 if _whole(values) else None)


def _few_levels(values: np.ndarray) -> float | None:
    levels = _distinct(values.reshape(-1)[: 512 * LEVELS])
    if 2 <= len(levels) <= LEVELS and 16 * len(levels) <= min(values.size, 512 * LEVELS):
        return float(np.diff(levels).min())
    return None


def _one_hot(
    labels: Any, rows: int, classes: Sequence[str] | None
) -> tuple[Tensor | None, tuple[str, ...]]:
    if labels is None and not classes:
        return None, ()
    if labels is None:
        raise ValueError(f"labels must be given, of the classes {some_of(classes or ())}.")
    if isinstance(labels, Tensor):
        labels = labels.cpu().numpy()
    names = class_names(labels, rows=rows)
    ordered = sorted(set(names), key=natural_order) if classes is None else list(classes)
    place = {name: i for i, name in enumerate(ordered)}
    others = sorted(set(names) - place.keys(), key=natural_order)
    if others:
        raise ValueError(
            f"labels must be of the classes {some_of(ordered) or 'none'}; got {some_of(others)}."
        )
    if len(ordered) > math.sqrt(rows) * 4 and classes is None:
        raise ValueError(f"labels name {len(ordered)} classes for {rows} rows; too many to learn.")
    index = torch.tensor([place[name] for name in names])
    return torch.nn.functional.one_hot(index, len(ordered)).float(), tuple(ordered)

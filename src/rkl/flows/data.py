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

from rkl.flows.files import read_file

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
    """

    values: Float[Tensor, "rows *event"]
    condition: Float[Tensor, "rows conditions"] | None = None
    classes: tuple[str, ...] = ()
    step: float = 0.0

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
) -> Data:
    """Rows from wherever they are, looked at before anything is learnt from them.

    Quantised values, such as the 256 grey levels of images, have no density: a flow would put
    ever narrower peaks on them. Dequantised, uniform noise of one step is added to every batch,
    and minus the log-density then bounds the code length of the levels, in nats.

    Args:
        source: A tensor or an array [rows, *event]; a file .npy, .npz, .csv, .parquet, IDX or
            IDX.gz; a folder of images, of which sub-folders are classes; a Dataset or a
            DataLoader of torch, which is read once, labels beside the values included.
        labels: Class of each row: an array, a file of one, or the name of a column.
        dequantise: Whether to spread quantised values. By default image files are, and other
            quantised values are refused.

    Raises:
        FileNotFoundError: There is no such file.
        ImportError: Reading it needs a package that is not installed.
        TypeError: The source or the labels are of no kind that can be read.
        ValueError: The rows cannot be learnt from; the message says which and why.

    >>> data = read_data(torch.randn(100, 2), labels=["a", "b"] * 50)
    >>> data.event_shape, data.classes
    ((2,), ('a', 'b'))
    """
    values, found, pictures = _read(source, labels)
    chosen = found if found is not None else labels
    values = _as_tensor(values)
    _check_rows(values)
    step = _step(values, True if pictures and dequantise is None else dequantise)
    if not values.is_floating_point():
        values = values.float()
    _check_spread(values)
    condition, classes = _one_hot(chosen, len(values))
    return Data(values, condition, classes, step)


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


def _read(source: Any, labels: Any) -> tuple[Any, Any, bool]:
    """The values, the labels that came with them, and whether they are files of pictures."""
    if isinstance(source, str | os.PathLike):
        found = read_file(Path(source), labels if isinstance(labels, str) else None)
        if found.labels is None and isinstance(labels, str | os.PathLike):
            return found.values, read_file(Path(labels), None).values, found.pictures
        return found.values, found.labels, found.pictures
    if isinstance(source, DataLoader | Dataset):
        values, found = _collected(source)
        return values, found, False
    if isinstance(source, Tensor | np.ndarray):
        return source, None, False
    raise TypeError(
        f"data must be an array, a path, a Dataset or a DataLoader; got a {type(source).__name__}."
    )


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


def _as_tensor(values: Any) -> Tensor:
    if isinstance(values, Tensor):
        return values.detach().cpu()
    if values.dtype.kind not in "fiub":
        raise TypeError(f"data must hold numbers; got an array of {values.dtype}.")
    if values.dtype.kind == "u" and values.dtype.itemsize > 1:
        values = values.astype(np.int64)
    return torch.from_numpy(np.ascontiguousarray(values))


def _check_rows(values: Tensor) -> None:
    if values.ndim < 2 or not math.prod(values.shape[1:]):
        raise ValueError(f"data must be [rows, *event]; got the shape {list(values.shape)}.")
    if len(values) < FEWEST:
        raise ValueError(f"data must have at least {FEWEST} rows; got {len(values)}.")
    if values.is_complex() or values.dtype == torch.bool:
        raise TypeError(f"data must hold real numbers; got {values.dtype}.")
    if values.is_floating_point():
        bad = (~values.isfinite()).flatten(1).any(1)
        if bad.any():
            raise ValueError(
                f"data must be finite; {int(bad.sum())} of {len(values)} rows are not, "
                f"the first of them row {int(bad.nonzero()[0])}."
            )


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


def _step(values: Tensor, wanted: bool | None) -> float:
    """The spacing of levels to spread values over; 0 where they are continuous."""
    spacing = _spacing(values)
    if spacing is None or (wanted is False and values.is_floating_point()):
        return 0.0
    if not wanted:
        raise ValueError(
            f"data holds levels {spacing:.4g} apart ({str(values.dtype).removeprefix('torch.')}), "
            "which have no density: say dequantise=True (--dequantise) to spread each over one "
            "step, or, if they are as good as continuous, turn them into floats and say "
            "dequantise=False (--no-dequantise)."
        )
    return spacing


def _spacing(values: Tensor) -> float | None:
    """The distance between levels, where the values are integers or few beside their number."""
    if not values.is_floating_point():
        return 1.0
    levels = values.flatten()[: 512 * LEVELS].unique()
    if 2 <= len(levels) <= LEVELS and 16 * len(levels) <= min(values.numel(), 512 * LEVELS):
        return float(levels.double().diff().min())
    return 1.0 if bool((values == values.round()).all()) else None


def _one_hot(labels: Any, rows: int) -> tuple[Tensor | None, tuple[str, ...]]:
    if labels is None:
        return None, ()
    if isinstance(labels, str) or not isinstance(labels, Sequence | Tensor | np.ndarray):
        raise TypeError(f"labels must be one class for each row; got {labels!r}.")
    listed = labels.tolist() if isinstance(labels, Tensor | np.ndarray) else list(labels)
    if len(listed) != rows:
        raise ValueError(f"labels must be one for each of {rows} rows; got {len(listed)}.")
    if any(
        isinstance(it, list) or (isinstance(it, float) and not it.is_integer()) for it in listed
    ):
        raise ValueError("labels must be classes, one whole number or word for each row.")
    listed = [int(it) if isinstance(it, float) else it for it in listed]
    classes = sorted(set(listed), key=lambda it: (isinstance(it, str), it))
    if len(classes) > math.sqrt(rows) * 4:
        raise ValueError(f"labels name {len(classes)} classes for {rows} rows; too many to learn.")
    place = {name: i for i, name in enumerate(classes)}
    index = torch.tensor([place[it] for it in listed])
    return torch.nn.functional.one_hot(index, len(classes)).float(), tuple(map(str, classes))

"""Axes of posterior draws by name: which of several variables are the same, and in which order."""

import itertools
import math
import re
from collections import Counter
from collections.abc import Hashable, Mapping

import xarray as xr
from torch import Tensor

AXES = ("chain", "draw")
_NUMBERED = re.compile(r"(.*_)?(dim|axis)_?\d+|\d+")  # what xarray and ArviZ call unnamed axes


def labels_along(array: xr.DataArray, axis: Hashable) -> list[str] | None:
    """Coordinate labels along an axis, no two of them alike; None where it is only numbered.

    >>> labels_along(xr.DataArray([1, 2, 3], dims="t", coords={"t": [0.5, 1.5, 1.5]}), "t")
    ['0.5', '1.5 (1)', '1.5 (2)']
    """
    if axis not in array.coords or array.coords[axis].dims != (axis,):
        return None
    values = array.coords[axis].values.tolist()
    if values == list(range(len(values))) or any(isinstance(x, tuple) for x in values):
        return None
    labels = [str(x) for x in values]
    if array.coords[axis].dtype.kind == "f":
        labels = _spell_floats(values)
    repeated = {label for label, count in Counter(labels).items() if count > 1}
    return [f"{x} ({i})" if x in repeated else x for i, x in enumerate(labels)]


def _spell_floats(values: list[float]) -> list[str]:
    """Floats with as few digits, at least six, as leave their distances right to a percent."""
    finite = [x for x in values if math.isfinite(x)]
    gap = min((b - a for a, b in itertools.pairwise(sorted({*finite}))), default=math.inf)
    for digits in range(6, 17):
        if all(abs(float(f"{x:.{digits}g}") - x) <= gap / 100 for x in finite):
            return [f"{x:.{digits}g}" for x in values]
    return [f"{x:.17g}" for x in values]  # which tells every two floats apart


def in_one_order(arrays: Mapping[str, xr.DataArray]) -> dict[str, xr.DataArray]:
    """The arrays, each axis in the order of labels that it has in the first array that has it.

    >>> first = xr.DataArray([1.0, 2.0], dims="school", coords={"school": ["a", "b"]})
    >>> other = first.isel(school=[1, 0])
    >>> in_one_order({"mu": first, "sigma": other})["sigma"].values
    array([1., 2.])
    """
    first: dict[Hashable, xr.DataArray] = {}
    ordered = {}
    for name, array in arrays.items():
        for axis in [axis for axis in array.dims if axis in array.indexes]:
            index = array.indexes[axis]
            model = first.setdefault(axis, array).indexes[axis]
            unique = index.is_unique and model.is_unique
            if len(index) != len(model) or index.equals(model) or not unique:
                continue
            places = index.get_indexer(model)  # -1 where there is no such label
            if (places >= 0).all():
                array = array.isel({axis: places})
        ordered[name] = array
    return ordered


def places_of_axes(
    arrays: Mapping[str, xr.DataArray], events: Mapping[str, int]
) -> dict[str, tuple[int, ...]]:
    """The places of the axes of variables among those of the batch, by the names of the axes.

    The batch has the axes of the variable with most of them. The axes of the others are its first
    ones, unless all their names are among its names; only variables of which the places are not
    the first are listed.

    Args:
        arrays: The variables.
        events: The number of axes, the last ones, that make one event, by variable.

    Raises:
        ValueError: Axes at the same place have different names, or different labels.

    >>> mu = xr.DataArray([[[[0.0] * 3] * 3]], dims=("chain", "draw", "group", "time"))
    >>> places_of_axes({"mu": mu, "sigma": mu[:, :, 0]}, {"mu": 0, "sigma": 0})
    {'sigma': (1,)}
    """
    own = {name: _batch_axes(arrays[name], events[name]) for name in events}
    widest = max(own, key=lambda name: len(own[name]), default="")
    places = {}
    for name, axes in own.items():
        whole = own[widest]
        if any(map(_is_named, axes)) and {*axes} < {*whole} and axes != whole[: len(axes)]:
            places[name] = tuple(map(whole.index, axes))
        for axis, place in zip(axes, places.get(name, range(len(axes))), strict=True):
            _refuse_unlike(arrays, (name, axis), (widest, whole[place]))
    return places


def _batch_axes(array: xr.DataArray, event: int) -> list[Hashable]:
    axes = [axis for axis in array.dims if axis not in AXES]
    return axes[: len(axes) - event]


def _is_named(axis: Hashable) -> bool:
    return not _NUMBERED.fullmatch(str(axis))


def _refuse_unlike(
    arrays: Mapping[str, xr.DataArray], one: tuple[str, Hashable], other: tuple[str, Hashable]
) -> None:
    """Refuse a pair of axes, each of a variable, whose names or labels show that they differ."""
    (name, axis), (widest, model) = one, other
    sizes = arrays[name].sizes[axis], arrays[widest].sizes[model]
    turned = axis != model and model in arrays[name].dims and axis in arrays[widest].dims
    if not turned and (sizes[0] != sizes[1] or 1 in sizes):
        return  # shared by all along the other axis, or refused for its size
    if axis != model and _is_named(axis) and _is_named(model):
        raise ValueError(
            f"{name} and {widest} must have the same axes in the same order, or all those of one "
            f"among those of the other; got {_spelled(arrays[name])} and "
            f"{_spelled(arrays[widest])}. Transpose one of them, or rename an axis (of xarray: "
            f"rename({{{str(axis)!r}: {str(model)!r}}})) if the two are the same."
        )
    labels = [arrays[key].indexes.get(ax) for key, ax in (one, other)]
    if axis != model or labels[0] is None or labels[1] is None or labels[0].equals(labels[1]):
        return
    unlike = next(x for x in zip(*labels, strict=True) if x[0] != x[1])
    raise ValueError(
        f"{name} and {widest} must have the same labels along {axis}; got {unlike[0]} and "
        f"{unlike[1]} at the same place."
    )


def _spelled(array: xr.DataArray) -> str:
    return f"({', '.join(str(axis) for axis in array.dims if axis not in AXES)})"


def insert_axes(x: Tensor, places: tuple[int, ...], batch: int, event: int) -> Tensor:
    """Batch axes [*lead, *own, *event] at their places among all of the batch, others of size 1.

    Args:
        x: Values with their own axes alone, or with all: these are returned as they are.
        places: The place of each own axis among those of the batch.
        batch: The number of axes before the event in the result, the axis of draws too.
        event: The number of axes of one event.
    """
    lead = x.ndim - event - len(places)  # 1 with the axis of draws
    if x.ndim - event == batch:
        return x
    order = sorted(range(len(places)), key=lambda i: places[i])
    x = x.movedim([lead + i for i in order], [lead + i for i in range(len(order))])
    for place in range(batch - lead):
        if place not in places:
            x = x.unsqueeze(lead + place)
    return x

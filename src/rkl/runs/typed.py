"""Settings to a record that ``run.json`` keeps, and back: every value of its declared type."""

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from rkl import checks

Settings = TypeVar("Settings")


def settings_from(
    settings: type[Settings], values: Mapping[str, Any], source: str | Path
) -> Settings:
    """Settings of a dataclass, read from a file.

    Args:
        settings: The dataclass.
        values: Values in the file, by name.
        source: The file, for the message of a refusal.

    Raises:
        ValueError: A name is unknown, a value is missing, or one has the wrong type.
    """
    kinds = typing.get_type_hints(settings)
    fields: Any = dataclasses.fields(settings)  # pyright: ignore[reportArgumentType]
    by_name = {it.name: it for it in fields}
    for name in values:
        if name not in by_name:
            raise ValueError(f"{source} sets {name!r}; settings are {', '.join(by_name)}.")
    for name, field in by_name.items():
        missing = field.default is field.default_factory is dataclasses.MISSING
        if name not in values and missing:
            raise ValueError(f"{source} lacks the setting {name!r}.")
    try:
        return settings(**{name: conform(name, kinds[name], it) for name, it in values.items()})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: {error}") from error


def record_of(settings: Any) -> dict[str, Any]:
    """The settings of a dataclass as ``run.json`` keeps them, which :func:`settings_from` reads.

    A path is kept whole, so that the run can be read from another working folder.

    >>> @dataclasses.dataclass
    ... class Read:
    ...     data: Path
    >>> record_of(Read(Path("/folder/../rows.npy")))
    {'data': '/rows.npy'}
    """
    record = dataclasses.asdict(settings)
    return {it: str(x.resolve()) if isinstance(x, Path) else x for it, x in record.items()}


def with_defaults(settings: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of an earlier rkl, with the defaults of newer settings.

    >>> @dataclasses.dataclass
    ... class Two:
    ...     needed: int
    ...     other: int = 3
    >>> with_defaults(Two, {"needed": 1})
    {'other': 3, 'needed': 1}
    """
    defaults = {}
    for field in dataclasses.fields(settings):  # pyright: ignore[reportArgumentType]
        if field.default is not dataclasses.MISSING:
            defaults[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            defaults[field.name] = field.default_factory()
    return defaults | {**values}


def conform(name: str, kind: Any, value: Any) -> Any:
    """Value converted to the type of its field, or an error with the expected type."""
    inner, optional = without_none(kind)
    if value is None and optional:
        return None
    if typing.get_origin(inner) is Literal:
        if value in typing.get_args(inner):
            return value
        expected = "one of " + ", ".join(map(str, typing.get_args(inner)))
        raise ValueError(f"{name} must be {expected}; got {value!r}.")
    if typing.get_origin(inner) is tuple:
        items = value if isinstance(value, list | tuple) else [value]
        if isinstance(value, Mapping):  # in YAML, {math: PATH} stands for math=PATH
            items = [f"{key}={item}" for key, item in value.items()]
        return tuple(conform(name, typing.get_args(inner)[0], item) for item in items)
    read = _READERS.get(inner)
    if read is None:
        return value
    try:
        converted = read(value)
    except (TypeError, ValueError, OverflowError):
        got = checks.short_repr(value)
        raise ValueError(f"{name} must be of type {inner.__name__}; got {got}.") from None
    _refuse_unusable(name, converted)
    return converted


def _refuse_unusable(name: str, value: Any) -> None:
    if isinstance(value, Path):
        checks.path(name, value)
    elif isinstance(value, str):
        checks.text(name, value)
    elif isinstance(value, int) and not isinstance(value, bool):
        checks.integer(name, value)
    elif isinstance(value, float) and math.isnan(value):
        raise ValueError(f"{name} must be a number; got {value}.")


def without_none(kind: Any) -> tuple[Any, bool]:
    """The type without None, and whether None is allowed."""
    if typing.get_origin(kind) not in (Union, types.UnionType):
        return kind, False
    others = [part for part in typing.get_args(kind) if part is not types.NoneType]
    return others[0], types.NoneType in typing.get_args(kind)


def _exactly(kind: type) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        if type(value) is not kind:
            raise TypeError
        return value

    return read


def _float(value: Any) -> float:
    if isinstance(value, bool):
        raise TypeError
    return float(value)  # from a string too: YAML takes 1e-4, without a dot, for one


_READERS: dict[Any, Callable[[Any], Any]] = {
    bool: _exactly(bool),
    int: _exactly(int),
    str: _exactly(str),
    float: _float,
    Path: Path,
}

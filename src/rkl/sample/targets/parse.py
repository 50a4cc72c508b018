"""Targets by their names: from a repr, in kebab case, or from a module of the user."""

from collections.abc import Callable
from types import BuiltinFunctionType
from typing import Any

from rkl import names
from rkl.importing import import_object
from rkl.names import full_name, read, with_module
from rkl.sample.targets import lattices, plane
from rkl.sample.targets.base import Condition, Density, Target

MODULES = lattices, plane  # whose targets the catalogue lists
PLACEHOLDER = "target_by_module"  # for "module:name" while its settings are read


def catalogue() -> dict[str, type[Target]]:
    """Every target by its command-line name; every subclass is listed.

    >>> [name for name in catalogue() if name.startswith("mo")]
    ['mog4', 'mog8']
    """
    return names.catalogue(Target, besides=[Density])


def parse_target(text: str) -> Target:
    """A target from its repr, or the same in kebab case, or ``module:Name`` with its settings.

    A plain function log_prob(x, condition) needs its shape, domain and conditions:
    "my_model:log_prob(event_shape=(16,), domain='circle', conditions={'T': (0.5, 2.0)})",
    or with a domain for each coordinate, domain=('line', 'positive', (0, 1), 'circle').

    Raises:
        ValueError: It cannot be read, or is no target.
        TypeError: It is not a string.

    >>> parse_target("xy(side=8)")
    XY(side=8, coupling=1.0, ring_exchange=0.0)
    """
    if not isinstance(text, str):
        raise TypeError(f"target must be a string such as 'xy(side=8)'; got {text!r}.")
    name = text.partition("(")[0].strip()
    targets: dict[str, Callable[..., Target]] = dict(catalogue())
    if ":" not in name or name in map(full_name, targets.values()):
        return read(text, targets)
    try:
        return read(PLACEHOLDER + text.strip()[len(name) :], {PLACEHOLDER: _maker(name)})
    except ValueError as error:
        raise ValueError(str(error).replace(PLACEHOLDER, name)) from error


def spelling(target: Target, text: str) -> str:
    """The text from which another process makes the same target: its repr with its module.

    >>> spelling(parse_target("mog4"), "mog4")
    'MoG4(radius=2.0)'
    """
    name, _, settings = text.partition("(")
    if isinstance(target, Density) or (":" in name and name.strip() != full_name(type(target))):
        return text.strip()  # a function, an instance, or a class by the name it is given by
    return with_module(target)


def _maker(name: str) -> Callable[..., Target]:
    """The function that makes a target: of a class of targets, a target, or a log-density."""
    try:
        value: Any = import_object(name)
    except ValueError as error:
        raise ValueError(f"target: {error}") from error
    if isinstance(value, Target):
        return lambda: value
    if isinstance(value, type) and issubclass(value, Target):
        return value
    if isinstance(value, type | BuiltinFunctionType) or not callable(value):
        raise ValueError(
            f"target {name} must be a Target, a class of them, or a function "
            f"log_prob(x, condition); got {value!r}."
        )

    function: Any = value

    def density(event_shape=None, domain: Any = "line", conditions: Any = ()):
        if event_shape is None:
            raise ValueError(
                f"target {name} is a function: say the shape of its x, as in "
                f"\"{name}(event_shape=(2,))\", for angles with domain='circle'."
            )
        return Density(function, event_shape, domain, _ranges(name, conditions), name)

    return density


def _ranges(name: str, conditions: Any) -> tuple[Condition, ...]:
    try:
        named = dict(conditions)
        return tuple(Condition(it, low, high) for it, (low, high) in named.items())
    except (TypeError, ValueError):
        raise ValueError(
            f"target {name}: conditions must map names to ranges, as in {{'T': (0.5, 2.0)}}; "
            f"got {conditions!r}."
        ) from None

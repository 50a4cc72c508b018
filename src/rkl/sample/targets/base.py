"""What a target is: an unnormalised density that depends on conditions, with its units."""

import abc
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import BuiltinFunctionType
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from rkl.checks import floats, number
from rkl.divergences.parse import full_name, parse, with_module
from rkl.importing import import_object
from rkl.sample.targets.domains import Chart, Domain, chart_of

PLACEHOLDER = "target_by_module"  # for "module:name" while its settings are read


class Condition(NamedTuple):
    """A parameter of a target: its name, the range it is meant for, its unit, and its limit.

    Attributes:
        name: Its name.
        low: Least value that a flow is trained at by default.
        high: Greatest value.
        unit: Its unit.
        above: What every value must lie above, where the target has no density otherwise.
        at_least: The same where the limit itself is allowed.
    """

    name: str
    low: float
    high: float
    unit: str = ""
    above: float | None = None
    at_least: float | None = None


class Target(abc.ABC):
    r"""An unnormalised density exp(log_prob(x, c)) for every value of its conditions c.

    To write one, make a frozen dataclass with

    - ``log_prob``, in nats and up to a function of c, from x [*batch, *event] and c [*batch,
      conditions];
    - ``event_shape``, ``conditions`` and ``domain``: "line", "circle", "positive" or (low, high),
      for all coordinates or a tuple with one for each;
    - ``observables`` and their ``units``, if something is to be measured; ``sample`` and
      ``log_normaliser``, if they are known.

    Then let :func:`rkl.sample.targets.check_target` judge it. The command line finds it by its
    name in kebab case, or as ``module:Name``.
    """

    domain: ClassVar[Domain] = "line"
    conditions: ClassVar[tuple[Condition, ...]] = ()
    units: ClassVar[Mapping[str, str]] = {}

    @property
    @abc.abstractmethod
    def event_shape(self) -> tuple[int, ...]:
        """The shape of one x."""

    @abc.abstractmethod
    def log_prob(
        self, x: Float[Tensor, "*batch event"], condition: Float[Tensor, "*batch conditions"]
    ) -> Float[Tensor, "*batch"]:
        """The log-density of x in nats, up to log Z(c); on the circle, per radian of each."""

    def observables(
        self, x: Float[Tensor, "*batch event"], condition: Float[Tensor, "*batch conditions"]
    ) -> dict[str, Float[Tensor, "*batch"]]:
        """What is measured of each x, by name; ``units`` says in which unit."""
        return {}

    def sample(
        self, condition: Float[Tensor, "*batch conditions"], shape: tuple[int, ...] = ()
    ) -> Float[Tensor, "*shape_and_batch event"]:
        """Exact independent draws, [*shape, *batch, *event], where they can be had.

        Raises:
            NotImplementedError: They cannot.
        """
        raise NotImplementedError(f"{self} has no exact sampler; run a Markov chain.")

    def log_normaliser(
        self, condition: Float[Tensor, "*batch conditions"]
    ) -> Float[Tensor, "*batch"]:
        """The log of Z(c), the integral of exp(log_prob), in nats, where it is known.

        Raises:
            NotImplementedError: It is not.
        """
        raise NotImplementedError(f"log Z of {self} is not known; estimate it.")

    @property
    def chart(self) -> Chart:
        """The map of its coordinates to others without bounds."""
        return chart_of(self.domain, self.event_shape)

    @property
    def limits(self) -> tuple[Condition, ...]:
        """The conditions, of which the first, where it is called T, must lie above 0."""
        return tuple(
            it._replace(above=0.0) if not k and it.name == "T" and it.above is None else it
            for k, it in enumerate(self.conditions)
        )

    def check(self, x: Tensor, condition: Tensor) -> None:
        """Refuse what does not have the shape of this target's x, or of its conditions."""
        floats("x", x)
        floats("condition", condition)
        if tuple(x.shape[x.ndim - len(self.event_shape) :]) != self.event_shape:
            shape = ", ".join(map(str, self.event_shape))
            raise ValueError(f"x must be [*batch, {shape}] for {self}; got {list(x.shape)}.")
        if condition.shape[-1:] != (len(self.conditions),):
            names = ", ".join(it.name for it in self.conditions) or "no conditions"
            raise ValueError(
                f"condition must be [*batch, {len(self.conditions)}], for {names} of {self}; "
                f"got {list(condition.shape)}."
            )


@dataclass(frozen=True, repr=False)
class Density(Target):
    """A target made of any function log_prob(x, condition): nats, up to log Z(c).

    Attributes:
        function: log_prob(x [*batch, *event], condition [*batch, conditions]) -> [*batch].
        event_shape: The shape of one x.
        domain: "line", "circle" for angles in radians, "positive", or an interval (low, high); of
            all coordinates, or a tuple with one for each. The density is that of x as it is: no
            Jacobian is to be added.
        conditions: Its conditions, with their ranges and units.
        name: How it is spelt on the command line, as "module:function".
    """

    function: Callable[[Tensor, Tensor], Tensor]
    event_shape: tuple[int, ...] = ()  # pyright: ignore[reportIncompatibleMethodOverride]
    domain: Domain = "line"  # pyright: ignore[reportIncompatibleVariableOverride]
    conditions: tuple[Condition, ...] = ()  # pyright: ignore[reportIncompatibleVariableOverride]
    name: str = ""

    def __post_init__(self):
        if not callable(self.function):
            raise TypeError(f"function must be one of x and condition; got {self.function!r}.")
        _check_shape(self.event_shape)
        chart = chart_of(self.domain, self.event_shape)
        if not chart.bounded:  # of one kind for all, where it is
            object.__setattr__(self, "domain", chart.unbounded)
        for it in self.conditions:
            for limit in (it.low, it.high):
                number(f"conditions[{it.name!r}]", limit)
            if it.low > it.high:
                raise ValueError(
                    f"conditions[{it.name!r}] must be a range from low to high; "
                    f"got {(it.low, it.high)}."
                )
        check_values(self, [[it.low for it in self.conditions]])

    def __repr__(self):
        ranges = {it.name: (it.low, it.high) for it in self.conditions}
        name = self.name or f"{self.function.__module__}:{self.function.__qualname__}"
        return (
            f"{name}(event_shape={self.event_shape}, domain={self.domain!r}, conditions={ranges})"
        )

    def log_prob(self, x, condition):
        self.check(x, condition)
        return self.function(x, condition)


def without_bounds(target: Target) -> Target:
    """The target in coordinates without bounds, with the Jacobian; itself where it has none."""
    chart = target.chart
    if not chart.bounded:
        return target

    def log_prob(z: Tensor, condition: Tensor) -> Tensor:
        x, log_slope = chart.to_bounded(z)
        return target.log_prob(x, condition) + log_slope

    return Density(log_prob, target.event_shape, chart.unbounded, target.limits, repr(target))


def check_values(target: Target, values: Tensor | Sequence[Sequence[float]]) -> None:
    """Refuse values of the conditions [*batch, conditions] at which a target has no density.

    Raises:
        ValueError: One is not finite, or beyond what its condition allows.
    """
    values = torch.as_tensor(values, dtype=torch.get_default_dtype())
    for k, it in enumerate(target.limits):
        column = values[..., k]
        wrong, expected = ~column.isfinite(), "finite"
        if it.above is not None:
            wrong, expected = wrong | (column <= it.above), f"above {it.above:g}"
        elif it.at_least is not None:
            wrong, expected = wrong | (column < it.at_least), f"at least {it.at_least:g}"
        if wrong.any():
            raise ValueError(
                f"condition: {it.name} must be {expected} for {target}; "
                f"got {float(column[wrong][0]):g}."
            )


def _check_shape(shape) -> None:
    whole = isinstance(shape, tuple) and all(type(n) is int and n > 0 for n in shape)
    if not (whole and shape):
        raise ValueError(f"event_shape must be a tuple of positive sizes; got {shape!r}.")


def catalogue() -> dict[str, type[Target]]:
    """Every target by its command-line name; a subclass is listed by existing.

    >>> [name for name in catalogue() if name.startswith("mo")]
    ['mog4', 'mog8']
    """

    def descendants(cls):
        return [it for child in cls.__subclasses__() for it in (child, *descendants(child))]

    named = {
        re.sub("(?<=[a-z])(?=[A-Z][a-z])", "-", cls.__name__).lower(): cls
        for cls in descendants(Target)
        if not inspect.isabstract(cls) and cls is not Density
    }
    return dict(sorted(named.items()))


def parse_target(text: str) -> Target:
    """A target from its repr, or the same in kebab case, or ``module:Name`` with its settings.

    A plain function log_prob(x, condition) is told its shape, domain and conditions:
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
    known: dict[str, Callable[..., Target]] = dict(catalogue())
    if ":" not in name or name in map(full_name, known.values()):
        return parse(text, known)
    try:
        return parse(PLACEHOLDER + text.strip()[len(name) :], {PLACEHOLDER: _maker(name)})
    except ValueError as error:
        raise ValueError(str(error).replace(PLACEHOLDER, name)) from error


def spelt(target: Target, text: str) -> str:
    """The text from which another process makes the same target: its repr with its module.

    >>> spelt(parse_target("mog4"), "mog4")
    'MoG4(radius=2.0)'
    """
    name, _, settings = text.partition("(")
    if isinstance(target, Density) or (":" in name and name.strip() != full_name(type(target))):
        return text.strip()  # a function, an instance, or a class by the name it is given by
    return with_module(target)


def _maker(name: str) -> Callable[..., Target]:
    """What makes a target of "module:name": a class of them, a target, or a log-density."""
    try:
        found: Any = import_object(name)
    except ValueError as error:
        raise ValueError(f"target: {error}") from error
    if isinstance(found, Target):
        return lambda: found
    if isinstance(found, type) and issubclass(found, Target):
        return found
    if isinstance(found, type | BuiltinFunctionType) or not callable(found):
        raise ValueError(
            f"target {name} must be a Target, a class of them, or a function "
            f"log_prob(x, condition); got {found!r}."
        )

    function: Any = found

    def density(event_shape=None, domain: Any = "line", conditions: Any = ()):
        if event_shape is None:
            raise ValueError(
                f"target {name} is a function: say the shape of its x, as in "
                f"\"{name}(event_shape=(2,))\", for angles with domain='circle'."
            )
        return Density(function, event_shape, domain, _ranges(name, conditions), name)

    return density


def _ranges(name: str, conditions: Any) -> tuple[Condition, ...]:
    """The conditions of a function, from {'T': (0.5, 2.0)}."""
    try:
        named = dict(conditions)
        return tuple(Condition(it, low, high) for it, (low, high) in named.items())
    except (TypeError, ValueError):
        raise ValueError(
            f"target {name}: conditions must map names to ranges, as in {{'T': (0.5, 2.0)}}; "
            f"got {conditions!r}."
        ) from None

"""Base class of unnormalised densities that depend on conditions, and its optional methods."""

import abc
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rkl.checks import floats, number
from rkl.flows.architectures import Architecture
from rkl.sample.targets.domains import Chart, Domain, chart_of

SAME_ENERGY = 1e-3  # relative difference of energies, as single precision may round them


class Condition(NamedTuple):
    """A parameter of a target: its name, its usual range, its unit, and its limit.

    Attributes:
        name: Its name.
        low: Least value that a flow is trained at by default.
        high: Greatest value.
        unit: Its unit.
        above: Lower limit of the values, excluded, if the target has no density otherwise.
        at_least: Lower limit of the values, included.
    """

    name: str
    low: float
    high: float
    unit: str = ""
    above: float | None = None
    at_least: float | None = None


@runtime_checkable
class Kernel(Protocol):
    """A move of a Markov chain that leaves a target invariant."""

    def move(self, target: Any, condition: Tensor, x: Tensor, sweeps: int) -> Tensor:
        r"""The states after some sweeps, from states x [\*batch, \\*event]."""
        ...


class Modes(NamedTuple):
    """The mode that each x belongs to.

    Attributes:
        labels: The number of the mode of each x.
        names: The name of each mode.
        centres: A point of each mode, where figures mark it; then the names are always the same.
    """

    labels: Int[Tensor, "*batch"]
    names: tuple[str, ...]
    centres: Float[Tensor, "modes *event"] | None = None


class Fluctuation(NamedTuple):
    """A response coefficient: the variance of an observable times a factor.

    Attributes:
        of: The name of the observable.
        factor: Factor of its variance, such as N/T² for a specific heat.
        unit: The unit of the product.
    """

    of: str
    factor: Float[Tensor, "*batch"]
    unit: str = ""


class Target(abc.ABC):
    r"""An unnormalised density exp(log_prob(x, c)) for every value of its conditions c.

    To write one, make a frozen dataclass with

    - ``log_prob``, in nats and up to a function of c, from x [*batch, *event] and c [*batch,
      conditions];
    - ``event_shape``, ``conditions`` and ``domain``: "line", "circle", "positive" or (low, high),
      for all coordinates or a tuple with one for each. A first condition called T is a
      temperature if log_prob = −E(x)/T;
    - ``observables`` and their ``units``, if something is to be measured.

    Every other method is optional. Give those that you know:

    - ``sample`` and ``log_normaliser``: exact draws, and log Z, for the reference;
    - ``kernel``: a move of Markov chains made for it, such as a heat bath, for the
      reference and for the particles of :func:`rkl.sample.evidence`;
    - ``architecture``: the default flow of ``rkl fit``;
    - ``modes``: the parts of the density that coverage names;
    - ``derived``: specific heats, susceptibilities and other variances of observables;
    - ``figure``: a figure of some draws for reports.

    Then test it by :func:`rkl.sample.check_target`. The command line finds it by its name in
    kebab case, or as ``module:Name``.
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
        """Observables of each x, by name; ``units`` has their units."""
        return {}

    def sample(
        self, condition: Float[Tensor, "*batch conditions"], shape: tuple[int, ...] = ()
    ) -> Float[Tensor, "*shape_and_batch event"]:
        """Exact independent draws, [*shape, *batch, *event], if there is a sampler.

        Raises:
            NotImplementedError: There is none.
        """
        raise NotImplementedError(f"{self} has no exact sampler; run a Markov chain.")

    def log_normaliser(
        self, condition: Float[Tensor, "*batch conditions"]
    ) -> Float[Tensor, "*batch"]:
        """The log of Z(c), the integral of exp(log_prob), in nats, if it is known.

        Raises:
            NotImplementedError: It is unknown.
        """
        raise NotImplementedError(f"log Z of {self} is not known; estimate it.")

    def kernel(self) -> Kernel | None:
        """A move of Markov chains made for this target; None takes a random walk.

        For angles at a temperature it must also be valid at any higher temperature.
        """
        return None

    def architecture(self) -> Architecture | None:
        """The architecture of a flow made for this target; None takes that of the domain."""
        return None

    def modes(
        self, x: Float[Tensor, "*batch event"], condition: Float[Tensor, "*batch conditions"]
    ) -> Modes | None:
        """The mode that each x belongs to; None where none are known."""
        return None

    def derived(self, condition: Float[Tensor, "*batch conditions"]) -> dict[str, Fluctuation]:
        """Response coefficients by name, each from the variance of an observable."""
        return {}

    def figure(
        self, states: Mapping[str, Float[Tensor, "*event"]]
    ) -> tuple[Any, str] | None:  # a figure of matplotlib
        """A figure of some x, by the text of their conditions, and its caption; None for none."""
        return None

    @property
    def chart(self) -> Chart:
        """The map of its coordinates to others without bounds."""
        return chart_of(self.domain, self.event_shape)

    @property
    def limits(self) -> tuple[Condition, ...]:
        """The conditions; a first one called T must lie above 0."""
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
            all coordinates, or a tuple with one for each. The density is that of x: do not add a
            Jacobian.
        conditions: Its conditions, with their ranges and units.
        name: Its name on the command line, "module:function".
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
            object.__setattr__(self, "domain", chart.unbounded_domain)
        for condition in self.conditions:
            for limit in (condition.low, condition.high):
                number(f"conditions[{condition.name!r}]", limit)
            if condition.low > condition.high:
                raise ValueError(
                    f"conditions[{condition.name!r}] must be a range from low to high; "
                    f"got {(condition.low, condition.high)}."
                )
        check_values(self, [[condition.low for condition in self.conditions]])

    def __repr__(self):
        ranges = {it.name: (it.low, it.high) for it in self.conditions}
        name = self.name or f"{self.function.__module__}:{self.function.__qualname__}"
        return (
            f"{name}(event_shape={self.event_shape}, domain={self.domain!r}, conditions={ranges})"
        )

    def log_prob(self, x, condition):
        self.check(x, condition)
        return self.function(x, condition)


def as_floats(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by name, with counts and truth values, as 0 and 1, in double precision."""

    def counts(it: Any) -> bool:
        return isinstance(it, Tensor) and not (it.is_floating_point() or it.is_complex())

    return {name: it.double() if counts(it) else it for name, it in values.items()}


def without_bounds(target: Target) -> Target:
    """The target in coordinates without bounds, with the Jacobian; itself where it has none."""
    chart = target.chart
    if not chart.bounded:
        return target

    def log_prob(z: Tensor, condition: Tensor) -> Tensor:
        x, log_slope = chart.to_bounded(z)
        return target.log_prob(x, condition) + log_slope

    return Density(
        log_prob, target.event_shape, chart.unbounded_domain, target.limits, repr(target)
    )


@torch.no_grad()
def has_temperature(target: Target) -> bool:
    """True if p = exp(−E/T): the first condition is called T, and T log p does not depend on it.

    A T that is, say, the variance of a normalised density is no temperature, and has no energy.
    """
    if not target.conditions or target.conditions[0].name != "T":
        return False
    scales = torch.tensor([1.0, 1e-4, 1e-8])  # x may be in any unit
    z = scales[:, None] * torch.linspace(0.1, 1.0, math.prod(target.event_shape))
    x = target.chart.to_bounded(z.reshape(-1, *target.event_shape))[0]
    condition = torch.tensor([[it.low for it in target.conditions]]).repeat(len(x), 1)
    high, energies = target.conditions[0].high, []
    for temperature in (high, 2 * high):
        condition[:, 0] = temperature
        try:
            energies.append(temperature * target.log_prob(x, condition).double())
        except Exception:  # that it cannot be evaluated is said where it is
            return True
    one, other = energies
    return not bool(((one - other).abs() > SAME_ENERGY * (high + one.abs())).any())


def exact_draws(
    target: Target, condition: Float[Tensor, "*batch conditions"], shape: tuple[int, ...]
) -> Float[Tensor, "*shape_and_batch event"] | None:
    """Exact independent draws; None without a sampler."""
    try:
        return target.sample(condition, shape)
    except NotImplementedError:
        return None


def exact_log_z(
    target: Target, condition: Float[Tensor, "*batch conditions"]
) -> Float[Tensor, "*batch"] | None:
    """Log Z in nats; None where it is not known."""
    try:
        return target.log_normaliser(condition)
    except NotImplementedError:
        return None


def check_condition(target: Any, condition: Tensor | None) -> Tensor:
    """The condition, of the length that the target expects; empty where it has none."""
    if not isinstance(target, Target):
        raise TypeError(f"target must be a Target such as XY(side=8); got {target!r}.")
    condition = torch.zeros(0) if condition is None else condition
    floats("condition", condition)
    expected = len(target.conditions)
    if condition.shape[-1:] != (expected,):
        names = ", ".join(it.name for it in target.conditions) or "none"
        raise ValueError(
            f"condition must be [*batch, {expected}] for {target} ({names}); "
            f"got {list(condition.shape)}."
        )
    check_values(target, condition)
    return condition


def check_values(target: Target, values: Tensor | Sequence[Sequence[float]]) -> None:
    """Refuse values of the conditions [*batch, conditions] at which a target has no density.

    Raises:
        ValueError: One is not finite, or beyond what its condition allows.
    """
    values = torch.as_tensor(values, dtype=torch.get_default_dtype())
    for k, limit in enumerate(target.limits):
        column = values[..., k]
        wrong, expected = ~column.isfinite(), "finite"
        if limit.above is not None:
            wrong, expected = wrong | (column <= limit.above), f"above {limit.above:g}"
        elif limit.at_least is not None:
            wrong, expected = wrong | (column < limit.at_least), f"at least {limit.at_least:g}"
        if wrong.any():
            raise ValueError(
                f"condition: {limit.name} must be {expected} for {target}; "
                f"got {float(column[wrong][0]):g}."
            )


def _check_shape(shape) -> None:
    whole = isinstance(shape, tuple) and all(type(n) is int and n > 0 for n in shape)
    if not (whole and shape):
        raise ValueError(f"event_shape must be a tuple of positive sizes; got {shape!r}.")

"""Exponential families, and all that follows from a log-partition alone."""

import abc
import dataclasses
import functools
import reprlib
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor
from torch.distributions import Distribution

from rkl.divergences.base import broadcast_shape
from rkl.names import concrete

Natural = tuple[Tensor, ...]  # components, [*batch, *event of the component] each
Fixed = float | Tensor  # held fixed by a family: one number, or one per distribution of the batch
SMALL_STEP = 1e-6  # a Newton step, relative to where it starts, that leaves the rounding only
STEPS, HALVINGS = 200, 200


class Terms(NamedTuple):
    """A draw P_θ beside a reference P_0, in the terms that both Bayes acts average."""

    natural: Natural
    mean: Natural
    from_reference: Tensor  # KL(P_0 ‖ P_θ) in nats, for the reverse-KL act
    to_reference: Tensor  # KL(P_θ ‖ P_0) in nats, for the forward-KL act


@dataclass(frozen=True, eq=False)
class ExponentialFamily(abc.ABC):
    r"""The distributions with density h(x) exp(⟨η, T(x)⟩ − A(η)) of one base measure h.

    From A follow the mean parameter m = E T(x) = ∇A, the divergence KL(P_p ‖ P_q) =
    A(q) − A(p) − ⟨q − p, ∇A(p)⟩, and both Bayes acts: the reverse-KL act has the posterior
    mean of η, the forward-KL act that of m.

    To write one, make a frozen dataclass (``eq=False``) with

    - ``distribution``, ``events``, ``names`` and ``mean_names``: its class of torch, the number of
      event axes of each component, and the names of the components;
    - ``natural`` and ``from_natural``, ``statistic`` and ``log_partition``: η of a distribution
      and the distribution of an η, T(x) and A(η); and ``inside`` where η does not range over
      everything;
    - whatever has a better form than what follows from A: ``mean``, ``from_mean``, ``kl``.

    What is fixed (a total count, a location, a design) is a field, read by ``of``.

    Source: Brown (1986), chapters 1 and 3; Brand (2017), arXiv 1707.06366.
    """

    distribution: ClassVar[type]  # of distribution
    events: ClassVar[tuple[int, ...]]
    names: ClassVar[tuple[str, ...]]
    mean_names: ClassVar[tuple[str, ...]]
    parameters: ClassVar[tuple[str, ...]]  # of the distribution, those that log_fisher refers to

    @classmethod
    def of(cls, distribution: Distribution, draws: bool = True) -> "ExponentialFamily | None":
        """The family of a distribution; None where something moves that the family holds fixed."""
        return cls()

    def about(self, distribution: Distribution) -> "ExponentialFamily":
        """The same family, its T(x) about a distribution, so that large locations keep digits."""
        return self

    @abc.abstractmethod
    def natural(self, distribution: Distribution) -> Natural:
        """η of a distribution, whichever of its parametrisations it was made with."""

    @abc.abstractmethod
    def from_natural(self, natural: Natural) -> Distribution:
        """The distribution of an η."""

    @abc.abstractmethod
    def statistic(self, x: Tensor) -> Natural:
        """T(x), the sufficient statistic."""

    @abc.abstractmethod
    def log_partition(self, natural: Natural) -> Tensor:
        """A(η) [*batch]."""

    def mean(self, natural: Natural) -> Natural:
        """Mean parameter, E T(x) = ∇A(η)."""
        with torch.enable_grad():
            leaves = tuple(component.detach().requires_grad_() for component in natural)
            return torch.autograd.grad(self.log_partition(leaves).sum(), leaves)

    def from_mean(self, mean: Natural) -> Natural:
        """η of an m: minimises A(η) − ⟨η, m⟩ by Newton's method in double precision.

        Raises:
            ValueError: No distribution of the family has this mean, or Newton's method found none.
        """
        target = tuple(component.double() for component in mean)
        self.check_mean(target)
        with torch.no_grad():
            natural = self._near(target)
        # The one step that has a graph: so the slope is (∇²A)⁻¹, however the others went.
        step = self.newton(natural, self.minus(target, self.mean(natural)))
        solution = (x + s for x, s in zip(natural, step, strict=True))
        return tuple(x.to(m.dtype) for x, m in zip(solution, mean, strict=True))

    def _near(self, target: Natural) -> Natural:
        """The solution, to the square of a small step."""
        natural = self.start(target)
        for _ in range(STEPS):
            gap = self.minus(target, self.mean(natural))
            step = self.newton(natural, gap)
            decrement = self.inner(gap, step)
            if not decrement.isfinite().all():
                break
            if self._small(natural, step, SMALL_STEP):
                # Could the rounding of the mean alone have moved it anywhere?
                rounding = tuple(x.abs() * torch.finfo(x.dtype).eps for x in target)
                if not self._small(natural, self.newton(natural, rounding), 0.1):
                    break
                return self.along(natural, step, torch.ones_like(decrement))
            natural = self.along(natural, step, self._length(natural, target, step, decrement))
        raise ValueError(
            f"mean has no natural parameter that Newton's method could find in {STEPS} steps; "
            f"is it on the edge of the means of a {self.distribution.__name__}?"
        )

    def start(self, mean: Natural) -> Natural:
        """The start of ``from_mean``, inside the domain."""
        return tuple(torch.zeros_like(component) for component in mean)

    def newton(self, natural: Natural, gap: Natural) -> Natural:
        """The Newton step, (∇²A)⁻¹ times the gap between the means wanted and had."""
        flat = self.flatten(gap)
        return self.unflatten(torch.linalg.solve(self.hessian(natural), flat), gap)

    def hessian(self, natural: Natural) -> Tensor:
        """∇²A [*batch, n, n] in the flattened components: the Fisher information of η."""
        with torch.enable_grad():
            leaf = self.flatten(natural).detach().requires_grad_()
            mean = functools.partial(_differentiable_mean, self)
            return jacobian(self.flatten(mean(self.unflatten(leaf, natural))), leaf)

    def _small(self, natural: Natural, step: Natural, share: float) -> bool:
        """True if each step is small beside where it starts; a small decrement would not show it.

        Towards the edge of the means the decrement vanishes while the steps never end.
        """
        size, change = self.flatten(natural).abs(), self.flatten(step).abs()
        least = share / 1000 * size.amax(-1, keepdim=True) + share / 1e6
        return bool((change <= share * size + least).all())

    def _length(self, natural, target, step, decrement):
        """Halve until the step stays inside and does not pass the minimum by far."""
        length = torch.ones_like(decrement)
        for _ in range(HALVINGS):
            trial = self.along(natural, step, length)
            slope = self.inner(self.minus(target, self.mean(trial)), step)
            good = self.contains(trial) & (slope >= -decrement / 2)
            if good.all():
                break
            length = torch.where(good, length, length / 2)
        return length

    def kl(self, p: Natural, q: Natural) -> Tensor:
        """KL(P_p ‖ P_q) in nats [*batch]."""
        return (
            self.log_partition(q)
            - self.log_partition(p)
            - self.inner(self.minus(q, p), self.mean(p))
        )

    def terms(self, distribution: Distribution, reference: Natural) -> "Terms":
        """The terms that one pass over draws averages, with shared intermediate results."""
        natural = self.natural(distribution)
        to, fro = self.kl(natural, reference), self.kl(reference, natural)
        return Terms(natural, self.mean(natural), from_reference=fro, to_reference=to)

    def log_fisher(self, distribution: Distribution) -> Tensor | None:
        """Log determinant of the Fisher information of ``parameters`` [*batch]."""
        leaves = [getattr(distribution, name).detach() for name in self.parameters]
        axes = tuple(distribution.arg_constraints[name].event_dim for name in self.parameters)
        leaf = _flat(tuple(leaves), axes).requires_grad_()
        with torch.enable_grad():
            parameters = dict(
                zip(self.parameters, _unflat(leaf, tuple(leaves), axes), strict=True)
            )
            natural = self.natural(self.distribution(**parameters, validate_args=False))
            slope = jacobian(self.flatten(natural), leaf)
        return self.hessian(natural).slogdet()[1] + 2 * slope.slogdet()[1]

    def inside(self, natural: Natural) -> tuple[Bool[Tensor, "..."], ...]:
        """Per component, a mask [*batch] of where A is finite."""
        return tuple(all_of(x.isfinite(), n) for x, n in zip(natural, self.events, strict=True))

    def mean_inside(self, mean: Natural) -> tuple[Bool[Tensor, "..."], ...]:
        """Per component, a mask [*batch] of the means of distributions of the family."""
        return tuple(all_of(x.isfinite(), n) for x, n in zip(mean, self.events, strict=True))

    def contains(self, natural: Natural) -> Bool[Tensor, "..."]:
        """Mask [*batch] of the η that are natural parameters of a distribution."""
        return functools.reduce(torch.logical_and, self.inside(natural))

    def check(self, natural: Natural) -> None:
        """Refuse η outside the domain, naming the component.

        Raises:
            ValueError: Some component is infinite, or where A is.
        """
        if not self.contains(natural).all():
            self._refuse("natural", self.names, natural, self.inside(natural))

    def check_mean(self, mean: Natural) -> None:
        """Refuse m that is the mean of no distribution, naming the component.

        Raises:
            ValueError: Some component is infinite, or on the edge of the means or beyond.
        """
        self._refuse("mean", self.mean_names, mean, self.mean_inside(mean))

    def _refuse(self, which, names, values, inside):
        for name, value, good in zip(names, values, inside, strict=True):
            if not good.all():
                worst = value[~good.expand(value.shape[: good.ndim])][0].tolist()
                raise ValueError(
                    f"{which} must be the {which} parameter of a {self.distribution.__name__}, "
                    f"but its component {name} is {reprlib.repr(worst)} "
                    f"in {int((~good).sum())} of {good.numel()}: "
                    "on the edge of the family, as at a probability of 0 or 1, or beyond it."
                )

    def inner(self, a: Natural, b: Natural) -> Tensor:
        """⟨a, b⟩ [*batch]."""
        parts = (sum_of(x * y, n) for x, y, n in zip(a, b, self.events, strict=True))
        return functools.reduce(torch.add, parts)

    def minus(self, a: Natural, b: Natural) -> Natural:
        """Difference of a and b, component by component."""
        return tuple(x - y for x, y in zip(a, b, strict=True))

    def along(self, natural: Natural, step: Natural, length: Tensor) -> Natural:
        """η + length · step, with one length per distribution."""
        return tuple(
            x + spread(length, n) * s for x, s, n in zip(natural, step, self.events, strict=True)
        )

    def flatten(self, components: Natural) -> Tensor:
        """The components side by side, [*batch, n]."""
        return _flat(components, self.events)

    def unflatten(self, flat: Tensor, like: Natural) -> Natural:
        """The components again, shaped as ``like``."""
        return _unflat(flat, like, self.events)

    def __eq__(self, other):
        mine = dataclasses.fields(self)
        return type(other) is type(self) and all(
            _same(getattr(self, field.name), getattr(other, field.name)) for field in mine
        )

    def __hash__(self):
        return hash(type(self))


def families() -> dict[type, type[ExponentialFamily]]:
    """Every family by its distribution: the subclasses of the base class."""
    by_distribution: dict[type, type[ExponentialFamily]] = {}
    for kind in concrete(ExponentialFamily):
        by_distribution.setdefault(kind.distribution, kind)
    return by_distribution


def family_of(distribution: Distribution, draws: bool = True) -> ExponentialFamily | None:
    """The exponential family of a distribution of torch; None where rkl has none.

    Args:
        distribution: Its first batch axis, if ``draws``, holds draws of the parameters.
        draws: True if numbers that a family holds fixed must be the same along that axis. Along
            the others, as between groups, they may differ.

    Raises:
        TypeError: It is no distribution.
        ValueError: Its support moves from draw to draw.

    >>> family_of(torch.distributions.Binomial(10, probs=torch.tensor([0.1, 0.2])))
    BinomialFamily(total_count=10.0)
    """
    if not isinstance(distribution, Distribution):
        raise TypeError(
            f"distribution must be a distribution of torch; got a {type(distribution).__name__}."
        )
    kind = families().get(type(distribution))
    return None if kind is None else kind.of(distribution, draws)


def fixed_value(value: Tensor, draws: bool) -> Fixed | None:
    """The fixed value: one number, or one per distribution; None where it moves."""
    first = value.flatten()[0]
    if (value == first).all():
        return float(first)
    if not draws:
        return value
    return value[0] if value.ndim > 1 and (value == value[:1]).all() else None


def jacobian(outputs: Tensor, leaf: Tensor) -> Tensor:
    """Slopes [*batch, outputs, n] of outputs [*batch, m] in a leaf [*batch, n]."""
    rows = [
        torch.autograd.grad(column.sum(), leaf, create_graph=True, materialize_grads=True)[0]
        for column in outputs.unbind(-1)
    ]
    return torch.stack(rows, -2).detach()


def sum_of(x: Tensor, axes: int) -> Tensor:
    """Sum over the last axes, none included."""
    return x.sum(tuple(range(-axes, 0))) if axes else x


def spread(x: Tensor, axes: int) -> Tensor:
    """The same with axes of length 1 at its end."""
    return x[(..., *[None] * axes)]


def all_of(x: Tensor, axes: int) -> Tensor:
    """True where all hold over the last axes, none included."""
    return x.all(tuple(range(-axes, 0))) if axes else x  # type: ignore[arg-type]


def _differentiable_mean(family: ExponentialFamily, natural: Natural) -> Natural:
    """∇A(η) with its graph, from A itself."""
    return torch.autograd.grad(
        family.log_partition(natural).sum(), natural, create_graph=True, materialize_grads=True
    )


def _flat(components: Natural, axes: tuple[int, ...]) -> Tensor:
    batch = broadcast_shape(
        *(x.shape[: x.ndim - n] for x, n in zip(components, axes, strict=True))
    )
    return torch.cat(
        [
            x.expand((*batch, *x.shape[x.ndim - n :])).reshape(*batch, -1)
            for x, n in zip(components, axes, strict=True)
        ],
        -1,
    )


def _unflat(flat: Tensor, like: Natural, axes: tuple[int, ...]) -> Natural:
    shapes = [x.shape[x.ndim - n :] for x, n in zip(like, axes, strict=True)]
    parts = flat.split([shape.numel() for shape in shapes], -1)
    return tuple(
        part.reshape((*flat.shape[:-1], *shape)) for part, shape in zip(parts, shapes, strict=True)
    )


def _same(a, b) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    return type(a) is type(b) and a == b

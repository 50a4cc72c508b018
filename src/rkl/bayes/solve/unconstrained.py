"""Unconstrained coordinates of named parameters, and minimisation over them."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Distribution, Independent, constraints
from torch.distributions.constraints import Constraint
from torch.distributions.transforms import (
    CorrCholeskyTransform,
    ExpTransform,
    LowerCholeskyTransform,
    PositiveDefiniteTransform,
    SigmoidTransform,
    Transform,
    identity_transform,
)

from rkl.bayes.model import LawOf
from rkl.randomness import random_numbers

SLACK = 1e-6  # by which draws rounded to single precision may miss a sum, or a symmetry


@dataclass(frozen=True)
class Part:
    """One parameter: its shape, its map from coordinates, and their centre and spread."""

    shape: torch.Size
    free: torch.Size  # shape of its coordinates
    transform: Any  # a Transform, whose calls torch leaves without types
    centre: float
    spread: float
    margin: float = 0.0  # how far from the edge of its domain draws are put that lie on it

    def free_of(self, values: Tensor) -> Tensor:
        """The coordinates of values, before centre and spread."""
        return self.transform.inv(_off_edge(values, self.transform, self.margin))


@dataclass(frozen=True)
class Chart:
    r"""Coordinates t [k] of named parameters: θ = transform(centre + spread · t) for each.

    A minimiser over θ does not depend on the chart, which only decides what is within reach
    and how fast it is reached. Each parameter has one centre and one spread for all of its
    elements: permuting the labels of a mixture permutes the coordinates and changes nothing else.
    """

    parts: Mapping[str, Part]
    fixed: Mapping[str, Tensor] = field(default_factory=dict)  # [*shape] each, without coordinates

    @property
    def size(self) -> int:
        """The number k of coordinates."""
        return sum(part.free.numel() for part in self.parts.values())

    def point(self, coordinates: Float[Tensor, "*lead k"]) -> dict[str, Tensor]:
        """The parameters at these coordinates, [*lead, *shape] each."""
        pieces = coordinates.split([part.free.numel() for part in self.parts.values()], -1)
        values = {
            name: part.transform(
                part.centre + part.spread * piece.reshape(*piece.shape[:-1], *part.free)
            )
            for (name, part), piece in zip(self.parts.items(), pieces, strict=True)
        }
        lead = coordinates.shape[:-1]
        return values | {name: x.expand(*lead, *x.shape) for name, x in self.fixed.items()}

    def coordinates(self, values: Mapping[str, Tensor]) -> Float[Tensor, "*lead k"]:
        """The coordinates of parameters [*lead, *shape]."""
        pieces = []
        for name, part in self.parts.items():
            lead = values[name].shape[: values[name].ndim - len(part.shape)]
            free = (part.free_of(values[name]) - part.centre) / part.spread
            pieces.append(free.reshape(*lead, -1))
        return torch.cat(pieces, -1)


def chart_of(
    values: Mapping[str, Tensor],
    law: LawOf | None = None,
    transforms: Mapping[str, Transform] | None = None,
    posterior: bool = False,
) -> Chart:
    r"""The chart for parameters, of which draws are at hand.

    Simplices, triangular, correlation and positive definite matrices are told by their draws,
    unless they are a parameter of the distributions that need not be such: rates that sum to 1
    are a rate each, and a correlation matrix is one of all covariance matrices. Any other
    parameter takes the widest of the line, the half-line and the unit interval in which ``law``
    still makes a distribution; without a distribution, the line or the half-line, whichever holds
    its draws.

    Args:
        values: Draws by name, [draws, *shape] each, in double precision.
        law: The map from draws to distributions, asked what it accepts.
        transforms: Maps from coordinates to parameters, by name, in place of those found here.
        posterior: True if the draws alone tell simplices and matrices, as for a density of the
            parameters, which has no meaning elsewhere.

    Raises:
        ValueError: A parameter is a whole number, or its draws are not finite or on the edge.

    >>> chart_of({"scale": torch.tensor([1.0, 2.0, 4.0])}).parts["scale"].transform
    ExpTransform()
    """
    parts, own = {}, {} if law is None or posterior else _own_constraints(values, law)
    for name, drawn in values.items():
        if not drawn.is_floating_point():
            raise ValueError(
                f"{name} must hold real numbers for an act to be found by optimisation; "
                f"got {drawn.dtype}."
            )
        given = (transforms or {}).get(name)
        transform: Any = given or _transform(name, values, law, own.get(name))
        margin = 0.0 if given else _margin(drawn, transform)
        free = transform.inv(_off_edge(drawn, transform, margin))
        if not free.isfinite().all():
            raise ValueError(f"{name} must lie inside its domain; some draw is on its edge.")
        # Coordinates of a simplex turn when its classes are permuted, about 0.
        centre = 0 * free.mean() if isinstance(transform, LogRatioTransform) else free.mean()
        spread = (free - centre).square().mean().sqrt().item() or 1.0
        shapes = drawn.shape[1:], free.shape[1:]
        parts[name] = Part(*shapes, transform, centre.item(), spread, margin)
    return Chart(parts)


def scale_of(drawn: Float[Tensor, "draws k"]) -> Float[Tensor, " k"]:
    """The standard deviation of each coordinate, the unit of a minimiser; 1 where it is 0."""
    scale = drawn.std(0, correction=0)
    return torch.where(scale > 0, scale, 1.0)


def _margin(drawn: Tensor, transform: Any) -> float:
    """A tenth of the least distance from the edge, where some draws lie on it; else 0."""
    if isinstance(transform, ExpTransform | LogRatioTransform):
        distance = drawn
    elif isinstance(transform, SigmoidTransform):
        distance = torch.minimum(drawn, 1 - drawn)
    else:
        return 0.0
    if bool((distance > 0).all()):
        return 0.0
    inside = distance[distance > 0]
    return min(1e-2, inside.min().item() / 10) if inside.numel() else 1e-2


def _off_edge(values: Tensor, transform: Any, margin: float) -> Tensor:
    if not margin:
        return values
    if isinstance(transform, SigmoidTransform):
        return values.clamp(margin, 1 - margin)
    values = values.clamp_min(margin)
    if isinstance(transform, LogRatioTransform):
        return values / values.sum(-1, keepdim=True)
    return values


def _own_constraints(values: Mapping[str, Tensor], law: LawOf) -> dict[str, Constraint]:
    """The constraints of the variables that are, as they are, a parameter of the distributions."""
    few = {name: x[:8] for name, x in values.items()}
    try:
        made = law(few)
    except (ValueError, RuntimeError):
        return {}
    while isinstance(made, Independent):
        made = made.base_dist
    given = {key: vars(made).get(key) for key in _arg_constraints(made)}
    return {
        name: _arg_constraints(made)[key]
        for name, x in few.items()
        for key, value in given.items()
        if isinstance(value, Tensor) and value.dtype == x.dtype and torch.equal(value, x)
    }


def _arg_constraints(law: Distribution) -> Mapping[str, Constraint]:
    """Constraints of the parameters of a distribution that do not depend on one another."""
    try:
        every = law.arg_constraints
    except NotImplementedError:  # nothing is said of them
        return {}
    return {key: c for key, c in every.items() if not constraints.is_dependent(c)}


def _transform(
    name: str, values: Mapping[str, Tensor], law: LawOf | None, own: Constraint | None
) -> Any:
    drawn = values[name]
    square = drawn.ndim > 2 and drawn.shape[-1] == drawn.shape[-2] > 1
    square = square and (own is None or own.event_dim == 2)
    if square and (matrix := _matrix(drawn, correlations=own is None)):
        return matrix
    half = (drawn >= 0).all() & (drawn > 0).any()
    vector = drawn.ndim > 1 < drawn.shape[-1] and (own is None or own is constraints.simplex)
    if half and vector and ((drawn.sum(-1) - 1).abs() < SLACK).all():
        return LogRatioTransform(drawn.shape[-1])
    scalars: list[tuple[bool, Transform, Tensor]] = [
        (True, identity_transform, -1 - drawn.abs()),
        (bool(half), ExpTransform(), 1 + drawn.abs()),
        (bool(half & (drawn <= 1).all()), SigmoidTransform(), drawn),
    ]
    for holds, transform, probe in scalars if law else scalars[bool(half) :]:
        if holds and (law is None or _accepts(law, values, name, probe)):
            return transform
    return scalars[0][1]  # the distribution will say where it ends


def _matrix(drawn: Tensor, correlations: bool) -> Transform | None:
    diagonal = drawn.diagonal(dim1=-2, dim2=-1)
    if not (diagonal > 0).all():
        return None
    if not drawn.triu(1).any():
        unit = correlations and ((drawn.square().sum(-1) - 1).abs() < SLACK).all()
        return CorrCholeskyTransform() if unit else LowerCholeskyTransform()
    scale = drawn.abs().amax((-2, -1), keepdim=True)
    if ((drawn - drawn.mT).abs() > SLACK * scale).any():
        return None
    if (torch.linalg.cholesky_ex(drawn).info > 0).any():
        return None
    unit = correlations and ((diagonal - 1).abs() < SLACK).all()
    return CorrelationTransform() if unit else PositiveDefiniteTransform()


def _accepts(law: LawOf, values: Mapping[str, Tensor], name: str, probe: Tensor) -> bool:
    """True if a family makes distributions of these values, with densities where there is mass."""
    subsample = {key: x[:8] for key, x in values.items()}
    try:
        made = law(subsample | {name: probe[:8]})
        with random_numbers():
            points = law(subsample).sample()
        return _is_valid(made) and not made.log_prob(points).isnan().any()
    except (ValueError, RuntimeError):
        return False


def _is_valid(law: Distribution) -> bool:
    inner = ("base_dist", "mixture_distribution", "component_distribution")
    parts = [getattr(law, key) for key in inner if hasattr(law, key)]
    if parts:
        return all(map(_is_valid, parts))
    checks = (c.check(getattr(law, key)) for key, c in _arg_constraints(law).items())
    return all(bool(check.all()) for check in checks)


class LogRatioTransform(Transform):
    r"""Softmax of coordinates along an orthonormal basis of the vectors that sum to 0.

    Permuting the classes turns the coordinates by an orthogonal matrix, so that a minimiser
    which does not see rotations does not see labels. Source: Egozcue et al. (2003), eq. (18).
    """

    domain = constraints.real_vector
    codomain = constraints.simplex
    bijective = True

    def __init__(self, classes: int):
        super().__init__()
        full = torch.eye(classes, dtype=torch.float64) - 1 / classes
        self.basis = torch.linalg.svd(full).U[:, : classes - 1]

    def __eq__(self, other):
        return isinstance(other, LogRatioTransform) and self.basis.shape == other.basis.shape

    def _call(self, x):
        return (x @ self.basis.T).softmax(-1)

    def _inverse(self, y):
        return y.log() @ self.basis


class CorrelationTransform(Transform):
    """A correlation matrix by the coordinates of its Cholesky factor."""

    domain = constraints.real_vector
    codomain = constraints.positive_definite
    bijective = True
    factor: Any = CorrCholeskyTransform()

    def _call(self, x):
        lower = self.factor(x)
        return lower @ lower.mT

    def _inverse(self, y):
        return self.factor.inv(torch.linalg.cholesky(y))


Loss = Callable[[Tensor], Tensor]
Map = Callable[[Tensor], Tensor]
NEWTON = 600  # coordinates up to which the Hessian is formed
MEMORY, STEPS, TRIALS = 50, 500, 40  # of the quasi-Newton method, and of one line search
FLAT = 1e-12  # share of the largest curvature below which a direction is flat
WIDE, NARROW = 0.1, 1e-6  # steps, in units of scale, for the curvature and the edges of kinks


@dataclass(frozen=True)
class Minimum:
    """The minimum of a loss, with a bound on its excess over the true minimum."""

    point: Float[Tensor, " k"]
    value: float
    gradient: Float[Tensor, " k"]
    inverse: Map  # H⁻¹ times vectors [..., k]; 0 along directions in which the loss is flat
    decrement: float  # g H⁻¹ g / 2: the estimated excess of value over the minimum
    converged: bool
    agreeing: int  # starts that ended at this value


def minimise(
    loss: Loss,
    starts: Float[Tensor, "starts k"],
    *,
    scale: Float[Tensor, " k"] | None = None,
    tolerance: float = 1e-10,
    smooth: bool = True,
) -> Minimum:
    r"""The least of the minima that are reached from several starts.

    Newton's method where it works at once, else limited-memory BFGS with a line search that
    needs no smoothness, and then Newton's method until its decrement falls no more. The decrement
    g H⁻¹ g / 2 estimates by how much the value exceeds that of the minimum: it is the stopping
    rule, and what is returned. A loss may be infinite, or raise ValueError, where it is not
    defined.

    Source: Nocedal and Wright (2006), algorithm 7.5; Lewis and Overton (2013) for kinks; Boyd
    and Vandenberghe (2004), section 9.5.1 for the decrement.

    Args:
        loss: Twice differentiable by autograd almost everywhere; k coordinates in, a scalar out.
        starts: Where to start; the loss must be finite at one of them.
        scale: How far apart points are that differ: the unit of finite differences.
        tolerance: Decrement below which the minimum counts as reached, in units of the loss.
        smooth: Whether second derivatives say how the loss curves. Where they do not, as with
            many small kinks, differences of gradients over ``scale`` / 10 do.

    Raises:
        ValueError: The loss is finite at none of the starts.

    >>> bowl = minimise(lambda t: (t - 3.0).square().sum(), torch.zeros(1, 2).double())
    >>> bowl.point.round(decimals=6), bowl.decrement < 1e-12, bowl.converged
    (tensor([3., 3.], dtype=torch.float64), True, True)
    """
    starts = starts.double()
    scale = torch.ones_like(starts[0]) if scale is None else scale
    search = _Search(loss, scale, tolerance, smooth)
    descend = search.descend if len(scale) <= NEWTON else search.descend_far
    minima = [descend(start) for start in starts if math.isfinite(search.evaluate(start)[0])]
    if not minima:
        raise ValueError(f"the loss must be finite at one start; it is at none of {len(starts)}.")
    best = min(minima, key=lambda minimum: minimum.value)
    alike = 1e-9 if smooth else 1e-6  # many small kinks are as many small minima
    near = max(tolerance, alike * max(1.0, abs(best.value)))
    agreeing = sum(minimum.value - best.value <= near for minimum in minima)
    return Minimum(**{**vars(best), "agreeing": agreeing})


@dataclass(frozen=True)
class _State:
    """A point, with the shape of the loss around it."""

    point: Tensor
    value: float
    gradient: Tensor
    inverse: Map
    metric: Map  # the same, with a floor under the curvature
    decrement: float
    downhill: Tensor | None  # a direction of negative curvature


@dataclass(frozen=True)
class _Search:
    loss: Loss
    scale: Tensor
    tolerance: float
    smooth: bool

    def descend(self, start: Tensor) -> Minimum:
        """Newton, BFGS and Newton again; away from saddles, if need be."""
        state = self._newton(self._state(start))
        for _ in range(3):
            if state.decrement > self.tolerance:
                # Newton's method does the rest, if it can
                enough = 1e-7 if self.smooth else self.tolerance
                point, _ = self._quasi_newton(state.point, state.metric, enough)
                state = self._newton(self._state(point))
            if state.downhill is None:
                break
            sides = [self._state(state.point + s * state.downhill) for s in (0.3, -0.3)]
            state = min(sides, key=lambda side: side.value)
        done = state.decrement <= self.tolerance and state.downhill is None
        return Minimum(
            state.point, state.value, state.gradient, state.inverse, state.decrement, done, 1
        )

    def descend_far(self, start: Tensor) -> Minimum:
        """BFGS alone, in more dimensions than a Hessian is formed in."""
        start_metric = self.scale.square()
        point, inverse = self._quasi_newton(start, lambda g: start_metric * g, self.tolerance)
        value, gradient, _ = self.evaluate(point)
        decrement = float(gradient @ inverse(gradient)) / 2
        done = decrement <= self.tolerance
        return Minimum(point, value, gradient, inverse, decrement, done, 1)

    def evaluate(self, point: Tensor, hessian: bool = False) -> tuple[float, Tensor, Tensor]:
        """The loss, its gradient and, if asked, its Hessian; infinite where it is not defined."""
        leaf, rows = point.detach().requires_grad_(), [point]
        nowhere = math.inf, torch.zeros_like(point), torch.eye(len(point), dtype=point.dtype)
        try:
            with torch.enable_grad():
                value = self.loss(leaf)
                (gradient,) = torch.autograd.grad(value, leaf, create_graph=hessian)
                gradient = gradient + 0 * leaf  # for a linear loss has a constant one
                if not (value.isfinite() and gradient.isfinite().all()):
                    return nowhere
                for slope in gradient if hessian else ():
                    again = torch.autograd.grad(
                        slope, leaf, retain_graph=True, materialize_grads=True
                    )
                    rows.append(again[0])
        except (ValueError, torch.linalg.LinAlgError):  # pyright: ignore[reportPrivateImportUsage]
            return nowhere
        square = torch.stack(rows[1:]) if hessian else nowhere[2]
        return value.item(), gradient.detach(), (square + square.T) / 2

    def _quasi_newton(self, point: Tensor, metric: Map, enough: float) -> tuple[Tensor, Map]:
        pairs: list[tuple[Tensor, Tensor, Tensor]] = []

        def inverse(gradient):  # the two-loop recursion
            history = []
            for s, y, rho in reversed(pairs):
                history.append(rho * (gradient @ s))
                gradient = gradient - history[-1][..., None] * y
            direction = metric(gradient)
            for s, y, rho in pairs:
                direction = direction + (history.pop() - rho * (direction @ y))[..., None] * s
            return direction

        value, gradient, _ = self.evaluate(point)
        idle = 0
        for _ in range(STEPS):
            direction = -inverse(gradient)
            if -float(gradient @ direction) / 2 <= enough * 1e-3 or idle == 3:
                break
            step = self._line_search(point, value, gradient, direction)
            if step is None:
                break
            idle = idle + 1 if value - step[1] < enough / 10 else 0
            s, y = step[0] - point, step[2] - gradient
            point, value, gradient = step
            if s @ y > 0:
                pairs.append((s, y, 1 / (s @ y)))
                del pairs[:-MEMORY]
        return point, inverse

    def _line_search(self, point, value, gradient, direction):
        """A step that satisfies the weak Wolfe conditions, by bisection; None if none does."""
        slope = float(gradient @ direction)
        low, high, length, best = 0.0, math.inf, 1.0, None
        for _ in range(TRIALS):
            trial = point + length * direction
            new, new_gradient, _ = self.evaluate(trial)
            if not new < value + 1e-4 * length * slope:
                high = length
            else:
                best = trial, new, new_gradient
                if float(new_gradient @ direction) >= 0.9 * slope:
                    return best
                low = length
            length = (low + high) / 2 if high < math.inf else 2 * low
        return best

    def _newton(self, state: _State) -> _State:
        """Full steps, judged by the decrement: near the minimum values carry only rounding."""
        slack = 1e-9 * max(1.0, abs(state.value))
        for _ in range(20 if self.smooth else 0):
            trial = self._state(state.point - state.inverse(state.gradient))
            if not (trial.decrement < state.decrement / 2 and trial.value <= state.value + slack):
                break
            state = trial
        return state

    def _state(self, point: Tensor) -> _State:
        value, gradient, hessian = self.evaluate(point, hessian=self.smooth)
        edge = 0.0
        if not self.smooth:
            hessian, gradient, edge = self._differences(point, gradient)
        curvature, axes = torch.linalg.eigh(self.scale[:, None] * hessian * self.scale)
        axes = self.scale[:, None] * axes
        size, top = curvature.abs(), float(curvature.abs().max())
        curved = size > FLAT * top

        def inverse(vectors):
            return ((vectors @ axes) * torch.where(curved, 1 / size, 0.0)) @ axes.T

        def metric(vectors):
            return ((vectors @ axes) / size.clamp_min(1e-6 * top or 1.0)) @ axes.T

        # A slope along a direction without curvature: the loss falls for ever.
        falls = (gradient @ axes)[~curved].abs() > 1e-6 * max(top, 1e-6)
        lost = bool(falls.any()) or not math.isfinite(value)
        decrement = math.inf if lost else float(gradient @ inverse(gradient)) / 2 + edge
        down = axes[:, 0] if curvature[0] < -1e-8 * top else None
        return _State(point, value, gradient, inverse, metric, decrement, down)

    def _differences(self, point, gradient):
        """The curvature from gradients, the least of the slopes around, and what that hides.

        Where the slopes to both sides differ in sign, the minimum along that axis lies between.
        """
        columns, slopes = [], []
        for step, slope in zip(self.scale.diag(), gradient, strict=True):
            wide = [self.evaluate(point + s * WIDE * step)[1] for s in (1, -1)]
            near = [self.evaluate(point + s * NARROW * step)[1] for s in (1, -1)]
            columns.append((wide[0] - wide[1]) / (2 * WIDE * step.sum()))
            sides = torch.stack([slope, *(x[step != 0][0] for x in near)])
            between = sides.sign().sum().abs() < 3
            slopes.append(torch.where(between, 0.0, sides.abs().min() * slope.sign()))
        hessian, slope = torch.stack(columns, -1), torch.stack(slopes)
        narrow = NARROW * self.scale * (slope == 0)
        edge = float((hessian.diagonal().abs() * narrow.square()).sum()) / 2
        return (hessian + hessian.T) / 2, slope, edge

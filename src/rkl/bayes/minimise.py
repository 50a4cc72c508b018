"""Minimisation in double precision that says how near to the minimum it came."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch._C import _LinAlgError as LinAlgError

Loss = Callable[[Tensor], Tensor]
NEWTON = 150  # coordinates up to which the Hessian is formed
MEMORY, STEPS, TRIALS = 50, 500, 60  # of the quasi-Newton method, and of one line search
FLAT = 1e-12  # share of the largest curvature below which a direction is flat
WIDE, NARROW = 0.1, 1e-4  # steps, in units of scale, for the curvature and the edges of kinks


@dataclass(frozen=True)
class Minimum:
    """Where a loss is least, and how far above the minimum it may still be."""

    point: Float[Tensor, " k"]
    value: float
    gradient: Float[Tensor, " k"]
    hessian: Float[Tensor, "k k"] | None  # None beyond NEWTON coordinates
    inverse: Callable[[Tensor], Tensor]  # the inverse Hessian times [..., k], flat directions 0
    decrement: float  # g H⁻¹ g / 2: the estimated excess of value over the minimum
    converged: bool
    agreeing: int  # starts that ended at this value


@dataclass(frozen=True)
class _State:
    point: Tensor
    value: float
    gradient: Tensor
    hessian: Tensor
    step: Tensor  # H⁻¹ g, along |H| where it curves downwards
    decrement: float
    inverse: Callable[[Tensor], Tensor]
    metric: Callable[[Tensor], Tensor]  # the same, with a floor under the curvature
    downhill: Tensor | None  # a direction of negative curvature


def minimise(
    loss: Loss,
    starts: Float[Tensor, "starts k"],
    *,
    scale: Float[Tensor, " k"] | None = None,
    tolerance: float = 1e-10,
    smooth: bool = True,
) -> Minimum:
    r"""The least of the minima that are reached from several starts.

    Limited-memory BFGS with a line search that needs no smoothness, from the metric of the
    Hessian where that is formed; then Newton's method, until its decrement falls no more. The
    decrement g H⁻¹ g / 2 estimates by how much the value exceeds that of the minimum: it is the
    stopping rule, and what is returned. A loss may be infinite, or raise ValueError, where it is
    not defined.

    Source: Nocedal and Wright (2006), algorithm 7.5; Lewis and Overton (2013) for kinks; Boyd
    and Vandenberghe (2004), section 9.5.1 for the decrement.

    Args:
        loss: Twice differentiable by autograd almost everywhere; k coordinates in, a scalar out.
        starts: Where to start; the loss must be finite at one of them.
        scale: Lengths over which the loss changes by about one curvature, for finite differences.
        tolerance: Decrement below which the minimum counts as reached, in units of the loss.
        smooth: Whether second derivatives say how the loss curves. Where they do not, as with
            many small kinks, differences of gradients over ``scale`` / 10 do.

    Raises:
        ValueError: The loss is finite at none of the starts.

    >>> bowl = minimise(lambda t: (t - 3.0).square().sum(), torch.zeros(1, 2).double())
    >>> bowl.point, bowl.decrement, bowl.converged
    (tensor([3., 3.], dtype=torch.float64), 0.0, True)
    """
    starts = starts.double()
    scale = torch.ones_like(starts[0]) if scale is None else scale
    found = [_descend(loss, start, scale, tolerance, smooth) for start in starts]
    reached = [minimum for minimum in found if minimum is not None]
    if not reached:
        raise ValueError(f"the loss must be finite at one start; it is at none of {len(starts)}.")
    best = min(reached, key=lambda minimum: minimum.value)
    near = max(tolerance, 1e-9 * max(1.0, abs(best.value)))
    agreeing = sum(minimum.value - best.value <= near for minimum in reached)
    return Minimum(**{**vars(best), "agreeing": agreeing})


def _descend(loss, start, scale, tolerance, smooth) -> Minimum | None:
    value, gradient = evaluate(loss, start)
    if not math.isfinite(value):
        return None
    if len(start) > NEWTON:
        point, inverse = _quasi_newton(loss, start, lambda g: scale.square() * g, tolerance)
        value, gradient = evaluate(loss, point)
        decrement = float(gradient @ inverse(gradient)) / 2
        done = decrement <= tolerance
        return Minimum(point, value, gradient, None, inverse, decrement, done, 1)
    state = _state(loss, start, scale, smooth)
    for _ in range(3):
        point, _ = _quasi_newton(loss, state.point, state.metric, tolerance)
        state = _state(loss, point, scale, smooth)
        state = _newton(loss, state, scale, smooth) if smooth else state
        if state.downhill is None:
            break
        sides = [
            _state(loss, state.point + s * state.downhill, scale, smooth) for s in (0.3, -0.3)
        ]
        state = min(sides, key=lambda side: side.value)
    done = state.decrement <= tolerance and state.downhill is None
    return Minimum(
        state.point, state.value, state.gradient, state.hessian, state.inverse,
        state.decrement, done, 1,
    )  # fmt: skip


def evaluate(loss: Loss, point: Tensor) -> tuple[float, Tensor]:
    """The loss and its gradient; infinite where it is not defined."""
    leaf = point.detach().requires_grad_()
    try:
        with torch.enable_grad():
            value = loss(leaf)
            (gradient,) = torch.autograd.grad(value, leaf)
    except (ValueError, LinAlgError):
        return math.inf, torch.zeros_like(point)
    if not (value.isfinite() and gradient.isfinite().all()):
        return math.inf, torch.zeros_like(point)
    return value.item(), gradient


def _quasi_newton(loss, point, metric, tolerance):
    """The point where limited-memory BFGS stops, and its inverse Hessian."""
    pairs: list[tuple[Tensor, Tensor, Tensor]] = []

    def inverse(gradient):  # the two-loop recursion
        kept = []
        for s, y, rho in reversed(pairs):
            kept.append(rho * (gradient @ s))
            gradient = gradient - kept[-1][..., None] * y
        direction = metric(gradient)
        for s, y, rho in pairs:
            direction = direction + (kept.pop() - rho * (direction @ y))[..., None] * s
        return direction

    value, gradient = evaluate(loss, point)
    for _ in range(STEPS):
        direction = -inverse(gradient)
        if -float(gradient @ direction) / 2 <= tolerance * 1e-3:
            break
        found = _line_search(loss, point, value, gradient, direction)
        if found is None:
            break
        s, y = found[0] - point, found[2] - gradient
        point, value, gradient = found
        if s @ y > 0:
            pairs.append((s, y, 1 / (s @ y)))
            del pairs[:-MEMORY]
    return point, inverse


def _line_search(loss, point, value, gradient, direction):
    """A step that satisfies the weak Wolfe conditions, by bisection; None where none is found."""
    slope = float(gradient @ direction)
    low, high, length = 0.0, math.inf, 1.0
    best = None
    for _ in range(TRIALS):
        trial = point + length * direction
        new, new_gradient = evaluate(loss, trial)
        if not new < value + 1e-4 * length * slope:
            high = length
        else:
            best = trial, new, new_gradient
            if float(new_gradient @ direction) >= 0.9 * slope:
                return best
            low = length
        length = (low + high) / 2 if high < math.inf else 2 * low
    return best


def _newton(loss, state: _State, scale, smooth) -> _State:
    """Newton's method: full steps, judged by the decrement, for values no longer tell."""
    for _ in range(20):
        trial = _state(loss, state.point - state.step, scale, smooth)
        slack = 1e-9 * max(1.0, abs(state.value))
        if not (trial.decrement < state.decrement / 2 and trial.value <= state.value + slack):
            break
        state = trial
    return state


def _state(loss, point, scale, smooth) -> _State:
    value, gradient = evaluate(loss, point)
    if not math.isfinite(value):
        nowhere = torch.zeros(len(point), len(point), dtype=point.dtype)
        return _State(
            point, value, gradient, nowhere, gradient, math.inf, torch.clone, torch.clone, None
        )
    if smooth:
        hessian = _hessian(loss, point)
    else:
        hessian, gradient = _differences(loss, point, scale, gradient)
    curvature, axes = torch.linalg.eigh(scale[:, None] * hessian * scale)
    axes = scale[:, None] * axes
    size, top = curvature.abs(), float(curvature.abs().max())
    curved = size > FLAT * top
    slopes = gradient @ axes

    def inverse(vectors):
        return ((vectors @ axes) * torch.where(curved, 1 / size, 0.0)) @ axes.T

    def metric(vectors):
        return ((vectors @ axes) / size.clamp_min(1e-6 * top or 1.0)) @ axes.T

    down = axes[:, 0] if curvature[0] < -1e-8 * top else None
    runs_off = bool((slopes[~curved].abs() > 1e-6 * max(top, 1e-6)).any())
    decrement = math.inf if runs_off else float(gradient @ inverse(gradient)) / 2
    step = inverse(gradient)
    return _State(point, value, gradient, hessian, step, decrement, inverse, metric, down)


def _hessian(loss, point) -> Tensor:
    leaf = point.detach().requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
        rows = [
            torch.autograd.grad(g, leaf, retain_graph=True, materialize_grads=True)[0]
            for g in gradient
        ]
    hessian = torch.stack(rows)
    return (hessian + hessian.T) / 2


def _differences(loss, point, scale, gradient):
    """The curvature from gradients, and of all slopes between both sides' the least, by axis."""
    columns, slopes = [], []
    for i, length in enumerate(scale.tolist()):
        step = torch.zeros_like(point)
        step[i] = length
        wide = [evaluate(loss, point + s * WIDE * step)[1] for s in (1, -1)]
        near = [evaluate(loss, point + s * NARROW * step)[1][i] for s in (1, -1)]
        columns.append((wide[0] - wide[1]) / (2 * WIDE * length))
        sides = torch.stack([*near, gradient[i]])
        slopes.append(sides.abs().min() * (sides.sign().sum().abs() == 3) * sides[0].sign())
    hessian = torch.stack(columns, -1)
    return (hessian + hessian.T) / 2, torch.stack(slopes)

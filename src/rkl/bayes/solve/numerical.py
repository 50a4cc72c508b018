"""The Bayes act by optimisation, for any family and any divergence that its support allows."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Distribution, Independent, MixtureSameFamily

from rkl.bayes.diagnostics import MIN_SWAPPED, label_exchange
from rkl.bayes.loss.between import AnyLoss, Intrinsic
from rkl.bayes.loss.expected import (
    KINKED,
    NodeLoss,
    PosteriorLoss,
    posterior_loss,
    slopes,
    thin_loss,
)
from rkl.bayes.loss.nodes import MAX_DEFECT, MAX_MISSING, Nodes
from rkl.bayes.model import LawOf, Laws, laws_of, whole_parameters
from rkl.bayes.problem import Problem
from rkl.bayes.solve.unconstrained import Chart, Minimum, chart_of, minimise, scale_of
from rkl.randomness import random_numbers

PRICE = 1e4  # nats times the square of the mass that lies between the nodes
START_LOG_DENSITIES = 2**16  # for the several starts, of a loss that needs every draw
MINIMISED_LOG_DENSITIES = 2**18  # over which it is minimised, before all draws
NEWTON, MAX_DECREMENT = 8, 1e-18  # steps over all draws, and the decrement in nats that ends them
MAX_TAIL_SHARE = 1e-3  # share of the expected loss that tails without mass may have
CANDIDATES, STARTS = 32, 4  # draws that are evaluated, and the best of them that are starts
LawAt = Callable[[Tensor], Distribution]


@dataclass(frozen=True)
class Accuracy:
    """The method of a numerical act, and its distance to the act of these draws."""

    method: str  # closed form, enumeration, quadrature, importance
    nodes: int  # 0 with a closed form
    defect: float  # by which the total of some distribution on the nodes misses 1
    decrement: float  # nats: estimated excess of the expected loss, from stopping
    node_excess: float  # nats: estimated excess, from the nodes
    risk_error: float  # nats: of the risk, from the nodes
    converged: bool
    starts: int
    agreeing: int  # starts that ended at the same expected loss
    draws: int  # that were minimised over; the losses are of all of them


@dataclass(frozen=True)
class NumericalAct:
    """The act, its distribution and its losses, with what a Monte Carlo error of it needs."""

    theta: dict[str, Tensor]
    law: Distribution  # of batch shape [1, *batch]
    losses: Float[Tensor, " draws"]  # nats
    risk: float
    influence: dict[str, Tensor]  # [draws, *shape]: by how much a draw of weight 1 moves the act
    accuracy: Accuracy
    whole: tuple[str, ...] = ()  # parameters that are whole numbers, and have no influences


def numerical_act(
    theta: Mapping[str, Tensor],
    law: LawOf,
    divergence: AnyLoss,
    *,
    weights: Float[Tensor, " draws"] | None = None,
    nodes: Nodes | None = None,
    seed: int = 0,
) -> NumericalAct:
    r"""The parameters t that minimise E D(P_θ ‖ P_t) over posterior draws θ.

    The expectation is over the draws as they are, and D a closed form or a sum over nodes that
    are fixed once: a deterministic function, minimised from the best of the draws. The act's
    Monte Carlo error is that of the mean of its influences, −H⁻¹ ∇loss for each draw.

    Args:
        theta: Draws by name, [draws, *shape] each.
        law: From parameters [n, *shape] to n distributions, of batch shape [n, *batch]. Of a batch
            the losses are added up; of Independent parts the divergence is taken jointly.
        divergence: The loss. What is no f-divergence needs a finite support, except Intrinsic.
        weights: Of the draws; equal by default.
        nodes: Where to integrate; by default a closed form, or :func:`nodes_for`.
        seed: Of its random numbers.

    Raises:
        ValueError: The draws or the weights are malformed, or the divergence has no meaning or no
            finite value between these distributions.
        TypeError: ``divergence`` is no divergence.

    >>> from rkl.divergences import ReverseKL
    >>> scale = torch.tensor([1.0, 2.0, 4.0]).double()
    >>> law = lambda t: torch.distributions.Normal(0.0, t["scale"])
    >>> act = numerical_act({"scale": scale}, law, ReverseKL())
    >>> act.theta["scale"], scale.pow(-2).mean().rsqrt()
    (tensor(1.5119, dtype=torch.float64), tensor(1.5119, dtype=torch.float64))
    """
    laws = laws_of(theta, law, weights)
    loss = posterior_loss(laws, divergence, nodes=nodes, seed=seed)
    return find_act(loss, law)


def find_act(
    loss: PosteriorLoss,
    law: LawOf,
) -> NumericalAct:
    """The act under a loss whose nodes are chosen."""
    laws = loss.laws
    if names := whole_parameters(laws):
        return _whole_act(loss, law, names)
    chart = chart_of(laws.theta, law)
    drawn = chart.coordinates(laws.theta)
    scale = scale_of(drawn)
    thinned = thin_loss(loss, MINIMISED_LOG_DENSITIES if loss.smooth else KINKED)
    minimum, tried = _minimum(loss, thinned, chart, drawn, scale)
    return _act(law, loss, thinned, chart, minimum, tried)


def _whole_act(loss, law, names) -> NumericalAct:
    """The act where some parameters are whole numbers: the best of these, then of the others."""
    laws = loss.laws
    chart, free = chart_without(laws, names)
    drawn = chart.coordinates(free) if free else torch.zeros(len(laws), 0, dtype=torch.float64)
    scale = scale_of(drawn)
    thinned = thin_loss(loss, MINIMISED_LOG_DENSITIES)
    quick = thin_loss(thinned, START_LOG_DENSITIES)

    def function(at: Chart):
        return lambda t: _penalised_risk(quick, _law(quick, at, t))

    def whole(row: int) -> dict[str, Tensor]:
        return {name: laws.theta[name][row] for name in names}

    rows = laws.spread(CANDIDATES).tolist()
    with torch.no_grad():
        values = torch.stack(
            [
                _finite_or_inf(function(dataclasses.replace(chart, fixed=whole(i))), drawn[i])
                for i in rows
            ]
        )
    best = rows[int(values.argmin())]
    chart = search(laws, names, chart, whole(best), drawn[best], function, scale, loss.smooth)
    if free:
        minimum, tried = _minimum(loss, thinned, chart, drawn, scale)
    else:
        minimum, tried = minimum_of(function(chart), drawn[:1], scale, loss.smooth), 1
    return dataclasses.replace(_act(law, loss, thinned, chart, minimum, tried), whole=names)


def _minimum(loss, thinned, chart, drawn, scale) -> tuple[Minimum, int]:
    """Minimise from the best of many draws on a subsample, then on the larger one."""
    quick = thin_loss(thinned, START_LOG_DENSITIES)

    def function(of):
        return lambda t: _penalised_risk(of, _law(of, chart, t))

    # The extremes too: some divergences are finite only at the widest distribution.
    outer = [drawn[:, :CANDIDATES].argmax(0), drawn[:, :CANDIDATES].argmin(0)]
    rows = torch.cat([loss.laws.spread(CANDIDATES), *outer]).unique()
    candidates = torch.cat([drawn[rows], drawn.mean(0, keepdim=True)])
    with torch.no_grad():
        values = torch.stack([_finite_or_inf(function(quick), t) for t in candidates])
    if not values.isfinite().any():
        raise ValueError(
            "divergence must be finite, on average over the draws, at some distribution; it is "
            f"infinite at each of {len(candidates)} that were tried."
        )
    order = values.argsort()[: min(STARTS, int(values.isfinite().sum()))]
    best = candidates[order]
    minimum = minimise(function(quick), best, scale=scale, smooth=loss.smooth)
    if quick is thinned:
        return minimum, len(best)
    again = minimise(function(thinned), minimum.point[None], scale=scale, smooth=loss.smooth)
    return dataclasses.replace(again, agreeing=minimum.agreeing), len(best)


def _penalised_risk(loss: PosteriorLoss, law: Distribution) -> Tensor:
    """The risk, and a price on mass between the nodes, where the loss is not known."""
    risk = loss.risk(law)
    if loss.nodes is None or loss.nodes.kind == "enumeration":
        return risk
    # more than an act may lack: what ends here is refused
    free = MAX_MISSING if loss.nodes.kind == "importance" else 2 * MAX_DEFECT
    missing = torch.relu(1 - free - loss.nodes.log_mass(law).exp().sum(-1))
    return risk + PRICE * missing.square().sum()


def _finite_or_inf(function, point) -> Tensor:
    try:
        return function(point).nan_to_num(math.inf, math.inf)
    except ValueError:
        return torch.tensor(math.inf, dtype=torch.float64)


def _law(loss: PosteriorLoss, chart: Chart, coordinates: Tensor) -> Distribution:
    point = chart.point(coordinates[None])
    if not all(x.isfinite().all() for x in point.values()):
        raise ValueError("coordinates must give finite parameters; they overflowed.")
    return loss.laws.of(point)


def _act(law, loss, thinned, chart, minimum: Minimum, starts: int) -> NumericalAct:
    refined = refine_on_all(
        loss, functools.partial(_law, loss, chart), minimum, thinned is not loss
    )
    point, losses = refined.point, refined.losses
    theta, by_name = influences(
        lambda t: {name: x[0] for name, x in chart.point(t[None]).items()}, refined, minimum
    )
    defect = _defect(loss, _law(loss, chart, point))
    excess, risk_error = _node_error(loss, chart, point, minimum.inverse, losses)
    nodes = loss.nodes
    accuracy = Accuracy(
        method=nodes.kind if nodes else "closed form",
        nodes=len(nodes) if nodes else 0,
        defect=defect,
        decrement=refined.decrement,
        node_excess=excess,
        risk_error=risk_error,
        converged=minimum.converged,
        starts=starts,
        agreeing=minimum.agreeing,
        draws=len(thinned.laws),
    )
    own_law = law({name: x[None] for name, x in theta.items()})
    return NumericalAct(
        theta, own_law, losses, float(loss.laws.weights @ losses), by_name, accuracy
    )


class OnAll(NamedTuple):
    """A minimum over all draws: where, and the loss of each draw there with its slopes."""

    point: Tensor
    losses: Float[Tensor, " draws"]
    by_draw: Float[Tensor, "draws k"]
    decrement: float


def refine_on_all(loss: PosteriorLoss, law: LawAt, minimum: Minimum, again: bool) -> OnAll:
    """The minimum; ``again``, of few draws, with Newton's method over all and their curvature."""
    weights = loss.laws.weights

    def at(point: Tensor, decrement: float | None = None) -> OnAll:
        leaf = point.detach().requires_grad_()
        with torch.enable_grad():
            losses, slope = loss.by_draw(law(leaf), leaf if len(leaf) else None)
        if decrement is None:
            decrement = _decrement(minimum.inverse, weights @ slope)
        return OnAll(point, losses, slope, decrement)

    if not again:
        return at(minimum.point, minimum.decrement)
    best = at(minimum.point)
    for _ in range(NEWTON):
        if best.decrement < MAX_DECREMENT:
            break
        trial = at(best.point - minimum.inverse(weights @ best.by_draw))
        if not trial.decrement < best.decrement:
            break
        best = trial
    return best


def influences(
    values: Callable[[Tensor], dict[str, Tensor]], refined: OnAll, minimum: Minimum
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Values [*shape] at a minimum, and by how much a draw of weight 1 moves them."""
    leaf = refined.point.detach().requires_grad_()
    with torch.enable_grad():
        here = values(leaf)
        moves = {
            name: slopes(x.flatten(), leaf)
            if x.requires_grad
            else leaf.new_zeros(x.numel(), len(leaf))
            for name, x in here.items()
        }
    steps = -minimum.inverse(refined.by_draw)
    moved = {k: (steps @ moves[k].T).reshape(-1, *x.shape) for k, x in here.items()}
    return {name: x.detach() for name, x in here.items()}, moved


def _decrement(inverse, slope: Tensor) -> float:
    return float(slope @ inverse(slope)) / 2


def _defect(loss: PosteriorLoss, law: Distribution) -> float:
    """The distance from 1 of the total of a draw's distribution, or of the act's."""
    if loss.nodes is None:
        return 0.0
    mass = loss.nodes.log_mass(law).exp()
    missing = (mass.sum(-1) - 1).abs().max().item()
    sampled = loss.nodes.kind == "importance"
    # 0.01, and three standard errors of what is sampled
    if sampled and missing > MAX_MISSING / 10 + 3 * mass.square().sum(-1).sqrt().max():
        raise ValueError(
            f"the distributions of the draws lie too far apart for a sample of "
            f"{len(loss.nodes):,} nodes: {missing:.2g} of the mass of the act lies between these."
        )
    if missing > MAX_DEFECT and not sampled:
        raise ValueError(
            f"nodes must reach as far as the act; {missing:.2g} of its mass is not on them, "
            "beyond what the distributions of the draws have theirs on."
        )
    return max(missing, loss.nodes.defect)


def _node_error(loss, chart, point, inverse, losses) -> tuple[float, float]:
    """The estimated excess from the nodes, and the error of the risk, in nats."""
    if not isinstance(loss, NodeLoss) or loss.nodes.kind == "enumeration":
        return 0.0, 0.0

    def by_node(of):
        leaf = point.detach().requires_grad_()
        with torch.enable_grad():
            return of.by_node(_law(of, chart, leaf), leaf)

    if loss.nodes.coarse is None:  # independent nodes
        values, slope = by_node(loss)
        spread = slope - slope.mean(0)
        excess = float((inverse(spread) * spread).sum()) / 2
        return excess, (values - values.mean()).square().sum().sqrt().item()
    _refuse_infinite(loss, _law(loss, chart, point), losses)
    subsample = loss.laws.thin(max(64, MINIMISED_LOG_DENSITIES // loss.nodes.log_weight.numel()))
    subsample = dataclasses.replace(loss, laws=subsample)
    values, slope = by_node(subsample)
    poorer = by_node(dataclasses.replace(subsample, nodes=loss.nodes.coarse))
    off = poorer[1].sum(0) - slope.sum(0)
    return _decrement(inverse, off), (poorer[0].sum() - values.sum()).abs().item()


def _refuse_infinite(loss: NodeLoss, law: Distribution, losses: Tensor) -> None:
    """Refuse a divergence whose terms lie in tails without mass: its integral is infinite."""
    if isinstance(loss.divergence, Intrinsic) or loss.divergence.bounded or loss.nodes.far is None:
        return
    weights = loss.laws.weights
    worst = (weights * losses).topk(min(64, len(losses))).indices
    values, _ = dataclasses.replace(loss, laws=loss.laws.only(worst)).by_node(law)
    if values[loss.nodes.far].sum() > MAX_TAIL_SHARE * (weights @ losses):
        raise ValueError(
            f"divergence {loss.divergence} must be finite between the distributions of the draws; "
            "between some it is infinite, or as good as, for it lies in tails that hold no mass."
        )


MAX_SWEEPS = 8  # over all whole numbers, until none changes
Function = Callable[[Chart], Callable[[Tensor], Tensor]]


def chart_without(laws: Laws, names: tuple[str, ...]) -> tuple[Chart, dict[str, Tensor]]:
    """The chart of all other parameters, and their draws."""
    free = {name: x for name, x in laws.theta.items() if name not in names}

    def law(theta: Mapping[str, Tensor]) -> Distribution:
        rows = len(next(iter(theta.values())))
        return laws.law({**theta, **{name: laws.theta[name][:rows] for name in names}})

    return chart_of(free, law), free


def search(
    laws: Laws, names: tuple[str, ...], chart: Chart, start: Mapping[str, Tensor], at: Tensor,
    function: Function, scale: Tensor, smooth: bool,
) -> Chart:  # fmt: skip
    """The chart with the whole numbers of least loss, the other parameters minimised over.

    One number at a time is moved, by steps that double while the loss falls.

    Args:
        laws: Of the draws, between whose extremes the numbers lie.
        names: Of the whole parameters.
        chart: Of the others.
        start: The whole numbers to start from, [*shape] each.
        at: The coordinates of the others to start from.
        function: From a chart with whole numbers to the loss as a function of coordinates.
        scale: Of the coordinates.
        smooth: Whether the loss is.
    """
    solved: dict[tuple[int, ...], Minimum] = {}
    shapes = {name: laws.theta[name].shape[1:] for name in names}
    flat = torch.cat([laws.theta[name].reshape(len(laws), -1) for name in names], -1)
    low, high = flat.amin(0), flat.amax(0)

    def chart_at(numbers: Tensor) -> Chart:
        pieces = numbers.split([shape.numel() for shape in shapes.values()])
        pairs = zip(shapes.items(), pieces, strict=True)
        return replace(chart, fixed={name: x.reshape(shape) for (name, shape), x in pairs})

    def solve(numbers: Tensor, coordinates: Tensor) -> Minimum:
        key = tuple(int(x) for x in numbers.tolist())
        if key not in solved:
            of = function(chart_at(numbers))
            solved[key] = minimum_of(of, coordinates[None], scale, smooth)
        return solved[key]

    numbers = torch.cat([start[name].reshape(-1) for name in names]).double()
    minimum = solve(numbers, at)
    for _ in range(MAX_SWEEPS):
        before = numbers
        for place in range(len(numbers)):
            numbers, minimum = _along(place, numbers, minimum, solve, low[place], high[place])
        if torch.equal(before, numbers):
            break
    return chart_at(numbers)


def _along(place, numbers, minimum, solve, low, high) -> tuple[Tensor, Minimum]:
    """The best value of one of the numbers: steps double while the loss falls, then shrink."""
    step, falling = 1.0, True
    while step >= 1:
        better = False
        for sign in (1, -1):
            trial = numbers.clone()
            trial[place] = (numbers[place] + sign * step).clamp(low, high)
            if torch.equal(trial, numbers):
                continue
            there = solve(trial, minimum.point)
            if there.value < minimum.value:
                numbers, minimum, better = trial, there, True
                break
        falling = falling and better
        step = 2 * step if better and falling else step // 2
    return numbers, minimum


def minimum_of(of, starts: Tensor, scale: Tensor, smooth: bool) -> Minimum:
    """The minimum, also where there is nothing to minimise over."""
    if starts.shape[-1]:
        return minimise(of, starts, scale=scale, smooth=smooth)
    with torch.no_grad():
        value = of(starts[0]).item()
    return Minimum(starts[0], value, starts[0], lambda vectors: vectors, 0.0, True, 1)


TRIED = 6  # variables of which every set may be what the components have
SAME_DENSITY = (
    1e-9  # relative difference of log-densities of the same distribution, otherwise written
)


def sort_components(problem: Problem, act: NumericalAct) -> NumericalAct:
    """The same act with its components sorted by their means.

    Draws with labels that change places start the minimiser at any of them, so that two losses,
    or two runs, would list the components differently. Labels that do not change places stay.
    """
    keys = _keys(problem.law(problem.few))
    if keys is None or keys.ndim != 2 or label_exchange(keys)[0] <= MIN_SWAPPED:
        return act
    law = problem.law({name: x[None] for name, x in act.theta.items()})
    at_act = _keys(law)
    if at_act is None:
        return act
    order, count = at_act[0].argsort(stable=True), at_act.shape[-1]
    if torch.equal(order, torch.arange(count)):
        return act
    axes = {k: x.shape.index(count) for k, x in act.theta.items() if count in x.shape}
    for names in _subsets(list(axes)[:TRIED]):
        moved = {
            name: x.index_select(axes[name], order) if name in names else x
            for name, x in act.theta.items()
        }
        if same_density(law, problem.law({name: x[None] for name, x in moved.items()})):
            influence = {
                name: x.index_select(1 + axes[name], order) if name in names else x
                for name, x in act.influence.items()
            }
            return replace(act, theta=moved, influence=influence)
    return act


def _subsets(names: list[str]) -> Any:
    sizes = range(len(names), 0, -1)
    return itertools.chain.from_iterable(itertools.combinations(names, size) for size in sizes)


def _keys(law: Distribution) -> Tensor | None:
    """Sort keys [n, components] of the components of mixtures; None where there are none.

    Their means, or their locations where they have no mean; of vectors the first coordinate.
    """
    while isinstance(law, Independent):
        law = law.base_dist
    if not isinstance(law, MixtureSameFamily) or len(law.batch_shape) != 1:
        return None
    parts: Any = law.component_distribution
    for name in ("mean", "loc"):
        try:
            keys = getattr(parts, name)
        except (AttributeError, NotImplementedError):
            continue
        keys = keys.expand(parts.batch_shape + parts.event_shape)
        keys = keys.flatten(2)[..., 0] if keys.ndim > 2 else keys
        if keys.isfinite().all():
            return keys.detach()
    return None


def same_density(law: Distribution, other: Distribution) -> bool:
    """True if distributions of one batch shape have the same densities at samples of the first."""
    with random_numbers(0), torch.no_grad():
        x = law.sample(torch.Size([16]))
        return torch.allclose(
            law.log_prob(x), other.log_prob(x), rtol=SAME_DENSITY, atol=SAME_DENSITY
        )

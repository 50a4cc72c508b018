"""The Bayes act by optimisation, for any law and any divergence that its support allows."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Distribution
from torch.distributions.transforms import Transform

from rkl.bayes.charts import Chart, LawOf, chart_of
from rkl.bayes.losses import (
    AnyLoss,
    DirectLoss,
    Intrinsic,
    NodeLoss,
    PosteriorLoss,
    between,
    check_loss,
    orders,
    slopes,
)
from rkl.bayes.minimise import Minimum, minimise
from rkl.bayes.nodes import OFF, Laws, Nodes, independent_parts, joint, nodes_for, with_slopes
from rkl.bayes.panels import kinked
from rkl.bayes.whole import chart_without, minimum_of, search, whole_parameters
from rkl.divergences import Divergence, FDivergence

QUICK = 2**16  # log-densities that the several starts look at, of a loss that needs every draw
HELD = 2**18  # those that it is minimised over, before all draws are
KINKED = 2**20  # the same for a loss with kinks, which only many draws smooth out
NEWTON, ENOUGH = 8, 1e-18  # steps over all draws, and the decrement in nats at which they end
TAIL = 1e-3  # share of the expected loss that tails without mass may have
CANDIDATES = 32  # draws of which the best are starts
# Seconds of a core of 2024: of one coordinate of a kinked loss; by number of a closed form; by
# draw and node of a smooth loss, and of one gradient of a kinked one.
OVERHEAD, CLOSED, AT_NODES, KINKS = 0.5, 2.5e-7, 2.5e-6, 2e-6
FEW_NODES, ENDLESS = 64, 30.0  # nodes that any law takes, and seconds beyond which they suffice
LawAt = Callable[[Tensor], Distribution]
FEW = 32  # draws that tell whether the laws have a closed form between them


@dataclass(frozen=True)
class Accuracy:
    """How an act was found, and how near it is to the act of these draws."""

    method: str  # closed form, enumeration, quadrature, importance
    nodes: int  # 0 with a closed form
    defect: float  # by which the total of some law on the nodes misses 1
    decrement: float  # nats: estimated excess of the expected loss, from stopping
    node_excess: float  # nats: estimated excess, from the nodes
    risk_error: float  # nats: of the risk, from the nodes
    converged: bool
    starts: int
    agreeing: int  # starts that ended at the same expected loss
    draws: int  # that were minimised over; the losses are of all of them


@dataclass(frozen=True)
class GenericAct:
    """The act, its law and its losses, with what a Monte Carlo error of it needs."""

    theta: dict[str, Tensor]
    law: Distribution  # of batch shape [1, *batch]
    losses: Float[Tensor, " draws"]  # nats
    risk: float
    influence: dict[str, Tensor]  # [draws, *shape]: by how much a draw of weight 1 moves the act
    accuracy: Accuracy
    whole: tuple[str, ...] = ()  # parameters that are whole numbers, and have no influences


def generic_act(
    theta: Mapping[str, Tensor],
    law: LawOf,
    divergence: AnyLoss,
    *,
    weights: Float[Tensor, " draws"] | None = None,
    nodes: Nodes | None = None,
    transforms: Mapping[str, Transform] | None = None,
    starts: int = 4,
    size: int = 4096,
    seed: int = 0,
) -> GenericAct:
    r"""The parameters t that minimise E D(P_θ ‖ P_t) over posterior draws θ.

    The expectation is over the draws as they are, and D a closed form or a sum over nodes that
    are fixed once: a deterministic function, minimised from the best of the draws. The act's
    Monte Carlo error is that of the mean of its influences, −H⁻¹ ∇loss for each draw.

    Args:
        theta: Draws by name, [draws, *shape] each.
        law: From parameters [n, *shape] to n laws, of batch shape [n, *batch]. Of a batch the
            losses are added up; of Independent parts the divergence is taken jointly.
        divergence: The loss. What is no f-divergence needs a finite support, except Intrinsic.
        weights: Of the draws; equal by default.
        nodes: Where to integrate; by default a closed form, or :func:`nodes_for`.
        transforms: Maps from coordinates to parameters, by name, instead of those chosen.
        starts: How many draws to start from.
        size: Number of nodes, where they are an importance sample.
        seed: Of its random numbers.

    Raises:
        ValueError: The draws or the weights are malformed, or the divergence has no meaning or no
            finite value between these laws.
        TypeError: ``divergence`` is no divergence.

    >>> from rkl.divergences import ReverseKL
    >>> scale = torch.tensor([1.0, 2.0, 4.0]).double()
    >>> law = lambda t: torch.distributions.Normal(0.0, t["scale"])
    >>> act = generic_act({"scale": scale}, law, ReverseKL())
    >>> act.theta["scale"], scale.pow(-2).mean().rsqrt()
    (tensor(1.5119, dtype=torch.float64), tensor(1.5119, dtype=torch.float64))
    """
    laws = laws_of(theta, law, weights)
    loss = posterior_loss(laws, divergence, nodes=nodes, size=size, seed=seed)
    return least_act(loss, law, transforms=transforms, starts=starts)


def least_act(
    loss: PosteriorLoss,
    law: LawOf,
    *,
    transforms: Mapping[str, Transform] | None = None,
    starts: int = 4,
) -> GenericAct:
    """The act under a loss whose nodes are chosen."""
    laws = loss.laws
    if names := whole_parameters(laws):
        return _whole_act(loss, law, names, transforms, starts)
    chart = chart_of(laws.theta, law, transforms)
    drawn = chart.coordinates(laws.theta)
    scale = drawn.std(0, correction=0)
    scale = torch.where(scale > 0, scale, 1.0)
    held = over_few(loss, HELD if loss.smooth else KINKED)
    minimum, tried = _minimum(loss, held, chart, drawn, scale, starts)
    return _act(law, loss, held, chart, minimum, tried)


def _whole_act(loss, law, names, transforms, starts) -> GenericAct:
    """The act where some parameters are whole numbers: the best of these, then of the others."""
    laws = loss.laws
    chart, free = chart_without(laws, names, transforms)
    drawn = chart.coordinates(free) if free else torch.zeros(len(laws), 0, dtype=torch.float64)
    scale = drawn.std(0, correction=0)
    scale = torch.where(scale > 0, scale, 1.0)
    held = over_few(loss, HELD)
    quick = over_few(held, QUICK)

    def function(at: Chart):
        return lambda t: quick.expected(_law(quick, at, t))

    def whole(row: int) -> dict[str, Tensor]:
        return {name: laws.theta[name][row] for name in names}

    rows = laws.spread(CANDIDATES).tolist()
    with torch.no_grad():
        values = torch.stack(
            [_quiet(function(dataclasses.replace(chart, fixed=whole(i))), drawn[i]) for i in rows]
        )
    best = rows[int(values.argmin())]
    chart = search(laws, names, chart, whole(best), drawn[best], function, scale, loss.smooth)
    if free:
        minimum, tried = _minimum(loss, held, chart, drawn, scale, starts)
    else:
        minimum, tried = minimum_of(function(chart), drawn[:1], scale, loss.smooth), 1
    return dataclasses.replace(_act(law, loss, held, chart, minimum, tried), whole=names)


def laws_of(theta: Mapping[str, Tensor], law: LawOf, weights: Tensor | None = None) -> Laws:
    """The laws of posterior draws, in double precision.

    Raises:
        ValueError: There are none, they are not as many of each parameter, or not finite; or the
            weights do not go with them.
    """
    if not theta:
        raise ValueError("theta must hold the draws of at least one parameter; got none.")
    counts = {name: len(x) if x.ndim else 0 for name, x in theta.items()}
    draws = next(iter(counts.values()))
    if draws == 0 or set(counts.values()) != {draws}:
        raise ValueError(f"theta must hold as many draws of each parameter; got {counts}.")
    for name, x in theta.items():
        if not x.isfinite().all():
            raise ValueError(f"{name} must be finite; got {x[~x.isfinite()][0].item()}.")
    weights = torch.ones(draws) if weights is None else weights
    if weights.shape != (draws,) or not (weights.isfinite() & (weights >= 0)).all():
        raise ValueError(f"weights must be {draws} finite numbers, none negative; got {weights}.")
    if not weights.sum() > 0:
        raise ValueError("weights must not all be 0.")
    weights = weights.double() / weights.double().sum()
    reals = {k: x.double() if x.is_floating_point() else x for k, x in theta.items()}
    return Laws(reals, law, weights)


def posterior_loss(
    laws: Laws,
    divergence: AnyLoss,
    *,
    nodes: Nodes | None = None,
    size: int = 4096,
    seed: int = 0,
) -> PosteriorLoss:
    """The posterior expected divergence of a law, by a closed form or on nodes.

    Raises:
        TypeError: ``divergence`` is none.
        ValueError: It needs a finite support, or no nodes serve these laws.
    """
    check_loss(divergence)
    laws = _split(laws, divergence)
    smooth = isinstance(divergence, FDivergence) and not kinked(divergence)
    if nodes is None and _closed(laws, divergence):
        return DirectLoss(laws, None, smooth, _InClosedForm(divergence))
    if isinstance(divergence, FDivergence | Intrinsic):
        criterion = divergence if isinstance(divergence, FDivergence) else None
        nodes = nodes or nodes_for(laws, criterion, size=size, seed=seed)
        return NodeLoss(laws, with_slopes(laws, nodes), smooth, divergence)
    nodes = nodes or nodes_for(laws, size=1, seed=seed)
    if nodes.kind != "enumeration":
        raise ValueError(
            f"divergence {divergence} is no f-divergence, and has no meaning beyond a finite "
            f"support; that of a {type(laws.at(laws.spread(1))).__name__} is not finite."
        )
    return DirectLoss(laws, nodes, smooth, _OverAtoms(divergence, nodes))


def sampled(laws: Laws, divergence: AnyLoss) -> bool:
    """Whether the loss takes an importance sample, and so draws times nodes log-densities."""
    laws = _split(laws, divergence)
    return not _closed(laws, divergence) and joint(laws)


def expected_seconds(laws: Laws, divergence: AnyLoss, draws: int) -> float:
    """About how long an act takes on one core that is minimised numerically.

    A count of numbers, so that the same posterior gets the same answer on any machine.

    Args:
        laws: Some draws.
        divergence: The loss.
        draws: How many draws there are.
    """
    members = laws.at(laws.spread(1)).batch_shape.numel()
    if not _closed(laws, divergence) and AT_NODES * draws * members * FEW_NODES > ENDLESS:
        return AT_NODES * draws * members * FEW_NODES  # placing nodes would take long itself
    few = posterior_loss(laws, divergence)
    coordinates = sum(x[0].numel() for x in laws.theta.values())
    if few.nodes is None:
        law = laws.at(laws.spread(1))
        size = draws * law.batch_shape.numel() * law.event_shape.numel()
        evaluations = coordinates if not few.smooth else 1
        return evaluations * (OVERHEAD + CLOSED * size * coordinates)
    numbers = draws * few.nodes.log_weight.numel()
    if few.smooth:
        return 1 + AT_NODES * numbers
    return 1 + KINKS * (1 + 4 * coordinates) * min(numbers, KINKED)


def _split(laws: Laws, divergence: AnyLoss) -> Laws:
    """The laws, in independent parts where the divergence is a sum over these."""
    known = orders(divergence)
    if known is None or any(alpha not in (0, 1) for _, alpha in known):
        return laws
    return dataclasses.replace(laws, law=lambda theta: independent_parts(laws.law(theta)))


def _closed(laws: Laws, divergence: AnyLoss) -> bool:
    one, few = laws.at(laws.spread(1)), laws.at(laws.spread(FEW))  # what is fixed in one may move
    return between(divergence, few, one) is not None


@dataclass(frozen=True)
class _InClosedForm:
    divergence: AnyLoss

    def __call__(self, p: Distribution, q: Distribution) -> Tensor:
        value = between(self.divergence, p, q)
        assert value is not None  # it was asked before
        return value


@dataclass(frozen=True)
class _OverAtoms:
    """A divergence that is none of ratios, its coefficients moving with the act."""

    divergence: Divergence
    nodes: Nodes

    def __call__(self, p: Distribution, q: Distribution) -> Tensor:
        logp, logq = self.nodes.log_mass(p), self.nodes.log_mass(q)
        logp, logq = torch.broadcast_tensors(logp, logq)
        inputs = self.divergence.held_inputs(logp)
        return self.divergence.value(logp, logq, *self.divergence.held(logp, logq, *inputs))


def over_few(loss: PosteriorLoss, numbers: int) -> PosteriorLoss:
    """The loss over so few of the draws that an evaluation needs no more numbers."""
    count = max(numbers // max(1, loss.numbers), 64)
    few = loss.numbers == 0 or count >= len(loss.laws)
    return loss if few else loss.over(loss.laws.thinned(count))


def _minimum(loss, held, chart, drawn, scale, starts) -> tuple[Minimum, int]:
    """From the best of many draws on few of them, then on all that are held; and how many."""
    quick = over_few(held, QUICK)

    def function(of):
        return lambda t: of.expected(_law(of, chart, t))

    # The extremes too: some divergences are finite only at the widest law.
    outer = [drawn[:, :CANDIDATES].argmax(0), drawn[:, :CANDIDATES].argmin(0)]
    rows = torch.cat([loss.laws.spread(CANDIDATES), *outer]).unique()
    candidates = torch.cat([drawn[rows], drawn.mean(0, keepdim=True)])
    with torch.no_grad():
        values = torch.stack([_quiet(function(quick), t) for t in candidates])
    if not values.isfinite().any():
        raise ValueError(
            "divergence must be finite, on average over the draws, at some law; it is infinite "
            f"at each of {len(candidates)} that were tried."
        )
    order = values.argsort()[: min(starts, int(values.isfinite().sum()))]
    best = candidates[order]
    found = minimise(function(quick), best, scale=scale, smooth=loss.smooth)
    if quick is held:
        return found, len(best)
    again = minimise(function(held), found.point[None], scale=scale, smooth=loss.smooth)
    return dataclasses.replace(again, agreeing=found.agreeing), len(best)


def _quiet(function, point) -> Tensor:
    """The loss, infinite where it is not defined."""
    try:
        return function(point).nan_to_num(math.inf, math.inf)
    except ValueError:
        return torch.tensor(math.inf, dtype=torch.float64)


def _law(loss: PosteriorLoss, chart: Chart, coordinates: Tensor) -> Distribution:
    point = chart.point(coordinates[None])
    if not all(x.isfinite().all() for x in point.values()):
        raise ValueError("coordinates must give finite parameters; they overflowed.")
    return loss.laws.of(point)


def _act(law, loss, held, chart, minimum: Minimum, starts: int) -> GenericAct:
    found = on_all(loss, functools.partial(_law, loss, chart), minimum, held is not loss)
    point, losses = found.point, found.losses
    theta, by_name = influences(
        lambda t: {name: x[0] for name, x in chart.point(t[None]).items()}, found, minimum
    )
    defect = _defect(loss, _law(loss, chart, point))
    excess, risk_error = _node_error(loss, chart, point, minimum.inverse, losses)
    nodes = loss.nodes
    accuracy = Accuracy(
        method=nodes.kind if nodes else "closed form",
        nodes=len(nodes) if nodes else 0,
        defect=defect,
        decrement=found.decrement,
        node_excess=excess,
        risk_error=risk_error,
        converged=minimum.converged,
        starts=starts,
        agreeing=minimum.agreeing,
        draws=len(held.laws),
    )
    own = law({name: x[None] for name, x in theta.items()})
    return GenericAct(theta, own, losses, float(loss.laws.weights @ losses), by_name, accuracy)


class OnAll(NamedTuple):
    """A minimum over all draws: where, and the loss of each draw there with its slopes."""

    point: Tensor
    losses: Float[Tensor, " draws"]
    by_draw: Float[Tensor, "draws k"]
    decrement: float


def on_all(loss: PosteriorLoss, law: LawAt, minimum: Minimum, again: bool) -> OnAll:
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
    found = at(minimum.point)
    for _ in range(NEWTON):
        if found.decrement < ENOUGH:
            break
        trial = at(found.point - minimum.inverse(weights @ found.by_draw))
        if not trial.decrement < found.decrement:
            break
        found = trial
    return found


def influences(
    values: Callable[[Tensor], dict[str, Tensor]], found: OnAll, minimum: Minimum
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Values [*shape] at a minimum, and by how much a draw of weight 1 moves them."""
    leaf = found.point.detach().requires_grad_()
    with torch.enable_grad():
        here = values(leaf)
        moves = {
            name: slopes(x.flatten(), leaf)
            if x.requires_grad
            else leaf.new_zeros(x.numel(), len(leaf))
            for name, x in here.items()
        }
    steps = -minimum.inverse(found.by_draw)
    moved = {k: (steps @ moves[k].T).reshape(-1, *x.shape) for k, x in here.items()}
    return {name: x.detach() for name, x in here.items()}, moved


def _decrement(inverse, slope: Tensor) -> float:
    return float(slope @ inverse(slope)) / 2


def _defect(loss: PosteriorLoss, law: Distribution) -> float:
    """By how much the total of a draw's law, or of the act's, misses 1."""
    if loss.nodes is None:
        return 0.0
    own = (loss.nodes.log_mass(law).exp().sum(-1) - 1).abs().max().item()
    if own > OFF and loss.nodes.kind != "importance":
        raise ValueError(
            f"nodes must reach as far as the act; {own:.2g} of its mass is not on them, beyond "
            "what the laws of the draws have theirs on."
        )
    return max(own, loss.nodes.defect)


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
    few = loss.laws.thinned(max(64, HELD // loss.nodes.log_weight.numel()))
    few = dataclasses.replace(loss, laws=few)
    values, slope = by_node(few)
    poorer = by_node(dataclasses.replace(few, nodes=loss.nodes.coarse))
    off = poorer[1].sum(0) - slope.sum(0)
    return _decrement(inverse, off), (poorer[0].sum() - values.sum()).abs().item()


def _refuse_infinite(loss: NodeLoss, law: Distribution, losses: Tensor) -> None:
    """Refuse a divergence that lies where there is nothing: its integral has no end."""
    if isinstance(loss.divergence, Intrinsic) or loss.divergence.bounded or loss.nodes.far is None:
        return
    weights = loss.laws.weights
    worst = (weights * losses).topk(min(64, len(losses))).indices
    values, _ = dataclasses.replace(loss, laws=loss.laws.only(worst)).by_node(law)
    if values[loss.nodes.far].sum() > TAIL * (weights @ losses):
        raise ValueError(
            f"divergence {loss.divergence} must be finite between the laws of the draws; between "
            "some it is infinite, or as good as, for it lies in tails that hold no mass."
        )

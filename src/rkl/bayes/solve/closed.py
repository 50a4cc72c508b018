"""The act under both KLs, from the means of one pass over the draws."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rkl.bayes.answer import Act, Answer, Diagnostics
from rkl.bayes.diagnostics import (
    WAYS_OUT,
    Judgement,
    diagnose,
    diagnostics_of,
    label_switching,
    nan_where,
    thin,
)
from rkl.bayes.families import ExponentialFamily, Natural
from rkl.bayes.families.base import jacobian
from rkl.bayes.loss.between import Weights
from rkl.bayes.loss.expected import slopes
from rkl.bayes.model import Model
from rkl.bayes.problem import Problem, Variables
from rkl.bayes.solve.errors import Averages, Point, average_draws
from rkl.bayes.solve.streaming import plus
from rkl.bayes.solve.unconstrained import Chart, chart_of, minimise, scale_of
from rkl.stats import Mean
from rkl.stats.pareto import NO_ERROR

BLOCK = 2**16  # numbers of a chunk whose terms are judged, which the cache holds


def closed_act(problem: Problem, weights: Weights) -> Answer:
    """The act under a sum of KLs.

    Raises:
        ValueError: What would have to be averaged has no mean.
    """
    averages = average_draws(problem, directions_of(weights))
    judgement = diagnose_averages(problem, averages)
    _refuse_without_mean(problem, averages, judgement)
    solution = solve(problem, averages, weights)
    return _estimate(problem, averages, weights, solution, judgement)


def directions_of(weights: Weights) -> tuple[str, ...]:
    """The directions of the KLs in a sum, whose averages the act needs."""
    return tuple(name for name, w in zip(("reverse", "forward"), weights, strict=True) if w)


def excess_risk(averages: Averages, at: Point, weights: Weights) -> Callable[[Natural], Tensor]:
    """The excess risk of a distribution over the least possible [*batch], as a function of it."""
    family = averages.family
    forward = family.from_mean(at.mean) if weights.forward else ()

    def excess(t: Natural) -> Tensor:
        parts = [weights.reverse * family.kl(t, at.natural)] if weights.reverse else []
        parts += [weights.forward * family.kl(forward, t)] if weights.forward else []
        return sum(parts[1:], parts[0])

    return excess


def minimum_risk(averages: Averages, at: Point, weights: Weights) -> Tensor:
    """The part of the risk that no distribution avoids [*batch]: a Jensen gap."""
    family, parts = averages.family, []
    if weights.reverse:
        gap = at.from_reference - family.kl(averages.reference, at.natural)
        parts.append(weights.reverse * gap)
    if weights.forward:
        gap = at.to_reference - family.kl(family.from_mean(at.mean), averages.reference)
        parts.append(weights.forward * gap)
    return sum(parts[1:], parts[0])


@dataclass(frozen=True, eq=False)
class Solution:
    """An act, as a function of the posterior means.

    Attributes:
        natural: Of the act.
        variables: That stand for it.
        in_family: Whether each distribution of the exponential family is one of those asked for,
            of which the parameters are the variables.
        at: From means near those of the draws [lead, *batch, ...] to the natural parameters of
            their acts, right to first order, and to such variables as are no parameters.
        accuracy: By how much its risk may exceed the least, in nats.
        method: How it was found.
    """

    natural: Natural
    variables: Variables
    in_family: bool
    at: Callable[[Point], tuple[Natural, Variables]]
    accuracy: float
    method: str


def solve(problem: Problem, averages: Averages, weights: Weights) -> Solution:
    """The act in the exponential family, or where that is too large, in the one asked for."""
    family, here = averages.family, averages.here
    natural = _free(averages, here, weights)
    variables = problem.holds(family, natural)
    if variables is None:
        return nearest(problem, problem.model, averages, weights)

    def at(point: Point) -> tuple[Natural, Variables]:
        if point is here:
            return natural, {}
        if not all(weights):
            return _free(averages, point, weights), {}
        changes = family.minus(point.natural, here.natural), family.minus(point.mean, here.mean)
        step = sensitivity(family, natural, here.natural, here.mean, weights, *changes)
        return plus(natural, step), {}

    how = "closed form" if not all(weights) else "Newton's method"
    return Solution(natural, variables, True, at, 0.0, how)


def _free(averages: Averages, at: Point, weights: Weights) -> Natural:
    if not weights.forward:
        averages.family.check(at.natural)
        return at.natural
    forward = averages.family.from_mean(at.mean)
    return (
        newton_act(averages.family, at.natural, forward, weights) if weights.reverse else forward
    )


def nearest(problem: Problem, model: Model, averages: Averages, weights: Weights) -> Solution:
    """The distribution of least risk in a smaller family; by Pythagoras without the draws."""
    family = averages.family
    chart, starts, scale = _starts(problem, model)

    def naturals(coordinates: Tensor) -> Natural:
        return family.natural(model.base(chart.point(coordinates)))

    def excess(at: Point) -> Callable[[Tensor], Tensor]:
        """Of the whole batch, as a function of the coordinates; one for each of many points."""
        measure, lead = excess_risk(averages, at, weights), at.to_reference.ndim
        lead -= averages.here.to_reference.ndim

        def of(u: Tensor) -> Tensor:
            law = naturals(u[None])  # which adds an axis in place of the lead
            value = measure(law if lead else tuple(x[0] for x in law))
            return value.reshape(*value.shape[:lead], -1).sum(-1)

        return of

    minimum = minimise(excess(averages.here), starts, scale=scale, tolerance=1e-14)
    here = minimum.point[None]
    slope = _slopes(excess(averages.here), minimum.point)
    variables = {name: x[0] for name, x in chart.point(here).items()}
    natural = tuple(x[0] for x in naturals(here))

    def at(point: Point) -> tuple[Natural, Variables]:
        if point is averages.here:
            return natural, variables
        # one step of Newton's method from the minimum, with the curvature there
        u = minimum.point - minimum.inverse(_slopes_at(excess, point, minimum.point) - slope)
        return naturals(u), chart.point(u)

    how = "minimised within the family"
    return Solution(natural, variables, False, at, minimum.decrement, how)


def _starts(problem: Problem, model: Model) -> tuple[Chart, Tensor, Tensor]:
    """The chart, points to start from, and the scale of the coordinates."""
    subsample = thin(problem.draws, 2**14)
    theta = {k: problem.align(k, subsample[k].flatten(0, 1), model) for k in model.names}
    chart = chart_of(theta, model.law)
    drawn = chart.coordinates(theta)
    return chart, torch.stack([drawn.mean(0), drawn[0], drawn[-1]]), scale_of(drawn)


def _slopes_at(excess, at: Point, u: Tensor) -> Tensor:
    """Slopes [lead, k] in the coordinates u [k] of an excess at many points [lead]."""
    lead = len(at.to_reference)
    if len(u) <= lead:  # one backward pass for each coordinate
        return _slopes(excess(at), u)
    return torch.cat([_slopes(excess(at.row(i)), u) for i in range(lead)])


def _slopes(function: Callable[[Tensor], Tensor], point: Tensor) -> Tensor:
    leaf = point.detach().requires_grad_()
    with torch.enable_grad():
        outputs = function(leaf)
        if outputs.ndim:
            return slopes(outputs, leaf)
        return torch.autograd.grad(outputs, leaf)[0][None]


def diagnose_averages(problem: Problem, averages: Averages) -> Judgement:
    """The tails and the worth of all that is averaged."""
    family, subsample = averages.family, thin(problem.draws, _numbers(averages))
    ends = dict(zip(family.names, family.events, strict=True))
    ends |= dict(zip(family.mean_names, family.events, strict=True))
    parts = [
        _terms(problem, averages, chunk)
        for _, _, chunk in subsample.chunks(problem.model.names, BLOCK)
    ]
    values = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    values = {
        name: x.unflatten(0, (subsample.chains, subsample.draws)) for name, x in values.items()
    }
    return diagnose(values, subsample, {name: n for name, n in ends.items() if name in values})


def _terms(problem: Problem, averages: Averages, theta: Variables) -> dict[str, Tensor]:
    family = averages.family
    terms = family.terms(problem.model.base(theta), averages.reference)
    by_name = {}
    if "reverse" in averages.directions:
        by_name |= dict(zip(family.names, terms.natural, strict=True))
        by_name |= {"risk (reverse)": terms.from_reference}
    if "forward" in averages.directions:
        by_name |= dict(zip(family.mean_names, terms.mean, strict=True))
        by_name |= {"risk (forward)": terms.to_reference}
    return by_name


def _numbers(averages: Averages) -> int:
    return max(x.numel() for x in averages.reference)


def _refuse_without_mean(problem: Problem, averages: Averages, judgement: Judgement) -> None:
    for name, k in judgement.without_mean().items():
        if name.startswith("risk"):
            continue
        forward = name in averages.family.mean_names
        other = ("ReverseKL()", "natural") if forward else ("KL()", "mean")
        raise ValueError(
            f"The act under {problem.divergence} does not exist: it averages {name}, whose "
            f"posterior mean is infinite, as far as {judgement.draws:,} draws show (Pareto-k "
            f"{k.nan_to_num(0).max():.2f}, and 1 is too much). {other[0]} averages the "
            f"{other[1]} parameter instead; {WAYS_OUT}"
        )


def act_and_risk(
    problem: Problem, averages: Averages, weights: Weights, solution: Solution
) -> dict[tuple[str, Any], Mean]:
    """The risk and the parameters of an act, each with its error: all but the diagnostics."""
    family, plain = averages.family, problem.family
    assert plain is not None  # as weights are

    own_names = problem.origins.values() if solution.in_family else ()
    named = dict.fromkeys((*family.parameters, *own_names))
    exact = solution.in_family and not all(weights)  # and nothing above the least there is

    def outputs(at: Point) -> dict[Any, Tensor]:
        natural, variables = solution.at(at)
        law = family.from_natural(natural)
        own_natural = plain.natural(law)
        risk = minimum_risk(averages, at, weights)
        risk = risk if exact else risk + excess_risk(averages, at, weights)(natural)
        return (
            {("risk", ""): problem.total(risk)}
            | {("natural", i): x for i, x in enumerate(own_natural)}
            | {("mean", i): x for i, x in enumerate(plain.mean(own_natural))}
            | {("parameter", name): getattr(law, name) for name in named}
            | {("parameter", name): x for name, x in variables.items()}
        )

    means = averages.with_errors(outputs, solution.in_family and not problem.structure.joint)
    if solution.in_family:
        means |= {
            ("parameter", name): Mean(*(problem.shrunk(name, x) for x in means["parameter", key]))
            for name, key in problem.origins.items()
        }
    return means


def _estimate(
    problem, averages: Averages, weights: Weights, solution: Solution, judgement
) -> Answer:
    measured = act_and_risk(problem, averages, weights, solution)
    unsure, endless = _unsure(problem, judgement)
    means = {
        key: Mean(x.value, nan_where(x.error, unsure[key[0] == "risk"]))
        for key, x in measured.items()
    }
    risk = means["risk", ""]
    risk = Mean(torch.where(endless, torch.inf, risk.value), risk.error)
    parameters = {key[1]: mean for key, mean in means.items() if key[0] == "parameter"}
    for key, name in (problem.model.settings or {}).items():
        if isinstance(name, str):
            parameters.setdefault(key, parameters[name])
    act = Act(
        parameters,
        problem.wrap(averages.family.from_natural(solution.natural), solution.variables),
        *(
            tuple(m for key, m in means.items() if key[0] == which)
            for which in ("natural", "mean")
        ),
        point=solution.variables,
    )
    return Answer(
        problem.model.text,
        problem.divergence,
        act,
        risk,
        _diagnostics(problem, averages, judgement, solution),
        problem,
    )


def _unsure(problem: Problem, judgement: Judgement) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Masks [*batch] of no normal error, for the act and for the risk, and of an infinite risk."""
    act = risk = endless = torch.zeros(problem.batch, dtype=torch.bool)
    for name, k in judgement.pareto_k.items():
        if name.startswith("risk"):
            risk = risk | problem.any(k >= NO_ERROR)
            endless = endless | problem.any(judgement.surely_infinite(name))
        else:
            act = act | problem.any(k >= NO_ERROR)
    return (act, risk | act), endless


def _diagnostics(
    problem: Problem, averages: Averages, judgement: Judgement, solution: Solution
) -> Diagnostics:
    draws = problem.draws
    warnings = [label_switching(draws, problem.model.names, problem.batch)]
    subsample = thin(draws, _numbers(averages))
    return diagnostics_of(
        judgement, draws, subsample, solution.method, solution.accuracy, warnings
    )


MAX_DECREMENT = 1e-22  # Newton decrement in nats at which an act is found
STEPS, HALVINGS = 500, 40


def newton_act(
    family: ExponentialFamily, reverse: Natural, forward: Natural, weights: Weights
) -> Natural:
    """The distribution that minimises w_R KL(P_t ‖ P_R) + w_F KL(P_F ‖ P_t), by Newton's method.

    Raises:
        ValueError: Newton's method does not converge.
    """
    total = weights.reverse + weights.forward
    wanted = family.mean(forward)

    def objective(t):
        return weights.reverse * family.kl(t, reverse) + weights.forward * family.kl(forward, t)

    act = tuple(
        (weights.reverse * r + weights.forward * f) / total
        for r, f in zip(reverse, forward, strict=True)
    )
    for _ in range(STEPS):
        gap = weights.reverse * _times(family, act, family.minus(reverse, act))
        gap += weights.forward * family.flatten(family.minus(wanted, family.mean(act)))
        step = _descent_step(family, act, reverse, wanted, weights, gap)
        decrement = (gap * step).sum(-1)
        step = family.unflatten(step, act)
        if (decrement < MAX_DECREMENT).all():
            return family.along(act, step, torch.ones_like(decrement))
        act = family.along(act, step, _length(family, objective, act, step, decrement))
    raise ValueError(f"Newton's method found no act under both KLs in {STEPS} steps.")


def _times(family: ExponentialFamily, at: Natural, vector: Natural) -> Tensor:
    return (fisher(family, at) @ family.flatten(vector)[..., None])[..., 0]


def _descent_step(family, act: Natural, reverse, mean, weights: Weights, gap: Tensor) -> Tensor:
    """Newton's step, or the natural gradient's where that would climb."""
    newton = solve_symmetric(_curvature(family, act, reverse, mean, weights), gap[..., None])[
        ..., 0
    ]
    natural = solve_symmetric(fisher(family, act), gap[..., None])[..., 0] / sum(weights)
    return torch.where(((gap * newton).sum(-1) > 0)[..., None], newton, natural)


def _length(family, objective, act: Natural, step: Natural, decrement: Tensor) -> Tensor:
    """Halve until the step stays inside and gains as its slope promises, for each of the batch."""
    here = objective(act)
    length = torch.ones_like(here)
    for _ in range(HALVINGS):
        moved = family.along(act, step, length)
        gained = here - objective(moved) >= length * decrement / 4 - 1e-12 * (1 + here.abs())
        good = family.contains(moved) & gained
        if good.all():
            break
        length = torch.where(good, length, length / 2)
    return length


def sensitivity(
    family: ExponentialFamily,
    act: Natural,
    reverse: Natural,
    mean: Natural,
    weights: Weights,
    by_natural: Natural,
    by_mean: Natural,
) -> Natural:
    """First-order change of the balanced act with E η and E m, [shifts, *batch, ...]."""
    pull = weights.reverse * (fisher(family, act) @ family.flatten(by_natural)[..., None])
    pull += weights.forward * family.flatten(by_mean)[..., None]
    moved = solve_symmetric(_curvature(family, act, reverse, mean, weights), pull)[..., 0]
    return family.unflatten(moved, act)


def _curvature(family, act, reverse, mean, weights) -> Tensor:
    """Second derivatives of the objective in the act's natural parameter."""
    with torch.enable_grad():
        leaf = family.flatten(act).detach().requires_grad_()
        t = family.unflatten(leaf, act)
        partition = family.log_partition(t)
        mean_of_act = torch.autograd.grad(partition.sum(), t, create_graph=True)
        to_reverse = -partition - family.inner(family.minus(reverse, t), mean_of_act)
        to_forward = partition - family.inner(t, mean)
        objective = weights.reverse * to_reverse + weights.forward * to_forward
        (slope,) = torch.autograd.grad(objective.sum(), leaf, create_graph=True)
        return _symmetric(family, act, jacobian(slope, leaf))


def solve_symmetric(matrix: Tensor, right: Tensor) -> Tensor:
    """Matrix⁻¹ right of symmetric matrices, by the pseudo-inverse of the scaled matrix.

    A natural parameter that is a symmetric matrix has each entry twice, and one of logits a
    constant too many: the matrix is then singular in directions without effect.
    """
    scale = matrix.diagonal(dim1=-2, dim2=-1).abs().sqrt()
    unit = matrix / (scale[..., None] * scale[..., None, :])
    inverse = torch.linalg.pinv(unit, hermitian=True, rtol=1e-12)
    return inverse / (scale[..., None] * scale[..., None, :]) @ right


def fisher(family: ExponentialFamily, natural: Natural) -> Tensor:
    """∇²A [*batch, n, n] in the flattened components, and 0 across symmetric matrices."""
    return _symmetric(family, natural, family.hessian(natural))


def _symmetric(family: ExponentialFamily, natural: Natural, matrix: Tensor) -> Tensor:
    if 2 not in family.events:
        return matrix
    places = torch.arange(matrix.shape[-1])
    parts = family.unflatten(
        places, tuple(x[(0,) * (x.ndim - n)] for x, n in _each(family, natural))
    )
    turned = family.flatten(tuple(x.mT if n == 2 else x for x, n in _each(family, parts)))
    matrix = (matrix + matrix[..., turned, :]) / 2
    return (matrix + matrix[..., turned]) / 2


def _each(family, components):
    return zip(components, family.events, strict=True)

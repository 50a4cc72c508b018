"""The act under both KLs from one pass over the draws, with errors by the delta method."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rkl.bayes.answer import Act, Answer, Diagnostics
from rkl.bayes.averages import (
    NO_ERROR,
    WAYS_OUT,
    Judgement,
    diagnosed,
    judged,
    label_switching,
    masked,
    thinned,
)
from rkl.bayes.charts import Chart, chart_of
from rkl.bayes.closed import Weights, balanced, swayed
from rkl.bayes.families import ExponentialFamily, Natural
from rkl.bayes.laws import Model
from rkl.bayes.losses import slopes
from rkl.bayes.minimise import Minimum, minimise
from rkl.bayes.questions import Question, Variables
from rkl.bayes.streaming import Moments, one_pass, plus
from rkl.metrics import Mean
from rkl.metrics.batches import BatchMeans

SHIFT = 0.1  # of a batch's share of the mean, for central differences


class Point(NamedTuple):
    """Posterior means [*lead, *batch, ...]; empty where they were not asked for."""

    natural: Natural  # E η
    from_reference: Tensor  # E KL(P_0 ‖ P_θ)
    mean: Natural  # E m
    to_reference: Tensor  # E KL(P_θ ‖ P_0)

    def row(self, i: int) -> "Point":
        """One of those along the first axis."""
        return Point(
            tuple(x[i] for x in self.natural),
            self.from_reference[i],
            tuple(x[i] for x in self.mean),
            self.to_reference[i],
        )


@dataclass(frozen=True, eq=False)
class Averages:
    """What one pass leaves.

    Attributes:
        family: The exponential family, its statistic taken about the reference law.
        reference: The natural parameter of the reference law P_0.
        here: The means.
        shift: What a small share of each batch of draws adds to them, [batches, *batch, ...].
        error: The standard error of anything, from what these shifts change of it.
    """

    family: ExponentialFamily
    reference: Natural
    here: Point
    shift: Point
    error: Callable[[Tensor], Tensor]

    def moved(self, sign: int) -> Point:
        """The means with the shifts added, or taken away."""
        here, shift = self.here, self.shift
        return Point(
            plus(here.natural, shift.natural, sign),
            here.from_reference + sign * shift.from_reference,
            plus(here.mean, shift.mean, sign),
            here.to_reference + sign * shift.to_reference,
        )


def averages(question: Question, directions: tuple[str, ...]) -> Averages:
    """One pass over the draws.

    Args:
        question: Of a family that is exponential.
        directions: "reverse" for what the reverse-KL act needs, "forward" for the other's.
    """
    if directions not in question.averaged:
        model = question.model
        moments = one_pass(question.draws, model.bare, model.names, directions, question.compiled)
        question.averaged[directions] = averages_of(moments, directions)
    return question.averaged[directions]


def averages_of(moments: Moments, directions: tuple[str, ...]) -> Averages:
    """The means of one pass, and what each batch of draws adds to them, by component."""
    first = moments.averaged(directions[0])

    def point(read: Callable[[BatchMeans], Tensor], axis: int) -> Point:
        parts = []
        for name in ("reverse", "forward"):
            flat = read(moments.averaged(name if name in directions else directions[0]))
            flat = flat.movedim(axis, -1)
            components = moments.family.unflatten(flat[..., :-1], moments.reference)
            parts += [components if name in directions else (), flat[..., -1]]
        return Point(*parts)

    return Averages(
        family=moments.family,
        reference=moments.reference,
        here=point(lambda means: means.mean, 0),
        shift=point(lambda means: SHIFT * means.shifts, 1),
        error=lambda changes: first.error_of(changes / SHIFT),
    )


def closed_act(question: Question, weights: Weights) -> Answer:
    """The act under a sum of KLs.

    Raises:
        ValueError: What would have to be averaged has no mean.
    """
    known = averages(question, directions_of(weights))
    seen = judgement(question, known)
    _refuse_without_mean(question, known, seen)
    found = solve(question, known, weights)
    return _estimate(question, known, weights, found, seen)


def directions_of(weights: Weights) -> tuple[str, ...]:
    """Which averages a sum of KLs needs."""
    return tuple(name for name, w in zip(("reverse", "forward"), weights, strict=True) if w)


def towards(known: Averages, at: Point, weights: Weights) -> Callable[[Natural], Tensor]:
    """The excess risk of a law over what no law avoids [*batch], as a function of it."""
    family = known.family
    forward = family.from_mean(at.mean) if weights.forward else ()

    def excess(t: Natural) -> Tensor:
        parts = [weights.reverse * family.kl(t, at.natural)] if weights.reverse else []
        parts += [weights.forward * family.kl(forward, t)] if weights.forward else []
        return sum(parts[1:], parts[0])

    return excess


def least(known: Averages, at: Point, weights: Weights) -> Tensor:
    """The part of the risk that no law avoids [*batch]: a Jensen gap."""
    family, parts = known.family, []
    if weights.reverse:
        gap = at.from_reference - family.kl(known.reference, at.natural)
        parts.append(weights.reverse * gap)
    if weights.forward:
        gap = at.to_reference - family.kl(family.from_mean(at.mean), known.reference)
        parts.append(weights.forward * gap)
    return sum(parts[1:], parts[0])


@dataclass(frozen=True, eq=False)
class Solved:
    """An act, and what it becomes when the posterior means shift.

    Attributes:
        natural: Of the act.
        variables: That stand for it; None where the family's own say all.
        moved: From a sign to the natural parameters and the variables of the shifted acts.
        accuracy: By how much its risk may exceed the least, in nats.
        method: How it was found.
    """

    natural: Natural
    variables: Variables
    moved: Callable[[int], tuple[Natural, Variables]]
    accuracy: float
    method: str


def solve(question: Question, known: Averages, weights: Weights) -> Solved:
    """The act in the exponential family, or where that is too large, in the one asked for."""
    family, here = known.family, known.here
    natural = _free(known, here, weights)
    variables = question.holds(family, natural)
    if variables is None:
        return nearest(question, question.model, known, weights)

    def moved(sign: int) -> tuple[Natural, Variables]:
        if weights.reverse and weights.forward:
            step = swayed(
                family, natural, here.natural, here.mean, weights,
                known.shift.natural, known.shift.mean,
            )  # fmt: skip
            t = plus(natural, step, sign)
        else:
            t = _free(known, known.moved(sign), weights)
        return t, question.read(family, t, lead=1)

    how = "closed form" if not all(weights) else "Newton's method"
    return Solved(natural, variables, moved, 0.0, how)


def _free(known: Averages, at: Point, weights: Weights) -> Natural:
    if not weights.forward:
        known.family.check(at.natural)
        return at.natural
    forward = known.family.from_mean(at.mean)
    return balanced(known.family, at.natural, forward, weights) if weights.reverse else forward


def nearest(question: Question, model: Model, known: Averages, weights: Weights) -> Solved:
    """The law of a smaller family with the least risk: by Pythagoras, no draws are needed."""
    family = known.family
    chart, starts = _starts(question, model)

    def naturals(coordinates: Tensor) -> Natural:
        return family.natural(model.base(chart.point(coordinates)))

    def excess(at: Point) -> Callable[[Tensor], Tensor]:
        """Of the whole batch, as a function of the coordinates; one for each of many points."""
        measure, lead = towards(known, at, weights), at.to_reference.ndim
        lead -= known.here.to_reference.ndim

        def of(u: Tensor) -> Tensor:
            law = naturals(u[None])  # which adds an axis in place of the lead
            value = measure(law if lead else tuple(x[0] for x in law))
            return value.reshape(*value.shape[:lead], -1).sum(-1)

        return of

    found = minimise(excess(known.here), starts, tolerance=1e-14)
    at = found.point[None]
    sway = functools.cache(functools.partial(_sway, known, found, excess))

    def moved(sign: int) -> tuple[Natural, Variables]:
        u = found.point + sign * sway()
        return naturals(u), chart.point(u)

    variables = {name: x[0] for name, x in chart.point(at).items()}
    natural = tuple(x[0] for x in naturals(at))
    how = "minimised within the family"
    return Solved(natural, variables, moved, found.decrement, how)


def _starts(question: Question, model: Model) -> tuple[Chart, Tensor]:
    few = thinned(question.draws, 2**14)
    theta = {k: question.aligned(k, few[k].flatten(0, 1), model) for k in model.names}
    chart = chart_of(theta, model.law)
    drawn = chart.coordinates(theta)
    return chart, torch.stack([drawn.mean(0), drawn[0], drawn[-1]])


def _sway(known: Averages, found: Minimum, excess) -> Tensor:
    """How the minimum moves with each batch's shift, [batches, k]: −H⁻¹ by the slope's change."""
    ahead, back = (known.moved(sign) for sign in (1, -1))
    batches = range(len(ahead.to_reference))
    if len(found.point) <= len(batches):  # one backward pass for each coordinate
        change = _slopes(excess(ahead), found.point) - _slopes(excess(back), found.point)
    else:
        pairs = ((excess(ahead.row(i)), excess(back.row(i))) for i in batches)
        change = torch.cat([_slopes(a, found.point) - _slopes(b, found.point) for a, b in pairs])
    return found.inverse(-change) / 2


def _slopes(function: Callable[[Tensor], Tensor], point: Tensor) -> Tensor:
    leaf = point.detach().requires_grad_()
    with torch.enable_grad():
        outputs = function(leaf)
        if outputs.ndim:
            return slopes(outputs, leaf)
        return torch.autograd.grad(outputs, leaf)[0][None]


def judgement(question: Question, known: Averages) -> Judgement:
    """The tails and the worth of all that is averaged."""
    family, few = known.family, thinned(question.draws, _numbers(known))
    theta = {name: few[name].flatten(0, 1) for name in question.model.names}
    terms = family.terms(question.model.base(theta), known.reference)
    values, events = {}, {}
    for way, names, parts, gap, averaged in (
        ("reverse", family.names, terms.natural, terms.from_reference, known.here.natural),
        ("forward", family.mean_names, terms.mean, terms.to_reference, known.here.mean),
    ):
        if averaged:
            values |= dict(zip(names, parts, strict=True)) | {f"risk ({way})": gap}
            events |= dict(zip(names, family.events, strict=True))
    return judged(
        {name: x.unflatten(0, (few.chains, few.draws)) for name, x in values.items()}, few, events
    )


def _numbers(known: Averages) -> int:
    return max(x.numel() for x in known.reference)


def _refuse_without_mean(question: Question, known: Averages, seen: Judgement) -> None:
    for name, k in seen.without_mean().items():
        if name.startswith("risk"):
            continue
        forward = name in known.family.mean_names
        other = ("ReverseKL()", "natural") if forward else ("KL()", "mean")
        raise ValueError(
            f"The act under {question.divergence} does not exist: it averages {name}, whose "
            f"posterior mean is infinite, as far as {seen.draws:,} draws show (Pareto-k "
            f"{k.nan_to_num(0).max():.2f}, and 1 is too much). {other[0]} averages the "
            f"{other[1]} parameter instead; {WAYS_OUT}"
        )


def act_and_risk(
    question: Question, known: Averages, weights: Weights, found: Solved
) -> dict[tuple[str, Any], Mean]:
    """The risk and the parameters of an act, each with its error: all but the diagnostics."""
    family, plain = known.family, question.family
    assert plain is not None  # as weights are

    def outputs(at: Point, natural: Natural, variables: Variables) -> dict[Any, Tensor]:
        law = family.from_natural(natural)
        own = plain.natural(law)
        risk = least(known, at, weights) + towards(known, at, weights)(natural)
        return (
            {("risk", ""): question.total(risk)}
            | {("natural", i): x for i, x in enumerate(own)}
            | {("mean", i): x for i, x in enumerate(plain.mean(own))}
            | {("parameter", name): getattr(law, name) for name in family.parameters}
            | {("parameter", name): x for name, x in variables.items()}
        )

    values = outputs(known.here, found.natural, found.variables)
    above, below = (outputs(known.moved(sign), *found.moved(sign)) for sign in (1, -1))
    return {key: Mean(x, known.error((above[key] - below[key]) / 2)) for key, x in values.items()}


def _estimate(question, known: Averages, weights: Weights, found: Solved, seen) -> Answer:
    measured = act_and_risk(question, known, weights, found)
    unsure, endless = _unsure(question, seen)
    means = {
        key: Mean(x.value, masked(x.error, unsure[key[0] == "risk"]))
        for key, x in measured.items()
    }
    risk = means["risk", ""]
    risk = Mean(torch.where(endless, torch.inf, risk.value), risk.error)
    parameters = {key[1]: mean for key, mean in means.items() if key[0] == "parameter"}
    for key, name in (question.model.settings or {}).items():
        if isinstance(name, str):
            parameters.setdefault(key, parameters[name])
    act = Act(
        parameters,
        question.wrapped(known.family.from_natural(found.natural), found.variables),
        *(
            tuple(m for key, m in means.items() if key[0] == which)
            for which in ("natural", "mean")
        ),
        point=found.variables,
    )
    return Answer(
        question.model.text,
        question.divergence,
        act,
        risk,
        _diagnostics(question, known, seen, found),
        question,
    )


def _unsure(question: Question, seen: Judgement) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Where [*batch] no normal error holds, of the act and of the risk; where that is infinite."""
    act = risk = endless = torch.zeros(question.batch, dtype=torch.bool)
    for name, k in seen.pareto_k.items():
        if name.startswith("risk"):
            risk = risk | question.any(k >= NO_ERROR)
            endless = endless | question.any(seen.surely_infinite(name))
        else:
            act = act | question.any(k >= NO_ERROR)
    return (act, risk | act), endless


def _diagnostics(
    question: Question, known: Averages, seen: Judgement, found: Solved
) -> Diagnostics:
    draws = question.draws
    told = [label_switching(draws, question.model.names, question.batch)]
    few = thinned(draws, _numbers(known))
    return diagnosed(seen, draws, few, found.method, found.accuracy, told)

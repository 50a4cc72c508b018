"""The answer to a problem: in closed form, or minimised numerically."""

from dataclasses import replace

import torch

from rkl.bayes.answer import Act, Answer, Diagnostics
from rkl.bayes.diagnostics import (
    WAYS_OUT,
    Judgement,
    diagnose,
    diagnostics_of,
    label_switching,
    mean_of_diagnosed,
)
from rkl.bayes.families.regression import Regression
from rkl.bayes.identified import find_unidentified, sentences, without_unidentified
from rkl.bayes.loss.between import Intrinsic, between
from rkl.bayes.loss.expected import node_mass
from rkl.bayes.model import moving_edge, whole_parameters
from rkl.bayes.problem import Problem
from rkl.bayes.progress import working
from rkl.bayes.solve.closed import closed_act
from rkl.bayes.solve.numerical import NumericalAct, find_act, sort_components
from rkl.stats import Mean


def answer(problem: Problem) -> Answer:
    """The act, its risk and diagnostics."""
    _refuse_moving(problem)
    with working(f"the act under {problem.divergence}"):
        weights = problem.weights
        found = _minimise_loss(problem) if weights is None else closed_act(problem, weights)
        return _drop_unidentified(found)


def _drop_unidentified(estimate: Answer) -> Answer:
    """The estimate without values of what the reported distribution does not depend on."""
    problem, act, seen = estimate.problem, estimate.act, estimate.diagnostics
    named = problem.origins.keys() == set(problem.model.names)
    if (
        named
        and problem.weights is not None
        and not isinstance(problem.structure.base, Regression)
    ):
        return estimate  # each variable is a parameter of an exponential family
    mass = node_mass(problem.loss) if problem.weights is None else None
    found = find_unidentified(problem.law, dict(act.point), dict(problem.some.theta), mass)
    settings = problem.model.settings or {}
    variables = {key: name for name, key in problem.origins.items()}
    variables |= {key: name for key, name in settings.items() if isinstance(name, str)}
    told = sentences(found, estimate.labels)
    if not told:
        return estimate
    return replace(
        estimate,
        act=without_unidentified(act, found, variables),
        diagnostics=replace(seen, warnings=(*seen.warnings, *told)),
    )


def _refuse_moving(problem: Problem) -> None:
    """Refuse a loss that is infinite wherever supports differ, if they do."""
    law, divergence = problem.model.law(problem.few), problem.divergence
    edge = moving_edge(law)
    if not edge or isinstance(divergence, Intrinsic) or divergence.bounded:
        return
    raise ValueError(
        f"The support of {type(law).__name__} moves with its parameters ({edge} differs from draw "
        f"to draw), so the act under {divergence} is the edge of the posterior's support, "
        f"wherever the data lie; {_way_out_of_moving(problem)}"
    )


def _way_out_of_moving(problem: Problem) -> str:
    """What to ask instead where supports move: a loss that is finite between them, if any is."""
    laws = problem.some
    if between(Intrinsic(), laws.at(slice(0, 2)), laws.at(slice(0, 1))) is not None:
        return "use Intrinsic()."
    if whole_parameters(laws):
        return "use Intrinsic(), or the bounded JensenShannon()."
    return (
        "no other loss of rkl can be computed between these either: hold the edge fixed, with a "
        "number in place of the variable that moves it."
    )


def _minimise_loss(problem: Problem) -> Answer:
    """The act by minimisation, its errors from the influence of each draw."""
    draws = problem.draws
    found = sort_components(problem, find_act(problem.loss, problem.law))
    by_chain = (draws.chains, draws.draws)
    influence = {name: x.unflatten(0, by_chain) for name, x in found.influence.items()}
    losses = problem.losses(found.theta) if problem.batch else found.losses.reshape(by_chain)
    influence = {name: x for name, x in influence.items() if name not in found.whole}
    seen = diagnose({**influence, "risk": losses}, draws)
    _refuse_without_mean(problem, seen)
    parameters = {
        name: Mean(x, mean_of_diagnosed(name, influence[name], draws, seen).error)
        if name in influence
        else Mean(x, torch.full_like(x, torch.nan))
        for name, x in found.theta.items()
    }
    risk = mean_of_diagnosed("risk", losses, draws, seen)
    for key, name in (problem.model.settings or {}).items():
        if isinstance(name, str):
            parameters.setdefault(key, parameters[name])
    act = Act(parameters, problem.model.at(found.theta), point=found.theta)
    return Answer(
        problem.model.text,
        problem.divergence,
        act,
        risk,
        _diagnostics(problem, found, seen),
        problem,
    )


def _refuse_without_mean(problem: Problem, seen: Judgement) -> None:
    for name, k in seen.without_mean().items():
        if name != "risk":
            raise ValueError(
                f"The act under {problem.divergence} does not exist: the influence of a draw on "
                f"{name} has no posterior mean, as far as {seen.draws:,} draws show (Pareto-k "
                f"{k.nan_to_num(0).max():.2f}, and 1 is too much). "
                f"{WAYS_OUT}"
            )


def _diagnostics(problem: Problem, found: NumericalAct, seen: Judgement) -> Diagnostics:
    draws, how, told = problem.draws, found.accuracy, []
    if not how.converged:
        told.append("the optimiser did not converge")
    if how.agreeing < how.starts:
        told.append(f"only {how.agreeing} of {how.starts} starts reached the lowest risk")
    if found.whole:
        told.append(
            f"{', '.join(found.whole)} is a whole number and has no standard error; the errors of "
            "the other parameters assume that it is right"
        )
    nodes = f" over {how.nodes:,} nodes ({how.method})" if how.nodes else ", in closed form"
    switching = label_switching(draws, problem.model.names, problem.batch)
    accuracy = how.decrement + how.node_excess
    return diagnostics_of(seen, draws, draws, f"minimised{nodes}", accuracy, (switching, *told))

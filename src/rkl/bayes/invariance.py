"""A check that an estimate does not move when parameters, or data, are transformed."""

import dataclasses
import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributions import Distribution, TransformedDistribution
from torch.distributions.transforms import ExpTransform, Transform

from rkl.bayes.act import Estimate, answer
from rkl.bayes.answer import Answer
from rkl.bayes.compare import means_of
from rkl.bayes.draws import Draws
from rkl.bayes.loss.nodes import nodes_for
from rkl.bayes.model import Model, Theta, laws_of
from rkl.bayes.modes import LogDensity, density_mode
from rkl.bayes.problem import Problem, Variables
from rkl.bayes.regions import region
from rkl.bayes.solve.numerical import numerical_act
from rkl.bayes.tables import Table
from rkl.divergences import FDivergence
from rkl.stats import resample
from rkl.tables import Cell

PROB = 0.9  # of the regions and intervals that are compared


def check_invariance(
    estimate: Estimate,
    bijection: Mapping[str, Transform] | Transform,
    log_posterior: LogDensity | None = None,
) -> Table:
    """Estimate again under other names, transform back, and tabulate how far each answer moved.

    Beside the act and its region stand the posterior mean, the interval of highest density of
    every variable, and with ``log_posterior`` the posterior mode.

    Args:
        estimate: What is checked.
        bijection: Of the parameters: by the name of a variable, a transform from its values to
            their new names, such as {"sigma": ExpTransform().inv} for log sigma. Or of the data:
            one transform of an observation.
        log_posterior: As in ``compare``, for the mode.

    Returns:
        A table of the largest movement of any number, in posterior standard deviations.

    Raises:
        ValueError: The transform is no bijection, or names no variable.
        TypeError: It is no transform of torch.

    >>> from rkl.bayes import bayes_act
    >>> scale = torch.linspace(1, 3, 400, dtype=torch.float64).reshape(4, 100)
    >>> estimate = bayes_act({"sigma": scale}, "normal(loc=0, scale=sigma)")
    >>> table = check_invariance(estimate, {"sigma": torch.distributions.ExpTransform()})
    >>> table.rows[0][1] < 1e-10 < table.rows[2][1]
    True
    """
    if not isinstance(estimate, Estimate):
        raise TypeError(f"estimate must be an Estimate; got a {type(estimate).__name__}.")
    if log_posterior is not None and not callable(log_posterior):
        raise TypeError(f"log_posterior must be a callable; got {log_posterior!r}.")
    problem = estimate.problem
    if isinstance(bijection, Transform):
        _check({"the data": bijection})
        return _of_data(estimate, bijection)
    if not isinstance(bijection, Mapping):
        raise TypeError(
            "bijection must be a transform of torch, for the data, or a dict of them by the name "
            f"of a variable; got {bijection!r}."
        )
    if not bijection:
        raise ValueError("bijection must rename at least one variable; got none.")
    _check(bijection)
    for name in bijection:
        if name not in problem.model.names:
            names = ", ".join(problem.model.names)
            raise ValueError(f"bijection must name variables of {names}; got {name!r}.")
    return _of_parameters(estimate, bijection, log_posterior)


def _check(transforms: Mapping[str, Transform]) -> None:
    for name, transform in transforms.items():
        if not isinstance(transform, Transform):
            raise TypeError(f"bijection must hold transforms of torch; {name} is {transform!r}.")
        if not transform.bijective:
            raise ValueError(
                f"bijection must be one; that of {name}, {_spell(transform)}, is not."
            )


def _of_parameters(
    estimate: Estimate, bijection: Mapping[str, Transform], log_posterior: LogDensity | None
) -> Table:
    problem = estimate.problem
    renamed = _rename(problem, bijection)
    again = answer(renamed)

    def change_of(before: Variables, after: Variables) -> float:
        return _largest_change(
            problem, before, {k: _back(bijection, k, x) for k, x in after.items()}
        )

    sides = region(estimate, PROB).inside != region(again, PROB).inside
    rows: list[tuple[Cell, ...]] = [
        ("act", change_of(_variables_at(estimate), _variables_at(again))),
        ("region of the act (share of draws that change sides)", sides.double().mean().item()),
        ("posterior mean", change_of(means_of(problem), means_of(renamed))),
        ("interval of highest density", change_of(*_intervals(problem, renamed, bijection))),
    ]
    if log_posterior is not None:
        mode = density_mode(problem, log_posterior)
        other = density_mode(renamed, _transform_density(log_posterior, bijection))
        rows.append(("posterior mode", change_of(mode, other) if mode and other else None))
    names = ", ".join(f"{name} by {_spell(transform)}" for name, transform in bijection.items())
    return _table(estimate, names, rows)


def _rename(problem: Problem, bijection: Mapping[str, Transform]) -> Problem:
    draws, model = problem.draws, problem.model
    variables: dict[str, Tensor] = {name: draws[name] for name in draws.names}
    for name, transform in bijection.items():
        variables[name] = torch.as_tensor(transform(variables[name]))
        if not variables[name].isfinite().all():
            raise ValueError(
                f"bijection must be finite on all draws; {transform} is not on those of {name}."
            )

    def make(theta: Theta) -> Distribution:
        return model.make(Theta({k: _back(bijection, k, theta[k]) for k in model.names}))

    renamed = Model(
        *(f"{model.text}, renamed", model.names, make), events=model.events, places=model.places
    )
    return dataclasses.replace(problem, draws=Draws(variables, draws.weights), model=renamed)


def _variables_at(estimate: Answer) -> Variables:
    return {name: estimate.act[name] for name in estimate.problem.model.names}


def _back(bijection: Mapping[str, Transform], name: str, value: Tensor) -> Tensor:
    return torch.as_tensor(bijection[name].inv(value)) if name in bijection else value


def _transform_density(
    log_posterior: LogDensity, bijection: Mapping[str, Transform]
) -> LogDensity:
    def density(theta: Theta) -> Tensor:
        back = {name: _back(bijection, name, theta._drawn[name]) for name in theta}
        total = log_posterior(Theta(back))
        for name, transform in bijection.items():
            slope = transform.log_abs_det_jacobian(back[name], theta[name])
            total = total - slope.reshape(len(total), -1).sum(-1)
        return total

    return density


def _intervals(
    problem: Problem, renamed: Problem, bijection: Mapping[str, Transform]
) -> tuple[Variables, Variables]:
    """The shortest intervals before and after, with their ends in one order."""
    weights, before, after = problem.draws.weights, {}, {}
    rows = slice(None) if weights is None else resample(weights.flatten().log(), offset=0.5)
    for name, x in problem.theta.items():
        before[name] = _shortest(x[rows])
        ends = _shortest(renamed.theta[name][rows])
        falls = _back(bijection, name, ends[0]) > _back(bijection, name, ends[1])
        after[name] = torch.where(falls, ends.flip(0), ends)
    return before, after


def _shortest(x: Tensor) -> Tensor:
    """Both ends [2, ...] of the shortest interval that holds enough of the draws."""
    ordered = x.sort(0).values
    width = math.ceil(PROB * len(x)) - 1
    at = (ordered[width:] - ordered[: len(x) - width]).argmin(0, keepdim=True)
    return torch.cat([ordered.gather(0, at), ordered.gather(0, at + width)])


def _of_data(estimate: Estimate, transform: Transform) -> Table:
    problem, model = estimate.problem, estimate.problem.model

    def make(theta: Theta) -> Distribution:
        return TransformedDistribution(model.make(theta), [transform])

    renamed_model = Model(
        *(f"{model.text}, renamed", model.names, make), events=model.events, places=model.places
    )
    renamed = dataclasses.replace(problem, model=renamed_model)
    before, again = _variables_at(estimate), answer(renamed)
    sides = region(estimate, PROB).inside != region(again, PROB).inside
    rows: list[tuple[Cell, ...]] = [
        ("act", _largest_change(problem, before, _variables_at(again))),
        ("region of the act (share of draws that change sides)", sides.double().mean().item()),
    ]
    integrated = _act_on_nodes(renamed)
    if integrated is not None:
        rows.append(
            ("act, integrated over the new data", _largest_change(problem, before, integrated))
        )
    return _table(estimate, f"the data by {_spell(transform)}", rows)


def _act_on_nodes(problem: Problem) -> Variables | None:
    """The act by sums over nodes of the new data, the bijection left in place."""
    if not isinstance(problem.divergence, FDivergence):
        return None
    weights = problem.draws.weights
    weights = None if weights is None else weights.flatten()
    laws = laws_of(problem.theta, problem.model.law, weights)
    nodes = nodes_for(laws, problem.divergence, seed=problem.seed)
    if nodes.kind == "importance":
        return None
    return numerical_act(
        problem.theta, problem.model.law, problem.divergence, weights=weights, nodes=nodes
    ).theta


def _spell(transform: Transform) -> str:
    inverse = isinstance(transform, type(ExpTransform().inv))  # zuko renames the class
    return f"the inverse of {transform.inv}" if inverse else repr(transform)


def _largest_change(problem: Problem, before: Variables, after: Variables) -> float:
    changes = []
    for name, x in problem.theta.items():
        spread = x.std(0)
        change = (after[name] - before[name]).abs() / torch.where(spread > 0, spread, 1.0)
        changes.append(change.nan_to_num(0.0).max().item())  # nan: of no influence
    return max(changes)


def _table(estimate: Estimate, names: str, rows: list[tuple[Cell, ...]]) -> Table:
    title = f"Movement of the estimates under {estimate.divergence} when renamed: {names}"
    return Table(title, ("estimate", "moved (posterior sd)"), rows)

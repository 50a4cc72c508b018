"""Modes of the posterior density, which move with the coordinates, and one that does not."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions.transforms import ExpTransform, SigmoidTransform, Transform

from rkl.bayes.families import Natural
from rkl.bayes.model import Theta, probe
from rkl.bayes.problem import Problem, Variables
from rkl.bayes.solve.unconstrained import Chart, chart_of, minimise, scale_of

LogDensity = Callable[[Theta], Tensor]
Bends = Mapping[str, Transform]
MAX_DRAWS = 2**12  # draws of which the densest are where a maximiser starts


class Modes(NamedTuple):
    """Estimates by name, and what was left out and why."""

    found: dict[str, Variables]
    notes: tuple[str, ...]


def modes(problem: Problem, log_posterior: LogDensity | str | None) -> Modes:
    """The posterior mode in two parametrisations, and Wallace and Freeman's estimate.

    Raises:
        ValueError: ``log_posterior`` names no variable, or gives no log densities.
    """
    if log_posterior is None:
        why = (
            "they need log_posterior=, a function of theta or the name of a variable such as lp; "
            "on the command line --log-posterior lp"
        )
        return Modes({}, (f"MAP and Wallace–Freeman are left out: {why}.",))
    if isinstance(log_posterior, str):
        return _of_variable(problem, log_posterior)
    if not callable(log_posterior):
        raise TypeError(
            f"log_posterior must be a callable or the name of a variable; got {log_posterior!r}."
        )
    return _of_function(problem, log_posterior)


def _of_variable(problem: Problem, name: str) -> Modes:
    draws = problem.draws
    if draws.shape(name):
        raise ValueError(f"{name} must be one log density a draw; got {list(draws.shape(name))}.")
    theta = {key: draws[key].flatten(0, 1) for key in problem.model.names}
    note = (
        f"{name} is a density in whichever coordinates it was written (of Stan, PyMC and NumPyro "
        "unconstrained ones); its highest draw is near the mode in these alone. For the mode in "
        "two parametrisations, and Wallace–Freeman, log_posterior= must be a function of theta."
    )
    return Modes({f"draw of highest {name}": _row(problem, theta, draws[name].flatten())}, (note,))


def _densest(problem: Problem, evaluated: "_Seen", bends: Bends) -> dict[str, Variables]:
    """The draw of highest density, and that of highest density in other coordinates."""
    name, theta = "draw of highest log_posterior", evaluated.theta
    points = {name: _row(problem, theta, evaluated.density)}
    if bends:
        bent = evaluated.density + _log_slope(bends, theta)
        points[f"{name}, in {_spell(theta, bends)}"] = _row(problem, theta, bent)
    return points


def _row(problem: Problem, theta: Mapping[str, Tensor], density: Tensor) -> Variables:
    i = int(density.argmax())
    names = problem.model.names
    return {name: problem.align(name, theta[name][i : i + 1])[0] for name in names}


class _Seen(NamedTuple):
    """Draws of the variables that a density reads, and its logarithm at them."""

    theta: dict[str, Tensor]
    density: Tensor


def _evaluate(problem: Problem, log_posterior: LogDensity, most: int | None = None) -> _Seen:
    """A density at all draws, or at ``most`` of them, evenly spread."""
    draws = problem.draws
    shown = Theta(probe(draws, draws.names, unread=True))
    try:
        log_density = log_posterior(shown)
    except KeyError as error:
        raise ValueError(f"log_posterior cannot take the draws: {error.args[0]}.") from error
    _check_density(log_density, len(next(iter(shown._drawn.values()))))
    names = [name for name in draws.names if name in shown._seen | {*problem.model.names}]
    subsample = draws if most is None else draws.every(-(-draws.chains * draws.draws // most))
    theta = {name: subsample[name].flatten(0, 1) for name in names}
    return _Seen(theta, _check_density(log_posterior(Theta(theta)), len(theta[names[0]])).detach())


def density_mode(problem: Problem, log_posterior: LogDensity) -> Variables:
    """The mode of a density in the variables as they are named; empty if there is none.

    Raises:
        RuntimeError: Autograd finds no way from the density back to the variables.
    """
    evaluated = _evaluate(problem, log_posterior, MAX_DRAWS)
    return _maximum(problem, log_posterior, evaluated)


def _of_function(problem: Problem, log_posterior: LogDensity) -> Modes:
    evaluated = _evaluate(problem, log_posterior, MAX_DRAWS)
    bends = _bends(problem, evaluated.theta)
    targets: dict[str, LogDensity] = {f"MAP in {_spell(evaluated.theta, {})}": log_posterior}
    if bends:
        bent = lambda t: log_posterior(t) + _log_slope(bends, t)  # noqa: E731
        targets[f"MAP in {_spell(evaluated.theta, bends)}"] = bent
    fisher, why = _log_fisher(problem, list(evaluated.theta))
    if fisher is not None:
        targets["Wallace–Freeman"] = lambda t: log_posterior(t) - fisher(t) / 2
    notes = [] if why is None else [f"Wallace–Freeman is left out: {why}."]
    try:
        maxima = {name: _maximum(problem, f, evaluated) for name, f in targets.items()}
    except RuntimeError:  # autograd finds no way back to theta
        note = "log_posterior is not differentiable: its highest draws stand for its modes."
        return Modes(_densest(problem, _evaluate(problem, log_posterior), bends), (note,))
    notes += [f"{name} is left out: there is no mode." for name in maxima if not maxima[name]]
    return Modes({name: at for name, at in maxima.items() if at}, tuple(notes))


def _check_density(density: Tensor, rows: int) -> Tensor:
    if not isinstance(density, Tensor) or density.shape != (rows,) or density.isnan().any():
        got = list(density.shape) if isinstance(density, Tensor) else repr(density)
        raise ValueError(
            f"log_posterior must give {rows} log densities for {rows} draws; got {got}."
        )
    return density


def _maximum(problem: Problem, target: LogDensity, evaluated: _Seen) -> Variables:
    """The variables of the family at the maximum; None where it diverges."""
    chart = _chart(problem, evaluated.theta)
    drawn = chart.coordinates(evaluated.theta)
    starts = drawn[evaluated.density.topk(min(3, len(drawn))).indices]
    scale = scale_of(drawn)  # the elements of a vector may have units of their own
    minimum = minimise(lambda t: -target(Theta(chart.point(t[None])))[0], starts, scale=scale)
    if not minimum.converged or minimum.point.abs().max() > 1e3:
        return {}
    at = chart.point(minimum.point[None])
    return {name: problem.align(name, at[name])[0].detach() for name in problem.model.names}


def _chart(problem: Problem, theta: Mapping[str, Tensor]) -> Chart:
    """Coordinates of the variables of a density: from the family, for others from the draws."""
    variables = {name: theta[name] for name in problem.model.names}
    rest = {name: x for name, x in theta.items() if name not in variables}
    of_family = chart_of(variables, problem.law, posterior=True).parts
    coordinates = {**of_family, **chart_of(rest).parts}
    return Chart({name: coordinates[name] for name in theta})


def _bends(problem: Problem, theta: Mapping[str, Tensor]) -> Bends:
    parts = _chart(problem, theta).parts
    return {
        name: part.transform
        for name, part in parts.items()
        if isinstance(part.transform, ExpTransform | SigmoidTransform)
    }


def _log_slope(bends: Bends, theta: Mapping[str, Tensor]) -> Tensor:
    """Log |dθ/du| [n] of the coordinates u: what turns a density of θ into one of u."""
    each = (
        bend.log_abs_det_jacobian(bend.inv(theta[name]), theta[name]).reshape(len(theta[name]), -1)
        for name, bend in bends.items()
    )
    return torch.cat(list(each), -1).sum(-1)


def _spell(theta: Mapping[str, Tensor], bends: Bends) -> str:
    words = {ExpTransform: "log ", SigmoidTransform: "logit "}
    return ", ".join(f"{words[type(bends[k])] if k in bends else ''}{k}" for k in theta)


def _log_fisher(problem: Problem, names: list[str]) -> tuple[LogDensity | None, str | None]:
    """Log det of the Fisher information about the variables, of one row, or why it is unknown."""
    family, model = problem.family, problem.model
    if family is None:
        return None, "the Fisher information of this family is not known"
    if {*names} != {*model.names}:
        return None, "log_posterior looks at variables that the family lacks"

    def partition(theta: Mapping[str, Tensor], mean: Natural | None) -> tuple[Tensor, Natural]:
        """A(η) − ⟨η, m⟩ and ∇A(η): the information is the former's curvature where m = ∇A."""
        natural = family.natural(model.base(theta))
        # what is fixed is constant to autograd, yet has a mean parameter
        natural = tuple(
            x * 1.0 if x.requires_grad else x.clone().requires_grad_() for x in natural
        )
        total = family.log_partition(natural).sum()
        means = torch.autograd.grad(total, natural, create_graph=True, materialize_grads=True)
        return total if mean is None else total - family.inner(natural, mean).sum(), means

    def of(theta: Mapping[str, Tensor]) -> Tensor:
        with torch.enable_grad():
            again = {name: theta[name] * 1.0 for name in names}
            total, _ = partition(again, partition({k: theta[k] * 1.0 for k in names}, None)[1])
            leaves = tuple(again.values())
            slope = _flat(torch.autograd.grad(total, leaves, create_graph=True))
            rows = [
                _flat(torch.autograd.grad(x, leaves, create_graph=True, materialize_grads=True))
                for x in slope
            ]
        return torch.stack(rows).slogdet().logabsdet[None]

    one = {name: x[:1].detach().requires_grad_() for name, x in problem.few.items()}
    if not of(one).isfinite().all():
        return None, f"{', '.join(names)} hold more numbers than the family has parameters"
    return of, None


def _flat(parts: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([part.flatten() for part in parts])

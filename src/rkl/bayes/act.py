"""The Bayes act: the distribution of a family that is closest to the posterior on average."""

import reprlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rkl.bayes.answer import Act, Answer, Diagnostics
from rkl.bayes.compare import compare
from rkl.bayes.diagnostics import (
    WAYS_OUT,
    Judgement,
    diagnose,
    diagnostics_of,
    label_switching,
    mean_of_diagnosed,
)
from rkl.bayes.draws import (
    Draws,
    divided_by_sums,
    read_draws,
    rounded_simplexes,
    with_exact_simplexes,
)
from rkl.bayes.families.regression import Regression
from rkl.bayes.identified import find_unidentified, sentences, without_unidentified
from rkl.bayes.loss.between import Intrinsic, between, check_loss
from rkl.bayes.loss.expected import node_mass
from rkl.bayes.model import (
    PROBE,
    Model,
    family_in,
    moving_edge,
    read_family,
    whole_parameters,
)
from rkl.bayes.problem import Problem
from rkl.bayes.regions import Region, region
from rkl.bayes.report import posterior_figure
from rkl.bayes.solve.closed import closed_act
from rkl.bayes.solve.numerical import (
    NumericalAct,
    find_act,
    same_density,
    sort_components,
)
from rkl.bayes.solve.streaming import MovingFamilyError, check_domain, refuse_other_families
from rkl.bayes.tables import Table
from rkl.checks import integer
from rkl.divergences import ReverseKL
from rkl.runs.progress import working
from rkl.stats import Mean

if TYPE_CHECKING:
    from rkl.plots import Figure

NO_SUM = 0.99  # of what must be 1: below it, so that probabilities remain such


@dataclass(frozen=True, eq=False, repr=False)
class Estimate(Answer):
    """A Bayes act, its risk and diagnostics: the result of :func:`rkl.bayes.bayes_act`.

    Attributes:
        family: The family, as text.
        divergence: The loss.
        act: The reported distribution, by its parameters.
        risk: The posterior mean of the loss at the act, in nats, [*batch].
        diagnostics: Effective draws, tails and warnings.
        problem: The posterior, the family and the loss, for comparisons and regions.
    """

    def compare(
        self,
        log_posterior: Callable[[Mapping[str, Tensor]], Tensor] | str | None = None,
        losses: Iterable[Any] | None = None,
    ) -> Table:
        """A table of all common estimates with their excess risks: see ``compare``."""
        return compare(self, answer, log_posterior, losses)

    def region(self, prob: float = 0.9) -> Region:
        """The draws that are closest to the act, together of posterior probability ``prob``."""
        return region(self, prob)

    def plot(self, prob: float = 0.9) -> "Figure":
        """Every marginal posterior with the common estimates marked and the region shaded."""
        return posterior_figure(self, self.compare(), self.region(prob))


def bayes_act(
    draws: Any,
    family: Any,
    divergence: Any = ReverseKL(),
    *,
    weights: Any = None,
    design: Any = None,
    compiled: bool | None = None,
    seed: int = 0,
) -> Estimate:
    r"""The Bayes act argmin over t of E[D(P_θ ‖ P_t) | data].

    With ReverseKL its natural parameter is the posterior mean of the natural parameter, with KL
    its mean parameter that of the mean parameter: neither depends on how the family is
    parametrised. Any other divergence is minimised numerically. The act depends on which
    experiment the loss is about: eight schools again, or a ninth.

    Source: Brand (2017), arXiv 1707.06366.

    Args:
        draws: The posterior: whatever :func:`rkl.bayes.read_draws` reads.
        family: The distribution of one experiment, given the parameters: a text such as
            "normal(loc=mu, scale=sigma)", a class of torch.distributions whose parameters are
            called as the draws are, or a callable from theta, n draws by name, to n distributions.
        divergence: The loss, D(posterior draw ‖ act).
        weights: Weight of every draw, [chains, draws].
        design: Given to a callable as its second argument, or to a regression.
        compiled: Compile the pass over the draws; by default where this saves time.
        seed: Random seed, for families whose divergences are estimated from samples.

    Returns:
        The act with its errors, its risk in nats, and diagnostics.

    Raises:
        ValueError: The draws, the family or the act itself do not exist; the message says why.
        TypeError: An argument is of the wrong kind.

    >>> import torch
    >>> generator = torch.Generator().manual_seed(0)
    >>> scale = 1 + torch.rand(4, 1000, generator=generator, dtype=torch.float64)
    >>> estimate = bayes_act({"sigma": scale}, "normal(loc=0, scale=sigma)")
    >>> torch.allclose(estimate.act["sigma"], scale.pow(-2).mean().rsqrt())
    True
    """
    check_loss(divergence)
    integer("seed", seed)
    posterior, model = _with_family(family, read_draws(draws, weights), design)
    try:
        result = answer(Problem(posterior, model, divergence, compiled, seed))
    except ValueError as error:
        if where := _first_invalid_draw(model, posterior):
            first, _, _ = str(error).partition("\n")
            raise ValueError(f"{first} {where}") from error
        raise
    return Estimate(**vars(result))


def _with_family(family: Any, draws: Draws, design: Any) -> tuple[Draws, Model]:
    """The family, and the draws with the rounded simplexes that it takes divided by their sums."""
    try:
        model = read_family(family, draws, design)
    except ValueError:  # a function may refuse a rounded simplex by itself
        rounded = rounded_simplexes(draws, draws.names)
        if not rounded:
            raise
        model = read_family(family, divided_by_sums(draws, rounded), design)
    rounded = [x for x in rounded_simplexes(draws, model.names) if _takes_simplex(model, x)]
    exact = with_exact_simplexes(draws, rounded)
    return exact, read_family(family, exact, design)


def _takes_simplex(model: Model, name: str) -> bool:
    """True if only the ratios of a vector matter to the family, or if it refuses other sums."""
    few = dict(model.few or {})
    if name not in few:
        return False
    exact = few[name] / few[name].sum(-1, keepdim=True)
    try:
        laws = [model.law({**few, name: x}) for x in (exact, NO_SUM * exact)]
    except ValueError:
        return True
    return same_density(*laws)


def answer(problem: Problem) -> Answer:
    """The act, its risk and diagnostics."""
    _refuse_moving(problem)
    with working(f"the act under {problem.divergence}"):
        weights, model = problem.weights, problem.model
        try:
            if weights is None and problem.family is not None:
                refuse_other_families(problem.draws, model.bare, model.names, problem.family)
            result = _minimise_loss(problem) if weights is None else closed_act(problem, weights)
        except MovingFamilyError as moved:
            again = problem.with_draw(moved.chain, moved.draw)
            if again.family == problem.family:
                raise
            return answer(again)
        return _drop_unidentified(result)


def _drop_unidentified(estimate: Answer) -> Answer:
    problem, act, diagnostics = estimate.problem, estimate.act, estimate.diagnostics
    named = problem.origins.keys() == set(problem.model.names)
    if (
        named
        and problem.weights is not None
        and not isinstance(problem.structure.base, Regression)
    ):
        return estimate  # each variable is a parameter of an exponential family
    mass = node_mass(problem.loss) if problem.weights is None else None
    unidentified = find_unidentified(problem.law, dict(act.point), dict(problem.some.theta), mass)
    settings = problem.model.settings or {}
    variables = {key: name for name, key in problem.origins.items()}
    variables |= {key: name for key, name in settings.items() if isinstance(name, str)}
    warnings = sentences(unidentified, estimate.labels)
    if not warnings:
        return estimate
    return replace(
        estimate,
        act=without_unidentified(act, unidentified, variables),
        diagnostics=replace(diagnostics, warnings=(*diagnostics.warnings, *warnings)),
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
    draws = problem.draws
    minimum = sort_components(problem, find_act(problem.loss, problem.law))
    by_chain = (draws.chains, draws.draws)
    influence = {name: x.unflatten(0, by_chain) for name, x in minimum.influence.items()}
    losses = problem.losses(minimum.theta) if problem.batch else minimum.losses.reshape(by_chain)
    influence = {name: x for name, x in influence.items() if name not in minimum.whole}
    judgement = diagnose({**influence, "risk": losses}, draws)
    _refuse_without_mean(problem, judgement)
    parameters = {
        name: Mean(x, mean_of_diagnosed(name, influence[name], draws, judgement).error)
        if name in influence
        else Mean(x, torch.full_like(x, torch.nan))
        for name, x in minimum.theta.items()
    }
    risk = mean_of_diagnosed("risk", losses, draws, judgement)
    at_act = problem.loss.laws.of({name: x[None] for name, x in minimum.theta.items()})
    risk = Mean(risk.value, risk.error.hypot(problem.sampling_error(problem.loss, at_act)))
    for key, name in (problem.model.settings or {}).items():
        if isinstance(name, str):
            parameters.setdefault(key, parameters[name])
    act = Act(parameters, problem.model.at(minimum.theta), point=minimum.theta)
    return Answer(
        problem.model.text,
        problem.divergence,
        act,
        risk,
        _diagnostics(problem, minimum, judgement),
        problem,
    )


def _refuse_without_mean(problem: Problem, judgement: Judgement) -> None:
    for name, k in judgement.without_mean().items():
        if name != "risk":
            raise ValueError(
                f"The act under {problem.divergence} does not exist: the influence of a draw on "
                f"{name} has no posterior mean, as far as {judgement.draws:,} draws show "
                f"(Pareto-k {k.nan_to_num(0).max():.2f}, and 1 is too much). "
                f"{WAYS_OUT}"
            )


def _diagnostics(problem: Problem, minimum: NumericalAct, judgement: Judgement) -> Diagnostics:
    draws, how, warnings = problem.draws, minimum.accuracy, []
    if not how.converged:
        warnings.append("the optimiser did not converge")
    if how.agreeing < how.starts:
        warnings.append(f"only {how.agreeing} of {how.starts} starts reached the lowest risk")
    if minimum.whole:
        warnings.append(
            f"{', '.join(minimum.whole)} is a whole number and has no standard error; the "
            "errors of the other parameters assume that it is right"
        )
    nodes = f" over {how.nodes:,} nodes ({how.method})" if how.nodes else ", in closed form"
    switching = label_switching(draws, problem.model.names, problem.batch)
    accuracy = how.decrement + how.node_excess
    return diagnostics_of(
        judgement, draws, draws, f"minimised{nodes}", accuracy, (switching, *warnings)
    )


def _first_invalid_draw(model: Model, draws: Draws) -> str | None:
    for chain, part, chunk in draws.chunks(model.names):
        if _is_valid(model, chunk):
            continue
        first, last = 0, part.stop - part.start
        if not any(_is_valid(model, _rows(chunk, i, i + 1)) for i in range(min(last, PROBE))):
            return None
        while last - first > 1:
            middle = (first + last) // 2
            good = _is_valid(model, _rows(chunk, first, middle))
            first, last = (middle, last) if good else (first, middle)
        values = {name: x.tolist() for name, x in _rows(chunk, first, first + 1).items()}
        parameters = ", ".join(f"{name} = {reprlib.repr(x[0])}" for name, x in values.items())
        return f"See chain {chain}, draw {part.start + first}: {parameters}."
    return None


def _rows(chunk: Mapping[str, Tensor], first: int, last: int) -> dict[str, Tensor]:
    return {name: x[first:last] for name, x in chunk.items()}


def _is_valid(model: Model, theta: Mapping[str, Tensor]) -> bool:
    try:
        law = model.base(theta)
        check_domain(law)
        if family := family_in(law):
            family.check(family.natural(law))
    except (RuntimeError, ValueError):
        return False
    return True

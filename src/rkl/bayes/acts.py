"""The Bayes act: the one law of a family that is closest to the posterior on average."""

import reprlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rkl.bayes.averages import (
    NO_ERROR,
    WAYS_OUT,
    Judgement,
    diagnosed,
    judged,
    label_switching,
    masked,
    mean_of,
)
from rkl.bayes.blocks import check_domain
from rkl.bayes.components import sort_components
from rkl.bayes.draws import Draws, read_draws, with_exact_simplexes
from rkl.bayes.estimate import Act, Diagnostics, Estimate
from rkl.bayes.families.regression import Regression
from rkl.bayes.generic import GenericAct, least_act
from rkl.bayes.identified import sentences, unidentified, without_unidentified
from rkl.bayes.laws import PROBE, Model, family_in, moving_edge, read_family
from rkl.bayes.losses import Intrinsic, between, check_loss, node_mass
from rkl.bayes.progress import working
from rkl.bayes.pythagoras import closed_act
from rkl.bayes.questions import Question
from rkl.bayes.whole import whole_parameters
from rkl.divergences import ReverseKL
from rkl.metrics import Mean


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
        family: The law of an experiment, given the parameters: a text such as
            "normal(loc=mu, scale=sigma)", a class of torch.distributions whose parameters are
            called as the draws are, or a callable from theta, n draws by name, to n laws.
        divergence: The loss, D(posterior draw ‖ act).
        weights: Weight of every draw, [chains, draws].
        design: Given to a callable as its second argument, or to a regression.
        compiled: Whether to compile the pass over the draws; by default where it pays.
        seed: Of the random numbers of a family whose divergences need some.

    Returns:
        The act with its errors, its risk in nats, and how far these can be trusted.

    Raises:
        ValueError: The draws, the family or the act itself do not exist; the message says why.
        TypeError: An argument is of the wrong kind.

    >>> generator = torch.Generator().manual_seed(0)
    >>> scale = 1 + torch.rand(4, 1000, generator=generator, dtype=torch.float64)
    >>> estimate = bayes_act({"sigma": scale}, "normal(loc=0, scale=sigma)")
    >>> torch.allclose(estimate.act["sigma"], scale.pow(-2).mean().rsqrt())
    True
    """
    check_loss(divergence)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an integer; got {seed!r}.")
    held = with_exact_simplexes(read_draws(draws, weights))
    model = read_family(family, held, design)
    try:
        return answer(Question(held, model, divergence, compiled, seed))
    except ValueError as error:
        if where := _astray(model, held):
            first, _, _ = str(error).partition("\n")
            raise ValueError(f"{first} {where}") from error
        raise


def answer(question: Question) -> Estimate:
    """The act of a question that is put already."""
    _refuse_moving(question)
    with working(f"the act under {question.divergence}"):
        weights = question.weights
        found = _optimised(question) if weights is None else closed_act(question, weights)
        return _identified(found)


def _identified(estimate: Estimate) -> Estimate:
    """The estimate without values of what the reported distribution does not depend on."""
    question, act, seen = estimate.question, estimate.act, estimate.diagnostics
    named = question.origins.keys() == set(question.model.names)
    # a family gives its own parameters one of the values that mean the same, as logits
    canonical = named and question.weights is not None
    regression = isinstance(question.unwrapped.base, Regression)
    some = question.some.theta
    mass = node_mass(question.loss) if question.weights is None else None
    found = unidentified(
        question.law, dict(act.point), dict(some), regression or not canonical, mass
    )
    settings = question.model.settings or {}
    variables = {key: name for name, key in question.origins.items()}
    variables |= {key: name for key, name in settings.items() if isinstance(name, str)}
    told = sentences(found, estimate.labels)
    if not told:
        return estimate
    return replace(
        estimate,
        act=without_unidentified(act, found, variables),
        diagnostics=replace(seen, warnings=(*seen.warnings, *told)),
    )


def _astray(model: Model, draws: Draws) -> str | None:
    """The first draw that makes no law of the family, where others do."""
    for chain, part, chunk in draws.chunks(model.names):
        if _makes(model, chunk):
            continue
        first, last = 0, part.stop - part.start
        if not any(_makes(model, _rows(chunk, i, i + 1)) for i in range(min(last, PROBE))):
            return None
        while last - first > 1:
            middle = (first + last) // 2
            good = _makes(model, _rows(chunk, first, middle))
            first, last = (middle, last) if good else (first, middle)
        values = {name: x.tolist() for name, x in _rows(chunk, first, first + 1).items()}
        said = ", ".join(f"{name} = {reprlib.repr(x[0])}" for name, x in values.items())
        return f"See chain {chain}, draw {part.start + first}: {said}."
    return None


def _rows(chunk: Mapping[str, Tensor], first: int, last: int) -> dict[str, Tensor]:
    return {name: x[first:last] for name, x in chunk.items()}


def _makes(model: Model, theta: Mapping[str, Tensor]) -> bool:
    """Whether these draws make laws that are inside their family."""
    try:
        law = model.base(theta)
        check_domain(law)
        if family := family_in(law):
            family.check(family.natural(law))
    except (RuntimeError, ValueError):
        return False
    return True


def _refuse_moving(question: Question) -> None:
    """Refuse a loss that is infinite wherever supports differ, if they do."""
    divergence = question.divergence
    if isinstance(divergence, Intrinsic) or divergence.bounded:
        return
    law = question.model.law(question.few)
    if edge := moving_edge(law):
        kind = type(law).__name__
        raise ValueError(
            f"The support of {kind} moves with its parameters ({edge} differs from draw to "
            f"draw), so the act under {divergence} is the edge of the posterior's support, "
            f"wherever the data lie; {_way_out_of_moving(question)}"
        )


def _way_out_of_moving(question: Question) -> str:
    """What to ask instead where supports move: a loss that is finite between them, if any is."""
    laws = question.some
    if between(Intrinsic(), laws.at(slice(0, 2)), laws.at(slice(0, 1))) is not None:
        return "use Intrinsic()."
    if whole_parameters(laws):
        return "use Intrinsic(), or the bounded JensenShannon()."
    return (
        "no other loss of rkl can be computed between these either: hold the edge fixed, with a "
        "number in place of the variable that moves it."
    )


def _optimised(question: Question) -> Estimate:
    """The act by minimisation, its errors from the influence of each draw."""
    draws = question.draws
    found = sort_components(question, least_act(question.loss, question.law))
    by_chain = (draws.chains, draws.draws)
    influence = {name: x.unflatten(0, by_chain) for name, x in found.influence.items()}
    losses = question.losses(found.theta) if question.batch else found.losses.reshape(by_chain)
    influence = {name: x for name, x in influence.items() if name not in found.whole}
    seen = judged({**influence, "risk": losses}, draws)
    _refuse_without_mean(question, seen)
    parameters = {
        name: Mean(
            x, masked(mean_of(influence[name], draws).error, seen.pareto_k[name] >= NO_ERROR)
        )
        if name in influence
        else Mean(x, torch.full_like(x, torch.nan))
        for name, x in found.theta.items()
    }
    k = seen.pareto_k["risk"]
    risk = mean_of(losses, draws)
    risk = Mean(
        torch.where(seen.surely_infinite("risk"), torch.inf, risk.value),
        masked(risk.error, k >= NO_ERROR),
    )
    for key, name in (question.model.settings or {}).items():
        if isinstance(name, str):
            parameters.setdefault(key, parameters[name])
    act = Act(parameters, question.model.at(found.theta), point=found.theta)
    return Estimate(
        question.model.text,
        question.divergence,
        act,
        risk,
        _diagnostics(question, found, seen),
        question,
    )


def _refuse_without_mean(question: Question, seen: Judgement) -> None:
    for name, k in seen.without_mean().items():
        if name != "risk":
            raise ValueError(
                f"The act under {question.divergence} does not exist: the influence of a draw on "
                f"{name} has no posterior mean, as far as {seen.draws:,} draws show (Pareto-k "
                f"{k.nan_to_num(0).max():.2f}, and 1 is too much). "
                f"{WAYS_OUT}"
            )


def _diagnostics(question: Question, found: GenericAct, seen: Judgement) -> Diagnostics:
    draws, how, told = question.draws, found.accuracy, []
    if not how.converged:
        told.append("the minimiser stopped before it came to rest")
    if how.agreeing < how.starts:
        told.append(f"only {how.agreeing} of {how.starts} starts came to the same risk")
    if found.whole:
        told.append(
            f"{', '.join(found.whole)} is a whole number and has no standard error; those of the "
            "other parameters are given that it is right"
        )
    nodes = f" over {how.nodes:,} nodes ({how.method})" if how.nodes else ", in closed form"
    switching = label_switching(draws, question.model.names, question.batch)
    accuracy = how.decrement + how.node_excess
    return diagnosed(seen, draws, draws, f"minimised{nodes}", accuracy, (switching, *told))

"""The Bayes act: the one law of a family that is closest to the posterior on average."""

from typing import Any

import torch

from rkl.bayes.averages import (
    NO_ERROR,
    NO_MEAN,
    Judgement,
    diagnosed,
    exchanged,
    judged,
    masked,
    mean_of,
)
from rkl.bayes.draws import read_draws
from rkl.bayes.estimate import Act, Diagnostics, Estimate
from rkl.bayes.generic import GenericAct, generic_act
from rkl.bayes.laws import moving_edge, read_family
from rkl.bayes.losses import Intrinsic
from rkl.bayes.pythagoras import closed_act
from rkl.bayes.questions import Question
from rkl.divergences import Divergence, ReverseKL
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
    if not isinstance(divergence, Divergence | Intrinsic):
        raise TypeError(f"divergence must be one, such as rkl.ReverseKL(); got {divergence!r}.")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an integer; got {seed!r}.")
    held = read_draws(draws, weights)
    model = read_family(family, held, design)
    return answer(Question(held, model, divergence, compiled, seed))


def answer(question: Question) -> Estimate:
    """The act of a question that is put already."""
    _refuse_moving(question)
    return (
        _optimised(question)
        if question.weights is None
        else closed_act(question, question.weights)
    )


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
            "wherever the data lie; use Intrinsic()."
        )


def _optimised(question: Question) -> Estimate:
    """The act by minimisation, its errors from the influence of each draw."""
    draws, weights = question.draws, question.draws.weights
    found = generic_act(
        question.theta,
        question.law,
        question.divergence,
        weights=None if weights is None else weights.flatten(),
        seed=question.seed,
    )
    by_chain = (draws.chains, draws.draws)
    influence = {name: x.unflatten(0, by_chain) for name, x in found.influence.items()}
    losses = question.losses(question.expected(question.divergence), found.theta)
    seen = judged({**influence, "risk": losses}, draws)
    _refuse_without_mean(question, seen)
    parameters = {
        name: Mean(
            x, masked(mean_of(influence[name], draws).error, seen.pareto_k[name] >= NO_ERROR)
        )
        for name, x in found.theta.items()
    }
    k = seen.pareto_k["risk"]
    risk = mean_of(losses, draws)
    risk = Mean(
        torch.where(k >= NO_MEAN, torch.inf, risk.value), masked(risk.error, k >= NO_ERROR)
    )
    for key, name in (question.model.settings or {}).items():
        if isinstance(name, str):
            parameters.setdefault(key, parameters[name])
    act = Act(parameters, question.model.at(found.theta))
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
                f"{name} has no posterior mean (Pareto-k {k.max():.2f}, and 1 is too much)."
            )


def _diagnostics(question: Question, found: GenericAct, seen: Judgement) -> Diagnostics:
    draws, how, told = question.draws, found.accuracy, []
    if not how.converged:
        told.append("the minimiser stopped before it came to rest")
    if how.agreeing < how.starts:
        told.append(f"only {how.agreeing} of {how.starts} starts came to the same risk")
    nodes = f" over {how.nodes:,} nodes ({how.method})" if how.nodes else ", in closed form"
    switching = exchanged(draws, question.model.names, question.batch)
    accuracy = how.decrement + how.node_excess
    return diagnosed(seen, draws, draws, f"minimised{nodes}", accuracy, (switching, *told))

"""Keeps the best parameters since maximum likelihood, by a paired estimate of the divergence."""

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from rkl.divergences import FDivergence, PrecisionRecall
from rkl.divergences.base import combine, weighted_terms
from rkl.estimators import monte_carlo
from rkl.flows.architectures import draw
from rkl.flows.critic import Ratio
from rkl.flows.training import Moment
from rkl.randomness import random_numbers

LogProb = Callable[..., Tensor]
LOST = 0.5  # share of log-ratios cut off, from which on a critic is said to have collapsed


def slope_of(divergence: FDivergence) -> float:
    """The slope λ of the divergence; of a sum, the one farthest from 1; 1 without any.

    >>> from rkl import PrecisionHalf
    >>> slope_of(PrecisionHalf(lam=10.0))
    10.0
    """
    return max(_slopes(divergence), key=lambda lam: abs(math.log(lam)), default=1.0)


def _slopes(divergence: FDivergence) -> list[float]:
    terms: Any = (term for _, term in weighted_terms(divergence))
    return [term.slope for term in terms if term.slope is not None]


def anneal(divergence: FDivergence, progress: float) -> FDivergence:
    """The divergence with λ on its way from 1, geometrically, to its value at progress 1.

    >>> from rkl import PrecisionHalf
    >>> anneal(PrecisionHalf(lam=100.0), 0.5)
    PrecisionHalf(lam=10.0)
    """
    share = min(max(progress, 0.0), 1.0)
    changed: Any = combine(
        *((w, _at_share(term, share)) for w, term in weighted_terms(divergence))
    )
    return changed


def _at_share(term: Any, share: float) -> Any:
    if term.slope is None:
        return term
    return dataclasses.replace(term, **{term.slope_field: term.slope**share})


def guard_divergence(divergence: FDivergence) -> FDivergence:
    """The divergence that measures a fit: PrecisionRecall(λ) for a divergence with a slope λ."""
    if _slopes(divergence):
        return PrecisionRecall(lam=slope_of(divergence))
    return divergence


class Guard:
    """Compares a flow with the flow of maximum likelihood, by the divergence itself.

    Both are measured with the same density of the data: the exact one, or that of a critic, which
    is its ratio times the flow it was trained against. Two critics are used, that of the start and
    the present one, and the smaller gain counts, less its standard error: errors of one
    critic that the flow exploits do not count.

    Args:
        flow: The flow in training.
        ratio: Its critic, in training too.
        divergence: Divergence that is minimised.
        exact: The log-density of the data, if known.
    """

    def __init__(
        self, flow: nn.Module, ratio: Ratio, divergence: FDivergence, exact: LogProb | None
    ):
        self.flow, self.ratio, self.exact = flow, ratio, exact
        self.divergence = guard_divergence(divergence)
        self.start_flow = copy.deepcopy(flow).requires_grad_(False)
        self.start_ratio = copy.deepcopy(ratio).requires_grad_(False)
        self.begun, self.reached = False, 0.0

    def state_dict(self) -> dict[str, Any]:
        """The flow and the critic of the start."""
        return {
            "begun": self.begun,
            "reached": self.reached,
            "flow": self.start_flow.state_dict(),
            "ratio": self.start_ratio.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the flow and the critic of the start."""
        self.begun = state_dict["begun"]
        self.reached = state_dict.get("reached", 0.0)
        self.start_flow.load_state_dict(state_dict["flow"])
        self.start_ratio.load_state_dict(state_dict["ratio"])

    def advance(self, share: float) -> float:
        """The finished share of the phase under the divergence, which never falls.

        ``share`` itself falls when a run is resumed with a larger budget.
        """
        self.reached = max(self.reached, share)
        return self.reached

    def score(self, moment: Moment, condition: Tensor | None, count: int) -> float | None:
        """Decrease of D since the end of maximum likelihood; 0 at the first call."""
        if not self.begun:
            self.begun = True
            self.start_flow.load_state_dict(self.flow.state_dict())
            self.start_ratio.load_state_dict(self.ratio.state_dict())
            self._judge(moment, condition, count)
            return 0.0
        return self._judge(moment, condition, count)

    def _judge(self, moment: Moment, condition: Tensor | None, count: int) -> float:
        start = self._draw(self.start_flow, condition, count)
        now = self._draw(self.flow, condition, count)
        gains, after = [], start[1]
        for density in self._densities():
            before, after = (
                self._terms(density(value, condition) - log_q) for value, log_q in (start, now)
            )
            gain = before - after
            gains.append((gain.mean() - gain.std() / math.sqrt(count)).item())
        cut = (self._log_ratio(now, condition).abs() >= self.ratio.bound).double().mean().item()
        if cut > LOST and self.exact is None:
            moment.stop(
                f"the critic collapsed: it tells {cut:.0%} of the draws from data beyond "
                f"{self.ratio.bound:.1f} nats; the flow has the best parameters from before"
            )
        moment.log(divergence=after.mean(), cut_off_draws=cut)
        return min(gains)

    def _log_ratio(self, drawn: tuple[Tensor, Tensor], condition: Tensor | None) -> Tensor:
        value, log_q = drawn
        return (
            self.ratio(value, condition)
            if self.exact is None
            else (self.exact(value, condition) - log_q)
        )

    def _terms(self, log_ratio: Tensor) -> Tensor:
        if self.exact is None:
            log_ratio = log_ratio - log_ratio.logsumexp(0) + math.log(len(log_ratio))
        return monte_carlo(self.divergence, self.ratio.cut_off(log_ratio), sampled_from="q")

    def _densities(self) -> list[LogProb]:
        """Estimates of the log-density of the data, each up to a constant."""
        if self.exact is not None:
            return [self.exact]

        def by(flow: nn.Module, ratio: Ratio) -> LogProb:
            def log_p(value: Tensor, condition: Tensor | None) -> Tensor:
                law = flow() if condition is None else flow(condition)
                return ratio.score(value, condition) + law.log_prob(value)

            return log_p

        return [by(self.start_flow, self.start_ratio), by(self.flow, self.ratio)]

    @staticmethod
    def _draw(flow: nn.Module, condition: Tensor | None, count: int) -> tuple[Tensor, Tensor]:
        with random_numbers():  # the same latents for each, so that they are compared well
            law = flow() if condition is None else flow(condition)
            return draw(law, () if condition is not None else (count,))

"""Means of one pass over the draws, and Monte Carlo errors of functions of them.

The errors follow by the delta method: each function is evaluated at the means, and at the means
shifted by plus and minus one small step.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rkl.bayes.families import ExponentialFamily, Natural
from rkl.bayes.problem import Problem
from rkl.bayes.solve.streaming import Moments, one_pass, plus
from rkl.stats import BatchMeans, Mean
from rkl.stats.batch_means import beside

SHIFT = 0.01  # of a standard error, or of what a batch adds: steps of central differences


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

    def plus(self, step: "Point", sign: int) -> "Point":
        """The means with a step [*lead, *batch, ...] added, or taken away."""
        return Point(
            plus(self.natural, step.natural, sign),
            self.from_reference + sign * step.from_reference,
            plus(self.mean, step.mean, sign),
            self.to_reference + sign * step.to_reference,
        )


class Steps(NamedTuple):
    """Steps from the means, and the error of what changes along them."""

    step: Point  # [steps, *batch, ...]
    error_of: Callable[[Tensor], Tensor]  # from changes [steps, *outputs]


@dataclass(frozen=True, eq=False)
class Averages:
    """Means of one pass over the draws, side by side, for functions of them with errors.

    Attributes:
        family: The exponential family, its statistic taken about the reference distribution.
        reference: The natural parameter of the reference distribution P_0.
        directions: "reverse" or "forward", or both: which means were taken.
        means: These, side by side [components, *batch].
    """

    family: ExponentialFamily
    reference: Natural
    directions: tuple[str, ...]
    means: BatchMeans

    @functools.cached_property
    def here(self) -> Point:
        """The means."""
        return self.point(self.means.mean, 0)

    def point(self, components: Tensor, axis: int) -> Point:
        """The components along an axis, taken apart."""
        flat = components.movedim(axis, -1)
        by_direction: dict[str, tuple[Natural, Tensor]] = {}
        for name, part in zip(self.directions, flat.chunk(len(self.directions), -1), strict=True):
            by_direction[name] = (
                self.family.unflatten(part[..., :-1], self.reference),
                part[..., -1],
            )
        none = (), torch.zeros_like(flat[..., 0])
        return Point(*by_direction.get("reverse", none), *by_direction.get("forward", none))

    def with_errors(
        self, outputs: Callable[[Point], dict[Any, Tensor]], separate: bool
    ) -> dict[Any, Mean]:
        """Functions of the means, with their Monte Carlo errors by the delta method.

        Args:
            outputs: From means [*lead, *batch, ...] to what is made of them [*lead, ...]; by
                central differences it is linearised, once for all outputs.
            separate: Whether each member of the batch has outputs [*batch] of its own means.
        """
        steps = self._steps(separate)
        values = outputs(self.here)
        above, below = (outputs(self.here.plus(steps.step, sign)) for sign in (1, -1))
        return {
            key: Mean(x, steps.error_of((above[key] - below[key]) / 2))
            for key, x in values.items()
        }

    def _steps(self, separate: bool) -> Steps:
        fewer = self.means.sums.shape[2] <= self.means.weights.numel()
        return self._in_each if separate and fewer else self._of_batches

    @functools.cached_property
    def _in_each(self) -> Steps:
        """As many steps as there are components, in each member of the batch by itself."""
        scatter = self.means.covariances()
        step = self.point(SHIFT * scatter.directions, 1)
        return Steps(step, lambda changes: scatter.error_of(changes / SHIFT))

    @functools.cached_property
    def _of_batches(self) -> Steps:
        """A step for each half batch of draws, all of whose members move together."""
        step = self.point(SHIFT * self.means.shifts, 1)
        return Steps(step, lambda changes: self.means.error_of(changes / SHIFT))


def average_draws(problem: Problem, directions: tuple[str, ...]) -> Averages:
    """One pass over the draws.

    Args:
        problem: Of a family that is exponential.
        directions: "reverse" for what the reverse-KL act needs, "forward" for the other's.
    """
    if directions not in problem.passes:
        model = problem.model
        moments = one_pass(
            problem.draws, model.bare, model.names, directions, problem.compiled, problem.family
        )
        problem.passes[directions] = averages_of(moments, directions)
    return problem.passes[directions]


def averages_of(moments: Moments, directions: tuple[str, ...]) -> Averages:
    """The means of one pass, of one direction or of both."""
    parts = [moments.means_of(name) for name in directions]
    means = parts[0] if len(parts) == 1 else beside(parts)
    return Averages(moments.family, moments.reference, directions, means)

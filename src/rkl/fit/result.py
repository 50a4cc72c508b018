"""A flow fitted to data, and how near it came to what was asked."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rkl.flows.architectures.mixture import MixtureStart
from rkl.flows.critic import ScaledCritic
from rkl.flows.rows import Data
from rkl.flows.standardise import Standardised
from rkl.flows.training import Training
from rkl.metrics.precision_recall import OperatingPoint
from rkl.runs import save
from rkl.stats import Mean
from rkl.tables import with_error

SPLINED = 5.0  # standard units within which splines bend


@dataclass(frozen=True)
class Reached:
    """How near a flow came to the operating point that was asked for.

    Attributes:
        asked: The precision asked for; None where a budget was.
        precision: An upper bound of that of what rejection keeps, at slope 1, with the standard
            error of its sampling: the least that either critic finds. A critic with more to learn
            from may tell samples from data better, so that the bound may be far above.
        point: Rejection's constant, its draws per sample, and the precision as the critic has it.
        log_normaliser: What is taken off the critic's log-ratio, where the constant is compared.
        judged: Budgets that were judged, each with the bound and its standard error.
        hurried: Whether the minutes ended before all that should be judged was.
    """

    asked: float | None
    precision: Mean
    point: OperatingPoint
    log_normaliser: float = 0.0
    judged: tuple[tuple[float, float, float], ...] = ()
    hurried: bool = False

    @property
    def met(self) -> bool:
        """Whether the lower end of the bound, two standard errors down, is the precision asked."""
        value, error = self.precision.pair()
        return self.asked is None or (not self.hurried and value - 2 * error >= self.asked)

    def __str__(self) -> str:
        value = self.precision.value.item()
        cost = f"{self.point.budget:.3g} draws per sample"
        got = f"precision at most {with_error(*self.precision)} at {cost}"
        if self.hurried:
            return (
                f"{got}: the minutes ended before the critic that judges it had learnt, or had "
                "tried more draws. Give it more minutes."
            )
        if self.met:
            return got
        if self.asked is not None and value >= self.asked:
            return (
                f"{got}: two standard errors below it is less than {self.asked}, so that this "
                "is not shown to be reached. Hold out more rows."
            )
        return (
            f"{got}: that is as far as this model gets; target_precision={self.asked} is out of "
            "its reach. Give it more transforms, steps or rows."
        )


@dataclass(frozen=True)
class Fit:
    """A fitted flow, and how it came about.

    Attributes:
        flow: A density in the user's units: ``flow()``, or ``flow(condition)``, has ``log_prob``
            in nats and ``sample``.
        critic: log p/q at [*batch, *event] in the user's units; None where none was trained.
        training: Its history, how many steps it took, and why it stopped early, if it did.
        held_out: Rows that were not trained on.
        trained_on: Rows that were.
        classes: Names of the conditions, if the data had labels.
        reached: How near it came to the operating point that was asked for, if one was.
        settings: What it was fitted with, by which a saved one is built again.
        log_density: Of the rows held out, in nats, under the parameters kept.
        gaussian: The same of a Gaussian with the moments of the rows trained on.
        critic_seconds: How long critics took behind the last step.
    """

    flow: Standardised
    critic: ScaledCritic | None
    training: Training
    held_out: Data
    trained_on: Data
    classes: tuple[str, ...] = ()
    reached: Reached | None = None
    settings: Mapping[str, Any] | None = None
    log_density: Mean | None = None
    gaussian: Mean | None = None
    critic_seconds: float = 0.0

    def save(self, folder: str | os.PathLike) -> Path:
        """Write it into a folder, as ``rkl fit`` does: ``rkl.load(folder)`` gives the flow back.

        Raises:
            ValueError: Its flow was handed over as a module, which nothing can build again.
            FileExistsError: The folder holds something.
        """
        return save(self, folder)

    @property
    def below_gaussian(self) -> str | None:
        """That a Gaussian does better on rows held out, and by how much; None if it does not."""
        if self.log_density is None or self.gaussian is None:
            return None
        gap = (self.gaussian.value - self.log_density.value).item()
        if not gap > 1e-4 * max(1.0, abs(self.gaussian.value.item())):
            return None
        return (
            f"the held-out log-density, {self.log_density.value.item():.4f} nats per row, is "
            f"{gap:.4f} below that of a Gaussian with the moments of the same rows, "
            f"{self.gaussian.value.item():.4f}."
        )

    @property
    def beyond_splines(self) -> str | None:
        """The number of rows where splines do not bend; None without splines or such rows."""
        inner = self.flow.flow.flow if isinstance(self.flow.flow, MixtureStart) else self.flow.flow
        if type(inner).__name__ != "NSF":
            return None
        far = self.flow.standardise(self.trained_on.values).abs().flatten(1).amax(1) > SPLINED
        if not far.any():
            return None
        return (
            f"{int(far.sum()):,} of {len(far):,} rows trained on lie beyond ± {SPLINED:g} "
            "standard units, where splines do not bend: the start decides there"
        )

    @property
    def history(self) -> list[dict[str, Any]]:
        """One row per so many steps: step, seconds, loss and what else was logged."""
        return self.training.history

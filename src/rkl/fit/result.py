"""A flow fitted to data, and its operating point."""

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
from rkl.tables import Table, table_of, with_error

SPLINED = 5.0  # standard units within which splines bend


@dataclass(frozen=True)
class Reached:
    """The operating point that a flow reached, for the one that was set.

    Attributes:
        asked: The precision that was set; None with a budget.
        precision: An upper bound of the precision of accepted samples at slope 1, with the
            standard error of sampling: the smaller one of both critics. More data may
            train a better critic, so the bound may be far too high.
        point: Rejection's constant, its draws per sample, and the precision by the critic.
        log_normaliser: Subtracted from the critic's log-ratio before the constant applies.
        judged: Budgets that were measured, each with the bound and its standard error.
        hurried: Whether the minutes ended before all budgets were measured.
    """

    asked: float | None
    precision: Mean
    point: OperatingPoint
    log_normaliser: float = 0.0
    judged: tuple[tuple[float, float, float], ...] = ()
    hurried: bool = False

    @property
    def met(self) -> bool:
        """True if the bound less two standard errors is at least the precision that was set."""
        value, error = self.precision.pair()
        return self.asked is None or (not self.hurried and value - 2 * error >= self.asked)

    def table(self) -> Table:
        """The precision that was set, and the one that was reached."""
        figures = {
            "precision that was set": self.asked,
            "precision reached, at most": self.precision,
            "draws per sample": self.point.budget,
            "met": self.met,
        }
        return table_of("Operating point of the fit", figures, () if self.met else str(self))

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()

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
    """A fitted flow, with its training.

    Attributes:
        flow: A density in the user's units: ``flow()``, or ``flow(condition)``, has ``log_prob``
            in nats and ``sample``.
        critic: log p/q at [*batch, *event] in the user's units; None where none was trained.
        training: Its history, number of steps, and the reason of an early stop, if any.
        held_out: Held-out rows.
        trained_on: Training rows.
        classes: Names of the conditions, if the data had labels.
        reached: The operating point, if one was set.
        settings: Settings of the fit, from which a saved flow is rebuilt.
        log_density: Mean log-density of the held-out rows, in nats, with the final parameters.
        gaussian: The same of a Gaussian with the moments of the training rows.
        critic_seconds: Seconds of the critics after the last step.
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
        """Write a run folder, as ``rkl fit`` does: ``rkl.load(folder)`` returns the flow.

        Raises:
            ValueError: The flow was given as a module, which cannot be rebuilt.
            FileExistsError: The folder is not empty.
        """
        return save(self, folder)

    def table(self) -> Table:
        """Log-densities of the held-out rows, steps and seconds; notes on what limits the fit."""
        figures = {
            "held-out log-density (nats per row)": self.log_density,
            "of a Gaussian (nats per row)": self.gaussian,
            "rows trained on": len(self.trained_on),
            "rows held out": len(self.held_out),
            "steps": self.training.steps,
            "training (s)": self.training.seconds,
            "critics (s)": self.critic_seconds or None,
        }
        reasons = self.training.stopped, self.below_gaussian, self.beyond_splines, self.reached
        notes = [f"{str(it).rstrip('.')}." for it in reasons if it is not None]
        return table_of(f"Flow of {list(self.flow.shift.shape)} fitted to data", figures, notes)

    def __str__(self) -> str:
        return str(self.table())

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()

    @property
    def below_gaussian(self) -> str | None:
        """A note if a Gaussian is better on held-out rows, with the difference; else None."""
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
        """A note with the number of rows beyond the splines; None without any."""
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
        """One row per ``every`` steps: step, seconds, loss and other logged figures."""
        return self.training.history

"""What a flow is fitted to data with, and the flow and the critic of such a run."""

import math
import os
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from torch import nn

from rkl.checks import LARGEST_COUNT, LARGEST_RATE, LARGEST_SEED, integer
from rkl.divergences import FDivergence, parse
from rkl.divergences.base import number
from rkl.flows.architectures import Architecture, parse_architecture
from rkl.flows.architectures.mixture import MixtureStart, with_state
from rkl.flows.critic import ScaledCritic
from rkl.flows.data import Data
from rkl.flows.fit import Method, share_of_steps
from rkl.flows.fitted import Reached
from rkl.flows.operating import check_point
from rkl.flows.precision import single_precision
from rkl.flows.standardise import Standardised, Units
from rkl.flows.target_run import MINUTES, WEIGHTS, load_target_run
from rkl.flows.training import load_state
from rkl.flows.weights import is_likelihood
from rkl.importing import only
from rkl.runs import Run
from rkl.runs.integrity import check_finite
from rkl.runs.typed import settings_from


@dataclass(frozen=True)
class FitSettings:
    """What is fitted to what, under which divergence, within which budget.

    Args:
        data: Rows: .csv or another table, .npy, .npz, .parquet, .nc, IDX, or a folder of images.
        divergence: What is minimised, an f-divergence: "precision-half(lam=10)".
        flow: Architecture: coupling, nsf, maf or multi-scale, with settings in brackets.
        labels: Class of each row: a file of them, or the name of a column or an array.
        dequantise: Spread quantised values over one step, as image files are; --no-dequantise
            takes floats on a grid as they are.
        steps: The budget in steps.
        minutes: The budget in minutes, critics included; 2 where none is given.
        estimator: How the gradient is estimated; auto chooses.
        start: Share of the budget for maximum likelihood, with which a fit begins.
        anchor: Weight of plain likelihood after that.
        batch: Rows in a step; all of them, where they are fewer.
        lr: Highest learning rate; by default 2e-3, and less where there are few rows.
        held_out: Share of the rows to hold out.
        guard: Keep the parameters that held-out rows judge best, not the last.
        critic: Train a critic at the end even where none is needed, to reject samples by.
        target_precision: Precision that rejection is to reach; the fit says how near it came.
        budget: Draws per sample that rejection may take.
        start_from: Run with a critic, of which --distil-budget distils; all that is not said here
            is as it was there.
        distil_budget: Draws per sample of the rejection to train into the flow of that run, so
            that a sample takes one draw.
        seed: Of all random numbers.
        device: Where to compute.
    """

    data: Path = field(metadata={"metavar": "DATA"})
    divergence: str = field(default="kl", metadata={"metavar": "D"})
    flow: str = "coupling"
    labels: str | None = None
    dequantise: bool | None = None
    steps: int | None = field(default=None, metadata={"metavar": "N", "instead_of": "minutes"})
    minutes: float | None = field(default=None, metadata={"metavar": "M", "instead_of": "steps"})
    estimator: Literal["auto", "data", "draws", "path", "both"] = "auto"
    start: float = 0.5
    anchor: float = 0.1
    batch: int = 512
    lr: float | None = None
    held_out: float = 0.1
    guard: bool = True
    critic: bool = False
    target_precision: float | None = field(default=None, metadata={"metavar": "P"})
    budget: float | None = field(default=None, metadata={"metavar": "K"})
    start_from: Path | None = field(default=None, metadata={"metavar": "RUN"})
    distil_budget: float | None = field(default=None, metadata={"metavar": "K"})
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self):
        check_point(self.target_precision, self.budget)
        object.__setattr__(self, "data", Path(self.data))
        if (self.start_from is None) != (self.distil_budget is None):
            raise ValueError(
                "start_from and distil_budget go together; got "
                f"{self.start_from} and {self.distil_budget}."
            )
        if self.start_from is not None and self.distil_budget is not None:
            number("distil_budget", self.distil_budget, at_least=1)
            object.__setattr__(self, "start_from", Path(self.start_from))
            for name in ("target_precision", "budget"):  # of the run that it starts from
                object.__setattr__(self, name, None)
            object.__setattr__(self, "critic", False)
        if self.steps is not None and self.minutes is not None:
            raise ValueError(f"one of steps and minutes; got {self.steps} and {self.minutes}.")
        limits = {"steps": LARGEST_COUNT, "minutes": LARGEST_COUNT, "lr": LARGEST_RATE}
        for name, most in limits.items():
            if getattr(self, name) is not None:
                number(name, getattr(self, name), above=0, at_most=most)
        integer("seed", self.seed, at_most=LARGEST_SEED)
        _ = self.method, self.architecture, self.chosen

    @property
    def method(self) -> Method:
        """How it is fitted."""
        names = "start", "anchor", "batch", "lr", "held_out", "guard"
        estimator = None if self.estimator == "auto" else self.estimator
        return Method(estimator=estimator, **{name: getattr(self, name) for name in names})

    @property
    def architecture(self) -> Architecture:
        """What is built."""
        return parse_architecture(self.flow)

    @property
    def chosen(self) -> FDivergence:
        """What is minimised."""
        divergence = parse(self.divergence)
        if not isinstance(divergence, FDivergence):
            raise ValueError(f"divergence must be an f-divergence; got {divergence!r}.")
        return divergence

    @property
    def allowance(self) -> dict[str, Any]:
        """The budget of training: in steps, or in minutes."""
        if self.steps is not None:
            return {"steps": self.steps}
        return {"minutes": MINUTES if self.minutes is None else self.minutes}

    @property
    def share_of_steps(self) -> float:
        """Share of a budget in minutes that the steps of the flow take, before critics follow."""
        if self.start_from is not None:
            return 1.0
        aimed = self.target_precision is not None or self.budget is not None
        critic = self.critic or aimed or not is_likelihood(self.chosen)
        return share_of_steps(self.chosen, critic=critic, aimed=aimed)


@single_precision()
def load_run(path: str | os.PathLike, *, allow: Collection[str] = ()) -> nn.Module:
    """The flow of a run, in the user's units: ``flow()`` has ``log_prob`` and ``sample``.

    That of a target is called with a condition, [*batch, conditions].

    Args:
        path: The folder of the run.
        allow: What its ``run.json`` may have imported, each "module:name".
    """
    if "target" in Run.open(path).settings:
        return load_target_run(path, allow=allow).flow
    return load_fit(path, allow=allow)[0]


@single_precision()
def load_critic(path: str | os.PathLike, *, allow: Collection[str] = ()) -> ScaledCritic:
    """The critic of a run: log p/q of events in the user's units.

    Args:
        path: The folder of the run.
        allow: What its ``run.json`` may have imported, each "module:name".

    Raises:
        ValueError: The run has none.
    """
    critic = load_fit(path, allow=allow)[1]
    if critic is None:
        raise ValueError(
            f"path: {path} has no critic: neither maximum likelihood nor distilling needs one. "
            "Fit with --critic."
        )
    return critic


def settings_of(run: Run, *, allow: Collection[str] = ()) -> FitSettings:
    """What a run was fitted with; nothing is imported for it but what ``allow`` names."""
    source = run.path / "run.json"
    with only(allow, source=source):
        return settings_from(FitSettings, run.settings, source)


def load_fit(
    path: str | os.PathLike, *, allow: Collection[str] = ()
) -> tuple[Standardised, ScaledCritic | None, tuple[str, ...]]:
    """The flow of a run fitted to data, its critic if it has one, and its classes."""
    run = Run.open(path)
    if run.kind != "flows":
        raise ValueError(f"path: {path} is a run of kind {run.kind!r}; expected 'flows'.")
    if not (run.path / WEIGHTS).exists():
        raise FileNotFoundError(
            f"path: {path} has no {WEIGHTS}: the run was not finished; what was "
            "fitted in Python is written by fitted.save(folder)."
        )
    run.check_files(WEIGHTS)
    state = load_state(run.path / WEIGHTS)
    settings = settings_of(run, allow=allow)
    units, classes = Units.of_state(state["units"]), tuple(state["classes"])
    shape = tuple(units.shift.shape)
    built = settings.architecture.build(shape, len(classes))
    inner = with_state(built, state["flow"], state.get("within"))
    flow = Standardised(inner, units).requires_grad_(False)
    start = inner.named_parts() if isinstance(inner, MixtureStart) else ()
    check_finite([*flow.named_parameters(), *start], run.path / WEIGHTS, "flow")
    if state["critic"] is None:
        return flow, None, classes
    chosen = replace(settings.method.critic, hidden=tuple(state["critic_hidden"]))
    ratio = chosen.build(shape, len(classes), state["bound"])
    critic = ScaledCritic(ratio.requires_grad_(False), units)
    critic.ratio.load_state_dict(state["critic"])
    check_finite(critic.named_parameters(), run.path / WEIGHTS, "critic")
    return flow, critic, classes


@dataclass(frozen=True)
class HeldPoint:
    """The operating point of a run.

    Attributes:
        log_lam: The logarithm of rejection's constant, of the critic's ratio as it is.
        budget: Draws per sample.
        judged: Budgets that the fit judged, each with an upper bound of the precision, and its
            standard error.
    """

    log_lam: float
    budget: float
    judged: tuple[tuple[float, float, float], ...]


def kept_point(reached: Reached) -> dict[str, Any]:
    """What a run keeps of its operating point."""
    log_lam = math.log(reached.point.accept_lam) - reached.log_normaliser
    judged = [list(it) for it in reached.judged]
    return {"log_lam": log_lam, "budget": reached.point.budget, "judged": judged}


def load_point(path: str | os.PathLike) -> HeldPoint | None:
    """The operating point that the fit of a run was asked for; None where it was not."""
    state = load_state(Path(path) / WEIGHTS).get("reached")
    if state is None:
        return None
    judged = tuple(tuple(it) for it in state["judged"])
    return HeldPoint(state["log_lam"], state["budget"], judged)


def rows_of(data: Data) -> list[bytes]:
    """The rows, as a run remembers them."""
    return [row.tobytes() for row in data.values.numpy()]

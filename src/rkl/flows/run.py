"""``rkl fit`` and ``rkl sample``: from data to a run with a flow, and from the run to samples."""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rkl.divergences import FDivergence, parse
from rkl.divergences.base import number
from rkl.flows.architectures import Architecture, Scaled, catalogue, latent
from rkl.flows.critic import ScaledCritic
from rkl.flows.data import Data, check_device, read_data
from rkl.flows.files import write_samples
from rkl.flows.fit import Fit, Method, fit_to_samples
from rkl.flows.operating import check_point
from rkl.flows.rejection import reject
from rkl.flows.target_run import (
    CHAINS,
    MINUTES,
    TRIED,
    WEIGHTS,
    check_same_data,
    load_target_run,
    sample_target,
)
from rkl.flows.training import load_state, save_state
from rkl.flows.weights import bounded_on_data, is_likelihood
from rkl.metrics import to_json
from rkl.runs import Run, fingerprint

BATCH = 10_000  # samples made at a time


@dataclass(frozen=True)
class FitSettings:
    """What is fitted to what, under which divergence, within which budget.

    Args:
        data: Rows: .npy, .npz, .csv, .parquet, IDX or IDX.gz, or a folder of images.
        divergence: What is minimised, an f-divergence: "precision-half(lam=10)".
        flow: Architecture: coupling, nsf, maf or multi-scale, with settings in brackets.
        labels: Class of each row: a file of them, or the name of a column or an array.
        dequantise: Spread quantised values over one step, as image files are; --no-dequantise
            takes floats on a grid as they are.
        steps: The budget in steps.
        minutes: The budget in minutes; 2 where none is given.
        estimator: How the gradient is estimated; auto chooses.
        start: Share of the budget for maximum likelihood, with which a fit begins.
        anchor: Weight of plain likelihood after that.
        batch: Rows in a step.
        lr: Highest learning rate.
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
    lr: float = 2e-3
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
        for name in ("steps", "minutes", "lr"):
            if getattr(self, name) is not None:
                number(name, getattr(self, name), above=0)
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
        return parse(self.flow, catalogue())

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


@dataclass(frozen=True)
class SampleSettings:
    """How many samples, of which flow, at which trade-off.

    Args:
        n: Number of samples.
        out: File to write: .npy or .csv; for draws of a target .nc, .npz or .npy.
        condition: Class to draw, where rows had labels; or, of a target, such as "T=0.9".
        chains: Of draws of a target, 4 by default: each is corrected by Metropolis.
        latent_temperature: Standard deviation of the latents; below 1 for the middle alone.
        truncation: Where the latents are cut off, in standard deviations.
        budget: Draws per sample in optimal rejection by the critic; 1 rejects none.
        target_precision: Precision that rejection is to reach, instead of a budget.
        seed: Of all random numbers.
        device: Where to compute.
    """

    n: int = field(default=1000, metadata={"metavar": "N"})
    out: Path = Path("samples.npy")
    condition: str | None = None
    chains: int | None = None
    latent_temperature: float = field(default=1.0, metadata={"metavar": "T"})
    truncation: float | None = field(default=None, metadata={"metavar": "BOUND"})
    budget: float | None = field(default=None, metadata={"metavar": "K"})
    target_precision: float | None = field(default=None, metadata={"metavar": "P"})
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self):
        object.__setattr__(self, "out", Path(self.out))
        if isinstance(self.n, bool) or not isinstance(self.n, int):
            raise TypeError(f"n must be an integer; got {self.n!r}.")
        if self.n < 1:
            raise ValueError(f"n must be at least 1; got {self.n}.")


@dataclass(frozen=True)
class Fitted:
    """A finished fit, which prints what there is to know of it.

    Attributes:
        path: The folder of its run.
        fit: What was fitted.
        followed: Whether a divergence was, after maximum likelihood.
    """

    path: Path
    fit: Fit
    followed: bool = False

    def __str__(self) -> str:
        done, row = self.fit.training, self.fit.history[-1]
        lines = [f"{done.steps:,} steps in {done.seconds:.0f} s"]
        if "held_out" in row:
            lines += [f"held-out log-density {row['held_out']:.4f} nats per row, at the end"]
        if self.followed and done.best is not None:
            lines += [f"the divergence fell by {done.best:.4f} below maximum likelihood's"]
        lines += [f"Stopped early: {done.stopped}"] if done.stopped else []
        if self.fit.reached is not None:
            lines += [f"With rejection: {self.fit.reached}"]
        return "\n".join([*lines, f"The run: {self.path}"])


def fit(
    settings: FitSettings,
    out: str | os.PathLike,
    *,
    resume: bool = False,
    overwrite: bool = False,
) -> Fitted:
    """Fit a flow to data in a run folder; a resumed run comes to the same bits.

    Args:
        settings: What is fitted to what.
        out: The folder.
        resume: Goes on with the run there.
        overwrite: Replaces it.
    """
    data = _read(settings)
    begun = _begun(settings, data)
    kept = asdict(settings) | {"data": str(settings.data.resolve())}
    if settings.start_from is not None:
        kept["start_from"] = str(settings.start_from.resolve())
    how = {"seed": settings.seed, "resume": resume, "overwrite": overwrite}
    run = Run.create(out, "flows", kept, may_change=("device",), **how)
    found = fingerprint([data.values.numpy().tobytes()])
    check_same_data(run, found, rows=len(data), classes=list(data.classes))
    with run.running():
        fitted = begun(run=run, **settings.allowance)
        _save(run, fitted)
    followed = settings.start_from is None and not is_likelihood(settings.chosen)
    return Fitted(run.path, fitted, followed)


def _begun(settings: FitSettings, data: Data) -> Callable[..., Fit]:
    """All that can be refused has been; what is left to say is how long, and in which run."""
    if settings.start_from is not None:
        from rkl.flows.distil_run import distillation

        return distillation(settings, data)
    device = check_device(settings.device)
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        flow = settings.architecture.build(data.event_shape, data.conditions)
    how: dict[str, Any] = {"seed": settings.seed, "method": settings.method}
    how |= {"with_critic": settings.critic, "budget": settings.budget}
    how |= {"target_precision": settings.target_precision}
    return partial(fit_to_samples, flow.to(device), data, settings.chosen, **how)


def estimate(settings: FitSettings) -> str:
    """What a fit would do and how long it would take, from a few steps; nothing is written."""
    data = _read(settings)
    flow, divergence = settings.architecture, settings.chosen
    aimless = replace(settings, critic=False, budget=None, target_precision=None)
    tried = _begun(aimless, data)(steps=TRIED)
    size = sum(it.numel() for it in tried.flow.parameters())
    per_step = tried.training.seconds / TRIED
    estimator = settings.estimator
    if settings.start_from is not None:
        divergence, estimator = f"rejection at {settings.distil_budget:g}", "distilling"
    elif is_likelihood(divergence):
        estimator = "maximum likelihood"
    elif estimator == "auto":
        estimator = "data" if bounded_on_data(divergence) else "draws"
    steps = settings.allowance.get("steps") or round(60 * settings.allowance["minutes"] / per_step)
    lines = [f"{len(data):,} rows of shape {list(data.event_shape)}, {data.conditions} conditions"]
    lines += [f"{flow}: {size:,} parameters, {size * 4 * 6 / 1e6:.3g} MB with what Adam keeps"]
    lines += [f"{divergence} by the estimator: {estimator}"]
    lines += [f"about {steps:,} steps in {steps * per_step / 60:.2g} minutes"]
    return "\n".join(lines)


def load_run(path: str | os.PathLike) -> nn.Module:
    """The flow of a run, in the user's units: ``flow()`` has ``log_prob`` and ``sample``.

    That of a target is called with a condition, [*batch, conditions].
    """
    if "target" in Run.open(path).settings:
        return load_target_run(path).flow
    return _load(path)[0]


def load_critic(path: str | os.PathLike) -> ScaledCritic:
    """The critic of a run: log p/q of events in the user's units.

    Raises:
        ValueError: The run has none.
    """
    critic = _load(path)[1]
    if critic is None:
        raise ValueError(
            f"path: {path} has no critic: neither maximum likelihood nor distilling needs one. "
            "Fit with --critic."
        )
    return critic


def sample_run(path: str | os.PathLike, settings: SampleSettings) -> str:
    """Draw samples of the flow of a run and write them, in the user's units.

    Returns:
        What was written, and what it cost.
    """
    if "target" in Run.open(path).settings:
        return _sample_target(path, settings)
    flow, _critic, classes = _load(path)
    if settings.chains is not None:
        raise ValueError(f"chains go with a flow fitted to a target; got {settings.chains}.")
    if settings.out.suffix not in (".npy", ".csv"):
        raise ValueError(f"out must end in .npy or .csv; got {settings.out}.")
    condition = _condition(settings.condition, classes)
    device = check_device(settings.device)
    flow.to(device)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(settings.seed)
        bound = math.inf if settings.truncation is None else settings.truncation
        law = flow() if condition is None else flow(condition.to(device))
        law = latent(law, settings.latent_temperature, bound)
        if settings.budget is None and settings.target_precision is None:
            counts = [min(BATCH, settings.n - i) for i in range(0, settings.n, BATCH)]
            samples, cost = torch.cat([law.sample(torch.Size([it])) for it in counts]), ""
        else:
            _refuse_changed_latents(settings)
            samples, cost = _rejected(law, load_critic(path), condition, settings)
    write_samples(settings.out, samples.cpu().numpy())
    return f"{settings.n:,} samples in {settings.out}{cost}"


def compare_runs(paths: Sequence[str | os.PathLike], out: str | os.PathLike | None = None) -> str:
    """Held-out log-density of several runs, in one table."""
    if out is not None:
        raise NotImplementedError("out: runs of kind 'flows' are compared in a table alone.")
    lines = []
    for path in paths:
        run = Run.open(path)
        row, settings = (run.metrics or [{}])[-1], run.settings
        of_target = "target" in settings
        minimised = settings["objective"] or "" if of_target else ""
        minimised = minimised or settings["divergence"] or "by default"
        if settings.get("distil_budget"):
            minimised += f", distilled at {settings['distil_budget']:g}"
        named = {"ess": "ESS", "v": "v"} if of_target else {"held_out": "held-out nats per row"}
        figures = ", ".join(f"{said} {row.get(it, math.nan):.4g}" for it, said in named.items())
        lines += [f"{path!s:30} {minimised:32} {settings['flow']:24} {figures}"]
    return "\n".join(lines)


def _read(settings: FitSettings) -> Data:
    return read_data(settings.data, settings.labels, dequantise=settings.dequantise)


def rows_of(data: Data) -> list[bytes]:
    """The rows, as a run remembers them."""
    return [row.tobytes() for row in data.values.numpy()]


def _save(run: Run, fitted: Fit) -> None:
    run.remember_rows(rows_of(fitted.trained_on))
    critic = fitted.critic
    state = {
        "shift": fitted.flow.shift,
        "flow": fitted.flow.state_dict(),
        "critic": None if critic is None else critic.state_dict(),
        "bound": None if critic is None else critic.ratio.bound,
        "classes": list(fitted.classes),
    }
    save_state(run.path / WEIGHTS, state)
    done = fitted.training
    result = {"steps": done.steps, "gain": done.best, "stopped": done.stopped}
    if fitted.reached is not None:
        result["reached"] = to_json(fitted.reached.precision)
        result["budget"] = fitted.reached.point.budget
    run.update(result=result)


def settings_of(run: Run) -> FitSettings:
    """What a run was fitted with."""
    paths = {name: Path(it) for name in ("data", "start_from") if (it := run.settings.get(name))}
    return FitSettings(**{**run.settings, **paths})


def _load(path: str | os.PathLike) -> tuple[Scaled, ScaledCritic | None, tuple[str, ...]]:
    run = Run.open(path)
    if run.kind != "flows":
        raise ValueError(f"path: {path} is a run of kind {run.kind!r}; expected 'flows'.")
    if not (run.path / WEIGHTS).exists():
        raise FileNotFoundError(f"path: {path} has no {WEIGHTS}: the run was not finished.")
    state = load_state(run.path / WEIGHTS)
    settings = settings_of(run)
    shape, classes = tuple(state["shift"].shape), tuple(state["classes"])
    inner = settings.architecture.build(shape, len(classes))
    flow = Scaled(inner, state["shift"], torch.ones_like(state["shift"]))
    flow.load_state_dict(state["flow"])
    flow.requires_grad_(False)
    if state["critic"] is None:
        return flow, None, classes
    ratio = settings.method.critic.build(shape, len(classes), state["bound"])
    critic = ScaledCritic(ratio.requires_grad_(False), flow)
    critic.load_state_dict(state["critic"])
    return flow, critic, classes


def _sample_target(path: str | os.PathLike, settings: SampleSettings) -> str:
    for name in ("latent_temperature", "truncation", "budget", "target_precision"):
        if getattr(settings, name) not in (None, 1.0):
            raise ValueError(f"{name} goes with a flow fitted to data; {path} has a target.")
    names = "n", "out", "condition", "seed", "device"
    how: dict[str, Any] = {name: getattr(settings, name) for name in names}
    chains = CHAINS if settings.chains is None else settings.chains
    return sample_target(path, chains=chains, **how)


def _condition(named: str | None, classes: tuple[str, ...]) -> Tensor | None:
    if not classes:
        if named is not None:
            raise ValueError(f"condition: the flow has no classes; got {named!r}.")
        return None
    if named not in classes:
        raise ValueError(f"condition must be one of {', '.join(classes)}; got {named!r}.")
    return torch.nn.functional.one_hot(torch.tensor(classes.index(named)), len(classes)).float()


def _refuse_changed_latents(settings: SampleSettings) -> None:
    if settings.latent_temperature != 1 or settings.truncation is not None:
        raise ValueError(
            "budget and target_precision go with the flow's own latents, which the critic knows; "
            f"got latent_temperature={settings.latent_temperature}, "
            f"truncation={settings.truncation}."
        )


def _rejected(
    law: Any, critic: ScaledCritic, condition: Tensor | None, settings: SampleSettings
) -> tuple[Tensor, str]:
    critic.to(settings.device)
    kept = reject(
        law,
        lambda value: critic(value, condition),
        n=settings.n,
        budget=settings.budget,
        target_precision=settings.target_precision,
    )
    accepted = f"{kept.acceptance.value:.3f} ± {kept.acceptance.error:.3f}"
    return kept.samples, f", {kept.cost:.3g} draws each (accepted: {accepted})"

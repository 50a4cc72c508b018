"""``rkl fit --data``: from data to a run with a flow."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rkl import checks
from rkl.fit.data import read_data
from rkl.fit.distil import distillation
from rkl.fit.fit import fit_to_samples
from rkl.fit.load import kept_point, rows_of
from rkl.fit.operating import POINTS, seconds_of_update
from rkl.fit.result import Fit
from rkl.fit.settings import FitSettings
from rkl.flows.architectures.mixture import MixtureStart, seen_within
from rkl.flows.precision import single_precision
from rkl.flows.rows import Data
from rkl.flows.runs import (
    BUDGET,
    PATHS,
    TRIED,
    WEIGHTS,
    check_same_data,
    movable_paths,
    run_input,
    steps_of,
)
from rkl.flows.training import goes_on, save_state
from rkl.flows.weights import bounded_on_data, is_likelihood
from rkl.randomness import random_numbers
from rkl.runs import Run, check_out, fingerprint
from rkl.runs.integrity import Input, local_path, values_of
from rkl.runs.typed import record_of, with_defaults
from rkl.stats import to_json
from rkl.tables import with_error

MAY_CHANGE = "device", *BUDGET  # in a run that is resumed; more of the budget extends it


@dataclass(frozen=True)
class Fitted:
    """A finished fit, which prints as a summary.

    Attributes:
        path: The folder of its run.
        fit: The fit.
        followed: Whether a divergence followed maximum likelihood.
        notes: Notes for the user on how the data were read.
    """

    path: Path
    fit: Fit
    followed: bool = False
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        done, fit = self.fit.training, self.fit
        lines = [f"{done.steps:,} steps in {done.seconds:.0f} s"]
        if fit.critic is not None and fit.critic_seconds >= 1:
            lines[0] += f", and critics in {fit.critic_seconds:.0f} s"
        if fit.log_density is not None:
            density = with_error(*fit.log_density)
            best_step = done.steps if done.best_step is None else done.best_step
            lines += [
                f"held-out log-density {density} nats per row, of step {best_step:,}, whose "
                "parameters are kept"
            ]
        if fit.gaussian is not None:
            lines += [f"a Gaussian of the same rows has {with_error(*fit.gaussian)}"]
        if isinstance(fit.flow.flow, MixtureStart):
            lines += ["it begins as a mixture of Gaussians, which BIC prefers on so few rows"]
        if (below := fit.below_gaussian) is not None:
            lines += [below[:1].upper() + below[1:]]
        if (beyond := fit.beyond_splines) is not None:
            lines += [beyond]
        if self.followed and done.best is not None:
            lines += [f"the divergence fell by {done.best:.4f} below maximum likelihood's"]
        lines += [f"Stopped early: {done.stopped}"] if done.stopped else []
        if self.fit.reached is not None:
            lines += [f"With rejection: {self.fit.reached}"]
        lines += [f"data: {note}" for note in self.notes]
        return "\n".join([*lines, f"The run: {self.path}"])


@single_precision()
def fit(
    settings: FitSettings,
    out: str | os.PathLike,
    *,
    resume: bool = False,
    overwrite: bool = False,
) -> Fitted:
    """Fit a flow to data in a run folder; a resumed run comes to the same bits.

    Args:
        settings: Settings of the fit.
        out: The folder.
        resume: Continue the run there.
        overwrite: Replace the run there.
    """
    inputs = {name: getattr(settings, name) for name in ("data", "labels", "start_from")}
    check_out(out, overwrite=overwrite, resume=resume, inputs=inputs)
    allowed = settings.allowance
    more = goes_on(Path(out), **allowed, share=settings.share_of_steps) if resume else True
    data = _read(settings)
    begun = _prepare(settings, data)
    record = record_of(settings)
    how = {"seed": settings.seed, "resume": resume, "overwrite": overwrite}
    how["upgrade"] = partial(with_defaults, FitSettings)
    places = movable_paths(out, resume)
    if (labels := _labels_file(settings)) is not None:
        record["labels"] = str(labels)
        places = (*places, "labels") if places else ()
    with Run.create(out, "fit", record, may_change=(*MAY_CHANGE, *places), **how) as run:
        data_fingerprint = fingerprint([data.values.numpy().tobytes()])
        check_same_data(
            run, data_fingerprint, _inputs(settings, data), rows=len(data), **_names(data)
        )
        changed = {name: record[name] for name in (*PATHS, "labels", *MAY_CHANGE)}
        run.update(settings=run.settings | changed)
        with run.running():
            if more:
                run.remove_measured()
            fitted = begun(run=run, **settings.allowance)
            if more:  # of the earlier weights, measured meanwhile
                run.remove_measured()
            _save(run, fitted)
    followed = settings.start_from is None and not is_likelihood(settings.parsed_divergence)
    return Fitted(run.path, fitted, followed, data.notes)


def _names(data: Data) -> dict[str, list[str]]:
    return {"classes": list(data.classes), "columns": list(data.columns)}


def _labels_file(settings: FitSettings) -> Path | None:
    path = None if settings.labels is None else local_path(settings.labels)
    return path if path is not None and path.is_file() and path.suffix else None


def _inputs(settings: FitSettings, data: Data) -> dict[str, Input]:
    inputs = {"data": values_of(settings.data, [data.values, data.step])}
    if data.condition is not None:
        source = settings.data if settings.labels is None else settings.labels
        inputs["labels"] = values_of(source, [data.condition, list(data.classes)])
    if settings.start_from is not None:
        inputs["start_from"] = run_input(settings.start_from)
    return inputs


def _prepare(settings: FitSettings, data: Data) -> Callable[..., Fit]:
    """Refuse what can be refused before the fit; returns its budget and run."""
    if settings.start_from is not None:
        return distillation(settings, data)
    device = checks.device(settings.device)
    with random_numbers(settings.seed):
        flow = settings.architecture.build(data.event_shape, data.conditions)
    how: dict[str, Any] = {"seed": settings.seed, "method": settings.method}
    how |= {"with_critic": settings.critic, "budget": settings.budget}
    how |= {"target_precision": settings.target_precision}
    return partial(fit_to_samples, flow.to(device), data, settings.parsed_divergence, **how)


def dry_run(settings: FitSettings) -> str:
    """Size, time and memory of a fit, estimated from a few steps; nothing is written."""
    data = _read(settings)
    flow, divergence = settings.architecture, settings.parsed_divergence
    aimless = replace(settings, critic=False, budget=None, target_precision=None)
    tried = _prepare(aimless, data)(steps=TRIED)
    size = sum(it.numel() for it in tried.flow.parameters())
    per_step = tried.training.seconds / TRIED
    estimator = settings.estimator
    if settings.start_from is not None:
        divergence, estimator = f"rejection at {settings.distil_budget:g}", "distilling"
    elif is_likelihood(divergence):
        estimator = "maximum likelihood"
    elif estimator == "auto":
        estimator = "data" if bounded_on_data(divergence) else "draws"
    budget, share = settings.allowance, settings.share_of_steps
    steps = steps_of(budget, per_step, share)
    lines = [f"{len(data):,} rows of shape {list(data.event_shape)}, {data.conditions} conditions"]
    lines += [f"data: {note}" for note in data.notes]
    lines += [f"{flow}: {size:,} parameters, {size * 4 * 6 / 1e6:.3g} MB with what Adam keeps"]
    lines += [f"{divergence} by the estimator: {estimator}"]
    minutes = steps * per_step / 60
    lines += [f"about {steps:,} steps in {minutes:.2g} minutes"]
    critics = _critics(settings, tried, steps)
    if critics is not None:
        description, most = critics
        if "minutes" in budget:
            most = min(most, (1 - share) * budget["minutes"])
        lines += [
            f"{description} in up to {most:.2g} minutes: up to {minutes + most:.2g} minutes in all"
        ]
    return "\n".join(lines)


def _critics(settings: FitSettings, tried: Fit, steps: int) -> tuple[str, float] | None:
    """Description of the critics after the steps, and their minutes at most."""
    if settings.share_of_steps == 1:
        return None
    aimed = settings.target_precision is not None or settings.budget is not None
    likelihood = is_likelihood(settings.parsed_divergence)
    chosen = settings.method.critic
    seconds = seconds_of_update(tried, chosen, settings.batch)
    count = max(chosen.lessons_after(steps) if aimed else 50, steps // (3 if likelihood else 10))
    if not aimed:
        return f"then a critic: {count:,} steps", count * seconds / 60
    judged = 1 if settings.target_precision is None else POINTS
    more = judged * max(1, chosen.lessons_after(steps) // 2)
    up_to = "up to " * (judged > 1)
    description = f"then two critics: {count:,} and {up_to}{more:,} steps"
    return description, (count + more) * seconds / 60


def save_run(fitted: Fit, out: str | os.PathLike) -> Path:
    """Write a fit into a run folder, as ``rkl fit`` does.

    Args:
        fitted: Result of :func:`fit_to_samples`.
        out: The folder, new or empty.

    Raises:
        ValueError: The flow was given as a module, which cannot be rebuilt.
        FileExistsError: The folder is not empty.
    """
    chosen = fitted.settings or {}
    if "flow" not in chosen:
        raise ValueError(
            "fitted: its flow was handed over as a module, which nothing can build again; hand "
            "over an architecture, such as Coupling(), or one of your own."
        )
    rows = fitted.trained_on.to(torch.device("cpu"))
    settings = record_of(FitSettings(Path("rows-in-memory"), steps=max(1, fitted.training.steps)))
    settings |= {"data": "rows-in-memory"} | dict(chosen)
    with Run.create(out, "fit", settings, seed=chosen["seed"]) as run:
        data_fingerprint = fingerprint([rows.values.numpy().tobytes()])
        names = {"classes": list(fitted.classes), "columns": list(rows.columns)}
        run.update(data={"fingerprint": data_fingerprint, "rows": len(rows), **names})
        with run.running():
            for row in fitted.history:
                run.log(row)
            _save(run, replace(fitted, trained_on=rows))
    return run.path


def _read(settings: FitSettings) -> Data:
    return read_data(settings.data, settings.labels, dequantise=settings.dequantise)


def _save(run: Run, fitted: Fit) -> None:
    run.remember_rows(rows_of(fitted.trained_on.to(torch.device("cpu"))))
    critic = fitted.critic
    state = {
        "units": fitted.flow.units.state_dict(),
        "flow": fitted.flow.flow.state_dict(),
        "within": seen_within(fitted.flow.flow),
        "critic": None if critic is None else critic.ratio.state_dict(),
        "bound": None if critic is None else critic.ratio.bound,
        "classes": list(fitted.classes),
        "critic_hidden": None if critic is None else list(critic.ratio.chosen.hidden),
        "reached": None if fitted.reached is None else kept_point(fitted.reached),
    }
    save_state(run.path / WEIGHTS, state)
    done = fitted.training
    best_step = done.steps if done.best_step is None else done.best_step
    result: dict[str, Any] = {"steps": done.steps, "kept_step": best_step, "stopped": done.stopped}
    named = {"held_out": fitted.log_density, "gaussian": fitted.gaussian}
    result |= {name: to_json(it) for name, it in named.items() if it is not None}
    if fitted.reached is not None:
        reached = fitted.reached
        result["precision_at_most"] = to_json(reached.precision)
        result |= {"asked": reached.asked, "met": reached.met, "budget": reached.point.budget}
    run.update(result=result)

"""``rkl fit`` and ``rkl sample``: from data to a run with a flow, and from the run to samples."""

import math
import os
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rkl.checks import LARGEST_COUNT, LARGEST_RATE, LARGEST_SEED, integer, number
from rkl.flows.architectures import latent
from rkl.flows.architectures.mixture import MixtureStart, seen_within
from rkl.flows.critic import ScaledCritic
from rkl.flows.data import Data, check_device, read_data
from rkl.flows.data_run import (
    FitSettings,
    HeldPoint,
    kept_point,
    load_critic,
    load_fit,
    load_point,
    rows_of,
)
from rkl.flows.distil_run import distillation
from rkl.flows.files import write_samples
from rkl.flows.fit import fit_to_samples
from rkl.flows.fitted import Fit
from rkl.flows.operating import POINTS, draw_kept, seconds_of_update
from rkl.flows.precision import single_precision
from rkl.flows.rejection import reject
from rkl.flows.target_run import (
    BUDGET,
    CHAINS,
    PATHS,
    TRIED,
    WEIGHTS,
    check_same_data,
    check_samples,
    moved,
    run_input,
    sample_target,
)
from rkl.flows.training import goes_on, save_state
from rkl.flows.weights import bounded_on_data, is_likelihood
from rkl.metrics import Mean, to_json
from rkl.metrics.written import parenthesised
from rkl.runs import Run, check_out, check_out_file, fingerprint
from rkl.runs.integrity import Input, local_path, values_of

FAR = 20.0  # standard deviations, beyond which a sample is no likely one of the data
BATCH = 10_000  # samples made at a time
MAY_CHANGE = "device", *BUDGET  # in a run that is resumed; more of the budget extends it


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
        levels: Put quantised values back on their levels; --no-levels leaves them spread.
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
    levels: bool = True
    budget: float | None = field(default=None, metadata={"metavar": "K"})
    target_precision: float | None = field(default=None, metadata={"metavar": "P"})
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self):
        object.__setattr__(self, "out", Path(self.out))
        integer("n", self.n, at_least=1, at_most=LARGEST_COUNT)
        integer("seed", self.seed, at_most=LARGEST_SEED)
        for name in ("latent_temperature", "truncation"):
            if getattr(self, name) is not None:
                number(name, getattr(self, name), above=0, at_most=LARGEST_RATE)


@dataclass(frozen=True)
class Fitted:
    """A finished fit, which prints what there is to know of it.

    Attributes:
        path: The folder of its run.
        fit: What was fitted.
        followed: Whether a divergence was, after maximum likelihood.
        notes: What a user should know of how the data were read.
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
            density = parenthesised(_pair(fit.log_density))
            kept = done.steps if done.best_step is None else done.best_step
            lines += [
                f"held-out log-density {density} nats per row, of step {kept:,}, which is kept"
            ]
        if fit.gaussian is not None:
            lines += [f"a Gaussian of the same rows has {parenthesised(_pair(fit.gaussian))}"]
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
        settings: What is fitted to what.
        out: The folder.
        resume: Goes on with the run there.
        overwrite: Replaces it.
    """
    inputs = {name: getattr(settings, name) for name in ("data", "labels", "start_from")}
    check_out(out, overwrite=overwrite, resume=resume, inputs=inputs)
    allowed = settings.allowance
    more = goes_on(Path(out), **allowed, share=settings.share_of_steps) if resume else True
    data = _read(settings)
    begun = _begun(settings, data)
    kept = asdict(settings) | {"data": str(settings.data.resolve())}
    if settings.start_from is not None:
        kept["start_from"] = str(settings.start_from.resolve())
    how = {"seed": settings.seed, "resume": resume, "overwrite": overwrite}
    places = moved(out, resume)
    if (labels := _labels_file(settings)) is not None:
        kept["labels"] = str(labels)
        places = (*places, "labels") if places else ()
    with Run.create(out, "flows", kept, may_change=(*MAY_CHANGE, *places), **how) as run:
        found = fingerprint([data.values.numpy().tobytes()])
        check_same_data(run, found, _inputs(settings, data), rows=len(data), **_names(data))
        changed = {name: kept[name] for name in (*PATHS, "labels", *MAY_CHANGE)}
        run.update(settings=run.settings | changed)
        with run.running():
            if more:
                run.remove_measured()
            fitted = begun(run=run, **settings.allowance)
            if more:  # of the earlier weights, measured meanwhile
                run.remove_measured()
            _save(run, fitted)
    followed = settings.start_from is None and not is_likelihood(settings.chosen)
    return Fitted(run.path, fitted, followed, data.notes)


def _names(data: Data) -> dict[str, list[str]]:
    return {"classes": list(data.classes), "columns": list(data.columns)}


def _labels_file(settings: FitSettings) -> Path | None:
    """The file that the labels are in, if they name none of the columns of the data."""
    path = None if settings.labels is None else local_path(settings.labels)
    return path if path is not None and path.is_file() and path.suffix else None


def _inputs(settings: FitSettings, data: Data) -> dict[str, Input]:
    """The digests of rows, labels, and of the run that the fit starts from."""
    found = {"data": values_of(settings.data, [data.values, data.step])}
    if data.condition is not None:
        source = settings.data if settings.labels is None else settings.labels
        found["labels"] = values_of(source, [data.condition, list(data.classes)])
    if settings.start_from is not None:
        found["start_from"] = run_input(settings.start_from)
    return found


def _begun(settings: FitSettings, data: Data) -> Callable[..., Fit]:
    """All that can be refused has been; what is left to say is how long, and in which run."""
    if settings.start_from is not None:
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
    budget, share = settings.allowance, settings.share_of_steps
    steps = budget.get("steps") or round(60 * share * budget["minutes"] / per_step)
    lines = [f"{len(data):,} rows of shape {list(data.event_shape)}, {data.conditions} conditions"]
    lines += [f"data: {note}" for note in data.notes]
    lines += [f"{flow}: {size:,} parameters, {size * 4 * 6 / 1e6:.3g} MB with what Adam keeps"]
    lines += [f"{divergence} by the estimator: {estimator}"]
    minutes = steps * per_step / 60
    lines += [f"about {steps:,} steps in {minutes:.2g} minutes"]
    critics = _critics(settings, tried, steps)
    if critics is not None:
        said, most = critics
        if "minutes" in budget:
            most = min(most, (1 - share) * budget["minutes"])
        lines += [f"{said} in up to {most:.2g} minutes: up to {minutes + most:.2g} minutes in all"]
    return "\n".join(lines)


def _critics(settings: FitSettings, tried: Fit, steps: int) -> tuple[str, float] | None:
    """The critics that follow the steps, and how many minutes they take at most."""
    if settings.share_of_steps == 1:
        return None
    aimed = settings.target_precision is not None or settings.budget is not None
    likelihood = is_likelihood(settings.chosen)
    chosen = settings.method.critic
    seconds = seconds_of_update(tried, chosen, settings.batch)
    count = max(chosen.lessons_after(steps) if aimed else 50, steps // (3 if likelihood else 10))
    if not aimed:
        return f"then a critic: {count:,} steps", count * seconds / 60
    judged = 1 if settings.target_precision is None else POINTS
    more = judged * max(1, chosen.lessons_after(steps) // 2)
    up_to = "up to " * (judged > 1)
    said = f"then two critics: {count:,} and {up_to}{more:,} steps"
    return said, (count + more) * seconds / 60


@single_precision()
def sample_run(
    path: str | os.PathLike,
    settings: SampleSettings,
    *,
    allow: Collection[str] = (),
    overwrite: bool = False,
) -> str:
    """Draw samples of the flow of a run and write them, in the user's units.

    Args:
        path: The folder of the run.
        settings: How many, at which trade-off.
        allow: What its ``run.json`` may have imported, each "module:name".
        overwrite: Replaces a file that is there.

    Returns:
        What was written, and what it cost.

    Raises:
        FileExistsError: There is such a file, or it is one of a run.
    """
    check_out_file(settings.out, overwrite=overwrite)
    if "target" in Run.open(path).settings:
        return _sample_target(path, settings, allow, overwrite)
    flow, _critic, classes = load_fit(path, allow=allow)
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
        held = None if _changed_latents(settings) else load_point(path)
        chosen = settings.budget is not None or settings.target_precision is not None
        if not chosen and held is not None:
            critic = load_critic(path, allow=allow).to(device)
            samples, cost = _at_point(law, critic, condition, settings.n, held)
        elif not chosen:
            counts = [min(BATCH, settings.n - i) for i in range(0, settings.n, BATCH)]
            samples, cost = torch.cat([law.sample(torch.Size([it])) for it in counts]), ""
        else:
            _refuse_changed_latents(settings)
            wanted = settings
            if held is not None and settings.target_precision is not None:
                wanted = _judged_budget(settings, held)
            samples, cost = _rejected(law, load_critic(path, allow=allow), condition, wanted)
            if wanted.target_precision is not None:
                cost += (
                    "; the precision is the critic's own claim, which nothing has judged: fit "
                    "with --target-precision"
                )
    columns = (Run.open(path).record["data"] or {}).get("columns", ())
    check_samples(samples)
    away = flow.units.spread_of(samples).abs().flatten(1).amax(1) > FAR
    if away.any():
        cost += (
            f"; {int(away.sum()):,} of them lie more than {FAR:g} standard deviations from the "
            "mean of the data"
        )
    samples = flow.to_levels(samples) if settings.levels else samples
    write_samples(settings.out, samples.cpu().numpy(), columns)
    return f"{settings.n:,} samples in {settings.out}{cost}"


def save_run(fitted: Fit, out: str | os.PathLike) -> Path:
    """Write a fit into a run folder, as ``rkl fit`` does.

    Args:
        fitted: What :func:`fit_to_samples` returned.
        out: The folder, new or empty.

    Raises:
        ValueError: Its flow was handed over as a module, which nothing can build again.
        FileExistsError: The folder holds something.
    """
    chosen = fitted.settings or {}
    if "flow" not in chosen:
        raise ValueError(
            "fitted: its flow was handed over as a module, which nothing can build again; hand "
            "over an architecture, such as Coupling(), or one of your own."
        )
    rows = fitted.trained_on.to(torch.device("cpu"))
    settings = asdict(FitSettings(Path("rows-in-memory"), steps=max(1, fitted.training.steps)))
    settings |= {"data": "rows-in-memory"} | dict(chosen)
    with Run.create(out, "flows", settings, seed=chosen["seed"]) as run:
        found = fingerprint([rows.values.numpy().tobytes()])
        names = {"classes": list(fitted.classes), "columns": list(rows.columns)}
        run.update(data={"fingerprint": found, "rows": len(rows), **names})
        with run.running():
            for row in fitted.history:
                run.log(row)
            _save(run, replace(fitted, trained_on=rows))
    return run.path


def _pair(figure: Mean) -> tuple[float, float]:
    return figure.value.item(), figure.error.item()


def _read(settings: FitSettings) -> Data:
    return read_data(settings.data, settings.labels, dequantise=settings.dequantise)


def _save(run: Run, fitted: Fit) -> None:
    run.remember_rows(rows_of(fitted.trained_on))
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
    kept = done.steps if done.best_step is None else done.best_step
    result: dict[str, Any] = {"steps": done.steps, "kept_step": kept, "stopped": done.stopped}
    named = {"held_out": fitted.log_density, "gaussian": fitted.gaussian}
    result |= {name: to_json(it) for name, it in named.items() if it is not None}
    if fitted.reached is not None:
        reached = fitted.reached
        result["precision_at_most"] = to_json(reached.precision)
        result |= {"asked": reached.asked, "met": reached.met, "budget": reached.point.budget}
    run.update(result=result)


def _sample_target(
    path: str | os.PathLike, settings: SampleSettings, allow: Collection[str], overwrite: bool
) -> str:
    for name in ("latent_temperature", "truncation", "budget", "target_precision"):
        if getattr(settings, name) not in (None, 1.0):
            raise ValueError(f"{name} goes with a flow fitted to data; {path} has a target.")
    names = "n", "out", "condition", "seed", "device"
    how: dict[str, Any] = {name: getattr(settings, name) for name in names}
    chains = CHAINS if settings.chains is None else settings.chains
    return sample_target(path, chains=chains, allow=allow, overwrite=overwrite, **how)


def _condition(named: str | None, classes: tuple[str, ...]) -> Tensor | None:
    if not classes:
        if named is not None:
            raise ValueError(f"condition: the flow has no classes; got {named!r}.")
        return None
    if named is None:
        raise ValueError(
            f"condition must say which class to draw, one of {', '.join(classes)}: the flow was "
            f"fitted with labels. Say --condition {classes[0]}."
        )
    if named not in classes:
        raise ValueError(f"condition must be one of {', '.join(classes)}; got {named!r}.")
    return torch.nn.functional.one_hot(torch.tensor(classes.index(named)), len(classes)).float()


def _at_point(
    law: Any, critic: ScaledCritic, condition: Tensor | None, count: int, held: HeldPoint
) -> tuple[Tensor, str]:
    """Samples at the operating point that the fit was asked for."""

    def log_ratio(value: Tensor, _: Tensor | None) -> Tensor:
        return critic(value, condition)

    parts, made = [], 0
    for start in range(0, count, BATCH):
        size = min(BATCH, count - start)
        part, cost = draw_kept(law, log_ratio, held.log_lam, size)
        parts, made = [*parts, part], made + cost
    words = (
        f", {made / count:.3g} draws each, at the operating point of the fit (--budget 1 for none)"
    )
    return torch.cat(parts), words


def _judged_budget(settings: SampleSettings, held: HeldPoint) -> SampleSettings:
    """The budget at which the fit found the precision that is asked for.

    Raises:
        ValueError: It found it at none.
    """
    wanted = settings.target_precision
    for budget, value, error in sorted(held.judged):
        if wanted is not None and value - 2 * error >= wanted:
            return replace(settings, target_precision=None, budget=budget)
    if not held.judged:
        raise ValueError(
            f"target_precision={wanted} cannot be drawn at: the minutes of the fit ended before "
            "its critics had judged any budget. Fit with more --minutes, or say --budget."
        )
    best = max(held.judged, key=lambda it: it[1])
    raise ValueError(
        f"target_precision={wanted} was judged at no budget of the fit; the best was at most "
        f"{best[1]:.3f} ± {best[2]:.3f}, at budget={best[0]:.3g}. Fit with --target-precision "
        f"{wanted}, or say --budget."
    )


def _changed_latents(settings: SampleSettings) -> bool:
    return settings.latent_temperature != 1 or settings.truncation is not None


def _refuse_changed_latents(settings: SampleSettings) -> None:
    if _changed_latents(settings):
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

"""``rkl fit --target`` and ``rkl sample``: a flow fitted to a density, and exact draws by it."""

import copy
import math
import os
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from rkl import checks
from rkl.flows.precision import single_precision
from rkl.flows.runs import (
    BUDGET,
    PATHS,
    TRIED,
    WEIGHTS,
    check_same_data,
    check_samples,
    movable_paths,
    run_input,
    steps_of,
)
from rkl.flows.training import goes_on, load_state, save_state
from rkl.importing import names_in, only
from rkl.randomness import random_numbers
from rkl.readers import place_of_nan, read_arrays
from rkl.runs import (
    Run,
    check_out,
    check_out_file,
    fingerprint,
    row_fingerprint,
    write_atomic,
)
from rkl.runs.integrity import (
    Input,
    check_finite,
    values_of,
)
from rkl.runs.typed import record_of, settings_from, with_defaults
from rkl.sample.architecture import build_flow
from rkl.sample.files import write_chain
from rkl.sample.fit import TargetFit, fit_to_target
from rkl.sample.importance import reweight
from rkl.sample.metropolis import Chain, draw_proposals, independent_metropolis, law_of
from rkl.sample.observables import observe
from rkl.sample.settings import SampleSettings, TargetSettings, condition_grid, parse_ranges
from rkl.sample.targets.base import Condition, Target, check_values
from rkl.sample.targets.domains import check_inside

DRAWN = "drawn.bin"  # digests of draws that rkl sample wrote
REMEMBERED, DIGEST = 1_000, 8  # how many of one file, and bytes of each
EVERY = 25  # steps from one row, and one checkpoint, to the next
WORST_VALUES, WORST_DRAWS = 8, 500  # of the first condition, to find the worst by
MAX_RHAT, MIN_EFFECTIVE = 1.01, 400  # beyond which draws are warned of
MIN_MOVING_DRAWS = 20  # of a chain, beyond which it must have moved


@dataclass(frozen=True)
class TargetRun:
    """A run with a flow fitted to a target.

    Attributes:
        flow: ``flow(condition)`` has ``log_prob`` in nats and ``sample``.
        target: Target of the fit.
        ranges: The conditions, each with its training range.
        settings: All settings of the fit.
    """

    flow: nn.Module
    target: Target
    ranges: tuple[Condition, ...]
    settings: TargetSettings


@dataclass(frozen=True)
class FittedToTarget:
    """A finished fit, which prints as a summary.

    Attributes:
        path: The folder of its run.
        fit: The fit.
        worst: A sentence about the condition with the smallest share of effective draws; empty
            where there is only one.
    """

    path: Path
    fit: TargetFit
    worst: str = ""

    def __str__(self) -> str:
        done = self.fit.training
        row = done.history[-1]
        named = {"ess": "share of effective draws", "acceptance": "acceptance", "nll": "NLL, nats"}
        figures = [
            f"{said} {row[name]:.4g}" for name, said in named.items() if row.get(name) is not None
        ]
        lines = [f"{done.steps:,} steps in {done.seconds:.0f} s"]
        lines += [f"In the last of them, all conditions together: {', '.join(figures)}"]
        lines += [self.worst] if self.worst else []
        lines += [f"Stopped early: {done.stopped}"] if done.stopped else []
        return "\n".join([*lines, f"The run: {self.path}"])


def fit_target(
    settings: TargetSettings,
    out: str | os.PathLike,
    *,
    resume: bool = False,
    overwrite: bool = False,
) -> FittedToTarget:
    """Fit a flow to a target in a run folder; a resumed run comes to the same bits.

    Args:
        settings: Settings of the fit.
        out: The folder.
        resume: Continue the run there.
        overwrite: Replace the run there.
    """
    inputs = {name: getattr(settings, name) for name in ("data", "start_from")}
    check_out(out, overwrite=overwrite, resume=resume, inputs=inputs)
    more = goes_on(Path(out), **settings.budget) if resume else True
    data = _data(settings)
    flow = _build_flow(settings)
    _fit(settings, copy.deepcopy(flow), data, {"steps": 1})  # refuses before anything is written
    record = record_of(settings)
    how = {"seed": settings.seed, "resume": resume, "overwrite": overwrite}
    how["may_change"] = (*BUDGET, *movable_paths(out, resume))
    how["upgrade"] = partial(with_defaults, TargetSettings)
    with Run.create(out, "sample", record, **how) as run:
        rows = [] if data is None else [row.tobytes() for row in data[0].numpy()]
        check_same_data(run, fingerprint(rows), _inputs(settings, data), rows=len(rows))
        changed = {name: record[name] for name in (*PATHS, *BUDGET)}
        run.update(settings=run.settings | changed)
        with run.running():
            if more:
                run.remove_measured()
            fitted = _fit(settings, flow, data, settings.budget, run)
            run.remember_rows(rows)
            if more:  # of the earlier weights, measured meanwhile
                run.remove_measured()
            save_state(run.path / WEIGHTS, {"flow": flow.state_dict()})
            done = fitted.training
            run.update(result={"steps": done.steps, "stopped": done.stopped})
    return FittedToTarget(run.path, fitted, _worst(fitted.flow, settings))


@torch.no_grad()
@single_precision()
def _worst(flow: nn.Module, settings: TargetSettings) -> str:
    condition, target = condition_grid(settings.ranges, WORST_VALUES), settings.parsed_target
    if len(condition) < 2:
        return ""
    with random_numbers(settings.seed):
        law = law_of(flow, target, condition)
        _, log_p, log_q = draw_proposals(target, law, condition, (WORST_DRAWS,))
    try:
        weights = reweight((log_p - log_q).T)
    except ValueError:  # there is a condition all of whose draws have no density
        return "Under some conditions no draw of the flow has density."
    k = int(weights.ess.value.argmin())
    at = ", ".join(
        f"{it.name} = {value:.4g} {it.unit}".rstrip()
        for it, value in zip(target.conditions, condition[k].tolist(), strict=True)
    )
    return (
        f"Of {len(condition)} conditions {at} is the worst: share of effective draws "
        f"{weights.ess.value[k]:.4g}, acceptance {weights.acceptance.value[k]:.4g}"
    )


def dry_run(settings: TargetSettings) -> str:
    """Size, time and memory of a fit, estimated from a few steps; nothing is written."""
    data, flow = _data(settings), _build_flow(settings)
    tried = _fit(settings, flow, data, {"steps": TRIED})
    per_step, budget = tried.training.seconds / TRIED, settings.budget
    steps = steps_of(budget, per_step)
    size = sum(it.numel() for it in flow.parameters())
    ranges = [f"{it.name} in [{it.low:g}, {it.high:g}] {it.unit}" for it in settings.ranges]
    lines = [f"{settings.target}, {', '.join(ranges).rstrip() or 'without conditions'}"]
    lines += [f"{settings.flow}: {size:,} parameters", f"{settings.parsed_objective}"]
    lines += [f"{len(data[0]):,} draws"] if data is not None else []
    return "\n".join([*lines, f"about {steps:,} steps in {steps * per_step / 60:.2g} minutes"])


def load_target_run(path: str | os.PathLike, *, allow: Collection[str] = ()) -> TargetRun:
    """The flow of a run with its target and its conditions.

    Args:
        path: The folder of the run.
        allow: Names that its ``run.json`` may import, each "module:name".

    Raises:
        FileNotFoundError: There is no finished run.
        ValueError: The run is of another kind.
    """
    run = Run.open(path)
    if run.kind != "sample":
        raise ValueError(f"path: {path} is no run of rkl fit --target.")
    if not (run.path / WEIGHTS).exists():
        raise FileNotFoundError(f"path: {path} has no {WEIGHTS}: the run was not finished.")
    run.check_files(WEIGHTS)
    source = run.path / "run.json"
    with only(allow, source=source):
        settings = settings_from(TargetSettings, run.settings, source)
    target = settings.parsed_target
    flow = build_flow(settings.architecture, target, settings.ranges)
    flow.load_state_dict(load_state(run.path / WEIGHTS)["flow"])
    check_finite(flow.named_parameters(), run.path / WEIGHTS, "flow")
    return TargetRun(flow.requires_grad_(False), target, settings.ranges, settings)


@single_precision()
def load_run(path: str | os.PathLike, *, allow: Collection[str] = ()) -> nn.Module:
    """The flow of a run: ``flow(condition)``, [*batch, conditions], has ``log_prob``, ``sample``.

    Args:
        path: The folder of the run.
        allow: Names that its ``run.json`` may import, each "module:name".
    """
    return load_target_run(path, allow=allow).flow


@single_precision()
def sample_run(
    path: str | os.PathLike,
    settings: SampleSettings,
    *,
    allow: Collection[str] = (),
    overwrite: bool = False,
) -> str:
    """Write draws of the target of a run: chains with proposals of its flow, exact in the limit.

    Args:
        path: The run.
        settings: Number of draws, and condition.
        allow: Names that the ``run.json`` may import, each "module:name".
        overwrite: Replace a file there.

    Returns:
        Lines with the file, the acceptance and the mixing of the chains.

    Raises:
        FileExistsError: There is such a file, or it is one of a run.
        RuntimeError: A chain never moved: it is no result, and nothing is written.
    """
    n, out, chains = settings.n, settings.out, settings.chains
    check_out_file(out, overwrite=overwrite)
    if out.suffix not in (".nc", ".npz", ".npy"):
        raise ValueError(f"out must end in .nc, .npz or .npy for draws of a target; got {out}.")
    place = checks.device(settings.device)
    loaded = load_target_run(path, allow=allow)
    at = _values(settings.condition, loaded).to(place)
    draws = math.ceil(n / chains)
    with warnings.catch_warnings():
        if draws > MIN_MOVING_DRAWS:
            warnings.filterwarnings("ignore", message=".*they are no result")  # said below
        flow = loaded.flow.to(place)
        how: dict[str, Any] = {"draws": draws, "chains": chains, "seed": settings.seed}
        chain = independent_metropolis(loaded.target, flow, at, **how)
    if draws > MIN_MOVING_DRAWS and bool(chain.failed):
        raise RuntimeError(
            f"a chain took none of its {draws:,} proposals: the flow is too far from the "
            "target for a result, and nothing was written. Train it longer."
        )
    if bool((chain.log_p == -math.inf).any()):
        raise RuntimeError(
            "a chain met no proposal where the target has density: the flow is too far from the "
            "target for a result, and nothing was written. Train it longer."
        )
    check_samples(chain.x.flatten(0, 1))
    observed = chain.measure(loaded.target)
    write_chain(out, chain, observed, loaded.target)
    _remember_drawn(Run.open(path), chain.x.flatten(0, 1))
    summary = f"{chains} chains of {draws:,} draws in {out}; accepted: {chain.acceptance:.3f}"
    longest = int(chain.longest_rejection_run)
    summary += f"; longest run without an accepted proposal: {longest} draws"
    measured = {"log p": chain.log_p}
    if draws >= 4:
        each = at.expand(*chain.accepted.shape, -1)
        measured |= observe(loaded.target, chain.x, each)
        measured.pop("log_density", None)
    judged = chain.diagnose(measured) if draws >= 4 else {}
    lines = [f"{name}: {_judgement(it)}" for name, it in judged.items()]
    return "\n".join([summary, *lines, *_warnings(chain, judged)])


def _judgement(of: Mapping[str, Tensor]) -> str:
    if of["rhat"].isnan():
        return "it never changed, so that nothing can be said of it"
    return (
        f"R-hat {of['rhat']:.3f}, {of['ess_bulk']:,.0f} effective draws in the bulk, "
        f"{of['ess_tail']:,.0f} in the tails"
    )


def _warnings(chain: Chain, judged: Mapping[str, Mapping[str, Tensor]]) -> Iterator[str]:
    """Reasons not to trust averages over these draws, a line each."""
    if bool(chain.failed):
        yield "Warning: a chain never moved; its draws are no result."
    ratios = {name: it["rhat"].item() for name, it in judged.items()}
    disagree = {name: it for name, it in ratios.items() if it > MAX_RHAT}
    if disagree:
        name = max(disagree, key=disagree.__getitem__)
        yield (
            f"Warning: R-hat of {name} is {disagree[name]:.3f}, above {MAX_RHAT}: the chains do "
            "not agree yet. Draw more, or fit the flow for longer."
        )
    least = {
        name: min(it["ess_bulk"].item(), it["ess_tail"].item()) for name, it in judged.items()
    }
    poor = {name: it for name, it in least.items() if it < MIN_EFFECTIVE}
    if poor:
        name = min(poor, key=poor.__getitem__)
        yield (
            f"Warning: {name} has {poor[name]:,.0f} effective draws, below {MIN_EFFECTIVE}: its "
            "errors are uncertain. Draw more, or fit the flow for longer."
        )


def _remember_drawn(run: Run, x: Float[Tensor, "draws *event"]) -> None:
    """Record digests of some draws, which cannot show coverage: see :func:`count_drawn`."""
    if not os.access(run.path, os.W_OK):
        return
    subsample = x[:: -(-len(x) // REMEMBERED)].cpu().float()
    earlier = (run.path / DRAWN).read_bytes() if (run.path / DRAWN).exists() else b""
    digests = {earlier[k : k + DIGEST] for k in range(0, len(earlier), DIGEST)}
    digests |= {row_fingerprint(row.tobytes()) for row in subsample.numpy()}
    run.record_files([DRAWN])
    write_atomic(run.path / DRAWN, b"".join(sorted(digests)))
    run.measure_files([DRAWN])


def count_drawn(run: Run, x: Float[Tensor, "draws *event"]) -> int:
    """Number of these rows that are recorded draws of the run itself."""
    path = run.path / DRAWN
    stored = path.read_bytes() if path.exists() else b""
    digests = {stored[k : k + DIGEST] for k in range(0, len(stored), DIGEST)}
    return sum(row_fingerprint(row.tobytes()) in digests for row in x.cpu().float().numpy())


def _inputs(settings: TargetSettings, data: tuple[Tensor, Tensor] | None) -> dict[str, Input]:
    inputs = {}
    if data is not None:
        inputs["data"] = values_of(settings.data, [data[0]])
        inputs["conditions of data"] = values_of(settings.data, [data[1]])
    if settings.start_from is not None:
        inputs["start_from"] = run_input(settings.start_from)
    return inputs


def _build_flow(settings: TargetSettings) -> nn.Module:
    target = settings.parsed_target
    with random_numbers(settings.seed):
        flow = build_flow(settings.architecture, target, settings.ranges)
    if settings.start_from is not None:
        begin: Any = getattr(flow, "start_from", None)
        if begin is None:
            raise ValueError(f"start_from goes with coarse-to-fine flows; got {settings.flow}.")
        texts = settings.target, settings.flow, settings.objective, settings.divergence
        begin(load_target_run(settings.start_from, allow=names_in(*texts)).flow)
    return flow


def _fit(
    settings: TargetSettings,
    flow: nn.Module,
    data: tuple[Tensor, Tensor] | None,
    budget: dict[str, Any],
    run: Run | None = None,
) -> TargetFit:
    ranges = settings.ranges or None
    aim, chosen = settings.parsed_target, settings.parsed_objective
    how = budget | settings.how
    return fit_to_target(flow, aim, ranges, chosen, data=data, run=run, every=EVERY, **how)


def _data(settings: TargetSettings) -> tuple[Tensor, Tensor] | None:
    return None if settings.data is None else read_draws(settings.data, settings.parsed_target)


def read_draws(
    path: Path, target: Target
) -> tuple[Float[Tensor, "rows *event"], Float[Tensor, "rows conditions"]]:
    """Draws of a target with their conditions, from .npz with x and condition, or x alone.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It cannot be read, or does not hold draws of this target.
    """
    event, count = target.event_shape, len(target.conditions)
    arrays = {name: it.values for name, it in read_arrays(path).items()}
    needed = ("x", "condition") if count else ("x",)
    lacking = [name for name in needed if name not in arrays]
    if lacking:
        raise ValueError(
            f"data: {path} must hold {' and '.join(needed)}; it lacks {lacking[0]!r}."
        )
    for name in needed:
        where = place_of_nan(arrays[name])
        if where is not None:
            raise ValueError(f"data: {name} in {path} must be finite; {where}.")
    x = np.asarray(arrays["x"], np.float32)
    lead = x.shape[: max(0, x.ndim - len(event))]
    if x.shape[len(lead) :] != event or not lead:
        raise ValueError(
            f"data: {path} cannot be read: x must be [rows, {', '.join(map(str, event))}]; "
            f"got {x.shape}."
        )
    condition = np.asarray(arrays["condition"] if count else np.zeros((0,)), np.float32)
    try:
        condition = np.broadcast_to(condition, (*lead, count))
    except ValueError:
        raise ValueError(
            f"data: {path} cannot be read: condition must be {[*lead, count]}, for each row of x; "
            f"got {list(condition.shape)}."
        ) from None
    rows = math.prod(lead)
    flat = x.reshape(rows, *event), condition.reshape(rows, count)
    rows_of, given = (torch.from_numpy(it.copy()) for it in flat)
    check_inside(f"data: {path}", target.chart, rows_of)
    check_values(target, given)
    return rows_of, given


def _values(text: str | None, target_run: TargetRun) -> Float[Tensor, " conditions"]:
    given = {part.partition("=")[0].strip() for part in (text or "").split(",")}
    asked = parse_ranges(text, target_run.target)
    lacking: Sequence[str] = [it.name for it in asked if it.name not in given or it.low < it.high]
    if lacking:
        raise ValueError(
            f"condition must give one value of {', '.join(lacking)}, such as {lacking[0]}=0.9; "
            f"got {text!r}."
        )
    return torch.tensor([it.low for it in asked])

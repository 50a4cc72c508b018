"""``rkl fit --target`` and what follows: exact draws of a density, by the flow fitted to it."""

import copy
import math
import os
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from rkl.checks import LARGEST_COUNT, LARGEST_RATE, LARGEST_SEED, integer
from rkl.divergences.base import number
from rkl.divergences.parse import with_module
from rkl.flows.architectures import (
    NSF,
    Architecture,
    CircularSplines,
    Coupling,
    MixedSplines,
    parse_architecture,
)
from rkl.flows.built import built
from rkl.flows.data import check_device
from rkl.flows.evaluate import condition_grid
from rkl.flows.files import write_chain
from rkl.flows.importance import reweight
from rkl.flows.lattice import CheckerboardRealNVP, CoarseToFine, CoarseToFineField
from rkl.flows.mcmc.kernels import seeded
from rkl.flows.metropolis import Chain, independent_metropolis, law_of, proposed
from rkl.flows.objectives import Objective, parse_objective
from rkl.flows.observables import observe, turn_invariant
from rkl.flows.precision import single_precision
from rkl.flows.target_fit import FEW, TargetFit, fit_to_target
from rkl.flows.targets import XY, Phi4, Target, parse_target
from rkl.flows.targets.base import Condition, check_values, spelt
from rkl.flows.targets.domains import check_inside
from rkl.flows.training import MINUTES, goes_on, load_state, save_state
from rkl.importing import names_in, only
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
    check_inputs,
    files_of,
    inputs_before,
    values_of,
)
from rkl.runs.typed import settings_from

WEIGHTS = "flow.safetensors"
DRAWN = "drawn.bin"  # digests of draws that rkl sample wrote
REMEMBERED, DIGEST = 1_000, 8  # how many of one file, and bytes of each
EVERY = 25  # steps from one row, and one checkpoint, to the next
TRIED = 20  # steps from which --dry-run foretells the time
CHAINS = 4
WORST_OF, WORST_BY = 8, 500  # values of the first condition, and draws, to find the worst by
MAX_RHAT, MIN_EFFECTIVE = 1.01, 400  # beyond which draws are warned of
FEWEST = 20  # draws of a chain, of which more than this must have moved
BUDGET = "steps", "minutes"  # settings that a resumed run may have more of
PATHS = "data", "start_from"  # settings that run.json keeps as text
SPLINES = NSF(transforms=3, hidden=(128, 128), bins=16)  # of few coordinates


@dataclass(frozen=True)
class TargetSettings:
    """Which density is fitted, under which conditions and objective, within which budget.

    Args:
        target: Unnormalised density: "xy(side=8)", or "module:function(event_shape=(2,))".
        objective: Terms "1.0*source:divergence", joined by +, on the sources target, data and
            critic; or a variant of AdvNF. Default: reverse KL, and with data KL on them too.
        divergence: Instead of an objective, one divergence on the target.
        data: Draws of the target: .npz with x and condition, such as rkl sample writes; or
            .npy where the target has no conditions.
        condition: Where to train: "T=0.5:1.5" or "T=0.9"; else all of the target's range.
        flow: Architecture, with settings in brackets; by default what suits the target.
        start_from: A run on a lattice of another side, whose weights to begin with.
        steps: The budget in steps.
        minutes: The budget in minutes; 2 where none is given.
        batch: Draws in a step, all conditions together.
        strata: Conditions in a step.
        anneal: Whether it begins with particles cooled to the target, by default on the line; or
            with many coordinates with the target flattened, by default without data too.
        log_z: "learned" allows divergences that are not scale-free where log Z is unknown.
        lr: Highest learning rate.
        seed: Of all random numbers.
        device: The cpu, where targets and their chains are computed.
    """

    target: str = field(metadata={"metavar": "TARGET"})
    objective: str | None = None
    divergence: str | None = field(default=None, metadata={"metavar": "D"})
    data: Path | None = field(default=None, metadata={"metavar": "DRAWS"})
    condition: str | None = field(default=None, metadata={"metavar": "RANGES"})
    flow: str | None = None
    start_from: Path | None = field(default=None, metadata={"metavar": "RUN"})
    steps: int | None = field(default=None, metadata={"metavar": "N"})
    minutes: float | None = field(default=None, metadata={"metavar": "M"})
    batch: int = 512
    strata: int = 32
    anneal: bool | None = None
    log_z: Literal["learned"] | None = None
    lr: float = 5e-3
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self):
        if self.device != "cpu":
            raise ValueError(
                f"device must be 'cpu', where targets are computed; got {self.device!r}."
            )
        for name, one, other in (
            ("steps and minutes", self.steps, self.minutes),
            ("objective and divergence", self.objective, self.divergence),
        ):
            if one is not None and other is not None:
                raise ValueError(f"one of {name}; got {one} and {other}.")
        limits = {"steps": LARGEST_COUNT, "minutes": LARGEST_COUNT, "lr": LARGEST_RATE}
        for name, most in limits.items():
            if getattr(self, name) is not None:
                number(name, getattr(self, name), above=0, at_most=most)
        integer("seed", self.seed, at_most=LARGEST_SEED)
        for name in ("batch", "strata"):
            integer(name, getattr(self, name), at_most=LARGEST_COUNT)
        object.__setattr__(self, "target", spelt(self.aim, self.target))
        object.__setattr__(self, "flow", with_module(self.architecture))
        _ = self.chosen, self.ranges

    @property
    def aim(self) -> Target:
        """The density."""
        return parse_target(self.target)

    @property
    def architecture(self) -> Architecture:
        """What is built."""
        return suited(self.aim) if self.flow is None else parse_architecture(self.flow)

    @property
    def chosen(self) -> Objective:
        """What is minimised."""
        if self.divergence is not None:
            return parse_objective(f"target:{self.divergence}")
        if self.objective is not None:
            return parse_objective(self.objective)
        return parse_objective("reverse-kl" if self.data is None else "fkl-rkl")

    @property
    def ranges(self) -> tuple[Condition, ...]:
        """The conditions, each with the range that is trained."""
        return parse_ranges(self.condition, self.aim)

    @property
    def budget(self) -> dict[str, Any]:
        """In steps, or in minutes."""
        if self.steps is not None:
            return {"steps": self.steps}
        return {"minutes": MINUTES if self.minutes is None else self.minutes}

    @property
    def how(self) -> dict[str, Any]:
        """The rest of what :func:`fit_to_target` is told."""
        names = "seed", "batch", "strata", "anneal", "log_z", "lr"
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class TargetRun:
    """A run with a flow fitted to a target.

    Attributes:
        flow: ``flow(condition)`` has ``log_prob`` in nats and ``sample``.
        target: What it was fitted to.
        ranges: The conditions, each with the range that was trained.
        settings: All settings of the fit.
    """

    flow: nn.Module
    target: Target
    ranges: tuple[Condition, ...]
    settings: TargetSettings


@dataclass(frozen=True)
class FittedToTarget:
    """A finished fit, which prints what there is to know of it.

    Attributes:
        path: The folder of its run.
        fit: What was fitted.
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
        figures = [f"{said} {row[name]:.4g}" for name, said in named.items() if name in row]
        lines = [f"{done.steps:,} steps in {done.seconds:.0f} s"]
        lines += [f"In the last of them, all conditions together: {', '.join(figures)}"]
        lines += [self.worst] if self.worst else []
        lines += [f"Stopped early: {done.stopped}"] if done.stopped else []
        return "\n".join([*lines, f"The run: {self.path}"])


def suited(target: Target) -> Architecture:
    """The architecture that a target is fitted with where none is named.

    >>> suited(XY(side=4)) == CoarseToFine.of(XY(side=4))
    True
    """
    side = math.isqrt(math.prod(target.event_shape))
    checkered = side**2 == math.prod(target.event_shape) and side % 2 == 0
    power_of_two = side & (side - 1) == 0
    if isinstance(target, XY) and power_of_two:
        return CoarseToFine.of(target)
    if isinstance(target, Phi4) and target.side & (target.side - 1) == 0:
        return CoarseToFineField.of(target)
    if isinstance(target, Phi4) and checkered:
        return CheckerboardRealNVP(filters=16, circle=False)
    few = math.prod(target.event_shape) <= FEW
    if target.domain == "circle":
        if checkered and power_of_two and _knows_no_direction(target):
            return CoarseToFine(integrate="none")
        relative = math.prod(target.event_shape) > 1 and _ignores_turns(target)
        return CircularSplines(passes=None if few else 2, relative=relative)
    if target.chart.circle.any():
        return MixedSplines(passes=None if few else 2)
    return SPLINES if few else Coupling()


def _knows_no_direction(target: Target) -> bool:
    """True for angles at one temperature whose density a common turn leaves as it is."""
    if [it.name for it in target.conditions] != ["T"] or len(target.event_shape) != 1:
        return False
    return _ignores_turns(target)


def _ignores_turns(target: Target) -> bool:
    """True for angles whose density a common turn leaves as it is."""
    middle = [(it.low + it.high) / 2 for it in target.conditions]
    try:
        return turn_invariant(target, torch.tensor([middle]))
    except Exception:  # of the user's function, which the fit refuses in words
        return False


def parse_ranges(text: str | None, target: Target) -> tuple[Condition, ...]:
    """The conditions of a target, with ranges from a text such as "T=0.5:1.5, K=0".

    Raises:
        ValueError: It cannot be read, or names what is no condition.

    >>> parse_ranges("T=0.5:1.5", XY(side=2))
    (Condition(name='T', low=0.5, high=1.5, unit='J', above=0.0, at_least=None),)
    """
    known, given = {it.name: it for it in target.conditions}, set()
    for part in [] if text is None else text.split(","):
        name, _, limits = (it.strip() for it in part.partition("="))
        if name not in known:
            has = ", ".join(known) or "none"
            raise ValueError(f"condition: those of {target} are {has}; got {part.strip()!r}.")
        if name in given:
            raise ValueError(f"condition: {name} is given twice; got {text!r}.")
        given.add(name)
        low, colon, high = limits.partition(":")
        try:
            one, other = float(low), float(high if colon else low)
        except ValueError:
            one = other = math.nan
        if not -math.inf < one <= other < math.inf:
            raise ValueError(
                f"condition: {part.strip()!r} cannot be read; expected a value such as "
                f"{name}=0.9, or a range such as {name}=0.5:1.5."
            )
        known[name] = known[name]._replace(low=one, high=other)
    check_values(target, [[it.low for it in known.values()]])
    return tuple(known.values())


def fit_target(
    settings: TargetSettings,
    out: str | os.PathLike,
    *,
    resume: bool = False,
    overwrite: bool = False,
) -> FittedToTarget:
    """Fit a flow to a target in a run folder; a resumed run comes to the same bits.

    Args:
        settings: What is fitted to what.
        out: The folder.
        resume: Goes on with the run there.
        overwrite: Replaces it.
    """
    inputs = {name: getattr(settings, name) for name in ("data", "start_from")}
    check_out(out, overwrite=overwrite, resume=resume, inputs=inputs)
    more = goes_on(Path(out), **settings.budget) if resume else True
    data = _data(settings)
    flow = _begun(settings)
    _fitted(
        settings, copy.deepcopy(flow), data, {"steps": 1}
    )  # refuses before anything is written
    kept = asdict(settings)
    for name in PATHS:
        kept[name] = None if kept[name] is None else str(kept[name].resolve())
    how = {"seed": settings.seed, "resume": resume, "overwrite": overwrite}
    how["may_change"] = (*BUDGET, *moved(out, resume))
    with Run.create(out, "flows", kept, **how) as run:
        rows = [] if data is None else [row.tobytes() for row in data[0].numpy()]
        check_same_data(run, fingerprint(rows), _inputs(settings, data), rows=len(rows))
        changed = {name: kept[name] for name in (*PATHS, *BUDGET)}
        run.update(settings=run.settings | changed)
        with run.running():
            if more:
                run.remove_measured()
            fitted = _fitted(settings, flow, data, settings.budget, run)
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
    """The condition, of a few across the range, with the smallest share of effective draws."""
    condition, target = condition_grid(settings.ranges, WORST_OF), settings.aim
    if len(condition) < 2:
        return ""
    with seeded(settings.seed, condition.device):
        law = law_of(flow, target, condition)
        _, log_p, log_q = proposed(target, law, condition, (WORST_BY,))
    try:
        found = reweight((log_p - log_q).T)
    except ValueError:  # there is a condition all of whose draws have no density
        return "Under some conditions no draw of the flow has density."
    k = int(found.ess.value.argmin())
    at = ", ".join(
        f"{it.name} = {value:.4g} {it.unit}".rstrip()
        for it, value in zip(target.conditions, condition[k].tolist(), strict=True)
    )
    return (
        f"Of {len(condition)} conditions {at} is the worst: share of effective draws "
        f"{found.ess.value[k]:.4g}, acceptance {found.acceptance.value[k]:.4g}"
    )


def estimate_target(settings: TargetSettings) -> str:
    """What a fit would do and how long it would take, from a few steps; nothing is written."""
    data, flow = _data(settings), _begun(settings)
    tried = _fitted(settings, flow, data, {"steps": TRIED})
    per_step, budget = tried.training.seconds / TRIED, settings.budget
    steps = budget.get("steps") or round(60 * budget["minutes"] / per_step)
    size = sum(it.numel() for it in flow.parameters())
    ranges = [f"{it.name} in [{it.low:g}, {it.high:g}] {it.unit}" for it in settings.ranges]
    lines = [f"{settings.target}, {', '.join(ranges).rstrip() or 'without conditions'}"]
    lines += [f"{settings.flow}: {size:,} parameters", f"{settings.chosen}"]
    lines += [f"{len(data[0]):,} draws"] if data is not None else []
    return "\n".join([*lines, f"about {steps:,} steps in {steps * per_step / 60:.2g} minutes"])


def load_target_run(path: str | os.PathLike, *, allow: Collection[str] = ()) -> TargetRun:
    """The flow of a run, what it was fitted to, and where.

    Args:
        path: The folder of the run.
        allow: What its ``run.json`` may have imported, each "module:name".

    Raises:
        FileNotFoundError: There is no finished run.
        ValueError: The flow there was fitted to data.
    """
    run = Run.open(path)
    if run.kind != "flows" or "target" not in run.settings:
        raise ValueError(f"path: {path} is no run of rkl fit --target.")
    if not (run.path / WEIGHTS).exists():
        raise FileNotFoundError(f"path: {path} has no {WEIGHTS}: the run was not finished.")
    run.check_files(WEIGHTS)
    source = run.path / "run.json"
    with only(allow, source=source):
        settings = settings_from(TargetSettings, run.settings, source)
    target = settings.aim
    flow = built(settings.architecture, target, settings.ranges)
    flow.load_state_dict(load_state(run.path / WEIGHTS)["flow"])
    check_finite(flow.named_parameters(), run.path / WEIGHTS, "flow")
    return TargetRun(flow.requires_grad_(False), target, settings.ranges, settings)


def sample_target(
    path: str | os.PathLike,
    *,
    n: int,
    out: Path,
    condition: str | None = None,
    chains: int = CHAINS,
    seed: int = 0,
    device: str = "cpu",
    allow: Collection[str] = (),
    overwrite: bool = False,
) -> str:
    """Write draws of the target of a run: chains with proposals of its flow, exact in the limit.

    Args:
        path: The run.
        n: Number of draws, all chains together; rounded up to the same for each.
        out: .nc, as ArviZ has it; .npz with the same by name; .npy for the states alone.
        condition: A value of every condition: "T=0.9".
        chains: Number of chains.
        seed: Of all random numbers.
        device: Where to compute.
        allow: What the ``run.json`` may have imported, each "module:name".
        overwrite: Replaces a file that is there.

    Returns:
        What was written, and how the chains moved.

    Raises:
        FileExistsError: There is such a file, or it is one of a run.
        RuntimeError: A chain never moved: it is no result, and nothing is written.
    """
    check_out_file(out, overwrite=overwrite)
    if out.suffix not in (".nc", ".npz", ".npy"):
        raise ValueError(f"out must end in .nc, .npz or .npy for draws of a target; got {out}.")
    place = check_device(device)
    found = load_target_run(path, allow=allow)
    at = _values(condition, found).to(place)
    number("chains", chains, at_least=1)
    draws = math.ceil(n / chains)
    with warnings.catch_warnings():
        if draws > FEWEST:
            warnings.filterwarnings("ignore", message=".*they are no result")  # said below
        flow = found.flow.to(place)
        how: dict[str, Any] = {"draws": draws, "chains": chains, "seed": seed}
        chain = independent_metropolis(found.target, flow, at, **how)
    if draws > FEWEST and bool(chain.failed):
        raise RuntimeError(
            f"a chain took none of its {draws - 1:,} proposals: the flow is too far from the "
            "target for a result, and nothing was written. Train it longer."
        )
    check_samples(chain.x.flatten(0, 1))
    observed = chain.measure(found.target)
    write_chain(out, chain, observed, found.target)
    _remember_drawn(Run.open(path), chain.x.flatten(0, 1))
    said = f"{chains} chains of {draws:,} draws in {out}; accepted: {chain.acceptance:.3f}"
    said += f"; longest sojourn: {int(chain.sojourn)} draws"
    measured = {"log p": chain.log_p}
    if draws >= 4:
        each = at.expand(*chain.accepted.shape, -1)
        measured |= observe(found.target, chain.x, each)
        measured.pop("log_density", None)
    judged = chain.diagnose(measured) if draws >= 4 else {}
    lines = [f"{name}: {_judgement(it)}" for name, it in judged.items()]
    return "\n".join([said, *lines, *_warnings(chain, judged)])


def _judgement(of: Mapping[str, Tensor]) -> str:
    """R-hat and effective draws of one quantity, as text."""
    if of["rhat"].isnan():
        return "it never changed, so that nothing can be said of it"
    return (
        f"R-hat {of['rhat']:.3f}, {of['ess_bulk']:,.0f} effective draws in the bulk, "
        f"{of['ess_tail']:,.0f} in the tails"
    )


def _warnings(chain: Chain, judged: Mapping[str, Mapping[str, Tensor]]) -> Iterator[str]:
    """Why averages over these draws are not to be trusted, a line each."""
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
    """Note down some draws, which say nothing of what the flow lacks: see :func:`count_drawn`."""
    if not os.access(run.path, os.W_OK):
        return
    few = x[:: -(-len(x) // REMEMBERED)].cpu().float()
    known = (run.path / DRAWN).read_bytes() if (run.path / DRAWN).exists() else b""
    digests = {known[k : k + DIGEST] for k in range(0, len(known), DIGEST)}
    digests |= {row_fingerprint(row.tobytes()) for row in few.numpy()}
    run.record_files([DRAWN])
    write_atomic(run.path / DRAWN, b"".join(sorted(digests)))
    run.measure_files([DRAWN])


def count_drawn(run: Run, x: Float[Tensor, "draws *event"]) -> int:
    """How many of these rows are draws of the run itself, of those that it remembers."""
    path = run.path / DRAWN
    known = path.read_bytes() if path.exists() else b""
    digests = {known[k : k + DIGEST] for k in range(0, len(known), DIGEST)}
    return sum(row_fingerprint(row.tobytes()) in digests for row in x.cpu().float().numpy())


def check_samples(samples: Float[Tensor, "rows *event"]) -> None:
    """Refuse samples of which some are NaN or infinite, which no file should hold.

    Raises:
        FloatingPointError: Saying how many of how many.
    """
    bad = int((~samples.isfinite()).reshape(len(samples), -1).any(1).sum())
    if bad:
        raise FloatingPointError(
            f"{bad:,} of {len(samples):,} samples are NaN or infinite, and nothing was written. "
            "The flow gives no numbers there: fit it again, with a smaller --lr."
        )


def check_same_data(run: Run, found: str, inputs: dict[str, Input], **others: Any) -> None:
    """Note down what a run reads; refuse other inputs than those that it began with."""
    check_inputs(run.path, inputs_before(run.path), inputs)
    before = run.record["data"]
    if before is not None and before["fingerprint"] != found:
        raise ValueError(
            f"resume: the data are not those that {run.path} was begun with: their fingerprint "
            f"is {found}, and was {before['fingerprint']}."
        )
    run.update(data={"fingerprint": found, **others}, inputs=inputs)


def _inputs(settings: TargetSettings, data: tuple[Tensor, Tensor] | None) -> dict[str, Input]:
    """The digests of the draws, their conditions, and of the run that the fit starts from."""
    found = {}
    if data is not None:
        found["data"] = values_of(settings.data, [data[0]])
        found["conditions of data"] = values_of(settings.data, [data[1]])
    if settings.start_from is not None:
        found["start_from"] = run_input(settings.start_from)
    return found


def moved(out: str | os.PathLike, resume: bool) -> tuple[str, ...]:
    """The settings that name files, which a resumed run may find in other places.

    They may only where run.json has the digests by which their contents are compared.
    """
    return PATHS if resume and inputs_before(out) else ()


def run_input(path: str | os.PathLike) -> Input:
    """The digest of the weights of a run that another one starts from."""
    weights = Path(path, WEIGHTS)
    return files_of(path, {WEIGHTS: weights})


def _begun(settings: TargetSettings) -> nn.Module:
    """The flow as it is before the first step."""
    target = settings.aim
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        flow = built(settings.architecture, target, settings.ranges)
    if settings.start_from is not None:
        begin: Any = getattr(flow, "start_from", None)
        if begin is None:
            raise ValueError(f"start_from goes with coarse-to-fine flows; got {settings.flow}.")
        said = settings.target, settings.flow, settings.objective, settings.divergence
        begin(load_target_run(settings.start_from, allow=names_in(*said)).flow)
    return flow


def _fitted(
    settings: TargetSettings,
    flow: nn.Module,
    data: tuple[Tensor, Tensor] | None,
    budget: dict[str, Any],
    run: Run | None = None,
) -> TargetFit:
    ranges = settings.ranges or None
    aim, chosen = settings.aim, settings.chosen
    how = budget | settings.how
    return fit_to_target(flow, aim, ranges, chosen, data=data, run=run, every=EVERY, **how)


def _data(settings: TargetSettings) -> tuple[Tensor, Tensor] | None:
    return None if settings.data is None else read_draws(settings.data, settings.aim)


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


def _values(text: str | None, found: TargetRun) -> Float[Tensor, " conditions"]:
    """One value for each condition."""
    given = {part.partition("=")[0].strip() for part in (text or "").split(",")}
    asked = parse_ranges(text, found.target)
    lacking: Sequence[str] = [it.name for it in asked if it.name not in given or it.low < it.high]
    if lacking:
        raise ValueError(
            f"condition must give one value of {', '.join(lacking)}, such as {lacking[0]}=0.9; "
            f"got {text!r}."
        )
    return torch.tensor([it.low for it in asked])

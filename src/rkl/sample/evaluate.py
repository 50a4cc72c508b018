"""Evaluation of a flow on its target, condition by condition, every figure with its error."""

import itertools
import math
import os
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rkl import checks
from rkl.checks import LARGEST_COUNT, integer, warn
from rkl.flows.precision import single_precision
from rkl.flows.runs import single_run, write_evaluation
from rkl.randomness import random_numbers
from rkl.runs import REPORT, Run
from rkl.sample.coverage import Coverage, judge_coverage, judge_ratios
from rkl.sample.importance import Thermodynamics, reweight, tails_of_averages, thermodynamics
from rkl.sample.log_z import thermodynamic_integration
from rkl.sample.mcmc import markov_chain
from rkl.sample.mcmc.kernels import kernel_of_angles, name_of
from rkl.sample.metropolis import Chain, draw_proposals, independent_metropolis, law_of
from rkl.sample.observables import averages, compare_with_held_out, observe
from rkl.sample.results import Evaluation, Reference, Values
from rkl.sample.run import TargetRun, count_drawn, load_target_run, read_draws
from rkl.sample.settings import EvaluateSettings, condition_grid, parse_ranges
from rkl.sample.smc import Evidence, evidence
from rkl.sample.targets.base import (
    Target,
    check_condition,
    exact_draws,
    exact_log_z,
    has_temperature,
)
from rkl.stats import Mean, rhat

MIN_COVERAGE_DRAWS, MAX_COVERAGE_DRAWS = 400, 4_000  # on which coverage is tested
SWEEPS = {"warm_up": 50, "every": 2}  # of a heat bath, before the first draw and between draws
ISLANDS = 16  # of the particles of a reference
PARTICLES = ((4, 1_024), (8, 512), (math.inf, 256))  # of an island, up to so many coordinates
OF_ANGLES = 128  # particles of an island at most, where no mode is as narrow as on the line
COORDINATES = 2**19  # of all particles together, about
MIN_PARTICLES = 16  # of an island
DEVIATES = 6.0  # errors by which an average may differ from the reference's
EFFECTIVE = 100  # effective draws below which it is not compared
UNMIXED = 1.1  # R-hat above which a reference is none
ROUNDING = 1e-6  # of a condition in single precision, relative to its size
MAX_CHAINS = 128  # of a reference, of 50 draws or more


@torch.no_grad()
@single_precision()
def evaluate_on_target(
    flow: nn.Module,
    target: Target,
    condition: Float[Tensor, "rows conditions"] | None = None,
    *,
    draws: int = 2_000,
    chains: int = 8,
    held_out: Sequence[Float[Tensor, "_ *event"]] | None = None,
    train: Float[Tensor, "others *event"] | None = None,
    reference: bool = False,
    seed: int = 0,
) -> Evaluation:
    """Measure a flow on its target: averages and log Z after correction, and coverage.

    Args:
        flow: The flow, called with a condition.
        target: The target of its fit.
        condition: Conditions to measure at; by default eight values across the target's range.
        draws: Draws of each chain.
        chains: Chains under each condition.
        held_out: Independent draws of the target under each condition, not trained on.
        train: Training draws, to check that none is in held_out.
        reference: Whether to draw the target without the flow as well: exactly where it has a
            sampler, else by particles cooled to it (:func:`rkl.sample.evidence`), followed by
            chains of the target's own kernel, such as the heat bath of XY and Phi4.
        seed: Random seed.

    >>> from rkl.sample import GaussianMixture
    >>> from rkl.flows import NSF
    >>> from rkl.sample import fit_to_target
    >>> target = GaussianMixture(means=((0.0,), (2.0,)))
    >>> flow = fit_to_target(NSF(transforms=1, hidden=(16,)), target, steps=50).flow
    >>> found = evaluate_on_target(flow, target, torch.ones(1, 1), draws=500)
    >>> abs(found.thermodynamics.log_z.value.item()) < 0.1  # the target is normalised
    True
    """
    condition = _check_arguments(target, condition, draws, chains, held_out)
    began = time.perf_counter()
    chain = independent_metropolis(target, flow, condition, draws=draws, chains=chains, seed=seed)
    seconds = time.perf_counter() - began
    values = _observables(target, chain.x, condition)
    began = time.perf_counter()
    log_ratio, log_p, tails = _log_ratios(flow, target, condition, draws * chains, seed + 1)
    weights_seconds = time.perf_counter() - began
    drawn, judges = None, _Judges(held_out)
    if reference:
        drawn, judges = _reference(target, condition, draws * chains, seed + 2, judges)
    held_out = judges.held_out
    evaluation = Evaluation(
        target,
        condition,
        reweight(log_ratio, sites=math.prod(target.event_shape)),
        _thermodynamics(target, condition, log_ratio, log_p),
        chain,
        values,
        averages(target, values, condition),
        tuple(_coverage(flow, target, condition, log_ratio, judges, train, seed + 3)),
        tuple(_beside(flow, target, chain, held_out)) if held_out is not None else (),
        drawn,
        seconds,
        weights_seconds,
        tails,
    )
    return replace(evaluation, coverage=tuple(_with_deviations(evaluation)))


@dataclass(frozen=True)
class _Judges:
    """References of coverage: draws of the target under each condition, and their log Z."""

    held_out: Sequence[Tensor] | None = None
    evidence: Evidence | None = None
    source: str = ""

    def of(self, row: int) -> dict[str, Any]:
        """The references under one condition."""
        arguments: dict[str, Any] = {"source": self.source}
        if self.held_out is not None:
            arguments["held_out"] = self.held_out[row]
        if self.evidence is not None:
            log_z = self.evidence.log_z
            arguments["log_z"] = Mean(log_z.value[row], log_z.error[row])
            arguments["islands"] = self.evidence.x.shape[1]
            arguments["doubts"] = self.evidence.doubts[row]
        return arguments


def _with_deviations(evaluation: Evaluation) -> Iterator[Coverage]:
    """Coverage that also fails if averages of the flow differ from those of the reference."""
    apart = {name: z for name, z in evaluation.deviations().items() if name in evaluation.values}
    drawn = evaluation.reference
    if drawn is None or not any(bool((z.abs() > DEVIATES).any()) for z in apart.values()):
        yield from evaluation.coverage
        return
    both = evaluation.effective, drawn.effective
    for row, coverage in enumerate(evaluation.coverage):
        reasons = [
            f"{name} is {z[row]:.3g} errors from that of the {drawn.source}."
            for name, z in apart.items()
            if z[row].abs() > DEVIATES and all(of[name][row] >= EFFECTIVE for of in both)
        ]
        yield (
            coverage
            if coverage.reached is None
            else replace(coverage, reasons=(*coverage.reasons, *reasons))
        )


def _check_arguments(target: Target, condition: Tensor | None, draws, chains, held_out) -> Tensor:
    if condition is None:
        condition = condition_grid(target.conditions)
    condition = check_condition(target, condition)
    if condition.ndim != 2:
        raise ValueError(
            f"condition must be [rows, {len(target.conditions)}]; got {list(condition.shape)}."
        )
    integer("draws", draws, at_least=4, at_most=LARGEST_COUNT)
    integer("chains", chains, at_least=1, at_most=LARGEST_COUNT)
    if held_out is not None and len(held_out) != len(condition):
        raise ValueError(
            f"held_out must be draws under each of {len(condition)} conditions; "
            f"got {len(held_out)}."
        )
    return condition


def _log_ratios(flow, target, condition, draws: int, seed: int) -> tuple[Tensor, Tensor, dict]:
    """Log p − log q and log p of independent draws [rows, draws], and Pareto k of averages."""
    with random_numbers(seed):
        law = law_of(flow, target, condition)
        x, log_p, log_q = draw_proposals(target, law, condition, (draws,))
    log_ratio, tails = (log_p - log_q).T, {}
    derived = target.derived(condition)
    for name, it in observe(target, x, condition.expand(draws, *condition.shape)).items():
        tails[name], of_variance = tails_of_averages(it.T, log_ratio)
        tails |= {of: of_variance for of, it in derived.items() if it.of == name}
    return log_ratio, log_p.T, tails


def _observables(target: Target, x: Tensor, condition: Tensor) -> Values:
    return observe(target, x, condition[:, None, None, :].expand(*x.shape[:3], -1))


def _reference(
    target: Target, condition: Tensor, draws: int, seed: int, judges: _Judges
) -> tuple[Reference, _Judges]:
    """Draws of the target without the flow, and the references of coverage."""
    began = time.perf_counter()
    x = _exact_chains(target, condition, draws, seed)
    if x is None:
        return _cooled_reference(target, condition, draws, seed, judges)
    seconds = time.perf_counter() - began
    values = _observables(target, x, condition)
    means = averages(target, values, condition)
    log_z = _log_z(target, condition, seed)
    drawn = Reference(x, values, means, "exact draws", seconds, True, *log_z)
    return drawn, judges if judges.held_out is not None else _Judges(_thin(x))


def _exact_chains(target: Target, condition: Tensor, draws: int, seed: int) -> Tensor | None:
    """Exact draws [rows, chains, draws, *event], where the target has a sampler."""
    chains = max(1, min(MAX_CHAINS, draws // 50))
    shape = (len(condition), chains, draws // chains)
    with random_numbers(seed):
        x = exact_draws(target, condition, (math.prod(shape[1:]),))
    return None if x is None else x.movedim(0, 1).reshape(*shape, *target.event_shape)


def _thin(x: Tensor) -> list[Tensor]:
    """Some of the draws [rows, chains, draws, *event] of each row."""
    flat = x.flatten(1, 2)
    return list(flat[:, :: -(-flat.shape[1] // MAX_COVERAGE_DRAWS)])


def _cooled_reference(
    target: Target, condition: Tensor, draws: int, seed: int, judges: _Judges
) -> tuple[Reference, _Judges]:
    """Particles, and chains of the target's kernel started from them if it has one."""
    began = time.perf_counter()
    particles = _particles(target, len(condition))
    cooled = evidence(target, condition, particles=particles, islands=ISLANDS, seed=seed)
    x, source, mixed = cooled.x, "particles", not any(cooled.doubts)
    kernel = target.kernel()
    if kernel is not None:
        chains = max(1, min(MAX_CHAINS, draws // 50))
        flat = x.flatten(1, 2)
        start = flat[:, torch.arange(chains) * flat.shape[1] // chains]
        how: dict[str, Any] = {"draws": draws // chains, "chains": chains, "seed": seed, **SWEEPS}
        walk = markov_chain(target, condition, start=start, **how).x
        assert walk is not None
        x, source = walk, name_of(kernel)
    seconds = time.perf_counter() - began
    values = _observables(target, x, condition)
    means = averages(target, values, condition)
    if kernel is None:
        means = {name: _with_islands(it, values[name]) for name, it in means.items()}
    else:
        mixed = _agree(values, source)
    log_z = _log_z(target, condition, seed)
    if log_z[0] is None:
        log_z = cooled.log_z, "particles", seconds
    drawn = Reference(x, values, means, source, seconds, mixed, *log_z)
    if judges.held_out is not None:
        return drawn, judges
    chart, normal = target.chart, f"N(0, {cooled.width:g}²)"
    description = "particles cooled from uniform angles" + f" and {normal}" * (
        not bool(chart.circle.all())
    )
    if not chart.circle.any():
        description = f"particles cooled from {normal}"
    description += " of log x or log(x − low)/(high − x)" * chart.bounded
    count = max(1, MAX_COVERAGE_DRAWS // ISLANDS)
    subsample = cooled.x[:, :, :: -(-cooled.x.shape[2] // count)]
    return drawn, _Judges(list(subsample.flatten(1, 2)), cooled, description)


def _particles(target: Target, rows: int) -> int:
    size = math.prod(target.event_shape)
    particles = next(count for most, count in PARTICLES if size <= most)
    if bool(target.chart.circle.all()):
        particles = min(particles, OF_ANGLES)
    return max(MIN_PARTICLES, min(particles, COORDINATES // (rows * ISLANDS * size)))


def _with_islands(mean: Mean, values: Tensor) -> Mean:
    """A mean; its error is that of the scatter of islands if that is larger."""
    scatter = values.double().mean(-1).std(-1) / math.sqrt(values.shape[-2])
    return Mean(mean.value, torch.maximum(mean.error, scatter))


def _agree(values: Values, source: str) -> bool:
    ratios = torch.stack([rhat(it.movedim(0, -1)) for it in values.values()])
    stuck = bool(ratios.isnan().all(0).any())  # one quantity may be constant, not all of them
    worst = math.inf if stuck else ratios.nan_to_num(1.0).max().item()
    if worst > UNMIXED:
        warn(
            f"reference: the chains of the {source} have an R-hat of up to {worst:.2f}; they "
            "have not mixed, and no average is judged by them."
        )
    return worst <= UNMIXED


def _log_z(target, condition, seed: int) -> tuple[Mean | None, str, float]:
    exact = exact_log_z(target, condition)
    if exact is not None:
        return Mean(exact.double(), torch.zeros_like(exact.double())), "its known value", 0.0
    if not kernel_of_angles(target):
        return None, "", 0.0
    began = time.perf_counter()
    parts = [
        thermodynamic_integration(target, condition[k], seed=seed) for k in _series(condition)
    ]
    log_z = Mean(torch.cat([it.value for it in parts]), torch.cat([it.error for it in parts]))
    return log_z, "thermodynamic integration", time.perf_counter() - began


def _coverage(flow, target, condition, log_ratio, judges, train, seed) -> Iterator[Coverage]:
    has_reference = judges.held_out is not None or exact_log_z(target, condition[:1]) is not None
    has_reference = has_reference or exact_draws(target, condition[:1], (1,)) is not None
    count = min(MAX_COVERAGE_DRAWS, max(MIN_COVERAGE_DRAWS, log_ratio.shape[-1]))
    for row, at in enumerate(condition):
        if not has_reference:
            yield judge_ratios(log_ratio[row], sites=math.prod(target.event_shape))
            continue
        how: dict[str, Any] = {"train": train, "draws": count, **judges.of(row)}
        yield judge_coverage(target, flow, at, **how, seed=seed + row)


def _beside(flow, target, chain: Chain, held_out) -> Iterator[dict[str, Mean]]:
    parts = "x", "accepted", "log_ratio", "log_p", "log_q", "condition"
    for row, rows in enumerate(held_out):
        one = Chain(**{name: getattr(chain, name)[row] for name in parts})
        yield compare_with_held_out(target, flow, one, rows)


def _thermodynamics(target, condition, log_ratio, log_p) -> Thermodynamics:
    """Thermodynamics with T if there is one, a series of temperatures for each other condition."""
    if not has_temperature(target):
        one = torch.ones(len(condition), device=log_ratio.device)
        return _concatenate(
            [thermodynamics(log_ratio[[k]], -log_p[[k]], one[[k]]) for k in range(len(one))]
        )
    temperature = condition[:, 0]
    energy = -log_p * temperature[:, None]
    series = _series(condition)
    return _concatenate([thermodynamics(log_ratio[k], energy[k], temperature[k]) for k in series])


def _series(condition: Tensor) -> list[list[int]]:
    """Neighbouring rows that differ in the first condition alone."""
    others = [tuple(row[1:]) for row in condition.tolist()]
    return [list(rows) for _, rows in itertools.groupby(range(len(others)), others.__getitem__)]


def _concatenate(parts: list[Thermodynamics]) -> Thermodynamics:
    names = "log_z", "energy", "free_energy", "entropy", "heat_capacity", "gap"
    columns = ([getattr(it, name) for it in parts] for name in names)
    tails = {name: torch.cat([it.tails[name] for it in parts]) for name in names[:-1]}
    return Thermodynamics(
        *(
            Mean(torch.cat([it.value for it in c]), torch.cat([it.error for it in c]))
            for c in columns
        ),
        tails=tails,
    )


class NotCoveredError(RuntimeError):
    """A flow lacks a part of its target, or its coverage is not shown."""


@single_precision()
def evaluate_run(
    path: str | os.PathLike, settings: EvaluateSettings, *, allow: Collection[str] = ()
) -> Evaluation:
    """Measure the flow of a run on its target, and write ``evaluation.json`` into the run.

    Args:
        path: The folder of the run.
        settings: Conditions and draws of the evaluation.
        allow: Names that its ``run.json`` may import, each "module:name".

    Raises:
        NotCoveredError: With ``strict``, a part of the target is missing or may be.
        ValueError: The held-out draws were trained on, or a setting does not fit the run.
    """
    run, _device = Run.open(path), checks.device(settings.device)
    evaluation = measure_run(path, settings, allow=allow)
    write_evaluation(run, evaluation.to_dict())
    if settings.strict and (not evaluation.passed or bool(evaluation.chain.failed.any())):
        print(evaluation, flush=True)  # a table, which an error has no room for
        raise NotCoveredError(_why(evaluation))
    return evaluation


def measure_run(
    path: str | os.PathLike, settings: EvaluateSettings, *, allow: Collection[str] = ()
) -> Evaluation:
    """Measure the flow of a run on its target; nothing is written."""
    loaded = load_target_run(path, allow=allow)
    condition, held_out = _where(loaded, settings, Run.open(path))
    how: dict[str, Any] = {name: getattr(settings, name) for name in ("draws", "chains", "seed")}
    return evaluate_on_target(
        loaded.flow.to(settings.device),
        loaded.target,
        condition.to(settings.device),
        held_out=held_out,
        reference=settings.reference,
        **how,
    )


def _why(evaluation: Evaluation) -> str:
    if bool(evaluation.chain.failed.any()):
        return f"a chain never moved under {int(evaluation.chain.failed.sum())} conditions."
    unknown = [it.verdict for it in evaluation.coverage if it.passed is None]
    return evaluation.why or unknown[0]


def _where(
    target_run: TargetRun, settings: EvaluateSettings, run: Run
) -> tuple[Tensor, list[Tensor] | None]:
    ranges = target_run.ranges
    if settings.condition is not None:
        ranges = parse_ranges(settings.condition, target_run.target)
    if settings.data is None:
        return condition_grid(ranges, settings.values), None
    x, condition = read_draws(settings.data, target_run.target)
    seen = run.count_seen([row.tobytes() for row in x.numpy()])
    if seen:
        raise ValueError(
            f"data: {seen:,} of the {len(x):,} draws in {settings.data} were trained on; held-out "
            "draws must share none."
        )
    drawn_here = count_drawn(run, x)
    if drawn_here:
        raise ValueError(
            f"data: {drawn_here:,} of the {len(x):,} draws in {settings.data} are of the flow of "
            f"{run.path} itself (rkl sample), which cannot show what it lacks; give independent "
            "draws of the target, or --reference."
        )
    inside = torch.ones(len(x), dtype=torch.bool)
    for column, (_, low, high, *_) in zip(condition.T, ranges, strict=True):
        margin = ROUNDING * max(abs(low), abs(high))
        inside &= (column >= low - margin) & (column <= high + margin)
    if not inside.any():
        raise ValueError(f"data: none of the draws in {settings.data} is under these conditions.")
    x, condition = (
        condition_range[inside].to(settings.device) for condition_range in (x, condition)
    )
    rows, group = (
        condition.unique(dim=0, return_inverse=True)
        if target_run.ranges
        else (
            condition[:1],
            torch.zeros(len(x), dtype=torch.long),
        )
    )
    return rows, [x[group == k] for k in range(len(rows))]


def report_runs(
    paths: Sequence[str | os.PathLike],
    out: str | os.PathLike | None = None,
    *,
    allow: Collection[str] = (),
    overwrite: bool = False,
) -> Path:
    """Write the report of one run, measured beside a reference, a single HTML file.

    Args:
        paths: The folder of the run.
        out: The file; ``report.html`` in the folder of the run by default.
        allow: Names that the ``run.json`` may import, each "module:name".
        overwrite: Replace a file of others there.
    """
    run = single_run(paths, out, overwrite)
    settings = EvaluateSettings(draws=1_000, reference=True)
    return write_report(run, measure_run(run.path, settings, allow=allow), out)


def write_report(run: Run, evaluation: Evaluation, out: str | os.PathLike | None = None) -> Path:
    """Write the report of a run whose flow has been measured."""
    from rkl.report import write
    from rkl.sample.report import target_page

    place = run.path / REPORT if out is None else Path(out)
    write(place, target_page(evaluation, run.metrics, run.record))
    return place

"""Does an adversarial term keep a flow from losing modes, and does it save data?

AdvNF adds an adversarial term to forward and reverse KL divergences, and reports less mode
collapse, less variance and less need for data. Its seven variants are fitted here with its affine
flow, and beside them our flows by our defaults, all for the same CPU time, to Gaussians on a
square (``mog-4``) and on a circle (``mog-8``), to rings (``rings``) and to the XY model (``xy``).

Source: V. Kanaujia, M. S. Scheurer and V. Arora (2024), arXiv 2401.15948.
"""

import csv
import io
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rkl.flows import Coupling
from rkl.runs import Run, write_atomic
from rkl.sample import CheckerboardRealNVP
from rkl.sample.targets import XY, MoG4, MoG8, Rings
from rkl.stats import mean
from rkl.studies.advnf.fits import (
    OURS,
    QUANTITIES,
    WITH_DATA,
    Fit,
    Plan,
    Way,
    exact_draws,
    fit,
    ways,
)
from rkl.studies.study import in_processes

if TYPE_CHECKING:
    from rkl.report import Block, Section

WORKERS = 2  # processes, of one thread each
COLUMNS = "flow", "ensemble", "seed", "steps", "cpu_s", "gradient", "condition", *QUANTITIES
ADDED = {"rkl": "advnf-rkl", "fkl": "advnf-fkl", "fkl-rkl": "advnf"}  # the term left out, and in
Pair = tuple[float, float]


@dataclass(frozen=True)
class Part:
    """One target.

    Attributes:
        title: Of its report.
        plan: Its sizes.
        shown: Quantities that are tabled, with how they are called.
    """

    title: str
    plan: Plan
    shown: Mapping[str, str]


_SHOWN = {
    "acceptance": "acceptance",
    "ess_at_target": "ESS of the target",
    "v": "v",
    "bracket": "EUBO − ELBO",
    "gradient": "gradient",
}
_MODES = {"acceptance": "acceptance", "missing": "modes missing", "reached": "mass reached"} | {
    name: it for name, it in _SHOWN.items() if name != "acceptance"
}
_PLANE = Coupling(transforms=6, hidden=(32, 32))
PARTS: Mapping[str, Part] = {
    "mog-4": Part("AdvNF: four Gaussians", Plan(MoG4(), _PLANE, cpu_s=20), _MODES),
    "mog-8": Part("AdvNF: eight Gaussians", Plan(MoG8(), _PLANE, cpu_s=30), _MODES),
    "rings": Part("AdvNF: four rings", Plan(Rings(), _PLANE, cpu_s=30), _MODES),
    "xy": Part(
        "AdvNF: the XY model, 8 × 8",
        Plan(
            XY(side=8),
            CheckerboardRealNVP(filters=16),
            cpu_s=32,
            values=32,
            batch=64,
            draws=1_000,
        ),
        _SHOWN | {"overlap": "overlap"},
    ),
}
_LOGARITHMIC = "v", "bracket"  # averaged, and compared, in logarithms


def study(
    part: str,
    out: str | os.PathLike,
    *,
    overwrite: bool = False,
    seed: int = 0,
    device: str = "cpu",
) -> Path:
    """Fit in every way, with every ensemble and seed, and write the figures.

    Args:
        part: "mog-4", "mog-8", "rings" or "xy".
        out: The folder to write: a csv of all figures, pictures, a report.
        overwrite: Whether to replace the run that is there.
        seed: The first; the others follow.
        device: The cpu, whose time is the budget.

    Returns:
        The report.
    """
    if part not in PARTS:
        raise ValueError(f"part must be one of {', '.join(PARTS)}; got {part!r}.")
    if device != "cpu":
        raise ValueError(f"device must be 'cpu', whose time is the budget; got {device!r}.")
    return conducted(part, PARTS[part].plan, out, overwrite=overwrite, seed=seed)


def conducted(
    part: str, plan: Plan, out: str | os.PathLike, *, overwrite: bool = False, seed: int = 0
) -> Path:
    """One part in the sizes of a plan."""
    settings = {"part": part, "plan": {name: repr(it) for name, it in vars(plan).items()}}
    run = Run.create(out, "studies.advnf", settings, seed=seed, overwrite=overwrite)
    with run.running():
        fits = _all_fits(plan, range(seed, seed + plan.seeds))
        write_atomic(run.path / f"{part}.csv", to_csv(fits))
        _report(run, PARTS[part], plan, fits)
    return run.path / "report.html"


def _all_fits(plan: Plan, seeds: Sequence[int]) -> list[Fit]:
    """In processes of one thread each, on a core of its own where there are two."""
    jobs = [(plan, way, seed) for seed in seeds for way in ways(plan)]
    return in_processes(fit, *zip(*jobs, strict=True), workers=WORKERS)


def to_csv(fits: Iterable[Fit]) -> str:
    """A row for each condition of each fit."""
    page = io.StringIO()
    table = csv.writer(page, lineterminator="\n")
    table.writerow(COLUMNS)
    for it in fits:
        first = [it.way.name, it.way.ensemble, it.seed, it.steps]
        for k, condition in enumerate(it.conditions):
            found = [it.found[name][k] for name in QUANTITIES]
            numbers = [it.cpu_s, it.gradient, condition, *found]
            table.writerow([*first, *(f"{number:.6g}" for number in numbers)])
    return page.getvalue()


def summary(fit: Fit, quantity: str) -> float:
    """One number of a fit: the mean over conditions, geometric where orders of size differ."""
    if quantity == "gradient":
        return fit.gradient
    values = torch.tensor(fit.found[quantity], dtype=torch.float64)
    return (values.log() if quantity in _LOGARITHMIC else values).mean().item()


def over_seeds(fits: Sequence[Fit], way: Way, quantity: str) -> Pair:
    """Mean over seeds, and its standard error."""
    return _told(quantity, [summary(it, quantity) for it in fits if it.way == way])


def added(fits: Sequence[Fit], without: Way, way: Way, quantity: str) -> Pair:
    """What one way gives more than another, seed by seed: a factor where sizes differ."""
    by = {(it.way, it.seed): summary(it, quantity) for it in fits}
    seeds = dict.fromkeys(it.seed for it in fits)
    return _told(quantity, [by[way, seed] - by[without, seed] for seed in seeds])


def _told(quantity: str, values: Sequence[float]) -> Pair:
    value, error = (it.item() for it in mean(torch.tensor(values, dtype=torch.float64)))
    if quantity in _LOGARITHMIC:
        value = math.exp(value)
        return value, value * error
    return value, error


def _report(run: Run, part: Part, plan: Plan, fits: Sequence[Fit]) -> None:
    from rkl.report import Section, Settings, render, write

    sections = [
        Section("What came out", _says(plan), [_table(part, fits)]),
        Section("Against the number of draws that are trained on", "", _lines(run, part, fits)),
        Section(
            "What the adversarial term adds",
            "Seed by seed, with the same draws: differences; for v and EUBO − ELBO, factors.",
            [_gains(part, plan, fits)],
        ),
        *_pictures(run, plan, fits),
        Section("Settings", blocks=[Settings(run.record)]),
    ]
    write(run.path / "report.html", render(part.title, sections, lead=_lead(part, plan, fits)))


def _says(plan: Plan) -> str:
    return (
        f"Every fit takes {plan.cpu_s:g} s of CPU time, from the same kind of start. The variants "
        f"train {plan.baseline!r}, ours {plan.flow(WITH_DATA)!r}. Figures are means over "
        f"{plan.values} conditions, by draws that were not trained on, and over {plan.seeds} "
        "seeds with their standard error; the ensemble counts the draws of all conditions "
        "together. ESS of the target is the effective share from draws of the target; v = var(log "
        "w)/sites; EUBO − ELBO is the symmetrised KL divergence in nats (both are geometric means "
        "over conditions); gradient is the norm of the last steps' gradients, which is noise; "
        "overlap, of the XY model, is that of energies after Metropolis with held-out ones, 1 at "
        "most."
    )


def _lead(part: Part, plan: Plan, fits: Sequence[Fit]) -> str:
    from rkl.report import written

    best: dict[bool, tuple[Pair, Way]] = {}
    for way in ways(plan):
        value = over_seeds(fits, way, "acceptance")
        ours = way.name in OURS
        if ours not in best or value[0] > best[ours][0][0]:
            best[ours] = value, way
    told = [
        f"{_named(way)} accepts {written(value)} of independent proposals"
        for value, way in best.values()
    ]
    return f"The best of the seven variants: {told[0]}. The best of ours: {told[1]}."


def _named(way: Way) -> str:
    return f"{way.name} ({way.ensemble:,} draws)" if way.ensemble else way.name


def _table(part: Part, fits: Sequence[Fit]) -> "Block":
    from rkl.report import Table

    found = list(dict.fromkeys(it.way for it in fits))
    rows = [[_named(it), *(over_seeds(fits, it, name) for name in part.shown)] for it in found]
    return Table("Every way", ["", *part.shown.values()], rows, "Mean over seeds ± its error.")


def _lines(run: Run, part: Part, fits: Sequence[Fit]) -> "list[Block]":
    from rkl.plots.lattices import against
    from rkl.report import drawn

    found = list(dict.fromkeys(it.way for it in fits))
    sizes = sorted({it.ensemble for it in found} - {0})
    panels: dict[str, dict[str, Any]] = {}
    for quantity, title in part.shown.items():
        for name in dict.fromkeys(it.name for it in found):
            mine = [it for it in found if it.name == name]
            at = mine if mine[0].ensemble else mine * len(sizes)  # the same, whatever the data
            values, errors = zip(*(over_seeds(fits, it, quantity) for it in at), strict=True)
            x = [math.log10(size) for size in sizes]
            panels.setdefault(title, {})[name] = x, list(values), list(errors)
    logarithmic = tuple(title for name, title in part.shown.items() if name in _LOGARITHMIC)
    figure = against(panels, label="log₁₀ of the ensemble", logarithmic=logarithmic)
    block = drawn("Figures against the ensemble", figure, "Level lines use no draws.")
    write_atomic(run.path / "ensembles.svg", block.svg)
    return [block]


def _gains(part: Part, plan: Plan, fits: Sequence[Fit]) -> "Block":
    from rkl.report import Table

    rows = []
    for name, with_it in ADDED.items():
        for size in plan.ensembles:
            without = next(it for it in ways(plan) if it.name == name and it.ensemble in (0, size))
            pair = without, Way(with_it, size)
            gained = [added(fits, *pair, quantity) for quantity in part.shown]
            rows.append([f"{with_it} over {name} ({size:,} draws)", *gained])
    return Table("Gains", ["", *part.shown.values()], rows, "Mean over seeds ± its error.")


def _pictures(run: Run, plan: Plan, fits: Sequence[Fit]) -> "list[Section]":
    """Draws in the plane at the narrowest condition, the first seed, the largest ensemble."""
    from rkl.plots.lattices import planes
    from rkl.report import Section, drawn

    if not plan.flat:
        return []
    largest = max(it.way.ensemble for it in fits)
    panels = {"target": exact_draws(plan, 1_000, fits[0].seed)[0]} | {
        it.way.name: torch.tensor(it.samples)
        for it in fits
        if it.seed == fits[0].seed and it.way.ensemble in (0, largest)
    }
    block = drawn("Draws", planes(panels), "The narrowest condition, the first seed.")
    write_atomic(run.path / "draws.svg", block.svg)
    return [Section("Draws of the flows, not corrected", blocks=[block])]

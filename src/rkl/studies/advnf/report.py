"""Does an adversarial term keep a flow from losing modes, and does it save data?

AdvNF adds an adversarial term to forward and reverse KL divergences, and reports less mode
collapse, less variance and less need for data. Its seven variants are fitted here with its affine
flow, and beside them our flows by our defaults, all for the same CPU time, to Gaussians on a
square (``mog-4``) and on a circle (``mog-8``), to rings (``rings``) and to the XY model (``xy``).

Source: V. Kanaujia, M. S. Scheurer and V. Arora (2024), arXiv 2401.15948.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from rkl.flows import Coupling
from rkl.sample import CheckerboardRealNVP
from rkl.sample.targets import XY, MoG4, MoG8, Rings
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
from rkl.studies.study import Outcome, Pair, Part, mean_over_seeds, paired_gain
from rkl.tables import Table, cell_text

if TYPE_CHECKING:
    from rkl.report import Block, Section

COLUMNS = "flow", "ensemble", "seed", "steps", "cpu_s", "gradient", "condition", *QUANTITIES
ADDED = {"rkl": "advnf-rkl", "fkl": "advnf-fkl", "fkl-rkl": "advnf"}  # the term left out, and in


@dataclass(frozen=True)
class Comparison(Part):
    """All ways to fit a flow to one target, in the same CPU time.

    Attributes:
        shown: Quantities in the tables, with their names there.
    """

    shown: Mapping[str, str]

    def jobs(self, seed: int) -> list[tuple[Way, int]]:
        seeds = range(seed, seed + self.plan.seeds)
        return [(way, each) for each in seeds for way in ways(self.plan)]

    def compute(self, way: Way, seed: int) -> dict[str, Any]:
        return asdict(fit(self.plan, way, seed))

    def outcome(self, results: Sequence[Mapping[str, Any]], seed: int) -> Outcome:
        from rkl.report import Section

        fits = [Fit(**{**it, "way": Way(**it["way"])}) for it in results]
        sections = [
            Section("Results", _conditions(self.plan), [_table(self, fits)]),
            Section("Against the number of training draws", "", _lines(self, fits)),
            Section(
                "Effect of the adversarial term",
                "Seed by seed, with the same draws: differences; for v and EUBO − ELBO, factors.",
                [_gains(self, fits)],
            ),
            *_pictures(self.plan, fits),
        ]
        rows = [row for each in fits for row in rows_of(each)]
        return Outcome(COLUMNS, rows, _summary(self.plan, fits), sections)


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
PARTS: Mapping[str, Comparison] = {
    "mog-4": Comparison("AdvNF: four Gaussians", Plan(MoG4(), _PLANE, cpu_s=20), _MODES),
    "mog-8": Comparison("AdvNF: eight Gaussians", Plan(MoG8(), _PLANE, cpu_s=30), _MODES),
    "rings": Comparison("AdvNF: four rings", Plan(Rings(), _PLANE, cpu_s=30), _MODES),
    "xy": Comparison(
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


def rows_of(fit: Fit) -> list[list[Any]]:
    """A row of the csv for each condition of a fit."""
    first = [fit.way.name, fit.way.ensemble, fit.seed, fit.steps]
    rows = []
    for k, condition in enumerate(fit.conditions):
        figures = [fit.figures[name][k] for name in QUANTITIES]
        numbers = [fit.cpu_s, fit.gradient, condition, *figures]
        rows.append([*first, *(f"{number:.6g}" for number in numbers)])
    return rows


def over_conditions(fit: Fit, quantity: str) -> float:
    """One number of a fit: the mean over conditions, geometric for v and EUBO − ELBO."""
    if quantity == "gradient":
        return fit.gradient
    return mean_over_seeds(fit.figures[quantity], geometric=quantity in _LOGARITHMIC)[0]


def over_seeds(fits: Sequence[Fit], way: Way, quantity: str) -> Pair:
    """Mean over seeds, and its standard error."""
    values = [over_conditions(it, quantity) for it in fits if it.way == way]
    return mean_over_seeds(values, geometric=quantity in _LOGARITHMIC)


def gain_of(fits: Sequence[Fit], without: Way, way: Way, quantity: str) -> Pair:
    """Gain of one way over another, seed by seed: a difference; a factor for v and EUBO − ELBO."""
    by = {(it.way, it.seed): over_conditions(it, quantity) for it in fits}
    seeds = dict.fromkeys(it.seed for it in fits)
    values, reference = ([by[each, seed] for seed in seeds] for each in (way, without))
    return paired_gain(values, reference, geometric=quantity in _LOGARITHMIC)


def _conditions(plan: Plan) -> str:
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


def _summary(plan: Plan, fits: Sequence[Fit]) -> str:

    best: dict[bool, tuple[Pair, Way]] = {}
    for way in ways(plan):
        value = over_seeds(fits, way, "acceptance")
        ours = way.name in OURS
        if ours not in best or value[0] > best[ours][0][0]:
            best[ours] = value, way
    variant, ours_text = (
        f"{_label(way)} accepts {cell_text(value, plus_minus=True)} of independent proposals"
        for value, way in best.values()
    )
    return f"The best of the seven variants: {variant}. The best of ours: {ours_text}."


def _label(way: Way) -> str:
    return f"{way.name} ({way.ensemble:,} draws)" if way.ensemble else way.name


def _table(part: Comparison, fits: Sequence[Fit]) -> Table:

    tried = dict.fromkeys(it.way for it in fits)
    rows = [[_label(it), *(over_seeds(fits, it, name) for name in part.shown)] for it in tried]
    return Table("Every way", ["", *part.shown.values()], rows, "Mean over seeds ± its error.")


def _lines(part: Comparison, fits: Sequence[Fit]) -> "list[Block]":
    from rkl.plots.lattices import against
    from rkl.report import figure_block

    tried = list(dict.fromkeys(it.way for it in fits))
    sizes = sorted({it.ensemble for it in tried} - {0})
    panels: dict[str, dict[str, Any]] = {}
    for quantity, title in part.shown.items():
        for name in dict.fromkeys(it.name for it in tried):
            mine = [it for it in tried if it.name == name]
            at = mine if mine[0].ensemble else mine * len(sizes)  # the same, whatever the data
            values, errors = zip(*(over_seeds(fits, it, quantity) for it in at), strict=True)
            x = [math.log10(size) for size in sizes]
            panels.setdefault(title, {})[name] = x, list(values), list(errors)
    logarithmic = tuple(title for name, title in part.shown.items() if name in _LOGARITHMIC)
    figure = against(panels, label="log₁₀ of the ensemble", logarithmic=logarithmic)
    return [figure_block("Figures against the ensemble", figure, "Level lines use no draws.")]


def _gains(part: Comparison, fits: Sequence[Fit]) -> Table:

    rows = []
    for name, with_it in ADDED.items():
        for size in part.plan.ensembles:
            without = next(
                it for it in ways(part.plan) if it.name == name and it.ensemble in (0, size)
            )
            pair = without, Way(with_it, size)
            gained = [gain_of(fits, *pair, quantity) for quantity in part.shown]
            rows.append([f"{with_it} over {name} ({size:,} draws)", *gained])
    return Table("Gains", ["", *part.shown.values()], rows, "Mean over seeds ± its error.")


def _pictures(plan: Plan, fits: Sequence[Fit]) -> "list[Section]":
    from rkl.plots.lattices import planes
    from rkl.report import Section, figure_block

    if not plan.flat:
        return []
    largest = max(it.way.ensemble for it in fits)
    panels = {"target": exact_draws(plan, 1_000, fits[0].seed)[0]} | {
        it.way.name: torch.tensor(it.samples)
        for it in fits
        if it.seed == fits[0].seed and it.way.ensemble in (0, largest)
    }
    block = figure_block("Draws", planes(panels), "The narrowest condition, the first seed.")
    return [Section("Draws of the flows, not corrected", blocks=[block])]

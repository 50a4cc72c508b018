"""Results of an evaluation of a flow on its target, with errors, as text and as JSON."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rkl.sample.coverage import Coverage
from rkl.sample.importance import HEAVY, Importance, Thermodynamics
from rkl.sample.metropolis import Chain
from rkl.sample.targets.base import Target, has_temperature
from rkl.stats import Mean, ess, to_json
from rkl.tables import Table, table_of

REASONS = 12  # of failed coverage that are printed
FROM_WEIGHTS = "acceptance", "ESS", "v per site"
STAR = "* Pareto k above 0.7: neither this figure nor its error can be trusted"

Values = dict[str, Float[Tensor, "rows chains draws"]]


@dataclass(frozen=True)
class Reference:
    """Draws of the target made without the flow, [rows, chains, draws].

    Attributes:
        x: The draws.
        values: The observables of each.
        averages: Their means, with errors.
        source: Name of the method.
        seconds: Seconds that they took.
        mixed: Whether its chains agree with one another, or its particles are not in doubt.
        log_z: log Z in nats: known, or by thermodynamic integration; None if neither is possible.
        log_z_source: Name of its method.
        log_z_seconds: Seconds that it took.
    """

    x: Float[Tensor, "rows chains draws *event"]
    values: Values
    averages: dict[str, Mean]
    source: str
    seconds: float
    mixed: bool = True
    log_z: Mean | None = None
    log_z_source: str = ""
    log_z_seconds: float = 0.0

    @property
    def effective(self) -> dict[str, Tensor]:
        """Effective number of draws for each observable, [rows]."""
        return _effective(self.values)

    def table(self) -> Table:
        """The means of the observables, and log Z, under each condition."""
        log_z = {"log Z (nats)": self.log_z}
        notes = () if self.mixed else "Its chains do not agree, or its particles are in doubt."
        return table_of(self.source, {**self.averages, **log_z}, notes, counted="condition")

    def __str__(self) -> str:
        return str(self.table())

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


@dataclass(frozen=True)
class Evaluation:
    """Evaluation of a flow on its target, under several conditions.

    Attributes:
        target: The target.
        condition: The conditions, one a row.
        weights: Figures of the log-ratios of independent draws, never pooled over conditions.
        thermodynamics: log Z, F, S and ⟨E⟩; for targets without a temperature T = 1, E = −log p.
        chain: Chains of independent Metropolis with proposals of the flow.
        values: The observables along the chain.
        averages: Their means after the correction, with errors.
        coverage: Whether the flow covers the target, row by row.
        beside: AdvNF's figures against held-out draws, row by row; else empty.
        reference: Draws made without the flow, if requested.
        seconds: Seconds that the chain took.
        weights_seconds: Seconds that the independent draws took.
        tails: Pareto k of the terms of each average, [rows]; above 0.7 it cannot be trusted.
    """

    target: Target
    condition: Float[Tensor, "rows conditions"]
    weights: Importance
    thermodynamics: Thermodynamics
    chain: Chain
    values: Values
    averages: dict[str, Mean]
    coverage: tuple[Coverage, ...]
    beside: tuple[dict[str, Mean], ...]
    reference: Reference | None
    seconds: float
    weights_seconds: float
    tails: Mapping[str, Float[Tensor, " rows"]] = field(default_factory=dict)

    @property
    def effective(self) -> dict[str, Tensor]:
        """Effective number of draws of the chain for each observable, [rows]."""
        return _effective(self.values)

    @property
    def passed(self) -> bool | None:
        """True if the target is covered under every condition; None if that is unknown."""
        verdicts = {it.passed for it in self.coverage}
        return False if False in verdicts else None if None in verdicts else True

    @property
    def reasons(self) -> list[str]:
        """Reasons why coverage failed, each with its condition."""
        pairs = zip(self.conditions(), self.coverage, strict=True)
        return [f"{at}: {reason}" for at, it in pairs for reason in it.reasons]

    @property
    def has_heavy_tail(self) -> bool:
        """True if a figure has a tail too heavy to be trusted; tables mark it with a star."""
        tails = (self.weights.tail, *self.thermodynamics.tails.values(), *self.tails.values())
        return any(bool((it > HEAVY).any()) for it in tails)

    @property
    def warnings(self) -> list[str]:
        """Warnings about the weights, unless coverage was shown by other draws."""
        return [] if self.passed else self.weights.warnings

    @property
    def why(self) -> str:
        """Reasons for failure under the worst condition, the clearest first."""
        failed = [it for it in self.coverage if it.passed is False]
        if not failed:
            return ""
        worst = max(
            failed, key=lambda it: (sum(mode.missing for mode in it.modes), len(it.reasons))
        )
        at = self.conditions()[self.coverage.index(worst)]
        count = f"{len(failed)} of {len(self.coverage)} conditions"
        return f"not covered under {count}. At {at}: {' '.join(reversed(worst.reasons))}"

    def conditions(self) -> list[str]:
        """Each condition as text: T = 0.9 J."""
        named = self.target.conditions
        return [
            ", ".join(
                f"{it.name} = {value:.4g} {it.unit}".rstrip()
                for it, value in zip(named, row, strict=True)
            )
            or "all"
            for row in self.condition.tolist()
        ]

    @property
    def reference_warnings(self) -> list[str]:
        """A sentence about a reference that cannot be trusted; none about another."""
        if self.reference is None or self.reference.mixed:
            return []
        source = self.reference.source
        return [f"draws by {source} cannot be trusted here, and no average is judged by them."]

    def deviations(self) -> dict[str, Float[Tensor, " rows"]]:
        """Deviation of each average from a mixed reference's, in standard errors."""
        if self.reference is None or not self.reference.mixed:
            return {}
        pairs = {name: (it, self.reference.averages[name]) for name, it in self.averages.items()}
        if self.reference.log_z is not None:
            pairs["log Z"] = self.thermodynamics.log_z, self.reference.log_z
        scores = {}
        for name, (a, b) in pairs.items():
            apart, error = a.value - b.value, torch.hypot(a.error, b.error)
            scores[name] = torch.where(apart == 0, 0.0, apart / error)
        return scores

    def units(self) -> dict[str, str]:
        """The unit of each average that has one."""
        derived = self.target.derived(self.condition)
        return {**self.target.units, **{name: it.unit for name, it in derived.items() if it.unit}}

    def __str__(self) -> str:
        return "\n".join(_lines(self))

    def tables(self) -> list[Table]:
        """The averages after Metropolis, then the figures of the flow and of its weights."""
        units, averages = self.units(), self.averages
        means = {f"{k} ({units[k]})" if k in units else k: it for k, it in averages.items()}
        tails = [self.tails.get(name) for name in averages]
        title = "After Metropolis; errors in units of the last digit"
        after = figures(self, title, means, tails)
        weights = self.weights
        columns = {"acceptance": weights.acceptance, "ESS": weights.ess, "v per site": weights.v}
        columns |= thermal_columns(self)
        tails = [weights.tail if name in FROM_WEIGHTS else None for name in columns]
        tails = [thermal_tail(self, name, of) for name, of in zip(columns, tails, strict=True)]
        title = "The flow itself, and what the weights of its draws give"
        return [after, figures(self, title, columns, tails)]

    def _repr_html_(self) -> str:
        after, own = self.tables()
        lines = "\n".join(_verdicts(self)).splitlines()
        own = replace(own, notes=[*own.notes, *filter(None, map(str.strip, lines))])
        return "\n".join(table._repr_html_() for table in (after, own))

    def to_dict(self) -> dict[str, Any]:
        """All figures as a dict for JSON."""
        thermal = self.thermodynamics
        named = "log_z", "energy", "free_energy", "entropy", "heat_capacity"
        return {
            "target": repr(self.target),
            "conditions": [it._asdict() for it in self.target.conditions],
            "condition": self.condition.tolist(),
            "passed": self.passed,
            "weights": self.weights.to_dict(),
            "thermodynamics": {name: to_json(getattr(thermal, name)) for name in named},
            "gap": to_json(thermal.gap),
            "pareto_k": {
                name: it.tolist() for name, it in {**thermal.tails, **self.tails}.items()
            },
            "averages": {name: to_json(it) for name, it in self.averages.items()},
            "acceptance": self.chain.acceptance.tolist(),
            "longest_rejection_run": self.chain.longest_rejection_run.tolist(),
            "failed": self.chain.failed.tolist(),
            "effective": {name: it.tolist() for name, it in self.effective.items()},
            "seconds": self.seconds,
            "weights_seconds": self.weights_seconds,
            "coverage": [it.to_dict() for it in self.coverage],
            "beside": [{name: to_json(it) for name, it in row.items()} for row in self.beside],
            "reference": None if self.reference is None else _of_reference(self),
        }


def _effective(values: Values) -> dict[str, Tensor]:
    return {name: ess(it.movedim(0, -1)) for name, it in values.items()}


def _of_reference(evaluation: Evaluation) -> dict[str, Any]:
    drawn = evaluation.reference
    assert drawn is not None
    return {
        "source": drawn.source,
        "mixed": drawn.mixed,
        "averages": {name: to_json(it) for name, it in drawn.averages.items()},
        "effective": {name: it.tolist() for name, it in drawn.effective.items()},
        "seconds": drawn.seconds,
        "log_z": None if drawn.log_z is None else to_json(drawn.log_z),
        "log_z_source": drawn.log_z_source,
        "log_z_seconds": drawn.log_z_seconds,
        "deviations": {name: it.tolist() for name, it in evaluation.deviations().items()},
    }


def _lines(evaluation: Evaluation) -> Iterator[str]:
    chains, draws = evaluation.chain.accepted.shape[-2:]
    yield f"{evaluation.target}: {chains} chains of {draws:,} draws under each condition"
    after, own = evaluation.tables()
    yield f"\n{after.text()}\n"
    yield f"{own.text()}\n"
    yield from _verdicts(evaluation)


def thermal_columns(evaluation: Evaluation) -> dict[str, Mean]:
    """Log Z, and per site log Z, F and S, under names with their units."""
    thermal, sites = evaluation.thermodynamics, evaluation.weights.sites
    columns = {"log Z (nats)": thermal.log_z}
    each = {"log Z/N (nats)": thermal.log_z}
    if has_temperature(evaluation.target):
        unit = evaluation.target.conditions[0].unit
        each[f"F/N ({unit})" if unit else "F/N"] = thermal.free_energy
    if has_temperature(evaluation.target) or evaluation.target.units:
        each["S/N (nats)"] = thermal.entropy
    if has_temperature(evaluation.target) and not evaluation.target.units:
        unit = evaluation.target.conditions[0].unit
        each |= {f"E/N ({unit})" if unit else "E/N": thermal.energy}
        each["C/N (k_B)"] = thermal.heat_capacity
    return columns | {name: Mean(it.value / sites, it.error / sites) for name, it in each.items()}


def thermal_tail(evaluation: Evaluation, name: str, known: Tensor | None = None) -> Tensor | None:
    """Pareto k of a column of :func:`thermal_columns`, [rows]."""
    letter = name.partition("/")[0].partition(" ")[0]
    quantity = {"log": "log_z", "E": "energy", "F": "free_energy", "S": "entropy"} | {
        "C": "heat_capacity"
    }
    return evaluation.thermodynamics.tails.get(quantity.get(letter, ""), known)


def _verdicts(evaluation: Evaluation) -> Iterator[str]:
    rows = len(evaluation.coverage)
    if evaluation.passed is None:
        unknown = [
            (at, it) for at, it in zip(evaluation.conditions(), evaluation.coverage, strict=True)
        ]
        unknown = [(at, it) for at, it in unknown if it.passed is None]
        at, first = unknown[0]
        if first.doubts:
            yield f"Coverage unknown under {len(unknown)} of {rows} conditions:"
            yield from (f"- {at}: {doubt}" for at, it in unknown for doubt in it.doubts)
        else:
            yield first.verdict + "; --reference or --data gives some"
    elif evaluation.passed:
        where = f"all {rows} conditions" if rows > 1 else "the one condition measured"
        source = evaluation.coverage[0].source
        yield f"Covered under {where}" + f", as far as {source} see" * bool(source) + "."
    else:
        failed = sum(it.passed is False for it in evaluation.coverage)
        yield f"NOT COVERED under {failed} of {rows} conditions:"
        yield from (f"- {it}" for it in evaluation.reasons[:REASONS])
        if len(evaluation.reasons) > REASONS:
            yield f"- and {len(evaluation.reasons) - REASONS} more."
    yield from (f"Warning: {it}" for it in evaluation.warnings)
    stuck = int(evaluation.chain.failed.sum())
    if stuck:
        yield f"Warning: {stuck} conditions have a chain that never moved; they are no result."
    yield from (f"Warning: {it}" for it in evaluation.reference_warnings)
    for name, z in evaluation.deviations().items():
        rms = z.square().mean().sqrt().item()
        assert evaluation.reference is not None
        source = (
            evaluation.reference.log_z_source if name == "log Z" else evaluation.reference.source
        )
        yield f"{name} against {source}: rms z = {rms:.2f}"


def with_stars(mean: Mean, tail: Tensor | None) -> Iterator[tuple[float, float, str]]:
    """Values with their errors, and a star where the tail is heavy."""
    heavy = torch.zeros_like(mean.value, dtype=torch.bool) if tail is None else tail > HEAVY
    rows = zip(mean.value.tolist(), mean.error.tolist(), heavy.tolist(), strict=True)
    return ((value, error, "*" * star) for value, error, star in rows)


def figures(
    found: Evaluation,
    title: str,
    means: Mapping[str, Mean],
    tails: Sequence[Tensor | None],
    notes: Sequence[str] = (),
) -> Table:
    """Values with their errors under every condition, starred where their tails are heavy."""
    columns = [list(with_stars(it, tail)) for it, tail in zip(means.values(), tails, strict=True)]
    starred = any(mark for column in columns for *_, mark in column)
    rows = list(zip(found.conditions(), *columns, strict=True))
    return Table(title, ["condition", *means], rows, (*notes, *[STAR][:starred]))

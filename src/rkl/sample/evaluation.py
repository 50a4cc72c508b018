"""What is known of a flow beside its target: figures with their errors, as text and as JSON."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rkl.sample.coverage import Coverage
from rkl.sample.importance import HEAVY, Importance, Thermodynamics
from rkl.sample.metropolis import Chain
from rkl.sample.targets.base import Target, has_temperature
from rkl.stats import Mean, ess, to_json
from rkl.tables import Table

REASONS = 12  # of failed coverage that are printed
FROM_WEIGHTS = "acceptance", "ESS", "v per site"
STAR = "* Pareto k above 0.7: neither this figure nor its error can be trusted"

Values = dict[str, Float[Tensor, "rows chains draws"]]


@dataclass(frozen=True)
class Reference:
    """Draws of the target that owe nothing to the flow, [rows, chains, draws].

    Attributes:
        x: The draws.
        values: The observables of each.
        averages: Their means, with errors.
        source: Where they come from.
        seconds: What they took.
        mixed: Whether its chains agree with one another, or its particles are not in doubt.
        log_z: In nats: known, or of thermodynamic integration; None where neither can be had.
        log_z_source: Where it comes from.
        log_z_seconds: What it took.
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


@dataclass(frozen=True)
class Evaluation:
    """A flow beside its target, under several conditions.

    Attributes:
        target: The target.
        condition: The conditions, one a row.
        weights: What the log-ratios of independent draws say, never pooled over conditions.
        thermodynamics: log Z, F, S and ⟨E⟩; for targets without a temperature T = 1, E = −log p.
        chain: What independent Metropolis made of the flow.
        values: The observables along the chain.
        averages: Their means after the correction, with errors.
        coverage: Whether the flow reaches all of the target, row by row.
        beside: AdvNF's figures beside draws that the flow has not seen, row by row; else empty.
        reference: Draws that owe nothing to the flow, if they were asked for.
        seconds: What the chain took.
        weights_seconds: What the independent draws took.
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
        """Whether the target is covered under every condition; None where it is not known."""
        verdicts = {it.passed for it in self.coverage}
        return False if False in verdicts else None if None in verdicts else True

    @property
    def reasons(self) -> list[str]:
        """Why coverage failed, each with its condition."""
        pairs = zip(self.conditions(), self.coverage, strict=True)
        return [f"{at}: {reason}" for at, it in pairs for reason in it.reasons]

    @property
    def has_heavy_tail(self) -> bool:
        """Whether a figure has a tail too heavy to be trusted; tables mark it with a star."""
        tails = (self.weights.tail, *self.thermodynamics.tails.values(), *self.tails.values())
        return any(bool((it > HEAVY).any()) for it in tails)

    @property
    def warnings(self) -> list[str]:
        """What is to be said of the weights, unless coverage was shown by other draws."""
        return [] if self.passed else self.weights.warnings

    @property
    def why(self) -> str:
        """Why coverage failed under the worst condition, the plainest reason first."""
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
        """By how many standard errors each average differs from a mixed reference's."""
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

    def to_dict(self) -> dict[str, Any]:
        """All figures as JSON can hold them."""
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


def _of_reference(found: Evaluation) -> dict[str, Any]:
    drawn = found.reference
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
        "deviations": {name: it.tolist() for name, it in found.deviations().items()},
    }


def _lines(found: Evaluation) -> Iterator[str]:
    chains, draws = found.chain.accepted.shape[-2:]
    yield f"{found.target}: {chains} chains of {draws:,} draws under each condition"
    units = found.units()
    means = {f"{k} ({units[k]})" if k in units else k: it for k, it in found.averages.items()}
    tails = [found.tails.get(name) for name in found.averages]
    title = "After Metropolis; errors in units of the last digit"
    yield f"\n{figures(found, title, means, tails).text()}\n"
    weights = found.weights
    columns = {"acceptance": weights.acceptance, "ESS": weights.ess, "v per site": weights.v}
    columns |= thermal_columns(found)
    tails = [weights.tail if name in FROM_WEIGHTS else None for name in columns]
    tails = [thermal_tail(found, name, of) for name, of in zip(columns, tails, strict=True)]
    title = "The flow itself, and what the weights of its draws give"
    yield f"{figures(found, title, columns, tails).text()}\n"
    yield from _verdicts(found)


def thermal_columns(found: Evaluation) -> dict[str, Mean]:
    """Log Z, and with F and S per site, under names that say the unit."""
    thermal, sites = found.thermodynamics, found.weights.sites
    columns = {"log Z (nats)": thermal.log_z}
    each = {"log Z/N (nats)": thermal.log_z}
    if has_temperature(found.target):
        unit = found.target.conditions[0].unit
        each[f"F/N ({unit})" if unit else "F/N"] = thermal.free_energy
    if has_temperature(found.target) or found.target.units:
        each["S/N (nats)"] = thermal.entropy
    if has_temperature(found.target) and not found.target.units:
        unit = found.target.conditions[0].unit
        each |= {f"E/N ({unit})" if unit else "E/N": thermal.energy}
        each["C/N (k_B)"] = thermal.heat_capacity
    return columns | {name: Mean(it.value / sites, it.error / sites) for name, it in each.items()}


def thermal_tail(found: Evaluation, name: str, known: Tensor | None = None) -> Tensor | None:
    """Pareto k of a column of :func:`thermal_columns`, [rows]."""
    letter = name.partition("/")[0].partition(" ")[0]
    quantity = {"log": "log_z", "E": "energy", "F": "free_energy", "S": "entropy"} | {
        "C": "heat_capacity"
    }
    return found.thermodynamics.tails.get(quantity.get(letter, ""), known)


def _verdicts(found: Evaluation) -> Iterator[str]:
    rows = len(found.coverage)
    if found.passed is None:
        unknown = [(at, it) for at, it in zip(found.conditions(), found.coverage, strict=True)]
        unknown = [(at, it) for at, it in unknown if it.passed is None]
        at, first = unknown[0]
        if first.doubts:
            yield f"Coverage unknown under {len(unknown)} of {rows} conditions:"
            yield from (f"- {at}: {doubt}" for at, it in unknown for doubt in it.doubts)
        else:
            yield first.verdict + "; --reference or --data gives some"
    elif found.passed:
        where = f"all {rows} conditions" if rows > 1 else "the one condition measured"
        source = found.coverage[0].source
        yield f"Covered under {where}" + f", as far as {source} see" * bool(source) + "."
    else:
        failed = sum(it.passed is False for it in found.coverage)
        yield f"NOT COVERED under {failed} of {rows} conditions:"
        yield from (f"- {it}" for it in found.reasons[:REASONS])
        if len(found.reasons) > REASONS:
            yield f"- and {len(found.reasons) - REASONS} more."
    yield from (f"Warning: {it}" for it in found.warnings)
    stuck = int(found.chain.failed.sum())
    if stuck:
        yield f"Warning: {stuck} conditions have a chain that never moved; they are no result."
    yield from (f"Warning: {it}" for it in found.reference_warnings)
    for name, z in found.deviations().items():
        rms = z.square().mean().sqrt().item()
        assert found.reference is not None
        source = found.reference.log_z_source if name == "log Z" else found.reference.source
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

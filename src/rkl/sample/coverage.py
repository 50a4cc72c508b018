"""Coverage of a target by a flow, which the weights of its own draws cannot measure."""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributions import Distribution

from rkl.checks import LARGEST_COUNT, integer, number
from rkl.randomness import random_numbers
from rkl.sample.importance import Importance, check_log_ratio, expectation, reweight
from rkl.sample.metropolis import draw_proposals, law_of
from rkl.sample.observables import check_draws, check_held_out
from rkl.sample.targets.base import Target, check_condition, exact_draws, exact_log_z
from rkl.sample.targets.check import precise_log_prob
from rkl.stats import Mean, mean, to_json
from rkl.tables import Table, table_of, with_error

ERRORS = 4.0  # standard errors that a departure must exceed
UNREACHED = 0.01  # mass that may go unreached
RARE = 0.1  # share of its mass below which a mode counts as missing
MIN_EXPECTED_DRAWS = 10  # below which a mode cannot be called missing
SHARE = 0.5  # share of the flow's own ESS that must remain at draws of the target
OFF = 0.1  # share by which a reweighted mass may be off, beyond its errors


@dataclass(frozen=True)
class Mode:
    """The mass of one mode: of the target, of the flow, and of the flow's draws reweighted."""

    name: str
    target: Mean
    drawn: Mean
    reweighted: Mean
    missing: bool

    @property
    def masses(self) -> tuple[Mean, Mean, Mean]:
        """The masses of the target, of the flow and after reweighting."""
        return self.target, self.drawn, self.reweighted

    def _repr_html_(self) -> str:
        masses = dict(zip(("target", "flow", "reweighted"), self.masses, strict=True))
        return table_of(self.name, {**masses, "missing": self.missing})._repr_html_()


@dataclass(frozen=True)
class Coverage:
    """Coverage of a target by a flow, with the evidence for it.

    Attributes:
        weights: Figures from the flow's own draws, without parts that it never draws.
        elbo: Mean log-ratio under the flow, in nats: at most log Z.
        eubo: Mean log-ratio under the target, in nats: at least log Z. None without its draws.
        target_ess: Effective share, from draws of the target; None without them.
        reached: Share of the target's mass that the flow's draws account for; None if unknown.
        modes: Mass of each mode, if the target has any and there are draws of it.
        reasons: Reasons for a failure, a sentence each.
        doubts: Reasons not to trust the reference; coverage is then unknown.
        source: Name of a reference that may itself miss a part of the target.
    """

    weights: Importance
    elbo: Mean
    eubo: Mean | None
    target_ess: Mean | None
    reached: Mean | None
    modes: tuple[Mode, ...]
    reasons: tuple[str, ...]
    doubts: tuple[str, ...] = ()
    source: str = ""

    @property
    def passed(self) -> bool | None:
        """True if no part is missing; None if coverage is unknown."""
        return None if self.reached is None or self.doubts else not self.reasons

    @property
    def verdict(self) -> str:
        """One line: passed, failed with the number of reasons, or unknown with the remedy."""
        if self.doubts:
            return f"coverage unknown: {self.doubts[0]}"
        if self.passed is None:
            return "coverage unknown: neither draws of the target nor its log Z are at hand"
        if self.passed:
            return "covered" + f", as far as {self.source} see" * bool(self.source)
        return f"NOT COVERED: {len(self.reasons)} reasons"

    def tables(self) -> list[Table]:
        """The figures, and the masses of the modes, if there are any."""
        figures = {
            "ESS, from the flow's draws": self.weights.ess,
            "ESS, from the target's draws": self.target_ess,
            "ELBO, nats": self.elbo,
            "log Z, nats": self.weights.log_z,
            "EUBO, nats": self.eubo,
            "mass reached": self.reached,
        }
        tables = [table_of("How near the flow is", figures)]
        if self.modes:
            columns = "mode", "target", "flow", "reweighted", ""
            masses = [
                (mode.name, *(mass.pair() for mass in mode.masses), "MISSING" * mode.missing)
                for mode in self.modes
            ]
            tables.append(Table("Masses of the modes", columns, masses))
        return tables

    def _sentences(self) -> list[str]:
        return [self.verdict, *(f"- {it}" for it in (*self.reasons, *self.doubts[1:]))]

    def table(self) -> str:
        """The verdict, its reasons, the figures and the modes as lines of text."""
        blocks = "\n".join(self._sentences()), *(table.text() for table in self.tables())
        return "\n\n".join(blocks)

    def __str__(self) -> str:
        return self.table()

    def _repr_html_(self) -> str:
        first, *others = self.tables()
        first = replace(first, notes=self._sentences())
        return "\n".join(table._repr_html_() for table in (first, *others))

    def to_dict(self) -> dict[str, Any]:
        """All figures as a dict for JSON."""
        figures = {"elbo": self.elbo, "eubo": self.eubo, "target_ess": self.target_ess}
        figures["reached"] = self.reached
        masses = ("target", "drawn", "reweighted")
        return {
            "passed": self.passed,
            "verdict": self.verdict,
            "reasons": list(self.reasons),
            "doubts": list(self.doubts),
            "source": self.source,
            **{name: None if it is None else to_json(it) for name, it in figures.items()},
            "weights": self.weights.to_dict(),
            "modes": [
                {"name": it.name, "missing": it.missing}
                | {name: to_json(getattr(it, name)) for name in masses}
                for it in self.modes
            ],
        }


@torch.no_grad()
def judge_coverage(
    target: Target,
    proposal: nn.Module | Distribution,
    condition: Float[Tensor, " conditions"] | None = None,
    *,
    held_out: Float[Tensor, "rows *event"] | None = None,
    train: Float[Tensor, "others *event"] | None = None,
    draws: int = 20_000,
    seed: int = 0,
    log_z: Mean | None = None,
    islands: int | None = None,
    doubts: tuple[str, ...] = (),
    source: str = "",
) -> Coverage:
    """Test under one condition whether a flow covers its target.

    Uses independent draws of the target: the given ones, else exact ones if it has a
    sampler. Modes are those of :meth:`Target.modes`: the components of a mixture, the rings, the
    winding sectors of the XY model.

    Args:
        target: The target to cover.
        proposal: The flow.
        condition: One condition.
        held_out: Independent draws of the target that the flow was not trained on.
        train: Training draws, to check that none is in held_out.
        draws: Draws of the flow, and of the target where it has an exact sampler.
        seed: Random seed.
        log_z: An estimate of log Z in nats, where it is not known.
        islands: Number of independent groups of equal size in held_out, one after
            another; None if every row is independent.
        doubts: Reasons not to trust held_out.
        source: Source of held_out, if it may itself miss a part of the target.

    Raises:
        ValueError: A row of held_out is in train.
    """
    integer("draws", draws, at_least=100, at_most=LARGEST_COUNT)
    condition = check_condition(target, condition)
    if condition.ndim != 1:
        raise ValueError(f"condition must be one, [conditions]; got {list(condition.shape)}.")
    if held_out is not None:
        check_draws("held_out", target, held_out, 2)
    if train is not None and held_out is not None:
        check_held_out(train, held_out)
    with random_numbers(seed):
        law = law_of(proposal, target, condition)
        x, log_p, log_q = draw_proposals(target, law, condition, (draws,))
        held_out = exact_draws(target, condition, (draws,)) if held_out is None else held_out
    exact = exact_log_z(target, condition)
    at_target, modes = None, None
    if held_out is not None:
        each = condition.expand(len(held_out), -1)
        density = precise_log_prob(target, held_out, each)
        if (nowhere := int((density == -math.inf).sum())) > 0:
            raise ValueError(
                f"held_out: {target} has no density at {nowhere:,} of {len(held_out):,} draws, "
                "which so are none of it; leave them out."
            )
        at_target = density - law.log_prob(held_out)
        both = torch.cat([x, held_out.to(x)])
        modes = target.modes(both, condition.expand(len(both), -1))
    return judge_ratios(
        log_p - log_q,
        at_target,
        log_z=log_z if exact is None else float(exact),
        islands=islands,
        doubts=doubts,
        source=source,
        labels=None if modes is None else modes.labels[:draws],
        target_labels=None if modes is None else modes.labels[draws:],
        names=() if modes is None else modes.names,
        sites=max(1, math.prod(target.event_shape)),
    )


def judge_ratios(
    log_ratio: Float[Tensor, " draws"],
    at_target: Float[Tensor, " rows"] | None = None,
    *,
    log_z: float | Mean | None = None,
    labels: Int[Tensor, " draws"] | None = None,
    target_labels: Int[Tensor, " rows"] | None = None,
    names: tuple[str, ...] = (),
    sites: int = 1,
    islands: int | None = None,
    doubts: tuple[str, ...] = (),
    source: str = "",
) -> Coverage:
    r"""Judge coverage from log-ratios alone, at draws of the flow and at draws of the target.

        mass reached = E_q[w] / Z,    1/Z = E_p[1/w],    ESS = 1 / (E_p[w] E_p[1/w])

    The flow's draws estimate E_q[w] only where the flow has mass; draws of the target estimate
    1/Z whatever the flow misses. Both are finite wherever the flow is wider than the target.

    Args:
        log_ratio: log p(x) − log q(x) at draws of the flow, in nats.
        at_target: The same at independent draws of the target.
        log_z: log Z in nats where it is known, or an estimate with its error.
        labels: The mode of each draw of the flow.
        target_labels: The mode of each draw of the target.
        names: The name of each mode.
        sites: Number of sites, for the variance per site.
        islands: Number of independent groups of equal size in at_target.
        doubts: Reasons not to trust at_target or log_z.
        source: Their source, if it may itself miss a part of the target.

    >>> half = torch.zeros(1_000)  # q is p on half of its mass, and log Z is 0
    >>> judge_ratios(half - 0.69315, log_z=0.0).reached.value
    tensor(0.5000, dtype=torch.float64)
    """
    _check_labels("labels", labels, log_ratio, names)
    _check_labels("target_labels", target_labels, at_target, names)
    weights = reweight(log_ratio, sites=sites)
    if weights.log_z.value.ndim:
        raise ValueError(f"log_ratio must be [draws]; got {list(log_ratio.shape)}.")
    elbo, eubo, ess, reached = mean(log_ratio), None, None, None
    if at_target is not None:
        at_target = _checked_at_target(at_target)
        eubo, ess = _mean_of_islands(at_target, islands), _ess_of_target(at_target, islands)
    if isinstance(log_z, Mean):
        error = torch.hypot(weights.log_z.error, log_z.error)
        reached = _share(Mean(weights.log_z.value - log_z.value, error))
    elif log_z is not None:
        number("log_z", log_z)
        reached = _share(Mean(weights.log_z.value - log_z, weights.log_z.error))
    elif at_target is not None:
        inverse = reweight(-at_target).log_z
        error = torch.hypot(weights.log_z.error, inverse.error)
        reached = _share(Mean(weights.log_z.value + inverse.value, error))
    modes = ()
    if labels is not None and target_labels is not None:
        modes = tuple(
            _modes(check_log_ratio("log_ratio", log_ratio), labels, target_labels, names, islands)
        )
    coverage = Coverage(weights, elbo, eubo, ess, reached, modes, (), doubts, source)
    if source and reached is not None:
        coverage = replace(coverage, doubts=(*doubts, *_lacking(reached, source)))
    return replace(coverage, reasons=tuple(_reasons(coverage)))


def _lacking(reached: Mean, source: str):
    """A doubt: the flow has a part that the reference lacks, so both may lack others."""
    if reached.value - 1 > UNREACHED + ERRORS * reached.error:
        yield (
            f"the flow's weights add up to {with_error(*reached)} of the Z of {source}, which so "
            "lack a part of the target themselves."
        )


def _reasons(coverage: Coverage):
    if coverage.reached is not None:
        value, margin = coverage.reached.value, UNREACHED + ERRORS * coverage.reached.error
        if 1 - value > margin:
            reached = with_error(*coverage.reached)
            yield f"the flow's draws account for {reached} of the target's mass."
        if value - 1 > margin and not coverage.source:
            reached = with_error(*coverage.reached)
            yield f"the flow's weights add up to {reached} of log Z: one is wrong."
    if coverage.target_ess is not None and coverage.eubo is not None:
        ess, own_ess = coverage.target_ess, coverage.weights.ess
        if ess.value + ERRORS * ess.error < SHARE * (own_ess.value - 2 * own_ess.error):
            yield (
                f"the effective share is {with_error(*ess)} at draws of the target, "
                f"and {with_error(*own_ess)} at the flow's own."
            )
        width = coverage.eubo.value - coverage.elbo.value
        error = torch.hypot(coverage.eubo.error, coverage.elbo.error)
        spread = coverage.weights.variance.value
        if width > 2 * spread + UNREACHED + ERRORS * error:
            yield (
                f"EUBO - ELBO is {with_error(width, error)} nats, where the variance of the "
                f"flow's own log-weights makes for {spread:.3g}."
            )
    missing = [mode for mode in coverage.modes if mode.missing]
    if missing:
        named = ", ".join(f"{mode.name} with mass {with_error(*mode.target)}" for mode in missing)
        yield f"{len(missing)} of {len(coverage.modes)} modes are missing: {named}."
        return  # the masses of all others are too large by as much
    for mode in coverage.modes:
        apart = (mode.reweighted.value - mode.target.value).abs()
        error = torch.hypot(mode.reweighted.error, mode.target.error)
        if apart > OFF * mode.target.value + ERRORS * error:
            yield (
                f"mode {mode.name} has mass {with_error(*mode.target)}, "
                f"and {with_error(*mode.reweighted)} after reweighting."
            )


def _modes(log_ratio: Tensor, labels: Tensor, target_labels: Tensor, names, islands: int | None):
    for k, name in enumerate(names):
        inside, target_inside = (labels == k).double(), (target_labels == k).double()
        mass, drawn = _mean_of_islands(target_inside, islands), mean(inside)
        enough = mass.value * min(len(inside), len(target_inside)) >= MIN_EXPECTED_DRAWS
        missing = bool(enough & (drawn.value < RARE * mass.value))
        yield Mode(name, mass, drawn, expectation(inside, log_ratio), missing)


def _check_labels(name: str, labels: Any, at: Any, names: tuple[str, ...]) -> None:
    if labels is None:
        return
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        raise TypeError(
            f"{name} must be a tensor of whole numbers; got a {type(labels).__name__}."
        )
    shape = list(at.shape) if isinstance(at, Tensor) else at
    if list(labels.shape) != shape:
        raise ValueError(f"{name} must be as the log-ratios, {shape}; got {list(labels.shape)}.")
    if labels.numel() and not 0 <= labels.min() <= labels.max() < len(names):
        raise ValueError(
            f"{name} must lie in [0, {len(names)}), one of names; "
            f"got {labels.min()} to {labels.max()}."
        )


def _checked_at_target(at_target: Any) -> Tensor:
    if isinstance(at_target, Tensor) and at_target.is_floating_point():
        # where q has no mass at all the ratio is infinite: as good as very large
        at_target = at_target.double().clamp_max(1e6)
    at_target = check_log_ratio("at_target", at_target)
    if (at_target == -math.inf).any():
        raise ValueError(
            f"at_target must be above -inf; got {int((at_target == -math.inf).sum())} draws at "
            "which the target has no density."
        )
    if at_target.ndim != 1:
        raise ValueError(f"at_target must be [rows]; got {list(at_target.shape)}.")
    return at_target


def _mean_of_islands(values: Tensor, islands: int | None) -> Mean:
    """The mean; its error is that of independent groups of rows if that is larger."""
    by_row = mean(values)
    if islands is None:
        return by_row
    return Mean(by_row.value, torch.maximum(by_row.error, mean(_by_island(values, islands)).error))


def _by_island(values: Tensor, islands: int) -> Tensor:
    if len(values) % islands:
        raise ValueError(
            f"islands must be groups of equal size; got {len(values)} rows in {islands}."
        )
    return values.double().unflatten(0, (islands, -1)).mean(1)


def _ess_of_target(log_ratio: Tensor, islands: int | None) -> Mean:
    up, down = (it.softmax(0) * len(it) for it in (log_ratio, -log_ratio))
    log_mean = [it.logsumexp(0) - math.log(len(it)) for it in (log_ratio, -log_ratio)]
    ess = (-log_mean[0] - log_mean[1]).exp()
    return Mean(ess, ess * _mean_of_islands(up + down, islands).error)


def _share(log: Mean) -> Mean:
    return Mean(log.value.exp(), log.value.exp() * log.error)

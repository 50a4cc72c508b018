"""The lowest-loss credible region: the draws closest to the act, whatever they are called."""

import dataclasses
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from rkl.bayes.answer import Answer, elements
from rkl.bayes.axes import in_one_order
from rkl.bayes.identified import joined_labels
from rkl.bayes.problem import Problem, by_member
from rkl.bayes.tables import Table
from rkl.checks import number
from rkl.randomness import random_numbers
from rkl.readers import masked_numbers
from rkl.runs import finite_or_null
from rkl.stats import quantile
from rkl.tables import Cell

TURN = 2 * math.pi
GAP = 0.15  # of the range inside that is left empty between two pieces
SHARE, LEAST = 0.02, 10  # of the draws inside, and draws, that each piece has at least


@dataclass(frozen=True, eq=False)
class Region:
    """All θ whose loss D(P_θ ‖ P_act) is at most a threshold.

    It does not move with the parametrisation, nor with a bijection of the data, for the loss
    does not; an interval of highest density does.

    Source: Bernardo (2005), "Intrinsic credible regions", definition 1, for other losses.

    Attributes:
        prob: Its posterior probability.
        threshold: The largest loss inside, in nats, [*batch].
        inside: Which draws are in it, [chains, draws, *batch].
        ranges: The least and the greatest value inside of every variable, by name; of an angle
            the ends of an arc, of which the second may lie beyond π; nan of what the act does not
            depend on. What members of a batch share has those of draws in the regions of all, and
            nan without such draws.
        pieces: The intervals in which the region lies, of every number, by its label.
        intervals: The central ``prob`` of the draws of every variable alone, by quantiles.
        angles: The variables that are angles.
    """

    prob: float
    threshold: Tensor
    inside: Tensor
    ranges: Mapping[str, tuple[Tensor, Tensor]]
    estimate: Answer = field(repr=False)
    pieces: Mapping[str, list[tuple[float, float]]]
    intervals: Mapping[str, tuple[Tensor, Tensor]]
    angles: frozenset[str] = frozenset()

    def contains(self, theta: Mapping[str, Any]) -> Tensor:
        """True [*batch] where these values of the variables are in the region.

        Raises:
            ValueError: A variable is missing, or has another shape than its draws.
            TypeError: A variable is no number.
        """
        problem, given = self.estimate.problem, {}
        if not isinstance(theta, Mapping):
            needed = ", ".join(problem.model.names)
            raise TypeError(f"theta must be a mapping with {needed}; got {theta!r:.60}.")
        point, unused = self.estimate.act.point, _unused_masks(self.estimate)
        for name in problem.model.names:
            if name not in theta and bool(unused[name].all()):  # any value does
                given[name] = point[name][None]
                continue
            if name not in theta:
                needed = ", ".join(problem.model.names)
                raise ValueError(f"theta must have {needed}; got {', '.join(theta) or 'nothing'}.")
            if masked := masked_numbers(theta[name]):
                raise ValueError(f"{name} must be finite: {masked}.")
            try:
                value = theta[name]
                if isinstance(value, xr.DataArray):
                    value = _in_order_of_draws(problem.draws.of(name), value)
                value = torch.as_tensor(value, dtype=torch.float64)
            except (TypeError, ValueError) as error:
                raise TypeError(f"{name} must be numbers; got {theta[name]!r:.60}.") from error
            shape = problem.shape(name)
            if value.shape not in (shape, torch.Size(problem.draws.shape(name))):
                raise ValueError(f"{name} must be {list(shape)}; got {list(value.shape)}.")
            given[name] = problem.align(name, value[None])
        return distance(self.estimate, given) <= self.threshold

    def __str__(self) -> str:
        return str(self.table())

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()

    def to_dataframe(self) -> Any:
        """The ranges, a data frame of pandas."""
        return self.table().to_dataframe()

    def to_dict(self) -> dict[str, Any]:
        """Everything but the draws, as JSON can hold it: None for what is not finite."""
        ranges = {name: [end.tolist() for end in ends] for name, ends in self.ranges.items()}
        alone = {name: [end.tolist() for end in ends] for name, ends in self.intervals.items()}
        record = {
            "prob": self.prob,
            "threshold": self.threshold.tolist(),
            "ranges": ranges,
            "pieces": {label: [list(piece) for piece in x] for label, x in self.pieces.items()},
            "intervals": alone,
        }
        return finite_or_null(record)

    def table(self) -> Table:
        """The least and the greatest value inside of every number, piece by piece."""
        joint = len(self.pieces) > max(1, self.estimate.problem.batch.numel())
        alone = _by_label(self.estimate.problem, self.intervals) if joint else {}
        rows: list[tuple[Cell, ...]] = []
        for label, pieces in self.pieces.items():
            for place, piece in enumerate(pieces or [(None, None)]):
                interval = alone.get(label, (None, None)) if not place else (None, None)
                name = f"{label}, or" if place else label
                rows.append((name, *piece, *interval) if joint else (name, *piece))
        share = f"{100 * self.prob:.10g}%"
        title = f"The {share} of the draws closest to the act under {self.estimate.divergence}"
        notes = []
        if joint:
            notes.append(
                "One region in all variables together: each range is its shadow on one of them, "
                f"and holds more than {share} of the draws by itself. Alone, "
                f"{share} of the draws of one variable lie between the two quantiles."
            )
        if any(len(pieces) > 1 for pieces in self.pieces.values()):
            notes.append("Where a variable has several pieces, no value between them is inside.")
        if empty := [label for label, pieces in self.pieces.items() if not pieces]:
            notes.append(
                f"{joined_labels(empty)}: no draw is in the regions of all members at once."
            )
        if angles := sorted(self.angles):
            notes.append(f"{', '.join(angles)}: arcs of a circle, modulo 2π.")
        columns = ("variable", "from", "to", *(("alone from", "alone to") if joint else ()))
        return Table(title, columns, rows, notes)

    def shading(self) -> dict[str, list[tuple[float, float]]]:
        """The pieces by label, arcs cut where the draws of an angle are cut."""
        shaded = {}
        for label, pieces in self.pieces.items():
            name = label.partition("[")[0]
            turns = (-1, 0, 1) if name in self.angles else (0,)
            shaded[label] = [(a + k * TURN, b + k * TURN) for a, b in pieces for k in turns]
        return shaded


def _in_order_of_draws(draws: xr.DataArray, value: xr.DataArray) -> np.ndarray:
    """The numbers of a value whose axes and labels may stand in another order."""
    value = in_one_order({"draws": draws, "value": value})["value"]
    return value.transpose(*(axis for axis in draws.dims if axis in value.dims), ...).values


def region(estimate: Answer, prob: float = 0.9) -> Region:
    """The region of posterior probability ``prob`` about the act of an estimate.

    Raises:
        ValueError: ``prob`` does not lie strictly between 0 and 1.
    """
    number("prob", prob, above=0, below=1)
    problem = estimate.problem
    losses = problem.losses(dict(estimate.act.point))
    threshold = quantile(losses.flatten(0, 1), prob, _weights(problem))
    inside = losses <= threshold
    angles = periodic(problem)
    unused = _unused_masks(estimate)
    numbers = sum((~mask).sum() for mask in unused.values())
    sole = int(numbers) == problem.batch.numel()
    ranges, intervals, pieces = {}, {}, {}
    for name in problem.model.names:
        values = _unroll(problem, name, inside) if name in angles else problem.theta[name]
        low, high = _range(problem, values, inside)
        mask = unused[name]
        ranges[name] = low.masked_fill(mask, torch.nan), high.masked_fill(mask, torch.nan)
        intervals[name] = _interval(problem, values, prob)
        pieces_here = _pieces(problem, name, values, inside, sole)
        pieces |= dict(itertools.compress(pieces_here.items(), (~mask).flatten().tolist()))
    return Region(prob, threshold, inside, ranges, estimate, pieces, intervals, angles)


def _unused_masks(estimate: Answer) -> dict[str, Tensor]:
    none = {
        name: torch.zeros(estimate.problem.shape(name), dtype=torch.bool)
        for name in estimate.problem.model.names
    }
    return none | dict(estimate.act.unused)


def distance(estimate: Answer, theta: Mapping[str, Tensor]) -> Tensor:
    """D(P_θ ‖ P_act) of one θ [1, ...], [*batch]."""
    problem = estimate.problem
    loss = problem.loss
    act = {name: x[None] for name, x in estimate.act.point.items()}
    laws = dataclasses.replace(loss.laws, theta=theta, weights=torch.ones(1, dtype=torch.float64))
    at = dataclasses.replace(loss, laws=laws)
    with torch.no_grad():
        return by_member(at, at.laws.of(act)).reshape(*problem.batch, -1).sum(-1)


def _weights(problem: Problem) -> Tensor | None:
    weights = problem.draws.weights
    return None if weights is None else weights.flatten()


def _range(problem: Problem, x: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    """The ends of a variable [draws, *batch, ...] among those inside; of all members if shared.

    They are nan where no draw is inside.
    """
    inside = _inside(problem, x, inside)
    empty = ~inside.any(0)
    low = torch.where(inside, x, torch.inf).amin(0)
    high = torch.where(inside, x, -torch.inf).amax(0)
    return low.masked_fill(empty, torch.nan), high.masked_fill(empty, torch.nan)


def _inside(problem: Problem, x: Tensor, inside: Tensor) -> Tensor:
    """Mask of the draws of each number of a variable [draws, *shape] that are inside."""
    inside, batch = inside.flatten(0, 1), len(problem.batch)
    if x.shape[1 : 1 + batch] != problem.batch:
        inside, batch = inside.reshape(len(inside), -1).all(-1), 0
    return inside.reshape(inside.shape + (1,) * (x.ndim - 1 - batch)).expand_as(x)


def _interval(problem: Problem, x: Tensor, prob: float) -> tuple[Tensor, Tensor]:
    """The central quantiles of every number [*shape], which monotone maps preserve."""
    ends = (1 - prob) / 2, (1 + prob) / 2
    low, high = (quantile(x, end, _weights(problem)) for end in ends)
    return low, high


def periodic(problem: Problem) -> frozenset[str]:
    """The variables that are angles: a full turn changes no distribution, but a part does."""
    names = set()
    theta = {name: x[:4] for name, x in problem.theta.items()}
    with random_numbers(0), torch.no_grad():
        try:
            law = problem.law(theta)
            points = law.sample()
            here = law.log_prob(points)
        except (NotImplementedError, RuntimeError, ValueError):
            return frozenset()
        for name, x in theta.items():
            turned = [_log_prob(problem, theta | {name: x + by}, points) for by in (TURN, 1.0)]
            if _close(turned[0], here) and not _close(turned[1], here):
                names.add(name)
    return frozenset(names)


def _log_prob(problem: Problem, theta: Mapping[str, Tensor], points: Tensor) -> Tensor | None:
    try:
        return problem.law(theta).log_prob(points)
    except (RuntimeError, ValueError):
        return None


def _close(x: Tensor | None, y: Tensor) -> bool:
    return x is not None and torch.allclose(x, y, rtol=1e-9, atol=1e-9)


def _unroll(problem: Problem, name: str, inside: Tensor) -> Tensor:
    """Angles [draws, *shape] on a line that is cut in the middle of the widest gap inside."""
    x = problem.theta[name]
    flat, within = x.reshape(len(x), -1), _inside(problem, x, inside).reshape(len(x), -1)
    columns = []
    for values, mask in zip(flat.unbind(-1), within.unbind(-1), strict=True):
        ordered = torch.remainder(values[mask], TURN).sort().values
        gaps = torch.cat([ordered[1:], ordered[:1] + TURN]) - ordered
        place = int(gaps.argmax())
        cut = float(ordered[place] + gaps[place] / 2)
        turned = torch.remainder(values - cut, TURN) + cut
        start = float(turned[mask].min())  # which comes to lie in (-π, π]
        columns.append(turned - TURN * math.ceil((start - math.pi) / TURN))
    return torch.stack(columns, -1).reshape(x.shape)


def _pieces(
    problem: Problem, name: str, x: Tensor, inside: Tensor, sole: bool
) -> dict[str, list[tuple[float, float]]]:
    """The intervals of every number in which the region lies, by its label.

    Args:
        problem: What was asked.
        name: A variable.
        x: Its draws [draws, *shape].
        inside: Which draws of each member are in the region.
        sole: Whether each member of the batch has a single number.
    """
    within = _inside(problem, x, inside).reshape(len(x), -1)
    flat = x.reshape(len(x), -1)
    labels = elements(name, x.shape[1:], problem.axes(name))
    pairs = zip(flat.unbind(-1), within.unbind(-1), strict=True)
    return {
        label: _runs(values, kept) if sole else _clusters(values[kept])
        for label, (values, kept) in zip(labels, pairs, strict=True)
    }


def _runs(values: Tensor, mask: Tensor) -> list[tuple[float, float]]:
    """Runs of neighbours inside, for a problem with a single number."""
    ordered, order = values.sort()
    mask = mask[order]
    starts = mask & ~torch.cat([mask[:1] & False, mask[:-1]])
    ends = mask & ~torch.cat([mask[1:], mask[:1] & False])
    lows, highs = ordered[starts].tolist(), ordered[ends].tolist()
    runs = [(lows[0], highs[0])]
    for low, high in zip(lows[1:], highs[1:], strict=True):
        if low <= runs[-1][1]:  # equal values on both sides of the threshold
            runs[-1] = (runs[-1][0], high)
        else:
            runs.append((low, high))
    within, span = ordered[mask], highs[-1] - lows[0]
    return [
        piece
        for low, high in runs
        for piece in _clusters(within[(within >= low) & (within <= high)], span)
    ]


def _clusters(values: Tensor, span: float | None = None) -> list[tuple[float, float]]:
    """Pieces separated by gaps that chance does not leave in one, for one number of several."""
    if not len(values):  # shared by members, of which no draw is in the regions of all
        return []
    ordered = values.sort().values
    span = float(ordered[-1] - ordered[0]) if span is None else span
    gaps = ordered.diff()
    number = torch.arange(1, len(ordered))
    least = max(LEAST, SHARE * len(ordered))
    wide = gaps > GAP * span
    cuts = (wide & (number >= least) & (len(ordered) - number >= least)).nonzero()[:, 0].tolist()
    starts = [0, *(cut + 1 for cut in cuts)]
    ends = [*cuts, len(ordered) - 1]
    return [(ordered[a].item(), ordered[b].item()) for a, b in zip(starts, ends, strict=True)]


def _by_label(
    problem: Problem, ends: Mapping[str, tuple[Tensor, Tensor]]
) -> dict[str, tuple[float, float]]:
    by_label = {}
    for name, (low, high) in ends.items():
        labels = elements(name, low.shape, problem.axes(name))
        pairs = zip(low.flatten().tolist(), high.flatten().tolist(), strict=True)
        by_label |= dict(zip(labels, pairs, strict=True))
    return by_label

"""One function per figure: arrays in, a matplotlib Figure out; :func:`to_svg` for a page.

Nothing here uses pyplot or changes a global setting. A run keeps its colour, dash and
marker from one figure to the next as long as the runs come in the same order. Colours,
text and grid are CSS variables in the SVG, so that one drawing reads on a light page and
on a dark one.

To add a figure, write one function here under ``@rc_context(STYLE)``.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rkl.checks import integer
from rkl.extras import optional_import

with optional_import("A figure"):  # the modules below import it too
    from matplotlib import rc_context
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

from rkl.plots.estimates import estimates
from rkl.plots.marginals import posterior
from rkl.plots.style import (
    HEIGHT,
    INK,
    MARKERS,
    STYLE,
    blank,
    colour,
    legend,
    line_style,
    make_logarithmic,
    one_panel,
    step_axis,
    wrap,
)
from rkl.plots.svg import to_svg

__all__ = [
    "bars",
    "divergence_by_rank",
    "estimates",
    "head_tail",
    "head_tail_by_step",
    "posterior",
    "precision_recall",
    "to_svg",
    "training_curves",
]


@rc_context(STYLE)
def training_curves(
    runs: Mapping[str, tuple[ArrayLike, ArrayLike]],
    *,
    label: str = "divergence (nats per token)",
    window: int = 1,
    logarithmic: bool = False,
) -> Figure:
    """The loss of each run, or any other logged figure, against the step.

    Args:
        runs: Under each run's name, its steps and its values, equally long. A value that
            is not finite leaves a gap.
        label: Name of the values, with their unit.
        window: Number of values in the running mean that is drawn in front; the values
            themselves are then drawn pale behind it.
        logarithmic: Whether the values are on a logarithmic axis.
    """
    integer("window", window, at_least=1)
    _refuse_empty("runs", runs)
    figure, axes = one_panel()
    lines = {}
    for i, (name, run) in enumerate(runs.items()):
        steps, values = _pair(f"runs[{name!r}]", run)
        y = _array(f"runs[{name!r}] values", values)
        x = _array(f"runs[{name!r}] steps", steps, length=len(y))
        if 1 < window < len(y):
            axes.plot(x, y, color=colour(i), linewidth=0.8, alpha=0.3)
            x, y = _running_mean(x, window), _running_mean(y, window)
        marker = MARKERS[i % len(MARKERS)] if len(y) == 1 else ""
        (lines[name],) = axes.plot(x, y, marker=marker, **line_style(i))
    step_axis(axes)
    axes.set_ylabel(label)
    if logarithmic:
        make_logarithmic(axes, "y")
    legend(figure, lines)
    return figure


@rc_context(STYLE)
def head_tail(
    teacher: ArrayLike,
    students: Mapping[str, Mapping[int, ArrayLike]],
    *,
    head: int | None = None,
    logarithmic: bool = True,
) -> Figure:
    """The teacher's p and the student's q per rank, one row a student, one column a step.

    Long vectors are averaged over bins of neighbouring ranks, a few hundred in all.

    Source: the figure of the paper on adaptive KL, Wu et al., arXiv 2404.02657.

    Args:
        teacher: Probability of each atom, [ranks], in the order to draw, usually falling.
        students: Under each student's name, q in the same order at each step.
        head: Number of atoms in the teacher's head; a dotted line ends it.
        logarithmic: Whether both axes are logarithmic; linear suits a toy of few atoms.
    """
    p = _array("teacher", teacher)
    if head is not None and (not isinstance(head, int) or head < 0):
        raise ValueError(f"head must be a number of atoms; got {head!r}.")
    _refuse_empty("students", students)
    for name, steps in students.items():
        _refuse_empty(f"students[{name!r}]", steps)
    columns = max(map(len, students.values()))
    side = {name: f"{wrap(name, 24)}\nprobability" for name in students}
    margin = 30 + 15 * max(text.count("\n") for text in side.values())
    figure = blank(margin + 190 * columns, 60 + 165 * len(students))
    grid = figure.subplots(len(students), columns, sharex=True, sharey=True, squeeze=False)
    lines = {}
    for i, (name, steps) in enumerate(students.items()):
        for axes in grid[i, len(steps) :]:
            axes.set_axis_off()
        for axes, (step, values) in zip(grid[i], steps.items(), strict=False):
            q = _array(f"students[{name!r}][{step}]", values, length=len(p))
            lines["teacher"], lines[name] = _panel(axes, p, q, i, logarithmic)
            axes.set_title(f"step {step:,}")
            if head is not None:
                axes.axvline(head + 0.5, color=INK, linewidth=1, linestyle=":")
        grid[i, 0].set_ylabel(side[name])
    for axes in grid[-1]:
        axes.set_xlabel("rank under the teacher")
    legend(figure, lines)
    return figure


@rc_context(STYLE)
def divergence_by_rank(
    edges: ArrayLike,
    students: Mapping[str, ArrayLike],
    *,
    errors: Mapping[str, ArrayLike] | None = None,
    label: str = "divergence (nats per token)",
) -> Figure:
    """Share of each student's divergence by the teacher's rank of the token.

    Args:
        edges: Bin i holds the ranks ``edges[i]`` up to but without ``edges[i + 1]``,
            counted from 0; the axis counts from 1.
        students: Under each student's name, one value per bin.
        errors: Standard errors, likewise.
        label: Name of the values, with their unit.
    """
    ranks = _array("edges", edges)
    if len(ranks) < 2 or not np.all(np.diff(ranks) > 0):
        raise ValueError(f"edges must be at least two growing ranks; got {ranks.tolist()}.")
    _refuse_empty("students", students)
    figure, axes = one_panel()
    lines, position = {}, np.arange(len(ranks) - 1) + 0.5
    for i, (name, values) in enumerate(students.items()):
        y = _array(f"students[{name!r}]", values, length=len(position))
        error = None
        if errors and name in errors:
            error = _array(f"errors[{name!r}]", errors[name], length=len(y))
        x = position + 0.5 * ((i + 0.5) / len(students) - 0.5)  # side by side within the bin
        marker = MARKERS[i % len(MARKERS)]
        lines[name] = axes.errorbar(x, y, error, marker=marker, **line_style(i), elinewidth=1)
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.set_xticks(np.arange(len(ranks)), [_rank(rank) for rank in ranks])
    axes.set_xlim(0, len(ranks) - 1)
    axes.set(xlabel="rank of the token under the teacher (1 = most probable)", ylabel=label)
    legend(figure, lines)
    return figure


@rc_context(STYLE)
def precision_recall(
    students: Mapping[str, tuple[ArrayLike, ArrayLike]],
    *,
    bands: Mapping[str, tuple[ArrayLike, ArrayLike]] | None = None,
    between: tuple[str, str] = ("teacher", "student"),
) -> Figure:
    """The precision-recall curve of each student; a perfect one goes through (1, 1).

    Args:
        students: Under each student's name, its precision alpha and its recall beta, one
            pair per slope.
        bands: Lower and upper precision at the same slopes, where known.
        between: Names of the two distributions, the target first.
    """
    _refuse_empty("students", students)
    figure, axes = one_panel(height=402)
    lines = {}
    for i, (name, curve) in enumerate(students.items()):
        alpha, beta = _pair(f"students[{name!r}]", curve)
        precision = _array(f"students[{name!r}] precision", alpha)
        recall = _array(f"students[{name!r}] recall", beta, length=len(precision))
        (lines[name],) = axes.plot(recall, precision, **line_style(i), clip_on=False)
        if bands and name in bands:
            band = _pair(f"bands[{name!r}]", bands[name])
            low, high = (_array(f"bands[{name!r}]", it, length=len(recall)) for it in band)
            axes.fill_between(recall, low, high, color=colour(i), alpha=0.18, linewidth=0)
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    axes.set_xlabel(f"recall β: share of the {between[0]} covered")
    axes.set_ylabel(f"precision α: share of the {between[1]} kept")
    legend(figure, lines)
    return figure


@rc_context(STYLE)
def head_tail_by_step(
    steps: ArrayLike,
    runs: Mapping[str, tuple[ArrayLike, ArrayLike]],
    *,
    label: str = "gap Σ |p − q|",
) -> Figure:
    """Gap of each run over the teacher's head and over its tail, by the step.

    Args:
        steps: The steps, [steps].
        runs: Under each run's name, its gap over the head and its gap over the tail at
            each step.
        label: Name of a gap, with its unit if it has one.
    """
    x = _array("steps", steps)
    _refuse_empty("runs", runs)
    figure = blank(2 * 300, HEIGHT)
    panels = figure.subplots(1, 2, sharey=True)
    lines = {}
    for part, (axes, title) in enumerate(zip(panels, ("head", "tail"), strict=True)):
        for i, (name, gaps) in enumerate(runs.items()):
            gap = _pair(f"runs[{name!r}]", gaps)[part]
            y = _array(f"runs[{name!r}] {title}", gap, length=len(x))
            (lines[name],) = axes.plot(x, y, **line_style(i))
        axes.set_title(title)
        step_axis(axes)
        make_logarithmic(axes, "y")
    panels[0].set_ylabel(label)
    legend(figure, lines)
    return figure


@rc_context(STYLE)
def bars(
    values: Mapping[str, float],
    *,
    errors: Mapping[str, float] | None = None,
    label: str,
    reference: tuple[str, float] | None = None,
) -> Figure:
    """One number per run, with its standard error.

    Args:
        values: Under each run's name, its number; one that is not finite is written out.
        errors: Standard errors, where known.
        label: Name of the numbers, with their unit.
        reference: Name and value of a line to compare with, such as the teacher's.
    """
    _refuse_empty("values", values)
    names, given = list(values), _numbers("values", list(values.values()))
    finite = np.where(np.isfinite(given), given, 0.0)
    above = [wrap(name, 54) for name in names]
    row_height = 26 + 15 * (1 + max(text.count("\n") for text in above))
    figure, axes = one_panel(height=50 + row_height * len(names))
    rows, thickness = np.arange(len(names)), 18 / row_height
    axes.barh(rows, finite, color=[colour(i) for i in range(len(names))], height=thickness)
    if errors:
        error = _array("errors", [errors.get(name, np.nan) for name in names])
        error[~np.isfinite(given)] = np.nan
        axes.errorbar(finite, rows, xerr=error, fmt="none", color=INK, elinewidth=1.2)
    beside = {"textcoords": "offset points", "annotation_clip": False}
    for row in rows:
        corner = (0, row - thickness / 2)
        left = axes.annotate(above[row], corner, (1, 3), ("axes fraction", "data"), **beside)
        left.set_in_layout(False)  # a long name may pass the end of its axis
        if not np.isfinite(given[row]):
            word = "undefined" if np.isnan(given[row]) else "infinite"
            axes.annotate(word, (0, row), (5, 0), va="center", **beside)
    axes.set_ylim(len(names) - 1 + thickness, -0.5 - thickness / 2)  # the first on top
    axes.set_yticks([])
    axes.set_xlabel(label)
    if reference is not None:
        line = axes.axvline(reference[1], color=INK, linewidth=1.2, linestyle="--")
        legend(figure, {reference[0]: line})
    return figure


def _refuse_empty(argument: str, values: Any) -> None:
    if not isinstance(values, Mapping):
        raise TypeError(f"{argument} must be a mapping of names; got a {type(values).__name__}.")
    if not values:
        raise ValueError(f"{argument} is empty; a figure needs at least one entry.")


def _array(argument: str, values: ArrayLike, length: int | None = None) -> NDArray[np.float64]:
    """A vector of floats, gaps (NaN) in place of infinities: matplotlib draws around them."""
    array = _numbers(argument, values)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"{argument} must be a non-empty vector; got shape {array.shape}.")
    if length is not None and len(array) != length:
        raise ValueError(f"{argument} must hold {length} values; got {len(array)}.")
    return np.where(np.isfinite(array), array, np.nan)


def _numbers(argument: str, values: ArrayLike) -> NDArray[np.float64]:
    try:
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{argument} must hold numbers: {error}.") from None


def _pair(argument: str, values: Any) -> Any:
    if len(values) != 2:
        raise ValueError(f"{argument} must be a pair of vectors; got {len(values)}.")
    return values


def _running_mean(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    return np.convolve(values, np.full(window, 1 / window), mode="valid")


def _panel(
    axes: Axes, p: NDArray[np.float64], q: NDArray[np.float64], i: int, logarithmic: bool
) -> tuple[Line2D, Line2D]:
    rank, p_mean = _bin_means(p, logarithmic)
    axes.fill_between(rank, p_mean, color=INK, alpha=0.15, linewidth=0)
    (teacher,) = axes.plot(rank, p_mean, color=INK, linewidth=1.2)
    (student,) = axes.plot(rank, _bin_means(q, logarithmic)[1], color=colour(i))
    if logarithmic:
        make_logarithmic(axes, "x")
        make_logarithmic(axes, "y")
    return teacher, student


def _bin_means(
    values: NDArray[np.float64], logarithmic: bool
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Middle rank and mean of at most 300 bins of neighbouring ranks."""
    spaced = np.geomspace if logarithmic else np.linspace
    edges = np.unique(spaced(1, len(values) + 1, min(len(values), 300) + 1).round().astype(int))
    size = np.diff(edges)
    return edges[:-1] + (size - 1) / 2, np.add.reduceat(values, edges[:-1] - 1) / size


def _rank(edge: float) -> str:
    """The first rank of a bin, counted from 1, short enough for a tick."""
    if edge < 1000:
        return f"{edge + 1:.0f}"
    return f"{edge / 1000:.2g}k" if edge < 1e4 else f"{edge / 1000:.0f}k"

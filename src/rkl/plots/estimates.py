"""Estimates that approach the truth as the data grow."""

from collections.abc import Mapping

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from numpy.typing import ArrayLike

from rkl.checks import integer, number
from rkl.plots.style import (
    INK,
    MARKERS,
    STYLE,
    blank,
    colour,
    legend,
    line_style,
    make_logarithmic,
)

Series = tuple[ArrayLike, ArrayLike, ArrayLike]


@rc_context(STYLE)
def estimates(
    panels: Mapping[str, Mapping[str, Series]],
    *,
    truth: float,
    label: str,
    sizes: str = "number of groups N",
    logarithmic: bool = True,
    columns: int = 2,
) -> Figure:
    """Estimates against the size of the data: a panel per prior, a line per estimator.

    An estimator keeps its line from panel to panel. Later lines are narrower: of two lines at the
    same place both are visible.

    Args:
        panels: Under each panel's title and each estimator's name, the sizes, the mean estimate
            at each of them and the half-width of a band about it.
        truth: A dashed line.
        label: Name of the estimate, with its unit.
        sizes: Name of the sizes; their axis is logarithmic.
        logarithmic: Whether the axis of the estimates is logarithmic too.
        columns: Panels side by side.
    """
    _refuse(panels, truth, columns)
    names = list(dict.fromkeys(name for panel in panels.values() for name in panel))
    rows = -(-len(panels) // columns)
    figure = blank(30 + 290 * columns, 40 + 250 * rows)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    lines = {}
    for axes, (title, panel) in zip(grid.flat, panels.items(), strict=False):
        for name, series in panel.items():
            x, y, band = _check_series(f"panels[{title!r}][{name!r}]", series)
            i = names.index(name)
            width = 3.2 - 2.2 * i / max(len(names) - 1, 1)
            style = line_style(i) | {"linewidth": width, "marker": MARKERS[i % len(MARKERS)]}
            (lines[name],) = axes.plot(x, y, **style, markersize=3.5)
            low = y / (1 + band / y) if logarithmic else y - band  # as far below as above
            axes.fill_between(x, low, y + band, color=colour(i), alpha=0.12, linewidth=0)
        lines["truth"] = axes.axhline(truth, color=INK, linewidth=1, linestyle="--")
        axes.set_title(title)
        make_logarithmic(axes, "x")
        if logarithmic:
            make_logarithmic(axes, "y")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("")
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for k in range(columns):
        last = grid[(len(panels) - 1 - k) // columns, k] if k < len(panels) else None
        if last is not None:
            last.set_xlabel(sizes)
            last.tick_params(labelbottom=True)
    for axes in grid[:, 0]:
        axes.set_ylabel(label)
    legend(figure, lines)
    return figure


def _refuse(panels: Mapping, truth: float, columns: int) -> None:
    integer("columns", columns, at_least=1)
    number("truth", truth)
    if not panels or not all(panels.values()):
        raise ValueError(
            "panels is empty, or one of them is; a figure needs an estimator in each."
        )


def _check_series(argument: str, series: Series) -> list[np.ndarray]:
    if len(series) != 3:
        raise ValueError(f"{argument} must be sizes, means and bands; got {len(series)} of three.")
    try:
        x, y, band = vectors = [np.asarray(it, dtype=np.float64) for it in series]
    except (TypeError, ValueError) as error:
        raise TypeError(f"{argument} must hold numbers: {error}.") from error
    if x.ndim != 1 or not x.size or not x.shape == y.shape == band.shape:
        shapes = ", ".join(str(it.shape) for it in vectors)
        raise ValueError(f"{argument} must hold three vectors of one length; got {shapes}.")
    return vectors

"""Precision and recall of models, and their samples."""

import math
from collections.abc import Mapping

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from rkl.plots.style import (
    MARKERS,
    STYLE,
    blank,
    colour,
    legend,
    one_panel,
    wrap,
)

Point = tuple[tuple[float, float], tuple[float, float]]


@rc_context(STYLE)
def operating_points(
    points: Mapping[str, Point],
    *,
    recall: str = "recall",
    precision: str = "precision",
    hollow: frozenset[str] = frozenset(),
) -> Figure:
    """One point per model, with its standard errors; up and to the right is better.

    Args:
        points: Under each model's name its recall and its precision, each with its error.
        recall: Label of the horizontal axis.
        precision: Label of the vertical axis.
        hollow: Names whose marker is drawn hollow.
    """
    if not points:
        raise ValueError("points is empty; a figure needs at least one model.")
    figure, axes = one_panel(width=760, height=380)
    lines = {}
    for i, (name, ((x, x_error), (y, y_error))) in enumerate(points.items()):
        if not all(map(math.isfinite, (x, y))):
            raise ValueError(f"points[{name!r}] must be finite; got {x} and {y}.")
        errors = [it if math.isfinite(it) else 0.0 for it in (x_error, y_error)]
        face = "none" if name in hollow else colour(i)
        lines[name] = axes.errorbar(
            [x],
            [y],
            xerr=[errors[0]],
            yerr=[errors[1]],
            color=colour(i),
            marker=MARKERS[i % len(MARKERS)],
            markerfacecolor=face,
            markersize=7,
            linestyle="none",
            elinewidth=1,
        )
    axes.set(xlabel=recall, ylabel=precision)
    axes.margins(0.08)
    legend(figure, lines)
    return figure


@rc_context(STYLE)
def clouds(panels: Mapping[str, ArrayLike], *, columns: int = 3, reach: float = 3.0) -> Figure:
    """Points of the plane, a panel per distribution.

    Args:
        panels: Under each distribution's name, its points [points, 2].
        columns: Panels side by side.
        reach: Half the side of each panel.
    """
    figure, grid = _grid(panels, columns, 190)
    for axes, (name, points) in zip(grid.flat, panels.items(), strict=False):
        x = np.asarray(points, dtype=np.float64)
        if x.ndim != 2 or x.shape[1] != 2:
            raise ValueError(f"panels[{name!r}] must be [points, 2]; got {list(x.shape)}.")
        shown = x[(np.abs(x) <= reach).all(1)]
        axes.scatter(*shown.T, s=2.5, color=colour(0), alpha=0.6, linewidths=0, rasterized=True)
        axes.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
        axes.set(xticks=[], yticks=[])
        axes.set_title(wrap(name, 26), fontsize=10)
    return figure


@rc_context(STYLE)
def montages(panels: Mapping[str, ArrayLike], *, columns: int = 3, across: int = 6) -> Figure:
    """Pictures, a montage per distribution, dark ink on light.

    Args:
        panels: Under each distribution's name, its pictures [pictures, height, width].
        columns: Montages side by side.
        across: Pictures in a row of one.
    """
    figure, grid = _grid(panels, columns, 190)
    for axes, (name, pictures) in zip(grid.flat, panels.items(), strict=False):
        x = np.asarray(pictures, dtype=np.float64)
        if x.ndim != 3 or not len(x):
            raise ValueError(
                f"panels[{name!r}] must be [pictures, height, width]; got {list(x.shape)}."
            )
        low, high = (float(np.quantile(x, it)) for it in (0.01, 0.99))
        rows = min(across, -(-len(x) // across))
        sheet = np.full((rows, across, x.shape[1] + 1, x.shape[2] + 1), low)
        for i, picture in enumerate(x[: rows * across]):
            sheet[i // across, i % across, :-1, :-1] = picture
        whole = np.concatenate(list(np.concatenate(list(sheet), 1)), 1)
        axes.imshow(whole, cmap="gray_r", vmin=low, vmax=max(high, low + 1e-9), aspect="equal")
        axes.set_axis_off()
        axes.set_title(wrap(name, 26), fontsize=10)
    return figure


def _grid(panels: Mapping[str, ArrayLike], columns: int, side: int) -> tuple[Figure, np.ndarray]:
    if not panels:
        raise ValueError("panels is empty; a figure needs at least one distribution.")
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    lines = max(wrap(name, 26).count("\n") for name in panels)
    figure = blank(columns * side, rows * (side + 14 * lines + 14))
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    return figure, grid

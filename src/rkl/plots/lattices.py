"""Estimates of samplers against temperature, lattices of angles, and points of a plane."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray

from rkl.checks import integer
from rkl.plots.style import (
    DASHES,
    INK,
    MARKERS,
    PALETTE,
    STYLE,
    blank,
    colour,
    legend,
    make_logarithmic,
)

Series = tuple[ArrayLike, ArrayLike, ArrayLike]
DARK, BRIGHT = "#12161b", "#ffffff"  # on the colour wheel, whatever the page's scheme


@rc_context(STYLE)
def against(
    panels: Mapping[str, Mapping[str, Series]],
    *,
    label: str,
    band: str | None = None,
    logarithmic: tuple[str, ...] = (),
    columns: int = 2,
) -> Figure:
    """Estimates with their errors against a condition, a panel for each quantity.

    Args:
        panels: Under each quantity, with its unit, and each source: conditions, values, errors.
        label: The condition, with its unit.
        band: The source drawn as a line with a band of two errors; the others are points.
        logarithmic: The quantities whose axis is logarithmic.
        columns: Panels side by side.
    """
    figure, grid = _grid("panels", panels, columns, (285, 195))
    names = list(dict.fromkeys(name for panel in panels.values() for name in panel))
    lines: dict[str, Any] = {}
    for axes, (title, panel) in zip(grid, panels.items(), strict=True):
        for name, series in panel.items():
            x, y, error = _series(f"panels[{title!r}][{name!r}]", series)
            i = names.index(name)
            if name == band:
                axes.fill_between(x, y - 2 * error, y + 2 * error, color=INK, alpha=0.15, lw=0)
                (lines[name],) = axes.plot(x, y, color=INK, linewidth=1.2)
            else:
                dash = "none" if band else DASHES[i // len(PALETTE) % len(DASHES)]
                style: dict[str, Any] = {"color": colour(i), "linestyle": dash, "linewidth": 1.2}
                lines[name] = axes.errorbar(x, y, error, marker=MARKERS[i % 6], **style)
        axes.set_title(title)
        if title in logarithmic:
            make_logarithmic(axes, "y")
    _label_below(grid, columns, label)
    legend(figure, lines)
    return figure


@rc_context(STYLE)
def histograms(
    panels: Mapping[str, Mapping[str, ArrayLike]],
    *,
    label: str,
    bins: int = 40,
    columns: int = 2,
) -> Figure:
    """Histograms of values from several sources, a panel for each condition.

    Args:
        panels: Under each panel's title and each source's name, the values; the first source
            is shaded, the others are outlines.
        label: Name of the values, with their unit.
        bins: Number of bins, the same for all sources of a panel.
        columns: Panels side by side.
    """
    figure, grid = _grid("panels", panels, columns, (285, 175))
    lines: dict[str, Any] = {}
    for axes, (title, panel) in zip(grid, panels.items(), strict=True):
        values = {
            name: _vector(f"panels[{title!r}][{name!r}]", sample) for name, sample in panel.items()
        }
        every = np.concatenate(list(values.values()))
        edges = np.linspace(every.min(), every.max() or 1.0, bins + 1)
        if edges[0] == edges[-1]:
            edges = np.linspace(edges[0] - 0.5, edges[0] + 0.5, bins + 1)
        for i, (name, sample) in enumerate(values.items()):
            density = np.histogram(sample, edges, density=True)[0]
            shaded = {"fill": True, "alpha": 0.22, "color": INK}
            outline = {"color": colour(i - 1), "linewidth": 1.5}
            lines[name] = axes.stairs(density, edges, **(outline if i else shaded))
        axes.set_title(title)
        axes.set_yticks([])
    _label_below(grid, columns, label)
    legend(figure, lines)
    return figure


@rc_context(STYLE)
def wheels(
    lattices: Mapping[str, ArrayLike],
    vorticity: Mapping[str, ArrayLike] | None = None,
    *,
    columns: int = 4,
) -> Figure:
    """Angles on a lattice as hues of one lightness, an arrow at each site, vortices marked.

    Args:
        lattices: Under each title, the angles in radians, [rows, columns].
        vorticity: Under the same titles, the vorticity of the plaquette that begins at each
            site: a bright disc for 1, a dark one for −1.
        columns: Lattices side by side.
    """
    figure, grid = _grid("lattices", {**lattices, "the wheel": None}, columns, (140, 158))
    signs = {"vortex": (1, BRIGHT, DARK), "antivortex": (-1, DARK, BRIGHT)} if vorticity else {}
    discs: dict[str, Any] = {
        name: {"marker": "o", "linestyle": "none", "color": face, "markeredgecolor": edge}
        for name, (_sign, face, edge) in signs.items()
    }
    for axes, (title, angles) in zip(grid, lattices.items(), strict=False):
        theta = _plane(f"lattices[{title!r}]", angles)
        axes.imshow(hue(theta), interpolation="nearest")
        _arrows(axes, theta)
        for name, (sign, *_) in signs.items():
            turns = np.rint(_plane(f"vorticity[{title!r}]", (vorticity or {})[title]))
            row, column = np.nonzero(turns == sign)
            (disc,) = axes.plot(column + 0.5, row + 0.5, **discs[name], ms=7.5, clip_on=False)
            disc.set_in_layout(False)
        axes.set_title(title)
        _bare(axes)
    _key(grid[len(lattices)])
    if signs:
        legend(figure, {name: Line2D([], [], **how, ms=7.5) for name, how in discs.items()})
    return figure


def _arrows(axes: Axes, theta: NDArray[np.float64]) -> None:
    place = np.arange(theta.shape[1]), np.arange(theta.shape[0])
    scale: Any = {"scale": 1.35, "scale_units": "xy", "angles": "uv", "pivot": "middle"}
    size = 0.11 / theta.shape[1]
    head: Any = {"width": size, "headwidth": 4, "headlength": 4, "headaxislength": 3.6}
    axes.quiver(*place, np.cos(theta), np.sin(theta), color=DARK, alpha=0.75, **scale, **head)


@rc_context(STYLE)
def planes(
    panels: Mapping[str, ArrayLike],
    *,
    marks: Mapping[str, ArrayLike] | None = None,
    columns: int = 3,
) -> Figure:
    """Points of a plane, panels on one scale.

    Args:
        panels: Under each title the points, [points, 2].
        marks: Under a title, places to mark with a cross: modes that are missing.
        columns: Panels side by side.
    """
    figure, grid = _grid("panels", panels, columns, (200, 200))
    points = {name: _points(f"panels[{name!r}]", sample) for name, sample in panels.items()}
    every = np.concatenate([*points.values(), *map(np.asarray, (marks or {}).values())])
    low, high = np.quantile(every, 0.002), np.quantile(every, 0.998)
    margin = 0.06 * (high - low)
    for i, (axes, (title, sample)) in enumerate(zip(grid, points.items(), strict=True)):
        hue_of = INK if i == 0 else colour(i - 1)
        axes.scatter(*sample.T, s=2.0, color=hue_of, alpha=0.35, linewidths=0, rasterized=True)
        if marks and title in marks:
            cross = _points(f"marks[{title!r}]", marks[title])
            axes.plot(*cross.T, "x", color=INK, markersize=9, markeredgewidth=2)
        axes.set(aspect="equal", xlim=(low - margin, high + margin), title=title)
        axes.set_ylim(low - margin, high + margin)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_locator(MaxNLocator(5))
    return figure


def hue(angle: ArrayLike) -> NDArray[np.float64]:
    """The colour of an angle, [..., 3]: hue alone, at one lightness and chroma (Oklab).

    Source: B. Ottosson (2020), "A perceptual color space for image processing".

    >>> hue(0.0).round(2).tolist()
    [0.91, 0.54, 0.66]
    """
    theta = np.asarray(angle, dtype=np.float64)
    lab = np.stack([np.full_like(theta, 0.74), 0.12 * np.cos(theta), 0.12 * np.sin(theta)], -1)
    cone = (lab @ _TO_CONE.T) ** 3
    linear = np.clip(cone @ _TO_RGB.T, 0, 1)
    return np.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear)


_TO_CONE = np.array(
    [
        [1, 0.3963377774, 0.2158037573],
        [1, -0.1055613458, -0.0638541728],
        [1, -0.0894841775, -1.2914855480],
    ]
)
_TO_RGB = np.array(
    [
        [4.0767416621, -3.3077115913, 0.2309699292],
        [-1.2684380046, 2.6097574011, -0.3413193965],
        [-0.0041960863, -0.7034186147, 1.7076147010],
    ]
)


def _key(axes: Axes) -> None:
    across = np.linspace(-1, 1, 121)
    x, y = np.meshgrid(across, -across)
    radius = np.hypot(x, y)
    ring = ((radius < 1) & (radius > 0.55)).astype(float)
    pixels = np.concatenate([hue(np.arctan2(y, x)), ring[..., None]], -1)
    axes.imshow(pixels, extent=(-1, 1, -1, 1))
    for text, angle in (("0", 0.0), ("π/2", 0.5), ("π", 1.0), ("−π/2", 1.5)):
        at = 0.36 * np.array([np.cos(np.pi * angle), np.sin(np.pi * angle)])
        drawn_text = axes.text(at[0], at[1], text, ha="center", va="center", fontsize=10)
        drawn_text.set_in_layout(False)
    axes.set_title("hue: the angle")
    _bare(axes)


def _bare(axes: Axes) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(False)
    axes.spines[:].set_visible(False)


def _grid(argument: str, panels: Any, columns: int, size: tuple[int, int]):
    if not isinstance(panels, Mapping):
        raise TypeError(f"{argument} must be a mapping of titles; got a {type(panels).__name__}.")
    if not panels or any(isinstance(it, Mapping) and not it for it in panels.values()):
        raise ValueError(f"{argument} is empty, or one of its panels is.")
    integer("columns", columns, at_least=1)
    across = min(columns, len(panels))
    rows = -(-len(panels) // across)
    figure = blank(25 + size[0] * across, 25 + size[1] * rows)
    grid = figure.subplots(rows, across, squeeze=False).flat
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    return figure, list(grid[: len(panels)])


def _label_below(grid: list[Axes], columns: int, label: str) -> None:
    for axes in grid[-min(columns, len(grid)) :]:
        axes.set_xlabel(label)
    for axes in grid:
        axes.xaxis.set_major_locator(MaxNLocator(5))


def _series(argument: str, series: Any) -> list[NDArray[np.float64]]:
    if len(series) != 3:
        raise ValueError(f"{argument} must be conditions, values and errors; got {len(series)}.")
    vectors = [_vector(argument, it) for it in series]
    if len({len(it) for it in vectors}) != 1:
        raise ValueError(f"{argument} must be equally long; got {[len(it) for it in vectors]}.")
    return [np.where(np.isfinite(it), it, np.nan) for it in vectors]


def _vector(argument: str, values: ArrayLike) -> NDArray[np.float64]:
    return _as_array(argument, values, 1, "a non-empty vector")


def _plane(argument: str, values: ArrayLike) -> NDArray[np.float64]:
    return _as_array(argument, values, 2, "[rows, columns]")


def _points(argument: str, values: ArrayLike) -> NDArray[np.float64]:
    points = _as_array(argument, values, 2, "[points, 2]")
    if points.shape[1] != 2:
        raise ValueError(f"{argument} must be [points, 2]; got {list(points.shape)}.")
    return points


def _as_array(argument: str, values: Any, axes: int, expected: str) -> NDArray[np.float64]:
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{argument} must hold numbers: {error}.") from None
    if array.ndim != axes or not array.size:
        raise ValueError(f"{argument} must be {expected}; got shape {list(array.shape)}.")
    return array

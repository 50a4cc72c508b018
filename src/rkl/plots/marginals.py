"""Figure of a posterior with the estimates and the credible region."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from rkl.plots.style import HEIGHT, INK, STYLE, WIDTH, blank, legend, line_style

SHOWN = 0.998  # of the draws; the axis ends where the tails begin
BINS = 60


@rc_context(STYLE)
def posterior(
    draws: Mapping[str, ArrayLike],
    acts: Mapping[str, Mapping[str, float]],
    *,
    regions: Mapping[str, Sequence[Sequence[float]]] | None = None,
) -> Figure:
    """The marginal posterior of every parameter, a panel each, with the estimates marked.

    Args:
        draws: Under each parameter's name, draws of it; the middle 99.8 % are shown.
        acts: Under each estimate's name, its value of each parameter that it has.
        regions: Under a parameter's name, the intervals in which the credible region lies, each
            by its two ends; they are shaded.
    """
    if not isinstance(draws, Mapping):
        raise TypeError(f"draws must be a dict by names; got a {type(draws).__name__}.")
    if not draws:
        raise ValueError("draws must hold the draws of at least one parameter; got none.")
    for act, values in acts.items():
        if not isinstance(values, Mapping) or not all(
            isinstance(value, int | float) for value in values.values()
        ):
            raise TypeError(f"acts[{act!r}] must be numbers by parameter; got {values!r:.60}.")
    for name, pieces in (regions or {}).items():
        for ends in pieces:
            if not isinstance(ends, Sequence) or len(ends) != 2:
                raise ValueError(f"regions[{name!r}] must be pairs of ends; got {ends!r:.60}.")
    figure = blank(WIDTH, HEIGHT * len(draws) - 70 * (len(draws) - 1))
    panels = figure.subplots(len(draws), 1, squeeze=False)[:, 0]
    lines = {}
    for axes, (name, values) in zip(panels, draws.items(), strict=True):
        shown = _draw_density(axes, name, _numbers(name, values))
        for i, (act, value) in enumerate(acts.items()):
            if name in value and shown[0] <= value[name] <= shown[1]:
                lines[act] = axes.axvline(value[name], **line_style(i))
        for ends in (regions or {}).get(name, ()):
            low, high = max(shown[0], ends[0]), min(shown[1], ends[1])
            if low < high:
                axes.axvspan(low, high, color=INK, alpha=0.08, linewidth=0)
    if lines:
        legend(figure, {act: lines[act] for act in acts if act in lines})
    return figure


def _numbers(name: str, values: ArrayLike) -> NDArray[np.float64]:
    try:
        return np.asarray(values, dtype=np.float64).ravel()
    except (TypeError, ValueError) as error:
        raise TypeError(f"draws[{name!r}] must hold numbers: {error}.") from error


def _draw_density(axes: Axes, name: str, values: NDArray[np.float64]) -> tuple[float, float]:
    finite = values[np.isfinite(values)]
    if not len(finite):
        raise ValueError(f"draws[{name!r}] must hold finite numbers; got none.")
    low, high = (float(x) for x in np.quantile(finite, [(1 - SHOWN) / 2, (1 + SHOWN) / 2]))
    if low == high:
        low, high = low - 0.5, high + 0.5
    style: dict[str, Any] = {"histtype": "stepfilled", "color": INK, "alpha": 0.22}
    axes.hist(finite, bins=BINS, range=(low, high), density=True, **style)
    axes.set(xlabel=name, yticks=[])
    axes.set_xlim(low, high)
    axes.set_ylabel("density")
    return low, high

"""Weight of a divergence over the trade-offs between precision and recall."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from rkl.plots.style import INK, STYLE, colour, legend, line_style, make_logarithmic, one_panel


@rc_context(STYLE)
def spectrum(
    slopes: ArrayLike,
    weights: Mapping[str, ArrayLike],
    *,
    atoms: Mapping[str, Sequence[tuple[float, float]]] | None = None,
) -> Figure:
    """The weight of each slope in each divergence, the largest being 1; atoms as needles.

    Args:
        slopes: Rising slopes λ of the precision-recall curve; the axis is logarithmic.
        weights: Under each divergence's name its weight at each slope, per octave of λ and as
            a share of the divergence between distributions with disjoint supports.
        atoms: Under a name, slope and weight of its single slopes; they are
            drawn to the height of the largest.
    """
    x = _vector("slopes", slopes)
    if len(x) < 2 or not (np.all(np.diff(x) > 0) and x[0] > 0):
        raise ValueError(f"slopes must be two at least, positive and rising; got {x.tolist()}.")
    if not weights:
        raise ValueError("weights is empty; a figure needs at least one divergence.")
    figure, axes = one_panel()
    lines = {}
    for i, (name, values) in enumerate(weights.items()):
        y = _vector(f"weights[{name!r}]", values)
        if len(y) != len(x):
            raise ValueError(f"weights[{name!r}] must hold {len(x)} values; got {len(y)}.")
        (lines[name],) = axes.plot(x, y / (y.max() or 1.0), **line_style(i))
        needles = list((atoms or {}).get(name, ()))
        highest = max((weight for _, weight in needles), default=1.0)
        for slope, weight in needles:
            axes.plot([slope] * 2, [0, weight / highest], color=colour(i), linewidth=2.4)
            axes.plot([slope], [weight / highest], color=colour(i), marker="o")
    make_logarithmic(axes, "x")
    axes.axvline(1, color=INK, linewidth=0.8, linestyle=":")
    axes.set(ylim=(0, 1.08), ylabel="weight (largest = 1)")
    axes.set_xlabel("recall  ←  slope λ of the curve  →  precision")
    legend(figure, lines)
    return figure


def _vector(argument: str, values: ArrayLike) -> np.ndarray:
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{argument} must hold numbers: {error}.") from None
    if array.ndim != 1 or not array.size or not np.isfinite(array).all():
        raise ValueError(
            f"{argument} must be a vector of finite numbers; got {array.tolist()!r:.60}."
        )
    return array

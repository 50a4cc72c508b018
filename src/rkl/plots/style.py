"""Style of the figures: colours, dashes, sizes, legends and the labels of axes."""

import textwrap
from collections.abc import Mapping
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, MaxNLocator

INK, GRID = "#010101", "#020202"  # stand-ins, replaced by to_svg
# After Okabe and Ito: distinct for the common colour deficiencies, 3:1 or more on white.
PALETTE = ("#0072b2", "#c44e00", "#00805e", "#a8488a", "#8a6d00", "#5b3fb0", "#5f6b76")
DASHES = ("-", (0, (5, 1.6)), (0, (1.2, 1.4)), (0, (6, 1.5, 1.2, 1.5)))
MARKERS = "osD^vP"
WIDTH, HEIGHT = 380, 265  # SVG units, without the legend; a narrow phone shows 0.9 px for each

SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # ships with matplotlib: the layout is the same everywhere
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.labelsize": 11,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "legend.fontsize": 10.5,
    "legend.frameon": False,
    "legend.handlelength": 2.6,
    "text.parse_math": False,  # a dollar in a name is a dollar
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GRID,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
    "errorbar.capsize": 2.0,
}


def one_panel(width: int = WIDTH, height: int = HEIGHT) -> tuple[Figure, Axes]:
    """An empty figure of one panel, and the panel."""
    figure = blank(width, height)
    return figure, figure.subplots()


def blank(width: int, height: int) -> Figure:
    """A figure without panels, in units of an SVG."""
    return Figure(figsize=(width / 72, height / 72), layout="constrained")


def colour(i: int) -> str:
    """Colour of the i-th run."""
    return PALETTE[i % len(PALETTE)]


def line_style(i: int) -> dict[str, Any]:
    """Colour and dash of the i-th run; the pair repeats after 28."""
    return {"color": colour(i), "linestyle": DASHES[i % len(DASHES)]}


def step_axis(axes: Axes) -> None:
    """Name the horizontal axis, and number it sparsely in whole steps."""
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def legend(figure: Figure, lines: Mapping[str, Any]) -> None:
    """The runs' names above the axes, in as many columns as fit."""
    labels = [wrap(name, 44) for name in lines]
    longest = max(len(part) for label in labels for part in label.split("\n"))
    columns = max(1, int(figure.get_figwidth() * 72 / 6.8 / (longest + 8)))  # 8: the line drawn
    rows = -(-sum(1 + label.count("\n") for label in labels) // columns)
    figure.set_figheight(figure.get_figheight() + 15 * rows / 72)
    columns = min(columns, len(labels))
    figure.legend(list(lines.values()), labels, loc="outside upper left", ncols=columns)


def wrap(name: str, width: int) -> str:
    """The name broken into lines that fit the figure; an empty one as a blank."""
    return textwrap.fill(name, width, break_on_hyphens=False) or " "


def make_logarithmic(axes: Axes, which: Literal["x", "y"]) -> None:
    """Make an axis logarithmic, its labels plain text, which an SVG can hold as text."""
    axes.set(**{f"{which}scale": "log"})
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_formatter(_PlainPowers())
    axis.set_minor_formatter(_PlainPowers(minor_thresholds=(1.0, 0.5)))


class _PlainPowers(LogFormatter):
    """Labels of a logarithmic axis: 0.5, 20; powers of ten over more than four decades."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        if not super().__call__(x, pos):  # which ticks deserve a label is matplotlib's business
            return ""
        low, high = sorted(self.axis.get_view_interval()) if self.axis else (x, x)
        if 1e-3 < x < 1e4 and high < 1e4 * low:
            return f"{x:g}"
        mantissa, exponent = f"{x:.0e}".split("e")
        power = "10" + str(int(exponent)).translate(SUPERSCRIPT)
        return power if mantissa == "1" else f"{mantissa}·{power}"

"""A figure as SVG that takes colours and font from the page around it."""

import hashlib
import re
import warnings
from html import escape
from io import StringIO

from matplotlib import rc_context
from matplotlib.figure import Figure

from rkl.plots.style import GRID, INK, PALETTE


def to_svg(figure: Figure, title: str) -> str:
    """The figure as an ``<svg>`` element for a page; the same bytes every time.

    Transparent, as wide as its container between 0.9 and 1.35 of its own width, text in
    the page's own font. Text takes the page's colour; a page may set the variables
    ``--series-1`` to ``--series-7`` and ``--figure-grid``.

    Args:
        figure: A figure of this module.
        title: Title for screen readers.
    """
    buffer = StringIO()
    salt = hashlib.sha256(title.encode()).hexdigest()
    with rc_context({"svg.hashsalt": salt, "svg.fonttype": "none"}), warnings.catch_warnings():
        # text stays text, and the reader's fonts have the glyphs that matplotlib's lacks
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font", UserWarning)
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    width, height = (72 * inches for inches in figure.get_size_inches())
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" '
        f'class="figure" style="--width: {width:g}" stroke-linejoin="round" '
        f'role="img" aria-label="{escape(title)}">\n<title>{escape(title)}</title>'
        + _with_theme_colours(_bare(buffer.getvalue()))
    )


def _bare(svg: str) -> str:
    """The content of matplotlib's ``<svg>`` without its style sheet and unused ids.

    Both would otherwise affect the rest of the page.
    """
    svg = svg[svg.index(">", svg.index("<svg")) + 1 :].replace("xlink:href", "href")
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.S)
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', svg))
    svg = re.sub(r' id="([^"]+)"', lambda match: match[0] if match[1] in used else "", svg)
    return re.sub(r"\n\s*", "\n", svg)


def _with_theme_colours(svg: str) -> str:
    """Replace the stand-in colours and the font by variables of the page."""
    colours = {INK: "currentColor", GRID: "var(--figure-grid, #8886)"}
    colours |= {hue: f"var(--series-{i}, {hue})" for i, hue in enumerate(PALETTE, start=1)}
    svg = re.sub('#[0-9a-f]{6}(?=[;"])', lambda match: colours.get(match[0], match[0]), svg)
    return svg.replace("font-family: 'DejaVu Sans'", "font-family: var(--figure-font, sans-serif)")

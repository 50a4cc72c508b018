"""A report: one self-contained HTML file with figures, tables and generations.

No server, script, font or image from elsewhere: the file's own content security policy forbids
all of them, and everything except our drawings is escaped. It follows the reader's
light or dark scheme, fits a phone and prints.

To add a kind of block, write one frozen dataclass under :class:`Block`.
"""

import abc
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rkl.extras import optional_import
from rkl.runs import Run, write_atomic
from rkl.tables import Table

with optional_import("A report"):
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

if TYPE_CHECKING:
    from rkl.plots import Figure as Drawing

NARROW = 460  # units of an SVG up to which two of them share a row
_jinja = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


class Block(abc.ABC):
    """A part of a section.

    To write one, make a frozen dataclass with

    - ``html``, which renders a template of ``_jinja``, so that its text is escaped;
    - ``__post_init__``, refusing what cannot be shown.
    """

    @abc.abstractmethod
    def html(self, number: int) -> Markup:
        """The block as HTML; ``number`` differs from every other block's on the page."""


@dataclass(frozen=True)
class Figure(Block):
    """A drawing with a caption of one sentence.

    Attributes:
        title: Title of the figure.
        svg: One ``<svg>`` element, as :func:`rkl.plots.to_svg` returns it; not escaped.
        caption: What the reader can see in it.
    """

    title: str
    svg: str
    caption: str = ""

    def __post_init__(self):
        if not isinstance(self.svg, str) or not self.svg.startswith("<svg"):
            raise ValueError(f"svg must be one <svg> element; got {self.svg!r:.42}.")

    def html(self, number: int) -> Markup:
        width = re.search(r'viewBox="[-\d.]+ [-\d.]+ ([\d.]+)', self.svg)
        wide = width is not None and float(width[1]) > NARROW
        return _render(_FIGURE, block=self, wide=wide, svg=Markup(_with_own_ids(self.svg, number)))


@dataclass(frozen=True)
class Generations(Block):
    """Generations of each model after the same prompts, side by side.

    Attributes:
        title: Title of the block.
        prompts: The prompts.
        columns: Under each model's name, one text per prompt.
        caption: What the reader can see in it.
    """

    title: str
    prompts: Sequence[str]
    columns: Mapping[str, Sequence[str]]
    caption: str = ""

    def __post_init__(self):
        for name, texts in self.columns.items():
            if len(texts) != len(self.prompts):
                raise ValueError(
                    f"columns[{name!r}] must hold one text for each of the "
                    f"{len(self.prompts)} prompts; got {len(texts)}."
                )

    def html(self, number: int) -> Markup:
        return _render(_GENERATIONS, block=self)


@dataclass(frozen=True)
class Settings(Block):
    """Settings and versions: names and values, nested mappings laid flat with dots."""

    values: Mapping[str, object]
    title: str = "Settings and versions"

    def html(self, number: int) -> Markup:
        # The list of files in a run.json is left out.
        shown = {k: it for k, it in self.values.items() if k.partition(".")[0] != "files"}
        return _render(_SETTINGS, block=self, items=list(_flat(shown)))


@dataclass(frozen=True)
class Section:
    """A heading, some text (a blank line starts a new paragraph), and blocks and tables."""

    title: str
    text: str = ""
    blocks: Sequence[Block | Table] = ()

    def __post_init__(self):
        for block in self.blocks:
            if not isinstance(block, Block | Table):
                got = type(block).__name__
                raise TypeError(f"blocks must hold Blocks and Tables; got a {got}.")


def figure_block(title: str, drawing: "Drawing", caption: str = "") -> Figure:
    """A figure of :mod:`rkl.plots` as a block, its title read out by screen readers."""
    from rkl.plots import to_svg

    return Figure(title, to_svg(drawing, title), caption)


def render(
    title: str, sections: Sequence[Section], *, lead: str = "", points: Sequence[str] = ()
) -> str:
    """The report as one HTML document; the same input gives the same bytes.

    Args:
        title: Heading of the page.
        sections: Its sections, in order; settings belong into the last one.
        lead: At most three sentences under the heading: what was done, and the result.
        points: A list under them with the other results.
    """
    for section in sections if isinstance(sections, Sequence) else [sections]:
        if not isinstance(section, Section) or section is sections:
            got = type(section).__name__
            raise TypeError(f"sections must be a list of Sections; got a {got}.")
    numbers = iter(range(1, 1 + sum(len(section.blocks) for section in sections)))
    body = [
        (section, _paragraphs(section.text), [_html(b, next(numbers)) for b in section.blocks])
        for section in sections
    ]
    page = _jinja.get_template("report.html")
    return page.render(title=title, lead=lead, points=points, body=body) + "\n"


def write(path: Path, html: str) -> None:
    """Write a rendered report; a reader finds the old file or the new one, never half."""
    is_report_of_run = path.name == "report.html" and (path.parent / "run.json").is_file()
    if is_report_of_run:
        Run.open(path.parent).record_files([path.name])
    write_atomic(path, html)
    if is_report_of_run:
        Run.open(path.parent).measure_files([path.name])


def _html(block: Block | Table, number: int) -> Markup:
    if isinstance(block, Table):
        return _render(_TABLE, table=block, html=Markup(block.to_html()))
    return block.html(number)


def _flat(values: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif isinstance(value, list | tuple):
            yield f"{prefix}{name}", ", ".join(map(str, value))
        else:
            yield f"{prefix}{name}", str(value)


def _paragraphs(text: str) -> list[str]:
    return [part for part in re.split(r"\n\s*\n", text.strip()) if part]


def _with_own_ids(svg: str, number: int) -> str:
    """Make the ids of the drawing unique on the page; drop the name space, for files only."""
    svg = svg.replace(' xmlns="http://www.w3.org/2000/svg"', "", 1)
    return re.sub(r'( id="|href="#|url\(#)', rf"\g<1>figure-{number}-", svg)


def _render(template: str, **values: object) -> Markup:
    return Markup(_jinja.from_string(template).render(values))


_FIGURE = """\
<figure class="card{% if not wide %} narrow{% endif %}">
<h3>{{ block.title }}</h3>
<div class="scroll" tabindex="0" role="region" aria-label="{{ block.title }}">{{ svg }}</div>
{% if block.caption %}
<figcaption>{{ block.caption }}</figcaption>
{% endif %}
</figure>
"""

_TABLE = """\
<figure class="card">
<h3>{{ table.title }}</h3>
<div class="scroll" tabindex="0" role="region" aria-label="{{ table.title }}">
{{ html }}
</div>
{% if table.notes %}
<figcaption>{{ table.notes | join(" ") }}</figcaption>
{% endif %}
</figure>
"""

_GENERATIONS = """\
<figure class="card">
<h3>{{ block.title }}</h3>
{% if block.caption %}
<figcaption>{{ block.caption }}</figcaption>
{% endif %}
{% for prompt in block.prompts %}
{% set row = loop.index0 %}
<article>
<h4>Prompt</h4>
<pre class="prompt">
{{ prompt }}</pre>
<div class="answers">
{% for name, texts in block.columns.items() %}
<div><h4>{{ name }}</h4>
<pre tabindex="0" role="region" aria-label="{{ name }}">
{{ texts[row] }}</pre></div>
{% endfor %}
</div>
</article>
{% endfor %}
</figure>
"""

_SETTINGS = """\
<figure class="card">
<h3>{{ block.title }}</h3>
<dl>
{% for name, value in items %}
<div><dt>{{ name }}</dt><dd>{{ value }}</dd></div>
{% endfor %}
</dl>
</figure>
"""

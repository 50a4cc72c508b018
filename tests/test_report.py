"""Reports: complete, escaped, self-contained and reproducible, read here without a browser."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from rkl import plots, report
from rkl.plots.style import PALETTE
from rkl.report import Figure, Generations, Section, Settings, figure_block, render, write
from rkl.tables import Table, cell_text

HOSTILE = '</pre><script>alert(1)</script>&lt;<img src=x onerror="alert(2)">'
TAME = re.sub(r"\S", "x", HOSTILE)  # breaks into the same lines
VOID = {"meta", "link", "img", "br"}


class Page(HTMLParser):
    """Elements, attributes and text of a page; fails on tags that do not match."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.text, self._open = [], [], "", []
        self.feed(html)
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes.extend(attrs)
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):  # only inside an SVG
        self.tags.append(tag)
        self.attributes.extend(attrs)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data


def bar(name="kl()"):
    return figure_block(
        "Perplexity", plots.bars({name: 1.0}, label="perplexity"), "Lower is better."
    )


def everything(text="plain"):
    """One of each block, with a text of the caller's wherever text may come."""
    blocks = [
        Table(text, [text, "nats"], [[text, (0.1234, 0.004)]], text),
        bar(text),
        Figure(text, bar().svg, text),
        Generations(text, [text], {text: [text]}, text),
        Settings({text: {"seed": 0, "names": [text, "b"]}}, text),
    ]
    return render(text, [Section(text, f"{text}\n\n{text}", blocks), Section("last")], lead=text)


def test_every_block_is_tried_here():
    assert set(report.Block.__subclasses__()) == {Figure, Generations, Settings}


def test_text_is_escaped_wherever_it_comes():
    tame, hostile = Page(everything(TAME)), Page(everything(HOSTILE))
    assert hostile.tags == tame.tags
    assert [name for name, _ in hostile.attributes] == [name for name, _ in tame.attributes]
    assert hostile.text.count(HOSTILE) >= 15


def test_a_report_refers_to_nothing_outside_itself():
    page = Page(everything())
    addresses = [value for name, value in page.attributes if name in {"href", "src", "action"}]
    assert all(address.startswith(("#", "data:")) for address in addresses)
    assert "http" not in everything().replace("http-equiv", "")
    assert not {"script", "iframe", "object", "embed"} & set(page.tags)


def test_the_content_security_policy_allows_styles_and_nothing_else():
    found = re.search(r'Content-Security-Policy"\s+content="([^"]+)"', everything())
    assert found is not None
    assert found[1] == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def test_a_report_is_the_same_bytes_every_time():
    assert everything() == everything()


def test_ids_are_unique_even_when_a_drawing_comes_twice():
    html = render("Twice", [Section("Figures", blocks=[bar(), bar()])])
    ids = re.findall(r' id="([^"]+)"', html)
    referred = set(re.findall(r'(?:href="|url\()#([^")]+)', html))
    assert len(set(ids)) == len(ids)
    assert referred <= set(ids)


def test_a_page_of_several_sections_links_to_each():
    html = render("Long", [Section("One"), Section("Two")])
    assert '<a href="#section-2">Two</a>' in html
    assert '<section id="section-2">' in html
    assert "<nav" not in render("Short", [Section("One")])


def test_a_blank_line_starts_a_paragraph():
    assert render("", [Section("", "one\ntwo\n\nthree")]).count("<p>") == 2


def test_a_caption_stands_under_its_figure():
    html = render("", [Section("", blocks=[bar()])])
    assert html.index("</svg>") < html.index("<figcaption>Lower is better.</figcaption>")


def test_wide_drawings_take_a_row_of_their_own():
    wide = plots.head_tail_by_step([0, 1], {"a": ([1, 0.5], [1, 0.2])})
    assert 'class="card narrow"' in bar().html(1)
    assert 'class="card narrow"' not in figure_block("Gaps", wide).html(1)


def test_generations_keep_their_line_breaks():
    """HTML drops a line break right after <pre>; the one that the model wrote must stay."""
    html = Generations("", ["a"], {"kl()": ["\n\n  x\n"]}).html(1)
    assert ">\n\n\n  x\n</pre>" in html


def test_nested_settings_are_laid_flat():
    html = Settings({"versions": {"torch": "2.13.0"}, "students": ["a", "b"]}).html(1)
    assert "<dt>versions.torch</dt><dd>2.13.0</dd>" in html
    assert "<dt>students</dt><dd>a, b</dd>" in html


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        ((0.12345, 0.0042), "0.123 ± 0.004"),
        ((0.12345, 0.00142), "0.1235 ± 0.0014"),
        ((0.12345, 0.00099), "0.1235 ± 0.0010"),
        ((12.3, 0.16), "12.30 ± 0.16"),
        ((1234.5, 23.0), "1,234 ± 23"),
        ((-0.5, 0.2), "−0.5 ± 0.2"),
        ((0.5, 0.0), "0.5"),
        ((0.5, float("nan")), "0.5 ± ?"),
        ((float("inf"), float("nan")), "∞"),
        (float("-inf"), "−∞"),
        (float("nan"), "undefined"),
        (0.123456, "0.1235"),
        (123456.7, "123,457"),
        (-12, "−12"),
        (151_936, "151,936"),
        (True, "yes"),
        (None, "–"),
        ("kl()", "kl()"),
    ],
)
def test_a_cell_is_written_to_the_digits_that_mean_something(cell, text):
    assert cell_text(cell, plus_minus=True) == text


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Table("t", ["a", "b"], [[1, 2], [3]]), r"rows\[1\] must hold.*2.*got 1"),
        (lambda: Generations("t", ["a"], {"kl()": []}), r"columns\['kl\(\)'\].*1 prompts; got 0"),
        (lambda: Figure("t", "<script>"), "svg must be one <svg> element; got '<script>'"),
    ],
)
def test_what_cannot_be_shown_is_refused_with_its_name(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_writing_replaces_the_report_and_leaves_no_other_file(tmp_path):
    for title in ("first", "second"):
        write(tmp_path / "report.html", render(title, []))
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert "<h1>second</h1>" in (tmp_path / "report.html").read_text(encoding="utf-8")


def luminance(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a, b):
    low, high = sorted(map(luminance, (a, b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_lines_stand_out_from_the_page(scheme):
    """WCAG 2.2: 4.5 for text (1.4.3), 3 for what a figure is read by (1.4.11)."""
    style = Path(report.__file__).with_name("report.html").read_text(encoding="utf-8")
    light, dark = style.split("@media screen and (prefers-color-scheme: dark)")
    part = light if scheme == "light" else dark[: dark.index("* {")]
    colour = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", part))
    series = [v for k, v in colour.items() if k.startswith("series")] or PALETTE
    assert len(series) == len(PALETTE)
    assert min(contrast(line, colour["card"]) for line in series) >= 3
    for name in ("ink", "quiet", "accent"):
        assert min(contrast(colour[name], colour[back]) for back in ("card", "page")) >= 4.5


def test_a_number_with_a_mark_stands_among_numbers_and_words_to_the_left():
    table = Table("t", ["at", "x", "said"], [["a", (1.5, 0.3, "*"), "b"], ["c", (2.5, 0.3), 4]])
    html = table.to_html()
    assert "<td>1.5 ± 0.3*</td>" in html
    assert '<th scope="col">x</th>' in html
    assert '<th scope="col" class="text">said</th>' in html
    assert '<td class="text">4</td>' in html
    with pytest.raises(ValueError, match="which may have a mark"):
        Table("t", ["x"], [[(1.5, 0.3, 2)]])  # pyright: ignore[reportArgumentType]

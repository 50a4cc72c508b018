"""First hours: the reader of notebooks, and what every notebook prints as a plain script."""

import importlib
import re
import sys
from pathlib import Path

import pytest
from test_docs import anchors, run

ROOT = Path(__file__).parents[1]
SITE = ROOT / "docs" / "site"
HOURS = sorted((ROOT / "examples" / "first_hour").glob("*.py"))
every_hour = pytest.mark.parametrize("hour", HOURS, ids=lambda path: path.stem)

sys.path.insert(0, str(SITE))
notebooks = importlib.import_module("notebooks")
make_site = importlib.import_module("make_site")
sys.path.remove(str(SITE))

TITLE = "# %% [markdown]\n# # Title\n"


def written(folder, source):
    """A notebook with a title and these cells."""
    path = folder / "book.py"
    path.write_text(TITLE + source, "utf-8")
    return path


def test_cells_have_kind_text_line_and_caption():
    source = TITLE + "#\n# Text.\n\n# %%\nx = 1\n\n\n# %% A caption\ny = 2\n"
    text, first, second = notebooks.parse(source)
    assert text == notebooks.Cell(False, "# Title\n\nText.", 2)
    assert first == notebooks.Cell(True, "x = 1", 7)
    assert second == notebooks.Cell(True, "y = 2", 11, "A caption")


def test_a_line_of_code_below_text_is_refused():
    with pytest.raises(notebooks.NotebookError, match=r"line 3: text must begin .* got \'x = 1\'"):
        notebooks.parse(TITLE + "x = 1\n")


@pytest.mark.parametrize("source", ["", "x = 1\n", "# %%\nx = 1\n", '"""Text."""\n' + TITLE])
def test_a_notebook_without_a_title_is_refused(source):
    with pytest.raises(
        notebooks.NotebookError, match=r"line 1: a notebook must begin with .*TITLE"
    ):
        notebooks.parse(source)


def test_output_is_what_a_cell_prints_and_its_last_expression(tmp_path):
    source = "# %%\nx = 2\nprint('two')\nx + 1\n# %%\nx += 5\n# %%\nprint(x)\nNone\n"
    first, second, third = notebooks.execute(written(tmp_path, source))
    assert first == {"printed": "two\n", "value": "3"}
    assert second == {"printed": ""}
    assert third == {"printed": "7\n"}


def test_names_of_a_notebook_are_those_of_main(tmp_path):
    source = (
        "# %%\nimport sys\nfrom dataclasses import dataclass\nfrom pathlib import Path\n"
        "@dataclass\nclass A:\n    x: 'int'\n\n"
        "sys.modules[A.__module__].A is A, A.__module__, Path(__file__).name, [*Path().iterdir()]"
    )
    (output,) = notebooks.execute(written(tmp_path, source))
    assert output["value"] == "(True, '__main__', 'book.py', [])"


def test_an_error_names_file_cell_and_line(tmp_path):
    path = written(tmp_path, "# %%\nx = 1\n# %%\nx = 2\nx / 0\n")
    fault = r"book\.py, code cell 2 \(line 6\): ZeroDivisionError: division by zero\n.*line 7"
    with pytest.raises(notebooks.NotebookError, match=fault):
        notebooks.execute(path)


@pytest.mark.parametrize(
    ("cell", "fault"),
    [
        ("x = (\n", "SyntaxError"),
        ("import sys\nsys.exit('enough')\n", "SystemExit: enough"),
        ("import os\nos._exit(3)\n", r"book\.py ended with status 3"),
        ("import os\nos._exit(0)\n", r"book\.py ended with status 0"),
    ],
)
def test_whatever_ends_a_notebook_early_is_an_error(tmp_path, cell, fault):
    with pytest.raises(notebooks.NotebookError, match=fault):
        notebooks.execute(written(tmp_path, "# %%\n" + cell))


PYPLOT = "from matplotlib import pyplot as plt\nfigure, axes = plt.subplots()\naxes.plot([1, 2])\n"
BARS = PYPLOT + "axes.bar([1], [2], yerr=[1])\n"  # whose errors are black by default
OURS = "import rkl\nfrom rkl import plots\nfigure = plots.bars({'a': 1.0}, label='b')\nfigure\n"


@pytest.mark.parametrize("code", [BARS, PYPLOT + "figure\n", OURS], ids=["bars", "both", "rkl"])
def test_a_figure_is_drawn_in_the_colours_of_the_page(tmp_path, code):
    drawn, after = notebooks.execute(written(tmp_path, f"# %% One line\n{code}\n# %%\n1 + 1\n"))
    assert drawn["figure"].count("<svg ") == 1
    assert "<title>One line</title>" in drawn["figure"]
    assert "currentColor" in drawn["figure"]
    assert "var(--series-1" in drawn["figure"]
    assert "#000000" not in drawn["figure"]
    assert after == {"printed": "", "value": "2"}


@pytest.mark.parametrize(
    ("cell", "fault"),
    [
        ("# %%\n" + PYPLOT, "a cell with a figure must have a caption"),
        ("# %% Two\n" + PYPLOT + "plt.subplots()\n", "must draw one figure at most; got 2"),
    ],
)
def test_a_figure_has_a_caption_and_a_cell(tmp_path, cell, fault):
    with pytest.raises(notebooks.NotebookError, match=fault):
        notebooks.execute(written(tmp_path, cell))


def test_a_value_with_html_is_shown_by_it(tmp_path):
    source = "# %%\nclass A:\n    def _repr_html_(self):\n        return '<b>a</b>'\n\nA()\n"
    (output,) = notebooks.execute(written(tmp_path, source))
    assert output == {"printed": "", "html": "<b>a</b>"}


def test_the_page_has_text_code_and_output_in_order():
    source = (
        TITLE + "#\n# See [fit](fit.py).\n\n# %% A caption\nf('```')\n# %% [markdown]\n# End.\n"
    )
    outputs = [{"printed": "out\n", "value": "3", "html": "<b>a</b>", "figure": "<svg />"}]
    page = notebooks.page(source, outputs, "book")
    places = [
        page.index(it)
        for it in (
            "# Title\n",
            "{download}`book.py`",
            "See [fit](first-hour-fit.md).",
            "````python\nf('```')\n````",
            "```{code-block} text\n:class: output\n\nout\n3\n```",
            '```{raw} html\n<div class="output"><b>a</b></div>\n```',
            '```{raw} html\n<div class="drawing"><svg /></div>\n```',
            ":::{div} caption\nA caption\n:::",
            "End.",
        )
    ]
    assert places == sorted(places)


def test_links_to_a_notebook_lead_to_its_page():
    text = (
        "[a](examples/first_hour/fit.py), [b](../examples/first_hour/fit.py), [c](examples/a.py)"
    )
    assert make_site.NOTEBOOK.sub(r"\1first-hour-\2.md)", text) == (
        "[a](examples/first_hour/first-hour-fit.md), "
        "[b](../examples/first_hour/first-hour-fit.md), [c](examples/a.py)"
    )


def test_the_index_and_the_examples_list_every_notebook(tmp_path):
    index = make_site.with_first_hours("FIRST HOURS\n")
    make_site.write_examples(tmp_path)
    examples = (tmp_path / "reference" / "examples.md").read_text("utf-8")
    for hour in HOURS:
        assert f"examples/first_hour/first-hour-{hour.stem}\n" in index
        assert f"(../examples/first_hour/first-hour-{hour.stem}.md)" in examples


@every_hour
def test_links_of_a_notebook_lead_somewhere(hour):
    text = "\n".join(it.text for it in notebooks.parse(hour.read_text("utf-8")) if not it.is_code)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        assert path.startswith("http") or (hour.parent / path).exists(), target
        assert not anchor or anchor in anchors((hour.parent / path).resolve()), target


def printed(hour, folder):
    """What a notebook prints as a plain script in a folder of its own."""
    return run(ROOT / "examples" / "first_hour" / f"{hour}.py", cwd=folder)


def means(text):
    """Every value with its error: (value, error)."""
    return [(float(a), float(b)) for a, b in re.findall(r"(-?\d+\.\d+) ± (\d+\.\d+)", text)]


def test_a_hamiltonian_of_ones_own_gets_log_z_and_averages_within_their_errors(tmp_path):
    text = printed("sample", tmp_path)
    rows = re.findall(r"(-?\d+\.\d+) ± (\d\.\d+) +(-?\d+\.\d+) +-?\d+\.\d+$", text, re.M)
    assert len(rows) == 5
    for value, error, exact in (map(float, row) for row in rows):
        assert 0 < error < 0.1
        assert abs(value - exact) < 4 * error + 0.002  # both are rounded to 0.001
    assert "covers the target: True" in text
    energy, error = means(re.search(r"^energy .*", text, re.M)[0])[0]
    exact = float(re.search(r"exact energy (\d\.\d+)", text)[1])
    assert 0 < error < 0.05
    assert abs(energy - exact) < 4 * error + 0.0002
    assert {"ring.png", "chains.npz"} <= {path.name for path in tmp_path.iterdir()}


def test_a_student_is_nearer_in_the_direction_that_it_minimised(tmp_path):
    """Nearer than half the difference that three seeds gave, 1.84 to 1.88 against 1.55 to 1.58."""
    text = printed("distil", tmp_path)
    losses = re.findall(r"(\d\.\d+) to (\d\.\d+) nats per token", text)
    assert len(losses) == 4
    assert all(float(last) < float(first) / 2 for first, last in losses)
    table = {line.split()[0]: means(line) for line in text.splitlines() if line.count("±") == 4}
    assert list(table) == ["forward", "reverse", "akl", "gkd"]
    assert table["forward"][0] < table["reverse"][0]
    ratios = [float(it) for it in re.findall(r"reverse KL is (\d\.\d+) times", text)]
    assert ratios[0] > ratios[1] + 0.13
    for _, _, acceptance, perplexity in table.values():
        assert 0.75 < acceptance[0] < 1
        assert 1 < perplexity[0] < 1.5
    for name in ("forward", "teacher"):
        assert (tmp_path / name / "model.safetensors").exists()

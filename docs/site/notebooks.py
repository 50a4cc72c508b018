"""First hours: notebooks kept as plain Python, executed, and shown as pages with their output.

    python docs/site/notebooks.py NOTEBOOK OUTPUTS.json

A notebook is a script in percent format: ``# %% [markdown]`` opens a cell of text, whose lines
begin with ``# ``, and ``# %%`` a cell of code. What follows ``# %%`` on its line is the caption of
the figure that the cell draws. Each notebook is executed in a process and a folder of its own.
"""

import ast
import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import traceback
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path("examples") / "first_hour"
ORDER = ("distil", "sample", "fit", "estimate")  # of the systems in README
MARK = re.compile(r"# %%(?P<markdown> \[markdown\])?(?: (?P<caption>.*))?")


@dataclass(frozen=True)
class Cell:
    """A cell: its kind, its text without the marks, the number of its first line, its caption."""

    is_code: bool
    text: str
    line: int
    caption: str = ""


class NotebookError(Exception):
    """A notebook that cannot be read, or a cell that failed."""


def parse(source: str) -> list[Cell]:
    """The cells of a notebook in percent format.

    Raises:
        NotebookError: The notebook does not begin with a cell of text and its title, or a line of
            text has no ``# ``.

    >>> [cell.text for cell in parse("# %% [markdown]\\n# # Title\\n\\n# %%\\n1 + 1\\n")]
    ['# Title', '1 + 1']
    """
    if not source.startswith("# %% [markdown]\n# # "):
        raise NotebookError(
            'line 1: a notebook must begin with "# %% [markdown]" and "# # TITLE".'
        )
    lines = source.splitlines()
    marks = [number for number, line in enumerate(lines) if MARK.fullmatch(line)]
    ends = [*marks[1:], len(lines)]
    return [_cell(lines, start, end) for start, end in zip(marks, ends, strict=True)]


def _cell(lines: list[str], start: int, end: int) -> Cell:
    mark = MARK.fullmatch(lines[start])
    assert mark
    first, caption = start + 2, mark["caption"] or ""  # lines are counted from 1
    body = "\n".join(lines[start + 1 : end]).rstrip()
    if not mark["markdown"]:
        return Cell(True, body, first, caption)
    for number, line in enumerate(body.splitlines(), first):
        if line != "#" and not line.startswith("# "):
            raise NotebookError(f'line {number}: text must begin with "# "; got {line!r}.')
    return Cell(False, re.sub(r"^# ?", "", body, flags=re.M), first, caption)


def run_cells(path: Path) -> list[dict[str, str]]:
    """Execute the cells of code here, as ``__main__``, and return what each printed and drew.

    Raises:
        NotebookError: A cell failed; the message names the file, the cell and the error.
    """
    _style_figures()
    module = types.ModuleType("__main__")
    module.__file__ = str(path)
    sys.modules["__main__"] = module  # where dataclasses and rkl look names of the notebook up
    sys.path[0] = str(path.parent)
    outputs = []
    codes = [cell for cell in parse(path.read_text("utf-8")) if cell.is_code]
    for number, cell in enumerate(codes, 1):
        try:
            outputs.append(_run_cell(cell, path, vars(module)))
        except (Exception, SystemExit) as error:
            raise NotebookError(
                f"{path.name}, code cell {number} (line {cell.line}): "
                f"{type(error).__name__}: {error}\n{_notebook_frames(error, path)}"
            ) from None
    return outputs


def _run_cell(cell: Cell, path: Path, names: dict[str, Any]) -> dict[str, str]:
    tree = ast.parse("\n" * (cell.line - 1) + cell.text, str(path))
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    printed, value = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, str(path), "exec"), names)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), str(path), "eval"), names)
    return {"printed": printed.getvalue()} | _shown(value, cell.caption)


def _shown(value: Any, caption: str) -> dict[str, str]:
    """The value of the last expression, and the figure, which is that value or pyplot's."""
    from matplotlib import pyplot
    from matplotlib.figure import Figure

    from rkl.plots import to_svg

    figures = [value] if isinstance(value, Figure) else []
    figures += [it for it in map(pyplot.figure, pyplot.get_fignums()) if it not in figures]
    pyplot.close("all")
    if len(figures) > 1:
        raise ValueError(f"a cell must draw one figure at most; got {len(figures)}")
    if figures and not caption:
        raise ValueError('a cell with a figure must have a caption, "# %% CAPTION"')
    if figures:
        svg = to_svg(figures[0], caption)
        return {"figure": svg.replace("#000000", "currentColor")}  # black is unseen on dark pages
    if hasattr(value, "_repr_html_"):
        return {"html": value._repr_html_()}
    return {} if value is None else {"value": repr(value)}


def _style_figures() -> None:
    """Give figures of matplotlib the style of rkl's, whose colours follow the page's."""
    from matplotlib import rcParams, use
    from matplotlib.rcsetup import cycler

    from rkl.plots import style

    use("agg")
    rcParams.update(style.STYLE)
    rcParams["figure.constrained_layout.use"] = True
    rcParams["figure.figsize"] = style.WIDTH / 72, style.HEIGHT / 72
    rcParams["axes.prop_cycle"] = cycler(color=style.PALETTE)


def _notebook_frames(error: BaseException, path: Path) -> str:
    """The traceback from the notebook's own line on."""
    frames = traceback.extract_tb(error.__traceback__)
    first = next((i for i, it in enumerate(frames) if it.filename == str(path)), 0)
    return "".join(traceback.format_list(frames[first:]))


def execute(path: Path) -> list[dict[str, str]]:
    """Execute a notebook in a process and a temporary folder of its own; the outputs by cell.

    Raises:
        NotebookError: A cell failed, or the process ended before it wrote the outputs.
    """
    with tempfile.TemporaryDirectory() as folder:
        place, written = Path(folder, "work"), Path(folder, "outputs.json")
        place.mkdir()
        ended = subprocess.run(
            [sys.executable, str(Path(__file__).resolve()), str(path.resolve()), str(written)],
            cwd=place,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if ended.returncode or not written.exists():
            raise NotebookError(
                ended.stderr.strip() or f"{path.name} ended with status {ended.returncode}"
            )
        return json.loads(written.read_text("utf-8"))


def page(source: str, outputs: list[dict[str, str]], name: str) -> str:
    """The page of a notebook in MyST, with the outputs below their cells."""
    rest, parts = iter(outputs), []
    for cell in parse(source):
        if not cell.is_code:
            parts.append(re.sub(r"\]\((\w+)\.py\)", r"](first-hour-\1.md)", cell.text))
            continue
        parts.append(_fenced("python", cell.text))
        parts += _output(next(rest), cell.caption)
    title, _, text = parts[0].partition("\n")
    about = (
        f"\n:::{{div}} trail\nThis page is {{download}}`{name}.py`, executed when the site was "
        f"built. `python {name}.py` runs it; VS Code, and Jupyter with Jupytext, open it as a "
        "notebook.\n:::\n"
    )
    return "\n\n".join([f"{title}\n{about}\n{text}", *parts[1:]]) + "\n"


def _output(output: dict[str, str], caption: str) -> list[str]:
    text = output.get("printed", "") + output.get("value", "")
    parts = [_fenced("{code-block} text", text.rstrip(), ":class: output\n\n")] if text else []
    if html := output.get("html"):
        parts.append(_fenced("{raw} html", f'<div class="output">{html}</div>'))
    if svg := output.get("figure"):
        parts.append(_fenced("{raw} html", f'<div class="drawing">{svg}</div>'))
        parts.append(f":::{{div}} caption\n{caption}\n:::")
    return parts


def _fenced(kind: str, text: str, options: str = "") -> str:
    """A fence longer than any run of backticks within."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{kind}\n{options}{text}\n{fence}"


def notebooks() -> list[Path]:
    """The notebooks of the repository, in the order of the systems."""
    found = sorted((ROOT / FOLDER).glob("*.py"))
    return sorted(found, key=lambda path: (*ORDER, path.stem).index(path.stem))


def title_of(path: Path) -> str:
    """The title of a notebook, its first heading."""
    return parse(path.read_text("utf-8"))[0].text.partition("\n")[0].removeprefix("# ")


def write_notebooks(source: Path, write: Callable[[Path, str], None]) -> None:
    """Execute the notebooks, two at a time, and write their pages beside their copies."""
    paths = notebooks()
    with ThreadPoolExecutor(2) as pool:
        for path, outputs in zip(paths, pool.map(execute, paths), strict=True):
            text = page(path.read_text("utf-8"), outputs, path.stem)
            write(source / FOLDER / f"first-hour-{path.stem}.md", text)


def main(notebook: str, outputs: str) -> None:
    """Execute one notebook here and write its outputs."""
    try:
        found = run_cells(Path(notebook))
    except NotebookError as error:
        sys.exit(str(error))
    Path(outputs).write_text(json.dumps(found), "utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])

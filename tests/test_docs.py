"""The pages say what is so: their table, links, commands and examples."""

import contextlib
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from patience import HANGS

from rkl import cli
from rkl.distill.models.scratch import Shape, new_model, new_tokenizer

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


def text_of(page):
    return page.read_text("utf-8")


def commands(page, kinds):
    """The lines of a page's blocks of such kinds that call rkl, as words."""
    blocks = (body for kind, body in FENCE.findall(text_of(page)) if kind in kinds)
    lines = (line for body in blocks for line in body.splitlines())
    return [shlex.split(line)[1:] for line in lines if line.startswith("rkl ")]


def run(*words, cwd=ROOT, **environment):
    """What a program prints, once it has ended well; its warnings are errors."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    ended = subprocess.run(
        [sys.executable, "-W", "error", *map(str, words)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=HANGS,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def anchors(page):
    """The anchors that headings get where Markdown is shown."""
    headings = re.findall(r"^#+ (.*)$", text_of(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_of_the_divergences_is_that_of_the_catalogue():
    table = script("table")
    written = table.between(text_of(ROOT / "docs" / "figures.md"))
    assert written == table.table(written), "python docs/table.py brings it up to date"
    assert not re.findall(r"\|  \|$", written, re.M), "say when to take it"


def test_the_tables_of_the_language_study_are_those_of_its_csv():
    tables = script("akl_tables")
    written = tables.PAGE.read_text(encoding="utf-8")
    assert len(tables.MARKED.findall(written)) >= 5
    assert written == tables.filled(written), "python docs/akl_tables.py brings it up to date"


def test_a_divergence_that_is_new_gets_a_row():
    table = script("table")
    rows = table.between(text_of(ROOT / "docs" / "figures.md")).splitlines()
    without = "\n".join(row for row in rows if not row.startswith("| `kl`"))
    (added,) = set(table.table(without).splitlines()) - set(rows)
    assert added.startswith("| `kl` `forward-kl` `fkl` |")
    assert added.endswith("| scale-free |  |")


@every_page
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        assert place.exists(), target
        assert not anchor or anchor in anchors(place), target


@every_page
def test_commands_and_their_flags_exist(page, capsys):
    for command, *rest in commands(page, {"sh", "text"}):
        assert command in cli.available()
        with contextlib.suppress(SystemExit):
            cli.main([command, "--help"])  # of a verb on a run, the flags of every kind of run
        known = set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out))
        assert {word for word in rest if word.startswith("--")} <= known, command


def test_contributing_shows_the_example():
    shown = text_of(ROOT / "CONTRIBUTING.md").split("<!-- from examples/new_divergence.py -->")[1]
    _, code = FENCE.findall(shown)[0]
    assert code in text_of(ROOT / "examples" / "new_divergence.py")


def test_the_picture_is_small_and_there():
    assert 0 < (ROOT / "docs" / "images" / "one-bump.png").stat().st_size < 150_000


def test_a_new_divergence_obeys_the_laws_and_reaches_the_command_line():
    assert "TriangularDiscrimination() = 0.3810" in run("examples/new_divergence.py")
    named = "new_divergence:TriangularDiscrimination"
    told = run("-m", "rkl.cli", "divergences", named, PYTHONPATH=str(ROOT / "examples"))
    assert told.startswith("TriangularDiscrimination()")


def test_the_example_distils(tmp_path):
    printed = run("examples/distil.py", tmp_path / "run")
    before, after = map(float, re.findall(r"(\d\.\d+) (?:nats|after)", printed))
    assert after < before
    assert (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.slow
def test_the_estimators_agree():
    """Within four standard errors; the bound within 5 % below, for its score is quadratic."""
    printed = run("examples/estimators.py")
    value = float(re.findall(r"exact +(\d\.\d+)", printed)[0])
    sampled = re.findall(r"from [pq] +(\d\.\d+) ± (\d\.\d+)", printed)
    assert len(sampled) == 2
    for mean, error in sampled:
        assert abs(float(mean) - value) < 4 * float(error)
    bound = float(re.findall(r"alone +(\d\.\d+)", printed)[0])
    assert 0.95 * value < bound < 1.05 * value


@pytest.mark.slow
def test_the_picture_can_be_drawn_again(tmp_path):
    printed = run("docs/images/one_bump.py", tmp_path / "drawn.png")
    widths = [float(it) for it in re.findall(r"width (\d\.\d+)", printed)]
    assert widths == pytest.approx([2.25, 0.83, 0.50, 0.50], abs=0.02)
    assert (tmp_path / "drawn.png").stat().st_size > 10_000


@pytest.fixture
def demonstrated(tmp_path):
    """What rkl demo leaves, made of models that have learned nothing."""
    place = tmp_path / "runs" / "demo"
    texts = ["\n\n".join(f"Item {i}: {i} and {i + k}." for i in range(300)) for k in range(4)]
    tokenizer = new_tokenizer(texts, 300)
    for seed, (name, layers) in enumerate({"teacher": 4, "start": 2}.items()):
        new_model(tokenizer, Shape(layers, 32), seed=seed).save_pretrained(place / name)
        tokenizer.save_pretrained(place / name)
    (place / "data").mkdir()
    rows = [json.dumps({"text": text}) + "\n" for text in texts]
    (place / "data" / "train.jsonl").write_text("".join(rows[:3]), "utf-8")
    (place / "data" / "held-out.jsonl").write_text(rows[3], "utf-8")
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/distill.md"])
def test_commands_run_in_the_order_of_the_page(page, demonstrated):
    done = [run("-m", "rkl.cli", *it, cwd=demonstrated) for it in commands(ROOT / page, {"sh"})]
    assert len(done) >= 5
    assert all(done)

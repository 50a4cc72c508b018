"""The page on estimating and the examples beside it do what they say."""

import doctest
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from patience import HANGS

from rkl import cli
from rkl.bayes import read_draws

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "estimate.md").read_text("utf-8")
pytestmark = pytest.mark.slow


def blocks(kind):
    return re.findall(rf"^```{kind}\n(.*?)^```$", PAGE, re.M | re.S)


@pytest.fixture(scope="module")
def folder():
    """Where the first block of the page has written a file of draws."""
    names = {}
    for example in doctest.DocTestParser().get_examples(blocks("python")[0]):
        exec(example.source, names)  # noqa: S102
    return names["folder"]


def values(text):
    """The numbers of each line by its first word, without their Monte Carlo errors."""
    lines = (line.split(maxsplit=1) for line in text.splitlines() if " " in line)
    found = {first: re.findall(r"\d[\d.]*(?=$|\(|\s)", rest) for first, rest in lines}
    return {first: numbers for first, numbers in found.items() if numbers}


def test_the_first_command_prints_what_the_page_shows(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    assert cli.main(shlex.split(blocks("sh")[0])[1:]) == 0
    printed = capsys.readouterr().out.split("\n\n")
    for shown, part in zip(blocks("text")[0].split("\n\n"), printed, strict=False):
        for word, numbers in values(shown).items():
            found = [float(it) for it in values(part)[word]]
            assert found == pytest.approx([float(it) for it in numbers], rel=0.02), word


def test_the_commands_run_in_the_order_of_the_page(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    for line in "".join(blocks("sh")).splitlines():
        assert cli.main(shlex.split(line)[1:]) == 0
        assert capsys.readouterr().out
    assert {it.name for it in (folder / "runs").iterdir()} == {"reverse", "forward", "both.html"}


def run(*words):
    ended = subprocess.run(
        [sys.executable, "-W", "error", *map(str, words)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=HANGS,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_eight_schools_are_written_and_a_ninth_depends_on_its_test(tmp_path):
    printed = run("examples/eight_schools.py", tmp_path / "schools.nc")
    tau = [float(it) for it in re.findall(r"^tau +(\d\.\d+)\(", printed, re.M)]
    # sqrt(1/E[1/(tau² + error²)] - error²) by quadrature, and four Monte Carlo errors
    assert tau == pytest.approx([1.699, 3.963, 4.457], abs=0.24)
    assert read_draws(tmp_path / "schools.nc").shape("theta") == (8,)


def test_the_regression_says_which_column_costs_least(tmp_path):
    printed = run("examples/regression.py")
    excess = dict(re.findall(r"^without (\w+) +\S+ +(\d+\.\d+)\(", printed, re.M))
    assert sorted(excess, key=lambda name: float(excess[name])) == ["noise", "dose", "age"]

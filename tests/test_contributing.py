"""CONTRIBUTING names every marker, every make target and every part of the house that there is."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
ELSEWHERE = {"demo", "clean"}  # targets for users, and for nobody


def test_every_marker_of_the_tests_is_explained():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["pytest"]
    markers = {line.partition(":")[0] for line in settings["ini_options"]["markers"]}
    explained = set(re.findall(r"^\| `[^`]*-m (\w+)", CONTRIBUTING, re.MULTILINE))
    assert explained == markers


def test_every_make_target_is_named():
    makefile = (ROOT / "Makefile").read_text("utf-8")
    targets = set(re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[1].split())
    named = set(re.findall(r"`make ([\w-]+)", CONTRIBUTING))
    assert named == targets - ELSEWHERE


def test_every_part_of_the_house_stands_in_its_picture():
    picture = re.search(r"## Who imports whom\n\n```\n(.*?)```", CONTRIBUTING, re.DOTALL)[1]
    parts = set(re.findall(r"\w+", picture))
    found = {it.name.removesuffix(".py") for it in (ROOT / "src" / "rkl").iterdir()}
    hidden = {"__init__", "__init__.pyi", "__main__", "__pycache__", "report.html"}
    assert found - hidden - {"py.typed"} <= parts

"""Documentation and examples import what is public, and nothing else."""

import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
WINGS = "bayes", "distill", "fit", "flows", "metrics", "plots", "sample", "stats", "testing"
PUBLIC = {"rkl", *(f"rkl.{wing}" for wing in WINGS)}
PAGES = sorted([*ROOT.glob("docs/*.md"), *ROOT.glob("*.md"), *ROOT.glob("examples/**/*.py")])


def code_of(text, is_python):
    """The statements of a page: of a program, of its doctests, or of its blocks of Python."""
    if is_python:
        return [text]
    blocks = re.findall(r"^```(?:py|python)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = re.findall(r"^ *(?:>>>|\.\.\.) ?(.*)$", text, re.MULTILINE)
    return [*(block for block in blocks if ">>>" not in block), "\n".join(lines)]


def private_imports(source):
    """What a source imports of rkl that no package lists, by their full names."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (it.name for it in node.names if part_of_rkl(it.name) - PUBLIC)
        elif isinstance(node, ast.ImportFrom) and part_of_rkl(node.module or ""):
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                if name in PUBLIC or node.module in PUBLIC and is_listed(node.module, alias.name):
                    continue
                yield name


def part_of_rkl(module):
    return {module} if module.partition(".")[0] == "rkl" else set()


def is_listed(package, name):
    return name in getattr(importlib.import_module(package), "__all__", ())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_and_examples_import_public_names_alone(page):
    text = page.read_text("utf-8")
    found = [
        name for code in code_of(text, page.suffix == ".py") for name in private_imports(code)
    ]
    assert found == []


@pytest.mark.parametrize(
    ("source", "private"),
    [
        ("import rkl", []),
        ("from rkl import KL, exact", []),
        ("from rkl.fit import fit_to_samples", []),
        ("from rkl import fit", []),
        ("import rkl.fit", []),
        ("from rkl.fit.data import read_data", ["rkl.fit.data.read_data"]),
        ("import rkl.fit.data", ["rkl.fit.data"]),
        ("from rkl.fit import data", ["rkl.fit.data"]),
        ("from rkl import runs", ["rkl.runs"]),
        ("from torch import nn", []),
    ],
)
def test_a_name_that_no_package_lists_is_noticed(source, private):
    assert list(private_imports(source)) == private

"""Who may import whom: a wing sees the core and never another wing."""

import ast
import importlib
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import house
import pytest

rkl: Any = importlib.import_module("rkl")  # with what its stub does not list
SOURCE = Path(rkl.__file__).parent
MODULES = {
    ".".join(["rkl", *path.relative_to(SOURCE).with_suffix("").parts]).removesuffix(".__init__"): (
        path
    )
    for path in sorted(SOURCE.rglob("*.py"))
}

CORE = {
    "checks": set(),
    "importing": set(),
    "names": {"importing"},
    "divergences": {"checks", "importing", "names"},
    "kernels": {"divergences", "checks"},
    "estimators": {"divergences", "kernels", "checks"},
    "testing": {"divergences", "kernels", "estimators", "checks"},
    "stats": {"checks", "lazy", "tables"},
    "metrics": {"lazy", "divergences", "estimators", "stats", "tables", "readers", "checks"},
}
# Parts that any other may use, and that use nothing of rkl but what stands here.
ALONE = {
    "extras": set(),
    "lazy": {"extras"},
    "text": set(),
    "randomness": {"checks"},
    "readers": {"checks", "extras"},
    "tables": {"checks", "extras"},
    "runs": {"checks", "importing", "text"},
    "plots": {"checks", "extras"},
    "report": {"runs", "plots", "tables", "checks", "extras"},
}
FOR_WINGS = {"checks", "importing", "names", "divergences", "estimators", "stats", "metrics"}
FOR_WINGS |= ALONE.keys()
# flows holds what fit and sample share.
WINGS = dict.fromkeys(("distill", "flows", "bayes"), FOR_WINGS)
WINGS |= dict.fromkeys(("fit", "sample"), FOR_WINGS | {"flows"})
ALLOWED = CORE | ALONE | WINGS
ALLOWED["studies"] = FOR_WINGS | WINGS.keys()
ALLOWED["demos"] = ALLOWED["studies"] | {"studies"}
ALLOWED["cli"] = ALLOWED["demos"] | {"demos", "testing"}
ALLOWED[""] = set()  # rkl itself resolves its names lazily
ALLOWED["__main__"] = {"cli"}

HOMES = {
    "transformers": {"distill"},
    "datasets": {"distill"},
    "zuko": {"flows"},
    "matplotlib": {"plots"},
    "arviz": {"sample", "bayes"},  # where results are handed over
}
DRAWING = {"plots", "report"}  # which a wing imports inside the function that draws
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef


def part(module):
    """The part of the house that a module belongs to: what follows "rkl.", or "" for rkl."""
    return module.removeprefix("rkl").removeprefix(".").partition(".")[0]


def targets(node, package):
    """The modules, by full name, that one node of a syntax tree imports."""
    match node:
        case ast.Import(names):
            return [alias.name for alias in names]
        case ast.ImportFrom(module, names, level):
            above = package.split(".")[: len(package.split(".")) + 1 - level] if level else []
            base = ".".join([*above, *([module] if module else [])])
            return [f"{base}.{alias.name}" for alias in names] if base == "rkl" else [base]
        case ast.Call(ast.Name("import_module" | "__import__"), [ast.Constant(str(name)), *_]):
            return [name]
        case ast.Call(ast.Attribute(attr="import_module"), [ast.Constant(str(name)), *_]):
            return [name]
    return []


def imports(tree, package):
    """Every import, however it is spelt: the module, its line, and whether it waits for a call."""
    waiting = {
        inner for node in ast.walk(tree) if isinstance(node, FUNCTIONS) for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting.update(inner for it in node.body for inner in ast.walk(it))
    for node in ast.walk(tree):
        if isinstance(node, ast.stmt | ast.expr):
            for target in targets(node, package):
                yield target, node.lineno, node in waiting


def part_of_name(target):
    """The part that "rkl.fit.fit" is in; a name of rkl's own, "rkl.exact", is in its home."""
    name = part(target)
    return part(rkl._home(name) or "") or name


def violations(module, source, is_package=False):
    """What a module's source does that the design forbids, one sentence each."""
    tree, own = ast.parse(source), part(module)
    package = module if is_package else module.rpartition(".")[0]
    found = []
    for target, line, waits in imports(tree, package):
        top = target.partition(".")[0]
        if own not in HOMES.get(top, {own}):
            found.append(f"line {line}: {top} belongs to {sorted(HOMES[top])}")
        if top != "rkl":
            continue
        if target == "rkl":
            found.append(f"line {line}: import rkl hides what is used of it")
        elif part_of_name(target) not in ALLOWED[own] | {own}:
            found.append(f"line {line}: {own} may not import {part_of_name(target)}")
        elif own in WINGS and part_of_name(target) in DRAWING and not waits:
            found.append(f"line {line}: {target} must wait inside the function that draws")
    return found


@pytest.mark.parametrize("module", MODULES)
def test_every_module_keeps_the_laws_of_the_house(module):
    path = MODULES[module]
    assert violations(module, path.read_text("utf-8"), path.name == "__init__.py") == []


def test_no_module_reaches_itself():
    trees = {path: ast.parse(path.read_text("utf-8")) for path in MODULES.values()}
    assert house.circles(house.graph_of(MODULES, trees)) == []


def test_every_module_has_a_place_in_the_house():
    assert {part(module) for module in MODULES} <= ALLOWED.keys()


FORBIDDEN = {
    "a wing imports a wing": ("rkl.distill.trainer", "from rkl.flows import fit"),
    "a wing by its name alone": ("rkl.distill.trainer", "from rkl import flows"),
    "a wing beside an innocent": ("rkl.distill.trainer", "from rkl import runs, bayes"),
    "a wing as a module": ("rkl.distill.trainer", "import rkl.flows"),
    "a wing under another name": ("rkl.distill", "import rkl.fit.fit as innocent"),
    "a wing, relatively": ("rkl.distill.trainer", "from ..flows import fit"),
    "a wing, relatively and by name": ("rkl.bayes", "from . import flows"),
    "a wing within a function": ("rkl.bayes", "def act():\n    from rkl.flows import fit"),
    "a wing within a method": (
        "rkl.flows",
        "class A:\n    def b(self):\n        import rkl.bayes",
    ),
    "a wing for its types": ("rkl.flows", "if TYPE_CHECKING:\n    from rkl.bayes import Act"),
    "a wing by import_module": ("rkl.flows", "importlib.import_module('rkl.bayes')"),
    "a wing by a bare import_module": ("rkl.flows", "import_module('rkl.bayes.act')"),
    "the whole of rkl": ("rkl.flows", "import rkl"),
    "the core imports a wing": ("rkl.estimators", "from rkl.distill import heads"),
    "the core imports outwards": ("rkl.divergences.base", "from rkl.estimators import exact"),
    "the core by a name of rkl": ("rkl.divergences.base", "from rkl import exact"),
    "fit imports sample": ("rkl.fit.run", "from rkl.sample import smc"),
    "flows imports fit": ("rkl.flows.training", "from rkl.fit import data"),
    "readers imports a wing": ("rkl.readers", "from rkl.fit import data"),
    "checks imports anything": ("rkl.checks", "from rkl.divergences import KL"),
    "a wing imports kernels": ("rkl.distill", "from rkl.kernels import chunk_step"),
    "the command line imports kernels": ("rkl.cli.commands", "from rkl import kernels"),
    "runs imports the core": ("rkl.runs", "from rkl import divergences"),
    "report imports the core": ("rkl.report", "from rkl import exact"),
    "metrics imports a wing": ("rkl.metrics.text", "from rkl.distill import data"),
    "a wing imports studies": ("rkl.distill.run", "from rkl.studies import akl"),
    "a wing imports demos": ("rkl.distill.run", "from rkl.demos import report"),
    "a study imports demos": ("rkl.studies.akl", "from rkl import demos"),
    "a demo imports the command line": ("rkl.demos.xy", "from rkl.cli import main"),
    "a study imports the command line": ("rkl.studies.akl", "from rkl.cli import main"),
    "rkl imports eagerly": ("rkl", "from rkl import divergences"),
    "transformers outside distill": ("rkl.estimators", "import transformers"),
    "transformers in a study": ("rkl.demos.distill", "def f():\n    from transformers import A"),
    "datasets outside distill": ("rkl.metrics.text", "import datasets.arrow"),
    "zuko outside flows": ("rkl.bayes.families", "from zuko import flows"),
    "matplotlib outside plots": ("rkl.report", "import matplotlib.pyplot as plt"),
    "arviz in a study": ("rkl.studies.advnf", "import arviz"),
    "plots at a wing's import": ("rkl.distill.evaluate", "from rkl import plots"),
    "report at a wing's import": ("rkl.bayes", "from rkl.report import render"),
}


@pytest.mark.parametrize("law", FORBIDDEN)
def test_breaking_a_law_is_noticed(law):
    assert len(violations(*FORBIDDEN[law])) == 1


def test_keeping_the_laws_is_not_noticed():
    source = """
        import torch
        from rkl import KL, exact, runs
        from rkl.distill.models.heads import head_of
        from .data import rows
        from transformers import Trainer

        def drawn():
            from rkl import plots, report
    """
    assert violations("rkl.distill.trainer", textwrap.dedent(source)) == []


def loaded_by(code):
    """The modules that a fresh interpreter has loaded once it has run some code."""
    probe = [sys.executable, "-c", f"import sys; {code}; print(*sys.modules)"]
    return set(subprocess.run(probe, capture_output=True, text=True, check=True).stdout.split())


@pytest.mark.parametrize("code", ["import rkl", "from rkl import cli", "from rkl import runs"])
def test_importing_costs_almost_nothing(code):
    loaded = loaded_by(code)
    assert not {"torch", "numpy", "jaxtyping", "rich", "yaml"} & loaded
    assert "rkl" in loaded


def test_the_core_loads_no_optional_dependency():
    optional = {"transformers", "zuko", "arviz", "matplotlib", "datasets"}
    loaded = loaded_by("import rkl; [getattr(rkl, name) for name in dir(rkl)]")
    assert not optional & loaded
    assert "torch" in loaded


def test_the_command_line_answers_help_without_torch():
    code = "import sys; sys.modules['torch'] = None; from rkl import cli; cli.main(['--help'])"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert answer.returncode == 0
    assert "divergences" in answer.stdout


def test_names_known_to_type_checkers_are_the_names_that_resolve():
    stub = ast.parse((SOURCE / "__init__.pyi").read_text())
    imported = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
    homes = {alias.asname: node.module or "" for node in imported for alias in node.names}
    starred = {home for name, home in homes.items() if name is None}
    homes = {name: home for name, home in homes.items() if name is not None}
    homes |= {name: home for home in starred for name in importlib.import_module(home).__all__}
    assert homes.keys() == set(dir(rkl)) == set(rkl.__all__)
    for name, home in homes.items():
        assert getattr(rkl, name) is getattr(importlib.import_module(home), name)


@pytest.mark.parametrize("name", rkl.catalogue())
def test_a_divergence_is_imported_by_its_name(name):
    cls = rkl.catalogue()[name]
    if cls.__module__.startswith("rkl."):
        home = importlib.import_module(cls.__module__)
        assert cls.__name__ in home.__all__, f"add it to __all__ of {cls.__module__}"
        assert getattr(rkl, cls.__name__) is getattr(rkl.divergences, cls.__name__) is cls


def test_a_name_that_does_not_exist_is_refused():
    with pytest.raises(AttributeError, match="no attribute 'kl'"):
        _ = rkl.kl


def test_docstrings_begin_with_a_noun_or_a_verb():
    """Not with a clause: "What is kept of a teacher" is "The cached teacher"."""
    clauses = {"What", "How", "Whether", "Where", "Which", "Why", "Who", "When"}
    documented = ast.Module | ast.ClassDef | FUNCTIONS
    begins = {
        f"{module}: {text.splitlines()[0]}"
        for module, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, documented) and (text := ast.get_docstring(node))
        if text.split()[0] in clauses
    }
    assert begins == set()

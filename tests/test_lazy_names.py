"""The names of a package are those that type checkers know, and loading them costs nothing."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

COSTLY = {
    "rkl.bayes": {"torch", "xarray", "arviz"},
    "rkl.distill": {"torch", "transformers"},
    **dict.fromkeys(("rkl.metrics", "rkl.stats"), {"torch", "numpy"}),
    **dict.fromkeys(("rkl.flows", "rkl.fit", "rkl.sample"), {"torch", "zuko", "arviz"}),
}


@pytest.mark.parametrize("wing", COSTLY)
def test_names_known_to_type_checkers_are_the_names_that_resolve(wing):
    package = importlib.import_module(wing)
    stub = ast.parse(Path(package.__file__).with_suffix(".pyi").read_text())
    homes = {
        alias.asname: node.module
        for node in stub.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert homes.keys() == set(dir(package)) == set(package.__all__)
    for name, home in homes.items():
        assert getattr(package, name) is getattr(importlib.import_module(home), name)


@pytest.mark.parametrize("wing", COSTLY)
def test_importing_a_wing_loads_nothing_costly(wing):
    code = f"import sys, {wing}; print(*sys.modules)"
    probe = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert not COSTLY[wing] & set(probe.stdout.split())


@pytest.mark.parametrize("wing", COSTLY)
def test_a_name_that_a_wing_lacks_is_refused(wing):
    with pytest.raises(AttributeError, match=f"module '{wing}' has no attribute 'nothing'"):
        _ = importlib.import_module(wing).nothing

"""The names of rkl.bayes are those that type checkers know, and loading them costs nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import rkl.bayes


def test_names_known_to_type_checkers_are_the_names_that_resolve():
    stub = ast.parse(Path(rkl.bayes.__file__).with_suffix(".pyi").read_text())
    imported = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
    assert {alias.asname for node in imported for alias in node.names} == set(dir(rkl.bayes))
    assert all(getattr(rkl.bayes, name) for name in dir(rkl.bayes))


def test_importing_the_wing_loads_neither_torch_nor_xarray():
    code = "import sys, rkl.bayes; print(*sys.modules)"
    probe = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert not {"torch", "xarray", "arviz"} & set(probe.stdout.split())

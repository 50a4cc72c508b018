"""The names of rkl.flows are those that type checkers know, and loading them costs nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import rkl.flows


def test_names_known_to_type_checkers_are_the_names_that_resolve():
    stub = ast.parse(Path(rkl.flows.__file__).with_suffix(".pyi").read_text())
    imported = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
    assert {alias.asname for node in imported for alias in node.names} == set(dir(rkl.flows))
    assert all(getattr(rkl.flows, name) for name in dir(rkl.flows))


def test_importing_the_wing_loads_neither_torch_nor_zuko():
    code = "import sys, rkl.flows; print(*sys.modules)"
    probe = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert not {"torch", "zuko", "arviz"} & set(probe.stdout.split())

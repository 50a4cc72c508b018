"""A first hour, run as a plain script: what it printed, and its names."""

import contextlib
import io
import runpy
from pathlib import Path

import torch
from matplotlib import pyplot

FOLDER = Path(__file__).parents[1] / "examples" / "first_hour"


def run_hour(name, folder):
    """The names of a script that ran in an empty folder, and its output; warnings are errors."""
    printed = io.StringIO()
    try:
        with (
            contextlib.chdir(folder),
            contextlib.redirect_stdout(printed),
            torch.random.fork_rng(devices=[]),
        ):
            names = runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    finally:
        pyplot.close("all")
    return names, printed.getvalue()

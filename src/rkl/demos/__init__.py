"""``rkl demo``: a small problem from start to end, in minutes on two cores.

A demonstration imports only what it needs: that of the XY model needs no transformers.
"""

import importlib
import os
from collections.abc import Mapping
from typing import Any

from rkl.extras import require

# Each demonstration, and what runs it, by module and function of this package.
DEMOS: Mapping[str, str] = {
    "distill": "distill.run",
    "real": "distill.run_real",
    "xy": "xy.run",
    "precision-recall": "precision_recall.run",
    "neyman-scott": "neyman_scott.run",
}
WITH_STEPS = "distill", "real"  # those that take a number of steps


def run(
    name: str,
    out: str | os.PathLike,
    *,
    overwrite: bool = False,
    resume: bool = False,
    seed: int = 0,
    device: str | None = None,
    steps: int | None = None,
) -> str:
    """Run a demonstration.

    Args:
        name: "distill", "real" for a pretrained model, "xy", "precision-recall" or
            "neyman-scott".
        out: The folder to write.
        overwrite: Replaces the run that is there.
        resume: Goes on with the run that is there, after the last stage that it finished.
        seed: Random seed.
        device: "cpu" or "cuda"; a GPU by default if there is one, where the demonstration can
            use it.
        steps: Steps of each distillation; by default as many as fit its few minutes.

    Returns:
        A summary of the results, with the path of the report.
    """
    if name not in DEMOS:
        *others, last = map(repr, DEMOS)
        raise ValueError(f"name must be {', '.join(others)} or {last}; got {name!r}.")
    require("report", f"rkl demo {name}")
    how: dict[str, Any] = {"overwrite": overwrite, "resume": resume}
    how |= {"seed": seed, "device": device}
    if name in WITH_STEPS:
        how["steps"] = steps
    elif steps is not None:
        raise ValueError(f"steps are of distillations, of which {name} has none; got {steps}.")
    module, function = DEMOS[name].split(".")
    return getattr(importlib.import_module(f"rkl.demos.{module}"), function)(out, **how)

"""``rkl demo precision-recall``: a small version of the study of eight Gaussians."""

import os
from dataclasses import replace
from typing import Any

from rkl.studies.precision_recall import PARTS, ring
from rkl.studies.study import run_part

# What there is time for.
SMALL = ring.Plan(
    ways=tuple(it for it in ring.WAYS if it.method in ring.FIRST),
    seeds=2,
    steps=600,
    temperatures=(0.7,),
    bounds=(2.0,),
    budgets=(1.1,),
)


def run(
    out: str | os.PathLike,
    *,
    overwrite: bool = False,
    resume: bool = False,
    seed: int = 0,
    device: str | None = None,
) -> str:
    """Fit and sample the ring in a few ways, and report them.

    Returns:
        A line with the path of the report.
    """
    if device not in (None, "cpu"):
        raise ValueError(f"device must be 'cpu', for which this is made; got {device!r}.")
    part = replace(PARTS["ring"], plan=SMALL)
    how: Any = {"overwrite": overwrite, "resume": resume, "seed": seed}
    return f"The report: {run_part('precision_recall', 'ring', part, out, **how)}"

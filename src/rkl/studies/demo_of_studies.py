"""The demonstrations that are a first part of a study, and need no language model."""

import os
from pathlib import Path
from typing import Any

STUDIES = "neyman-scott", "precision-recall", "xy"


def run_study_demo(
    name: str,
    out: str | os.PathLike,
    *,
    overwrite: bool = False,
    seed: int = 0,
    device: str | None = None,
    steps: int | None = None,
) -> str:
    """Run one of ``STUDIES``, as :func:`rkl.studies.demo.run` does.

    Returns:
        What came out, and where the report is.
    """
    if steps is not None:
        raise ValueError(f"steps are of distillations, of which {name} has none; got {steps}.")
    if name == "xy":
        from rkl.studies import demo_xy

        return demo_xy.xy_demo(out, overwrite=overwrite, seed=seed, device=device or "cpu")
    return f"The report: {_first_part(name, out, overwrite, seed, device or 'cpu')}"


def _first_part(
    name: str, out: str | os.PathLike, overwrite: bool, seed: int, device: str
) -> Path:
    """The first part of a study, or as much of it as three minutes hold."""
    if name == "neyman-scott":
        from rkl.studies import neyman_scott

        how: Any = {"overwrite": overwrite, "seed": seed, "device": device}
        return neyman_scott.study("variance", out, **how)
    from rkl.studies import precision_recall

    if device != "cpu":
        raise ValueError(f"device must be 'cpu', for which this is made; got {device!r}.")
    plan = precision_recall.SMALL
    return precision_recall.conducted("ring", plan, out, overwrite=overwrite, seed=seed)

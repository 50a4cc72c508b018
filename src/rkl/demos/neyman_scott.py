"""``rkl demo neyman-scott``: the first part of that study."""

import os
from typing import Any

from rkl import studies


def run(
    out: str | os.PathLike,
    *,
    overwrite: bool = False,
    resume: bool = False,
    seed: int = 0,
    device: str | None = None,
) -> str:
    """Estimate one variance among many unknown means in every way, and report them.

    Returns:
        Where the report is.
    """
    how: Any = {"overwrite": overwrite, "resume": resume, "seed": seed}
    path = studies.run("neyman-scott", "variance", out, device=device or "cpu", **how)
    return f"The report: {path}"

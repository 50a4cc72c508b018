"""``rkl demo neyman-scott``: the first part of that study."""

import os

from rkl.studies import neyman_scott


def run(
    out: str | os.PathLike,
    *,
    overwrite: bool = False,
    seed: int = 0,
    device: str | None = None,
) -> str:
    """Estimate one variance among many unknown means in every way, and report them.

    Returns:
        Where the report is.
    """
    how = {"overwrite": overwrite, "seed": seed, "device": device or "cpu"}
    return f"The report: {neyman_scott.study('variance', out, **how)}"

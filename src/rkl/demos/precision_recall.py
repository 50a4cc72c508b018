"""``rkl demo precision-recall``: as much of the study of eight Gaussians as three minutes hold."""

import os

from rkl.studies.precision_recall import report, ring

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
    seed: int = 0,
    device: str | None = None,
) -> str:
    """Fit and sample the ring in a few ways, and report them.

    Returns:
        Where the report is.
    """
    if device not in (None, "cpu"):
        raise ValueError(f"device must be 'cpu', for which this is made; got {device!r}.")
    path = report.conducted("ring", SMALL, out, overwrite=overwrite, seed=seed)
    return f"The report: {path}"

"""Claims of papers, tested: one folder for each paper.

:mod:`rkl.studies.study` has their common code; each folder has a mapping ``PARTS``.
"""

import importlib
import os
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def papers() -> list[str]:
    """The names of the studies, as the command line takes them."""
    folders = [it.name for it in pkgutil.iter_modules(__path__) if it.ispkg]
    return [name.replace("_", "-") for name in folders]


def parts_of(paper: str) -> Mapping[str, Any]:
    """The parts of a study by name, each a :class:`rkl.studies.study.Part`."""
    if paper not in papers():
        raise ValueError(f"name must be one of {', '.join(papers())}; got {paper!r}.")
    return importlib.import_module(f"rkl.studies.{paper.replace('-', '_')}").PARTS


def default_folder(paper: str, part: str | None = None) -> Path:
    """Folder of a part unless another one is given."""
    return Path("runs", f"{paper}-{part or next(iter(parts_of(paper)))}")


def run(
    paper: str, part: str | None = None, out: str | os.PathLike | None = None, **how: Any
) -> Path:
    """Test a claim of a paper, and write the figures.

    Args:
        paper: One of :func:`papers`.
        part: One of its claims; the first by default.
        out: The folder to write; that of :func:`default_folder` by default.
        **how: As :func:`rkl.studies.study.run_study` takes it: overwrite, resume, seed, device
            and data.

    Returns:
        The report.
    """
    from rkl.studies.study import run_study

    parts = parts_of(paper)
    place = out or default_folder(paper, part)
    return run_study(paper.replace("-", "_"), parts, part or next(iter(parts)), place, **how)

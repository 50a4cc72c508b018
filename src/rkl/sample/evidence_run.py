"""``rkl evidence``: log Z of a target and draws of it, without a flow."""

from pathlib import Path

import numpy as np

from rkl.runs import check_out_file, replacing
from rkl.sample.settings import condition_grid, parse_ranges
from rkl.sample.smc import Evidence, evidence
from rkl.sample.targets import parse_target
from rkl.tables import Table


def find_evidence(
    target: str,
    *,
    condition: str | None = None,
    values: int = 8,
    particles: int = 512,
    islands: int = 8,
    out: Path | None = None,
    overwrite: bool = False,
    seed: int = 0,
    device: str = "cpu",
) -> str:
    """Find log Z of a target under some conditions, and write draws of it if ``out`` is given.

    Args:
        target: Its text, such as "xy(side=8)".
        condition: Ranges of its conditions; by default all of them.
        values: Number of values of the first condition.
        particles: Particles of an island.
        islands: Independent populations.
        out: File for the draws: .npz with x and condition.
        overwrite: Replace the file there.
        seed: Random seed.
        device: The cpu, where targets are computed.

    Returns:
        A table of log Z in nats with errors, and reasons to doubt it.
    """
    if device != "cpu":
        raise ValueError(f"device must be 'cpu', where targets are computed; got {device!r}.")
    if out is not None and out.suffix != ".npz":
        raise ValueError(f"out must end in .npz; got {out}.")
    if out is not None:
        check_out_file(out, overwrite=overwrite)
    aim = parse_target(target)
    grid = condition_grid(parse_ranges(condition, aim), values)
    result = evidence(aim, grid, particles=particles, islands=islands, seed=seed)
    if out is not None:
        _write(out, result)
    names = [
        ", ".join(
            f"{it.name} = {value:.4g} {it.unit}".rstrip()
            for it, value in zip(aim.conditions, row, strict=True)
        )
        or "all"
        for row in grid.tolist()
    ]
    title = f"{aim}: {islands} islands of {particles:,} particles under each condition"
    pairs = zip(result.log_z.value.tolist(), result.log_z.error.tolist(), strict=True)
    notes = [
        f"Warning: {at}: {doubt}"
        for at, doubts in zip(names, result.doubts, strict=True)
        for doubt in doubts
    ]
    if out is not None:
        notes.append(f"{len(grid) * islands * particles:,} draws in {out}")
    rows = list(zip(names, pairs, strict=True))
    return Table(title, ("", "log Z (nats)"), rows, notes).text()


def _write(out: Path, evidence_found: Evidence) -> None:
    x = evidence_found.x.flatten(1, 2)
    condition = evidence_found.condition[:, None].expand(*x.shape[:2], -1)
    arrays = {"x": x.flatten(0, 1).numpy(), "condition": condition.flatten(0, 1).numpy()}
    with replacing(out) as temporary, temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)

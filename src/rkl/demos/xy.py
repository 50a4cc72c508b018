"""``rkl demo xy``: one flow for the XY model at all temperatures, beside a heat bath."""

import os
import time
from dataclasses import dataclass
from typing import Any

from rkl.flows.runs import EVALUATION
from rkl.metrics.written import parenthesised
from rkl.runs import Run, write_json
from rkl.sample import Evaluation
from rkl.sample.evaluate import measure_run, write_report
from rkl.sample.run import fit_target
from rkl.sample.settings import EvaluateSettings, TargetSettings
from rkl.studies.study import torch_threads


@dataclass(frozen=True)
class Plan:
    """The sizes of the demonstration, which must end within three minutes on two cores.

    Args:
        side: Of the lattice.
        minutes: Of training; or else
        steps: of it.
        width: Of the networks of the flow.
        values: Temperatures that are looked at.
        draws: Of each chain.
        chains: At each temperature.
    """

    side: int = 8
    minutes: float | None = 1.25
    steps: int | None = None
    width: int = 64
    values: int = 9
    draws: int = 1_000
    chains: int = 8


def run(
    out: str | os.PathLike,
    *,
    plan: Plan | None = None,
    overwrite: bool = False,
    resume: bool = False,
    seed: int = 0,
    device: str | None = None,
) -> str:
    """Train a flow without any data, correct it, compare it with a heat bath, and report.

    Args:
        out: The folder to write, an ordinary run of ``rkl fit --target``.
        plan: The sizes.
        overwrite: Replaces the run that is there.
        resume: Goes on with the run that is there: with its training, or with what follows it.
        seed: Random seed.
        device: "cpu", for which this is made.

    Returns:
        A short table, and where the report is.
    """
    if device not in (None, "cpu"):
        raise ValueError(f"device must be 'cpu', for which this is made; got {device!r}.")
    plan, began = plan or Plan(), time.perf_counter()
    settings = TargetSettings(
        f"xy(side={plan.side})",
        flow=f"coarse-to-fine(width={plan.width})",
        minutes=plan.minutes,
        steps=plan.steps,
        seed=seed,
    )
    how: dict[str, Any] = {name: getattr(plan, name) for name in ("values", "draws", "chains")}
    with torch_threads(1):
        fitted = fit_target(settings, out, overwrite=overwrite, resume=resume)
        found = measure_run(out, EvaluateSettings(**how, reference=True, seed=seed + 1))
    run = Run.open(out)
    run.record_files([EVALUATION])
    write_json(run.path / EVALUATION, found.to_dict())
    report = write_report(run, found)
    done = fitted.fit.training
    trained = f"trained for {done.steps:,} steps in {done.seconds:.0f} s, without data"
    whole = f"{time.perf_counter() - began:.0f} s in all"
    return "\n".join(
        [f"{found.target}: {trained}; {whole}", "", table(found), "", f"The report: {report}"]
    )


def table(found: Evaluation) -> str:
    """The flow beside the heat bath, temperature by temperature."""
    reference, thermal = found.reference, found.thermodynamics
    assert reference is not None
    assert reference.log_z is not None
    pairs = {
        "energy (J per site)": (found.averages["energy"], reference.averages["energy"]),
        "log Z (nats)": (thermal.log_z, reference.log_z),
    }
    heads = ["T (J)"]
    for name in pairs:
        heads += [name, "without flow", "z"]
    heads += ["acceptance", "v per site"]
    rows = [heads]
    for k, temperature in enumerate(found.condition[:, 0].tolist()):
        row = [f"{temperature:.3g}"]
        for one, other in pairs.values():
            apart = (one.value[k] - other.value[k]) / (
                one.error[k] ** 2 + other.error[k] ** 2
            ).sqrt()
            row += [*(_text(it, k) for it in (one, other)), f"{apart:+.1f}".replace("-", "−")]
        row += [f"{found.chain.acceptance[k]:.2f}", f"{found.weights.v.value[k]:.1e}"]
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(it.rjust(w) for it, w in zip(row, widths, strict=True)) for row in rows
    )


def _text(it: Any, k: int) -> str:
    return parenthesised((it.value[k].item(), it.error[k].item()))

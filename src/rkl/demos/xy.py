"""``rkl demo xy``: one flow for the XY model at all temperatures, beside a heat bath."""

import os
import time
from dataclasses import dataclass
from typing import Any

from rkl.flows.runs import EVALUATION
from rkl.runs import Run, finite_or_null, write_json
from rkl.sample import Evaluation
from rkl.sample.evaluate import measure_run, write_report
from rkl.sample.run import fit_target
from rkl.sample.settings import EvaluateSettings, TargetSettings
from rkl.stats import Mean
from rkl.studies.study import torch_threads
from rkl.tables import Cell, Table


@dataclass(frozen=True)
class Plan:
    """The sizes of the demonstration, which must end within three minutes on two cores.

    Args:
        side: Sites along one side of the lattice.
        minutes: Training time in minutes, or else
        steps: training steps.
        width: Width of the networks of the flow.
        values: Number of temperatures to evaluate.
        draws: Draws of each chain.
        chains: Chains at each temperature.
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
        overwrite: Replace the run there.
        resume: Continue the run there: its training, or the stages after it.
        seed: Random seed.
        device: "cpu", for which this is made.

    Returns:
        A short table, with the path of the report.
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
        evaluation = measure_run(out, EvaluateSettings(**how, reference=True, seed=seed + 1))
    run = Run.open(out)
    run.record_files([EVALUATION])
    write_json(run.path / EVALUATION, finite_or_null(evaluation.to_dict()))
    report = write_report(run, evaluation)
    done = fitted.fit.training
    trained = f"trained for {done.steps:,} steps in {done.seconds:.0f} s, without data"
    whole = f"{time.perf_counter() - began:.0f} s in all"
    head = f"{evaluation.target}: {trained}; {whole}"
    return f"{head}\n\n{table(evaluation).text()}\n\nThe report: {report}"


def table(evaluation: Evaluation) -> Table:
    """The flow beside the heat bath, temperature by temperature."""
    reference, thermal = evaluation.reference, evaluation.thermodynamics
    assert reference is not None
    assert reference.log_z is not None
    pairs = {
        "energy (J per site)": (evaluation.averages["energy"], reference.averages["energy"]),
        "log Z (nats)": (thermal.log_z, reference.log_z),
    }
    columns: dict[str, list[Cell]] = {
        "T (J)": [f"{value:.3g}" for value in evaluation.condition[:, 0].tolist()]
    }
    for name, (one, other) in pairs.items():
        apart = (one.value - other.value) / (one.error**2 + other.error**2).sqrt()
        columns[name] = _cells(one)
        columns[f"heat bath's {name}"] = _cells(other)
        columns["z of " + name.partition(" (")[0]] = [round(z, 1) for z in apart.tolist()]
    columns["acceptance"] = [round(it, 2) for it in evaluation.chain.acceptance.tolist()]
    columns["v per site"] = evaluation.weights.v.value.tolist()
    rows = list(zip(*columns.values(), strict=True))
    return Table("The flow beside the heat bath", list(columns), rows)


def _cells(mean: Mean) -> list[Cell]:
    return list(zip(mean.value.tolist(), mean.error.tolist(), strict=True))

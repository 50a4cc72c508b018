"""Common parts of the runs of fit and sample: their files, budgets and checks."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from rkl.checks import LARGEST_COUNT, number
from rkl.flows.training import MINUTES
from rkl.runs import (
    REPORT,
    Run,
    check_out_file,
    finite_or_null,
    write_json,
)
from rkl.runs.integrity import (
    Input,
    check_inputs,
    files_of,
    inputs_before,
)

WEIGHTS, EVALUATION = "flow.safetensors", "evaluation.json"
TRIED = 20  # steps from which --dry-run foretells the time
BUDGET = "steps", "minutes"  # settings that a resumed run may have more of
PATHS = "data", "start_from"  # settings that run.json keeps as text


def check_budget(settings: Any) -> None:
    """Refuse a budget both in steps and in minutes, or one that is no positive number."""
    if settings.steps is not None and settings.minutes is not None:
        raise ValueError(f"one of steps and minutes; got {settings.steps} and {settings.minutes}.")
    for name in BUDGET:
        if (value := getattr(settings, name)) is not None:
            number(name, value, above=0, at_most=LARGEST_COUNT)


def budget_of(settings: Any) -> dict[str, Any]:
    """The budget of training: in steps, or in minutes, of which there is a default."""
    if settings.steps is not None:
        return {"steps": settings.steps}
    return {"minutes": MINUTES if settings.minutes is None else settings.minutes}


def steps_of(budget: Mapping[str, Any], seconds: float, share: float = 1.0) -> int:
    """The steps that a budget holds.

    Args:
        budget: In steps, or in minutes.
        seconds: Those of one step.
        share: Share of the minutes that the steps take.

    >>> steps_of({"minutes": 2}, 0.5, share=0.5)
    120
    """
    return budget.get("steps") or round(60 * share * budget["minutes"] / seconds)


def check_samples(samples: Float[Tensor, "rows *event"]) -> None:
    """Refuse samples with NaN or infinite values.

    Raises:
        FloatingPointError: There are some; the message has their number.
    """
    bad = int((~samples.isfinite()).reshape(len(samples), -1).any(1).sum())
    if bad:
        raise FloatingPointError(
            f"{bad:,} of {len(samples):,} samples are NaN or infinite, and nothing was written. "
            "The flow gives no numbers there: fit it again, with a smaller --lr."
        )


def check_same_data(run: Run, digest: str, inputs: dict[str, Input], **others: Any) -> None:
    """Record the inputs of a run; refuse inputs that differ from those that it started with."""
    check_inputs(run.path, inputs_before(run.path), inputs)
    before = run.record["data"]
    if before is not None and before["fingerprint"] != digest:
        raise ValueError(
            f"resume: the data are not those that {run.path} was begun with: their fingerprint "
            f"is {digest}, and was {before['fingerprint']}."
        )
    run.update(data={"fingerprint": digest, **others}, inputs=inputs)


def movable_paths(out: str | os.PathLike, resume: bool) -> tuple[str, ...]:
    """The settings that name files, which a resumed run may move.

    Only if run.json has the digests by which the contents are compared.
    """
    return PATHS if resume and inputs_before(out) else ()


def run_input(path: str | os.PathLike) -> Input:
    """The digest of the weights of a run that another one starts from."""
    weights = Path(path, WEIGHTS)
    return files_of(path, {WEIGHTS: weights})


def single_run(
    paths: Sequence[str | os.PathLike], out: str | os.PathLike | None, overwrite: bool
) -> Run:
    """The run to report, after a check that its report may be written.

    Raises:
        FileExistsError: A file of others is at ``out``.
        ValueError: There are several runs, or none.
    """
    if len(paths) != 1:
        raise ValueError(
            f"paths: flows are reported one by one; got {len(paths)}. See rkl compare."
        )
    run = Run.open(paths[0])
    check_out_file(out or run.path / REPORT, overwrite=overwrite, own=REPORT)
    return run


def write_evaluation(run: Run, figures: Mapping[str, Any]) -> None:
    """Write the figures of an evaluation into the folder of its run."""
    run.record_files([EVALUATION])
    write_json(run.path / EVALUATION, finite_or_null(figures))
    run.measure_files([EVALUATION])

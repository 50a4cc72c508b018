"""The excess risk of a reported act under other draws, and the acts of several runs."""

import dataclasses
import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rkl.bayes.act import Estimate
from rkl.bayes.answer import elements
from rkl.bayes.compare import excess_over, loss_name, side_by_side, variables_of
from rkl.bayes.identified import not_used
from rkl.bayes.report import acts_side_by_side, open_runs, report_runs, result_of
from rkl.bayes.run import estimate_act, settings_of
from rkl.bayes.settings import EvaluateSettings
from rkl.bayes.tables import Table, number_or_nan
from rkl.importing import only
from rkl.runs import Run, check_out_file


def evaluate_run(
    path: str | os.PathLike, settings: EvaluateSettings, *, allow: Collection[str] = ()
) -> Table:
    """The excess risk of the reported act under other draws, over their own act.

    Args:
        path: The folder of the run.
        settings: The other draws.
        allow: Names that its ``run.json`` may import, each "module:name".
    """
    run = Run.open(path)
    there = dataclasses.replace(
        settings_of(run),
        posterior=settings.posterior,
        further=(),
        seed=settings.seed,
        device=settings.device,
    )
    result = result_of(run)["estimate"]
    with only(allow, source=run.path / "run.json"):
        estimate = estimate_act(there)
    reported = {name: _reported(result, name, estimate) for name in estimate.problem.model.names}
    here = variables_of(estimate)
    # no value was reported of what the distribution does not depend on, and any serves
    filled = {name: torch.where(x.isnan(), here[name], x) for name, x in reported.items()}
    candidates = {"as reported": filled, "of these draws": here}
    unused = {
        "as reported": {name: x.isnan() for name, x in reported.items()},
        "of these draws": estimate.act.unused,
    }
    name = loss_name(estimate.divergence, str(estimate.divergence))
    judges = {name: excess_over(estimate)}
    notes = (
        f"excess {name}: how far the risk of an act exceeds the least risk under these draws",
        not_used(estimate.act.unused, estimate.labels),
    )
    return side_by_side(estimate.problem, candidates, judges, tuple(filter(None, notes)), unused)


def _reported(result: Mapping[str, Any], name: str, estimate: Estimate) -> Tensor:
    """The reported value of a variable, its elements in the order of other draws' labels."""
    value = number_or_nan(result["act"][name]["value"])
    shape = estimate.act[name].shape
    if value.shape != shape:
        raise ValueError(
            f"posterior must hold {name} as the run's did, {list(value.shape)}; got {list(shape)}."
        )
    here, there = estimate.labels(name), result.get("labels", {}).get(name)
    counted = [elements(name, shape), _from_one(name, shape)]
    if there in (None, here) or here in counted or there in counted:
        return value
    if sorted(here) != sorted(there) or len({*here}) < len(here):
        unlike = next(x for x in zip(there, here, strict=True) if x[0] != x[1])
        raise ValueError(
            f"posterior must hold the elements of {name} under the labels that they had in the "
            f"run's; expected {unlike[0]}, got {unlike[1]}."
        )
    return value.flatten()[[there.index(label) for label in here]].reshape(shape)


def _from_one(name: str, shape: torch.Size) -> list[str]:
    """Names of the elements of a parameter that are counted from 1 along each axis."""
    return elements(name, shape, [[str(i + 1) for i in range(n)] for n in shape])


def compare_runs(
    paths: Sequence[str | os.PathLike],
    out: str | os.PathLike | None = None,
    *,
    overwrite: bool = False,
) -> str:
    """The acts of several runs in one table, and with ``out`` in one report.

    Args:
        paths: Folders of runs.
        out: The HTML file.
        overwrite: Replaces a file of others there.
    """
    if out is not None:
        check_out_file(out, overwrite=overwrite)
    table = acts_side_by_side(open_runs(paths))
    if out is None:
        return str(table)
    return f"{table}\n\nThe report: {report_runs(paths, out, overwrite=overwrite)}"

"""``rkl compare`` of flows fitted to targets."""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rkl.flows.compare import (
    FlowComparison,
    comparison,
    curves_of,
    last_row,
    open_runs,
    setting_of,
)
from rkl.flows.runs import EVALUATION
from rkl.runs import Run
from rkl.tables import Cell, Table, pair_of

LAST_STEPS = {"ess": "ESS", "acceptance": "acceptance", "v": "v"}


def compare_runs(
    paths: Sequence[str | os.PathLike],
    out: str | os.PathLike | None = None,
    *,
    overwrite: bool = False,
) -> FlowComparison:
    """Flows of several runs side by side, from the files of the runs; nothing is drawn.

    Args:
        paths: Folders of runs.
        out: An HTML file to write the tables, the course of training and the settings to.
        overwrite: Replace a file of others there.

    Raises:
        ValueError: There is no run, or one lacks a setting.
    """
    runs = open_runs(paths, out, overwrite)
    return comparison(runs, _tables(runs), curves_of(runs, "ess", "effective share of draws"), out)


def _tables(runs: Mapping[str, Run]) -> Iterator[Table]:
    columns = ("run", "target", "objective", "flow", *LAST_STEPS.values(), "steps")
    rows = []
    for name, run in runs.items():
        last = last_row(run)
        minimised = setting_of(run, "objective") or setting_of(run, "divergence") or "by default"
        figures = [last.get(it, math.nan) for it in LAST_STEPS]
        words = str(setting_of(run, "target")), str(minimised), str(setting_of(run, "flow"))
        rows.append((name, *words, *figures, last.get("step")))
    asked = {(str(setting_of(it, "target")), it.settings.get("condition")) for it in runs.values()}
    differ = len({target for target, _ in asked}) < len(asked)
    yield Table("Flows of targets", columns, tuple(rows), _TARGETS_SAY + _DIFFER * differ)
    yield from _evaluation_tables(runs)


def _evaluation_tables(runs: Mapping[str, Run]) -> Iterator[Table]:
    rows: list[tuple[Cell, ...]] = []
    for name, run in runs.items():
        record = _evaluation(run)
        if record is None:
            continue
        named = [it["name"] for it in record["conditions"]]
        for k, values in enumerate(record["condition"]):
            at = ", ".join(f"{it} = {v:.4g}" for it, v in zip(named, values, strict=True)) or "all"
            log_z, ess = record["thermodynamics"]["log_z"], record["weights"]["ess"]
            figures = [
                pair_of({"value": it["value"][k], "error": it["error"][k]}) for it in (log_z, ess)
            ]
            covered = str(record["coverage"][k]["verdict"]).partition(":")[0]
            rows.append((name, at, *figures, record["acceptance"][k], covered))
    if rows:
        columns = ("run", "condition", "log Z (nats)", "ESS", "acceptance", "coverage")
        yield Table("Under each condition", columns, tuple(rows), _EVALUATED_SAYS)


def _evaluation(run: Run) -> dict[str, Any] | None:
    file = run.path / EVALUATION
    if not file.exists():
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"path: {file} is corrupt: {error}.") from None


_TARGETS_SAY = (
    "Shares of effective and of accepted draws and v, the variance of the log-weights per site, "
    "in the last steps, all conditions together. `rkl evaluate RUN` measures log Z and each "
    "condition."
)
_DIFFER = " The runs were trained at other conditions, so these figures cannot be compared."
_EVALUATED_SAYS = "As `rkl evaluate` measured them, with standard errors."

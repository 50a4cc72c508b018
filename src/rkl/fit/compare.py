"""``rkl compare`` of flows fitted to data."""

import os
from collections.abc import Iterator, Mapping, Sequence

from rkl.flows.compare import (
    FlowComparison,
    comparison,
    curves_of,
    last_row,
    open_runs,
    setting_of,
)
from rkl.runs import Run
from rkl.tables import Table, pair_of

NAMED = {"held_out": "held-out log-density (nats per row)", "gaussian": "a Gaussian's"}


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
    return comparison(runs, _tables(runs), curves_of(runs, "held_out", NAMED["held_out"]), out)


def _tables(runs: Mapping[str, Run]) -> Iterator[Table]:
    columns = ("run", "divergence", "flow", *NAMED.values(), "kept step", "steps")
    rows = []
    for name, run in runs.items():
        result, last = run.record.get("result") or {}, last_row(run)
        figures = [pair_of(result.get(it)) for it in NAMED]
        figures[0] = last.get("held_out") if figures[0] is None else figures[0]
        steps = result.get("steps", last.get("step"))
        minimised = setting_of(run, "divergence")
        if run.settings.get("distil_budget"):
            minimised += f", distilled at {run.settings['distil_budget']:g}"
        flow = str(setting_of(run, "flow"))
        rows.append((name, minimised, flow, *figures, result.get("kept_step"), steps))
    fingerprints = {(run.record.get("data") or {}).get("fingerprint") for run in runs.values()}
    caption = _DATA_SAYS + " The data differ, so log-densities cannot be compared." * (
        len(fingerprints) > 1
    )
    yield Table("Flows of data", columns, tuple(rows), caption)


_DATA_SAYS = (
    "Of the parameters kept, on the rows that each run held out; a Gaussian has the moments of "
    "the rows trained on."
)

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
    yield Table("Flows of data", columns, tuple(rows), " ".join([_DATA_SAYS, *_differ(runs)]))


def _differ(runs: Mapping[str, Run]) -> Iterator[str]:
    """A sentence if the runs were measured on rows that are not the same."""
    fingerprints, held_out, spread = set(), set(), set()
    for run in runs.values():
        fingerprints.add((run.record.get("data") or {}).get("fingerprint"))
        held_out.add((setting_of(run, "held_out"), run.record.get("seed")))
        rows = (run.record.get("inputs") or {}).get("data") or {}
        spread.add(rows.get("sha256"))  # of the rows, and of the steps between their levels
    if len(fingerprints) > 1:
        yield "The data differ, so log-densities cannot be compared."
    elif len(held_out) > 1:
        yield (
            "The runs held out other rows of the same data, as their seed or held_out differs, so "
            "log-densities cannot be compared to better than their errors: `rkl evaluate RUN "
            "--data` measures each on the same new rows."
        )
    elif len(spread - {None}) > 1:
        yield "One of them spread levels that another did not: log-densities cannot be compared."


_DATA_SAYS = (
    "Of the parameters kept, on the rows that each run held out; a Gaussian has the moments of "
    "the rows trained on."
)

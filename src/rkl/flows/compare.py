"""``rkl compare`` of flows: runs side by side, as text and as one page."""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rkl.metrics.written import Cell, parenthesised
from rkl.runs import Run, check_out_file

EVALUATED = "evaluation.json"
LAST_STEPS = {"ess": "ESS", "acceptance": "acceptance", "v": "v"}
NAMED = {"held_out": "held-out log-density (nats per row)", "gaussian": "a Gaussian's"}


@dataclass(frozen=True)
class FlowTable:
    """Figures of runs side by side.

    Attributes:
        title: What is shown.
        columns: A head for each column.
        rows: A cell for each column; the first names the row.
        caption: Where the figures come from.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    caption: str

    def __str__(self) -> str:
        lines = [self.columns, *(tuple(map(parenthesised, row)) for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
        return "\n".join([self.title, "", *text, "", self.caption])


@dataclass(frozen=True)
class FlowComparison:
    """Runs of flows side by side, which print as tables.

    Attributes:
        tables: One for the flows of data and one for those of targets; for each target that was
            evaluated, one of its figures under each condition.
        curves: For each run steps and values of what was followed in training, by its name.
        settings: What each run was fitted with.
    """

    tables: tuple[FlowTable, ...]
    curves: Mapping[str, Mapping[str, tuple[list[int], list[float]]]]
    settings: Mapping[str, Mapping[str, Any]]

    def __str__(self) -> str:
        return "\n\n".join(map(str, self.tables))

    def page(self) -> str:
        """The tables, the course of training and the settings as HTML."""
        from rkl import plots
        from rkl.report import Section, Settings, Table, drawn, render

        tables = [Table(it.title, it.columns, it.rows, it.caption) for it in self.tables]
        figures = [
            drawn(label, plots.training_curves(dict(curves), label=label))
            for label, curves in self.curves.items()
        ]
        sections: list[Section] = [Section("Figures", blocks=tables)]
        if figures:
            sections.append(Section("Training", blocks=figures))
        shown = [Settings(it, title=name) for name, it in self.settings.items()]
        return render("Comparison of flows", [*sections, Section("Settings", blocks=shown)])


def compare_runs(
    paths: Sequence[str | os.PathLike],
    out: str | os.PathLike | None = None,
    *,
    overwrite: bool = False,
) -> FlowComparison:
    """Flows of several runs side by side, by what the runs kept; nothing is drawn.

    Args:
        paths: Folders of runs.
        out: An HTML file to write the tables, the course of training and the settings to.
        overwrite: Replaces a file of others there.

    Raises:
        ValueError: There is no run, or one lacks a setting.
    """
    if isinstance(paths, str | os.PathLike):
        raise TypeError(f"paths must be a list of folders; got one alone, {str(paths)!r}.")
    if not paths:
        raise ValueError("paths must name at least one run; got none.")
    if out is not None:
        check_out_file(out, overwrite=overwrite)
    runs = {str(path): Run.open(path) for path in paths}
    of_data = {name: run for name, run in runs.items() if "target" not in run.settings}
    of_targets = {name: run for name, run in runs.items() if "target" in run.settings}
    tables = [*_of_data(of_data), *_of_targets(of_targets)]
    curves = dict(_curves(of_data, "held_out")) | dict(_curves(of_targets, "ess"))
    settings = {name: run.settings for name, run in runs.items()}
    found = FlowComparison(tuple(tables), curves, settings)
    if out is not None:
        from rkl.report import write

        write(Path(out), found.page())
    return found


def _of_data(runs: Mapping[str, Run]) -> Iterator[FlowTable]:
    if not runs:
        return
    columns = ("run", "divergence", "flow", *NAMED.values(), "kept step", "steps")
    rows = []
    for name, run in runs.items():
        result, last = run.record.get("result") or {}, _last(run)
        figures = [_pair(result.get(it)) for it in NAMED]
        figures[0] = last.get("held_out") if figures[0] is None else figures[0]
        steps = result.get("steps", last.get("step"))
        minimised = _setting(run, "divergence")
        if run.settings.get("distil_budget"):
            minimised += f", distilled at {run.settings['distil_budget']:g}"
        flow = str(_setting(run, "flow"))
        rows.append((name, minimised, flow, *figures, result.get("kept_step"), steps))
    fingerprints = {(run.record.get("data") or {}).get("fingerprint") for run in runs.values()}
    said = _DATA_SAYS + " The data differ, so log-densities cannot be compared." * (
        len(fingerprints) > 1
    )
    yield FlowTable("Flows of data", columns, tuple(rows), said)


def _of_targets(runs: Mapping[str, Run]) -> Iterator[FlowTable]:
    if not runs:
        return
    columns = ("run", "target", "objective", "flow", *LAST_STEPS.values(), "steps")
    rows = []
    for name, run in runs.items():
        last = _last(run)
        minimised = _setting(run, "objective") or _setting(run, "divergence") or "by default"
        figures = [last.get(it, math.nan) for it in LAST_STEPS]
        words = str(_setting(run, "target")), str(minimised), str(_setting(run, "flow"))
        rows.append((name, *words, *figures, last.get("step")))
    yield FlowTable("Flows of targets", columns, tuple(rows), _TARGETS_SAY)
    yield from _evaluated(runs)


def _evaluated(runs: Mapping[str, Run]) -> Iterator[FlowTable]:
    """Log Z, acceptance and coverage under each condition of the runs that were evaluated."""
    rows: list[tuple[Cell, ...]] = []
    for name, run in runs.items():
        kept = _evaluation(run)
        if kept is None:
            continue
        named = [it["name"] for it in kept["conditions"]]
        for k, values in enumerate(kept["condition"]):
            at = ", ".join(f"{it} = {v:.4g}" for it, v in zip(named, values, strict=True)) or "all"
            log_z, weights = kept["thermodynamics"]["log_z"], kept["weights"]
            ess = weights["ess"]
            figures = (log_z["value"][k], log_z["error"][k]), (ess["value"][k], ess["error"][k])
            covered = str(kept["coverage"][k]["verdict"]).partition(":")[0]
            rows.append((name, at, *figures, kept["acceptance"][k], covered))
    if rows:
        columns = ("run", "condition", "log Z (nats)", "ESS", "acceptance", "coverage")
        yield FlowTable("Under each condition", columns, tuple(rows), _EVALUATED_SAYS)


def _evaluation(run: Run) -> dict[str, Any] | None:
    file = run.path / EVALUATED
    if not file.exists():
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"path: {file} is corrupt: {error}.") from None


def _curves(runs: Mapping[str, Run], name: str) -> Iterator[tuple[str, Any]]:
    """The course of one figure in training, of all runs, under its words."""
    curves = {}
    for path, run in runs.items():
        pairs = [(row["step"], row[name]) for row in run.metrics if row.get(name) is not None]
        if pairs:
            curves[path] = [it[0] for it in pairs], [it[1] for it in pairs]
    if curves:
        yield {"held_out": NAMED["held_out"], "ess": "effective share of draws"}[name], curves


def _last(run: Run) -> Mapping[str, Any]:
    return (run.metrics or [{}])[-1]


def _pair(kept: Mapping[str, float] | None) -> tuple[float, float] | None:
    return None if kept is None else (kept["value"], kept["error"])


def _setting(run: Run, name: str) -> Any:
    if name not in run.settings:
        raise ValueError(f"path: the run.json of {run.path} lacks the setting {name!r}.")
    return run.settings[name]


_DATA_SAYS = (
    "Of the parameters kept, on the rows that each run held out; a Gaussian has the moments of "
    "the rows trained on."
)
_TARGETS_SAY = (
    "Shares of effective and of accepted draws and v, the variance of the log-weights per site, "
    "in the last steps, all conditions together. `rkl evaluate RUN` measures log Z and each "
    "condition."
)
_EVALUATED_SAYS = "As `rkl evaluate` measured them, with standard errors."

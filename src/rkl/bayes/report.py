"""The report of one estimate or several: the posterior, what is reported of it, what it costs."""

import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from rkl.bayes.answer import Answer, elements
from rkl.bayes.identified import joined_labels, labels_in
from rkl.bayes.regions import Region
from rkl.bayes.tables import Table
from rkl.runs import REPORT, Run, check_out_file, write_atomic, write_json
from rkl.stats import resample
from rkl.tables import Cell

if TYPE_CHECKING:
    from rkl.plots import Figure
    from rkl.report import Block, Section

RESULT = "estimate.json"
PANELS = 6  # marginals that are drawn
DRAWN = 20_000  # draws that a histogram is made of
KEPT, MARGINALS = "report.json", "marginals.npz"
TABLES = ("act", "region", "comparison")


@dataclass(frozen=True)
class Shown:
    """The content of a report on an estimate, as a run keeps it.

    Attributes:
        lead: The family and the loss.
        act: The act and its risk.
        region: The ranges of the region.
        comparison: The act beside other estimates.
        marginals: Some draws of some numbers, by label.
        shaded: The intervals of the region, by label.
        labels: The labels of the elements of every variable.
    """

    lead: str
    act: Table
    region: Table
    comparison: Table
    marginals: Mapping[str, Any]
    shaded: Mapping[str, Any]
    labels: Mapping[str, Sequence[str]]

    @classmethod
    def of(cls, estimate: Answer, region: Region, comparison: Table) -> "Shown":
        """The content of the report on an estimate."""
        lead = f"{estimate.family} under {estimate.divergence}."
        tables = estimate.table(), region.table(), comparison
        return cls(lead, *tables, _marginals(estimate), region.shading(), _labels(estimate))

    def write(self, folder: Path) -> None:
        """Keep it in a run."""
        tables = {name: getattr(self, name).to_dict() for name in TABLES}
        record = {"shaded": self.shaded, "labels": self.labels}
        write_json(folder / KEPT, {"lead": self.lead, **tables, **record})
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **self.marginals)
        write_atomic(folder / MARGINALS, buffer.getvalue())

    @classmethod
    def read(cls, folder: Path) -> "Shown":
        """The content that a run kept.

        Raises:
            FileNotFoundError: It kept nothing, for it was not finished.
            ValueError: A file cannot be read.
        """
        for path in (folder / KEPT, folder / MARGINALS):
            if not path.exists():
                raise FileNotFoundError(
                    f"path: {folder} has no {path.name}: the run was not finished."
                )
        try:
            record = json.loads((folder / KEPT).read_text(encoding="utf-8"))
            tables = {name: Table.from_dict(record[name]) for name in TABLES}
            with np.load(folder / MARGINALS, allow_pickle=False) as arrays:
                more: Any = {name: record[name] for name in ("lead", "shaded", "labels")}
                return cls(marginals=dict(arrays), **tables, **more)
        except (BadZipFile, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"path: what {folder} kept cannot be read: {error}.") from error


def page(
    results: Mapping[str, Shown],
    records: Sequence[Mapping[str, Any]],
    comparison: Table | None = None,
) -> str:
    """The report as HTML, of several runs with their acts side by side at its head."""
    from rkl.report import Section, Settings, render

    sections = []
    if comparison is not None:
        sections.append(Section("Side by side", blocks=[comparison]))
    for name, result in results.items():
        title = "The estimate" if len(results) == 1 else name
        sections.append(_section(title, result))
    settings_of_run = {name: dict(record) for name, record in zip(results, records, strict=True)}
    values = next(iter(settings_of_run.values())) if len(settings_of_run) == 1 else settings_of_run
    sections.append(Section("Settings", blocks=[Settings(values)]))
    lead = next(iter(results.values())).lead if len(results) == 1 else ""
    return render("Which number to report", sections, lead=lead)


def posterior_figure(
    estimate: Answer, comparison: Table | None = None, region: Any = None
) -> "Figure":
    """Every marginal posterior, up to six, with the acts marked and the region shaded."""
    acts = {"act": estimate.act} if comparison is None else comparison.acts
    shaded = {} if region is None else region.shading()
    return _figure(_marginals(estimate), acts, shaded, _labels(estimate))


def _figure(
    marginals: Mapping[str, Any],
    acts: Mapping[str, Any],
    shaded: Mapping[str, Any],
    labels: Mapping[str, Sequence[str]],
):
    from rkl.plots import posterior

    shown = dict(list(marginals.items())[:PANELS])
    marks = {name: _numbers(values, labels) for name, values in acts.items()}
    return posterior(shown, marks, regions={k: shaded[k] for k in shown if k in shaded})


def _labels(estimate: Answer) -> dict[str, list[str]]:
    return {name: estimate.labels(name) for name in estimate.problem.model.names}


def _marginals(estimate: Answer) -> dict[str, Any]:
    problem = estimate.problem
    weights, count = problem.draws.weights, problem.draws.chains * problem.draws.draws
    rows = slice(None, None, max(1, count // DRAWN))
    if weights is not None:  # a histogram counts draws
        rows = resample(weights.flatten().log(), count=min(count, DRAWN), offset=0.5)
    figures = {}
    for name in problem.model.names:
        if len(figures) >= PANELS:
            break
        values = problem.draws[name].flatten(0, 1)
        shape = values.shape[1:]
        values = values[rows].reshape(-1, max(1, values[0].numel()))
        labels = elements(name, shape, problem.labels(name))
        unused = estimate.act.unused.get(name, torch.zeros(shape, dtype=torch.bool))
        used = torch.ones(shape) if unused.shape != shape else ~unused
        places = used.flatten().nonzero()[:PANELS, 0].tolist()
        figures |= {labels[i]: values[:, i].numpy() for i in places}
    return figures


def _numbers(
    values: Mapping[str, Tensor], labels: Mapping[str, Sequence[str]]
) -> dict[str, float]:
    numbers = {}
    for name, value in values.items():
        value = torch.as_tensor(value)
        names = labels.get(name, ())
        labels_here = names if len(names) == value.numel() else elements(name, value.shape)
        pairs = zip(labels_here, value.flatten().tolist(), strict=True)
        numbers |= {label: x for label, x in pairs if math.isfinite(x)}
    return numbers


def _section(title: str, result: Shown) -> "Section":
    from rkl.report import Section, figure_block

    numbers = sum(map(len, result.labels.values()))
    blocks: list[Block | Table] = [
        result.act,
        figure_block(
            "The posterior, and what is reported of it",
            _figure(result.marginals, result.comparison.acts, result.shaded, result.labels),
            "Grey: the draws of each parameter. Lines: the estimates. Shaded: the values that "
            "occur in the credible region, which holds the draws whose distributions are closest "
            "to the reported one; it is the same region in every parametrisation."
            + (f" The first {PANELS} of {numbers:,} numbers." if numbers > PANELS else ""),
        ),
        result.region,
        result.comparison,
        *_bars(result.comparison),
    ]
    return Section(title, blocks=blocks)


def _bars(table: Table) -> list["Block"]:
    from rkl.plots import bars
    from rkl.report import figure_block

    blocks = []
    for place, column in enumerate(table.columns):
        if not column.startswith("excess"):
            continue
        values, errors = {}, {}
        for row in table.rows:
            match row[place]:
                case (value, error):
                    values[str(row[0])], errors[str(row[0])] = value, error
                case float() | int() as value:
                    values[str(row[0])] = value
        if values:
            title = column[0].upper() + column[1:]
            drawing = bars(values, errors=errors, label=column)
            caption = "What each estimate loses beyond the best under this loss: less is better."
            blocks.append(figure_block(title, drawing, caption))
    return blocks


def report_runs(
    paths: Sequence[str | os.PathLike],
    out: str | os.PathLike | None = None,
    *,
    overwrite: bool = False,
) -> Path:
    """Write the report of one run or several, a single HTML file, from their folders.

    Args:
        paths: Folders of runs.
        out: The file; ``report.html`` in the folder of the run if there is only one.
        overwrite: Replaces a file of others there.
    """
    from rkl.report import write

    runs = open_runs(paths)
    if out is None and len(runs) > 1:
        raise ValueError(f"out must say where the report of {len(runs)} runs goes.")
    place = runs[0].path / REPORT if out is None else Path(out)
    check_out_file(place, overwrite=overwrite, own=REPORT)
    results = {str(run.path): Shown.read(run.path) for run in runs}
    table = acts_side_by_side(runs) if len(runs) > 1 else None
    write(place, page(results, [run.record for run in runs], table))
    return place


def open_runs(paths: Sequence[str | os.PathLike]) -> list[Run]:
    """The runs in these folders, each once; refused if some are of another kind."""
    if isinstance(paths, str | os.PathLike):
        raise TypeError(f"paths must be a list of folders; got one alone, {str(paths)!r}.")
    if not paths:
        raise ValueError("paths must name at least one run; got none.")
    runs = [Run.open(path) for path in dict.fromkeys(map(Path, paths))]  # each once
    for run in runs:
        refuse_other_kinds(run)
    return runs


def acts_side_by_side(runs: Sequence[Run]) -> Table:
    """The acts of several runs: a row for every number of every variable."""
    results = {str(run.path): result_of(run)["estimate"] for run in runs}
    rows: dict[str, dict[str, Cell]] = {}
    for place, record in results.items():
        for name in record["variables"]:
            for label, cell in _numbers_of(record, name).items():
                rows.setdefault(label, {})[place] = cell
    heads = [("loss", *(record["divergence"] for record in results.values()))]
    if len({record["family"] for record in results.values()}) > 1:
        heads.insert(0, ("family", *(record["family"] for record in results.values())))
    numbers = [(label, *(cells.get(place) for place in results)) for label, cells in rows.items()]
    notes = [
        f"{place}: {joined_labels(labels)} not used by the family"
        for place, record in results.items()
        if (labels := _unused_of(record))
    ]
    return Table("Bayes acts", ("parameter", *results), [*heads, *numbers], notes)


def _unused_of(record: dict[str, Any]) -> list[str]:
    masks = {k: torch.tensor(mask) for k, mask in record.get("unused", {}).items()}
    return labels_in(masks, lambda name: record["labels"][name])


def _numbers_of(record: dict[str, Any], name: str) -> dict[str, Cell]:
    value, error = (np.asarray(record["act"][name][key], np.float64) for key in ("value", "error"))
    labels = record.get("labels", {}).get(name) or elements(name, torch.Size(value.shape))
    pairs = zip(value.flatten().tolist(), error.flatten().tolist(), strict=True)
    return {k: pair for k, pair in zip(labels, pairs, strict=True) if not math.isnan(pair[0])}


def result_of(run: Run) -> dict[str, Any]:
    """The content of ``estimate.json``."""
    path = run.path / RESULT
    if not path.exists():
        raise FileNotFoundError(f"path: {run.path} has no {RESULT}: the run was not finished.")
    run.check_files(RESULT)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"path: {path} cannot be read as JSON: {error}.") from error


def refuse_other_kinds(run: Run) -> None:
    """Refuse a run that is no estimate."""
    if run.kind != "bayes":
        raise ValueError(f"path: {run.path} is a run of kind {run.kind!r}; expected 'bayes'.")

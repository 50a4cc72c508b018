"""``rkl compare`` of flows: runs side by side, as text and as one page."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rkl.runs import Run, check_out_file
from rkl.tables import Table


@dataclass(frozen=True)
class FlowComparison:
    """Runs of flows side by side, which print as tables.

    Attributes:
        tables: One of all runs; for targets that were evaluated, one of the figures under each
            condition.
        curves: For each run the steps and values of its figures in training, by name.
        settings: Settings of each run.
    """

    tables: tuple[Table, ...]
    curves: Mapping[str, Mapping[str, tuple[list[int], list[float]]]]
    settings: Mapping[str, Mapping[str, Any]]

    def __str__(self) -> str:
        return "\n\n".join(table.text() for table in self.tables)

    def _repr_html_(self) -> str:
        return "\n".join(table._repr_html_() for table in self.tables)

    def page(self) -> str:
        """The tables, the course of training and the settings as HTML."""
        from rkl import plots
        from rkl.report import Section, Settings, figure_block, render

        figures = [
            figure_block(label, plots.training_curves(dict(curves), label=label))
            for label, curves in self.curves.items()
        ]
        sections: list[Section] = [Section("Figures", blocks=self.tables)]
        if figures:
            sections.append(Section("Training", blocks=figures))
        shown = [Settings(it, title=name) for name, it in self.settings.items()]
        return render("Comparison of flows", [*sections, Section("Settings", blocks=shown)])


def open_runs(
    paths: Sequence[str | os.PathLike], out: str | os.PathLike | None, overwrite: bool
) -> dict[str, Run]:
    """The runs in these folders, after a check that the page may be written.

    Raises:
        FileExistsError: A file of others is at ``out``.
        ValueError: There is no run.
    """
    if isinstance(paths, str | os.PathLike):
        raise TypeError(f"paths must be a list of folders; got one alone, {str(paths)!r}.")
    if not paths:
        raise ValueError("paths must name at least one run; got none.")
    if out is not None:
        check_out_file(out, overwrite=overwrite)
    return {str(path): Run.open(path) for path in paths}


def comparison(
    runs: Mapping[str, Run],
    tables: Iterable[Table],
    curves: Iterable[tuple[str, Any]],
    out: str | os.PathLike | None,
) -> FlowComparison:
    """The runs side by side, written as a page if ``out`` is given."""
    settings = {name: run.settings for name, run in runs.items()}
    result = FlowComparison(tuple(tables), dict(curves), settings)
    if out is not None:
        from rkl.report import write

        write(Path(out), result.page())
    return result


def curves_of(runs: Mapping[str, Run], name: str, label: str) -> Iterator[tuple[str, Any]]:
    """The course of one figure in training, of all runs, under its label."""
    curves = {}
    for path, run in runs.items():
        pairs = [(row["step"], row[name]) for row in run.metrics if row.get(name) is not None]
        if pairs:
            curves[path] = [it[0] for it in pairs], [it[1] for it in pairs]
    if curves:
        yield label, curves


def last_row(run: Run) -> Mapping[str, Any]:
    """The last row of ``metrics.jsonl``; empty where there is none."""
    return (run.metrics or [{}])[-1]


def setting_of(run: Run, name: str) -> Any:
    """A setting of a run.

    Raises:
        ValueError: Its ``run.json`` lacks the setting.
    """
    if name not in run.settings:
        raise ValueError(f"path: the run.json of {run.path} lacks the setting {name!r}.")
    return run.settings[name]

"""``rkl evaluate`` and ``rkl report`` for a flow fitted to data."""

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rkl import checks
from rkl.checks import warn
from rkl.fit.data import read_data
from rkl.fit.load import count_fitted, load_critic, load_point, load_run, settings_of
from rkl.fit.operating import draw_kept
from rkl.fit.settings import EvaluateSettings
from rkl.flows.precision import single_precision
from rkl.flows.rows import Data
from rkl.flows.runs import single_run, write_evaluation
from rkl.flows.standardise import Units
from rkl.importing import only
from rkl.metrics.samples import Measured, measure
from rkl.randomness import random_numbers
from rkl.readers import split_choice
from rkl.runs import REPORT, Run
from rkl.stats import Mean, mean, to_json
from rkl.tables import table_of, with_error

MEASURED = 5_000  # rows that are measured by their neighbours, at most
AT_ONCE = 10_000


@dataclass(frozen=True)
class DataEvaluation:
    """Figures of a flow on rows that it was not fitted to.

    Attributes:
        rows: Their number.
        rows_seen: Number of them that it was fitted to after all.
        log_density: Mean log-density of the rows, in nats.
        samples: Comparison of the flow's samples with the rows, and of rows with rows.
        notes: Notes for the user on how the rows were read.
        by_chance: Whether rows may equal those of the fit by chance: few columns, all of levels.
    """

    rows: int
    rows_seen: int
    log_density: Mean
    samples: Measured | None
    notes: tuple[str, ...] = ()
    by_chance: bool = False

    def __str__(self) -> str:
        density = with_error(*self.log_density)
        lines = [f"log-density  {density} nats per row, over {self.rows:,} rows"]
        if self.rows_seen and self.by_chance:
            lines.append(
                f"{self.rows_seen:,} of the rows equal rows that were fitted, as rows of so few "
                "levels may by chance"
            )
        elif self.rows_seen:
            lines.append(f"{self.rows_seen:,} of the rows were fitted: that is no held-out figure")
        lines += [f"data: {note}" for note in self.notes]
        return "\n".join([*lines, *(["", str(self.samples)] if self.samples else [])])

    def _repr_html_(self) -> str:
        figures = {"log-density (nats per row)": self.log_density, "rows": self.rows}
        seen = "rows equal to fitted ones" if self.by_chance else "rows that were fitted"
        figures |= {seen: self.rows_seen or None}
        own = table_of("The flow on these rows", figures, self.notes)
        return "\n".join(it._repr_html_() for it in (own, self.samples) if it is not None)

    def to_dict(self) -> dict[str, Any]:
        """All figures as a dict for JSON."""
        measured = None if self.samples is None else self.samples.to_dict()
        record = {"rows": self.rows, "rows_seen": self.rows_seen, "samples": measured}
        record |= {"notes": list(self.notes)}
        return record | {"log_density": to_json(self.log_density)}


@single_precision()
def evaluate_run(
    path: str | os.PathLike, settings: EvaluateSettings, *, allow: Collection[str] = ()
) -> DataEvaluation:
    """Measure the flow of a run on held-out rows, and write ``evaluation.json`` into the run.

    Args:
        path: The folder of the run.
        settings: The rows to measure on.
        allow: Names that its ``run.json`` may import, each "module:name".

    Raises:
        ValueError: The rows do not fit the run.
    """
    run, device = Run.open(path), checks.device(settings.device)
    evaluation = _evaluate_on_rows(run, settings, allow, device)
    write_evaluation(run, evaluation.to_dict())
    return evaluation


@torch.no_grad()
def _evaluate_on_rows(
    run: Run, settings: EvaluateSettings, allow: Collection[str], device: torch.device
) -> DataEvaluation:
    if settings.data is None:
        raise ValueError(f"data must be given: rows that {run.path} was not fitted to.")
    flow: Any = load_run(run.path, allow=allow)
    classes = run.record["data"]["classes"]
    how: dict[str, Any] = {"step": flow.units.step_of_rows(), "classes": classes}
    data = read_data(settings.data, settings.labels, **how)
    data = _in_order(run, data)
    if data.event_shape != tuple(flow.shift.shape):
        raise ValueError(
            f"data must have rows of shape {list(flow.shift.shape)}; got {list(data.event_shape)}."
        )
    flow.to(device)
    with random_numbers(settings.seed):
        spread = data.spread()
        places = torch.arange(len(data)).split(AT_ONCE)
        parts = [spread.rows(index).to(device) for index in places]
        laws = [flow() if it.condition is None else flow(it.condition) for it in parts]
        densities = [law.log_prob(it.values) for law, it in zip(laws, parts, strict=True)]
        log_q = torch.cat(densities).cpu()
        chosen = spread.rows(torch.randperm(len(data))[:MEASURED])
        drawn, notes = _draw_samples(run, flow, chosen.condition, len(chosen.values), allow)
        units = flow.units.cpu()  # as the rows and samples that are compared
        train = _trained_on(run, units, allow)
    samples = _sample_metrics(units, chosen.values, drawn, train, settings.seed)
    seen = count_fitted(run, data)
    if samples is not None:
        samples = replace(samples, notes=[*samples.notes, *notes])
    return DataEvaluation(len(data), seen, mean(log_q), samples, data.notes, data.ties)


def _draw_samples(
    run: Run, flow: Any, condition: Tensor | None, count: int, allow: Collection[str]
) -> tuple[Tensor, list[str]]:
    """Samples on the CPU, drawn on the device of the flow; and notes on them."""
    device = flow.shift.device
    condition = None if condition is None else condition.to(device)
    law = flow() if condition is None else flow(condition)
    point = load_point(run.path)
    if point is None:
        return law.sample(() if condition is not None else (count,)).cpu(), []
    critic = load_critic(run.path, allow=allow).to(device)
    drawn, made = draw_kept(law, critic, point.log_lam, count, condition)
    note = (
        f"Samples are at the operating point of the fit, {made / count:.3g} draws each; the "
        "log-density is the flow's, without rejection."
    )
    return drawn.cpu(), [note]


def _in_order(run: Run, data: Data) -> Data:
    """The rows with their columns in the order of the fit, by their names."""
    fitted = tuple(run.record["data"].get("columns", ()))
    if not fitted or not data.columns or data.columns == fitted:
        return data
    if sorted(data.columns) != sorted(fitted):
        raise ValueError(
            f"data must have the columns {', '.join(fitted[:8])}; got "
            f"{', '.join(data.columns[:8])}."
        )
    order = [data.columns.index(it) for it in fitted]
    return replace(data, values=data.values[:, order], columns=fitted)


def _sample_metrics(
    units: Units, real: Tensor, fake: Tensor, train: Tensor | None, seed: int
) -> Measured | None:
    """Metrics of samples in units of the spread, if there are enough rows."""
    if len(real) < 20:
        warn(f"{len(real)} rows are too few to measure samples by.")
        return None
    sides = {"real": real, "fake": fake.to(real.dtype)} | (
        {} if train is None else {"train": train}
    )
    free: dict[str, Any] = {name: units.spread_of(it).flatten(1) for name, it in sides.items()}
    return measure(**free, seed=seed)


def _trained_on(run: Run, units: Units, allow: Collection[str]) -> Tensor | None:
    settings, classes = settings_of(run, allow=allow), run.record["data"]["classes"]
    try:
        data = read_data(
            settings.data, settings.labels, step=units.step_of_rows(), classes=classes
        )
        rows = data.split(settings.held_out, settings.seed)[0]
    except (OSError, ValueError):  # it is other data by now
        return None
    first = rows.rows(torch.arange(min(len(rows), MEASURED)))
    return first.spread().values if count_fitted(run, first) == len(first) else None


def _exists(data: str) -> bool:
    """True if there is such a file, or one with such an array (FILE:NAME)."""
    try:
        split_choice(data)
    except FileNotFoundError:
        return False
    return True


def report_runs(
    paths: Sequence[str | os.PathLike],
    out: str | os.PathLike | None = None,
    *,
    allow: Collection[str] = (),
    overwrite: bool = False,
) -> Path:
    """Write the report of one run beside the rows that its fit held out, a single HTML file.

    Args:
        paths: The folder of the run.
        out: The file; ``report.html`` in the folder of the run by default.
        allow: Names that the ``run.json`` may import, each "module:name".
        overwrite: Replace a file of others there.
    """
    run = single_run(paths, out, overwrite)
    with only(allow, source=run.path / "run.json"):
        return _report_on_rows(run, out)


def _report_on_rows(run: Run, out: str | os.PathLike | None) -> Path:
    from rkl.fit.report import data_page
    from rkl.report import write

    settings, seed = run.settings, run.record["seed"]
    flow: Any = load_run(run.path)
    real, condition, train = None, None, None
    if _exists(settings["data"]):
        settings_kept = settings_of(run)
        classes = run.record["data"]["classes"]
        step = flow.units.step_of_rows()
        data = read_data(settings_kept.data, settings_kept.labels, step=step, classes=classes)
        trained_on, held_out = data.split(settings_kept.held_out, settings_kept.seed)
        with random_numbers(seed):
            chosen, some = (
                it.rows(torch.arange(min(len(it), MEASURED))).spread()
                for it in (held_out, trained_on)
            )
        train = some.values
        real, condition = chosen.values, chosen.condition
    elif run.record["data"]["classes"]:
        raise FileNotFoundError(f"data: {settings['data']} is gone, and with it the classes.")
    with torch.no_grad(), random_numbers(seed):
        count = MEASURED if real is None else len(real)
        fake, notes = _draw_samples(run, flow, condition, count, ())
    measured = None if real is None else _sample_metrics(flow.units, real, fake, train, seed)
    if measured is not None:
        measured = replace(measured, notes=[*measured.notes, *notes])
    free = None
    if real is not None:
        free = flow.units.spread_of(real).flatten(1), flow.units.spread_of(fake).flatten(1)
    real, fake = None if real is None else real.flatten(1), fake.flatten(1)
    place = run.path / REPORT if out is None else Path(out)
    write(place, data_page(real, fake, measured, run.metrics, run.record, free))
    return place

"""``rkl estimate``: from a posterior and a family to a table, and to a run with a report."""

import dataclasses
import glob
import os
import shlex
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rkl.bayes.act import Estimate, bayes_act
from rkl.bayes.draws import Draws, read_draws
from rkl.bayes.loss.between import parse_loss
from rkl.bayes.regions import Region
from rkl.bayes.report import RESULT, Shown, refuse_other_kinds, report_runs
from rkl.bayes.settings import EstimateSettings
from rkl.bayes.tables import Table
from rkl.checks import warn
from rkl.importing import only
from rkl.readers import place_of_nan, read
from rkl.runs import Run, check_out, finite_or_null, write_json
from rkl.runs.integrity import Input, check_inputs, files_of, inputs_before
from rkl.runs.typed import settings_from


@dataclass(frozen=True)
class Estimated:
    """The result of ``rkl estimate``, which prints as its tables.

    Attributes:
        estimate: The act with its errors.
        comparison: The act beside the other common estimates.
        region: The credible region.
        report: The report, where a run was asked for and the extra ``report`` is installed.
    """

    estimate: Estimate
    comparison: Table
    region: Region
    report: Path | None = None

    def __str__(self) -> str:
        parts = [str(self.estimate), str(self.region), str(self.comparison)]
        parts += [f"The report: {self.report}"] if self.report else []
        return "\n\n".join(parts)

    def _repr_html_(self) -> str:
        shown = self.estimate, self.region, self.comparison
        return "\n".join(part._repr_html_() for part in shown)

    def to_dict(self) -> dict[str, Any]:
        """The estimate, region and comparison, as JSON can hold them."""
        return {
            "estimate": self.estimate.to_dict(),
            "region": self.region.to_dict(),
            "comparison": finite_or_null(self.comparison.to_dict()),
        }


def estimate(
    settings: EstimateSettings, out: str | os.PathLike | None = None, *, overwrite: bool = False
) -> Estimated:
    """Estimate, and with ``out`` write a run folder with ``estimate.json`` and a report.

    Everything is computed before anything is written.
    """
    if out is not None:
        inputs = {"posterior": settings.posterior, "design": settings.design}
        inputs |= {f"further file {i}": it for i, it in enumerate(settings.further, 1)}
        check_out(out, overwrite=overwrite, resumable=False, inputs=inputs)
    result = answer(settings)
    if out is None:
        return result
    record = dataclasses.asdict(settings) | {
        name: None if path is None else str(path.resolve())
        for name, path in (("posterior", settings.posterior), ("design", settings.design))
    }
    record["further"] = [str(path.resolve()) for path in settings.further]
    run = Run.create(out, "bayes", record, seed=settings.seed, overwrite=overwrite)
    with run.running():
        run.update(inputs=_inputs(settings))
        Shown.of(result.estimate, result.region, result.comparison).write(run.path)
        write_json(run.path / RESULT, result.to_dict())
    return dataclasses.replace(result, report=_report(run))


def _report(run: Run) -> Path | None:
    """The report; without the packages for it a warning says what to type."""
    try:
        return report_runs([run.path])
    except ModuleNotFoundError as error:
        warn(f"{error}, then type rkl report {shlex.quote(str(run.path))}. No report was written.")
        return None


def _inputs(settings: EstimateSettings) -> dict[str, Input]:
    sources = [settings.posterior, *settings.further]
    files: dict[str, Path] = {}
    for number, source in enumerate(sources):
        within = f"{number}/" if len(sources) > 1 else ""
        files |= {f"{within}{name}": file for name, file in _files_of(source).items()}
    digests = {"posterior": files_of(settings.posterior, files)}
    if settings.design is not None:
        digests["design"] = files_of(settings.design, _files_of(settings.design))
    return digests


def _files_of(source: Path) -> dict[str, Path]:
    """A file, all files of a folder such as a .zarr, or those that a pattern fits, by name."""
    if source.is_dir():
        inside = [file for file in source.rglob("*") if file.is_file()]
        return {file.relative_to(source.parent).as_posix(): file for file in inside}
    if source.exists():
        return {source.name: source}
    return {Path(file).name: Path(file) for file in glob.glob(str(source))}


def answer(settings: EstimateSettings) -> Estimated:
    """The estimate, compared and with its region; nothing is written."""
    losses = [parse_loss(text) for text in settings.losses] or None
    draws = _draws(settings)
    if settings.log_posterior is not None:
        draws.of(settings.log_posterior)  # refused before anything is computed
    made = estimate_act(settings, draws)
    compared = made.compare(settings.log_posterior, losses)
    return Estimated(made, compared, made.region(settings.prob))


def _draws(settings: EstimateSettings) -> Draws:
    if not settings.further:
        return read_draws(settings.posterior)
    try:
        return read_draws([settings.posterior, *settings.further])
    except ValueError as error:
        raise ValueError(f"further: {error}") from None


def estimate_act(settings: EstimateSettings, draws: Draws | None = None) -> Estimate:
    """The act that the settings ask for, without comparison and region."""
    draws = _draws(settings) if draws is None else draws
    if settings.weights is not None:
        draws = read_draws(draws, draws[settings.weights])
    loss, design = settings.loss, _design(settings.design)
    return bayes_act(draws, settings.family, loss, design=design, seed=settings.seed)


def load_run(path: str | os.PathLike, *, allow: Collection[str] = ()) -> Estimate:
    """The estimate of a run, computed again from its posterior.

    Args:
        path: The folder of the run.
        allow: Names that its ``run.json`` may import, each "module:name".
    """
    run = Run.open(path)
    with only(allow, source=run.path / "run.json"):
        settings = settings_of(run)
        if before := inputs_before(run.path):
            advice = "Put it back, or estimate from it anew: rkl estimate POSTERIOR --out RUN2."
            check_inputs(run.path, before, _inputs(settings), argument="path", advice=advice)
        return estimate_act(settings)


def settings_of(run: Run) -> EstimateSettings:
    """The settings that a run keeps."""
    refuse_other_kinds(run)
    return settings_from(EstimateSettings, run.settings, run.path / "run.json")


def _design(path: Path | None) -> Any:
    if path is None:
        return None
    contents = read(path, name="design")
    for note in contents.notes:
        warn(f"design: {path}: {note}.")
    where = place_of_nan(contents.values, contents.columns)
    if where is not None:
        raise ValueError(f"design: {path} must hold finite numbers; {where}.")
    design = np.asarray(contents.values, np.float64).view(Design)
    design.columns = tuple(contents.columns)
    return design


class Design(np.ndarray):
    """A design matrix with the names of its columns; a family that is a function gets numbers."""

    columns: tuple[str, ...] = ()

"""``rkl estimate``: from a posterior and a family to a table, and to a run with a report."""

import dataclasses
import glob
import json
import math
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rkl.bayes.act import Estimate, bayes_act
from rkl.bayes.answer import elements
from rkl.bayes.compare import excess_over, side_by_side, variables_of
from rkl.bayes.draws import Draws, read_draws
from rkl.bayes.identified import joined_labels, labels_in, not_used
from rkl.bayes.loss.between import AnyLoss, parse_loss
from rkl.bayes.regions import Region
from rkl.bayes.report import Shown, page
from rkl.bayes.tables import Cell, Table, number_or_nan
from rkl.checks import LARGEST_SEED, integer
from rkl.importing import only
from rkl.readers import place_of_nan, read
from rkl.runs import REPORT, Run, check_out, check_out_file, write_json
from rkl.runs.integrity import Input, check_inputs, files_of, inputs_before
from rkl.runs.typed import settings_from

RESULT = "estimate.json"
WHOLE = ".nc", ".zarr", ".npz"  # files of draws that hold every chain


@dataclass(frozen=True)
class EstimateSettings:
    """What is estimated, of what posterior, under which loss.

    Args:
        posterior: Draws: .nc or .zarr as ArviZ writes them, an .npz, a table from R with .chain
            and .iteration, or CmdStan's .csv, several or a pattern.
        family: Law of an experiment given the parameters, which are called as the draws are:
            "normal(loc=mu, scale=sigma)", or of a regression with its design
            "poisson-regression(coefficients=[Intercept, x1])".
        divergence: Loss between a draw's law and the reported one: a divergence, or intrinsic.
        prob: Posterior probability of the credible region.
        losses: Losses of the comparison, such as js intrinsic; by default five, without what takes
            minutes.
        log_posterior: Variable that holds the log posterior density of each draw, such as lp;
            without it there is no posterior mode to compare with.
        weights: Variable that holds the weight of each draw, if they are weighted.
        design: Design matrix of a regression: .npy, .csv, or another table of numbers. The family
            may name columns of it: offset=NAME, exposure=NAME, trials=NAME.
        further: More files of CmdStan, each one chain more.
        seed: Of the random numbers of a family whose divergences need some.
        device: Where to compute.
    """

    posterior: Path = field(metadata={"positional": True, "metavar": "POSTERIOR"})
    family: str = field(metadata={"metavar": "LAW"})
    divergence: str = field(default="reverse-kl", metadata={"metavar": "D"})
    prob: float = field(default=0.9, metadata={"metavar": "P"})
    losses: tuple[str, ...] = field(default=(), metadata={"metavar": "D"})
    log_posterior: str | None = field(default=None, metadata={"metavar": "NAME"})
    weights: str | None = field(default=None, metadata={"metavar": "NAME"})
    design: Path | None = field(default=None, metadata={"metavar": "FILE"})
    further: tuple[Path, ...] = field(default=(), metadata={"metavar": "FILE"})
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self):
        for name in ("posterior", "design"):
            path = getattr(self, name)
            object.__setattr__(self, name, None if path is None else Path(path))
        object.__setattr__(self, "further", tuple(map(Path, self.further)))
        if isinstance(self.prob, bool) or not isinstance(self.prob, int | float):
            raise TypeError(f"prob must be a number; got {self.prob!r}.")
        if not 0 < self.prob < 1:
            raise ValueError(f"prob must lie strictly between 0 and 1; got {self.prob}.")
        integer("seed", self.seed, at_most=LARGEST_SEED)
        if self.device != "cpu":
            raise ValueError(
                f"device must be cpu, where double precision is at home; got {self.device!r}."
            )

    @property
    def loss(self) -> AnyLoss:
        """The divergence, or the intrinsic loss."""
        return parse_loss(self.divergence)


@dataclass(frozen=True)
class Estimated:
    """What was estimated, which prints as its tables.

    Attributes:
        estimate: The act with its errors.
        comparison: The act beside the other common estimates.
        region: The credible region.
        report: The report, where a run was asked for.
    """

    estimate: Estimate
    comparison: Table
    region: Region
    report: Path | None = None

    def __str__(self) -> str:
        parts = [str(self.estimate), str(self.region), str(self.comparison)]
        parts += [f"The report: {self.report}"] if self.report else []
        return "\n\n".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """All of it, as JSON can hold it."""
        return {
            "estimate": self.estimate.to_dict(),
            "region": self.region.to_dict(),
            "comparison": self.comparison.to_dict(),
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
    found = answer(settings)
    if out is None:
        return found
    kept = dataclasses.asdict(settings) | {
        name: None if path is None else str(path.resolve())
        for name, path in (("posterior", settings.posterior), ("design", settings.design))
    }
    kept["further"] = [str(path.resolve()) for path in settings.further]
    run = Run.create(out, "bayes", kept, seed=settings.seed, overwrite=overwrite)
    with run.running():
        run.update(inputs=_inputs(settings))
        Shown.of(found.estimate, found.region, found.comparison).write(run.path)
        write_json(run.path / RESULT, found.to_dict())
    return dataclasses.replace(found, report=report_runs([run.path]))


def _inputs(settings: EstimateSettings) -> dict[str, Input]:
    """The digests of the files of draws, and of the design matrix."""
    sources = [settings.posterior, *settings.further]
    files: dict[str, Path] = {}
    for number, source in enumerate(sources):
        within = f"{number}/" if len(sources) > 1 else ""
        files |= {f"{within}{name}": file for name, file in _files_of(source).items()}
    found = {"posterior": files_of(settings.posterior, files)}
    if settings.design is not None:
        found["design"] = files_of(settings.design, _files_of(settings.design))
    return found


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
    made = _act(settings, draws)
    compared = made.compare(settings.log_posterior, losses)
    return Estimated(made, compared, made.region(settings.prob))


def _draws(settings: EstimateSettings) -> Draws:
    files = [settings.posterior, *settings.further]
    whole = [it for it in files if it.suffix in WHOLE]
    if settings.further and whole:
        raise ValueError(
            f"further: several files must be tables of CmdStan, a chain in each; got {whole[0]}, "
            "which is read alone."
        )
    return read_draws(files if settings.further else settings.posterior)


def _act(settings: EstimateSettings, draws: Draws | None = None) -> Estimate:
    draws = _draws(settings) if draws is None else draws
    if settings.weights is not None:
        draws = read_draws(draws, draws[settings.weights])
    loss, design = settings.loss, _design(settings.design)
    return bayes_act(draws, settings.family, loss, design=design, seed=settings.seed)


def load_run(path: str | os.PathLike, *, allow: Collection[str] = ()) -> Estimate:
    """The estimate of a run, made again from its posterior.

    Args:
        path: The folder of the run.
        allow: What its ``run.json`` may have imported, each "module:name".
    """
    run = Run.open(path)
    with only(allow, source=run.path / "run.json"):
        settings = _settings(run)
        if before := inputs_before(run.path):
            advice = "Put it back, or estimate from it anew: rkl estimate POSTERIOR --out RUN2."
            check_inputs(run.path, before, _inputs(settings), argument="path", advice=advice)
        return _act(settings)


@dataclass(frozen=True)
class EvaluateSettings:
    """What ``rkl evaluate`` is told of an estimate.

    Args:
        posterior: Other draws of the same variables: of another model, or of later data.
    """

    posterior: Path
    seed: int = 0
    device: str = "cpu"


def evaluate_run(
    path: str | os.PathLike, settings: EvaluateSettings, *, allow: Collection[str] = ()
) -> Table:
    """What was reported, judged by other draws: by how much their own act would be better.

    Args:
        path: The folder of the run.
        settings: The other draws.
        allow: What its ``run.json`` may have imported, each "module:name".
    """
    run = Run.open(path)
    there = dataclasses.replace(
        _settings(run),
        posterior=settings.posterior,
        further=(),
        seed=settings.seed,
        device=settings.device,
    )
    kept = _result(run)["estimate"]["act"]
    with only(allow, source=run.path / "run.json"):
        own = _act(there)
    reported = {name: number_or_nan(kept[name]["value"]) for name in own.question.model.names}
    for name, value in reported.items():
        if value.shape != own.act[name].shape:
            raise ValueError(
                f"posterior must hold {name} as the run's did, {list(value.shape)}; "
                f"got {list(own.act[name].shape)}."
            )
    here = variables_of(own)
    # no value was reported of what the distribution does not depend on, and any serves
    filled = {name: torch.where(x.isnan(), here[name], x) for name, x in reported.items()}
    candidates = {"as reported": filled, "of these draws": here}
    unused = {
        "as reported": {name: x.isnan() for name, x in reported.items()},
        "of these draws": own.act.unused,
    }
    judges = {str(own.divergence): excess_over(own)}
    told = not_used(own.act.unused, own.labels)
    return side_by_side(own.question, candidates, judges, (told,) if told else (), unused)


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
    table = _side_by_side(_opened(paths))
    if out is None:
        return str(table)
    return f"{table}\n\nThe report: {report_runs(paths, out, overwrite=overwrite)}"


def _side_by_side(runs: Sequence[Run]) -> Table:
    """The acts of several runs: a row for every number of every variable."""
    results = {str(run.path): _result(run)["estimate"] for run in runs}
    rows: dict[str, dict[str, Cell]] = {}
    for place, kept in results.items():
        for name in kept["variables"]:
            for label, cell in _numbers_of(kept, name).items():
                rows.setdefault(label, {})[place] = cell
    said = [("loss", *(kept["divergence"] for kept in results.values()))]
    if len({kept["family"] for kept in results.values()}) > 1:
        said.insert(0, ("family", *(kept["family"] for kept in results.values())))
    numbers = [(label, *(cells.get(place) for place in results)) for label, cells in rows.items()]
    told = [
        f"{place}: {joined_labels(labels)} not used by the family"
        for place, kept in results.items()
        if (labels := _unused_of(kept))
    ]
    return Table("Bayes acts", ("parameter", *results), [*said, *numbers], told)


def _unused_of(kept: dict[str, Any]) -> list[str]:
    """The labels of what the act of a run does not depend on."""
    masks = {k: torch.tensor(mask) for k, mask in kept.get("unused", {}).items()}
    return labels_in(masks, lambda name: kept["labels"][name])


def _numbers_of(kept: dict[str, Any], name: str) -> dict[str, Cell]:
    """The numbers of one variable of an act, by label, with their errors."""
    value, error = (np.asarray(kept["act"][name][key], np.float64) for key in ("value", "error"))
    labels = kept.get("labels", {}).get(name) or elements(name, torch.Size(value.shape))
    pairs = zip(value.flatten().tolist(), error.flatten().tolist(), strict=True)
    return {k: pair for k, pair in zip(labels, pairs, strict=True) if not math.isnan(pair[0])}


def report_runs(
    paths: Sequence[str | os.PathLike],
    out: str | os.PathLike | None = None,
    *,
    overwrite: bool = False,
) -> Path:
    """Write the report of one run or several, a single HTML file, of what they kept.

    Args:
        paths: Folders of runs.
        out: The file; ``report.html`` in the folder of the run if there is only one.
        overwrite: Replaces a file of others there.
    """
    from rkl.report import write

    runs = _opened(paths)
    if out is None and len(runs) > 1:
        raise ValueError(f"out must say where the report of {len(runs)} runs goes.")
    place = runs[0].path / REPORT if out is None else Path(out)
    check_out_file(place, overwrite=overwrite, own=REPORT)
    found = {str(run.path): Shown.read(run.path) for run in runs}
    table = _side_by_side(runs) if len(runs) > 1 else None
    write(place, page(found, [run.record for run in runs], table))
    return place


def _opened(paths: Sequence[str | os.PathLike]) -> list[Run]:
    if isinstance(paths, str | os.PathLike):
        raise TypeError(f"paths must be a list of folders; got one alone, {str(paths)!r}.")
    if not paths:
        raise ValueError("paths must name at least one run; got none.")
    runs = [Run.open(path) for path in dict.fromkeys(map(Path, paths))]  # each once
    for run in runs:
        _refuse_others(run)
    return runs


def _refuse_others(run: Run) -> None:
    if run.kind != "bayes":
        raise ValueError(f"path: {run.path} is a run of kind {run.kind!r}; expected 'bayes'.")


def _settings(run: Run) -> EstimateSettings:
    _refuse_others(run)
    return settings_from(EstimateSettings, run.settings, run.path / "run.json")


def _result(run: Run) -> dict[str, Any]:
    path = run.path / RESULT
    if not path.exists():
        raise FileNotFoundError(f"path: {run.path} has no {RESULT}: the run was not finished.")
    run.check_files(RESULT)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"path: {path} cannot be read as JSON: {error}.") from error


def _design(path: Path | None) -> Any:
    if path is None:
        return None
    found = read(path, name="design")
    where = place_of_nan(found.values, found.columns)
    if where is not None:
        raise ValueError(f"design: {path} must hold finite numbers; {where}.")
    design = np.asarray(found.values, np.float64).view(Design)
    design.columns = tuple(found.columns)
    return design


class Design(np.ndarray):
    """A design matrix with the names of its columns; a family that is a function gets numbers."""

    columns: tuple[str, ...] = ()

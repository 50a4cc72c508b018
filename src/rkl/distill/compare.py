"""Measurements of one run or several, as a table and as figures."""

import functools
import json
import math
import operator
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rkl.checks import warn
from rkl.runs import Run, check_out_file
from rkl.tables import Cell, Table, nan_of_null, pair_of

if TYPE_CHECKING:
    from rkl.report import Section

BY_BLOCK = "evaluation-blocks.safetensors"

# What the table says, and where a result holds it: of teacher and student, or of the student.
_OF_BOTH = {
    "perplexity": "perplexity",
    "cross-entropy (nats/token)": "cross_entropy",
    "entropy (nats/token)": "entropy",
    "mass in the teacher's head": "mass_in_head",
}
_OF_STUDENT = {
    "top-1 agreement": ("top1_agreement",),
    "student's mass in the teacher's nucleus": ("mass_in_nucleus", "student"),
    "teacher's mass in the student's nucleus": ("mass_in_nucleus", "teacher"),
}
_OF_REPLIES = {
    "ROUGE-L": "rouge_l",
    "Distinct-1": "distinct_1",
    "Distinct-2": "distinct_2",
    "Distinct-2 within a reply": "distinct_2_within",
    "Self-BLEU": "self_bleu",
    "length (tokens)": "length",
}


@dataclass(frozen=True)
class Evaluations:
    """Results of :func:`rkl.distill.evaluate_run`, by the name of their run; prints as a table.

    Attributes:
        results: Under each run's name, what its ``evaluation.json`` holds.
        gaps: The commands that measure what was measured of other runs alone.
        by_block: Under each run's name, sums over the blocks of text that it was measured on.
    """

    results: Mapping[str, Mapping[str, Any]]
    gaps: Sequence[str] = ()
    by_block: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def rows(self) -> list[tuple[Cell, ...]]:
        """The table: what is measured, the teacher's value, and each student's.

        A value with a standard error is a pair. The teacher's is left out where the runs had
        different teachers or data.
        """
        results = list(self.results.values())
        alike = all(_is_same(results, key) for key in ("perplexity", "entropy"))
        table = []
        for words, key in _OF_BOTH.items():
            teacher = pair_of(results[0][key]["teacher"]) if alike else None
            table.append((words, teacher, *(pair_of(it[key]["student"]) for it in results)))
        for words, keys in _OF_STUDENT.items():
            means = (functools.reduce(operator.getitem, keys, it) for it in results)
            table.append((words, None, *map(pair_of, means)))
        names = dict.fromkeys(name for result in results for name in result["divergences"])
        for name in names:
            found = [result["divergences"].get(name) for result in results]
            table += _divergence_rows(name, found)
        if any("generations" in result for result in results):
            for words, key in _OF_REPLIES.items():
                cells = (pair_of(result.get("generations", {}).get(key)) for result in results)
                table.append((words, None, *cells))
        return table

    def paired(self) -> bool:
        """True if all runs were measured on the same tokens in the same blocks."""
        import torch

        found = [self.by_block.get(name) for name in self.results]
        keys = "tokens", "digest"
        return len(found) > 1 and all(
            it is not None and all(torch.equal(it[key], (found[0] or {})[key]) for key in keys)
            for it in found
        )

    def difference(self, name: str, run: str, other: str) -> tuple[float, float] | None:
        """One run's mean of something less another's, with the error of paired blocks.

        What makes a block of text hard for one student makes it hard for the other, so that
        their difference varies less from block to block than either of them.

        Args:
            name: A column of ``by_block``, such as "forward-kl:all" or "student.cross_entropy".
            run: A run.
            other: The run that is subtracted.

        Returns:
            The difference and its standard error; None where it was not measured of both.
        """
        from rkl.stats import clustered_mean

        a, b = (self.by_block.get(it, {}) for it in (run, other))
        if not self.paired() or name not in a or name not in b:
            return None
        kept = a["tokens"] > 0
        found = clustered_mean((a[name] - b[name])[kept], a["tokens"][kept])
        return found.pair()

    def differences(self) -> list[tuple[Cell, ...]]:
        """A table of each run's differences from the first one; empty where none are paired."""
        first, *others = self.results
        if not self.paired():
            return []
        names = dict(_PAIRED)
        for result in self.results.values():
            units = {
                it: "share of mass" if it == "tv" else "nats/token" for it in result["divergences"]
            }
            names |= {f"{it} ({unit})": f"{it}:all" for it, unit in units.items()}
        rows: list[tuple[Cell, ...]] = []
        for words, name in names.items():
            cells = [self.difference(name, other, first) for other in others]
            if any(cell is not None for cell in cells):
                rows.append((words, *cells))
        return rows

    def tables(self) -> list[Table]:
        """The results of every run and, where they are paired, differences from the first."""
        gaps = (_GAPS_SAY, *self.gaps) if self.gaps else ()
        columns = "", "teacher", *self.results
        tables = [Table("Held-out data", columns, self.rows(), (_TABLE_SAYS, *gaps))]
        if rows := self.differences():
            first, *others = self.results
            title = f"Difference from {first}, paired by block"
            tables.append(Table(title, ("", *others), rows, _PAIRED_SAYS))
        return tables

    def __str__(self) -> str:
        text = [table.text() for table in self.tables()]
        if len(self.results) > 1 and len(text) == 1:
            text.append(_NOT_PAIRED)
        return "\n\n".join(text)

    def _repr_html_(self) -> str:
        return "\n".join(table._repr_html_() for table in self.tables())

    def precision_recall(self) -> dict[str, Any]:
        """The arguments of :func:`rkl.plots.precision_recall`, bands of two standard errors."""
        curves, bands = {}, {}
        for name, result in self.results.items():
            curve = result["precision_recall"]
            values, errors, recall = map(
                nan_of_null,
                (
                    curve["precision"]["value"],
                    curve["precision"]["error"],
                    curve["recall"]["value"],
                ),
            )
            curves[name] = values, recall
            pairs = list(zip(values, errors, strict=True))
            bands[name] = [v - 2 * e for v, e in pairs], [v + 2 * e for v, e in pairs]
        return {"students": curves, "bands": bands}

    def divergence_by_rank(self, divergence: str) -> dict[str, Any]:
        """The arguments of :func:`rkl.plots.divergence_by_rank` for one divergence, by name."""
        edges = {tuple(result["ranks"]["edges"]) for result in self.results.values()}
        if len(edges) > 1:
            raise ValueError("The runs have vocabularies of different sizes: no ranks in common.")
        bins = {
            name: result["divergences"][divergence]["by_rank"]
            for name, result in self.results.items()
        }
        return {
            "edges": list(edges.pop()),
            "students": {name: nan_of_null(it["value"]) for name, it in bins.items()},
            "errors": {name: nan_of_null(it["error"]) for name, it in bins.items()},
            "label": f"{divergence} (nats per token)",
        }

    def sections(self) -> list["Section"]:
        """The results as sections of a report: the table, then the figures."""
        from rkl import plots
        from rkl.report import Section, figure_block

        curve = plots.precision_recall(**self.precision_recall())
        figures = [figure_block("Precision and recall of the students", curve, _CURVE_SAYS)]
        for name in ("forward-kl", "reverse-kl"):
            if all(name in result["divergences"] for result in self.results.values()):
                drawing = plots.divergence_by_rank(**self.divergence_by_rank(name))
                figures.append(
                    figure_block(f"{name} by rank under the teacher", drawing, _RANKS_SAY)
                )
        return [Section("Held-out evaluation", blocks=[*self.tables(), *figures])]


# What is compared in pairs beside divergences, and the column that has it block by block.
_PAIRED = {
    "cross-entropy (nats/token)": "student.cross_entropy",
    "top-1 agreement": "top1",
    "student's mass in the teacher's nucleus": "student.in_nucleus",
    "teacher's mass in the student's nucleus": "teacher.in_nucleus",
}
_PAIRED_SAYS = (
    "Each run's mean less that of the first one, with the standard error of their difference: "
    "they were measured on the same blocks of text, and vary together from block to block."
)
_NOT_PAIRED = (
    "The runs were not measured on the same blocks of text, or by an older rkl: their differences "
    "have no paired errors."
)
_TABLE_SAYS = (
    "Means per token over held-out text, with standard errors that take blocks of text as "
    "independent; replies: over prompts, or over seeds where only a whole set has a value."
)
_GAPS_SAY = "Not all runs were measured under the same divergences. To fill the gaps:"
_CURVE_SAYS = (
    "Each point is one slope λ: precision Σ min(λp, q) is the share of what the student says "
    "that the teacher would, recall the share of what the teacher says that the student can."
)
_RANKS_SAY = (
    "Where the divergence comes from: each bin holds the tokens of those ranks in the teacher's "
    "order, and the bins add up to the whole."
)


def compare_runs(
    paths: Sequence[str | os.PathLike],
    out: str | os.PathLike | None = None,
    *,
    overwrite: bool = False,
) -> Evaluations:
    """The evaluations of several runs side by side.

    Args:
        paths: Folders of runs, each evaluated before.
        out: An HTML file to write the table and the figures to.
        overwrite: Replaces a file of others there.
    """
    if not paths:
        raise ValueError("paths must name at least one run; got none.")
    if out is not None:
        check_out_file(out, overwrite=overwrite)
    evaluations = evaluations_of(dict(zip(names_of(paths), paths, strict=True)))
    if out is not None:
        from rkl.report import render, write

        write(Path(out), render("Comparison of runs", evaluations.sections()))
    return evaluations


def evaluations_of(paths: Mapping[str, str | os.PathLike]) -> Evaluations:
    """The stored evaluations of runs, and the command that computes a missing one."""
    results = {name: result_of(path) for name, path in paths.items()}
    by_block = {name: it for name, path in paths.items() if (it := _by_block(path)) is not None}
    if len({result["data"]["fingerprint"] for result in results.values()}) > 1:
        warn("The runs were evaluated on different data; their values cannot be compared.")
    measured = dict.fromkeys(it for result in results.values() for it in result["divergences"])
    gaps = []
    for name, result in results.items():
        if missing := [it for it in measured if it not in result["divergences"]]:
            file = Path(paths[name], "evaluation.json")
            words = ["rkl", "evaluate", paths[name], "--config", file, "--divergences"]
            words += [*result["settings"]["divergences"], *missing]
            gaps.append(shlex.join(map(str, words)))
    return Evaluations(results, gaps, by_block)


def _by_block(path: str | os.PathLike) -> dict[str, Any] | None:
    """Sums over the blocks that a run was measured on, where they were kept."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = Path(path, BY_BLOCK)
    try:
        return load_file(file) if file.exists() else None
    except SafetensorError as error:
        raise ValueError(f"path: {file} is corrupt: {error}.") from None


def names_of(paths: Sequence[str | os.PathLike]) -> list[str]:
    """The last part of each path, or the whole of it where two would be called the same."""
    if isinstance(paths, str | os.PathLike):
        raise TypeError(f"paths must be a list of folders; got one alone, {str(paths)!r}.")
    short = [Path(path).resolve().name for path in paths]
    return short if len(set(short)) == len(short) else [str(path) for path in paths]


def result_of(path: str | os.PathLike) -> dict[str, Any]:
    """The contents of a run's ``evaluation.json``."""
    file = Run.open(path).path / "evaluation.json"
    if not file.exists():
        raise FileNotFoundError(
            f"path: {path} has not been evaluated: "
            f"rkl evaluate {shlex.quote(str(path))} --data D does it."
        )
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"path: {file} is corrupt: {error}.") from None


def _is_same(results: Sequence[Mapping[str, Any]], key: str) -> bool:
    """True if the teachers of all results have the same value, or all an infinite one."""
    values = nan_of_null([result[key]["teacher"]["value"] for result in results])
    finite = [value for value in values if math.isfinite(value)]
    if len(finite) < len(values):
        return not finite
    return max(finite) - min(finite) <= 1e-6 * max(finite)


def _divergence_rows(
    name: str, found: Sequence[Mapping[str, Any] | None]
) -> list[tuple[Cell, ...]]:
    unit = "share of mass" if name == "tv" else "nats/token"
    rows: list[tuple[Cell, ...]] = [(f"{name} ({unit})", None, *map(pair_of, found))]
    for part in ("head", "tail"):
        cells = (None if it is None else pair_of(it[part]) for it in found)
        rows.append((f"  of it in the {part}", None, *cells))
    if any(it and it["infinite_tokens"] for it in found):
        cells = (None if it is None else it["infinite_tokens"] for it in found)
        rows.append(("  tokens where infinite", None, *cells))
    return rows

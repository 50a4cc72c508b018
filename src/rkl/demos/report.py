"""The report of a demonstration, made from its folder alone."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file

from rkl.demos.watched import WATCHED
from rkl.distill.compare import Evaluations, evaluations_of, result_of
from rkl.distill.report import curve_of, replies_section, settings_section, training_section
from rkl.runs import REPORT, Run, check_out_file, read_jsonl
from rkl.tables import Table, cell_text, pair_of

if TYPE_CHECKING:
    from rkl.report import Block, Section

REPLIES = "teacher-generations.jsonl"
CLEAR = 2.0  # standard errors of the difference beyond which the best is called so


@dataclass(frozen=True)
class Verdict:
    """The best student by one measure.

    Attributes:
        measure: Name of the measure.
        best: The best run.
        value: Its value and standard error.
        second: The second best run.
        second_value: Its value and standard error.
        paired: Their difference and its error, block by block of the same text, where it is known.
    """

    measure: str
    best: str
    value: tuple[float, float]
    second: str
    second_value: tuple[float, float]
    paired: tuple[float, float] | None = None

    @property
    def apart(self) -> float:
        """The difference of the two over its standard error."""
        if self.paired is not None and self.paired[1]:
            return abs(self.paired[0]) / self.paired[1]
        error = math.hypot(self.value[1], self.second_value[1])
        return abs(self.value[0] - self.second_value[0]) / error if error else math.inf

    @property
    def clear(self) -> bool:
        """True if the best one is ahead by more than noise."""
        return self.apart > CLEAR


def report_runs(
    paths: Sequence[str | os.PathLike],
    out: str | os.PathLike | None = None,
    *,
    overwrite: bool = False,
) -> Path:
    """Write the report of a demonstration, a single HTML file.

    Args:
        paths: Its folder; one.
        out: The file; ``report.html`` in the folder by default.
        overwrite: Replaces a file of others there.

    Returns:
        The file.
    """
    from rkl.report import render, write

    if len(paths) != 1:
        raise ValueError(f"paths must be the folder of one demonstration; got {len(paths)}.")
    whole = Run.open(paths[0])
    _check_names(whole)
    place = whole.path / REPORT if out is None else Path(out)
    check_out_file(place, overwrite=overwrite, own=REPORT)
    students, before = list(whole.settings["divergences"]), whole.settings["before"]
    evaluations = results_of(whole)
    best = verdicts({name: evaluations.results[name] for name in students}, evaluations)
    sections = [
        *_with_first(evaluations.sections(), _best_table(best)),
        _training(whole, students, before),
        _head_tail(whole, students),
        *replies_section(_replies(whole, [before, *students])),
        _settings(whole, students),
    ]
    title = f"One student, {len(students)} divergences"
    write(place, render(title, sections, lead=summary(whole, best), points=points(whole, best)))
    return place


def markdown(whole: Run) -> str:
    """The figures of the evaluations as a Markdown table."""
    return results_of(whole).tables()[0].to_markdown()


def _check_names(whole: Run) -> None:
    names, before = (whole.settings.get(it) for it in ("divergences", "before"))
    named = [*names, before] if isinstance(names, dict | list) and names else [None]
    if not all(isinstance(it, str) and Path(it).name == it for it in named):
        raise ValueError(
            f"path: {whole.path} is no demonstration to report: the settings in its run.json must "
            "name the runs in it, as divergences and before."
        )
    if not isinstance(whole.record.get("done"), str):
        raise ValueError(f"path: {whole.path} has no account of what was done: it was not begun.")


def results_of(whole: Run) -> Evaluations:
    """The evaluations of a demonstration's runs, the one before distillation last."""
    names = *whole.settings["divergences"], whole.settings["before"]
    return evaluations_of({name: whole.path / name for name in names})


def verdicts(
    results: Mapping[str, Mapping[str, Any]], evaluations: Evaluations | None = None
) -> list[Verdict]:
    """The best student by each measure, from the evaluations.

    Args:
        results: Evaluation of each student.
        evaluations: Pairs students block by block; without it they are taken as independent.
    """
    best = [
        _verdict(words, {name: value(it) for name, it in results.items()}, sign)
        for words, (value, sign) in _MEASURES.items()
    ]
    for name in next(iter(results.values()))["divergences"]:
        values = {run: it["divergences"][name] for run, it in results.items()}
        best.append(_verdict(f"divergence {name}", values, -1))
    if all("generations" in it for it in results.values()):
        values = {run: it["generations"]["rouge_l"] for run, it in results.items()}
        best.append(_verdict("ROUGE-L of replies", values, 1))
    return [_in_pairs(it, evaluations) for it in best] if evaluations is not None else best


def _in_pairs(verdict: Verdict, evaluations: Evaluations) -> Verdict:
    """The same with the difference of the two runs, block by block."""
    measure = verdict.measure
    column = _COLUMNS.get(measure, f"{measure.removeprefix('divergence ')}:all")
    return replace(verdict, paired=evaluations.difference(column, verdict.best, verdict.second))


# What a measure is called among the sums over blocks; of perplexity it is the logarithm.
_COLUMNS = {
    "perplexity": "student.cross_entropy",
    "top-1 agreement": "top1",
    "precision (its mass in the teacher's nucleus)": "student.in_nucleus",
    "recall (the teacher's mass in its nucleus)": "teacher.in_nucleus",
}


# What has a best: where a result holds it, and whether more (1) or less (-1) is better.
_MEASURES = {
    "perplexity": (lambda it: it["perplexity"]["student"], -1),
    "top-1 agreement": (lambda it: it["top1_agreement"], 1),
    "precision (its mass in the teacher's nucleus)": (
        lambda it: it["mass_in_nucleus"]["student"],
        1,
    ),
    "recall (the teacher's mass in its nucleus)": (lambda it: it["mass_in_nucleus"]["teacher"], 1),
}


def _verdict(measure: str, values: Mapping[str, Mapping[str, Any]], sign: int) -> Verdict:
    ranked = sorted(values, key=lambda name: -sign * values[name]["value"])
    pairs = [pair_of(values[name]) for name in ranked[:2]]
    return Verdict(measure, ranked[0], pairs[0], ranked[1], pairs[1])


def summary(whole: Run, best: Sequence[Verdict]) -> str:
    """Head of the report: what was done, and how many differences exceed noise."""
    clear = sum(it.clear for it in best)
    return (
        f"{whole.record['done']} On held-out text the best student is more than {CLEAR:g} "
        f"standard errors ahead of the next at {clear} of {len(best)} measures."
    )


def points(whole: Run, best: Sequence[Verdict]) -> list[str]:
    """List under the head: the measures at which each student is best."""
    clear = [it for it in best if it.clear]
    lines = []
    for name in whole.settings["divergences"]:
        if mine := [it.measure for it in clear if it.best == name]:
            lines.append(f"{name} is best at {', '.join(mine)}.")
    close = [f"{it.measure} ({it.best}, then {it.second})" for it in best if not it.clear]
    if close:
        lines.append(f"The best two are within {CLEAR:g} standard errors at {', '.join(close)}.")
    return [*lines, _entropies(whole)]


def _entropies(whole: Run) -> str:
    """The lowest and the highest entropy; neither is good or bad by itself."""
    results = {name: result_of(whole.path / name) for name in whole.settings["divergences"]}
    entropy = {name: pair_of(it["entropy"]["student"]) for name, it in results.items()}
    teacher = pair_of(next(iter(results.values()))["entropy"]["teacher"])
    ranked = sorted(entropy, key=lambda name: results[name]["entropy"]["student"]["value"])
    low, high = ranked[0], ranked[-1]
    least, most, of_teacher = (
        cell_text(cell, plus_minus=True) for cell in (entropy[low], entropy[high], teacher)
    )
    return (
        f"The teacher's entropy is {of_teacher} nats per token; of the students, {low} has "
        f"the lowest, {least}, and {high} the highest, {most}."
    )


def _best_table(best: Sequence[Verdict]) -> Table:

    columns = ["measure", "best", "its value", "second", "its value", "apart (standard errors)"]
    rows = [
        [it.measure, it.best, it.value, it.second, it.second_value, round(it.apart, 1)]
        for it in best
    ]
    return Table("The best student by each measure", columns, rows, _BEST_SAYS)


def _with_first(sections: "list[Section]", block: "Block | Table") -> "list[Section]":
    return [replace(sections[0], blocks=[block, *sections[0].blocks]), *sections[1:]]


def _training(whole: Run, students: Sequence[str], before: str) -> "Section":
    """Curves of the students, and of the models that they start from where those were trained."""
    from rkl import plots
    from rkl.report import figure_block

    (section,) = training_section({name: Run(whole.path / name).metrics for name in students})
    rows = {name: Run(whole.path / name).metrics for name in ("teacher", before)}
    curves = {name: it for name, logged in rows.items() if (it := curve_of(logged, "loss"))}
    if not curves:
        return section
    drawing = plots.training_curves(curves, label="cross-entropy (nats per token)")
    block = figure_block("Before that, on the text itself", drawing, _BEFORE_SAYS)
    return replace(section, blocks=[*section.blocks, block])


def _head_tail(whole: Run, students: Sequence[str]) -> "Section":
    from rkl import plots
    from rkl.report import Section, figure_block

    about = whole.record["watched"]
    seen = {name: it.numpy() for name, it in load_file(whole.path / WATCHED).items()}
    blocks = []
    for kind, title in (("single", "One token"), ("mean", "The mean over tokens")):
        curves = {name: _by_step(seen, f"{name}.{kind}.") for name in students}
        head = about["head"] if kind == "single" else None
        drawing = plots.head_tail(seen[f"teacher.{kind}"], curves, head=head)
        caption = _HEAD_TAIL_SAYS[kind].format(context=about["context"][-160:])
        blocks.append(
            figure_block(f"Head and tail: {title[0].lower()}{title[1:]}", drawing, caption)
        )
    return Section("Head and tail", _HEAD_TAIL, blocks)


def _by_step(seen: Mapping[str, Any], prefix: str) -> dict[int, Any]:
    steps = sorted(int(name.removeprefix(prefix)) for name in seen if name.startswith(prefix))
    return {step: seen[f"{prefix}{step}"] for step in steps}


def _replies(whole: Run, names: Sequence[str]) -> dict[str, Any]:
    replies = {"teacher": read_jsonl(whole.path / REPLIES)}
    return replies | {name: read_jsonl(whole.path / name / "generations.jsonl") for name in names}


def _settings(whole: Run, students: Sequence[str]) -> "Section":
    from rkl.report import Settings

    elsewhere = {"phases", "done"}  # on the page
    entries = {key: value for key, value in whole.record.items() if key not in elsewhere}
    (section,) = settings_section({name: Run(whole.path / name).record for name in students})
    blocks = [_times(whole), Settings(entries, "The demonstration"), *section.blocks]
    return replace(section, title="Time and settings", blocks=blocks)


def _times(whole: Run) -> Table:

    phases = whole.record["phases"]
    rows = [[name, it["seconds"], it["cpu_seconds"]] for name, it in phases.items()]
    rows.append(["all", *(sum(it[key] for it in phases.values()) for key in _CLOCKS)])
    return Table("Time", ["what was done", "seconds", "CPU seconds"], rows)


_CLOCKS = "seconds", "cpu_seconds"
_BEST_SAYS = (
    "The two best students at each measure, and how many standard errors of their difference "
    "lie between them. They were evaluated on the same blocks of text, and the error is that of "
    "their difference from block to block; of replies, the two are taken as independent."
)
_BEFORE_SAYS = "How the teacher, and what all students began as, learned to predict the text."
_HEAD_TAIL = (
    "The picture of the paper on adaptive KL (arXiv 2404.02657), on held-out text: the teacher's "
    "p shaded, the student's q over it, by rank under the teacher, at several steps of training. "
    "Forward KL is said to fit the head first, reverse KL the tail."
)
_HEAD_TAIL_SAYS = {
    "single": (
        "The token behind “… {context}”, at which the teacher's entropy is the median of all "
        "tokens looked at; the dotted line ends the teacher's head, half of its mass."
    ),
    "mean": "p and q by rank, averaged over all the held-out tokens looked at.",
}

"""The report of one distillation or several: curves, held-out figures, replies, settings.

Each section is built out of plain values, for whoever has more to show.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rkl.distill.compare import evaluations_of, names_of
from rkl.runs import REPORT, Run, check_out_file, read_jsonl

if TYPE_CHECKING:
    from rkl.report import Section

Logged = Sequence[Mapping[str, Any]]  # rows of metrics.jsonl: {"step": 10, "loss": 0.7}, ...
Replies = Sequence[Mapping[str, Any]]  # rows of generations.jsonl
SHOWN = 6  # prompts whose replies are printed

# What is drawn of metrics.jsonl: its title, what one sees in it, and the label of its axis.
_CURVES = {
    "loss": (
        "What each run minimised",
        "The training loss step by step, and in front of it its running mean; each run has its "
        "own divergence, so compare where a curve levels off, not how low it lies.",
        "training loss (nats per token)",
    ),
    "eval_loss": (
        "The same on held-out text",
        "Each run's own divergence on text it was not trained on; a curve that turns upwards "
        "while the training loss falls has begun to learn by heart.",
        "held-out loss (nats per token)",
    ),
    "eval_cross_entropy": (
        "Cross-entropy on held-out text",
        "How well each student predicts real text, which is the same measure for every run, "
        "whatever it minimised.",
        "cross-entropy (nats per token)",
    ),
}


def report_runs(
    paths: Sequence[str | os.PathLike],
    out: str | os.PathLike | None = None,
    *,
    overwrite: bool = False,
) -> Path:
    """Write the report of one run or several, a single HTML file.

    It shows what the runs hold: curves from ``metrics.jsonl``; the held-out figures of those that
    have been evaluated; replies where there are any; settings and versions.

    Args:
        paths: Folders of runs.
        out: The file; ``report.html`` in the folder of the run if there is only one.
        overwrite: Replaces a file of others there.

    Returns:
        The file.
    """
    from rkl.report import render, write

    if not paths:
        raise ValueError("paths must name at least one run; got none.")
    if out is None and len(paths) > 1:
        raise ValueError(f"out must say where the report of {len(paths)} runs goes.")
    runs = dict(zip(names_of(paths), map(Run.open, paths), strict=True))
    out = next(iter(runs.values())).path / REPORT if out is None else Path(out)
    check_out_file(out, overwrite=overwrite, own=REPORT)
    evaluated = {n: it.path for n, it in runs.items() if (it.path / "evaluation.json").exists()}
    replies = {name: it for name, run in runs.items() if (it := _replies(run))}
    sections = [
        *training_section({name: run.metrics for name, run in runs.items()}),
        *(evaluations_of(evaluated).sections() if evaluated else ()),
        *(replies_section(replies) if replies else ()),
        *settings_section({name: run.record for name, run in runs.items()}),
    ]
    title = "Distillation" if len(runs) == 1 else f"{len(runs)} distillations"
    write(out, render(title, sections, lead=_lead(runs)))
    return out


def training_section(metrics: Mapping[str, Logged]) -> list["Section"]:
    """The curves of what the runs logged; none where they logged nothing that is drawn."""
    from rkl import plots
    from rkl.report import Section, figure_block

    figures = []
    for key, (title, caption, label) in _CURVES.items():
        curves = {name: it for name, rows in metrics.items() if (it := curve_of(rows, key))}
        if not curves:
            continue
        longest = max(len(steps) for steps, _ in curves.values())
        drawing = plots.training_curves(curves, label=label, window=max(1, longest // 20))
        figures.append(figure_block(title, drawing, caption))
    return [Section("Training", blocks=figures)] if figures else []


def replies_section(replies: Mapping[str, Replies]) -> list["Section"]:
    """Replies of each run to the same prompts under the first seed, and the text of the data."""
    from rkl.report import Generations, Section

    first = {name: _of_first_seed(rows) for name, rows in replies.items()}
    shared = [
        prompt
        for prompt in next(iter(first.values()))
        if all(prompt in texts for texts in first.values())
    ][:SHOWN]
    if not shared:
        return []
    truth = {row["prompt"]: row["reference"] for row in next(iter(replies.values()))}
    columns = {"the text itself": [truth[prompt] for prompt in shared]}
    columns |= {name: [texts[prompt] for prompt in shared] for name, texts in first.items()}
    block = Generations("Side by side", shared, columns, _REPLIES_SAY)
    return [Section("Replies", blocks=[block])]


def settings_section(records: Mapping[str, Mapping[str, Any]]) -> list["Section"]:
    """Settings and versions: once what all runs share, then what is each one's own."""
    from rkl.report import Section, Settings

    flat = {name: _flat(record) for name, record in records.items()}
    one, *others = flat.values()
    shared = {
        key: value
        for key, value in one.items()
        if all(key in other and other[key] == value for other in others)
    }
    blocks = [Settings(shared, "Settings and versions")]
    for name, values in flat.items():
        own = {key: value for key, value in values.items() if key not in shared}
        blocks += [Settings(own, name)] if own else []
    return [Section("Settings", blocks=blocks)]


def curve_of(rows: Logged, key: str) -> tuple[list[int], list[float]] | None:
    """The steps at which something was logged, and its values; None if it never was."""
    pairs = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    if not pairs:
        return None
    steps, values = zip(*pairs, strict=True)
    return list(steps), list(values)


_REPLIES_SAY = (
    "Each model goes on from the same held-out beginnings, drawn under the same seed; one sample "
    "shows the tone of a model, not its quality."
)


def _of_first_seed(rows: Replies) -> dict[str, str]:
    seed = rows[0]["seed"]
    return {row["prompt"]: row["text"] for row in rows if row["seed"] == seed}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, their names joined by dots."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _replies(run: Run) -> Replies:
    path = run.path / "generations.jsonl"
    return read_jsonl(path) if path.exists() else []


def _lead(runs: Mapping[str, Run]) -> str:
    return f"{'; '.join(f'{name} {_origin(run.settings)}' for name, run in runs.items())}."


def _origin(settings: Mapping[str, Any]) -> str:
    """The origin of a model, from the settings of its run."""
    teacher = settings.get("teacher")
    if several := settings.get("teachers"):
        teacher = " and ".join(several)
    if kind := settings.get("teacher_model_kind"):
        teacher = f"itself ({kind})"
    if teacher is None:
        return "learned the next token of plain text by cross-entropy"
    if "divergence" in settings:
        own = settings.get("on_policy_divergence")
        besides = "" if own is None else f", and {own} on its own text"
        return f"learned from {teacher} under {settings['divergence']}{besides}"
    return f"is {teacher} without layers {settings.get('drop_layers')}, not trained since"

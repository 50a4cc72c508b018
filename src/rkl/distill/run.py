"""``rkl distill``: from a teacher, a student and some text to a folder that holds the student.

The folder is what ``save_pretrained`` writes, beside the run's own files (:mod:`rkl.runs`) and
``checkpoints``, out of which a run that was stopped, or killed, goes on to the same bits.
"""

import dataclasses
import json
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.trainer_utils import get_last_checkpoint

from rkl.distill.card import model_card
from rkl.distill.data import passages
from rkl.distill.generate import finished
from rkl.distill.plan import Estimate, estimate
from rkl.distill.prepare import Models, Text, load, make_trainer, with_cached_teacher
from rkl.distill.progress import (
    Display,
    Journal,
    Stop,
    Watch,
    clock,
    in_words,
    peak_memory,
    quiet,
    say,
)
from rkl.distill.settings import DistillSettings
from rkl.distill.teachers import Teacher, load_model
from rkl.runs import Run, remove_folder, replacing_files, write_atomic

__all__ = ["DistillSettings", "Distilled", "Estimate", "distill", "estimate", "load_run"]

MAY_CHANGE = "device", "save_every", "keep_checkpoints"  # in a run that is resumed
CACHE = "teacher"  # folder of its hidden states, there while the run lasts
OF_TRAINER = "optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth", "trainer_state.json"


@dataclass(frozen=True)
class Distilled:
    """A finished run, which prints as what came out of it.

    Attributes:
        path: Its folder, for :func:`rkl.load` and ``from_pretrained``.
        result: What ``run.json`` says of the result: steps, losses, seconds, memory.
    """

    path: Path
    result: dict[str, Any]

    def __str__(self) -> str:
        it = self.result
        words = [
            f"{it['steps']:,} steps, {clock(it['training_seconds'])} of training, "
            f"{in_words(it['peak_memory'])}"
        ]
        if it["held_out_loss"] is not None:
            words.append(
                f"best at step {it['best_step']:,}: {it['held_out_loss']:.4g} nats per token "
                f"on held-out text"
            )
        return (
            f"{self.path}: {'; '.join(words)}.\n"
            f"Measure it with: rkl evaluate {self.path} --data HELDOUT"
        )


@quiet()
def distill(
    settings: DistillSettings,
    out: str | os.PathLike,
    *,
    resume: bool = False,
    overwrite: bool = False,
    teacher: Teacher | None = None,
    watch: Watch | None = None,
) -> Distilled:
    """Train a student to imitate a teacher, in a folder that any program can load it from.

    With text held out, the student kept is the one with the smallest divergence on it.

    Args:
        settings: What is trained on what, and how.
        out: The folder, which must not hold anything unless one of the next two says so.
        resume: Goes on with the run there, from its last checkpoint.
        overwrite: Replaces the run there.
        teacher: What to ask in place of the model that the settings name, such as a cache of it
            that several runs share.
        watch: Called with the student and the number of steps done, before the first and after
            each.

    Raises:
        KeyboardInterrupt: When Ctrl-C or SIGTERM stopped it, a checkpoint having been saved.
    """
    began = time.perf_counter()
    _check_place(settings, Path(out))
    text, models = load(settings)
    models = models if teacher is None else dataclasses.replace(models, teacher=teacher)
    run = Run.create(
        out,
        "distill",
        dataclasses.asdict(settings),
        seed=settings.seed,
        overwrite=overwrite,
        resume=resume,
        may_change=MAY_CHANGE,
    )
    if run.record["status"] == "finished":
        say(f"{run.path} was finished before; nothing is left to do.")
        return Distilled(run.path, run.record["result"])
    _introduce(text, models)
    _check_same_data(run, data := text.record())
    with run.running():
        run.update(data=data)
        run.remember_rows(passages(text.rows))
        if settings.cache_teacher:
            models = with_cached_teacher(settings, run.path / CACHE, text, models)
        _train(settings, run, text, models, watch)
        _finish(run, time.perf_counter() - began, peak_memory(models.student.device))
    return Distilled(run.path, run.record["result"])


def load_run(path: str | os.PathLike) -> PreTrainedModel:
    """The student of a run."""
    return load_model(finished(path).path)


def _check_place(settings: DistillSettings, out: Path) -> None:
    """Refuse a folder that holds what the run reads, which it might overwrite."""
    for name in ("teacher", "student", "data", "eval_data"):
        source = getattr(settings, name)
        if source is not None and Path(source).resolve().is_relative_to(out.resolve()):
            raise ValueError(f"out: {out} holds the {name}, {source}; choose another folder.")


def _check_same_data(run: Run, data: dict[str, Any]) -> None:
    before = run.record["data"]
    if before is not None and before != data:
        raise ValueError(
            f"resume: the data are not those that {run.path} was begun with: their fingerprint "
            f"was {before['fingerprint']} and is {data['fingerprint']}."
        )


def _introduce(text: Text, models: Models) -> None:
    """Say what is trained on, and show the first of it."""
    say(f"{text.blocks}. Held out: {len(text.held_out or ()):,} blocks, {text.origin}.")
    example = text.first_block(models.tokenizer)
    say(f"The first block, [what is not trained on] in brackets:\n{example}\n")


def _train(
    settings: DistillSettings,
    run: Run,
    text: Text,
    models: Models,
    watch: Watch | None,
) -> None:
    """Train from the last checkpoint on, or from the beginning, to the last step."""
    folder = run.path.resolve() / "checkpoints"
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    done = -1 if last is None else _state(Path(last))["global_step"]
    total = settings.steps(len(text.blocks))
    run.rewind(done)
    if done == total:
        return
    trainer = make_trainer(settings, folder, text, models, eval_on_start=last is None)
    display, stop = Display(total), Stop()
    trainer.add_callback(Journal(run, display, watch))
    trainer.add_callback(stop)
    with display.bar, stop.listening():
        trainer.train(resume_from_checkpoint=last)
    if trainer.state.global_step < total:
        say(f"A checkpoint of step {trainer.state.global_step} of {total} is saved.")
        raise KeyboardInterrupt


def _finish(run: Run, seconds: float, memory: int) -> None:
    """Put the best student, or else the last, into the folder of the run, with its card."""
    last = get_last_checkpoint(str(run.path / "checkpoints"))
    if last is None:
        raise FileNotFoundError(f"out: {run.path} has lost its checkpoints.")
    state = _state(Path(last))
    best = state["best_global_step"] or state["global_step"]
    with replacing_files(run.path) as folder:
        for file in (run.path / "checkpoints" / f"checkpoint-{best}").iterdir():
            if file.name not in OF_TRAINER:
                shutil.copyfile(file, folder / file.name)
    run.update(
        result={
            "steps": state["global_step"],
            "best_step": best,
            "held_out_loss": state["best_metric"],
            "tokens": state["num_input_tokens_seen"],
            # Steps alone, those of earlier sessions too.
            "training_seconds": sum(row.get("seconds", 0.0) for row in run.metrics),
            "seconds": seconds,
            "peak_memory": memory,
        }
    )
    write_atomic(run.path / "README.md", model_card(run))
    if (run.path / CACHE).exists():
        remove_folder(run.path / CACHE)


def _state(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))

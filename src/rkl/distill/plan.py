"""The cost of a distillation, measured in a few steps that change nothing.

The steps are those of the run itself, but with an optimizer that keeps no state and at a
learning rate of 0; AdamW's two moments are added by arithmetic.
"""

import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from transformers import TrainerCallback

from rkl.distill.prepare import (
    Models,
    Text,
    load,
    make_trainer,
    shard_models,
    with_cached_teacher,
    with_length,
)
from rkl.distill.processes import Processes, check_launcher, joined
from rkl.distill.progress import forget_peak, in_words, peak_memory, quiet
from rkl.distill.settings import DistillSettings
from rkl.distill.teachers.teacher import Teacher
from rkl.runs.progress import clock

STEPS = 4  # that are measured; the first, which may compile, is told apart
DISK = 2e8  # bytes a second that are taken to reach it
FLUSH = 0.04  # seconds that a checkpoint takes however small it is


@dataclass(frozen=True)
class Estimate:
    """Size, time and memory of a planned run; prints as a list.

    Attributes:
        memory: Bytes at the peak.
        seconds: From beginning to end.
        lines: All of it in words, by what it is about.
        example: The first block, as text.
    """

    memory: float
    seconds: float
    lines: Mapping[str, str]
    example: str

    def __str__(self) -> str:
        listed = "\n".join(f"{name:10}{value}" for name, value in self.lines.items())
        return f"{listed}\nFirst block, [what is not trained on] in brackets:\n{self.example}"


@quiet()
def dry_run(settings: DistillSettings) -> Estimate:
    """Estimate the time and memory of a run with these settings; nothing is written."""
    with joined(settings.device) as processes:
        processes.together(lambda: check_launcher(settings.dtype, shard=settings.shard))
        return _estimate(settings, processes)


def _estimate(settings: DistillSettings, processes: Processes) -> Estimate:
    began, count = time.perf_counter(), processes.count
    settings = processes.together(lambda: with_length(settings))
    text, models = processes.together(lambda: load(settings))
    loading, student = time.perf_counter() - began, models.student
    teachers: dict[str, Any] = {"teacher": models.teacher} if models.teacher else {}
    teachers |= {f"teacher {name}": it for name, it in models.teachers.items()}
    described = {name: _described(it) for name, it in teachers.items()}
    if settings.teacher_model_kind is not None:
        described["teacher"] = f"the student itself ({settings.teacher_model_kind})"
    described["student"] = _described(student)
    with tempfile.TemporaryDirectory() as folder:
        measured = _measure(settings, Path(folder), text, models, count)
    steps = settings.steps(len(text.blocks), count)
    held = len(text.looked_at(settings.eval_blocks) or ())
    saves, looks = (it or max(1, steps // 10) for it in (settings.save_every, settings.eval_every))
    looked = {*range(looks, steps, looks), steps} if held else set()
    checkpoints = len({*range(saves, steps, saves), steps} | looked)
    evaluations = 1 + len(looked) if held else 0
    whole = weights = 4 * sum(it.numel() for it in student.parameters())
    if settings.lora_rank is not None:  # checkpoints hold the adapters alone
        weights = 4 * sum(it.numel() for it in student.parameters() if it.requires_grad)
    moments = 2 * 4 * sum(it.numel() for it in student.parameters() if it.requires_grad)
    moments_here = moments / count if settings.shard else moments
    memory = max(measured.loading_peak, measured.peak + moments_here)
    seconds = loading + measured.first_step + (steps - 1) * measured.step
    seconds += measured.caching * (len(text.blocks) + held)
    seconds += evaluations * held * measured.evaluation
    seconds += checkpoints * (FLUSH + (weights + moments) / DISK)
    passes = steps * measured.tokens / len(text.blocks.tokens)
    speed = f"{measured.step:.3g} s a step ({measured.tokens / measured.step:,.0f} tokens/s)"
    kept = min(settings.keep_checkpoints, checkpoints)
    # A new checkpoint is written before the oldest is removed; the student itself at the end.
    disk = (kept + 1) * (weights + moments) + whole
    each = f" of each of {count} processes" if count > 1 else ""
    lines = {
        "data": str(text.blocks),
        "held out": f"{len(text.held_out or ()):,} blocks: {text.origin}",
        **described,
        "steps": f"{steps:,} of {measured.tokens:,.0f} tokens: {passes:.3g} times the data",
        "besides": f"{evaluations} evaluations, at most {checkpoints} checkpoints",
        "memory": f"{in_words(memory)} at the peak{each}",
        "disk": f"up to {in_words(disk)}: {kept} checkpoints, one being written, and the student",
        "time": f"{clock(seconds)}, at {speed}",
    }
    return Estimate(memory, seconds, lines, text.first_block(models.tokenizer))


class _Measured(NamedTuple):
    """Seconds, of a step, and of a block evaluated or cached; bytes; tokens in a step."""

    first_step: float
    step: float
    evaluation: float
    caching: float
    loading_peak: int
    peak: int
    tokens: float


class _Clock(TrainerCallback):
    """Notes down how long each step took."""

    def __init__(self):
        self.seconds: list[float] = []
        self._began = 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        self._began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.perf_counter() - self._began)


def _measure(
    settings: DistillSettings, folder: Path, text: Text, models: Models, processes: int
) -> _Measured:
    """Take a few steps on the first blocks, and evaluate on some."""
    batch = settings.batch_size * settings.gradient_accumulation * processes
    few = text.beginning(STEPS * batch)
    held, caching = len(few.looked_at(settings.eval_blocks) or ()), 0.0
    if settings.cache_teacher:
        began = time.perf_counter()
        models = with_cached_teacher(settings, folder / "teacher", few, models)
        caching = (time.perf_counter() - began) / (len(few.blocks) + held)
    shard_models(settings, models)
    idle: dict[str, Any] = {"optim": "sgd", "learning_rate": 0.0, "weight_decay": 0.0}
    idle |= {"max_steps": min(STEPS, settings.steps(len(text.blocks), processes))}
    idle |= {"save_strategy": "no", "log_completions": False}
    idle |= {"eval_strategy": "no", "eval_on_start": False, "report_to": "none"}
    trainer = make_trainer(settings, folder, few, models, processes=processes, **idle)
    device, ticks = trainer.args.device, _Clock()
    trainer.add_callback(ticks)
    loading_peak = peak_memory(device)
    forget_peak(device)
    trainer.train()
    began = time.perf_counter()
    if held:
        trainer.evaluate()
    first, *later = ticks.seconds
    return _Measured(
        first_step=first,
        step=sum(later) / len(later) if later else first,
        evaluation=(time.perf_counter() - began) / max(held, 1),
        caching=caching,
        loading_peak=loading_peak,
        peak=peak_memory(device),
        tokens=trainer.state.num_input_tokens_seen / len(ticks.seconds),
    )


def _described(model: Any) -> str:
    if isinstance(model, Teacher):
        return str(model)
    config = model.config.get_text_config(decoder=True)
    parameters = sum(it.numel() for it in model.parameters())
    return (
        f"{type(model).__name__}, {config.num_hidden_layers} layers, "
        f"{parameters:,} parameters, {config.vocab_size:,} logits"
    )

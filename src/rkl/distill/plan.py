"""What a distillation would take: looked up, and measured in a few steps that change nothing.

The steps are those of the run itself, but with an optimizer that keeps no state and at a
learning rate of 0; AdamW's two moments are added by arithmetic.
"""

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from rkl.distill.memory import forget_peak, in_words, peak_memory
from rkl.distill.prepare import (
    Models,
    Text,
    load_models,
    load_tokenizers,
    make_trainer,
    read_text,
    with_cached_teacher,
)
from rkl.distill.progress import clock, quiet
from rkl.distill.settings import DistillSettings

STEPS = 4  # that are measured; the first, which may compile, is told apart
DISK = 2e8  # bytes a second that are taken to reach it
FLUSH = 0.04  # seconds that a checkpoint takes however small it is


@dataclass(frozen=True)
class Estimate:
    """What a run would do; prints as a list.

    Attributes:
        text: The data, and the text held out.
        teacher: Which it is, and how large.
        student: The same of the student.
        steps: Number of steps.
        evaluations: Number of evaluations, the one before the first step included.
        checkpoints: Number of checkpoints, if every evaluation finds the best student so far.
        memory: Bytes at the peak.
        seconds: From beginning to end.
        seconds_per_step: Measured, without the time of compiling.
        tokens_per_step: Tokens that a step goes through, on average.
        example: The first block, as text.
    """

    text: Text
    teacher: str
    student: str
    steps: int
    evaluations: int
    checkpoints: int
    memory: float
    seconds: float
    seconds_per_step: float
    tokens_per_step: float
    example: str

    def __str__(self) -> str:
        held = 0 if self.text.held_out is None else len(self.text.held_out)
        tokens = self.tokens_per_step
        lines = {
            "data": str(self.text.blocks),
            "held out": f"{held:,} blocks: {self.text.origin}",
            "teacher": self.teacher,
            "student": self.student,
            "steps": (
                f"{self.steps:,} of {tokens:,.0f} tokens: "
                f"{self.steps * tokens / len(self.text.blocks.tokens):.3g} times the data"
            ),
            "besides": f"{self.evaluations} evaluations, at most {self.checkpoints} checkpoints",
            "memory": f"{in_words(self.memory)} at the peak",
            "time": (
                f"{clock(self.seconds)}, at {self.seconds_per_step:.3g} s a step "
                f"({tokens / self.seconds_per_step:,.0f} tokens/s)"
            ),
        }
        listed = "\n".join(f"{name:10}{value}" for name, value in lines.items())
        return f"{listed}\nFirst block, [what is not trained on] in brackets:\n{self.example}"


@quiet()
def estimate(settings: DistillSettings) -> Estimate:
    """What a run with these settings would do, and take; nothing of it is kept."""
    began = time.perf_counter()
    tokenizers = load_tokenizers(settings)
    text = read_text(settings, tokenizers[1])
    models = load_models(settings, text, tokenizers)
    loading = time.perf_counter() - began
    teacher, student = (_described(it) for it in (models.teacher, models.student))
    with tempfile.TemporaryDirectory() as folder:
        measured, models = _measure(settings, Path(folder), text, models)
    steps = settings.steps(len(text.blocks))
    every = max(1, steps // 10)
    looked_at = text.looked_at(settings.eval_blocks)
    evaluated = 0 if looked_at is None else len(looked_at)
    saves, looks = settings.save_every or every, settings.eval_every or every
    looked = {*range(looks, steps, looks), steps} if evaluated else set()
    checkpoints = len({*range(saves, steps, saves), steps} | looked)
    weights = 4 * sum(it.numel() for it in models.student.parameters())
    moments = 2 * 4 * sum(it.numel() for it in models.student.parameters() if it.requires_grad)
    seconds = loading + measured.first_step + (steps - 1) * measured.step
    seconds += measured.caching * (len(text.blocks) + evaluated)
    seconds += (1 + len(looked)) * evaluated * measured.evaluation
    seconds += checkpoints * (FLUSH + (weights + moments) / DISK)
    return Estimate(
        text=text,
        teacher=teacher,
        student=student,
        steps=steps,
        evaluations=1 + len(looked) if looked else 0,
        checkpoints=checkpoints,
        memory=max(measured.loading_peak, measured.peak + moments),
        seconds=seconds,
        seconds_per_step=measured.step,
        tokens_per_step=measured.tokens,
        example=text.first_block(models.tokenizer),
    )


@dataclass(frozen=True)
class _Measured:
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
    settings: DistillSettings, folder: Path, text: Text, models: Models
) -> tuple[_Measured, Models]:
    """Take a few steps on the first blocks, and evaluate on some; the models that did so."""
    few = text.beginning(STEPS * settings.batch_size * settings.gradient_accumulation)
    looked_at = few.looked_at(settings.eval_blocks)
    evaluated = 0 if looked_at is None else len(looked_at)
    caching = 0.0
    if settings.cache_teacher:
        began = time.perf_counter()
        models = with_cached_teacher(settings, folder / "teacher", few, models)
        caching = (time.perf_counter() - began) / (len(few.blocks) + evaluated)
    idle: dict[str, Any] = {"optim": "sgd", "learning_rate": 0.0, "weight_decay": 0.0}
    idle |= {"max_steps": min(STEPS, settings.steps(len(text.blocks))), "save_strategy": "no"}
    idle |= {"eval_strategy": "no", "eval_on_start": False}
    trainer = make_trainer(settings, folder, few, models, **idle)
    device, ticks = trainer.args.device, _Clock()
    trainer.add_callback(ticks)
    loading_peak = peak_memory(device)
    forget_peak(device)
    trainer.train()
    began = time.perf_counter()
    if evaluated:
        trainer.evaluate()
    first, *later = ticks.seconds
    measured = _Measured(
        first_step=first,
        step=sum(later) / len(later) if later else first,
        evaluation=(time.perf_counter() - began) / max(evaluated, 1),
        caching=caching,
        loading_peak=loading_peak,
        peak=peak_memory(device),
        tokens=trainer.state.num_input_tokens_seen / len(ticks.seconds),
    )
    return measured, models


def _described(model: Any) -> str:
    config = model.config.get_text_config(decoder=True)
    parameters = sum(it.numel() for it in model.parameters())
    return (
        f"{type(model).__name__}, {config.num_hidden_layers} layers, "
        f"{parameters:,} parameters, {config.vocab_size:,} logits"
    )

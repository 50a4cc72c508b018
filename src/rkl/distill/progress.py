"""The display and log of a run: progress, metrics, memory; and its stop.

These are callbacks of transformers; what they show, :mod:`rkl.runs.progress` shows.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    modeling_gguf_pytorch_utils,
)
from transformers.integrations.integration_utils import TensorBoardCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging as transformers_logging

from rkl.distill.selection import improves
from rkl.runs import Run
from rkl.runs.processes import main_process, world
from rkl.runs.progress import Progress
from rkl.runs.signals import StopRequest

_STATUS = Path("/proc/self/status")
Watch = Callable[[Any, int], None]
OWN_TEXT = (  # figures of the student's own text
    *("truncated", "completion_length", "repetition", "empty"),
    *("student_entropy", "teacher_entropy", "acceptance"),
)
_LOGGED = "loss", "grad_norm", "learning_rate", "infinite_tokens"
_LOGGED += "eval_loss", "eval_cross_entropy", "eval_infinite_tokens", "eval_finite_loss"
_LOGGED += ("captured_mass", "loss_error", "lmbda", "data_loss", "on_policy_loss", *OWN_TEXT)
_LOGGED += "aligned_tokens", "matched_mass", "one_to_one"  # of a teacher with other tokens


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """While this lasts, transformers shows no bars of its own for what it reads or writes."""
    conversion: Any = modeling_gguf_pytorch_utils
    shown, bar = transformers_logging.is_progress_bar_enabled(), conversion.tqdm
    transformers_logging.disable_progress_bar()
    conversion.tqdm = lambda tensors, **_: tensors  # no setting of transformers reaches this one
    try:
        yield
    finally:
        conversion.tqdm = bar
        if shown:
            transformers_logging.enable_progress_bar()


class Journal(TrainerCallback):
    """Writes what the Trainer logs to the run, with speed and memory, and shows it.

    It also has every new best model saved. What leads up to a checkpoint is logged before it,
    so that a resumed run logs what an undisturbed one does. Of several processes the first
    writes and shows; the others take the same decisions.

    Args:
        run: The run.
        display: Where to show it.
        watch: Called with the model and the number of steps done, before the first and after each.
    """

    def __init__(self, run: Run, display: "Display", watch: Watch | None = None):
        self.run, self.display, self.watch = run, display, watch
        self._seconds = self._began = 0.0  # of training alone, since the last row
        self._tokens = 0

    def on_train_begin(self, args, state, control, model: Any = None, **kwargs):
        self._tokens = state.num_input_tokens_seen
        if state.best_global_step:  # the run may have been moved since
            name = f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}"
            state.best_model_checkpoint = str(Path(str(args.output_dir)) / name)
        self.display.begin(state.global_step)
        if self.watch is not None and main_process():
            self.watch(model, state.global_step)

    def on_step_begin(self, args, state, control, **kwargs):
        self._began = time.perf_counter()

    def on_step_end(self, args, state, control, model: Any = None, **kwargs):
        self._seconds += time.perf_counter() - self._began
        control.should_log |= control.should_save or control.should_evaluate
        self.display.advance(state.global_step)
        if self.watch is not None and main_process():
            self.watch(model, state.global_step)

    def on_evaluate(self, args, state, control, metrics: Any = None, **kwargs):
        if state.global_step and improves(metrics, state):
            control.should_save = True

    def on_log(self, args, state, control, logs: Any = None, **kwargs):
        row = {name: logs[name] for name in _LOGGED if name in logs}
        if not row:
            return  # the summary at the end
        row |= {
            name: value for name, value in logs.items() if "." in name
        }  # taid.t, of a schedule
        row = {"step": state.global_step, "epoch": logs.get("epoch", 0.0)} | row
        if "loss" in row:
            row |= self._speed(args, state)
        if not main_process():
            return
        self.run.log(row)
        self.display.show(row)

    def _speed(self, args: TrainingArguments, state: TrainerState) -> dict[str, Any]:
        tokens, seconds = state.num_input_tokens_seen - self._tokens, self._seconds
        self._tokens, self._seconds = state.num_input_tokens_seen, 0.0
        return {
            "tokens": state.num_input_tokens_seen,
            "seconds": seconds,
            "tokens_per_second": tokens / seconds if seconds else None,
            "peak_memory": peak_memory(args.device),
        }


def journaled(device: str | None) -> dict[str, Any]:
    """The arguments that silence the Trainer's own log where a journal takes its place."""
    return {
        # Of several processes without a GPU: else each of them would train alone.
        "use_cpu": device == "cpu" or (world().size > 1 and not torch.cuda.is_available()),
        "dataloader_pin_memory": torch.cuda.is_available() and device != "cpu",
        "include_num_input_tokens_seen": "non_padding",
        "report_to": "none",
        "disable_tqdm": True,
        "log_level": "error",
    }


class Display:
    """The progress of a run, with the figures of what was logged last.

    Args:
        total: Number of steps.

    Attributes:
        bar: Shown while one is within it.
    """

    def __init__(self, total: int):
        self.total = total
        self.bar = Progress("step", total, kept=True)

    def begin(self, step: int) -> None:
        """Begin to count, at the step that a resumed run goes on from."""
        self.bar.begin(step)

    def advance(self, step: int) -> None:
        """Say that a step is done."""
        self.bar.update(step)

    def show(self, row: dict[str, Any]) -> None:
        """Show what was logged."""
        if "eval_loss" in row:
            figures = f"held-out loss {row['eval_loss']:.4g}"
            if infinite := row.get("eval_infinite_tokens"):
                figures += f" ({infinite:,.0f} tokens are infinite)"
        else:
            speed = row["tokens_per_second"]
            figures = f"loss {row['loss']:.4g}"
            figures += f"  {speed:,.0f} tokens/s" if speed else ""
            figures += f"  {in_words(row['peak_memory'])}"
        due = "eval_loss" in row or self.bar.done == self.total
        self.bar.update(self.bar.done, words=figures, due=due)


class TensorBoard(TensorBoardCallback):
    """That of transformers, which writes into the run and lists its files there as rkl's own.

    Args:
        run: The run.
    """

    def __init__(self, run: Run):
        super().__init__()
        self.run, self.elsewhere = run, self.logging_dir is not None
        self.logging_dir = self.logging_dir or str(run.path / "tensorboard")

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self._list(state)

    def on_train_end(self, args, state, control, **kwargs):
        super().on_train_end(args, state, control, **kwargs)
        self._list(state)

    def _list(self, state: TrainerState) -> None:
        ours = state.is_world_process_zero and not self.elsewhere
        files = [] if not ours else Path(str(self.logging_dir)).rglob("*")
        names = [it.relative_to(self.run.path).as_posix() for it in files if it.is_file()]
        if new := [name for name in names if name not in self.run.files]:
            self.run.record_files(new)


class Stop(TrainerCallback):
    """Ends training behind the step in which Ctrl-C, SIGTERM or SIGHUP arrives, with a checkpoint.

    Args:
        request: Tells whether one of them has arrived.
        largest: The largest of a number over all processes of the run, which stop together.

    Attributes:
        number: The signal for which training ends; None before.
    """

    def __init__(self, request: StopRequest, largest: Callable[[int], int]):
        self.request, self.largest = request, largest
        self.number: int | None = None

    def on_step_end(self, args, state, control: TrainerControl, **kwargs):
        self.number = self.largest(self.request.number or 0) or None
        if self.number is not None:
            control.should_save = control.should_log = control.should_training_stop = True


class FollowSchedule(TrainerCallback):
    """Begins at the learning rate of this training's schedule, where a checkpoint has another's.

    The checkpoint of a shorter run that had ended has the rate of its end, which would be that of
    one more step.
    """

    def on_train_begin(self, args, state, control: TrainerControl, **kwargs):
        schedule = kwargs["lr_scheduler"]
        schedule = getattr(schedule, "scheduler", schedule)  # as accelerate wraps it
        if not state.global_step or not isinstance(schedule, LambdaLR):
            return
        rates = [
            base * share(schedule.last_epoch)
            for base, share in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
        ]
        for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        schedule._last_lr = rates


def peak_memory(device: torch.device) -> int:
    """The most bytes held so far: of the GPU where there is one, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if _STATUS.exists():
        # Not ru_maxrss, which after a fork begins with the parent's.
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def forget_peak(device: torch.device) -> None:
    """Let the peak begin anew at what is held now, where the system can do so."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def in_words(number: float) -> str:
    """Bytes, to three digits.

    >>> in_words(1_234_000_000), in_words(56_000_000)
    ('1.23 GB', '56 MB')
    """
    return f"{number / 1e9:.3g} GB" if number >= 1e9 else f"{number / 1e6:.3g} MB"

"""``rkl distill``: from a teacher, a student and some text to a folder that holds the student.

The folder is what ``save_pretrained`` writes, beside the run's own files (:mod:`rkl.runs`) and
``checkpoints``, out of which a run that was stopped, or killed, goes on to the same bits.
"""

import contextlib
import dataclasses
import fnmatch
import json
import math
import os
import shlex
import shutil
import signal
import socket
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.integrations.integration_utils import TensorBoardCallback
from transformers.trainer_utils import get_last_checkpoint, sort_checkpoints

from rkl.distill.card import held_out_loss, model_card
from rkl.distill.checkpoints import is_pending
from rkl.distill.client import ServerError
from rkl.distill.generate import finished
from rkl.distill.models.loading import load_model, resolved
from rkl.distill.plan import Estimate, dry_run
from rkl.distill.prepare import (
    Models,
    Text,
    inputs_of,
    load,
    make_trainer,
    save_merged,
    save_student,
    shard_models,
    with_cached_teacher,
    with_length,
)
from rkl.distill.processes import Processes, check_launcher, joined, naming_lost_peers
from rkl.distill.progress import (
    Display,
    FollowSchedule,
    Journal,
    Stop,
    TensorBoard,
    Watch,
    in_words,
    peak_memory,
    quiet,
)
from rkl.distill.selection import DivergedError
from rkl.distill.settings import DistillSettings, upgrade
from rkl.distill.teachers.cache import CachedTeacher
from rkl.distill.teachers.teacher import Teacher
from rkl.distill.text.data import passages
from rkl.distill.writing.on_policy import COMPLETIONS
from rkl.runs import Run, check_out, remove_folder, replacing_files, write_atomic
from rkl.runs.integrity import check_inputs, inputs_before
from rkl.runs.processes import PeerError
from rkl.runs.progress import clock, say
from rkl.runs.signals import StoppedError, StopRequest
from rkl.runs.typed import record_of

__all__ = ["Distilled", "Estimate", "distill", "dry_run", "load_run"]

# In a run that is resumed; more steps extend it.
MAY_CHANGE = "device", "save_every", "keep_checkpoints", "max_steps", "epochs", "report_to"
# Settings that may be files or folders.
INPUTS = "teacher", "teacher_compression", "student", "data", "eval_data"
CACHE = "teacher"  # folder of its hidden states, there while the run lasts
OF_TRAINER = "optimizer*", "scheduler.pt", "scaler.pt", "rng_state*.pth", "trainer_state.json"
OF_TRAINER += ("on_policy-*.json",)


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
            words.append(f"best at step {it['best_step']:,}: {held_out_loss(it)}")
        return (
            f"{self.path}: {'; '.join(words)}.\n"
            f"Measure it with: rkl evaluate {shlex.quote(str(self.path))} --data HELDOUT"
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

    With text held out, the student kept is the one with the smallest divergence on it; of one
    that is its own teacher the last.

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
        DivergedError: When a loss, a gradient or an evaluation was NaN. The folder then holds the
            best student on held-out text, or else the last good one, and ``run.json`` says so.
    """
    began = time.perf_counter()
    with joined(settings.device) as processes, contextlib.ExitStack() as stack:
        processes.together(lambda: check_launcher(settings.dtype, shard=settings.shard))
        named = {name: getattr(settings, name) for name in INPUTS}
        how: Any = {"overwrite": overwrite, "resume": resume}
        several = {} if settings.teacher is not None else settings.named_teachers
        together = named | {f"teacher {name}": path for name, path in several.items()}
        processes.on_main(lambda: check_out(out, **how, inputs=together))
        found: dict[str, Any] = {it: resolved(path) for it, path in named.items() if path}
        if several:
            found["teachers"] = tuple(f"{it}={resolved(path)}" for it, path in several.items())
        settings = dataclasses.replace(settings, **found)
        settings = processes.together(lambda: with_length(settings))
        text, models = processes.together(lambda: load(settings))
        given = models if teacher is None else dataclasses.replace(models, teacher=teacher)

        def begin() -> Run | None:
            if resume:
                _refuse_shorter(Path(out), settings, settings.steps(len(text.blocks), count))
            inputs = inputs_of(settings, text, teacher)
            before = inputs_before(out) if resume else {}
            how["may_change"] = (*MAY_CHANGE, *((*INPUTS, "teachers") if before else ()))
            how["upgrade"] = upgrade
            record = record_of(settings)
            run = Run.create(out, "distill", record, seed=settings.seed, **how)
            stack.enter_context(run)
            check_inputs(run.path, before, inputs)
            _check_processes(run, count)
            if run.record["status"] == "finished" and not _is_longer(run, settings, text, count):
                say(f"{run.path} was finished before; nothing is left to do.")
                return None
            _introduce(text, given)
            if not before:
                _check_same_data(run, text.record())
            may = {name: getattr(settings, name) for name in MAY_CHANGE}
            run.update(inputs=inputs, settings=run.settings | found | may, processes=count)
            return run

        count = processes.count
        run = processes.on_main(begin)
        if run is None:
            return Distilled(Path(out), Run(Path(out)).record["result"])
        processes.together(lambda: _check_shared(run))
        try:
            return _distill(settings, run, text, given, watch, began, processes)
        except DivergedError:
            run.update(status="diverged")
            raise


def _distill(
    settings: DistillSettings,
    run: Run,
    text: Text,
    models: Models,
    watch: Watch | None,
    began: float,
    processes: Processes,
) -> Distilled:
    def prepare() -> None:
        run.remove_measured()
        run.update(data=text.record())
        run.remember_rows(passages(text.rows))
        if settings.cache_teacher:
            with_cached_teacher(settings, run.path / CACHE, text, models)

    with processes.writing(run.running()):
        processes.on_main(prepare)
        if settings.cache_teacher:
            cached = processes.together(lambda: CachedTeacher(run.path / CACHE))
            models = dataclasses.replace(models, teacher=cached)
        diverged = _train(settings, run, text, models, watch, processes)
        memory = peak_memory(models.student.device)
        seconds = time.perf_counter() - began
        processes.on_main(lambda: _finish(run, settings, seconds, memory, diverged))
        if diverged is not None and not processes.main:
            raise PeerError("the first process says why.")
        if diverged is not None:
            reason, advice = f"{run.path}: {diverged.reason}", f"{_kept(run)} {diverged.remedy}"
            raise type(diverged)(diverged.step, reason, advice)
    return Distilled(run.path, run.record["result"])


def load_run(path: str | os.PathLike) -> PreTrainedModel:
    """The student of a run."""
    return load_model(finished(path).path)


def _done(path: Path) -> int | None:
    """The step of the last checkpoint of a run; None where there is no checkpoint."""
    folder = path / "checkpoints"
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    return None if last is None else _state(Path(last))["global_step"]


def _refuse_shorter(path: Path, settings: DistillSettings, total: int) -> None:
    done = _done(path) or 0
    if path.is_dir() and (path / "run.json").exists():  # whose checkpoints may be gone
        record = Run.open(path).record
        if record["status"] == "finished":
            done = max(done, record["result"]["steps"])
    if total < done:
        name = "epochs" if settings.max_steps is None else "max_steps"
        raise ValueError(
            f"{name}: {path} has done {done:,} steps, and can go on to no fewer; got {total:,}."
        )


def _check_processes(run: Run, count: int) -> None:
    """Refuse to go on in another number of processes, which would train on other batches."""
    before = run.record.get("processes", count)
    if before != count:
        words = "1 process" if before == 1 else f"{before} processes"
        raise ValueError(
            f"resume: {run.path} was begun in {words}, and {count} would train on other batches "
            f"than it; got {count}. Start it as before."
        )


def _check_shared(run: Run) -> None:
    """Refuse machines that do not see the folder that the first process made."""
    if not (run.path / "run.json").is_file():
        raise FileNotFoundError(
            f"out: {run.path} is not there on {socket.gethostname()}: several machines need a "
            "file system that they share."
        )


def _is_longer(run: Run, settings: DistillSettings, text: Text, processes: int) -> bool:
    total = settings.steps(len(text.blocks), processes)
    if total <= run.record["result"]["steps"]:
        return False
    if _done(run.path) is None:
        raise ValueError(
            f"resume: {run.path} has no checkpoints any more, so that it cannot go on to "
            f"{total:,} steps."
        )
    return True


def _check_same_data(run: Run, data: dict[str, Any]) -> None:
    """Of a run from before run.json had the digests of its inputs."""
    before = run.record["data"]
    for name in before or ():
        if before[name] != data[name]:
            raise ValueError(
                f"resume: the data are not those that {run.path} was begun with: their {name} "
                f"was {before[name]} and is {data[name]}."
            )


def _introduce(text: Text, models: Models) -> None:
    say(f"{text.blocks}. Held out: {len(text.held_out or ()):,} blocks, {text.origin}.")
    example = text.first_block(models.tokenizer)
    say(f"The first block, [what is not trained on] in brackets:\n{example}\n")


def _train(
    settings: DistillSettings,
    run: Run,
    text: Text,
    models: Models,
    watch: Watch | None,
    processes: Processes,
) -> DivergedError | None:
    """Train from the last checkpoint on, or from the beginning, to the last step or to a NaN."""
    folder = run.path.resolve() / "checkpoints"
    total = settings.steps(len(text.blocks), processes.count)

    def rewind() -> tuple[str | None, int]:
        last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
        done = -1 if last is None else _state(Path(last))["global_step"]
        run.rewind(done)
        return last, done

    last, done = processes.on_main(rewind)
    if done == total and not is_pending(last):
        return None
    new = last is None
    shard_models(settings, models)
    trainer = processes.together(
        lambda: make_trainer(
            settings, folder, text, models, processes=processes.count, eval_on_start=new
        )
    )
    display = Display(total)
    request = StopRequest(shared=processes.count > 1, speaks=processes.main)
    stop = Stop(request, processes.largest)
    board = [TensorBoard(run)] if "tensorboard" in settings.reporters else []
    if board:  # in place of the one that the Trainer made
        trainer.remove_callback(TensorBoardCallback)
    trainer.completions = run.path / COMPLETIONS
    for callback in (Journal(run, display, watch), stop, FollowSchedule(), *board):
        trainer.add_callback(callback)
    try:
        with display.bar, request.listening(), naming_lost_peers(), warnings.catch_warnings():
            # peft's, of a base in a GGUF file or in a folder of adapters; no token is added here.
            warnings.filterwarnings("ignore", "Could not find a config file in")
            trainer.train(resume_from_checkpoint=last)
    except DivergedError as error:
        if error.sound:
            trainer.keep_weights()
        return error
    except ServerError as error:
        if processes.count > 1:  # the others may wait for this one elsewhere than in a checkpoint
            raise
        step = trainer.state.global_step
        if step:
            trainer.keep_weights()
        saved = (
            f"The checkpoint of step {step} of {total} is saved" if step else "No step was done"
        )
        quoted = shlex.quote(str(run.path))
        raise ServerError(
            f"{error} {saved}; once the server answers, go on with: rkl distill --out {quoted} "
            "--resume"
        ) from None
    if trainer.state.global_step < total:
        say(f"A checkpoint of step {trainer.state.global_step} of {total} is saved.")
        raise StoppedError(stop.number or signal.SIGINT, agreed=True)
    return None


def _kept(run: Run) -> str:
    """A sentence that names the student in the folder of a diverged run."""
    result = run.record["result"]
    step, loss = result["best_step"], result["held_out_loss"]
    student = f"the student of step {step:,}" if step else "the student it began with"
    found = "" if loss is None else f", the best on held-out text ({held_out_loss(result)})"
    return f"{run.path} holds {student}{found}."


def _last_good(folder: Path, diverged: DivergedError | None) -> tuple[int, dict[str, Any]]:
    """The step whose student is kept, 0 for the one at the beginning, and the Trainer's state.

    It is the best one on held-out text, or else the last. If the loss was NaN at step t, the
    weights of step t - 1 made it so, and those of t - 2 are the last known to be good.
    """
    found = [Path(it) for it in sort_checkpoints(str(folder))] if folder.is_dir() else []
    states = {int(path.name.rpartition("-")[2]): _state(path) for path in found}
    if not states and diverged is None:
        raise FileNotFoundError(f"out: {folder.parent} has lost its checkpoints.")
    last = states.get(max(states, default=0), {})
    if last.get("best_global_step"):
        return last["best_global_step"], last
    limit = math.inf if diverged is None else diverged.step - (1 if diverged.sound else 2)
    good = max((step for step in states if step <= limit), default=0)
    return good, states.get(good, {})


def _finish(
    run: Run,
    settings: DistillSettings,
    seconds: float,
    memory: int,
    diverged: DivergedError | None,
) -> None:
    """Put the best student, or else the last, into the folder of the run, with its card."""
    best, state = _last_good(run.path / "checkpoints", diverged)
    run.remove_measured()  # of the earlier student, measured meanwhile
    evaluated = next((row for row in run.metrics if best and _is_of(row, best)), {})
    if settings.teacher_model_kind is not None:  # a distance from itself says nothing of the best
        evaluated = {}
    with replacing_files(run.path) as folder:
        checkpoint = run.path / "checkpoints" / f"checkpoint-{best}"
        if not best:
            save_student(settings, folder)
        elif settings.lora_rank is not None:
            chats = run.record["data"]["chat_template"] is not None
            save_merged(settings, checkpoint, folder, chats=chats)
        for file in () if settings.lora_rank is not None else checkpoint.glob("*"):
            if not any(fnmatch.fnmatchcase(file.name, pattern) for pattern in OF_TRAINER):
                shutil.copyfile(file, folder / file.name)
    run.update(
        result={
            "steps": state.get("global_step", 0),
            "best_step": best,
            "held_out_loss": evaluated.get("eval_loss"),
            "held_out_infinite_tokens": evaluated.get("eval_infinite_tokens", 0),
            "held_out_finite_loss": evaluated.get("eval_finite_loss"),
            "diverged": None if diverged is None else str(diverged),
            "tokens": state.get("num_input_tokens_seen", 0),
            # Steps alone, those of earlier sessions too.
            "training_seconds": sum(row.get("seconds", 0.0) for row in run.metrics),
            "seconds": seconds,
            "peak_memory": memory,
        }
    )
    write_atomic(run.path / "README.md", model_card(run))
    if (run.path / CACHE).exists():
        remove_folder(run.path / CACHE)


def _is_of(row: dict[str, Any], step: int) -> bool:
    return row["step"] == step and "eval_loss" in row


def _state(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))

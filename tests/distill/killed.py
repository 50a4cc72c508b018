"""Kill runs while they write, in processes forked from this one; run by test_kill.py.

Either a trainer alone, or the whole of rkl distill around it.
"""

import json
import os
import random
import resource
import signal
import sys
import traceback
from pathlib import Path

import material
import safetensors.torch
import torch
import transformers
from safetensors.torch import load_file
from transformers.trainer_utils import get_last_checkpoint

from rkl.distill import DistillConfig, DistillTrainer, distill
from rkl.runs import Run

KILLED = 137
CHECKPOINT = {"model.safetensors", "config.json", "optimizer.pt", "scheduler.pt", "rng_state.pth"}
CHECKPOINT |= {"trainer_state.json"}
NOT_TIMES = "step", "loss", "eval_loss", "grad_norm", "learning_rate", "tokens"
KEPT = "model.safetensors", "config.json", "tokenizer.json", "rows.bin"


class Trainer:
    """The trainer: what it leaves are checkpoints. Killed at every call of a function."""

    every = {"os.replace": 1, "os.fsync": 1, "torch.save": 1, "save_file": 1}

    def __call__(self, folder: Path, out: Path) -> None:
        """Begin, or go on with what is there."""
        tokens = torch.randint(material.VOCAB, (12, 8), generator=torch.Generator().manual_seed(0))
        rows = [{"input_ids": row, "labels": row} for row in tokens.tolist()]
        settings = {"max_steps": 4, "save_steps": 2, "learning_rate": 1e-2, "save_total_limit": 1}
        settings |= {"per_device_train_batch_size": 2, "log_level": "error", "disable_tqdm": True}
        args = DistillConfig(str(out), use_cpu=True, **settings)
        teacher, student = (material.model(1, 8, seed=seed) for seed in (1, 2))
        trainer = DistillTrainer(student, args, teacher=teacher, train_dataset=rows)
        trainer.train(resume_from_checkpoint=get_last_checkpoint(out) if out.exists() else None)

    def left(self, out: Path) -> list:
        """All that must not depend on whether it was killed."""
        return [(out / "checkpoint-4" / "model.safetensors").read_bytes()]


class Pipeline:
    """The whole of rkl distill. Killed at every n-th call of a function."""

    every = {"os.replace": 4, "os.fsync": 6, "torch.save": 1, "save_file": 1}

    def __call__(self, folder: Path, out: Path) -> None:
        """Begin, or go on with what is there."""
        settings = material.settings(folder, max_steps=6, save_every=2, eval_every=3)
        distill(settings, out, resume=True)

    def left(self, out: Path) -> list:
        """All that must not depend on whether it was killed, nor on the clock."""
        run = Run.open(out)
        logged = [{key: row.get(key) for key in NOT_TIMES} for row in run.metrics]
        return [run.record["status"], logged, *((out / name).read_bytes() for name in KEPT)]


class OwnText(Pipeline):
    """The same with text of the student, some of it written ahead of the checkpoints."""

    def __call__(self, folder: Path, out: Path) -> None:
        """Begin, or go on with what is there."""
        how = {"lmbda": 0.7, "max_completion_length": 6, "prompt_tokens": 4}
        how |= {"steps_per_generation": 4, "max_steps": 6, "save_every": 2, "eval_every": 3}
        distill(material.settings(folder, **how), out, resume=True)


def forked(function, *arguments) -> int:
    """The process id of a copy of this process that calls the function and ends."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        function(*arguments)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def time_of_children() -> float:
    """Seconds of a processor that the copies have used which have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def status_of(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def check_whole(out: Path) -> None:
    """What bears its name is whole; what is half written is hidden."""
    for path in out.rglob("*"):
        if any(part.startswith(".") for part in path.relative_to(out).parts):
            continue
        if path.suffix == ".safetensors":
            load_file(path)
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix in (".pt", ".pth"):
            torch.load(path, weights_only=not path.name.startswith("rng"))
        elif path.name == "metrics.jsonl":
            _ = Run(out).metrics
        elif path.name == "rows.bin":
            assert path.stat().st_size > 0
            assert path.stat().st_size % 8 == 0
        elif path.name == "README.md":
            assert path.read_text().endswith(".\n")
        elif path.name.startswith("checkpoint-"):
            names = {file.name for file in path.iterdir()}
            assert names >= CHECKPOINT, f"{path} lacks {CHECKPOINT - names}"
        else:
            assert path.is_dir(), f"nobody should have written {path}"


def killing(function, call: int, halve):
    """The function, but its n-th call writes one half of its file and kills the process."""
    calls = 0

    def wrapped(*arguments, **settings):
        nonlocal calls
        calls += 1
        if calls != call:
            return function(*arguments, **settings)
        if halve is not None:
            function(*arguments, **settings)
            path = Path(arguments[halve])
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        os._exit(KILLED)

    return wrapped


def run_until(run, point: str, call: int, folder: Path, out: Path) -> None:
    if point == "save_file":
        doomed = killing(safetensors.torch.save_file, call, 1)
        safetensors.torch.save_file = transformers.modeling_utils.safe_save_file = doomed
    else:
        owner, name = {"os": os, "torch": torch}[point.split(".")[0]], point.split(".")[1]
        setattr(owner, name, killing(getattr(owner, name), call, 1 if owner is torch else None))
    run(folder, out)


def check_goes_on(run, folder: Path, out: Path, expected: list) -> None:
    """What was killed comes to its end, and then nothing tells that it was."""
    assert status_of(forked(run, folder, out)) == 0
    check_whole(out)
    assert not [path for path in out.rglob(".*")]
    assert run.left(out) == expected


def kill_at_every(run, point: str, folder: Path, expected: list) -> int:
    for kills, call in enumerate(range(1, 10_000, run.every[point])):
        out = folder / f"killed-{call}"
        if (status := status_of(forked(run_until, run, point, call, folder, out))) == 0:
            return kills
        assert status == KILLED, status
        check_whole(out)
        check_goes_on(run, folder, out, expected)
    raise AssertionError(f"{point} was called ten thousand times")


def run_for(run, seconds: float, folder: Path, out: Path) -> None:
    """The run, until it has used so many seconds of a processor: then the kernel ends it."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends a process at once, as SIGKILL does
    signal.setitimer(signal.ITIMER_PROF, max(seconds, 1e-3))
    run(folder, out)
    signal.setitimer(signal.ITIMER_PROF, 0)


def kill_at_random(run, folder: Path, expected: list, seconds: float) -> int:
    """Kill runs at moments of up to a whole run's processor time and a half."""
    kills, moments = 0, random.Random(0)
    for number in range(6):
        out = folder / f"random-{number}"
        while True:
            moment = moments.uniform(0.0, 1.5 * seconds)
            if (status := status_of(forked(run_for, run, moment, folder, out))) == 0:
                break
            assert status == -signal.SIGPROF, status
            kills += 1
            check_whole(out)
        check_goes_on(run, folder, out, expected)
    return kills


def main(folder: Path, what: str, point: str) -> None:
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    material.write(folder)
    run = {"trainer": Trainer, "run": Pipeline, "own text": OwnText}[what]()
    for whole in (folder / "first", folder / "whole"):  # the second tells how long one takes
        began = time_of_children()
        assert status_of(forked(run, folder, whole)) == 0
    seconds, expected = time_of_children() - began, run.left(whole)
    if point == "random":
        print(kill_at_random(run, folder, expected, seconds))
    else:
        print(kill_at_every(run, point, folder, expected))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])

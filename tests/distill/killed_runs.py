"""Kill runs while they write, in processes forked from this one; run by test_checkpoints.py."""

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import safetensors.torch
import torch
import transformers
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.trainer_utils import get_last_checkpoint

from rkl.distill import DistillConfig, DistillTrainer

FILES = {"model.safetensors", "config.json", "optimizer.pt", "scheduler.pt", "rng_state.pth"}
FILES |= {"trainer_state.json"}
LAST = Path("checkpoint-4", "model.safetensors")
KILLED = 137


def model(seed: int) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 40, "n_layer": 1, "n_embd": 8, "n_head": 2, "n_positions": 16}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


def train(out: Path) -> None:
    """Begin a run, or go on with what is there of it."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(40, (12, 8), generator=generator).tolist()
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    settings = {"max_steps": 4, "save_steps": 2, "learning_rate": 1e-2, "save_total_limit": 1}
    settings |= {"per_device_train_batch_size": 2, "log_level": "error", "disable_tqdm": True}
    args = DistillConfig(str(out), use_cpu=True, **settings)
    trainer = DistillTrainer(model(2), args, teacher=model(1), train_dataset=rows)
    trainer.train(resume_from_checkpoint=last_checkpoint(out))


def last_checkpoint(out: Path) -> str | None:
    return get_last_checkpoint(out) if out.exists() else None


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
        elif path.is_dir():
            names = {file.name for file in path.iterdir()}
            assert names >= FILES, f"{path} lacks {FILES - names}"
        elif path.suffix in (".pt", ".pth"):
            torch.load(path, weights_only=not path.name.startswith("rng"))
        else:
            raise AssertionError(f"nobody should have written {path}")


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


def train_until(point: str, call: int, out: Path) -> None:
    if point == "save_file":
        doomed = killing(safetensors.torch.save_file, call, 1)
        safetensors.torch.save_file = transformers.modeling_utils.safe_save_file = doomed
    else:
        owner, name = {"os": os, "torch": torch}[point.split(".")[0]], point.split(".")[1]
        setattr(owner, name, killing(getattr(owner, name), call, 1 if owner is torch else None))
    train(out)


def kill_at_every(point: str, folder: Path, expected: bytes) -> int:
    for call in range(1, 1000):
        out = folder / str(call)
        if (status := status_of(forked(train_until, point, call, out))) == 0:
            return call - 1
        assert status == KILLED, status
        check_whole(out)
        assert status_of(forked(train, out)) == 0
        check_finished(out, expected)
    raise AssertionError(f"{point} was called more than a thousand times")


def kill_at_random(folder: Path, expected: bytes, duration: float) -> int:
    """Kill runs at moments of up to a whole run's duration and a half."""
    moments, kills = random.Random(0), 0
    while kills < 12:
        out = folder / f"after-{kills}"
        while True:
            child = forked(train, out)
            time.sleep(moments.uniform(0.0, 1.5 * duration))
            os.kill(child, signal.SIGKILL)
            if status_of(child) == 0:
                break
            kills += 1
            check_whole(out)
            if kills > 200:
                raise AssertionError("no run ever came to its end")
        assert status_of(forked(train, out)) == 0
        check_finished(out, expected)
    return kills


def check_finished(out: Path, expected: bytes) -> None:
    assert (out / LAST).read_bytes() == expected
    assert not any(path.name.startswith(".") for path in out.iterdir())


def main(folder: Path, point: str) -> None:
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    began = time.monotonic()
    assert status_of(forked(train, folder / "whole")) == 0
    duration = time.monotonic() - began
    expected = (folder / "whole" / LAST).read_bytes()
    if point == "random":
        print(kill_at_random(folder, expected, duration))
    else:
        print(kill_at_every(point, folder, expected))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])

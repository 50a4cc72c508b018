"""Kill whole runs while they write, in processes forked from this one; run by test_kill.py."""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import material
import safetensors.torch
import torch
import transformers
from killed_runs import FILES, KILLED, forked, killing, status_of
from safetensors.torch import load_file

from rkl.distill import distill
from rkl.runs import Run

POINTS = {"os.replace": 4, "os.fsync": 6, "torch.save": 1, "save_file": 1}  # every n-th call
SEEDS = range(6)
NOT_TIMES = "step", "loss", "eval_loss", "grad_norm", "learning_rate", "tokens"


def run(folder: Path, out: Path) -> None:
    settings = material.settings(folder, max_steps=6, save_every=2, eval_every=3)
    distill(settings, out, resume=True)


def check_whole(out: Path) -> None:
    """What bears its name is whole; what is half written is hidden."""
    for path in out.rglob("*"):
        inside = path.relative_to(out)
        if any(part.startswith(".") for part in inside.parts):
            continue
        if path.suffix == ".safetensors":
            load_file(path)
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.name == "metrics.jsonl":
            _ = Run(out).metrics
        elif path.name == "rows.bin":
            assert path.stat().st_size > 0
            assert path.stat().st_size % 8 == 0
        elif path.name == "README.md":
            assert path.read_text().endswith(".\n")
        elif path.name.startswith("checkpoint-"):
            names = {file.name for file in path.iterdir()}
            assert names >= FILES, f"{path} lacks {FILES - names}"
        elif path.suffix in (".pt", ".pth"):
            assert path.read_bytes()[:2] == b"PK"
        else:
            assert path.is_dir(), f"nobody should have written {path}"


def logged(out: Path) -> list[dict]:
    """The metrics, without what depends on the clock."""
    return [{key: row.get(key) for key in NOT_TIMES} for row in Run(out).metrics]


def check_finished(out: Path, whole: Path) -> None:
    check_whole(out)
    assert not [path for path in out.rglob(".*")]
    assert Run(out).record["status"] == "finished"
    for name in ("model.safetensors", "config.json", "tokenizer.json", "rows.bin"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    assert logged(out) == logged(whole)


def run_until(point: str, call: int, folder: Path, out: Path) -> None:
    if point == "save_file":
        doomed = killing(safetensors.torch.save_file, call, 1)
        safetensors.torch.save_file = transformers.modeling_utils.safe_save_file = doomed
    else:
        owner, name = {"os": os, "torch": torch}[point.split(".")[0]], point.split(".")[1]
        setattr(owner, name, killing(getattr(owner, name), call, 1 if owner is torch else None))
    run(folder, out)


def kill_at_every(point: str, folder: Path, whole: Path) -> int:
    for kills, call in enumerate(range(1, 10_000, POINTS[point])):
        out = folder / f"killed-{call}"
        if (status := status_of(forked(run_until, point, call, folder, out))) == 0:
            return kills
        assert status == KILLED, status
        check_whole(out)
        assert status_of(forked(run, folder, out)) == 0
        check_finished(out, whole)
    raise AssertionError(f"{point} was called ten thousand times")


def kill_at_random(folder: Path, whole: Path, seconds: float) -> int:
    kills = 0
    for seed in SEEDS:
        moments, out = random.Random(seed), folder / f"seed-{seed}"
        while True:
            child = forked(run, folder, out)
            time.sleep(moments.uniform(0.0, seconds))
            os.kill(child, signal.SIGKILL)
            if status_of(child) == 0:
                break
            kills += 1
            check_whole(out)
        assert status_of(forked(run, folder, out)) == 0
        check_finished(out, whole)
    return kills


def main(folder: Path, point: str) -> None:
    torch.set_num_threads(1)
    material.write(folder)
    for whole in (folder / "first", folder / "whole"):  # the second tells how long one takes
        began = time.perf_counter()
        assert status_of(forked(run, folder, whole)) == 0
    seconds = time.perf_counter() - began
    if point == "random":
        print(kill_at_random(folder, whole, seconds))
    else:
        print(kill_at_every(point, folder, whole))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])

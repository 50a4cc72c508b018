"""Kill the making of a cache while it writes, in processes forked from this one; for test_cache.

At every call of a function that writes, half of what it writes being on the disk, and then at
random moments, until what is left after going on is compared with a cache that nobody disturbed.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import material
import safetensors.torch
import torch

from rkl.distill.teachers import cache

cache.SHARD = 1500


def rows() -> list[dict]:
    tokens = torch.randint(material.VOCAB, (24, 8), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in tokens.tolist()]


def make(model, path: Path, *, seconds: float = 0.0) -> None:
    cache.cache_teacher(model, rows(), path, batch_size=2, progress=lambda *_: time.sleep(seconds))


def kill_inside(point: str, call: int) -> None:
    """Have this process end at one call of a function, half-way through what it writes."""
    module, name = {"os.replace": (os, "replace"), "os.fsync": (os, "fsync")}.get(
        point, (safetensors.torch, "save_file")
    )
    inner, calls = getattr(module, name), []

    def dying(*words, **how):
        calls.append(words)
        if len(calls) == call:
            if name == "save_file":
                inner(*words, **how)
                data = Path(words[1]).read_bytes()
                Path(words[1]).write_bytes(data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return inner(*words, **how)

    setattr(module, name, dying)


def in_child(function) -> bool:
    """Run a function in a copy of this process; true if it came to its end."""
    child = os.fork()
    if not child:
        try:
            function()
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL), status
    return status == 0


def contents(folder: Path) -> dict[str, bytes]:
    return {it.name: it.read_bytes() for it in folder.iterdir()}


def main(folder: Path) -> int:
    model, kills = material.model(1, 8, seed=1), 0
    make(model, folder / "whole")
    expected = contents(folder / "whole")
    for point in ("os.replace", "os.fsync", "save_file"):
        for call in range(1, 100):
            path = folder / f"{point}-{call}"

            def killed(path=path, point=point, call=call):
                kill_inside(point, call)
                make(model, path)

            if in_child(killed):
                break
            kills += 1
            make(model, path)
            assert contents(path) == expected, (point, call)
    generator, path = random.Random(0), folder / "random"
    for _ in range(50):
        child = os.fork()
        if not child:
            make(model, path, seconds=0.02)
            os._exit(0)
        time.sleep(generator.uniform(0.0, 0.2))
        os.kill(child, signal.SIGKILL)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
            break
        kills += 1
    make(model, path)
    assert contents(path) == expected
    return kills


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(main(Path(sys.argv[1])))

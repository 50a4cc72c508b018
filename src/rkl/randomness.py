"""Torch's global random numbers, of one thread of this process at a time."""

import contextlib
import threading
from collections.abc import Iterator

import torch

from rkl.checks import integer, warn

_MINE = threading.RLock()


@contextlib.contextmanager
def random_numbers(seed: int | None = None) -> Iterator[None]:
    """Have torch's global generators for this thread alone, and restore them at the end.

    Another thread that asks for them waits. If two threads seeded and restored them at the same
    time, both would draw from one sequence, and the generators could stay seeded afterwards.

    Args:
        seed: Seed within the block; None leaves the generators as they are.

    Raises:
        TypeError: The seed is not an integer.
        ValueError: It is out of range.

    >>> before = torch.get_rng_state()
    >>> with random_numbers(0):
    ...     torch.rand(1)
    tensor([0.4963])
    >>> bool((torch.get_rng_state() == before).all())
    True
    """
    if seed is not None:
        integer("seed", seed)
    on_gpu = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with _MINE, torch.random.fork_rng(on_gpu):
        if seed is not None:
            torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def one_at_a_time() -> Iterator[None]:
    """Let one fit of this process run at a time; a second one, in another thread, waits.

    Flows draw from torch's global random numbers, which a fit seeds and restores afterwards.
    """
    if not _MINE.acquire(blocking=False):
        warn(
            "another fit is running in this process: this one waits for it, as both draw from "
            "torch's global random numbers. Start a process for each to run them side by side."
        )
        _MINE.acquire()
    try:
        yield
    finally:
        _MINE.release()

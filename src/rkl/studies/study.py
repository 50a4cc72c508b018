"""The parts of a study side by side, in processes that end with it; and how many threads."""

import contextlib
import multiprocessing
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

WORKERS = 2  # processes
PATIENCE = 5.0  # seconds in which a process that is told to end must have ended


def in_processes(
    function: Callable[..., Any],
    *columns: Iterable[Any],
    workers: int = WORKERS,
    threads: int | None = 1,
) -> list[Any]:
    """The values of a function for rows of arguments, computed in processes of their own.

    Ctrl-C reaches this process alone, which ends the others; so does whatever else ends it early.
    One worker is this process itself.

    Args:
        function: Of a module, so that other processes find it.
        columns: The first arguments, the second ones, and so on.
        workers: Number of processes; no more are started than there are rows.
        threads: Of torch, in each of them; None leaves torch alone.
    """
    rows = list(zip(*columns, strict=True))
    workers = min(workers, len(rows))
    if workers <= 1:
        with torch_threads(threads):
            return [function(*row) for row in rows]
    others = set(multiprocessing.active_children())
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _begin, (threads,))
    try:
        with _unheard():
            futures = [pool.submit(function, *row) for row in rows]
        found = [it.result() for it in futures]
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        _end(set(multiprocessing.active_children()) - others)
        raise
    pool.shutdown()
    return found


@contextlib.contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Compute with this number of threads meanwhile; None leaves torch alone.

    Two threads on arrays that fit a cache take twice as long as one, and much longer where others
    compute beside them.
    """
    if count is None:
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _begin(threads: int | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


@contextlib.contextmanager
def _unheard() -> Iterator[None]:
    """Processes begun meanwhile never hear of Ctrl-C; this one does, as soon as this is over."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end(processes: Iterable[Any]) -> None:
    for process in processes:
        process.terminate()
    for process in processes:
        process.join(PATIENCE)
        if process.is_alive():
            process.kill()

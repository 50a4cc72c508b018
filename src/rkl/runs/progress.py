"""Progress of any verb, on standard error: a bar on a terminal, a line now and then elsewhere.

Everything shown at one time shares one display, in which each has its row.
"""

import contextlib
import functools
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from rkl.runs.processes import main_process
from rkl.text import printable

PAUSE = 10.0  # seconds between lines where there is no terminal; later a share of the time so far
SHARE = 0.05
PATIENCE = 5.0  # seconds before work that cannot be counted has its row on a terminal
MINUTE = 60.0  # seconds between its lines elsewhere


def say(message: str) -> None:
    """A line for whoever watches, apart from the result; of several processes the first prints."""
    if main_process():
        print(printable(message), file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    """A duration as hours, minutes and seconds.

    >>> clock(3725)
    '1:02:05'
    """
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


class Progress:
    """Progress of some work, and the remaining time at the same speed.

    It is shown while one is within it, by the first of several processes, and not by the workers
    of a pool.

    Args:
        label: What is done.
        total: How much of it there is; None where nobody knows, until an update tells it.
        share: Show a percentage in place of the count.
        shown: False for work that is not worth it.
        kept: Leave the last state on the terminal.

    Attributes:
        done: How much is done.
    """

    def __init__(
        self,
        label: str,
        total: float | None = None,
        *,
        share: bool = False,
        shown: bool = True,
        kept: bool = False,
    ):
        self.label, self.total, self.done = label, total, 0.0
        self._share, self._kept, self._words = share, kept, ""
        self._shown = shown and main_process() and not _in_a_pool()
        self._entered = False
        self._row: Callable[..., None] | None = None
        self._rows = contextlib.ExitStack()
        self.begin(0)

    def __enter__(self):
        if self._shown:
            self._row = self._rows.enter_context(_row(self._head()))
            self._entered = True
            self.update(self.done)
        return self

    def __exit__(self, *_: Any) -> None:
        self._rows.close()
        if self._kept and self._row is not None:
            say(self._text())
        self._row, self._entered = None, False

    def begin(self, done: float) -> None:
        """Take the time from here on, where so much was done before."""
        self.done = self._first = done
        self._began = self._said = time.perf_counter()  # as it is when it is made

    def advance(self, count: float = 1) -> None:
        """Count more that is done."""
        self.update(self.done + count)

    def update(
        self,
        done: float,
        total: float | None = None,
        words: str | None = None,
        *,
        due: bool = False,
    ) -> None:
        """Show how much is done.

        Args:
            done: So much in all.
            total: Of so much; None for what was told before.
            words: Figures beside it; None for those told before.
            due: Say it at once where there is no terminal too.
        """
        self.done = done
        self.total = self.total if total is None else total
        self._words = self._words if words is None else words
        if not self._entered:
            return
        if self._row is not None:
            self._row(total=self.total, completed=done, head=self._head(), words=self._tail())
            return
        now = time.perf_counter()
        pause = max(PAUSE, SHARE * (now - self._began))
        if due or now - self._said > pause:
            self._said = now
            say(self._text())

    def _text(self) -> str:
        return "  ".join(filter(None, (self._head(), self._tail())))

    def _head(self) -> str:
        if self.total is None:
            return f"{self.label}, {time.perf_counter() - self._began:.0f} s so far"
        if self._share:
            return f"{self.label} {self.done / max(self.total, 1e-9):.0%}"
        return f"{self.label} {self.done:,.0f}/{self.total:,.0f}"

    def _tail(self) -> str:
        if self.total is None or not self._first < self.done < self.total:
            return self._words
        spent = time.perf_counter() - self._began
        left = spent / (self.done - self._first) * (self.total - self.done)
        return "  ".join(filter(None, (self._words, f"{clock(left)} to go")))


_working = threading.local()  # its shown is the Progress of the outermost block of a thread


@contextlib.contextmanager
def working(label: str) -> Iterator[None]:
    """Shows what is computed, and for how long, where nothing can be counted.

    On a terminal it has a row once it has lasted for five seconds; elsewhere there is a line a
    minute. Within another such block of the same thread only the label changes.
    """
    label = f"rkl: {label}"
    outermost: Progress | None = getattr(_working, "shown", None)
    if outermost is not None:
        before, outermost.label = outermost.label, label
        try:
            yield
        finally:
            outermost.label = before
        return
    ended, shown = threading.Event(), Progress(label)
    thread = threading.Thread(target=_repeat, args=(shown, ended), daemon=True)
    _working.shown = shown
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        _working.shown = None


def _repeat(shown: Progress, ended: threading.Event) -> None:
    first, pause = (PATIENCE, 1.0) if _on_terminal() else (MINUTE, MINUTE)
    if ended.wait(first):
        return
    with shown:
        shown.update(0, due=True)
        while not ended.wait(pause):
            shown.update(0, due=True)


_displays: list[Any] = []  # the one on the terminal, while something is shown
_LOCK = threading.Lock()


@contextlib.contextmanager
def _row(head: str) -> Iterator[Callable[..., None] | None]:
    """A function that changes a row of the display; None without a terminal."""
    if not _on_terminal():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    console = Console(stderr=True, highlight=False)
    columns = TextColumn("{task.fields[head]}", markup=False), BarColumn(bar_width=24)
    columns += (TextColumn("{task.fields[words]}", markup=False),)
    with _LOCK:
        if not _displays:
            _displays.append(Progress(*columns, console=console, transient=True))
            _displays[0].start()
        display = _displays[0]
        task = display.add_task("", total=None, head=printable(head), words="")
    try:
        yield functools.partial(_change, display, task)
    finally:
        with _LOCK:
            display.remove_task(task)
            if not display.tasks:
                display.stop()
                _displays.clear()


def _change(display: Any, task: Any, *, head: str, words: str, **how: Any) -> None:
    display.update(task, head=printable(head), words=printable(words), **how)


def _on_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()


def _in_a_pool() -> bool:
    """True in a process that multiprocessing started, of which the parent shows the whole."""
    from multiprocessing import parent_process

    return parent_process() is not None

"""A sign of life on standard error from whatever lasts longer than a few seconds."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

PATIENCE = 5.0  # seconds before a line is shown on a terminal
MINUTE = 60.0  # seconds before each line elsewhere, where none can be written again


class _Shown:
    """What runs, since when; a thread shows it."""

    def __init__(self, label: str):
        self.label, self.since = label, time.monotonic()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._show, daemon=True)

    def _show(self) -> None:
        again = sys.stderr.isatty()
        if self.done.wait(PATIENCE if again else MINUTE):
            return
        written = 0
        while True:
            seconds = time.monotonic() - self.since
            line = f"rkl: {self.label}, {seconds:.0f} s so far"
            end = "" if again else "\n"
            print("\r" * again + line.ljust(written), end=end, file=sys.stderr, flush=True)
            written = len(line)
            if self.done.wait(1.0 if again else MINUTE):
                break
        if again:
            print("\r" + " " * written + "\r", end="", file=sys.stderr, flush=True)


_shown: list[_Shown] = []  # the outermost call alone


@contextmanager
def working(label: str) -> Iterator[None]:
    """Shows what is computed, and for how long.

    On a terminal, once it has lasted for five seconds, one line is written again and again and
    then wiped; elsewhere there is a line a minute. Within another such block only the label
    changes.
    """
    if _shown:
        outer = _shown[0].label
        _shown[0].label = label
        try:
            yield
        finally:
            _shown[0].label = outer
        return
    shown = _Shown(label)
    _shown.append(shown)
    shown.thread.start()
    try:
        yield
    finally:
        shown.done.set()
        shown.thread.join()
        _shown.clear()

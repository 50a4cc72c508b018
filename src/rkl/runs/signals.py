"""Ctrl-C, SIGTERM and SIGHUP: training stops behind the step, saved; whatever else, at once."""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

# What a scheduler sends before it kills, and what a closed terminal sends.
ENDING = signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])


class StoppedError(KeyboardInterrupt):
    """A signal ended what was going on.

    Attributes:
        number: The signal.
    """

    def __init__(self, number: int = signal.SIGINT):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = int(number)


def exit_code(error: KeyboardInterrupt) -> int:
    """128 and the number of the signal, as shells have it: 130, 143 or 129."""
    return 128 + (error.number if isinstance(error, StoppedError) else signal.SIGINT)


@contextlib.contextmanager
def raising() -> Iterator[None]:
    """While this lasts, SIGTERM and SIGHUP raise :class:`StoppedError`, as Ctrl-C raises.

    A signal that somebody ignores or handles already, as nohup does, is left alone.
    """
    with _handling([it for it in ENDING if signal.getsignal(it) == signal.SIG_DFL], _raise):
        yield


class StopRequest:
    """A signal that asks a training to end behind its step.

    Attributes:
        number: The signal that came; None before.
    """

    def __init__(self):
        self.number: int | None = None

    @contextlib.contextmanager
    def listening(self) -> Iterator["StopRequest"]:
        """While this lasts, the first signal is noted; the next one has its usual effect."""
        numbers = [it for it in (signal.SIGINT, *ENDING) if signal.getsignal(it) != signal.SIG_IGN]
        with _handling(numbers, self._note) as restore:
            self._restore = restore
            yield self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self._restore()
        with contextlib.suppress(OSError, ValueError):  # after SIGHUP there is no terminal
            words = "Stopping after this step. Once more stops at once."
            print(f"\n{words}", file=sys.stderr, flush=True)


def _raise(number: int, frame: FrameType | None) -> None:
    raise StoppedError(number)


@contextlib.contextmanager
def _handling(numbers, handler) -> Iterator:
    """Handle signals in the main thread, which alone receives them; yields what ends that."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    before = {it: signal.getsignal(it) for it in numbers}

    def restore() -> None:
        for each, old in before.items():
            signal.signal(each, signal.SIG_DFL if old is None else old)

    for each in before:
        signal.signal(each, handler)
    try:
        yield restore
    finally:
        restore()

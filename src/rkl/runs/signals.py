"""Ctrl-C, SIGTERM and SIGHUP: training is saved and stops after the step; other work at once."""

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType

# What a scheduler sends before it kills, and what a closed terminal sends.
ENDING = signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])
SAME_REQUEST = 5.0  # seconds in which the terminal and torchrun both pass on one Ctrl-C


class StoppedError(KeyboardInterrupt):
    """A signal stopped the work.

    Attributes:
        number: The signal.
        agreed: True if all processes of the run stopped together.
    """

    def __init__(self, number: int = signal.SIGINT, *, agreed: bool = False):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number, self.agreed = int(number), agreed


def exit_code(error: KeyboardInterrupt) -> int:
    """Exit status 128 plus the number of the signal, as in shells: 130, 143 or 129."""
    return 128 + (error.number if isinstance(error, StoppedError) else signal.SIGINT)


@contextlib.contextmanager
def raising() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise :class:`StoppedError` within the block, as Ctrl-C raises.

    A signal that is already ignored or handled, as with nohup, stays as it is.
    """
    with _handling([it for it in ENDING if signal.getsignal(it) == signal.SIG_DFL], _raise):
        yield


class StopRequest:
    """A signal that asks a training to stop after its step.

    Args:
        shared: True in one of several processes, which may get one request twice.
        speaks: Whether to print a line when the signal comes.

    Attributes:
        number: The signal that came; None before.
    """

    def __init__(self, *, shared: bool = False, speaks: bool = True):
        self.number: int | None = None
        self._patience, self._speaks = SAME_REQUEST if shared else 0.0, speaks
        self._heard = 0.0

    @contextlib.contextmanager
    def listening(self) -> Iterator["StopRequest"]:
        """Note the first signal within the block; the next one has its usual effect."""
        numbers = [it for it in (signal.SIGINT, *ENDING) if signal.getsignal(it) != signal.SIG_IGN]
        with _handling(numbers, self._note) as restore:
            self._restore = restore
            yield self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None:
            if time.monotonic() - self._heard > self._patience:
                self._restore()
                signal.raise_signal(number)
            return
        self.number, self._heard = number, time.monotonic()
        if not self._patience:
            self._restore()
        if not self._speaks:
            return
        with contextlib.suppress(OSError, ValueError):  # after SIGHUP there is no terminal
            later = f" {self._patience:.0f} seconds later" if self._patience else ""
            words = f"Stopping after this step. Once more{later} stops at once."
            print(f"\n{words}", file=sys.stderr, flush=True)


def _raise(number: int, frame: FrameType | None) -> None:
    raise StoppedError(number)


@contextlib.contextmanager
def _handling(numbers, handler) -> Iterator:
    """Handle signals in the main thread, the only one to receive them; yields a way to stop."""
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

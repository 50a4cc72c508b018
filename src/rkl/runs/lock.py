"""The one process that writes a run: its lock, and its list of the files that rkl wrote there.

The lock is an ``flock`` on the file ``.rkl-lock`` in the run folder. The kernel releases it when
the process ends for any reason: no lock outlives its owner. The file is removed when
the run ends normally; one that a killed process left has no meaning.
"""

import contextlib
import json
import os
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from rkl.checks import warn
from rkl.runs.processes import main_process

try:
    import fcntl
except ModuleNotFoundError:  # not a POSIX system
    fcntl = None

LOCK = ".rkl-lock"


class RunBusyError(FileExistsError):
    """Another process, or another thread, is writing this run."""


class Writer:
    """The lock on a run folder that this process holds.

    Attributes:
        folder: The run folder, resolved.
        thread: The thread that took the lock.
        active: Whether a training, or another writer of the run, is running.
        names: Files that run.json already lists without a digest.
        add: Function that adds names to the list in run.json.
    """

    def __init__(self, folder: Path, descriptor: int | None, add: Callable[[list[str]], None]):
        self.folder, self.descriptor, self.add = folder, descriptor, add
        self.thread, self.active = threading.get_ident(), False
        self.names: set[str] = set()

    def claim(self, paths: Iterable[Path]) -> None:
        """List files as written by rkl, before they take their names."""
        names = {str(path.relative_to(self.folder).as_posix()) for path in paths} - {"run.json"}
        if missing := sorted(names - self.names):
            self.add(missing)
            self.names |= names

    def release(self) -> None:
        """Let others write the run."""
        _WRITERS.pop(str(self.folder), None)
        if self.descriptor is None:
            return
        with contextlib.suppress(OSError):  # still locked, so that nobody else can hold this file
            os.unlink(self.folder / LOCK)
        os.close(self.descriptor)
        self.descriptor = None


_WRITERS: dict[str, Writer] = {}
_GUARD = threading.Lock()


def acquire(folder: Path, add: Callable[[list[str]], None]) -> Writer | None:
    """Take the lock on a run folder, which must exist.

    A lock that the same thread took before and no longer uses is taken over: an exception ended
    the verb that took it. On a file system without locks there is a warning instead.

    Args:
        folder: The run folder.
        add: Function that adds names to the list of files in its run.json.

    Raises:
        RunBusyError: Another process or thread writes this run.
    """
    if not main_process():
        return None
    folder = folder.resolve()
    with _GUARD:
        writer = _WRITERS.get(str(folder))
        if writer is not None and (writer.active or writer.thread != threading.get_ident()):
            raise RunBusyError(_busy(folder, _owner(os.getpid(), "another thread of it")))
        if writer is not None:
            writer.release()
        writer = Writer(folder, _lock(folder), add)
        _WRITERS[str(folder)] = writer
    return writer


def check_free(folder: Path) -> None:
    """Refuse a run that another process is writing, without taking the lock.

    Raises:
        RunBusyError: Another process or thread writes this run.
    """
    writer = _WRITERS.get(str(folder.resolve()))
    if writer is not None and not writer.active and writer.thread == threading.get_ident():
        return
    try:
        descriptor = os.open(folder / LOCK, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return
    try:
        _flock(descriptor, folder, shared=True)
    finally:
        os.close(descriptor)


def writer_of(path: Path) -> Writer | None:
    """The innermost run that this process is writing and that this path lies in."""
    if not _WRITERS:
        return None
    resolved = path.parent.resolve()
    for folder in (resolved, *resolved.parents):
        if (writer := _WRITERS.get(str(folder))) is not None:
            return writer
    return None


def claim(*paths: Path) -> None:
    """List files in run.json of the run that this process is writing, if they lie in one."""
    writer = writer_of(paths[0]) if paths else None
    if writer is not None:
        writer.claim(path.parent.resolve() / path.name for path in paths)


@contextlib.contextmanager
def updating(folder: Path) -> Iterator[None]:
    """Keep other processes and threads from changing run.json within the block.

    The lock is on the folder itself, which leaves no file. Where a folder cannot be locked, as on
    some network file systems, one of two changes at the same time may be lost.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        yield  # writing will say what is wrong
        return
    try:
        with contextlib.suppress(OSError):
            if fcntl is not None:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _lock(folder: Path) -> int | None:
    """A descriptor of the lock file of a folder, locked; None where locks do not work."""
    path = folder / LOCK
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            works = _flock(descriptor, folder)
            same = works and os.path.samestat(os.fstat(descriptor), os.stat(path))
        except FileNotFoundError:  # its owner ended between the two
            works, same = True, False
        except BaseException:
            os.close(descriptor)
            raise
        if not works:
            os.close(descriptor)
            with contextlib.suppress(OSError):
                os.unlink(path)
            return None
        if same:
            break
        os.close(descriptor)
    os.truncate(descriptor, 0)
    since = datetime.now(UTC).isoformat(timespec="seconds")
    os.write(descriptor, json.dumps(_owner(os.getpid(), since)).encode())
    return descriptor


def _flock(descriptor: int, folder: Path, *, shared: bool = False) -> bool:
    """Lock a file or say who has; False, with a warning, where the file system has no locks."""
    reason = "this system has none"
    if fcntl is not None:
        try:
            how = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
            fcntl.flock(descriptor, how | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            raise RunBusyError(_busy(folder, _read_owner(descriptor))) from None
        except OSError as error:
            reason = os.strerror(error.errno or 0)
    if not shared:
        warn(
            f"out: {folder} cannot be locked ({reason}): do not let a second process write "
            "this run."
        )
    return False


def _owner(pid: int, since: str) -> dict[str, object]:
    return {"pid": pid, "host": socket.gethostname(), "since": since}


def _read_owner(descriptor: int) -> dict[str, object]:
    try:
        owner = json.loads(os.pread(descriptor, 4096, 0))
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _busy(folder: Path, owner: dict[str, object]) -> str:
    who = "another process"
    if {"pid", "host", "since"} <= owner.keys():
        who = f"process {owner['pid']} on {owner['host']} ({owner['since']})"
    return (
        f"out: {folder} is being written by {who}. Wait until it ends, stop it, or choose another "
        "folder. Nothing was changed."
    )

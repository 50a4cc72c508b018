"""The seed of the random inputs, and a watch on what a process does while it reads them."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

SEED = int(os.environ.get("RKL_FUZZ_SEED", "0"))
EXAMPLES = int(os.environ.get("RKL_FUZZ_EXAMPLES", "1000"))

EXECUTE = {
    "os.system",
    "os.exec",
    "os.fork",
    "os.forkpty",
    "os.posix_spawn",
    "os.spawn",
    "pty.spawn",
}
EXECUTE |= {"subprocess.Popen", "socket.connect", "socket.getaddrinfo"}
CHANGE = {"os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod", "os.link"}
CHANGE |= {"os.symlink", "shutil.rmtree", "shutil.move"}
_watching: list[tuple[Path, list[str]]] = []


def _hook(event: str, arguments: tuple) -> None:
    if not _watching:
        return
    folder, seen = _watching[-1]
    if event in EXECUTE:
        seen.append(f"{event} {arguments!r}")
    elif event == "open":
        path, mode, flags = arguments
        writes = any(it in mode for it in "wax+") if isinstance(mode, str) else bool(flags & 3)
        if writes and not _is_inside(path, folder):
            seen.append(f"open {path!r} for writing")
    elif event in CHANGE and not _is_inside(arguments[0], folder):
        seen.append(f"{event} {arguments!r}")


def _is_inside(path: object, folder: Path) -> bool:
    if not isinstance(path, str | bytes | os.PathLike):
        return True  # a descriptor that is open already
    place = os.path.abspath(os.fsdecode(path))
    return place.startswith(str(folder)) or "__pycache__" in place or place == os.devnull


@contextlib.contextmanager
def watched(folder: Path) -> Iterator[None]:
    """Fail if the block starts a program, asks the network, or writes outside of a folder."""
    seen: list[str] = []
    _watching.append((folder, seen))
    try:
        yield
    finally:
        _watching.pop()
    assert not seen, seen


sys.addaudithook(_hook)  # which cannot be taken away again, and is idle without a watch

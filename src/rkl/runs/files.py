"""Files and folders that are complete at any moment, even if the process is killed.

A file within a run that this process is writing is listed in run.json before it takes its name:
rkl can tell its own files from others at any moment.
"""

import contextlib
import errno
import functools
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import socket
import stat
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from rkl.runs.lock import claim, writer_of

# .NAME.TOKEN.tmp, where TOKEN is MACHINE-PID-PROCESS-RANDOM; of earlier versions 8 random digits.
_LEFTOVER = re.compile(
    r"\..+\.((?P<machine>[0-9a-f]{6})-(?P<pid>\d+)-(?P<process>[0-9a-f]{6})-[0-9a-f]{6}"
    r"|[0-9a-f]{8})\.(tmp|old)"
)
_IN_USE: set[str] = set()  # temporary names that this process is writing
_FOREIGN_AGE = 24 * 3600  # seconds after which a temporary file of another machine is abandoned
_FULL = {
    errno.EFBIG: "files of this size are not allowed here (see ulimit -f)",
    errno.EDQUOT: "the disk quota is used up",
    errno.ENOSPC: "the disk is full",
}
# What safetensors, torch, numpy and HDF5 say, whose exceptions have no errno of their own.
_FULL_WORDS = {
    r"file too large|os error 27\b": _FULL[errno.EFBIG],
    r"disk quota exceeded|os error 122\b": _FULL[errno.EDQUOT],
    r"no space left|os error 28\b": _FULL[errno.ENOSPC],
    r"basic_ios::clear|unexpected pos \d+ vs \d+|PytorchStreamWriter failed"
    r"|\d+ requested and \d+ written": "the disk is full, or a quota or limit is reached",
}


class DiskFullError(OSError):
    """The disk or a quota is full; names the file."""


def full_disk(error: BaseException | None) -> str | None:
    """Description of the limit that this exception, or one that led to it, ran into."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return _FULL[error.errno]
        for pattern, words in _FULL_WORDS.items():
            if re.search(pattern, str(error), re.IGNORECASE):
                return words
        error = error.__cause__ or error.__context__
    return None


@contextlib.contextmanager
def needing_room(path: str | os.PathLike, size: int | None = None) -> Iterator[None]:
    """Turn the errors of a full disk in the block into :class:`DiskFullError`.

    Args:
        path: The file or folder that is written.
        size: Its size in bytes, if known.

    Raises:
        DiskFullError: The block ran out of room; names the path, the free and the needed bytes.
    """
    try:
        yield
    except Exception as error:
        limit = full_disk(error)
        if limit is None or isinstance(error, DiskFullError):
            raise
        with contextlib.suppress(OSError):
            folder = next(it for it in Path(path).absolute().parents if it.exists())
            limit += f", with {shutil.disk_usage(folder).free / 1e6:,.1f} MB free on the disk"
        needed = "" if size is None else f"; {size / 1e6:,.1f} MB were needed"
        raise DiskFullError(f"{path} could not be written: {limit}{needed}.") from error


@contextlib.contextmanager
def replacing(path: str | os.PathLike, size: int | None = None) -> Iterator[Path]:
    """Yield a temporary name for the block to write to, and rename the file to ``path``.

    A reader of ``path`` finds the old file or the new one at any moment. If the block
    raises, the old one stays and nothing of the new one is left.

    Args:
        path: The file.
        size: Its size in bytes, if known, for the message of a full disk.
    """
    path = Path(path)
    _check_place(path)
    if writer_of(path) is None:  # a run sweeps its own folder when it begins
        _sweep_beside(path)
    temporary = _beside(path, "tmp")
    try:
        with _in_use(temporary), needing_room(path, size):
            yield temporary
            _permit(temporary)
            _sync(temporary)
            claim(path)
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    with needing_room(path):
        _sync(path.parent)


@contextlib.contextmanager
def replacing_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Same as :func:`replacing` for a folder, which the block gets empty and which is flushed.

    No system call renames a folder over another, so an old one steps aside first; killed
    between the two renamings, :meth:`Run.create` brings it back when it resumes.
    """
    path = Path(path)
    temporary, aside = _beside(path, "tmp"), _beside(path, "old")
    try:
        with _in_use(temporary), needing_room(path):
            temporary.mkdir(parents=True)
            yield temporary
            for inside in (*temporary.rglob("*"), temporary):
                _permit(inside)
                _sync(inside)
        claim(*(path / inside.relative_to(temporary) for inside in _files_in(temporary)))
        if path.exists():
            os.replace(path, aside)
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        if aside.exists():
            os.replace(aside, path)
        raise
    with needing_room(path):
        _sync(path.parent)
    shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def replacing_files(folder: str | os.PathLike) -> Iterator[Path]:
    """Same as :func:`replacing` for several files of a folder, each complete at any moment."""
    temporary = _beside(Path(folder) / "files", "tmp")
    try:
        with _in_use(temporary), needing_room(folder):
            temporary.mkdir(parents=True)
            yield temporary
            files = _files_in(temporary)
            for file in files:
                _permit(file)
                _sync(file)
            claim(*(Path(folder, file.relative_to(temporary)) for file in files))
        for file in files:
            place = Path(folder, file.relative_to(temporary))
            place.parent.mkdir(exist_ok=True)
            os.replace(file, place)
            _sync(place.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_folder(path: str | os.PathLike) -> None:
    """Remove a folder; a crash leaves all of it or nothing under its name."""
    doomed = _beside(Path(path), "tmp")
    os.replace(path, doomed)
    shutil.rmtree(doomed)


def sweep(folder: Path) -> None:
    """Remove partial files of killed processes, and restore folders that were being replaced.

    Temporary files of living processes stay, such as those of an evaluation beside a training;
    processes of another machine count as alive for a day.
    """
    for leftover in [path for path in folder.rglob(".*") if is_leftover(path)]:
        name, _token, ending = leftover.name[1:].rsplit(".", 2)
        if _is_in_use(leftover, ending):
            continue
        if ending == "old" and not leftover.with_name(name).exists():
            os.replace(leftover, leftover.with_name(name))
        else:
            remove(leftover)


def write_atomic(path: str | os.PathLike, data: bytes | str) -> None:
    """Write a file; a crash leaves the old one or the new one, never half of one."""
    if not isinstance(data, bytes | str):
        raise TypeError(f"data must be text or bytes; got a {type(data).__name__}.")
    content = data.encode() if isinstance(data, str) else data
    with replacing(path, len(content)) as temporary:
        temporary.write_bytes(content)


def cache_folder() -> Path | None:
    """Folder for files of this user that may be deleted at any time; None if there is none."""
    place = os.environ.get("XDG_CACHE_HOME", "")
    try:
        base = Path(place) if os.path.isabs(place) else Path.home() / ".cache"
    except RuntimeError:
        return None
    return base / "rkl"


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write a value as JSON, atomically."""
    write_atomic(path, as_json("value", value, indent=2) + "\n")


def append_jsonl(path: str | os.PathLike, row: Mapping[str, Any]) -> None:
    """Append one row to a file of JSON lines, over an incomplete last line of an earlier crash."""
    line = as_json("row", row).encode() + b"\n"
    _check_place(Path(path))
    claim(Path(path))
    with needing_room(path, len(line)), Path(path).open("a+b") as file:
        if file.tell() and _last_byte(file) != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def read_jsonl(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Rows of a file of JSON lines, without a last line that a crash left incomplete."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"path: there is no file {path}.")
    *lines, _torn = Path(path).read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except RecursionError:
            raise ValueError(f"{path}, line {number}, is nested too deeply.") from None
        except ValueError as error:
            raise ValueError(f"{path}, line {number}, is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(
                f"{path}, line {number}, must hold names and values; got {row!r:.50}."
            )
        rows.append(row)
    return rows


def save_tensors(
    path: str | os.PathLike, tensors: Mapping[str, Any], metadata: dict[str, str] | None = None
) -> None:
    """Write named tensors in safetensors' format, atomically."""
    from safetensors.torch import save_file
    from torch import Tensor

    if not isinstance(tensors, Mapping):
        raise TypeError(f"tensors must map names to tensors; got a {type(tensors).__name__}.")
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            got = type(tensor).__name__
            raise TypeError(f"tensors[{name!r}] must be a tensor; got a {got}.")
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path, sum(it.nbytes for it in contiguous.values())) as temporary:
        save_file(contiguous, temporary, metadata)


def finite_or_null(value: Any) -> Any:
    """A value for JSON, which has no NaN and no infinity: None stands in their place.

    >>> finite_or_null({"value": [1.0, float("inf")], "error": float("nan")})
    {'value': [1.0, None], 'error': None}
    """
    if isinstance(value, Mapping):
        return {name: finite_or_null(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_null(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_json(argument: str, value: Any, **style: Any) -> str:
    """A value as JSON, or a TypeError that names the argument it was given as."""
    try:
        return json.dumps(value, ensure_ascii=False, **style)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{argument} must be what JSON can write: {error}.") from None


def _check_place(path: Path) -> None:
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path: there is no folder {path.parent} for {path.name}.")
    if path.is_dir():
        raise FileExistsError(f"path: {path} is a folder; expected a file.")


def remove(entry: Path) -> None:
    """Remove a file, a link or a folder with all that is in it."""
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry)
    else:
        entry.unlink(missing_ok=True)


def _files_in(folder: Path) -> list[Path]:
    return [inside for inside in folder.rglob("*") if inside.is_file()]


def _beside(path: Path, ending: str) -> Path:
    pid = os.getpid()
    token = f"{_machine()}-{pid}-{_process(pid)}-{secrets.token_hex(3)}"
    return path.with_name(f".{path.name}.{token}.{ending}")


@contextlib.contextmanager
def _in_use(temporary: Path) -> Iterator[None]:
    """Protect a temporary file from :func:`sweep` in other threads of this process."""
    name = os.path.abspath(temporary)
    _IN_USE.add(name)
    try:
        yield
    finally:
        _IN_USE.discard(name)


def _sweep_beside(path: Path) -> None:
    start = f".{path.name}."
    with os.scandir(path.parent) as entries:
        leftovers = [
            it.name for it in entries if it.name.startswith(start) and it.name.endswith("tmp")
        ]
    for leftover in map(path.with_name, leftovers):
        ours = is_leftover(leftover) and leftover.name[1:].rsplit(".", 2)[0] == path.name
        if ours and leftover.is_file() and not _is_in_use(leftover, "tmp"):
            with contextlib.suppress(OSError):
                leftover.unlink()


def _is_in_use(leftover: Path, ending: str) -> bool:
    match = _LEFTOVER.fullmatch(leftover.name)
    if match is None or match["pid"] is None:
        return False
    if match["machine"] == _machine() and int(match["pid"]) == os.getpid():
        return os.path.abspath(leftover) in _IN_USE
    if match["machine"] == _machine():
        return _process(int(match["pid"])) == match["process"]
    if ending == "old":  # two renamings apart, no time to be met in
        return False
    with contextlib.suppress(OSError):
        return time.time() - leftover.lstat().st_mtime < _FOREIGN_AGE
    return False


def _machine() -> str:
    return _digits(socket.gethostname())


@functools.lru_cache(maxsize=8)
def _digits(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=3).hexdigest()


def _process(pid: int) -> str | None:
    """Number and start time of a process, as numbers are used again; None if it has ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
        fields = stat.rpartition(")")[2].split()
        if fields[0] in "ZX":  # killed, and not yet waited for
            return None
        return _digits(f"{_boot()} {fields[19]}")
    except (OSError, IndexError):
        if Path("/proc/self/stat").exists():
            return None
    try:  # a system without /proc
        os.kill(pid, 0)
    except PermissionError:
        pass
    except (OSError, OverflowError):
        return None
    return _digits("alive")


@functools.cache
def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def is_leftover(path: Path) -> bool:
    """True for the name of a temporary file, which no file of rkl has otherwise."""
    return _LEFTOVER.fullmatch(path.name) is not None


def _permit(path: Path) -> None:
    """Give a file or folder the permissions that the umask leaves, as safetensors does not."""
    umask = os.umask(0o077)
    os.umask(umask)
    is_folder = path.is_dir()
    if path.is_symlink() or os.name == "nt":
        return
    mode = stat.S_IMODE(path.stat().st_mode)
    wanted = mode | (0o777 if is_folder else 0o666) & ~umask
    if wanted != mode:
        path.chmod(wanted)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _last_byte(file: BinaryIO) -> bytes:
    file.seek(-1, os.SEEK_END)
    return file.read(1)

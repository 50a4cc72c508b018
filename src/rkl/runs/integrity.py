"""Inputs and outputs of a run by content: sha256 of files and of values, compared by name.

Small files are hashed whenever they are checked. The digest of a file of
:data:`REMEMBERED_FROM` bytes or more is cached, valid while size, times and inode are the same.
"""

import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rkl.runs.files import as_json, cache_folder, write_json
from rkl.runs.progress import Progress

REMEMBERED_FROM = 2**30  # bytes of a file: below, hashing takes less than a second or two
SHOWN_FROM = 4 * 2**30  # bytes of a file whose hashing says how far it is
MAX_REMEMBERED = 10_000  # files in the memory of digests
SETTLED = 2_000_000_000  # ns: a file changed later than this may change again within one tick
MAY_GO = "checkpoint"  # how the names of files begin that a finished run does without
SHOWN_DIGITS = 12  # of a digest in a message
_CHUNK = 2**20
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")

Input = dict[str, Any]


def sha256_of(path: str | os.PathLike, *, remembered: bool = True) -> str:
    """Digest sha256 of a file, read in pieces.

    Args:
        path: The file.
        remembered: Whether to take the cached digest of a large file whose size,
            times and inode are unchanged. False reads the file.

    Raises:
        OSError: The file cannot be read.
    """
    before = os.stat(path)
    large = before.st_size >= REMEMBERED_FROM
    place = os.path.realpath(path)
    cached = _read_memory().get(place) if large and remembered else None
    if cached is not None and cached[:4] == _state_of(before):
        return cached[4]
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file, _progress(place, before.st_size) as shown:
        piece = memoryview(bytearray(_CHUNK))
        while count := file.readinto(piece):
            digest.update(piece[:count])
            shown.advance(count)
    hexadecimal = digest.hexdigest()
    state = _state_of(after := os.stat(path))
    if large and state == _state_of(before) and time.time_ns() - after.st_mtime_ns > SETTLED:
        _remember(place, [*state, hexadecimal])
    return hexadecimal


def measure(path: str | os.PathLike, *, remembered: bool = True) -> dict[str, Any]:
    """The digest and the size of a file, as run.json keeps them: ``{"sha256", "size"}``."""
    return {"sha256": sha256_of(path, remembered=remembered), "size": os.stat(path).st_size}


def values_of(source: str | os.PathLike | None, values: Iterable[Any], **more: Any) -> Input:
    """Record of an input that is used as values, independent of the file format.

    Args:
        source: The file or folder that they were read from, or another name.
        values: Text, bytes, arrays, tensors, or values that JSON can write; the order counts.
        more: Further entries of the record; ``of`` says what the values are computed from, if
            they are no input by themselves.
    """
    digest, size = hashlib.sha256(), 0
    for value in values:
        kind, data = _as_bytes(value)
        digest.update(f"{kind} {len(data)}\n".encode())
        digest.update(data)
        size += len(data)
    return _where(source) | {"sha256": digest.hexdigest(), "size": size} | more


def files_of(source: str | os.PathLike, files: Mapping[str, Path], **more: Any) -> Input:
    """The record of an input that is used as files, such as a model.

    Args:
        source: The folder or file, or the name, that was given.
        files: Each file by its name in messages.
        more: Further entries of the record.
    """
    measured = {name: measure(path) for name, path in sorted(files.items())}
    lines = "".join(f"{name}\0{it['sha256']}\n" for name, it in measured.items())
    whole = {
        "sha256": hashlib.sha256(lines.encode()).hexdigest(),
        "size": sum(it["size"] for it in measured.values()),
    }
    return _where(source) | whole | {"files": measured} | more


def inputs_before(out: str | os.PathLike) -> dict[str, Input]:
    """Inputs that the run in a folder was started with.

    Empty where there is no run, or an older run.json without digests.
    """
    try:
        inputs = json.loads(Path(out, "run.json").read_bytes())["inputs"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return {}  # of a folder that Run.create refuses, or begins
    return inputs if isinstance(inputs, dict) else {}


@dataclass(frozen=True)
class Verified:
    """Result of comparing the files of a run with their digests; prints as one line.

    Attributes:
        path: The folder of the run.
        files: Number of files that were read and are as rkl wrote them.
        size: Their total size in bytes.
        unmeasured: Names of the files without a digest.
    """

    path: Path
    files: int
    size: int
    unmeasured: tuple[str, ...] = ()

    def __add__(self, other: "Verified") -> "Verified":
        within = other.path.relative_to(self.path).as_posix()
        names = (*self.unmeasured, *(f"{within}/{it}" for it in other.unmeasured))
        return Verified(self.path, self.files + other.files, self.size + other.size, names)

    def __str__(self) -> str:
        line = f"Verified {self.files:,} files, {self.size:,} bytes, of {self.path}."
        if self.unmeasured:
            names = ", ".join(self.unmeasured[:3]) + (" ..." if len(self.unmeasured) > 3 else "")
            line += f" There is no digest of {len(self.unmeasured):,}: {names}."
        return line


def check_files(
    folder: str | os.PathLike,
    listed: Mapping[str, Mapping[str, Any]],
    *,
    remembered: bool = False,
    missing: bool = False,
) -> Verified:
    """Compare files of a run with the digests that its run.json has of them.

    Args:
        folder: The run.
        listed: Entry of each file, by name: ``{"sha256": ..., "size": ...}``.
        remembered: Whether to take cached digests of large files.
        missing: Whether a missing file, other than a checkpoint, is a fault.

    Raises:
        ValueError: Some are not as rkl wrote them; each is named, with both digests.
    """
    faults, count, size, unmeasured = [], 0, 0, []
    for name, entry in listed.items():
        path = Path(folder, name)
        if not entry.get("sha256"):
            unmeasured += [name] if path.exists() else []
        elif path.is_file():
            measured = measure(path, remembered=remembered)
            faults += [] if measured == entry else [f"{name}: {difference(entry, measured)}"]
            count, size = count + 1, size + measured["size"]
        elif path.exists() or (missing and not name.startswith(MAY_GO)):
            faults.append(f"{name} is gone")
    if faults:
        raise ValueError(
            f"path: {folder} is damaged, or was changed by others than rkl: {'; '.join(faults)}. "
            "Restore these files from a copy, or make the run again."
        )
    return Verified(Path(folder), count, size, tuple(unmeasured))


def check_inputs(
    run: str | os.PathLike,
    before: Mapping[str, Input],
    now: Mapping[str, Input],
    *,
    argument: str = "resume",
    advice: str = "Put back what was there, or begin another run with another --out.",
) -> None:
    """Refuse inputs that differ from those that a run was started with.

    Their places and time stamps are not compared.

    Raises:
        ValueError: Some differ; it names each with its digest then and now.
    """
    names = sorted(before.keys() | now.keys()) if before else []
    differing = [it for it in names if _digest_of(before, it) != _digest_of(now, it)]
    causes = [it for it in differing if "of" not in now.get(it, before.get(it, {}))] or differing
    changed = [words for it in causes for words in _changes(it, before.get(it), now.get(it))]
    if changed:
        raise ValueError(
            f"{argument}: the inputs differ from those of {run}: {'; '.join(changed)}. {advice}"
        )


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Two digests with the sizes of their files, shortened to the digits that differ."""
    was, now = (str(it.get("sha256")) for it in (old, new))
    digits = SHOWN_DIGITS if was[:SHOWN_DIGITS] != now[:SHOWN_DIGITS] else 64
    was, now = was[:digits], now[:digits]
    before, after = (f"{it.get('size', 'unknown')} bytes" for it in (old, new))
    return f"sha256 was {was} ({before}) and is {now} ({after})"


def local_path(name: str | os.PathLike) -> Path | None:
    """The file or folder of this name, absolute and resolved; None where there is none."""
    try:
        path = Path(name).expanduser()
        return path.resolve() if path.exists() else None
    except (OSError, RuntimeError, ValueError):  # too long, no home, a NUL
        return None


def hub_name(argument: str, name: str | os.PathLike) -> str:
    """Name of a repository on the Hub, for a name that is neither a file nor a folder.

    A name that looks like a path is never looked up there. ``hub:NAME`` always means the Hub.

    Raises:
        FileNotFoundError: It looks like a path.

    >>> hub_name("teacher", "Qwen/Qwen3-0.6B"), hub_name("teacher", "hub:Qwen/Qwen3-0.6B")
    ('Qwen/Qwen3-0.6B', 'Qwen/Qwen3-0.6B')
    """
    text = os.fspath(name)
    if text.startswith("hub:"):
        text = text.removeprefix("hub:")
        if not _HUB_NAME.fullmatch(text):
            raise ValueError(
                f"{argument}: hub: must be followed by NAME or OWNER/NAME; got {text!r}."
            )
        return text
    first, slash, _rest = text.partition("/")
    if (
        slash
        and _HUB_NAME.fullmatch(text)
        and first not in ("", ".", "..")
        and Path(first).exists()
    ):
        raise FileNotFoundError(
            f"{argument}: there is no {text}, but there is a folder {first} here. If a "
            f"repository on the Hub is meant, say hub:{text}."
        )
    if text.startswith((".", "~")) or not _HUB_NAME.fullmatch(text):
        raise FileNotFoundError(
            f"{argument}: there is no file or folder {text}. A name on the Hub is NAME or "
            "OWNER/NAME."
        )
    return text


def first_not_finite(tensors: Iterable[tuple[str, Any]]) -> str | None:
    """The name of the first tensor that holds a NaN or an infinity; None where none does.

    One pass over the data, without a copy: the extremes of a tensor are NaN if any number is.
    """
    import torch

    for name, tensor in tensors:
        if not tensor.is_floating_point() or not tensor.numel() or tensor.is_meta:
            continue
        if tensor.element_size() == 1:  # float8, which has no comparison
            tensor = tensor.to(torch.bfloat16)
        if not all(bool(it.isfinite()) for it in torch.aminmax(tensor.detach())):
            return name
    return None


def check_finite(tensors: Iterable[tuple[str, Any]], path: str | os.PathLike, what: str) -> None:
    """Refuse weights that are not finite.

    Args:
        tensors: Names and tensors, as ``named_parameters()`` gives them.
        path: The file or folder that they were read from.
        what: Name of the object: "model", "flow", "critic".

    Raises:
        ValueError: Naming the file and the first such tensor in it.
    """
    if (name := first_not_finite(tensors)) is not None:
        file, tensor = _in_file(Path(path)) or (path, name)
        raise ValueError(
            f"{what}: {file} holds weights that are NaN or infinite, first in {tensor}. Nothing "
            "can be computed with them; take an earlier checkpoint or another copy."
        )


def _in_file(path: Path) -> tuple[Path, str] | None:
    from safetensors import SafetensorError, safe_open

    for file in sorted(path.glob("*.safetensors")) if path.is_dir() else []:
        with contextlib.suppress(SafetensorError, OSError), safe_open(file, "pt") as opened:
            pairs = ((name, opened.get_tensor(name)) for name in opened.keys())  # noqa: SIM118
            if (name := first_not_finite(pairs)) is not None:
                return file, name
    return None


def _digest_of(inputs: Mapping[str, Input], name: str) -> str | None:
    return inputs[name]["sha256"] if name in inputs else None


def _changes(name: str, old: Input | None, new: Input | None) -> Iterator[str]:
    either: Any = old if new is None else new
    origin = either["path"] or either.get("of")
    place = f"{name} ({origin})" if origin else name
    if old is None or new is None:
        yield f"{place} was {'not ' if old is None else ''}given"
        return
    files = old.get("files") or {}, new.get("files") or {}
    differing = [
        it for it in sorted({*files[0], *files[1]}) if files[0].get(it) != files[1].get(it)
    ]
    if not differing:
        yield f"{place}: {difference(old, new)}"
    for file in differing:
        was, now = (it.get(file) for it in files)
        if was and now:
            yield f"{place}: {file}: {difference(was, now)}"
        else:
            yield f"{place}: {file} {'is gone' if was else 'was not there'}"


def _where(source: str | os.PathLike | None) -> Input:
    """The place of an input and the last change of its file, recorded for readers of run.json."""
    path = None if source is None else local_path(source)
    if path is None:
        name = None if source is None else os.fspath(source)
        return {"path": name, "local": False, "mtime_ns": None, "inode": None}
    status = path.stat()
    about = {"mtime_ns": status.st_mtime_ns, "inode": status.st_ino}
    return {"path": str(path), "local": True, **about}


def _as_bytes(value: Any) -> tuple[str, Any]:
    """A kind, which holds type and shape of an array, and the bytes of a value."""
    if isinstance(value, bytes):
        return "bytes", value
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    if hasattr(value, "__array_interface__"):
        import numpy as np

        array = np.ascontiguousarray(value).reshape(value.shape)
        array = array.astype(array.dtype.newbyteorder("<"), copy=False)
        return f"{array.dtype.str} {array.shape}", array.tobytes()
    return "json", as_json("values", value, sort_keys=True, separators=(",", ":")).encode(
        errors="surrogatepass"
    )


def _progress(path: str, size: int) -> Progress:
    """A progress bar for the hashing of a large file."""
    words = f"sha256 of {os.path.basename(path)}, {size / 1e9:.1f} GB:"
    return Progress(words, size, share=True, shown=size >= SHOWN_FROM)


def _state_of(status: os.stat_result) -> list[int]:
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _memory() -> Path | None:
    folder = cache_folder()
    return None if folder is None else folder / "digests.json"


def _read_memory() -> dict[str, list[Any]]:
    try:
        digests = json.loads((_memory() or Path()).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    rows = digests if isinstance(digests, dict) else {}
    return {it: row for it, row in rows.items() if isinstance(row, list) and len(row) == 5}


def _remember(path: str, row: list[Any]) -> None:
    """Cache a digest for later processes; of two at the same time one is lost."""
    if (memory := _memory()) is None:
        return
    digests = _read_memory()
    digests.pop(path, None)
    newest = dict([*digests.items(), (path, row)][-MAX_REMEMBERED:])
    with contextlib.suppress(OSError):
        memory.parent.mkdir(parents=True, exist_ok=True)
        write_json(memory, newest)

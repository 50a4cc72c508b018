"""The run folder of every wing: atomic writes, run.json, resume, fingerprints, load.

A run is a folder: ``run.json`` (kind, every setting, versions, seed, fingerprint of the data,
status), ``metrics.jsonl``, weights in safetensors, ``rows.bin`` (digests of the rows it was
trained on). Every file is written to a temporary name beside it, flushed to the disk and then
renamed: a process killed at any moment leaves the old file or the new one, never half of one.
"""

import contextlib
import fnmatch
import hashlib
import importlib
import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rkl.checks import integer
from rkl.importing import only
from rkl.runs import integrity, lock
from rkl.runs.files import (
    DiskFullError,
    append_jsonl,
    as_json,
    finite_or_null,
    full_disk,
    is_leftover,
    needing_room,
    read_jsonl,
    remove,
    remove_folder,
    replacing,
    replacing_files,
    replacing_folder,
    save_tensors,
    sweep,
    write_atomic,
    write_json,
)
from rkl.runs.lock import LOCK, RunBusyError
from rkl.runs.ownership import (
    PREPARED,
    check_out_file,
    file_entries,
    foreign_files,
    no_digest,
    refuse_foreign,
    refuse_inputs,
    remove_written,
    written_files,
)

__all__ = [
    "PREPARED",
    "REPLIES",
    "REPORT",
    "DiskFullError",
    "Run",
    "RunBusyError",
    "append_jsonl",
    "finite_or_null",
    "check_out",
    "check_out_file",
    "fingerprint",
    "foreign_files",
    "full_disk",
    "load",
    "save",
    "measure_written",
    "needing_room",
    "read_jsonl",
    "refuse_inputs",
    "remove_folder",
    "replacing",
    "replacing_files",
    "replacing_folder",
    "row_fingerprint",
    "save_tensors",
    "sweep",
    "verb",
    "versions",
    "write_atomic",
    "write_json",
    "written_files",
]

REPORT, REPLIES = "report.html", "replies.jsonl"  # names in a run of what verbs write by default
FORMAT = 1  # of run.json; raised when an older rkl could no longer read it
KINDS = (  # of runs: no other module is imported because a run.json names it
    *("distill", "fit", "sample", "bayes", "studies.akl", "studies.advnf"),
    *("studies.neyman_scott", "studies.precision_recall", "demos.distill"),
)
RESUMABLE = (  # kinds whose verbs take --resume
    *("distill", "fit", "sample", "studies.akl", "studies.advnf", "studies.neyman_scott"),
    *("studies.precision_recall", "demos.distill"),
)
MEASURED = (  # what is measured and drawn of the weights that a run came to
    *("evaluation.json", "evaluation-blocks.safetensors", "generations.jsonl", "report.html"),
)
RECORDED = "rkl", "torch", "transformers"  # distributions whose versions a run notes down
ROW_BYTES = 8  # of the fingerprint of a row: two of 10^6 rows collide once in 4 * 10^7 runs
_ENTRIES: dict[str, Any] = {  # what else run.json holds of which type, where it is there
    "seed": int,
    "data": dict | None,
    "versions": dict | None,
    "result": dict | None,
    "status": str | None,
}
Upgrade = Callable[[Mapping[str, Any]], Mapping[str, Any]]  # of settings that run.json holds
_KIND = re.compile(r"[a-z_]+(\.[a-z_]+)*")


def fingerprint(rows: Iterable[Any]) -> str:
    """A digest of rows, in their order: 32 hexadecimal digits.

    A row is bytes (an array's, say), text, or anything that JSON can write; a single text or
    a single bytes is one row.

    >>> fingerprint(["one row", {"a": 1, "b": 2}]) == fingerprint(["one row", {"b": 2, "a": 1}])
    True
    """
    if not isinstance(rows, Iterable):
        raise TypeError(f"rows must be a list of rows; got a {type(rows).__name__}.")
    digest = hashlib.blake2b(digest_size=16)
    for row in [rows] if isinstance(rows, str | bytes) else rows:
        digest.update(row_fingerprint(row))
    return digest.hexdigest()


def row_fingerprint(row: Any) -> bytes:
    """The digest of one row, eight bytes."""
    return hashlib.blake2b(_canonical(row), digest_size=ROW_BYTES).digest()


@dataclass(frozen=True)
class Run:
    """A run folder on the disk. Every property reads the files anew.

    Args:
        path: The folder.
    """

    path: Path

    @classmethod
    def create(
        cls,
        out: str | os.PathLike,
        kind: str,
        settings: Mapping[str, Any],
        *,
        seed: int,
        overwrite: bool = False,
        resume: bool = False,
        may_change: Collection[str] = (),
        upgrade: Upgrade | None = None,
    ) -> "Run":
        """Begin a run in the folder ``out``, or go on with the one that is there.

        Nothing is written, and nothing removed, before all arguments have been looked at.

        Args:
            out: The folder. One that holds anything is refused unless the next two say more.
            kind: The module below ``rkl`` that can load, evaluate and report the run.
            settings: Every setting of the run, as values that JSON can write.
            seed: Random seed.
            overwrite: Empty the folder first, if it holds a run.
            resume: Continue the run there, of the same kind and settings; begin it where
                the folder is missing or empty, as after a crash in its first moments.
            may_change: Names of the settings that a resumed run may change.
            upgrade: Function from the settings of a run of an earlier rkl to today's settings;
                by default they are compared as they are.
        """
        path = Path(out)
        record = _new_record(kind, settings, seed)
        how: dict[str, Any] = {"overwrite": overwrite, "resume": resume}
        how["resumable"] = kind in RESUMABLE
        check_out(path, **how)
        path.mkdir(parents=True, exist_ok=True)
        run = cls(path)
        if (whole := lock.writer_of(path)) is not None:  # of which this run is a part
            whole.claim([path.resolve() / "run.json"])
        lock.acquire(path, run.record_files)
        try:
            # Again, now that nobody else can change it.
            begun = check_out(path, **how)
            if begun and resume:
                return cls.open(path)._open_for_resume(record, may_change, upgrade)
            if begun:
                remove_written(path)
            sweep(path)
            write_json(path / "run.json", record)
        except BaseException:
            run.release()
            raise
        return run

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_error: object) -> None:
        self.release()

    def release(self) -> None:
        """Let other processes write the run; :meth:`create` took its lock."""
        if (writer := self._writer) is not None:
            writer.release()

    @classmethod
    def open(cls, path: str | os.PathLike) -> "Run":
        """The run in a folder that must hold one."""
        run = cls(Path(path))
        _ = run.record
        return run

    @property
    def record(self) -> dict[str, Any]:
        """The contents of run.json."""
        return _read_record(self.path)

    @property
    def kind(self) -> str:
        """The module below ``rkl`` that made the run."""
        return self.record["kind"]

    @property
    def settings(self) -> dict[str, Any]:
        """Settings with which the run was created."""
        return self.record["settings"]

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The rows logged so far."""
        path = self.path / "metrics.jsonl"
        return read_jsonl(path) if path.exists() else []

    @property
    def files(self) -> dict[str, dict[str, Any]]:
        """Files that rkl wrote into the folder: ``{name: {"sha256": ..., "size": ...}}``.

        The names are relative to the folder, with slashes. Both values are None for a file that
        was not measured after it was written. Where an older run.json lists no files, the names
        are those that rkl writes into a run of this kind.
        """
        listed = file_entries(self.record)
        return dict.fromkeys(written_files(self.path), no_digest()) if listed is None else listed

    def update(self, **entries: Any) -> None:
        """Set entries of run.json, atomically; entries that others set meanwhile stay."""
        with lock.updating(self.path):
            write_json(self.path / "run.json", self.record | entries)

    def record_files(self, files: Iterable[str] | Mapping[str, Mapping[str, Any]]) -> None:
        """List files in run.json as written by rkl, so that --overwrite may remove them.

        Files in a run that this process created need no call: the helpers of
        :mod:`rkl.runs` list each file before it takes its name, without a digest. Call it for a
        file that is written into a finished run, such as an evaluation, before the file is
        written; and with digests, once the file is final.

        Args:
            files: Names relative to the folder, with slashes; or, for each name, its
                ``{"sha256": hexadecimal digits, "size": bytes}``, valid until the file is
                written again.
        """
        digests = files if isinstance(files, Mapping) else {}
        entries = {str(name): {**no_digest(), **digests.get(name, {})} for name in files}
        with lock.updating(self.path):
            merged = self.files | entries
            record = self.record | {"files": dict(sorted(merged.items()))}
            write_json(self.path / "run.json", record)
        if (writer := self._writer) is not None:
            writer.names -= digests.keys()

    def forget_missing_files(self) -> None:
        """Remove the files that are no longer in the folder from the list in run.json."""
        with lock.updating(self.path):
            there = {name: it for name, it in self.files.items() if (self.path / name).is_file()}
            if there != file_entries(self.record):
                write_json(self.path / "run.json", self.record | {"files": there})
        if (writer := self._writer) is not None:
            writer.names &= there.keys()

    def measure_files(self, names: Iterable[str] | None = None) -> None:
        """Write the digests of files, as they are on the disk now, into run.json.

        Args:
            names: Names relative to the folder; by default all listed without a digest.
        """
        with lock.updating(self.path):
            listed = self.files
            chosen = (
                [it for it in listed if not listed[it].get("sha256")] if names is None else names
            )
            there = [it for it in chosen if _is_settled(it) and (self.path / it).is_file()]
            measured = {it: integrity.measure(self.path / it, remembered=False) for it in there}
            if not measured:
                return
            merged = dict(sorted({**listed, **measured}.items()))
            write_json(self.path / "run.json", self.record | {"files": merged})
        if (writer := self._writer) is not None:
            writer.names -= measured.keys()

    def check_files(self, *patterns: str) -> None:
        """Refuse files that match one of the patterns and differ from what rkl wrote.

        The cached digest of a large file is valid while its size and times are the
        same; :meth:`verify` reads everything.

        Raises:
            ValueError: Some differ; each is named, with both digests.
        """
        fitting = {
            name: it
            for name, it in self.files.items()
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
        }
        integrity.check_files(self.path, fitting, remembered=True)

    def verify(self, *, missing: bool = True) -> integrity.Verified:
        """Read every file that rkl wrote here, and compare it with its digest.

        Args:
            missing: Whether a missing file, other than a checkpoint, is a fault.

        Raises:
            ValueError: Some differ from what rkl wrote; each is named, with both digests.
        """
        files = self.files
        file_entries = {name: it for name, it in files.items() if _is_settled(name)}
        verified = integrity.check_files(self.path, file_entries, missing=missing)
        for name in files.keys() - file_entries.keys() - {"run.json"}:  # of runs within
            if (self.path / name).is_file():
                verified += Run((self.path / name).parent).verify(missing=missing)
        return verified

    @property
    def _writer(self) -> lock.Writer | None:
        writer = lock.writer_of(self.path / "run.json")
        return writer if writer and writer.folder == self.path.resolve() else None

    def log(self, row: Mapping[str, Any]) -> None:
        """Append a row to metrics.jsonl, null where it is not finite."""
        append_jsonl(self.path / "metrics.jsonl", finite_or_null(row))

    def rewind(self, step: int) -> None:
        """Remove the metrics of later steps, which a run resumed at this step logs again."""
        rows = [row for row in self.metrics if row.get("step", 0) <= step]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_atomic(self.path / "metrics.jsonl", text)

    def remove_measured(self) -> None:
        """Remove evaluation and report, because training changes the weights.

        A file of that name that rkl did not write stays.
        """
        for name in [it for it in MEASURED if it in self.files]:
            if (self.path / name).is_file() and not (self.path / name).is_symlink():
                remove(self.path / name)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Set the status in run.json: running, then finished, or interrupted if the block raises.

        At the end the lock is released.
        """
        if (writer := self._writer) is not None:
            writer.active = True
        try:
            self.update(status="running", ended=None)
            try:
                yield
            except BaseException:
                self._end("interrupted")
                raise
            self._end("finished")
        finally:
            self.release()

    def _end(self, status: str) -> None:
        self.forget_missing_files()
        self.measure_files()
        self.update(status=status, ended=_now())

    def remember_rows(self, rows: Iterable[Any]) -> None:
        """Record the digests of training rows, eight bytes each, for :meth:`count_seen`."""
        digests = sorted({row_fingerprint(row) for row in rows})
        write_atomic(self.path / "rows.bin", b"".join(digests))

    def count_seen(self, rows: Iterable[Any]) -> int:
        """Number of these rows that the run was trained on."""
        path = self.path / "rows.bin"
        stored = path.read_bytes() if path.exists() else b""
        digests = [stored[i : i + ROW_BYTES] for i in range(0, len(stored), ROW_BYTES)]
        seen = set(digests)
        if len(stored) % ROW_BYTES or digests != sorted(seen):
            raise ValueError(
                f"path: {path} is damaged: expected digests of {ROW_BYTES} bytes in ascending "
                f"order; got {len(stored):,} bytes. Which rows were trained on is unknown."
            )
        return sum(row_fingerprint(row) in seen for row in rows)

    def _open_for_resume(
        self, record: dict[str, Any], may_change: Collection[str], upgrade: Upgrade | None
    ) -> "Run":
        before = self.record
        if before["kind"] != record["kind"]:
            raise ValueError(
                f"resume: {self.path} holds a run of kind {before['kind']!r}; "
                f"expected {record['kind']!r}."
            )
        old, new = (it["settings"] | {"seed": it["seed"]} for it in (before, record))
        old = old if upgrade is None else {**upgrade(old)}
        changed = [
            f"{name} was {old.get(name)!r} and is {new.get(name)!r}"
            for name in sorted(old.keys() | new.keys())
            if name not in may_change and old.get(name) != new.get(name)
        ]
        if changed:
            raise ValueError(f"resume: settings of {self.path} differ: {'; '.join(changed)}.")
        self.verify(missing=False)
        sweep(self.path)
        self.forget_missing_files()
        return self


def measure_written(folder: Path) -> None:
    """Write the digests of all files in a folder into run.json of the run being written there."""
    if (writer := lock.writer_of(folder / "any")) is not None:
        place = folder.resolve().relative_to(writer.folder).as_posix()
        run = Run(writer.folder)
        run.measure_files([it for it in run.files if it.startswith(f"{place}/")])


def check_out(
    out: str | os.PathLike,
    *,
    overwrite: bool = False,
    resume: bool = False,
    resumable: bool = True,
    inputs: Mapping[str, Any] | None = None,
) -> bool:
    """Refuse a folder to which a run cannot be written; nothing is written.

    Args:
        out: The folder.
        overwrite: Whether to replace a run there.
        resume: Whether to continue a run there.
        resumable: Whether the verb has --resume, which a refusal then proposes.
        inputs: Files and folders that the run reads, by the name of the argument. None may lie
            in the folder, nor the folder in one of them, except when a run is resumed.

    Returns:
        Whether there is something in the folder.

    Raises:
        FileExistsError: It is no folder, holds a run without overwrite or resume, holds
            files that rkl did not write, or is being written by another process.
        FileNotFoundError: It holds something, but no run.
        ValueError: It holds an input, or lies in one.
    """
    path = Path(out)
    if overwrite and resume:
        raise ValueError("overwrite and resume exclude one another; got both.")
    above = next((it for it in (path, *path.parents) if it.exists()), path)
    if above.exists() and not above.is_dir():
        raise FileExistsError(f"out must be a folder; got {path}, and {above} is a file.")
    begun = path.is_dir() and not all(_is_nothing(entry) for entry in path.iterdir())
    if not (begun and resume):
        refuse_inputs(path, inputs or {})
    if path.is_dir():
        lock.check_free(path)
    if begun and not (overwrite or resume):
        going_on = "--resume to go on with the run in it, " if resumable else ""
        raise FileExistsError(
            f"out: {path} exists. Choose another folder, or use {going_on}--overwrite to replace "
            f"{'it' if resumable else 'the run in it'}."
        )
    if begun:
        _read_record(path)  # any other folder is not ours
    if begun and overwrite:
        refuse_foreign(path)
    return begun


def load(path: str | os.PathLike, *, allow: Collection[str] = (), verify: bool = False) -> Any:
    """Result of a run: the student of a distillation, the flow of a fit, an estimate.

    Args:
        path: The folder of the run.
        allow: Names that ``run.json`` may import, each "module:name", such as a target of
            your own; none by default, because importing a module runs its code.
        verify: Whether to compare all files that rkl wrote into the folder with their digests
            first; files that are loaded are compared in any case.

    Raises:
        ValueError: A file is not as rkl wrote it.
    """
    if verify:
        Run.open(path).verify()
    with only(allow):
        return verb("load_run", path)(path)


def save(made: Any, path: str | os.PathLike) -> Path:
    """Write a fit made in Python into a folder, which :func:`load` reads.

    Args:
        made: Result of a function such as ``rkl.fit.fit_to_samples``.
        path: The folder, new or empty.

    Raises:
        TypeError: Results of this type cannot be saved.
    """
    wing = ".".join(type(made).__module__.split(".")[:2])
    write = getattr(importlib.import_module(wing), "save_run", None) if "rkl." in wing else None
    if write is None:
        raise TypeError(
            f"made must be what a fit returned, as Fit of rkl.fit; got a {type(made).__name__}."
        )
    return write(made, path)


def verb(name: str, *paths: str | os.PathLike) -> Any:
    """Function of this name of the wing that made the runs in these folders.

    A run of kind "distill" is loaded by ``rkl.distill.load_run``, evaluated by
    ``rkl.distill.evaluate_run``: the name says where to look.
    """
    kinds = {path: Run.open(path).kind for path in paths}
    if len(set(kinds.values())) > 1:
        listed = ", ".join(f"{path} is of kind {kind!r}" for path, kind in kinds.items())
        raise ValueError(f"paths must be runs of one kind; got: {listed}.")
    path, kind = kinds.popitem()
    if kind not in KINDS:
        raise ValueError(
            f"path: {path} is a run of kind {kind!r}, which this rkl does not know; there are "
            f"{', '.join(KINDS)}."
        )
    wing = importlib.import_module(f"rkl.{kind}")
    try:
        return getattr(wing, name)
    except AttributeError:
        command = re.split("_|Settings", name)[0].lower()  # of a run or its settings
        command = "rkl.load" if name == "load_run" else f"rkl {command}"
        report = Path(path, "report.html")
        there = f" Its report is {report}." if report.exists() else ""
        raise ValueError(
            f"path: {path} is a run of kind {kind!r}, which {command} does not take.{there}"
        ) from None


def _new_record(kind: str, settings: Mapping[str, Any], seed: int) -> dict[str, Any]:
    if not isinstance(kind, str) or not _KIND.fullmatch(kind):
        raise ValueError(f"kind must name a module below rkl, such as 'distill'; got {kind!r}.")
    integer("seed", seed)
    if not isinstance(settings, Mapping):
        raise TypeError(f"settings must be a mapping that JSON can write; got {settings!r}.")
    settings = json.loads(as_json("settings", dict(settings)))  # tuples now equal the lists read
    return {
        "format": FORMAT,
        "kind": kind,
        "status": "running",
        "settings": settings,
        "seed": seed,
        "data": None,
        "versions": versions(),
        "started": _now(),
        "ended": None,
        "files": {"run.json": no_digest()},
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the main dependencies; nothing is imported."""
    installed = {"python": platform.python_version()}
    for name in RECORDED:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[name] = importlib.metadata.version(name)
    return installed


def _read_record(folder: Path) -> dict[str, Any]:
    path = folder / "run.json"
    try:
        record = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"path: {folder} is not a run: it has no run.json.") from None
    except RecursionError:
        raise ValueError(f"path: {path} is corrupt: it is nested too deeply.") from None
    except ValueError as error:
        raise ValueError(f"path: {path} is corrupt: {error}.") from None
    complete = isinstance(record, dict) and {"format", "kind", "settings", "seed"} <= record.keys()
    complete = complete and isinstance(record["settings"], dict)
    if not complete or not isinstance(record["format"], int):
        raise ValueError(
            f"path: {path} was not written by rkl: format, kind or settings are missing."
        )
    if record["format"] > FORMAT:
        raise ValueError(
            f"path: {path} has format {record['format']}; this rkl reads up to {FORMAT}. "
            "Install a newer rkl."
        )
    for name, kinds in _ENTRIES.items():
        value = record.get(name)
        if isinstance(value, bool) or not isinstance(value, kinds):
            raise ValueError(f"path: {path} is damaged: its {name} is {value!r:.80}.")
    if not isinstance(record["kind"], str) or not _KIND.fullmatch(record["kind"]):
        raise ValueError(f"path: {path} has no such kind of run: {record['kind']!r}.")
    if record["kind"] == "flows":  # as 0.1 called both kinds of runs that hold a flow
        record["kind"] = "sample" if "target" in record["settings"] else "fit"
    if record["kind"] == "studies.demo":  # as 0.1 called the demonstrations of distillation
        record["kind"] = "demos.distill"
    return record


def _is_settled(name: str) -> bool:
    """True if the digest of a file stays valid: run.json, and that of a run within, change."""
    return name.rpartition("/")[2] != "run.json"


def _is_nothing(entry: Path) -> bool:
    return is_leftover(entry) or entry.name == LOCK


def _canonical(row: Any) -> bytes:
    if isinstance(row, bytes):
        return row
    return as_json("rows", row, sort_keys=True, separators=(",", ":")).encode()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")

"""Files of a run folder that rkl wrote, and refusals of places where rkl must not write.

Overwriting a run removes the files that run.json lists under ``files``, and nothing else.
"""

import fnmatch
import glob
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rkl.runs.files import is_leftover, remove
from rkl.runs.lock import LOCK

# Folder of a study, while it lasts, in which processes of it write what no list has.
PREPARED = "prepared"
MAX_NAMED = 3  # foreign files named in a refusal; the others are counted
_FOR_ALL = "run.json", "metrics.jsonl", "rows.bin", "evaluation.json", "report.html"
_MODEL = (
    "README.md",
    "adapter_config.json",
    "adapter_model*.safetensors",
    "added_tokens.json",
    "chat_template.*",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "model*.safetensors",
    "model.safetensors.index.json",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.*",
)
# What the runs of each kind hold that were written before run.json listed it.
_UNLISTED: Mapping[str, tuple[str, ...]] = {
    "distill": (
        *_MODEL,
        "generations.jsonl",
        "replies.jsonl",
        "checkpoints/checkpoint-*/*",
        "teacher/head.safetensors",
        "teacher/hidden.bin",
        "teacher/cache.json",
    ),
    **dict.fromkeys(("fit", "sample", "flows"), ("flow.safetensors", "checkpoint.safetensors")),
    "bayes": ("estimate.json", "report.json", "marginals.npz"),
    "studies": (
        "*.svg",
        "*.csv",
        "data/train.jsonl",
        "data/held-out.jsonl",
        "head-tail.safetensors",
        "teacher-generations.jsonl",
        "cache/head.safetensors",
        "cache/hidden.bin",
        "cache/cache.json",
    ),
}


def file_entries(record: Mapping[str, Any]) -> dict[str, dict[str, Any]] | None:
    """The files in a run.json, if it lists them: ``{name: {"sha256": ..., "size": ...}}``."""
    files = record.get("files")
    if not isinstance(files, dict):
        return None
    return {name: it if isinstance(it, dict) else no_digest() for name, it in files.items()}


def no_digest() -> dict[str, Any]:
    """Entry of a file without a digest."""
    return {"sha256": None, "size": None}


def written_files(folder: Path) -> list[str]:
    """The files in a run folder that rkl wrote, by name relative to it; those of runs within too.

    Links are never followed, and no link is a file of rkl's.
    """
    return sorted(_split_by_owner(folder)[0])


def foreign_files(folder: Path) -> list[str]:
    """Entries of a run folder that rkl did not write, except leftovers of killed processes."""
    return sorted(_split_by_owner(folder)[1])


def refuse_foreign(folder: Path) -> None:
    """Refuse to overwrite a run folder with anything that rkl did not write.

    Raises:
        FileExistsError: There is; the message names some of it.
    """
    foreign = foreign_files(folder)
    if not foreign:
        return
    named = ", ".join(foreign[:MAX_NAMED])
    more = f" and {len(foreign) - MAX_NAMED:,} more" if len(foreign) > MAX_NAMED else ""
    count = "1 file" if len(foreign) == 1 else f"{len(foreign):,} files"
    raise FileExistsError(
        f"out: {folder} holds {count} that rkl did not write: {named}{more}. Move them away, or "
        "choose another folder. Nothing was removed."
    )


def remove_written(folder: Path) -> None:
    """Remove the files that rkl wrote into a run folder, run.json last, and emptied folders."""
    written = written_files(folder)
    for name in [it for it in written if it != "run.json"]:
        remove(folder / name)
    for entry in [it for it in _walk(folder) if is_leftover(it)]:
        remove(entry)
    parents = {parent for name in written for parent in (folder / name).parents}
    below = [it for it in parents if it != folder and it.is_relative_to(folder)]
    for parent in sorted(below, key=lambda it: len(it.parts), reverse=True):
        if parent.is_dir() and not any(parent.iterdir()):
            parent.rmdir()
    remove(folder / "run.json")


def _split_by_owner(folder: Path) -> tuple[set[str], set[str]]:
    entries = list(_walk(folder))
    names = {it.relative_to(folder).as_posix(): it for it in entries if not is_leftover(it)}
    names.pop(LOCK, None)
    owned: set[str] = set()
    _add_owned(folder, "", names, owned)
    ours = {name for name in names if name in owned and not names[name].is_symlink()}
    return ours, names.keys() - ours


def _add_owned(folder: Path, within: str, names: Iterable[str], owned: set[str]) -> None:
    """Add the files of the run in ``within``, and of the runs that it lists or must hold."""
    try:
        record = json.loads((folder / within / "run.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return
    if not isinstance(record, dict):
        return
    inside = [name.removeprefix(within) for name in names if name.startswith(within)]
    files = file_entries(record)
    if files is None:
        patterns = (*_FOR_ALL, *_patterns_before_listing(record))
        files = [name for name in inside if any(_matches(name, it) for it in patterns)]
        if str(record.get("kind")).startswith("studies."):
            files += [it for it in inside if it.count("/") == 1 and it.endswith("/run.json")]
    if str(record.get("kind")).startswith("studies.") and record.get("status") != "finished":
        files = [*files, *(it for it in inside if it.startswith(f"{PREPARED}/"))]
    owned |= {within + name for name in [*files, "run.json"]}
    for name in set(files) & set(inside):
        if name.endswith("/run.json"):
            owned.add(within + name.removesuffix("run.json") + LOCK)
            _add_owned(folder, within + name.removesuffix("run.json"), names, owned)


def _patterns_before_listing(record: Mapping[str, Any]) -> tuple[str, ...]:
    return _UNLISTED.get(str(record.get("kind")).partition(".")[0], ())


def _matches(name: str, pattern: str) -> bool:
    one, other = name.split("/"), pattern.split("/")
    return len(one) == len(other) and all(map(fnmatch.fnmatchcase, one, other))


def _walk(folder: Path) -> Iterable[Path]:
    """Files, links and others below a folder; of a leftover folder only the folder itself."""
    for entry in sorted(folder.iterdir()):
        if entry.is_dir() and not entry.is_symlink() and not is_leftover(entry):
            yield from _walk(entry)
        else:
            yield entry


def refuse_inputs(out: str | os.PathLike, inputs: Mapping[str, Any]) -> None:
    """Refuse a folder to write that holds an input, or that lies in a folder that is one.

    Args:
        out: The folder to be written.
        inputs: The files and folders that are read, by the name of the argument; None and
            names that are no files, such as a model on a hub, are skipped.

    Raises:
        ValueError: The folder holds one of them, also by way of links, or lies in one.
    """
    place = Path(out)
    places = {place.resolve(), Path(os.path.abspath(place))}
    for name, source in _existing(inputs):
        ways = _ways_to(Path(source))
        if any(way.is_relative_to(it) for way in ways for it in places):
            raise ValueError(
                f"out: {out} holds the {name}, {source}; choose another folder, or move the "
                f"{name} out of it."
            )
        if Path(source).is_dir() and any(it.is_relative_to(way) for way in ways for it in places):
            raise ValueError(f"out: {out} lies in the {name}, {source}; choose another folder.")


def check_out_file(
    out: str | os.PathLike,
    *,
    overwrite: bool = False,
    inputs: Mapping[str, Any] | None = None,
    own: str | None = None,
) -> None:
    """Refuse to write a file where there is one that rkl did not write.

    Args:
        out: The file.
        overwrite: Whether a file there may be replaced. A file of a run never is, except ``own``.
        inputs: The files that are read, by the name of the argument.
        own: Name of the file in a run folder that the verb writes by default; one that rkl
            wrote may be replaced.

    Raises:
        FileExistsError: There is such a file, or a folder; or it is a file of a run.
        FileNotFoundError: There is no folder to write it to.
        ValueError: It is an input.
    """
    path = Path(out)
    if path.is_dir():
        raise FileExistsError(f"out must be a file; got {path}, which is a folder.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"out: there is no folder {path.parent} for {path.name}.")
    for name, source in _existing(inputs or {}):
        if path.exists() and os.path.samefile(path, source):
            raise ValueError(f"out: {out} is the {name} itself; choose another file.")
    of_run = _run_of(path)
    if of_run is not None and of_run[1] != own:
        folder, name = of_run
        raise FileExistsError(
            f"out: {path} is a file of the run {folder}, {name}; choose another name."
        )
    written = of_run is not None and of_run[1] in written_files(of_run[0])
    if os.path.lexists(path) and not (overwrite or written or _is_our_page(path)):
        raise FileExistsError(
            f"out: {path} exists. Choose another name, or use --overwrite to replace it "
            "(overwrite=True in Python)."
        )


def _run_of(path: Path) -> tuple[Path, str] | None:
    """The run folder that a file belongs to, or would by its name, and its name in it."""
    resolved = path.parent.resolve() / path.name
    for place in {resolved, path.resolve()}:
        for folder in place.parents:
            try:
                record = json.loads((folder / "run.json").read_bytes())
            except (OSError, ValueError, RecursionError):
                continue
            name = place.relative_to(folder).as_posix()
            if not isinstance(record, dict) or not {"format", "kind"} <= record.keys():
                continue
            patterns = (*_FOR_ALL, *_patterns_before_listing(record), LOCK)
            if name in (file_entries(record) or {}) or any(_matches(name, it) for it in patterns):
                return folder, name
    return None


def _is_our_page(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return b'<meta name="generator" content="rkl">' in file.read(400)
    except OSError:
        return False


def _existing(inputs: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """The inputs that exist; a pattern such as chain-*.csv as all files that match."""
    for name, source in inputs.items():
        if source is not None and os.path.lexists(source):
            yield name, os.fspath(source)
        elif source is not None:
            yield from ((name, it) for it in glob.glob(os.fspath(source)))


def _ways_to(path: Path) -> set[Path]:
    """The absolute names of a file: as it is written, link by link, and without links."""
    ways, name = {path.resolve()}, Path(os.path.abspath(path))
    for _ in range(40):  # of links, which may be a circle
        ways |= {name, name.parent.resolve() / name.name}
        if not name.is_symlink():
            break
        name = Path(os.path.abspath(name.parent.resolve() / os.readlink(name)))
    return ways

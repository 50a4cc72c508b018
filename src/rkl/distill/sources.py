"""Where rows come from: files, Hugging Face data sets, memory. Each is checked as it is read."""

import importlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from rkl.runs.integrity import hub_name

Row = dict[str, Any]
Data = str | Path | Iterable[Mapping[str, Any]] | Mapping[str, Iterable[Mapping[str, Any]]]

COLUMNS = {
    "messages": ("messages",),
    "completion": ("prompt", "completion"),
    "text": ("text",),
}
EXPECTED = "expected text, or prompt and completion, or messages"


def read_rows(data: Data, *, split: str = "train") -> list[Row]:
    """The rows of some data, all of one kind, with the columns of that kind and no others.

    ========================  =========================================================
    data                      rows
    ========================  =========================================================
    ``*.jsonl``               one JSON object a line, blank lines apart
    ``*.txt``                 one row, the whole text
    ``*.parquet``             those of the table (extra ``data``)
    a folder                  of a data set saved by ``save_to_disk`` (extra ``data``)
    any other name            a data set on the Hub, ``name`` or ``name:config``, or
                              ``hub:name`` where a folder has that name (extra ``data``)
    list, datasets.Dataset    their own
    ========================  =========================================================

    Args:
        data: One of the above.
        split: Which split of a data set that has several.

    Raises:
        ValueError: Naming file and line, or row, where something else was expected.
        ImportError: With the line to type, where an extra is missing.
    """
    named = isinstance(data, str | Path)
    rows, kind = [], None
    for place, row in _read_named(data, split) if named else _in_memory(data, split):
        found = kind_of(row, place)
        kind = kind or found
        if found != kind:
            raise ValueError(f"{place}: a row of {found} among rows of {kind}; expected one kind.")
        rows.append(_checked(row, found, place))
    if not rows:
        raise ValueError(f"data: {data if named else type(data).__name__} has no rows.")
    return rows


def kind_of(row: Any, place: str) -> str:
    """Which kind of row this is, by its columns: "messages", "completion" or "text"."""
    if not isinstance(row, Mapping):
        raise ValueError(f"{place}: {EXPECTED}; got {_short(row)}, which is no object.")
    for kind, columns in COLUMNS.items():
        if all(row.get(column) is not None for column in columns):
            return kind
    found = sorted(str(column) for column, value in row.items() if value is not None)
    raise ValueError(f"{place}: {EXPECTED}; got the columns {found}, null ones apart.")


def _checked(row: Mapping[str, Any], kind: str, place: str) -> Row:
    if kind == "messages" and row.get("tools"):
        raise ValueError(f"{place}: tools are not put into the chat template; take them out.")
    values = {column: row[column] for column in COLUMNS[kind]}
    for column, value in values.items():
        if isinstance(value, str) and kind != "messages":
            continue
        if kind == "text":
            raise ValueError(f"{place}: text must be a string; got {_short(value)}.")
        values[column] = _messages(value, column, place)
    if len({type(value) for value in values.values()}) > 1:
        raise ValueError(f"{place}: prompt and completion must both be text or both messages.")
    return values


def _messages(value: Any, column: str, place: str) -> list[dict[str, Any]]:
    if not isinstance(value, (list, tuple)) or not value:
        raise ValueError(f"{place}: {column} must be a list of messages; got {_short(value)}.")
    for message in value:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(
                f"{place}: each of {column} must be an object with role and content; "
                f"got {_short(message)}."
            )
        if "content" in message and not isinstance(message["content"], (str, list, type(None))):
            raise ValueError(
                f"{place}: content in {column} must be text; got {_short(message['content'])}."
            )
    return [dict(message) for message in value]


def _in_memory(data: Any, split: str) -> Iterator[tuple[str, Any]]:
    if isinstance(data, Mapping):
        if split not in data:
            raise ValueError(f"split must be one of {sorted(data)}; got {split!r}.")
        data = data[split]
    if not isinstance(data, Iterable):
        raise TypeError(f"data must be a file, a data set or a list of rows; got {_short(data)}.")
    return ((f"data, row {number}", row) for number, row in enumerate(data, 1))


def _read_named(data: str | Path, split: str) -> Iterator[tuple[str, Any]]:
    path = Path(data)
    if path.is_dir():
        return _saved(path, split)
    if (reader := _READERS.get(path.suffix.lower())) is None:
        if path.exists():
            raise ValueError(f"data must end in {', '.join(_READERS)}; got the file {path}.")
        return _on_hub(_data_set(str(data)), split)
    if not path.is_file():
        raise FileNotFoundError(f"data: there is no file {path}.")
    return reader(path)


def _jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            place = f"{path}, line {number}"
            text = _utf8(line, place)
            if text.strip():
                yield place, _json(text, place)


def _txt(path: Path) -> Iterator[tuple[str, Any]]:
    text = _utf8(path.read_bytes(), str(path))
    if text.strip():
        yield str(path), {"text": text}


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    table_of = _extra("pyarrow.parquet", f"Reading {path.name}")
    try:
        table = table_of.read_table(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no parquet file: {str(error).splitlines()[0]}") from None
    known = {column for columns in COLUMNS.values() for column in columns}
    found = [name for name in table.column_names if name in known]
    if not found:
        raise ValueError(f"{path}: {EXPECTED}; got the columns {sorted(table.column_names)}.")
    rows = (row for batch in table.select(found).to_batches() for row in batch.to_pylist())
    return ((f"{path}, row {number}", row) for number, row in enumerate(rows, 1))


_READERS: dict[str, Callable[[Path], Iterator[tuple[str, Any]]]] = {
    ".jsonl": _jsonl,
    ".txt": _txt,
    ".parquet": _parquet,
}


def _saved(path: Path, split: str) -> Iterator[tuple[str, Any]]:
    datasets = _extra("datasets", f"Reading the folder {path}")
    try:
        found = datasets.load_from_disk(str(path))
    except FileNotFoundError:
        raise ValueError(
            f"data: the folder {path} holds no data set saved by datasets' save_to_disk."
        ) from None
    return _in_memory(found, split)


def _data_set(text: str) -> str:
    """The name of a data set on the Hub, with its configuration; a path is refused."""
    prefix = "hub:" if text.startswith("hub:") else ""
    name, colon, config = text.removeprefix("hub:").partition(":")
    return hub_name("data", prefix + name) + colon + config


def _on_hub(name: str, split: str) -> Iterator[tuple[str, Any]]:
    datasets = _extra("datasets", f"There is no file {name!r}, and the data set of that name")
    dataset, _, config = name.partition(":")
    try:
        found = datasets.load_dataset(dataset, config or None, split=split)
    except Exception as error:  # whatever a hub, a network and a loader may raise
        raise ValueError(f"data: {name!r} is neither a file nor a data set: {error}") from error
    return _in_memory(found, split)


def _extra(module: str, purpose: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{purpose} needs the package {module.partition('.')[0]}: "
            "pip install 'rkl[data]' brings it."
        ) from error


def _utf8(data: bytes, place: str) -> str:
    try:
        return data.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        got = f"the byte 0x{data[error.start]:02x} at {error.start:,}"
        raise ValueError(f"{place}: expected UTF-8; got {got}.") from None


def _json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: not JSON ({error}); {EXPECTED}.") from None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

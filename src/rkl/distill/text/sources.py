"""Sources of rows: files, Hugging Face data sets, memory. Each row is checked when it is read."""

import contextlib
import importlib
import io
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch

from rkl.checks import warn
from rkl.distill.text.chats import as_tools, has_nulls, without_nulls
from rkl.readers import gunzip, read_records
from rkl.runs.integrity import hub_name

Row = dict[str, Any]


@runtime_checkable
class Frame(Protocol):
    """A data frame of pandas, without its import."""

    columns: Any

    def notna(self) -> Any:
        """A frame of True where nothing is missing."""


Some = Iterable[Mapping[str, Any]] | Frame
Data = str | Path | Some | Mapping[str, Some]

COLUMNS = {
    "messages": ("messages",),
    "completion": ("prompt", "completion"),
    "text": ("text",),
    "prompt": ("prompt",),  # which the student, or the teacher, replies to
}
TOOLS = "tools"  # a column that rows of messages may have
TEACHER_PROMPT, PRIVILEGED_CONTEXT = "teacher_prompt", "privileged_context"  # read by it alone
OTHER_COLUMNS = (  # of rows in the words of Alpaca, ShareGPT and others
    *("prompt", "response", "instruction", "input", "output", "history", "system"),
    "conversations",
)
ANSWERED = ("prompt", "response"), ("conversations",), ("instruction", "output")  # of those
ROLES = {  # what ShareGPT calls them
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "assistant", "model", "bing", "bard"), "assistant"),
    **dict.fromkeys(("observation", "tool", "function_response"), "tool"),
    "system": "system",
}
_ARRAYS = np.ndarray, torch.Tensor
EXPECTED = "expected text, or prompt and completion, or messages"  # or a prompt alone
ALSO = "; instruction and output, or conversations, are read as messages"


class Rows(list[Row]):
    """Rows, each with its place in what they were read from.

    Args:
        rows: The rows.
        source: What they were read from, such as a file.
        unit: What its parts are called: "line" or "row".
        numbers: The number of each row there, counted from 1; None where it is the whole.
        filled: True if nulls may stand for keys that a row does not have, as in Arrow.
    """

    def __init__(
        self,
        rows: Iterable[Row] = (),
        source: str = "data",
        unit: str = "row",
        numbers: Iterable[int | None] | None = None,
        *,
        filled: bool = False,
    ):
        super().__init__(rows)
        self.source, self.unit, self.filled = source, unit, filled
        self.numbers = list(range(1, len(self) + 1)) if numbers is None else list(numbers)

    def place(self, index: int) -> str:
        """The place of a row, for error messages."""
        number = self.numbers[index]
        return self.source if number is None else f"{self.source}, {self.unit} {number}"

    def some(self, indices: Iterable[int]) -> "Rows":
        """The rows with these indices, which keep their places."""
        chosen = list(indices)
        return Rows(
            (self[index] for index in chosen),
            self.source,
            self.unit,
            (self.numbers[index] for index in chosen),
            filled=self.filled,
        )


def read_rows(data: Data, *, split: str = "train", column: str | None = None) -> Rows:
    """The rows of some data, all of one kind, with the columns of that kind and no others.

    ========================  =========================================================
    data                      rows
    ========================  =========================================================
    ``*.jsonl``, ``*.ndjson`` one JSON object a line, blank lines apart
    ``*.json``                a list of objects, or one object a line
    ``*.csv``, ``*.tsv``      a row of text a line, its columns named in the first
    ``*.txt``                 one row, the whole text
    ``*.gz``                  one of these, compressed
    ``*.parquet``             those of the table (extra ``data``)
    a folder                  of a data set saved by ``save_to_disk`` (extra ``data``)
    any other name            a data set on the Hub, ``name`` or ``name:config``, or
                              ``hub:name`` where a folder has that name (extra ``data``)
    list, datasets.Dataset    their own
    pandas.DataFrame          its own, missing values being null
    ========================  =========================================================

    Rows of ``prompt`` and ``response``, of Alpaca (``instruction``, ``input``, ``output``, also
    ``system`` and ``history``) and of ShareGPT (``conversations`` of ``from`` and ``value``) are
    read too: the first as prompt and completion, the others as messages. A column ``text`` beside
    them counts more, with a warning: all of it is trained on.

    Args:
        data: One of the above.
        split: Which split of a data set that has several.
        column: One more column to keep, that names the teacher of each row; every row must have
            it.

    Raises:
        ValueError: Naming file and line, or row, where something else was expected.
        ImportError: With the line to type, where an extra is missing.
    """
    if isinstance(data, Rows):
        for index, row in enumerate(data if column is not None else ()):
            _name_in(row, column, data.place(index))
        return data
    named = isinstance(data, str | Path)
    rows, numbers, kind, nulls, unused, unread = [], [], None, 0, None, False
    read = _read_named(data, split, column) if named else _in_memory(data, split)
    for number, row in read.rows:
        place = read.source if number is None else f"{read.source}, {read.unit} {number}"
        given, row = row, _in_our_words(row, place)
        found = kind_of(row, place)
        unread = unread or _leaves_system_out(row, found, reworded=row is not given)
        kind = kind or found
        if found != kind:
            raise ValueError(f"{place}: a row of {found} among rows of {kind}; expected one kind.")
        if found == "text":
            unused = unused or _answer_columns(row)
        row = _checked(row, found, place) | _name_in(row, column, place)
        if read.filled and found != "text":
            row, removed = _without_filled_nulls(row)
            nulls += removed
        rows.append(row)
        numbers.append(number)
    if not rows:
        raise ValueError(f"data: {data if named else type(data).__name__} has no rows.")
    if unused:
        warn(
            f"{read.source}: rows have text beside {' and '.join(unused)}. All of the text is "
            "trained on, which may hold the question too; leave the column text out to train on "
            "the answers alone."
        )
    if unread:
        warn(
            f"{read.source}: rows of {kind} have a column system, which is not read: put it into "
            "the prompt, or as a message of the role system before the others."
        )
    if nulls:
        warn(
            f"{read.source}: in {nulls:,} of {len(rows):,} rows null values below tool_calls or "
            "tools are left out: Arrow writes them for keys that other rows have."
        )
    return Rows(rows, read.source, read.unit, numbers, filled=read.filled)


def read_whole_rows(data: Data, *, split: str = "train") -> Rows:
    """The rows of some data with all their columns, as they are, null ones apart.

    Args:
        data: As for :func:`read_rows`.
        split: Which split of a data set that has several.
    """
    named = isinstance(data, str | Path)
    read = _read_named(data, split, whole=True) if named else _in_memory(data, split)
    rows, numbers = [], []
    for number, row in read.rows:
        if not isinstance(row, Mapping):
            place = read.source if number is None else f"{read.source}, {read.unit} {number}"
            raise ValueError(f"{place}: expected an object with columns; got {_short(row)}.")
        rows.append({name: value for name, value in row.items() if value is not None})
        numbers.append(number)
    if not rows:
        raise ValueError(f"data: {data if named else type(data).__name__} has no rows.")
    return Rows(rows, read.source, read.unit, numbers, filled=read.filled)


class _Reading(NamedTuple):
    """Rows as they are read, with their numbers, and where they come from."""

    rows: Iterable[tuple[int | None, Any]]
    source: str
    unit: str = "row"
    filled: bool = False


def _without_filled_nulls(row: Row) -> tuple[Row, bool]:
    """The row without nulls below tool calls and tools, and whether there were any."""
    deep = [row[TOOLS]] if row.get(TOOLS) is not None else []
    cleaned = {TOOLS: without_nulls(row[TOOLS])} if deep else {}
    for column, messages in row.items():
        if column == TOOLS or isinstance(messages, str):
            continue
        calls = [message.get("tool_calls") for message in messages]
        deep += calls
        cleaned[column] = [
            message | ({"tool_calls": without_nulls(call)} if call is not None else {})
            for message, call in zip(messages, calls, strict=True)
        ]
    return row | cleaned, any(map(has_nulls, deep))


def kind_of(row: Any, place: str) -> str:
    """The kind of a row by its columns: "messages", "completion", "text" or "prompt"."""
    if not isinstance(row, Mapping):
        raise ValueError(f"{place}: {EXPECTED}; got {_short(row)}, which is no object.")
    for kind, columns in COLUMNS.items():
        if all(row.get(column) is not None for column in columns):
            return kind
    found = sorted(str(column) for column, value in row.items() if value is not None)
    raise ValueError(f"{place}: {EXPECTED}; got the columns {found}, null ones apart{ALSO}.")


def is_row(value: Any) -> bool:
    """True if a value has the columns of a row that can be read."""
    try:
        kind_of(_in_our_words(value, ""), "")
    except ValueError:
        return False
    return True


def _in_our_words(row: Any, place: str) -> Any:
    """The row with the columns that we know it by, if it has those of other libraries."""
    if not isinstance(row, Mapping):
        return row
    known = {column for column in row if row[column] is not None}
    if any(known.issuperset(COLUMNS[kind]) for kind in ("messages", "completion", "text")):
        return row
    match _answer_columns(row):
        case ("prompt", "response"):
            return {**row, "completion": row["response"]}
        case ("conversations",):
            return {**row, "messages": _of_sharegpt(row, place)}
        case ("instruction", "output"):
            return {**row, "messages": _of_alpaca(row, place)}
    return row


def _answer_columns(row: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The columns of other libraries that hold an answer in a row; None without them."""
    known = {column for column in row if row[column] is not None}
    return next((columns for columns in ANSWERED if known.issuperset(columns)), None)


def _of_alpaca(row: Mapping[str, Any], place: str) -> list[dict[str, str]]:
    """A chat of an instruction, with its input behind it, and the answer."""
    history = row.get("history") or []
    pairs = isinstance(history, list | tuple) and all(
        isinstance(it, list | tuple) and len(it) == 2 for it in history
    )
    if not pairs:
        raise ValueError(
            f"{place}: history must be a list of pairs of question and answer; "
            f"got {_short(history)}."
        )
    asked = [row["instruction"], *([row["input"]] if row.get("input") else [])]
    said = [text for pair in history for text in pair]
    texts = [*asked, row["output"], *said, row.get("system") or ""]
    if not all(isinstance(text, str) for text in texts):
        wrong = next(text for text in texts if not isinstance(text, str))
        raise ValueError(
            f"{place}: instruction, input, output, history and system must be text; "
            f"got {_short(wrong)}."
        )
    turns = [*said, "\n".join(asked), row["output"]]
    roles = itertools.cycle(("user", "assistant"))
    chat = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]
    return _system(row) + chat


def _of_sharegpt(row: Mapping[str, Any], place: str) -> Any:
    """A chat of turns with from and value, or with role and content as we have them."""
    turns = _read_json(row["conversations"])
    if not isinstance(turns, list | tuple) or not all(isinstance(it, Mapping) for it in turns):
        raise ValueError(
            f"{place}: conversations must be a list of objects with from and value; "
            f"got {_short(turns)}."
        )
    messages = []
    for turn in turns:
        who = turn.get("from")
        if who is None and turn.get("role") is not None:
            messages.append(turn)
        elif who in ROLES and isinstance(turn.get("value"), str):
            messages.append({"role": ROLES[who], "content": turn["value"]})
        else:
            raise ValueError(
                f"{place}: each of conversations must have a value that is text, and from that "
                f"is one of {', '.join(ROLES)}; got {_short(dict(turn))}."
            )
    first = messages[0]["role"] if messages else None
    return messages if first == "system" else _system(row) + messages


def _leaves_system_out(row: Mapping[str, Any], kind: str, *, reworded: bool) -> bool:
    """True if a row has a system prompt beside columns that do not hold it."""
    if not row.get("system") or kind == "text":
        return False
    chat = row["messages" if kind == "messages" else "prompt"]
    if isinstance(chat, str):
        return True
    first = chat[0] if isinstance(chat, list | tuple) and chat else None
    return not reworded and not (isinstance(first, Mapping) and first.get("role") == "system")


def _system(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "system", "content": row["system"]}] if row.get("system") else []


def _checked(row: Mapping[str, Any], kind: str, place: str) -> Row:
    values = {column: row[column] for column in COLUMNS[kind]}
    if kind == "messages":
        values["messages"] = _read_json(values["messages"])
    for column, value in values.items():
        _check_text(value, column, place)
        if isinstance(value, str) and kind != "messages":
            continue
        if kind == "text":
            raise ValueError(f"{place}: text must be a string; got {_short(value)}.")
        values[column] = _messages(value, column, place)
    if len({type(value) for value in values.values()}) > 1:
        raise ValueError(f"{place}: prompt and completion must both be text or both messages.")
    told = (
        as_tools(row.get(TOOLS), place)
        if not isinstance(next(iter(values.values())), str)
        else None
    )
    if told is not None:
        _check_text(told, TOOLS, place)
        values[TOOLS] = told
    return values | _teacher_prompt(row, values, kind, place)


def _teacher_prompt(row: Mapping[str, Any], values: Row, kind: str, place: str) -> Row:
    """The prompt that the teacher reads in place of the student's, where it is another one."""
    empty = None, ""  # as cells of a table are
    given = [it for it in (TEACHER_PROMPT, PRIVILEGED_CONTEXT) if row.get(it) not in empty]
    if not given:
        return {}
    if len(given) > 1:
        raise ValueError(
            f"{place}: teacher_prompt and privileged_context exclude one another; got both."
        )
    (name,) = given
    value, prompt = row[name], values.get("prompt")
    if kind not in ("completion", "prompt"):
        raise ValueError(
            f"{place}: {name} takes the place of a prompt, in rows of prompt and completion or of "
            f"a prompt alone; got a row of {kind}."
        )
    _check_text(value, name, place)
    if name == TEACHER_PROMPT:
        if isinstance(value, str) != isinstance(prompt, str):
            raise ValueError(
                f"{place}: teacher_prompt and prompt must both be text or both messages."
            )
        return {name: value if isinstance(value, str) else _messages(value, name, place)}
    if not isinstance(value, str):
        raise ValueError(f"{place}: {name} must be text; got {_short(value)}.")
    if isinstance(prompt, str):
        return {TEACHER_PROMPT: f"{prompt}\n\n{value}"}
    messages: list[Any] = [*(prompt or ())]
    asked = [at for at, message in enumerate(messages) if message["role"] == "user"]
    if not asked or not isinstance(messages[asked[-1]].get("content"), str):
        raise ValueError(
            f"{place}: {name} is put behind the text of the last message of the user, which the "
            "prompt must have."
        )
    last = messages[asked[-1]]
    messages[asked[-1]] = {**last, "content": f"{last['content']}\n\n{value}"}
    return {TEACHER_PROMPT: messages}


def _check_text(value: Any, column: str, place: str) -> None:
    """Refuse text with half of a surrogate pair, which no encoding can write."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{place}: {column} must be text that UTF-8 can write; got half of a surrogate "
                f"pair, {value[error.start]!r}, at character {error.start + 1:,}."
            ) from None
    elif isinstance(value, Mapping):
        for key, part in value.items():
            _check_text(key, column, place)
            _check_text(part, column, place)
    elif isinstance(value, list | tuple):
        for part in value:
            _check_text(part, column, place)


def _read_json(value: Any) -> Any:
    """A list that is written as JSON, as in cells of a table; anything else as it is."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(value)
    return value


def _messages(value: Any, column: str, place: str) -> list[dict[str, Any]]:
    if not isinstance(value, (list, tuple)) or not value:
        expected = "a list of messages" if column == "messages" else "text or a list of messages"
        raise ValueError(f"{place}: {column} must be {expected}; got {_short(value)}.")
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
        content = message.get("content")
        for part in content if isinstance(content, list) else ():
            if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
                raise ValueError(
                    f"{place}: a part of content in {column} must be an object with a type; "
                    f"got {_short(part)}."
                )
            if not isinstance(part.get("text"), str | None):
                raise ValueError(
                    f"{place}: text of a part of content in {column} must be a string; "
                    f"got {_short(part['text'])}."
                )
    return [dict(message) for message in value]


def _in_memory(data: Any, split: str, source: str = "data") -> _Reading:
    rows = in_rows(data)
    if isinstance(rows, Mapping):
        if split not in rows:
            raise ValueError(f"split must be one of {sorted(rows)}; got {split!r}.")
        data = rows[split]
        rows = in_rows(data)
    if not isinstance(rows, Iterable):
        raise TypeError(f"data must be a file, a data set or a list of rows; got {_short(data)}.")
    with_arrays = isinstance(data, list) and any(map(_has_arrays, data[:1]))
    of_arrow = type(data).__module__.partition(".")[0] == "datasets"
    filled = with_arrays or of_arrow or rows is not data  # a frame, or columns
    return _Reading(enumerate(rows_as_lists(rows), 1), source, filled=filled)


def rows_as_lists(data: Some) -> Iterator[Any]:
    """The rows of some data, with lists where they hold arrays of NumPy or tensors."""
    return (_without_arrays(row) if _has_arrays(row) else row for row in in_rows(data))


def in_rows(data: Any) -> Any:
    """The rows of a data frame of pandas, or of columns; other data as they are.

    Columns by their names are what a slice of a data set of Hugging Face is.
    """
    if isinstance(data, Mapping) and data and all(map(_is_column, data.values())):
        if len({len(column) for column in data.values()}) > 1:
            sizes = ", ".join(f"{len(column):,} of {name}" for name, column in data.items())
            raise ValueError(f"data: columns must have as many values each; got {sizes}.")
        return [dict(zip(data, row, strict=True)) for row in zip(*data.values(), strict=True)]
    if not isinstance(data, Frame):
        return data
    table: Any = data
    return table.astype(object).where(table.notna(), None).to_dict("records")


def _is_column(values: Any) -> bool:
    """True for a list of values, and not of rows, as the split of a data set may be."""
    if isinstance(values, np.ndarray | torch.Tensor):
        return values.ndim > 0
    return isinstance(values, list) and not (values and isinstance(values[0], Mapping))


def _has_arrays(row: Any) -> bool:
    """True if lists are arrays of NumPy, as pandas reads those of a parquet file, or tensors."""
    if not isinstance(row, Mapping):
        return False
    return any(
        isinstance(it[0] if isinstance(it, list) and it else it, _ARRAYS) for it in row.values()
    )


def _without_arrays(value: Any) -> Any:
    if isinstance(value, _ARRAYS):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {name: _without_arrays(it) for name, it in value.items()}
    return [_without_arrays(it) for it in value] if isinstance(value, list) else value


def _name_in(row: Mapping[str, Any], column: str | None, place: str) -> Row:
    """The name that a row has in a column."""
    if column is None:
        return {}
    if not isinstance(name := row.get(column), str):
        got = f"a row of {', '.join(map(str, row))}" if name is None else _short(name)
        raise ValueError(f"{place}: {column} must name the teacher of each row; got {got}.")
    return {column: name}


def _read_named(
    data: str | Path, split: str, column: str | None = None, *, whole: bool = False
) -> _Reading:
    path = Path(data)
    if path.is_dir():
        return _saved(path, split)
    if (reader := _READERS.get(_ending(path))) is None:
        if path.exists():
            known = f"{', '.join(_READERS)}, or one of these with .gz"
            raise ValueError(f"data must end in {known}; got the file {path}.")
        return _on_hub(_data_set(str(data)), split)
    if not path.is_file():
        raise FileNotFoundError(f"data: there is no file {path}.")
    if reader is _parquet:
        return _parquet(path, column, whole=whole)
    return reader(path)


def _ending(path: Path) -> str:
    name = path.name.lower()
    return Path(name.removesuffix(".gz")).suffix


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Iterable[bytes]]:
    """The lines of a file as bytes, decompressed."""
    if path.suffix.lower() == ".gz":
        yield io.BytesIO(gunzip(path))
    else:
        with path.open("rb") as file:
            yield file


def _jsonl(path: Path) -> _Reading:
    with _opened(path) as file:  # a list is no row
        if next((it for it in file if it.strip()), b"").lstrip().startswith(b"["):
            return _json_file(path)

    def rows() -> Iterator[tuple[int, Any]]:
        with _opened(path) as file:
            for number, line in enumerate(file, 1):
                place = f"{path}, line {number}"
                text = _utf8(line, place)
                if text.strip():
                    yield number, _json(text, place)

    return _Reading(rows(), str(path), "line")


def _json_file(path: Path) -> _Reading:
    """A list of objects; one object a line is read too, as files with this ending often hold."""
    text = _utf8(gunzip(path), str(path)).strip()
    if not text.startswith("["):
        if "\n" in text:  # one object over several lines is a row
            with contextlib.suppress(ValueError, RecursionError):
                return _Reading([(1, json.loads(text))], str(path))
        return _jsonl(path) if text else _Reading([], str(path))
    return _Reading(enumerate(_json(text, str(path)), 1), str(path))


def _table(path: Path) -> _Reading:
    return _Reading(read_records(path), str(path), "line")


def _txt(path: Path) -> _Reading:
    """The whole text, its lines ended by a line feed alone, as Python reads text files."""
    text = _utf8(gunzip(path), str(path)).replace("\r\n", "\n").replace("\r", "\n")
    return _Reading([(None, {"text": text})] if text.strip() else [], str(path))


def _parquet(path: Path, column: str | None = None, *, whole: bool = False) -> _Reading:
    table_of = _extra("pyarrow.parquet", f"Reading {path.name}")
    try:
        table = table_of.read_table(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no parquet file: {str(error).splitlines()[0]}") from None
    besides = {TOOLS, TEACHER_PROMPT, PRIVILEGED_CONTEXT, column}
    known = {*besides, *OTHER_COLUMNS, *itertools.chain(*COLUMNS.values())}
    found = [name for name in table.column_names if whole or name in known]
    if not whole and not {*found} - besides:
        got = sorted(table.column_names)
        raise ValueError(f"{path}: {EXPECTED}; got the columns {got}{ALSO}.")
    rows = (row for batch in table.select(found).to_batches() for row in batch.to_pylist())
    return _Reading(enumerate(rows, 1), str(path), filled=True)


_READERS: dict[str, Callable[[Path], _Reading]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json_file,
    ".csv": _table,
    ".tsv": _table,
    ".txt": _txt,
    ".parquet": _parquet,
}


def _saved(path: Path, split: str) -> _Reading:
    datasets = _extra("datasets", f"Reading the folder {path}")
    try:
        found = datasets.load_from_disk(str(path))
    except FileNotFoundError:
        raise ValueError(
            f"data: the folder {path} holds no data set saved by datasets' save_to_disk."
        ) from None
    return _in_memory(found, split, str(path))


def _data_set(text: str) -> str:
    """The name of a data set on the Hub, with its configuration; a path is refused."""
    prefix = "hub:" if text.startswith("hub:") else ""
    name, colon, config = text.removeprefix("hub:").partition(":")
    if prefix and Path(name).exists():
        raise ValueError(
            f"data: {name} lies here, and would be read in place of the data set of this name on "
            "the Hub. Call rkl from another folder."
        )
    return hub_name("data", prefix + name) + colon + config


def _on_hub(name: str, split: str) -> _Reading:
    datasets = _extra("datasets", f"There is no file {name!r}, and the data set of that name")
    dataset, _, config = name.partition(":")
    try:
        found = datasets.load_dataset(dataset, config or None, split=split)
    except Exception as error:  # whatever a hub, a network and a loader may raise
        raise ValueError(f"data: {name!r} is neither a file nor a data set: {error}") from error
    return _in_memory(found, split, name)


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

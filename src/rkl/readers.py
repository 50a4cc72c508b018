"""Tables, arrays, images and labels from files: one reader for every verb.

The content of a file decides its format, not its name. Numbers keep their precision: integers
stay integers, CSV becomes float64, nothing passes through float32. Files with two possible
readings, or that would lose something, are refused with the file and the place.
"""

import contextlib
import csv
import glob
import io
import os
import re
import struct
import sys
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rkl.checks import warn
from rkl.extras import optional_import

if TYPE_CHECKING:
    import numpy as np

IMAGES = (
    *(".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff"),
    *(".gif", ".pgm", ".ppm", ".pnm", ".jp2"),
)
FORMATS = "CSV or another table of text, .npy, .npz, .parquet, .nc, .h5, IDX, or images"
IDX_TYPES = {8: ">u1", 9: ">i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}
MISSING = {"", "na", "n/a", "#n/a", "nan", "null", "none", "-", "--", "?", ".", "missing"}
MISSING_LABELS = MISSING - {"-", "--", ".", "missing"}
TRUE, FALSE = {"true", "yes", "t"}, {"false", "no", "f"}
EXACT_INTEGERS = 2**53  # in float64; beyond it, not every integer has a float of its own
SAMPLE_LINES = 1_000  # by which separators and header are found
MAX_EXPANSION = 200  # bytes out of one byte of a compressed file, beyond EXPANDED_BYTES
EXPANDED_BYTES = 2**30
MAX_NAMED = 8  # columns, arrays or files that a message lists

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|[+-]?(inf|infinity)", re.I | re.ASCII)
_COMMA_NUMBER = re.compile(r"[+-]?(\d+,?\d*|,\d+)([eE][+-]?\d+)?", re.ASCII)
_INTEGER = re.compile(r"[+-]?\d+", re.ASCII)
_THOUSANDS = re.compile(
    r"[+-]?[1-9]\d{0,2}(,\d{3})+(\.\d+)?|[+-]?[1-9]\d{0,2}(\.\d{3}){2,}(,\d+)?"
)
_GROUPS = re.compile(r"[+-]?[1-9]\d{0,2}(,\d{3})+", re.ASCII)
_DATE = re.compile(r"\d{4}-\d\d?-\d\d?([ T].*)?|\d\d?[./]\d\d?[./]\d{2,4}.*|\d\d?:\d\d(:\d\d.*)?")
_QUOTED = re.compile(r'(^|[\t;,|])\s*"[^"]*(?:""[^"]*)*"(?!")')  # a whole cell, and its beginning
_QUOTE = re.compile(r'(^|[\t;,|])\s*"')
_INDEX_NAMES = re.compile(r"|Unnamed: 0(\.\d+)?|__index_level_0__")


@dataclass(frozen=True)
class Contents:
    """Rows of a file.

    Attributes:
        values: Numbers [rows, *event], in the machine's byte order, of the file's own type.
        columns: Names of the columns of a table; empty where the file has none.
        labels: The label of each row, if the file has them.
        images: Whether the rows are image files.
        notes: Notes for the user on how the file was read, one sentence each.
    """

    values: "np.ndarray"
    columns: tuple[str, ...] = ()
    labels: "np.ndarray | Sequence[Any] | None" = None
    images: bool = False
    notes: tuple[str, ...] = ()


@dataclass
class Columns:
    """Columns of a table by name, numbers as numbers and words as text.

    Attributes:
        columns: Arrays [rows] by name.
        named: Whether the file has names of the columns.
        notes: Notes for the user on how the file was read.
        comments: Comment lines of the file, each with the number of rows above it.
        index: Names of the columns that the file itself marks as an index of the rows.
    """

    columns: "dict[str, np.ndarray]"
    named: bool = True
    notes: list[str] = field(default_factory=list)
    comments: list[tuple[int, str]] = field(default_factory=list)
    index: tuple[str, ...] = ()


class _UnreadableError(ValueError):
    """The reason of a refusal, to which the caller adds the argument and the file."""


def read(path: str | os.PathLike, *, name: str = "data", labels: str | None = None) -> Contents:
    r"""Numbers from a file, or from a folder of images.

    Args:
        path: A table of text (.csv, .tsv, .txt, also .gz), .parquet, .npy, .npz, .nc, .h5, IDX,
            an image, or a folder of images, whose sub-folders are classes. "FILE:NAME" chooses
            one array of an .npz, .nc or .h5.
        name: Name of the argument, with which messages begin.
        labels: Name of the column or array that holds the labels.

    Raises:
        FileNotFoundError: There is no such file.
        ImportError: Reading it needs a package that is not installed.
        ValueError: It cannot be read, or in more than one way; the message has the reason.

    >>> import tempfile, pathlib
    >>> file = pathlib.Path(tempfile.mkdtemp(), "rows.csv")
    >>> _ = file.write_text("height;kind\n1,5;a\n2,25;b\n")
    >>> found = read(file, labels="kind")
    >>> found.values.tolist(), found.columns, list(found.labels)
    ([[1.5], [2.25]], ('height',), ['a', 'b'])
    """
    file, chosen = split_choice(path, name)
    with _naming(name, file):
        if file.is_dir():
            return _image_folder(file, labels)
        kind = _kind(file)
        if kind in ("text", "parquet"):
            if chosen is not None:
                raise _UnreadableError("it is a table, of which no array can be chosen")
            table = _text(file, labels) if kind == "text" else _parquet(file)
            return _contents(table, labels)
        if kind == "npz":
            return _npz(file, chosen, labels)
        if kind == "hdf5":
            return _hdf5(file, chosen, labels)
        if labels is not None:
            raise _UnreadableError(f"it holds one array without names, and none called {labels!r}")
        if kind == "image":
            return _images([file], file.parent)
        array = _npy(file) if kind == "npy" else _idx(file)
        numbers = as_numbers(array)
        return replace(numbers, images=kind == "idx" and numbers.values.ndim > 2)


def read_arrays(path: str | os.PathLike, *, name: str = "data") -> dict[str, Contents]:
    """All arrays of an .npz by name; of another file, its rows, called x.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It cannot be read.
    """
    file, chosen = split_choice(path, name)
    with _naming(name, file):
        if not file.is_dir() and _kind(file) == "npz" and chosen is None:
            members = _members(file)
            return {each: as_numbers(_load(members, each)) for each in members}
    return {"x": read(path, name=name)}


def read_labels(path: str | os.PathLike, *, rows: int, name: str = "labels") -> list[Any]:
    """The class of each row, from a file of labels alone.

    Args:
        path: Any file that :func:`read` reads, of one column, or text with one word a line.
        rows: Expected number of labels.
        name: Name of the argument.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It does not hold one label for each row.
    """
    file, chosen = split_choice(path, name)
    with _naming(name, file):
        kind = _kind(file)
        if kind == "text":
            return _text_labels(file, rows)
        if kind == "parquet":
            table = _drop_index(_parquet(file)).columns
            if len(table) != 1:
                raise _UnreadableError(f"it must hold one column; it has {_join(table)}")
            array = next(iter(table.values()))
        elif kind == "npz":
            arrays = _members(file)
            array = _load(arrays, _choice(arrays, chosen, ("labels", "label", "y", "kind")))
        elif kind == "hdf5":
            array = _hdf5(file, chosen, None).values
        elif kind in ("npy", "idx"):
            array = _npy(file) if kind == "npy" else _idx(file)
        else:
            raise _UnreadableError("it is an image, and holds no labels")
        if array.ndim == 2 and array.shape[1] == 1:
            array = array[:, 0]
        if array.ndim != 1:
            raise _UnreadableError(
                f"it must hold one label a row, [rows]; got {list(array.shape)}"
            )
        if len(array) != rows:
            raise _UnreadableError(f"it holds {len(array):,} labels; the data have {rows:,} rows")
        return array.tolist()


def read_columns(path: str | os.PathLike, *, name: str = "data") -> Columns:
    """The columns of a table by name; missing numbers are nan, words stay words.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no table, or has no names.
    """
    file, _chosen = split_choice(path, name)
    with _naming(name, file):
        kind = _kind(file)
        if kind not in ("text", "parquet"):
            raise _UnreadableError("it is no table of text or Parquet")
        table = _text(file, None, missing=True) if kind == "text" else _parquet(file)
        if not table.named:
            raise _UnreadableError("its columns have no names")
        # Levels with a name, such as chain and draw, belong to the table.
        unnamed = tuple(it for it in table.index if _INDEX_NAMES.fullmatch(it))
        return _drop_index(replace(table, index=unnamed))


def read_records(path: str | os.PathLike) -> Iterator[tuple[int, dict[str, str]]]:
    """The rows of a table of text, such as .csv or .tsv, each with the line it begins at.

    Every cell stays text, line ends and commas within quotes included. The first line names the
    columns; it is divided by the tab, semicolon or comma that occurs most in it.

    Args:
        path: The file, which may be compressed by gzip.

    Raises:
        ValueError: The file is no such table; the message names file and line.
    """
    file = Path(path)
    with _naming("data", file):
        text, notes = _decode(file)
    for note in notes:
        warn(f"data: {file}: {note}.")
    head = text.lstrip().partition("\n")[0]
    mark = max("\t;,", key=head.count)
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=mark, strict=True)
    names: list[str] = []
    while True:
        first = lines.line_num + 1
        try:
            with _long_cells():
                cells = next(lines)
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(f"data: {file}, line {first}: {error}.") from None
        if not cells:
            continue
        if not names:
            names = [cell.strip() for cell in cells]
            twice = sorted({it for it in names if names.count(it) > 1})
            if twice:
                raise ValueError(f"data: {file}: two columns are called {twice[0]!r}.")
            continue
        if len(cells) != len(names):
            raise ValueError(
                f"data: {file}, line {first}: expected {len(names)} cells, one for each of "
                f"{', '.join(names)}; got {len(cells)}. Put text with {mark!r} in quotes."
            )
        yield first, dict(zip(names, cells, strict=True))


def gunzip(path: str | os.PathLike) -> bytes:
    """Bytes of a file, decompressed if it is a gzip; one that expands too far is refused.

    Raises:
        ValueError: It cannot be decompressed; the message names the file.
    """
    with _naming("data", Path(path)):
        return _gunzip(Path(path))


def split_choice(path: str | os.PathLike, name: str = "data") -> tuple[Path, str | None]:
    """A file, and the array in it that "FILE:NAME" chooses.

    Raises:
        FileNotFoundError: There is no such file.
    """
    file = Path(path)
    if file.exists():
        return file, None
    inside = re.fullmatch(r"(.+\.(?:npz|nc|netcdf|h5|hdf5)):([^:]+)", str(path), re.I)
    if inside and Path(inside[1]).is_file():
        return Path(inside[1]), inside[2]
    raise FileNotFoundError(f"{name}: there is no file {file}.")


def matching_files(pattern: str | os.PathLike, name: str = "data") -> list[Path]:
    """The files of a pattern such as "chain_*.csv", in natural order; a file is its own pattern.

    Raises:
        FileNotFoundError: There is none.
    """
    if Path(pattern).exists() or not glob.has_magic(str(pattern)):
        return [Path(pattern)]
    files = sorted(glob.glob(str(pattern)), key=natural_order)
    if not files:
        raise FileNotFoundError(f"{name}: no file matches {pattern}.")
    return [Path(file) for file in files]


def natural_order(label: Any) -> tuple:
    """A key under which "a2" comes before "a10", and numbers before words.

    >>> sorted(["10", "2", "b10", "b2", "1"], key=natural_order)
    ['1', '2', '10', 'b2', 'b10']
    """
    parts = re.split(r"(\d+)", str(label))
    return tuple((not part.isdecimal(), int(part) if part.isdecimal() else part) for part in parts)


def class_names(labels: Any, *, rows: int, name: str = "labels") -> list[str]:
    """Names of classes, the same from text, integers, whole floats and booleans.

    Args:
        labels: One label for each row: a sequence, an array or a pandas Series.
        rows: Number of rows.
        name: The argument, with which messages begin.

    Raises:
        TypeError: The labels are not one for each row.
        ValueError: Their number is not that of the rows, one is missing, or one is a fraction.

    >>> class_names(["1", "10", "2"], rows=3) == class_names([1, 10, 2.0], rows=3)
    True
    """
    import numpy as np

    if isinstance(labels, np.ma.MaskedArray) and np.ma.is_masked(labels):
        raise ValueError(f"{name} must all be given; {np.ma.count_masked(labels)} are masked.")
    listed = labels.tolist() if hasattr(labels, "tolist") else labels
    if isinstance(listed, str | bytes | Mapping) or not isinstance(listed, Sequence):
        raise TypeError(f"{name} must be one class for each row; got {labels!r:.80}.")
    if len(listed) != rows:
        raise ValueError(f"{name} must be one for each of {rows} rows; got {len(listed)}.")
    cells = [label.strip() if isinstance(label, str) else label for label in listed]
    lowered = [cell.lower() if isinstance(cell, str) else None for cell in cells]
    for row, (cell, low) in enumerate(zip(cells, lowered, strict=True), 1):
        if cell is None or low in MISSING_LABELS or (isinstance(cell, float) and cell != cell):
            count = sum(it is None or it != it for it in cells)
            count += sum(it in MISSING_LABELS for it in lowered if it is not None)
            raise ValueError(f"{name} must all be given; {count} are missing, first in row {row}.")
        whole = not isinstance(cell, float) or cell.is_integer()
        if not whole or not isinstance(cell, str | bool | int | float):
            raise ValueError(
                f"{name} must be classes, one whole number or word for each row; got {cell!r:.40} "
                f"in row {row}."
            )
    if all(low in ("true", "false") for low in lowered):
        return [str(low == "true") for low in lowered]
    # Written numbers are numbers only if that changes no name: 01 and 1 are two classes.
    whole = all(low is None or re.fullmatch(r"-?(0|[1-9]\d*)(\.0*)?", low) for low in lowered)
    names = []
    for cell in cells:
        if isinstance(cell, float):
            cell = int(cell)
        elif isinstance(cell, str) and whole:
            cell = str(int(cell.partition(".")[0]))
        names.append(str(cell))
    return names


def as_numbers(source: Any, names: Sequence[str] = ()) -> Contents:
    """An array of numbers in the machine's own byte order, or the reason why it is none.

    Booleans become 0 and 1; the fields of a structured array, its columns. Half precision becomes
    single, extended precision double.

    Raises:
        TypeError: It does not hold real numbers.
        ValueError: Some are masked.
    """
    import numpy as np

    notes = []
    if masked := masked_numbers(source):
        raise ValueError(masked)
    array = np.asarray(source)
    if array.dtype.names:
        named = array.dtype.names
        for column in named:
            if array[column].dtype.kind not in "fiub" or array[column].ndim != array.ndim:
                raise TypeError(
                    f"field {column} must hold real numbers; got {array[column].dtype}"
                )
        kinds = np.result_type(*(array[column].dtype for column in named))
        return as_numbers(np.stack([array[it].astype(kinds) for it in named], -1), named)
    if array.dtype.kind in "Mm":
        raise TypeError(f"it holds dates ({array.dtype}); turn them into numbers, such as seconds")
    if array.dtype.kind not in "fiub":
        kinds_of_others = {"O": "objects", "U": "words", "S": "words", "c": "complex numbers"}
        raise TypeError(
            f"it must hold real numbers; got {kinds_of_others.get(array.dtype.kind, 'an array')} "
            f"({array.dtype})"
        )
    if array.dtype.kind == "b":
        array = array.astype(np.uint8)
        notes.append("booleans were read as 0 and 1")
    elif array.dtype.kind == "f" and array.dtype.itemsize not in (4, 8):
        array = array.astype(np.float32 if array.dtype.itemsize == 2 else np.float64)
    array = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="), copy=False)).reshape(
        array.shape
    )
    return Contents(array, tuple(names), notes=tuple(notes))


def masked_numbers(values: Any) -> str | None:
    """A sentence on the masked numbers of an array of NumPy, or of a list of arrays, if any.

    Whatever turns such an array into another drops the mask, and keeps what is below it.
    """
    import numpy as np

    if isinstance(values, list | tuple) and any(isinstance(x, np.ma.MaskedArray) for x in values):
        values = np.ma.stack(values)
    if not (isinstance(values, np.ma.MaskedArray) and np.ma.is_masked(values)):
        return None
    first = np.argwhere(np.ma.getmaskarray(values))[0].tolist()
    return (
        f"{np.ma.count_masked(values):,} of {values.size:,} numbers are masked, the first of them "
        f"at {first}; fill them or leave their rows out"
    )


def as_floats(array: "np.ndarray") -> "np.ndarray":
    """Numbers as floats that hold every one of them: float32 up to 16 bits, else float64.

    Raises:
        ValueError: An integer has no float64 of its own.
    """
    import numpy as np

    if array.dtype.kind == "f":
        return array
    if array.dtype.itemsize <= 2:
        return array.astype(np.float32)
    floats = array.astype(np.float64)
    if array.dtype.itemsize == 8 and array.size:
        beyond = (np.abs(floats) >= EXACT_INTEGERS).reshape(-1)
        for place in np.flatnonzero(beyond):
            integer = int(array.reshape(-1)[place])
            if integer != int(floats.reshape(-1)[place]):
                row = int(place) // max(1, array.size // len(array))
                raise ValueError(
                    f"the integer {integer} in row {row + 1} has more than the 53 bits of "
                    "float64; subtract an offset or leave the column out"
                )
    return floats


def place_of_nan(values: "np.ndarray", columns: Sequence[str] = ()) -> str | None:
    """Number of rows with nan or infinities, and the place of the first one; None without any.

    Rows are counted from 0, as in arrays.
    """
    import numpy as np

    if values.dtype.kind != "f" or not values.size:
        return None
    bad = ~np.isfinite(values.reshape(len(values), -1))
    rows = bad.any(1)
    if not rows.any():
        return None
    row = int(rows.argmax())
    column = int(bad[row].argmax())
    place = f"; column {columns[column]} there" if columns else ""
    value = values.reshape(len(values), -1)[row, column]
    place = f"{place or '; it'} holds {value}"
    return f"{int(rows.sum())} of {len(values)} rows are not, the first of them row {row}{place}"


# What a file is, and how an error names it


@contextlib.contextmanager
def _naming(name: str, file: Path) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, ImportError):
        raise
    except MemoryError:
        raise ValueError(f"{name}: {file} cannot be read: it does not fit into memory.") from None
    except (
        *(OSError, EOFError, ValueError, TypeError, KeyError, SyntaxError, OverflowError),
        *(struct.error, zlib.error, zipfile.BadZipFile, csv.Error, AttributeError, RuntimeError),
        *(NotImplementedError, IndexError),
    ) as error:
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise ValueError(f"{name}: {file} cannot be read: {reason}.") from None


def _kind(file: Path) -> str:
    if file.is_dir():
        raise _UnreadableError("it is a folder; expected a file")
    if not file.is_file():
        raise _UnreadableError("it is neither a file nor a folder")
    with file.open("rb") as opened:
        head = opened.read(1024)
    if head[:2] == b"\x1f\x8b":
        return "idx" if _gunzip(file, 4)[:2] == b"\0\0" else "text"
    if head[:6] == b"\x93NUMPY":
        return "npy"
    if head[:4] == b"PK\x03\x04" or head[:4] == b"PK\x05\x06":
        return "npz"
    if head[:4] == b"PAR1":
        return "parquet"
    if head[:8] == b"\x89HDF\r\n\x1a\n":
        return "hdf5"
    if head[:3] == b"CDF":
        raise _UnreadableError("it is NetCDF 3, not 4; rewrite it with nccopy -k nc4 or xarray")
    suffix = file.suffix.lower()
    if suffix in IMAGES:
        return "image"
    if head[:2] == b"\0\0" and head[2:4] != b"\xfe\xff":
        return "idx"
    if head[:1] == b"\x80" and suffix in (".pkl", ".pickle", ".npy", ".pt", ".pth", ""):
        raise _UnreadableError("it is a pickle, which could run any code, and is never opened")
    if suffix in (".npy", ".npz", ".parquet", ".nc", ".h5", ".hdf5"):
        raise _UnreadableError(f"it is no {suffix} file: its first bytes are {head[:8]!r}")
    return "text"


def _gunzip(file: Path, size: int = -1) -> bytes:
    import gzip

    with file.open("rb") as raw:
        if raw.read(2) != b"\x1f\x8b":
            raw.seek(0)
            return raw.read(size)
    limit = max(EXPANDED_BYTES, MAX_EXPANSION * file.stat().st_size)
    with gzip.open(file) as opened:
        if size >= 0:
            return opened.read(size)
        expanded = opened.read(limit + 1)
    if len(expanded) > limit:
        raise _UnreadableError(f"it expands to more than {limit:,} bytes")
    return expanded


def _join(names: Any) -> str:
    names = [str(it) for it in names]
    return ", ".join(names[:MAX_NAMED]) + ", ..." * (len(names) > MAX_NAMED)


# Arrays


def _npy(file: Path) -> "np.ndarray":
    with file.open("rb") as opened:
        return _array(opened, file.stat().st_size)


def _array(opened: Any, size: int) -> "np.ndarray":
    """The array of an opened .npy of so many bytes, which its header must not exceed."""
    import numpy as np

    version = np.lib.format.read_magic(opened)
    header = {(1, 0): np.lib.format.read_array_header_1_0}.get(
        version, np.lib.format.read_array_header_2_0
    )
    shape, _fortran, dtype = header(opened)
    if dtype.hasobject:
        raise _UnreadableError("it holds objects, a pickle that could run any code: never opened")
    count = 1
    for length in shape:
        count *= length
    if count * dtype.itemsize > size:
        raise _UnreadableError(
            f"its header promises {list(shape)} of {dtype}, {count * dtype.itemsize:,} bytes; "
            f"the file has {size:,}"
        )
    opened.seek(0)
    return np.lib.format.read_array(opened, allow_pickle=False)


def _members(file: Path) -> dict[str, tuple[Path, str]]:
    """Names of the arrays of an .npz, with their places; nothing is read."""
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
    if "[Content_Types].xml" in names:
        raise _UnreadableError("it is a workbook of Excel; save its sheet as CSV")
    if any(name.endswith("data.pkl") for name in names):
        raise _UnreadableError(
            "it was written by torch.save, as a pickle that could run any code; save the tensor "
            "with numpy.save"
        )
    inside = [name for name in names if name.endswith(".npy")]
    if not inside:
        raise _UnreadableError(f"it holds no arrays; it has {_join(names) or 'nothing'}")
    twice = {name for name in inside if inside.count(name) > 1}
    if twice:
        raise _UnreadableError(f"it holds {_join(sorted(twice))} more than once")
    return {name.removesuffix(".npy"): (file, name) for name in inside}


def _load(members: Mapping[str, tuple[Path, str]], name: str) -> "np.ndarray":
    file, member = members[name]
    with zipfile.ZipFile(file) as archive:
        entry = archive.getinfo(member)
        size, packed = entry.file_size, entry.compress_size
        if size > max(EXPANDED_BYTES, MAX_EXPANSION * packed):
            raise _UnreadableError(f"{name} expands from {packed:,} bytes to {size:,}")
        try:
            return _array(io.BytesIO(archive.read(member)), size)
        except (ValueError, TypeError) as error:
            raise _UnreadableError(f"array {name}: {error}") from None


def _choice(names: Any, chosen: str | None, usual: Sequence[str], what: str = "array") -> str:
    names = list(names)
    if chosen is not None:
        if chosen not in names:
            raise _UnreadableError(f"it has no {what} {chosen!r}; it has {_join(names)}")
        return chosen
    candidates = [name for name in usual if name in names] or names
    if len(candidates) != 1:
        raise _UnreadableError(
            f"it must hold one array called {usual[0]}; it has {_join(names)}. Choose one by "
            "FILE:NAME"
        )
    return candidates[0]


def _npz(file: Path, chosen: str | None, labels: str | None) -> Contents:
    members = _members(file)
    if labels is not None and labels not in members:
        raise _UnreadableError(f"it has no array {labels!r}; it has {_join(members)}")
    named = labels or next((it for it in ("labels", "label", "y") if it in members), None)
    others = [name for name in members if name != named]
    if not others and labels is None:
        others, named = list(members), None
    which = _choice(others, chosen, ("data", "x", "values"))
    numbers = as_numbers(_load(members, which))
    return replace(numbers, labels=None if named is None else _load(members, named))


def _idx(file: Path) -> "np.ndarray":
    """The format of MNIST: two zeros, the type, the number of axes, their lengths, the numbers."""
    import numpy as np

    raw = _gunzip(file)
    if len(raw) < 4 or raw[2] not in IDX_TYPES or not raw[3]:
        raise _UnreadableError(f"it is none of {FORMATS}")
    axes = raw[3]
    shape = struct.unpack(f">{axes}I", raw[4 : 4 + 4 * axes])
    kind, body = np.dtype(IDX_TYPES[raw[2]]), raw[4 + 4 * axes :]
    count = 1
    for length in shape:
        count *= length
    if len(body) != count * kind.itemsize:
        raise _UnreadableError(f"its header promises {shape} numbers, which it does not hold")
    return np.frombuffer(body, kind).reshape(shape).astype(kind.newbyteorder("="))


def refuse_external(file: Path) -> None:
    """Refuse an HDF5 file that has other files read.

    Raises:
        ValueError: It has a link to another file, or keeps its numbers in one.
    """
    with optional_import(f"Reading {file}"):
        import h5netcdf  # noqa: F401
        import h5py

    def look(group: Any, inside: str) -> None:
        for name in group:
            link = group.get(name, getlink=True)
            here = f"{inside}/{name}"
            if isinstance(link, h5py.ExternalLink):
                raise _UnreadableError(
                    f"{here} is a link to another file, {link.filename!r}; links are not followed"
                )
            if not isinstance(link, h5py.HardLink):
                continue
            member = group[name]
            if isinstance(member, h5py.Group):
                if member.id not in seen:
                    seen.append(member.id)
                    look(member, here)
            elif isinstance(member, h5py.Dataset):
                others = [it[0] for it in member.external or ()]
                if member.is_virtual:
                    others += [it.file_name for it in member.virtual_sources()]
                others = [it for it in others if it != "."]
                if others:
                    raise _UnreadableError(
                        f"{here} keeps its numbers in another file, {others[0]!r}, which is not "
                        "opened"
                    )

    with h5py.File(file, "r") as opened:
        seen = [opened.id]
        look(opened, "")


def _hdf5(file: Path, chosen: str | None, labels: str | None) -> Contents:
    """One array of NetCDF 4 or HDF5: its packed and missing values decoded, as xarray does."""
    with optional_import(f"Reading {file}"):
        import xarray as xr

    refuse_external(file)
    with xr.open_dataset(file, engine="h5netcdf", decode_times=False, phony_dims="sort") as opened:  # pyright: ignore[reportCallIssue]
        variables = {str(k): v for k, v in opened.data_vars.items()}
        if labels is not None and labels not in opened.variables:
            raise _UnreadableError(f"it has no array {labels!r}; it has {_join(variables)}")
        others = {k: v for k, v in variables.items() if k != labels}
        numeric = [k for k, v in others.items() if v.dtype.kind in "fiub"]
        if not others:
            raise _UnreadableError("it holds no arrays outside its groups")
        which = _choice(others if chosen else numeric, chosen, ("data", "x", "values"))
        numbers = as_numbers(opened[which].values)
        classes = None if labels is None else opened[labels].values
    return replace(numbers, labels=classes)


def _parquet(file: Path) -> Columns:
    import numpy as np

    try:
        import pyarrow  # pyright: ignore[reportMissingImports]: an extra
        import pyarrow.parquet as parquet  # pyright: ignore[reportMissingImports]
        import pyarrow.types as types  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ImportError(f"Reading {file} needs pyarrow: pip install 'rkl[data]'") from None
    try:
        table = parquet.read_table(file)
    except pyarrow.ArrowException as error:
        raise _UnreadableError(str(error)) from None
    _refuse_twice(table.column_names)
    columns: dict[str, np.ndarray] = {}
    for name in table.column_names:
        column = table[name].combine_chunks()
        if isinstance(column, pyarrow.ChunkedArray):
            column = pyarrow.concat_arrays(column.chunks)
        if types.is_dictionary(column.type):
            column = column.dictionary_decode()
        if types.is_decimal(column.type):
            column = column.cast("float64")
        if column.null_count:
            first = column.is_null().to_pylist().index(True) + 1
            if types.is_floating(column.type) or types.is_integer(column.type):
                raise _UnreadableError(
                    f"column {name}: {column.null_count} of {len(column)} cells are missing, the "
                    f"first of them in row {first}"
                )
        if types.is_temporal(column.type):
            raise _UnreadableError(
                f"column {name} holds dates ({column.type}); turn them into numbers, such as "
                "seconds"
            )
        if types.is_nested(column.type) or types.is_binary(column.type):
            raise _UnreadableError(
                f"column {name} holds {column.type}, which is no number or word"
            )
        values = column.to_numpy(zero_copy_only=False)
        columns[name] = values.astype(object) if values.dtype.kind == "U" else values
    index = (table.schema.pandas_metadata or {}).get("index_columns", ())
    return Columns(columns, index=tuple(it for it in columns if it in index))


# Tables


def _contents(table: Columns, labels: str | None) -> Contents:
    """Numbers of a table and its column of labels, without the index that pandas writes."""
    import numpy as np

    if labels is not None and labels not in table.columns:
        names = _join(table.columns) if table.named else "no names"
        raise _UnreadableError(f"it has no column {labels!r}; it has {names}")
    table = _drop_index(table, labels)
    columns_of_numbers = dict(table.columns)
    chosen = None if labels is None else columns_of_numbers.pop(labels)
    if not columns_of_numbers:
        raise _UnreadableError("it has no column of numbers beside the labels")
    numbers = []
    for name, cells in columns_of_numbers.items():
        if cells.dtype.kind == "O":
            raise _UnreadableError(_word_in(name, cells))
        if cells.dtype.kind == "b":
            cells = cells.astype(np.float64)
            table.notes.append(f"column {name}: true and false were read as 1 and 0")
        try:
            numbers.append(as_floats(cells).astype(np.float64))
        except ValueError as error:
            raise _UnreadableError(f"column {name}: {error}") from None
    table.notes.extend(_counting(columns_of_numbers))
    values = np.stack(numbers, -1)
    columns = tuple(columns_of_numbers) if table.named else ()
    return Contents(values, columns, chosen, notes=tuple(table.notes))


def _word_in(name: str, cells: Any) -> str:
    listed = cells.tolist()
    words = (
        (row, it)
        for row, it in enumerate(listed, 1)
        if not isinstance(it, str) or not _NUMBER.fullmatch(it.strip())
    )
    row, word = next(words, (0, ""))
    if not row:
        return (
            f"column {name} holds numbers as text, such as {listed[0]!r}; turn them into numbers"
        )
    if word is None or (isinstance(word, float) and word != word):
        return f"column {name}, row {row}, is missing"
    place = f"column {name}, row {row}, holds {word!r:.60}, which is no number"
    text = str(word).strip()
    if _DATE.fullmatch(text):
        return f"{place} but a date or time; turn the column into numbers, such as seconds"
    if _THOUSANDS.fullmatch(text):
        return f"{place}: separators of thousands are not read; remove them"
    if _COMMA_NUMBER.fullmatch(text):
        return f"{place}: commas and points are mixed as decimal marks"
    return f"{place}. If the column holds classes, say --labels {name}; else leave it out"


def _counting(columns: Mapping[str, "np.ndarray"]) -> Iterator[str]:
    """A note on a first column that counts the rows and was kept."""
    import numpy as np

    name, cells = next(iter(columns.items()))
    if len(columns) > 1 and len(cells) > 2 and cells.dtype.kind in "iuf":
        start = cells[0]
        if start in (0, 1) and np.array_equal(cells, np.arange(len(cells)) + start):
            yield f"column {name} counts the rows; leave it out if it is an index"


def _drop_index(table: Columns, labels: str | None = None) -> Columns:
    import numpy as np

    if not table.named or len(table.columns) < 2:
        return table
    if index := [name for name in table.index if name != labels]:
        rest = {name: it for name, it in table.columns.items() if name not in index}
        note = f"its index ({', '.join(index)}) was left out"
        return replace(table, columns=rest, notes=[*table.notes, note])
    first, cells = next(iter(table.columns.items()))
    if first == labels or not _INDEX_NAMES.fullmatch(first):
        counted = len(cells) > 2 and cells.dtype.kind in "iu" and cells[0] in (0, 1)
        if first == labels or first.lower() not in ("index", "rownames", "row.names"):
            return table
        if not counted or not np.array_equal(cells, np.arange(len(cells)) + cells[0]):
            return table
    elif cells.dtype.kind == "f" or len(set(cells.tolist())) < len(cells):
        raise _UnreadableError(
            "its first column has no name and is no index: it repeats or has fractions; name it"
        )
    note = f"its first column, {first!r}, is an index of the rows and was left out"
    rest = {name: it for name, it in table.columns.items() if name != first}
    return replace(table, columns=rest, notes=[*table.notes, note])


def _refuse_twice(names: Sequence[str]) -> None:
    twice = [name for name in dict.fromkeys(names) if list(names).count(name) > 1]
    if twice:
        raise _UnreadableError(
            f"{len(twice)} names belong to more than one column: {_join(twice)}; rename them"
            if len(twice) > 1
            else f"more than one column is called {twice[0]!r}; rename them"
        )


@dataclass(frozen=True)
class _Dialect:
    """Separator and decimal mark of a table of text.

    Attributes:
        separator: One character; " " for any blanks; "" for a single column.
        decimal: The decimal mark.
    """

    separator: str
    decimal: str = "."

    def split(self, lines: Sequence[str]) -> Iterator[list[str]]:
        if not self.separator:
            for cells in csv.reader(lines, delimiter="\x1f", skipinitialspace=True):
                yield [it.strip() for it in cells]
            return
        if self.separator == " ":
            lines = [line.strip().replace("\t", " ") for line in lines]
        for cells in csv.reader(lines, delimiter=self.separator, skipinitialspace=True):
            yield [it.strip() for it in cells]

    def is_number(self, cell: str) -> bool:
        """True for a number with this decimal mark."""
        number = _NUMBER if self.decimal == "." else _COMMA_NUMBER
        return number.fullmatch(cell) is not None

    def value(self, cell: str) -> float:
        return float(cell.replace(self.decimal, "."))


@dataclass
class _Lines:
    """Lines of a text without comments and blank lines, with their numbers in the file."""

    lines: list[str]
    numbers: list[int]
    comments: list[tuple[int, str]]
    notes: list[str]
    separator: str | None = None


@contextlib.contextmanager
def _long_cells() -> Iterator[None]:
    before = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _decode(file: Path) -> tuple[str, list[str]]:
    """Text of a file, by its byte-order mark, else as UTF-8, else as Windows-1252."""
    raw = _gunzip(file)
    marks = {
        b"\xef\xbb\xbf": "utf-8-sig",
        b"\xff\xfe\0\0": "utf-32",
        b"\0\0\xfe\xff": "utf-32",
        b"\xff\xfe": "utf-16",
        b"\xfe\xff": "utf-16",
    }
    encoding = next((it for mark, it in marks.items() if raw.startswith(mark)), None)
    if encoding is None and b"\0" in raw:
        raise _UnreadableError(
            f"it holds zero bytes, and is none of {FORMATS}, nor text with a mark"
        )
    try:
        return raw.decode(encoding or "utf-8"), []
    except UnicodeDecodeError as error:
        if encoding is not None:
            raise _UnreadableError(
                f"it begins like {encoding}, which it is not: {error}"
            ) from None
    try:
        return raw.decode("cp1252"), ["it is not UTF-8, and was read as Windows-1252"]
    except UnicodeDecodeError:
        raise _UnreadableError("it is neither UTF-8 nor Windows-1252; save it as UTF-8") from None


def _lines(file: Path) -> _Lines:
    text, notes = _decode(file)
    every = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    lines = _Lines([], [], [], notes)
    blank, quoted = [], False
    for number, line in enumerate(every, 1):
        bare = line.lstrip()
        if not (bare or quoted):
            blank.append(number)
        elif not quoted and bare[0] in "#%":
            lines.comments.append((len(lines.lines), bare.strip()))
        elif number == 1 and re.fullmatch(r"sep=.", bare.strip(), re.I):
            lines.separator = bare.strip()[4]
        else:
            lines.lines.append(line)
            lines.numbers.append(number)
            quoted = _ends_in_quotes(line, quoted)
    if not lines.lines:
        raise _UnreadableError("it is empty")
    lines.notes.extend(_blank_inside(blank, lines))
    return lines


def _ends_in_quotes(line: str, quoted: bool) -> bool:
    """True if a quoted cell, which may have begun in a line above, goes on in the next one."""
    if '"' not in line:
        return quoted
    return _QUOTE.search(_QUOTED.sub(r"\1", f'"{line}' if quoted else line)) is not None


def _blank_inside(blank: Sequence[int], lines: _Lines) -> Iterator[str]:
    inside = [number for number in blank if lines.numbers[0] < number < lines.numbers[-1]]
    if inside:
        yield f"{len(inside)} blank lines were passed over, the first of them line {inside[0]}"


def _dialect(lines: _Lines) -> _Dialect:
    """The separator and the decimal mark under which most cells are numbers.

    Of separators that split the lines alike, the one with the largest share of numbers is taken.
    """
    sample = lines.lines[:SAMPLE_LINES]
    candidates = [lines.separator] if lines.separator else ["\t", ";", ",", "|", " "]
    best, most, uneven = _Dialect(""), -1.0, False
    for separator in candidates:
        rows = list(_Dialect(separator).split(sample))
        widths = {len(row) for row in rows[1:]} or {len(rows[0])}
        if widths == {1} and len(rows[0]) == 1:
            continue
        if len(widths) > 1 or max(widths) == 1:
            # words may hold blanks
            numbers = all(map(_Dialect(separator).is_number, (it for row in rows for it in row)))
            uneven = uneven or separator != " " or numbers
            continue
        cells = [cell for row in rows[len(rows) > 1 :] for cell in row]
        for decimal in ".", ",":
            dialect = _Dialect(separator, decimal)
            share = sum(dialect.is_number(it) for it in cells) / max(1, len(cells))
            if share > most + 1e-12:
                best, most = dialect, share
    if not best.separator:
        cells = [row[0] for row in best.split(sample) if row]
        points, commas = (sum(_Dialect("", it).is_number(c) for c in cells) for it in ".,")
        if uneven and points < len(cells):
            return _Dialect(_most_split(sample))  # ragged, which is refused where the line is
        best = _Dialect("", "," if commas > points else ".")
    if best.decimal == ",":
        _refuse_thousands(lines, best)
    return best


def _most_split(lines: Sequence[str]) -> str:
    return max(",;\t| ", key=lambda it: sum(line.count(it) for line in lines) * (it != " ") or 0)


def _refuse_thousands(lines: _Lines, dialect: _Dialect) -> None:
    commas = [
        cell for row in dialect.split(lines.lines[:SAMPLE_LINES]) for cell in row if "," in cell
    ]
    numbers = [cell for cell in commas if dialect.is_number(cell)]
    if numbers and all(_GROUPS.fullmatch(cell) for cell in numbers):
        raise _UnreadableError(
            f"{numbers[0]!r} may have a decimal comma or a separator of thousands; write it with "
            "a point, or without separators"
        )


def _is_missing(cell: str) -> bool:
    return cell.lower() in MISSING


def _header(rows: Sequence[Sequence[str]], dialect: _Dialect) -> tuple[bool, str | None]:
    """True if the first line holds names, and a note on it.

    It does if no cell is a number, or if a word is above a column of numbers. The columns below
    decide whether integers, such as years, are names; where both are possible they are refused.
    """
    first, body = rows[0], rows[1:]
    numeric = [dialect.is_number(cell) for cell in first]
    words = [not n and not _is_missing(c) for n, c in zip(numeric, first, strict=True)]
    if not body:
        return not any(numeric) and any(words), None
    below = [[row[i] for row in body if i < len(row)] for i in range(len(first))]
    over_numbers = [
        bool(cells) and sum(map(dialect.is_number, cells)) > 0.5 * len(cells) for cells in below
    ]
    over = any(w and o for w, o in zip(words, over_numbers, strict=True))
    if over and not any(_is_name(cell) for cell, w in zip(first, words, strict=True) if w):
        return False, None
    if not any(numeric):
        if over:
            return True, None
        if not any(words) or any(map(_is_missing, first)):
            return False, None
        recur = all(cell in cells for cell, cells in zip(first, below, strict=True))
        return not recur, None
    if not all(_INTEGER.fullmatch(c) for c, n in zip(first, numeric, strict=True) if n):
        return False, None
    return _numeric_names(first, numeric, below, dialect)


def _is_name(cell: str) -> bool:
    return bool(re.match(r"[._$<(\[{@]?[^\W\d]|_", cell)) and cell.lower() not in TRUE | FALSE


def _numeric_names(
    first: Sequence[str],
    numeric: Sequence[bool],
    below: Sequence[Sequence[str]],
    dialect: _Dialect,
) -> tuple[bool, str | None]:
    places = [i for i, is_number in enumerate(numeric) if is_number]
    names = [int(first[i]) for i in places]
    if names != sorted(set(names)) or names[0] < 0:
        return False, None
    columns = [[dialect.value(it) for it in below[i] if dialect.is_number(it)] for i in places]
    fractions = all(not _INTEGER.fullmatch(cell) for i in places for cell in below[i])
    far = all(
        cells and not min(cells) - 10 * (s := max(cells) - min(cells)) <= n <= max(cells) + 10 * s
        for n, cells in zip(names, columns, strict=True)
    )
    counted = names in (list(range(len(names))), list(range(1, len(names) + 1)))
    start = ", ".join(first[i] for i in places[:3]) + ", ..." * (len(places) > 3)
    if fractions and (far or (counted and len(names) > 1)):
        return (
            True,
            f"its first line, {start}, was read as names: no other line holds integers",
        )
    from_zero = counted and names[0] == 0 and len(names) > 1  # as pandas numbers columns
    if fractions or from_zero or (counted and len(names) > 2) or (far and len(below[0]) > 1):
        raise _UnreadableError(
            f"its first line, {start}, may hold names or numbers; write names as words, such as "
            f"c{first[places[0]]}, or numbers with a point, {first[places[0]]}.0"
        )
    return False, None


def _text(file: Path, labels: str | None, missing: bool = False) -> Columns:
    with _long_cells():
        lines = _lines(file)
        dialect = _dialect(lines)
        names, begin = _names(lines, dialect)
        body = lines.lines[begin:]
        if not body:
            raise _UnreadableError("it holds names, and no rows")
        _refuse_split_decimals(list(dialect.split(body[:SAMPLE_LINES])), dialect)
        chosen = names.index(labels) if names and labels in names else None
        frame = _frame(body, dialect, chosen)
        if frame is None or any(frame[i].dtype == object for i in frame):
            _refuse_ragged(lines, begin, dialect, names)
        assert frame is not None
        if dialect.separator in ("", " ") and len(frame) == 1:
            _refuse_blank(lines)
    width = len(frame)
    if names is not None and len(names) == width - 1:
        if all(isinstance(it, str) and not it for it in frame[width - 1]):
            del frame[width - 1]  # separators at the end of each row
        elif _is_row_names(frame[0], dialect):
            names = ["", *names]
        else:
            raise _UnreadableError(
                f"line {lines.numbers[begin]} has {width} cells; expected {len(names)}, "
                "as many as names" + _comma_hint(dialect)
            )
    elif names is not None and len(names) != width:
        raise _UnreadableError(
            f"line {lines.numbers[begin]} has {width} cells; expected {len(names)}, as many as "
            f"names" + _comma_hint(dialect)
        )
    named = names is not None
    names = [str(i) for i in range(width)] if names is None else names
    if names[-1] == "" and len(names) > 1 and _all_empty(frame[width - 1]):
        names, width = names[:-1], width - 1
        del frame[width]
    names = [name or (f"Unnamed: {i}" if i else "") for i, name in enumerate(names)]
    _refuse_twice(names)
    columns = {}
    for place, name in enumerate(names):
        columns[name] = (
            frame[place] if place == chosen else _column(frame[place], dialect, missing)
        )
    if not missing:
        _refuse_missing({n: it for n, it in columns.items() if n != labels})
    if dialect.decimal == ",":
        lines.notes.append("commas were read as decimal marks")
    lines.notes.extend(_like_rows(lines, begin, dialect, width))
    comments = [(max(0, row - begin), text) for row, text in lines.comments]
    return Columns(columns, named, lines.notes, comments)


def _like_rows(lines: _Lines, begin: int, dialect: _Dialect, width: int) -> Iterator[str]:
    """A note on comments at or below the first row that would be rows without their first sign."""
    alike = []
    for row, text in lines.comments:
        cells = next(dialect.split([text.lstrip("#% ")]), [])
        if row >= max(1, begin) and len(cells) == width > 1 and any(map(dialect.is_number, cells)):
            alike.append(text)
    if alike:
        yield (
            f"{len(alike)} lines like rows that begin with # or % were taken for comments and "
            f"left out, {alike[0]!r:.40} the first of them"
        )


def _refuse_split_decimals(rows: Sequence[Sequence[str]], dialect: _Dialect) -> None:
    if dialect.separator != "," or len(rows[0]) % 2:
        return
    if all(_INTEGER.fullmatch(cell) for row in rows for cell in row):
        halves = [cell for row in rows for cell in row[1::2] if re.fullmatch(r"0\d+", cell)]
        if halves and not any(re.fullmatch(r"0\d+", it) for row in rows for it in row[::2]):
            raise _UnreadableError(
                f"{halves[0]!r} looks like the end of a number with a decimal comma; separate the "
                "cells by semicolons, or write decimal points"
            )


def _all_empty(cells: Any) -> bool:
    return cells.dtype == object and all(it == "" for it in cells)


def _comma_hint(dialect: _Dialect) -> str:
    if dialect.separator != ",":
        return ""
    return ". If commas are decimal marks, separate the cells by semicolons"


def _is_row_names(cells: Any, dialect: _Dialect) -> bool:
    """True for the row names of R in an unnamed column: words or 1, 2, ..., none twice."""
    listed = cells.tolist()
    if len(set(listed)) < len(listed):
        return False
    counted = cells.dtype.kind in "iu" and listed == list(range(1, len(listed) + 1))
    return cells.dtype == object or (counted and dialect.separator != ",")


def _names(lines: _Lines, dialect: _Dialect) -> tuple[list[str] | None, int]:
    """Names of the columns, if there are any, and the number of lines that they take."""
    rows = [row for row in dialect.split(lines.lines[:SAMPLE_LINES]) if row]
    # a quoted name may go over several lines
    above = next(n for n in range(1, 100) if [*dialect.split(lines.lines[:n])][:1] == rows[:1])
    if len(rows) > 1 and len(rows[0]) == len(rows[1]) - 1:
        rows[0] = ["", *rows[0]]
        named, _note = _header(rows, dialect)
        return (rows[0][1:], above) if named else (None, 0)
    if _quoted_above_numbers(lines, rows, dialect) or _numbered_index(rows):
        return [" ".join(name.split()) for name in rows[0]], above
    named, note = _header(rows, dialect)
    if note:
        lines.notes.append(note)
    if named:
        return [" ".join(name.split()) for name in rows[0]], above
    commented = [text for row, text in lines.comments if row == 0]
    if commented:  # as numpy.savetxt and astronomers write names
        separators = {dialect.separator, ",", " ", "\t"} - {""}
        for separator in sorted(separators, key=lambda it: it != dialect.separator):
            names = next(_Dialect(separator).split([commented[-1].lstrip("#% ")]), [])
            if len(names) == len(rows[0]) and not any(map(dialect.is_number, names)):
                lines.notes.append("names were taken from the comment above the rows")
                return names, 0
    return None, 0


def _quoted_above_numbers(lines: _Lines, rows: Sequence[Sequence[str]], dialect: _Dialect) -> bool:
    """True if the cells of the first line alone are quoted, and numbers stand below them."""
    first = re.fullmatch(r'\s*"[^"]*"(\s*\S?\s*"[^"]*")*\s*', lines.lines[0])
    if not first or len(rows) < 2 or any('"' in line for line in lines.lines[1:SAMPLE_LINES]):
        return False
    return all(dialect.is_number(cell) for row in rows[1:] for cell in row)


def _numbered_index(rows: Sequence[Sequence[str]]) -> bool:
    """True for the columns 0, 1, ... and the rows 0, 1, ... of a pandas table without names."""
    first, *body = rows
    columns = [str(i) for i in range(len(first) - 1)]
    return (
        len(first) > 1
        and [*first] == ["", *columns]
        and ([row[0] for row in body] == [str(i) for i in range(len(body))])
    )


def _frame(
    lines: Sequence[str], dialect: _Dialect, text: int | None
) -> "dict[int, np.ndarray] | None":
    """Columns as pandas reads them, numbers or text; None if rows differ in width."""
    import numpy as np

    with optional_import("Reading a table"):
        import pandas as pd

    how: dict[str, Any] = {"sep": dialect.separator or "\x1f", "decimal": dialect.decimal}
    if dialect.separator == " ":
        how["sep"] = r"\s+"
    if tuple(map(int, pd.__version__.split(".")[:2])) < (3, 1):
        how["float_precision"] = "round_trip"  # from 3.1 on, pandas rounds correctly by itself
    if text is not None:
        how["dtype"] = {text: str}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)
            read = pd.read_csv(
                io.StringIO("\n".join(lines)),
                header=None,
                na_filter=False,
                skipinitialspace=True,
                low_memory=False,
                **how,
            )
    except (pd.errors.ParserError, pd.errors.ParserWarning):
        return None
    columns = {}
    for place in range(read.shape[1]):
        cells = read[place]
        if cells.dtype.kind in "iufb":
            columns[place] = cells.to_numpy()
        else:
            array = np.array(cells.to_numpy(dtype=object))
            array[:] = [str(cell).strip() for cell in array]
            columns[place] = array
    return columns


def _refuse_ragged(
    lines: _Lines, begin: int, dialect: _Dialect, names: Sequence[str] | None
) -> None:
    reader: Any = dialect.split(lines.lines[begin:])
    width = None
    for line, cells in enumerate(reader):
        width = len(cells) if width is None else width
        if len(cells) != width:
            raise _UnreadableError(
                f"line {lines.numbers[begin + line]} has {len(cells)} cells; expected {width}"
                + _comma_hint(dialect)
            )


def _refuse_blank(lines: _Lines) -> None:
    for note in lines.notes:
        if "blank line" in note:
            raise _UnreadableError(f"a cell is missing: {note}")


def _column(cells: "np.ndarray", dialect: _Dialect, missing: bool) -> "np.ndarray":
    """A column of text as numbers or booleans, where all of it is; else unchanged."""
    import numpy as np

    if cells.dtype != object:
        return cells
    lowered = {it.lower() for it in cells}
    if lowered <= TRUE | FALSE:
        return np.array([it.lower() in TRUE for it in cells])
    gaps = [_is_missing(it) for it in cells]
    present = [it for it, gap in zip(cells, gaps, strict=True) if not gap]
    if not all(map(dialect.is_number, present)) or (not present and not missing):
        return cells
    for row, cell in enumerate(cells, 1):
        if _INTEGER.fullmatch(cell) and int(cell) != int(float(cell)):
            if all(_INTEGER.fullmatch(it) for it in present):
                raise _UnreadableError(
                    f"the integer {cell} in row {row} has more than the 53 bits of float64"
                )
            break
    return np.array(
        [np.nan if gap else dialect.value(it) for it, gap in zip(cells, gaps, strict=True)]
    )


def _refuse_missing(columns: "Mapping[str, np.ndarray]") -> None:
    import numpy as np

    gaps = {}
    for name, cells in columns.items():
        if cells.dtype.kind == "f" and np.isnan(cells).any():
            gaps[name] = np.flatnonzero(np.isnan(cells))
        elif cells.dtype == object and all(map(_is_missing, cells)):
            gaps[name] = np.arange(len(cells))
    if gaps:
        count = sum(map(len, gaps.values()))
        row, name = min((int(rows[0]) + 1, name) for name, rows in gaps.items())
        raise _UnreadableError(
            f"{count:,} cells are missing, the first of them column {name}, row {row}; fill them "
            "or leave their rows out"
        )


def _text_labels(file: Path, rows: int) -> list[str]:
    with _long_cells():
        lines = _lines(file)
        dialect = _dialect(lines)
        split = [row for row in dialect.split(lines.lines) if row]
        if len({len(row) for row in split}) != 1:
            _refuse_ragged(lines, 0, dialect, None)
    if len(split[0]) == 2 and not split[0][0]:
        split = [row[1:] for row in split]  # behind the index of pandas
    if len(split[0]) != 1:
        raise _UnreadableError(f"it must hold one column; got {len(split[0])}")
    _refuse_blank(lines)
    cells = [row[0] for row in split]
    if len(cells) == rows + 1 and (cells[0] not in cells[1:] or cells[0] == ""):
        return cells[1:]
    if len(cells) != rows:
        raise _UnreadableError(f"it holds {len(cells):,} labels; the data have {rows:,} rows")
    return cells


# Images


def _image_folder(folder: Path, labels: str | None) -> Contents:
    """Images of one size, as [rows, channels, height, width]; sub-folders are classes."""
    if labels is not None:
        raise _UnreadableError(
            f"a folder of images has no column {labels!r}; its sub-folders are classes"
        )
    every = [it for it in folder.rglob("*") if it.is_file() and not it.name.startswith(".")]
    files = sorted((it for it in every if it.suffix.lower() in IMAGES), key=natural_order)
    if not files:
        raise _UnreadableError(f"the folder holds no images ({', '.join(IMAGES)})")
    contents = _images(files, folder)
    others = [it for it in every if it.suffix.lower() not in IMAGES and it.name != "Thumbs.db"]
    notes = list(contents.notes)
    if others:
        notes.append(f"{len(others)} files that are no images were passed over, {others[0]} first")
    classes = [file.parent.relative_to(folder).as_posix() for file in files]
    if len(set(classes)) > 1 and "." in classes:
        stray = files[classes.index(".")]
        raise _UnreadableError(
            f"some images stand in sub-folders, which are classes; {stray} does not"
        )
    return replace(contents, labels=classes if len(set(classes)) > 1 else None, notes=tuple(notes))


def _images(files: Sequence[Path], folder: Path) -> Contents:
    import numpy as np

    notes: dict[str, list[Path]] = {}
    images = [_image(file, notes) for file in files]
    listed = [f"{len(of)} images {what}, {of[0]} the first of them" for what, of in notes.items()]
    colour = any(image.ndim == 3 for image in images)
    if colour and all(_is_grey(image) for image in images):
        images = [image if image.ndim == 2 else image[..., 0] for image in images]
        listed.append("all images are grey, and were read as one channel")
        colour = False
    images = [image[None] if image.ndim == 2 else image.transpose(2, 0, 1) for image in images]
    grey = [file for file, it in zip(files, images, strict=True) if len(it) == 1]
    if colour and grey:
        listed.append(
            f"{len(grey)} grey images among colours got three equal channels, {grey[0]} first"
        )
        images = [np.repeat(it, 3, 0) if len(it) == 1 else it for it in images]
    for file, image in zip(files, images, strict=True):
        if image.shape != images[0].shape:
            raise _UnreadableError(
                f"images must be of one size; {file} is of {image.shape[1:]} and {files[0]} of "
                f"{images[0].shape[1:]}"
            )
        if image.dtype != images[0].dtype:
            raise _UnreadableError(
                f"images must be of one depth; {file} has {image.dtype} and {files[0]} "
                f"{images[0].dtype}"
            )
    return Contents(np.stack(images), images=True, notes=tuple(listed))


def _is_grey(image: "np.ndarray") -> bool:
    return image.ndim == 2 or bool(
        (image[..., 0] == image[..., 1]).all() and (image[..., 0] == image[..., 2]).all()
    )


def _image(file: Path, notes: dict[str, list[Path]]) -> "np.ndarray":
    """One image, [height, width] or [height, width, 3], as deep as it is in the file."""
    with optional_import(f"Reading {file}"):
        from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file) as opened:
                return _pixels(opened, file, notes)
    except _UnreadableError as error:
        raise _UnreadableError(f"the image {file} {error}") from None
    except (
        *(OSError, SyntaxError, ValueError, EOFError, TypeError, struct.error, zlib.error),
        *(Image.DecompressionBombError, Image.DecompressionBombWarning, KeyError, IndexError),
    ) as error:
        raise _UnreadableError(f"the image {file} cannot be read: {error}") from None


def _pixels(image: Any, file: Path, notes: dict[str, list[Path]]) -> "np.ndarray":
    import numpy as np
    from PIL import ImageOps

    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # of a camera, whose other pictures are previews
        raise _UnreadableError(f"has {frames} frames; save each as a file of its own")
    modes = {"1", "L", "P", "LA", "PA", "RGB", "RGBA", "I", "F", "I;16", "I;16L", "I;16B", "I;16N"}
    if image.mode not in modes:
        raise _UnreadableError(f"is of mode {image.mode}; convert it to RGB or grey")
    depth = _depth(image)
    if depth > 8 and image.mode not in ("I", "F", "I;16", "I;16L", "I;16B", "I;16N"):
        raise _UnreadableError(
            f"has {depth} bits in each of several channels, of which only 8 would be kept; save "
            "its channels as an array, .npy"
        )
    turned = ImageOps.exif_transpose(image)
    if image.getexif().get(0x0112, 1) not in (0, 1):
        notes.setdefault("were turned according to their EXIF", []).append(file)
    image = turned
    if image.mode[0] in "IF":
        array = np.asarray(image)
        return array.astype(array.dtype.newbyteorder("="))
    if image.mode == "1":
        return np.asarray(image.convert("L"))
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        grey = image.mode in ("L", "LA")
        image = image.convert("LA" if grey else "RGBA")
        if image.getchannel("A").getextrema() != (255, 255):
            raise _UnreadableError("is transparent in places; put it on a background first")
        notes.setdefault("had an alpha channel, opaque everywhere, left out", []).append(file)
        image = image.convert("L" if grey else "RGB")
    if image.mode == "P":
        image = image.convert("RGB")
        array = np.asarray(image)
        return array[..., 0] if _is_grey(array) else array
    return np.asarray(image)


def _depth(image: Any) -> int:
    """Bits of each channel in the file, which Pillow may cut to 8."""
    with contextlib.suppress(AttributeError, KeyError, TypeError):
        return max(image.tag_v2[258])  # BitsPerSample of TIFF
    modes = " ".join(str(part) for tile in image.tile for part in tile[3:])
    return max([8, *(int(it) for it in re.findall(r";(\d+)", modes))])

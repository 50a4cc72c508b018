"""Files that hold rows of numbers: NPY, NPZ, CSV, Parquet, IDX, and folders of images."""

import csv
import gzip
import importlib
import math
import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from rkl.flows.metropolis import Chain
from rkl.flows.targets import Target

PICTURES = ".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff"
TORN = struct.error, zlib.error, zipfile.BadZipFile
IDX = {8: ">u1", 9: ">i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}


class Contents(NamedTuple):
    """Rows of a file, the labels that came with them, and whether they are pictures."""

    values: np.ndarray
    labels: Sequence[Any] | np.ndarray | None = None
    pictures: bool = False


def read_file(path: Path, column: str | None = None) -> Contents:
    """The rows in a file or in a folder of images.

    Args:
        path: The file.
        column: Where the file has named columns or arrays, the name of the labels.

    Raises:
        FileNotFoundError: There is none.
        ImportError: Reading it needs a package that is not installed.
        ValueError: It cannot be read, or is of no known kind.
    """
    if not path.exists():
        raise FileNotFoundError(f"data: there is no file {path}.")
    if path.is_dir():
        return _pictures(path)
    kinds = {".npy": _npy, ".npz": _npz, ".csv": _csv, ".parquet": _parquet}
    read = kinds.get(path.suffix.lower(), _idx)
    try:
        return read(path, column)
    except (OSError, EOFError, ValueError, KeyError, *TORN) as error:
        raise ValueError(f"data: {path} cannot be read: {error}".rstrip(".") + ".") from None


def write_samples(path: Path, values: np.ndarray) -> None:
    """Write samples as .npy, or .csv for vectors, atomically.

    Raises:
        ValueError: The name ends otherwise.
    """
    from rkl.runs import replacing

    if path.suffix not in (".npy", ".csv"):
        raise ValueError(f"out must end in .npy or .csv; got {path}.")
    with replacing(path) as temporary, temporary.open("wb") as file:
        if path.suffix == ".npy":
            np.save(file, values)
        else:
            np.savetxt(file, values.reshape(len(values), -1), delimiter=",", fmt="%.9g")


def write_chain(path: Path, chain: Chain, observed: Mapping[str, Tensor], target: Target) -> None:
    """Write chains under one condition atomically: .nc as ArviZ has it, .npz, or states as .npy.

    Both of the first keep the states, log p and log q, their difference, whether each proposal
    was taken, and the observables.
    """
    from rkl.runs import replacing

    stats = {"accepted": chain.accepted, "log_ratio": chain.log_ratio}
    stats |= {"lp": chain.log_p, "log_q": chain.log_q}
    columns = {name: it.cpu().numpy() for name, it in {**observed, "x": chain.x, **stats}.items()}
    condition = chain.condition.cpu().numpy()
    with replacing(path) as temporary:
        if path.suffix == ".nc":
            _write_groups(temporary, columns, set(stats), condition, target)
            return
        with temporary.open("wb") as file:
            if path.suffix == ".npy":
                np.save(file, columns["x"].reshape(-1, *chain.x.shape[2:]))
            else:
                np.savez(file, allow_pickle=False, **{**columns, "condition": condition})


def _write_groups(
    path: Path, columns: dict[str, np.ndarray], stats: set[str], condition: Any, target: Target
) -> None:
    import xarray as xr

    groups: dict[str, dict[str, Any]] = {"posterior": {}, "sample_stats": {}}
    for name, it in columns.items():
        axes = ["chain", "draw", *(f"{name}_dim_{i}" for i in range(it.ndim - 2))]
        units = {"units": target.units[name]} if name in target.units else {}
        groups["sample_stats" if name in stats else "posterior"][name] = axes, it, units
    named = zip(target.conditions, condition.tolist(), strict=True)
    about = {"target": repr(target)} | {it.name: value for it, value in named}
    for mode, (group, arrays) in zip(("w", "a"), groups.items(), strict=True):
        how: Any = {"mode": mode, "engine": "h5netcdf", "group": group}
        xr.Dataset(arrays, attrs=about).to_netcdf(path, **how)


def _npy(path: Path, column: str | None) -> Contents:
    return Contents(np.load(path, allow_pickle=False))


def _npz(path: Path, column: str | None) -> Contents:
    """The array called data, x or values, or the only one beside the labels."""
    with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    if column and column not in arrays:
        raise ValueError(f"it has no array {column!r}; it has {', '.join(arrays)}")
    names = [column] if column else [name for name in ("labels", "label", "y") if name in arrays]
    labels = arrays.pop(names[0]) if names else None
    known = [name for name in ("data", "x", "values") if name in arrays] or list(arrays)
    if len(known) != 1:
        raise ValueError(f"it must hold one array called data; it has {', '.join(arrays)}")
    return Contents(arrays[known[0]], labels)


def _csv(path: Path, column: str | None) -> Contents:
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.reader(file) if row]
    if not rows:
        raise ValueError("it is empty")
    named = not all(_is_number(cell) for cell in rows[0])
    names = rows.pop(0) if named else [str(i) for i in range(len(rows[0]))]
    for number, row in enumerate(rows, 1 + named):
        if len(row) != len(names):
            raise ValueError(f"row {number} has {len(row)} cells; expected {len(names)}")
    return _columns({name: [row[i] for row in rows] for i, name in enumerate(names)}, column)


def _parquet(path: Path, column: str | None) -> Contents:
    try:
        pyarrow: Any = importlib.import_module("pyarrow")
        parquet: Any = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise ImportError(f"Reading {path} needs pyarrow: pip install rkl[data]") from None
    try:
        table = parquet.read_table(path)
    except pyarrow.ArrowException as error:
        raise ValueError(str(error)) from None
    return _columns({name: table[name].to_pylist() for name in table.column_names}, column)


def _columns(columns: dict[str, list[Any]], labels: str | None) -> Contents:
    if labels and labels not in columns:
        raise ValueError(f"it has no column {labels!r}; it has {', '.join(columns)}")
    chosen = columns.pop(labels) if labels else None
    numbers = []
    for name, cells in columns.items():
        for row, cell in enumerate(cells, 1):
            if not _is_number(cell):
                raise ValueError(f"column {name}, row {row}, holds {cell!r}, which is no number")
        numbers.append([float(cell) for cell in cells])
    return Contents(np.array(numbers, dtype=np.float64).T, chosen)


def _is_number(cell: Any) -> bool:
    try:
        float(cell)
    except (TypeError, ValueError):
        return False
    return True


def _idx(path: Path, column: str | None) -> Contents:
    """The format of MNIST: two zeros, the type, the number of axes, their lengths, the numbers."""
    raw = path.read_bytes()
    raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    if len(raw) < 4 or raw[:2] != b"\0\0" or raw[2] not in IDX or not raw[3]:
        raise ValueError("it is none of .npy, .npz, .csv, .parquet, IDX or a folder of images")
    axes = raw[3]
    shape = struct.unpack(f">{axes}I", raw[4 : 4 + 4 * axes])
    kind = np.dtype(IDX[raw[2]])
    body = raw[4 + 4 * axes :]
    if len(body) != math.prod(shape) * kind.itemsize:
        raise ValueError(f"its header promises {shape} numbers, which it does not hold")
    values = np.frombuffer(body, kind).reshape(shape)
    return Contents(values.astype(kind.newbyteorder("=")), None, pictures=axes > 2)


def _pictures(folder: Path) -> Contents:
    """Images of one size, as [rows, channels, height, width]; sub-folders are classes."""
    files = sorted(it for it in folder.rglob("*") if it.suffix.lower() in PICTURES)
    if not files:
        raise ValueError(f"data: the folder {folder} holds no images ({', '.join(PICTURES)}).")
    images = [_picture(file) for file in files]
    grey = all(image.ndim == 2 for image in images)
    images = [image[None] if image.ndim == 2 else image.transpose(2, 0, 1) for image in images]
    if not grey:
        images = [np.repeat(it, 3, 0) if len(it) == 1 else it for it in images]
    for file, image in zip(files, images, strict=True):
        if image.shape != images[0].shape:
            sizes = f"{image.shape[1:]} and {files[0]} of {images[0].shape[1:]}"
            raise ValueError(f"data: images must be of one size; {file} is of {sizes}.")
    classes = [file.parent.relative_to(folder).as_posix() for file in files]
    return Contents(np.stack(images), classes if len(set(classes)) > 1 else None, pictures=True)


def _picture(file: Path) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(file) as image:
            return np.asarray(image.convert("L" if image.mode in ("1", "L") else "RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"data: the image {file} cannot be read: {error}") from None

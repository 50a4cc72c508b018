"""Files of samples and of chains."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np


def write_samples(path: Path, values: np.ndarray, columns: Sequence[str] = ()) -> None:
    """Write samples as .npy, or .csv for vectors, atomically.

    A .csv has enough digits to read the same numbers back, and the names of
    the columns in its first line, if there are any.

    Raises:
        ValueError: The name has another ending.
    """
    from rkl.runs import replacing

    if path.suffix not in (".npy", ".csv"):
        raise ValueError(f"out must end in .npy or .csv; got {path}.")
    with replacing(path) as temporary, temporary.open("wb") as file:
        if path.suffix == ".npy":
            np.save(file, values)
        else:
            names = io.StringIO()
            if columns:
                csv.writer(names, lineterminator="\n").writerow(columns)
            file.write(names.getvalue().encode())
            digits = "%.17g" if values.dtype == np.float64 else "%.9g"
            np.savetxt(file, values.reshape(len(values), -1), delimiter=",", fmt=digits)

"""Posterior draws by name, from whatever holds them, read when they are asked for."""

import dataclasses
import itertools
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Integer
from torch import Tensor
from xarray.backends import BackendArray
from xarray.core import indexing

from rkl.bayes.axes import AXES, in_one_order, labels_along
from rkl.readers import (
    Columns,
    masked_numbers,
    matching_files,
    read_arrays,
    read_columns,
    refuse_external,
)
from rkl.tables import Table

NUMBERS = 2**22  # in one chunk of draws: 32 MiB
SOME = 64  # draws of each chain that show whether a variable is a simplex
SINGLE = 1e-6  # by which sums of single precision, or torch, may miss 1
ROUNDED = 5.1e-4  # of an element of a simplex that was written with three digits
ROUNDED_SUM = 1e-2  # of a sum of many such elements, whose errors mostly cancel
MAX_FLAGS = 2**20  # flags of a file that are read although no variable is asked for
ELEMENTS = 4, 64  # at least and at most, of one variable, whose extremes are looked for
PROBED = 2**15  # numbers of the draws at these extremes, unless fewer are the least
READABLE = (
    "a DataTree or InferenceData with a group 'posterior', an xarray Dataset, a dict of arrays "
    "[chains, draws, ...], a data frame, a path of .nc, .zarr, .npz or a table, a cmdstanpy fit, "
    "or an emcee sampler"
)
HDF5 = ".nc", ".nc4", ".netcdf", ".h5", ".hdf5"
ENGINES = dict.fromkeys(HDF5, "h5netcdf") | {".zarr": "zarr"}  # of files with every chain
CHAIN = ".chain", "chain", "Chain", "chain__"
ITERATION = ".iteration", "iteration", "Iteration", ".iter", "iter__", "iter"
DRAW = ".draw", "draw", "Draw", "draw__"
PARAMETER = ".variable", "variable", "Parameter", "parameter", "name"
VALUE = ".value", "value", "Value"


@dataclass(frozen=True, eq=False)
class Draws:
    """Posterior draws by name, [chains, draws, ...] each.

    What is lazy stays lazy: a variable of a NetCDF or Zarr file, or of dask, is read chunk by
    chunk. Everything leaves as float64, and finite, or not at all.

    Args:
        variables: Arrays by name: tensors, NumPy arrays, nested lists, or DataArrays with the
            dimensions chain and draw, wherever they stand.
        weights: Weight of every draw, for draws of importance sampling or SMC; at least 0. They
            are normalised to sum to 1. PSIS returns logarithms: exponentiate them.
        notes: What a user should know of how they were read.

    Raises:
        ValueError: If shapes disagree, an axis is missing, or a weight is negative.
        TypeError: If a variable holds no real numbers.

    >>> draws = Draws({"mu": [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]})
    >>> draws.chains, draws.draws, draws.shape("mu"), draws["mu"].mean().item()
    (2, 3, (), 3.5)
    """

    variables: Mapping[str, Any]
    weights: Float[Tensor, "chains draws"] | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self):
        if not self.variables:
            raise ValueError("draws must hold at least one variable; got none.")
        arrays = {name: _as_array(name, value) for name, value in self.variables.items()}
        arrays = in_one_order(arrays)
        object.__setattr__(self, "variables", arrays)
        for name, array in arrays.items():
            size = array.sizes["chain"], array.sizes["draw"]
            if size != (self.chains, self.draws):
                raise ValueError(
                    f"{name} has {size[0]} chains of {size[1]} draws but {self.names[0]} has "
                    f"{self.chains} of {self.draws}."
                )
        if not self.chains * self.draws:
            raise ValueError(f"draws must not be empty; got {self.chains} x {self.draws}.")
        if self.weights is not None:
            object.__setattr__(self, "weights", self._normalise(self.weights))

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the variables."""
        return tuple(self.variables)

    @property
    def chains(self) -> int:
        """Number of chains."""
        return self._size()["chain"]

    @property
    def draws(self) -> int:
        """Number of draws of each chain."""
        return self._size()["draw"]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one draw of a variable."""
        return tuple(n for axis, n in self.of(name).sizes.items() if axis not in AXES)

    def labels(self, name: str) -> list[list[str] | None]:
        """Coordinate labels of each axis of a variable; None for an axis that is only numbered.

        >>> school = {"school": ["Choate", "Deerfield"]}
        >>> theta = xr.DataArray(np.zeros((2, 5, 2)), dims=("chain", "draw", "school"))
        >>> Draws({"theta": theta.assign_coords(school)}).labels("theta")
        [['Choate', 'Deerfield']]
        """
        array = self.of(name)
        return [labels_along(array, axis) for axis in array.dims if axis not in AXES]

    def table(self) -> Table:
        """The variables with the shape of a draw, unread."""
        rows = [(name, " x ".join(map(str, self.shape(name))) or "number") for name in self.names]
        title = f"{self.chains} chains of {self.draws:,} draws" + ", weighted" * (
            self.weights is not None
        )
        return Table(title, ("variable", "a draw"), rows, self.notes)

    def __str__(self) -> str:
        return str(self.table())

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()

    def of(self, name: str) -> xr.DataArray:
        """A variable as it is stored, not yet read."""
        if name not in self.variables:
            raise ValueError(
                f"draws hold no variable {name!r}; there are {', '.join(self.names)}."
            )
        return self.variables[name]

    def __getitem__(self, name: str) -> Float[Tensor, "chains draws *event"]:
        """All draws of a variable, read into memory."""
        return self._finite(name, slice(None), slice(None))

    def some(self, name: str, chains: slice, draws: slice) -> Float[Tensor, "chains draws *event"]:
        """Some draws of a variable, read into memory."""
        return self._finite(name, chains, draws)

    def in_memory(self, name: str) -> bool:
        """True if reading a variable costs next to nothing."""
        return isinstance(self.of(name).variable._data, np.ndarray)

    def extremes(self, name: str) -> Integer[Tensor, "places two"]:
        """Chain and draw of the least and greatest elements of a variable; of many, of a few.

        A file is read for it, chunk by chunk.
        """
        width = math.prod(self.shape(name))
        looked_at = min(max(PROBED // max(1, width), ELEMENTS[0]), ELEMENTS[1])
        columns = slice(None, None, math.ceil(width / looked_at) or 1)
        best = torch.full((2 * len(range(width)[columns]),), math.inf, dtype=torch.float64)
        places = torch.zeros(len(best), 2, dtype=torch.int64)
        for chain, part in self.parts([name]):
            values = read(self.of(name), chain, part).reshape(-1, width)[:, columns]
            least, row = torch.cat([values, -values], -1).min(0)
            better = least < best
            best = torch.where(better, least, best)
            here = torch.stack([torch.full_like(row, chain), row + part.start], -1)
            places = torch.where(better[:, None], here, places)
        return places.unique(dim=0)

    def at(
        self, name: str, places: Integer[Tensor, "places two"]
    ) -> Float[Tensor, "places *event"]:
        """Single draws of a variable, each by chain and draw."""
        if self.in_memory(name):
            chain, draw = (xr.Variable("place", x) for x in places.T.numpy())
            part = self.of(name).variable.isel(chain=chain, draw=draw).transpose("place", ...)
            values = tensor_of(part.values)
        else:  # a file would be read from the first place to the last
            singles = (read(self.of(name), c, slice(d, d + 1)) for c, d in places.tolist())
            values = torch.cat(list(singles))
        if not values.isfinite().all():
            for c, d in places.tolist():  # raises, naming the draw
                self._finite(name, c, slice(d, d + 1))
        return values

    def chunks(
        self, names: Sequence[str], size: int | None = None
    ) -> Iterator[tuple[int, slice, dict[str, Tensor]]]:
        """The draws of some variables in order, a few at a time.

        Args:
            names: Variables to read.
            size: About how many numbers to read at a time. A chunk holds whole draws, and as
                many as the file stores together.

        Yields:
            The chain, the draws within it, and every variable's, [draws, ...].
        """
        for chain, part in self.parts(names, size):
            yield chain, part, {name: self._finite(name, chain, part) for name in names}

    def parts(
        self, names: Sequence[str], size: int | None = None, multiple: int = 1
    ) -> Iterator[tuple[int, slice]]:
        """Chain and draws of every chunk, unread; a multiple of ``multiple`` if possible."""
        rows = self._rows(names, NUMBERS if size is None else size, multiple)
        for chain in range(self.chains):
            for start in range(0, self.draws, rows):
                yield chain, slice(start, min(start + rows, self.draws))

    def every(self, step: int) -> "Draws":
        """Every step-th draw, still unread, with its weight."""
        if step < 1:
            raise ValueError(f"step must be at least 1; got {step}.")
        thin = slice(None, None, step)
        taken = {name: array.isel(draw=thin) for name, array in self.variables.items()}
        weights = None if self.weights is None else self.weights[:, thin]
        return Draws(taken, weights, self.notes)

    def _size(self) -> Mapping[Any, int]:
        return next(iter(self.variables.values())).sizes

    def _finite(self, name: str, chains: int | slice, draws: slice) -> Tensor:
        values = read(self.of(name), chains, draws)
        # One sum suffices, unless finite numbers overflow in it.
        if not values.sum().isfinite() and not values.isfinite().all():
            raise ValueError(_unfinite(name, values, chains, draws))
        return values

    def _rows(self, names: Sequence[str], size: int, multiple: int) -> int:
        if not names:
            raise ValueError("names must name at least one variable; got none.")
        if size < 1:
            raise ValueError(f"size must be at least 1; got {size}.")
        rows = max(1, size // max(1, sum(math.prod(self.shape(name)) for name in names)))
        # What is stored together is decompressed together: read it once, not once per chunk.
        stored = max(_stored_together(self.variables[name]) for name in names)
        together = stored if stored > 1 else multiple
        return min(self.draws, -(-rows // together) * together)

    def _normalise(self, weights: Tensor) -> Tensor:
        weights = weights.detach().to("cpu", torch.float64)
        if weights.shape != (self.chains, self.draws):
            raise ValueError(
                f"weights must be [chains, draws], [{self.chains}, {self.draws}]; "
                f"got {list(weights.shape)}."
            )
        if not weights.isfinite().all() or weights.min() < 0 or not weights.sum() > 0:
            raise ValueError(
                "weights must be finite, at least 0, and not all 0; "
                f"got values from {weights.min():.4g} to {weights.max():.4g}."
            )
        return weights / weights.sum()


def read_draws(source: Any, weights: Any = None) -> Draws:
    """Posterior draws from any supported source; files are read when needed, in pieces.

    Of a DataTree, an InferenceData or a file, the group ``posterior`` is taken, and beside it
    ``lp`` of the group ``sample_stats``, which some posteriors need for their mode. What holds
    no numbers there, such as names, is passed over.

    Args:
        source: Draws; a DataTree, InferenceData or Dataset; a dict of arrays
            [chains, draws, ...]; the path of a NetCDF or Zarr store, or of an .npz of such
            arrays; the path or pattern ("chain_*.csv") of CmdStan's csv, or a list of them, one
            chain each; the path of a table, or a data frame, with columns .chain, .iteration or
            .draw as R's posterior, brms and rstan write them, wide or long; a cmdstanpy fit; an
            emcee sampler or backend, whose walkers become chains, read by ArviZ. Columns mu[1],
            mu[2] are put together as mu.
        weights: Weight of each draw, [chains, draws].

    Raises:
        ValueError: If the source holds no posterior draws, or cannot be read.
        FileNotFoundError: If a path leads nowhere.
        ImportError: If reading the source takes ArviZ (or Zarr) and it is not installed.

    >>> read_draws({"mu": torch.zeros(4, 1000), "theta": torch.zeros(4, 1000, 8)}).names
    ('mu', 'theta')
    """
    notes: list[str] = []
    draws = source
    if not isinstance(source, Draws):
        variables = _variables(source, notes)
        draws = Draws(variables, notes=tuple(notes))
    if weights is None:
        return draws
    if isinstance(weights, xr.DataArray):
        variables = in_one_order({**draws.variables, "": _as_array("weights", weights)})
        weights = variables[""].transpose(*AXES, ...).values
    if masked := masked_numbers(weights):
        raise ValueError(f"weights must be finite: {masked} ([chain, draw]).")
    if not isinstance(weights, Tensor):
        try:
            weights = torch.from_numpy(np.array(weights, np.float64))
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"weights must be numbers [chains, draws]; got {weights!r:.60}."
            ) from error
    return dataclasses.replace(draws, weights=weights)


def rounded_simplexes(draws: Draws, names: Sequence[str]) -> list[str]:
    """The variables that look like simplexes that were rounded when they were written.

    A table with three digits has sums that are off by up to half a unit of the third digit for
    each element, and torch accepts 1e-6 in all.
    """
    thin = draws.every(max(1, draws.draws // SOME))
    return [name for name in names if 0 < _simplex_error(thin, name) <= _rounding(draws, name)]


def divided_by_sums(draws: Draws, names: Sequence[str]) -> Draws:
    """The draws with some vectors divided by their sums, chunk by chunk as they are read."""
    divided = {name: _over_sum(draws.of(name)) for name in names}
    return dataclasses.replace(draws, variables={**draws.variables, **divided})


def with_exact_simplexes(draws: Draws, names: Sequence[str]) -> Draws:
    """The draws, with simplexes divided by their sums and a note for each that was rounded.

    What is no simplex in some draw is left as it is, to be refused by the family.
    """
    errors = {name: _simplex_error(draws, name) for name in names}
    exact = [name for name, error in errors.items() if error <= _rounding(draws, name)]
    notes = [
        f"{name} was divided by its sums, which differ from 1 by up to {errors[name]:.1g}: it "
        "looks like a simplex that was rounded when it was written"
        for name in exact
        if errors[name] > SINGLE
    ]
    return dataclasses.replace(divided_by_sums(draws, exact), notes=(*draws.notes, *notes))


def _rounding(draws: Draws, name: str) -> float:
    """Largest distance of a sum from 1 that is laid to rounding."""
    return min(ROUNDED * math.prod(draws.shape(name)[-1:]), ROUNDED_SUM)


def _simplex_error(draws: Draws, name: str) -> float:
    """Largest distance of sums from 1: 0 if only rounding, inf if the variable is no simplex."""
    shape = draws.shape(name)
    if not shape or shape[-1] < 2 or draws.of(name).dtype.kind != "f":
        return math.inf
    off = 0.0
    for chain, part in draws.parts([name]):
        values = read(draws.of(name), chain, part)
        if not values.numel() or not values.isfinite().all() or bool((values < 0).any()):
            return math.inf
        off = max(off, float((values.sum(-1) - 1).abs().max()))
    return 0.0 if off <= 1e-14 * shape[-1] else off


def _over_sum(array: xr.DataArray) -> xr.DataArray:
    array = array.transpose(*AXES, ...)
    if array.chunks is not None:  # dask divides as lazily as it reads
        return array.astype(np.float64) / array.sum((array.dims[-1],), dtype=np.float64)
    lazy = indexing.LazilyIndexedArray(_OverSum(array.variable))
    variable = xr.Variable(array.dims, lazy, encoding=array.encoding)
    return xr.DataArray(variable, coords=array.coords)


class _OverSum(BackendArray):
    """Vectors along the last axis, divided by their sums when they are read."""

    def __init__(self, whole: xr.Variable):
        self.whole, self.shape, self.dtype = whole, whole.shape, np.dtype(np.float64)

    def __getitem__(self, key):
        outer = indexing.IndexingSupport.OUTER
        return indexing.explicit_indexing_adapter(key, self.shape, outer, self._read)

    def _read(self, key):
        vectors = self.whole[(*key[:-1], slice(None))].values.astype(np.float64)
        return (vectors / vectors.sum(-1, keepdims=True))[..., key[-1]]


def read(array: xr.DataArray, chains: int | slice, draws: slice) -> Tensor:
    """Some draws of a variable, [chains, draws, ...] or, of one chain, [draws, ...]; float64."""
    part = array.variable.isel(chain=chains, draw=draws)
    part = part.transpose(*(axis for axis in AXES if axis in part.dims), ...)
    return tensor_of(part.values)


def tensor_of(values: np.ndarray) -> Tensor:
    """Numbers as float64, copied only where a tensor cannot share them."""
    return torch.from_numpy(np.require(values, np.float64, ["C", "W"]))


def _as_array(name: str, value: Any) -> xr.DataArray:
    array = value if isinstance(value, xr.DataArray) else _label_axes(name, value)
    if not {*AXES} <= {*array.dims}:
        raise ValueError(
            f"{name} must have the dimensions chain and draw; got {_dimensions(array)}."
        )
    if not _real(array):
        raise TypeError(f"{name} must hold real numbers; got {array.dtype}.")
    return array


def _real(array: xr.DataArray) -> bool:
    return array.dtype.kind in "biuf"


def _label_axes(name: str, value: Any) -> xr.DataArray:
    if isinstance(value, Tensor) and not value.is_complex():
        value = value.detach().to("cpu", torch.float64).numpy()
    elif not type(value).__module__.startswith("dask."):
        try:
            masked = masked_numbers(value)
            value = np.asarray(value)
        except ValueError as error:
            raise ValueError(f"{name} must have chains of one length: {error}") from error
        if masked:
            raise ValueError(f"{name} must be finite: {masked} ([chain, draw, ...]).")
    if value.ndim < 2:
        raise ValueError(
            f"{name} must be [chains, draws, ...]; got {list(value.shape)}. "
            f"Draws of a single chain are {name}[None]; those of several chains are kept apart by "
            "get_samples(group_by_chain=True) of NumPyro."
        )
    return xr.DataArray(value, dims=(*AXES, *(f"axis_{i}" for i in range(value.ndim - 2))))


def _dimensions(data: xr.Dataset | xr.DataArray) -> str:
    names = ", ".join(map(str, data.sizes)) or "none"
    return f"{names} (unstack sample first)" if "sample" in data.sizes else names


def _variables(source: Any, notes: list[str]) -> Mapping[str, Any]:
    """The variables of a source; only those of tables are read."""
    if isinstance(source, xr.Dataset):
        return _of_dataset(source, "the Dataset", notes)
    if isinstance(source, str | os.PathLike):
        return _of_path(Path(source), notes)
    if isinstance(source, list | tuple):
        return _of_files(source, notes)
    made_by = type(source).__module__.partition(".")[0]
    if made_by == "pandas" and hasattr(source, "columns"):
        columns = {_column_name(name): source[name].to_numpy() for name in source.columns}
        columns |= _marks_of_index(source, columns)
        return _of_tables([Columns(columns)], ["the data frame"], notes)
    if made_by == "cmdstanpy":
        return _of_cmdstanpy(source, notes)
    if made_by == "emcee":
        return _by_arviz("from_emcee", source, f"a {type(source).__name__} of emcee", notes)
    # InferenceData is a mapping too, of groups
    if isinstance(source, xr.DataTree) or getattr(source, "posterior", None) is not None:
        return _of_tree(source, notes)
    if isinstance(source, Mapping):
        return source
    raise TypeError(f"draws must be {READABLE}; got {type(source).__name__}.")


def _column_name(name: Any) -> str:
    """The name of a column of a data frame; that of ArviZ's may have a group and a label too.

    >>> _column_name(("posterior", "theta[0]", "Choate")), _column_name(("theta[0]", "Choate"))
    ('theta[0]', 'theta[0]')
    """
    match name:
        case ("posterior", inner, *_):
            return str(inner)
        case (str() as inner, _, *_) if re.fullmatch(r".+\[[\d, ]+\]", inner):
            return inner
    return str(name)


def _marks_of_index(frame: Any, columns: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Chain and draw of every row, where the index of a data frame has them as levels."""
    levels = [str(name) for name in frame.index.names]
    others = [name for name in levels if name not in _MARKS]
    if others and len(levels) > 1:
        raise ValueError(
            "the data frame must have no levels in its index but chain and draw; got "
            f"{', '.join(levels)}. Hand over what it was made of, such as idata.posterior, or "
            "frame.to_xarray()."
        )
    missing = [i for i, name in enumerate(levels) if name in _MARKS and name not in columns]
    return {levels[i]: frame.index.get_level_values(i).to_numpy() for i in missing}


def _of_tree(tree: Any, notes: list[str]) -> Mapping[str, Any]:
    """The posterior of a DataTree, or of the InferenceData of older ArviZ."""
    groups = [getattr(tree, "posterior", tree), getattr(tree, "sample_stats", None)]
    groups = [x.to_dataset() if isinstance(x, xr.DataTree) else x for x in groups]
    what = f"the {type(tree).__name__}"
    if not isinstance(groups[0], xr.Dataset):
        raise TypeError(
            f"{what} must have an xarray Dataset as its posterior; got {groups[0]!r:.60}."
        )
    return _of_dataset(groups[0], what, notes, groups[1])


def _of_dataset(
    dataset: xr.Dataset, what: str, notes: list[str], statistics: xr.Dataset | None = None
) -> Mapping[str, Any]:
    variables = {
        str(k): x for k, x in dataset.data_vars.items() if {*AXES} <= {*x.dims} and _real(x)
    }
    if not variables:
        raise ValueError(
            f"{what} holds no posterior: expected a group 'posterior', or numbers over the "
            f"dimensions chain and draw; got the dimensions {_dimensions(dataset)}."
        )
    if statistics is not None and "lp" in statistics:
        variables.setdefault("lp", statistics["lp"])
    if (
        statistics is not None
        and "diverging" in statistics
        and statistics["diverging"].size < MAX_FLAGS
    ):
        _note_divergences(int(statistics["diverging"].sum()), notes)
    return variables


def _note_divergences(count: int, notes: list[str]) -> None:
    if count:
        notes.append(
            f"{count:,} draws ended divergent transitions: the chains may have missed parts of "
            "the posterior, so that tails look lighter than they are"
        )


def _of_cmdstanpy(fit: Any, notes: list[str]) -> Mapping[str, Any]:
    if not hasattr(fit, "draws_xr") or not hasattr(fit, "method_variables"):
        raise TypeError(
            f"draws must be a CmdStanMCMC where they come from cmdstanpy; got a "
            f"{type(fit).__name__}, which has no chains."
        )
    columns = fit.method_variables()
    _note_divergences(int(np.sum(columns.get("divergent__", 0))), notes)
    lp = xr.DataArray(columns["lp__"], dims=("draw", "chain"))
    return _of_dataset(fit.draws_xr(), "the fit of cmdstanpy", notes, xr.Dataset({"lp": lp}))


def _of_path(path: Path, notes: list[str]) -> Mapping[str, Any]:
    if path.suffix not in ENGINES:
        return _of_files(matching_files(path, "draws"), notes)
    _exists(path)
    engine = ENGINES[path.suffix]
    try:
        if engine == "h5netcdf" and path.is_file():
            refuse_external(path)
        posterior = _group(path, engine, "posterior")
        posterior = _open(path, engine) if posterior is None else posterior
        stats = _group(path, engine, "sample_stats")
    except ModuleNotFoundError:
        raise
    except Exception as error:  # each library that may read it has its own
        if "unrecognized engine 'zarr'" in str(error):
            raise ImportError(f"Reading {path} takes Zarr: pip install zarr.") from error
        kind = "Zarr" if engine == "zarr" else "NetCDF 4 (HDF5)"
        raise ValueError(f"{path} cannot be read as {kind}: {error}") from error
    return _of_dataset(posterior, str(path), notes, stats)


def _open(path: Path, engine: str, group: str | None = None) -> xr.Dataset:
    # without a cache, or what was read once would stay in memory
    options: dict[str, Any] = {"consolidated": False} if engine == "zarr" else {}
    return xr.open_dataset(
        path, engine=engine, group=group, cache=False, decode_times=False, **options
    )  # pyright: ignore[reportArgumentType]


def _of_files(paths: Sequence[Any], notes: list[str]) -> Mapping[str, Any]:
    if not paths or not all(isinstance(path, str | os.PathLike) for path in paths):
        raise TypeError(f"a list of draws must hold paths of CmdStan's csv; got {paths!r:.60}.")
    whole = [path for path in paths if Path(path).suffix in (*ENGINES, ".npz")]
    if len(paths) > 1 and whole:
        raise ValueError(
            "several files of draws must be tables, a chain in each, as those of CmdStan; got "
            f"{whole[0]}, which holds all its chains and is read alone."
        )
    for path in paths:
        _exists(Path(path))
    if len(paths) == 1 and Path(paths[0]).suffix in ENGINES:
        return _of_path(Path(paths[0]), notes)
    if len(paths) == 1 and Path(paths[0]).suffix == ".npz":
        return {name: it.values for name, it in read_arrays(paths[0], name="draws").items()}
    if Path(paths[0]).suffix in (".npy", ".pkl", ".pickle"):
        raise ValueError(
            f"{paths[0]} must end in .nc, .zarr, .npz or be a table, of .csv or .parquet, which "
            "hold the names of their variables."
        )
    tables = [read_columns(path, name="draws") for path in paths]
    return _of_tables(tables, [str(path) for path in paths], notes)


def _of_tables(
    tables: Sequence[Columns], places: Sequence[str], notes: list[str]
) -> Mapping[str, Any]:
    parts = []
    for table, place in zip(tables, places, strict=True):
        notes += [f"{place}: {note}." for note in table.notes]
        cmdstan = "lp__" in table.columns
        columns = _after_warm_up(table, place, notes) if cmdstan else dict(table.columns)
        columns = _widen(columns, place)
        chains = _by_chain(columns, place)
        if len(tables) > 1 and len(chains) > 1:
            raise ValueError(f"{place} holds {len(chains)} chains; read it alone.")
        single = cmdstan and table.comments  # CmdStan writes a file for each chain
        if not single and len(tables) == 1 and not any(name in columns for name in CHAIN):
            notes.append(f"{place} has no column .chain: its draws were taken as one chain.")
        numbers = {n: [it[n] for it in chains] for n in chains[0] if n not in _MARKS}
        parts.append(_vectors(numbers, cmdstan))
    for part, place in zip(parts, places, strict=True):
        if part.keys() != parts[0].keys():
            others = sorted(part.keys() ^ parts[0].keys())
            raise ValueError(f"{place} and {places[0]} differ in the variable {others[0]}.")
        rows = len(next(iter(part.values()))[0])
        if rows != len(next(iter(parts[0].values()))[0]):
            raise ValueError(
                f"{place} has {rows} draws but {places[0]} has "
                f"{len(next(iter(parts[0].values()))[0])}."
            )
    for i, j in itertools.combinations(range(len(parts)), 2):
        if all(np.array_equal(x, parts[j][name]) for name, x in parts[i].items()):
            notes.append(
                f"{places[i]} and {places[j]} hold the same draws, which count twice: errors are "
                "too small. Chains need a seed or an id of their own"
            )
    return {name: _concatenate([part[name] for part in parts]) for name in parts[0]}


def _concatenate(parts: Sequence[Any]) -> Any:
    values = np.concatenate([np.asarray(part) for part in parts])
    first = parts[0]
    if not isinstance(first, xr.DataArray):
        return values
    coords = {axis: first.coords[axis].values for axis in first.coords}
    return xr.DataArray(values, dims=first.dims, coords=coords)


_MARKS = {*CHAIN, *ITERATION, *DRAW}


def _after_warm_up(table: Columns, place: str, notes: list[str]) -> dict[str, np.ndarray]:
    """The draws in a file of CmdStan, with lp__ as lp, without other columns of the sampler."""
    settings = {}
    for _row, text in table.comments:
        if match := re.match(r"#\s*(\w+)\s*=\s*(\S+)", text):
            settings.setdefault(match[1], match[2])
    if settings.get("method") == "optimize":
        raise ValueError(f"{place} holds one optimum of CmdStan, no posterior draws.")
    skipped = 0
    if settings.get("save_warmup", "0").lower() in ("1", "true"):
        ends = [row for row, text in table.comments if "Adaptation terminated" in text]
        counted = math.ceil(int(settings.get("num_warmup", 0)) / int(settings.get("thin", 1)))
        skipped = ends[0] if ends and ends[0] else counted
    if settings.get("method") == "variational":
        skipped = 1  # the mean, which CmdStan writes above the draws
    rows = len(table.columns["lp__"])
    if skipped >= rows:
        raise ValueError(f"{place} holds {rows} draws of the warm-up, and none after it.")
    if skipped:
        what = "the mean" if settings.get("method") == "variational" else "warm-up"
        notes.append(f"{place}: its first {skipped} rows, {what}, were left out.")
    if "divergent__" in table.columns:
        _note_divergences(int(np.sum(table.columns["divergent__"][skipped:])), notes)
    columns = {
        n: it[skipped:] for n, it in table.columns.items() if n in _MARKS or not n.endswith("__")
    }
    return columns | {"lp": table.columns["lp__"][skipped:]}


def _widen(columns: dict[str, np.ndarray], place: str) -> dict[str, np.ndarray]:
    """A long table, one row for each parameter and draw, with one column for each parameter."""
    name = next((mark for mark in PARAMETER if mark in columns), None)
    value = next((mark for mark in VALUE if mark in columns), None)
    if name is None or value is None or columns[name].dtype.kind != "O":
        return columns
    marks = {mark: columns[mark] for mark in columns if mark in _MARKS}
    if not marks:
        raise ValueError(f"{place} is a long table, and must have a column .draw or .iteration.")
    names = columns[name]
    widened: dict[str, np.ndarray] = {}
    for each in dict.fromkeys(names.tolist()):
        chosen = names == each
        marks_here = {mark: cells[chosen] for mark, cells in marks.items()}
        order = np.lexsort(tuple(marks_here.values()))
        for mark, cells in marks_here.items():
            if mark in widened and not np.array_equal(widened[mark], cells[order]):
                raise ValueError(f"{place} lacks {each} in some draws, or has it twice.")
            widened[mark] = cells[order]
        widened[each] = columns[value][chosen][order]
    return widened


def _by_chain(columns: Mapping[str, np.ndarray], place: str) -> list[dict[str, np.ndarray]]:
    numbers = {name: it for name, it in columns.items() if it.dtype.kind in "biuf"}
    if not numbers.keys() - _MARKS:
        raise ValueError(f"{place} holds no draws: none of its columns has numbers under a name.")
    chain = next((it for it in CHAIN if it in columns), None)
    step = next((it for it in (*ITERATION, *DRAW) if it in numbers), None)
    every = np.zeros(len(next(iter(columns.values())))) if chain is None else columns[chain]
    chains = []
    for each in sorted(set(every.tolist())):
        columns_here = {name: it[every == each] for name, it in numbers.items()}
        if step is not None:
            order = np.argsort(columns_here[step], kind="stable")
            if len(np.unique(columns_here[step])) < len(order):
                raise ValueError(
                    f"{place} has {step} {_first_repeated(columns_here[step])} more than once"
                    + ("." if chain is None else f" in chain {each}.")
                )
            columns_here = {name: it[order] for name, it in columns_here.items()}
        chains.append(columns_here)
    sizes = [len(next(iter(it.values()))) for it in chains]
    if len(set(sizes)) > 1:
        raise ValueError(f"{place} must have chains of one length; got {sizes}.")
    return chains


def _first_repeated(values: np.ndarray) -> Any:
    distinct, counts = np.unique(values, return_counts=True)
    return distinct[counts > 1][0]


def _vectors(columns: Mapping[str, Sequence[np.ndarray]], cmdstan: bool) -> dict[str, Any]:
    """Columns mu[1], mu[2] (or mu.1, mu.2 of CmdStan) put together as mu, [chains, draws, ...].

    Elements that do not fill their array, such as half a matrix, keep names of their own.
    """
    grouped: dict[str, dict[tuple[int, ...], str]] = {}
    pattern = r"(.+?)(?:\[([\d, ]+)\]|\.((?:\d+\.)+)" + (r"|((?:[.:]\d+)+))" if cmdstan else ")")
    for name in columns:
        match = re.fullmatch(pattern, name)
        at = () if not match else tuple(map(int, re.findall(r"\d+", name[len(match[1]) :])))
        grouped.setdefault(match[1] if match else name, {})[at] = name
    arrays = {}
    for name, places in grouped.items():
        lengths = {len(at) for at in places}
        axes = list(zip(*places, strict=False))
        low = [min(axis) for axis in axes]
        shape = [max(axis) + 1 - start for axis, start in zip(axes, low, strict=True)]
        whole = len(lengths) == 1 and math.prod(shape) == len(places)
        if not whole or any(start not in (0, 1) for start in low):
            arrays |= {it: np.stack(columns[it]) for it in places.values()}
            continue
        ordered = [np.stack(columns[places[at]]) for at in sorted(places)]
        stacked = np.stack(ordered, -1)
        stacked = stacked.reshape(*stacked.shape[:2], *shape)
        axes = [f"axis_{i}" for i in range(len(shape))]
        counted = {
            axis: np.arange(n) + start for axis, n, start in zip(axes, shape, low, strict=True)
        }
        arrays[name] = xr.DataArray(stacked, dims=(*AXES, *axes), coords=counted)
    return arrays


def _group(path: Path, engine: str, name: str) -> xr.Dataset | None:
    try:
        return _open(path, engine, name)
    except (OSError, KeyError, ValueError):  # of HDF5 and of Zarr; a broken file fails at its root
        return None


def _exists(path: Path) -> None:
    if not path.exists():
        raise FileNotFoundError(f"No draws at {path}: there is no such file.")


def _by_arviz(reader: str, source: Any, what: str, notes: list[str]) -> Mapping[str, Any]:
    try:
        import arviz  # pyright: ignore[reportMissingImports]: an extra
    except ImportError as error:
        raise ImportError(f"Reading {what} takes ArviZ: pip install 'rkl[arviz]'.") from error
    if not hasattr(arviz, reader):
        raise ImportError(
            f"Reading {what} takes arviz.{reader}, which ArviZ {arviz.__version__} lacks. "
            "Hand over cmdstanpy.from_csv(...) instead."
        )
    return _of_tree(getattr(arviz, reader)(source), notes)


def _stored_together(array: xr.DataArray) -> int:
    """Number of draws of one chain that a file or dask stores in one piece."""
    if array.chunks is not None:
        return array.chunksizes["draw"][0]
    # by the names of the axes: those of a file that was opened may have been moved, or added to
    return array.encoding.get("preferred_chunks", {}).get("draw", 1)


def _unfinite(name: str, values: Tensor, chains: int | slice, draws: slice) -> str:
    where = (~values.isfinite()).nonzero()
    at = where[0].tolist()
    value = values[tuple(at)].item()
    chain, draw = (chains, at[0]) if isinstance(chains, int) else (at[0], at[1])
    return (
        f"{name} must be finite; got {value} at chain {chain}, draw {draw + (draws.start or 0)}, "
        f"one of {len(where)}."
    )

import builtins
import functools
import re
import types
import warnings

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr

from rkl.bayes import bayes_act, partition_act
from rkl.bayes.draws import Draws, read_draws
from rkl.bayes.families import PoissonRegression


def posterior(chains=3, draws=20, seed=0):
    generator = np.random.default_rng(seed)
    return {
        "mu": generator.normal(size=(chains, draws)),
        "theta": generator.normal(size=(chains, draws, 2, 5)),
    }


def dataset(arrays):
    return xr.Dataset(
        {
            name: (("chain", "draw", *map("{}".format, range(array.ndim - 2))), array)
            for name, array in arrays.items()
        }
    )


def tree(arrays, lp=None):
    groups = {"posterior": dataset(arrays)}
    if lp is not None:
        groups["sample_stats"] = dataset({"lp": lp, "diverging": lp > 0})
    return xr.DataTree.from_dict(groups)


def same(draws, arrays):
    for name, array in arrays.items():
        np.testing.assert_array_equal(draws[name].numpy(), array)
    return True


def test_every_source_holds_the_same_draws(tmp_path):
    arrays = posterior()
    tree(arrays).to_netcdf(tmp_path / "tree.nc", engine="h5netcdf")
    dataset(arrays).to_netcdf(tmp_path / "flat.nc", engine="h5netcdf")
    sources = [
        Draws(arrays),
        arrays,
        {name: array.tolist() for name, array in arrays.items()},
        {name: torch.from_numpy(array) for name, array in arrays.items()},
        dataset(arrays),
        tree(arrays),
        tree(arrays)["posterior"],
        types.SimpleNamespace(posterior=dataset(arrays)),  # what older ArviZ hands over
        tmp_path / "tree.nc",
        str(tmp_path / "flat.nc"),
    ]
    for source in sources:
        draws = read_draws(source)
        assert (draws.chains, draws.draws, draws.names) == (3, 20, ("mu", "theta"))
        assert draws.shape("theta") == (2, 5)
        assert same(draws, arrays)


def test_chain_and_draw_may_stand_anywhere_in_a_dataset():
    arrays = posterior()
    moved = dataset(arrays).transpose("1", "draw", "0", "chain", ...)
    draws = read_draws(moved)
    assert draws.shape("theta") == (5, 2)
    torch.testing.assert_close(draws["theta"], torch.from_numpy(arrays["theta"]).mT)
    _, part, chunk = list(draws.chunks(["theta"], size=70))[2]
    assert part == slice(14, 20)
    torch.testing.assert_close(chunk["theta"], torch.from_numpy(arrays["theta"])[0, 14:].mT)


@pytest.mark.parametrize("size", [1, 25, 100, 10_000])
def test_chunks_hold_every_draw_once_and_in_order(size):
    arrays = posterior()
    seen = {name: torch.zeros(array.shape) for name, array in arrays.items()}
    last = (-1, 0)
    for chain, part, chunk in Draws(arrays).chunks(["mu", "theta"], size):
        assert (chain, part.start) > last
        last = (chain, part.start)
        assert chunk["theta"].numel() <= max(size, 10)
        for name in arrays:
            seen[name][chain, part] += chunk[name]
    for name, array in arrays.items():
        torch.testing.assert_close(seen[name], torch.from_numpy(array).float())


def test_what_is_lazy_is_read_no_further_than_asked(tmp_path, monkeypatch):
    path = tmp_path / "posterior.nc"
    arrays = posterior(draws=1_000)
    tree(arrays, lp=arrays["mu"]).to_netcdf(path, engine="h5netcdf")
    read = []
    original = xr.backends.h5netcdf_.H5NetCDFArrayWrapper._getitem
    monkeypatch.setattr(
        xr.backends.h5netcdf_.H5NetCDFArrayWrapper,
        "_getitem",
        lambda self, key: (read.append((self.variable_name, key)), original(self, key))[1],
    )
    draws = read_draws(path)
    next(iter(draws.chunks(["theta"], size=100)))
    assert {name for name, _ in read} <= {"theta", "chain", "draw", "diverging"}
    assert [key[:2] for name, key in read if name == "theta"] == [(0, slice(0, 10, 1))]
    assert draws.every(100)["theta"].shape == (3, 10, 2, 5)


def test_a_chunk_takes_whole_pieces_of_what_the_file_compresses_together(tmp_path):
    path = tmp_path / "posterior.nc"
    pieces = {"mu": {"chunksizes": (1, 150), "zlib": True}}
    dataset(posterior(draws=400)).to_netcdf(path, engine="h5netcdf", encoding=pieces)
    parts = [part for chain, part, _ in read_draws(path).chunks(["mu"], size=10) if chain == 0]
    assert parts == [slice(0, 150), slice(150, 300), slice(300, 400)]


def test_log_posterior_densities_are_found_among_the_sample_statistics(tmp_path):
    arrays = posterior()
    held = tree(arrays, lp=arrays["mu"])
    held.to_netcdf(tmp_path / "posterior.nc", engine="h5netcdf")
    for source in (held, tmp_path / "posterior.nc"):
        draws = read_draws(source)
        assert draws.names == ("mu", "theta", "lp")
        np.testing.assert_array_equal(draws["lp"].numpy(), arrays["mu"])
    own = tree(arrays | {"lp": 2 * arrays["mu"]}, lp=arrays["mu"])
    np.testing.assert_array_equal(read_draws(own)["lp"].numpy(), 2 * arrays["mu"])


def test_weights_are_normalised_and_follow_the_draws():
    arrays = posterior()
    weights = np.random.default_rng(1).random((3, 20))
    draws = read_draws(arrays, weights=weights)
    assert draws.weights.sum().item() == pytest.approx(1, rel=1e-14)
    torch.testing.assert_close(draws.weights * weights.sum(), torch.from_numpy(weights))
    thin = draws.every(3)
    assert (thin.draws, thin.weights.shape) == (7, (3, 7))
    assert same(thin, {name: array[:, ::3] for name, array in arrays.items()})
    again = read_draws(draws, weights=np.ones((3, 20)))
    torch.testing.assert_close(again.weights, torch.full((3, 20), 1 / 60, dtype=torch.float64))


def test_integers_single_precision_and_foreign_byte_order_leave_as_doubles():
    count = np.arange(6).reshape(2, 3)
    kinds = (np.int64, np.uint8, bool, np.float32, ">f8")
    draws = Draws({str(kind): count.astype(kind) for kind in kinds})
    for name, kind in zip(draws.names, kinds, strict=True):
        assert draws[name].dtype is torch.float64
        assert draws[name].tolist() == count.astype(kind).tolist()
    frozen = count.astype(float)
    frozen.flags.writeable = False
    assert Draws({"x": frozen})["x"].tolist() == count.tolist()


REFUSED = {
    "no variable": ({}, ValueError, "at least one variable"),
    "one axis": (
        {"x": torch.zeros(5)},
        ValueError,
        r"x must be .* \[5\]. .* single chain are x\[",
    ),
    "a number": ({"x": 1.0}, ValueError, r"x must be \[chains, draws, ...\]; got \[\]"),
    "no draws": ({"x": torch.zeros(2, 0)}, ValueError, "not be empty; got 2 x 0"),
    "unequal chains": ({"x": [[1.0, 2.0], [3.0]]}, ValueError, "x must have chains of one length"),
    "unequal variables": (
        {"x": torch.zeros(4, 9), "y": torch.zeros(4, 8)},
        ValueError,
        "y has 4 chains of 8 draws but x has 4 of 9",
    ),
    "text": ({"x": np.full((2, 3), "a")}, TypeError, "x must hold real numbers; got <U1"),
    "complex": ({"x": np.full((2, 3), 1j)}, TypeError, "x must hold real numbers; got complex"),
    "stacked": (
        dataset(posterior()).stack(sample=("chain", "draw")),
        ValueError,
        r"no posterior: .*\(unstack sample first",
    ),
    "a Dataset of something else": (
        xr.Dataset({"t": ("lat", [1.0])}),
        ValueError,
        "no posterior: .* got the dimensions lat",
    ),
    "an array without chains": (
        {"x": xr.DataArray([1.0], dims="draw")},
        ValueError,
        "x must have the dimensions chain and draw; got draw",
    ),
    "a tree without posterior": (
        xr.DataTree.from_dict({"prior": dataset(posterior())}),
        ValueError,
        "the DataTree holds no posterior",
    ),
    "a posterior of another kind": (
        types.SimpleNamespace(posterior="mu"),
        TypeError,
        "must have an xarray Dataset as its posterior; got 'mu'",
    ),
    "something else": (3, TypeError, "draws must be a DataTree .* got int"),
    "a list": ([1.0, 2.0], TypeError, "list of draws must hold paths of CmdStan's csv"),
    "a pattern of nothing": ("chain_*.csv", FileNotFoundError, "no file matches chain_"),
    "a missing file": ("nowhere.nc", FileNotFoundError, "No draws at nowhere.nc"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_holds_no_draws_is_refused_in_one_sentence(case):
    source, kind, message = REFUSED[case]
    with pytest.raises(kind, match=message) as refused:
        read_draws(source)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_draws_that_are_not_finite_are_refused_where_they_stand(value):
    arrays = posterior()
    arrays["theta"][1, 7, 0, 3] = value
    draws = Draws(arrays)
    assert draws["mu"].shape == (3, 20)
    with pytest.raises(ValueError, match=r"theta must be finite; .* chain 1, draw 7, one of 1"):
        draws["theta"]
    with pytest.raises(ValueError, match=r"theta must be finite; .* chain 1, draw 7, one of 1"):
        list(draws.chunks(["theta"], size=20))


def test_finite_draws_whose_sum_overflows_are_accepted():
    assert Draws({"x": torch.full((1, 4), 1e308, dtype=torch.float64)})["x"].max() == 1e308


def test_unknown_names_are_answered_with_those_that_exist():
    draws = Draws(posterior())
    for ask in (draws.shape, draws.__getitem__, lambda name: list(draws.chunks([name]))):
        with pytest.raises(ValueError, match="no variable 'sigma'; there are mu, theta"):
            ask("sigma")
    with pytest.raises(ValueError, match="names must name at least one variable"):
        list(draws.chunks([]))
    with pytest.raises(ValueError, match="size must be at least 1; got 0"):
        list(draws.chunks(["mu"], 0))
    with pytest.raises(ValueError, match="step must be at least 1; got 0"):
        draws.every(0)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (np.ones((3, 19)), r"weights must be \[chains, draws\], \[3, 20\]; got \[3, 19\]"),
        (np.ones(60), r"weights must be .* got \[60\]"),
        (-np.ones((3, 20)), "at least 0, and not all 0; got values from -1"),
        (np.zeros((3, 20)), "not all 0"),
        (np.full((3, 20), np.nan), "finite"),
    ],
)
def test_weights_that_weigh_nothing_are_refused(weights, message):
    with pytest.raises(ValueError, match=message):
        read_draws(posterior(), weights=weights)


def test_corrupt_and_foreign_files_are_refused_by_name(tmp_path):
    (tmp_path / "text.nc").write_text("mu,sigma\n1,2\n")
    with pytest.raises(ValueError, match=r"text.nc cannot be read as NetCDF 4 \(HDF5\)"):
        read_draws(tmp_path / "text.nc")
    whole = tmp_path / "whole.nc"
    dataset(posterior(draws=1_000)).to_netcdf(whole, engine="h5netcdf")
    (tmp_path / "cut.nc").write_bytes(whole.read_bytes()[:3_000])
    with pytest.raises(ValueError, match="cut.nc cannot be read as NetCDF 4"):
        read_draws(tmp_path / "cut.nc")
    xr.Dataset({"t": (("lat", "lon"), np.ones((2, 2)))}).to_netcdf(
        tmp_path / "climate.nc", engine="h5netcdf"
    )
    with pytest.raises(ValueError, match="climate.nc holds no posterior: .* dimensions lat, lon"):
        read_draws(tmp_path / "climate.nc")


def test_what_takes_arviz_says_so_where_it_is_missing(monkeypatch):
    real = builtins.__import__

    def without_arviz(name, *rest):
        if name == "arviz":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_arviz)
    sampler = type("EnsembleSampler", (), {"__module__": "emcee.ensemble"})()
    what = "a EnsembleSampler of emcee"
    with pytest.raises(ImportError, match=rf"{what} takes ArviZ: pip install 'rkl\[arviz\]'"):
        read_draws(sampler)


# What users hand over, made by the libraries themselves.

CSV = """# stan_version_major = 2
# num_samples = {draws}
# num_warmup = 0
# save_warmup = 0
# thin = 1
# id = {chain}
lp__,accept_stat__,mu,theta.1,theta.2
"""


def arviz():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it announces its next version
        return pytest.importorskip("arviz")


@pytest.mark.tools
def test_inference_data_of_arviz_is_read_from_memory_and_from_its_file(tmp_path):
    arrays = posterior()
    data = arviz().from_dict(posterior=arrays, sample_stats={"lp": arrays["mu"]})
    data.to_netcdf(tmp_path / "posterior.nc")
    for source in (data, tmp_path / "posterior.nc"):
        draws = read_draws(source)
        assert draws.names == ("mu", "theta", "lp")
        assert same(draws, arrays)


@pytest.mark.tools
def test_a_posterior_that_netcdf4_wrote_is_read(tmp_path):
    pytest.importorskip("netCDF4")
    tree(posterior()).to_netcdf(tmp_path / "posterior.nc", engine="netcdf4")
    assert same(read_draws(tmp_path / "posterior.nc"), posterior())


@pytest.mark.tools
def test_zarr_is_read_piece_by_piece(tmp_path):
    pytest.importorskip("zarr")
    arrays = posterior(draws=200)
    pieces = {"/posterior": {"mu": {"chunks": (1, 60)}, "theta": {"chunks": (1, 60, 2, 5)}}}
    tree(arrays).to_zarr(tmp_path / "tree.zarr", encoding=pieces, consolidated=False)
    draws = read_draws(tmp_path / "tree.zarr")
    assert same(draws, arrays)
    parts = [part for chain, part, _ in draws.chunks(["mu"], size=1) if chain == 2]
    assert parts[0] == slice(0, 60)
    (tmp_path / "empty.zarr").mkdir()
    with pytest.raises(ValueError, match="cannot be read as Zarr"):
        read_draws(tmp_path / "empty.zarr")


@pytest.mark.tools
def test_arrays_of_dask_are_computed_chunk_by_chunk():
    dask = pytest.importorskip("dask.array")
    arrays = posterior(draws=200)
    lazy = {
        name: dask.from_array(array, chunks=(1, 50, *array.shape[2:]))
        for name, array in arrays.items()
    }
    for source in (lazy, dataset(arrays).chunk(chain=1, draw=50)):
        draws = read_draws(source)
        assert same(draws, arrays)
        assert next(iter(draws.chunks(["theta"], size=1)))[1] == slice(0, 50)


@pytest.mark.tools
def test_walkers_of_emcee_become_chains():
    emcee = pytest.importorskip("emcee")
    arviz()
    sampler = emcee.EnsembleSampler(6, 2, lambda x: -(x**2).sum() / 2)
    sampler.run_mcmc(np.random.default_rng(0).normal(size=(6, 2)), 30)
    draws = read_draws(sampler)
    assert (draws.chains, draws.draws) == (6, 30)
    np.testing.assert_array_equal(draws[draws.names[1]].numpy(), sampler.get_chain()[..., 1].T)
    np.testing.assert_array_equal(draws["lp"].numpy(), sampler.get_log_prob().T)


def test_csv_of_cmdstan_is_read(tmp_path):
    arrays, paths = posterior(chains=2), []
    for chain in range(2):
        paths.append(tmp_path / f"chain-{chain}.csv")
        rows = np.column_stack(
            [
                arrays["mu"][chain] * 2,
                arrays["mu"][chain],
                arrays["mu"][chain],
                arrays["theta"][chain, :, 0, :2],
            ]
        )
        lines = [",".join(map(repr, row)) for row in rows.tolist()]
        paths[-1].write_text(CSV.format(draws=20, chain=chain) + "\n".join(lines) + "\n")
    draws = read_draws(paths)
    assert same(
        draws, {"mu": arrays["mu"], "theta": arrays["theta"][..., 0, :2], "lp": arrays["mu"] * 2}
    )
    assert read_draws(paths[0]).chains == 1


@pytest.mark.tools
def test_grouped_samples_of_numpyro_are_a_dict_of_arrays():
    jnp = pytest.importorskip("jax.numpy")
    arrays = {name: array.astype(np.float32) for name, array in posterior().items()}
    assert same(read_draws({name: jnp.asarray(array) for name, array in arrays.items()}), arrays)


def cmdstan_file(path, warm_up, draws, seed, saved=True):
    """A chain as CmdStan writes it, its warm-up a thousand off; the draws of mu, and of m."""
    generator = np.random.default_rng(seed)
    mu, m = generator.normal(size=draws), generator.normal(size=(draws, 2, 3))
    lines = [
        "# stan_version_major = 2",
        "# method = sample (Default)",
        f"#     num_samples = {draws}",
        f"#     num_warmup = {warm_up} (Default)",
        f"#     save_warmup = {int(saved)}",
        "#     thin = 1 (Default)",
        "lp__,accept_stat__,mu," + ",".join(f"m.{i}.{j}" for j in (1, 2, 3) for i in (1, 2)),
    ]
    rows = [[0, 0.9, 1000, *[1000] * 6]] * (warm_up if saved else 0)
    lines += [",".join(map(repr, row)) for row in rows]
    lines += ["# Adaptation terminated", "# Step size = 0.9", "# 1, 1, 1"]
    for value, matrix in zip(mu.tolist(), m, strict=True):
        lines.append(",".join(map(repr, [-value, 0.9, value, *matrix.T.ravel().tolist()])))
    path.write_text("\n".join([*lines, "# ", "#  Elapsed Time: 0.1 seconds (Warm-up)", ""]))
    return mu, m


@pytest.mark.parametrize("saved", [True, False], ids=["warm-up saved", "no warm-up"])
def test_chains_of_cmdstan_are_read_by_pattern_and_by_list_without_their_warm_up(tmp_path, saved):
    chains = [
        cmdstan_file(tmp_path / f"c_{k}.csv", 15, 20, k, saved) for k in range(1, 12)
    ]  # c_2 comes before c_10
    names = [str(tmp_path / f"c_{k}.csv") for k in range(1, 12)]
    for source in (str(tmp_path / "c_*.csv"), names):
        draws = read_draws(source)
        assert draws.names == ("mu", "m", "lp")
        mu, m = (np.stack(part) for part in zip(*chains, strict=True))
        np.testing.assert_array_equal(draws["mu"], mu)
        np.testing.assert_array_equal(draws["m"], m)
        np.testing.assert_array_equal(draws["lp"], -mu)
        assert any("warm-up" in note for note in draws.notes) == saved


def test_chains_with_the_same_draws_are_told(tmp_path):
    files = [tmp_path / f"{name}.csv" for name in "abc"]
    for file, second in zip(files, (2, 2, 3), strict=True):
        file.write_text(f"# method = sample\nlp__,mu\n-1,{second}\n-2,5\n")
    for named, twice in ((files, "a.csv and .*b.csv"), ([files[2]] * 2, "c.csv and .*c.csv")):
        (note,) = read_draws(named).notes
        assert re.search(f"{twice} hold the same draws", note)
    assert not read_draws(files[1:]).notes


def test_a_table_of_r_is_read_by_chain_and_iteration_in_any_order(tmp_path):
    generator = np.random.default_rng(0)
    arrays = {"mu": generator.normal(size=(3, 20)), "theta": generator.normal(size=(3, 20, 2, 2))}
    columns = {"mu": arrays["mu"].ravel()}
    for i, j in np.ndindex(2, 2):
        columns[f"theta[{i + 1},{j + 1}]"] = arrays["theta"][:, :, i, j].ravel()
    marks = {
        ".chain": np.repeat([1, 2, 3], 20),
        ".iteration": np.tile(np.arange(1, 21), 3),
        ".draw": np.arange(1, 61),
    }
    frame = pd.DataFrame(columns | marks).sample(frac=1, random_state=0)
    frame.to_csv(tmp_path / "wide.csv")  # with row names, as write.csv of R
    frame.to_csv(tmp_path / "excel.csv", sep=";", decimal=",", index=False)
    long = frame.melt(id_vars=list(marks), var_name=".variable", value_name=".value")
    long.to_csv(tmp_path / "long.csv", index=False)
    for source in (tmp_path / "wide.csv", tmp_path / "excel.csv", tmp_path / "long.csv", frame):
        draws = read_draws(source)
        assert (draws.chains, draws.draws) == (3, 20)
        assert set(draws.names) == {"mu", "theta"}
        assert same(draws, arrays)


def test_tables_of_draws_that_are_not_whole_are_refused(tmp_path):
    def refused(text, said):
        (tmp_path / "t.csv").write_text(text)
        with pytest.raises(ValueError, match=said):
            read_draws(tmp_path / "t.csv")

    refused("mu,.chain,.iteration\n1,1,1\n2,1,2\n3,2,1\n", r"chains of one length; got \[2, 1\]")
    refused("mu,.chain,.iteration\n1,1,1\n2,1,1\n", "iteration 1 more than once in chain 1")
    refused("# method = optimize\nlp__,mu\n1,2\n", "one optimum")
    refused(
        "# num_warmup = 9\n# save_warmup = 1\nlp__,mu\n1,2\n1,2\n",
        "2 draws of the warm-up, and none",
    )
    (tmp_path / "u.csv").write_text("lp__,mu\n1,2\n1,3\n")
    (tmp_path / "t.csv").write_text("lp__,nu\n1,2\n1,3\n")
    with pytest.raises(ValueError, match=r"u\.csv and .*t\.csv differ in the variable mu"):
        read_draws([tmp_path / "t.csv", tmp_path / "u.csv"])


def test_arrays_of_numpy_are_read_and_links_to_other_files_are_not(tmp_path):
    np.savez(tmp_path / "draws.npz", **posterior())
    assert same(read_draws(tmp_path / "draws.npz"), posterior())
    dataset(posterior()).to_netcdf(tmp_path / "secret.nc", engine="h5netcdf")
    with h5py.File(tmp_path / "linked.nc", "w") as file:
        file["mu"] = h5py.ExternalLink(str(tmp_path / "secret.nc"), "mu")
    with pytest.raises(ValueError, match=r"linked\.nc .*/mu is a link to another file"):
        read_draws(tmp_path / "linked.nc")


@pytest.mark.parametrize("reference", ["link", "a link deep inside", "storage", "virtual"])
def test_a_file_whose_draws_lie_in_another_file_is_refused(reference, tmp_path):
    rows = np.random.default_rng(0).standard_normal((2, 50))
    with h5py.File(tmp_path / "secret.h5", "w") as secret:
        secret["mu"] = rows
    rows.tofile(tmp_path / "secret.bin")
    path = tmp_path / "gift.nc"
    with h5py.File(path, "w") as file:
        group = file.create_group("posterior")
        if reference == "link":
            group["mu"] = h5py.ExternalLink("secret.h5", "mu")
        elif reference == "a link deep inside":
            group.create_group("a")["b"] = h5py.ExternalLink("secret.h5", "/")
        elif reference == "storage":
            place = [(str(tmp_path / "secret.bin"), 0, rows.nbytes)]
            group.create_dataset("mu", (2, 50), float, external=place)
        else:
            layout = h5py.VirtualLayout((2, 50), float)
            layout[:] = h5py.VirtualSource("secret.h5", "mu", (2, 50))
            group.create_virtual_dataset("mu", layout)
    with pytest.raises(ValueError, match="another file"):
        read_draws(path)


def test_divergent_transitions_are_told_of(tmp_path):
    """In the layout of ArviZ 1.x: a DataTree whose groups keep chain and draw as coordinates."""
    axes, places = ("chain", "draw"), {"chain": np.arange(2), "draw": np.arange(30)}
    mu = np.random.default_rng(0).normal(size=(2, 30))
    astray = np.zeros((2, 30), bool)
    astray[0, :3] = True
    posterior = xr.Dataset({"mu": (axes, mu)}, places, {"sample_dims": ["chain", "draw"]})
    stats = xr.Dataset({"diverging": (axes, astray), "lp": (axes, mu)}, places)
    tree = xr.DataTree.from_dict({"posterior": posterior, "sample_stats": stats})
    tree.to_netcdf(tmp_path / "tree.nc", engine="h5netcdf")
    for source in (tree, tmp_path / "tree.nc"):
        draws = read_draws(source)
        assert draws.names == ("mu", "lp")
        np.testing.assert_array_equal(draws["mu"].numpy(), mu)
        assert [note[:38] for note in draws.notes] == ["3 draws ended divergent transitions: t"]


def rows_of(arrays):
    """A row for each draw, theta by its elements as Stan names them, and its chain and number."""
    chains, draws = arrays["mu"].shape
    rows = {"lp__": -(arrays["mu"].ravel() ** 2), "mu": arrays["mu"].ravel()}
    for i in range(2):
        for j in range(5):
            rows[f"theta[{i + 1},{j + 1}]"] = arrays["theta"][..., i, j].ravel()
    marks = np.repeat(np.arange(chains) + 1, draws), np.tile(np.arange(draws) + 1, chains)
    return rows, marks


@pytest.mark.parametrize("log_density", [True, False])
@pytest.mark.parametrize(
    "names",
    [("chain__", "iter__", "draw__"), (".chain", ".iteration", ".draw")],
    ids=["draws_pd of cmdstanpy", "as_draws_df of R"],
)
def test_rows_of_stan_keep_their_chains_and_elements(names, log_density, tmp_path):
    arrays = posterior()
    rows, (chain, iteration) = rows_of(arrays)
    marks = (chain, iteration, np.arange(len(chain)) + 1)
    frame = pd.DataFrame(dict(zip(names, marks, strict=True)) | rows)
    frame = frame if log_density else frame.drop(columns="lp__")
    frame = frame.sample(frac=1, random_state=0)
    frame.to_csv(tmp_path / "rows.csv", index=False)
    for source in (frame, tmp_path / "rows.csv"):
        draws = read_draws(source)
        assert draws.names == ("mu", "theta", *["lp"] * log_density)
        assert not any("chain" in note for note in draws.notes)
        assert same(draws, arrays)


def test_rows_without_a_chain_are_noted_with_their_log_density_too():
    rows, _ = rows_of(posterior())
    assert "taken as one chain" in read_draws(pd.DataFrame(rows)).notes[0]


@pytest.mark.parametrize("groups", [(), ("posterior",)], ids=["one group", "several"])
def test_columns_of_names_with_labels_are_put_together(groups):
    """As ArviZ writes them by to_dataframe(), in one group and in several."""
    arrays = posterior()
    frame = pd.DataFrame({"chain": np.repeat(range(3), 20), "draw": np.tile(range(20), 3)})
    frame[("posterior", "mu") if groups else "mu"] = arrays["mu"].ravel()
    for i, j in np.ndindex(2, 5):
        name = (*groups, f"theta[{i},{j}]", "ab"[i], j)
        frame[name] = arrays["theta"][..., i, j].ravel()
    draws = read_draws(frame)
    assert draws.names == ("mu", "theta")
    for name, x in arrays.items():
        np.testing.assert_array_equal(draws[name], x)


def test_an_index_of_chains_and_draws_is_read_and_other_levels_are_refused():
    arrays = posterior()
    whole = dataset(arrays | {"theta": arrays["theta"][..., 0, 0]})
    frame = whole.to_dataframe().sample(frac=1, random_state=0)
    draws = read_draws(frame)
    assert (draws.chains, draws.draws, draws.notes) == (3, 20, ())
    assert same(draws, {"mu": arrays["mu"]})
    assert same(read_draws(frame.reset_index()), {"mu": arrays["mu"]})
    by_school = dataset({"theta": arrays["theta"][..., 0]}).rename({"0": "school"}).to_dataframe()
    with pytest.raises(ValueError, match="got chain, draw, school"):
        read_draws(by_school)
    with pytest.raises(ValueError, match="more than once"):
        read_draws(by_school.reset_index())
    one = pd.DataFrame({"mu": arrays["mu"][0]}, index=pd.Index(range(20), name="row"))
    assert same(read_draws(one), {"mu": arrays["mu"][:1]})


def test_masked_numbers_are_refused_by_their_place():
    """As netCDF4 hands over what is missing, with the fill value 9.97e36 below the mask."""
    arrays = posterior()
    filled = np.where(arrays["mu"] > 1, 9.97e36, arrays["mu"])
    masked = np.ma.masked_values(filled, 9.97e36)
    chain, draw = np.argwhere(masked.mask)[0]
    place = rf"mu must be finite: .* masked, the first of them at \[{chain}, {draw}\]"
    for source in (masked, list(masked)):
        with pytest.raises(ValueError, match=place):
            read_draws({"mu": source})
    assert same(read_draws({"mu": np.ma.masked_array(arrays["mu"])}), {"mu": arrays["mu"]})
    weights = np.ma.masked_array(np.ones((3, 20)), mask=masked.mask)
    with pytest.raises(ValueError, match="weights must be finite: .* masked"):
        read_draws(arrays, weights)


def test_masked_numbers_beside_the_draws_are_refused():
    beta = posterior()["theta"][..., 0, :2]
    design = np.ma.masked_array(np.arange(12.0).reshape(6, 2) ** 2, mask=np.eye(6, 2))
    family = "logistic-regression(coefficients=beta)"
    columns = {"a": design[:, 0], "b": design.data[:, 1]}

    def by_hand(theta, x):
        return torch.distributions.Bernoulli(logits=theta.beta @ x.T)

    for kind, given in ((family, design), (family, columns), (by_hand, design)):
        with pytest.raises(ValueError, match="design must hold finite numbers: .* masked"):
            bayes_act({"beta": beta}, kind, design=given)
    offset = functools.partial(PoissonRegression, offset=design[:, 0])
    with pytest.raises(ValueError, match="offset must be finite: 1 of 6 numbers are masked"):
        bayes_act({"coefficients": beta}, offset, design=design.data)
    region = bayes_act({"mu": beta}, "normal(loc=mu, scale=1)").region(0.5)
    with pytest.raises(ValueError, match="mu must be finite: 1 of 2 numbers are masked"):
        region.contains({"mu": design[0]})
    labels = np.ma.masked_array(np.ones((5, 3), int), mask=np.eye(5, 3))
    with pytest.raises(ValueError, match="labels must hold integers: 3 of 15 .* masked"):
        partition_act(labels)
    with pytest.raises(ValueError, match="weights must be finite: .* masked"):
        partition_act(labels.data, weights=np.ma.masked_array(np.ones(5), mask=labels.mask[:, 0]))


def test_a_single_chain_whose_axis_was_added_is_read_from_its_file(tmp_path):
    arrays = posterior(chains=1, draws=400)
    one = dataset(arrays).isel(chain=0)
    pieces = {"mu": {"chunksizes": (150,)}, "theta": {"chunksizes": (50, 2, 5)}}
    one.to_netcdf(tmp_path / "one.nc", engine="h5netcdf", encoding=pieces)
    opened = xr.open_dataset(tmp_path / "one.nc", engine="h5netcdf", cache=False)
    draws = read_draws(opened.expand_dims("chain"))
    assert same(draws, arrays)
    parts = [part for _, part in draws.parts(["mu"], size=10)]
    assert parts == [slice(0, 150), slice(150, 300), slice(300, 400)]


def test_pieces_of_a_file_are_those_of_its_draws_wherever_they_stand(tmp_path):
    pieces = {"theta": {"chunksizes": (1, 150, 2, 5), "zlib": True}}
    dataset(posterior(draws=400)).to_netcdf(
        tmp_path / "posterior.nc", engine="h5netcdf", encoding=pieces
    )
    opened = xr.open_dataset(tmp_path / "posterior.nc", engine="h5netcdf", cache=False)
    moved = read_draws(opened.transpose("0", "draw", "1", "chain"))
    parts = [part for chain, part in moved.parts(["theta"], size=10) if chain == 0]
    assert parts == [slice(0, 150), slice(150, 300), slice(300, 400)]

"""Axes and labels by name: coefficients and columns, batches of variables, posteriors of a run."""

import functools
import importlib.util

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from torch.distributions import ExpTransform

from rkl.bayes import bayes_act, check_invariance, project, read_draws
from rkl.bayes.evaluate import evaluate_run
from rkl.bayes.families import GaussianRegression
from rkl.bayes.run import estimate
from rkl.bayes.settings import EstimateSettings, EvaluateSettings
from rkl.divergences import KL

RANDOM = np.random.default_rng(0)
CHAINS, DRAWS = 2, 60
NAMES = ["Intercept", "x1", "x2"]
NORMAL = "normal(loc=mu, scale=sigma)"
GAUSSIAN = "gaussian-regression(coefficients=beta, scale=1)"


def variable(values, *dims, **coords):
    noise = 0.1 * RANDOM.normal(size=(CHAINS, DRAWS, *np.shape(values)))
    return xr.DataArray(values * np.exp(noise), dims=("chain", "draw", *dims), coords=coords)


@pytest.fixture(scope="module")
def beta():
    return variable(np.array([0.5, 2.0, -1.0]), "coef", coef=NAMES)


@pytest.fixture(scope="module")
def design():
    x = {"x1": RANDOM.normal(size=12), "x2": 3 * RANDOM.normal(size=12)}
    return pd.DataFrame(x | {"Intercept": np.ones(12)})


@pytest.fixture(scope="module")
def apart():
    """A location by group and time, and a scale by time alone; as many groups as times."""
    mu = variable(np.arange(4.0).reshape(2, 2) + 1, "group", "time")
    return {"mu": mu, "sigma": variable(np.array([1.0, 50.0]), "time")}


def normal_act(mu, sigma):
    """The act under ReverseKL, by the posterior mean of the natural parameter."""
    precision = (sigma**-2).mean(("chain", "draw"))
    return (mu * sigma**-2).mean(("chain", "draw")) / precision, precision**-0.5


def test_columns_of_the_design_go_to_the_coefficients_of_their_names(beta, design):
    found = bayes_act({"beta": beta}, GAUSSIAN, design=design)
    b = beta.values.reshape(-1, 3)
    misfit = (b - b.mean(0)) @ design[NAMES].to_numpy().T
    # sums of 12 squares, of up to 120 draws: rounding of some 1e-14
    assert found.risk.value.item() == pytest.approx(0.5 * (misfit**2).sum(-1).mean(), rel=1e-10)
    named = xr.DataArray(design.to_numpy(), dims=("row", "coef"), coords={"coef": [*design]})
    for other in (design[NAMES], dict(design.items()), named):
        again = bayes_act({"beta": beta}, GAUSSIAN, design=other)
        torch.testing.assert_close(again.risk.value, found.risk.value, rtol=1e-12, atol=0)
        torch.testing.assert_close(again.act["beta"], found.act["beta"], rtol=1e-12, atol=0)


def test_columns_go_to_the_variables_of_a_list_by_their_names(beta, design):
    numbers = {name: beta.sel(coef=name, drop=True) for name in NAMES}
    apart = bayes_act(
        numbers,
        "gaussian-regression(coefficients=[Intercept, x1, x2], scale=1)",
        design=design,
    )
    beside = bayes_act(
        {"first": numbers["Intercept"], "beta": beta.sel(coef=["x2", "x1"])},
        "gaussian-regression(coefficients=[first, beta], scale=1)",
        design=design,
    )
    whole = bayes_act({"beta": beta}, GAUSSIAN, design=design[NAMES])
    for found in (apart, beside):
        torch.testing.assert_close(found.risk.value, whole.risk.value, rtol=1e-12, atol=0)


def test_coefficients_and_columns_of_other_names_are_refused(beta, design):
    renamed = design.rename(columns={"x2": "x3"})
    with pytest.raises(ValueError, match="x2 is none of the columns x1, x3, Intercept"):
        bayes_act({"beta": beta}, GAUSSIAN, design=renamed)


def test_numbered_coefficients_and_columns_go_together_by_place(beta, design):
    ordered = design[NAMES]
    expected = bayes_act({"beta": beta}, GAUSSIAN, design=ordered).risk.value
    counted = beta.assign_coords(coef=[1, 2, 3])  # as a table of Stan counts
    for drawn, matrix in [
        (counted, ordered),
        (beta.drop_vars("coef"), ordered),
        (beta, ordered.to_numpy()),
        (beta, ordered.set_axis(range(3), axis=1)),
    ]:
        found = bayes_act({"beta": drawn}, GAUSSIAN, design=matrix)
        torch.testing.assert_close(found.risk.value, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kept", [["Intercept", "x1"], [2, 0]])
def test_columns_that_a_projection_keeps_are_those_of_their_names(beta, design, kept):
    """By number as the design has them: 2 is the Intercept and 0 is x1."""
    drawn = {"beta": beta}
    found = project(drawn, GAUSSIAN, {"fewer": kept}, KL(), design=design)
    named = project(drawn, GAUSSIAN, {"fewer": NAMES[:2]}, KL(), design=design[NAMES])
    act = found.submodels["fewer"].act["beta"]
    expected = named.submodels["fewer"].act["beta"]
    torch.testing.assert_close(act, expected, rtol=1e-9, atol=1e-9)
    assert act[2] == 0
    assert (act[:2] != 0).all()


def test_axes_of_a_batch_go_together_by_their_names(apart, tmp_path):
    loc, scale = normal_act(*xr.broadcast(apart["mu"], apart["sigma"]))
    xr.Dataset(apart).to_netcdf(tmp_path / "draws.nc", engine="h5netcdf")
    sources = [apart, xr.Dataset(apart), tmp_path / "draws.nc"]
    if importlib.util.find_spec("dask"):
        sources.append(xr.Dataset(apart).chunk({"draw": 20}))
    for source in sources:
        found = bayes_act(source, NORMAL)
        # means of 120 draws
        torch.testing.assert_close(
            found.act["mu"], torch.from_numpy(loc.values), rtol=1e-12, atol=0
        )
        expected = torch.from_numpy(scale.values)
        torch.testing.assert_close(found.act["sigma"], expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", ["normal", "cauchy"])
def test_a_variable_without_some_axes_is_shared_along_them(apart, kind):
    """In closed form, and minimised."""
    whole = dict(zip(apart, xr.broadcast(*apart.values()), strict=True))
    found = [bayes_act(x, f"{kind}(loc=mu, scale=sigma)", KL()) for x in (apart, whole)]
    for name in ("mu", "sigma"):  # to what the minimiser leaves open
        torch.testing.assert_close(found[0].act[name], found[1].act[name], rtol=1e-4, atol=0)
    torch.testing.assert_close(found[0].risk.value, found[1].risk.value, rtol=1e-6, atol=1e-9)
    assert found[0].labels("sigma") == found[1].labels("sigma")


def test_regions_and_projections_share_by_name_too(apart):
    found = bayes_act(apart, NORMAL)
    region = found.region(0.8)
    for draw in range(0, DRAWS, 7):
        theta = {name: x.values[0, draw] for name, x in apart.items()}
        assert torch.equal(region.contains(theta), region.inside[0, draw])
    tau = apart | {"tau": 1.1 * apart["sigma"]}
    smaller = "normal(loc=0, scale=tau)"
    found = project(tau, NORMAL, {"centred": smaller}, KL())
    whole = dict(zip(tau, xr.broadcast(*tau.values()), strict=True))
    expected = project(whole, NORMAL, {"centred": smaller}, KL())
    acts = [one.submodels["centred"].act["tau"] for one in (found, expected)]
    torch.testing.assert_close(*acts, rtol=1e-6, atol=0)


def test_a_bijection_of_the_data_moves_nothing_that_is_shared_by_name(apart):
    moved = [
        change for _, change in check_invariance(bayes_act(apart, NORMAL), ExpTransform()).rows
    ]
    assert max(moved) < 1e-6


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        (("time", "group"), r"got \(time, group\) and \(group, time\)"),
        (("school",), r"rename\({'school': 'group'}\)"),
    ],
)
def test_axes_that_names_tell_apart_are_refused(apart, axes, words):
    sigma = variable(np.ones([2] * len(axes)), *axes)
    with pytest.raises(ValueError, match=words):
        bayes_act({**apart, "sigma": sigma}, NORMAL)


@pytest.mark.parametrize("axes", [("sigma_dim_0",), ("axis_0",), ("dim_0",)])
def test_axes_without_names_of_their_own_go_together_by_place(apart, axes):
    sigma = apart["sigma"].rename({"time": axes[0]})
    found = bayes_act({**apart, "sigma": sigma}, NORMAL).act["sigma"]
    _, expected = normal_act(apart["mu"], apart["sigma"])
    torch.testing.assert_close(
        found, torch.from_numpy(expected.values)[:, None].expand(2, 2), rtol=1e-12, atol=0
    )


def test_labels_in_another_order_are_put_in_order():
    mu = variable(np.array([1.0, 2.0, 3.0]), "school", school=["a", "b", "c"])
    sigma = variable(np.array([1.0, 10.0, 100.0]), "school", school=["a", "b", "c"])
    mu, sigma = (x.assign_coords(chain=[0, 1], draw=range(DRAWS)) for x in (mu, sigma))
    loc, scale = normal_act(mu, sigma)
    weights = (0 * sigma.isel(school=0, drop=True) + 1).where(sigma.draw < DRAWS // 2, 0)
    moved = sigma.isel(school=[2, 0, 1], chain=[1, 0], draw=slice(None, None, -1))
    found = bayes_act({"mu": mu, "sigma": moved}, NORMAL)
    assert found.labels("sigma") == ["sigma[a]", "sigma[b]", "sigma[c]"]
    torch.testing.assert_close(found.act["mu"], torch.from_numpy(loc.values), rtol=1e-12, atol=0)
    torch.testing.assert_close(
        found.act["sigma"], torch.from_numpy(scale.values), rtol=1e-12, atol=0
    )
    turned = weights.transpose().isel(draw=slice(None, None, -1))
    assert torch.equal(
        read_draws({"mu": mu}, turned).weights > 0, torch.tensor(weights.values > 0)
    )
    other = moved.assign_coords(school=["a", "b", "d"])
    with pytest.raises(ValueError, match="same labels along school; got d and c"):
        bayes_act({"mu": mu, "sigma": other}, NORMAL)


def test_a_run_is_evaluated_by_its_labels(tmp_path):
    theta = variable(np.array([1.0, 5.0, 10.0]), "school", school=["a", "b", "c"])
    kept = xr.Dataset({"theta": theta})
    renamed = kept.assign_coords(school=["a", "b", "d"])
    counted = kept.drop_vars("school")
    files = {"kept": kept, "moved": kept.isel(school=[2, 0, 1])}
    files |= {"renamed": renamed, "counted": counted}
    for name, dataset in files.items():
        dataset.to_netcdf(tmp_path / f"{name}.nc", engine="h5netcdf")
    settings = EstimateSettings(tmp_path / "kept.nc", "normal(loc=theta, scale=1)", losses=("kl",))
    estimate(settings, tmp_path / "run")
    for name in ("moved", "counted"):
        table = evaluate_run(tmp_path / "run", EvaluateSettings(tmp_path / f"{name}.nc"))
        excess = [row[-1] for row in table.rows]
        assert len(excess) == 6
        # squares of differences by rounding alone, of numbers up to 10
        assert all(abs(np.max(x)) < 1e-12 for x in excess)
    with pytest.raises(ValueError, match=r"expected theta\[c\], got theta\[d\]"):
        evaluate_run(tmp_path / "run", EvaluateSettings(tmp_path / "renamed.nc"))


def test_coefficients_that_are_fixed_take_the_columns_in_order(design):
    sigma = variable(1.0)
    numbers = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    fixed = functools.partial(GaussianRegression, coefficients=numbers)
    found = bayes_act({"scale": sigma}, fixed, design=design)
    precision = (sigma**-2).mean().item()
    assert found.act["scale"].item() == pytest.approx(precision**-0.5, rel=1e-10)

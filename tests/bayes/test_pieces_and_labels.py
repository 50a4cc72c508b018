"""Regions in pieces and on circles, intervals of one variable, and the labels of coordinates."""

import math

import numpy as np
import pytest
import torch
import xarray as xr
from torch.distributions import Normal

from rkl.bayes import bayes_act, project, read_draws
from rkl.cli import main
from rkl.divergences import ReverseKL

RANDOM = np.random.default_rng(0)
SCHOOLS = ["Choate", "Deerfield", "Phillips Andover"]


@pytest.fixture(scope="module")
def schools():
    theta = RANDOM.normal([1.0, 2.0, 3.0], 1.0, size=(2, 100, 3))
    sigma = np.exp(0.1 * RANDOM.normal(size=(2, 100)))
    named = {"theta": (("chain", "draw", "school"), theta), "sigma": (("chain", "draw"), sigma)}
    return xr.Dataset(named, coords={"school": SCHOOLS})


@pytest.fixture(scope="module")
def angle():
    """An angle near the cut, and how concentrated it is."""
    m = np.pi + 0.3 * RANDOM.normal(size=(4, 250))
    return {"m": m, "k": 4 * np.exp(0.3 * RANDOM.normal(size=m.shape))}


def wrapped(x):
    return (x + np.pi) % (2 * np.pi) - np.pi


def test_a_region_of_two_pieces_is_told_piece_by_piece():
    theta = np.where(RANDOM.random((4, 250)) < 0.5, -1, 1) * (
        2 + 0.2 * RANDOM.normal(size=(4, 250))
    )
    region = bayes_act({"theta": theta}, lambda t: Normal(t.theta**2, 1.0)).region(0.9)
    inside = np.abs(theta[region.inside.numpy()])
    (a, b), (c, d) = region.pieces["theta"]
    assert b < 0 < c
    assert (c, d) == pytest.approx((inside.min(), inside.max()), abs=0.05)
    assert (-b, -a) == pytest.approx((c, d), abs=0.05)
    names = [row[0] for row in region.table().rows]
    assert names == ["theta", "theta, or"]
    assert region.to_dict()["pieces"]["theta"] == [[a, b], [c, d]]


def test_a_region_of_one_piece_has_one(schools):
    region = bayes_act(schools, "normal(loc=theta, scale=sigma)").region(0.8)
    assert all(len(pieces) == 1 for pieces in region.pieces.values())


def test_shadows_of_a_switching_mixture_have_pieces_apart():
    m = np.array([-3.0, 0.0, 4.0]) + 0.2 * RANDOM.normal(size=(4, 100, 3))
    m = np.take_along_axis(m, np.argsort(RANDOM.random(m.shape), -1), -1)

    def mixture(theta):
        weights = torch.distributions.Categorical(torch.ones_like(theta.m))
        return torch.distributions.MixtureSameFamily(weights, Normal(theta.m, 1.0))

    region = bayes_act({"m": m}, mixture).region(0.9)
    assert [len(pieces) for pieces in region.pieces.values()] == [3, 3, 3]


def test_a_region_of_an_angle_is_an_arc_wherever_the_circle_is_cut(angle):
    family = "von-mises(loc=m, concentration=k)"
    whole = bayes_act(angle, family).region(0.9)
    cut = bayes_act({**angle, "m": wrapped(angle["m"])}, family).region(0.9)
    for one, other in zip(whole.ranges["m"], cut.ranges["m"], strict=True):
        torch.testing.assert_close(one, other)
    low, high = cut.ranges["m"]
    inside = angle["m"][whole.inside.numpy()]
    assert low.item() == pytest.approx(inside.min())
    assert high.item() == pytest.approx(inside.max())
    assert cut.angles == {"m"}
    assert any("modulo 2π" in note for note in cut.table().notes)
    shaded = [end for ends in cut.shading()["m"] for end in ends]
    assert any(end < -math.pi / 2 for end in shaded)  # the part beyond the cut is shaded too


def test_the_mean_of_an_angle_is_noted(angle):
    estimate = bayes_act(angle, "von-mises(loc=m, concentration=k)")
    notes = estimate.compare(losses=[ReverseKL()]).notes
    assert any(note.startswith("m on a circle") for note in notes)


def test_the_interval_of_one_variable_holds_what_was_asked_for(schools):
    region = bayes_act(schools, "normal(loc=theta, scale=sigma)").region(0.8)
    low, high = (end.numpy() for end in region.intervals["theta"])
    theta = schools.theta.values.reshape(-1, 3)
    share = ((theta >= low) & (theta <= high)).mean(0)
    assert np.abs(share - 0.8).max() < 0.011
    columns = region.table().columns
    assert columns == ("variable", "from", "to", "alone from", "alone to")


def test_labels_of_coordinates_stand_in_every_table(schools):
    estimate = bayes_act(schools, "normal(loc=theta, scale=sigma)")
    region = estimate.region(0.8)
    for table in (estimate.table(), estimate.table(every=True), region.table()):
        names = [row[0] for row in table.rows]
        assert {f"theta[{school}]" for school in SCHOOLS} <= set(names)
    compared = estimate.compare(losses=[ReverseKL()])
    assert "posterior mean [Choate]" in [row[0] for row in compared.rows]
    assert estimate.to_dict()["labels"]["theta"] == [f"theta[{school}]" for school in SCHOOLS]
    simpler = project(schools, "normal(loc=theta, scale=sigma)", "normal(loc=theta, scale=1)")
    assert "Choate" in str(simpler)


def test_elements_of_a_table_of_stan_keep_their_numbers(tmp_path):
    rows = [f"1,{i + 1},{RANDOM.normal()},{RANDOM.normal()}" for i in range(50)]
    file = tmp_path / "draws.csv"
    file.write_text("\n".join([".chain,.iteration,theta[1],theta[2]", *rows]), "utf-8")
    estimate = bayes_act(read_draws(file), "normal(loc=theta, scale=1)")
    assert estimate.labels("theta") == ["theta[1]", "theta[2]"]


def test_runs_of_vectors_are_compared_number_by_number(schools, tmp_path, capsys):
    file = tmp_path / "posterior.nc"
    xr.DataTree.from_dict({"posterior": schools}).to_netcdf(file, engine="h5netcdf")
    chosen = ["estimate", str(file), "--losses", "reverse-kl", "--family"]
    runs = [str(tmp_path / name) for name in ("a", "b")]
    assert main([*chosen, "normal(loc=theta, scale=10)", "--out", runs[0]]) == 0
    assert main([*chosen, "normal(loc=0, scale=sigma)", "--out", runs[1]]) == 0
    capsys.readouterr()
    page = tmp_path / "both.html"
    assert main(["compare", *runs, "--out", str(page)]) == 0
    printed = capsys.readouterr().out
    for label in (*(f"theta[{school}]" for school in SCHOOLS), "sigma", "family"):
        assert label in printed
    html = page.read_text("utf-8")
    assert html.index("Side by side") < html.index("The posterior, and what is reported")
    assert html.index("theta[Choate]") < html.index("The posterior, and what is reported")


def test_what_all_members_of_a_batch_share_is_printed_once(schools):
    lines = str(bayes_act(schools, "normal(loc=theta, scale=sigma)")).splitlines()
    assert [line for line in lines if line.startswith("sigma, each of 3")]
    assert not [line for line in lines if line.startswith("sigma[")]
    frame = bayes_act(schools, "normal(loc=theta, scale=sigma)").to_dict()["labels"]["sigma"]
    assert len(frame) == 3


@pytest.mark.parametrize(
    ("times", "labels"),
    [
        ([1234567.25, 1234567.5, 1234567.75], ["1234567.25", "1234567.5", "1234567.75"]),
        ([0.1 + 0.2, 1.0, 2001.0], ["0.3", "1", "2001"]),
        ([1.0, 1 + 2**-52, 2.0], ["1", "1.0000000000000002", "2"]),
        (["a", "b", "a"], ["a (0)", "b", "a (2)"]),
    ],
)
def test_labels_of_coordinates_are_told_apart(times, labels):
    theta = np.arange(3.0) + RANDOM.normal(size=(2, 100, 3))
    named = xr.Dataset({"theta": (("chain", "draw", "time"), theta)}, coords={"time": times})
    estimate = bayes_act(named, "normal(loc=theta, scale=1)")
    expected = [f"theta[{label}]" for label in labels]
    assert estimate.labels("theta") == expected
    assert [row[0] for row in estimate.region(0.9).table().rows] == expected
    assert list(estimate.region(0.9).pieces) == expected

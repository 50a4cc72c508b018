"""The region about the act: what it holds, and that no name of a parameter moves it."""

import pytest
import torch
import xarray as xr
from torch.distributions import Independent, Normal

from rkl.bayes import Intrinsic, bayes_act
from rkl.divergences import KL, JensenShannon, ReverseKL

ORDINARY = "normal(loc=mu, scale=sigma)"


def normals(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.fixture
def draws():
    return {"mu": 1 + normals(4, 200) / 3, "sigma": (0.4 * normals(4, 200, seed=1)).exp()}


@pytest.mark.parametrize("divergence", [ReverseKL(), KL(), Intrinsic()], ids=repr)
@pytest.mark.parametrize("prob", [0.1, 0.5, 0.9])
def test_a_region_holds_the_draws_of_least_loss(draws, divergence, prob):
    estimate = bayes_act(draws, ORDINARY, divergence)
    region = estimate.region(prob)
    act = Normal(estimate.act["mu"], estimate.act["sigma"])
    losses = divergence.between(Normal(draws["mu"], draws["sigma"]), act)
    assert region.inside.sum() == prob * 800
    assert losses[region.inside].max() < losses[~region.inside].min()
    torch.testing.assert_close(region.threshold, losses[region.inside].max())


def test_a_region_on_nodes_holds_as_many(draws):
    few = {name: x[:, :50] for name, x in draws.items()}
    region = bayes_act(few, ORDINARY, JensenShannon()).region(0.8)
    assert region.inside.sum() == 160
    assert region.contains({"mu": 1.0, "sigma": 1.1})
    assert not region.contains({"mu": 3.0, "sigma": 1.1})


def test_a_region_contains_its_draws_and_its_act(draws):
    estimate = bayes_act(draws, ORDINARY)
    region = estimate.region(0.5)
    for chain, draw in [(0, 0), (1, 7), (2, 100), (3, 199)]:
        theta = {name: x[chain, draw] for name, x in draws.items()}
        assert region.contains(theta) == region.inside[chain, draw]
    assert region.contains({name: estimate.act[name] for name in draws})


def test_a_region_takes_values_of_xarray_by_their_labels():
    coords = {"school": ["a", "b"]}
    theta = xr.DataArray(normals(4, 200, 2).numpy(), dims=("chain", "draw", "school"))
    theta = (theta + [0.0, 9.0]).assign_coords(coords)
    region = bayes_act(xr.Dataset({"theta": theta}), "normal(loc=theta, scale=1)").region(0.9)
    mean = theta.mean(("chain", "draw"))
    for value in (mean, mean.isel(school=[1, 0])):
        assert region.contains({"theta": value}).tolist() == [True, True]


def test_ranges_are_the_ends_of_what_is_inside(draws):
    region = bayes_act(draws, ORDINARY).region(0.7)
    for name, (low, high) in region.ranges.items():
        inside = draws[name][region.inside]
        assert (low, high) == (inside.min(), inside.max())


def test_a_region_is_called_by_its_probability(draws):
    estimate = bayes_act(draws, ORDINARY)
    for prob, share in ((0.975, "97.5%"), (0.999, "99.9%"), (0.07, "7%")):
        assert f"The {share} of the draws" in str(estimate.region(prob))


def test_larger_regions_hold_smaller_ones(draws):
    estimate = bayes_act(draws, ORDINARY)
    small, large = (estimate.region(prob).inside for prob in (0.3, 0.6))
    assert (large | ~small).all()


def test_the_weight_inside_is_the_probability(draws):
    weights = torch.rand(4, 200, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    region = bayes_act(draws, ORDINARY, weights=weights).region(0.6)
    share = (weights * region.inside).sum() / weights.sum()
    assert 0.6 <= share < 0.6 + weights.max() / weights.sum()


def test_members_of_a_batch_have_regions_of_their_own_and_a_joint_law_has_one(draws):
    mu = draws["mu"][..., None] * torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    both = {"mu": mu, "sigma": draws["sigma"]}
    apart = bayes_act(both, ORDINARY).region(0.5)
    assert apart.threshold.shape == (3,)
    assert (apart.inside.sum((0, 1)) == 400).all()
    assert apart.contains({"mu": [1.0, 2.0, 3.0], "sigma": 1.0}).tolist() == [True] * 3
    assert apart.contains({"mu": [9.0, 2.0, 9.0], "sigma": 1.0}).tolist() == [False, True, False]
    joint = bayes_act(
        both, lambda theta: Independent(Normal(theta.mu, theta.sigma[:, None]), 1)
    ).region(0.5)
    assert joint.threshold.shape == ()
    assert joint.inside.sum() == 400


def test_what_members_share_has_no_range_where_no_draw_is_in_all_their_regions():
    shared = {"theta": normals(4, 50, 100), "sigma": (0.1 * normals(4, 50, seed=1)).exp()}
    region = bayes_act(shared, lambda t: Normal(t.theta, t.sigma[:, None])).region(0.5)
    assert not region.inside.all(-1).any()
    assert all(end.isnan() for end in region.ranges["sigma"])
    assert region.pieces["sigma"] == []
    row = next(row for row in region.table().rows if row[0] == "sigma")
    alone = shared["sigma"].flatten().sort().values[[49, 149]]
    assert row[1:] == (None, None, *alone.tolist())
    assert "sigma: no draw is in the regions of all members at once." in region.table().notes


def test_a_region_does_not_move_with_the_names_of_parameters(draws):
    here = bayes_act(draws, ORDINARY).region(0.9)
    renamed = {"mu": draws["mu"], "log": draws["sigma"].log()}
    there = bayes_act(renamed, lambda theta: Normal(theta.mu, theta.log.exp())).region(0.9)
    assert torch.equal(here.inside, there.inside)
    for own, other in zip(here.ranges["sigma"], there.ranges["log"], strict=True):
        torch.testing.assert_close(own, other.exp())


def test_a_region_prints_its_ranges_and_is_json(draws):
    region = bayes_act(draws, ORDINARY).region(0.9)
    assert "The 90% of the draws closest to the act under ReverseKL()" in str(region)
    kept = region.to_dict()
    assert kept["prob"] == 0.9
    assert kept["ranges"]["mu"] == [x.item() for x in region.ranges["mu"]]
    assert set(region.to_dataframe()["variable"]) == {"mu", "sigma"}
    assert "<table>" in region._repr_html_()


@pytest.mark.parametrize("prob", [0, 1, -0.5, 90, float("nan")])
def test_what_is_no_probability_is_refused(draws, prob):
    with pytest.raises(ValueError, match="prob must be"):
        bayes_act(draws, ORDINARY).region(prob)


@pytest.mark.parametrize(
    ("theta", "words"),
    [
        ({"mu": 1.0}, "theta must have mu, sigma; got mu"),
        ({"mu": 1.0, "sigma": [1.0, 2.0]}, r"sigma must be \[\]; got \[2\]"),
        ({"mu": 1.0, "sigma": -1.0}, "sigma must satisfy"),
    ],
)
def test_what_is_no_parameter_is_refused(draws, theta, words):
    with pytest.raises(ValueError, match=words):
        bayes_act(draws, ORDINARY).region(0.5).contains(theta)

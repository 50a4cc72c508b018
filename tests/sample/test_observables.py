"""Observables with errors, against quadrature and against what a chain would do by chance."""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch.distributions import Independent, Uniform

from rkl.sample.files import write_chain
from rkl.sample.mcmc import markov_chain
from rkl.sample.metropolis import independent_metropolis
from rkl.sample.observables import averages, check_held_out, compare_with_held_out
from rkl.sample.targets import XY, Condition, MoG8, Target, check_target
from rkl.stats import Mean


@dataclass(frozen=True)
class Counted(Target):
    """Two rotors with a count, a truth value, and names that files have for other things."""

    domain, event_shape = "circle", (2,)
    conditions = (Condition("T", 0.5, 2.0, "J"),)
    units: ClassVar = {"E/N": "J", "ahead": "rotors", "both": "", "x": "rad"}

    def log_prob(self, x, condition):
        return x.cos().sum(-1) / condition[..., 0]

    def observables(self, x, condition):
        ahead = (x.cos() > 0).sum(-1)
        return {"E/N": -x.cos().mean(-1), "ahead": ahead, "both": ahead == 2, "x": x[..., 0]}


def test_observables_may_be_counts_and_truth_values():
    check_target(Counted())
    condition = torch.ones(1, dtype=torch.float64)
    law = Independent(Uniform(*torch.tensor([[-math.pi], [math.pi]]).double().expand(2, 2)), 1)
    chain = independent_metropolis(Counted(), law, condition, draws=500)
    walk = markov_chain(Counted(), condition, draws=500, measure=Counted().observables)
    theta = torch.linspace(-math.pi, math.pi, 100_001, dtype=torch.float64)
    share = (theta.cos().softmax(0) * (theta.cos() > 0)).sum()  # of a rotor that points ahead
    for values in (chain.measure(Counted()), walk.values):
        mean = averages(Counted(), values, condition)
        for name, expected in (("ahead", 2 * share), ("both", share**2)):
            assert (mean[name].value - expected).abs() < 4.5 * mean[name].error
    assert chain.diagnose(walk.values)["both"]["rhat"] < 1.1


def test_a_file_of_draws_has_every_observable_whatever_it_is_called(tmp_path):
    xarray = pytest.importorskip("xarray")
    condition = torch.ones(1, dtype=torch.float64)
    law = Independent(Uniform(*torch.tensor([[-math.pi], [math.pi]]).double().expand(2, 2)), 1)
    chain = independent_metropolis(Counted(), law, condition, draws=50)
    measured = chain.measure(Counted())
    for name in ("draws.npz", "draws.nc"):
        write_chain(tmp_path / name, chain, measured, Counted())
    arrays = np.load(tmp_path / "draws.npz")
    groups = xarray.open_dataset(tmp_path / "draws.nc", group="posterior", engine="h5netcdf")
    assert groups["observable_x"].attrs["units"] == "rad"
    for found, energy in ((arrays, "E/N"), (groups, "E_N")):
        assert (np.asarray(found["x"]) == chain.x.numpy()).all()
        assert (np.asarray(found["observable_x"]) == measured["x"].numpy()).all()
        assert (np.asarray(found[energy]) == measured["E/N"].numpy()).all()


CONDITION = torch.tensor([[0.5], [1.0]], dtype=torch.float64)
MODEL = XY(side=2)


def flat(batch=()):
    low = torch.full((*batch, 4), -math.pi, dtype=torch.float64)
    return Independent(Uniform(low, -low), 1)


def exact(points=40):
    line = torch.arange(points, dtype=torch.float64) * 2 * math.pi / points
    x = torch.cartesian_prod(line, line, line)
    x = torch.cat([torch.zeros_like(x[:, :1]), x], 1)
    weight = MODEL.log_prob(x, CONDITION[:, None]).softmax(1)
    measured = MODEL.observables(x, CONDITION[:, None])
    e, m = measured["energy"], measured["magnetization"]
    means = {name: (weight * it).sum(1) for name, it in measured.items() if name != "vortices"}
    t = CONDITION[:, 0]
    means["specific_heat"] = 4 * ((weight * e * e).sum(1) - means["energy"] ** 2) / t**2
    means["susceptibility"] = 4 * ((weight * m * m).sum(1) - means["magnetization"] ** 2) / t
    return means


def test_averages_of_four_sites_are_those_of_quadrature():
    walk = markov_chain(MODEL, CONDITION, draws=300, chains=100, measure=MODEL.observables)
    flow = independent_metropolis(MODEL, flat((2,)), CONDITION, draws=4_000, chains=20)
    for values in (walk.values, flow.measure(MODEL)):
        found = averages(MODEL, values, CONDITION)
        assert found.keys() == exact().keys() | {"vortices"}
        for name, value in exact().items():
            # each of 24 beyond 4.5 errors, themselves known to 10 %, once in 10⁴
            assert ((found[name].value - value).abs() < 4.5 * found[name].error).all(), name
            assert (found[name].error < 0.1).all()


def test_a_target_without_lattice_has_the_means_of_what_it_measures():
    values = {"x": torch.randn(3, 100, generator=torch.Generator().manual_seed(0))}
    found = averages(MoG8(), values, torch.ones(1))
    assert found.keys() == {"x"}
    assert found["x"].value.item() == pytest.approx(values["x"].mean().item(), abs=1e-6)


def test_values_of_another_batch_are_refused():
    with pytest.raises(ValueError, match=r"values must be \[\*batch, chains, draws\].*\[2\]"):
        averages(MODEL, {"energy": torch.zeros(3, 4, 9)}, CONDITION)


def test_a_chain_that_is_exact_is_as_near_to_held_out_draws_as_these_to_themselves():
    one = CONDITION[1]
    held_out = markov_chain(MODEL, one, draws=100, chains=20, every=10).x.flatten(0, 1)
    chain = independent_metropolis(MODEL, flat(), one, draws=4_000, chains=20)
    found = compare_with_held_out(MODEL, flat(), chain, held_out)
    assert all(isinstance(it, Mean) for it in found.values())
    assert found["nll"].value.item() == pytest.approx(4 * math.log(2 * math.pi))
    assert found["acceptance"].value.item() == pytest.approx(chain.acceptance.item())
    overlap, floor = found["overlap[-2, 0]"], found["overlap[-2, 0]_floor"]
    assert overlap.value > floor.value - 4 * math.hypot(overlap.error, floor.error)
    assert found["overlap[-2, 0]"].value < found["overlap[-3, 0]"].value + 0.02
    for name in ("energy", "magnetization", "helicity"):
        assert found[f"emd_{name}"].value < 2 * found[f"emd_{name}_floor"].value + 0.02
    frozen = MODEL.observables(held_out, one.expand(len(held_out), 1))["energy"].std()
    blind = independent_metropolis(MODEL, flat(), 100 * one, draws=200, chains=20)
    other = compare_with_held_out(MODEL, flat(), blind, held_out)
    assert other["emd_energy"].value > 0.3 * frozen


def test_rows_that_were_trained_on_are_not_held_out():
    rows = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
    check_held_out(rows[:5], rows[5:])
    with pytest.raises(ValueError, match="held_out shares 2 of its 7 rows with train"):
        check_held_out(rows[:5], rows[3:])

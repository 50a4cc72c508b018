"""Figures that cannot be trusted are marked where they are printed, and draws are warned of."""

import math

import torch
from torch import nn
from torch.distributions import Independent, Normal

from rkl.sample import evaluate_on_target, independent_metropolis
from rkl.sample.results import STAR, with_stars
from rkl.sample.run import _judgement, _warnings
from rkl.sample.targets import Condition, Density
from rkl.stats import Mean
from rkl.tables import cell_text

GAUSSIAN = Density(
    lambda x, c: -x.square().sum(-1) / (2 * c[..., 0]), (6,), "line", (Condition("T", 0.5, 2.0),)
)


class Normals(nn.Module):
    """N(0, width²) in six coordinates whatever the condition."""

    def __init__(self, width):
        super().__init__()
        self.width = width

    def forward(self, condition):
        mean = torch.zeros(*condition.shape[:-1], 6)
        return Independent(Normal(mean, self.width), 1)


def test_rows_of_heavy_tails_have_a_star_and_others_none():
    condition = torch.tensor([[0.5], [2.0]])
    found = evaluate_on_target(Normals(0.8), GAUSSIAN, condition, draws=500)
    lines = str(found).splitlines()
    assert STAR in lines
    assert found.has_heavy_tail
    assert any("*" in line for line in lines if line.startswith("T = 2"))
    assert not any("*" in line for line in lines if line.startswith("T = 0.5"))
    saved = found.to_dict()["pareto_k"]
    assert saved["heat_capacity"][1] > 0.7
    assert saved["log_z"][0] < 0.7


def test_a_star_follows_the_figure_of_its_row():
    mean = Mean(torch.tensor([1.0, 2.0]), torch.tensor([0.5, 0.5]))
    starred = with_stars(mean, torch.tensor([0.2, 0.8]))
    assert [*map(cell_text, starred)] == ["1.0(5)", "2.0(5)*"]
    assert [*map(cell_text, with_stars(mean, None))] == ["1.0(5)", "2.0(5)"]


def test_a_hamiltonian_with_a_temperature_has_its_energy_and_heat_capacity():
    """Of six harmonic coordinates ⟨E⟩/N = T/2 and C/N = 1/2."""
    found = evaluate_on_target(Normals(1.1), GAUSSIAN, torch.tensor([[1.0]]), draws=2_000)
    thermal = found.thermodynamics
    assert (thermal.energy.value[0] / 6 - 0.5).abs() < 5 * thermal.energy.error[0] / 6
    assert (thermal.heat_capacity.value[0] / 6 - 0.5).abs() < 5 * thermal.heat_capacity.error[
        0
    ] / 6
    assert "E/N" in str(found)
    assert "C/N" in str(found)


def test_chains_that_disagree_or_are_short_are_warned_of():
    condition = torch.tensor([1.0])
    flow = Normals(1.0)
    good = independent_metropolis(GAUSSIAN, flow, condition, draws=2_000, chains=4)
    short = independent_metropolis(GAUSSIAN, flow, condition, draws=20, chains=4)
    for chain, told in ((good, []), (short, ["effective draws, below 400"])):
        warned = "\n".join(_warnings(chain, chain.diagnose({"log p": chain.log_p})))
        assert all(it in warned for it in told)
        assert bool(warned) == bool(told)


def test_a_chain_that_never_moved_has_no_r_hat_and_no_effective_draws():
    condition = torch.tensor([1.0])
    chain = independent_metropolis(GAUSSIAN, Normals(1.0), condition, draws=10, chains=2)
    still = torch.ones_like(chain.log_p)
    judged = chain.diagnose({"log p": still})["log p"]
    assert math.isnan(judged["rhat"])
    assert math.isnan(judged["ess_bulk"])
    assert _judgement(judged) == "it never changed, so that nothing can be said of it"

"""A flow is measured on its target: figures that are right, and failures that are loud."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import (
    Categorical,
    Independent,
    MixtureSameFamily,
    Normal,
)

from rkl.cli import main
from rkl.flows import NSF, Coupling
from rkl.runs import Run
from rkl.sample import CoarseToFine, condition_grid, evaluate, evaluate_on_target, fit_to_target
from rkl.sample.evaluate import NotCoveredError, _where, evaluate_run
from rkl.sample.run import TargetRun, fit_target
from rkl.sample.settings import EvaluateSettings, TargetSettings
from rkl.sample.targets import XY, Density, MoG8
from rkl.sample.targets.base import Condition, has_temperature


class Mixture(nn.Module):
    """Gaussians at some of the modes of MoG8, a little wider than those of the target."""

    def __init__(self, modes):
        super().__init__()
        self.modes = modes

    def forward(self, condition):
        centres = MoG8().centres[self.modes].float()
        scale = 1.2 * condition[..., None, :].expand(*condition.shape[:-1], *centres.shape)
        parts = Independent(Normal(centres.expand_as(scale), scale), 1)
        return MixtureSameFamily(Categorical(torch.ones(parts.batch_shape)), parts)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With a small run on the XY model."""
    path = tmp_path_factory.mktemp("evaluated")
    settings = TargetSettings("xy(side=4)", flow="coarse-to-fine(width=8)", batch=128, steps=60)
    fit_target(settings, path / "xy")
    return path


def test_averages_and_log_z_of_an_exact_flow_are_those_of_its_target():
    """A flow wider than a normalised mixture: log Z is 0, its moments are known."""
    condition = torch.tensor([[0.3], [1.0]])
    found = evaluate_on_target(Mixture(list(range(8))), MoG8(), condition, draws=2_000, seed=1)
    log_z = found.thermodynamics.log_z
    assert (log_z.value.abs() < 4.5 * log_z.error).all()
    x0 = found.averages["x0"]
    assert (x0.value.abs() < 4.5 * x0.error).all()
    assert found.passed is True
    entropy = found.thermodynamics.entropy
    exact = np.log(8) + np.log(2 * np.pi * np.e * 0.3**2)  # the modes are ten scales apart
    assert abs(entropy.value[0] - exact) < 4.5 * entropy.error[0]


def test_log_z_of_two_by_two_spins_is_that_of_a_series_of_bessel_functions():
    """Side 2: each of the four pairs of neighbours has two bonds, so Z = (2π)⁴ Σ Iₙ(2/T)⁴."""
    target, condition = XY(side=2), torch.tensor([[0.8], [2.0]])
    flow = CoarseToFine.of(target, width=8).build((4,), 1)
    found = evaluate_on_target(flow, target, condition, draws=2_000, reference=True)
    n = torch.arange(-40, 41, dtype=torch.float64)
    theta = torch.linspace(-torch.pi, torch.pi, 2_001, dtype=torch.float64)[:-1]
    for row, temperature in enumerate((0.8, 2.0)):
        waves = (n[:, None] * theta).cos() * (2 * theta.cos() / temperature).exp()
        exact = 4 * np.log(2 * np.pi) + waves.mean(1).pow(4).sum().log()
        for it in (found.thermodynamics.log_z, found.reference.log_z):
            assert abs(it.value[row] - exact) < 4.5 * it.error[row] + 1e-3
    assert all((z.abs() < 4.5).all() for z in found.deviations().values())


def test_five_of_eight_modes_are_flagged_although_their_weights_look_well(
    tmp_path, monkeypatch, capsys
):
    target = MoG8()
    settings = TargetSettings("mog8", steps=1)
    fit_target(settings, tmp_path / "run")
    ranges = (Condition("scale", 0.5, 0.5),)
    kept = TargetRun(Mixture([0, 1, 2, 3, 4]), target, ranges, settings)
    monkeypatch.setattr(evaluate, "load_target_run", lambda path, allow=(): kept)
    words = ["evaluate", str(tmp_path / "run"), "--draws", "500", "--reference"]
    assert main(words) == 0
    told = capsys.readouterr().out
    assert "NOT COVERED under 1 of 1 conditions" in told
    assert main([*words, "--strict"]) == 1
    error = capsys.readouterr().err
    assert "3 of 8 modes are missing" in error
    for place in ("(-2.83, -2.83)", "(0, -4)", "(2.83, -2.83)"):
        assert f"at {place} with mass 0.1" in error
    saved = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert saved["passed"] is False
    assert saved["weights"]["ess"]["value"][0] > 0.8
    kept = TargetRun(Mixture(list(range(8))), target, ranges, settings)
    assert main([*words, "--strict"]) == 0


def test_a_run_is_evaluated_where_it_was_trained_and_keeps_the_figures(folder, capsys):
    words = ["evaluate", str(folder / "xy"), "--values", "3", "--draws", "100", "--chains", "4"]
    assert main(words) == 0
    told = capsys.readouterr().out
    assert "T = 2.05 J" in told
    assert "coverage unknown" in told
    saved = json.loads((folder / "xy" / "evaluation.json").read_text())
    assert saved["passed"] is None
    assert [row[0] for row in saved["condition"]] == pytest.approx([0.05, 1.05, 2.05])
    assert saved["averages"].keys() >= {"energy", "magnetization", "specific_heat"}
    with pytest.raises(NotCoveredError, match="coverage unknown"):
        evaluate_run(folder / "xy", EvaluateSettings(values=1, draws=100, strict=True))


def test_held_out_draws_are_compared_and_refused_where_they_were_trained_on(folder):
    x = 0.5 * torch.randn(400, 16, generator=torch.Generator().manual_seed(0))
    condition = torch.tensor([[0.5], [1.0]]).repeat(200, 1)
    np.savez(folder / "draws.npz", x=x.numpy(), condition=condition.numpy())
    settings = EvaluateSettings(folder / "draws.npz", draws=200, chains=2)
    found = evaluate_run(folder / "xy", settings)
    assert found.condition.flatten().tolist() == [0.5, 1.0]
    assert found.beside[0].keys() >= {"nll", "acceptance", "emd_energy", "emd_energy_floor"}
    assert found.passed is not None
    Run.open(folder / "xy").remember_rows([x[3].numpy().tobytes()])
    with pytest.raises(ValueError, match="1 of the 400 draws in .* were trained on"):
        evaluate_run(folder / "xy", settings)


def test_a_series_for_each_ring_exchange_is_that_of_its_own_temperatures():
    target = XY(side=2, ring_exchange=None)
    flow = CoarseToFine.of(target, width=8).build((4,), 2)
    condition = condition_grid(target.conditions, 3)
    assert condition[:, 1].tolist() == [0, 0, 0, 1, 1, 1]
    found = evaluate_on_target(flow, target, condition, draws=200)
    assert found.thermodynamics.log_z.value.shape == (6,)
    assert found.thermodynamics.gap.value.shape == (4,)


def test_a_density_of_ones_own_needs_no_observables_and_no_conditions():
    def log_prob(x, condition):
        return -x.square().sum(-1) / 2

    target = Density(log_prob, (2,))
    law = Independent(Normal(torch.zeros(2), 1.1 * torch.ones(2)), 1)

    class Fixed(nn.Module):
        def forward(self):
            return law

    found = evaluate_on_target(Fixed(), target, draws=500)
    log_z = found.thermodynamics.log_z
    assert abs(log_z.value.item() - np.log(2 * np.pi)) < 4.5 * log_z.error.item()
    assert found.thermodynamics.entropy.value.item() == pytest.approx(
        np.log(2 * np.pi * np.e), abs=0.1
    )
    assert "coverage unknown" in str(found)


@pytest.mark.parametrize("architecture", [NSF(transforms=1, hidden=(8,)), Coupling(1, (8,))])
def test_a_flow_fitted_without_conditions_is_evaluated(architecture):
    target = Density(lambda x, _: -x.square().sum(-1) / 2, (2,))
    flow = fit_to_target(architecture, target, steps=2, batch=64).flow
    found = evaluate_on_target(flow, target, draws=200)
    assert found.conditions() == ["all"]
    assert abs(found.thermodynamics.log_z.value.item() - np.log(2 * np.pi)) < 0.2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"condition": torch.ones(1)}, "condition must be"),
        ({"draws": 1}, "draws must be"),
        ({"held_out": [torch.zeros(4, 2)] * 2}, "held_out must be draws under each of 1"),
    ],
)
def test_what_cannot_be_measured_is_refused(change, message):
    how = {"condition": torch.ones(1, 1), "draws": 100} | change
    with pytest.raises(ValueError, match=message):
        evaluate_on_target(Mixture([0]), MoG8(), **how)


def test_rows_that_a_flow_of_data_was_not_fitted_to_say_how_good_its_samples_are(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for name in ("data", "other"):
        np.save(tmp_path / f"{name}.npy", rng.normal(size=(300, 2)))
    words = ["fit", "--data", str(tmp_path / "data.npy"), "--out", str(tmp_path / "run")]
    small = ["--flow", "coupling(transforms=2, hidden=(8,))", "--batch", "64", "--steps", "60"]
    assert main([*words, *small]) == 0
    run, other = str(tmp_path / "run"), str(tmp_path / "other.npy")
    assert main(["evaluate", run, "--data", other]) == 0
    told = capsys.readouterr().out
    assert "nats per row, over 300 rows" in told
    assert "real against real" in told
    assert main(["evaluate", run]) == 2
    assert "data must be given" in capsys.readouterr().err
    assert main(["evaluate", run, "--data", other, "--reference"]) == 2
    said = capsys.readouterr().err
    assert "unrecognized arguments: --reference. See rkl evaluate --help." in said


@pytest.mark.parametrize("size", [1e-8, 1.0, 300.1])
def test_draws_at_the_ends_of_a_range_are_taken_and_those_beyond_are_not(size, tmp_path):
    """Single precision rounds a condition by up to 6e-8 of its size."""
    target = Density(lambda x, c: -x.square().sum(-1) / c[..., 0], (2,))
    target = replace(target, conditions=(Condition("T", size / 3, size),))
    settings = TargetSettings("xy(side=2)", steps=1)
    loaded = TargetRun(nn.Identity(), target, target.conditions, settings)
    condition = np.repeat([size / 3, size / 2, size, 1.1 * size], 10)[:, None]
    np.savez(tmp_path / "draws.npz", x=np.zeros((40, 2)), condition=condition)
    with Run.create(tmp_path / "run", "sample", {}, seed=0) as run:
        rows, held_out = _where(loaded, EvaluateSettings(tmp_path / "draws.npz"), run)
    assert rows.flatten().tolist() == pytest.approx([size / 3, size / 2, size], rel=1e-6)
    assert held_out is not None
    assert list(map(len, held_out)) == [10, 10, 10]


class Wide(nn.Module):
    """A normal distribution of twice the variance."""

    def forward(self, condition):
        scale = (2 * condition).sqrt().expand(*condition.shape[:-1], 2)
        return Independent(Normal(torch.zeros_like(scale), scale), 1)


@pytest.mark.parametrize("unit", [1e-8, 1.0, 1e8])
def test_a_condition_called_t_that_is_no_temperature_has_no_energy(unit):
    """A normalised Gaussian of variance T: T log p contains T log 2πT, which is no energy."""

    def normalised(x, condition):
        variance = condition[..., 0]
        return -x.square().sum(-1) / (2 * variance) - (2 * math.pi * variance).log()

    def boltzmann(x, condition):
        return -x.square().sum(-1) / (2 * condition[..., 0])

    ranges = (Condition("T", 0.5 * unit, 2 * unit),)
    condition = torch.tensor([[0.5 * unit], [unit]])
    for log_prob, temperature in ((normalised, False), (boltzmann, True)):
        target = Density(log_prob, (2,), "line", ranges)
        assert has_temperature(target) is temperature
        found = evaluate_on_target(Wide(), target, condition, draws=100, chains=4)
        assert ("E/N" in str(found)) is temperature
        assert "log Z" in str(found)
    assert has_temperature(XY(side=4, ring_exchange=None))
    assert not has_temperature(MoG8())

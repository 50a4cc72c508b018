"""A Hamiltonian of one's own, outside of the package, has all that a target of rkl's has."""

import json
import sys

import pytest
import torch

from rkl.cli import main
from rkl.sample import (
    CoarseToFine,
    Fluctuation,
    check_target,
    evidence,
    judge_coverage,
    markov_chain,
    mbar,
    parse_target,
    thermodynamic_integration,
)
from rkl.sample.architecture import default_architecture
from rkl.sample.settings import TargetSettings
from rkl.sample.targets import GaussianMixture, Phi4

MODULE = '''
import math
from dataclasses import dataclass

import torch
from torch.distributions import VonMises

from rkl.sample import CoarseToFine, Condition, Fluctuation, Modes, Target


class RingHeatBath:
    """Every second rotor of a ring drawn anew, given its two neighbours."""

    def move(self, target, condition, x, sweeps):
        for _ in range(sweeps):
            for first in (0, 1):
                spin = torch.polar(torch.ones_like(x), x)
                field = target.coupling * (spin.roll(1, -1) + spin.roll(-1, -1))
                kappa = (field.abs() / condition[..., :1]).clamp_min(1e-6)
                drawn = VonMises(field.angle(), kappa, validate_args=False).sample()
                x = torch.where(torch.arange(4) % 2 == first, drawn, x)
        return x


@dataclass(frozen=True)
class Hot(Target):
    """A ring of four rotors, E = -J sum cos(x_i - x_(i+1))."""

    coupling: float = 1.0
    with_log_z: bool = True

    domain = "circle"
    conditions = (Condition("T", 0.5, 2.0, "J"),)
    units = {"energy": "J per site"}
    event_shape = (4,)

    def log_prob(self, x, condition):
        return self.coupling * (x - x.roll(1, -1)).cos().sum(-1) / condition[..., 0]

    def observables(self, x, condition):
        return {"energy": -self.coupling * (x - x.roll(1, -1)).cos().mean(-1)}

    def log_normaliser(self, condition):
        """(2 pi)^4 sum of I_n(J/T)^4, with I_n by the trapezoidal rule."""
        if not self.with_log_z:
            return super().log_normaliser(condition)
        angle = torch.arange(256, dtype=torch.float64) * (2 * math.pi / 256)
        kernel = (self.coupling / condition[..., :1].double() * angle.cos()).exp()
        bessel = torch.fft.fft(kernel).real / 256
        return (bessel**4).sum(-1).log() + 4 * math.log(2 * math.pi)

    def kernel(self):
        return RingHeatBath()

    def architecture(self):
        return CoarseToFine(integrate="none", width=8)

    def modes(self, x, condition):
        return Modes(((x[..., 1] - x[..., 0]).sin() > 0).long(), ("turned left", "turned right"))

    def derived(self, condition):
        factor = 4 / condition[..., 0].double() ** 2
        return {"heat_capacity_per_rotor": Fluctuation("energy", factor, "k_B")}

    def figure(self, states):
        from matplotlib.figure import Figure

        drawing = Figure()
        for at, x in states.items():
            drawing.subplots().plot(x.numpy(), label=at)
        return drawing, "Four rotors at each temperature."
'''


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    """The folder of the module ``mine``."""
    path = tmp_path_factory.mktemp("own")
    (path / "mine.py").write_text(MODULE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(path))
        yield path
    sys.modules.pop("mine", None)


@pytest.fixture
def hot(mine):
    return parse_target("mine:Hot()")


def energy(target, temperature):
    """The energy per site, from log Z: E = -d log Z/d beta."""
    beta = torch.tensor([1 / temperature], dtype=torch.float64, requires_grad=True)
    target.log_normaliser(1 / beta).backward()
    return -beta.grad.item() / 4


def test_it_obeys_the_laws_and_has_an_architecture(hot):
    check_target(hot)
    assert default_architecture(hot) == CoarseToFine(integrate="none", width=8)
    assert TargetSettings("mine:Hot()").architecture == CoarseToFine(integrate="none", width=8)


def test_its_heat_bath_moves_chains_and_particles(hot):
    condition = torch.tensor([[0.6], [1.5]])
    walk = markov_chain(hot, condition, draws=400, chains=16, measure=hot.observables)
    exact = torch.tensor([energy(hot, 0.6), energy(hot, 1.5)])
    # autocorrelation times are of a few sweeps: 6,400 draws are 1,000 independent ones or more
    assert (walk.values["energy"].mean((1, 2)) - exact).abs().max() < 0.04
    found = evidence(hot, condition, particles=128, islands=8)
    assert (found.accepted == 1).all()  # a heat bath rejects nothing
    assert found.doubts == ((), ())
    gap = found.log_z.value - hot.log_normaliser(condition)
    assert (gap.abs() < 5 * found.log_z.error).all()


@pytest.mark.parametrize("estimate", [thermodynamic_integration, mbar])
def test_log_z_by_its_heat_bath_is_that_of_the_closed_form(hot, estimate):
    condition = torch.tensor([[0.6], [1.5]])
    log_z = estimate(hot, condition, draws=200, seed=1)
    gap = log_z.value - hot.log_normaliser(condition)
    assert (gap.abs() < 5 * log_z.error).all()
    assert (log_z.error < 0.05).all()


def test_log_z_by_chains_is_refused_where_it_could_not_be_right(hot):
    with pytest.raises(TypeError, match="must be angles at a temperature T.*got Phi4"):
        mbar(Phi4(side=2), torch.ones(1, 1))

    class Shifted(type(hot)):
        def log_prob(self, x, condition):
            return super().log_prob(x, condition) - condition[..., 0]

    with pytest.raises(ValueError, match=r"must be −E\(x\)/T, with nothing else that depends"):
        mbar(Shifted(), torch.ones(1, 1))


def test_coverage_names_its_modes(hot):
    law = torch.distributions.Independent(
        torch.distributions.Uniform(torch.full((4,), -torch.pi), torch.full((4,), torch.pi)), 1
    )
    condition = torch.tensor([1.0])
    walk = markov_chain(hot, condition, draws=500, chains=8, every=2)
    held_out = walk.x.flatten(0, 1).remainder(2 * torch.pi) - torch.pi
    modes = judge_coverage(hot, law, condition, held_out=held_out).modes
    assert [it.name for it in modes] == ["turned left", "turned right"]
    assert all(abs(it.target.value - 0.5) < 0.1 for it in modes)


def test_the_command_line_fits_it_and_names_its_heat_bath(mine, capsys):
    run = str(mine / "run")
    words = ["fit", "--target", "mine:Hot()", "--steps", "60", "--out", run]
    assert main(words) == 0
    record = json.loads((mine / "run" / "run.json").read_text())
    assert record["settings"]["flow"].endswith("CoarseToFine(coupling=1.0, ring_exchange=0.0, "
                                              "integrate='none', width=8, knots=16)")  # fmt: skip
    capsys.readouterr()
    words = ["evaluate", run, "--reference", "--values", "2", "--draws", "300"]
    assert main([*words, "--allow", "mine:Hot"]) == 0
    text = capsys.readouterr().out
    assert "energy against ring heat bath: rms z" in text
    assert "log Z against its known value: rms z" in text
    assert "heat_capacity_per_rotor" in text
    assert "k_B" in text
    kept = json.loads((mine / "run" / "evaluation.json").read_text())
    assert kept["reference"]["source"] == "ring heat bath"
    names = [it["name"] for it in kept["coverage"][0]["modes"]]
    assert names == ["turned left", "turned right"]
    assert all(abs(z) < 5 for z in kept["reference"]["deviations"]["heat_capacity_per_rotor"])
    assert main(["report", run, "--allow", "mine:Hot"]) == 0
    page = (mine / "run" / "report.html").read_text()
    assert "Four rotors at each temperature." in page
    assert "ring heat bath" in page


def test_without_a_known_log_z_its_kernel_integrates_it(mine, capsys):
    run = str(mine / "unknown")
    words = ["fit", "--target", "mine:Hot(with_log_z=False)", "--steps", "20", "--out", run]
    assert main(words) == 0
    words = ["evaluate", run, "--reference", "--values", "2", "--draws", "200"]
    assert main([*words, "--allow", "mine:Hot"]) == 0
    assert "log Z against thermodynamic integration: rms z" in capsys.readouterr().out


def test_what_breaks_a_law_of_the_optional_methods_is_named(hot):
    class Unnamed(type(hot)):
        def derived(self, condition):
            return {"capacity": Fluctuation("work", condition[..., 0])}

    class Misnumbered(type(hot)):
        def modes(self, x, condition):
            return super().modes(x, condition)._replace(names=("only",))

    class Biased(GaussianMixture):
        def kernel(self):
            return self

        def move(self, target, condition, x, sweeps):
            return x + 0.1

    class Other(type(hot)):
        def kernel(self):
            return "heat bath"

    for target, law in (
        (Unnamed(), "derives capacity from work, which it does not measure"),
        (Misnumbered(), "labels of its modes must be numbers below 1"),
        (Biased(means=((0.0,),)), "kernel does not leave it invariant"),
        (Other(), "kernel must be None or have a method move"),
    ):
        with pytest.raises(AssertionError, match=law):
            check_target(target)

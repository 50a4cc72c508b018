"""Particles cooled to a target: evidence against closed forms, and verdicts of coverage."""

import math

import pytest
import torch
from torch import nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from rkl.sample import evaluate, evaluate_on_target, judge_coverage, judge_ratios, tempering
from rkl.sample.lost_modes import LogDensity, find_lost_mode
from rkl.sample.smc import evidence, normal_errors
from rkl.sample.targets import XY, Condition, Density
from rkl.stats import Mean

LOG_2PI = math.log(2 * math.pi)


def gaussian(x, condition):
    """N(3, s²) in every coordinate, not normalised: log Z = n log(s √2π)."""
    return -((x - 3) / condition[..., :1]).square().sum(-1) / 2


def gamma(x, condition):
    """A gamma density of shape 3: log Z = log Γ(3) − 3 log rate."""
    log_p = 2 * x[..., 0].clamp_min(1e-30).log() - x[..., 0] * condition[..., 0]
    return torch.where(x[..., 0] > 0, log_p, -math.inf)


def without_gradient(x, condition):
    return gaussian(x.detach(), condition)


def two_angles(x, condition):
    """Two angles of a coupled pair: log Z = 2 log 2π + log I₀(β)."""
    return condition[..., 0] * (x[..., 0] - x[..., 1]).cos()


def bessel(beta):
    return float(torch.special.i0(torch.tensor(beta, dtype=torch.float64)).log())


SCALES = (Condition("s", 0.1, 10.0),)
EVIDENCE = {
    "gaussian": (
        Density(gaussian, (3,), "line", SCALES),
        lambda s: 3 * (math.log(s) + LOG_2PI / 2),
    ),
    "without gradient": (
        Density(without_gradient, (2,), "line", SCALES),
        lambda s: 2 * math.log(s) + LOG_2PI,
    ),
    "half line": (Density(gamma, (1,), "line", SCALES), lambda s: math.log(2) - 3 * math.log(s)),
    "angles": (Density(two_angles, (2,), "circle", SCALES), lambda s: 2 * LOG_2PI + bessel(s)),
}


@pytest.mark.parametrize("name", EVIDENCE)
def test_evidence_is_that_of_the_closed_form(name):
    """Four islands make a t of 3 degrees: 10 errors are exceeded twice in 1,000."""
    target, exact = EVIDENCE[name]
    found = evidence(target, torch.tensor([[0.5], [2.0]]), particles=256, islands=8, seed=1)
    for row, scale in enumerate((0.5, 2.0)):
        apart = abs(found.log_z.value[row] - exact(scale))
        assert apart < 10 * found.log_z.error[row]
        assert found.log_z.error[row] < 0.2
    assert found.doubts == ((), ())


@pytest.mark.statistical
@pytest.mark.parametrize("name", EVIDENCE)
def test_evidence_is_without_bias_and_its_errors_are_right(name):
    """Over 40 seeds: the mean of Z/Z* within 4 errors of 1; rms z within 0.6 and 1.6."""
    target, exact = EVIDENCE[name]
    runs = [
        evidence(target, torch.tensor([[0.5]]), particles=64, islands=16, seed=k)
        for k in range(40)
    ]
    apart = torch.stack([it.log_z.value[0] - exact(0.5) for it in runs])
    ratio = apart.exp()
    assert (ratio.mean() - 1).abs() < 4 * ratio.std() / 40**0.5
    z = apart / torch.stack([it.log_z.error[0] for it in runs])
    assert 0.6 < z.square().mean().sqrt() < 1.6


def test_evidence_of_xy_is_that_of_a_series_of_bessel_functions():
    """Side 2 has two bonds between neighbours: Z = (2π)⁴ Σ Iₙ(2/T)⁴."""
    found = evidence(XY(side=2), torch.tensor([[0.8]]), particles=128, islands=8)
    theta = torch.linspace(-math.pi, math.pi, 2_001, dtype=torch.float64)[:-1]
    n = torch.arange(-40, 41, dtype=torch.float64)
    waves = (n[:, None] * theta).cos() * (2 * theta.cos() / 0.8).exp()
    exact = 4 * LOG_2PI + waves.mean(1).pow(4).sum().log()
    assert (found.log_z.value[0] - exact).abs() < 6 * found.log_z.error[0]
    assert found.x.abs().max() <= math.pi


@pytest.mark.parametrize(("errors", "degrees", "right"), [(5.408, 7, 3.29), (4.073, 15, 3.29)])
def test_errors_of_few_islands_are_those_of_a_normal_distribution_as_rare(errors, degrees, right):
    """Student's t exceeds these 1 time in 1,000, a normal variable 3.29."""
    assert normal_errors(errors, degrees) == pytest.approx(right, abs=0.03)


def test_a_density_that_is_finite_nowhere_is_refused():
    nowhere = Density(lambda x, _: torch.full_like(x[..., 0], -math.inf), (1,))
    with pytest.raises(ValueError, match="is finite at none of"):
        evidence(nowhere, particles=16, islands=4)
    for change, told in (({"islands": 1}, "islands"), ({"width": 0.0}, "width")):
        with pytest.raises(ValueError, match=told):
            evidence(nowhere, **change)


class Gaussians(nn.Module):
    """A mixture of normal distributions, as the law of a flow and as a target."""

    def __init__(self, centres, widths, masses):
        super().__init__()
        parts = (torch.tensor(it, dtype=torch.float64) for it in (centres, widths, masses))
        self.centres, self.widths, self.masses = parts

    def forward(self):
        scale = self.widths[:, None].expand_as(self.centres)
        parts = Independent(Normal(self.centres, scale), 1)
        return MixtureSameFamily(Categorical(self.masses), parts)

    def some(self, modes, wider=1.05):
        parts = (it[list(modes)].tolist() for it in (self.centres, self.widths, self.masses))
        centres, widths, masses = parts
        return Gaussians(centres, [wider * it for it in widths], masses)

    @property
    def target(self):
        law = self.forward()
        return Density(lambda x, _: law.log_prob(x.double()), self.centres.shape[1:])


def at(*places, dimensions):
    return [[float(place)] * dimensions for place in places]


MIXTURES = {
    "6 apart": Gaussians(at(0, 6, dimensions=3), [1.0, 1.0], [0.5, 0.5]),
    "40 apart": Gaussians(at(0, 40, dimensions=2), [1.0, 1.0], [0.5, 0.5]),
    "1 percent": Gaussians(at(0, 8, dimensions=2), [1.0, 1.0], [0.99, 0.01]),
    "narrower": Gaussians(at(0, 4, dimensions=3), [1.0, 0.5], [0.5, 0.5]),
}


@pytest.fixture
def _few_particles(monkeypatch):
    monkeypatch.setattr(evaluate, "PARTICLES", ((math.inf, 128),))
    monkeypatch.setattr(evaluate, "ISLANDS", 8)


@pytest.mark.slow
@pytest.mark.usefixtures("_few_particles")
@pytest.mark.parametrize("name", MIXTURES)
def test_a_lost_mode_is_never_covered_and_a_right_flow_never_fails(name):
    whole = MIXTURES[name]
    lost = evaluate_on_target(whole.some([0]), whole.target, reference=True, draws=200)
    right = evaluate_on_target(whole.some([0, 1]), whole.target, reference=True, draws=200)
    assert lost.passed is False
    assert right.passed is not False
    assert lost.weights.ess.value > 0.95  # its own draws praise it


@pytest.mark.statistical
@pytest.mark.parametrize("name", MIXTURES)
def test_over_many_seeds_right_flows_are_covered_and_lost_modes_never(name):
    """At the particles of the default: 40 of 40 right flows pass, and no lost mode does."""
    whole = MIXTURES[name]
    for seed in range(40):
        how = {"reference": True, "draws": 200, "seed": seed}
        assert evaluate_on_target(whole.some([0]), whole.target, **how).passed is not True
        assert evaluate_on_target(whole.some([0, 1]), whole.target, **how).passed is True


@pytest.mark.usefixtures("_few_particles")
def test_a_verdict_by_particles_says_how_far_they_see_and_sees_a_lost_mode():
    whole = MIXTURES["1 percent"]
    found = evaluate_on_target(whole.some([0, 1]), whole.target, reference=True, draws=100)
    assert found.coverage[0].verdict.endswith("particles cooled from N(0, 100²) see")
    assert "Covered under the one condition measured, as far as particles" in str(found)
    lost = judge_coverage(
        whole.target, whole.some([0]), held_out=found.reference.x[0].flatten(0, 1)
    )
    assert lost.passed is False


def test_particles_that_lack_what_the_flow_has_make_coverage_unknown_and_no_failure():
    log_ratio = torch.zeros(1_000, dtype=torch.float64)
    half = Mean(torch.tensor(-math.log(2)).double(), torch.tensor(0.02).double())
    found = judge_ratios(log_ratio, log_z=half, source="particles")
    assert found.passed is None
    assert "the flow's weights add up to 2.00(4) of the Z of particles" in found.verdict
    assert judge_ratios(log_ratio, log_z=half).passed is False


def test_particles_that_cannot_be_trusted_give_no_verdict():
    log_ratio = torch.zeros(1_000, dtype=torch.float64)
    zero = Mean(torch.zeros((), dtype=torch.float64), torch.tensor(0.02).double())
    found = judge_ratios(log_ratio, log_z=zero, source="particles", doubts=("islands differ.",))
    assert (found.passed, found.verdict) == (None, "coverage unknown: islands differ.")


def needle(width, place, dimensions):
    """Half of the mass in N(0, 1), and half in a narrow normal distribution: log Z = 0."""
    return Gaussians(at(0, place, dimensions=dimensions), [1.0, width], [0.5, 0.5]).target


@pytest.mark.parametrize(("width", "place", "dimensions"), [(0.05, 8, 2), (0.01, 8, 2)])
def test_half_of_z_is_not_lost_without_a_word(width, place, dimensions):
    """By chance an island may hold the needle; then its Z is far from that of the others."""
    found = evidence(needle(width, place, dimensions))
    assert found.doubts[0] or found.log_z.value[0].abs() < 3 * found.log_z.error[0]


@pytest.mark.parametrize("gradient", [True, False])
def test_a_mode_that_particles_lack_is_found_uphill_from_a_point_and_its_mass_is_right(gradient):
    """Particles of N(0, 1) alone, whose Z is half of the whole: the needle has once their Z."""
    target, none = needle(0.05, 8, 2), torch.zeros(0, dtype=torch.float64)
    value = lambda x: target.log_prob(x, none.expand(*x.shape[:-1], 0))  # noqa: E731

    def slope(x):
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            height = value(x)
            (score,) = torch.autograd.grad(height.sum(), x)
        return height.detach(), score

    density = LogDensity(value, slope if gradient else None, lambda a, b: b - a)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 500, 2, generator=generator, dtype=torch.float64)
    starts = torch.tensor([[8.2, 7.9], [0.5, 0.5], [3.0, 1.0]], dtype=torch.float64)
    log_z = Mean(torch.tensor(-math.log(2)).double(), torch.tensor(0.02).double())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        lost = find_lost_mode(density, starts, x, log_z)
        assert find_lost_mode(density, starts[1:], x, log_z) is None
    assert lost is not None
    assert lost.particles == 0
    assert lost.x.tolist() == pytest.approx([8, 8], abs=0.1)
    assert lost.share == pytest.approx(1 - math.exp(-4), abs=0.02)  # within 8 squared widths


def test_a_needle_of_angles_is_found_as_well():
    """A well of width 0.02 has half of the mass of two angles: log Z = 2 log 2π + log 2."""

    def log_prob(x, _):
        narrow = ((x - 2).cos() - 1).sum(-1) / 0.02**2
        height = 2 * (math.log(2 * math.pi / 0.02) - LOG_2PI / 2)
        return torch.logaddexp(narrow + height, torch.zeros_like(narrow))

    found = evidence(Density(log_prob, (2,), "circle"), particles=128)
    right = abs(found.log_z.value[0] - 2 * LOG_2PI - math.log(2)) < 10 * found.log_z.error[0]
    assert right or found.doubts[0]


@pytest.mark.statistical
@pytest.mark.parametrize("name", MIXTURES)
def test_over_many_seeds_particles_that_have_all_modes_are_hardly_ever_doubted(name):
    """Four errors of a normal distribution: three rules, less than one false alarm in 1,000."""
    doubts = [
        evidence(MIXTURES[name].target, particles=256, islands=16, seed=k).doubts
        for k in range(40)
    ]
    assert sum(bool(it[0]) for it in doubts) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dimensions", [4, 10])
def test_a_funnel_is_doubted(dimensions, seed):
    """Its neck holds a part of Z that hardly a particle reaches: log Z is too low by a nat.

    Where one reaches it by chance, log Z may be right, with an error that is large.
    """

    def log_prob(x, _):  # Neal's funnel
        v, rest = x[..., 0], x[..., 1:]
        width = (dimensions - 1) * v
        return -v.square() / 18 - (rest.square().sum(-1) * (-v).exp() + width) / 2

    found = evidence(Density(log_prob, (dimensions,)), seed=seed)
    truth = math.log(3) + dimensions / 2 * LOG_2PI
    apart = (found.log_z.value[0] - truth).abs()
    assert apart > 3 * found.log_z.error[0] or found.log_z.error[0] > 0.15  # rightly so
    assert found.doubts[0]


def test_a_density_that_cannot_be_normalised_is_refused(monkeypatch):
    monkeypatch.setattr(tempering, "MAX_RUNGS", 200)  # a normal distribution takes about 60
    flat = Density(lambda x, _: torch.zeros_like(x[..., 0]), (2,))
    with pytest.raises(ValueError, match="where the density cannot be normalised"):
        evidence(flat, particles=64, islands=4)

"""What is read off log-ratios, against laws whose answers are known in closed form."""

import itertools
import math

import pytest
import torch

from rkl.sample.importance import expectation, reweight, tails_of_averages, thermodynamics
from rkl.sample.metropolis import independent_metropolis
from rkl.sample.targets import GaussianMixture
from rkl.stats import Mean


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("s", [0.1, 0.5, 1.0])
def test_normal_log_weights_obey_their_law_and_warn_of_nothing(s):
    found = reweight(3 - s**2 / 2 + s * normal(2, 100_000), sites=10)
    for mean, exact in (
        (found.log_z, 3.0),
        (found.ess, math.exp(-(s**2))),
        (found.acceptance, math.erfc(s / 2)),
        (found.v, s**2 / 10),
    ):
        assert ((mean.value - exact).abs() < 4.5 * mean.error).all()
        assert (mean.error < 0.05).all()
    assert found.warnings == []


def test_heavy_tails_are_warned_of():
    student = normal(20_000) / (normal(3, 20_000, seed=1).square().mean(0)).sqrt()
    told = reweight(student, sites=16)
    assert any("ESS departs from the law" in text for text in told.warnings)
    assert any("Pareto k" in text for text in told.warnings)
    assert told.to_dict()["warnings"] == told.warnings


def test_conditions_are_never_pooled():
    rows = torch.stack([0.1 * normal(5_000), 1.2 * normal(5_000, seed=1)])
    both = reweight(rows)
    for k in range(2):
        alone = reweight(rows[k])
        assert both.ess.value[k] == pytest.approx(alone.ess.value.item(), rel=1e-12)
    assert both.ess.value[0] > 0.98 > 0.4 > both.ess.value[1]


def test_acceptance_is_the_mean_over_all_pairs():
    log_ratio = normal(40)
    weight = log_ratio.exp()
    pairs = [min(weight[i], weight[j]) for i, j in itertools.permutations(range(40), 2)]
    brute = torch.stack(pairs).mean() / weight.mean()
    torch.testing.assert_close(reweight(log_ratio).acceptance.value, brute)


def test_acceptance_is_what_a_long_chain_accepts():
    from torch.distributions import Independent, Normal

    target, one = GaussianMixture(means=((0.0,),)), torch.ones(1, dtype=torch.float64)
    wide = Independent(Normal(0 * one, 2 * one), 1)
    chain = independent_metropolis(target, wide, one, draws=5_000, chains=20)
    x = wide.sample((20_000,))
    found = reweight(target.log_prob(x, one) - wide.log_prob(x)).acceptance
    by_chain = chain.accepted[:, 1:].double().mean(1)
    error = torch.hypot(by_chain.std() / math.sqrt(20), found.error)
    assert abs(chain.acceptance - found.value) < 4.5 * error


def test_errors_are_what_the_estimates_scatter():
    """400 repetitions tell a standard deviation to 3.5 %; the delta method adds of order 1 %."""
    rows = 0.7 * normal(400, 2_000)
    values = normal(400, 2_000, seed=1) + rows
    found = reweight(rows)
    for mean in (
        found.log_z,
        found.ess,
        found.acceptance,
        found.variance,
        expectation(values, rows),
    ):
        assert mean.error.mean() == pytest.approx(mean.value.std().item(), rel=0.15)


def test_an_expectation_is_that_of_the_target():
    """q = N(0, 1), p = N(0.5, 1): E_p x = 0.5, E_p x² = 1.25."""
    x = normal(100_000)
    log_ratio = 0.5 * x + 7
    for values, exact in ((x, 0.5), (x.square(), 1.25)):
        mean = expectation(values, log_ratio)
        assert abs(mean.value - exact) < 4.5 * mean.error


def test_draws_without_mass_count_for_nothing_but_their_number():
    log_ratio = torch.cat([torch.zeros(500), torch.full((500,), -math.inf)]).double()
    found = reweight(log_ratio, sites=16)
    assert found.log_z.value.item() == pytest.approx(math.log(0.5))
    assert found.ess.value.item() == pytest.approx(0.5)
    assert found.acceptance.value.item() == pytest.approx(0.5, abs=1e-3)
    assert math.isinf(found.variance.value)
    assert any("acceptance departs" in text for text in found.warnings)
    broken = torch.full((1_000,), math.inf).double()
    assert expectation(torch.where(log_ratio == 0, 2.0, broken), log_ratio).value == 2


def oscillators(count=20, draws=20_000, wrong=0.0):
    """E = −3 + ½ Σ x²: log Z = 3β + (n/2) log(2π T); a proposal 10 % too wide."""
    temperature = torch.linspace(0.2, 1.5, 12, dtype=torch.float64)
    scale = 1.1 * temperature[:, None, None].sqrt()
    x = scale * normal(12, draws, count)
    energy = x.square().sum(-1) / 2 - 3
    log_q = (-(x / scale).square() / 2 - scale.log() - math.log(2 * math.pi) / 2).sum(-1)
    log_p = -energy / temperature[:, None] + wrong * temperature[:, None]
    exact = 3 / temperature + count / 2 * (2 * math.pi * temperature).log()
    return thermodynamics(log_p - log_q, energy, temperature), exact, temperature


def test_thermodynamic_functions_are_those_of_oscillators():
    found, log_z, temperature = oscillators()
    energy = 10 * temperature - 3
    for mean, exact in (
        (found.log_z, log_z),
        (found.energy, energy),
        (found.free_energy, -temperature * log_z),
        (found.entropy, log_z + energy / temperature),
        (found.heat_capacity, torch.full_like(energy, 10.0)),
    ):
        assert ((mean.value - exact).abs() < 4.5 * mean.error).all()
    assert 0.4 < found.consistency < 1.8


def test_a_log_z_that_is_not_the_integral_of_the_energy_is_noticed():
    assert oscillators(wrong=0.5)[0].consistency > 3


def test_one_temperature_has_no_gap():
    found = thermodynamics(normal(1, 50), normal(1, 50), torch.ones(1))
    assert found.gap.value.shape == (0,)
    assert isinstance(found.log_z, Mean)


def test_small_weights_are_no_heavy_tail():
    """Weights in (0, 1] whose lower tail is heavy: log Z is right, and nothing is warned of."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        uniform = torch.rand(4_000, generator=generator, dtype=torch.float64)
        found = reweight((1 - (0.002 / uniform).clamp_max(0.99)).log())
        assert found.tail < 0.5
        assert found.warnings == []


def test_a_wider_proposal_in_few_coordinates_is_not_warned_of():
    """Its weights are bounded, and not normal: no law of normal log-weights is held against it."""
    generator = torch.Generator().manual_seed(0)
    x = 1.3 * torch.randn(4_000, 6, generator=generator, dtype=torch.float64)
    log_ratio = ((x / 1.3).square() - x.square()).sum(-1) / 2
    assert reweight(log_ratio, sites=6).warnings == []


@pytest.mark.parametrize(
    ("width", "heavy"),
    [(1.3, set()), (0.72, {"energy", "heat_capacity"}), (0.8, {"heat_capacity"})],
)
def test_each_quantity_has_a_tail_of_its_own(width, heavy):
    """A proposal narrower than N(0, 1)⁶: errors of the second moment of E break down first."""
    generator = torch.Generator().manual_seed(1)
    x = width * torch.randn(16_000, 6, generator=generator, dtype=torch.float64)
    log_p = -x.square().sum(-1) / 2
    log_ratio = log_p + (x / width).square().sum(-1) / 2
    one = torch.ones(1, dtype=torch.float64)
    found = thermodynamics(log_ratio[None], -log_p[None], one)
    assert {name for name, k in found.tails.items() if k > 0.7} - {"entropy"} == heavy
    mean, variance = tails_of_averages(-log_p[None], log_ratio[None])
    assert (mean == found.tails["energy"]).all()
    assert (variance == found.tails["heat_capacity"]).all()

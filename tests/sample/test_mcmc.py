"""Markov chains against exact laws: 2 x 2 by quadrature, single sites, and published energies."""

import itertools
import math
from dataclasses import dataclass

import pytest
import torch

from rkl.sample import (
    HeatBath,
    Metropolis,
    Phi4HeatBath,
    RandomWalk,
    Wolff,
    annealed_importance,
    log_z,
    markov_chain,
    mbar,
    thermodynamic_integration,
)
from rkl.sample.lattice import circle
from rkl.sample.mcmc import kernels
from rkl.sample.mcmc.walks import kernel_of
from rkl.sample.targets import XY, Density, GaussianMixture, MoG8, Phi4
from rkl.stats import jackknife

TEMPERATURES = torch.tensor([[0.2], [0.7], [1.5]], dtype=torch.float64)
KERNELS = [HeatBath(), HeatBath(over_relaxation=0), Metropolis(), RandomWalk(0.7)]


def by_quadrature(side_2, points=32):
    """log Z and the mean of E per site at 2 x 2: one angle held at 0, as E is a class function."""
    line = torch.arange(points, dtype=torch.float64) * 2 * math.pi / points
    x = torch.cartesian_prod(line, line, line)
    x = torch.cat([torch.zeros_like(x[:, :1]), x], 1)
    log_p = side_2.log_prob(x, TEMPERATURES[:, None])
    mean = (log_p.softmax(1) * side_2.energy(x, side_2.ring(TEMPERATURES[:1]))).sum(1) / 4
    return log_p.logsumexp(1) + 4 * math.log(2 * math.pi) - 3 * math.log(points), mean


def energies(model, kernel, condition=TEMPERATURES, draws=100, chains=64, **settings):
    walk = markov_chain(
        model,
        condition,
        draws=draws,
        chains=chains,
        kernel=kernel,
        measure=model.observables,
        **settings,
    )
    return jackknife(lambda mean: mean, walk.values["energy"].movedim(0, -1))


def deviations(model, kernel, **settings):
    found = energies(model, kernel, **settings)
    return ((found.value - by_quadrature(model)[1]) / found.error).abs()


@pytest.mark.parametrize("kernel", [*KERNELS, Wolff()], ids=repr)
def test_energies_of_four_sites_are_those_of_quadrature(kernel):
    # each of 3 temperatures beyond 4.5 errors once in 10⁵
    assert deviations(XY(side=2), kernel).max() < 4.5


@pytest.mark.parametrize("kernel", KERNELS, ids=repr)
def test_energies_with_ring_exchange_are_those_of_quadrature(kernel):
    assert deviations(XY(side=2, coupling=0.5, ring_exchange=1.0), kernel).max() < 4.5


@pytest.mark.slow
def test_an_odd_lattice_agrees_with_the_kernel_that_knows_no_sites():
    model = XY(side=3, ring_exchange=0.5)
    condition = TEMPERATURES[1:]
    one = energies(model, HeatBath(), condition)
    two = energies(model, RandomWalk(0.3), condition, every=5)
    assert ((one.value - two.value) / torch.hypot(one.error, two.error)).abs().max() < 4.5


def test_a_colouring_that_forgets_plaquettes_is_found_out(monkeypatch):
    colours = kernels.colours
    monkeypatch.setattr(
        kernels, "colours", lambda side, ring, device: colours(side, False, device)
    )
    model = XY(side=2, coupling=0.5, ring_exchange=1.0)
    assert deviations(model, HeatBath(over_relaxation=0)).max() > 7


@pytest.mark.parametrize(("side", "ring"), list(itertools.product(range(2, 7), (False, True))))
def test_sites_of_one_colour_share_no_bond_and_with_ring_exchange_no_plaquette(side, ring):
    colours = kernels.colours(side, ring, torch.device("cpu"))
    assert sorted(torch.cat([it.sites for it in colours]).tolist()) == list(range(side**2))
    for it in colours:
        near = [it.neighbours, it.plaquettes.flatten(1)][: 1 + ring]
        assert not torch.isin(torch.cat(near, 1), it.sites).any()


def test_the_field_of_a_site_is_that_which_its_energy_feels():
    """E(θ) as one site turns is constant − Re(conj(H) exp(iθ))."""
    model = XY(side=4, coupling=0.7, ring_exchange=0.4)
    torch.manual_seed(0)
    x = (torch.rand(16, dtype=torch.float64) * 6).requires_grad_()
    (slope,) = torch.autograd.grad(model.energy(x, 0.4), x)
    z = torch.polar(torch.ones_like(x), x.detach())[:, None]
    for it in kernels.colours(4, True, x.device):
        field = 0.7 * z[it.neighbours].sum(1) + 0.4 * kernels._of_plaquettes(z, it.plaquettes)
        turned = (field.conj() * 1j * z[it.sites]).real
        torch.testing.assert_close(-turned[:, 0], slope[it.sites])


@pytest.mark.parametrize("kappa", [0.0, 1e-3, 0.5, 3.0, 80.0, 1e4])
def test_a_try_of_von_mises_has_its_moments_and_is_mostly_taken(kappa):
    torch.manual_seed(0)
    turn, taken = circle.von_mises_try(torch.full((200_000,), kappa, dtype=torch.float64))
    assert taken.double().mean() > 0.65
    torch.testing.assert_close(turn.abs(), torch.ones_like(turn.abs()), rtol=1e-11, atol=0)
    cos, sin = turn[taken].real, turn[taken].imag
    scaled = torch.tensor(kappa, dtype=torch.float64)
    first = torch.special.i1e(scaled) / torch.special.i0e(scaled)
    second = 0.5 if kappa == 0 else 1 - first / kappa
    for values, mean in ((cos, first), (cos.square(), second), (sin, 0.0), (sin * cos, 0.0)):
        assert abs(values.mean() - mean) < 5 * values.std() / math.sqrt(len(values))


def test_over_relaxation_keeps_the_energy_and_moves():
    model = XY(side=4, ring_exchange=0.3)
    torch.manual_seed(0)
    x = torch.rand(5, 16, dtype=torch.float64) * 6
    condition = torch.ones(5, 1, dtype=torch.float64)
    moved = kernels._sweep(model, condition, x, [kernels._over_relax] * 3)
    torch.testing.assert_close(model.energy(moved, 0.3), model.energy(x, 0.3))
    assert (moved - x).abs().mean() > 0.1


@pytest.mark.parametrize("ring", [0.0, pytest.param(1.0, marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", [thermodynamic_integration, mbar, annealed_importance])
def test_log_z_of_four_sites_is_that_of_quadrature(method, ring):
    model = XY(side=2, ring_exchange=ring)
    sizes = (
        {"rungs": 48}
        if method is annealed_importance
        else {"rungs": 16, "draws": 80, "chains": 20}
    )
    found = method(model, TEMPERATURES, **sizes)
    exact = by_quadrature(model)[0]
    assert found.error.max() < 0.1
    assert ((found.value - exact) / found.error).abs().max() < 4.5
    turned = method(model, TEMPERATURES.flip(0), **sizes)  # temperatures in any order
    torch.testing.assert_close(turned.value.flip(0), found.value, rtol=0, atol=1e-9)


def half(x, condition):
    """A gamma density x² e^(−x), 0 below 0."""
    return torch.where(x[..., 0] > 0, 2 * x[..., 0].clamp_min(1e-30).log() - x[..., 0], -math.inf)


def test_chains_begin_where_the_density_is_not_0():
    gamma = Density(half, (1,))
    walk = markov_chain(gamma, draws=60, chains=200, every=5, warm_up=100)
    assert (walk.x > 0).all()
    mean = jackknife(lambda it: it, walk.x[..., 0].double())
    assert (mean.value - 3).abs() < 4.5 * mean.error
    ahead = Density(lambda x, _: torch.where(x[..., 0].cos() < 0, 0.0, -math.inf), (1,), "circle")
    assert (markov_chain(ahead, draws=2, chains=50).x.cos() < 0).all()


def test_a_start_where_the_density_is_0_is_refused():
    gamma = Density(half, (1,))
    start = torch.tensor([[1.0], [-1.0]])
    with pytest.raises(ValueError, match="start must be where the density .* 1 of 2 states"):
        markov_chain(gamma, draws=2, chains=2, start=start)
    far = Density(lambda x, _: torch.where(x[..., 0] > 50, -x[..., 0], -math.inf), (1,))
    with pytest.raises(ValueError, match="start must be given"):
        markov_chain(far, draws=2)


@pytest.mark.parametrize("method", [thermodynamic_integration, mbar, annealed_importance])
@pytest.mark.parametrize("unit", [2.0**20, 2.0**-20])
def test_log_z_does_not_depend_on_the_unit_of_energy(method, unit):
    sizes = (
        {"rungs": 8, "islands": 4} if method is annealed_importance else {"rungs": 3, "draws": 4}
    )
    found = method(XY(side=2, coupling=unit), unit * TEMPERATURES, **sizes)
    torch.testing.assert_close(found, method(XY(side=2), TEMPERATURES, **sizes))


@pytest.mark.parametrize("coupling", [1e6, -3e-7])
def test_log_z_of_other_units_is_that_of_quadrature(coupling):
    condition = abs(coupling) * TEMPERATURES
    sizes = {"rungs": 12, "draws": 20, "chains": 50}
    found = thermodynamic_integration(XY(side=2, coupling=coupling), condition, **sizes)
    exact = by_quadrature(XY(side=2))[0]  # of 4 sites the sign of J does not matter
    assert found.error.max() < 0.1
    assert ((found.value - exact) / found.error).abs().max() < 4.5


def test_a_ring_exchange_that_is_a_condition_is_that_of_the_model():
    one = annealed_importance(XY(side=2, ring_exchange=1.0), TEMPERATURES, rungs=20)
    both = torch.cat([TEMPERATURES, torch.ones_like(TEMPERATURES)], 1)
    torch.testing.assert_close(
        annealed_importance(XY(side=2, ring_exchange=None), both, rungs=20), one
    )


def test_the_quadrature_of_a_ladder_is_exact_where_energies_are():
    """E = −a/(1 + β)², whose integral is −a β/(1 + β), with its exact slope."""
    ladder = torch.linspace(0, 3, 40, dtype=torch.float64).expm1()
    first, variance = -9 / (1 + ladder) ** 2, -18 / (1 + ladder) ** 3
    mean = torch.stack([first, variance + first.square()], -1)
    found = log_z._integrate(ladder, mean, 0)
    torch.testing.assert_close(found, 9 * ladder / (1 + ladder), rtol=0, atol=1e-5)


def test_mbar_solves_its_equation_and_knows_a_gaussian_ladder():
    """E ~ N(−β s², s²) under β, so that log Z(β) − log Z(0) = β² s²/2."""
    generator = torch.Generator().manual_seed(0)
    ladder = torch.linspace(0, 2, 9, dtype=torch.float64)
    noise = torch.randn(9, 4, 500, generator=generator, dtype=torch.float64)
    energy = 2 * noise - 4 * ladder[:, None, None]
    found, error = log_z._solve_mbar(ladder, energy, torch.zeros_like(ladder))
    share = (-ladder[:, None] * energy.flatten() - found[:, None]).softmax(0).sum(1)
    torch.testing.assert_close(share, torch.full_like(share, 2_000.0), rtol=1e-8, atol=0)
    assert ((found - 2 * ladder.square())[1:] / error[1:]).abs().max() < 4.5
    assert 0.005 < error[-1] < 0.1


@pytest.mark.statistical
@pytest.mark.parametrize("method", [thermodynamic_integration, mbar, annealed_importance])
def test_errors_of_log_z_are_what_they_scatter(method):
    """Mean square z of 30 seeds, whose own error is 0.26: above 2 once in 10⁴."""
    model = XY(side=2, ring_exchange=1.0)
    sizes = {"rungs": 48} if method is annealed_importance else {"rungs": 16, "draws": 200}
    exact = by_quadrature(model)[0]
    found = [method(model, TEMPERATURES, seed=seed, **sizes) for seed in range(30)]
    z = torch.stack([(it.value - exact) / it.error for it in found])
    assert (z.square().mean(0) < 2).all()
    assert (z.square().mean(0) > 0.4).all()
    assert (z.mean(0).abs() < 4.5 / math.sqrt(30)).all()


# rows of T, energy per site and its error, |m| and its error, at 8 x 8: an independent heat bath
REFERENCE = [
    (0.050000, -1.9752384, 0.0000081, 0.9904450, 0.0000055),
    (0.372581, -1.8064963, 0.0000652, 0.9245413, 0.0000438),
    (0.695161, -1.6122812, 0.0001327, 0.8458910, 0.0000795),
    (0.888710, -1.4653078, 0.0002045, 0.7815171, 0.0001407),
    (1.082258, -1.2630040, 0.0003877, 0.6733150, 0.0003199),
    (1.340323, -0.9385045, 0.0004098, 0.4494226, 0.0003780),
    (2.050000, -0.5326349, 0.0002341, 0.2218464, 0.0001722),
]


@pytest.mark.statistical
@pytest.mark.parametrize("kernel", [HeatBath(), Wolff()], ids=repr)
def test_energies_and_magnetisations_of_8_x_8_are_the_published_ones(kernel):
    rows = torch.tensor(REFERENCE, dtype=torch.float64)
    model = XY(side=8)
    walk = markov_chain(
        model,
        rows[:, :1],
        draws=2_000,
        chains=32,
        kernel=kernel,
        every=4,
        measure=model.observables,
    )
    for name, (value, error) in {
        "energy": rows[:, 1:3].T,
        "magnetization": rows[:, 3:5].T,
    }.items():
        found = jackknife(lambda mean: mean, walk.values[name].movedim(0, -1))
        z = (found.value - value) / torch.hypot(found.error, error)
        assert z.abs().max() < 4.5
        assert z.square().mean().sqrt() < 2


def test_a_chain_goes_on_from_its_last_states_and_a_seed_repeats_it():
    model = XY(side=2)
    one, two = (markov_chain(model, torch.ones(1), draws=3, chains=2, seed=1) for _ in range(2))
    assert torch.equal(one.x, two.x)
    assert torch.equal(one.x[:, -1], one.last)
    more = markov_chain(model, torch.ones(1), draws=1, chains=2, start=one.last, warm_up=0)
    assert more.x.shape == (2, 1, 4)
    assert not torch.equal(more.x[:, 0], one.x[:, 0])


def test_targets_that_are_no_lattice_of_angles_are_walked_at_random():
    walk = markov_chain(MoG8(), torch.tensor([1.0]), draws=10, warm_up=0)
    assert walk.x.shape == (4, 10, 2)
    normal = GaussianMixture(means=((1.0,),))
    walk = markov_chain(
        normal, torch.ones(1), draws=400, chains=200, warm_up=50, kernel=RandomWalk(2.0)
    )
    assert walk.x.mean().item() == pytest.approx(1, abs=0.03)
    assert walk.x.std().item() == pytest.approx(1, abs=0.03)


def test_moves_refuse_targets_that_they_would_falsify():
    with pytest.raises(ValueError, match="ring_exchange=0 for Wolff.*HeatBath"):
        markov_chain(XY(side=2, ring_exchange=1.0), torch.ones(1), draws=1, kernel=Wolff())
    with pytest.raises(ValueError, match="ring_exchange=0 for Wolff"):
        markov_chain(XY(side=2, ring_exchange=None), torch.ones(2), draws=1, kernel=Wolff())
    with pytest.raises(TypeError, match=r"target must be XY\(...\) for this move; got Phi4"):
        markov_chain(Phi4(side=2), torch.ones(1), draws=1, kernel=HeatBath())


def dyson(target, kernel):
    """z of E[φ ∂S/∂φ] − 1 at each λ, which vanishes, by parts, in any law exp(−S)."""
    lam = torch.tensor([[1.0], [4.572], [8.0]])
    x = markov_chain(target, lam, draws=60, chains=200, kernel=kernel, every=2, warm_up=100).x
    assert x is not None
    phi = x.double().unflatten(-1, (target.side, target.side))
    around = sum(phi.roll(way, axis) for way in (1, -1) for axis in (-1, -2))
    cubic = lam.double()[:, None, None, :, None] * phi.pow(3)
    slope = 2 * (4 + target.mass_squared) * phi + 4 * cubic - 2 * around
    per_chain = ((phi * slope).mean((-1, -2)) - 1).mean(-1)
    error = per_chain.std(-1) / math.sqrt(per_chain.shape[-1])
    return (per_chain.mean(-1) / error).abs()


@dataclass(frozen=True)
class Unlike:
    """The heat bath of another mass."""

    def move(self, target, condition, x, sweeps):
        other = Phi4(target.side, target.mass_squared + 0.1)
        return Phi4HeatBath().move(other, condition, x, sweeps)


@pytest.mark.slow
@pytest.mark.parametrize("side", [2, 3, 8])
@pytest.mark.parametrize("mass_squared", [-4.0, -6.0])
def test_the_heat_bath_of_phi4_samples_its_law(side, mass_squared):
    """A z of 4.5 is exceeded once in 150,000. The heat bath of another mass must fail."""
    target = Phi4(side, mass_squared)
    assert dyson(target, Phi4HeatBath()).max() < 4.5
    assert dyson(target, Unlike()).max() > 6


def test_the_heat_bath_of_phi4_is_the_default_and_for_phi4_alone():
    assert isinstance(kernel_of(Phi4(side=4), None), Phi4HeatBath)
    with pytest.raises(TypeError, match=r"target must be Phi4\(...\) for this move; got XY"):
        markov_chain(XY(side=2), torch.ones(1), draws=1, kernel=Phi4HeatBath())

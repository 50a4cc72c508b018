"""Targets: their densities against brute force, their normalisers, and what they refuse."""

import math
from dataclasses import dataclass

import pytest
import torch

from rkl.sample import targets
from rkl.sample.targets import XY, GaussianMixture, MoG8, Phi4, Rings, check_target, parse_target

EXAMPLES = {
    "xy": XY(side=4),
    "gaussian-mixture": GaussianMixture(means=((0.0, 1.0), (3.0, 0.0)), weights=(1.0, 2.0)),
    "phi4": Phi4(side=4),
}
OF_TWO = [XY(side=4, ring_exchange=None), XY(side=3, coupling=-0.5, ring_exchange=0.7)]


def example(name):
    return EXAMPLES[name] if name in EXAMPLES else targets.catalogue()[name]()


OURS = [name for name, it in targets.catalogue().items() if it.__module__.startswith("rkl.")]


@pytest.mark.parametrize("name", OURS)
def test_every_target_obeys_the_laws_and_is_read_from_its_repr(name):
    target = example(name)
    check_target(target)
    assert parse_target(repr(target)) == target


@pytest.mark.parametrize("target", OF_TWO, ids=repr)
def test_xy_of_other_settings_obeys_the_laws(target):
    check_target(target)


def energy_by_loops(target, theta, ring):
    side = target.side
    at = lambda i, j: theta[(i % side) * side + j % side].item()  # noqa: E731
    total = 0.0
    for i in range(side):
        for j in range(side):
            for near in (at(i + 1, j), at(i, j + 1)):
                total -= target.coupling * math.cos(at(i, j) - near)
            around = at(i, j) - at(i, j + 1) + at(i + 1, j + 1) - at(i + 1, j)
            total -= ring * math.cos(around)
    return total


@pytest.mark.parametrize("side", [2, 3, 4])
@pytest.mark.parametrize("ring", [0.0, 0.7])
def test_the_energy_of_xy_is_the_sum_over_bonds_and_plaquettes(side, ring):
    target = XY(side=side, coupling=1.3, ring_exchange=ring)
    theta = torch.linspace(-3, 2, side**2, dtype=torch.float64).square()
    expected = energy_by_loops(target, theta, ring)
    condition = torch.tensor([0.8], dtype=torch.float64)
    assert target.log_prob(theta, condition).item() == pytest.approx(-expected / 0.8)
    both = XY(side=side, coupling=1.3, ring_exchange=None)
    condition = torch.tensor([0.8, ring], dtype=torch.float64)
    assert both.log_prob(theta, condition).item() == pytest.approx(-expected / 0.8)


def test_the_bonds_of_side_two_are_eight():
    assert XY(side=2).energy(torch.zeros(4)).item() == -8


def test_a_vortex_and_its_partner_are_seen_where_they_are():
    side, centre, partner = 8, (2.5, 2.5), (5.5, 5.5)
    i, j = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angle = lambda at: torch.atan2(i - at[0], j - at[1])  # noqa: E731
    theta = (angle(centre) - angle(partner)).flatten().double()
    vorticity = XY(side=side).vorticity(theta).reshape(side, side)
    assert vorticity[2, 2] == 1
    assert vorticity[5, 5] == -1
    assert vorticity.sum() == 0


def test_a_spiral_winds_once_and_has_no_vortex():
    target = XY(side=6)
    column = 2 * math.pi / 6 * torch.arange(6, dtype=torch.float64)
    theta = column.repeat(6)
    assert target.winding(theta).tolist() == pytest.approx([1, 0])
    measured = target.observables(theta, torch.ones(1, dtype=torch.float64))
    assert measured["vortices"] == 0
    assert measured["magnetization"] < 1e-12


def test_the_helicity_is_the_second_derivative_of_the_free_energy_in_a_twist():
    """Of the 2 x 2 lattice, by quadrature: F(twist per bond) on a grid of three angles."""
    target, temperature, points = XY(side=2), 0.9, 24
    grid = torch.arange(points, dtype=torch.float64) * (2 * math.pi / points)
    theta = torch.cartesian_prod(torch.zeros(1, dtype=torch.float64), grid, grid, grid)

    def log_z(twist):
        square = theta.unflatten(-1, (2, 2))
        across = (square - square.roll(-1, -1) + twist).cos()
        down = (square - square.roll(-1, -2)).cos()
        return ((across + down).sum((-1, -2)) / temperature).logsumexp(0)

    h = 1e-3
    curvature = (log_z(h) - 2 * log_z(0.0) + log_z(-h)) / h**2
    expected = -temperature * curvature / 4
    condition = torch.full((len(theta), 1), temperature, dtype=torch.float64)
    weights = target.log_prob(theta, condition).softmax(0)
    measured = (weights * target.observables(theta, condition)["helicity"]).sum()
    assert measured.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("target", [MoG8(), EXAMPLES["gaussian-mixture"], Rings()], ids=repr)
def test_targets_of_the_plane_integrate_to_one(target):
    line = torch.linspace(-8, 8, 1601, dtype=torch.float64)
    x = torch.cartesian_prod(line, line)
    scale = torch.tensor([0.15], dtype=torch.float64)
    total = target.log_prob(x, scale.expand(len(x), 1)).exp().sum() * 0.01**2
    assert total.log().item() == pytest.approx(target.log_normaliser(scale).item(), abs=1e-3)


@pytest.mark.parametrize(("spacing", "scale"), [(0.3, 0.2), (1.0, 0.5)])
def test_log_z_and_draws_of_rings_that_reach_the_origin_are_those_of_quadrature(spacing, scale):
    target = Rings(spacing=spacing)
    r = (torch.arange(80_000, dtype=torch.float64) + 0.5) * 1e-4
    x, at = torch.stack([r, 0 * r], -1), torch.tensor([scale], dtype=torch.float64)
    mass = (target.log_prob(x, at.expand(len(r), 1)) + (2 * math.pi * r).log()).exp() * 1e-4
    known = target.log_normaliser(at).item()
    assert known == pytest.approx(mass.sum().log().item(), abs=2e-4)  # it has no pole at 0
    torch.manual_seed(0)
    drawn = target.sample(at, (20_000,)).norm(dim=-1)
    share = (mass[r < spacing / 2].sum() / mass.sum()).item()
    error = math.sqrt(share / 20_000)
    assert (drawn < spacing / 2).double().mean().item() == pytest.approx(share, abs=4 * error)


@pytest.mark.parametrize("target", [XY(side=4), MoG8(), Rings()], ids=repr)
def test_modes_of_a_batch_are_those_of_each(target):
    torch.manual_seed(0)
    x = 2 * torch.randn(3, 2, *target.event_shape, dtype=torch.float64)
    condition = torch.ones(3, 2, len(target.conditions), dtype=torch.float64)
    together = target.modes(x, condition)
    assert together.labels.shape == (3, 2)
    for i in range(3):
        for j in range(2):
            alone = target.modes(x[i, j], condition[i, j])
            assert alone.names[alone.labels] == together.names[together.labels[i, j]]


def test_the_action_of_phi4_of_a_constant_field_is_its_potential():
    field = torch.full((16,), 0.5, dtype=torch.float64)
    action = -Phi4(side=4).log_prob(field, torch.tensor([5.0], dtype=torch.float64))
    assert action.item() == pytest.approx(16 * (-4 * 0.25 + 5 * 0.0625))


def half_turn(x, condition):
    return torch.cos(x / 2).sum(-1)


def quadratic(x, condition):
    return -(x.square() * condition).sum(-1)


def test_any_function_is_a_target_from_the_command_line():
    spelt = f"{__name__}:quadratic(event_shape=(3,), conditions={{'k': (0.5, 2.0)}})"
    target = parse_target(spelt)
    check_target(target)
    assert parse_target(repr(target)) == target
    assert target.conditions == (targets.Condition("k", 0.5, 2.0),)


def test_a_function_without_the_period_of_the_circle_is_found_out():
    target = targets.Density(half_turn, (2,), "circle")
    with pytest.raises(AssertionError, match="period"):
        check_target(target)


@dataclass(frozen=True)
class Broken(GaussianMixture):
    """A mixture that draws from another law, or measures without units."""

    means: tuple = ((0.0,), (2.0,))
    fault: str = "sampler"

    def sample(self, condition, shape=()):
        x = super().sample(condition, shape)
        return x + 0.2 if self.fault == "sampler" else x

    def observables(self, x, condition):
        return {"x": x[..., 0]} if self.fault == "units" else {}

    def log_prob(self, x, condition):
        value = super().log_prob(x, condition)
        return value - value.mean() if self.fault == "batch" else value


@pytest.mark.parametrize(
    ("fault", "law"), [("sampler", "do not follow"), ("units", "has units"), ("batch", "mixes")]
)
def test_a_target_that_breaks_a_law_is_found_out(fault, law):
    with pytest.raises(AssertionError, match=law):
        check_target(Broken(fault=fault))

"""Flows of angles that are no lattice, against sums over grids."""

import math

import pytest
import torch

from rkl.flows import CircularSplines
from rkl.sample import CoarseToFine, evaluate_on_target, fit_to_target
from rkl.sample.architecture import default_architecture
from rkl.sample.targets import XY, Condition, Density

TEMPERATURES = (Condition("T", 0.5, 1.0),)


def torsions(x, condition):
    a, b = x[..., 0], x[..., 1]
    energy = 2 * (3 * a).cos() + 1.5 * (3 * b).cos() + (a - b).cos() + 0.5 * a.sin()
    return energy / condition[..., 0]


def bonds(x, condition):
    theta = x.unflatten(-1, (4, 4))
    energy = (theta - theta.roll(1, -1)).cos() + (theta - theta.roll(1, -2)).cos()
    return energy.sum((-1, -2)) / condition[..., 0]


def in_a_field(x, condition):
    return bonds(x, condition) + 0.5 * x.cos().sum(-1) / condition[..., 0]


def grid(points):
    angle = 2 * math.pi * torch.arange(points, dtype=torch.float64) / points - math.pi
    return torch.cartesian_prod(angle, angle), 2 * math.log(2 * math.pi / points)


def test_its_density_has_the_period_of_angles_and_integrates_to_one():
    torch.manual_seed(0)
    law = CircularSplines(transforms=2, hidden=(8,)).build((2,))()
    x, log_cell = grid(200)
    x = x.float() + 0.01  # not on the seam, where the density has a jump
    log_q = law.log_prob(x)
    # splines have kinks in their slope, and points of a grid beside them
    assert (log_q.double().logsumexp(0) + log_cell).exp().item() == pytest.approx(1, abs=1e-3)
    turned = law.log_prob(x + 2 * math.pi)
    inner = x.abs().amax(-1) < 3.1
    torch.testing.assert_close(turned[inner], log_q[inner], rtol=0, atol=1e-3)
    drawn = law.sample((100,))
    assert drawn.abs().max() <= math.pi


def test_angles_of_ones_own_have_a_flow_of_angles_that_suits_them():
    lattice = Density(bonds, (16,), "circle", TEMPERATURES)
    assert default_architecture(lattice) == CoarseToFine(integrate="none")
    for target in (
        Density(in_a_field, (16,), "circle", TEMPERATURES),
        Density(torsions, (2,), "circle", TEMPERATURES),
        Density(torsions, (12,), "circle", TEMPERATURES),
    ):
        assert isinstance(default_architecture(target), CircularSplines)


def test_angles_are_fitted_beside_particles_that_keep_all_wells():
    """Nine wells; after few steps log Z is within 5 of its errors at both temperatures."""
    target = Density(torsions, (2,), "circle", TEMPERATURES)
    architecture = CircularSplines(transforms=1, hidden=(16,))
    flow = fit_to_target(architecture, target, steps=30, batch=128, strata=8).flow
    condition = torch.tensor([[0.5], [1.0]])
    log_z = evaluate_on_target(flow, target, condition, draws=500).thermodynamics.log_z
    x, log_cell = grid(180)
    for row, value in enumerate(condition.double()):
        exact = target.log_prob(x, value.expand(len(x), 1)).logsumexp(0) + log_cell
        assert (log_z.value[row] - exact).abs() < 5 * log_z.error[row]
        assert log_z.error[row] < 0.2


def test_relative_splines_have_a_common_turn_as_a_symmetry_and_integrate_to_one():
    """Over 200 x 200 points of the torus; a spline of 8 bins is smooth between them."""
    torch.manual_seed(0)
    law = CircularSplines(transforms=2, hidden=(8,), relative=True).build((2,))()
    angle = math.pi * (2 * (torch.arange(200) + 0.5) / 200 - 1)
    x = torch.cartesian_prod(angle, angle)
    integral = law.log_prob(x).exp().mean() * (2 * math.pi) ** 2
    assert integral.item() == pytest.approx(1, abs=0.01)
    turned = law.log_prob(x + 1.0)
    assert ((turned - law.log_prob(x)).abs() < 1e-3).float().mean() > 0.98  # knots apart
    drawn = law.sample((5,))
    assert drawn.shape == (5, 2)
    assert drawn.abs().max() <= math.pi


def test_lattices_of_other_sides_get_splines_that_know_no_direction():
    for side in (3, 5, 6, 10):
        assert default_architecture(XY(side=side)) == CircularSplines(passes=2, relative=True)
    ring = Density(lambda x, _: (x - x.roll(1, -1)).cos().sum(-1), (5,), "circle")
    assert default_architecture(ring) == CircularSplines(relative=True)
    in_a_field = Density(lambda x, _: x.cos().sum(-1), (5,), "circle")
    assert default_architecture(in_a_field) == CircularSplines()

"""The order in which sites are drawn, and the laws of one angle."""

import math

import pytest
import torch

from rkl.sample.lattice import circle, ordering
from rkl.sample.targets import XY

SIDES = [2, 4, 8, 16]


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(
    ("integrate", "share"), [("half", 1 / 2), ("quarter", 1 / 4), ("none", 0)]
)
def test_every_site_is_drawn_once_and_looks_only_at_what_is_drawn(side, integrate, share):
    order = ordering.ordering(side, integrate)
    assert sorted(order.site.tolist()) == list(range(side**2))
    assert order.integrated == share * side**2
    drawn = 1
    for step in order.passes:
        assert step.near.max() < drawn
        drawn += step.sites
    assert drawn + order.integrated == side**2


@pytest.mark.parametrize("side", [8, 16])
def test_the_four_nearest_come_first_and_sites_of_a_colour_see_alike(side):
    order = ordering.ordering(side, "half")
    at = 1
    for step in order.passes:
        if step.size < 3:
            at += step.sites
            continue
        for k in range(step.sites):
            here = divmod(order.site[at + k].item(), side)
            places = [divmod(order.site[r].item(), side) for r in step.near[:, k].tolist()]
            square = [
                sum(
                    min((a - b) % side, (b - a) % side) ** 2 for a, b in zip(here, it, strict=True)
                )
                for it in places
            ]
            assert max(square[:4]) == min(square)
        at += step.sites


def test_a_wrong_colouring_is_refused():
    odd = ordering.sites_to_integrate(4, "half")
    ordering.check_colouring(4, odd, ring=False)
    with pytest.raises(ValueError, match="share a bond"):
        ordering.check_colouring(4, odd | {0}, ring=False)
    with pytest.raises(ValueError, match="share a plaquette"):
        ordering.check_colouring(4, odd, ring=True)


@pytest.mark.parametrize("side", [3, 6, 12, 1])
def test_a_side_that_cannot_be_built_is_refused_with_those_that_can(side):
    with pytest.raises(ValueError, match=r"side must be a power of two .* Sides \d+ and \d+"):
        ordering.ordering(side, "half")


@pytest.mark.parametrize(("integrate", "ring"), [("half", 0.0), ("quarter", 0.8)])
def test_given_the_others_an_integrated_site_interacts_with_its_neighbours_alone(integrate, ring):
    target, order = XY(side=4, ring_exchange=ring), ordering.ordering(4, integrate)
    theta = torch.randn(16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mixed = torch.func.hessian(target.energy)(theta, ring)
    sites = order.site[-order.integrated :]
    block = mixed[sites][:, sites]
    assert (block - block.diag().diag()).abs().max() < 1e-12


def laws(knots=12, count=6, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    correction = torch.randn(knots, count, generator=generator, dtype=torch.float64)
    kappa = torch.logspace(-2, 2, count, dtype=torch.float64)
    return circle.near_von_mises(correction.to(dtype), kappa.to(dtype))


def test_a_bent_law_integrates_to_one():
    theta = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000 * 2 * math.pi - math.pi
    law = laws()
    for k in range(6):
        one = circle.SplineDensity(
            law.weight[:, k : k + 1].expand(-1, 20000), law.warp[k].expand(20000)
        )
        total = circle.log_density(one, theta.cos(), theta.sin()).exp().mean() * 2 * math.pi
        assert total.item() == pytest.approx(1, abs=1e-7)


def test_a_bent_law_is_continuous_with_its_slope_across_the_seam():
    law = laws()
    near = torch.tensor([-1e-6, -1e-9, 1e-9, 1e-6, 0.0], dtype=torch.float64)
    theta = (math.pi + near)[:, None].expand(5, 6)
    density = [circle.log_density(law, it.cos(), it.sin()) for it in theta]
    exactly = circle.log_density(law, torch.full_like(law.warp, -1), torch.zeros_like(law.warp))
    assert (density[1] - density[2]).abs().max() < 1e-5
    assert torch.allclose(density[4], exactly, atol=1e-9)
    slopes = (density[1] - density[0]) / (1e-6 - 1e-9), (density[3] - density[2]) / (1e-6 - 1e-9)
    assert torch.allclose(*slopes, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("theta", [0.0, math.pi, -math.pi, math.pi / 2, 1e-12])
def test_no_gradient_is_lost_at_seams(theta):
    correction = torch.zeros(12, 1, dtype=torch.float64, requires_grad=True)
    kappa = torch.tensor([3.0], dtype=torch.float64, requires_grad=True)
    angle = torch.tensor([theta], dtype=torch.float64, requires_grad=True)
    law = circle.near_von_mises(correction, kappa)
    circle.log_density(law, angle.cos(), angle.sin()).sum().backward()
    for it in (correction, kappa, angle):
        assert it.grad is not None
        assert it.grad.isfinite().all()


@pytest.mark.parametrize("knots", [5, 12])
def test_positions_move_with_the_parameters_as_the_distribution_function_says(knots):
    """d E[f(θ)]/d parameter by the path, against the derivative of an integral."""
    torch.manual_seed(0)
    correction = torch.randn(knots, 1, dtype=torch.float64)
    way = torch.randn(knots, 1, dtype=torch.float64)
    kappa = torch.tensor([0.7], dtype=torch.float64)
    theta = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000 * 2 * math.pi - math.pi

    def f(cosine, sine):
        return cosine + 0.5 * sine + sine * cosine

    def mean(step):
        law = circle.near_von_mises((correction + step * way).expand(-1, 4000), kappa.expand(4000))
        weight = circle.log_density(law, theta.cos(), theta.sin()).exp() * (2 * math.pi / 4000)
        return (weight * f(theta.cos(), theta.sin())).sum()

    expected = (mean(1e-5) - mean(-1e-5)) / 2e-5
    draws = 200_000
    step = torch.zeros((), dtype=torch.float64, requires_grad=True)
    law = circle.near_von_mises((correction + step * way).expand(-1, draws), kappa.expand(draws))
    position = circle.reparameterise(law, circle.draw(law))
    values = f(*circle.angles(law, position))
    (slope,) = torch.autograd.grad(values.mean(), step)
    assert slope.item() == pytest.approx(expected.item(), abs=0.01)


def test_von_mises_draws_have_their_moments():
    """E cos θ = I₁/I₀ and var sin θ = E cos θ/κ; within 5 standard errors."""
    torch.manual_seed(0)
    kappa = torch.tensor([0.0, 1e-3, 0.5, 4.0, 80.0])[:, None].expand(-1, 200_000)
    theta = circle.von_mises(kappa)
    assert theta.dtype == kappa.dtype
    ratio = torch.special.i1e(kappa) / torch.special.i0e(kappa)
    cosine = theta.double().cos()
    error = cosine.std(1) / 200_000**0.5
    assert ((cosine.mean(1) - ratio[:, 0]).abs() < 5 * error).all()
    assert (theta.double().sin().mean(1).abs() < 5 / 200_000**0.5).all()

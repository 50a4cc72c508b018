"""The checkerboard RealNVP: its size, its inverse, and its density."""

import math

import pytest
import torch

from rkl.sample.fit import fit_to_target
from rkl.sample.lattice import CheckerboardRealNVP
from rkl.sample.targets import Phi4


def built(side, circle):
    torch.manual_seed(0)
    flow = CheckerboardRealNVP(couplings=4, filters=4, circle=circle)
    return flow.build((side**2,), 1).double()


def test_the_full_size_and_the_small_one_have_their_parameters():
    for filters, parameters in ((64, 314_384), (16, 23_312)):
        flow = CheckerboardRealNVP(filters=filters).build((64,), 1)
        assert sum(p.numel() for p in flow.parameters()) == parameters


@pytest.mark.parametrize("circle", [True, False])
def test_decoding_undoes_encoding_with_the_opposite_jacobian(circle):
    flow = built(4, circle)
    x, condition = torch.randn(5, 16, dtype=torch.float64), torch.rand(5, 1, dtype=torch.float64)
    latent, there = flow.encode(x, condition)
    back, here = flow.decode(latent, condition)
    assert (back - x).abs().max() < 1e-5
    assert torch.allclose(there, -here, atol=1e-8)


def test_the_jacobian_is_that_of_the_map():
    flow, condition = built(2, True), torch.ones(1, 1, dtype=torch.float64)
    x = torch.randn(1, 4, dtype=torch.float64)
    matrix = torch.func.jacrev(lambda it: flow.encode(it[None], condition)[0][0])(x[0])
    assert flow.encode(x, condition)[1].item() == pytest.approx(matrix.slogdet()[1].item())


def test_on_the_circle_it_integrates_to_one():
    points = 22
    grid = (torch.arange(points, dtype=torch.float64) + 0.5) / points * 2 * math.pi - math.pi
    x = torch.cartesian_prod(grid, grid, grid, grid)
    with torch.no_grad():
        density = built(2, True)(torch.ones(1, dtype=torch.float64)).log_prob(x).exp()
    assert density.mean().item() * (2 * math.pi) ** 4 == pytest.approx(1, abs=5e-3)


def test_no_gradient_is_lost_where_the_circle_is_cut():
    flow = built(4, True)
    x = torch.tensor([math.pi, -math.pi] * 8, dtype=torch.float64)
    flow(torch.ones(1, dtype=torch.float64)).log_prob(x).backward()
    assert all(p.grad.isfinite().all() for p in flow.parameters())


def test_it_learns_a_field_on_the_line():
    flow = CheckerboardRealNVP(couplings=4, filters=8, circle=False)
    fit = fit_to_target(flow, Phi4(side=4), torch.tensor([[8.0]]), steps=150, batch=64, every=20)
    assert fit.training.history[-1]["ess"] > fit.training.history[0]["ess"]
    assert fit.training.history[-1]["ess"] > 0.2


@pytest.mark.parametrize("shape", [(9,), (15,), (4, 4)])
def test_a_lattice_without_a_checkerboard_is_refused(shape):
    with pytest.raises(ValueError, match="checkerboard"):
        CheckerboardRealNVP().build(shape, 1)

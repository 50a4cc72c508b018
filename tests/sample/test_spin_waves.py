"""What a lattice flow knows before it is trained: spin waves, by linear algebra of other kinds."""

import pytest
import torch

from rkl.sample.lattice import CoarseToFine
from rkl.sample.lattice.ordering import ordering
from rkl.sample.lattice.spin_waves import spin_waves
from rkl.sample.targets import XY

KINDS = [("half", 0.0), ("quarter", 0.8)]


def given_all(order, target, row, seen):
    """Mean and variance of a row given others, from the Hessian of the energy at order."""
    zero = torch.zeros(len(order.site), dtype=torch.float64)
    energy = torch.func.hessian(lambda x: target.energy(x, target.ring_exchange))(zero)
    energy = energy[order.site][:, order.site]
    unseen = [k for k in range(len(zero)) if k not in seen and k != row]
    keep = [row, *seen]
    inner = torch.linalg.solve(energy[unseen][:, unseen], energy[unseen][:, keep])
    schur = energy[keep][:, keep] - energy[keep][:, unseen] @ inner
    return -schur[0, 1:] / schur[0, 0], 1 / schur[0, 0].item()


@pytest.mark.parametrize(("integrate", "ring"), KINDS)
def test_spin_waves_are_what_the_hessian_leaves_of_the_other_sites(integrate, ring):
    """The variance is that given what is looked at, and little above that given all."""
    order = ordering(8, integrate)
    at, excess = 1, 0.0
    for step, wave in zip(order.passes, spin_waves(order, ring), strict=True):
        seen = sorted(set(step.near[:, 0].tolist()))
        weights, variance = given_all(order, XY(side=8, ring_exchange=ring), at, seen)
        total = torch.zeros(at, dtype=torch.float64).index_add(0, step.near[:, 0], wave.weights)
        assert torch.allclose(total[seen], weights, atol=1e-6)
        assert wave.variance == pytest.approx(variance, rel=1e-6)
        _, least = given_all(order, XY(side=8, ring_exchange=ring), at, list(range(at)))
        excess += step.sites * (variance / least - 1)
        at += step.sites
    assert excess / 64 < 3e-4


@pytest.mark.parametrize(("integrate", "ring"), KINDS)
def test_all_sites_of_a_pass_have_the_same_spin_waves(integrate, ring):
    order, at = ordering(8, integrate), 1
    for step, wave in zip(order.passes, spin_waves(order, ring), strict=True):
        near = step.near[:, -1]
        seen = sorted(set(near.tolist()))
        weights, _ = given_all(order, XY(side=8, ring_exchange=ring), at + step.sites - 1, seen)
        total = torch.zeros(at, dtype=torch.float64).index_add(0, near, wave.weights)
        assert torch.allclose(total[seen], weights, atol=1e-6)
        at += step.sites


@pytest.mark.parametrize("side", [8, 16])
def test_an_untrained_flow_is_nearly_right_at_low_temperature(side):
    """v is below 0.002, as it is not where what a site looks at lacks one that it should see."""
    torch.manual_seed(0)
    target = XY(side=side)
    flow = CoarseToFine.of(target).build(target.event_shape)
    condition = torch.full((2000, 1), 0.02)
    x, log_q = flow(condition).sample_and_log_prob()
    weight = target.log_prob(x, condition) - log_q
    assert weight.var() / side**2 < 0.002

"""The coarse-to-fine flow of a field: its density, its symmetry, and log Z of a free field."""

import math

import pytest
import torch
from torch.distributions import Normal

from rkl.flows import fit_to_target, reweight
from rkl.flows.lattice import CoarseToFineField
from rkl.flows.targets import Phi4

SMALL = CoarseToFineField(width=8, bins=4)


def disturbed(side, architecture=SMALL):
    """A flow that is not as it begins, in double precision."""
    torch.manual_seed(0)
    flow = architecture.build((side**2,), 1)
    with torch.no_grad():
        for it in flow.parameters():
            it.add_(0.2 * torch.randn_like(it))
    return flow.double()


@pytest.mark.parametrize("side", [2, 4, 8])
def test_the_density_of_draws_is_that_at_which_they_were_drawn(side):
    law = disturbed(side)(torch.tensor([[4.5], [6.0]]).double())
    x, log_q = law.sample_and_log_prob((50,))
    assert x.shape == (50, 2, side**2)
    assert (law.log_prob(x) - log_q).abs().max() < 1e-10
    assert (law.log_prob(-x) - log_q).abs().max() < 1e-10


def test_the_density_integrates_to_one():
    """At side 2, by draws of an even mixture of the law and of a wider one: to 5 errors."""
    torch.manual_seed(1)
    condition = torch.full((100_000, 1), 5.0).double()
    law, wide = disturbed(2)(condition), Normal(0.0, 1.5)
    x = torch.where(torch.rand(len(condition), 1) < 0.5, law.sample(), wide.sample((100_000, 4)))
    with torch.no_grad():
        log_q = law.log_prob(x)
    log_mixed = torch.logaddexp(log_q, wide.log_prob(x).sum(-1)) - math.log(2)
    weight = (log_q - log_mixed).exp()
    error = weight.std().item() / math.sqrt(len(weight))
    assert error < 0.005
    assert abs(weight.mean().item() - 1) < 5 * error


def test_on_a_path_the_parameters_do_not_move_the_density():
    """The mean of the path gradient is that of the whole; 5 errors of 60 repetitions."""
    target, condition = Phi4(side=2), torch.full((256, 1), 5.0).double()
    flow, found = disturbed(2), {True: [], False: []}
    for path in found:
        torch.manual_seed(0)
        for _ in range(60):
            rows, log_q = flow.drawn(condition, path)
            x = rows[flow.ordering.site.argsort()].T
            loss = (log_q - target.log_prob(x, condition)).mean()
            found[path].append(torch.autograd.grad(loss, flow.origin)[0])
    one, other = (torch.stack(it) for it in found.values())
    error = torch.hypot(one.std(0), other.std(0)) / math.sqrt(60)
    assert ((one - other).mean(0).abs() < 5 * error + 1e-9).all()


def test_log_z_of_a_free_field_is_that_of_its_modes():
    """Z = Π √(π/(k̂² + m²)) over the momenta, for λ = 0."""
    side = 2
    target = Phi4(side=side, mass_squared=1.0)
    condition = torch.zeros(1, 1)
    fit = fit_to_target(SMALL, target, condition, steps=250, batch=64, anneal=False)
    torch.manual_seed(0)
    with torch.no_grad():
        x, log_q = fit.flow(condition[0]).sample_and_log_prob((4000,))
    found = reweight(target.log_prob(x, condition.expand(4000, 1)) - log_q)
    momentum = 4 * (math.pi * torch.arange(side).double() / side).sin().square()
    modes = momentum[:, None] + momentum + 1.0
    exact = (math.pi / modes).log().sum().item() / 2
    assert found.ess.value > 0.9
    assert abs(found.log_z.value.item() - exact) < 4 * found.log_z.error.item() + 1e-3


def test_a_larger_lattice_starts_from_a_smaller_one():
    small, large = disturbed(4), CoarseToFineField(width=8, bins=4).build((64,), 1).double()
    large.start_from(small)
    assert torch.equal(large.origin, small.origin)
    for mine, theirs in zip(large.sites, small.sites, strict=True):
        assert torch.equal(mine.second, theirs.second)
        assert torch.equal(mine.level[: len(theirs.level)], theirs.level)
    with pytest.raises(ValueError, match="other must be a flow of"):
        large.start_from(CoarseToFineField(width=16).build((16,), 1))


def test_what_cannot_be_built_is_refused():
    with pytest.raises(ValueError, match="square lattice"):
        SMALL.build((12,), 1)
    with pytest.raises(ValueError, match="power of two"):
        SMALL.build((36,), 1)
    with pytest.raises(ValueError, match=r"condition must be \[\*batch, 1\]"):
        SMALL.build((16,), 1)(torch.ones(3, 2))

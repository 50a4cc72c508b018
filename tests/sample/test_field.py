"""The coarse-to-fine flow of a field: its density, its symmetry, and log Z of a free field."""

import math

import pytest
import torch
from torch.distributions import Normal

from rkl.sample import fit_to_target, independent_metropolis, reweight
from rkl.sample.lattice import CoarseToFineField
from rkl.sample.targets import Phi4

SMALL = CoarseToFineField(width=8, bins=4)
EXACT = CoarseToFineField.of(Phi4(side=2), width=8, bins=4)
BOTH = pytest.mark.parametrize("architecture", [SMALL, EXACT], ids=["all", "half"])


def disturbed(side, architecture=SMALL):
    """A flow that is not as it begins, in double precision."""
    torch.manual_seed(0)
    flow = architecture.build((side**2,), 1)
    with torch.no_grad():
        for it in flow.parameters():
            it.add_(0.2 * torch.randn_like(it))
    return flow.double()


@BOTH
@pytest.mark.parametrize("side", [2, 4, 8])
def test_the_density_of_draws_is_that_at_which_they_were_drawn(side, architecture):
    law = disturbed(side, architecture)(torch.tensor([[4.5], [6.0]]).double())
    x, log_q = law.sample_and_log_prob((50,))
    assert x.shape == (50, 2, side**2)
    assert (law.log_prob(x) - log_q).abs().max() < 1e-10
    assert (law.log_prob(-x) - log_q).abs().max() < 1e-10


@BOTH
def test_the_density_integrates_to_one(architecture):
    """At side 2, by draws of an even mixture of the law and of a wider one: to 5 errors."""
    torch.manual_seed(1)
    condition = torch.full((100_000, 1), 5.0).double()
    law, wide = disturbed(2, architecture)(condition), Normal(0.0, 1.5)
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
            rows, log_q = flow.draw(condition, path)
            x = rows[flow.ordering.site.argsort()].T
            loss = (log_q - target.log_prob(x, condition)).mean()
            found[path].append(torch.autograd.grad(loss, flow.origin)[0])
    one, other = (torch.stack(it) for it in found.values())
    error = torch.hypot(one.std(0), other.std(0)) / math.sqrt(60)
    assert ((one - other).mean(0).abs() < 5 * error + 1e-9).all()


@pytest.mark.parametrize("beta", [1.0, 0.4])
def test_the_path_where_half_of_the_sites_are_integrated(beta):
    """Its gradient is that of the reverse KL of the other half from the marginal of p^β.

    The marginal by quadrature over the two integrated sites; 5 errors of 60 repetitions.
    """
    target, condition = Phi4(side=2), torch.full((256, 1), 5.0).double()
    flow = disturbed(2, EXACT)
    grid = torch.linspace(-3, 3, 241).double()

    def log_marginal(rows):
        x = rows.T.new_zeros(len(condition), 241, 4)
        x[..., flow.ordering.site[:2]] = rows.T[:, None]
        found = 0.0
        for site in flow.ordering.site[2:]:  # they do not interact: one after the other
            at = x.clone()
            at[..., site] = grid
            log_p = beta * target.log_prob(at, condition[:, None].expand(-1, 241, 1))
            none = x[:, :1].clone()
            log_none = beta * target.log_prob(none, condition[:, None])
            found = found + (log_p - log_none).logsumexp(1) + math.log(6 / 240)
        return found + log_none[:, 0]

    found = [[], []]
    torch.manual_seed(0)
    for _ in range(60):
        ratio = flow(condition).path_log_ratio(
            lambda x, given: beta * target.log_prob(x, given), (), beta
        )
        found[0].append(torch.autograd.grad(-ratio.mean(), flow.origin)[0])
        rows, log_q = flow.draw(condition, path=True)
        loss = (log_q - log_marginal(rows)).mean()
        found[1].append(torch.autograd.grad(loss, flow.origin)[0])
    one, other = (torch.stack(it) for it in found)
    error = torch.hypot(one.std(0), other.std(0)) / math.sqrt(60)
    assert ((one - other).mean(0).abs() < 5 * error + 1e-9).all()


@pytest.mark.filterwarnings("ignore:.* they are no result")
def test_half_of_the_sites_are_those_of_the_target_or_it_is_refused():
    target, condition = Phi4(side=4), torch.full((3, 1), 5.0).double()
    law = disturbed(4, EXACT)(condition)
    assert law.integrates(target.log_prob)
    x = law.sample((50,))
    other, expanded = law.redraw(x), condition.expand(50, 3, 1)
    weights = [target.log_prob(it, expanded) - law.log_prob(it) for it in (x, other)]
    assert (weights[0] - weights[1]).abs().max() < 1e-10
    assert (x == other).double().mean().item() == 0.5
    wrong = Phi4(side=4, mass_squared=-3.9)
    assert not law.integrates(wrong.log_prob)
    with pytest.raises(ValueError, match=r"flow draws .* build it from CoarseToFineField\(mass"):
        fit_to_target(EXACT, wrong, steps=1)
    chain = independent_metropolis(
        target, disturbed(4, EXACT), condition[0], draws=20, chains=2, seed=0
    )
    assert len(chain.x.flatten(0, -2).unique(dim=0)) == 40  # drawn anew, on rejection too


@BOTH
def test_log_z_of_a_free_field_is_that_of_its_modes(architecture):
    """Z = Π √(π/(k̂² + m²)) over the momenta, for λ = 0."""
    side = 2
    target = Phi4(side=side, mass_squared=1.0)
    condition = torch.zeros(1, 1)
    if architecture.mass_squared is not None:
        architecture = CoarseToFineField.of(target, width=8, bins=4)
    fit = fit_to_target(architecture, target, condition, steps=250, batch=64, anneal=False)
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
    with pytest.raises(ValueError, match="conditions must begin with λ"):
        EXACT.build((16,), 0)
    with pytest.raises(ValueError, match="power of two"):
        SMALL.build((36,), 1)
    with pytest.raises(ValueError, match=r"condition must be \[\*batch, 1\]"):
        SMALL.build((16,), 1)(torch.ones(3, 2))

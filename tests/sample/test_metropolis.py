"""Chains driven by a flow are exact, whatever the flow; here flows are laws of closed form."""

import math
import sys
import types

import pytest
import torch
from torch.distributions import Cauchy, Independent, Normal, Uniform
from torch.utils._python_dispatch import TorchDispatchMode

from rkl.sample import metropolis
from rkl.sample.lattice import CoarseToFine
from rkl.sample.mcmc import RandomWalk, markov_chain
from rkl.sample.metropolis import independent_metropolis
from rkl.sample.observables import averages
from rkl.sample.targets import XY, Density, GaussianMixture

TARGET = GaussianMixture(means=((-1.0,), (2.0,)), weights=(1.0, 3.0))
ONE = torch.ones(1, dtype=torch.float64)


def wide(batch=(), scale=3.0, dimensions=1):
    zero = torch.zeros(*batch, dimensions, dtype=torch.float64)
    return Independent(Normal(zero, scale + zero), 1)


def distribution_function(x, scale=1.0):
    low, high = (torch.special.ndtr((x - mean[0]) / scale) for mean in TARGET.means)
    return low / 4 + 3 * high / 4


@pytest.mark.parametrize("held", [2**24, 70])
def test_the_scan_takes_the_steps_that_a_loop_takes(held, monkeypatch):
    monkeypatch.setattr(metropolis, "NUMBERS", held)
    drawn, states = [], metropolis._states

    def spied(log_w):
        kept = torch.random.get_rng_state()
        energy = torch.empty_like(log_w).exponential_()
        torch.random.set_rng_state(kept)
        drawn.append((log_w, log_w + energy))
        return states(log_w)

    monkeypatch.setattr(metropolis, "_states", spied)
    chain = independent_metropolis(TARGET, wide(), ONE, draws=500, chains=3)
    first = [0, *[1] * (len(drawn) - 1)]  # the state before the block is looked at again
    log_w, threshold = (
        torch.cat([part[k][skip:] for part, skip in zip(drawn, first, strict=True)])
        for k in (0, 1)
    )
    present = log_w[0]
    for t in range(500):  # the first row is the start
        taken = threshold[t + 1] > present
        present = torch.where(taken, log_w[t + 1], present)
        assert torch.equal(chain.accepted[:, t], taken)
        assert torch.equal(chain.log_ratio[:, t], present)


def test_chains_do_not_begin_in_the_tails_of_the_proposal():
    """A Cauchy variable is beyond 5 with probability 0.126, the target with 6e-7.

    Begun at a proposal, 0.126² of the chains would be there after one step; begun at one of 16 by
    their weights, only those whose 16 are all there.
    """
    heavy = Independent(Cauchy(torch.zeros(1), torch.ones(1)), 1)
    target = GaussianMixture(means=((0.0,),))
    chain = independent_metropolis(target, heavy, torch.ones(1), draws=1, chains=4000)
    assert (chain.x.abs() > 5).double().mean() < 0.001


def test_log_p_and_log_q_are_those_of_the_states_also_after_a_rejection():
    condition = torch.tensor([[0.5], [1.0]], dtype=torch.float64)
    law = wide((2,))
    chain = independent_metropolis(TARGET, law, condition, draws=300, chains=4)
    assert chain.x.shape == (2, 4, 300, 1)
    assert 0.2 < chain.acceptance.min() < chain.acceptance.max() < 0.9
    log_p = TARGET.log_prob(chain.x, condition[:, None, None])
    log_q = law.log_prob(chain.x.movedim(0, 2)).movedim(2, 0)
    torch.testing.assert_close(chain.log_p, log_p, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(chain.log_q, log_q, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(chain.log_ratio, log_p - log_q, rtol=1e-12, atol=1e-12)


def uniformity(chain):
    """Chi² over 20 cells of the last states' distribution function, as a z score of its mean."""
    u = distribution_function(chain.x[:, -1, 0])
    count = torch.histc(u, 20, 0, 1)
    expected = u.numel() / 20
    return (((count - expected) ** 2 / expected).sum().item() - 19) / math.sqrt(2 * 19)


def calibrated(steps=4, walks=20_000, seed=0, local=None):
    torch.manual_seed(seed + 1_000)
    start = TARGET.sample(ONE, (walks,))
    size = {"draws": steps, "chains": walks, "seed": seed}
    return independent_metropolis(TARGET, wide(), ONE, start=start, local=local, **size)


# many chains of a few draws, some of which rest at their start
short_chains = pytest.mark.filterwarnings("ignore:.*took none of its:UserWarning")


@short_chains
def test_a_chain_that_starts_at_a_draw_of_the_target_stays_one():
    # chi² of 19 degrees beyond z = 6 happens once in 10⁵ seeds
    assert uniformity(calibrated()) < 6
    assert uniformity(calibrated(steps=2, local=RandomWalk(0.7))) < 6


@short_chains
def test_a_chain_that_forgets_the_density_of_its_proposals_is_found_out(monkeypatch):
    honest = metropolis.draw_proposals
    monkeypatch.setattr(
        metropolis,
        "draw_proposals",
        lambda *given: (*honest(*given)[:2], torch.zeros_like(honest(*given)[2])),
    )
    assert uniformity(calibrated()) > 20


@short_chains
@pytest.mark.statistical
def test_calibration_holds_over_many_seeds():
    """Each z of 40 chi² tests is beyond 5 once in 30,000 seeds: this fails once in 700."""
    assert max(uniformity(calibrated(walks=5_000, seed=seed)) for seed in range(40)) < 5


def test_acceptance_of_a_gaussian_by_a_wider_one_is_its_closed_form():
    """min(w, w') averages to (2/π)·2·atan(1/scale) for N(0, 1) proposed by N(0, scale²)."""
    normal = GaussianMixture(means=((0.0,),))
    chain = independent_metropolis(normal, wide(scale=2.0), ONE, draws=4_000, chains=25)
    expected = 4 / math.pi * math.atan(0.5)
    error = chain.accepted.double().mean(1).std() / 5
    assert abs(chain.acceptance - expected) < 4 * error


class Half(Independent):
    """A law over (y, z) that draws z from the target given y: here y + N(0, 1)."""

    def __init__(self):
        super().__init__(Normal(torch.zeros(2, dtype=torch.float64), 2.0), 1)

    def redraw(self, x):
        z = x[..., :1] + torch.randn_like(x[..., 1:])
        return torch.cat([x[..., :1], z], -1)

    def integrates(self, log_prob):
        return True

    def sample(self, sample_shape=()):
        return self.redraw(super().sample(sample_shape))

    def log_prob(self, value):
        y, z = value.unbind(-1)
        return Normal(0.0, 2.0).log_prob(y) + Normal(y, 1.0).log_prob(z)


def log_pair(x, _):
    return Normal(0.0, 1.0).log_prob(x[..., 0]) + Normal(x[..., 0], 1.0).log_prob(x[..., 1])


PAIR = Density(log_pair, (2,))


@pytest.mark.parametrize("local", [None, RandomWalk(0.5)], ids=["flow", "flow and local"])
def test_what_the_flow_integrates_is_drawn_anew_even_where_a_proposal_is_rejected(local):
    law = Half()
    nothing = torch.zeros(0, dtype=torch.float64)
    chain = independent_metropolis(PAIR, law, nothing, draws=800, chains=10, local=local)
    y, z = chain.x.unbind(-1)
    stays = y[:, 1:] == y[:, :-1]
    assert local is not None or stays.float().mean() > 0.2
    assert not (z[:, 1:] == z[:, :-1]).any()
    torch.testing.assert_close(chain.log_q, law.log_prob(chain.x), rtol=1e-9, atol=1e-9)
    error = z.square().mean(1).std() / math.sqrt(10)
    assert abs(z.square().mean() - 2) < 5 * error


@pytest.mark.parametrize("ring", [0.0, 1.0])
def test_a_lattice_flow_redraws_the_sites_that_it_integrates_and_averages_stay_exact(ring):
    model, condition = XY(side=4, ring_exchange=ring), torch.tensor([[1.5], [2.0]])
    flow = CoarseToFine.of(model).build((16,), 1)
    redrawn = [0.0]

    class Watched(type(flow(condition))):
        def redraw(self, x):
            new = super().redraw(x)
            redrawn[0] = (new != x).float().mean().item()
            return new

    law = Watched(flow, condition)
    chain = independent_metropolis(model, law, condition, draws=600, chains=16)
    assert redrawn[0] == pytest.approx(0.25 if ring else 0.5, abs=0.01)
    log_q = law.log_prob(chain.x.movedim(0, 2)).movedim(2, 0)
    torch.testing.assert_close(chain.log_q, log_q, rtol=0, atol=2e-3)
    found = averages(model, chain.measure(model), condition)["energy"]
    walk = markov_chain(model, condition, draws=200, chains=32, measure=model.observables)
    exact = averages(model, walk.values, condition)["energy"]
    z = (found.value - exact.value) / torch.hypot(found.error, exact.error)
    assert z.abs().max() < 4.5


def test_a_lattice_flow_made_for_another_target_redraws_nothing():
    flow = CoarseToFine.of(XY(side=4)).build((16,), 1)
    law = flow(torch.ones(1))
    assert metropolis._redraw(XY(side=4), law) is not None
    assert metropolis._redraw(XY(side=4, ring_exchange=0.5), law) is None
    assert metropolis._redraw(XY(side=4, coupling=2.0), law) is None


def test_the_longest_rejection_run_and_acceptance_are_counted():
    taken = torch.tensor([[True, False, False, True], [True, True, True, False]])
    nothing = torch.zeros(2, 4)
    chain = metropolis.Chain(
        torch.zeros(2, 4, 1), taken, nothing, nothing, nothing, torch.zeros(0)
    )
    assert chain.longest_rejection_run == 3
    assert chain.acceptance.item() == pytest.approx(5 / 8)
    assert not chain.failed


@pytest.mark.filterwarnings("ignore:.*they are no result")  # chains are short
def test_the_first_proposal_counts_as_every_other():
    """By default the start is a draw from the target, nearly: a first step is no exception."""
    chain = independent_metropolis(TARGET, wide(), ONE, draws=4, chains=20_000)
    share = chain.accepted.double().mean(0)
    assert chain.acceptance == chain.accepted.double().mean()
    assert (share - share.mean()).abs().max() < 4 * (0.25 / 20_000) ** 0.5
    one = independent_metropolis(TARGET, wide(), ONE, draws=1)
    assert one.acceptance == one.accepted.double().mean()


def test_a_chain_that_moved_in_its_first_step_alone_has_not_failed():
    taken = torch.tensor([[True, False, False], [False, True, False]])
    nothing = torch.zeros(2, 3)
    chain = metropolis.Chain(
        torch.zeros(2, 3, 1), taken, nothing, nothing, nothing, torch.zeros(0)
    )
    assert not chain.failed


def test_a_chain_that_never_moves_is_reported_as_failed():
    condition = torch.tensor([[1e-3], [1.0]], dtype=torch.float64)
    peak = torch.full((2, 4, 1), 2.0, dtype=torch.float64)
    with pytest.warns(UserWarning, match="1 of 2 conditions have a chain that took none of its"):
        chain = independent_metropolis(TARGET, wide((2,)), condition, draws=50, start=peak)
    assert chain.failed.tolist() == [True, False]


def test_a_seed_gives_the_same_chain_and_leaves_the_global_numbers_alone():
    before = torch.random.get_rng_state()
    one, two, other = (
        independent_metropolis(TARGET, wide(), ONE, draws=20, seed=seed).x for seed in (3, 3, 4)
    )
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_observables_are_judged_by_condition():
    condition = torch.tensor([[0.5], [1.0], [2.0]], dtype=torch.float64)
    chain = independent_metropolis(TARGET, wide((3,)), condition, draws=500)
    judged = chain.diagnose({"x": chain.x[..., 0]})["x"]
    assert all(judged[name].shape == (3,) for name in ("rhat", "ess_bulk", "ess_tail", "time"))
    assert judged["rhat"].max() < 1.05
    assert (judged["time"] > 1).all()


@pytest.mark.parametrize(
    ("value", "says"), [(math.nan, "expected a number or -inf"), (math.inf, "got inf")]
)
def test_a_log_density_that_is_no_number_is_refused(value, says):
    broken = Density(lambda x, _: torch.where(x[..., 0] > 1, value, 0.0 * x[..., 0]), (1,))
    with pytest.raises(ValueError, match=f"target: .* proposals .*{says}"):
        independent_metropolis(broken, wide(), draws=100)


def test_states_without_mass_are_left_and_never_entered():
    half = Density(lambda x, _: torch.where(x[..., 0] > 0, -x[..., 0], -math.inf), (1,))
    chain = independent_metropolis(half, wide(), draws=2_000)
    began = chain.accepted.cumsum(1) > 1
    assert (chain.x[began] > 0).all()
    assert began.float().mean() > 0.99


def test_no_draw_lies_where_the_target_has_no_density():
    box = Density(lambda x, _: torch.where((x - 0.5).abs()[..., 0] < 0.5, 0.0, -math.inf), (1,))
    chain = independent_metropolis(box, wide(scale=30.0), draws=200, chains=8)
    assert ((chain.x > 0) & (chain.x < 1)).all()
    far = Density(lambda x, _: torch.where(x[..., 0] > 1e4, 0.0, -math.inf), (1,))
    with pytest.warns(UserWarning, match="no density at 4 of 4 draws"):
        independent_metropolis(far, wide(), draws=1)


def test_a_constant_of_millions_of_nats_changes_nothing():
    one = torch.ones(1)
    proposal = Independent(Normal(torch.zeros(1), 2 * one), 1)
    target, shifted = (
        Density(lambda x, _, c=c: -x.square().sum(-1) / 2 - c, (1,)) for c in (0.0, 3e7)
    )
    chain = independent_metropolis(shifted, proposal, draws=500)
    assert torch.equal(chain.x, independent_metropolis(target, proposal, draws=500).x)
    exact = -chain.x.double().square().sum(-1) / 2
    torch.testing.assert_close(chain.log_p + 3e7, exact, rtol=0, atol=1e-6)


def test_digits_that_a_density_loses_in_single_precision_are_told():
    matrix = 1e4 * torch.eye(1)
    single = Density(lambda x, _: -(x @ matrix).square().sum(-1), (1,))
    proposal = Independent(Normal(torch.zeros(1), torch.ones(1)), 1)
    with pytest.warns(UserWarning, match="which torch.float32 rounds by up to"):
        metropolis.draw_proposals(single, proposal, torch.zeros(0), (100,))


class Operations(TorchDispatchMode):
    """Counts what torch is asked to do."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.count += 1
        return function(*arguments, **(keywords or {}))


def test_a_million_draws_of_a_chain_take_no_loop_over_draws():
    law, target = (
        Independent(Uniform(torch.zeros(1), 1), 1),
        Density(lambda x, _: -x[..., 0], (1,)),
    )
    counts = []
    for draws in (10_000, 1_000_000):
        with Operations() as operations:
            independent_metropolis(target, law, draws=draws, chains=1)
        counts.append(operations.count)
    assert counts[1] <= 2 * counts[0]  # a scan takes a few more, each over all draws


class Recorder(types.ModuleType):
    def __init__(self, version):
        super().__init__("arviz")
        self.__version__ = version

    def from_dict(self, *groups, **named):
        return groups, named


@pytest.mark.parametrize(("version", "old"), [("0.23.4", True), ("1.0.0", False)])
def test_chains_go_to_arviz_as_its_version_has_them(version, old, monkeypatch):
    monkeypatch.setitem(sys.modules, "arviz", Recorder(version))
    condition = torch.tensor([[0.5], [1.0]], dtype=torch.float64)
    chain = independent_metropolis(TARGET, wide((2,)), condition, draws=30)
    groups, named = chain.to_arviz(y=chain.x[..., 0])
    found = named if old else groups[0]
    assert found["posterior"]["x"].shape == (4, 30, 2, 1)
    assert found["posterior"]["y"].shape == (4, 30, 2)
    assert found["sample_stats"].keys() == {"accepted", "log_ratio", "lp", "log_q"}


@pytest.mark.tools
def test_arviz_agrees_on_the_chains_it_is_given():
    arviz = pytest.importorskip("arviz")
    chain = independent_metropolis(TARGET, wide(), ONE, draws=500)
    values = {"y": chain.x[..., 0]}
    handed = chain.to_arviz(**values)
    bulk = arviz.ess(handed, var_names=["y"])["y"].item()
    assert bulk == pytest.approx(chain.diagnose(values)["y"]["ess_bulk"].item(), rel=1e-6)

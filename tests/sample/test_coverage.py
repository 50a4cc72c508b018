"""A flow that misses modes is told so, although its own weights praise it."""

import json
import math

import pytest
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal, Uniform

from rkl.sample.coverage import judge_coverage, judge_ratios
from rkl.sample.importance import reweight
from rkl.sample.mcmc import markov_chain
from rkl.sample.targets import XY, Density, MoG8, Phi4, Rings

SCALE = torch.tensor([0.5], dtype=torch.float64)


def some_of_the_modes(count, scale=0.55):
    """The analytic mixture of some of the eight Gaussians, a little wider than they are."""
    spread = torch.full((count, 2), scale, dtype=torch.float64)
    centres = Independent(Normal(MoG8().centres[:count], spread), 1)
    return MixtureSameFamily(Categorical(torch.ones(count, dtype=torch.float64)), centres)


def narrow(scale=0.3):
    """Five of the modes of a narrow MoG-8: log-weights of the flow's draws obey their law."""
    target = MoG8(radius=6.0)
    spread = torch.full((5, 2), 1.2 * scale, dtype=torch.float64)
    law = Independent(Normal(target.centres[:5], spread), 1)
    return target, MixtureSameFamily(Categorical(torch.ones(5, dtype=torch.float64)), law), scale


def test_five_of_eight_modes_are_flagged_although_the_flows_own_weights_praise_it():
    target, law, scale = narrow()
    condition = torch.tensor([scale], dtype=torch.float64)
    found = judge_coverage(target, law, condition)
    assert found.weights.ess.value > 0.87
    assert found.passed is False
    assert found.target_ess is not None
    assert found.target_ess.value < 1e-3
    assert abs(found.reached.value - 5 / 8) < 4.5 * found.reached.error
    missing = [it for it in found.modes if it.missing]
    assert [it.name for it in missing] == ["at (-4.24, -4.24)", "at (0, -6)", "at (4.24, -4.24)"]
    for it in missing:
        assert abs(it.target.value - 1 / 8) < 4.5 * it.target.error
        assert it.drawn.value == 0
    told = "\n".join(found.reasons)
    assert "3 of 8 modes are missing: at (-4.24, -4.24) with mass 0.12" in told
    assert "the flow's draws account for 0.62" in told
    assert "EUBO - ELBO is" in told
    assert "the effective share is" in told
    assert found.table().startswith("NOT COVERED: 4 reasons\n- ")
    assert found.table().count("MISSING") == 3


def test_a_flow_with_all_modes_passes():
    found = judge_coverage(MoG8(), some_of_the_modes(8), SCALE)
    assert found.passed is True
    assert found.reasons == ()
    assert found.verdict == "covered"
    assert found.elbo.value < 0 < found.eubo.value
    assert json.loads(json.dumps(found.to_dict()))["passed"] is True


def test_a_flow_of_the_right_modes_passes_whatever_the_seed():
    """Four errors, some ten questions: one false alarm in 1,000 seeds."""
    law = some_of_the_modes(8)
    assert all(judge_coverage(MoG8(), law, SCALE, seed=k, draws=4_000).passed for k in range(20))


def test_masses_that_are_wrong_but_not_missing_are_mended_by_weights_and_pass():
    centres = some_of_the_modes(8).component_distribution
    skew = torch.tensor([4.0, 1, 1, 1, 1, 1, 1, 1], dtype=torch.float64)
    found = judge_coverage(MoG8(), MixtureSameFamily(Categorical(skew), centres), SCALE)
    first = found.modes[0]
    assert first.drawn.value > 0.3
    assert abs(first.reweighted.value - 1 / 8) < 4.5 * first.reweighted.error
    assert found.passed


def test_without_draws_of_the_target_or_its_log_z_coverage_is_unknown():
    model = Density(lambda x, _: MoG8().log_prob(x, SCALE.to(x)), (2,))
    found = judge_coverage(model, some_of_the_modes(5))
    assert found.passed is None
    assert found.table().startswith("coverage unknown")
    assert found.to_dict()["eubo"] is None


def test_draws_of_the_target_alone_show_the_mass_that_is_missing():
    model = Density(lambda x, _: 7 + MoG8().log_prob(x, SCALE.to(x)), (2,))
    torch.manual_seed(0)
    data = MoG8().sample(SCALE, (5_000,))
    five = judge_coverage(model, some_of_the_modes(5, 0.51), held_out=data)
    eight = judge_coverage(model, some_of_the_modes(8), held_out=data)
    assert (five.passed, eight.passed) == (False, True)
    assert five.reached.value < 0.7
    assert abs(eight.reached.value - 1) < 4.5 * eight.reached.error
    assert five.modes == ()


def test_a_log_z_that_is_known_shows_it_without_any_draws_of_the_target():
    log_ratio = torch.full((1_000,), math.log(5 / 8), dtype=torch.float64)
    assert reweight(log_ratio).ess.value == 1
    assert judge_ratios(log_ratio, log_z=0.0).passed is False
    assert judge_ratios(log_ratio, log_z=math.log(5 / 8)).passed is True
    assert "one is wrong" in judge_ratios(log_ratio, log_z=-3.0).reasons[0]
    assert judge_ratios(log_ratio).passed is None


def test_rings_and_winding_sectors_are_modes():
    scale = torch.tensor([0.1], dtype=torch.float64)
    ring = Independent(Uniform(torch.full((2,), -6.0).double(), 6.0), 1)
    rings = judge_coverage(Rings(), ring, scale)
    assert [it.name for it in rings.modes][:2] == ["ring of radius 1", "ring of radius 2"]
    assert not any(it.missing for it in rings.modes)
    model, hot = XY(side=4), torch.tensor([5.0], dtype=torch.float64)
    low = torch.full((16,), -math.pi, dtype=torch.float64)
    data = markov_chain(model, hot, draws=50, chains=40, every=5).x.flatten(0, 1)
    found = judge_coverage(model, Independent(Uniform(low, -low), 1), hot, held_out=data)
    masses = {it.name: it.target.value.item() for it in found.modes}
    assert "winding (0, 0)" in masses
    assert sum(masses.values()) == pytest.approx(1)


def test_a_lost_sign_of_phi_4_is_found_by_draws_of_both():
    """A proposal that has one of two mirror images, and draws that have both."""
    model, condition = Phi4(side=2), torch.tensor([4.0], dtype=torch.float64)
    law = Independent(Normal(torch.full((4,), 0.7).double(), 0.25), 1)
    walk = markov_chain(model, condition, draws=50, chains=40, every=20)
    x = walk.x.flatten(0, 1)
    sign = torch.where(torch.arange(len(x)) % 2 == 0, 1.0, -1.0)[:, None]
    both = x.mean(-1, keepdim=True).sign() * x * sign
    assert judge_coverage(model, law, condition, held_out=both).passed is False


def test_a_law_without_mass_at_a_draw_of_the_target_is_not_covering():
    log_ratio = torch.zeros(500, dtype=torch.float64)
    at_target = torch.cat([torch.zeros(90), torch.full((10,), math.inf)]).double()
    found = judge_ratios(log_ratio, at_target)
    assert found.passed is False
    assert found.reached.value.item() == pytest.approx(1 / 0.9, rel=0.5)


def test_held_out_draws_without_density_are_refused_with_their_number():
    def log_prob(x, condition):
        return torch.where((x > 0).all(-1), -x.square().sum(-1) / 2, -math.inf)

    target = Density(log_prob, (2,))
    law = Independent(Normal(torch.zeros(2), torch.ones(2)), 1)
    held_out = torch.randn(200, 2, generator=torch.Generator().manual_seed(0)).abs()
    assert judge_coverage(target, law, held_out=held_out).reached is not None
    held_out[:3] *= -1
    with pytest.raises(ValueError, match="held_out: .* has no density at 3 of 200 draws"):
        judge_coverage(target, law, held_out=held_out)
    log_ratio = torch.zeros(200, dtype=torch.float64)
    at_target = torch.where(torch.arange(200) < 3, -math.inf, log_ratio)
    with pytest.raises(ValueError, match="at_target must be above -inf; got 3 draws"):
        judge_ratios(log_ratio, at_target, log_z=0.0)


def test_rows_that_were_trained_on_are_refused_as_held_out():
    torch.manual_seed(0)
    data = MoG8().sample(SCALE, (50,))
    with pytest.raises(ValueError, match="held_out shares 50 of its 50 rows"):
        judge_coverage(MoG8(), some_of_the_modes(8), SCALE, held_out=data, train=data)

"""A critic learns log p/q, normalised and cut off, and none is trained on a flat dual."""

import math

import pytest
import torch

from rkl import KL, JensenShannon, PrecisionHalf, PrecisionRecall, TotalVariation
from rkl.flows import Critic
from rkl.flows.critic import ScaledCritic
from rkl.flows.standardise import Units


def learnt(chosen, steps=400, seed=0):
    """Of N((1, 0), I) against N(0, I)."""
    torch.manual_seed(seed)
    ratio = chosen.build((2,), 0, bound=5.0)
    for step in range(steps):
        q, p = torch.randn(2, 512, 2)
        bound = ratio.update(p + torch.tensor([1.0, 0.0]), q, lr=1 - step / steps)
    return ratio, bound


@pytest.mark.parametrize("auxiliary", [JensenShannon(), KL()], ids=repr)
def test_a_critic_learns_the_log_ratio(auxiliary):
    ratio, _ = learnt(Critic(divergence=auxiliary))
    x = torch.randn(2000, 2)
    found, expected = ratio(x).detach(), x[:, 0] - 0.5
    assert (found - expected).square().mean().sqrt() < 0.2  # log p/q has standard deviation 1
    assert found.exp().mean().item() == pytest.approx(1.0, abs=0.15)


def test_the_log_ratio_is_cut_off_at_its_bound():
    torch.manual_seed(0)
    ratio = Critic().build((2,), 0, bound=0.25)
    ratio.log_normaliser -= 1.0
    assert ratio(torch.randn(50, 2)).max() == 0.25


def test_a_critic_hears_the_conditions():
    torch.manual_seed(0)
    ratio = Critic().build((1,), 2, bound=5.0)
    given = torch.eye(2).repeat(256, 1)
    where = torch.tensor([[1.0], [-1.0]]).repeat(256, 1)
    for step in range(300):
        ratio.update(where + torch.randn(512, 1), torch.randn(512, 1), given, 1 - step / 300)
    x = torch.zeros(2, 1) + 1.5
    found = ratio(x, torch.eye(2)).detach()
    torch.testing.assert_close(found, torch.tensor([1.0, -2.0]), atol=0.5, rtol=0)


@pytest.mark.parametrize("event", [(1, 12, 8), (9, 9)], ids=str)
def test_images_are_read_by_convolutions(event):
    ratio = Critic(hidden=(16,)).build(event, 0, bound=5.0)
    assert any(isinstance(it, torch.nn.Conv2d) for it in ratio.modules())
    assert ratio(torch.randn(5, *event)).shape == (5,)


def test_in_the_users_units_the_ratio_is_the_same():
    ratio, _ = learnt(Critic(), steps=5)
    shift, scale = torch.tensor([10.0, -3.0]), torch.tensor([5.0, 0.1])
    critic = ScaledCritic(ratio, Units(shift, scale))
    x = torch.randn(3, 4, 2)
    found = critic(shift + scale * x)
    torch.testing.assert_close(found, ratio(x.reshape(12, 2)).reshape(3, 4), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "flat", [PrecisionRecall(lam=3.0), TotalVariation(), PrecisionHalf()], ids=repr
)
def test_a_dual_without_a_slope_is_refused_unless_asked_for(flat):
    with pytest.raises(ValueError, match="cannot learn from the dual"):
        Critic(divergence=flat)
    assert Critic(divergence=flat, flat=True).divergence == flat


def test_the_reason_for_the_refusal_is_true():
    """The bound of PR(λ) on a critic that starts on one side of λ has no gradient at all."""
    ratio = Critic(divergence=PrecisionRecall(lam=3.0), flat=True).build((2,), 0, bound=math.inf)
    before = [it.clone() for it in ratio.parameters()]
    ratio.update(torch.randn(64, 2) + 3, torch.randn(64, 2))
    assert all(map(torch.equal, before, ratio.parameters()))

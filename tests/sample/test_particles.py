"""Particles cooled to a target: masses and moments against exact draws, and what walks leave."""

import torch

from rkl.sample.particles import Particles
from rkl.sample.targets import Condition, Density, GaussianMixture, Rings

UNEQUAL = GaussianMixture(
    means=((0.0, 0.0), (3.0, 1.0), (-2.0, 3.0), (1.0, -4.0), (-4.0, -2.0)),
    weights=(0.4, 0.25, 0.2, 0.1, 0.05),
)


def test_every_mode_has_its_mass():
    """To 5 standard errors, as the 64 groups of particles scatter, each independent of others."""
    torch.manual_seed(0)
    x = Particles(UNEQUAL, torch.full((64, 1), 0.1), each=256).x
    labels = torch.cdist(x, UNEQUAL.centres.float()).argmin(-1)
    for k, mass in enumerate(UNEQUAL.masses.tolist()):
        share = (labels == k).float().mean(0)
        assert (share.mean() - mass).abs() < 5 * share.std() / 8 + 1e-3
        assert share.std() > 0


def test_particles_are_as_wide_as_exact_draws():
    """Some 1,000 of them that descend from one another, in each ring: to four such errors."""
    torch.manual_seed(0)
    condition = torch.linspace(0.05, 0.2, 32)[:, None]
    particles = Particles(Rings(), condition)
    exact = Rings().sample(condition, (4000,)).norm(dim=-1)
    found = particles.x.norm(dim=-1)
    for k in range(4):
        ours, theirs = (it[(it - k - 1).abs() < 0.5] - k - 1 for it in (found, exact))
        assert (ours.mean() - theirs.mean()).abs() < 0.02
        assert (ours.std() / theirs.std() - 1).abs() < 0.1


def test_walks_leave_exact_draws_as_they_are():
    torch.manual_seed(0)
    particles = Particles(UNEQUAL, torch.linspace(0.3, 1.0, 32)[:, None], each=512)
    particles.x = UNEQUAL.sample(particles.condition, (512,))
    particles.log_p = UNEQUAL.log_prob(particles.x, particles.condition.expand(512, -1, -1))
    before = particles.x.clone()
    for _ in range(60):
        particles.draw(32, 512)
    moved = (particles.x - before).norm(dim=-1)
    assert (moved > 0).float().mean() > 0.99
    for power in (1, 2):
        one, other = before.pow(power), particles.x.pow(power)
        error = (one.var((0, 1)) / (512 * 32)).sqrt()
        assert ((one.mean((0, 1)) - other.mean((0, 1))).abs() < 6 * error).all()


def test_draws_are_of_every_stratum_of_the_conditions():
    torch.manual_seed(0)
    particles = Particles(UNEQUAL, torch.linspace(0.1, 1.0, 30)[:, None], each=8)
    x, condition = particles.draw(10, 4)
    assert x.shape == (4, 10, 2)
    places = torch.searchsorted(particles.condition[:, 0], condition[:, 0])
    assert (places // 3 == torch.arange(10)).all()


def test_where_the_target_is_impossible_there_are_no_particles_and_no_nan():
    """A law on the positive half, with NaN beside it."""
    torch.manual_seed(0)
    half = Density(
        lambda x, c: torch.where(x[..., 0] < 0, torch.nan, -x[..., 0] / c[..., 0]),
        event_shape=(1,),
        conditions=(Condition("mean", 0.5, 2.0),),
    )
    particles = Particles(half, torch.full((16, 1), 0.5))
    assert particles.log_p.isfinite().all()
    assert (particles.x >= 0).all()
    assert (particles.x.mean() - 0.5).abs() < 0.1

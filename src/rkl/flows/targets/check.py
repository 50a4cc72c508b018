"""The laws every target obeys, for those of rkl and for your own."""

import torch

from rkl.flows.targets.base import Target


def check_target(target: Target, *, draws: int = 64) -> None:
    """Hold a target to the laws that every target obeys.

    Its log-density is finite with a finite gradient, one value per x, whatever else is in the
    batch; on the circle it has the period 2 pi; each observable has a unit and one value per
    x; single precision keeps its digits; exact draws, where there are any, have a mean score
    of 0.

    Args:
        target: The target on trial.
        draws: How many random x are tried.

    Raises:
        AssertionError: It breaks a law; the message names the target and the law.
        TypeError: It is no target.
        ValueError: There are too few draws.

    >>> from rkl.flows.targets import XY
    >>> check_target(XY(side=4))
    """
    if not isinstance(target, Target):
        raise TypeError(f"target must be a Target such as XY(side=8); got {target!r}.")
    if not isinstance(draws, int) or draws < 2:
        raise ValueError(f"draws must be a number of 2 or more; got {draws!r}.")
    generator = torch.Generator().manual_seed(0)
    x = 2 * torch.randn(draws, *target.event_shape, generator=generator, dtype=torch.float64)
    low, high = (
        torch.tensor([getattr(it, end) for it in target.conditions], dtype=x.dtype)
        for end in ("low", "high")
    )
    u = torch.rand(draws, len(low), generator=generator, dtype=x.dtype)
    condition = low + (high - low) * u
    _check_density(target, x, condition)
    _check_observables(target, x, condition)
    _check_sampler(target, (low + high) / 2)


def _score(target, x, condition):
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        value = target.log_prob(x, condition)
        (score,) = torch.autograd.grad(value.sum(), x)
    return value.detach(), score


def _check_density(target, x, condition):
    value, score = _score(target, x, condition)
    assert value.shape == x.shape[:1], f"{target}: log_prob must be [*batch], one value per x."
    assert value.isfinite().all(), f"{target}: log_prob is not finite everywhere."
    assert score.isfinite().all(), f"{target}: the gradient of log_prob is not finite."
    scale = 1 + value.abs().max()
    alone = target.log_prob(x[:1], condition[:1])
    assert (alone - value[:1]).abs().max() < 1e-9 * scale, f"{target} mixes the rows of a batch."
    single = target.log_prob(x.float(), condition.float())
    assert (single - value).abs().max() < 1e-4 * scale, f"{target} loses its digits in float32."
    if target.domain == "circle":
        turned = target.log_prob(x + 2 * torch.pi, condition)
        law = f"{target} is on the circle but has not the period 2 pi."
        assert (turned - value).abs().max() < 1e-9 * scale, law


def _check_observables(target, x, condition):
    measured = target.observables(x, condition)
    law = f"{target} measures {list(measured)} but has units for {list(target.units)}."
    assert measured.keys() == target.units.keys(), law
    for name, values in measured.items():
        assert values.shape == x.shape[:1], f"{target}: {name} must be [*batch], one per x."


def _check_sampler(target, condition, draws: int = 20_000):
    """E[d log p/dx] = 0: each mean within 5 standard errors, 2 in a million by chance."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        try:
            x = target.sample(condition, (draws,))
        except NotImplementedError:
            return
    _, score = _score(target, x, condition.expand(draws, -1))
    z = score.mean(0) / score.std(0) * draws**0.5
    assert z.abs().max() < 5, f"{target}: the draws of sample do not follow log_prob."

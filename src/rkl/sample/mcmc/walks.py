"""Markov chains side by side, for every condition at once: training data and references."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from rkl.checks import LARGEST_COUNT, floats, integer
from rkl.randomness import random_numbers
from rkl.sample.mcmc.kernels import RandomWalk, check_kernel
from rkl.sample.targets.base import Kernel, Target, check_condition

MAX_STARTS = 100  # states that are tried to begin a chain at

Measure = Callable[[Tensor, Tensor], dict[str, Tensor]]


@dataclass(frozen=True)
class Walk:
    r"""Draws of Markov chains, [\*batch, chains, draws], or measurements of them.

    Attributes:
        x: The states, [\*batch, chains, draws, \*event]; None with measurements.
        values: Measurements of each state, by name.
        last: The last states, [\*batch, chains, \*event], from which to go on.
    """

    x: Float[Tensor, "..."] | None
    values: dict[str, Float[Tensor, "*batch chains draws"]]
    last: Float[Tensor, "..."]


@torch.no_grad()
def markov_chain(
    target: Target,
    condition: Float[Tensor, "*batch conditions"] | None = None,
    *,
    draws: int,
    chains: int = 4,
    kernel: Kernel | None = None,
    every: int = 1,
    warm_up: int = 200,
    seed: int = 0,
    start: Float[Tensor, "..."] | None = None,
    measure: Measure | None = None,
) -> Walk:
    r"""Chains of a kernel that leaves the target invariant, all of them side by side.

    They begin with equal angles on the circle, without winding, and at
    standard normal draws on the line: for a target with several modes give a ``start``. A chain
    that would begin where the density is 0 begins at another draw, with uniform angles.

    Args:
        target: The target to sample.
        condition: One condition or a batch of them.
        draws: Number of draws kept of each chain.
        chains: Number of chains for each condition.
        kernel: The move; by default that of the target, else RandomWalk().
        every: Sweeps from one draw to the next.
        warm_up: Sweeps before the first draw.
        seed: Random seed.
        start: States to begin at, [\*batch, chains, \*event], where the density is not 0.
        measure: Function of states x and a condition, such as ``target.observables``; its
            results are kept instead of the states.

    Raises:
        ValueError: A chain would begin where the density is 0, and could stay there for ever.

    >>> from rkl.sample import XY
    >>> model = XY(side=2)
    >>> walk = markov_chain(
    ...     model, torch.ones(1), draws=50, chains=100, measure=model.observables
    ... )
    >>> round(walk.values["energy"].mean().item(), 1)
    -1.6
    """
    condition = check_condition(target, condition)
    for name, value, least in (
        ("draws", draws, 1),
        ("chains", chains, 1),
        ("every", every, 1),
        ("warm_up", warm_up, 0),
    ):
        integer(name, value, at_least=least, at_most=LARGEST_COUNT)
    kernel = kernel_of(target, kernel)
    each = condition[..., None, :].expand(*condition.shape[:-1], chains, condition.shape[-1])
    with random_numbers(seed):
        x = _initial_states(target, each) if start is None else _checked_start(target, each, start)
        x = kernel.move(target, each, x, warm_up) if warm_up else x
        steps = []
        for _ in range(draws):
            x = kernel.move(target, each, x, every)
            steps.append(measure(x, each) if measure else {"x": x})
    axis = each.ndim - 1
    series = {name: torch.stack([it[name] for it in steps], axis) for name in steps[0]}
    return Walk(None if measure else series.pop("x"), series, x)


def kernel_of(target: Target, kernel: Kernel | None) -> Kernel:
    """The kernel given, or that of the target, or a random walk."""
    if kernel is not None:
        return check_kernel("kernel", kernel)
    preferred = target.kernel()
    return RandomWalk() if preferred is None else check_kernel(f"kernel of {target}", preferred)


def _initial_states(target: Target, each: Tensor) -> Tensor:
    shape = (*each.shape[:-1], *target.event_shape)
    chart = target.chart
    circle, axes = chart.circle.to(each.device), [1] * len(target.event_shape)
    z = torch.randn(shape, dtype=each.dtype, device=each.device)
    x = chart.to_bounded(torch.where(circle, 0.0, z))[0]
    for _ in range(MAX_STARTS):
        nowhere = _without_density(target, x, each)
        if not nowhere.any():
            return x
        z, angles = torch.randn_like(z), math.pi * (2 * torch.rand_like(z) - 1)
        other = chart.to_bounded(torch.where(circle, angles, z))[0]
        x = torch.where(nowhere.reshape(*nowhere.shape, *axes), other, x)
    raise ValueError(
        f"start must be given for {target}: its density is 0 at {MAX_STARTS} states from N(0, 1) "
        "that a chain could begin at."
    )


def _without_density(target: Target, x: Tensor, each: Tensor) -> Tensor:
    return ~(target.log_prob(x, each) > -math.inf)  # nan too, which no move leaves


def _checked_start(target: Target, each: Tensor, start: Tensor) -> Tensor:
    shape = (*each.shape[:-1], *target.event_shape)
    floats("start", start)
    if tuple(start.shape) != shape or not start.isfinite().all():
        raise ValueError(
            f"start must be finite states {list(shape)}: [*batch, chains, *event]; "
            f"got {list(start.shape)}."
        )
    nowhere = _without_density(target, start, each)
    if nowhere.any():
        raise ValueError(
            f"start must be where the density of {target} is not 0; {int(nowhere.sum())} of "
            f"{nowhere.numel()} states are not."
        )
    return start

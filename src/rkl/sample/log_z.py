"""log Z along a ladder of temperatures: thermodynamic integration, MBAR, annealed importance."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from rkl.checks import LARGEST_COUNT, integer
from rkl.randomness import random_numbers
from rkl.sample.mcmc.walks import kernel_of, markov_chain
from rkl.sample.targets.base import Kernel, Target, check_condition
from rkl.sample.tempering import Rung, Sampler, log_mean
from rkl.stats import Mean, jackknife

WIDTH = 1.0  # of the broad distribution on the line, where there are no coordinates
UNIFORM_DRAWS = 256  # by which the unit of energy is measured
MAX_ITERATIONS = 200  # of Newton, of which about ten are needed


@torch.no_grad()
def thermodynamic_integration(
    target: Target,
    condition: Float[Tensor, "temperatures conditions"],
    *,
    rungs: int = 64,
    draws: int = 500,
    chains: int = 8,
    kernel: Kernel | None = None,
    seed: int = 0,
) -> Mean:
    r"""Log Z at every temperature, from energies along a ladder of β = 1/T that begins at 0.

        log Z(β) = N log 2π − ∫₀ᵝ ⟨E⟩ dβ′

    The rungs are even in log(1 + β), about where energies of neighbours overlap alike; between
    two of them ⟨E⟩ (1 + β) is a cubic with the slopes that the variance of E gives, so that
    the error of the quadrature falls with the fourth power of the rungs: 1e-5 nats for 64. The
    unit of E, and so of 1/β, is its standard deviation at uniform angles over √N, J of XY.

    Source: Gelman and Meng (1998), Statistical Science 13, 163; the corrected trapezoidal rule.

    Args:
        target: Angles at a temperature, such as XY(side=8).
        condition: Temperatures, with all other conditions alike.
        rungs: Rungs of the ladder, about; those of the temperatures come on top.
        draws: Draws of each chain at each rung.
        chains: Chains at each rung.
        kernel: The move; by default that of the target, such as a heat bath.
        seed: Random seed.

    Returns:
        log Z in nats with respect to dθ on [−π, π)^N, and its standard error, [temperatures].

    >>> from rkl.sample import XY
    >>> round(thermodynamic_integration(XY(side=2), torch.ones(1, 1)).value.item())
    11
    """
    beta, unit = check_temperatures(target, condition), _unit_of_energy(target, condition)
    ladder, place = _ladder(beta * unit, rungs)
    energy = _energies(target, condition, ladder, unit, draws, chains, kernel, seed)
    moments = torch.stack([energy, energy.square()], -1).movedim(0, 2)
    origin = _at_beta_0(target)
    log_z = jackknife(lambda mean: _integrate(ladder, mean, origin), moments)
    return Mean(log_z.value[place], log_z.error[place])


def _integrate(ladder: Tensor, mean: Tensor, origin: float) -> Tensor:
    """Log Z at every rung, from ⟨E⟩ and ⟨E²⟩ [..., rungs, 2]."""
    scale, step = 1 + ladder, torch.log1p(ladder).diff()
    first, variance = mean[..., 0], mean[..., 1] - mean[..., 0].square()
    height = first * scale
    slope = height - variance * scale.square()
    area = step * (height[..., 1:] + height[..., :-1]) / 2
    area -= step.square() * slope.diff() / 12
    zero = torch.zeros_like(area[..., :1])
    return origin - torch.cat([zero, area.cumsum(-1)], -1)


@torch.no_grad()
def mbar(
    target: Target,
    condition: Float[Tensor, "temperatures conditions"],
    *,
    rungs: int = 32,
    draws: int = 250,
    chains: int = 8,
    kernel: Kernel | None = None,
    seed: int = 0,
) -> Mean:
    r"""Log Z at every temperature, from draws at all of them together.

    The multistate Bennett acceptance ratio: the log Z for which every rung's share in the
    mixture of all is what was drawn from it, Σₙ pₖ(xₙ) = nₖ, with pₖ ∝ nₖ exp(−βₖE)/Zₖ. No other
    estimate from the same energies has a smaller variance for long runs. The error is that of
    the linearised equation, over batches of dependent draws.

    Source: Shirts and Chodera (2008), J. Chem. Phys. 129, 124105, arXiv 0801.1426, eq. (11).

    Args:
        target: Angles at a temperature, such as XY(side=8).
        condition: Temperatures, with all other conditions alike.
        rungs: Rungs of the ladder from β = 0, about.
        draws: Draws of each chain at each rung.
        chains: Chains at each rung.
        kernel: The move; by default that of the target, such as a heat bath.
        seed: Random seed.

    Returns:
        log Z in nats with respect to dθ on [−π, π)^N, and its standard error, [temperatures].

    >>> from rkl.sample import XY
    >>> round(mbar(XY(side=2), torch.ones(1, 1)).value.item())
    11
    """
    beta, unit = check_temperatures(target, condition), _unit_of_energy(target, condition)
    ladder, place = _ladder(beta * unit, rungs)
    energy = _energies(target, condition, ladder, unit, draws, chains, kernel, seed)
    moments = torch.stack([energy, energy.square()], -1).mean((1, 2))
    origin = _at_beta_0(target)
    log_z, error = _solve_mbar(ladder, energy, _integrate(ladder, moments, origin))
    return Mean(log_z[place], error[place])


def _solve_mbar(ladder: Tensor, energy: Tensor, guess: Tensor) -> tuple[Tensor, Tensor]:
    """Log Z of all rungs from energies [rungs, chains, draws], that of the first being known."""
    count = energy[0].numel()
    log_p = -ladder[:, None] * energy.flatten()  # [rungs, all draws]
    log_z = guess.clone()
    for _ in range(MAX_ITERATIONS):
        share = (log_p - log_z[:, None]).softmax(0)
        excess = share.sum(1) - count
        curvature = torch.diag(share.sum(1)) - share @ share.mT
        step = torch.linalg.solve(curvature[1:, 1:], excess[1:])
        log_z[1:] += step.clamp(-1, 1)
        if step.abs().max() < 1e-9:
            break
    else:
        raise ValueError("rungs are too few, or draws: MBAR did not converge; take more of them.")
    # each rung's draws scatter on their own: the sums over them, turned into log Z
    slopes = torch.linalg.solve(curvature[1:, 1:], share[1:]).unflatten(1, energy.shape)
    parts = [jackknife(lambda mean: mean, it.movedim(0, -1)) for it in slopes.unbind(1)]
    variance = torch.stack([part.error * count for part in parts]).square().sum(0)
    return log_z, torch.cat([variance.new_zeros(1), variance.sqrt()])


@torch.no_grad()
def annealed_importance(
    target: Target,
    condition: Float[Tensor, "temperatures conditions"],
    *,
    rungs: int = 128,
    particles: int = 128,
    islands: int = 16,
    sweeps: int = 1,
    kernel: Kernel | None = None,
    seed: int = 0,
) -> Mean:
    r"""Log Z at every temperature, by particles cooled from β = 0, weighed and resampled.

        log Z(βₖ₊₁)/Z(βₖ) = log ⟨exp(−(βₖ₊₁ − βₖ) E)⟩ over weighed particles

    Sequential Monte Carlo: where less than half of an island's particles are effective, they
    are resampled in proportion to their weights. Z of every island is unbiased; the scatter of the
    islands is the error.

    Source: Neal (2001), Statistics and Computing 11, 125; Del Moral, Doucet and Jasra (2006),
    J. R. Statist. Soc. B 68, 411.

    Args:
        target: Angles at a temperature, such as XY(side=8).
        condition: Temperatures, with all other conditions alike.
        rungs: Rungs of the ladder, about.
        particles: Particles of each island.
        islands: Independent populations, two at least.
        sweeps: Moves at each rung.
        kernel: The move; by default that of the target, such as a heat bath.
        seed: Random seed.

    Returns:
        log Z in nats with respect to dθ on [−π, π)^N, and its standard error, [temperatures].

    >>> from rkl.sample import XY
    >>> round(annealed_importance(XY(side=2), torch.ones(1, 1)).value.item())
    11
    """
    beta = check_temperatures(target, condition)
    integer("particles", particles, at_least=2, at_most=LARGEST_COUNT)
    integer("islands", islands, at_least=2, at_most=LARGEST_COUNT)
    integer("sweeps", sweeps, at_least=1, at_most=LARGEST_COUNT)
    unit = _unit_of_energy(target, condition)
    ladder, place = _ladder(beta * unit, rungs)
    kernel = kernel_of(target, kernel)
    # p at a temperature T/β is p^β, so that one path to the coldest passes through all others
    share = ladder / ladder[-1]
    with random_numbers(seed):
        coldest = _conditions(condition, ladder[-1:] / unit)
        sampler = Sampler(target, coldest, WIDTH, sweeps, kernel)
        one = torch.ones(1, sampler.size, dtype=sampler.dtype)
        plan = [Rung(it.to(one), one[:, 0], one) for it in share[1:, None]]
        path = sampler.run(islands, particles, plan).log_z[:, 0]
    from_uniform = torch.cat([torch.zeros_like(path[:1]), path])
    log_z = log_mean(from_uniform[place])
    return Mean(log_z.value + (1 - share[place]) * _at_beta_0(target), log_z.error)


def _energies(target, condition, ladder, unit, draws, chains, kernel, seed) -> Tensor:
    """Energies at every rung, in their unit: [rungs, chains, draws]."""

    def measure(x: Tensor, each: Tensor) -> dict[str, Tensor]:
        return {"energy": _energy(target, each, x) / unit}

    # β of 1e-6 is 0 to all digits that E has
    each = _conditions(condition, ladder.clamp_min(1e-6) / unit)
    walk = markov_chain(
        target,
        each,
        draws=draws,
        chains=chains,
        kernel=kernel,
        seed=seed,
        measure=measure,
    )
    return walk.values["energy"]


def _at_beta_0(target: Target) -> float:
    return math.prod(target.event_shape) * math.log(2 * math.pi)


def _unit_of_energy(target: Target, condition: Tensor) -> float:
    """Standard deviation of E at uniform angles over √N, which is |J| of XY; 1 of a constant.

    It is rounded to a power of 2, so that its own sampling error changes nothing.
    """
    shape = (UNIFORM_DRAWS, *target.event_shape)
    generator = torch.Generator().manual_seed(0)
    x = 2 * math.pi * torch.rand(shape, generator=generator, dtype=condition.dtype)
    each = condition[:1].expand(UNIFORM_DRAWS, -1)
    spread = _energy(target, each, x.to(condition.device)).std() / math.sqrt(x[0].numel())
    return 2.0 ** round(math.log2(spread)) if 0 < spread < math.inf else 1.0


def _energy(target: Target, condition: Tensor, x: Tensor) -> Tensor:
    return -target.log_prob(x, condition).double() * condition[..., 0].double()


def _conditions(condition: Tensor, beta: Tensor) -> Tensor:
    """Conditions at these β, with the ring exchange of all others."""
    return torch.cat(
        [1 / beta[:, None].to(condition), condition[:1, 1:].expand(len(beta), -1)], -1
    )


def check_temperatures(target: Target, condition: Tensor) -> Tensor:
    """The inverse temperatures of a target of angles; refused if log Z at β = 0 is unknown."""
    condition = check_condition(target, condition)
    if target.domain != "circle" or [it.name for it in target.conditions[:1]] != ["T"]:
        raise TypeError(
            "target must be angles at a temperature T, such as XY(side=8), whose log Z is known "
            f"at β = 0; got {target}."
        )
    if condition.ndim != 2 or not len(condition):
        raise ValueError(
            "condition must be [temperatures, conditions], not empty; "
            f"got {list(condition.shape)}."
        )
    if not (condition[:, 0] > 0).all():
        raise ValueError(f"condition must hold T above 0; got {condition[:, 0].min():.4g}.")
    if not (condition[:, 1:] == condition[:1, 1:]).all():
        names = ", ".join(it.name for it in target.conditions[1:])
        raise ValueError(f"condition must have one value of {names} for all T of a call.")
    beta = 1 / condition[:, 0].double()
    x = torch.linspace(0, 3, math.prod(target.event_shape), dtype=condition.dtype).square()
    x = x.reshape(1, *target.event_shape).to(condition.device)
    one, other = (
        _energy(target, _conditions(condition, it), x) for it in (beta[:1], beta[:1] / 2)
    )
    if ((one - other).abs() > 1e-4 * (1 + one.abs())).any():
        raise ValueError(
            f"target: log_prob of {target} must be −E(x)/T, with nothing else that depends on T; "
            f"−T log_prob is {one.item():.6g} at one T and {other.item():.6g} at twice that."
        )
    return beta


def _ladder(beta: Tensor, rungs: int) -> tuple[Tensor, Tensor]:
    """β in its unit from 0, even in log(1 + β), with all asked for, and where those are."""
    integer("rungs", rungs, at_least=2, at_most=LARGEST_COUNT)
    asked, place = torch.cat([beta.new_zeros(1), beta]).unique(return_inverse=True)
    ends = torch.log1p(asked)
    width = ends[-1] / rungs
    parts = (ends.diff() / width).ceil().long().clamp_min(1)
    pieces = [
        torch.linspace(float(a), float(b), int(n) + 1, dtype=beta.dtype)[:-1]
        for a, b, n in zip(ends[:-1], ends[1:], parts, strict=True)
    ]
    ladder = torch.cat([*pieces, ends[-1:].cpu()]).to(beta.device).expm1()
    first = torch.cat([parts.new_zeros(1), parts.cumsum(0)])
    return ladder, first[place[1:]]

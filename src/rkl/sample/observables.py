"""Observables of chains with their errors, and a flow compared with held-out Markov chains."""

import math
from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from rkl.checks import floats
from rkl.metrics.overlap import earth_mover, histogram_overlap
from rkl.runs import row_fingerprint
from rkl.sample.metropolis import Chain, law_of
from rkl.sample.targets.base import Target, as_floats, check_condition
from rkl.sample.targets.check import in_double
from rkl.stats import Mean, jackknife, mean

SHOWN = 4  # coordinates that are measured of a target without observables
TURNS = 8  # configurations that are turned
# By which rounding may change the log-density of a turned one, relative to its size.
ROUNDED = {torch.float64: 1e-6, torch.float32: 1e-4}
RANGES = (-2.0, 0.0), (-3.0, 0.0)  # of energies per site, in which AdvNF's code and text count


def averages(
    target: Target,
    values: Mapping[str, Float[Tensor, "*batch chains draws"]],
    condition: Float[Tensor, "*batch conditions"],
    weights: Float[Tensor, "chains draws"] | None = None,
) -> dict[str, Mean]:
    r"""Mean of each observable over chains, with errors for dependent draws.

    Also of the response coefficients that a target derives from them, such as the specific heat
    N (⟨e²⟩ − ⟨e⟩²)/T² and the susceptibility N (⟨m²⟩ − ⟨|m|⟩²)/T of the XY model, per site, with
    e the energy per site and k_B = 1.

    Args:
        target: The target of the chains.
        values: Its observables, from :meth:`Chain.measure` or ``markov_chain``.
        condition: The conditions of the chains.
        weights: Weight of each draw, if they have any.

    Returns:
        Mean and standard error of each, [\*batch], in the unit of ``target.units``.
    """
    condition = check_condition(target, condition)
    if not isinstance(values, Mapping) or not values:
        raise TypeError(
            f"values must map names to observables, one at least; got a {type(values).__name__}."
        )
    values, names = as_floats(values), list(values)
    for name in names:
        floats(f"values[{name!r}]", values[name])
    rows = torch.stack([values[name].movedim((-2, -1), (0, 1)) for name in names], -1)
    if rows.shape[2:-1] != condition.shape[:-1]:
        raise ValueError(
            f"values must be [*batch, chains, draws] with the batch {list(condition.shape[:-1])} "
            f"of condition; got {list(values[names[0]].shape)}."
        )
    means = jackknife(lambda fluctuation: fluctuation, rows, weights)
    named = {name: Mean(means.value[..., k], means.error[..., k]) for k, name in enumerate(names)}
    for name, fluctuation in target.derived(condition).items():
        if fluctuation.of in names:
            # about the mean, so that the difference of squares keeps its digits
            x = rows[..., names.index(fluctuation.of)].double() - named[fluctuation.of].value
            moments = torch.stack([x, x.square()], -1)
            named[name] = jackknife(_scaled_variance(fluctuation.factor), moments, weights)
    return named


def _scaled_variance(factor: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda moments: factor * (moments[..., 1] - moments[..., 0].square())


@torch.no_grad()
def observe(
    target: Target,
    x: Float[Tensor, "*batch event"],
    condition: Float[Tensor, "*batch conditions"],
) -> dict[str, Float[Tensor, "*batch"]]:
    """The observables of a target, or a few quantities of one that has none.

    On the line these are the log-density and the first coordinates. For angles they are cosines
    of differences if a common turn does not change the density, as every angle is uniform
    then, and else cosines and sines of the first angles.
    """
    measured = as_floats(target.observables(x, condition))
    if measured:
        return measured
    batch = x.shape[: x.ndim - len(target.event_shape)]
    first = x.reshape(*batch, -1)[..., :SHOWN]
    named: dict[str, Tensor] = {}
    if turn_invariant(target, condition):
        named = {
            f"cos(x0 - x{k})": (first[..., 0] - first[..., k]).cos()
            for k in range(1, first.shape[-1])
        }
    else:
        angles = target.chart.circle.flatten().tolist()
        for k in range(first.shape[-1]):
            one = first[..., k]
            named |= (
                {f"cos(x{k})": one.cos(), f"sin(x{k})": one.sin()} if angles[k] else {f"x{k}": one}
            )
    return {"log_density": target.log_prob(x, condition), **named}


@torch.no_grad()
def turn_invariant(target: Target, condition: Float[Tensor, "*batch conditions"]) -> bool:
    """True if turning all angles by the same amount does not change the log-density."""
    if target.domain != "circle":
        return False
    generator = torch.Generator().manual_seed(0)
    given, dtype = in_double(target, condition[(0,) * (condition.ndim - 1)][None])
    each = given.expand(TURNS, -1)
    x = 2 * math.pi * torch.rand(TURNS, *target.event_shape, generator=generator).to(each)
    turn = torch.rand(TURNS, *[1] * len(target.event_shape), generator=generator).to(each)
    before = target.log_prob(x, each)
    change = target.log_prob(x + 2 * math.pi * turn, each) - before
    return bool(
        change.abs().max() < ROUNDED.get(dtype, ROUNDED[torch.float32]) * (1 + before.abs().max())
    )


@torch.no_grad()
def compare_with_held_out(
    target: Target,
    proposal: torch.nn.Module | torch.distributions.Distribution,
    chain: Chain,
    held_out: Float[Tensor, "rows *event"],
    *,
    train: Float[Tensor, "others *event"] | None = None,
) -> dict[str, Mean]:
    """AdvNF's figures under one condition: a flow and its chain against held-out draws.

    Every figure that compares two samples has a floor, its value between the two halves
    of the held-out draws: no flow can do better.

    Source: V. Kanaujia et al. (2024), arXiv 2401.15948, section 4.

    Args:
        target: The target; its energy is compared if it has one, and its magnetization.
        proposal: The flow.
        chain: Chains of independent Metropolis with it, under one condition.
        held_out: Independent draws of the target, such as those of a long Markov chain.
        train: Training draws, to check that none is in held_out.

    Returns:
        nll, −⟨log q⟩ in nats; acceptance; overlap of energies per site in [-2, 0] and
        [-3, 0]; emd of each observable in its unit; floors.
    """
    if not isinstance(chain, Chain):
        raise TypeError(f"chain must be a Chain; got a {type(chain).__name__}.")
    check_draws("held_out", target, held_out, 4)
    if chain.condition.ndim != 1:
        raise ValueError(
            f"chain must have one condition; got a batch {list(chain.condition.shape[:-1])}."
        )
    if train is not None:
        check_held_out(train, held_out)
    each = chain.condition.expand(len(held_out), -1)
    log_q = law_of(proposal, target, chain.condition).log_prob(held_out)
    accepted = chain.accepted.double()
    figures = {"nll": mean(-log_q), "acceptance": jackknife(lambda it: it, accepted)}
    real = as_floats(target.observables(held_out, each))
    for name, values in chain.measure(target).items():
        one, two = values.flatten(), real[name]
        half = len(two) // 2
        pairs = {"": (one, two), "_floor": (two[:half], two[half:])}
        for suffix, pair in pairs.items():
            figures[f"emd_{name}{suffix}"] = earth_mover(*pair)
            for low, high in RANGES if name == "energy" else ():
                key = f"overlap[{low:g}, {high:g}]{suffix}"
                figures[key] = histogram_overlap(*pair, low=low, high=high)
    return figures


def check_held_out(
    train: Float[Tensor, "rows *event"], held_out: Float[Tensor, "others *event"]
) -> None:
    """Refuse held-out rows that were trained on, by their fingerprints."""
    floats("train", train)
    floats("held_out", held_out)
    seen = {row_fingerprint(row.tobytes()) for row in train.cpu().float().numpy()}
    rows = [row_fingerprint(row.tobytes()) for row in held_out.cpu().float().numpy()]
    shared = sum(row in seen for row in rows)
    if shared:
        raise ValueError(
            f"held_out shares {shared} of its {len(rows)} rows with train; it must share none."
        )


def check_draws(name: str, target: Target, x: Tensor, least: int) -> None:
    """Refuse anything but at least so many finite draws [rows, *event] of a target."""
    floats(name, x)
    if x.shape[1:] != target.event_shape or len(x) < least:
        expected = ", ".join(["rows", *map(str, target.event_shape)])
        raise ValueError(
            f"{name} must be [{expected}], {least} rows at least; got {list(x.shape)}."
        )
    if not x.isfinite().all():
        raise ValueError(f"{name} must be finite; got {int((~x.isfinite()).sum())} not so.")

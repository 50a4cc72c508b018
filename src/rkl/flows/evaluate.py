"""Measure a flow on what it was fitted to, condition by condition, every figure with its error."""

import itertools
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rkl.flows.coverage import Coverage, judge_coverage, judge_ratios
from rkl.flows.evaluation import Evaluation, Reference, Values, has_temperature
from rkl.flows.importance import Thermodynamics, reweight, thermodynamics
from rkl.flows.mcmc import markov_chain
from rkl.flows.mcmc.kernels import check_condition, check_whole, seeded
from rkl.flows.metropolis import Chain, independent_metropolis, law_of, proposed
from rkl.flows.observables import averages, beside_held_out
from rkl.flows.targets import XY, Target
from rkl.metrics import Mean

VALUES = 8  # of the first condition, where none are given
FEWEST = 400  # draws on which coverage is judged, at least
JUDGED = 4_000  # and at most
MIXED = 4  # sweeps from one reference draw to the next


@torch.no_grad()
def evaluate_on_target(
    flow: nn.Module,
    target: Target,
    condition: Float[Tensor, "rows conditions"] | None = None,
    *,
    draws: int = 2_000,
    chains: int = 8,
    held_out: Sequence[Float[Tensor, "_ *event"]] | None = None,
    train: Float[Tensor, "others *event"] | None = None,
    reference: bool = False,
    seed: int = 0,
) -> Evaluation:
    """Measure a flow on its target: what it gives after correction, and what it may lack.

    Args:
        flow: The flow, called with a condition.
        target: What it was fitted to.
        condition: Where to measure; by default eight values across the target's range.
        draws: Draws of each chain.
        chains: Chains under each condition.
        held_out: Independent draws of the target under each condition, not trained on.
        train: What it was trained on, to see that no row of it is held out.
        reference: Whether to draw the target without the flow as well: exactly where it has a
            sampler, else by a Markov chain, a heat bath for the XY model.
        seed: Of all random numbers.

    >>> from rkl.flows.targets import GaussianMixture
    >>> from rkl.flows import NSF, fit_to_target
    >>> target = GaussianMixture(means=((0.0,), (2.0,)))
    >>> flow = fit_to_target(NSF(transforms=1, hidden=(16,)), target, steps=50).flow
    >>> found = evaluate_on_target(flow, target, torch.ones(1, 1), draws=500)
    >>> abs(found.thermodynamics.log_z.value.item()) < 0.1  # the target is normalised
    True
    """
    condition = condition_grid(target) if condition is None else check_condition(target, condition)
    if condition.ndim != 2:
        raise ValueError(
            f"condition must be [rows, {len(target.conditions)}]; got {list(condition.shape)}."
        )
    check_whole("draws", draws, 2)
    check_whole("chains", chains, 1)
    if held_out is not None and len(held_out) != len(condition):
        raise ValueError(
            f"held_out must be draws under each of {len(condition)} conditions; "
            f"got {len(held_out)}."
        )
    began = time.perf_counter()
    chain = independent_metropolis(target, flow, condition, draws=draws, chains=chains, seed=seed)
    seconds = time.perf_counter() - began
    values = _observed(target, chain.x, condition)
    log_ratio, log_p = _weighed(flow, target, condition, draws * chains, seed + 1)
    drawn = _reference(target, condition, draws, chains, seed + 2) if reference else None
    if drawn is not None and held_out is None:
        held_out = list(drawn.x.flatten(1, 2))
    one_by_one = _coverage(flow, target, condition, log_ratio, held_out, train, seed + 3)
    return Evaluation(
        target,
        condition,
        reweight(log_ratio, sites=math.prod(target.event_shape)),
        _thermodynamics(target, condition, log_ratio, log_p),
        chain,
        values,
        averages(target, values, condition),
        tuple(one_by_one),
        tuple(_beside(flow, target, chain, held_out)) if held_out is not None else (),
        drawn,
        seconds,
    )


def condition_grid(target: Target, values: int = VALUES) -> Float[Tensor, "rows conditions"]:
    """Values across the range of the first condition, at both ends of every other."""
    check_whole("values", values, 1)
    columns = [
        torch.linspace(it.low, it.high, 2 if k else values).tolist()
        for k, it in enumerate(target.conditions)
    ]
    rows = sorted(itertools.product(*columns), key=lambda row: row[1:])
    return torch.tensor(rows).reshape(len(rows), len(columns))


def _weighed(flow, target, condition, draws: int, seed: int) -> tuple[Tensor, Tensor]:
    """Log p − log q and log p of independent draws, [rows, draws]."""
    with seeded(seed, condition.device):
        law = law_of(flow, target, condition)
        _x, log_p, log_q = proposed(target, law, condition, (draws,))
    return (log_p - log_q).T, log_p.T


def _observed(target: Target, x: Tensor, condition: Tensor) -> Values:
    """The observables; of a target without any, the log-density and the first coordinates."""
    each = condition[:, None, None, :].expand(*x.shape[:3], -1)
    found = target.observables(x, each)
    if found:
        return found
    flat = x.flatten(3)
    few = {f"x{k}": flat[..., k] for k in range(min(4, flat.shape[-1]))}
    return {"log_density": target.log_prob(x, each), **few}


def _reference(target, condition, draws: int, chains: int, seed: int) -> Reference:
    began, shape = time.perf_counter(), (len(condition), chains, draws)
    try:
        with seeded(seed, condition.device):
            x = target.sample(condition, (chains * draws,))
        x, source = x.movedim(0, 1).reshape(*shape, *target.event_shape), "exact draws"
    except NotImplementedError:
        walk = markov_chain(target, condition, draws=draws, chains=chains, every=MIXED, seed=seed)
        assert walk.x is not None
        x, source = walk.x, "heat bath" if isinstance(target, XY) else "random walk"
    seconds = time.perf_counter() - began
    values = _observed(target, x, condition)
    return Reference(x, values, averages(target, values, condition), source, seconds)


def _coverage(flow, target, condition, log_ratio, held_out, train, seed) -> Iterator[Coverage]:
    known = held_out is not None or _knows_itself(target, condition)
    count = min(JUDGED, max(FEWEST, log_ratio.shape[-1]))
    for row, at in enumerate(condition):
        if not known:
            yield judge_ratios(log_ratio[row], sites=math.prod(target.event_shape))
            continue
        own = None if held_out is None else held_out[row]
        how: dict[str, Any] = {"held_out": own, "train": train, "draws": count}
        yield judge_coverage(target, flow, at, **how, seed=seed + row)


def _knows_itself(target: Target, condition: Tensor) -> bool:
    """Whether log Z is known, or exact draws are to be had."""
    for ability in (target.log_normaliser, target.sample):
        try:
            ability(condition[:1])
        except NotImplementedError:
            continue
        return True
    return False


def _beside(flow, target, chain: Chain, held_out) -> Iterator[dict[str, Mean]]:
    parts = "x", "accepted", "log_ratio", "log_p", "log_q", "condition"
    for row, rows in enumerate(held_out):
        one = Chain(**{name: getattr(chain, name)[row] for name in parts})
        yield beside_held_out(target, flow, one, rows)


def _thermodynamics(target, condition, log_ratio, log_p) -> Thermodynamics:
    """With T where there is one, and one series of temperatures for each value of the rest."""
    if not has_temperature(target):
        one = torch.ones(len(condition))
        return _joined(
            [thermodynamics(log_ratio[[k]], -log_p[[k]], one[[k]]) for k in range(len(one))]
        )
    temperature = condition[:, 0]
    energy = -log_p * temperature[:, None]
    others = [tuple(row[1:]) for row in condition.tolist()]
    runs = [list(rows) for _, rows in itertools.groupby(range(len(others)), others.__getitem__)]
    return _joined([thermodynamics(log_ratio[k], energy[k], temperature[k]) for k in runs])


def _joined(parts: list[Thermodynamics]) -> Thermodynamics:
    names = "log_z", "energy", "free_energy", "entropy", "heat_capacity", "gap"
    columns = ([getattr(it, name) for it in parts] for name in names)
    return Thermodynamics(
        *(
            Mean(torch.cat([it.value for it in c]), torch.cat([it.error for it in c]))
            for c in columns
        )
    )

"""Measure a flow on what it was fitted to, condition by condition, every figure with its error."""

import itertools
import math
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rkl.flows.coverage import Coverage, judge_coverage, judge_ratios
from rkl.flows.evaluation import Evaluation, Reference, Values, has_temperature
from rkl.flows.importance import Thermodynamics, reweight, thermodynamics
from rkl.flows.mcmc import RandomWalk, markov_chain, thermodynamic_integration
from rkl.flows.mcmc.kernels import check_condition, check_whole, seeded
from rkl.flows.metropolis import Chain, independent_metropolis, law_of, proposed
from rkl.flows.observables import averages, beside_held_out, observe
from rkl.flows.targets import XY, Phi4, Target
from rkl.flows.targets.base import Condition
from rkl.metrics import Mean
from rkl.metrics.chains import rhat

VALUES = 8  # of the first condition, where none are given
FEWEST = 400  # draws on which coverage is judged, at least
JUDGED = 4_000  # and at most
SWEEPS = {  # before the first draw of a reference, and from one draw to the next
    "heat bath": {"warm_up": 200, "every": 2},
    "random walk": {"warm_up": 4_000, "every": 40},
}
UNMIXED = 1.1  # R-hat above which a reference is none
LADDERS = 16  # chains at each rung of thermodynamic integration
MANY = 128  # chains of a reference, at most, of 50 draws or more


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
            sampler, else by a Markov chain, a heat bath for XY and Phi4.
        seed: Of all random numbers.

    >>> from rkl.flows.targets import GaussianMixture
    >>> from rkl.flows import NSF, fit_to_target
    >>> target = GaussianMixture(means=((0.0,), (2.0,)))
    >>> flow = fit_to_target(NSF(transforms=1, hidden=(16,)), target, steps=50).flow
    >>> found = evaluate_on_target(flow, target, torch.ones(1, 1), draws=500)
    >>> abs(found.thermodynamics.log_z.value.item()) < 0.1  # the target is normalised
    True
    """
    condition = _checked(target, condition, draws, chains, held_out)
    began = time.perf_counter()
    chain = independent_metropolis(target, flow, condition, draws=draws, chains=chains, seed=seed)
    seconds = time.perf_counter() - began
    values = _observed(target, chain.x, condition)
    began = time.perf_counter()
    log_ratio, log_p = _weighed(flow, target, condition, draws * chains, seed + 1)
    weights_seconds = time.perf_counter() - began
    drawn = _reference(target, condition, draws * chains, seed + 2) if reference else None
    if drawn is not None and drawn.mixed and held_out is None:
        flat = drawn.x.flatten(1, 2)
        held_out = list(flat[:, :: -(-flat.shape[1] // JUDGED)])
    return Evaluation(
        target,
        condition,
        reweight(log_ratio, sites=math.prod(target.event_shape)),
        _thermodynamics(target, condition, log_ratio, log_p),
        chain,
        values,
        averages(target, values, condition),
        tuple(_coverage(flow, target, condition, log_ratio, held_out, train, seed + 3)),
        tuple(_beside(flow, target, chain, held_out)) if held_out is not None else (),
        drawn,
        seconds,
        weights_seconds,
    )


def _checked(target: Target, condition: Tensor | None, draws, chains, held_out) -> Tensor:
    if condition is None:
        condition = condition_grid(target.conditions)
    condition = check_condition(target, condition)
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
    return condition


def condition_grid(
    ranges: Sequence[Condition], values: int = VALUES
) -> Float[Tensor, "rows conditions"]:
    """Values across the range of the first condition, at both ends of every other.

    >>> from rkl.flows.targets import XY
    >>> condition_grid(XY(side=2).conditions, 3)
    tensor([[0.0500],
            [1.0500],
            [2.0500]])
    """
    check_whole("values", values, 1)
    columns = []
    for k, it in enumerate(ranges):
        several = (2 if k else values) if it.low < it.high else 1
        columns.append(torch.linspace(it.low, it.high, several).tolist())
    rows = sorted(itertools.product(*columns), key=lambda row: row[1:])
    return torch.tensor(rows).reshape(len(rows), len(columns))


def _weighed(flow, target, condition, draws: int, seed: int) -> tuple[Tensor, Tensor]:
    """Log p − log q and log p of independent draws, [rows, draws]."""
    with seeded(seed, condition.device):
        law = law_of(flow, target, condition)
        _x, log_p, log_q = proposed(target, law, condition, (draws,))
    return (log_p - log_q).T, log_p.T


def _observed(target: Target, x: Tensor, condition: Tensor) -> Values:
    """What is measured of states [rows, chains, draws, *event]."""
    return observe(target, x, condition[:, None, None, :].expand(*x.shape[:3], -1))


def _reference(target, condition, draws: int, seed: int) -> Reference:
    chains = max(1, min(MANY, draws // 50))
    began, shape = time.perf_counter(), (len(condition), chains, draws // chains)
    try:
        with seeded(seed, condition.device):
            x = target.sample(condition, (math.prod(shape[1:]),))
        x, source = x.movedim(0, 1).reshape(*shape, *target.event_shape), "exact draws"
    except NotImplementedError:
        source = "heat bath" if isinstance(target, XY | Phi4) else "random walk"
        how: dict[str, Any] = {"draws": shape[2], "chains": chains, "seed": seed, **SWEEPS[source]}
        if source == "random walk":
            how["kernel"] = RandomWalk(step=1 / math.sqrt(math.prod(target.event_shape)))
        x = markov_chain(target, condition, **how).x
        assert x is not None
    seconds = time.perf_counter() - began
    values = _observed(target, x, condition)
    means = averages(target, values, condition)
    ratios = torch.stack([rhat(it.movedim(0, -1)) for it in values.values()])
    stuck = bool(ratios.isnan().all(0).any())  # one quantity may be constant, not all of them
    worst = math.inf if stuck else ratios.nan_to_num(1.0).max().item()
    if worst > UNMIXED:
        warnings.warn(
            f"reference: the chains of the {source} have an R-hat of up to {worst:.2f}; they have "
            "not mixed, and nothing is judged by them.",
            stacklevel=4,  # past the decorator
        )
    log_z = _log_z(target, condition, seed)
    return Reference(x, values, means, source, seconds, worst <= UNMIXED, *log_z)


def _log_z(target, condition, seed: int) -> tuple[Mean | None, str, float]:
    """Without the flow: log Z, where it comes from, and how long it took."""
    try:
        exact = target.log_normaliser(condition).double()
        return Mean(exact, torch.zeros_like(exact)), "its known value", 0.0
    except NotImplementedError:
        if not isinstance(target, XY):
            return None, "", 0.0
    began = time.perf_counter()
    parts = [
        thermodynamic_integration(target, condition[k], seed=seed) for k in _series(condition)
    ]
    log_z = Mean(torch.cat([it.value for it in parts]), torch.cat([it.error for it in parts]))
    return log_z, "thermodynamic integration", time.perf_counter() - began


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
    series = _series(condition)
    return _joined([thermodynamics(log_ratio[k], energy[k], temperature[k]) for k in series])


def _series(condition: Tensor) -> list[list[int]]:
    """Neighbouring rows that differ in the first condition alone."""
    others = [tuple(row[1:]) for row in condition.tolist()]
    return [list(rows) for _, rows in itertools.groupby(range(len(others)), others.__getitem__)]


def _joined(parts: list[Thermodynamics]) -> Thermodynamics:
    names = "log_z", "energy", "free_energy", "entropy", "heat_capacity", "gap"
    columns = ([getattr(it, name) for it in parts] for name in names)
    return Thermodynamics(
        *(
            Mean(torch.cat([it.value for it in c]), torch.cat([it.error for it in c]))
            for c in columns
        )
    )

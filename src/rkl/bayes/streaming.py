"""One pass over the draws: the means that the acts under both KLs are made of, with errors."""

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import xarray as xr
from torch import Tensor
from torch.distributions import Distribution

from rkl.bayes.blocks import INNER, Law, Plan, Sums, Totals, check_domain, sums_of
from rkl.bayes.draws import Draws, read
from rkl.bayes.families import ExponentialFamily, Natural, family_of
from rkl.estimators import has_compiler
from rkl.stats import BatchMeans
from rkl.stats.batch_means import HALVES, slots_of

DIRECTIONS = ("reverse", "forward")
FIRST = 2**17  # numbers, but 8 to 64 draws, that the reference law is made from
CACHED, FUSED = 2**16, 2**21  # laws of a block: uncompiled lest it leave the cache, and compiled
WIDE = 2**12  # laws side by side from which on half as many batches must do
WORTH_COMPILING = 2**30  # laws: below it, compiling costs more than it saves
TASKS = 64  # chunks that dask works on before their sums are taken in


@dataclass(frozen=True, eq=False)
class Moments:
    r"""What one pass leaves: means of what both acts average, about a reference law P_0.

    The reverse-KL act has E η for its natural parameter, the forward-KL act E m for its mean
    parameter. By Pythagoras their risks are

        E KL(P_act ‖ P_θ) = E KL(P_0 ‖ P_θ) − KL(P_0 ‖ P_act),
        E KL(P_θ ‖ P_act) = E KL(P_θ ‖ P_0) − KL(P_act ‖ P_0),

    which lose no digits, for P_0 is near: it is the act of the first few draws.

    Attributes:
        family: The exponential family, its statistic taken about P_0.
        reference: Natural parameter of P_0.
        reverse: Means of η and KL(P_0 ‖ P_θ), [components + 1, *batch].
        forward: Means of m and KL(P_θ ‖ P_0), [components + 1, *batch].
    """

    family: ExponentialFamily
    reference: Natural
    reverse: BatchMeans | None
    forward: BatchMeans | None

    def averaged(self, direction: str) -> BatchMeans:
        """What was averaged for one of the acts, "reverse" or "forward"."""
        found = {"reverse": self.reverse, "forward": self.forward}.get(direction)
        if found is None:
            raise ValueError(f"direction {direction!r} was not averaged.")
        return found

    @property
    def finite(self) -> bool:
        """Whether every mean is a number."""
        averaged = (it for it in (self.reverse, self.forward) if it is not None)
        return all(bool(it.mean.isfinite().all()) for it in averaged)


def one_pass(
    draws: Draws,
    law: Law,
    names: Sequence[str],
    directions: Sequence[str] = DIRECTIONS,
    compiled: bool | None = None,
) -> Moments:
    """Average what the acts need, reading each draw once, in memory that does not grow with them.

    Draws are read, and averaged, block by block; those of dask where they live.

    Args:
        draws: The posterior.
        law: From some draws by name, [n, ...] each, to their laws of an exponential family, of
            batch shape [n, *batch]. It need not check them.
        names: The variables it takes.
        directions: "reverse" or "forward", or both.
        compiled: Whether to compile what is done to a block; by default if a billion laws are
            to come, for it takes a few seconds. Only where components are numbers.

    Raises:
        ValueError: Some draw is not finite, or makes no law of the family.

    >>> draws = Draws({"rate": [[1.0, 2.0, 4.0, 8.0]]})
    >>> moments = one_pass(draws, lambda theta: torch.distributions.Poisson(**theta), ["rate"])
    >>> natural, mean = moments.reverse.mean[0], moments.forward.mean[0]
    >>> round(natural.exp().item(), 6), round(mean.item(), 6)
    (2.828427, 3.75)
    """
    with torch.no_grad():
        family, reference, batch = _reference(draws, law, names, directions)
        laws = math.prod(batch)
        if compiled is None:
            compiled = draws.chains * draws.draws * laws >= WORTH_COMPILING and has_compiler()
        compiled = compiled and not any(family.events)
        unit, rows, length = _layout(draws, max(1, laws), FUSED if compiled else CACHED)
        rest = draws.draws % unit // INNER * INNER
        plan = Plan(law, family, reference, batch, tuple(directions), unit, rest, rows, compiled)
        try:
            moments = _averaged(draws, names, plan, length)
            if not moments.finite:
                moments = _averaged(draws, names, plan._replace(kernels=False), length)
        except ValueError:
            _refuse(draws, law, names, family, directions)
            raise
        if not moments.finite:
            _refuse(draws, law, names, family, directions)
            raise ValueError(f"The means of {', '.join(names)} exceed double precision.")
    return moments


def _layout(draws: Draws, laws: int, block: int) -> tuple[int, int, int]:
    """Draws that are summed to one number, draws of a block, draws of half a batch."""
    rows = max(1, block // (INNER * laws)) * INNER
    half = -(-draws.draws // slots_of(draws.chains, _halves(laws)))
    if half > rows:
        return rows, rows, rows * -(-half // rows)
    unit = half if half < INNER else INNER * -(-half // INNER)
    return unit, unit * max(1, rows // unit), unit


def _halves(laws: int) -> int:
    """Half batches: fewer where their number is what takes memory and time."""
    return HALVES // 2 if laws >= WIDE else HALVES


def _averaged(draws: Draws, names: Sequence[str], plan: Plan, length: int) -> Moments:
    shape = (plan.family.flatten(plan.reference).shape[-1] + 1, *plan.batch)
    halves = _halves(math.prod(plan.batch))
    means = {
        name: BatchMeans(draws.chains, shape, length, halves, draws.draws)
        for name in plan.directions
    }
    for chain, found in _chunks(draws, names, plan, means):
        for sums in found:
            for name, held in means.items():
                held.add(chain, sums.start, sums.run, sums.values[name], sums.weights)
    found = means.get("reverse"), means.get("forward")
    return Moments(plan.family, plan.reference, *found)


def _chunks(
    draws: Draws, names: Sequence[str], plan: Plan, means: dict[str, BatchMeans]
) -> Iterator[tuple[int, list[Sums]]]:
    """What is to be added of every chain; the rest is written where it belongs."""
    arrays = {name: draws.of(name) for name in names}
    parts = draws.parts(names, multiple=plan.rows)
    if any(array.chunks is not None for array in arrays.values()):
        yield from _by_dask(draws, arrays, [part for chain, part in parts if chain == 0], plan)
        return
    for chain, part in parts:
        chunk = {name: read(array, chain, part) for name, array in arrays.items()}
        room = functools.partial(_room, means, chain)
        yield chain, sums_of(plan, part.start, chunk, _weights(draws, chain, part), room)


def _room(means: dict[str, BatchMeans], chain: int, *runs: int) -> Totals | None:
    found = {}
    for name, held in means.items():
        place = held.room(chain, *runs)
        if place is None:
            return None
        found[name] = place
    return found


def _by_dask(
    draws: Draws, arrays: dict[str, xr.DataArray], parts: list[slice], plan: Plan
) -> Iterator[tuple[int, list[Sums]]]:
    """The same, where the chunks live: only sums come back."""
    import dask  # pyright: ignore[reportMissingImports]: lazy arrays brought it

    task, plan = dask.delayed(_of_chains, pure=False), dask.delayed(plan, traverse=False)
    # a task takes the chains that are stored together, lest it fetches them for each anew
    together = max(x.chunksizes["chain"][0] for x in arrays.values() if x.chunks is not None)
    groups = [range(draws.chains)[k : k + together] for k in range(0, draws.chains, together)]
    places = [(chains, part) for part in parts for chains in groups]
    for k in range(0, len(places), TASKS):
        tasks = []
        for chains, part in places[k : k + TASKS]:
            chunk = {name: _unread(x, chains, part) for name, x in arrays.items()}
            weights = {chain: _weights(draws, chain, part) for chain in chains}
            tasks.append(task(plan, part.start, chunk, weights))
        for found in dask.compute(*tasks):
            yield from found


def _of_chains(plan: Plan, start: int, chunk: dict[str, Any], weights: dict) -> list:
    return [
        (chain, sums_of(plan, start, {name: x[k] for name, x in chunk.items()}, w))
        for k, (chain, w) in enumerate(weights.items())
    ]


def _unread(array: xr.DataArray, chains: range, part: slice) -> Any:
    at = slice(chains.start, chains.stop)
    return array.isel(chain=at, draw=part).transpose("chain", "draw", ...).data


def _weights(draws: Draws, chain: int, part: slice) -> Tensor | None:
    return None if draws.weights is None else draws.weights[chain, part]


def _reference(
    draws: Draws, law: Law, names: Sequence[str], directions: Sequence[str] = DIRECTIONS
) -> tuple[ExponentialFamily, Natural, torch.Size]:
    """The family about the act of the first few draws, and that act."""
    numbers = sum(math.prod(draws.shape(name)) for name in names)
    rows = min(64, max(8, FIRST // max(1, numbers)))
    chunks = draws.chunks(names, rows * numbers)
    first = law(next(chunks)[2])
    family = family_of(first)
    if family is None:
        raise ValueError(f"law must be of an exponential family; got a {type(first).__name__}.")
    _check(first, family, directions)
    natural = family.natural(first)
    if bool(family.contains(natural).all()):
        act = family.from_natural(tuple(component.mean(0) for component in natural))
    else:
        act = family.from_natural(_natural_of_means(draws, law, names, family))
    family = family.about(act)
    return family, family.natural(act), first.batch_shape[1:]


def _natural_of_means(
    draws: Draws, law: Law, names: Sequence[str], family: ExponentialFamily
) -> Natural:
    """The forward act of some draws, of which single ones lie on the edge of the family."""
    total, count, mean = None, 0, ()
    for _, _, chunk in draws.chunks(names):
        found = law(chunk)
        means = tuple(x.sum(0) for x in family.mean(family.natural(found)))
        total = means if total is None else plus(total, means)
        count += found.batch_shape[0]
        mean = tuple(x / count for x in total)
        if all(bool(inside.all()) for inside in family.mean_inside(mean)):
            break
    family.check_mean(mean)
    return family.from_mean(mean)


def plus(x: Natural, y: Natural, sign: int = 1) -> Natural:
    """X + sign · y, by components."""
    return tuple(a + sign * b for a, b in zip(x, y, strict=True))


def _refuse(
    draws: Draws,
    law: Law,
    names: Sequence[str],
    family: ExponentialFamily,
    directions: Sequence[str],
) -> None:
    """Say which draw it is that has no finite mean."""
    for _, _, chunk in draws.chunks(names):
        _check(law(chunk), family, directions)


def _check(law: Distribution, family: ExponentialFamily, directions: Sequence[str]) -> None:
    """Refuse draws that are on the edge, where what is averaged is infinite there."""
    check_domain(law)
    natural = family.natural(law)
    averaged = all(bool(x.isfinite().all()) for x in family.mean(natural))
    if averaged and "reverse" not in directions:
        return
    try:
        family.check(natural)
    except ValueError as error:
        if not averaged:
            raise
        raise ValueError(
            f"{error} Reverse KL from an act to such a draw is infinite unless the act lies on "
            "the same edge; KL() averages the mean parameter, which is finite, and Intrinsic() "
            "takes the smaller of both."
        ) from error

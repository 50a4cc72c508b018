"""One pass over the draws: the means that the acts under both KLs are made of, with errors."""

import dataclasses
import functools
import importlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import xarray as xr
from torch import Tensor
from torch.distributions import Distribution, LogNormal, Normal, constraints

from rkl.bayes.draws import Draws, read, tensor_of
from rkl.bayes.families import ExponentialFamily, Natural, family_of
from rkl.estimators import compile_apart, compiled_or_eager, has_compiler
from rkl.stats import BatchMeans
from rkl.stats.batch_means import HALVES, slots_of

DIRECTIONS = ("reverse", "forward")
REFERENCE_NUMBERS = 2**17  # that the reference distribution is made from, but 8 to 64 draws
CACHED, FUSED = 2**16, 2**21  # distributions of a block: in the cache, and compiled
WIDE_BATCH = 2**12  # distributions side by side; from it on, half as many batches are kept
WORTH_COMPILING = 2**30  # distributions: below it, compiling costs more than it saves
TASKS = 64  # chunks that dask works on before their sums are taken in
INNER = 8  # rows that are summed together: a core looks ahead in about so many streams of memory
NARROW_BATCH = 64  # distributions side by side; below it, draws are contiguous in memory
Law = Callable[[dict[str, Tensor]], Distribution]
Totals = dict[str, Tensor]  # by direction, [runs, components + 1, *batch]


class Plan(NamedTuple):
    """The work on a chunk of draws, complete for a worker of dask."""

    law: Law
    family: ExponentialFamily
    reference: Natural
    batch: torch.Size
    directions: tuple[str, ...]
    unit: int  # draws that are summed to one number
    rest: int  # what units leave of a chain, but for less than eight draws
    rows: int  # draws of a block
    compiled: bool
    kernels: bool = True
    fixed: ExponentialFamily | None = None  # as it was found; every draw must be of it


class MovingFamilyError(ValueError):
    """A draw in which a number differs that the family of the other draws holds fixed."""

    def __init__(self, message: str, chain: int = 0, draw: int = 0):
        super().__init__(message, chain, draw)
        self.chain, self.draw = chain, draw

    def __str__(self) -> str:
        return self.args[0]


class Sums(NamedTuple):
    """Sums over runs of consecutive draws."""

    start: int
    run: int
    values: Totals
    weights: Tensor


def sums_of(
    plan: Plan,
    start: int,
    chunk: dict[str, Any],
    weights: Tensor | None = None,
    room: Callable[[int, int, int], Totals | None] = lambda start, run, runs: None,
) -> list[Sums]:
    """Sums over some consecutive draws of a chain, the first of which is number ``start``.

    Sums that ``room`` has a place for are written there and not returned.
    """
    drawn = {name: x if isinstance(x, Tensor) else tensor_of(x) for name, x in chunk.items()}
    sums = []
    for first, last, run in pieces(start, start + len(next(iter(drawn.values()))), plan):
        part = slice(first - start, last - start)
        w = None if weights is None else weights[part]
        block = {name: _lay_out(x[part]) for name, x in drawn.items()}
        compiled = plan.compiled and run in (plan.unit, plan.rest)
        place = room(first, run, (last - first) // run) if compiled and w is None else None
        totals = _totals_of(plan, compiled, block, run, w, place)
        if place is None:
            count = torch.full(((last - first) // run,), float(run), dtype=torch.float64)
            count = count if w is None else w.unflatten(0, (-1, run)).sum(1)
            sums.append(Sums(first, run, totals, count))
    return sums


def _totals_of(
    plan: Plan,
    compiled: bool,
    block: dict[str, Tensor],
    run: int,
    w: Tensor | None,
    place: Totals | None,
) -> Totals:
    law, family = plan.law(block), plan.family
    if plan.fixed is not None and not is_of(law, plan.fixed):
        raise MovingFamilyError("what the family holds fixed differs from draw to draw.")
    kernel = (
        plan.kernels and w is None and run % INNER == 0 and isinstance(law, Normal | LogNormal)
    )
    if not kernel:
        check_domain(law)
    if not compiled:
        return _totals(plan.batch, plan.directions, run, kernel, family, law, plan.reference, w)
    parameters = {name: vars(law)[name] for name in law.arg_constraints if name in vars(law)}
    parameters = parameters or {name: getattr(law, name) for name in family.parameters}
    fixed = {field.name: getattr(family, field.name) for field in dataclasses.fields(family)}
    numbers = tuple((k, x) for k, x in fixed.items() if not isinstance(x, Tensor))
    into = place is not None
    how = plan.batch, plan.directions, run, kernel
    key = (*how, into, type(family), numbers)
    eager = functools.partial(_remade_totals, *how)

    def compile_step():
        for x in [*parameters.values(), *([] if w is None else [w]), *(place or {}).values()]:
            torch._dynamo.maybe_mark_dynamic(x, 0)  # one graph for every number of runs
        return _compile(*key)

    return compiled_or_eager(
        key, compile_step, eager, family, parameters, plan.reference, w, place
    )


@functools.cache
def _compile(batch, directions, run, kernel, *kind) -> Callable[..., Totals]:
    # Only tensors are worth a guard: the rest, of the family too, is in the key.
    return compile_apart(_remade_totals, batch, directions, run, kernel)


def _remade_totals(batch, directions, run, kernel, family, parameters, reference, w, place):
    law = family.distribution(**parameters, validate_args=False)
    totals = _totals(batch, directions, run, kernel, family, law, reference, w)
    if place is None:
        return totals
    for name in directions:
        place[name].copy_(totals[name])
    return place


def _totals(
    batch: torch.Size,
    directions: tuple[str, ...],
    run: int,
    kernel: bool,
    family: ExponentialFamily,
    law: Distribution,
    reference: Natural,
    w: Tensor | None,
) -> Totals:
    if kernel and isinstance(law, Normal | LogNormal):
        totals = _normal_totals(family, law, reference, run)
    else:
        terms = family.terms(law, reference)
        totals = {}
        for name, components, divergence in (
            ("reverse", terms.natural, terms.from_reference),
            ("forward", terms.mean, terms.to_reference),
        ):
            flat = family.flatten(tuple(_over_runs(x, run, w) for x in components))
            rows = [*flat.unbind(-1), _over_runs(divergence, run, w)]
            totals[name] = [x.expand(len(x), *batch) for x in rows]
    return {name: torch.stack(totals[name], 1) for name in directions}


def _normal_totals(
    family: ExponentialFamily, law: Normal | LogNormal, reference: Natural, run: int
) -> dict[str, list[Tensor]]:
    """The ``terms`` of a Normal distribution, with one logarithm for eight draws.

    Σ log x = log Π x, and a product of eight ratios of variances stays in range unless each is
    1e38; what leaves it is averaged again without.
    """
    precision_0 = -2 * reference[1]  # and P_0 is at 0, for it is the family's origin
    loc, scale = law.loc - family.origin, law.scale  # pyright: ignore[reportAttributeAccessIssue]
    variance = scale * scale
    precision = variance.reciprocal()
    scaled = loc * precision
    eights, inner = _in_eights(torch.where(scale > 0, variance * precision_0, math.nan), run)
    log_ratio = eights.prod(inner).log().sum(1)
    scaled_sum, precision_sum, loc_sum, square_sum, pull = (
        _over_runs(x, run, None)
        for x in (scaled, precision, loc, variance.addcmul(loc, loc), loc * scaled)
    )
    from_reference = (precision_sum / precision_0 - run + log_ratio + pull) / 2
    to_reference = (square_sum * precision_0 - run - log_ratio) / 2
    return {
        "reverse": [scaled_sum, -precision_sum / 2, from_reference],
        "forward": [loc_sum, square_sum, to_reference],
    }


def _over_runs(x: Tensor, run: int, w: Tensor | None) -> Tensor:
    """Sums [runs, ...] of [draws, ...] over runs of draws, with their weights."""
    if w is not None:
        x = x * w.reshape(-1, *[1] * (x.ndim - 1))
    if run % INNER:
        return x.unflatten(0, (-1, run)).sum(1)
    eights, inner = _in_eights(x, run)
    return eights.sum(inner).sum(1)


def _in_eights(x: Tensor, run: int) -> tuple[Tensor, int]:
    """Draws [n, ...] by runs and in eights, and the axis of the eight.

    Group contiguous rows; group scalars with a stride, so that the sum vectorises.
    """
    if x[0].numel() < NARROW_BATCH:
        return x.unflatten(0, (-1, INNER, run // INNER)), 1
    return x.unflatten(0, (-1, run // INNER, INNER)), 2


def is_of(law: Distribution, family: ExponentialFamily) -> bool:
    """True if the family holds all of these distributions, with what it holds fixed."""
    if type(law) is not family.distribution:
        return False
    try:
        return type(family).of(law) == family
    except ValueError:
        return False


def refuse_other_families(
    draws: Draws, law: Law, names: Sequence[str], family: ExponentialFamily
) -> None:
    """Refuse draws whose distributions are not of the family.

    Raises:
        MovingFamilyError: One of them, which is named.
    """
    for chain, part, chunk in draws.chunks(names):
        if is_of(law(chunk), family):
            continue
        first, last = 0, part.stop - part.start
        while last - first > 1:
            middle = (first + last) // 2
            half = {name: x[first:middle] for name, x in chunk.items()}
            first, last = (middle, last) if is_of(law(half), family) else (first, middle)
        draw = part.start + first
        raise MovingFamilyError(
            f"what a {family.distribution.__name__} of the other draws has fixed is another "
            f"number at chain {chain}, draw {draw}.",
            chain,
            draw,
        )


def check_domain(law: Distribution) -> None:
    """Refuse parameters outside their domains, each checked by itself."""
    for name, constraint in law.arg_constraints.items():
        # those on matrices are left to the Cholesky decomposition that follows
        if (
            name not in vars(law)
            or constraints.is_dependent(constraint)
            or constraint.event_dim > 1
        ):
            continue
        inside = constraint.check(vars(law)[name])
        if not inside.all():
            raise ValueError(
                f"{name} of a {type(law).__name__} must satisfy {constraint}; got "
                f"{vars(law)[name][~inside][0].tolist()} among the draws."
            )


def _lay_out(x: Tensor) -> Tensor:
    """Draws [n, ...] with the longer of both axes contiguous in memory."""
    if x.ndim == 1 or x[0].numel() >= NARROW_BATCH:
        return x
    return x.movedim(0, -1).contiguous().movedim(-1, 0)


def pieces(start: int, stop: int, plan: Plan) -> Iterator[tuple[int, int, int]]:
    """Blocks of whole units, and what is left before and after: first, last and run."""
    unit = plan.unit
    while start < stop:
        whole, lost = (stop - start) // unit * unit, start % unit
        if whole and not lost:
            last, run = start + min(plan.rows, whole), unit
        else:
            last = min(stop, start - lost + unit)
            eights = (last - start) // INNER * INNER
            last = start + (eights or last - start)
            run = last - start
        yield start, last, run
        start = last


@dataclass(frozen=True, eq=False)
class Moments:
    r"""Means of one pass, of what both acts average, about a reference distribution P_0.

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

    def means_of(self, direction: str) -> BatchMeans:
        """The means for one of the acts, "reverse" or "forward"."""
        means = {"reverse": self.reverse, "forward": self.forward}.get(direction)
        if means is None:
            raise ValueError(f"direction {direction!r} was not averaged.")
        return means

    @property
    def finite(self) -> bool:
        """True if every mean is finite."""
        averaged = (it for it in (self.reverse, self.forward) if it is not None)
        return all(bool(it.mean.isfinite().all()) for it in averaged)


def one_pass(
    draws: Draws,
    law: Law,
    names: Sequence[str],
    directions: Sequence[str] = DIRECTIONS,
    compiled: bool | None = None,
    family: ExponentialFamily | None = None,
) -> Moments:
    """Average what the acts need, reading each draw once, in memory that does not grow with them.

    Draws are read, and averaged, block by block; those of dask where they live.

    Args:
        draws: The posterior.
        law: From some draws by name, [n, ...] each, to their distributions of an exponential
            family, of batch shape [n, *batch]. It need not check them.
        names: The variables it takes.
        directions: "reverse" or "forward", or both.
        compiled: Whether to compile what is done to a block; by default if a billion distributions
            are to come, for it takes a few seconds. Only where components are numbers.
        family: Of all draws; by default that of the first few.

    Raises:
        MovingFamilyError: Some draw makes a distribution of another family.
        ValueError: Some draw is not finite, or makes no distribution of the family.

    >>> draws = Draws({"rate": [[1.0, 2.0, 4.0, 8.0]]})
    >>> moments = one_pass(draws, lambda theta: torch.distributions.Poisson(**theta), ["rate"])
    >>> natural, mean = moments.reverse.mean[0], moments.forward.mean[0]
    >>> round(natural.exp().item(), 6), round(mean.item(), 6)
    (2.828427, 3.75)
    """
    with torch.no_grad():
        fixed = _family(draws, law, names) if family is None else family
        try:
            family, reference, batch = _reference(draws, law, names, fixed, directions)
        except MovingFamilyError:
            refuse_other_families(draws, law, names, fixed)
            raise
        laws = math.prod(batch)
        if compiled is None:
            compiled = draws.chains * draws.draws * laws >= WORTH_COMPILING and has_compiler()
        compiled = compiled and not any(family.events)
        unit, rows, length = _layout(draws, max(1, laws), FUSED if compiled else CACHED)
        rest = draws.draws % unit // INNER * INNER
        plan = Plan(law, family, reference, batch, tuple(directions), unit, rest, rows, compiled)
        plan = plan._replace(fixed=fixed)
        try:
            moments = _average(draws, names, plan, length)
            if not moments.finite:
                moments = _average(draws, names, plan._replace(kernels=False), length)
        except MovingFamilyError:
            refuse_other_families(draws, law, names, fixed)
            raise
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
    return HALVES // 2 if laws >= WIDE_BATCH else HALVES


def _average(draws: Draws, names: Sequence[str], plan: Plan, length: int) -> Moments:
    shape = (plan.family.flatten(plan.reference).shape[-1] + 1, *plan.batch)
    halves = _halves(math.prod(plan.batch))
    means = {
        name: BatchMeans(draws.chains, shape, length, halves, draws.draws)
        for name in plan.directions
    }
    for chain, both in _chunks(draws, names, plan, means):
        for sums in both:
            for name, mean in means.items():
                mean.add(chain, sums.start, sums.run, sums.values[name], sums.weights)
    both = means.get("reverse"), means.get("forward")
    return Moments(plan.family, plan.reference, *both)


def _chunks(
    draws: Draws, names: Sequence[str], plan: Plan, means: dict[str, BatchMeans]
) -> Iterator[tuple[int, list[Sums]]]:
    """Sums to add for every chain; sums that fill half a batch are written in place."""
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
    places = {}
    for name, mean in means.items():
        place = mean.room(chain, *runs)
        if place is None:
            return None
        places[name] = place
    return places


def _by_dask(
    draws: Draws, arrays: dict[str, xr.DataArray], parts: list[slice], plan: Plan
) -> Iterator[tuple[int, list[Sums]]]:
    """Sums to add for every chain, computed where the chunks live."""
    dask: Any = importlib.import_module("dask")  # lazy arrays brought it
    task, shared = dask.delayed(_of_chains, pure=False), dask.delayed(plan, traverse=False)
    # a task takes the chains that are stored together, to fetch them once
    together = max(x.chunksizes["chain"][0] for x in arrays.values() if x.chunks is not None)
    groups = [range(draws.chains)[k : k + together] for k in range(0, draws.chains, together)]
    places = [(chains, part) for part in parts for chains in groups]
    for k in range(0, len(places), TASKS):
        tasks = []
        for chains, part in places[k : k + TASKS]:
            chunk = {name: _unread(x, chains, part) for name, x in arrays.items()}
            weights = {chain: _weights(draws, chain, part) for chain in chains}
            tasks.append(task(shared, part.start, chunk, weights))
        for sums in dask.compute(*tasks):
            yield from sums


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


def _few(draws: Draws, law: Law, names: Sequence[str]) -> Distribution:
    """The distributions of the first few draws."""
    numbers = sum(math.prod(draws.shape(name)) for name in names)
    rows = min(64, max(8, REFERENCE_NUMBERS // max(1, numbers)))
    return law(next(draws.chunks(names, rows * numbers))[2])


def _family(draws: Draws, law: Law, names: Sequence[str]) -> ExponentialFamily:
    first = _few(draws, law, names)
    family = family_of(first)
    if family is None:
        raise ValueError(
            f"distribution must be of an exponential family; got a {type(first).__name__}."
        )
    return family


def _reference(
    draws: Draws, law: Law, names: Sequence[str], family: ExponentialFamily,
    directions: Sequence[str],
) -> tuple[ExponentialFamily, Natural, torch.Size]:  # fmt: skip
    """The family about the act of the first few draws, and that act."""
    first = _few(draws, law, names)
    if not is_of(first, family):
        raise MovingFamilyError("what the family holds fixed differs from draw to draw.")
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
    """The forward act of a few draws, some of which lie on the edge of the family."""
    total, count, mean = None, 0, ()
    for _, _, chunk in draws.chunks(names):
        distribution = law(chunk)
        means = tuple(x.sum(0) for x in family.mean(family.natural(distribution)))
        total = means if total is None else plus(total, means)
        count += distribution.batch_shape[0]
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
    for _, _, chunk in draws.chunks(names):
        _check(law(chunk), family, directions)


def _check(law: Distribution, family: ExponentialFamily, directions: Sequence[str]) -> None:
    """Refuse draws on the edge of the family, where what is averaged is infinite."""
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

"""What is done to a block of draws: sums over runs of them of all that the acts average."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution, LogNormal, Normal, constraints

from rkl.bayes.draws import tensor_of
from rkl.bayes.families import ExponentialFamily, Natural
from rkl.estimators import compiled_or_eager

INNER = 8  # rows that are summed together: a core looks ahead in about so many streams of memory
NARROW = 64  # laws side by side below which, in memory, draws are

Law = Callable[[dict[str, Tensor]], Distribution]
Totals = dict[str, Tensor]  # by direction, [runs, components + 1, *batch]


class Plan(NamedTuple):
    """What is done to a chunk of draws: all that a worker elsewhere must know."""

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
    found = []
    for first, last, run in pieces(start, start + len(next(iter(drawn.values()))), plan):
        part = slice(first - start, last - start)
        w = None if weights is None else weights[part]
        block = {name: _laid(x[part]) for name, x in drawn.items()}
        compiled = plan.compiled and run in (plan.unit, plan.rest)
        place = room(first, run, (last - first) // run) if compiled and w is None else None
        totals = _totals_of(plan, compiled, block, run, w, place)
        if place is None:
            count = torch.full(((last - first) // run,), float(run), dtype=torch.float64)
            count = count if w is None else w.unflatten(0, (-1, run)).sum(1)
            found.append(Sums(first, run, totals, count))
    return found


def _totals_of(
    plan: Plan,
    compiled: bool,
    block: dict[str, Tensor],
    run: int,
    w: Tensor | None,
    place: Totals | None,
) -> Totals:
    law, family = plan.law(block), plan.family
    kernel = (
        plan.kernels and w is None and run % INNER == 0 and isinstance(law, Normal | LogNormal)
    )
    if not kernel:
        check_domain(law)
    if not compiled:
        return _totals(plan.batch, plan.directions, run, kernel, family, law, plan.reference, w)
    own = {name: vars(law)[name] for name in law.arg_constraints if name in vars(law)}
    own = own or {name: getattr(law, name) for name in family.parameters}
    fixed = {field.name: getattr(family, field.name) for field in dataclasses.fields(family)}
    numbers = tuple((k, x) for k, x in fixed.items() if not isinstance(x, Tensor))
    into = place is not None
    how = plan.batch, plan.directions, run, kernel
    key = (*how, into, type(family), numbers)
    eager = functools.partial(_remade_totals, *how)

    def compile_step():
        for x in [*own.values(), *([] if w is None else [w]), *(place or {}).values()]:
            torch._dynamo.maybe_mark_dynamic(x, 0)  # one graph for every number of runs
        return _compiled(*key)

    return compiled_or_eager(key, compile_step, eager, family, own, plan.reference, w, place)


@functools.cache
def _compiled(batch, directions, run, kernel, *kind) -> Callable[..., Totals]:
    # A cache of its own for each, as all share one code object. Only tensors are worth a guard:
    # the rest, of the family too, is in the key, and guards cost time.
    options: dict[str, Any] = {"guard_filter_fn": torch.compiler.keep_tensor_guards_unsafe}
    return torch.compile(  # pyright: ignore[reportCallIssue]: its overloads know fewer options
        functools.partial(_remade_totals, batch, directions, run, kernel),
        fullgraph=True,
        isolate_recompiles=True,
        options=options,
    )


def _remade_totals(batch, directions, run, kernel, family, own, reference, w, place):
    law = family.law(**own, validate_args=False)
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
    """Sums over runs of draws of what is averaged."""
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
    """What ``terms`` of a Normal law come to, with one logarithm for eight draws.

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

    Rows that lie together belong together; and single numbers do not, lest they be added across
    the lanes of a vector.
    """
    if x[0].numel() < NARROW:
        return x.unflatten(0, (-1, INNER, run // INNER)), 1
    return x.unflatten(0, (-1, run // INNER, INNER)), 2


def check_domain(law: Distribution) -> None:
    """Refuse parameters that are not where they may be, as far as each alone tells."""
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


def _laid(x: Tensor) -> Tensor:
    """Draws [n, ...] so that in memory the longer of both lies together."""
    if x.ndim == 1 or x[0].numel() >= NARROW:
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

"""One pass over the draws: the means that the acts under both KLs are made of, with errors."""

import dataclasses
import functools
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import xarray as xr
from torch import Tensor
from torch.distributions import Distribution, LogNormal, Normal, constraints

from rkl.bayes.draws import Draws, read, tensor_of
from rkl.bayes.families import ExponentialFamily, Natural, family_of
from rkl.bayes.families.base import jacobian
from rkl.metrics import Mean
from rkl.metrics.chains import BatchMeans, slots_of

DIRECTIONS = ("reverse", "forward")
FIRST = 2**20  # numbers that the reference law is made from
CACHED, FUSED = 2**16, 2**19  # laws of a block: uncompiled lest it leave the cache, and compiled
INNER = 8  # rows that are summed together: a core looks ahead in about so many streams of memory
NARROW = 64  # laws side by side below which, in memory, draws are
WORTH_COMPILING = 2**30  # laws: below it, compiling costs more than it saves
TASKS = 64  # chunks that dask works on before their sums are taken in

Law = Callable[[dict[str, Tensor]], Distribution]


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

    def means(self, direction: str) -> BatchMeans:
        """What was averaged for one of the acts, "reverse" or "forward"."""
        means = {"reverse": self.reverse, "forward": self.forward}.get(direction)
        if means is None:
            raise ValueError(f"direction {direction!r} was not averaged.")
        return means

    def average(self, direction: str) -> Natural:
        """E η or E m, by components [*batch, ...]."""
        flat = self.means(direction).mean[:-1].movedim(0, -1)
        return self.family.unflatten(flat, self.reference)

    def act(self, direction: str) -> Natural:
        """Natural parameter of the act."""
        average = self.average(direction)
        return average if direction == "reverse" else self.family.from_mean(average)

    def risk(self, direction: str) -> Mean:
        """Posterior mean of the act's divergence from the draws, in nats, [*batch]."""
        family, act, means = self.family, self.act(direction), self.means(direction)
        ends = (self.reference, act) if direction == "reverse" else (act, self.reference)
        slope = self._own_slope(direction, act)
        return Mean(means.mean[-1] - family.kl(*ends), means.along(slope[None])[0])

    def error(self, direction: str, function: Callable[[Natural], Tensor]) -> Tensor:
        """Standard error of a smooth function of E η or E m, by the delta method.

        Args:
            direction: Of which act.
            function: From the components [*batch, ...] to [*batch, *outputs], law by law.
        """
        slopes, shape = self._slopes(direction, function)
        batch = slopes.shape[2:]
        return self.means(direction).along(slopes).movedim(0, -1).reshape((*batch, *shape))

    def errors(
        self, direction: str, function: Callable[[Natural], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Standard errors of a function and of the risk, for one look at the batches."""
        slopes, shape = self._slopes(direction, function)
        own = self._own_slope(direction, self.act(direction))[None]
        found = self.means(direction).along(torch.cat([slopes, own]))
        return found[:-1].movedim(0, -1).reshape((*slopes.shape[2:], *shape)), found[-1]

    def _own_slope(self, direction: str, act: Natural) -> Tensor:
        """Of the risk, in each component of the average and in the divergence, which has 1."""
        family = self.family
        ends = (self.reference, act)
        if direction == "reverse":
            ends = tuple(family.mean(end) for end in ends)
        slope = family.flatten(family.minus(*ends)).movedim(-1, 0)
        return torch.cat([slope, torch.ones_like(slope[:1])])

    def _slopes(self, direction, function) -> tuple[Tensor, torch.Size]:
        average = self.average(direction)
        with torch.enable_grad():
            leaf = self.family.flatten(average).detach().requires_grad_()
            value = function(self.family.unflatten(leaf, average))
            batch = leaf.shape[:-1]
            slopes = jacobian(value.reshape(*batch, -1), leaf).movedim((-2, -1), (0, 1))
        return torch.cat([slopes, torch.zeros_like(slopes[:, :1])], 1), value.shape[len(batch) :]


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
    >>> [round(moments.act(each)[0].exp().item(), 6) for each in ("reverse", "forward")]
    [2.828427, 3.75]
    """
    with torch.no_grad():
        family, reference, batch = _reference(draws, law, names)
        laws = math.prod(batch)
        if compiled is None:
            compiled = draws.chains * draws.draws * laws >= WORTH_COMPILING and _compiler()
        compiled = compiled and not any(family.events)
        unit, rows, length = _layout(draws, max(1, laws), FUSED if compiled else CACHED)
        plan = Plan(law, family, reference, batch, tuple(directions), unit, rows, compiled)
        means = _averaged(draws, names, plan, length)
        if not _finite(means):
            means = _averaged(draws, names, plan._replace(kernels=False), length)
        if not _finite(means):
            _refuse(draws, law, names, family)
    return Moments(family, reference, means.get("reverse"), means.get("forward"))


class Plan(NamedTuple):
    """What is done to a chunk of draws: all that a worker elsewhere must know."""

    law: Law
    family: ExponentialFamily
    reference: Natural
    batch: torch.Size
    directions: tuple[str, ...]
    unit: int  # draws that are summed to one number
    rows: int  # draws of a block
    compiled: bool
    kernels: bool = True


class Sums(NamedTuple):
    """Sums over runs of consecutive draws."""

    start: int
    run: int
    values: dict[str, Tensor]  # by direction, [runs, components + 1, *batch]
    weights: Tensor


def sums_of(
    plan: Plan, start: int, chunk: dict[str, Any], weights: Tensor | None = None
) -> list[Sums]:
    """Sums over some consecutive draws of a chain, the first of which is number ``start``."""
    drawn = {name: x if isinstance(x, Tensor) else tensor_of(x) for name, x in chunk.items()}
    found = []
    for first, last, run in _pieces(start, start + len(next(iter(drawn.values()))), plan):
        part = slice(first - start, last - start)
        w = None if weights is None else weights[part]
        block = {name: _laid(x[part]) for name, x in drawn.items()}
        count = torch.full(((last - first) // run,), float(run), dtype=torch.float64)
        count = count if w is None else w.unflatten(0, (-1, run)).sum(1)
        found.append(Sums(first, run, _totals_of(plan, block, run, w), count))
    return found


def _totals_of(
    plan: Plan, block: dict[str, Tensor], run: int, w: Tensor | None
) -> dict[str, Tensor]:
    law, family = plan.law(block), plan.family
    kernel = (
        plan.kernels and w is None and run % INNER == 0 and isinstance(law, Normal | LogNormal)
    )
    if not kernel:
        _check_domain(law)
    if not plan.compiled or run != plan.unit:
        return _totals(plan.batch, plan.directions, run, kernel, family, law, plan.reference, w)
    own = {name: vars(law)[name] for name in law.arg_constraints if name in vars(law)}
    own = own or {name: getattr(law, name) for name in family.parameters}
    for x in [*own.values(), *([] if w is None else [w])]:
        torch._dynamo.maybe_mark_dynamic(x, 0)  # one graph for every number of runs
    fixed = {field.name: getattr(family, field.name) for field in dataclasses.fields(family)}
    tensors = {name: value for name, value in fixed.items() if isinstance(value, Tensor)}
    numbers = tuple((name, value) for name, value in fixed.items() if name not in tensors)
    step = _compiled(plan.batch, plan.directions, run, kernel, type(family), numbers)
    return step(tensors, own, plan.reference, w)


@functools.cache
def _compiled(*settings: Any) -> Callable:
    # A cache of its own for each, as all share one code object.
    options: dict[str, Any] = {"fullgraph": True, "isolate_recompiles": True}
    return torch.compile(functools.partial(_remade_totals, *settings), **options)


def _remade_totals(batch, directions, run, kernel, kind, numbers, tensors, own, reference, w):
    family = kind(**dict(numbers), **tensors)
    law = family.law(**own, validate_args=False)
    return _totals(batch, directions, run, kernel, family, law, reference, w)


def _totals(
    batch: torch.Size,
    directions: tuple[str, ...],
    run: int,
    kernel: bool,
    family: ExponentialFamily,
    law: Distribution,
    reference: Natural,
    w: Tensor | None,
) -> dict[str, Tensor]:
    """Sums over runs of draws of what is averaged, [runs, components + 1, *batch]."""
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
    precision = 1 / variance
    scaled = loc * precision
    ratio = torch.where(scale > 0, variance * precision_0, math.nan)
    log_ratio = ratio.unflatten(0, (-1, INNER, run // INNER)).prod(1).log().sum(1)
    scaled_sum, precision_sum, loc_sum, square_sum, pull = (
        _over_runs(x, run, None)
        for x in (scaled, precision, loc, loc * loc + variance, loc * scaled)
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
    return x.unflatten(0, (-1, INNER, run // INNER)).sum(1).sum(1)


def _check_domain(law: Distribution) -> None:
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


def _pieces(start: int, stop: int, plan: Plan) -> Iterator[tuple[int, int, int]]:
    """Blocks of whole units, and what is left before and after: first, last and run."""
    while start < stop:
        lost = start % plan.unit
        if lost or stop - start < plan.unit:
            last = min(stop, start - lost + plan.unit)
            yield start, last, last - start
        else:
            last = start + min(plan.rows, (stop - start) // plan.unit * plan.unit)
            yield start, last, plan.unit
        start = last


def _layout(draws: Draws, laws: int, block: int) -> tuple[int, int, int]:
    """Draws that are summed to one number, draws of a block, draws of half a batch."""
    rows = max(INNER, 2 ** int(math.log2(max(1, block // laws))))
    half = -(-draws.draws // slots_of(draws.chains))
    if half > rows:
        return rows, rows, rows * -(-half // rows)
    unit = half
    if half >= INNER:
        near = range(-(-half // INNER) * INNER, half + half // 2 + 1, INNER)
        # where units fill the chain nothing is left over
        unit = next((n for n in near if draws.draws % n == 0), -(-half // INNER) * INNER)
    return unit, unit * max(1, rows // unit), unit


def _averaged(
    draws: Draws, names: Sequence[str], plan: Plan, length: int
) -> dict[str, BatchMeans]:
    shape = (plan.family.flatten(plan.reference).shape[-1] + 1, *plan.batch)
    means = {name: BatchMeans(draws.chains, shape, length) for name in plan.directions}
    for chain, found in _chunks(draws, names, plan):
        for sums in found:
            for name, held in means.items():
                held.add(chain, sums.start, sums.run, sums.values[name], sums.weights)
    return means


def _chunks(draws: Draws, names: Sequence[str], plan: Plan) -> Iterator[tuple[int, list[Sums]]]:
    parts = draws.parts(names, multiple=plan.rows)
    arrays = {name: draws.of(name) for name in names}
    if any(array.chunks is not None for array in arrays.values()):
        yield from _by_dask(draws, arrays, list(parts), plan)
        return
    for chain, part in parts:
        chunk = {name: read(array, chain, part) for name, array in arrays.items()}
        yield chain, sums_of(plan, part.start, chunk, _weights(draws, chain, part))


def _by_dask(
    draws: Draws, arrays: dict[str, xr.DataArray], parts: list[tuple[int, slice]], plan: Plan
) -> Iterator[tuple[int, list[Sums]]]:
    """The same, where the chunks live: only sums come back."""
    import dask  # pyright: ignore[reportMissingImports]: lazy arrays brought it

    task, plan = dask.delayed(sums_of, pure=False), dask.delayed(plan, traverse=False)
    parts.sort(key=lambda at: at[1].start)  # chains that are stored together are read together
    for k in range(0, len(parts), TASKS):
        tasks = [
            task(
                plan,
                part.start,
                {
                    k: v.isel(chain=chain, draw=part).transpose("draw", ...).data
                    for k, v in arrays.items()
                },
                _weights(draws, chain, part),
            )
            for chain, part in parts[k : k + TASKS]
        ]
        yield from zip(
            (chain for chain, _ in parts[k : k + TASKS]), dask.compute(*tasks), strict=True
        )


def _weights(draws: Draws, chain: int, part: slice) -> Tensor | None:
    return None if draws.weights is None else draws.weights[chain, part]


def _reference(
    draws: Draws, law: Law, names: Sequence[str]
) -> tuple[ExponentialFamily, Natural, torch.Size]:
    """The family about the act of the first few draws, and that act."""
    _, _, chunk = next(draws.chunks(names, FIRST))
    first = law(chunk)
    family = family_of(first)
    if family is None:
        raise ValueError(f"law must be of an exponential family; got a {type(first).__name__}.")
    _check(first, family)
    mean = tuple(component.mean(0) for component in family.natural(first))
    act = family.from_natural(mean)
    family = family.about(act)
    return family, family.natural(act), first.batch_shape[1:]


def _finite(means: dict[str, BatchMeans]) -> bool:
    return all(bool(held.mean.isfinite().all()) for held in means.values())


def _refuse(draws: Draws, law: Law, names: Sequence[str], family: ExponentialFamily) -> None:
    """Say which draw it is that has no finite mean."""
    for _, _, chunk in draws.chunks(names):
        _check(law(chunk), family)
    raise ValueError(f"The means of {', '.join(names)} are too large for double precision.")


def _check(law: Distribution, family: ExponentialFamily) -> None:
    _check_domain(law)
    family.check(family.natural(law))


def _compiler() -> bool:
    return any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang")))

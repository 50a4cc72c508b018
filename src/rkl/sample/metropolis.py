"""Exact Markov chains that take their proposals from a flow: independent Metropolis–Hastings."""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.distributions import Distribution

from rkl.checks import LARGEST_COUNT, floats, integer, warn
from rkl.flows.architectures import draw
from rkl.flows.precision import single_precision
from rkl.randomness import random_numbers
from rkl.sample.domain import check_domain
from rkl.sample.mcmc.kernels import check_kernel
from rkl.sample.targets.base import Kernel, Target, as_floats, check_condition
from rkl.sample.targets.check import precise_log_prob
from rkl.stats import ess, ess_tail, integrated_time, rhat
from rkl.tables import Table, table_of

NUMBERS = 2**24  # coordinates of proposals held at a time
STARTS = 16  # proposals out of which a chain begins at one
MAX_STARTS = 200  # times so many, where none of them has density


@runtime_checkable
class Redrawing(Protocol):
    """A distribution with coordinates that follow the target exactly, given all others."""

    def redraw(self, x: Tensor) -> Tensor:
        """New values of those coordinates, given the others, of x [*draws, *batch, *event]."""
        ...

    def integrates(self, log_prob: Callable[[Tensor, Tensor], Tensor]) -> bool:
        """True if they follow a target of this log-density."""
        ...


@dataclass(frozen=True)
class Chain:
    r"""Draws of chains side by side, [\*batch, chains, draws], with their log-densities.

    Attributes:
        x: The states, [\*batch, chains, draws, \*event].
        accepted: Whether each proposal was accepted.
        log_ratio: log p(x) − log q(x) of each state in nats, up to log Z.
        log_p: log p(x) of each state in nats, up to log Z.
        log_q: log q(x) of each state in nats.
        condition: The conditions, [\*batch, conditions].
    """

    x: Float[Tensor, "..."]
    accepted: Bool[Tensor, "*batch chains draws"]
    log_ratio: Float[Tensor, "*batch chains draws"]
    log_p: Float[Tensor, "*batch chains draws"]
    log_q: Float[Tensor, "*batch chains draws"]
    condition: Float[Tensor, "*batch conditions"]

    @property
    def acceptance(self) -> Float[Tensor, "*batch"]:
        """Share of proposals that were accepted."""
        return self.accepted.double().mean((-1, -2))

    @property
    def failed(self) -> Bool[Tensor, "*batch"]:
        """True if a chain accepted no proposal: it is no result."""
        return ~self.accepted.any(-1).all(-1)

    @property
    def longest_rejection_run(self) -> Int[Tensor, "*batch"]:
        """Longest number of draws that a chain spent in one state."""
        time = torch.arange(self.accepted.shape[-1], device=self.accepted.device)
        arrived = torch.where(self.accepted, time, 0).cummax(-1).values
        return (time - arrived).amax((-1, -2)) + 1

    def table(self) -> Table:
        """Acceptance and the longest run of rejections under each condition."""
        chains, draws = self.accepted.shape[-2:]
        figures = {
            "share accepted": self.acceptance,
            "longest run without an accepted proposal (draws)": self.longest_rejection_run,
            "failed": self.failed,
        }
        return table_of(f"{chains} chains of {draws:,} draws", figures, counted="condition")

    def __str__(self) -> str:
        return str(self.table())

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()

    def measure(self, target: Target) -> dict[str, Float[Tensor, "*batch chains draws"]]:
        """The observables of every state, by name."""
        each = self.condition[..., None, None, :].expand(*self.accepted.shape, -1)
        return as_floats(target.observables(self.x, each))

    def diagnose(
        self, values: Mapping[str, Float[Tensor, "*batch chains draws"]]
    ) -> dict[str, dict[str, Float[Tensor, "*batch"]]]:
        """R̂, effective numbers and autocorrelation time of quantities, by their names.

        Args:
            values: Values of quantities, such as a result of :meth:`measure`.

        Returns:
            For each quantity: rhat, ess_bulk and ess_tail in draws, and time, the integrated
            autocorrelation time in draws.
        """
        judges = {"rhat": rhat, "ess_bulk": ess, "ess_tail": ess_tail, "time": integrated_time}
        columns = {name: it.movedim((-2, -1), (0, 1)) for name, it in as_floats(values).items()}
        return {
            name: {statistic: judge(column) for statistic, judge in judges.items()}
            for name, column in columns.items()
        }

    def to_arviz(self, **values: Float[Tensor, "*batch chains draws"]) -> Any:
        """The chains for ArviZ: a DataTree from ArviZ 1.0 on, InferenceData before.

        Args:
            values: Further quantities beside x, such as the observables.
        """
        try:
            import arviz  # pyright: ignore[reportMissingImports]: an extra
        except ImportError as error:
            raise ImportError("Handing over chains takes ArviZ: pip install 'rkl[arviz]'.") from (
                error
            )
        batch = self.accepted.ndim - 2

        def by_chain(it: Tensor) -> Any:
            return it.movedim((batch, batch + 1), (0, 1)).cpu().numpy()

        posterior = {name: by_chain(it) for name, it in {"x": self.x, **values}.items()}
        names = {"accepted": "accepted", "log_ratio": "log_ratio", "log_p": "lp", "log_q": "log_q"}
        stats = {new: by_chain(getattr(self, old)) for old, new in names.items()}
        groups = {"posterior": posterior, "sample_stats": stats}
        if int(arviz.__version__.partition(".")[0]) >= 1:
            return arviz.from_dict(groups)
        before_1: Any = groups
        return arviz.from_dict(**before_1)


@torch.no_grad()
@single_precision()
def independent_metropolis(
    target: Target,
    proposal: nn.Module | Distribution,
    condition: Float[Tensor, "*batch conditions"] | None = None,
    *,
    draws: int,
    chains: int = 4,
    seed: int = 0,
    start: Float[Tensor, "..."] | None = None,
    local: Kernel | None = None,
) -> Chain:
    r"""Chains that leave the target p invariant, from independent proposals of a flow q.

        x′ ~ q is accepted with probability min(1, w(x′)/w(x)),    w = p/q

    All draws are made in parallel: with e_t exponential, draw t is accepted where log w_t +
    e_t exceeds log w of the present state, and two such steps are again a step of that kind: a
    parallel scan finds all states. Coordinates that the flow draws from p, given the others,
    are drawn anew at every step, also on rejection, because w does not depend on them.

    Source: Tierney (1994), Annals of Statistics 22, 1701, section 2.3.3.

    Args:
        target: The target, with log p in nats up to log Z.
        proposal: A flow, called with the condition, or a distribution.
        condition: One condition or a batch of them, each with chains of its own.
        draws: Number of draws of each chain: states after a proposal, without the start.
        chains: Number of chains for each condition.
        seed: Random seed.
        start: States to begin at, [\*batch, chains, \*event]; by default each chain begins at one
            of 16 proposals, drawn by their weights w: a proposal far out in the tails of q, such
            as heavy ones have, would count for as much as all other draws in a mean. Where none
            of them has density, more are drawn.
        local: A move that leaves p invariant, such as HeatBath(), made after every step.

    Returns:
        The chains, with a warning for a condition with a chain that never moves: it ``failed``;
        and for draws without density, where a chain begins at one.

    Raises:
        ValueError: log p or log q of a proposal is nan, or log p is +∞.

    >>> from torch.distributions import Independent, Normal
    >>> from rkl.sample import GaussianMixture
    >>> target, one = GaussianMixture(means=((0.0,),)), torch.ones(1)
    >>> wide = Independent(Normal(torch.zeros(1), 2 * one), 1)
    >>> chain = independent_metropolis(target, wide, one, draws=10_000)
    >>> round(chain.acceptance.item(), 2), round(chain.x.std().item(), 1)
    (0.59, 1.0)
    """
    condition = check_condition(target, condition)
    integer("draws", draws, at_least=1, at_most=LARGEST_COUNT)
    integer("chains", chains, at_least=1, at_most=LARGEST_COUNT)
    size = draws, chains
    local = None if local is None else check_kernel("local", local)
    with random_numbers(seed):
        law = law_of(proposal, target, condition)
        present = _present(target, law, condition, chains, start)
        steps = (
            _scan_proposals
            if local is None
            else functools.partial(_walk_with_local_moves, local=local)
        )
        parts = steps(target, law, condition, size, present)
        x, taken, *logs = (_batch_first(it, condition.ndim - 1) for it in parts)
        chain = Chain(x, taken, logs[0], logs[1], logs[2], condition)
    _warn_of_failure(chain)
    return chain


def law_of(proposal: Any, target: Target, condition: Tensor) -> Any:
    """Distribution of a flow under a condition, checked to be over the target's events."""
    law = proposal
    if isinstance(proposal, nn.Module):
        law = proposal(condition) if condition.shape[-1] else proposal()
    if not isinstance(law, Distribution):
        raise TypeError(
            "proposal must be a flow, or a distribution of torch; "
            f"got a {type(proposal).__name__} that yields a {type(law).__name__}."
        )
    if law.event_shape != target.event_shape:
        raise ValueError(
            f"proposal must have events of shape {list(target.event_shape)}, as {target} has; "
            f"got {list(law.event_shape)}."
        )
    if law.batch_shape not in ((), condition.shape[:-1]):
        raise ValueError(
            f"proposal must have the batch shape {list(condition.shape[:-1])} of condition; "
            f"got {list(law.batch_shape)}."
        )
    check_domain(law, target, condition)
    return law.expand(condition.shape[:-1]) if law.batch_shape != condition.shape[:-1] else law


def draw_proposals(target: Target, law: Any, condition: Tensor, shape: tuple[int, ...]) -> tuple:
    """Draws of a distribution with their log p and log q, both checked: x, log_p, log_q."""
    x, log_q = draw(law, shape)
    log_p = precise_log_prob(target, x, condition.expand(*shape, *condition.shape))
    for name, log_d, infinite in (("target", log_p, math.inf), ("proposal", log_q, None)):
        wrong = log_d.isnan() | (log_d == infinite if infinite else log_d.isinf())
        if wrong.any():
            expected = "a number or -inf" if infinite else "a number"
            raise ValueError(
                f"{name}: {int(wrong.sum())} of {log_d.numel()} proposals have a log-density that "
                f"cannot be used; got {float(log_d[wrong][0])}, expected {expected}."
            )
    return x, log_p, log_q


def _warn_of_failure(chain: Chain) -> None:
    if chain.accepted.shape[-1] > 1 and chain.failed.any():
        warn(
            f"{int(chain.failed.sum())} of {chain.failed.numel()} conditions have a chain that "
            f"took none of its {chain.accepted.shape[-1]} proposals: they are no result."
        )
    nowhere = int((chain.log_p == -math.inf).sum())
    if nowhere:
        warn(
            f"the target has no density at {nowhere:,} of {chain.log_p.numel():,} draws, those "
            "before a chain met a proposal with density: leave them out, those with log_p = -inf."
        )


def _present(target, law, condition, chains: int, start: Tensor | None) -> tuple:
    """The states to start from with their log p and log q, [chains, *batch, ...]."""
    if start is None:
        parts = _first_states(target, law, condition, chains)
        for _ in range(MAX_STARTS):
            nowhere = parts[1] == -math.inf
            if not nowhere.any():
                break
            others = _first_states(target, law, condition, chains)
            parts = tuple(
                torch.where(
                    nowhere.reshape(*nowhere.shape, *[1] * (it.ndim - nowhere.ndim)), new, it
                )
                for new, it in zip(others, parts, strict=True)
            )
        return parts
    floats("start", start)
    batch = condition.shape[:-1]
    if start.shape != (*batch, chains, *target.event_shape):
        expected = [*batch, chains, *target.event_shape]
        raise ValueError(f"start must be {expected}; got {list(start.shape)}.")
    x = start.movedim(len(batch), 0)
    each = condition.expand(chains, *condition.shape)
    return x, precise_log_prob(target, x, each), law.log_prob(x)


def _first_states(target, law, condition, chains: int) -> tuple:
    """One of a few proposals for each chain, drawn by their weights."""
    size = min(STARTS, _block(law, chains)), chains
    parts = draw_proposals(target, law, condition, size)
    log_w = parts[1] - parts[2]
    gumbel = -torch.empty_like(log_w).exponential_().log()
    chosen = (log_w + gumbel).argmax(0, keepdim=True)
    return tuple(_rows(it, chosen)[0] for it in parts)


def _block(law: Any, chains: int) -> int:
    return max(1, NUMBERS // (chains * max(1, math.prod((*law.batch_shape, *law.event_shape)))))


def _scan_proposals(target, law, condition, size: tuple[int, int], present: tuple) -> tuple:
    """All steps, a block of proposals at a time; every part is [draws, chains, *batch, ...]."""
    draws, chains = size
    block = _block(law, chains)
    blocks: list[tuple] = []
    for start in range(0, draws, block):
        parts = draw_proposals(target, law, condition, (min(block, draws - start), chains))
        pairs = zip(present, parts, strict=True)  # the present state goes before the proposals
        parts = tuple(torch.cat([old[None], new]) for old, new in pairs)
        taken, state = _states(parts[1] - parts[2])
        states = tuple(_rows(it, state[1:]) for it in parts)
        blocks.append((taken[1:], *states))
        present = tuple(it[-1] for it in states)
    taken, x, log_p, log_q = map(torch.cat, zip(*blocks, strict=True))
    log_ratio = log_p - log_q
    if redraw := _redraw(target, law):
        x = torch.cat([redraw(part) for part in x.split(block)])
        log_p = precise_log_prob(target, x, condition.expand(*x.shape[:2], *condition.shape))
        log_q = log_p - log_ratio
    return x, taken, log_ratio, log_p, log_q


def _states(log_w: Tensor) -> tuple[Tensor, Tensor]:
    """Acceptance of each proposal, and the index of the state after it; the first is accepted."""
    threshold = log_w + torch.empty_like(log_w).exponential_()
    threshold[0] = math.inf
    number = torch.arange(len(log_w), device=log_w.device)
    number = number.reshape(-1, *[1] * (log_w.ndim - 1)).expand(log_w.shape)
    state = _scan((threshold, log_w, number))[2]
    return state == number, state


def _rows(x: Tensor, state: Tensor) -> Tensor:
    """Rows of x at these indices along its first axis, chain by chain."""
    index = state.reshape(*state.shape, *[1] * (x.ndim - state.ndim))
    return x.gather(0, index.expand(*state.shape, *x.shape[state.ndim :]))


def _after(earlier: tuple, later: tuple) -> tuple:
    """Two successive steps as one: a present log w below the threshold leads to the state."""
    (a, w, number), (b, v, other) = earlier, later
    takes = b > w
    return (
        torch.where(takes, torch.maximum(a, b), a),
        torch.where(takes, v, w),
        torch.where(takes, other, number),
    )


def _scan(steps: tuple) -> tuple:
    """All steps up to each one as one, along the first axis: pairs first, then what is between."""
    if len(steps[0]) == 1:
        return steps
    half = len(steps[0]) // 2
    even, odd = tuple(it[0::2] for it in steps), tuple(it[1::2] for it in steps)
    pairs = _scan(_after(tuple(it[:half] for it in even), odd))
    between = _after(tuple(it[: len(even[0]) - 1] for it in pairs), tuple(it[1:] for it in even))
    whole = tuple(torch.empty_like(it) for it in steps)
    for out, first, at_pairs, at_rest in zip(whole, steps, pairs, between, strict=True):
        out[0], out[1::2], out[2::2] = first[0], at_pairs, at_rest
    return whole


def _walk_with_local_moves(
    target, law, condition, size: tuple[int, int], present: tuple, local: Kernel
) -> tuple:
    draws, chains = size
    block = _block(law, chains)
    each = condition.expand(chains, *condition.shape)
    redraw = _redraw(target, law)
    steps: list[tuple] = []
    for start in range(0, draws, block):
        proposals = draw_proposals(target, law, condition, (min(block, draws - start), chains))
        for new, log_p, log_q in zip(*proposals, strict=True):
            x, old_p, old_q = present
            taken = log_p - log_q + torch.empty_like(log_p).exponential_() > old_p - old_q
            x = torch.where(taken.reshape(*taken.shape, *[1] * len(law.event_shape)), new, x)
            x = local.move(target, each, x, 1)
            x = redraw(x) if redraw else x
            present = x, precise_log_prob(target, x, each), law.log_prob(x)
            steps.append((x, taken, present[1] - present[2], *present[1:]))
    return tuple(map(torch.stack, zip(*steps, strict=True)))


def _redraw(target: Target, law: Any) -> Callable[[Tensor], Tensor] | None:
    """Function that redraws the integrated coordinates; None if there are none for this target."""
    if isinstance(law, Redrawing) and law.integrates(target.log_prob):
        return law.redraw
    return None


def _batch_first(x: Tensor, batch: int) -> Tensor:
    """[draws, chains, *batch, ...] as [*batch, chains, draws, ...]."""
    return x.movedim((0, 1), (batch + 1, batch)).contiguous()

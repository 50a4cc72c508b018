"""One partition to report, from draws of cluster labels: a Bayes act that no label can switch.

Labels mean nothing by themselves, so that no average over them does. A loss between partitions
means something, and its posterior expectation is minimised over all partitions.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import ArrayLike
from torch import Tensor

from rkl.metrics import Mean, mean

Labels = Int[Tensor, "draws items"]

# f and the unit s of each loss: s (Σ f(size of a cluster of C) + the same of S
# - 2 Σ f(size of an intersection)). A loss is one line here.
LOSSES: Mapping[str, tuple[Callable[[Tensor], Tensor], Callable[[int], float]]] = {
    "variation-of-information": (lambda n: torch.special.xlogy(n, n), lambda items: 1 / items),
    "binder": (torch.square, lambda items: 1 / max(items * (items - 1), 1)),
}
PATIENCE = 100  # sweeps; a start ends after three to ten
COUNTS = 2**27  # of four bytes, which searches side by side may hold


@dataclass(frozen=True)
class PartitionAct:
    """The partition to report.

    Attributes:
        partition: Cluster of each item, counted from 0 in the order of their first items.
        risk: Its posterior expected loss, with the Monte Carlo error.
        loss: The loss that it minimises, and its unit below.
        starts: How many searches were made.
        agreeing: How many of them ended in this partition; few out of many say that the
            posterior has several partitions nearly as good.
    """

    partition: Int[Tensor, " items"]
    risk: Mean
    loss: str
    starts: int
    agreeing: int


def partition_act(
    labels: ArrayLike | Tensor,
    loss: str = "variation-of-information",
    *,
    weights: ArrayLike | Tensor | None = None,
    starts: int = 16,
    seed: int = 0,
) -> PartitionAct:
    """The partition with the smallest posterior expected loss.

        argmin over C of E[loss(C, S) | data]

    Both losses are metrics on partitions. Variation of information, H(C | S) + H(S | C) in nats,
    is the better default; Binder's, the share of pairs of items that are together in one partition
    and apart in the other, tends to more and smaller clusters.

    Half of the starts are the best of the sampled partitions, the others are built item by item
    in random order. In each, items then move, one at a time, to where they serve best until none
    wants to. That is a local minimum, and only the number of starts that agree says how likely it
    is the global one.
    Time grows as starts x distinct draws x items x clusters.

    Source: Dahl, Johnson and Müller (2022), J. Comput. Graph. Stat. 31(4), section 3 (SALSO);
    Meilă (2007); Binder (1978).

    Args:
        labels: Cluster labels, [draws, items] or [chains, draws, items], integers; which integer
            is of no account.
        loss: "variation-of-information" (nats) or "binder" (share of the pairs).
        weights: Of the draws, [draws]; equal by default.
        starts: Number of searches.
        seed: What their random orders start from.

    Returns:
        The partition, its risk with an error from batch means of the draws in their order, and
        in how many starts it was found. The risk is that of a minimum, over the same draws.

    Raises:
        ValueError: For labels that are no integers or not [draws, items], weights that are not
            non-negative numbers, one for each draw, or a loss of another name.

    >>> draws = [[0, 0, 0, 1, 1], [1, 1, 1, 0, 0], [0, 0, 1, 2, 2]]
    >>> act = partition_act(draws)
    >>> act.partition.tolist(), round(act.risk.value.item(), 4), act.agreeing
    ([0, 0, 0, 1, 1], 0.1273, 16)
    """
    draws = _labels(labels)
    f, scale = _loss(loss, draws.shape[1])
    weight = _weights(weights, len(draws))
    if isinstance(starts, bool) or not isinstance(starts, int) or starts < 1:
        raise ValueError(f"starts must be a positive number of searches; got {starts!r}.")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an integer; got {seed!r}.")
    distinct, which = draws.unique(dim=0, return_inverse=True)
    shared = torch.zeros(len(distinct), dtype=torch.float64).index_add_(0, which, weight)
    found = canonical(_search(distinct, shared, f, starts, seed))
    risks = torch.stack([(shared * _losses(it, distinct, f)).sum() for it in found])
    best = found[risks.argmin()]
    agreeing = int((found == best).all(1).sum())
    each = scale * _losses(best, distinct, f)
    return PartitionAct(best, _risk(each[which], weight), loss, starts, agreeing)


def partition_losses(
    partition: ArrayLike | Tensor,
    labels: ArrayLike | Tensor,
    loss: str = "variation-of-information",
) -> Float[Tensor, " draws"]:
    """The loss between one partition and each of several.

    Args:
        partition: Cluster of each item, [items].
        labels: Cluster labels of the others, [draws, items].
        loss: "variation-of-information" (nats) or "binder" (share of the pairs).

    >>> partition_losses([0, 0, 1, 1], [[5, 5, 7, 7], [0, 0, 0, 0]], "binder")
    tensor([0.0000, 0.6667], dtype=torch.float64)
    """
    draws = _labels(labels)
    one = _labels(partition, "partition", axes=1)
    if len(one) != draws.shape[1]:
        raise ValueError(f"partition must hold {draws.shape[1]} items as labels; got {len(one)}.")
    f, scale = _loss(loss, len(one))
    return scale * _losses(one, draws, f)


def canonical(labels: Labels) -> Labels:
    """The same partitions, their clusters counted from 0 in the order of their first items."""
    items = labels.shape[1]
    order = labels.argsort(stable=True, dim=1)  # within a cluster the first item comes first
    ranked = labels.gather(1, order)
    begins = torch.ones_like(ranked, dtype=torch.bool)
    begins[:, 1:] = ranked[:, 1:] != ranked[:, :-1]
    cluster = begins.cumsum(1) - 1
    lead = torch.full_like(labels, items).scatter_reduce_(1, cluster, order, "amin")
    first = torch.empty_like(labels).scatter_(1, order, lead.gather(1, cluster))
    number = (first == torch.arange(items)).cumsum(1) - 1
    return number.gather(1, first)


class _Search:
    """Searches side by side, each with a partition of its own.

    R starts, K clusters, B distinct draws, L labels: ``shared`` [R K B L] counts the items of
    cluster k of start r that draw b puts into its cluster l. Each start has an empty cluster.
    """

    def __init__(self, draws: Labels, weight: Tensor, f: Callable[[Tensor], Tensor], starts: int):
        items, width = draws.shape[1], int(draws.max()) + 1
        counts = torch.arange(items + 1, dtype=torch.float64)
        self.gain = f(counts + 1) - f(counts)  # of f, when an item joins so many
        self.draws, self.weight = draws, weight / weight.sum()
        self.row, self.column = torch.arange(starts), torch.arange(len(draws))
        self.labels = torch.full((starts, items), -1)
        self.size = torch.zeros(starts, width + 1, dtype=torch.long)
        self.shared = torch.zeros(starts, width + 1, len(draws), width, dtype=torch.int32)

    def build(self, begun: Labels, orders: Int[Tensor, "starts items"]) -> None:
        """Place item after item where it serves best; the first starts take what is given."""
        for item in orders.T:
            target = self._costs(item).argmin(1)
            given = begun.gather(1, item[: len(begun), None]).squeeze(1)
            self._join(item, torch.cat([given, target[len(begun) :]]))

    def sweeten(self, generator: torch.Generator) -> None:
        """Move items, in random order, to where they serve best, until none wants to move."""
        for _ in range(PATIENCE):
            before = self.labels.clone()
            for item in _orders(self.labels, generator).T:
                self._move(item)
            if torch.equal(before, self.labels):
                return

    def _move(self, item: Int[Tensor, " starts"]) -> None:
        now = self.labels[self.row, item]
        self._count(item, now, -1)
        cost = self._costs(item)
        least = cost.min(1)
        stays = cost[self.row, now] <= least.values + 1e-9  # rounding alone moves nothing
        self._join(item, now.where(stays, least.indices))

    def _costs(self, item: Int[Tensor, " starts"]) -> Float[Tensor, "starts clusters"]:
        """What the expected loss grows by, in its own unit, if the item joins each cluster."""
        said = self.draws[:, item].T[:, None, :, None].expand(-1, self.size.shape[1], -1, -1)
        met = self.shared.gather(3, said).squeeze(3).long()
        return self.gain[self.size] - 2 * self.gain[met] @ self.weight

    def _join(self, item: Int[Tensor, " starts"], cluster: Int[Tensor, " starts"]) -> None:
        self.labels[self.row, item] = cluster
        self._count(item, cluster, 1)
        if (self.size > 0).all(1).any():
            self.size = torch.nn.functional.pad(self.size, (0, 1))
            self.shared = torch.nn.functional.pad(self.shared, (0, 0, 0, 0, 0, 1))

    def _count(self, item: Tensor, cluster: Tensor, by: int) -> None:
        self.size[self.row, cluster] += by
        said = self.draws[:, item].T
        self.shared[self.row[:, None], cluster[:, None], self.column, said] += by


def _search(
    draws: Labels, weight: Tensor, f: Callable, starts: int, seed: int
) -> Int[Tensor, "starts items"]:
    """The partition in which each start ends; as many at once as memory has room for."""
    generator = torch.Generator().manual_seed(seed)
    sampled = _best_sampled(draws, weight, f, starts // 2)
    width = int(draws.max()) + 1
    block = max(1, COUNTS // (len(draws) * width * (width + 1)))
    ended = []
    for begin in range(0, starts, block):
        begun = sampled[begin : begin + block]
        side_by_side = _Search(draws, weight, f, min(block, starts - begin))
        side_by_side.build(begun, _orders(side_by_side.labels, generator))
        side_by_side.sweeten(generator)
        ended.append(side_by_side.labels)
    return torch.cat(ended)


def _best_sampled(
    draws: Labels, weight: Tensor, f: Callable, wanted: int
) -> Int[Tensor, "best items"]:
    """The best of the 64 likeliest draws."""
    likely = draws[weight.argsort(stable=True, descending=True)[:64]]
    risk = torch.stack([(weight * _losses(it, draws, f)).sum() for it in likely])
    return likely[risk.argsort(stable=True)[:wanted]]


def _orders(labels: Labels, generator: torch.Generator) -> Labels:
    """The items in a random order for each start."""
    return torch.rand(labels.shape, generator=generator, dtype=torch.float64).argsort(1)


def _losses(partition: Tensor, draws: Labels, f: Callable[[Tensor], Tensor]) -> Tensor:
    """Σ f(sizes of the one) + Σ f(sizes of the other) - 2 Σ f(sizes of the intersections)."""
    width, clusters = int(draws.max()) + 1, int(partition.max()) + 1
    cell = draws * clusters + partition
    both = torch.zeros(len(draws), width * clusters, dtype=torch.float64)
    both.scatter_add_(1, cell, torch.ones_like(cell, dtype=torch.float64))
    both = both.unflatten(1, (width, clusters))
    return f(both.sum(1)).sum(1) + f(both.sum(2)).sum(1) - 2 * f(both).sum((1, 2))


def _risk(losses: Float[Tensor, " draws"], weight: Float[Tensor, " draws"]) -> Mean:
    """The weighted mean, its error from the means of √draws batches of neighbouring draws."""
    value = (weight * losses).sum()
    influence = len(losses) * weight * (losses - value)
    length = math.isqrt(len(losses))
    batches = influence[: len(losses) // length * length].unflatten(0, (-1, length)).mean(1)
    return Mean(value, mean(batches).error)


def _loss(name: str, items: int) -> tuple[Callable[[Tensor], Tensor], float]:
    if name not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(LOSSES)}; got {name!r}.")
    f, scale = LOSSES[name]
    return f, scale(items)


def _labels(labels: ArrayLike | Tensor, argument: str = "labels", axes: int = 2) -> Tensor:
    """Labels as integers from 0, each row numbered by first items."""
    try:
        given = torch.as_tensor(labels if isinstance(labels, Tensor) else np.asarray(labels))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{argument} must hold integers: {error}.") from None
    if given.is_complex() or not (given == (whole := given.long())).all():
        raise ValueError(f"{argument} must hold integers; got {given.dtype} with others.")
    if given.ndim == 3 and axes == 2:  # chains, which are of no account here
        given, whole = given.flatten(0, 1), whole.flatten(0, 1)
    if given.ndim != axes or not given.numel():
        expected = ("[items]", "[draws, items]")[axes - 1]
        raise ValueError(f"{argument} must be {expected}, none of them 0; got {[*given.shape]}.")
    return canonical(whole.cpu().reshape(-1, given.shape[-1])).reshape(given.shape)


def _weights(weights: ArrayLike | Tensor | None, draws: int) -> Float[Tensor, " draws"]:
    """Weights that sum to 1."""
    if weights is None:
        return torch.full((draws,), 1 / draws, dtype=torch.float64)
    try:
        given = torch.as_tensor(weights, dtype=torch.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(f"weights must be numbers; got {weights!r:.60}.") from error
    if given.shape != (draws,):
        raise ValueError(f"weights must hold one for each of {draws} draws; got {[*given.shape]}.")
    total = given.sum()
    if not (given.isfinite().all() and (given >= 0).all() and total > 0):
        raise ValueError(f"weights must be finite, at least 0 and not all 0; got {given.min()}.")
    return given / total

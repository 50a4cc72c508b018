"""One partition to report, from draws of cluster labels: a Bayes act that no label can switch.

Labels mean nothing by themselves, so that no average over them does. A loss between partitions
means something, and its posterior expectation is minimised over all partitions.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float, Int
from numpy.typing import ArrayLike
from torch import Tensor

from rkl.bayes.draws import Draws, read_draws
from rkl.bayes.tables import Table
from rkl.checks import integer
from rkl.readers import masked_numbers
from rkl.runs import finite_or_null
from rkl.runs.progress import working
from rkl.stats import Mean, mean, to_json
from rkl.tables import Cell, with_error

Labels = Int[Tensor, "draws items"]

# f and the unit s of each loss: s (Σ f(size of a cluster of C) + the same of S
# - 2 Σ f(size of an intersection)). A loss is one line here.
LOSSES: Mapping[str, tuple[Callable[[Tensor], Tensor], Callable[[int], float]]] = {
    "variation-of-information": (lambda n: torch.special.xlogy(n, n), lambda items: 1 / items),
    "binder": (torch.square, lambda items: 1 / max(items * (items - 1), 1)),
}
PATIENCE = 100  # sweeps; a start ends after three to ten
COUNTS = 2**27  # of four bytes, which searches side by side may hold


UNITS = {"variation-of-information": "nats", "binder": "share of pairs"}
NAMED = 12  # items of a cluster that a table names


@dataclass(frozen=True, eq=False)
class PartitionAct:
    """The partition to report.

    Attributes:
        partition: Cluster of each item, counted from 0 in the order of their first items.
        risk: Its posterior expected loss, with the Monte Carlo error.
        loss: Name of the loss that it minimises; variation of information is in nats, Binder's
            loss a share of the pairs.
        starts: Number of searches.
        agreeing: Number of searches that ended in this partition; few out of many indicate that
            several partitions are nearly as good.
        items: What the items are called; numbers from 0 without names of their own.
        sampled: The distinct partitions among the draws.
        shares: The posterior probability of each.
    """

    partition: Int[Tensor, " items"]
    risk: Mean
    loss: str
    starts: int
    agreeing: int
    items: Sequence[str]
    sampled: Int[Tensor, "distinct items"]
    shares: Float[Tensor, " distinct"]

    @functools.cached_property
    def similarity(self) -> Float[Tensor, "items items"]:
        """The posterior probability of each pair of items to be in one cluster."""
        items = len(self.partition)
        together = torch.zeros(items, items, dtype=torch.float64)
        for labels, share in zip(self.sampled, self.shares.tolist(), strict=True):
            together += share * (labels[:, None] == labels)
        return together

    def table(self) -> Table:
        """A row for each cluster, the largest first, with how alike its items are."""
        rows: list[tuple[Cell, ...]] = []
        sizes = self.partition.bincount()
        for cluster in sizes.argsort(descending=True, stable=True).tolist():
            places = (self.partition == cluster).nonzero()[:, 0]
            within = self.similarity[places][:, places]
            pairs = len(places) * (len(places) - 1)
            # an item is always with itself
            alike = (within.sum().item() - len(places)) / pairs if pairs else None
            names: list[str] = [str(self.items[i]) for i in places[:NAMED].tolist()]
            more = len(places) - NAMED
            names += [f"and {more:,} more"] if more > 0 else []
            rows.append((str(cluster), len(places), alike, ", ".join(names)))
        notes = [
            f"expected loss: {with_error(*self.risk)} "
            f"({UNITS[self.loss]}); {self.agreeing} of {self.starts} searches ended here",
            "similarity: the mean posterior probability of two items of the cluster to be in one",
        ]
        title = f"Partition of {len(self.partition):,} items under {self.loss}"
        return Table(title, ("cluster", "size", "similarity", "items"), rows, notes)

    def __str__(self) -> str:
        return str(self.table())

    def __repr__(self) -> str:
        clusters = int(self.partition.max()) + 1
        return f"PartitionAct({len(self.partition)} items in {clusters} clusters; {self.loss})"

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()

    def to_dict(self) -> dict[str, Any]:
        """The partition as JSON can hold it, without the draws."""
        return {
            "partition": self.partition.tolist(),
            "items": list(self.items),
            "risk": finite_or_null(to_json(self.risk)),
            "loss": self.loss,
            "starts": self.starts,
            "agreeing": self.agreeing,
        }


def partition_act(
    labels: Any,
    loss: str = "variation-of-information",
    *,
    variable: str | None = None,
    max_clusters: int | None = None,
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
    in random order. In each, items then move, one at a time, to their best clusters until none
    moves. That is a local minimum; the number of starts that agree shows how likely it is the
    global one.
    Time grows as starts x distinct draws x items x clusters.

    Source: Dahl, Johnson and Müller (2022), J. Comput. Graph. Stat. 31(4), section 3 (SALSO);
    Meilă (2007); Binder (1978).

    Args:
        labels: Cluster labels, [draws, items] or [chains, draws, items], integers; only their
            equality matters. Or a posterior that holds them: whatever
            :func:`rkl.bayes.read_draws` reads except a dict of arrays without chains.
        loss: "variation-of-information" (nats) or "binder" (share of the pairs).
        variable: Name of the labels in a posterior; by default the only integer variable with one
            axis.
        max_clusters: The largest number of clusters of the partition; any number by default.
        weights: Of the draws, [draws] or [chains, draws]; by default those of the posterior, or
            equal.
        starts: Number of searches.
        seed: Random seed of their orders.

    Returns:
        The partition, its risk with an error from batch means of the draws in their order, and
        in how many starts it was found. The risk is that of a minimum, over the same draws.

    Raises:
        ValueError: For labels that are no integers or not [draws, items], weights that are not
            non-negative numbers, one for each draw, a loss of another name, or a posterior
            without such labels.

    >>> draws = [[0, 0, 0, 1, 1], [1, 1, 1, 0, 0], [0, 0, 1, 2, 2]]
    >>> act = partition_act(draws)
    >>> act.partition.tolist(), round(act.risk.value.item(), 4), act.agreeing
    ([0, 0, 0, 1, 1], 0.1273, 16)
    """
    labels, names, weights = _labels_in(labels, variable, weights)
    draws = _labels(labels)
    chains = len(labels) if np.ndim(labels) == 3 else 1
    f, scale = _loss(loss, draws.shape[1])
    weight = _weights(weights, len(draws))
    integer("starts", starts, at_least=1)
    integer("seed", seed)
    if max_clusters is not None:
        integer("max_clusters", max_clusters, at_least=1)
    distinct, which = draws.unique(dim=0, return_inverse=True)
    shared = torch.zeros(len(distinct), dtype=torch.float64).index_add_(0, which, weight)
    most = min(max_clusters or draws.shape[1], draws.shape[1])
    with working("the partition"):
        candidates = canonical(_search(distinct, shared, f, starts, seed, most))
    risks = torch.stack([(shared * _losses(it, distinct, f)).sum() for it in candidates])
    best = candidates[risks.argmin()]
    agreeing = int((candidates == best).all(1).sum())
    each = scale * _losses(best, distinct, f)
    risk = _risk(each[which], weight, chains)
    items = names or [str(i) for i in range(draws.shape[1])]
    return PartitionAct(best, risk, loss, starts, agreeing, items, distinct, shared)


def _labels_in(
    source: Any, variable: str | None, weights: Any
) -> tuple[Any, list[str] | None, Any]:
    """Labels, names of the items, and weights."""
    array = isinstance(source, Tensor | np.ndarray | list | tuple)
    if array and variable is None:
        return source, None, weights
    if isinstance(source, xr.DataArray):
        source = {source.name or variable or "labels": source}
    try:
        draws = read_draws(source)
    except TypeError as error:
        raise TypeError(
            f"labels must be integers, or a posterior that holds them: {error}"
        ) from error
    name = variable or _only_labels(draws)
    if len(draws.shape(name)) != 1:
        raise ValueError(
            f"variable must hold a label for each item, [chains, draws, items]; {name} has draws "
            f"of shape {list(draws.shape(name))}."
        )
    if np.ndim(weights) == 2:
        draws, weights = read_draws(draws, weights), None
    return draws[name], draws.labels(name)[0], draws.weights if weights is None else weights


def _only_labels(draws: Draws) -> str:
    names = [k for k in draws.names if len(draws.shape(k)) == 1 and draws.of(k).dtype.kind in "iu"]
    if len(names) != 1:
        raise ValueError(
            "variable must name the labels: "
            f"{'several variables hold' if names else 'no variable holds'} whole numbers, one for "
            f"each item; got {', '.join(names or draws.names)}."
        )
    return names[0]


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

    def __init__(
        self, draws: Labels, weight: Tensor, f: Callable[[Tensor], Tensor], starts: int, most: int
    ):
        items, width = draws.shape[1], int(draws.max()) + 1
        counts = torch.arange(items + 1, dtype=torch.float64)
        self.gain = f(counts + 1) - f(counts)  # of f, when an item joins so many
        self.draws, self.weight, self.most = draws, weight / weight.sum(), most
        self.row, self.column = torch.arange(starts), torch.arange(len(draws))
        self.labels = torch.full((starts, items), -1)
        self.size = torch.zeros(starts, width + 1, dtype=torch.long)
        self.shared = torch.zeros(starts, width + 1, len(draws), width, dtype=torch.int32)

    def build(self, begun: Labels, orders: Int[Tensor, "starts items"]) -> None:
        """Place item after item where it serves best; the first starts take what is given."""
        for item in orders.T:
            target = self._costs(item).argmin(1)
            given = begun.gather(1, item[: len(begun), None]).squeeze(1)
            free = ~self._full_clusters()[self.row[: len(begun)], given]
            first = given.where(free, target[: len(begun)])
            self._join(item, torch.cat([first, target[len(begun) :]]))

    def sweeten(self, generator: torch.Generator) -> None:
        """Move items, in random order, to their best clusters, until none moves."""
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
        """Increase of the expected loss, in its own unit, if the item joins each cluster."""
        labels = self.draws[:, item].T[:, None, :, None].expand(-1, self.size.shape[1], -1, -1)
        met = self.shared.gather(3, labels).squeeze(3).long()
        cost = self.gain[self.size] - 2 * self.gain[met] @ self.weight
        return cost.masked_fill(self._full_clusters(), math.inf)

    def _full_clusters(self) -> Bool[Tensor, "starts clusters"]:
        """The clusters that must stay empty, where their maximum number is reached."""
        used = self.size > 0
        return ~used & (used.sum(1, keepdim=True) >= self.most)

    def _join(self, item: Int[Tensor, " starts"], cluster: Int[Tensor, " starts"]) -> None:
        self.labels[self.row, item] = cluster
        self._count(item, cluster, 1)
        if (self.size > 0).all(1).any():
            self.size = torch.nn.functional.pad(self.size, (0, 1))
            self.shared = torch.nn.functional.pad(self.shared, (0, 0, 0, 0, 0, 1))

    def _count(self, item: Tensor, cluster: Tensor, by: int) -> None:
        self.size[self.row, cluster] += by
        labels = self.draws[:, item].T
        self.shared[self.row[:, None], cluster[:, None], self.column, labels] += by


def _search(
    draws: Labels, weight: Tensor, f: Callable, starts: int, seed: int, most: int
) -> Int[Tensor, "starts items"]:
    generator = torch.Generator().manual_seed(seed)
    sampled = _best_sampled(draws, weight, f, starts // 2)
    width = int(draws.max()) + 1
    block = max(1, COUNTS // (len(draws) * width * (width + 1)))
    ended = []
    for begin in range(0, starts, block):
        begun = sampled[begin : begin + block]
        side_by_side = _Search(draws, weight, f, min(block, starts - begin), most)
        side_by_side.build(begun, _orders(side_by_side.labels, generator))
        side_by_side.sweeten(generator)
        ended.append(side_by_side.labels)
    return torch.cat(ended)


def _best_sampled(
    draws: Labels, weight: Tensor, f: Callable, wanted: int
) -> Int[Tensor, "best items"]:
    likely = draws[weight.argsort(stable=True, descending=True)[:64]]
    risk = torch.stack([(weight * _losses(it, draws, f)).sum() for it in likely])
    return likely[risk.argsort(stable=True)[:wanted]]


def _orders(labels: Labels, generator: torch.Generator) -> Labels:
    return torch.rand(labels.shape, generator=generator, dtype=torch.float64).argsort(1)


def _losses(partition: Tensor, draws: Labels, f: Callable[[Tensor], Tensor]) -> Tensor:
    """Σ f(sizes of the one) + Σ f(sizes of the other) - 2 Σ f(sizes of the intersections)."""
    width, clusters = int(draws.max()) + 1, int(partition.max()) + 1
    cell = draws * clusters + partition
    both = torch.zeros(len(draws), width * clusters, dtype=torch.float64)
    both.scatter_add_(1, cell, torch.ones_like(cell, dtype=torch.float64))
    both = both.unflatten(1, (width, clusters))
    return f(both.sum(1)).sum(1) + f(both.sum(2)).sum(1) - 2 * f(both).sum((1, 2))


def _risk(losses: Float[Tensor, " draws"], weight: Float[Tensor, " draws"], chains: int) -> Mean:
    """The weighted mean, its error from means of √draws neighbours in each chain."""
    value = (weight * losses).sum()
    influence = (len(losses) * weight * (losses - value)).unflatten(0, (chains, -1))
    length = math.isqrt(influence.shape[1])
    whole = influence[:, : influence.shape[1] // length * length]
    return Mean(value, mean(whole.unflatten(1, (-1, length)).mean(2).flatten()).error)


def _loss(name: str, items: int) -> tuple[Callable[[Tensor], Tensor], float]:
    if name not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(LOSSES)}; got {name!r}.")
    f, scale = LOSSES[name]
    return f, scale(items)


def _labels(labels: ArrayLike | Tensor, argument: str = "labels", axes: int = 2) -> Tensor:
    """Labels as integers from 0, each row numbered by first items."""
    if masked := masked_numbers(labels):
        raise ValueError(f"{argument} must hold integers: {masked}.")
    try:
        given = torch.as_tensor(labels if isinstance(labels, Tensor) else np.asarray(labels))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{argument} must hold integers: {error}.") from None
    whole = given.long() if not given.is_complex() else None
    if whole is None or (given.is_floating_point() and not (given == whole).all()):
        raise ValueError(f"{argument} must hold integers; got {given.dtype} with others.")
    if given.ndim == 3 and axes == 2:  # chains, which are of no account here
        given, whole = given.flatten(0, 1), whole.flatten(0, 1)
    if given.ndim != axes or not given.numel():
        expected = ("[items]", "[draws, items]")[axes - 1]
        raise ValueError(f"{argument} must be {expected}, none of them 0; got {[*given.shape]}.")
    return canonical(whole.cpu().reshape(-1, given.shape[-1])).reshape(given.shape)


def _weights(weights: ArrayLike | Tensor | None, draws: int) -> Float[Tensor, " draws"]:
    if weights is None:
        return torch.full((draws,), 1 / draws, dtype=torch.float64)
    if masked := masked_numbers(weights):
        raise ValueError(f"weights must be finite: {masked}.")
    try:
        given = torch.as_tensor(weights, dtype=torch.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(f"weights must be numbers; got {weights!r:.60}.") from error
    given = given.flatten() if given.ndim == 2 else given  # chains
    if given.shape != (draws,):
        raise ValueError(f"weights must hold one for each of {draws} draws; got {[*given.shape]}.")
    total = given.sum()
    if not (given.isfinite().all() and (given >= 0).all() and total > 0):
        raise ValueError(f"weights must be finite, at least 0 and not all 0; got {given.min()}.")
    return given / total

"""The mean of dependent draws and its standard error, in one pass and constant memory."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from rkl.checks import floats
from rkl.stats.means import Mean

HALVES = 128  # half batches kept at most, over all chains: their number decides an error's own
DEPENDENT = 1.4  # three standard errors above 1, the ratio of V for 64 independent batches
MIN_BATCHES = 12  # that an error may rest on
SINGULAR = 1e-10  # share of a variance that is rounding, once other components are known
QUANTILE_999 = 3.09  # standard normal quantile of 0.999


class BatchMeans:
    r"""The mean of dependent draws and its standard error, in one pass and constant memory.

    Draws of each chain are summed in batches long enough to be nearly independent of each
    other; how batches scatter about the mean of all is how the mean itself scatters. With S and
    W the sums of w x and of w over a batch, Z = (S − W mean) / Σ W and

        V = Σ Z² / (1 − Σ (W / Σ W)²)

    summed over the batches of all chains. Weights, of importance sampling or SMC, so enter as
    in any ratio of sums: a batch counts as much as it weighs, and a mean that hangs on a few
    heavy draws has the error that this deserves.

    V is too small by a share (τ/batch) that halving the batches doubles; the error² is
    V + max(V − V of half batches, 0), where it has cancelled (a lugsail window). Where V grows
    by 40 % as batches double they are joined, as long as a dozen remain. Where it grows to the
    end, or the chains' own means scatter more than 999 in 1,000 mixed runs would, the chains
    are the batches: then they alone are independent. The number of draws need not be known:
    when all places are taken, neighbours are joined and batches double. The error is itself
    uncertain, by about 12 % where τ is short, 25 % where chains have 25 effective draws.

    Source: Vats and Flegal (2022), arXiv 1809.04541, eq. (3), with r = 2, c = 1/2 (for r = 2 the
    window that leaves no first-order bias); Argon and Andradóttir (2006) for many chains.

    Args:
        chains: Number of chains.
        shape: Shape of one draw.
        length: Number of draws in half a batch, to begin with.
        halves: Number of half batches that are kept, over all chains.
        draws: Number of draws of each chain, if it is known: no place is kept for more.

    >>> means = BatchMeans(chains=1, shape=())
    >>> means.push(0, torch.arange(6.0))
    >>> means.mean.item()
    2.5
    """

    def __init__(
        self,
        chains: int,
        shape: tuple[int, ...] = (),
        length: int = 1,
        halves: int = HALVES,
        draws: int | None = None,
    ):
        if chains < 1 or length < 1:
            raise ValueError(f"chains and length must be at least 1; got {chains} and {length}.")
        slots = slots_of(chains, halves)
        if draws is not None:
            slots = min(slots, 2 * -(-draws // (2 * length)))
        self.length = length
        self.sums = torch.zeros(chains, slots, *shape, dtype=torch.float64)
        self.weights = torch.zeros(chains, slots, dtype=torch.float64)
        self._pushed = [0] * chains

    def push(
        self,
        chain: int,
        values: Float[Tensor, "draws *shape"],
        weights: Float[Tensor, " draws"] | None = None,
    ) -> None:
        """Take the next draws of a chain."""
        floats("values", values)
        if not 0 <= chain < len(self._pushed):
            raise ValueError(f"chain must be one of {len(self._pushed)}, from 0; got {chain}.")
        if values.shape[1:] != self.sums.shape[2:]:
            raise ValueError(
                f"values must be [draws, {', '.join(map(str, self.sums.shape[2:]))}]; "
                f"got {list(values.shape)}."
            )
        if weights is not None and weights.shape != values.shape[:1]:
            raise ValueError(f"weights must be [{len(values)}]; got {list(weights.shape)}.")
        values = values.double()
        weights = values.new_ones(len(values)) if weights is None else weights.double()
        start = self._pushed[chain]
        self._pushed[chain] += len(values)
        self.add(chain, start, 1, values * weights.reshape(-1, *[1] * (values.ndim - 1)), weights)

    def add(
        self,
        chain: int,
        start: int,
        run: int,
        sums: Float[Tensor, "runs *shape"],
        weights: Float[Tensor, " runs"],
    ) -> None:
        """Take sums over runs of consecutive draws, the first of which begins at ``start``.

        Each run must lie within half a batch: ``run`` divides ``length``, and ``start``.
        """
        places = self.weights.shape[1]
        while start + len(sums) * run > places * self.length:
            self._double()
        first, last = start // self.length, (start + len(sums) * run - 1) // self.length
        if last - first + 1 == len(sums):
            self.sums[chain, first : last + 1] += sums
            self.weights[chain, first : last + 1] += weights
            return
        slot = torch.arange(start, start + len(sums) * run, run) // self.length
        self.sums[chain].index_add_(0, slot, sums)
        self.weights[chain].index_add_(0, slot, weights)

    def room(self, chain: int, start: int, run: int, runs: int) -> Tensor | None:
        """The place to write sums over runs of half a batch each, or None."""
        first = start // self.length
        if run != self.length or start % run or first + runs > self.weights.shape[1]:
            return None
        self.weights[chain, first : first + runs] += float(run)
        return self.sums[chain, first : first + runs]

    @property
    def mean(self) -> Float[Tensor, "*shape"]:
        """The mean over all draws of all chains."""
        return self.sums.sum((0, 1)) / self.weights.sum()

    @property
    def shifts(self) -> Float[Tensor, "halves *shape"]:
        """Shift of the mean by each half batch, Z above, for all chains; they sum to 0."""
        return self._shifts(self.sums).flatten(0, 1)

    @property
    def error(self) -> Float[Tensor, "*shape"]:
        """Standard error of the mean; nan where there are not two batches."""
        return self.error_of(self.shifts)

    def error_of(self, shifts: Float[Tensor, "halves *outputs"]) -> Float[Tensor, "*outputs"]:
        """Standard error of anything, from how much each half batch moves it."""
        share = self.weights / self.weights.sum()
        flat = shifts.reshape(*share.shape, -1)
        spreads = [_spread(x, w) for x, w in _levels(flat, share)]
        between = _spread(flat.sum(1, keepdim=True), share.sum(1, keepdim=True))
        return _error(spreads, between, len(share)).reshape(shifts.shape[1:])

    def covariances(self) -> "Covariances":
        """Covariances of the half batches of draws [components, *batch]."""
        shares = [w for _, w in _levels(self.weights, self.weights / self.weights.sum())]
        totals = [self.sums.new_zeros(self.sums.shape[2], *self.sums.shape[2:]) for _ in shares]
        between, mean = torch.zeros_like(totals[0]), self.mean
        # Row by row, for so all that is touched stays in the cache.
        for rows, weights in zip(self.sums, self.weights.tolist(), strict=True):
            waiting: list[Tensor | None] = [None] * len(shares)
            apart = torch.zeros_like(mean)
            for row, weight in zip(rows, weights, strict=True):
                departure = torch.sub(row, mean, alpha=weight)
                apart += departure
                for level, total in enumerate(totals):
                    _add_products(total, departure)
                    if (first := waiting[level]) is None:
                        waiting[level] = departure
                        break
                    departure, waiting[level] = departure + first, None
            _add_products(between, apart)
        for total in (*totals, between):
            for i in range(len(total)):
                total[i + 1 :, i] = total[i, i + 1 :]
        scales = [float(self.weights.sum().square() * _freedom(w)) for w in shares]
        chains = self.weights.sum(1) / self.weights.sum()
        between /= self.weights.sum().square() * _freedom(chains)
        levels = [total / scale for total, scale in zip(totals, scales, strict=True)]
        return Covariances(levels, between, len(chains))

    def total(self) -> Mean:
        """The mean with its standard error."""
        return Mean(self.mean, self.error)

    def _double(self) -> None:
        for kept_sums in (self.sums, self.weights):
            joined = kept_sums[:, 0::2] + kept_sums[:, 1::2]
            kept_sums[:, : joined.shape[1]] = joined
            kept_sums[:, joined.shape[1] :] = 0
        self.length *= 2

    def _shifts(self, sums: Tensor) -> Tensor:
        weights = self.weights.reshape(*self.weights.shape, *[1] * (sums.ndim - 2))
        total = self.weights.sum()
        return (sums - weights * (sums.sum((0, 1)) / total)) / total


def beside(parts: Sequence[BatchMeans]) -> BatchMeans:
    """The means of several components of the same draws in one, along the first axis of each."""
    first = parts[0]
    joined = BatchMeans(len(first.weights), length=first.length)
    joined.sums = torch.cat([part.sums for part in parts], 2)
    joined.weights, joined._pushed = first.weights, first._pushed
    return joined


def slots_of(chains: int, halves: int = HALVES) -> int:
    """Number of half batches that are kept of each chain, for so many in all."""
    if chains < 1:
        raise ValueError(f"chains must be at least 1; got {chains}.")
    return max(4, 2 * (halves // (2 * chains)))


@dataclass(frozen=True, eq=False)
class Covariances:
    """The scatter of the means of components, from which functions of them have their errors.

    For many functions of few components this is less work than the shifts of each function.

    Attributes:
        levels: Of half batches, of batches, and of longer ones [components, components, *batch].
        between: Of the chains.
        chains: How many there are.
    """

    levels: list[Tensor]
    between: Tensor
    chains: int

    @functools.cached_property
    def directions(self) -> Float[Tensor, "components components *batch"]:
        """Steps from the means, one in each row: all are as likely, and not correlated.

        They are the columns of the Cholesky factor of the covariance of half batches.
        """
        return _cholesky(self.levels[0]).transpose(0, 1)

    def error_of(self, changes: Float[Tensor, "components *outputs"]) -> Float[Tensor, "*outputs"]:
        """Standard error [*batch, ...] of a function, from its change along each direction."""
        more = changes.ndim - self.directions.ndim + 1  # axes of the outputs after the batch's
        upper, between, *levels = (
            x[(..., *[None] * more)] for x in (self.directions, self.between, *self.levels)
        )
        slopes = _solve_upper(upper, changes)
        spreads = [_along(slopes, x) for x in levels]
        return _error(spreads, _along(slopes, between), self.chains)


def _add_products(total: Tensor, x: Tensor) -> None:
    """Add the products x_i x_j [n, n, *batch] of components, above the diagonal alone."""
    for i, component in enumerate(x):
        total[i, i:].addcmul_(component, x[i:])


def _cholesky(matrix: Tensor) -> Tensor:
    """L with matrix = L Lᵀ [n, n, *batch], and columns of 0 where components depend on others."""
    lower = torch.zeros_like(matrix)
    for j in range(len(matrix)):
        column = matrix[j:, j] - (lower[j:, :j] * lower[j, :j]).sum(1)
        free = column[0] > SINGULAR * matrix[j, j]
        lower[j:, j] = torch.where(free, column / column[0].sqrt(), 0.0)
    return lower


def _solve_upper(upper: Tensor, right: Tensor) -> Tensor:
    """The solution s [n, *batch] of upper s = right; 0 where a row is 0."""
    solution = torch.zeros_like(right)
    for j in reversed(range(len(right))):
        rest = right[j] - (upper[j, j + 1 :] * solution[j + 1 :]).sum(0)
        solution[j] = torch.where(upper[j, j] > 0, rest / upper[j, j], 0.0)
    return solution


def _along(slopes: Tensor, covariance: Tensor) -> Tensor:
    return ((covariance * slopes).sum(1) * slopes).sum(0)


def _levels(halves: Tensor, share: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Half batches [chains, halves, ...], batches, and longer ones as long as enough remain."""
    levels = [(halves, share)]
    while len(levels) < 2 or (
        not share.shape[1] % 2 and int((share > 0).sum()) >= 2 * MIN_BATCHES
    ):
        halves, share = (x[:, 0::2] + x[:, 1::2] for x in (halves, share))
        levels.append((halves, share))
    return levels


def _error(spreads: list[Tensor], between: Tensor, chains: int) -> Tensor:
    """Standard error from the scatter at each level; that of the chains where they disagree."""
    variance = _lugsail(spreads, between, chains)
    if chains > 1:
        apart = between > _excessive(chains - 1) * variance
        variance = torch.where(apart, between, variance)
    return variance.sqrt()


def _lugsail(spreads: list[Tensor], between: Tensor, chains: int) -> Tensor:
    """Error² from batches long enough; where none is, at least that between several chains."""
    half, whole = spreads[:2]
    variance = whole + (whole - half).clamp_min(0)
    dependent = whole > DEPENDENT * half
    if not dependent.any():
        return variance
    if len(spreads) > 2:
        longer = _lugsail(spreads[1:], between, chains)
    else:
        longer = torch.maximum(variance, between) if chains > 1 else variance
    return torch.where(dependent, longer, variance)


def _spread(departures: Tensor, share: Tensor) -> Tensor:
    return departures.square().sum((0, 1)) / _freedom(share)


def _freedom(share: Tensor) -> Tensor:
    """The share of the variance that is left when the mean is the draws' own."""
    return 1 - share.square().sum()


def _excessive(degrees: int) -> float:
    """The 0.999 quantile of χ² over its degrees of freedom, after Wilson and Hilferty."""
    step = 2 / (9 * degrees)
    return (1 - step + QUANTILE_999 * math.sqrt(step)) ** 3


def jackknife(
    function: Callable[[Tensor], Tensor],
    x: Float[Tensor, "chains draws *moments"],
    weights: Float[Tensor, "chains draws"] | None = None,
) -> Mean:
    r"""A function of means, such as a variance, with its error from dependent draws.

    Each half batch of draws moves the means by Z, and the function by f(mean + Z) − f(mean);
    from there the error goes as that of a mean does in :class:`BatchMeans`, which looks for
    batches long enough, and for chains that disagree. The bias of order 1/n stays.

    Source: Efron (1982), The Jackknife, the Bootstrap and Other Resampling Plans, chapter 6:
    the infinitesimal jackknife, over batches.

    Args:
        function: Of means [\*batch, \*moments], elementwise in \*batch, in double precision.
        x: Draws of the moments.
        weights: Weight of each draw, at least 0.

    Returns:
        The function at the means, and its standard error.

    >>> x = torch.tensor([[1.0, 2.0, 6.0, 3.0]])
    >>> moments = torch.stack([x, x.square()], -1)
    >>> jackknife(lambda mean: mean[..., 1] - mean[..., 0] ** 2, moments).value
    tensor(3.5000, dtype=torch.float64)
    """
    floats("x", x)
    if x.ndim < 2 or not x.shape[0] or not x.shape[1]:
        raise ValueError(f"x must be [chains, draws, ...], not empty; got {list(x.shape)}.")
    if weights is not None:
        floats("weights", weights)
        if weights.shape != x.shape[:2]:
            raise ValueError(f"weights must be {list(x.shape[:2])}; got {list(weights.shape)}.")
        if not (weights >= 0).all() or not weights.sum() > 0:
            raise ValueError(f"weights must be at least 0, not all 0; got {weights.min():.4g}.")
    if not callable(function):
        raise TypeError(f"function must be one of means; got {function!r}.")
    means = BatchMeans(x.shape[0], tuple(x.shape[2:]), draws=x.shape[1])
    for chain in range(len(x)):
        means.push(chain, x[chain], None if weights is None else weights[chain])
    value = function(means.mean)
    return Mean(value, means.error_of(function(means.mean + means.shifts) - value))

"""Effective numbers of dependent draws, and the agreement of chains."""

import math
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from rkl.checks import floats, number
from rkl.stats.quantiles import interpolated_quantile

NUMBERS = 2**22  # draws transformed together, to bound the memory of Fourier transforms


def autocorrelation_time(
    x: Float[Tensor, "chains draws *columns"],
) -> Float[Tensor, "*columns"]:
    r"""Number of dependent draws that are worth one independent draw of the mean.

        τ = 1 + 2 Σₜ ρₜ,    Var(mean) = τ Var(x) / (chains · draws)

    The sum stops by Geyer's initial monotone sequence: sums of adjacent pairs ρ₂ₖ + ρ₂ₖ₊₁ of a
    reversible chain are positive and decrease. Chains are halved and compared, so that a chain
    that drifts, or sits elsewhere than the others, has a large τ. Below 1 for draws that
    alternate; nan for a constant.

    Source: Geyer (1992), section 3.3; Vehtari et al. (2021), arXiv 1903.08008, eqs. (10)–(13).

    Args:
        x: Draws of one or many quantities, at least 4 in each chain.

    Returns:
        τ in draws.

    >>> generator = torch.Generator().manual_seed(0)
    >>> noise = torch.randn(4, 10_000, generator=generator, dtype=torch.float64)
    >>> bool((autocorrelation_time(noise) - 1).abs() < 0.05)
    True
    """
    return _by_columns(lambda part: _where_moving(_time(part), part), _as_doubles(x))


def integrated_time(
    x: Float[Tensor, "chains draws *columns"], window: float = 5.0
) -> Float[Tensor, "*columns"]:
    r"""The integrated autocorrelation time by the window of Madras and Sokal.

        τ = 1 + 2 Σ ρₜ over t ≤ M, with M the first for which M ≥ window · τ(M)

    Twice the τ_int of lattice field theory, for comparison with published figures. It
    uses each chain about its own mean alone, and so misses that chains disagree;
    :func:`autocorrelation_time` does; nan where no chain moves.

    Source: Madras and Sokal (1988), J. Stat. Phys. 50, 109, appendix C.

    Args:
        x: Draws of one or many quantities, at least 4 in each chain; a window that never closes
            takes all lags: chains are then shorter than about 50 τ.
        window: How many τ long the window is.

    Returns:
        τ in draws.

    >>> noise = torch.randn(4, 10_000, generator=torch.Generator().manual_seed(0))
    >>> bool((integrated_time(noise) - 1).abs() < 0.05)
    True
    """
    number("window", window, above=0)

    def time_by_window(part: Tensor) -> Tensor:
        covariance = _autocovariance(part)
        still = (part.amax(1) == part.amin(1)).all(0)
        time = 2 * (covariance / torch.where(still, 1.0, covariance[0])).cumsum(0) - 1
        lag = torch.arange(len(time))[:, None]
        closed = lag >= window * time
        closed[-1] = True
        first = closed.long().argmax(0)
        return torch.where(still, torch.nan, time[first, torch.arange(time.shape[1])])

    return _by_columns(time_by_window, _as_doubles(x))


def ess(
    x: Float[Tensor, "chains draws *columns"],
    weights: Float[Tensor, "chains draws"] | None = None,
) -> Float[Tensor, "*columns"]:
    """Effective number of draws for the bulk: of independent draws that would do as well.

    Draws are replaced by normal scores of their ranks, so that it exists for heavy tails, and
    does not move under monotone maps of x. With weights it is the smaller of two: that of all
    draws times 1 / (n Σ w²), Kish's share, right where weights and draws have nothing to do with
    each other; and the one of w (x − mean), whose correlations are those of the weighted mean,
    but which overrates draws of which a few have nearly all of the weight.

    Source: Vehtari et al. (2021), arXiv 1903.08008, section 4.1; Kish (1965), section 11.2.

    Args:
        x: Draws of one or many quantities, at least 4 in each chain.
        weights: Weight of each draw.

    Returns:
        Effective number of draws; at most n log₁₀ n. It is nan for a constant, because chains
        that never moved look the same as a quantity that does not vary. Chains are halved: of
        an odd number of draws the middle one does not count.
    """
    x = _as_doubles(x)
    share = 1.0 if weights is None else _kish(weights, x)

    def of_bulk(part: Tensor) -> Tensor:
        scores = _normal_scores(_halves(part))
        count = share * _count(scores) / _time_of_halves(scores)
        if weights is not None:
            weighted = _weighted_count(scores, _halves(weights.double().cpu()))
            count = torch.fmin(count, weighted)
        return _where_moving(count, part)

    return _by_columns(of_bulk, x)


def _weighted_count(x: Tensor, weights: Tensor) -> Tensor:
    """Var(x)/Var(mean) with weights, by the correlations of w (x − mean); nan where it is 0."""
    total, w = weights.sum(), weights[..., None]
    departure = x - (w * x).sum((0, 1)) / total
    moved = w * departure
    spread = (moved * departure).sum((0, 1)) / total
    return spread * total.square() / (moved.square().sum((0, 1)) * _time_of_halves(moved))


def ess_tail(x: Float[Tensor, "chains draws *columns"]) -> Float[Tensor, "*columns"]:
    """Effective number of draws for the tails: the smaller of those for the 5 % and 95 % quantile.

    Source: Vehtari et al. (2021), arXiv 1903.08008, section 4.3.

    Args:
        x: Draws of one or many quantities, at least 4 in each chain.

    Returns:
        Effective number of draws; at most n log₁₀ n; nan for a constant.
    """

    def of_quantiles(part: Tensor) -> Tensor:
        below = [
            _halves((part <= interpolated_quantile(part.flatten(0, 1), at)).double())
            for at in (0.05, 0.95)
        ]
        time = torch.maximum(*map(_time_of_halves, below))
        return _where_moving(_count(below[0]) / time, part)

    return _by_columns(of_quantiles, _as_doubles(x))


def rhat(x: Float[Tensor, "chains draws *columns"]) -> Float[Tensor, "*columns"]:
    """R̂, the factor by which chains together are wider than each alone; 1 when all agree.

    The larger of two: for location, from the ranks of the draws, and for scale, from the ranks
    of their distance to the median. Above 1.01 the chains do not agree yet.

    Source: Vehtari et al. (2021), arXiv 1903.08008, section 4.2.

    Args:
        x: Draws of one or many quantities, at least 4 in each chain.

    Returns:
        R̂; nan for a constant, because a sampler that never moved gives one too.
    """

    def larger(part: Tensor) -> Tensor:
        return _where_moving(torch.maximum(*map(_ratio, _scores_of_halves(part))), part)

    return _by_columns(larger, _as_doubles(x))


def ess_and_rhat(
    x: Float[Tensor, "chains draws *columns"],
) -> tuple[Float[Tensor, "*columns"], Float[Tensor, "*columns"]]:
    """Effective number of draws for the bulk, and R̂, from one ranking of the draws.

    The same as :func:`ess` and :func:`rhat`, in less time.

    Args:
        x: Draws of one or many quantities, at least 4 in each chain.

    >>> x = torch.randn(4, 100, generator=torch.Generator().manual_seed(0))
    >>> bulk, ratio = ess_and_rhat(x)
    >>> torch.allclose(bulk, ess(x)), torch.allclose(ratio, rhat(x))
    (True, True)
    """

    def both(part: Tensor) -> Tensor:
        location, scale = _scores_of_halves(part)
        bulk = _count(location) / _time_of_halves(location)
        ratio = torch.maximum(_ratio(location), _ratio(scale))
        return _where_moving(torch.stack([bulk, ratio]), part)

    bulk, ratio = _by_columns(both, _as_doubles(x))
    return bulk, ratio


def _where_moving(value: Tensor, x: Tensor) -> Tensor:
    """The value of each column of [chains, draws, columns]; nan where the column is constant."""
    return torch.where(_constant(x), torch.nan, value)


def _constant(x: Tensor) -> Tensor:
    return x.amax((0, 1)) == x.amin((0, 1))


def _as_doubles(x: Tensor) -> Tensor:
    floats("x", x)
    if x.ndim < 2 or not x.shape[0] or x.shape[1] < 4:
        raise ValueError(
            f"x must be [chains, draws, ...] with at least 4 draws each; got {list(x.shape)}."
        )
    if not x.isfinite().all():
        raise ValueError(f"x must be finite; got {int((~x.isfinite()).sum())} that are not.")
    return x.detach().cpu().double()


def _by_columns(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A function from [chains, draws, columns] to [..., columns], some columns at a time."""
    flat = x.flatten(2) if x.ndim > 2 else x[..., None]
    if not flat.shape[-1]:  # Fourier transforms and variances of nothing fail or warn
        none = function(x.new_zeros(*x.shape[:2], 1))[..., :0]
        return none.reshape((*none.shape[:-1], *x.shape[2:]))
    width = max(1, NUMBERS // (x.shape[0] * x.shape[1]))
    values = torch.cat([function(part) for part in flat.split(width, -1)], -1)
    return values.reshape((*values.shape[:-1], *x.shape[2:]))


def _kish(weights: Tensor, x: Tensor) -> float:
    floats("weights", weights)
    weights = weights.detach().double()
    if weights.shape != x.shape[:2]:
        raise ValueError(f"weights must be {list(x.shape[:2])}; got {list(weights.shape)}.")
    if not weights.isfinite().all() or weights.min() < 0 or not weights.sum() > 0:
        raise ValueError(
            "weights must be finite, at least 0, and not all 0; "
            f"got values from {weights.min():.4g} to {weights.max():.4g}."
        )
    return float(weights.sum() ** 2 / (weights.numel() * weights.square().sum()))


def _halves(x: Tensor) -> Tensor:
    """First and last halves of every chain as chains, without the middle of an odd number."""
    half = x.shape[1] // 2
    return torch.cat([x[:, :half], x[:, -half:]])


def _count(x: Tensor) -> int:
    return x.shape[0] * x.shape[1]


def _time(x: Tensor) -> Tensor:
    """τ of columns [chains, draws, columns] after halving their chains."""
    return _time_of_halves(_halves(x))


def _time_of_halves(x: Tensor) -> Tensor:
    chains, draws, columns = x.shape
    covariance = _autocovariance(x)
    within = covariance[0] * draws / (draws - 1)
    wide = covariance[0] + (x.mean(1).var(0) if chains > 1 else 0)
    constant = _constant(x)
    correlation = 1 - (within - covariance) / torch.where(constant, 1.0, wide)
    correlation[0] = 1
    pairs = correlation[: 2 * max(1, (draws - 1) // 2)].reshape(-1, 2, columns)
    sums = pairs.sum(1)
    counted = (sums > 0).long().cumprod(0)
    counted[-1] = 0
    time = 2 * (counted * sums.cummin(0).values).sum(0) - 1
    # of the first pair that is cut off, what is positive still counts, once
    last = pairs[counted.sum(0), 0, torch.arange(columns)]
    time = (time + last.clamp_min(0)).clamp_min(1 / math.log10(chains * draws))
    return torch.where(constant, 1.0, time)


def _autocovariance(x: Tensor) -> Tensor:
    """(1/n) Σ (xᵢ − x̄)(xᵢ₊ₜ − x̄) for every lag t, a mean over chains: [lags, columns]."""
    draws = x.shape[1]
    padded = 2 ** math.ceil(math.log2(2 * draws))
    centred = (x - x.mean(1, keepdim=True)).movedim(1, -1).contiguous()
    spectrum = torch.fft.rfft(centred, padded)
    power = (spectrum.real.square() + spectrum.imag.square()).mean(0)
    return torch.fft.irfft(power, padded)[:, :draws].mT / draws


def _normal_scores(x: Tensor) -> Tensor:
    """Normal quantiles of the ranks among all chains, ties at their mean rank."""
    order, ordered = _sort(x)
    return _unsort(_scores(ordered), order, x)


def _scores_of_halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """Normal scores of half chains, and of the distances of their draws to the median."""
    halves = _halves(x)
    order, ordered = _sort(halves)
    middle = ordered.shape[1] // 2  # of an even number of draws
    low, high = ordered[:, middle - 1, None], ordered[:, middle, None]
    distance = np.abs(ordered - (low + (high - low) / 2))
    fold = np.argsort(distance, -1, kind="stable")  # it falls, then rises: two runs to merge
    folded = np.empty_like(distance)
    np.put_along_axis(folded, fold, _scores(np.take_along_axis(distance, fold, -1)), -1)
    return _unsort(_scores(ordered), order, halves), _unsort(folded, order, halves)


def _sort(x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Order and sorted draws [columns, chains · draws] of [chains, draws, columns]."""
    rows = x.flatten(0, 1).mT.contiguous().numpy()  # NumPy sorts ten times as fast as torch
    order = np.argsort(rows, -1)
    return order, np.take_along_axis(rows, order, -1)


def _unsort(values: np.ndarray, order: np.ndarray, like: Tensor) -> Tensor:
    """Values of sorted draws, where their draws were [chains, draws, columns]."""
    rows = np.empty(order.shape)
    np.put_along_axis(rows, order, values, -1)
    return torch.from_numpy(rows).mT.reshape(like.shape)


def _scores(ordered: np.ndarray) -> np.ndarray:
    """Normal quantiles of rows in rising order; those that tie share the mean of their ranks."""
    count = ordered.shape[1]
    # of each rank that there may be, from 1 in steps of a half
    ranks = (torch.arange(2, 2 * count + 1, dtype=torch.float64) / 2 - 0.375) / (count + 0.25)
    quantiles = torch.special.ndtri(ranks).numpy()
    place = np.broadcast_to(np.arange(count), ordered.shape)
    tied = ordered[:, 1:] == ordered[:, :-1]
    if not tied.any():
        return np.broadcast_to(quantiles[::2], ordered.shape)
    edge = np.zeros((len(ordered), 1), bool)
    first = np.maximum.accumulate(np.where(np.hstack([edge, tied]), 0, place), -1)
    last = np.where(np.hstack([tied, edge]), count - 1, place)[:, ::-1]
    return quantiles[first + np.minimum.accumulate(last, -1)[:, ::-1]]


def _ratio(x: Tensor) -> Tensor:
    within = x.var(1).mean(0)
    between = x.mean(1).var(0) if len(x) > 1 else torch.zeros_like(within)
    draws = x.shape[1]
    ratio = ((between / within * draws + draws - 1) / draws).sqrt()
    return torch.where((within == 0) & (between == 0), 1.0, ratio)

"""Diagnostics of the posterior means: which of them exist, and how accurate they are."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rkl.bayes.answer import Diagnostics
from rkl.bayes.draws import Draws
from rkl.stats import BatchMeans, Mean, Tail, ess, ess_and_rhat, pareto_k, resample, tail
from rkl.stats.pareto import NO_ERROR, NO_MEAN

NUMBERS = 2**24  # values of one quantity that its tails are judged by
RANKED = 2**20  # values that are ranked, for effective draws and R-hat
DOUBTFUL = 0.99  # Pareto-k of what has no error, though its mean is not denied
MIN_DRAWS_OF_TAIL = 600  # from which tails may deny a mean: fewer hide a cluster of draws
MIN_EFFECTIVE_DRAWS = 4
ROUNDING = 1e-13  # error of a mean of equal numbers, relative to them
MAX_RHAT = 1.01  # R-hat above which chains do not agree
CLEAR_GAP = 2.5  # mean distance of two separate components, in its standard deviations
MIN_SWAPPED = 0.005  # share of draws in which they have changed places
WAYS_OUT = (
    "Intrinsic() takes the smaller of both, and JensenShannon() is bounded. Or ask about another "
    "experiment, whose noise a draw cannot undercut, or for a family with fewer parameters."
)
MAX_COMPONENTS = 24  # components whose order is checked


@dataclass(frozen=True)
class Judgement:
    """Effective draws and tails of some quantities, by name.

    Attributes:
        ess: Effective number of draws, the least over all of them; of many, over some of them.
        rhat: The largest; nan where there are too few draws, or weights, or all are alike.
        pareto_k: Of every quantity, the largest over its event, [*batch]. Of weighted draws also
            that of the terms of the mean, weights included, up to 0.99: heavy ones take the error
            away, but may be the weights' fault.
            It is nan where no tail can be fitted: draws are tied, or lie in clusters.
        infinite: Where the draws speak for an infinite mean, [*batch]; not by Pareto-k alone.
        draws: How many draws of all chains were looked at.
    """

    ess: float
    rhat: float
    pareto_k: Mapping[str, Tensor]
    infinite: Mapping[str, Tensor]
    draws: int

    def without_mean(self) -> dict[str, Tensor]:
        """The quantities of which some have no mean, though one of as many is misjudged at times.

        The largest of many estimates is large by chance: of m, k must exceed 1 by so many of its
        standard errors as a normal variable does with probability 1 / (2 m).
        """
        quantities = {}
        for name, k in self.pareto_k.items():
            chance = torch.tensor(0.5 / max(1, k.numel()), dtype=torch.float64)
            beyond = k - self._error(k) * -torch.special.ndtri(chance) >= NO_MEAN
            if bool((beyond & self.infinite[name]).any()):
                quantities[name] = k
        return quantities

    def surely_infinite(self, name: str) -> Tensor:
        """Mask [*batch] of means that are infinite by two standard errors of the tail's shape."""
        k = self.pareto_k[name]
        return self.infinite[name] & (k - 2 * self._error(k) >= NO_MEAN)

    def _error(self, k: Tensor) -> Tensor:
        return (1 + k) / math.sqrt(3 * math.sqrt(self.draws))


def thin(draws: Draws, numbers: int) -> Draws:
    """A subsample of draws, evenly spread, so that diagnostics stay cheap."""
    most = max(1, NUMBERS // max(1, numbers) // draws.chains)
    return draws.every(-(-draws.draws // most))


def diagnose(
    values: Mapping[str, Tensor], draws: Draws, events: Mapping[str, int] | None = None
) -> Judgement:
    """Effective draws and tails of quantities [chains, draws, *batch, *event].

    Raises:
        ValueError: There are fewer than 4 effective draws.
    """
    weights = draws.weights
    ends = events or {}
    tails = {name: _tail(x, weights) for name, x in values.items()}
    k = {name: _largest(one.k, ends.get(name, 0)) for name, one in tails.items()}
    infinite = {name: _any(one.infinite_mean, ends.get(name, 0)) for name, one in tails.items()}
    total = draws.chains * draws.draws
    kish = total if weights is None else float(1 / weights.square().sum())
    if kish < MIN_EFFECTIVE_DRAWS or total < MIN_EFFECTIVE_DRAWS:
        raise ValueError(_too_few(kish, total))
    if draws.draws < MIN_EFFECTIVE_DRAWS:
        return Judgement(kish, math.nan, k, infinite, total)
    some = [_some(x) for x in values.values() if x.numel()]
    if weights is not None:
        worth = _least(torch.cat([ess(x, weights) for x in some]))
        return Judgement(worth, math.nan, k, infinite, total)
    bulks, ratios = zip(*map(ess_and_rhat, some), strict=True)
    worth = _least(torch.cat(bulks))
    if worth < MIN_EFFECTIVE_DRAWS:
        raise ValueError(_too_few(worth, total))
    return Judgement(worth, -_least(-torch.cat(ratios)), k, infinite, total)


def _least(values: Tensor) -> float:
    numbers = values[~values.isnan()]
    return float(numbers.min()) if numbers.numel() else math.nan


def _some(x: Tensor) -> Tensor:
    """A subsample of columns [chains, draws, columns], so that ranking stays cheap."""
    columns = x.reshape(*x.shape[:2], -1)
    return columns[..., :: math.ceil(columns.numel() / RANKED)]


def _too_few(effective: float, total: int) -> str:
    return (
        f"draws must hold at least {MIN_EFFECTIVE_DRAWS} effective draws; these {total:,} are "
        f"worth {effective:.1f}. Run the chains for longer, or check that they mix."
    )


def _tail(x: Tensor, weights: Tensor | None) -> Tail:
    """The tails of the terms of the mean; of weighted draws also of x itself, resampled."""
    flat = x.flatten(0, 1)
    tail_of_draws = tail(
        flat if weights is None else flat[resample(weights.flatten().log(), offset=0.5).unique()]
    )
    if len(flat) < MIN_DRAWS_OF_TAIL:
        tail_of_draws = Tail(
            tail_of_draws.k.clamp_max(DOUBTFUL), torch.zeros_like(tail_of_draws.infinite_mean)
        )
    if weights is None:
        return tail_of_draws
    terms = flat * weights.reshape(-1, *[1] * (flat.ndim - 1)) * len(flat)
    return Tail(
        torch.fmax(tail_of_draws.k, pareto_k(terms).clamp_max(DOUBTFUL)),
        tail_of_draws.infinite_mean,
    )


def _largest(k: Tensor, event: int) -> Tensor:
    """The largest over the event axes; nan where one is unknown and no other is large."""
    if not event:
        return k
    parts = k.flatten(k.ndim - event)
    largest = parts.where(~parts.isnan(), -math.inf).amax(-1)
    return torch.where(parts.isnan().any(-1) & (largest < NO_ERROR), math.nan, largest)


def _any(parts: Tensor, event: int) -> Tensor:
    return parts.flatten(parts.ndim - event).any(-1) if event else parts


def mean_of(values: Tensor, draws: Draws) -> Mean:
    """The posterior mean of values [chains, draws, ...], its error from batch means."""
    means = BatchMeans(draws.chains, values.shape[2:])
    for chain in range(draws.chains):
        weights = None if draws.weights is None else draws.weights[chain]
        means.push(chain, values[chain], weights)
    return means.total()


def mean_of_diagnosed(name: str, values: Tensor, draws: Draws, judgement: Judgement) -> Mean:
    """The posterior mean of diagnosed values [chains, draws, ...], inf where it surely is.

    Its error is nan where no normal one holds, and 0 where it is but rounding.
    """
    value, error = mean_of(values, draws)
    error = nan_where(error, judgement.pareto_k[name] >= NO_ERROR)
    error = torch.where(error <= ROUNDING * value.abs(), 0.0, error)
    return Mean(torch.where(judgement.surely_infinite(name), torch.inf, value), error)


def nan_where(error: Tensor, unsure: Tensor) -> Tensor:
    """Errors [*batch, ...] where they hold, nan where [*batch] they do not.

    What all of the batch shares has an error where it holds for all.
    """
    if error.shape[: unsure.ndim] != unsure.shape:
        unsure = unsure.any()
    unsure = unsure.reshape(unsure.shape + (1,) * (error.ndim - unsure.ndim))
    return torch.where(unsure, torch.nan, error)


def weak(k: Mapping[str, Tensor], bound: float) -> dict[str, Tensor]:
    """The quantities of which some part has a Pareto-k of at least ``bound``."""
    return {name: value for name, value in k.items() if bool((value >= bound).any())}


def diagnostics_of(
    judgement: Judgement,
    draws: Draws,
    judged_on: Draws,
    method: str,
    accuracy: float,
    more_warnings: Iterable[str | None] = (),
) -> Diagnostics:
    """The diagnostics of an estimate, with the warnings on its draws and further ones."""
    return Diagnostics(
        chains=draws.chains,
        draws=draws.draws,
        judged=judgement.draws,
        ess=judgement.ess,
        rhat=judgement.rhat,
        pareto_k=judgement.pareto_k,
        method=method,
        accuracy=accuracy,
        warnings=(
            *_warnings(judgement, draws, judged_on),
            *draws.notes,
            *filter(None, more_warnings),
        ),
    )


def _warnings(judgement: Judgement, draws: Draws, judged_on: Draws) -> list[str]:
    warnings = []
    for name, k in weak(judgement.pareto_k, NO_ERROR).items():
        worst, beyond = k[k >= NO_ERROR].max(), "no error of normal theory holds for its mean"
        if worst >= NO_MEAN:
            sure = bool(judgement.surely_infinite(name).any())
            beyond = "its mean is infinite" if sure else f"its mean may be infinite, and {beyond}"
        warnings.append(f"{name} has a Pareto-k of {worst:.2f}: {beyond}")
    unknown = [name for name, k in judgement.pareto_k.items() if bool(k.isnan().any())]
    if unknown and judgement.draws >= MIN_DRAWS_OF_TAIL:
        warnings.append(
            f"the tails of {', '.join(unknown)} cannot be judged: extreme draws are tied, or lie "
            "in a cluster apart; errors hold if every such cluster is visited many times"
        )
    if math.isnan(judgement.ess):
        warnings.append("all draws are the same: the chains never moved, or nothing is uncertain")
    if judgement.rhat > MAX_RHAT:
        warnings.append(f"the chains do not agree yet: R-hat is {judgement.rhat:.3f}")
    if draws.chains > draws.draws:
        warnings.append(
            f"there are {draws.chains:,} chains of {draws.draws:,} draws: if it should be the "
            "other way round, as for get_chain() of emcee, swap the first two axes"
        )
    if judged_on.draws < draws.draws:
        warnings.append(
            f"tails are judged from {judged_on.draws:,} draws of {draws.draws:,} a chain"
        )
    return warnings


def label_switching(draws: Draws, names: tuple[str, ...], batch: torch.Size) -> str | None:
    """A sentence on label switching, where components of a batch change places between draws.

    In every draw the components are sorted. Where a gap between neighbours in that order stays
    clear of 0, the components on one side of it should be the same in all draws.
    """
    if not 1 < batch.numel() <= MAX_COMPONENTS:
        return None
    subsample = thin(draws, batch.numel() * MAX_COMPONENTS)
    for name in names:
        if draws.shape(name)[: len(batch)] != tuple(batch):
            continue
        x = subsample[name].flatten(0, 1)
        for column in x.reshape(len(x), batch.numel(), -1).unbind(-1):
            share, i, j = label_exchange(column)
            if share > MIN_SWAPPED:
                return (
                    f"components {i} and {j} of {name} change places between draws (in "
                    f"{100 * share:.0f} % of them): each act averages over labels. Report the "
                    "act of the whole mixture instead: "
                    "family=lambda theta: MixtureSameFamily(...)"
                )
    return None


def label_exchange(x: Tensor) -> tuple[float, int, int]:
    """The pair of components [draws, k] that is exchanged most often, and in what share."""
    ordered, order = x.sort(-1)
    gaps = ordered.diff(dim=-1)
    clear = (gaps.mean(0) > CLEAR_GAP * gaps.std(0)).nonzero()[:, 0]
    most = (0.0, 0, 0)
    for boundary in clear.tolist():
        below = torch.zeros_like(x, dtype=torch.bool).scatter_(1, order[:, : boundary + 1], True)
        first = (below[:, :, None] & ~below[:, None, :]).double().mean(0)
        share = torch.minimum(first, first.T)
        i, j = divmod(int(share.argmax()), len(share))
        most = max(most, (share[i, j].item(), min(i, j), max(i, j)))
    return most

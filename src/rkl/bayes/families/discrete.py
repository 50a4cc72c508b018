"""Families over counts and classes: coins, waiting times, Poisson and Categorical."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import (
    Bernoulli,
    Binomial,
    Categorical,
    Distribution,
    Geometric,
    Multinomial,
    NegativeBinomial,
    OneHotCategorical,
    Poisson,
)
from torch.nn.functional import logsigmoid, softplus

from rkl.bayes.families.base import ExponentialFamily, Fixed, fixed_value
from rkl.bayes.families.special import bernoulli_kl, log1mexp, relative_gap


@dataclass(frozen=True, eq=False)
class BinomialFamily(ExponentialFamily):
    """Binomial(total_count, probs) of a known total_count: T = x, η = log odds."""

    distribution = Binomial
    events = (0,)
    names = ("logit",)
    mean_names = ("E x",)
    parameters = ("probs",)
    total_count: Fixed = 1.0

    @classmethod
    def of(cls, distribution: Binomial, draws: bool = True):
        total = fixed_value(distribution.total_count, draws)
        if total is None:
            raise ValueError(
                "total_count must be known, but it moves from draw to draw: the support of a "
                "Binomial moves with it, and so no reverse-KL act lies inside the posterior."
            )
        return cls(total)

    def natural(self, distribution: Bernoulli | Binomial):
        return (logits_of(distribution),)

    def from_natural(self, natural):
        return Binomial(torch.zeros_like(natural[0]) + self.total_count, logits=natural[0])

    def statistic(self, x):
        return (x,)

    def log_partition(self, natural):
        return self.total_count * softplus(natural[0])

    def mean(self, natural):
        return (self.total_count * torch.sigmoid(natural[0]),)

    def from_mean(self, mean):
        self.check_mean(mean)
        return ((mean[0] / (self.total_count - mean[0])).log(),)

    def kl(self, p, q):
        return self.total_count * bernoulli_kl(p[0], q[0])

    def log_fisher(self, distribution: Bernoulli | Binomial):
        logit = logits_of(distribution)
        return softplus(logit) + softplus(-logit) + (0 * logit + self.total_count).log()

    def mean_inside(self, mean):
        return ((mean[0] > 0) & (mean[0] < self.total_count),)


@dataclass(frozen=True, eq=False)
class BernoulliFamily(BinomialFamily):
    """Bernoulli(probs): a Binomial of one trial."""

    distribution = Bernoulli

    @classmethod
    def of(cls, distribution: Bernoulli, draws: bool = True):
        return cls()

    def from_natural(self, natural):
        return Bernoulli(logits=natural[0])


@dataclass(frozen=True, eq=False)
class NegativeBinomialFamily(ExponentialFamily):
    """NegativeBinomial(total_count r, probs) of a known r: T = x, η = log probs."""

    distribution = NegativeBinomial
    events = (0,)
    names = ("log probs",)
    mean_names = ("E x",)
    parameters = ("probs",)
    total_count: Fixed = 1.0

    @classmethod
    def of(cls, distribution: NegativeBinomial, draws: bool = True):
        total = fixed_value(distribution.total_count, draws)
        return None if total is None else cls(total)

    def natural(self, distribution: NegativeBinomial | Geometric):
        given = _parametrisation(distribution)
        return (
            logsigmoid(distribution.logits) if given == "logits" else distribution.probs.log(),
        )

    def from_natural(self, natural):
        odds = natural[0] - log1mexp(natural[0])
        return NegativeBinomial(torch.zeros_like(odds) + self.total_count, logits=odds)

    def statistic(self, x):
        return (x,)

    def log_partition(self, natural):
        return -self.total_count * log1mexp(natural[0])

    def mean(self, natural):
        return (self.total_count / torch.expm1(-natural[0]),)

    def from_mean(self, mean):
        self.check_mean(mean)
        return (-torch.log1p(self.total_count / mean[0]),)

    def kl(self, p, q):
        """That of a coin for each of the r / (1 − probs) trials to be expected."""
        stop_p, stop_q = log1mexp(p[0]), log1mexp(q[0])
        coin = relative_gap(p[0], q[0]) + relative_gap(stop_p, stop_q)
        return self.total_count * coin * (-stop_p).exp()

    def log_fisher(self, distribution: NegativeBinomial | Geometric):
        log_probs = self.natural(distribution)[0]
        total = (0 * log_probs + self.total_count).log()
        return total - log_probs - 2 * log1mexp(log_probs)

    def inside(self, natural):
        return (natural[0].isfinite() & (natural[0] < 0),)

    def mean_inside(self, mean):
        return (mean[0].isfinite() & (mean[0] > 0),)


@dataclass(frozen=True, eq=False)
class GeometricFamily(NegativeBinomialFamily):
    """Geometric(probs), failures before a success: NegativeBinomial(1, 1 − probs)."""

    distribution = Geometric
    names = ("log(1 − probs)",)

    @classmethod
    def of(cls, distribution: Geometric, draws: bool = True):
        return cls()

    def natural(self, distribution: Geometric):
        given = _parametrisation(distribution)
        return (
            logsigmoid(-distribution.logits)
            if given == "logits"
            else torch.log1p(-distribution.probs),
        )

    def from_natural(self, natural):
        return Geometric(logits=log1mexp(natural[0]) - natural[0])


@dataclass(frozen=True, eq=False)
class PoissonFamily(ExponentialFamily):
    """Poisson(rate): T = x, η = log rate."""

    distribution = Poisson
    events = (0,)
    names = ("log rate",)
    mean_names = ("E x",)
    parameters = ("rate",)

    def natural(self, distribution: Poisson):
        return (distribution.rate.log(),)

    def from_natural(self, natural):
        return Poisson(natural[0].exp())

    def statistic(self, x):
        return (x,)

    def log_partition(self, natural):
        return natural[0].exp()

    def mean(self, natural):
        return (natural[0].exp(),)

    def from_mean(self, mean):
        self.check_mean(mean)
        return (mean[0].log(),)

    def kl(self, p, q):
        return relative_gap(p[0], q[0])

    def log_fisher(self, distribution: Poisson):
        return -distribution.rate.log()

    def mean_inside(self, mean):
        return (mean[0].isfinite() & (mean[0] > 0),)


@dataclass(frozen=True, eq=False)
class MultinomialFamily(ExponentialFamily):
    """Multinomial(total_count, probs): T = x, η = log probs, −∞ at 0, where torch clamps.

    η has one number more than it needs: a constant added to all of it changes no distribution.
    """

    distribution = Multinomial
    events = (1,)
    names = ("log probs",)
    mean_names = ("E x",)
    parameters = ("probs",)
    total_count: int = 1

    @classmethod
    def of(cls, distribution: Multinomial, draws: bool = True):
        return cls(distribution.total_count)

    def natural(self, distribution: Categorical | Multinomial | OneHotCategorical):
        distribution = (
            distribution if isinstance(distribution, Categorical) else distribution._categorical
        )
        return (
            distribution.logits
            if _parametrisation(distribution) == "logits"
            else distribution.probs.log(),
        )

    def from_natural(self, natural):
        return Multinomial(self.total_count, logits=natural[0])

    def statistic(self, x):
        return (x,)

    def log_partition(self, natural):
        return self.total_count * natural[0].logsumexp(-1)

    def mean(self, natural):
        return (self.total_count * natural[0].softmax(-1),)

    def from_mean(self, mean):
        self.check_mean(mean)
        return ((mean[0] / self.total_count).log(),)

    def kl(self, p, q):
        gaps = relative_gap(p[0].log_softmax(-1), q[0].log_softmax(-1))
        return self.total_count * gaps.sum(-1)

    def log_fisher(self, distribution: Categorical | Multinomial | OneHotCategorical):
        """Of all the probabilities but one."""
        log_probs = self.natural(distribution)[0]
        return (log_probs.shape[-1] - 1) * math.log(self.total_count) - log_probs.sum(-1)

    def mean_inside(self, mean):
        total = mean[0].sum(-1) / self.total_count
        return ((mean[0] > 0).all(-1) & ((total - 1).abs() < 1e-6),)


@dataclass(frozen=True, eq=False)
class OneHotCategoricalFamily(MultinomialFamily):
    """OneHotCategorical(probs): a Multinomial of one trial."""

    distribution = OneHotCategorical

    @classmethod
    def of(cls, distribution: OneHotCategorical, draws: bool = True):
        return cls()

    def from_natural(self, natural):
        return OneHotCategorical(logits=natural[0])


@dataclass(frozen=True, eq=False)
class CategoricalFamily(MultinomialFamily):
    """Categorical(probs): the class that a Multinomial of one trial has its one in."""

    distribution = Categorical
    classes: int = 0

    @classmethod
    def of(cls, distribution: Categorical, draws: bool = True):
        return cls(classes=distribution.param_shape[-1])

    def from_natural(self, natural):
        return Categorical(logits=natural[0])

    def statistic(self, x):
        return (torch.nn.functional.one_hot(x, self.classes).double(),)


def logits_of(distribution: Bernoulli | Binomial) -> Tensor:
    """The logits as given, or those of the probabilities: ±∞ at 0 and 1, where torch clamps."""
    return (
        distribution.logits
        if _parametrisation(distribution) == "logits"
        else torch.logit(distribution.probs)
    )


def _parametrisation(distribution: Distribution) -> str:
    """The one of two parameters that a distribution was made with: torch caches the other."""
    return next(name for name in distribution.__dict__ if name in ("probs", "logits"))

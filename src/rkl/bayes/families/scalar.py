"""Families whose components are numbers: one law, one number each."""

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import (
    Bernoulli,
    Beta,
    Binomial,
    Distribution,
    Exponential,
    Gamma,
    InverseGamma,
    Normal,
    Poisson,
)
from torch.nn.functional import softplus

from rkl.bayes.families.base import ExponentialFamily, Fixed, fixed
from rkl.bayes.families.special import digamma_inverse, exp_gap, log_gap, shape_of_gap, trigamma


@dataclass(frozen=True, eq=False)
class NormalFamily(ExponentialFamily):
    """Normal(loc, scale): T = (x − o, (x − o)²) about an origin o, η = (loc − o, −½) / scale²."""

    law = Normal
    events = (0, 0)
    names = ("loc / scale²", "−1 / (2 scale²)")
    mean_names = ("E x", "E x²")
    parameters = ("loc", "scale")
    origin: Fixed = 0.0

    def about(self, law: Normal):
        return dataclasses.replace(self, origin=law.loc)

    def natural(self, law: Normal):
        precision = 1 / (law.scale * law.scale)
        return (law.loc - self.origin) * precision, -precision / 2

    def from_natural(self, natural):
        loc, variance = self._moments(natural)
        return self.law(loc + self.origin, variance.sqrt())

    def statistic(self, x):
        return x - self.origin, (x - self.origin).square()

    def log_partition(self, natural):
        loc, variance = self._moments(natural)
        return loc * natural[0] / 2 + (2 * math.pi * variance).log() / 2

    def mean(self, natural):
        loc, variance = self._moments(natural)
        return loc, loc * loc + variance

    def from_mean(self, mean):
        self.check_mean(mean)
        precision = 1 / (mean[1] - mean[0] * mean[0])
        return mean[0] * precision, -precision / 2

    def kl(self, p, q):
        (loc_p, variance_p), (loc_q, variance_q) = self._moments(p), self._moments(q)
        shift = loc_p - loc_q
        excess = (variance_p - variance_q) / variance_q
        return (log_gap(excess) + shift * shift / variance_q) / 2

    def log_fisher(self, law: Normal):
        return math.log(2) - 4 * law.scale.log()

    def inside(self, natural):
        return natural[0].isfinite(), natural[1].isfinite() & (natural[1] < 0)

    def mean_inside(self, mean):
        first, second = mean
        return first.isfinite(), second.isfinite() & (second > first * first)

    def _moments(self, natural):
        variance = -0.5 / natural[1]
        return natural[0] * variance, variance


@dataclass(frozen=True, eq=False)
class BernoulliFamily(ExponentialFamily):
    """Bernoulli(probs): T = x, η = log(probs / (1 − probs))."""

    law = Bernoulli
    events = (0,)
    names = ("logit",)
    mean_names = ("E x",)
    parameters = ("probs",)

    @property
    def trials(self) -> Fixed:
        """How often the coin is thrown."""
        return 1.0

    def natural(self, law: Bernoulli | Binomial):
        return (logits_of(law),)

    def from_natural(self, natural):
        return Bernoulli(logits=natural[0])

    def statistic(self, x):
        return (x,)

    def log_partition(self, natural):
        return self.trials * softplus(natural[0])

    def mean(self, natural):
        return (self.trials * torch.sigmoid(natural[0]),)

    def from_mean(self, mean):
        self.check_mean(mean)
        return ((mean[0] / (self.trials - mean[0])).log(),)

    def kl(self, p, q):
        return self.trials * bernoulli_kl(p[0], q[0])

    def log_fisher(self, law: Bernoulli | Binomial):
        logit = logits_of(law)
        return softplus(logit) + softplus(-logit) + math.log(self.trials)

    def mean_inside(self, mean):
        return ((mean[0] > 0) & (mean[0] < self.trials),)


@dataclass(frozen=True, eq=False)
class BinomialFamily(BernoulliFamily):
    """Binomial(total_count, probs) of a known total_count: T = x, η = logit."""

    law = Binomial
    total_count: Fixed = 1.0

    @property
    def trials(self):
        return self.total_count

    @classmethod
    def of(cls, law: Binomial, draws=True):
        why = "the support of a Binomial of unknown total_count moves with it"
        return cls(fixed("total_count", law.total_count, draws, why))

    def from_natural(self, natural):
        return Binomial(torch.as_tensor(self.total_count), logits=natural[0])

    def log_fisher(self, law: Binomial):
        logit = logits_of(law)
        return softplus(logit) + softplus(-logit) + law.total_count.log()


@dataclass(frozen=True, eq=False)
class PoissonFamily(ExponentialFamily):
    """Poisson(rate): T = x, η = log rate."""

    law = Poisson
    events = (0,)
    names = ("log rate",)
    mean_names = ("E x",)
    parameters = ("rate",)

    def natural(self, law: Poisson):
        return (law.rate.log(),)

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
        return p[0].exp() * exp_gap(q[0] - p[0])

    def log_fisher(self, law: Poisson):
        return -law.rate.log()

    def mean_inside(self, mean):
        return ((mean[0] > 0) & mean[0].isfinite(),)


@dataclass(frozen=True, eq=False)
class ExponentialDistributionFamily(ExponentialFamily):
    """Exponential(rate): T = x, η = −rate."""

    law = Exponential
    events = (0,)
    names = ("−rate",)
    mean_names = ("E x",)
    parameters = ("rate",)

    def natural(self, law: Exponential):
        return (-law.rate,)

    def from_natural(self, natural):
        return Exponential(-natural[0])

    def statistic(self, x):
        return (x,)

    def log_partition(self, natural):
        return -(-natural[0]).log()

    def mean(self, natural):
        return (-1 / natural[0],)

    def from_mean(self, mean):
        self.check_mean(mean)
        return (-1 / mean[0],)

    def kl(self, p, q):
        return log_gap((q[0] - p[0]) / p[0])

    def log_fisher(self, law: Exponential):
        return -2 * law.rate.log()

    def inside(self, natural):
        return (natural[0].isfinite() & (natural[0] < 0),)

    def mean_inside(self, mean):
        return ((mean[0] > 0) & mean[0].isfinite(),)


@dataclass(frozen=True, eq=False)
class GammaFamily(ExponentialFamily):
    """Gamma(concentration, rate): T = (log x, x), η = (concentration, −rate), h = 1/x."""

    law = Gamma
    events = (0, 0)
    names = ("concentration", "−rate")
    mean_names = ("E log x", "E x")
    parameters = ("concentration", "rate")

    def natural(self, law: Gamma | InverseGamma):
        return law.concentration, -law.rate

    def from_natural(self, natural):
        return self.law(natural[0], -natural[1])

    def statistic(self, x):
        return x.log(), x

    def log_partition(self, natural):
        shape, rate = natural[0], -natural[1]
        return torch.lgamma(shape) - shape * rate.log()

    def mean(self, natural):
        shape, rate = natural[0], -natural[1]
        return torch.digamma(shape) - rate.log(), shape / rate

    def from_mean(self, mean):
        self.check_mean(mean)
        shape = shape_of_gap(mean[1].log() - mean[0])
        return shape, -shape / mean[1]

    def log_fisher(self, law: Gamma | InverseGamma):
        a = law.concentration
        return (a * trigamma(a) - 1).log() - 2 * law.rate.log()

    def inside(self, natural):
        shape, rate = natural[0], -natural[1]
        return shape.isfinite() & (shape > 0), rate.isfinite() & (rate > 0)

    def mean_inside(self, mean):
        positive = mean[1].isfinite() & (mean[1] > 0)
        return mean[0] < mean[1].log(), positive


@dataclass(frozen=True, eq=False)
class InverseGammaFamily(GammaFamily):
    """InverseGamma(concentration, rate): 1/x is Gamma, T = (−log x, 1/x)."""

    law = InverseGamma
    mean_names = ("−E log x", "E 1/x")

    def statistic(self, x):
        return -x.log(), 1 / x


@dataclass(frozen=True, eq=False)
class BetaFamily(ExponentialFamily):
    """Beta(concentration1, concentration0): T = (log x, log(1 − x)), η = the concentrations."""

    law = Beta
    events = (0, 0)
    names = ("concentration1", "concentration0")
    mean_names = ("E log x", "E log(1 − x)")
    parameters = ("concentration1", "concentration0")

    def natural(self, law: Beta):
        return law.concentration1, law.concentration0

    def from_natural(self, natural):
        return Beta(natural[0], natural[1])

    def statistic(self, x):
        return x.log(), torch.log1p(-x)

    def log_partition(self, natural):
        return dirichlet_partition(torch.stack(torch.broadcast_tensors(*natural), -1))

    def mean(self, natural):
        total = torch.digamma(natural[0] + natural[1])
        return torch.digamma(natural[0]) - total, torch.digamma(natural[1]) - total

    def start(self, mean):
        return dirichlet_start(torch.stack(mean, -1)).unbind(-1)

    def newton(self, natural, gap):
        step = dirichlet_newton(torch.stack(natural, -1), torch.stack(gap, -1))
        return step.unbind(-1)

    def log_fisher(self, law: Beta):
        a, b = law.concentration1, law.concentration0
        return dirichlet_log_fisher(torch.stack(torch.broadcast_tensors(a, b), -1))

    def inside(self, natural):
        return tuple(x.isfinite() & (x > 0) for x in natural)

    def mean_inside(self, mean):
        good = torch.logaddexp(*mean) < 0
        return tuple(x.isfinite() & good for x in mean)


def bernoulli_kl(p: Tensor, q: Tensor) -> Tensor:
    """KL between coins of these logits; infinite logits are coins that always fall alike."""
    far = torch.sigmoid(p) * (softplus(-q) - softplus(-p))
    return far + torch.sigmoid(-p) * (softplus(q) - softplus(p))


def logits_of(law: Distribution) -> Tensor:
    """The logits as given, or those of the probabilities: ±∞ at 0 and 1, where torch clamps."""
    given = law.__dict__
    if "logits" in given and ("probs" not in given or list(given).index("logits") == 0):
        return given["logits"]
    return torch.logit(given["probs"])


def dirichlet_partition(a: Tensor) -> Tensor:
    """Σ log Γ(a) − log Γ(Σ a)."""
    return torch.lgamma(a).sum(-1) - torch.lgamma(a.sum(-1))


def dirichlet_start(m: Tensor) -> Tensor:
    """Exact where the concentrations are large, and where they are small."""
    total = (m.shape[-1] - 1) / (-2 * m.logsumexp(-1, keepdim=True))
    return digamma_inverse(m + torch.digamma(total))


def dirichlet_newton(a: Tensor, gap: Tensor) -> Tensor:
    """The Newton step, ∇²A being diagonal less a constant.

    Source: Minka (2000), "Estimating a Dirichlet distribution", eqs. (15) to (18).
    """
    weight = 1 / trigamma(a)
    scale = 1 / trigamma(a.sum(-1, keepdim=True)) - weight.sum(-1, keepdim=True)
    return weight * (gap + (weight * gap).sum(-1, keepdim=True) / scale)


def dirichlet_log_fisher(a: Tensor) -> Tensor:
    """Log det of ∇²A, by the determinant lemma."""
    own = trigamma(a)
    return own.log().sum(-1) + torch.log1p(-trigamma(a.sum(-1)) * (1 / own).sum(-1))

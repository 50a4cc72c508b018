"""Gamma and its kin: Exponential, Laplace, InverseGamma, Wishart, Beta, Dirichlet."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import (
    Beta,
    Dirichlet,
    Exponential,
    Gamma,
    InverseGamma,
    Laplace,
    Wishart,
)

from rkl.bayes.families.base import ExponentialFamily, Fixed, fixed_value
from rkl.bayes.families.matrices import excess_matrix, inverse, log_det, positive_definite
from rkl.bayes.families.special import (
    digamma_inverse,
    lgamma_gap,
    log_gap,
    shape_of_gap,
    trigamma,
    trigamma_gap,
)


@dataclass(frozen=True, eq=False)
class ExponentialLawFamily(ExponentialFamily):
    """Exponential(rate): T = x, η = −rate."""

    distribution = Exponential
    events = (0,)
    names = ("−rate",)
    mean_names = ("E x",)
    parameters = ("rate",)

    def natural(self, distribution: Exponential):
        return (-distribution.rate,)

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

    def log_fisher(self, distribution: Exponential):
        return -2 * distribution.rate.log()

    def inside(self, natural):
        return (natural[0].isfinite() & (natural[0] < 0),)

    def mean_inside(self, mean):
        return (mean[0].isfinite() & (mean[0] > 0),)


@dataclass(frozen=True, eq=False)
class LaplaceFamily(ExponentialLawFamily):
    """Laplace(loc, scale) of a known loc: |x − loc| is Exponential(1 / scale)."""

    distribution = Laplace
    names = ("−1 / scale",)
    mean_names = ("E |x − loc|",)
    parameters = ("scale",)
    loc: Fixed = 0.0

    @classmethod
    def of(cls, distribution: Laplace, draws: bool = True):
        loc = fixed_value(distribution.loc, draws)
        return None if loc is None else cls(loc)

    def natural(self, distribution: Laplace):
        return (-1 / distribution.scale,)

    def from_natural(self, natural):
        return Laplace(torch.zeros_like(natural[0]) + self.loc, -1 / natural[0])

    def statistic(self, x):
        return ((x - self.loc).abs(),)

    def log_fisher(self, distribution: Laplace):
        return -2 * distribution.scale.log()


@dataclass(frozen=True, eq=False)
class GammaFamily(ExponentialFamily):
    """Gamma(concentration, rate): T = (log x, x), η = (concentration, −rate), h = 1/x."""

    distribution = Gamma
    events = (0, 0)
    names = ("concentration", "−rate")
    mean_names = ("E log x", "E x")
    parameters = ("concentration", "rate")

    def natural(self, distribution: Gamma | InverseGamma):
        return distribution.concentration, -distribution.rate

    def from_natural(self, natural):
        return self.distribution(natural[0], -natural[1])

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

    def kl(self, p, q):
        excess = (q[1] - p[1]) / p[1]
        rates = p[0] * log_gap(excess) - (q[0] - p[0]) * torch.log1p(excess)
        return lgamma_gap(q[0], p[0]) + rates

    def log_fisher(self, distribution: Gamma | InverseGamma):
        shape = distribution.concentration
        return (shape * trigamma_gap(shape)).log() - 2 * distribution.rate.log()

    def inside(self, natural):
        shape, rate = natural[0], -natural[1]
        return shape.isfinite() & (shape > 0), rate.isfinite() & (rate > 0)

    def mean_inside(self, mean):
        positive = mean[1].isfinite() & (mean[1] > 0)
        return mean[0].isfinite() & (mean[0] < mean[1].log()), positive


@dataclass(frozen=True, eq=False)
class InverseGammaFamily(GammaFamily):
    """InverseGamma(concentration, rate): 1/x is Gamma(concentration, rate)."""

    distribution = InverseGamma
    mean_names = ("−E log x", "E 1/x")

    def statistic(self, x):
        return super().statistic(1 / x)


@dataclass(frozen=True, eq=False)
class WishartFamily(ExponentialFamily):
    """Wishart(df, covariance_matrix V): T = (log det X, X), η = (df / 2, −½ V⁻¹).

    h = (det X)^(−(d + 1)/2), and A = log Γ_d(df / 2) − (df / 2) log det ½V⁻¹.
    """

    distribution = Wishart
    events = (0, 2)
    names = ("df / 2", "−½ precision")
    mean_names = ("E log det X", "E X")
    parameters = ("df", "covariance_matrix")

    def natural(self, distribution: Wishart):
        return distribution.df / 2, -distribution.precision_matrix / 2

    def from_natural(self, natural):
        return Wishart(2 * natural[0], precision_matrix=-2 * natural[1])

    def statistic(self, x):
        return log_det(x), x

    def log_partition(self, natural):
        size = natural[1].shape[-1]
        volume = torch.special.multigammaln(natural[0], size)
        return volume - natural[0] * log_det(-natural[1])

    def mean(self, natural):
        digamma = torch.digamma(_shapes(natural)).sum(-1)
        scale = inverse(-natural[1])
        return digamma - log_det(-natural[1]), natural[0][..., None, None] * scale

    def from_mean(self, mean):
        self.check_mean(mean)
        shape = shape_of_gap(log_det(mean[1]) - mean[0], mean[1].shape[-1])
        return shape, -shape[..., None, None] * inverse(mean[1])

    def kl(self, p, q):
        trace, log_ratio = excess_matrix(p[1], q[1])
        scales = p[0] * (trace - log_ratio) - (q[0] - p[0]) * log_ratio
        return lgamma_gap(_shapes(q), _shapes(p)).sum(-1) + scales

    def log_fisher(self, distribution: Wishart):
        """Of df and the lower triangle of V."""
        natural, size = self.natural(distribution), distribution.event_shape[-1]
        shapes, df = _shapes(natural), distribution.df.unsqueeze(-1)
        halves = df / 2 - shapes
        of_df = (trigamma_gap(shapes) + 2 * halves / (shapes * df)).sum(-1) / 4
        scales = (size + 1) * log_det(distribution.precision_matrix) - size * math.log(2)
        return of_df.log() + size * (size + 1) / 2 * distribution.df.log() + scales

    def inside(self, natural):
        large = natural[0] > (natural[1].shape[-1] - 1) / 2
        return natural[0].isfinite() & large, positive_definite(-natural[1])

    def mean_inside(self, mean):
        good = positive_definite(mean[1])
        eye = torch.eye(mean[1].shape[-1], dtype=mean[1].dtype, device=mean[1].device)
        most = log_det(torch.where(good[..., None, None], mean[1], eye))
        return mean[0].isfinite() & (mean[0] < most), good


def _shapes(natural):
    """df/2 − i/2 of i below the size [*batch, size], the arguments of the Γ in Γ_d."""
    shape, size = natural[0], natural[1].shape[-1]
    return shape.unsqueeze(-1) - torch.arange(size, dtype=shape.dtype, device=shape.device) / 2


@dataclass(frozen=True, eq=False)
class DirichletFamily(ExponentialFamily):
    """Dirichlet(concentration): T = log x, η = concentration, h = Π 1/x."""

    distribution = Dirichlet
    events = (1,)
    names = ("concentration",)
    mean_names = ("E log x",)
    parameters = ("concentration",)

    def natural(self, distribution: Dirichlet):
        return (distribution.concentration,)

    def from_natural(self, natural):
        return Dirichlet(natural[0])

    def statistic(self, x):
        return (x.log(),)

    def log_partition(self, natural):
        return torch.lgamma(natural[0]).sum(-1) - torch.lgamma(natural[0].sum(-1))

    def mean(self, natural):
        return (torch.digamma(natural[0]) - torch.digamma(natural[0].sum(-1, keepdim=True)),)

    def start(self, mean):
        """Right where the concentrations are large, and where they are small."""
        total = (mean[0].shape[-1] - 1) / (-2 * mean[0].logsumexp(-1, keepdim=True))
        return (digamma_inverse(mean[0] + torch.digamma(total)),)

    def newton(self, natural, gap):
        """∇²A is diagonal less a constant: Minka (2000), eqs. (15) to (18)."""
        weight = 1 / trigamma(natural[0])
        total = 1 / trigamma(natural[0].sum(-1, keepdim=True)) - weight.sum(-1, keepdim=True)
        return (weight * (gap[0] + (weight * gap[0]).sum(-1, keepdim=True) / total),)

    def kl(self, p, q):
        return lgamma_gap(q[0], p[0]).sum(-1) - lgamma_gap(q[0].sum(-1), p[0].sum(-1))

    def log_fisher(self, distribution: Dirichlet):
        information, total = (
            trigamma(distribution.concentration),
            trigamma(distribution.concentration.sum(-1)),
        )
        return information.log().sum(-1) + torch.log1p(-total * (1 / information).sum(-1))

    def inside(self, natural):
        return ((natural[0].isfinite() & (natural[0] > 0)).all(-1),)

    def mean_inside(self, mean):
        return (mean[0].isfinite().all(-1) & (mean[0].logsumexp(-1) < 0),)


@dataclass(frozen=True, eq=False)
class BetaFamily(ExponentialFamily):
    """Beta(concentration1, concentration0): (x, 1 − x) is Dirichlet of these."""

    distribution = Beta
    events = (0, 0)
    names = ("concentration1", "concentration0")
    mean_names = ("E log x", "E log(1 − x)")
    parameters = ("concentration1", "concentration0")

    def natural(self, distribution: Beta):
        return distribution.concentration1, distribution.concentration0

    def from_natural(self, natural):
        return Beta(natural[0], natural[1])

    def statistic(self, x):
        return x.log(), torch.log1p(-x)

    def log_partition(self, natural):
        return _DIRICHLET.log_partition(_pair(natural))

    def mean(self, natural):
        return _DIRICHLET.mean(_pair(natural))[0].unbind(-1)

    def from_mean(self, mean):
        self.check_mean(mean)
        return _DIRICHLET.from_mean(_pair(mean))[0].unbind(-1)

    def kl(self, p, q):
        return _DIRICHLET.kl(_pair(p), _pair(q))

    def log_fisher(self, distribution: Beta):
        return _DIRICHLET.log_fisher(Dirichlet(_pair(self.natural(distribution))[0]))

    def inside(self, natural):
        return tuple(x.isfinite() & (x > 0) for x in natural)

    def mean_inside(self, mean):
        good = torch.logaddexp(*mean) < 0
        return tuple(x.isfinite() & good for x in mean)


_DIRICHLET = DirichletFamily()


def _pair(components: tuple[Tensor, ...]) -> tuple[Tensor]:
    return (torch.stack(torch.broadcast_tensors(*components), -1),)

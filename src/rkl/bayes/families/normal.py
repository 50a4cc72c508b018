"""Normal and its kin: LogNormal, MultivariateNormal, and VonMises on the circle."""

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import LogNormal, MultivariateNormal, Normal, VonMises

from rkl.bayes.families.base import ExponentialFamily, Fixed, Natural, Terms
from rkl.bayes.families.matrices import excess_matrix, inverse, log_det, positive_definite, times
from rkl.bayes.families.special import log_gap


@dataclass(frozen=True, eq=False)
class NormalFamily(ExponentialFamily):
    """Normal(loc, scale): T = (x − o, (x − o)²) about an origin o, η = (loc − o, −½) / scale²."""

    distribution = Normal
    events = (0, 0)
    names = ("loc / scale²", "−1 / (2 scale²)")
    mean_names = ("E x", "E x²")
    parameters = ("loc", "scale")
    origin: Fixed = 0.0

    def about(self, distribution: Normal | LogNormal):
        return dataclasses.replace(self, origin=distribution.loc)

    def natural(self, distribution: Normal | LogNormal):
        precision = 1 / (distribution.scale * distribution.scale)
        return (distribution.loc - self.origin) * precision, -precision / 2

    def from_natural(self, natural):
        loc, variance = _moments(natural)
        return self.distribution(loc + self.origin, variance.sqrt())

    def statistic(self, x):
        x = x - self.origin
        return x, x * x

    def log_partition(self, natural):
        loc, variance = _moments(natural)
        return loc * natural[0] / 2 + (2 * math.pi * variance).log() / 2

    def mean(self, natural):
        loc, variance = _moments(natural)
        return loc, loc * loc + variance

    def from_mean(self, mean):
        self.check_mean(mean)
        precision = 1 / (mean[1] - mean[0] * mean[0])
        return mean[0] * precision, -precision / 2

    def kl(self, p, q):
        (loc_p, variance_p), (loc_q, variance_q) = _moments(p), _moments(q)
        shift = loc_p - loc_q
        excess = (variance_p - variance_q) / variance_q
        return (log_gap(excess) + shift * shift / variance_q) / 2

    def terms(self, distribution: Normal | LogNormal, reference: Natural) -> Terms:
        """One logarithm and one division a draw; the KLs to absolute precision."""
        loc_0, variance_0 = _moments(reference)
        precision_0 = -2 * reference[1]
        loc, variance = distribution.loc - self.origin, distribution.scale * distribution.scale
        precision = 1 / variance
        ratio = precision * variance_0
        log_ratio, square = ratio.log(), (loc - loc_0).square()
        return Terms(
            natural=(loc * precision, -precision / 2),
            mean=(loc, loc * loc + variance),
            from_reference=(ratio - 1 - log_ratio + square * precision) / 2,
            to_reference=(variance * precision_0 - 1 + log_ratio + square * precision_0) / 2,
        )

    def log_fisher(self, distribution: Normal | LogNormal):
        return math.log(2) - 4 * distribution.scale.log()

    def inside(self, natural):
        return natural[0].isfinite(), natural[1].isfinite() & (natural[1] < 0)

    def mean_inside(self, mean):
        first, second = mean
        return first.isfinite(), second.isfinite() & (second > first * first)


def _moments(natural: Natural) -> tuple[Tensor, Tensor]:
    variance = -0.5 / natural[1]
    return natural[0] * variance, variance


@dataclass(frozen=True, eq=False)
class LogNormalFamily(NormalFamily):
    """LogNormal(loc, scale): log x is Normal(loc, scale)."""

    distribution = LogNormal
    mean_names = ("E log x", "E log² x")

    def statistic(self, x):
        return super().statistic(x.log())


@dataclass(frozen=True, eq=False)
class MultivariateNormalFamily(ExponentialFamily):
    """MultivariateNormal(loc, covariance_matrix Σ): T = (x − o, (x − o)(x − o)ᵀ), o an origin.

    η = (Σ⁻¹ (loc − o), −½ Σ⁻¹).
    """

    distribution = MultivariateNormal
    events = (1, 2)
    names = ("precision · loc", "−½ precision")
    mean_names = ("E x", "E x xᵀ")
    parameters = ("loc", "covariance_matrix")
    origin: Fixed = 0.0

    def about(self, distribution: MultivariateNormal):
        return dataclasses.replace(self, origin=distribution.loc)

    def natural(self, distribution: MultivariateNormal):
        precision = distribution.precision_matrix
        return times(precision, distribution.loc - self.origin), -precision / 2

    def from_natural(self, natural):
        return MultivariateNormal(_loc(natural) + self.origin, precision_matrix=-2 * natural[1])

    def statistic(self, x):
        x = x - self.origin
        return x, _square(x)

    def log_partition(self, natural):
        quadratic = (natural[0] * _loc(natural)).sum(-1) / 2
        return quadratic - log_det(-natural[1] / math.pi) / 2

    def mean(self, natural):
        loc = _loc(natural)
        return loc, inverse(-2 * natural[1]) + _square(loc)

    def from_mean(self, mean):
        self.check_mean(mean)
        precision = inverse(mean[1] - _square(mean[0]))
        return times(precision, mean[0]), -precision / 2

    def kl(self, p, q):
        shift = _loc(p) - _loc(q)
        distance = -2 * (shift * times(q[1], shift)).sum(-1)
        trace, log_ratio = excess_matrix(p[1], q[1])
        return (trace - log_ratio + distance) / 2

    def log_fisher(self, distribution: MultivariateNormal):
        """Of loc and the lower triangle of the covariance: (d + 2) log det Σ⁻¹ − d log 2."""
        size = distribution.loc.shape[-1]
        return (size + 2) * log_det(distribution.precision_matrix) - size * math.log(2)

    def inside(self, natural):
        return natural[0].isfinite().all(-1), positive_definite(-natural[1])

    def mean_inside(self, mean):
        return mean[0].isfinite().all(-1), positive_definite(mean[1] - _square(mean[0]))


def _loc(natural: Natural) -> Tensor:
    return torch.linalg.solve(-2 * natural[1], natural[0].unsqueeze(-1)).squeeze(-1)


def _square(x: Tensor) -> Tensor:
    return x.unsqueeze(-1) * x.unsqueeze(-2)


@dataclass(frozen=True, eq=False)
class VonMisesFamily(ExponentialFamily):
    """VonMises(loc, concentration κ): T = (cos x, sin x), η = κ (cos loc, sin loc).

    A = log I₀(κ), with the mean resultant length R = I₁(κ)/I₀(κ).

    Source: Mardia and Jupp (2000), section 3.5.4.
    """

    distribution = VonMises
    events = (0, 0)
    names = ("concentration · cos loc", "concentration · sin loc")
    mean_names = ("E cos x", "E sin x")
    parameters = ("loc", "concentration")

    def natural(self, distribution: VonMises):
        return (
            distribution.concentration * distribution.loc.cos(),
            distribution.concentration * distribution.loc.sin(),
        )

    def from_natural(self, natural):
        return VonMises(torch.atan2(natural[1], natural[0]), torch.hypot(*natural))

    def statistic(self, x):
        return x.cos(), x.sin()

    def log_partition(self, natural):
        kappa = torch.hypot(*natural)
        return torch.special.i0e(kappa).log() + kappa

    def mean(self, natural):
        kappa = torch.hypot(*natural)
        scale = torch.where(kappa > 0, _resultant(kappa) / kappa, 0.5)
        return scale * natural[0], scale * natural[1]

    def from_mean(self, mean):
        self.check_mean(mean)
        length = torch.hypot(*mean)
        square = length * length
        scale = (2 - square) / (1 - square)  # κ / R; Banerjee et al. (2005), eq. (4.4)
        for _ in range(10):
            kappa = scale * length
            slope = 1 - _resultant(kappa) * (_resultant(kappa) + 1 / kappa)
            change = (_resultant(kappa) - length) / (slope * length)
            # Where κ is too small for a slope, the start 2R is exact.
            scale = scale - torch.where(kappa > 1e-5, change, 0.0)
        return scale * mean[0], scale * mean[1]

    def kl(self, p, q):
        kappa_p, kappa_q = torch.hypot(*p), torch.hypot(*q)
        excess = torch.special.i0e(kappa_q).log() - torch.special.i0e(kappa_p).log()
        length = _resultant(kappa_p)
        apart = sum(
            (_part(x, kappa_p) - _part(y, kappa_q)).square() for x, y in zip(p, q, strict=True)
        )
        return excess + (kappa_q - kappa_p) * (1 - length) + length * kappa_q * apart / 2

    def log_fisher(self, distribution: VonMises):
        kappa = distribution.concentration
        length = _resultant(kappa)
        return (kappa * length).log() + (1 - length * (length + 1 / kappa)).log()

    def mean_inside(self, mean):
        good = torch.hypot(*mean) < 1
        return good, good


def _resultant(kappa: Tensor) -> Tensor:
    return torch.special.i1e(kappa) / torch.special.i0e(kappa)


def _part(component: Tensor, kappa: Tensor) -> Tensor:
    """The cosine or sine of loc; 0 for the uniform distribution, which has none."""
    return torch.where(kappa > 0, component / kappa, 0.0)

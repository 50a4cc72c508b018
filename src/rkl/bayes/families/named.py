"""Distributions that torch lacks, or whose log-density fails there far out, under their names.

Their acts are found numerically. Each log-density is finite, with two derivatives, wherever its
logarithm can be held; parameters are called as NumPyro calls them.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Binomial, Distribution, Gamma, NegativeBinomial, Poisson
from torch.distributions import constraints as C
from torch.distributions.utils import broadcast_all
from torch.nn.functional import logsigmoid

from rkl.divergences.base import broadcast_shape

__all__ = [
    "BetaBinomial",
    "GeneralizedPareto",
    "Gompertz",
    "HurdlePoisson",
    "Kumaraswamy",
    "NegativeBinomial2",
    "OrderedLogistic",
    "TruncatedNormal",
    "Weibull",
    "ZeroInflatedNegativeBinomial",
    "ZeroInflatedPoisson",
]
LARGEST = 300.0  # an exponent whose exponential, squared, can still be held


class _Named(Distribution):
    """Keeps parameters of one shape, in double precision where one of them is."""

    arg_constraints: dict[str, Any] = {}  # pyright: ignore

    def __init__(self, validate_args: bool | None = None, **parameters: Any):
        values = broadcast_all(*(_real(x) for x in parameters.values()))
        for name, value in zip(parameters, values, strict=True):
            setattr(self, name, value)
        super().__init__(values[0].shape, validate_args=validate_args)

    def _expand(self, sample_shape) -> torch.Size:
        return torch.Size(sample_shape) + self.batch_shape

    def _uniform(self, sample_shape) -> Tensor:
        first = getattr(self, next(iter(self.arg_constraints)))
        shape = self._expand(sample_shape)
        return torch.rand(shape, dtype=first.dtype).clamp(1e-16, 1 - 1e-16)


def _real(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and not x.is_floating_point() else x


def log1mexp(x: Tensor) -> Tensor:
    """log(1 − e^x) for x < 0, by the form that keeps its digits."""
    small = x > -math.log(2)
    near = (-torch.expm1(torch.where(small, x, -1.0))).log()
    return torch.where(small, near, torch.log1p(-torch.where(small, -1.0, x).exp()))


class Weibull(_Named):
    """Weibull, log p(x) = log(k/s) + (k − 1) log(x/s) − (x/s)^k."""

    scale: Tensor
    concentration: Tensor
    arg_constraints = {"scale": C.positive, "concentration": C.positive}
    support = C.positive  # pyright: ignore

    def __init__(self, scale, concentration, validate_args=None):
        super().__init__(validate_args, scale=scale, concentration=concentration)

    def log_prob(self, value):
        k, z = self.concentration, value.log() - self.scale.log()
        power = (k * z).clamp_max(LARGEST).exp()
        return k.log() - self.scale.log() + (k - 1) * z - power

    def sample(self, sample_shape=()):
        log_size = (-self._uniform(sample_shape).log()).log()
        return self.scale * (log_size / self.concentration).exp()


class Gompertz(_Named):
    """Gompertz, log p(x) = log(c r) + r x − c (e^(r x) − 1) on x > 0: a hazard c r e^(r x)."""

    concentration: Tensor
    rate: Tensor
    arg_constraints = {"concentration": C.positive, "rate": C.positive}
    support = C.positive  # pyright: ignore

    def __init__(self, concentration, rate, validate_args=None):
        super().__init__(validate_args, concentration=concentration, rate=rate)

    def log_prob(self, value):
        c, z = self.concentration, (self.rate * value).clamp_max(LARGEST)
        return c.log() + self.rate.log() + z - c * torch.expm1(z)

    def sample(self, sample_shape=()):
        hazard = -self._uniform(sample_shape).log()
        return torch.log1p(hazard / self.concentration) / self.rate


class Kumaraswamy(_Named):
    """Kumaraswamy, log p(x) = log(a b) + (a − 1) log x + (b − 1) log(1 − x^a) on (0, 1)."""

    concentration1: Tensor
    concentration0: Tensor
    arg_constraints = {"concentration1": C.positive, "concentration0": C.positive}
    support = C.unit_interval  # pyright: ignore

    def __init__(self, concentration1, concentration0, validate_args=None):
        super().__init__(
            validate_args, concentration1=concentration1, concentration0=concentration0
        )

    def log_prob(self, value):
        a, b, x = self.concentration1, self.concentration0, value.log()
        return a.log() + b.log() + (a - 1) * x + (b - 1) * log1mexp(a * x)

    def sample(self, sample_shape=()):
        tail = self._uniform(sample_shape).log() / self.concentration0
        return (log1mexp(tail) / self.concentration1).exp().clamp(1e-300, 1 - 2e-16)


class GeneralizedPareto(_Named):
    """Generalised Pareto, log p(x) = −log s − (1 + 1/ξ) log(1 + ξ z), z = (x − loc)/s."""

    loc: Tensor
    scale: Tensor
    concentration: Tensor
    arg_constraints = {"loc": C.real, "scale": C.positive, "concentration": C.real}

    def __init__(self, loc, scale, concentration, validate_args=None):
        super().__init__(validate_args, loc=loc, scale=scale, concentration=concentration)

    @property
    def support(self):
        if bool((self.concentration >= 0).all()):
            return C.greater_than(self.loc)
        end = torch.where(
            self.concentration < 0, self.loc - self.scale / self.concentration, math.inf
        )
        return C.interval(self.loc, end)

    def log_prob(self, value):
        xi, z = self.concentration, (value - self.loc) / self.scale
        small = xi.abs() < 1e-6
        safe = torch.where(small, 1.0, xi)
        log = torch.log1p((safe * z).clamp_min(-1.0))
        series = z - xi * (z.square() / 2 - z)  # (1 + 1/ξ) log(1 + ξ z) to first order
        return -self.scale.log() - torch.where(small, series, (1 + 1 / safe) * log)

    def sample(self, sample_shape=()):
        x, xi = -self._uniform(sample_shape).log(), self.concentration
        small = xi.abs() < 1e-6
        safe = torch.where(small, 1.0, xi)
        return self.loc + self.scale * torch.where(small, x, torch.expm1(safe * x) / safe)


class TruncatedNormal(_Named):
    """A normal distribution given that it lies between low and high, which are fixed."""

    loc: Tensor
    scale: Tensor
    arg_constraints = {"loc": C.real, "scale": C.positive}

    def __init__(self, loc, scale, low=-math.inf, high=math.inf, validate_args=None):
        self.low, self.high = (torch.as_tensor(x, dtype=torch.float64) for x in (low, high))
        if not bool((self.low < self.high).all()):
            raise ValueError(f"low must be below high; got {low} and {high}.")
        super().__init__(validate_args, loc=loc, scale=scale)

    @property
    def support(self):
        if bool(self.high.isinf().all()):
            return C.real if bool(self.low.isinf().all()) else C.greater_than(self.low)
        return (
            C.less_than(self.high) if self.low.isinf().all() else C.interval(self.low, self.high)
        )

    def _log_mass(self) -> Tensor:
        """log(Φ(b) − Φ(a)), on the side of 0 where both are small."""
        a, b = (
            torch.where(
                x.isinf(), x.sign() * 40.0, (x.clamp(-1e300, 1e300) - self.loc) / self.scale
            )
            for x in (self.low, self.high)
        )
        above = a + b > 0
        low, high = torch.where(above, -b, a), torch.where(above, -a, b)
        first, second = torch.special.log_ndtr(high), torch.special.log_ndtr(low)
        return first + log1mexp((second - first).clamp_max(-1e-300))

    def log_prob(self, value):
        z = (value - self.loc) / self.scale
        normal = -z.square() / 2 - self.scale.log() - math.log(2 * math.pi) / 2
        return normal - self._log_mass()

    def sample(self, sample_shape=()):
        a, b = ((x - self.loc) / self.scale for x in (self.low, self.high))
        flip = a > 0
        a, b = torch.where(flip, -b, a), torch.where(flip, -a, b)
        low, high = torch.special.ndtr(a), torch.special.ndtr(b)
        u = low + (high - low) * self._uniform(sample_shape)
        z = torch.special.ndtri(u.clamp(1e-300, 1 - 2e-16))
        value = self.loc + self.scale * torch.where(flip, -z, z)
        return torch.maximum(torch.minimum(value, self.high), self.low)


class NegativeBinomial2(_Named):
    """Negative binomial by its mean m and concentration φ; its variance is m + m²/φ."""

    _mean: Tensor
    concentration: Tensor
    arg_constraints = {"mean": C.positive, "concentration": C.positive}
    support = C.nonnegative_integer  # pyright: ignore

    def __init__(self, mean, concentration, validate_args=None):
        super().__init__(validate_args, _mean=mean, concentration=concentration)

    @property
    def mean(self):
        return self._mean

    def log_prob(self, value):
        m, phi = self._mean, self.concentration
        choose = torch.lgamma(value + phi) - torch.lgamma(phi) - torch.lgamma(value + 1)
        return choose - phi * torch.log1p(m / phi) - value * torch.log1p(phi / m)

    def sample(self, sample_shape=()):
        logits = self._mean.log() - self.concentration.log()
        distribution = NegativeBinomial(self.concentration, logits=logits, validate_args=False)
        return distribution.sample(torch.Size(sample_shape))

    def _uniform(self, sample_shape):
        return torch.rand(self._expand(sample_shape), dtype=self._mean.dtype)


class _ZeroInflated(_Named):
    """Counts that are 0 with probability ``gate``, and else those of another distribution."""

    gate: Tensor
    support = C.nonnegative_integer  # pyright: ignore

    @property
    def counts(self) -> Any:
        raise NotImplementedError

    def log_prob(self, value):
        count = self.counts.log_prob(value) + torch.log1p(-self.gate)
        zero = value == 0
        both = torch.logaddexp(torch.where(zero, count, 0.0), self.gate.log())
        return torch.where(zero, both, count)

    def sample(self, sample_shape=()):
        counted = self._uniform(sample_shape) > self.gate
        return self.counts.sample(torch.Size(sample_shape)) * counted


class ZeroInflatedPoisson(_ZeroInflated):
    """Poisson counts with additional zeros, of probability ``gate``."""

    rate: Tensor
    arg_constraints = {"gate": C.unit_interval, "rate": C.positive}

    def __init__(self, gate, rate, validate_args=None):
        super().__init__(validate_args, gate=gate, rate=rate)

    @property
    def counts(self):
        return Poisson(self.rate, validate_args=False)


class ZeroInflatedNegativeBinomial(_ZeroInflated):
    """Negative binomial counts of a mean and a concentration, with additional zeros."""

    _mean: Tensor
    concentration: Tensor
    arg_constraints = {"gate": C.unit_interval, "mean": C.positive, "concentration": C.positive}

    def __init__(self, gate, mean, concentration, validate_args=None):
        super().__init__(validate_args, gate=gate, _mean=mean, concentration=concentration)

    @property
    def mean(self):
        return self._mean

    @property
    def counts(self):
        return NegativeBinomial2(self._mean, self.concentration, validate_args=False)


class PoissonOrZero(_Named):
    """Poisson, with finite slopes where the rate is 0: a component that gives additional zeros."""

    rate: Tensor
    arg_constraints = {"rate": C.nonnegative}
    support = C.nonnegative_integer  # pyright: ignore

    def __init__(self, rate, validate_args=None):
        super().__init__(validate_args, rate=rate)

    def log_prob(self, value):
        none = self.rate == 0
        rate = torch.where(none, 1.0, self.rate)
        counts = value * rate.log() - rate - torch.lgamma(value + 1)
        zeros = torch.where(value == 0, 0.0, -math.inf) - self.rate
        return torch.where(none, zeros, counts)

    def sample(self, sample_shape=()):
        return torch.poisson(self.rate.expand(self._expand(sample_shape)))


class HurdlePoisson(_Named):
    """Zero with probability ``gate``, and else a Poisson count that is at least 1."""

    gate: Tensor
    rate: Tensor
    arg_constraints = {"gate": C.unit_interval, "rate": C.positive}
    support = C.nonnegative_integer  # pyright: ignore

    def __init__(self, gate, rate, validate_args=None):
        super().__init__(validate_args, gate=gate, rate=rate)

    def log_prob(self, value):
        count = value * self.rate.log() - self.rate - torch.lgamma(value + 1)
        positive = torch.log1p(-self.gate) + count - log1mexp(-self.rate)
        return torch.where(value == 0, self.gate.log(), positive)

    def sample(self, sample_shape=()):
        counted = self._uniform(sample_shape) > self.gate
        # the first arrival is before the end, and the others are Poisson after it
        first = -torch.log1p(self._uniform(sample_shape) * torch.expm1(-self.rate))
        count = 1 + torch.poisson((self.rate - first).clamp_min(0))
        return torch.where(counted, count, 0.0)


class BetaBinomial(_Named):
    """Binomial of a fixed number of trials, its probability drawn from a beta distribution."""

    concentration1: Tensor
    concentration0: Tensor
    arg_constraints = {"concentration1": C.positive, "concentration0": C.positive}

    def __init__(self, concentration1, concentration0, total_count=1, validate_args=None):
        self.total_count = torch.as_tensor(total_count, dtype=torch.float64)
        super().__init__(
            validate_args, concentration1=concentration1, concentration0=concentration0
        )

    @property
    def support(self):
        return C.integer_interval(0, self.total_count)

    def log_prob(self, value):
        n, a, b = self.total_count, self.concentration1, self.concentration0
        log = torch.lgamma
        choose = log(n + 1) - log(value + 1) - log(n - value + 1)
        beta = log(value + a) + log(n - value + b) - log(n + a + b)
        return choose + beta + log(a + b) - log(a) - log(b)

    def sample(self, sample_shape=()):
        shape = torch.Size(sample_shape)
        x, y = (Gamma(c, 1.0).sample(shape) for c in (self.concentration1, self.concentration0))
        return Binomial(self.total_count, x / (x + y), validate_args=False).sample()


class OrderedLogistic(Distribution):
    """Classes 0 to K − 1, P(y ≤ k) = 1 / (1 + exp(predictor − c_k)), of K − 1 cutpoints c."""

    arg_constraints = {"predictor": C.real, "cutpoints": C.real_vector}  # pyright: ignore

    def __init__(self, predictor, cutpoints, validate_args=None):
        self.predictor, self.cutpoints = predictor, cutpoints
        if bool((cutpoints.detach().diff(dim=-1) <= 0).any()):
            raise ValueError(f"cutpoints must rise; got {cutpoints.detach().tolist()!r:.80}.")
        shape = broadcast_shape(predictor.shape, cutpoints.shape[:-1])
        super().__init__(shape, validate_args=validate_args)

    @property
    def support(self):
        return C.integer_interval(0, self.cutpoints.shape[-1])

    def _log_probs(self) -> Tensor:
        """Log-probabilities of the classes [*batch, K]."""
        x = (self.cutpoints - self.predictor[..., None]).expand(*self.batch_shape, -1)
        between = logsigmoid(x[..., 1:]) + logsigmoid(-x[..., :-1]) + log1mexp(-x.diff(dim=-1))
        return torch.cat([logsigmoid(x[..., :1]), between, logsigmoid(-x[..., -1:])], -1)

    def log_prob(self, value):
        logs = self._log_probs()
        shape = broadcast_shape(value.shape, self.batch_shape)
        index = value.long().expand(shape)[..., None]
        return logs.expand(*shape, -1).gather(-1, index)[..., 0]

    def sample(self, sample_shape=()):
        shape = torch.Size(sample_shape)
        return torch.distributions.Categorical(logits=self._log_probs()).sample(shape).double()

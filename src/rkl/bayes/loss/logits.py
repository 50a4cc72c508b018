"""Distributions on the unit interval as those of the logit, which reaches both ends.

A divergence does not depend on the coordinate, but numbers do: next to 1 they stand 1e-16 apart,
and a Beta distribution with a concentration of 0.2 has 0.1 % of its mass nearer than that.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributions import (
    Beta,
    Distribution,
    Gamma,
    Independent,
    MixtureSameFamily,
    constraints,
)
from torch.nn.functional import logsigmoid

from rkl.bayes.families.named import Kumaraswamy
from rkl.bayes.families.special import log1mexp


class _OnLogits(Distribution):
    """The distribution of log x − log(1 − x) for an x with two concentrations."""

    support = constraints.real  # pyright: ignore
    arg_constraints: dict[str, Any] = {  # pyright: ignore
        "concentration1": constraints.positive,
        "concentration0": constraints.positive,
    }

    def __init__(self, law: Any):
        self.concentration1, self.concentration0 = law.concentration1, law.concentration0
        super().__init__(law.batch_shape, validate_args=False)

    def _uniform(self, sample_shape) -> Tensor:
        shape = self._extended_shape(sample_shape)
        return torch.rand(shape, dtype=self.concentration1.dtype).clamp_min(1e-300)


class BetaOnLogits(_OnLogits):
    """Beta by the logit u: log p(u) = −a log(1 + exp −u) − b log(1 + exp u) − log B(a, b)."""

    def log_prob(self, value):
        a, b = self.concentration1, self.concentration0
        log_beta = torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)
        return a * logsigmoid(value) + b * logsigmoid(-value) - log_beta

    def sample(self, sample_shape=()):
        return self._log_gamma(self.concentration1, sample_shape) - self._log_gamma(
            self.concentration0, sample_shape
        )

    def _log_gamma(self, shape: Tensor, sample_shape) -> Tensor:
        """Logarithms of Gamma(a) = Gamma(a + 1) U^(1/a), which underflow for no small a."""
        larger = Gamma(shape + 1, torch.ones_like(shape)).sample(sample_shape)
        return larger.log() + self._uniform(sample_shape).log() / shape


class KumaraswamyOnLogits(_OnLogits):
    """Kumaraswamy by the logit: log p = log(a b) + a log x + (b − 1) log(1 − x^a) + log(1 − x)."""

    def log_prob(self, value):
        a, b, log_x = self.concentration1, self.concentration0, logsigmoid(value)
        return a.log() + b.log() + a * log_x + (b - 1) * log1mexp(a * log_x) + logsigmoid(-value)

    def sample(self, sample_shape=()):
        log_tail = self._uniform(sample_shape).log() / self.concentration0  # of 1 − x^a
        log_x = log1mexp(log_tail) / self.concentration1
        return log_x - log1mexp(log_x)


class Halves(Distribution):
    """Equal mixtures of two distributions, so that nodes cover both."""

    arg_constraints = {}  # pyright: ignore

    def __init__(self, base_dist: Distribution, other: Distribution):
        self.base_dist, self.other = base_dist, other
        super().__init__(base_dist.batch_shape, base_dist.event_shape, validate_args=False)

    @property
    def support(self):
        return self.base_dist.support

    def log_prob(self, value):
        both = self.base_dist.log_prob(value), self.other.log_prob(value)
        return torch.logaddexp(*both) - torch.tensor(2.0).double().log()

    def sample(self, sample_shape=()):
        ones, others = self.base_dist.sample(sample_shape), self.other.sample(sample_shape)
        coins = torch.rand(ones.shape[: ones.ndim - len(self.event_shape)]) < 0.5
        return torch.where(coins.reshape(coins.shape + (1,) * len(self.event_shape)), ones, others)


def on_logits(law: Distribution) -> Distribution | None:
    """The distributions of the logits; None of distributions that this is not known of.

    >>> law = on_logits(Beta(torch.tensor(0.5), torch.tensor(0.25)))
    >>> law.log_prob(torch.tensor(400.0)) + 400.0 / 4  # beyond what single precision can hold
    tensor(-1.6571)
    """
    match law:
        case Beta():
            return BetaOnLogits(law)
        case Kumaraswamy():
            return KumaraswamyOnLogits(law)
        case Independent():
            inner = on_logits(law.base_dist)
            return inner and Independent(inner, law.reinterpreted_batch_ndims)
        case MixtureSameFamily():
            inner = on_logits(law.component_distribution)
            mixed: Any = law.mixture_distribution
            return inner and MixtureSameFamily(mixed, inner, validate_args=False)
        case Halves():
            one, other = on_logits(law.base_dist), on_logits(law.other)
            return Halves(one, other) if one and other else None
    return None

"""The law of a single draw, where a family makes laws of many."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution


def alone(law: Distribution, again: Callable[[], Distribution]) -> Distribution:
    """The law of batch shape [*batch] that a law of batch shape [1, *batch] is.

    Args:
        law: Of one draw.
        again: The law made once more, from parameters without the axis of the draws; a family
            that needs that axis fails, or makes another law.
    """
    wrapped = OfOneDraw(law)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        x = wrapped.sample()
        try:
            made = again()
            same = made.batch_shape == wrapped.batch_shape and made.event_shape == law.event_shape
            if same and torch.equal(made.log_prob(x), wrapped.log_prob(x)):
                return made
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
            pass
    return wrapped


class OfOneDraw(Distribution):
    """A law of batch shape [1, *batch], without its first axis."""

    arg_constraints = {}  # pyright: ignore

    def __init__(self, law: Distribution):
        self.law = law
        super().__init__(law.batch_shape[1:], law.event_shape, validate_args=False)

    @property
    def support(self):
        return self.law.support

    @property
    def has_rsample(self) -> bool:  # pyright: ignore
        return self.law.has_rsample

    @property
    def mean(self) -> Tensor:
        return self.law.mean[0]

    @property
    def mode(self) -> Tensor:
        return self.law.mode[0]

    @property
    def variance(self) -> Tensor:
        return self.law.variance[0]

    def sample(self, sample_shape=()) -> Tensor:
        return self.law.sample(sample_shape).squeeze(len(sample_shape))

    def rsample(self, sample_shape=()) -> Tensor:
        return self.law.rsample(sample_shape).squeeze(len(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        return self._on_values(self.law.log_prob, value)

    def cdf(self, value: Tensor) -> Tensor:
        return self._on_values(self.law.cdf, value)

    def icdf(self, value: Tensor) -> Tensor:
        return self._on_values(self.law.icdf, value)

    def entropy(self) -> Tensor:
        return self.law.entropy()[0]

    def _on_values(self, of: Callable[[Tensor], Any], value: Tensor) -> Tensor:
        """Of values [*sample, *batch, *event], or broadcast to these."""
        axes = len(self.batch_shape)
        lead = max(0, axes + len(self.event_shape) - value.ndim)
        value = value.reshape((1,) * lead + value.shape)
        place = value.ndim - axes - len(self.event_shape)
        return of(value.unsqueeze(place)).squeeze(place)

"""A flow over standardised events in the units of the user, and one with scaled latents."""

import copy
import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributions import Distribution, constraints

from rkl.checks import number
from rkl.flows.architectures.base import Latent
from rkl.flows.architectures.mixture import MixtureLatent


class Conditioned(nn.Module):
    """A flow of conditions scaled to -1 to 1 over the training range.

    Of conditions above 0 the logarithm is scaled.

    Args:
        flow: The flow of standardised conditions.
        low: Least value of each condition.
        high: Their greatest values.
    """

    low: Tensor
    high: Tensor

    def __init__(
        self,
        flow: nn.Module,
        low: Float[Tensor, " conditions"],
        high: Float[Tensor, " conditions"],
    ):
        super().__init__()
        self.flow = flow
        self.register_buffer("low", low)
        self.register_buffer("high", high)

    def forward(self, condition: Float[Tensor, "*batch conditions"]) -> Distribution:
        """The distribution of events, given the conditions in their own units."""
        return self.flow(self.standardise(condition))

    def standardise(
        self, condition: Float[Tensor, "*batch conditions"]
    ) -> Float[Tensor, "*batch conditions"]:
        """Conditions on the scale of the inner flow."""
        positive, tiny = self.low > 0, torch.finfo(condition.dtype).tiny
        low, high, at = (
            torch.where(positive, it.clamp_min(tiny).log(), it)
            for it in (self.low, self.high, condition)
        )
        half = (high - low) / 2
        return (at - (low + high) / 2) / torch.where(half > 0, half, 1.0)


class Scaled(nn.Module):
    """The flow of shift + scale · x, with x from another flow.

    Args:
        flow: The flow of standardised events.
        shift: Mean of the events.
        scale: Their standard deviation; its logarithm is in every log-density.
    """

    shift: Tensor
    scale: Tensor

    def __init__(
        self, flow: nn.Module, shift: Float[Tensor, "*event"], scale: Float[Tensor, "*event"]
    ):
        super().__init__()
        self.flow = flow
        self.register_buffer("shift", shift)
        self.register_buffer("scale", scale)

    def forward(self, *condition: Tensor) -> "ScaledLaw":
        """The distribution of events in the user's units, given the conditions."""
        return ScaledLaw(self.flow(*condition), self.shift, self.scale, self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the inner flow."""
        return next(self.flow.parameters()).dtype

    def standardise(self, value: Float[Tensor, "*batch_event"]) -> Float[Tensor, "*batch_event"]:
        """Standardised events, in the precision of the inner flow."""
        return ((value - self.shift) / self.scale).to(self.dtype)

    def restore(self, value: Float[Tensor, "*batch_event"]) -> Float[Tensor, "*batch_event"]:
        """Standardised events in the user's units."""
        return self.shift + self.scale * value


class ScaledLaw(Distribution):
    """The distribution of shift + scale · x, with x from another distribution."""

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012
    has_rsample = True

    def __init__(self, law: Any, shift: Tensor, scale: Tensor, dtype: torch.dtype):
        super().__init__(law.batch_shape, law.event_shape, validate_args=False)
        self.law, self.shift, self.scale, self.dtype = law, shift, scale, dtype
        self.log_scale = scale.log().sum()

    def around(self, law: Distribution) -> "ScaledLaw":
        """The same units about another distribution."""
        return ScaledLaw(law, self.shift, self.scale, self.dtype)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "ScaledLaw":
        return ScaledLaw(self.law.expand(batch_shape), self.shift, self.scale, self.dtype)

    @property
    def support(self) -> Any:
        """All events."""
        return constraints.independent(constraints.real, len(self.event_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        inner = (value - self.shift) / self.scale
        return self.law.log_prob(inner.to(self.dtype)) - self.log_scale

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        return self.shift + self.scale * self.law.rsample(sample_shape)

    def rsample_and_log_prob(self, shape: Any = ()) -> tuple[Tensor, Tensor]:
        """Events, differentiable in the parameters, and their log-density."""
        value, log_q = self.law.rsample_and_log_prob(shape)
        return self.shift + self.scale * value, log_q - self.log_scale


def latent(law: Distribution, temperature: float = 1.0, bound: float = math.inf) -> Distribution:
    """The distribution of a flow with its latents scaled or cut off: more precision, less recall.

    Args:
        law: Distribution that a flow returned.
        temperature: Standard deviation of the latents; below 1 the draws stay in the middle.
        bound: Bound of the latents, in their standard deviations.

    Raises:
        TypeError: The distribution is not that of a flow, or its latents include angles.

    >>> from rkl.flows import Coupling
    >>> law = latent(Coupling().build((2,))(), temperature=0.5)
    >>> torch.manual_seed(0) and round(law.sample((10000,)).std().item(), 2)
    0.5
    """
    number("temperature", temperature, above=0)
    if math.isnan(bound) or not bound > 0:
        raise ValueError(f"bound must be above 0; got {bound}.")
    anyone: Any = law
    if hasattr(law, "around"):  # another distribution, in other units
        return anyone.around(latent(anyone.law, temperature, bound))
    base = getattr(anyone, "base", None)
    if not isinstance(base, Distribution):
        raise TypeError(
            f"law must be what a flow with normal latents returns; got a {type(law).__name__}."
        )
    changed = copy.copy(anyone)
    if isinstance(base, MixtureLatent):
        changed.base = base.with_temperature(float(temperature), float(bound))
        return changed
    like = base.like if isinstance(base, Latent) else base.mean
    shape = base.batch_shape + base.event_shape
    changed.base = Latent(shape, len(base.event_shape), like, float(temperature), float(bound))
    return changed

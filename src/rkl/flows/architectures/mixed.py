"""A flow of angles beside numbers on the line, and flows of coordinates with bounds."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.distributions import Distribution, constraints
from torch.distributions.transforms import ComposeTransform, Transform

from rkl.flows.architectures.base import Architecture, draw
from rkl.flows.architectures.circular import wrap_angles
from rkl.flows.architectures.splines import check_sizes, imported_zuko

BOUND = 5.0  # of the splines; half of a period is as much


@dataclass(frozen=True)
class MixedSplines(Architecture):
    """Monotone rational-quadratic splines of coordinates some of which are angles.

    Each coordinate is bent given those before it, an angle with the period 2π, a number on the
    line within ± 5; numbers should be standardised.

    Source: Durkan et al. (2019), arXiv 1906.04032; Rezende et al. (2020), arXiv 2002.02428, for
    angles.

    Args:
        angles: Coordinates of the flattened event that are angles in radians; None for those of
            the target.
        transforms: Number of transformations.
        hidden: Widths of the hidden layers of each.
        bins: Pieces of each spline.
        passes: 2 couples halves; None is fully autoregressive.

    >>> MixedSplines(angles=(1,), transforms=2).build((3,))().sample().shape
    torch.Size([3])
    """

    angles: tuple[int, ...] | None = None
    transforms: int = 3
    hidden: tuple[int, ...] = (64, 64)
    bins: int = 8
    passes: int | None = None

    domain = "mixed"

    def __post_init__(self):
        check_sizes(transforms=self.transforms, bins=self.bins, hidden=self.hidden)
        whole = isinstance(self.angles, tuple) and all(type(it) is int for it in self.angles)
        if self.angles is not None and not whole:
            raise TypeError(f"angles must be a tuple of whole numbers; got {self.angles!r}.")

    def build(self, event_shape: tuple[int, ...], conditions: int = 0) -> "MixedFlow":
        size = math.prod(event_shape)
        angles = self.angles or ()
        if any(not 0 <= it < size for it in angles):
            raise ValueError(
                f"angles must be coordinates from 0 to {size - 1}; got {self.angles!r}."
            )
        circle = torch.zeros(size, dtype=torch.bool)
        circle[list(angles)] = True
        return MixedFlow(self, event_shape, conditions, circle)


class MixedFlow(nn.Module):
    """The flow that :class:`MixedSplines` builds."""

    def __init__(
        self,
        chosen: MixedSplines,
        event_shape: tuple[int, ...],
        conditions: int,
        circle: Bool[Tensor, " coordinates"],
    ):
        super().__init__()
        flows, bins, size = imported_zuko().flows, chosen.bins, len(circle)
        self.event_shape, self.circle = torch.Size(event_shape), circle

        def spline(*parameters: Tensor) -> Transform:
            bent = imported_zuko().transforms.MonotonicRQSTransform(*parameters, bound=BOUND)
            return ComposeTransform([_Shift(circle), bent])

        orders = [torch.arange(size), torch.arange(size).flip(0)]
        self.transforms = nn.ModuleList(
            flows.MaskedAutoregressiveTransform(
                features=size,
                context=conditions,
                passes=chosen.passes,
                order=orders[k % 2],
                univariate=spline,
                shapes=[(bins,), (bins,), (bins - 1,)],
                hidden_features=chosen.hidden,
            )
            for k in range(chosen.transforms)
        )

    def forward(self, *condition: Tensor) -> "MixedLaw":
        """The distribution of events, given the conditions."""
        given = condition[0] if condition else None
        transform = ComposeTransform([it(given) for it in self.transforms])
        batch = given.shape[:-1] if given is not None else torch.Size()
        like = next(self.parameters())
        return MixedLaw(transform, self.circle.to(like.device), batch, self.event_shape, like)


class _Shift(Transform):
    """Angles, of which half of a period is 5, turned by as much; the rest as it is."""

    bijective = True
    domain = codomain = constraints.real
    sign = 1  # pyright: ignore[reportAssignmentType]

    def __init__(self, circle: Tensor):
        super().__init__()
        self.circle = circle

    def _call(self, x: Tensor) -> Tensor:
        return torch.where(self.circle.to(x.device), torch.remainder(x, 2 * BOUND) - BOUND, x)

    def _inverse(self, y: Tensor) -> Tensor:
        return self._call(y)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.zeros_like(x)


class MixedLaw(Distribution):
    """Events some coordinates of which are angles in [−π, π), with a density of that period."""

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012
    has_rsample = True

    def __init__(
        self, transform: Transform, circle: Tensor, batch: torch.Size, event: torch.Size, like
    ):
        super().__init__(batch, event, validate_args=False)
        self.transform, self.circle, self.like = transform, circle, like

    def expand(self, batch_shape: Any, _instance: Any = None) -> "MixedLaw":
        batch = torch.Size(batch_shape)
        return MixedLaw(self.transform, self.circle, batch, self.event_shape, self.like)

    @property
    def support(self) -> Any:
        """All events."""
        return constraints.independent(constraints.real, len(self.event_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        x = value.flatten(value.ndim - len(self.event_shape))
        angles = wrap_angles(x) * (BOUND / math.pi)
        x = torch.where(self.circle, angles, x)
        batch = torch.broadcast_shapes(x.shape[:-1], self.batch_shape)
        x = x.expand(*batch, x.shape[-1])
        latent: Any = self.transform(x)
        log_slope = self.transform.log_abs_det_jacobian(x, latent)
        return self._log_base(latent) + log_slope + self._log_scale()

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        return self.rsample_and_log_prob(sample_shape)[0]

    def rsample_and_log_prob(self, shape: Any = ()) -> tuple[Tensor, Tensor]:
        """Events, differentiable in the parameters, and their log-density."""
        size = (*shape, *self.batch_shape, len(self.circle))
        how = {"dtype": self.like.dtype, "device": self.like.device}
        latent = torch.where(
            self.circle, BOUND * (2 * torch.rand(size, **how) - 1), torch.randn(size, **how)
        )
        x: Any = self.transform.inv(latent)
        log_slope = self.transform.log_abs_det_jacobian(x, latent)
        log_q = self._log_base(latent) + log_slope + self._log_scale()
        x = torch.where(self.circle, x * (math.pi / BOUND), x)
        return x.reshape(*x.shape[:-1], *self.event_shape), log_q

    def _log_base(self, latent: Tensor) -> Tensor:
        normal = -latent.square() / 2 - math.log(2 * math.pi) / 2
        return torch.where(self.circle, -math.log(2 * BOUND), normal).sum(-1)

    def _log_scale(self) -> float:
        return int(self.circle.sum()) * math.log(BOUND / math.pi)


class Bounded(nn.Module):
    """The flow of coordinates within bounds, from one of coordinates without.

    Args:
        flow: The flow of coordinates without bounds.
        chart: The map between both.
    """

    def __init__(self, flow: nn.Module, chart: Any):
        super().__init__()
        self.flow, self.chart = flow, chart

    def forward(self, *condition: Tensor) -> "BoundedLaw":
        """The distribution of events, given the conditions."""
        return BoundedLaw(self.flow(*condition), self.chart)


class BoundedLaw(Distribution):
    """The distribution of coordinates within bounds; outside of them the density is 0."""

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, law: Any, chart: Any):
        super().__init__(law.batch_shape, law.event_shape, validate_args=False)
        self.law, self.chart, self.has_rsample = law, chart, law.has_rsample

    def expand(self, batch_shape: Any, _instance: Any = None) -> "BoundedLaw":
        return BoundedLaw(self.law.expand(batch_shape), self.chart)

    @property
    def support(self) -> Any:
        """All events."""
        return constraints.independent(constraints.real, len(self.event_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        z, log_slope = self.chart.to_unbounded(value)
        log_q = self.law.log_prob(z)
        return torch.where(log_slope == -math.inf, -math.inf, log_q - log_slope)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        return self.sample_and_log_prob(tuple(sample_shape))[0]

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        return self.chart.to_bounded(self.law.rsample(sample_shape))[0]

    def sample_and_log_prob(self, shape: Any = ()) -> tuple[Tensor, Tensor]:
        """Events and the log-density there; of z itself, which has more digits than x."""
        with torch.no_grad():
            z, log_q = draw(self.law, shape)
            x, log_slope = self.chart.to_bounded(self.chart.clamp(z))
            return x, log_q - log_slope

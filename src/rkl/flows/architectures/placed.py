"""A flow whose place and width follow the conditions, with a share of draws in heavy tails."""

import math
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.distributions import Distribution, constraints

from rkl.stats import interpolated_quantile

TAILS = 0.02  # share of the draws from a Cauchy distribution
FURTHEST = 1e4  # widths at which that is cut off, so that no log-density overflows
FURTHEST_LOG = 20.0  # the same of the logarithm of a coordinate with bounds, which has few digits
INSIDE = 4.0  # widths within which nearly all events should lie, for splines to bend them
WIDEST = 4.0  # factor by which the width grows to that end, at most
OUTLYING = 10.0  # widths beyond which an event does not count in the mean


class Placed(nn.Module):
    r"""The flow of shift(c) + scale(c) · z, with z from another flow or a Cauchy distribution.

    Shift and log scale are quadratic in the conditions c. A share of 0.02 of z comes from
    independent Cauchy distributions: weights p/q stay bounded where the flow's own tails
    end, and mass there is counted.

    Angles keep their place; in that share they are uniform.

    Source: Hesterberg (1995), Technometrics 37, 185, for mixtures that are a defence.

    Args:
        flow: The flow of z, given the conditions if there are any.
        event_shape: Shape of one event.
        conditions: Number of conditions.
        circle: True for coordinates that are angles, of the shape of the event; None without.
        furthest: Widths at which the Cauchy distributions are cut off, by coordinate.
    """

    shift: Tensor
    log_scale: Tensor

    def __init__(
        self,
        flow: nn.Module,
        event_shape: tuple[int, ...],
        conditions: int,
        circle: Bool[Tensor, "*event"] | None = None,
        furthest: Float[Tensor, "*event"] | None = None,
    ):
        super().__init__()
        self.circle = torch.zeros(event_shape, dtype=torch.bool) if circle is None else circle
        self.furthest = torch.full(event_shape, FURTHEST) if furthest is None else furthest
        self.flow, self.conditions = flow, conditions
        features = 1 + conditions + conditions * (conditions + 1) // 2
        self.register_buffer("shift", torch.zeros(features, *event_shape))
        self.register_buffer("log_scale", torch.zeros(features, *event_shape))

    def forward(self, *condition: Tensor) -> "PlacedLaw":
        """The distribution of events, given the conditions."""
        features = self.features(*condition)
        shift, log_scale = (
            torch.tensordot(features, it.to(features), 1) for it in (self.shift, self.log_scale)
        )
        kinds = self.circle.to(shift.device), self.furthest.to(shift)
        return PlacedLaw(self.flow(*condition), shift, log_scale, *kinds)

    def features(self, *condition: Tensor) -> Float[Tensor, "*batch features"]:
        """1, the standardised conditions, and their products."""
        if not condition:
            like = next(self.flow.parameters())
            return torch.ones(1, dtype=like.dtype, device=like.device)
        inner: Any = self.flow
        u = inner.standardise(condition[0])
        pairs = [u[..., i] * u[..., j] for i in range(self.conditions) for j in range(i + 1)]
        return torch.cat([torch.ones_like(u[..., :1]), u, torch.stack(pairs, -1)], -1)

    @property
    def fresh(self) -> bool:
        """True if shift and scale were never set by :meth:`place`."""
        return not bool(self.shift.any() or self.log_scale.any())

    @torch.no_grad()
    def place(
        self, x: Float[Tensor, "rows *event"], *condition: Float[Tensor, "rows conditions"]
    ) -> None:
        """Take shift and scale from events under their conditions, by least squares.

        The mean logarithm of a deviation gives the scale, which heavy tails do not move.
        """
        features = self.features(*condition).double().expand(len(x), -1)
        flat = x.flatten(1).double()
        middle = flat.median(0).values
        width = (flat - middle).abs().median(0).values.clamp_min(1e-12)
        near = flat.clamp(middle - OUTLYING * width, middle + OUTLYING * width)
        shift = torch.linalg.lstsq(features, near, driver="gelsd").solution
        away = (flat - features @ shift).abs().clamp_min(1e-30)
        log_scale = torch.linalg.lstsq(features, away.log(), driver="gelsd").solution
        z = away / (features @ log_scale).exp()
        size = interpolated_quantile(z.cpu(), 0.68).to(z)
        furthest = z.topk(max(1, len(z) // 1_000), 0).values[-1] / INSIDE
        log_scale[0] += torch.maximum(size, torch.minimum(furthest, WIDEST * size)).log()
        for buffer, fitted in ((self.shift, shift), (self.log_scale, log_scale)):
            buffer.copy_(fitted.reshape(buffer.shape))
            buffer[:, self.circle.to(buffer.device)] = 0.0


class PlacedLaw(Distribution):
    """The distribution of shift + scale · z, z from another one and a few from Cauchy's."""

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012

    def __init__(
        self, law: Any, shift: Tensor, log_scale: Tensor, circle: Tensor, furthest: Tensor
    ):
        super().__init__(law.batch_shape, law.event_shape, validate_args=False)
        self.circle, self.furthest = circle, furthest
        self.law, self.shift, self.log_scale = law, shift, log_scale
        self.axes = tuple(range(-len(law.event_shape), 0))
        self.has_rsample = law.has_rsample

    def expand(self, batch_shape: Any, _instance: Any = None) -> "PlacedLaw":
        shape = torch.Size((*batch_shape, *self.event_shape))
        place = self.shift.expand(shape), self.log_scale.expand(shape)
        return PlacedLaw(self.law.expand(batch_shape), *place, self.circle, self.furthest)

    @property
    def support(self) -> Any:
        """All events."""
        return constraints.independent(constraints.real, len(self.event_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        z = ((value - self.shift) * (-self.log_scale).exp()).to(self.shift)
        near = self.law.log_prob(z) + math.log1p(-TAILS)
        far = self._log_far(z) + math.log(TAILS)
        return torch.logaddexp(near, far) - self.log_scale.sum(self.axes)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        with torch.no_grad():
            return self.rsample(sample_shape)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        near = (self.law.rsample if self.has_rsample else self.law.sample)(sample_shape)
        uniform = 2 * torch.rand_like(near) - 1
        far = (uniform * self.furthest.atan()).tan()
        far = torch.where(self.circle, math.pi * uniform, far)
        chosen = torch.rand(near.shape[: near.ndim - len(self.axes)], device=near.device) < TAILS
        z = torch.where(chosen.reshape(*chosen.shape, *[1] * len(self.axes)), far, near)
        return self.shift + self.log_scale.exp() * z

    def rsample_and_log_prob(self, shape: Any = ()) -> tuple[Tensor, Tensor]:
        """Events, differentiable in the parameters, and their log-density."""
        value = self.rsample(torch.Size(shape))
        return value, self.log_prob(value)

    def _log_far(self, z: Tensor) -> Tensor:
        """Log-density of independent truncated Cauchy variables, and of uniform angles."""
        terms = -torch.log1p(z.square()) - (2 * self.furthest.atan()).log()
        terms = torch.where(z.abs() <= self.furthest, terms, -math.inf)
        return torch.where(self.circle, -math.log(2 * math.pi), terms).sum(self.axes)

"""A flow of angles without a lattice: circular splines."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, constraints

from rkl.flows.architectures.base import Architecture
from rkl.flows.architectures.splines import build_zuko, check_sizes


@dataclass(frozen=True)
class CircularSplines(Architecture):
    """Monotone rational-quadratic splines of angles, each given those before it.

    It suits torsions, rings and links, any angles in radians that are no square lattice of the
    XY model. Its density has the period 2π in every angle.

    Source: Rezende et al. (2020), arXiv 2002.02428, by zuko's NCSF.

    Args:
        transforms: Number of transformations.
        hidden: Widths of the hidden layers of each.
        bins: Pieces of each spline.
        passes: 2 couples halves; None is fully autoregressive.
        relative: Whether the first angle is uniform and the splines are of the others less it:
            a common turn then does not change the density.

    >>> CircularSplines(transforms=2).build((3,))().event_shape
    torch.Size([3])
    """

    transforms: int = 3
    hidden: tuple[int, ...] = (64, 64)
    bins: int = 8
    passes: int | None = None
    relative: bool = False

    domain = "circle"

    def __post_init__(self):
        check_sizes(transforms=self.transforms, bins=self.bins, hidden=self.hidden)

    def build(self, event_shape: tuple[int, ...], conditions: int = 0) -> "CircularFlow":
        if not self.relative:
            return CircularFlow(build_zuko("NCSF", self, event_shape, conditions, bins=self.bins))
        others = math.prod(event_shape) - 1
        if others < 1:
            raise ValueError(f"relative takes two angles at least; got {list(event_shape)}.")
        inner = build_zuko("NCSF", self, (others,), conditions, bins=self.bins)
        return CircularFlow(inner, torch.Size(event_shape))


class CircularFlow(nn.Module):
    """The flow that :class:`CircularSplines` builds."""

    def __init__(self, flow: nn.Module, relative: torch.Size | None = None):
        super().__init__()
        self.flow, self.relative = flow, relative

    def forward(self, *condition: Tensor) -> "CircularLaw | RelativeLaw":
        """The distribution of angles, given the conditions."""
        law = CircularLaw(self.flow(*condition))
        return law if self.relative is None else RelativeLaw(law, self.relative)


class CircularLaw(Distribution):
    """Angles in [−π, π), with a density of the period 2π."""

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012
    has_rsample = True

    def __init__(self, law: Any):
        super().__init__(law.batch_shape, law.event_shape, validate_args=False)
        self.law = law

    def expand(self, batch_shape: Any, _instance: Any = None) -> "CircularLaw":
        return CircularLaw(self.law.expand(batch_shape))

    @property
    def support(self) -> Any:
        """All angles."""
        return constraints.independent(constraints.real, len(self.event_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        return self.law.log_prob(wrap_angles(value))

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        return wrap_angles(self.law.rsample(sample_shape))


class RelativeLaw(Distribution):
    """Angles of which the first is uniform; the others less it follow another distribution."""

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012
    has_rsample = True

    def __init__(self, law: CircularLaw, event_shape: torch.Size):
        super().__init__(law.batch_shape, event_shape, validate_args=False)
        self.law = law

    def expand(self, batch_shape: Any, _instance: Any = None) -> "RelativeLaw":
        return RelativeLaw(self.law.expand(batch_shape), self.event_shape)

    @property
    def support(self) -> Any:
        """All angles."""
        return constraints.independent(constraints.real, len(self.event_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        x = value.flatten(value.ndim - len(self.event_shape))
        return self.law.log_prob(x[..., 1:] - x[..., :1]) - math.log(2 * math.pi)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        others = self.law.rsample(sample_shape)
        first = math.pi * (2 * torch.rand_like(others[..., :1]) - 1)
        x = wrap_angles(torch.cat([first, first + others], -1))
        return x.reshape(*x.shape[:-1], *self.event_shape)


def wrap_angles(x: Tensor) -> Tensor:
    """Angles in [−π, π)."""
    return torch.remainder(x + math.pi, 2 * math.pi) - math.pi

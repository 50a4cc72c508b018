"""Checks that flows of angles and flows of the line are not confused."""

import math
from typing import Any

import torch
from torch import Tensor

from rkl.flows.architectures import Architecture
from rkl.sample.targets.base import Target

POINTS = 8  # at which a density is tried for its period


def check_architecture(architecture: Architecture, target: Target) -> None:
    """Refuse an architecture whose events are angles where the target's are not, or reversed.

    Raises:
        ValueError: It is of the other domain.
    """
    domain, wanted = architecture.domain, target.chart.unbounded_domain
    wanted = wanted if isinstance(wanted, str) else "mixed"
    if domain in (None, wanted, "mixed"):
        return
    if wanted == "mixed":
        raise ValueError(
            f"flow must be one of angles beside other coordinates, as {target} has; got "
            f"{architecture}. MixedSplines is."
        )
    if wanted == "circle":
        raise ValueError(
            f"flow must be one of angles, as {target} is on the circle; got {architecture}, whose "
            "events do not all lie there. CoarseToFine is for square lattices of angles, "
            "CircularSplines for any others."
        )
    raise ValueError(
        f"flow must be one of the line, as {target} is not on the circle; got {architecture}, "
        "whose events are angles. NSF and Coupling are on the line."
    )


@torch.no_grad()
def check_domain(law: Any, target: Target, like: Tensor) -> None:
    """Refuse a distribution on the line as a proposal for angles.

    The density of a flow of angles integrates to 1 over one period. So a turn by 2π does not
    change it, or leads to a density of 0.

    Args:
        law: The distribution of the flow.
        target: The target.
        like: A tensor of the precision of the flow.

    Raises:
        ValueError: A turn by 2π leads to another density.
    """
    if target.domain != "circle":
        return
    generator = torch.Generator().manual_seed(0)
    shape = (POINTS, *law.batch_shape, *law.event_shape)
    x = (2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1) * math.pi
    try:
        here, beyond = (law.log_prob(it.to(like)).double() for it in (x, x + 2 * math.pi))
    except ValueError:  # distributions of torch refuse what lies outside of their support
        return
    both = here.isfinite() & beyond.isfinite()
    apart = (here - beyond).abs() > 1e-3 * (1 + here.abs()) * math.prod(law.event_shape)
    if (both & apart).any():
        raise ValueError(
            f"proposal: its density changes as an angle of {target} turns by 2π, so that it is "
            "no density of angles but one on the line; take a flow of the circle."
        )

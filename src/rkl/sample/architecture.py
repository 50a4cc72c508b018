"""The flow of a target before it is fitted: its architecture, standardised units and ranges."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from rkl.checks import warn
from rkl.flows.architectures import (
    NSF,
    Architecture,
    CircularSplines,
    Conditioned,
    Coupling,
    MixedSplines,
    Scaled,
)
from rkl.flows.architectures.mixed import Bounded
from rkl.flows.architectures.placed import FURTHEST, FURTHEST_LOG, Placed
from rkl.flows.precision import single_precision
from rkl.sample.domain import check_architecture
from rkl.sample.lattice import CoarseToFine
from rkl.sample.observables import turn_invariant
from rkl.sample.targets.base import Condition, Target, without_bounds
from rkl.sample.targets.check import call_log_prob, in_double
from rkl.sample.targets.domains import Chart

MAX_COOLED_SIZE = 8  # coordinates up to which particles are cooled, and flows have tails
SPLINES = NSF(transforms=3, hidden=(128, 128), bins=16)  # of few coordinates


def default_architecture(target: Target) -> Architecture:
    """Architecture of a target's fit by default: the target's own, or that of its domain.

    >>> from rkl.sample import XY
    >>> default_architecture(XY(side=4)) == CoarseToFine.of(XY(side=4))
    True
    """
    preferred = target.architecture()
    if preferred is not None:
        return preferred
    size = math.prod(target.event_shape)
    passes = None if size <= MAX_COOLED_SIZE else 2
    if target.domain == "circle":
        side = math.isqrt(size)
        square = side > 1 and side**2 == size and side & (side - 1) == 0
        ignores_turns = _ignores_turns(target)
        by_temperature = [it.name for it in target.conditions] == ["T"]
        if square and by_temperature and len(target.event_shape) == 1 and ignores_turns:
            return CoarseToFine(integrate="none")
        return CircularSplines(passes=passes, relative=size > 1 and ignores_turns)
    if target.chart.circle.any():
        return MixedSplines(passes=passes)
    return SPLINES if size <= MAX_COOLED_SIZE else Coupling()


def _ignores_turns(target: Target) -> bool:
    middle = torch.tensor([[(it.low + it.high) / 2 for it in target.conditions]])
    condition, dtype = in_double(target, middle)
    try:
        call_log_prob(target, torch.zeros(1, *target.event_shape, dtype=dtype), condition)
    except (TypeError, ValueError):  # the fit says what is wrong with it
        return False
    return turn_invariant(target, middle)


@single_precision()
def build_flow(
    architecture: Architecture, target: Target, ranges: Sequence[Condition]
) -> nn.Module:
    """A flow that warns beyond these ranges of the conditions, where it is not trained.

    Unless the architecture has units of its own, or events are angles, conditions are
    standardised, and the fit sets place and scale of its events.

    >>> from rkl.flows import NSF
    >>> from rkl.sample import MoG8
    >>> build_flow(NSF(transforms=1), MoG8(), MoG8().conditions)(torch.tensor([0.5])).event_shape
    torch.Size([2])
    """
    check_architecture(architecture, target)
    chart, flat = target.chart, without_bounds(target)
    if isinstance(architecture, MixedSplines):
        architecture = _with_angles(architecture, target)
    flow = architecture.build(target.event_shape, len(target.conditions))
    if not architecture.own_units:
        flow = _in_units(flow, flat, ranges, chart)
    if target.conditions:
        flow.register_forward_pre_hook(Within(tuple(ranges)))
    return Bounded(flow, chart) if chart.bounded else flow


def _in_units(
    flow: nn.Module, target: Target, ranges: Sequence[Condition], chart: Chart
) -> nn.Module:
    count = len(target.conditions)
    if count:
        low, high = torch.tensor([[it.low, it.high] for it in ranges]).T
        flow = Conditioned(flow, low.clone(), high.clone())
    if target.domain == "circle":
        return flow
    if math.prod(target.event_shape) <= MAX_COOLED_SIZE:
        furthest = torch.where(chart.has_bounds, FURTHEST_LOG, FURTHEST)
        return Placed(flow, target.event_shape, count, chart.circle, furthest)
    return Scaled(flow, torch.zeros(target.event_shape), torch.ones(target.event_shape))


def _with_angles(architecture: MixedSplines, target: Target) -> MixedSplines:
    angles = tuple(target.chart.circle.flatten().nonzero().flatten().tolist())
    if architecture.angles not in (None, angles):
        raise ValueError(
            f"flow: angles must be those of {target}, {angles}; got {architecture.angles}."
        )
    return replace(architecture, angles=angles)


class Within:
    """Warns if a flow is called with conditions beyond its training ranges.

    Args:
        ranges: The training ranges.
    """

    def __init__(self, ranges: tuple[Condition, ...]):
        self.ranges = ranges

    def __call__(self, flow: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        """Hook that torch calls before the flow."""
        for k, one in enumerate(self.ranges):
            values = arguments[0].detach()[..., k].flatten()
            margin = 1e-6 * max(abs(one.low), abs(one.high))
            beyond = values[(values < one.low - margin) | (values > one.high + margin)]
            if len(beyond):
                warn(
                    f"condition: {one.name}={beyond[0].item():g} is beyond the range that the "
                    f"flow was trained on, {one.low:g} to {one.high:g}; look at the acceptance."
                )

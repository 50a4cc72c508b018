"""Flows of zuko: masked autoregressive ones, affine or of splines, and couplings of the same."""

import math
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.distributions import Distribution
from torch.distributions.transforms import ReshapeTransform

from rkl.checks import LARGEST_COUNT, integer
from rkl.extras import optional_import
from rkl.flows.architectures.base import Architecture


@dataclass(frozen=True)
class NSF(Architecture):
    """Neural spline flow: monotone rational-quadratic splines, autoregressive or coupled.

    Flexible in few dimensions. It bends only within ± 5, so data should be standardised.
    Autoregressive, it evaluates densities in one pass and draws in one pass per
    coordinate; coupled, both take two.

    Source: Durkan et al. (2019), arXiv 1906.04032.

    Args:
        transforms: Number of transformations.
        hidden: Widths of the hidden layers of each.
        bins: Pieces of each spline.
        passes: 2 couples halves; None is fully autoregressive.

    >>> NSF(transforms=2).build((3,))().event_shape
    torch.Size([3])
    """

    transforms: int = 5
    hidden: tuple[int, ...] = (64, 64)
    bins: int = 8
    passes: int | None = None

    domain = "line"

    def __post_init__(self):
        check_sizes(transforms=self.transforms, bins=self.bins, hidden=self.hidden)

    def build(self, event_shape: tuple[int, ...], conditions: int = 0) -> nn.Module:
        return build_zuko("NSF", self, event_shape, conditions, bins=self.bins)


@dataclass(frozen=True)
class MAF(Architecture):
    """Masked autoregressive flow: affine in each coordinate, given those before it.

    Source: Papamakarios et al. (2017), arXiv 1705.07057.

    Args:
        transforms: Number of transformations.
        hidden: Widths of the hidden layers of each.
        passes: 2 couples halves; None is fully autoregressive.

    >>> MAF(transforms=2, passes=2).build((3,))().event_shape
    torch.Size([3])
    """

    transforms: int = 5
    hidden: tuple[int, ...] = (64, 64)
    passes: int | None = None

    domain = "line"

    def __post_init__(self):
        check_sizes(transforms=self.transforms, hidden=self.hidden)

    def build(self, event_shape: tuple[int, ...], conditions: int = 0) -> nn.Module:
        return build_zuko("MAF", self, event_shape, conditions)


def check_sizes(hidden: tuple[int, ...], **counts: int) -> None:
    """Refuse sizes that are no positive integers.

    Raises:
        TypeError: One is no integer.
        ValueError: One is below 1.
    """
    if not isinstance(hidden, tuple):
        raise TypeError(f"hidden must be a tuple of widths such as (64, 64); got {hidden!r}.")
    for name, value in [*counts.items(), *(("hidden", width) for width in hidden)]:
        integer(name, value, at_least=1, at_most=LARGEST_COUNT)


def build_zuko(name: str, chosen: Any, event_shape, conditions: int, **settings) -> nn.Module:
    """A flow of zuko of this name, with the settings of an architecture."""
    zuko = imported_zuko()
    features = math.prod(event_shape)
    made = getattr(zuko.flows, name)(
        features,
        conditions,
        transforms=chosen.transforms,
        hidden_features=chosen.hidden,
        passes=chosen.passes,
        **settings,
    )
    if len(event_shape) == 1:
        return made
    flat = zuko.lazy.UnconditionalTransform(
        ReshapeTransform, in_shape=tuple(event_shape), out_shape=(features,)
    )
    return zuko.flows.Flow([flat, *made.transform.transforms], made.base)


def start_as_identity(flow: nn.Module) -> None:
    """Make a fresh flow of zuko begin as the identity, as ours do: last layers of 0."""
    zuko = imported_zuko()
    kinds = [zuko.flows.MaskedAutoregressiveTransform]
    if isinstance(flow, zuko.flows.MAF):
        kinds.append(zuko.flows.ElementWiseTransform)  # in its place for a single column
    for transform in getattr(getattr(flow, "transform", None), "transforms", ()):
        if not isinstance(transform, tuple(kinds)):
            continue
        hyper = getattr(transform, "hyper", None)
        if hyper is None:  # parameters without a network
            last = getattr(transform, "phi", ())
        else:
            layers = [it for it in hyper.modules() if list(it.parameters(recurse=False))]
            last = layers[-1].parameters()
        for part in last:
            nn.init.zeros_(part)


def imported_zuko() -> Any:
    """Zuko, whose import switches off the validation of every distribution; undone here."""
    validates = Distribution._validate_args
    try:
        with optional_import("This flow"):
            import zuko
    finally:
        Distribution._validate_args = validates
    return zuko

"""Affine coupling of the even and the odd coordinates, without a wasted product."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rkl.flows.architectures.base import Architecture, Flow
from rkl.flows.architectures.splines import check_sizes

STEEPEST = 3.0  # |log scale| of one coupling, so that no step can leave the range of floats


@dataclass(frozen=True)
class Coupling(Architecture):
    """RealNVP: the even coordinates determine scale and shift of the odd ones, then in turn.

    The masks are slices: the input of a network is one half, its output scale and shift of the
    other. Densities and draws cost the same single pass. It starts as the identity.

    Source: Dinh et al. (2017), arXiv 1605.08803.

    Args:
        transforms: Number of couplings.
        hidden: Widths of the hidden layers of each.
        compiled: Whether torch compiles it, which takes a minute and a C++ compiler.

    >>> Coupling(transforms=2).build((3,))().event_shape
    torch.Size([3])
    """

    transforms: int = 8
    hidden: tuple[int, ...] = (64, 64)
    compiled: bool = False

    domain = "line"

    def __post_init__(self):
        check_sizes(transforms=self.transforms, hidden=self.hidden)

    def build(self, event_shape: tuple[int, ...], conditions: int = 0) -> nn.Module:
        return CouplingFlow(self, event_shape, conditions)


class CouplingFlow(Flow):
    """The flow that :class:`Coupling` builds.

    Attributes:
        within: Bound of the inputs of networks: a far row is moved like one at the edge, without
            extrapolation.
    """

    places: Tensor
    within: float = math.inf

    def __init__(self, chosen: Coupling, event_shape: tuple[int, ...], conditions: int):
        super().__init__(event_shape, conditions)
        size = math.prod(event_shape)
        if size < 2:
            raise ValueError(
                f"event_shape must hold two coordinates at least, to couple them; got "
                f"{list(event_shape)}. For a single one use NSF."
            )
        self.halves = (size + 1) // 2, size // 2
        self.nets = nn.ModuleList(
            mlp(self.halves[i % 2] + conditions, chosen.hidden, 2 * self.halves[1 - i % 2])
            for i in range(chosen.transforms)
        )
        places = torch.cat([torch.arange(0, size, 2), torch.arange(1, size, 2)])
        self.register_buffer("places", places.argsort(), persistent=False)
        if chosen.compiled:
            self.encode = torch.compile(self.encode, fullgraph=True)
            self.decode = torch.compile(self.decode, fullgraph=True)

    def encode(self, value, condition):
        """The latents of events, and log |d latent / d event|."""
        value = value.flatten(value.ndim - len(self.event_shape))
        unchanged, moved = value[..., 0::2], value[..., 1::2]
        total = value.new_zeros(())
        for net in self.nets:
            shift, log_scale = self._affine(net, unchanged, condition)
            moved = moved * log_scale.exp() + shift
            total = total + log_scale.sum(-1)
            unchanged, moved = moved, unchanged
        latent = torch.cat([unchanged, moved], -1)
        return latent.unflatten(-1, self.event_shape), total

    def decode(self, latent, condition):
        """The events of latents, and log |d event / d latent|."""
        latent = latent.flatten(latent.ndim - len(self.event_shape))
        swapped = len(self.nets) % 2
        unchanged, moved = latent.split(self.halves[::-1] if swapped else self.halves, -1)
        total = latent.new_zeros(())
        for net in reversed(self.nets):
            unchanged, moved = moved, unchanged
            shift, log_scale = self._affine(net, unchanged, condition)
            moved = (moved - shift) * (-log_scale).exp()
            total = total - log_scale.sum(-1)
        value = torch.cat([unchanged, moved], -1)[..., self.places]
        return value.unflatten(-1, self.event_shape), total

    def _affine(self, net, half, condition):
        inside = half if self.within == math.inf else half.clamp(-self.within, self.within)
        return _affine(net, inside, condition)


def mlp(inputs: int, hidden: tuple[int, ...], outputs: int) -> nn.Sequential:
    """A network with SiLU between its layers, which starts as zero."""
    widths, layers = (inputs, *hidden), []
    for before, after in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(before, after), nn.SiLU()]
    last = nn.Linear(widths[-1], outputs)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(*layers, last)


def _affine(net: nn.Module, half: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor]:
    inputs = half if condition is None else torch.cat([half, condition], -1)
    shift, log_scale = net(inputs).chunk(2, -1)
    return shift, STEEPEST * torch.tanh(log_scale / STEEPEST)

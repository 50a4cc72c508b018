"""The RealNVP on checkerboards of AdvNF, the baseline that our lattice flow is compared with."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from rkl.checks import number
from rkl.flows.architectures import Architecture
from rkl.flows.architectures.base import Flow
from rkl.sample.lattice.base import square_side


@dataclass(frozen=True)
class CheckerboardRealNVP(Architecture):
    """Affine couplings by periodic convolutions, in turn on the two colours of a checkerboard.

    As in AdvNF, angles are the sigmoid of the latents: the circle is cut open, and no
    rotation is a symmetry. With 64 filters it has 314,384 parameters, and the training of its
    authors would take more than 300 hours on two cores; with 16 it has 23,312. On the line, as
    for φ⁴, there is no sigmoid.

    Source: V. Kanaujia et al. (2024), arXiv 2401.15948, section 3, and the code beside it.

    Args:
        couplings: Number of couplings.
        filters: Channels of each of two hidden convolutions.
        circle: Whether the events are angles.

    >>> flow = CheckerboardRealNVP(filters=16).build((64,), conditions=1)
    >>> sum(p.numel() for p in flow.parameters())
    23312
    """

    couplings: int = 8
    filters: int = 64
    circle: bool = True

    own_units = True

    @property
    def domain(self):  # pyright: ignore[reportIncompatibleVariableOverride]
        """The circle or the line."""
        return "circle" if self.circle else "line"

    def __post_init__(self):
        number("couplings", self.couplings, at_least=1)
        number("filters", self.filters, at_least=1)

    def build(self, event_shape: tuple[int, ...], conditions: int = 0) -> "Checkerboards":
        side = square_side(event_shape, even=True)
        return Checkerboards(self, side, conditions)


class Checkerboards(Flow):
    """The flow that :class:`CheckerboardRealNVP` builds."""

    parity: Tensor

    def __init__(self, architecture: CheckerboardRealNVP, side: int, conditions: int):
        super().__init__((side**2,), conditions)
        self.side, self.circle = side, architecture.circle
        places = torch.arange(side)
        self.register_buffer("parity", ((places[:, None] + places) % 2).float()[None, None])
        self.couplings = nn.ModuleList(
            _convolutions(1 + conditions, architecture.filters)
            for _ in range(architecture.couplings)
        )

    def encode(self, value, condition):
        if not self.circle:
            return self._encode(value, condition)
        share = torch.remainder(value + math.pi, 2 * math.pi) / (2 * math.pi)
        opened = torch.logit(share, eps=torch.finfo(value.dtype).eps)  # finite at the cut
        latent, log_jacobian = self._encode(opened, condition)
        return latent, log_jacobian - self._log_slope(opened)

    def decode(self, latent, condition):
        field, total = self._field(latent), 0.0
        for k, coupling in enumerate(self.couplings):
            frozen, scale, shift = self._step(k, coupling, field, condition)
            field = frozen * field + (1 - frozen) * (field * scale.exp() + shift)
            total = total + scale.sum((1, 2, 3))
        value, log_jacobian = self._reshape(field, total, latent.shape)
        if not self.circle:
            return value, log_jacobian
        log_jacobian = log_jacobian + self._log_slope(value)
        return 2 * math.pi * torch.sigmoid(value) - math.pi, log_jacobian

    def _encode(self, value, condition):
        field, total = self._field(value), 0.0
        for k in reversed(range(len(self.couplings))):
            frozen, scale, shift = self._step(k, self.couplings[k], field, condition)
            field = frozen * field + (1 - frozen) * (field - shift) * (-scale).exp()
            total = total - scale.sum((1, 2, 3))
        return self._reshape(field, total, value.shape)

    def _log_slope(self, opened: Tensor) -> Tensor:
        """Log of dθ/dy for θ = 2π sigmoid(y) − π, over all sites."""
        return (logsigmoid(opened) + logsigmoid(-opened) + math.log(2 * math.pi)).sum(-1)

    def _field(self, value: Tensor) -> Tensor:
        return value.reshape(-1, 1, self.side, self.side)

    def _reshape(self, field, total, shape):
        return field.reshape(shape), total.reshape(shape[:-1])

    def _step(self, k: int, coupling: nn.Module, field: Tensor, condition: Tensor | None):
        """The sites that stay, and the log-scale and shift of the others."""
        frozen = self.parity if k % 2 else 1 - self.parity
        inputs = [frozen * field]
        if condition is not None:
            flat = condition.reshape(len(field), -1, 1, 1)
            inputs.append(flat.expand(-1, -1, self.side, self.side))
        scale, shift = coupling(torch.cat(inputs, 1)).chunk(2, 1)
        return frozen, (1 - frozen) * scale.tanh(), shift


def _convolutions(channels: int, filters: int) -> nn.Sequential:
    def convolution(before, after):
        return nn.Conv2d(before, after, 3, padding=1, padding_mode="circular")

    layers = convolution(channels, filters), nn.ReLU(), convolution(filters, filters), nn.ReLU()
    return nn.Sequential(*layers, convolution(filters, 2))

"""The network of one colour of sites, shared by all levels."""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import silu

from rkl.sample.lattice.ordering import Pass

SIZES = 5  # of levels that are told apart: 1, 2, 4, 8, and more sites


class Site(nn.Module):
    """Two hidden layers, from features [features, sites] to a circular distribution.

    Args:
        features: Number of features.
        architecture: Architecture with its ``width`` and ``knots``.
        levels: Number of levels, which have their own offsets.
    """

    def __init__(self, features: int, architecture: Any, levels: int):
        super().__init__()
        width, outputs = architecture.width, architecture.knots + 1

        def normal(*shape):
            return nn.Parameter(torch.randn(*shape) / math.sqrt(shape[-1]))

        def zeros(*shape):
            return nn.Parameter(torch.zeros(*shape))

        self.first, self.second = normal(width, features), normal(width, width)
        self.last = zeros(outputs, width)
        self.middle, self.offset = zeros(width, 1), zeros(outputs, 1)
        self.level, self.size = zeros(levels, width, 1), zeros(SIZES, width, 1)

    def forward(
        self, features: Float[Tensor, "features sites"], step: Pass, twice: bool
    ) -> tuple[Float[Tensor, "outputs sites"], Float[Tensor, "outputs sites"]]:
        """The output, and with ``twice`` a second one without gradient in the parameters."""
        start = self.level[step.level] + self.size[step.size]
        weights = self.first, start, self.second, self.middle, self.last, self.offset
        if twice:
            return _Twice.apply(features, *weights)  # pyright: ignore[reportReturnType]
        hidden = silu(torch.addmm(start, self.first, features))
        hidden = silu(torch.addmm(self.middle, self.second, hidden))
        output = torch.addmm(self.offset, self.last, hidden)
        return output, output

    @torch.no_grad()
    def start_from(self, other: "Site") -> None:
        """Take the weights of another; levels that it lacks start from its coarsest."""
        for mine, theirs in zip(self.parameters(), other.parameters(), strict=True):
            if mine.shape != theirs.shape:
                theirs = theirs[torch.arange(len(mine)).clamp_max(len(theirs) - 1)]
            mine.copy_(theirs)


class _Twice(torch.autograd.Function):
    """The output returned twice; only the first passes gradients to the parameters."""

    @staticmethod
    def forward(ctx, x, first, start, second, middle, last, offset):
        a = torch.addmm(start, first, x)
        gate_a = a.sigmoid()
        h = a * gate_a
        b = torch.addmm(middle, second, h)
        gate_b = b.sigmoid()
        g = b * gate_b
        output = torch.addmm(offset, last, g)
        ctx.save_for_backward(x, first, second, last, a, gate_a, h, b, gate_b, g)
        return output, output.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *upstream):
        one, other = upstream
        x, first, second, last, a, gate_a, h, b, gate_b, g = ctx.saved_tensors
        slope_a, slope_b = (s * (1 + z * (1 - s)) for z, s in ((a, gate_a), (b, gate_b)))
        sites = x.shape[1]

        def both(weight, values, slope):  # the gradients of one, and of one and other together
            return (weight.T @ values).reshape(-1, 2, sites) * slope[:, None]

        at_b = both(last, torch.cat([one, one + other], 1), slope_b)
        at_a = both(second, at_b.reshape(-1, 2 * sites), slope_a)
        in_b, in_a = at_b[:, 0], at_a[:, 0]
        in_x = first.T @ at_a[:, 1] if ctx.needs_input_grad[0] else None
        return (
            in_x,
            in_a @ x.T,
            in_a.sum(1, keepdim=True),
            in_b @ h.T,
            in_b.sum(1, keepdim=True),
            one @ g.T,
            one.sum(1, keepdim=True),
        )

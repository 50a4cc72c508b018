"""Single sites at low temperature, where a lattice of angles is a Gaussian field."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from rkl.sample.lattice.ordering import Ordering

MIN_EIGENVALUE = (
    1e-10  # share of the largest eigenvalue at which neighbours are counted as the same
)


class Wave(NamedTuple):
    """The Gaussian of the sites of a pass at low temperature, given the sites they look at.

    Attributes:
        weights: Weights of the angles in its mean; they add up to 1.
        variance: Its variance over T/J.
    """

    weights: Float[Tensor, " near"]
    variance: float


def spin_waves(order: Ordering, ring_exchange: float = 0.0) -> list[Wave]:
    r"""The Gaussian at low temperature of the sites of each pass.

    At low T the energy is ½ θᵀ L θ, and a site is Gaussian given others, with

    E[θᵢ | θ_S] = Σ wₛ θₛ,  Σ wₛ = 1,  var = (T/J) (Gᵢᵢ − 2 Σ wₛ Gₛᵢ + Σ wₛ wᵣ Gₛᵣ),

    G being the pseudo-inverse of L and w of least variance; the sites of a pass may be integrated,
    or drawn later. All sites of a pass have the same weights.

    Args:
        order: The order in which sites are drawn.
        ring_exchange: K/J, 0 at least.

    >>> from rkl.sample.lattice.ordering import ordering
    >>> weights, variance = spin_waves(ordering(8, "half"))[-1]
    >>> weights[:4], round(variance, 4)
    (tensor([0.1667, 0.1667, 0.1667, 0.1667], dtype=torch.float64), 0.3333)
    """
    green, at, waves = _green(order, ring_exchange), 1, []
    for step in order.passes:
        waves.append(_krige(green, at, step.near[:, 0]))
        at += step.sites
    return waves


def _green(order: Ordering, ring: float) -> Float[Tensor, "sites sites"]:
    """The covariance of all rows at T = 1, up to what all angles turn by together."""
    side = round(len(order.site) ** 0.5)
    wave = 2 - 2 * (2 * torch.pi * torch.arange(side, dtype=torch.float64) / side).cos()
    across, down = wave[:, None], wave[None]
    stiffness = across + down + ring * across * down
    stiffness[0, 0] = torch.inf
    green = torch.fft.ifft2(1 / stiffness).real
    i, j = order.site // side, order.site % side
    return green[(i[:, None] - i) % side, (j[:, None] - j) % side]


def _krige(green: Tensor, row: int, near: Tensor) -> Wave:
    """Kriging: the least variance under the condition that the weights add up to 1."""
    count = len(near)
    matrix, right = green.new_ones(count + 1, count + 1), green.new_ones(count + 1)
    matrix[-1, -1], right[:-1] = 0, green[near, row]
    matrix[:-1, :-1] = green[near][:, near]
    inverse = torch.linalg.pinv(matrix, hermitian=True, rtol=MIN_EIGENVALUE)
    weights = (inverse @ right)[:-1]
    away = weights @ matrix[:-1, :-1] @ weights - 2 * weights @ right[:-1]
    return Wave(weights, float(green[row, row] + away))

"""Modes that particles met while they were cooled, and may have lost.

    ∫_R p dx = ⟨p/q⟩ over draws of q in R,    compared with Z × the share of particles in R

R is an ellipsoid about a maximum of p, and q the normal distribution with the curvature there. The
mean has no bias for any shape of p. If the share of particles in R is smaller than that of the
density, they have lost a mode.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from rkl.stats import Mean, mean

CLIMBS = 60  # steps of a search for a maximum with a gradient, or for each coordinate without
CANDIDATES = 16_384  # points from which is climbed, at most
TOPS = 256  # distinct maxima whose width is measured, the highest
CELL = 0.05  # standard deviations of the particles within which maxima are one for that
MODES = 16  # maxima that are looked at, those of the largest mass first
DRAWS = 1_024  # of each
MAX_SIZE = 64  # coordinates up to which modes are looked for
SAME = 1.0  # distance in standard deviations of a mode below which two maxima are one
DROP = 0.5  # nats by which the density falls within one step
FLATTEST = 0.05  # curvature, in units of that fall, below which a direction counts as flat
LOST = 0.01  # share of Z that may be missing
ERRORS = 6.0  # errors beyond that; those of eight islands are exceeded twice in 10,000


class LogDensity(NamedTuple):
    """A log-density in nats at points [*batch, coordinates], and its gradient.

    Attributes:
        value: The log-density [*batch], finite.
        slope: Both; None where there is no gradient.
        difference: From one point to another, by the shortest way.
    """

    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], tuple[Tensor, Tensor]] | None
    difference: Callable[[Tensor, Tensor], Tensor]


class LostMode(NamedTuple):
    """A mode that particles lack in part: its share of their Z, their share, and its place."""

    share: float
    particles: float
    x: Float[Tensor, " coordinates"]


def find_lost_mode(
    density: LogDensity,
    candidates: Float[Tensor, "candidates coordinates"],
    x: Float[Tensor, "islands particles coordinates"],
    log_z: Mean,
) -> LostMode | None:
    """The mode uphill from a candidate that particles lack most; None if they lack none.

    Args:
        density: The log-density, up to log Z.
        candidates: Points from which to climb.
        x: Particles of equal weight, in islands.
        log_z: Their log Z in nats.
    """
    scale = x.flatten(0, 1).std(0).clamp_min(1e-12)
    tops = _climb(density, candidates[:: -(-len(candidates) // CANDIDATES)], scale)
    tops = _distinct(tops, density.value(tops), scale)
    step = _steps(density, tops, scale)
    constant = tops.shape[1] / 2 * math.log(2 * math.pi)
    mass = (density.value(tops) + step.log().sum(1) + constant - log_z.value).to(tops)
    worst, seen = None, list[int]()
    for k in mass.argsort(descending=True).tolist():
        if len(seen) == MODES:
            break
        near = (density.difference(tops[k], tops[seen]) / step[seen]).abs().amax(-1)
        if (near < SAME).any():
            continue
        seen.append(k)
        share, particles_share, excess = _masses(density, tops[k], step[k], x, log_z)
        if excess > LOST and (
            worst is None or share - particles_share > worst.share - worst.particles
        ):
            worst = LostMode(share, particles_share, tops[k])
    return worst


def _climb(density: LogDensity, x: Tensor, scale: Tensor) -> Tensor:
    """Points uphill from these, by steps that grow where they succeed."""
    size = x.shape[1]
    length = torch.ones_like(x[:, :1])
    if density.slope is None:
        height = density.value(x)
        for _ in range(CLIMBS * size):
            new = x + length * scale * torch.randn_like(x) / math.sqrt(size)
            risen = density.value(new)
            better = (risen > height)[:, None]
            x, height = torch.where(better, new, x), torch.where(better[:, 0], risen, height)
            length = length * torch.where(better, 1.5, 0.85)
        return x
    height, slope = density.slope(x)
    for _ in range(CLIMBS):
        way = slope * scale
        way = way / way.norm(dim=1, keepdim=True).clamp_min(1e-30)
        new = x + length * scale * way
        risen, ahead = density.slope(new)
        better = (risen > height)[:, None]
        x, slope = torch.where(better, new, x), torch.where(better, ahead, slope)
        height = torch.where(better[:, 0], risen, height)
        length = length * torch.where(better, 1.5, 0.4)
    return x


def _distinct(tops: Tensor, height: Tensor, scale: Tensor) -> Tensor:
    """The highest of each cell, of the cells that have the highest."""
    order = height.argsort(descending=True)
    cells = (tops[order] / (CELL * scale)).round()
    _, cell = cells.unique(dim=0, return_inverse=True)
    first = torch.full((len(order),), len(order)).scatter_reduce(
        0, cell, torch.arange(len(order)), "amin"
    )
    return tops[order[first[first < len(order)].sort().values[:TOPS]]]


def _steps(density: LogDensity, x: Tensor, scale: Tensor) -> Tensor:
    """Along each coordinate, the step after which the density has fallen by DROP on both sides."""
    size = x.shape[1]
    top, axes = density.value(x), torch.eye(size, dtype=x.dtype)
    low, high = torch.full_like(x, -30.0), torch.zeros_like(x)
    for _ in range(30):
        middle = (low + high) / 2
        ways = (scale * middle.exp())[:, :, None] * axes  # [points, coordinates, coordinates]
        sides = torch.stack([density.value(x[:, None] + way) for way in (ways, -ways)])
        fallen = top[:, None] - sides.mean(0) > DROP
        low, high = torch.where(fallen, low, middle), torch.where(fallen, middle, high)
    return scale * high.exp()


def _covariance_root(density: LogDensity, x: Tensor, step: Tensor) -> Tensor:
    """A root of minus the inverse curvature at a point, from second differences."""
    size = len(x)
    ways = step * torch.eye(size, dtype=x.dtype)
    top = density.value(x[None])
    ahead, behind = density.value(x + ways), density.value(x - ways)
    pairs = density.value(x + ways[:, None] + ways[None])
    curvature = top + pairs - ahead[:, None] - ahead[None]
    curvature = torch.where(
        torch.eye(size, dtype=torch.bool), (ahead + behind - 2 * top).diag(), curvature
    )
    values, vectors = torch.linalg.eigh(-curvature.double().clamp(-1e6, 1e6))
    root = vectors * values.clamp_min(FLATTEST).rsqrt()
    return step[:, None] * root.to(x)


def _masses(
    density: LogDensity, top: Tensor, step: Tensor, x: Tensor, log_z: Mean
) -> tuple[float, float, float]:
    """The share of Z about a point, that of particles, and what is lacking beyond errors."""
    root, size = _covariance_root(density, top, step), len(top)
    within = size + 3 * math.sqrt(2 * size)  # of squared distances, whose mean is the size
    z = torch.randn(DRAWS, size, dtype=x.dtype)
    way = z @ root.T
    log_q = -z.square().sum(1) / 2 - size / 2 * math.log(2 * math.pi)
    log_q = log_q - torch.linalg.slogdet(root).logabsdet
    inside = z.square().sum(1) <= within
    inside &= (density.difference(top, top + way) - way).abs().amax(1) < 1e-6 * step.max()
    terms = torch.where(inside, (density.value(top + way) - log_q - log_z.value).exp(), 0.0)
    share = mean(terms)
    back = torch.linalg.solve(root, density.difference(top, x).flatten(0, 1).mT)
    inside_top = (back.square().sum(0) <= within).double().reshape(x.shape[:2]).mean(1)
    error = torch.stack(
        [share.error, share.value * log_z.error, inside_top.std() / math.sqrt(len(inside_top))]
    ).norm()
    lacking = share.value - inside_top.mean()
    return share.value.item(), inside_top.mean().item(), (lacking - ERRORS * error).item()

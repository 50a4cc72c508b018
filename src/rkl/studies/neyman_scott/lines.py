"""Errors in variables: a slope and a variance, from points with unknown places on a line.

x_i ~ N(ξ_i, σ²), y_i ~ N(β ξ_i, σ²): the unknown ξ_i grow in number with the data. With the line's
direction d = (cos φ, sin φ), β = tan φ, and places u_i = ξ_i / cos φ along it, everything given φ
and σ² is normal, and the data enter by their scatter matrix alone.

Source: Neyman and Scott (1948), Econometrica 16, whose second example it is.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rkl.studies.neyman_scott.acts import Estimates, Nodes, Posterior, peak, widths

SLOPE, SIGMA2, SPREAD = 1.0, 1.0, 4.0  # the truth, with ξ_i ~ N(0, SPREAD)
ANGLES, VARIANCES = 61, 101  # nodes in φ and in log σ²
BLOCK = 10  # data sets at once: arrays that fit a cache


@dataclass(frozen=True)
class Points:
    """Sufficient statistics, for many data sets: Σ x², Σ xy and Σ y² of the points."""

    xx: Estimates
    xy: Estimates
    yy: Estimates
    points: int

    def along(self, phi: Tensor) -> Tensor:
        """Σ (d·z)² over the points z, at angles [replications, nodes]."""
        c, s = phi.cos(), phi.sin()
        xx, xy, yy = (it[:, None] for it in (self.xx, self.xy, self.yy))
        return c * c * xx + 2 * s * c * xy + s * s * yy

    def across(self, phi: Tensor) -> Tensor:
        """Σ of the squared distances from the line."""
        return self.along(phi + math.pi / 2)

    def rows(self, chosen: Tensor) -> "Points":
        """Some of the data sets."""
        return Points(self.xx[chosen], self.xy[chosen], self.yy[chosen], self.points)


def simulate(points: int, replications: int, seed: int) -> Points:
    """Data sets from the truth above."""
    generator = torch.Generator().manual_seed(seed)
    shape = replications, points
    xi, e, f = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    x, y = SPREAD**0.5 * xi + SIGMA2**0.5 * e, SLOPE * SPREAD**0.5 * xi + SIGMA2**0.5 * f
    return Points(x.square().sum(1), (x * y).sum(1), y.square().sum(1), points)


@dataclass(frozen=True)
class Prior:
    """p(v) ∝ v^-(power + half N) for v = σ², flat in the angle, and a distribution of the places.

    Attributes:
        power: The exponent at N = 0.
        half: 1/2 for Jeffreys' rule.
        tilt: The exponent of cos φ per point: 1 where the ξ_i, not the u_i, are flat.
        spread: Variance of the normal distribution of the ξ_i; infinite if they are flat.
    """

    power: float = 1.0
    half: float = 0.0
    tilt: float = 0.0
    spread: float = math.inf

    def log_density(self, data: Points, phi: Tensor, log_v: Tensor, *, mode: bool) -> Tensor:
        """Of φ and log σ², the places integrated out; or of φ and σ, the places at their best."""
        n, v = data.points, log_v.exp()
        power = self.power + self.half * n
        whole = -data.across(phi) / (2 * v) + n * self.tilt * phi.cos().abs().log()
        whole = whole - (power + n - 0.5 if mode else power + n / 2 - 1) * log_v
        if math.isinf(self.spread):
            return whole
        prior = self.spread / phi.cos().square()  # variance of the u_i
        volume = prior if mode else prior + v
        return whole - data.along(phi) / (2 * (prior + v)) - n / 2 * volume.log()


PRIORS: Mapping[str, Prior] = {
    "flat along the line, 1/σ": Prior(),
    "flat in x, 1/σ": Prior(tilt=1.0),
    "Jeffreys' rule, σ^-(N+2)": Prior(power=1.5, half=0.5),
    "proper, x ~ N(0, 4)": Prior(spread=SPREAD),
    "proper but wrong, x ~ N(0, 1)": Prior(spread=1.0),
}


class Line:
    """The posterior of φ and σ², on nodes, and its acts."""

    def __init__(self, data: Points, prior: Prior):
        def height(phi: Tensor, log_v: Tensor) -> Tensor:
            return prior.log_density(data, phi, log_v, mode=False)

        self.data = data
        top = peak(height, _begin(data), 1.5)
        unit = widths(height, top)
        half = (24 * unit[:, 0]).clamp_max(math.pi / 2)  # no angle is further; few points need it
        turn = (torch.arange(ANGLES, dtype=torch.float64) + 0.5) / ANGLES * 2 - 1
        up = torch.linspace(-8, 14, VARIANCES, dtype=torch.float64)
        phi = top[:, :1, None] + half[:, None, None] * turn[:, None]
        log_v = top[:, 1:, None] + unit[:, 1:, None] * up
        shape = len(top), ANGLES, VARIANCES
        self.phi, log_v = (it.expand(shape).flatten(1) for it in (phi, log_v))
        self.v, weight = log_v.exp(), height(self.phi, log_v).softmax(1)
        self.cos, self.sin = self.phi.cos(), self.phi.sin()
        self.along = data.along(self.phi)
        spread = prior.spread / self.cos.square()
        self.shrink = 1 / (1 + self.v / spread)  # E[u | v] = shrink (d·z), of variance shrink v
        step = unit[:, 1] * (up[1] - up[0])
        self.posterior = Posterior(self.v, weight, step, self._misfit)

    def _means(self, w: Nodes) -> tuple[Tensor, Estimates]:
        """M with E[μ_i] = M z_i under weights w, and the angle of the line nearest to them."""
        w = self.posterior.weight * w
        w = self.shrink * w / w.sum(1, keepdim=True)
        c, s, data = self.cos, self.sin, self.data
        xx, xy, yy = ((w * it).sum(1) for it in (c * c, c * s, s * s))
        m = torch.stack([torch.stack([xx, xy], 1), torch.stack([xy, yy], 1)], 1)
        scatter = m @ _matrix(data) @ m
        return m, _top_angle(scatter[:, 0, 0], scatter[:, 0, 1], scatter[:, 1, 1])

    def _misfit(self, w: Nodes) -> Nodes:
        """E[Σ (μ - m)² | φ, v] / 2N."""
        m, angle = self._means(w)
        e = torch.stack([angle.cos(), angle.sin()], 1)
        projected = (_matrix(self.data) @ m @ e[:, :, None])[..., 0]  # S M e
        own = (e * (m @ projected[:, :, None])[..., 0]).sum(1)  # e' M S M e
        across = self.cos * projected[:, :1] + self.sin * projected[:, 1:]  # d' S M e
        turned = self.cos * e[:, :1] + self.sin * e[:, 1:]  # d' e
        second = self.shrink.square() * self.along + self.data.points * self.shrink * self.v
        return (second - 2 * self.shrink * turned * across + own[:, None]) / (2 * self.data.points)

    def slope(self, act: str, t: Estimates) -> Estimates:
        """The slope of an act whose variance is t."""
        return self._means(self.posterior.emphasis(act, t))[1].tan()


def _begin(data: Points) -> Tensor:
    angle = _top_angle(data.xx, data.xy, data.yy)
    return torch.stack([angle, (data.across(angle[:, None])[:, 0] / data.points).log()], 1)


def _matrix(data: Points) -> Tensor:
    rows = torch.stack([data.xx, data.xy], 1), torch.stack([data.xy, data.yy], 1)
    return torch.stack(rows, 1)


def _top_angle(xx: Tensor, xy: Tensor, yy: Tensor) -> Tensor:
    """Of the axis along which a scatter is widest."""
    return torch.atan2(2 * xy, xx - yy) / 2


Pairs = dict[str, tuple[Estimates, Estimates]]


def classical(data: Points) -> Pairs:
    """Estimates of the slope and of σ² without a prior.

    Maximum likelihood fits every place; the marginal likelihood has integrated them over
    N(0, τ²), which is fitted with the rest: the same line, and twice the variance.
    """
    angle = _top_angle(data.xx, data.xy, data.yy)
    across = data.across(angle[:, None])[:, 0]
    none = torch.full_like(across, math.nan)
    return {
        "least squares": (data.xy / data.xx, none),
        "maximum likelihood": (angle.tan(), across / (2 * data.points)),
        "marginal likelihood": (angle.tan(), across / data.points),
    }


def bayesian(data: Points, prior: Prior) -> Pairs:
    """Estimates of the slope and of σ² from a posterior."""
    blocks = torch.arange(len(data.xx)).split(BLOCK)
    parts = [_bayesian(data.rows(it), prior) for it in blocks]
    return {
        name: (torch.cat([it[name][0] for it in parts]), torch.cat([it[name][1] for it in parts]))
        for name in parts[0]
    }


def _bayesian(data: Points, prior: Prior) -> Pairs:
    best = peak(lambda *at: prior.log_density(data, *at, mode=True), _begin(data), 1.5)
    line = Line(data, prior)
    angle = line.posterior.mean(line.phi)
    estimates: Pairs = {"MAP in places, angle, σ": (best[:, 0].tan(), best[:, 1].exp())}
    estimates["posterior mean of the angle, of σ²"] = angle.tan(), line.posterior.mean(line.v)
    acts = line.posterior.acts()
    return estimates | {name: (line.slope(name, t), t) for name, t in acts.items()}

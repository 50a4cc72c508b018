"""Quadrature over lines, half-lines, intervals, circles and counts, in panels that are halved."""

import functools
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from numpy.polynomial import legendre
from torch import Tensor
from torch.distributions import Distribution

from rkl.bayes.model import NUMBERS
from rkl.divergences import FDivergence
from rkl.stats import interpolated_quantile

ORDER, COARSE = 16, 11  # nodes per panel, and those of the poorer rule, for the error
MAX_SINGLE = 64  # whole numbers of a panel that are summed one by one
MAX_NODES = 2**13  # nodes in all
ROUNDED = 1e-8  # relative error of an integral that may be left to rounding
UNDERFLOW_LOG_MASS = -690.0  # of a mass, 1e-300, whose second derivatives may overflow
REACH = 340.0  # of a coordinate: the square of its hyperbolic sine must not overflow


@dataclass(frozen=True)
class Line:
    """A coordinate u of a one-dimensional support, in which tails are short; and the way back."""

    kind: Literal["real", "above", "between", "circle", "counts"]
    origin: Tensor  # [*batch]
    length: Tensor

    def point(self, u: Float[Tensor, " n"]) -> tuple[Tensor, Tensor]:
        """The points x and log dx/du, [n, *batch] each."""
        u = u.reshape(-1, *[1] * self.origin.ndim)
        logistic = torch.nn.functional.logsigmoid
        match self.kind:
            case "real":
                shape = u.sinh()
                slope = u.abs() + (-2 * u.abs()).exp().log1p() - math.log(2)
            case "above":
                shape, slope = u.exp(), u
            case "between":
                shape, slope = u.sigmoid(), logistic(u) + logistic(-u)
            case _:
                shape, slope = u, torch.zeros_like(u)
        return self.origin + self.length * shape, self.length.abs().log() + slope

    def coordinate(self, x: Tensor) -> Tensor:
        """The coordinates of points [n, *batch]."""
        scaled = (x - self.origin) / self.length
        back = {"real": torch.asinh, "above": torch.log, "between": torch.logit}
        return back[self.kind](scaled).clamp(-REACH, REACH) if self.kind in back else scaled

    @property
    def ends(self) -> tuple[float, float]:
        """The range of u within which x is not rounded to its limits, and its square finite."""
        if self.kind in ("circle", "counts"):
            return (-math.pi, math.pi) if self.kind == "circle" else (0.0, 2.0**50)
        rounding = 1e-16 * (self.origin / self.length).abs().max().item()
        low = math.log(rounding) if rounding and self.kind != "real" else -REACH
        return max(low, -REACH), 36.0 if self.kind == "between" else REACH

    @property
    def noise(self) -> float:
        """Relative error of a density from the rounding of x."""
        continuous = self.kind not in ("circle", "counts")
        return 4e-16 * (self.origin / self.length).abs().max().item() if continuous else 0.0


def line_of(
    lower: Tensor | None,
    upper: Tensor | None,
    kind: Literal["circle", "counts", "line"],
    sample: Float[Tensor, "n *batch"],
) -> Line:
    """The coordinate of a support with these ends [*batch], of which a sample is at hand."""
    flat, shape = sample.reshape(len(sample), -1), sample.shape[1:]
    quarters = (interpolated_quantile(flat, at).reshape(shape) for at in (0.25, 0.5, 0.75))
    low, middle, high = quarters
    zero, tiny = torch.zeros_like(middle), torch.finfo(middle.dtype).tiny
    if kind == "circle":
        return Line("circle", zero, zero + 1)
    if lower is None and upper is not None:
        return Line("above", upper, (middle - upper).clamp_max(-tiny))  # u runs downwards
    if lower is None:
        return Line("real", middle, ((high - low) / 2).clamp_min(tiny))
    if kind == "counts":
        return Line("counts", lower, zero + 1)
    if upper is not None:
        return Line("between", lower, upper - lower)
    return Line("above", lower, (middle - lower).clamp_min(tiny))


@dataclass(frozen=True)
class Panels:
    """Panels of a line, settled: their edges [n, 2] in its coordinate."""

    line: Line
    edges: Float[Tensor, "n 2"]

    @property
    def is_full(self) -> bool:
        """True if a further split would exceed the maximum number of nodes."""
        return ORDER * len(self.edges) >= MAX_NODES

    def rule(self, order: int) -> tuple[Tensor, Tensor, Tensor]:
        """The coordinates, the points x and the log weights [n, *batch] of a rule."""
        u, weight, _ = _rule(self.line, self.edges, order)
        x, log_slope = self.line.point(u)
        return u, x, log_slope + weight.log().reshape(-1, *[1] * (x.ndim - 1))


def refine_panels(
    law: Distribution, line: Line, sample: Tensor, divergence: FDivergence, every: bool
) -> Panels:
    r"""Panels in which the totals of distributions, and the divergences between them, stand.

    A panel is halved until its halves change nothing. Panels begin between quantiles of the
    sample [n, distributions, *batch], none with more than a quarter of what was drawn of any
    distribution. Kinks are met to the last only if these are ``every`` distribution; those of
    others will lie elsewhere.
    """
    most = max(1, NUMBERS // (ORDER * law.batch_shape.numel()))  # panels at a time

    def integrate(edges):
        parts = edges.split(most)
        return torch.cat([_integrals(law, line, divergence, part) for part in parts])

    smooth = not has_kinks(divergence)
    asked = 1e-13 if smooth else 1e-11 if every else 1e-7
    tolerance = max(asked, line.noise)
    places = line.coordinate(sample)
    waiting = _first(line, places, *_reach(law, line, places))
    integrals, done = integrate(waiting), []
    before, rounded = (
        torch.full_like(integrals, math.inf),
        torch.zeros_like(integrals, dtype=torch.bool),
    )
    total = integrals.sum(0).abs().clamp_min(1.0)
    room = MAX_NODES // ORDER - len(waiting)  # for further panels
    for _ in range(60):
        middle = waiting.mean(-1)
        middle = middle.floor() if line.kind == "counts" else middle
        halves = torch.stack([waiting[:, 0], middle, middle, waiting[:, 1]], -1).reshape(-1, 2)
        parts = integrate(halves).unflatten(0, (-1, 2))
        gap = (parts.sum(1) - integrals).abs() / total
        # What no halving makes smaller is rounding, unless it is a kink.
        rounded |= (gap < ROUNDED * smooth) & (gap > 0.3 * before)
        settled = ((gap <= tolerance) | rounded).all(-1) | _exact(line, waiting)
        again = gap.amax(-1).masked_fill(settled, -1.0).topk(min(room, len(gap))).indices
        again = again[~settled[again]]  # the worst, where there is no room for all
        mask = torch.ones_like(settled).index_fill(0, again, False)
        done.append(waiting[mask])
        waiting = halves.unflatten(0, (-1, 2))[again].flatten(0, 1)
        integrals = parts[again].flatten(0, 1)
        before, rounded = (x[again].repeat_interleave(2, 0) for x in (gap, rounded))
        room -= len(again)
        if not len(waiting) or room <= 0:
            break
    edges = torch.cat([*done, waiting])
    return Panels(line, edges[edges[:, 0].argsort()])


@functools.cache
def has_kinks(divergence: FDivergence) -> bool:
    """True if the slope of F jumps, so that second derivatives miss curvature of E F."""
    jumps = []
    for steps in (2_000, 4_000):
        t = torch.linspace(-7.0, 7.1, steps, dtype=torch.float64).requires_grad_()
        with torch.enable_grad():
            total = divergence.integrand(torch.zeros_like(t), t).sum()
            (slope,) = torch.autograd.grad(total, t)
        size = 1 + t.detach().exp() + slope.abs()
        jumps.append((slope.diff().abs() / size[1:]).max())
    return bool(jumps[1] > 0.75 * jumps[0])


def _integrals(law: Distribution, line: Line, divergence: FDivergence, edges: Tensor) -> Tensor:
    """The integrand over each panel: [panels, tests]. Infinite tests are left out as 0."""
    u, weight, panel = _rule(line, edges, ORDER)
    x, log_slope = line.point(u)
    logs = law.log_prob(x.unsqueeze(1)) + log_slope.unsqueeze(1)
    logs = (logs + weight.log().reshape(-1, *[1] * (logs.ndim - 1))).transpose(0, 1)
    tests = [logs.exp()]
    if len(logs) > 1:
        other = logs.roll(1, 0)
        tests += [divergence.excess(logs, other), divergence.excess(other, logs)]
    every = torch.cat(tests).transpose(0, 1).flatten(1).nan_to_num(0, 0, 0)
    return every.new_zeros(len(edges), every.shape[1]).index_add_(0, panel, every)


def _reach(law: Distribution, line: Line, places: Tensor) -> tuple[float, float]:
    """The distance in u within which any of the distributions has mass."""
    low, high = places.min().item(), places.max().item()
    if line.kind == "circle":
        return line.ends
    whole = line.kind == "counts"
    ends = []
    for side, at, limit in zip((-1, 1), (low, high), line.ends, strict=True):
        step = 1 + (high - low) // 8 if whole else 0.5
        while side * at < side * limit and _peak(law, line, at) > UNDERFLOW_LOG_MASS:
            at, step = at + side * step, (2 * step if whole else 1.5 * step)
        ends.append(side * min(side * at, side * limit))
    return ends[0], ends[1] + whole


def _peak(law: Distribution, line: Line, u: float) -> float:
    x, log_slope = line.point(torch.tensor([u], dtype=torch.float64))
    logs = law.log_prob(x.unsqueeze(1)) + log_slope.unsqueeze(1)
    return logs.nan_to_num(-math.inf).max().item()


def _first(line: Line, places: Tensor, low: float, high: float) -> Tensor:
    drawn = places.flatten(1)
    # NumPy's, as the quantile of torch takes no more than 2^24 numbers
    edges = torch.from_numpy(np.quantile(drawn.numpy(), np.linspace(0, 1, 17))).clamp(low, high)
    edges = torch.cat([edges.new_tensor([low, high]), edges])
    edges = (edges.floor() if line.kind == "counts" else edges).unique()
    for _ in range(50):
        place = torch.searchsorted(edges, drawn, right=True).clamp(1, len(edges) - 1) - 1
        counts = torch.zeros(len(edges) - 1, drawn.shape[1])
        counts.scatter_add_(0, place, torch.ones(drawn.shape))
        finest = MAX_SINGLE if line.kind == "counts" else 1e-12
        crowded = (counts > len(drawn) / 4).any(-1) & (edges.diff() > finest)
        if not crowded.any() or len(edges) > MAX_NODES // ORDER // 2:
            break
        middles = (edges[:-1] + edges[1:])[crowded] / 2
        middles = middles.floor() if line.kind == "counts" else middles
        edges = torch.cat([edges, middles]).sort().values
    return torch.stack([edges[:-1], edges[1:]], -1)


def _exact(line: Line, edges: Tensor) -> Tensor:
    """Mask of the panels that are summed one by one."""
    return (edges.diff(dim=-1)[:, 0] <= MAX_SINGLE) & (line.kind == "counts")


def _rule(line: Line, edges: Tensor, order: int) -> tuple[Tensor, Tensor, Tensor]:
    if line.kind == "counts":
        widths = edges.diff(dim=-1)[:, 0].long().tolist()
        rules = [_summing(width, order) for width in widths]
        sizes = torch.tensor([len(k) for k, _ in rules])
        panel = torch.arange(len(edges)).repeat_interleave(sizes)
        places = torch.cat([k for k, _ in rules]) + edges[panel, 0]
        return places, torch.cat([w for _, w in rules]), panel
    nodes, weights = map(torch.from_numpy, legendre.leggauss(order))
    middle, half = edges.mean(-1, keepdim=True), edges.diff(dim=-1) / 2
    panel = torch.arange(len(edges)).repeat_interleave(order)
    return (middle + half * nodes).flatten(), (half * weights).flatten(), panel


@functools.lru_cache(4096)
def _summing(width: int, order: int) -> tuple[Tensor, Tensor]:
    r"""Whole numbers k and weights w with Σ w f(k) = Σ f over 0 … width − 1 for polynomials.

    The numbers next to the Gauss-Legendre nodes, for polynomials of as many coefficients; their
    weights come out positive. Few numbers are summed one by one.
    """
    if width <= MAX_SINGLE:
        return torch.arange(width).double(), torch.ones(width, dtype=torch.float64)
    k = np.round((legendre.leggauss(order)[0] + 1) / 2 * width - 0.5)
    degree, spacing = np.arange(order), 2 / width
    if width <= 2**14:
        every = (2 * np.arange(width) + 1 - width) / width
        sums = legendre.legvander(every, order - 1).sum(0)
    else:  # Euler and Maclaurin's: the integral, less h²/24 times the difference of the slopes
        slopes = degree * (degree + 1) / 2 * (1 - (-1.0) ** (degree + 1))
        sums = width / 2 * (2.0 * (degree == 0) - spacing**2 / 24 * slopes)
    at = legendre.legvander((2 * k + 1 - width) / width, order - 1)
    return torch.from_numpy(k), torch.from_numpy(np.linalg.solve(at.T, sums))

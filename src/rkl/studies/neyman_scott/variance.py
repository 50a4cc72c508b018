"""One variance from many small groups whose means are unknown, by every estimator.

x_nj ~ N(μ_n, σ²), J_n observations in each of N groups: the number of unknown means grows with the
data. What is computed is exact but for the quadrature over σ² (and, in the hierarchical prior,
over τ²), for given those every mean has a normal posterior.

Source: Neyman and Scott (1948), Econometrica 16; Brand (2017), arXiv 1707.06366.
"""

import abc
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from rkl.studies.neyman_scott.acts import Estimates, Nodes, Posterior, grid, peak

DESIGNS = {"J = 2": (2,), "J = 2, 3, 5, 10": (2, 3, 5, 10)}
SIGMA2, TAU2 = 1.0, 9.0  # the truth: σ², and μ_n ~ N(0, TAU2)
VARIANCES = 601  # nodes in log σ²
COARSE, SPREADS = 301, 29  # in log σ² and log τ², where both are on nodes
BLOCK = 10  # data sets at once on nodes of both: arrays that fit a cache


@dataclass(frozen=True)
class Groups:
    """Sufficient statistics, for many data sets: groups of one size make a class.

    Attributes:
        size: J of each class.
        count: Groups in each class.
        within: Σ (x - group mean)².
        total: Σ group means, class by class.
        square: Σ squared group means, class by class.
    """

    size: Float[Tensor, " classes"]
    count: Float[Tensor, " classes"]
    within: Estimates
    total: Float[Tensor, "replications classes"]
    square: Float[Tensor, "replications classes"]

    @property
    def groups(self) -> int:
        """N."""
        return int(self.count.sum())

    @property
    def observations(self) -> int:
        """K, the sum of the J."""
        return int((self.size * self.count).sum())

    def rows(self, chosen: Tensor) -> "Groups":
        """Some of the data sets."""
        drawn = self.within[chosen], self.total[chosen], self.square[chosen]
        return Groups(self.size, self.count, *drawn)


def observations(
    size: int, groups: int, replications: int, generator: torch.Generator
) -> Float[Tensor, "replications groups size"]:
    """Data sets of groups of one size, from the truth above."""
    shape = replications, groups, size
    mu = TAU2**0.5 * torch.randn(*shape[:2], 1, generator=generator, dtype=torch.float64)
    return mu + SIGMA2**0.5 * torch.randn(shape, generator=generator, dtype=torch.float64)


def statistics(classes: Sequence[Float[Tensor, "replications _ _"]]) -> Groups:
    """Sufficient statistics from the observations of each class."""
    means = [x.mean(2) for x in classes]
    scatter = [(x - x.mean(2, keepdim=True)).square().sum((1, 2)) for x in classes]
    size, count = (
        torch.tensor([x.shape[axis] for x in classes], dtype=torch.float64) for axis in (2, 1)
    )
    total = torch.stack([it.sum(1) for it in means], 1)
    square = torch.stack([it.square().sum(1) for it in means], 1)
    return Groups(size, count, torch.stack(scatter).sum(0), total, square)


def simulate(sizes: tuple[int, ...], groups: int, replications: int, seed: int) -> Groups:
    """Data sets of groups whose sizes take turns."""
    generator = torch.Generator().manual_seed(seed)
    counts = [len(range(k, groups, len(sizes))) for k in range(len(sizes))]
    pairs = zip(sizes, counts, strict=True)
    return statistics([observations(*it, replications, generator) for it in pairs])


class Level:
    """Given v and τ²: μ_n ~ N(m, τ²), m ~ N(0, τ²/κ), and all that follows is normal.

    E[μ_n | v, τ², data] = slope x̄_n + shift.
    """

    def __init__(self, data: Groups, v: Tensor, tau2: Tensor, kappa: float):
        self.data, self.kappa = data, kappa
        self.noise, self.tau2 = v[..., None] / data.size, tau2[..., None]
        self.w = 1 / (self.tau2 + self.noise)  # the precision of a group mean about m
        self.held = (self.w * data.count).sum(-1, keepdim=True)
        self.precision = kappa / self.tau2 + self.held  # of m
        self.m = (self.w * data.total[:, None]).sum(-1, keepdim=True) / self.precision
        self.slope = self.tau2 * self.w
        self.shift = (1 - self.slope) * self.m

    def fit(self) -> Tensor:
        """The exponent that is left when all means are at their best."""
        data = self.data
        return -0.5 * (self.w * (data.square[:, None] - self.m * data.total[:, None])).sum(-1)

    def volume(self) -> Tensor:
        """The term from integrating out the means."""
        return 0.5 * (self.w.log() * self.data.count).sum(-1)

    def level(self) -> Tensor:
        """The term from integrating out m."""
        return -0.5 * (self.held * self.tau2 / self.kappa).log1p()[..., 0]

    def square(self) -> Tensor:
        """Σ J E[μ²] / K."""
        data, a, b = self.data, self.slope, self.shift
        variance = a * self.noise + (1 - a).square() / self.precision
        means = a.square() * data.square[:, None] + 2 * a * b * data.total[:, None]
        each = means + data.count * (b.square() + variance)
        return each @ (data.size / data.observations)


@dataclass(frozen=True)
class Prior(abc.ABC):
    """p(v) ∝ v^-(power + half N) e^(-scale/v) for v = σ², and a distribution of the means.

    A prior has the likelihood with the means integrated out (``marginal``) or at their best
    (``profile``), and their distribution given v (``given``).

    Attributes:
        power: The exponent at N = 0.
        scale: Scale of 1/v; 0 makes the prior improper.
        half: 1/2 for Jeffreys' rule, whose power grows with the number of means.
    """

    power: float = 1.0
    scale: float = 0.0
    half: float = 0.0

    def exponent(self, data: Groups) -> float:
        """Of 1/v in the prior density of v."""
        return self.power + self.half * data.groups

    @abc.abstractmethod
    def posterior(self, data: Groups) -> Posterior:
        """Of v, on nodes."""

    @abc.abstractmethod
    def mode(self, data: Groups, jacobian: float) -> Estimates:
        """The v at the highest density of (μ, φ(v)), where dv/dφ ∝ v^jacobian."""

    def log_within(self, data: Groups, log_v: Tensor, power: float) -> Tensor:
        """The log of v^-power e^(-(S/2 + scale)/v)."""
        return -power * log_v - (data.within[:, None] / 2 + self.scale) * (-log_v).exp()

    def middle(self, data: Groups) -> Estimates:
        """About where log v lies."""
        return (data.within / (data.observations - data.groups)).log()


def _misfit(data: Groups, slope: Tensor, shift: Tensor, square: Nodes, weight: Nodes):
    """E[Q | v] where E[μ_n | v] = slope x̄_n + shift and Σ J E[μ² | v] / K = square."""
    share = data.size * data.count / data.observations
    first, second = data.total / data.count, data.square / data.count

    def inner(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
        """Σ J (a x̄ + b)(c x̄ + d) / K."""
        s = second[:, None] * a * c + first[:, None] * (a * d + b * c) + b * d
        return s @ share

    def misfit(w: Nodes) -> Nodes:
        mass = (weight * w / (weight * w).sum(1, keepdim=True))[:, None]  # [R 1 nodes]
        a, b = mass @ slope.expand(*square.shape, -1), mass @ shift.expand(*square.shape, -1)
        return square - 2 * inner(slope, shift, a, b) + inner(a, b, a, b)

    return misfit


@dataclass(frozen=True)
class Flat(Prior):
    """Flat over the means."""

    def posterior(self, data: Groups) -> Posterior:
        freedom = (data.observations - data.groups) / 2

        def height(log_v: Tensor) -> Tensor:
            return self.log_within(data, log_v, freedom + self.exponent(data) - 1)

        (log_v,), step = grid(height, self.middle(data)[:, None], 9.0, (VARIANCES,))
        v, weight = log_v.exp(), height(log_v).softmax(1)
        one, none = torch.ones(1, 1, len(data.size)), torch.zeros(1, 1, len(data.size))
        means = (data.square @ (data.size / data.observations))[:, None]
        square = means + v * data.groups / data.observations
        misfit = _misfit(data, one.double(), none.double(), square, weight)
        return Posterior(v, weight, step[:, 0], misfit)

    def mode(self, data: Groups, jacobian: float) -> Estimates:
        power = data.observations / 2 + self.exponent(data) - jacobian
        return (data.within / 2 + self.scale) / power


@dataclass(frozen=True)
class Fixed(Prior):
    """Means from N(0, spread)."""

    spread: float = 1.0

    def _given(self, data: Groups, v: Tensor) -> Level:
        return Level(data, v, torch.full_like(v, self.spread), math.inf)

    def posterior(self, data: Groups) -> Posterior:
        power = (data.observations - data.groups) / 2 + self.exponent(data) - 1

        def height(log_v: Tensor) -> Tensor:
            given = self._given(data, log_v.exp())
            return given.fit() + given.volume() + self.log_within(data, log_v, power)

        (log_v,), step = grid(height, self.middle(data)[:, None], 9.0, (VARIANCES,))
        v, weight = log_v.exp(), height(log_v).softmax(1)
        given = self._given(data, v)
        misfit = _misfit(data, given.slope, given.shift, given.square(), weight)
        return Posterior(v, weight, step[:, 0], misfit)

    def mode(self, data: Groups, jacobian: float) -> Estimates:
        power = data.observations / 2 + self.exponent(data) - jacobian

        def height(log_v: Tensor) -> Tensor:
            return self._given(data, log_v.exp()).fit() + self.log_within(data, log_v, power)

        return peak(height, self.middle(data)[:, None], 9.0)[:, 0].exp()


@dataclass(frozen=True)
class Hierarchical(Prior):
    """Means from N(m, τ²), m from N(0, τ²/kappa), τ² from an inverse gamma distribution."""

    kappa: float = 0.01
    shape: float = 0.5
    rate: float = 9.0

    def posterior(self, data: Groups) -> Posterior:
        blocks = torch.arange(len(data.within)).split(BLOCK)
        parts = zip(*(self._on_nodes(data.rows(it)) for it in blocks), strict=True)
        v, weight, step, slope, shift, square = (torch.cat(it) for it in parts)
        return Posterior(v, weight, step, _misfit(data, slope, shift, square, weight))

    def _on_nodes(self, data: Groups) -> list[Tensor]:
        """v, its weights and their step; slope, shift and square given v, without τ²."""
        power = (data.observations - data.groups) / 2 + self.exponent(data) - 1

        def height(log_v: Tensor, log_tau2: Tensor) -> Tensor:
            given = Level(data, log_v.exp(), log_tau2.exp(), self.kappa)
            above = -self.shape * log_tau2 - self.rate * (-log_tau2).exp()
            within = self.log_within(data, log_v, power)
            return given.fit() + given.volume() + given.level() + above + within

        counts = COARSE, SPREADS
        (log_v, log_tau2), step = grid(height, self._middle(data), 9.0, counts)
        weight = height(log_v, log_tau2).softmax(1).unflatten(1, counts)
        share = weight / weight.sum(2, keepdim=True)
        given = Level(data, log_v.exp(), log_tau2.exp(), self.kappa)

        def over_spreads(values: Tensor) -> Tensor:
            return torch.einsum("rns,rns...->rn...", share, values.unflatten(1, counts))

        means = [over_spreads(it) for it in (given.slope, given.shift, given.square())]
        return [log_v.exp().unflatten(1, counts)[..., 0], weight.sum(2), step[:, 0], *means]

    def mode(self, data: Groups, jacobian: float) -> Estimates:
        """With τ² and m integrated out: p(μ) is a t density, a maximum over normal ones."""
        power = data.observations / 2 + self.exponent(data) - jacobian
        shape = self.shape + data.groups / 2

        def height(log_v: Tensor, log_tau2: Tensor) -> Tensor:
            given = Level(data, log_v.exp(), log_tau2.exp(), self.kappa)
            above = -shape * log_tau2 - self.rate * (-log_tau2).exp()
            return given.fit() + above + self.log_within(data, log_v, power)

        return peak(height, self._middle(data), 12.0)[:, 0].exp()

    def _middle(self, data: Groups) -> Tensor:
        middle = self.middle(data)
        return torch.stack([middle, torch.zeros_like(middle)], 1)


FLAT = Flat()

# The two that are improper, three that are proper in v, of which one is so in the means too.
PRIORS: Mapping[str, Prior] = {
    "reference, 1/σ": FLAT,
    "Jeffreys' rule, σ^-(N+1)": Flat(half=0.5),
    "skewed proper, σ² ~ IG(3, 6)": Flat(power=4.0, scale=6.0),
    "hierarchical, proper": Hierarchical(power=1.01, scale=0.01),
    "proper but wrong, μ ~ N(0, 1)": Fixed(),
}


def classical(data: Groups) -> dict[str, Estimates]:
    """Estimates of σ² without a prior.

    The conditional likelihood, given the group means, is that of the contrasts within groups;
    the marginal one has integrated the means over N(m, τ²), which is fitted with σ².
    """
    zero = torch.zeros_like(data.within)
    contrasts = (data.observations - data.groups) / 2

    def height(log_v: Tensor, log_tau2: Tensor) -> Tensor:
        given = Level(data, log_v.exp(), log_tau2.exp(), 0.0)
        return given.fit() + given.volume() + FLAT.log_within(data, log_v, contrasts)

    middle = torch.stack([(data.within / 2 / contrasts).log(), zero], 1)
    return {
        "maximum likelihood": data.within / data.observations,
        "conditional likelihood": data.within / (2 * contrasts),
        "marginal likelihood": peak(height, middle, 12.0)[:, 0].exp(),
    }


def bayesian(data: Groups, prior: Prior) -> dict[str, Estimates]:
    """Estimates of σ² from a posterior."""
    jacobians = {
        "MAP in σ": 0.5,
        "MAP in σ²": 0.0,
        "MAP in log σ": 1.0,
        "MAP in 1/σ²": 2.0,
        "Wallace-Freeman": data.groups / 2 + 1,  # 1 / √det of the Fisher information
    }
    modes = {name: prior.mode(data, it) for name, it in jacobians.items()}
    posterior = prior.posterior(data)
    return modes | posterior.moments() | posterior.acts()

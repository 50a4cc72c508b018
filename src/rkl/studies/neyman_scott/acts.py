r"""Bayes acts of many normal observations that share a variance, from its posterior on nodes.

All observations together are one distribution: K of them, of means μ and variance v. Between it
and an estimate of means m and variance t, with Q = Σ (μ - m)² / K,

    2/K KL(P_θ ‖ P_t) = (v + Q)/t - 1 + log(t/v),    2/K KL(P_t ‖ P_θ) = (t + Q)/v - 1 - log(t/v).

Whatever the divergence, the best m weighs the draws by some w(v), so that one function, Q given v
at the best m for w, holds all that an act needs to know of the means.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

Nodes = Float[Tensor, "replications nodes"]
Estimates = Float[Tensor, " replications"]

HALVINGS = 45  # of e^±3 in log t: to 1e-13


@dataclass(frozen=True)
class Posterior:
    """The posterior of the variance, on nodes, for many data sets side by side.

    Attributes:
        v: The variances.
        weight: Their probabilities, each row of sum 1.
        step: Distance of neighbouring nodes in log v.
        misfit: From weights w of the nodes to E[Q | v] at the means that are best for w.
    """

    v: Nodes
    weight: Nodes
    step: Float[Tensor, " replications"]
    misfit: Callable[[Nodes], Nodes]

    def mean(self, values: Nodes) -> Estimates:
        """The posterior mean of a function with these values at the nodes."""
        return (self.weight * values).sum(1)

    def below(self, t: Estimates) -> Nodes:
        """The share of each node that lies below t: its mass is spread over its step."""
        return (((t.log()[:, None] - self.v.log()) / self.step[:, None]) + 0.5).clamp(0, 1)

    def median(self) -> Estimates:
        """The posterior median of v."""
        return self._root(lambda t: self.mean(self.below(t)) - 0.5)

    def reverse(self) -> Estimates:
        """The variance of the reverse-KL act: natural parameters, 1/v and μ/v, are averaged."""
        return 1 / self.mean(1 / self.v)

    def forward(self) -> Estimates:
        """The variance of the forward-KL act: E[v] and the mean posterior variance of μ."""
        return self.mean(self.v + self.misfit(torch.ones_like(self.v)))

    def symmetric(self) -> Estimates:
        """The variance of the act of KL + reverse KL.

        Without logarithms it minimises E[v + Q]/t + t E[1/v] + E[Q/v]: the means at w = 1/t + 1/v
        and t² = E[v + Q] / E[1/v] in turn, each of which can only lower it.
        """
        v, precision = self.v, self.mean(1 / self.v)
        t, before = self.mean(v), torch.zeros_like(precision)
        while not torch.allclose(t, before, rtol=1e-12, atol=0):
            misfit = self.misfit(self.emphasis("symmetric KL", t))
            t, before = (self.mean(v + misfit) / precision).sqrt(), t
        return t

    def intrinsic(self) -> Estimates:
        """The variance of the act of the intrinsic loss, the smaller of the two KLs.

        KL(P_θ ‖ P_t) is the smaller one exactly where v < t, whatever the means: the difference
        of the two is (v/t - t/v - 2 log v/t) + Q (1/t - 1/v), both terms of one sign.
        """
        v = self.v

        def slope(t: Estimates) -> Estimates:
            below, q, t = self.below(t), self.misfit(self.emphasis("intrinsic", t)), t[:, None]
            return self.mean(below * (1 - (v + q) / t) + (1 - below) * (t / v - 1))

        return self._root(slope)

    def _root(self, rising: Callable[[Estimates], Estimates]) -> Estimates:
        """Root of a function of t that rises, within a factor of e³ of the nodes."""
        low, high = self.v.amin(1).log() - 3, self.v.amax(1).log() + 3
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            right = rising(middle.exp()) > 0
            low, high = low.where(right, middle), middle.where(right, high)
        return ((low + high) / 2).exp()

    def acts(self) -> dict[str, Estimates]:
        """The variance of each act."""
        return {
            "forward KL": self.forward(),
            "symmetric KL": self.symmetric(),
            "intrinsic": self.intrinsic(),
            "reverse KL": self.reverse(),
        }

    def moments(self) -> dict[str, Estimates]:
        """Variances by the usual summaries of a posterior."""
        return {
            "posterior mean of σ²": self.mean(self.v),
            "posterior mean of σ, squared": self.mean(self.v.sqrt()).square(),
            "posterior median": self.median(),
        }

    def emphasis(self, act: str, t: Estimates) -> Nodes:
        """Weights of the nodes in the means of an act with variance t."""
        one, precision = 1 / t[:, None], 1 / self.v
        return {
            "forward KL": one.expand_as(self.v),
            "symmetric KL": one + precision,
            "intrinsic": torch.minimum(one, precision),
            "reverse KL": precision,
        }[act]


Height = Callable[..., Tensor]


def peak(
    height: Height, begin: Float[Tensor, "replications axes"], reach: float
) -> Float[Tensor, "replications axes"]:
    """The maximum of a function: a wide grid, then narrower ones about its highest point.

    Args:
        height: Takes one tensor per axis, [replications, points], and gives as many heights.
        begin: The middle of the wide grid.
        reach: Its half-width, along each axis.
    """
    points = 401 if begin.shape[1] == 1 else 61
    width = torch.tensor(reach, dtype=begin.dtype)
    while width > 1e-9:
        line = torch.linspace(-1, 1, points, dtype=begin.dtype)
        place = begin[:, None] + width * _mesh([line] * begin.shape[1])
        best = height(*place.unbind(-1)).argmax(1)
        begin = place[torch.arange(len(begin)), best]
        width = width * 4 / (points - 1)  # two steps to either side
        points = 13
    return begin


def _mesh(lines: list[Tensor]) -> Float[Tensor, "points axes"]:
    return torch.stack([it.flatten() for it in torch.meshgrid(lines, indexing="ij")], -1)


def grid(
    height: Height,
    begin: Float[Tensor, "replications axes"],
    reach: float,
    counts: tuple[int, ...],
    spread: tuple[float, float] = (-8.0, 14.0),
) -> tuple[list[Tensor], Float[Tensor, "replications axes"]]:
    """Nodes about the peak of a log density, evenly spaced: the trapezium rule is as good as
    exact on a smooth density that vanishes at both ends.

    Args:
        height: The log density, of which the peak's curvature along each axis gives the unit.
        begin: Same as in :func:`peak`.
        reach: Same as in :func:`peak`.
        counts: Nodes along each axis.
        spread: First and last node, in standard deviations from the peak.

    Returns:
        The nodes, one tensor [replications, nodes] per axis, and their steps.
    """
    top = peak(height, begin, reach)
    unit = widths(height, top)
    lines = [torch.linspace(*spread, n, dtype=begin.dtype) for n in counts]
    place = top[:, None] + unit[:, None] * _mesh(lines)
    steps = torch.tensor([(spread[1] - spread[0]) / (n - 1) for n in counts], dtype=begin.dtype)
    return list(place.unbind(-1)), unit * steps


def widths(
    height: Height, top: Float[Tensor, "replications axes"]
) -> Float[Tensor, "replications axes"]:
    """Along each axis, the standard deviation of the normal distribution that touches the peak."""
    deviations = []
    for axis in range(top.shape[1]):
        aside = torch.zeros(3, top.shape[1], dtype=top.dtype)
        aside[:, axis] = torch.tensor([-1e-3, 0.0, 1e-3])
        below, at, above = height(*(top[:, None] + aside).unbind(-1)).unbind(1)
        deviations.append(1e-3 / (2 * at - below - above).clamp_min(1e-9).sqrt())
    return torch.stack(deviations, 1)

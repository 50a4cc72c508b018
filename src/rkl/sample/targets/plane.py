"""Targets of few dimensions with known modes, draws and normaliser: mixtures and rings."""

import abc
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from rkl.checks import integer, number
from rkl.sample.targets.base import Condition, Modes, Target


class _Mixture(Target):
    """Σ masses N(x; centres, scale² I), normalised; the condition is the scale."""

    conditions = (Condition("scale", 0.1, 1.0, above=0.0),)

    @property
    @abc.abstractmethod
    def centres(self) -> Float[Tensor, "modes event"]:
        """The centre of each component."""

    @property
    def masses(self) -> Float[Tensor, " modes"]:
        """The mass of each component; they add up to 1."""
        return torch.full((len(self.centres),), 1 / len(self.centres), dtype=torch.float64)

    @property
    def event_shape(self):
        return (self.centres.shape[-1],)

    def log_prob(self, x, condition):
        self.check(x, condition)
        scale = condition[..., None, :]
        away = (x[..., None, :] - self.centres.to(x)) / scale
        constants = self.masses.log().to(x) - self.event_shape[0] * math.log(2 * math.pi) / 2
        terms = constants - away.square().sum(-1) / 2
        return terms.logsumexp(-1) - self.event_shape[0] * condition[..., 0].log()

    def sample(self, condition, shape=()):
        full = (*shape, *condition.shape[:-1])
        which = torch.multinomial(self.masses, math.prod(full), replacement=True)
        centres = self.centres[which].to(condition).reshape(*full, *self.event_shape)
        return centres + condition * torch.randn_like(centres)

    def log_normaliser(self, condition):
        return torch.zeros_like(condition[..., 0])

    def modes(self, x, condition):
        """The components; each x belongs to the nearest centre."""
        centres = self.centres.to(x)
        places = [
            ", ".join(f"{round(c, 3) + 0.0:.3g}" for c in centre) for centre in centres.tolist()
        ]
        names = tuple(f"at ({place})" for place in places)
        return Modes((x[..., None, :] - centres).norm(dim=-1).argmin(-1), names, centres)


@dataclass(frozen=True)
class GaussianMixture(_Mixture):
    """A mixture of Gaussians of one scale, which is the condition; modes, draws and Z are known.

    Args:
        means: The centre of each component, [components, dimensions].
        weights: Their masses, above 0; by default equal. They need not add up to 1.

    >>> target = GaussianMixture(means=((0.0,), (4.0,)))
    >>> target.log_prob(torch.tensor([0.0]), torch.tensor([1.0]))
    tensor(-1.6118)
    """

    means: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...] | None = None

    def __post_init__(self):
        if not self.means or len({len(mean) for mean in self.means}) != 1 or not self.means[0]:
            raise ValueError(f"means must be one point or more, of one length; got {self.means}.")
        for coordinate in sum(map(tuple, self.means), ()):
            number("means", coordinate)
        if self.weights is not None and len(self.weights) != len(self.means):
            raise ValueError(
                f"weights must be one for each of {len(self.means)} means; got {self.weights}."
            )
        for weight in self.weights or ():
            number("weights", weight, above=0)

    @property
    def centres(self):
        return torch.tensor(self.means, dtype=torch.float64)

    @property
    def masses(self):
        weights = torch.tensor(self.weights or (1.0,) * len(self.means), dtype=torch.float64)
        return weights / weights.sum()


@dataclass(frozen=True)
class MoG4(_Mixture):
    """Four equal Gaussians at the corners of a square; the condition is their scale.

    AdvNF's first toy (arXiv 2401.15948, section 4.1); centres are ``radius`` off either axis.

    >>> MoG4().centres[0]
    tensor([2., 2.], dtype=torch.float64)
    """

    radius: float = 2.0

    def __post_init__(self):
        number("radius", self.radius, above=0)

    @property
    def centres(self):
        r = self.radius
        return torch.tensor([(r, r), (r, -r), (-r, r), (-r, -r)], dtype=torch.float64)


@dataclass(frozen=True)
class MoG8(_Mixture):
    """Eight equal Gaussians on a circle; the condition is their scale.

    AdvNF's second toy (arXiv 2401.15948, section 4.1).

    >>> MoG8(radius=3.0).centres[0]
    tensor([3., 0.], dtype=torch.float64)
    """

    radius: float = 4.0

    def __post_init__(self):
        number("radius", self.radius, above=0)

    @property
    def centres(self):
        angle = torch.arange(8, dtype=torch.float64) * (math.pi / 4)
        return self.radius * torch.stack([angle.cos(), angle.sin()], -1)


@dataclass(frozen=True)
class Rings(Target):
    r"""Concentric rings, p(x) = Σ N(r; rₖ, scale²) / (2π r) / rings.

    The radii are spacing, 2 spacing, ...; the condition is the scale. All have the same mass but
    for what normal densities of r have below 0, 3e-7 of the first at scale = spacing/5.

    Source: V. Kanaujia et al. (2024), arXiv 2401.15948, section 4.1, its third toy.

    >>> Rings().log_prob(torch.tensor([1.0, 0.0]), torch.tensor([0.1]))
    tensor(-1.8405)
    """

    rings: int = 4
    spacing: float = 1.0

    conditions: ClassVar = (Condition("scale", 0.05, 0.2, above=0.0),)

    def __post_init__(self):
        integer("rings", self.rings, at_least=1)
        number("spacing", self.spacing, above=0)

    @property
    def event_shape(self):
        return (2,)

    @property
    def radii(self) -> Float[Tensor, " rings"]:
        """The radius of each ring."""
        return self.spacing * torch.arange(1, self.rings + 1, dtype=torch.float64)

    def log_prob(self, x, condition):
        self.check(x, condition)
        # The density has a pole at the origin; its log is kept finite there, and where it is
        # held no ring has mass.
        square = x.square().sum(-1).clamp_min((1e-3 * self.spacing) ** 2)
        r = square.sqrt()
        away = (r[..., None] - self.radii.to(x)) / condition
        constant = math.log(2 * math.pi) * 1.5 + math.log(self.rings)
        bells = (-away.square() / 2).logsumexp(-1)
        return bells - square.log() / 2 - condition[..., 0].log() - constant

    def sample(self, condition, shape=()):
        scale = condition[..., 0].expand(*shape, *condition.shape[:-1])
        r = torch.zeros_like(scale)
        while (beyond := r <= 0).any():  # of the first ring a share of 1/2 at most
            which = torch.randint(self.rings, r.shape)
            noise = torch.randn(r.shape, dtype=r.dtype)
            r = torch.where(beyond, self.radii.to(r)[which] + scale * noise, r)
        angle = 2 * math.pi * torch.rand_like(r)
        return r[..., None] * torch.stack([angle.cos(), angle.sin()], -1)

    def log_normaliser(self, condition):
        above = torch.special.log_ndtr(self.radii.to(condition) / condition)
        return above.logsumexp(-1) - math.log(self.rings)

    def modes(self, x, condition):
        """The rings; each x belongs to the nearest one."""
        apart = (x.norm(dim=-1, keepdim=True) - self.radii.to(x)).abs()
        names = tuple(f"ring of radius {r:.3g}" for r in self.radii.tolist())
        return Modes(apart.argmin(-1), names)

"""Moves of Markov chains: heat bath with over-relaxation, Metropolis, Wolff, random walk."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

from rkl.checks import LARGEST_COUNT, integer, number
from rkl.flows.architectures.circular import wrap_angles
from rkl.sample.lattice import circle
from rkl.sample.lattice.models import Rotors
from rkl.sample.targets.base import Kernel, Target, has_temperature
from rkl.sample.tempering import Points, random_walk, wrap


@dataclass(frozen=True)
class HeatBath:
    r"""Sites of the XY model, one colour after another, drawn anew given their neighbours.

    Given its neighbours a site is von Mises about the direction of its field H with
    concentration |H|/T, for any ring exchange. It gets one try of Best and Fisher's rejection
    sampler, taken two times in three or more often; a site whose try is rejected keeps its
    angle. Rejection does not depend on the angle, so the target stays invariant, and no site
    waits for another's second try. Over-relaxation mirrors every site at its field, at no change
    in energy: it moves far and costs little, and is ergodic only with the heat bath.

    Source: Best and Fisher (1979), Applied Statistics 28, 152; Creutz (1987), Phys. Rev. D 36,
    515, for over-relaxation.

    Args:
        over_relaxation: Sweeps of over-relaxation behind each sweep of the heat bath.
    """

    over_relaxation: int = 2

    def __post_init__(self):
        integer("over_relaxation", self.over_relaxation, at_least=0, at_most=LARGEST_COUNT)

    def move(
        self, target: Target, condition: Float[Tensor, "*batch conditions"], x: Tensor, sweeps: int
    ) -> Tensor:
        """The angles after some sweeps, each a heat bath and its over-relaxations."""
        updates = [_heat_bath, *[_over_relax] * self.over_relaxation]
        return _sweep(target, condition, x, updates * sweeps)


@dataclass(frozen=True)
class Metropolis:
    """Sites of the XY model, one colour after another, turned by a random angle or not.

    Source: Metropolis et al. (1953), J. Chem. Phys. 21, 1087.

    Args:
        step: The largest angle proposed, in radians.
    """

    step: float = 1.0

    def __post_init__(self):
        number("step", self.step, above=0)

    def move(
        self, target: Target, condition: Float[Tensor, "*batch conditions"], x: Tensor, sweeps: int
    ) -> Tensor:
        """The angles after some sweeps."""

        def turn(z: Tensor, field: Tensor, beta: Tensor) -> Tensor:
            angle = self.step * (2 * torch.rand_like(beta.expand(z.shape)) - 1)
            new = z * torch.polar(torch.ones_like(angle), angle)
            gain = beta * (field.conj() * (new - z)).real
            return torch.where(torch.rand_like(gain) < gain.exp(), new, z)

        return _sweep(target, condition, x, [turn] * sweeps)


@dataclass(frozen=True)
class Wolff:
    """One cluster of the XY model mirrored at a random direction; only without ring exchange.

    Source: Wolff (1989), Phys. Rev. Lett. 62, 361.
    """

    def move(
        self, target: Target, condition: Float[Tensor, "*batch conditions"], x: Tensor, sweeps: int
    ) -> Tensor:
        """The angles after as many clusters as there are sweeps."""
        lattice = _lattice(target)
        ring = lattice.ring(condition)
        if isinstance(ring, Tensor) or ring != 0:
            raise ValueError(
                f"target must have ring_exchange=0 for Wolff's clusters; got {target}: a mirror "
                "leaves no sum over plaquettes as it is but for a bond. HeatBath() is exact."
            )
        theta = x.unflatten(-1, (lattice.side, lattice.side))
        for _ in range(sweeps):
            theta = self._flip_cluster(lattice, condition[..., 0, None, None], theta)
        return wrap_angles(theta).flatten(-2)

    @staticmethod
    def _flip_cluster(lattice: Rotors, temperature: Tensor, theta: Tensor) -> Tensor:
        direction = 2 * math.pi * torch.rand_like(theta[..., :1, :1])
        along = (theta - direction).cos()
        bonds = []
        for axis in (-1, -2):  # a bond to the next site binds with probability 1 - exp(-2 J ss'/T)
            weight = 2 * lattice.coupling / temperature * along * along.roll(-1, axis)
            bonds.append(torch.rand_like(weight) < -torch.expm1(-weight))
        sites = torch.arange(lattice.side**2, device=theta.device)
        first = torch.rand_like(along[..., 0, 0]).mul(len(sites)).long()[..., None]
        cluster, size = (sites == first).unflatten(-1, theta.shape[-2:]), -1
        while size != (size := int(cluster.sum())):
            for axis, bond in zip((-1, -2), bonds, strict=True):
                cluster = cluster | (cluster & bond).roll(1, axis)
                cluster = cluster | (cluster.roll(-1, axis) & bond)
        return torch.where(cluster, math.pi + 2 * direction - theta, theta)


@dataclass(frozen=True)
class RandomWalk:
    """Metropolis with a Gaussian step of all coordinates together, for any target.

    Args:
        step: Standard deviation of the step of each coordinate, in the unit of x.
    """

    step: float = 0.5

    def __post_init__(self):
        number("step", self.step, above=0)

    def move(
        self, target: Target, condition: Float[Tensor, "*batch conditions"], x: Tensor, sweeps: int
    ) -> Tensor:
        """The states after some steps."""
        chart, axes = target.chart, len(target.event_shape)
        points = Points(x, target.log_prob(x, condition))

        def evaluate(new: Tensor) -> Points:
            if not chart.bounded:
                return Points(new, target.log_prob(new, condition))
            inside = chart.inside(new).flatten(new.ndim - axes).all(-1)
            wide = inside.reshape(*inside.shape, *[1] * axes)
            log_p = target.log_prob(torch.where(wide, new, points.x), condition)
            return Points(new, torch.where(inside, log_p, -math.inf))

        for _ in range(sweeps):
            points, _ = random_walk(points, evaluate, lambda it: it.log_p, self.step)
        return wrap(points.x, chart.circle.to(x.device))


class Colour(NamedTuple):
    """Sites no two of which share a bond or a plaquette, and where their neighbours are."""

    sites: Int[Tensor, " sites"]
    neighbours: Int[Tensor, "sites 4"]
    plaquettes: Int[Tensor, "sites 4 3"]  # two neighbours and the corner across


def _lattice(target: Any) -> Rotors:
    if not isinstance(target, Rotors):
        raise TypeError(f"target must be XY(...) for this move; got {target}. See RandomWalk().")
    return target


def colours(side: int, ring: bool, device: torch.device) -> list[Colour]:
    """Sites to be drawn together: two colours for bonds on an even side; else four, or nine."""
    line = torch.arange(side, device=device)
    stripe = line % 2
    stripe[-1] += 2 * (side % 2)  # the last of an odd side touches the first
    row, column = (it.flatten() for it in torch.meshgrid(line, line, indexing="ij"))
    colour = 3 * stripe[row] + stripe[column]
    if not ring and side % 2 == 0:
        colour = (row + column) % 2

    def beside(down: int, right: int) -> Tensor:
        return (row + down) % side * side + (column + right) % side

    ways = [(1, 0), (-1, 0), (0, 1), (0, -1)]
    neighbours = torch.stack([beside(*way) for way in ways], -1)
    corners = [(i, j) for i in (1, -1) for j in (1, -1)]
    plaquettes = torch.stack(
        [torch.stack([beside(i, 0), beside(0, j), beside(i, j)], -1) for i, j in corners], -2
    )
    classes = [(colour == it).nonzero().squeeze(-1) for it in colour.unique()]
    return [Colour(sites, neighbours[sites], plaquettes[sites]) for sites in classes]


def _sweep(target: Target, condition: Tensor, x: Tensor, updates: list[Callable]) -> Tensor:
    """Every colour by each update in turn; inside, angles are complex and walkers come last."""
    lattice = _lattice(target)
    shape, walkers = x.shape, x.shape[:-1]
    condition = condition.to(x).expand(*walkers, condition.shape[-1])
    ring = lattice.ring(condition)
    ring = ring.flatten() if isinstance(ring, Tensor) else ring
    beta = 1 / condition[..., 0].flatten()
    theta = x.reshape(-1, shape[-1]).mT.contiguous()
    z = torch.polar(torch.ones_like(theta), theta)
    rings = isinstance(ring, Tensor) or ring != 0
    classes = colours(lattice.side, rings, x.device)
    for update in updates:
        for colour in classes:
            near = colour.neighbours
            field = z[near[:, 0]] + z[near[:, 1]] + z[near[:, 2]] + z[near[:, 3]]
            field *= lattice.coupling
            if rings:
                field += ring * _of_plaquettes(z, colour.plaquettes)
            z[colour.sites] = update(z[colour.sites], field, beta)
    return z.angle().mT.reshape(shape)


def _of_plaquettes(z: Complex[Tensor, "sites walkers"], plaquettes: Tensor) -> Tensor:
    parts = [z[it[:, 0]] * z[it[:, 1]] * z[it[:, 2]].conj() for it in plaquettes.unbind(1)]
    return parts[0] + parts[1] + parts[2] + parts[3]


def _direction(field: Tensor) -> Tensor:
    return torch.where(field == 0, 1, field.sgn())


def _over_relax(z: Tensor, field: Tensor, beta: Tensor) -> Tensor:
    return _direction(field).square() * z.conj()


def _heat_bath(z: Tensor, field: Tensor, beta: Tensor) -> Tensor:
    turn, accepted = circle.von_mises_try(beta * field.abs())
    return torch.where(accepted, _direction(field) * turn, z)


def kernel_of_angles(target: Target) -> Kernel | None:
    """The kernel of a target of angles at a temperature, valid at any higher one; else None."""
    return target.kernel() if target.domain == "circle" and has_temperature(target) else None


def name_of(kernel: Kernel) -> str:
    """The name of a kernel's class in words.

    >>> name_of(HeatBath())
    'heat bath'
    """
    return re.sub("(?<=[a-z0-9])(?=[A-Z])", " ", type(kernel).__name__).lower()


def check_kernel(name: str, kernel: Any) -> Kernel:
    """Refuse anything but a move of a Markov chain."""
    if not isinstance(kernel, Kernel):
        raise TypeError(f"{name} must be a kernel such as HeatBath(); got {kernel!r}.")
    return kernel

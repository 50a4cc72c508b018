"""Lattice models on periodic square lattices: XY with ring exchange, and scalar phi^4."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rkl.checks import integer, number
from rkl.flows.architectures.circular import wrap_angles
from rkl.sample.lattice import CheckerboardRealNVP, CoarseToFine, CoarseToFineField
from rkl.sample.mcmc.kernels import HeatBath
from rkl.sample.mcmc.phi4 import Phi4HeatBath
from rkl.sample.targets.base import Condition, Fluctuation, Modes, Target

WHEELS_CAPTION = (
    "One draw at each temperature: hue and arrow are the angle. Around a vortex the angle turns "
    "once, around an antivortex once the other way; pairs of them unbind with rising temperature."
)


@dataclass(frozen=True)
class XY(Target):
    r"""The two-dimensional XY model with ring exchange, p(θ) ∝ exp(−E(θ)/T).

    E = −J Σ cos(θᵢ − θⱼ) − K Σ cos(θ₁ − θ₂ + θ₃ − θ₄) over the bonds and the plaquettes, each
    once. The bonds are those of the rolls, two per site: side 2 has 8. log Z is with respect
    to dθ on [−π, π)^N. At K = 0 the Kosterlitz–Thouless transition is at T = 0.893 J.

    Source: V. Kanaujia et al. (2024), arXiv 2401.15948, eq. (16) and (17).

    Args:
        side: Sites along one side, 2 at least; x is [*batch, side²], row by row, in radians.
        coupling: J, the unit of energy.
        ring_exchange: K, in the units of J; None makes it the second condition.

    >>> XY(side=2).log_prob(torch.zeros(4), torch.tensor([0.5]))
    tensor(16.)
    """

    side: int
    coupling: float = 1.0
    ring_exchange: float | None = 0.0

    domain: ClassVar = "circle"
    units: ClassVar = {
        "energy": "J per site",
        "magnetization": "per site",
        "vortices": "per plaquette",
        "helicity": "J",
    }

    def __post_init__(self):
        integer("side", self.side, at_least=2)
        number("coupling", self.coupling)
        if self.ring_exchange is not None:
            number("ring_exchange", self.ring_exchange)

    @property
    def event_shape(self):
        return (self.side**2,)

    @property
    def conditions(self):  # pyright: ignore[reportIncompatibleVariableOverride]
        """The temperature T, and the ring exchange K where it is not fixed."""
        both = Condition("T", 0.05, 2.05, "J", above=0.0), Condition("K", 0.0, 1.0, "J")
        return both if self.ring_exchange is None else both[:1]

    def energy(
        self, x: Float[Tensor, "*batch sites"], ring_exchange: Tensor | float = 0.0
    ) -> Float[Tensor, "*batch"]:
        """E in units of J."""
        theta = x.unflatten(-1, (self.side, self.side))
        across, down = (theta - theta.roll(-1, axis) for axis in (-1, -2))
        energy = -self.coupling * (across.cos() + down.cos()).sum((-1, -2))
        if isinstance(ring_exchange, float) and ring_exchange == 0:
            return energy
        return energy - ring_exchange * (across - across.roll(-1, -2)).cos().sum((-1, -2))

    def ring(self, condition: Float[Tensor, "*batch conditions"]) -> Tensor | float:
        """K, [*batch] where it is a condition."""
        return condition[..., 1] if self.ring_exchange is None else float(self.ring_exchange)

    def log_prob(self, x, condition):
        self.check(x, condition)
        return -self.energy(x, self.ring(condition)) / condition[..., 0]

    def observables(self, x, condition):
        """Energy, |m|, vortices of either sign, and terms whose mean is the helicity modulus.

        The helicity modulus is the mean of cos minus that of the squared current over T, along
        either axis; ring exchange does not enter, as a twist leaves its cosines alone.
        """
        self.check(x, condition)
        theta = x.unflatten(-1, (self.side, self.side))
        differences = torch.stack([theta - theta.roll(-1, axis) for axis in (-1, -2)])
        sites = self.side**2
        current = self.coupling * differences.sin().sum((-1, -2))
        stiff = self.coupling * differences.cos().mean((-1, -2))
        helicity = (stiff - current.square() / (sites * condition[..., 0])).mean(0)
        return {
            "energy": self.energy(x, self.ring(condition)) / sites,
            "magnetization": torch.hypot(x.cos().mean(-1), x.sin().mean(-1)),
            "vortices": self.vorticity(x).abs().mean(-1),
            "helicity": helicity,
        }

    def kernel(self):
        return HeatBath()

    def architecture(self):
        """A coarse-to-fine flow that draws half of the sites exactly, where the side allows it."""
        return CoarseToFine.of(self) if _is_power_of_two(self.side) else None

    def modes(self, x, condition):
        """The winding sectors."""
        sectors, labels = self.sector(x).reshape(-1, 2).unique(dim=0, return_inverse=True)
        return Modes(
            labels.reshape(x.shape[:-1]), tuple(f"winding ({a}, {b})" for a, b in sectors.tolist())
        )

    def derived(self, condition):
        """Specific heat N var(e)/T² and susceptibility N var(|m|)/T, with k_B = 1."""
        sites, temperature = self.side**2, condition[..., 0].double()
        return {
            "specific_heat": Fluctuation("energy", sites / temperature**2, "k_B per site"),
            "susceptibility": Fluctuation("magnetization", sites / temperature, "per J and site"),
        }

    def figure(self, states):
        """Configurations as wheels of colours, with their vortices."""
        from rkl.plots.lattices import wheels

        shape = self.side, self.side
        angles = {at: x.reshape(shape).numpy() for at, x in states.items()}
        vortices = {at: self.vorticity(x).reshape(shape).numpy() for at, x in states.items()}
        return wheels(angles, vortices), WHEELS_CAPTION

    def vorticity(self, x: Float[Tensor, "*batch sites"]) -> Float[Tensor, "*batch sites"]:
        """The vorticity of each plaquette, −1, 0 or 1; its site is the corner it starts at."""
        across, down = self.bond_differences(x)
        turns = across + down.roll(-1, -1) - across.roll(-1, -2) - down
        return (turns / (2 * math.pi)).round().flatten(-2)

    def winding(self, x: Float[Tensor, "*batch sites"]) -> Float[Tensor, "*batch 2"]:
        """Windings of θ around the torus along either axis, averaged over the lines."""
        return self._turns(x).to(x.dtype) / self.side

    def sector(self, x: Float[Tensor, "*batch sites"]) -> Int[Tensor, "*batch 2"]:
        """The winding along either axis rounded to an integer, halves towards 0.

        Every line winds by an integer, so that no rounding error of angles enters.
        """
        turns = self._turns(x)
        nearest = (2 * turns.abs() + self.side - 1).div(2 * self.side, rounding_mode="floor")
        return turns.sign() * nearest

    def _turns(self, x: Tensor) -> Int[Tensor, "*batch 2"]:
        across, down = self.bond_differences(x)
        turns = torch.stack([across.sum(-1), down.sum(-2)], -2) / (2 * math.pi)
        return turns.round().long().sum(-1)

    def bond_differences(self, x: Float[Tensor, "*batch sites"]) -> tuple[Tensor, Tensor]:
        """θ of the next site minus θ, in [−π, π), along rows and along columns."""
        theta = x.unflatten(-1, (self.side, self.side))
        ahead = [theta.roll(-1, axis) - theta for axis in (-1, -2)]
        across, down = map(wrap_angles, ahead)
        return across, down


@dataclass(frozen=True)
class Phi4(Target):
    r"""Scalar φ⁴ theory in two dimensions, p(φ) ∝ exp(−S(φ)).

    S = Σ over sites of Σ_μ (φ(x+μ) − φ(x))² + m² φ² + λ φ⁴, with λ the condition. It is
    symmetric in φ; at m² = −4 the side 32 has a correlation length of a quarter of the side
    at λ = 4.572, and sides of 8 and 12 at 6.008 and 5.276.

    Source: M. S. Albergo, G. Kanwar, P. E. Shanahan (2019), arXiv 1904.12072, eq. (20).

    Args:
        side: Sites along one side; x is [*batch, side²], row by row.
        mass_squared: m², in lattice units.

    >>> Phi4(side=2).log_prob(torch.ones(4), torch.tensor([5.0]))
    tensor(-4.)
    """

    side: int
    mass_squared: float = -4.0

    units: ClassVar = {"action": "nats per site", "magnetization": "per site"}

    def __post_init__(self):
        integer("side", self.side, at_least=2)
        number("mass_squared", self.mass_squared)

    @property
    def event_shape(self):
        return (self.side**2,)

    @property
    def conditions(self):  # pyright: ignore[reportIncompatibleVariableOverride]
        """The coupling λ: above 0, or 0 too where m² > 0 alone keeps the field together."""
        if self.mass_squared > 0:
            return (Condition("lambda", 4.0, 8.0, at_least=0.0),)
        return (Condition("lambda", 4.0, 8.0, above=0.0),)

    def log_prob(self, x, condition):
        self.check(x, condition)
        phi = x.unflatten(-1, (self.side, self.side))
        square = phi.square()
        slopes = sum((phi - phi.roll(-1, axis)).square() for axis in (-1, -2))
        local = square * (self.mass_squared + condition[..., None, None, 0] * square)
        return -(slopes + local).sum((-1, -2))

    def kernel(self):
        return Phi4HeatBath()

    def architecture(self):
        """A flow that draws half of the sites exactly, or affine couplings on a checkerboard."""
        if _is_power_of_two(self.side):
            return CoarseToFineField.of(self)
        return CheckerboardRealNVP(filters=16, circle=False) if self.side % 2 == 0 else None

    def observables(self, x, condition):
        """The action S per site, and |φ| averaged over sites before the absolute value."""
        action = -self.log_prob(x, condition) / self.side**2
        return {"action": action, "magnetization": x.mean(-1).abs()}


def _is_power_of_two(side: int) -> bool:
    return side & (side - 1) == 0

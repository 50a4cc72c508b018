"""A circular flow for periodic square lattices that draws from coarse to fine."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rkl.checks import number
from rkl.flows.architectures import Architecture
from rkl.flows.architectures.circular import wrap_angles
from rkl.sample.lattice import circle
from rkl.sample.lattice.base import SitesDistribution, SitesFlow, square_side
from rkl.sample.lattice.models import Rotors
from rkl.sample.lattice.ordering import Pass
from rkl.sample.lattice.spin_waves import Wave, spin_waves

TINY = 1e-10  # squared length of a sum of spins below which it has no direction
TOO_STRONG = 4.0  # nats by which a network may change the log of a concentration


@dataclass(frozen=True)
class CoarseToFine(Architecture):
    """A flow of angles on a periodic square lattice, drawn level by level given near sites.

    Each site has a circular distribution in closed form, in the frame of its four nearest
    neighbours of the level above, made by a small network that all levels and places share.
    Sites that do not interact are drawn exactly from von Mises distributions instead: half of them
    without ring exchange, a quarter with it. The global rotation is an exact symmetry of the flow;
    translations are learnt. Drawing takes 8 log2(side) passes.

    The first condition is the temperature in units of J; the second, if any, ring exchange.

    Args:
        coupling: J of the von Mises distributions.
        ring_exchange: K of the von Mises distributions; None where it is the second condition.
        integrate: Share of sites to draw exactly; "auto" takes as many as K allows.
        width: Units of each of two hidden layers.
        knots: Knots of the circular distributions.

    >>> flow = CoarseToFine(width=8).build((16,), conditions=1)
    >>> flow(torch.tensor([0.9])).sample((5,)).shape
    torch.Size([5, 16])
    """

    coupling: float = 1.0
    ring_exchange: float | None = 0.0
    integrate: Literal["auto", "half", "quarter", "none"] = "auto"
    width: int = 64
    knots: int = 16

    own_units = True
    domain = "circle"

    def __post_init__(self):
        number("coupling", self.coupling)
        number("width", self.width, at_least=1)
        number("knots", self.knots, at_least=5)
        if self.ring_exchange is not None:
            number("ring_exchange", self.ring_exchange)
        if self.integrate not in ("auto", "half", "quarter", "none"):
            raise ValueError(
                f"integrate must be auto, half, quarter or none; got {self.integrate!r}."
            )
        if self.integrate == "half" and self.ring_exchange != 0:
            raise ValueError(
                "integrate must be 'quarter' or 'none' with ring exchange, by which sites of "
                "one half interact; got 'half'."
            )

    @classmethod
    def of(cls, target: Rotors, **settings: Any) -> "CoarseToFine":
        """The architecture whose von Mises distributions are those of a target."""
        return cls(target.coupling, target.ring_exchange, **settings)

    def build(self, event_shape: tuple[int, ...], conditions: int = 1) -> "LatticeFlow":
        side = square_side(event_shape)
        expected = 2 if self.ring_exchange is None else 1
        if conditions != expected:
            raise ValueError(f"conditions must be {expected} for {self}; got {conditions}.")
        return LatticeFlow(self, side)


def _ratio(architecture: CoarseToFine) -> float:
    """K/J, by which spin waves differ; the middle of its range where K is a condition."""
    ring = 0.5 if architecture.ring_exchange is None else architecture.ring_exchange
    return max(0.0, ring / abs(architecture.coupling or 1.0))


class LatticeFlow(SitesFlow):
    """The flow that :class:`CoarseToFine` builds for one side."""

    def __init__(self, architecture: CoarseToFine, side: int):
        integrate = architecture.integrate
        if integrate == "auto":
            integrate = "half" if architecture.ring_exchange == 0 else "quarter"
        conditions = 2 if architecture.ring_exchange is None else 1
        super().__init__(architecture, side, conditions, integrate)
        self.waves = spin_waves(self.ordering, _ratio(architecture))

    def features(self, near):
        return 2 * near + self.conditions + 2

    def distribution(self, condition):
        return LatticeDistribution(self, condition)

    def context(self, condition: Float[Tensor, "draws conditions"]) -> Float[Tensor, "rows draws"]:
        """Scales of sines, cosines and concentrations, and the features of the conditions.

        At low temperature angles differ by about the root of T, so all are of order 1.
        """
        temperature = condition[:, 0] / abs(self.architecture.coupling or 1.0)
        scale = (temperature / (temperature + 6)).sqrt()
        features = [temperature, temperature.log() / 2, temperature.sqrt(), *condition.T[1:]]
        return torch.stack([0.5 / scale, 0.25 / scale.square(), *features])

    def passes(self) -> Iterator[tuple[Pass, Wave]]:
        """The passes in their order, with their low-temperature Gaussians."""
        return zip(self.ordering.passes, self.waves, strict=True)

    def inputs(self, step: Pass, wave: Wave, cosine: Tensor, sine: Tensor, context: Tensor):
        """The features of a pass, the frame of its sites, and their concentration.

        The frame and the concentration are exact at low temperature; at high temperature, the
        concentration is that of sites at both ends of one that is integrated.
        """
        near = [it.index_select(0, step.near.flatten().to(it.device)) for it in (cosine, sine)]
        c, s = (it.reshape(len(step.near), -1) for it in near)
        weights = wave.weights.to(c)
        x, y = weights @ c, weights @ s
        square = x * x + y * y
        length, lost = square.clamp_min(TINY).sqrt(), square < TINY
        x, y = torch.where(lost, 1.0, x / length), torch.where(lost, 0.0, y / length)
        scales = context.repeat(1, step.sites)
        along, across = (1 - (c * x + s * y)) * scales[1], (s * x - c * y) * scales[0]
        kappa = length / (scales[2] * (wave.variance + scales[2] / 4))
        return torch.cat([along, across, scales[2:]]), (x, y), kappa

    def law(self, output: Tensor, kappa: Tensor) -> circle.SplineDensity:
        """The circular distributions of a network's output."""
        return circle.near_von_mises(
            output[:-1], kappa * output[-1].clamp(-TOO_STRONG, TOO_STRONG).exp()
        )

    def draw(self, condition: Float[Tensor, "draws conditions"], path: bool = False):
        """Cosines and sines of all rows but the integrated ones, and their log-density.

        On a ``path`` both are differentiable in the parameters, the density only by the angles.
        """
        context = self.context(condition)
        cosine, sine = torch.ones_like(context[:1]), torch.zeros_like(context[:1])
        log_q = torch.full_like(context[0], -math.log(2 * math.pi))
        for step, wave in self.passes():
            features, (x, y), kappa = self.inputs(step, wave, cosine, sine, context)
            output, fixed = self.sites[step.colour](features, step, path)
            law = self.law(output, kappa)
            position = circle.draw(law)
            if path:
                position = circle.reparameterise(law, position)
            c, s = circle.angles(law, position)
            terms = circle.log_density(self.law(fixed, kappa) if path else law, c, s)
            log_q = log_q + terms.reshape(step.sites, -1).sum(0)
            new = (c * x - s * y).reshape(step.sites, -1), (s * x + c * y).reshape(step.sites, -1)
            cosine, sine = torch.cat([cosine, new[0]]), torch.cat([sine, new[1]])
        return cosine, sine, log_q

    def log_density(self, cosine: Tensor, sine: Tensor, condition: Tensor) -> Tensor:
        """Log-density of all rows but the integrated ones."""
        context, at = self.context(condition), 1
        log_q = torch.full_like(context[0], -math.log(2 * math.pi))
        for step, wave in self.passes():
            features, (x, y), kappa = self.inputs(step, wave, cosine[:at], sine[:at], context)
            output, _ = self.sites[step.colour](features, step, False)
            c, s = (it[at : at + step.sites].reshape(-1) for it in (cosine, sine))
            terms = circle.log_density(self.law(output, kappa), c * x + s * y, s * x - c * y)
            log_q, at = log_q + terms.reshape(step.sites, -1).sum(0), at + step.sites
        return log_q

    def field(self, cosine: Tensor, sine: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Direction and concentration of the von Mises distributions of the integrated sites."""
        rows, model = self.ordering, self.architecture
        ring = condition[:, 1] if model.ring_exchange is None else model.ring_exchange
        spin = torch.complex(cosine, sine)
        total = model.coupling * spin[rows.bonds].sum(0)
        if not isinstance(ring, float) or ring:
            a, b, opposite = spin[rows.plaquettes]
            total = total + ring * (a * b * opposite.conj()).sum(0)
        x, y = total.real, total.imag
        kappa = (x * x + y * y + 1e-12).sqrt() / condition[:, 0]
        return torch.atan2(y, x), kappa


class LatticeDistribution(SitesDistribution):
    """Angles of a lattice; densities are per radian of each."""

    at_once = 8192

    def _draw(self, condition):
        cosine, sine, log_q = self.flow.draw(condition)
        theta = torch.atan2(sine, cosine)
        if self.flow.ordering.integrated:
            centre, kappa = self.flow.field(cosine, sine, condition)
            away = circle.von_mises(kappa)
            theta = torch.cat([theta, centre + away])
            log_q = log_q + _von_mises(away, kappa)
        turn = 2 * math.pi * torch.rand_like(log_q)
        theta = wrap_angles(theta + turn)
        return theta[self.place].T, log_q

    def _log_prob(self, x, condition):
        rows = x[:, self.flow.ordering.site].T
        rows = rows - rows[:1]
        cosine, sine = rows.cos(), rows.sin()
        log_q = self.flow.log_density(cosine, sine, condition)
        if self.flow.ordering.integrated:
            log_q = log_q + self._exact_log_prob(rows, condition)
        return log_q

    def path_log_ratio(self, log_prob, shape=(), beta=1.0):
        """The same, with the integrated sites at their modes."""
        batch, condition = self._flat(shape)
        cosine, sine, log_q = self.flow.draw(condition, path=True)
        theta = torch.atan2(sine, cosine)
        if self.flow.ordering.integrated:
            centre, kappa = self.flow.field(cosine, sine, condition)
            theta = torch.cat([theta, centre.detach()])
            log_q = log_q - circle.log_bessel(beta * kappa).sum(0)
        theta = theta + 2 * math.pi * torch.rand_like(log_q)  # as in draws: p may not be invariant
        return (log_prob(theta[self.place].T, condition) - log_q).reshape(batch)

    def _exact(self, rows, condition):
        centre, kappa = self.flow.field(rows.cos(), rows.sin(), condition)
        drawn = centre + circle.von_mises(kappa)
        return wrap_angles(drawn)

    def _exact_log_prob(self, rows, condition):
        centre, kappa = self.flow.field(rows.cos(), rows.sin(), condition)
        return _von_mises(rows[-self.flow.ordering.integrated :] - centre, kappa)


def _von_mises(away: Float[Tensor, "sites draws"], kappa: Float[Tensor, "sites draws"]):
    return (-2 * kappa * (away / 2).sin().square() - circle.log_bessel(kappa)).sum(0)

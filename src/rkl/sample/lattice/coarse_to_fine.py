"""A circular flow for periodic square lattices that draws from coarse to fine."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rkl.checks import number
from rkl.flows.architectures import Architecture
from rkl.flows.architectures.circular import wrap_angles
from rkl.sample.lattice import circle
from rkl.sample.lattice.law import SitesLaw
from rkl.sample.lattice.models import Rotors
from rkl.sample.lattice.network import Site
from rkl.sample.lattice.ordering import Ordering, Pass, ordering
from rkl.sample.lattice.spin_waves import Wave, spin_waves

TINY = 1e-10  # squared length of a sum of spins below which it has no direction
TOO_STRONG = 4.0  # nats by which a network may change the log of a concentration


@dataclass(frozen=True)
class CoarseToFine(Architecture):
    """A flow of angles on a periodic square lattice, drawn level by level given what is near.

    Each site has a circular law in closed form, in the frame of its four nearest neighbours
    of the level above, made by a small network that all levels and places share. Whatever of
    the lattice does not interact is drawn exactly from its von Mises laws instead: half the
    sites without ring exchange, a quarter with it. The flow has the global rotation as an
    exact symmetry; translations it learns. Drawing takes 8 log2(side) passes.

    The first condition is the temperature in units of J; the second, if any, ring exchange.

    Args:
        coupling: J of the von Mises laws.
        ring_exchange: K of the von Mises laws; None where it is the second condition.
        integrate: Which sites are drawn exactly; "auto" does as many as K allows.
        width: Units of each of two hidden layers.
        knots: Knots of the circular laws.

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
        """The architecture whose von Mises laws are those of a target."""
        return cls(target.coupling, target.ring_exchange, **settings)

    def build(self, event_shape: tuple[int, ...], conditions: int = 1) -> "LatticeFlow":
        side = math.isqrt(math.prod(event_shape))
        if len(event_shape) != 1 or side**2 != event_shape[0]:
            raise ValueError(
                f"event_shape must be (side²,), a square lattice; got {tuple(event_shape)}."
            )
        expected = 2 if self.ring_exchange is None else 1
        if conditions != expected:
            raise ValueError(f"conditions must be {expected} for {self}; got {conditions}.")
        return LatticeFlow(self, side)


def _ratio(architecture: CoarseToFine) -> float:
    """K/J, by which spin waves differ; the middle of its range where K is a condition."""
    ring = 0.5 if architecture.ring_exchange is None else architecture.ring_exchange
    return max(0.0, ring / abs(architecture.coupling or 1.0))


class LatticeFlow(nn.Module):
    """What :class:`CoarseToFine` builds for one side."""

    def __init__(self, architecture: CoarseToFine, side: int):
        super().__init__()
        self.architecture, self.side = architecture, side
        integrate = architecture.integrate
        if integrate == "auto":
            integrate = "half" if architecture.ring_exchange == 0 else "quarter"
        self.ordering: Ordering = ordering(side, integrate)
        self.conditions = 2 if architecture.ring_exchange is None else 1
        self.waves = spin_waves(self.ordering, _ratio(architecture))
        per_colour = {it.colour: len(it.near) for it in self.ordering.passes}
        self.sites = nn.ModuleList(
            Site(2 * per_colour[c] + self.conditions + 2, architecture, self.ordering.levels)
            for c in sorted(per_colour)
        )

    def forward(self, condition: Float[Tensor, "*batch conditions"]) -> "LatticeLaw":
        """The law of configurations, [*batch, side²] in radians, given the conditions."""
        if condition.shape[-1:] != (self.conditions,):
            raise ValueError(
                f"condition must be [*batch, {self.conditions}]; got {list(condition.shape)}."
            )
        return LatticeLaw(self, condition)

    def start_from(self, other: "LatticeFlow") -> "LatticeFlow":
        """Take the weights of a flow for another side; coarser levels start from its coarsest.

        Raises:
            ValueError: It is of another architecture.
        """
        if other.architecture != self.architecture:
            raise ValueError(
                f"other must be a flow of {self.architecture}; got {other.architecture}."
            )
        for mine, theirs in zip(self.sites, other.sites, strict=False):
            mine.start_from(theirs)  # pyright: ignore[reportCallIssue]
        return self

    def context(self, condition: Float[Tensor, "draws conditions"]) -> Float[Tensor, "rows draws"]:
        """Scales of sines, cosines and concentrations, and the features of the conditions.

        At low temperature angles differ by about the root of T, so all are of order 1.
        """
        temperature = condition[:, 0] / abs(self.architecture.coupling or 1.0)
        scale = (temperature / (temperature + 6)).sqrt()
        features = [temperature, temperature.log() / 2, temperature.sqrt(), *condition.T[1:]]
        return torch.stack([0.5 / scale, 0.25 / scale.square(), *features])

    def passes(self) -> Iterator[tuple[Pass, Wave]]:
        """The passes in their order, and what is known of each at low temperature."""
        return zip(self.ordering.passes, self.waves, strict=True)

    def inputs(self, step: Pass, wave: Wave, cosine: Tensor, sine: Tensor, context: Tensor):
        """What a pass knows: features, the frame of its sites, and their concentration.

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

    def law(self, output: Tensor, kappa: Tensor) -> circle.Bent:
        """The circular laws that a network's output stands for."""
        return circle.bent(output[:-1], kappa * output[-1].clamp(-TOO_STRONG, TOO_STRONG).exp())

    def drawn(self, condition: Float[Tensor, "draws conditions"], path: bool = False):
        """Cosines and sines of all rows but the integrated ones, and their log-density.

        On a ``path`` both follow the parameters, but the density only where the angles do.
        """
        context = self.context(condition)
        cosine, sine = torch.ones_like(context[:1]), torch.zeros_like(context[:1])
        log_q = torch.full_like(context[0], -math.log(2 * math.pi))
        for step, wave in self.passes():
            features, (x, y), kappa = self.inputs(step, wave, cosine, sine, context)
            output, held = self.sites[step.colour](features, step, path)
            law = self.law(output, kappa)
            position = circle.draw(law)
            if path:
                position = circle.moved(law, position)
            c, s = circle.angles(law, position)
            terms = circle.log_density(self.law(held, kappa) if path else law, c, s)
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
        """Direction and concentration of the von Mises laws of the integrated sites."""
        rows, chosen_ = self.ordering, self.architecture
        ring = condition[:, 1] if chosen_.ring_exchange is None else chosen_.ring_exchange
        spin = torch.complex(cosine, sine)
        total = chosen_.coupling * spin[rows.bonds].sum(0)
        if not isinstance(ring, float) or ring:
            a, b, opposite = spin[rows.plaquettes]
            total = total + ring * (a * b * opposite.conj()).sum(0)
        x, y = total.real, total.imag
        kappa = (x * x + y * y + 1e-12).sqrt() / condition[:, 0]
        return torch.atan2(y, x), kappa


class LatticeLaw(SitesLaw):
    """Angles of a lattice; densities are per radian of each."""

    at_once = 8192

    def _draw(self, condition):
        cosine, sine, log_q = self.flow.drawn(condition)
        theta = torch.atan2(sine, cosine)
        if self.flow.ordering.integrated:
            centre, kappa = self.flow.field(cosine, sine, condition)
            away = circle.von_mises(kappa)
            theta = torch.cat([theta, centre + away])
            log_q = log_q + _von_mises(away, kappa)
        turn = 2 * math.pi * torch.rand_like(log_q)
        theta = wrap_angles(theta + turn)
        return theta[self.place].T, log_q

    def _judge(self, x, condition):
        rows = x[:, self.flow.ordering.site].T
        rows = rows - rows[:1]
        cosine, sine = rows.cos(), rows.sin()
        log_q = self.flow.log_density(cosine, sine, condition)
        if self.flow.ordering.integrated:
            log_q = log_q + self._exact_log_prob(rows, condition)
        return log_q

    def path_log_ratio(self, log_prob, shape=(), beta=1.0):
        """As of any such law; the integrated sites stand at the modes of their laws."""
        batch, condition = self._flat(shape)
        cosine, sine, log_q = self.flow.drawn(condition, path=True)
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
    """The log-density of independent angles, away from their centres [draws]."""
    return (-2 * kappa * (away / 2).sin().square() - circle.log_bessel(kappa)).sum(0)

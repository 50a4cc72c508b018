"""A flow of a real field on periodic square lattices that draws from coarse to fine."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rkl.checks import number
from rkl.flows.architectures import Architecture
from rkl.flows.architectures.splines import imported_zuko
from rkl.sample.lattice import quartic
from rkl.sample.lattice.base import SitesDistribution, SitesFlow, square_side
from rkl.sample.lattice.models import QuarticField

BOUND = 5.0  # standard deviations within which a spline bends
PULL = 0.6  # share of the mean of four neighbours that a site begins with
WIDTH = 0.5  # standard deviation that it begins with


@dataclass(frozen=True)
class CoarseToFineField(Architecture):
    """A flow of a field φ, such as of φ⁴, drawn level by level given near sites.

    Each site has a normal distribution bent by a monotone spline, moved and scaled; all of it is
    made by a small network, shared by all places and levels, of the nearest fields drawn before.
    The flow is symmetric under φ → −φ, the sign being drawn last; translations are learnt. Drawing
    takes 8 log2(side) passes. Half of the sites of φ⁴ are drawn exactly, given the other half; λ
    is the first condition.

    Source: the order of :class:`CoarseToFine`; splines of Durkan et al. (2019), arXiv 1906.04032.

    Args:
        mass_squared: m² of φ⁴, as in :class:`Phi4`; None: the flow draws all sites of any field.
        width: Units of each of two hidden layers.
        bins: Pieces of each spline.

    >>> flow = CoarseToFineField(width=8).build((16,), conditions=1)
    >>> flow(torch.tensor([5.0])).sample((5,)).shape
    torch.Size([5, 16])
    """

    mass_squared: float | None = None
    width: int = 64
    bins: int = 8

    own_units = True
    domain = "line"

    def __post_init__(self):
        number("width", self.width, at_least=1)
        number("bins", self.bins, at_least=2)
        if self.mass_squared is not None:
            number("mass_squared", self.mass_squared)

    @classmethod
    def of(cls, target: QuarticField, **settings: Any) -> "CoarseToFineField":
        """The architecture that draws half of the sites of a target exactly."""
        return cls(target.mass_squared, **settings)

    @property
    def knots(self) -> int:
        """Parameters of a site, less one: shift, scale, widths, heights and slopes."""
        return 3 * self.bins

    def build(self, event_shape: tuple[int, ...], conditions: int = 1) -> "FieldFlow":
        side = square_side(event_shape)
        if self.mass_squared is not None and conditions < 1:
            raise ValueError(f"conditions must begin with λ for {self}; got none.")
        return FieldFlow(self, side, conditions)


class FieldFlow(SitesFlow):
    """The flow that :class:`CoarseToFineField` builds for one side."""

    def __init__(self, architecture: CoarseToFineField, side: int, conditions: int):
        integrate = "none" if architecture.mass_squared is None else "half"
        super().__init__(architecture, side, conditions, integrate)
        self.origin = nn.Parameter(torch.zeros(architecture.knots + 1, conditions + 1))

    def features(self, near):
        return near + self.conditions

    def distribution(self, condition):
        return FieldDistribution(self, condition)

    @torch.no_grad()
    def start_from(self, other):
        super().start_from(other)
        self.origin.copy_(other.origin)
        return self

    def first(self, condition: Float[Tensor, "conditions draws"]) -> Tensor:
        """The parameters of the first site."""
        return torch.addmm(self.origin[:, -1:], self.origin[:, :-1], condition)

    def draw(self, condition: Float[Tensor, "draws conditions"], path: bool = False):
        """Fields of all rows but the integrated ones [sites, draws], and their log-density.

        On a ``path`` both follow the parameters, the density only through the fields.
        """
        given = condition.T
        output = self.first(given)
        field = _BentNormal(output, 0.0).draw().abs()
        log_q = _log_prob_of_absolute(output.detach() if path else output, field)
        rows = field[None]
        for step in self.ordering.passes:
            near = self.near(rows, step.near)
            pull = PULL * near[:4].mean(0)
            features = torch.cat([near, given.repeat(1, step.sites)])
            output, fixed = self.sites[step.colour](features, step, path)
            field = _BentNormal(output, pull).draw()
            terms = _BentNormal(fixed, pull).log_prob(field)
            log_q = log_q + terms.reshape(step.sites, -1).sum(0)
            rows = torch.cat([rows, field.reshape(step.sites, -1)])
        return rows, log_q - math.log(2)

    def log_density(self, rows: Float[Tensor, "sites draws"], condition: Tensor) -> Tensor:
        """Log-density of all rows but the integrated ones, of either sign."""
        given, rows = condition.T, torch.where(rows[:1] < 0, -rows, rows)
        log_q, at = _log_prob_of_absolute(self.first(given), rows[:1]), 1
        for step in self.ordering.passes:
            near = self.near(rows[:at], step.near)
            features = torch.cat([near, given.repeat(1, step.sites)])
            output, _ = self.sites[step.colour](features, step, False)
            terms = _BentNormal(output, PULL * near[:4].mean(0)).log_prob(
                rows[at : at + step.sites].reshape(-1)
            )
            log_q, at = log_q + terms.reshape(step.sites, -1).sum(0), at + step.sites
        return log_q - math.log(2)

    def exact(self, rows: Tensor, condition: Tensor) -> tuple[Tensor, float, Tensor]:
        """h, a and λ of the densities exp(hφ − aφ² − λφ⁴) of the integrated sites."""
        assert self.architecture.mass_squared is not None
        around = rows[self.ordering.bonds].sum(0)
        return 2 * around, 4 + self.architecture.mass_squared, condition[:, 0]

    def near(self, rows: Tensor, near: Tensor) -> Float[Tensor, "near sites_and_draws"]:
        """The fields of the neighbours of a pass."""
        return rows.index_select(0, near.flatten().to(rows.device)).reshape(len(near), -1)


class _BentNormal:
    """Shift + scale · spline(z) with z standard normal, for each column of an output."""

    def __init__(self, output: Float[Tensor, "numbers sites"], pull: Tensor | float):
        bins = (len(output) - 1) // 3
        self.shift, self.scale = output[0] + pull, WIDTH * output[1].clamp(-4, 4).exp()
        parts = output[2:].mT.split((bins, bins, bins - 1), -1)
        transforms: Any = imported_zuko().transforms
        self.spline = transforms.MonotonicRQSTransform(*parts, bound=BOUND)

    def draw(self) -> Float[Tensor, " sites"]:
        """Draws that follow the output."""
        noise = torch.randn_like(self.scale)
        return self.shift + self.scale * self.spline(noise)

    def log_prob(self, field: Float[Tensor, " sites"]) -> Float[Tensor, " sites"]:
        """Log-density of the field."""
        latent, log_jacobian = self.spline.inv.call_and_ladj((field - self.shift) / self.scale)
        return log_jacobian - self.scale.log() - latent.square() / 2 - math.log(2 * math.pi) / 2


def _log_prob_of_absolute(output: Tensor, field: Tensor) -> Float[Tensor, " draws"]:
    law = _BentNormal(output, 0.0)
    field = field.reshape(-1)
    return torch.logaddexp(law.log_prob(field), law.log_prob(-field))


class FieldDistribution(SitesDistribution):
    """Fields of a lattice, of either sign."""

    def _draw(self, condition):
        rows, log_q = self.flow.draw(condition)
        if self.flow.ordering.integrated:
            rows = torch.cat([rows, self._exact(rows, condition)])
            log_q = log_q + self._exact_log_prob(rows, condition)
        sign = torch.randint(2, log_q.shape, device=log_q.device).to(log_q) * 2 - 1
        return (sign * rows)[self.place].T, log_q

    def _log_prob(self, x, condition):
        rows = x[:, self.flow.ordering.site].T
        log_q = self.flow.log_density(rows, condition)
        if self.flow.ordering.integrated:
            log_q = log_q + self._exact_log_prob(rows, condition)
        return log_q

    def path_log_ratio(self, log_prob, shape=(), beta=1.0):
        batch, condition = self._flat(shape)
        rows, log_q = self.flow.draw(condition, path=True)
        if self.flow.ordering.integrated:
            law = [beta * it for it in self.flow.exact(rows, condition)]
            rows = torch.cat([rows, quartic.mean(*law)])
            log_q = log_q + self._density(rows, *law)
        return (log_prob(rows[self.place].T, condition) - log_q).reshape(batch)

    def _exact(self, rows, condition):
        return quartic.draw(*self.flow.exact(rows, condition))

    def _exact_log_prob(self, rows, condition):
        return self._density(rows, *self.flow.exact(rows, condition))

    def _density(self, rows, field, square, lam):
        phi = rows[-self.flow.ordering.integrated :]
        terms = quartic.log_density(phi, field, square, lam)
        return (terms - quartic.log_normaliser(field, square, lam)).sum(0)

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
from rkl.sample.lattice.law import SitesLaw
from rkl.sample.lattice.models import QuarticField
from rkl.sample.lattice.network import Site
from rkl.sample.lattice.ordering import Ordering, ordering

BOUND = 5.0  # standard deviations within which a spline bends
PULL = 0.6  # share of the mean of four neighbours that a site begins with
WIDTH = 0.5  # standard deviation that it begins with


@dataclass(frozen=True)
class CoarseToFineField(Architecture):
    """A flow of a field φ, such as of φ⁴, drawn level by level given what is near.

    Each site has a normal law bent by a monotone spline, moved and scaled; all of it is made by a
    small network, shared by all places and levels, of the fields nearest that are drawn before.
    The field is drawn up to its sign, at which the law is symmetric, φ → −φ; translations are
    learnt. Drawing takes 8 log2(side) passes. Of φ⁴ half of the sites is drawn exactly, given
    the other half, with λ the first condition.

    Source: the order of :class:`CoarseToFine`; splines of Durkan et al. (2019), arXiv 1906.04032.

    Args:
        mass_squared: m² of φ⁴, as in :class:`Phi4`; None, the flow draws all sites of any field.
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
        """Numbers of a law, less one: shift, scale, widths, heights and slopes."""
        return 3 * self.bins

    def build(self, event_shape: tuple[int, ...], conditions: int = 1) -> "FieldFlow":
        side = math.isqrt(math.prod(event_shape))
        if len(event_shape) != 1 or side**2 != event_shape[0]:
            raise ValueError(
                f"event_shape must be (side²,), a square lattice; got {tuple(event_shape)}."
            )
        if self.mass_squared is not None and conditions < 1:
            raise ValueError(f"conditions must begin with λ for {self}; got none.")
        return FieldFlow(self, side, conditions)


class FieldFlow(nn.Module):
    """What :class:`CoarseToFineField` builds for one side."""

    def __init__(self, architecture: CoarseToFineField, side: int, conditions: int):
        super().__init__()
        self.architecture, self.side, self.conditions = architecture, side, conditions
        integrate = "none" if architecture.mass_squared is None else "half"
        self.ordering: Ordering = ordering(side, integrate)
        per_colour = {it.colour: len(it.near) for it in self.ordering.passes}
        self.sites = nn.ModuleList(
            Site(per_colour[c] + conditions, architecture, self.ordering.levels)
            for c in sorted(per_colour)
        )
        outputs = architecture.knots + 1
        self.origin = nn.Parameter(torch.zeros(outputs, conditions + 1))

    def forward(self, condition: Float[Tensor, "*batch conditions"]) -> "FieldLaw":
        """The law of fields, [*batch, side²], given the conditions."""
        if condition.shape[-1:] != (self.conditions,):
            raise ValueError(
                f"condition must be [*batch, {self.conditions}]; got {list(condition.shape)}."
            )
        return FieldLaw(self, condition)

    @torch.no_grad()
    def start_from(self, other: "FieldFlow") -> "FieldFlow":
        """Take the weights of a flow for another side; coarser levels start from its coarsest.

        Raises:
            ValueError: It is of another architecture.
        """
        if other.architecture != self.architecture or other.conditions != self.conditions:
            raise ValueError(
                f"other must be a flow of {self.architecture}; got {other.architecture}."
            )
        for mine, theirs in zip(self.sites, other.sites, strict=False):
            mine.start_from(theirs)  # pyright: ignore[reportCallIssue]
        self.origin.copy_(other.origin)
        return self

    def first(self, condition: Float[Tensor, "conditions draws"]) -> Tensor:
        """The numbers of the law of the first site."""
        return torch.addmm(self.origin[:, -1:], self.origin[:, :-1], condition)

    def drawn(self, condition: Float[Tensor, "draws conditions"], path: bool = False):
        """Fields of all rows but the integrated ones [sites, draws], and their log-density.

        On a ``path`` both follow the parameters, but the density only where the fields do.
        """
        given = condition.T
        output = self.first(given)
        field = _Law(output, 0.0).draw().abs()
        log_q = _folded(output.detach() if path else output, field)
        rows = field[None]
        for step in self.ordering.passes:
            near = self.near(rows, step.near)
            pull = PULL * near[:4].mean(0)
            features = torch.cat([near, given.repeat(1, step.sites)])
            output, held = self.sites[step.colour](features, step, path)
            field = _Law(output, pull).draw()
            terms = _Law(held, pull).log_prob(field)
            log_q = log_q + terms.reshape(step.sites, -1).sum(0)
            rows = torch.cat([rows, field.reshape(step.sites, -1)])
        return rows, log_q - math.log(2)

    def log_density(self, rows: Float[Tensor, "sites draws"], condition: Tensor) -> Tensor:
        """Log-density of all rows but the integrated ones, of either sign."""
        given, rows = condition.T, torch.where(rows[:1] < 0, -rows, rows)
        log_q, at = _folded(self.first(given), rows[:1]), 1
        for step in self.ordering.passes:
            near = self.near(rows[:at], step.near)
            features = torch.cat([near, given.repeat(1, step.sites)])
            output, _ = self.sites[step.colour](features, step, False)
            terms = _Law(output, PULL * near[:4].mean(0)).log_prob(
                rows[at : at + step.sites].reshape(-1)
            )
            log_q, at = log_q + terms.reshape(step.sites, -1).sum(0), at + step.sites
        return log_q - math.log(2)

    def exact(self, rows: Tensor, condition: Tensor) -> tuple[Tensor, float, Tensor]:
        """h, a and λ of the laws exp(hφ − aφ² − λφ⁴) of the integrated sites."""
        assert self.architecture.mass_squared is not None
        around = rows[self.ordering.bonds].sum(0)
        return 2 * around, 4 + self.architecture.mass_squared, condition[:, 0]

    def near(self, rows: Tensor, near: Tensor) -> Float[Tensor, "near sites_and_draws"]:
        """The fields that the sites of a pass look at."""
        return rows.index_select(0, near.flatten().to(rows.device)).reshape(len(near), -1)


class _Law:
    """Shift + scale · spline(z) with z standard normal, a law for each column of an output."""

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


def _folded(output: Tensor, field: Tensor) -> Float[Tensor, " draws"]:
    """Log-density of the absolute value of a draw."""
    law = _Law(output, 0.0)
    field = field.reshape(-1)
    return torch.logaddexp(law.log_prob(field), law.log_prob(-field))


class FieldLaw(SitesLaw):
    """Fields of a lattice, of either sign."""

    def _draw(self, condition):
        rows, log_q = self.flow.drawn(condition)
        if self.flow.ordering.integrated:
            rows = torch.cat([rows, self._exact(rows, condition)])
            log_q = log_q + self._exact_log_prob(rows, condition)
        sign = torch.randint(2, log_q.shape, device=log_q.device).to(log_q) * 2 - 1
        return (sign * rows)[self.place].T, log_q

    def _judge(self, x, condition):
        rows = x[:, self.flow.ordering.site].T
        log_q = self.flow.log_density(rows, condition)
        if self.flow.ordering.integrated:
            log_q = log_q + self._exact_log_prob(rows, condition)
        return log_q

    def path_log_ratio(self, log_prob, shape=(), beta=1.0):
        batch, condition = self._flat(shape)
        rows, log_q = self.flow.drawn(condition, path=True)
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

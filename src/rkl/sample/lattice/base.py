"""Coarse-to-fine flows of square lattices: their networks, draws and densities, in batches."""

import abc
import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributions import Distribution, constraints

from rkl.randomness import random_numbers
from rkl.sample.lattice.network import Site
from rkl.sample.lattice.ordering import Ordering, ordering


def square_side(event_shape: tuple[int, ...], *, even: bool = False) -> int:
    """The side of a square lattice; refused if the sites make none, or not an even one."""
    side = math.isqrt(math.prod(event_shape))
    if len(event_shape) != 1 or side**2 != event_shape[0] or (even and side % 2):
        expected = "(side²,) of an even side, for a checkerboard" if even else "(side²,)"
        raise ValueError(
            f"event_shape must be {expected}, a square lattice; got {tuple(event_shape)}."
        )
    return side


class SitesFlow(nn.Module, abc.ABC):
    """A flow of one side: a network for each colour of sites, shared by all levels and places.

    Args:
        architecture: Its width and number of knots.
        side: Sites along one side.
        conditions: Number of conditions.
        integrate: Share of sites to draw exactly: "half", "quarter" or "none".
    """

    def __init__(self, architecture: Any, side: int, conditions: int, integrate: str):
        super().__init__()
        self.architecture, self.side, self.conditions = architecture, side, conditions
        self.ordering: Ordering = ordering(side, integrate)
        near = {it.colour: len(it.near) for it in self.ordering.passes}
        self.sites = nn.ModuleList(
            Site(self.features(near[c]), architecture, self.ordering.levels) for c in sorted(near)
        )

    @abc.abstractmethod
    def features(self, near: int) -> int:
        """Number of features of a site that looks at so many others."""

    @abc.abstractmethod
    def distribution(self, condition: Float[Tensor, "*batch conditions"]) -> "SitesDistribution":
        """The distribution of configurations under the conditions."""

    def forward(self, condition: Float[Tensor, "*batch conditions"]) -> "SitesDistribution":
        """The distribution of configurations, [*batch, side²], given the conditions."""
        if condition.shape[-1:] != (self.conditions,):
            raise ValueError(
                f"condition must be [*batch, {self.conditions}]; got {list(condition.shape)}."
            )
        return self.distribution(condition)

    def start_from(self, other: Any) -> "SitesFlow":
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
        return self


class SitesDistribution(Distribution, abc.ABC):
    """Distribution of values on the sites of a lattice: independent draws, and their density."""

    at_once: ClassVar[int] = 1024  # configurations drawn or judged at one time
    arg_constraints: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, flow: Any, condition: Float[Tensor, "*batch conditions"]):
        shape = torch.Size([flow.side**2])
        super().__init__(condition.shape[:-1], shape, validate_args=False)
        self.flow, self.condition = flow, condition
        self.place = flow.ordering.site.argsort()

    def expand(self, batch_shape: Any, _instance: Any = None) -> "SitesDistribution":
        return type(self)(self.flow, self.condition.expand(*batch_shape, -1))

    @property
    def support(self) -> Any:
        """Any number on each site; to angles any multiple of 2π may be added."""
        return constraints.independent(constraints.real, 1)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        return self.sample_and_log_prob(sample_shape)[0]

    @torch.no_grad()
    def sample_and_log_prob(self, shape: Any = ()) -> tuple[Tensor, Tensor]:
        """Draws, angles in [−π, π], and their log-density in nats."""
        batch, condition = self._flat(shape)
        both = [self._draw(part) for part in condition.split(self.at_once)]
        x, log_q = (torch.cat(it) for it in zip(*both, strict=True))
        return x.reshape(*batch, -1), log_q.reshape(batch)

    def log_prob(self, value: Tensor) -> Tensor:
        batch = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        condition = self.condition.expand(*batch, self.condition.shape[-1])
        rows = value.expand(*batch, value.shape[-1]).reshape(-1, value.shape[-1])
        pairs = zip(
            rows.split(self.at_once),
            condition.reshape(len(rows), -1).split(self.at_once),
            strict=True,
        )
        return torch.cat([self._log_prob(x, given) for x, given in pairs]).reshape(batch)

    @abc.abstractmethod
    def path_log_ratio(
        self, log_prob: Callable[[Tensor, Tensor], Tensor], shape: Any = (), beta: float = 1.0
    ) -> Tensor:
        """Log p − log q at fresh draws, differentiable in the parameters through the draws alone.

        Minus its mean has the path gradient of the reverse KL, whose noise vanishes where
        q = p. ``beta`` is that of ``log_prob``, β log p, whose sites are then integrated. The
        value does not depend on the integrated sites, if they follow p given the others.

        Source: G. Roeder, Y. Wu, D. Duvenaud (2017), arXiv 1703.09194, eq. (8).
        """

    @torch.no_grad()
    def redraw(self, x: Float[Tensor, "*draws sites"]) -> Float[Tensor, "*draws sites"]:
        """The integrated sites drawn anew, given the others: an exact heat bath."""
        count = self.flow.ordering.integrated
        if not count:
            return x
        condition = self.condition.expand(*x.shape[:-1], self.condition.shape[-1])
        flat = x.flatten(0, -2), condition.flatten(0, -2)
        parts = []
        for part, given in zip(*(it.split(self.at_once) for it in flat), strict=True):
            rows = part[:, self.flow.ordering.site].T[:-count]
            parts.append(torch.cat([rows, self._exact(rows, given)])[self.place].T)
        return torch.cat(parts).reshape(x.shape)

    def integrates(self, log_prob: Callable[[Tensor, Tensor], Tensor]) -> bool:
        """True if the integrated sites follow p given the others: redrawing changes no weight."""
        with torch.no_grad(), random_numbers():
            condition = self.condition.reshape(-1, self.condition.shape[-1]).double()
            condition = condition[torch.arange(4) % len(condition)]
            x = math.pi * (2 * torch.rand(4, *self.event_shape, dtype=torch.float64) - 1)
            other = x.clone()
            sites = self.flow.ordering.site[len(self.place) - self.flow.ordering.integrated :]
            other[:, sites] = math.pi * (2 * torch.rand(4, len(sites), dtype=torch.float64) - 1)
            change = [
                log_prob(it, condition) - self._exact_part(it, condition) for it in (x, other)
            ]
        return bool((change[0] - change[1]).abs().max() < 1e-6 * (1 + change[0].abs().max()))

    def _exact_part(self, x: Tensor, condition: Tensor) -> Tensor:
        """The log-density of the integrated sites of configurations, given the others."""
        if not self.flow.ordering.integrated:
            return x.new_zeros(len(x))
        return self._exact_log_prob(x[:, self.flow.ordering.site].T, condition)

    def _flat(self, shape) -> tuple[tuple[int, ...], Tensor]:
        batch = (*shape, *self.batch_shape)
        condition = self.condition.expand(*batch, self.condition.shape[-1])
        return batch, condition.reshape(-1, condition.shape[-1])

    @abc.abstractmethod
    def _exact(self, rows: Tensor, condition: Tensor) -> Tensor:
        """The integrated rows, drawn given all others."""

    @abc.abstractmethod
    def _exact_log_prob(self, rows: Tensor, condition: Tensor) -> Tensor:
        """The log-density of the integrated rows, the last ones, given all others."""

    @abc.abstractmethod
    def _draw(self, condition: Tensor) -> tuple[Tensor, Tensor]:
        """One draw for each condition, and their log-density."""

    @abc.abstractmethod
    def _log_prob(self, x: Tensor, condition: Tensor) -> Tensor:
        """The log-density of one configuration for each condition."""

"""What the laws of coarse-to-fine flows share: draws and densities, so many at a time."""

import abc
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Distribution, constraints


class SitesLaw(Distribution, abc.ABC):
    """Values on the sites of a lattice: independent draws, and their density."""

    at_once: ClassVar[int] = 1024  # configurations drawn or judged at one time
    arg_constraints: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, flow: Any, condition: Float[Tensor, "*batch conditions"]):
        shape = torch.Size([flow.side**2])
        super().__init__(condition.shape[:-1], shape, validate_args=False)
        self.flow, self.condition = flow, condition
        self.place = flow.ordering.site.argsort()

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
        return torch.cat([self._judge(x, given) for x, given in pairs]).reshape(batch)

    @abc.abstractmethod
    def path_log_ratio(
        self, log_prob: Callable[[Tensor, Tensor], Tensor], shape: Any = ()
    ) -> Tensor:
        """Log p − log q at fresh draws, which follow the parameters; the density does not.

        So minus its mean has the path gradient of the reverse KL, whose noise vanishes where
        q = p.

        Source: G. Roeder, Y. Wu, D. Duvenaud (2017), arXiv 1703.09194, eq. (8).
        """

    def _flat(self, shape) -> tuple[tuple[int, ...], Tensor]:
        batch = (*shape, *self.batch_shape)
        condition = self.condition.expand(*batch, self.condition.shape[-1])
        return batch, condition.reshape(-1, condition.shape[-1])

    @abc.abstractmethod
    def _draw(self, condition: Tensor) -> tuple[Tensor, Tensor]:
        """One draw for each condition, and their log-density."""

    @abc.abstractmethod
    def _judge(self, x: Tensor, condition: Tensor) -> Tensor:
        """The log-density of one configuration for each condition."""

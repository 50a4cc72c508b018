"""The base class of architectures, the distribution of a flow of ours, and its latents."""

import abc
import math
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributions import Distribution, constraints

from rkl import names


class Architecture(abc.ABC):
    """A kind of flow, as a value whose repr can be parsed.

    To write one, make a frozen dataclass with ``build``; the command line finds it by its name
    in kebab case. It builds a module: ``flow(condition)``, or ``flow()`` where there
    are no conditions, returns a distribution of torch with ``log_prob`` and ``sample``.
    ``own_units`` is True if its events and conditions need no standardising; ``domain`` is "line",
    "circle" or "mixed", if the class determines it.
    """

    own_units: ClassVar[bool] = False
    domain: ClassVar[Literal["line", "circle", "mixed"] | None] = None

    @abc.abstractmethod
    def build(self, event_shape: tuple[int, ...], conditions: int = 0) -> nn.Module:
        """A flow over events of this shape, given so many conditions; float32, on the CPU.

        Raises:
            ValueError: There is no such flow.
        """


def catalogue() -> dict[str, type[Architecture]]:
    """Every architecture by its command-line name; every subclass is listed.

    >>> from rkl.flows import NSF
    >>> catalogue()["nsf"] is NSF
    True
    """
    return names.catalogue(Architecture)


def parse_architecture(text: str) -> Architecture:
    """An architecture from its repr, or the same in kebab case, or ``module:Name(k=v)``.

    Raises:
        ValueError: It cannot be read, or is no architecture.
        TypeError: It is not a string.

    >>> parse_architecture("nsf(transforms=2)").transforms
    2
    """
    if not isinstance(text, str):
        raise TypeError(f"flow must be a string such as 'nsf(transforms=2)'; got {text!r}.")
    return names.read(text, catalogue(), kind=Architecture)


class Latent(Distribution):
    """Independent normal latents of standard deviation ``scale``, cut off at ± bound · scale.

    Args:
        shape: Shape of the batch and the event together.
        event: Number of axes of the event.
        like: A tensor of the dtype and on the device of the latents.
        scale: Standard deviation before the cut, the temperature of the latents.
        bound: Bound of the latents, in standard deviations.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012
    has_rsample = True

    def __init__(
        self,
        shape: torch.Size,
        event: int,
        like: Tensor,
        scale: float = 1.0,
        bound: float = math.inf,
    ):
        split = len(shape) - event
        super().__init__(shape[:split], shape[split:], validate_args=False)
        self.like, self.scale, self.bound = like, scale, bound

    def expand(self, batch_shape: Any, _instance: Any = None) -> "Latent":
        shape = torch.Size((*batch_shape, *self.event_shape))
        return Latent(shape, len(self.event_shape), self.like, self.scale, self.bound)

    @property
    def support(self) -> Any:
        """All events, or those within the bound."""
        within = constraints.interval(-self.bound * self.scale, self.bound * self.scale)
        one = constraints.real if self.bound == math.inf else within
        return constraints.independent(one, len(self.event_shape))

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        shape = (*sample_shape, *self.batch_shape, *self.event_shape)
        like = {"dtype": self.like.dtype, "device": self.like.device}
        if self.bound == math.inf:
            return self.scale * torch.randn(shape, **like)
        inside = math.erf(self.bound / math.sqrt(2))
        uniform = (2 * torch.rand(shape, **like) - 1) * inside
        return (self.scale * math.sqrt(2) * torch.erfinv(uniform)).clamp(
            -self.bound * self.scale, self.bound * self.scale
        )

    def log_prob(self, value: Tensor) -> Tensor:
        constant = math.log(self.scale) + math.log(2 * math.pi) / 2
        terms = -(value / self.scale).square() / 2 - constant
        if self.bound < math.inf:
            outside = value.abs() > self.bound * self.scale
            inside = math.log(math.erf(self.bound / math.sqrt(2)))
            terms = (terms - inside).masked_fill(outside, -math.inf)
        return terms.flatten(terms.ndim - len(self.event_shape)).sum(-1)


class Pushforward(Distribution):
    """The distribution of events from a flow's latents: exact density, independent draws.

    The flow is a module with ``encode`` and ``decode``, from events to latents and back, each
    with the logarithm of its Jacobian.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012
    has_rsample = True

    def __init__(self, flow: Any, base: Latent, condition: Tensor | None):
        super().__init__(base.batch_shape, base.event_shape, validate_args=False)
        self.flow, self.base, self.condition = flow, base, condition

    def expand(self, batch_shape: Any, _instance: Any = None) -> "Pushforward":
        condition = self._condition(torch.Size(batch_shape))
        return Pushforward(self.flow, self.base.expand(batch_shape), condition)

    @property
    def support(self) -> Any:
        """All events."""
        return constraints.independent(constraints.real, len(self.event_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        shape = value.shape[: value.ndim - len(self.event_shape)]
        batch = torch.broadcast_shapes(shape, self.batch_shape)
        value = value.expand(*batch, *self.event_shape)
        latent, log_jacobian = self.flow.encode(value, self._condition(batch))
        return self.base.log_prob(latent) + log_jacobian

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        return self.rsample_and_log_prob(sample_shape)[0]

    def rsample_and_log_prob(self, shape: Any = ()) -> tuple[Tensor, Tensor]:
        """Events, differentiable in the parameters, and their log-density."""
        latent = self.base.rsample(shape)
        condition = self._condition(latent.shape[: latent.ndim - len(self.event_shape)])
        value, log_jacobian = self.flow.decode(latent, condition)
        return value, self.base.log_prob(latent) - log_jacobian

    def sample_and_log_prob(self, shape: Any = ()) -> tuple[Tensor, Tensor]:
        """The same without a gradient."""
        with torch.no_grad():
            return self.rsample_and_log_prob(shape)

    def _condition(self, batch: torch.Size) -> Tensor | None:
        if self.condition is None:
            return None
        return self.condition.expand(*batch, self.condition.shape[-1])


class Flow(nn.Module):
    """A flow of ours: a map between events and latents, both of one shape.

    Args:
        event_shape: Shape of one event.
        conditions: Number of conditions; 0 for a flow that is called without any.
    """

    def __init__(self, event_shape: tuple[int, ...], conditions: int):
        super().__init__()
        self.event_shape, self.conditions = torch.Size(event_shape), conditions

    def forward(self, condition: Float[Tensor, "*batch conditions"] | None = None) -> Pushforward:
        """The distribution of events, given the conditions."""
        given = 0 if condition is None else condition.shape[-1]
        if given != self.conditions:
            raise ValueError(
                f"condition must be [*batch, {self.conditions}]; got {given} of them."
            )
        batch = torch.Size() if condition is None else condition.shape[:-1]
        like = next(self.parameters())
        base = Latent(batch + self.event_shape, len(self.event_shape), like)
        return Pushforward(self, base, condition)

    def encode(
        self, value: Float[Tensor, "*shape"], condition: Float[Tensor, "*batch conditions"] | None
    ) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*batch"]]:
        """The latents of events, and log |d latent / d event|."""
        raise NotImplementedError

    def decode(
        self, latent: Float[Tensor, "*shape"], condition: Float[Tensor, "*batch conditions"] | None
    ) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*batch"]]:
        """The events of latents, and log |d event / d latent|."""
        raise NotImplementedError


def draw(
    law: Distribution, shape: tuple[int, ...] = ()
) -> tuple[Float[Tensor, "*draws"], Float[Tensor, "*batch"]]:
    """Draws of a distribution with their log-density in nats, without a gradient."""
    anyone: Any = law
    with torch.no_grad():
        for name in ("sample_and_log_prob", "rsample_and_log_prob"):
            if both := getattr(anyone, name, None):
                return both(shape)
        drawn = law.sample(shape)
        return drawn, law.log_prob(drawn)

"""A flow whose latents are a mixture of Gaussians, for few rows in clusters."""

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, constraints

from rkl.flows.architectures.base import Latent


class MixtureLatent(Distribution):
    """Latents of a mixture of Gaussians; each component is scaled and cut off about its mean.

    Args:
        log_weight: Logarithms of the weights of the components, for each of a batch.
        mean: Mean of each.
        root: Cholesky factor of the covariance of each.
        scale: Standard deviation of the normal variables before the factors, the temperature.
        bound: Bound of these, in standard deviations.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012
    has_rsample = True

    def __init__(
        self,
        log_weight: Float[Tensor, "*batch components"],
        mean: Float[Tensor, "components columns"],
        root: Float[Tensor, "components columns columns"],
        scale: float = 1.0,
        bound: float = math.inf,
    ):
        batch, size = log_weight.shape[:-1], mean.shape[-1]
        super().__init__(batch, torch.Size([size]), validate_args=False)
        self.log_weight, self.centre, self.root = log_weight, mean, root
        self.scale, self.bound = scale, bound

    def with_temperature(self, scale: float, bound: float) -> "MixtureLatent":
        """The same components with other spreads."""
        return MixtureLatent(self.log_weight, self.centre, self.root, scale, bound)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "MixtureLatent":
        weight = self.log_weight.expand(*batch_shape, self.log_weight.shape[-1])
        return MixtureLatent(weight, self.centre, self.root, self.scale, self.bound)

    @property
    def support(self) -> Any:
        """All events."""
        return constraints.independent(constraints.real, 1)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        which = Categorical(logits=self.log_weight, validate_args=False).sample(sample_shape)
        inner = self._inner(which.shape).rsample()
        x = torch.empty_like(inner)
        for i, (mean, root) in enumerate(zip(self.centre, self.root, strict=True)):
            chosen = which == i
            x[chosen] = mean + inner[chosen] @ root.T
        return x

    def log_prob(self, value: Tensor) -> Tensor:
        eye = torch.eye(self.centre.shape[-1]).to(self.root)
        inverse = torch.linalg.solve_triangular(self.root, eye, upper=False)
        away = value[..., None, :] - self.centre
        inner = torch.einsum("...kd,ked->...ke", away, inverse)
        size = self.root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        parts = self._inner(inner.shape[:-1]).log_prob(inner) - size
        return (parts + self.log_weight.log_softmax(-1)).logsumexp(-1)

    def _inner(self, batch: torch.Size) -> Latent:
        shape = torch.Size((*batch, self.centre.shape[-1]))
        return Latent(shape, 1, self.centre, self.scale, self.bound)


class MixtureStart(nn.Module):
    """A flow with a mixture for its latents, of which only the flow is trained.

    Args:
        flow: The flow, of events [columns].
        log_weight: Logarithms of the weights of the components.
        mean: Mean of each.
        root: Cholesky factor of the covariance of each.
        of_classes: Whether the components are those of the conditions, one each.
    """

    log_weight: Tensor
    mean: Tensor
    root: Tensor
    of_classes: Tensor

    def __init__(
        self,
        flow: nn.Module,
        log_weight: Float[Tensor, " components"],
        mean: Float[Tensor, "components columns"],
        root: Float[Tensor, "components columns columns"],
        of_classes: bool | Tensor,
    ):
        super().__init__()
        self.flow = flow
        named = {"log_weight": log_weight, "mean": mean, "root": root}
        named |= {"of_classes": torch.as_tensor(of_classes)}
        for name, value in named.items():
            self.register_buffer(name, value)

    def named_parts(self) -> list[tuple[str, Tensor]]:
        """Weights, means and factors of the mixture."""
        return [(name, getattr(self, name)) for name in ("log_weight", "mean", "root")]

    def forward(self, *condition: Tensor) -> Any:
        """The distribution of events, given the conditions."""
        law = self.flow(*condition)
        weight = self.log_weight
        if self.of_classes:
            weight = condition[0].to(weight).log()
        base = MixtureLatent(weight, self.mean, self.root)
        return _with_base(law, base.expand(law.batch_shape))


def latent_map(law: Any) -> Float[Tensor, "columns columns"] | None:
    """The linear map from events to latents of a fresh flow, which is a permutation.

    None where the latents are not standard normal ones [columns], or the flow is no permutation.
    """
    base = getattr(law, "base", None)
    if not isinstance(base, Distribution) or len(law.event_shape) != 1:
        return None
    if isinstance(base, Latent):
        standard = base.scale == 1 and base.bound == math.inf
    else:
        zuko = type(base).__module__.partition(".")[0] == "zuko"
        standard = zuko and bool((base.mean == 0).all() and (base.variance == 1).all())
    if not standard:
        return None
    size = law.event_shape[0]
    points = torch.eye(size + 1, size).to(base.like if isinstance(base, Latent) else base.mean)
    points = points.reshape(size + 1, *[1] * len(law.batch_shape), size)
    if hasattr(law, "transform"):  # of zuko
        images = law.transform(points)
    else:
        images = law.flow.encode(points, law._condition(points.shape[:-1]))[0]
    images = images.reshape(size + 1, -1, size)[:, 0].double()
    whole = images.round()
    permutes = bool((whole.sum(0) == 1).all() and (whole[:size].sum(1) == 1).all())
    return whole[:size].T if permutes and torch.allclose(images, whole, atol=1e-4) else None


def seen_within(flow: nn.Module) -> float | None:
    """Bound of the inputs of a coupling flow's networks; None without one."""
    inner: Any = flow.flow if isinstance(flow, MixtureStart) else flow
    within = getattr(inner, "within", math.inf)
    return None if within == math.inf else within


def with_state(
    flow: nn.Module, state: Mapping[str, Tensor], within: float | None = None
) -> nn.Module:
    """A fresh flow, wrapped like the one that this state is of, with the state loaded."""
    if within is not None:
        flow.within = within  # type: ignore[assignment]
    names = "log_weight", "mean", "root", "of_classes"
    if all(name in state for name in names):
        flow = MixtureStart(flow, *(state[name] for name in names))
    flow.load_state_dict(state)
    return flow


def _with_base(law: Any, base: MixtureLatent) -> Any:
    changed = copy.copy(law)
    changed.base = base
    return changed

"""Unconstrained coordinates for named parameters, so that a minimiser may go anywhere."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Distribution, constraints
from torch.distributions.transforms import (
    CorrCholeskyTransform,
    ExpTransform,
    LowerCholeskyTransform,
    PositiveDefiniteTransform,
    SigmoidTransform,
    Transform,
    identity_transform,
)

LawOf = Callable[[dict[str, Tensor]], Distribution]
SLACK = 1e-6  # by which draws rounded to single precision may miss a sum, or a symmetry


@dataclass(frozen=True)
class Part:
    """One parameter: its shape, its map from coordinates, and their centre and spread."""

    shape: torch.Size
    free: torch.Size  # shape of its coordinates
    transform: Any  # a Transform, whose calls torch leaves without types
    centre: float
    spread: float
    margin: float = 0.0  # how far from the edge of its domain draws are put that lie on it

    def free_of(self, values: Tensor) -> Tensor:
        """The coordinates of values, before centre and spread."""
        return self.transform.inv(_off_edge(values, self.transform, self.margin))


@dataclass(frozen=True)
class Chart:
    r"""Coordinates t [k] of named parameters: θ = transform(centre + spread · t) for each.

    A minimiser over θ does not depend on the chart, which only decides what is within reach
    and how fast it is reached. Each parameter has one centre and one spread for all of its
    elements: permuting the labels of a mixture permutes the coordinates and changes nothing else.
    """

    parts: Mapping[str, Part]
    fixed: Mapping[str, Tensor] = field(default_factory=dict)  # [*shape] each, without coordinates

    @property
    def size(self) -> int:
        """The number k of coordinates."""
        return sum(part.free.numel() for part in self.parts.values())

    def point(self, coordinates: Float[Tensor, "*lead k"]) -> dict[str, Tensor]:
        """The parameters at these coordinates, [*lead, *shape] each."""
        pieces = coordinates.split([part.free.numel() for part in self.parts.values()], -1)
        found = {
            name: part.transform(
                part.centre + part.spread * piece.reshape(*piece.shape[:-1], *part.free)
            )
            for (name, part), piece in zip(self.parts.items(), pieces, strict=True)
        }
        lead = coordinates.shape[:-1]
        return found | {name: x.expand(*lead, *x.shape) for name, x in self.fixed.items()}

    def coordinates(self, values: Mapping[str, Tensor]) -> Float[Tensor, "*lead k"]:
        """The coordinates of parameters [*lead, *shape]."""
        pieces = []
        for name, part in self.parts.items():
            lead = values[name].shape[: values[name].ndim - len(part.shape)]
            free = (part.free_of(values[name]) - part.centre) / part.spread
            pieces.append(free.reshape(*lead, -1))
        return torch.cat(pieces, -1)


def chart_of(
    values: Mapping[str, Tensor],
    law: LawOf | None = None,
    transforms: Mapping[str, Transform] | None = None,
) -> Chart:
    r"""The chart for parameters, of which draws are at hand.

    Simplices, triangular, correlation and positive definite matrices are told by their draws.
    Any other parameter takes the widest of the line, the half-line and the unit interval in
    which ``law`` still makes a distribution; without a law, the line or the half-line, whichever
    holds its draws.

    Args:
        values: Draws by name, [draws, *shape] each, in double precision.
        law: The map from draws to distributions, asked what it accepts.
        transforms: Maps from coordinates to parameters, by name, in place of those found here.

    Raises:
        ValueError: A parameter is a whole number, or its draws are not finite or on the edge.

    >>> chart_of({"scale": torch.tensor([1.0, 2.0, 4.0])}).parts["scale"].transform
    ExpTransform()
    """
    parts = {}
    for name, drawn in values.items():
        if not drawn.is_floating_point():
            raise ValueError(
                f"{name} must hold real numbers for an act to be found by optimisation; "
                f"got {drawn.dtype}."
            )
        given = (transforms or {}).get(name)
        transform: Any = given or _transform(name, values, law)
        margin = 0.0 if given else _margin(drawn, transform)
        free = transform.inv(_off_edge(drawn, transform, margin))
        if not free.isfinite().all():
            raise ValueError(f"{name} must lie inside its domain; some draw is on its edge.")
        # Coordinates of a simplex turn when its classes are permuted, about 0.
        centre = 0 * free.mean() if isinstance(transform, LogRatioTransform) else free.mean()
        spread = (free - centre).square().mean().sqrt().item() or 1.0
        shapes = drawn.shape[1:], free.shape[1:]
        parts[name] = Part(*shapes, transform, centre.item(), spread, margin)
    return Chart(parts)


def _margin(drawn: Tensor, transform: Any) -> float:
    """A tenth of the least distance from the edge, where some draws lie on it; else 0."""
    if isinstance(transform, ExpTransform | LogRatioTransform):
        distance = drawn
    elif isinstance(transform, SigmoidTransform):
        distance = torch.minimum(drawn, 1 - drawn)
    else:
        return 0.0
    if bool((distance > 0).all()):
        return 0.0
    inside = distance[distance > 0]
    return min(1e-2, inside.min().item() / 10) if inside.numel() else 1e-2


def _off_edge(values: Tensor, transform: Any, margin: float) -> Tensor:
    """Values no nearer to the edge of their domain than a margin: where a minimiser may start."""
    if not margin:
        return values
    if isinstance(transform, SigmoidTransform):
        return values.clamp(margin, 1 - margin)
    values = values.clamp_min(margin)
    if isinstance(transform, LogRatioTransform):
        return values / values.sum(-1, keepdim=True)
    return values


def _transform(name: str, values: Mapping[str, Tensor], law: LawOf | None) -> Any:
    drawn = values[name]
    if drawn.ndim > 2 and drawn.shape[-1] == drawn.shape[-2] > 1 and (found := _matrix(drawn)):
        return found
    half = (drawn >= 0).all() & (drawn > 0).any()
    if half and drawn.ndim > 1 < drawn.shape[-1] and ((drawn.sum(-1) - 1).abs() < SLACK).all():
        return LogRatioTransform(drawn.shape[-1])
    scalars: list[tuple[bool, Transform, Tensor]] = [
        (True, identity_transform, -1 - drawn.abs()),
        (bool(half), ExpTransform(), 1 + drawn.abs()),
        (bool(half & (drawn <= 1).all()), SigmoidTransform(), drawn),
    ]
    for holds, transform, probe in scalars if law else scalars[bool(half) :]:
        if holds and (law is None or _accepts(law, values, name, probe)):
            return transform
    return scalars[0][1]  # the law will say where it ends


def _matrix(drawn: Tensor) -> Transform | None:
    """The map onto matrices of the kind that all the draws are, if it is a special one."""
    diagonal = drawn.diagonal(dim1=-2, dim2=-1)
    if not (diagonal > 0).all():
        return None
    if not drawn.triu(1).any():
        unit = ((drawn.square().sum(-1) - 1).abs() < SLACK).all()
        return CorrCholeskyTransform() if unit else LowerCholeskyTransform()
    scale = drawn.abs().amax((-2, -1), keepdim=True)
    if ((drawn - drawn.mT).abs() > SLACK * scale).any():
        return None
    if (torch.linalg.cholesky_ex(drawn).info > 0).any():
        return None
    unit = ((diagonal - 1).abs() < SLACK).all()
    return CorrelationTransform() if unit else PositiveDefiniteTransform()


def _accepts(law: LawOf, values: Mapping[str, Tensor], name: str, probe: Tensor) -> bool:
    """Whether a law makes distributions of these values, and densities where there is mass."""
    few = {key: x[:8] for key, x in values.items()}
    try:
        made = law(few | {name: probe[:8]})
        with torch.random.fork_rng(devices=[]):
            points = law(few).sample()
        return _sound(made) and not made.log_prob(points).isnan().any()
    except (ValueError, RuntimeError):
        return False


def _sound(law: Distribution) -> bool:
    """Whether the parameters of a law and of its parts are where they belong."""
    inner = ("base_dist", "mixture_distribution", "component_distribution")
    parts = [getattr(law, key) for key in inner if hasattr(law, key)]
    if parts:
        return all(map(_sound, parts))
    try:
        own = law.arg_constraints
    except NotImplementedError:  # nothing is said of them
        return True
    checks = (c.check(getattr(law, k)) for k, c in own.items() if not constraints.is_dependent(c))
    return all(bool(check.all()) for check in checks)


class LogRatioTransform(Transform):
    r"""Softmax of coordinates along an orthonormal basis of the vectors that sum to 0.

    Permuting the classes turns the coordinates by an orthogonal matrix, so that a minimiser
    which does not see rotations does not see labels. Source: Egozcue et al. (2003), eq. (18).
    """

    domain = constraints.real_vector
    codomain = constraints.simplex
    bijective = True

    def __init__(self, classes: int):
        super().__init__()
        full = torch.eye(classes, dtype=torch.float64) - 1 / classes
        self.basis = torch.linalg.svd(full).U[:, : classes - 1]

    def __eq__(self, other):
        return isinstance(other, LogRatioTransform) and self.basis.shape == other.basis.shape

    def _call(self, x):
        return (x @ self.basis.T).softmax(-1)

    def _inverse(self, y):
        return y.log() @ self.basis


class CorrelationTransform(Transform):
    """A correlation matrix by the coordinates of its Cholesky factor."""

    domain = constraints.real_vector
    codomain = constraints.positive_definite
    bijective = True
    factor: Any = CorrCholeskyTransform()

    def _call(self, x):
        lower = self.factor(x)
        return lower @ lower.mT

    def _inverse(self, y):
        return self.factor.inv(torch.linalg.cholesky(y))

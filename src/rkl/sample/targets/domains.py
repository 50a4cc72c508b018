r"""Domains of targets, coordinate by coordinate, and maps to coordinates without bounds.

    x = a + exp(z) on (a, ∞),  x = b − exp(z) on (−∞, b),  x = a + (b − a)/(1 + exp(−z)) on (a, b)

Angles and coordinates on the line stay as they are. A density of z is that of x times |dx/dz|, so
that log Z is the same.
"""

import functools
import math
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import logsigmoid

Interval = tuple[float, float]
Kind = Literal["line", "circle"] | Interval
Domain = Any  # "line", "circle", "positive" or (low, high), of all coordinates or a tuple of them
# z beyond which the density counts as 0: squares of x must be finite
LOWEST, HIGHEST = -80.0, 40.0
TINY = 1e-300  # in place of 0 under a logarithm
EXPECTED = (
    "'line', 'circle', 'positive' or a pair (low, high), for all coordinates, or a tuple with one "
    'of them for each, such as ("line", "positive", (0, 1), "circle")'
)


def parse_domain(domain: Domain, size: int) -> tuple[Kind, ...]:
    """The domain of each coordinate: "line", "circle" or an open interval.

    Args:
        domain: That of all coordinates, or a tuple with one for each.
        size: Number of coordinates.

    Raises:
        ValueError: It cannot be read.

    >>> parse_domain(("line", "positive"), 2)
    ('line', (0.0, inf))
    """
    if isinstance(domain, str) or _is_interval(domain):
        return (_kind(domain, domain),) * size
    if not isinstance(domain, tuple | list):
        raise ValueError(f"domain must be {EXPECTED}; got {domain!r}.")
    if len(domain) != size:
        raise ValueError(
            f"domain must have one entry for each of {size} coordinates; got {len(domain)}: "
            f"{domain!r}."
        )
    return tuple(_kind(it, domain) for it in domain)


def _is_interval(domain: Any) -> bool:
    return (
        isinstance(domain, tuple | list)
        and len(domain) == 2
        and all(isinstance(it, int | float) and not isinstance(it, bool) for it in domain)
    )


def _kind(one: Any, domain: Domain) -> Kind:
    if one in ("line", "circle"):
        return one
    if one == "positive":
        return 0.0, math.inf
    if not _is_interval(one):
        raise ValueError(f"domain must be {EXPECTED}; got {domain!r}.")
    low, high = (float(it) for it in one)
    if not low < high or low == math.inf or high == -math.inf:
        raise ValueError(f"domain: {one!r} must be a pair (low, high) with low < high.")
    return "line" if math.isinf(low) and math.isinf(high) else (low, high)


class Chart:
    """The map between coordinates of a target and others without bounds.

    Args:
        kinds: The domain of each coordinate, as :func:`parse_domain` gives it.
        event_shape: The shape of one x.

    Attributes:
        event_shape: The shape of one x.
        circle: True for coordinates that are angles, of that shape.
        has_bounds: True for coordinates with bounds.
        bounded: Whether any has.
    """

    def __init__(self, kinds: tuple[Kind, ...], event_shape: tuple[int, ...]):
        self.event_shape = event_shape
        bounds = [it if isinstance(it, tuple) else (-math.inf, math.inf) for it in kinds]
        low, high = torch.tensor(bounds, dtype=torch.float64).reshape(-1, 2).T
        self.low, self.high = low.reshape(event_shape), high.reshape(event_shape)
        angles = torch.tensor([it == "circle" for it in kinds])
        self.circle: Bool[Tensor, "*event"] = angles.reshape(event_shape)
        self.has_bounds: Bool[Tensor, "*event"] = self.low.isfinite() | self.high.isfinite()
        self.bounded = bool(self.has_bounds.any())

    @property
    def unbounded_domain(self) -> Domain:
        """The domain of the new coordinates."""
        if self.circle.all():
            return "circle"
        if not self.circle.any():
            return "line"
        return tuple("circle" if it else "line" for it in self.circle.flatten().tolist())

    def inside(self, x: Float[Tensor, "*batch_event"]) -> Bool[Tensor, "*batch_event"]:
        """True for each coordinate inside of its domain."""
        return (x > self.low.to(x)) & (x < self.high.to(x))

    def to_bounded(
        self, z: Float[Tensor, "*batch_event"]
    ) -> tuple[Float[Tensor, "*batch_event"], Float[Tensor, "*batch"]]:
        """Coordinates x of a target, and log |dx/dz|; that is −∞ where x has no more digits."""
        if not self.bounded:
            return z, z.new_zeros(z.shape[: z.ndim - len(self.event_shape)])
        low, high = self.low.to(z), self.high.to(z)
        below, above = low.isfinite(), high.isfinite()
        both, some = below & above, below | above
        base, top = torch.where(below, low, 0.0), torch.where(above, high, 0.0)
        size, w = torch.where(both, top - base, 1.0), z.clamp(LOWEST, HIGHEST)
        one_sided = torch.where(below, base + w.exp(), top - w.exp())
        x = torch.where(some, torch.where(both, base + size * w.sigmoid(), one_sided), z)
        # Rounding must not put x on its bound, where a density may be infinite.
        x = torch.where(some, torch.minimum(x, high.nextafter(low)), x)
        x = torch.where(some, torch.maximum(x, low.nextafter(high)), x)
        of_both = size.log() + logsigmoid(w) + logsigmoid(-w)
        log_slope = torch.where(both, of_both, torch.where(some, w, 0.0))
        log_slope = torch.where(some & (w != z), -math.inf, log_slope)
        return x, _sum_over_event(log_slope, self.event_shape)

    def clamp(self, z: Float[Tensor, "*batch_event"]) -> Float[Tensor, "*batch_event"]:
        """The same z, limited to values at which x still has digits."""
        return torch.where(self.has_bounds.to(z.device), z.clamp(LOWEST, HIGHEST), z)

    def to_unbounded(
        self, x: Float[Tensor, "*batch_event"]
    ) -> tuple[Float[Tensor, "*batch_event"], Float[Tensor, "*batch"]]:
        """New coordinates z of x, and log |dx/dz| there; −∞ where x is outside of its domain."""
        if not self.bounded:
            return x, x.new_zeros(x.shape[: x.ndim - len(self.event_shape)])
        y, low, high = x.double(), self.low.to(x.device), self.high.to(x.device)
        below, above = low.isfinite(), high.isfinite()
        outside = ~((y > low) & (y < high)) & (below | above)
        up, down = ((y - low).clamp_min(TINY).log(), (high - y).clamp_min(TINY).log())
        z = torch.where(below & above, up - down, torch.where(below, up, down))
        z = torch.where(below | above, z, y)
        _, log_slope = self.to_bounded(z)
        log_slope = torch.where(_any(outside, self.event_shape), -math.inf, log_slope)
        return torch.where(outside, 0.0, z).to(x), log_slope.to(x)


def chart_of(domain: Domain, event_shape: tuple[int, ...]) -> Chart:
    """The chart of a domain, cached because every step needs it.

    Raises:
        ValueError: The domain cannot be read.

    >>> chart_of("positive", (2,)) is chart_of((0, math.inf), (2,))
    True
    """
    shape = tuple(event_shape)
    return _made_once(parse_domain(domain, math.prod(shape)), shape)


_made_once = functools.lru_cache(maxsize=64)(Chart)


def _sum_over_event(values: Tensor, event_shape: tuple[int, ...]) -> Tensor:
    return values.flatten(values.ndim - len(event_shape)).sum(-1)


def _any(values: Tensor, event_shape: tuple[int, ...]) -> Tensor:
    return values.flatten(values.ndim - len(event_shape)).any(-1)


def check_inside(name: str, chart: Chart, x: Float[Tensor, "rows *event"]) -> None:
    """Refuse rows with a coordinate outside of its domain.

    Raises:
        ValueError: Naming the coordinate, the value and the domain.
    """
    outside = ~chart.inside(x).flatten(1)
    if not outside.any():
        return
    row, k = outside.nonzero()[0].tolist()
    low, high = chart.low.flatten()[k].item(), chart.high.flatten()[k].item()
    value = x.flatten(1)[row, k].item()
    raise ValueError(f"{name}: x{k} of row {row} must lie in ({low:g}, {high:g}); got {value:g}.")

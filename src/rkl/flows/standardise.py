"""From the user's units to standard ones and back: the affine map, or bend, of a fitted Gaussian.

Of vectors, coordinates with heavy or skewed tails are first bent by asinh((x − c)/w), then each is
shifted and scaled, then all are mixed so that they are uncorrelated. A flow that begins as the
identity begins as a Gaussian fitted to the bent coordinates.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributions import Distribution, constraints

from rkl.flows.rows import Data

WIDEST = 1_024  # coordinates up to which their correlations are removed
SINGULAR = 1e-12  # share of its variance that a column must have beside the others
KNOTS = 1_000  # order statistics by which a bend is found
NARROWEST, WIDEST_BEND = 0.002, 30.0  # of a bend, in spreads of the middle 68 %
HEAVY = 0.5  # |skewness|, or excess kurtosis, from which a bend is looked for
TIED = 0.05  # share of rows on one value, from which a column is not bent
ROUNDS = 40  # of the search for a bend


class Bend(NamedTuple):
    """Coordinates to bend by asinh((x − centre)/width)."""

    bent: Tensor
    centre: Tensor
    width: Tensor


class Levels(NamedTuple):
    """The levels of quantised coordinates: their spacing, 0 of continuous ones, and their ends.

    Of columns the levels themselves too, as :meth:`rkl.flows.rows.Data.levels_of_columns` has
    them, for they need not be equally far apart.
    """

    step: Tensor
    low: Tensor
    high: Tensor
    places: Tensor | None = None


class Units(nn.Module):
    """The map of events in the user's units to standard ones.

    Args:
        shift: Mean of the events, after bending.
        scale: Their standard deviation.
        bend: Bent coordinates, with centre and width.
        mix: Matrix that removes the correlations, [coordinates, coordinates].
        levels: Levels of quantised coordinates.
    """

    shift: Tensor
    scale: Tensor

    def __init__(
        self,
        shift: Float[Tensor, "*event"],
        scale: Float[Tensor, "*event"],
        bend: Bend | None = None,
        mix: Float[Tensor, "coordinates coordinates"] | None = None,
        levels: Levels | None = None,
    ):
        super().__init__()
        self.register_buffer("shift", shift)
        self.register_buffer("scale", scale)
        self.register_buffer("mix", mix)
        unmix = None if mix is None else torch.linalg.inv(mix.double()).to(mix.dtype)
        self.register_buffer("unmix", unmix)
        for kind, given in ((Bend, bend), (Levels, levels)):
            for name in kind._fields:
                self.register_buffer(name, getattr(given, name, None))

    @classmethod
    def of_rows(cls, rows: Data, *, bend: bool = True) -> "Units":
        """With the moments of these rows.

        Raises:
            ValueError: A column is a linear function of others.
        """
        shift, scale = rows.centre_and_spread()
        levels = None
        if rows.step.any():
            ends = rows.level_range()
            levels = Levels(rows.step_of_columns().clone(), *ends, rows.levels_of_columns())
        if len(rows.event_shape) != 1:
            return cls(shift, scale, levels=levels)
        values, kind = rows.values.double(), rows.values.dtype
        bending = fitted_bend(values, rows) if bend else None
        if bending is not None:
            values = _bent(values, bending)
            moments = values.mean(0), values.std(0)
            shift, scale = (
                torch.where(bending.bent, new, old.double()).to(kind)
                for new, old in zip(moments, (shift, scale), strict=True)
            )
            bending = Bend(bending.bent, bending.centre.to(kind), bending.width.to(kind))
        return cls(shift, scale, bending, _decorrelating(values, rows, bending), levels)

    @classmethod
    def of_state(cls, state: Mapping[str, Tensor]) -> "Units":
        """The units of a state dictionary."""
        bend = Bend(*map(state.__getitem__, Bend._fields)) if "bent" in state else None
        levels = None
        if "step" in state:
            levels = Levels(state["step"], state["low"], state["high"], state.get("places"))
        return cls(state["shift"], state["scale"], bend, state.get("mix"), levels)

    @property
    def bending(self) -> Bend | None:
        """Bent coordinates, with centre and width."""
        transform: Any = self
        return (
            None
            if transform.bent is None
            else Bend(transform.bent, transform.centre, transform.width)
        )

    def encode(self, value: Float[Tensor, "*batch_event"]) -> tuple[Tensor, Tensor]:
        """Standardised events, and log |d standard / d event|.

        Raises:
            ValueError: The events have another shape than those that the units are of.
        """
        event = self.shift.shape
        if value.shape[-len(event) :] != event:
            raise ValueError(
                f"value must be [*batch, {', '.join(map(str, event))}], as the rows of the data "
                f"are; got {list(value.shape)}."
            )
        transform: Any = self
        bending = self.bending
        inner, log_slope = value, -self.scale.log().sum()
        if bending is not None:
            inner = _bent(value, bending)
            log_slope = log_slope + _log_slope(value, bending).sum(-1)
        inner = (inner - self.shift) / self.scale
        if transform.mix is not None:
            inner = inner @ transform.mix.to(inner.dtype).T
            log_slope = log_slope + torch.linalg.slogdet(transform.mix)[1]
        return inner, log_slope

    def decode(self, value: Float[Tensor, "*batch_event"]) -> Float[Tensor, "*batch_event"]:
        """Standardised events in the user's units."""
        transform: Any = self
        inner = value.to(self.shift.dtype)
        if transform.unmix is not None:
            inner = inner @ transform.unmix.T
        inner = self.shift + self.scale * inner
        return inner if self.bending is None else _unbent(inner, self.bending)

    def gaussian(self, value: Float[Tensor, "rows *event"]) -> Float[Tensor, " rows"]:
        """Log-density of events if standardised ones are standard normal, in nats."""
        inner, log_slope = self.encode(value)
        flat = inner.double().flatten(1)
        constant = flat.shape[1] / 2 * math.log(2 * math.pi)
        return -flat.square().sum(1) / 2 - constant + log_slope.double()

    def spread_of(self, value: Float[Tensor, "*batch_event"]) -> Float[Tensor, "*batch_event"]:
        """Events in units of the spread of each column, not mixed: no metric depends on units."""
        inner = value if self.bending is None else _bent(value, self.bending)
        return (inner - self.shift) / self.scale

    def step_of_rows(self) -> Tensor:
        """The step over which quantised values are spread, 0 of continuous ones."""
        transform: Any = self
        return self.shift.new_zeros(()) if transform.step is None else transform.step

    def to_levels(self, value: Float[Tensor, "*batch_event"]) -> Float[Tensor, "*batch_event"]:
        """Events with each quantised coordinate on the nearest of its levels, between the ends."""
        transform: Any = self
        if transform.step is None:
            return value
        step = torch.where(transform.step > 0, transform.step, 1.0)
        near = transform.low + step * ((value - transform.low) / step).round()
        near = near.clamp(transform.low, transform.high)
        if transform.places is not None:
            known = _nearest(transform.places, value)
            near = torch.where(known.isnan(), near, known)
        return torch.where(transform.step > 0, near, value)


class Standardised(nn.Module):
    """The flow of events in the user's units, from a flow of standardised ones.

    Args:
        flow: The flow of standardised events.
        units: The standardisation.
    """

    def __init__(self, flow: nn.Module, units: Units):
        super().__init__()
        self.flow, self.units = flow, units

    def forward(self, *condition: Tensor) -> "StandardisedLaw":
        """The distribution of events in the user's units, given the conditions."""
        return StandardisedLaw(self.flow(*condition), self.units, self.dtype)

    @property
    def shift(self) -> Tensor:
        """Mean of the events."""
        return self.units.shift

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the inner flow."""
        return next(self.flow.parameters()).dtype

    def standardise(self, value: Float[Tensor, "*batch_event"]) -> Float[Tensor, "*batch_event"]:
        """Standardised events, in the precision of the inner flow."""
        return self.units.encode(value)[0].to(self.dtype)

    def to_levels(self, value: Float[Tensor, "*batch_event"]) -> Float[Tensor, "*batch_event"]:
        """Samples with each quantised coordinate on the nearest of the levels of the data.

        They stay between the lowest and the highest level; data without levels do not change.
        """
        return self.units.to_levels(value)


class StandardisedLaw(Distribution):
    """Distribution of events in the user's units, from one of standardised events."""

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012
    has_rsample = True

    def __init__(self, law: Any, units: Units, dtype: torch.dtype):
        super().__init__(law.batch_shape, law.event_shape, validate_args=False)
        self.law, self.units, self.dtype = law, units, dtype

    def around(self, law: Distribution) -> "StandardisedLaw":
        """The same units about another distribution."""
        return StandardisedLaw(law, self.units, self.dtype)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "StandardisedLaw":
        return self.around(self.law.expand(batch_shape))

    @property
    def support(self) -> Any:
        """All events."""
        return constraints.independent(constraints.real, len(self.event_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        inner, log_slope = self.units.encode(value)
        return self.law.log_prob(inner.to(self.dtype)) + log_slope

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        return self.units.decode(self.law.rsample(sample_shape))

    def rsample_and_log_prob(self, shape: Any = ()) -> tuple[Tensor, Tensor]:
        """Events, differentiable in the parameters, and their log-density."""
        value, log_q = self.law.rsample_and_log_prob(shape)
        value = self.units.decode(value)
        return value, log_q + self.units.encode(value)[1]


def _nearest(levels: Tensor, value: Tensor) -> Tensor:
    """The nearest of the levels of its column to each coordinate of vectors."""
    columns = value.reshape(-1, len(levels)).T.to(levels).contiguous()
    index = torch.searchsorted((levels[:, 1:] + levels[:, :-1]) / 2, columns)
    return levels.gather(1, index).T.reshape(value.shape)


def _bent(value: Tensor, bend: Bend) -> Tensor:
    return torch.where(bend.bent, torch.asinh((value - bend.centre) / bend.width), value)


def _unbent(value: Tensor, bend: Bend) -> Tensor:
    # Where nothing is bent sinh might overflow, and its gradient be no number.
    inner = torch.where(bend.bent, value, 0.0)
    return torch.where(bend.bent, bend.centre + bend.width * torch.sinh(inner), value)


def _log_slope(value: Tensor, bend: Bend) -> Tensor:
    slope = -0.5 * ((value - bend.centre) / bend.width).square().log1p() - bend.width.log()
    return torch.where(bend.bent, slope, 0.0)


def fitted_bend(values: Float[Tensor, "rows columns"], rows: Data) -> Bend | None:
    """The columns of which Johnson's SU fits better than a Gaussian, by BIC; None without any.

    SU is the distribution of c + w sinh(y) for Gaussian y: skewed, or with heavy tails as the
    log-normal one has. Columns of levels, or with many ties, are not bent.

    Source: Johnson (1949), Biometrika 36, 149.
    """
    count = len(values)
    ordered = values.sort(0).values
    low, middle, high = ordered[[round(at * (count - 1)) for at in (0.16, 0.5, 0.84)]]
    spread = (high - low) / 2
    usable = (spread > 0) & (rows.step_of_columns() == 0) & ~_columns_with_ties(ordered)
    standard = (values - values.mean(0)) / values.std(0)
    skewness, kurtosis = standard.pow(3).mean(0), standard.pow(4).mean(0) - 3
    index = (usable & ((skewness.abs() > HEAVY) | (kurtosis > HEAVY))).nonzero().flatten()
    if not len(index):
        return None
    knots = torch.linspace(0, count - 1, min(count, KNOTS)).round().long()
    middle, spread = middle[index], spread[index]
    thinned = ((ordered[knots][:, index] - middle) / spread).contiguous()
    centre, width = _minimum(thinned)
    standard = (values[:, index] - middle) / spread
    plain = _cost(standard, torch.zeros_like(centre), torch.full_like(width, math.inf))
    gain = count * (plain - _cost(standard, centre, width))  # in nats
    better = gain > math.log(count)  # two parameters more, at half of log n each
    if not better.any():
        return None
    bent = torch.zeros(values.shape[1], dtype=torch.bool, device=values.device)
    bent[index[better]] = True
    whole = [torch.zeros_like(values[0]), torch.ones_like(values[0])]
    whole[0][index], whole[1][index] = middle + spread * centre, spread * width
    return Bend(bent, torch.where(bent, whole[0], 0.0), torch.where(bent, whole[1], 1.0))


def _columns_with_ties(ordered: Tensor) -> Tensor:
    apart = max(1, round(TIED * len(ordered)))
    return (ordered[apart:] == ordered[:-apart]).any(0)


def _cost(x: Tensor, centre: Tensor, width: Tensor) -> Tensor:
    """Minus the log-likelihood of each column, over rows, up to a constant: SU, or a Gaussian."""
    scaled = (x - centre) / width
    plain = ~width.isfinite()
    inner = torch.where(plain, x, scaled.asinh())
    slope = torch.where(plain, 0.0, 0.5 * scaled.square().log1p() + width.log())
    return inner.std(0).log() + slope.mean(0)


def _minimum(x: Float[Tensor, "rows columns"]) -> tuple[Tensor, Tensor]:
    """Centre and width of the best bend of each column, by a grid and a search that narrows."""
    low, high = x[0], x[-1]
    centres = [torch.zeros_like(low), -torch.ones_like(low), torch.ones_like(low), low, high]
    widths = [torch.full_like(low, it) for it in (0.01, 0.1, 0.3, 1.0, 3.0, 10.0)]
    best = torch.full_like(low, math.inf)
    at = [torch.zeros_like(low), torch.zeros_like(low)]
    floor, ceiling = math.log(NARROWEST), math.log(WIDEST_BEND)

    def look(centre: Tensor, log_width: Tensor) -> None:
        cost = _cost(x, centre, log_width.exp())
        better = cost < best
        best.copy_(torch.where(better, cost, best))
        at[0], at[1] = torch.where(better, centre, at[0]), torch.where(better, log_width, at[1])

    for centre in centres:
        for width in widths:
            look(centre.clone(), width.log())
    step = 1.0
    for _ in range(ROUNDS):
        middle, log_width = at[0], at[1]
        before = best.clone()
        for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, -1), (1, -1), (-1, 1)):
            moved = (log_width + step * dy).clamp(floor, ceiling)
            look(middle + step * dx * log_width.exp(), moved)
        if not (best < before).any():
            step /= 2
    return at[0], at[1].exp()


def _decorrelating(
    values: Float[Tensor, "rows columns"], rows: Data, bend: Bend | None
) -> Tensor | None:
    """The symmetric root of the inverse of the correlations; None where they are kept.

    Source: Kessy, Lewin and Strimmer (2018), arXiv 1512.00809: ZCA-cor whitening, which keeps
    each standardised coordinate nearest to its own column.

    Raises:
        ValueError: A column is a linear function of others.
    """
    count, size = values.shape
    if size == 1 or size > WIDEST:
        return None
    noise = rows.step_of_columns().double().square() / 12
    covariance = values.T.cov() + noise.diag()
    spread = covariance.diagonal().sqrt()
    correlation = covariance / spread / spread[:, None]
    if count > size and bend is None:  # of a plain Gaussian, which is made of every fit
        _check_dependence(correlation, rows)
    if count < 2 * size:  # too few rows to tell: pulled towards no correlation
        share = min(1.0, size / count)
        correlation = (1 - share) * correlation + share * torch.eye(size).to(correlation)
    root, vectors = torch.linalg.eigh(correlation)
    floor = SINGULAR * root[-1]
    mix = (vectors * root.clamp_min(floor).rsqrt()) @ vectors.T
    return mix.to(rows.values.dtype)


def _check_dependence(correlation: Tensor, rows: Data) -> None:
    if torch.linalg.eigvalsh(correlation)[0] > SINGULAR:
        return
    size = len(correlation)
    names = rows.columns if len(rows.columns) == size else [str(it) for it in range(size)]
    for last in range(1, size):
        before = correlation[:last, :last] + SINGULAR / 100 * torch.eye(last).to(correlation)
        slopes = torch.linalg.solve(before, correlation[:last, last])
        if 1 - slopes @ correlation[:last, last] > 10 * SINGULAR * size:
            continue
        of = [names[it] for it in (slopes.abs() > 1e-3).nonzero().flatten().tolist()]
        raise ValueError(
            f"data: column {names[last]} is a linear function of {', '.join(of[:8])}"
            f"{', ...' * (len(of) > 8)}, as a total is of its parts: the density is infinite. "
            "Leave it out."
        )

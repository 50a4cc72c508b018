"""Regressions given their design: distributions of all its responses, and their families."""

import abc
import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import (
    Bernoulli,
    Binomial,
    Distribution,
    Independent,
    Normal,
    Poisson,
    constraints,
)
from torch.nn.functional import softplus

from rkl.bayes.families.base import ExponentialFamily, Fixed, Natural
from rkl.bayes.families.matrices import log_det, times
from rkl.bayes.families.special import bernoulli_kl, log_gap, relative_gap
from rkl.checks import floats
from rkl.divergences.base import broadcast_shape
from rkl.readers import masked_numbers


class Regression(Distribution):
    """The responses of all rows of a design, one event [rows].

    The linear predictor is design · coefficients + offset, with an offset for each row.
    """

    # torch's stub declares a property, its own distributions have a table of the class
    arg_constraints = {"coefficients": constraints.real_vector}  # pyright: ignore

    def __init__(
        self,
        design: Float[Tensor, "rows columns"],
        coefficients: Float[Tensor, "*batch columns"],
        offset: Any = 0.0,
        validate_args: bool = True,
    ):
        floats("design", design)
        floats("coefficients", coefficients)
        if design.ndim != 2 or coefficients.shape[-1:] != design.shape[1:]:
            raise ValueError(
                "design must be [rows, columns] and coefficients [..., columns]; "
                f"got {list(design.shape)} and {list(coefficients.shape)}."
            )
        for name, value in (("design", design), ("coefficients", coefficients)):
            if validate_args and not value.isfinite().all():
                raise ValueError(f"{name} must be finite; got {_first(value)}.")
        self.design, self.coefficients = design.to(coefficients.dtype), coefficients
        self.offset = by_row("offset", offset, self.design)
        super().__init__(coefficients.shape[:-1], design.shape[:1], validate_args=validate_args)

    @property
    @abc.abstractmethod
    def rows(self) -> Distribution:
        """The distribution of the response of each row, [*batch, rows]."""

    @property
    def predictor(self) -> Tensor:
        """The linear predictor, design · coefficients + offset [*batch, rows]."""
        return times(self.design, self.coefficients) + self.offset

    @constraints.dependent_property(is_discrete=False, event_dim=1)
    def support(self):
        return constraints.independent(self.rows.support, 1)

    @property
    def mean(self) -> Tensor:
        return self.rows.mean

    @property
    def variance(self) -> Tensor:
        return self.rows.variance

    def log_prob(self, value: Tensor) -> Tensor:
        return self.rows.log_prob(value).sum(-1)

    def entropy(self) -> Tensor:
        return self.rows.entropy().sum(-1)

    def sample(self, sample_shape=()) -> Tensor:
        return self.rows.sample(sample_shape)

    def expand(self, batch_shape, _instance=None):
        coefficients = self.coefficients.expand(*batch_shape, -1)
        return type(self)(self.design, coefficients, self.offset, validate_args=False)


def by_row(name: str, value: Any, design: Tensor) -> Tensor:
    """A number for each row of a design [rows], or one for all [], in its dtype.

    Raises:
        TypeError: The value is no number, and no list or tensor of them.
        ValueError: It is not finite, or has another length.
    """
    if masked := masked_numbers(value):
        raise ValueError(f"{name} must be finite: {masked}.")
    try:
        column = torch.as_tensor(value, dtype=design.dtype, device=design.device)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be numbers, one for each row; got {value!r:.60}.") from error
    if column.shape not in (torch.Size([]), design.shape[:1]):
        raise ValueError(
            f"{name} must be one number, or one for each of {len(design)} rows of the design; "
            f"got {list(column.shape)}."
        )
    if not column.isfinite().all():
        raise ValueError(f"{name} must be finite; got {_first(column.flatten())}.")
    return column


def by_rows(distribution: Distribution) -> Distribution:
    """A regression as the independent responses of its rows, as a function would write it."""
    return (
        Independent(distribution.rows, 1) if isinstance(distribution, Regression) else distribution
    )


class GaussianRegression(Regression):
    """Linear regression, y ~ Normal(design · coefficients + offset, scale).

    Args:
        design: Rows of explanatory variables; a column of ones for an intercept.
        coefficients: One per column, in units of the response.
        scale: Standard deviation of the noise, in units of the response.
        offset: Part of the mean that has no coefficient, one number or one per row.

    >>> distribution = GaussianRegression(torch.ones(2, 1), torch.tensor([3.0]), torch.tensor(1.0))
    >>> distribution.log_prob(torch.tensor([3.0, 3.0]))
    tensor(-1.8379)
    """

    arg_constraints = {  # pyright: ignore
        "coefficients": constraints.real_vector,
        "scale": constraints.positive,
    }

    def __init__(self, design, coefficients, scale, offset: Any = 0.0, validate_args=True):
        floats("coefficients", coefficients)
        try:
            scale = torch.as_tensor(scale, dtype=coefficients.dtype, device=coefficients.device)
        except (TypeError, ValueError) as error:
            raise TypeError(f"scale must be a number or a tensor; got {scale!r}.") from error
        try:
            batch = broadcast_shape(scale.shape, coefficients.shape[:-1])
        except RuntimeError as error:
            raise ValueError(
                f"scale must go with coefficients {list(coefficients.shape)}; "
                f"got {list(scale.shape)}."
            ) from error
        if validate_args and not (scale > 0).all():
            raise ValueError(f"scale must be positive; got {scale.min():.4g}.")
        self.scale = scale.expand(batch)
        wide = coefficients.expand(*batch, -1) if coefficients.ndim else coefficients
        super().__init__(design, wide, offset, validate_args)

    @property
    def rows(self):
        return Normal(self.predictor, self.scale.unsqueeze(-1), validate_args=False)

    def expand(self, batch_shape, _instance=None):
        coefficients = self.coefficients.expand(*batch_shape, -1)
        scale = self.scale.expand(batch_shape)
        return GaussianRegression(
            self.design, coefficients, scale, self.offset, validate_args=False
        )


def _first(value: Tensor) -> float:
    return value[~value.isfinite()][0].item()


class PoissonRegression(Regression):
    """Log-linear regression of counts, y ~ Poisson(exposure exp(design · coefficients + offset)).

    Args:
        design: Rows of explanatory variables; a column of ones for an intercept.
        coefficients: One per column, in nats.
        offset: Part of the logarithm of the rate that has no coefficient, one number or one per
            row, in nats.
        exposure: Time, area or population of each row, to which its rate is proportional: its
            logarithm is added to the offset.

    >>> visits = PoissonRegression(torch.ones(2, 1), torch.tensor([0.0]), exposure=[1.0, 5.0])
    >>> visits.mean
    tensor([1., 5.])
    """

    def __init__(
        self, design, coefficients, offset: Any = 0.0, exposure: Any = 1.0, validate_args=True
    ):
        super().__init__(design, coefficients, offset, validate_args)
        times_at_risk = by_row("exposure", exposure, self.design)
        if not (times_at_risk > 0).all():
            raise ValueError(f"exposure must be positive; got {times_at_risk.min():.4g}.")
        self.offset = self.offset + times_at_risk.log()

    @property
    def rows(self):
        return Poisson(self.predictor.exp(), validate_args=False)


class LogisticRegression(Regression):
    """Regression of yes and no, y ~ Binomial(trials, logits=design · coefficients + offset).

    Args:
        design: Rows of explanatory variables; a column of ones for an intercept.
        coefficients: One per column, in nats of log odds.
        offset: Part of the log odds that has no coefficient, one number or one per row, in nats.
        trials: Number of trials of each row; 1 by default, and the responses are yes and no.

    >>> wins = LogisticRegression(torch.ones(2, 1), torch.tensor([0.0]), trials=[1.0, 10.0])
    >>> wins.mean
    tensor([0.5000, 5.0000])
    """

    def __init__(
        self, design, coefficients, offset: Any = 0.0, trials: Any = 1.0, validate_args=True
    ):
        super().__init__(design, coefficients, offset, validate_args)
        self.trials = by_row("trials", trials, self.design)
        if not ((self.trials >= 1) & (self.trials == self.trials.round())).all():
            low = self.trials[(self.trials < 1) | (self.trials != self.trials.round())]
            raise ValueError(
                f"trials must be whole numbers from 1 on; got {low.flatten()[0].item():g}."
            )

    @property
    def rows(self):
        if bool((self.trials == 1).all()):
            return Bernoulli(logits=self.predictor, validate_args=False)
        return Binomial(self.trials, logits=self.predictor, validate_args=False)

    def expand(self, batch_shape, _instance=None):
        coefficients = self.coefficients.expand(*batch_shape, -1)
        return LogisticRegression(
            self.design, coefficients, self.offset, self.trials, validate_args=False
        )


@dataclass(frozen=True, eq=False)
class RegressionFamily(ExponentialFamily):
    """Regressions of canonical link on one design X: T = Xᵀy, η = coefficients, A by rows.

    An offset o of the predictor Xη + o belongs to the base measure, h(y) exp(oᵀy).

    Source: McCullagh and Nelder (1989), section 2.2.
    """

    events = (1,)
    names = ("coefficients",)
    mean_names = ("design · E y",)
    parameters = ("coefficients",)
    design: Tensor
    offset: Tensor

    @classmethod
    def of(cls, distribution: Regression, draws: bool = True):
        return cls(distribution.design, distribution.offset)

    @abc.abstractmethod
    def row_partition(self, predictor: Tensor) -> Tensor:
        """A of each row [*batch, rows]."""

    @abc.abstractmethod
    def row_mean(self, predictor: Tensor) -> Tensor:
        """E y of each row [*batch, rows]."""

    @abc.abstractmethod
    def row_variance(self, predictor: Tensor) -> Tensor:
        """Var y of each row [*batch, rows]."""

    @abc.abstractmethod
    def row_kl(self, p: Tensor, q: Tensor) -> Tensor:
        """KL of each row between two linear predictors [*batch, rows]."""

    def natural(self, distribution: Regression):
        return (distribution.coefficients,)

    def from_natural(self, natural):
        return self.distribution(self.design, natural[0], self.offset)

    def statistic(self, x):
        return (times(self.design.mT, x),)

    def log_partition(self, natural):
        return self.row_partition(self._predictor(natural)).sum(-1)

    def mean(self, natural):
        return (times(self.design.mT, self.row_mean(self._predictor(natural))),)

    def from_mean(self, mean):
        full_rank(self.design)
        return super().from_mean(mean)

    def newton(self, natural, gap):
        return (torch.linalg.solve(self._information(natural[0]), gap[0]),)

    def kl(self, p, q):
        return self.row_kl(self._predictor(p), self._predictor(q)).sum(-1)

    def log_fisher(self, distribution: Regression):
        return log_det(self._information(distribution.coefficients))

    def _predictor(self, natural: Natural) -> Tensor:
        return times(self.design, natural[0]) + self.offset

    def _information(self, coefficients: Tensor) -> Tensor:
        weight = self.row_variance(self._predictor((coefficients,))).unsqueeze(-1)
        return self.design.mT @ (weight * self.design)


@dataclass(frozen=True, eq=False)
class PoissonRegressionFamily(RegressionFamily):
    """PoissonRegression on one design, A = Σ exp(X · coefficients + offset)."""

    distribution = PoissonRegression

    def row_partition(self, predictor):
        return predictor.exp()

    def row_mean(self, predictor):
        return predictor.exp()

    def row_variance(self, predictor):
        return predictor.exp()

    def row_kl(self, p, q):
        return relative_gap(p, q)


@dataclass(frozen=True, eq=False)
class LogisticRegressionFamily(RegressionFamily):
    """LogisticRegression on one design, A = Σ trials · log(1 + exp(X · coefficients + offset))."""

    distribution = LogisticRegression
    trials: Tensor

    @classmethod
    def of(cls, distribution: LogisticRegression, draws: bool = True):
        return cls(distribution.design, distribution.offset, distribution.trials)

    def from_natural(self, natural):
        return LogisticRegression(self.design, natural[0], self.offset, self.trials)

    def row_partition(self, predictor):
        return self.trials * softplus(predictor)

    def row_mean(self, predictor):
        return self.trials * torch.sigmoid(predictor)

    def row_variance(self, predictor):
        return self.trials * torch.sigmoid(predictor) * torch.sigmoid(-predictor)

    def row_kl(self, p, q):
        return self.trials * bernoulli_kl(p, q)


@dataclass(frozen=True, eq=False)
class GaussianRegressionFamily(ExponentialFamily):
    """GaussianRegression on one design X: T = (Xᵀy, ‖y‖²), η = (coefficients, −½) / scale².

    With an origin o of the coefficients, Xo is first taken from y and o from the coefficients. So
    is an offset of the responses.
    """

    distribution = GaussianRegression
    events = (1, 0)
    names = ("coefficients / scale²", "−1 / (2 scale²)")
    mean_names = ("design · E y", "E ‖y‖²")
    parameters = ("coefficients", "scale")
    design: Tensor
    offset: Tensor
    origin: Fixed = 0.0

    @classmethod
    def of(cls, distribution: GaussianRegression, draws: bool = True):
        return cls(distribution.design, distribution.offset)

    def about(self, distribution: GaussianRegression):
        return dataclasses.replace(self, origin=distribution.coefficients)

    def natural(self, distribution: GaussianRegression):
        precision = 1 / (distribution.scale * distribution.scale)
        return (distribution.coefficients - self.origin) * precision.unsqueeze(-1), -precision / 2

    def from_natural(self, natural):
        coefficients, variance = _moments(natural)
        scale = variance.sqrt()
        return GaussianRegression(self.design, coefficients + self.origin, scale, self.offset)

    def statistic(self, x):
        x = x - self.offset
        if isinstance(self.origin, Tensor):
            x = x - times(self.design, self.origin)
        return times(self.design.mT, x), x.square().sum(-1)

    def log_partition(self, natural):
        coefficients, variance = _moments(natural)
        signal = self._fit(coefficients).square().sum(-1) / variance
        return (signal + len(self.design) * (2 * math.pi * variance).log()) / 2

    def mean(self, natural):
        coefficients, variance = _moments(natural)
        fit = self._fit(coefficients)
        return times(self.design.mT, fit), fit.square().sum(-1) + len(self.design) * variance

    def from_mean(self, mean):
        full_rank(self.design)
        self.check_mean(mean)
        fit = self._half_solution(mean[0])
        coefficients = torch.linalg.solve_triangular(
            self._root(), fit.unsqueeze(-1), upper=True
        ).squeeze(-1)
        precision = len(self.design) / (mean[1] - fit.square().sum(-1))
        return coefficients * precision.unsqueeze(-1), -precision / 2

    def kl(self, p, q):
        (coefficients_p, variance_p), (coefficients_q, variance_q) = _moments(p), _moments(q)
        shift = self._fit(coefficients_p - coefficients_q).square().sum(-1) / variance_q
        excess = (variance_p - variance_q) / variance_q
        return (len(self.design) * log_gap(excess) + shift) / 2

    def log_fisher(self, distribution: GaussianRegression):
        rows, columns = self.design.shape
        design_term = log_det(self.design.mT @ self.design)
        return design_term + math.log(2 * rows) - 2 * (columns + 1) * distribution.scale.log()

    def inside(self, natural):
        return natural[0].isfinite().all(-1), natural[1].isfinite() & (natural[1] < 0)

    def mean_inside(self, mean):
        least = self._half_solution(mean[0]).square().sum(-1)
        return mean[0].isfinite().all(-1), mean[1].isfinite() & (mean[1] > least)

    def _fit(self, coefficients: Tensor) -> Tensor:
        return times(self.design, coefficients)

    def _root(self) -> Tensor:
        """R of the design's QR: RᵀR = XᵀX, without squaring its condition number."""
        return torch.linalg.qr(self.design, mode="r").R

    def _half_solution(self, moment: Tensor) -> Tensor:
        """R⁻ᵀ Xᵀy, as long as the fitted y."""
        return torch.linalg.solve_triangular(
            self._root().mT, moment.unsqueeze(-1), upper=False
        ).squeeze(-1)


def full_rank(design: Tensor) -> None:
    """Refuse a design that does not tell its coefficients apart, with a ValueError."""
    rank = int(torch.linalg.matrix_rank(design))
    if rank < design.shape[1]:
        raise ValueError(
            f"design must tell its {design.shape[1]} coefficients apart; it has rank {rank}. "
            "Leave out columns that others determine."
        )


def _moments(natural: Natural) -> tuple[Tensor, Tensor]:
    """Coefficients less the origin, and variance."""
    variance = -0.5 / natural[1]
    return natural[0] * variance.unsqueeze(-1), variance

"""The three names of rejection's one knob: its constant, its budget, the precision it buys."""

import math
import sys
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from rkl.checks import number, warn
from rkl.metrics.precision_recall.sampled import checked_ratio
from rkl.tables import Table, table_of

LARGEST = math.log(sys.float_info.max)  # of what exp is a number


class OperatingPoint(NamedTuple):
    """One strength of optimal rejection, under its three names.

    Attributes:
        accept_lam: The constant λ: a sample of ratio r is kept with probability min(1, λr); ∞
            where all are kept, and one has a ratio below the smallest number.
        budget: Draws per accepted sample, K = 1/α(λ), at least 1.
        target_precision: Precision at slope 1 of the accepted distribution, α(α(λ))/α(λ).
    """

    accept_lam: float
    budget: float
    target_precision: float

    def table(self) -> Table:
        """The three names, a row each."""
        figures = {
            "constant λ": self.accept_lam,
            "draws per accepted sample": self.budget,
            "precision at slope 1": self.target_precision,
        }
        return table_of("Operating point of rejection", figures)

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


def operating_point(
    log_ratio: Float[Tensor, " samples"],
    *,
    accept_lam: float | None = None,
    budget: float | None = None,
    target_precision: float | None = None,
) -> OperatingPoint:
    r"""Convert the knob of optimal budgeted rejection into its other names.

        K = 1/mean min(1, λr),    precision = mean min(K, r)

    with r = p/q at samples from q. The accepted distribution is min(λp, q)/α(λ). All three are
    exact on
    the ratios given: the equations are solved between neighbouring order statistics, without
    iteration. A smaller λ costs more draws and buys precision; training's ``lam`` runs the
    other way.

    K does not hang on a factor common to all ratios, but precision does: ratios known up to a
    factor must be normalised first, where p has no mass outside q to a mean of 1.

    Source: Verine et al. (2024), arXiv 2311.00460, for the optimality.

    Args:
        log_ratio: log p(x) − log q(x) in nats at samples x from q; −∞ where p has no mass.
        accept_lam: The constant λ, positive.
        budget: Draws per accepted sample, at least 1.
        target_precision: Precision at slope 1 of the accepted distribution, in (0, 1].

    Returns:
        The point under all three names.

    Raises:
        ValueError: Not exactly one of the three is given, or no rejection reaches it.

    >>> ratio = torch.tensor([0.5, 0.5, 0.5, 2.5], dtype=torch.float64)
    >>> point = operating_point(ratio.log(), budget=2.0)
    >>> round(point.accept_lam, 6), round(point.target_precision, 6)
    (0.666667, 0.875)
    """
    log_ratio = checked_ratio("log_ratio", log_ratio, math.inf)
    named = {"accept_lam": accept_lam, "budget": budget, "target_precision": target_precision}
    given = {name: value for name, value in named.items() if value is not None}
    if len(given) != 1:
        raise ValueError(
            "exactly one of accept_lam, budget and target_precision must be given; "
            f"got {', '.join(given) or 'none'}."
        )
    if not abs(log_ratio.max().item()) < 700:  # where exp is no longer a number
        raise ValueError(
            "log_ratio must have a largest value between −700 and 700; "
            f"got {log_ratio.max().item():.6g}: either p has no mass where q has, or the "
            "ratios want a normalisation first."
        )
    ratios, ((name, value),) = _Ratios(log_ratio), given.items()
    number(name, value, above=0)
    if name == "accept_lam":
        accept_lam, budget = value, 1 / ratios.accepted_share(value)
    else:
        budget = value if name == "budget" else ratios.budget(value)
        accept_lam = ratios.constant(budget)
    return OperatingPoint(accept_lam, budget, ratios.capped_mean(budget))


def _exp(x: float) -> float:
    return math.exp(x) if x < LARGEST else math.inf


class _Ratios:
    """The ratios r of the samples that can be accepted_share, rising, and sums of the smallest.

    Between neighbours mean min(u, r) is linear in u: (sum of the k below u + (m − k) u)/n.
    """

    def __init__(self, log_ratio: Tensor):
        self.n = len(log_ratio)
        self.log_r = log_ratio[log_ratio > -math.inf].sort().values
        self.r = self.log_r.exp()
        self.below = self.r.cumsum(0) - self.r
        self.left = torch.arange(len(self.r), 0, -1, dtype=torch.float64)
        self.least = self.n / len(self.r)  # the budget of a λ without end

    def capped_mean(self, u: float) -> float:
        """The mean of min(u, r)."""
        return self.r.clamp_max(u).sum().item() / self.n

    def accepted_share(self, lam: float) -> float:
        """The mean of min(1, λr)."""
        return (self.log_r + math.log(lam)).clamp_max(0.0).exp().sum().item() / self.n

    def constant(self, budget: float) -> float:
        """The λ at which 1/K of the draws are accepted."""
        if budget < self.least * (1 - 1e-12):
            raise ValueError(
                f"budget must be at least {self.least:.6g}, for p has no mass at "
                f"{self.n - len(self.r)} of {self.n} samples; got {budget}."
            )
        below = (self.log_r.logcumsumexp(0) - self.log_r).expm1()  # sums of smaller r, each over r
        at_knots = self.n / (below + self.left)
        k = int((at_knots <= budget).sum())  # at a λ of 1/K so many of the r are below 1/λ
        if budget <= at_knots[0] * (1 + 1e-12):
            return _exp(-self.log_r[0].item())
        if budget > 1.05 * at_knots[-1]:  # nearer than that it may be these samples
            warn(
                f"budget={budget:.6g} buys nothing beyond {at_knots[-1].item():.6g}: from there "
                "on the accepted distribution is p itself, as far as these samples show."
            )
        wanted = self.n / budget - (len(self.r) - k)
        if wanted > 0:
            lam = _exp(math.log(wanted) - self.log_r[:k].logsumexp(0).item())
        else:
            lam = _exp(-self.log_r[k - 1].item())
        if lam == math.inf:
            raise ValueError(
                f"budget={budget:.6g} takes a λ above {sys.float_info.max:.2g}, as ratios are so "
                f"small: give a larger one, or {self.least:.6g}, which keeps all that can be kept."
            )
        return lam

    def budget(self, precision: float) -> float:
        """The K at which the mean of min(K, r) is the precision."""
        lowest, highest = self.capped_mean(self.least), self.r.sum().item() / self.n
        if not lowest <= precision <= highest:
            raise ValueError(
                f"target_precision must lie between {lowest:.6g}, of q without rejection, and "
                f"{highest:.6g}, of rejection without limit; got {precision}."
            )
        at_knots = (self.below + self.left * self.r) / self.n
        k = min(int((at_knots < precision).sum()), len(self.r) - 1)
        u = (self.n * precision - self.below[k].item()) / self.left[k].item()
        return max(self.least, u)

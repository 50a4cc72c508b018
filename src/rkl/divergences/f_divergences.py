"""The f-divergences Σ q f(p/q), each written as its integrand F(p, q) = q f(p/q).

To add one, write one frozen dataclass in this file. Every estimator, the trainer, the
command line, the documentation and the test-suite will find it here.
"""

import math
from dataclasses import dataclass

import torch

from rkl.checks import number
from rkl.divergences.base import (
    POLE,
    FDivergence,
    check_distributions,
    exp_less_1,
    log_mixture,
    log_ratio,
    near_or_far,
    power,
    power_excess,
    relative_entropy,
    vanishes,
)
from rkl.divergences.between import closed_kl

__all__ = [
    "Amari",
    "Jeffreys",
    "JensenShannon",
    "KL",
    "NeymanChiSquare",
    "PearsonChiSquare",
    "PrecisionHalf",
    "PrecisionRecall",
    "RecallHalf",
    "ReverseKL",
    "SkewKL",
    "SkewReverseKL",
    "SquaredHellinger",
    "TotalVariation",
]


@dataclass(frozen=True)
class KL(FDivergence):
    r"""Forward Kullback–Leibler divergence, KL(p ‖ q) = Σ p log(p/q).

    Mass-covering: infinite wherever p has mass and q has none. Maximum likelihood, up to
    the entropy of p.

    Source: Kullback and Leibler (1951), eq. (2.4).

    Neighbours: the limit of Amari(alpha) at 1; PrecisionHalf(lam) + RecallHalf(lam).

    >>> p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.9, 0.1])
    >>> KL()(p.log(), q.log())
    tensor(0.5108)
    """

    aliases = ("forward-kl", "fkl")

    def integrand(self, logp, logq):
        return relative_entropy(logp, logq)

    def between(self, p, q):
        return _kl_between(self, p, q, flipped=False)

    def terms_q(self, log_ratio):
        return _x_exp_x(log_ratio)

    def terms_p(self, log_ratio):
        return -log_ratio


@dataclass(frozen=True)
class ReverseKL(FDivergence):
    r"""Reverse Kullback–Leibler divergence, KL(q ‖ p) = Σ q log(q/p).

    Mode-seeking: infinite wherever q has mass and p has none.

    Source: Kullback and Leibler (1951), eq. (2.4), its arguments exchanged.

    Neighbours: the limit of Amari(alpha) at 0.

    >>> p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.9, 0.1])
    >>> ReverseKL()(p.log(), q.log())
    tensor(0.3681)
    """

    aliases = ("rkl",)

    def integrand(self, logp, logq):
        return relative_entropy(logq, logp)

    def between(self, p, q):
        return _kl_between(self, p, q, flipped=True)

    def terms_q(self, log_ratio):
        return -log_ratio

    def terms_p(self, log_ratio):
        return _x_exp_x(log_ratio)


@dataclass(frozen=True)
class Jeffreys(FDivergence):
    r"""Jeffreys divergence, KL(p ‖ q) + KL(q ‖ p) = Σ (p − q) log(p/q).

    Symmetric: infinite wherever exactly one of p and q has mass.

    Source: Jeffreys (1946), eq. (1).

    Neighbours: KL() + ReverseKL(); ToDi() has its value and another gradient.

    >>> p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.9, 0.1])
    >>> Jeffreys()(p.log(), q.log())
    tensor(0.8789)
    """

    def integrand(self, logp, logq):
        p, q, ratio = logp.exp(), logq.exp(), logp - logq
        if vanishes(torch.minimum(logp, logq)):
            ratio = ratio.masked_fill((p == 0) & (q == 0), 0.0)
        return (p - q) * ratio

    def between(self, p, q):
        return KL().between(p, q) + ReverseKL().between(p, q)

    def terms_q(self, log_ratio):
        gone = log_ratio < _LOG_ZERO
        x = torch.where(gone, 0.0, log_ratio)
        return torch.where(gone, -log_ratio, x * exp_less_1(x))

    terms_p = terms_q


@dataclass(frozen=True)
class JensenShannon(FDivergence):
    r"""Generalised Jensen–Shannon divergence, β KL(p ‖ m) + (1 − β) KL(q ‖ m).

    The mixture is m = βp + (1 − β)q. Never infinite; symmetric and at most log 2 nats at
    β = ½.

    Source: Agarwal et al. (2024), arXiv 2306.13649, eq. (1).

    Neighbours: near KL() for small β and near ReverseKL() for large β, rescaled by 1/β and
    1/(1 − β).

    Args:
        beta: Weight of p in the mixture, strictly between 0 and 1.

    >>> p, q = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    >>> JensenShannon()(p.log(), q.log())
    tensor(0.6931)
    """

    aliases = ("js", "jsd")
    beta: float = 0.5

    def __post_init__(self):
        number("beta", self.beta, above=0, below=1, what=" (its limits are KL and ReverseKL)")

    def integrand(self, logp, logq):
        logm = log_mixture(logp, logq, self.beta)
        p_to_m, q_to_m = relative_entropy(logp, logm), relative_entropy(logq, logm)
        return self.beta * p_to_m + (1 - self.beta) * q_to_m

    def excess(self, logp, logq):
        if self.beta < POLE:
            far = _slight_mixture(logp, logq, self.beta, self.integrand(logp, logq))
        elif self.beta > 1 - POLE:
            far = _slight_mixture(logq, logp, 1 - self.beta, self.integrand(logp, logq))
        else:
            return super().excess(logp, logq)
        return near_or_far(logp, logq, far, self.taylor[1:])

    def terms_q(self, log_ratio):
        return _jensen_shannon(log_ratio, self.beta)

    def terms_p(self, log_ratio):
        return _jensen_shannon(log_ratio, 1 - self.beta)


@dataclass(frozen=True)
class SkewKL(FDivergence):
    r"""Skew KL divergence, KL(p ‖ m) with m = αp + (1 − α)q.

    Mass-covering like KL, and at most log(1/α): a little of p in the mixture keeps the
    gradient bounded where q has no mass.

    Source: Lee (2001); Ko et al. (2024), arXiv 2402.03898, eq. (3).

    Neighbours: KL() in the limit α = 0.

    Args:
        alpha: Weight of p in the mixture, strictly between 0 and 1.

    >>> p, q = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    >>> SkewKL(alpha=0.1)(p.log(), q.log())
    tensor(2.3026)
    """

    alpha: float = 0.1

    def __post_init__(self):
        number("alpha", self.alpha, above=0, below=1, what=" (at 0 it is KL)")

    def integrand(self, logp, logq):
        return relative_entropy(logp, log_mixture(logp, logq, self.alpha))

    def excess(self, logp, logq):
        plain = super().excess(logp, logq)
        return _skew_excess(logp, logq, self.alpha, plain) if self.alpha > 1 - POLE else plain

    def terms_q(self, log_ratio):
        return _skew(log_ratio, self.alpha)

    def terms_p(self, log_ratio):
        return -_log_mean(log_ratio, 1 - self.alpha)


@dataclass(frozen=True)
class SkewReverseKL(FDivergence):
    r"""Skew reverse KL divergence, KL(q ‖ m) with m = (1 − α)p + αq.

    Mode-seeking like ReverseKL, and at most log(1/α): q may put mass where p has none, at
    a bounded price.

    Source: Ko et al. (2024), arXiv 2402.03898, eq. (4).

    Neighbours: ReverseKL() in the limit α = 0; SkewKL(alpha) with p and q exchanged.

    Args:
        alpha: Weight of q in the mixture, strictly between 0 and 1.

    >>> p, q = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    >>> SkewReverseKL(alpha=0.1)(p.log(), q.log())
    tensor(2.3026)
    """

    alpha: float = 0.1

    def __post_init__(self):
        number("alpha", self.alpha, above=0, below=1, what=" (at 0 it is ReverseKL)")

    def integrand(self, logp, logq):
        return relative_entropy(logq, log_mixture(logp, logq, 1 - self.alpha))

    def excess(self, logp, logq):
        plain = super().excess(logp, logq)
        return _skew_excess(logq, logp, self.alpha, plain) if self.alpha > 1 - POLE else plain

    def terms_q(self, log_ratio):
        return -_log_mean(log_ratio, 1 - self.alpha)

    def terms_p(self, log_ratio):
        return _skew(log_ratio, self.alpha)


@dataclass(frozen=True)
class TotalVariation(FDivergence):
    r"""Total variation distance, Σ |p − q| / 2.

    Between 0 and 1, symmetric; its gradient depends on the sign of an atom's error, not on its
    size.

    Neighbours: PrecisionRecall(lam=1).

    >>> p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.9, 0.1])
    >>> TotalVariation()(p.log(), q.log())
    tensor(0.4000)
    """

    aliases = ("tv",)

    def integrand(self, logp, logq):
        return (logp.exp() - logq.exp()).abs() / 2

    def terms_q(self, log_ratio):
        below = exp_less_1(log_ratio.clamp_max(1.0))
        return (below.abs() - below) / 2

    terms_p = terms_q


@dataclass(frozen=True)
class SquaredHellinger(FDivergence):
    r"""Squared Hellinger distance, Σ (√p − √q)² / 2 = 1 − Σ √(pq).

    Between 0 and 1, symmetric.

    Source: Hellinger (1909).

    Neighbours: Amari(0.5) / 4.

    >>> p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.9, 0.1])
    >>> SquaredHellinger()(p.log(), q.log())
    tensor(0.1056)
    """

    def integrand(self, logp, logq):
        return ((logp / 2).exp() - (logq / 2).exp()).square() / 2

    def terms_q(self, log_ratio):
        return -exp_less_1(log_ratio / 2)

    terms_p = terms_q


@dataclass(frozen=True)
class PearsonChiSquare(FDivergence):
    r"""Pearson's χ² divergence, Σ (p − q)² / q.

    Mass-covering, far more so than KL: exponential in log(p/q), so it overflows to +∞ where
    p exceeds q by more than the floating-point range.

    Source: Pearson (1900).

    Neighbours: 2 Amari(2); NeymanChiSquare() with p and q exchanged.

    >>> p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.9, 0.1])
    >>> PearsonChiSquare()(p.log(), q.log())
    tensor(1.7778)
    """

    def integrand(self, logp, logq):
        return power(logp, logq, 2, -1) - 2 * logp.exp() + logq.exp()

    def terms_q(self, log_ratio):
        return exp_less_1(log_ratio).square()

    def terms_p(self, log_ratio):
        return exp_less_1(-log_ratio)


@dataclass(frozen=True)
class NeymanChiSquare(FDivergence):
    r"""Neyman's χ² divergence, Σ (p − q)² / p.

    Mode-seeking, far more so than ReverseKL: exponential in log(q/p), so it overflows to +∞
    where q exceeds p by more than the floating-point range.

    Source: Neyman (1949).

    Neighbours: 2 Amari(−1); PearsonChiSquare() with p and q exchanged.

    >>> p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.9, 0.1])
    >>> NeymanChiSquare()(p.log(), q.log())
    tensor(0.6400)
    """

    def integrand(self, logp, logq):
        return power(logp, logq, -1, 2) - 2 * logq.exp() + logp.exp()

    def terms_q(self, log_ratio):
        return exp_less_1(-log_ratio)

    def terms_p(self, log_ratio):
        return exp_less_1(log_ratio).square()


@dataclass(frozen=True)
class Amari(FDivergence):
    r"""Amari's α-divergence, (Σ p^α q^(1−α) − 1) / (α(α − 1)).

    Infinite where p has mass and q has none for α ≥ 1, where q has mass and p has none for
    α ≤ 0, and never for α in between. The larger α, the more mass-covering.

    Source: Amari (1985); Minka (2005), table 1. Rényi's divergence is log(1 + α(α − 1) D) /
    (α − 1): a monotone function of it, with the same minimiser.

    Neighbours: KL() in the limit 1 and ReverseKL() in the limit 0; 4 SquaredHellinger() at
    ½, PearsonChiSquare() / 2 at 2, NeymanChiSquare() / 2 at −1.

    Args:
        alpha: The order, neither 0 nor 1.

    >>> p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.9, 0.1])
    >>> Amari(alpha=2.0)(p.log(), q.log())
    tensor(0.8889)
    """

    alpha: float = 0.5

    def __post_init__(self):
        number("alpha", self.alpha, unequal=(0, 1), what=" (they are ReverseKL and KL)")

    @property
    def amari_orders(self):  # pyright: ignore[reportIncompatibleVariableOverride]
        return ((1.0, self.alpha),)  # to the last digit

    def integrand(self, logp, logq):
        a = self.alpha
        return (power(logp, logq, a, 1 - a) - logq.exp()) / (a * (a - 1))

    def excess(self, logp, logq):
        if min(abs(self.alpha), abs(1 - self.alpha)) < POLE:
            return power_excess(logp, logq, self.alpha, 1 - self.alpha)
        return super().excess(logp, logq)

    def terms_q(self, log_ratio):
        a = self.alpha
        return exp_less_1(a * log_ratio) / (a * (a - 1))

    def terms_p(self, log_ratio):
        a = self.alpha
        if a > 0:
            return exp_less_1((1 - a) * log_ratio) / (a * (a - 1))
        x = log_ratio.clamp_min(_LOG_ZERO)
        return x.exp() * exp_less_1(-a * x) / (a * (a - 1))


@dataclass(frozen=True)
class PrecisionRecall(FDivergence):
    r"""Precision–recall divergence, min(λ, 1) − Σ min(λp, q).

    Σ min(λp, q) is the precision of q at slope λ of its precision–recall curve. A large λ
    buys precision, a small λ buys recall. Its gradient vanishes wherever q is on the right
    side of λp: PrecisionHalf and RecallHalf are its smooth versions.

    Source: Verine et al. (2023), arXiv 2302.00628, definition 4.1.

    Neighbours: TotalVariation() at λ = 1; every f-divergence is a mixture of these.

    Args:
        lam: The slope λ, positive.

    >>> p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.9, 0.1])
    >>> PrecisionRecall()(p.log(), q.log())
    tensor(0.4000)
    """

    lam: float = 1.0

    def __post_init__(self):
        number("lam", self.lam, above=0)

    def integrand(self, logp, logq):
        excess = logq.exp() - self.lam * logp.exp()
        return torch.relu(excess if self.lam >= 1 else -excess)

    def terms_q(self, log_ratio):
        return _beyond(log_ratio, self.lam)

    def terms_p(self, log_ratio):
        return _beyond(log_ratio, 1 / self.lam) * self.lam


_KL = KL()  # one object: what each computes once about itself cannot be traced by a compiler


@dataclass(frozen=True)
class PrecisionHalf(FDivergence):
    r"""Precision half of KL, f(r) = r log(λr) − r + 1/λ below r = 1/λ, 0 above, less its f(1).

    The mixture of PrecisionRecall(l) over l ≥ λ with weight 1/l², as in KL: it penalises mass
    of q where p has less than 1/λ of it. Its gradient is that of maximum
    likelihood on data weighted by min(1, q/(λp)).

    Source: Verine et al. (2023), arXiv 2302.00628, theorem 4.3, for f(r) = r log r.

    Neighbours: KL() in the limit λ = 0; KL() = PrecisionHalf(lam) + RecallHalf(lam).

    Args:
        lam: The slope λ, positive.

    >>> p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.9, 0.1])
    >>> PrecisionHalf()(p.log(), q.log())
    tensor(0.1061)
    """

    lam: float = 1.0

    def __post_init__(self):
        number("lam", self.lam, above=0)

    def integrand(self, logp, logq):
        return _precision_half(logp, logq, self.lam)

    def excess(self, logp, logq):
        if self.lam >= 1:
            return super().excess(logp, logq)
        inside = log_ratio(logp, logq) < -math.log(self.lam)
        return torch.where(inside, _KL.excess(logp, logq), _linear(logp, logq, self.lam))

    def terms_q(self, log_ratio):
        lam, log_lam = self.lam, math.log(self.lam)
        if lam < 1:
            x = log_ratio.clamp(_LOG_ZERO, -log_lam)
            return x * x.exp() + (log_lam - 1) * exp_less_1(x)
        s = (log_ratio + log_lam).clamp(_LOG_ZERO, 0.0)
        return (s * s.exp() - exp_less_1(s)) / lam

    def terms_p(self, log_ratio):
        lam, log_lam = self.lam, math.log(self.lam)
        inside, at_one = log_ratio > log_lam, _at_one(lam)
        rest = -exp_less_1(log_ratio.clamp_max(log_lam)) / lam - at_one
        return torch.where(inside, log_lam - log_ratio - 1 + 1 / lam - at_one, rest)


@dataclass(frozen=True)
class RecallHalf(FDivergence):
    r"""Recall half of KL, f(r) = r(1 − log λ) − 1/λ below r = 1/λ, r log r above, less its f(1).

    The mixture of PrecisionRecall(l) over l ≤ λ with weight 1/l², as in KL: it penalises q for
    not covering p where p/q is above 1/λ, and ignores what q invents. Its gradient
    is that of maximum likelihood on data weighted by 1 − min(1, q/(λp)).

    Source: Verine et al. (2023), arXiv 2302.00628, theorem 4.3, for f(r) = r log r.

    Neighbours: KL() in the limit of large λ; KL() = PrecisionHalf(lam) + RecallHalf(lam).

    Args:
        lam: The slope λ, positive.

    >>> p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.9, 0.1])
    >>> RecallHalf()(p.log(), q.log())
    tensor(0.4047)
    """

    lam: float = 1.0

    def __post_init__(self):
        number("lam", self.lam, above=0)

    def integrand(self, logp, logq):
        return relative_entropy(logp, logq) - _precision_half(logp, logq, self.lam)

    def excess(self, logp, logq):
        lam, log_lam = self.lam, math.log(self.lam)
        inside = log_ratio(logp, logq) < -log_lam
        if lam >= 1:
            return torch.where(inside, _linear(logp, logq, lam), _KL.excess(logp, logq))
        above = relative_entropy(logp, logq) + (log_lam - 1) * logp.exp() + logq.exp() / lam
        return torch.where(inside, 0.0, above)

    def terms_q(self, log_ratio):
        lam, log_lam = self.lam, math.log(self.lam)
        at_one, gap = _at_one(lam), log_lam - 1 + 1 / lam
        low = (1 - log_lam) * exp_less_1(log_ratio.clamp_max(-log_lam)) - (gap - at_one)
        return torch.where(log_ratio < -log_lam, low, _x_exp_x(log_ratio) + at_one)

    def terms_p(self, log_ratio):
        lam = self.lam
        x = log_ratio.clamp_max(math.log(lam))
        return exp_less_1(x) / lam - x + _at_one(lam)


_LOG_ZERO = -800.0  # a logarithm whose exponential is 0 even in double precision


def _x_exp_x(x):
    x = x.clamp_min(_LOG_ZERO)
    return x * x.exp()


def _log_mean(x, weight):
    """log(w eˣ + 1 − w), with all digits near x = 0."""
    near = torch.log1p(weight * exp_less_1(x.clamp(-1.0, 1.0)))
    far = torch.logaddexp(x + math.log(weight), x.new_tensor(math.log1p(-weight)))
    return torch.where(x.abs() < 1, near, far)


def _exp_times_log1p(x, c):
    """eˣ log(1 + c e⁻ˣ), which ends in c."""
    end = 40 + max(0.0, math.log(c))
    inner = x.clamp(_LOG_ZERO, end)
    log1p = torch.logaddexp(math.log(c) - inner, torch.zeros_like(inner))
    return torch.where(x < end, inner.exp() * log1p, c)


def _jensen_shannon(x, beta):
    """β r log(r/m) − (1 − β) log m + β log β (r − 1) at r = eˣ, with m = βr + 1 − β."""
    log_m, log_beta, inner = _log_mean(x, beta), math.log(beta), x.clamp(-1.0, 1.0)
    near = inner.exp() * (inner - _log_mean(inner, beta)) + log_beta * exp_less_1(inner)
    far = -_exp_times_log1p(x, (1 - beta) / beta) - log_beta
    return beta * torch.where(x.abs() < 1, near, far) - (1 - beta) * log_m


def _skew(x, alpha):
    """The skew KL r log(r/m) + log α (r − 1) at r = eˣ, with m = αr + 1 − α."""
    log_alpha, inner = math.log(alpha), x.clamp(-1.0, 1.0)
    near = inner.exp() * (inner - _log_mean(inner, alpha)) + log_alpha * exp_less_1(inner)
    far = -_exp_times_log1p(x, (1 - alpha) / alpha) - log_alpha
    return torch.where(x.abs() < 1, near, far)


def _beyond(x, lam):
    """max(1 − λeˣ, 0) for λ ≥ 1, and else max(λeˣ − 1, 0) − λ (eˣ − 1)."""
    log_lam = math.log(lam)
    if lam >= 1:
        below = exp_less_1((x + log_lam).clamp_max(1.0))
        return (below.abs() - below) / 2
    return -lam * exp_less_1(x.clamp_max(-log_lam))


def _slight_mixture(logp, logq, beta, plain):
    """β p log(p/m) + (1 − β) q log(q/m) for a small β, in log m/q: no digits of β are lost."""
    ratio = log_ratio(logp, logq)
    x = ratio.clamp(-200.0, 80.0)
    p, log_m = logp.exp(), torch.log1p(beta * x.expm1())
    mixed = beta * p * x - (beta * p + (1 - beta) * logq.exp()) * log_m
    return torch.where(ratio < 80, mixed, plain)


def _skew_excess(logp, logq, alpha, plain):
    """The excess p log(p/m) − (1 − α)(p − q) for m near p: p (y − log(1 + y)), 1 + y = m/p."""
    ratio = log_ratio(logp, logq)
    y = (1 - alpha) * (-ratio.clamp(-80.0, 200.0)).expm1()
    small = y.clamp(-0.05, 0.05)
    series = torch.zeros_like(small)
    for n in range(8, 1, -1):
        series = (-1) ** n / n + small * series
    less = torch.where(y.abs() < 0.05, small.square() * series, y - y.log1p())
    return torch.where(ratio > -80, logp.exp() * less, plain)


def _linear(logp, logq, lam):
    """−p log λ + q (1 − 1/λ): the excess of one half of KL where its f is linear."""
    return (1 - 1 / lam) * logq.exp() - math.log(lam) * logp.exp()


def _at_one(lam):
    """f(1) of the precision half before it is subtracted."""
    return math.log(lam) - 1 + 1 / lam if lam < 1 else 0.0


def _precision_half(logp, logq, lam):
    s = (log_ratio(logp, logq) + math.log(lam)).clamp_max(0.0)  # log λr, where below 0
    s_exp_s = torch.where(s == -math.inf, 0.0, s) * s.exp()
    return logq.exp() * ((s_exp_s - s.expm1()) / lam - _at_one(lam))


def _kl_between(divergence, p, q, *, flipped):
    check_distributions(p, q)
    try:
        return closed_kl(KL(), q, p) if flipped else closed_kl(KL(), p, q)
    except NotImplementedError:
        return FDivergence.between(divergence, p, q)

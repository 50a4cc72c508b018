"""Functions of numbers that keep their digits: excesses over a tangent, inverses of digamma."""

import torch
from torch import Tensor

NEAR = 0.02  # |argument| below which an excess is summed by its series, to 1e-14
LARGE = 10.0  # from where on Stirling's series is exact to double precision
# B₂ₖ / (2k (2k − 1)): log Γ(x) = (x − ½) log x − x + ½ log 2π + Σ of these over x^(2k − 1)
STIRLING = (1 / 12, -1 / 360, 1 / 1260, -1 / 1680, 1 / 1188, -691 / 360360, 1 / 156)


def log_gap(u: Tensor) -> Tensor:
    """The excess u − log(1 + u), at least 0, to relative precision."""
    near = torch.where(u.abs() < NEAR, u, 0.0)
    series = 1 / 9 - near / 10
    for k in range(8, 1, -1):
        series = 1 / k - near * series
    return torch.where(u.abs() < NEAR, near * near * series, u - torch.log1p(u))


def relative_gap(logp: Tensor, logq: Tensor) -> Tensor:
    """The excess p log(p/q) − p + q, at least 0, to relative precision; q where p = 0."""
    nowhere = logp == -torch.inf
    t = torch.where(nowhere, 0.0, logq - logp)
    p = logp.exp()
    return torch.where((t.abs() < NEAR) & ~nowhere, p * _exp_series(t), logq.exp() - p - p * t)


def bernoulli_kl(p: Tensor, q: Tensor) -> Tensor:
    """KL in nats between coins of these logits; an infinite logit is a coin that falls alike."""
    logsigmoid = torch.nn.functional.logsigmoid
    heads = relative_gap(logsigmoid(p), logsigmoid(q))
    return heads + relative_gap(logsigmoid(-p), logsigmoid(-q))


def log1mexp(x: Tensor) -> Tensor:
    """The logarithm log(1 − exp x) of an x below 0, with its slope, −∞ at 0."""
    near = x > -0.7
    # The branch that is not taken must have a slope, or it spoils that of the other.
    small, large = torch.where(near, x, -1.0), torch.where(near, -1.0, x)
    return torch.where(near, torch.log(-torch.expm1(small)), torch.log1p(-large.exp()))


def lgamma_gap(q: Tensor, p: Tensor) -> Tensor:
    """The excess log Γ(q) − log Γ(p) − (q − p) ψ(p), at least 0.

    For large arguments by Stirling's series, term by term: log Γ(1e6) itself has lost 1e-9.
    """
    large = (p > LARGE) & (q > LARGE)
    near, far = torch.where(large, p, LARGE), torch.where(large, q, LARGE)
    step = far - near
    u = step / near
    tail = _tail(far) - _tail(near) - step * _slope(near)
    stirling = step * torch.log1p(u) - (near - 0.5) * log_gap(u) + tail
    plain = torch.lgamma(q) - torch.lgamma(p) - (q - p) * torch.digamma(p)
    return torch.where(large, stirling, plain)


def digamma_gap(x: Tensor) -> Tensor:
    """The gap log x − ψ(x), about 1/(2x), to relative precision."""
    large = x.clamp_min(LARGE)
    return torch.where(x > LARGE, 0.5 / large - _slope(large), x.log() - torch.digamma(x))


def trigamma(x: Tensor) -> Tensor:
    """ψ′(x) = ζ(2, x): torch.polygamma(1, x) has it to 1e-9 only."""
    return torch.special.zeta(torch.full_like(x, 2.0), x)


def trigamma_gap(x: Tensor) -> Tensor:
    """The gap ψ′(x) − 1/x, about 1/(2x²), to relative precision."""
    large = x.clamp_min(LARGE)
    curvature = _series(large, [2 * k * (2 * k - 1) * c for k, c in enumerate(STIRLING, 1)])
    stirling = (0.5 + curvature) / large.square()
    return torch.where(x > LARGE, stirling, trigamma(x) - 1 / x)


def digamma_inverse(y: Tensor) -> Tensor:
    """The x with ψ(x) = y, by Newton's method.

    Source: Minka (2000), "Estimating a Dirichlet distribution", appendix C.
    """
    x = torch.where(y > -2.22, y.exp() + 0.5, -1 / (y + 0.5772156649015329))
    for _ in range(6):
        x = x - (torch.digamma(x) - y) / trigamma(x)
    return x


def shape_of_gap(gap: Tensor, size: int = 1) -> Tensor:
    """The shape a with Σ log a − ψ(a − i/2) = gap over i below size, for Gamma and Wishart.

    Newton's method in 1/(a − (size − 1)/2), of which the sum is nearly linear at both ends.

    Source: Minka (2002), "Estimating a Gamma distribution", eq. (10), where the size is 1.
    """
    least = (size - 1) / 2
    halves = torch.arange(size, dtype=gap.dtype, device=gap.device) / 2
    w = 2 * gap / (size * size)
    for _ in range(20):
        a = least + 1 / w
        y = a.unsqueeze(-1) - halves
        short = (digamma_gap(y) + torch.log1p(halves / y)).sum(-1) - gap
        slope = (trigamma_gap(y) + halves / (y * a.unsqueeze(-1))).sum(-1) / w.square()
        w = torch.maximum(w - short / slope, w / 10)
    return least + 1 / w


def _exp_series(t: Tensor) -> Tensor:
    near = torch.where(t.abs() < NEAR, t, 0.0)
    series = 1 + near / 9
    for k in range(8, 2, -1):
        series = 1 + near / k * series
    return near * near / 2 * series


def _series(x: Tensor, coefficients: list[float]) -> Tensor:
    """Σ cₖ / x^(2k + 1), from k = 0."""
    inverse = 1 / x
    square, total = inverse * inverse, torch.zeros_like(x)
    for coefficient in reversed(coefficients):
        total = coefficient + square * total
    return inverse * total


def _tail(x: Tensor) -> Tensor:
    return _series(x, list(STIRLING))


def _slope(x: Tensor) -> Tensor:
    return -_series(x, [(2 * k - 1) * c for k, c in enumerate(STIRLING, 1)]) / x

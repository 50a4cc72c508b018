"""Monte Carlo terms, and slopes at ratios, against arithmetic of many digits."""

import functools
import math
from dataclasses import dataclass

import pytest
import torch
from catalogued import F
from mpmath import mp

import rkl
from rkl.flows.weights import slope

FAR = 100  # log-ratios beyond which the arithmetic of many digits is slow
RATIOS = [0.0, *(s * r for r in (1e-3, 1, 20, 88, 89, 200, 1e4, math.inf) for s in (1, -1))]


def _x_log(x, y):
    """x log(x/y), with 0 log 0 = 0."""
    if x == 0:
        return mp.mpf(0)
    return mp.inf if y == 0 else x * mp.log(x / y)


def _power(x, y, a):
    if x == 0 or y == 0:
        exponents = [e for z, e in ((x, a), (y, 1 - a)) if z == 0]
        return mp.inf if min(exponents) < 0 else mp.mpf(0)
    return x**a * y ** (1 - a)


def _precision_half(p, q, lam):
    lam = mp.mpf(lam)
    at_one = mp.log(lam) - 1 + 1 / lam if lam < 1 else 0
    return (_x_log(p, q / lam) - p + q / lam if lam * p < q else 0) - at_one * q


def _amari(p, q, a):
    return (_power(p, q, mp.mpf(a)) - q) / (mp.mpf(a) * (mp.mpf(a) - 1))


def _skew(p, q, a):
    return _x_log(p, mp.mpf(a) * p + (1 - mp.mpf(a)) * q)


def _js(p, q, b):
    m = mp.mpf(b) * p + (1 - mp.mpf(b)) * q
    return mp.mpf(b) * _x_log(p, m) + (1 - mp.mpf(b)) * _x_log(q, m)


# F(p, q) as its docstring has it, in mpmath.
DEFINITIONS = {
    rkl.KL: lambda d, p, q: _x_log(p, q),
    rkl.ReverseKL: lambda d, p, q: _x_log(q, p),
    rkl.Jeffreys: lambda d, p, q: _x_log(p, q) + _x_log(q, p),
    rkl.JensenShannon: lambda d, p, q: _js(p, q, d.beta),
    rkl.SkewKL: lambda d, p, q: _skew(p, q, d.alpha),
    rkl.SkewReverseKL: lambda d, p, q: _skew(q, p, d.alpha),
    rkl.TotalVariation: lambda d, p, q: abs(p - q) / 2,
    rkl.SquaredHellinger: lambda d, p, q: (mp.sqrt(p) - mp.sqrt(q)) ** 2 / 2,
    rkl.PearsonChiSquare: lambda d, p, q: (p - q) ** 2 / q if q else mp.inf,
    rkl.NeymanChiSquare: lambda d, p, q: (p - q) ** 2 / p if p else mp.inf,
    rkl.Amari: lambda d, p, q: _amari(p, q, d.alpha),
    rkl.PrecisionRecall: lambda d, p, q: (
        max(q - mp.mpf(d.lam) * p, 0) if d.lam >= 1 else max(mp.mpf(d.lam) * p - q, 0)
    ),
    rkl.PrecisionHalf: lambda d, p, q: _precision_half(p, q, d.lam),
    rkl.RecallHalf: lambda d, p, q: _x_log(p, q) - _precision_half(p, q, d.lam),
}


def definition(divergence, p, q):
    if type(divergence) in DEFINITIONS:
        return DEFINITIONS[type(divergence)](divergence, p, q)
    terms = rkl.divergences.base.weighted_terms(divergence)
    return sum(mp.mpf(w) * definition(d, p, q) for w, d in terms)


def term(divergence, x, side):
    """F(eˣ, 1) − F(1, 0) (eˣ − 1) at samples of q, or its mirror image at samples of p."""

    def f(other, own):
        return definition(divergence, *((other, own) if side == "q" else (own, other)))

    unseen = f(mp.mpf(1), mp.mpf(0))
    ratio = mp.exp(x)
    return f(ratio, mp.mpf(1)) - (unseen * (ratio - 1) if mp.isfinite(unseen) else 0)


def rounded(x, dtype):
    """x in the dtype, where all that exceeds it is infinite."""
    largest = torch.finfo(dtype).max
    return float(x) if abs(x) <= largest else math.copysign(math.inf, x)


@functools.cache
def reference(divergence, log_ratio, side):
    """The term and its derivative in log p/q; at ±∞ what they tend to."""
    if math.isinf(log_ratio):
        far, farther = (
            reference(divergence, math.copysign(at, log_ratio), side) for at in (2e3, 4e3)
        )
        return tuple(_limit(*pair) for pair in zip(far, farther, strict=True))
    sign = 1 if side == "q" else -1
    x = mp.mpf(log_ratio) * sign
    with mp.workdps(90 + int(abs(log_ratio) / 2)):
        value = term(divergence, x, side)
        step = mp.mpf(10) ** -20
        ahead, behind = (term(divergence, x + way * step, side) for way in (1, -1))
        return value, sign * (ahead - behind) / (2 * step)


def _limit(far, farther):
    """Where a value goes that was seen at two places, one twice as far out."""
    if abs(farther) < 1e-300:
        return mp.mpf(0)
    growing = abs(farther - far) > abs(far) * mp.mpf("1e-20")
    return mp.sign(farther) * mp.inf if growing and abs(farther) > 100 else farther


@pytest.mark.parametrize("side", ["p", "q"])
@pytest.mark.parametrize("divergence", F[::3], ids=repr)
def test_terms_and_gradients_are_those_of_many_digits(divergence, side):
    check_terms(divergence, side, torch.float32, [x for x in RATIOS if abs(x) < FAR])


@pytest.mark.parametrize("distance", [1e-6, 1e-4, 1e-2])
@pytest.mark.parametrize("side", ["p", "q"])
def test_terms_near_the_poles_are_within_a_thousandth(side, distance):
    """Of those of many digits, in single precision; the poles are the KL divergences."""
    d, ratios = distance, [0.1, -0.1, 1.0, -1.0, 5.0, -5.0]
    near = [rkl.Amari(it) for it in (d, -d, 1 - d, 1 + d)] + [rkl.RecallHalf(1 - d)]
    near += [rkl.JensenShannon(d), rkl.JensenShannon(1 - d), rkl.SkewKL(d), rkl.SkewKL(1 - d)]
    for divergence in near:
        ratio = torch.tensor(ratios, requires_grad=True)
        terms = rkl.monte_carlo(divergence, ratio, sampled_from=side)
        (gradient,) = torch.autograd.grad(terms.sum(), ratio)
        for x, *found in zip(ratio.tolist(), terms.tolist(), gradient.tolist(), strict=True):
            expected = [float(it) for it in reference(divergence, x, side)]
            assert found == pytest.approx(expected, rel=1e-3, abs=1e-12), (divergence, x)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("side", ["p", "q"])
@pytest.mark.parametrize("divergence", F, ids=repr)
def test_terms_and_gradients_are_those_of_many_digits_at_every_ratio(divergence, side, dtype):
    check_terms(divergence, side, dtype, RATIOS)


@pytest.mark.parametrize(("divergence", "side"), [(rkl.KL(), "p"), (rkl.ReverseKL(), "q")])
def test_linear_terms_stay_finite_at_every_ratio(divergence, side):
    ratio = torch.tensor([-1e4, -89.0, 0.0, 89.0, 1e4], requires_grad=True)
    terms = rkl.monte_carlo(divergence, ratio, sampled_from=side)
    sign = 1 if side == "p" else -1
    assert torch.equal(terms, sign * ratio)
    (gradient,) = torch.autograd.grad(terms.sum(), ratio)
    assert torch.equal(gradient, torch.full_like(ratio, sign))


def check_terms(divergence, side, dtype, ratios):
    ratio = torch.tensor(ratios, dtype=dtype, requires_grad=True)
    terms = rkl.monte_carlo(divergence, ratio, sampled_from=side)
    (gradient,) = torch.autograd.grad(terms.sum(), ratio)
    assert terms.dtype == dtype
    # the terms of a control variate are known to what eps times its size leaves near agreement
    near = 1e-6 if dtype == torch.float32 else 1e-11
    for x, *found in zip(ratio.tolist(), terms.tolist(), gradient.tolist(), strict=True):
        for value, exact in zip(found, reference(divergence, x, side), strict=True):
            expected = rounded(exact, dtype)
            assert value == pytest.approx(expected, rel=near, abs=1e-13), (x, exact)


def test_every_f_divergence_of_the_catalogue_has_a_definition_here():
    ours = (cls for cls in rkl.catalogue().values() if cls.__module__.startswith("rkl."))
    found = {cls for cls in ours if issubclass(cls, rkl.FDivergence)}
    assert found == set(DEFINITIONS)


@pytest.mark.slow
@pytest.mark.parametrize("divergence", F, ids=repr)
def test_slopes_and_the_bound_are_finite_wherever_they_are_representable(divergence):
    """∂F/∂q at p/q = eˣ, against differences of the definition."""
    ratio = torch.tensor([x for x in RATIOS if math.isfinite(x) and x], dtype=torch.float32)
    values = {
        False: slope(divergence, ratio),
        True: torch.stack(
            [
                rkl.variational_bound(divergence, score_p=x[None], score_q=torch.zeros(1))
                for x in ratio
            ]
        )
        - rkl.variational_bound(divergence, score_p=torch.zeros(1), score_q=torch.zeros(1))
        + _slope(divergence, mp.mpf(0), True),
    }
    for in_p, found in values.items():
        for x, value in zip(ratio.tolist(), found.tolist(), strict=True):
            expected = rounded(_slope(divergence, mp.mpf(x), in_p), torch.float32)
            assert value == pytest.approx(expected, rel=1e-5, abs=1e-5), (in_p, x)


def _slope(divergence, x, in_p):
    with mp.workdps(90 + int(abs(x))):
        ratio, step = mp.exp(x), mp.mpf(10) ** -20

        def f(way):
            p, q = (ratio, 1 + way) if not in_p else (ratio + way, mp.mpf(1))
            return definition(divergence, p, q)

        step = step * (ratio if in_p else 1)
        return float_or_inf((f(step) - f(-step)) / (2 * step))


def float_or_inf(x):
    return float(x) if abs(x) < mp.mpf("1e300") else math.copysign(math.inf, x)


@dataclass(frozen=True)
class _Own(rkl.FDivergence):
    """JensenShannon(0.3), written by somebody who gives the integrand alone."""

    def integrand(self, logp, logq):
        return rkl.JensenShannon(0.3).integrand(logp, logq)


@pytest.mark.parametrize("side", ["p", "q"])
def test_an_integrand_alone_gives_terms_that_do_not_cancel_far_out(side):
    ratio = torch.tensor([x for x in RATIOS if math.isfinite(x)], requires_grad=True)
    values = [
        rkl.monte_carlo(d, ratio, sampled_from=side) for d in (_Own(), rkl.JensenShannon(0.3))
    ]
    assert torch.allclose(*values, rtol=1e-5)
    gradients = [torch.autograd.grad(v.sum(), ratio)[0] for v in values]
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-6)

"""One family of distributions, spelt in several ways, has one act and one risk."""

import pytest
import torch
from torch.distributions import (
    Bernoulli,
    Beta,
    Binomial,
    Categorical,
    Cauchy,
    Chi2,
    Exponential,
    Gamma,
    Geometric,
    Gumbel,
    HalfCauchy,
    HalfNormal,
    Independent,
    InverseGamma,
    Laplace,
    LogNormal,
    MultivariateNormal,
    NegativeBinomial,
    Normal,
    Pareto,
    Poisson,
    StudentT,
    TransformedDistribution,
    Uniform,
    Weibull,
)
from torch.distributions.transforms import (
    AffineTransform,
    ExpTransform,
    PowerTransform,
    SigmoidTransform,
)

from rkl.bayes import bayes_act
from rkl.divergences import KL, JensenShannon, ReverseKL

ONE = torch.ones((), dtype=torch.float64)


def affine(base, loc, scale, **settings):
    return TransformedDistribution(base, [AffineTransform(loc, scale, **settings)])


def shift_of(*transforms):
    return lambda base: TransformedDistribution(base, list(transforms))


exp, logit, inverse = ExpTransform(), SigmoidTransform(), PowerTransform(-ONE)
# In each row theta has m, s > 0, a > 0 and p in (0, 1); the first spelling is torch's own.
SPELLINGS = {
    "normal": (
        lambda t: Normal(t.m, t.s),
        lambda t: affine(Normal(0 * t.m, 1 + 0 * t.m), t.m, t.s),
        lambda t: affine(Normal(0 * ONE, ONE), t.m, t.s),
        lambda t: affine(Normal(t.m / t.s, ONE), 0.0, t.s),
    ),
    "log-normal": (
        lambda t: LogNormal(t.m, t.s),
        lambda t: shift_of(exp)(Normal(t.m, t.s)),
        lambda t: TransformedDistribution(Normal(0 * ONE, ONE), [AffineTransform(t.m, t.s), exp]),
        lambda t: TransformedDistribution(
            LogNormal(0 * ONE, t.s), [AffineTransform(0, t.m.exp())]
        ),
    ),
    "logit-normal": (
        lambda t: shift_of(logit)(Normal(t.m, t.s)),
        lambda t: TransformedDistribution(
            Normal(0 * ONE, ONE), [AffineTransform(t.m, t.s), logit]
        ),
    ),
    "exponential": (
        lambda t: Exponential(t.a),
        lambda t: Gamma(1 + 0 * t.a, t.a),
        lambda t: affine(Exponential(ONE), 0.0, 1 / t.a),
        lambda t: affine(Exponential(2 * t.a), 0.0, 2.0),
    ),
    "gamma": (
        lambda t: Gamma(t.a, t.s),
        lambda t: affine(Gamma(t.a, ONE), 0.0, 1 / t.s),
        lambda t: shift_of(inverse)(InverseGamma(t.a, t.s)),
    ),
    "inverse-gamma": (
        lambda t: InverseGamma(t.a, t.s),
        lambda t: shift_of(inverse)(Gamma(t.a, t.s)),
        lambda t: affine(InverseGamma(t.a, ONE), 0.0, t.s),
    ),
    "generalised gamma": (
        lambda t: shift_of(PowerTransform(t.s))(Gamma(t.a, ONE)),
        lambda t: TransformedDistribution(
            Gamma(t.a, ONE), [exp.inv, AffineTransform(0.0, t.s), exp]
        ),
    ),
    "weibull": (
        lambda t: Weibull(t.s, t.a),
        lambda t: TransformedDistribution(
            Exponential(ONE), [PowerTransform(1 / t.a), AffineTransform(0.0, t.s)]
        ),
        lambda t: shift_of(PowerTransform(1 / t.a))(Exponential(t.s**-t.a)),
    ),
    "weibull of a fixed shape": (
        lambda t: Weibull(t.s, 1.5 + 0 * t.s),
        lambda t: shift_of(PowerTransform(ONE / 1.5))(Exponential(t.s**-1.5)),
        lambda t: TransformedDistribution(
            Exponential(ONE), [PowerTransform(ONE / 1.5), AffineTransform(0.0, t.s)]
        ),
    ),
    "gumbel": (
        lambda t: Gumbel(t.m, t.s),
        lambda t: affine(Gumbel(0 * ONE, ONE), t.m, t.s),
    ),
    "laplace": (
        lambda t: Laplace(t.m, t.s),
        lambda t: affine(Laplace(0 * ONE, ONE), t.m, t.s),
    ),
    "cauchy": (
        lambda t: Cauchy(t.m, t.s),
        lambda t: affine(Cauchy(0 * ONE, ONE), t.m, t.s),
    ),
    "student-t": (
        lambda t: StudentT(5 * ONE, t.m, t.s),
        lambda t: affine(StudentT(5 * ONE), t.m, t.s),
    ),
    "half-normal": (
        lambda t: HalfNormal(t.s),
        lambda t: affine(HalfNormal(ONE), 0.0, t.s),
    ),
    "half-cauchy": (
        lambda t: HalfCauchy(t.s),
        lambda t: affine(HalfCauchy(ONE), 0.0, t.s),
    ),
    "chi-squared": (
        lambda t: Chi2(4 * t.a),
        lambda t: Gamma(2 * t.a, 0.5 + 0 * t.a),
        lambda t: affine(Gamma(2 * t.a, ONE), 0.0, 2.0),
    ),
    "beta": (
        lambda t: Beta(t.a, t.s),
        lambda t: affine(Beta(t.s, t.a), ONE, -ONE),
    ),
    "pareto above 1": (
        lambda t: Pareto(1 + 0 * t.a, t.a),
        lambda t: shift_of(exp)(Exponential(t.a)),
        lambda t: TransformedDistribution(Exponential(ONE), [AffineTransform(0.0, 1 / t.a), exp]),
    ),
    "logistic": (
        lambda t: TransformedDistribution(
            Uniform(0 * ONE, ONE), [logit.inv, AffineTransform(t.m, t.s)]
        ),
        lambda t: TransformedDistribution(
            Uniform(0 * t.m, 1 + 0 * t.m), [logit.inv, AffineTransform(t.m, t.s)]
        ),
    ),
    "two independent normals": (
        lambda t: Independent(Normal(torch.stack([t.m, t.a], -1), t.s[:, None]), 1),
        lambda t: MultivariateNormal(
            torch.stack([t.m, t.a], -1), torch.diag_embed(t.s.square()[:, None].expand(-1, 2))
        ),
        lambda t: affine(
            Independent(Normal(torch.zeros(2).double(), torch.ones(2).double()), 1),
            torch.stack([t.m, t.a], -1),
            t.s[:, None],
            event_dim=1,
        ),
    ),
    "bernoulli": (lambda t: Bernoulli(t.p), lambda t: Bernoulli(logits=t.p.logit())),
    "binomial": (lambda t: Binomial(10, t.p), lambda t: Binomial(10, logits=t.p.logit())),
    "geometric": (lambda t: Geometric(t.p), lambda t: Geometric(logits=t.p.logit())),
    "poisson": (lambda t: Poisson(t.a), lambda t: Poisson(t.a.log().exp())),
    "negative binomial": (
        lambda t: NegativeBinomial(t.a, t.p),
        lambda t: NegativeBinomial(t.a, logits=t.p.logit()),
    ),
    "categorical": (
        lambda t: Categorical(torch.stack([t.p, 1 - t.p], -1)),
        lambda t: Categorical(logits=torch.stack([t.p.logit(), 0 * t.p], -1)),
    ),
}


@pytest.fixture(scope="module")
def draws():
    z = torch.randn(4, 4, 25, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    m, s, a, p = 1 + 0.2 * z[0], (0.2 * z[1]).exp(), 2 * (0.15 * z[2]).exp(), (z[3] / 4).sigmoid()
    return {"m": m, "s": s, "a": a, "p": p}


def summary(draws, law, divergence):
    found = bayes_act(draws, law, divergence)
    return {k: v for k, v in found.act.items() if k in draws} | {"risk": found.risk.value}


SLOW = [pytest.param(x, marks=pytest.mark.slow) for x in (KL(), JensenShannon())]


@pytest.mark.parametrize("divergence", [ReverseKL(), *SLOW], ids=str)
@pytest.mark.parametrize("family", SPELLINGS)
def test_every_spelling_of_a_family_has_the_same_act(draws, family, divergence):
    first, *others = (summary(draws, law, divergence) for law in SPELLINGS[family])
    for other in others:
        assert other.keys() == first.keys()
        for name, value in first.items():
            # the quadrature of each spelling is chosen for it; its tolerance is 1e-6 of a nat
            torch.testing.assert_close(other[name], value, rtol=2e-4, atol=2e-5, msg=name)

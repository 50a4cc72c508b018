"""One family of distributions, spelt in several ways, has one act and one risk."""

import math

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
    MixtureSameFamily,
    MultivariateNormal,
    NegativeBinomial,
    Normal,
    Pareto,
    Poisson,
    StudentT,
    TransformedDistribution,
    Uniform,
    VonMises,
    Weibull,
)
from torch.distributions.transforms import (
    AffineTransform,
    ExpTransform,
    PowerTransform,
    SigmoidTransform,
)

from rkl.bayes import bayes_act, check_invariance
from rkl.bayes.families import NegativeBinomial2, ZeroInflatedPoisson
from rkl.divergences import KL, JensenShannon, ReverseKL

ONE = torch.ones((), dtype=torch.float64)


def affine(base, loc, scale, **settings):
    return TransformedDistribution(base, [AffineTransform(loc, scale, **settings)])


def shift_of(*transforms):
    return lambda base: TransformedDistribution(base, list(transforms))


def mixture(weights, components):
    return MixtureSameFamily(Categorical(torch.stack(weights, -1)), components)


def centre_and_factor(t):
    """Of two numbers, the second of which leans on the first."""
    zero = 0 * t.s
    factor = torch.stack([torch.stack([t.s, zero], -1), torch.stack([t.m, t.a], -1)], -2)
    return torch.stack([t.m, t.m], -1), factor


def covariance_of(t):
    factor = centre_and_factor(t)[1]
    return factor @ factor.mT


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
        lambda t: TransformedDistribution(
            Normal(t.m / t.s, ONE), [AffineTransform(0.0, t.s), logit]
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
        lambda t: shift_of(PowerTransform(-t.s))(InverseGamma(t.a, ONE)),
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
        lambda t: TransformedDistribution(Exponential(ONE), [exp.inv, AffineTransform(t.m, -t.s)]),
    ),
    "laplace": (
        lambda t: Laplace(t.m, t.s),
        lambda t: affine(Laplace(0 * ONE, ONE), t.m, t.s),
        lambda t: affine(Laplace(0 * ONE, ONE), t.m, -t.s),
    ),
    "cauchy": (
        lambda t: Cauchy(t.m, t.s),
        lambda t: affine(Cauchy(0 * ONE, ONE), t.m, t.s),
        lambda t: affine(Cauchy(0 * ONE, ONE), t.m, -t.s),
    ),
    "student-t": (
        lambda t: StudentT(5 * ONE, t.m, t.s),
        lambda t: affine(StudentT(5 * ONE), t.m, t.s),
        lambda t: affine(StudentT(5 * ONE), t.m, -t.s),
    ),
    "half-normal": (
        lambda t: HalfNormal(t.s),
        lambda t: affine(HalfNormal(ONE), 0.0, t.s),
        lambda t: affine(HalfNormal(2 * t.s), 0.0, 0.5 * ONE),
    ),
    "half-cauchy": (
        lambda t: HalfCauchy(t.s),
        lambda t: affine(HalfCauchy(ONE), 0.0, t.s),
        lambda t: affine(HalfCauchy(2 * t.s), 0.0, 0.5 * ONE),
    ),
    "chi-squared": (
        lambda t: Chi2(4 * t.a),
        lambda t: Gamma(2 * t.a, 0.5 + 0 * t.a),
        lambda t: affine(Gamma(2 * t.a, ONE), 0.0, 2.0),
    ),
    "beta": (
        lambda t: Beta(t.a, t.s),
        lambda t: affine(Beta(t.s, t.a), ONE, -ONE),
        lambda t: shift_of(logit.inv)(Beta(t.a, t.s)),
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
        lambda t: TransformedDistribution(
            Uniform(0 * ONE, ONE), [logit.inv, AffineTransform(t.m, -t.s)]
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
    "bernoulli": (
        lambda t: Bernoulli(t.p),
        lambda t: Bernoulli(logits=t.p.logit()),
        lambda t: Binomial(1, t.p),
    ),
    "binomial": (
        lambda t: Binomial(10, t.p),
        lambda t: Binomial(10, logits=t.p.logit()),
        lambda t: Binomial(10 + 0 * t.p, t.p),
    ),
    "geometric": (
        lambda t: Geometric(t.p),
        lambda t: Geometric(logits=t.p.logit()),
        lambda t: NegativeBinomial(1, 1 - t.p),
    ),
    "poisson": (
        lambda t: Poisson(t.a),
        lambda t: Poisson(t.a.log().exp()),
        lambda t: Independent(Poisson(t.a), 0),
    ),
    "negative binomial": (
        lambda t: NegativeBinomial(t.a, t.p),
        lambda t: NegativeBinomial(t.a, logits=t.p.logit()),
        lambda t: NegativeBinomial2(t.a * t.p / (1 - t.p), t.a),
    ),
    "categorical": (
        lambda t: Categorical(torch.stack([t.p, 1 - t.p], -1)),
        lambda t: Categorical(logits=torch.stack([t.p.logit(), 0 * t.p], -1)),
        lambda t: Bernoulli(1 - t.p),
    ),
    "von mises": (
        lambda t: VonMises(t.m, t.a),
        lambda t: VonMises(t.m + 2 * math.pi, t.a),
        lambda t: affine(VonMises(-t.m, t.a), 0.0, -1.0),
    ),
    "log-logistic": (
        lambda t: TransformedDistribution(
            Uniform(0 * ONE, ONE), [logit.inv, AffineTransform(t.m, t.s), exp]
        ),
        lambda t: TransformedDistribution(
            Uniform(0 * ONE, ONE), [logit.inv, AffineTransform(-t.m, t.s), exp, inverse]
        ),
        lambda t: TransformedDistribution(
            Uniform(0 * ONE, ONE),
            [logit.inv, exp, PowerTransform(t.s), AffineTransform(0.0, t.m.exp())],
        ),
    ),
    "frechet": (
        lambda t: TransformedDistribution(
            Exponential(ONE), [PowerTransform(-1 / t.a), AffineTransform(0.0, t.s)]
        ),
        lambda t: shift_of(inverse)(Weibull(1 / t.s, t.a)),
        lambda t: shift_of(exp)(Gumbel(t.s.log(), 1 / t.a)),
    ),
    "zero-inflated poisson": (
        lambda t: ZeroInflatedPoisson(t.p, t.a),
        lambda t: mixture([t.p, 1 - t.p], Poisson(torch.stack([0 * t.a, t.a], -1))),
        lambda t: mixture([1 - t.p, t.p], Poisson(torch.stack([t.a, 0 * t.a], -1))),
    ),
    "mixture of normals": (
        lambda t: mixture([t.p, 1 - t.p], Normal(torch.stack([t.m, t.m + 3], -1), t.s[:, None])),
        lambda t: mixture([1 - t.p, t.p], Normal(torch.stack([t.m + 3, t.m], -1), t.s[:, None])),
        lambda t: affine(
            mixture(
                [t.p, 1 - t.p], Normal(torch.stack([0 * t.s, 3 / t.s], -1), 1 + 0 * t.s[:, None])
            ),
            t.m,
            t.s,
        ),
    ),
    "multivariate normal": (
        lambda t: MultivariateNormal(centre_and_factor(t)[0], scale_tril=centre_and_factor(t)[1]),
        lambda t: MultivariateNormal(centre_and_factor(t)[0], covariance_of(t)),
        lambda t: MultivariateNormal(
            centre_and_factor(t)[0], precision_matrix=torch.linalg.inv(covariance_of(t))
        ),
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


LONG = "frechet", "log-logistic"  # seconds, on panels that reach far out
QUICK_FIRST = [
    pytest.param(name, marks=[pytest.mark.slow] if name in LONG else []) for name in SPELLINGS
]
SLOW = [pytest.param(x, marks=pytest.mark.slow) for x in (KL(), JensenShannon())]


@pytest.mark.parametrize("divergence", [ReverseKL(), *SLOW], ids=str)
@pytest.mark.parametrize("family", QUICK_FIRST)
def test_every_spelling_of_a_family_has_the_same_act(draws, family, divergence):
    first, *others = (summary(draws, law, divergence) for law in SPELLINGS[family])
    for other in others:
        assert other.keys() == first.keys()
        for name, value in first.items():
            # the quadrature of each spelling is chosen for it; its tolerance is 1e-6 of a nat
            torch.testing.assert_close(other[name], value, rtol=2e-4, atol=2e-5, msg=name)


def test_thirty_families_have_three_spellings_each():
    assert len(SPELLINGS) >= 30
    assert all(len(spellings) >= 3 for spellings in SPELLINGS.values())


NEW_NAMES = {"m": exp, "s": exp.inv, "a": exp.inv, "p": logit.inv}


@pytest.mark.slow
@pytest.mark.parametrize("family", SPELLINGS)
def test_no_name_of_a_parameter_moves_the_act_of_any_spelling(draws, family):
    for law in SPELLINGS[family]:
        estimate = bayes_act(draws, law)
        renamed = {name: NEW_NAMES[name] for name in estimate.problem.model.names}
        rows = dict(check_invariance(estimate, renamed).rows)
        # in posterior standard deviations; the optimiser stops at 1e-10 of a nat
        assert rows["act"] < 1e-3

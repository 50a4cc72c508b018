"""How many digits families keep at extreme parameters, what is on their edge, what is fixed."""

import dataclasses
import math

import mpmath
import pytest
import torch
from found import laws, one
from torch.distributions import (
    Bernoulli,
    Beta,
    Binomial,
    Categorical,
    Cauchy,
    Dirichlet,
    Gamma,
    Geometric,
    Laplace,
    MultivariateNormal,
    NegativeBinomial,
    Normal,
    Poisson,
    VonMises,
)

from rkl.bayes.families import family_of
from rkl.bayes.families.normal import NormalFamily
from rkl.bayes.families.special import (
    digamma_gap,
    lgamma_gap,
    log_gap,
    relative_gap,
    shape_of_gap,
    trigamma,
    trigamma_gap,
)

EPS = torch.finfo(torch.float64).eps


def close(got, expected, tolerance=1e-10):
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


def vector(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


# Digits


def relative(function, exact, *arguments):
    got = function(*(torch.tensor(x, dtype=torch.float64) for x in arguments)).item()
    with mpmath.workdps(60):
        expected = exact(*map(mpmath.mpf, arguments))
        return float(abs(got / expected - 1))


@pytest.mark.parametrize("u", [1e-12, -1e-6, 0.0199, -0.0201, 0.5, -0.999, 1e5])
def test_excesses_of_elementary_functions_keep_their_digits(u):
    assert relative(log_gap, lambda u: u - mpmath.log1p(u), u) < 1e-13
    if u < 500:
        # of p = 1 and q = exp(u), where beyond the series e^u - 1 - u has lost two digits
        gap = relative(
            lambda u: relative_gap(torch.zeros_like(u), u), lambda u: mpmath.expm1(u) - u, u
        )
        assert gap < 1e-11


@pytest.mark.parametrize("x", [1e-3, 0.3, 2.5, 9.99, 10.01, 1e3, 1e6])
def test_gamma_functions_keep_their_digits(x):
    assert relative(digamma_gap, lambda x: mpmath.log(x) - mpmath.digamma(x), x) < 1e-13
    assert relative(trigamma_gap, lambda x: mpmath.psi(1, x) - 1 / x, x) < 1e-13
    assert relative(trigamma, lambda x: mpmath.psi(1, x), x) < 1e-14

    def excess(q, p):
        return mpmath.loggamma(q) - mpmath.loggamma(p) - (q - p) * mpmath.digamma(p)

    # near the argument, log Γ itself is known to 1e-15 only; above 10 nothing is lost
    assert relative(lgamma_gap, excess, x * 1.01, x) < (1e-13 if x > 10 else 1e-9)
    assert relative(lgamma_gap, excess, 3 * x, x) < 1e-13


@pytest.mark.parametrize("size", [1, 2, 7])
@pytest.mark.parametrize("above", [1e-3, 0.7, 30.0, 1e6])
def test_shapes_are_found_from_their_gap(size, above):
    with mpmath.workdps(40):
        shape = mpmath.mpf(above) + mpmath.mpf(size - 1) / 2
        gap = sum(
            mpmath.log(shape) - mpmath.digamma(shape - mpmath.mpf(i) / 2) for i in range(size)
        )
    assert shape_of_gap(vector(float(gap)), size).item() == pytest.approx(float(shape), rel=1e-12)


def test_normal_acts_at_large_locations_keep_the_digits_of_the_scale():
    offsets = torch.linspace(-2, 2, 9, dtype=torch.float64)
    law = Normal(1e8 + offsets, torch.linspace(0.5, 1.5, 9, dtype=torch.float64))
    family = family_of(law).about(Normal(law.loc[0], law.scale[0]))
    natural = family.natural(law)
    act = family.from_natural(family.from_mean(tuple(x.mean(0) for x in family.mean(natural))))
    variance = law.scale.square().mean() + offsets.square().mean() - offsets.mean().square()
    assert act.scale.item() == pytest.approx(variance.sqrt().item(), rel=1e-12)
    assert act.loc.item() == pytest.approx(1e8 + offsets.mean().item(), rel=1e-15)
    near = NormalFamily()
    shifted = near.natural(Normal(offsets, law.scale))
    kl = family.kl(natural, one(natural, [4]))
    torch.testing.assert_close(kl, near.kl(shifted, one(shifted, [4])), rtol=1e-7, atol=1e-12)


def test_multivariate_normal_acts_at_large_locations_keep_their_digits():
    law = laws("MultivariateNormal", 30)
    far = MultivariateNormal(law.loc + 1e8, law.covariance_matrix)
    family = family_of(far).about(MultivariateNormal(far.loc[0], far.covariance_matrix[0]))
    mean = tuple(x.mean(0) for x in family.mean(family.natural(far)))
    act = family.from_natural(family.from_mean(mean))
    centred = law.loc - law.loc.mean(0)
    expected = law.covariance_matrix.mean(0) + centred.mT @ centred / 30
    torch.testing.assert_close(act.covariance_matrix, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("logit", [-40.0, 40.0])
def test_coins_that_almost_always_fall_alike_keep_their_digits(logit):
    law = Binomial(3, logits=vector(logit, 1.1 * logit))
    family = family_of(law)
    natural = family.natural(law)
    assert natural[0].tolist() == [logit, 1.1 * logit]

    def kl(a, b):
        p, q = 1 / (1 + mpmath.exp(-a)), 1 / (1 + mpmath.exp(-b))
        return 3 * (p * mpmath.log(p / q) + (1 - p) * mpmath.log((1 - p) / (1 - q)))

    single = lambda a, b: family.kl((a,), (b,))  # noqa: E731
    assert relative(single, kl, logit, 1.1 * logit) < 1e-12
    assert relative(single, kl, 1.1 * logit, logit) < 1e-12
    assert relative(single, kl, logit, 0.5) < 1e-12
    for waiting in (Geometric(logits=vector(logit)), NegativeBinomial(2.0, logits=vector(logit))):
        kin = family_of(waiting)
        close(kin.natural(kin.from_natural(kin.natural(waiting))), kin.natural(waiting), 1e-14)


@pytest.mark.parametrize("shape", [1e-3, 0.2, 40.0, 1e6])
def test_gamma_means_lead_back_as_far_as_they_are_conditioned(shape):
    law = Gamma(vector(shape), vector(3.0))
    family = family_of(law)
    natural = family.natural(law)
    found = family.from_mean(family.mean(natural))
    # E log x and log E x differ by 1/(2 shape), and each is known to a few of its last digits.
    known = 4 * EPS * (1 + abs(math.log(shape)))
    torch.testing.assert_close(found, natural, rtol=max(1e-12, 4 * shape * known), atol=0.0)


@pytest.mark.parametrize("concentration", [1e-6, 0.01, 1.0, 30.0, 1e4])
def test_von_mises_keeps_its_digits_at_every_concentration(concentration):
    law = VonMises(vector(0.4, 0.7), vector(concentration, 1.3 * concentration))
    family = family_of(law)
    natural = family.natural(law)
    # 1 − R is 1/(2κ), and R, a root of a sum of squares, is known to 4 of its last digits.
    tolerance = max(1e-12, 4 * EPS * 2 * 1.3 * concentration)
    torch.testing.assert_close(
        family.from_mean(family.mean(natural)), natural, rtol=tolerance, atol=0.0
    )

    def exact():
        k, l = mpmath.mpf(concentration), mpmath.mpf(law.concentration[1].item())
        ratio = mpmath.besseli(1, k) / mpmath.besseli(0, k)
        turned = mpmath.cos(mpmath.mpf(law.loc[0].item()) - mpmath.mpf(law.loc[1].item()))
        normal = mpmath.log(mpmath.besseli(0, l) / mpmath.besseli(0, k))
        return float(normal + ratio * (k - l * turned))

    with mpmath.workdps(40):
        kl = family.kl(one(natural, 0), one(natural, 1)).item()
        # the logarithms of two Bessel functions about 1 are known to two last digits each
        assert kl == pytest.approx(exact(), rel=1e-11, abs=4 * EPS)


def test_uniform_circle_has_a_mean_and_a_divergence():
    family = family_of(VonMises(vector(0.0), vector(1.0)))
    uniform, other = (vector(0.0), vector(0.0)), (vector(2.0), vector(0.0))
    close(family.mean(uniform), uniform)
    close(family.from_mean(uniform), uniform)
    exact = float(mpmath.log(mpmath.besseli(0, 2)))
    assert family.kl(uniform, other).item() == pytest.approx(exact, rel=1e-13)
    assert family.kl(other, uniform).isfinite()


@pytest.mark.parametrize("low", [1e-3, 0.5, 100.0])
def test_dirichlet_means_lead_back_however_unequal(low):
    law = Dirichlet(low * vector(1.0, 3.0, 1000.0))
    family = family_of(law)
    natural = family.natural(law)
    found = family.from_mean(family.mean(natural))
    # The Fisher matrix is diag ψ'(αᵢ) − ψ'(α₀), where 1/ψ'(α) is about α − 1/2: of K means that
    # are known to δ, α is known to 2 α₀ δ/(K − 1), here α₀ δ. A δ is four last digits of ψ(α₀).
    whole = law.concentration.sum().item()
    delta = 4 * EPS * (1 + abs(math.log(whole)))
    torch.testing.assert_close(found, natural, rtol=max(1e-12, whole * delta), atol=0.0)


# The edges


@pytest.mark.parametrize(
    ("law", "component"),
    [
        (Bernoulli(probs=vector(0.2, 1.0)), "logit is inf in 1 of 2"),
        (Bernoulli(probs=vector(0.2, 0.0)), "logit is -inf in 1 of 2"),
        (Binomial(3, probs=vector(0.0, 0.0)), "logit is -inf in 2 of 2"),
        (Geometric(probs=vector(1.0)), r"log\(1 − probs\) is -inf"),
        (NegativeBinomial(3.0, probs=vector(0.0)), "log probs is -inf"),
        (Poisson(vector(0.0, 2.0)), "log rate is -inf in 1 of 2"),
        (Categorical(probs=vector(0.0, 0.4, 0.6)), r"log probs is \[-inf, "),
        (Normal(vector(0.0), vector(math.inf)), r"−1 / \(2 scale²\) is -0.0"),
        (Beta(vector(1.0), vector(math.inf)), "concentration0 is inf"),
    ],
    ids=lambda x: type(x).__name__ if not isinstance(x, str) else "",
)
def test_laws_on_the_edge_are_refused_by_component(law, component):
    family = family_of(law)
    natural = family.natural(law)
    assert not any(x.isnan().any() for x in natural)
    assert not family.contains(natural).all()
    with pytest.raises(ValueError, match=component):
        family.check(natural)


@pytest.mark.parametrize(
    ("name", "mean", "component"),
    [
        ("Normal", (vector(1.0), vector(0.5)), "E x²"),
        ("MultivariateNormal", (vector(1.0, 0.0), torch.eye(2).double() / 2), "E x xᵀ"),
        ("Gamma", (vector(0.5), vector(1.0)), "E log x"),
        ("Beta", (vector(-0.1), vector(-0.2)), "E log x"),
        ("Dirichlet", (vector(-0.1, -0.1),), "E log x"),
        ("Bernoulli", (vector(1.0),), "E x is 1.0"),
        ("VonMises", (vector(0.8), vector(0.7)), "E cos x"),
        ("Wishart", (vector(0.5), torch.eye(2).double()), "E log det X"),
        ("Multinomial", (vector(2.0, 3.0, 3.0),), "E x"),
    ],
)
def test_means_of_no_law_are_refused_by_component(name, mean, component):
    family = family_of(laws(name, 2))
    with pytest.raises(ValueError, match=f"mean must .*{component}"):
        family.from_mean(mean)


def test_divergences_of_laws_on_the_edge_are_those_of_the_limit():
    family = family_of(Bernoulli(vector(0.5)))
    p, q = vector(-math.inf, math.inf), vector(0.3, 0.3)
    expected = -torch.nn.functional.logsigmoid(vector(-0.3, 0.3))
    torch.testing.assert_close(family.kl((p,), (q,)), expected)
    assert (family.kl((q,), (p,)) == math.inf).all()
    poisson = family_of(Poisson(vector(1.0)))
    assert poisson.kl((vector(-math.inf),), (vector(0.0),)).item() == 1.0


# What is fixed


def test_what_moves_with_the_support_is_refused():
    with pytest.raises(ValueError, match="total_count must be known.*support"):
        family_of(Binomial(torch.tensor([3, 4]), probs=vector(0.1, 0.2)))


def test_what_would_be_fixed_and_moves_makes_no_family():
    assert family_of(Laplace(vector(0.0, 1.0), vector(1.0, 1.0))) is None
    assert family_of(NegativeBinomial(vector(1.0, 2.0), vector(0.1, 0.2))) is None
    assert family_of(Cauchy(vector(0.0), vector(1.0))) is None


def test_what_is_fixed_may_differ_between_groups():
    groups, probs = torch.tensor([3, 4]), torch.full((5, 2), 0.3, dtype=torch.float64)
    family = family_of(Binomial(groups, probs=probs))
    assert family.total_count.tolist() == [3, 4]
    assert family == family_of(Binomial(groups, probs=probs[0]), draws=False)
    assert family != family_of(Binomial(torch.tensor([3, 5]), probs=probs))
    assert family != family_of(Binomial(3, probs=probs))
    act = family.from_natural(tuple(x.mean(0) for x in family.natural(Binomial(groups, probs))))
    assert act.total_count.tolist() == [3, 4]
    assert family_of(Laplace(groups, 2 * probs)).loc.tolist() == [3, 4]


def test_what_is_no_distribution_is_refused():
    with pytest.raises(TypeError, match="distribution must be a distribution"):
        family_of(3.0)


def test_equal_families_hash_alike():
    first, second = family_of(laws("Binomial", 3)), family_of(laws("Binomial", 4))
    assert first == second
    assert hash(first) == hash(second)
    assert first != dataclasses.replace(first, total_count=3.0)
    assert first != NormalFamily()

"""Families by name that torch lacks: their densities, and their acts beside brute force."""

import math

import mpmath
import pytest
import torch
from torch.distributions import Categorical, MixtureSameFamily, Poisson

from rkl.bayes import bayes_act, families, read_draws
from rkl.bayes.model import Theta, read_family
from rkl.divergences import KL, ReverseKL

mp = mpmath.mp


def double(x):
    return torch.tensor(x, dtype=torch.float64)


@pytest.fixture(scope="module")
def draws():
    z = torch.randn(4, 4, 60, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return {
        "m": 1 + 0.2 * z[0],
        "s": (0.2 * z[1]).exp(),
        "k": 1.5 * (0.15 * z[2]).exp(),
        "g": (0.3 * z[3] - 1).sigmoid(),
        "c": torch.stack([-1 + 0.1 * z[1], 0.5 + 0.1 * z[2], 2 + 0.1 * z[3]], -1),
    }


def beta(a, b):
    return mpmath.beta(a, b)


# Family, its parameters, a value, and the density there by mpmath.
DENSITIES = {
    "Weibull": ({"scale": 2.0, "concentration": 1.5}, 3.0, lambda x: (
        mpmath.mpf(1.5) / 2 * (x / 2) ** 0.5 * mpmath.exp(-((x / 2) ** 1.5)))),
    "Gompertz": ({"concentration": 0.7, "rate": 1.5}, 2.0, lambda x: (
        mpmath.mpf(0.7) * 1.5 * mpmath.exp(mpmath.mpf(1.5) * x)
        * mpmath.exp(-mpmath.mpf(0.7) * (mpmath.exp(mpmath.mpf(1.5) * x) - 1)))),
    "Kumaraswamy": ({"concentration1": 2.0, "concentration0": 0.7}, 0.9, lambda x: (
        2 * mpmath.mpf(0.7) * x * (1 - x**2) ** (mpmath.mpf(0.7) - 1))),
    "GeneralizedPareto": ({"loc": 0.5, "scale": 2.0, "concentration": 0.3}, 4.0, lambda x: (
        (1 + mpmath.mpf(0.3) * (x - 0.5) / 2) ** (-1 - 1 / mpmath.mpf(0.3)) / 2)),
    "TruncatedNormal": ({"loc": -9.0, "scale": 1.0, "low": 0.0}, 0.1, lambda x: (
        mpmath.npdf(x, -9, 1) / mpmath.ncdf(-9))),
    "NegativeBinomial2": ({"mean": 3.0, "concentration": 1.7}, 5.0, lambda x: (
        mpmath.binomial(x + mpmath.mpf(1.7) - 1, x)
        * (mpmath.mpf(1.7) / (mpmath.mpf(1.7) + 3)) ** mpmath.mpf(1.7)
        * (3 / (mpmath.mpf(1.7) + 3)) ** x)),
    "ZeroInflatedPoisson": ({"gate": 0.3, "rate": 2.5}, 0.0, lambda x: (
        mpmath.mpf(0.3) + (1 - mpmath.mpf(0.3)) * mpmath.exp(-2.5))),
    "ZeroInflatedNegativeBinomial": (
        {"gate": 0.3, "mean": 3.0, "concentration": 1.7}, 0.0, lambda x: (
            mpmath.mpf(0.3)
            + mpmath.mpf(0.7) * (mpmath.mpf(1.7) / (mpmath.mpf(1.7) + 3)) ** mpmath.mpf(1.7))),
    "HurdlePoisson": ({"gate": 0.3, "rate": 2.5}, 4.0, lambda x: (
        (1 - mpmath.mpf(0.3)) * mpmath.mpf(2.5) ** x * mpmath.exp(-2.5)
        / mpmath.factorial(x) / (1 - mpmath.exp(-2.5)))),
    "BetaBinomial": ({"concentration1": 2.0, "concentration0": 0.7, "total_count": 9}, 4.0, (
        lambda x: mpmath.binomial(9, x) * beta(x + 2, 9 - x + mpmath.mpf(0.7))
        / beta(2, mpmath.mpf(0.7)))),
}  # fmt: skip


@pytest.mark.parametrize("name", DENSITIES)
def test_a_log_density_is_that_of_its_formula(name):
    parameters, value, density = DENSITIES[name]
    law = getattr(families, name)(**{
        k: x if k in ("low", "total_count") else double(x) for k, x in parameters.items()
    })  # fmt: skip
    with mp.workdps(40):
        expected = float(mpmath.log(density(mpmath.mpf(value))))
    # a few roundings of terms that are at most 50 in size
    assert law.log_prob(double(value)).item() == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_classes_in_order_have_the_differences_of_logistic_functions():
    law = families.OrderedLogistic(double(0.3), double([-1.0, 0.5, 2.0]))
    ends = torch.cat([double([-math.inf]), double([-1.0, 0.5, 2.0]) - 0.3, double([math.inf])])
    torch.testing.assert_close(law.log_prob(torch.arange(4.0)).exp(), ends.sigmoid().diff())
    with pytest.raises(ValueError, match="cutpoints must rise"):
        families.OrderedLogistic(double(0.0), double([1.0, 0.0]))


TEXTS = {
    "zero-inflated-poisson(gate=g, rate=k)": torch.arange(200.0),
    "zero-inflated-negative-binomial(gate=g, mean=k, concentration=s)": torch.arange(2000.0),
    "hurdle-poisson(gate=g, rate=k)": torch.arange(200.0),
    "beta-binomial(concentration1=s, concentration0=k, total_count=12)": torch.arange(13.0),
    "ordered-logistic(predictor=0, cutpoints=c)": torch.arange(4.0),
    "negative-binomial2(mean=k, concentration=s)": torch.arange(2000.0),
    "truncated-normal(loc=m, scale=s, low=0, high=inf)": torch.linspace(0, 14, 20_001),
    "weibull(scale=s, concentration=k)": torch.linspace(0, 6, 9_001).square(),
    "gompertz(concentration=g, rate=s)": torch.linspace(0, 12, 20_001),
    "generalized-pareto(loc=0, scale=s, concentration=g)": torch.linspace(0, 12, 9_001).exp() - 1,
    "kumaraswamy(concentration1=s, concentration0=k)": torch.linspace(0, math.pi, 20_001),
}


def grid_of(text):
    """Points and weights of the trapezoidal rule, or of a sum."""
    x = TEXTS[text].double()
    if (x.diff() == 1).all():
        return x, torch.ones_like(x)
    if text.startswith("kumaraswamy"):
        x = (1 - x.cos()) / 2
    steps = x.diff()
    weights = torch.cat([steps, steps.new_zeros(1)]) + torch.cat([steps.new_zeros(1), steps])
    return x[1:-1], weights[1:-1] / 2


@pytest.mark.parametrize("divergence", [ReverseKL(), KL()], ids=str)
@pytest.mark.parametrize("text", TEXTS)
def test_the_act_of_a_named_family_is_where_brute_force_finds_no_slope(draws, text, divergence):
    ordered = text.startswith("ordered")
    family = (lambda t: families.OrderedLogistic(0 * t.c[..., 0], t.c)) if ordered else text
    estimate = bayes_act(draws, family, divergence)
    model = estimate.problem.model
    x, weights = grid_of(text)
    theta = {name: draws[name].flatten(0, 1) for name in model.names}
    act = {name: estimate.act[name].detach()[None].requires_grad_() for name in model.names}

    def log_density(values):
        return model.make(Theta(values)).log_prob(x[:, None])

    p, q = log_density(theta).detach(), log_density(act)
    terms = p.exp() * (p - q) if divergence == KL() else q.exp() * (q - p)
    risk = (weights @ terms.nan_to_num(0)).mean()
    # the trapezoidal rule on this grid is good to 1e-4 of a nat at worst
    assert risk.item() == pytest.approx(estimate.risk.value.item(), rel=5e-3, abs=1e-4)
    for slope in torch.autograd.grad(risk, list(act.values())):
        assert slope.abs().max() < 5e-3


@pytest.mark.parametrize(
    ("alias", "text"),
    [
        ("gaussian(mu=m, sigma=s)", "normal(loc=m, scale=s)"),
        ("lognormal(mu=m, sigma=s)", "log-normal(loc=m, scale=s)"),
        ("StudentT(nu=k, mu=m, sigma=s)", "student-t(df=k, loc=m, scale=s)"),
        ("gamma(alpha=k, beta=s)", "gamma(concentration=k, rate=s)"),
        ("zip(zi=g, mu=k)", "zero-inflated-poisson(gate=g, rate=k)"),
        ("negative-binomial(mu=k, phi=s)", "negative-binomial2(mean=k, concentration=s)"),
    ],
)
def test_names_of_other_ecosystems_are_read(draws, alias, text):
    one, two = read_family(alias, read_draws(draws)), read_family(text, read_draws(draws))
    assert one.kind is two.kind
    assert one.settings == two.settings


def test_a_misspelt_family_is_answered_with_the_one_that_was_meant(draws):
    with pytest.raises(ValueError, match=r"did you mean gamma\?"):
        read_family("gama(concentration=k, rate=s)", read_draws(draws))
    with pytest.raises(ValueError, match="no setting 'mu'"):
        read_family("gamma(mu=k, sigma=s)", read_draws(draws))
    with pytest.raises(ValueError, match="twice"):
        read_family("normal(loc=m, mu=m, scale=s)", read_draws(draws))


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("negative-binomial(n=k, p=g)", "p of Stan, PyMC and SciPy is 1 − probs of torch"),
        ("zip(psi=g, mu=k)", "psi of PyMC is the share of the counts, 1 − gate"),
        ("hurdle-poisson(psi=g, mu=k)", "psi of PyMC is the share of the counts, 1 − gate"),
    ],
)
def test_a_name_that_elsewhere_means_the_complement_is_refused(draws, text, advice):
    with pytest.raises(ValueError, match=advice):
        read_family(text, read_draws(draws))


@pytest.mark.parametrize("divergence", [ReverseKL(), KL()])
def test_a_mixture_with_a_poisson_of_rate_0_is_the_zero_inflated_one(draws, divergence):
    def mixture(theta):
        parts = torch.stack([0 * theta.k, theta.k], -1)
        gate = torch.stack([theta.g, 1 - theta.g], -1)
        return MixtureSameFamily(Categorical(gate), Poisson(parts, validate_args=False))

    found = bayes_act(draws, mixture, divergence)
    named = bayes_act(draws, "zip(gate=g, rate=k)", divergence)
    for name in ("g", "k"):
        torch.testing.assert_close(found.act[name], named.act[name], atol=1e-6, rtol=0)

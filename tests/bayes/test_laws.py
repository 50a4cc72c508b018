"""A family is read from text, a class, a partial or a callable, and rid of its wrappings."""

from functools import partial

import numpy as np
import pytest
import torch
from torch.distributions import (
    AffineTransform,
    Exponential,
    ExpTransform,
    Gamma,
    Independent,
    MultivariateNormal,
    Normal,
    Pareto,
    StudentT,
    TransformedDistribution,
    Uniform,
    Weibull,
)

from rkl.bayes.draws import Draws
from rkl.bayes.model import moving_edge, probe, read_family, unwrap


@pytest.fixture
def draws(seed=0):
    generator = torch.Generator().manual_seed(seed)
    mu = torch.randn(2, 50, 8, generator=generator, dtype=torch.float64)
    sigma = 0.5 + torch.rand(2, 50, generator=generator, dtype=torch.float64)
    loc, beta = mu[..., 0], mu[..., :3]
    return Draws(
        {"mu": mu, "sigma": sigma, "loc": loc, "scale": sigma, "beta": beta, "tri": beta.exp()}
    )


def laws_of(family, draws, **settings):
    model = read_family(family, draws, **settings)
    return model, model.law(probe(draws, model.names))


def test_batch_axes_are_aligned_with_the_draws_and_not_with_the_last_axis(draws):
    model, law = laws_of("normal(loc=mu, scale=sigma)", draws)
    assert model.names == ("mu", "sigma")
    assert law.batch_shape[1:] == (8,)
    sigma = probe(draws, model.names)["sigma"]
    assert torch.equal(law.scale, sigma[:, None].expand(-1, 8))


def test_numbers_in_a_text_are_fixed(draws):
    _, law = laws_of("normal(loc=mu, scale=2)", draws)
    assert (law.scale == 2).all()


@pytest.mark.parametrize(
    "family",
    [
        "normal(loc=loc, scale=scale)",
        "Normal(loc=loc, scale=scale)",
        "torch.distributions:Normal(loc=loc, scale=scale)",
        Normal,
        partial(Normal),
        lambda theta: Normal(theta.loc, theta["scale"]),
        lambda theta, design: Normal(design * theta.loc, theta.scale),
    ],
    ids=["text", "class's name", "imported", "class", "partial", "function", "with a design"],
)
def test_every_way_of_naming_a_family_makes_the_same_laws(draws, family):
    takes_design = getattr(family, "__name__", "") == "<lambda>" and (
        family.__code__.co_argcount == 2
    )
    model, law = laws_of(family, draws, design=1.0 if takes_design else None)
    few = probe(draws, ("loc", "scale"))
    assert set(model.names) == {"loc", "scale"}
    assert torch.equal(law.loc, few["loc"])
    assert torch.equal(law.scale, few["scale"])


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_a_function_gets_a_design_of_numpy_as_a_tensor_and_keeps_its_slopes(draws, kind):
    def regression(theta, design):
        return Independent(Normal(theta.beta @ design.T, theta.sigma[:, None]), 1)

    model = read_family(regression, draws, np.ones((5, 3), kind))
    theta = {k: x.requires_grad_() for k, x in probe(draws, model.names).items()}
    model.law(theta).mean.sum().backward()
    assert (theta["beta"].grad == 5).all()


def test_whole_numbers_of_a_design_stay_indices(draws):
    model, law = laws_of(
        lambda theta, group: Normal(theta.mu[:, group], 1.0), draws, design=np.array([7, 0])
    )
    assert torch.equal(law.loc, probe(draws, ("mu",))["mu"][:, [7, 0]])


def test_what_a_partial_holds_is_fixed(draws):
    model, law = laws_of(partial(StudentT, df=4.0), draws)
    assert (law.df == 4).all()
    assert set(model.names) == {"loc", "scale"}


def test_a_callable_takes_only_the_variables_that_it_looks_at(draws):
    model, _ = laws_of(lambda theta: Exponential(theta.sigma), draws)
    assert model.names == ("sigma",)


def test_event_axes_of_a_parameter_are_no_batch(draws):
    eye = torch.eye(3, dtype=torch.float64)
    model, law = laws_of(partial(MultivariateNormal, covariance_matrix=eye), _renamed(draws))
    assert model.names == ("loc",)
    assert law.batch_shape[1:] == ()
    assert law.event_shape == (3,)


def _renamed(draws):
    return Draws({"loc": draws["beta"]})


def test_independent_and_fixed_bijections_are_taken_off_and_put_back(draws):
    def family(theta):
        normal = Normal(theta.mu, theta.sigma[:, None])
        return Independent(TransformedDistribution(normal, [ExpTransform()]), 1)

    _, law = laws_of(family, draws)
    base, joint, wrap, _ = unwrap(law)
    assert type(base) is Normal
    assert joint == 1
    x = torch.full((8,), 1.7, dtype=torch.float64)
    assert torch.equal(wrap(base).log_prob(x), law.log_prob(x))


def test_a_bijection_that_moves_with_the_draw_stays(draws):
    def family(theta):
        return TransformedDistribution(
            Normal(0.0 * theta.loc, 1.0), AffineTransform(0, theta.scale)
        )

    _, law = laws_of(family, draws)
    assert unwrap(law).base is law
    _, fixed = laws_of("pareto(scale=1, alpha=sigma)", draws)
    assert type(unwrap(fixed).base) is Exponential
    _, moving = laws_of(lambda theta: Weibull(theta.sigma, 2.0), draws)
    assert unwrap(moving).base is moving


def test_supports_that_move_are_seen(draws):
    assert moving_edge(laws_of("uniform(low=0, high=sigma)", draws)[1]) == "upper_bound"
    assert moving_edge(laws_of(lambda t: Pareto(t.sigma, 2.0), draws)[1]) == "lower_bound"
    assert moving_edge(laws_of("pareto(scale=1, alpha=sigma)", draws)[1]) is None
    assert moving_edge(laws_of(lambda t: Gamma(t.sigma, 1.0), draws)[1]) is None
    independent = laws_of(lambda t: Independent(Uniform(-t.mu.exp(), 9.0), 1), draws)[1]
    assert moving_edge(independent) == "lower_bound"


@pytest.mark.parametrize(
    ("family", "error", "words"),
    [
        ("normal(loc=mu, scale=tau)", ValueError, "scale must be one of mu, sigma.*got tau"),
        (
            "nrmal(loc=mu, scale=sigma)",
            ValueError,
            r"none is called 'nrmal' \(did you mean normal\?\); there are bernoulli",
        ),
        ("normal(loc=mu)", ValueError, "must say scale of Normal"),
        ("normal(loc=0, scale=1)", ValueError, "must take a variable"),
        (
            "dirichlet(concentration=sigma)",
            ValueError,
            r"sigma must have as many axes .* 1; got \[\]",
        ),
        ("normal(loc=mu, scale=loc)", ValueError, "loc must satisfy GreaterThan"),
        ("normal(loc=mu, scale=tri)", ValueError, r"cannot take mu \[8\], tri \[3\]"),
        (Gamma, ValueError, "Gamma takes concentration, rate, but the draws have mu, sigma"),
        ("os:nothing", ValueError, "cannot be imported"),
        ("json:dumps(x=mu)", ValueError, "must name a class of distributions"),
        (lambda theta: theta.tau, ValueError, "no variable is called 'tau'; there are mu, sigma"),
        (lambda theta: 3, TypeError, "must make a distribution of torch; got 3"),
        (
            lambda theta: Normal(0, 1),
            ValueError,
            r"one distribution for each of 33 draws.*got \[\]",
        ),
        (3, TypeError, "family must be a text"),
    ],
)
def test_what_is_no_family_is_refused_in_a_line(draws, family, error, words):
    with pytest.raises(error, match=words) as caught:
        laws_of(family, draws)
    assert "\n" not in str(caught.value)

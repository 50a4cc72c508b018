"""Regressions given their design: what they observe, and the acts that follow."""

import math

import pytest
import torch
from torch.distributions import Bernoulli, Independent, Normal, Poisson

from rkl.bayes.families import (
    GaussianRegression,
    LogisticRegression,
    PoissonRegression,
    family_of,
)

KINDS = {
    "gaussian": lambda design, b: GaussianRegression(design, b, torch.full(b.shape[:-1], 0.7)),
    "poisson": PoissonRegression,
    "logistic": LogisticRegression,
}
every_regression = pytest.mark.parametrize("kind", KINDS)


def experiment(rows=40, columns=3, draws=30, seed=0):
    """A design with an intercept, and coefficients of a posterior."""
    generator = torch.Generator().manual_seed(seed)
    design = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    design[:, 0] = 1
    centre = torch.tensor([0.5, -1.0, 0.8], dtype=torch.float64)
    noise = torch.randn(draws, columns, generator=generator, dtype=torch.float64)
    return design, centre[:columns] + 0.3 * noise


def test_responses_are_independent_rows_of_the_linear_predictor():
    design, b = experiment()
    predictor = b @ design.mT
    expected = {
        "gaussian": Normal(predictor, 0.7),
        "poisson": Poisson(predictor.exp()),
        "logistic": Bernoulli(logits=predictor),
    }
    for kind, rows in expected.items():
        law, independent = KINDS[kind](design, b), Independent(rows, 1)
        y = independent.sample()
        torch.testing.assert_close(law.log_prob(y), independent.log_prob(y))
        torch.testing.assert_close(law.mean, independent.mean)
        torch.testing.assert_close(law.variance, independent.variance)
        assert law.batch_shape == (30,)
        assert law.event_shape == (40,)
        assert law.support.check(y).all()
        torch.manual_seed(1)
        assert law.sample((2,)).shape == (2, 30, 40)


@every_regression
def test_expanded_regressions_repeat_themselves(kind):
    design, b = experiment()
    law = KINDS[kind](design, b[0])
    wide = law.expand((5, 2))
    y = law.sample()
    assert wide.batch_shape == (5, 2)
    torch.testing.assert_close(wide.log_prob(y), law.log_prob(y).expand(5, 2))


@every_regression
def test_acts_average_coefficients_or_expected_responses(kind):
    design, b = experiment()
    law = KINDS[kind](design, b)
    family = family_of(law)
    natural = family.natural(law)
    reverse = family.from_natural(tuple(x.mean(0) for x in natural))
    # one scale for all draws: the Gaussian's natural parameter is then proportional to b
    torch.testing.assert_close(reverse.coefficients, b.mean(0))
    mean = tuple(x.mean(0) for x in family.mean(natural))
    forward = family.from_natural(family.from_mean(mean))
    torch.testing.assert_close(
        design.mT @ forward.mean, design.mT @ law.mean.mean(0), rtol=1e-12, atol=1e-12
    )


def test_forward_gaussian_act_adds_the_spread_of_the_fits_to_the_noise():
    design, b = experiment()
    law = GaussianRegression(design, b, torch.full((30,), 0.7, dtype=torch.float64))
    family = family_of(law)
    mean = tuple(x.mean(0) for x in family.mean(family.natural(law)))
    act = family.from_natural(family.from_mean(mean))
    spread = (law.mean - law.mean.mean(0)).square().mean()
    torch.testing.assert_close(act.scale.square(), 0.49 + spread)


def test_forward_act_of_counts_is_the_maximum_likelihood_of_the_expected_ones():
    design = torch.ones(4, 1, dtype=torch.float64)
    b = torch.tensor([[0.0], [2.0], [7.0]], dtype=torch.float64)
    family = family_of(PoissonRegression(design, b))
    (found,) = family.from_mean(tuple(x.mean(0) for x in family.mean((b,))))
    assert found.item() == pytest.approx(math.log(b.exp().mean()), rel=1e-13)


@pytest.mark.parametrize("size", [8.0, 30.0])
@pytest.mark.parametrize("law", [LogisticRegression, PoissonRegression])
def test_newton_finds_coefficients_far_from_its_start(law, size):
    design, _ = experiment()
    b = size * torch.tensor([0.3, -0.4, 0.5], dtype=torch.float64)
    family = family_of(law(design, b))
    (found,) = family.from_mean(family.mean((b,)))
    # Of coins that almost all fall alike, the expected falls hold fewer digits.
    torch.testing.assert_close(found, b, rtol=1e-7, atol=1e-9)


def test_coefficients_at_large_predictors_keep_their_digits():
    design, b = experiment()
    far = b + torch.tensor([1e8, 0.0, 0.0], dtype=torch.float64)
    scale = torch.full((30,), 0.7, dtype=torch.float64)
    law, near = GaussianRegression(design, far, scale), GaussianRegression(design, b, scale)
    family = family_of(law).about(GaussianRegression(design, far[0], scale[0]))
    plain = family_of(near)
    mean = tuple(x.mean(0) for x in family.mean(family.natural(law)))
    act = family.from_natural(family.from_mean(mean))
    mean = tuple(x.mean(0) for x in plain.mean(plain.natural(near)))
    expected = plain.from_natural(plain.from_mean(mean))
    torch.testing.assert_close(act.scale, expected.scale, rtol=1e-7, atol=0.0)
    p, q = family.natural(law), plain.natural(near)
    first = [tuple(x[:1] for x in natural) for natural in (p, q)]
    torch.testing.assert_close(
        family.kl(p, first[0]), plain.kl(q, first[1]), rtol=1e-6, atol=1e-10
    )


def test_designs_of_unequal_columns_lose_no_more_digits_than_their_condition():
    design, b = experiment()
    design[:, 2] = design[:, 1] + 1e-4 * design[:, 2]  # condition about 1e4
    law = GaussianRegression(design, b, torch.full((30,), 0.7, dtype=torch.float64))
    family = family_of(law)
    natural = family.natural(law)
    # X'X squares the condition, which the mean parameter holds: 1e8 of 1e-16.
    torch.testing.assert_close(
        family.from_mean(family.mean(natural)), natural, rtol=1e-6, atol=1e-5
    )


@every_regression
def test_columns_that_others_determine_are_refused_where_they_matter(kind):
    design, b = experiment()
    design[:, 2] = 2 * design[:, 1]
    family = family_of(KINDS[kind](design, b))
    natural = family.natural(KINDS[kind](design, b))
    assert family.kl(natural, tuple(x[:1] for x in natural)).isfinite().all()
    with pytest.raises(ValueError, match="design must tell its 3 coefficients apart; .* rank 2"):
        family.from_mean(family.mean(natural))


def test_means_of_separated_responses_are_refused():
    design, _ = experiment()
    family = family_of(LogisticRegression(design, torch.zeros(3, dtype=torch.float64)))
    separated = (design[:, 1] > 0).double()
    with pytest.raises(ValueError, match="edge of the means of a LogisticRegression"):
        family.from_mean((design.mT @ separated,))


def test_regressions_of_other_designs_are_other_families():
    design, b = experiment()
    assert family_of(PoissonRegression(design, b)) == family_of(PoissonRegression(design, b[0]))
    assert family_of(PoissonRegression(design, b)) != family_of(PoissonRegression(2 * design, b))


@pytest.mark.parametrize(
    ("design", "coefficients", "error", "message"),
    [
        (torch.ones(3), torch.ones(3), ValueError, r"design must be \[rows, columns\]"),
        (torch.ones(3, 2), torch.ones(3), ValueError, r"got \[3, 2\] and \[3\]"),
        (torch.ones(3, 2) * math.nan, torch.ones(2), ValueError, "design must be finite"),
        ([[1.0]], torch.ones(1), TypeError, "design must be a tensor"),
        (torch.ones(3, 2), torch.ones(2).long(), TypeError, "coefficients must hold floating"),
        (torch.ones(3, 2), torch.ones(2) * math.nan, ValueError, "coefficients"),
    ],
)
def test_regressions_refuse_what_they_cannot_be(design, coefficients, error, message):
    with pytest.raises(error, match=message):
        PoissonRegression(design, coefficients)


def test_gaussian_regression_refuses_a_scale_that_is_none():
    with pytest.raises(ValueError, match="scale"):
        GaussianRegression(torch.ones(3, 2), torch.ones(2), torch.tensor(-1.0))

import pytest
import torch
from torch.distributions import (
    Bernoulli,
    Categorical,
    Dirichlet,
    Gamma,
    Independent,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    Poisson,
)
from torch.distributions.transforms import SoftplusTransform

from rkl.bayes.solve.unconstrained import chart_of

DRAWS = 6


def draws(name, seed=0):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(DRAWS, *shape, generator=g, dtype=torch.float64)

    lower = normal(3, 3).tril(-1) + (normal(3) / 2).exp().diag_embed()
    covariance = lower @ lower.mT
    scale = covariance.diagonal(dim1=-2, dim2=-1).rsqrt()
    correlation = covariance * scale[..., None] * scale[..., None, :]
    return {
        "real": normal(2),
        "positive": normal(2).exp(),
        "simplex": normal(4).softmax(-1),
        "lower triangle": lower,
        "positive definite": covariance,
        "correlation": correlation,
        "its factor": torch.linalg.cholesky(correlation),
        "matrix": normal(3, 3),
    }[name]


FREE = {
    "real": 2,
    "positive": 2,
    "simplex": 3,
    "lower triangle": 9,
    "positive definite": 9,
    "correlation": 3,
    "its factor": 3,
    "matrix": 9,
}


@pytest.mark.parametrize("name", FREE)
def test_coordinates_lead_back_to_the_parameters(name):
    values = {name: draws(name)}
    chart = chart_of(values)
    coordinates = chart.coordinates(values)
    assert coordinates.shape == (DRAWS, FREE[name]) == (DRAWS, chart.size)
    torch.testing.assert_close(
        chart.point(coordinates)[name], values[name], rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("name", FREE)
def test_any_coordinates_make_parameters_of_the_same_kind(name):
    chart = chart_of({name: draws(name)})
    anywhere = torch.randn(5, chart.size, generator=torch.Generator().manual_seed(1)).double()
    again = chart_of({name: chart.point(anywhere)[name]})
    assert type(again.parts[name].transform) is type(chart.parts[name].transform)


def test_several_parameters_share_one_vector_in_their_order():
    values = {name: draws(name) for name in FREE}
    chart = chart_of(values)
    point = chart.point(chart.coordinates(values)[2])
    assert list(point) == list(FREE)
    for name, x in point.items():
        torch.testing.assert_close(x, values[name][2], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("law", "kind"),
    [
        (lambda t: Normal(t["x"], 1.0), "ComposeTransform"),
        (lambda t: Normal(0.0, t["x"]), "ExpTransform"),
        (lambda t: Normal(0.0, t["x"], validate_args=False), "ExpTransform"),
        (lambda t: Normal(0.0, t["x"].sqrt()), "ExpTransform"),
        (lambda t: Gamma(t["x"], 1.0, validate_args=False), "ExpTransform"),
        (lambda t: Bernoulli(t["x"]), "SigmoidTransform"),
        (lambda t: Bernoulli(logits=t["x"]), "ComposeTransform"),
        (
            lambda t: MixtureSameFamily(
                Categorical(torch.ones(len(t["x"]), 2), validate_args=False),
                Normal(torch.zeros(2), t["x"][:, None], validate_args=False),
                validate_args=False,
            ),
            "ExpTransform",
        ),
    ],
)
def test_a_parameter_ranges_as_widely_as_the_law_allows(law, kind):
    inside = torch.tensor([0.2, 0.4, 0.7], dtype=torch.float64)
    chart = chart_of({"x": inside}, law)
    assert type(chart.parts["x"].transform).__name__ == kind


@pytest.mark.parametrize(
    ("name", "law", "kind", "of_density"),
    [
        ("simplex", lambda t: Bernoulli(t["x"]), "SigmoidTransform", "LogRatioTransform"),
        (
            "simplex",
            lambda t: Independent(Poisson(t["x"]), 1),
            "ExpTransform",
            "LogRatioTransform",
        ),
        ("simplex", lambda t: Categorical(t["x"]), "LogRatioTransform", "LogRatioTransform"),
        ("simplex", lambda t: Dirichlet(9 * t["x"]), "LogRatioTransform", "LogRatioTransform"),
        (
            "correlation",
            lambda t: MultivariateNormal(torch.zeros(3).double(), t["x"]),
            "PositiveDefiniteTransform",
            "CorrelationTransform",
        ),
        (
            "its factor",
            lambda t: MultivariateNormal(torch.zeros(3).double(), scale_tril=t["x"]),
            "LowerCholeskyTransform",
            "CorrCholeskyTransform",
        ),
        (
            "correlation",
            lambda t: MultivariateNormal(torch.zeros(3).double(), 4 * t["x"]),
            "CorrelationTransform",
            "CorrelationTransform",
        ),
    ],
)
def test_a_parameter_as_it_is_ranges_as_the_distributions_let_it(name, law, kind, of_density):
    for posterior, transform in ((False, kind), (True, of_density)):
        chart = chart_of({"x": draws(name)}, law, posterior=posterior)
        assert type(chart.parts["x"].transform).__name__ == transform


def test_without_a_law_draws_of_one_sign_range_over_the_half_line():
    positive = torch.tensor([0.2, 0.4], dtype=torch.float64)
    assert type(chart_of({"x": positive}).parts["x"].transform).__name__ == "ExpTransform"
    assert type(chart_of({"x": -positive}).parts["x"].transform).__name__ == "ComposeTransform"


def test_permuting_the_classes_of_a_simplex_keeps_all_distances_between_coordinates():
    values = draws("simplex")
    orders = torch.rand(DRAWS, 4, generator=torch.Generator().manual_seed(1)).argsort(-1)
    permuted = values.gather(-1, orders)  # another permutation for every draw
    one, other = (chart_of({"w": w}) for w in (values, permuted))
    assert one.parts["w"].spread == pytest.approx(other.parts["w"].spread, rel=1e-12)
    same = values[:, torch.tensor([2, 0, 3, 1])]  # the same one
    apart = [torch.cdist(x, x) for x in (one.coordinates({"w": w}) for w in (values, same))]
    torch.testing.assert_close(*apart)


def test_a_transform_of_ones_own_is_used():
    chart = chart_of({"x": draws("positive")}, transforms={"x": SoftplusTransform()})
    assert chart.parts["x"].transform == SoftplusTransform()


def test_whole_numbers_and_draws_on_the_edge_are_refused():
    with pytest.raises(ValueError, match="count must hold real numbers .* got torch.int64"):
        chart_of({"count": torch.arange(4)})
    edge = torch.tensor([[1.0, 0.0], [0.5, 0.5]], dtype=torch.float64)
    positive = {"w": SoftplusTransform()}
    with pytest.raises(ValueError, match="w must lie inside its domain"):
        chart_of({"w": edge}, transforms=positive)

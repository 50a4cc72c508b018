"""Numbers that the reported distribution does not depend on have no estimate to show."""

import json

import numpy as np
import pytest
import torch
from torch.distributions import (
    Bernoulli,
    Categorical,
    Distribution,
    Independent,
    Laplace,
    MixtureSameFamily,
    Normal,
    StudentT,
    constraints,
)
from torch.distributions.transforms import ExpTransform

from rkl.bayes import (
    EstimateSettings,
    EvaluateSettings,
    bayes_act,
    check_invariance,
    compare_runs,
    evaluate_run,
    load_run,
    project,
)
from rkl.bayes.run import estimate as estimate_run
from rkl.divergences import KL, ReverseKL
from rkl.importing import only

random = np.random.default_rng(0)
X = np.column_stack([np.ones(12), np.linspace(-1, 1, 12)])
DRAWS = {
    "mu": 1 + 0.2 * random.normal(size=(2, 100)),
    "sigma": np.exp(0.1 * random.normal(size=(2, 100))),
    "tau": 3 + random.normal(size=(2, 100)),
    "beta": np.array([1.5, 0.5]) + 0.2 * random.normal(size=(2, 100, 2)),
}


def ordinary(theta):
    return Normal(theta.mu + 0 * theta.tau, theta.sigma)


def heavy(theta):
    _ = theta.tau
    return StudentT(5.0, theta.mu, theta.sigma)


class Careless(Distribution):
    """A normal distribution that keeps a parameter which it does not use."""

    arg_constraints = {"loc": constraints.real, "extra": constraints.real}
    support = constraints.real

    def __init__(self, loc, extra):
        self.loc, self.extra = loc, extra
        super().__init__(loc.shape, validate_args=False)

    def log_prob(self, value):
        return Normal(self.loc, 1.0).log_prob(value)

    def sample(self, sample_shape=()):
        return Normal(self.loc, 1.0).sample(sample_shape)


@pytest.mark.parametrize(
    ("family", "loss"), [(ordinary, ReverseKL()), (ordinary, KL()), (heavy, ReverseKL())]
)
def test_an_unused_variable_has_no_estimate_and_changes_no_other(family, loss):
    estimate = bayes_act(DRAWS, family, loss)
    alone = bayes_act(
        DRAWS,
        "normal(loc=mu, scale=sigma)"
        if family is ordinary
        else "student-t(df=5, loc=mu, scale=sigma)",
        loss,
    )
    assert estimate.act["tau"].isnan()
    assert estimate.act.error["tau"].isnan()
    for name in ("mu", "sigma"):
        torch.testing.assert_close(estimate.act[name], alone.act[name], rtol=1e-6, atol=1e-6)
    assert [row[0] for row in estimate.table().rows] == ["mu", "sigma", "risk (nats)"]
    assert "tau is not used by the family" in str(estimate)
    assert "tau" not in repr(estimate)
    region = estimate.region(0.9)
    assert list(region.pieces) == ["mu", "sigma"]
    inside = {"mu": alone.act["mu"], "sigma": alone.act["sigma"]}
    assert region.contains(inside)
    assert region.contains(inside | {"tau": 99.0})


def test_a_comparison_has_no_column_of_what_no_act_depends_on():
    table = bayes_act(DRAWS, ordinary).compare(losses=[KL()])
    assert [*table.columns][:3] == ["estimate", "mu", "sigma"]
    assert all(
        error >= 0
        for row in table.rows
        for cell in row
        if isinstance(cell, tuple)
        for error in cell[1:]
    )
    assert table.acts["reverse KL"]["tau"].isnan()
    assert any("tau is not used" in note for note in table.notes)


def test_elements_that_no_member_uses_are_left_out():
    def first(theta):
        return Normal(theta.beta[:, :1] * torch.ones(3), theta.sigma[:, None])

    estimate = bayes_act(DRAWS, first)
    alone = bayes_act(
        {"b": DRAWS["beta"][..., 0], "sigma": DRAWS["sigma"]}, "normal(loc=b, scale=sigma)"
    )
    torch.testing.assert_close(estimate.act["beta"][0], alone.act["b"])
    assert estimate.act["beta"][1].isnan()
    assert [row[0] for row in estimate.table().rows][:2] == ["sigma", "beta[0]"]
    assert "beta[1] is not used by the family" in str(estimate)


def test_a_submodel_shows_no_coefficient_that_it_does_not_use():
    family = "gaussian-regression(coefficients=beta, scale=sigma)"

    def intercept(theta, design):
        return Independent(Normal(theta.beta[:, :1] * design[:, 0], theta.sigma[:, None]), 1)

    for loss in (ReverseKL(), KL()):
        found = project(DRAWS, family, {"function": intercept, "columns": [0]}, loss, design=X)
        function, columns = (found.submodels[name] for name in ("function", "columns"))
        torch.testing.assert_close(
            function.act["beta"][0], columns.act["beta"][0], rtol=1e-5, atol=0
        )
        torch.testing.assert_close(function.excess.value, columns.excess.value, rtol=1e-5, atol=0)
        assert function.act["beta"][1].isnan()
        assert columns.act["beta"][1] == 0
        row = next(row for row in found.table.rows if row[0] == "function")
        assert "beta[0] = " in row[3]
        assert "beta[1]" not in row[3]
        assert any("beta[1] is not used" in note for note in found.table.notes)
        json.dumps(found.to_dict())


def test_a_column_of_zeros_leaves_its_coefficient_without_estimate():
    design = np.column_stack([X[:, 0], np.zeros(12)])
    estimate = bayes_act(
        DRAWS, "gaussian-regression(coefficients=beta, scale=sigma)", design=design
    )
    assert estimate.act["beta"][1].isnan()
    assert estimate.act["beta"][0].isfinite()


def test_equal_columns_give_coefficients_that_only_their_sum_matters_of():
    design = np.ones((12, 2))
    estimate = bayes_act(
        DRAWS, "gaussian-regression(coefficients=beta, scale=sigma)", design=design
    )
    assert estimate.act.error["beta"].isnan().all()
    assert estimate.act["beta"].isfinite().all()
    assert estimate.act.error["sigma"].isfinite()
    assert any("combinations" in text for text in estimate.diagnostics.warnings)


@pytest.mark.parametrize("kind", [Normal, Laplace])
def test_two_numbers_that_enter_as_a_sum_have_no_errors_of_their_own(kind):
    estimate = bayes_act(DRAWS, lambda t: kind(t.mu + t.tau, t.sigma))
    total = bayes_act(
        DRAWS | {"sum": DRAWS["mu"] + DRAWS["tau"]}, f"{kind.__name__}(loc=sum, scale=sigma)"
    )
    torch.testing.assert_close(
        estimate.act["mu"] + estimate.act["tau"], total.act["sum"], rtol=1e-5, atol=1e-5
    )
    assert estimate.act.error["mu"].isnan()
    assert estimate.act.error["tau"].isnan()
    assert estimate.act.error["sigma"].isfinite()
    assert any(
        "mu, tau: the distribution depends on comb" in t for t in estimate.diagnostics.warnings
    )


def test_what_matters_only_elsewhere_has_no_estimate_where_it_does_not():
    drawn = DRAWS | {"switch": 1 + 0.1 * random.normal(size=(2, 100))}

    def switched(theta):
        loc = torch.where(theta.switch > 0, theta.mu, theta.tau)
        return Normal(loc, theta.sigma)

    estimate = bayes_act(drawn, switched)
    assert estimate.act["tau"].isnan()
    assert estimate.act["mu"].isfinite()


def test_a_parameter_that_a_class_keeps_and_does_not_use_has_no_estimate():
    estimate = bayes_act(DRAWS, lambda t: Careless(t.mu, t.tau), KL())
    assert estimate.act["tau"].isnan()
    assert estimate.act["mu"].isfinite()


@pytest.mark.parametrize("loss", [ReverseKL(), KL()])
def test_a_number_that_counts_alone_keeps_its_error_beside_unused_ones(loss):
    shares = random.dirichlet([3, 4, 5], size=(2, 100))
    estimate = bayes_act({"p": shares}, lambda t: Bernoulli(t.p[:, 0]), loss)
    alone = bayes_act({"p": shares[..., 0]}, "bernoulli(probs=p)", loss)
    torch.testing.assert_close(estimate.act["p"][0], alone.act["p"], rtol=0, atol=1e-6)
    torch.testing.assert_close(estimate.act.error["p"][0], alone.act.error["p"], rtol=1e-3, atol=0)
    assert estimate.act["p"][1:].isnan().all()
    assert not any("combinations" in text for text in estimate.diagnostics.warnings)


def test_a_component_without_weight_has_no_estimate_and_many_are_not_all_listed():
    def mixture(theta):
        weight = torch.tensor([1.0, 0.0]).double().expand(len(theta.mu), 2)
        return MixtureSameFamily(
            Categorical(weight), Normal(torch.stack([theta.mu, theta.tau], -1), 1.0)
        )

    estimate = bayes_act(DRAWS, mixture)
    assert estimate.act["tau"].isnan()
    assert estimate.act.error["mu"].isfinite()
    many = {"x": random.normal(size=(2, 50, 40))}
    text = bayes_act(many, lambda t: Normal(t.x[:, ::2], 1.0)).diagnostics.warnings[-1]
    assert "x[1], x[3]" in text
    assert "12 more are not used" in text


def test_rare_components_and_whole_numbers_count_as_used():
    def mixture(theta):
        weight = torch.tensor([1 - 1e-7, 1e-7]).double().expand(len(theta.mu), 2)
        loc = torch.stack([theta.mu, 30 + theta.tau], -1)
        return MixtureSameFamily(Categorical(weight), Normal(loc, 1.0))

    assert bayes_act(DRAWS, mixture).act["tau"].isfinite()
    rounded = bayes_act(DRAWS, lambda t: Normal(t.mu + t.tau.round(), t.sigma), KL())
    assert rounded.act["tau"].isfinite()
    assert rounded.act["mu"].isfinite()


def test_an_unused_variable_does_not_move_under_other_names():
    table = check_invariance(bayes_act(DRAWS, ordinary), {"sigma": ExpTransform().inv})
    assert table.rows[0][1] < 1e-6


def test_runs_of_an_unused_variable_compare_load_and_evaluate(tmp_path):
    path = tmp_path / "draws.npz"
    np.savez(path, **DRAWS)
    family = "tests.bayes.test_identified:ordinary"
    with only([family], source="a test"):
        for name, loss in (("a", "reverse-kl"), ("b", "kl")):
            estimate_run(EstimateSettings(path, family, loss, losses=("kl",)), tmp_path / name)
    kept = json.loads((tmp_path / "a" / "estimate.json").read_text())["estimate"]
    assert kept["act"]["tau"]["value"] is None
    assert kept["unused"] == {"tau": True}
    text = compare_runs([tmp_path / "a", tmp_path / "b"])
    assert not any(line.startswith("tau ") for line in text.splitlines())
    assert "tau not used by the family" in text
    assert load_run(tmp_path / "a", allow=[family]).act["tau"].isnan()
    table = evaluate_run(tmp_path / "a", EvaluateSettings(path), allow=[family])
    assert "tau" not in table.columns
    assert abs(table.rows[0][-1][0]) < 1e-10

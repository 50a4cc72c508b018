"""Coefficients that are variables of their own, and offsets, exposures and trials by name."""

import functools

import numpy as np
import pandas
import pytest
import torch

from rkl import cli
from rkl.bayes import LogisticRegression, PoissonRegression, bayes_act, project
from rkl.divergences import KL, ReverseKL

ROWS = 20
random = np.random.default_rng(0)
X = np.column_stack([np.ones(ROWS), random.normal(size=(2, ROWS)).T])
EXPOSURE = random.uniform(1, 50, ROWS)
TRIALS = random.integers(1, 20, ROWS).astype(float)
BETA = np.array([0.3, 0.5, -0.4]) + 0.1 * random.normal(size=(2, 100, 3))
DRAWS = {
    "beta": BETA,
    "Intercept": BETA[..., 0],
    "x1": BETA[..., 1],
    "x2": BETA[..., 2],
    "slopes": BETA[..., 1:],
    "sigma": np.exp(0.1 * random.normal(size=(2, 100))),
}
NAMES = ["one", "first", "second"]
FRAME = pandas.DataFrame(X, columns=NAMES)
WIDER = FRAME.assign(E=EXPOSURE, log_E=np.log(EXPOSURE), n=TRIALS)


def coefficients(act):
    return torch.stack([act["Intercept"], act["x1"], act["x2"]])


@pytest.mark.parametrize("loss", [ReverseKL(), KL()])
@pytest.mark.parametrize("text", ["[Intercept, x1, x2]", "stack(Intercept, x1, 'x2')"])
def test_scalars_in_a_list_are_the_vector_that_they_make(text, loss):
    family = "gaussian-regression(coefficients={}, scale=sigma)"
    vector = bayes_act(DRAWS, family.format("beta"), loss, design=X)
    scalars = bayes_act(DRAWS, family.format(text), loss, design=X)
    torch.testing.assert_close(coefficients(scalars.act), vector.act["beta"], rtol=0, atol=1e-7)
    torch.testing.assert_close(scalars.risk.value, vector.risk.value, rtol=1e-9, atol=0)
    for i, name in enumerate(("Intercept", "x1", "x2")):
        expected = vector.act.error["beta"][i]
        torch.testing.assert_close(scalars.act.error[name], expected, rtol=1e-3, atol=0)
    assert [row[0] for row in scalars.table().rows][:3] == ["Intercept", "x1", "x2"]


def test_a_list_may_hold_vectors_and_numbers():
    family = "poisson-regression(coefficients=[Intercept, slopes])"
    mixed = bayes_act(DRAWS, family, design=X).act
    found = torch.cat([mixed["Intercept"][None], mixed["slopes"]])
    torch.testing.assert_close(found, torch.tensor(BETA).mean((0, 1)), rtol=0, atol=1e-7)
    logits = bayes_act(DRAWS, "categorical(logits=[0, x1, x2])").act
    torch.testing.assert_close(logits["x1"], torch.tensor(BETA[..., 1]).mean(), rtol=0, atol=1e-7)


def test_submodels_by_columns_of_separate_variables_have_zeros_for_those_left_out():
    for loss in (ReverseKL(), KL()):
        vector = project(
            DRAWS, "poisson-regression(coefficients=beta)", {"two": [0, 1]}, loss, design=X
        )
        scalars = project(
            DRAWS,
            "poisson-regression(coefficients=[Intercept, x1, x2])",
            {"two": ["Intercept", "x1"], "by the design": ["one", "first"]},
            loss,
            design=FRAME,
        )
        expected = vector.submodels["two"]
        for found in scalars.submodels.values():
            torch.testing.assert_close(
                coefficients(found.act), expected.act["beta"], rtol=0, atol=1e-6
            )
            torch.testing.assert_close(
                found.excess.value, expected.excess.value, rtol=1e-6, atol=0
            )
            assert found.act["x2"] == 0


def poisson_risk(act, offset):
    """E KL(P_act ‖ P_θ) of Poisson rows, by its formula."""
    own, drawn = X @ act + offset, BETA.reshape(-1, 3) @ X.T + offset
    return (np.exp(own) * (own - drawn) - np.exp(own) + np.exp(drawn)).sum(-1).mean()


@pytest.mark.parametrize(
    ("text", "columns"),
    [("offset=log_E", [*NAMES, "log_E"]), ("exposure=E", ["one", "E", "first", "second"])],
)
def test_an_exposure_weighs_the_rows_of_a_poisson_regression(text, columns):
    family = f"poisson-regression(coefficients=beta, {text})"
    reverse = bayes_act(DRAWS, family, design=WIDER[columns])
    act = BETA.mean((0, 1))  # the natural parameter is that of any offset
    np.testing.assert_allclose(reverse.act["beta"], act, atol=1e-12)
    np.testing.assert_allclose(reverse.risk.value, poisson_risk(act, np.log(EXPOSURE)), rtol=1e-9)
    forward = bayes_act(DRAWS, family, KL(), design=WIDER[columns]).act["beta"].numpy()
    expected = X.T @ (EXPOSURE * np.exp(BETA.reshape(-1, 3) @ X.T).mean(0))
    np.testing.assert_allclose(X.T @ (EXPOSURE * np.exp(X @ forward)), expected, rtol=1e-9)
    without = bayes_act(DRAWS, "poisson-regression(coefficients=beta)", KL(), design=X)
    assert np.abs(without.act["beta"].numpy() - forward).max() > 1e-4


@pytest.mark.parametrize("name", ["trials", "n"])
def test_trials_weigh_the_rows_of_a_logistic_regression(name):
    family = f"binomial-regression(coefficients=beta, {name}=n)"
    design = {**dict(zip(NAMES, X.T, strict=True)), "n": TRIALS}
    forward = bayes_act(DRAWS, family, KL(), design=design)

    def mean(predictor):
        return TRIALS / (1 + np.exp(-predictor))

    found = X.T @ mean(X @ forward.act["beta"].numpy())
    np.testing.assert_allclose(found, X.T @ mean(BETA.reshape(-1, 3) @ X.T).mean(0), rtol=1e-9)
    assert forward.act.distribution.support.check(torch.tensor(TRIALS)).all()


def test_exposures_go_with_columns_of_submodels_and_with_functions():
    family = "poisson-regression(coefficients=beta, exposure=E)"

    def intercept(theta, design):
        logs = theta.beta[:, :1] + torch.tensor(np.log(EXPOSURE))
        return torch.distributions.Independent(torch.distributions.Poisson(logs.exp()), 1)

    submodels = {"columns": ["one"], "function": intercept}
    found = project(DRAWS, family, submodels, KL(), design=WIDER[[*NAMES, "E"]])
    columns, function = found.submodels["columns"], found.submodels["function"]
    torch.testing.assert_close(columns.act["beta"][0], function.act["beta"][0], rtol=0, atol=1e-6)
    # the mean of the total is that of the posterior
    rates = EXPOSURE * np.exp(BETA.reshape(-1, 3) @ X.T)
    expected = np.log(rates.sum(1).mean() / EXPOSURE.sum())
    np.testing.assert_allclose(columns.act["beta"][0], expected, atol=1e-7)


def test_classes_take_offsets_and_trials_as_numbers():
    law = functools.partial(PoissonRegression, exposure=EXPOSURE)
    by_class = bayes_act({"coefficients": BETA}, law, KL(), design=X)
    by_name = bayes_act(
        DRAWS,
        "poisson-regression(coefficients=beta, exposure=E)",
        KL(),
        design=WIDER[[*NAMES, "E"]],
    )
    torch.testing.assert_close(by_class.act["coefficients"], by_name.act["beta"])
    expanded = LogisticRegression(torch.tensor(X), torch.tensor(BETA[0, 0]), trials=TRIALS)
    y = expanded.sample()
    torch.testing.assert_close(expanded.expand((3,)).log_prob(y), expanded.log_prob(y).expand(3))


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("poisson-regression(coefficients=beta, offset=x1)", "offset must be a column of the des"),
        ("poisson-regression(coefficients=beta, exposure=bad)", "exposure must be positive"),
        ("logistic-regression(coefficients=beta, trials=bad)", "trials must be whole numbers"),
        ("normal(loc=[x1, x2], scale=sigma)", "makes a vector, which loc is not"),
        ("poisson-regression(coefficients=[x1, 1 / x2])", "in each place; got 1 / x2"),
        ("poisson-regression(coefficients=[x1, x9])", "got x9"),
        ("categorical(probs=[x1, x2])", "must be one variable of the posterior"),
    ],
)
def test_what_is_no_column_and_no_vector_is_refused(family, message):
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        bayes_act(DRAWS, family, design=FRAME.assign(bad=FRAME["first"] - 0.5))


def test_the_command_takes_names_of_the_design(tmp_path, capsys):
    np.savez(tmp_path / "draws.npz", **{k: DRAWS[k] for k in ("Intercept", "x1", "x2", "beta")})
    WIDER[[*NAMES, "E"]].to_csv(tmp_path / "design.csv", index=False)
    words = ["estimate", str(tmp_path / "draws.npz"), "--design", str(tmp_path / "design.csv")]
    words += ["--losses", "kl", "--family"]
    family = "poisson-regression(coefficients=[Intercept, x1, x2], exposure=E)"
    assert cli.main([*words, family]) == 0
    printed = capsys.readouterr().out
    assert "Intercept" in printed
    assert "x2" in printed
    assert cli.main([*words, "poisson-regression(coefficients=beta, exposure=E)"]) == 0
    assert "beta[second]" in capsys.readouterr().out

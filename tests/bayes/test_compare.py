"""The act beside other estimates: what each is, and what each loses under every loss."""

import math
from typing import Any

import pandas
import pytest
import torch
from torch.distributions import Independent, Normal, Poisson

from rkl.bayes import Intrinsic, bayes_act, compare, read_draws
from rkl.bayes.compare import excess_over
from rkl.bayes.diagnostics import mean_of
from rkl.bayes.loss.expected import expected_seconds
from rkl.bayes.tables import Table
from rkl.divergences import KL, Jeffreys, JensenShannon, ReverseKL, SquaredHellinger

ORDINARY = "normal(loc=mu, scale=sigma)"
ROWS = ["reverse KL", "forward KL", "Jeffreys", "Jensen–Shannon", "intrinsic"]
COUNT, MEAN, SCATTER = 10, 0.3, 18.0


def log_posterior(theta):
    """Of a normal sample of COUNT under the prior 1/sigma, up to a constant."""
    squares = SCATTER + COUNT * (theta["mu"] - MEAN).square()
    return -(COUNT + 1) * theta["sigma"].log() - squares / (2 * theta["sigma"].square())


@pytest.fixture(scope="module")
def draws():
    torch.manual_seed(0)
    half = torch.tensor([(COUNT - 1) / 2, SCATTER / 2], dtype=torch.float64)
    variance = 1 / torch.distributions.Gamma(half[0], half[1]).sample(torch.Size([4, 250]))
    mu = MEAN + torch.randn(4, 250, dtype=torch.float64) * (variance / COUNT).sqrt()
    drawn = {"mu": mu, "sigma": variance.sqrt()}
    return drawn | {"lp": log_posterior(drawn), "elsewhere": mu.square()}


@pytest.fixture(scope="module")
def table(draws):
    return bayes_act(draws, ORDINARY).compare(log_posterior)


@pytest.fixture
def quick(monkeypatch):
    """Only what has a closed form, where the rest is not what is asked about."""
    monkeypatch.setattr(compare, "LOSSES", {name: compare.LOSSES[name] for name in ROWS[:2]})


def column(table, name):
    place = list(table.columns).index(f"excess {name} (nats)")
    return {row[0]: row[place] for row in table.rows}


def law(act):
    return Normal(act["mu"], act["sigma"])


@pytest.mark.parametrize(
    ("name", "divergence"),
    [("reverse KL", ReverseKL()), ("forward KL", KL()), ("Jeffreys", Jeffreys())],
)
def test_excess_risks_under_both_kls_are_those_of_brute_force(draws, table, name, divergence):
    posterior = Normal(draws["mu"], draws["sigma"])
    risks = {k: divergence.between(posterior, law(act)).mean() for k, act in table.acts.items()}
    found = column(table, name)
    assert found.keys() == risks.keys()
    for row, (value, _) in found.items():
        assert value == pytest.approx((risks[row] - risks[name]).item(), abs=1e-10)


@pytest.mark.parametrize(
    ("name", "divergence"),
    [("reverse KL", ReverseKL()), ("forward KL", KL()), ("Jeffreys", Jeffreys())],
)
def test_excesses_under_both_kls_have_the_errors_of_paired_differences(
    draws, table, name, divergence
):
    posterior = Normal(draws["mu"], draws["sigma"])
    least = divergence.between(posterior, law(table.acts[name]))
    found = column(table, name)
    for row in ("posterior mean", "posterior median"):
        paired = divergence.between(posterior, law(table.acts[row])) - least
        error = mean_of(paired, read_draws(draws)).error.item()
        assert found[row][1] == pytest.approx(error, rel=0.02)


@pytest.mark.statistical
def test_errors_of_excesses_are_the_spread_over_replications():
    generator = torch.Generator().manual_seed(0)
    values, errors = [], []
    for _ in range(40):
        sigma = (0.1 * torch.randn(4, 250, generator=generator, dtype=torch.float64)).exp()
        estimate = bayes_act({"sigma": sigma}, "normal(loc=0, scale=sigma)")
        excess: Any = excess_over(estimate)
        value, error = excess({"sigma": torch.ones((), dtype=torch.float64)})
        values.append(value.item())
        errors.append(error.item())
    spread = torch.tensor(values).std()
    # a standard deviation of 40 has a relative error of 1 / sqrt(78), here three of them
    assert spread == pytest.approx(sum(errors) / len(errors), rel=0.35)


def test_excess_risks_elsewhere_are_paired_and_smaller_than_their_parts(draws, table):
    intrinsic = Intrinsic()
    posterior = Normal(draws["mu"], draws["sigma"])
    losses = {k: intrinsic.between(posterior, law(act)) for k, act in table.acts.items()}
    for row, (value, error) in column(table, "intrinsic").items():
        gap = losses[row] - losses["intrinsic"]
        assert value == pytest.approx(gap.mean().item(), abs=1e-10)
        # the draws are independent, so that the paired error is that of a mean
        plain = gap.std().item() / math.sqrt(gap.numel())
        assert error == pytest.approx(plain, rel=0.5, abs=1e-12)
        apart = math.hypot(*(x.std().item() for x in (losses[row], losses["intrinsic"])))
        assert error < 0.6 * apart / math.sqrt(gap.numel())


def test_the_jensen_shannon_excess_is_that_of_sums_over_a_fine_grid(draws, table):
    x = torch.linspace(-25, 25, 2001, dtype=torch.float64)
    logp = Normal(draws["mu"].flatten()[:, None], draws["sigma"].flatten()[:, None]).log_prob(x)

    def risk(act):
        logq = law(act).log_prob(x)
        mixed = torch.logaddexp(logp, logq) - math.log(2)
        terms = logp.exp() * (logp - mixed) + logq.exp() * (logq - mixed)
        return (terms / 2).sum(-1).mean().item() * 0.025

    for row, (value, _) in column(table, "Jensen–Shannon").items():
        wanted = risk(table.acts[row]) - risk(table.acts["Jensen–Shannon"])
        assert value == pytest.approx(wanted, abs=1e-8)


def test_each_act_is_best_under_its_own_loss(table):
    for name in ROWS:
        excess = {k: v if isinstance(v, float) else v[0] for k, v in column(table, name).items()}
        assert excess.pop(name) == 0
        assert min(excess.values()) > 0


def test_the_modes_are_those_of_calculus(table):
    scales = {name: act["sigma"].item() for name, act in table.acts.items()}
    wanted = {"MAP in mu, sigma": COUNT + 1, "MAP in mu, log sigma": COUNT}
    wanted["Wallace–Freeman"] = COUNT - 1  # log det of the information is −4 log sigma
    for name, freedom in wanted.items():
        assert scales[name] == pytest.approx(math.sqrt(SCATTER / freedom), rel=1e-9)
        assert table.acts[name]["mu"].item() == pytest.approx(MEAN, rel=1e-9)


def test_mean_and_median_are_theirs(draws, table):
    torch.testing.assert_close(table.acts["posterior mean"]["sigma"], draws["sigma"].mean())
    half = draws["sigma"].flatten().quantile(0.5)
    torch.testing.assert_close(table.acts["posterior median"]["sigma"], half)


def test_medians_of_more_numbers_than_the_quantiles_of_torch_take_are_theirs():
    theta = torch.tensor([5.0, 1.0, 2.0, 3.0])[:, None] + torch.arange(2**22 + 1) / 2**22
    medians = compare._medians({"mu": theta[..., None]}, None)
    torch.testing.assert_close(medians["mu"], theta[2:].mean(0)[:, None])


def test_the_mode_of_a_vector_does_not_depend_on_the_units_of_its_elements():
    centre, spread = (torch.tensor(x).double() for x in ([1e5, 1e-3], [1e3, 1e-5]))
    noise = torch.randn(2, 50, 2, generator=torch.Generator().manual_seed(0)).double()

    def log_posterior(theta):
        return -((theta.beta - centre) / spread).square().sum(-1) / 2

    estimate = bayes_act(
        {"beta": centre + spread * noise}, lambda t: Independent(Normal(t.beta, spread), 1)
    )
    acts = estimate.compare(log_posterior, losses=[ReverseKL()]).acts
    # coordinates have one centre, 5e4, of which rounding is 1e-11, 1e-6 of the smaller spread
    assert ((acts["MAP in beta"]["beta"] - centre) / spread).abs().max() < 1e-5


def test_without_a_density_the_modes_are_left_out_with_the_reason(quick, draws):
    few = {name: x[:, :60] for name, x in draws.items()}
    table = bayes_act(few, ORDINARY).compare()
    assert [row[0] for row in table.rows] == [*ROWS[:2], "posterior mean", "posterior median"]
    assert any("left out: they need log_posterior=" in note for note in table.notes)


def test_of_a_variable_the_densest_draws_are_shown_as_what_they_are(quick, draws):
    few = {name: x[:, :60] for name, x in draws.items()}
    table = bayes_act(few, ORDINARY).compare("lp")
    best = few["lp"].argmax()
    found = table.acts["draw of highest lp"]["sigma"]
    assert found == few["sigma"].flatten()[best]
    assert [name for name in table.acts if "highest" in name] == ["draw of highest lp"]
    assert any("unconstrained" in note for note in table.notes)
    assert "Wallace–Freeman" not in table.acts


def test_a_density_without_slopes_is_served_by_its_densest_draws(quick, draws):
    few = {name: x[:, :60] for name, x in draws.items()}
    table = bayes_act(few, ORDINARY).compare(lambda theta: log_posterior(theta).detach())
    assert "draw of highest log_posterior" in table.acts
    assert any("not differentiable" in note for note in table.notes)


def test_of_many_draws_too_the_densest_is_the_densest_of_all(quick):
    mu = torch.rand(2, 3000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    peak = mu[1, 1001].item()
    table = bayes_act({"mu": mu}, "normal(loc=mu, scale=1)").compare(
        lambda theta: -(theta.mu.detach() - peak).abs()
    )
    assert table.acts["draw of highest log_posterior"]["mu"] == peak


def test_a_location_whose_draws_are_all_positive_keeps_its_coordinate_in_the_modes(quick, draws):
    few = {name: draws[name][:, :60] + 5.0 * (name == "mu") for name in ("mu", "sigma")}

    def moved(theta):
        return log_posterior({"mu": theta.mu - 5, "sigma": theta.sigma})

    table = bayes_act(few, ORDINARY).compare(moved)
    assert [name for name in table.acts if "MAP" in name] == [
        "MAP in mu, sigma",
        "MAP in mu, log sigma",
    ]
    assert table.acts["MAP in mu, sigma"]["mu"].item() == pytest.approx(5 + MEAN, rel=1e-9)


@pytest.mark.slow
def test_what_takes_a_sample_of_joint_laws_is_left_out_until_it_is_asked_for():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 60, 3, generator=generator, dtype=torch.float64)
    drawn = {"beta": noise[..., :2], "sigma": (0.1 * noise[..., 2]).exp()}
    family = "gaussian-regression(coefficients=beta, scale=sigma)"
    design = torch.linspace(-1, 1, 6, dtype=torch.float64)[:, None] ** torch.arange(2)
    estimate = bayes_act(drawn, family, design=design)
    table = estimate.compare()
    assert "Jensen–Shannon" not in table.acts
    assert any("Jensen–Shannon is left out" in n and "losses=" in n for n in table.notes)
    asked = estimate.compare(losses=[JensenShannon(), SquaredHellinger()])
    assert list(asked.acts)[:3] == ["Jensen–Shannon", "SquaredHellinger()", "reverse KL"]
    assert column(asked, "Jensen–Shannon")["Jensen–Shannon"] == (0, 0)


@pytest.mark.parametrize("losses", ["js", [JensenShannon], 3])
def test_losses_are_values_and_the_message_says_which(quick, draws, losses):
    few = {name: x[:, :15] for name, x in draws.items()}
    with pytest.raises(TypeError, match="JensenShannon"):
        bayes_act(few, ORDINARY).compare(losses=losses)


def test_excesses_that_are_rounding_alone_are_shown_as_none(quick):
    generator = torch.Generator().manual_seed(0)
    same = torch.rand(2, 40, generator=generator, dtype=torch.float64) + 1
    table = bayes_act({"rate": same}, Poisson).compare()
    # of a Poisson law the forward act is the posterior mean, and the excess a sum of rounding
    assert column(table, "forward KL")["posterior mean"] == (0, 0)


def test_of_a_paired_excess_that_is_rounding_the_error_is_none_too(draws):
    batch = {"mu": torch.stack([draws["mu"][:, :60]] * 2, -1)}
    estimate = bayes_act(batch, "normal(loc=mu, scale=10)")
    found = column(estimate.compare(losses=[Intrinsic()]), "intrinsic")
    # with one scale for all, both KLs have one act, and so has the smaller of them
    assert found["posterior mean [0]"] == (0, 0)


def test_an_act_that_does_not_exist_is_left_out_with_the_reason(quick):
    torch.manual_seed(0)
    half = torch.tensor([0.45, 0.5], dtype=torch.float64)
    scale = torch.distributions.Gamma(half[0], half[1]).sample(torch.Size([4, 500])).rsqrt()
    table = bayes_act({"sigma": scale}, "normal(loc=0, scale=sigma)").compare()
    assert "forward KL" not in table.acts
    assert any("forward KL is left out" in note and "E x²" in note for note in table.notes)
    assert "excess forward KL (nats)" not in table.columns


def test_a_loss_of_ones_own_has_a_row_and_a_column(quick, draws):
    few = {name: x[:, :60] for name, x in draws.items()}
    estimate = bayes_act(few, ORDINARY, SquaredHellinger())
    table = estimate.compare()
    own: Any = column(table, "own")["own"]
    assert own[0] == 0
    assert table.acts["own"]["sigma"] == estimate.act["sigma"]


def test_a_batch_has_a_row_for_each_member(quick):
    generator = torch.Generator().manual_seed(0)
    rate = torch.rand(2, 40, 2, generator=generator, dtype=torch.float64) + 1
    table = bayes_act({"rate": rate}, Poisson).compare()
    rows = [row[0] for row in table.rows]
    assert rows.index("reverse KL [1]") == rows.index("posterior median [0]") + 1
    rates = [row[1] for row in table.rows if str(row[0]).startswith("reverse KL")]
    assert rates == pytest.approx(rate.log().mean((0, 1)).exp().tolist())


def test_what_would_take_long_is_left_out_with_its_time_until_it_is_asked_for(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    rate = torch.rand(2, 40, 3, generator=generator, dtype=torch.float64) + 1
    estimate = bayes_act({"rate": rate}, Poisson)
    monkeypatch.setattr(compare, "MAX_SECONDS", 1.0)
    table = estimate.compare()
    assert {"reverse KL", "forward KL", "Jeffreys"} <= table.acts.keys()
    assert "intrinsic" not in table.acts
    note = next(note for note in table.notes if note.startswith("intrinsic is left out"))
    assert "it would take some 2 s or more" in note
    assert "losses=[Intrinsic()]" in note
    assert "intrinsic" in estimate.compare(losses=[Intrinsic()]).acts


def test_a_hundred_rates_are_compared_without_what_would_take_minutes():
    generator = torch.Generator().manual_seed(0)
    rate = torch.rand(4, 1000, 100, generator=generator, dtype=torch.float64) + 1
    some = bayes_act({"rate": rate}, Poisson).problem.some
    for loss in (JensenShannon(), Intrinsic()):
        assert expected_seconds(some, loss, 4000) > 60


def test_a_joint_law_has_one_row_and_leaves_its_many_numbers_to_the_acts(quick):
    generator = torch.Generator().manual_seed(0)
    mu = torch.randn(2, 40, 9, generator=generator, dtype=torch.float64)
    estimate = bayes_act({"mu": mu}, lambda theta: Independent(Normal(theta.mu, 1.0), 1))
    log_posterior: Any = lambda theta: -theta.mu.square().sum(-1) / 2  # noqa: E731
    table = estimate.compare(log_posterior)
    assert {row[0] for row in table.rows} >= {"reverse KL", "MAP in mu"}
    assert table.columns[1].startswith("excess")
    assert table.acts["MAP in mu"]["mu"].abs().max() < 1e-9
    assert any("too many parameters" in note for note in table.notes)


@pytest.mark.parametrize(
    ("density", "error", "words"),
    [
        ("nothing", ValueError, "no variable 'nothing'; there are mu, sigma"),
        ("wide", ValueError, r"wide must be one log density a draw; got \[2\]"),
        (lambda theta: theta["mu"].sum(), ValueError, r"must give \d+ log densities.*got \[\]"),
        (lambda theta: theta["tau"], ValueError, "there are mu, sigma"),
        (3.0, TypeError, "log_posterior must be"),
    ],
)
def test_what_is_no_log_density_is_refused(quick, draws, density, error, words):
    few = {name: x[:, :15] for name, x in draws.items()}
    few["wide"] = torch.stack([few["mu"], few["mu"]], -1)
    with pytest.raises(error, match=words):
        bayes_act(few, ORDINARY).compare(density)


# Tables


def test_a_table_is_text_html_and_a_data_frame():
    rows = [("one", 0.5, (0.12345, 0.0042)), ("<two>", None, (12.3, 0.16))]
    table = Table("Two", ("name", "number", "mean"), rows, ("a note",))
    lines = str(table).splitlines()
    assert lines[0] == "Two"
    assert lines[3].split() == ["one", "0.5", "0.123(4)"]
    assert lines[-1] == "a note"
    assert "&lt;two&gt;" in table._repr_html_()
    frame = table.to_dataframe()
    assert isinstance(frame, pandas.DataFrame)
    assert frame["mean, error"].tolist() == [0.0042, 0.16]
    assert table.to_dict()["rows"][0] == ["one", 0.5, [0.12345, 0.0042]]


def test_jensen_and_shannon_have_the_estimate_of_the_default_table(draws, table):
    found = bayes_act(draws, ORDINARY, JensenShannon()).act["sigma"]
    assert table.acts["Jensen–Shannon"]["sigma"] == found

"""A simpler family's best member, and what it loses: closed forms, brute force and nesting."""

import json

import numpy as np
import pytest
import torch
from torch.distributions import (
    Exponential,
    ExpTransform,
    Gamma,
    Independent,
    Laplace,
    LogNormal,
    Normal,
    TransformedDistribution,
)
from torch.nn.functional import softplus

import rkl
from rkl.bayes.loss.between import Intrinsic
from rkl.bayes.projection import project

FULL = "normal(loc=mu, scale=sigma)"
CENTRED = "normal(loc=0, scale=sigma)"
DESIGN = torch.tensor(
    [[1, 0.3, -1.2], [1, -0.8, 0.4], [1, 1.5, 0.9], [1, 0.1, 2.0], [1, -1.1, -0.5], [1, 0.7, 0.2]],
    dtype=torch.float64,
)
COLUMNS = {"none": [0], "first": [0, 1], "last": [2, 0], "all": [0, 1, 2]}


def posterior(seed=0, draws=500, loc=0.7, batch=()):
    g = torch.Generator().manual_seed(seed)
    mu, log_sigma = torch.randn(2, 4, draws, *batch, generator=g, dtype=torch.float64)
    return {"mu": loc + 0.1 * mu, "sigma": (0.2 * log_sigma + 0.3).exp()}


def coefficients(seed=0, draws=300):
    g = torch.Generator().manual_seed(seed)
    beta = torch.randn(2, draws, 3, generator=g, dtype=torch.float64)
    sigma = (0.2 * torch.randn(2, draws, generator=g, dtype=torch.float64)).exp()
    centre = torch.tensor([0.2, -0.5, 0.4], dtype=torch.float64)
    return {"beta": centre + 0.3 * beta, "sigma": sigma}


def only(family, sub, draws, divergence, **settings):
    result = project(draws, family, {"sub": sub}, divergence, **settings)
    return result, result.submodels["sub"]


def descended(loss, start):
    """The least of a convex function, by torch's own optimiser: its value and where it is."""
    point = start.clone().requires_grad_()
    optimiser = torch.optim.LBFGS(
        [point],
        max_iter=500,
        line_search_fn="strong_wolfe",
        tolerance_grad=1e-12,
        tolerance_change=0,
    )

    def closure():
        optimiser.zero_grad()
        value = loss(point)
        value.backward()
        return value

    optimiser.step(closure)
    return loss(point).item(), point.detach()


def test_with_a_known_mean_the_precision_stays_the_posterior_mean_precision_under_reverse_kl():
    draws = posterior()
    result, sub = only(FULL, CENTRED, draws, rkl.ReverseKL())
    precision = draws["sigma"].pow(-2)
    loc = (draws["mu"] * precision).mean() / precision.mean()
    torch.testing.assert_close(sub.act["sigma"], precision.mean().rsqrt(), rtol=1e-10, atol=0)
    torch.testing.assert_close(
        sub.excess.value, loc.square() * precision.mean() / 2, rtol=1e-10, atol=0
    )
    torch.testing.assert_close(sub.risk.value, result.full.risk.value + sub.excess.value)
    assert sub.act.distribution.loc == 0
    assert sub.method == "minimised within the family"


def test_with_a_known_mean_the_second_moment_is_kept_under_forward_kl():
    draws = posterior()
    _, sub = only(FULL, CENTRED, draws, rkl.KL())
    second = (draws["mu"].square() + draws["sigma"].square()).mean()
    variance = second - draws["mu"].mean().square()
    torch.testing.assert_close(sub.act["sigma"], second.sqrt(), rtol=1e-10, atol=0)
    torch.testing.assert_close(sub.excess.value, (second / variance).log() / 2)


@pytest.mark.parametrize("divergence", [rkl.ReverseKL(), rkl.KL()], ids=str)
def test_an_exponential_law_in_place_of_a_gamma_law_has_the_closed_form(divergence):
    g = torch.Generator().manual_seed(1)
    u, v = torch.rand(2, 4, 200, generator=g, dtype=torch.float64)
    draws = {"a": 1 + u, "b": 2 + v}
    result, sub = only("gamma(concentration=a, rate=b)", "exponential(rate=b)", draws, divergence)
    a, b = draws["a"], draws["b"]
    if divergence == rkl.KL():
        rate = 1 / (a / b).mean()
        law = rkl.KL().between(Gamma(a, b), Exponential(rate))
    else:  # E KL = log λ E a − E b/λ and what does not move
        rate = b.mean() / a.mean()
        law = rkl.KL().between(Exponential(rate), Gamma(a, b))
    torch.testing.assert_close(sub.act["b"], rate, rtol=1e-9, atol=0)
    torch.testing.assert_close(sub.risk.value, law.mean(), rtol=1e-12, atol=0)
    torch.testing.assert_close(sub.risk.value - result.full.risk.value, sub.excess.value)


class Unknown(Normal):
    """A Normal that is in no table of exponential families."""


@pytest.mark.parametrize(
    "divergence", [rkl.ReverseKL(), rkl.KL(), 0.3 * rkl.KL() + rkl.ReverseKL()], ids=str
)
def test_pythagoras_and_the_draws_themselves_say_the_same(divergence):
    near = only(FULL, CENTRED, posterior(), divergence)[1]
    far = only(FULL, lambda t: Unknown(0 * t.sigma, t.sigma), posterior(), divergence)[1]
    assert near.method != far.method
    for which in ("risk", "excess"):
        ours, theirs = getattr(near, which), getattr(far, which)
        torch.testing.assert_close(ours.value, theirs.value, rtol=1e-9, atol=0)
        # delta method against batch means of the paired differences
        torch.testing.assert_close(ours.error, theirs.error, rtol=0.01, atol=0)
    torch.testing.assert_close(near.act["sigma"], far.act["sigma"], rtol=1e-6, atol=0)
    torch.testing.assert_close(near.act.error["sigma"], far.act.error["sigma"], rtol=0.02, atol=0)


GRID = torch.linspace(-60, 70, 13_001, dtype=torch.float64)  # steps of 1/100


def brute(divergence, draws, make, low, high):
    """The scale of least expected divergence, by sums over a grid and golden section."""
    logp = Normal(draws["mu"].reshape(-1, 1), draws["sigma"].reshape(-1, 1)).log_prob(GRID)
    step = torch.tensor(1 / 100).double().log()

    def risk(scale):
        logq = make(torch.tensor(scale, dtype=torch.float64)).log_prob(GRID) + step
        return divergence.excess(logp + step, logq.expand_as(logp)).sum(-1).mean().item()

    ratio = (5**0.5 - 1) / 2
    while high - low > 1e-6:
        a, b = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, b) if risk(a) < risk(b) else (a, high)
    return (low + high) / 2, risk((low + high) / 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("divergence", "loc"),
    [(rkl.JensenShannon(), 0.7), (rkl.SquaredHellinger(), 0.7), (rkl.JensenShannon(), 6.0)],
    ids=str,
)
def test_any_divergence_agrees_with_brute_force_also_far_from_where_the_draws_put_the_scale(
    divergence, loc
):
    draws = posterior(draws=10, loc=loc)
    found, least = brute(divergence, draws, lambda s: Laplace(0.0, s), 0.1, 20.0)
    sub = only(FULL, "laplace(loc=0, scale=sigma)", draws, divergence)[1]
    # 1e-6 for the kink of Laplace's density on the grid, of steps h: h²/12
    assert sub.risk.value.item() == pytest.approx(least, abs=1e-5)
    assert sub.act["sigma"].item() == pytest.approx(found, rel=2e-3)


@pytest.mark.parametrize(
    "divergence",
    [rkl.ReverseKL(), rkl.KL(), rkl.Jeffreys(), rkl.JensenShannon(), Intrinsic()],
    ids=str,
)
def test_a_smaller_submodel_never_does_better_than_a_larger_one(divergence):
    chain = {
        "centred": CENTRED,
        "doubled": lambda t: Normal(t.sigma, 2 * t.sigma),  # in neither
        "two means": lambda t: Normal(t.mu, 0 * t.mu + 1.5),
        "standard": lambda t: Normal(0 * t.mu, 1.5 + 0 * t.mu),
        "everything": lambda t: Normal(t.mu, t.sigma),
    }
    found = project(posterior(draws=25), FULL, chain, divergence).submodels
    loss = {name: sub.excess.value.item() for name, sub in found.items()}
    slack = 1e-9
    assert loss["everything"] == pytest.approx(0, abs=slack)
    assert min(loss.values()) > -slack
    assert loss["standard"] > loss["centred"] + slack
    assert loss["standard"] > loss["two means"] + slack


def rows_of(name, beta):
    """Natural parameter and log-partition of each row, of regressions without a scale."""
    predictor = beta @ DESIGN.T
    return predictor, softplus(predictor) if name == "logistic" else predictor.exp()


def regression_risk(name, draws, kept, divergence):
    """E D(P_θ ‖ P_t) of coefficients of some columns, from A(q) − A(p) − (q − p) A′(p)."""
    beta = draws["beta"].reshape(-1, 3)

    def kl(p, q):
        (eta_p, a_p), (eta_q, a_q) = rows_of(name, p), rows_of(name, q)
        slope = torch.sigmoid(eta_p) if name == "logistic" else eta_p.exp()
        return (a_q - a_p - (eta_q - eta_p) * slope).sum(-1)

    def risk(short):
        full = torch.zeros(3, dtype=torch.float64).index_put((torch.tensor(kept),), short)
        ways = (kl(beta, full), kl(full, beta))
        return ways[divergence == rkl.ReverseKL()].mean()

    return risk


@pytest.mark.parametrize("divergence", [rkl.ReverseKL(), rkl.KL()], ids=str)
@pytest.mark.parametrize("name", ["logistic", "poisson"])
def test_a_regression_without_a_column_agrees_with_brute_force(name, divergence):
    draws = coefficients()
    result = project(
        draws, f"{name}-regression(coefficients=beta)", COLUMNS, divergence, design=DESIGN
    )
    least = {}
    for which, kept in COLUMNS.items():
        start = draws["beta"].mean((0, 1))[kept]
        least[which], at = descended(regression_risk(name, draws, kept, divergence), start)
        sub = result.submodels[which]
        assert sub.risk.value.item() == pytest.approx(least[which], rel=1e-9)
        torch.testing.assert_close(sub.act["beta"][kept], at, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(sub.act.distribution.coefficients, sub.act["beta"])
        left_out = [i for i in range(3) if i not in kept]
        assert not sub.act["beta"][left_out].any()
        assert not sub.act.error["beta"][left_out].any()
    for which, sub in result.submodels.items():
        assert sub.excess.value.item() == pytest.approx(least[which] - least["all"], abs=1e-9)
    assert least["none"] > max(least["first"], least["last"])


@pytest.mark.parametrize("divergence", [rkl.ReverseKL(), rkl.KL(), rkl.Jeffreys()], ids=str)
def test_a_gaussian_regression_without_a_column_has_a_larger_scale_or_not_by_the_direction(
    divergence,
):
    draws = coefficients()
    family = "gaussian-regression(coefficients=beta, scale=sigma)"
    result, sub = only(family, [0, 1], draws, divergence, design=DESIGN)
    predictor, scale = (draws["beta"] @ DESIGN.T).flatten(0, 1), draws["sigma"].flatten()[:, None]

    def risk(point):
        q = Normal(DESIGN[:, :2] @ point[:2], point[2].exp())
        ways = (
            rkl.KL().between(Normal(predictor, scale), q),
            rkl.KL().between(q, Normal(predictor, scale)),
        )
        weights = {rkl.KL(): (1, 0), rkl.ReverseKL(): (0, 1)}.get(divergence, (1, 1))
        return sum(w * x.sum(-1).mean() for w, x in zip(weights, ways, strict=True))

    least, at = descended(risk, torch.zeros(3, dtype=torch.float64))
    assert sub.risk.value.item() == pytest.approx(least, rel=1e-9)
    assert sub.act["sigma"].log().item() == pytest.approx(at[2].item(), abs=1e-5)
    grows = sub.act["sigma"] / result.full.act["sigma"]
    assert grows > 1.001 if divergence != rkl.ReverseKL() else abs(grows - 1) < 1e-9


class Frame:
    """A table with names, as pandas has them."""

    columns = ("intercept", "age", "bmi")

    def __array__(self, dtype=None, copy=None):
        return DESIGN.numpy().astype(dtype)


def test_columns_go_by_the_names_of_a_data_frame():
    settings = {"design": Frame()}
    family, draws = "logistic-regression(coefficients=beta)", coefficients()
    result = project(draws, family, [["age", "intercept"], [1, 0]], **settings)
    named, numbered = result.submodels.values()
    assert list(result.submodels) == ["columns age, intercept", "columns 1, 0"]
    assert torch.equal(named.act["beta"], numbered.act["beta"])
    with pytest.raises(ValueError, match=r"some of intercept, age, bmi.*got \['sex'\]"):
        project(draws, family, [["sex"]], **settings)


@pytest.mark.slow
def test_members_of_a_batch_are_projected_each_by_itself_though_they_share_a_parameter():
    draws = posterior(batch=(3,))
    draws = {"mu": draws["mu"] + torch.arange(3), "sigma": draws["sigma"][..., 0]}
    for divergence in (rkl.KL(), rkl.SquaredHellinger()):
        together = only(FULL, CENTRED, draws, divergence)[1]
        for i in range(3):
            own = {"mu": draws["mu"][..., i], "sigma": draws["sigma"]}
            alone = only(FULL, CENTRED, own, divergence)[1]
            torch.testing.assert_close(
                together.act["sigma"][i], alone.act["sigma"], rtol=1e-6, atol=0
            )
            for ours, theirs in ((together.risk, alone.risk), (together.excess, alone.excess)):
                torch.testing.assert_close(ours.value[i], theirs.value, rtol=1e-7, atol=0)
                torch.testing.assert_close(ours.error[i], theirs.error, rtol=1e-4, atol=0)


@pytest.mark.parametrize("divergence", [rkl.ReverseKL(), rkl.TotalVariation()], ids=str)
def test_a_draw_of_twice_the_weight_counts_as_two(divergence):
    draws = posterior(draws=40)
    weights = torch.ones(4, 40, dtype=torch.float64)
    weights[:, :10] = 2
    twice = {name: torch.cat([x[:, :10], x], 1) for name, x in draws.items()}
    weighted = only(FULL, CENTRED, draws, divergence, weights=weights)[1]
    repeated = only(FULL, CENTRED, twice, divergence)[1]
    # the nodes of the second are chosen for other draws
    torch.testing.assert_close(weighted.risk.value, repeated.risk.value, rtol=1e-6, atol=0)
    torch.testing.assert_close(weighted.excess.value, repeated.excess.value, rtol=1e-6, atol=0)


def test_what_wraps_both_families_is_seen_through_and_what_wraps_one_is_not():
    draws = posterior(draws=100)

    def wrapped(family, *transforms):
        return lambda t: TransformedDistribution(family(t), list(transforms))

    def centred(t):
        return Normal(0 * t.sigma, t.sigma)

    exp = ExpTransform()
    full = wrapped(lambda t: Normal(t.mu, t.sigma), exp)
    both = only(full, wrapped(centred, exp), draws, rkl.ReverseKL())[1]
    plain = only(FULL, CENTRED, draws, rkl.ReverseKL())[1]
    assert both.method == "minimised within the family"
    torch.testing.assert_close(both.excess.value, plain.excess.value)
    torch.testing.assert_close(both.act.distribution.log_prob(torch.tensor(2.0)), LogNormal(
        0.0, both.act["sigma"]
    ).log_prob(torch.tensor(2.0)))  # fmt: skip
    # this one spells out its logarithm
    spelt = only(full, lambda t: LogNormal(0 * t.sigma, t.sigma), draws, rkl.ReverseKL())[1]
    assert spelt.method.startswith("minimised over the draws")
    torch.testing.assert_close(spelt.excess.value, plain.excess.value, rtol=1e-8, atol=0)


def test_independent_parts_share_what_a_callable_lets_them_share():
    draws = posterior(batch=(3,))
    draws = {"mu": draws["mu"] + torch.arange(3), "sigma": draws["sigma"][..., 0]}

    def full(t):
        return Independent(Normal(t.mu, t.sigma[:, None]), 1)

    def shared(t):
        return Independent(Normal(torch.zeros(len(t.sigma), 3), t.sigma[:, None]), 1)

    sub = only(full, shared, draws, rkl.KL())[1]
    second = (draws["mu"].square() + draws["sigma"][..., None].square()).mean()
    torch.testing.assert_close(sub.act["sigma"], second.sqrt(), rtol=1e-9, atol=0)
    assert sub.excess.value.shape == ()


@pytest.mark.slow
def test_the_error_of_an_excess_is_how_much_it_scatters_between_posteriors_of_the_same_kind():
    found = [only(FULL, CENTRED, posterior(seed, 60), rkl.ReverseKL())[1] for seed in range(32)]
    scatter = torch.stack([sub.excess.value for sub in found]).std()
    claimed = torch.stack([sub.excess.error for sub in found]).mean()
    # a standard deviation of 32 has an error of 13 %
    assert claimed.item() == pytest.approx(scatter.item(), rel=0.4)


@pytest.mark.slow
def test_the_error_of_a_difference_is_that_of_the_pairs():
    draws = posterior(draws=60)
    sub = only(FULL, lambda t: Normal(t.mu, 1.001 * t.sigma), draws, rkl.JensenShannon())[1]
    assert sub.excess.error < 1e-3 * sub.risk.error


@pytest.mark.slow
def test_a_family_of_infinite_divergence_is_refused_though_a_sample_would_not_show_it():
    with pytest.raises(
        ValueError, match="must have its mass where the posterior's distributions have"
    ):
        project(posterior(draws=30), FULL, "cauchy(loc=mu, scale=sigma)", rkl.ReverseKL())


def test_the_table_has_a_row_for_every_family_and_member():
    draws = posterior(batch=(2,))
    result = project(draws, FULL, [CENTRED, "normal(loc=mu, scale=1.5)"])
    table = result.table
    names = [row[0] for row in table.rows]
    assert names[:2] == [f"{FULL} [0]", f"{FULL} [1]"]
    assert len(names) == 6
    assert table.rows[0][2] == (0, 0)
    sub = result.submodels[CENTRED]
    assert table.rows[2][1:3] == (
        (sub.risk.value[0].item(), sub.risk.error[0].item()),
        (sub.excess.value[0].item(), sub.excess.error[0].item()),
    )
    assert table.rows[2][3].startswith("sigma = ")
    assert json.loads(json.dumps(result.to_dict()))["acts"][CENTRED]["sigma"] == pytest.approx(
        sub.act["sigma"].tolist()
    )
    assert CENTRED in str(result)
    assert CENTRED in result._repr_html_()


def test_one_subfamily_needs_no_list():
    assert list(project(posterior(draws=50), FULL, CENTRED).submodels) == [CENTRED]


@pytest.mark.parametrize(
    ("subfamilies", "error", "words"),
    [
        ([], ValueError, "at least one; got none"),
        (3, TypeError, "a list or a dict of families; got 3"),
        ([3], TypeError, "each subfamily must be a text.*got 3"),
        ([[0, 1]], ValueError, r"columns, \[0, 1\], needs a regression.*got normal"),
        ([CENTRED, CENTRED], ValueError, "names of their own; got normal.*twice"),
        ([FULL], ValueError, "names of their own"),
        ("normal(loc=0, scale=tau)", ValueError, "scale must be one of mu, sigma.*got tau"),
        ("poisson(rate=sigma)", ValueError, "one of them has a density and the other counts"),
        ("dirichlet(concentration=sigma)", ValueError, "sigma must have as many axes"),
        (
            lambda t: Normal(t.mu[:, None], t.sigma[:, None]),
            ValueError,
            r"a batch \[\].*got \[1\]",
        ),
        (
            lambda t: Independent(Normal(t.mu[:, None], t.sigma[:, None]), 1),
            ValueError,
            r"events \[\]; got \[\] and \[1\]",
        ),
        (
            lambda t: Gamma(t.sigma, t.sigma),
            ValueError,
            "must have a member of finite divergence",
        ),
    ],
)
def test_what_is_no_simpler_family_is_refused_in_a_line(subfamilies, error, words):
    with pytest.raises(error, match=words) as caught:
        project(posterior(draws=20), FULL, subfamilies, rkl.KL())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("columns", [[], [0, 0], [3], [-1], ["age"]], ids=str)
def test_columns_that_are_none_are_refused(columns):
    with pytest.raises(ValueError, match="columns must be some of 0, 1, 2, each once; got"):
        project(
            coefficients(draws=20),
            "poisson-regression(coefficients=beta)",
            [columns],
            design=np.asarray(DESIGN),
        )

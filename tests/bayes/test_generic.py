import math

import mpmath
import pytest
import torch
from torch.distributions import (
    Bernoulli,
    Binomial,
    Categorical,
    Cauchy,
    Gamma,
    Independent,
    MixtureSameFamily,
    MultivariateNormal,
    NegativeBinomial,
    Normal,
    Pareto,
    StudentT,
    Uniform,
    kl_divergence,
)
from torch.distributions.transforms import SoftplusTransform

import rkl
from rkl.bayes.loss.between import Intrinsic
from rkl.bayes.loss.nodes import nodes_for
from rkl.bayes.model import laws_of
from rkl.bayes.solve import numerical as generic
from rkl.bayes.solve.numerical import numerical_act


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def normals(count=200):
    return {"loc": normal(count) / 2, "scale": (normal(count, seed=1) / 4).exp()}


def normal_law(t):
    return Normal(t["loc"], t["scale"])


def close(found, expected, tolerance=1e-6):
    for name, x in expected.items():
        torch.testing.assert_close(
            found[name], torch.as_tensor(x, dtype=torch.float64), rtol=tolerance, atol=tolerance
        )


def act(theta, law, divergence, on_nodes=False, **settings):
    nodes = nodes_for(laws_of(theta, law)) if on_nodes else None
    found = numerical_act(theta, law, divergence, nodes=nodes, **settings)
    assert found.accuracy.converged
    assert found.accuracy.agreeing == found.accuracy.starts
    assert (found.accuracy.method == "closed form") != on_nodes
    return found


# Acts in closed form, written out


@pytest.mark.parametrize("on_nodes", [False, True])
def test_normal_acts_have_the_mean_natural_parameter_and_the_mean_mean_parameter(on_nodes):
    theta = normals()
    loc, scale = theta["loc"], theta["scale"]
    precision = scale.pow(-2).mean()
    reverse = {"loc": (loc / scale**2).mean() / precision, "scale": precision.rsqrt()}
    forward = {"loc": loc.mean(), "scale": ((loc**2 + scale**2).mean() - loc.mean() ** 2).sqrt()}
    close(act(theta, normal_law, rkl.ReverseKL(), on_nodes).theta, reverse, 1e-9)
    close(act(theta, normal_law, rkl.KL(), on_nodes).theta, forward, 1e-9)


def test_bernoulli_acts_are_means_of_logits_of_probabilities_and_of_square_roots():
    p = torch.sigmoid(2 * normal(300))
    theta = {"p": p}
    roots = p.sqrt().mean() ** 2, (1 - p).sqrt().mean() ** 2
    expected = {
        rkl.ReverseKL(): torch.sigmoid(p.logit().mean()),
        rkl.KL(): p.mean(),
        rkl.SquaredHellinger(): roots[0] / sum(roots),
    }
    for divergence, value in expected.items():
        for on_nodes in (False, True):
            found = act(theta, lambda t: Bernoulli(t["p"]), divergence, on_nodes)
            close(found.theta, {"p": value}, 1e-9)


def test_gamma_acts_solve_their_equations():
    theta = {"shape": (1 + normal(200) / 4).exp(), "rate": (normal(200, seed=1) / 4).exp()}
    shape, rate = theta["shape"], theta["rate"]

    def law(t):
        return Gamma(t["shape"], t["rate"])

    reverse = {"shape": shape.mean(), "rate": rate.mean()}
    close(act(theta, law, rkl.ReverseKL()).theta, reverse, 1e-9)
    close(act(theta, law, rkl.ReverseKL(), on_nodes=True).theta, reverse, 1e-9)
    mean, log_mean = (shape / rate).mean(), (shape.digamma() - rate.log()).mean()
    forward = act(theta, law, rkl.KL(), on_nodes=True).theta
    gap = math.log(mean) - log_mean.item()
    found = mpmath.findroot(lambda a: mpmath.digamma(a) - mpmath.log(a) + gap, 2)
    close(forward, {"shape": float(found), "rate": float(found) / mean}, 1e-8)


def test_hellinger_acts_of_normals_are_the_best_of_a_fine_grid():
    theta = {"loc": torch.tensor([0.0, 0.2, 1.5]).double()}
    found = act(theta, lambda t: Normal(t["loc"], 1.0), rkl.SquaredHellinger(), on_nodes=True)
    grid = torch.linspace(0, 1.5, 1_500_001, dtype=torch.float64)[:, None]
    affinity = (-((grid - theta["loc"]) ** 2) / 8).exp().mean(-1)
    assert found.theta["loc"].item() == pytest.approx(grid[affinity.argmax()].item(), abs=1e-6)
    assert found.risk == pytest.approx(1 - affinity.max().item(), abs=1e-10)


def test_several_parameters_may_share_one_observation_of_many():
    """Eight groups of one scale: the reverse-KL act of the scale is that of the precision."""
    theta = {"mu": normal(100, 8), "sigma": (normal(100, seed=1) / 3).exp()}
    precision = theta["sigma"] ** -2
    expected = {
        "sigma": precision.mean().rsqrt(),
        "mu": (theta["mu"] * precision[:, None]).mean(0) / precision.mean(),
    }
    for wrap in (lambda law: law, lambda law: Independent(law, 1)):
        found = act(
            theta, lambda t, w=wrap: w(Normal(t["mu"], t["sigma"][:, None])), rkl.ReverseKL()
        )
        close(found.theta, expected, 1e-9)


# Acts without a closed form, against brute force


def brute(log_density, theta, divergence, locs, scales, x, slope):
    """The best of a grid of locations and scales, by the trapezoid rule over x(u)."""
    logp = log_density(x, theta["loc"][:, None], theta["scale"][:, None])
    best = (math.inf, None, None)
    for a in locs:
        for b in scales:
            logq = log_density(x, a, b).expand_as(logp)
            value = (divergence.integrand(logp, logq) * slope).sum(-1).mean().item()
            best = min(best, (value, a.item(), b.item()))
    return best


def student(x, loc, scale, df):
    constant = math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - math.log(df * math.pi) / 2
    return constant - scale.log() - (df + 1) / 2 * (((x - loc) / scale) ** 2 / df).log1p()


@pytest.mark.parametrize("divergence", [rkl.KL(), rkl.ReverseKL(), rkl.JensenShannon()], ids=repr)
@pytest.mark.parametrize("df", [1.0, 4.0])
def test_student_and_cauchy_acts_are_the_best_of_a_grid(divergence, df):
    theta = {k: x[:12] for k, x in normals().items()}

    def law(t):
        return Cauchy(t["loc"], t["scale"]) if df == 1 else StudentT(df, t["loc"], t["scale"])

    found = numerical_act(theta, law, divergence)
    u = torch.linspace(-22, 22, 4001, dtype=torch.float64)
    x, slope = u.sinh(), u.cosh() * (u[1] - u[0])
    step = 0.002
    around = torch.arange(-4, 5).double() * step
    value, loc, scale = brute(
        lambda x, a, b: student(x, a, b, df), theta, divergence,
        found.theta["loc"] + around + step / 3, found.theta["scale"] + around + step / 3, x, slope,
    )  # fmt: skip
    assert found.risk <= value + 1e-9
    assert value - found.risk < 1e-5
    # The best of the grid is within it, and next to the act.
    assert found.theta["loc"].item() == pytest.approx(loc, abs=2 * step)
    assert found.theta["scale"].item() == pytest.approx(scale, abs=2 * step)


def mixture(t):
    return MixtureSameFamily(Categorical(t["w"]), Normal(t["mu"], t["sigma"]))


def components(count=60):
    centre = torch.tensor([-2.0, 0.0, 3.0]).double()
    return {
        "mu": centre + 0.3 * normal(count, 3),
        "sigma": (normal(count, 3, seed=1) / 5).exp(),
        "w": (normal(count, 3, seed=2) / 5).softmax(-1),
    }


@pytest.mark.parametrize("divergence", [rkl.ReverseKL(), rkl.KL(), rkl.JensenShannon()], ids=repr)
def test_labels_switched_draw_by_draw_change_nothing_of_the_act_of_a_mixture(divergence):
    theta = components()
    order = torch.rand(60, 3, generator=torch.Generator().manual_seed(3)).argsort(-1)
    switched = {name: x.gather(-1, order) for name, x in theta.items()}
    one, other = (numerical_act(t, mixture, divergence) for t in (theta, switched))
    x = torch.linspace(-6, 8, 200, dtype=torch.float64)[:, None]
    torch.testing.assert_close(one.law.log_prob(x), other.law.log_prob(x), rtol=0, atol=1e-10)
    assert one.risk == pytest.approx(other.risk, abs=1e-12)
    # The componentwise mean is another law once labels are switched, and a bad one.
    means = [
        mixture({k: v.mean(0, keepdim=True) for k, v in t.items()}) for t in (theta, switched)
    ]
    assert (means[0].log_prob(x) - means[1].log_prob(x)).abs().max() > 0.1


@pytest.mark.parametrize("divergence", [rkl.KL(), rkl.SquaredHellinger()], ids=repr)
def test_the_act_does_not_depend_on_the_chart(divergence):
    theta = normals(60)
    plain = numerical_act(theta, lambda t: StudentT(3.0, t["loc"], t["scale"]), divergence)
    soft = SoftplusTransform()
    moved = numerical_act(
        {"loc": theta["loc"], "u": soft.inv(theta["scale"])},
        lambda t: StudentT(3.0, t["loc"], soft(t["u"])),
        divergence,
    )
    u = moved.theta["u"]
    close(plain.theta, {"loc": moved.theta["loc"], "scale": soft(u)}, 1e-8)
    slope = u.sigmoid()
    influence = {"loc": moved.influence["loc"], "scale": slope * moved.influence["u"]}
    close(plain.influence, influence, 1e-6)


# Vectors


def vectors(count=300):
    lower = (
        0.2 * normal(count, 2, 2, seed=1).tril(-1) + (0.1 * normal(count, 2)).exp().diag_embed()
    )
    return {"loc": normal(count, 2, seed=2) / 2, "cov": lower @ lower.mT}


def vector_law(t):
    return MultivariateNormal(t["loc"], t["cov"])


@pytest.mark.parametrize("divergence", [rkl.ReverseKL(), rkl.KL()], ids=repr)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_an_importance_sample_errs_by_what_it_says(divergence, seed):
    theta = vectors()
    exact = act(theta, vector_law, divergence)
    nodes = nodes_for(laws_of(theta, vector_law), size=2000, seed=seed)
    found = numerical_act(theta, vector_law, divergence, nodes=nodes)
    laws = (found.law, exact.law) if divergence == rkl.ReverseKL() else (exact.law, found.law)
    excess = kl_divergence(*laws).item()  # by Pythagoras
    # The mean of a quadratic form of 5 normal errors, each of another weight: at most 4 times.
    assert 0 < excess < 4 * found.accuracy.node_excess
    assert abs(found.risk - exact.risk) < 4 * found.accuracy.risk_error
    assert found.accuracy.risk_error < 0.1 * exact.risk


def test_the_vector_acts_themselves_are_the_closed_ones():
    theta = vectors()
    precision = torch.linalg.inv(theta["cov"])
    mean = precision.mean(0)
    loc = torch.linalg.solve(mean, (precision @ theta["loc"][..., None]).mean(0)[:, 0])
    found = act(theta, vector_law, rkl.ReverseKL())
    close(found.theta, {"loc": loc, "cov": torch.linalg.inv(mean)}, 1e-9)


# The intrinsic loss


@pytest.mark.parametrize(("successes", "expected"), [(0, 0.0314), (1, 0.1238), (3, 0.3137)])
def test_the_intrinsic_estimates_of_a_proportion_are_the_published_ones(successes, expected):
    """Bernardo's table for n = 10 under the reference prior, by quadrature of the posterior."""
    angle = (torch.arange(1001).double() + 0.5) / 1001 * math.pi / 2
    p = angle.sin() ** 2  # in which the reference prior is flat
    weights = p**successes * (1 - p) ** (10 - successes)
    found = numerical_act({"p": p}, lambda t: Binomial(10, t["p"]), Intrinsic(), weights=weights)
    assert found.theta["p"].item() == pytest.approx(expected, abs=1e-4)
    reverse = numerical_act(
        {"p": p}, lambda t: Binomial(10, t["p"]), rkl.ReverseKL(), weights=weights
    )
    logit = mpmath.digamma(successes + 0.5) - mpmath.digamma(10 - successes + 0.5)
    exact = 1 / (1 + math.exp(-logit))
    assert reverse.theta["p"].item() == pytest.approx(exact, abs=1e-4)  # of the quadrature


def test_the_intrinsic_estimate_of_the_end_of_a_uniform_law_is_known():
    """After n points up to 3 the posterior is Pareto; the act is its median, 3 · 2^(1/n)."""
    n, quantile = 5, (torch.arange(2001).double() + 0.5) / 2001
    end = 3 * (1 - quantile) ** (-1 / n)
    found = numerical_act({"end": end}, lambda t: Uniform(0.0, t["end"]), Intrinsic())
    assert found.theta["end"].item() == pytest.approx(3 * 2 ** (1 / n), abs=1e-6)
    assert found.accuracy.converged
    weights = torch.rand(2001, generator=torch.Generator().manual_seed(0)).double()
    weighted = numerical_act(
        {"end": end}, lambda t: Uniform(0.0, t["end"]), Intrinsic(), weights=weights
    )
    median = end[torch.searchsorted(weights.cumsum(0), weights.sum() / 2)]
    assert weighted.theta["end"].item() == pytest.approx(median.item(), rel=1e-6)


def test_the_intrinsic_estimate_of_the_scale_of_a_pareto_law_is_the_median_too():
    n, shape, quantile = 4, 1.5, (torch.arange(2001).double() + 0.5) / 2001
    scale = 2 * quantile ** (1 / (n * shape))
    found = numerical_act({"scale": scale}, lambda t: Pareto(t["scale"], shape), Intrinsic())
    assert found.theta["scale"].item() == pytest.approx(2 * 2 ** (-1 / (n * shape)), abs=1e-6)


def test_the_intrinsic_loss_without_closed_forms_is_taken_on_nodes():
    theta = {k: x[:40] for k, x in normals().items()}
    closed = numerical_act(theta, normal_law, Intrinsic())
    on_nodes = numerical_act(
        theta, normal_law, Intrinsic(), nodes=nodes_for(laws_of(theta, normal_law))
    )
    assert on_nodes.accuracy.method == "quadrature"
    assert on_nodes.risk == pytest.approx(closed.risk, abs=1e-9)
    close(on_nodes.theta, closed.theta, 1e-4)  # a flat minimum, reached to 1e-10 in the loss


# What is no f-divergence


def test_on_a_finite_support_any_divergence_will_do():
    theta = {"p": normal(40, 3).softmax(-1)}

    def law(t):
        return Categorical(t["p"])

    for divergence in (rkl.AKL(), rkl.AlphaBeta(0.8, 0.4), 0.5 * rkl.AKL() + rkl.KL()):
        found = numerical_act(theta, law, divergence)
        steps = 0.01 * torch.randn(60, 3, generator=torch.Generator().manual_seed(0)).double()
        around = (found.theta["p"].log() + steps).softmax(-1)
        values = [
            divergence(theta["p"].log(), q.log().expand(40, 3)).mean().item() for q in around
        ]
        assert found.risk <= min(values) + 1e-7  # torch rounds Categorical's probabilities
        assert min(values) - found.risk < 3e-3
    # ToDi has the value of Jeffreys' divergence, and so its act; only as a loss to train on,
    # with its weights held, has it another gradient.
    todi, jeffreys = (numerical_act(theta, law, d) for d in (rkl.ToDi(), rkl.Jeffreys()))
    close(todi.theta, jeffreys.theta, 1e-5)


# Draws


def test_the_losses_and_the_risk_are_those_of_the_act_over_all_draws():
    theta = normals()
    found = act(theta, normal_law, rkl.KL(), on_nodes=True)
    exact = kl_divergence(normal_law(theta), found.law)
    torch.testing.assert_close(found.losses, exact, rtol=1e-9, atol=1e-12)
    assert found.risk == pytest.approx(exact.mean().item(), rel=1e-12)


def test_weights_count_draws():
    theta = {k: x[:30] for k, x in normals().items()}
    counts = torch.arange(30) % 3
    repeated = {k: x.repeat_interleave(counts) for k, x in theta.items()}
    for divergence in (rkl.ReverseKL(), rkl.JensenShannon()):
        weighted = numerical_act(theta, normal_law, divergence, weights=counts.double())
        plain = numerical_act(repeated, normal_law, divergence)
        close(weighted.theta, plain.theta, 1e-9)
        assert weighted.risk == pytest.approx(plain.risk, rel=1e-9)


@pytest.mark.parametrize(
    "divergence",
    [rkl.KL(), rkl.ReverseKL(), rkl.JensenShannon(), rkl.SquaredHellinger()],
    ids=repr,
)
def test_the_influence_of_a_draw_is_how_its_weight_moves_the_act(divergence):
    theta = {k: x[:20] for k, x in normals().items()}
    law = normal_law if divergence == rkl.KL() else lambda t: StudentT(3.0, t["loc"], t["scale"])
    found = numerical_act(theta, law, divergence)
    weights = torch.full((20,), 1 / 20).double()
    for name, x in found.influence.items():
        assert x.mean().item() == pytest.approx(0, abs=1e-9), name
    for draw in (0, 7):
        step = 1e-5 * torch.nn.functional.one_hot(torch.tensor(draw), 20).double()
        sides = [
            numerical_act(theta, law, divergence, weights=weights + s * step) for s in (1, -1)
        ]
        for name, x in found.influence.items():
            moved = (sides[0].theta[name] - sides[1].theta[name]) / 2e-5
            assert moved.item() == pytest.approx(x[draw].item(), rel=1e-4, abs=1e-6)


def test_a_loss_that_needs_every_draw_is_minimised_over_few_and_then_over_all(monkeypatch):
    theta = normals(400)
    whole = numerical_act(theta, normal_law, rkl.JensenShannon())
    assert whole.accuracy.draws == 400
    monkeypatch.setattr(generic, "MINIMISED_LOG_DENSITIES", 2**15)
    few = numerical_act(theta, normal_law, rkl.JensenShannon())
    assert few.accuracy.draws < 200
    assert few.accuracy.decrement < 1e-14
    close(few.theta, whole.theta, 1e-7)
    assert few.risk == pytest.approx(whole.risk, abs=1e-12)


def test_a_loss_with_kinks_that_is_minimised_over_few_draws_says_what_that_costs(monkeypatch):
    theta = normals(150)
    whole = numerical_act(theta, normal_law, rkl.TotalVariation())
    monkeypatch.setattr(generic, "KINKED", 2**16)
    few = numerical_act(theta, normal_law, rkl.TotalVariation())
    assert few.accuracy.draws < 100
    excess = few.risk - whole.risk
    assert 0 < excess < 3 * few.accuracy.decrement


def test_a_divergence_that_is_finite_only_at_wide_laws_is_minimised_among_these():
    theta = normals()
    found = numerical_act(theta, normal_law, rkl.PearsonChiSquare())
    assert math.isfinite(found.risk)
    assert (2 * found.theta["scale"] ** 2 > theta["scale"].square().max()).all()


def test_what_a_closed_form_holds_fixed_may_move_from_draw_to_draw():
    """One draw alone is in the family of a known number of failures, and all together are not."""
    theta = {
        "total_count": 4 + normal(50).tanh(),
        "probs": 0.2 + normal(50, seed=1).tanh() / 20,
    }

    def law(t):
        return NegativeBinomial(t["total_count"], t["probs"], validate_args=False)

    found = numerical_act(theta, law, rkl.ReverseKL())
    assert found.accuracy.method != "closed form"
    x = torch.arange(200.0, dtype=torch.float64)[:, None]
    logp = law(theta).log_prob(x)

    def risk(t):
        logq = law(t).log_prob(x)
        return (logq.exp() * (logq - logp)).sum(0).mean()

    best = risk({k: x[None] for k, x in found.theta.items()})
    assert found.risk == pytest.approx(best.item(), rel=1e-9)
    for name, by in (("total_count", 0.05), ("probs", 0.003)):
        for sign in (1, -1):
            moved = {k: x[None] + sign * by * (k == name) for k, x in found.theta.items()}
            assert risk(moved) > best


def test_a_divergence_that_is_infinite_everywhere_is_refused():
    narrow = {"scale": torch.tensor([1e-3, 1.0, 1e3]).double(), "loc": torch.zeros(3).double()}
    both = rkl.PearsonChiSquare() + rkl.NeymanChiSquare()
    with pytest.raises(
        ValueError, match="must be finite, on average over the draws, at some distribution"
    ):
        numerical_act(narrow, normal_law, both)


def test_a_divergence_whose_integral_has_no_end_is_refused_on_nodes():
    """Of Student laws Pearson's needs heavy tails of the act, and Neyman's short ones."""
    theta = {"df": torch.tensor([1.0, 6.0]).double()}
    both = rkl.PearsonChiSquare() + rkl.NeymanChiSquare()
    with pytest.raises(ValueError, match="infinite, or as good as"):
        numerical_act(theta, lambda t: StudentT(t["df"]), both)
    assert numerical_act(theta, lambda t: StudentT(t["df"]), rkl.PearsonChiSquare()).risk < 1


def test_an_act_that_has_mass_beyond_the_nodes_is_refused():
    theta = {"loc": torch.tensor([-9.0, 9.0]).double(), "scale": torch.ones(2).double()}
    near = nodes_for(laws_of({k: x[:1] for k, x in theta.items()}, normal_law))
    with pytest.raises(ValueError, match="nodes must reach as far as the act; .* beyond what"):
        numerical_act(theta, normal_law, rkl.SquaredHellinger(), nodes=near.only(near.points < -9))


@pytest.mark.parametrize(
    ("theta", "weights", "message"),
    [
        ({}, None, "theta must hold the draws of at least one parameter"),
        ({"loc": [0.0, 1.0], "scale": [1.0]}, None, r"as many draws .* \{'loc': 2, 'scale': 1\}"),
        ({"loc": [0.0, math.nan], "scale": [1.0, 1.0]}, None, "loc must be finite; got nan"),
        ({"loc": [0.0, 1.0], "scale": [1.0, 1.0]}, [1.0], "weights must be 2 finite numbers"),
        ({"loc": [0.0, 1.0], "scale": [1.0, 1.0]}, [1.0, -1.0], "none negative"),
        ({"loc": [0.0, 1.0], "scale": [1.0, 1.0]}, [0.0, 0.0], "weights must not all be 0"),
    ],
)
def test_draws_and_weights_that_are_malformed_are_refused(theta, weights, message):
    theta = {name: torch.tensor(x).double() for name, x in theta.items()}
    weights = None if weights is None else torch.tensor(weights).double()
    with pytest.raises(ValueError, match=message):
        numerical_act(theta, normal_law, rkl.KL(), weights=weights)

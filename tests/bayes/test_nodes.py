import math
from functools import partial

import mpmath
import pytest
import torch
from catalogued import F
from torch.distributions import (
    Bernoulli,
    Beta,
    Binomial,
    Categorical,
    Cauchy,
    Gamma,
    Geometric,
    Gumbel,
    Independent,
    Laplace,
    LogNormal,
    MixtureSameFamily,
    Multinomial,
    MultivariateNormal,
    NegativeBinomial,
    Normal,
    OneHotCategorical,
    Poisson,
    StudentT,
    Uniform,
    VonMises,
    kl_divergence,
)

from rkl import KL, Jeffreys, JensenShannon, ReverseKL, SquaredHellinger
from rkl.bayes.families import Kumaraswamy
from rkl.bayes.loss.logits import on_logits
from rkl.bayes.loss.nodes import nodes_for
from rkl.bayes.loss.quadrature import MAX_SINGLE, _first, _summing, line_of
from rkl.bayes.model import Laws


def drawn(count, seed=0, **spreads):
    """Draws by name: normal, of these standard deviations."""
    g = torch.Generator().manual_seed(seed)
    draws = torch.randn(len(spreads), count, generator=g, dtype=torch.float64)
    return {name: s * x for (name, s), x in zip(spreads.items(), draws, strict=True)}


def laws(theta, law, weights=None):
    count = len(next(iter(theta.values())))
    weights = torch.ones(count, dtype=torch.float64) if weights is None else weights
    return Laws(theta, law, weights / weights.sum())


def on(nodes, divergence, p, q):
    """D(p ‖ q) summed over nodes, [lead]."""
    logp, logq = nodes.log_mass(p), nodes.log_mass(q)
    return divergence.excess(*torch.broadcast_tensors(logp, logq)).sum(-1).squeeze(-1)


@pytest.mark.parametrize("divergence", F, ids=repr)
def test_every_f_divergence_on_nodes_is_its_integral(divergence):
    pair = {"loc": torch.tensor([0.0, 0.5]).double(), "scale": torch.tensor([1.0, 1.1]).double()}
    both = laws(pair, lambda t: Normal(t["loc"], t["scale"]))
    nodes = nodes_for(both, divergence)
    p, q = both.at(slice(0, 1)), both.at(slice(1, 2))
    x = torch.linspace(-25, 25, 2_000_001, dtype=torch.float64)
    integral = torch.trapezoid(divergence.integrand(p.log_prob(x), q.log_prob(x)), x)
    # A kink costs the trapezoid rule at most (2.5e-5)² times the jump of the slope.
    assert on(nodes, divergence, p, q).item() == pytest.approx(integral.item(), abs=1e-9, rel=1e-8)


CONTINUOUS = {
    "normal": lambda t: Normal(t["a"], t["b"].exp()),
    "far normal": lambda t: Normal(1e4 + t["a"], t["b"].exp()),
    "log-normal": lambda t: LogNormal(t["a"], t["b"].exp()),
    "student": lambda t: StudentT(2.5, t["a"], t["b"].exp()),
    "cauchy": lambda t: Cauchy(t["a"], t["b"].exp()),
    "gamma": lambda t: Gamma(t["b"].exp(), t["a"].exp()),
    "sharp gamma": lambda t: Gamma(1e6 * t["b"].exp(), 1e6 * (t["b"] + t["a"] / 1e3).exp()),
    "beta": lambda t: Beta(2 * t["a"].exp(), t["b"].exp()),
    "gumbel": lambda t: Gumbel(t["a"], t["b"].exp()),
    "mixture": lambda t: MixtureSameFamily(
        Categorical(logits=torch.stack([t["a"], t["b"]], -1)),
        Normal(torch.stack([t["a"], t["a"] + 9], -1), torch.stack([t["b"] - 3, t["b"]], -1).exp()),
    ),
}


@pytest.mark.parametrize("name", CONTINUOUS)
def test_every_law_of_a_wide_posterior_has_the_total_one(name):
    nodes = nodes_for(laws(drawn(300, a=1.0, b=0.3), CONTINUOUS[name]))
    assert nodes.kind == "quadrature"
    # Next to 1 the numbers of a beta law end; and far from 0 those of others have fewer digits.
    off = {"beta": 1e-5, "far normal": 1e-9, "sharp gamma": 1e-8}
    assert nodes.defect < off.get(name, 1e-10)


def test_a_law_that_is_much_narrower_than_the_rest_is_not_missed():
    theta = {"scale": torch.ones(400).double()}
    theta["scale"][237] = 1e-4
    theta["loc"] = torch.linspace(-2, 2, 400).double()
    nodes = nodes_for(laws(theta, lambda t: Normal(t["loc"], t["scale"])))
    assert nodes.defect < 1e-10


def test_tails_that_never_end_are_reached():
    theta = {"scale": torch.tensor([1.0, 1e3, 1e-2]).double()}
    three = laws(theta, lambda t: Cauchy(0.0, t["scale"]))
    nodes = nodes_for(three)
    for i, s in enumerate(theta["scale"].tolist()):
        found = on(nodes, KL(), three.at(slice(i, i + 1)), three.at(slice(0, 1))).item()
        assert found == pytest.approx(math.log((1 + s) ** 2 / (4 * s)), rel=1e-11, abs=1e-12)


def test_a_divergence_between_heavy_tails_is_that_of_high_precision():
    both = laws({"df": torch.tensor([1.5, 3.0]).double()}, lambda t: StudentT(t["df"]))
    found = on(nodes_for(both), KL(), both.at(slice(0, 1)), both.at(slice(1, 2))).item()

    def density(df, x):
        constant = mpmath.gamma((df + 1) / 2) / mpmath.sqrt(df * mpmath.pi) / mpmath.gamma(df / 2)
        return constant * (1 + x * x / df) ** (-(df + 1) / 2)

    def term(u):  # over x = sinh u, in which the tails are short
        p, q = (density(mpmath.mpf(df), mpmath.sinh(u)) for df in (1.5, 3))
        return p * mpmath.log(p / q) * mpmath.cosh(u)

    exact = 2 * mpmath.quad(term, [0, 1, 3, 10, 30, 60])
    assert found == pytest.approx(float(exact), rel=1e-10)


def test_angles_are_integrated_over_the_circle():
    theta = drawn(50, loc=1.0, scale=0.5)
    nodes = nodes_for(laws(theta, lambda t: VonMises(t["loc"], 5 * t["scale"].exp())))
    assert nodes.points.abs().max() <= math.pi
    assert nodes.defect < 1e-6  # torch's own normaliser is right to 1e-7


@pytest.mark.parametrize(
    "width", [3, MAX_SINGLE, MAX_SINGLE + 1, 100, 1000, 16_384, 16_385, 123_456]
)
@pytest.mark.parametrize("order", [11, 16])
def test_a_panel_of_counts_sums_polynomials_exactly_with_positive_weights(width, order):
    k, weights = _summing(width, order)
    assert (weights > 0).all()
    assert len(k) == len(k.unique()) == (order if width > MAX_SINGLE else width)
    every = (2 * torch.arange(width).double() + 1 - width) / width
    some = (2 * k + 1 - width) / width
    for degree in (0, 1, 2, 5, order - 1):
        total = (weights * some**degree).sum() / width
        assert total.item() == pytest.approx((every**degree).sum().item() / width, abs=1e-12)


@pytest.mark.parametrize(
    ("law", "most"),
    [
        (lambda t: Poisson(3 * t["a"].exp()), 300),
        (lambda t: Poisson(3e3 * t["a"].exp()), 5000),
        (lambda t: Geometric(torch.sigmoid(t["a"] - 3)), 1000),
        (lambda t: NegativeBinomial(3.0, logits=t["a"] + 5), 1000),
    ],
)
def test_counts_are_summed_however_far_they_reach_with_few_nodes(law, most):
    some = laws(drawn(40, a=0.3), law)
    nodes = nodes_for(some)
    assert nodes.kind == "quadrature"
    assert len(nodes) < most
    x = torch.arange(60_000).double()[:, None]
    p, q = some.at(slice(0, 20)), some.at(slice(20, 40))
    for divergence in (KL(), SquaredHellinger()):
        total = divergence.integrand(p.log_prob(x), q.log_prob(x)).sum(0)
        torch.testing.assert_close(on(nodes, divergence, p, q), total, rtol=1e-9, atol=1e-11)


FINITE = {
    "bernoulli": (lambda t: Bernoulli(logits=t["a"]), 2),
    "binomial": (lambda t: Binomial(7, logits=t["a"]), 8),
    "categorical": (lambda t: Categorical(logits=torch.stack([t["a"], t["b"], -t["a"]], -1)), 3),
    "one hot": (lambda t: OneHotCategorical(logits=torch.stack([t["a"], t["b"]], -1)), 2),
    "product": (lambda t: Independent(Bernoulli(logits=torch.stack([t["a"], t["b"]], -1)), 1), 4),
    "mixture": (
        lambda t: MixtureSameFamily(
            Categorical(logits=torch.stack([t["a"], t["b"]], -1)),
            Binomial(5, logits=torch.stack([t["a"], t["b"]], -1)),
        ),
        6,
    ),
}


@pytest.mark.parametrize("name", FINITE)
def test_a_finite_support_is_enumerated(name):
    law, atoms = FINITE[name]
    nodes = nodes_for(laws(drawn(30, a=1.0, b=1.0), law))
    assert (nodes.kind, len(nodes)) == ("enumeration", atoms)
    assert nodes.defect < 1e-6  # torch rounds Categorical's probabilities


def test_members_of_a_batch_may_differ_in_how_many_atoms_they_have():
    counts = torch.tensor([2.0, 5.0]).double()
    two = laws(drawn(3, a=1.0), lambda t: Binomial(counts, logits=t["a"][:, None]))
    nodes = nodes_for(two)
    p, q = two.at(slice(0, 1)), two.at(slice(1, 2))
    total = KL().excess(nodes.log_mass(p), nodes.log_mass(q)).sum(-1)
    torch.testing.assert_close(total, kl_divergence(p, q), rtol=1e-10, atol=0)


@pytest.mark.parametrize(("trials", "classes", "atoms"), [(0, 3, 1), (1, 4, 4), (10, 3, 66)])
def test_the_counts_of_a_multinomial_are_enumerated_where_there_are_few(trials, classes, atoms):
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(5, classes, generator=g, dtype=torch.float64)
    law = partial(Multinomial, trials)
    some = laws({"logits": logits}, lambda t: law(logits=t["logits"]))
    nodes = nodes_for(some)
    distinct = {*map(tuple, nodes.points.reshape(atoms, -1).tolist())}
    assert (nodes.kind, len(nodes), len(distinct)) == ("enumeration", atoms, atoms)
    assert nodes.defect < 1e-13 * atoms
    p, q = some.at(slice(0, 1)), some.at(slice(1, 2))
    # a multinomial is so many independent draws of a class
    exact = trials * kl_divergence(*(Categorical(logits=x) for x in logits[:2]))
    torch.testing.assert_close(on(nodes, KL(), p, q).squeeze(), exact, rtol=1e-12, atol=1e-14)


def test_a_multinomial_with_very_many_counts_is_sampled():
    some = laws({"p": torch.full((3, 20), 0.05).double()}, lambda t: Multinomial(100, t["p"]))
    assert nodes_for(some, size=50).kind == "importance"


def test_a_batch_has_nodes_for_all_its_members():
    theta = drawn(20, a=1.0, b=0.2)
    where = torch.tensor([-30.0, 0.0, 1e3]).double()
    batch = laws(theta, lambda t: Normal(t["a"][:, None] + where, t["b"].exp()[:, None]))
    nodes = nodes_for(batch)
    p, q = batch.at(slice(0, 10)), batch.at(slice(10, 20))
    total = KL().excess(nodes.log_mass(p), nodes.log_mass(q)).sum(-1)
    torch.testing.assert_close(total, kl_divergence(p, q), rtol=1e-9, atol=1e-11)


def vectors(count=200, seed=0):
    g = torch.Generator().manual_seed(seed)
    loc = torch.randn(count, 2, generator=g, dtype=torch.float64) / 2
    return laws({"loc": loc}, lambda t: MultivariateNormal(t["loc"], torch.eye(2).double()))


def test_what_has_no_line_is_sampled_from_the_predictive_and_depends_on_the_seed_alone():
    before = torch.random.get_rng_state()
    one, same, other = (nodes_for(vectors(), size=300, seed=s) for s in (0, 0, 1))
    assert torch.equal(before, torch.random.get_rng_state())
    assert one.kind == "importance"
    assert torch.equal(one.points, same.points)
    assert not torch.equal(one.points, other.points)


def test_an_importance_sample_is_right_on_average_and_within_its_scatter():
    some = vectors()
    p, q = some.at(slice(0, 1)), some.at(slice(1, 2))
    exact = kl_divergence(p, q).item()
    found = [on(nodes_for(some, size=500, seed=s), KL(), p, q).item() for s in range(20)]
    mean, error = torch.tensor(found).mean(), torch.tensor(found).std() / math.sqrt(20)
    assert abs(mean - exact) < 4 * error
    assert error < 0.05 * exact


def test_the_totals_of_an_importance_sample_average_to_one():
    weights = torch.rand(200, generator=torch.Generator().manual_seed(1)).double()
    some = vectors()
    some = laws(some.theta, some.law, weights)
    nodes = nodes_for(some, size=100)
    totals = nodes.log_mass(some.at(slice(None))).exp().sum((-1, -2))
    assert (some.weights * totals).sum().item() == pytest.approx(1, abs=1e-12)
    assert nodes.defect == pytest.approx((totals - 1).abs().max().item())


def test_laws_too_narrow_for_where_they_lie_are_sampled():
    theta = {"loc": torch.linspace(-1, 1, 2000).double()}
    nodes = nodes_for(laws(theta, lambda t: Normal(t["loc"], 1e-6)), size=100)
    assert nodes.kind == "importance"


class Louder(Normal):
    """A law that has the total sqrt(e)."""

    def log_prob(self, value):
        return super().log_prob(value) + 0.5


def test_a_law_of_another_total_is_refused_with_its_figure():
    with pytest.raises(
        ValueError, match=r"family must make distributions of total 1 .* has 1\.64872 on the nodes"
    ):
        nodes_for(laws(drawn(9, a=1.0), lambda t: Louder(t["a"], 1.0)))


def test_a_support_that_moves_is_refused_with_what_to_use_instead():
    with pytest.raises(
        ValueError, match=r"moves from draw to draw \(upper_bound\).*Hold the edge"
    ):
        nodes_for(laws(drawn(9, a=1.0), lambda t: Uniform(0.0, t["a"].exp())))


def test_a_law_that_ignores_the_number_of_draws_is_refused():
    with pytest.raises(ValueError, match=r"one distribution for each of 9 draws.*got \[\]"):
        nodes_for(laws(drawn(9, a=1.0), lambda t: Normal(t["a"].mean(), 1.0)))


def test_kinks_that_lie_elsewhere_for_every_draw_leave_a_defect_that_is_stated():
    nodes = nodes_for(laws(drawn(200, a=1.0, b=0.2), lambda t: Laplace(t["a"], t["b"].exp())))
    assert 1e-9 < nodes.defect < 1e-3


def test_a_poorer_rule_over_the_same_panels_tells_the_error():
    some = laws(drawn(100, a=1.0, b=0.3), lambda t: StudentT(3.0, t["a"], t["b"].exp()))
    nodes = nodes_for(some, JensenShannon())
    p, q = some.at(slice(0, 50)), some.at(slice(50, 100))
    assert nodes.coarse is not None
    assert len(nodes.coarse) < len(nodes)
    off = on(nodes.coarse, Jeffreys(), p, q) - on(nodes, Jeffreys(), p, q)
    assert 0 < off.abs().max() < 1e-6


def test_reverse_and_forward_exchange_the_laws_on_nodes_too():
    some = laws(drawn(10, a=1.0), lambda t: StudentT(3.0, t["a"]))
    nodes = nodes_for(some)
    p, q = some.at(slice(0, 5)), some.at(slice(5, 10))
    torch.testing.assert_close(on(nodes, KL(), p, q), on(nodes, ReverseKL(), q, p))


class Below(Gamma):
    """Minus a gamma law."""

    support = torch.distributions.constraints.less_than(0.0)

    def sample(self, sample_shape=()):
        return -super().sample(sample_shape)

    def log_prob(self, value):
        return super().log_prob(-value)


class Silent(torch.distributions.Distribution):
    """A law that can do nothing but count."""

    arg_constraints = {}

    def __init__(self, loc):
        super().__init__(loc.shape, validate_args=False)


def test_a_half_line_may_end_above():
    some = laws(drawn(50, a=0.5), lambda t: Below(1 + t["a"].exp(), 1.0, validate_args=False))
    nodes = nodes_for(some)
    assert (nodes.points < 0).all()
    assert nodes.defect < 1e-10


def test_a_law_that_cannot_be_sampled_or_says_no_support_is_refused():
    with pytest.raises(ValueError, match="family must make distributions that have a support"):
        nodes_for(laws(drawn(9, a=1.0), lambda t: Silent(t["a"])))


@pytest.mark.parametrize("kind", [Beta, Kumaraswamy])
@pytest.mark.parametrize("a", [0.07, 0.5, 3.0])
@pytest.mark.parametrize("b", [0.07, 0.5, 3.0])
def test_densities_by_the_logit_keep_their_digits_at_both_ends(kind, a, b):
    law = on_logits(kind(*torch.tensor([a, b], dtype=torch.float64)))
    for u in (-300.0, -2.0, 0.0, 1.0, 50.0, 300.0):
        with mpmath.workdps(200):
            x, a_, b_ = 1 / (1 + mpmath.exp(-u)), mpmath.mpf(a), mpmath.mpf(b)
            if kind is Beta:
                density = x ** (a_ - 1) * (1 - x) ** (b_ - 1) / mpmath.beta(a_, b_)
            else:
                density = a_ * b_ * x ** (a_ - 1) * (1 - x**a_) ** (b_ - 1)
            wanted = float(mpmath.log(density * x * (1 - x)))
        # a and b in double precision, times u, and a few roundings
        assert math.isclose(law.log_prob(torch.tensor(u).double()), wanted, rel_tol=1e-12)


@pytest.mark.parametrize("kind", [Beta, Kumaraswamy])
def test_samples_of_logits_are_those_of_the_numbers(kind):
    torch.manual_seed(0)
    a, b = torch.tensor([0.07, 0.4], dtype=torch.float64)
    u = on_logits(kind(a, b)).sample(torch.Size([4000]))
    below = torch.sigmoid(u) < 0.5
    exact = 1 - (1 - 0.5**a) ** b
    if kind is Beta:
        exact = torch.tensor(float(mpmath.betainc(0.07, 0.4, 0, 0.5, regularized=True)))
    assert (below.double().mean() - exact).abs() < 5 * (exact * (1 - exact) / 4000).sqrt()
    assert u.isfinite().all()


def test_panels_begin_in_samples_of_more_numbers_than_the_quantiles_of_torch_take():
    members = torch.arange(2**22, dtype=torch.float64) / 2**22
    sample = torch.tensor([4.0, 0.0, 1.0, 3.0, 2.0])[:, None] + members
    line = line_of(None, None, "line", sample)
    torch.testing.assert_close(line.origin, 2 + members)
    assert bool((line.length == 1).all())
    places = torch.linspace(0, 16, 2**24 + 1, dtype=torch.float64)[:, None]
    edges = _first(line, places, 0.0, 16.0)
    torch.testing.assert_close(edges, torch.arange(17.0).double().unfold(0, 2, 1))

"""What an exponential family is: its maps, its divergences, and the laws all of them obey."""

import functools
import math
from dataclasses import dataclass

import jaxtyping
import mpmath
import pytest
import torch
from found import (
    DENSITIES,
    FAMILIES,
    FIXED,
    every_family,
    law_of,
    laws,
    log_masses,
    one,
    size_of,
    summed_kl,
)
from torch.autograd.functional import hessian  # torch.func's is wrong through cholesky_inverse
from torch.distributions import (
    Binomial,
    Categorical,
    Normal,
    Poisson,
    kl_divergence,
)

from rkl import (
    KL,
    Amari,
    Jeffreys,
    JensenShannon,
    NeymanChiSquare,
    PearsonChiSquare,
    ReverseKL,
    SquaredHellinger,
)
from rkl.bayes.families import ExponentialFamily, family_of
from rkl.bayes.families.gamma import GammaFamily
from rkl.bayes.families.normal import NormalFamily
from rkl.bayes.loss.between import divergence_between


def close(got, expected, tolerance=1e-10):
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


def vector(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


# The maps


@every_family
def test_natural_parameters_lead_back_to_the_law(name):
    law = laws(name, 4, 5)
    family = family_of(law)
    natural = family.natural(law)
    family.check(natural)
    assert [x.ndim - 2 for x in natural] == [*family.events]
    back = family.from_natural(natural)
    assert type(back) is type(law)
    assert back.batch_shape == law.batch_shape == family.log_partition(natural).shape
    assert family_of(back) == family
    close(family.natural(back), natural)
    for parameter in family.parameters:
        close([getattr(back, parameter)], [getattr(law, parameter)])


@every_family
def test_mean_parameters_lead_back_to_natural_ones(name):
    law = laws(name, 50)
    family = family_of(law)
    natural = family.natural(law)
    mean = family.mean(natural)
    family.check_mean(mean)
    close(family.from_mean(mean), natural)
    close(family.from_mean(one(mean, 7)), one(natural, 7))


@every_family
def test_maps_may_be_differentiated_there_and_back(name):
    law = laws(name, 5)
    family = family_of(law)
    leaves = tuple(x.requires_grad_() for x in family.natural(law))
    weight = tuple((x.detach() + 1).sin() for x in leaves)
    if name in {"Categorical", "OneHotCategorical", "Multinomial"}:  # whose constant is arbitrary
        weight = (weight[0] - weight[0].mean(-1, keepdim=True),)
    back = family.from_mean(family.mean(leaves))
    slopes = torch.autograd.grad(family.inner(weight, back).sum(), leaves)
    for slope, w, axes in zip(slopes, weight, family.events, strict=True):
        if axes == 2:  # of a symmetric matrix, of which all but the symmetric part is arbitrary
            slope = (slope + slope.mT) / 2
        close([slope], [w], 1e-8)


@every_family
def test_mean_is_the_gradient_of_the_log_partition(name):
    law = laws(name, 20)
    family = family_of(law)
    natural = family.natural(law)
    close(family.mean(natural), ExponentialFamily.mean(family, natural))


def conjugate(family, mean):
    """A*(m) = max over η of ⟨η, m⟩ − A(η): minus the entropy, less E log h."""
    natural = family.from_mean(mean)
    return family.inner(natural, mean) - family.log_partition(natural)


@every_family
def test_the_conjugate_of_the_log_partition_meets_it_at_the_mean(name):
    law = laws(name, 20)
    family = family_of(law)
    natural = family.natural(law)
    mean = family.mean(natural)
    assert_conjugate = family.log_partition(natural) + conjugate(family, mean)
    close([assert_conjugate], [family.inner(natural, mean)])


def density_defect(family, law, x):
    """How far log p(x) − ⟨η, T(x)⟩ + A(η), which is log h(x), moves with the law."""
    natural = family.natural(law)
    statistic = tuple(t.unsqueeze(1) for t in family.statistic(x))
    base = law.log_prob(x.unsqueeze(1)) - family.inner(statistic, natural)
    base = base + family.log_partition(natural)
    return (base - base[:, :1]).abs().max()


def seen(name, law):
    """Values in the support of each law; of Wishart its scale, for torch draws singular ones."""
    torch.manual_seed(0)
    return law.covariance_matrix if name == "Wishart" else law.sample()


@every_family
def test_density_is_that_of_an_exponential_family(name):
    law = laws(name, 6)
    x = seen(name, law)
    # torch.distributions.VonMises knows its own normalisation to 3e-7 only.
    assert density_defect(family_of(law), law, x) < (1e-6 if name == "VonMises" else 1e-9)


@every_family
def test_origin_changes_neither_law_nor_divergence(name):
    law, other = laws(name, 6), laws(name, 6, seed=1)
    family = family_of(law)
    about = family.about(family.from_natural(one(family.natural(law), 2)))
    p, q = about.natural(law), about.natural(other)
    close([about.kl(p, q)], [family.kl(family.natural(law), family.natural(other))], 1e-9)
    close(family.natural(about.from_natural(p)), family.natural(law))
    assert density_defect(about, law, seen(name, law)) < 1e-6


@dataclass(frozen=True, eq=False)
class WrongPartition(NormalFamily):
    """A normal family that forgets half of the logarithm of its scale."""

    def log_partition(self, natural):
        return super().log_partition(natural) - (-natural[1]).log() / 4


@dataclass(frozen=True, eq=False)
class OnlyPartition(GammaFamily):
    """A gamma family that leaves to its log-partition what follows from it."""

    mean, from_mean, kl = ExponentialFamily.mean, ExponentialFamily.from_mean, ExponentialFamily.kl
    log_fisher = ExponentialFamily.log_fisher

    def start(self, mean):
        return torch.ones_like(mean[0]), -torch.ones_like(mean[0])


def test_wrong_log_partition_fails_the_laws():
    law, toy = laws("Normal", 6), WrongPartition()
    natural = toy.natural(law)
    assert density_defect(toy, law, law.sample()) > 0.01
    with pytest.raises(AssertionError):
        close(toy.mean(natural), ExponentialFamily.mean(toy, natural))
    kl = ExponentialFamily.kl(toy, natural, one(natural, [0]))
    assert (kl - kl_divergence(law, Normal(law.loc[0], law.scale[0]))).abs().max() > 0.01


def test_everything_follows_from_the_log_partition_where_no_better_form_is_given():
    law, toy, family = laws("Gamma", 20), OnlyPartition(), GammaFamily()
    natural = toy.natural(law)
    close(toy.mean(natural), family.mean(natural))
    close(toy.from_mean(family.mean(natural)), natural)
    close([toy.kl(natural, one(natural, [3]))], [family.kl(natural, one(natural, [3]))])
    # torch's second derivative of log Γ is right to 1e-9 only.
    close([toy.log_fisher(law)], [family.log_fisher(law)], 1e-7)


# Divergences


@every_family
def test_kl_is_the_sum_over_what_can_be_observed(name):
    p, q = laws(name, 3), laws(name, 3, seed=1)
    family = family_of(p)
    got = family.kl(family.natural(p), family.natural(q))
    tolerance = 1e-8 if name == "Wishart" else 1e-10  # the lattice of three axes is coarse
    for i in range(3):
        single = [family.from_natural(one(family.natural(law), i)) for law in (p, q)]
        assert got[i].item() == pytest.approx(summed_kl(name, *single).item(), rel=tolerance)


@every_family
def test_kl_agrees_with_torch_where_torch_has_one(name):
    p, q = laws(name, 20), laws(name, 20, seed=1)
    family = family_of(p)
    try:
        expected = kl_divergence(p, q)
    except NotImplementedError:
        pytest.skip("torch registers none")
    if name == "Wishart":  # torch sums a term of these over the batch, but not of a single law
        singles = [
            [family.from_natural(one(family.natural(law), i)) for i in range(20)] for law in (p, q)
        ]
        expected = torch.stack([kl_divergence(*pair) for pair in zip(*singles, strict=True)])
    close([family.kl(family.natural(p), family.natural(q))], [expected.detach()])


@every_family
def test_kl_broadcasts_draws_against_one_law(name):
    law = laws(name, 4, 5)
    family = family_of(law)
    natural = family.natural(law)
    first = one(natural, 0)
    apart = torch.stack([family.kl(one(natural, i), first) for i in range(4)])
    close([family.kl(natural, first)], [apart], 1e-14)
    assert family.kl(first, natural).shape == (4, 5)


@every_family
def test_kl_keeps_its_digits_where_the_laws_are_near(name):
    law = laws(name, 8)
    family = family_of(law)
    p = family.natural(law)
    step = tuple(x - y for x, y in zip(one(p, [0] * 8), p, strict=True))
    near = [family.along(p, step, torch.full((8,), t, dtype=torch.float64)) for t in (1e-5, 1e-6)]
    large, small = (family.kl(p, q) for q in near)
    # Quadratic to leading order, with a relative correction of the order of the step.
    torch.testing.assert_close(small[1:] * 100, large[1:], rtol=1e-3, atol=1e-13)
    assert family.kl(p, p).abs().max() < 1e-14


@every_family
def test_terms_of_a_draw_are_what_the_acts_average(name):
    law = laws(name, 4, 5)
    family = family_of(law)
    reference = one(family.natural(laws(name, 1, 5, seed=1)), 0)
    terms = family.terms(law, reference)
    natural = family.natural(law)
    close(terms.natural, natural)
    close(terms.mean, family.mean(natural))
    close([terms.from_reference], [family.kl(reference, natural)])
    close([terms.to_reference], [family.kl(natural, reference)])


DIVERGENCES = [
    KL(),
    ReverseKL(),
    Jeffreys(),
    Amari(0.3),
    SquaredHellinger(),
    PearsonChiSquare(),
    NeymanChiSquare(),
    Amari(-0.4) + 0.5 * Jeffreys(),
]


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
@every_family
def test_divergences_within_a_family_are_those_of_the_sum(name, divergence):
    p, q = laws(name, 2, spread=0.2), laws(name, 2, spread=0.2, seed=1)
    family = family_of(p)
    natural = family.natural(p), family.natural(q)
    got = divergence_between(family, divergence, *natural)
    masses = [log_masses(name, family.from_natural(one(x, 0))) for x in natural]
    assert got.shape == (2,)
    expected = divergence.excess(*masses).sum().item()
    if got[0] == math.inf:
        assert expected > 1e20  # so large as the lattice is wide
    else:
        assert got[0].item() == pytest.approx(expected, rel=1e-7)


def test_chi_square_is_infinite_where_the_mixture_is_no_law():
    q = Normal(0.0, torch.ones(4, dtype=torch.float64))
    p = Normal(0.5, vector(1.0, 1.4, 1.42, 3.0))  # infinite from the root of 2
    family = family_of(q)
    got = divergence_between(family, PearsonChiSquare(), family.natural(p), family.natural(q))
    assert got.isfinite().tolist() == [True, True, False, False]
    assert got[0].item() == pytest.approx(math.expm1(0.25))
    reverse = NeymanChiSquare() + KL()
    assert divergence_between(family, reverse, family.natural(q), family.natural(p))[2] == math.inf


def test_divergences_without_closed_form_are_refused():
    law = laws("Normal", 2)
    family = family_of(law)
    with pytest.raises(NotImplementedError, match="JensenShannon.*no closed form"):
        divergence_between(
            family, KL() + JensenShannon(), family.natural(law), family.natural(law)
        )


# The acts


def cloud(name, draws=40):
    """Laws of a posterior, the natural parameters of both acts, and candidates."""
    law = laws(name, draws)
    family = family_of(law)
    natural = family.natural(law)
    reverse = tuple(x.mean(0) for x in natural)
    forward = family.from_mean(tuple(x.mean(0) for x in family.mean(natural)))
    return family, natural, reverse, forward, family.natural(laws(name, 9, seed=1))


@every_family
def test_excess_risk_is_the_divergence_from_the_act(name):
    family, natural, reverse, forward, candidates = cloud(name)
    draws = tuple(x.unsqueeze(1) for x in natural)
    risk = family.kl(candidates, draws).mean(0) - family.kl(reverse, natural).mean()
    close([risk], [family.kl(candidates, reverse)])
    risk = family.kl(draws, candidates).mean(0) - family.kl(natural, forward).mean()
    close([risk], [family.kl(forward, candidates)])


@every_family
def test_risk_of_an_act_is_a_jensen_gap(name):
    family, natural, reverse, forward, _ = cloud(name)
    gap = family.log_partition(natural).mean() - family.log_partition(reverse)
    close([family.kl(reverse, natural).mean()], [gap])
    mean = family.mean(natural)
    gap = conjugate(family, mean).mean() - conjugate(family, tuple(x.mean(0) for x in mean))
    close([family.kl(natural, forward).mean()], [gap])


def wishart_kl(p, q):
    """Source: Soch and Allefeld (2016), arXiv 1611.01437, eq. (18)."""
    halves = torch.arange(2, dtype=torch.float64) / 2
    digamma = torch.digamma(p.df / 2 - halves).sum()
    partition = torch.mvlgamma(q.df / 2, 2) - torch.mvlgamma(p.df / 2, 2)
    ratio = q.precision_matrix @ p.covariance_matrix
    scales = p.df * (ratio.trace() - 2) - q.df * ratio.logdet()
    return scales / 2 + partition + (p.df - q.df) / 2 * digamma


# In place of a lattice of a million nodes.
QUICKER = {
    "GaussianRegression": lambda p, q: kl_divergence(p.rows, q.rows).sum(),
    "Wishart": wishart_kl,
}


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@every_family
def test_acts_are_where_a_numerical_minimiser_ends(name, direction):
    family, natural, reverse, forward, _ = cloud(name, draws=3)
    posterior = [family.from_natural(one(natural, i)) for i in range(3)]
    found = torch.zeros(size_of(name), dtype=torch.float64, requires_grad=True)
    kl = QUICKER.get(name, functools.partial(summed_kl, name))
    # A gradient g leaves g²/2 over the curvature, in nats: 1e-7 is far below what is asked for,
    # and far above the rounding among which a line search would find no way down.
    steps = torch.optim.LBFGS(
        [found],
        max_iter=60,
        tolerance_grad=1e-7,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )

    def risk():
        steps.zero_grad()
        act = law_of(name, found)
        pairs = [(act, x) if direction == "reverse" else (x, act) for x in posterior]
        loss = sum(kl(*pair) for pair in pairs) / len(pairs)
        loss.backward()
        return loss

    steps.step(risk)
    minimum = family.natural(law_of(name, found.detach()))
    act = reverse if direction == "reverse" else forward
    assert family.kl(minimum, act) < 1e-9  # nats; the parameters then agree to about 1e-5


def posterior_mean(family, law, log_density):
    """The mean natural parameter under a posterior given on a lattice."""
    weight = log_density.softmax(-1)
    return tuple((weight * x).sum(-1, keepdim=True) for x in family.natural(law))


@pytest.mark.parametrize(("r", "published"), [(0, 0.01384), (1, 0.10328), (3, 0.30078)])
def test_binomial_act_is_the_published_one(r, published):
    # Beta(1/2, 1/2) prior, 10 trials; the posterior of the logit on a lattice
    logit = torch.arange(-150, 150, 0.01, dtype=torch.float64)
    law = Binomial(10, logits=logit)
    family = family_of(law)
    log_posterior = (r + 0.5) * logit - 11 * torch.nn.functional.softplus(logit)
    (act,) = posterior_mean(family, law, log_posterior)
    expected = 1 / (1 + mpmath.exp(mpmath.digamma(10.5 - r) - mpmath.digamma(r + 0.5)))
    assert act.sigmoid().item() == pytest.approx(float(expected), abs=1e-10)
    assert act.sigmoid().item() == pytest.approx(published, abs=5e-6)


def test_conjugate_posteriors_give_the_closed_acts():
    log = torch.arange(-150, 150, 0.01, dtype=torch.float64)
    gamma = 2.5 * log - 1.3 * log.exp()  # Gamma(2.5, 1.3) of what exp(log) stands for
    rate = posterior_mean(FAMILIES["Poisson"](), Poisson(log.exp()), gamma)[0].exp()
    assert rate.item() == pytest.approx(float(mpmath.exp(mpmath.digamma(2.5)) / 1.3), rel=1e-10)
    variance = posterior_mean(NormalFamily(), Normal(0.0 * log, (-log / 2).exp()), gamma)
    assert (-0.5 / variance[1]).item() == pytest.approx(1.3 / 2.5, rel=1e-10)
    # Dirichlet(0.5, 2, 3) posterior of the probabilities: log-probabilities average to ψ(a)
    t = torch.arange(-100, 100, 0.25, dtype=torch.float64)
    grid = torch.cartesian_prod(t, t)
    logits = torch.cat([grid, torch.zeros(len(grid), 1, dtype=torch.float64)], -1)
    law = Categorical(logits=logits)
    weight = (law.logits @ vector(0.5, 2.0, 3.0)).softmax(-1)
    act = (weight @ family_of(law).natural(law)[0]).softmax(-1)
    expected = torch.digamma(vector(0.5, 2.0, 3.0)).softmax(-1)
    torch.testing.assert_close(act, expected, rtol=1e-10, atol=0.0)


# Fisher information


@every_family
def test_fisher_information_is_the_curvature_of_the_divergence(name):
    law = laws(name, 3)
    family = family_of(law)
    for i in range(3):
        single = family.from_natural(one(family.natural(law), i))
        curvature = hessian(functools.partial(_kl_of, family, single), _free(family, single))
        # torch's second derivative of log Γ is right to 1e-9 only.
        expected = torch.linalg.slogdet(curvature)[1]
        torch.testing.assert_close(family.log_fisher(law)[i], expected, rtol=1e-7, atol=1e-7)


def _free(family, law):
    """A law's own parameters without those that others determine."""
    parts = []
    for parameter in family.parameters:
        value = getattr(law, parameter)
        if parameter == "covariance_matrix":
            parts.append(value[torch.tril_indices(*value.shape).unbind()])
        elif parameter == "probs" and value.ndim:
            parts.append(value[:-1])
        else:
            parts.append(value.reshape(-1))
    return torch.cat(parts)


def _kl_of(family, law, free):
    own, at = {}, 0
    for parameter in family.parameters:
        value = getattr(law, parameter)
        if parameter == "covariance_matrix":
            rows, columns = torch.tril_indices(*value.shape).unbind()
            part = free[at : at + len(rows)]
            lower = value.new_zeros(value.shape).index_put((rows, columns), part)
            own[parameter], at = lower + lower.tril(-1).mT, at + len(rows)
        elif parameter == "probs" and value.ndim:
            part = free[at : at + len(value) - 1]
            own[parameter] = torch.cat([part, 1 - part.sum(-1, keepdim=True)])
        else:
            part = free[at : at + value.numel()]
            own[parameter], at = part.reshape(value.shape), at + value.numel()
    fixed = FIXED.get(type(law).__name__, {})
    moved = type(law)(**own, **fixed, validate_args=False)
    return family.kl(tuple(x.detach() for x in family.natural(law)), family.natural(moved))


# The table


def test_every_family_is_named_and_measured():
    assert FAMILIES.keys() == DENSITIES.keys()
    for kind in FAMILIES.values():
        assert len(kind.events) == len(kind.names) == len(kind.mean_names)
        assert kind.__doc__


@pytest.mark.parametrize("name", ["Normal", "LogNormal", "Gamma", "Beta", "Poisson", "Bernoulli"])
def test_one_pass_compiles_in_one_graph(name, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # no compiler traces these
    law = laws(name, 5)
    family = family_of(law)
    reference = one(family.natural(law), 0)
    own = {parameter: getattr(law, parameter) for parameter in family.parameters}

    def one_pass(own):
        return family.terms(family.distribution(**own, validate_args=False), reference)

    torch.compiler.reset()
    compiled = torch.compile(one_pass, backend="eager", fullgraph=True)(own)
    expected = one_pass(own)
    # the same few operations, which a compiler may fuse: some last digits
    close([*compiled.natural, *compiled.mean], [*expected.natural, *expected.mean], 1e-13)
    close(compiled[2:], expected[2:], 1e-13)

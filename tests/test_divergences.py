"""What each divergence is: its value, its gradient, its kin, and the laws all of them obey."""

import dataclasses
import math

import mpmath
import pytest
import torch
from catalogued import ALL, F, every, every_f, pair
from torch.distributions import (
    AbsTransform,
    AffineTransform,
    Bernoulli,
    Beta,
    Binomial,
    Categorical,
    ContinuousBernoulli,
    Gamma,
    Geometric,
    HalfNormal,
    Independent,
    Laplace,
    LogNormal,
    MultivariateNormal,
    Normal,
    OneHotCategorical,
    Pareto,
    Poisson,
    Transform,
    TransformedDistribution,
    Uniform,
    Wishart,
    kl_divergence,
)

import rkl
from rkl.kernels import chunk_step
from rkl.testing import check_divergence


@every
def test_laws(divergence):
    check_divergence(divergence)


def _precision_half(p, q, lam):
    """∫ over l ≥ λ of (min(l, 1) − Σ min(lp, q)) / l², by quadrature between its kinks."""
    kinks = [y / x for x, y in zip(p, q, strict=True)] + [mpmath.mpf(1)]
    kinks = [mpmath.mpf(lam), *sorted(kink for kink in kinks if kink > lam)]
    pieces = [*kinks, mpmath.inf]
    return mpmath.quad(
        lambda lam: (min(lam, 1) - sum(map(min, [lam * x for x in p], q))) / lam**2, pieces
    )


def kl(p, q):
    return sum(x * mpmath.log(x / y) for x, y in zip(p, q, strict=True))


def mixed(p, q, w):
    return [w * x + (1 - w) * y for x, y in zip(p, q, strict=True)]


def tv(p, q):
    return sum(abs(x - y) for x, y in zip(p, q, strict=True)) / 2


def normalised(masses):
    return [x / sum(masses) for x in masses]


def _alpha_mixture(p, q, alpha, lam):
    """As written in the docstring of AMiD."""
    if alpha == 1:
        return normalised([x**lam * y ** (1 - lam) for x, y in zip(p, q, strict=True)])
    k = mpmath.mpf(1 - alpha) / 2
    powers = [lam * x**k + (1 - lam) * y**k for x, y in zip(p, q, strict=True)]
    return normalised([x ** (1 / k) for x in powers])


def _taid(p, q, t):
    return kl(normalised([x**t * y ** (1 - t) for x, y in zip(p, q, strict=True)]), q)


def _lk_hybrid(p, q, eta):
    lam = mpmath.exp(-eta * (1 - tv(p, q)))
    return lam * kl(p, q) + (1 - lam) * tv(p, q)


def _entropy_aware(p, q, tau):
    entropy = -sum(x * mpmath.log(x) for x in p)
    return kl(q, p) + (kl(p, q) if entropy > tau else 0)


REFERENCES = {
    "TAID(t=0.2)": lambda p, q: _taid(p, q, 0.2),
    "TAID(t=0.5)": lambda p, q: _taid(p, q, 0.5),
    "LKHybrid(eta=3.0)": lambda p, q: _lk_hybrid(p, q, 3),
    "LKHybrid(eta=0.5)": lambda p, q: _lk_hybrid(p, q, 0.5),
    "NegLogAcceptance()": lambda p, q: -mpmath.log(sum(map(min, p, q))),
    "EntropyAwareReverseKL(tau=0.8)": lambda p, q: _entropy_aware(p, q, 0.8),
    "AMiD(alpha=-3.0, lam=0.1)": lambda p, q: kl(p, _alpha_mixture(p, q, -3, mpmath.mpf(0.1))),
    "AMiD(alpha=-1.0, lam=0.3)": lambda p, q: kl(p, _alpha_mixture(p, q, -1, mpmath.mpf(0.3))),
    "AMiD(alpha=1.0, lam=0.3)": lambda p, q: kl(p, _alpha_mixture(p, q, 1, mpmath.mpf(0.3))),
    "AMiD(alpha=3.0, lam=0.9)": lambda p, q: kl(p, _alpha_mixture(p, q, 3, mpmath.mpf(0.9))),
    "KL()": kl,
    "ReverseKL()": lambda p, q: kl(q, p),
    "Jeffreys()": lambda p, q: kl(p, q) + kl(q, p),
    "JensenShannon(beta=0.9)": lambda p, q: (
        0.9 * kl(p, mixed(p, q, 0.9)) + 0.1 * kl(q, mixed(p, q, 0.9))
    ),
    "SkewKL(alpha=0.1)": lambda p, q: kl(p, mixed(p, q, 0.1)),
    "SkewReverseKL(alpha=0.1)": lambda p, q: kl(q, mixed(q, p, 0.1)),
    "TotalVariation()": lambda p, q: sum(abs(x - y) for x, y in zip(p, q, strict=True)) / 2,
    "SquaredHellinger()": lambda p, q: (
        1 - sum(mpmath.sqrt(x * y) for x, y in zip(p, q, strict=True))
    ),
    "PearsonChiSquare()": lambda p, q: sum((x - y) ** 2 / y for x, y in zip(p, q, strict=True)),
    "NeymanChiSquare()": lambda p, q: sum((x - y) ** 2 / x for x, y in zip(p, q, strict=True)),
    "Amari(alpha=-2.0)": lambda p, q: (
        (sum(x**-2 * y**3 for x, y in zip(p, q, strict=True)) - 1) / 6
    ),
    "Amari(alpha=0.5)": lambda p, q: (
        (sum(mpmath.sqrt(x * y) for x, y in zip(p, q, strict=True)) - 1) / -0.25
    ),
    "AlphaBeta(alpha=0.2, beta=0.7)": lambda p, q: sum(
        x**0.9 / (0.7 * 0.9) + y**0.9 / (0.2 * 0.9) - x**0.2 * y**0.7 / 0.14
        for x, y in zip(p, q, strict=True)
    ),
    "PrecisionRecall(lam=10.0)": lambda p, q: (
        1 - sum(min(10 * x, y) for x, y in zip(p, q, strict=True))
    ),
    "PrecisionRecall(lam=0.1)": lambda p, q: (
        mpmath.mpf(0.1) - sum(min(0.1 * x, y) for x, y in zip(p, q, strict=True))
    ),
    "PrecisionHalf(lam=0.2)": lambda p, q: _precision_half(p, q, 0.2),
    "PrecisionHalf(lam=5.0)": lambda p, q: _precision_half(p, q, 5.0),
    "RecallHalf(lam=0.2)": lambda p, q: kl(p, q) - _precision_half(p, q, 0.2),
    "RecallHalf(lam=5.0)": lambda p, q: kl(p, q) - _precision_half(p, q, 5.0),
    "ToDi()": lambda p, q: kl(p, q) + kl(q, p),
}


@pytest.mark.parametrize("divergence", [d for d in ALL if repr(d) in REFERENCES], ids=repr)
def test_value_is_that_of_the_definition_in_fifty_digits(divergence):
    logp, logq = pair(3, 6, scale=1.5)
    with mpmath.workdps(50):
        for row_p, row_q, value in zip(logp, logq, divergence(logp, logq), strict=True):
            p, q = ([mpmath.exp(mpmath.mpf(x)) for x in row.tolist()] for row in (row_p, row_q))
            p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
            assert value.item() == pytest.approx(float(REFERENCES[repr(divergence)](p, q)), 1e-9)


def test_every_divergence_has_a_reference_of_its_own():
    named = {reference.split("(")[0] for reference in REFERENCES}
    missing = {type(d).__name__ for d in ALL} - named
    assert missing <= {"AKL", "_Combination", "_FCombination"}  # AKL has a file of its own


def _gradients(p, q, rho):
    """dD/db = q(g − s) with s = Σ q g: g in closed form, from dF/dq."""
    m = 0.3 * p + 0.7 * q
    return {
        "KL()": -p / q,
        "ReverseKL()": 1 - rho,
        "JensenShannon(beta=0.3)": 0.7 * (q / m).log(),
        "SkewKL(alpha=0.3)": -0.7 * p / m,
        "SkewReverseKL(alpha=0.7)": (q / m).log() + 1 - 0.7 * q / m,
        "TotalVariation()": (q - p).sign() / 2,
        "Amari(alpha=3.0)": -((p / q) ** 3) / 3,
        "AlphaBeta(alpha=0.2, beta=0.7)": -(p**0.2 * q**-0.3 - q**-0.1) / 0.2,
        "PrecisionRecall(lam=2.0)": (q > 2 * p).double(),
        "PrecisionHalf(lam=2.0)": -(p / q).clamp_max(0.5) * 1.0,
        "RecallHalf(lam=2.0)": -(p / q - 0.5).clamp_min(0),
    }


@pytest.mark.parametrize("text", _gradients(*torch.ones(3, 1)))
def test_gradient_in_the_logits_is_the_closed_form(text):
    logp, logq = pair(50, 9)
    p, q = logp.exp(), logq.exp()
    g = _gradients(p, q, logp - logq)[text]
    expected = q * (g - (q * g).sum(-1, keepdim=True))
    gradient = chunk_step(rkl.parse(text), logp, logq, torch.ones_like(logp[:, 0]))[1]
    assert torch.allclose(gradient, expected, rtol=1e-9, atol=1e-12)


@every
def test_extreme_logits_give_no_nan_and_are_finite_where_the_value_is_representable(divergence):
    generator = torch.Generator().manual_seed(0)
    a, b = 1e4 * torch.randn(2, 8, 20, generator=generator)
    value, gradient = chunk_step(divergence, a, b, torch.ones(8))
    assert not value.isnan().any()
    assert gradient.isfinite().all()
    exponential = rkl.PearsonChiSquare, rkl.NeymanChiSquare, rkl.Amari, rkl.AlphaBeta
    assert value.isfinite().all() or isinstance(divergence, exponential)


@every
def test_an_infinite_divergence_pulls_on_nothing(divergence):
    a, b = torch.tensor([[1.0, 2.0, -math.inf]]), torch.tensor([[1.0, -math.inf, 2.0]])
    value, gradient = chunk_step(divergence, a, b, torch.ones(1))
    assert not value.isnan().any()
    assert gradient.isfinite().all()
    partly = rkl.NegLogAcceptance, rkl.TAID  # finite if only p and q share an atom
    parts = [term for _, term in rkl.divergences.base.weighted_terms(divergence)]
    finite = all(it.bounded or (isinstance(it, partly) and it != rkl.TAID(1.0)) for it in parts)
    assert value.isfinite().all() == finite
    assert finite or (gradient == 0).all()


@every
def test_distributions_that_share_no_atom_pull_on_nothing_where_they_are_infinitely_far(
    divergence,
):
    a, b = torch.tensor([[1.0, 2.0, -math.inf]]), torch.tensor([[-math.inf, -math.inf, 2.0]])
    value, gradient = chunk_step(divergence, a, b, torch.ones(1))
    assert not value.isnan().any()
    assert gradient.isfinite().all()
    assert value.isfinite().all() == divergence.bounded
    assert divergence.bounded or (gradient == 0).all()


@every
def test_masked_atoms_are_silent_in_reverse_mode_too(divergence):
    logp, logq = pair(8, 20)
    mask = torch.full((8, 3), -math.inf, dtype=logp.dtype)
    padded, plain = torch.cat([logq, mask], -1).requires_grad_(), logq.clone().requires_grad_()
    (full,) = torch.autograd.grad(divergence(torch.cat([logp, mask], -1), padded).sum(), padded)
    (expected,) = torch.autograd.grad(divergence(logp, plain).sum(), plain)
    assert torch.allclose(full, torch.nn.functional.pad(expected, (0, 3)))


NONE = -math.inf
HALF = math.log(0.5)
JS = math.log(4 / 3) / 2 + math.log(2 / 3) / 4 + math.log(2) / 4  # m = (3/4, 1/4)


@pytest.mark.parametrize(
    ("divergence", "p", "q", "value"),
    [
        # teacher masked
        (rkl.KL(), [HALF, HALF, NONE], [HALF, HALF, NONE], 0.0),
        (rkl.KL(), [0.0, NONE], [HALF, HALF], math.log(2)),
        (rkl.ReverseKL(), [0.0, NONE], [HALF, HALF], math.inf),
        (rkl.JensenShannon(), [0.0, NONE], [HALF, HALF], JS),
        # student masked
        (rkl.KL(), [HALF, HALF], [0.0, NONE], math.inf),
        (rkl.ReverseKL(), [HALF, HALF], [0.0, NONE], math.log(2)),
        (rkl.JensenShannon(), [HALF, HALF], [0.0, NONE], JS),
        # both
        (rkl.ReverseKL(), [HALF, HALF, NONE], [HALF, HALF, NONE], 0.0),
        (rkl.JensenShannon(), [HALF, HALF, NONE], [HALF, HALF, NONE], 0.0),
    ],
)
def test_masked_vocabulary_entries_give_the_right_value_and_no_nan(divergence, p, q, value):
    got, gradient = chunk_step(divergence, torch.tensor([p]), torch.tensor([q]), torch.ones(1))
    assert got.item() == pytest.approx(value, abs=1e-6)
    assert gradient.isfinite().all()


FLAT = [
    *(rkl.KL(), rkl.ReverseKL(), rkl.JensenShannon(), rkl.AKL(), rkl.SkewKL(), rkl.AlphaBeta()),
    rkl.EntropyAwareReverseKL(),
]
MIXED = [rkl.TAID(), rkl.AMiD(), rkl.AMiD(1.0, 0.3), rkl.AMiD(3.0, 0.3)]
KINKED = [rkl.LKHybrid(), rkl.NegLogAcceptance()]


# Logarithms near -10 are rounded by 5e-7, against log-ratios of 3e-4. A flat divergence averages
# that over a few dozen heavy atoms, one over a mixture rounds its logarithm too and has smaller
# ratios, and one with a kink, such as total variation, is not flat. The logarithms are of double
# precision before: in single the sum of a row is off by 1e-5 on some processors, not on others.
@pytest.mark.parametrize(
    ("divergence", "tolerance"),
    [(it, 1e-3) for it in FLAT] + [(it, 2e-3) for it in MIXED] + [(it, 1e-2) for it in KINKED],
    ids=lambda x: repr(x),
)
def test_single_precision_keeps_its_digits_near_agreement(divergence, tolerance):
    generator = torch.Generator().manual_seed(0)
    z = 3 * torch.randn(64, 32_000, generator=generator, dtype=torch.float64)
    noise = 3e-4 * torch.randn(64, 32_000, generator=generator, dtype=torch.float64)
    precise = z.log_softmax(-1), (z + noise).log_softmax(-1)
    p, q = (x.float() for x in precise)
    value, truth = divergence(p, q), divergence(*precise)
    assert rkl.KL()(*precise).mean() < 5e-8
    assert ((value - truth) / truth).abs().max() < tolerance
    assert value.min() >= 0
    assert (divergence(p, p) >= 0).all()


def test_the_series_is_summed_alike_at_few_atoms_and_at_all():
    logp, logq = pair(4, 2000, scale=1.0)
    mostly_near = logp + (logq - logp) * 1e-3
    half = torch.cat([logq[:, :20], mostly_near[:, 20:]], -1).log_softmax(-1)
    few = torch.cat([mostly_near[:, :20], logq[:, 20:]], -1).log_softmax(-1)
    for q in (half, few):
        for divergence in (rkl.KL(), rkl.AKL(), rkl.AlphaBeta()):
            bare = divergence.integrand(logp, q, *divergence.held(logp, q)).sum(-1)
            assert torch.allclose(divergence(logp, q), bare, rtol=1e-9)


@every_f
def test_scale_free_means_that_the_minimiser_stays(divergence):
    x, means = (torch.linspace(-r, r, n, dtype=torch.float64) for r, n in ((6, 501), (2, 41)))
    logp = torch.logaddexp(Normal(-1.2, 0.5).log_prob(x), Normal(1.0, 0.7).log_prob(x))
    logq = Normal(means[:, None], 1.0).log_prob(x)
    logp = logp.expand_as(logq)

    def minimiser(constant):
        return divergence.integrand(logp + constant, logq).sum(-1).argmin()

    stays = minimiser(-0.7) == minimiser(0.0) == minimiser(1.5)
    assert stays or not divergence.scale_free


def test_scale_free_are_the_two_kls_and_the_amari_family():
    free = {type(d) for d in F if d.scale_free}
    amari = {rkl.Amari, rkl.SquaredHellinger, rkl.PearsonChiSquare, rkl.NeymanChiSquare}
    assert free == {rkl.KL, rkl.ReverseKL} | amari
    assert all(rkl.Amari(alpha).scale_free for alpha in (-2, 0.5, 3))
    assert (0.5 * rkl.KL()).scale_free


def test_symmetric_and_bounded_are_what_theory_says():
    symmetric = {repr(d) for d in ALL if d.symmetric}
    assert symmetric == {
        *("Jeffreys()", "ToDi()", "TotalVariation()", "SquaredHellinger()"),
        *("JensenShannon(beta=0.5)", "Amari(alpha=0.5)", "PrecisionRecall(lam=1.0)"),
        *("NegLogAcceptance()", "EntropyAwareReverseKL(tau=0.0)"),
    }
    bounded = {type(d).__name__ for d in ALL if d.bounded}
    assert bounded == {
        *("JensenShannon", "SkewKL", "SkewReverseKL", "TotalVariation", "SquaredHellinger"),
        *("PrecisionRecall", "PrecisionHalf", "Amari", "AlphaBeta", "AMiD"),
    }


def test_neighbours_are_what_the_docstrings_say():
    logp, logq = pair(64, 20, scale=1.0)
    for one, other in [
        (rkl.Jeffreys(), rkl.KL() + rkl.ReverseKL()),
        (rkl.TotalVariation(), rkl.PrecisionRecall(1.0)),
        (4 * rkl.SquaredHellinger(), rkl.Amari(0.5)),
        (rkl.PearsonChiSquare(), 2 * rkl.Amari(2.0)),
        (rkl.NeymanChiSquare(), 2 * rkl.Amari(-1.0)),
        (rkl.AlphaBeta(0.3, 0.7), rkl.Amari(0.3)),
        (rkl.KL(), rkl.PrecisionHalf(3.0) + rkl.RecallHalf(3.0)),
        (rkl.KL(), rkl.PrecisionHalf(0.3) + rkl.RecallHalf(0.3)),
        (rkl.ToDi(), rkl.Jeffreys()),
        (rkl.TAID(1.0), rkl.KL()),
        (rkl.LKHybrid(0.0), rkl.KL()),
        (rkl.AMiD(-1.0, 0.3), rkl.SkewKL(0.3)),
        (rkl.EntropyAwareReverseKL(0.0), rkl.Jeffreys()),
        (rkl.EntropyAwareReverseKL(9.0), rkl.ReverseKL()),
    ]:
        assert torch.allclose(one(logp, logq), other(logp, logq)), one
    for limit, near in [
        (rkl.KL(), rkl.SkewKL(1e-9)),
        (rkl.ReverseKL(), rkl.SkewReverseKL(1e-9)),
        (rkl.KL(), rkl.Amari(1 + 1e-7)),
        (rkl.ReverseKL(), rkl.Amari(1e-7)),
        (rkl.KL(), rkl.PrecisionHalf(1e-9)),
        (rkl.KL(), rkl.RecallHalf(1e9)),
        (rkl.KL(), 1e7 * rkl.JensenShannon(1e-7)),
        (rkl.KL(), rkl.AMiD(-3.0, 1e-9)),
        (rkl.AMiD(1.0, 0.3), rkl.AMiD(1 - 1e-9, 0.3)),
        (rkl.TotalVariation(), rkl.LKHybrid(1e9)),
    ]:
        assert torch.allclose(near(logp, logq), limit(logp, logq), rtol=1e-4), near


def test_exchanging_p_and_q_exchanges_the_pairs():
    logp, logq = pair(64, 20)
    for one, other in [
        (rkl.KL(), rkl.ReverseKL()),
        (rkl.SkewKL(0.2), rkl.SkewReverseKL(0.2)),
        (rkl.PearsonChiSquare(), rkl.NeymanChiSquare()),
        (rkl.Amari(3.0), rkl.Amari(-2.0)),
        (rkl.JensenShannon(0.2), rkl.JensenShannon(0.8)),
    ]:
        assert torch.allclose(one(logp, logq), other(logq, logp)), one


def test_todi_has_the_value_of_jeffreys_and_another_gradient():
    logp, logq = pair(64, 20)
    logq.requires_grad_()
    todi, jeffreys = (d(logp, logq) for d in (rkl.ToDi(), rkl.Jeffreys()))
    assert torch.allclose(todi, jeffreys)
    assert not torch.allclose(*(torch.autograd.grad(v.sum(), logq)[0] for v in (todi, jeffreys)))


def test_combinations_are_values_of_the_same_kind():
    assert 0.5 * rkl.KL() == 0.5 * rkl.KL()
    assert 2 * (rkl.KL() + 0.5 * rkl.AKL()) == 2 * rkl.KL() + rkl.AKL()
    assert 1 * rkl.KL() == rkl.KL()
    assert isinstance(0.5 * rkl.KL() + rkl.ReverseKL(), rkl.FDivergence)
    assert not isinstance(0.5 * rkl.KL() + rkl.AKL(), rkl.FDivergence)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rkl.JensenShannon(0.0), "beta must be finite, above 0, below 1; got 0.0"),
        (lambda: rkl.PrecisionRecall(-1.0), "lam must be finite, above 0; got -1.0"),
        (lambda: rkl.PrecisionHalf(math.inf), "lam must be finite, above 0; got inf"),
        (lambda: rkl.AKL(mu=1.0), "mu must be finite, at least 0, below 1; got 1.0"),
        (lambda: rkl.AKL(straddle="both"), "straddle must be 'head' or 'tail'; got 'both'"),
        (lambda: rkl.Amari(1), "alpha must be finite, other than 0 and 1; got 1"),
        (lambda: rkl.TAID(0.0), "t must be finite, above 0, at most 1; got 0.0"),
        (lambda: rkl.LKHybrid(-1.0), "eta must be finite, at least 0; got -1.0"),
        (lambda: rkl.EntropyAwareReverseKL(-1.0), "tau must be finite, at least 0; got -1.0"),
        (lambda: rkl.AMiD(lam=1.0), "lam must be finite, above 0, below 1; got 1.0"),
        (lambda: rkl.AMiD(alpha=math.inf), "alpha must be finite; got inf"),
        (lambda: rkl.AlphaBeta(0.5, -0.5), r"alpha \+ beta must be finite, above 0; got 0.0"),
        (lambda: -1.0 * rkl.KL(), r"the weight must be finite, above 0; got -1.0 in -1.0 \* KL"),
    ],
)
def test_bad_parameters_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_parameter_that_is_no_number_is_refused():
    with pytest.raises(TypeError, match="beta must be a number; got '0.5'"):
        rkl.JensenShannon("0.5")


def test_between_normals_the_kls_are_the_closed_forms():
    p, q = Normal(1.0, 2.0), Normal(0.0, 1.0)
    forward = (4 + 1) / 2 - 0.5 - math.log(2)
    backward = (1 + 1) / 8 - 0.5 + math.log(2)
    assert rkl.KL().between(p, q).item() == pytest.approx(forward)
    assert rkl.ReverseKL().between(p, q).item() == pytest.approx(backward)
    assert rkl.Jeffreys().between(p, q).item() == pytest.approx(forward + backward)


@every
def test_between_finite_laws_every_divergence_is_its_sum(divergence):
    logp, logq = pair(5, 7)
    value = divergence.between(Categorical(logits=logp), Categorical(logits=logq))
    assert torch.allclose(value, divergence(logp, logq))


def test_what_has_no_closed_form_says_what_to_do():
    normal = Normal(0.0, 1.0)
    with pytest.raises(NotImplementedError, match=r"use rkl\.monte_carlo"):
        rkl.JensenShannon().between(normal, normal)
    with pytest.raises(NotImplementedError, match=r"use rkl\.monte_carlo"):
        rkl.KL().between(normal, torch.distributions.StudentT(3.0))


EDGES = [-40.0, -3.0, 0.0, 3.0, 39.0, 40.0]


def coin_kl(a, b):
    """KL between coins of these logits, in as many digits as it takes."""
    with mpmath.workdps(60):
        p, q = (1 / (1 + mpmath.exp(-mpmath.mpf(x))) for x in (a, b))
        return kl([p, 1 - p], [q, 1 - q]), p


@pytest.mark.parametrize(
    ("law", "scale"),
    [
        (lambda logits: Bernoulli(logits=logits), lambda p: 1),
        (lambda logits: Binomial(7, logits=logits), lambda p: 7),
        (lambda logits: Geometric(logits=logits), lambda p: 1 / p),
    ],
    ids=["Bernoulli", "Binomial", "Geometric"],
)
def test_between_coins_that_nearly_always_fall_alike_no_digit_is_lost(law, scale):
    logits = torch.tensor(EDGES, dtype=torch.float64)
    forward = rkl.KL().between(law(logits[:, None]), law(logits))
    backward = rkl.ReverseKL().between(law(logits[:, None]), law(logits))
    for i, a in enumerate(EDGES):
        for j, b in enumerate(EDGES):
            value, p = coin_kl(a, b)
            # 1e-11: between logits of 39 and 40 the excess is a difference of nearly equal terms
            assert forward[i, j].item() == pytest.approx(float(value * scale(p)), rel=1e-11)
            assert backward[j, i].item() == pytest.approx(forward[i, j].item(), rel=1e-14)


@pytest.mark.parametrize("law", [Bernoulli, lambda probs: Binomial(1, probs=probs)])
def test_coins_that_always_fall_alike_are_infinitely_far_from_those_that_never_do(law):
    probs = torch.tensor([0.0, 1e-30, 0.5, 1.0], dtype=torch.float64)
    value = rkl.KL().between(law(probs[:, None]), law(probs))
    tiny, half = 1e-30 * math.log(1e-30 / 0.5), math.log(2)
    expected = [
        [0, 1e-30, half, math.inf],
        [math.inf, 0, half + tiny, math.inf],
        [math.inf, 15 * math.log(10) - half, 0, math.inf],
        [math.inf, 30 * math.log(10), half, 0],
    ]
    torch.testing.assert_close(value, torch.tensor(expected, dtype=torch.float64))
    assert (value[0, 1] > 0) & (value >= 0).all()


def test_more_trials_than_the_other_can_have_are_infinitely_far_unless_none_succeeds():
    few, many = Binomial(3, probs=torch.tensor(0.5)), Binomial(5, probs=torch.tensor([0.5, 0.0]))
    assert rkl.KL().between(many, few).tolist() == [math.inf, pytest.approx(3 * math.log(2))]
    with pytest.raises(NotImplementedError, match=r"use rkl\.monte_carlo"):
        rkl.KL().between(few, many)


def test_classes_in_ones_and_zeros_are_classes():
    logp, logq = pair(5, 7)
    hot = [OneHotCategorical(logits=it) for it in (logp, logq)]
    for divergence in (rkl.KL(), rkl.TotalVariation()):
        torch.testing.assert_close(divergence.between(*hot), divergence(logp, logq))


def beta_kl(a, b, c, d):
    log_b = [
        mpmath.loggamma(x) + mpmath.loggamma(y) - mpmath.loggamma(x + y)
        for x, y in ((a, b), (c, d))
    ]
    slope = [mpmath.digamma(x) for x in (a, b, a + b)]
    return (
        log_b[1] - log_b[0] + (a - c) * slope[0] + (b - d) * slope[1] + (c - a + d - b) * slope[2]
    )


def gamma_kl(a, b, c, d):
    """Of shapes a and c and rates b and d."""
    return (
        (a - c) * mpmath.digamma(a)
        - mpmath.loggamma(a)
        + mpmath.loggamma(c)
        + c * (mpmath.log(b) - mpmath.log(d))
        + a * (d / b - 1)
    )


@pytest.mark.parametrize(
    ("law", "closed", "numbers"),
    [
        (Beta, beta_kl, (3e4, 7e4, 3.02e4, 7e4)),
        (Beta, beta_kl, (0.5, 2.0, 0.5, 2.25)),
        (Gamma, gamma_kl, (1e4, 1.0, 1.01e4, 1.0)),
    ],
)
def test_in_single_precision_no_digit_is_lost_to_large_terms(law, closed, numbers):
    p, q = law(*map(torch.tensor, numbers[:2])), law(*map(torch.tensor, numbers[2:]))
    value = rkl.KL().between(p, q)
    with mpmath.workdps(40):
        exact = float(closed(*(mpmath.mpf(float(torch.tensor(it))) for it in numbers)))
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(exact, rel=1e-6)
    torch.testing.assert_close(rkl.ReverseKL().between(q, p), value)


def test_single_precision_agrees_with_double_between_kinds_and_in_many_dimensions():
    def pairs(dtype):
        def of(*values):
            return [torch.tensor(it).to(dtype) for it in values]

        generator = torch.Generator().manual_seed(0)
        root = torch.eye(5) + 0.2 * torch.randn(5, 5, generator=generator)
        root = torch.linalg.cholesky(root @ root.T).to(dtype)
        near = MultivariateNormal(torch.full((5,), 1e-4).to(dtype), scale_tril=root)
        yield Uniform(*of(200.0, 300.0)), Pareto(*of(100.0, 30.0))
        yield Laplace(*of(10000.25, 1.0)), Normal(*of(10000.5, 1.0))
        yield Gamma(*of(1e4, 1.0)), Normal(*of(1e4, 100.0))
        yield near, MultivariateNormal(torch.zeros(5).to(dtype), scale_tril=root)
        yield LogNormal(*of(0.5, 1.0)), LogNormal(*of(0.25, 1.0))

    for single, double in zip(pairs(torch.float32), pairs(torch.float64), strict=True):
        value, other = rkl.KL().between(*single), rkl.KL().between(*double)
        assert (value.dtype, other.dtype) == (torch.float32, torch.float64)
        assert value.item() == pytest.approx(other.item(), rel=1e-6)
        assert value > 0


def test_between_distributions_gradients_pass():
    loc = torch.tensor(1.0, requires_grad=True)
    rkl.KL().between(Normal(loc, 2.0), Normal(0.0, 1.0)).backward()
    assert loc.grad.item() == pytest.approx(1.0)


class _Doubling(Transform):
    """Equal to itself alone, as transforms are by default."""

    domain = codomain = torch.distributions.constraints.real
    bijective = True

    def __init__(self):
        super().__init__()
        self.self = self

    def _call(self, x):
        return 2 * x

    def log_abs_det_jacobian(self, x, y):
        return torch.full_like(x, math.log(2))


def test_distributions_behind_one_transform_are_as_far_apart_as_before_it():
    one = _Doubling()
    p, q = (TransformedDistribution(Normal(it, 1.0), [one]) for it in (0.0, 1.0))
    assert rkl.KL().between(p, q).item() == pytest.approx(0.5)


def test_a_coin_of_the_continuum_and_a_uniform_law():
    logits = torch.tensor([-2.0, 0.25, 0.0, 3.0], dtype=torch.float64)
    coin, flat = (
        ContinuousBernoulli(logits=logits),
        Uniform(0.0, torch.tensor([1.0, 1.0, 2.0, 0.9])),
    )
    forward, backward = rkl.KL().between(coin, flat), rkl.KL().between(flat, coin)
    for i, (x, high) in enumerate(zip(logits.tolist(), [1.0, 1.0, 2.0, 0.9], strict=True)):
        size = mpmath.quad(lambda t, x=x: mpmath.exp(x * t), [0, 1])

        def log_p(t, x=x, size=size):
            return x * t - mpmath.log(size)

        def integrand(t, log_p=log_p, high=high):
            return mpmath.exp(log_p(t)) * (log_p(t) + mpmath.log(high))

        high = float(torch.tensor(high))
        there = mpmath.inf if high < 1 else mpmath.quad(integrand, [0, 1])
        back = -mpmath.log(high) - log_p(high / 2) if high <= 1 else mpmath.inf
        assert forward[i].item() == pytest.approx(float(there), rel=1e-6, abs=1e-9)
        assert backward[i].item() == pytest.approx(float(back), rel=1e-6, abs=1e-9)


def test_what_two_values_are_sent_to_has_no_closed_form():
    """|x| of N(1, 1) and of N(-1, 1) are one law, which torch takes for two."""
    folded = [TransformedDistribution(Normal(it, 1.0), [AbsTransform()]) for it in (1.0, -1.0)]
    with pytest.raises(NotImplementedError, match=r"use rkl\.monte_carlo"):
        rkl.KL().between(*folded)
    moved = [
        TransformedDistribution(Normal(it, 1.0), [AffineTransform(3.0, 2.0)]) for it in (1, -1)
    ]
    assert rkl.KL().between(*moved).item() == pytest.approx(2.0)
    halves = HalfNormal(1.0), HalfNormal(2.0)
    assert rkl.KL().between(*halves).item() == pytest.approx(math.log(2) + 1 / 8 - 1 / 2)


def test_classes_that_never_occur_cost_nothing_where_expected_and_everything_where_met():
    p = Categorical(probs=torch.tensor([0.5, 0.5, 0.0]))
    q = Categorical(probs=torch.tensor([0.25, 0.25, 0.5]))
    assert rkl.KL().between(p, q).item() == pytest.approx(math.log(2))
    assert rkl.KL().between(q, p).item() == math.inf
    assert rkl.PearsonChiSquare().between(q, p).item() == math.inf


def test_a_rate_of_nothing_is_a_law_like_any_other():
    rate = torch.tensor([0.0, 1.0, 1.0 + 1e-9, 3.0], dtype=torch.float64)
    value = rkl.KL().between(Poisson(rate[:, None]), Poisson(rate))
    assert value[0].tolist() == pytest.approx(rate.tolist(), rel=1e-14)
    assert (value[1:, 0] == math.inf).all()
    assert value[1, 3].item() == pytest.approx(2 - math.log(3), rel=1e-14)
    alone = rkl.KL().between(Poisson(rate[1]), Poisson(rate[3]))
    assert alone.item() == pytest.approx(value[1, 3].item(), rel=1e-14)
    gap = (rate[2] - 1).item()  # to its second and third order
    assert value[1, 2].item() == pytest.approx(gap**2 / 2 - gap**3 / 3, rel=1e-12)


def wisharts(*batch, seed, size=2):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(*batch, size, size, generator=generator, dtype=torch.float64)
    df = size + torch.rand(batch, generator=generator, dtype=torch.float64)
    return Wishart(df, covariance_matrix=root @ root.mT + torch.eye(size))


def test_a_batch_of_wishart_laws_is_as_far_from_another_as_they_are_one_by_one():
    p, q = wisharts(4, 1, seed=0), wisharts(3, seed=1)
    value = rkl.KL().between(p, q)

    def one(law, *index):
        return Wishart(law.df[index], covariance_matrix=law.covariance_matrix[index])

    # without a batch what torch registers is right
    alone = [[kl_divergence(one(p, i, 0), one(q, j)) for j in range(3)] for i in range(4)]
    torch.testing.assert_close(value, torch.stack([torch.stack(row) for row in alone]).detach())


def test_a_wishart_law_of_numbers_is_a_gamma_law():
    p, q = wisharts(4, 1, seed=0, size=1), wisharts(3, seed=1, size=1)

    def gamma(law):
        return Gamma(law.df / 2, 0.5 / law.covariance_matrix[..., 0, 0])

    torch.testing.assert_close(
        rkl.KL().between(p, q), kl_divergence(gamma(p), gamma(q)), rtol=1e-12, atol=0
    )


def test_laws_of_two_kinds_broadcast():
    uniform = Uniform(torch.tensor([[0.2], [0.4]]), torch.tensor([[0.6], [1.5]]))
    beta = Beta(torch.tensor([1.0, 2.0, 3.0]), 1.0)
    value = rkl.KL().between(uniform, beta)
    assert value.shape == (2, 3)
    assert value[0, 0].item() == pytest.approx(-math.log(0.4))  # to Uniform(0, 1)
    assert (value[1] == math.inf).all()


def test_independent_parts_are_as_far_apart_as_all_of_them_together():
    rate = torch.tensor([[0.0, 1.0], [2.0, 3.0]])
    p, q = Independent(Poisson(rate), 1), Independent(Poisson(rate.flip(0)), 1)
    parts = rkl.KL().between(Poisson(rate), Poisson(rate.flip(0)))
    torch.testing.assert_close(rkl.KL().between(p, q), parts.sum(-1))
    with pytest.raises(NotImplementedError, match=r"use rkl\.monte_carlo"):
        rkl.KL().between(Independent(p, 1), Independent(Poisson(rate), 2))


@dataclasses.dataclass(frozen=True)
class _Threshold(rkl.FDivergence):
    """A PrecisionHalf of somebody's own, whose slope has another name."""

    threshold: float = 5.0
    weight: float = 2.0

    def integrand(self, logp, logq):
        return self.weight * rkl.PrecisionHalf(self.threshold).integrand(logp, logq)


@dataclasses.dataclass(frozen=True)
class _SymmetricChiSquare(rkl.FDivergence):
    """Σ (p − q)² (p + q) / 2pq, which is half of both chi-squares."""

    def integrand(self, logp, logq):
        chi = rkl.PearsonChiSquare().integrand(logp, logq)
        return (chi + rkl.NeymanChiSquare().integrand(logp, logq)) / 2


def test_sums_of_amari_divergences_are_recognised_by_their_integrand():
    known = {repr(d): d.amari_orders for d in F if d.amari_orders is not None}
    assert known == {
        "KL()": ((1.0, 1.0),),
        "ReverseKL()": ((1.0, 0.0),),
        "Jeffreys()": ((1.0, 1.0), (1.0, 0.0)),
        "SquaredHellinger()": ((0.25, 0.5),),
        "PearsonChiSquare()": ((2.0, 2.0),),
        "NeymanChiSquare()": ((2.0, -1.0),),
        "Amari(alpha=0.5)": ((1.0, 0.5),),
        "Amari(alpha=-2.0)": ((1.0, -2.0),),
        "Amari(alpha=3.0)": ((1.0, 3.0),),
        "0.3 * KL() + 0.7 * ReverseKL()": ((0.3, 1.0), (0.7, 0.0)),
    }
    assert _SymmetricChiSquare().amari_orders == ((1.0, 2.0), (1.0, -1.0))
    assert (0.5 * _SymmetricChiSquare()).amari_orders == ((0.5, 2.0), (0.5, -1.0))
    assert (rkl.KL() + rkl.TotalVariation()).amari_orders is None


def test_slopes_are_recognised_by_what_the_field_does():
    named = {type(d): d.slope_field for d in F if d.slope_field is not None}
    assert named == dict.fromkeys((rkl.PrecisionRecall, rkl.PrecisionHalf, rkl.RecallHalf), "lam")
    assert (_Threshold().slope_field, _Threshold().slope) == ("threshold", 5.0)
    assert rkl.JensenShannon(0.2).slope is None

import inspect
import math

import pytest
import torch
from torch.distributions import Normal

from rkl.divergences import KL, PrecisionHalf, PrecisionRecall, RecallHalf
from rkl.metrics.precision_recall import (
    SLOPES,
    operating_point,
    pr_curve,
    pr_curve_sampled,
)


def pair(batch=(5,), atoms=7, seed=0):
    draw = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(2, *batch, atoms, generator=draw, dtype=torch.float64)
    return logits.log_softmax(-1).unbind()


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_a_curve_of_half_precision_is_that_of_the_same_numbers_in_double(kind):
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(2, 50_000, generator=generator)
    p, q = logits.log_softmax(-1).to(kind).unbind()
    expected = [torch.minimum(lam * p.double().exp(), q.double().exp()).sum() for lam in SLOPES]
    curve = pr_curve(p=p, q=q)
    assert curve.precision.dtype == torch.float32
    torch.testing.assert_close(curve.precision.double(), torch.stack(expected), rtol=1e-5, atol=0)


def test_precision_and_recall_are_their_sums_written_out():
    p, q = pair()
    curve = pr_curve(p=p, q=q)
    for i, lam in enumerate(SLOPES):
        for row in range(5):
            pairs = zip(p[row].exp().tolist(), q[row].exp().tolist(), strict=True)
            alpha = math.fsum(min(lam * a, b) for a, b in pairs)
            assert curve.precision[row, i].item() == pytest.approx(alpha, rel=1e-12)
            assert curve.recall[row, i].item() == pytest.approx(alpha / lam, rel=1e-12)


def test_the_default_slopes_hold_one_and_are_their_own_inverses():
    assert 1.0 in SLOPES
    assert [1 / lam for lam in reversed(SLOPES)] == pytest.approx(list(SLOPES), rel=1e-15)


def test_at_slope_one_both_are_one_minus_the_total_variation():
    p, q = pair()
    curve = pr_curve(p=p, q=q, slopes=torch.ones(1))
    expected = 1 - (p.exp() - q.exp()).abs().sum(-1) / 2
    torch.testing.assert_close(curve.precision[:, 0], expected)
    torch.testing.assert_close(curve.recall[:, 0], expected)


def test_precision_rises_with_the_slope_and_recall_falls():
    curve = pr_curve(**dict(zip("pq", pair(), strict=True)))
    assert (curve.precision.diff(dim=-1) >= 0).all()
    assert (curve.recall.diff(dim=-1) <= 1e-15).all()
    assert ((curve.precision > 0) & (curve.precision <= 1 + 1e-15)).all()


def test_swapping_the_two_swaps_precision_at_a_slope_with_recall_at_its_inverse():
    p, q = pair()
    there, back = pr_curve(p=p, q=q), pr_curve(p=q, q=p)
    torch.testing.assert_close(there.precision, back.recall.flip(-1))


def test_the_divergences_are_what_precision_lacks():
    p, q = pair()
    curve = pr_curve(p=p, q=q)
    for i, lam in enumerate(SLOPES):
        lack = min(lam, 1) - curve.precision[:, i]
        torch.testing.assert_close(PrecisionRecall(lam)(p, q), lack, atol=1e-12, rtol=1e-10)


def test_disjoint_laws_have_an_empty_curve_and_equal_ones_a_full_one():
    p, q = torch.tensor([[0.0, -math.inf], [-math.inf, 0.0]])
    assert not pr_curve(p=p, q=q).precision.any()
    same = pr_curve(p=p, q=p)
    torch.testing.assert_close(same.precision, torch.tensor(SLOPES).clamp_max(1))


def test_any_batch_shape_will_do_and_single_precision_agrees():
    p, q = pair(batch=(2, 3))
    curve = pr_curve(p=p.float(), q=q.float())
    assert curve.precision.shape == (2, 3, len(SLOPES))
    alone = pr_curve(p=p[1, 2], q=q[1, 2])
    torch.testing.assert_close(curve.precision[1, 2].double(), alone.precision, rtol=1e-5, atol=0)


@pytest.mark.parametrize("slopes", [[], [0.0], [1.0, -1.0], [math.inf], [math.nan]])
def test_slopes_are_positive_and_finite(slopes):
    p, q = pair()
    with pytest.raises(ValueError, match="slopes must be positive and finite; got"):
        pr_curve(p=p, q=q, slopes=torch.tensor(slopes))


def test_shapes_that_differ_are_refused():
    p, q = pair()
    with pytest.raises(ValueError, match=r"must be \[\*batch, atoms\], alike"):
        inspect.unwrap(pr_curve)(p=p, q=q[:, :-1])  # without the tests' own check of shapes
    with pytest.raises(ValueError, match="not empty"):
        pr_curve(p=p[:0], q=q[:0])


@pytest.mark.parametrize("name", ["p", "q"])
def test_logits_in_place_of_log_probabilities_are_refused(name):
    arguments = dict(zip("pq", pair(), strict=True))
    arguments[name] = arguments[name] + 0.5
    with pytest.raises(ValueError, match=rf"{name} must hold normalised .* sum to 1\.649"):
        pr_curve(**arguments)
    arguments[name] = arguments[name] * math.nan
    with pytest.raises(ValueError, match=rf"{name} must hold normalised"):
        pr_curve(**arguments)


# What the curve is in other words


def test_the_curve_is_the_transform_of_the_roc_curve():
    """Precision is the least λ (1 - TPR) + FPR over thresholds of the likelihood ratio."""
    p, q = pair(batch=())
    order = (p - q).argsort(descending=True)
    start = torch.zeros(1, dtype=torch.float64)
    true_positive = torch.cat([start, p.exp()[order].cumsum(0)])
    false_positive = torch.cat([start, q.exp()[order].cumsum(0)])
    curve = pr_curve(p=p, q=q)
    for lam, precision in zip(SLOPES, curve.precision, strict=True):
        least = (lam * (1 - true_positive) + false_positive).min()
        torch.testing.assert_close(least, precision, rtol=1e-12, atol=1e-14)


def gradient(loss, logits):
    (found,) = torch.autograd.grad(loss, logits)
    return found


@pytest.mark.parametrize("lam", [0.3, 1.0, 4.0])
def test_likelihood_on_accepted_samples_and_on_weighted_data_descends_the_precision_half(lam):
    p, start = pair(batch=())
    logits = start.clone().requires_grad_()
    q = logits.log_softmax(-1)
    weight = (q - p - math.log(lam)).clamp_max(0).exp().detach()  # min(1, 1/(λr))
    accepted = torch.minimum(lam * p.exp(), q.exp()).detach()
    half = gradient(PrecisionHalf(lam)(p, q), logits)
    on_data = gradient(-(p.exp() * weight * logits.log_softmax(-1)).sum(), logits)
    on_accepted = gradient(-(accepted * logits.log_softmax(-1)).sum() / lam, logits)
    other = gradient(-(p.exp() * (1 - weight) * logits.log_softmax(-1)).sum(), logits)
    recall = gradient(RecallHalf(lam)(p, logits.log_softmax(-1)), logits)
    torch.testing.assert_close(on_data, half, rtol=0, atol=1e-6)
    torch.testing.assert_close(on_accepted, half, rtol=0, atol=1e-6)
    torch.testing.assert_close(other, recall, rtol=0, atol=1e-6)
    assert half.abs().max() > 1e-3


@pytest.mark.parametrize("lam", [0.3, 1.0, 4.0])
def test_the_hard_version_weighs_model_samples_by_an_indicator_and_data_by_it_over_the_ratio(lam):
    p, start = pair(batch=())
    logits = start.clone().requires_grad_()
    inside = (p - start + math.log(lam) > 0).double()
    ratio = (p - start).exp()
    score = logits.log_softmax(-1)
    hard = gradient(PrecisionRecall(lam)(p, score), logits)
    score = logits.log_softmax(-1)
    on_samples = gradient(-(start.exp() * inside * score).sum(), logits)
    score = logits.log_softmax(-1)
    on_data = gradient(-(p.exp() * inside / ratio * score).sum(), logits)
    torch.testing.assert_close(on_samples, hard, rtol=0, atol=1e-6)
    torch.testing.assert_close(on_data, hard, rtol=0, atol=1e-6)


@pytest.mark.parametrize("lam", [0.1, 1.0, 7.0])
def test_the_two_halves_add_up_to_kl(lam):
    p, q = pair()
    halves = PrecisionHalf(lam)(p, q) + RecallHalf(lam)(p, q)
    torch.testing.assert_close(halves, KL()(p, q), rtol=1e-12, atol=1e-12)


# By Monte Carlo


def normals():
    return Normal(torch.zeros((), dtype=torch.float64), 1.0), Normal(0.8, 1.5)


def log_ratio(x):
    p, q = normals()
    return p.log_prob(x) - q.log_prob(x)


def exact_precision(slopes):
    p, q = normals()
    x = torch.linspace(-15, 15, 60_001, dtype=torch.float64)
    least = torch.minimum(p.log_prob(x) + slopes.log()[:, None], q.log_prob(x)).exp()
    return torch.trapezoid(least, x)


def sampled(count_p=4_000, count_q=4_000, seed=0):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(count_p + count_q, generator=generator, dtype=torch.float64)
    return {
        "log_ratio_p": log_ratio(z[:count_p]),
        "log_ratio_q": log_ratio(0.8 + 1.5 * z[count_p:]),
    }


WAYS = {"p": ["log_ratio_p"], "q": ["log_ratio_q"], "both": ["log_ratio_p", "log_ratio_q"]}


@pytest.mark.parametrize("way", WAYS)
def test_the_sampled_curve_is_the_exact_one_within_its_errors(way):
    ratios = sampled()
    curve = pr_curve_sampled(**{name: ratios[name] for name in WAYS[way]})
    away = (curve.precision.value - exact_precision(curve.slopes)).abs()
    assert (away <= 5 * curve.precision.error + 1e-12).all()  # 33 slopes, far from independent
    torch.testing.assert_close(curve.recall.value * curve.slopes, curve.precision.value)
    torch.testing.assert_close(curve.recall.error * curve.slopes, curve.precision.error)


def test_samples_of_both_laws_leave_less_error_than_those_of_either():
    ratios = sampled()
    errors = {
        way: pr_curve_sampled(**{name: ratios[name] for name in names}).precision.error
        for way, names in WAYS.items()
    }
    best = torch.minimum(errors["p"], errors["q"])
    assert (errors["both"] <= 1.001 * best + 1e-15).all()
    assert errors["both"][16] < 0.8 * best[16]  # at slope 1


@pytest.mark.statistical
@pytest.mark.parametrize("way", WAYS)
def test_the_errors_of_the_sampled_curve_are_those_of_repeated_samples(way):
    found = []
    for seed in range(1_000):
        ratios = sampled(300, 500, seed)
        curve = pr_curve_sampled(**{name: ratios[name] for name in WAYS[way]})
        found.append(torch.stack(curve.precision))
    value, error = torch.stack(found)[..., 8:25].unbind(1)
    truth = exact_precision(torch.tensor(SLOPES, dtype=torch.float64))[8:25]
    spread = value.std(0)
    # A spread of 1,000 values has a relative error of 0.022, and the errors one of about 0.002.
    torch.testing.assert_close(error.square().mean(0).sqrt(), spread, rtol=0.12, atol=1e-12)
    assert ((value.mean(0) - truth).abs() < 5 * spread / math.sqrt(1_000) + 1e-9).all()


def test_laws_without_common_mass_have_a_sampled_curve_of_zero():
    nowhere = torch.full((3,), math.inf)
    curve = pr_curve_sampled(log_ratio_p=nowhere, log_ratio_q=-nowhere)
    assert not curve.precision.value.any()
    assert not curve.precision.error.any()


def test_a_law_against_itself_has_its_full_curve_without_error():
    curve = pr_curve_sampled(log_ratio_p=torch.zeros(3), log_ratio_q=torch.zeros(4))
    torch.testing.assert_close(curve.precision.value, curve.slopes.clamp_max(1))
    assert curve.precision.error.max() < 1e-12


# Rejection's three names


def test_accepting_at_a_constant_costs_one_over_alpha_and_has_the_slope_one_precision():
    """On a finite law, where the accepted law min(λp, q)/α can be written out."""
    p, q = pair(batch=())
    counts = torch.tensor([3, 1, 4, 2, 2, 5, 3])
    q = (counts / counts.sum()).double().log()  # so that samples can have exactly this law
    ratios = (p - q).repeat_interleave(counts)
    for lam in (0.2, 1.0, 5.0):
        point = operating_point(ratios, accept_lam=lam)
        (alpha,) = pr_curve(p=p, q=q, slopes=torch.tensor([lam]).double()).precision
        accepted = torch.minimum(math.log(lam) + p, q) - alpha.log()
        (precision,) = pr_curve(p=p, q=accepted, slopes=torch.ones(1)).precision
        (at_alpha,) = pr_curve(p=p, q=q, slopes=alpha[None]).precision
        assert point.budget == pytest.approx(1 / alpha.item(), rel=1e-6)
        assert point.target_precision == pytest.approx(precision.item(), rel=1e-6)
        assert (at_alpha / alpha).item() == pytest.approx(precision.item(), rel=1e-6)


@pytest.mark.parametrize("budget", [1.12, 1.2, 2.0, 5.0, 20.0])
def test_each_name_of_an_operating_point_leads_to_the_other_two(budget):
    generator = torch.Generator().manual_seed(1)
    ratios = 1.5 * torch.randn(1_000, generator=generator, dtype=torch.float64) - 1
    ratios[:100] = -math.inf  # one in ten can never be accepted
    point = operating_point(ratios, budget=budget)
    assert point.budget == budget
    accepted = (point.accept_lam * ratios.exp()).clamp_max(1).mean().item()
    assert accepted == pytest.approx(1 / budget, rel=1e-12)
    for name in ("accept_lam", "target_precision"):
        same = operating_point(ratios, **{name: getattr(point, name)})
        assert same == pytest.approx(point, rel=1e-9)


@pytest.mark.parametrize("shift", [0.0, -700.0, -800.0, -5000.0])
def test_ratios_whose_exponential_is_zero_are_like_other_small_ones(shift):
    """Three draws in ten have a ratio e^shift times those of the others."""
    generator = torch.Generator().manual_seed(3)
    ratios = torch.randn(1_000, generator=generator, dtype=torch.float64)
    ratios[:300] += shift
    point = operating_point(ratios, budget=2.5)
    log_lam = _bisected(lambda it: (ratios + it).clamp_max(0).exp().mean().item() - 1 / 2.5)
    assert math.log(point.accept_lam) == pytest.approx(log_lam, abs=1e-9)
    assert operating_point(ratios, target_precision=point.target_precision).accept_lam == (
        pytest.approx(point.accept_lam, rel=1e-9)
    )
    kept = operating_point(ratios, budget=1.0)  # no rejection
    assert (ratios + math.log(kept.accept_lam)).min() >= -1e-9
    if shift < -710:
        with pytest.raises(ValueError, match=r"budget=1\.2 takes a λ above 1\.8e\+308"):
            operating_point(ratios, budget=1.2)


def _bisected(rising):
    low, high = -2000.0, 2000.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (low, middle) if rising(middle) > 0 else (middle, high)
    return low


def test_a_budget_or_a_precision_that_no_rejection_reaches_is_said():
    ratios = torch.tensor([0.0, 0.5, 1.0, 1.5]).log()
    assert operating_point(ratios, budget=4 / 3).accept_lam == pytest.approx(2)
    with pytest.raises(ValueError, match=r"budget must be at least 1\.33333, .* 1 of 4 samples"):
        operating_point(ratios, budget=1.2)
    with pytest.raises(ValueError, match=r"between 0\.708333, .* and 0\.75, .*; got 0\.9"):
        operating_point(ratios, target_precision=0.9)
    with pytest.raises(ValueError, match=r"between 0\.708333, .*; got 0\.5"):
        operating_point(ratios, target_precision=0.5)
    with pytest.warns(UserWarning, match=r"budget=5 buys nothing beyond 2"):
        assert operating_point(ratios, budget=5.0).target_precision == pytest.approx(0.75)

import inspect
import math

import pytest
import torch

from rkl.divergences import KL, FDivergence, JensenShannon, PrecisionRecall, ReverseKL
from rkl.metrics.precision_recall import SLOPES, pr_curve


def pair(batch=(5,), atoms=7, seed=0):
    draw = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(2, *batch, atoms, generator=draw, dtype=torch.float64)
    return logits.log_softmax(-1).unbind()


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


@pytest.mark.parametrize(
    ("divergence", "second"),
    [
        (KL(), lambda t: 1 / t),
        (ReverseKL(), lambda t: 1 / t**2),
        (JensenShannon(), lambda t: 1 / (2 * t * (1 + t))),
    ],
)
def test_an_f_divergence_is_a_mixture_of_what_precision_lacks(divergence, second):
    """D_f is the integral over lam > 0 of f''(1/lam) lam^-3 (min(lam, 1) - alpha(lam))."""
    p, q = pair()
    assert isinstance(divergence, FDivergence)
    log_slopes = torch.linspace(-12, 12, 20_001, dtype=torch.float64)
    lam = log_slopes.exp()
    lack = lam.clamp_max(1) - pr_curve(p=p, q=q, slopes=lam).precision
    integral = torch.trapezoid(second(1 / lam) * lam**-2 * lack, log_slopes)
    # The kinks at the ratios cost the trapezoid rule (0.0012 apart) about 1e-6.
    torch.testing.assert_close(integral, divergence(p, q), rtol=1e-4, atol=1e-6)


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

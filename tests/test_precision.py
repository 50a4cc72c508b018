"""Masks, offsets and poles in single precision, against double precision without them."""

import math

import pytest
import torch
from catalogued import every
from mpmath import mp
from test_sampled import definition

import rkl
from rkl import exact, per_token

LOWEST = torch.finfo(torch.float32).min
MASKS = [(-math.inf, -math.inf), (LOWEST, LOWEST), (LOWEST, -math.inf), (-math.inf, LOWEST)]
MASKS += [(-1e4, -math.inf), (-math.inf, -1e4), (-1e4, -1e4), (-200.0, -math.inf), (-1e4, LOWEST)]
MASKS += [(-math.inf, -200.0)]


def logits(atoms=12, tokens=6, scale=2.0):
    generator = torch.Generator().manual_seed(0)
    return scale * torch.randn(2, tokens, atoms, generator=generator)


def measured(divergence, p, q, **settings):
    q = q.clone().requires_grad_()
    value = exact(divergence, p=p, q=q, **settings)
    return value.detach().double(), torch.autograd.grad(value, q)[0].double()


@every
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_masked_atoms_leave_value_and_gradient_of_the_others(divergence, mask):
    p, q = logits()
    value, gradient = measured(divergence, p.double(), q.double())
    rest = [torch.cat([x, torch.full((6, 3), m)], -1) for x, m in zip((p, q), mask, strict=True)]
    masked, slope = measured(divergence, *rest)
    assert torch.allclose(masked, value, rtol=1e-5)
    assert torch.allclose(slope[:, :12], gradient, rtol=1e-4, atol=1e-6)
    assert (slope[:, 12:] == 0).all()
    by_token = per_token({"": divergence}, p=rest[0], q=rest[1])[""]
    assert torch.allclose(by_token.double().mean(), value, rtol=1e-5)


@pytest.mark.slow
@every
def test_masked_atoms_leave_value_and_gradient_of_the_others_in_compiled_code(divergence):
    p, q = logits()
    value, gradient = measured(divergence, p.double(), q.double())
    for mask in MASKS:
        rest = [torch.cat([x, torch.full((6, 3), m)], -1) for x, m in zip((p, q), mask)]  # noqa: B905
        masked, slope = measured(divergence, *rest, compiled=True)
        eager, eager_slope = measured(divergence, *rest)
        assert torch.allclose(masked, value, rtol=1e-5), mask
        assert torch.allclose(masked, eager, rtol=1e-5), mask
        assert torch.allclose(slope[:, :12], gradient, rtol=1e-4, atol=1e-6), mask
        assert torch.allclose(slope, eager_slope, rtol=1e-4, atol=1e-6), mask
        assert (slope[:, 12:] == 0).all(), mask


@every
def test_a_common_offset_of_the_logits_changes_nothing(divergence):
    p, q = (x.round(decimals=0) for x in logits(scale=3.0))  # exact in single precision at 1e5
    expected = measured(divergence, p, q)
    found = measured(divergence, p - 1e5, q + 1e5)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-7)
    atoms = p.shape[-1] if divergence.needs_every_atom else 4
    top = rkl.TopK(*p.log_softmax(-1).topk(atoms))
    for one, other in zip(
        measured(divergence, top, q + 1e5), measured(divergence, top, q), strict=True
    ):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-7)


def near_the_poles():
    for distance in (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1):
        d = distance
        for alpha in (d, -d, 1 - d, 1 + d):
            yield rkl.Amari(alpha)
        for pair in ((d, 0.7), (0.7, d), (d, d), (-d, 0.7), (0.7, -d), (0.5, d - 0.5), (d, 1.0)):
            yield rkl.AlphaBeta(*pair)
        for beta in (d, 1 - d):
            yield rkl.JensenShannon(beta)
            yield rkl.SkewKL(beta)
            yield rkl.SkewReverseKL(beta)
        for lam in (d, 1 - d, 1 + d, 1 / d):
            yield rkl.PrecisionRecall(lam)
            yield rkl.PrecisionHalf(lam)
            yield rkl.RecallHalf(lam)


@pytest.mark.parametrize("divergence", list(near_the_poles()), ids=repr)
def test_near_its_poles_single_precision_is_within_a_thousandth(divergence):
    p, q = logits(atoms=50)
    q = p + 0.15 * q
    value, gradient = measured(divergence, p.double(), q.double())
    single, slope = measured(divergence, p, q)
    by_token = per_token({"": divergence}, p=p, q=q)[""]
    tiny = 1e-12  # halves that see no atom on their side
    assert single == pytest.approx(value.item(), rel=1e-3, abs=tiny)
    assert by_token.mean().item() == pytest.approx(value.item(), rel=1e-3, abs=tiny)
    assert by_token.min() >= 0
    assert (slope - gradient).norm() <= 1e-3 * gradient.norm() + 1e-12


def of_many_digits(divergence, p, q):
    """D(p ‖ q) in mpmath, from logits."""
    with mp.workdps(60):
        p, q = ([mp.exp(mp.mpf(x)) for x in row] for row in (p.tolist(), q.tolist()))
        p, q = [x / mp.fsum(p) for x in p], [x / mp.fsum(q) for x in q]
        if isinstance(divergence, rkl.AlphaBeta):
            a, b = mp.mpf(divergence.alpha), mp.mpf(divergence.beta)
            d = a + b
            return mp.fsum(
                x**d / (b * d) + y**d / (a * d) - x**a * y**b / (a * b)
                for x, y in zip(p, q, strict=True)
            )
        return mp.fsum(definition(divergence, x, y) for x, y in zip(p, q, strict=True))


@pytest.mark.parametrize(
    "divergence", [d for d in near_the_poles() if "e-06" in repr(d)], ids=repr
)
def test_near_its_poles_double_precision_has_the_value_of_many_digits(divergence):
    p, q = (x[0].double() for x in logits(atoms=20))
    value = per_token({"": divergence}, p=p[None], q=q[None])[""]
    expected = of_many_digits(divergence, p, q)
    assert value.item() == pytest.approx(float(expected), rel=1e-8)


def gradients_with_and_without(divergence, a, b, top=None):
    """Value and gradient at the first eight atoms, as given and in double precision alone."""
    found = []
    for p, q in ((a, b), (a[:, :8].double(), b[:, :8].double())):
        if top is not None:
            p = rkl.TopK(top.values, top.indices)
        found.append(measured(divergence, p, q))
    (value, gradient), expected = found
    assert (gradient[:, 8:] == 0).all()
    return (value, gradient[:, :8]), expected


def check_masked(divergence, dtype, fill, top_k):
    p, q = (x.to(dtype) for x in logits())
    p[:, 8:] = q[:, 8:] = fill
    top = p.double().log_softmax(-1).topk(4) if top_k else None
    (value, gradient), (expected, slope) = gradients_with_and_without(divergence, p, q, top)
    assert torch.allclose(value, expected, rtol=1e-5, atol=1e-6)
    # a gradient in half precision is rounded to it
    assert (gradient - slope).abs().max() <= torch.finfo(dtype).eps * slope.abs().max() + 1e-6


@pytest.mark.parametrize("top_k", [False, True], ids=["whole", "top k"])
@pytest.mark.parametrize("fill", [-math.inf, "lowest", -1e4], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_masks_in_half_precision_and_of_a_top_k_leave_the_others(dtype, fill, top_k):
    fill = torch.finfo(dtype).min if fill == "lowest" else fill
    for divergence in (rkl.KL(), rkl.ReverseKL(), rkl.JensenShannon(), rkl.AKL(), rkl.ToDi()):
        check_masked(divergence, dtype, fill, top_k)


@every
def test_log_probabilities_in_half_precision_give_the_value_of_double_precision(divergence):
    generator = torch.Generator().manual_seed(0)
    p, noise = 3 * torch.randn(2, 4, 300, generator=generator, dtype=torch.float64)
    for dtype in (torch.bfloat16, torch.float16):
        for apart in (0.02, 0.3):
            logp, logq = (x.log_softmax(-1).to(dtype) for x in (p, p + apart * noise))
            value, expected = divergence(logp, logq), divergence(logp.double(), logq.double())
            assert value.dtype == torch.float32
            torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_logits_at_the_ends_of_their_dtype_are_those_of_double_precision(dtype, sign):
    p, q = (x.to(dtype) for x in logits())
    p[:, 3] = q[:, 3] = sign * torch.finfo(dtype).max
    for divergence in (rkl.KL(), rkl.ReverseKL(), rkl.JensenShannon(), rkl.AKL()):
        value, gradient = measured(divergence, p, q)
        expected, slope = measured(divergence, p.double(), q.double())
        assert torch.allclose(value, expected, rtol=1e-5, atol=1e-6)
        assert (gradient - slope).abs().max() <= torch.finfo(dtype).eps * slope.abs().max() + 1e-6

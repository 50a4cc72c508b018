"""Heads in bfloat16 and float16: products arrive in single precision, and so do gradients."""

import itertools

import pytest
import torch
from catalogued import every

import rkl
from rkl import LinearHead, exact, per_token

NAMED = [rkl.KL(), rkl.ReverseKL(), rkl.JensenShannon(), rkl.AKL(), rkl.ToDi(), rkl.AlphaBeta()]
NAMED += [rkl.PrecisionRecall(0.5)]
SHAPES = [{}, {"softcap": 8.0, "scale": 0.7, "temperature": 2.0}]


def heads(dtype, spread, noise, settings, vocab=1000, width=64, tokens=16, kinds=None):
    """A teacher and a student of one head, and both in double precision.

    With ``kinds`` the same numbers in those dtypes.
    """
    generator = torch.Generator().manual_seed(0)
    weight = (spread / width**0.5 * torch.randn(vocab, width, generator=generator)).to(dtype)
    student = torch.randn(tokens, width, generator=generator).to(dtype)
    moved = student.float() + noise * torch.randn(tokens, width, generator=generator)
    both = []
    for kind in kinds or (dtype, torch.float64):
        p = LinearHead(moved.to(dtype).to(kind), weight.to(kind), **settings)
        hidden, head = (x.to(kind).clone().requires_grad_() for x in (student, weight))
        both.append((p, LinearHead(hidden, head, **settings)))
    return both


def computed(divergence, pairs, **how):
    """Value and gradients in hidden states and head, of each pair."""
    for p, q in pairs:
        value = exact(divergence, p=p, q=q, **how)
        yield value.detach(), *torch.autograd.grad(value, q[:2])


def off(divergence, pairs, **how):
    """Relative errors of the value and of the gradients in hidden states and head.

    Beyond those of rounding the true ones, which in float16 may underflow. A gradient that
    exceeds float16 must be infinite there, and counts as exact.
    """
    found = computed(divergence, pairs, **how)
    return [beyond_rounding(a, b) for a, b in zip(*found, strict=True)]


def beyond_rounding(a, b):
    rounded = b.to(a.dtype).double()
    if not rounded.isfinite().all():
        assert not a.isfinite().all()
        return 0.0
    return (((a.double() - b).norm() - (rounded - b).norm()) / b.norm()).item()


def noise_for(nats, spread, settings):
    """How far the hidden states are apart where the KL divergence is so many nats a token."""
    noise = 0.1
    for _ in range(2):  # it grows as the square, nearly
        p, q = heads(torch.float64, spread, noise, settings)[1]
        noise *= (nats / per_token({"": rkl.KL()}, p=p, q=q)[""].mean().item()) ** 0.5
    return noise


def check(divergence, dtype, spread, noise, settings, **how):
    value, hidden, head = off(divergence, heads(dtype, spread, noise, settings), **how)
    assert value < 1e-3
    assert hidden < 1e-3  # rounding itself costs 2e-3 in bfloat16
    assert head < 1e-3


@pytest.mark.parametrize("divergence", NAMED, ids=repr)
@pytest.mark.parametrize("settings", SHAPES, ids=["plain", "shaped"])
def test_gradients_of_half_heads_are_those_of_double_precision_rounded_once(divergence, settings):
    noise = 0.5 if isinstance(divergence, rkl.PrecisionRecall) else 0.05  # it is 0 nearer by
    check(divergence, torch.bfloat16, 3.0, noise, settings)
    check(divergence, torch.float16, 10.0, noise, settings)


@pytest.mark.parametrize("divergence", NAMED, ids=repr)
@pytest.mark.parametrize("settings", SHAPES, ids=["plain", "shaped"])
def test_gradients_are_half_a_percent_off_at_most_from_agreement_to_a_nat(divergence, settings):
    """With all rounding, and in float16 with the loss scaled, as torch.amp.GradScaler does.

    Unscaled, a head gradient of 1e-7 lies among the subnormal numbers of float16, which are 6e-8
    apart: no sum can be rounded to them with less than a few percent of error.
    """
    for spread, nats in itertools.product((3.0, 10.0), (0.01, 0.04, 0.36, 1.4)):
        noise = noise_for(nats, spread, settings)
        for dtype, scale in ((torch.bfloat16, 1.0), (torch.float16, 2.0**10)):
            pairs = heads(dtype, spread, noise, settings)
            (p, q), (_, precise) = pairs
            true = next(computed(divergence, pairs[1:]))
            if not true[0]:  # a half of KL that is 0 here
                continue
            loss = exact(divergence, p=p, q=q)
            gradients = torch.autograd.grad(loss * scale, q[:2])
            assert (loss.double() - true[0]).abs() < 5e-3 * true[0]
            for gradient, expected in zip(gradients, true[1:], strict=True):
                error = (gradient.double() / scale - expected).norm()
                assert error < 5e-3 * expected.norm()
                assert gradient.dtype == dtype != precise.hidden.dtype


@pytest.mark.slow
@every
def test_every_divergence_of_half_heads_at_every_distance(divergence):
    """As exact as the same numbers in single precision, with which products are computed.

    Where an integrand has a kink (total variation, the halves), rounding in single precision puts
    some atoms on its other side.
    """
    grid = itertools.product(
        (torch.bfloat16, torch.float16), (3.0, 10.0), (0.02, 0.1, 0.5), SHAPES
    )
    for dtype, spread, noise, settings in grid:
        kinds = (torch.float32, torch.float64)
        single = heads(dtype, spread, noise, settings, kinds=kinds)
        if not next(computed(divergence, single[1:]))[0]:  # 0/0: a half of KL that is 0 here
            continue
        allowed = [1e-3 + 2 * it for it in off(divergence, single, chunk=7)]
        found = off(divergence, heads(dtype, spread, noise, settings), chunk=7)
        assert all(it < bound for it, bound in zip(found, allowed, strict=True)), found


@pytest.mark.slow
@pytest.mark.parametrize("divergence", NAMED, ids=repr)
def test_compiled_half_heads_are_as_exact(divergence):
    for settings in SHAPES:
        check(divergence, torch.bfloat16, 3.0, 0.5, settings, compiled=True)


def test_autocast_around_the_loss_rounds_nothing():
    ((p, q), _) = heads(torch.float32, 3.0, 0.05, {})
    plain = exact(rkl.KL(), p=p, q=q)
    by_token = per_token({"": rkl.KL()}, p=p, q=q)[""]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(exact(rkl.KL(), p=p, q=q), plain)
        assert torch.equal(per_token({"": rkl.KL()}, p=p, q=q)[""], by_token)


def test_the_head_is_upcast_a_part_at_a_time(monkeypatch):
    from rkl import estimators

    pairs = heads(torch.bfloat16, 3.0, 0.05, {})
    whole = off(rkl.KL(), pairs)
    monkeypatch.setattr(estimators, "UPCAST", 64 * 70)  # 70 atoms at a time, and 20 left
    parts = off(rkl.KL(), pairs)
    assert parts == pytest.approx(whole, abs=1e-4)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64], ids=str)
def test_the_default_dtype_changes_nothing(default):
    p, q = torch.randn(2, 7, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mean = per_token({"": rkl.KL()}, p=p, q=q)[""].mean()
    single = exact(rkl.KL(), p=p.float(), q=q.float())
    torch.set_default_dtype(default)
    try:
        assert exact(rkl.KL(), p=p, q=q).item() == pytest.approx(mean.item(), rel=1e-14)
        assert torch.equal(exact(rkl.KL(), p=p.float(), q=q.float()), single)
    finally:
        torch.set_default_dtype(torch.float32)


def test_second_derivatives_and_transforms_are_refused_in_words():
    p, q = torch.randn(2, 3, 5)
    (gradient,) = torch.autograd.grad(
        exact(rkl.KL(), p=p, q=q.requires_grad_()), q, create_graph=True
    )
    with pytest.raises(NotImplementedError, match="once-differentiable"):
        gradient.sum().backward()
    for transform in (torch.func.grad, torch.func.jacrev):
        with pytest.raises(NotImplementedError, match="once-differentiable"):
            transform(lambda q: exact(rkl.KL(), p=p, q=q))(q.detach())
    with pytest.raises(NotImplementedError, match="once-differentiable"):
        torch.vmap(lambda q: exact(rkl.KL(), p=p, q=q))(torch.randn(2, 3, 5))


def test_ignored_labels_and_masks_are_answered_by_what_to_do():
    p, q = torch.randn(2, 3, 5)
    labels = torch.tensor([1, -100, 2])
    with pytest.raises(ValueError, match="such as those labelled -100, the weight 0"):
        exact(rkl.KL(), p=p, q=q, labels=labels, hard_label_weight=1.0)
    with pytest.warns(UserWarning, match=r"mask / mask\.sum\(\)"):
        exact(rkl.KL(), p=p, q=q, weight=torch.tensor([1.0, 0.0, 1.0]))
    with pytest.raises(TypeError, match=r"mask / mask\.sum\(\)"):
        exact(rkl.KL(), p=p, q=q, weight=labels > 0)

"""The path of a GPU, on a machine that has none.

Shapes, devices and dtypes are those of tensors without memory (meta), where nothing can be read
back; numbers those of the CPU, with the products that only a GPU has put in their place.
"""

import contextlib
import math

import pytest
import torch
from catalogued import ALL

import rkl
from rkl import LinearHead, estimators, exact, kernels

# All but AKL: the host asks the GPU whether the head of p ends among the atoms ranked at first.
DIRECT = [it for it in ALL if "AKL" not in repr(it)]


@pytest.fixture
def gpu(monkeypatch):
    """A device on which a number that is read back, for which a GPU would wait, is an error."""
    monkeypatch.setattr(estimators, "_on_gpu", lambda x: x.device.type == "meta")
    monkeypatch.setattr(torch, "autocast", lambda *of, **how: contextlib.nullcontext())
    return "meta"


def heads(tokens, vocab, dtype, bias=False):
    q, p = (
        [torch.empty(rows, width, dtype=dtype, device="meta") for rows in (tokens, vocab)]
        for width in (8, 16)
    )
    q += [torch.empty(vocab, dtype=dtype, device="meta")] if bias else []
    return LinearHead(*p), LinearHead(*(x.requires_grad_() for x in q))


@pytest.mark.parametrize("divergence", DIRECT, ids=repr)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_compiled_step_never_waits_for_the_gpu(divergence, dtype, gpu, monkeypatch):
    few = torch.zeros(1, 3)
    kernels.chunk_step(divergence, few, few, few[:, 0])  # what it computes once about itself
    monkeypatch.setattr(kernels, "_run_traced", kernels._run_eager)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    p, q = heads(20, 300, dtype, bias=True)
    loss = exact(divergence, p=p, q=q, chunk=8, compiled=True)
    gradients = torch.autograd.grad(loss, q[:3])
    assert loss.dtype == torch.float32
    assert {x.device.type for x in (loss, *gradients)} == {gpu}
    assert {x.dtype for x in gradients} == {dtype}
    assert [x.shape for x in gradients] == [x.shape for x in q[:3]]


def test_the_default_chunk_of_a_gpu_is_whole_tiles_within_a_gibibyte(gpu):
    for vocab in (32_000, 50_257, 151_936):
        _, q = heads(2, vocab, torch.bfloat16)
        chunk = estimators._chunk(None, q, None, compiled=True)
        assert chunk % 128 == 0
        assert 2**29 < 2 * 4 * chunk * vocab <= 2**30
    _, q = heads(2, 2**22, torch.bfloat16)
    assert estimators._chunk(None, q, None, compiled=True) == 128
    _, q = heads(2, 32_000, torch.bfloat16)  # uncompiled, a step holds several times as much
    assert 2 * 4 * estimators._chunk(None, q, None) * 32_000 <= 2**28


def test_no_block_outgrows_the_indices_of_a_compiled_kernel(gpu, monkeypatch):
    rows = []

    def run(step, a, products, *others):
        rows.append(len(products))
        return products.new_zeros(len(products)), products

    monkeypatch.setattr(kernels, "_run_traced", run)
    a, b = torch.empty(2, 40_000, 151_936, device=gpu).unbind()
    losses, _ = kernels.step_(kernels.Step(rkl.KL()), a, b, b[:, 0], None, compiled=True)
    assert losses.shape == (40_000,)
    assert max(rows) * 151_936 < 2**31
    assert len(rows) == 3


@pytest.fixture
def gpu_products(monkeypatch):
    """The products of a GPU on the CPU: of matrices in half precision, added up in single."""

    def product(a, b):
        assert a.dtype == b.dtype in (torch.bfloat16, torch.float16)
        return a.float() @ b.float()

    def add_product(total, a, b):
        assert total.dtype == torch.float32
        return total.add_(product(a, b))

    monkeypatch.setattr(estimators, "_multiplies_halves", lambda x: x.dtype in estimators.HALF)
    monkeypatch.setattr(estimators, "_mixed_product", product)
    monkeypatch.setattr(estimators, "_add_mixed_product", add_product)


NAMED = [rkl.KL(), rkl.ReverseKL(), rkl.JensenShannon(), rkl.AKL(), rkl.ToDi(), rkl.AlphaBeta()]


@pytest.mark.parametrize("divergence", NAMED, ids=repr)
@pytest.mark.parametrize(
    ("dtype", "scale"), [(torch.bfloat16, 1.0), (torch.float16, 2.0**10)], ids=str
)
@pytest.mark.parametrize("top", [None, 10])
def test_gradients_rounded_for_a_gpu_are_off_by_their_rounding(
    divergence, dtype, scale, top, gpu_products
):
    """The bounds of benchmarks/linear_head_gpu.py, of all tokens at once.

    In float16 the loss is scaled, as torch.amp.GradScaler does, for the result's own rounding.
    """
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape):
        return torch.randn(*shape, generator=generator)

    x, w, bias, y = numbers(21, 32), numbers(500, 32) / 2, numbers(500) / 2, 3 * numbers(21, 500)
    x, w, bias = (it.to(dtype).requires_grad_() for it in (x, w, bias))
    p = y
    if top:
        best = y.log_softmax(-1).topk(top)
        p = rkl.TopK(best.values, best.indices)
    value = exact(divergence, p=p, q=LinearHead(x, w, bias), chunk=8) * scale
    found = torch.autograd.grad(value, (x, w, bias))

    wide = [it.detach().double() for it in (x, w, bias)]
    logits = (wide[0] @ wide[1].T + wide[2]).requires_grad_()
    known = p if top is None else rkl.TopK(p.logp.double(), p.index)
    known = known.double() if top is None else known
    expected = exact(divergence, p=known, q=logits, compiled=False)
    assert value.item() / scale == pytest.approx(expected.item(), rel=1e-4)
    (gradient,) = torch.autograd.grad(expected, logits)
    squares, unit = gradient.square(), torch.finfo(dtype).eps / 2
    expected = gradient @ wide[1], gradient.T @ wide[0], gradient.sum(0)
    sums = squares @ wide[1].square(), squares.T @ wide[0].square(), squares.sum(0)
    for mine, true, of_rounding in zip(found, expected, sums, strict=True):
        bound = unit * math.sqrt(of_rounding.sum() + true.square().sum())
        assert (mine.double() / scale - true).norm() < bound


def test_the_gradient_of_a_gpu_is_rounded_in_the_pass_that_computes_it(gpu_products, monkeypatch):
    seen = []
    plain = kernels._over

    def over(step, *arguments):
        seen.append(step.rounded_to)
        return plain(step, *arguments)

    monkeypatch.setattr(kernels, "_over", over)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        x, w = torch.randn(3, 4, dtype=dtype), torch.randn(7, 4, dtype=dtype).requires_grad_()
        exact(rkl.KL(), p=LinearHead(x, w.detach()), q=LinearHead(x, w), compiled=False)
    assert seen == [torch.bfloat16, None, None]


@pytest.mark.slow
@pytest.mark.parametrize("divergence", NAMED, ids=repr)
def test_compiled_the_rounded_gradient_is_the_same(divergence, gpu_products):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 21, 16, generator=generator).to(torch.bfloat16)
    w, v = torch.randn(2, 300, 16, generator=generator).to(torch.bfloat16)
    x, w = x.requires_grad_(), w.requires_grad_()
    found = []
    for compiled in (True, False):
        loss = exact(
            divergence, p=LinearHead(y, v), q=LinearHead(x, w), chunk=8, compiled=compiled
        )
        found.append((loss, *torch.autograd.grad(loss, (x, w))))
    for one, other in zip(*found, strict=True):  # a last digit of float32 may round another way
        assert (one - other).norm() <= 2**-8 * other.norm()

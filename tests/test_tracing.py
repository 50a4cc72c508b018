"""A compiler can trace the whole step of every divergence, or it would run uncompiled."""

import functools

import jaxtyping
import pytest
import torch
from catalogued import every
from torch.utils._pytree import tree_leaves

from rkl.kernels import Step, _held_inputs, _over, _written_over, chunk_step


@pytest.mark.slow
@every
def test_the_step_of_every_divergence_is_traced_whole(divergence, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # it cannot be traced
    a, b = torch.randn(2, 6, 300, generator=torch.Generator().manual_seed(0))
    weight, step = torch.full((6,), 1 / 6), Step(divergence)
    chunk_step(divergence, a[:1], b[:1], weight[:1])  # as before every compilation
    inputs = _held_inputs(step, a, b, None)
    gathers = any(x.ndim > 1 for x in tree_leaves(inputs))
    function = functools.partial(_over if gathers else _written_over, step)
    eager = function(a, b.clone(), weight, None, inputs)
    torch.compiler.reset()  # the steps share one code object, whose graphs are limited
    traced = torch.compile(function, fullgraph=True, backend="eager")
    for one, other in zip(
        tree_leaves(traced(a, b.clone(), weight, None, inputs)), tree_leaves(eager), strict=True
    ):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-7)

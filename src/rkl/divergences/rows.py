"""Reductions over the atoms of a row, of which several processes may have a shard each."""

import contextlib
import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["row_logsumexp", "row_max", "row_sum"]


@dataclass(frozen=True, eq=False)
class Shards:
    """The processes that share the rows, each with the atoms of a part of the vocabulary.

    Attributes:
        sizes: Number of atoms of each process, in the order of the vocabulary.
        rank: Which of them this process is.
        group: What they communicate through.
    """

    sizes: tuple[int, ...]
    rank: int
    group: Any = None

    @property
    def count(self) -> int:
        """Number of processes."""
        return len(self.sizes)

    @property
    def vocab(self) -> int:
        """Number of atoms of all processes."""
        return sum(self.sizes)

    @property
    def first(self) -> int:
        """Place in the vocabulary of this process's first atom."""
        return sum(self.sizes[: self.rank])

    def reduce(self, x: Tensor, kind: Literal["sum", "max"]) -> Tensor:
        """The sum or the maximum of a tensor over the processes; constant to autograd."""
        total = x.detach().clone(memory_format=torch.contiguous_format)
        operation = dist.ReduceOp.SUM if kind == "sum" else dist.ReduceOp.MAX
        dist.all_reduce(total, operation, group=self.group)
        return total

    def local(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Places in this process's shard, and which of them lie in it; the others are 0."""
        place = index - self.first
        inside = (place >= 0) & (place < self.sizes[self.rank])
        return torch.where(inside, place, 0), inside


_CURRENT = threading.local()


def shards() -> Shards | None:
    """The processes that share the rows; None where rows are whole, as in compiled code."""
    return None if torch.compiler.is_compiling() else getattr(_CURRENT, "shards", None)


@contextlib.contextmanager
def rows_over(shared: Shards | None) -> Iterator[None]:
    """While this lasts, rows of this thread are shards; whole rows for None."""
    before = shards()
    _CURRENT.shards = shared
    try:
        yield
    finally:
        _CURRENT.shards = before


def row_sum(x: Float[Tensor, "*batch atoms"]) -> Float[Tensor, "*batch 1"]:
    """Sum over the atoms of each row, differentiable; over all shards, where rows are shared."""
    _check(x)
    total = x.sum(-1, keepdim=True)
    return total if (shared := shards()) is None else _reduced(total, shared)


def row_max(x: Float[Tensor, "*batch atoms"]) -> Float[Tensor, "*batch 1"]:
    """Largest entry of each row, constant to autograd; of all shards, where rows are shared."""
    _check(x)
    largest = x.detach().amax(-1, keepdim=True)
    return largest if (shared := shards()) is None else _largest(largest, shared)


def row_logsumexp(x: Float[Tensor, "*batch atoms"]) -> Float[Tensor, "*batch 1"]:
    """Logarithm of Σ exp over the atoms of each row, differentiable; over all shards too."""
    _check(x)
    if shards() is None:
        return x.logsumexp(-1, keepdim=True)
    largest = row_max(x)
    largest = largest.masked_fill(largest == -math.inf, 0.0)
    return row_sum((x - largest).exp()).log() + largest


def _check(x: Tensor) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = str(x.dtype) if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x must be a tensor of floating-point numbers; got {got}.")
    if not x.ndim:
        raise ValueError("x must be [*batch, atoms]; got a single number.")


def row_gather(
    x: Float[Tensor, "*batch atoms"], index: Int[Tensor, "*batch k"]
) -> Float[Tensor, "*batch k"]:
    """Entries of each row at places in the whole vocabulary, differentiable."""
    shared = shards()
    if shared is None:
        return x.gather(-1, index)
    place, inside = shared.local(index)
    return _reduced(x.gather(-1, place).masked_fill(~inside, 0.0), shared)


def row_scatter(
    x: Float[Tensor, "*batch atoms"],
    index: Int[Tensor, "*batch k"],
    values: float | Float[Tensor, "*batch k"],
) -> Float[Tensor, "*batch atoms"]:
    """The rows with other entries at places in the whole vocabulary, as Tensor.scatter gives."""
    shared = shards()
    if shared is None:
        return x.scatter(-1, index, values)
    place, inside = shared.local(index)
    place = torch.where(inside, place, x.shape[-1])  # a column more takes what lies elsewhere
    return torch.nn.functional.pad(x, (0, 1)).scatter_(-1, place, values)[..., :-1]


def row_scatter_add(
    x: Float[Tensor, "*batch atoms"],
    index: Int[Tensor, "*batch k"],
    values: Float[Tensor, "*batch k"],
) -> Float[Tensor, "*batch atoms"]:
    """Add values, in place, to the entries of each row at places in the whole vocabulary."""
    shared = shards()
    if shared is None:
        return x.scatter_add_(-1, index, values)
    place, inside = shared.local(index)
    return x.scatter_add_(-1, place, values.masked_fill(~inside, 0.0))


def row_places(x: Float[Tensor, "*batch atoms"]) -> Int[Tensor, " atoms"]:
    """The places of a row's entries in the whole vocabulary."""
    shared = shards()
    return torch.arange(x.shape[-1], device=x.device) + (0 if shared is None else shared.first)


def row_length(x: Float[Tensor, "*batch atoms"]) -> int:
    """Number of atoms of a row; of all shards, where rows are shared."""
    shared = shards()
    return x.shape[-1] if shared is None else shared.vocab


def row_log_softmax(*logits: Float[Tensor, "*batch _"]) -> Sequence[Tensor]:
    """Log-probabilities of several rows of logits, normalised in two reductions for all."""
    shared = shards()
    if shared is None:
        return tuple(x.log_softmax(-1) for x in logits)
    # The largest and the logarithm of the rest apart: their sum would round a large offset.
    largest = shared.reduce(torch.cat([x.amax(-1, keepdim=True) for x in logits], -1), "max")
    moved = [x - top for x, top in zip(logits, largest.split(1, -1), strict=True)]
    mass = shared.reduce(torch.cat([x.exp().sum(-1, keepdim=True) for x in moved], -1), "sum")
    return tuple(x - log for x, log in zip(moved, mass.log().split(1, -1), strict=True))


def _reduced(x: Tensor, shared: Shards) -> Tensor:
    reduced: Any = _Sum.apply(x, shared)
    return reduced


def _largest(x: Tensor, shared: Shards) -> Tensor:
    largest: Any = _Max.apply(x, shared)
    return largest


class _Sum(torch.autograd.Function):
    """Σ over processes, of which each differentiates its own share of the loss.

    Then the gradient of the sum of these shares in one process's x is the sum over processes of
    their gradients in the result, whether that goes on into something that all compute alike
    or into each one's own atoms.
    """

    @staticmethod
    def forward(x, shared):
        return shared.reduce(x, "sum")

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.shared = inputs[1]

    @staticmethod
    def backward(ctx, *upstream):
        return _reduced(upstream[0], ctx.shared), None


class _Max(torch.autograd.Function):
    """Largest over processes; a function of autograd, so that torch.func unwraps its input."""

    @staticmethod
    def forward(x, shared):
        return shared.reduce(x, "max")

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx, *upstream):
        return None, None

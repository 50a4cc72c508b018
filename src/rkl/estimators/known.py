"""What may be known of p and q over a finite vocabulary, and what of it is refused."""

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rkl.divergences import Divergence
from rkl.divergences.base import floats

EXCESS = 1e-2  # of a top k's probabilities over 1 that rounding in half precision explains


class LinearHead(NamedTuple):
    """The logits of a language model, not yet computed.

    They are c tanh(s y / c) / t of the products y = hidden @ weight.T + bias, where s is the
    scale, c the soft cap, and t the temperature; s y / t without a cap.
    """

    hidden: Float[Tensor, "tokens width"]
    weight: Float[Tensor, "vocab width"]
    bias: Float[Tensor, " vocab"] | None = None
    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0


class TopK(NamedTuple):
    """A teacher known by the log-probabilities of its k likeliest atoms.

    Both distributions are coarsened to {k atoms, the rest}: a lower bound on every
    f-divergence, tight as the rest loses its mass.
    """

    logp: Float[Tensor, "tokens k"]
    index: Int[Tensor, "tokens k"]


Logits = Float[Tensor, "tokens vocab"]
# What may be known, and of each kind the field that has one row for each token, and its axes.
_AXES = {
    Tensor: ("", "[tokens, vocab]"),
    LinearHead: (".hidden", "[tokens, width]"),
    TopK: (".logp", "[tokens, k]"),
}


def by_token(x: Logits | LinearHead | TopK) -> Tensor:
    """What has one row for each token."""
    return x[0] if isinstance(x, tuple) else x


def vocabulary(x: Logits | LinearHead | TopK) -> int:
    """The number of atoms of logits or a head; of a top k, k."""
    return len(x.weight) if isinstance(x, LinearHead) else by_token(x).shape[-1]


def check_pair(
    divergence: Divergence, p: Logits | LinearHead | TopK, q: Logits | LinearHead
) -> int:
    """The number of tokens, where p and q are well formed and agree on it and the vocabulary.

    Raises:
        TypeError: An argument, or a field of it, is of the wrong kind.
        ValueError: They do not fit; the message names the argument.
    """
    if not isinstance(divergence, Divergence):
        raise TypeError(
            f"divergence must be a Divergence such as AKL(); got {divergence!r}. "
            "rkl.parse makes one from a string."
        )
    if isinstance(q, TopK):
        raise TypeError("q must be logits or a LinearHead; got a TopK, which only p may be.")
    _check_side("p", p)
    _check_side("q", q)
    tokens, of_p, device = len(by_token(q)), len(by_token(p)), by_token(q).device
    if of_p != tokens:
        raise ValueError(f"p has {of_p} tokens but q has {tokens}.")
    if by_token(p).device != device:
        raise ValueError(f"p must be on {device}, where q is; got {by_token(p).device}.")
    if isinstance(p, TopK):
        _check_index(p, vocabulary(q))
    elif vocabulary(p) != vocabulary(q):
        raise ValueError(
            f"p has a vocabulary of {vocabulary(p)} but q of {vocabulary(q)}; "
            "pad the shorter one with logits of −inf, never with 0."
        )
    return tokens


def _check_side(name: str, x: Any) -> None:
    kind = next((it for it in _AXES if isinstance(x, it)), None)
    if kind is None:
        raise TypeError(
            f"{name} must be a tensor, a LinearHead or a TopK; got a {type(x).__name__}."
        )
    field, axes = _AXES[kind]
    rows: Any = x[0] if field else x
    floats(name + field, rows)
    if rows.ndim != 2 or not rows.shape[1]:
        hint = f" {name}{field}.flatten(0, -2) has one row for each token." * (rows.ndim > 2)
        raise ValueError(f"{name}{field} must be {axes}; got {list(rows.shape)}.{hint}")
    if isinstance(x, LinearHead):
        _check_head(name, x)


def _check_head(name: str, head: LinearHead) -> None:
    width = head.hidden.shape[-1]
    floats(f"{name}.weight", head.weight)
    if head.weight.ndim != 2 or head.weight.shape[-1] != width or not len(head.weight):
        raise ValueError(
            f"{name}.weight must be [vocab, {width}], as {name}.hidden is {width} wide; "
            f"got {list(head.weight.shape)}."
        )
    _check_alike(f"{name}.weight", head.weight, head.hidden)
    if head.bias is not None:
        vocab = len(head.weight)
        floats(f"{name}.bias", head.bias)
        if head.bias.shape != (vocab,):
            raise ValueError(f"{name}.bias must be [{vocab}]; got {list(head.bias.shape)}.")
        _check_alike(f"{name}.bias", head.bias, head.hidden)
    _check_factor(f"{name}.scale", head.scale)
    if head.softcap is not None:
        _check_factor(f"{name}.softcap", head.softcap)
    _check_factor(f"{name}.temperature", head.temperature)


def _check_alike(name: str, x: Tensor, hidden: Tensor) -> None:
    """Refuse what cannot be multiplied with the hidden states: another precision or device."""
    if x.dtype != hidden.dtype or x.device != hidden.device:
        raise TypeError(
            f"{name} must be {hidden.dtype} on {hidden.device}, as the hidden states are; "
            f"got {x.dtype} on {x.device}."
        )


def _check_factor(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number; got a {type(value).__name__}.")
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite; got {value}.")


def _check_index(p: TopK, vocab: int) -> None:
    integers("p.index", p.index)
    if p.index.shape != p.logp.shape or p.index.shape[-1] > vocab:
        raise ValueError(
            f"p.index must have the shape of p.logp, {list(p.logp.shape)}, within q's "
            f"vocabulary of {vocab}; got {list(p.index.shape)}."
        )
    if p.index.device != p.logp.device:
        raise ValueError(f"p.index must be on {p.logp.device}; got {p.index.device}.")
    ordered = p.index.sort(-1).values
    if len(ordered) and (ordered.min() < 0 or ordered.max() >= vocab):
        raise ValueError(
            f"p.index must lie in [0, {vocab}), q's vocabulary; "
            f"got {ordered.min().item()} to {ordered.max().item()}."
        )
    if (ordered.diff() == 0).any():
        raise ValueError("p.index must name k different atoms for each token; one is there twice.")
    if (total := p.logp.exp().sum(-1)).gt(1 + EXCESS).any():
        raise ValueError(
            "p.logp must be log-probabilities, whose exponentials sum to at most 1; "
            f"got {total.max():.4g}."
        )


def integers(name: str, x: Any) -> None:
    """Refuse what is no tensor of integers that can index, with a TypeError."""
    if not isinstance(x, Tensor) or x.dtype not in (torch.int32, torch.int64):
        got = x.dtype if isinstance(x, Tensor) else f"a {type(x).__name__}"
        raise TypeError(f"{name} must be a tensor of integers, int32 or int64; got {got}.")

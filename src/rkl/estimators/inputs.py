"""The forms of p and q over a finite vocabulary, and their checks."""

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

from rkl.checks import floats, integer, number
from rkl.divergences import Divergence, FDivergence

EXCESS = 1e-2  # of a top k's probabilities over 1 that rounding in half precision explains


class LinearHead(NamedTuple):
    """The logits of a language model, not yet computed.

    They are c tanh(s y / c) / t of the products y = hidden @ weight.T + bias, where s is the
    scale, c the soft cap, and t the temperature; s y / t without a cap.

    With a group, weight and bias are this process's part of the vocabulary, the parts in the
    order of the ranks, and the hidden states are the same in all processes of the group. Where
    the other rows of a weight lie is a property of the head, so that it is said here and not to
    each verb. Every verb then gives the value over the whole vocabulary, in every process; the
    gradient of a part is that of its process, and the one of the hidden states is already
    summed over the group (Megatron's copy_to_tensor_model_parallel_region would sum it again).
    Of a ``DTensor`` cut along the vocabulary give ``weight.to_local()`` and the group of its mesh.
    """

    hidden: Float[Tensor, "tokens width"]
    weight: Float[Tensor, "vocab width"]
    bias: Float[Tensor, " vocab"] | None = None
    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0
    group: dist.ProcessGroup | None = None


class TopK(NamedTuple):
    """A teacher known by the log-probabilities of its k likeliest atoms.

    Both distributions are coarsened to {k atoms, the rest}: a lower bound on every
    f-divergence, tight as the rest loses its mass.
    """

    logp: Float[Tensor, "tokens k"]
    index: Int[Tensor, "tokens k"]


class Sampled(NamedTuple):
    """A teacher known at atoms drawn from it, the student being known everywhere.

    Every f-divergence then has an unbiased estimate, Σ F(pᵥ, qᵥ) = E_p[F(p, q)/p], with the
    control variate of :func:`monte_carlo` where F(0, q) is not 0. The value of a token is the
    mean over its draws.

    Atoms drawn from another distribution s, such as p at a higher temperature, carry
    log p/s: the estimate is then the mean of (p/s) F(p, q)/p, unbiased where s has mass
    wherever p has. These weights are never normalised by their sum, which would bias it.

    Source: Anshumann et al. (2025), arXiv 2503.16870, for forward KL.
    """

    logp: Float[Tensor, "tokens draws"]
    index: Int[Tensor, "tokens draws"]
    log_weight: Float[Tensor, "tokens draws"] | None = None


def draw(
    logits: Float[Tensor, "tokens vocab"],
    draws: int,
    *,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> Sampled:
    """Atoms drawn from a softmax, with replacement.

    Args:
        logits: Logits of the distribution p.
        draws: Number of atoms of each token.
        temperature: Temperature of the sampled distribution; if not 1, the draws carry
            their weights.
        generator: Source of the random numbers.

    >>> teacher = draw(torch.zeros(1, 2), 3, generator=torch.Generator().manual_seed(0))
    >>> teacher.logp
    tensor([[-0.6931, -0.6931, -0.6931]])
    """
    floats("logits", logits)
    if logits.ndim != 2 or not logits.shape[1]:
        raise ValueError(f"logits must be [tokens, vocab]; got {list(logits.shape)}.")
    integer("draws", draws, at_least=1)
    number("temperature", temperature, above=0)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logp = logits.log_softmax(-1)
    proposal = logp if temperature == 1 else (logits / temperature).log_softmax(-1)
    index = proposal.exp().multinomial(draws, replacement=True, generator=generator)
    at = logp.gather(-1, index)
    return Sampled(at, index, None if temperature == 1 else at - proposal.gather(-1, index))


Logits = Float[Tensor, "tokens vocab"]
# What may be known, and of each kind the field that has one row for each token, and its axes.
_AXES = {
    Tensor: ("", "[tokens, vocab]"),
    LinearHead: (".hidden", "[tokens, width]"),
    TopK: (".logp", "[tokens, k]"),
    Sampled: (".logp", "[tokens, draws]"),
}


def by_token(x: Logits | LinearHead | TopK | Sampled) -> Tensor:
    """The tensor with one row for each token."""
    return x[0] if isinstance(x, tuple) else x


def vocabulary(x: Logits | LinearHead | TopK | Sampled) -> int:
    """The number of atoms of logits or a head; of a top k, k; of draws, their number."""
    return len(x.weight) if isinstance(x, LinearHead) else by_token(x).shape[-1]


def check_pair(
    divergence: Divergence,
    p: Logits | LinearHead | TopK | Sampled,
    q: Logits | LinearHead,
    vocab: int | None = None,
) -> int:
    """The number of tokens, where p and q are well formed and agree on it and the vocabulary.

    ``vocab`` is the number of all atoms where several processes share them.

    Raises:
        TypeError: An argument, or a field of it, is of the wrong kind.
        ValueError: They do not fit; the message names the argument.
    """
    if not isinstance(divergence, Divergence):
        raise TypeError(
            f"divergence must be a Divergence such as AKL(); got {divergence!r}. "
            "rkl.parse makes one from a string."
        )
    if isinstance(q, TopK | Sampled):
        kind = type(q).__name__
        raise TypeError(f"q must be logits or a LinearHead; got a {kind}, which only p may be.")
    _check_side("p", p)
    _check_side("q", q)
    tokens, of_p, device = len(by_token(q)), len(by_token(p)), by_token(q).device
    if of_p != tokens:
        raise ValueError(f"p has {of_p} tokens but q has {tokens}.")
    if by_token(p).device != device:
        raise ValueError(f"p must be on {device}, where q is; got {by_token(p).device}.")
    if isinstance(p, TopK):
        _check_index(p, vocab or vocabulary(q))
        _check_coarse(divergence, p, vocab or vocabulary(q))
    elif isinstance(p, Sampled):
        _check_draws(divergence, p, vocab or vocabulary(q))
    elif vocab is not None:
        _check_parts(divergence, p, q, vocab)
    elif vocabulary(p) != vocabulary(q):
        raise ValueError(
            f"p has a vocabulary of {vocabulary(p)} but q of {vocabulary(q)}; "
            "pad the shorter one with logits of −inf, never with 0."
        )
    return tokens


def _check_parts(divergence: Divergence, p: Any, q: Any, vocab: int) -> None:
    """Refuse parts of a vocabulary that are not those of q, or that a divergence cannot take."""
    if reason := divergence.needs_whole_rows:
        raise ValueError(
            f"divergence: the processes of q.group have a part of the vocabulary each, but "
            f"{divergence} needs all of it: {reason}."
        )
    has_part = isinstance(p, LinearHead) and p.group is not None
    expected = vocabulary(q) if has_part else vocab
    if vocabulary(p) != expected:
        of = "in this process, as q has" if has_part else "as the processes of q.group have"
        raise ValueError(f"p must have {expected} atoms {of}; got {vocabulary(p)}.")


def _check_side(name: str, x: Any) -> None:
    kind = next((it for it in _AXES if isinstance(x, it)), None)
    if kind is None:
        raise TypeError(
            f"{name} must be a tensor, a LinearHead, a TopK or a Sampled; "
            f"got a {type(x).__name__}."
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
    if type(head.weight).__name__ == "DTensor":  # importing the class takes a second
        raise TypeError(
            f"{name}.weight must be a plain tensor; got a DTensor. Of one cut along the "
            "vocabulary give weight.to_local() and group=weight.device_mesh.get_group(), else "
            "weight.full_tensor()."
        )
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
    number(f"{name}.scale", head.scale, above=0)
    if head.softcap is not None:
        number(f"{name}.softcap", head.softcap, above=0)
    number(f"{name}.temperature", head.temperature, above=0)


def _check_alike(name: str, x: Tensor, hidden: Tensor) -> None:
    """Refuse what cannot be multiplied with the hidden states: another precision or device."""
    if x.dtype != hidden.dtype or x.device != hidden.device:
        raise TypeError(
            f"{name} must be {hidden.dtype} on {hidden.device}, as the hidden states are; "
            f"got {x.dtype} on {x.device}."
        )


def _check_coarse(divergence: Divergence, p: TopK, vocab: int) -> None:
    """Refuse a top k to a divergence that means nothing over the k atoms and the rest."""
    if divergence.takes_labels:
        raise ValueError(
            f"p must be the whole distribution: {divergence} looks at the true token, which may "
            "lie beyond the top k; got a TopK."
        )
    k = p.index.shape[-1]
    if divergence.needs_every_atom and k < vocab:
        raise ValueError(
            f"p must be the whole distribution for {divergence}: {divergence.needs_every_atom}; "
            f"got {k} of {vocab} atoms."
        )


def _check_index(p: TopK, vocab: int) -> None:
    _check_places(p, vocab, most=vocab)
    ordered = p.index.sort(-1).values
    if (ordered.diff() == 0).any():
        raise ValueError("p.index must name k different atoms for each token; one is there twice.")
    if (total := p.logp.exp().sum(-1)).gt(1 + EXCESS).any():
        raise ValueError(
            "p.logp must be log-probabilities, whose exponentials sum to at most 1; "
            f"got {total.max():.4g}."
        )


def _check_places(p: TopK | Sampled, vocab: int, *, most: float = math.inf) -> None:
    integers("p.index", p.index)
    if p.index.shape != p.logp.shape or p.index.shape[-1] > most:
        raise ValueError(
            f"p.index must have the shape of p.logp, {list(p.logp.shape)}, within q's "
            f"vocabulary of {vocab}; got {list(p.index.shape)}."
        )
    if p.index.device != p.logp.device:
        raise ValueError(f"p.index must be on {p.logp.device}; got {p.index.device}.")
    if p.index.numel() and (p.index.min() < 0 or p.index.max() >= vocab):
        raise ValueError(
            f"p.index must lie in [0, {vocab}), q's vocabulary; "
            f"got {p.index.min().item()} to {p.index.max().item()}."
        )


def _check_draws(divergence: Divergence, p: Sampled, vocab: int) -> None:
    if not isinstance(divergence, FDivergence):
        raise TypeError(
            f"divergence must be an f-divergence where p is Sampled; got {divergence!r}, whose "
            "terms are no means over draws from p: it looks at whole distributions, or not at "
            "p/q alone. Take a TopK, logits or a head, or KL()."
        )
    _check_places(p, vocab)
    if p.logp.numel() and (largest := p.logp.max()) > math.log1p(EXCESS):
        raise ValueError(f"p.logp must be log-probabilities, at most 0; got {largest:.4g}.")
    if p.logp.numel() and p.logp.isneginf().any():
        raise ValueError("p.logp must be finite: an atom that was drawn has mass; got -inf.")
    if p.log_weight is None:
        return
    floats("p.log_weight", p.log_weight)
    if p.log_weight.shape != p.logp.shape or p.log_weight.device != p.logp.device:
        raise ValueError(
            f"p.log_weight must be as p.logp, {list(p.logp.shape)} on {p.logp.device}; "
            f"got {list(p.log_weight.shape)} on {p.log_weight.device}."
        )


def integers(name: str, x: Any) -> None:
    """Refuse anything but a tensor of integers that can index, with a TypeError."""
    if not isinstance(x, Tensor) or x.dtype not in (torch.int32, torch.int64):
        got = x.dtype if isinstance(x, Tensor) else f"a {type(x).__name__}"
        raise TypeError(f"{name} must be a tensor of integers, int32 or int64; got {got}.")

r"""Estimators of a divergence, one for each thing you may know of p and q.

==========================================  ====================================
you know                                    use
==========================================  ====================================
both, over a finite vocabulary              :func:`exact`, :func:`per_token`
log(p/q), at samples from one of them       :func:`monte_carlo`
samples from both, and nothing else         :func:`variational_bound`
that both belong to a parametric family     :meth:`Divergence.between`
==========================================  ====================================
"""

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.func import grad
from torch.nn.functional import linear

from rkl.divergences import Divergence, FDivergence
from rkl.kernels import step_


class LinearHead(NamedTuple):
    """The logits cap tanh(scale (hidden @ weight.T + bias)/cap)/temperature, not yet computed."""

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


def exact(
    divergence: Divergence,
    *,
    p: Logits | LinearHead | TopK,
    q: Logits | LinearHead,
    weight: Float[Tensor, " tokens"] | None = None,
    chunk: int = 256,
    compiled: bool = False,
) -> Float[Tensor, ""]:
    """Weighted sum over tokens of D(p ‖ q), differentiable in q; by default their mean.

    Given q as a LinearHead, the logits and their gradient are computed ``chunk`` tokens
    at a time, and memory is O(chunk · vocab) rather than O(tokens · vocab).

    Args:
        divergence: Any divergence.
        p: The teacher's logits, the head that yields them, or its top k. Held constant.
        q: The student's logits, or the head that yields them.
        weight: Weight of each token, constant; a token of weight 0 is never looked at.
            Defaults to 1/tokens.
        chunk: How many tokens' logits may exist at one time.
        compiled: Whether to compile the chunk's step, once per divergence.

    Returns:
        Σ wₜ Dₜ in nats, in single precision or better.

    >>> from rkl import ReverseKL
    >>> teacher, student = torch.zeros(3, 2), torch.tensor([9.0, 1.0]).log().expand(3, 2)
    >>> exact(ReverseKL(), p=teacher, q=student)
    tensor(0.3681)
    """
    tokens = _tokens(p, q)
    device = _by_token(q).device
    weight = torch.full((tokens,), 1 / max(tokens, 1), device=device) if weight is None else weight
    if len(weight) != tokens:
        raise ValueError(f"weight has {len(weight)} tokens but q has {tokens}.")
    kept = weight.detach().nonzero().squeeze(-1)
    if not len(kept):
        raise ValueError(f"None of the {tokens} tokens has a weight: there is nothing to compare.")
    parameters = q if isinstance(q, LinearHead) else (q,)
    return _Exact.apply(divergence, p, weight.detach(), kept.split(chunk), compiled, *parameters)


class _Exact(torch.autograd.Function):
    """Σ wₜ D(pₜ ‖ qₜ), with the gradient of each chunk taken while its logits exist."""

    @staticmethod
    def forward(ctx, divergence, p, weight, chunks, compiled, *parameters):
        wanted = ctx.needs_input_grad[5:]
        totals = [
            torch.zeros_like(x, dtype=_at_least_single(x)) if wants else None
            for x, wants in zip(parameters, wanted, strict=True)
        ]
        value = torch.zeros((), dtype=_at_least_single(parameters[0]), device=weight.device)
        for rows in chunks:
            a, b, spread = _pair(p, parameters, rows)
            w = weight[rows].to(b.dtype)
            value += w @ step_(divergence, a, b, w, compiled)
            _pull_back(totals, parameters, rows, spread(b))
        ctx.save_for_backward(*(x for x in totals if x is not None))
        ctx.likes = [x.dtype if x is not None else None for x in parameters]
        ctx.wanted = wanted
        return value

    @staticmethod
    def backward(ctx, *upstream):
        saved = iter(ctx.saved_tensors)
        pulls = (
            (upstream[0] * next(saved)).to(dtype) if wants else None
            for dtype, wants in zip(ctx.likes, ctx.wanted, strict=True)
        )
        return None, None, None, None, None, *pulls


def per_token(
    divergences: Mapping[str, Divergence],
    *,
    p: Logits | LinearHead | TopK,
    q: Logits | LinearHead,
    chunk: int = 256,
) -> dict[str, Float[Tensor, " tokens"]]:
    """D(p ‖ q) of every token, in nats, for several divergences at once; no gradient.

    >>> from rkl import KL
    >>> values = per_token({"kl": KL()}, p=torch.zeros(2, 3), q=torch.zeros(2, 3))
    >>> values["kl"]
    tensor([0., 0.])
    """
    parts = {name: [] for name in divergences}
    everything = torch.arange(_tokens(p, q), device=_by_token(q).device)
    with torch.no_grad():
        for rows in everything.split(chunk):
            a, b, _ = _pair(p, q if isinstance(q, LinearHead) else (q,), rows)
            logp, logq = a.log_softmax(-1), b.log_softmax(-1)
            for name, divergence in divergences.items():
                parts[name].append(divergence(logp, logq))
    return {name: torch.cat(values) for name, values in parts.items()}


def monte_carlo(
    divergence: FDivergence,
    log_ratio: Float[Tensor, " samples"],
    *,
    sampled_from: Literal["p", "q"],
) -> Float[Tensor, " samples"]:
    """Terms whose mean is an unbiased estimate of D(p ‖ q), wherever p and q have mass.

    Samples from q never meet the mass that p has where q has none, F(1, 0) per unit of
    it. That mass is 1 − E_q[p/q], so the terms are F(p/q, 1) − F(1, 0) (p/q − 1), where
    F(1, 0) is finite; from p, the mirror image. For the KLs they are log q/p and log p/q.

    Args:
        divergence: An f-divergence. AKL is not one; use :func:`exact`.
        log_ratio: log p(x) − log q(x) at each sample x, in nats.
        sampled_from: The distribution x was drawn from.

    Returns:
        One term per sample, so that their mean and its standard error are both at hand.

    >>> from rkl import ReverseKL
    >>> monte_carlo(ReverseKL(), torch.tensor([0.5, -1.0]), sampled_from="q")
    tensor([-0.5000,  1.0000])
    """
    one, nothing = torch.zeros_like(log_ratio), torch.full_like(log_ratio[:1], -math.inf)
    if sampled_from == "q":
        terms, missed = (
            divergence.integrand(log_ratio, one),
            divergence.integrand(one[:1], nothing),
        )
    else:
        log_ratio = -log_ratio
        terms, missed = (
            divergence.integrand(one, log_ratio),
            divergence.integrand(nothing, one[:1]),
        )
    return terms - missed * log_ratio.expm1() if 0 < missed < math.inf else terms


def variational_bound(
    divergence: FDivergence,
    *,
    score_p: Float[Tensor, " p_samples"],
    score_q: Float[Tensor, " q_samples"],
) -> Float[Tensor, ""]:
    """A lower bound on D(p ‖ q) from samples alone, tight where the score is log(p/q).

    F is convex and homogeneous, so its tangent plane at the ratio eˢ lies below it:
    F(p, q) ≥ p ∂₁F(eˢ, 1) + q ∂₂F(eˢ, 1). This is the f-GAN bound of Nowozin et al.
    (2016), arXiv 1606.00709, eq. (4), with the conjugate of f eliminated.

    Args:
        divergence: An f-divergence.
        score_p: The discriminator at samples from p.
        score_q: The discriminator at samples from q.

    Returns:
        The bound in nats. Maximise it over the discriminator, minimise it over q.
    """
    slope_in_p = grad(lambda logp: divergence.integrand(logp, -score_p).sum())
    slope_in_q = grad(lambda logq: divergence.integrand(score_q, logq).sum())
    one_p, one_q = torch.zeros_like(score_p), torch.zeros_like(score_q)
    return slope_in_p(one_p).mean() + slope_in_q(one_q).mean()


def _tokens(p, q) -> int:
    """The number of tokens, where p and q agree on it and on the vocabulary."""
    for name, x in (("p", p), ("q", q)):
        if _by_token(x).ndim != 2:
            raise ValueError(f"{name} must be [tokens, vocab]; got {list(_by_token(x).shape)}.")
    tokens, of_p = len(_by_token(q)), len(_by_token(p))
    if of_p != tokens:
        raise ValueError(f"p has {of_p} tokens but q has {tokens}.")
    if not isinstance(p, TopK) and _vocab(p) != _vocab(q):
        raise ValueError(
            f"p has a vocabulary of {_vocab(p)} but q of {_vocab(q)}; "
            "pad the shorter one with logits of −inf, never with 0."
        )
    return tokens


def _by_token(x) -> Tensor:
    return x[0] if isinstance(x, tuple) else x


def _vocab(x) -> int:
    return len(x.weight) if isinstance(x, LinearHead) else x.shape[-1]


def _logits(parameters, rows: Tensor) -> Logits:
    """A fresh tensor, in single precision or better: it may be written over."""
    by_token, *head = parameters
    logits = linear(by_token[rows], *head) if head else by_token[rows]
    return logits.to(_at_least_single(logits))


def _pair(p, parameters, rows):
    """Teacher logits, student logits, and how a gradient in them spreads over the vocabulary."""
    b = _logits(parameters, rows)
    if not isinstance(p, TopK):
        return (
            _logits(p if isinstance(p, LinearHead) else (p,), rows),
            b,
            lambda gradient: gradient,
        )
    top, index = p.logp[rows].to(b.dtype), p.index[rows]
    rest = (-top.exp().sum(-1, keepdim=True).clamp_max(1.0)).log1p()
    if index.shape[-1] == b.shape[-1]:
        rest.fill_(-math.inf)  # what rounding leaves of an empty rest would cost infinitely
    tail = b.scatter(-1, index, -math.inf)
    total = tail.logsumexp(-1, keepdim=True)

    def spread(gradient):
        share = (tail - total.clamp_min(torch.finfo(b.dtype).min)).exp()  # 0 in an empty tail
        return (gradient[:, -1:] * share).scatter(-1, index, gradient[:, :-1])

    return torch.cat([top, rest], -1), torch.cat([b.gather(-1, index), total], -1), spread


def _pull_back(totals, parameters, rows, gradient):
    """Add the gradient in the logits of some rows to the gradients in hidden states and head."""
    by_token, *head = parameters
    if not head:
        if totals[0] is not None:
            totals[0][rows] = gradient
        return
    hidden = by_token[rows]
    if totals[0] is not None:
        totals[0][rows] = (gradient.to(hidden.dtype) @ head[0]).to(totals[0].dtype)
    if totals[1] is not None:
        _add_product(totals[1], gradient.T, hidden)
    if totals[2:] and totals[2] is not None:
        totals[2] += gradient.sum(0)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Total += left @ right, multiplied in the precision of right."""
    if total.dtype == right.dtype:
        total.addmm_(left, right)
    else:
        total += left.to(right.dtype) @ right


def _at_least_single(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)

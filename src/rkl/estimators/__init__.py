r"""Estimators of a divergence, one for each thing you may know of p and q.

==========================================  ====================================
you know                                    use
==========================================  ====================================
both, over a finite vocabulary              :func:`exact`, :func:`per_token`
q, and log p at atoms drawn from p          the same, with p a :class:`Sampled`
log(p/q), at samples from one of them       :func:`monte_carlo`
samples from both, and nothing else         :func:`variational_bound`
that both belong to a parametric family     :meth:`Divergence.between`
==========================================  ====================================
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import linear

from rkl.checks import floats, integer, number, warn
from rkl.divergences import KL, Divergence, FDivergence
from rkl.divergences.base import slope_from_terms, widest
from rkl.divergences.rows import Shards, row_gather, row_log_softmax, rows_over
from rkl.estimators.agreement import cut, in_agreement, shards_of
from rkl.estimators.inputs import (
    LinearHead,
    Logits,
    Sampled,
    TopK,
    by_token,
    check_pair,
    draw,
    integers,
    vocabulary,
)
from rkl.kernels import Draws, Shape, Step, comparable, compiles, outside_dynamo, rows_of, step_
from rkl.kernels import compile_apart as compile_apart  # for the wings
from rkl.kernels import compiled_or_eager as compiled_or_eager
from rkl.kernels import has_compiler as has_compiler

__all__ = [
    "LinearHead",
    "Sampled",
    "TopK",
    "draw",
    "exact",
    "monte_carlo",
    "per_token",
    "sampled_terms",
    "variational_bound",
]

HALF = torch.float16, torch.bfloat16
UPCAST = 2**22  # numbers of a head in half precision that are held in single at a time
BUDGET = 2**28  # bytes of logits that exist at one time, teacher's and student's together
# Of a compiled step on a GPU, which reads both heads anew and adds to the whole of dW for each
# chunk: of few tokens that takes longer than their products. TRL's buffers are as large.
BUDGET_ON_GPU = 2**30


@outside_dynamo
def exact(
    divergence: Divergence,
    *,
    p: Logits | LinearHead | TopK | Sampled,
    q: Logits | LinearHead,
    weight: Float[Tensor, " tokens"] | None = None,
    chunk: int | None = None,
    compiled: bool | None = None,
    labels: Int[Tensor, " tokens"] | None = None,
    hard_label_weight: float = 0.0,
) -> Float[Tensor, ""]:
    """Weighted sum over tokens of D(p ‖ q), differentiable in q; by default their mean.

    Given q as a LinearHead, the logits and their gradient are computed ``chunk`` tokens at a
    time: memory is O(chunk · vocab), and the matrix products are the four of a plain step
    (two projections, the gradients in hidden states and head), three for a frozen head.

    Given q as a LinearHead with a group, each process has a part of the vocabulary. The value is
    then that of the whole, the same in all of them, and what they send for a token does not grow
    with the vocabulary: normalisers, sums over atoms, and the gradient in its hidden state. p may
    be cut alike, or whole in every process, which then takes its part; or a TopK or Sampled.

    Args:
        divergence: Any divergence.
        p: The teacher's logits, the head that yields them, its top k, or atoms drawn from it,
            which give an unbiased estimate of the value and its gradient. Held constant.
        q: The student's logits, or the head that yields them.
        weight: Weight of each token, constant and at least 0; tokens of weight 0 are not
            computed. Defaults to 1/tokens. Nothing is divided by its sum.
        chunk: Number of tokens whose logits exist at one time; by default 256 MiB of them, or
            1 GiB compiled on a GPU.
        compiled: Whether to compile the step, once per divergence; by default, where there
            is work enough and a compiler. Parts of a vocabulary run uncompiled.
        labels: The true token, for the cross-entropy below and for a divergence that takes labels.
        hard_label_weight: Weight of the student's cross-entropy on the labels, at
            temperature 1, beside D.

    Returns:
        Σ wₜ (Dₜ + h CEₜ) in nats, in single precision or better. It is +∞ where a Dₜ is, and
        then that token has no gradient.

    Raises:
        ValueError: Shapes, weights or labels do not fit; the message names the argument.
        TypeError: An argument is of the wrong kind.

    >>> from rkl import ReverseKL
    >>> teacher, student = torch.zeros(3, 2), torch.tensor([9.0, 1.0]).log().expand(3, 2)
    >>> exact(ReverseKL(), p=teacher, q=student)
    tensor(0.3681)
    """
    _refuse_transforms()
    shared = shards_of(p, q)
    vocab = None if shared is None else shared.vocab

    def prepare():
        tokens = check_pair(divergence, p, q, vocab)
        weighted, weights = _weighted_tokens(weight, tokens, by_token(q))
        true = _check_labels(labels, hard_label_weight, divergence, weighted, q, vocab)
        run = _check_compiled(compiled, len(weighted) * vocabulary(q), weights.device, shared)
        size = _chunk(chunk, q, shared, compiled=run)
        rounded = _gradient_dtype(q)
        step = Step(divergence, _shape(p), _shape(q), float(hard_label_weight), rounded)
        tracked = torch.is_grad_enabled()
        work = _Work(
            step, cut(p, shared), weights, weighted.split(size), true, run, tracked, shared
        )
        if shared is None:
            return work, (), {}
        wanted = [tracked and x is not None and x.requires_grad for x in _parameters(q)]
        settings = *step, type(p), len(weighted), tokens, size, by_token(q).dtype, wanted
        alike = {"q's hidden states": by_token(q)[weighted], "p": by_token(p)[weighted]}
        return work, settings, alike | {"weight": weights, "labels": true}

    return _Exact.apply(in_agreement(shared, q, prepare), *_parameters(q))


def _parameters(q: Logits | LinearHead) -> tuple:
    return q[:3] if isinstance(q, LinearHead) else (q,)


def _check_compiled(
    compiled: Any, elements: int, device: torch.device, shared: Shards | None
) -> bool:
    if compiled not in (None, True, False):
        raise TypeError(f"compiled must be True, False or None; got {compiled!r}.")
    if shared is not None and compiled:
        raise ValueError(
            "compiled must be False or None where processes share the vocabulary, for they "
            "communicate within the step; got True."
        )
    if compiled is None:
        return shared is None and compiles(elements, device)
    return compiled


class _Work(NamedTuple):
    """Inputs of a pass over the tokens that have no gradient."""

    step: Step
    p: Logits | LinearHead | TopK | Sampled
    weight: Float[Tensor, " tokens"]
    rows: tuple[Int[Tensor, " chunk"], ...]
    labels: Int[Tensor, " tokens"] | None
    compiled: bool
    tracked: bool
    shared: Shards | None = None


class _Exact(torch.autograd.Function):
    """Σ wₜ D(pₜ ‖ qₜ), with the gradient of each chunk taken while its logits exist."""

    @staticmethod
    def forward(ctx, work: _Work, *parameters):
        wanted = [wants and work.tracked for wants in ctx.needs_input_grad[1:]]
        totals: list[Any] = [None] * len(parameters)
        like = parameters[0]
        value = torch.zeros((), dtype=_at_least_single(like), device=like.device)
        on_cpu, over = like.device.type == "cpu", (None, None)
        # autocast would round the products
        with torch.autocast(like.device.type, enabled=False), rows_over(work.shared):
            for rows in work.rows:
                a, b = _pair(work.p, parameters, rows, over)
                w = work.weight[rows].to(b.dtype)
                labels = None if work.labels is None else work.labels[rows]
                losses, gradient = step_(work.step, a, b, w, labels, work.compiled)
                value += w @ losses
                over = (a, b) if on_cpu and rows is not work.rows[-1] else (None, None)
                del a, b  # before products of the gradient need memory
                _pull_back(totals, wanted, parameters, rows, gradient)
        if work.shared is not None and totals[0] is not None:
            totals[0] = work.shared.reduce(totals[0], "sum")
        ctx.save_for_backward(*(x for x in totals if x is not None))
        ctx.likes = [
            x.dtype if wants else None for x, wants in zip(parameters, wanted, strict=True)
        ]
        return value

    @staticmethod
    def backward(ctx, *upstream):
        saved = iter(ctx.saved_tensors)
        factor = upstream[0].detach()
        alone = factor.device.type == "cpu" and bool(factor == 1)  # elsewhere it costs more to ask
        with torch.no_grad():
            gradients = [
                None if dtype is None else _times(factor, next(saved), alone, dtype)
                for dtype in ctx.likes
            ]
        if torch.is_grad_enabled():  # create_graph=True
            gradients = [x if x is None else _Once.apply(x.requires_grad_()) for x in gradients]
        return None, *gradients


class _Once(torch.autograd.Function):
    """A gradient without a gradient of its own: asking for one is an error."""

    @staticmethod
    def forward(ctx, gradient):
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, *upstream):
        raise NotImplementedError(_ONCE)


_ONCE = (
    "rkl.exact is once-differentiable: it computes its gradient with its value, and has no second "
    "derivative and no torch.func transforms (grad, jacrev, vmap). Use loss.backward() or "
    "torch.autograd.grad, or call the divergence itself on log-probabilities over full logits."
)


def _refuse_transforms() -> None:
    functorch: Any = torch._C  # torch has no public way to ask
    if functorch._functorch.peek_interpreter_stack() is not None:
        raise NotImplementedError(_ONCE)


def _times(factor: Tensor, total: Tensor, alone: bool, dtype: torch.dtype) -> Tensor:
    if alone:
        return total.to(dtype)
    # Rounded as it is multiplied: a second dW in single precision would be the peak of memory.
    return torch.mul(total, factor, out=torch.empty_like(total, dtype=dtype))


@outside_dynamo
def per_token(
    divergences: Mapping[str, Divergence],
    *,
    p: Logits | LinearHead | TopK | Sampled,
    q: Logits | LinearHead,
    chunk: int | None = None,
    labels: Int[Tensor, " tokens"] | None = None,
) -> dict[str, Float[Tensor, " tokens"]]:
    """D(p ‖ q) of every token, in nats, for several divergences at once; no gradient.

    Args:
        divergences: By name.
        p: The teacher's logits, the head that yields them, or its top k.
        q: The student's logits, or the head that yields them.
        chunk: Number of tokens whose logits exist at one time; by default 256 MiB of them.
        labels: The true token, for divergences that take labels.

    Raises:
        ValueError: Shapes do not fit; the message names the argument.
        TypeError: An argument is of the wrong kind.

    >>> from rkl import KL
    >>> values = per_token({"kl": KL()}, p=torch.zeros(2, 3), q=torch.zeros(2, 3))
    >>> values["kl"]
    tensor([0., 0.])
    """
    if not isinstance(divergences, Mapping) or not divergences:
        raise TypeError(
            f"divergences must map names to one divergence at least; got {divergences!r}."
        )
    _refuse_transforms()
    if isinstance(p, Sampled):
        return {
            name: sampled_terms(it, p=p, q=q, chunk=chunk).mean(-1)
            for name, it in divergences.items()
        }
    shared = shards_of(p, q)
    vocab = None if shared is None else shared.vocab

    def prepare():
        tokens = max(check_pair(it, p, q, vocab) for it in divergences.values())
        everything = torch.arange(tokens, device=by_token(q).device)
        for divergence in divergences.values():
            _check_labels(labels, 0.0, divergence, everything, q, vocab)
        rows = everything.split(_chunk(chunk, q, shared))
        if shared is None:
            return rows, (), {}
        settings = dict(divergences), type(p), _shape(p), _shape(q), len(rows), tokens
        return rows, settings, {"q's hidden states": by_token(q), "p": by_token(p)}

    every_row = in_agreement(shared, q, prepare)
    p, parts = cut(p, shared), {name: [] for name in divergences}
    device = by_token(q).device.type
    # autocast would round the products
    with torch.no_grad(), torch.autocast(device, enabled=False), rows_over(shared):
        for rows in every_row:
            logp, logq = _log_probabilities(p, q, rows)
            with rows_of(coarse=isinstance(p, TopK)):
                for name, divergence in divergences.items():
                    true = labels[rows] if labels is not None and divergence.takes_labels else None
                    parts[name].append(divergence(logp, logq, true))
    return {name: torch.cat(values) for name, values in parts.items()}


@outside_dynamo
def sampled_terms(
    divergence: Divergence,
    *,
    p: Sampled,
    q: Logits | LinearHead,
    chunk: int | None = None,
) -> Float[Tensor, "tokens draws"]:
    """Terms of every token whose mean over draws is an unbiased estimate of D(p ‖ q); no gradient.

    The standard error of the mean of a token is their standard deviation over the root of their
    number; that of a sum over tokens, Σ wₜ Dₜ, is the root of Σ wₜ² varₜ / draws.

    Raises:
        ValueError: Shapes do not fit; the message names the argument.
        TypeError: An argument is of the wrong kind, or the divergence is no f-divergence.

    >>> from rkl import KL
    >>> teacher = Sampled(torch.tensor([[0.5, 0.5, 0.25]]).log(), torch.tensor([[0, 0, 1]]))
    >>> sampled_terms(KL(), p=teacher, q=torch.zeros(1, 3))
    tensor([[ 0.4055,  0.4055, -0.2877]])
    """
    if not isinstance(p, Sampled):
        raise TypeError(f"p must be a Sampled; got a {type(p).__name__}.")
    f: Any = divergence  # an f-divergence, as is checked before the first of them
    ratios = _draw_ratios(divergence, p, q, chunk)
    return torch.cat([(w * f.terms_p(x)).to(like) for x, w, like in ratios])


def effective_draws(p: Sampled, q: Logits | LinearHead) -> Float[Tensor, " tokens"]:
    """Number of equally weighted draws from q that the draws from p are worth, by Kish.

    With u = q/s at each draw it is (Σ u)² / Σ u², at most the number of draws. If it is small,
    a few draws dominate the terms of divergences that grow with q/p, such as reverse KL. Atoms
    that were never drawn do not count.
    """
    parts = []
    for x, w, _ in _draw_ratios(KL(), p, q, None):
        log = x + w.log()
        parts.append((2 * log.logsumexp(-1) - (2 * log).logsumexp(-1)).exp())
    return torch.cat(parts) if parts else p.logp.new_zeros(0)


def _draw_ratios(divergence: Divergence, p: Sampled, q, chunk: int | None) -> Iterator[tuple]:
    """Of some tokens at a time: log q/p at the draws, their weights, the dtype of the logits."""
    shared = shards_of(p, q)

    def prepare():
        tokens = check_pair(divergence, p, q, None if shared is None else shared.vocab)
        rows = torch.arange(tokens, device=p.logp.device).split(_chunk(chunk, q, shared))
        if shared is None:
            return rows, (), {}
        settings = divergence, _shape(q), len(rows), tokens
        return rows, settings, {"q's hidden states": by_token(q), "p": by_token(p)}

    shape = _shape(q)
    for rows in in_agreement(shared, q, prepare):
        with torch.no_grad(), torch.autocast(p.logp.device.type, enabled=False), rows_over(shared):
            pair: Any = _pair(p, _parameters(q), rows)
            drawn, products = pair
            (logq,) = row_log_softmax(shape.at_temperature(shape.at_one(products)))
            ratio = (row_gather(logq, drawn.index) - drawn.logp).to(widest(logq))
            share = drawn.share.to(ratio.dtype) * drawn.index.shape[-1]
        yield ratio, share, logq.dtype


def monte_carlo(
    divergence: FDivergence,
    log_ratio: Float[Tensor, " samples"],
    *,
    sampled_from: Literal["p", "q"],
) -> Float[Tensor, " samples"]:
    """Terms whose mean is an unbiased estimate of D(p ‖ q), wherever p and q have mass.

    Samples from q miss the mass that p has where q has none, at a price of F(1, 0) per unit.
    That mass is 1 − E_q[p/q], so the terms are F(p/q, 1) − F(1, 0) (p/q − 1), where
    F(1, 0) is finite; from p, the mirror image. For the KLs they are log q/p and log p/q.

    Args:
        divergence: An f-divergence. AKL is not one; use :func:`exact`.
        log_ratio: log p(x) − log q(x) at each sample x, in nats.
        sampled_from: The distribution x was drawn from.

    Returns:
        One term per sample, so that their mean and its standard error are both at hand.

    Raises:
        TypeError: The divergence is not an f-divergence, or log_ratio no tensor of floats.
        ValueError: ``sampled_from`` is neither "p" nor "q", or there are no samples.

    >>> from rkl import ReverseKL
    >>> monte_carlo(ReverseKL(), torch.tensor([0.5, -1.0]), sampled_from="q")
    tensor([-0.5000,  1.0000])
    """
    _check_sampled(divergence, log_ratio=log_ratio)
    if sampled_from not in ("p", "q"):
        raise ValueError(f"sampled_from must be 'p' or 'q'; got {sampled_from!r}.")
    # In double precision, so that what overflows on the way need not overflow at the end.
    wide = log_ratio.to(widest(log_ratio))
    terms = divergence.terms_q(wide) if sampled_from == "q" else divergence.terms_p(-wide)
    return terms.to(log_ratio.dtype)


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

    Raises:
        TypeError: The divergence is not an f-divergence, or a score no tensor of floats.
        ValueError: There are no samples from p, or none from q.
    """
    _check_sampled(divergence, score_p=score_p, score_q=score_q)
    in_p = slope_from_terms(divergence, -score_p, in_p=True)
    in_q = slope_from_terms(divergence, score_q, in_p=False)
    return in_p.mean() + in_q.mean()


def _check_sampled(divergence: Any, **at_samples: Any) -> None:
    if not isinstance(divergence, FDivergence):
        raise TypeError(
            f"divergence must be an f-divergence to be sampled; got {divergence!r}, which is "
            "only defined over whole distributions: use rkl.exact."
        )
    for name, values in at_samples.items():
        floats(name, values)
        if values.ndim != 1 or not len(values):
            raise ValueError(
                f"{name} must be [samples], with one sample at least; got {list(values.shape)}."
            )


def _weighted_tokens(weight, tokens: int, like: Tensor) -> tuple[Tensor, Tensor]:
    if weight is None and tokens:  # nothing to look at, for which a GPU would have to finish
        weight = like.new_full((tokens,), 1 / tokens, dtype=_at_least_single(like))
        return torch.arange(tokens, device=like.device), weight
    if weight is None:
        weight = like.new_zeros(0)
    if isinstance(weight, Tensor) and not weight.is_floating_point():
        raise TypeError(
            f"weight must hold floating-point numbers; got {weight.dtype}. Of a mask, "
            "mask / mask.sum() gives the mean over what it keeps, mask.float() their sum."
        )
    floats("weight", weight)
    if weight.shape != (tokens,) or weight.device != like.device:
        raise ValueError(
            f"weight must be [{tokens}], one for each token of q, on {like.device}; "
            f"got {list(weight.shape)} on {weight.device}."
        )
    weight = weight.detach().to(_at_least_single(like))
    if not ((weight >= 0) & (weight < math.inf)).all():
        raise ValueError("weight must be at least 0 and finite for every token.")
    weighted = weight.nonzero().squeeze(-1)
    if 1 < len(weighted) < tokens and bool((weight[weighted] == 1).all()):
        warn(
            f"weight is a mask of 0 and 1, so the result is the sum over {len(weighted)} tokens; "
            "give weight = mask / mask.sum() for their mean."
        )
    if not len(weighted):
        raise ValueError(f"None of the {tokens} tokens has a weight: there is nothing to compare.")
    return weighted, weight


def _check_labels(
    labels,
    hard_label_weight: float,
    divergence: Divergence,
    weighted: Tensor,
    q,
    vocab: int | None,
) -> Tensor | None:
    vocab = vocab or vocabulary(q)
    number("hard_label_weight", hard_label_weight, at_least=0)
    if labels is None:
        if hard_label_weight:
            raise ValueError("labels must be given where hard_label_weight is not 0; got None.")
        if divergence.takes_labels:
            raise ValueError(
                f"labels must be given: {divergence} looks at the true token; got None."
            )
        return None
    integers("labels", labels)
    like = by_token(q)
    if labels.shape != (len(like),) or labels.device != like.device:
        raise ValueError(
            f"labels must be [{len(like)}], one for each token of q, on {like.device}; "
            f"got {list(labels.shape)} on {labels.device}."
        )
    seen = labels[weighted]
    if seen.min() < 0 or seen.max() >= vocab:
        raise ValueError(
            f"labels must lie in [0, {vocab}) wherever there is a weight; "
            f"got {seen.min().item()} to {seen.max().item()}. Give ignored tokens, such as those "
            "labelled -100, the weight 0."
        )
    return labels if hard_label_weight or divergence.takes_labels else None


def _chunk(chunk: int | None, q, shared: Shards | None, *, compiled: bool = False) -> int:
    if chunk is None:
        bytes_per_token = 2 * 4 * (vocabulary(q) if shared is None else max(shared.sizes))
        large = compiled and _on_gpu(by_token(q))
        # A GPU multiplies tiles of 128 rows.
        budget, multiple = (BUDGET_ON_GPU, 128) if large else (BUDGET, 16)
        return max(multiple, budget // bytes_per_token // multiple * multiple)
    integer("chunk", chunk, at_least=1)
    return chunk


def _shape(x) -> Shape:
    return Shape(*x[3:6]) if isinstance(x, LinearHead) else Shape()


def products(head: LinearHead) -> Logits:
    """Hidden states times the head, in single precision or better, as `exact` computes it."""
    if head.group is not None:
        raise ValueError("head must have the whole vocabulary; got a part, with a group.")
    with torch.autocast(head.hidden.device.type, enabled=False):  # it would round the products
        return _products(head[:3], slice(None))


def _products(parameters, rows: Tensor | slice, over: Any = None) -> Logits:
    """A tensor in single precision or better that may be written over.

    Its memory is that of ``over``, products of at least as many rows, where they are given: the
    first write to a new page of memory costs more than a pass over it.
    """
    by_token, *head = parameters
    if not head:
        return by_token[rows].to(_at_least_single(by_token))
    hidden, (weight, bias) = by_token[rows], head
    if hidden.dtype in HALF:
        return _single_products(hidden, weight, bias)
    if over is None or over.dtype != hidden.dtype:
        return linear(hidden, weight, bias)
    out = over[: len(hidden)]
    if bias is None:
        return torch.mm(hidden, weight.T, out=out)
    return torch.addmm(bias, hidden, weight.T, out=out)


def _single_products(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Logits:
    """Products of a head in half precision that are never rounded to it."""
    if _multiplies_halves(hidden):
        products = _mixed_product(hidden, weight.T)
    else:
        hidden = hidden.float()
        products = hidden.new_empty(len(hidden), len(weight))
        for atoms in _blocks(weight):
            torch.mm(hidden, weight[atoms].float().T, out=products[:, atoms])
    return products if bias is None else products.add_(bias)


def _blocks(weight: Tensor) -> Iterator[slice]:
    """Parts of the vocabulary, few enough rows of the head each to hold them twice."""
    size = max(1, UPCAST // weight.shape[1])
    return (slice(start, start + size) for start in range(0, len(weight), size))


def _log_probabilities(p, q, rows: Tensor) -> tuple[Logits, Logits]:
    known: Any = _pair(p, _parameters(q), rows)
    a, b = known
    a, b, _ = comparable(Step(KL(), _shape(p), _shape(q)), a, b)
    with rows_of(coarse=isinstance(p, TopK)):
        logp, logq = row_log_softmax(a, b)
    return logp, logq


def _pair(p, parameters, rows, over: tuple = (None, None)):
    """The teacher's logits, top k or draws, and the student's products, for some rows.

    They may be written over those of other rows.
    """
    b = _products(parameters, rows, over[1])
    if isinstance(p, Sampled):
        weight = torch.zeros_like(p.logp) if p.log_weight is None else p.log_weight
        share = weight[rows].to(b.dtype).exp() / p.index.shape[-1]
        return Draws(p.logp[rows].to(b.dtype), p.index[rows], share), b
    if isinstance(p, TopK):
        return (p.logp[rows].to(b.dtype), p.index[rows]), b
    return _products(p[:3] if isinstance(p, LinearHead) else (p,), rows, over[0]).to(b.dtype), b


def _gradient_dtype(q: Logits | LinearHead) -> torch.dtype | None:
    """The dtype that a step rounds its gradient to; None for that of the products.

    A GPU multiplies matrices of one dtype, and bfloat16 has the range of single precision. float16
    has not: there the gradient is scaled first.
    """
    if not isinstance(q, LinearHead) or not _multiplies_halves(q.hidden):
        return None
    return torch.bfloat16 if q.hidden.dtype == torch.bfloat16 else None


def _multiplies_halves(hidden: Tensor) -> bool:
    """True if matrices in half precision have a product in single precision."""
    return hidden.dtype in HALF and _on_gpu(hidden)


def _on_gpu(x: Tensor) -> bool:
    return x.device.type == "cuda"


def _pull_back(totals, wanted, parameters, rows, gradient):
    by_token, *head = parameters
    if not head:
        if wanted[0]:
            _put_rows(totals, by_token, rows, gradient)
        return
    hidden = by_token[rows]
    if wanted[2]:
        total = gradient.sum(0, dtype=_at_least_single(gradient))
        totals[2] = total if totals[2] is None else totals[2] + total
    gradient, factor = _operand(gradient, hidden)
    if wanted[0]:
        _put_rows(totals, by_token, rows, _in_hidden(gradient, factor, head[0]))
    if wanted[1]:
        totals[1] = _add_product(totals[1], gradient, factor, hidden)


def _put_rows(totals, by_token, rows, gradient):
    if totals[0] is None:
        totals[0] = torch.zeros_like(by_token, dtype=gradient.dtype)
    totals[0][rows] = gradient


def _operand(gradient: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
    """The gradient as it enters products, and what these are to be multiplied by."""
    if gradient.dtype in HALF or not _multiplies_halves(hidden):
        return gradient, None
    return _in_half(gradient, hidden.dtype)


def _in_hidden(gradient: Tensor, factor: Tensor | None, weight: Tensor) -> Tensor:
    if gradient.dtype in HALF:
        product = _mixed_product(gradient, weight)
        return product if factor is None else product.mul_(factor)
    if weight.dtype not in HALF:
        return gradient @ weight
    total = gradient.new_zeros(len(gradient), weight.shape[1])
    for atoms in _blocks(weight):
        total.addmm_(gradient[:, atoms], weight[atoms].float())
    return total


def _add_product(
    total: Tensor | None, gradient: Tensor, factor: Tensor | None, hidden: Tensor
) -> Tensor:
    """Total + gradient.T @ hidden, added up in single precision or better."""
    if gradient.dtype in HALF:
        if total is None:
            product = _mixed_product(gradient.T, hidden)
            return product if factor is None else product.mul_(factor)
        if factor is None:
            return _add_mixed_product(total, gradient.T, hidden)
        return total.addcmul_(_mixed_product(gradient.T, hidden), factor)
    hidden = hidden.to(gradient.dtype)
    return gradient.T @ hidden if total is None else total.addmm_(gradient.T, hidden)


def _mixed_product(a: Tensor, b: Tensor) -> Tensor:
    """The product of two matrices in half precision, in single precision; on a GPU only."""
    return torch.mm(a, b, out_dtype=torch.float32)


def _add_mixed_product(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.addmm(total, a, b, out_dtype=torch.float32, out=total)


def _in_half(gradient: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The gradient in half precision, over a power of two that keeps it from underflow."""
    largest = gradient.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
    factor = (largest.log2().ceil() - 12).exp2()
    return (gradient / factor).to(dtype), factor


def _at_least_single(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)

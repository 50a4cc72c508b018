"""KL between two distributions of torch: torch's formula, or ours where that is wrong."""

import copy
import functools
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributions import (
    Bernoulli,
    Binomial,
    Categorical,
    ContinuousBernoulli,
    Distribution,
    Geometric,
    Independent,
    Poisson,
    Transform,
    TransformedDistribution,
    Uniform,
    Wishart,
    kl_divergence,
)

from rkl.divergences.base import FDivergence, atoms, broadcast_shape, coin


def closed_kl(kl: FDivergence, p: Distribution, q: Distribution) -> Tensor:
    """KL(p ‖ q) in nats [*batch], computed in double precision.

    Formulas are differences of large terms: between Beta(30000, 70000) and Beta(30200, 70000)
    single precision leaves none of the digits.

    Ours where torch 2.13 loses the digits of probabilities near 0 and 1 or of a rate of 0, adds
    up the degrees of freedom of a batch of Wishart distributions, takes (0, 1) for wider than
    itself, follows transforms that are not one to one, or does not broadcast.

    Args:
        kl: KL() itself, for sums over atoms.
        p: The distribution of the expectation.
        q: A distribution with batches that broadcast with those of p.

    Raises:
        NotImplementedError: There is no closed form.
    """
    kinds = {*_dtypes((p, q), set())} or {torch.get_default_dtype()}
    value = _closed_kl(kl, *_in_double((p, q), {}))
    return value.to(functools.reduce(torch.promote_types, kinds))


def _closed_kl(kl: FDivergence, p: Distribution, q: Distribution) -> Tensor:
    match p, q:
        case Independent(), Independent():
            return _of_independent(kl, p, q)
        case (Bernoulli(), Bernoulli()) | (Categorical(), Categorical()):
            return kl(*torch.broadcast_tensors(atoms(p), atoms(q)))
        case Binomial(), Binomial() if (p.total_count >= q.total_count).all():
            outside = (p.total_count > q.total_count) & (p.probs > 0)
            return torch.where(outside, math.inf, q.total_count * _of_coins(kl, p, q))
        case ContinuousBernoulli(), Uniform():
            within = (q.low <= 0) & (q.high >= 1)
            return torch.where(within, (q.high - q.low).log() - p.entropy(), math.inf)
        case Uniform(), ContinuousBernoulli():  # whose log-density is linear
            within = (p.low >= 0) & (p.high <= 1)
            middle = torch.where(within, p.mean, 0.5)
            value = -(p.high - p.low).log() - q.log_prob(middle)
            return torch.where(within, value, math.inf)
        case Geometric(), Geometric():
            return _of_coins(kl, p, q) / p.probs
        case Poisson(), Poisson():  # the excess of one atom: p log(p/q) − p + q
            return kl.excess(*torch.broadcast_tensors(p.rate.log(), q.rate.log()))
        case Wishart(), Wishart():
            return _of_wisharts(p, q)
    if any(type(it) is TransformedDistribution and not _one_to_one(it) for it in (p, q)):
        raise NotImplementedError
    if type(p) is not type(q):
        shape = broadcast_shape(p.batch_shape, q.batch_shape)
        p, q = p.expand(shape), q.expand(shape)
    return kl_divergence(p, q)


def _of_independent(kl: FDivergence, p: Independent, q: Independent) -> Tensor:
    count = p.reinterpreted_batch_ndims
    if count != q.reinterpreted_batch_ndims:
        raise NotImplementedError
    each = _closed_kl(kl, p.base_dist, q.base_dist)
    return each.sum(tuple(range(-count, 0))) if count else each


def _one_to_one(distribution: TransformedDistribution) -> bool:
    return all(it.bijective for it in distribution.transforms)


def _in_double(it: Any, done: dict[int, Any]) -> Any:
    """A copy of distributions, transforms or lists of such, their numbers in double precision.

    What they have in common is copied once, for transforms may be equal by being the same.
    """
    if isinstance(it, Tensor):
        return it.double() if it.is_floating_point() else it
    if type(it) in (list, tuple):
        return type(it)(_in_double(part, done) for part in it)
    if not isinstance(it, Distribution | Transform):
        return it
    if id(it) not in done:
        done[id(it)] = other = copy.copy(it)
        parts = {name: _in_double(value, done) for name, value in vars(it).items()}
        vars(other).update(parts)
    return done[id(it)]


def _dtypes(it: Any, seen: set[int]) -> Iterator[torch.dtype]:
    """Precisions of the numbers of distributions."""
    if isinstance(it, Tensor) and it.is_floating_point():
        yield it.dtype
    parts: Iterable[Any] = it if type(it) in (list, tuple) else ()
    if isinstance(it, Distribution | Transform) and id(it) not in seen:
        seen.add(id(it))
        parts = vars(it).values()
    for part in parts:
        yield from _dtypes(part, seen)


def _of_coins(kl, p, q):
    return kl(*torch.broadcast_tensors(coin(p), coin(q)))


def _of_wisharts(p: Wishart, q: Wishart) -> Tensor:
    size, shape_p, shape_q = p.event_shape[-1], p.df / 2, q.df / 2
    ratio = torch.linalg.solve_triangular(q.scale_tril, p.scale_tril, upper=False)
    trace = ratio.square().sum((-1, -2))
    log_det = 2 * ratio.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    halves = torch.arange(size, dtype=p.df.dtype, device=p.df.device) / 2
    digamma = torch.digamma(shape_p[..., None] - halves).sum(-1)
    volumes = torch.mvlgamma(shape_q, size) - torch.mvlgamma(shape_p, size)
    return volumes - (shape_q - shape_p) * digamma + shape_p * (trace - size) - shape_q * log_det

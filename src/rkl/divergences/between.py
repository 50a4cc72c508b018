"""KL between two distributions of torch: torch's formula, or ours where that is wrong."""

import math

import torch
from torch import Tensor
from torch.distributions import (
    Bernoulli,
    Binomial,
    Categorical,
    Distribution,
    Geometric,
    Independent,
    Poisson,
    Wishart,
    kl_divergence,
)

from rkl.divergences.base import FDivergence, atoms, broadcast_shape, coin


def closed_kl(kl: FDivergence, p: Distribution, q: Distribution) -> Tensor:
    """KL(p ‖ q) in nats [*batch].

    Ours where torch 2.13 loses the digits of probabilities near 0 and 1 or of a rate of 0, adds
    up the degrees of freedom of a batch of Wishart distributions, or does not broadcast.

    Args:
        kl: KL() itself, for sums over atoms.
        p: The distribution of the expectation.
        q: A distribution with batches that broadcast with those of p.

    Raises:
        NotImplementedError: There is no closed form.
    """
    match p, q:
        case Independent(), Independent():
            return _of_independent(kl, p, q)
        case (Bernoulli(), Bernoulli()) | (Categorical(), Categorical()):
            return kl(*torch.broadcast_tensors(atoms(p), atoms(q)))
        case Binomial(), Binomial() if (p.total_count >= q.total_count).all():
            outside = (p.total_count > q.total_count) & (p.probs > 0)
            return torch.where(outside, math.inf, q.total_count * _of_coins(kl, p, q))
        case Geometric(), Geometric():
            return _of_coins(kl, p, q) / p.probs
        case Poisson(), Poisson():  # the excess of one atom: p log(p/q) − p + q
            return kl.excess(*torch.broadcast_tensors(p.rate.log(), q.rate.log()))
        case Wishart(), Wishart():
            return _of_wisharts(p, q)
    if type(p) is not type(q):
        shape = broadcast_shape(p.batch_shape, q.batch_shape)
        p, q = p.expand(shape), q.expand(shape)
    return kl_divergence(p, q)


def _of_independent(kl: FDivergence, p: Independent, q: Independent) -> Tensor:
    count = p.reinterpreted_batch_ndims
    if count != q.reinterpreted_batch_ndims:
        raise NotImplementedError
    each = closed_kl(kl, p.base_dist, q.base_dist)
    return each.sum(tuple(range(-count, 0))) if count else each


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

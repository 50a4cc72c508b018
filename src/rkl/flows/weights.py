r"""Estimators of the gradient of an f-divergence in the parameters of a flow.

With r = p/q and h(r) = f(r) − r f'(r), the slope of F(p, q) = q f(p/q) in q,

    ∇ D(p ‖ q) = E_q[h(r) ∇ log q] = E_p[(h(r) − h(0)) / r ∇ log q]

and, where draws x = g(z) depend on the parameters differentiably, E_z[∇ h(r(g(z)))] with the
function r held. The first is :func:`on_draws`, the second :func:`on_data`, the third
:func:`along_path`. Their minima over q are the same, their noise is not.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import grad

from rkl.divergences import FDivergence
from rkl.divergences.base import slope_from_terms
from rkl.estimators import monte_carlo

RANGE = torch.linspace(-6.0, 6.0, 241, dtype=torch.float64)  # log-ratios at which to look


def on_data(
    divergence: FDivergence, log_ratio: Float[Tensor, " samples"], log_q: Float[Tensor, " samples"]
) -> Float[Tensor, " samples"]:
    """Terms at data whose mean has the gradient of D: maximum likelihood, reweighted.

    The weight of a datum is (h(0) − h(r))/r: 1 for KL, min(1, 1/(λr)) for PrecisionHalf, the
    rest of 1 for RecallHalf. Where it is bounded this is the estimator to take: it errs little
    where the ratio is wrong, and with a ratio of 1 everywhere it is maximum likelihood.

    Args:
        divergence: An f-divergence.
        log_ratio: log p − log q at data, in nats; held constant.
        log_q: log q there, differentiable in the parameters.

    >>> from rkl import PrecisionHalf
    >>> log_q = torch.zeros(2, requires_grad=True)
    >>> on_data(PrecisionHalf(lam=2.0), torch.tensor([0.0, -3.0]), log_q).sum().backward()
    >>> log_q.grad
    tensor([-0.5000, -1.0000])
    """
    ratio = log_ratio.detach() + log_q.detach() - log_q
    return monte_carlo(divergence, ratio, sampled_from="p")


def on_draws(
    divergence: FDivergence, log_ratio: Float[Tensor, " samples"], log_q: Float[Tensor, " samples"]
) -> Float[Tensor, " samples"]:
    """Terms at draws of the flow whose mean has the gradient of D: the score function.

    Every weight h(r) has the mean of the others taken off, which leaves the gradient unbiased.
    It needs only values of the ratio, and has little noise where q is near p; but it depends
    entirely on the ratio, and errors of a critic bias it.

    Args:
        divergence: An f-divergence.
        log_ratio: log p − log q at draws of q, in nats; held constant.
        log_q: log q there, differentiable in the parameters; the draws themselves are not.
    """
    weight = slope(divergence, log_ratio.detach())
    others = (weight.sum() - weight) / max(len(weight) - 1, 1)
    return (weight - others) * log_q


def along_path(
    divergence: FDivergence, log_ratio: Float[Tensor, " samples"]
) -> Float[Tensor, " samples"]:
    """Terms whose mean has the gradient of D through the draws: reparameterised.

    Least noise where the ratio is smooth and well known, as with an exact density. PrecisionRecall
    and TotalVariation have an h that is a step, with no slope to follow; as in Verine et al.
    (2023), arXiv 2302.00628, algorithm 1, f itself is then followed, which for
    PrecisionRecall(λ) is the gradient of λ PrecisionHalf(λ).

    Args:
        divergence: An f-divergence.
        log_ratio: log p − log q at draws of q, in nats, differentiable through the draws alone.
    """
    if bends(divergence):
        return slope(divergence, log_ratio)
    return monte_carlo(divergence, log_ratio, sampled_from="q")


def slope(
    divergence: FDivergence, log_ratio: Float[Tensor, " samples"]
) -> Float[Tensor, " samples"]:
    """h(r) = f(r) − r f'(r), the slope of F in q at p = r and q = 1."""
    return slope_from_terms(divergence, log_ratio, in_p=False)


def data_weight(
    divergence: FDivergence, log_ratio: Float[Tensor, " samples"]
) -> Float[Tensor, " samples"]:
    """The weight (h(0) − h(r))/r of a datum, in :func:`on_data`."""
    log_q = torch.zeros_like(log_ratio, requires_grad=True)
    with torch.enable_grad():
        terms = on_data(divergence, log_ratio, log_q).sum()
    return -torch.autograd.grad(terms, log_q)[0]


def bends(divergence: FDivergence) -> bool:
    """True if h has a slope anywhere."""
    return bool((_bend(divergence) > 1e-9).any())


def bends_everywhere(divergence: FDivergence) -> bool:
    """True if h has a slope at every ratio: a critic trained on D then learns everywhere."""
    return bool((_bend(divergence) > 1e-9).all())


def bounded_on_data(divergence: FDivergence) -> bool:
    """True if no datum weighs more than in maximum likelihood, at any ratio."""
    weight = data_weight(divergence, RANGE)
    return bool((weight.abs() <= 1 + 1e-6).all())


def is_likelihood(divergence: FDivergence) -> bool:
    """True if every datum weighs the same and no ratio is needed: KL and its multiples."""
    weight = data_weight(divergence, RANGE)
    return bool((weight - weight[0]).abs().max() <= 1e-6 * weight[0].abs())


def _bend(divergence: FDivergence) -> Tensor:
    """−dh/d log r = r² f''(r), at least 0."""
    return -grad(lambda log_ratio: slope(divergence, log_ratio).sum())(RANGE)

"""Acts under the two KLs and their sums, which need of the draws only two points of the family.

The risk of a law t is, by Pythagoras, that of an act and the divergence from it:

    E KL(P_t ‖ P_θ) = risk + KL(P_t ‖ P_R),  R of the mean natural parameter,
    E KL(P_θ ‖ P_t) = risk + KL(P_F ‖ P_t),  F of the mean mean-parameter.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from rkl.bayes.families import ExponentialFamily, Natural
from rkl.bayes.families.base import jacobian
from rkl.bayes.families.between import orders
from rkl.divergences import Divergence

CLOSE = 1e-22  # Newton decrement in nats at which an act is found
STEPS, HALVINGS = 500, 40


class Weights(NamedTuple):
    """How much of each KL a divergence is."""

    reverse: float
    forward: float


def weights_of(divergence: Divergence) -> Weights | None:
    """The weights of a sum of KLs; None for any other divergence.

    >>> from rkl.divergences import KL, Jeffreys
    >>> weights_of(0.25 * KL() + 0.5 * Jeffreys())
    Weights(reverse=0.5, forward=0.75)
    """
    known = orders(divergence)
    if known is None or any(alpha not in (0, 1) for _, alpha in known):
        return None
    return Weights(*(float(sum(w for w, alpha in known if alpha == i)) for i in (0, 1)))


def balanced(
    family: ExponentialFamily, reverse: Natural, forward: Natural, weights: Weights
) -> Natural:
    """The law that minimises w_R KL(P_t ‖ P_R) + w_F KL(P_F ‖ P_t), by Newton's method.

    Raises:
        ValueError: The steps do not come to rest.
    """
    total = weights.reverse + weights.forward
    wanted = family.mean(forward)

    def objective(t):
        return weights.reverse * family.kl(t, reverse) + weights.forward * family.kl(forward, t)

    act = tuple(
        (weights.reverse * r + weights.forward * f) / total
        for r, f in zip(reverse, forward, strict=True)
    )
    for _ in range(STEPS):
        gap = weights.reverse * _times(family, act, family.minus(reverse, act))
        gap += weights.forward * family.flatten(family.minus(wanted, family.mean(act)))
        step = _descending(family, act, reverse, wanted, weights, gap)
        decrement = (gap * step).sum(-1)
        step = family.unflatten(step, act)
        if (decrement < CLOSE).all():
            return family.along(act, step, torch.ones_like(decrement))
        act = family.along(act, step, _length(family, objective, act, step, decrement))
    raise ValueError(f"The act under both KLs did not come to rest in {STEPS} steps.")


def _times(family: ExponentialFamily, at: Natural, vector: Natural) -> Tensor:
    return (fisher(family, at) @ family.flatten(vector)[..., None])[..., 0]


def _descending(family, act: Natural, reverse, mean, weights: Weights, gap: Tensor) -> Tensor:
    """Newton's step, and where that would climb, the natural gradient's."""
    newton = solved(_curvature(family, act, reverse, mean, weights), gap[..., None])[..., 0]
    natural = solved(fisher(family, act), gap[..., None])[..., 0] / sum(weights)
    return torch.where(((gap * newton).sum(-1) > 0)[..., None], newton, natural)


def _length(family, objective, act: Natural, step: Natural, decrement: Tensor) -> Tensor:
    """Halved, law by law, until the step stays inside and gains what its slope promises."""
    here = objective(act)
    length = torch.ones_like(here)
    for _ in range(HALVINGS):
        moved = family.along(act, step, length)
        gained = here - objective(moved) >= length * decrement / 4 - 1e-12 * (1 + here.abs())
        good = family.contains(moved) & gained
        if good.all():
            break
        length = torch.where(good, length, length / 2)
    return length


def swayed(
    family: ExponentialFamily,
    act: Natural,
    reverse: Natural,
    mean: Natural,
    weights: Weights,
    by_natural: Natural,
    by_mean: Natural,
) -> Natural:
    """How the balanced act moves when E η and E m do, [shifts, *batch, ...]: to first order."""
    pull = weights.reverse * (fisher(family, act) @ family.flatten(by_natural)[..., None])
    pull += weights.forward * family.flatten(by_mean)[..., None]
    moved = solved(_curvature(family, act, reverse, mean, weights), pull)[..., 0]
    return family.unflatten(moved, act)


def _curvature(family, act, reverse, mean, weights) -> Tensor:
    """Second derivatives of the objective in the act's natural parameter."""
    with torch.enable_grad():
        leaf = family.flatten(act).detach().requires_grad_()
        t = family.unflatten(leaf, act)
        partition = family.log_partition(t)
        own = torch.autograd.grad(partition.sum(), t, create_graph=True)
        to_reverse = -partition - family.inner(family.minus(reverse, t), own)
        to_forward = partition - family.inner(t, mean)
        objective = weights.reverse * to_reverse + weights.forward * to_forward
        (slope,) = torch.autograd.grad(objective.sum(), leaf, create_graph=True)
        return _symmetric(family, act, jacobian(slope, leaf))


def solved(matrix: Tensor, right: Tensor) -> Tensor:
    """Matrix⁻¹ right of symmetric matrices, by the pseudo-inverse of the scaled matrix.

    A natural parameter that is a symmetric matrix has each entry twice, and one of logits a
    constant too many: the matrix is then singular, where nothing can be seen.
    """
    scale = matrix.diagonal(dim1=-2, dim2=-1).abs().sqrt()
    unit = matrix / (scale[..., None] * scale[..., None, :])
    inverse = torch.linalg.pinv(unit, hermitian=True, rtol=1e-12)
    return inverse / (scale[..., None] * scale[..., None, :]) @ right


def fisher(family: ExponentialFamily, natural: Natural) -> Tensor:
    """∇²A [*batch, n, n] in the flattened components, and 0 across symmetric matrices."""
    return _symmetric(family, natural, family.hessian(natural))


def _symmetric(family: ExponentialFamily, natural: Natural, matrix: Tensor) -> Tensor:
    if 2 not in family.events:
        return matrix
    places = torch.arange(matrix.shape[-1])
    parts = family.unflatten(
        places, tuple(x[(0,) * (x.ndim - n)] for x, n in _each(family, natural))
    )
    turned = family.flatten(tuple(x.mT if n == 2 else x for x, n in _each(family, parts)))
    matrix = (matrix + matrix[..., turned, :]) / 2
    return (matrix + matrix[..., turned]) / 2


def _each(family, components):
    return zip(components, family.events, strict=True)

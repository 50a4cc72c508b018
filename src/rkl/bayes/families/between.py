"""Divergences between laws of one exponential family, where they have a closed form."""

import functools

import torch
from torch import Tensor

from rkl.bayes.families.base import ExponentialFamily, Natural, spread
from rkl.divergences import (
    KL,
    Amari,
    Divergence,
    FDivergence,
    Jeffreys,
    NeymanChiSquare,
    PearsonChiSquare,
    ReverseKL,
    SquaredHellinger,
)
from rkl.divergences.base import weighted_terms


def orders(divergence: object) -> list[tuple[float, float]] | None:
    r"""The weights and orders of a sum of Amari divergences; None for anything else.

    Of order 1 is KL, of order 0 reverse KL. Each needs of the draws, node by node, no more than
    E p^α, or E log p in the limit 0.

    >>> orders(0.5 * KL() + Jeffreys()), orders(PearsonChiSquare())
    ([(0.5, 1.0), (1.0, 1.0), (1.0, 0.0)], [(2.0, 2.0)])
    """
    if not isinstance(divergence, FDivergence):
        return None
    found = []
    for weight, term in weighted_terms(divergence):
        known = _ORDERS.get(type(term), ())
        known = [(1.0, term.alpha)] if isinstance(term, Amari) else known
        if not known:
            return None
        found += [(weight * w, alpha) for w, alpha in known]
    return found


_ORDERS = {
    KL: [(1.0, 1.0)],
    ReverseKL: [(1.0, 0.0)],
    Jeffreys: [(1.0, 1.0), (1.0, 0.0)],
    SquaredHellinger: [(0.25, 0.5)],
    PearsonChiSquare: [(2.0, 2.0)],
    NeymanChiSquare: [(2.0, -1.0)],
}


def divergence_between(
    family: ExponentialFamily, divergence: Divergence, p: Natural, q: Natural
) -> Tensor:
    r"""D(p ‖ q) in nats [*batch] between laws of these natural parameters.

    Closed for the KLs, for Amari's divergences and their kin, and for sums of these:

        ∫ p^α q^(1−α) = exp(A(η) − α A(p) − (1 − α) A(q)),    η = α p + (1 − α) q,

    which is infinite where η is no natural parameter, as for the χ² of a Normal with more
    than twice the variance.

    Source: Nielsen and Nock (2011), arXiv 1105.3259, eq. (12).

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: A natural parameter has too few components, or too many.
        NotImplementedError: There is no closed form; the message says for which divergence.

    >>> from torch.distributions import Normal
    >>> from rkl.bayes.families import family_of
    >>> p, q = Normal(torch.tensor(0.0), 1.0), Normal(torch.tensor(1.0), 1.0)
    >>> family = family_of(p)
    >>> divergence_between(family, PearsonChiSquare(), family.natural(p), family.natural(q))
    tensor(1.7183)
    """
    if not isinstance(family, ExponentialFamily):
        raise TypeError(f"family must be an ExponentialFamily, as family_of says; got {family!r}.")
    if not isinstance(divergence, Divergence):
        raise TypeError(f"divergence must be a Divergence, such as KL(); got {divergence!r}.")
    for name, natural in (("p", p), ("q", q)):
        if not isinstance(natural, tuple) or len(natural) != len(family.events):
            got = len(natural) if isinstance(natural, tuple) else repr(natural)
            raise ValueError(
                f"{name} must be the {len(family.events)} components of a natural parameter, "
                f"as family.natural(law) says; got {got}."
            )
    known = orders(divergence)
    if known is None:
        raise NotImplementedError(
            f"{divergence} has no closed form within an exponential family; KL, ReverseKL, "
            "Jeffreys, Amari, SquaredHellinger, PearsonChiSquare, NeymanChiSquare and sums of "
            "them have."
        )
    parts = (weight * _of_order(family, alpha, p, q) for weight, alpha in known)
    return functools.reduce(torch.add, parts)


def _of_order(family: ExponentialFamily, alpha: float, p: Natural, q: Natural) -> Tensor:
    if alpha in (0, 1):
        return family.kl(p, q) if alpha else family.kl(q, p)
    return _amari(family, alpha, p, q)


def _amari(family: ExponentialFamily, alpha: float, p: Natural, q: Natural) -> Tensor:
    """By way of KLs, for A(η) − α A(p) − (1 − α) A(q) = −α KL(η ‖ p) − (1 − α) KL(η ‖ q)."""
    mixed = tuple(alpha * x + (1 - alpha) * y for x, y in zip(p, q, strict=True))
    exists = family.contains(mixed)
    safe = tuple(
        torch.where(spread(exists, n), x, y)
        for x, y, n in zip(mixed, p, family.events, strict=True)
    )
    exponent = -alpha * family.kl(safe, p) - (1 - alpha) * family.kl(safe, q)
    value = torch.expm1(exponent) / (alpha * (alpha - 1))
    return torch.where(exists, value, torch.inf)

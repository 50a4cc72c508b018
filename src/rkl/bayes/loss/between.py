"""Losses between two distributions, and those with a closed form."""

import contextlib
import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Distribution, Independent

from rkl.bayes.families.base import ExponentialFamily, Natural, family_of, spread
from rkl.divergences import (
    KL,
    Amari,
    Divergence,
    FDivergence,
    ReverseKL,
    parse,
)
from rkl.divergences.base import broadcast_shape


def orders(divergence: object) -> list[tuple[float, float]] | None:
    r"""The weights and orders of a sum of Amari divergences; None for anything else.

    Of order 1 is KL, of order 0 reverse KL. Each needs of the draws, node by node, no more than
    E p^α, or E log p in the limit 0.

    >>> from rkl import KL, Jeffreys, PearsonChiSquare
    >>> orders(0.5 * KL() + Jeffreys()), orders(PearsonChiSquare())
    ([(0.5, 1.0), (1.0, 1.0), (1.0, 0.0)], [(2.0, 2.0)])
    """
    terms = divergence.amari_orders if isinstance(divergence, FDivergence) else None
    return None if terms is None else list(terms)


def divergence_between(
    family: ExponentialFamily, divergence: Divergence, p: Natural, q: Natural
) -> Tensor:
    r"""D(p ‖ q) in nats [*batch] between distributions of these natural parameters.

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
    >>> from rkl import PearsonChiSquare
    >>> from rkl.bayes import family_of
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
                f"as family.natural(distribution) says; got {got}."
            )
    terms = orders(divergence)
    if terms is None:
        raise NotImplementedError(
            f"{divergence} has no closed form within an exponential family; KL, ReverseKL, "
            "Jeffreys, Amari, SquaredHellinger, PearsonChiSquare, NeymanChiSquare and sums of "
            "them have."
        )
    parts = (weight * _of_order(family, alpha, p, q) for weight, alpha in terms)
    return functools.reduce(torch.add, parts)


def _of_order(family: ExponentialFamily, alpha: float, p: Natural, q: Natural) -> Tensor:
    if alpha in (0, 1):
        return family.kl(p, q) if alpha else family.kl(q, p)
    return _amari(family, alpha, p, q)


def _amari(family: ExponentialFamily, alpha: float, p: Natural, q: Natural) -> Tensor:
    """A(η) − α A(p) − (1 − α) A(q) = −α KL(η ‖ p) − (1 − α) KL(η ‖ q), which keeps digits."""
    mixed = tuple(alpha * x + (1 - alpha) * y for x, y in zip(p, q, strict=True))
    exists = family.contains(mixed)
    safe = tuple(
        torch.where(spread(exists, n), x, y)
        for x, y, n in zip(mixed, p, family.events, strict=True)
    )
    exponent = -alpha * family.kl(safe, p) - (1 - alpha) * family.kl(safe, q)
    value = torch.expm1(exponent) / (alpha * (alpha - 1))
    return torch.where(exists, value, torch.inf)


@dataclass(frozen=True)
class Intrinsic:
    r"""The intrinsic discrepancy, the smaller of KL(p ‖ q) and KL(q ‖ p).

    A loss, not an f-divergence: it compares p and q as wholes, and so is no sum over atoms.
    Finite where the support of one holds that of the other, as between uniform distributions.

    Source: Bernardo and Juárez (2003), definition 1.

    >>> from torch.distributions import Uniform
    >>> Intrinsic().between(Uniform(0.0, 1.0), Uniform(0.0, 2.0))
    tensor(0.6931)
    """

    def held(self, logp: Tensor, logq: Tensor) -> tuple[Tensor]:
        """True where the forward divergence is the smaller one, [*batch, 1]."""
        return ((_FORWARD(logp, logq) <= _REVERSE(logp, logq))[..., None],)

    def excess(self, logp: Tensor, logq: Tensor, forward: Tensor) -> Tensor:
        """The terms of the smaller one; an infinite one that is not taken has no slopes."""
        forward = forward.expand(broadcast_shape(logp.shape, logq.shape))
        sides = [
            side.excess(torch.where(taken, logp, 0.0), torch.where(taken, logq, 0.0))
            for side, taken in ((_FORWARD, forward), (_REVERSE, ~forward))
        ]
        return torch.where(forward, *sides)

    def between(self, p: Distribution, q: Distribution) -> Float[Tensor, "*batch"]:
        """The loss in nats, where both divergences have closed forms.

        Raises:
            NotImplementedError: One of them has none.
        """
        return torch.minimum(_FORWARD.between(p, q), _REVERSE.between(p, q))


_FORWARD, _REVERSE = KL(), ReverseKL()  # each finds its series once
AnyLoss = Divergence | Intrinsic


def parse_loss(text: str) -> AnyLoss:
    """A loss from its name: that of a divergence, or intrinsic.

    >>> parse_loss("js"), parse_loss("intrinsic")
    (JensenShannon(beta=0.5), Intrinsic())
    """
    if text.partition("(")[0].strip() in ("intrinsic", "Intrinsic"):
        return parse(text, {"intrinsic": Intrinsic})
    try:
        return parse(text)
    except ValueError as error:
        if "there are " not in str(error):
            raise
        raise ValueError(str(error).replace("there are ", "there are intrinsic, ", 1)) from error


def check_loss(divergence: Any) -> None:
    """Refuse what is no loss, and propose the spelling of its name."""
    if isinstance(divergence, Divergence | Intrinsic):
        return
    advice = ""
    with contextlib.suppress(TypeError, ValueError):
        ours = isinstance(divergence, type) and issubclass(divergence, Divergence | Intrinsic)
        made: Any = divergence() if ours else parse_loss(str(divergence))
        advice = f"; write {made!r}"
    raise TypeError(
        f"divergence must be one, such as rkl.ReverseKL(); got {divergence!r}{advice}."
    )


def between(divergence: AnyLoss, p: Distribution, q: Distribution) -> Tensor | None:
    """D(p ‖ q) in nats of distributions, the first axis that of draws, where it has a closed form.

    >>> from rkl.divergences import SquaredHellinger
    >>> from torch.distributions import Normal
    >>> p, q = Normal(torch.zeros(1).double(), 1.0), Normal(torch.ones(1).double(), 1.0)
    >>> between(Intrinsic(), p, q), between(SquaredHellinger(), p, q)
    (tensor([0.5000], dtype=torch.float64), tensor([0.1175], dtype=torch.float64))
    """
    if isinstance(divergence, Intrinsic):
        if (intrinsic := _intrinsic_at_edges(p, q)) is not None:
            return intrinsic
        both = between(_FORWARD, p, q), between(_REVERSE, p, q)
        return None if both[0] is None or both[1] is None else torch.minimum(both[0], both[1])
    if orders(divergence) is None:
        return None
    with contextlib.suppress(NotImplementedError):
        return divergence.between(p, q)
    with contextlib.suppress(NotImplementedError, ValueError):  # what is fixed moves
        family = family_of(p)
        if family is not None and type(p) is type(q):
            natural = family.natural(p), family.natural(q)
            return divergence_between(family, divergence, *natural)
    return _of_independent_parts(divergence, p, q)


def _intrinsic_at_edges(p: Distribution, q: Distribution) -> Tensor | None:
    """The intrinsic loss where some p have a probability or a rate of 0: KL(q ‖ p) is infinite.

    Its slopes would be nan there, although the smaller KL has slopes.
    """
    try:
        family = family_of(p)
    except ValueError:
        return None
    if family is None or type(p) is not type(q):
        return None
    edge, natural = family.natural(p), family.natural(q)
    inside = family.contains(edge)
    if inside.all():
        return None
    safe = tuple(
        torch.where(spread(inside, n), x, y)
        for x, y, n in zip(edge, natural, family.events, strict=True)
    )
    reverse = torch.where(inside, family.kl(natural, safe), math.inf)
    return torch.minimum(family.kl(edge, natural), reverse)


def _of_independent_parts(divergence: AnyLoss, p: Distribution, q: Distribution) -> Tensor | None:
    """KLs of independent parts add up, their affinities 1 + α(α − 1) D multiply."""
    if not isinstance(p, Independent) or not isinstance(q, Independent):
        return None
    axes, total = tuple(range(-p.reinterpreted_batch_ndims, 0)), []
    for weight, alpha in orders(divergence) or ():
        one = {0.0: _REVERSE, 1.0: _FORWARD}.get(alpha) or Amari(alpha)
        parts = between(one, p.base_dist, q.base_dist)
        if parts is None:
            return None
        if alpha in (0, 1):
            total.append(weight * parts.sum(axes))
        else:
            scale = alpha * (alpha - 1)
            total.append(weight * torch.log1p(scale * parts).sum(axes).expm1() / scale)
    return sum(total[1:], total[0])


class Weights(NamedTuple):
    """The coefficients of a sum of both KLs."""

    reverse: float
    forward: float


def weights_of(divergence: Divergence) -> Weights | None:
    """The weights of a sum of KLs; None for any other divergence.

    >>> from rkl.divergences import KL, Jeffreys
    >>> weights_of(0.25 * KL() + 0.5 * Jeffreys())
    Weights(reverse=0.5, forward=0.75)
    """
    terms = orders(divergence)
    if terms is None or any(alpha not in (0, 1) for _, alpha in terms):
        return None
    return Weights(*(float(sum(w for w, alpha in terms if alpha == i)) for i in (0, 1)))

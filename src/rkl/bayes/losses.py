"""Posterior expected divergences as functions of the act, and what each draw contributes."""

import abc
import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Distribution, Independent

from rkl.bayes.families import family_of
from rkl.bayes.families.base import spread
from rkl.bayes.families.between import divergence_between, orders
from rkl.bayes.nodes import Laws, Nodes
from rkl.divergences import (
    KL,
    Amari,
    Divergence,
    FDivergence,
    ReverseKL,
    parse,
)
from rkl.divergences.base import broadcast_shape


@dataclass(frozen=True)
class Intrinsic:
    r"""The intrinsic discrepancy, the smaller of KL(p ‖ q) and KL(q ‖ p).

    A loss, not an f-divergence: it compares p and q as wholes, and so is no sum over atoms.
    Finite where the support of one holds that of the other, as between uniform laws.

    Source: Bernardo and Juárez (2003), definition 1.

    >>> from torch.distributions import Uniform
    >>> Intrinsic().between(Uniform(0.0, 1.0), Uniform(0.0, 2.0))
    tensor(0.6931)
    """

    def held(self, logp: Tensor, logq: Tensor) -> tuple[Tensor]:
        """Whether the forward divergence is the smaller one, [*batch, 1]."""
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
    """Refuse what is no loss, and say what to write for its name."""
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
    """D(p ‖ q) in nats of laws, the first axis that of draws, where it has a closed form.

    >>> from rkl.divergences import SquaredHellinger
    >>> from torch.distributions import Normal
    >>> p, q = Normal(torch.zeros(1).double(), 1.0), Normal(torch.ones(1).double(), 1.0)
    >>> between(Intrinsic(), p, q), between(SquaredHellinger(), p, q)
    (tensor([0.5000], dtype=torch.float64), tensor([0.1175], dtype=torch.float64))
    """
    if isinstance(divergence, Intrinsic):
        if (found := _intrinsic_at_edges(p, q)) is not None:
            return found
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
    return _joined(divergence, p, q)


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


def _joined(divergence: AnyLoss, p: Distribution, q: Distribution) -> Tensor | None:
    """That of independent parts: their KLs add up, their affinities 1 + α(α − 1) D multiply."""
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


@dataclass(frozen=True)
class PosteriorLoss(abc.ABC):
    """E D(P_θ ‖ P_t) over the posterior draws θ, as a function of the law P_t."""

    laws: Laws
    nodes: Nodes | None  # None with a closed form
    smooth: bool

    def over(self, laws: Laws) -> "PosteriorLoss":
        """The same over other draws."""
        return dataclasses.replace(self, laws=laws)

    @property
    @abc.abstractmethod
    def numbers(self) -> int:
        """How many numbers an evaluation needs of each draw; 0 where moments serve."""

    @abc.abstractmethod
    def expected(self, law: Distribution) -> Tensor:
        """The expected loss in nats of a law of batch shape [1, *batch], for autograd twice."""

    @abc.abstractmethod
    def by_draw(
        self, law: Distribution, leaf: Tensor | None = None
    ) -> tuple[Float[Tensor, " draws"], Float[Tensor, "draws k"]]:
        """The loss of each draw, and its slopes in the leaf [k] of which the law was made."""

    @abc.abstractmethod
    def by_member(self, law: Distribution) -> Float[Tensor, "draws *batch"]:
        """The loss of each draw for each member of the law's batch, which by_draw adds up."""


@dataclass(frozen=True)
class DirectLoss(PosteriorLoss):
    """The loss by a function of two laws: a closed form, or a sum over few atoms."""

    loss: Callable[[Distribution, Distribution], Tensor]  # [draws, *batch]

    @property
    def numbers(self):
        return self.nodes.log_weight.numel() if self.nodes else 1

    def expected(self, law):
        return (self._losses(law) * self.laws.weights).sum()

    def by_draw(self, law, leaf=None):
        with torch.set_grad_enabled(leaf is not None):
            losses = self._losses(law)
            return losses.detach(), slopes(losses, leaf)

    def by_member(self, law):
        rows = self.laws.chunks(self.numbers)
        return torch.cat([self.loss(self.laws.at(r), law).detach() for r in rows])

    def _losses(self, law):
        losses = self.loss(self.laws.at(slice(None)), law)
        return losses.reshape(len(losses), -1).sum(-1)


@dataclass(frozen=True)
class NodeLoss(PosteriorLoss):
    """The loss over nodes: any f-divergence, and the intrinsic loss.

    A sum of Amari divergences is evaluated from moments over the draws, once these are known;
    any other from every draw.
    """

    nodes: Nodes
    divergence: FDivergence | Intrinsic

    @property
    def numbers(self):
        return 0 if orders(self.divergence) is not None else self.nodes.log_weight.numel()

    def expected(self, law):
        logq = self.nodes.log_mass(law)[0]
        known = orders(self.divergence)
        if known is None:
            return _Expected.apply(logq, self)
        return torch.stack([w * self._of_order(alpha, logq) for w, alpha in known]).sum()

    def by_draw(self, law, leaf=None):
        logq, jacobian = self._jacobian(law, leaf)
        # Filled in place: small tensors kept between large ones would pin the heap.
        losses = logq.new_empty(len(self.laws))
        by_draw = logq.new_empty(len(self.laws), jacobian.shape[-1])
        for rows in self.laws.chunks(logq.numel()):
            terms, slope = self._terms(rows, logq)
            losses[rows] = terms.detach().sum((-1, -2))
            by_draw[rows] = slope.flatten(1) @ jacobian.flatten(0, 1)
        return losses, by_draw

    def by_member(self, law):
        logq = self.nodes.log_mass(law)[0].detach()
        parts = []
        for rows in self.laws.chunks(logq.numel()):
            logp = self.nodes.log_mass(self.laws.at(rows))
            parts.append(self._excess(logp, logq.expand_as(logp)).sum(-1))
        return torch.cat(parts).reshape(-1, *law.batch_shape[1:])

    def by_node(self, law, leaf=None) -> tuple[Tensor, Tensor]:
        """What each node adds to the expected loss [m], and to its slopes [m, k]."""
        logq, jacobian = self._jacobian(law, leaf)
        total, slope = torch.zeros_like(logq), torch.zeros_like(logq)
        for rows in self.laws.chunks(logq.numel()):
            weights = self.laws.weights[rows, None, None]
            for sums, each in zip((total, slope), self._terms(rows, logq), strict=True):
                sums += (weights * each.detach()).sum(0)
        return total.sum(0), (slope[..., None] * jacobian).sum(0)

    def _jacobian(self, law, leaf):
        """Log w q [members, m] of a law, and its slopes [members, m, k]."""
        with torch.set_grad_enabled(leaf is not None):
            logq = self.nodes.log_mass(law)[0]
            return logq.detach(), slopes(logq.flatten(), leaf).reshape(*logq.shape, -1)

    def _terms(self, rows, logq):
        """F [n, members, m] of some draws, and dF/dlog q."""
        logp = self.nodes.log_mass(self.laws.at(rows))
        leaf = logq.expand_as(logp).clone().requires_grad_()
        with torch.enable_grad():
            terms = self._excess(logp, leaf)
            return terms, torch.autograd.grad(terms.sum(), leaf)[0]

    def _excess(self, logp, logq):
        with torch.no_grad():
            held = self.divergence.held(logp, logq)
        return self.divergence.excess(logp, logq, *held)

    @functools.cached_property
    def _held(self) -> list[tuple[slice, Tensor]]:
        rows = list(self.laws.chunks(self.nodes.log_weight.numel()))
        return [(r, self.nodes.log_mass(self.laws.at(r))) for r in rows]

    def mean(self, logq: Tensor, order: int) -> tuple[Tensor, Tensor]:
        """The expected loss, and its first or second derivatives [members, m] in log w q."""
        value, slope = torch.zeros((), dtype=logq.dtype), torch.zeros_like(logq)
        for rows, logp in self._held:
            leaf = logq.detach().requires_grad_()
            with torch.enable_grad():
                terms = self._excess(logp, leaf.expand_as(logp)).sum((-1, -2))
                total = (terms * self.laws.weights[rows]).sum()
                for _ in range(order - 1):
                    (first,) = torch.autograd.grad(total, leaf, create_graph=True)
                    total = first.sum()
                slope += torch.autograd.grad(total, leaf)[0]
            value += total.detach()
        return value, slope

    def _of_order(self, alpha, logq):
        """E D of Amari's order α, from the moment over the draws that it needs."""
        mass, moment = self._moments[1.0][0], self._moments[alpha]
        q = logq.exp()
        if alpha == 1:
            return moment[1].sum() + (q - mass - torch.where(mass > 0, mass * logq, 0.0)).sum()
        if alpha == 0:
            return (torch.where(q > 0, q * (logq - moment[0]), 0.0) - q + mass).sum()
        mixed = (moment[0] + (1 - alpha) * logq).exp()
        return (mixed - alpha * mass - (1 - alpha) * q).sum() / (alpha * (alpha - 1))

    @functools.cached_property
    def _moments(self) -> dict[float, tuple[Tensor, ...]]:
        alphas = {alpha for _, alpha in orders(self.divergence) or ()}
        return _moments(self.laws, self.nodes, alphas | {1.0})


def node_mass(loss: PosteriorLoss) -> Callable[[Distribution], Tensor] | None:
    """The log-mass of a distribution at the nodes of a loss, where it has some."""
    return None if loss.nodes is None else loss.nodes.log_mass


def _moments(laws: Laws, nodes: Nodes, alphas: set[float]) -> dict[float, tuple[Tensor, ...]]:
    """By order, in one pass: E p and E p log p; E log p; log E p^α."""
    zero = torch.zeros_like(nodes.log_weight)
    start: dict[float, tuple[Tensor, ...]] = {
        a: (zero - math.inf,) if a not in (0, 1) else (zero, zero) for a in alphas
    }
    for rows in laws.chunks(zero.numel()):
        logp = nodes.log_mass(laws.at(rows))
        weights = laws.weights[rows, None, None]
        for alpha, sums in start.items():
            if alpha == 1:
                p = logp.exp()
                entropy = torch.where(p > 0, p * logp, 0.0)
                new = tuple(
                    s + (weights * x).sum(0) for s, x in zip(sums, (p, entropy), strict=True)
                )
            elif alpha == 0:
                new = (sums[0] + torch.where(weights > 0, weights * logp, 0.0).sum(0),)
            else:
                new = (torch.logaddexp(sums[0], (weights.log() + alpha * logp).logsumexp(0)),)
            start[alpha] = new
    return start


class _Expected(torch.autograd.Function):
    """E D as a function of log w q, twice differentiable: it is a sum of functions of one node."""

    @staticmethod
    def forward(ctx, logq, loss):
        value, slope = loss.mean(logq, 1)
        ctx.loss = loss
        ctx.save_for_backward(logq, slope)
        return value

    @staticmethod
    def backward(ctx, gradient):
        logq, slope = ctx.saved_tensors
        return gradient * _Slope.apply(logq, slope, ctx.loss), None


class _Slope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logq, slope, loss):
        ctx.loss, ctx.curvature = loss, None
        ctx.save_for_backward(logq)
        return slope.clone()

    @staticmethod
    def backward(ctx, gradient):
        if ctx.curvature is None:  # once for all rows of a Hessian
            ctx.curvature = ctx.loss.mean(ctx.saved_tensors[0], 2)[1]
        return gradient * ctx.curvature, None, None


def slopes(outputs: Float[Tensor, " n"], leaf: Tensor | None) -> Float[Tensor, "n k"]:
    """The slopes of many outputs in a leaf [k], at the price of k backward passes.

    The backward pass is linear in what it is given, so its own backward pass goes forwards.
    """
    if leaf is None:
        return outputs.new_zeros(len(outputs), 0)
    with torch.enable_grad():
        given = torch.ones_like(outputs).requires_grad_()
        (pulled,) = torch.autograd.grad(outputs, leaf, given, create_graph=True)
        columns = [
            torch.autograd.grad(each, given, retain_graph=True, materialize_grads=True)[0]
            for each in pulled
        ]
    return torch.stack(columns, -1)

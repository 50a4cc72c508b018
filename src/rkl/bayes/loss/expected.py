"""Posterior expected divergences as functions of the act, and what each draw contributes."""

import abc
import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Distribution

from rkl.bayes.loss.between import (
    AnyLoss,
    Intrinsic,
    between,
    check_loss,
    orders,
)
from rkl.bayes.loss.nodes import Nodes, independent_parts, joint, nodes_for, with_slopes
from rkl.bayes.loss.quadrature import has_kinks
from rkl.bayes.model import Laws
from rkl.divergences import (
    Divergence,
    FDivergence,
)


@dataclass(frozen=True)
class PosteriorLoss(abc.ABC):
    """E D(P_θ ‖ P_t) over the posterior draws θ, as a function of the distribution P_t."""

    laws: Laws
    nodes: Nodes | None  # None with a closed form
    smooth: bool

    def over(self, laws: Laws) -> "PosteriorLoss":
        """The posterior loss over other draws."""
        return dataclasses.replace(self, laws=laws)

    @property
    @abc.abstractmethod
    def numbers(self) -> int:
        """Numbers that an evaluation needs of each draw; 0 where moments serve."""

    @abc.abstractmethod
    def risk(self, law: Distribution) -> Tensor:
        """The expected loss in nats at a distribution [1, *batch]; twice differentiable."""

    @abc.abstractmethod
    def by_draw(
        self, law: Distribution, leaf: Tensor | None = None
    ) -> tuple[Float[Tensor, " draws"], Float[Tensor, "draws k"]]:
        """The loss of each draw, and its slopes in the leaf [k] that made the distribution."""

    @abc.abstractmethod
    def by_member(self, law: Distribution) -> Float[Tensor, "draws *batch"]:
        """The loss of each draw for each member of the batch, which by_draw adds up."""


@dataclass(frozen=True)
class DirectLoss(PosteriorLoss):
    """The loss by a function of two distributions: a closed form, or a sum over few atoms."""

    loss: Callable[[Distribution, Distribution], Tensor]  # [draws, *batch]

    @property
    def numbers(self):
        return self.nodes.log_weight.numel() if self.nodes else 1

    def risk(self, law):
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

    A sum of Amari divergences is evaluated from moments over the draws, once these are computed;
    any other from every draw.
    """

    nodes: Nodes
    divergence: FDivergence | Intrinsic

    @property
    def numbers(self):
        return 0 if orders(self.divergence) is not None else self.nodes.log_weight.numel()

    def risk(self, law):
        logq = self.nodes.log_mass(law)[0]
        terms = orders(self.divergence)
        if terms is None:
            return _Expected.apply(logq, self)
        return torch.stack([w * self._of_order(alpha, logq) for w, alpha in terms]).sum()

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
        """The terms of each node in the expected loss [m], and in its slopes [m, k]."""
        logq, jacobian = self._jacobian(law, leaf)
        total, slope = torch.zeros_like(logq), torch.zeros_like(logq)
        for rows in self.laws.chunks(logq.numel()):
            weights = self.laws.weights[rows, None, None]
            for sums, each in zip((total, slope), self._terms(rows, logq), strict=True):
                sums += (weights * each.detach()).sum(0)
        return total.sum(0), (slope[..., None] * jacobian).sum(0)

    def at_nodes(self, law: Distribution) -> Float[Tensor, "members nodes"]:
        """The terms of each node in the expected loss of each member of the batch."""
        with torch.no_grad():
            logq = self.nodes.log_mass(law)[0]
            total = torch.zeros_like(logq)
            for rows in self.laws.chunks(logq.numel()):
                logp = self.nodes.log_mass(self.laws.at(rows))
                terms = self._excess(logp, logq.expand_as(logp))
                total += (self.laws.weights[rows, None, None] * terms).sum(0)
        return total

    def _jacobian(self, law, leaf):
        """Log w q [members, m] of a distribution, and its slopes [members, m, k]."""
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
            coefficients = self.divergence.held(logp, logq)
        return self.divergence.excess(logp, logq, *coefficients)

    @functools.cached_property
    def _log_masses(self) -> list[tuple[slice, Tensor]]:
        rows = list(self.laws.chunks(self.nodes.log_weight.numel()))
        return [(r, self.nodes.log_mass(self.laws.at(r))) for r in rows]

    def mean(self, logq: Tensor, order: int) -> tuple[Tensor, Tensor]:
        """The expected loss, and its first or second derivatives [members, m] in log w q."""
        value, slope = torch.zeros((), dtype=logq.dtype), torch.zeros_like(logq)
        for rows, logp in self._log_masses:
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


# Seconds of a core of 2024: of one coordinate of a kinked loss; by number of a closed form; by
# draw and node of a smooth loss, and of one gradient of a kinked one.
OVERHEAD, CLOSED, AT_NODES, KINKS = 0.5, 2.5e-7, 2.5e-6, 2e-6
MIN_NODES, LONG_SECONDS = 64, 30.0  # of any distribution; seconds that need no better estimate
KINKED = 2**20  # log-densities that a loss with kinks is minimised over, which only many smooth
PROBE_DRAWS = 32  # draws on which a closed form is tried


def posterior_loss(
    laws: Laws,
    divergence: AnyLoss,
    *,
    nodes: Nodes | None = None,
    size: int = 4096,
    seed: int = 0,
) -> PosteriorLoss:
    """The posterior expected divergence of a distribution, by a closed form or on nodes.

    Raises:
        TypeError: ``divergence`` is none.
        ValueError: It needs a finite support, or no nodes serve these distributions.
    """
    check_loss(divergence)
    laws = _independent_parts(laws, divergence)
    smooth = isinstance(divergence, FDivergence) and not has_kinks(divergence)
    if nodes is None and _has_closed_form(laws, divergence):
        return DirectLoss(laws, None, smooth, _InClosedForm(divergence))
    if isinstance(divergence, FDivergence | Intrinsic):
        criterion = divergence if isinstance(divergence, FDivergence) else None
        nodes = nodes or nodes_for(laws, criterion, size=size, seed=seed)
        return NodeLoss(laws, with_slopes(laws, nodes), smooth, divergence)
    nodes = nodes or nodes_for(laws, size=1, seed=seed)
    if nodes.kind != "enumeration":
        raise ValueError(
            f"divergence {divergence} is no f-divergence, and has no meaning beyond a finite "
            f"support; that of a {type(laws.at(laws.spread(1))).__name__} is not finite."
        )
    return DirectLoss(laws, nodes, smooth, _OverAtoms(divergence, nodes))


def needs_sample(laws: Laws, divergence: AnyLoss) -> bool:
    """True if the loss takes an importance sample, and so draws times nodes log-densities."""
    laws = _independent_parts(laws, divergence)
    return not _has_closed_form(laws, divergence) and joint(laws)


def expected_seconds(laws: Laws, divergence: AnyLoss, draws: int) -> float:
    """About how long an act takes on one core that is minimised numerically.

    A count of numbers, so that the same posterior gets the same answer on any machine.

    Args:
        laws: Some draws.
        divergence: The loss.
        draws: How many draws there are.
    """
    members = laws.at(laws.spread(1)).batch_shape.numel()
    least = AT_NODES * draws * members * MIN_NODES
    if least > LONG_SECONDS and not _has_closed_form(laws, divergence):
        return least  # placing nodes would take long itself
    loss = posterior_loss(laws, divergence)
    coordinates = sum(x[0].numel() for x in laws.theta.values())
    if loss.nodes is None:
        law = laws.at(laws.spread(1))
        size = draws * law.batch_shape.numel() * law.event_shape.numel()
        evaluations = coordinates if not loss.smooth else 1
        return evaluations * (OVERHEAD + CLOSED * size * coordinates)
    numbers = draws * loss.nodes.log_weight.numel()
    if loss.smooth:
        return 1 + AT_NODES * numbers
    return 1 + KINKS * (1 + 4 * coordinates) * min(numbers, KINKED)


def _independent_parts(laws: Laws, divergence: AnyLoss) -> Laws:
    terms = orders(divergence)
    if terms is None or any(alpha not in (0, 1) for _, alpha in terms):
        return laws
    return dataclasses.replace(laws, law=lambda theta: independent_parts(laws.law(theta)))


def _has_closed_form(laws: Laws, divergence: AnyLoss) -> bool:
    one = laws.at(laws.spread(1))
    # what is fixed in one draw, or in several, may move: a few are tried first, for they are fast
    rows = laws.spread(PROBE_DRAWS), slice(None)
    return all(between(divergence, laws.at(each), one) is not None for each in rows)


@dataclass(frozen=True)
class _InClosedForm:
    divergence: AnyLoss

    def __call__(self, p: Distribution, q: Distribution) -> Tensor:
        value = between(self.divergence, p, q)
        assert value is not None  # as of all draws together
        return value


@dataclass(frozen=True)
class _OverAtoms:
    """A divergence that is none of ratios, its coefficients moving with the act."""

    divergence: Divergence
    nodes: Nodes

    def __call__(self, p: Distribution, q: Distribution) -> Tensor:
        logp, logq = self.nodes.log_mass(p), self.nodes.log_mass(q)
        logp, logq = torch.broadcast_tensors(logp, logq)
        inputs = self.divergence.held_inputs(logp)
        return self.divergence.value(logp, logq, *self.divergence.held(logp, logq, *inputs))


def thin_loss(loss: PosteriorLoss, numbers: int) -> PosteriorLoss:
    """The loss over so few of the draws that an evaluation needs no more numbers."""
    count = max(numbers // max(1, loss.numbers), 64)
    is_small = loss.numbers == 0 or count >= len(loss.laws)
    return loss if is_small else loss.over(loss.laws.thin(count))

"""Divergences that are not f-divergences: exact over atoms, never sampled."""

import functools
import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from rkl.checks import number
from rkl.divergences.base import (
    POLE,
    Divergence,
    expansion,
    log_ratio,
    near_or_far,
    occurs,
    power,
    power_excess,
    relative_entropy,
)
from rkl.divergences.f_divergences import KL, ReverseKL, TotalVariation
from rkl.divergences.rows import Shards, row_logsumexp, row_max, row_sum, shards

__all__ = [
    "AKL",
    "AMiD",
    "AlphaBeta",
    "EntropyAwareReverseKL",
    "LKHybrid",
    "NegLogAcceptance",
    "TAID",
    "ToDi",
]

FIRST_RANKED = 32  # atoms of p ranked at first; the head is seldom larger
BLOCK = 32  # atoms whose largest stands for all of them, in the search for the largest


@dataclass(frozen=True)
class AKL(Divergence):
    r"""Adaptive KL, w KL(p ‖ q) + (1 − w) KL(q ‖ p), with w set by where q errs.

    The head of p is its most probable atoms, up to a total mass of μ but never empty,
    and w = Σ_head |p − q| / Σ |p − q|, a constant to autograd. AKL compares p and q as
    wholes rather than through p/q: it is exact on atoms and cannot be sampled. Where the
    head is the top atom alone, w is at most ½.

    Source: Wu et al. (2025), arXiv 2404.02657, eq. (10), and their code for the atom that
    straddles μ.

    Neighbours: KL() and ReverseKL(), between which it moves token by token; ToDi() does so
    atom by atom.

    Args:
        mu: Mass of the head, in [0, 1).
        straddle: The part to which the atom that straddles μ belongs: "tail" as in the
            authors' code, "head" as in the paper's wording.

    >>> p, q = torch.tensor([0.4, 0.3, 0.2, 0.1]), torch.full((4,), 0.25)
    >>> AKL().held(p.log(), q.log()), AKL(straddle="head").held(p.log(), q.log())
    ((tensor([0.3750]),), (tensor([0.5000]),))
    """

    varying = ("mu",)
    reduces_rows = True
    mu: float = 0.5
    straddle: Literal["head", "tail"] = "tail"

    def __post_init__(self):
        number("mu", self.mu, at_least=0, below=1, what=" (at 1 it would be KL)")
        if self.straddle not in ("head", "tail"):
            raise ValueError(f"straddle must be 'head' or 'tail'; got {self.straddle!r}.")

    def search(self, logits):
        """The likeliest atoms, and a mask of those in the head; they include the whole head."""
        if (shared := shards()) is not None:
            return self._head_in_shards(logits, shared)
        maxima = block_maxima(logits)
        top = maxima.amax(-1, keepdim=True)
        # The two parts of the normaliser apart: their sum would lose digits at a large offset.
        normaliser = torch.cat([top, (logits - top).exp_().sum(-1, keepdim=True).log()], -1)
        return self._head(logits, maxima, normaliser, FIRST_RANKED)

    def _head(self, logits, maxima, normaliser, k: int):
        k = min(k, logits.shape[-1])
        index = largest(logits, maxima, k)
        mass = (logits.gather(-1, index) - normaliser[..., :1] - normaliser[..., 1:]).exp()
        total = mass.cumsum(-1)
        head = total <= self.mu if self.straddle == "tail" else total - mass < self.mu
        head[..., 0] = True
        wide = head[..., -1]
        if k == logits.shape[-1] or not wide.any():
            return index, head
        wider = self._head(logits[wide], maxima[wide], normaliser[wide], 4 * k)
        index, head = (pad(x, (0, wider[0].shape[-1] - k)) for x in (index, head))
        index[wide], head[wide] = wider
        return index, head

    def _head_in_shards(self, logits, shared: Shards):
        """The same of this process's shard, the atom where the head ends being found by digits.

        Of the numbers that order the atoms as their logits do, four bits at a time are read: the
        masses of the atoms that share them, summed over the processes, say in which of sixteen
        parts the head ends. What is sent does not grow with the vocabulary. Of atoms that are
        alike the first in the vocabulary go to the head.
        """
        logits = logits + 0.0  # no -0, which would rank below 0
        top = row_max(logits)
        mass = (logits - top).exp_()
        mass = mass / row_sum(mass)
        order = _order(logits)
        alike, above = torch.ones_like(order, dtype=torch.bool), torch.zeros_like(top)
        head = ~alike
        for shift in range(8 * logits.element_size() - 4, -1, -4):
            digit = order >> shift & 15
            parts = mass.new_zeros(*mass.shape[:-1], 16)
            parts.scatter_add_(-1, 15 - digit, mass.masked_fill(~alike, 0.0))
            reached = above + shared.reduce(parts, "sum").cumsum(-1)  # from the likeliest on
            beyond = reached > self.mu if self.straddle == "tail" else reached >= self.mu
            # Rounding may leave the whole short of μ, and a μ of 0 is reached by nothing.
            ends = (beyond & (reached > above)) | (reached == reached[..., -1:])
            part = ends.int().argmax(-1, keepdim=True)
            above = torch.where(part > 0, reached.gather(-1, (part - 1).clamp_min(0)), above)
            head |= alike & (digit > 15 - part)
            alike &= digit == 15 - part
        head |= alike & self._is_first(alike, mass, above, shared)
        inside, index = head.byte().topk(max(1, int(head.sum(-1).max())))
        return index, inside.bool()

    def _is_first(self, alike, mass, above, shared: Shards):
        """Mask of the tied atoms that belong to the head."""
        counts = mass.new_zeros(*mass.shape[:-1], shared.count)
        counts[..., shared.rank] = alike.sum(-1)
        counts = shared.reduce(counts, "sum")
        room = (self.mu - above) / row_max(mass.masked_fill(~alike, 0.0))
        room = room.floor() if self.straddle == "tail" else room.ceil()
        room = torch.where(above == 0, room.clamp_min(1.0), room)  # the head is never empty
        before = counts[..., : shared.rank].sum(-1, keepdim=True)
        return alike.cumsum(-1) <= room - before

    def held(self, logp, logq, *inputs):
        _, index, head = inputs or self.held_inputs(logp)
        gap = row_sum((logp.exp() - logq.exp()).abs())
        at_head = (logp.gather(-1, index).exp() - logq.gather(-1, index).exp()).abs()
        head_gap = row_sum(at_head * head)
        tiny = torch.finfo(gap.dtype).tiny  # 0/0 where p = q, and there any w will do
        return ((head_gap / gap.clamp_min(tiny)).clamp_max(1.0),)

    def integrand(self, logp, logq, w):
        return _weigh_kls(logp, logq, w, 1 - w)

    def excess(self, logp, logq, w):
        return _weigh_kl_excesses(logp, logq, w, 1 - w)


@dataclass(frozen=True)
class EntropyAwareReverseKL(Divergence):
    r"""Entropy-aware reverse KL, KL(q ‖ p) + 1[H(p) > τ] KL(p ‖ q).

    Mode-seeking where p is sure; where p hesitates between many atoms it also asks q to cover
    them. The switch reads the entropy of the whole of p, so that a top k does not suffice.

    Source: Jin et al. (2026), arXiv 2603.07079.

    Neighbours: ReverseKL() for a large τ, Jeffreys() for a τ of 0 between distributions that
    are not sure of one atom.

    Args:
        tau: Entropy of p in nats above which KL(p ‖ q) is added, at least 0.

    >>> p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.9, 0.1])
    >>> EntropyAwareReverseKL(tau=0.5)(p.log(), q.log())
    tensor(0.8789)
    >>> EntropyAwareReverseKL(tau=0.8)(p.log(), q.log())
    tensor(0.3681)
    """

    varying = ("tau",)
    reduces_rows = True
    needs_every_atom = (
        "its switch reads the entropy of the whole of p, which a top k does not tell"
    )
    tau: float = 0.8

    def __post_init__(self):
        number("tau", self.tau, at_least=0)

    def held(self, logp, logq, *inputs):
        (tau,) = inputs or self.held_inputs(logp)
        entropy = -row_sum(relative_entropy(logp, torch.zeros_like(logp)))
        return ((entropy > tau).to(logp.dtype),)

    def integrand(self, logp, logq, hesitates):
        return _weigh_kls(logp, logq, hesitates, torch.ones_like(hesitates))

    def excess(self, logp, logq, hesitates):
        return _weigh_kl_excesses(logp, logq, hesitates, torch.ones_like(hesitates))


@dataclass(frozen=True)
class LKHybrid(Divergence):
    r"""LK hybrid, λ KL(p ‖ q) + (1 − λ) TV(p, q), with λ = exp(−η Σ min(p, q)) held fixed.

    Σ min(p, q) is the chance that speculative decoding accepts a token drafted from q. Far from
    p, where total variation hardly pulls, λ is near 1 and it is KL; near p, λ falls to exp(−η)
    and acceptance itself counts for more. Infinite wherever p has mass and q has none.

    Source: arXiv 2602.23881 (LK losses), for drafts of speculative decoding.

    Neighbours: KL() at η = 0, TotalVariation() in the limit of large η;
    NegLogAcceptance(), which needs no weight.

    Args:
        eta: Rate at which λ falls with acceptance, at least 0.

    >>> p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.9, 0.1])
    >>> LKHybrid()(p.log(), q.log())
    tensor(0.4183)
    """

    varying = ("eta",)
    reduces_rows = True
    eta: float = 3.0

    def __post_init__(self):
        number("eta", self.eta, at_least=0)

    @property
    def increasing_in(self):
        """KL and TV: with T = TV its slope in T is ηλ(KL − T) + 1 − λ.

        As (1 − λ)/λ = exp(η(1 − T)) − 1 ≥ η(1 − T), that is negative only where KL < 2T − 1,
        which KL ≥ 2T² (Pinsker) rules out.
        """
        return _KL, _TV

    def held(self, logp, logq, *inputs):
        (eta,) = inputs or self.held_inputs(logp)
        acceptance = row_sum(torch.minimum(logp, logq).exp())
        return ((-eta * acceptance).exp(),)

    def integrand(self, logp, logq, lam):
        return lam * _KL.integrand(logp, logq) + (1 - lam) * _TV.integrand(logp, logq)

    def excess(self, logp, logq, lam):
        return lam * _KL.excess(logp, logq) + (1 - lam) * _TV.integrand(logp, logq)


@dataclass(frozen=True)
class NegLogAcceptance(Divergence):
    r"""Negative log-acceptance, −log Σ min(p, q) = −log(1 − TV(p, q)).

    Σ min(p, q) is the chance that speculative decoding accepts a token drafted from q. The
    order of models is that of TotalVariation(), but its gradient is divided by the acceptance, and
    so does not vanish with it. Symmetric: infinite only where p and q share no atom.

    Source: arXiv 2602.23881 (LK losses), for drafts of speculative decoding.

    Neighbours: −log(1 − TotalVariation()); LKHybrid().

    >>> p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.9, 0.1])
    >>> NegLogAcceptance()(p.log(), q.log())
    tensor(0.5108)
    """

    reduces_rows = True

    @property
    def increasing_in(self):
        return (_TV,)

    def statistics(self, logp, logq, *held):
        return (row_logsumexp(torch.minimum(logp, logq)),)

    def integrand(self, logp, logq, log_acceptance):
        return _TV.integrand(logp, logq)

    def outer(self, total, log_acceptance):
        # The sum keeps the digits near agreement, the logarithm those of a small acceptance.
        near = -(-total.clamp_max(0.5)).log1p()
        return torch.where(total < 0.5, near, -log_acceptance)


@dataclass(frozen=True)
class TAID(Divergence):
    r"""TAID, KL(r ‖ q) with r ∝ p^t q^(1−t) held fixed.

    r lies between the model and its target: the logits of q, detached, moved by the share t
    towards those of p. A small t asks for little at a time; t is meant to rise during training,
    which recompiles nothing.

    Source: Shing et al. (2025), arXiv 2501.16937.

    Neighbours: KL() at t = 1.

    Args:
        t: Share of the way from q to p, above 0 and at most 1.

    >>> p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.9, 0.1])
    >>> TAID(t=0.5)(p.log(), q.log()), TAID(t=1.0)(p.log(), q.log())
    (tensor(0.0923), tensor(0.5108))
    """

    varying = ("t",)
    reduces_rows = True
    t: float = 0.5

    def __post_init__(self):
        number("t", self.t, above=0, at_most=1, what=" (at 0 it would be 0 everywhere)")

    def held(self, logp, logq, *inputs):
        (t,) = inputs or self.held_inputs(logp)
        mixed = t * logp + ((1 - t) * logq).masked_fill(t == 1, 0.0)  # 0 · −∞ at t = 1
        total = row_logsumexp(mixed)
        # Where p and q share no atom there is no r: p in its place makes the value infinite.
        return (torch.where(total == -math.inf, logp, mixed - total),)

    def integrand(self, logp, logq, logr):
        return _KL.integrand(logr, logq)

    def excess(self, logp, logq, logr):
        return _KL.excess(logr, logq)


@dataclass(frozen=True)
class AMiD(Divergence):
    r"""AMiD, KL(p ‖ r) with r ∝ (λ p^k + (1 − λ) q^k)^(1/k), where k = (1 − α)/2.

    r is the α-mixture of p and q: p^λ q^(1−λ) at α = 1. Its normaliser depends on q, and the
    gradient includes that. Bounded for α < 1; from 1 on infinite where p has mass and q has none.

    Source: Shin et al. (2025), arXiv 2510.15982.

    Neighbours: SkewKL(alpha=lam) at α = −1.

    Args:
        alpha: Shape of the mixture: −1 arithmetic, 1 geometric, 3 harmonic.
        lam: Weight λ of p in the mixture, strictly between 0 and 1.

    >>> p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.9, 0.1])
    >>> AMiD(alpha=-1.0, lam=0.3)(p.log(), q.log()), AMiD(alpha=1.0, lam=0.3)(p.log(), q.log())
    (tensor(0.1881), tensor(0.2705))
    """

    varying = ("lam",)
    reduces_rows = True
    alpha: float = -3.0
    lam: float = 0.1

    def __post_init__(self):
        number("alpha", self.alpha)
        number("lam", self.lam, above=0, below=1, what=" (at 0 it is KL)")

    def held(self, logp, logq, *inputs):
        return inputs or self.held_inputs(logp)

    def statistics(self, logp, logq, lam):
        """The logarithm of r, atom by atom.

        The normaliser's share of the gradient is that of + r in the excess p log(p/r) − p + r: its
        slopes −p + r add up to 0, so a factor common to all of r has no gradient. Detached, it
        costs no pass over the vocabulary.
        """
        mixed = _log_alpha_mixture(logp, logq, (1 - self.alpha) / 2, lam)
        total = row_logsumexp(mixed.detach())
        return (mixed - total.masked_fill(total == -math.inf, 0.0),)

    def integrand(self, logp, logq, lam, logr):
        return _KL.integrand(logp, logr)

    def excess(self, logp, logq, lam, logr):
        return _KL.excess(logp, logr)


@dataclass(frozen=True)
class ToDi(Divergence):
    r"""Token-wise KL, Σ s p log(p/q) + (1 − s) q log(q/p), with s = p/(p + q) held fixed.

    Its value is that of Jeffreys(); its gradient is not, for s is a constant to autograd:
    an atom with p > q is pulled up by KL and one with p < q down by ReverseKL.

    Source: Jung et al. (2025), arXiv 2505.16297, eq. (9).

    Neighbours: Jeffreys(), by value; AKL(), which holds one weight for a whole token.

    >>> p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.9, 0.1])
    >>> ToDi()(p.log(), q.log()), (KL() + ReverseKL())(p.log(), q.log())
    (tensor(0.8789), tensor(0.8789))
    """

    aliases = ("to-di",)
    reduces_rows = True

    def held(self, logp, logq, *inputs):
        return (log_ratio(logp, logq).sigmoid(),)

    def integrand(self, logp, logq, s):
        # No tangent plane is taken off: s varies over atoms, so p − q would not sum to nothing.
        return s * relative_entropy(logp, logq) + (1 - s) * relative_entropy(logq, logp)


@dataclass(frozen=True)
class AlphaBeta(Divergence):
    r"""α–β divergence, Σ (α p^(α+β) + β q^(α+β) − (α+β) p^α q^β) / (αβ(α + β)).

    Homogeneous of degree α + β rather than 1, so rare atoms count for more where α + β < 1:
    separable over atoms, but no f-divergence unless α + β = 1. Infinite where p has mass
    and q has none for β < 0, and the other way round for α < 0.

    Source: Cichocki et al. (2011), eq. (19); Wang et al. (2025), arXiv 2505.04560 (ABKD).

    Neighbours: Amari(alpha) at β = 1 − α.

    Args:
        alpha: Not 0.
        beta: Not 0; alpha + beta must be positive.

    >>> p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.9, 0.1])
    >>> AlphaBeta()(p.log(), q.log())
    tensor(0.4368)
    """

    alpha: float = 0.2
    beta: float = 0.7

    def __post_init__(self):
        number("alpha", self.alpha, unequal=(0,))
        number("beta", self.beta, unequal=(0,))
        number("alpha + beta", self.alpha + self.beta, above=0)

    def integrand(self, logp, logq):
        a, b = self.alpha, self.beta
        mixed = power(logp, logq, a, b)
        of_p, of_q = ((a + b) * logp).exp(), ((a + b) * logq).exp()
        return of_p / (b * (a + b)) + of_q / (a * (a + b)) - mixed / (a * b)

    def excess(self, logp, logq):
        """The excess over F's tangent plane, near p = q by its series: no digits are lost."""
        if min(abs(self.alpha), abs(self.beta), self.alpha + self.beta) < POLE:
            return power_excess(logp, logq, self.alpha, self.beta)
        _, *series = self.taylor
        far = self.integrand(logp, logq)
        return near_or_far(logp, logq, far, series, degree=self.alpha + self.beta)

    @functools.cached_property
    def taylor(self) -> tuple[float, ...]:
        """The slope of F at p = q, 0, and its series there."""
        return expansion(self.integrand, degree=self.alpha + self.beta)


def block_maxima(x: Float[Tensor, "*batch atoms"]) -> Float[Tensor, "*batch blocks"]:
    """The largest of every BLOCK atoms; the last block may be shorter."""
    whole = x.shape[-1] // BLOCK * BLOCK
    maxima = x[..., :whole].unflatten(-1, (-1, BLOCK)).amax(-1) if whole else x[..., :0]
    if whole == x.shape[-1]:
        return maxima
    return torch.cat([maxima, x[..., whole:].amax(-1, keepdim=True)], -1)


def largest(
    x: Float[Tensor, "*batch atoms"], maxima: Float[Tensor, "*batch blocks"], k: int
) -> Int[Tensor, "*batch k"]:
    """The indices of the k largest, in order, from the largest of each block.

    They lie in the k blocks with the largest maxima, so only those are ranked.
    """
    if maxima.shape[-1] < 2 * k:
        return x.topk(k).indices
    blocks = maxima.topk(k, sorted=False).indices
    candidates = (blocks[..., None] * BLOCK + torch.arange(BLOCK, device=x.device)).flatten(-2)
    beyond = candidates >= x.shape[-1]  # in the last block, where it is not full
    values = x.gather(-1, candidates.clamp_max(x.shape[-1] - 1))
    best = values.masked_fill_(beyond, -math.inf).topk(k).indices
    return candidates.gather(-1, best)


def _order(x: Float[Tensor, "*batch atoms"]) -> Int[Tensor, "*batch atoms"]:
    """Integers whose binary digits order them as the numbers are ordered."""
    bits = x.view(torch.int32 if x.element_size() == 4 else torch.int64)
    sign = torch.iinfo(bits.dtype).min
    return torch.where(bits < 0, ~bits, bits ^ sign)


def _weigh_kls(logp, logq, forward, reverse):
    of_p, of_q = relative_entropy(logp, logq), relative_entropy(logq, logp)
    of_p, of_q = forward * of_p, reverse * of_q
    if occurs(lambda: (forward == 0) | (reverse == 0)):
        # 0 · ∞ = 0: a side without weight may be infinite
        of_p = torch.where(forward > 0, of_p, 0.0)
        of_q = torch.where(reverse > 0, of_q, 0.0)
    return of_p + of_q


def _weigh_kl_excesses(logp, logq, forward, reverse):
    """The weighted sum of both KLs as an excess, with one tangent plane and one series."""
    (c, *of_forward), (d, *of_reverse) = _KL.taylor, _REVERSE_KL.taylor
    slope = forward * c + reverse * d
    far = _weigh_kls(logp, logq, forward, reverse) - slope * (logp.exp() - logq.exp())
    series = [forward * a + reverse * b for a, b in zip(of_forward, of_reverse, strict=True)]
    return near_or_far(logp, logq, far, series)


def _log_alpha_mixture(logp, logq, k, lam):
    """The logarithm of (λ p^k + (1 − λ) q^k)^(1/k), or λ log p + (1 − λ) log q for k = 0.

    With x the larger of p^k and q^k and w the weight of the other one, y, it is
    (log x + log(1 + w (y/x − 1))) / k: nothing cancels, also for a small k, which would magnify
    the rounding of the plainer and faster log(1 − w + w y/x).
    """
    nowhere = torch.minimum(logp, logq) if k <= 0 else torch.maximum(logp, logq)
    nowhere = nowhere == -math.inf
    logp, logq = (x.masked_fill(nowhere, 0.0) for x in (logp, logq))
    t = logp - logq
    if k == 0:
        return (logq + lam * t).masked_fill(nowhere, -math.inf)
    of_p = k * t > 0
    log_x, w = torch.where(of_p, logp, logq), torch.where(of_p, 1 - lam, lam)
    s = torch.where(of_p, -k * t, k * t)
    log_mean = (1 - w + w * s.exp()).log() if abs(k) >= 0.5 else (w * s.expm1()).log1p()
    return (log_x + log_mean / k).masked_fill(nowhere, -math.inf)


# One object each: what they compute once about themselves cannot be traced by a compiler.
_KL, _REVERSE_KL, _TV = KL(), ReverseKL(), TotalVariation()

"""Divergences that are not f-divergences: exact over atoms, never sampled."""

import functools
import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from rkl.divergences.base import (
    POLE,
    Divergence,
    expansion,
    log_ratio,
    near_or_far,
    number,
    occurs,
    power,
    power_excess,
    relative_entropy,
)
from rkl.divergences.f_divergences import KL, ReverseKL

__all__ = [
    "AKL",
    "AlphaBeta",
    "ToDi",
]

FEW = 32  # atoms of p ranked at first; the head is seldom larger
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

    mu: float = 0.5
    straddle: Literal["head", "tail"] = "tail"

    def __post_init__(self):
        number("mu", self.mu, at_least=0, below=1, what=" (at 1 it would be KL)")
        if self.straddle not in ("head", "tail"):
            raise ValueError(f"straddle must be 'head' or 'tail'; got {self.straddle!r}.")

    def search(self, logits):
        """The likeliest atoms, and which of them are the head; all of it is among them."""
        maxima = block_maxima(logits)
        top = maxima.amax(-1, keepdim=True)
        # The two parts of the normaliser apart: their sum would lose digits at a large offset.
        normaliser = torch.cat([top, (logits - top).exp_().sum(-1, keepdim=True).log()], -1)
        return self._head(logits, maxima, normaliser, FEW)

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

    def held(self, logp, logq, *found):
        index, head = found or self.search(logp)
        gap = (logp.exp() - logq.exp()).abs().sum(-1, keepdim=True)
        at_head = (logp.gather(-1, index).exp() - logq.gather(-1, index).exp()).abs()
        head_gap = (at_head * head).sum(-1, keepdim=True)
        tiny = torch.finfo(gap.dtype).tiny  # 0/0 where p = q, and there any w will do
        return ((head_gap / gap.clamp_min(tiny)).clamp_max(1.0),)

    def integrand(self, logp, logq, w):
        forward, reverse = relative_entropy(logp, logq), relative_entropy(logq, logp)
        forward, reverse = w * forward, (1 - w) * reverse
        if occurs(lambda: (w == 0) | (w == 1)):  # 0 · ∞ = 0: a side without weight may be infinite
            forward, reverse = torch.where(w > 0, forward, 0.0), torch.where(w < 1, reverse, 0.0)
        return forward + reverse

    def excess(self, logp, logq, w):
        """That of both KLs, weighted: one tangent plane and one series."""
        (c, *forward), (d, *reverse) = (kl.taylor for kl in _PARENTS)
        slope = w * c + (1 - w) * d
        far = self.integrand(logp, logq, w) - slope * (logp.exp() - logq.exp())
        series = [w * a + (1 - w) * b for a, b in zip(forward, reverse, strict=True)]
        return near_or_far(logp, logq, far, series)


@dataclass(frozen=True)
class ToDi(Divergence):
    r"""Token-wise KL, Σ s p log(p/q) + (1 − s) q log(q/p), with s = p/(p + q) held.

    Its value is that of Jeffreys(); its gradient is not, for s is a constant to autograd:
    an atom with p > q is pulled up by KL and one with p < q down by ReverseKL.

    Source: Jung et al. (2025), arXiv 2505.16297, eq. (9).

    Neighbours: Jeffreys(), by value; AKL(), which holds one weight for a whole token.

    >>> p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.9, 0.1])
    >>> ToDi()(p.log(), q.log()), (KL() + ReverseKL())(p.log(), q.log())
    (tensor(0.8789), tensor(0.8789))
    """

    aliases = ("todi",)

    def held(self, logp, logq, *found):
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
        """F itself, which touches 0 at p = q, by its series there: no digits are lost."""
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
    """The largest of every BLOCK atoms, the last block being what is left."""
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


_PARENTS = KL(), ReverseKL()

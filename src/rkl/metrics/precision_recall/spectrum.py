"""At which slopes of the precision-recall curve an f-divergence looks."""

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from rkl.checks import floats
from rkl.divergences import FDivergence
from rkl.metrics.precision_recall.curve import checked_slopes

FARTHEST = 20.0  # |log λ| up to which atoms are looked for
CELLS, HALVINGS = 4_001, 30  # down to 1e-11
MAX_CELLS = 256  # cells looked into at a time


class Spectrum(NamedTuple):
    """An f-divergence as a mixture of the precision–recall divergences.

    Attributes:
        slopes: The λ at which the density is given.
        density: Weight per unit of λ, f″(1/λ)/λ³.
        atom_slopes: The λ of single divergences that are mixed in, rising.
        atom_weights: Their weights.
    """

    slopes: Float[Tensor, " slopes"]
    density: Float[Tensor, " slopes"]
    atom_slopes: Float[Tensor, " atoms"]
    atom_weights: Float[Tensor, " atoms"]


def pr_spectrum(
    divergence: FDivergence, slopes: Float[Tensor, " slopes"] | None = None
) -> Spectrum:
    r"""The weights with which an f-divergence mixes the precision–recall divergences.

        D_f = ∫ f″(1/λ) λ⁻³ D_λ dλ + Σ wᵢ D_λᵢ,    D_λ = min(λ, 1) − α(λ)

    f″(1/λ)/λ³ is the second derivative in λ of the integrand F(1, λ), and a kink of F is an atom:
    TotalVariation has one at 1, PrecisionRecall(λ) one at λ, of weight 1. Weight at large λ is
    on precision, at small λ on recall. The integrand is differentiated automatically, so that
    every f-divergence has a spectrum, sums and those of a user too. Atoms are looked for from
    λ = e⁻²⁰ to e²⁰, and found to ten digits.

    Source: Verine et al. (2023), arXiv 2302.00628, theorem 4.3.

    Args:
        divergence: An f-divergence.
        slopes: The λ, positive and finite; by default 33 of them, from 1/256 to 256.

    Raises:
        TypeError: It is no f-divergence, which alone have a spectrum.

    >>> from rkl import KL, TotalVariation
    >>> pr_spectrum(KL(), torch.tensor([0.5, 1.0, 2.0])).density
    tensor([4.0000, 1.0000, 0.2500], dtype=torch.float64)
    >>> pr_spectrum(0.5 * KL() + 0.5 * TotalVariation()).atom_weights
    tensor([0.5000], dtype=torch.float64)
    """
    _check(divergence)
    slopes = checked_slopes(slopes)
    u = slopes.log()
    density = _cumulative_weight(divergence, u)[1] / (slopes * slopes.clamp_max(1.0))
    return Spectrum(slopes, density, *_atoms(divergence))


def pr_weight(
    divergence: FDivergence, edges: Float[Tensor, " edges"]
) -> Float[Tensor, " edges-1"]:
    r"""Bound on the share of each band of slopes in D: ∫ f″(1/λ) λ⁻³ min(λ, 1) dλ, atoms included.

    D_λ is at most min(λ, 1), which distributions reach that share nothing. So the weights of all
    slopes add up to the largest value of D, infinite for some, and those of bands compare what is
    asked of recall (λ below 1) with what is asked of precision. Integrated exactly, from the
    values and the slopes of the integrand. An atom on an edge is shared.

    Args:
        divergence: An f-divergence.
        edges: Rising slopes λ, positive and finite.

    >>> from rkl import KL
    >>> pr_weight(KL(), torch.tensor([0.25, 1.0, 4.0]))
    tensor([1.3863, 0.7500], dtype=torch.float64)
    """
    _check(divergence)
    floats("edges", edges)
    edges = edges.detach().double()
    finite = ((edges > 0) & (edges < math.inf)).all()
    if edges.ndim != 1 or len(edges) < 2 or not finite or not (edges.diff() > 0).all():
        raise ValueError(f"edges must be two slopes at least, rising; got {edges.tolist()}.")
    weight = _cumulative_weight(divergence, edges.log())[0].diff()
    return weight.clamp_min(0.0)  # which only rounding undercuts: f is convex


def spectrum_text(divergence: FDivergence) -> str:
    """In three lines, the trade-offs at which a divergence looks.

    >>> from rkl import KL
    >>> print(spectrum_text(KL()))
    looks at      1/256 █████████▅▃▂▁▁▁▁▁ 256   (slope λ, an octave each)
    weight        recall (λ < 1) 80 %, both (λ about 1) 9 %, precision (λ > 1) 10 %
    atoms         none
    """
    octaves = torch.arange(-8.5, 9.0, dtype=torch.float64)
    weights = pr_weight(divergence, 2.0**octaves)
    bars = "".join(_bar(it) for it in (weights / weights.max()).tolist())
    shares = [part.sum() / weights.sum() for part in (weights[:8], weights[8:9], weights[9:])]
    names = "recall (λ < 1)", "both (λ about 1)", "precision (λ > 1)"
    text = ", ".join(f"{name} {it:.0%}" for name, it in zip(names, shares, strict=True))
    pairs = zip(*(it.tolist() for it in _atoms(divergence)), strict=True)
    atoms = ", ".join(f"{weight:.4g} at λ = {lam:.4g}" for lam, weight in pairs)
    return (
        f"looks at      1/256 {bars} 256   (slope λ, an octave each)\n"
        f"weight        {text.replace('%', ' %')}\natoms         {atoms or 'none'}"
    )


def _bar(share: float) -> str:
    return " " if share <= 1e-6 else "▁▂▃▄▅▆▇█"[min(int(8 * share), 7)]


def _check(divergence: Any) -> None:
    if not isinstance(divergence, FDivergence):
        raise TypeError(
            f"divergence must be an f-divergence to have a spectrum; got {divergence!r}."
        )


def _cumulative_weight(divergence: FDivergence, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""The weight M up to log λ = u, its derivative (atoms apart), and how wrong M may be.

    With f*(λ) = F(1, λ), M is λ f*′ − f* up to λ = 1 and f*′ above. It is computed from
    h(u) = F(1, λ) below and F(1/λ, 1) above, as ±(h′ − h): the larger mass being 1, nothing
    overflows and little cancels.
    """
    recall = u <= 0
    with torch.enable_grad():
        small = -u.abs().detach().requires_grad_()  # log of the smaller mass
        one = torch.zeros_like(small)
        logp, logq = torch.where(recall, one, small), torch.where(recall, small, one)
        h = divergence.integrand(logp, logq)
        first = _slope(h, small)
        second = _slope(first, small)
    sign = 2.0 * recall - 1
    rounding = 1e-13 * (first.abs() + h.abs())
    return (sign * (first - h)).detach(), (second - first).detach(), rounding.detach()


def _slope(values: Tensor, at: Tensor) -> Tensor:
    if not values.requires_grad:  # a constant has none
        return torch.zeros_like(at)
    (slope,) = torch.autograd.grad(values.sum(), at, create_graph=True, materialize_grads=True)
    return slope


def _atoms(divergence: FDivergence) -> tuple[Tensor, Tensor]:
    """Slopes and weights of the kinks: where the weight jumps by more than its density gives.

    Cells in which it does are halved until a jump alone is left. No edge of a cell is a slope
    that anyone would write, so that no kink lies on one.
    """
    grid = torch.linspace(-FARTHEST, FARTHEST, CELLS, dtype=torch.float64) + CELLS**-1.5
    low, high = grid[:-1], grid[1:]
    jump, first = _excess(divergence, low, high), None
    for _ in range(HALVINGS):
        largest = jump.abs().topk(min(MAX_CELLS, int((jump != 0).sum()))).indices
        low, high, jump = low[largest], high[largest], jump[largest]
        first = jump.abs() if first is None else first[largest]
        middle = (low + high) / 2
        low, high = torch.cat([low, middle]), torch.cat([middle, high])
        jump, first = _excess(divergence, low, high), torch.cat([first, first])
        jump = torch.where(jump.abs() > first / 1000, jump, 0.0)
    cells = (jump > 0).nonzero().squeeze(-1)
    cells = cells[low[cells].argsort()]
    slopes = ((low + high) / 2)[cells].exp()
    slopes = torch.tensor([float(f"{lam:.10g}") for lam in slopes.tolist()], dtype=low.dtype)
    return slopes, jump[cells] / slopes.clamp_max(1.0)


def _excess(divergence: FDivergence, low: Tensor, high: Tensor) -> Tensor:
    """Excess of the weight of each cell over its density; 0 where that is rounding."""
    weights = _cumulative_weight(divergence, torch.cat([low, high]))
    weight, density, rounding = (part.reshape(2, -1) for part in weights)
    dense = (high - low) * density.mean(0)
    excess = weight[1] - weight[0] - dense
    return torch.where(excess.abs() > 1e-3 * dense.abs() + rounding.sum(0), excess, 0.0)

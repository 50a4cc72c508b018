r"""Densities of one angle in closed form: von Mises bent by splines, and von Mises itself.

The spline density lives on a circle warped by φ ↦ θ, tan(θ/2) = ρ tan(φ/2), so that its knots are
where the mass is. In φ it is a mixture of cubic B-splines, one on each of ``knots`` equidistant
knots: normalised by construction, twice differentiable everywhere, and drawn by choosing a knot
and adding four uniform numbers. Its log-weights are those of nearly a von Mises density of
concentration κ, with 1/ρ² = 1 + κ/2, plus the output of a network.

Angles are written as a pair (cos, sin), which no seam divides.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

STEEPNESS = 1.05  # of log-weights, by trial: nearest to von Mises densities with 12 to 24 knots
MIN_LOG_WEIGHT = -40.0  # the middle's being 0: single precision has no zeros there
MAX_SLOPE, MIN_WIDTH = 20.0, 1e-4  # bounds that matter only where weights are next to nothing
MAX_TRIES = 1_000  # of a rejection sampler that accepts 0.65 of them at least

Angles = Float[Tensor, " angles"]
Knots = Float[Tensor, "knots angles"]


class SplineDensity(NamedTuple):
    """The mass on each knot, and the square of the warp ρ."""

    weight: Knots
    warp: Angles


def near_von_mises(correction: Knots, kappa: Angles) -> SplineDensity:
    """A density near von Mises of concentration κ, with a correction of its log-weights.

    The weights at knots of a mixture with the density f are f − δ²f/6 up to fourth differences.
    """
    warp = 1 / (1 + kappa / 2)
    half = (torch.arange(len(correction)) / len(correction) - 0.5).to(correction)[
        :, None
    ] * math.pi
    far = half.sin().square()
    spread = half.cos().square() + far * warp
    # κ (cos θ − 1) and log dθ/dφ at the knots; what does not depend on the knot drops out
    height = -STEEPNESS * ((2 * kappa * warp) * (far / spread) + spread.log())
    height = height.clamp_min(MIN_LOG_WEIGHT)
    ahead, behind = ((height.roll(k, 0) - height).clamp_max(MAX_SLOPE).exp() for k in (1, -1))
    narrowed = (1 - (ahead + behind - 2) / 6).clamp_min(MIN_WIDTH).log()
    return SplineDensity((height + narrowed + correction).softmax(0), warp)


def draw(law: SplineDensity) -> Angles:
    """Positions in units of the spacing of knots, from 0 at θ = −π; no gradient."""
    weight = law.weight.detach()
    uniform = torch.rand(5, weight.shape[1], dtype=weight.dtype)
    knot = (weight.cumsum(0)[:-1] < uniform[:1]).sum(0)
    return torch.remainder(knot + uniform[1:].sum(0) - 2, len(weight))


def reparameterise(law: SplineDensity, position: Angles) -> Angles:
    """Positions differentiable in the parameters as draws are, by the implicit function theorem.

    dt = −dF(t)/q(t), with F the distribution function, from an origin that moves with t.

    Source: M. Figurnov, S. Mohamed, A. Mnih (2018), arXiv 1805.08498, eq. (6).
    """
    weight = law.weight.detach()
    with torch.no_grad():
        slope = _mass_before(position, weight) / _density(position, weight)
    return position - ((law.weight - weight) * slope).sum(0)


def angles(law: SplineDensity, position: Angles) -> tuple[Angles, Angles]:
    """The cosine and sine of θ at positions."""
    half = position * (math.pi / len(law.weight)) - math.pi / 2
    a, b = half.cos(), law.warp.sqrt() * half.sin()
    square = a * a + b * b
    return (a * a - b * b) / square, 2 * a * b / square


def log_density(law: SplineDensity, cosine: Angles, sine: Angles) -> Angles:
    """Log-density per radian of θ, in nats."""
    ahead = cosine >= 0  # 1 − cos or 1 + cos, whichever is small, without cancellation
    large = 1 + cosine.abs()
    small = sine * sine / large
    near, far = torch.where(ahead, large, small), torch.where(ahead, small, large)
    knots, rho = len(law.weight), law.warp.sqrt()
    # tan(θ/2) is sin/(1 + cos) and (1 − cos)/sin; a half turn too much is a whole round
    half = torch.atan2(torch.where(ahead, sine, large), rho * torch.where(ahead, large, sine))
    density = _density(half * (knots / math.pi) + knots / 2, law.weight)
    return (density * rho / (law.warp * near + far)).log() + math.log(knots / math.pi)


def _splines(position: Angles, knots: int) -> tuple[Int[Tensor, "4 angles"], Tensor, Tensor]:
    """The four knots about a position, how far it is from the second, and from the third."""
    floor = position.detach().floor()
    at = floor.long() + torch.arange(-1, 3, device=position.device)[:, None]
    away = position - floor
    return at, away, 1 - away


def _density(position: Angles, weight: Knots) -> Angles:
    knots = len(weight)
    at, t, u = _splines(position, knots)
    square, other = t * t, u * u
    splines = other * u, (3 * t - 6) * square + 4, (3 * u - 6) * other + 4, square * t
    return (weight.gather(0, at.remainder(knots)) * torch.stack(splines)).sum(0) / 6


def _mass_before(position: Angles, weight: Knots) -> Knots:
    """Of each knot's B-spline, the mass before a position; a knot passed by counts on."""
    knots = len(weight)
    at, t, u = _splines(position, knots)
    square, other = t * t, u * u
    # mass behind a spline's centre is that of its mirror image ahead of it
    inner = 12 + t * (16 - square * (8 - 3 * t)), 12 - u * (16 - other * (8 - 3 * u))
    mass = torch.stack([24 - other * other, *inner, square * square]) / 24 - (at < 0).to(t)
    passed = (torch.arange(knots, device=position.device)[:, None] < at[0]).to(t)
    return passed.scatter_add(0, at.remainder(knots), mass)


def log_bessel(kappa: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Log of 2π I₀(κ) exp(−κ), the normaliser of exp(κ cos θ − κ)."""
    return torch.special.i0e(kappa).log() + math.log(2 * math.pi)


def von_mises(kappa: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Draws of density proportional to exp(κ cos θ), in [−π, π], in double precision inside.

    Raises:
        ValueError: A concentration is negative, nan or infinite.
    """
    flat = kappa.detach().double().flatten()
    wrong = ~(flat.isfinite() & (flat >= 0))
    if wrong.any():
        raise ValueError(
            f"kappa: {int(wrong.sum())} of {len(flat)} concentrations are no finite numbers of 0 "
            f"or more; got {float(flat[wrong][0])}."
        )
    drawn, left = torch.empty_like(flat), torch.arange(len(flat))
    for _ in range(MAX_TRIES):
        turn, accepted = von_mises_try(flat[left])
        drawn[left[accepted]] = turn.angle()[accepted]
        left = left[~accepted]
        if not len(left):
            return drawn.to(kappa).reshape(kappa.shape)
    raise RuntimeError(
        f"kappa: no angle was accepted in {MAX_TRIES} tries at a concentration of "
        f"{float(flat[left[0]]):g}."
    )


def von_mises_try(
    concentration: Float[Tensor, "*shape"],
) -> tuple[Complex[Tensor, "*shape"], Tensor]:
    """One try to draw exp(i φ) with φ von Mises about 0: where it is accepted, it is exact.

    The proposal is wrapped Cauchy, the image (u + ρ)/(1 + ρ u) of a uniform u on the circle; at
    least 0.65 of the tries are accepted, all of them where concentration is 0.

    Source: Best and Fisher (1979), Applied Statistics 28, 152, in a form free of cancellation.
    """
    kappa = concentration
    root = (1 + 4 * kappa.square()).sqrt()
    other = (2 + 2 * root).sqrt()
    scale = 1 + root + other
    rho = 2 * kappa / scale
    below = (1 + 1 / (root + 2 * kappa) + other) / scale  # 1 - rho
    gap = below * (2 - below)  # 1 - rho^2
    angle = 2 * math.pi * torch.rand_like(kappa)
    cos, sin = angle.cos(), angle.sin()
    share = 1 / (1 + rho * (rho + 2 * cos))
    odds = scale * gap.square() * share / 4  # kappa (r - f) of the paper
    turn = torch.complex((2 * rho + (1 + rho.square()) * cos) * share, gap * sin * share)
    return turn, torch.rand_like(kappa) < odds * (1 - odds).exp()

r"""The distribution of one site of φ⁴ given its neighbours, ∝ exp(hφ − aφ² − λφ⁴)."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

NODES = 64  # of the trapezoidal rule
MAX_FALL = 45.0  # nats below the mode at which it ends
NEWTON_STEPS = 8
MAX_TRIES = 100_000  # of the rejection sampler


def log_density(
    phi: Float[Tensor, "*shape"], field: Float[Tensor, "*shape"], square: float, quartic: Tensor
) -> Float[Tensor, "*shape"]:
    """hφ − aφ² − λφ⁴, in nats."""
    return phi * (field - phi * (square + quartic * phi.square()))


def log_normaliser(
    field: Float[Tensor, "*shape"], square: float, quartic: Tensor
) -> Float[Tensor, "*shape"]:
    """Log of the integral of exp(hφ − aφ² − λφ⁴), in nats; its slope in h is the mean of φ.

    The trapezoidal rule, which converges exponentially here, is good to 1e-5 up to wells as deep
    as those of a = −20 √λ.

    Args:
        field: h.
        square: a.
        quartic: λ, positive, or zero where a is positive; a shape that broadcasts with h.

    >>> log_normaliser(torch.tensor(0.0), 0.5, torch.tensor(0.0))  # log √(2π)
    tensor(0.9189)
    """
    value, slope = _integrate(field, square, quartic)
    return value + slope * (field - field.detach())


def mean(
    field: Float[Tensor, "*shape"], square: float, quartic: Tensor
) -> Float[Tensor, "*shape"]:
    """The mean of φ."""
    return _integrate(field, square, quartic)[1]


@torch.no_grad()
def _integrate(field: Tensor, square: float, quartic: Tensor) -> tuple[Tensor, Tensor]:
    sign, field, quartic = field.sign(), field.abs(), quartic.expand_as(field)
    mode = _mode(field, square, quartic)
    peak = log_density(mode, field, square, quartic)
    high = mode + _reach(square + 6 * quartic * mode.square(), quartic)
    # At a distance t below the mode the loss is t² (a + 2λ m² + λ (t − 2m)²), m being the mode.
    steep = (MAX_FALL / (square + 2 * quartic * mode.square()).clamp_min(0)).sqrt()
    low = torch.maximum(-high, mode - steep)
    if square >= 0:
        low = torch.maximum(low, mode - _reach(torch.full_like(mode, square), quartic / 3))
    step = (high - low) / (NODES - 1)
    total, moment = torch.zeros_like(peak), torch.zeros_like(peak)
    for k in range(NODES):
        phi = low + k * step
        mass = (log_density(phi, field, square, quartic) - peak).exp()
        total, moment = total + mass, moment + mass * phi
    return peak + (total * step).log(), sign * moment / total


def _mode(field: Tensor, square: float, quartic: Tensor) -> Tensor:
    """The greatest root of h = 2aφ + 4λφ³, by Newton's method from above, where it is convex."""
    cubic = (field / (4 * quartic)).nan_to_num(math.inf).pow(1 / 3)
    if square > 0:
        mode = torch.minimum(cubic, field / (2 * square))
    else:
        mode = cubic + (-square / (2 * quartic)).sqrt()
    for _ in range(NEWTON_STEPS):
        slope = (2 * square + 12 * quartic * mode.square()).clamp_min(1e-30)
        mode = mode - (mode * (2 * square + 4 * quartic * mode.square()) - field) / slope
    return mode


def _reach(square: Tensor, quartic: Tensor) -> Tensor:
    """The distance t at which a t² + λ t⁴ reaches the fall beyond which mass is neglected."""
    root = (square.square() + 4 * MAX_FALL * quartic).sqrt()
    return (2 * MAX_FALL / (square + root)).sqrt()


def _below(field: Tensor, square: float, quartic: Tensor) -> Tensor:
    """Close below the best a + 2λc of :func:`draw`."""
    alone = (square + (square**2 + 4 * quartic).sqrt()) / 2  # where h = 0
    strong = quartic * field.square() / 2
    if square >= 0:
        return torch.maximum(alone, strong.pow(1 / 3))
    return torch.maximum(
        alone, torch.minimum((strong / 2).pow(1 / 3), (strong / (-2 * square)).sqrt())
    )


def draw(
    field: Float[Tensor, "*shape"], square: float, quartic: Tensor
) -> Float[Tensor, "*shape"]:
    """Exact draws, by rejection from a normal distribution.

    As λ(φ² − c)² ≥ 0, the density is nowhere above that of a normal density with a + 2λc for a;
    the best c is the mean of φ² under that normal distribution.

    Raises:
        ValueError: λ is negative or nan, 0 where a is not positive, or h is not finite.
    """
    h = field.detach().double().flatten()
    lam = quartic.detach().double().expand_as(field).flatten()
    wrong = ~(h.isfinite() & lam.isfinite() & ((lam > 0) | ((lam == 0) & (square > 0))))
    if wrong.any():
        raise ValueError(
            "quartic must be positive, or 0 where square is positive, in a finite field; got "
            f"quartic={float(lam[wrong][0]):g}, square={square:g} and "
            f"field={float(h[wrong][0]):g}."
        )
    curved = _below(h, square, lam)
    for _ in range(NEWTON_STEPS):  # what is to vanish is concave and rises
        excess = curved - square - lam / curved - lam * h.square() / (2 * curved.square())
        slope = 1 + lam / curved.square() + lam * h.square() / curved.pow(3)
        curved = curved - excess / slope
    c = h.square() / (4 * curved.square()) + 1 / (2 * curved)
    curved = square + 2 * lam * c
    drawn, left = torch.empty_like(h), torch.arange(len(h), device=h.device)
    for _ in range(MAX_TRIES):
        width = 1 / (2 * curved[left]).sqrt()
        phi = h[left] / (2 * curved[left]) + width * torch.randn_like(width)
        taken = torch.rand_like(phi) < (-lam[left] * (phi.square() - c[left]).square()).exp()
        drawn[left[taken]] = phi[taken]
        left = left[~taken]
        if not len(left):
            return drawn.to(field).reshape(field.shape)
    raise RuntimeError(
        f"quartic: no value was accepted in {MAX_TRIES:,} tries at square={square:g}, "
        f"quartic={float(lam[left[0]]):g} and field={float(h[left[0]]):g}."
    )

"""The law of one site of φ⁴: its normaliser by mpmath, its draws by their moments."""

import functools
import itertools
import math

import mpmath
import pytest
import torch

from rkl.sample.lattice import quartic

# a, λ: a normal law, the φ⁴ of the benchmark, wells, deep ones, and nearly a normal law
SHAPES = (5.0, 0.0), (0.0, 4.572), (-3.0, 1.0), (-10.0, 1.0), (2.0, 0.01)
FIELDS = 0.0, 0.01, -1.0, 7.3, -40.0
CASES = list(itertools.product(SHAPES, FIELDS))


@functools.cache
def moments(field, square, lam):
    """Log of the integral, the means of φ and φ², and the variances of both."""

    def exponent(phi):
        return phi * (field - phi * (square + lam * phi**2))

    peak = max(exponent(k / 100) for k in range(-1000, 1001))
    points = [k / 2 for k in range(-20, 21)]
    total, one, two, four = (
        mpmath.quad(lambda phi, n=n: phi**n * mpmath.exp(exponent(phi) - peak), points)
        for n in (0, 1, 2, 4)
    )
    mean, square_mean = one / total, two / total
    found = peak + mpmath.log(total), mean, square_mean, square_mean - mean**2
    return [float(it) for it in (*found, four / total - square_mean**2)]


@pytest.mark.parametrize(("shape", "field"), CASES)
def test_the_normaliser_and_its_slope_are_those_of_quadrature(shape, field):
    square, lam = shape
    log_z, mean, *_ = moments(field, square, lam)
    for dtype, within in ((torch.float64, 1e-6), (torch.float32, 1e-5)):
        h = torch.tensor([field], dtype=dtype, requires_grad=True)
        found = quartic.log_normaliser(h, square, torch.tensor(lam, dtype=dtype))
        (slope,) = torch.autograd.grad(found, h)
        assert found.item() == pytest.approx(log_z, rel=within, abs=within)
        assert slope.item() == pytest.approx(mean, rel=within, abs=within)
        assert torch.equal(slope, quartic.mean(h, square, torch.tensor(lam, dtype=dtype)))


def z_scores(x, shape, field):
    """How many standard errors the means of φ and φ² are from those of quadrature."""
    _, mean, square, variance, of_square = moments(field, *shape)
    root = math.sqrt(len(x))
    return [
        (x.mean().item() - mean) / math.sqrt(variance) * root,
        (x.square().mean().item() - square) / math.sqrt(of_square) * root,
    ]


def test_draws_have_the_moments_of_their_law():
    """50 z-scores below 4.5: a true law fails once in 3,000 runs. That of another λ must fail."""
    torch.manual_seed(0)
    worst, others = 0.0, []
    for shape, field in CASES:
        h = torch.full((20_000,), field, dtype=torch.float64)
        x = quartic.draw(h, shape[0], torch.tensor(shape[1], dtype=torch.float64))
        worst = max(worst, *map(abs, z_scores(x, shape, field)))
        others.append(max(map(abs, z_scores(x, (shape[0], 1.2 * shape[1] + 0.2), field))))
    assert worst < 4.5
    assert max(others) > 20


def test_each_draw_has_a_law_of_its_own():
    torch.manual_seed(1)
    h = torch.tensor([[-8.0], [8.0]]).expand(2, 4000)
    lam = torch.tensor([0.1, 10.0]).repeat(2000)
    x = quartic.draw(h, 1.0, lam)
    assert x.shape == h.shape
    assert x.dtype == h.dtype
    for sign, row in zip((-1, 1), x, strict=True):
        for k, each in enumerate((0.1, 10.0)):
            part = row[k::2]
            _, mean, _, variance, _ = moments(8.0, 1.0, each)
            assert abs(sign * part.mean().item() - mean) < 5 * math.sqrt(variance / 2000)

"""Overlap and distance of samples against closed forms and brute force."""

import math

import pytest
import torch

from rkl.metrics.overlap import earth_mover, histogram_overlap


def normal(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, generator=generator, dtype=torch.float64)


def test_the_overlap_of_shifted_normals_is_that_of_their_densities():
    a, b = normal(200_000), normal(200_000, 1) + 1
    found = histogram_overlap(a, b, low=-6.0, high=7.0, bins=130)
    assert abs(found.value - math.erfc(0.5 / math.sqrt(2))) < 4.5 * found.error + 0.003
    assert found.error < 0.003


def test_a_sample_overlaps_wholly_with_itself_and_not_with_what_is_elsewhere():
    a = normal(1_000)
    assert histogram_overlap(a, a, low=-9.0, high=9.0).value == 1
    assert histogram_overlap(a, a + 100, low=-9.0, high=109.0).value == 0
    assert histogram_overlap(a, a, low=50.0, high=60.0).value == 0


def test_the_distance_is_that_of_the_best_transport_of_equal_samples():
    a, b = normal(500), 2 * normal(500, 1) + 0.3
    brute = (a.sort().values - b.sort().values).abs().mean()
    torch.testing.assert_close(earth_mover(a, b).value, brute)
    torch.testing.assert_close(earth_mover(a, b.repeat(3)).value, brute)
    torch.testing.assert_close(earth_mover(3 * b, 3 * a).value, 3 * brute)
    assert earth_mover(a, a).value == 0


def test_the_error_of_a_distance_is_what_it_scatters():
    found = [earth_mover(normal(300, k), normal(400, 1_000 + k) + 1) for k in range(200)]
    values, errors = (torch.stack(it) for it in zip(*found, strict=True))
    assert errors.mean() == pytest.approx(values.std().item(), rel=0.2)  # 5 % for 200
    assert values.mean() == pytest.approx(1, abs=0.03)

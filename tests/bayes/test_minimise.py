import math

import pytest
import torch

from rkl.bayes.solve import unconstrained as module
from rkl.bayes.solve.unconstrained import minimise


def starts(count, k, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(count, k, generator=g, dtype=torch.float64)


def rosenbrock(t):
    return (100 * (t[1:] - t[:-1] ** 2) ** 2 + (1 - t[:-1]) ** 2).sum()


def ragged(t):
    """Least, with value 0, at (1, ..., 1); flat nowhere and with quite other scales by axis."""
    weight = 10.0 ** torch.arange(-2, len(t) - 2).double()
    return (weight * ((t - 1).exp() - t)).sum()


@pytest.mark.parametrize("k", [2, 5])
def test_a_valley_is_followed_to_its_end(k):
    found = minimise(rosenbrock, starts(4, k))
    assert found.converged
    assert found.decrement < 1e-20
    torch.testing.assert_close(found.point, torch.ones(k).double(), rtol=0, atol=1e-10)


def test_the_decrement_estimates_the_excess_of_the_value_where_the_search_is_cut_short(
    monkeypatch,
):
    monkeypatch.setattr(module, "STEPS", 1)
    found = minimise(lambda t: ragged(t), torch.full((1, 4), 1.3).double(), smooth=False)
    assert not found.converged
    # To second order; the curvature comes from differences over a tenth of the scale.
    assert found.decrement == pytest.approx(found.value, rel=0.15)


def test_the_inverse_is_that_of_the_second_derivatives():
    found = minimise(ragged, torch.zeros(1, 3).double())
    torch.testing.assert_close(
        found.inverse(torch.eye(3).double()), torch.tensor([100.0, 10.0, 1.0]).double().diag()
    )


def test_a_saddle_is_left():
    found = minimise(lambda t: (t[0] ** 2 - 1) ** 2 + t[1] ** 2, torch.zeros(1, 2).double())
    assert found.converged
    torch.testing.assert_close(found.point.abs(), torch.tensor([1.0, 0.0]).double())


def test_of_several_minima_the_least_is_found_and_those_that_reached_it_are_counted():
    def wells(t):
        return ((t[0] ** 2 - 1) ** 2 + 0.1 * t[0]).sum()

    found = minimise(wells, torch.tensor([[1.2], [0.9], [-1.1], [-0.5], [-2.0]]).double())
    assert found.point[0] == pytest.approx(-1.0125, abs=1e-3)
    assert found.agreeing == 3


def test_where_the_loss_is_infinite_or_undefined_the_search_turns_back():
    def barrier(t):
        if t[0] > 3:
            raise ValueError("out of range")
        return (t[0] - t[0].log()).sum()  # nan where negative

    found = minimise(barrier, torch.tensor([[2.9], [1e-3], [-1.0], [4.0]]).double())
    assert found.point.item() == pytest.approx(1.0, abs=1e-12)
    assert found.agreeing == 2
    with pytest.raises(ValueError, match="finite at one start; it is at none of 2"):
        minimise(barrier, torch.tensor([[-1.0], [4.0]]).double())


@pytest.mark.parametrize("count", [101, 100])
def test_kinks_are_no_hindrance_and_the_median_is_found(count):
    points = starts(count, 2, seed=3)

    def distance(t):
        return (points - t).abs().mean(0).sum()

    found = minimise(distance, torch.zeros(2, 2).double(), smooth=False)
    assert found.converged
    least = distance(points.median(0).values).item()
    assert found.value == pytest.approx(least, abs=1e-9)
    assert found.value - least <= 1e-10 + found.decrement


@pytest.mark.slow
def test_a_loss_that_falls_for_ever_is_not_said_to_have_a_minimum():
    found = minimise(lambda t: -t.sum(), torch.zeros(1, 2).double())
    assert not found.converged
    assert found.decrement == math.inf


def test_a_direction_in_which_nothing_changes_is_left_alone():
    found = minimise(lambda t: (t.sum() - 1).square(), torch.zeros(1, 2).double())
    assert found.converged
    torch.testing.assert_close(found.point, torch.full((2,), 0.5).double())
    along = torch.tensor([1.0, -1.0]).double()
    torch.testing.assert_close(found.inverse(along), torch.zeros(2).double(), atol=1e-12, rtol=0)


def test_many_coordinates_are_searched_without_their_hessian(monkeypatch):
    monkeypatch.setattr(module, "NEWTON", 3)
    found = minimise(ragged, torch.zeros(1, 4).double(), tolerance=1e-12)
    assert found.converged
    assert found.value < 1e-10
    torch.testing.assert_close(found.point, torch.ones(4).double(), rtol=0, atol=1e-4)

"""Coordinates that are positive, bounded, angles or on the line, in one density."""

import math
import re

import numpy as np
import pytest
import torch

from rkl.cli import main
from rkl.flows import MixedSplines
from rkl.flows.architectures.mixed import Bounded
from rkl.sample import evaluate_on_target, evidence, fit_to_target, markov_chain, smc
from rkl.sample.architecture import SPLINES, build_flow, default_architecture
from rkl.sample.lost_modes import LostMode
from rkl.sample.targets import Condition, Density, check_target, parse_target
from rkl.sample.targets.base import without_bounds
from rkl.sample.targets.domains import chart_of, parse_domain

DOMAIN = ("line", "positive", (0, 1), "circle")
MODULE = """
def product(x, c):
    normal = -(x[..., 0] - 1) ** 2 / 8
    gamma = 2 * x[..., 1].log() - x[..., 1]
    beta = x[..., 2].log() + 4 * (1 - x[..., 2]).log()
    return normal + gamma + beta + c[..., 0] * (x[..., 3] - 2).cos()
"""


def product(x, c):
    """N(1, 4), Gamma(3), Beta(2, 5) and von Mises(κ), not normalised: see ``log_z_of``."""
    scope = {}
    exec(MODULE, scope)
    return scope["product"](x, c)


def log_z_of(kappa):
    """log √(8π) + log Γ(3) + log B(2, 5) + log 2π I₀(κ), with B(2, 5) = 1/30."""
    bessel = torch.special.i0(torch.tensor(kappa, dtype=torch.float64)).log()
    return 0.5 * math.log(8 * math.pi) + math.log(2 / 30) + math.log(2 * math.pi) + bessel.item()


def coupled(x, _):
    """An angle θ and x > 0 with the rate 2 + cos θ: Z = ∫ Γ(3)/(2 + cos θ)³ dθ."""
    return 2 * x[..., 0].log() - (2 + x[..., 1].cos()) * x[..., 0]


ANGLES = torch.linspace(-math.pi, math.pi, 4_001, dtype=torch.float64)[:-1]
COUPLED = (2 / (2 + ANGLES.cos()) ** 3).mean().mul(2 * math.pi).log().item()  # exact to rounding


def target(domain=DOMAIN):
    return Density(product, (4,), domain, (Condition("kappa", 0.5, 3.0),))


# The map


@pytest.mark.parametrize(
    "domain", ["line", "positive", (2.0, 5.0), (-math.inf, 3.0), (-1.0, math.inf)]
)
def test_the_map_has_its_inverse_and_its_slope(domain):
    chart = chart_of((domain, "circle"), (2,))
    z = torch.linspace(-6, 6, 41, dtype=torch.float64)[:, None].repeat(1, 2).requires_grad_(True)
    x, log_slope = chart.to_bounded(z)
    (slope,) = torch.autograd.grad(x[:, 0].sum(), z)
    torch.testing.assert_close(log_slope, slope[:, 0].abs().log().double(), rtol=1e-9, atol=1e-9)
    assert chart.inside(x).all()
    back, again = chart.to_unbounded(x)
    # x keeps 16 digits of its size; exp(-6) of them are those of the distance to a bound.
    torch.testing.assert_close(back, z, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(again, log_slope, rtol=1e-9, atol=1e-9)


def test_no_x_lies_on_a_bound_and_none_beyond_has_density():
    chart = chart_of(((0.0, 1.0),), (1,))
    x, log_slope = chart.to_bounded(torch.tensor([[-79.0], [39.0], [-81.0], [41.0]]))
    assert ((x > 0) & (x < 1)).all()
    assert log_slope.isinf().tolist() == [False, False, True, True]
    assert chart.to_unbounded(torch.tensor([[-0.1], [0.0], [1.0]]))[1].tolist() == [-math.inf] * 3


def test_a_domain_is_read_and_a_wrong_one_is_refused_with_what_there_is():
    assert parse_domain((0, 1), 2) == ((0.0, 1.0),) * 2
    assert parse_domain(("circle", (-math.inf, math.inf)), 2) == ("circle", "line")
    assert Density(coupled, (2,), ("circle", "circle")).domain == "circle"
    for domain, said in (
        (("line",), r"one entry for each of 2 coordinates; got 1"),
        ("square", r"'positive' or a pair \(low, high\).* got 'square'"),
        (("line", "round"), r"got \('line', 'round'\)"),
        ((1, 0), r"low < high"),
    ):
        with pytest.raises(ValueError, match=said):
            Density(coupled, (2,), domain)


# Densities in the user's coordinates


def test_a_target_of_mixed_coordinates_is_checked_inside_of_its_domain():
    check_target(target())
    flat = without_bounds(target())
    assert flat.domain == ("line", "line", "line", "circle")
    check_target(flat)
    with pytest.raises(AssertionError, match="period 2 pi"):
        check_target(Density(lambda x, _: -x.square().sum(-1), (2,), ("line", "circle")))


@pytest.mark.parametrize("gradient", [True, False])
def test_evidence_is_over_the_coordinates_of_the_user(gradient):
    """Eight islands make a t of 7 degrees: 8 errors are exceeded once in 10,000."""
    function = coupled if gradient else lambda x, c: coupled(x.detach(), c)
    whole = Density(function, (2,), ("positive", "circle"))
    found = evidence(whole, particles=64, islands=8)
    assert abs(found.log_z.value[0] - COUPLED) < 8 * found.log_z.error[0]
    assert found.log_z.error[0] < 0.2
    assert (found.x[..., 0] > 0).all()
    assert (found.x[..., 1].abs() <= math.pi).all()


def test_a_walk_stays_inside_and_has_the_right_mean():
    """Gamma(3) has mean 3 and variance 3; a walk of 2,000 x 16 draws, some 50 of them apart."""
    half_line = Density(lambda x, _: (2 * x.log() - x).sum(-1), (1,), "positive")
    x = markov_chain(half_line, draws=2_000, chains=16, seed=0).x
    assert (x > 0).all()
    assert x.mean().item() == pytest.approx(3, abs=6 * (3 * 50 / 32_000) ** 0.5)


# Flows


def test_a_flow_of_mixed_coordinates_is_a_density_of_the_period():
    """Over a grid of 400 x 400 points in ± 12 and one period the integral is 1."""
    torch.manual_seed(0)
    law = MixedSplines(angles=(1,), transforms=2, hidden=(16,)).build((2,))()
    line = torch.linspace(-12, 12, 401)[:-1]
    x = torch.cartesian_prod(line, ANGLES[::10].float())
    integral = law.log_prob(x).exp().mean() * 24 * 2 * math.pi
    assert integral.item() == pytest.approx(1, abs=2e-3)
    turned = x + torch.tensor([0.0, 2 * math.pi])
    apart = (law.log_prob(turned) - law.log_prob(x)).abs()
    assert (apart < 1e-3).float().mean() > 0.99  # a knot of a spline may lie between the two
    drawn, log_q = law.rsample_and_log_prob((500,))
    torch.testing.assert_close(log_q, law.log_prob(drawn), rtol=1e-3, atol=1e-3)


def test_a_flow_of_bounded_coordinates_is_a_density_inside_of_them():
    torch.manual_seed(0)
    square = Density(lambda x, _: x.new_zeros(x.shape[:-1]), (2,), ((0, 1), (2, 4)))
    assert default_architecture(square) == SPLINES
    flow = build_flow(default_architecture(square), square, ())
    assert isinstance(flow, Bounded)
    side = (torch.arange(500) + 0.5) / 500
    x = torch.cartesian_prod(side, 2 + 2 * side)
    assert (flow().log_prob(x).exp().mean() * 2).item() == pytest.approx(1, abs=0.02)
    assert flow().log_prob(torch.tensor([[1.5, 3.0]])).tolist() == [-math.inf]
    drawn = flow().sample((1_000,))
    assert square.chart.inside(drawn).all()


def test_angles_that_are_not_those_of_the_target_are_refused():
    with pytest.raises(ValueError, match=r"angles must be those of .*, \(3,\); got \(0,\)"):
        build_flow(MixedSplines(angles=(0,)), target(), target().conditions)
    with pytest.raises(ValueError, match=r"MixedSplines is"):
        build_flow(SPLINES, target(), target().conditions)
    whole = build_flow(default_architecture(target()), target(), target().conditions)
    with pytest.raises(ValueError, match="flow must be an architecture for"):
        fit_to_target(whole.flow, target(), steps=1)


@pytest.mark.slow
def test_log_z_of_mixed_coordinates_is_that_of_the_closed_form():
    """Weights are independent: 5 errors of a normal distribution, and at most 0.01 nats."""
    fitted = fit_to_target(default_architecture(target()), target(), steps=300)
    at = torch.tensor([[0.5], [3.0]])
    found = evaluate_on_target(fitted.flow, target(), at, draws=1_000, reference=True)
    for row, kappa in enumerate((0.5, 3.0)):
        apart = abs(found.thermodynamics.log_z.value[row] - log_z_of(kappa))
        assert apart < 5 * found.thermodynamics.log_z.error[row] < 0.05
    assert found.passed
    assert set(found.averages) == {"log_density", "x0", "x1", "x2", "cos(x3)", "sin(x3)"}
    together = Density(coupled, (2,), ("positive", "circle"))
    flow = fit_to_target(default_architecture(together), together, steps=300).flow
    log_z = evaluate_on_target(flow, together, draws=1_000).thermodynamics.log_z
    assert abs(log_z.value[0] - COUPLED) < 5 * log_z.error[0] < 0.05


@pytest.mark.slow
def test_the_command_line_takes_a_domain_for_each_coordinate(tmp_path, monkeypatch, capsys):
    (tmp_path / "my_mixed.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    text = f"my_mixed:product(event_shape=(4,), domain={DOMAIN}, conditions={{'k': (1.0, 2.0)}})"
    assert parse_target(text).domain == DOMAIN
    words = ["fit", "--target", text, "--steps", "2", "--out", "RUN"]
    assert main([*words, "--flow", "mixed-splines(transforms=1, hidden=(8,))"]) == 0
    allow = ["--allow", "my_mixed:product"]
    assert (
        main(["sample", "RUN", "-n", "200", "--condition", "k=1.5", *allow, "--out", "x.npz"]) == 0
    )
    with np.load("x.npz") as file:
        x = file["x"].reshape(-1, 4)
    assert (x[:, 1] > 0).all()
    assert ((x[:, 2] > 0) & (x[:, 2] < 1)).all()
    x[7, 2] = 1.25
    np.savez("wrong.npz", x=x, condition=np.full((len(x), 1), 1.5))
    capsys.readouterr()
    assert main(["evaluate", "RUN", "--data", "wrong.npz", *allow]) == 2
    said = capsys.readouterr().err
    assert re.search(r"x2 of row 7 must lie in \(0, 1\); got 1.25", said)


def test_a_lost_mode_is_named_by_its_place_in_the_users_coordinates(monkeypatch):
    lost = LostMode(0.3, 0.01, torch.tensor([2.0, -1.0], dtype=torch.float64))
    monkeypatch.setattr(smc, "find_lost_mode", lambda *_: lost)

    def log_p(x, _):  # log-normal, and normal
        return -(x[..., 0].log().square() + x[..., 1].square()) / 2 - x[..., 0].log()

    found = evidence(Density(log_p, (2,), ("positive", "line")), particles=16, islands=4)
    ((*_, doubt),) = found.doubts
    assert "about x = (7.39, -1)" in doubt
    assert found.x[..., 0].min() > 0

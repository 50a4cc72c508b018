"""Other names for parameters and data: what moves, and what does not."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Gamma, Normal
from torch.distributions.transforms import (
    AbsTransform,
    AffineTransform,
    ComposeTransform,
    ExpTransform,
    PowerTransform,
    SigmoidTransform,
    SoftplusTransform,
    Transform,
)

from rkl.bayes import Intrinsic, bayes_act, check_invariance
from rkl.divergences import KL, Amari, Jeffreys, ReverseKL

ORDINARY = "normal(loc=mu, scale=sigma)"


def normals(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


DRAWS = {"mu": 1 + normals(2, 100) / 3, "sigma": (0.4 * normals(2, 100, seed=1)).exp()}
ESTIMATES = {}


def estimate(divergence):
    if divergence not in ESTIMATES:
        ESTIMATES[divergence] = bayes_act(DRAWS, ORDINARY, divergence)
    return ESTIMATES[divergence]


def log_posterior(theta):
    return -11 * theta.sigma.log() - (9 + 5 * (theta.mu - 1).square()) / theta.sigma.square()


def answers(table):
    return {row[0].partition(" (")[0]: row[1] for row in table.rows}


class Sinh(Transform):
    """A bijection of the line that bends both of its ends."""

    domain = codomain = torch.distributions.constraints.real
    bijective, sign = True, 1

    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def __eq__(self, other):
        return isinstance(other, Sinh) and self.scale == other.scale

    def _call(self, x):
        return (self.scale * x).sinh()

    def _inverse(self, y):
        return y.asinh() / self.scale

    def log_abs_det_jacobian(self, x, y):
        return (self.scale * x).cosh().log() + math.log(self.scale)


numbers = st.floats(0.3, 3.0)
signs = st.sampled_from([-1.0, 1.0])
of_the_line = st.one_of(
    st.builds(lambda s, x, y: AffineTransform(x, s * y), signs, numbers, numbers),
    st.builds(Sinh, numbers),
    st.builds(lambda x: ComposeTransform([Sinh(x), AffineTransform(1.0, -2.0)]), numbers),
)
of_what_is_positive = st.one_of(
    st.builds(lambda s, x: PowerTransform(torch.tensor(s * x).double()), signs, numbers),
    st.just(ExpTransform().inv),
    st.just(SoftplusTransform().inv),
    st.builds(lambda x: ComposeTransform([ExpTransform().inv, Sinh(x)]), numbers),
)


@pytest.mark.slow
@settings(max_examples=25)
@given(bijection=st.fixed_dictionaries({"mu": of_the_line, "sigma": of_what_is_positive}))
def test_the_reverse_act_stays_under_random_bijections_and_modes_and_intervals_do_not(bijection):
    moved = answers(check_invariance(estimate(ReverseKL()), bijection, log_posterior))
    assert moved["act"] < 1e-10
    assert moved["region of the act"] == 0
    power = bijection["sigma"]
    if not (isinstance(power, PowerTransform) and abs(power.exponent.item() - 1) < 0.05):
        assert moved["posterior mean"] > 1e-4
        assert moved["posterior mode"] > 1e-4
        assert moved["interval of highest density"] > 1e-4


@pytest.mark.parametrize("divergence", [KL(), Jeffreys(), Amari(0.3), Intrinsic()], ids=repr)
def test_every_act_stays(divergence):
    bijection = {"sigma": PowerTransform(torch.tensor(-2.0).double()), "mu": Sinh(1.0)}
    moved = answers(check_invariance(estimate(divergence), bijection))
    # the intrinsic loss has kinks, and its minimiser no second derivatives
    assert moved["act"] < (1e-4 if divergence == Intrinsic() else 1e-10)
    assert moved["region of the act"] <= (0.01 if divergence == Intrinsic() else 0)


@pytest.mark.slow
@settings(max_examples=12)
@given(transform=of_the_line)
def test_no_act_moves_with_a_bijection_of_the_data(transform):
    moved = answers(check_invariance(estimate(ReverseKL()), transform))
    assert moved["act"] < 1e-10
    assert moved["region of the act"] == 0
    # the second way sums over nodes of the new data, and knows nothing of the old
    assert moved["act, integrated over the new data"] < 1e-8


def test_a_bijection_of_positive_data_is_taken_off_too():
    rate = (0.3 * normals(2, 100)).exp()
    made = bayes_act({"rate": rate}, lambda theta: Gamma(2.5, theta.rate))
    for transform in (ExpTransform().inv, PowerTransform(torch.tensor(2.0).double())):
        assert answers(check_invariance(made, transform))["act"] < 1e-10


def test_an_estimate_that_moves_is_seen_to_move():
    # The toy: minimising squared error of the parameter, which is the posterior mean.
    moved = answers(check_invariance(estimate(ReverseKL()), {"sigma": ExpTransform().inv}))
    mean = DRAWS["sigma"].mean() - DRAWS["sigma"].log().mean().exp()
    assert moved["posterior mean"] == pytest.approx((mean / DRAWS["sigma"].std()).item(), rel=1e-6)


def test_the_mode_moves_by_what_calculus_says():
    made = estimate(ReverseKL())
    moved = answers(check_invariance(made, {"sigma": ExpTransform().inv}, log_posterior))
    # sigma^-11 exp(-9 / sigma²): the mode is at √(18/11), of log sigma at √(18/10)
    gap = (math.sqrt(18 / 10) - math.sqrt(18 / 11)) / DRAWS["sigma"].std().item()
    assert moved["posterior mode"] == pytest.approx(gap, rel=1e-6)


def test_weighted_draws_are_checked_as_weighted():
    weights = torch.rand(2, 100, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    made = bayes_act(DRAWS, ORDINARY, weights=weights)
    moved = answers(check_invariance(made, {"sigma": ExpTransform().inv}))
    assert moved["act"] < 1e-10
    assert moved["posterior mean"] > 1e-3


def test_a_batch_is_checked_member_by_member():
    mu = DRAWS["mu"][..., None] * torch.tensor([1.0, 2.0], dtype=torch.float64)
    made = bayes_act({"mu": mu, "sigma": DRAWS["sigma"]}, ORDINARY, KL())
    moved = answers(check_invariance(made, {"sigma": ExpTransform().inv, "mu": Sinh(0.5)}))
    assert moved["act"] < 1e-10
    assert moved["region of the act"] == 0


@pytest.mark.parametrize(
    ("bijection", "error", "words"),
    [
        ({"tau": ExpTransform()}, ValueError, "must name variables of mu, sigma; got 'tau'"),
        ({"sigma": AbsTransform()}, ValueError, "must be one; that of sigma"),
        ({"sigma": torch.log}, TypeError, "must hold transforms"),
        (torch.exp, TypeError, "must be a transform of torch"),
    ],
)
def test_what_is_no_bijection_is_refused(bijection, error, words):
    with pytest.raises(error, match=words):
        check_invariance(estimate(ReverseKL()), bijection)


def test_sigmoid_is_a_bijection_of_the_data_like_any_other():
    table = check_invariance(estimate(ReverseKL()), SigmoidTransform())
    assert "of the data" not in table.title
    assert "the data by SigmoidTransform()" in table.title
    made = bayes_act(DRAWS, lambda theta: Normal(theta.mu, theta.sigma))
    assert answers(check_invariance(made, SigmoidTransform()))["act"] < 1e-10

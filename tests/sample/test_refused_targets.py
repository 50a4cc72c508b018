"""Values of conditions, log-densities and flows that no fit or chain can use are refused."""

import math
import warnings

import numpy as np
import pytest
import torch
from torch.distributions import Independent, Normal

from rkl.flows import NSF, CircularSplines, Coupling
from rkl.sample import (
    CheckerboardRealNVP,
    CoarseToFine,
    CoarseToFineField,
    evaluate_on_target,
    fit_to_target,
    independent_metropolis,
    judge_coverage,
    markov_chain,
)
from rkl.sample.architecture import build_flow, default_architecture
from rkl.sample.domain import check_architecture
from rkl.sample.fit import _Conditions
from rkl.sample.lattice import circle, quartic
from rkl.sample.observables import observe, turn_invariant
from rkl.sample.run import read_draws
from rkl.sample.settings import EvaluateSettings, parse_ranges
from rkl.sample.targets import (
    XY,
    Condition,
    Density,
    MoG8,
    Phi4,
    Rings,
    check_target,
    parse_target,
)

FIELD = 0.5


def in_a_field(x, condition):
    theta = x.unflatten(-1, (2, 2))
    bonds = (theta - theta.roll(1, -1)).cos() + (theta - theta.roll(1, -2)).cos()
    return (bonds + FIELD * theta.cos()).sum((-1, -2)) / condition[..., 0]


def differences(x, condition):
    return 2 * (x - x.roll(1, -1)).cos().sum(-1)


ROTORS = Density(in_a_field, (4,), "circle", (Condition("T", 0.5, 2.0),))
RING = Density(differences, (4,), "circle")


@pytest.mark.parametrize("value", [0.0, -0.5, math.nan, math.inf])
@pytest.mark.parametrize("target", [XY(side=2), Phi4(side=2), MoG8(), Rings(), ROTORS], ids=repr)
def test_a_condition_at_which_there_is_no_density_is_refused_by_every_verb(target, value):
    condition = torch.tensor([value])
    law = Independent(Normal(torch.zeros(target.event_shape), 1.0), 1)
    expected = f"condition: {target.conditions[0].name} must be above 0 for "
    for verb in (
        lambda: independent_metropolis(target, law, condition, draws=10),
        lambda: judge_coverage(target, law, condition),
        lambda: markov_chain(target, condition, draws=10),
        lambda: evaluate_on_target(NSF().build((2,)), target, condition[None]),
        lambda: fit_to_target(NSF(), target, condition[None], steps=1),
    ):
        with pytest.raises(ValueError, match=expected):
            verb()


def test_ranges_beyond_the_limit_of_a_condition_are_refused_and_its_limit_may_be_allowed():
    for text, target in (("T=0:2", XY(side=2)), ("T=-1", ROTORS), ("lambda=0:1", Phi4(side=2))):
        with pytest.raises(ValueError, match="must be above 0"):
            parse_ranges(text, target)
    massive = Phi4(side=2, mass_squared=1.0)
    assert parse_ranges("lambda=0:1", massive)[0].low == 0
    with pytest.raises(ValueError, match="at least 0"):
        parse_ranges("lambda=-1:1", massive)
    with pytest.raises(ValueError, match="T must be above 0"):
        Density(in_a_field, (4,), "circle", (Condition("T", 0.0, 2.0),))
    with pytest.raises(ValueError, match="T is given twice"):
        parse_ranges("T=0.9,T=1.0", XY(side=2))


def test_training_stays_within_the_range_of_a_condition_and_sees_its_ends():
    target = XY(side=2)
    torch.manual_seed(0)
    values = torch.cat([_Conditions(target, None, 32).draw() for _ in range(200)])
    assert values.min() == target.conditions[0].low
    assert values.max() == target.conditions[0].high


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_rejection_samplers_refuse_what_they_would_never_accept(value):
    with pytest.raises(ValueError, match="concentrations are no finite numbers"):
        circle.von_mises(torch.tensor([1.0, value]))
    with pytest.raises(ValueError, match="quartic must be positive"):
        quartic.draw(torch.zeros(2), 1.0, torch.tensor([1.0, value]))
    with pytest.raises(ValueError, match="quartic must be positive"):
        quartic.draw(torch.zeros(1), 0.0, torch.zeros(1))


@pytest.mark.parametrize("kappa", [1e4, 1e12, 1e20, 1e30])
def test_von_mises_ends_at_any_concentration_and_is_normal_at_high_ones(kappa):
    """The variance is 1/κ there; 40,000 draws have it to 0.7 %, 5 errors are allowed."""
    torch.manual_seed(0)
    drawn = circle.von_mises(torch.full((40_000,), kappa, dtype=torch.float64))
    assert drawn.square().mean().item() * kappa == pytest.approx(1, rel=5 * 0.0071)


def test_flows_of_the_line_are_refused_for_angles_and_reversed():
    for architecture in (
        NSF(),
        Coupling(),
        CoarseToFineField(),
        CheckerboardRealNVP(circle=False),
    ):
        with pytest.raises(ValueError, match="flow must be one of angles"):
            check_architecture(architecture, XY(side=2))
    for architecture in (CoarseToFine(), CheckerboardRealNVP()):
        with pytest.raises(ValueError, match="flow must be one of the line"):
            check_architecture(architecture, Phi4(side=2))


@pytest.mark.filterwarnings("ignore:.* they are no result")
def test_a_built_flow_or_a_distribution_of_the_line_is_refused_for_angles():
    for proposal in (NSF().build((4,)), Independent(Normal(torch.zeros(4), 1.0), 1)):
        with pytest.raises(ValueError, match="density changes as an angle .* turns by 2π"):
            independent_metropolis(RING, proposal, draws=10)
    with pytest.raises(ValueError, match="density changes as an angle"):
        fit_to_target(NSF().build((4,)), RING, steps=1)
    flow = CheckerboardRealNVP(filters=4).build((4,))
    assert independent_metropolis(RING, flow, draws=5).x.abs().max() <= math.pi


def test_a_target_in_a_field_is_trained_on_itself_and_not_on_one_angle_held():
    """The effective share along the path is that of the flow's own draws."""
    flow = CoarseToFine(integrate="none", width=4).build((4,), 1)
    law, condition = flow(torch.tensor([0.5])), torch.tensor([0.5])
    torch.manual_seed(0)
    with torch.no_grad():
        path = law.path_log_ratio(ROTORS.log_prob, (4_000,))
        x, log_q = law.sample_and_log_prob((4_000,))
    own = ROTORS.log_prob(x, condition.expand(4_000, 1)) - log_q
    share, other = (1 / it.softmax(0).square().sum() / 4_000 for it in (path, own))
    assert other < 0.5
    assert abs(share - other) < 0.05  # some 4 errors


def test_winding_sectors_are_the_same_in_every_precision_and_after_a_turn():
    torch.manual_seed(0)
    target = XY(side=4)
    walk = markov_chain(target, torch.tensor([1.5]), draws=20, chains=200, every=3)
    assert walk.x is not None
    x = walk.x.flatten(0, 1)
    sectors = target.sector(x)
    assert ((2 * target.winding(x)).remainder(2) == 1).any()  # halves, which were rounded by noise
    assert (sectors == target.sector(x.double())).all()
    assert (sectors == target.sector(x + 1)).all()
    assert (sectors == -target.sector(-x)).all()
    column = 2 * math.pi / 4 * torch.arange(4.0)
    assert target.sector(column.repeat(4)).tolist() == [1, 0]


def test_draws_of_a_target_without_conditions_are_read_from_any_file(tmp_path):
    x = np.random.default_rng(0).normal(size=(10, 2)).astype(np.float32)
    target = Density(lambda x, _: -x.square().sum(-1), (2,))
    np.save(tmp_path / "x.npy", x)
    np.savez(tmp_path / "x.npz", x=x)
    np.savez(tmp_path / "chains.npz", x=x.reshape(2, 5, 2), condition=np.zeros(0))
    for name in ("x.npy", "x.npz", "chains.npz"):
        rows, condition = read_draws(tmp_path / name, target)
        assert (rows.numpy() == x).all()
        assert condition.shape == (10, 0)


LOG_PROBS = {
    "no gradient": lambda x, _: torch.from_numpy(-x.detach().numpy().sum(-1)),
    "has no gradient": lambda x, _: torch.from_numpy(-x.numpy().sum(-1)),
    r"one number for each x, \[64\] .* got \[64, 1\]": lambda x, _: -x.sum(-1, keepdim=True),
    r"one number for each x.* got \[\]": lambda x, _: -x.square().sum(),
    "mixes the rows of a batch": lambda x, _: -x.square().sum(-1) - x.mean(),
    "floating-point numbers; got torch.int64": lambda x, _: x.sum(-1).long(),
    "must return a tensor; got a float": lambda x, _: 3.0,
    "is nan at": lambda x, _: x.log().sum(-1),
    "fails for x .* size mismatch": lambda x, _: x @ torch.ones(7),
}


@pytest.mark.parametrize("told", LOG_PROBS)
def test_a_log_density_that_no_fit_can_use_is_refused_before_the_fit(told):
    target = Density(LOG_PROBS[told], (12,))
    with pytest.raises((ValueError, TypeError), match=f"target: log_prob of .*{told}"):
        fit_to_target(Coupling(transforms=1, hidden=(4,)), target, steps=1)


@pytest.mark.parametrize("coordinates", [2, 12])
def test_a_log_density_in_double_precision_is_fitted(coordinates):
    mean = torch.ones(coordinates, dtype=torch.float64)
    target = Density(lambda x, _: -(x - mean).square().sum(-1), (coordinates,))
    architecture = Coupling(transforms=1, hidden=(4,))
    assert fit_to_target(architecture, target, steps=2, batch=64, strata=2).training.steps == 2


def test_check_target_says_that_a_gradient_is_missing():
    with pytest.raises(AssertionError, match="has no gradient"):
        check_target(Density(lambda x, _: x.detach().sum(-1), (2,)))


def test_settings_of_a_function_that_cannot_be_read_are_refused_in_words():
    for text, told in (
        ("textwrap:wrap", "say the shape of its x"),
        ("textwrap:wrap(event_shape=(2,), conditions={'T': 0.5})", "names to ranges"),
        ("textwrap:wrap(event_shape=(2,), conditions={'T': (1.0, 0.3)})", "from low to high"),
    ):
        with pytest.raises(ValueError, match=told):
            parse_target(text)


def test_angles_are_measured_by_what_a_common_turn_leaves_if_it_leaves_the_density():
    condition = torch.tensor([[1.0]])
    assert turn_invariant(XY(side=2), condition)
    assert turn_invariant(RING, torch.zeros(1, 0))
    assert not turn_invariant(ROTORS, condition)
    x = torch.tensor([[0.1, 0.4, 1.0, 2.0]])
    assert list(observe(RING, x, torch.zeros(1, 0))) == [
        "log_density",
        "cos(x0 - x1)",
        "cos(x0 - x2)",
        "cos(x0 - x3)",
    ]
    measured = observe(ROTORS, x, condition)
    assert measured["sin(x1)"].item() == pytest.approx(math.sin(0.4))


@pytest.mark.parametrize("coupling", [0.0, 0.5])
def test_angles_of_a_density_in_single_precision_are_measured(coupling):
    """A matrix in single precision takes no events in double precision."""
    weights = torch.tensor([[1.0, 0.3, 0.0], [0.3, 1.0, 0.2], [0.0, 0.2, 1.0]])

    def log_p(x, condition):
        field = (x.cos() @ weights * x.cos() + x.sin() @ weights * x.sin()).sum(-1)
        return (field + coupling * x[..., 0].cos()) / condition[..., 0]

    target = Density(log_p, (3,), "circle", (Condition("T", 0.5, 2.0),))
    condition = torch.tensor([[1.0]])
    assert turn_invariant(target, condition) == (coupling == 0)
    assert default_architecture(target).relative == (coupling == 0)
    flow = build_flow(CircularSplines(hidden=(8,)), target, target.conditions)
    measured = evaluate_on_target(flow, target, condition, draws=20, chains=2).to_dict()
    assert "cos(x0 - x1)" in str(measured) or coupling


def test_so_few_draws_that_chains_cannot_be_judged_are_refused_before_any_is_made():
    flow = build_flow(CircularSplines(hidden=(8,)), RING, ())
    with pytest.raises(ValueError, match="draws must be at least 4; got 3"):
        evaluate_on_target(flow, RING, draws=3)
    with pytest.raises(ValueError, match="draws must be at least 4; got 3"):
        EvaluateSettings(draws=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of chains so short that one may stand still
        measured = evaluate_on_target(flow, RING, draws=4, chains=2)
    assert measured.to_dict()["passed"] is not True


def test_errors_name_the_function_of_the_user(tmp_path, monkeypatch):
    (tmp_path / "my_names.py").write_text(
        "def log_prob(x, condition):\n    return -x.square().sum(-1)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for settings, said in (
        ("", "say the shape of its x"),
        ("(event_shape=2)", "event_shape must be a tuple"),
        ("(event_shape=(2,), conditions={'T': 0.5})", "conditions must map names to ranges"),
        ("(event_shape=(2,), condition={'T': (0.3, 1.0)})", "has no setting 'condition'"),
    ):
        with pytest.raises(ValueError, match=said) as raised:
            parse_target(f"my_names:log_prob{settings}")
        assert "my_names:log_prob" in str(raised.value)
        assert "target_by_module" not in str(raised.value)
        assert "own" not in str(raised.value).split()


def test_a_half_line_in_many_coordinates_is_refused_with_the_domain_to_say():
    """Up to 8 coordinates particles lead the flow there, and such a density is fitted."""

    def log_prob(x, condition):
        inside = (x > 0).all(-1)
        return torch.where(inside, -x.sum(-1), -math.inf)

    with pytest.raises(ValueError, match=r"is -inf at 64 of 64 x .* domain='positive'"):
        fit_to_target(Coupling(), Density(log_prob, (12,)), steps=1)
    whole = Density(lambda x, _: -x.sum(-1), (12,), "positive")
    fit_to_target(Coupling(), whole, steps=1)


def test_draws_of_a_target_without_conditions_are_fitted():
    target = Density(lambda x, _: -x.square().sum(-1) / 2, (2,))
    rows = torch.randn(300, 2), torch.empty(300, 0)
    fitted = fit_to_target(Coupling(2, (8,)), target, objective="fkl-rkl", data=rows, steps=2)
    assert "nll" in fitted.training.history[-1]

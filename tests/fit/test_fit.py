"""Fits reach what is known of their problem, and end no lower than maximum likelihood."""

import dataclasses
import math

import pytest
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

import rkl
from rkl.fit import Method, fit_to_samples
from rkl.fit.guard import anneal, guard_divergence, slope_of
from rkl.flows import MAF, Coupling, Critic, draw
from rkl.runs import Run

ANGLES = torch.arange(8) * math.pi / 4
RING = MixtureSameFamily(
    Categorical(torch.ones(8)),
    Independent(Normal(2 * torch.stack([ANGLES.cos(), ANGLES.sin()], -1), 0.2), 1),
)
SMALL = Coupling(transforms=4, hidden=(16, 16))


def ring(rows=6000, seed=0):
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return RING.sample((rows,))


def alpha(flow, lam, draws=20_000):
    """The exact precision at slope λ of a flow against the ring."""
    with torch.random.fork_rng([]):
        torch.manual_seed(99)
        value, log_q = draw(flow(), (draws,))
    log_ratio = RING.log_prob(value) - log_q
    return (log_ratio + math.log(lam)).clamp(max=0).exp().mean().item()


def test_the_log_density_of_a_fit_is_that_of_all_rows_held_out():
    fitted = fit_to_samples(Coupling(1, (4,)), ring(400), steps=2, method=Method(draws=16))
    expected = fitted.flow().log_prob(fitted.held_out.values).detach().double()
    assert len(expected) == 40
    assert fitted.log_density.value.item() == pytest.approx(expected.mean().item(), abs=1e-6)
    error = expected.std() / math.sqrt(40)
    assert fitted.log_density.error.item() == pytest.approx(error.item(), rel=1e-6)


def test_maximum_likelihood_finds_a_normal_law_in_the_users_units():
    torch.manual_seed(0)
    law = Normal(torch.tensor([100.0, -0.01]), torch.tensor([5.0, 0.001]))
    fitted = fit_to_samples(Coupling(2, (8,)), law.sample((4000,)), steps=150)
    value = law.sample((2000,))
    kl = (law.log_prob(value).sum(-1) - fitted.flow().log_prob(value)).mean().item()
    assert 0 <= kl + 0.01 < 0.03  # 4 parameters of 4,000 rows cost 0.0005 nats
    assert fitted.history[-1]["held_out"] == pytest.approx(-law.entropy().sum().item(), abs=0.15)
    assert fitted.critic is None


def test_classes_condition_the_flow():
    torch.manual_seed(0)
    labels = torch.arange(2000) % 2
    rows = torch.randn(2000, 2) + 6.0 * labels[:, None]
    fitted = fit_to_samples(
        Coupling(4, (16,)),
        rows,
        rkl.PrecisionHalf(lam=3.0),
        labels=labels,
        steps=300,
        method=Method(batch=128),
    )
    assert fitted.classes == ("0", "1")
    drawn, _ = draw(fitted.flow(torch.eye(2)), (500,))
    torch.testing.assert_close(
        drawn.mean(0), torch.tensor([[0.0, 0.0], [6.0, 6.0]]), atol=0.5, rtol=0
    )
    assert fitted.critic(drawn, torch.eye(2)).shape == (500, 2)


CASES = {
    "precision half": (rkl.PrecisionHalf(lam=10.0), None, False),
    "recall half, exact": (rkl.RecallHalf(lam=0.3), None, True),
    "PR, draws": (rkl.PrecisionRecall(lam=10.0), None, False),
    "PR, path": (rkl.PrecisionRecall(lam=10.0), "path", False),
    "PR, both, exact": (rkl.PrecisionRecall(lam=10.0), "both", True),
    "reverse KL, path, exact": (rkl.ReverseKL(), "path", True),
}


def judged(divergence, estimator, exact, steps, seed, batch=512):
    """α(λ) of the fit and of the maximum likelihood it started from: the same first steps."""
    lam = slope_of(divergence)
    how = {"steps": steps, "seed": seed, "log_prob": RING.log_prob if exact else None}
    starts = []

    from rkl.fit import guard

    original = guard.Guard.score

    def score(self, moment, condition, count):
        if not self.begun:
            starts.append((self.flow, [it.detach().clone() for it in self.flow.parameters()]))
        return original(self, moment, condition, count)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(guard.Guard, "score", score)
        fitted = fit_to_samples(
            SMALL, ring(seed=seed), divergence, method=Method(estimator=estimator), **how
        )
    end = alpha(fitted.flow, lam)
    flow, parameters = starts[0]
    with torch.no_grad():
        for parameter, value in zip(flow.parameters(), parameters, strict=True):
            parameter.copy_(value)
    return alpha(fitted.flow, lam), end


@pytest.mark.parametrize("case", ["precision half", "PR, both, exact"])
def test_a_short_fit_does_not_end_below_its_start(case):
    start, end = judged(*CASES[case], steps=300, seed=0, batch=128)
    assert end > start - 0.01


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("case", CASES)
def test_no_estimator_ends_below_its_maximum_likelihood_start(case, seed):
    start, end = judged(*CASES[case], steps=2000, seed=seed, batch=256)
    assert end > start - 0.01


def test_an_interrupted_fit_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    from rkl.fit import fit

    def fitted(name, steps_left=math.inf, resume=False):
        run = Run.create(tmp_path / name, "fit", {}, seed=0, resume=resume)
        count, original = [0], fit._Problem.objective

        def objective(self, moment):
            count[0] += 1
            if count[0] > steps_left:
                raise KeyboardInterrupt
            return original(self, moment)

        with monkeypatch.context() as patch:
            patch.setattr(fit._Problem, "objective", objective)
            how = {"steps": 60, "every": 5, "run": run, "method": Method(batch=64, draws=128)}
            done = fit_to_samples(SMALL, ring(500), rkl.PrecisionHalf(lam=5.0), **how)
        rows = [{k: v for k, v in row.items() if k != "seconds"} for row in run.metrics]
        return done.flow.state_dict(), done.critic.state_dict(), rows

    whole = fitted("whole")
    for cut in (20, 47):
        with pytest.raises(KeyboardInterrupt):
            fitted(f"cut{cut}", steps_left=cut)
        again = fitted(f"cut{cut}", resume=True)
        for one, other in zip(whole[:2], again[:2], strict=True):
            assert all(torch.equal(one[name], other[name]) for name in one)
        assert whole[2] == again[2]


def test_a_critic_that_tells_everything_apart_is_said_to_have_collapsed():
    torch.manual_seed(0)
    far = torch.cat([torch.full((300, 1), -1.0), torch.ones(300, 1)]) * 100
    rows = far + 0.1 * torch.randn(600, 2)  # two needles, which an affine flow cannot meet
    method = Method(critic=Critic(updates=4), start=0.3)
    fitted = fit_to_samples(
        MAF(1, (4,)), rows, rkl.PrecisionRecall(lam=1.0), steps=400, method=method
    )
    assert "critic collapsed" in fitted.training.stopped
    assert fitted.flow().log_prob(rows).isfinite().all()


def test_without_the_guard_the_last_parameters_are_kept():
    """Steps so long that they lead away from where maximum likelihood was."""
    rows = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    how = {"steps": 40, "every": 10, "seed": 0}
    kept, last = (
        fit_to_samples(
            Coupling(2, (8,)), rows, rkl.ReverseKL(), method=Method(batch=64, guard=guard), **how
        )
        for guard in (True, False)
    )
    assert kept.training.best_step is not None
    assert last.training.best_step is None
    likely = fit_to_samples(Coupling(2, (8,)), rows, method=Method(batch=64, guard=False), **how)
    assert likely.training.best_step is None
    assert [it["step"] for it in last.history] == [it["step"] for it in kept.history]
    assert last.history[-1]["divergence"] == kept.history[-1]["divergence"]  # one and the same


def test_a_critic_is_trained_in_the_end_where_it_is_asked_for():
    fitted = fit_to_samples(SMALL, ring(500), steps=20, with_critic=True)
    assert fitted.critic(ring(5)).shape == (5,)


def test_the_slope_goes_from_one_to_its_value():
    both = 0.5 * rkl.KL() + 0.5 * rkl.RecallHalf(lam=0.01)
    assert slope_of(both) == 0.01
    assert anneal(both, 0.0) == 0.5 * rkl.KL() + 0.5 * rkl.RecallHalf(lam=1.0)
    assert anneal(rkl.PrecisionRecall(lam=9.0), 0.5) == rkl.PrecisionRecall(lam=3.0)
    assert anneal(rkl.ReverseKL(), 0.3) == rkl.ReverseKL()
    assert guard_divergence(rkl.PrecisionHalf(lam=4.0)) == rkl.PrecisionRecall(lam=4.0)
    assert guard_divergence(rkl.ReverseKL()) == rkl.ReverseKL()


@dataclasses.dataclass(frozen=True)
class _OfOnesOwn(rkl.FDivergence):
    """A divergence that rkl does not know, with a slope that it calls otherwise."""

    strictness: float = 16.0

    def integrand(self, logp, logq):
        return rkl.PrecisionHalf(self.strictness).integrand(logp, logq)


def test_a_divergence_of_ones_own_has_its_slope_annealed():
    assert anneal(_OfOnesOwn(), 0.5) == _OfOnesOwn(4.0)
    assert slope_of(rkl.KL() + _OfOnesOwn()) == 16.0
    assert guard_divergence(_OfOnesOwn()) == rkl.PrecisionRecall(lam=16.0)


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        ({"divergence": rkl.AKL()}, TypeError, "f-divergence"),
        ({"flow": 3}, TypeError, "an architecture or a module"),
        ({"data": torch.full((100, 2), math.nan)}, ValueError, "finite"),
        ({"steps": None}, ValueError, "one of steps and minutes"),
        ({"minutes": 1.0}, ValueError, "one of steps and minutes"),
    ],
    ids=["not an f-divergence", "no flow", "nan", "no budget", "two budgets"],
)
def test_what_cannot_be_fitted_is_refused(change, kind, said):
    settings = {"flow": SMALL, "data": ring(100), "divergence": rkl.KL(), "steps": 3} | change
    with pytest.raises(kind, match=said):
        fit_to_samples(
            settings.pop("flow"), settings.pop("data"), settings.pop("divergence"), **settings
        )


@pytest.mark.parametrize(
    "wrong", [{"estimator": "best"}, {"anchor": 1.0}, {"start": 0.0}, {"batch": 1}], ids=str
)
def test_methods_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
        Method(**wrong)

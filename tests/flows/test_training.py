"""The loop learns within its budget, keeps the best, and goes on after a stop to the same bits."""

import math
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from rkl.flows import training
from rkl.flows.training import (
    CHECKPOINT,
    Moment,
    goes_on,
    load_state,
    save_state,
    train,
)
from rkl.randomness import one_at_a_time
from rkl.runs import Run, signals


class Location(nn.Module):
    """A flow reduced to what the loop sees of it: parameters."""

    def __init__(self):
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(3))
        self.fixed = nn.Parameter(torch.ones(3), requires_grad=False)


class Counter:
    """Something beside the flow that has a state of its own."""

    def __init__(self):
        self.seen = torch.zeros(())

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]


def noisy(flow, counter=None):
    """A noisy quadratic around (1, 1, 1)."""

    def objective(moment):
        noise = torch.randn(3)
        if counter is not None:
            counter.seen = counter.seen + noise.sum()
        moment.log(noise=noise.sum(), progress=moment.progress)
        return (flow.mean - 1 - 0.1 * noise).square().sum()

    return objective


def test_the_average_of_the_parameters_is_what_remains():
    flow = Location()
    done = train(flow, noisy(flow), steps=600, lr=0.05, seed=1)
    assert done.steps == 600
    assert done.stopped is None
    torch.testing.assert_close(flow.mean.detach(), torch.ones(3), atol=0.03, rtol=0)
    assert torch.equal(flow.fixed, torch.ones(3))
    assert done.history[-1]["loss"] < done.history[0]["loss"]


def test_the_random_numbers_of_whoever_calls_are_left_alone():
    torch.manual_seed(3)
    expected = torch.randn(2)
    torch.manual_seed(3)
    flow = Location()
    train(flow, noisy(flow), steps=5)
    assert torch.equal(torch.randn(2), expected)


def test_two_trainings_with_one_seed_are_the_same_and_with_two_are_not():
    means = []
    for seed in (0, 0, 1):
        flow = Location()
        train(flow, noisy(flow), steps=30, seed=seed)
        means.append(flow.mean.detach().clone())
    assert torch.equal(means[0], means[1])
    assert not torch.equal(means[0], means[2])


class StoppedError(Exception):
    """Stands for whatever may interrupt a training."""


@pytest.mark.parametrize("at", [7, 20, 21, 39, 40])
def test_an_interrupted_training_goes_on_to_the_same_bits(tmp_path, at):
    def fitted(name, interrupted_at=None, resume=False):
        flow, counter = Location(), Counter()
        run = Run.create(tmp_path / name, "fit", {}, seed=0, resume=resume)
        inner = noisy(flow, counter)

        def objective(moment):
            if moment.step == interrupted_at:
                raise StoppedError
            return inner(moment)

        def watch(moment):
            return -(flow.mean - 0.5).square().sum().item() + 0.1 * torch.rand(()).item()

        how = {"also": {"counter": counter}, "run": run, "every": 10, "watch": watch}
        done = train(flow, objective, steps=45, lr=0.05, seed=5, **how)
        rows = [{k: v for k, v in row.items() if k != "seconds"} for row in run.metrics]
        return flow.mean.detach(), counter.seen, done.best, done.best_step, rows

    whole = fitted("whole")
    with pytest.raises(StoppedError):
        fitted("cut", interrupted_at=at)
    resumed = fitted("cut", resume=True)
    assert torch.equal(whole[0], resumed[0])
    assert torch.equal(whole[1], resumed[1])
    assert whole[2:] == resumed[2:]


@pytest.fixture
def trained(tmp_path):
    """Trains in a run: to so many steps, with a signal to this process or an error at one."""

    def fitted(name, steps, *, signalled_at=None, broken_at=None, resume=False):
        flow, counter = Location(), Counter()
        with Run.create(tmp_path / name, "fit", {}, seed=0, resume=resume) as run:
            inner = noisy(flow, counter)

            def objective(moment):
                if moment.step == signalled_at:
                    os.kill(os.getpid(), signal.SIGTERM)
                if moment.step == broken_at:
                    raise StoppedError
                return inner(moment)

            how = {"also": {"counter": counter}, "run": run, "every": 10}
            train(flow, objective, steps=steps, lr=0.05, seed=5, **how)
            rows = [{k: v for k, v in row.items() if k != "seconds"} for row in run.metrics]
            return [flow.mean.tolist(), counter.seen.tolist(), *rows]

    return fitted


def test_a_terminated_training_stops_behind_the_step_and_goes_on_to_the_same_bits(trained):
    whole = trained("whole", 45)
    with pytest.raises(signals.StoppedError) as stopped:
        trained("cut", 45, signalled_at=17)
    assert signals.exit_code(stopped.value) == 143
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    with pytest.raises(StoppedError):  # it goes on at step 18: nothing was lost
        trained("cut", 45, broken_at=18, resume=True)
    assert trained("cut", 45, resume=True) == whole


def test_a_finished_training_goes_on_under_a_larger_budget_to_the_same_bits(trained, tmp_path):
    first = trained("extended", 20)
    trained("cut", 20)
    extended = trained("extended", 45, resume=True)
    assert extended != first
    assert [row["step"] for row in extended[-5:]] == [10, 20, 30, 40, 45]
    with pytest.raises(StoppedError):
        trained("cut", 45, broken_at=33, resume=True)
    assert trained("cut", 45, resume=True) == extended
    with pytest.raises(ValueError, match=r"has done 45 steps, and can go on to no fewer; got 30"):
        goes_on(tmp_path / "cut", steps=30)


def test_a_finished_training_resumed_is_left_as_it_is(tmp_path):
    flow, run = Location(), Run.create(tmp_path / "run", "fit", {}, seed=0)
    train(flow, noisy(flow), steps=20, run=run)
    again = Location()
    done = train(again, noisy(again), steps=20, run=run)
    assert torch.equal(again.mean, flow.mean)
    assert (done.steps, len(done.history)) == (20, 1)


def test_the_best_scored_parameters_are_kept():
    flow = Location()
    distances = []

    def watch(moment):
        distances.append((flow.mean.detach() - 0.5).norm().item())
        return -distances[-1]

    done = train(flow, noisy(flow), steps=400, lr=0.05, every=10, watch=watch)
    assert done.best == -min(distances)
    assert done.best_step == 10 * (1 + distances.index(min(distances)))
    assert (flow.mean - 0.5).norm().item() == pytest.approx(min(distances), abs=1e-6)


def test_a_watch_may_stop_training_and_is_shown_the_average():
    flow, seen = Location(), []

    def watch(moment):
        seen.append(flow.mean.detach().clone())
        if moment.step == 30:
            moment.stop("enough")

    done = train(flow, noisy(flow), steps=1000, every=10, watch=watch)
    assert (done.steps, done.stopped) == (30, "enough")
    assert torch.equal(seen[-1], flow.mean)


def test_the_learning_rate_falls_along_a_cosine_of_the_budget():
    flow, path = Location(), []

    def objective(moment):
        path.append(flow.mean.detach()[0].item())
        return flow.mean.sum()  # Adam moves by the learning rate under a constant gradient

    train(flow, objective, steps=200, lr=0.01)
    moved = -torch.tensor(path).diff()
    expected = 0.005 * (1 + torch.cos(math.pi * torch.arange(199) / 200))
    torch.testing.assert_close(moved[20:], expected[20:], rtol=1e-3, atol=1e-6)


def test_a_budget_in_minutes_is_kept_and_known_to_the_objective(monkeypatch):
    clock = [100.0]  # it goes on by the work alone, however busy the machine
    monkeypatch.setattr(training.time, "perf_counter", lambda: clock[0])
    flow, seen = Location(), []
    inner = noisy(flow)

    def objective(moment):
        seen.append(moment.progress)
        clock[0] += 0.01
        return inner(moment)

    done = train(flow, objective, minutes=0.2 / 60)
    assert 0.2 <= done.seconds < 0.25
    assert seen == sorted(seen)
    assert 0.8 < seen[-1] < 1


def test_the_gradient_is_clipped_to_its_norm():
    flow = Location()
    flow.mean.data += 1
    seen = []

    def objective(moment):
        return 1e4 * flow.mean.square().sum()

    def watch(moment):
        seen.append(flow.mean.grad.norm().item())

    train(flow, objective, steps=3, clip=0.5, every=1, watch=watch)
    assert seen == pytest.approx([0.5] * 3)


def test_a_step_without_a_finite_gradient_is_skipped():
    flow = Location()
    inner = noisy(flow)
    done = train(
        flow,
        lambda moment: inner(moment) * (math.nan if moment.step % 3 == 1 else 1.0),
        steps=300,
        lr=0.05,
    )
    assert [row["skipped"] for row in done.history] == [33, 67, 100]
    assert flow.mean.isfinite().all()
    torch.testing.assert_close(flow.mean.detach(), torch.ones(3), atol=0.05, rtol=0)


def test_a_loss_that_stays_nan_stops_training_with_what_was_learnt():
    flow = Location()
    inner = noisy(flow)
    done = train(
        flow, lambda moment: inner(moment) * (math.nan if moment.step >= 50 else 1.0), steps=300
    )
    assert done.steps == 60
    assert "not finite" in done.stopped
    assert flow.mean.isfinite().all()


def test_a_loss_that_is_never_a_number_is_an_error():
    flow = Location()
    with pytest.raises(FloatingPointError, match="nothing could be learnt"):
        train(flow, lambda moment: flow.mean.sum() * math.nan, steps=300)


def test_logged_numbers_are_averaged_between_rows():
    moment = Moment()
    for value in (1, torch.tensor(2.0, requires_grad=True), 6.0):
        moment.log(a=value)
    assert moment.flush() == {"a": 3.0}
    assert moment.flush() == {}


def test_a_state_comes_back_as_it_was(tmp_path):
    state = {"a": [torch.arange(3), None, {"b": 0.1}], "c": {1: torch.eye(2, dtype=torch.float64)}}
    save_state(tmp_path / "state.safetensors", state)
    found = load_state(tmp_path / "state.safetensors")
    assert torch.equal(found["a"][0], torch.arange(3))
    assert found["a"][1:] == [None, {"b": 0.1}]
    assert torch.equal(found["c"][1], torch.eye(2, dtype=torch.float64))


def test_a_corrupt_checkpoint_is_refused_by_name(tmp_path):
    flow, run = Location(), Run.create(tmp_path / "run", "fit", {}, seed=0)
    (run.path / CHECKPOINT).write_bytes(b"not safetensors at all")
    with pytest.raises(ValueError, match="holds no state"):
        train(flow, noisy(flow), steps=2, run=run)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "one of steps and minutes"),
        ({"steps": 3, "minutes": 1.0}, "one of steps and minutes"),
        ({"steps": 0}, "steps must be at least 1; got 0"),
        ({"minutes": -1.0}, "minutes must be"),
        ({"steps": 1, "ema": 1.0}, "ema must be"),
        ({"steps": 1, "lr": math.nan}, "lr must be"),
    ],
    ids=str,
)
def test_a_budget_that_makes_no_sense_is_refused(settings, said):
    flow = Location()
    with pytest.raises(ValueError, match=said):
        train(flow, noisy(flow), **settings)


def test_a_flow_without_parameters_is_refused():
    with pytest.raises(ValueError, match="no parameters"):
        train(nn.Identity(), lambda moment: torch.zeros(()), steps=1)


def noisy_mean(seed):
    """The parameters after a training whose loss draws random numbers."""
    flow = Location()

    def objective(moment):
        time.sleep(1e-4)  # let the other thread come in
        return (flow.mean - torch.randn(3)).square().sum()

    train(flow, objective, steps=50, seed=seed)
    return flow.mean.tolist()


@pytest.mark.filterwarnings("ignore:another fit is running")
def test_two_fits_in_two_threads_are_those_of_their_seeds():
    alone = [noisy_mean(seed) for seed in (0, 1)]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(noisy_mean, (0, 1))) == alone


def test_a_fit_that_waits_for_another_says_so():
    thread = threading.Thread(target=noisy_mean, args=(0,))

    def begin_while_another_runs():
        with one_at_a_time():
            thread.start()
            thread.join(0.3)
            assert thread.is_alive()
        thread.join()

    with pytest.warns(UserWarning, match="this one waits for it"):
        begin_while_another_runs()

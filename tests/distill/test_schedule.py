"""A divergence that moves during training: each step its own value, one compiled graph for all."""

import copy
import json

import jaxtyping
import material
import pytest
import torch

import rkl
from rkl.distill import DistillSettings, distill
from rkl.divergences.schedule import read_schedule

STEPS = {"max_steps": 5, "logging_steps": 1, "save_strategy": "no"}


def test_a_schedule_moves_in_a_straight_line_from_the_first_step_to_the_last():
    moving = 0.5 * rkl.TAID(0.7) + rkl.KL() + rkl.LKHybrid()
    schedule = read_schedule("taid.t: 0.2 -> 1.0; LKHybrid.eta: 3 -> 1", moving)
    assert schedule.at(0.0) == 0.5 * rkl.TAID(0.2) + rkl.KL() + rkl.LKHybrid(3.0)
    assert schedule.at(0.25) == 0.5 * rkl.TAID(0.4) + rkl.KL() + rkl.LKHybrid(2.5)
    assert schedule.at(1.0) == 0.5 * rkl.TAID(1.0) + rkl.KL() + rkl.LKHybrid(1.0)
    assert schedule.values(1.0) == {"taid.t": 1.0, "LKHybrid.eta": 1.0}
    assert read_schedule(None, moving).at(0.3) is moving


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("t: 0.2 -> 1.0", r"schedule must be as taid.t: 0.2 -> 1.0; got 't: 0.2 -> 1.0'"),
        ("taid.t: 0.2", "schedule must be as"),
        ("taid.t: 0.2 -> 1.0;", "schedule must be as .* got ''"),
        ("taid.t: 0.2 -> all", "must go from number to number; got 'all'"),
        ("akl.mu: 0.2 -> 0.5", r"schedule names 'akl', which is no term of TAID\(t=0.5\)"),
        (
            "taid.beta: 0.2 -> 0.5",
            "'beta' of taid does not vary, only t may. Fields that may: akl",
        ),
        ("taid.t: 0 -> 1.0", "schedule: t must be finite, above 0, at most 1; got 0.0"),
        ("taid.t: 0.1 -> 1; taid.t: 1 -> 0.1", "schedule names taid.t twice"),
    ],
)
def test_a_schedule_that_cannot_be_followed_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        read_schedule(text, rkl.TAID())
    with pytest.raises(ValueError, match=message):
        DistillSettings(teacher="T", student="S", data="D", divergence="taid", schedule=text)


def test_a_field_of_two_terms_of_one_kind_is_refused():
    """Both would get the same values, so that nothing was left of the mixture."""
    mixed = 0.5 * rkl.AKL(0.3) + 0.5 * rkl.AKL(0.7) + rkl.TAID()
    with pytest.raises(ValueError, match=r"names 'akl', of which 0.5 \* AKL.* has 2 terms"):
        read_schedule("akl.mu: 0.2 -> 0.8", mixed)
    assert read_schedule("taid.t: 0.2 -> 1", mixed).at(1.0) == (
        0.5 * rkl.AKL(0.3) + 0.5 * rkl.AKL(0.7) + rkl.TAID(1.0)
    )


def test_a_field_that_is_compiled_in_is_refused():
    with pytest.raises(ValueError, match="'beta' of js does not vary, nothing may"):
        read_schedule("js.beta: 0.1 -> 0.9", rkl.JensenShannon())


def test_settings_from_before_there_were_two_schedules_mean_that_of_the_learning_rate():
    old = DistillSettings(teacher="T", student="S", data="D", schedule="constant")
    assert (old.schedule, old.learning_rate_schedule) == (None, "constant")


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_each_step_minimises_the_value_of_that_step_and_compiles_nothing_new(
    compiled, tiny_model, tiny_rows, tiny_trainer, monkeypatch
):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", compiled)  # it cannot be traced
    torch._dynamo.utils.counters.clear()
    teacher, student, rows = tiny_model(seed=1), tiny_model(seed=2), tiny_rows(8)
    trainer = tiny_trainer(
        student,
        teacher,
        rows,
        settings={"divergence": rkl.TAID()},
        schedule="taid.t: 0.2 -> 1.0",
        learning_rate=0.0,
        compiled=compiled,
        per_device_train_batch_size=8,
        **STEPS,
    )
    trainer.train()
    logged = [line for line in trainer.state.log_history if "loss" in line]
    assert [line["taid.t"] for line in logged] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    for line in logged:  # at a rate of 0 the student stays what it was
        fixed = tiny_trainer(
            copy.deepcopy(student),
            teacher,
            rows,
            settings={"divergence": rkl.TAID(line["taid.t"])},
            learning_rate=0.0,
            compiled=False,
            per_device_train_batch_size=8,
            **STEPS | {"max_steps": 1},
        )
        fixed.train()
        assert line["loss"] == pytest.approx(fixed.state.log_history[0]["loss"], rel=1e-4)
    if compiled:
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_run_evaluates_with_the_last_value_and_says_where_each_step_was(tmp_path):
    folder = tmp_path / "material"
    folder.mkdir()
    material.write(folder)
    settings = material.settings(
        folder, divergence="taid", schedule="taid.t: 0.5 -> 1.0", max_steps=3
    )
    assert settings.minimised == rkl.TAID(1.0)
    run = tmp_path / "run"
    distill(settings, run)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["taid.t"] for line in lines if "taid.t" in line] == [0.5, 0.75, 1.0]
    evaluated = [line["eval_loss"] for line in lines if "eval_loss" in line]
    plain = tmp_path / "plain"
    distill(material.settings(folder, divergence="kl", max_steps=3), plain)
    lines = [json.loads(line) for line in (plain / "metrics.jsonl").read_text().splitlines()]
    at_start = next(line["eval_loss"] for line in lines if "eval_loss" in line)
    assert evaluated[0] == pytest.approx(at_start, rel=1e-6)  # TAID at 1 is KL

"""NaN and infinity are worse than any number, and end a run before they reach the weights."""

import json
import math

import material
import pytest
import torch
from transformers import AutoModelForCausalLM, EarlyStoppingCallback, TrainerState

import rkl
from rkl.cli import main
from rkl.distill import DivergedError, Teacher, distill
from rkl.distill.selection import improves, rank
from rkl.runs import Run

NAN = math.nan


class _Spoilt(Teacher):
    """A teacher whose logits are replaced at some of the times that it is asked."""

    vocab = 40

    def __init__(self, value, spoilt=lambda asked: True):
        self.value, self.spoilt, self.asked = value, spoilt, 0

    def observe(self, inputs, predicting, *, vocab=None):
        logits = torch.linspace(0, 1, self.vocab).repeat(int(predicting.sum()), 1)
        if self.spoilt(self.asked):
            logits[:, 7] = self.value
        self.asked += 1
        return logits


def trained_on(tiny_trainer, student, teacher, rows, divergence=None, **changes):
    settings = {"divergence": divergence or rkl.KL(), "eval_dataset": rows[:2]}
    settings |= changes.pop("settings", {})
    how = {"max_steps": 4, "per_device_train_batch_size": 2, "logging_steps": 1}
    return tiny_trainer(student, teacher, rows, settings=settings, **how | changes)


def finite(model):
    return all(bool(it.isfinite().all()) for it in model.parameters())


def test_nan_is_worse_than_infinity_and_that_than_any_number():
    many = {"eval_loss": math.inf, "eval_infinite_tokens": 3, "eval_finite_loss": 0.1}
    few = {"eval_loss": math.inf, "eval_infinite_tokens": 2, "eval_finite_loss": 0.3}
    lower = few | {"eval_finite_loss": 0.2}
    everywhere = {"eval_loss": math.inf, "eval_infinite_tokens": 9}
    rows = [{"eval_loss": 0.0}, {"eval_loss": 9.0}, lower, few, many, everywhere]
    rows.append({"eval_loss": NAN, "eval_infinite_tokens": 1})
    assert sorted(reversed(rows), key=rank) == rows


def test_an_evaluation_is_compared_with_the_best_by_the_same_order():
    state = TrainerState()
    first = {"eval_loss": math.inf, "eval_infinite_tokens": 2, "eval_finite_loss": 0.5}
    assert improves(first, state)
    assert not improves({"eval_loss": NAN}, state)
    state.log_history, state.best_global_step = [first | {"step": 3}], 3
    assert improves(first | {"eval_infinite_tokens": 1, "eval_finite_loss": 0.9}, state)
    assert not improves(first | {"eval_infinite_tokens": 3, "eval_finite_loss": 0.1}, state)
    assert improves({"eval_loss": 5.0}, state)
    assert not improves({"eval_loss": NAN}, state)


@pytest.mark.parametrize("spoiled", ["student", "teacher"])
def test_an_evaluation_of_nan_weights_is_nan(spoiled, tiny_model, tiny_rows, tiny_trainer):
    models = {"student": tiny_model(seed=2), "teacher": tiny_model(seed=1)}
    trainer = trained_on(tiny_trainer, models["student"], models["teacher"], tiny_rows(4))
    with torch.no_grad():
        models[spoiled].transformer.h[0].mlp.c_fc.weight[0, 0] = NAN
    assert math.isnan(trainer.evaluate()["eval_loss"])


def test_an_evaluation_that_is_infinite_at_every_token_is_not_zero(
    tiny_model, tiny_rows, tiny_trainer
):
    student, divergence = tiny_model(seed=2), rkl.ReverseKL()
    trainer = trained_on(tiny_trainer, student, _Spoilt(-math.inf), tiny_rows(4), divergence)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == math.inf
    assert metrics["eval_infinite_tokens"] > 1
    assert "eval_finite_loss" not in metrics


@pytest.mark.parametrize("changes", [{}, {"max_grad_norm": 0.0}, {"bf16": True}], ids=repr)
def test_a_nan_teacher_stops_the_training_at_its_step_before_the_update(
    changes, tiny_model, tiny_rows, tiny_trainer
):
    student = tiny_model(seed=2)
    teacher = _Spoilt(NAN, lambda asked: asked == 2)
    trainer = trained_on(tiny_trainer, student, teacher, tiny_rows(8), **changes)
    place = r"KL\(\) is NaN at token \d+ of row 0 of the batch, \d+, the first of \d+ such tokens"
    with pytest.raises(DivergedError, match=rf"is NaN \({place}\) at step 3") as caught:
        trainer.train()
    assert caught.value.step == 3
    assert trainer.state.global_step == 2
    assert finite(student)


def test_a_gradient_that_is_not_finite_stops_the_training_before_the_update(
    tiny_model, tiny_rows, tiny_trainer
):
    student = tiny_model(seed=2)
    student.lm_head.weight.register_hook(lambda gradient: gradient * math.inf)
    trainer = trained_on(
        tiny_trainer, student, tiny_model(seed=1), tiny_rows(4), max_grad_norm=0.0
    )
    with pytest.raises(DivergedError, match="the gradient is NaN or infinite at step 1"):
        trainer.train()
    assert finite(student)


def test_the_best_model_is_loaded_where_the_training_diverged(
    tiny_model, tiny_rows, tiny_trainer, tmp_path
):
    student = tiny_model(seed=2)
    # One look at the training batch and one at the held-out one in each step: the third step.
    teacher = _Spoilt(NAN, lambda asked: asked == 4)
    every = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    trainer = trained_on(
        tiny_trainer, student, teacher, tiny_rows(8), load_best_model_at_end=True, **every
    )
    with pytest.raises(DivergedError, match="at step 3"):
        trainer.train()
    assert 0 < trainer.state.best_metric < math.inf
    best = AutoModelForCausalLM.from_pretrained(trainer.state.best_model_checkpoint)
    for name, weight in best.named_parameters():
        assert torch.equal(weight, student.get_parameter(name))


def test_of_infinite_evaluations_the_one_with_fewer_infinite_tokens_is_loaded(
    tiny_model, tiny_rows, tiny_trainer
):
    """Infinite at all held-out tokens, then at none, then again."""
    teacher = _Spoilt(-math.inf, lambda asked: asked in (1, 5))
    every = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "max_steps": 3}
    trainer = trained_on(
        tiny_trainer,
        tiny_model(seed=2),
        teacher,
        tiny_rows(8),
        rkl.ReverseKL(),
        load_best_model_at_end=True,
        settings={"callbacks": [EarlyStoppingCallback(5)]},
        **every,
    )
    trainer.train()
    assert trainer.state.best_global_step == 2
    assert math.isfinite(trainer.state.best_metric)


def test_steps_that_are_infinite_at_every_token_end_the_training(
    tiny_model, tiny_rows, tiny_trainer
):
    student, divergence = tiny_model(seed=2), rkl.ReverseKL()
    teacher = _Spoilt(-math.inf)
    trainer = trained_on(tiny_trainer, student, teacher, tiny_rows(4), divergence, max_steps=40)
    with (
        pytest.warns(UserWarning, match="is infinite at token"),
        pytest.raises(DivergedError, match="infinite at every token of 10 steps in a row"),
    ):
        trainer.train()


@pytest.fixture
def world(tmp_path):
    material.write(tmp_path)
    return tmp_path


def _nan_teacher(folder):
    teacher = AutoModelForCausalLM.from_pretrained(folder / "teacher")
    with torch.no_grad():
        teacher.transformer.h[0].mlp.c_fc.weight[0, 0] = NAN
    teacher.save_pretrained(folder / "teacher")


@pytest.mark.parametrize("held_out", [0.0, 0.2])
def test_a_run_that_diverges_keeps_its_last_good_student_and_says_so(held_out, world):
    changes = {"max_steps": 8, "eval_every": 1, "save_every": 1}
    settings = material.settings(world, held_out=held_out, **changes)
    teacher = _Spoilt(NAN, lambda asked: asked >= 6)
    teacher.vocab = material.VOCAB
    with pytest.raises(DivergedError, match=r"NaN.* at step \d+\. .*holds the student of step \d"):
        distill(settings, world / "run", teacher=teacher)
    record = json.loads((world / "run" / "run.json").read_text())
    assert record["status"] == "diverged"
    assert "NaN" in record["result"]["diverged"]
    assert finite(rkl.load(world / "run"))
    card = (world / "run" / "README.md").read_text()
    assert "The run ended early" in card
    assert ("Divergence on held-out text: 0 nats" in card) is False
    logged = Run.open(world / "run").metrics
    losses = [row["eval_loss"] for row in logged if row.get("eval_loss") is not None]
    assert not any(loss <= 0 for loss in losses)
    with torch.no_grad():
        logits = rkl.load(world / "run")(torch.tensor([[5, 6, 7]])).logits
    assert logits.isfinite().all()


def test_a_teacher_with_a_nan_weight_is_refused_by_its_name(world, capsys):
    _nan_teacher(world)
    words = ["distill", "--teacher", world / "teacher", "--student", world / "student"]
    words += ["--data", world / "text.txt", "--out", world / "run", "--device", "cpu"]
    words += ["--max-steps", "2", "--max-length", "16", "--no-compiled"]
    assert main(list(map(str, words))) != 0
    assert "transformer.h.0.mlp.c_fc.weight" in capsys.readouterr().err
    assert not (world / "run").exists()


def test_a_smaller_cross_entropy_is_better(tiny_model, tiny_rows, tiny_trainer):
    settings = {"metric_for_best_model": "eval_cross_entropy", "load_best_model_at_end": True}
    settings |= {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "learning_rate": 0.1}
    student, teacher = tiny_model(seed=1), tiny_model(seed=2)
    trainer = trained_on(tiny_trainer, student, teacher, tiny_rows(), **settings)
    trainer.train()
    rows = [it for it in trainer.state.log_history if "eval_cross_entropy" in it]
    assert len(rows) == 4
    best = min(rows, key=lambda it: it["eval_cross_entropy"])
    assert trainer.state.best_global_step == best["step"]
    assert trainer.evaluate()["eval_cross_entropy"] == pytest.approx(best["eval_cross_entropy"])

"""A checkpoint is there whole or not at all; what resumes from it ends in the same weights."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from rkl.distill.checkpoints import rotate

SETTINGS = {"max_steps": 6, "save_steps": 2, "learning_rate": 1e-2, "logging_steps": 1}
SETTINGS |= {"per_device_train_batch_size": 2}


@pytest.fixture
def run(tiny_model, tiny_rows, tiny_trainer):
    """A function that trains a student with dropout, and gives its weights."""

    def train(out, *, resume=None, rows=10, **changes):
        student = tiny_model(seed=2, resid_pdrop=0.1)
        trainer = tiny_trainer(
            student, tiny_model(seed=1), tiny_rows(rows), out=out, **SETTINGS | changes
        )
        trainer.train(resume_from_checkpoint=resume)
        return [parameter.detach().clone() for parameter in student.parameters()]

    return train


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("at", [2, 4, 6])
def test_resuming_ends_in_the_same_bits(at, run, tmp_path):
    whole = run(tmp_path / "whole")
    resumed = run(tmp_path / "other", resume=str(tmp_path / "whole" / f"checkpoint-{at}"))
    assert same(whole, resumed)
    assert not same(whole, run(tmp_path / "third", seed=1))


def test_a_checkpoint_holds_no_pickled_settings_and_loads_without_rkl(run, tmp_path):
    trained = run(tmp_path)
    names = {path.name for path in tmp_path.rglob("*")}
    assert "training_args.bin" not in names
    assert not any(name.startswith(".") for name in names)
    path = tmp_path / "checkpoint-6"
    for file in ("optimizer.pt", "scheduler.pt"):
        torch.load(path / file, weights_only=True)
    model = AutoModelForCausalLM.from_pretrained(path, use_safetensors=True)
    assert same(model.parameters(), trained)


def test_a_checkpoint_is_moved_when_all_processes_have_written_to_it(
    tiny_model, tiny_rows, tiny_trainer, tmp_path, monkeypatch
):
    trainer = tiny_trainer(tiny_model(seed=2), tiny_model(seed=1), tiny_rows(4), **SETTINGS)
    found = []
    monkeypatch.setattr(
        trainer.accelerator,
        "wait_for_everyone",
        lambda: found.append(next(tmp_path.rglob("trainer_state.json")).parent.parent.suffix),
    )
    trainer.state.global_step = 2
    trainer.create_optimizer_and_scheduler(6)
    trainer._save_checkpoint(trainer.model, None)
    assert found[0] == ".tmp"  # where the others write, below the temporary folder
    assert found[-1] == ""


def test_the_final_model_holds_no_pickle(tiny_model, tiny_trainer, tiny_tokenizer, tmp_path):
    settings = {"processing_class": tiny_tokenizer()}
    trainer = tiny_trainer(tiny_model(seed=2), tiny_model(seed=1), settings=settings)
    trainer.save_model(str(tmp_path / "final"))
    names = {path.name for path in (tmp_path / "final").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not any(name.startswith(".") or name.endswith(".bin") for name in names)


def test_the_best_model_is_loaded_at_the_end(tiny_model, tiny_rows, tiny_trainer, tmp_path):
    rows, student = tiny_rows(8), tiny_model(seed=2)
    changes = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2}
    changes |= {"learning_rate": 2.0, "save_total_limit": 1}  # far too large: the first is best
    trainer = tiny_trainer(
        student,
        tiny_model(seed=1),
        rows,
        out=tmp_path,
        settings={"eval_dataset": rows},
        **SETTINGS | changes,
    )
    trainer.train()
    losses = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    best = min(losses, key=losses.get)
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    assert [path.name for path in tmp_path.iterdir()] == [f"checkpoint-{best}"]
    saved = json.loads((tmp_path / f"checkpoint-{best}" / "trainer_state.json").read_text())
    assert saved["best_model_checkpoint"] == trainer.state.best_model_checkpoint
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[best], rel=1e-6)


@pytest.mark.parametrize(
    ("limit", "best", "left"),
    [
        (None, None, [1, 2, 3, 10]),
        (0, None, [1, 2, 3, 10]),
        (2, None, [3, 10]),
        (1, None, [10]),
        (1, 2, [2, 10]),
        (3, 1, [1, 3, 10]),
    ],
)
def test_the_oldest_checkpoints_go_first(limit, best, left, tmp_path):
    for step in (1, 2, 3, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
    best = best and str(tmp_path / f"checkpoint-{best}")
    rotate(str(tmp_path), limit, best)
    assert {path.name for path in tmp_path.iterdir()} == {f"checkpoint-{step}" for step in left}


def test_what_a_killed_process_left_is_removed(run, tmp_path):
    leftover = tmp_path / ".checkpoint-2.01234567.tmp"
    leftover.mkdir(parents=True)
    (leftover / "model.safetensors").write_bytes(b"half")
    run(tmp_path)
    assert not leftover.exists()

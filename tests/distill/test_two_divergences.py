"""One divergence on the tokens of the data, another on those that the student wrote."""

import json
import math

import material
import pytest
import torch

import rkl
from rkl.cli import main
from rkl.distill import EvaluateSettings, Teacher, evaluate_run
from rkl.distill.text.batches import DATA, SOURCES, STUDENT, TEACHER, PadRows, shifted
from rkl.runs import Run

HOW = {"lmbda": 0.5, "max_completion_length": 6, "save_strategy": "no", "logging_steps": 1}
TWO = {"divergence": rkl.SkewKL(alpha=0.1), "on_policy_divergence": rkl.SkewReverseKL(alpha=0.1)}


def flat(model):
    return torch.cat([it.detach().flatten() for it in model.parameters()])


def by_hand(models, batch, divergences):
    """The mean over all tokens of each one's divergence, in float64, and its gradient."""
    teacher, student = models
    rows = shifted(batch)
    logp, logq = (
        it(batch["input_ids"], attention_mask=batch["attention_mask"])
        .logits[:, :-1][rows.predicting]
        .double()
        .log_softmax(-1)
        for it in (teacher, student)
    )
    sources = batch[SOURCES][:, 1:][rows.predicting]
    terms = [
        rkl.exact(divergences[int(source)], p=p[None].detach(), q=q[None])
        for source, p, q in zip(sources, logp, logq, strict=True)
    ]
    return torch.stack(terms).mean()


@pytest.mark.parametrize("sources", [[STUDENT] * 6, [DATA] * 6, [DATA, STUDENT, TEACHER] * 2])
def test_each_token_has_the_divergence_of_its_source(sources, tiny_model, tiny_rows, tiny_trainer):
    teacher, student = tiny_model(seed=1), tiny_model(seed=2)
    trainer = tiny_trainer(student, teacher, tiny_rows(6), settings=TWO, **HOW)
    batch = PadRows()(tiny_rows(6))
    batch[SOURCES] = torch.tensor(sources)[:, None].expand_as(batch["labels"]).clone()
    loss = trainer.compute_loss(student, dict(batch))
    loss.backward()
    pull = torch.cat([it.grad.flatten() for it in student.parameters()])
    student.zero_grad()
    divergences = {STUDENT: TWO["on_policy_divergence"]}
    divergences |= dict.fromkeys((DATA, TEACHER), TWO["divergence"])
    expected = by_hand((teacher, student), batch, divergences)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    expected.backward()
    wanted = torch.cat([it.grad.flatten() for it in student.parameters()])
    torch.testing.assert_close(pull, wanted, rtol=1e-4, atol=1e-6)


def test_the_two_are_logged_apart(tiny_model, tiny_rows, tiny_trainer):
    trainer = tiny_trainer(
        tiny_model(seed=2), tiny_model(seed=1), tiny_rows(8), settings=TWO, max_steps=8, **HOW
    )
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    kinds = [{"data_loss", "on_policy_loss"} & row.keys() for row in rows]
    assert {frozenset(it) for it in kinds} == {
        frozenset(["data_loss"]),
        frozenset(["on_policy_loss"]),
    }
    for row, (name,) in zip(rows, kinds, strict=True):
        assert row[name] == pytest.approx(row["loss"], rel=1e-5, abs=1e-5)


def test_the_same_one_twice_is_that_one_to_the_bit(tiny_model, tiny_rows, tiny_trainer):
    found = []
    for settings in ({}, {"on_policy_divergence": rkl.KL()}):
        student = tiny_model(seed=2)
        how = {"divergence": rkl.KL()} | settings
        tiny_trainer(student, tiny_model(seed=1), tiny_rows(8), settings=how, **HOW).train()
        found.append(flat(student))
    assert torch.equal(*found)


def test_the_second_moves_the_weights(tiny_model, tiny_rows, tiny_trainer):
    found = []
    for divergence in (rkl.KL(), rkl.ReverseKL()):
        student = tiny_model(seed=2)
        how = {"divergence": rkl.KL(), "on_policy_divergence": divergence}
        tiny_trainer(
            student, tiny_model(seed=1), tiny_rows(8), settings=how, **HOW | {"lmbda": 1.0}
        ).train()
        found.append(flat(student))
    assert not torch.equal(*found)


def test_a_resumed_training_ends_in_the_same_bits(tiny_model, tiny_rows, tiny_trainer, tmp_path):
    how = {"settings": TWO, "max_steps": 4} | HOW
    how |= {"save_strategy": "steps", "save_steps": 2}
    made = []
    for name in ("whole", "resumed"):
        models = tiny_model(seed=2), tiny_model(seed=1)
        made.append(tiny_trainer(*models, tiny_rows(8), out=tmp_path / name, **how))
    made[0].train()
    made[1].train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert torch.equal(*(flat(it.model) for it in made))


@pytest.mark.parametrize(
    ("second", "changes", "error", "named"),
    [
        (rkl.KL(), {"lmbda": 0.0}, ValueError, "on_policy_divergence needs lmbda above 0"),
        ("kl", {}, TypeError, "on_policy_divergence must be a Divergence such as ReverseKL"),
    ],
)
def test_a_second_one_to_no_effect_is_refused(
    second, changes, error, named, tiny_model, tiny_rows, tiny_trainer
):
    with pytest.raises(error, match=named):
        tiny_trainer(
            tiny_model(),
            tiny_model(),
            tiny_rows(2),
            settings={"on_policy_divergence": second},
            **HOW | changes,
        )


class Sure(Teacher):
    """A teacher that gives the first atom no probability."""

    vocab = 40

    def observe(self, inputs, predicting, *, vocab=None):
        return torch.zeros(int(predicting.sum()), 40).index_fill_(1, torch.tensor([0]), -math.inf)


def test_an_infinite_token_is_named_with_the_divergence_of_its_source(
    tiny_model, tiny_rows, tiny_trainer
):
    how = {"divergence": rkl.JensenShannon(), "on_policy_divergence": rkl.ReverseKL()}
    student = tiny_model(seed=2)
    trainer = tiny_trainer(student, Sure(), tiny_rows(4), settings=how, **HOW)
    batch = PadRows()(tiny_rows(4))
    assert trainer.compute_loss(student, dict(batch)).isfinite()
    batch[SOURCES] = torch.full_like(batch["labels"], STUDENT)
    with pytest.warns(UserWarning, match=r"^ReverseKL\(\) is infinite at token 1"):
        trainer.compute_loss(student, dict(batch))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with models and pairs.jsonl, only read."""
    path = tmp_path_factory.mktemp("material")
    material.write(path)
    rows = [{"prompt": f"Item {it} of", "completion": f" the list {it}."} for it in range(24)]
    (path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def settings_for(folder, **changes):
    how = {"lmbda": 1.0, "max_completion_length": 6, "max_length": 24} | changes
    return material.settings(folder, data=str(folder / "pairs.jsonl"), **how)


def test_two_divergences_are_settings_of_a_run_and_both_are_measured(folder, tmp_path):
    settings = settings_for(folder)
    words = ["--teacher", settings.teacher, "--student", settings.student, "--max-length", 24]
    words += ["--data", settings.data, "--lmbda", 0.5, "--max-completion-length", 5, "--seed", 3]
    words += ["--max-steps", 6, "--device", "cpu", "--divergence", "skew-kl(alpha=0.2)"]
    words += ["--on-policy-divergence", "skew-reverse-kl(alpha=0.2)", "--out", tmp_path / "run"]
    assert main(["distill", *map(str, words)]) == 0
    run = Run.open(tmp_path / "run")
    assert run.settings["on_policy_divergence"] == "skew-reverse-kl(alpha=0.2)"
    logged = set().union(*(row.keys() for row in run.metrics))
    assert {"data_loss", "on_policy_loss"} <= logged
    rows = [{"prompt": f"What {it} of", "completion": f" the {it}s?"} for it in range(4)]
    (tmp_path / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = evaluate_run(
        run.path, EvaluateSettings(str(tmp_path / "other.jsonl"), prompts=0, device="cpu")
    )
    assert {"SkewKL(alpha=0.2)", "SkewReverseKL(alpha=0.2)"} <= set(
        told.results["run"]["divergences"]
    )


def test_a_second_divergence_to_no_effect_is_refused(folder):
    with pytest.raises(ValueError, match=r"on_policy_divergence needs lmbda above 0"):
        settings_for(folder, lmbda=0.0, on_policy_divergence="kl")
    with pytest.raises(ValueError, match=r"on_policy_divergence: .*nothing"):
        settings_for(folder, on_policy_divergence="nothing")

"""The trainer minimises the divergence per labelled token, however the rows are split up."""

import copy
import json
import math
import os
import socket
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from patience import HANGS
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import (
    CLIPImageProcessor,
    DataCollatorForLanguageModeling,
    LlavaProcessor,
    TrainingArguments,
)

import rkl
from rkl.distill import DistillConfig, DistillTrainer, PadRows, Teacher, arguments
from rkl.distill.text.batches import shifted
from rkl.distill.text.data import tokenize

SGD = {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}


@dataclass(frozen=True)
class LeCam(rkl.FDivergence):
    """A divergence that rkl does not know, sum (p - q)^2 / (p + q)."""

    def integrand(self, logp, logq):
        nowhere = (logp == -math.inf) & (logq == -math.inf)
        both = torch.logaddexp(logp, logq.masked_fill(nowhere, 0.0))
        return (logp.exp() - logq.exp()).square() / both.exp()


def mean_kl(teacher, student, rows):
    """The mean over all labelled tokens of the rows, one row at a time, from full logits."""
    terms = []
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
        with torch.no_grad():
            logp = teacher(ids).logits[0, :-1][labels != -100].log_softmax(-1)
        logq = student(ids).logits[0, :-1][labels != -100].log_softmax(-1)
        terms.append((logp.exp() * (logp - logq)).sum(-1))
    return torch.cat(terms).mean()


def weights(model):
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


def one_step(tiny_trainer, student, teacher, rows, batch, **changes):
    """The student's weights after one step of gradient descent at rate 1, and the logged loss."""
    student = copy.deepcopy(student)
    settings = SGD | {
        "max_steps": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": len(rows) // batch,
    }
    trainer = tiny_trainer(
        student, teacher, rows, settings={"divergence": rkl.KL()}, **settings | changes
    )
    trainer.train()
    return weights(student), trainer.state.log_history[0]["loss"]


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_a_step_is_the_gradient_of_the_mean_over_its_tokens(
    batch, tiny_model, tiny_rows, tiny_trainer
):
    teacher, student = tiny_model(seed=1).double(), tiny_model(seed=2).double()
    rows = tiny_rows(8)
    loss = mean_kl(teacher, student, rows)
    loss.backward()
    trained, logged = one_step(tiny_trainer, student, teacher, rows, batch)
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(
            trained[name], parameter.detach() - parameter.grad, rtol=1e-6, atol=1e-12
        )
    assert logged == pytest.approx(loss.item(), rel=1e-6)


def test_a_model_that_knows_no_count_is_trained_alike(tiny_model, tiny_rows, tiny_trainer):
    teacher, student = tiny_model(seed=1).double(), tiny_model(seed=2).double()
    rows = tiny_rows(8)
    expected, _ = one_step(tiny_trainer, student, teacher, rows, 2)
    student.accepts_loss_kwargs = False
    trained, _ = one_step(tiny_trainer, student, teacher, rows, 2)
    assert all(torch.equal(trained[name], expected[name]) for name in expected)


def test_a_batch_without_labels_changes_nothing(tiny_model, tiny_rows, tiny_trainer):
    teacher, student = tiny_model("Llama", seed=1).double(), tiny_model("Llama", seed=2).double()
    rows = tiny_rows(2)
    silent = {"input_ids": [5, 6, 7], "labels": [5, -100, -100]}
    expected, _ = one_step(tiny_trainer, student, teacher, rows, 1)
    trained, _ = one_step(tiny_trainer, student, teacher, [*rows, silent], 1)
    for name in expected:
        # other shapes, other sums: an entry that cancels is known to a share of the largest
        known = 1e-12 * expected[name].abs().max().item()
        torch.testing.assert_close(trained[name], expected[name], rtol=1e-12, atol=known)


@pytest.mark.parametrize("accumulation", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_two_processes_are_one(accumulation, tmp_path, tiny_model, tiny_rows, tiny_trainer):
    teacher, student = tiny_model(seed=1), tiny_model(seed=2)
    for name, model in (("teacher", teacher), ("student", student)):
        model.save_pretrained(tmp_path / name)
    rows = tiny_rows(8)
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    settings = SGD | {"max_steps": 1, "logging_steps": 1, "save_strategy": "no"}
    settings |= {"per_device_train_batch_size": 4 // accumulation, "per_device_eval_batch_size": 3}
    settings |= {"gradient_accumulation_steps": accumulation}
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    run_two_processes(tmp_path)

    teacher, student = teacher.double(), student.double()
    expected, loss = one_step(tiny_trainer, student, teacher, rows, 8)
    trained = load_file(tmp_path / "trained.safetensors")
    for name, tensor in expected.items():
        torch.testing.assert_close(trained[name], tensor, rtol=1e-6, atol=1e-12)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["loss"] == pytest.approx(loss, rel=1e-6)
    student.load_state_dict(expected, strict=False)
    assert results["eval_loss"] == pytest.approx(mean_kl(teacher, student, rows).item(), rel=1e-6)


def run_two_processes(folder):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    common |= {"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "2"}
    script = Path(__file__).with_name("one_of_two_processes.py")
    processes = [
        subprocess.Popen(
            [sys.executable, script, folder],
            env=os.environ | common | {"RANK": rank, "LOCAL_RANK": rank},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    for process in processes:
        _, errors = process.communicate(timeout=HANGS)
        assert process.returncode == 0, errors


def test_evaluation_weighs_tokens_and_not_batches(tiny_model, tiny_rows, tiny_trainer):
    teacher, student = tiny_model(seed=1).double(), tiny_model(seed=2).double()
    rows = tiny_rows(7)
    settings = {"divergence": rkl.KL(), "eval_dataset": rows}
    trainer = tiny_trainer(student, teacher, settings=settings, per_device_eval_batch_size=3)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(mean_kl(teacher, student, rows).item(), rel=1e-6)
    batch = shifted(PadRows()(rows))
    with torch.no_grad():
        logits = student(**batch.inputs).logits[:, :-1][batch.predicting]
    entropy = cross_entropy(logits, batch.targets).item()
    assert metrics["eval_cross_entropy"] == pytest.approx(entropy, rel=1e-6)


def test_metrics_of_the_users_get_full_logits(tiny_model, tiny_rows, tiny_trainer):
    student, rows = tiny_model(seed=2), tiny_rows(4)
    seen = []
    settings = {"eval_dataset": rows, "compute_metrics": lambda it: seen.append(it) or {"x": 1}}
    trainer = tiny_trainer(student, tiny_model(seed=1), settings=settings)
    assert trainer.evaluate()["eval_x"] == 1
    with torch.no_grad():
        expected = student(**shifted(PadRows()(rows)).inputs).logits
    torch.testing.assert_close(torch.tensor(seen[0].predictions), expected)


@pytest.mark.parametrize(
    "divergence",
    [rkl.KL(), rkl.AKL(), rkl.parse("0.5*js + 0.5*reverse-kl"), rkl.ToDi(), LeCam()],
    ids=repr,
)
def test_any_divergence_is_learnt_a_users_own_too(divergence, tiny_model, tiny_rows, tiny_trainer):
    teacher, student = tiny_model(seed=1), tiny_model(seed=2)
    rows = tiny_rows(8)
    settings = {"divergence": divergence, "eval_dataset": rows}
    trainer = tiny_trainer(
        student, teacher, rows, settings=settings, max_steps=20, learning_rate=3e-2
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before / 2


def test_the_hard_label_weight_weighs_a_cross_entropy(tiny_model, tiny_rows, tiny_trainer):
    teacher, student = tiny_model(seed=1).double(), tiny_model(seed=2).double()
    batch = PadRows()(tiny_rows(4))
    losses = [
        tiny_trainer(student, teacher, hard_label_weight=w).compute_loss(student, batch).item()
        for w in (0.0, 0.5)
    ]
    rest, predicting, targets = shifted(batch)
    with torch.no_grad():
        logits = student(**rest).logits[:, :-1][predicting]
    entropy = cross_entropy(logits, targets).item()
    assert losses[1] - losses[0] == pytest.approx(entropy / 2, rel=1e-9)


def test_rows_are_cut_to_max_length(tiny_model, tiny_rows, tiny_trainer):
    rows = tiny_rows(8)
    lengths = [len(row["input_ids"]) for row in rows]
    lost = sum(max(0, length - 4) for length in lengths)
    told = f"train_dataset: {lost} of {sum(lengths)} tokens are cut.* max_length={max(lengths)} in"
    with pytest.warns(UserWarning, match=told):
        trainer = tiny_trainer(tiny_model(seed=2), tiny_model(seed=1), rows, max_length=4)
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["input_ids"].shape == batch["labels"].shape == (8, 4)


def test_columns_that_name_a_row_are_no_part_of_a_batch(tiny_rows):
    rows = tiny_rows(2)
    more = {"id": "a", "number": 3, "score": torch.tensor(0.5), "about": None}
    batch = PadRows()([row | more for row in rows])
    assert batch.keys() == PadRows()(rows).keys()


def test_rows_of_a_data_set_longer_than_max_length_are_warned_of(
    tiny_model, tiny_rows, tiny_trainer, monkeypatch
):
    data_set = pytest.importorskip("datasets").Dataset.from_list(tiny_rows(8))
    lengths = [len(row["input_ids"]) for row in tiny_rows(8)]
    lost = sum(max(0, length - 4) for length in lengths)
    told = f"train_dataset: {lost} of {sum(lengths)} tokens are cut.* max_length={max(lengths)} in"
    with pytest.warns(UserWarning, match=told):
        tiny_trainer(tiny_model(seed=2), tiny_model(seed=1), data_set, max_length=4)
    monkeypatch.setattr(arguments, "LOOKED_AT", 4)
    told = f"of {sum(lengths[::2])} tokens of 4 rows looked at are cut off,.* max_length=None in"
    with pytest.warns(UserWarning, match=told):
        tiny_trainer(tiny_model(seed=2), tiny_model(seed=1), data_set, max_length=4)


def test_blocks_longer_than_max_length_are_warned_of(tiny_model, tiny_tokenizer, tiny_trainer):
    models, rows = (tiny_model(), tiny_model(seed=1)), [{"text": "w3 w4 w5 w6 w7 w8 w9"}] * 3
    blocks = tokenize(rows, tiny_tokenizer(), max_length=16)
    assert blocks.bounds.diff().tolist() == [16, 8]
    with pytest.warns(
        UserWarning, match="eval_dataset: 6 of 24 tokens are cut off, .* than 10. m"
    ):
        trainer = tiny_trainer(*models, settings={"eval_dataset": {"a": blocks}}, max_length=10)
    with pytest.warns(UserWarning, match="eval_dataset: 6 of 24 tokens are cut off") as caught:
        trainer.evaluate(blocks)
    assert len(caught) == 1


@pytest.mark.parametrize(
    "changes", [{"bf16": True}, {"activation_checkpointing": True}], ids=lambda it: next(iter(it))
)
def test_the_trainers_own_settings_still_work(changes, tiny_model, tiny_rows, tiny_trainer):
    teacher, student = tiny_model("Llama", seed=1), tiny_model("Llama", seed=2)
    rows = tiny_rows(4)
    expected, plain = one_step(tiny_trainer, student, teacher, rows, 2, learning_rate=1e-2)
    trained, loss = one_step(
        tiny_trainer, student, teacher, rows, 2, learning_rate=1e-2, **changes
    )
    # bfloat16 keeps 8 bits: its products err by some 2^-8 of the largest logit.
    tolerance = 0.05 if "bf16" in changes else 1e-6
    assert loss == pytest.approx(plain, rel=tolerance)
    for name in expected:
        torch.testing.assert_close(trained[name], expected[name], rtol=tolerance, atol=1e-2)


def test_the_base_of_a_peft_student_is_its_teacher(tiny_model, tiny_lora, tiny_rows, tiny_trainer):
    base = tiny_model("Llama", seed=1).double()
    teacher = copy.deepcopy(base)
    student = tiny_lora(base, ["q_proj", "v_proj"])
    for name, parameter in student.named_parameters():
        if "layers.0" in name:
            parameter.requires_grad_(False)
    trainable = {name: it.requires_grad for name, it in student.named_parameters()}
    batch = PadRows()(tiny_rows(4))
    settings = {"settings": {"divergence": rkl.KL()}}
    expected = tiny_trainer(student, teacher, **settings).compute_loss(student, batch)
    loss = tiny_trainer(student, "base", **settings).compute_loss(student, batch)
    assert loss > 0.01
    torch.testing.assert_close(loss, expected)
    assert {name: it.requires_grad for name, it in student.named_parameters()} == trainable
    loss.backward()


def test_a_peft_student_trains_and_resumes(
    tiny_model, tiny_lora, tiny_rows, tiny_trainer, tmp_path
):
    rows, settings = tiny_rows(8), {"save_steps": 3, "max_steps": 6, "learning_rate": 1e-2}
    whole, half = (tiny_lora(tiny_model("Llama", seed=2), ["q_proj"]) for _ in range(2))
    tiny_trainer(whole, "base", rows, out=tmp_path / "whole", **settings).train()
    trainer = tiny_trainer(half, "base", rows, out=tmp_path / "half", **settings)
    trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    trained = weights(half)
    assert all(torch.equal(trained[name], tensor) for name, tensor in weights(whole).items())


def fresh_adapters(model):
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's own: it uses what transformers deprecates
        return peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))


@pytest.mark.parametrize("divergence", [rkl.KL(), rkl.AKL(), rkl.TotalVariation()], ids=repr)
@pytest.mark.parametrize("teacher", ["base", "copy"])
def test_a_student_that_is_its_teacher_is_told_why_nothing_moves(
    teacher, divergence, tiny_model, tiny_rows, tiny_trainer
):
    model = tiny_model("Llama", seed=2)
    student = fresh_adapters(copy.deepcopy(model)) if teacher == "base" else copy.deepcopy(model)
    before = weights(student)
    settings = {"divergence": divergence}
    trainer = tiny_trainer(
        student, model if teacher == "copy" else "base", tiny_rows(8), settings=settings
    )
    with pytest.warns(UserWarning, match="is 0 at the first step.*hard_label_weight") as caught:
        trainer.train()
    assert len(caught) == 1
    if not isinstance(divergence, rkl.TotalVariation):  # which has a kink there
        assert all(torch.equal(it, before[name]) for name, it in weights(student).items())


def test_fresh_adapters_learn_from_hard_labels_without_a_warning(
    tiny_model, tiny_rows, tiny_trainer
):
    student = fresh_adapters(tiny_model("Llama", seed=2))
    trainer = tiny_trainer(student, "base", tiny_rows(8), hard_label_weight=0.5)
    before = weights(student)
    trainer.train()
    assert not all(torch.equal(it, before[name]) for name, it in weights(student).items())


class _Masking(Teacher):
    """A teacher to whom some atoms of some tokens are impossible."""

    vocab = 40

    def __init__(self, tokens):
        self.tokens = tokens

    def observe(self, inputs, predicting, *, vocab=None):
        logits = torch.zeros(int(predicting.sum()), self.vocab)
        logits[self.tokens, 7] = -math.inf
        return logits


def test_a_token_of_infinite_divergence_is_named_and_left_out(
    tiny_model, tiny_rows, tiny_trainer, tiny_tokenizer
):
    student, rows = tiny_model(seed=2), tiny_rows(8)
    settings = {"divergence": rkl.ReverseKL(), "processing_class": tiny_tokenizer(40)}
    batch = shifted(PadRows(2)(rows))
    row, position = batch.predicting.nonzero()[3].tolist()
    named = f"token {position + 1} of row {row} of the batch, {batch.targets[3]} 'w"
    trainer = tiny_trainer(student, _Masking([3, 4]), rows, settings=settings, logging_steps=1)
    with pytest.warns(UserWarning, match=rf"ReverseKL\(\) is infinite at {named}.*: 7 'w7'\."):
        loss = trainer.compute_loss(student, PadRows(2)(rows))
    kept = torch.ones(len(batch.targets), dtype=torch.bool)
    kept[[3, 4]] = False
    logq = student(**batch.inputs).logits[:, :-1][batch.predicting].log_softmax(-1)
    expected = (logq.exp() * (logq + math.log(40))).sum(-1)[kept].sum() / len(kept)
    torch.testing.assert_close(loss, expected)
    gradients = [torch.autograd.grad(x, student.lm_head.weight)[0] for x in (loss, expected)]
    torch.testing.assert_close(*gradients)
    trainer.compute_loss(student, PadRows(2)(rows))  # warns no second time
    trainer.log({"loss": 1.0})
    assert trainer.state.log_history[-1]["infinite_tokens"] == 4
    trainer.log({"loss": 1.0})
    assert "infinite_tokens" not in trainer.state.log_history[-1]


def test_a_batch_of_infinite_tokens_has_no_gradient(tiny_model, tiny_rows, tiny_trainer):
    student, settings = tiny_model(seed=2), {"divergence": rkl.ReverseKL()}
    trainer = tiny_trainer(student, _Masking(slice(None)), settings=settings)
    with pytest.warns(UserWarning, match="is infinite at token"):
        loss = trainer.compute_loss(student, PadRows()(tiny_rows(4)))
    assert loss == math.inf
    loss.backward()
    assert all((it.grad == 0).all() for it in student.parameters())


def test_a_sum_of_finite_tokens_that_overflows_is_infinite_and_no_token_is(
    tiny_model, tiny_rows, tiny_trainer
):
    student = tiny_model(seed=2)
    trainer = tiny_trainer(student, tiny_model(seed=5), hard_label_weight=1000.0)
    trainer.args.hard_label_weight = 1e38  # times a cross-entropy of 3.7 nats
    assert trainer.compute_loss(student, PadRows()(tiny_rows(4))) == math.inf
    assert trainer._batch_loss.infinite == 0


def test_an_evaluation_with_infinite_tokens_is_infinite_and_counts_them(
    tiny_model, tiny_rows, tiny_trainer
):
    student, rows = tiny_model(seed=2), tiny_rows(4)
    settings = {"divergence": rkl.ReverseKL(), "eval_dataset": rows}
    metrics = tiny_trainer(student, _Masking([0, 1]), settings=settings).evaluate()
    assert metrics["eval_loss"] == math.inf
    assert metrics["eval_infinite_tokens"] == 2
    batch = shifted(PadRows()(rows))
    with torch.no_grad():
        logq = student(**batch.inputs).logits[:, :-1][batch.predicting].double().log_softmax(-1)
    others = (logq.exp() * (logq + math.log(40))).sum(-1)[2:].mean().item()
    assert metrics["eval_finite_loss"] == pytest.approx(others, rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.0}, r"temperature must lie in \(0, ∞\); got 0.0"),
        ({"hard_label_weight": -1.0}, r"hard_label_weight must lie in \[0, ∞\); got -1.0"),
        ({"max_length": 1}, "max_length must be at least 2; got 1"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor has no meaning"),
    ],
)
def test_settings_out_of_range_are_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        DistillConfig(str(tmp_path), use_cpu=True, **changes)


@pytest.mark.parametrize(
    ("teacher", "settings", "message"),
    [
        ("gpt2", {}, "teacher must be a model, 'base' or a rkl.distill.Teacher; got 'gpt2'"),
        ("base", {}, "teacher='base' needs a PEFT student"),
        (None, {}, "teacher must be a model"),
        (_Masking([]), {"divergence": "akl"}, "divergence must be a Divergence .* got 'akl'"),
        (_Masking([]), {"compute_loss_func": print}, "compute_loss_func must be left out"),
        (_Masking([]), {"model_init": print}, "model_init must be left out"),
    ],
)
def test_wrong_arguments_are_refused(teacher, settings, message, tiny_model, tiny_trainer):
    with pytest.raises((TypeError, ValueError), match=message):
        tiny_trainer(tiny_model(), teacher, settings=settings)


def test_plain_training_arguments_are_refused(tiny_model, tmp_path):
    with pytest.raises(TypeError, match="args must be a DistillConfig; got a TrainingArguments"):
        DistillTrainer(tiny_model(), TrainingArguments(str(tmp_path)), teacher=tiny_model())


def test_a_batch_must_have_labels():
    with pytest.raises(ValueError, match="the batch must have labels.*; got input_ids"):
        shifted({"input_ids": torch.ones(1, 2)})


RAW = [{"text": "w3 w4 w5 w6 w7"}, {"text": "w8 w9 w3"}]
CHATS = "{% for m in messages %}w9 {{ m.content }} w1 {% endfor %}"
CHATS += "{% if add_generation_prompt %}w9 {% endif %}"


def test_raw_rows_train_as_their_tokens_do(tiny_model, tiny_trainer, tiny_tokenizer, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHATS
    said = [{"role": "user", "content": "w3 w4"}, {"role": "assistant", "content": "w5 w6"}]
    kinds = [RAW, [{"prompt": "w3 w4 ", "completion": "w5"}], [{"messages": said}]]
    kinds += [[{"instruction": "w3 w4", "output": "w5 w6"}]]
    for number, rows in enumerate(kinds):
        blocks = tokenize(rows, tokenizer, max_length=16, packing=False)
        results = []
        for data in (rows, blocks):
            trainer = tiny_trainer(
                tiny_model(seed=1),
                tiny_model(),
                data,
                out=tmp_path / f"{number}",
                max_length=16,
                settings={"processing_class": tokenizer, "eval_dataset": {"a": data}},
            )
            figures = [trainer.train().training_loss, trainer.evaluate()["eval_a_loss"]]
            figures.append(trainer.evaluate(data)["eval_loss"])
            figures.append(trainer.predict(data).metrics["test_loss"])
            results.append(figures)
        assert results[0] == results[1]


def test_raw_rows_of_data_sets_are_tokenized_and_tokens_left_alone(
    tiny_model, tiny_trainer, tiny_tokenizer, tiny_rows
):
    datasets = pytest.importorskip("datasets")
    how = {"processing_class": tiny_tokenizer()}
    table = datasets.Dataset.from_list([row | {"id": 1} for row in RAW])
    trainer = tiny_trainer(tiny_model(), tiny_model(seed=1), table, settings=how)
    assert len(trainer.train_dataset) == 2
    tokens = tiny_rows()
    assert tiny_trainer(tiny_model(), tiny_model(), tokens, settings=how).train_dataset is tokens
    streamed = table.to_iterable_dataset()
    with pytest.raises(ValueError, match="train_dataset must be tokenized where it has no length"):
        tiny_trainer(tiny_model(), tiny_model(), streamed, settings=how)


def test_raw_rows_without_a_tokenizer_and_rows_that_train_on_nothing_are_refused(
    tiny_model, tiny_trainer, tiny_tokenizer, tmp_path
):
    models = tiny_model(), tiny_model(seed=1)
    with pytest.raises(ValueError, match="train_dataset holds rows of text, .*processing_class"):
        tiny_trainer(*models, RAW)
    how = {"processing_class": tiny_tokenizer(), "eval_dataset": [{"text": ""}]}
    with pytest.raises(ValueError, match="eval_dataset: data has no trained tokens"):
        tiny_trainer(*models, RAW, settings=how)
    assert not (tmp_path / "out").exists()


def test_a_processor_is_saved_whole_and_its_tokenizer_tokenizes(
    tiny_model, tiny_trainer, tiny_tokenizer, tmp_path
):
    tokenizer = tiny_tokenizer()
    processor = LlavaProcessor(CLIPImageProcessor(), tokenizer)
    for number, it in enumerate((processor, tokenizer)):
        how = {"settings": {"processing_class": it}, "out": tmp_path / f"{number}"}
        trainer = tiny_trainer(tiny_model(), tiny_model(seed=1), RAW, **how)
        assert [row["input_ids"].tolist() for row in trainer.train_dataset] == [
            [3, 4, 5, 6, 7, 1],
            [8, 9, 3, 1],
        ]
        trainer.save_model(str(tmp_path / f"saved-{number}"))
    files = [{it.name for it in (tmp_path / f"saved-{number}").iterdir()} for number in (0, 1)]
    assert files[1] | {"processor_config.json"} <= files[0]


def test_the_tokenizer_of_a_collator_is_saved_where_there_is_no_other(
    tiny_model, tiny_rows, tiny_trainer, tiny_tokenizer, tmp_path
):
    collator = DataCollatorForLanguageModeling(tiny_tokenizer(), mlm=False)
    settings = {"data_collator": collator}
    trainer = tiny_trainer(tiny_model(), tiny_model(seed=1), tiny_rows(), settings=settings)
    trainer.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "tokenizer.json").is_file()

"""The teacher reads another prompt than the student, and the same completion, token by token."""

import json
from typing import Any

import material
import pytest
import torch

import rkl
from rkl.cli import main
from rkl.distill import (
    DistillConfig,
    DistillSettings,
    DistillTrainer,
    EvaluateSettings,
    PadRows,
    cache_teacher,
    distill,
    evaluate_run,
    load_model,
    load_tokenizer,
)
from rkl.distill.text.batches import TEACHER_MASK
from rkl.distill.text.data import IGNORED, TEACHER_IDS, TEACHER_LABELS, tokenize
from rkl.distill.text.sources import read_rows

ROWS = [
    {
        "prompt": f"Item {it} of",
        "completion": f" the list {it}.",
        "teacher_prompt": f"The {it}th {'long ' * (it % 3)}item of",
    }
    for it in range(12)
]
PLAIN = [{name: row[name] for name in ("prompt", "completion")} for row in ROWS]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
HOW = {"use_cpu": True, "disable_tqdm": True, "log_level": "error", "max_steps": 4}
HOW |= {"save_strategy": "no", "max_length": 24, "max_completion_length": 5}
HOW |= {"per_device_train_batch_size": 4, "learning_rate": 1e-2, "compiled": False}


@pytest.fixture(scope="module")
def words():
    return material.tokenizer()


@pytest.fixture
def prompted(words, tmp_path):
    """A function that makes a trainer of rows: prompted(rows, lmbda=1.0)."""

    def make(rows, *, teacher=None, out="out", positions=64, divergence=None, **changes):
        return DistillTrainer(
            material.model(1, 8, seed=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
            DistillConfig(str(tmp_path / out), **HOW | changes),
            teacher=teacher or material.model(2, 16, seed=1, n_positions=positions),
            divergence=divergence or rkl.JensenShannon(),
            train_dataset=rows,
            processing_class=words,
        )

    return make


def flat(trainer):
    return torch.cat([it.detach().flatten() for it in trainer.model.parameters()])


def by_hand(trainer, pairs):
    """The mean divergence over the tokens of completions, in float64.

    Args:
        trainer: Of both models.
        pairs: Of each row: the student's prompt, the teacher's, the completion.
    """
    teacher, student = trainer._teacher.model.eval(), trainer.model.eval()
    values = []
    for prompt, other, completion in pairs:
        with torch.no_grad():
            logq, logp = (
                model(torch.tensor([[*before, *completion]]))
                .logits[0, len(before) - 1 : -1]
                .double()
                .log_softmax(-1)
                for model, before in ((student, prompt), (teacher, other))
            )
        values.append(rkl.per_token({"d": trainer.divergence}, p=logp, q=logq)["d"])
    return torch.cat(values).mean().float()


def ids_of(words, row, name):
    end = [words.eos_token_id]
    before = words(row[name])["input_ids"]
    return before, [*words(row[name] + row["completion"])["input_ids"][len(before) :], *end]


def test_the_loss_is_that_of_the_completion_behind_either_prompt(prompted, words):
    trainer = prompted(ROWS)
    batch = trainer.data_collator([trainer.train_dataset[at] for at in range(len(ROWS))])
    pairs = []
    for row in ROWS:
        prompt, completion = ids_of(words, row, "prompt")
        other, same = ids_of(words, row, "teacher_prompt")
        assert same == completion
        pairs.append((prompt, other, completion))
    trainer.model.eval()
    loss = trainer.compute_loss(trainer.model, dict(batch))
    expected = by_hand(trainer, pairs)
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-6, atol=1e-6)
    unprompted = by_hand(trainer, [(prompt, prompt, it) for prompt, _, it in pairs])
    assert abs(unprompted - expected) > 1e-4
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] == pytest.approx(
        float(expected), rel=1e-5
    )


@pytest.mark.parametrize("kind", ["completion", "prompt"])
def test_own_text_is_read_behind_the_teachers_prompt(kind, prompted, words):
    names = ("prompt", "teacher_prompt", "completion")[: 2 if kind == "prompt" else 3]
    rows = [{name: row[name] for name in names} for row in ROWS]
    trainer = prompted(rows, lmbda=1.0, num_generations=2)
    known = {
        tuple(words(row["prompt"])["input_ids"]): words(row["teacher_prompt"])["input_ids"]
        for row in ROWS
    }
    batches = iter(trainer.get_train_dataloader())
    (batch,), count = trainer.get_batch_samples(batches, 1, torch.device("cpu"))
    pairs = []
    for ids, labels, mask in zip(
        *(batch[it] for it in ("input_ids", "labels", "attention_mask")), strict=True
    ):
        start = int((labels != IGNORED).nonzero()[0])
        prompt, reply = ids[:start].tolist(), ids[start : int(mask.sum())].tolist()
        pairs.append((prompt, known[tuple(prompt)], reply))
    assert pairs[0][0] == pairs[1][0] != pairs[2][0]
    trainer.model.eval()
    loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=count)
    torch.testing.assert_close(loss.detach(), by_hand(trainer, pairs), rtol=1e-6, atol=1e-6)


def test_the_students_own_prompt_given_twice_is_none_to_the_bit(prompted):
    found = []
    for rows in (PLAIN, [row | {"teacher_prompt": row["prompt"]} for row in PLAIN]):
        trainer = prompted(rows, lmbda=0.5)
        trainer.train()
        found.append(flat(trainer))
    assert torch.equal(*found)


def test_a_resumed_training_ends_in_the_same_bits(prompted, tmp_path):
    how = {"save_strategy": "steps", "save_steps": 2, "lmbda": 0.5, "steps_per_generation": 4}
    whole, again = prompted(ROWS, out="whole", **how), prompted(ROWS, out="again", **how)
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert torch.equal(flat(whole), flat(again))


def test_rows_without_another_prompt_are_read_as_the_student_does(words):
    rows = tokenize([ROWS[0], PLAIN[1]], words, max_length=24)
    batch = PadRows()([rows[0], rows[1]])
    length = int(batch[TEACHER_MASK][1].sum())
    assert batch[TEACHER_IDS][1, :length].tolist() == rows[1]["input_ids"].tolist()
    assert batch[TEACHER_LABELS][1, :length].tolist() == rows[1]["labels"].tolist()


@pytest.mark.parametrize("rows", [[*reversed(ROWS)], ROWS])
def test_a_completion_that_is_cut_is_cut_for_both(rows, words):
    whole = tokenize(rows, words, max_length=40)
    longest = max(len(row["input_ids"]) for row in whole)
    with pytest.warns(UserWarning, match="lose their end"):
        short = tokenize(rows, words, max_length=longest - 3)
    batch = PadRows()([short[at] for at in range(len(rows))])
    targets = [
        batch[name][:, 1:][batch[name][:, 1:] != IGNORED] for name in ("labels", TEACHER_LABELS)
    ]
    assert torch.equal(*targets)


def test_privileged_context_stands_behind_the_prompt():
    texts = read_rows([PLAIN[0] | {"privileged_context": "It is 0."}])
    assert texts[0]["teacher_prompt"] == "Item 0 of\n\nIt is 0."
    asked = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    chats = read_rows([{"prompt": asked, "privileged_context": "It is 0."}])
    assert chats[0]["teacher_prompt"] == [asked[0], {"role": "user", "content": "q\n\nIt is 0."}]
    assert chats[0]["prompt"] == asked


@pytest.mark.parametrize("name", ["teacher_prompt", "privileged_context"])
def test_an_empty_cell_is_no_prompt_for_the_teacher(name):
    assert read_rows([PLAIN[0] | {name: ""}]) == read_rows([PLAIN[0]])


def test_chats_are_put_into_words_for_either(words):
    words = material.tokenizer()
    words.chat_template = TEMPLATE
    rows = [
        {
            "prompt": [{"role": "user", "content": "the item"}],
            "completion": [{"role": "assistant", "content": "is here"}],
            "privileged_context": "It is there.",
        }
    ]
    (row,) = tokenize(rows, words, max_length=64)
    said = words.decode(row[TEACHER_IDS])
    assert said == "<user>the item\n\nIt is there.<|end|><assistant>is here<|end|>"
    trained = [it[it != IGNORED].tolist() for it in (row["labels"], row[TEACHER_LABELS])]
    assert trained[0] == trained[1]
    assert words.decode(trained[0]) == "is here<|end|>"


@pytest.mark.filterwarnings("ignore:In 1 of 2 rows the tokens of the prompt change")
def test_a_completion_of_other_tokens_is_refused_with_the_row(words):
    merged = {"prompt": "of th", "completion": "e list", "teacher_prompt": "Of all th "}
    assert words("of the list")["input_ids"] != [
        *words("of th")["input_ids"],
        *words("e list")["input_ids"],
    ]
    with pytest.warns(
        UserWarning, match=r"the completion has other tokens .* prompt: data, row 2"
    ):
        blocks = tokenize([ROWS[0], merged], words, max_length=24)
    assert len(blocks) == len(blocks.columns[TEACHER_IDS]) == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"privileged_context": "a"}, "row 1: teacher_prompt and privileged_context exclude one"),
        ({"teacher_prompt": [{"role": "user", "content": "a"}]}, "must both be text or both mes"),
        ({"teacher_prompt": None, "privileged_context": 3}, "privileged_context must be text; go"),
    ],
)
def test_a_prompt_that_means_nothing_is_refused(row, message, words):
    with pytest.raises(ValueError, match=message):
        tokenize([ROWS[0] | row], words, max_length=24)


@pytest.mark.parametrize(
    "row",
    [
        {"text": "a"},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    ],
)
def test_a_column_to_no_effect_is_refused(row, words):
    with pytest.raises(ValueError, match=r"teacher_prompt takes the place of a prompt, .*; got a"):
        tokenize([row | {"teacher_prompt": "a"}], words, max_length=24)


def test_a_prompt_longer_than_the_teachers_context_is_refused(prompted, tmp_path):
    long = [ROWS[0] | {"teacher_prompt": "the item of " * 12 + "of"}]
    with pytest.raises(ValueError, match=r"teacher_prompt: .* more than its context of 32"):
        prompted(long, positions=32)
    assert not (tmp_path / "out").exists()


def test_labels_of_other_tokens_are_refused():
    row = {"input_ids": [4, 5, 6], "labels": [IGNORED, 5, 6], TEACHER_IDS: [7, 8, 5, 9]}
    row |= {TEACHER_LABELS: [IGNORED, IGNORED, 5, 9]}
    with pytest.raises(ValueError, match=r"teacher_labels must be the tokens of labels, .*5, 9"):
        PadRows()([row])
    with pytest.raises(ValueError, match="teacher_labels must have a label for each"):
        PadRows()([row | {TEACHER_LABELS: None}])
    with pytest.raises(ValueError, match="teacher_input_ids goes with rows of one text"):
        PadRows()([row | {"position_ids": [0, 1, 0]}])


def test_a_cache_is_refused(prompted, words, tmp_path):
    teacher = material.model(2, 16, seed=1)
    plain = tokenize(PLAIN, words, max_length=24, packing=False)
    cached = cache_teacher(teacher, plain, tmp_path / "cache", max_length=24)
    trainer = prompted(ROWS, teacher=cached)
    with pytest.raises(ValueError, match="a CachedTeacher holds what the teacher told of the stu"):
        trainer.train()
    with pytest.raises(ValueError, match="a cache is of the student's own prompts"):
        cache_teacher(
            teacher, tokenize(ROWS, words, max_length=24), tmp_path / "other", max_length=24
        )


def test_a_run_and_its_evaluation_read_the_column(tmp_path, capsys):
    material.write(tmp_path)
    others = [row | {"prompt": f"What {row['prompt']}"} for row in ROWS[:4]]
    for name, rows in (("rows", ROWS), ("others", others)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    words = ["--teacher", tmp_path / "teacher", "--student", tmp_path / "student", "--lmbda", 0.5]
    words += ["--data", tmp_path / "rows.jsonl", "--max-length", 24, "--max-completion-length", 4]
    words += ["--max-steps", 2, "--batch-size", 2, "--device", "cpu", "--out", tmp_path / "run"]
    assert main(["distill", *map(str, words)]) == 0
    run, tokenizer = tmp_path / "run", load_tokenizer(tmp_path / "run")
    asked = EvaluateSettings(str(tmp_path / "others.jsonl"), prompts=0, device="cpu")
    told = evaluate_run(run, asked).results["run"]["divergences"]["js"]["value"]
    q, p, values = load_model(run), load_model(tmp_path / "teacher"), []
    for row in others:
        logits = []
        for model, name in ((p, "teacher_prompt"), (q, "prompt")):
            before, completion = ids_of(tokenizer, row, name)
            with torch.no_grad():
                every = model(torch.tensor([[*before, *completion]])).logits
            logits.append(every[0, len(before) - 1 : -1].double().log_softmax(-1))
        values.append(rkl.per_token({"d": rkl.JensenShannon()}, p=logits[0], q=logits[1])["d"])
    assert told == pytest.approx(float(torch.cat(values).mean()), rel=1e-5)
    how: dict[str, Any] = {
        "teacher": str(tmp_path / "teacher"),
        "student": str(tmp_path / "student"),
    }
    how |= {"data": str(tmp_path / "rows.jsonl"), "max_length": 24, "device": "cpu"}
    with pytest.raises(ValueError, match="privileged_context need a teacher that reads them in"):
        distill(DistillSettings(**how, cache_teacher=True), tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    words = ["--teacher", how["teacher"], "--data", how["data"], "--out", tmp_path / "cache"]
    assert main(["cache", *map(str, words)]) == 2
    assert "need a teacher that reads them in the run" in capsys.readouterr().err
    words = ["--teacher", how["teacher"], "--data", how["data"], "--max-length", 24]
    assert main(["evaluate", how["student"], *map(str, words)]) == 2
    assert "has prompts for the teacher (teacher_prompt or" in capsys.readouterr().err

"""Versions of one tokenizer share what they have in common; other tokenizers are refused."""

import json
import shutil

import material
import pytest
import torch
import transformers
from tokenizers import Tokenizer, normalizers
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

import rkl
from rkl.cli import main
from rkl.distill import PadRows, distill, load_tokenizer
from rkl.distill.text.vocabulary import check_splits_alike, share_vocabulary

WORDS = [f"w{number}" for number in range(100)]


def tokenizer(words, **special):
    model = Tokenizer(WordLevel({word: at for at, word in enumerate(words)}, unk_token=words[0]))
    model.pre_tokenizer = Whitespace()
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=model, eos_token=words[1])
    made.add_special_tokens(special)
    return made


PADDED = tokenizer(WORDS, pad_token="[PAD]")
RENAMED = tokenizer([*WORDS[:50], "<|reserved_7|>", *WORDS[51:]])
CONTROLLED = tokenizer([*WORDS, "<tool>", "</tool>", "<think>", "</think>"])
IMAGE = tokenizer([*WORDS, "<image>"])
PLAIN = tokenizer(WORDS)


@pytest.mark.parametrize(
    ("logits", "tokenizers", "size", "foreign"),
    [
        ((100, 100), (PLAIN, PLAIN), 100, []),
        ((128, 128), (PLAIN, PADDED), 100, [100]),
        ((100, 101), (PLAIN, PADDED), 100, [100]),
        ((100, 100), (RENAMED, PLAIN), 100, [50]),
        ((128, 160), (CONTROLLED, PLAIN), 100, [100, 101, 102, 103]),
        ((104, 100), (CONTROLLED, PLAIN), 100, [100, 101, 102, 103]),
        ((128, 100), (IMAGE, IMAGE), 100, [100]),
        ((128, 100), (None, IMAGE), 100, [100]),
        ((152, 151), (PLAIN, PLAIN), 100, []),
    ],
)
def test_versions_of_one_tokenizer_share_what_they_have_in_common(
    logits, tokenizers, size, foreign
):
    shared = share_vocabulary(*logits, *tokenizers)
    assert shared.size == size
    used = torch.arange(max(len(it) for it in tokenizers if it is not None))
    assert used[shared.foreign(used)].tolist() == foreign


def test_the_tokens_that_differ_are_named():
    shared = share_vocabulary(128, 128, RENAMED, PADDED)
    told = "50 ('<|reserved_7|>' in the teacher's, 'w50' in the student's)"
    assert told in shared.told()
    assert "100 (none in the teacher's, '[PAD]' in the student's)" in shared.told()
    shared.check("data", torch.tensor([3, 49, 51]))
    with pytest.raises(ValueError, match=r"data: 2 of its tokens .*none in the teacher's"):
        shared.check("data", torch.tensor([3, 50, 100, 100]))


@pytest.mark.parametrize(
    "words", [WORDS[::-1], [f"v{number}" for number in range(100)], WORDS[:80]]
)
def test_another_tokenizer_is_refused_of_the_same_size_too(words):
    with pytest.raises(ValueError, match="must share a tokenizer; theirs differ in"):
        share_vocabulary(128, 128, tokenizer(words), PLAIN)


def test_tokenizers_of_one_vocabulary_that_split_differently_are_refused():
    one, other = tokenizer(["no", "end", "Yes", "yes"]), tokenizer(["no", "end", "Yes", "yes"])
    other.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert one.get_vocab() == other.get_vocab()
    with pytest.raises(ValueError, match=r"2 of 2 passages .*'yes'.*teacher's.*'Yes'.*student's"):
        check_splits_alike([[2, 3], [2]], other, one)
    assert "split 1 of 3 passages" in check_splits_alike([[2], [3], [3, 3]], other, one)
    assert check_splits_alike([[3], [3, 3]], other, one) == ""
    assert check_splits_alike([[2]], one, one) == ""


def test_a_trainer_compares_the_shared_tokens_and_refuses_others(tiny_model, tiny_trainer):
    """The student's padding token is none of the teacher's rows, and is not read by it."""
    teacher = tiny_model("Llama", seed=1, vocab_size=100).double()
    student = tiny_model("Llama", seed=2, vocab_size=101).double()
    rows = [{"input_ids": it, "labels": it} for it in ([3, 4, 5, 6], [7, 8])]
    settings = {"divergence": rkl.KL(), "processing_class": PADDED}
    settings |= {"teacher_processing_class": PLAIN}
    trainer = tiny_trainer(student, teacher, rows, settings=settings)
    batch = trainer.data_collator(rows)
    loss = trainer.compute_loss(student, dict(batch)).item()
    expected = []
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            logp, logq = (
                it(ids).logits[0, :-1, :100].log_softmax(-1) for it in (teacher, student)
            )
        expected += (logp.exp() * (logp - logq)).sum(-1).tolist()
    assert loss == pytest.approx(sum(expected) / len(expected), rel=1e-9)
    foreign = PadRows()([{"input_ids": [3, 100, 4], "labels": [3, 100, 4]}])
    with pytest.raises(ValueError, match=r"train_dataset: 1 of its tokens .*\[PAD\]"):
        trainer.compute_loss(student.train(), foreign)


@pytest.fixture
def folder(tmp_path):
    material.write(tmp_path)
    return tmp_path


def rename(folder, old, new):
    """Give one token of the tokenizer in a folder another name."""
    file = folder / "tokenizer.json"
    made = json.loads(file.read_text())
    merges = [it for it in made["model"]["merges"] if "".join(it) != old and old not in it]
    made["model"]["vocab"] = {
        new if it == old else it: n for it, n in made["model"]["vocab"].items()
    }
    made["model"]["merges"] = merges
    file.write_text(json.dumps(made))


@pytest.mark.filterwarnings("ignore:.*were trained on")
def test_a_run_with_two_versions_of_a_tokenizer_says_in_what_they_differ(folder):
    used = set(load_tokenizer(folder / "student")(material.TEXT)["input_ids"])
    words = load_tokenizer(folder / "teacher").get_vocab()
    unused = next(it for it, number in words.items() if number not in used and len(it) == 1)
    rename(folder / "teacher", unused, "<|reserved|>")
    with pytest.warns(UserWarning, match=r"differ in 1 tokens, none of which the data use"):
        done = distill(material.settings(folder, max_steps=1), folder / "run")
    command = ["evaluate", str(done.path), "--data", str(folder / "text.txt"), "--prompts", "0"]
    assert main([*command, "--max-blocks", "2"]) == 0


def test_data_that_use_a_token_that_differs_are_refused_before_anything_is_written(folder):
    rename(folder / "teacher", "e", "<|reserved|>")
    with pytest.raises(ValueError, match=r"data: 1 of its tokens .*reserved"):
        distill(material.settings(folder, max_steps=1), folder / "run")
    assert not (folder / "run").exists()


@pytest.mark.filterwarnings("ignore:.*were trained on")
def test_an_evaluation_beside_a_teacher_of_another_tokenizer_is_refused(folder, capsys):
    done = distill(material.settings(folder, max_steps=1), folder / "run")
    shutil.copytree(folder / "teacher", folder / "other")
    other = tokenizer([f"v{number}" for number in range(material.VOCAB)])
    other.save_pretrained(folder / "other")
    command = ["evaluate", str(done.path), "--data", str(folder / "text.txt"), "--prompts", "0"]
    assert main([*command, "--teacher", str(folder / "other")]) != 0
    assert "must share a tokenizer" in capsys.readouterr().err

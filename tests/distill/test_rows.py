"""Rows on their way through a run: packed, held out, prompted with, compared in pairs."""

import json
import math

import material
import pytest
import torch
import transformers

import rkl
from rkl.distill import PadRows, Teacher, compare_runs, distill
from rkl.distill.evaluate import EvaluateSettings, evaluate_run
from rkl.distill.models.heads import read_head
from rkl.distill.prepare import read_text
from rkl.distill.teachers.teacher import ModelTeacher

A, B = list(range(3, 13)), list(range(20, 28))
PACKED = [
    {"input_ids": A + B, "labels": A + B, "position_ids": [*range(10), *range(8)]},
    {"input_ids": A + B, "labels": A + B, "seq_lengths": [10, 8]},
]


@pytest.mark.parametrize("row", PACKED, ids=["position_ids", "seq_lengths"])
def test_texts_packed_in_a_row_do_not_see_one_another(row, tiny_model, tiny_trainer):
    apart = [{"input_ids": it, "labels": it} for it in (A, B)]
    losses = []
    for rows in ([row], apart, [row, apart[0]], [*apart, apart[0]]):
        settings = {"divergence": rkl.KL()}
        trainer = tiny_trainer(
            tiny_model("Llama", seed=2), tiny_model("Llama", seed=1), rows, settings=settings
        )
        losses.append(trainer.compute_loss(trainer.model, trainer.data_collator(rows)).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[2] == pytest.approx(losses[3], rel=1e-5)


def test_lengths_of_packed_texts_must_add_up():
    with pytest.raises(
        ValueError, match="seq_lengths must add up to the 18 tokens of the row; got 17"
    ):
        PadRows()([PACKED[1] | {"seq_lengths": [10, 7]}])


class _Server(Teacher):
    """A teacher that gives the k likeliest atoms of a model alone."""

    def __init__(self, model, k):
        self.head, self.k = read_head(model), k
        self.vocab = self.head.vocab

    def observe(self, inputs, predicting, *, vocab=None):
        with torch.no_grad():
            logits = self.head.model(**inputs).logits[:, :-1][predicting]
        return rkl.TopK(*logits.log_softmax(-1).topk(self.k))


@pytest.mark.filterwarnings("ignore:teacher gives the 5 likeliest atoms")
@pytest.mark.parametrize("divergence", [rkl.KL(), rkl.ReverseKL(), rkl.AKL()], ids=repr)
def test_a_top_k_of_all_atoms_is_the_whole_teacher(
    divergence, tiny_model, tiny_rows, tiny_trainer
):
    teacher, student, rows = tiny_model(seed=1), tiny_model(seed=2), tiny_rows(4)
    found = []
    for it in (teacher, _Server(teacher, 40), _Server(teacher, 5)):
        settings = {"divergence": divergence, "eval_dataset": rows}
        how = {"hard_label_weight": 0.5, "allow_partial": True}
        trainer = tiny_trainer(student, it, rows, settings=settings, **how)
        found.append(
            (
                trainer.compute_loss(student, PadRows()(rows)).item(),
                trainer.evaluate()["eval_loss"],
            )
        )
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    if isinstance(divergence, rkl.FDivergence):  # coarsening takes something away
        assert found[2][1] < found[0][1]
    hot = tiny_trainer(student, _Server(teacher, 5), rows, temperature=2.0, allow_partial=True)
    with pytest.raises(ValueError, match="temperature must be 1 for a teacher known by its top k"):
        hot.compute_loss(student, PadRows()(rows))


_SMALL = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
_SMALL |= {"num_attention_heads": 2}


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("LlamaModel", "model gives no logits for tokens: a LlamaModel has no such head"),
        ("BertForMaskedLM", "model predicts masked tokens"),
        ("BertLMHeadModel", "model sees the tokens that it is to predict"),
    ],
)
def test_a_model_that_is_not_causal_is_refused(kind, named):
    cls = getattr(transformers, kind)
    model = cls(cls.config_class(**_SMALL))
    with pytest.raises(TypeError, match=named):
        read_head(model)
    with pytest.raises(TypeError, match=named.replace("model", "teacher", 1)):
        ModelTeacher(model)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    material.write(folder)
    for name, divergence in (("one", "kl"), ("two", "reverse-kl")):
        settings = material.settings(
            folder,
            divergence=divergence,
            max_steps=2,
            packing=False,
            data=str(folder / "rows.jsonl"),
        )
        distill(settings, folder / name)
    return folder


@pytest.mark.parametrize("mark", ["\n\n", "\r\n\r\n", "\r\r", "\n  \n", "\n"])
def test_the_end_of_a_text_is_held_out_whatever_ends_its_lines(mark, world, tmp_path):
    parts = [it for it in material.TEXT.split("\n\n") if "\n" not in it][:40]
    (tmp_path / "a.txt").write_bytes(mark.join(parts).encode())
    read = read_text(
        material.settings(world, data=str(tmp_path / "a.txt"), held_out=0.2), material.tokenizer()
    )
    assert read.held_out is not None
    share = len(read.held_out.tokens) / (len(read.held_out.tokens) + len(read.blocks.tokens))
    assert 0.1 < share < 0.45
    assert "\r" not in material.tokenizer().decode(read.blocks.tokens)


@pytest.mark.filterwarnings("ignore:In .* rows the tokens of the prompt change")
def test_runs_on_the_same_blocks_are_compared_in_pairs(world, tmp_path):
    data = tmp_path / "held.jsonl"
    rows = [f"{text[::-1]} and more of it" for text in material.TEXT.split("\n\n")[:30]]
    pairs = [{"prompt": it[:4], "completion": it[4:10]} for it in rows]
    pairs.append({"prompt": "", "completion": "some words"})
    data.write_text("".join(json.dumps(it) + "\n" for it in pairs))
    settings = EvaluateSettings(str(data), prompts=31, seeds=1, max_new_tokens=4, device="cpu")
    for name in ("one", "two"):
        with pytest.warns(
            UserWarning, match=r"passed over: the prompt is empty: .*held\.jsonl, line 31"
        ):
            evaluate_run(world / name, settings)
    result = json.loads((world / "one" / "evaluation.json").read_text())
    assert result["blocks"] >= 30  # not packed, as in training
    assert result["prompts"]["count"] == 30
    compared = compare_runs([world / "one", world / "two"])
    value, error = compared.difference("forward-kl:all", "two", "one")
    means = [compared.results[it]["divergences"]["forward-kl"] for it in ("two", "one")]
    assert value == pytest.approx(means[0]["value"] - means[1]["value"], rel=1e-6)
    assert 0 < error < math.hypot(*(it["error"] for it in means))
    assert "Difference from one, paired by block" in str(compared)

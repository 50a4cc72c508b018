"""Rows that share a block do not see one another, or do not share one."""

import material
import pytest
import torch
import transformers

import rkl
from rkl.distill import DistillConfig, DistillTrainer, cache_teacher, distill, tokenize
from rkl.distill.evaluate import evaluate
from rkl.distill.models.heads import why_not_apart
from rkl.distill.prepare import load
from rkl.distill.text.batches import PadRows, attended
from rkl.runs import Run

APART = "GPT2 Llama Qwen2 Qwen3 Mistral Gemma2 Gemma3Text Granite Cohere2 Phi3 SmolLM3 Olmo2 Lfm2"
TOGETHER = "OPT Qwen3Next Mamba Bloom"
PRECISIONS = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def made(tiny_model, architecture, dtype):
    how = {"attn_implementation": "eager"} if architecture == "Gemma2" else {}
    return tiny_model(architecture, seed=1, **how).to(dtype)


@PRECISIONS
@pytest.mark.parametrize("architecture", APART.split())
def test_positions_that_begin_anew_keep_rows_apart(architecture, dtype, tiny_model):
    assert why_not_apart(made(tiny_model, architecture, dtype)) is None


@PRECISIONS
@pytest.mark.parametrize("architecture", TOGETHER.split())
def test_models_that_mix_rows_are_recognised(architecture, dtype, tiny_model):
    reason = why_not_apart(made(tiny_model, architecture, dtype))
    assert reason is not None
    assert "the second of two rows" in reason or "cannot be run" in reason


@pytest.fixture(scope="module")
def tokenizer():
    return material.tokenizer()


@pytest.fixture(scope="module")
def rows():
    return [{"text": part} for part in material.TEXT.split("\n\n") if 8 < len(part) < 60]


def llama(seed, **changes):
    torch.manual_seed(seed)
    sizes = {"vocab_size": material.VOCAB, "hidden_size": 16, "intermediate_size": 24}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
    sizes |= {"initializer_range": 0.3, "pad_token_id": 0, "eos_token_id": 0}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes | changes)).double()


def loss_and_gradient(dataset, student, teacher, out, batch):
    args = DistillConfig(str(out), use_cpu=True, disable_tqdm=True, log_level="error")
    trainer = DistillTrainer(
        student, args, teacher=teacher, divergence=rkl.KL(), train_dataset=dataset
    )
    examples = [trainer.train_dataset[it] for it in range(len(trainer.train_dataset))]
    total = sum(int((it["labels"][1:] != -100).sum()) for it in examples)
    student.zero_grad()
    loss = 0.0
    for start in range(0, len(examples), batch):
        part = trainer.compute_loss(
            student,
            trainer.data_collator(examples[start : start + batch]),
            num_items_in_batch=total,
        )
        part.backward()
        loss += part.item()
    return loss, [it.grad.clone() for it in student.parameters()]


def test_packed_rows_give_the_loss_and_gradient_of_rows_apart(rows, tokenizer, tmp_path):
    packed = tokenize(rows, tokenizer, max_length=64)
    assert packed.begins is not None
    student, teacher = llama(2), llama(1)
    results = [
        loss_and_gradient(dataset, student, teacher, tmp_path, batch)
        for dataset, batch in ((packed, 3), (packed.unpacked(), 4))
    ]
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)  # logged in single precision
    for one, other in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


def test_an_attention_mask_would_spoil_it(rows, tokenizer):
    packed = tokenize(rows, tokenizer, max_length=64)
    batch = PadRows()([packed[0], packed[1]])
    assert "attention_mask" not in batch
    model = llama(1)
    with torch.no_grad():
        how = {"position_ids": batch["position_ids"], "use_cache": False}
        apart = model(batch["input_ids"], **how).logits
        mixed = model(batch["input_ids"], torch.ones_like(batch["input_ids"]), **how).logits
    assert (apart - mixed).abs().max() > 1e-3


def test_evaluation_of_packed_rows_is_that_of_rows_apart(rows, tokenizer):
    packed = tokenize(rows, tokenizer, max_length=64)
    found = [
        evaluate(llama(2), llama(1), dataset, tokenizer=tokenizer)["divergences"]
        for dataset in (packed, packed.unpacked())
    ]
    assert len(found[0]) > 3
    for name in found[0]:
        one, other = (it[name]["value"] for it in found)
        assert one == pytest.approx(other, rel=1e-6)


def test_a_model_that_mixes_rows_gets_a_block_for_each(rows, tokenizer, tiny_model, tiny_trainer):
    packed = tokenize(rows, tokenizer, max_length=30)
    how = {"vocab_size": material.VOCAB}
    student, teacher = (tiny_model("Bloom", seed=seed, **how) for seed in (2, 1))
    with pytest.warns(UserWarning, match="packing: rows get a block each, for the student mixes"):
        trainer = tiny_trainer(student, teacher, packed)
    assert trainer.train_dataset.begins is None
    assert len(trainer.train_dataset) > len(packed)


def alone(student, teacher, blocks):
    """Mean KL over the trained tokens of blocks of one text each, from full logits."""
    values = []
    with torch.no_grad():
        for block in blocks:
            tokens = {"input_ids": block["input_ids"][None]}
            p, q = (it(**tokens).logits[0].double().log_softmax(-1) for it in (teacher, student))
            trained = block["labels"][1:] != -100
            values.append((p.exp() * (p - q)).sum(-1)[:-1][trained])
    return torch.cat(values).mean().item()


@pytest.mark.filterwarnings("ignore:packing")
def test_an_evaluation_of_a_model_that_mixes_rows_is_of_a_block_for_each_wherever_it_is_given(
    rows, tokenizer, tiny_model, tiny_trainer
):
    packed = tokenize(rows, tokenizer, max_length=30)
    how = {"vocab_size": material.VOCAB}
    student, teacher = (tiny_model("Bloom", seed=seed, **how).eval() for seed in (2, 1))
    expected = pytest.approx(alone(student, teacher, packed.unpacked()), rel=1e-5)
    settings = {"divergence": rkl.KL(), "eval_dataset": {"held_out": packed}}
    trainer = tiny_trainer(student, teacher, settings=settings)
    assert trainer.evaluate()["eval_held_out_loss"] == expected
    assert trainer.evaluate(packed)["eval_loss"] == expected
    assert trainer.evaluate({"later": packed})["eval_later_loss"] == expected
    assert trainer.predict(packed).metrics["test_loss"] == expected


def test_rows_of_several_texts_are_refused_where_a_model_mixes_them(
    rows, tokenizer, tiny_model, tiny_trainer
):
    packed = tokenize(rows, tokenizer, max_length=30)
    how = {"vocab_size": material.VOCAB}
    student, teacher = (tiny_model("Bloom", seed=seed, **how) for seed in (2, 1))
    part = torch.utils.data.Subset(packed, range(len(packed)))
    ids = [3, 4, 5, 6, 7]
    lengths = [{"input_ids": ids, "labels": ids, "seq_lengths": [2, 3]}]
    for dataset in (part, lengths):
        trainer = tiny_trainer(student, teacher, dataset)
        with pytest.raises(ValueError, match="train_dataset has rows of several texts, and the s"):
            trainer.train()
        with pytest.raises(ValueError, match=r"eval_dataset has .*packing=False"):
            trainer.evaluate(dataset)
    single = [{"input_ids": ids, "labels": ids, "seq_lengths": [5]}]
    tiny_trainer(student, teacher, single).train()


def test_a_run_says_why_it_does_not_pack(rows, tokenizer, tmp_path):
    material.write(tmp_path)
    torch.manual_seed(0)
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    config = transformers.BloomConfig(
        vocab_size=material.VOCAB,
        hidden_size=16,
        n_layer=1,
        n_head=2,
        initializer_range=0.3,
        **ends,
    )
    transformers.BloomForCausalLM(config).save_pretrained(tmp_path / "student")
    settings = material.settings(tmp_path, data=str(tmp_path / "rows.jsonl"))
    with pytest.warns(UserWarning, match=r"packing: .* the student mixes them: the second of two"):
        text, _ = load(settings)
    assert text.blocks.begins is None
    assert text.held_out is not None
    assert text.held_out.begins is None


def test_a_run_keeps_rows_of_a_block_apart(tmp_path):
    material.write(tmp_path)
    settings = material.settings(tmp_path, data=str(tmp_path / "rows.jsonl"))
    text, _ = load(settings)
    assert text.blocks.begins is not None
    assert text.beginning(3).blocks.begins.numel() == text.beginning(3).blocks.tokens.numel()
    distill(settings, tmp_path / "run")
    tokens = [row["tokens"] for row in Run.open(tmp_path / "run").metrics if "tokens" in row][-1]
    assert 4 * 2 * 12 < tokens <= 4 * 2 * 16  # padding apart, though blocks have no mask


def test_a_cache_is_found_whatever_rows_share_a_batch(rows, tokenizer, tmp_path):
    packed = tokenize(rows, tokenizer, max_length=64)
    alone = tokenize(rows[:1], tokenizer, max_length=64)
    both = [*(packed[it] for it in range(len(packed))), alone[0]]
    model = llama(1)
    cached = cache_teacher(model, both, tmp_path / "cache", batch_size=len(both))
    batch = PadRows()([alone[0]])
    labels = batch.pop("labels")
    known = cached.observe(batch, labels[:, 1:] != -100)
    with torch.no_grad():
        hidden = model.model(batch["input_ids"]).last_hidden_state[:, :-1]
    torch.testing.assert_close(known.hidden, hidden[labels[:, 1:] != -100])


def test_padding_is_told_from_text_without_a_mask():
    rows = [
        {"input_ids": [5, 6, 7, 8, 9], "position_ids": [0, 1, 0, 1, 2]},
        {"input_ids": [5, 6, 7], "position_ids": [0, 1, 2]},
    ]
    batch = PadRows()(rows)
    assert attended(batch).tolist() == [[True] * 5, [True] * 3 + [False] * 2]

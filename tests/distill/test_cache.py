"""A cached teacher says what the model said, finds rows by what is in them, and no others."""

import json

import pytest
import torch
from torch.utils.data import Dataset

import rkl
from rkl.distill import CachedTeacher, PadRows, cache_hidden_states
from rkl.distill.batches import shifted
from rkl.distill.cache import row_keys
from rkl.distill.heads import logits_of
from rkl.distill.teachers import ModelTeacher


class _Counted(Dataset):
    """Rows as a data set gives them, one at a time and as tensors."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {name: torch.tensor(value) for name, value in self.rows[index].items()}


@pytest.mark.parametrize("architecture", ["GPT2", "Gemma2", "Cohere", "Phi"])
def test_a_cache_says_what_the_model_says(architecture, tiny_model, tiny_rows, tmp_path):
    model, rows = tiny_model(architecture), tiny_rows(9)
    cached = cache_hidden_states(model, rows, tmp_path / "cache", batch_size=2)
    for picked in ([8, 0, 3], [5], range(9)):
        inputs, predicting, _ = shifted(PadRows(pad_token_id=2)([rows[row] for row in picked]))
        told = cached.observe(inputs, predicting)
        expected = ModelTeacher(model).observe(inputs, predicting)
        torch.testing.assert_close(logits_of(told), logits_of(expected))


def test_training_from_a_cache_is_training_from_the_model(
    tiny_model, tiny_rows, tiny_trainer, tmp_path
):
    model, rows = tiny_model("Llama", seed=1).double(), tiny_rows(8)
    cached = cache_hidden_states(model, _Counted(rows), tmp_path / "cache", max_length=8)
    weights, losses = [], []
    for teacher in (model, cached):
        student = tiny_model("Llama", seed=2).double()
        trainer = tiny_trainer(
            student,
            teacher,
            rows,
            out=tmp_path / "out",
            settings={"divergence": rkl.KL(), "eval_dataset": rows[:5]},
            max_length=8,
            per_device_train_batch_size=3,
            learning_rate=1e-2,
            save_strategy="no",
        )
        trainer.train()
        losses.append(trainer.evaluate()["eval_loss"])
        weights.append(torch.cat([it.detach().flatten() for it in student.parameters()]))
    # Adam divides by gradients: what rounding left of one that is 0 may come out otherwise.
    torch.testing.assert_close(*weights, rtol=1e-6, atol=1e-8)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_a_vocabulary_is_cut_as_the_models_is(tiny_model, tiny_rows, tmp_path):
    model, rows = tiny_model("Phi", vocab_size=48), tiny_rows(3)
    cached = cache_hidden_states(model, rows, tmp_path / "cache")
    inputs, predicting, _ = shifted(PadRows()(rows))
    told = cached.observe(inputs, predicting, vocab=40)
    expected = ModelTeacher(model).observe(inputs, predicting, vocab=40)
    torch.testing.assert_close(logits_of(told), logits_of(expected))


def test_the_same_row_is_kept_once(tiny_model, tiny_rows, tmp_path):
    rows = tiny_rows(6)
    done = []
    cached = cache_hidden_states(
        tiny_model(), rows + rows, tmp_path / "cache", progress=lambda *it: done.append(it)
    )
    assert len(cached) == 6
    tokens = sum(label != -100 for row in rows for label in row["labels"][1:])
    assert (tmp_path / "cache" / "hidden.bin").stat().st_size == 4 * 16 * tokens
    assert done == [(8, 12), (12, 12)]
    cached.observe(*shifted(PadRows()(rows))[:2])


def test_a_row_without_labels_needs_no_teacher(tiny_model, tiny_rows, tmp_path):
    rows = tiny_rows(2)
    silent = {"input_ids": [4, 5], "labels": [-100, -100]}
    cached = cache_hidden_states(tiny_model(), rows, tmp_path / "cache")
    inputs, predicting, _ = shifted(PadRows()([silent, rows[1], silent]))
    assert len(cached.observe(inputs, predicting).hidden) == predicting.sum()
    inputs, predicting, _ = shifted(PadRows()([silent]))
    assert cached.observe(inputs, predicting).hidden.shape == (0, 16)


@pytest.mark.parametrize("change", ["input_ids", "labels"])
def test_a_row_that_was_not_cached_is_refused(change, tiny_model, tiny_rows, tmp_path):
    rows = [{"input_ids": [4, 5, 6, 7], "labels": [-100, -100, 6, 7]}, *tiny_rows(2)]
    cached = cache_hidden_states(tiny_model(), rows, tmp_path / "cache")
    rows[0] |= {"input_ids": [5, 5, 6, 7]} if change == "input_ids" else {"labels": [4, 5, 6, 7]}
    batch = shifted(PadRows()([rows[1], rows[0]]))
    with pytest.raises(
        ValueError, match="row 1 of the batch is not among the 3 rows in the cache"
    ):
        cached.observe(*batch[:2])


def test_keys_depend_on_what_a_causal_teacher_sees_and_on_nothing_else():
    row = {"input_ids": [4, 5, 6, 7], "labels": [-100, 5, 6, -100]}

    def key(**changes):
        return row_keys(*shifted(PadRows(pad_token_id=3)([row | changes]))[:2])[0]

    padded = shifted(PadRows(pad_token_id=9)([row, {"input_ids": [1] * 7, "labels": [1] * 7}]))
    assert row_keys(*padded[:2])[0] == key()
    assert key(input_ids=[4, 5, 6, 8]) == key(labels=[4, 5, 6, -100]) == key()
    assert key(input_ids=[4, 5, 8, 7]) == key()  # the last token predicted is seen by nobody
    others = {key(input_ids=[4, 8, 6, 7]), key(labels=[-100, 5, 6, 7])}
    others |= {key(labels=[-100, 5, -100, -100]), key(position_ids=[0, 0, 1, 2])}
    assert len(others | {key()}) == 5


def test_a_cache_of_the_same_is_used_again(tiny_model, tiny_rows, tmp_path):
    model, rows, path = tiny_model(), tiny_rows(3), tmp_path / "cache"
    cache_hidden_states(model, rows, path)
    written = (path / "cache.json").stat().st_mtime_ns
    assert len(cache_hidden_states(model, rows, path, batch_size=1)) == 3
    assert (path / "cache.json").stat().st_mtime_ns == written


@pytest.mark.parametrize("other", ["teacher", "data"])
def test_a_cache_of_something_else_is_refused(other, tiny_model, tiny_rows, tmp_path):
    path = tmp_path / "cache"
    cache_hidden_states(tiny_model(seed=1), tiny_rows(3), path)
    model = tiny_model(seed=2 if other == "teacher" else 1)
    rows = tiny_rows(3, seed=1 if other == "data" else 0)
    with pytest.raises(ValueError, match=f"path: .*cache is the cache of another {other}"):
        cache_hidden_states(model, rows, path)


def test_an_interrupted_cache_leaves_nothing(tiny_model, tiny_rows, tmp_path):
    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache_hidden_states(tiny_model(), tiny_rows(3), tmp_path / "cache", progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_a_head_that_nothing_explains_cannot_be_cached(tiny_model, tiny_rows, tmp_path):
    model = tiny_model("Llama")
    model.get_output_embeddings = lambda: None
    with (
        pytest.warns(UserWarning, match="no plain linear layer"),
        pytest.raises(ValueError, match="model: the logits of a LlamaForCausalLM are no function"),
    ):
        cache_hidden_states(model, tiny_rows(3), tmp_path / "cache")


def test_a_cache_without_rows_is_refused(tiny_model, tmp_path):
    with pytest.raises(ValueError, match="rows must hold at least one row"):
        cache_hidden_states(tiny_model(), [], tmp_path / "cache")


def test_a_folder_that_is_no_cache_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no cache: it has no cache.json"):
        CachedTeacher(tmp_path)
    (tmp_path / "cache.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        CachedTeacher(tmp_path)
    (tmp_path / "cache.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(ValueError, match="has format 99; this rkl reads 1"):
        CachedTeacher(tmp_path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda it: it.update(vocab=10**9), "vocab must be the number of rows"),
        (lambda it: it.update(scale="x"), "scale must be a finite number"),
        (lambda it: it.update(softcap=True), "softcap must be a finite number"),
        (lambda it: it["rows"].update({next(iter(it["rows"])): [-3, 2]}), "lies at"),
        (lambda it: it["rows"].update({next(iter(it["rows"])): [0, 10**9]}), "lies at"),
        (
            lambda it: it.update(
                rows=dict(zip(it["rows"], [*it["rows"].values()][::-1], strict=True))
            ),
            "lies at",
        ),
        (
            lambda it: it.update(
                rows=dict(zip([*it["rows"]][::-1], it["rows"].values(), strict=True))
            ),
            "rows, or their order",
        ),
        (lambda it: it.update(softcap=30.0), "cache.json was changed"),
    ],
)
def test_a_changed_cache_json_is_refused_by_name(tiny_model, tiny_rows, tmp_path, change, named):
    cache_hidden_states(tiny_model(), tiny_rows(), tmp_path / "cache")
    file = tmp_path / "cache" / "cache.json"
    record = json.loads(file.read_text("utf-8"))
    change(record)
    file.write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(ValueError, match=named):
        CachedTeacher(tmp_path / "cache")


@pytest.mark.parametrize("name", ["hidden.bin", "head.safetensors"])
def test_a_flipped_bit_of_a_cache_is_named(tiny_model, tiny_rows, tmp_path, name):
    cache_hidden_states(tiny_model(), tiny_rows(), tmp_path / "cache")
    file = tmp_path / "cache" / name
    data = bytearray(file.read_bytes())
    data[-1] ^= 64
    file.write_bytes(data)
    with pytest.raises(ValueError, match=f"{name} is damaged: its sha256 was"):
        CachedTeacher(tmp_path / "cache")

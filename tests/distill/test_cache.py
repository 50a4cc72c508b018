"""A cached teacher says what the model said, finds rows by what is in them, and no others."""

import contextlib
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from patience import HANGS
from safetensors.torch import load_file
from torch.utils.data import Dataset

import rkl
from rkl.distill import CachedTeacher, PadRows, Teacher, cache_teacher
from rkl.distill.models.heads import logits_of
from rkl.distill.teachers import cache
from rkl.distill.teachers.cache import row_keys
from rkl.distill.teachers.teacher import ModelTeacher
from rkl.distill.text.batches import shifted
from rkl.runs import DiskFullError


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
    cached = cache_teacher(model, rows, tmp_path / "cache", batch_size=2)
    for picked in ([8, 0, 3], [5], range(9)):
        inputs, predicting, _ = shifted(PadRows(pad_token_id=2)([rows[row] for row in picked]))
        told = cached.observe(inputs, predicting)
        expected = ModelTeacher(model).observe(inputs, predicting)
        torch.testing.assert_close(logits_of(told), logits_of(expected))


@pytest.mark.filterwarnings(
    "ignore:train_dataset. .* tokens are cut off", "ignore:eval_dataset. .* cut off"
)
def test_training_from_a_cache_is_training_from_the_model(
    tiny_model, tiny_rows, tiny_trainer, tmp_path
):
    model, rows = tiny_model("Llama", seed=1).double(), tiny_rows(8)
    cached = cache_teacher(model, _Counted(rows), tmp_path / "cache", max_length=8)
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
    cached = cache_teacher(model, rows, tmp_path / "cache")
    inputs, predicting, _ = shifted(PadRows()(rows))
    told = cached.observe(inputs, predicting, vocab=40)
    expected = ModelTeacher(model).observe(inputs, predicting, vocab=40)
    torch.testing.assert_close(logits_of(told), logits_of(expected))


def test_the_same_row_is_kept_once(tiny_model, tiny_rows, tmp_path):
    rows = tiny_rows(6)
    done = []
    cached = cache_teacher(
        tiny_model(), rows + rows, tmp_path / "cache", progress=lambda *it: done.append(it)
    )
    assert len(cached) == 6
    tokens = sum(label != -100 for row in rows for label in row["labels"][1:])
    (shard,) = (tmp_path / "cache").glob("shard-*")
    assert load_file(shard)["hidden"].shape == (tokens, 16)
    assert done == [(6, 6)]
    cached.observe(*shifted(PadRows()(rows))[:2])


def test_a_row_without_labels_needs_no_teacher(tiny_model, tiny_rows, tmp_path):
    rows = tiny_rows(2)
    silent = {"input_ids": [4, 5], "labels": [-100, -100]}
    cached = cache_teacher(tiny_model(), rows, tmp_path / "cache")
    inputs, predicting, _ = shifted(PadRows()([silent, rows[1], silent]))
    assert len(cached.observe(inputs, predicting).hidden) == predicting.sum()
    inputs, predicting, _ = shifted(PadRows()([silent]))
    assert cached.observe(inputs, predicting).hidden.shape == (0, 16)


@pytest.mark.parametrize("change", ["input_ids", "labels"])
def test_a_row_that_was_not_cached_is_refused(change, tiny_model, tiny_rows, tmp_path):
    rows = [{"input_ids": [4, 5, 6, 7], "labels": [-100, -100, 6, 7]}, *tiny_rows(2)]
    cached = cache_teacher(tiny_model(), rows, tmp_path / "cache")
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
    cache_teacher(model, rows, path)
    written = (path / "index.json").stat().st_mtime_ns
    assert len(cache_teacher(model, rows, path)) == 3
    assert (path / "index.json").stat().st_mtime_ns == written


@pytest.mark.parametrize("other", ["teacher", "data"])
def test_a_cache_of_something_else_is_refused(other, tiny_model, tiny_rows, tmp_path):
    path = tmp_path / "cache"
    cache_teacher(tiny_model(seed=1), tiny_rows(3), path)
    model = tiny_model(seed=2 if other == "teacher" else 1)
    rows = tiny_rows(3, seed=1 if other == "data" else 0)
    with pytest.raises(ValueError, match=f"path: .*cache is the cache of another {other}"):
        cache_teacher(model, rows, path)


def test_an_interrupted_cache_is_gone_on_with(tiny_model, tiny_rows, tmp_path, monkeypatch):
    monkeypatch.setattr("rkl.distill.teachers.cache.SHARD", 200)
    rows, stops = tiny_rows(9), []

    def stop(done, total):
        stops.append(done)
        if done == 4:
            raise KeyboardInterrupt

    path = tmp_path / "cache"
    with pytest.raises(KeyboardInterrupt):
        cache_teacher(tiny_model(), rows, path, batch_size=2, progress=stop)
    with pytest.raises(ValueError, match=r"is not finished. Go on with the command that began it"):
        CachedTeacher(path)
    cache_teacher(tiny_model(), rows, path, batch_size=2, progress=lambda *it: stops.append(it[0]))
    assert stops == [2, 4, 6, 8, 9]
    cache_teacher(tiny_model(), rows, tmp_path / "whole", batch_size=2)
    assert contents(path) == contents(tmp_path / "whole")


def contents(folder):
    return {it.name: it.read_bytes() for it in folder.iterdir()}


def test_a_head_that_nothing_explains_cannot_be_cached(tiny_model, tiny_rows, tmp_path):
    model = tiny_model("Llama")
    model.get_output_embeddings = lambda: None
    with (
        pytest.warns(UserWarning, match="no plain linear layer"),
        pytest.raises(ValueError, match="model: the logits of a LlamaForCausalLM are no function"),
    ):
        cache_teacher(model, tiny_rows(3), tmp_path / "cache")


def test_a_cache_without_rows_is_refused(tiny_model, tmp_path):
    with pytest.raises(ValueError, match="rows must hold at least one row"):
        cache_teacher(tiny_model(), [], tmp_path / "cache")


def test_a_folder_that_is_no_cache_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no cache: it has no cache.json"):
        CachedTeacher(tmp_path)
    (tmp_path / "cache.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        CachedTeacher(tmp_path)
    (tmp_path / "cache.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(ValueError, match="has format 99; this rkl reads 2"):
        CachedTeacher(tmp_path)
    (tmp_path / "cache.json").write_text(json.dumps({"format": 1}))
    with pytest.raises(ValueError, match="a cache of rkl 0.1, .* rkl cache --teacher T --data D"):
        CachedTeacher(tmp_path)


def reorder(record):
    """Two rows exchanged, and the seal made anew."""
    rows = record["shards"][0]["rows"]
    rows[0][0], rows[1][0] = rows[1][0], rows[0][0]
    record["sha256"] = cache._sealed(record)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda it: it.update(vocab=10**9), "vocab must be the number of rows"),
        (lambda it: it.update(vocab="x"), "vocab must be a number of tokens"),
        (lambda it: it.update(scale="x"), "scale must be a finite number"),
        (lambda it: it.update(softcap=True), "softcap must be a finite number"),
        (lambda it: it["shards"][0]["rows"].pop(), "index.json was changed"),
        (lambda it: it["shards"][0].update(sha256="0" * 64), "index.json was changed"),
        (reorder, "rows, or their order"),
        (lambda it: it.update(softcap=30.0), "index.json was changed"),
        (lambda it: it.pop("shards"), "index.json has no shards"),
    ],
)
def test_a_changed_index_is_refused_by_name(tiny_model, tiny_rows, tmp_path, change, named):
    cache_teacher(tiny_model(), tiny_rows(), tmp_path / "cache")
    file = tmp_path / "cache" / "index.json"
    record = json.loads(file.read_text("utf-8"))
    change(record)
    file.write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(ValueError, match=named):
        CachedTeacher(tmp_path / "cache")


@pytest.mark.parametrize("name", ["shard-00001.safetensors", "head.safetensors"])
def test_a_flipped_bit_of_a_cache_is_named(tiny_model, tiny_rows, tmp_path, name, monkeypatch):
    monkeypatch.setattr("rkl.distill.teachers.cache.SHARD", 200)
    cache_teacher(tiny_model(), tiny_rows(), tmp_path / "cache", batch_size=2)
    file = tmp_path / "cache" / name
    data = bytearray(file.read_bytes())
    data[-1] ^= 64
    file.write_bytes(data)
    inputs, predicting, _ = shifted(PadRows()(tiny_rows()))
    with pytest.raises(ValueError, match=f"{name} is damaged: its sha256 was"):
        CachedTeacher(tmp_path / "cache").observe(inputs, predicting)


def test_shards_are_opened_when_a_row_of_them_is_met(tiny_model, tiny_rows, tmp_path, monkeypatch):
    monkeypatch.setattr("rkl.distill.teachers.cache.SHARD", 200)
    rows = tiny_rows()
    cached = cache_teacher(tiny_model(), rows, tmp_path / "cache", batch_size=2)
    assert len(cached.record["shards"]) > 1
    assert not cached._shards
    cached.observe(*shifted(PadRows()(rows[:1]))[:2])
    assert [*cached._shards] == [0]
    (tmp_path / "cache" / "shard-00001.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="has lost shard-00001.safetensors"):
        cached.observe(*shifted(PadRows()(rows))[:2])


@pytest.mark.parametrize("architecture", ["Llama", "GPT2", "Gemma2"])
def test_training_from_a_cache_in_float32_is_training_from_the_model_bit_for_bit(
    architecture, tiny_model, tiny_trainer, tmp_path
):
    tokens = torch.randint(3, 40, (13, 12), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [{"input_ids": it, "labels": [-100, *it[1:]]} for it in tokens]
    model, weights, losses = tiny_model(architecture, seed=1), [], []
    cached = cache_teacher(model, rows, tmp_path / "cache", batch_size=4)
    for teacher in (model, cached):
        student = tiny_model(architecture, seed=2)
        trainer = tiny_trainer(
            student,
            teacher,
            rows,
            settings={"divergence": rkl.AKL(), "eval_dataset": rows[:5]},
            max_steps=8,
            per_device_train_batch_size=4,
            per_device_eval_batch_size=4,
            learning_rate=1e-2,
            save_strategy="no",
            logging_steps=1,
        )
        trainer.train()
        losses.append([row.get("loss") for row in trainer.state.log_history])
        weights.append(torch.cat([it.detach().flatten() for it in student.parameters()]))
    assert losses[0] == losses[1]
    assert torch.equal(*weights)


def test_hidden_states_in_bfloat16_are_those_rounded(tiny_model, tiny_rows, tmp_path):
    model, rows = tiny_model(), tiny_rows(5)
    cached = cache_teacher(model, rows, tmp_path / "cache", stored="bfloat16")
    inputs, predicting, _ = shifted(PadRows()(rows))
    told, live = (
        cached.observe(inputs, predicting),
        ModelTeacher(model).observe(inputs, predicting),
    )
    assert told.hidden.dtype == torch.float32
    # 8 bits of mantissa, and once more the rounding of another batch
    torch.testing.assert_close(told.hidden, live.hidden.detach(), rtol=2.0**-8, atol=1e-6)
    assert torch.equal(told.hidden, told.hidden.bfloat16().float())


def test_a_cache_of_a_top_k_is_the_top_k(tiny_model, tiny_rows, tmp_path):
    model, rows = tiny_model("Llama"), tiny_rows(5)
    cached = cache_teacher(model, rows, tmp_path / "cache", keep="top-k=6")
    inputs, predicting, _ = shifted(PadRows()(rows))
    told = cached.observe(inputs, predicting)
    live = logits_of(ModelTeacher(model).observe(inputs, predicting)).log_softmax(-1)
    assert isinstance(told, rkl.TopK)
    torch.testing.assert_close(told.logp, live.detach().topk(6).values)
    assert torch.equal(told.index, live.topk(6).indices)
    assert not (tmp_path / "cache" / "head.safetensors").exists()
    with pytest.raises(ValueError, match="but teacher and student share 10 tokens"):
        cached.observe(inputs, predicting, vocab=10)


def test_a_top_k_above_the_vocabulary_is_all_of_it(tiny_model, tiny_rows, tmp_path):
    model, rows = tiny_model("Llama"), tiny_rows(3)
    cached = cache_teacher(model, rows, tmp_path / "cache", keep="top-k=100000")
    inputs, predicting, _ = shifted(PadRows()(rows))
    told = cached.observe(inputs, predicting)
    live = logits_of(ModelTeacher(model).observe(inputs, predicting)).log_softmax(-1).detach()
    assert isinstance(told, rkl.TopK)
    torch.testing.assert_close(told.logp, live.sort(descending=True).values)
    torch.testing.assert_close(live.gather(-1, told.index), told.logp)


def test_a_cache_of_draws_is_unbiased_and_the_same_for_the_same_seed(
    tiny_model, tiny_rows, tmp_path
):
    model, rows = tiny_model("Llama"), tiny_rows(5)
    inputs, predicting, _ = shifted(PadRows()(rows))
    told = [
        cache_teacher(model, rows, tmp_path / str(at), keep="sampled=400", seed=seed).observe(
            inputs, predicting
        )
        for at, seed in enumerate((1, 1, 2))
    ]
    live = logits_of(ModelTeacher(model).observe(inputs, predicting)).log_softmax(-1).detach()
    assert isinstance(told[0], rkl.Sampled)
    torch.testing.assert_close(told[0].logp, live.gather(-1, told[0].index))
    assert torch.equal(told[0].index, told[1].index)
    assert not torch.equal(told[0].index, told[2].index)
    share = torch.zeros_like(live).scatter_add_(-1, told[0].index, torch.ones_like(told[0].logp))
    # the largest of some 2,000 standard deviations
    assert ((share / 400 - live.exp()).abs() < 5 * (live.exp() / 400).sqrt()).all()


def test_a_teacher_that_gives_a_top_k_can_be_kept(tiny_model, tiny_rows, tmp_path):
    class Top(Teacher):
        vocab = 40

        def observe(self, inputs, predicting, *, vocab=None):
            with torch.no_grad():
                logits = model(**inputs).logits[:, :-1][predicting]
            return rkl.TopK(*logits.log_softmax(-1).topk(8))

    model, rows = tiny_model("Llama"), tiny_rows(3)
    cached = cache_teacher(Top(), rows, tmp_path / "cache", keep="top-k=5")
    inputs, predicting, _ = shifted(PadRows()(rows))
    torch.testing.assert_close(
        cached.observe(inputs, predicting).logp, Top().observe(inputs, predicting).logp[:, :5]
    )
    for keep in ("top-k=9", "sampled=3"):
        with pytest.raises(ValueError, match="of a teacher that gives its 8 likeliest atoms"):
            cache_teacher(Top(), rows, tmp_path / keep, keep=keep)
    with pytest.raises(ValueError, match="model: the logits of a Top are no function of hidden"):
        cache_teacher(Top(), rows, tmp_path / "hidden")


@pytest.mark.parametrize("keep", ["all", "top-k", "top-k=0", "sampled=-1", "hidden=3", 3])
def test_what_is_no_way_to_keep_is_refused(keep, tiny_model, tiny_rows, tmp_path):
    with pytest.raises(ValueError, match="keep must be hidden, top-k=64 or sampled=50"):
        cache_teacher(tiny_model(), tiny_rows(), tmp_path / "cache", keep=keep)


def test_another_way_to_keep_is_another_cache(tiny_model, tiny_rows, tmp_path):
    cache_teacher(tiny_model(), tiny_rows(), tmp_path / "cache")
    with pytest.raises(ValueError, match="the cache of another keep .hidden there, top-k=3 here"):
        cache_teacher(tiny_model(), tiny_rows(), tmp_path / "cache", keep="top-k=3")


def test_a_folder_with_other_files_is_left_alone(tiny_model, tiny_rows, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="holds other files than a cache"):
        cache_teacher(tiny_model(), tiny_rows(), tmp_path)
    assert [it.name for it in tmp_path.iterdir()] == ["notes.txt"]


def test_another_tokenizer_is_refused(tiny_model, tiny_rows, tiny_tokenizer, tmp_path):
    cached = cache_teacher(
        tiny_model(), tiny_rows(), tmp_path / "cache", tokenizer=tiny_tokenizer()
    )
    cached.check_tokenizer(tiny_tokenizer())
    with pytest.raises(ValueError, match="was made with another tokenizer"):
        cached.check_tokenizer(tiny_tokenizer(prefix="v"))


def test_rows_that_are_not_there_are_counted(tiny_model, tiny_rows, tmp_path):
    rows = tiny_rows(6)
    cached = cache_teacher(
        tiny_model(), rows[:4], tmp_path / "cache", made={"max_length": 12, "packing": True}
    )
    cached.check_rows(rows[:4])
    with pytest.raises(
        ValueError, match=r"2 of 6 blocks are not in the .* made with max_length=12, packing=True"
    ):
        cached.check_rows(rows)


def test_two_writers_refuse_each_other(tiny_model, tiny_rows, tmp_path):
    path = tmp_path / "cache"

    def meanwhile(done, total):
        code = "import sys; from rkl.runs import lock; from pathlib import Path;"
        code += "lock.acquire(Path(sys.argv[1]), print)"
        other = subprocess.run(
            [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False
        )
        assert "RunBusyError" in other.stderr

    cache_teacher(tiny_model(), tiny_rows(), path, progress=meanwhile)
    assert not (path / ".rkl-lock").exists()


@pytest.mark.kill
def test_a_cache_killed_at_twenty_moments_ends_with_the_same_bytes(tmp_path):
    script = Path(__file__).with_name("killed_cache.py")
    done = subprocess.run(
        [sys.executable, script, tmp_path], capture_output=True, text=True, timeout=HANGS
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert int(done.stdout.split()[-1]) >= 20


def test_rows_of_one_block_that_the_teacher_mixes_are_refused(tmp_path, tiny_model):
    packed = {"input_ids": [5, 6, 7, 8, 9, 10], "labels": [5, 6, 7, 8, 9, 10]}
    rows = [packed | {"position_ids": [0, 1, 2, 0, 1, 2]}]
    with pytest.raises(ValueError, match=r"rows must have a block each for this teacher, which m"):
        cache_teacher(tiny_model("Bloom", seed=1), rows, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    cache_teacher(tiny_model("Bloom", seed=1), [packed], tmp_path / "cache")


class Filling:
    """A disk that is full from one call of a function on."""

    def __init__(self, patch, calls):
        self.left, self.patch = calls, patch
        for owner, name in ((os, "fsync"), (os, "replace"), (safetensors.torch, "save_file")):
            patch.setattr(owner, name, self.counted(getattr(owner, name)))

    def counted(self, function):
        def called(*words, **how):
            self.left -= 1
            if self.left < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return function(*words, **how)

        return called


def test_a_disk_that_fills_leaves_whole_shards_and_is_gone_on_with(
    tmp_path, tiny_model, tiny_rows, monkeypatch
):
    """Full from every call on that writes: the next attempt adds the shards that are missing."""
    monkeypatch.setattr("rkl.distill.teachers.cache.SHARD", 500)
    model, rows = tiny_model(seed=1), tiny_rows(12)
    whole = cache_teacher(model, rows, tmp_path / "whole", batch_size=2)
    names = sorted(it.name for it in whole.path.iterdir())
    assert len([it for it in names if it.startswith("shard-")]) > 2
    for calls in range(100):
        path = tmp_path / f"full after {calls}"
        with monkeypatch.context() as patch, contextlib.suppress(DiskFullError):
            filling = Filling(patch, calls)
            cache_teacher(model, rows, path, batch_size=2)
        if filling.left >= 0:
            break
        for file in path.glob("*.safetensors"):
            load_file(file)
        cache_teacher(model, rows, path, batch_size=2)
        assert sorted(it.name for it in path.iterdir()) == names
        for name in names:
            assert (path / name).read_bytes() == (whole.path / name).read_bytes()
    assert calls > 12
    Filling(monkeypatch, 12)
    with pytest.raises(DiskFullError, match=r"named/.* could not be written: the disk is full"):
        cache_teacher(model, rows, tmp_path / "named", batch_size=2)

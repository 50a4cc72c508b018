"""``rkl distill --teacher data:COLUMN``: a whole run from log-probabilities beside the rows."""

import dataclasses
import json
import signal

import material
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import set_seed

import rkl
from rkl import cli
from rkl.distill import (
    DistillConfig,
    DistillSettings,
    DistillTrainer,
    EvaluateSettings,
    PublishedTeacher,
    distill,
    dry_run,
    evaluate_run,
    load_model,
)
from rkl.distill.cache_run import CacheSettings
from rkl.distill.progress import Display
from rkl.distill.text.sources import read_whole_rows
from rkl.runs import Run

pytestmark = pytest.mark.filterwarnings("ignore:teacher gives the")
COLUMN, K, ROWS = "target_logprobs", 6, 12
TEXTS = [f"{word} number {it} of a list" for it in range(5) for word in ("one", "two", "three")]


def columns(teacher, tokens, k=K):
    """The top k of each token but the first, and the text's own, as servers add it."""
    with torch.no_grad():
        logp = teacher(torch.tensor([tokens])).logits[0, :-1].log_softmax(-1)
    values, index = logp.topk(k)
    own = torch.tensor(tokens[1:])[:, None]
    among = (index == own).any(-1, keepdim=True)
    index = torch.where(among, index, torch.cat([index[:, :-1], own], -1))
    values = logp.gather(-1, index)
    return {COLUMN: [[], *values.tolist()], "target_token_ids": [[], *index.tolist()]}


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with models and rows, only read."""
    path = tmp_path_factory.mktemp("published")
    material.write(path)
    teacher, words = load_model(str(path / "teacher")).eval(), material.tokenizer()
    torch.manual_seed(3)
    tokens = torch.randint(1, material.VOCAB, (ROWS, 9)).tolist()
    rows = [{"input_ids": it, "labels": [-100, -100, *it[2:]]} for it in tokens]
    write_rows(path / "rows.jsonl", [it | columns(teacher, it["input_ids"]) for it in rows])
    of_text = [[*words(it)["input_ids"], words.eos_token_id] for it in TEXTS]
    texts = [{"text": it} | columns(teacher, ids) for it, ids in zip(TEXTS, of_text, strict=True)]
    write_rows(path / "texts.jsonl", texts)
    return path


def settings(folder, data="rows.jsonl", **changes):
    how = {"teacher": f"data:{COLUMN}", "student": str(folder / "student"), "divergence": "kl"}
    return DistillSettings(
        **material.QUICK | how | {"data": str(folder / data), "max_length": 31} | changes
    )


def weights_of(path):
    return load_file(path / "model.safetensors")


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """The weights of a run that holds nothing out."""
    path = tmp_path_factory.mktemp("whole") / "run"
    distill(settings(folder, held_out=0.0), path)
    return weights_of(path)


def test_a_run_ends_in_the_weights_of_the_trainer(folder, whole, tmp_path):
    chosen = settings(folder, held_out=0.0)
    known = PublishedTeacher(read_whole_rows(chosen.data), vocab=material.VOCAB)
    student = load_model(str(folder / "student"), dtype="float32")
    set_seed(chosen.seed)
    trainer = DistillTrainer(
        student,
        DistillConfig(
            str(tmp_path / "trainer"),
            max_steps=chosen.max_steps,
            per_device_train_batch_size=chosen.batch_size,
            learning_rate=chosen.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=chosen.warmup,
            weight_decay=0.0,
            max_grad_norm=1.0,
            seed=chosen.seed,
            compiled=False,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
        ),
        teacher=known,
        divergence=rkl.KL(),
        train_dataset=known.rows,
    )
    trainer.train()
    expected = student.state_dict()
    start = load_model(str(folder / "student")).state_dict()
    for name, values in whole.items():
        torch.testing.assert_close(values, expected[name], rtol=1e-5, atol=1e-6)
        assert not torch.equal(values, start[name])


def test_all_atoms_of_the_teacher_make_the_run_of_its_model(folder, tmp_path):
    """Rows of text, of which some are held out, and the whole distribution at each place."""
    teacher, words = load_model(str(folder / "teacher")).eval(), material.tokenizer()
    rows = []
    for text in TEXTS:
        tokens = [*words(text)["input_ids"], words.eos_token_id]
        rows.append({"text": text} | columns(teacher, tokens, k=material.VOCAB))
    write_rows(tmp_path / "rows.jsonl", rows)
    how = {"data": str(tmp_path / "rows.jsonl"), "held_out": 0.2}
    told = distill(settings(folder, **how), tmp_path / "told")
    live = {"teacher": str(folder / "teacher"), "packing": False}
    beside = distill(settings(folder, **how, **live), tmp_path / "beside")
    assert told.result["held_out_loss"] == pytest.approx(beside.result["held_out_loss"], rel=1e-4)
    found, expected = (weights_of(tmp_path / name) for name in ("told", "beside"))
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-3)
    run = Run.open(tmp_path / "told")
    assert run.settings["teacher"] == f"data:{COLUMN}"
    assert run.record["data"]["held_out"]["blocks"] == 3
    assert sum(run.count_seen([it]) for it in TEXTS) == 12
    with pytest.raises(ValueError, match="a column of the rows that it was trained on"):
        evaluate_run(tmp_path / "told", EvaluateSettings(data=str(folder / "text.txt")))


def test_a_stopped_run_resumes_to_the_same_weights(folder, whole, tmp_path, monkeypatch):
    chosen, advance = settings(folder, held_out=0.0), Display.advance

    def stop_at_two(display, step):
        advance(display, step)
        if step == 2:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Display, "advance", stop_at_two)
        with pytest.raises(KeyboardInterrupt):
            distill(chosen, tmp_path / "run")
    distill(chosen, tmp_path / "run", resume=True)
    resumed = weights_of(tmp_path / "run")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_other_log_probabilities_are_refused_on_resume(folder, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_bytes((folder / "rows.jsonl").read_bytes())
    chosen = settings(folder, data=str(data), max_steps=1)
    distill(chosen, tmp_path / "run")
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    rows[0][COLUMN][3][0] -= 0.5
    write_rows(data, rows)
    longer = dataclasses.replace(chosen, max_steps=2)
    with pytest.raises(ValueError, match="resume: the inputs differ .* teacher"):
        distill(longer, tmp_path / "run", resume=True)


def test_held_out_rows_may_come_from_another_file(folder, tmp_path):
    rows = (folder / "rows.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "train.jsonl").write_text("".join(rows[:8]))
    (tmp_path / "held.jsonl").write_text("".join(rows[8:]))
    how = {"data": str(tmp_path / "train.jsonl"), "eval_data": str(tmp_path / "held.jsonl")}
    result = distill(settings(folder, **how), tmp_path / "run").result
    assert result["held_out_loss"] > 0
    write_rows(tmp_path / "held.jsonl", [{"text": "one two"}])
    with pytest.raises(ValueError, match=r"eval_data: teacher: .*held\.jsonl, line 1 has no col"):
        distill(settings(folder, **how), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_dry_run_describes_the_column(folder):
    lines = dry_run(settings(folder)).lines
    assert lines["teacher"].startswith(f"log-probabilities of {ROWS} rows, sha256 ")


def test_the_command_line_and_a_file_of_settings_take_a_column(folder, tmp_path):
    keys = {"teacher": f"data:{COLUMN}", "student": str(folder / "student"), "max_steps": 1}
    keys |= {"data": str(folder / "texts.jsonl"), "divergence": "kl", "device": "cpu"}
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(keys), encoding="utf-8")
    flags = ["--max-length", "31", "--batch-size", "2", "--out", str(tmp_path / "run")]
    assert cli.main(["distill", "--config", str(tmp_path / "settings.yaml"), *flags]) == 0
    assert Run.open(tmp_path / "run").settings["teacher"] == f"data:{COLUMN}"


def test_a_capture_is_read_with_its_compression(folder, whole, tmp_path):
    how = {"d": material.VOCAB, "k": K, "exact_k": K, "delta_encoding": False}
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    bits = 9  # of 300 tokens

    def packed(tokens):
        digits = "".join(f"{it:0{bits}b}" for it in tokens)
        digits += "0" * (-len(digits) % 8)
        return [int(digits[at : at + 8], 2) for at in range(0, len(digits), 8)]

    captures = []
    for row in rows:
        values, index = (row[it][1:] for it in (COLUMN, "target_token_ids"))
        logp = [[*torch.tensor(it).view(torch.uint8).tolist()] for it in values]
        capture = {"compressed_logprobs": logp, "bytepacked_indices": [*map(packed, index)]}
        captures.append({name: row[name] for name in ("input_ids", "labels")} | capture)
    write_rows(tmp_path / "rows.jsonl", captures)
    (tmp_path / "how.yaml").write_text(yaml.safe_dump(how), encoding="utf-8")
    kept = {"data": str(tmp_path / "rows.jsonl"), "teacher": "data:compressed_logprobs"}
    kept |= {"teacher_compression": str(tmp_path / "how.yaml"), "held_out": 0.0}
    distill(settings(folder, **kept), tmp_path / "run")
    for name, values in weights_of(tmp_path / "run").items():
        torch.testing.assert_close(values, whole[name], rtol=1e-4, atol=1e-5)
    (tmp_path / "how.yaml").write_text(yaml.safe_dump(how | {"bins": 3}), encoding="utf-8")
    with pytest.raises(ValueError, match="teacher_compression: .*has no entry 'bins'"):
        distill(settings(folder, **kept), tmp_path / "other")
    (tmp_path / "how.yaml").unlink()
    with pytest.raises(FileNotFoundError, match="teacher_compression: there is no file"):
        distill(settings(folder, **kept), tmp_path / "other")


SETTINGS = [
    ({"student": None, "drop_layers": "1"}, "student must be given where the teacher is a col"),
    ({"lmbda": 0.5}, "lmbda needs a teacher that reads text"),
    ({"seq_kd": True}, "seq_kd needs a teacher that reads text"),
    ({"temperature": 2.0}, "temperature must be 1 for a teacher in a column"),
    ({"divergence": "reverse-kl"}, "divergence: reverse-kl on a teacher in a column"),
    ({"cache_teacher": True}, "cache_teacher keeps hidden states"),
    ({"teacher": "data:"}, "teacher must name a column"),
    ({"teacher": "data:compressed_logprobs"}, "teacher_compression must be given"),
    ({"teacher_compression": "a.yaml"}, "teacher_compression must be given for the column"),
    ({"loss_top_k": 5}, "loss_top_k is for a teacher on a server"),
]


@pytest.mark.parametrize(("changes", "named"), SETTINGS)
def test_what_a_column_cannot_do_is_refused(folder, changes, named):
    with pytest.raises(ValueError, match=named):
        settings(folder, **changes)


def test_a_divergence_that_may_lie_in_the_rest_is_minimised_if_wanted(folder):
    assert settings(folder, divergence="reverse-kl", allow_partial=True).allow_partial


def test_a_column_is_one_teacher_and_needs_no_cache(folder):
    with pytest.raises(ValueError, match="teachers must be models"):
        settings(folder, teacher=None, teachers=(f"a=data:{COLUMN}", "b=x"))
    with pytest.raises(ValueError, match="is kept in the data already"):
        CacheSettings(teacher=f"data:{COLUMN}", data="rows.jsonl", keep="top-k=6")
    with pytest.raises(ValueError, match="teacher_compression goes with --teacher data:"):
        material.settings(folder, teacher_compression="a.yaml")


def test_a_table_of_parquet_is_read_with_its_columns(folder, tmp_path):
    arrow, parquet = (pytest.importorskip(it) for it in ("pyarrow", "pyarrow.parquet"))
    rows = read_whole_rows(folder / "rows.jsonl")
    parquet.write_table(arrow.Table.from_pylist([*rows]), tmp_path / "rows.parquet")
    assert read_whole_rows(tmp_path / "rows.parquet") == rows


def without(name):
    return lambda row: {key: value for key, value in row.items() if key != name}


DATA = [
    (without(COLUMN), {}, "teacher: .*, line 1 has no column 'target_logprobs'; it has input_ids"),
    (without("target_token_ids"), {}, "line 1 has no column 'target_token_ids'"),
    (
        lambda row: row,
        {"max_length": 8},
        "max_length must be at least 9, the tokens of ",
    ),
    (lambda row: row | {COLUMN: [-0.1] * 9}, {}, "line 1: target_logprobs must hold a list for"),
    (lambda row: row | {"labels": [5] * 9}, {}, "labels must be the tokens themselves"),
]


@pytest.mark.parametrize(("change", "changes", "named"), DATA)
def test_rows_that_do_not_fit_are_refused_before_anything_is_written(
    folder, tmp_path, change, changes, named
):
    row = json.loads((folder / "rows.jsonl").read_text().splitlines()[0])
    write_rows(tmp_path / "rows.jsonl", [change(row)])
    with pytest.raises(ValueError, match=named):
        distill(settings(folder, data=str(tmp_path / "rows.jsonl"), **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()

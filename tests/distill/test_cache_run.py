"""``rkl cache`` and ``rkl distill --teacher CACHE``: one cache, any number of runs."""

import dataclasses
import shutil

import material
import pytest
import torch
import transformers
from serving import Stub

from rkl import cli
from rkl.distill import CachedTeacher, evaluate_run, load_model, load_tokenizer
from rkl.distill.cache_run import CacheSettings, dry_run_cache, write_cache
from rkl.distill.evaluate import EvaluateSettings
from rkl.distill.run import distill
from rkl.runs import Run

HOW = {"max_length": 16, "batch_size": 2, "eval_blocks": 3, "device": "cpu"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("cache-run")
    material.write(path)
    (path / "text.txt").write_text(material.TEXT[:2000], encoding="utf-8")
    return path


def settings(folder, **changes) -> CacheSettings:
    named = {"teacher": str(folder / "teacher"), "data": str(folder / "text.txt")}
    return CacheSettings(**named | HOW | changes)


@pytest.fixture(scope="module")
def cached(folder):
    write_cache(settings(folder), folder / "cache")
    return folder / "cache"


def run_from(folder, teacher, **changes):
    return dataclasses.replace(material.settings(folder, **changes), teacher=str(teacher))


def losses(path):
    return [row.get("loss", row.get("eval_loss")) for row in Run.open(path).metrics]


def test_a_run_from_a_cache_is_the_run_beside_the_teacher(folder, cached, tmp_path):
    how = {"max_steps": 8, "eval_every": 4}
    live = distill(run_from(folder, folder / "teacher", **how), tmp_path / "live")
    told = distill(run_from(folder, cached, **how), tmp_path / "told")
    assert losses(tmp_path / "live") == losses(tmp_path / "told")
    one, other = (load_model(it.path).state_dict() for it in (live, told))
    assert all(torch.equal(one[name], other[name]) for name in one)
    record = Run.open(tmp_path / "told").record
    assert [*record["inputs"]["teacher"]["files"]] == ["index.json"]
    (tmp_path / "other.txt").write_text("Something that nobody has read. " * 20, encoding="utf-8")
    with pytest.raises(ValueError, match="a cache of the rows that it was trained on"):
        evaluate_run(tmp_path / "told", EvaluateSettings(data=str(tmp_path / "other.txt")))


@pytest.mark.parametrize("keep", ["top-k=300", "sampled=64"])
def test_a_run_from_atoms_learns(keep, folder, tmp_path):
    write_cache(settings(folder, keep=keep), tmp_path / "cache")
    how = {"max_steps": 8, "eval_every": 4, "divergence": "kl"}
    told = distill(run_from(folder, tmp_path / "cache", **how), tmp_path / "told")
    live = distill(run_from(folder, folder / "teacher", **how), tmp_path / "live")
    close = 1e-3 if keep == "top-k=300" else 0.1
    assert told.result["held_out_loss"] == pytest.approx(live.result["held_out_loss"], rel=close)


@pytest.mark.filterwarnings("ignore:teacher gives the")
def test_a_server_can_be_kept(folder, tmp_path):
    served = Stub(
        load_model(folder / "teacher").eval(), load_tokenizer(folder / "teacher"), "sglang"
    )
    with served.listening() as url:
        how = {"teacher": url, "student": str(folder / "student"), "keep": "top-k=20"}
        cached = write_cache(settings(folder, **how), tmp_path / "cache")
        asked = len(served.asked)
    assert len(cached) > 10
    assert served.asked[-1][2]["top_logprobs_num"] == 20
    distill(run_from(folder, tmp_path / "cache", divergence="kl"), tmp_path / "run")
    assert len(served.asked) == asked  # by the run no more


def test_before_it_starts_it_says_what_it_takes_and_when_it_pays(folder, tmp_path, capfd):
    write_cache(settings(folder), tmp_path / "cache")
    told = capfd.readouterr().err
    assert "keeps     hidden: 64 bytes a token" in told
    assert "of the head" in told
    assert "pays      with" in told
    estimated = dry_run_cache(settings(folder, keep="top-k=8"))
    assert estimated.bytes_per_token == 64
    assert estimated.size == 64 * CachedTeacher(tmp_path / "cache").record["tokens"]
    assert estimated.pays_after > 1
    half = dry_run_cache(settings(folder, stored="bfloat16"))
    assert half.bytes_per_token == 32


def test_a_cache_and_its_runs_agree_on_the_length_that_nobody_chose(folder, tmp_path):
    teacher = tmp_path / "teacher"  # which reads fewer tokens than the student
    material.model(1, 8, seed=3, n_positions=24).save_pretrained(teacher)
    material.tokenizer().save_pretrained(teacher)
    made = write_cache(settings(folder, teacher=str(teacher), max_length=None), tmp_path / "cache")
    assert made.record["made"]["max_length"] == 24
    run = distill(run_from(folder, tmp_path / "cache", max_length=None), tmp_path / "run")
    assert Run.open(run.path).settings["max_length"] == 24


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"max_length": 12}, r"blocks are not in the cache .* made with max_length=16, packing"),
        ({"seed": 3, "eval_blocks": None}, "blocks are not in the cache"),
        ({"student": None, "drop_layers": "0"}, "student must be given where the teacher is a ca"),
        ({"cache_teacher": True}, "is a cache already; got True"),
        ({"loss_top_k": 3}, "loss_top_k is for a teacher on a server"),
        ({"lmbda": 0.5, "max_completion_length": 8}, "lmbda: a CachedTeacher holds the rows"),
    ],
)
def test_a_run_that_the_cache_is_not_of_is_refused(changes, named, folder, cached, tmp_path):
    with pytest.raises(ValueError, match=named):
        distill(run_from(folder, cached, **changes), tmp_path / "run")


def bloom(folder, seed):
    """A model that mixes rows of one block, in a folder."""
    torch.manual_seed(seed)
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    sizes = {"vocab_size": material.VOCAB, "hidden_size": 16, "n_layer": 1, "n_head": 2}
    config = transformers.BloomConfig(**sizes, **ends, initializer_range=0.3)
    transformers.BloomForCausalLM(config).save_pretrained(folder)
    material.tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def short_rows(folder):
    """A file of rows that share blocks."""
    lines = (folder / "rows.jsonl").read_text().splitlines()
    short = [it for it in lines if len(it) < 40][:30]
    (folder / "short.jsonl").write_text("\n".join(short) + "\n")
    return str(folder / "short.jsonl")


def test_a_teacher_that_mixes_rows_is_cached_with_rows_apart(folder, short_rows, tmp_path):
    teacher = bloom(tmp_path / "bloom", 1)
    words = "packing: rows get a block each, for the teacher mixes them"
    with pytest.warns(UserWarning, match=words):
        cached = write_cache(
            settings(folder, teacher=teacher, data=short_rows), tmp_path / "cache"
        )
    assert cached.needs_rows_apart
    told = distill(run_from(folder, cached.path, data=short_rows), tmp_path / "told")
    with pytest.warns(UserWarning, match=words):
        live = distill(run_from(folder, teacher, data=short_rows), tmp_path / "live")
    assert told.result["held_out_loss"] == pytest.approx(live.result["held_out_loss"], rel=1e-5)


def test_a_student_that_mixes_rows_is_refused_a_cache_of_packed_rows(folder, short_rows, tmp_path):
    write_cache(settings(folder, data=short_rows), tmp_path / "cache")
    student = bloom(tmp_path / "bloom", 2)
    changed = run_from(folder, tmp_path / "cache", data=short_rows, student=student)
    with (
        pytest.warns(UserWarning, match="for the student mixes them"),
        pytest.raises(ValueError, match="blocks are not in the cache"),
    ):
        distill(changed, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_student_with_other_tokens_is_refused(folder, cached, tmp_path, tiny_tokenizer):
    other = tmp_path / "student"
    material.model(1, 8, seed=2).save_pretrained(other)
    tiny_tokenizer(300).save_pretrained(other)
    with pytest.raises(ValueError, match="was made with another tokenizer"):
        distill(run_from(folder, cached, student=str(other)), tmp_path / "run")


def test_the_command_line_makes_a_cache_and_trains_from_it(folder, tmp_path, capsys):
    words = ["--data", str(folder / "text.txt"), "--max-length", "16", "--device", "cpu"]
    making = ["cache", "--teacher", str(folder / "teacher"), *words]
    out = ["--out", str(tmp_path / "cache")]
    assert cli.main([*making, *out, "--dry-run"]) == 0
    assert "bytes a token" in capsys.readouterr().out
    assert not (tmp_path / "cache").exists()
    assert cli.main([*making, *out]) == 0
    assert "Train with: rkl distill --teacher" in capsys.readouterr().out
    assert cli.main([*making, *out]) != 0
    assert "--resume to go on with it, --overwrite to replace it" in capsys.readouterr().err
    assert cli.main([*making, *out, "--resume"]) == 0
    assert cli.main([*making, *out, "--overwrite", "--keep", "top-k=4"]) == 0
    assert not (tmp_path / "cache" / "head.safetensors").exists()
    run = ["distill", "--teacher", str(tmp_path / "cache"), "--student", str(folder / "student")]
    run += [*words, "--max-steps", "2", "--out", str(tmp_path / "run"), "--divergence", "akl"]
    assert cli.main(run) != 0
    assert "on a teacher known by the 4 likeliest atoms" in capsys.readouterr().err


def test_an_unfinished_cache_names_the_flag(folder, cached, tmp_path):
    shutil.copytree(cached, tmp_path / "cache")
    (tmp_path / "cache" / "index.json").unlink()
    with pytest.raises(ValueError, match=r"is not finished. Go on with .*, and --resume"):
        distill(run_from(folder, tmp_path / "cache"), tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"keep": "all"}, "keep must be hidden, top-k=64 or sampled=50"),
        ({"stored": "float16"}, "stored must be one of float32, bfloat16"),
        ({"teacher": "http://127.0.0.1:9/v1"}, "keep must be a top k, such as top-k=64, of a"),
        ({"max_length": 1}, "max_length must be at least 2"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, named, folder):
    with pytest.raises(ValueError, match=named):
        settings(folder, **changes)


def test_a_folder_that_is_no_cache_is_not_written_to(folder, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for how in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(FileExistsError, match="is there, and is no cache"):
            write_cache(settings(folder), tmp_path, **how)

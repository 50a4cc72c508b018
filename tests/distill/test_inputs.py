"""A distillation goes on only with what it was begun with, and finds it from any folder."""

import json
import shutil
import signal

import material
import pytest
import torch
from safetensors.torch import load_file, save_file

from rkl.distill import distill, load_model
from rkl.distill.evaluate import EvaluateSettings, evaluate, evaluate_run
from rkl.distill.models.loading import model_input
from rkl.distill.progress import Display
from rkl.distill.run import inputs_of, load, load_run
from rkl.distill.text.sources import read_rows
from rkl.runs import Run
from rkl.runs.integrity import sha256_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with teacher, student, text.txt and rows.jsonl, which tests only read."""
    path = tmp_path_factory.mktemp("material")
    material.write(path)
    return path


@pytest.fixture
def begun(folder, tmp_path, monkeypatch):
    """A copy of the material, with a run there that was interrupted in its first step."""
    place = tmp_path / "place"
    shutil.copytree(folder, place)
    advance = Display.advance

    def arrive(display, at):
        advance(display, at)
        if at == 1:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(Display, "advance", arrive)
        with pytest.raises(KeyboardInterrupt):
            distill(material.settings(place), place / "run")
    return place


def replace_teacher(place):
    material.model(2, 16, seed=7).save_pretrained(place / "teacher")


def replace_student(place):
    material.model(1, 8, seed=7).save_pretrained(place / "student")


def replace_text(place):
    (place / "text.txt").write_text(material.TEXT.replace("assert", "affirm"), encoding="utf-8")


def replace_template(place):
    (place / "student" / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (replace_teacher, "teacher .*model.safetensors: sha256 was"),
        (replace_student, "student .*model.safetensors: sha256 was"),
        (replace_text, "data .*sha256 was"),
        (replace_template, "student .*chat_template.jinja was not there"),
    ],
)
def test_what_was_replaced_at_its_place_is_named_when_a_run_resumes(begun, change, named):
    change(begun)
    before = (begun / "run" / "run.json").read_bytes()
    with pytest.raises(
        ValueError, match=f"resume: the inputs differ from those .*{named}"
    ) as refused:
        distill(material.settings(begun), begun / "run", resume=True)
    said = [word for word in str(refused.value).split() if len(word) in (12, 64)]
    assert len(set(said)) == len(said)  # no digest is shown as changed to itself
    assert (begun / "run" / "run.json").read_bytes() == before


def test_a_run_goes_on_with_copies_in_another_place(begun, tmp_path):
    shutil.copytree(begun, tmp_path / "moved")
    settings = material.settings(tmp_path / "moved")
    shutil.rmtree(begun / "teacher")
    distill(settings, tmp_path / "moved" / "run", resume=True)
    record = Run.open(tmp_path / "moved" / "run").record
    assert record["status"] == "finished"
    assert record["settings"]["teacher"] == str(tmp_path / "moved" / "teacher")


def test_run_json_holds_the_digest_of_every_input(begun):
    inputs = Run.open(begun / "run").record["inputs"]
    assert inputs.keys() == {"teacher", "student", "data", "held-out text", "tokens of data"}
    weights = begun / "teacher" / "model.safetensors"
    assert inputs["teacher"]["files"]["model.safetensors"] == {
        "sha256": sha256_of(weights),
        "size": weights.stat().st_size,
    }
    assert inputs["teacher"]["path"] == str(begun / "teacher")
    assert {"sha256", "size", "mtime_ns", "inode"} <= inputs["data"].keys()


def test_other_held_out_text_is_other_input(folder, tmp_path):
    text = tmp_path / "held.txt"
    text.write_text(material.TEXT, encoding="utf-8")
    found = []
    for _ in range(2):
        settings = material.settings(folder, eval_data=str(text))
        found.append(inputs_of(settings, load(settings)[0]))
        text.write_text(material.TEXT.replace("the", "eht"), encoding="utf-8")
    differing = {name for name in found[0] if found[0][name]["sha256"] != found[1][name]["sha256"]}
    assert differing == {"held-out text", "tokens of data"}


def test_names_are_kept_resolved_and_found_from_any_folder(folder, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path / "made")
    monkeypatch.chdir(tmp_path / "made")
    settings = material.settings(folder, teacher="teacher", student="student", data="text.txt")
    distill(settings, "run")
    kept = Run.open("run").settings
    assert [kept[it] for it in ("teacher", "student", "data")] == [
        str((tmp_path / "made" / it).resolve()) for it in ("teacher", "student", "text.txt")
    ]
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    asked = EvaluateSettings(str(folder / "rows.jsonl"), prompts=0, max_blocks=2, device="cpu")
    with pytest.warns(UserWarning, match="were trained on"):
        evaluate_run(tmp_path / "made" / "run", asked)
    (tmp_path / "made" / "teacher").rename(tmp_path / "elsewhere")
    with (
        pytest.warns(UserWarning, match="were trained on"),
        pytest.raises(FileNotFoundError, match=r"no longer there.*--teacher FOLDER"),
    ):
        evaluate_run(tmp_path / "made" / "run", asked)
    material.model(2, 16, seed=7).save_pretrained(tmp_path / "made" / "teacher")
    with (
        pytest.warns(UserWarning, match="were trained on"),
        pytest.raises(ValueError, match=r"teacher: the inputs .*tokenizer.json is gone"),
    ):
        evaluate_run(tmp_path / "made" / "run", asked)


def test_a_name_from_an_older_run_is_not_looked_up_on_the_hub(folder, tmp_path):
    distill(material.settings(folder), tmp_path / "run")
    path = tmp_path / "run" / "run.json"
    record = json.loads(path.read_text("utf-8"))
    record["settings"]["teacher"] = "teacher-of-mine"
    del record["inputs"]
    path.write_text(json.dumps(record), encoding="utf-8")
    asked = EvaluateSettings(str(folder / "rows.jsonl"), prompts=0, device="cpu")
    with (
        pytest.warns(UserWarning, match="were trained on"),
        pytest.raises(FileNotFoundError, match="--teacher hub:teacher-of-mine"),
    ):
        evaluate_run(tmp_path / "run", asked)


@pytest.mark.parametrize("name", ["./teacher", "~/teacher", "/no/teacher", "a/b/c", "made/llama"])
def test_what_looks_like_a_path_is_not_asked_for_on_the_hub(tmp_path, monkeypatch, name):
    (tmp_path / "made").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)
    with pytest.raises(FileNotFoundError, match="model: there is no"):
        load_model(name)
    with pytest.raises(FileNotFoundError, match="data: there is no"):
        read_rows(name)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused_by_file_and_tensor(folder, tmp_path, bad):
    shutil.copytree(folder / "teacher", tmp_path / "teacher")
    file = tmp_path / "teacher" / "model.safetensors"
    tensors = load_file(file)
    tensors["transformer.h.1.mlp.c_fc.weight"][3, 2] = bad
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.safetensors .*transformer\.h\.1\.mlp\.c_fc"):
        load_model(tmp_path / "teacher")
    with pytest.raises(ValueError, match="NaN or infinite"):
        distill(material.settings(folder, teacher=str(tmp_path / "teacher")), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_nan_logits_are_named_and_no_loss_is_promised(tiny_model, tiny_rows):
    student, teacher = tiny_model(seed=1), tiny_model(seed=2)
    with torch.no_grad():
        student.transformer.wte.weight[5:] = torch.nan
    with (
        pytest.warns(UserWarning, match="NaN.*Nothing can be computed") as warned,
        pytest.raises(FloatingPointError, match="student: its logits are NaN"),
    ):
        evaluate(student, teacher, tiny_rows())
    assert not any("same loss" in str(it.message) for it in warned)


def test_an_adapter_counts_with_the_model_below_it(folder, tmp_path):
    adapter = {"base_model_name_or_path": str(folder / "student")}
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter), encoding="utf-8")
    assert "student/model.safetensors" in model_input(tmp_path)["files"]


def test_a_flipped_bit_in_any_file_of_a_distillation_is_named(folder, tmp_path):
    distill(material.settings(folder), tmp_path / "run")
    run = Run.open(tmp_path / "run")
    listed = [name for name in run.files if name != "run.json"]
    assert all(run.files[name]["sha256"] for name in listed)
    assert {"model.safetensors", "rows.bin", "metrics.jsonl", "README.md"} <= {*listed}
    assert any(name.startswith("checkpoints/") for name in listed)
    for name in listed:
        file = tmp_path / "run" / name
        whole = file.read_bytes()
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(ValueError, match=f"{name}: sha256 was"):
            run.verify()
        if name in ("model.safetensors", "config.json", "tokenizer.json"):
            with pytest.raises(ValueError, match=f"{name}: sha256 was"):
                load_run(tmp_path / "run")
        file.write_bytes(whole)

"""Which weights of a folder are read: one rule for student, teacher, digest and resumption."""

import importlib.util
import json
import shutil
from pathlib import Path

import material
import pytest
import torch

from rkl.distill import distill, load_model, load_tokenizer
from rkl.distill.models.loading import is_adapter, model_input
from rkl.distill.text.sources import read_rows

IDS = torch.tensor([[3, 4, 5, 6]])
WEIGHTS = {  # a file of weights of each kind that transformers or peft knows
    "model.safetensors": b"",
    "model-00001-of-00002.safetensors": b"",
    "pytorch_model.bin": b"",
    "any.gguf": b"",
}


@pytest.fixture
def folder(tmp_path):
    material.write(tmp_path)
    return tmp_path


def describe_adapter(folder, base):
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    return folder


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.mark.parametrize("of_adapter", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("whole", WEIGHTS)
def test_a_model_beside_an_adapter_is_refused_by_name(folder, whole, of_adapter):
    mixed = folder / "mixed"
    shutil.copytree(folder / "student", mixed)
    (mixed / "model.safetensors").unlink()
    (mixed / whole).write_bytes(WEIGHTS[whole])
    describe_adapter(mixed, folder / "student").joinpath(of_adapter).touch()
    for read in (load_model, load_tokenizer, is_adapter, model_input):
        with pytest.raises(ValueError, match=rf"holds a model \({whole}\) and an adapter \(adap"):
            read(mixed)


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_a_run_refuses_it_before_anything_is_written(folder, role):
    describe_adapter(folder / role, folder / "student")
    with pytest.raises(ValueError, match="cannot be told which is meant"):
        distill(material.settings(folder), folder / "run")
    assert not (folder / "run").exists()


def test_an_adapter_that_appears_in_a_model_s_folder_is_refused_when_a_run_is_resumed(folder):
    distill(material.settings(folder), folder / "run")
    describe_adapter(folder / "student", folder / "teacher")
    with pytest.raises(ValueError, match="cannot be told which is meant"):
        distill(material.settings(folder, max_steps=6), folder / "run", resume=True)


def test_weights_in_one_file_beside_those_in_several_are_refused(folder):
    one, several = folder / "student", folder / "several"
    expected = logits(load_model(one))
    load_model(one).save_pretrained(several, max_shard_size="5KB")
    assert len([*several.glob("model-*.safetensors")]) > 1
    assert torch.equal(logits(load_model(several)), expected)
    shutil.copy(folder / "teacher/model.safetensors", several)
    with pytest.raises(ValueError, match=r"one file .* and one in several .*cannot be told"):
        load_model(several)
    # An index of the single file says nothing else.
    index = json.dumps({"weight_map": {"lm_head.weight": "model.safetensors"}})
    (one / "model.safetensors.index.json").write_text(index)
    assert torch.equal(logits(load_model(one)), expected)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "a.gguf"]
)
def test_weights_that_are_not_read_are_named(folder, name):
    expected = logits(load_model(folder / "student"))
    (folder / "student" / name).write_bytes(b"other weights")
    with pytest.warns(UserWarning, match=f"also holds {name}, which is not read"):
        assert torch.equal(logits(load_model(folder / "student")), expected)


def test_a_base_that_may_be_one_of_two_is_refused(folder, monkeypatch):
    adapter = describe_adapter(folder / "adapter", "student")
    shutil.copytree(folder / "teacher", adapter / "student")
    monkeypatch.chdir(folder / "teacher")
    assert is_adapter(adapter)  # the base beside it, wherever rkl is called
    assert "student/model.safetensors" in model_input(adapter)["files"]
    monkeypatch.chdir(folder)
    for read in (load_model, load_tokenizer, is_adapter, model_input):
        with pytest.raises(ValueError, match=r"student, which is .*student or .*adapter/student"):
            read(adapter)


@pytest.mark.parametrize("ring", [1, 2, 3])
def test_adapters_that_are_each_other_s_base_are_refused(tmp_path, ring):
    for number in range(ring):
        describe_adapter(tmp_path / f"a{number}", tmp_path / f"a{(number + 1) % ring}")
    with pytest.raises(
        ValueError, match=r"which is that adapter itself; expected a model"
    ) as told:
        load_model(tmp_path / "a0")
    assert len(str(told.value)) < 400


def test_an_adapter_whose_base_has_gone_is_refused_by_name(folder):
    pytest.importorskip("peft")
    adapter = describe_adapter(folder / "adapter", folder / "gone")
    (adapter / "adapter_model.safetensors").touch()
    with pytest.raises(FileNotFoundError, match=r"holds an adapter of .*gone, which cannot be"):
        load_model(adapter)


@pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="needs gguf")
def test_nothing_beside_a_gguf_file_counts(folder, monkeypatch):
    monkeypatch.setattr("rkl.distill.models.loading.AutoTokenizer", Recorder)
    place = describe_adapter(folder / "student", folder / "teacher")
    (place / "a.gguf").write_bytes(b"GGUF")
    loaded = load_tokenizer(place / "a.gguf")
    assert Recorder.seen == ["a.gguf"]
    assert loaded.name_or_path == str(place)
    assert set(model_input(place / "a.gguf")["files"]) == {"a.gguf"}


class Recorder:
    seen: list

    @classmethod
    def from_pretrained(cls, folder, *, gguf_file, **how):
        cls.seen = sorted(it.name for it in Path(folder).iterdir())
        return material.tokenizer()


def test_a_name_on_the_hub_is_never_a_folder_of_this_name(folder, monkeypatch):
    asked = []

    def download(name, **how):
        asked.append(name)
        return str(folder / "teacher")

    monkeypatch.setattr("rkl.distill.models.loading.snapshot_download", download)
    monkeypatch.chdir(folder)
    shutil.copytree("student", "owner/student")
    model = load_model("hub:owner/student")
    assert asked == ["owner/student"]
    assert torch.equal(logits(model), logits(load_model("teacher")))
    assert model.name_or_path == "owner/student"
    told = model_input("hub:owner/student")
    assert (told["local"], told["hub"], told["files"]) == (False, "owner/student", {})
    with pytest.raises(ValueError, match="owner/student lies here, and would be read in place"):
        read_rows("hub:owner/student")

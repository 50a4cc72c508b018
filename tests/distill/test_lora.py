"""Adapters by a flag: what is refused, and what the folder of such a run is good for."""

import json

import material
import pytest
import torch
from safetensors.torch import load_file

import rkl
from rkl.cli import main
from rkl.distill import distill, load_model
from rkl.distill.models import lora
from rkl.distill.plan import dry_run
from rkl.distill.prepare import load, make_trainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("material")
    material.write(path)
    return path


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"lora_rank": 0}, "lora_rank must be at least 1; got 0"),
        ({"lora_targets": "c_attn"}, "lora_targets needs lora_rank"),
        ({"lora_rank": 2, "lora_targets": "a,,b"}, "lora_targets must be names of modules"),
        ({"report_to": "weights"}, "report_to must be none or of .*tensorboard.*got 'weights'"),
    ],
)
def test_settings_that_cannot_be_are_refused(folder, changes, named):
    with pytest.raises(ValueError, match=named):
        material.settings(folder, **changes)


def test_a_missing_package_is_named_before_anything_is_read_or_written(
    folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(lora.importlib.util, "find_spec", lambda name: None)
    settings = material.settings(folder, lora_rank=2, data=str(folder / "none.txt"))
    with pytest.raises(ModuleNotFoundError, match=r"lora_rank: .*pip install 'rkl\[peft\]'"):
        distill(settings, tmp_path / "run")
    settings = material.settings(folder, report_to="comet_ml", data=str(folder / "none.txt"))
    with pytest.raises(ModuleNotFoundError, match="report_to: comet_ml .*pip install comet_ml"):
        distill(settings, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_old_peft_is_refused_only_where_transformers_saves_the_adapters(
    folder, tiny_model, tiny_trainer, tiny_rows, monkeypatch
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: "there")
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.18.0")
    lora.check_installed()  # these adapters are saved by peft's own wrapper
    student = tiny_model()
    student._hf_peft_config_loaded = True
    with pytest.raises(ImportError, match=r"peft .* or newer; got peft 0\.18\.0"):
        tiny_trainer(student, tiny_model(seed=1), tiny_rows())


def test_metrics_go_nowhere_else_unless_asked(folder, tmp_path, monkeypatch):
    there = "rkl.distill.prepare.get_available_reporting_integrations"
    monkeypatch.setattr(there, lambda: ["wandb"])
    made = []

    class Stopped(Exception):  # noqa: N818
        pass

    def config(*given, **settings):
        made.append(settings["report_to"])
        raise Stopped

    monkeypatch.setattr("rkl.distill.prepare.DistillConfig", config)
    for report_to in ("none", "wandb"):
        settings = material.settings(folder, report_to=report_to)
        with pytest.raises(Stopped):
            make_trainer(settings, tmp_path, *load(settings))
    assert made == ["none", ["wandb"]]


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.arange(3, 12)[None]).logits


@pytest.fixture(scope="module")
def finished(folder):
    pytest.importorskip("peft")
    settings = material.settings(folder, lora_rank=2, lora_targets="c_attn,c_fc", max_steps=3)
    distill(settings, folder / "run")
    return folder / "run"


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")  # peft's use of transformers
def test_a_run_with_adapters_holds_them_apart_and_a_model_that_loads_without_peft(
    folder, finished
):
    peft = pytest.importorskip("peft")
    kept = load_model(finished)
    assert type(kept).__name__ == "GPT2LMHeadModel"
    assert not (finished / "adapter_config.json").exists()
    student = load_model(folder / "student")
    before = logits(student)
    adapted = peft.PeftModel.from_pretrained(student, str(finished / "adapter"))
    assert torch.allclose(logits(adapted), logits(kept), atol=1e-5)
    assert (logits(kept) - before).abs().max() > 1e-3
    ranks = {
        len(it)
        for name, it in load_file(finished / "adapter/adapter_model.safetensors").items()
        if "lora_A" in name
    }
    assert ranks == {2}
    config = json.loads((finished / "adapter/adapter_config.json").read_text())
    assert (config["lora_alpha"], set(config["target_modules"])) == (4, {"c_attn", "c_fc"})
    # Weights without adapters are those of the student.
    whole, original = (
        load_file(it / "model.safetensors") for it in (finished, folder / "student")
    )
    same = {name for name in original if torch.equal(whole[name], original[name])}
    assert same == {it for it in original if not it.endswith(("c_attn.weight", "c_fc.weight"))}


def test_a_run_with_adapters_is_evaluated_generates_and_is_verified(finished, folder, capsys):
    (folder / "other.jsonl").write_text('{"text": "some other text that nobody has seen"}\n' * 3)
    data = ["--data", str(folder / "other.jsonl"), "--device", "cpu"]
    assert main(["evaluate", str(finished), *data, "--split", "train", "--prompts", "0"]) == 0
    out = str(folder / "replies.jsonl")
    more = ["--prompts", "2", "--max-new-tokens", "3", "--out", out]
    assert main(["generate", str(finished), *data, *more]) == 0
    assert rkl.load(finished, verify=True) is not None
    capsys.readouterr()


def test_a_run_with_adapters_resumes_to_the_same_bits(folder, tmp_path):
    pytest.importorskip("peft")
    how = {"lora_rank": 2, "save_every": 1, "eval_every": 1}
    distill(material.settings(folder, **how, max_steps=4), tmp_path / "whole")
    distill(
        material.settings(folder, **how, max_steps=2, learning_rate_schedule="constant"),
        tmp_path / "run",
    )
    distill(
        material.settings(folder, **how, max_steps=4, learning_rate_schedule="constant"),
        tmp_path / "run",
        resume=True,
    )
    distill(
        material.settings(folder, **how, max_steps=4, learning_rate_schedule="constant"),
        tmp_path / "once",
    )
    names = "model.safetensors", "adapter/adapter_model.safetensors"
    for name in names:
        first, second = (load_file(tmp_path / it / name) for it in ("run", "once"))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_pruned_student_with_adapters_is_kept_merged_alone(folder, tmp_path):
    pytest.importorskip("peft")
    settings = material.settings(folder, student=None, drop_layers="1", lora_rank=2, max_steps=2)
    distill(settings, tmp_path / "run")
    assert load_model(tmp_path / "run").config.n_layer == 1
    assert not (tmp_path / "run/adapter").exists()
    assert "parameters" in str(dry_run(settings))


def test_targets_that_the_student_lacks_are_named(folder, tmp_path):
    pytest.importorskip("peft")
    settings = material.settings(folder, lora_rank=2, lora_targets="q_proj")
    with pytest.raises(ValueError, match=r"no module 'q_proj'; it has c_attn, c_fc, c_proj"):
        distill(settings, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_tensorboard_s_files_lie_in_the_run_and_are_its_own(folder, tmp_path):
    pytest.importorskip("tensorboardX")
    settings = material.settings(folder, report_to="tensorboard", max_steps=2)
    distill(settings, tmp_path / "run")
    events = list((tmp_path / "run/tensorboard").rglob("events*"))
    assert events
    assert events[0].stat().st_size > 100
    distill(settings, tmp_path / "run", overwrite=True)  # refused, if one were somebody else's

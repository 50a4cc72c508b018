"""Language models small enough to be made anew in every test, and what they are trained on."""

import os
import warnings

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported, just below

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from rkl.distill import DistillConfig, DistillTrainer

VOCAB = 40
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_NO_DROPOUT = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}


@pytest.fixture
def tiny_model():
    """A function that makes a small random model: tiny_model("Llama", seed=1, vocab_size=48)."""

    def make(architecture="GPT2", *, seed=0, **changes):
        torch.manual_seed(seed)
        config = getattr(transformers, f"{architecture}Config")(**_SIZES | _NO_DROPOUT | changes)
        return transformers.AutoModelForCausalLM.from_config(config)

    return make


@pytest.fixture
def tiny_rows():
    """A function that makes rows of random tokens, of random length and partly labelled."""

    def make(count=8, *, seed=0, longest=12, vocab=VOCAB):
        generator = torch.Generator().manual_seed(seed)

        def below(high, low=0):
            return int(torch.randint(low, high, (), generator=generator))

        rows = []
        for _ in range(count):
            tokens = torch.randint(3, vocab, (below(longest + 1, 3),), generator=generator)
            untrained = torch.arange(len(tokens)) < below(len(tokens) - 1)
            labels = tokens.masked_fill(untrained, -100)
            rows.append({"input_ids": tokens.tolist(), "labels": labels.tolist()})
        return rows

    return make


@pytest.fixture
def tiny_trainer(tmp_path):
    """A function that makes a trainer: tiny_trainer(student, teacher, rows, max_steps=3)."""

    def make(student, teacher, rows=None, *, out=tmp_path / "out", settings=None, **changes):
        defaults = {"use_cpu": True, "disable_tqdm": True, "log_level": "error", "max_steps": 3}
        args = DistillConfig(str(out), **defaults | changes)
        settings = {"train_dataset": rows} | (settings or {})
        return DistillTrainer(student, args, teacher=teacher, **settings)

    return make


@pytest.fixture
def tiny_tokenizer():
    """A function that makes a tokenizer of words w0, w1, ...: tiny_tokenizer(40)."""

    def make(tokens=VOCAB, *, prefix="w"):
        words = {f"{prefix}{number}": number for number in range(tokens)}
        model = Tokenizer(WordLevel(words, unk_token=f"{prefix}0"))
        model.pre_tokenizer = Whitespace()
        return transformers.PreTrainedTokenizerFast(
            tokenizer_object=model, eos_token=f"{prefix}1", pad_token=f"{prefix}2"
        )

    return make


@pytest.fixture
def tiny_lora():
    """A function that puts LoRA adapters, not 0, on a model: tiny_lora(model, ["q_proj"])."""
    peft = pytest.importorskip("peft")

    def make(model, targets, *, seed=0):
        torch.manual_seed(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft's own: it uses what transformers deprecates
            adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=targets))
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
        return adapted

    return make

"""What a run needs, small: real text, a tokenizer of it, a teacher and a student in folders."""

import json
from pathlib import Path
from pydoc_data.topics import topics

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from rkl.distill import DistillSettings

TEXT = "\n\n".join(topics[name] for name in sorted(topics))[:12_000]
VOCAB = 300
END = "<|end|>"
QUICK = {"max_steps": 4, "max_length": 16, "batch_size": 2, "learning_rate": 1e-2}
QUICK |= {"eval_blocks": 3, "device": "cpu", "compiled": False}


def tokenizer() -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, pad_token=END)


def model(layers: int, width: int, *, seed: int, **changes) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    sizes = {"vocab_size": VOCAB, "n_layer": layers, "n_embd": width, "n_head": 2}
    sizes |= {"n_positions": 32, "initializer_range": 0.3}
    return GPT2LMHeadModel(GPT2Config(**sizes | ends | changes))


def write(folder: Path) -> None:
    """Fill a folder with teacher, student, text.txt and rows.jsonl."""
    words = tokenizer()
    for name, made in {
        "teacher": model(2, 16, seed=1),
        "student": model(1, 8, seed=2),  # with dropout, which draws random numbers
    }.items():
        made.save_pretrained(folder / name)
        words.save_pretrained(folder / name)
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    rows = "".join(json.dumps({"text": part}) + "\n" for part in TEXT.split("\n\n"))
    (folder / "rows.jsonl").write_text(rows, encoding="utf-8")


def settings(folder: Path, **changes) -> DistillSettings:
    named = {"teacher": "teacher", "student": "student", "data": "text.txt"}
    paths = {name: str(folder / file) for name, file in named.items()}
    return DistillSettings(**paths | QUICK | changes)

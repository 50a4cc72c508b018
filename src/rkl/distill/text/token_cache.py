"""Blocks of tokens kept between processes, so that the same rows are tokenized once.

A dry run, the run itself, its resumption and its evaluation read the same rows. What comes out of
large data is kept in the user's cache, ``$XDG_CACHE_HOME/rkl/tokens`` or ``~/.cache/rkl/tokens``,
under a digest of all that it depends on: rows and their places, tokenizer, chat template,
settings, versions, and the source that makes the blocks. The folder may be deleted at any time.
"""

import contextlib
import datetime
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import safetensors
import tokenizers
import torch
import transformers
from transformers import PreTrainedTokenizerBase

from rkl.distill.text.encoding import encode_batch
from rkl.runs import save_tensors
from rkl.runs.files import cache_folder, sweep

MAX_SIZE = 10 * 10**9  # bytes of all files; those that were not used for longest go first
SOURCES = "data.py", "chats.py", "encoding.py", "prompts.py"  # what makes blocks of rows


def key_of(
    rows: Sequence[Any], tokenizer: PreTrainedTokenizerBase, places: Sequence[Any], **how: Any
) -> str | None:
    """A digest of all that the blocks depend on; None for a tokenizer that cannot be described.

    Args:
        rows: What is tokenized, as JSON can write it.
        tokenizer: Its tokenizer.
        places: What messages call the rows.
        how: The settings.
    """
    if not tokenizer.is_fast:
        return None
    encode_batch(tokenizer, [""], special=True)  # drops truncation and padding of earlier calls
    digest = hashlib.sha256()
    template, backend = str(tokenizer.chat_template), cast(Any, tokenizer.backend_tokenizer)
    about = [
        [transformers.__version__, tokenizers.__version__, type(tokenizer).__qualname__],
        [tokenizer.special_tokens_map, template, backend.to_str()],
        bool(getattr(tokenizer, "split_special_tokens", False)),  # not in the backend's text
        [how, places],
        str(datetime.date.today()) if "strftime_now" in template else None,
    ]
    for part in about:
        digest.update(json.dumps(part, sort_keys=True, default=str).encode() + b"\n")
    for name in SOURCES:
        digest.update(Path(__file__).with_name(name).read_bytes())
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=repr).encode() + b"\n")
    return digest.hexdigest()


def load(key: str) -> dict[str, Any] | None:
    """The values kept under a key, tensors and others; None where there are none."""
    if (path := _path(key)) is None:
        return None
    try:
        with safetensors.safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["about"])
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
        if about["digest"] != _digest(tensors):
            return None
        os.utime(path)
        return tensors | about["values"]
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError):
        return None  # not there, or damaged: it is made anew


def save(key: str, values: Mapping[str, Any]) -> None:
    """Keep values under a key, tensors or what JSON can write, where the disk lets us."""
    if (path := _path(key)) is None:
        return
    tensors = {name: it for name, it in values.items() if isinstance(it, torch.Tensor)}
    others = {name: it for name, it in values.items() if name not in tensors}
    about = json.dumps({"values": others, "digest": _digest(tensors)})
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent)
        save_tensors(path, tensors, {"about": about})
        _remove_oldest(path.parent)


def _path(key: str) -> Path | None:
    folder = cache_folder()
    return None if folder is None else folder / "tokens" / f"{key}.safetensors"


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for _, tensor in sorted(tensors.items()):
        digest.update(tensor.numpy().data)
    return digest.hexdigest()


def _remove_oldest(folder: Path) -> None:
    files = sorted(folder.glob("*.safetensors"), key=lambda it: -it.stat().st_mtime_ns)
    total = 0
    for file in files:
        total += file.stat().st_size
        if total > MAX_SIZE:
            file.unlink(missing_ok=True)

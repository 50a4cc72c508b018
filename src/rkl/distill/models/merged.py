"""Folders of PEFT adapters, read as the model that they make of their base."""

import json
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.import_utils import is_peft_available

from rkl.distill.models.heads import inference
from rkl.runs.integrity import local_path

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
OF_ADAPTER = CONFIG, "adapter_model.*"
OF_MODEL = "model*.safetensors", "model*.safetensors.index.json"
NEVER_READ = "pytorch_model*.bin", "*.gguf"  # in a folder; a .gguf file has to be named itself
_MOST = 1e-3  # of the largest logit, by which roundings of a merge change it


def base_of(folder: Path, above: Sequence[Path] = ()) -> str | None:
    """The base model of the adapters in a folder; None where it holds a model of its own.

    Args:
        folder: Where to look.
        above: Folders of adapters that lie on top of this one.

    Raises:
        ValueError: It cannot be told which weights, or which base, are meant.
    """
    _check_weights(folder)
    if not (folder / CONFIG).is_file():
        return None
    try:
        name = json.loads((folder / CONFIG).read_bytes())["base_model_name_or_path"]
    except (OSError, ValueError, TypeError, KeyError):
        name = None
    if not isinstance(name, str) or not name:
        raise ValueError(
            f"model: {folder / CONFIG} does not say which model its adapter belongs to; expected "
            "base_model_name_or_path."
        )
    here, beside = local_path(name), local_path(folder / name)
    if here is not None and beside is not None and here != beside:
        raise ValueError(
            f"model: {folder / CONFIG} names the base {name}, which is {here} or {beside}. Write "
            "the one that is meant there, as an absolute path."
        )
    base = here or beside
    if base is not None and base in (folder, *above):
        raise ValueError(
            f"model: {folder / CONFIG} names {base} as the base of its adapter, which is that "
            "adapter itself; expected a model."
        )
    if base is not None and base.is_dir():
        base_of(base, (folder, *above))
    return name if here is not None or beside is None else str(beside)


def _check_weights(folder: Path) -> None:
    """Refuse a folder in which one set of weights would win over another without a word."""

    def found(patterns: Iterable[str]) -> list[str]:
        return sorted(file.name for pattern in patterns for file in folder.glob(pattern))

    whole, adapter = found((*OF_MODEL, *NEVER_READ)), found(OF_ADAPTER)
    if whole and adapter:
        raise ValueError(
            f"model: {folder} holds a model ({whole[0]}) and an adapter ({adapter[0]}), and it "
            "cannot be told which is meant; expected one of them. Move the other elsewhere."
        )
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file() and index.is_file() and _shards(index) != {single.name}:
        raise ValueError(
            f"model: {folder} holds a model in one file ({single.name}) and one in several "
            f"({index.name}), and it cannot be told which is meant. Move one of them elsewhere."
        )


def _shards(index: Path) -> set[str]:
    """The files that an index says the weights are in."""
    try:
        return set(json.loads(index.read_bytes())["weight_map"].values())
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return set()


def unread_weights(folder: Path) -> list[str]:
    """The files of weights in a folder that are not read when the folder is."""
    return sorted(file.name for pattern in NEVER_READ for file in folder.glob(pattern))


def load_merged(
    folder: Path, base: str, load: Callable[[str], PreTrainedModel]
) -> PreTrainedModel:
    """The base model with the adapters of a folder merged into its weights, in float32.

    Transformers' own loading leaves out what it finds under another name, such as the
    magnitudes of DoRA; PEFT's does not.

    Args:
        folder: Where the adapters are.
        base: The name of their base.
        load: Loads a model of this name in float32.
    """
    if not is_peft_available():
        raise ModuleNotFoundError(
            f"model: {folder} holds an adapter of {base}, which needs peft: "
            "pip install 'rkl[peft]'"
        )
    if not (folder / WEIGHTS).is_file():
        raise FileNotFoundError(f"model: {folder} holds an adapter, but no {WEIGHTS}.")
    import peft  # pyright: ignore[reportMissingImports]: an extra

    try:
        model = load(base)
    except (OSError, ValueError) as error:
        raise type(error)(
            f"model: {folder} holds an adapter of {base}, which cannot be read ({error}) "
            f"base_model_name_or_path in its {CONFIG} says where it is."
        ) from error
    _resize(model, folder)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            adapted: Any = peft.PeftModel.from_pretrained(model, str(folder))
    except (OSError, ValueError, RuntimeError, TypeError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"model: {folder} holds an adapter that does not fit {base}: {reason:.300}"
        ) from error
    lost = [str(it.message) for it in caught if "missing adapter keys" in str(it.message)]
    if lost:
        raise ValueError(
            f"model: {folder} holds an adapter that does not fit {base}: {lost[0]:.300}"
        )
    if not hasattr(adapted.base_model, "merge_and_unload"):
        kind = getattr(adapted.peft_config["default"].peft_type, "value", "other")
        raise ValueError(
            f"model: {folder} holds an adapter of kind {kind}, which cannot be merged into the "
            "weights of its base; expected LoRA, DoRA, IA3 or another that can."
        )
    return _merge(folder, adapted)


def _merge(folder: Path, adapted: Any) -> PreTrainedModel:
    tokens = torch.tensor([[1, 2, 3]])
    with inference(adapted):
        expected = adapted(input_ids=tokens).logits
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tied embeddings, which are told apart below
        merged = adapted.merge_and_unload(safe_merge=True)
    ends = merged.get_input_embeddings(), merged.get_output_embeddings()
    if None not in ends and ends[0].weight is not ends[1].weight:
        for config in (merged.config, merged.config.get_text_config(decoder=True)):
            config.tie_word_embeddings = False  # or the head would be lost in saving
    with inference(merged):
        found = merged(input_ids=tokens).logits
    difference = (found - expected).abs().max() / expected.abs().max()
    if not difference <= _MOST:
        raise ValueError(
            f"model: {folder} holds an adapter that changes when it is merged into its base, its "
            f"logits by up to {difference:.2g} of the largest. Merge and save it yourself."
        )
    merged.name_or_path = str(folder)  # of new adapters on it this is the base
    for parameter in merged.parameters():
        parameter.requires_grad_(True)
    return merged


def _resize(model: Any, folder: Path) -> None:
    """Give the base as many tokens as embeddings that were saved with the adapters have."""
    embeddings = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    names = {f"{name}.weight" for name, it in model.named_modules() if id(it) in embeddings}
    with safe_open(folder / WEIGHTS, "pt") as file:
        rows = {
            file.get_slice(key).get_shape()[0]
            for key in file.keys()  # noqa: SIM118
            if key.removeprefix("base_model.model.") in names
        }
    found: nn.Embedding = model.get_input_embeddings()
    if len(rows) == 1 and (count := rows.pop()) != found.num_embeddings:
        model.resize_token_embeddings(count, mean_resizing=False)

"""Models without some of their layers."""

import copy
import re
from typing import Any

from torch import nn
from transformers import (
    PretrainedConfig,
    PreTrainedModel,
)


def without_layers(model: PreTrainedModel, layers: str) -> PreTrainedModel:
    """A copy of a model without some of its layers, which loads and runs as any other does.

    It is made by the class of the model from its configuration with fewer layers, so that
    layers are numbered, and lists of layer types cut, as a later ``from_pretrained`` will.

    Args:
        model: The model.
        layers: Which to leave out, counted from 0, such as "13-18" or "3,5,7-9".
    """
    path, total = _stack(model)
    dropped = parse_layers(layers, total)
    kept = [layer for layer in range(total) if layer not in dropped]
    moved = {f"{path}.{layer}.": f"{path}.{place}." for place, layer in enumerate(kept)}
    state = {}
    for name, tensor in model.state_dict().items():
        old = re.match(re.escape(path) + r"\.\d+\.", name)
        if old is None:
            state[name] = tensor.clone()  # for the copy may be trained, and the model its teacher
        elif old[0] in moved:
            state[moved[old[0]] + name.removeprefix(old[0])] = tensor.clone()
    loaded: Any = type(model).from_pretrained(
        None,
        config=_shortened(model.config, kept, total),
        state_dict=state,
        dtype=model.dtype,
        output_loading_info=True,
        trust_remote_code=False,
    )
    pruned, loading = loaded
    astray = loading["missing_keys"] | loading["unexpected_keys"] | loading["mismatched_keys"]
    if astray:
        raise NotImplementedError(
            f"drop_layers: a {type(model).__name__} of {len(kept)} layers has other weights than "
            f"these layers of {total}: {min(astray)}, for one."
        )
    pruned.generation_config = copy.deepcopy(model.generation_config)
    return pruned


def parse_layers(layers: str, total: int) -> set[int]:
    """The numbers that "3,5,7-9" means, of ``total`` layers counted from 0; both ends count.

    >>> sorted(parse_layers("3,5,7-9", 12))
    [3, 5, 7, 8, 9]
    """
    found: set[int] = set()
    for part in layers.split(","):
        ends = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if ends is None:
            raise ValueError(
                f"drop_layers must be numbers and ranges such as 13-18 or 3,5,7-9; got {layers!r}."
            )
        first, last = int(ends[1]), int(ends[2] or ends[1])
        if not first <= last < total:
            raise ValueError(
                f"drop_layers must lie between 0 and {total - 1}, ranges from low to high; "
                f"got {part.strip()!r} in {layers!r}."
            )
        if found & (some := set(range(first, last + 1))):
            raise ValueError(f"drop_layers names layer {min(found & some)} twice: {layers!r}.")
        found |= some
    if len(found) == total:
        raise ValueError(f"drop_layers must leave a layer; got all {total}: {layers!r}.")
    return found


def _stack(model: PreTrainedModel) -> tuple[str, int]:
    """The name and the length of the list of layers."""
    total = model.config.get_text_config(decoder=True).num_hidden_layers
    lists = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == total
    ]
    if len(lists) != 1:
        raise NotImplementedError(
            f"drop_layers: a {type(model).__name__} has {len(lists)} lists of {total} layers; "
            "expected one."
        )
    return lists[0], total


def _shortened(config: PretrainedConfig, kept: list[int], total: int) -> PretrainedConfig:
    """The configuration with fewer layers, every list that has an entry for each cut alike."""
    config = copy.deepcopy(config)
    text = config.get_text_config(decoder=True)
    for name, value in vars(text).items():
        if isinstance(value, list) and len(value) == total:
            setattr(text, name, [value[layer] for layer in kept])
    text.num_hidden_layers = len(kept)
    return config

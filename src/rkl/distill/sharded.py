"""Models whose weights torch's fully_shard (FSDP2) has shared among processes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def _checkpoint() -> Any:
    """What gathers and shares states out: imported by the runs that need it."""
    from torch.distributed.checkpoint import state_dict

    return state_dict


def _in_one_piece(**more: Any) -> dict[str, Any]:
    return {
        "options": _checkpoint().StateDictOptions(full_state_dict=True, cpu_offload=True, **more)
    }


def is_sharded(model: nn.Module | None) -> bool:
    """True if fully_shard has been called on the model."""
    return isinstance(model, FSDPModule)


def local(x: Tensor) -> Tensor:
    """This process's part of a tensor; all of it where it is in one piece."""
    return x.to_local() if isinstance(x, DTensor) else x


def whole(x: Tensor) -> Tensor:
    """All of a tensor that processes share, which all of them must ask for; without a gradient.

    Within the forward of its module FSDP has gathered a weight, and shares its gradient out.

    Raises:
        RuntimeError: It is asked for with gradients, which would not be those of all processes.
    """
    if not isinstance(x, DTensor):
        return x
    if torch.is_grad_enabled() and x.requires_grad:
        raise RuntimeError(
            "a weight of the head is used outside of the forward of its model, where FSDP has not "
            "gathered it: its gradient would be that of one process's tokens."
        )
    return x.full_tensor()


def whole_weights(model: nn.Module) -> dict[str, Any]:
    """The weights in one piece, on the CPU of the first process; empty elsewhere."""
    return _checkpoint().get_model_state_dict(model, **_in_one_piece())


def load_weights(model: nn.Module, folder: Path) -> None:
    """Give each process its part of the weights that ``save_pretrained`` wrote into a folder.

    Raises:
        FileNotFoundError: There are none.
        ValueError: They are those of another model.
    """
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} has no model.safetensors.")
    weights: dict[str, Any] = {}
    for file in files:
        weights |= load_file(file)
    found = _checkpoint().set_model_state_dict(model, weights, **_in_one_piece(strict=False))
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())  # saved under another name
    if wrong := [*found.unexpected_keys, *(set(found.missing_keys) - tied)]:
        raise ValueError(f"{folder} has the weights of another model: {sorted(wrong)[0]}.")


def whole_state(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """The state of an optimizer in one piece, by name, in the first process; empty elsewhere."""
    return _checkpoint().get_optimizer_state_dict(model, _plain(optimizer), **_in_one_piece())


def load_state(model: nn.Module, optimizer: Any, state: Mapping[str, Any]) -> None:
    """Give each process its part of the state of an optimizer."""
    checkpoint, how = _checkpoint(), _in_one_piece()
    checkpoint.set_optimizer_state_dict(model, _plain(optimizer), dict(state), **how)


def _plain(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer of torch within that of accelerate."""
    return getattr(optimizer, "optimizer", optimizer)

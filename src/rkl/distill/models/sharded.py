"""Models whose weights processes share: by torch's fully_shard (FSDP2), or DeepSpeed's ZeRO-3."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from rkl.distill.models import zero3
from rkl.distill.models.lora import is_adapted, without_wrapper


def _checkpoint() -> Any:
    """The functions of torch for sharded states, imported only where they are used."""
    from torch.distributed.checkpoint import state_dict

    return state_dict


def _in_one_piece(**more: Any) -> dict[str, Any]:
    return {
        "options": _checkpoint().StateDictOptions(full_state_dict=True, cpu_offload=True, **more)
    }


def is_sharded(model: object) -> bool:
    """True if fully_shard has been called on the model, or on the one within PEFT's wrapper."""
    return isinstance(without_wrapper(model), FSDPModule)


def shares_weights(model: object) -> bool:
    """True if no process has all weights of the model, so that all must run it at once."""
    return is_sharded(model) or zero3.is_partitioned(model)


def whole_by_mistake(model: nn.Module) -> str | None:
    """The name of the first trained weight of a sharded model that each process has whole.

    Its gradient would be that of one process, as of adapters put on after fully_shard.
    """
    trained = ((name, it) for name, it in model.named_parameters() if it.requires_grad)
    return next((name for name, it in trained if not isinstance(it, DTensor)), None)


def shard(model: Any, device: torch.device) -> None:
    """Share the weights of a model of transformers among all processes, in place.

    A layer (``_no_split_modules``) is gathered while it computes; what lies outside of layers,
    such as embeddings and head, during the whole forward. Of PEFT's wrapper the model within is
    shared, adapters included, for ``generate`` runs that one.

    Args:
        model: The same in each process, on any device.
        device: Of this process; each process then has its part of the weights there.
    """
    model = without_wrapper(model)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    layers = {*(getattr(model, "_no_split_modules", None) or ())}
    found = [it for it in model.modules() if it is not model and type(it).__name__ in layers]
    for module in (*reversed(found), model):  # inner modules first
        fully_shard(module, mesh=mesh, reshard_after_forward=True)


def local(x: Tensor) -> Tensor:
    """This process's part of a tensor; all of it where it is in one piece."""
    return x.to_local() if isinstance(x, DTensor) else x


def whole(x: Tensor) -> Tensor:
    """All of a tensor that processes share, which all of them must ask for; without a gradient.

    Within the forward of its module FSDP has gathered a weight, and shares its gradient out.

    Raises:
        RuntimeError: It is asked for with gradients, which would not be those of all processes.
    """
    if zero3.is_part(x):
        return zero3.whole(x)
    if not isinstance(x, DTensor):
        return x
    if torch.is_grad_enabled() and x.requires_grad:
        raise RuntimeError(
            "a weight of the head is used outside of the forward of its model, where FSDP has not "
            "gathered it: its gradient would be that of one process's tokens."
        )
    return x.full_tensor()


def local_gradient(x: Tensor) -> Tensor | None:
    """This process's part of the gradient of a weight; None without one."""
    if zero3.is_part(x):
        return zero3.local_gradient(x)
    return None if x.grad is None else local(x.grad)


def is_finite(weight: Tensor) -> bool:
    """True if no number of a weight is infinite or NaN; all processes must ask at once."""
    if zero3.is_part(weight):
        with torch.no_grad():
            return bool(zero3.whole(weight).isfinite().all())
    return bool(whole(weight.detach().isfinite().all()))


def whole_weights(model: Any) -> dict[str, Any]:
    """The weights that ``save_pretrained`` takes, in one piece, tied ones once.

    Of PEFT's wrapper these are the weights of its adapters alone.

    Returns:
        On the CPU of the first process; in the others nothing.
    """
    if zero3.is_partitioned(model):
        return _tied_once(model, zero3.whole_weights(model))
    if is_adapted(model):
        names = [name for it in model.peft_config for name in _adapter_names(model, it).values()]
        state = model.state_dict()
        weights = {name: whole(state[name].detach()).cpu() for name in names}  # all processes
        return weights if dist.get_rank() == 0 else {}
    return _tied_once(model, _checkpoint().get_model_state_dict(model, **_in_one_piece()))


def _tied_once(model: Any, state: Mapping[str, Any]) -> dict[str, Any]:
    once = {name for name, _ in model.named_parameters()}
    return {name: it for name, it in state.items() if name in once or name not in _tied(model)}


def load_weights(model: nn.Module, folder: Path) -> None:
    """Give each process its part of the weights that ``save_pretrained`` wrote into a folder.

    Raises:
        FileNotFoundError: There are none.
        ValueError: They are those of another model.
    """
    if is_adapted(model):
        _load_adapter(model, folder)
        return
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} has no model.safetensors.")
    weights: dict[str, Any] = {}
    for file in files:
        weights |= load_file(file)
    if zero3.is_partitioned(model):
        unknown = [*weights.keys() - model.state_dict().keys()]
        missing = zero3.load_weights(model, weights)
    else:
        found = _checkpoint().set_model_state_dict(model, weights, **_in_one_piece(strict=False))
        unknown, missing = found.unexpected_keys, found.missing_keys
    if wrong := [*unknown, *({*missing} - _tied(model))]:
        raise ValueError(f"{folder} has the weights of another model: {sorted(wrong)[0]}.")


def _load_adapter(model: Any, folder: Path) -> None:
    """The same of the active adapter of PEFT's wrapper."""
    name = model.active_adapter
    file = Path(folder, "" if name == "default" else name, "adapter_model.safetensors")
    if not file.is_file():
        raise FileNotFoundError(f"{folder} has no {file.relative_to(folder)}.")
    saved, names = load_file(file), _adapter_names(model, name)
    if wrong := sorted(saved.keys() ^ names.keys()):
        raise ValueError(f"{folder} has the weights of another adapter: {wrong[0]}.")
    weights = {names[key]: tensor for key, tensor in saved.items()}
    _checkpoint().set_model_state_dict(model, weights, **_in_one_piece(strict=False))


def _adapter_names(model: Any, adapter: str) -> dict[str, str]:
    """The names of an adapter's weights in the model, by those in a file of peft's."""
    import peft  # pyright: ignore[reportMissingImports]: an extra

    # peft selects among values that it passes on: here the names themselves.
    names: Any = {name: name for name in model.state_dict()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # also said when peft saves
        found: Any = peft.get_peft_model_state_dict(model, names, adapter)
    return found


def _tied(model: Any) -> set[str]:
    """Names of weights that are saved under another name."""
    return set(getattr(model, "all_tied_weights_keys", None) or ())


def whole_state(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """The state of an optimizer in one piece, by name, in the first process; empty elsewhere."""
    if zero3.is_partitioned(model):
        return zero3.whole_state(model, _plain(optimizer))
    return _checkpoint().get_optimizer_state_dict(model, _plain(optimizer), **_in_one_piece())


def load_state(model: nn.Module, optimizer: Any, state: Mapping[str, Any]) -> None:
    """Give each process its part of the state of an optimizer."""
    if zero3.is_partitioned(model):
        zero3.load_state(model, _plain(optimizer), state)
        return
    checkpoint, how = _checkpoint(), _in_one_piece()
    checkpoint.set_optimizer_state_dict(model, _plain(optimizer), dict(state), **how)


def _plain(optimizer: Any) -> Any:
    """The optimizer of torch, or DeepSpeed's, within that of accelerate."""
    return getattr(optimizer, "optimizer", optimizer)

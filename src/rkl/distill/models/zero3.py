"""Models whose weights DeepSpeed's ZeRO-3 has shared among processes."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

_SETTINGS = {  # of a configuration, under which the numbers were seen to be right
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"),
    *("gradient_clipping", "bf16", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"),
    *("steps_per_print", "wall_clock_breakdown", "comms_logger", "dump_state"),
}
_OF_ZERO = {
    *("stage", "overlap_comm", "contiguous_gradients", "reduce_scatter", "round_robin_gradients"),
    *("reduce_bucket_size", "allgather_bucket_size", "allgather_partitions", "sub_group_size"),
}


def is_part(x: object) -> bool:
    """True for a weight of which each process has a part, even while it is gathered."""
    return hasattr(x, "ds_id") and isinstance(x, Tensor)


def is_partitioned(model: object) -> bool:
    """True if ZeRO-3 has shared the weights of a model out."""
    return isinstance(model, nn.Module) and any(map(is_part, model.parameters()))


def check_plugin(plugin: Any) -> None:
    """Refuse a configuration of DeepSpeed with which nobody has seen that numbers are right.

    Args:
        plugin: accelerate's DeepSpeedPlugin.

    Raises:
        NotImplementedError: It is not ZeRO-3, or has what is not among the few settings known.
    """
    config = plugin.deepspeed_config
    zero = config["zero_optimization"]
    if zero.get("stage") != 3:
        raise NotImplementedError(
            f"deepspeed: zero_optimization.stage must be 3; got {zero.get('stage')}."
        )
    named = {f"zero_optimization.{name}": it for name, it in zero.items() if name not in _OF_ZERO}
    named = {name: it for name, it in named.items() if ".stage3_" not in name}
    named |= {it: config[it] for it in config if it not in {*_SETTINGS, "zero_optimization"}}
    for name, value in named.items():
        if not _is_off(value):
            raise NotImplementedError(
                f"deepspeed: {name} is not supported; got {value!r}. Leave it out."
            )


def _is_off(value: Any) -> bool:
    if isinstance(value, Mapping):
        return value.get("enabled") is False or value.get("device") == "none"
    return value is None or value is False


def engine_of(model: nn.Module) -> Any:
    """A model that is not trained, with its weights shared out among all processes.

    Args:
        model: The same in each process, and changed in place: it can be called as before, by all
            processes at once.

    Returns:
        DeepSpeed's engine, which must live as long as the model is used.
    """
    import deepspeed  # pyright: ignore[reportMissingImports]: not needed without it

    dtype = next(model.parameters()).dtype
    config: dict[str, Any] = {"train_micro_batch_size_per_gpu": 1, "steps_per_print": 2**31}
    config["zero_optimization"] = {"stage": 3, "stage3_param_persistence_threshold": 0}
    config["bf16"] = {"enabled": dtype == torch.bfloat16}
    config["fp16"] = {"enabled": dtype == torch.float16}
    engine, *_ = deepspeed.initialize(model=model, config=config)
    return engine


@contextlib.contextmanager
def gathered(model: Any) -> Iterator[None]:
    """While this lasts, each process has all weights of a model that none has run yet."""
    parts = [it for it in model.parameters() if is_part(it)] if is_partitioned(model) else []
    with _gathered(parts) if parts else contextlib.nullcontext():
        yield


def _gathered(parts: Any, **how: Any) -> Any:
    import deepspeed  # pyright: ignore[reportMissingImports]: not needed without it

    return deepspeed.zero.GatheredParameters(parts, **how)


def whole(x: Tensor) -> Tensor:
    """All of a weight, which all processes must ask for; within a forward it is there already.

    Raises:
        RuntimeError: It is asked for with gradients outside of the forward of its module.
    """
    part, trained = cast(Any, x), torch.is_grad_enabled() and x.requires_grad
    if part.ds_status.name == "AVAILABLE":
        return x if trained else x.detach()  # whose numbers outlive that DeepSpeed takes x apart
    if trained:
        raise RuntimeError(
            "a weight of the head is used outside of the forward of its model, where DeepSpeed "
            "has not gathered it."
        )
    with _gathered(part):
        return x.detach().clone()


def local_gradient(x: Tensor) -> Tensor | None:
    """This process's part of a step's gradient, before the update; None for a frozen weight."""
    from deepspeed.utils import (  # pyright: ignore[reportMissingImports]: not needed without it
        safe_get_local_grad,
    )

    if not x.requires_grad:
        return None
    return safe_get_local_grad(x)[: _own(x)]  # behind it lies what no other process has filled


def _own(x: Any) -> int:
    """Numbers of a weight that belong to this process, without padding."""
    size = x.ds_tensor.ds_numel
    return min(max(x.ds_numel - size * dist.get_rank(), 0), size)


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights in one piece, tied ones once, on the CPU of the first process; else empty.

    Those that a lower precision is trained from are taken in float32.
    """
    weights = {}
    for name, weight in model.named_parameters():
        with torch.no_grad():
            found = _master(weight)
            found = whole(weight) if found is None else found
        if dist.get_rank() == 0:
            weights[name] = found.detach().cpu().clone()
    if dist.get_rank() == 0:
        saved = model.state_dict().keys()  # buffers that are saved, and not those that are not
        weights |= {name: it.cpu() for name, it in model.named_buffers() if name in saved}
    return weights


def _master(weight: Any) -> Tensor | None:
    """All of the weight that the optimizer updates; None before there is one, or if frozen."""
    from deepspeed.utils import (  # pyright: ignore[reportMissingImports]: not needed without it
        safe_get_full_fp32_param,
    )

    return safe_get_full_fp32_param(weight) if _is_updated(weight) else None


def _is_updated(weight: Any) -> bool:
    return weight.requires_grad and hasattr(weight, "_z3_optimizer")


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> list[str]:
    """Give each process its part of some weights, and return the names that are not in them."""
    from deepspeed.utils import (  # pyright: ignore[reportMissingImports]: not needed without it
        safe_set_local_fp32_param,
    )

    missing = []
    for name, weight in model.named_parameters():
        if name not in weights:
            missing.append(name)
            continue
        with _gathered([weight], modifier_rank=0), torch.no_grad():
            if dist.get_rank() == 0:
                weight.copy_(weights[name])
        if _is_updated(weight):
            safe_set_local_fp32_param(weight, _part(weights[name].float(), weight))
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name in weights:
                buffer.copy_(weights[name])
    return missing


def whole_state(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """The state of an optimizer in one piece, by name, in the first process; empty elsewhere.

    In the form in which torch's ``get_optimizer_state_dict`` has it.
    """
    names = {id(weight): name for name, weight in model.named_parameters()}
    states: dict[str, Any] = {}
    for flat, weights in _groups(optimizer):
        kept, begin = optimizer.optimizer.state.get(flat, {}), 0
        for weight in weights:
            end = begin + weight.partition_numel()
            states[names[id(weight)]] = {
                key: _joined(it[begin:end], weight) if _is_flat(it, flat) else it
                for key, it in kept.items()
            }
            begin = end
    groups = []
    for group, chosen in zip(optimizer.optimizer.param_groups, _by_group(optimizer), strict=True):
        kept = {name: it for name, it in group.items() if name != "params"}
        groups.append(kept | {"params": [names[id(it)] for it in chosen]})
    return {"state": states, "param_groups": groups} if dist.get_rank() == 0 else {}


def load_state(model: nn.Module, optimizer: Any, state: Mapping[str, Any]) -> None:
    """Give each process its part of the state of an optimizer.

    Raises:
        ValueError: It is that of another model.
    """
    names = {id(weight): name for name, weight in model.named_parameters()}
    trained = {names[id(it)] for _, weights in _groups(optimizer) for it in weights}
    if wrong := sorted(trained ^ state["state"].keys()):
        raise ValueError(f"optimizer.pt has the state of another model: {wrong[0]}.")
    for flat, weights in _groups(optimizer):
        found = [state["state"][names[id(it)]] for it in weights]
        kept: dict[str, Any] = {}
        for key, value in found[0].items():
            if tuple(value.shape) == tuple(weights[0].ds_shape):
                parts = [_part(it[key], of) for it, of in zip(found, weights, strict=True)]
                kept[key] = torch.cat(parts).to(flat)
            else:
                kept[key] = value.clone()  # the number of steps
        optimizer.optimizer.state[flat] = kept
    for group, saved in zip(optimizer.optimizer.param_groups, state["param_groups"], strict=True):
        group.update({name: it for name, it in saved.items() if name != "params"})


def _groups(optimizer: Any) -> Iterator[tuple[Tensor, list[Any]]]:
    """Each flat tensor that torch's optimizer updates, and the weights whose parts it holds."""
    yield from zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True)


def _by_group(optimizer: Any) -> list[list[Any]]:
    """The weights of each group of the optimizer of torch."""
    chosen: list[list[Any]] = [[] for _ in optimizer.optimizer.param_groups]
    for number, weights in enumerate(optimizer.fp16_groups):
        chosen[optimizer.sub_group_to_group_id[number]] += weights
    return chosen


def _is_flat(x: Any, flat: Tensor) -> bool:
    return isinstance(x, Tensor) and x.shape == flat.shape


def _joined(part: Tensor, weight: Any) -> Tensor:
    """All of what each process has a part of, in the shape of the weight, on the CPU."""
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, part.contiguous())
    return torch.cat(parts)[: weight.ds_numel].view(weight.ds_shape).cpu()


def _part(x: Tensor, weight: Any) -> Tensor:
    """This process's part of a tensor in the shape of a weight, padded as DeepSpeed pads it."""
    size = weight.partition_numel()
    begin = size * dist.get_rank()
    part = x.flatten()[begin : begin + size]
    return torch.cat([part, part.new_zeros(size - len(part))])

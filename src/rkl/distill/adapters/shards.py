"""Tensors that other trainers have put into shards."""

from typing import Any


def whole(tensor: Any) -> Any:
    """A DTensor gathered from its shards, differentiable; anything else as it is."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

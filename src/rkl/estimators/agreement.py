"""Heads of which each process has a part of the vocabulary: what the processes must agree on."""

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from rkl.divergences.rows import Shards
from rkl.estimators.inputs import LinearHead

Result = TypeVar("Result")
SAMPLE = 64  # entries of what must be alike everywhere that are compared
MOST = 4  # tensors that must be alike: of q, of p, weights and labels
UNLIKE = 0.1  # of their mean size: a mean difference that no order of sums explains


def shards_of(p: Any, q: Any) -> Shards | None:
    """The processes that share q's vocabulary, which then communicate; None if this one has all.

    Raises:
        TypeError: A group is no process group.
        ValueError: p is shared and q not, or among other processes.
    """
    groups = [x.group if isinstance(x, LinearHead) else None for x in (p, q)]
    for name, group in zip("pq", groups, strict=True):
        if group is not None and not isinstance(group, dist.ProcessGroup):
            raise TypeError(
                f"{name}.group must be a process group that this process belongs to, such as "
                f"device_mesh.get_group(); got {group!r}."
            )
    of_p, group = groups
    if group is None and of_p is not None:
        raise ValueError(
            "q must be shared among the processes of p.group: give q its part of the head, "
            "LinearHead(..., group=...); got a q with all of the vocabulary."
        )
    if group is None or group.size() == 1 and of_p in (None, group):
        return None
    if of_p is not None and of_p is not group and _ranks(of_p) != _ranks(group):
        raise ValueError(
            "p.group and q.group must be the same processes; "
            f"got {_ranks(of_p)} and {_ranks(group)}."
        )
    size = len(q.weight) if isinstance(q.weight, Tensor) and q.weight.ndim else 0
    sizes = _gathered([float(size)], dist.get_rank(group), group.size(), q, group)
    return Shards(tuple(int(x) for x in sizes[:, 0]), dist.get_rank(group), group)


def cut(p: Any, shared: Shards | None) -> Any:
    """The part of a whole p that belongs to this process's atoms; what is no logits as it is."""
    if shared is None or isinstance(p, LinearHead) and p.group is not None:
        return p
    atoms = slice(shared.first, shared.first + shared.sizes[shared.rank])
    if isinstance(p, LinearHead):
        bias = None if p.bias is None else p.bias[atoms]
        return p._replace(weight=p.weight[atoms], bias=bias)
    return p[:, atoms] if isinstance(p, Tensor) else p


def in_agreement(
    shared: Shards | None,
    like: Any,
    work: Callable[[], tuple[Result, Sequence[Any], Mapping[str, Tensor | None]]],
) -> Result:
    """Run ``work``; a failure in one process is raised in all.

    Args:
        shared: The processes; None for one alone.
        like: A head on the device of the group.
        work: Checks the arguments of this process, and does not communicate. After its result it
            gives what must be the same in all of them, by its repr; and tensors that must be, by
            name, of which a few entries are compared: otherwise processes that were given
            different batches would be added up in silence.

    Raises:
        ValueError: The processes do not agree; every one of them raises.
    """
    if shared is None:
        return work()[0]
    result, settings, alike, error = None, (), {}, None
    try:
        result, settings, alike = work()
    except Exception as raised:
        error = raised
    facts = [float(error is not None), float(zlib.crc32(repr(settings).encode()))]
    samples = [number for x in alike.values() for number in _sample(x)]
    samples += [0.0] * (MOST * SAMPLE - len(samples))
    told = _gathered(facts + samples, shared.rank, shared.count, like, shared.group)
    if error is not None:
        raise error
    if failed := told[:, 0].nonzero().flatten().tolist():
        raise ValueError(
            f"process {failed[0]} of the group has refused its arguments; its message says why."
        )
    if (told[:, 1] != told[0, 1]).any():
        raise ValueError(
            "the processes of a group must compute the same: divergence, number and precision of "
            f"tokens, scale, temperature, chunk, gradients; got here {tuple(settings)}."
        )
    for name, numbers in zip(alike, told[:, 2:].split(SAMPLE, 1), strict=False):
        gap = (numbers - numbers[:1]).abs().mean(1)
        unlike = (gap > UNLIKE * numbers.abs().mean()).nonzero().flatten().tolist()
        if unlike:
            raise ValueError(
                f"{name} must be the same in all processes of the group, each of which has other "
                f"atoms of the same tokens; that of process {unlike[0]} is not that of process 0."
            )
    return result  # pyright: ignore[reportReturnType]


def _sample(x: Tensor | None) -> list[float]:
    """A few entries, evenly spread; numbers alone."""
    if x is None or not x.numel():
        return [0.0] * SAMPLE
    flat = x.detach().flatten()
    places = torch.arange(SAMPLE, device=x.device) * len(flat) // SAMPLE
    return flat[places].float().nan_to_num(0.0, 0.0, 0.0).tolist()


def _gathered(row: list[float], rank: int, count: int, like: Any, group: Any) -> Tensor:
    """The rows of all processes, on the CPU."""
    device = like.hidden.device if isinstance(like.hidden, Tensor) else "cpu"
    table = torch.zeros(count, len(row), dtype=torch.float64)
    table[rank] = torch.tensor(row, dtype=torch.float64)
    table = table.to(device)  # of the group: NCCL takes none on a CPU
    dist.all_reduce(table, group=group)
    return table.cpu()


def _ranks(group: Any) -> list[int]:
    return dist.get_process_group_ranks(group)

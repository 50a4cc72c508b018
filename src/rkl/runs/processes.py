"""Processes that share one run, as torchrun and accelerate launch set them in the environment."""

import os
from collections.abc import Mapping
from typing import NamedTuple

ADVICE = "torchrun --nproc_per_node 2 -m rkl distill ..."
_MPI = "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"  # as accelerate reads them
_PLUGINS = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism configuration",
}
JOINED = False  # True once this process and its peers are connected


class PeerError(RuntimeError):
    """Another process of the run failed, and reports the reason itself."""


class World(NamedTuple):
    """One process among those that were started together.

    Attributes:
        rank: Its number, from 0.
        size: Number of processes.
        local_size: Number of processes on this machine.
    """

    rank: int = 0
    size: int = 1
    local_size: int = 1


def world(environment: Mapping[str, str] = os.environ) -> World:
    """The place of this process among those that torchrun or accelerate launch started.

    Raises:
        ValueError: There are several, but variables that they need to connect are missing.
    """
    counts = {name: _count(environment, name) for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK")}
    size = counts["WORLD_SIZE"]
    if size is None:
        several = [name for name in _MPI if (_count(environment, name) or 1) > 1]
        if several:
            raise ValueError(
                f"{several[0]} is {environment[several[0]]}: processes started with mpirun are "
                f"not supported. Type: {ADVICE}"
            )
        return World()
    if size <= 1:
        return World()
    missing = [name for name in ("RANK", "LOCAL_RANK") if counts[name] is None]
    missing += [name for name in ("MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]
    if missing:
        raise ValueError(
            f"WORLD_SIZE is {size}, but {', '.join(missing)} of the environment are not set, so "
            f"that processes cannot find one another. Type: {ADVICE}, or unset WORLD_SIZE."
        )
    rank = counts["RANK"] or 0
    if rank >= size:
        raise ValueError(f"RANK must be below WORLD_SIZE; got {rank} of {size}.")
    return World(rank, size, _count(environment, "LOCAL_WORLD_SIZE") or size)


def main_process() -> bool:
    """True in the one process of a run that writes: rank 0 of those that torchrun began.

    The other ranks take no lock and write nothing; they share the lock of rank 0.
    """
    rank = os.environ.get("RANK", "0")
    return os.environ.get("WORLD_SIZE", "1") in ("", "1") or rank in ("", "0")


def plugin(environment: Mapping[str, str] = os.environ) -> str | None:
    """Plugin in which accelerate launch would wrap the model, other than DDP."""
    names = (name for key, name in _PLUGINS.items() if environment.get(key, "").lower() == "true")
    return next(names, None)


def compiler(environment: Mapping[str, str] = os.environ) -> str | None:
    """Backend with which accelerate launch would compile the model."""
    name = environment.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    return None if name in ("", "no") else name


def launched_alone(environment: Mapping[str, str] = os.environ) -> bool:
    """True if accelerate launch was asked for several processes, and started only this one.

    It does so with ``--cpu``; the only trace is the address of a main process.
    """
    return (
        "ACCELERATE_MIXED_PRECISION" in environment
        and bool(environment.get("MASTER_ADDR"))
        and not any(environment.get(name) for name in ("WORLD_SIZE", "RANK", *_MPI))
    )


def _count(environment: Mapping[str, str], name: str) -> int | None:
    text = environment.get(name, "").strip()
    if not text:
        return None
    if not text.isdecimal():
        raise ValueError(f"{name} of the environment must be a number of processes; got {text!r}.")
    return int(text)

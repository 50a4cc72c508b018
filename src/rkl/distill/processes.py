"""Several processes that share one run: what all must agree on, and what only the first does."""

import atexit
import contextlib
import functools
import gc
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState

from rkl import checks
from rkl.checks import warn
from rkl.distill.selection import DivergedError
from rkl.runs import processes
from rkl.runs.processes import ADVICE, PeerError, World
from rkl.runs.signals import StoppedError

Result = TypeVar("Result")
WAIT = timedelta(days=30)  # for a process at work; one that has died is noticed at once
_LOST = "Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket closed"


@dataclass(frozen=True)
class Processes:
    """The processes of a run, of which the first alone writes; most runs have only one.

    Attributes:
        world: Which of them this is, of how many.
        group: What they exchange words through, on the CPU; None for one process.
    """

    world: World = World()
    group: Any = None

    @property
    def count(self) -> int:
        """Number of processes."""
        return self.world.size

    @property
    def main(self) -> bool:
        """True in the process that writes."""
        return self.world.rank == 0

    def together(self, work: Callable[[], Result]) -> Result:
        """Run ``work`` in every process; a failure in one is raised in all.

        Within it, processes must not wait for one another.

        Raises:
            PeerError: It failed elsewhere. The first process raises an error of its own as it is.
        """
        result, error = None, None
        try:
            with warnings.catch_warnings():
                if not self.main:  # the first says the same
                    warnings.simplefilter("ignore")
                result = work()
        except BaseException as raised:  # also Ctrl-C, for the others wait
            if self.group is None:
                raise
            error = raised
        if self.group is None:
            return result  # pyright: ignore[reportReturnType]: it did not raise
        told = self.gather(None if error is None else _in_words(error))
        failed = [rank for rank, words in enumerate(told) if words is not None]
        if error is not None and (self.main or _is_stop(error)):
            raise error
        if failed:
            number, words = told[failed[0]]
            if number is not None:
                raise StoppedError(number, agreed=True) from error
            raise PeerError(f"process {failed[0]} of {self.count}: {words}") from error
        return result  # pyright: ignore[reportReturnType]

    def on_main(self, work: Callable[[], Result]) -> Result:
        """Run ``work`` in the first process; the others wait, and get its result."""
        found = self.together(lambda: work() if self.main else None)
        return self.gather(found)[0]

    def largest(self, number: int) -> int:
        """The largest of a number over all processes."""
        if self.group is None:
            return number
        value = torch.tensor(number)
        with naming_lost_peers():
            dist.all_reduce(value, dist.ReduceOp.MAX, group=self.group)
        return int(value)

    @contextlib.contextmanager
    def writing(self, run: contextlib.AbstractContextManager) -> Iterator[None]:
        """Within ``run`` in the first process; the others then wait until that one has left it.

        They do not wait after an error of one process alone, for the others may not come.
        """
        try:
            with run if self.main else contextlib.nullcontext():
                yield
        except BaseException as error:
            if isinstance(error, PeerError | DivergedError) or getattr(error, "agreed", False):
                with contextlib.suppress(PeerError):
                    self.gather(None)
            raise
        self.gather(None)

    def gather(self, words: Any) -> list[Any]:
        """One object from each process, by rank."""
        if self.group is None:
            return [words]
        told: list[Any] = [None] * self.count
        with naming_lost_peers():
            dist.all_gather_object(told, words, group=self.group)
        return told


@contextlib.contextmanager
def joined(device: str | None) -> Iterator[Processes]:
    """The processes that torchrun or accelerate launch started for this run, once all are there.

    Args:
        device: As the run is told; without a GPU, CPUs that talk through gloo.

    Raises:
        ValueError: They were started in a way in which they cannot share a run.
    """
    world = processes.world()
    if processes.launched_alone():
        warn(
            "accelerate launch --cpu starts one process, whatever --num_processes says. For two: "
            f"{ADVICE}, or accelerate launch --multi_gpu --num_processes 2 -m rkl distill ..., "
            "which work on CPUs too."
        )
    if world.size == 1:
        yield Processes()
        return
    _check_launch(world, device)
    shared = Processes(world, _connected(on_cpu(device)))
    processes.JOINED = True
    yield shared


def on_cpu(device: str | None) -> bool:
    """True if processes that are told this device compute on CPUs."""
    return checks.device(device).type == "cpu"


def check_launcher(dtype: str, *, shard: bool = False) -> None:
    """Refuse what accelerate launch would change of a run without its settings saying so.

    Raises:
        ValueError: It would; or the weights are to be shared (``shard``) by a single process.
    """
    if (name := processes.plugin()) is not None:
        advice = "--multi_gpu, with rkl distill --shard for FSDP2"
        if name != "FSDP":
            advice = "--multi_gpu, or a script of yours with rkl.distill.DistillTrainer"
        raise ValueError(
            f"accelerate launch: rkl distill trains with DDP, and not with {name}; expected "
            f"{advice}."
        )
    if shard and processes.world().size == 1:
        raise ValueError(
            f"shard needs several processes, which share the weights; got 1. Type: {ADVICE}"
        )
    if (name := processes.compiler()) is not None:
        raise ValueError(
            f"accelerate launch: dynamo_backend must be no; got {name}. rkl distill --compiled "
            "compiles the loss."
        )
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    wanted = {"no": "float32", "bf16": "bfloat16"}.get(precision)
    if precision != "no" and wanted != dtype:
        advice = "or say --dtype bfloat16 to rkl distill" if wanted else "or bf16"
        raise ValueError(
            f"accelerate launch: mixed_precision is {precision}, but dtype is {dtype}; say "
            f"--mixed_precision no there, {advice}."
        )


@contextlib.contextmanager
def naming_lost_peers() -> Iterator[None]:
    """Give an error that says that another process has ended in place of the network's words."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, PeerError) or not any(words in str(error) for words in _LOST):
            raise
        raise PeerError(
            "another process of the run has ended; the first of its messages says why."
        ) from error


def _check_launch(world: World, device: str | None) -> None:
    if device is not None and device.startswith("cuda:"):
        raise ValueError(
            f"device must be cpu or cuda with {world.size} processes, each of which takes a GPU "
            f"of its own; got {device}. CUDA_VISIBLE_DEVICES says which."
        )
    if not on_cpu(device) and world.local_size > torch.cuda.device_count():
        raise ValueError(
            f"{world.local_size} processes on this machine need a GPU each; torch finds "
            f"{torch.cuda.device_count()}. Start fewer, or say --device cpu."
        )


def _connected(cpu: bool) -> Any:
    """The group in which processes tell one another what they have to; made once."""
    if not dist.is_initialized():
        PartialState._reset_state()
        PartialState(cpu=cpu)
        disconnect_at_exit()
    if not _GROUPS:
        _GROUPS.append(dist.new_group(backend="gloo", timeout=WAIT))
    return _GROUPS[0]


_GROUPS: list[Any] = []


@functools.cache
def disconnect_at_exit() -> None:
    """Have the groups of this process end before the interpreter does; once is enough."""
    atexit.register(_disconnect)


def _disconnect() -> None:
    """End the groups and their threads, for one that outlived the interpreter would abort."""
    if dist.is_initialized():
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()
    _GROUPS.clear()
    gc.collect()  # of the Trainer, whose DDP holds a group; the last reference joins the threads


def _is_stop(error: BaseException) -> bool:
    return isinstance(error, KeyboardInterrupt)


def _in_words(error: BaseException) -> tuple[int | None, str]:
    if isinstance(error, KeyboardInterrupt):
        return getattr(error, "number", 2), "stopped"
    words = str(error) if isinstance(error, ValueError | OSError) and str(error) else repr(error)
    return None, words

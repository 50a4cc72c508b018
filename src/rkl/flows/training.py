"""The training loop of all flows."""

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from rkl.checks import LARGEST_COUNT, LARGEST_RATE, integer, number
from rkl.flows.precision import single_precision
from rkl.randomness import one_at_a_time, random_numbers
from rkl.runs import Run, save_tensors
from rkl.runs.integrity import values_of
from rkl.runs.progress import Progress
from rkl.runs.signals import StoppedError, StopRequest
from rkl.tables import Table

CHECKPOINT = "checkpoint.safetensors"
MINUTES = 2.0  # of training where no budget is given
PATIENCE = 10  # steps in succession without a finite gradient, after which training stops
WARM_UP = 20  # steps over which the learning rate rises to its value


@runtime_checkable
class Stateful(Protocol):
    """An object saved with a checkpoint beside the flow: a critic, an optimiser, a schedule."""

    def state_dict(self) -> Any:
        """The state needed to continue."""

    def load_state_dict(self, state_dict: Any) -> Any:
        """Restore a result of ``state_dict``."""


@dataclass
class Moment:
    """State of a training, for its objective and its watch.

    Attributes:
        step: Number of steps done.
        progress: Share of the budget that is spent, in [0, 1); 1 at the end.
        numbers: Figures logged since the last row, by name.
        stopped: Reason why training ends now, if it does.
    """

    step: int = 0
    progress: float = 0.0
    numbers: dict[str, list[Any]] = field(default_factory=dict)
    stopped: str | None = None

    def log(self, **numbers: Any) -> None:
        """Log figures; the next row of the history has their means."""
        for name, value in numbers.items():
            value = value.detach() if isinstance(value, Tensor) else value
            self.numbers.setdefault(name, []).append(value)

    def stop(self, reason: str) -> None:
        """End training after this step."""
        self.stopped = reason

    def flush(self) -> dict[str, float]:
        """The means of the figures logged, which are then cleared."""
        row = {name: math.fsum(map(float, it)) / len(it) for name, it in self.numbers.items()}
        self.numbers.clear()
        return row


Objective = Callable[[Moment], Float[Tensor, ""]]
Watch = Callable[[Moment], float | None]


@dataclass(frozen=True)
class Training:
    """Result of a training.

    Attributes:
        history: One row per ``every`` steps: step, seconds, loss, gradient (its norm before it
            is shortened), and what the objective logged.
        steps: Number of steps done.
        seconds: Seconds that they took, without interruptions.
        best: The highest score of the watch, whose parameters the flow now has.
        best_step: Step of that score.
        stopped: Reason why training ended before its budget; None if it did not.
    """

    history: list[dict[str, Any]]
    steps: int
    seconds: float
    best: float | None
    best_step: int | None
    stopped: str | None

    def table(self) -> Table:
        """The history, a row for each evaluation; figures that a step lacks are left empty."""
        names = list(dict.fromkeys(name for row in self.history for name in row))
        rows = [tuple(row.get(name) for name in names) for row in self.history]
        notes = [f"Stopped: {self.stopped}"] if self.stopped else []
        return Table(
            f"{self.steps:,} steps in {self.seconds:.3g} s", names or ["step"], rows, notes
        )

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


@one_at_a_time()
@single_precision()
def train(
    flow: nn.Module,
    objective: Objective,
    *,
    steps: int | None = None,
    minutes: float | None = None,
    lr: float = 1e-3,
    clip: float = 10.0,
    ema: float = 0.999,
    seed: int = 0,
    also: Mapping[str, Stateful] | None = None,
    run: Run | None = None,
    every: int = 100,
    early: bool = False,
    watch: Watch | None = None,
) -> Training:
    """Minimise an objective over the parameters of a flow, within a budget of steps or minutes.

    Adam, with a learning rate that follows half a cosine over the whole budget, behind a short
    rise. The flow ends with the running average of its parameters, or where a watch gives
    scores, with the average that scored best. A step without a finite gradient is skipped.

    All randomness comes from torch's global generators, seeded here and restored afterwards; so
    one training of a process runs at a time, and one in another thread waits, with a warning.
    With ``run``, training continues from the checkpoint there; a budget in steps then leads to
    the same bits as without the interruption. Ctrl-C, SIGTERM and SIGHUP end it after the
    step, with a checkpoint. With a larger budget a training that had ended continues: the
    learning rate rises to its value at this step of the larger budget, and falls to its end.

    Args:
        flow: The module to train; parameters that require no gradient do not change.
        objective: Function of the moment that returns the loss of one step.
        steps: The budget in steps, or
        minutes: in minutes of wall time, all calls of a resumed run together.
        lr: Highest learning rate.
        clip: Greatest norm of the gradient; longer ones are shortened to it.
        ema: Decay of the running average; less in the first steps.
        seed: Random seed.
        also: Objects that are saved and restored with the flow, by name.
        run: Run folder for checkpoints and log.
        every: Number of steps between rows, checkpoints and calls of the watch.
        early: Whether to have them before the first step too, and after 1, 2, 3, 4, 5, 6, 7, 8,
            10, ... steps, each a quarter more, until they are ``every`` apart.
        watch: Called while the flow has its averaged parameters; it may score them, the
            highest score being kept, and it may stop training by ``moment.stop``.

    Raises:
        FloatingPointError: No step had a finite gradient.

    >>> flow = nn.Linear(1, 1, bias=False)
    >>> done = train(flow, lambda moment: (flow.weight - 2).square().sum(), steps=300, lr=0.1)
    >>> done.steps, round(flow.weight.item(), 2)
    (300, 2.0)
    """
    _check(steps, minutes, lr, clip, ema, every)
    loop = _Loop(flow, steps, minutes, lr, clip, ema, dict(also or {}), run)
    stop = StopRequest()
    with loop.randomness(seed), _bar() as show, stop.listening():
        loop.resume()
        looks = early_steps(every) if early else frozenset()
        if early and not loop.history:
            loop.pause(watch, show)
        while loop.moment.progress < 1 and not loop.moment.stopped:
            if stop.number is not None:
                loop.save()
                raise StoppedError(stop.number)
            loop.step(objective)
            ended = loop.moment.progress >= 1 or loop.moment.stopped
            if ended or loop.moment.step % every == 0 or loop.moment.step in looks:
                loop.pause(watch, show)
    return loop.finish()


def early_steps(every: int) -> frozenset[int]:
    """Steps that grow by a quarter each, from 1 until they are ``every`` apart.

    >>> sorted(early_steps(3))
    [1, 2, 3, 4, 5, 6, 7, 8, 10, 12]
    """
    steps, step = [], 1
    while not steps or step - steps[-1] < every:
        steps.append(step)
        step = max(step + 1, step * 5 // 4)
    return frozenset(steps)


class _Loop:
    """The state of a training; ``state_dict`` has all of it."""

    def __init__(self, flow, steps, minutes, lr, clip, ema, also, run):
        self.flow, self.run, self.also = flow, run, also
        self.steps, self.minutes, self.lr, self.clip, self.ema = steps, minutes, lr, clip, ema
        self.parameters = [it for it in flow.parameters() if it.requires_grad]
        if not self.parameters:
            raise ValueError("flow has no parameters that require a gradient.")
        self.device = self.parameters[0].device
        self.optimizer = torch.optim.Adam(self.parameters, lr=lr)
        self.average = [it.detach().clone() for it in self.parameters]
        self.best: dict[str, Any] = {"score": None, "step": None, "parameters": None}
        self.moment = Moment()
        self.history: list[dict[str, Any]] = []
        self.bad, self.taken = 0, 0
        self.before, self.began = 0.0, time.perf_counter()

    @contextlib.contextmanager
    def randomness(self, seed: int) -> Iterator[None]:
        with random_numbers(seed):
            yield

    @property
    def seconds(self) -> float:
        return self.before + time.perf_counter() - self.began

    @property
    def progress(self) -> float:
        spent = self.seconds / 60 if self.minutes else self.moment.step
        return min(1.0, spent / (self.minutes or self.steps))

    def step(self, objective: Objective) -> None:
        moment = self.moment
        rate = 0.5 * self.lr * (1 + math.cos(math.pi * moment.progress))
        for group in self.optimizer.param_groups:
            group["lr"] = rate * min(1.0, (moment.step + 1) / WARM_UP)
        self.optimizer.zero_grad()
        loss = objective(moment)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, self.clip)
        if bool(loss.isfinite() & norm.isfinite()):
            self.optimizer.step()
            self.bad, self.taken = 0, self.taken + 1
            moment.log(loss=loss, gradient=norm)
        else:
            self._skip(loss.item())
        decay = min(self.ema, (1 + self.taken) / (10 + self.taken))
        get_ema_multi_avg_fn(decay)(self.average, self.parameters, None)
        moment.step += 1
        moment.progress = self.progress

    def _skip(self, loss: float) -> None:
        self.bad += 1
        if self.bad < PATIENCE:
            return
        reason = f"the loss or its gradient was not finite for {PATIENCE} steps, last {loss}"
        if not self.taken:
            raise FloatingPointError(f"At the start, {reason}: nothing could be learnt.")
        self.moment.stop(f"{reason}; the flow has the parameters from before")

    def pause(self, watch: Watch | None, show: Callable[[Moment, dict], None]) -> None:
        """Evaluate the averaged parameters, write a row and a checkpoint."""
        if watch is not None:
            with self._average_parameters(), torch.no_grad():
                score = watch(self.moment)
            if score is not None:
                self.moment.log(score=score)
                self._keep(score)
        skipped = self.moment.step - self.taken
        row = {"step": self.moment.step, "seconds": self.seconds} | self.moment.flush()
        row |= {"skipped": skipped} if skipped else {}
        self.history.append(row)
        show(self.moment, row)
        if self.run is not None:
            self.run.log(row)
        self.save()

    def save(self) -> None:
        """Write a checkpoint, from which training continues to the same bits."""
        if self.run is not None:
            save_state(self.run.path / CHECKPOINT, self.state_dict())

    def _keep(self, score: float) -> None:
        if self.best["score"] is None or score > self.best["score"]:
            copies = [it.clone() for it in self.average]
            self.best = {"score": score, "step": self.moment.step, "parameters": copies}

    @contextlib.contextmanager
    def _average_parameters(self) -> Iterator[None]:
        originals = [it.detach().clone() for it in self.parameters]
        _copy(self.average, self.parameters)
        try:
            yield
        finally:
            _copy(originals, self.parameters)

    def state_dict(self) -> dict[str, Any]:
        moment, cuda = self.moment, self.device.type == "cuda"
        return {
            "flow": self.flow.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average,
            "best": self.best,
            "also": {name: it.state_dict() for name, it in self.also.items()},
            "moment": [moment.step, moment.progress, moment.stopped],
            "numbers": moment.numbers,
            "counts": [self.bad, self.taken],
            "seconds": self.seconds,
            "random": torch.get_rng_state(),
            "random_on_gpu": torch.cuda.get_rng_state(self.device) if cuda else None,
        }

    def resume(self) -> None:
        if self.run is None:
            return
        if not (self.run.path / CHECKPOINT).exists():
            if self.run.metrics:  # a row is written before its checkpoint
                self.run.rewind(-1)  # that of the start too
            return
        state = load_state(self.run.path / CHECKPOINT)
        self.flow.load_state_dict(state["flow"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average = [part.to(self.device) for part in state["average"]]
        self.best, self.before = state["best"], state["seconds"]
        for name, part in self.also.items():
            part.load_state_dict(state["also"][name])
        self.moment.step, self.moment.progress, self.moment.stopped = state["moment"]
        self.moment.numbers = state.get("numbers", {})
        self.moment.progress = self.progress  # of the budget as it is now
        self.bad, self.taken = state["counts"]
        torch.set_rng_state(state["random"])
        if state["random_on_gpu"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["random_on_gpu"], self.device)
        self.run.rewind(self.moment.step)
        self.history = [
            {name: math.nan if it is None else it for name, it in row.items()}
            for row in self.run.metrics  # which has null for what is not finite
        ]

    def finish(self) -> Training:
        _copy(self.best["parameters"] or self.average, self.parameters)
        self.optimizer.zero_grad()
        moment, best = self.moment, self.best
        return Training(
            self.history, moment.step, self.seconds, best["score"], best["step"], moment.stopped
        )


def _copy(values: list[Tensor], parameters: list[nn.Parameter]) -> None:
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)


def save_state(path: str | os.PathLike, state: Any) -> None:
    """Write nested dictionaries and lists of tensors and JSON values, atomically, in safetensors.

    The structure is in the file's header; reading it never runs code.
    """
    tensors: dict[str, Tensor] = {}
    packed = _pack(state, tensors)
    digest = _digest(json.dumps(packed), tensors.__getitem__, list(tensors))
    # In one entry: safetensors writes several in an order of chance, and equal states must be
    # equal files.
    save_tensors(path, tensors, {"structure": json.dumps({"sha256": digest, "state": packed})})


def load_state(path: str | os.PathLike) -> Any:
    """State written by :func:`save_state`, with its tensors on the CPU."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            structure = json.loads(file.metadata()["structure"])
            if not (isinstance(structure, dict) and "sha256" in structure):  # of earlier versions
                return _unpack(structure, file.get_tensor)
            expected, packed = structure["sha256"], structure["state"]
            digest = _digest(json.dumps(packed), file.get_tensor, list(file.keys()))
            if digest != expected:
                raise ValueError(f"it is damaged: its sha256 is {digest}, and was {expected}")
            return _unpack(packed, file.get_tensor)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"path: {path} holds no state that rkl wrote: {error}.") from None


def _digest(structure: str, tensor: Callable[[str], Any], names: Collection[str]) -> str:
    """The sha256 of a state, to detect a file that was changed but can still be read."""
    ordered = sorted(names)
    return values_of(None, [structure, ordered, *map(tensor, ordered)])["sha256"]


def _pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().clone()
        return {"tensor": name}
    if isinstance(value, Mapping):  # as pairs: the keys of optimisers are integers
        return {"pairs": [[key, _pack(it, tensors)] for key, it in value.items()]}
    if isinstance(value, list | tuple):
        return [_pack(it, tensors) for it in value]
    return value


def _unpack(value: Any, tensor: Callable[[str], Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpack(it, tensor) for it in value]
    if isinstance(value, dict) and "tensor" in value:
        return tensor(value["tensor"])
    if isinstance(value, dict):
        return {key: _unpack(it, tensor) for key, it in value["pairs"]}
    return value


def goes_on(
    folder: Path, steps: int | None = None, minutes: float | None = None, share: float = 1.0
) -> bool:
    """True if a budget leaves steps or minutes of a training; refuses one that is too small.

    Args:
        folder: Folder of its run.
        steps: The budget in steps, or
        minutes: in minutes.
        share: Share of the minutes that the steps take, before critics follow.

    Raises:
        ValueError: The budget is below the steps done or the minutes spent; or it is larger
            although training stopped itself.
    """
    if not (folder / CHECKPOINT).exists():
        return True
    state = load_state(folder / CHECKPOINT)
    (done, progress, stopped), spent = state["moment"], state["seconds"] / 60
    if steps is not None and steps < done:
        raise ValueError(
            f"steps: {folder} has done {done:,} steps, and can go on to no fewer; got {steps:,}."
        )
    record = Run.open(folder).record
    was = {name: record["settings"].get(name) for name in ("steps", "minutes")}
    if was["steps"] is None and was["minutes"] is None:
        was["minutes"] = MINUTES
    # One that has spent its minutes took a step more than they were.
    ended = progress >= 1 and was["minutes"] is not None and (minutes or 0.0) >= was["minutes"]
    if minutes is not None and share * minutes < spent and not ended:
        raise ValueError(
            f"minutes: {folder} has trained for {spent / share:.3g} minutes, and can go on to no "
            f"fewer; got {minutes:g}."
        )
    more = steps > done if steps is not None else share * (minutes or 0.0) > spent
    if more and stopped and {"steps": steps, "minutes": minutes} != was:
        raise ValueError(f"resume: {folder} stopped at step {done:,} and cannot go on: {stopped}.")
    return more and not stopped


def _check(steps, minutes, lr, clip, ema, every) -> None:
    if (steps is None) == (minutes is None):
        raise ValueError(f"one of steps and minutes must be given; got {steps} and {minutes}.")
    if steps is not None:
        integer("steps", steps, at_least=1, at_most=LARGEST_COUNT)
    integer("every", every, at_least=1)
    for name, value in (("minutes", minutes), ("lr", lr), ("clip", clip)):
        if value is not None:
            number(name, value, above=0, at_most=LARGEST_RATE if name == "lr" else math.inf)
    number("ema", ema, at_least=0, below=1)


@contextlib.contextmanager
def _bar() -> Iterator[Callable[[Moment, dict], None]]:
    with Progress("training", 1, share=True) as shown:

        def show_row(moment: Moment, row: dict[str, float]) -> None:
            figures = {it: value for it, value in row.items() if it not in ("step", "seconds")}
            words = [f"step {moment.step}", *(f"{it} {x:.4g}" for it, x in figures.items())]
            shown.update(moment.progress, words="  ".join(words))

        yield show_row

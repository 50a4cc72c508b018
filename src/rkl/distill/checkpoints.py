"""Trainer checkpoints that are there whole or not at all, whenever the process is killed."""

import contextlib
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import sort_checkpoints

from rkl.runs import remove_folder, replacing_folder

_STATE = "trainer_state.json"
PENDING = "evaluation_pending"  # in a checkpoint of a step whose evaluation was cut short


class Moment:
    """Random states and counts between two steps, as a checkpoint of that step must hold them.

    Args:
        state: The Trainer's.
    """

    def __init__(self, state: TrainerState):
        self.step, self._tokens = state.global_step, state.num_input_tokens_seen
        self._python, self._numpy = random.getstate(), np.random.get_state()
        self._cpu: Any = torch.random.get_rng_state()
        self._cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None

    def restore(self, state: TrainerState) -> None:
        """Put back what a step or an evaluation has changed that was cut short."""
        state.num_input_tokens_seen = self._tokens
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        torch.random.set_rng_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda)


def is_pending(checkpoint: str | Path | None) -> bool:
    """True for a checkpoint whose step is still to be evaluated."""
    return checkpoint is not None and Path(checkpoint, PENDING).is_file()


@contextlib.contextmanager
def replacing_folder_together(path: Path, accelerator: Accelerator, writes: bool) -> Iterator[str]:
    """A temporary folder for all processes, renamed when the last of them has left the block."""
    with replacing_folder(path) if writes else contextlib.nullcontext() as temporary:
        (shared,) = broadcast_object_list([str(temporary)])
        yield shared
        accelerator.wait_for_everyone()
    accelerator.wait_for_everyone()


def settle(state: TrainerState, staged: Path, path: Path, writes: bool) -> None:
    """Lift a checkpoint out of the folder in it that the Trainer made, and call it by its name.

    Args:
        state: The Trainer's, which may call the checkpoint the best one by its passing name.
        staged: Where the Trainer wrote it.
        path: Where it will be.
        writes: Whether this process is the one that writes.
    """
    best = state.best_model_checkpoint == str(staged)
    if best:
        state.best_model_checkpoint = str(path)
    if not writes:
        return
    if best:
        state.save_to_json(str(staged / _STATE))
    for entry in staged.iterdir():
        os.replace(entry, staged.parent / entry.name)
    staged.rmdir()


def rotate(folder: str, limit: int | None, best: str | None) -> None:
    """Remove the oldest checkpoints beyond a number, but never the best and the last one."""
    checkpoints = [Path(path) for path in sort_checkpoints(folder)]
    kept = {*checkpoints[-1:], *([Path(best)] if best else [])}
    surplus = len(checkpoints) - max(limit, len(kept)) if limit else 0
    for path in [path for path in checkpoints if path not in kept][: max(surplus, 0)]:
        remove_folder(path)

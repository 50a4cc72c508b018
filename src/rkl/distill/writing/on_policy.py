"""Batches of a training, some of them with the text of the student or the teacher."""

import itertools
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rkl.distill.text.batches import (
    OF_TEACHER,
    ROUTE,
    SOURCES,
    STUDENT,
    TEACHER,
    teacher_prompts_in,
)
from rkl.distill.text.data import IGNORED
from rkl.distill.writing.rollouts import Writer, batch_with, prompts_in, seed_of
from rkl.runs.files import read_jsonl, write_atomic

Inputs = dict[str, Any]
COMPLETIONS = "completions.jsonl"
MIN_LMBDA = 1 / 16  # below which a guard that mixes in data stops
WRITERS = {STUDENT: "student", TEACHER: "teacher"}


@dataclass
class Mixture:
    """Replaces the text of batches by that of the student, with probability ``lmbda``.

    All that is random depends on the seed, the step and the process alone, so that a resumed
    training writes the same text.

    Args:
        student: Writes as the student does at the time.
        lmbda: Probability that a batch is the student's text.
        seed: Of the whole training.
        process: Number of this process, which draws other text than the others.
        pad: The token behind the end of a row.
        device: Where batches are put.
        teacher: Writes the text of all other batches; None leaves them the data's.
        model: The student, which its writer follows.
        at_once: Batches that are taken and written together.
        num_generations: Replies to each prompt.
        prompt_tokens: Length of a prompt out of plain text.
        ends: The tokens that end a reply.
    """

    student: Writer
    lmbda: float
    seed: int
    process: int
    pad: int
    device: torch.device
    teacher: Writer | None = None
    model: nn.Module | None = None
    at_once: int = 1
    num_generations: int = 1
    prompt_tokens: int = 32
    ends: Collection[int] = ()
    ahead: list[Inputs] = field(default_factory=list)  # written, and not yet trained on
    _behind: int = 0  # batches of a new iterator that are in `ahead` already
    _taken: list[Inputs] = field(default_factory=list)  # of the step that is being taken

    def take(self, batches: Iterator[tuple[Inputs, int]], count: int, step: int) -> list[Inputs]:
        """The next batches to train on, at most so many, fewer at the end of the data.

        Args:
            batches: Batches of the data, and of how many rows each is.
            count: How many to take.
            step: Number of the step, from 0.
        """
        for _ in range(self._behind):
            next(batches, None)
        self._behind, self._taken = 0, []
        if not self.ahead:
            if self.model is not None and self.lmbda:
                self.student.follow(self.model)
            given = itertools.islice(batches, max(self.at_once, count))
            # As a whole: half of it would be trained on as a step, if a server failed meanwhile.
            self.ahead = [self._write(*batch, step, place) for place, batch in enumerate(given)]
        self._taken, self.ahead = self.ahead[:count], self.ahead[count:]
        return self._taken

    def put_back(self) -> None:
        """Return the batches of a step that was cut short, which will be taken again."""
        self._taken, self.ahead = [], [*self._taken, *self.ahead]

    def _write(self, batch: Inputs, rows: int, step: int, place: int) -> Inputs:
        """The batch itself, or the text that somebody writes to its prompts."""
        draw = torch.Generator().manual_seed(seed_of(self.seed, step, place))
        own = float(torch.rand((), generator=draw, dtype=torch.float64)) < self.lmbda
        writer = self.student if own else self.teacher
        if writer is None:
            return batch
        seed = seed_of(self.seed, step, place, self.process)
        if not rows:
            if writer.writes_together:  # the first process has rows
                writer.write([[self.pad]], seed=seed)
            return batch
        # A batch holds as many replies as it has rows, so that memory does not grow.
        prompts = prompts_in(batch, self.prompt_tokens)[: -(-rows // self.num_generations)]
        others = teacher_prompts_in(batch, prompts)
        prompts = [prompt for prompt in prompts for _ in range(self.num_generations)]
        if others is not None:
            others = [prompt for prompt in others for _ in range(self.num_generations)]
        replies = writer.write(prompts if own else others or prompts, seed=seed)
        source = STUDENT if own else TEACHER
        written = batch_with(prompts, replies, source, pad=self.pad, device=self.device)
        if others is not None:
            read = batch_with(others, replies, source, pad=self.pad, device=self.device)
            columns = "input_ids", "attention_mask", "labels"
            written |= {name: read[it] for name, it in zip(OF_TEACHER, columns, strict=True)}
        if ROUTE in batch:  # a reply has the teacher of its prompt
            route = batch[ROUTE].repeat_interleave(self.num_generations)[: len(prompts)]
            written[ROUTE] = route
        return written

    def state(self) -> dict[str, Any]:
        """The state for a checkpoint: batches written ahead, and the mixture."""
        ahead = [{name: it.tolist() for name, it in batch.items()} for batch in self.ahead]
        return {"lmbda": self.lmbda, "ahead": ahead}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state` gave, with data that begin behind the same step."""
        self.lmbda = state["lmbda"]
        self.ahead = [
            {name: torch.tensor(it, device=self.device) for name, it in batch.items()}
            for batch in state["ahead"]
        ]
        self._behind = len(self.ahead)


def completions_of(batch: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Generated replies in a batch, row by row, as tokens and as text.

    Args:
        batch: With labels and sources.
        tokenizer: Puts tokens into words; None leaves the words out.
    """
    decode = getattr(tokenizer, "decode", None)
    rows = []
    columns = (batch[name].tolist() for name in ("input_ids", "labels", "attention_mask"))
    for ids, labels, attended in zip(*columns, strict=True):
        stop = sum(attended)
        start = next((at for at in range(stop) if labels[at] != IGNORED), stop)
        row: dict[str, Any] = {"prompt": ids[:start], "completion": ids[start:stop]}
        if decode is not None:
            words = {f"{name}_text": str(decode(part)) for name, part in row.items()}
            row |= words
        rows.append(row)
    source = int(batch[SOURCES].max())
    return {"source": WRITERS.get(source, "data"), "rows": rows}


def rewind_completions(path: Path, step: int) -> None:
    """Leave in a file what was written before a step; of a step 0 nothing."""
    if path.is_file():
        kept = [row for row in read_jsonl(path) if row["step"] < step]
        write_atomic(path, "".join(json.dumps(row) + "\n" for row in kept))

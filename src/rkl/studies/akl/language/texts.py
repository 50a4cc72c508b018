"""Text of the study in language models: prose that ships with Python, instructions of a file."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rkl.runs import write_atomic
from rkl.studies.manual import read_manual

EVERY = 8  # of the instructions is held out
Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Texts:
    """Rows to train on, and rows held out.

    Attributes:
        prose: Python's manual, by topic.
        held_out_prose: Topics that share no paragraph with these.
        instructions: Pairs of an instruction and its answer; none without a file of them.
        held_out_instructions: Every eighth of them.
    """

    prose: Sequence[str]
    held_out_prose: Sequence[str]
    instructions: Sequence[tuple[str, str]] = ()
    held_out_instructions: Sequence[tuple[str, str]] = ()

    def plain(self, *, held_out: bool = False) -> Rows:
        """Prose and instructions as plain text."""
        prose, pairs = self._part(held_out)
        written = (f"Instruction: {asked}\nAnswer: {answer}" for asked, answer in pairs)
        return [{"text": text} for text in (*prose, *written)]

    def chats(self, *, held_out: bool = False) -> Rows:
        """Instructions as chats; without any the prose."""
        prose, pairs = self._part(held_out)
        if not self.instructions:
            return [{"text": text} for text in prose]
        return [
            {"messages": [_turn("user", asked), _turn("assistant", answer)]}
            for asked, answer in pairs
        ]

    def _part(self, held_out: bool) -> tuple[Sequence[str], Sequence[tuple[str, str]]]:
        if held_out:
            return self.held_out_prose, self.held_out_instructions
        return self.prose, self.instructions


def read_texts(data: str | os.PathLike | None) -> Texts:
    """The prose, and the instructions of a file or of the .jsonl files in a folder.

    Their rows are those of self-instruct: "instruction" and "instances", each of these with
    "input" and "output".

    Raises:
        FileNotFoundError: There is no such file, or none in the folder.
        ValueError: A row is none of self-instruct.
    """
    manual = read_manual()
    prose = [*manual.train.values()], [*manual.held_out.values()]
    if data is None:
        return Texts(*prose)
    path = Path(data)
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files or not all(it.is_file() for it in files):
        raise FileNotFoundError(f"data: {path} must be a .jsonl file, or a folder with some.")
    pairs = list(dict.fromkeys(pair for it in files for pair in _pairs(it)))
    if len(pairs) < EVERY:
        raise ValueError(f"data must hold {EVERY} instructions at least; got {len(pairs)}.")
    train = [pair for place, pair in enumerate(pairs) if place % EVERY]
    return Texts(*prose, train, pairs[::EVERY])


def write_rows(path: Path, rows: Rows) -> None:
    """Write rows as JSON lines."""
    write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))


def _pairs(path: Path) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            instance = row["instances"][0]
            asked = "\n".join(filter(None, (row["instruction"], instance["input"])))
            yield asked, instance["output"]
        except (ValueError, KeyError, IndexError, TypeError):
            raise ValueError(
                f"data: {path}, line {number}, must be a row of self-instruct, with "
                f'"instruction" and "instances"; got {line:.60}.'
            ) from None


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}

"""Several teachers of one student: a column of the data says which of them a row learns from."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rkl.distill.known import Observed, logits_of
from rkl.distill.teachers.teacher import Teacher
from rkl.distill.text.batches import ROUTE
from rkl.estimators import Sampled, TopK


@dataclass(frozen=True)
class RouteRows:
    """A collator that puts the teacher of each row, by its number, beside what another makes.

    Args:
        collator: Makes the batch of the other columns.
        column: Holds the name of a row's teacher.
        names: Of the teachers.
    """

    collator: Callable[[Any], Any]
    column: str
    names: Sequence[str]

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Any:
        numbers = torch.tensor([self._number(row) for row in rows])
        rest = [{name: it for name, it in row.items() if name != self.column} for row in rows]
        batch = self.collator(rest)
        batch[ROUTE] = numbers
        return batch

    def _number(self, row: Mapping[str, Any]) -> int:
        if self.column not in row:
            raise ValueError(
                f"{self.column} must name the teacher of each row, one of "
                f"{', '.join(self.names)}; got a row of {', '.join(map(str, row))}."
            )
        name = str(row[self.column])
        if name not in self.names:
            raise ValueError(
                f"{self.column} must be one of {', '.join(self.names)}, the teachers; "
                f"got {name!r}."
            )
        return list(self.names).index(name)


class SeveralTeachers(Teacher):
    """Teachers of which each observes the rows that are routed to it.

    Where the rows of a batch have teachers of different weights, their logits exist all at once,
    tokens × vocabulary; batches of one teacher's rows cost what they cost with it alone.

    Args:
        teachers: The teachers, by name.
        device: Where they run, one at a time, the others waiting on the CPU; None leaves each
            where it is.
    """

    is_routed = True

    def __init__(
        self, teachers: Mapping[str, Teacher], *, device: str | torch.device | None = None
    ):
        self.teachers, self.device = dict(teachers), device
        self.vocab = min(it.vocab for it in self.teachers.values())
        self.reads_any_text = all(it.reads_any_text for it in self.teachers.values())

    def observe(self, inputs, predicting, *, vocab=None) -> Observed:
        """The distributions of each row by its own teacher, numbered in ``ROUTE``."""
        route = inputs[ROUTE]
        rest = {name: it for name, it in inputs.items() if name != ROUTE}
        row_of_token = predicting.nonzero()[:, 0]
        parts: list[tuple[Tensor, Any]] = []
        for number, teacher in enumerate(self.teachers.values()):
            rows = (route == number).nonzero().flatten()
            if not len(rows):
                continue
            self._bring(teacher)
            chosen = {name: _of_rows(it, rows, len(route)) for name, it in rest.items()}
            told = teacher.observe(chosen, predicting[rows], vocab=vocab or self.vocab)
            parts.append((torch.isin(row_of_token, rows).nonzero().flatten(), told))
        return together(parts)

    def check_rows(self, rows: Any, max_length: int | None = None) -> None:
        for teacher in self.teachers.values():
            teacher.check_rows(rows, max_length)

    def _bring(self, teacher: Teacher) -> None:
        """Move a teacher to the device, and the others off it."""
        if self.device is None:
            return
        for other in self.teachers.values():
            if other is not teacher and other.model is not None:
                other.model.to("cpu")
        if teacher.model is not None:
            teacher.model.to(self.device)


def together(parts: Sequence[tuple[Tensor, Any]]) -> Observed:
    """Distributions of several teachers, each for part of the tokens, merged in token order.

    A top k and another, or draws and draws, stay what they are; else the logits are taken.

    Args:
        parts: The numbers of tokens, which are all of them together, and what is known of these.
    """
    if len(parts) == 1:
        return parts[0][1]
    order = torch.cat([tokens for tokens, _ in parts]).argsort()
    told: list[Any] = [it for _, it in parts]
    for kind in (TopK, Sampled):
        if all(isinstance(it, kind) for it in told):
            widths = {it.index.shape[-1] for it in told}
            weighted = any(getattr(it, "log_weight", None) is not None for it in told)
            if len(widths) == 1 and not weighted:
                return kind(*(torch.cat([it[at] for it in told])[order] for at in (0, 1)))
    if any(isinstance(it, TopK | Sampled) for it in told):
        kinds = ", ".join(sorted({type(it).__name__ for it in told}))
        raise ValueError(
            "teachers must tell the same of the tokens of one batch, all of them whole "
            f"distributions or all as many atoms; got {kinds}."
        )
    return torch.cat([logits_of(it) for it in told])[order]


def _of_rows(value: Any, rows: Tensor, count: int) -> Any:
    return value[rows] if isinstance(value, Tensor) and value.shape[:1] == (count,) else value

"""The fits of the study in language models, each in a process of its own."""

import copy
import functools
import itertools
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.utils.data import DataLoader

from rkl.distill import DistillSettings, PadRows, distill, distill_loss, load_run
from rkl.distill.models.heads import inference
from rkl.divergences import Divergence
from rkl.divergences.parse import parse
from rkl.runs import remove_folder
from rkl.studies.akl.language.classroom import TRAIN, Classroom
from rkl.studies.akl.language.lessons import COST, ORDER, Lesson
from rkl.studies.akl.language.measures import Judge

MAX_GRADIENT = 1.0  # norm of a longer gradient, as in rkl distill
Row = dict[str, Any]


def fit(room: Classroom, lesson: Lesson) -> list[Row]:
    """Rows of the csv: what was measured on the way, and of the replies at the end.

    What trainings say goes into a file in the folder.
    """
    with room.logging():
        return _fit(room, lesson)


def _fit(room: Classroom, lesson: Lesson) -> list[Row]:
    judge = _judge(room)
    if lesson.question == ORDER:
        return _first_steps(room, judge, lesson)
    if lesson.question == COST:
        return _times(room, judge, lesson)
    first: dict[int, Any] = {}
    rows = []
    for name in lesson.divergences:
        rows += _distil(room, judge, lesson, name, first)
    return rows


@functools.cache  # replies of the teacher, and the encoder, once in each process
def _judge(room: Classroom) -> Judge:
    return Judge(room)


def looked_at(steps: int, growth: int) -> list[int]:
    """The steps after which a student is measured: none, the powers of a number, and all.

    >>> looked_at(24, 2)
    [0, 1, 2, 4, 8, 16, 24]
    """
    powers = itertools.takewhile(lambda it: it < steps, (growth**n for n in itertools.count()))
    return [0, *powers, steps]


def _distil(
    room: Classroom, judge: Judge, lesson: Lesson, name: str, first: dict[int, Any]
) -> list[Row]:
    """A run of rkl distill; the students of the first of two are kept in ``first``."""
    watch = _Watch(room, judge, lesson, name, first)
    out = room.folder / "runs" / watch.label
    distill(_settings(room, lesson, name), out, overwrite=out.exists(), watch=watch)
    student = load_run(out)
    watch.rows[-1] |= judge.on_prose(student) | judge.on_replies(student, lesson.seed)
    remove_folder(out)
    return watch.rows


def _settings(room: Classroom, lesson: Lesson, name: str) -> DistillSettings:
    plan, begun = room.plan, cast(Any, room.begin(lesson.student))
    return DistillSettings(
        teacher=room.teacher_source,
        data=str(room.folder / TRAIN),
        divergence=name,
        held_out=0.0,  # so that the last student counts, not the best on what it is measured on
        max_steps=lesson.steps,
        save_every=lesson.steps,
        learning_rate=plan.learning_rate,
        max_length=plan.block,
        batch_size=plan.batch_size,
        packing=plan.packing,
        lmbda=lesson.lmbda,
        prompt_tokens=plan.prompt_tokens,
        max_completion_length=plan.block - plan.prompt_tokens,
        guard="off",
        compiled=False,
        seed=lesson.seed,
        device="cpu",
        **begun,
    )


@dataclass
class _Watch:
    """Measures a student on the way; its own time does not count."""

    room: Classroom
    judge: Judge
    lesson: Lesson
    name: str
    first: dict[int, Any]

    def __post_init__(self):
        self.rows: list[Row] = []
        self.seconds, self.last = 0.0, time.process_time()
        self.at = looked_at(self.lesson.steps, self.room.plan.growth)
        self.blocks = len(self.room.blocks(TRAIN))

    @property
    def label(self) -> str:
        """A name for its folder."""
        it = self.lesson
        words = it.question, it.student, self.name, it.lmbda, it.seed, it.steps
        return "".join(c if c.isalnum() else "-" for c in "-".join(map(str, words)))

    def __call__(self, model: Any, step: int) -> None:
        if step:
            self.seconds += time.process_time() - self.last
        if step in self.at:
            second = len(self.lesson.divergences) > 1 and self.name != self.lesson.divergences[0]
            other = self.first.get(step) if second else None
            if step or other is not None:
                figures = self.judge.on_text(model, first=other)
            else:
                figures = self.judge.at_first(self.lesson.student, model)
            self.rows.append(self.row(step) | figures)
            if len(self.lesson.divergences) > 1 and not second:
                self.first[step] = copy.deepcopy(model).requires_grad_(False)
        self.last = time.process_time()

    def row(self, step: int) -> Row:
        """The cells that say which fit it is, and how far it has come."""
        return row_of(self.lesson, self.name) | {
            "step": step,
            "epochs": step * self.room.plan.batch_size / self.blocks,
            "cpu_seconds": self.seconds,
        }


def row_of(lesson: Lesson, divergence: str) -> Row:
    """The cells of a row that say which fit it is of."""
    names = "question", "student", "lmbda", "optimizer", "seed", "steps"
    return {"divergence": divergence} | {name: getattr(lesson, name) for name in names}


def _first_steps(room: Classroom, judge: Judge, lesson: Lesson) -> list[Row]:
    """Plain steps by one optimiser at a constant rate, looked at from the first on."""
    (name,) = lesson.divergences
    kind, rate = {
        "AdamW": (torch.optim.AdamW, room.plan.learning_rate),
        "SGD": (torch.optim.SGD, room.plan.sgd_rate),
    }[lesson.optimizer]
    student = room.new_student(lesson.student).train()
    optimizer = kind(student.parameters(), lr=rate)
    rows: list[Row] = []
    for step, batch in zip(range(lesson.steps + 1), batches(room), strict=False):
        if step in looked_at(lesson.steps, 2):
            look = judge.on_text if step else functools.partial(judge.at_first, lesson.student)
            rows.append(row_of(lesson, name) | {"step": step} | look(student))
        _step(judge.teacher, student, optimizer, parse(name), batch)
    return rows


def _times(room: Classroom, judge: Judge, lesson: Lesson) -> list[Row]:
    """Median time of a step under each divergence, all in turns on the same batches."""
    student = room.new_student(lesson.student).train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.0)
    seconds: dict[str, list[float]] = {name: [] for name in lesson.divergences}
    for _, batch in zip(range(lesson.steps), batches(room), strict=False):
        for name, of in seconds.items():
            began = time.process_time()
            _step(judge.teacher, student, optimizer, parse(name), batch)
            of.append(time.process_time() - began)
    ends = {"step": lesson.steps}
    return [
        row_of(lesson, name) | ends | {"cpu_seconds": statistics.median(of)}
        for name, of in seconds.items()
    ]


def _step(
    teacher: Any,
    student: Any,
    optimizer: torch.optim.Optimizer,
    divergence: Divergence,
    batch: Mapping[str, Any],
) -> None:
    inputs = {name: it for name, it in batch.items() if name != "labels"}
    with inference(teacher):
        p = teacher(**inputs, use_cache=False).logits
    q = student(**inputs, use_cache=False).logits
    how: Any = {"labels": batch["labels"], "compiled": False}
    loss = distill_loss(teacher=p, student=q, divergence=divergence, **how)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(student.parameters(), MAX_GRADIENT)
    optimizer.step()


def batches(room: Classroom) -> Iterator[dict[str, Any]]:
    """Batches in an order of the seed, again and again."""
    generator = torch.Generator().manual_seed(room.seed)
    how: dict[str, Any] = {"shuffle": True, "generator": generator, "collate_fn": PadRows()}
    while True:
        yield from DataLoader(room.blocks(TRAIN), room.plan.batch_size, **how)

"""Time that the fits of the study in language models take, by that of one step of each kind."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rkl.distill import distill_loss
from rkl.divergences import KL
from rkl.studies.akl.language.classroom import Classroom
from rkl.studies.akl.language.fits import batches, looked_at
from rkl.studies.akl.language.lessons import COST, ORDER, Lesson
from rkl.studies.akl.language.measures import Judge


class Costs(NamedTuple):
    """Seconds of a step, of a look at held-out text, and of all replies."""

    step: float
    look: float
    replies: float


def seconds_of(lessons: Sequence[Lesson], room: Classroom) -> Iterator[float]:
    """Seconds of each fit in one process; a step and a look of each student are timed for it."""
    costs: dict[str, Costs] = {}
    judge, plan = Judge(room), room.plan
    for it in lessons:
        if it.student not in costs:
            costs[it.student] = _measure(room, judge, it)
        step, look, replies = costs[it.student]
        if it.question == COST:
            yield len(it.divergences) * it.steps * step
            continue
        looks = len(looked_at(it.steps, 2 if it.question == ORDER else plan.growth))
        seconds = it.steps * step + looks * look
        if it.question != ORDER:
            seconds += replies
        share = plan.batch_size / (plan.prompts * plan.replies)  # of all replies, in a step
        yield len(it.divergences) * seconds + it.lmbda * it.steps * share * replies


def _measure(room: Classroom, judge: Judge, lesson: Lesson) -> Costs:
    student = room.new_student(lesson.student)
    batch = next(batches(room))
    labels = batch.pop("labels")

    def teacher_logits() -> Tensor:
        with torch.no_grad():
            return judge.teacher(**batch, use_cache=False).logits

    kept = teacher_logits() if room.teacher_source != room.teacher else None

    def step() -> None:
        p = teacher_logits() if kept is None else kept
        q = student(**batch, use_cache=False).logits
        distill_loss(teacher=p, student=q, divergence=KL(), labels=labels).backward()

    step()
    _ = judge.of_teacher  # once for all, like the first step
    return Costs(
        _time(step),
        _time(lambda: judge.on_text(student)),
        _time(lambda: judge.on_replies(student, 0)),
    )


def _time(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began

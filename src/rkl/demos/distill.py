"""``rkl demo``: a teacher made on the spot, and one student distilled under four divergences.

It ends in a folder of ordinary runs beside one report.
"""

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rkl.demos.corpus import Manual, read_manual
from rkl.demos.report import report_runs
from rkl.demos.stages import begun, distil_and_evaluate, phase, settings_of, watch
from rkl.distill.data import passages, tokenize
from rkl.distill.scratch import Schooling, Shape, new_model, new_tokenizer, school
from rkl.runs import Run

__all__ = ["Plan", "distill_demo", "report_runs", "run"]

DIVERGENCES = {
    "forward-kl": "kl()",
    "reverse-kl": "reverse-kl()",
    "akl": "akl(mu=0.5)",
    "js": "jensen-shannon(beta=0.5)",
}


@dataclass(frozen=True)
class Plan:
    """The sizes of the demonstration, which must end within minutes on two cores.

    Args:
        vocabulary: Tokens of the tokenizer.
        teacher: The teacher's size.
        teacher_schooling: How long the teacher learns from the text itself.
        student: The student's size.
        start_schooling: How long the student does so, before it meets the teacher.
        steps: Of each distillation.
        learning_rate: Of each distillation, at its peak.
        block: Tokens in a block.
        batch_size: Blocks in a step of a distillation.
        held_out_blocks: Blocks to evaluate on; None is all that are held out.
        prompts: Held-out beginnings that every student goes on from.
        seeds: Replies to each of them.
        reply_tokens: Longest reply.
        watched_blocks: Held-out blocks looked at during training.
    """

    vocabulary: int = 2000
    teacher: Shape = Shape(layers=4, width=192)
    teacher_schooling: Schooling = Schooling(steps=700, batch_size=4)
    student: Shape = Shape(layers=2, width=96)
    start_schooling: Schooling = Schooling(steps=200)
    steps: int = 150
    learning_rate: float = 1e-3
    block: int = 128
    batch_size: int = 8
    held_out_blocks: int | None = 80
    prompts: int = 12
    seeds: int = 3
    reply_tokens: int = 48
    watched_blocks: int = 4


def run(out: str | os.PathLike, *, steps: int | None = None, **how: Any) -> str:
    """Run the demonstration, with as many steps of each distillation as its plan by default."""
    plan = Plan() if steps is None else Plan(steps=steps)
    return distill_demo(plan, out, **how)


def distill_demo(
    plan: Plan,
    out: str | os.PathLike,
    *,
    overwrite: bool = False,
    seed: int = 0,
    device: str | None = None,
) -> str:
    """Make a teacher and a student, and distil one into the other under four divergences."""
    teacher, student = (str(Path(out, name)) for name in ("teacher", "start"))
    common: Any = {"seed": seed, "device": device}
    settings = settings_of(plan, Path(out), teacher=teacher, student=student, **common)
    manual = read_manual()
    about: Any = {"name": "distill", "divergences": DIVERGENCES, "before": "start"}
    about |= {"plan": asdict(plan), "device": device, "seed": seed, "overwrite": overwrite}
    with begun(out, manual, _done(plan, manual), **about) as whole:
        held_out = _school_both(plan, whole, manual, **common)
        watched = watch(teacher, held_out, plan.watched_blocks, plan.steps)
        distil_and_evaluate(whole, *settings, watched)
    return f"The report: {report_runs([whole.path])}"


def _done(plan: Plan, manual: Manual) -> str:
    """What the demonstration does, in plain words."""
    return (
        f"A teacher of {plan.teacher.layers} layers, {plan.teacher.width} wide, learned to "
        f"predict the manual of Python ({sum(map(len, manual.train.values())):,} characters) in "
        f"{plan.teacher_schooling.steps} steps, and a student of {plan.student.layers} layers, "
        f"{plan.student.width} wide, in {plan.start_schooling.steps}. From there the student was "
        f"distilled under {len(DIVERGENCES)} divergences, each for {plan.steps} steps on the same "
        "batches."
    )


def _school_both(plan: Plan, whole: Run, manual: Manual, *, seed: int, device: str | None):
    """The tokenizer, the teacher and the start of all students; the held-out text in tokens."""
    with phase(whole, "a tokenizer"):
        tokenizer = new_tokenizer(manual.train.values(), plan.vocabulary)
        blocks, held = (
            tokenize([{"text": it} for it in part.values()], tokenizer, max_length=plan.block)
            for part in (manual.train, manual.held_out)
        )
    rows = [{"text": it} for it in manual.train.values()]
    parts = (
        ("teacher", plan.teacher, plan.teacher_schooling),
        ("start", plan.student, plan.start_schooling),
    )
    for number, (name, shape, schooling) in enumerate(parts):
        with phase(whole, f"the {name}, on the text itself"):
            model = new_model(tokenizer, shape, seed=seed + number)
            settings = {"shape": asdict(shape), "schooling": asdict(schooling), "device": device}
            settings |= {"max_length": plan.block}
            place = Run.create(whole.path / name, "distill", settings, seed=seed)
            with place.running():
                place.remember_rows(passages(rows))
                school(model, tokenizer, blocks, schooling, place, seed=seed, device=device)
    return held

"""``rkl demo``: the whole of rkl at work on a problem small enough to watch.

``rkl demo`` makes a teacher on the spot; ``rkl demo real`` takes a pretrained one. Either ends in
a folder of ordinary runs beside one report. ``rkl demo neyman-scott`` is the first part of that
study, and ``rkl demo precision-recall`` a small part of that one.
"""

import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rkl.distill.data import passages, tokenize
from rkl.distill.scratch import Schooling, Shape, new_model, new_tokenizer, school
from rkl.runs import Run
from rkl.studies.demo_data import Manual, read_manual
from rkl.studies.demo_of_studies import STUDIES, run_study_demo
from rkl.studies.demo_report import report_runs
from rkl.studies.demo_stages import begun, distil_and_evaluate, phase, settings_of, watch

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


def run(
    name: str,
    out: str | os.PathLike,
    *,
    overwrite: bool = False,
    seed: int = 0,
    device: str | None = None,
    steps: int | None = None,
) -> str:
    """Run a demonstration.

    Args:
        name: "distill", "real" for a pretrained model, "neyman-scott", "precision-recall" or
            "xy".
        out: The folder to write.
        overwrite: Whether to replace the run that is there.
        seed: What all random numbers start from.
        device: "cpu" or "cuda"; a GPU by default if there is one.
        steps: Of each distillation; as many as fit its few minutes by default.

    Returns:
        What came out, and where the report is.
    """
    if name in STUDIES:
        how: Any = {"overwrite": overwrite, "seed": seed, "device": device, "steps": steps}
        return run_study_demo(name, out, **how)
    if name not in ("distill", "real"):
        known = "'distill', 'real', 'neyman-scott', 'precision-recall' or 'xy'"
        raise ValueError(f"name must be {known}; got {name!r}.")
    plan, demonstrate = Plan(), distill_demo
    if name == "real":
        from rkl.studies import demo_real

        plan, demonstrate = demo_real.Plan(), demo_real.real_demo
    sized: Any = plan if steps is None else replace(plan, steps=steps)
    return demonstrate(sized, out, overwrite=overwrite, seed=seed, device=device)


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

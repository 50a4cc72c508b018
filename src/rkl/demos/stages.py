"""What the demonstrations share: students under several divergences, watched and measured."""

import contextlib
import dataclasses
import functools
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rkl.demos.corpus import HELD_OUT, TRAIN, Manual
from rkl.distill.data import TokenDataset, spread
from rkl.distill.evaluate import EvaluateSettings, evaluate_run
from rkl.distill.generate import choose_prompts, reply_to, save
from rkl.distill.heads import inference
from rkl.distill.progress import clock, quiet, say
from rkl.distill.run import DistillSettings, distill
from rkl.distill.sources import read_rows
from rkl.distill.teachers import Teacher, load_model, load_tokenizer
from rkl.divergences import AKL
from rkl.runs import Run, remove_folder, save_tensors

WATCHED = "head-tail.safetensors"
REPLIES = "teacher-generations.jsonl"
HEAD = AKL(mu=0.5)  # as in rkl evaluate


def settings_of(
    plan: Any, folder: Path, *, teacher: str, seed: int, device: str | None, **start: Any
) -> tuple[DistillSettings, EvaluateSettings]:
    """Of all distillations and evaluations, which refuse what cannot be.

    Args:
        plan: The sizes of the demonstration.
        folder: Where it will be.
        teacher: What ``load_model`` will load.
        seed: Of the order of the text and of the replies.
        device: "cpu" or "cuda"; a GPU by default if there is one.
        **start: The student, or the layers it is to lose.
    """
    common: Any = {"teacher": teacher, "max_length": plan.block, "batch_size": plan.batch_size}
    common |= {"seed": seed, "device": device}
    distillation = DistillSettings(
        data=str(folder / TRAIN),
        held_out=0.0,  # so that the last step counts, not the best on what is evaluated
        max_steps=plan.steps,
        save_every=plan.steps,
        learning_rate=plan.learning_rate,
        compiled=False,
        **common,
        **start,
    )
    evaluation = EvaluateSettings(
        data=str(folder / HELD_OUT),
        max_blocks=plan.held_out_blocks,
        prompts=plan.prompts,
        seeds=plan.seeds,
        max_new_tokens=plan.reply_tokens,
        **common,
    )
    return distillation, evaluation


@contextlib.contextmanager
def begun(
    out: str | os.PathLike,
    manual: Manual,
    done: str,
    *,
    seed: int,
    overwrite: bool,
    **settings: Any,
) -> Iterator[Run]:
    """The folder of a demonstration, its text in it, running while this lasts."""
    whole = Run.create(out, "demos.distill", settings, seed=seed, overwrite=overwrite)
    with whole.running():
        whole.update(data=manual.record(), done=done)
        manual.write(whole.path)
        yield whole


@contextlib.contextmanager
def phase(run: Run, name: str) -> Iterator[None]:
    """Say what begins, and note down in ``run.json`` what time it took."""
    say(f"\n== {name} ==")
    clocks = time.perf_counter, time.process_time
    began = [it() for it in clocks]
    with quiet():
        yield
    wall, cpu = (round(it() - start, 1) for it, start in zip(clocks, began, strict=True))
    phases = run.record.get("phases", {}) | {name: {"seconds": wall, "cpu_seconds": cpu}}
    run.update(phases=phases)
    say(f"== {name}: {clock(wall)} ==")


@dataclass(frozen=True)
class Watched:
    """Held-out tokens at which students are looked at while they learn.

    All is told by rank under the teacher: the token that the teacher finds likeliest first.

    Attributes:
        tokens: Rows of text; what is looked at is what comes behind each token.
        p: What the teacher says there.
        ranking: Which atoms these are.
        one: Of all tokens, the one at which the teacher's entropy is the median.
        at: The steps at which to look.
        context: The text up to that one token.
        seen: What is kept of it: the mean over all tokens and the one token, of the teacher, and
            of each student at each step.
    """

    tokens: Tensor
    p: Tensor
    ranking: Tensor
    one: int
    at: Sequence[int]
    context: str
    seen: dict[str, Tensor]

    def look(self, name: str, model: Any, step: int) -> None:
        """Note down what a student says now, if this is a step to do so."""
        if step in self.at:
            q = probabilities(model, self.tokens).gather(-1, self.ranking)
            self.seen[f"{name}.mean.{step}"] = q.mean(0)
            self.seen[f"{name}.single.{step}"] = q[self.one]

    def record(self) -> dict[str, Any]:
        """What ``run.json`` keeps of it; the head is AKL's, in numbers of atoms."""
        _, chosen = HEAD.search(self.p[self.one].log()[None])
        rows, length = self.tokens.shape
        return {
            "tokens": rows * length,
            "steps": list(self.at),
            "context": self.context,
            "head": int(chosen.sum()),
        }


def watch(teacher: str, blocks: TokenDataset, count: int, steps: int) -> Watched:
    """What the teacher says of some held-out blocks, to be compared with students later.

    Args:
        teacher: What ``load_model`` loads.
        blocks: The held-out text.
        count: How many blocks to look at, evenly spaced among those of full length.
        steps: Of the training; it is looked at before, early, half-way and at the end.
    """
    full = [it["input_ids"] for it in (blocks[i] for i in range(len(blocks)))]
    tokens = torch.stack(spread([ids for ids in full if len(ids) == len(full[0])], count))
    model = load_model(teacher, dtype="float32")
    p, ranking = probabilities(model, tokens).sort(descending=True, stable=True)
    entropy = torch.special.entr(p).sum(-1)
    one = int((entropy == entropy.median()).nonzero()[0])
    row, place = divmod(one, tokens.shape[1])
    context = str(load_tokenizer(teacher).decode(tokens[row, : place + 1].tolist()))
    at = sorted({0, max(1, steps // 10), steps // 2, steps})
    seen = {"teacher.mean": p.mean(0), "teacher.single": p[one]}
    return Watched(tokens, p, ranking, one, at, context, seen)


def probabilities(model: Any, tokens: Int[Tensor, "rows length"]) -> Float[Tensor, "tokens vocab"]:
    """What a model says of the token behind each of these, row after row, on the CPU."""
    with inference(model):
        logits = model(input_ids=tokens.to(model.device), use_cache=False).logits
    return logits.float().softmax(-1).flatten(0, 1).cpu()


def distil_and_evaluate(
    run: Run,
    distillation: DistillSettings,
    evaluation: EvaluateSettings,
    watched: Watched,
    teacher: Teacher | None = None,
) -> None:
    """Distil once under every divergence, from one start on the same batches; measure them all.

    Args:
        run: The demonstration, whose settings say under which divergences, and what was before.
        distillation: What all distillations share.
        evaluation: How they and what was before are evaluated.
        watched: Where to look at the students meanwhile.
        teacher: The teacher as it is cached; by default the model that the settings name.
    """
    run.update(watched=watched.record())
    divergences = run.settings["divergences"]
    for name, divergence in divergences.items():
        with phase(run, f"distilling under {name}"):
            changed = dataclasses.replace(distillation, divergence=divergence)
            look = functools.partial(watched.look, name)
            distill(changed, run.path / name, teacher=teacher, watch=look)
            remove_folder(run.path / name / "checkpoints")  # nothing will go on from them
            Run(run.path / name).forget_missing_files()
            save_tensors(run.path / WATCHED, watched.seen)
    for name in (*divergences, run.settings["before"]):
        with phase(run, f"evaluating {name}"):
            evaluate_run(run.path / name, evaluation)
    with phase(run, "letting the teacher write"):
        source, once = distillation.teacher, dataclasses.replace(evaluation, seeds=1)
        model, tokenizer = load_model(source, dtype="float32"), load_tokenizer(source)
        prompts, _ = choose_prompts(read_rows(once.data), tokenizer, model, once)
        save(run.path / REPLIES, reply_to(prompts, model, tokenizer, once))

"""What the demonstrations share: students under several divergences, watched and measured."""

import contextlib
import dataclasses
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rkl.distill.data import TokenDataset, spread
from rkl.distill.evaluate import EvaluateSettings, evaluate_run
from rkl.distill.generate import reply_to, save
from rkl.distill.progress import clock, quiet, say
from rkl.distill.run import DistillSettings, distill
from rkl.distill.snapshots import Snapshots, median_token, probabilities
from rkl.distill.sources import read_rows
from rkl.distill.teachers import Teacher, load_model, load_tokenizer
from rkl.divergences import AKL
from rkl.runs import Run, remove_folder, save_tensors
from rkl.studies.demo_data import HELD_OUT, TRAIN, Manual

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
    whole = Run.create(out, "studies.demo", settings, seed=seed, overwrite=overwrite)
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

    Attributes:
        tokens: Rows of text; what is looked at is what comes behind each token.
        p: What the teacher says there, likeliest atom first.
        ranking: Which atoms these are.
        one: Of all tokens, the one at which the teacher's entropy is the median.
        at: The steps at which to look.
        context: The text up to that one token.
    """

    tokens: Tensor
    p: Tensor
    ranking: Tensor
    one: int
    at: Sequence[int]
    context: str

    def snapshots(self) -> Snapshots:
        """A callback for one student."""
        return Snapshots(self.tokens, self.ranking, one=self.one, at=self.at)

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

    def save(self, folder: Path, taken: Mapping[str, Snapshots]) -> None:
        """Write all that was seen so far, the mean over tokens and the one token."""
        tensors = {"teacher.mean": self.p.mean(0), "teacher.single": self.p[self.one]}
        for name, snapshots in taken.items():
            for step in snapshots.mean:
                tensors[f"{name}.mean.{step}"] = snapshots.mean[step]
                tensors[f"{name}.single.{step}"] = snapshots.single[step]
        save_tensors(folder / WATCHED, tensors)


def watch(teacher: str, blocks: TokenDataset, count: int, steps: int) -> Watched:
    """What the teacher says of some held-out blocks, to be compared with students later.

    Args:
        teacher: What ``load_model`` loads.
        blocks: The held-out text.
        count: How many blocks to look at, evenly spaced among those of full length.
        steps: Of the training; it is looked at before, early, half-way and at the end.
    """
    full = [it["input_ids"] for it in (blocks[i] for i in range(len(blocks)))]
    full = [ids for ids in full if len(ids) == len(full[0])]
    tokens = torch.stack(spread(full, count))
    p, ranking = probabilities(load_model(teacher, dtype="float32"), tokens).sort(
        descending=True, stable=True
    )
    one = median_token(p)
    row, place = divmod(one, tokens.shape[1])
    context = str(load_tokenizer(teacher).decode(tokens[row, : place + 1].tolist()))
    at = sorted({0, max(1, steps // 10), steps // 2, steps})
    return Watched(tokens, p, ranking, one, at, context)


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
    taken: dict[str, Snapshots] = {}
    for name, divergence in run.settings["divergences"].items():
        with phase(run, f"distilling under {name}"):
            taken[name] = watched.snapshots()
            changed = dataclasses.replace(distillation, divergence=divergence)
            distill(changed, run.path / name, teacher=teacher, callbacks=[taken[name]])
            remove_folder(run.path / name / "checkpoints")  # nothing will go on from them
            watched.save(run.path, taken)
    for name in (*taken, run.settings["before"]):
        with phase(run, f"evaluating {name}"):
            evaluate_run(run.path / name, evaluation)
    with phase(run, "letting the teacher write"):
        source, once = distillation.teacher, dataclasses.replace(evaluation, seeds=1)
        model, tokenizer = load_model(source, dtype="float32"), load_tokenizer(source)
        save(run.path / REPLIES, reply_to(read_rows(once.data), model, tokenizer, once))

"""One of two processes whose students write; run by test_two_writers.py."""

import atexit
import json
import os
import sys
from pathlib import Path

import torch
from transformers import GPT2LMHeadModel

import rkl
from rkl.distill import CollapseError, CollapseLimits, DistillConfig, DistillTrainer, Writer
from rkl.distill.writing.rollouts import Reply


def gloo_threads() -> int:
    tasks = Path("/proc/self/task")
    names = [(it / "comm").read_text() for it in tasks.iterdir()] if tasks.is_dir() else []
    return sum("gloo" in it for it in names)


OWN = {"lmbda": 1.0, "max_completion_length": 6, "prompt_tokens": 4, "learning_rate": 1e-2}
OWN |= {"max_steps": 4, "save_steps": 2, "logging_steps": 1, "gradient_accumulation_steps": 2}
OWN |= {"per_device_train_batch_size": 2, "disable_tqdm": True, "log_level": "error"}


class Silent(Writer):
    """Writes the token that ends a reply and nothing else."""

    def write(self, prompts, *, seed):
        return [Reply([1], True) for _ in prompts]


def trainer_in(folder: Path, out: str, **changes) -> DistillTrainer:
    teacher, student = (
        GPT2LMHeadModel.from_pretrained(folder / name, dtype=torch.float64)
        for name in ("teacher", "student")
    )
    how = {name: changes.pop(name) for name in ("limits",) if name in changes}
    args = DistillConfig(
        str(folder / out),
        use_cpu=True,
        ddp_backend="gloo",
        **OWN | {"report_to": "none"} | changes,
    )
    rows = json.loads((folder / "rows.json").read_text())
    return DistillTrainer(
        student, args, teacher=teacher, divergence=rkl.KL(), train_dataset=rows, **how
    )


def noting(trainer: DistillTrainer) -> list:
    """The batches that a trainer takes, step by step, as lists."""
    steps, inner = [], trainer.get_batch_samples

    def take(*words):
        batches, count = inner(*words)
        steps.append([{name: it.tolist() for name, it in batch.items()} for batch in batches])
        return batches, count

    trainer.get_batch_samples = take
    return steps


def weights(trainer: DistillTrainer) -> list[torch.Tensor]:
    return [it.detach().clone() for it in trainer._student().parameters()]


def main(folder: Path) -> None:
    rank = os.environ["RANK"]
    last = folder / f"threads-{rank}"
    atexit.register(lambda: last.write_text(str(gloo_threads())))  # the first, which runs last
    whole = trainer_in(folder, "whole", log_completions=True)
    steps = noting(whole)
    whole.train()
    losses = [row["loss"] for row in whole.state.log_history if "loss" in row]

    resumed = trainer_in(folder, "resumed")
    resumed.train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-2"))
    same = all(map(torch.equal, weights(resumed), weights(whole)))

    how = {"guard_window": 1, "limits": CollapseLimits(empty=0.4), "save_strategy": "no"}
    guarded, stopped = trainer_in(folder, "guarded", **how), None
    if rank == "1":
        guarded._mixture.student = Silent()
    try:
        guarded.train()
    except CollapseError as error:
        stopped = [error.step, error.reason]
    result = {
        "threads": gloo_threads(),
        "steps": steps,
        "losses": losses,
        "same": same,
        "stopped": stopped,
    }
    (folder / f"result-{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

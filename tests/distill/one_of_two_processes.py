"""One step of distillation on this process's share of the rows; run by test_trainer.py."""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import GPT2LMHeadModel

import rkl
from rkl.distill import DistillConfig, DistillTrainer


def main(folder: Path) -> None:
    teacher, student = (
        GPT2LMHeadModel.from_pretrained(folder / name, dtype=torch.float64)
        for name in ("teacher", "student")
    )
    args = DistillConfig(
        str(folder / "out"),
        use_cpu=True,
        ddp_backend="gloo",
        disable_tqdm=True,
        **json.loads((folder / "settings.json").read_text()),
    )
    rows = json.loads((folder / "rows.json").read_text())
    trainer = DistillTrainer(
        student, args, teacher=teacher, divergence=rkl.KL(), train_dataset=rows, eval_dataset=rows
    )
    trainer.train()
    metrics = trainer.evaluate()
    if trainer.is_world_process_zero():
        save_file(dict(student.named_parameters()), folder / "trained.safetensors")
        log = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        results = {name: metrics[name] for name in ("eval_loss", "eval_cross_entropy")}
        (folder / "results.json").write_text(json.dumps(results | {"loss": log[0]}))
    # Threads of gloo that outlive the interpreter end the process by SIGABRT, now and then.
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

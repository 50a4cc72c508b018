"""Distillation with student and teacher shared by DeepSpeed's ZeRO-3; for test_zero3.py."""

import json
import math
import sys
from pathlib import Path

import torch.distributed as dist
from transformers import AutoModelForCausalLM

import rkl
from rkl.distill import DistillConfig, DistillTrainer
from rkl.distill.selection import DivergedError


def shares(model):
    """Whether all weights are ZeRO-3's, and how many numbers of them are here and anywhere."""
    parameters = list(model.parameters())
    apart = all(hasattr(it, "ds_id") for it in parameters)
    here = sum(it.untyped_storage().nbytes() // it.element_size() for it in parameters)
    here += sum(it.ds_tensor.numel() for it in parameters if hasattr(it, "ds_tensor"))
    return apart, here, sum(getattr(it, "ds_numel", it.numel()) for it in parameters)


def prepared(folder, out):
    """Student, teacher and trainer; of weights that are whole, or came shared out."""
    given = json.loads((folder / "settings.json").read_text())

    def load():
        return [AutoModelForCausalLM.from_pretrained(folder / it) for it in ("student", "teacher")]

    models = None if given["early"] else load()
    args = DistillConfig(str(folder / out), use_cpu=True, ddp_backend="gloo", **given["settings"])
    if given["early"]:  # which transformers does itself with GPUs
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo")
    rows = json.loads((folder / "rows.json").read_text())
    student, teacher = models or load()
    data = {"train_dataset": rows, "eval_dataset": rows}
    trainer = DistillTrainer(student, args, teacher=teacher, divergence=rkl.AKL(), **data)
    return student, teacher, trainer


def train(folder, out, resume=None):
    student, teacher, trainer = prepared(folder, out)
    trainer.train(resume_from_checkpoint=resume)
    loss = trainer.evaluate()["eval_loss"]
    trainer.save_model(str(folder / out / "final"))
    return loss, shares(student), shares(teacher)


def diverge(folder):
    """Save what is left of a student whose gradient is NaN in the second step."""
    student, _, trainer = prepared(folder, "nan")

    def second_step(gradient):
        return gradient * math.nan if trainer.state.global_step else gradient

    student.lm_head.weight.register_hook(second_step)
    try:
        trainer.train()
    except DivergedError as error:
        trainer.save_model(str(folder / "nan" / "final"))
        return str(error)
    return "it went on"


def main(folder):
    import deepspeed.ops  # here, for it is not among the packages of CI

    # No faster way between processes on one CPU is compiled first.
    deepspeed.ops.__compatible_ops__ = {}
    told = train(folder, "whole")
    train(folder, "resumed", str(folder / "whole" / "checkpoint-1"))
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps([*told, diverge(folder)]))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

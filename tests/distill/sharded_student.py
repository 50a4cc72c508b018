"""Distillation with student and teacher sharded by fully_shard; for test_sharded_student.py."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from transformers import LlamaForCausalLM

import rkl
from rkl.distill import DistillConfig, DistillTrainer


def sharded(folder):
    model: Any = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64)
    adapted, adapter = model, folder / "adapter"
    if adapter.is_dir():
        from peft import PeftModel

        adapted = PeftModel.from_pretrained(model, adapter, is_trainable=True)
    for layer in model.model.layers:
        fully_shard(layer)
    if folder.name == "student":
        fully_shard(model.lm_head)
    fully_shard(model)
    return adapted


def shares(model):
    """Whether all parameters are DTensors, and how many numbers of them are here and anywhere."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    parameters = list(model.parameters())
    apart = all(isinstance(it, DTensor) for it in parameters)
    parts = [it.to_local() for it in parameters if isinstance(it, DTensor)]
    here = sum(it.untyped_storage().nbytes() / it.element_size() for it in parts)
    return apart, here, sum(it.numel() for it in parameters)


def trained(folder, out, resume=None):
    student, teacher = sharded(folder / "student"), sharded(folder / "teacher")
    settings = json.loads((folder / "settings.json").read_text())
    args = DistillConfig(str(folder / out), use_cpu=True, ddp_backend="gloo", **settings)
    rows = json.loads((folder / "rows.json").read_text())
    trainer = DistillTrainer(
        student,
        args,
        teacher=teacher,
        divergence=rkl.AKL(),
        train_dataset=rows,
        eval_dataset=rows,
    )
    trainer.train(resume_from_checkpoint=resume)
    loss = trainer.evaluate()["eval_loss"]
    trainer.save_model(str(folder / out / "final"))
    return loss, shares(student), shares(teacher)


def main(folder):
    loss, *parts = trained(folder, "whole")
    first = str(folder / "whole" / "checkpoint-1")
    trained(folder, "resumed", first)
    rank = dist.get_rank()
    (folder / f"{rank}.json").write_text(json.dumps([loss, *parts]))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

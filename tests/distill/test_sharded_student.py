"""Student and teacher whose weights processes share (FSDP2): the steps of one process."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import sharded_student
import torch
import torch.distributed as dist
import transformers
from accelerate import PartialState
from patience import HANGS
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import fully_shard

import rkl

# Adam divides by the size of a gradient; with a large epsilon a wrong factor of it shows.
SETTINGS = {"learning_rate": 1e-2, "adam_epsilon": 1.0, "max_grad_norm": 100.0, "max_steps": 2}
SETTINGS |= {"logging_steps": 1, "save_steps": 1, "disable_tqdm": True, "seed": 3}


def run_two_processes(folder):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    common |= {"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, sharded_student.__file__, folder],
            env=os.environ | common | {"RANK": rank, "LOCAL_RANK": rank},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    for process in processes:
        _, errors = process.communicate(timeout=HANGS)
        assert process.returncode == 0, errors
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in "01"]


def test_processes_that_share_the_weights_train_and_resume_as_one(
    tmp_path, tiny_model, tiny_rows, tiny_trainer
):
    teacher, student = tiny_model("Llama", seed=1), tiny_model("Llama", seed=2)
    for name, model in (("teacher", teacher), ("student", student)):
        model.save_pretrained(tmp_path / name)
    rows = tiny_rows(8)
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    settings = SETTINGS | {"per_device_train_batch_size": 1, "report_to": "none"}
    settings |= {"gradient_accumulation_steps": 2}
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    told = run_two_processes(tmp_path)

    for _, *models in told:
        for apart, here, everywhere in models:
            assert apart
            assert here == pytest.approx(everywhere / 2, rel=0.05)  # shards of odd sizes
    student = student.double()
    trainer = tiny_trainer(
        student,
        teacher.double(),
        rows,
        settings={"divergence": rkl.AKL(), "eval_dataset": rows},
        **SETTINGS | {"per_device_train_batch_size": 4},
    )
    trainer.train()
    loss = trainer.evaluate()["eval_loss"]
    assert [it[0] for it in told] == pytest.approx([loss, loss], rel=1e-6)
    for name in ("loss", "grad_norm"):
        assert logged(tmp_path / "whole", name) == pytest.approx(
            [row[name] for row in trainer.state.log_history if name in row], rel=1e-6
        )
    expected = dict(student.named_parameters())
    for folder in ("whole/final", "resumed/final", "whole/checkpoint-2"):
        saved = load_file(tmp_path / folder / "model.safetensors")
        assert saved.keys() == expected.keys()
        for name, tensor in saved.items():
            torch.testing.assert_close(tensor, expected[name].detach(), rtol=1e-6, atol=1e-9)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "final")
    assert sum(it.numel() for it in loaded.parameters()) == told[0][1][2]


def logged(folder, name):
    state = json.loads(Path(folder, "checkpoint-2", "trainer_state.json").read_text())
    return [row[name] for row in state["log_history"] if name in row]


def test_a_model_that_each_process_has_alone_is_not_taken_for_a_shared_one():
    apart, here, everywhere = sharded_student.shares(nn.Linear(4, 3))
    assert not apart
    assert here != pytest.approx(everywhere / 2, rel=0.05)


# What is refused


@pytest.fixture
def group():
    """A group of this process alone, for fully_shard."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    PartialState._reset_state()


@pytest.mark.parametrize(
    ("name", "value"), [("lmbda", 0.5), ("seq_kd", True), ("teacher_model_kind", "ema")]
)
def test_a_sharded_student_neither_writes_nor_is_its_own_teacher(
    name, value, group, tiny_model, tiny_rows, tiny_trainer
):
    teacher = None if name == "teacher_model_kind" else tiny_model(seed=1)
    student = fully_shard(tiny_model(seed=2))
    with pytest.raises(NotImplementedError, match=f"{name} is not supported .* got {value!r}"):
        tiny_trainer(student, teacher, tiny_rows(4), **{name: value})


def test_a_sharded_student_has_no_adapters(group, tiny_model, tiny_rows, tiny_trainer, tiny_lora):
    student = fully_shard(tiny_lora(tiny_model("Llama", seed=2), ["q_proj"]))
    with pytest.raises(NotImplementedError, match="a PEFT student sharded by fully_shard"):
        tiny_trainer(student, tiny_model("Llama", seed=1), tiny_rows(4))


def test_a_sharded_teacher_does_not_write(group, tiny_model, tiny_rows, tiny_trainer):
    teacher = fully_shard(tiny_model(seed=1))
    with pytest.raises(NotImplementedError, match="seq_kd is not supported with a teacher"):
        tiny_trainer(tiny_model(seed=2), teacher, tiny_rows(4), seq_kd=True)


def test_of_several_teachers_none_may_be_sharded(group, tiny_model, tiny_rows, tiny_trainer):
    several = {"one": tiny_model(seed=1), "two": fully_shard(tiny_model(seed=3))}
    with pytest.raises(NotImplementedError, match="teachers: two is sharded by fully_shard"):
        tiny_trainer(tiny_model(seed=2), None, tiny_rows(4), settings={"teachers": several})

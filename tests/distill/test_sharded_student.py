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
import transformers
from patience import HANGS
from safetensors.torch import load_file
from torch import nn

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
    settings = SETTINGS | {"per_device_train_batch_size": 2, "report_to": "none"}
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

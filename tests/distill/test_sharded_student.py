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
from rkl.distill.models.sharded import load_weights
from rkl.distill.writing.on_policy import COMPLETIONS
from rkl.runs.files import read_jsonl

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


# Without a draw, for each process draws other text; of seven rows one process gets no eighth.
WRITTEN = {"sampling_temperature": 0.0, "max_completion_length": 6, "guard": "off"}
WRITTEN |= {"log_completions": True}
OWN_TEXT = "completion_length", "truncated", "student_entropy", "teacher_entropy"


@pytest.mark.parametrize(
    ("more", "adapted"),
    [
        ({}, False),
        pytest.param(WRITTEN | {"lmbda": 0.8}, False, marks=pytest.mark.slow),
        pytest.param(WRITTEN | {"lmbda": 0.8, "seq_kd": True}, False, marks=pytest.mark.slow),
        pytest.param(WRITTEN | {"lmbda": 1.0}, True, marks=pytest.mark.slow),
    ],
)
def test_processes_that_share_the_weights_train_and_resume_as_one(
    more, adapted, tmp_path, tiny_model, tiny_rows, tiny_trainer, tiny_lora
):
    teacher, student = tiny_model("Llama", seed=1), tiny_model("Llama", seed=2)
    for name, model in (("teacher", teacher), ("student", student)):
        model.generation_config.eos_token_id = [1, *range(3, 40, 4)]  # replies of all lengths
        model.save_pretrained(tmp_path / name)
    if adapted:
        student = tiny_lora(student, ["q_proj", "down_proj"])
        student.save_pretrained(tmp_path / "student" / "adapter")
    rows = tiny_rows(7)
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    common = SETTINGS | more | {"gradient_accumulation_steps": 2}
    settings = common | {"per_device_train_batch_size": 1, "report_to": "none"}
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
        **common | {"per_device_train_batch_size": 2},
    )
    trainer.train()
    loss = trainer.evaluate()["eval_loss"]
    assert [it[0] for it in told] == pytest.approx([loss, loss], rel=1e-6)
    for name in ("loss", "grad_norm", *(OWN_TEXT if more.get("lmbda") else ())):
        assert logged(tmp_path / "whole", name) == pytest.approx(
            [row[name] for row in trainer.state.log_history if name in row], rel=1e-6
        )
    if more:
        written, first = (
            [[it["completion"] for it in row["rows"]] for row in read_jsonl(path)]
            for path in (trainer.completions, tmp_path / "whole" / COMPLETIONS)
        )
        assert any(len(one) != len(other) for one, other, *_ in written)
        assert [one for (one,) in first] == [one for one, *_ in written]
    trainer.save_model(str(tmp_path / "expected"))
    file = "adapter_model.safetensors" if adapted else "model.safetensors"
    expected = load_file(tmp_path / "expected" / file)
    for folder in ("whole/final", "resumed/final", "whole/checkpoint-2"):
        saved = load_file(tmp_path / folder / file)
        assert saved.keys() == expected.keys()
        for name, tensor in saved.items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-9)
    parts, whole = (load_file(tmp_path / name / "final" / file) for name in ("resumed", "whole"))
    assert all(torch.equal(tensor, whole[name]) for name, tensor in parts.items())
    if not adapted:
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


def test_a_sharded_student_is_not_its_own_teacher(group, tiny_model, tiny_rows, tiny_trainer):
    student = fully_shard(tiny_model(seed=2))
    with pytest.raises(NotImplementedError, match="teacher_model_kind is not supported .*'ema'"):
        tiny_trainer(student, None, tiny_rows(4), teacher_model_kind="ema")


def test_adapters_that_processes_would_not_share_are_refused(
    group, tiny_model, tiny_rows, tiny_trainer, tiny_lora
):
    teacher, rows = tiny_model("Llama", seed=1), tiny_rows(4)
    adapted = tiny_lora(tiny_model("Llama", seed=2), ["q_proj"])
    with pytest.raises(ValueError, match="Call it on model.get_base_model"):
        tiny_trainer(fully_shard(adapted), teacher, rows)
    late = tiny_lora(tiny_model("Llama", seed=2), ["q_proj"])
    for parameter in late.parameters():
        parameter.requires_grad_(False)
    fully_shard(late.get_base_model())
    late.get_base_model().extra = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="extra.weight is trained and no part"):
        tiny_trainer(late, teacher, rows)
    fine = tiny_lora(tiny_model("Llama", seed=2), ["q_proj"])
    fully_shard(fine.get_base_model())
    with pytest.raises(NotImplementedError, match="teacher='base' is not supported"):
        tiny_trainer(fine, "base", rows)


def test_adapters_of_others_are_not_loaded_into_a_sharded_student(
    group, tiny_model, tiny_lora, tmp_path
):
    tiny_lora(tiny_model("Llama", seed=2), ["k_proj"]).save_pretrained(tmp_path)
    student = tiny_lora(tiny_model("Llama", seed=2), ["q_proj"])
    fully_shard(student.get_base_model())
    with pytest.raises(ValueError, match="the weights of another adapter: .*k_proj"):
        load_weights(student, tmp_path)
    with pytest.raises(FileNotFoundError, match="has no adapter_model.safetensors"):
        load_weights(student, tmp_path / "nothing")


def test_of_several_teachers_none_may_be_sharded(group, tiny_model, tiny_rows, tiny_trainer):
    several = {"one": tiny_model(seed=1), "two": fully_shard(tiny_model(seed=3))}
    with pytest.raises(NotImplementedError, match="teachers: two is sharded by fully_shard"):
        tiny_trainer(tiny_model(seed=2), None, tiny_rows(4), settings={"teachers": several})

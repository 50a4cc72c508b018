"""Student and teacher whose weights processes share (DeepSpeed's ZeRO-3): the steps of one."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from patience import HANGS
from safetensors.torch import load_file

import rkl
from rkl.distill import DistillConfig
from rkl.distill.arguments import check_zero3
from rkl.distill.writing.on_policy import COMPLETIONS
from rkl.runs.files import read_jsonl

PROGRAM = Path(__file__).with_name("zero3_student.py")
EXAMPLE = Path(__file__).parents[2] / "examples" / "accelerate_zero3.yaml"
TORCHRUN = "torch.distributed.run", "--standalone", "--nproc_per_node", "2"
ACCELERATE = "accelerate.commands.launch", "--config_file", str(EXAMPLE)
# Adam divides by the size of a gradient; with a large epsilon a wrong factor of it shows.
SETTINGS = {"learning_rate": 1e-2, "adam_epsilon": 1.0, "max_grad_norm": 100.0, "max_steps": 2}
SETTINGS |= {"logging_steps": 1, "save_steps": 1, "disable_tqdm": True, "seed": 3}
# Without a draw, for each process draws other text.
WRITTEN = {"sampling_temperature": 0.0, "max_completion_length": 6, "guard": "off"}
WRITTEN |= {"log_completions": True, "lmbda": 0.8, "seq_kd": True}
# DeepSpeed else keeps small weights, and those that are soon used again, in each process.
STAGE = {"stage": 3, "stage3_param_persistence_threshold": 0}
STAGE |= {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
SIZES = "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"
CONFIG = {"zero_optimization": STAGE} | dict.fromkeys((*SIZES, "gradient_clipping"), "auto")

installed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"
)


def run(launcher, folder):
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [sys.executable, "-m", *launcher, str(PROGRAM), str(folder)],
        env=environment | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=HANGS,
    )
    assert process.returncode == 0, process.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in "01"]


@installed
@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "more", "early"),
    [(TORCHRUN, {}, False), (TORCHRUN, WRITTEN, True), (ACCELERATE, {}, False)],
)
def test_processes_that_share_the_weights_by_deepspeed_train_and_resume_as_one(
    launcher, more, early, tmp_path, tiny_model, tiny_rows, tiny_trainer
):
    teacher, student = tiny_model("Llama", seed=1), tiny_model("Llama", seed=2)
    for name, model in (("teacher", teacher), ("student", student)):
        model.generation_config.eos_token_id = [1, *range(3, 40, 4)]  # replies of all lengths
        model.save_pretrained(tmp_path / name)
    rows = tiny_rows(7)
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    common = SETTINGS | more
    if launcher is TORCHRUN:
        common |= {"gradient_accumulation_steps": 2}
    settings = common | {"per_device_train_batch_size": 1, "report_to": "none"}
    if launcher is TORCHRUN:
        settings |= {"deepspeed": CONFIG}
    (tmp_path / "settings.json").write_text(json.dumps({"settings": settings, "early": early}))
    told = run(launcher, tmp_path)

    for _, *models, diverged in told:
        assert "the gradient is NaN or infinite at step 2" in diverged
        for apart, here, everywhere in models:
            assert apart
            if launcher is TORCHRUN:  # the file for accelerate has DeepSpeed's own thresholds
                assert here == pytest.approx(everywhere / 2, rel=0.05)  # parts of odd sizes
    trainer = tiny_trainer(
        student,
        teacher,
        rows,
        settings={"divergence": rkl.AKL(), "eval_dataset": rows},
        **common | {"per_device_train_batch_size": 2},
    )
    trainer.train()
    loss = trainer.evaluate()["eval_loss"]
    # Everything is computed in float32, in another order: DeepSpeed trains nothing wider.
    assert [it[0] for it in told] == pytest.approx([loss, loss], rel=1e-6)
    for name in ("loss", "grad_norm"):
        state = json.loads((tmp_path / "whole/checkpoint-2/trainer_state.json").read_text())
        assert [row[name] for row in state["log_history"] if name in row] == pytest.approx(
            [row[name] for row in trainer.state.log_history if name in row], rel=1e-6
        )
    if more:
        written, first = (
            [[it["completion"] for it in row["rows"]] for row in read_jsonl(path)]
            for path in (trainer.completions, tmp_path / "whole" / COMPLETIONS)
        )
        assert any(len(one) != len(other) for one, other, *_ in written)
        assert [one for (one,) in first] == [one for one, *_ in written]
    expected = {name: it.detach() for name, it in student.named_parameters()}
    before = load_file(tmp_path / "student" / FILE)
    for folder in ("whole/final", "whole/checkpoint-2"):
        saved = load_file(tmp_path / folder / FILE)
        assert saved.keys() == expected.keys()
        for name, tensor in saved.items():
            error = float((tensor - expected[name]).abs().max())
            assert error < 1e-6 * float(expected[name].abs().max())
            assert error < 1e-3 * float((expected[name] - before[name]).abs().max())  # of its move
    same(tmp_path / "resumed/final", tmp_path / "whole/final")
    same(tmp_path / "nan/final", tmp_path / "nan/checkpoint-1")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "final")
    assert sum(it.numel() for it in loaded.parameters()) == told[0][1][2]


FILE = "model.safetensors"


def same(one, other):
    """Assert that two folders hold the same bits."""
    first, second = (load_file(it / FILE) for it in (one, other))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


# What is refused


def arguments(zero=None, **more):
    """Settings with such a configuration, without DeepSpeed, which reads it when it is given."""
    args = DistillConfig(use_cpu=True)
    config = {"zero_optimization": {"stage": 3} | (zero or {})} | more
    args.deepspeed_plugin = SimpleNamespace(deepspeed_config=config)
    return args


@pytest.mark.parametrize(
    ("zero", "more", "words"),
    [
        ({"stage": 2}, {}, "zero_optimization.stage must be 3; got 2"),
        ({"offload_param": {"device": "cpu"}}, {}, "offload_param is not supported.*'cpu'"),
        ({"offload_optimizer": {"device": "nvme"}}, {}, "offload_optimizer is not .*'nvme'"),
        ({"zero_hpz_partition_size": 2}, {}, "zero_hpz_partition_size is not supported; got 2"),
        ({"zero_quantized_weights": True}, {}, "zero_quantized_weights is not supported"),
        ({}, {"optimizer": {"type": "Adam"}}, "optimizer is not supported"),
        ({}, {"scheduler": {"type": "WarmupLR"}}, "scheduler is not supported"),
        ({}, {"fp16": {"enabled": True}}, "fp16 is not supported"),
    ],
)
def test_a_configuration_that_was_never_run_is_refused(zero, more, words, tiny_model):
    with pytest.raises(NotImplementedError, match=words):
        check_zero3(tiny_model(seed=2), arguments(zero, **more), tiny_model(seed=1), None)


def test_a_configuration_that_leaves_things_out_is_let_through(tiny_model):
    off = {"offload_param": {"device": "none", "nvme_path": None}}
    check_zero3(tiny_model(seed=2), arguments(off, fp16={"enabled": False}), None, None)


@pytest.mark.parametrize(
    ("name", "value"), [("teacher_model_kind", "ema"), ("teacher_alignment", "bytes")]
)
def test_what_zero3_cannot_do_is_refused(name, value, tiny_model):
    args = arguments()
    setattr(args, name, value)
    with pytest.raises(NotImplementedError, match=f"{name} is not supported .* got {value!r}"):
        check_zero3(tiny_model(seed=2), args, None, None)


def test_several_teachers_and_adapters_are_refused(tiny_model, tiny_lora):
    model = tiny_model("Llama", seed=2)
    with pytest.raises(NotImplementedError, match=r"teachers is not supported .*\['one'\]"):
        check_zero3(model, arguments(), None, {"one": model})
    with pytest.raises(NotImplementedError, match="teacher is not supported .* got 'base'"):
        check_zero3(model, arguments(), "base", None)
    with pytest.raises(NotImplementedError, match="a PEFT student"):
        check_zero3(tiny_lora(model, ["q_proj"]), arguments(), None, None)

"""Several processes that share a run: who writes, what they agree on, and that they are one."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import material
import pytest
import sharded_run
import torch
from patience import HANGS
from safetensors.torch import load_file
from transformers import GPT2LMHeadModel

from rkl.cli import main
from rkl.distill import processes, run
from rkl.distill.processes import Processes, check_launcher, joined
from rkl.runs import Run
from rkl.runs.processes import PeerError, World, launched_alone, world
from rkl.runs.signals import StoppedError, StopRequest

TWO = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
TWO |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
TORCHRUN = "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"
EXAMPLES = Path(__file__).parents[2] / "examples"
ACCELERATE = "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"


class Scripted(Processes):
    """One of two processes, whose peer tells what a test has it tell."""

    def __init__(self, rank, *told):
        super().__init__(World(rank, 2, 2), "a group")
        self.__dict__["told"] = list(told)

    def gather(self, words):
        other = self.__dict__["told"].pop(0)
        return [words, other] if self.main else [other, words]


# What the environment says


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, World(0, 1, 1)),
        ({"WORLD_SIZE": "1", "RANK": "0"}, World(0, 1, 1)),
        ({"WORLD_SIZE": ""}, World(0, 1, 1)),
        (TWO | {"RANK": "1"}, World(1, 2, 2)),
        (TWO | {"WORLD_SIZE": "4", "RANK": "3"}, World(3, 4, 2)),
    ],
)
def test_processes_are_counted_as_torchrun_says(environment, expected):
    assert world(environment) == expected


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"WORLD_SIZE": "2"}, "RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT of the environment"),
        ({name: it for name, it in TWO.items() if name != "LOCAL_RANK"}, "LOCAL_RANK"),
        (TWO | {"RANK": "2"}, "RANK must be below WORLD_SIZE; got 2 of 2"),
        (TWO | {"WORLD_SIZE": "two"}, "WORLD_SIZE of the environment must be a number"),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}, "torchrun"),
        ({"PMI_SIZE": "2"}, "torchrun"),
    ],
)
def test_processes_that_cannot_find_one_another_are_refused(environment, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        world(environment)


@pytest.mark.parametrize("command", ["divergences", "study akl", "demo"])
def test_other_verbs_refuse_several_processes(command, monkeypatch, capsys):
    for name, value in TWO.items():
        monkeypatch.setenv(name, value)
    code = main(command.split())
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert code == 2
    assert f"rkl {command.split()[0]} runs in one process; 2 were started" in line


def test_the_other_processes_print_no_result(monkeypatch, capsys):
    monkeypatch.setattr("rkl.cli.DELAY", 0.0)
    for name, value in (TWO | {"RANK": "1", "LOCAL_RANK": "1"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):
        main(["--help"])
    assert capsys.readouterr().out == ""


def test_accelerate_that_starts_one_process_of_several_is_warned_of(monkeypatch):
    """As ``accelerate launch --cpu --num_processes 2`` of accelerate 1.15 does."""
    left = {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"}
    left |= {"ACCELERATE_USE_CPU": "True", "MASTER_PORT": "29500"}
    assert launched_alone(left)
    assert not launched_alone({"ACCELERATE_MIXED_PRECISION": "no"})
    assert not launched_alone({"MASTER_ADDR": "127.0.0.1"})
    assert not launched_alone(left | TWO)
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    with pytest.warns(UserWarning, match="starts one process"), joined("cpu") as alone:
        assert alone.count == 1


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("ACCELERATE_USE_FSDP", "true", "not with FSDP; expected --multi_gpu, with .* --shard"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "not with DeepSpeed"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "dynamo_backend must be no"),
        ("ACCELERATE_MIXED_PRECISION", "bf16", "mixed_precision is bf16, but dtype is float32"),
        ("ACCELERATE_MIXED_PRECISION", "fp16", "mixed_precision is fp16"),
    ],
)
def test_what_accelerate_would_change_unsaid_is_refused(name, value, words, monkeypatch):
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=words):
        check_launcher("float32")


def test_what_accelerate_and_the_settings_both_say_is_let_through(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    check_launcher("bfloat16")


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(processes, "on_cpu", lambda device: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="2 processes on this machine need a GPU each"):
        processes._check_launch(World(0, 2, 2), None)
    with pytest.raises(ValueError, match="device must be cpu or cuda with 2 processes"):
        processes._check_launch(World(0, 2, 2), "cuda:1")


def test_a_trainer_that_would_train_alone_is_refused(monkeypatch, tiny_model, tiny_trainer):
    """TrainingArguments without use_cpu begin no group on a machine without GPUs."""
    monkeypatch.setattr("rkl.distill.trainer.world", lambda: World(0, 2, 2))
    with pytest.raises(ValueError, match="2 processes were started, but each of them would train"):
        tiny_trainer(tiny_model(seed=1), tiny_model(seed=2))


def test_one_process_has_nobody_to_share_weights_with(folder, capsys):
    assert main([*command(folder, "run", "--shard"), "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert "shard needs several processes, which share the weights; got 1" in said
    assert not (folder / "run").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"teacher": None, "teachers": ("one=T", "two=U")},
        {"teacher": None, "teacher_model_kind": "ema"},
    ],
)
def test_settings_refuse_what_shared_weights_cannot_do(changes, tmp_path):
    with pytest.raises(ValueError, match=f"shard: {[*changes][-1]} is not supported"):
        material.settings(tmp_path, shard=True, **changes)


# What they agree on


def test_work_that_fails_in_one_process_fails_in_all():
    with pytest.raises(PeerError, match="process 1 of 2: no such file"):
        Scripted(0, (None, "no such file")).together(lambda: 1)
    with pytest.raises(PeerError, match="process 0 of 2: no such file"):
        Scripted(1, (None, "no such file")).together(lambda: 1)


def test_the_first_process_raises_its_own_error():
    def fail():
        raise FileNotFoundError("here neither")

    with pytest.raises(FileNotFoundError, match="here neither"):
        Scripted(0, (None, "no such file")).together(fail)
    with pytest.raises(PeerError, match="process 0"):
        Scripted(1, (None, "no such file")).together(fail)


def test_a_process_that_is_stopped_stops_the_others():
    with pytest.raises(StoppedError) as stopped:
        Scripted(0, (int(signal.SIGTERM), "stopped")).together(lambda: 1)
    assert stopped.value.number == signal.SIGTERM
    assert stopped.value.agreed


def test_what_the_first_process_finds_all_get():
    asked = []
    assert Scripted(0, None, None).on_main(lambda: asked.append(0) or "it") == "it"
    assert Scripted(1, None, "it").on_main(lambda: asked.append(1) or "other") == "it"
    assert asked == [0]
    assert Processes().on_main(lambda: "alone") == "alone"


def test_one_request_that_arrives_twice_does_not_kill():
    """The terminal sends Ctrl-C to all processes, and torchrun passes its own on."""
    before = signal.getsignal(signal.SIGINT)
    with StopRequest(shared=True, speaks=False).listening() as request:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert request.number == signal.SIGINT
        request._heard = time.monotonic() - 6
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before


def test_an_epoch_takes_fewer_steps_of_more_processes(tmp_path):
    settings = dataclasses.replace(material.settings(tmp_path), max_steps=None, epochs=2.0)
    assert settings.batch_size == 2
    assert [settings.steps(9, count) for count in (1, 2, 3)] == [10, 6, 4]


def test_a_run_goes_on_in_as_many_processes(tmp_path):
    with Run.create(tmp_path / "run", "distill", {}, seed=0) as begun:
        run._check_processes(begun, 2)  # of a run from before they were counted
        begun.update(processes=2)
        run._check_processes(begun, 2)
        with pytest.raises(ValueError, match="was begun in 2 processes.*got 1"):
            run._check_processes(begun, 1)


# Two processes


@pytest.fixture
def folder(tmp_path):
    """Teacher, student and text; the student without dropout, whose draws would differ."""
    material.write(tmp_path)
    student = GPT2LMHeadModel.from_pretrained(
        tmp_path / "student", embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0
    )
    student.save_pretrained(tmp_path / "student")
    return tmp_path


def command(folder, out, *more):
    """The words after rkl; without --device, as a newcomer types them on a CPU."""
    where = {"teacher": "teacher", "student": "student", "data": "rows.jsonl"}
    words = [word for name, it in where.items() for word in (f"--{name}", str(folder / it))]
    words += ["--max-length", "16", "--learning-rate", "1e-2", "--eval-blocks", "3"]
    return ["distill", *words, "--no-compiled", "--out", str(folder / out), *more]


def start(launcher, words, program=("-m", "rkl")):
    environment = {name: it for name, it in os.environ.items() if name not in TWO}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [sys.executable, *launcher, *program, *words],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process, code=0):
    out, errors = process.communicate(timeout=HANGS)
    assert process.returncode == code, errors
    return out, errors


def until(exists, process):
    while not exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def difference(one, other, *, without="nothing", file="model.safetensors"):
    """Of two runs' weights, relative to the largest of each tensor."""
    first, second = (load_file(it / file) for it in (one, other))
    return max(  # of a tensor of zeros: absolute
        float((first[name] - second[name]).abs().max()) / (float(second[name].abs().max()) or 1.0)
        for name in second
        if not name.endswith(without)
    )


@pytest.mark.slow
def test_two_processes_distil_as_one_with_twice_the_batch(folder):
    """Over whole epochs, whose last batches are not full; then evaluated as by one."""
    words = "--epochs", "2", "--gradient-accumulation", "2", "--held-out", "0.2"
    said, errors = finish(
        start(TORCHRUN, command(folder, "two", *words, "--batch-size", "5", "--cache-teacher"))
    )
    assert said.count("steps,") == 1
    assert errors.count("The first block") == 1
    assert main(command(folder, "one", *words, "--batch-size", "10", "--device", "cpu")) == 0
    one, two = (Run(folder / name) for name in ("one", "two"))
    assert [it.record["processes"] for it in (one, two)] == [1, 2]
    assert len(two.metrics) == len(one.metrics)
    assert two.metrics[-1]["eval_loss"] == pytest.approx(one.metrics[-1]["eval_loss"], rel=1e-4)
    losses = [[row["loss"] for row in it.metrics if "loss" in row] for it in (one, two)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    # A key's bias has no gradient but rounding, which AdamW scales to steps of full size.
    assert difference(two.path, one.path, without="c_attn.bias") < 1e-3
    assert not [it.name for it in two.path.iterdir() if it.suffix in (".pth", ".pt")]
    two.verify()

    asked = ["evaluate", str(two.path), "--data", str(folder / "rows.jsonl"), "--prompts", "3"]
    asked += ["--max-new-tokens", "4", "--max-length", "12"]
    finish(start(TORCHRUN, asked))
    found = (two.path / "generations.jsonl").read_bytes()
    shared = json.loads((two.path / "evaluation.json").read_text())
    with pytest.warns(UserWarning, match="passages were trained on"):
        assert main([*asked, "--device", "cpu"]) == 0
    alone = json.loads((two.path / "evaluation.json").read_text())
    assert (two.path / "generations.jsonl").read_bytes() == found
    assert all(shared[name] == alone[name] for name in ("tokens", "blocks"))
    for name, it in alone["divergences"].items():
        assert shared["divergences"][name]["value"] == pytest.approx(it["value"], rel=1e-5)


LEAVING = """
import os
import torch
import torch.distributed as dist
from rkl.distill import processes

def threads():
    return [open(f"/proc/self/task/{it}/comm").read() for it in os.listdir("/proc/self/task")]

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
processes._connected(cpu=True)
trainer = {"model": torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))}
trainer["callbacks"] = trainer  # the Trainer is in a cycle too
del trainer
dist.all_reduce(torch.ones(3))
print(sum("gloo" in it for it in threads()) > 0)
processes._disconnect()
print(sum("gloo" in it for it in threads()))
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="threads are counted in /proc")
def test_no_thread_of_gloo_is_left_when_the_interpreter_ends():
    """One that drops a tensor then has no interpreter to free it in, and aborts the process."""
    said = subprocess.run([sys.executable, "-c", LEAVING], capture_output=True, text=True)
    assert said.stdout.split() == ["True", "0"], said.stderr


@pytest.mark.slow
def test_accelerate_starts_two_processes_too(folder):
    finish(start(ACCELERATE, command(folder, "run", "--max-steps", "2")))
    assert Run(folder / "run").record["processes"] == 2


# Without a draw, for each process draws other text.
WRITTEN = {"sampling_temperature": 0.0, "max_completion_length": 5, "guard": "off"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"gradient_checkpointing": True, "cache_teacher": True},
        WRITTEN | {"lmbda": 0.5},
        WRITTEN | {"seq_kd": True, "lora_rank": 2},
    ],
)
def test_two_processes_with_half_of_the_weights_each_distil_as_one(more, folder, monkeypatch):
    """Loss, gradient, evaluations, checkpoints and the student kept; also once resumed."""
    changes: dict = {"max_steps": 5, "gradient_accumulation": 2, "held_out": 0.2, "save_every": 1}
    changes |= {"eval_every": 2, "keep_checkpoints": 9, "weight_decay": 0.1} | more
    program = (sharded_run.__file__,)
    words = [str(folder), json.dumps(changes | {"shard": True})]
    finish(start(TORCHRUN, words, program))
    for rank in "01":
        models = json.loads((folder / f"{rank}.json").read_text())
        assert len(models) == (1 if "cache_teacher" in more else 2)
        for apart, here, everywhere in models:
            assert apart
            assert here == everywhere / 2

    monkeypatch.setattr("rkl.distill.prepare.load_model", sharded_run.doubled)
    rows = str(folder / "rows.jsonl")
    one = folder / "one"
    run.distill(material.settings(folder, data=rows, **changes | {"batch_size": 4}), one)
    whole, parts = folder / "whole", folder / "parts"
    for name in ("loss", "grad_norm", "eval_loss"):
        expected, *found = (
            [row[name] for row in Run(it).metrics if name in row] for it in (one, whole, parts)
        )
        assert expected
        assert found[0] == pytest.approx(expected, rel=1e-6)
        assert found[1] == found[0]
    assert Run(whole).record["result"]["best_step"] == Run(one).record["result"]["best_step"] > 0
    adapter = "adapter_model.safetensors"
    saved = adapter if "lora_rank" in more else "model.safetensors"
    files = {".": "model.safetensors"} | ({"adapter": adapter} if "lora_rank" in more else {})
    files |= {f"checkpoints/checkpoint-{step}": saved for step in (2, 5)}
    for name, file in files.items():
        weights = load_file(whole / name / file)
        assert weights.keys() == load_file(one / name / file).keys()
        assert all(it.dtype == torch.float64 for it in weights.values())
        assert difference(whole / name, one / name, file=file) < 1e-6
        assert difference(parts / name, whole / name, file=file) == 0
    assert {it.name for it in whole.iterdir()} == {it.name for it in one.iterdir()}
    Run(whole).verify()
    GPT2LMHeadModel.from_pretrained(whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "more"),
    [("ddp", ()), ("ddp", ("--shard",)), ("fsdp2", ("--shard", "--dtype", "bfloat16"))],
)
def test_the_configurations_for_accelerate_start_two_processes(file, more, folder):
    launcher = *ACCELERATE[:2], "--config_file", str(EXAMPLES / f"accelerate_{file}.yaml")
    finish(start(launcher, command(folder, "run", "--max-steps", "2", *more)))
    record = Run(folder / "run").record
    assert record["processes"] == 2
    assert record["settings"]["shard"] is bool(more)
    state = torch.load(folder / "run/checkpoints/checkpoint-2/optimizer.pt", weights_only=True)
    # By name where the weights are shared, by number where they are not.
    assert isinstance(next(iter(state["state"])), str) is bool(more)
    GPT2LMHeadModel.from_pretrained(folder / "run")


@pytest.mark.slow
def test_a_trial_of_two_processes_that_share_the_weights_counts_their_part(folder):
    words = command(folder, "run", "--shard", "--dry-run", "--max-steps", "3")
    said, _ = finish(start(TORCHRUN, words))
    assert "of each of 2 processes" in said
    assert not (folder / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_two_processes_that_are_stopped_go_on_to_the_same_bits(number, folder):
    words = "--max-steps", "40", "--save-every", "5", "--batch-size", "2", "--held-out", "0"
    finish(start(TORCHRUN, command(folder, "whole", *words)))
    process = start(TORCHRUN, command(folder, "parts", *words))
    until((folder / "parts" / "checkpoints" / "checkpoint-5").is_dir, process)
    os.killpg(process.pid, number)  # as a terminal does
    errors = process.communicate(timeout=HANGS)[1]
    assert "Go on with: torchrun --nproc_per_node 2 -m rkl distill" in errors
    parts = Run(folder / "parts")
    assert parts.record["status"] == "interrupted"
    done = max(int(it.name[11:]) for it in (parts.path / "checkpoints").iterdir())
    assert 5 <= done < 40
    finish(start(TORCHRUN, ["distill", "--out", str(parts.path), "--resume"]))
    assert difference(parts.path, folder / "whole") == 0
    rows = [row["step"] for row in parts.metrics if "loss" in row]
    assert rows == list(range(1, 41))


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_others(folder):
    process = start(TORCHRUN, command(folder, "run", "--max-steps", "5000", "--save-every", "5"))
    until((folder / "run" / "checkpoints" / "checkpoint-5").is_dir, process)
    found = subprocess.run(
        ["ps", "--ppid", str(process.pid), "-o", "pid="], capture_output=True, text=True
    )
    os.kill(int(found.stdout.split()[-1]), signal.SIGKILL)
    finish(process, code=1)
    assert Run(folder / "run").record["status"] in ("interrupted", "running")
    finish(start(TORCHRUN, ["distill", "--out", str(folder / "run"), "--resume", "--dry-run"]))


@pytest.mark.slow
def test_two_processes_refuse_in_one_line_before_anything_is_written(folder):
    missing = command(folder, "run")
    missing[missing.index("--data") + 1] = str(folder / "nothing.jsonl")
    errors = finish(start(TORCHRUN, missing), code=1)[1]
    assert len(re.findall("^rkl: error: .*nothing.jsonl", errors, re.MULTILINE)) == 1
    assert not (folder / "run").exists()

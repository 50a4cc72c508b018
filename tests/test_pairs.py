"""Two commands at one time with the same --out: one does its work, the other is refused."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from patience import HANGS

from rkl.runs import LOCK

sys.path.append(str(Path(__file__).parent / "distill"))
import material

pytestmark = pytest.mark.slow
MADE = {
    "distill": [
        *("distill", "--teacher=teacher", "--student=student", "--data=text.txt", "--max-steps=6"),
        *("--max-length=8", "--batch-size=2", "--eval-blocks=2", "--no-compiled", "--device=cpu"),
    ],
    "fit": ["fit", "--data=x.npy", "--flow=coupling(transforms=1)", "--steps=400", "--batch=16"],
}
WEIGHTS = {"distill": "model.safetensors", "fit": "flow.safetensors"}
ESTIMATE = "estimate", "x.npz", "--family=normal(loc=mu, scale=sigma)", "--overwrite"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    material.write(folder)
    draw = np.random.default_rng(0)
    np.save(folder / "x.npy", draw.normal(size=(200, 2)).astype("float32"))
    mu, sigma = draw.normal(size=(2, 2, 60))
    np.savez(folder / "x.npz", mu=mu, sigma=np.exp(sigma))
    return folder


def begin(folder, words, out):
    words = [sys.executable, "-m", "rkl", *words, f"--out={out}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(words, cwd=folder, env=environment, **pipes)


def end(process):
    said = process.communicate(timeout=HANGS)[1]
    return process.returncode, said


def steps(run):
    return [json.loads(it)["step"] for it in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def undisturbed(folder):
    """What the run of a verb comes to by itself: its weights, and the steps that it logs."""

    def run(verb):
        out = folder / f"{verb} alone"
        if not out.exists():
            assert end(begin(folder, MADE[verb], out.name))[0] == 0
        return (out / WEIGHTS[verb]).read_bytes(), steps(out)

    return run


@pytest.mark.parametrize("second", ["again", "--resume", "--overwrite", "estimate"])
@pytest.mark.parametrize("verb", MADE)
def test_a_second_writer_is_refused_and_harms_nothing(verb, second, folder, undisturbed):
    out = folder / f"{verb} and {second}"
    first = begin(folder, MADE[verb], out.name)
    while not (out / LOCK).exists() or not (out / "metrics.jsonl").exists():
        assert first.poll() is None, first.communicate()[1]
        time.sleep(0.01)
    first.send_signal(signal.SIGSTOP)  # in the middle of its work, however fast it is
    try:
        words = [*ESTIMATE] if second == "estimate" else [*MADE[verb], second]
        code, said = end(begin(folder, [it for it in words if it != "again"], out.name))
    finally:
        first.send_signal(signal.SIGCONT)
    assert code == 2, said
    assert f"is being written by process {first.pid} on" in said.splitlines()[-1]
    code, said = end(first)
    assert code == 0, said
    weights, logged = undisturbed(verb)
    assert (out / WEIGHTS[verb]).read_bytes() == weights
    assert steps(out) == logged
    assert not (out / LOCK).exists()


@pytest.mark.parametrize("verb", MADE)
def test_of_two_that_begin_together_one_comes_to_its_end(verb, folder, undisturbed):
    out = folder / f"{verb} twice"
    both = [begin(folder, MADE[verb], out.name) for _ in range(2)]
    answers = sorted(end(it) for it in both)
    assert [code for code, _said in answers] == [0, 2], answers
    refusal = answers[1][1].splitlines()[-1]
    assert "is being written by process" in refusal or "exists" in refusal
    weights, logged = undisturbed(verb)
    assert (out / WEIGHTS[verb]).read_bytes() == weights
    assert steps(out) == logged

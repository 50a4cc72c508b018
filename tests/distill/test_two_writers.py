"""Two processes whose students write: one loss, one guard, other texts, the same bits again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from patience import HANGS
from transformers import GPT2Config, GPT2LMHeadModel

pytestmark = pytest.mark.slow
TORCHRUN = "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The folder in which two processes were trained, and what each of them noted."""
    folder = tmp_path_factory.mktemp("two")
    for name, seed in (("teacher", 1), ("student", 2)):
        torch.manual_seed(seed)
        ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
        sizes = {"vocab_size": 40, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
        drops = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)
        config = GPT2Config(**sizes, **ends, **drops, initializer_range=0.3)
        GPT2LMHeadModel(config).save_pretrained(folder / name)
    tokens = torch.randint(3, 40, (24, 10), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    (folder / "rows.json").write_text(json.dumps(rows))
    script = str(Path(__file__).with_name("two_writers.py"))
    done = subprocess.run(
        [sys.executable, *TORCHRUN, script, str(folder)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        timeout=HANGS,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = [json.loads((folder / f"result-{rank}.json").read_text()) for rank in (0, 1)]
    return folder, found


def test_the_loss_is_the_mean_over_the_tokens_of_both_processes(results):
    """Of the first step, by hand from what both wrote, with the student that wrote it."""
    folder, found = results
    teacher, student = (
        GPT2LMHeadModel.from_pretrained(folder / name, dtype=torch.float64).eval()
        for name in ("teacher", "student")
    )
    total = tokens = 0.0
    for result in found:
        for batch in result["steps"][0]:
            ids, labels, mask = (
                torch.tensor(batch[name]) for name in ("input_ids", "labels", "attention_mask")
            )
            with torch.no_grad():
                logp, logq = (
                    it(ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
                    for it in (teacher, student)
                )
            at = labels[:, 1:] != -100
            total += float((logp.exp() * (logp - logq)).sum(-1)[at].sum())
            tokens += float(at.sum())
    assert found[0]["losses"][0] == pytest.approx(total / tokens, rel=1e-6)


def test_each_process_writes_other_texts_to_other_prompts(results):
    _, found = results
    texts = [
        {tuple(row) for step in it["steps"] for batch in step for row in batch["input_ids"]}
        for it in found
    ]
    assert len(texts[0]) > 8
    assert not texts[0] & texts[1]


def test_the_first_process_writes_the_completions(results):
    folder, found = results
    lines = (folder / "whole" / "completions.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["step"] for row in rows] == [0, 0, 1, 1, 2, 2, 3, 3]
    batches = [batch for step in found[0]["steps"] for batch in step]
    for row, batch in zip(rows, batches, strict=True):
        for part, ids in zip(row["rows"], batch["input_ids"], strict=True):
            text = part["prompt"] + part["completion"]
            assert ids[: len(text)] == text


def test_a_resumed_training_of_two_processes_ends_in_the_same_bits(results):
    assert all(it["same"] for it in results[1])


def test_the_guard_judges_the_text_of_all_processes(results):
    """Half of all replies are empty, all of them in one process: both stop, at the same step."""
    stopped = [it["stopped"] for it in results[1]]
    assert stopped[0] is not None
    assert stopped[0] == stopped[1]
    assert "no text: 5" in stopped[0][1]


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="threads are counted in /proc")
def test_no_thread_of_gloo_is_left_when_a_script_of_ones_own_ends(results):
    """The script does not end the process group: a thread that is left may abort the process."""
    folder, found = results
    assert all(it["threads"] > 0 for it in found)
    assert [(folder / f"threads-{rank}").read_text() for rank in (0, 1)] == ["0", "0"]

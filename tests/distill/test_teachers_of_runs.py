"""rkl distill with several teachers, or the student as its own, and with weights of tokens."""

import json
import signal

import material
import pytest
import torch
import yaml
from safetensors.torch import load_file

import rkl
from rkl.cli import main
from rkl.distill import (
    DistillSettings,
    EvaluateSettings,
    distill,
    dry_run,
    evaluate_run,
    load_model,
    load_tokenizer,
    report_runs,
)
from rkl.distill.progress import Display
from rkl.runs import Run

pytestmark = pytest.mark.filterwarnings("ignore:.* is 0 at the first step")
NAMES = "math", "code"
PAIRS = [
    {"prompt": f"Item {it} of", "completion": f" the list {it}.", "teacher_id": NAMES[it % 2]}
    for it in range(24)
]
OTHERS = [
    {"prompt": f"What {it} of", "completion": f" the {it}s?", "teacher_id": NAMES[it % 3 == 0]}
    for it in range(5)
]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with models and rows, only read."""
    path = tmp_path_factory.mktemp("material")
    material.write(path)
    material.model(2, 16, seed=5).save_pretrained(path / "other")
    material.tokenizer().save_pretrained(path / "other")
    write_rows(path / "pairs.jsonl", PAIRS)
    write_rows(path / "others.jsonl", OTHERS)
    return path


def settings_for(folder, **changes):
    how = {"teacher": None, "student": str(folder / "student"), "held_out": 0.1, "max_length": 24}
    how |= {"data": str(folder / "pairs.jsonl"), "eval_blocks": None}
    return DistillSettings(**material.QUICK | how | changes)


def several(folder, **changes):
    models = [f"math={folder / 'teacher'}", f"code={folder / 'other'}"]
    return settings_for(folder, teachers=tuple(models), **changes)


def weights_of(path):
    return load_file(path / "model.safetensors")


def stopped_and_resumed(settings, path, monkeypatch):
    """The weights of a run that is stopped at its second step, and goes on."""
    advance = Display.advance

    def stop_at_two(display, step):
        advance(display, step)
        if step == 2:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Display, "advance", stop_at_two)
        with pytest.raises(KeyboardInterrupt):
            distill(settings, path)
    distill(settings, path, resume=True)
    return weights_of(path)


def by_hand(student, teachers, rows):
    """The mean over all tokens of forward KL, of each row from its teacher, in float64."""
    words, values = load_tokenizer(student), []
    q, p = load_model(student), {name: load_model(it) for name, it in teachers.items()}
    for row in rows:
        before = words(row["prompt"])["input_ids"]
        ids = [*words(row["prompt"] + row["completion"])["input_ids"], words.eos_token_id]
        with torch.no_grad():
            logp, logq = (
                it(torch.tensor([ids])).logits[0, len(before) - 1 : -1].double().log_softmax(-1)
                for it in (p[row["teacher_id"]], q)
            )
        values.append(rkl.per_token({"kl": rkl.KL()}, p=logp, q=logq)["kl"])
    return float(torch.cat(values).mean())


def test_several_teachers_by_the_command_line_and_by_yaml(folder, tmp_path, monkeypatch):
    models = {"math": str(folder / "teacher"), "code": str(folder / "other")}
    given = {"teachers": models, "student": str(folder / "student"), "max_length": 24}
    given |= {"data": str(folder / "pairs.jsonl"), "max_steps": 4, "batch_size": 2}
    given |= {"learning_rate": 1e-2, "held_out": 0.1}
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(given, sort_keys=False))
    words = ["distill", "--config", tmp_path / "settings.yaml", "--device", "cpu"]
    words += ["--no-compiled", "--teachers-on-device", "one", "--out", tmp_path / "run"]
    assert main([str(word) for word in words]) == 0
    run = Run.open(tmp_path / "run")
    assert run.settings["teachers"] == [f"{name}={path}" for name, path in models.items()]
    assert run.settings["teachers_on_device"] == "one"
    assert {"teacher math", "teacher code", "student"} <= run.record["inputs"].keys()
    assert "**teacher and other**" in (run.path / "README.md").read_text()
    settings = several(folder, teachers_on_device="one", eval_blocks=64)
    again = stopped_and_resumed(settings, tmp_path / "again", monkeypatch)
    found = weights_of(run.path)
    assert all(torch.equal(found[name], again[name]) for name in found)
    asked = EvaluateSettings(str(folder / "others.jsonl"), prompts=0, device="cpu")
    told = evaluate_run(run.path, asked).results["run"]
    expected = by_hand(str(run.path), models, OTHERS)
    assert told["divergences"]["forward-kl"]["value"] == pytest.approx(expected, rel=1e-5)
    report_runs([run.path])
    assert "learned from math=" in (run.path / "report.html").read_text()


def test_one_of_several_is_that_teacher_to_the_bit(folder, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [row | {"teacher_id": "math"} for row in PAIRS])
    one = settings_for(folder, teachers=(f"math={folder / 'teacher'}",), data=rows)
    alone = settings_for(folder, teacher=str(folder / "teacher"), data=rows, packing=False)
    distill(one, tmp_path / "one")
    distill(alone, tmp_path / "alone")
    first, second = weights_of(tmp_path / "one"), weights_of(tmp_path / "alone")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_several_teachers_judge_own_text_too(folder, tmp_path):
    how = {"lmbda": 1.0, "max_completion_length": 5, "held_out": 0.0}
    distill(several(folder, **how), tmp_path / "run")
    assert Run.open(tmp_path / "run").record["status"] == "finished"
    assert "teacher math" in str(dry_run(several(folder, **how)))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([PAIRS[0] | {"teacher_id": "art"}], "line 1: teacher_id must be one of math, code, the"),
        ([PAIRS[0], {"prompt": "a", "completion": "b"}], "line 2: teacher_id must name the teach"),
        ([PAIRS[0], PAIRS[2]], "no row of .* names code in teacher_id, so that it would teach no"),
    ],
)
def test_rows_without_their_teacher_are_refused_before_the_run(rows, message, folder, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ValueError, match=message):
        distill(several(folder, data=data, held_out=0.0), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": None}, "teacher must be given, or teachers .*; got none"),
        ({"teachers": ("a=b",)}, "and one of them; got teacher and teachers"),
        ({"teacher_model_kind": "ema"}, "one of them; got teacher and teacher_model_kind"),
        ({"teacher_routing_column": "domain"}, "teacher_routing_column goes with --teachers, and"),
        ({"teachers_on_device": "one"}, "teachers_on_device goes with --teachers, and has no eff"),
        ({"teacher_update_rate": 0.1}, "teacher_update_rate goes with --teacher-model-kind ema"),
        ({"teacher_sync_steps": 2}, "teacher_sync_steps goes with --teacher-model-kind ema, and"),
        ({"teacher": None, "teachers": ("a",)}, "as math=PATH code=PATH; got 'a'"),
        ({"teacher": None, "teachers": ("a=x", "a=y")}, "different names; got a twice"),
        ({"teacher": None, "teachers": ("a=http://x/v1",)}, "must be models, .*; got a=http://x"),
        ({"teacher": None, "teachers": ("a=x",), "seq_kd": True}, "seq_kd needs one teacher"),
        ({"teacher": None, "teachers": ("a=x",), "cache_teacher": True}, "got True with teachers"),
        ({"teacher": None, "teacher_model_kind": "ema", "student": None}, "student must be given"),
        ({"token_weight": "math:pi"}, "token_weight must be a function .*; math:pi is a float"),
        ({"token_weight": "math"}, "token_weight: the name must be module:name"),
        ({"data": ""}, "data must be given: --data FILE"),
    ],
)
def test_settings_that_mean_nothing_are_refused_by_name(changes, message):
    how = {"teacher": "T", "student": "S", "data": "D"} | changes
    with pytest.raises((ValueError, TypeError), match=message):
        DistillSettings(**how)


@pytest.mark.parametrize("kind", ["base", "ema", "live"])
def test_a_run_that_learns_from_itself_is_evaluated_against_that(kind, folder, tmp_path):
    words = ["--teacher-model-kind", kind, "--student", folder / "student", "--max-length", 24]
    words += ["--data", folder / "pairs.jsonl", "--hard-label-weight", 1, "--max-steps", 4]
    words += ["--learning-rate", 1e-2, "--device", "cpu", "--out", tmp_path / "run"]
    words += ["--teacher-update-rate", 0.25] if kind == "ema" else []
    assert main(["distill", *map(str, words)]) == 0
    run = Run.open(tmp_path / "run")
    assert run.settings["teacher_model_kind"] == kind
    assert run.record["result"]["best_step"] == 4  # the nearest to itself would be the first
    asked = EvaluateSettings(str(folder / "others.jsonl"), prompts=0, device="cpu")
    value = evaluate_run(run.path, asked).results["run"]["divergences"]["forward-kl"]["value"]
    if kind == "live":
        assert value == pytest.approx(0, abs=1e-6)
        return
    teacher = folder / "student"
    if kind == "ema":
        teacher = tmp_path / "average"
        model = load_model(run.path)
        state = load_file(run.path / "teacher.safetensors")
        assert model.load_state_dict(state, strict=False).unexpected_keys == []
        model.save_pretrained(teacher)
    expected = by_hand(str(run.path), dict.fromkeys(NAMES, str(teacher)), OTHERS)
    assert expected > 1e-5
    assert value == pytest.approx(expected, rel=1e-4)


def test_a_moving_average_goes_on_to_the_same_bits(folder, tmp_path, monkeypatch):
    how = {"teacher_model_kind": "ema", "teacher_update_rate": 0.5, "hard_label_weight": 1.0}
    settings = settings_for(folder, **how)
    distill(settings, tmp_path / "whole")
    found = weights_of(tmp_path / "whole")
    again = stopped_and_resumed(settings, tmp_path / "stopped", monkeypatch)
    assert all(torch.equal(found[name], again[name]) for name in found)


def test_weights_of_tokens_are_a_setting_that_is_imported(folder, tmp_path, monkeypatch, capsys):
    code = "import torch\ndef none(log_p, log_q, batch): return torch.zeros(len(log_p))\n"
    (tmp_path / "weights_of_mine.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    words = ["--teacher", folder / "teacher", "--student", folder / "student", "--max-length", 24]
    words += ["--data", folder / "pairs.jsonl", "--max-steps", 1, "--device", "cpu"]
    own = ["--token-weight", "weights_of_mine:none", "--out", tmp_path / "run"]
    assert main(["distill", *map(str, [*words, *own])]) == 0
    run = Run.open(tmp_path / "run")
    assert run.settings["token_weight"] == "weights_of_mine:none"
    assert [row["loss"] for row in run.metrics if "loss" in row] == [0.0]
    again = ["distill", "--config", run.path, "--out", tmp_path / "again"]
    assert main([str(word) for word in again]) == 2
    assert "say --allow weights_of_mine:none" in capsys.readouterr().err

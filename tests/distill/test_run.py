"""rkl distill: from a teacher, a student and text to a folder that any program can load."""

import dataclasses
import json
import math
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import material
import pytest
import torch
import yaml
from safetensors.torch import load_file

import rkl
from rkl.cli import main
from rkl.distill import distill, load_model, load_run, load_tokenizer, report_runs
from rkl.distill.prepare import load, read_text, with_length
from rkl.distill.progress import Display
from rkl.distill.teachers import cache
from rkl.runs import Run
from rkl.runs.signals import StopRequest


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with teacher, student, text.txt and rows.jsonl, which tests only read."""
    path = tmp_path_factory.mktemp("material")
    material.write(path)
    return path


@pytest.fixture(scope="module")
def finished(folder):
    """The folder of a run that tests only read."""
    distill(material.settings(folder), folder / "run")
    return folder / "run"


@pytest.fixture
def stopping(monkeypatch):
    """A function that has a signal arrive while a step is being taken: stopping(SIGINT, 3)."""

    def arrange(number, step):
        advance = Display.advance

        def arrive(display, at):
            advance(display, at)
            if at == step:
                signal.raise_signal(number)

        monkeypatch.setattr(Display, "advance", arrive)

    return arrange


def weights(path):
    return load_file(path / "model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def logged(path, *names):
    return [[row.get(name) for name in names] for row in Run(path).metrics]


def test_any_program_loads_the_student_without_rkl(finished):
    code = f"""
import sys
sys.modules["rkl"] = None
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained({str(finished)!r}, use_safetensors=True)
tokenizer = AutoTokenizer.from_pretrained({str(finished)!r})
written = model.generate(**tokenizer("The", return_tensors="pt"), max_new_tokens=4)
print(model.generation_config.eos_token_id, tokenizer.decode(written[0]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("0 The")


def test_the_folder_holds_no_pickle_and_nothing_half_written(finished):
    names = {path.name for path in finished.iterdir()}
    assert names >= {"run.json", "metrics.jsonl", "rows.bin", "README.md", "checkpoints"}
    assert names >= {"model.safetensors", "config.json", "generation_config.json"}
    assert names >= {"tokenizer.json", "tokenizer_config.json"}
    everything = {path.name for path in finished.rglob("*")}
    assert {name for name in everything if name.startswith(".")} == set()
    assert {name for name in everything if name.endswith(".bin")} == {"rows.bin"}


def test_the_student_has_learned_and_loads_as_the_run(finished, folder):
    losses = [loss for (loss,) in logged(finished, "eval_loss") if loss is not None]
    assert losses[-1] < 0.97 * losses[0]
    assert not same(weights(finished), weights(folder / "student"))
    assert same(dict(rkl.load(finished).state_dict()), dict(load_run(finished).state_dict()))


def test_the_teacher_on_the_disk_is_left_alone(finished, folder):
    made = material.model(2, 16, seed=1).state_dict()
    stored = weights(folder / "teacher")
    assert same(stored, {name: made[name] for name in stored})


def test_run_json_says_what_was_trained_on_what(finished, folder):
    record = Run.open(finished).record
    assert record["status"] == "finished"
    settings = dataclasses.asdict(material.settings(folder))
    assert record["settings"] == json.loads(json.dumps(settings))
    assert record["data"]["rows"] == 1
    assert re.fullmatch("[0-9a-f]{32}", record["data"]["fingerprint"])
    assert record["result"]["steps"] == 4
    assert record["result"]["tokens"] == 4 * 2 * 16
    assert record["result"]["peak_memory"] > 5e7


def test_the_card_names_base_teacher_divergence_data_and_figures(finished, folder):
    _, front, body = (finished / "README.md").read_text("utf-8").split("---\n", 2)
    front = yaml.safe_load(front)
    record = Run.open(finished).record
    assert front["base_model"] == "student"  # no path of this machine
    assert front["library_name"] == "transformers"
    assert str(folder) not in body
    for said in ("**teacher**", "Data: text.txt", "`akl(mu=0.5)`", record["data"]["fingerprint"]):
        assert said in body
    assert f"{record['result']['held_out_loss']:.4g} nats per token" in body
    assert f"torch {record['versions']['torch']}" in body


def test_a_run_needs_no_matplotlib_and_its_report_says_what_to_type(
    folder, tmp_path, no_matplotlib
):
    distill(material.settings(folder), tmp_path / "run")
    assert Run.open(tmp_path / "run").record["status"] == "finished"
    with pytest.raises(ModuleNotFoundError, match=r"matplotlib: pip install 'rkl\[report\]'$"):
        report_runs([tmp_path / "run"])


def test_every_step_is_logged_once_with_loss_speed_and_memory(finished):
    rows = [row for row in Run(finished).metrics if "loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(row["tokens"] == 32 * row["step"] for row in rows)
    assert all(row["tokens_per_second"] > 0 and row["peak_memory"] > 5e7 for row in rows)


def test_a_terminal_less_run_prints_plain_lines(folder, tmp_path, capsys):
    distill(material.settings(folder), tmp_path / "run")
    said = capsys.readouterr().err
    assert re.search(r"^step 4/4  loss \S+  \S+ tokens/s  \S+ [MG]B$", said, re.MULTILINE)
    assert "Held out: 27 blocks, 5% of " in said
    assert "\x1b" not in said
    assert "shards" not in said  # transformers' own bars


def test_the_best_student_on_held_out_text_is_the_one_kept(folder, tmp_path):
    wild = material.settings(
        folder, learning_rate=3.0, max_steps=8, learning_rate_schedule="constant"
    )
    distill(wild, tmp_path / "run")
    rows = [row for row in Run(tmp_path / "run").metrics if row.get("eval_loss") and row["step"]]
    best = min(rows, key=lambda row: row["eval_loss"])
    assert best["step"] < 8  # far too large a step: the last is not the best
    assert Run(tmp_path / "run").record["result"]["best_step"] == best["step"]
    kept = tmp_path / "run" / "checkpoints" / f"checkpoint-{best['step']}"
    assert same(weights(tmp_path / "run"), weights(kept))


@pytest.fixture
def config(folder, tmp_path):
    """A file with the settings."""
    path = tmp_path / "settings.yaml"
    path.write_text(yaml.safe_dump(dataclasses.asdict(material.settings(folder))))
    return str(path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_says_how_to_go_on_and_does_so_to_the_same_bits(
    number, config, finished, tmp_path, stopping, capsys
):
    out, before = tmp_path / "a run", signal.getsignal(number)
    stopping(number, 3)
    assert main(["distill", "--config", config, "--out", str(out), "--overwrite"]) == 128 + number
    assert signal.getsignal(number) is before
    said = capsys.readouterr().err
    assert "A checkpoint of step 3 of 4 is saved." in said
    assert Run(out).record["status"] == "interrupted"
    program, *words = shlex.split(said.rpartition("Go on with: ")[2])
    assert program == "rkl"
    assert main(words) == 0
    assert same(weights(out), weights(finished))
    names = "step", "loss", "eval_loss", "grad_norm", "tokens"
    assert logged(out, *names) == logged(finished, *names)


def test_a_run_is_resumed_with_nothing_but_its_folder(config, finished, tmp_path, stopping):
    out = str(tmp_path / "run")
    stopping(signal.SIGINT, 1)
    assert main(["distill", "--config", config, "--out", out]) == 130
    assert main(["distill", "--out", out, "--resume"]) == 0
    assert same(weights(tmp_path / "run"), weights(finished))


def test_a_second_signal_stops_at_once():
    stop = StopRequest()
    # Whoever runs the tests in the background may have had the signal ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with stop.listening():
            signal.raise_signal(signal.SIGINT)
            assert stop.number == signal.SIGINT
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_run_that_was_moved_goes_on_and_still_finds_its_best(folder, tmp_path, stopping):
    wild = material.settings(
        folder, learning_rate=3.0, max_steps=8, learning_rate_schedule="constant"
    )
    distill(wild, tmp_path / "whole")
    stopping(signal.SIGINT, 6)
    with pytest.raises(KeyboardInterrupt):
        distill(wild, tmp_path / "here")
    (tmp_path / "here").rename(tmp_path / "there")
    distill(wild, tmp_path / "there", resume=True)
    assert same(weights(tmp_path / "there"), weights(tmp_path / "whole"))


def test_resuming_a_finished_run_changes_nothing(finished, folder, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    done = distill(material.settings(folder), finished, resume=True)
    assert "finished before" in capsys.readouterr().err
    assert str(done).startswith(f"{finished}: 4 steps")
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


def test_a_run_is_not_resumed_on_other_data(folder, tmp_path, stopping):
    changing = tmp_path / "text.txt"
    shutil.copy(folder / "text.txt", changing)
    settings = material.settings(folder, data=str(changing))
    stopping(signal.SIGINT, 1)
    with pytest.raises(KeyboardInterrupt):
        distill(settings, tmp_path / "run")
    changing.write_text(material.TEXT.replace("assert", "affirm"))
    with pytest.raises(ValueError, match="resume: the inputs differ from those.*: data"):
        distill(settings, tmp_path / "run", resume=True)


def test_a_run_of_other_settings_is_not_resumed(finished, folder):
    with pytest.raises(ValueError, match=r"batch_size was 2 and is 3"):
        distill(material.settings(folder, batch_size=3), finished, resume=True)


def test_a_finished_run_is_extended_to_the_same_bits_if_interrupted_or_not(
    finished, folder, tmp_path, stopping
):
    longer = material.settings(folder, max_steps=7)
    for name in ("whole", "cut"):
        shutil.copytree(finished, tmp_path / name)
        for stale in ("evaluation.json", "report.html"):
            Run(tmp_path / name).record_files([stale])
            (tmp_path / name / stale).write_text("of the shorter run")
    done = distill(longer, tmp_path / "whole", resume=True)
    assert done.result["steps"] == 7
    left = {path.name for path in (tmp_path / "whole").iterdir()}
    assert not {"evaluation.json", "report.html"} & left
    rates = [row["learning_rate"] for row in Run(tmp_path / "whole").metrics if "loss" in row]
    shares = [(1 + math.cos(math.pi * it / 6)) / 2 for it in (3, 4, 5)]  # of 6, behind 1 to rise
    assert rates[4:] == pytest.approx([1e-2 * it for it in shares])
    stopping(signal.SIGINT, 6)
    with pytest.raises(KeyboardInterrupt):
        distill(longer, tmp_path / "cut", resume=True)
    distill(longer, tmp_path / "cut", resume=True)
    assert same(weights(tmp_path / "cut"), weights(tmp_path / "whole"))
    names = "step", "loss", "eval_loss", "grad_norm", "tokens", "learning_rate"
    assert logged(tmp_path / "cut", *names) == logged(tmp_path / "whole", *names)
    for changes in ({"max_steps": 6}, {"max_steps": None, "epochs": 0.01}):
        name = "max_steps" if changes["max_steps"] else "epochs"
        with pytest.raises(ValueError, match=f"{name}: .* has done 7 steps, and can go on to no"):
            distill(material.settings(folder, **changes), tmp_path / "whole", resume=True)


def test_a_run_without_a_student_yet_says_so(finished, tmp_path):
    shutil.copy(finished / "run.json", tmp_path)
    with pytest.raises(FileNotFoundError, match="is not finished"):
        rkl.load(tmp_path)


def test_the_rows_trained_on_are_remembered_and_those_held_out_are_not(folder, tmp_path):
    settings = material.settings(folder, data=str(folder / "rows.jsonl"), held_out=0.2)
    distill(settings, tmp_path / "run")
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text("utf-8").splitlines()]
    trained = read_text(settings, load_tokenizer(folder / "teacher")).rows
    held = [row for row in rows if row not in trained]
    assert len(held) > 0.1 * len(rows)
    run = Run.open(tmp_path / "run")
    assert run.count_seen(row["text"].strip() for row in trained) == len(trained)
    assert run.count_seen(row["text"].strip() for row in held) == 0


@pytest.fixture
def text(folder):
    """A function that reads data as a run does: text(held_out=0.2)."""

    def read(**changes):
        settings = material.settings(folder, **changes)
        return read_text(settings, load_tokenizer(settings.teacher))

    return read


def test_the_end_of_a_single_text_is_held_out(text):
    read = text(held_out=0.25)
    (row,) = read.rows
    assert material.TEXT.startswith(row["text"])
    assert 0.7 < len(row["text"]) / len(material.TEXT) <= 0.75
    assert 0.2 < len(read.held_out) / (len(read.held_out) + len(read.blocks)) < 0.3


def test_nothing_is_held_out_where_nothing_is_asked_for_or_can_be(text, tmp_path):
    assert text(held_out=0.0).held_out is None
    (tmp_path / "one.txt").write_text("One paragraph, which cannot be taken apart.")
    read = text(data=str(tmp_path / "one.txt"))
    assert (read.held_out, read.origin) == (None, "nothing")


def test_given_data_is_held_out_and_all_of_the_other_trained_on(text, folder):
    read = text(eval_data=str(folder / "rows.jsonl"))
    assert read.origin == str(folder / "rows.jsonl")
    assert read.rows == [{"text": material.TEXT}]


def test_a_run_without_held_out_text_keeps_its_last_student(folder, tmp_path):
    done = distill(material.settings(folder, held_out=0.0), tmp_path / "run")
    assert done.result["held_out_loss"] is None
    assert "best" not in str(done)
    assert same(weights(done.path), weights(done.path / "checkpoints" / "checkpoint-4"))


@pytest.fixture
def bare(folder, tmp_path):
    """The configuration of a student and nothing else."""
    return Path(shutil.copy(folder / "student" / "config.json", tmp_path))


def new_student(folder, given, seed):
    return load(material.settings(folder, student=str(given), seed=seed))[1].student


def test_a_configuration_alone_gives_a_student_of_new_weights(folder, bare):
    made = [new_student(folder, bare, seed).state_dict() for seed in (0, 0, 1)]
    assert same(made[0], made[1])
    assert not same(made[0], made[2])


def test_a_new_student_is_trained_with_the_tokenizer_of_its_teacher(folder, bare, tmp_path):
    done = distill(material.settings(folder, student=str(bare)), tmp_path / "run")
    assert load_tokenizer(done.path).get_vocab() == material.tokenizer().get_vocab()


def test_layers_are_dropped_from_the_teacher_to_make_a_student(folder, tmp_path):
    settings = material.settings(folder, student=None, drop_layers="0", learning_rate=1e-9)
    distill(settings, tmp_path / "run")
    student, teacher = load_model(tmp_path / "run"), load_model(folder / "teacher")
    assert student.config.num_hidden_layers == 1
    kept = teacher.transformer.h[1].mlp.c_fc.weight
    torch.testing.assert_close(student.transformer.h[0].mlp.c_fc.weight, kept, rtol=0, atol=1e-7)


def test_computing_activations_twice_changes_no_bit(folder, finished, tmp_path):
    distill(material.settings(folder, gradient_checkpointing=True), tmp_path / "run")
    assert same(weights(tmp_path / "run"), weights(finished))


def test_a_teacher_run_once_teaches_the_same(folder, finished, tmp_path, monkeypatch):
    """Up to the rounding of blocks that were run in other company."""
    made = []
    read = cache.CachedTeacher.observe
    monkeypatch.setattr(
        cache.CachedTeacher, "observe", lambda *a, **k: made.append(1) or read(*a, **k)
    )
    distill(material.settings(folder, cache_teacher=True), tmp_path / "run")
    assert made
    assert not (tmp_path / "run" / "teacher").exists()
    rows = Run(tmp_path / "run").metrics, Run(finished).metrics
    found, wanted = ([row["loss"] for row in it if "loss" in row] for it in rows)
    assert found == pytest.approx(wanted, rel=1e-4)


def test_bfloat16_computes_in_it_and_keeps_float32_weights(folder, finished, tmp_path):
    distill(material.settings(folder, dtype="bfloat16"), tmp_path / "run")
    found, exact = weights(tmp_path / "run"), weights(finished)
    assert {it.dtype for it in found.values()} == {torch.float32}
    assert not same(found, exact)
    for name, tensor in found.items():  # Adam's first steps are of 0.01 whatever the gradient
        torch.testing.assert_close(tensor, exact[name], rtol=0, atol=0.05)


REFUSED = {
    "student": {"student": None},
    "drop_layers": {"student": None, "drop_layers": "0-7"},
    "divergence": {"divergence": "akl(mu=2)"},
    "temperature": {"temperature": 0.0},
    "hard_label_weight": {"hard_label_weight": -1.0},
    "max_steps": {"max_steps": 0},
    "epochs": {"epochs": float("nan")},
    "max_length": {"max_length": 1},
    "max_length must be at most 32": {"max_length": 33},
    "batch_size": {"batch_size": 0},
    "gradient_accumulation": {"gradient_accumulation": 0},
    "learning_rate": {"learning_rate": 0.0},
    "warmup": {"warmup": 1.0},
    "weight_decay": {"weight_decay": float("inf")},
    "max_gradient": {"max_gradient": -1.0},
    "held_out": {"held_out": 1.0},
    "eval_blocks": {"eval_blocks": 0},
    "eval_every": {"eval_every": 0},
    "save_every": {"save_every": -1},
    "keep_checkpoints": {"keep_checkpoints": 1},
    "seed": {"seed": -1},
    "device": {"device": "abacus"},
    "data": {"data": "nowhere.jsonl"},
    "model: there is no file or folder nowhere": {"teacher": "nowhere/at/all"},
    "student: there is no file": {"student": "nowhere.json"},
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_cannot_be_done_is_refused_by_name_and_nothing_is_written(said, folder, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError, ImportError), match=f"^{said}"):
        distill(material.settings(folder, **REFUSED[said]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_blocks_are_as_long_as_the_context_where_no_length_is_chosen(folder, tmp_path):
    """Both models read 32 tokens, and 512 is the default of larger ones."""
    chosen = material.settings(folder, max_length=None, max_steps=2)
    distill(chosen, tmp_path / "run")
    distill(material.settings(folder, max_length=32, max_steps=2), tmp_path / "other")
    run, other = Run.open(tmp_path / "run"), Run.open(tmp_path / "other")
    assert run.settings["max_length"] == other.settings["max_length"] == 32
    assert run.record["data"] == other.record["data"]
    distill(dataclasses.replace(chosen, max_steps=3), tmp_path / "run", resume=True)
    assert Run.open(tmp_path / "run").settings["max_length"] == 32
    shorter = dataclasses.replace(chosen, max_length=16, max_steps=3)
    with pytest.raises(ValueError, match="max_length was 32 and is 16"):
        distill(shorter, tmp_path / "run", resume=True)


def test_the_default_length_is_the_shortest_context_of_the_models_that_read_it(folder, tmp_path):
    short = tmp_path / "short"
    material.model(1, 8, seed=0, n_positions=12).save_pretrained(short)
    (tmp_path / "student.json").write_text(
        json.dumps({"model_type": "gpt2", "n_positions": 20}), encoding="utf-8"
    )
    long = tmp_path / "long"
    material.model(1, 8, seed=0, n_positions=2000).save_pretrained(long)
    server = {"teacher": "http://127.0.0.1:1", "loss_top_k": 4, "divergence": "kl"}
    of_bytes = {"teacher": str(short), "student": str(long), "divergence": "kl"}
    of_bytes |= {"teacher_alignment": "bytes"}
    cases = {
        32: {},
        12: {"teacher": str(short)},
        20: {"student": str(tmp_path / "student.json"), "teacher": str(long)},
        512: {"student": str(long), "teacher": str(long)},
    }
    cases = [*cases.items(), (12, {"student": str(short), **server}), (512, of_bytes)]
    cases += [(32, {"teacher": "nowhere/at/all"}), (7, {"max_length": 7, "teacher": str(short)})]
    for length, changes in cases:
        chosen = material.settings(folder, **{"max_length": None} | changes)
        assert with_length(chosen).max_length == length


def test_a_folder_that_the_run_reads_is_not_overwritten(folder):
    with pytest.raises(ValueError, match=r"^out: .* holds the teacher"):
        distill(material.settings(folder), folder, overwrite=True)
    assert (folder / "teacher" / "model.safetensors").exists()


def test_a_student_for_another_tokenizer_is_refused(folder, tmp_path):
    material.model(1, 8, seed=0, vocab_size=200).save_pretrained(tmp_path / "small")
    with pytest.raises(ValueError, match="student"):
        distill(material.settings(folder, student=str(tmp_path / "small")), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_dry_run_says_what_would_happen_and_writes_nothing(config, folder, tmp_path, capsys):
    before = weights(folder / "student")
    words = ["distill", "--config", config, "--out", str(tmp_path / "run"), "--dry-run"]
    assert main(words) == 0
    assert not (tmp_path / "run").exists()
    assert same(before, weights(folder / "student"))
    said = capsys.readouterr().out
    assert "4 of 32 tokens" in said
    assert "5 evaluations, at most 4 checkpoints" in said
    assert re.search(r"disk +up to [\d.]+ [MG]B: \d checkpoints", said)
    assert re.search(r"\d [MG]B at the peak", said)  # of this process, whatever ran in it before
    assert 'The] "assert" statement' in said or '[T]he "assert" statement' in said


def test_epochs_count_steps_as_the_trainer_takes_them(folder, tmp_path):
    settings = material.settings(
        folder, max_steps=None, epochs=2.0, max_length=32, batch_size=16, gradient_accumulation=5
    )
    done = distill(settings, tmp_path / "run")
    blocks = Run(done.path).record["data"]["blocks"]
    assert done.result["steps"] == settings.steps(blocks)
    assert done.result["tokens"] == 2 * Run(done.path).record["data"]["tokens"]


MEASURED = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import material
from rkl.distill import distill, dry_run
folder, what = Path(sys.argv[2]), sys.argv[3]
models = {"student": str(folder / "large"), "teacher": str(folder / "larger")}
settings = material.settings(folder, **models, max_steps=12, max_length=128)
if what == "plan":
    found = dry_run(settings)
    print(found.memory, found.seconds)
else:
    result = distill(settings, folder / sys.argv[4]).result
    print(result["peak_memory"], result["seconds"])
"""


@pytest.mark.slow
def test_a_dry_run_is_near_the_memory_and_the_time_of_the_run(folder):
    """30 % and a factor of 2, of a run whose optimizer, logits and activations all show."""
    for name, layers in (("large", 3), ("larger", 4)):
        material.model(layers, 512, seed=layers, n_positions=128).save_pretrained(folder / name)
        material.tokenizer().save_pretrained(folder / name)
    for trial in range(5):  # the load of a machine may change between the two
        figures = {}
        for what in ("plan", "run"):
            here = [str(Path(__file__).parent), str(folder), what, f"measured-{trial}"]
            command = [sys.executable, "-c", MEASURED, *here]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            figures[what] = [float(word) for word in done.stdout.split()]
        (memory, seconds), (peak, took) = figures["plan"], figures["run"]
        assert memory == pytest.approx(peak, rel=0.3)
        if took / 2 < seconds < 2 * took:
            break
    assert took / 2 < seconds < 2 * took

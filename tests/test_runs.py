"""The run folder: what a crash leaves behind, what is refused, what is found again."""

import errno
import json
import os
import stat
import subprocess
import sys
import threading
import types
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import rkl
from rkl import runs
from rkl.runs import Run, lock

SETTINGS = {"divergence": "KL()", "max_steps": 10, "layers": (1, 2)}


def create(out, **options):
    return Run.create(out, "distill", SETTINGS, seed=0, **options)


def everything_in(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def wing(monkeypatch):
    """A wing that nobody has told rkl.runs about."""
    module = types.ModuleType("rkl.toy")
    module.load_run = lambda path: ("loaded", Path(path).name)
    monkeypatch.setitem(sys.modules, "rkl.toy", module)
    monkeypatch.setattr(runs, "KINDS", (*runs.KINDS, "toy"))
    return module


# Writing

WRITERS = {
    "file": lambda path: runs.write_atomic(path, b"new"),
    "json": lambda path: runs.write_json(path, {"new": 1}),
    "tensors": lambda path: runs.save_tensors(path, {"new": torch.ones(3)}),
}


def test_a_metric_that_is_not_finite_is_null(tmp_path):
    """JSON has no NaN and no Infinity, though Python writes and reads them."""
    run = Run.create(tmp_path / "run", "fit", {}, seed=0)
    run.log({"step": 1, "loss": float("inf"), "parts": (float("nan"), 1.5)})
    text = (tmp_path / "run" / "metrics.jsonl").read_text("utf-8")
    assert json.loads(text, parse_constant=pytest.fail) == run.metrics[0]
    assert run.metrics == [{"step": 1, "loss": None, "parts": [None, 1.5]}]


def test_what_is_written_is_what_is_read(tmp_path):
    runs.write_atomic(tmp_path / "text", "Ω\n")
    runs.write_json(tmp_path / "json", {"a": [1, None, "Ω"]})
    runs.save_tensors(tmp_path / "tensors", {"w": torch.eye(3).T[:2]}, {"step": "1"})
    assert (tmp_path / "text").read_text(encoding="utf-8") == "Ω\n"
    assert json.loads((tmp_path / "json").read_text()) == {"a": [1, None, "Ω"]}
    assert torch.equal(load_file(tmp_path / "tensors")["w"], torch.eye(3)[:2])
    assert sorted(os.listdir(tmp_path)) == ["json", "tensors", "text"]


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("point", ["replace", "fsync"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "disk full"), KeyboardInterrupt()])
def test_a_write_that_fails_at_any_point_leaves_the_old_file_alone(
    tmp_path, monkeypatch, writer, point, error
):
    (tmp_path / "file").write_bytes(b"old")

    def fail(*_arguments):
        raise error

    monkeypatch.setattr(os, point, fail)
    with pytest.raises(type(error)):
        WRITERS[writer](tmp_path / "file")
    assert everything_in(tmp_path) == {"file": b"old"}


def test_a_file_is_on_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    calls, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda it: (calls.append("fsync"), fsync(it)))
    monkeypatch.setattr(os, "replace", lambda *it: (calls.append("replace"), replace(*it)))
    runs.write_atomic(tmp_path / "file", b"new")
    assert calls == ["fsync", "replace", "fsync"]  # the file; its name; the folder's entry


def record_of_disk(monkeypatch):
    """What is flushed and renamed, in order: an inode with its content then, or two names."""
    events, fsync, replace = [], os.fsync, os.replace

    def flush(descriptor):
        fsync(descriptor)
        found = os.fstat(descriptor)
        folder = stat.S_ISDIR(found.st_mode)
        content = None if folder else os.pread(descriptor, found.st_size, 0)
        events.append((found.st_ino, content))

    def rename(old, new):
        replace(old, new)
        events.append(("renamed to", Path(new)))

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "replace", rename)
    return events


def test_a_folder_is_on_the_disk_with_its_contents_before_it_takes_its_name(tmp_path, monkeypatch):
    """A power cut keeps what was flushed, and the names may reach the disk before the rest."""
    events = record_of_disk(monkeypatch)
    with runs.replacing_folder(tmp_path / "checkpoint-1") as folder:
        (folder / "weights").write_bytes(b"weights")
        (folder / "part").mkdir()
        (folder / "part" / "optimizer.pt").write_bytes(b"moments")
    place = tmp_path / "checkpoint-1"
    named = events.index(("renamed to", place))
    before, after = events[:named], events[named + 1 :]
    for file in (place / "weights", place / "part" / "optimizer.pt"):
        assert (file.stat().st_ino, file.read_bytes()) in before
    for inside in (place / "part", place):
        assert (inside.stat().st_ino, None) in before
    assert (tmp_path.stat().st_ino, None) in after


def test_files_that_join_a_folder_are_on_the_disk_before_they_take_their_names(
    tmp_path, monkeypatch
):
    events = record_of_disk(monkeypatch)
    with runs.replacing_files(tmp_path) as folder:
        (folder / "weights").write_bytes(b"weights")
        (folder / "tokenizer").write_bytes(b"words")
    for name in ("weights", "tokenizer"):
        file = tmp_path / name
        named = events.index(("renamed to", file))
        assert (file.stat().st_ino, file.read_bytes()) in events[:named]
        assert (tmp_path.stat().st_ino, None) in events[named + 1 :]


def test_a_row_is_on_the_disk_once_it_is_appended(tmp_path, monkeypatch):
    events, file = record_of_disk(monkeypatch), tmp_path / "metrics.jsonl"
    for step in (1, 2):
        events.clear()
        runs.append_jsonl(file, {"step": step})
        content = file.read_bytes()
        assert content.endswith(b'{"step": %d}\n' % step)
        assert events == [(file.stat().st_ino, content)]


@pytest.mark.parametrize("failing_call", [1, 2])
def test_a_folder_that_fails_to_be_replaced_stays_as_it_was(tmp_path, monkeypatch, failing_call):
    checkpoint, replace, calls = tmp_path / "checkpoint-1", os.replace, []
    with runs.replacing_folder(checkpoint) as folder:
        (folder / "weights").write_bytes(b"old")

    def fail_once(*names):
        calls.append(names)
        if len(calls) == failing_call:
            raise OSError(errno.EIO, "input/output error")
        replace(*names)

    monkeypatch.setattr(os, "replace", fail_once)
    with pytest.raises(OSError, match="input/output"), runs.replacing_folder(checkpoint) as folder:
        (folder / "weights").write_bytes(b"new")
    assert everything_in(tmp_path) == {"checkpoint-1/weights": b"old"}


def test_a_folder_replaces_another_whole(tmp_path):
    for name in ("old", "new"):
        with runs.replacing_folder(tmp_path / "checkpoint-1") as folder:
            (folder / "inner").mkdir()
            (folder / "inner" / name).write_text(name)
    assert everything_in(tmp_path) == {"checkpoint-1/inner/new": b"new"}


def test_a_block_that_raises_leaves_no_folder(tmp_path):
    def fill():
        with runs.replacing_folder(tmp_path / "checkpoint-1") as folder:
            (folder / "weights").write_bytes(b"half")
            raise KeyboardInterrupt

    pytest.raises(KeyboardInterrupt, fill)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("failing_call", [1, 2, 3, 4])
def test_files_that_join_a_folder_are_each_old_or_new(tmp_path, monkeypatch, failing_call):
    names, replace, calls = ["a", "b", "inner/c"], os.replace, []
    (tmp_path / "mine").write_text("untouched")
    (tmp_path / "a").write_text("old")

    def fail_once(*arguments):
        calls.append(arguments)
        if len(calls) == failing_call:
            raise OSError(errno.EIO, "input/output error")
        replace(*arguments)

    def join():
        with runs.replacing_files(tmp_path) as folder:
            (folder / "inner").mkdir()
            for name in names:
                (folder / name).write_text("new")

    monkeypatch.setattr(os, "replace", fail_once)
    if failing_call > len(names):
        join()
        assert everything_in(tmp_path) == dict.fromkeys(names, b"new") | {"mine": b"untouched"}
        return
    pytest.raises(OSError, join)
    left = everything_in(tmp_path)
    assert left.pop("mine") == b"untouched"
    assert left.pop("a") in (b"old", b"new")
    assert left.items() <= {"b": b"new", "inner/c": b"new"}.items()


def test_a_folder_that_cannot_be_removed_whole_does_not_keep_its_name(tmp_path, monkeypatch):
    (tmp_path / "checkpoint-1").mkdir()

    def fail(_folder):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("shutil.rmtree", fail)
        pytest.raises(KeyboardInterrupt, runs.remove_folder, tmp_path / "checkpoint-1")
    assert not (tmp_path / "checkpoint-1").exists()
    runs.sweep(tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_torn_last_line_is_dropped_when_read_and_when_appended_to(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for step in range(3):
        runs.append_jsonl(path, {"step": step})
    path.write_bytes(path.read_bytes()[:-4])
    assert runs.read_jsonl(path) == [{"step": 0}, {"step": 1}]
    runs.append_jsonl(path, {"step": 7})
    assert runs.read_jsonl(path) == [{"step": 0}, {"step": 1}, {"step": 7}]


def test_a_file_that_holds_only_a_torn_line_can_be_appended_to(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"st')
    assert runs.read_jsonl(path) == []
    runs.append_jsonl(path, {"step": 7})
    assert runs.read_jsonl(path) == [{"step": 7}]


def test_a_line_broken_in_the_middle_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 0}\n{"st\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2, is not JSON"):
        runs.read_jsonl(path)


# The folder


def test_a_run_says_how_to_run_it_again(tmp_path):
    record = create(tmp_path / "run").record
    assert record["kind"] == "distill"
    assert record["settings"] == {"divergence": "KL()", "max_steps": 10, "layers": [1, 2]}
    assert record["seed"] == 0
    assert record["versions"]["torch"] == torch.__version__
    assert record["status"] == "running"


def test_versions_are_noted_without_importing_anything(monkeypatch):
    for name in ("torch", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)
    assert {"python", "rkl", "torch", "transformers"} <= runs.versions().keys()


def test_the_status_follows_the_run(tmp_path):
    run = create(tmp_path / "run")
    with run.running():
        assert run.record["status"] == "running"
    assert run.record["status"] == "finished"

    def interrupted():
        with run.running():
            raise KeyboardInterrupt

    pytest.raises(KeyboardInterrupt, interrupted)
    assert run.record["status"] == "interrupted"


def test_a_folder_that_holds_anything_is_refused_untouched(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(FileExistsError, match="out: .* exists"):
        create(tmp_path)
    with pytest.raises(FileNotFoundError, match="is not a run"):
        create(tmp_path, overwrite=True)
    with pytest.raises(FileNotFoundError, match="is not a run"):
        create(tmp_path, resume=True)
    assert everything_in(tmp_path) == {"thesis.tex": b"precious"}


def test_another_programs_run_json_does_not_make_a_folder_ours_to_empty(tmp_path):
    (tmp_path / "run.json").write_text('{"name": "another program"}')
    with pytest.raises(ValueError, match="not written by rkl"):
        create(tmp_path, overwrite=True)
    assert os.listdir(tmp_path) == ["run.json"]


@pytest.mark.parametrize(
    "bad",
    [
        {"kind": "../distill"},
        {"kind": ""},
        {"seed": 1.5},
        {"seed": True},
        {"settings": {"model": object()}},
        {"overwrite": True, "resume": True},
    ],
)
def test_nothing_is_written_before_the_arguments_are_looked_at(tmp_path, bad):
    run = create(tmp_path / "run")
    before = everything_in(tmp_path)
    good = {"kind": "distill", "settings": SETTINGS, "seed": 0, "overwrite": True}
    with pytest.raises((ValueError, TypeError), match=next(iter(bad))):
        Run.create(out=run.path, **good | bad)
    with pytest.raises((ValueError, TypeError), match=next(iter(bad))):
        Run.create(out=tmp_path / "new", **good | bad)
    assert everything_in(tmp_path) == before


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(FileExistsError, match="out must be a folder"):
        create(tmp_path / "run", overwrite=True)


def test_overwriting_empties_the_run_before(tmp_path):
    run = create(tmp_path)
    run.log({"step": 1})
    with runs.replacing_folder(tmp_path / "checkpoint-1") as folder:
        (folder / "weights").write_text("old")
    again = create(tmp_path, overwrite=True)
    again.release()
    assert os.listdir(tmp_path) == ["run.json"]


def fill(run):
    """Write into a run by every way there is."""
    run.log({"step": 1})
    run.remember_rows(["a"])
    runs.write_json(run.path / "evaluation.json", {})
    runs.save_tensors(run.path / "model.safetensors", {"w": torch.ones(1)})
    with runs.replacing_folder(run.path / "checkpoints" / "checkpoint-1") as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "weights").write_text("old")
    with runs.replacing_files(run.path) as folder:
        (folder / "tokenizer.json").write_text("{}")


FILLED = {
    *("run.json", "metrics.jsonl", "rows.bin", "evaluation.json", "model.safetensors"),
    *("checkpoints/checkpoint-1/inner/weights", "tokenizer.json"),
}


def test_a_run_lists_every_file_that_is_written_into_it(tmp_path):
    run = create(tmp_path / "run")
    with run.running():
        fill(run)
        assert run.files.keys() == FILLED
    assert run.files["run.json"] == {"sha256": None, "size": None}
    for name in FILLED - {"run.json"}:
        data = (run.path / name).read_bytes()
        assert run.files[name] == {"sha256": sha256(data).hexdigest(), "size": len(data)}
    assert set(everything_in(run.path)) == FILLED


def test_a_file_is_listed_before_it_takes_its_name(tmp_path, monkeypatch):
    run, replace = create(tmp_path / "run"), os.replace

    def killed(source, target):
        if Path(target).name == "rows.bin":
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    pytest.raises(KeyboardInterrupt, run.remember_rows, ["a"])
    assert "rows.bin" in run.files
    monkeypatch.undo()
    create(run.path, resume=True)
    assert "rows.bin" not in run.files  # it never came to be


def test_a_digest_holds_until_the_file_is_written_again(tmp_path):
    run, measured = create(tmp_path / "run"), {"sha256": "0" * 64, "size": 3}
    runs.write_atomic(run.path / "weights", "one")
    run.record_files({"weights": measured})
    assert run.files["weights"] == measured
    run.log({"step": 1})
    run.update(result={"steps": 1})
    assert run.files["weights"] == measured
    runs.write_atomic(run.path / "weights", "two")
    assert run.files["weights"] == {"sha256": None, "size": None}


@pytest.mark.parametrize(
    "name", ["notes.md", "my-notes/deep/thesis.tex", ".git/HEAD", "checkpoints/mine.py", "link"]
)
def test_overwriting_refuses_what_rkl_did_not_write_and_removes_nothing(tmp_path, name):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "thesis.tex").write_text("precious")
    run = create(tmp_path / "run")
    fill(run)
    run.release()
    place = run.path / name
    place.parent.mkdir(parents=True, exist_ok=True)
    if name == "link":
        place.symlink_to(tmp_path / "elsewhere")
    else:
        place.write_text("precious")
    before = everything_in(tmp_path)
    with pytest.raises(FileExistsError, match=f"1 file that rkl did not write: {name}"):
        create(run.path, overwrite=True)
    assert everything_in(tmp_path) == before


def test_many_foreign_files_are_counted(tmp_path):
    run = create(tmp_path)
    for number in range(12):
        (run.path / f"note-{number:02}").write_text("precious")
    with pytest.raises(FileExistsError, match="12 files.*note-00, note-01, note-02 and 9 more"):
        create(run.path, overwrite=True)


def test_the_link_of_a_user_in_the_place_of_a_file_of_a_run_is_foreign(tmp_path):
    run = create(tmp_path / "run")
    runs.write_atomic(run.path / "weights", "large")
    os.replace(run.path / "weights", tmp_path / "elsewhere")
    (run.path / "weights").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError, match="did not write: weights"):
        create(run.path, overwrite=True)
    assert (tmp_path / "elsewhere").read_text() == "large"


def test_a_list_with_names_outside_of_the_folder_removes_nothing_there(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    run = create(tmp_path / "run")
    run.record_files(["../thesis.tex", str(tmp_path / "thesis.tex"), "a/../../thesis.tex"])
    create(run.path, overwrite=True)
    assert (tmp_path / "thesis.tex").read_text() == "precious"


def test_a_run_that_was_made_within_another_is_overwritten_with_it(tmp_path):
    whole = create(tmp_path / "whole")
    with whole.running():
        inner = create(whole.path / "inner")
        with inner.running():
            fill(inner)
    create(whole.path, overwrite=True).release()
    assert os.listdir(whole.path) == ["run.json"]


def test_a_run_that_a_user_made_within_another_is_foreign(tmp_path):
    whole = create(tmp_path / "whole")
    whole.release()
    create(whole.path / "mine").release()
    with pytest.raises(FileExistsError, match=r"did not write: mine/run\.json"):
        create(whole.path, overwrite=True)


@pytest.mark.parametrize(
    ("kind", "status", "ours"),
    [
        ("studies.akl", "killed", True),
        ("studies.akl", "finished", False),  # which removes the folder itself
        ("distill", "killed", False),
    ],
)
def test_what_processes_of_a_study_wrote_is_overwritten_with_it(tmp_path, kind, status, ours):
    run = Run.create(tmp_path / "run", kind, SETTINGS, seed=0)
    run.update(status=status)
    run.release()
    place = run.path / "prepared" / "seed-0" / "train.jsonl"
    place.parent.mkdir(parents=True)
    place.write_text("{}")
    if not ours:
        with pytest.raises(FileExistsError, match="did not write: prepared/seed-0/train"):
            create(run.path, overwrite=True)
        return
    create(run.path, overwrite=True).release()
    assert os.listdir(run.path) == ["run.json"]


def test_a_run_of_before_files_were_listed_is_overwritten_but_not_what_lies_beside_it(tmp_path):
    run = create(tmp_path / "run")
    with run.running():
        fill(run)
    record = run.record
    del record["files"]
    (run.path / "run.json").write_text(json.dumps(record))
    inner = "checkpoints/checkpoint-1/inner/weights"  # no Trainer writes folders there
    (run.path / inner).rename(run.path / "checkpoints" / "checkpoint-1" / "optimizer.pt")
    assert run.files.keys() == FILLED - {inner} | {"checkpoints/checkpoint-1/optimizer.pt"}
    (run.path / "thesis.tex").write_text("precious")
    with pytest.raises(FileExistsError, match=r"thesis\.tex"):
        create(run.path, overwrite=True)
    (run.path / "thesis.tex").unlink()
    create(run.path, overwrite=True).release()
    assert everything_in(run.path).keys() == {"run.json"}


def test_resuming_goes_on_in_the_folder_as_it_is(tmp_path):
    first = create(tmp_path / "run", resume=True)  # nothing there yet: it begins
    first.log({"step": 1})
    started = first.record["started"]
    again = create(tmp_path / "run", resume=True)
    assert again.metrics == [{"step": 1}]
    assert again.record["started"] == started


def test_resuming_under_other_settings_is_refused_by_name(tmp_path):
    create(tmp_path)
    other = SETTINGS | {"max_steps": 20}
    with pytest.raises(ValueError, match="max_steps was 10 and is 20"):
        Run.create(tmp_path, "distill", other, seed=0, resume=True)
    with pytest.raises(ValueError, match="seed was 0 and is 1"):
        Run.create(tmp_path, "distill", SETTINGS, seed=1, resume=True)
    with pytest.raises(ValueError, match="kind 'distill'; expected 'fit'"):
        Run.create(tmp_path, "fit", SETTINGS, seed=0, resume=True)
    Run.create(tmp_path, "distill", other, seed=0, resume=True, may_change=["max_steps"])


def test_resuming_sweeps_up_after_a_killed_process(tmp_path):
    run = create(tmp_path)
    (tmp_path / ".run.json.0123abcd.tmp").write_text('{"kin')
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / ".checkpoint-2.0123abcd.old").mkdir()
    (tmp_path / ".checkpoint-1.0123abcd.old").mkdir()
    (tmp_path / ".checkpoint-1.89abcdef.tmp").mkdir()
    (tmp_path / ".mine.tmp").write_text("not a name that rkl gives")
    create(run.path, resume=True).release()
    names = [".mine.tmp", "checkpoint-1", "checkpoint-2", "run.json"]
    assert sorted(os.listdir(tmp_path)) == names


def test_a_run_killed_before_its_first_file_can_be_begun_again(tmp_path):
    (tmp_path / ".run.json.0123abcd.tmp").write_text('{"kin')
    create(tmp_path).release()
    assert os.listdir(tmp_path) == ["run.json"]


def test_later_metrics_are_forgotten_when_a_run_goes_back(tmp_path):
    run = create(tmp_path)
    for step in (10, 20, 30):
        run.log({"step": step})
    run.rewind(20)
    assert run.metrics == [{"step": 10}, {"step": 20}]


# One writer

HOLDING = """
import sys
from rkl.runs import Run, lock
run = Run.create(sys.argv[1], "distill", {}, seed=0)
with run.running():
    run.log({"step": 1})
    print("holding", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def held(tmp_path):
    """A run that another process is writing, and that process."""
    words = [sys.executable, "-c", HOLDING, str(tmp_path / "run")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(words, **pipes, text=True) as process:
        assert process.stdout.readline() == "holding\n"
        yield tmp_path / "run", process
        process.kill()


@pytest.mark.parametrize("options", [{}, {"resume": True}, {"overwrite": True}])
@pytest.mark.parametrize("kind", ["distill", "bayes"])
def test_a_second_writer_is_refused_and_harms_nothing(held, kind, options):
    path, process = held
    (path / ".rows.bin.0123abcd.tmp").write_text("of the first")
    before = everything_in(path)
    with pytest.raises(runs.RunBusyError, match=f"process {process.pid} on"):
        Run.create(path, kind, {}, seed=0, **options)
    assert everything_in(path) == before


def test_a_lock_does_not_outlive_a_killed_process(held):
    path, process = held
    process.kill()
    process.wait()
    assert (path / ".rkl-lock").exists()
    with Run.create(path, "distill", {}, seed=0, resume=True) as run:
        assert run.metrics == [{"step": 1}]
    assert not (path / ".rkl-lock").exists()


def test_what_is_written_beside_a_running_training_does_not_undo_its_updates(held, tmp_path):
    path, _process = held
    beside = [threading.Thread(target=Run(path).record_files, args=([f"{i}"],)) for i in range(8)]
    beside += [threading.Thread(target=Run(path).update, kwargs={f"k{i}": i}) for i in range(8)]
    for thread in beside:
        thread.start()
    for thread in beside:
        thread.join()
    record = Run(path).record
    assert {f"{i}" for i in range(8)} <= record["files"].keys()
    assert [record.get(f"k{i}") for i in range(8)] == list(range(8))


def test_a_second_thread_is_refused_and_the_same_may_begin_again(tmp_path):
    create(tmp_path / "run")
    refused = []

    def second():
        try:
            create(tmp_path / "run", resume=True)
        except runs.RunBusyError as error:
            refused.append(error)

    thread = threading.Thread(target=second)
    thread.start()
    thread.join()
    assert len(refused) == 1
    create(tmp_path / "run", resume=True)  # what took the lock here was left by an exception


def test_a_lock_on_a_file_that_its_last_owner_removed_is_taken_again(tmp_path, monkeypatch):
    """Between opening the file and locking it, its owner may end and unlink it."""
    flock, calls = lock.fcntl.flock, []

    def late(descriptor, how):
        calls.append(how)
        if len(calls) == 1:
            (tmp_path / runs.LOCK).unlink()
            (tmp_path / runs.LOCK).write_text("{}")  # of the next owner
        return flock(descriptor, how)

    monkeypatch.setattr(lock.fcntl, "flock", late)
    writer = lock.acquire(tmp_path, lambda names: None)
    assert len(calls) == 2
    assert os.path.samestat(os.fstat(writer.descriptor), os.stat(tmp_path / runs.LOCK))
    writer.release()


def test_temporary_files_of_a_living_process_are_not_swept(tmp_path):
    inside = """
import sys
from rkl.runs import replacing
with replacing(sys.argv[1]) as temporary:
    temporary.write_text("half")
    print("writing", flush=True)
    sys.stdin.read()
"""
    words = [sys.executable, "-c", inside, str(tmp_path / "s.npy")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(words, **pipes, text=True) as process:
        assert process.stdout.readline() == "writing\n"
        (name,) = os.listdir(tmp_path)
        runs.sweep(tmp_path)
        runs.write_atomic(tmp_path / "s.npy", "mine")
        assert sorted(os.listdir(tmp_path)) == sorted([name, "s.npy"])
        process.kill()
    runs.write_atomic(tmp_path / "s.npy", "again")  # sweeps what the killed one left
    assert os.listdir(tmp_path) == ["s.npy"]


def test_ranks_of_one_run_share_the_lock_of_the_first(held, monkeypatch):
    path, _process = held
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert runs.lock.acquire(path, list) is None


# What is read and what is written


@pytest.mark.parametrize("way", ["inside", "link to it", "link in it", "folder around"])
def test_an_input_in_the_folder_to_write_is_refused(tmp_path, way):
    out, source = tmp_path / "out", tmp_path / "data.npy"
    out.mkdir()
    if way == "inside":
        (source := out / "data.npy").write_text("")
    elif way == "link to it":
        (out / "data.npy").write_text("")
        source.symlink_to(out / "data.npy")
    elif way == "link in it":
        source.write_text("")
        (source := out / "link.npy").symlink_to(tmp_path / "data.npy")
    else:
        source = tmp_path
    with pytest.raises(ValueError, match="out: .* (holds|lies in) the data"):
        runs.refuse_inputs(out, {"data": source, "labels": None, "teacher": "no/file"})
    runs.refuse_inputs(tmp_path / "other" if way != "folder around" else "/o", {"data": source})


def test_a_file_that_rkl_did_not_write_is_not_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = create(tmp_path / "run")
    runs.write_atomic(run.path / "report.html", "page")
    (tmp_path / "mine.py").write_text("precious")
    with pytest.raises(FileExistsError, match=r"mine\.py exists.*--overwrite"):
        runs.check_out_file(tmp_path / "mine.py")
    runs.check_out_file(tmp_path / "mine.py", overwrite=True)
    (tmp_path / "page.html").write_text('<!doctype html><meta name="generator" content="rkl">')
    runs.check_out_file(tmp_path / "page.html")
    with pytest.raises(ValueError, match="is the data itself"):
        runs.check_out_file(tmp_path / "mine.py", overwrite=True, inputs={"data": "mine.py"})
    for name in ("run.json", "report.html", "rows.bin"):
        with pytest.raises(FileExistsError, match="a file of the run"):
            runs.check_out_file(run.path / name, overwrite=True)
    runs.check_out_file(run.path / "report.html", own="report.html")
    runs.check_out_file(run.path / "samples.npy")


def test_what_a_verb_writes_by_itself_replaces_only_what_rkl_wrote(tmp_path):
    run = create(tmp_path / "run")
    mine = run.path / "replies.jsonl"
    mine.write_text("notes of the user's")
    with pytest.raises(FileExistsError, match=r"replies\.jsonl exists.*overwrite=True in Python"):
        runs.check_out_file(mine, own="replies.jsonl")
    runs.check_out_file(mine, own="replies.jsonl", overwrite=True)
    run.record_files(["replies.jsonl"])
    runs.check_out_file(mine, own="replies.jsonl")


# Finding it again


def test_a_run_is_loaded_by_the_wing_it_names(tmp_path, wing):
    run = Run.create(tmp_path / "run", "toy", {}, seed=0)
    assert runs.load(run.path) == ("loaded", "run")
    assert rkl.load(run.path) == ("loaded", "run")


def test_a_wing_or_a_verb_that_does_not_exist_is_named(tmp_path, wing):
    toy = Run.create(tmp_path / "toy", "toy", {}, seed=0)
    future = Run.create(tmp_path / "future", "weather.rain", {}, seed=0)
    with pytest.raises(ValueError, match="'weather.rain', which this rkl does not know"):
        runs.load(future.path)
    with pytest.raises(ValueError, match="'toy', which rkl evaluate does not take"):
        runs.verb("evaluate_run", toy.path)
    with pytest.raises(ValueError, match="'toy', which rkl generate does not take"):
        runs.verb("GenerateSettings", toy.path)
    (toy.path / "report.html").touch()
    with pytest.raises(
        ValueError, match=r"rkl report does not take. Its report is .*report\.html"
    ):
        runs.verb("report_runs", toy.path)
    with pytest.raises(ValueError, match="runs of one kind.*'toy'.*'weather.rain'"):
        runs.verb("compare_runs", toy.path, future.path)


def test_a_package_that_a_wing_lacks_is_not_taken_for_a_missing_wing(tmp_path, monkeypatch):
    run = Run.create(tmp_path, "distill", {}, seed=0)

    def lacking(name):
        raise ModuleNotFoundError("No module named 'datasets'", name="datasets")

    monkeypatch.setattr(runs.importlib, "import_module", lacking)
    with pytest.raises(ModuleNotFoundError, match="datasets"):
        runs.load(run.path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "is not a run"),
        ("{", "is corrupt"),
        ("[]", "not written by rkl"),
        ('{"kind": "distill"}', "not written by rkl"),
        ('{"format": "1", "kind": "a", "settings": {}, "seed": 0}', "not written by rkl"),
        ('{"format": 99, "kind": "a", "settings": {}, "seed": 0}', "Install a newer rkl"),
        ('{"format": 1, "kind": "os;", "settings": {}, "seed": 0}', "no such kind"),
    ],
)
def test_a_folder_that_is_no_readable_run_says_what_is_wrong(tmp_path, text, message):
    if text is not None:
        (tmp_path / "run.json").write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        runs.load(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


# Fingerprints


def test_a_fingerprint_knows_rows_and_their_order_only():
    rows = ["one", {"a": 1, "b": [2, "Ω"]}, b"\x00\x01"]
    assert runs.fingerprint(rows) == runs.fingerprint(iter(rows))
    assert runs.fingerprint(rows) != runs.fingerprint(rows[::-1])
    assert runs.fingerprint(["ab"]) == runs.fingerprint("ab") != runs.fingerprint(["a", "b"])
    assert len(runs.fingerprint([])) == 32


def test_rows_that_were_trained_on_are_recognised(tmp_path):
    run = create(tmp_path)
    assert run.count_seen(["a"]) == 0
    run.remember_rows(f"row {i}" for i in range(1000))
    assert run.count_seen(["row 7", "row 999", "row 1000", "unseen"]) == 2
    assert (tmp_path / "rows.bin").stat().st_size == 8 * 1000


@pytest.mark.parametrize(
    ("settings", "kind"), [({"data": "x.npy"}, "fit"), ({"target": "mog4()"}, "sample")]
)
def test_a_run_of_a_flow_that_0_1_made_opens_as_one_of_data_or_of_a_target(
    tmp_path, settings, kind
):
    Run.create(tmp_path, "flows", settings, seed=0).release()
    assert Run.open(tmp_path).kind == kind
    with Run.create(tmp_path, kind, settings, seed=0, resume=True) as run:
        run.update(status="done")
    assert json.loads((tmp_path / "run.json").read_text())["kind"] == kind


def test_a_setting_that_an_earlier_rkl_did_not_have_was_at_its_default(tmp_path):
    Run.create(tmp_path, "fit", {"steps": 1}, seed=0).release()
    how = {"seed": 0, "resume": True, "upgrade": lambda old: {"guard": True, "steps": 5} | old}
    with pytest.raises(ValueError, match=r"guard was True and is False\.$"):
        Run.create(tmp_path, "fit", {"steps": 1, "guard": False}, **how)
    with pytest.raises(ValueError, match=r"steps was 1 and is 5\.$"):
        Run.create(tmp_path, "fit", {"steps": 5, "guard": True}, **how)
    Run.create(tmp_path, "fit", {"steps": 1, "guard": True}, **how).release()

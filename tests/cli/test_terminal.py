"""The command line on unusual streams, encodings, disks and interpreters."""

import io
import os
import re
import stat
import subprocess
import sys
import warnings

import pytest
import torch

from rkl import cli
from rkl.cli import commands, terminal
from rkl.runs import (
    DiskFullError,
    append_jsonl,
    full_disk,
    needing_room,
    replacing,
    replacing_files,
    replacing_folder,
    save_tensors,
    write_atomic,
)

KL = [sys.executable, "-m", "rkl", "divergences", "kl"]


def ran(*words, **how):
    """A command that is run in a process of its own."""
    given = {"capture_output": True, "text": True, "encoding": "utf-8"} | how
    return subprocess.run([sys.executable, "-m", "rkl", *words], **given)


# Encodings and streams


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_what_the_encoding_of_stdout_lacks_is_written_in_plain_signs(encoding, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    assert cli.main(["divergences", "kl"]) == cli.main(["divergences"]) == 0
    shown = stream.buffer.getvalue().decode(encoding)
    written = {"utf-8": "KL(p ‖ q) = Σ"}
    assert written.get(encoding, "KL(p || q) = Sigma") in shown


def test_a_process_on_a_console_of_windows_ends_well():
    done = ran(
        "divergences", "kl", env=os.environ | {"PYTHONIOENCODING": "cp1252"}, encoding="cp1252"
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_signs_are_spelt_by_what_they_mean():
    assert terminal.plain("−0.3 ± 0.1 ≤ ∞, 10⁻³ χ² é") == "-0.3 +- 0.1 <= inf, 10^-3 chi^2 e"
    assert terminal.plain("\ud83d 日") == "\\ud83d \\u65e5"


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", ">&- 2>&- <&-"])
def test_closed_streams_do_no_harm(closed, tmp_path):
    out = tmp_path / "written"
    script = (
        "import sys; from rkl import cli, runs\n"
        "code = cli.main(['fit', '--nonsense'])\n"
        f"file = open({str(out)!r}, 'w'); print(code, file.fileno() > 2, file=file)\n"
    )
    shell = f'exec {sys.executable} -c "$SCRIPT" {closed}'
    done = subprocess.run(["sh", "-c", shell], env=os.environ | {"SCRIPT": script})
    assert (done.returncode, out.read_text()) == (0, "2 True\n")


def test_streams_that_are_none_are_replaced(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert cli.main(["divergences", "kl"]) == 0
    assert cli.main(["divergences", "unheard-of"]) == 2
    sys.stdout.close()
    sys.stderr.close()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_stdout_is_told_from_a_failed_command():
    with open("/dev/full", "w") as full:
        how = {"capture_output": False, "stdout": full, "stderr": subprocess.PIPE}
        buffered = os.environ | {"PYTHONUNBUFFERED": ""}
        done = ran("divergences", "kl", env=buffered, **how)
    assert done.returncode == 1
    assert done.stderr == "rkl: error: standard output: No space left on device\n"


def test_a_reader_who_has_read_enough_is_no_error():
    with subprocess.Popen(KL, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


@pytest.mark.parametrize("columns", ["0", "1", "7", "wide"])
def test_a_terminal_of_any_width_will_do(columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", columns)
    assert cli.main(["divergences"]) == 0
    with pytest.raises(SystemExit) as ended:
        cli.main(["fit", "--help"])
    assert ended.value.code == 0


# Warnings and errors


def fail_with(monkeypatch, act):
    """A command, "fail", that does this."""

    def fail(parser, words):
        """Fail.

        Examples:
          rkl fail
        """
        parser.add_argument("--out")
        return lambda parsed: act()

    monkeypatch.setitem(commands.COMMANDS, "fail", (fail, "runs"))
    return cli.main(["fail"])


def test_a_warning_is_one_line_without_the_source_that_gave_it(monkeypatch, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        # What pytest records is not printed; print it as Python does.
        monkeypatch.setattr(warnings, "showwarning", warnings._showwarning_orig)
        monkeypatch.setattr(warnings, "_showwarnmsg_impl", shown_as_python_shows)
        assert fail_with(monkeypatch, lambda: warnings.warn("too\nfew", stacklevel=1)) == 0
    assert capsys.readouterr().err == "rkl: warning: too few\n"


def shown_as_python_shows(message):
    sys.stderr.write(warnings._formatwarnmsg(message))


def test_the_last_cause_of_a_broken_package_is_named(monkeypatch, capsys):
    def act():
        try:
            try:
                raise RuntimeError("operator torchvision::nms does not exist")
            except RuntimeError as error:
                raise ModuleNotFoundError("Could not import module 'PreTrainedModel'.") from error
        except ModuleNotFoundError as error:
            raise ImportError("Could not import module 'Trainer'.") from error

    assert fail_with(monkeypatch, act) == 1
    assert capsys.readouterr().err == (
        "rkl: error: Could not import module 'Trainer'. The cause: RuntimeError: operator "
        "torchvision::nms does not exist\n"
    )


def test_a_file_that_may_not_be_read_is_named(monkeypatch, capsys):
    def act():
        raise PermissionError(13, "Permission denied", "data.npy")

    assert fail_with(monkeypatch, act) == 1
    assert capsys.readouterr().err == "rkl: error: data.npy: Permission denied\n"


def test_control_characters_of_a_message_do_not_reach_the_terminal(monkeypatch, capsys):
    def act():
        raise ValueError("data: there is no file \x1b]0;title\x07.")

    assert fail_with(monkeypatch, act) == 2
    assert capsys.readouterr().err == ("rkl: error: data: there is no file \\x1b]0;title\\x07.\n")


def test_the_help_of_a_run_is_shown_where_one_wing_cannot_be_imported(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rkl.distill", None)
    with pytest.raises(SystemExit) as ended:
        cli.main(["evaluate", "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert "where rkl distill made RUN:\n  not shown: ModuleNotFoundError" in shown
    assert "settings, where rkl estimate made RUN" in shown


# Interpreters


def test_rkl_is_a_module_that_can_be_run():
    assert ran("--version").stdout == cli_version()


def cli_version():
    import rkl

    return f"rkl {rkl.__version__}\n"


@pytest.mark.parametrize("words", [["--help"], ["divergences", "kl"], ["fit", "--help"]])
def test_help_is_the_same_where_docstrings_are_stripped(words):
    stripped = [sys.executable, "-OO", "-m", "rkl", *words]
    assert subprocess.run(stripped, capture_output=True).stdout == (
        subprocess.run([sys.executable, "-m", "rkl", *words], capture_output=True).stdout
    )


# Disks


FULL = [
    OSError(28, "No space left on device"),
    OSError(122, "Disk quota exceeded"),
    OSError(27, "File too large"),
    OSError("200000 requested and 76768 written"),
    RuntimeError("basic_ios::clear: iostream error"),
    RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 3072 vs 2964"),
    RuntimeError("Can't decrement id ref count (errno = 27, error message = 'File too large')"),
    ValueError("I/O error: No space left on device (os error 28)"),
]


@pytest.mark.parametrize("error", FULL, ids=str)
def test_every_library_s_word_for_a_full_disk_is_understood(error, tmp_path):
    for writing in (replacing, replacing_folder, replacing_files, needing_room):
        place = tmp_path / "file" if writing is replacing else tmp_path
        with pytest.raises(DiskFullError, match="could not be written") as caught, writing(place):
            raise error
        assert str(caught.value).startswith(str(place))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [OSError(13, "no"), RuntimeError("no"), OSError()])
def test_other_failures_stay_what_they_are(error, tmp_path):
    assert full_disk(error) is None
    with pytest.raises(type(error)) as caught, needing_room(tmp_path):
        raise error
    assert caught.value is error


LIMITED = """
import resource, sys
from pathlib import Path
import numpy as np, torch
from rkl import runs
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
x = torch.zeros(10_000)
def array(path):
    with runs.replacing(path) as temporary, temporary.open("wb") as file:
        np.save(file, x.numpy())
def archive(path):
    with runs.replacing(path) as temporary:
        torch.save(x, temporary)
def dataset(path):
    import xarray as xr
    with runs.replacing(path) as temporary:
        xr.Dataset({"x": ("row", x.numpy())}).to_netcdf(temporary, engine="h5netcdf")
ways = {
    "safetensors": lambda path: runs.save_tensors(path, {"x": x}),
    "text": lambda path: runs.write_atomic(path, "x" * 40_000),
    "rows": lambda path: runs.append_jsonl(path, {"x": "x" * 40_000}),
    "array": array, "archive": archive, "dataset": dataset,
}
for name, way in ways.items():
    try:
        way(Path(sys.argv[1], name))
    except runs.DiskFullError as error:
        print(error)
"""


def test_a_limit_on_the_size_of_files_is_reported_by_every_writer(tmp_path):
    probe = [sys.executable, "-c", LIMITED, str(tmp_path)]
    done = subprocess.run(probe, capture_output=True, text=True, encoding="utf-8")
    lines = dict(line.split(" could not be written: ") for line in done.stdout.splitlines())
    names = "safetensors", "text", "rows", "array", "archive", "dataset"
    assert list(lines) == [str(tmp_path / name) for name in names], done.stderr
    for line in lines.values():
        assert re.search(r"files of this size are not allowed|a quota or limit is reached", line)
    sized = [line for line in lines.values() if line.endswith("; 0.0 MB were needed.")]
    assert len(sized) == 3
    assert {path.name for path in tmp_path.iterdir()} <= {"rows"}


def test_a_full_disk_is_one_line_that_tells_how_to_go_on(monkeypatch, capsys):
    def act():
        raise OSError(28, "No space left on device", "/data/x.csv")

    assert fail_with(monkeypatch, act) == 1
    assert capsys.readouterr().err.startswith("rkl: error: the disk is full: ")


# Permissions


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_and_folders_have_the_permissions_that_the_umask_leaves(umask, tmp_path):
    before = os.umask(umask)
    try:
        save_tensors(tmp_path / "a.safetensors", {"x": torch.zeros(3)})
        write_atomic(tmp_path / "b.txt", "text")
        append_jsonl(tmp_path / "c.jsonl", {})
        for writing, name in ((replacing_folder, "d"), (replacing_files, "e")):
            with writing(tmp_path / name) as folder:
                secret(folder / "f.safetensors")
        with replacing(tmp_path / "g.npy") as temporary:
            secret(temporary)
    finally:
        os.umask(before)
    for path in tmp_path.rglob("*"):
        expected = (0o777 if path.is_dir() else 0o666) & ~umask
        assert stat.S_IMODE(path.stat().st_mode) == expected, path


def secret(path):
    """A file that only its owner may read, as temporary files are made."""
    path.touch(0o600)

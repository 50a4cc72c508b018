"""The processes of a study end with it, however it ends, and say nothing of it."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rkl.studies.study import in_processes

STUDY = """
import os
import sys
import time
from pathlib import Path
from rkl.runs import signals
from rkl.studies.study import in_processes

def work(folder, number):
    Path(folder, str(os.getpid())).touch()
    time.sleep(600)

if __name__ == "__main__":
    try:
        with signals.raising():
            in_processes(work, [sys.argv[1]] * 4, range(4), threads=None)
    except KeyboardInterrupt as stop:
        sys.exit(signals.exit_code(stop))
"""


def test_each_row_of_arguments_gives_its_value_in_order():
    assert in_processes(divmod, [7, 9, 11], [4, 4, 4], threads=None) == [(1, 3), (2, 1), (2, 3)]


def test_an_error_of_one_process_ends_all():
    began = time.monotonic()
    with pytest.raises(ZeroDivisionError):
        in_processes(divide_or_sleep, [0, 600], threads=None)
    assert time.monotonic() - began < 300


def divide_or_sleep(number):
    return 1 / number if not number else time.sleep(number)


@pytest.mark.parametrize(
    ("number", "to_all"), [("SIGINT", True), ("SIGINT", False), ("SIGTERM", False)]
)
def test_a_signal_ends_a_study_and_its_processes_without_a_traceback(tmp_path, number, to_all):
    """Ctrl-C reaches all of a terminal's processes; kill -INT PID the first of them alone."""
    program, seen = tmp_path / "study.py", tmp_path / "seen"
    program.write_text(STUDY)
    seen.mkdir()
    words = [sys.executable, str(program), str(seen)]
    how = {"stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen(words, **how) as process:
        while len(list(seen.iterdir())) < 2:
            assert process.poll() is None
            time.sleep(0.05)
        (os.killpg if to_all else os.kill)(process.pid, getattr(signal, number))
        said = process.communicate(timeout=120)[1]
    assert process.returncode == 128 + getattr(signal, number)
    assert "Traceback" not in said
    assert not any(Path("/proc", it.name).exists() for it in seen.iterdir())


def test_the_processes_of_a_study_that_is_killed_end_too(tmp_path):
    program, seen = tmp_path / "study.py", tmp_path / "seen"
    program.write_text(STUDY)
    seen.mkdir()
    words = [sys.executable, str(program), str(seen)]
    how = {"stderr": subprocess.PIPE, "start_new_session": True}
    with subprocess.Popen(words, **how) as process:
        try:
            while len(list(seen.iterdir())) < 2:
                assert process.poll() is None
                time.sleep(0.05)
            process.kill()
            process.communicate(timeout=60)  # until no process has its stderr any more
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

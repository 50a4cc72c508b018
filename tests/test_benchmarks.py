"""Every benchmark runs: in small, with --quick."""

import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
BENCHMARKS = {
    path.name: path
    for path in sorted(FOLDER.glob("*.py"))
    if '__name__ == "__main__"' in path.read_text("utf-8")
}
NEEDS = {"small_tables.py": "sklearn"}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_can_be_quick(name):
    assert "quick.parse(" in BENCHMARKS[name].read_text("utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_runs_with_the_library_as_it_is(name, tmp_path):
    """In less than a minute of CPU time each, of which most is compiling."""
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    words = [sys.executable, str(BENCHMARKS[name]), "--quick"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "FAILED" not in done.stdout
    assert done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == []

"""A run killed at any moment leaves no torn file, and goes on to the same bits."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from patience import HANGS

pytestmark = pytest.mark.kill
either = pytest.mark.parametrize("what", ["trainer", "run", "own text"])


def killed(*words):
    """How often a run was killed, each time to end as one that was left alone."""
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("killed.py"), *words],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=HANGS,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return int(done.stdout.split()[-1])


@either
@pytest.mark.parametrize("point", ["os.replace", "os.fsync", "torch.save", "save_file"])
def test_a_run_killed_inside_a_write_goes_on_to_the_same_bits(what, point, tmp_path):
    """Half-way through what the function writes, at one call of it after another."""
    assert killed(tmp_path, what, point) >= {"trainer": 2}.get(what, 4)


@either
def test_a_run_killed_at_random_moments_goes_on_to_the_same_bits(what, tmp_path):
    """SIGKILL again and again, until a run comes to its end between two of them."""
    assert killed(tmp_path, what, "random") >= 3

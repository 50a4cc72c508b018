"""A fit killed inside any of its writes leaves nothing torn, and goes on to the same bits."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from patience import HANGS


@pytest.mark.kill
@pytest.mark.parametrize("function", ["replace", "fsync"])
@pytest.mark.parametrize("what", ["data", "target"])
def test_a_fit_killed_inside_a_write_goes_on_to_the_same_bits(what, function, tmp_path):
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("killed_fit.py"), tmp_path, function, what],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=HANGS,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert int(done.stdout.split()[-1]) >= 5

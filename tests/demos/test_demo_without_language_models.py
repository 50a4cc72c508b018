"""Demonstrations without a language model do not import what language models need."""

import subprocess
import sys

import pytest

BLOCKED = """
import sys

class Broken:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "transformers":
            raise ImportError("broken")

sys.meta_path.insert(0, Broken())
from rkl.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("name", ["precision-recall", "neyman-scott", "xy"])
def test_a_broken_transformers_does_not_stop_a_demonstration_without_it(name, tmp_path):
    words = ["demo", name, "--device", "tpu", "--out", str(tmp_path / "run")]
    ended = subprocess.run(
        [sys.executable, "-c", BLOCKED, *words], capture_output=True, text=True, check=False
    )
    assert "device must be 'cpu'" in ended.stderr  # it came as far as the study
    assert "broken" not in ended.stderr

"""Demonstrations without a language model do not import what language models need."""

import subprocess
import sys

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


def test_a_broken_transformers_does_not_stop_the_demonstration_of_a_study(tmp_path):
    words = ["demo", "precision-recall", "--device", "tpu", "--out", str(tmp_path / "run")]
    ended = subprocess.run(
        [sys.executable, "-c", BLOCKED, *words], capture_output=True, text=True, check=False
    )
    assert "device must be 'cpu'" in ended.stderr  # it came as far as the study
    assert "broken" not in ended.stderr

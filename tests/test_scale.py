"""The calculation of docs/scale.md: by hand for one case, and the page against the script."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def scale() -> ModuleType:
    spec = importlib.util.spec_from_file_location("scale", ROOT / "benchmarks" / "scale.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["scale"] = module  # where dataclasses look for it
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        spec.loader.exec_module(module)
    return module


def test_the_page_has_the_tables_that_the_script_prints():
    words = [sys.executable, str(ROOT / "benchmarks" / "scale.py")]
    printed = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    for table in printed.strip().split("\n\n"):
        assert table in page


def test_a_step_by_hand(scale):
    """1,000 tokens of a GPU, 10 GPUs in one node, round numbers."""
    cluster = scale.Cluster(gpus=10, node=10, peak=1e12, utilisation=0.5, within=1e9)
    student = scale.Model(1e6 + 2e3, 10, 100, 10, 1)  # two matrices of 10 x 100
    teacher = scale.Model(4e6 + 4e3, 10, 200, 10, 1)
    step = scale.step(teacher, student, cluster, 1000, "live teacher")
    assert step.seconds["student"][0] == pytest.approx(8 * 1e6 * 1000 / 5e11)
    assert step.seconds["teacher"][0] == pytest.approx(2 * 4e6 * 1000 / 5e11)
    products = 2 * 1000 * 10 * (3 * 100 + 200)
    assert step.seconds["loss"][0] == pytest.approx(1.25 * products / 5e11)
    assert step.seconds["student"][1] == pytest.approx(3 * 2 * 1.002e6 * 0.9 / 1e9)
    assert step.memory["student"] == pytest.approx(16 * 1.002e6 / 10)
    assert step.whole == pytest.approx(sum(max(pair) for pair in step.seconds.values()))


@pytest.mark.parametrize("way", ["cache of the top 64", "cache of 50 draws"])
def test_a_teacher_that_is_not_here_takes_neither_memory_nor_time(scale, way):
    models = scale.MODELS["qwen2.5-72b"], scale.MODELS["qwen3-8b"]
    step = scale.step(*models, scale.Cluster(), 16_384, way)
    assert "teacher" not in step.seconds
    assert not any("teacher" in name for name in step.memory)


def test_a_token_of_a_cache_takes_what_a_cache_stores(scale):
    import torch

    import rkl
    from rkl.distill.teachers.cache import parse_keep, stored_tensors

    teacher = scale.Model(1e9, 10, 128, 256, 1)
    told = rkl.LinearHead(torch.randn(3, 128), torch.randn(256, 128))
    ways = {
        "hidden": ("cache of hidden states", "bfloat16"),
        "top-k=64": ("cache of the top 64", None),
        "sampled=50": ("cache of 50 draws", None),
    }
    for keep, (way, stored) in ways.items():
        tensors = stored_tensors(told, parse_keep(keep), stored, torch.Generator().manual_seed(0))
        size = sum(it.nbytes for it in tensors.values()) / 3
        assert size == scale.known_bytes(teacher, way)


def test_what_does_not_fit_is_said(scale):
    models = scale.MODELS["qwen2.5-72b"], scale.MODELS["qwen3-8b"]
    table = scale.ways_table(*models, scale.Cluster(memory=24e9), 16_384)
    live, hidden = table[2], table[3]
    assert "does not fit" in live
    assert "does not fit" not in hidden

"""Digests of files and values: right, remembered no longer than a file stays as it is."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from rkl.runs import integrity
from rkl.runs.integrity import check_inputs, first_not_finite, hub_name, sha256_of, values_of


@pytest.fixture
def memory(tmp_path, monkeypatch):
    """The file of remembered digests, in a folder of its own; every file counts as large."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(integrity, "REMEMBERED_FROM", 1)
    return tmp_path / "cache" / "rkl" / "digests.json"


def old(path, data):
    path.write_bytes(data)
    os.utime(path, ns=(10**18, 10**18))
    return path


@pytest.mark.parametrize("size", [0, 1, 2**20 - 1, 2**20, 2**20 + 1, 3 * 2**20])
def test_a_digest_is_that_of_hashlib(tmp_path, size):
    data = bytes(range(256)) * (size // 256 + 1)
    (tmp_path / "file").write_bytes(data[:size])
    assert sha256_of(tmp_path / "file") == hashlib.sha256(data[:size]).hexdigest()


def test_a_large_file_is_read_once_and_again_when_it_changed(tmp_path, memory):
    file = old(tmp_path / "file", b"one")
    first = sha256_of(file)
    kept = json.loads(memory.read_text("utf-8"))
    kept[str(file.resolve())][4] = "remembered"
    memory.write_text(json.dumps(kept), encoding="utf-8")
    assert sha256_of(file) == "remembered"
    assert sha256_of(file, remembered=False) == first
    old(file, b"two")  # of the same size and time, but another change
    assert sha256_of(file) == hashlib.sha256(b"two").hexdigest()


def test_a_file_that_just_changed_is_not_remembered(tmp_path, memory):
    (tmp_path / "file").write_bytes(b"now")
    sha256_of(tmp_path / "file")
    assert not memory.exists()


@pytest.mark.parametrize("content", ["", "[]", "{", '{"x": 1}', '{"x": [1]}', "null"])
def test_a_spoilt_memory_is_made_anew(tmp_path, memory, content):
    memory.parent.mkdir(parents=True)
    memory.write_text(content, encoding="utf-8")
    file = old(tmp_path / "file", b"one")
    assert sha256_of(file) == hashlib.sha256(b"one").hexdigest()
    assert str(file.resolve()) in json.loads(memory.read_text("utf-8"))


def test_no_place_for_the_memory_is_no_obstacle(tmp_path, memory, monkeypatch):
    (tmp_path / "taken").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "taken"))
    assert sha256_of(old(tmp_path / "file", b"one")) == hashlib.sha256(b"one").hexdigest()


def test_values_are_told_apart_by_content_alone(tmp_path):
    (tmp_path / "a").write_bytes(b"")
    array = np.arange(6.0)
    same = {values_of(tmp_path / "a", [it])["sha256"] for it in (array, torch.from_numpy(array))}
    assert len(same) == 1
    same |= {values_of(None, [array.astype(">f8")])["sha256"]}
    assert len(same) == 1
    others = (
        [array.reshape(2, 3)],
        [array[:3], array[3:]],
        [array.astype("f4")],
        ["ab"],
        ["a", "b"],
    )
    assert len({values_of(None, it)["sha256"] for it in others} | same) == len(others) + 1


def test_the_first_tensor_that_is_not_finite_is_found_in_every_precision():
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e5m2):
        good = torch.tensor([1.0, 57344.0]).to(dtype)
        assert first_not_finite([("a", good), ("n", torch.tensor([3]))]) is None
        for bad in (torch.nan, torch.inf, -torch.inf):
            spoilt = torch.tensor([1.0, bad]).to(dtype)
            assert first_not_finite([("a", good), ("b", spoilt)]) == "b"


def test_digests_that_begin_alike_are_shown_whole():
    was, now = ({"sha256": "a" * 63 + it, "size": 1, "path": None} for it in "bc")
    with pytest.raises(ValueError, match=r"resume: .*a{63}b .*a{63}c"):
        check_inputs("RUN", {"data": was}, {"data": now})


def test_a_name_on_the_hub_can_be_said_where_a_folder_has_it(tmp_path, monkeypatch):
    (tmp_path / "Qwen").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="hub:Qwen/Qwen3"):
        hub_name("teacher", "Qwen/Qwen3")
    assert hub_name("teacher", "hub:Qwen/Qwen3") == "Qwen/Qwen3"
    assert hub_name("teacher", "gpt2") == "gpt2"
    with pytest.raises(ValueError, match="hub: must be followed by"):
        hub_name("teacher", f"hub:{Path.cwd()}")

"""A flipped bit in any file that rkl wrote is named, on loading, on resuming and by --verify."""

import shutil

import numpy as np
import pytest

import rkl
from rkl.cli import main
from rkl.fit.run import fit
from rkl.fit.settings import FitSettings
from rkl.runs import Run

SETTINGS = {"flow": "coupling(transforms=1, hidden=(4,))", "batch": 32, "steps": 2}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of x.npy and of the run fitted to it, which tests only copy."""
    path = tmp_path_factory.mktemp("verify")
    np.save(path / "x.npy", np.random.default_rng(0).normal(size=(60, 2)))
    fit(FitSettings(path / "x.npy", **SETTINGS), path / "run")
    return path


@pytest.fixture
def copied(finished, tmp_path):
    shutil.copytree(finished / "run", tmp_path / "run")
    return tmp_path / "run"


def flip(path, bit=4):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= bit
    path.write_bytes(data)


def names(run):
    return [name for name in Run.open(run).files if name != "run.json"]


def test_every_file_of_a_finished_run_has_its_digest(finished):
    files = Run.open(finished / "run").files
    assert {"metrics.jsonl", "flow.safetensors", "checkpoint.safetensors"} <= files.keys()
    for name in names(finished / "run"):
        assert len(files[name]["sha256"]) == 64
        assert files[name]["size"] == (finished / "run" / name).stat().st_size


def test_a_flipped_bit_in_any_file_is_named_by_verify_and_by_resume(finished, copied):
    assert Run.open(copied).verify().files == len(names(copied))
    for name in names(copied):
        whole = (copied / name).read_bytes()
        flip(copied / name)
        with pytest.raises(ValueError, match=rf"{name}: sha256 was \w+ .* and is \w+"):
            Run.open(copied).verify()
        with pytest.raises(ValueError, match=rf"{name}: sha256 was"):
            rkl.load(copied, verify=True)
        with pytest.raises(ValueError, match=rf"{name}.* sha256"):
            fit(FitSettings(finished / "x.npy", **SETTINGS), copied, resume=True)
        (copied / name).write_bytes(whole)


def test_weights_with_a_flipped_bit_are_not_loaded(copied, capsys):
    flip(copied / "flow.safetensors")
    with pytest.raises(ValueError, match=r"flow\.safetensors: sha256 was"):
        rkl.load(copied)
    assert main(["sample", str(copied), "--out", str(copied.parent / "s.npy")]) == 2
    assert "flow.safetensors: sha256 was" in capsys.readouterr().err
    assert not (copied.parent / "s.npy").exists()


def test_verify_says_how_much_it_read(copied, capsys):
    out = str(copied.parent / "s.npy")
    assert main(["sample", str(copied), "-n", "5", "--out", out, "--verify"]) == 0
    size = sum((copied / name).stat().st_size for name in names(copied))
    assert f"Verified {len(names(copied))} files, {size:,} bytes" in capsys.readouterr().err


def test_verify_names_a_file_that_is_gone(copied):
    (copied / "metrics.jsonl").unlink()
    with pytest.raises(ValueError, match="metrics.jsonl is gone"):
        Run.open(copied).verify()


def test_verify_without_a_run_to_go_on_with_is_refused(finished, tmp_path, capsys):
    words = ["fit", "--data", str(finished / "x.npy"), "--out", str(tmp_path / "new"), "--verify"]
    assert main(words) == 2
    assert "verify goes with --resume" in capsys.readouterr().err


def test_a_run_from_before_digests_still_opens(copied, capsys):
    run = Run.open(copied)
    run.update(files=None)
    run.update(**{"files": {name: {"sha256": None, "size": None} for name in run.files}})
    out = str(copied.parent / "s.npy")
    assert main(["sample", str(copied), "-n", "5", "--out", out, "--verify"]) == 0
    assert "There is no digest of" in capsys.readouterr().err

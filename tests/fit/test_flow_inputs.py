"""A fit goes on only with the rows, labels and conditions that it was begun with."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import rkl
from rkl.cli import main
from rkl.fit.run import fit
from rkl.fit.samples import sample_run
from rkl.fit.settings import FitSettings, SampleSettings
from rkl.flows.training import load_state, save_state
from rkl.runs import Run
from rkl.sample.run import fit_target
from rkl.sample.settings import TargetSettings

SMALL = {"flow": "coupling(transforms=1, hidden=(4,))", "batch": 32, "steps": 2}


def rows():
    return np.random.default_rng(0).normal(size=(60, 2))


def test_other_labels_are_refused_by_a_run_that_is_resumed(tmp_path):
    np.save(tmp_path / "x.npy", rows())
    labels = np.arange(60) % 2
    np.save(tmp_path / "y.npy", labels)
    settings = FitSettings(tmp_path / "x.npy", labels=str(tmp_path / "y.npy"), **SMALL)
    fit(settings, tmp_path / "run")
    np.save(tmp_path / "y.npy", 1 - labels)
    with pytest.raises(ValueError, match=r"resume: .*: labels \(.*y\.npy\): sha256 was"):
        fit(settings, tmp_path / "run", resume=True)


def test_the_same_rows_and_labels_may_come_from_other_files(tmp_path, monkeypatch):
    np.save(tmp_path / "x.npy", rows())
    np.save(tmp_path / "y.npy", np.arange(60) % 2)
    monkeypatch.chdir(tmp_path)
    fit(FitSettings(Path("x.npy"), labels="y.npy", **SMALL), tmp_path / "run")
    assert Run.open(tmp_path / "run").settings["labels"] == str(tmp_path / "y.npy")
    (tmp_path / "moved").mkdir()
    for name in ("x.npy", "y.npy"):
        shutil.move(tmp_path / name, tmp_path / "moved" / name)
    labels = str(tmp_path / "moved" / "y.npy")
    fit(FitSettings(tmp_path / "moved" / "x.npy", labels=labels, **SMALL), "run", resume=True)
    assert Run.open(tmp_path / "run").settings["labels"] == labels


def test_other_conditions_are_refused_by_a_run_that_is_resumed(tmp_path):
    x = np.random.default_rng(0).uniform(-3, 3, size=(50, 4)).astype("f4")
    np.savez(tmp_path / "d.npz", x=x, condition=np.full((50, 1), 0.9, "f4"))
    settings = TargetSettings("xy(side=2)", data=tmp_path / "d.npz", batch=32, strata=2, steps=2)
    fit_target(settings, tmp_path / "run")
    np.savez(tmp_path / "d.npz", x=x, condition=np.full((50, 1), 1.1, "f4"))
    with pytest.raises(ValueError, match=r"resume: .*: conditions of data \(.*d\.npz\): sha256"):
        fit_target(settings, tmp_path / "run", resume=True)


def test_a_flipped_bit_of_a_state_is_found(tmp_path):
    file = tmp_path / "state.safetensors"
    save_state(file, {"flow": {"a": torch.ones(3), "b": torch.arange(4)}, "n": 1})
    assert load_state(file)["flow"]["b"].tolist() == [0, 1, 2, 3]
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"state\.safetensors .*sha256"):
        load_state(file)


@pytest.mark.parametrize("part", ["flow", "critic"])
def test_a_flow_or_critic_that_is_not_finite_is_refused(tmp_path, part):
    np.save(tmp_path / "x.npy", rows())
    fit(FitSettings(tmp_path / "x.npy", critic=True, **SMALL), tmp_path / "run")
    file = tmp_path / "run" / "flow.safetensors"
    state = load_state(file)
    spoilt = next(it for it in state[part] if it.endswith("weight"))
    state[part][spoilt].view(-1)[0] = torch.nan
    save_state(file, state)
    Run.open(tmp_path / "run").measure_files(["flow.safetensors"])
    with pytest.raises(
        ValueError, match=rf"{part}: .*flow\.safetensors holds weights that are NaN"
    ):
        rkl.load(tmp_path / "run")


def test_samples_that_are_not_finite_are_counted_and_not_written(tmp_path, monkeypatch, capsys):
    np.save(tmp_path / "x.npy", rows())
    fit(FitSettings(tmp_path / "x.npy", **SMALL), tmp_path / "run")

    def spoilt(law, temperature, bound):
        values = torch.zeros(10, 2)
        values[3, 1], values[5] = torch.inf, torch.nan
        law.sample = lambda shape: values
        return law

    monkeypatch.setattr("rkl.fit.samples.latent", spoilt)
    settings = SampleSettings(n=10, out=tmp_path / "s.npy")
    with pytest.raises(FloatingPointError, match="2 of 10 samples are NaN or infinite"):
        sample_run(tmp_path / "run", settings)
    assert main(["sample", str(tmp_path / "run"), "-n", "10", "--out", str(settings.out)]) == 1
    assert "2 of 10 samples" in capsys.readouterr().err
    assert not settings.out.exists()


def test_rows_bin_that_is_torn_is_refused(tmp_path):
    np.save(tmp_path / "x.npy", rows())
    fit(FitSettings(tmp_path / "x.npy", **SMALL), tmp_path / "run")
    assert json.loads((tmp_path / "run" / "run.json").read_text("utf-8"))["inputs"]["data"]
    (tmp_path / "run" / "rows.bin").write_bytes(b"abc")
    with pytest.raises(ValueError, match=r"rows\.bin is damaged.*3 bytes"):
        Run.open(tmp_path / "run").count_seen([b"row"])

"""A fit from the command line is a run that resumes, loads, samples and is measured."""

import json

import numpy as np
import pytest
import torch

import rkl
from rkl.cli import main
from rkl.flows import load_critic
from rkl.flows.run import FitSettings, SampleSettings, estimate, fit, sample_run
from rkl.runs import Run

FLOW = "coupling(transforms=2, hidden=(8,))"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With data.npy, labelled.npz, and two runs fitted to them."""
    path = tmp_path_factory.mktemp("fits")
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(300, 2)) * [3.0, 0.1] + [10.0, 0.0]
    np.save(path / "data.npy", rows)
    labels = np.arange(300) % 2
    np.savez(path / "labelled.npz", data=rows + 50 * labels[:, None], labels=labels)
    small = ["--flow", FLOW, "--batch", "64", "--steps", "40"]
    words = ["fit", "--data", str(path / "data.npy"), *small]
    words += ["--divergence", "precision-half(lam=3)"]
    assert main([*words, "--out", str(path / "plain")]) == 0
    words = ["fit", "--data", str(path / "labelled.npz"), *small, "--steps", "200", "--lr", "0.02"]
    assert main([*words, "--out", str(path / "classes")]) == 0
    return path


def test_a_run_gives_its_flow_back_in_the_users_units(folder):
    flow = rkl.load(folder / "plain")
    rows = torch.from_numpy(np.load(folder / "data.npy"))
    assert flow().log_prob(rows).mean().item() == pytest.approx(-1.63, abs=0.3)
    assert load_critic(folder / "plain")(rows).shape == (300,)
    record = Run.open(folder / "plain").record
    assert (record["kind"], record["status"], record["result"]["steps"]) == (
        "flows",
        "finished",
        40,
    )


def test_samples_are_written_and_the_same_for_the_same_seed(folder, capsys):
    for name in ("one.npy", "two.npy"):
        words = ["sample", str(folder / "plain"), "-n", "500", "--out", str(folder / name)]
        assert main([*words, "--seed", "3"]) == 0
    one, two = (np.load(folder / name) for name in ("one.npy", "two.npy"))
    assert one.shape == (500, 2)
    assert one.mean(0)[0] == pytest.approx(10.0, abs=1.0)
    assert np.array_equal(one, two)
    assert "500 samples" in capsys.readouterr().out


def test_a_class_is_drawn_by_its_name(folder):
    for name, centre in (("0", 10.0), ("1", 60.0)):
        sample_run(
            folder / "classes", SampleSettings(n=300, out=folder / "class.npy", condition=name)
        )
        assert np.load(folder / "class.npy")[:, 0].mean() == pytest.approx(centre, abs=15)


def test_rejection_keeps_to_its_budget_and_cooled_latents_to_the_middle(folder):
    said = sample_run(folder / "plain", SampleSettings(n=200, out=folder / "kept.npy", budget=1.1))
    assert "draws each" in said
    spread = {}
    for temperature in (1.0, 0.5):
        settings = SampleSettings(n=2000, out=folder / "t.npy", latent_temperature=temperature)
        sample_run(folder / "plain", settings)
        spread[temperature] = np.load(folder / "t.npy")[:, 0].std()
    assert spread[0.5] < 0.7 * spread[1.0]


def test_an_evaluation_counts_the_rows_that_were_trained_on(folder, capsys):
    assert main(["evaluate", str(folder / "plain"), "--data", str(folder / "data.npy")]) == 0
    said = capsys.readouterr().out
    assert "270 of the rows were fitted" in said
    assert main(["compare", str(folder / "plain"), str(folder / "classes")]) == 0
    assert "precision-half(lam=3)" in capsys.readouterr().out


def test_a_run_killed_between_two_steps_goes_on_to_the_same_bits(folder, monkeypatch):
    settings = FitSettings(folder / "data.npy", flow=FLOW, batch=64, steps=60, divergence="kl")
    fit(settings, folder / "whole")
    from rkl.flows.fit import _Problem

    original, calls = _Problem.objective, []

    def objective(self, moment):
        calls.append(moment.step)
        if len(calls) == 40:
            raise KeyboardInterrupt
        return original(self, moment)

    monkeypatch.setattr(_Problem, "objective", objective)
    with pytest.raises(KeyboardInterrupt):
        fit(settings, folder / "cut")
    assert Run.open(folder / "cut").record["status"] == "interrupted"
    fit(settings, folder / "cut", resume=True)
    assert calls[40] == 25  # it went on from the checkpoint
    weights = [(folder / name / "flow.safetensors").read_bytes() for name in ("whole", "cut")]
    assert weights[0] == weights[1]


def test_a_dry_run_foretells_and_writes_nothing(folder):
    settings = FitSettings(folder / "data.npy", flow=FLOW, batch=64, divergence="js", minutes=5.0)
    said = estimate(settings)
    assert "300 rows of shape [2]" in said
    assert "estimator: data" in said
    assert "in 5 minutes" in said


def refused(capsys, *words):
    assert main([str(word) for word in words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("rkl: error: ")
    assert said.count("\n") == 1
    return said


def test_what_cannot_be_done_is_one_line_and_writes_nothing(folder, capsys):
    data, out = folder / "data.npy", folder / "nothing"
    begin = ["fit", "--data", data, "--out", out]
    assert "f-divergence" in refused(capsys, *begin, "--divergence", "akl")
    assert "none is called 'nfs'" in refused(capsys, *begin, "--flow", "nfs")
    assert "no file" in refused(capsys, "fit", "--data", folder / "no.npy", "--out", out)
    assert "lam must be" in refused(capsys, *begin, "--divergence", "precision-recall(lam=0)")
    assert "steps and minutes" in refused(capsys, *begin, "--steps", "5", "--minutes", "1")
    assert not out.exists()
    draw = ["sample", folder / "classes"]
    assert "condition must be one of 0, 1" in refused(capsys, *draw)
    named = [*draw, "--condition", "0"]
    assert "has no critic" in refused(capsys, *named, "--budget", "2")
    assert "n must be at least 1" in refused(capsys, *named, "-n", "0")
    assert "must end in .npy" in refused(capsys, *named, "--out", folder / "samples.txt")
    cooled = ["sample", folder / "plain", "--budget", "2", "--latent-temperature", "0.5"]
    assert "own latents" in refused(capsys, *cooled)


def test_other_data_are_refused_by_a_run_that_is_resumed(folder):
    rows = np.load(folder / "data.npy")
    np.save(folder / "changing.npy", rows)
    settings = FitSettings(folder / "changing.npy", flow=FLOW, batch=64, steps=2)
    fit(settings, folder / "changed")
    np.save(folder / "changing.npy", rows + 1)
    with pytest.raises(ValueError, match="not those that"):
        fit(settings, folder / "changed", resume=True)
    assert json.loads((folder / "changed" / "run.json").read_text())["data"]["rows"] == 300

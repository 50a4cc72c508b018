"""The operating point that a fit was asked for is that of its samples, and a fit can be saved."""

import json
import math
import re

import numpy as np
import pytest
import torch

import rkl
from rkl.cli import main
from rkl.fit import Method, fit_to_samples
from rkl.fit.load import load_critic, load_point
from rkl.fit.settings import FitSettings
from rkl.flows import Coupling, Critic
from rkl.runs import Run

FLOW = "coupling(transforms=2,hidden=(8,))"


@pytest.fixture(scope="module")
def crossed(tmp_path_factory):
    """Points on two crossing lines in a file, and a run of them with rejection at two draws."""
    path = tmp_path_factory.mktemp("points")
    along, across = np.random.default_rng(0).normal(size=(2, 1300))  # more than begin as a mixture
    rows = np.stack([along, 0.15 * across + np.abs(along)], 1)
    rows[::2, 1] *= -1
    np.save(path / "data.npy", rows)
    words = ["fit", "--data", path / "data.npy", "--flow", FLOW, "--steps", "60", "--budget", "2"]
    assert main([*map(str, words), "--out", str(path / "run")]) == 0
    return path


def sampled(crossed, *words):
    out = crossed / "samples.npy"
    words = ["sample", crossed / "run", "-n", "3000", "--out", out, "--overwrite", *words]
    assert main([str(it) for it in words]) == 0
    return torch.from_numpy(np.load(out))


def test_samples_of_a_run_are_at_the_point_that_its_fit_was_asked_for(crossed, capsys):
    kept = sampled(crossed)
    said = capsys.readouterr().out
    assert "draws each, at the operating point of the fit" in said
    cost = float(said.split("npy, ")[1].split()[0])
    assert cost == pytest.approx(2.0, rel=0.1)  # the constant was fitted on 20,000 other draws
    plain = sampled(crossed, "--budget", "1")
    critic = load_critic(crossed / "run")
    with torch.no_grad():
        assert critic(kept).mean() > critic(plain).mean() + 0.1


def test_cooled_latents_are_not_rejected(crossed, capsys):
    sampled(crossed, "--latent-temperature", "0.5")
    assert "operating point" not in capsys.readouterr().out


def test_a_precision_that_no_budget_was_judged_to_have_is_refused(crossed, capsys):
    words = ["sample", crossed / "run", "--target-precision", "0.999", "--out", crossed / "no.npy"]
    assert main([str(it) for it in words]) == 2
    assert "was judged at no budget of the fit; the best was at most" in capsys.readouterr().err
    assert not (crossed / "no.npy").exists()


def test_what_is_evaluated_is_at_the_point_too(crossed, capsys):
    words = ["evaluate", crossed / "run", "--data", crossed / "data.npy"]
    assert main([str(it) for it in words]) == 0
    assert "Samples are at the operating point of the fit" in capsys.readouterr().out


def test_the_record_calls_the_bound_a_bound(crossed):
    result = Run.open(crossed / "run").record["result"]
    assert result["precision_at_most"]["value"] <= 1
    assert result["asked"] is None
    assert result["kept_step"] <= 60
    assert math.exp(load_point(crossed / "run").log_lam) > 0


def test_a_dry_run_counts_the_critics(crossed, capsys):
    words = ["fit", "--data", crossed / "data.npy", "--flow", FLOW, "--steps", "60", "--dry-run"]
    words += ["--out", crossed / "no"]
    assert main([*map(str, words), "--target-precision", "0.9"]) == 0
    assert "then two critics: 300 and up to" in capsys.readouterr().out
    assert main([str(it) for it in words]) == 0
    assert "critic" not in capsys.readouterr().out


def test_minutes_are_those_of_flow_and_critics_together(crossed, capsys):
    words = [
        "fit",
        "--data",
        crossed / "data.npy",
        "--flow",
        FLOW,
        "--minutes",
        "0.1",
        "--dry-run",
    ]
    words += ["--out", crossed / "no", "--target-precision", "0.9"]
    assert main([str(it) for it in words]) == 0
    out = capsys.readouterr().out
    assert re.search(r"about [\d,]+ steps in 0.05 minutes\n", out)
    assert "in up to 0.05 minutes: up to 0.1 minutes in all" in out
    assert FitSettings(crossed / "data.npy", critic=True).share_of_steps == 0.75
    assert FitSettings(crossed / "data.npy").share_of_steps == 1


def test_a_fit_that_has_spent_its_minutes_with_critics_is_finished(crossed, capsys):
    words = ["fit", "--data", crossed / "data.npy", "--flow", FLOW, "--minutes", "0.01"]
    words += ["--out", crossed / "timed", "--critic"]
    assert main([str(it) for it in words]) == 0
    steps = Run.open(crossed / "timed").record["result"]["steps"]
    assert main([str(it) for it in [*words, "--resume"]]) == 0
    assert Run.open(crossed / "timed").record["result"]["steps"] == steps


# Saving


def test_a_flow_fitted_in_python_is_saved_and_loaded(tmp_path, capsys):
    torch.manual_seed(0)
    rows = torch.cat([torch.randn(80, 2), torch.randn(80, 2) + 4])
    labels = ["a"] * 80 + ["b"] * 80
    fitted = fit_to_samples(
        Coupling(2, (8,)), rows, labels=labels, steps=30, with_critic=True,
        method=Method(critic=Critic(hidden=(16,))),
    )  # fmt: skip
    fitted.save(tmp_path / "run")
    flow = rkl.load(tmp_path / "run")
    condition = torch.eye(2)
    value = torch.randn(2, 2)
    torch.testing.assert_close(
        flow(condition).log_prob(value), fitted.flow(condition).log_prob(value)
    )
    critic = load_critic(tmp_path / "run")
    torch.testing.assert_close(critic(value, condition), fitted.critic(value, condition))
    record = Run.open(tmp_path / "run").record
    assert record["status"] == "finished"
    assert json.dumps(record["result"]["held_out"])
    words = ["sample", tmp_path / "run", "--condition", "b", "--out", tmp_path / "x.npy"]
    assert main([str(it) for it in words]) == 0
    with pytest.raises(FileExistsError):
        rkl.save(fitted, tmp_path / "run")


def test_what_cannot_be_saved_is_refused_with_the_reason(tmp_path):
    built = Coupling(2, (8,)).build((2,))
    fitted = fit_to_samples(built, torch.randn(60, 2), steps=2)
    with pytest.raises(ValueError, match="handed over as a module, which nothing can build again"):
        fitted.save(tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(TypeError, match="made must be what a fit returned"):
        rkl.save(3, tmp_path / "run")

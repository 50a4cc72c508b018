"""The first hour with a posterior: what it says is so."""

import contextlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from hours import FOLDER, run_hour

from rkl import cli
from rkl.bayes import bayes_act

STORED = FOLDER / "air_conditioning.nc"
FAMILY = "gamma(concentration=alpha, rate=beta)"
ERRORS = 5  # Monte Carlo errors; 1 of 10^6 normal ones is farther off


@pytest.fixture(scope="module")
def hour(tmp_path_factory):
    """The names of the script, and what it printed."""
    return run_hour("estimate", tmp_path_factory.mktemp("estimate"))


@pytest.fixture(scope="module")
def exact():
    """Posterior means of alpha, beta, mu and sigma by quadrature in log mu and log sigma."""
    hours = torch.tensor([3, 5, 7, 18, 43, 85, 91, 98, 100, 130, 230, 487], dtype=torch.float64)
    log_mu = torch.linspace(2.0, 8.0, 600, dtype=torch.float64)[:, None]
    log_sigma = torch.linspace(2.0, 9.0, 700, dtype=torch.float64)
    alpha, beta = (2 * (log_mu - log_sigma)).exp(), (log_mu - 2 * log_sigma).exp()
    log_mass = len(hours) * (alpha * beta.log() - alpha.lgamma())
    log_mass = log_mass + (alpha - 1) * hours.log().sum() - beta * hours.sum()
    log_mass = log_mass - ((log_mu - np.log(100)) ** 2 + (log_sigma - np.log(100)) ** 2) / 2
    mass = log_mass.flatten().softmax(0).reshape(log_mass.shape)
    values = {"alpha": alpha, "beta": beta, "mu": log_mu.exp(), "sigma": log_sigma.exp()}
    return {name: (mass * value).sum().item() for name, value in values.items()}


def test_the_stored_posterior_is_small_and_of_these_hours(hour):
    names, _ = hour
    assert STORED.stat().st_size < 1e6
    observed = xr.open_dataset(STORED, group="observed_data", engine="h5netcdf")["hours"]
    np.testing.assert_array_equal(observed.values, names["HOURS"])


def test_the_act_is_that_of_the_posterior_without_draws(hour, exact):
    names, _ = hour
    act = names["estimate"].act  # under reverse KL the natural parameter is averaged
    for name in ("alpha", "beta"):
        error = act.error[name].item()
        assert abs(act[name].item() - exact[name]) < ERRORS * error
        assert error < 0.02 * exact[name]
    # under forward KL the mean parameter is, and the mean of a gamma distribution is one of them
    predictive = names["predictive"].act
    assert abs(predictive["mu"] - exact["mu"]) < ERRORS * predictive.error["mu"]


def test_averages_contradict_one_another_and_acts_do_not(hour):
    names, printed = hour
    average, act, renamed = names["average"], names["estimate"].act, names["renamed"].act
    assert average["mu"] - renamed["mu"] > 5 * renamed.error["mu"]
    assert average["alpha"] / average["beta"] == pytest.approx(renamed["mu"].item(), rel=1e-9)
    assert act.distribution.mean.item() == pytest.approx(renamed["mu"].item(), rel=1e-9)
    of_mu, of_ratio = re.findall(r"average of .*?([\d.]+) hours", printed)
    assert (of_mu, of_ratio) == (f"{average['mu']:.1f}", f"{renamed['mu']:.1f}")


def test_other_estimates_lose_and_have_two_modes(hour):
    names, _ = hour
    table = names["table"]
    excess = {row[0]: row[table.columns.index("excess reverse KL (nats)")] for row in table.rows}
    first = {name: cell[0] if isinstance(cell, tuple) else cell for name, cell in excess.items()}
    assert first["reverse KL"] == 0 < min(x for name, x in first.items() if name != "reverse KL")
    modes = [table.acts[name]["mu"].item() for name in first if name.startswith("MAP in")]
    assert len(modes) == 2
    assert abs(modes[0] - modes[1]) > 5


def test_only_the_act_and_its_region_do_not_move(hour):
    names, _ = hour
    act, region, *others = (row[1] for row in names["moved"].rows)
    assert max(act, region) < 1e-10
    assert len(others) == 3
    assert min(others) > 0.05


def test_the_range_of_the_joint_region_is_wider_than_the_interval(hour):
    region = hour[0]["region"]
    for name in ("mu", "sigma"):
        (low, high), (inner_low, inner_high) = region.ranges[name], region.intervals[name]
        assert low < inner_low < inner_high < high


def test_forward_kl_has_the_larger_spread(hour):
    names, _ = hour
    assert names["predictive"].act["sigma"] > 1.1 * names["renamed"].act["sigma"]


def test_the_sentence_has_as_many_digits_as_the_draws_support(hour):
    names, printed = hour
    assert names["sentence"] in printed
    value, error = names["renamed"].act["mu"], names["renamed"].act.error["mu"]
    assert f"failures is {value:.0f} hours" in names["sentence"]
    assert 0.5 < error < 1.5  # an hour, as the text says


def test_files_of_stan_give_the_same_act(hour):
    names, _ = hour
    for name in ("alpha", "beta"):
        torch.testing.assert_close(names["of_stan"].act[name], names["estimate"].act[name])


def test_the_diagnostics_are_good(hour):
    diagnostics = hour[0]["diagnostics"]
    assert diagnostics.ess > 400
    assert diagnostics.rhat < 1.01
    assert diagnostics.worst_k() < 0.5
    assert diagnostics.warnings == ()


@pytest.mark.slow
def test_the_command_gives_the_same_act_and_writes_a_page(hour, tmp_path):
    text = (FOLDER / "estimate.py").read_text("utf-8")
    command = re.search(r"# (rkl estimate [^`]*?)\n# ```", text)[1].replace("\\\n#", "")
    assert "air_conditioning.nc" in command
    arguments = ["estimate", str(STORED), "--family", FAMILY, "--prob", "0.9", "--out"]
    assert FAMILY in command
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        cli.main([*arguments, str(tmp_path / "failures")])
    lines = str(hour[0]["estimate"]).splitlines()
    assert [line for line in lines if line not in printed.getvalue().splitlines()] == []
    assert (tmp_path / "failures" / "report.html").exists()


@pytest.mark.tools
def test_the_posterior_is_sampled_again_with_pymc(tmp_path, hour):
    pytest.importorskip("pymc")
    text = (FOLDER / "estimate.py").read_text("utf-8")
    sampling = text.replace("SAMPLE = False", "SAMPLE = True")
    assert sampling != text
    script = tmp_path / "estimate.py"
    script.write_text(sampling, "utf-8")
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}  # PyTensor's, of a missing BLAS
    command = [sys.executable, str(script)]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=1200)
    again = bayes_act(tmp_path / "posterior.nc", FAMILY).act
    stored = hour[0]["estimate"].act
    for name in ("alpha", "beta"):
        error = torch.hypot(again.error[name], stored.error[name])
        assert abs(again[name] - stored[name]) < ERRORS * error
    assert Path(tmp_path / "posterior.nc").stat().st_size < 1e6

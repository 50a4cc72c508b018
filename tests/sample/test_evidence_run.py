"""``rkl evidence`` finds log Z without a flow, and its draws are read as data."""

import math

import torch

from rkl.cli import main
from rkl.sample.evidence_run import find_evidence
from rkl.sample.run import read_draws
from rkl.sample.targets import XY


def test_log_z_is_printed_with_its_error_and_draws_are_read_as_data(tmp_path, capsys):
    """Side 2 at T = 2: log Z is 4 log 2π + log Σ Iₙ(1)⁴, 7.86 by that series."""
    out = tmp_path / "draws.npz"
    words = ["evidence", "--target", "xy(side=2)", "--condition", "T=2", "--particles", "64"]
    assert main([*words, "--out", str(out)]) == 0
    told = capsys.readouterr().out
    assert "T = 2 J" in told
    assert "512 draws in" in told
    theta = torch.linspace(-math.pi, math.pi, 2_001, dtype=torch.float64)[:-1]
    n = torch.arange(-20, 21, dtype=torch.float64)
    waves = ((n[:, None] * theta).cos() * theta.cos().exp()).mean(1)
    exact = 4 * math.log(2 * math.pi) + waves.pow(4).sum().log().item()
    line = next(it for it in told.splitlines() if it.startswith("T = 2"))
    value = float(line.split()[-1].partition("(")[0])
    assert abs(value - exact) < 0.3  # its error is about 0.05
    x, condition = read_draws(out, XY(side=2))
    assert x.shape == (512, 4)
    assert (condition == 2).all()


def test_what_it_cannot_do_is_refused_before_anything_is_written(tmp_path, capsys):
    words = ["evidence", "--target", "xy(side=2)"]
    assert main([*words, "--condition", "T=0"]) == 2
    assert "T must be above 0" in capsys.readouterr().err
    assert main([*words, "--out", str(tmp_path / "x.csv")]) == 2
    assert "must end in .npz" in capsys.readouterr().err
    assert "log Z (nats)" in find_evidence("mog4", condition="scale=0.5", particles=32, islands=4)

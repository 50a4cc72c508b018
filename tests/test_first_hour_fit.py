"""The first hour with a table: what it says is so, by the exact density of its table."""

import contextlib
import io
import math
import re
import shlex

import pytest
import torch
from hours import FOLDER, run_hour

from rkl import cli
from rkl.metrics import pr_curve_sampled

pytestmark = pytest.mark.slow
DRAWS = 10_000  # the errors of exact precisions are below 0.005


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fit")


@pytest.fixture(scope="module")
def hour(folder):
    """The names of the script, and what it printed."""
    return run_hour("fit", folder)


@pytest.fixture(scope="module")
def log_ratio(hour):
    """The log-density of the table less that of a flow, at rows."""
    names, _ = hour
    centres, spreads = torch.tensor(names["CENTRES"]), torch.tensor(names["SPREADS"])
    shares = torch.tensor(names["SHARES"], dtype=torch.float64)

    def ratio(density, rows):
        squares = ((rows[:, None].double() - centres) / spreads).square().sum(-1)
        kinds = shares.log() - squares / 2 - spreads.log().sum() - math.log(2 * math.pi)
        return kinds.logsumexp(-1) - density.log_prob(rows).double()

    return ratio


@pytest.fixture(scope="module")
def exact(hour, log_ratio):
    """Exact precision at slope 10 and recall at slope 1/10 of each fit."""
    points = {}
    for name, fitted in hour[0]["fits"].items():
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(1)
            density = fitted.flow()
            ratio = log_ratio(density, density.sample((DRAWS,)))
        curve = pr_curve_sampled(log_ratio_q=ratio, slopes=torch.tensor([0.1, 10.0]))
        points[name] = curve.precision.value[1].item(), curve.recall.value[0].item()
    return points


def test_a_large_lam_buys_precision_with_recall(exact):
    (precision, recall), (at_10, recall_at_10) = exact["maximum likelihood"], exact["λ = 10"]
    assert at_10 > precision + 0.02
    assert recall_at_10 < recall - 0.005


def test_a_small_lam_does_not(exact):
    assert exact["λ = 0.3"][0] < exact["λ = 10"][0] - 0.02
    assert exact["λ = 0.3"][1] > exact["λ = 10"][1] + 0.005


def test_rejection_reaches_the_precision_that_was_set(hour, log_ratio):
    names, printed = hour
    reached, accepted = names["reached"], names["accepted"]
    assert f"{accepted.cost:.2f} draws for each accepted sample" in printed
    # both estimate the mean number of draws, one from the draws of 1,000 samples
    assert accepted.cost == pytest.approx(reached.point.budget, rel=0.15)
    density = names["density"]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(2)
        rows = density.sample((DRAWS,))
        log_weight = names["log_ratio"](rows).double() + math.log(reached.point.accept_lam)
        ratio = log_ratio(density, rows)
    keep = log_weight.exp().clamp(max=1)
    weight = keep / keep.mean()  # the density of accepted samples over the flow's
    precision = (weight * (ratio.exp() / weight).clamp(max=1)).mean().item()
    before = ratio.exp().clamp(max=1).mean().item()
    assert precision > max(0.8, before + 0.1)


def test_rejection_scores_best_and_the_gaussian_worst(hour):
    names, printed = hour
    score = {name: it.scores[names["PRECISION"]].value for name, it in names["scores"].items()}
    assert max(score, key=score.get) in ("with rejection", "copies")
    assert score["with rejection"] > score["λ = 10"] > score["maximum likelihood"]
    assert min(score, key=score.get) == "gaussian"
    rows = re.findall(r"^(\S.*?) +precision ([\d.]+) ± [\d.]+ +recall", printed, re.M)
    assert {name: float(value) for name, value in rows} == pytest.approx(
        {name: value.item() for name, value in score.items()}, abs=6e-4
    )


def test_copies_are_told_from_samples(hour):
    scores = hour[0]["scores"]
    for name, measured in scores.items():
        share, error = measured.scores["nearer to rows trained on"].pair()
        if name == "copies":
            assert share > 0.5 + 5 * error
        else:
            assert share < 0.5 + 4 * error


def test_the_flow_that_was_read_again_is_the_same(hour):
    assert hour[1].rstrip().endswith("True")


def test_the_commands_run_as_they_are_written(hour, folder, monkeypatch):
    text = (FOLDER / "fit.py").read_text("utf-8")
    commands = re.search(r"# ```sh\n(.*?)# ```", text, re.DOTALL)[1]
    monkeypatch.chdir(folder)
    for line in commands.splitlines():
        program, *arguments = shlex.split(line.removeprefix("# "))
        assert program == "rkl"
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            assert not cli.main(arguments)
    assert "nearer to rows trained on" in printed.getvalue()

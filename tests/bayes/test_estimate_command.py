"""``rkl estimate``: from a file of draws to a table, JSON and a run with a report."""

import argparse
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import xarray as xr

import rkl
from rkl.bayes import bayes_act, read_draws
from rkl.bayes.evaluate import evaluate_run
from rkl.bayes.report import Shown, posterior_figure
from rkl.bayes.settings import EstimateSettings, EvaluateSettings
from rkl.cli import main
from rkl.cli.settings import add_flags, gather
from rkl.runs import Run

FAMILY = "normal(loc=mu, scale=sigma)"


@pytest.fixture(scope="module")
def posterior(tmp_path_factory):
    """A file as ArviZ writes it, and its draws."""
    generator = np.random.default_rng(0)
    sigma = np.sqrt(8 / generator.gamma(6, size=(2, 200)))
    mu = generator.normal(2, sigma / 3)
    named = {"mu": mu, "sigma": sigma, "lp": -np.log(sigma)}
    file = tmp_path_factory.mktemp("posterior") / "posterior.nc"
    group = xr.Dataset({name: (("chain", "draw"), x) for name, x in named.items()})
    xr.DataTree.from_dict({"posterior": group}).to_netcdf(file, engine="h5netcdf")
    return file, named


def json_of(arguments, capsys):
    assert main(["estimate", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_value_is_that_of_the_posterior_mean_of_the_natural_parameter(posterior, capsys):
    file, drawn = posterior
    found = json_of([file, "--family", FAMILY], capsys)["estimate"]["act"]
    precision = (drawn["sigma"] ** -2).mean()
    assert found["sigma"]["value"] == pytest.approx(precision**-0.5, rel=1e-12)
    expected = (drawn["mu"] / drawn["sigma"] ** 2).mean() / precision
    assert found["mu"]["value"] == pytest.approx(expected, rel=1e-12)
    assert found["mu"]["error"] > 0


def test_the_divergence_and_the_probability_are_obeyed(posterior, capsys):
    file, drawn = posterior
    chosen = ["--divergence", "kl", "--prob", "0.5"]
    found = json_of([file, "--family", FAMILY, *chosen], capsys)
    assert found["estimate"]["divergence"] == "KL()"
    assert found["estimate"]["act"]["mu"]["value"] == pytest.approx(drawn["mu"].mean(), rel=1e-9)
    assert found["region"]["prob"] == 0.5
    low, high = found["region"]["ranges"]["sigma"]
    assert drawn["sigma"].min() < low < high < drawn["sigma"].max()


def test_the_intrinsic_loss_has_a_name(posterior, capsys):
    found = json_of([posterior[0], "--family", FAMILY, "--divergence", "intrinsic"], capsys)
    assert found["estimate"]["divergence"] == "Intrinsic()"


def test_a_run_is_written_loaded_and_reported(posterior, tmp_path, capsys):
    run = tmp_path / "run"
    settings = ["--family", FAMILY, "--log-posterior", "lp"]
    assert main(["estimate", str(posterior[0]), *settings, "--out", str(run)]) == 0
    printed = capsys.readouterr().out
    assert "posterior median" in printed
    assert "draw of highest lp" in printed
    again = rkl.load(run)
    kept = json.loads((run / "estimate.json").read_text("utf-8"))
    assert again.act["sigma"].item() == kept["estimate"]["act"]["sigma"]["value"]
    html = (run / "report.html").read_text("utf-8")
    assert "Excess reverse KL" in html
    assert html.count("<svg") == 6
    assert main(["report", str(run)]) == 0
    assert (run / "report.html").read_text("utf-8") == html


def test_a_report_is_made_of_what_the_run_kept(posterior, tmp_path, monkeypatch):
    estimates = [tmp_path / name for name in ("one", "two")]
    for run in estimates:
        assert main(["estimate", str(posterior[0]), "--family", FAMILY, "--out", str(run)]) == 0

    def computed(*_):
        raise AssertionError("estimated again")

    monkeypatch.setattr("rkl.bayes.run.bayes_act", computed)
    paths = [*map(str, estimates)]
    assert main(["compare", *paths, "--out", str(tmp_path / "both.html")]) == 0
    assert (tmp_path / "both.html").read_text("utf-8").count("posterior median") > 2
    (estimates[1] / "marginals.npz").write_bytes(b"torn")
    assert main(["report", *paths, "--out", str(tmp_path / "torn.html")]) == 2
    (estimates[1] / "report.json").unlink()
    assert main(["report", *paths, "--out", str(tmp_path / "torn.html")]) == 2
    assert not (tmp_path / "torn.html").exists()


def test_two_runs_are_compared_by_the_variables_and_not_by_their_aliases(
    posterior, tmp_path, capsys
):
    run = tmp_path / "run"
    assert main(["estimate", str(posterior[0]), "--family", FAMILY, "--out", str(run)]) == 0
    capsys.readouterr()
    assert main(["compare", str(run)]) == 0
    words = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line]
    assert words == ["Bayes", "parameter", "loss", "mu", "sigma"]


def test_a_run_is_judged_by_other_draws(posterior, tmp_path, capsys):
    file, drawn = posterior
    run, other = tmp_path / "run", tmp_path / "other.nc"
    assert main(["estimate", str(file), "--family", FAMILY, "--out", str(run)]) == 0
    shifted = {"mu": drawn["mu"] + 1, "sigma": drawn["sigma"]}
    named = {name: (("chain", "draw"), x) for name, x in shifted.items()}
    xr.Dataset(named).to_netcdf(other, engine="h5netcdf")
    capsys.readouterr()
    assert main(["evaluate", str(run), "--posterior", str(other)]) == 0
    printed = capsys.readouterr().out
    assert "ReverseKL()" not in printed
    said = {x.split()[0]: x.split() for x in printed.splitlines() if x}
    precision = (drawn["sigma"] ** -2).mean()  # the act's, so that a shift of 1 costs half of it
    shown, _, error = said["as"][-1].partition("(")
    assert float(shown) == pytest.approx(precision / 2, abs=0.1)
    assert error  # it has one, in brackets
    assert float(said["of"][-1]) == 0
    table = evaluate_run(run, EvaluateSettings(other))
    assert table.rows[0][-1][0] == pytest.approx(precision / 2, rel=1e-3)
    assert table.rows[1][-1] == (0, 0)
    assert table.columns[-1] == "excess reverse KL (nats)"
    assert "exceeds the least risk under these draws" in str(table)
    assert main(["evaluate", str(run)]) == 2
    assert "--posterior must be given" in capsys.readouterr().err


def test_what_is_not_finite_is_null_in_json(tmp_path, capsys):
    """JSON has no NaN and no Infinity, though Python writes and reads them."""
    generator = np.random.default_rng(1)  # the mean of sigma² has no normal error
    sigma = np.sqrt(1.5 / generator.gamma(1.5, size=(4, 250)))
    named = {"mu": generator.normal(size=(4, 250)), "sigma": sigma}
    drawn = xr.Dataset({name: (("chain", "draw"), x) for name, x in named.items()})
    drawn.to_netcdf(tmp_path / "draws.nc", engine="h5netcdf")
    words = [str(tmp_path / "draws.nc"), "--family", FAMILY, "--divergence", "kl"]
    words += ["--losses", "kl"]
    out = str(tmp_path / "run")
    assert main(["estimate", *words, "--json", "--out", out]) == 0
    printed = capsys.readouterr().out
    kept = (tmp_path / "run" / "estimate.json").read_text("utf-8")
    for text in (printed, kept):
        found = json.loads(text, parse_constant=pytest.fail)["estimate"]
        assert found["act"]["sigma"]["error"] is None
    assert main(["compare", out, out]) == 0


def test_the_losses_of_the_comparison_are_chosen(posterior, capsys):
    found = json_of(
        [posterior[0], "--family", FAMILY, "--losses", "squared-hellinger", "kl"], capsys
    )
    excess = [name for name in found["comparison"]["columns"] if name.startswith("excess")]
    assert excess == [
        "excess SquaredHellinger() (nats)",
        "excess forward KL (nats)",
        "excess reverse KL (nats)",
    ]


@pytest.mark.slow
def test_runs_under_two_divergences_are_compared(posterior, tmp_path, capsys):
    runs = [tmp_path / name for name in ("reverse-kl", "kl")]
    for run in runs:
        settings = ["--family", FAMILY, "--divergence", run.name, "--out", str(run)]
        assert main(["estimate", str(posterior[0]), *settings]) == 0
    assert main(["compare", *map(str, runs), "--out", str(tmp_path / "both.html")]) == 0
    printed = capsys.readouterr().out
    assert "ReverseKL()" in printed
    assert "KL()" in printed
    assert (tmp_path / "both.html").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--family", "normal(loc=mu, scale=tau)"], "tau"),
        (["--family", "gaussian(loc=mu)"], "gaussian"),
        (["--family", FAMILY, "--prob", "1.5"], "prob must be finite, above 0, below 1; got 1.5"),
        (["--family", FAMILY, "--divergence", "klx"], "klx"),
        (["--family", FAMILY, "--log-posterior", "density"], "density"),
        (["--family", FAMILY, "--device", "cuda"], "device must be cpu"),
        (["--family", FAMILY, "--design", "nowhere.npy"], "nowhere.npy"),
        ([], "--family"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line_and_leaves_nothing(
    posterior, tmp_path, words, said, capsys
):
    out = tmp_path / "run"
    assert main(["estimate", str(posterior[0]), *words, "--out", str(out)]) == 2
    complaint = capsys.readouterr().err
    assert said in complaint
    assert complaint.count("\n") == 1
    assert not out.exists()


def test_a_file_that_is_no_posterior_is_refused(tmp_path, capsys):
    file = tmp_path / "posterior.nc"
    file.write_bytes(b"not a file of draws")
    assert main(["estimate", str(file), "--family", FAMILY]) == 2
    assert str(file) in capsys.readouterr().err


def test_a_folder_in_use_is_refused_before_anything_is_computed(posterior, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    words = ["estimate", str(posterior[0]), "--family", FAMILY, "--out", str(tmp_path)]
    assert main(words) == 2
    assert "exists" in capsys.readouterr().err
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine.txt"]


def test_the_figure_has_a_panel_for_each_number(posterior):
    _, drawn = posterior
    estimate = bayes_act(drawn, FAMILY)
    assert len(posterior_figure(estimate).axes) == 2
    assert len(estimate.plot().axes) == 2


def test_another_posterior_in_the_place_of_the_runs_is_named(posterior, tmp_path, capsys):
    file = tmp_path / "posterior.nc"
    shutil.copy(posterior[0], file)
    words = ["estimate", str(file), "--family", FAMILY, "--out", str(tmp_path / "run")]
    assert main(words) == 0
    shutil.copy(posterior[0], file)  # a copy of the same is the same
    rkl.load(tmp_path / "run")
    other = xr.Dataset({it: (("chain", "draw"), 2 * x) for it, x in posterior[1].items()})
    xr.DataTree.from_dict({"posterior": other}).to_netcdf(tmp_path / "b.nc", engine="h5netcdf")
    shutil.copy(tmp_path / "b.nc", file)
    with pytest.raises(
        ValueError, match=r"posterior \(.*posterior\.nc\): posterior\.nc: sha256 was"
    ):
        rkl.load(tmp_path / "run")


def test_a_flipped_bit_in_any_file_of_an_estimate_is_named(posterior, tmp_path):
    words = ["estimate", str(posterior[0]), "--family", FAMILY, "--out", str(tmp_path / "run")]
    assert main(words) == 0
    run = Run.open(tmp_path / "run")
    listed = [name for name in run.files if name != "run.json"]
    assert {"estimate.json", "report.html"} <= {*listed}
    for name in listed:
        whole = (run.path / name).read_bytes()
        (run.path / name).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(ValueError, match=f"{name}: sha256 was"):
            run.verify()
        (run.path / name).write_bytes(whole)


def test_a_run_that_is_named_twice_is_compared_once(posterior, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["estimate", str(posterior[0]), "--family", FAMILY, "--losses", "kl", "--out", "run"]
    assert main(words) == 0
    assert main(["compare", "run", "./run", "--out", "both.html"]) == 0
    assert "The report: both.html" in capsys.readouterr().out


@pytest.mark.parametrize("suffix", [".nc", ".h5", ".hdf5"])
def test_several_files_that_hold_every_chain_each_are_refused_by_name(
    posterior, suffix, tmp_path, capsys
):
    file = tmp_path / f"draws{suffix}"
    shutil.copy(posterior[0], file)
    assert main(["estimate", str(file), "more.csv", "--family", FAMILY]) == 2
    said = capsys.readouterr().err
    assert "several files of draws must be tables, a chain in each" in said
    assert str(file) in said


def test_other_draws_replace_all_files_of_an_earlier_run(tmp_path):
    earlier = {"posterior": "1.csv", "further": ["2.csv", "3.csv"], "family": FAMILY}
    (tmp_path / "earlier.json").write_text(json.dumps(earlier))
    parser = argparse.ArgumentParser()
    add_flags(parser, EstimateSettings)
    config = ["--config", str(tmp_path / "earlier.json")]
    again, other = (parser.parse_args([*words, *config]) for words in ([], ["new.csv"]))
    assert len(gather(EstimateSettings, again).further) == 2
    assert gather(EstimateSettings, other).further == ()


def test_a_list_of_one_file_is_that_file(posterior):
    assert read_draws([posterior[0]]).chains == read_draws(posterior[0]).chains


def test_a_histogram_of_weighted_draws_counts_weights():
    """Of draws 0 and 1 of which the latter weighs three times as much, three quarters are 1."""
    x = np.tile(np.repeat([0.0, 1.0], 25), (2, 2))
    estimate = bayes_act({"mu": x}, "normal(loc=mu, scale=1)", weights=1 + 2 * x)
    result = Shown.of(estimate, estimate.region(), estimate.compare(losses=[rkl.ReverseKL()]))
    # systematic resampling takes each of the four runs of ones within one of its due number
    assert abs(result.marginals["mu"].mean() - 0.75) <= 4 / x.size


def test_an_estimate_imports_no_algebra(posterior):
    """torch.broadcast_shapes imports sympy, which takes longer than the estimate."""
    code = (
        "import sys; from rkl.bayes import bayes_act; e = bayes_act(sys.argv[1], sys.argv[2]); "
        "e.compare(losses=[e.divergence]); assert 'sympy' not in sys.modules"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(posterior[0]), FAMILY], check=True, timeout=300
    )

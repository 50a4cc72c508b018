"""A fit to a target from the command line resumes, loads, and gives exact draws."""

import json
import math
import re
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import xarray as xr

import rkl
from rkl.cli import main
from rkl.flows import Coupling
from rkl.runs import Run
from rkl.runs.typed import record_of
from rkl.sample import (
    CoarseToFine,
    EvaluateSettings,
    SampleSettings,
    compare_runs,
    evaluate_run,
    independent_metropolis,
    sample_run,
)
from rkl.sample.architecture import SPLINES, default_architecture
from rkl.sample.lattice import CheckerboardRealNVP, CoarseToFineField
from rkl.sample.run import fit_target, load_target_run, read_draws
from rkl.sample.settings import TargetSettings, parse_ranges
from rkl.sample.targets import XY, Phi4, parse_target

MODULE = """
import torch

def log_prob(x, condition):
    return -(x / condition).square().sum(-1) / 2

def far(x, condition):
    return -(x - 40).square().sum(-1) * 50
"""
XY4 = ["--flow", "coarse-to-fine(width=8)", "--batch", "128", "--target", "xy(side=4)"]
OWN = "my_law:log_prob(event_shape=(2,), conditions={'s': (1.0, 2.0)})"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With a module of one's own, and a run on the XY model."""
    path = tmp_path_factory.mktemp("targets")
    (path / "my_law.py").write_text(MODULE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(path))
        words = ["fit", *XY4, "--steps", "60", "--condition", "T=0.5:1.5"]
        assert main([*words, "--out", str(path / "xy")]) == 0
        yield path
    sys.modules.pop("my_law", None)


def test_a_run_records_what_was_fitted_and_gives_its_flow_back(folder):
    run = Run.open(folder / "xy")
    assert run.record["status"] == "finished"
    assert parse_target(run.settings["target"]) == XY(side=4)
    assert run.settings["flow"].startswith("CoarseToFine(coupling=1.0")
    x = rkl.load(folder / "xy")(torch.tensor([0.9])).sample((500,))
    assert x.shape == (500, 16)
    assert load_target_run(folder / "xy").ranges[0][:3] == ("T", 0.5, 1.5)


def test_chains_are_written_with_all_that_judges_them(folder, capsys):
    for name in ("chains.nc", "chains.npz", "chains.npy"):
        words = ["sample", str(folder / "xy"), "--condition", "T=0.9", "-n", "2000"]
        assert main([*words, "--out", str(folder / name), "--seed", "3"]) == 0
    assert "R-hat" in capsys.readouterr().out
    with np.load(folder / "chains.npz") as file:
        arrays = {name: file[name] for name in file}
    assert arrays["x"].shape == (4, 500, 16)
    np.testing.assert_allclose(arrays["log_ratio"], arrays["lp"] - arrays["log_q"], atol=1e-4)
    x, condition = torch.from_numpy(arrays["x"]), torch.tensor([0.9])
    log_p = XY(side=4).log_prob(x, condition.expand(4, 500, 1)).numpy()
    np.testing.assert_allclose(arrays["lp"], log_p, atol=1e-4)
    for group, names in (("posterior", ["x", "energy"]), ("sample_stats", ["accepted", "lp"])):
        with xr.open_dataset(folder / "chains.nc", group=group, engine="h5netcdf") as found:
            for name in names:
                np.testing.assert_array_equal(found[name].values, arrays[name])
            assert found.attrs["T"] == pytest.approx(0.9)
    assert np.array_equal(np.load(folder / "chains.npy"), arrays["x"].reshape(-1, 16))


def test_runs_of_targets_are_compared_with_acceptance_and_log_z(folder, tmp_path):
    shutil.copytree(folder / "xy", tmp_path / "a")
    evaluate_run(tmp_path / "a", EvaluateSettings(condition="T=0.9", draws=100))
    found = compare_runs([tmp_path / "a", folder / "xy"], tmp_path / "page.html")
    last = Run.open(folder / "xy").metrics[-1]
    heads, one = found.tables[0].columns, found.tables[0].rows[0]
    assert one[heads.index("acceptance")] == last["acceptance"]
    run, at, (value, error), *_ = found.tables[1].rows[0]
    assert (run, at) == (str(tmp_path / "a"), "T = 0.9")
    kept = json.loads((tmp_path / "a" / "evaluation.json").read_text("utf-8"))
    assert [value, error] == [kept["thermodynamics"]["log_z"][it][0] for it in ("value", "error")]
    assert len(found.tables[1].rows) == 1  # the other was not evaluated
    assert "log Z (nats)" in (tmp_path / "page.html").read_text("utf-8")


def test_the_worst_condition_is_named(folder, capsys):
    words = ["fit", *XY4, "--steps", "2", "--out", str(folder / "worst")]
    assert main(words) == 0
    assert re.search(r"Of 8 conditions T = \S+ J is the worst: share", capsys.readouterr().out)


def test_draws_are_those_of_independent_metropolis(folder):
    sample_run(
        folder / "xy",
        SampleSettings(n=400, out=folder / "a.npz", condition="T=1.2", chains=2, seed=5),
    )
    found, at = load_target_run(folder / "xy"), torch.tensor([1.2])
    chain = independent_metropolis(found.target, found.flow, at, draws=200, chains=2, seed=5)
    with np.load(folder / "a.npz") as file:
        assert np.array_equal(file["x"], chain.x.numpy())
        assert np.array_equal(file["accepted"], chain.accepted.numpy())


def test_a_condition_beyond_the_trained_range_warns(folder):
    with pytest.warns(UserWarning, match=r"T=1.9 is beyond .* 0.5 to 1.5"):
        sample_run(folder / "xy", SampleSettings(n=400, out=folder / "b.npy", condition="T=1.9"))


def test_draws_written_by_one_run_are_data_for_another(folder):
    sample_run(folder / "xy", SampleSettings(n=400, out=folder / "c.npz", condition="T=0.9"))
    words = ["fit", *XY4, "--steps", "2", "--data", str(folder / "c.npz"), "--strata", "4"]
    assert main([*words, "--out", str(folder / "data")]) == 0
    run = Run.open(folder / "data")
    assert run.record["data"]["rows"] == 400
    with np.load(folder / "c.npz") as file:
        rows = [row.tobytes() for row in file["x"].reshape(-1, 16)]
    assert run.count_seen(rows) == 400
    assert run.metrics[-1].keys() >= {"nll", "ess"}  # both terms of the default objective


def test_a_function_of_ones_own_is_fitted_and_drawn_from(folder, monkeypatch):
    """The standard deviation of 4,000 draws has an error of 0.05 at most: 5 of them."""
    words = ["fit", "--target", OWN, "--divergence", "reverse-kl", "--lr", "0.01"]
    words += ["--flow", "coupling(transforms=2, hidden=(16,))", "--batch", "256", "--steps", "250"]
    monkeypatch.chdir(folder)
    assert main([*words, "--out", "own"]) == 0
    how = {"n": 4000, "out": folder / "own.npy", "condition": "s=1.5"}
    with pytest.raises(ValueError, match="say --allow my_law:log_prob"):
        sample_run(folder / "own", SampleSettings(**how))
    sample_run(folder / "own", SampleSettings(**how), allow=["my_law:log_prob"])
    assert np.load(folder / "own.npy").std() == pytest.approx(1.5, abs=0.2)


def test_a_chain_that_never_moves_is_no_result(folder, capsys):
    """Of 300 chains of 25 draws, far from the target, one in 25 begins at the best of them."""
    words = ["fit", "--target", "my_law:far(event_shape=(2,))", "--steps", "1", "--lr", "1e-9"]
    words += ["--flow", "coupling(transforms=2, hidden=(4,))", "--out", str(folder / "far")]
    words += ["--no-anneal"]  # whose particles would show the way
    assert main(words) == 0
    out = folder / "far.npz"
    words = ["sample", str(folder / "far"), "-n", "7500", "--chains", "300", "--out", str(out)]
    assert main(words) == 2
    assert "say --allow my_law:far" in capsys.readouterr().err
    assert main([*words, "--allow", "my_law:far"]) == 1
    assert "a chain took none of its 25 proposals" in capsys.readouterr().err
    assert not out.exists()


def test_a_fit_cut_off_between_two_steps_goes_on_to_the_same_bits(folder, monkeypatch):
    from rkl.sample.fit import _Fitting

    settings = TargetSettings(
        "xy(side=2)", flow="coarse-to-fine(width=8)", batch=64, strata=8, steps=130, anneal=True
    )
    fit_target(settings, folder / "whole")
    original, calls = _Fitting.__call__, []

    def objective(self, moment):
        calls.append(moment.step)
        if len(calls) == 116:  # one step is tried before anything is written
            raise KeyboardInterrupt
        return original(self, moment)

    monkeypatch.setattr(_Fitting, "__call__", objective)
    with pytest.raises(KeyboardInterrupt):
        fit_target(settings, folder / "cut")
    fit_target(settings, folder / "cut", resume=True)
    assert calls[117] == 100  # it went on from the checkpoint
    weights = [(folder / name / "flow.safetensors").read_bytes() for name in ("whole", "cut")]
    assert weights[0] == weights[1]
    rows = [Run.open(folder / name).metrics for name in ("whole", "cut")]
    for row in (*rows[0], *rows[1]):
        del row["seconds"]
    assert rows[0] == rows[1]


@pytest.mark.slow
def test_a_finished_fit_is_extended_to_the_same_bits_if_interrupted_or_not(folder, monkeypatch):
    from rkl.sample.fit import _Fitting

    settings = TargetSettings(
        "xy(side=2)", flow="coarse-to-fine(width=8)", batch=64, strata=8, steps=4, anneal=True
    )
    longer, betas = replace(settings, steps=8), []
    for name in ("extended", "extended-cut"):
        fit_target(settings, folder / name)
        Run(folder / name).record_files(["evaluation.json"])
        (folder / name / "evaluation.json").write_text("of the shorter run")
    original, left = _Fitting.__call__, [6]

    def objective(self, moment):
        if moment.step in left and (folder / "stop").exists():
            left.clear()
            raise KeyboardInterrupt
        betas.append(self.beta)
        return original(self, moment)

    monkeypatch.setattr(_Fitting, "__call__", objective)
    fit_target(longer, folder / "extended", resume=True)
    assert betas[-4:] == [1.0] * 4  # where annealing had come to before
    assert not (folder / "extended" / "evaluation.json").exists()
    (folder / "stop").touch()
    with pytest.raises(KeyboardInterrupt):
        fit_target(longer, folder / "extended-cut", resume=True)
    fit_target(longer, folder / "extended-cut", resume=True)
    one, other = (folder / name / "flow.safetensors" for name in ("extended", "extended-cut"))
    assert one.read_bytes() == other.read_bytes()
    with pytest.raises(ValueError, match="steps: .* has done 8 steps, and can go on to no fewer"):
        fit_target(settings, folder / "extended", resume=True)


@pytest.mark.slow
@pytest.mark.parametrize("progress", [0.1, 0.5])
def test_the_terms_of_an_objective_do_not_leave_an_extended_fit(progress):
    """Particles alone begin it; once its terms have joined them, they stay."""
    from rkl.flows.training import Moment
    from rkl.sample.fit import _Conditions, _Fitting
    from rkl.sample.objectives import parse_objective

    target = parse_target("mog4")
    flow = Coupling(transforms=2, hidden=(4,)).build(target.event_shape, len(target.conditions))
    conditions = _Conditions(target, None, 2)
    chosen = parse_objective("reverse-kl")
    fitting = _Fitting(flow, target, chosen, conditions, 8, True, None, None)
    fitting.share = 1.0
    again = _Fitting(flow, target, chosen, conditions, 8, True, None, None)
    again.load_state_dict(fitting.state_dict())
    moment = Moment(progress=progress)
    again(moment)
    assert again.share == 1.0
    assert "ess" in moment.numbers


def test_a_run_on_a_small_lattice_starts_one_on_a_larger(folder):
    flow = "coarse-to-fine(width=8)"
    settings = TargetSettings(
        "xy(side=8)", flow=flow, start_from=folder / "xy", steps=1, lr=1e-9, batch=64
    )
    fit_target(settings, folder / "larger")
    small, large = (rkl.load(folder / name).state_dict() for name in ("xy", "larger"))
    shared = [name for name, it in small.items() if large[name].shape == it.shape]
    assert any(torch.allclose(small[name], large[name], atol=1e-6) for name in shared)


def test_a_dry_run_of_a_target_foretells_and_writes_nothing(folder, capsys):
    out = folder / "dry"
    assert main(["fit", *XY4, "--minutes", "5", "--out", str(out), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "T in [0.05, 2.05] J" in said
    assert "1.0*target:ReverseKL()" in said
    assert "in 5 minutes" in said
    assert not out.exists()


def test_each_kind_of_target_has_an_architecture_that_suits_it():
    assert default_architecture(XY(side=4, ring_exchange=None)) == CoarseToFine(ring_exchange=None)
    assert default_architecture(Phi4(side=4)) == CoarseToFineField(mass_squared=-4.0)
    assert default_architecture(Phi4(side=6)) == CheckerboardRealNVP(filters=16, circle=False)
    assert default_architecture(Phi4(side=5)) == Coupling()
    assert default_architecture(parse_target("mog4")) == SPLINES
    broken = "textwrap:wrap(event_shape=({},), domain='circle', conditions={{'T': (1.0, 2.0)}})"
    for angles in (3, 16):
        assert default_architecture(parse_target(broken.format(angles))).domain == "circle"


def test_ranges_are_read_and_what_is_none_is_refused():
    both = XY(side=2, ring_exchange=None)
    assert [it[1:3] for it in parse_ranges("K=0.5, T=1:2", both)] == [(1.0, 2.0), (0.5, 0.5)]
    assert parse_ranges(None, both) == both.conditions
    for text in ("T=2:1", "T", "T=hot", "T=nan", "T=1:inf"):
        with pytest.raises(ValueError, match="condition: .* cannot be read"):
            parse_ranges(text, both)
    with pytest.raises(ValueError, match="those of XY.* are T, K; got 'L=3'"):
        parse_ranges("T=1,L=3", both)


def test_draws_that_are_none_of_the_target_are_refused(tmp_path):
    np.savez(tmp_path / "wide.npz", x=np.zeros((5, 9)), condition=np.ones((5, 1)))
    np.savez(tmp_path / "bare.npz", x=np.zeros((5, 4)))
    np.savez(tmp_path / "nan.npz", x=np.full((5, 4), math.nan), condition=np.ones(1))
    np.savez(tmp_path / "odd.npz", x=np.zeros((5, 4)), condition=np.ones((3, 1)))
    (tmp_path / "torn.npz").write_bytes(b"PK\x03\x04")
    for name, said in (
        ("wide", r"x must be \[rows, 4\]"),
        ("bare", "lacks 'condition'"),
        ("nan", "finite"),
        ("odd", "cannot be read"),
        ("torn", "cannot be read"),
        ("none", "no file"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=f"data: .*{said}"):
            read_draws(tmp_path / f"{name}.npz", XY(side=2))


def test_what_a_target_cannot_have_is_one_line_and_writes_nothing(folder, capsys):
    out = folder / "nothing"

    def refused(*words):
        assert main([str(word) for word in words]) == 2
        said = capsys.readouterr().err
        assert said.startswith("rkl: error: ")
        assert said.count("\n") == 1
        return said

    begin = ["fit", "--out", out, "--target"]
    assert "xz" in refused(*begin, "xz(side=4)")
    assert "cannot be imported" in refused(*begin, "no_module:law(event_shape=(2,))")
    assert "side must be" in refused(*begin, "xy(side=1)")
    own = [*begin, "xy(side=4)"]
    assert "data must be given" in refused(*own, "--objective", "data:kl", "--steps", "1")
    assert "one of objective and divergence" in refused(
        *own, "--objective", "kl", "--divergence", "kl"
    )
    assert "steps and minutes" in refused(*own, "--steps", "5", "--minutes", "1")
    assert "scale-free" in refused(*own, "--divergence", "js")
    assert "device must be 'cpu'" in refused(*own, "--steps", "1", "--device", "cuda")
    assert "unrecognized arguments: --anchor" in refused(*own, "--anchor", "0.1")
    assert "start_from goes with" in refused(
        *own, "--flow", "checkerboard-real-nvp", "--start-from", folder / "xy"
    )
    assert not out.exists()
    draw = ["sample", folder / "xy", "--out", folder / "x.npz"]
    assert "one value of T" in refused(*draw)
    assert "one value of T" in refused(*draw, "--condition", "T=0.5:1")
    named = [*draw, "--condition", "T=1"]
    unknown = "unrecognized arguments: --budget 2. See rkl sample --help."
    assert unknown in refused(*named, "--budget", "2")
    assert "chains must be" in refused(*named, "--chains", "0")
    assert "must end in .nc" in refused(*named, "--out", folder / "x.csv")


def test_draws_of_the_run_itself_are_no_evidence_that_it_lacks_nothing(folder, capsys):
    out = folder / "own.npz"
    words = ["sample", str(folder / "xy"), "--condition", "T=1", "-n", "400", "--out", str(out)]
    assert main(words) == 0
    capsys.readouterr()
    assert main(["evaluate", str(folder / "xy"), "--data", str(out), "--strict"]) == 2
    assert "are of the flow of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "differ"),
    [
        ([("xy(side=4)", "T=0.5:1.5"), ("xy(side=4)", "T=0.5:2.0")], True),
        ([("xy(side=4)", "T=0.5:1.5"), ("xy(side=4)", None), ("xy(side=8)", None)], True),
        ([("xy(side=4)", "T=0.5:1.5"), ("xy(side=4)", "T=0.5:1.5")], False),
        ([("xy(side=4)", None), ("xy(side=8)", "T=0.5:1.5")], False),
    ],
)
def test_runs_of_a_target_at_other_conditions_are_not_compared_without_a_word(
    settings, differ, tmp_path
):
    for k, (target, condition) in enumerate(settings):
        chosen = record_of(TargetSettings(target, condition=condition, steps=1))
        with Run.create(tmp_path / str(k), "sample", chosen, seed=0) as run:
            run.log({"step": 1, "ess": 0.5, "acceptance": 0.5, "v": 0.1})
    paths = [tmp_path / str(k) for k in range(len(settings))]
    said = " ".join(str(compare_runs(paths)).split())
    assert ("trained at other conditions" in said) is differ

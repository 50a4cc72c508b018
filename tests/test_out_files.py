"""The file that a verb writes, in Python as on the command line: nothing of others is replaced."""

from pathlib import Path

import numpy as np
import pytest

import rkl.demos.distill as demonstration
from rkl import bayes, distill, fit, runs, sample
from rkl.bayes.run import estimate
from rkl.bayes.settings import EstimateSettings

SETTINGS = {"divergences": ["kl"], "before": "start"}
VERBS = {
    "sample": lambda run, out, **how: fit.sample_run(run, fit.SampleSettings(out=out), **how),
    "generate": lambda run, out, **how: distill.generate_run(
        run, distill.GenerateSettings(data="text.txt", out=str(out)), **how
    ),
    "sample a target": lambda run, out, **how: sample.sample_run(
        run, sample.SampleSettings(out=out), **how
    ),
    "compare estimates": lambda run, out, **how: bayes.compare_runs([run, run], out, **how),
    "compare distillations": lambda run, out, **how: distill.compare_runs([run, run], out, **how),
    "compare flows": lambda run, out, **how: fit.compare_runs([run, run], out, **how),
    "compare targets": lambda run, out, **how: sample.compare_runs([run, run], out, **how),
    "report an estimate": lambda run, out, **how: bayes.report_runs([run], out, **how),
    "report a distillation": lambda run, out, **how: distill.report_runs([run], out, **how),
    "report a flow": lambda run, out, **how: fit.report_runs([run], out, **how),
    "report a target": lambda run, out, **how: sample.report_runs([run], out, **how),
    "report a demonstration": lambda run, out, **how: demonstration.report_runs([run], out, **how),
}
KIND = {
    "estimate": "bayes",
    "estimates": "bayes",
    **dict.fromkeys(("sample", "flow", "flows"), "fit"),
    **dict.fromkeys(("target", "targets"), "sample"),
    "demonstration": "demos.distill",
}


@pytest.fixture
def begun(tmp_path):
    """A function that makes an empty run of the kind that a verb reads."""

    def make(verb):
        kind = KIND.get(verb.split()[-1], "distill")
        run = runs.Run.create(tmp_path / "run", kind, SETTINGS, seed=0)
        run.update(done="all of it")
        if verb == "generate":  # it reads a run whose student is there
            (run.path / "config.json").write_text("{}")
        return run.path

    return make


@pytest.mark.parametrize("verb", VERBS)
def test_no_function_replaces_a_file_that_rkl_did_not_write(verb, begun, tmp_path):
    run, mine = begun(verb), tmp_path / "mine.npy"
    mine.write_text("precious")
    with pytest.raises(FileExistsError, match=r"mine\.npy exists.*overwrite=True in Python"):
        VERBS[verb](run, mine)
    assert mine.read_text() == "precious"


@pytest.mark.parametrize("verb", VERBS)
def test_no_function_replaces_a_file_of_a_run_even_if_told_to(verb, begun):
    run = begun(verb)
    before = (run / "run.json").read_text()
    with pytest.raises(FileExistsError, match="is a file of the run"):
        VERBS[verb](run, run / "run.json", overwrite=True)
    assert (run / "run.json").read_text() == before


@pytest.mark.parametrize("verb", [it for it in VERBS if it.startswith("report")])
def test_a_report_of_somebody_else_in_a_run_is_not_replaced(verb, begun):
    run = begun(verb)
    (run / "report.html").write_text("mine")
    with pytest.raises(FileExistsError, match=r"report\.html exists"):
        VERBS[verb](run, None)
    assert (run / "report.html").read_text() == "mine"


def test_a_second_file_of_chains_is_not_overwritten_and_is_in_the_inputs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    names = "lp__,accept_stat__,mu,sigma"
    for chain in ("c1.csv", "c2.csv"):
        rows = np.c_[rng.normal(size=(60, 3)), rng.random(60) + 1]
        np.savetxt(chain, rows, delimiter=",", header=names, comments="")
    family = "normal(loc=mu, scale=sigma)"
    settings = EstimateSettings(Path("c1.csv"), family, further=(Path("run/c2.csv"),))
    (tmp_path / "run").mkdir()
    (tmp_path / "c2.csv").rename("run/c2.csv")
    with pytest.raises(ValueError, match=r"out: run holds the further file 1, run/c2\.csv"):
        estimate(settings, "run", overwrite=True)
    assert (tmp_path / "run/c2.csv").exists()
    (tmp_path / "run/c2.csv").rename("c2.csv")
    settings = EstimateSettings(Path("c1.csv"), family, further=(Path("c2.csv"),), losses=("kl",))
    estimated = estimate(settings, "made")
    assert estimated._repr_html_().count("<table>") == 3  # in a notebook: act, region, comparison
    inputs = runs.Run.open("made").record["inputs"]["posterior"]
    assert list(inputs["files"]) == ["0/c1.csv", "1/c2.csv"]
    (tmp_path / "c2.csv").write_text((tmp_path / "c1.csv").read_text())
    with pytest.raises(ValueError, match=r"posterior \(.*c1\.csv\): 1/c2\.csv: sha256 was"):
        bayes.load_run("made")

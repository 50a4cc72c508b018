"""A fit from the command line is a run that resumes, loads, samples and is measured."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import rkl
from rkl.cli import main
from rkl.fit import compare_runs, load_critic, report_runs
from rkl.fit.data import read_data
from rkl.fit.evaluate import _in_order, evaluate_run
from rkl.fit.run import dry_run, fit
from rkl.fit.samples import sample_run
from rkl.fit.settings import EvaluateSettings, FitSettings, SampleSettings
from rkl.runs import Run
from rkl.tables import cell_text

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
        "fit",
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
            folder / "classes",
            SampleSettings(n=300, out=folder / "class.npy", condition=name),
            overwrite=True,
        )
        assert np.load(folder / "class.npy")[:, 0].mean() == pytest.approx(centre, abs=15)


def test_rejection_keeps_to_its_budget_and_cooled_latents_to_the_middle(folder):
    said = sample_run(folder / "plain", SampleSettings(n=200, out=folder / "kept.npy", budget=1.1))
    assert "draws each" in said
    spread = {}
    for temperature in (1.0, 0.5):
        settings = SampleSettings(n=2000, out=folder / "t.npy", latent_temperature=temperature)
        sample_run(folder / "plain", settings, overwrite=True)
        spread[temperature] = np.load(folder / "t.npy")[:, 0].std()
    assert spread[0.5] < 0.7 * spread[1.0]


def test_rejection_by_a_critic_of_classes_keeps_to_the_class(folder):
    fitted = ["fit", "--data", folder / "labelled.npz", "--flow", FLOW, "--batch", "64"]
    fitted += ["--steps", "200", "--lr", "0.02", "--critic", "--out", folder / "judged"]
    assert main([str(word) for word in fitted]) == 0
    critic, rows = load_critic(folder / "judged"), np.load(folder / "labelled.npz")
    x, classes = torch.from_numpy(rows["data"]), torch.eye(2)[torch.from_numpy(rows["labels"])]
    own, other = critic(x, classes), critic(x, classes.flip(1))
    assert not torch.allclose(own, other)  # the ratio is one under the class
    for name, centre in (("0", 10.0), ("1", 60.0)):
        how = {"condition": name, "budget": 1.1, "out": folder / "kept.npy"}
        said = sample_run(folder / "judged", SampleSettings(n=3000, **how), overwrite=True)
        assert float(said.split(", ")[-1].split()[0]) == pytest.approx(1.1, rel=0.05)
        assert np.load(folder / "kept.npy")[:, 0].mean() == pytest.approx(centre, abs=15)


def test_rejection_is_distilled_into_a_run_of_its_own(folder, capsys):
    words = ["fit", "--start-from", folder / "plain", "--distil-budget", "1.1", "--minutes", "1"]
    assert main([str(it) for it in [*words, "--dry-run", "--out", folder / "no"]]) == 0
    assert "rejection at 1.1 by the estimator: distilling" in capsys.readouterr().out
    assert not (folder / "no").exists()
    words[-2:] = ["--steps", "30", "--out", folder / "distilled"]
    assert main([str(it) for it in words]) == 0
    assert "held-out log-density" in capsys.readouterr().out
    record = Run.open(folder / "distilled").record
    assert (record["result"]["steps"], record["settings"]["flow"]) == (30, FLOW)
    value = torch.tensor([[10.0, 0.0]], dtype=torch.float64)
    before, after = (rkl.load(folder / it)().log_prob(value) for it in ("plain", "distilled"))
    assert before.item() != after.item()
    assert main(["sample", str(folder / "distilled"), "--out", str(folder / "d.npy")]) == 0
    assert main(["evaluate", str(folder / "distilled"), "--data", str(folder / "data.npy")]) == 0
    assert "270 of the rows were fitted" in capsys.readouterr().out


def test_what_cannot_be_distilled_is_refused_and_writes_nothing(folder, capsys):
    out = ["--steps", "5", "--out", folder / "nothing"]
    begin = ["fit", "--start-from", folder / "plain"]
    apart = [*begin, "--data", folder / "data.npy"]
    assert "go together" in refused(capsys, *apart, *out)
    without = ["fit", "--start-from", folder / "classes", "--distil-budget", "2"]
    assert "has no critic" in refused(capsys, *without, *out)
    assert "at least 1" in refused(capsys, *begin, "--distil-budget", "0.5", *out)
    begin += ["--distil-budget", "2"]
    assert "flow must be that of" in refused(capsys, *begin, "--flow", "nsf", *out)
    np.save(folder / "others.npy", np.load(folder / "data.npy") + 1)
    assert "data must be that of" in refused(capsys, *begin, "--data", folder / "others.npy", *out)
    assert "does not go with" in refused(capsys, *begin, "--budget", "2", *out)
    alone = ["fit", "--data", folder / "data.npy", "--distil-budget", "2"]
    assert "go together" in refused(capsys, *alone, *out)
    assert not (folder / "nothing").exists()


def test_rows_that_changed_under_a_run_are_not_distilled(folder, capsys):
    rows = np.load(folder / "data.npy")
    np.save(folder / "moving.npy", rows)
    how = {"flow": FLOW, "batch": 64, "steps": 2, "critic": True}
    fit(FitSettings(folder / "moving.npy", **how), folder / "moved")
    np.save(folder / "moving.npy", rows + 1)
    words = ["fit", "--start-from", folder / "moved", "--distil-budget", "2"]
    assert "no longer holds" in refused(capsys, *words, "--out", folder / "nothing")


def test_likelihood_with_a_critic_claims_no_divergence(folder):
    how = {"flow": FLOW, "batch": 64, "steps": 2, "critic": True}
    said = str(fit(FitSettings(folder / "data.npy", **how), folder / "critic-alone"))
    assert "divergence fell" not in said


def test_an_evaluation_counts_the_rows_that_were_trained_on(folder, capsys):
    assert main(["evaluate", str(folder / "plain"), "--data", str(folder / "data.npy")]) == 0
    said = capsys.readouterr().out
    assert "270 of the rows were fitted" in said


@pytest.mark.parametrize("fitted_in", ["float32", "float64"])
def test_rows_are_known_again_in_another_precision(fitted_in, tmp_path, capsys):
    rows = np.random.default_rng(0).normal(size=(100, 3)).astype("float32")
    rows[:, 2] += rows[:, 0]
    np.save(tmp_path / "float32.npy", rows)
    np.save(tmp_path / "float64.npy", rows.astype("float64"))
    np.savetxt(tmp_path / "text.csv", rows.astype("float64"), delimiter=",", header="a,b,c")
    words = ["fit", "--flow", FLOW, "--steps", "3", "--out", str(tmp_path / "run")]
    assert main([*words, "--data", str(tmp_path / f"{fitted_in}.npy")]) == 0
    capsys.readouterr()
    for name in ("float32.npy", "float64.npy", "text.csv"):
        assert main(["evaluate", str(tmp_path / "run"), "--data", str(tmp_path / name)]) == 0
        assert "90 of the rows were fitted" in capsys.readouterr().out
    flow = rkl.load(tmp_path / "run")
    single, double = (
        flow().log_prob(torch.from_numpy(rows).to(it)) for it in (torch.float32, torch.float64)
    )
    torch.testing.assert_close(single.double(), double.double(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("kind", ["float32", "float64"])
def test_samples_are_compared_with_rows_trained_on_in_either_precision(kind, tmp_path, capsys):
    rows = np.random.default_rng(0).normal(size=(100, 2)).astype(kind)
    np.savez(tmp_path / "rows.npz", one=rows, two=rows[:40] + 1)
    words = ["fit", "--flow", FLOW, "--steps", "3", "--out", str(tmp_path / "run")]
    assert main([*words, "--data", f"{tmp_path / 'rows.npz'}:one"]) == 0
    assert main(["evaluate", str(tmp_path / "run"), "--data", f"{tmp_path / 'rows.npz'}:two"]) == 0
    assert "nearer to rows trained on" in capsys.readouterr().out


def test_the_report_finds_the_array_of_a_file_that_was_fitted(tmp_path):
    rows = np.random.default_rng(0).normal(size=(300, 2))
    np.savez(tmp_path / "rows.npz", one=rows, two=rows)
    data = Path(f"{tmp_path / 'rows.npz'}:one")
    fit(FitSettings(data, flow=FLOW, steps=3), tmp_path / "run")
    assert "no longer where they were" not in report_runs([tmp_path / "run"]).read_text("utf-8")


def test_rows_of_few_levels_equal_those_of_the_fit_by_chance(tmp_path, capsys):
    counts = np.random.default_rng(0).poisson(3, size=(600, 2))
    np.save(tmp_path / "train.npy", counts[:400])
    np.save(tmp_path / "test.npy", counts[400:])
    words = ["fit", "--flow", FLOW, "--steps", "3", "--out", str(tmp_path / "run")]
    assert main([*words, "--data", str(tmp_path / "train.npy"), "--dequantise"]) == 0
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "run"), "--data", str(tmp_path / "test.npy")]) == 0
    said = capsys.readouterr().out
    assert re.search(
        r"\d+ of the rows equal rows that were fitted, as rows of so few levels", said
    )
    assert "no held-out figure" not in said


def test_the_head_of_a_report_has_precision_and_recall_of_samples(folder):
    page = report_runs([folder / "plain"], out=folder / "plain.html").read_text("utf-8")
    lead = page.split('<p class="lead">')[1].split("</p>")[0]
    assert re.search(r"precision \d\.\d+ ± \d\.\d+ and recall \d\.\d+ ± \d\.\d+\.", lead)


def test_runs_are_compared_in_a_table_with_heads_and_on_a_page(folder, tmp_path, capsys):
    page = tmp_path / "both.html"
    words = ["compare", folder / "plain", folder / "classes", "--out", page]
    assert main([str(it) for it in words]) == 0
    said = capsys.readouterr().out
    assert "precision-half(lam=3)" in said
    result = Run.open(folder / "plain").record["result"]
    row = next(line for line in said.splitlines() if line.startswith(str(folder / "plain")))
    assert cell_text((result["held_out"]["value"], result["held_out"]["error"])) in row
    assert "held-out log-density" in said
    assert "nats per row" in said
    html = page.read_text("utf-8")
    assert "precision-half(lam=3)" in html
    assert "held-out log-density" in html
    assert main([str(it) for it in words]) == 0  # a report of rkl is replaced
    with pytest.raises(ValueError, match="at least one run"):
        compare_runs([])
    with pytest.raises(TypeError, match="a list of folders"):
        compare_runs(str(folder / "plain"))


def test_a_run_killed_between_two_steps_goes_on_to_the_same_bits(folder, monkeypatch):
    settings = FitSettings(folder / "data.npy", flow=FLOW, batch=64, steps=60, divergence="kl")
    fit(settings, folder / "whole")
    from rkl.fit.fit import _Problem

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
    assert calls[40] == 33  # it went on from the checkpoint
    weights = [(folder / name / "flow.safetensors").read_bytes() for name in ("whole", "cut")]
    assert weights[0] == weights[1]


@pytest.fixture
def interrupting(monkeypatch):
    """Raises KeyboardInterrupt in place of the step of this number, once."""
    from rkl.fit.fit import _Problem

    def arrange(step):
        original, left = _Problem.objective, [step]

        def objective(self, moment):
            if moment.step in left:
                left.clear()
                raise KeyboardInterrupt
            return original(self, moment)

        monkeypatch.setattr(_Problem, "objective", objective)

    return arrange


def test_a_finished_fit_is_extended_to_the_same_bits_if_interrupted_or_not(folder, interrupting):
    settings = FitSettings(folder / "data.npy", flow=FLOW, batch=64, steps=4)
    longer = replace(settings, steps=40)
    for name in ("extended", "extended-cut"):
        fit(settings, folder / name)
        (folder / name / "mine.html").write_text("of the user")
        for stale in ("evaluation.json", "report.html"):
            Run(folder / name).record_files([stale])
            (folder / name / stale).write_text("of the shorter run")
    fit(settings, folder / "extended", resume=True)  # nothing to do: it stays true
    assert (folder / "extended" / "report.html").exists()
    fit(longer, folder / "extended", resume=True)
    left = {path.name for path in (folder / "extended").iterdir()}
    assert left & {"evaluation.json", "report.html", "mine.html"} == {"mine.html"}
    interrupting(30)
    with pytest.raises(KeyboardInterrupt):
        fit(longer, folder / "extended-cut", resume=True)
    assert not (folder / "extended-cut" / "evaluation.json").exists()
    fit(longer, folder / "extended-cut", resume=True)
    one, other = (folder / name / "flow.safetensors" for name in ("extended", "extended-cut"))
    assert one.read_bytes() == other.read_bytes()
    assert Run(folder / "extended").record["result"]["steps"] == 40
    with pytest.raises(ValueError, match="steps: .* has done 40 steps, and can go on to no fewer"):
        fit(settings, folder / "extended", resume=True)
    with pytest.raises(ValueError, match="minutes: .* has trained for .*, and can go on to no"):
        fit(replace(longer, steps=None, minutes=1e-5), folder / "extended", resume=True)


def test_a_fit_whose_minutes_are_spent_takes_no_fewer_and_is_left_alone_under_the_same(folder):
    settings = FitSettings(folder / "data.npy", flow=FLOW, batch=64, minutes=1e-4)
    fit(settings, folder / "timed")
    before = Run(folder / "timed").metrics
    fit(settings, folder / "timed", resume=True)
    assert Run(folder / "timed").metrics == before
    with pytest.raises(ValueError, match="minutes: .* has trained for .*; got 5e-05"):
        fit(replace(settings, minutes=5e-5), folder / "timed", resume=True)


@pytest.mark.slow
def test_an_extended_fit_does_not_fall_back_to_likelihood(folder, monkeypatch):
    from rkl.fit.fit import _Problem

    settings = FitSettings(
        folder / "data.npy", flow=FLOW, batch=64, steps=52, divergence="precision-half(lam=3)"
    )
    fit(settings, folder / "guided")
    original, seen = _Problem._divergence_loss, {}

    def guided(self, divergence, value, log_q, draws, moment):
        seen[moment.step] = divergence.lam
        return original(self, divergence, value, log_q, draws, moment)

    monkeypatch.setattr(_Problem, "_divergence_loss", guided)
    fit(replace(settings, steps=160), folder / "guided", resume=True)
    assert seen == dict.fromkeys(range(52, 160), 3)


def test_runs_that_held_out_other_rows_are_not_compared_without_a_word(folder, tmp_path):
    settings = FitSettings(folder / "data.npy", flow=FLOW, batch=64, steps=2)
    others = {"seed": {"seed": 1}, "share": {"held_out": 0.2}, "rate": {"lr": 1e-4}}
    for name, other in {"same": {}, **others}.items():
        fit(replace(settings, **other), tmp_path / name)
    for name in ("seed", "share"):
        said = " ".join(str(compare_runs([tmp_path / "same", tmp_path / name])).split())
        assert "held out other rows" in said
    assert "held out other rows" not in str(compare_runs([tmp_path / "same", tmp_path / "rate"]))
    rows = np.load(folder / "data.npy").round(1)
    np.save(tmp_path / "levels.npy", rows)
    mixed = replace(settings, data=tmp_path / "levels.npy")
    for name in (True, None):
        fit(replace(mixed, dequantise=name), tmp_path / f"levels-{name}")
    said = str(compare_runs([tmp_path / "levels-True", tmp_path / "levels-None"]))
    assert "spread levels" in said


def test_a_fit_is_evaluated_on_the_device_that_is_named(folder):
    """A meta tensor has no values, so that none can come out of a computation on it."""
    settings = EvaluateSettings(folder / "data.npy", device="meta")
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        evaluate_run(folder / "plain", settings)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="it finds no GPU"):
            evaluate_run(folder / "plain", replace(settings, device="cuda"))


def test_columns_in_another_order_go_by_their_names(tmp_path):
    table = tmp_path / "table.csv"
    rows = np.random.default_rng(0).normal(size=(30, 3))
    np.savetxt(table, rows, delimiter=",", header="b,c,a", comments="")
    data = read_data(table)
    run: Any = SimpleNamespace(record={"data": {"columns": ["a", "b", "c"]}})
    ordered = _in_order(run, data)
    assert ordered.columns == ("a", "b", "c")
    assert np.array_equal(ordered.values.numpy(), data.values.numpy()[:, [2, 0, 1]])
    other: Any = SimpleNamespace(record={"data": {"columns": ["a", "b", "d"]}})
    with pytest.raises(ValueError, match="data must have the columns a, b, d; got b, c, a"):
        _in_order(other, data)


def test_a_dry_run_foretells_and_writes_nothing(folder):
    settings = FitSettings(folder / "data.npy", flow=FLOW, batch=64, divergence="js", minutes=5.0)
    said = dry_run(settings)
    assert "300 rows of shape [2]" in said
    assert "estimator: data" in said
    assert "in 4.5 minutes\nthen a critic" in said  # which takes a tenth


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
    flat = ["--flow", "multi-scale(scales=2)"]
    assert "sides divisible by 4" in refused(capsys, *begin, *flat)
    assert "device must be" in refused(capsys, *begin, "--device", "nonsense")
    assert not out.exists()
    draw = ["sample", folder / "classes"]
    assert "one of 0, 1" in refused(capsys, *draw)
    named = [*draw, "--condition", "0"]
    assert "has no critic" in refused(capsys, *named, "--budget", "2")
    assert "n must be at least 1" in refused(capsys, *named, "-n", "0")
    assert "must end in .npy" in refused(capsys, *named, "--out", folder / "samples.txt")
    cooled = ["sample", folder / "plain", "--budget", "2", "--latent-temperature", "0.5"]
    assert "own latents" in refused(capsys, *cooled)
    assert "device must be" in refused(capsys, *named, "--device", "nonsense")


def test_other_data_are_refused_by_a_run_that_is_resumed(folder):
    rows = np.load(folder / "data.npy")
    np.save(folder / "changing.npy", rows)
    settings = FitSettings(folder / "changing.npy", flow=FLOW, batch=64, steps=2)
    fit(settings, folder / "changed")
    np.save(folder / "changing.npy", rows + 1)
    with pytest.raises(ValueError, match="the inputs differ from those of"):
        fit(settings, folder / "changed", resume=True)
    assert json.loads((folder / "changed" / "run.json").read_text())["data"]["rows"] == 300

"""The study of precision and recall, against plain Monte Carlo and in miniature."""

import csv
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributions import MultivariateNormal

from rkl import demos, studies
from rkl.demos import precision_recall
from rkl.divergences import PrecisionHalf, PrecisionRecall
from rkl.flows import Coupling, Critic
from rkl.runs import Run
from rkl.studies.precision_recall import images, ring
from rkl.studies.precision_recall import report as study
from rkl.studies.precision_recall.rows import COLUMNS, ML, Seed, rows_of
from rkl.studies.study import Outcome, run_part, to_csv

FIGURES = Path(__file__).parents[2] / "docs" / "figures"
WIDE = MultivariateNormal(torch.tensor([0.3, 0.0]), 1.5 * torch.eye(2))


@pytest.fixture(scope="module")
def grid():
    return ring.Grid(240)


def test_the_ring_has_mass_one_and_its_draws_have_its_density(grid):
    inside = (ring.log_prob(grid.points.double()) + grid.log_area).exp().sum()
    assert inside.item() == pytest.approx(1, abs=1e-6)
    entropy = -(grid.log_p.exp() * (grid.log_p - grid.log_area)).sum().item()
    drawn = -ring.log_prob(ring.draws(20_000, 0).double())
    error = drawn.std().item() / math.sqrt(len(drawn))
    assert drawn.mean().item() == pytest.approx(entropy, abs=4 * error)


def test_sums_over_the_grid_are_what_draws_say(grid):
    """E_q min(1, λr), of 100,000 draws, at every slope that is reported."""
    found = grid.judge(grid.log_q(WIDE))["figures"]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        x = WIDE.sample((100_000,))
    ratio = (ring.log_prob(x) - WIDE.log_prob(x)).double().exp()
    for name, lam in (("precision(10)", 10), ("precision(3)", 3), ("both(1)", 1)):
        terms = (lam * ratio).clamp_max(1)
        error = terms.std().item() / math.sqrt(len(x))
        assert found[name][0] == pytest.approx(terms.mean().item(), abs=4 * error)
    for name, lam in (("recall(0.3)", 0.3), ("recall(0.1)", 0.1)):
        terms = ratio.clamp_max(1 / lam)
        error = terms.std().item() / math.sqrt(len(x))
        assert found[name][0] == pytest.approx(terms.mean().item(), abs=4 * error)


def test_rejection_by_the_exact_ratio_costs_its_budget_and_ends_at_the_target(grid):
    log_q = grid.log_q(WIDE)
    exact = grid.log_p - log_q
    with torch.random.fork_rng():
        torch.manual_seed(0)
        some, cost = grid.reject(log_q, exact, 1.5)
        most, dear = grid.reject(log_q, exact, 0.99 * exact.exp().max().item())
    assert cost == pytest.approx(1.5, rel=0.03)  # fitted on 20,000 draws
    before, after, last = (grid.judge(it)["figures"]["both(1)"][0] for it in (log_q, some, most))
    assert before < after < last
    assert last > 0.99
    assert dear > 3


def test_gains_are_taken_seed_by_seed():
    seeds = [
        Seed(method, "none", seed, {"precision": (value, 0.3)})
        for method, values in {ML: (0.5, 0.7), "other": (0.6, 0.9)}.items()
        for seed, value in enumerate(values)
    ]
    first, second = rows_of(seeds)
    assert first.gain == (0, 0)
    assert second.gain == pytest.approx((0.15, 0.05))
    assert second.sampling_error == pytest.approx(0.3 / math.sqrt(2))
    assert second.mean == pytest.approx((0.75, 0.3 / math.sqrt(2)))  # the larger of the errors
    outcome = Outcome(COLUMNS, [first.cells(), second.cells()], "", [])
    table = list(csv.DictReader(to_csv(outcome.columns, outcome.rows).splitlines()))
    assert float(table[1]["mean"]) == 0.75
    assert float(table[1]["se"]) == pytest.approx(0.15)


def run_plan(name, plan, out, workers=2, **how):
    part = replace(study.PARTS[name], plan=plan, workers=workers)
    return run_part("precision_recall", name, part, out, **how)


TINY = replace(
    precision_recall.SMALL,
    seeds=1,
    steps=30,
    rows=500,
    cells=60,
    flow=replace(ring.Plan().flow, hidden=(8,)),
)


def test_the_ring_in_miniature_writes_every_method_and_shows_it(tmp_path):
    threads = torch.get_num_threads()
    page = run_plan("ring", TINY, tmp_path / "run", seed=3).read_text()
    assert torch.get_num_threads() == threads
    with open(tmp_path / "run" / "ring.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    methods = {(it["method"], it["ratio"]) for it in rows}
    assert {(it.method, it.ratio) for it in TINY.ways} < methods
    assert {("rejection, budget 1.1", it) for it in ("exact", "critic")} < methods
    assert all(0 <= float(it["mean"]) <= 1 for it in rows if it["quantity"] != "cost")
    for word in ("as published", "latent temperature 0.7", "truncation at 2"):
        assert word in page
    assert page.count("<svg") == 6  # points, draws, curves, spectrum, two of training
    assert Run.open(tmp_path / "run").record["status"] == "finished"


@pytest.mark.slow
def test_seeds_in_processes_find_what_one_process_finds(tmp_path):
    plan = replace(TINY, seeds=2, ways=(), steps=10)
    run_plan("ring", plan, tmp_path / "two")
    run_plan("ring", plan, tmp_path / "one", workers=1)
    one, two = ((tmp_path / name / "ring.csv").read_text() for name in ("one", "two"))
    assert one == two


def test_a_study_that_was_stopped_goes_on_with_the_jobs_that_are_missing(tmp_path, monkeypatch):
    plan = replace(TINY, seeds=2, ways=(), steps=10)
    computed, compute = [], study.Trade.compute

    def stop_at_the_second(self, seed):
        if seed == 1:
            raise KeyboardInterrupt
        return compute(self, seed)

    def count(self, seed):
        computed.append(seed)
        return compute(self, seed)

    whole = run_plan("ring", plan, tmp_path / "whole", workers=1)
    with monkeypatch.context() as patch:
        patch.setattr(study.Trade, "compute", stop_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            run_plan("ring", plan, tmp_path / "run", workers=1)
    assert Run.open(tmp_path / "run").record["status"] == "interrupted"
    monkeypatch.setattr(study.Trade, "compute", count)
    page = run_plan("ring", plan, tmp_path / "run", workers=1, resume=True)
    assert computed == [1]
    assert not (tmp_path / "run" / "jobs").exists()
    one, other = ((it.parent / "ring.csv").read_text() for it in (whole, page))
    assert one == other
    assert run_plan("ring", plan, tmp_path / "run", workers=1, resume=True) == page
    assert computed == [1]  # what is finished is not computed again
    with pytest.raises(ValueError, match="resume: settings of .* differ: plan was"):
        run_plan("ring", replace(plan, steps=11), tmp_path / "run", resume=True)


@pytest.fixture
def stripes(monkeypatch):
    """Two classes of pictures, striped one way or the other."""
    generator = torch.Generator().manual_seed(0)
    classes = torch.randint(2, (160,), generator=generator)
    across = torch.randint(1, 7, (160, 1, 6), generator=generator).expand(-1, 6, -1)
    values = torch.where(classes[:, None, None] > 0, across, across.transpose(1, 2))
    values = values + torch.randint(2, values.shape, generator=generator)
    found = images.Pictures(values.flatten(1), classes, 6, torch.arange(36))
    monkeypatch.setattr(images, "read", lambda plan: found)
    return found


SMALL_PICTURES = images.Plan(
    flow=Coupling(transforms=2, hidden=(16,)),
    ways=(ring.Way(PrecisionHalf(lam=1.0), exact=False),),
    critic=Critic(hidden=(16,)),
    seeds=1,
    steps=30,
    batch=32,
    most=60,
    budgets=(2.0,),
    temperatures=(0.7,),
    bounds=(2.0,),
    distilled=(1.0, 2.0),
)


@pytest.mark.slow
def test_pictures_in_miniature_are_measured_in_two_spaces_beside_their_ceiling(
    stripes, tmp_path, monkeypatch
):
    page = run_plan("digits", SMALL_PICTURES, tmp_path / "run").read_text()
    with open(tmp_path / "run" / "digits.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    by = {(it["method"], it["quantity"]): it for it in rows}
    for space in ("features", "components"):
        for name in ("precision", "recall"):
            ceiling = by["real against real", f"{space}: {name}"]
            assert float(ceiling["mean"]) > 0.5
            assert float(by[ML, f"{space}: {name}"]["se_samples"]) > 0
    assert float(by["rejection, budget 2", "cost"]["mean"]) == pytest.approx(2, rel=0.1)
    assert {"distilled, budget 1", "distilled, budget 2"} < {it["method"] for it in rows}
    assert "real against real" in page
    assert "<image" in page  # the montages


def test_the_features_of_the_second_space_tell_the_classes(stripes):
    spaces = images.Spaces(*stripes.split(60, 0), 0)  # pyright: ignore[reportCallIssue]
    seen = spaces.features((images.spread(stripes.values)) / spaces.levels)
    centres = torch.stack([seen[stripes.classes == it].mean(0) for it in (0, 1)])
    told = torch.cdist(seen, centres).argmin(1)
    assert (told == stripes.classes).double().mean() > 0.9  # chance is one half


def test_without_scikit_learn_the_digits_name_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    images._digits.cache_clear()
    with pytest.raises(ImportError, match=r"needs sklearn: pip install 'rkl\[studies\]'"):
        studies.run("precision-recall", "digits", tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_run_is_refused_before_anything_is_written(tmp_path):
    out = tmp_path / "run"
    with pytest.raises(ValueError, match="part must be one of ring, digits, mnist; got 'toy'"):
        studies.run("precision-recall", "toy", out)
    with pytest.raises(ValueError, match="device must be 'cpu'"):
        studies.run("precision-recall", "ring", out, device="cuda")
    with pytest.raises(ValueError, match="data must be the IDX file"):
        studies.run("precision-recall", "mnist", out)
    with pytest.raises(ValueError, match="data is for mnist alone"):
        studies.run("precision-recall", "ring", out, data="here")
    with pytest.raises(FileNotFoundError, match="images-idx3"):
        studies.run("precision-recall", "mnist", out, data=tmp_path / "pictures.gz")
    with pytest.raises(ValueError, match="device must be 'cpu'"):
        demos.run("precision-recall", out, device="cuda")
    assert list(tmp_path.iterdir()) == []


def test_an_idx_file_is_read_with_the_labels_beside_it(tmp_path):
    pictures, labels = (tmp_path / f"t-{it}-ubyte" for it in ("images-idx3", "labels-idx1"))
    shape = [n.to_bytes(4, "big") for n in (2, 2, 2)]
    pictures.write_bytes(bytes([0, 0, 8, 3]) + b"".join(shape) + bytes(range(8)))
    labels.write_bytes(bytes([0, 0, 8, 1]) + (2).to_bytes(4, "big") + bytes([7, 3]))
    found = images.read(replace(images.MNIST, data=str(pictures), levels=None))
    assert found.values.tolist() == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]
    assert found.classes.tolist() == [7, 3]
    few = images.read(replace(images.MNIST, data=str(pictures), levels=64))
    assert few.values.tolist() == [[[0, 0], [0, 0]], [[1, 1], [1, 1]]]
    labels.write_bytes(bytes([0, 0, 8, 1]) + (1).to_bytes(4, "big") + bytes([7]))
    images._idx.cache_clear()
    with pytest.raises(ValueError, match="each with its label"):
        images.read(replace(images.MNIST, data=str(pictures)))


def test_only_studies_that_read_data_take_them(capsys, tmp_path):
    from rkl import cli

    words = ["study", "neyman-scott", "--data", "here", "--out", str(tmp_path / "run")]
    assert cli.main(words) == 1 or "reads none" in capsys.readouterr().err


def test_ways_are_named_after_what_they_do():
    way = ring.Way(PrecisionRecall(lam=10.0), exact=False, estimator="path", published=True)
    assert way.method == "PrecisionRecall(10), as published"
    assert way.ratio == "critic"


def written_rows(part):
    with open(FIGURES / f"precision-recall-{part}.csv", newline="") as file:
        return list(csv.DictReader(file))


WRITTEN = sorted(it.stem.removeprefix("precision-recall-") for it in FIGURES.glob("precision-re*"))


@pytest.mark.parametrize("part", WRITTEN)
def test_the_figures_hold_every_method_from_three_seeds(part):
    rows = written_rows(part)
    methods = {(it["method"], it["ratio"]) for it in rows}
    assert {(it.method, it.ratio) for it in study.PARTS[part].plan.ways} < methods
    assert all(int(it["seeds"]) >= 3 for it in rows)


@pytest.mark.parametrize("part", WRITTEN)
def test_the_page_says_what_the_figures_say(part):
    """Every cell of the table of the part, to the digits that it shows."""
    page = (FIGURES.parent / "studies" / "precision-recall.md").read_text("utf-8")
    by = {
        (", ".join([it["method"], it["ratio"]]).removesuffix(", none"), it["quantity"]): it
        for it in written_rows(part)
    }
    tables = [
        [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
        for table in page.split("\n\n")
        if table.startswith("|")
    ]
    names = {name for name, _ in by}
    (table,) = (it for it in tables if {row[0] for row in it[2:]} == names)
    for name, *cells in table[2:]:
        for quantity, cell in zip(table[0][1:], cells, strict=True):
            if " ± " in cell:
                row, (value, error) = by[name, quantity], cell.split(" ± ")
                half = 0.51 * 10 ** -len(value.partition(".")[2])
                assert float(value) == pytest.approx(float(row["mean"]), abs=half)
                largest = max(float(row["se"]), float(row["se_samples"]))
                assert float(error) == pytest.approx(largest, abs=half)

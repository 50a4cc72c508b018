"""The study of AdvNF: its arithmetic on figures made up, and itself in miniature."""

import csv
import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rkl import studies
from rkl.flows import NSF, Coupling
from rkl.sample import CheckerboardRealNVP, CoarseToFine
from rkl.sample.objectives import VARIANTS
from rkl.sample.observables import check_held_out
from rkl.sample.targets import XY, MoG8
from rkl.studies.advnf import fits
from rkl.studies.advnf import report as study
from rkl.studies.study import run_part

DOCS = Path(__file__).parents[2] / "docs"
SMALL = fits.Plan(
    MoG8(),
    Coupling(transforms=2, hidden=(8,)),
    cpu_s=0.2,
    ours=NSF(transforms=1, hidden=(8,)),
    values=2,
    ensembles=(8, 40),
    batch=32,
    draws=100,
    seeds=2,
)


def made_up(way, seed, **found):
    gradient = found.pop("gradient", 1.0)
    return fits.Fit(way, seed, 10, 1.0, gradient, [0.1, 1.0], found)


def test_every_variant_and_ours_meet_every_ensemble_that_they_read():
    found = list(fits.ways(SMALL))
    assert {it.name for it in found} == {*VARIANTS, *fits.OURS}
    without = {"rkl", fits.NO_DATA}
    assert {it.name for it in found if not it.ensemble} == without
    for name in {*VARIANTS, *fits.OURS} - without:
        assert [it.ensemble for it in found if it.name == name] == [8, 40]


def test_orders_of_size_are_averaged_geometrically_and_compared_as_factors():
    one, other = fits.Way("fkl", 8), fits.Way("advnf-fkl", 8)
    of = [
        made_up(one, 0, v=[1.0, 100.0], acceptance=[0.2, 0.4]),
        made_up(one, 1, v=[1.0, 100.0], acceptance=[0.2, 0.4]),
        made_up(other, 0, v=[2.0, 200.0], acceptance=[0.3, 0.4]),
        made_up(other, 1, v=[8.0, 800.0], acceptance=[0.5, 0.4]),
    ]
    assert study.over_seeds(of, one, "v") == pytest.approx((10.0, 0.0))
    assert study.over_seeds(of, one, "acceptance") == pytest.approx((0.3, 0.0))
    factor, error = study.gain_of(of, one, other, "v")
    assert factor == pytest.approx(4.0)  # of 2 and 8
    assert error == pytest.approx(4.0 * math.log(2))  # half their distance, in logarithms
    assert study.gain_of(of, one, other, "acceptance") == pytest.approx((0.1, 0.05))
    assert study.gain_of(of, one, other, "gradient") == (0.0, 0.0)


@pytest.mark.parametrize("target", [MoG8(), XY(side=2)], ids=["exact", "heat bath"])
def test_ensembles_are_shared_out_over_conditions_and_never_judge(target):
    plan = fits.Plan(target, SMALL.baseline, cpu_s=1, values=4)
    x, held_out = fits.exact_draws(plan, 30, 0), fits.exact_draws(plan, 30, 1)
    assert x.shape == (4, 30, *target.event_shape)
    check_held_out(x.flatten(0, 1), held_out.flatten(0, 1))
    rows, condition = fits._choose(x, plan.conditions, 22, seed=0)
    values, counts = condition.unique(return_counts=True)
    assert torch.equal(values, plan.conditions[:, 0])
    assert counts.tolist() == [6, 6, 5, 5]
    for value, own in zip(plan.conditions[:, 0], x, strict=True):
        for row in rows[condition[:, 0] == value]:
            assert (row == own).all(-1).any()  # under the condition that it was drawn under


@pytest.fixture(scope="module")
def quick_fit():
    """The shortest fit of a variant, whose figures stand for those of every way."""
    budget = replace(SMALL, cpu_s=0.0)
    return fits.fit(budget, fits.Way("advnf", 8), 0)


@pytest.mark.parametrize(
    "really",
    [False, pytest.param(True, marks=pytest.mark.slow)],
    ids=["figures repeated", "fitted"],
)
def test_the_study_in_miniature(really, quick_fit, tmp_path, monkeypatch):
    part = replace(study.PARTS["mog-8"], plan=SMALL, workers=1)
    if not really:
        monkeypatch.setattr(
            study, "fit", lambda plan, way, seed: replace(quick_fit, way=way, seed=seed)
        )
    page = run_part("advnf", "mog-8", part, tmp_path / "run", seed=3)
    with open(tmp_path / "run" / "mog-8.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    found = list(fits.ways(SMALL))
    assert len(rows) == len(found) * SMALL.seeds * SMALL.values
    assert tuple(rows[0]) == study.COLUMNS
    for row in rows:
        assert int(row["steps"]) >= 1
        assert 0 <= float(row["acceptance"]) <= 1
        assert 0 <= float(row["missing"]) <= 8
        assert float(row["bracket"]) > 0  # the symmetrised divergence
        assert math.isnan(float(row["overlap"]))  # an energy is the XY model's
    text = page.read_text(encoding="utf-8")
    for words in ("advnf over fkl-rkl (40 draws)", "modes missing", "Coupling(transforms=2"):
        assert words in text
    drawn = (tmp_path / "run" / "draws.svg").read_text(encoding="utf-8")
    assert all(name in drawn for name in ("target", "advnf-rkl", fits.NO_DATA))


HEADINGS = {
    "xy": "The XY model, 8 x 8",
    "mog-8": "Eight Gaussians",
    "rings": "Four rings",
    "mog-4": "Four Gaussians",
}


def kept(part):
    """What the csv of a part holds, as fits; equal times among them."""
    with open(DOCS / "figures" / f"advnf-{part}.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    found = []
    for key, group in itertools.groupby(rows, lambda it: (it["flow"], it["ensemble"], it["seed"])):
        mine = list(group)
        values = {name: [float(row[name]) for row in mine] for name in fits.QUANTITIES}
        found.append(made_up(fits.Way(key[0], int(key[1])), int(key[2]), **values))
        assert float(mine[0]["cpu_s"]) == pytest.approx(study.PARTS[part].plan.cpu_s, rel=0.25)
    return found


@pytest.mark.parametrize("part", HEADINGS)
def test_the_figures_of_the_page_are_those_of_the_csv(part):
    """What is accepted and v, of each way; and that all fits took equal time."""
    found = kept(part)
    page = (DOCS / "studies" / "advnf.md").read_text(encoding="utf-8")
    section = page.split(f"## {HEADINGS[part]}\n")[1].split("\n## ")[0].splitlines()
    table = [[cell.strip() for cell in it.split("|")] for it in section if it.startswith("|")]
    at = table[0].index("v, 10,000")
    assert len(found) == study.PARTS[part].plan.seeds * len(
        list(fits.ways(study.PARTS[part].plan))
    )
    for name in {*VARIANTS, *fits.OURS}:
        (cells,) = (it for it in table if it[1] == name)
        ways = dict.fromkeys(it.way for it in found if it.way.name == name)
        for way, cell in zip(ways, cells[2:], strict=False):
            assert "{:.3f} ± {:.3f}".format(*study.over_seeds(found, way, "acceptance")) == cell
        largest = max(ways, key=lambda it: it.ensemble)
        stated, error = map(float, cells[at].split(" ± "))
        value, spread = study.over_seeds(found, largest, "v")
        assert (stated, error) == (pytest.approx(value, rel=0.05), pytest.approx(spread, rel=0.5))


@pytest.mark.parametrize("name", ["advnf", pytest.param(fits.NO_DATA, marks=pytest.mark.slow)])
def test_the_xy_model_is_compared_by_energies(name):
    target = XY(side=2)
    baseline = CheckerboardRealNVP(couplings=2, filters=4)
    ours = CoarseToFine.of(target, width=8)
    plan = fits.Plan(
        target, baseline, cpu_s=0.2, ours=ours, values=2, ensembles=(8,), batch=16, draws=200
    )
    way = next(it for it in fits.ways(plan) if it.name == name)
    done = fits.fit(plan, way, 0)
    for overlap in done.figures["overlap"] + done.figures["overlap_floor"]:
        assert 0 <= overlap <= 100


def test_what_it_refuses(tmp_path):
    with pytest.raises(ValueError, match="part must be one of mog-4, mog-8, rings, xy; got 'a'"):
        studies.run("advnf", "a", tmp_path / "run")
    with pytest.raises(ValueError, match="device must be 'cpu'"):
        studies.run("advnf", "xy", tmp_path / "run", device="cuda")
    assert not (tmp_path / "run").exists()

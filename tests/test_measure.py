"""Scores of samples see every column, name what spoils them, and find copies."""

import json

import numpy as np
import pytest
import torch

from rkl import cli
from rkl.metrics.clusters import equal_precision, prd_curve
from rkl.metrics.frechet import frechet_bias, frechet_distance
from rkl.metrics.neighbours import copies, prdc
from rkl.metrics.samples import Measured, measure
from rkl.stats import Mean
from rkl.tables import cell_text


def normal(rows, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64)


UNITS = torch.tensor([1.0, 1e-3, 1e4, 10.0], dtype=torch.float64)


def values(measured):
    return [it.value.item() for it in measured.scores.values()]


def test_standardised_scores_do_not_depend_on_units_and_offsets():
    real, fake = normal(120, 4), 1.3 * normal(100, 4, seed=1)
    one = measure(real=real, fake=fake, standardise=True)
    other = measure(real=UNITS * real + 5, fake=UNITS * fake + 5, standardise=True)
    assert values(other) == pytest.approx(values(one), rel=1e-6)


def test_a_column_that_alone_is_seen_is_named_and_no_other():
    real, fake = normal(120, 4), normal(100, 4, seed=1)
    names = ("a", "b", "proline", "d")
    said = measure(real=UNITS * real, fake=UNITS * fake, columns=names).notes
    assert said[0].startswith("Column proline has 100 % of the variance")
    assert not any("variance" in note for note in measure(real=real, fake=fake).notes)
    kept = measure(real=UNITS * real, fake=UNITS * fake, standardise=True).notes
    assert not any("variance" in note for note in kept)


def test_a_few_draws_far_out_make_no_curve_perfect():
    """1 − TV is 2e-5, whatever one draw in forty does."""
    real, fake = normal(400, 8), normal(400, 8, seed=1) + 3
    fake[:10] *= 1e4
    measured = measure(real=real, fake=fake)
    assert measured.scores["both, slope 1"].value.item() < 0.03
    assert measured.scores["precision of clusters, slope 4"].value.item() < 0.03
    assert any(
        note.startswith("10 of 400 fakes lie more than 10 spreads") for note in measured.notes
    )
    honest = measure(real=real, fake=normal(400, 8, seed=2)).notes
    assert not any("spreads from every real" in note for note in honest)


def test_scores_that_are_not_known_are_null_in_json():
    unknown = Mean(*torch.tensor([float("nan"), float("nan")]))
    known = Mean(*torch.tensor([0.5, 0.25]))
    measured = Measured({"curve": unknown, "recall": known}, {}, {}, "two samples", [])
    written = json.loads(json.dumps(measured.to_dict(), allow_nan=False))["scores"]
    assert written["curve"] == {"value": None, "error": None}
    assert written["recall"] == {"value": 0.5, "error": 0.25}


def test_far_draws_leave_the_curve_of_the_others():
    real, fake = normal(300, 3), normal(300, 3, seed=1)
    plain = prd_curve(real=real, fake=fake, slopes=torch.ones(1))
    fake[:3] = 1e9
    spoilt = prd_curve(real=real, fake=fake, slopes=torch.ones(1))
    assert spoilt.precision.value.item() == pytest.approx(plain.precision.value.item(), abs=0.05)


def test_a_curve_of_too_few_clusters_with_real_samples_is_withheld():
    real, fake = normal(60, 8), 1e3 * normal(300, 8, seed=1)
    with pytest.warns(UserWarning, match=r"real samples lie in \d of 20 clusters"):
        prd_curve(real=real, fake=fake)
    measured = measure(real=real, fake=fake)
    assert measured.scores["both, slope 1"].value.isnan()
    assert any("clusters: a curve of so few says nothing" in note for note in measured.notes)


@pytest.mark.parametrize("size", [100, 1000])
def test_what_two_samples_of_one_law_score_is_said(size):
    found = [
        prd_curve(
            real=normal(size, 8, seed=2 * i), fake=normal(size, 8, seed=2 * i + 1),
            slopes=torch.ones(1), runs=3,
        ).precision.value.item()
        for i in range(4)
    ]  # fmt: skip
    assert np.mean(found) == pytest.approx(equal_precision(size, size), abs=0.04)


def test_the_bias_of_the_frechet_distance_is_its_mean_for_equal_laws():
    found = [
        frechet_distance(
            real=normal(500, 8, seed=2 * i), fake=normal(500, 8, seed=2 * i + 1)
        ).value
        for i in range(40)
    ]
    bias = frechet_bias(real=normal(500, 8), fake=normal(500, 8, seed=1))
    error = torch.stack(found).std().item() / 40**0.5
    assert torch.stack(found).mean().item() == pytest.approx(bias, abs=4 * error + 0.02 * bias)


# Copies


def brute_force(fake, rows):
    return np.sqrt(((fake[:, None] - rows[None]) ** 2).sum(2)).min(1)


def test_the_share_of_copies_is_that_of_all_distances_written_down():
    train, held_out, fake = (normal(80, 3, seed=i) for i in range(3))
    found = copies(train=train, held_out=held_out, fake=fake)
    arrays = [it.numpy() for it in (fake, train, held_out)]
    nearer = brute_force(arrays[0], arrays[1]) < brute_force(arrays[0], arrays[2])
    assert found.nearer.value.item() == pytest.approx(nearer.mean(), abs=1e-12)
    usual = np.median(brute_force(arrays[2], arrays[1]))
    assert found.near == (brute_force(arrays[0], arrays[1]) <= 0.1 * usual).sum()


def test_copies_with_noise_are_seen_and_honest_draws_are_not():
    train, test, honest = (normal(400, 8, seed=i) for i in range(3))
    copied = train + 1e-3 * normal(400, 8, seed=9)
    name = "nearer to rows trained on"
    for fake, right in ((copied, 1.0), (honest, 0.5)):
        score = measure(real=test, fake=fake, train=train).scores[name]
        assert abs(score.value.item() - right) < 4 * score.error.item()
    said = measure(real=train, fake=copied).notes
    assert any(note.endswith("are they copies?") for note in said)
    for real in (train, test):
        assert not any("copies?" in note for note in measure(real=real, fake=honest).notes)


# Ties and errors


def test_exact_copies_count_in_closed_balls_whatever_products_round_to():
    points = normal(27, 5) * 1e3 + 0.1
    real, fake = points.repeat(12, 1), points.repeat(10, 1)
    with pytest.warns(UserWarning, match="balls have a radius of 0, as samples are equal"):
        scores = prdc(real=real, fake=fake, inclusive=True, subsamples=0)
    assert [scores.precision.value, scores.recall.value, scores.coverage.value] == [1, 1, 1]
    assert scores.density.value.item() == pytest.approx(12 / 5)
    with pytest.warns(UserWarning, match="radius of 0"):
        scores = prdc(real=real, fake=fake, subsamples=0)
    assert scores.precision.value == 0


def test_where_all_subsets_agree_the_error_is_not_nought():
    scores = measure(real=normal(300, 2), fake=0.1 * normal(300, 2, seed=1)).scores
    assert scores["precision"].value == 1
    for score in scores.values():
        assert score.error > 1e-6
    assert cell_text((1.0, 1e-16)) == "1"


def test_the_command_takes_training_rows_and_the_spread(tmp_path, capsys):
    for name, seed in (("real", 0), ("fake", 1), ("train", 2)):
        np.save(tmp_path / f"{name}.npy", normal(60, 3, seed=seed).numpy())
    words = [f"--{it}={tmp_path / f'{it}.npy'}" for it in ("real", "fake", "train")]
    assert cli.main(["metrics", *words, "--standardise"]) == 0
    out = capsys.readouterr().out
    assert "nearer to rows trained on" in out
    assert "in units of the real spread" in out

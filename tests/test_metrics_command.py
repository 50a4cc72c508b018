"""`rkl metrics`: what it prints, as a table and as JSON, and what it says of a divergence."""

import json

import numpy as np
import pytest
import torch

from rkl import cli
from rkl.metrics.frechet import frechet_distance
from rkl.metrics.neighbours import prdc, prdc_ceiling
from rkl.metrics.samples import measure, read_features
from rkl.tables import cell_text


@pytest.fixture
def folder(tmp_path, monkeypatch):
    draw = np.random.default_rng(0)
    np.save(tmp_path / "real.npy", draw.normal(size=(300, 3)))
    np.save(tmp_path / "fake.npy", 0.7 * draw.normal(size=(200, 3)))
    np.save(tmp_path / "images.npy", draw.integers(0, 256, (80, 4, 4)).astype(np.uint8))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def printed(capsys, *words):
    assert cli.main(["metrics", *words]) == 0
    return capsys.readouterr().out


def test_the_table_shows_every_score_with_its_error_beside_the_ceiling(folder, capsys):
    real, fake = (read_features(it, folder / f"{it}.npy") for it in ("real", "fake"))
    lines = printed(capsys, "--real", "real.npy", "--fake", "fake.npy").splitlines()
    assert lines[0].startswith("200 fake against 300 real samples of 3 features; open balls")
    table = {line[:30].strip(): line[30:].split() for line in lines[3:11]}
    score, ceiling = prdc(real=real, fake=fake), prdc_ceiling(real=real)
    for name in score._fields:
        expected = [getattr(it, name) for it in (score, ceiling)]
        assert [table[name][0], table[name][2]] == [
            cell_text((it.value.item(), it.error.item())) for it in expected
        ]
    distance = frechet_distance(real=real, fake=fake)
    assert table["Fréchet distance"][0] == cell_text(
        (distance.value.item(), distance.error.item())
    )
    assert lines[-2].startswith("Real against real: one half against the other, 150 and 150.")
    assert lines[-1].startswith("Two samples of one distribution of these sizes score 0.8")


def test_json_holds_the_same_numbers_and_the_flags_are_heeded(folder, capsys):
    words = ["--real=real.npy", "--fake=fake.npy", "--k=3", "--inclusive", "--json", "--seed=1"]
    found = json.loads(printed(capsys, *words))
    real, fake = (read_features(it, folder / f"{it}.npy") for it in ("real", "fake"))
    expected = prdc(real=real, fake=fake, k=3, inclusive=True, seed=1)
    for name, score in expected._asdict().items():
        value, error = score.value.item(), score.error.item()
        assert found["scores"][name] == {"value": value, "error": error}
    assert found["real_against_real"].keys() == found["scores"].keys()
    assert "closed balls to neighbour 3" in found["about"]


def test_few_samples_have_neither_errors_nor_a_ceiling(folder, capsys):
    np.save("few.npy", np.random.default_rng(1).normal(size=(12, 3)))
    found = json.loads(printed(capsys, "--real=few.npy", "--fake=few.npy", "--json"))
    assert found["real_against_real"] == {}
    assert found["scores"]["precision"]["error"] is None
    assert found["notes"][0] == "Real and fake are the same samples: no score means anything."


def test_images_of_bytes_are_flattened(folder):
    pixels = read_features("real", folder / "images.npy")
    assert pixels.shape == (80, 16)
    assert pixels.dtype == torch.float32
    assert "16 features" in measure(real=pixels[:40], fake=pixels[40:]).about


def test_a_divergence_says_where_it_looks(capsys):
    assert cli.main(["divergences", "0.5*kl + 0.5*precision-recall(lam=4)"]) == 0
    told = capsys.readouterr().out
    assert "looks at" in told
    assert "atoms         0.5 at λ = 4" in told
    assert cli.main(["divergences", "akl"]) == 0
    assert "looks at" not in capsys.readouterr().out


def test_images_with_their_channels_elsewhere_are_refused_and_flat_ones_are_not(folder, capsys):
    """Flattened, [rows, 4, 4, 3] and [rows, 3, 4, 4] have the same number of features."""
    pixels = np.random.default_rng(0).normal(size=(80, 4, 4, 3))
    np.save(folder / "last.npy", pixels)
    np.save(folder / "first.npy", np.moveaxis(pixels, -1, 1))
    np.save(folder / "flat.npy", pixels.reshape(80, -1))
    assert cli.main(["metrics", "--real", "last.npy", "--fake", "first.npy"]) == 2
    said = capsys.readouterr().err
    assert "fake: samples of first.npy must have the shape of those of last.npy, [4, 4, 3]" in said
    assert "got [3, 4, 4]" in said
    assert "48 features" in printed(capsys, "--real", "last.npy", "--fake", "flat.npy")
    np.save(folder / "grey.npy", pixels[:, None, :, :, 0])
    np.save(folder / "plain.npy", pixels[..., 1])
    assert "16 features" in printed(capsys, "--real", "grey.npy", "--fake", "plain.npy")

"""No file of arrays is unpickled, whichever verb reads it: a pickle can run any command."""

import pickle

import numpy as np
import pytest

from rkl import cli
from rkl.bayes import read_draws


class Payload:
    """Writes a file beside itself once something unpickles it."""

    def __reduce__(self):
        return open, ("executed", "w")


def objects():
    return np.array([Payload(), 0], dtype=object)


@pytest.fixture
def hostile(tmp_path, monkeypatch):
    """A folder with arrays of objects under every name that a verb reads arrays from."""
    monkeypatch.chdir(tmp_path)
    good = np.random.default_rng(0).normal(size=(40, 2))
    np.save("good.npy", good)
    np.save("objects.npy", objects(), allow_pickle=True)
    np.savez("objects.npz", x=objects(), allow_pickle=True)
    np.savez("condition.npz", x=good, condition=objects(), allow_pickle=True)
    for suffix in ("npy", "npz"):  # no array at all: NumPy takes what is neither for a pickle
        with open(f"bare.{suffix}", "wb") as file:
            pickle.dump(Payload(), file)
    return tmp_path


FIT = ["--flow", "coupling", "--steps", "1", "--out", "out"]
NAMES = ["objects.npy", "objects.npz", "bare.npy", "bare.npz"]
LINES = {
    "fit --data {}": NAMES,
    "fit --data good.npy --labels {}": NAMES,
    "fit --target mog4 --data {}": [*NAMES, "condition.npz"],
    "metrics --real {} --fake good.npy": NAMES,
    "metrics --real good.npy --fake {}": NAMES,
    "estimate {} --family normal(loc=x,scale=1)": NAMES,
}


@pytest.mark.parametrize(
    ("line", "name"), [(line, name) for line, names in LINES.items() for name in names]
)
def test_no_verb_unpickles_an_array(line, name, hostile, capsys):
    code = cli.main([*line.format(name).split(), *(FIT if line.startswith("fit") else [])])
    said = capsys.readouterr().err
    assert not (hostile / "executed").exists()
    assert code == 2
    assert said.count("\n") == 1
    assert name in said
    assert not (hostile / "out").exists()


def test_draws_are_read_without_unpickling(hostile):
    for name in ("objects.npy", "objects.npz", "bare.npz"):
        with pytest.raises((ValueError, TypeError), match=name):
            read_draws(name)
    assert not (hostile / "executed").exists()

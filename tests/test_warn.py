"""Warnings point at the line of the user's code, not at rkl's or at that of a decorator."""

import threading
import warnings
from pathlib import Path

import pytest
import torch

import rkl
from rkl.checks import warn
from rkl.fit import fit_to_samples
from rkl.flows import Coupling
from rkl.metrics.neighbours import prdc
from rkl.randomness import one_at_a_time


def samples():
    return torch.randn(60, 2, generator=torch.Generator().manual_seed(0))


def measure_samples_by_themselves():
    prdc(real=samples(), fake=samples())


def fit_beside_another():
    """A fit that has to wait, which a function within two decorators says."""
    held, enough = threading.Event(), threading.Event()

    def hold():
        with one_at_a_time():
            held.set()
            enough.wait(60)

    other = threading.Thread(target=hold)
    other.start()
    held.wait(60)
    threading.Timer(0.5, enough.set).start()
    fit_to_samples(Coupling(2, (8,)), samples(), steps=20)
    other.join()


@pytest.mark.parametrize("call", [measure_samples_by_themselves, fit_beside_another])
def test_a_warning_points_at_the_line_that_called_rkl(call):
    with pytest.warns(UserWarning, match="same samples|another fit") as said:
        call()
    assert {it.filename for it in said} == {__file__}


def test_a_warning_from_rkl_alone_has_a_place_too():
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        warn("odd")
    assert [(str(it.message), it.filename) for it in said] == [("odd", __file__)]


def test_nothing_in_rkl_warns_otherwise():
    source = Path(rkl.__file__).parent
    others = (it for it in source.rglob("*.py") if it.name != "checks.py")
    assert [it.name for it in others if "warnings.warn(" in it.read_text("utf-8")] == []

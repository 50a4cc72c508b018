"""The page with the slider computes what rkl computes, in a real browser."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from test_browser import Browser, browser, pytestmark  # noqa: F401

import rkl
from rkl.metrics import pr_curve

DOCS = Path(__file__).parents[1] / "docs"
PAGE = DOCS / "site" / "static" / "divergence.html"
CHOICES = [
    ("mix", 0.5, 0.5 * rkl.KL() + 0.5 * rkl.ReverseKL()),
    ("mix", 1.0, rkl.KL()),
    ("mix", 0.0, rkl.ReverseKL()),
    ("akl", 0.5, rkl.AKL(mu=0.5)),
    ("amari", 0.3, rkl.Amari(alpha=0.3)),
    ("js", 0.5, rkl.JensenShannon()),
    ("js", 0.1, rkl.JensenShannon(beta=0.1)),
    ("precision", 1.0, rkl.PrecisionHalf(lam=10.0)),
    ("precision", -0.5, rkl.PrecisionHalf(lam=10**-0.5)),
]


def one_bump():
    """The script that draws the picture of the README."""
    spec = importlib.util.spec_from_file_location("one_bump", DOCS / "images" / "one_bump.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def test_the_page_is_small_and_asks_for_nothing():
    text = PAGE.read_text("utf-8")
    assert len(text.encode()) < 50_000
    assert "://" not in text
    assert "default-src 'none'" in text


@pytest.mark.parametrize(("kind", "value", "divergence"), CHOICES, ids=lambda it: str(it)[:40])
def test_the_fit_is_that_of_rkl(browser, monkeypatch, kind, value, divergence):  # noqa: F811
    """Adam in double precision there and in single here: 300 steps differ by less than 1e-3.

    A constant of a gradient that the page got wrong moves the mean or the width by more than 0.01.
    """
    script = one_bump()
    monkeypatch.setattr(script, "STEPS", 300)
    x = torch.linspace(-6, 6, 121)
    logp = script.two_bumps(x)
    logq = script.fit(divergence, logp, x).double()
    q = logq.exp()
    browser.show(PAGE, width=1280, scheme="light")
    found = browser.evaluate(f"fit({kind!r}, {value!r}, 300)")
    mean = (q * x).sum().item()
    assert found["mean"] == pytest.approx(mean, abs=2e-3)
    assert found["sd"] == pytest.approx((q * (x - mean) ** 2).sum().sqrt().item(), abs=2e-3)
    assert np.abs(np.array(found["q"]) - q.numpy()).max() < 2e-4

    # what is said of a q is compared at the page's own q
    theirs = torch.tensor(found["q"], dtype=torch.float64)
    p = logp.double().log_softmax(-1)
    expected = divergence(p[None], theirs.log()[None]).item()
    assert found["divergence"] == pytest.approx(expected, rel=1e-5, abs=1e-7)
    slopes = torch.tensor(found["slopes"], dtype=torch.float64)
    curve = pr_curve(p=p, q=theirs.log(), slopes=slopes)
    assert found["precision"] == pytest.approx(curve.precision.tolist(), abs=1e-6)
    assert found["recall"] == pytest.approx(curve.recall.tolist(), rel=1e-5)
    assert found["invented"] == pytest.approx(theirs[theirs > 10 * p.exp()].sum().item(), abs=1e-6)
    assert found["missed"] == pytest.approx(p.exp()[p.exp() > 10 * theirs].sum().item(), abs=1e-6)
    assert sum(found["gaps"]) == pytest.approx((p.exp() - theirs).abs().sum().item(), abs=1e-6)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_slider_moves_every_panel(browser, width, scheme):  # noqa: F811
    browser.show(PAGE, width=width, scheme=scheme)
    assert browser.said() == []
    assert browser.requested() == [PAGE.as_uri()]
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    read = "['bump', 'ranks', 'curve'].map(id => document.getElementById(id).innerHTML)"
    before = browser.evaluate(read)
    browser.evaluate(
        "element('value').value = 1; element('value').dispatchEvent(new Event('input'))"
    )
    after = browser.evaluate(read)
    assert all(one != other for one, other in zip(before, after, strict=True))
    assert all("NaN" not in panel for panel in after)
    for kind in ("akl", "amari", "js", "precision"):
        browser.evaluate(
            f"element('kind').value = '{kind}'; element('kind').dispatchEvent(new Event('change'))"
        )
        assert "NaN" not in "".join(browser.evaluate(read)), kind
    assert browser.said() == []

"""A divergence is spelt on the command line as Python prints it."""

import os

import pytest
from catalogued import every

import rkl


@every
def test_parse_reads_what_repr_prints(divergence):
    assert rkl.parse(repr(divergence)) == divergence


@pytest.mark.parametrize(
    ("text", "divergence"),
    [
        ("reverse-kl", rkl.ReverseKL()),
        ("forward-kl", rkl.KL()),
        ("js(beta=0.1)", rkl.JensenShannon(0.1)),
        ("todi", rkl.ToDi()),
        ("JSD", rkl.JensenShannon()),
        ("Reverse_KL", rkl.ReverseKL()),
        ("rkl + fkl", rkl.ReverseKL() + rkl.KL()),
        ("akl(mu=0.3, straddle='head')", rkl.AKL(0.3, "head")),
        ("0.5*kl + 0.5*reverse-kl", 0.5 * rkl.KL() + 0.5 * rkl.ReverseKL()),
        ("1e-3*kl+to-di()", 1e-3 * rkl.KL() + rkl.ToDi()),
        ("2*(kl + akl)", 2 * rkl.KL() + 2 * rkl.AKL()),
        ("rkl.divergences:AKL(mu=0.1)", rkl.AKL(0.1)),
        ("amari(alpha=-2)", rkl.Amari(-2)),
    ],
)
def test_parse_reads_kebab_case_sums_scalings_and_imports(text, divergence):
    assert rkl.parse(text) == divergence


def normal(loc, scale=1.0):
    return loc, scale


def test_parse_reads_another_catalogue_with_its_names():
    assert rkl.parse("normal(loc=mu, scale=2)", {"normal": normal}, ("mu",)) == ("mu", 2)
    with pytest.raises(ValueError, match="loc must be one of mu; got nu"):
        rkl.parse("normal(loc=nu)", {"normal": normal}, ("mu",))
    with pytest.raises(ValueError, match="loc"):
        rkl.parse("normal", {"normal": normal})
    with pytest.raises(ValueError, match=r"expected name\(setting=value\)"):
        rkl.parse("normal(loc=1) + normal(loc=1)", {"normal": normal})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("backward-kl", "none is called 'backward-kl'.*; there are akl, alpha-beta"),
        ("revrse-kl", r"none is called 'revrse-kl' \(did you mean reverse-kl\?\)"),
        ("precision-recall(0.5)", "precision-recall takes its settings by name"),
        ("jensen-shannon(beta=0.5", "was never closed"),
        ("akl)", "unmatched"),
        ("akl(nu=1)", "akl has no setting 'nu'; it has mu, straddle"),
        ("akl(mu=0.1, mu=0.2)", "akl is given mu twice"),
        ("kl(mu=1)", "kl has no setting 'mu'; it has no settings"),
        ("akl(mu=7)", r"mu must be finite, at least 0, below 1; got 7"),
        ("akl(mu='a')", "mu must be a number; got 'a'"),
        ("akl(mu=nu)", "mu must be a number or a string; got nu"),
        ("akl(mu=__import__('os'))", "mu must be a number or a string; got __import__"),
        ("akl(**kl)", r"not as \*\*"),
        ("-1*kl", "weights must be positive"),
        ("0*kl", "the weight must be finite, above 0; got 0"),
        ("9" * 400 + "*kl", "the weight must be finite, above 0; got an integer of 1,329 bits"),
        ("9" * 400 + "*(kl + 0.5*akl)", "the weight must be finite, above 0; got an integer"),
        ("1e300*(kl + 1e300*akl)", "the weight must be finite, above 0; got inf"),
        ("kl - kl", "expected names, weights and sums"),
        ("kl*0.5", "expected names, weights and sums"),
        ("kl()()", "expected names, weights and sums"),
        ("kl.integrand", "none is called"),
        ("", "it is empty"),
        ("no_such_package:Mine", "cannot be imported: No module named 'no_such_package'"),
        ("rkl.divergences:Mine", "cannot be imported"),
        ("torch.nn:Identity", "not a Divergence"),
        ("(" * 5000 + "kl" + ")" * 5000, "Cannot read"),
    ],
)
def test_parse_says_what_it_cannot_read(text, message):
    with pytest.raises(ValueError, match=message) as error:
        rkl.parse(text)
    assert f"Cannot read {text[:200]!r}" in str(error.value)


def test_parse_calls_nothing_that_is_not_a_divergence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "mkdir", lambda: (tmp_path / "called").touch())
    with pytest.raises(ValueError, match="not a Divergence"):
        rkl.parse("os:mkdir")
    assert not any(tmp_path.iterdir())


def test_parse_refuses_what_is_no_text():
    with pytest.raises(TypeError, match="text must be a string"):
        rkl.parse(rkl.KL())

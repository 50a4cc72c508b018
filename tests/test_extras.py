"""Packages that extras bring: what works without them, and what to type where it does not."""

import importlib
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from rkl.cli import main
from rkl.cli.commands import COMMANDS
from rkl.extras import EXTRAS, optional_import, require
from rkl.runs import Run

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8"))
IMPORTED_AS = {"pillow": "PIL", "scikit-learn": "sklearn", "huggingface-hub": "huggingface_hub"}
ADVICE = re.compile(r"[\w.][\w. /]* needs (\w+): pip install 'rkl\[(\w+)\]'")
NEEDED_BY = {"rkl.fit": "flows", "rkl.sample": "flows"} | {
    f"rkl.{name}": name for name in ("distill", "flows", "bayes", "metrics")
}

# An interpreter in which PACKAGES are not installed: the path has them, and nobody finds them.
WITHOUT = """
import contextlib, importlib, io, json, sys
from importlib.machinery import PathFinder

packages, find_spec = set(json.loads(sys.argv[1])), PathFinder.find_spec

def find_what_is_left(name, path=None, target=None):
    return None if name.partition(".")[0] in packages else find_spec(name, path, target)

PathFinder.find_spec = staticmethod(find_what_is_left)
"""


def without(packages, code):
    """What some code prints, as JSON, in an interpreter without some packages."""
    words = [sys.executable, "-c", WITHOUT + code, json.dumps(sorted(packages))]
    ended = subprocess.run(words, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


BEYOND_THE_CORE = {name for them in EXTRAS.values() for name in them.split()} - {
    "jinja2",  # torch itself needs these two
    "markupsafe",
}


def test_every_extra_has_the_packages_of_pyproject():
    declared = {}
    for extra, requirements in PROJECT["project"]["optional-dependencies"].items():
        names = [re.match(r"[\w-]+", it).group() for it in requirements]
        declared[extra] = {IMPORTED_AS.get(name, name) for name in names}
    everything = PROJECT["project"]["optional-dependencies"]["all"]
    del declared["all"]
    assert declared == {extra: set(them.split()) for extra, them in EXTRAS.items()}
    assert everything == [f"rkl[{','.join(declared)}]"]


NAMES = """
found = {}
for package in ["rkl", *(f"rkl.{name}" for name in sys.argv[2:] or WINGS)]:
    module = importlib.import_module(package)
    for name in dir(module):
        try:
            getattr(module, name)
        except Exception as error:
            found[f"{package}.{name}"] = [type(error).__name__, str(error)]
        else:
            found[f"{package}.{name}"] = None
json.dump(found, sys.stdout)
""".replace("WINGS", repr([*(it.removeprefix("rkl.") for it in NEEDED_BY), "stats"]))


def test_every_public_name_resolves_with_the_core_alone_or_says_what_to_type():
    found = without(BEYOND_THE_CORE, NAMES)
    refused = {name: error for name, error in found.items() if error is not None}
    for name, (kind, message) in refused.items():
        advice = ADVICE.fullmatch(message)
        assert kind == "ModuleNotFoundError", (name, message)
        assert advice, (name, message)
        assert message.startswith(f"{name} needs "), message
        assert advice[2] == NEEDED_BY[name.rpartition(".")[0]], message
        assert advice[1] in EXTRAS[advice[2]].split(), message
    assert {name.rpartition(".")[0] for name in refused} == {"rkl.distill", "rkl.bayes"}
    assert {"rkl.distill.DistillTrainer", "rkl.bayes.read_draws"} <= refused.keys()


COMMAND = """
from rkl import cli

def answer(*words):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        with contextlib.redirect_stderr(io.StringIO()) as err:
            try:
                code = cli.main(words)
            except SystemExit as end:
                code = end.code
    return code or 0, out.getvalue(), err.getvalue()

json.dump([answer(*words) for words in WORDS], sys.stdout)
"""


def answers(packages, *words):
    """Exit code, output and errors of commands, in an interpreter without some packages."""
    return without(packages, COMMAND.replace("WORDS", repr(words)))


def test_every_command_shows_its_help_with_the_core_alone_or_says_what_to_type():
    words = [[], *([name] for name in COMMANDS)]
    shown = answers(BEYOND_THE_CORE, *([*it, "--help"] for it in words))
    refused = set()
    for it, (code, out, err) in zip(words, shown, strict=True):
        if code:
            advice = ADVICE.search(err)
            assert err == f"rkl: error: {advice[0]}\n", err
            assert advice[0].startswith(f"rkl {it[0]} needs "), err
            refused.update(it)
        else:
            assert out.startswith(f"usage: {' '.join(['rkl', *it])} "), out
            assert err == ""
            for line in re.findall("  not shown: (.*)", out):
                assert ADVICE.search(line), line
    assert refused == {"cache", "estimate"}  # whose settings are beside what reads models, draws


def test_divergences_and_exact_losses_work_with_the_core_alone():
    listed, explained = answers(BEYOND_THE_CORE, ["divergences"], ["divergences", "akl"])
    assert (listed[0], explained[0]) == (0, 0)
    assert "reverse-kl" in listed[1]
    assert "adaptive" in explained[1].lower()
    code = """
import torch, rkl
p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
loss = rkl.exact(rkl.KL(), p=p, q=q)
drawn = rkl.draw(p.expand(4000, 2), 1, generator=torch.Generator().manual_seed(0))
json.dump([loss.item(), type(drawn).__name__], sys.stdout)
"""
    loss, drawn = without(BEYOND_THE_CORE, code)
    assert loss == pytest.approx(0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75), rel=1e-5)
    assert drawn == "Sampled"


def test_what_a_command_lacks_is_one_line_and_nothing_is_written(tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(50, 2)))
    (tmp_path / "x.csv").write_text("a,b\n1,2\n3,4\n")
    (tmp_path / "x.nc").write_bytes(b"\x89HDF\r\n\x1a\n")
    before = sorted(tmp_path.iterdir())
    x, table, net, out = (str(tmp_path / it) for it in ("x.npy", "x.csv", "x.nc", "run"))
    asked = {
        "distill": ["distill", "--teacher", "t", "--student", "s", "--data", table, "--out", out],
        "flows": ["fit", "--data", x, "--flow", "nsf", "--out", out],
        "metrics": ["metrics", "--real", table, "--fake", table],
        "bayes": ["estimate", net, "--family", "normal(loc=mu, scale=sigma)"],
        "report": ["demo", "neyman-scott", "--out", out],
    }
    for extra, (code, printed, err) in zip(
        asked, answers(BEYOND_THE_CORE, *asked.values()), strict=True
    ):
        assert (code, printed) == (1, "")
        advice = ADVICE.search(err)
        assert err.rstrip("\n").endswith(advice[0]), err
        assert err.count("\n") == 1, err
        assert advice[2] == extra, err
    assert sorted(tmp_path.iterdir()) == before


def test_the_part_of_rkl_that_asks_decides_on_the_extra(tmp_path):
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    code = f"""
import rkl.fit, rkl.metrics.samples, rkl.readers
file, said = {str(tmp_path / "x.csv")!r}, []
for read in (rkl.fit.read_data, lambda it: rkl.metrics.samples.read_both(it, it, None)):
    try:
        read(file)
    except ModuleNotFoundError as error:
        said.append(str(error))
json.dump(said, sys.stdout)
"""
    fit, metrics = without({"pandas"}, code)
    assert fit.endswith("needs pandas: pip install 'rkl[flows]'")
    assert metrics.endswith("needs pandas: pip install 'rkl[metrics]'")


def test_a_package_that_no_extra_has_is_reported_as_python_does():
    refused = pytest.raises(ModuleNotFoundError, match="^No module named 'nobody_has_it'$")
    with refused, optional_import("A flow"):
        importlib.import_module("nobody_has_it")


def test_what_is_there_is_not_refused(monkeypatch):
    require("report", "A report")
    monkeypatch.setitem(EXTRAS, "report", "nobody_has_it")
    with pytest.raises(ModuleNotFoundError, match=r"A report needs nobody_has_it: .*\[report\]'"):
        require("report", "A report")


def assert_report_is_refused(run, capsys):
    capsys.readouterr()
    assert main(["report", str(run)]) == 1
    assert capsys.readouterr().err == (
        "rkl: error: A figure needs matplotlib: pip install 'rkl[report]'\n"
    )
    assert not (run / "report.html").exists()


def test_a_fit_and_its_samples_need_no_report(no_matplotlib, tmp_path, capsys):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(200, 2)))
    words = ["--flow", "coupling(transforms=2, hidden=(8,))", "--steps", "5", "--batch", "32"]
    run, drawn = tmp_path / "run", tmp_path / "drawn.npy"
    assert main(["fit", "--data", str(tmp_path / "x.npy"), *words, "--out", str(run)]) == 0
    assert Run.open(run).record["status"] == "finished"
    assert main(["sample", str(run), "-n", "20", "--out", str(drawn)]) == 0
    assert np.load(drawn).shape == (20, 2)
    assert_report_is_refused(run, capsys)


def test_a_fit_to_a_target_needs_no_report(no_matplotlib, tmp_path, capsys):
    words = ["--target", "xy(side=4)", "--flow", "coarse-to-fine(width=4)", "--batch", "64"]
    run = tmp_path / "run"
    assert main(["fit", *words, "--steps", "3", "--out", str(run)]) == 0
    assert Run.open(run).record["status"] == "finished"
    assert (
        main(
            [
                "sample",
                str(run),
                "-n",
                "20",
                "--condition",
                "T=0.9",
                "--out",
                str(tmp_path / "chain.npz"),
            ]
        )
        == 0
    )
    assert_report_is_refused(run, capsys)


def test_an_estimate_needs_no_report_and_says_how_to_get_one(no_matplotlib, tmp_path, capsys):
    rng, run = np.random.default_rng(0), tmp_path / "run"
    draws = xr.Dataset({"lam": (("chain", "draw"), rng.gamma(5, size=(2, 200)))})
    file = tmp_path / "posterior.nc"
    xr.DataTree.from_dict({"posterior": draws}).to_netcdf(file, engine="h5netcdf")
    capsys.readouterr()
    words = ["estimate", str(file), "--family", "poisson(rate=lam)", "--out", str(run)]
    with pytest.warns(UserWarning, match=r"No report was written\.$") as warned:
        assert main(words) == 0
    assert [str(it.message) for it in warned] == [
        "A figure needs matplotlib: pip install 'rkl[report]', then type "
        f"rkl report {run}. No report was written."
    ]
    assert "The report" not in capsys.readouterr().out
    assert (run / "estimate.json").exists()
    assert_report_is_refused(run, capsys)

"""A run folder from somebody else: whatever its run.json says, nothing of it is executed."""

import contextlib
import io
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

import rkl
from rkl.cli import main

sys.path.append(str(Path(__file__).parent / "distill"))
import material

HOSTILE = {
    "a class": "subprocess:Popen(args=('touch', 'PWNED'))",
    "a function": "os:system('touch PWNED')",
    "a module of the folder": "payload:X",
    "one in a sum": "0.5*kl + 0.5*payload:X(side=4)",
    "one in a term": "1.0*target:payload:X",
    "a code": "__import__('os').system('touch PWNED')",
    "a format": "{0.__class__} {settings}",
    "a template": "{{ cycler.__init__.__globals__.os.system('touch PWNED') }}",
}
PAYLOAD = "open('PWNED', 'w').write('imported')\n\n\nclass X:\n    pass\n"


def answer(*words):
    """The exit code of a command, and the last line that it says of an error."""
    err = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
        code = main([str(word) for word in words])
    return code, err.getvalue()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A finished run of each kind, as small as can be, and what they were made of."""
    folder = tmp_path_factory.mktemp("runs")
    material.write(folder)
    rng = np.random.default_rng(0)
    np.save(folder / "x.npy", rng.standard_normal((300, 2)).astype(np.float32))
    draws = {"mu": (("chain", "draw"), rng.standard_normal((2, 60)))}
    draws["sigma"] = (("chain", "draw"), rng.random((2, 60)) + 1)
    xr.Dataset(draws).to_netcdf(folder / "post.nc", engine="h5netcdf")
    small = ["--flow", "coupling(transforms=1, hidden=(4,))", "--steps", "2", "--batch", "16"]
    family = "normal(loc=mu, scale=sigma)"
    models = ["--teacher", folder / "teacher", "--student", folder / "student"]
    quick = ["--max-steps", "1", "--max-length", "8", "--batch-size", "2", "--no-compiled"]
    for name, words in {
        "data": ["fit", "--data", folder / "x.npy", *small],
        "target": ["fit", "--target", "mog4", *small, "--strata", "2", "--no-anneal"],
        "estimate": ["estimate", folder / "post.nc", "--family", family, "--losses", "kl"],
        "distill": ["distill", *models, "--data", folder / "text.txt", *quick],
    }.items():
        code, said = answer(*words, "--out", folder / name)
        assert code == 0, said
    return folder


def keys(value, at=()):
    """Every place in nested dictionaries and lists, the places within them too."""
    inside = value.items() if isinstance(value, dict) else enumerate(value)
    for key, below in inside:
        yield (*at, key)
        if isinstance(below, dict | list):
            yield from keys(below, (*at, key))


def changed(record, place, value):
    record = json.loads(json.dumps(record))
    inner = record
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return record


def verbs(kind, whole):
    """The commands that read a run of this kind in R, each as small as can be."""
    common = {"report": ["report", "R", "--out", "r.html"], "compare": ["compare", "R", "R"]}
    if kind == "estimate":
        made = ["estimate", "--config", "R", "--out", "N"]
        return common | {
            "config": made,
            "evaluate": ["evaluate", "R", "--posterior", whole / "post.nc"],
        }
    if kind == "distill":
        held_out = ["--data", whole / "rows.jsonl", "--split", "train"]
        few = ["--max-blocks", "2", "--prompts", "0", "--device", "cpu"]
        return common | {
            "evaluate": ["evaluate", "R", *held_out, *few],
            "generate": ["generate", "R", *held_out, "--prompts", "1", "--max-new-tokens", "1"],
            "config": ["distill", "--config", "R", "--out", "N"],
            "resume": ["distill", "--out", "R", "--resume"],
        }
    rows = ["--data", whole / "x.npy"] if kind == "data" else ["--draws", "4", "--values", "1"]
    at = [] if kind == "data" else ["--condition", "scale=0.5"]
    return common | {
        "sample": ["sample", "R", "-n", "8", *at],
        "evaluate": ["evaluate", "R", *rows],
        "config": ["fit", "--config", "R", "--out", "N"],
        "start": [
            "fit",
            "--start-from",
            "R",
            "--distil-budget",
            "2",
            "--steps",
            "1",
            "--out",
            "N",
        ],
        "resume": ["fit", "--out", "R", "--resume"],
    }


@pytest.fixture
def gift(runs, tmp_path, monkeypatch):
    """A function that puts a value in a run.json, and says what a verb makes of it.

    It fails where anything was executed or imported, or a Python exception comes through.
    """
    monkeypatch.chdir(tmp_path)
    Path("payload.py").write_text(PAYLOAD)

    def opened(kind, place, value, *words):
        for folder in ("R", "N"):
            shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(runs / kind, "R")
        record = json.loads(Path("R/run.json").read_text())
        Path("R/run.json").write_text(json.dumps(changed(record, place, value)))
        before = set(sys.modules)
        if words == ("load",):
            code, said = loaded("R")
        else:
            code, said = answer(*words)
        imported = {it for it in sys.modules if it in ("payload", "N", "R")} - before
        assert not Path("PWNED").exists(), (kind, place, value, words)
        assert not imported, (kind, place, value, words)
        lacks = "No module named 'datasets'" in said  # which would look for a name on the Hub
        assert code in (0, 2) or lacks, (kind, place, value, words, said)
        assert code == 0 or said.splitlines()[-1].startswith("rkl: error: "), said
        return code, said

    return opened


def loaded(path):
    try:
        rkl.load(path)
    except (ValueError, TypeError, FileNotFoundError) as error:
        return 2, f"rkl: error: {' '.join(str(error).split())}"
    return 0, ""


# The settings that are read into an object, with a text in them that would be imported.
READ = {
    ("data", "flow"): "payload:X(width=8)",
    ("data", "divergence"): "0.5*kl + 0.5*payload:X",
    ("target", "target"): "payload:X(side=4)",
    ("target", "flow"): "payload:X",
    ("target", "divergence"): "payload:X",
    ("target", "objective"): "1.0*target:payload:X + 1.0*data:kl",
    ("estimate", "family"): "payload:X(loc=mu)",
    ("estimate", "divergence"): "payload:X",
    ("estimate", "losses"): ["kl", "payload:X"],
    ("distill", "divergence"): "payload:X",
}
# The verbs that make these settings into objects; the others only show them as text.
MAKE = {
    "data": ["report", "sample", "evaluate", "config", "resume", "load"],
    "target": ["report", "sample", "evaluate", "config", "resume", "load"],
    "estimate": ["evaluate", "config", "load"],
    "distill": ["evaluate", "config", "resume"],
}


@pytest.mark.parametrize(("kind", "name"), READ, ids=map("-".join, READ))
def test_what_a_run_names_is_not_imported_by_any_verb_and_what_to_type_is_said(
    kind, name, runs, gift
):
    words = verbs(kind, runs) | {"load": ["load"]}
    for verb in MAKE[kind]:
        if (kind, name, verb) in {
            ("estimate", "losses", "evaluate"),
            ("estimate", "losses", "load"),
        }:
            continue  # the losses of the comparison are not made again
        code, said = gift(kind, ("settings", name), READ[kind, name], *words[verb])
        assert code == 2, (verb, said)
        assert "--allow payload:X" in said, (verb, said)


@pytest.mark.parametrize("value", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize(("kind", "name"), READ, ids=map("-".join, READ))
def test_no_text_of_a_run_is_executed(kind, name, value, runs, gift):
    words = verbs(kind, runs) | {"load": ["load"]}
    for verb in ("load", "config") if kind != "distill" else ("config",):
        gift(kind, ("settings", name), value, *words[verb])


KINDS = [
    "payload",
    "os",
    "cli.__main__",
    "cli",
    "studies.demo",
    "studies.akl",
    "studies",
    "kernels",
]


@pytest.mark.parametrize(
    "name", [*KINDS, "fit", "sample", "bayes", "distill", "../x", "fit.run", "kernels"]
)
def test_a_run_of_another_kind_is_refused_in_one_line(name, runs, gift):
    for kind in ("data", "estimate"):
        for verb, words in (verbs(kind, runs) | {"load": ["load"]}).items():
            other = name != {"data": "fit", "estimate": "bayes"}[kind]
            if other and verb in ("report", "load", "evaluate", "compare"):
                code, _said = gift(kind, ("kind",), name, *words)
                # the report of a distillation shows what is logged, whatever it is
                assert code == 2 or (name, verb) == ("distill", "report")


@pytest.mark.malformed
@pytest.mark.filterwarnings("default")  # such as of a chain that never moved
@pytest.mark.parametrize("kind", ["data", "target", "estimate", "distill"])
@pytest.mark.parametrize("value", HOSTILE.values(), ids=HOSTILE)
def test_no_key_of_a_run_executes_anything_in_any_verb(kind, value, runs, gift):
    record = json.loads((runs / kind / "run.json").read_text())
    for place in keys(record):
        for verb, words in (verbs(kind, runs) | {"load": ["load"]}).items():
            if (kind, verb) == ("target", "report") and place[0] != "settings":
                continue  # which measures the flow again, and takes ten seconds
            gift(kind, place, value, *words)

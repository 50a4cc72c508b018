"""Every setting of every verb, spoilt in every way that its type allows, through the command line.

Whatever is asked for is done, or refused in one line that names the setting or the file; where
doing it fails, that line names the cause. A Python exception never comes out.
"""

import dataclasses
import re
import shutil
import signal
import types
import typing
import zlib
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from distill import material

from rkl import cli
from rkl.bayes.settings import EstimateSettings
from rkl.bayes.settings import EvaluateSettings as EvaluateEstimate
from rkl.distill.evaluate import EvaluateSettings
from rkl.distill.generate import GenerateSettings
from rkl.distill.settings import DistillSettings
from rkl.fit import EvaluateSettings as EvaluateFit
from rkl.fit.settings import FitSettings, SampleSettings
from rkl.sample.settings import SampleSettings as SampleTarget
from rkl.sample.settings import TargetSettings

SECONDS = 100  # in which a case that is done must be done
NASTY = {
    int: ["0", "-1", "1000000000000000000", str(2**63), "1" * 400, "1.5", "", "nan"],
    float: ["0", "-1", "nan", "inf", "-inf", "1e300", "1e-300", "0.999", "1" * 400, "", "x"],
    str: ["", " ", "x" * 5000, "a\0b", "\ud83d", ".", "nothing", "text.txt", "(" * 3000, "é=1"],
    Path: ["", ".", "nothing", "missing/x", "text.txt", "x" * 5000, "a\0b", "\ud83d.npy"],
}
FLOW = "--flow=coupling(transforms=2)", "--steps=2"
WORDS = {  # what is asked for where nothing is spoilt, and the settings of its flags
    "fit": (
        ["--data=x.npy", "--flow=coupling(transforms=2)", "--steps=2", "--out=new"],
        FitSettings,
    ),
    "fit --critic": (
        ["--data=x.npy", "--flow=coupling(transforms=2)", "--steps=2", "--critic", "--out=new"],
        FitSettings,
    ),
    "fit --target": (["--target=mog4", "--steps=2", "--batch=64", "--out=new"], TargetSettings),
    "sample": (["fitted", "-n=20", "--out=samples.npy"], SampleSettings),
    "sample --target": (
        ["sampled", "-n=20", "--condition=scale=0.9", "--out=samples.npy"],
        SampleTarget,
    ),
    "estimate": (["posterior.nc", "--family=normal(loc=mu, scale=sigma)"], EstimateSettings),
    "distill": (
        [
            *("--teacher=teacher", "--student=student", "--data=text.txt", "--out=new"),
            *("--max-steps=1", "--max-length=16", "--batch-size=2", "--eval-blocks=1"),
            *("--device=cpu", "--no-compiled", "--max-completion-length=4"),
        ],
        DistillSettings,
    ),
    "generate": (
        [
            *("distilled", "--data=prompts.jsonl", "--prompt-tokens=4", "--max-new-tokens=2"),
            "--device=cpu",
        ],
        GenerateSettings,
    ),
    "evaluate": (
        [
            *("distilled", "--data=text.txt", "--max-length=16", "--max-blocks=1", "--prompts=0"),
            "--device=cpu",
        ],
        EvaluateSettings,
    ),
    "evaluate a fit": (["fitted", "--data=x.npy"], EvaluateFit),
    "evaluate an estimate": (["estimated", "--posterior=posterior.nc"], EvaluateEstimate),
}


def kind_of(field, kinds):
    """The type of a setting apart from None, of one value if there may be several."""
    kind = kinds[field.name]
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        kind = next(it for it in typing.get_args(kind) if it is not types.NoneType)
    return typing.get_args(kind)[0] if typing.get_origin(kind) is tuple else kind


def cases():
    for verb, (_words, settings) in WORDS.items():
        kinds = typing.get_type_hints(settings)
        for field in dataclasses.fields(settings):
            for i in range(len(NASTY.get(kind_of(field, kinds), []))):
                yield pytest.param(verb, field.name, i, id=f"{verb}: {field.name}, {i}")


ALL = list(cases())
WITHOUT_RUNS = (
    "fit",
    "fit --target",
    "estimate",
)  # which need no model and no run, and so are quick
SOME = [it for it in ALL if it.values[0] in WITHOUT_RUNS and zlib.crc32(it.id.encode()) % 20 == 0]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("settings")
    draw = np.random.default_rng(0)
    np.save(folder / "x.npy", draw.normal(size=(80, 2)).astype("float32"))
    (folder / "text.txt").write_text("a text\n")
    (folder / "prompts.jsonl").write_text('{"prompt": "def", "completion": " a function"}\n' * 3)
    (folder / "nothing").mkdir()
    shape = ("chain", "draw")
    arrays = {"mu": (shape, draw.normal(size=(4, 50)))}
    arrays["sigma"] = (shape, np.exp(draw.normal(size=(4, 50))))
    path = folder / "posterior.nc"
    xr.Dataset(arrays).to_netcdf(path, engine="h5netcdf", group="posterior")
    return folder


@pytest.fixture(scope="module")
def with_runs(whole, tmp_path_factory):
    """The same folder with models, and a run of every kind."""
    folder = shutil.copytree(whole, tmp_path_factory.mktemp("runs") / "whole")
    material.write(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, verb in (
            ("fitted", "fit --critic"),
            ("sampled", "fit --target"),
            ("estimated", "estimate"),
            ("distilled", "distill"),
        ):
            words = [it for it in WORDS[verb][0] if not it.startswith("--out")]
            assert cli.main([verb.split()[0], *words, f"--out={name}"]) == 0
    return folder


def run(verb, words, capsys):
    """The exit code of a command, and what it complained of."""

    def stop(*_):
        raise AssertionError(f"{words} takes longer than {SECONDS} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        code = cli.main(words)
    finally:
        signal.alarm(0)
    lines = capsys.readouterr().err.splitlines()
    return code, [line for line in lines if line.startswith("rkl: error: ")]


def check(verb, name, i, whole, tmp_path, monkeypatch, capsys):
    """Spoil one setting of a verb, in a copy of the folder."""
    words, settings = WORDS[verb]
    field = next(it for it in dataclasses.fields(settings) if it.name == name)
    value = NASTY[kind_of(field, typing.get_type_hints(settings))][i]
    flag = f"-{name}" if len(name) == 1 else f"--{name.replace('_', '-')}"
    if field.metadata.get("positional"):
        words = [value, *words[1:]]
    else:
        words = [it for it in words if it.split("=")[0] != flag] + [f"{flag}={value}"]
    monkeypatch.chdir(shutil.copytree(whole, tmp_path / "here"))
    code, complaints = run(verb, [verb.split()[0], *words], capsys)
    assert len(complaints) == (code != 0)
    if code != 0:
        (line,) = complaints
        assert code in (1, 2)
        assert len(line) < 1000
        named = {name, name.upper(), name.replace("_", "-"), value[:20], repr(value)[1:-1][:20]}
        assert any(it and it in line for it in named) or code == 1, line
        assert not re.match(r"rkl: error: \w+(Error|Exception|Warning)\b", line), line
        assert "--debug shows where" not in line, line


@pytest.mark.malformed
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("verb", "name", "i"), ALL)
def test_a_spoilt_setting_is_refused_by_name(
    verb, name, i, with_runs, tmp_path, monkeypatch, capsys
):
    check(verb, name, i, with_runs, tmp_path, monkeypatch, capsys)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("verb", "name", "i"), SOME)
def test_some_spoilt_settings_are_refused_by_name(
    verb, name, i, whole, tmp_path, monkeypatch, capsys
):
    check(verb, name, i, whole, tmp_path, monkeypatch, capsys)

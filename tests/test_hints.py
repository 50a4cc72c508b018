"""What a command proposes after Ctrl-C is carried out, and does what was asked for."""

import itertools
import os
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from rkl import cli

sys.path.append(str(Path(__file__).parent / "distill"))
import material

pytestmark = [pytest.mark.kill, pytest.mark.filterwarnings("default")]
MODELS = "--teacher teacher --student student"
QUICK = "--max-steps 3 --max-length 8 --batch-size 2 --eval-blocks 2 --no-compiled --device cpu"
FLOW = "--flow 'coupling(transforms=1, hidden=(4,))' --steps 3 --batch 16"
FAMILY = "--family 'normal(loc=mu, scale=sigma)' --losses kl"
COMMANDS = {  # and what must be there at the end
    "distill": (f"distill {MODELS} --data text.txt {QUICK} --out new", "new/model.safetensors"),
    "cache": (
        "cache --teacher teacher --data text.txt --max-length 8 --device cpu --out new",
        "new/index.json",
    ),
    "fit": (f"fit --data x.npy {FLOW} --out new", "new/flow.safetensors"),
    "fit --target": (
        f"fit --target mog4 {FLOW} --strata 2 --no-anneal --out new",
        "new/flow.safetensors",
    ),
    "estimate": (f"estimate posterior.nc {FAMILY} --out new", "new/report.html"),
    "study": ("study akl --part toy --out new", "new/report.html"),
    "demo": ("demo neyman-scott --out new", "new/report.html"),
    "sample": ("sample fitted -n 20 --out new.npy", "new.npy"),
    "generate": (
        "generate distilled --data rows.jsonl --split train --prompts 2 --prompt-tokens 2 "
        "--max-new-tokens 2 --device cpu",
        "distilled/replies.jsonl",
    ),
    "evaluate": (
        "evaluate distilled --data text.txt --max-length 8 --max-blocks 2 --prompts 0 "
        "--device cpu",
        "distilled/evaluation.json",
    ),
    "evaluate a fit": ("evaluate fitted --data x.npy", "fitted/evaluation.json"),
    "report": ("report fitted", "fitted/report.html"),
    "report to a file": ("report distilled --out new.html", "new.html"),
    "compare": ("compare estimated estimated --out new.html", "new.html"),
    "metrics": ("metrics --real x.npy --fake x.npy", None),
    "divergences": ("divergences kl", None),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What the commands read: data, models, a run of every kind."""
    folder = tmp_path_factory.mktemp("whole")
    material.write(folder)
    draw = np.random.default_rng(0)
    np.save(folder / "x.npy", draw.normal(size=(200, 2)).astype("float32"))
    shape = ("chain", "draw")
    arrays = {"mu": (shape, draw.normal(size=(2, 60)))}
    arrays["sigma"] = (shape, np.exp(draw.normal(size=(2, 60))))
    xr.Dataset(arrays).to_netcdf(folder / "posterior.nc", engine="h5netcdf")
    made = {"distilled": "distill", "fitted": "fit", "estimated": "estimate"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, verb in made.items():
            words = COMMANDS[verb][0].replace("--out new", f"--out {name}")
            assert cli.main(shlex.split(words)) == 0
    return folder


class Interrupted:
    """A standard output at whose first use somebody presses Ctrl-C."""

    encoding = "utf-8"

    def write(self, text):
        raise KeyboardInterrupt

    def flush(self):
        pass

    def isatty(self):
        return False


@pytest.mark.parametrize("moment", [0, 1, 4])
@pytest.mark.parametrize("verb", COMMANDS)
def test_what_is_proposed_after_ctrl_c_does_what_was_asked(
    verb, moment, whole, tmp_path, monkeypatch, capsys
):
    """At the first file that is about to take its name, at the second, or at the fifth."""
    words, product = COMMANDS[verb]
    monkeypatch.chdir(shutil.copytree(whole, tmp_path / "here"))
    calls, replace = itertools.count(), os.replace

    def interrupted(*arguments, **how):
        if next(calls) == moment:
            raise KeyboardInterrupt
        return replace(*arguments, **how)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        if product is None:
            patch.setattr(sys, "stdout", Interrupted())
        code = cli.main(shlex.split(words))
    said = capsys.readouterr().err
    if next(calls) <= moment and product is not None:
        assert code == 0, said
        pytest.skip("it writes fewer files")
    assert code == 130, said
    program, *proposed = shlex.split(said.partition(" with: ")[2])
    assert program == "rkl"
    code = cli.main(proposed)
    assert code == 0, (proposed, capsys.readouterr().err)
    assert product is None or Path(product).is_file()

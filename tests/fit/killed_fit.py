"""Kill a fit while it writes, in processes forked from this one; run by test_flow_kill.py.

python killed_fit.py FOLDER replace|fsync data|target
"""

import os
import sys
from pathlib import Path

import numpy as np
import torch

from rkl.fit.run import fit
from rkl.fit.settings import FitSettings
from rkl.runs import Run
from rkl.sample.run import fit_target
from rkl.sample.settings import TargetSettings

KILLED = 137
EVERY = {"replace": 2, "fsync": 5}  # at each so-many-th of their calls
FLOW = "coupling(transforms=2, hidden=(8,))"


def begin_data(folder: Path, out: Path) -> None:
    """Begin a fit to data, or go on with what is there."""
    settings = FitSettings(folder / "data.npy", flow=FLOW, batch=16, steps=60, held_out=0.2)
    fit(settings, out, resume=True)


def begin_target(_: Path, out: Path) -> None:
    """Begin a fit to a target with a critic and draws of its own, or go on with it."""
    terms = "target:reverse-kl + critic:jensen-shannon"
    settings = TargetSettings("mog4", objective=terms, flow=FLOW, batch=16, strata=4, steps=60)
    fit_target(settings, out, resume=True)


def left(out: Path) -> list:
    """All that must not depend on whether it was killed, nor on the clock."""
    run = Run.open(out)
    rows = [{name: it for name, it in row.items() if name != "seconds"} for row in run.metrics]
    return [run.record["status"], rows, (out / "flow.safetensors").read_bytes()]


def forked(function, *arguments) -> int:
    """The exit status of a copy of this process that calls the function."""
    child = os.fork()
    if not child:
        status = 1
        try:
            function(*arguments)
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def begin_until(begin, name: str, call: int, folder: Path, out: Path) -> None:
    """The same, killed as the n-th call of a function of os begins."""
    function, calls = getattr(os, name), [0]

    def doomed(*arguments):
        calls[0] += 1
        if calls[0] == call:
            os._exit(KILLED)
        return function(*arguments)

    setattr(os, name, doomed)
    begin(folder, out)


def main(folder: Path, name: str, what: str) -> None:
    begin = {"data": begin_data, "target": begin_target}[what]
    torch.set_num_threads(1)
    np.save(folder / "data.npy", np.random.default_rng(0).normal(size=(50, 2)))
    assert forked(begin, folder, folder / "whole") == 0
    expected, kills = left(folder / "whole"), 0
    for call in range(1, 1000, EVERY[name]):
        out = folder / f"killed-{call}"
        if (status := forked(begin_until, begin, name, call, folder, out)) != KILLED:
            break
        assert forked(begin, folder, out) == 0
        assert left(out) == expected, f"killed at call {call} of {name}"
        assert not list(out.rglob(".*"))
        kills += 1
    assert status == 0, status
    print(kills)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])

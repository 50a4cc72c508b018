"""Runs of ``rkl distill --shard`` in double precision, one of them stopped; for test_processes.py.

Arguments: a folder with the models and the text, and the settings of the runs as JSON.
"""

import json
import os
import signal
import sys
from pathlib import Path

import material
import torch
from sharded_student import shares

from rkl.distill import prepare, run
from rkl.distill.models.loading import load_model
from rkl.distill.run import distill


def doubled(path, *, dtype, **how):
    """The model in double precision, whatever the settings say, for they offer single at best."""
    return load_model(path, **how).to(torch.float64)


def main(folder, changes):
    prepare.load_model = doubled
    loaded = []
    settings = material.settings(folder, data=str(folder / "rows.jsonl"), **changes)

    def shared(settings, models):
        prepare.shard_models(settings, models)
        cached = settings.cache_teacher
        loaded[:] = [models.student] if cached else [models.student, models.teacher]

    def stop(student, step):
        if step == 2:
            signal.raise_signal(signal.SIGTERM)

    run.shard_models = shared
    distill(settings, folder / "whole")
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps([shares(it) for it in loaded]))
    try:
        distill(settings, folder / "parts", watch=stop)
    except KeyboardInterrupt:
        distill(settings, folder / "parts", resume=True)
    else:
        raise AssertionError("it was not stopped")


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))

"""What run folders, and whatever is kept in them, must refuse."""

from pathlib import Path

import torch
from fitting import a_fit
from subjects import Subject, fault

import rkl
from rkl.runs import (
    Run,
    append_jsonl,
    fingerprint,
    read_jsonl,
    save_tensors,
    verb,
    write_atomic,
    write_json,
)


def of_runs(argument="path"):
    """Folders that hold no run, or one that cannot be read."""
    return [
        fault(argument, "no folder", "missing", "missing", "no run.json", named="path"),
        fault(argument, "no run", "nothing", "nothing", "no run.json", named="path"),
        fault(argument, "a file", "text.txt", "text.txt", "no run.json", named="path"),
        fault(argument, "torn", "run-torn", "run-torn", "corrupt", named="path"),
        fault(argument, "not ours", "run-foreign", "run-foreign", "rkl", named="path"),
        fault(argument, "a list", "run-list", "run-list", "rkl", named="path"),
        fault(argument, "too new", "run-later", "run-later", "99", "newer", named="path"),
        fault(argument, "a worded format", "run-worded", "run-worded", "rkl", named="path"),
        fault(argument, "a kind astray", "run-astray", "'../distill'", named="path"),
        fault(argument, "a numbered kind", "run-numbered", "3", named="path"),
        fault(argument, "no settings", "run-unlisted", "run-unlisted", "settings", named="path"),
    ]


UNKNOWN = [
    fault("path", "an unknown kind", "run-unheard", "'unheard_of'", "does not know"),
    fault("path", "a kind without it", "run-verbless", "'report'", "does not know"),
]


def of_places(argument="path"):
    """Where no file can be written."""
    return [
        fault(argument, "no folder to be in", "missing/file", "missing"),
        fault(argument, "a folder", "nothing", "nothing"),
    ]


SUBJECTS = [
    Subject("Run.open", Run.open, lambda: {"path": "run"}, of_runs()),
    Subject(
        "load",
        rkl.load,
        lambda: {"path": "run"},
        [
            *of_runs(),
            *UNKNOWN,
            fault("path", "not finished", "begun", "begun", "--resume"),
        ],
    ),
    Subject(
        "save",
        rkl.save,
        lambda: {"made": a_fit(False), "path": "saved-fit"},
        [fault("made", "a number", 3, "what a fit returned", "int")],
    ),
    Subject(
        "verb",
        lambda name, path, other: verb(name, path, other),
        lambda: {"name": "report_runs", "path": "run", "other": "begun"},
        [
            *of_runs(),
            fault("name", "unknown", "dance_runs", named="rkl dance"),
            fault("other", "of another kind", "other", "'demos.distill'", named="paths"),
        ],
    ),
    Subject(
        "Run.create",
        Run.create,
        lambda: {"out": "new", "kind": "distill", "settings": {"a": 1}, "seed": 0},
        [
            fault("out", "a run", "run", "exists", "--resume", "--overwrite"),
            fault("out", "a folder of others", "student", "exists"),
            fault("out", "a file", "text.txt", "folder", "text.txt"),
            fault("out", "below a file", "text.txt/new", "text.txt"),
            fault("kind", "a path", "../distill", "'../distill'"),
            fault("kind", "empty", "", "''"),
            fault("kind", "a capital", "Distill", "'Distill'"),
            fault("kind", "nothing", None, "None"),
            fault("settings", "a list", [1], "JSON", "[1]"),
            fault("settings", "nothing", None, "JSON", "None"),
            fault("settings", "a tensor in them", {"a": torch.ones(1)}, "JSON", "Tensor"),
            fault("settings", "a path in them", {"a": Path("b")}, "JSON", "PosixPath"),
            fault("seed", "a string", "0", "integer", "'0'"),
            fault("seed", "nothing", None, "integer", "None"),
            fault("seed", "a fraction", 0.5, "integer", "0.5"),
            fault("seed", "a truth value", True, "integer", "True"),
        ],
    ),
    Subject(
        "Run.create",
        lambda **given: Run.create(**given, overwrite=True),
        lambda: {"out": "begun", "kind": "distill", "settings": {}, "seed": 0},
        [
            fault("out", "overwriting no run", "student", "student", "no run.json", named="path"),
            fault("out", "overwriting a torn run", "run-torn", "corrupt", named="path"),
            fault("resume", "beside overwrite", True, "overwrite"),
        ],
    ),
    Subject(
        "Run.create",
        lambda **given: Run.create(**given, resume=True),
        lambda: {
            "out": "begun",
            "kind": "distill",
            "settings": Run.open("begun").settings,
            "seed": 0,
        },
        [
            fault("settings", "resumed with others", {"teacher": "T"}, "teacher was", "'T'"),
            fault("seed", "resumed with another", 1, "seed was 0 and is 1"),
            fault("kind", "resumed with another", "fit", "'distill'", "'fit'"),
            fault("out", "resuming no run", "student", "no run.json", named="path"),
            fault("out", "resuming a torn run", "run-torn", "corrupt", named="path"),
        ],
    ),
    Subject(
        "write_atomic",
        write_atomic,
        lambda: {"path": "new.txt", "data": "text"},
        [
            *of_places(),
            fault("data", "a number", 3, "text or bytes", "int"),
            fault("data", "nothing", None, "text or bytes", "NoneType"),
        ],
    ),
    Subject(
        "write_json",
        write_json,
        lambda: {"path": "new.json", "value": {"a": 1}},
        [
            *of_places(),
            fault("value", "a tensor", torch.ones(1), "JSON", "Tensor"),
            fault("value", "a set", {1}, "JSON", "set"),
        ],
    ),
    Subject(
        "append_jsonl",
        append_jsonl,
        lambda: {"path": "new.jsonl", "row": {"a": 1}},
        [
            *of_places(),
            fault("row", "a tensor in it", {"a": torch.ones(1)}, "JSON", "Tensor"),
        ],
    ),
    Subject(
        "read_jsonl",
        read_jsonl,
        lambda: {"path": "prompts.jsonl"},
        [
            fault("path", "no file", "missing.jsonl", named="missing.jsonl"),
            fault("path", "a folder", "nothing", named="nothing"),
            fault("path", "torn in the middle", "torn.jsonl", "JSON", named="torn.jsonl, line 2"),
            fault("path", "not UTF-8", "latin.jsonl", "line 2", named="latin.jsonl"),
        ],
    ),
    Subject(
        "save_tensors",
        save_tensors,
        lambda: {"path": "new.safetensors", "tensors": {"a": torch.ones(1)}},
        [
            *of_places(),
            fault("tensors", "a list among them", {"a": [1.0]}, "tensors['a']", "list"),
            fault("tensors", "a tensor alone", torch.ones(1), "names", "Tensor"),
        ],
    ),
    Subject(
        "fingerprint",
        fingerprint,
        lambda: {"rows": ["a"]},
        [
            fault("rows", "a number", 3, "int"),
            fault("rows", "tensors", [torch.ones(1)], "JSON", "Tensor"),
        ],
    ),
    Subject(
        "Run.metrics",
        lambda path: Run.open(path).metrics,
        lambda: {"path": "run"},
        [fault("path", "torn metrics", "torn-metrics", "line 1", named="metrics.jsonl")],
    ),
]

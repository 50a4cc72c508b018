"""Measuring flows on their targets, and what of it must be refused."""

from pathlib import Path

import torch
from chains_of_flows import LAW, OF_SEED, of_count
from subjects import Subject, fault

from rkl.sample import EvaluateSettings, condition_grid, evaluate_on_target, report_runs
from rkl.sample.targets import MoG8


class Law(torch.nn.Module):
    def forward(self, condition):
        return LAW.expand(condition.shape[:-1])


SUBJECTS = [
    Subject(
        "sample.evaluate_on_target",
        evaluate_on_target,
        lambda: {
            "flow": Law(),
            "target": MoG8(),
            "condition": torch.ones(1, 1),
            "draws": 50,
            "chains": 2,
            "held_out": [torch.randn(200, 2)],
            "seed": 0,
        },
        [
            fault("condition", "one alone", torch.ones(1), "[rows, 1]", "[1]"),
            fault("condition", "of two columns", torch.ones(2, 2), "1", "[2, 2]"),
            fault("held_out", "of another count", [torch.zeros(9, 2)] * 2, "1 conditions", "2"),
            fault("held_out", "of three columns", [torch.zeros(9, 3)], "[rows, 2]", "[9, 3]"),
            *of_count("draws", 2),
            *of_count("chains", 1),
            *OF_SEED,
        ],
    ),
    Subject(
        "sample.condition_grid",
        condition_grid,
        lambda: {"ranges": MoG8().conditions, "values": 3},
        of_count("values", 1),
    ),
    Subject(
        "sample.EvaluateSettings",
        EvaluateSettings,
        lambda: {"data": Path("draws.npz"), "values": 3, "draws": 10, "chains": 2},
        [*of_count("values", 1), *of_count("draws", 2), *of_count("chains", 1)],
    ),
    Subject(
        "sample.report_runs",
        report_runs,
        lambda: {"paths": ["run"]},
        [fault("paths", "none", [], "one by one", "0")],
        costly=True,
    ),
]

"""What chains, importance sampling, log Z and coverage of flows must refuse."""

import math

import torch
from subjects import Subject, fault
from torch.distributions import Categorical, Independent, Normal

from rkl.metrics.overlap import earth_mover, histogram_overlap
from rkl.sample import (
    HeatBath,
    Metropolis,
    RandomWalk,
    Wolff,
    annealed_importance,
    averages,
    check_held_out,
    compare_with_held_out,
    expectation,
    independent_metropolis,
    judge_coverage,
    judge_ratios,
    markov_chain,
    mbar,
    reweight,
    thermodynamic_integration,
    thermodynamics,
)
from rkl.sample.targets import XY, Density, MoG8
from rkl.stats import batch_means, chains

ONE = torch.ones(1)
LAW = Independent(Normal(torch.zeros(2), 5.0), 1)
ROWS = torch.arange(80.0).reshape(40, 2) / 20
RATIO = torch.linspace(-1, 0, 40)
COLD = torch.tensor([[0.5], [1.0]])


def broken(value):
    return Density(lambda x, _: torch.full_like(x[..., 0], value), (2,), "line", MoG8.conditions)


OF_TARGET = [
    fault("target", "a word", "xy(side=8)", "Target", "xy(side=8)"),
    fault("target", "nothing", None, "Target", "None"),
]
OF_CONDITION = [
    fault("condition", "a number", 1.0, "tensor", "float"),
    fault("condition", "whole numbers", torch.tensor([1]), "floating-point", "int64"),
    fault("condition", "one too many", torch.ones(2), "[*batch, 1]", "[2]"),
    fault("condition", "none", None, "[*batch, 1]", "[0]"),
    fault("condition", "nan", ONE * math.nan, "nan"),
]


def of_count(name, least):
    return [
        fault(name, "too few", least - 1, f"at least {least}", str(least - 1)),
        fault(name, "a fraction", 7.5, "integer", "7.5"),
        fault(name, "a truth value", True, "integer", "True"),
    ]


OF_SEED = [fault("seed", "a fraction", 0.5, "integer", "0.5")]
OF_PROPOSAL = [
    fault("proposal", "a word", "nsf", "flow", "str"),
    fault("proposal", "other events", Independent(Normal(torch.zeros(3), 1.0), 1), "[2]", "[3]"),
    fault("proposal", "a batch", Independent(Normal(torch.zeros(4, 2), 1.0), 1), "[]", "[4]"),
    fault("proposal", "finite", Categorical(torch.ones(2)), "[2]", "[]"),
]


def chain(**changes):
    return independent_metropolis(MoG8(), LAW, ONE, draws=50, **changes)


def of_log_ratio(name="log_ratio"):
    return [
        fault(name, "a list", [0.0], "tensor", "list"),
        fault(name, "integers", torch.ones(9).long(), "floating-point", "int64"),
        fault(name, "one draw", torch.zeros(1), "2 draws", "[1]"),
        fault(name, "nan", RATIO * math.nan, "numbers", "40"),
        fault(name, "all without mass", RATIO - math.inf, "finite", "-inf"),
    ]


INFINITE = fault("log_ratio", "infinite", RATIO + math.inf, "numbers", "40")
OF_LOG_Z = [
    (thermodynamic_integration, {"draws": 20, "chains": 4}, {"draws": 1, "chains": 1}),
    (mbar, {"draws": 20, "chains": 4}, {"draws": 1, "chains": 1}),
    (
        annealed_importance,
        {"particles": 8, "islands": 4, "sweeps": 1},
        {"particles": 2, "islands": 2, "sweeps": 1},
    ),
]


def of_log_z(method, sizes, least):
    given = {"target": XY(side=2), "condition": COLD, "rungs": 4, "kernel": None, **sizes}
    return Subject(
        f"sample.{method.__name__}",
        method,
        lambda: dict(given),
        [
            *OF_TARGET,
            fault("target", "no lattice of angles", MoG8(), "XY", "MoG8"),
            fault("condition", "one temperature", ONE, "[temperatures, conditions]", "[1]"),
            fault("condition", "none", COLD[:0], "not empty", "[0, 1]"),
            fault("condition", "T below 0", -COLD, "above 0", "-0.5"),
            fault("condition", "nan", COLD * math.nan, "nan"),
            *of_count("rungs", 2),
            *(it for name, lowest in least.items() for it in of_count(name, lowest)),
            fault("kernel", "a word", "wolff", "kernel", "wolff"),
        ],
    )


CHAINS = [
    Subject(
        "sample.independent_metropolis",
        independent_metropolis,
        lambda: {
            "target": MoG8(),
            "proposal": LAW,
            "condition": ONE,
            "draws": 30,
            "chains": 2,
            "seed": 0,
            "start": None,
            "local": None,
        },
        [
            *OF_TARGET,
            *OF_CONDITION,
            *OF_PROPOSAL,
            *of_count("draws", 1),
            *of_count("chains", 1),
            *OF_SEED,
            fault("target", "of nan", broken(math.nan), "60 of 60", "nan"),
            fault("target", "of infinite density", broken(math.inf), "60 of 60", "inf"),
            fault("start", "another shape", torch.zeros(3, 2), "[2, 2]", "[3, 2]"),
            fault("start", "a list", [[0.0, 0.0]] * 2, "tensor", "list"),
            fault("local", "a word", "heat bath", "kernel", "heat bath"),
            fault("local", "of a lattice", HeatBath(), "XY", "MoG8", named="target"),
        ],
    ),
    Subject(
        "sample.markov_chain",
        markov_chain,
        lambda: {
            "target": XY(side=2, ring_exchange=0.5),
            "condition": ONE,
            "draws": 2,
            "chains": 2,
            "kernel": None,
            "every": 1,
            "warm_up": 0,
            "seed": 0,
            "start": None,
        },
        [
            *OF_TARGET,
            *OF_CONDITION,
            *of_count("draws", 1),
            *of_count("chains", 1),
            *of_count("every", 1),
            *of_count("warm_up", 0),
            *OF_SEED,
            fault("kernel", "a word", "wolff", "kernel", "wolff"),
            fault("kernel", "clusters", Wolff(), "ring_exchange=0", "Wolff", named="target"),
            fault("start", "another shape", torch.zeros(2, 3), "[2, 4]", "[2, 3]"),
            fault("start", "a list", [[0.0] * 4] * 2, "tensor", "list"),
            fault("start", "nan", torch.full((2, 4), math.nan), "finite"),
        ],
    ),
    Subject(
        "sample.HeatBath",
        HeatBath,
        lambda: {"over_relaxation": 2},
        of_count("over_relaxation", 0),
    ),
    *(
        Subject(
            f"sample.{kernel.__name__}",
            kernel,
            lambda: {"step": 1.0},
            [
                fault("step", "zero", 0.0, "above 0", "0.0"),
                fault("step", "infinite", math.inf, "finite", "inf"),
                fault("step", "a word", "long", "number", "'long'"),
            ],
        )
        for kernel in (Metropolis, RandomWalk)
    ),
    *(of_log_z(*it) for it in OF_LOG_Z),
]
WEIGHTS = [
    Subject(
        "sample.reweight",
        reweight,
        lambda: {"log_ratio": RATIO, "sites": 4},
        [*of_log_ratio(), INFINITE, *of_count("sites", 1)],
    ),
    Subject(
        "sample.expectation",
        expectation,
        lambda: {"values": RATIO, "log_ratio": RATIO},
        [
            *of_log_ratio(),
            fault("values", "a list", [1.0], "tensor", "list"),
            fault("values", "another shape", RATIO[1:], "[40]", "[39]"),
        ],
    ),
    Subject(
        "sample.thermodynamics",
        thermodynamics,
        lambda: {
            "log_ratio": RATIO.expand(2, -1),
            "energy": RATIO.expand(2, -1),
            "temperature": COLD[:, 0],
        },
        [
            fault("energy", "another shape", RATIO, "[temperatures, draws]", "[40]"),
            fault("energy", "a list", [1.0], "tensor", "list"),
            fault("temperature", "one too few", COLD[:1, 0], "[2]", "[0.5]"),
            fault("temperature", "negative", -COLD[:, 0], "above 0", "-0.5"),
            fault("log_ratio", "nan", RATIO.expand(2, -1) * math.nan, "numbers", "80"),
        ],
    ),
    Subject(
        "sample.judge_ratios",
        judge_ratios,
        lambda: {
            "log_ratio": RATIO,
            "at_target": RATIO,
            "log_z": 0.0,
            "labels": torch.zeros(40).long(),
            "target_labels": torch.zeros(40).long(),
            "names": ("all",),
            "sites": 1,
        },
        [
            *of_log_ratio()[3:],
            *of_log_ratio("at_target")[3:],
            fault("log_z", "nan", math.nan, "finite", "nan"),
            fault("labels", "floats", torch.zeros(40), "whole numbers"),
            fault("labels", "one too few", torch.zeros(39).long(), "[40]", "[39]"),
            fault("labels", "unnamed", torch.ones(40).long(), "[0, 1)", "1"),
            fault("target_labels", "negative", -torch.ones(40).long(), "[0, 1)", "-1"),
            *of_count("sites", 1),
        ],
    ),
    Subject(
        "sample.judge_coverage",
        judge_coverage,
        lambda: {
            "target": MoG8(),
            "proposal": LAW,
            "condition": ONE,
            "held_out": ROWS,
            "train": ROWS + 100,
            "draws": 200,
            "seed": 0,
        },
        [
            *OF_TARGET,
            *OF_CONDITION,
            *OF_PROPOSAL,
            fault("condition", "a batch", torch.ones(2, 1), "[conditions]", "[2, 1]"),
            *of_count("draws", 100),
            *OF_SEED,
            fault("held_out", "a list", [[0.0, 0.0]], "tensor", "list"),
            fault("held_out", "of three columns", torch.zeros(9, 3), "[rows, 2]", "[9, 3]"),
            fault("held_out", "nan", ROWS * math.nan, "finite", "80"),
            fault("held_out", "trained on", ROWS + 100, "40 of its 40", "train"),
            fault("train", "a list", [[0.0, 0.0]], "tensor", "list"),
        ],
    ),
]
MEASURES = [
    Subject(
        "sample.averages",
        averages,
        lambda: {
            "target": MoG8(),
            "values": {"x": torch.zeros(2, 9)},
            "condition": ONE,
            "weights": torch.ones(2, 9),
        },
        [
            *OF_TARGET,
            *OF_CONDITION,
            fault("values", "nothing", {}, "one at least"),
            fault("values", "a tensor", torch.zeros(2, 9), "map names"),
            fault("values", "a list in it", {"x": [0.0]}, "tensor", "list"),
            fault("values", "of another batch", {"x": torch.zeros(3, 2, 9)}, "[]", "[3, 2, 9]"),
            fault("weights", "another shape", torch.ones(9), "[2, 9]", "[9]"),
            fault("weights", "negative", -torch.ones(2, 9), "at least 0", "-1"),
        ],
    ),
    Subject(
        "sample.compare_with_held_out",
        compare_with_held_out,
        lambda: {
            "target": MoG8(),
            "proposal": LAW,
            "chain": chain(),
            "held_out": ROWS,
            "train": ROWS + 100,
        },
        [
            *OF_PROPOSAL,
            fault("chain", "a tensor", ROWS, "Chain", "Tensor"),
            fault("held_out", "a list", [[0.0, 0.0]], "tensor", "list"),
            fault("held_out", "of three rows", ROWS[:3], "4 rows", "[3, 2]"),
            fault("held_out", "trained on", ROWS + 100, "40 of its 40", "train"),
        ],
    ),
    Subject(
        "sample.check_held_out",
        check_held_out,
        lambda: {"train": ROWS, "held_out": ROWS + 100},
        [
            fault("train", "a list", [0.0], "tensor", "list"),
            fault("held_out", "a list", [0.0], "tensor", "list"),
            fault("held_out", "the same", ROWS, "shares 40"),
        ],
    ),
    Subject(
        "overlap.histogram_overlap",
        histogram_overlap,
        lambda: {"a": RATIO, "b": RATIO, "low": -1.0, "high": 1.0, "bins": 9},
        [
            fault("a", "a list", [0.0], "tensor", "list"),
            fault("a", "a table", ROWS, "[draws]", "[40, 2]"),
            fault("b", "one draw", RATIO[:1], "two at least", "[1]"),
            fault("b", "nan", RATIO * math.nan, "finite", "40"),
            fault("low", "infinite", -math.inf, "finite", "-inf"),
            fault("high", "below low", -2.0, "above -1.0", "-2.0"),
            *of_count("bins", 1),
        ],
    ),
    Subject(
        "overlap.earth_mover",
        earth_mover,
        lambda: {"a": RATIO, "b": RATIO[:9]},
        [
            fault("a", "integers", torch.ones(9).long(), "floating-point", "int64"),
            fault("b", "infinite", RATIO + math.inf, "finite", "40"),
        ],
    ),
    Subject(
        "chains.integrated_time",
        chains.integrated_time,
        lambda: {"x": ROWS.mT, "window": 5.0},
        [
            fault("x", "a list", [0.0], "tensor", "list"),
            fault("x", "three draws", ROWS.mT[:, :3], "at least 4", "[2, 3]"),
            fault("x", "nan", ROWS.mT * math.nan, "finite", "80"),
            fault("window", "zero", 0.0, "above 0", "0.0"),
            fault("window", "nan", math.nan, "finite", "nan"),
        ],
    ),
    Subject(
        "batch_means.jackknife",
        batch_means.jackknife,
        lambda: {"function": torch.exp, "x": ROWS.mT, "weights": torch.ones(2, 40)},
        [
            fault("function", "a number", 1.0, "means", "1.0"),
            fault("x", "a list", [0.0], "tensor", "list"),
            fault("x", "one chain alone", ROWS[:, 0], "[chains, draws, ...]", "[40]"),
            fault("weights", "another shape", torch.ones(40), "[2, 40]", "[40]"),
            fault("weights", "a list", [1.0], "tensor", "list"),
            fault("weights", "zero everywhere", torch.zeros(2, 40), "not all 0", "0"),
        ],
    ),
]
SUBJECTS = [*CHAINS, *WEIGHTS, *MEASURES]

"""What targets, lattice flows and fits to targets must refuse."""

import math

import torch
from subjects import Subject, fault

from rkl import JensenShannon
from rkl.sample import CheckerboardRealNVP, CoarseToFine, fit_to_target, parse_objective
from rkl.sample.targets import (
    XY,
    Density,
    GaussianMixture,
    MoG8,
    Phi4,
    Rings,
    check_target,
    parse_target,
)


def flat(x, condition):
    return 0 * x.sum(-1)


SIDE = [
    fault("side", "one", 1, "at least 2", "1"),
    fault("side", "a share", 2.5, "2.5"),
    fault("side", "a truth", True, "True"),
    fault("side", "a text", "8", "'8'"),
]
NUMBER = [("infinite", math.inf), ("no number", math.nan), ("a text", "1")]

TARGETS = [
    Subject(
        "targets.XY",
        XY,
        lambda: {"side": 4, "coupling": 1.0, "ring_exchange": 0.0},
        [
            *SIDE,
            *(fault("coupling", kind, value) for kind, value in NUMBER),
            *(fault("ring_exchange", kind, value) for kind, value in NUMBER),
        ],
    ),
    Subject(
        "targets.XY.log_prob",
        XY(side=4).log_prob,
        lambda: {"x": torch.zeros(3, 16), "condition": torch.ones(3, 1)},
        [
            fault("x", "another side", torch.zeros(3, 25), "[*batch, 16]", "[3, 25]"),
            fault("x", "a list", [0.0] * 16, "list"),
            fault("x", "integers", torch.zeros(3, 16, dtype=torch.long), "int64"),
            fault("condition", "two", torch.ones(3, 2), "for T of", "[3, 2]"),
            fault("condition", "a number", 0.5, "float"),
        ],
    ),
    Subject(
        "targets.Phi4",
        Phi4,
        lambda: {"side": 4, "mass_squared": -4.0},
        [*SIDE, *(fault("mass_squared", kind, value) for kind, value in NUMBER)],
    ),
    Subject(
        "targets.GaussianMixture",
        GaussianMixture,
        lambda: {"means": ((0.0,), (1.0,)), "weights": (1.0, 2.0)},
        [
            fault("means", "none", (), "one point"),
            fault("means", "of two lengths", ((0.0,), (1.0, 2.0)), "one length"),
            fault("means", "infinite", ((0.0,), (math.inf,)), "inf"),
            fault("weights", "too few", (1.0,), "each of 2"),
            fault("weights", "nothing for one", (1.0, 0.0), "above 0"),
        ],
    ),
    Subject(
        "targets.MoG8",
        MoG8,
        lambda: {"radius": 1.0},
        [fault("radius", "nothing", 0.0, "above 0"), fault("radius", "below 0", -1.0, "-1")],
    ),
    Subject(
        "targets.Rings",
        Rings,
        lambda: {"rings": 2, "spacing": 1.0},
        [
            fault("rings", "none", 0, "at least 1"),
            fault("rings", "a share", 1.5, "1.5"),
            fault("spacing", "nothing", 0.0, "above 0"),
        ],
    ),
    Subject(
        "targets.Density",
        Density,
        lambda: {"function": flat, "event_shape": (2,), "domain": "circle"},
        [
            fault("function", "a number", 3, "3"),
            fault("event_shape", "a number", 2, "2"),
            fault("event_shape", "empty", (), "()"),
            fault("event_shape", "of nothing", (0,), "(0,)"),
            fault("domain", "unknown", "sphere", "'sphere'"),
        ],
    ),
    Subject(
        "targets.parse_target",
        parse_target,
        lambda: {"text": "xy(side=4)"},
        [
            fault("text", "a number", 4, "4", named="target"),
            fault("text", "unknown", "ising(side=4)", named="'ising'"),
            fault("text", "another setting", "xy(size=4)", "side", named="'size'"),
            fault("text", "a bad setting", "xy(side=1)", "at least 2", named="side"),
            fault("text", "no module", "nowhere_at_all:Mine()", "nowhere_at_all", named="target"),
            fault("text", "no target", "math:sqrt(event_shape=3)", "a Target", named="math:sqrt"),
        ],
    ),
    Subject(
        "targets.check_target",
        check_target,
        lambda: {"target": XY(side=2), "draws": 4},
        [
            fault("target", "a text", "xy", "'xy'"),
            fault("draws", "one", 1, "2 or more"),
            fault("draws", "a share", 2.5, "2.5"),
        ],
    ),
]

LATTICES = [
    Subject(
        "sample.CoarseToFine",
        CoarseToFine,
        lambda: {"coupling": 1.0, "ring_exchange": 0.0, "integrate": "auto"},
        [
            *(fault("coupling", kind, value) for kind, value in NUMBER),
            *(fault("ring_exchange", kind, value) for kind, value in NUMBER),
            fault("integrate", "unknown", "all", "'all'"),
            fault("width", "nothing", 0, "at least 1"),
            fault("knots", "too few", 4, "at least 5"),
        ],
    ),
    Subject(
        "sample.CoarseToFine.build",
        CoarseToFine().build,
        lambda: {"event_shape": (16,), "conditions": 1},
        [
            fault("event_shape", "side 6", (36,), "power of two", "Sides 4 and 8", named="side"),
            fault("event_shape", "no square", (15,), "(15,)"),
            fault("event_shape", "of two axes", (4, 4), "(4, 4)"),
            fault("conditions", "none", 0, "got 0"),
        ],
    ),
    Subject(
        "sample.CheckerboardRealNVP",
        CheckerboardRealNVP,
        lambda: {"couplings": 2, "filters": 4},
        [
            fault("couplings", "none", 0, "at least 1"),
            fault("filters", "none", 0, "at least 1"),
        ],
    ),
]

FITS = [
    Subject(
        "sample.parse_objective",
        parse_objective,
        lambda: {"text": "reverse-kl"},
        [
            fault("text", "a number", 4, "4", named="objective"),
            fault("text", "empty", "", "cannot read", named="objective"),
            fault("text", "another estimator", "reward:kl", "'reward'", named="objective"),
            fault("text", "no f-divergence", "data:akl", "f-divergence", named="objective"),
            fault("text", "a weight of 0", "0*kl", "above 0", named="objective"),
        ],
    ),
    Subject(
        "sample.fit_to_target",
        fit_to_target,
        lambda: {
            "flow": CoarseToFine(width=4, knots=5),
            "target": XY(side=2),
            "steps": 1,
            "strata": 2,
            "batch": 8,
        },
        [
            fault("target", "a text", "xy(side=2)", "'xy(side=2)'"),
            fault("objective", "a number", 3, "3"),
            fault("objective", "needs log Z", JensenShannon(), "log Z"),
            fault("objective", "unknown", "target:nothing", "nothing"),
            fault("data", "of another kind", torch.ones(3, 4), "pair"),
            fault("data", "of another shape", (torch.ones(3, 5), torch.ones(3, 1)), named="x"),
            fault("conditions", "of another kind", [0.5], "list"),
            fault("conditions", "of another shape", torch.ones(3), "[3]"),
            fault("batch", "too small", 3, "3"),
            fault("batch", "a share", 8.5, "8.5"),
            fault("strata", "none", 0, "0"),
            fault("flow", "of another model", CoarseToFine(coupling=2.0), "build it from"),
        ],
    ),
]

SUBJECTS = [*TARGETS, *LATTICES, *FITS]

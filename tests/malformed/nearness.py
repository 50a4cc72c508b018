"""What curves from ratios, spectra, rejection and the measures of samples must refuse."""

import math

import torch
from subjects import ABSENT, Subject, command, fault
from torch.distributions import Normal

from rkl import AKL, KL
from rkl.fit.rejection import reject
from rkl.metrics.clusters import equal_precision, prd_curve
from rkl.metrics.frechet import frechet_bias, frechet_distance
from rkl.metrics.neighbours import copies, prdc, prdc_ceiling
from rkl.metrics.precision_recall import (
    operating_point,
    pr_curve_sampled,
    pr_spectrum,
    pr_weight,
)
from rkl.metrics.samples import measure
from rkl.plots import trade_offs

CLOUD = torch.randn(3, 60, 4, generator=torch.Generator().manual_seed(0))
REAL, FAKE, OTHER = CLOUD.unbind()
RATIO = OTHER[:, 0] / 2


def of_features(name, other):
    return [
        fault(name, "a list", [[1.0]], "tensor", "list"),
        fault(name, "integers", torch.ones(60, 4).long(), "floating-point", "int64"),
        fault(name, "a vector", OTHER[:, 0], "[samples, features]", "[60]"),
        fault(name, "empty", OTHER[:0], "not empty", "[0, 4]"),
        fault(name, "nan", OTHER / OTHER.new_tensor([1, 1, 1, math.nan]), "finite", "60 of 60"),
        fault(name, "infinite", OTHER * math.inf, "finite"),
        fault(name, "other features", OTHER[:, :3], "4", "3", named=other),
    ]


def of_ratios(name, never):
    return [
        fault(name, "a list", [1.0], "tensor", "list"),
        fault(name, "integers", torch.ones(3).long(), "floating-point", "int64"),
        fault(name, "none", RATIO[:0], "one sample", "[0]"),
        fault(name, "a table", OTHER, "[samples]", "[60, 4]"),
        fault(name, "nan", RATIO * math.nan, "nan", "60 of 60"),
        fault(name, "infinite", torch.full((3,), never), f"{never} at 3 of 3"),
    ]


OF_SLOPES = [
    fault("slopes", "a list", [1.0], "tensor", "list"),
    fault("slopes", "negative", torch.tensor([-1.0]), "positive", "-1.0"),
    fault("slopes", "none", torch.ones(0), "positive", "[]"),
]
OF_SPECTRUM = [
    fault("divergence", "a name", "kl", "f-divergence", "'kl'"),
    fault("divergence", "no f-divergence", AKL(), "f-divergence", "AKL"),
]
OF_K = [
    fault("k", "zero", 0, "at least 1", "0"),
    fault("k", "a fraction", 2.5, "integer", "2.5"),
    fault("k", "a truth value", True, "integer", "True"),
    fault("subsamples", "one", 1, "2 at least", "1"),
    fault("subsamples", "negative", -1, "at least 0", "-1"),
    fault("subsamples", "a fraction", 2.5, "integer", "2.5"),
]


def ratio(x):
    return -x.square() / 2


METRICS = [
    Subject(
        "precision_recall.pr_curve_sampled",
        pr_curve_sampled,
        lambda: {"log_ratio_p": RATIO, "log_ratio_q": -RATIO, "slopes": torch.ones(1)},
        [*of_ratios("log_ratio_p", -math.inf), *of_ratios("log_ratio_q", math.inf), *OF_SLOPES],
    ),
    Subject(
        "precision_recall.operating_point",
        operating_point,
        lambda: {"log_ratio": RATIO, "budget": 1.2},
        [
            *of_ratios("log_ratio", math.inf),
            fault("log_ratio", "−∞ everywhere", torch.full((3,), -math.inf), "-inf"),
            fault("log_ratio", "far from normalised", RATIO + 1e4, "normalisation"),
            fault("budget", "none", None, "exactly one", "none"),
            fault("budget", "a word", "much", "number", "'much'"),
            fault("budget", "below 1", 0.5, "at least", "0.5"),
            fault("accept_lam", "another name too", 1.0, "exactly one", "accept_lam, budget"),
            fault("target_precision", "another name too", 0.9, "exactly one"),
        ],
    ),
    Subject(
        "precision_recall.pr_spectrum",
        pr_spectrum,
        lambda: {"divergence": KL(), "slopes": torch.ones(1)},
        [*OF_SPECTRUM, *OF_SLOPES],
    ),
    Subject(
        "precision_recall.pr_weight",
        pr_weight,
        lambda: {"divergence": KL(), "edges": torch.tensor([0.5, 2.0])},
        [
            *OF_SPECTRUM,
            fault("edges", "a list", [0.5, 2.0], "tensor", "list"),
            fault("edges", "falling", torch.tensor([2.0, 0.5]), "rising", "2.0"),
            fault("edges", "one of them", torch.ones(1), "two", "1.0"),
            fault("edges", "zero", torch.tensor([0.0, 1.0]), "rising", "0.0"),
        ],
    ),
    Subject(
        "neighbours.prdc",
        prdc,
        lambda: {"real": REAL, "fake": FAKE, "k": 3, "subsamples": 2},
        [
            *of_features("real", "fake"),
            *of_features("fake", "fake"),
            *OF_K,
            fault("k", "as many as there are", 60, "more than k = 60", "60", named="real"),
            fault("fake", "too few", FAKE[:3], "more than k = 3", "3"),
        ],
    ),
    Subject(
        "neighbours.prdc_ceiling",
        prdc_ceiling,
        lambda: {"real": REAL, "k": 3, "subsamples": 2},
        [
            *of_features("real", "fake")[:-1],
            *OF_K,
            fault("real", "too few", REAL[:7], "more than 7", "7"),
        ],
    ),
    Subject(
        "frechet.frechet_distance",
        frechet_distance,
        lambda: {"real": REAL, "fake": FAKE},
        [
            *of_features("real", "fake"),
            *of_features("fake", "fake"),
            fault("real", "one of them", REAL[:1], "two samples", "1"),
        ],
    ),
    Subject(
        "clusters.prd_curve",
        prd_curve,
        lambda: {"real": REAL, "fake": FAKE, "clusters": 3, "runs": 1},
        [
            *of_features("real", "fake"),
            *of_features("fake", "fake"),
            *OF_SLOPES,
            fault("clusters", "zero", 0, "at least 1", "0"),
            fault("clusters", "too many", 121, "at most 120", "121"),
            fault("clusters", "a fraction", 2.5, "integer", "2.5"),
            fault("runs", "zero", 0, "at least 1", "0"),
        ],
    ),
    Subject(
        "clusters.equal_precision",
        equal_precision,
        lambda: {"reals": 10, "fakes": 20, "clusters": 3},
        [
            fault(name, kind, value, said, str(value))
            for name in ("reals", "fakes", "clusters")
            for kind, value, said in (("zero", 0, "at least 1"), ("a fraction", 2.5, "integer"))
        ],
    ),
    Subject(
        "frechet.frechet_bias",
        frechet_bias,
        lambda: {"real": REAL, "fake": FAKE},
        [*of_features("real", "fake"), *of_features("fake", "fake")],
    ),
    Subject(
        "neighbours.copies",
        copies,
        lambda: {"train": OTHER, "held_out": REAL, "fake": FAKE},
        [
            *of_features("train", "held_out"),
            *of_features("held_out", "held_out"),
            *of_features("fake", "fake"),
        ],
    ),
    Subject(
        "samples.measure",
        measure,
        lambda: {"real": REAL, "fake": FAKE, "k": 3},
        [*of_features("real", "fake"), *of_features("fake", "fake"), *OF_K[:3]],
    ),
    Subject(
        "rejection.reject",
        reject,
        lambda: {"law": Normal(0.0, 1.0), "log_ratio": ratio, "n": 5, "budget": 1.2, "pilot": 99},
        [
            fault("law", "a function", ratio, "distribution", "function"),
            fault("law", "a batch", Normal(torch.zeros(2), 1.0), "batch", "[2]"),
            fault("log_ratio", "a table", lambda x: x[:, None], "[99]", "[99, 1]"),
            fault("log_ratio", "numbers", lambda x: 0.0, "[99]", "float"),
            fault("log_ratio", "nan", lambda x: x * math.nan, "nan", "99 of 99"),
            fault("n", "zero", 0, "at least 1", "0"),
            fault("n", "a fraction", 2.5, "integer", "2.5"),
            fault("pilot", "zero", 0, "at least 1", "0"),
            fault("budget", "below 1", 0.5, "at least", "0.5"),
            fault("budget", "none", None, "exactly one"),
        ],
    ),
    Subject(
        "trade_offs.spectrum",
        trade_offs.spectrum,
        lambda: {"slopes": [0.5, 2.0], "weights": {"a": [1.0, 2.0]}, "atoms": {"a": [(1.0, 1.0)]}},
        [
            fault("slopes", "falling", [2.0, 0.5], "rising", "2.0"),
            fault("slopes", "one of them", [1.0], "two", "1.0"),
            fault("weights", "none", {}, "empty"),
            fault("weights", "one too few", {"a": [1.0]}, "2", "1"),
            fault("weights", "words", {"a": ["x", "y"]}, "numbers"),
        ],
    ),
]
OF_SIDE = [
    fault("real", "left out", ABSENT, "--real"),
    fault("real", "no file", "missing.npy", "no file", "missing.npy"),
    fault("fake", "no file", "missing.npy", "no file", "missing.npy"),
    fault("real", "a text", "text.txt", "line 7", "text.txt"),
    fault("real", "objects", "objects.npy", "pickle", "objects.npy"),
    fault("real", "complex numbers", "complex.npy", "real numbers", "complex"),
    fault("real", "a vector", "vector.npy", "[samples, features]", "[9]"),
    fault("fake", "other features", "narrow.npy", "4", "3"),
    fault("real", "nan", "nan.npy", "finite"),
    fault("k", "a word", "many", "'many'"),
    fault("k", "zero", 0, "at least 1", "0"),
    fault("seed", "a word", "one", "'one'"),
    fault("colour", "an unknown flag", "red", named="--colour"),
]
COMMANDS = [
    Subject(
        "rkl metrics",
        command("metrics"),
        lambda: {"real": "real.npy", "fake": "fake.npy", "k": 3},
        OF_SIDE,
    ),
    Subject(
        "rkl evidence",
        command("evidence"),
        lambda: {
            "target": "mog4",
            "condition": "scale=0.3",
            "values": 1,
            "particles": 64,
            "islands": 4,
        },
        [
            fault("target", "left out", ABSENT, "--target"),
            fault("target", "unknown", "moon", "'moon'", named="moon"),
            fault("condition", "unknown", "T=1", "T", "scale"),
            fault("condition", "below 0", "scale=-1", "scale", "-1"),
            fault("values", "zero", 0, "0"),
            fault("particles", "a word", "many", "'many'"),
            fault("particles", "too few", 1, "1"),
            fault("islands", "zero", 0, "0"),
            fault("out", "another format", "draws.csv", ".npz", "draws.csv"),
            fault("device", "a GPU", "cuda", "cpu", "cuda"),
            fault("seed", "a word", "one", "'one'"),
            fault("colour", "an unknown flag", "red", named="--colour"),
        ],
    ),
]
SUBJECTS = [*METRICS, *COMMANDS]

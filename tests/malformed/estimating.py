"""What Bayes acts, and what is asked of them, must refuse."""

import functools
import math

import numpy as np
import torch
from posteriors import (
    CHAINS,
    DRAWS,
    MU,
    NORMAL,
    OF_VARIABLES,
    OF_WEIGHTS,
    SIGMA,
    WRONG_KIND,
    normal,
    random,
    with_one,
)
from subjects import ABSENT, Lazy, Subject, fault
from torch.distributions import (
    AbsTransform,
    Binomial,
    ExpTransform,
    MultivariateNormal,
    Normal,
    Uniform,
)

from rkl import KL, JensenShannon, ReverseKL
from rkl.bayes import (
    GaussianRegression,
    LogisticRegression,
    PoissonRegression,
    bayes_act,
    check_invariance,
    divergence_between,
    family_of,
    partition_act,
    project,
)


def cauchy():
    """Draws whose mean does not exist."""
    u = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    order = torch.randperm(4000, generator=torch.Generator().manual_seed(0))
    return u[order].reshape(4, 1000) ** -1.5


def alternating():
    """Two chains of many draws that never mix."""
    return torch.tensor([0.0, 50.0], dtype=torch.float64)[:, None] + 1e-3 * MU


OF_FAMILY = [
    fault("family", "nothing", None, "text", "None"),
    fault("family", "a number", 3, "text", "3"),
    fault("family", "unknown", "abnormal(loc=mu)", named="'abnormal"),
    fault("family", "unclosed", "normal(loc=mu, scale=sigma", "never closed", named="normal"),
    fault("family", "positional", "normal(mu, sigma)", "by name", named="normal(mu, sigma)"),
    fault("family", "an unknown setting", "normal(place=mu)", "loc", named="'place'"),
    fault("family", "a setting too few", "normal(loc=mu)", "scale", named="normal"),
    fault("family", "an unknown variable", "normal(loc=mu, scale=tau)", "sigma", named="tau"),
    fault("family", "no variable", "normal(loc=0, scale=1)", "variable of the posterior"),
    fault("family", "no module", "nowhere:Law", "nowhere", "imported"),
    fault("family", "no law of a module", "math:pi", "3.14"),
    fault("family", "a class of other names", Uniform, "low", "mu, sigma", named="Uniform"),
    fault(
        "family", "a class of many", MultivariateNormal, "mu, sigma", named="MultivariateNormal"
    ),
    fault("family", "a callable of no law", lambda theta: 3, "distribution", "3"),
    fault(
        "family",
        "a callable that looks at none",
        lambda theta: Normal(0.0, 1.0),
        "one distribution",
    ),
    fault("family", "a callable of an unknown", lambda theta: theta.tau, "'tau'", "mu, sigma"),
    fault(
        "family",
        "a callable of one law",
        lambda t: Normal(t.mu.mean(), 1.0),
        "one distribution",
        "[]",
    ),
    fault("family", "an instance", Normal(0.0, 1.0), "class", "Normal"),
]
OF_DIVERGENCE = [
    fault("divergence", "its name", "reverse-kl", "ReverseKL()", "'reverse-kl'"),
    fault("divergence", "its class", ReverseKL, "ReverseKL()"),
    fault("divergence", "nothing", None, "ReverseKL()", "None"),
]
OF_DRAWS = [
    fault("draws", "nan", normal(mu=with_one(MU, math.nan)), "finite", "nan", named="mu"),
    fault("draws", "infinite", normal(mu=with_one(MU, math.inf)), "finite", "inf", named="mu"),
    fault("draws", "out of the domain", normal(sigma=-SIGMA), "scale", named="sigma"),
    fault(
        "draws", "one at the boundary", normal(sigma=with_one(SIGMA, 0.0)), "0.0", named="scale"
    ),
    fault("draws", "three", {k: x[:1, :3] for k, x in normal().items()}, "4 effective", "3"),
    fault("draws", "chains that do not mix", normal(mu=alternating()), "4 effective"),
    fault(
        "draws",
        "other shapes",
        normal(mu=random(CHAINS, DRAWS, 3), sigma=random(CHAINS, DRAWS, 2).exp()),
        "mu [3]",
        "sigma [2]",
        named="family",
    ),
]
ACTING = [
    Subject(
        "bayes.bayes_act",
        bayes_act,
        lambda: {
            "draws": normal(),
            "family": NORMAL,
            "divergence": ReverseKL(),
        },
        [
            *WRONG_KIND,
            *OF_VARIABLES[:3],
            *OF_WEIGHTS,
            *OF_FAMILY,
            *OF_DIVERGENCE,
            *OF_DRAWS,
            fault("weights", "one heavy draw", with_one(0 * MU + 1e-9, 1.0), "4", named="draws"),
            fault("seed", "a word", "one", "'one'"),
        ],
    ),
    Subject(
        "bayes.bayes_act",
        bayes_act,
        lambda: {"draws": normal(), "family": NORMAL, "divergence": JensenShannon()},
        [
            *(it._replace(kind=f"{it.kind}, unweighted") for it in OF_DRAWS),
            fault("divergence", "without a mean", "js", "'js'"),
        ],
    ),
    Subject(
        "bayes.bayes_act of a mean that may not be",
        bayes_act,
        lambda: {"draws": {"mu": random(4, 1000)}, "family": "normal(loc=mu, scale=1)"},
        [fault("draws", "of no mean", Lazy(lambda: {"mu": cauchy()}), "Pareto-k", named="loc")],
    ),
    Subject(
        "bayes.bayes_act of a support that may move",
        bayes_act,
        lambda: {
            "draws": {"high": SIGMA + 1, "n": 0 * SIGMA + 5, "p": SIGMA / (1 + SIGMA)},
            "family": "binomial(total_count=5, probs=p)",
        },
        [
            fault(
                "family",
                "an edge that moves",
                "uniform(low=0, high=high)",
                "Intrinsic()",
                named="support of Uniform",
            ),
            fault(
                "family",
                "an unknown number of trials",
                lambda t: Binomial(1000 * t.high.round().int(), t.p),
                "Intrinsic()",
                named="support of Binomial",
            ),
        ],
    ),
    Subject(
        "bayes.bayes_act of a regression",
        bayes_act,
        lambda: {
            "draws": {"beta": random(CHAINS, DRAWS, 3)},
            "family": "poisson-regression(design=design, coefficients=beta)",
            "design": random(5, 3),
        },
        [
            fault("design", "left out", ABSENT),
            fault("design", "another width", random(5, 2), "[5, 2]"),
            fault("design", "a vector", random(5), "[5]"),
            fault("design", "nan", random(5, 3) * math.nan, "finite"),
            fault("design", "words", [["a", "b", "c"]], "numbers"),
        ],
    ),
    Subject(
        "bayes.partition_act",
        partition_act,
        lambda: {"labels": [[0, 0, 1], [1, 1, 0], [0, 1, 1]], "weights": [1.0, 1.0, 2.0]},
        [
            fault("labels", "one draw", [0, 0, 1], "[draws, items]", "[3]"),
            fault("labels", "none", np.zeros((0, 3), int), "[draws, items]", "[0, 3]"),
            fault("labels", "fractions", [[0.5, 1.0]], "integers"),
            fault("labels", "words", [["a", "b"]], "integers"),
            fault("labels", "ragged", [[0, 1], [0]], "integers"),
            fault("labels", "nothing", None, "integers"),
            fault("loss", "unknown", "rand", "binder", "'rand'"),
            fault("loss", "nothing", None, "binder", "None"),
            fault("weights", "one too few", [1.0, 1.0], "3", "[2]"),
            fault("weights", "negative", [1.0, -1.0, 1.0], "-1"),
            fault("weights", "nan", [1.0, math.nan, 1.0], "nan"),
            fault("weights", "zero everywhere", [0.0, 0.0, 0.0], "0"),
            fault("weights", "words", ["a", "b", "c"], "numbers"),
            fault("starts", "zero", 0, "at least 1", "0"),
            fault("starts", "a fraction", 1.5, "at least 1", "1.5"),
            fault("starts", "a truth value", True, "at least 1", "True"),
            fault("seed", "a word", "one", "'one'"),
        ],
    ),
    Subject(
        "bayes.project",
        project,
        lambda: {
            "draws": normal(),
            "family": NORMAL,
            "subfamilies": ["normal(loc=0, scale=sigma)"],
            "divergence": KL(),
        },
        [
            *WRONG_KIND,
            *OF_DIVERGENCE,
            *OF_DRAWS[:6],
            fault("family", "unknown", "abnormal(loc=mu)", named="'abnormal"),
            fault("subfamilies", "nothing", None, "None"),
            fault("subfamilies", "a number", 3, "3"),
            fault("subfamilies", "none", [], "at least one"),
            fault("subfamilies", "the family itself", [NORMAL], "twice"),
            fault("subfamilies", "a number among them", [3], "3", named="subfamily"),
            fault(
                "subfamilies", "columns of no design", [[0]], "needs a regression", named="columns"
            ),
            fault("subfamilies", "unknown", ["abnormal(loc=mu)"], named="'abnormal"),
            fault("subfamilies", "over other events", ["poisson(rate=sigma)"], named="poisson"),
        ],
    ),
    Subject(
        "bayes.project of a regression",
        project,
        lambda: {
            "draws": {"beta": random(CHAINS, DRAWS, 2)},
            "family": "poisson-regression(design=design, coefficients=beta)",
            "subfamilies": {"first": [0]},
            "design": random(5, 2),
        },
        [
            fault("subfamilies", "a column too far", {"far": [2]}, "2", "0, 1", named="columns"),
            fault(
                "subfamilies",
                "an unknown column",
                {"named": ["age"]},
                "age",
                "0, 1",
                named="columns",
            ),
            fault("subfamilies", "a column twice", {"two": [0, 0]}, "0", "0, 1", named="columns"),
            fault("subfamilies", "no column", {"bare": []}, "0, 1", named="columns"),
        ],
    ),
]


@functools.cache
def made():
    return bayes_act(normal(), NORMAL)


def log_density(theta):
    return -theta.mu.square() - theta.sigma


ASKING = [
    Subject(
        "bayes.Estimate.compare",
        lambda log_posterior: made().compare(log_posterior),
        lambda: {"log_posterior": log_density},
        [
            fault("log_posterior", "an unknown variable", "lp", "mu, sigma", named="'lp'"),
            fault("log_posterior", "of another shape", lambda t: t.mu.sum(), "[]"),
            fault("log_posterior", "of nan", lambda t: t.mu * math.nan, "log densities"),
            fault("log_posterior", "of no tensor", lambda t: 0.0, "0.0"),
            fault("log_posterior", "a number", 3, "3"),
            fault("log_posterior", "of an unknown", lambda t: t.tau, "'tau'", "mu, sigma"),
        ],
    ),
    Subject(
        "bayes.Estimate.region",
        lambda prob: made().region(prob),
        lambda: {"prob": 0.5},
        [
            fault("prob", "zero", 0.0, "above 0", "0.0"),
            fault("prob", "all", 1, "below 1", "1"),
            fault("prob", "a percentage", 90, "below 1", "90"),
            fault("prob", "nan", math.nan, "nan"),
            fault("prob", "a word", "half", "number", "'half'"),
            fault("prob", "nothing", None, "number", "None"),
        ],
    ),
    Subject(
        "bayes.Estimate.plot",
        lambda prob: made().plot(prob),
        lambda: {"prob": 0.5},
        [fault("prob", "zero", 0.0, "above 0", "0.0")],
    ),
    Subject(
        "bayes.Region.contains",
        lambda theta: made().region(0.5).contains(theta),
        lambda: {"theta": {"mu": 0.0, "sigma": 1.0}},
        [
            fault("theta", "a variable too few", {"mu": 0.0}, "mu, sigma"),
            fault("theta", "none", {}, "mu, sigma", "nothing"),
            fault("theta", "a number", 3, "mu, sigma", "3"),
            fault("theta", "of another shape", {"mu": [0.0], "sigma": 1.0}, "[1]", named="mu"),
            fault("theta", "a word", {"mu": "a", "sigma": 1.0}, "'a'", named="mu"),
            fault("theta", "out of the domain", {"mu": 0.0, "sigma": -1.0}, "-1", named="sigma"),
            fault("theta", "nan", {"mu": math.nan, "sigma": 1.0}, "nan", named="mu"),
        ],
    ),
    Subject(
        "bayes.check_invariance",
        check_invariance,
        lambda: {"estimate": made(), "bijection": {"sigma": ExpTransform().inv}},
        [
            fault("bijection", "nothing", None, "transform", "None"),
            fault("bijection", "a function", torch.exp, "transform"),
            fault("bijection", "a function by name", {"sigma": torch.exp}, "sigma"),
            fault("bijection", "of an unknown", {"tau": ExpTransform()}, "mu, sigma", "'tau'"),
            fault("bijection", "no bijection", {"mu": AbsTransform()}, "mu"),
            fault("bijection", "no bijection of the data", AbsTransform(), "the data"),
            fault("bijection", "beyond its domain", {"mu": ExpTransform().inv}, "mu", "finite"),
            fault("bijection", "none", {}, "at least one"),
            fault("estimate", "its draws", normal(), "Estimate", "dict"),
            fault("log_posterior", "its name", "lp", "callable", "'lp'"),
        ],
    ),
]
LAW = Normal(torch.zeros(3), 1.0)
SOME = family_of(LAW)
assert SOME is not None
NATURAL = SOME.natural(LAW)
FAMILIES = [
    Subject(
        "bayes.family_of",
        family_of,
        lambda: {"distribution": LAW},
        [
            fault("distribution", "nothing", None, "distribution", "NoneType"),
            fault("distribution", "its class", Normal, "distribution", "type"),
            fault("distribution", "its name", "normal", "distribution", "str"),
            fault(
                "distribution",
                "a number of trials that moves",
                Binomial(torch.tensor([3, 4]), torch.tensor(0.5)),
                "moves",
                named="Binomial",
            ),
        ],
    ),
    Subject(
        "bayes.divergence_between",
        divergence_between,
        lambda: {"family": SOME, "divergence": KL(), "p": NATURAL, "q": NATURAL},
        [
            fault("divergence", "of no closed form", JensenShannon(), "Amari", named="Jensen"),
            fault("divergence", "its name", "kl", "Divergence", "'kl'"),
            fault("divergence", "its class", KL, "Divergence", "KL"),
            fault("family", "a law", LAW, "family", "Normal"),
            fault("family", "its name", "normal", "'normal'"),
            fault("p", "a component too few", NATURAL[:1], "2", "1"),
            fault("q", "a component too few", NATURAL[:1], "2", "1"),
            fault("p", "a law", LAW, "natural", "Normal"),
            fault("q", "a law", LAW, "natural", "Normal"),
        ],
    ),
    *(
        Subject(
            f"bayes.{kind.__name__}",
            kind,
            lambda more=more: {"design": random(5, 2), "coefficients": random(3, 2)} | more,
            [
                fault("design", "a list", [[1.0, 2.0]], "tensor", "list"),
                fault("design", "integers", torch.ones(5, 2).long(), "floating-point", "int64"),
                fault("design", "another width", random(5, 3), "[5, 3]", "[3, 2]"),
                fault("design", "a vector", random(5), "[rows, columns]", "[5]"),
                fault("design", "nan", random(5, 2) * math.nan, "finite"),
                fault("coefficients", "a list", [1.0, 2.0], "tensor", "list"),
                fault("coefficients", "integers", torch.ones(2).long(), "floating", "int64"),
                fault("coefficients", "one too few", random(3, 1), "[5, 2]", "[3, 1]"),
                fault("coefficients", "a number", random(), "[5, 2]", "[]"),
                fault("coefficients", "nan", random(3, 2) * math.nan, "nan"),
                *faults,
            ],
        )
        for kind, more, faults in (
            (PoissonRegression, {}, []),
            (LogisticRegression, {}, []),
            (
                GaussianRegression,
                {"scale": torch.ones(3)},
                [
                    fault("scale", "zero", torch.zeros(3), "0"),
                    fault("scale", "negative", -1.0, "-1"),
                    fault("scale", "of another batch", torch.ones(4), "[4]"),
                    fault("scale", "a word", "wide", "'wide'"),
                    fault("scale", "nothing", None, "None"),
                ],
            ),
        )
    ),
]
SUBJECTS = [*ACTING, *ASKING, *FAMILIES]

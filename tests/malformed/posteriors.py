"""What draws of a posterior, and what is measured and drawn of them, must refuse."""

import math
import types

import torch
import xarray as xr
from subjects import Subject, fault

from rkl import plots
from rkl.bayes import Draws, read_draws
from rkl.stats import batch_means, chains, pareto

CHAINS, DRAWS = 2, 40
NORMAL = "normal(loc=mu, scale=sigma)"


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


MU, SIGMA = random(CHAINS, DRAWS), random(CHAINS, DRAWS, seed=1).exp()


def normal(**changes):
    return {"mu": MU, "sigma": SIGMA} | changes


def with_one(x, value):
    """The draws, one of them another."""
    x = x.clone()
    x[1, 2] = value
    return x


WRONG_KIND = [
    fault("draws", "nothing", None, "DataTree", "NoneType"),
    fault("draws", "a number", 3, "DataTree", "int"),
    fault("draws", "a tensor alone", MU, "dict of arrays", "Tensor"),
]
OF_VARIABLES = [
    fault("draws", "none", {}, "at least one variable"),
    fault("draws", "empty", {"mu": MU[:, :0]}, "empty", "2 x 0"),
    fault("draws", "one chain alone", {"mu": MU[0]}, "mu[None]", "[40]", named="mu"),
    fault("draws", "a number each", {"mu": 1.0}, "[chains, draws, ...]", "[]", named="mu"),
    fault("draws", "ragged lists", {"mu": [[1.0, 2.0], [3.0]]}, "one length", named="mu"),
    fault("draws", "unequal chains", normal(sigma=SIGMA[:1]), "1 chains", named="sigma"),
    fault("draws", "unequal draws", normal(sigma=SIGMA[:, :3]), "of 3", "of 40", named="sigma"),
    fault("draws", "words", {"mu": [["a", "b"]]}, "real numbers", named="mu"),
    fault("draws", "complex numbers", {"mu": MU * 1j}, "real numbers", "complex", named="mu"),
    fault(
        "draws",
        "without a chain",
        {"mu": xr.DataArray(MU[0].numpy(), dims="draw")},
        "chain and draw",
        "draw",
        named="mu",
    ),
]
OF_WEIGHTS = [
    fault("weights", "of one chain", torch.ones(DRAWS), "[2, 40]", "[40]"),
    fault("weights", "transposed", torch.ones(DRAWS, CHAINS), "[2, 40]", "[40, 2]"),
    fault("weights", "negative", -torch.ones(CHAINS, DRAWS), "at least 0", "-1"),
    fault("weights", "nan", torch.full((CHAINS, DRAWS), math.nan), "finite"),
    fault("weights", "infinite", torch.full((CHAINS, DRAWS), math.inf), "finite", "inf"),
    fault("weights", "zero everywhere", torch.zeros(CHAINS, DRAWS), "not all 0"),
    fault("weights", "words", [["a", "b"]], "numbers"),
]
OF_FILES = [
    ("no file", "missing.nc", "missing.nc", "no such file"),
    ("no store", "missing.zarr", "missing.zarr", "no such file"),
    ("another format", "text.txt", "text.txt", "cannot be read"),
    ("a folder", "nothing", "nothing", "it is a folder"),
    ("torn", "torn.nc", "torn.nc", "cannot be read"),
    ("no NetCDF", "foreign.nc", "foreign.nc", "cannot be read"),
    ("an empty file", "empty.nc", "empty.nc", "cannot be read"),
    ("without chains", "flat.nc", "flat.nc", "no posterior", "chain and draw"),
]
DRAWING = [
    Subject(
        "bayes.read_draws",
        lambda draws, weights=None: read_draws(draws, weights),
        lambda: {"draws": normal(), "weights": torch.ones(CHAINS, DRAWS)},
        [
            *WRONG_KIND,
            *OF_VARIABLES,
            *OF_WEIGHTS,
            *(fault("draws", kind, path, *says, named=says[0]) for kind, path, *says in OF_FILES),
            fault("draws", "a list of arrays", [MU], "CmdStan's csv"),
            fault("draws", "an empty list", [], "CmdStan's csv"),
            fault("draws", "a missing csv", ["missing.csv"], "missing.csv", named="draws"),
            fault(
                "draws",
                "a posterior that is none",
                types.SimpleNamespace(posterior=3),
                "Dataset",
                named="posterior",
            ),
            fault(
                "draws",
                "a tree without posterior",
                xr.DataTree.from_dict({"prior": xr.Dataset({"mu": ("x", [1.0])})}),
                "posterior",
                named="DataTree",
            ),
            fault(
                "draws",
                "stacked",
                xr.Dataset({"mu": ("sample", [1.0, 2.0])}),
                "unstack",
                named="Dataset",
            ),
        ],
    ),
    Subject(
        "bayes.Draws",
        lambda draws, weights: Draws(draws, weights),
        lambda: {"draws": normal(), "weights": torch.ones(CHAINS, DRAWS)},
        [*OF_VARIABLES, *OF_WEIGHTS[:-1]],
    ),
    Subject(
        "bayes.Draws[]",
        lambda draws, name: Draws(draws)[name],
        lambda: {"draws": normal(), "name": "mu"},
        [
            fault("name", "unknown", "tau", "mu, sigma", named="'tau'"),
            fault("draws", "nan", normal(mu=with_one(MU, math.nan)), "chain 1", named="mu"),
            fault("draws", "infinite", normal(mu=with_one(MU, -math.inf)), "-inf", named="mu"),
        ],
    ),
    Subject(
        "bayes.Draws.chunks",
        lambda names, size: list(Draws(normal()).chunks(names, size)),
        lambda: {"names": ["mu"], "size": 10},
        [
            fault("names", "none", [], "at least one"),
            fault("names", "unknown", ["tau"], "mu, sigma", named="'tau'"),
            fault("size", "zero", 0, "at least 1", "0"),
            fault("size", "negative", -1, "at least 1", "-1"),
        ],
    ),
    Subject(
        "bayes.Draws.every",
        lambda step: Draws(normal()).every(step),
        lambda: {"step": 2},
        [fault("step", "zero", 0, "at least 1", "0")],
    ),
]
OF_X = [
    fault("x", "a list", MU.tolist(), "tensor", "list"),
    fault("x", "nothing", None, "tensor", "NoneType"),
    fault("x", "integers", MU.long(), "floating-point", "int64"),
    fault("x", "one chain alone", MU[0], "[chains, draws, ...]", "[40]"),
    fault("x", "no chain", MU[:0], "[chains, draws, ...]", "[0, 40]"),
    fault("x", "three draws", MU[:, :3], "at least 4", "[2, 3]"),
    fault("x", "nan", with_one(MU, math.nan), "finite", "1"),
    fault("x", "infinite", with_one(MU, math.inf), "finite", "1"),
]
MEASURING = [
    *(
        Subject(f"chains.{name}", getattr(chains, name), lambda: {"x": MU}, OF_X)
        for name in ("autocorrelation_time", "ess", "ess_and_rhat", "ess_tail", "rhat")
    ),
    Subject(
        "chains.ess of weighted draws",
        chains.ess,
        lambda: {"x": MU, "weights": SIGMA},
        [
            fault("weights", "of another shape", SIGMA[0], "[2, 40]", "[40]"),
            fault("weights", "a list", SIGMA.tolist(), "tensor", "list"),
            fault("weights", "negative", -SIGMA, "at least 0"),
            fault("weights", "nan", with_one(SIGMA, math.nan), "finite"),
            fault("weights", "zero everywhere", 0 * SIGMA, "0"),
        ],
    ),
    Subject(
        "batch_means.slots_of",
        batch_means.slots_of,
        lambda: {"chains": 4},
        [fault("chains", "zero", 0, "at least 1", "0")],
    ),
    Subject(
        "batch_means.BatchMeans",
        batch_means.BatchMeans,
        lambda: {"chains": 2, "length": 1},
        [
            fault("chains", "zero", 0, "at least 1", "0"),
            fault("chains", "negative", -1, "at least 1", "-1"),
            fault("length", "zero", 0, "at least 1", "0"),
        ],
    ),
    Subject(
        "batch_means.BatchMeans.push",
        lambda chain, values, weights: batch_means.BatchMeans(2, (3,)).push(
            chain, values, weights
        ),
        lambda: {"chain": 1, "values": random(5, 3), "weights": torch.ones(5)},
        [
            fault("chain", "one too many", 2, "2"),
            fault("chain", "negative", -1, "-1"),
            fault("values", "another width", random(5, 4), "[draws, 3]", "[5, 4]"),
            fault("values", "a list", [[0.0] * 3], "tensor", "list"),
            fault("weights", "one too few", torch.ones(4), "[5]", "[4]"),
        ],
    ),
    Subject(
        "pareto.pareto_k",
        pareto.pareto_k,
        lambda: {"values": random(100)},
        [
            fault("values", "a list", [1.0], "tensor", "list"),
            fault("values", "integers", torch.ones(30).long(), "floating-point", "int64"),
            fault("values", "a single number", random(), "[draws, ...]", "single number"),
            fault("values", "nan", random(100) * math.nan, "100 nan"),
        ],
    ),
    Subject(
        "pareto.tail",
        pareto.tail,
        lambda: {"values": random(100)},
        [
            fault("values", "a list", [1.0], "tensor", "list"),
            fault("values", "integers", torch.ones(30).long(), "floating-point", "int64"),
            fault("values", "a single number", random(), "[draws, ...]", "single number"),
            fault("values", "nan", random(100) * math.nan, "100 nan"),
        ],
    ),
    Subject(
        "posterior",
        plots.posterior,
        lambda: {"draws": {"mu": MU}, "acts": {"mean": {"mu": 0.0}}, "regions": {"mu": [(-1, 1)]}},
        [
            fault("draws", "none", {}, "at least one"),
            fault("draws", "empty", {"mu": []}, "finite", "none"),
            fault("draws", "nan", {"mu": [math.nan]}, "finite", "none"),
            fault("draws", "words", {"mu": ["a"]}, named="mu"),
            fault("draws", "one alone", MU, "names"),
            fault("acts", "numbers alone", {"mean": 0.0}, "mean", "0.0"),
            fault("acts", "words", {"mean": {"mu": "a"}}, "'a'"),
            fault("regions", "one end", {"mu": [(1.0,)]}, "pairs of ends"),
            fault("regions", "no pairs", {"mu": (-1.0, 1.0)}, "pairs of ends", named="mu"),
        ],
    ),
    Subject(
        "estimates",
        plots.estimates,
        lambda: {"panels": {"P": {"a": ([1, 10], [2, 1], [1, 1])}}, "truth": 1.0, "label": "s"},
        [
            fault("panels", "none", {}, "empty"),
            fault("panels", "an empty one", {"P": {}}, "empty"),
            fault("panels", "a pair", {"P": {"a": ([1], [1])}}, "2 of three"),
            fault("panels", "a size too few", {"P": {"a": ([1], [1, 2], [1, 2])}}, "one length"),
            fault("panels", "words", {"P": {"a": (["a"], [1], [1])}}, "numbers"),
            fault("columns", "zero", 0, "at least 1", "0"),
            fault("truth", "a word", "one", "number", "'one'"),
        ],
    ),
]
SUBJECTS = [*DRAWING, *MEASURING]

"""Fitting flows to data and sampling them, and what of it must be refused."""

import math

import torch
from subjects import ABSENT, Lazy, Subject, command, fault

from rkl import KL, PrecisionRecall, fit, flows
from rkl.flows import architectures


def rows(count=40):
    return torch.randn(count, 2, generator=torch.Generator().manual_seed(0))


def objective_of(flow):
    return lambda moment: flow(torch.ones(1, 1)).square().sum()


def training():
    flow = torch.nn.Linear(1, 1)
    return {"flow": flow, "objective": objective_of(flow), "steps": 2}


def a_fit(with_critic):
    how = {"steps": 1, "with_critic": with_critic, "method": fit.Method(batch=4)}
    return fit.fit_to_samples(flows.Coupling(2, (4,)), rows(), **how)


def a_law():
    return flows.Coupling(2, (4,)).build((2,))()


SUBJECTS = [
    Subject(
        "fit.read_data",
        fit.read_data,
        lambda: {"source": rows(), "labels": [0, 1] * 20, "dequantise": None},
        [
            fault("source", "a number", 3, "int", named="data"),
            fault("source", "one axis", torch.zeros(40), "[40]", named="data"),
            fault("source", "few rows", rows(5), "5", "20", named="data"),
            fault("source", "nan", rows() * math.nan, "row 0", named="data"),
            fault("source", "a constant", 0.3 * torch.ones(40, 2), "constant", named="data"),
            fault("source", "complex", rows() + 0j, "complex", named="data"),
            fault("source", "integers", torch.arange(80).view(40, 2), "dequantise", named="data"),
            fault("source", "no file", "nowhere.npy", "nowhere.npy", named="data"),
            fault("labels", "too few", [0, 1], "40", "2"),
            fault("labels", "a number", 3, "3"),
        ],
    ),
    Subject(
        "fit.fit_to_samples",
        fit.fit_to_samples,
        lambda: {
            "flow": flows.Coupling(2, (4,)),
            "data": rows(),
            "divergence": KL(),
            "steps": 1,
            "minutes": None,
            "method": fit.Method(batch=4),
            "target_precision": None,
            "budget": None,
        },
        [
            fault("flow", "a string", "nsf", "'nsf'"),
            fault("divergence", "a string", "kl", "'kl'"),
            fault("steps", "none", 0, "0"),
            fault("steps", "a fraction", 0.5, "0.5"),
            fault("minutes", "both budgets", 1.0, "steps"),
            fault("target_precision", "above one", 1.5, "1.5"),
            fault("budget", "below one draw", 0.5, "0.5"),
            fault("data", "nan", rows() * math.nan, "finite"),
        ],
    ),
    Subject(
        "fit.distil_rejection",
        fit.distil_rejection,
        lambda: {"fitted": a_fit(True), "budget": 1.1, "anchor": 0.5, "steps": 1},
        [
            fault("fitted", "without a critic", Lazy(lambda: a_fit(False)), "with_critic"),
            fault("budget", "below one draw", 0.5, "0.5"),
            fault("budget", "missing", ABSENT, "accept_lam"),
            fault("anchor", "one", 1.0, "1.0"),
            fault("steps", "none", 0, "0"),
        ],
    ),
    Subject(
        "flows.train",
        flows.train,
        lambda: training() | {"lr": 1e-3, "clip": 1.0, "ema": 0.9, "every": 1},
        [
            fault("steps", "negative", -1, "-1"),
            fault("steps", "missing", ABSENT, "minutes"),
            fault("lr", "nan", math.nan, "nan"),
            fault("clip", "zero", 0.0, "0.0"),
            fault("ema", "one", 1.0, "1.0"),
            fault("every", "zero", 0, "0"),
            fault("flow", "without parameters", torch.nn.Identity(), "no parameters"),
        ],
    ),
    Subject(
        "fit.Method",
        fit.Method,
        lambda: {"estimator": "data", "start": 0.5, "anchor": 0.1, "batch": 8, "held_out": 0.1},
        [
            fault("estimator", "unknown", "best", "'best'"),
            fault("start", "all of it", 1.0, "1.0"),
            fault("anchor", "negative", -0.1, "-0.1"),
            fault("anchor", "a string", "0.1", "'0.1'"),
            fault("batch", "one", 1, "1"),
            fault("held_out", "none", 0.0, "0.0"),
        ],
    ),
    Subject(
        "flows.Critic",
        flows.Critic,
        lambda: {"hidden": (8,), "divergence": KL(), "lr": 1e-3, "updates": 1},
        [
            fault("hidden", "a number", 8, "8"),
            fault("divergence", "one with a flat dual", PrecisionRecall(lam=2.0), "flat=True"),
            fault("divergence", "a string", "kl", "'kl'"),
            fault("lr", "zero", 0.0, "0.0"),
            fault("updates", "none", 0, "0"),
        ],
    ),
    *(
        Subject(
            f"flows.{architecture.__name__}",
            architecture,
            lambda: {"transforms": 2, "hidden": (4,)},
            [
                fault("transforms", "none", 0, "0"),
                fault("transforms", "a fraction", 1.5, "1.5"),
                fault("hidden", "a list", [4], "[4]"),
            ],
        )
        for architecture in (flows.Coupling, flows.MAF, flows.NSF)
    ),
    Subject(
        "flows.MultiScale",
        flows.MultiScale,
        lambda: {"scales": 1, "couplings": 2, "hidden": 4},
        [fault("scales", "none", 0, "0"), fault("couplings", "a string", "2", "'2'")],
    ),
    Subject(
        "flows.latent",
        architectures.latent,
        lambda: {"law": a_law(), "temperature": 0.5, "bound": 2.0},
        [
            fault("law", "another law", torch.distributions.Normal(0.0, 1.0), "Normal"),
            fault("temperature", "zero", 0.0, "0.0"),
            fault("bound", "nan", math.nan, "nan"),
        ],
    ),
    Subject(
        "rkl fit",
        command("fit"),
        lambda: {"data": "flow-rows.npy", "out": "fitted", "steps": 1, "flow": "maf"},
        [
            fault("data", "no file", "nowhere.npy", "nowhere.npy"),
            fault("flow", "unknown", "nfs", "'nfs'", named="nfs"),
            fault("steps", "none", 0, "0"),
            fault("steps", "a word", "many", "many"),
            fault("out", "missing", ABSENT, "required"),
        ],
        costly=True,
    ),
    Subject(
        "rkl fit --target",
        command("fit"),
        lambda: {"target": "mog4", "out": "aimed", "steps": 1, "flow": "maf", "batch": 64},
        [
            fault("target", "unknown", "mog5", "'mog5'", named="mog5"),
            fault("target", "no module", "nowhere:law(event_shape=(2,))", "nowhere"),
            fault("objective", "no divergence", "data:nothing", "nothing"),
            fault("data", "no file", "nowhere.npz", "nowhere.npz"),
            fault("condition", "one it lacks", "K=1", "K=1"),
            fault("flow", "a lattice's", "coarse-to-fine", "of the line", "CoarseToFine"),
            fault("batch", "one", 1, "1"),
            fault("anchor", "of a fit to data", 0.1, "unrecognized"),
        ],
        costly=True,
    ),
    Subject(
        "rkl fit --target",
        command("fit"),
        lambda: {"target": "xy(side=2)", "out": "spins", "steps": 1, "batch": 64},
        [fault("objective", "data that are not there", "1.0*data:kl", named="data")],
        costly=True,
    ),
    Subject(
        "rkl sample",
        command("sample"),
        lambda: {"_run": ["a-run"], "n": 3, "out": "samples.npy"},
        [fault("_run", "no run", ["nowhere"], "nowhere", named="run")],
        costly=True,
    ),
]

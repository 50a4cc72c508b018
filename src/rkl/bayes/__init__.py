"""Bayes point estimates under any divergence, from any posterior."""

import importlib

_HOMES = {
    "act": "Estimate bayes_act",
    "answer": "Act Diagnostics",
    "draws": "Draws read_draws",
    "families": "ExponentialFamily GaussianRegression LogisticRegression PoissonRegression "
    "divergence_between family_of",
    "invariance": "check_invariance",
    "losses": "Intrinsic",
    "partitions": "PartitionAct partition_act",
    "projection": "Projection project",
    "regions": "Region",
    "run": "EstimateSettings Estimated EvaluateSettings compare_runs evaluate_run load_run "
    "report_runs",
    "tables": "Table",
}
_HOME = {
    name: f"{__name__}.{module}" for module, names in _HOMES.items() for name in names.split()
}
__all__ = list(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__

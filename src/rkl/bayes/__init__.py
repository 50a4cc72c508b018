"""Bayes point estimates under any divergence, from any posterior."""

from rkl.lazy import lazily

HOMES = {
    "act": "Estimate bayes_act",
    "answer": "Act Diagnostics",
    "draws": "Draws read_draws",
    "families": "ExponentialFamily GaussianRegression LogisticRegression PoissonRegression "
    "family_of",
    "invariance": "check_invariance",
    "loss.between": "Intrinsic divergence_between",
    "partitions": "PartitionAct partition_act",
    "projection": "Projection project",
    "regions": "Region",
    "run": "Estimated load_run",
    "settings": "EstimateSettings EvaluateSettings",
    "evaluate": "compare_runs evaluate_run",
    "report": "report_runs",
    "tables": "Table",
}
__all__, __getattr__, __dir__ = lazily(__name__, HOMES)

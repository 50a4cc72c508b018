"""Flows fitted to data, at a trade-off of precision and recall."""

from rkl.lazy import lazily

HOMES = {
    "compare": "compare_runs",
    "data": "read_data",
    "evaluate": "DataEvaluation evaluate_run report_runs",
    "fit": "Method fit_to_samples",
    "load": "load_critic load_run",
    "operating": "distil_rejection",
    "rejection": "Accepted reject",
    "result": "Fit Reached",
    "run": "save_run",
    "samples": "sample_run",
    "settings": "EvaluateSettings FitSettings SampleSettings",
}
__all__, __getattr__, __dir__ = lazily(__name__, HOMES)

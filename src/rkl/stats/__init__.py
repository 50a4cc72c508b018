"""Means of draws with their standard errors, and diagnostics of the draws."""

from rkl.lazy import lazily

HOMES = {
    "batch_means": "BatchMeans jackknife",
    "chains": "autocorrelation_time ess ess_and_rhat ess_tail integrated_time rhat",
    "means": "Mean clustered_mean mean to_json",
    "pareto": "Tail pareto_k tail",
    "quantiles": "interpolated_quantile quantile",
    "resampling": "resample",
}
__all__, __getattr__, __dir__ = lazily(__name__, HOMES)

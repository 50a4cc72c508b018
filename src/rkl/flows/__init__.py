"""Normalizing flows, fitted to data or to an unnormalised density."""

from rkl.lazy import lazily

HOMES = {
    "architectures": (
        "MAF NSF Architecture CircularSplines Coupling MixedSplines MultiScale draw latent"
    ),
    "compare": "FlowComparison compare_runs",
    "critic": "Critic",
    "coverage": "Coverage Mode judge_coverage judge_ratios",
    "data": "Data read_data",
    "data_run": "FitSettings load_critic load_run",
    "evaluate": "condition_grid evaluate_on_target",
    "evaluation": "Evaluation Reference",
    "fit": "Method fit_to_samples",
    "fitted": "Fit Reached",
    "importance": "Importance Thermodynamics expectation reweight thermodynamics",
    "lattice": "CheckerboardRealNVP CoarseToFine CoarseToFineField",
    "mcmc": (
        "HeatBath Metropolis Phi4HeatBath RandomWalk Walk Wolff annealed_importance markov_chain "
        "mbar thermodynamic_integration"
    ),
    "metropolis": "Chain independent_metropolis",
    "objectives": "Objective Term parse_objective",
    "observables": "averages beside_held_out check_held_out",
    "operating": "distil_rejection",
    "rejection": "Accepted reject",
    "run": "SampleSettings sample_run save_run",
    "run_evaluation": "DataEvaluation EvaluateSettings NotCoveredError evaluate_run report_runs",
    "smc": "Evidence evidence",
    "target_fit": "TargetFit fit_to_target",
    "targets": "Density Target parse_target",
    "training": "Moment Training train",
}
__all__, __getattr__, __dir__ = lazily(__name__, HOMES)

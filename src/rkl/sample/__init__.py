"""Draws of an unnormalised target, by flows fitted to it and by Markov chains, with log Z."""

from rkl.lazy import lazily

HOMES = {
    "compare": "compare_runs",
    "coverage": "Coverage Mode judge_coverage judge_ratios",
    "evaluate": "NotCoveredError evaluate_on_target evaluate_run report_runs",
    "fit": "TargetFit fit_to_target",
    "importance": "Importance Thermodynamics expectation reweight thermodynamics",
    "lattice": "CheckerboardRealNVP CoarseToFine CoarseToFineField",
    "log_z": "annealed_importance mbar thermodynamic_integration",
    "mcmc": "HeatBath Metropolis Phi4HeatBath RandomWalk Walk Wolff markov_chain",
    "metropolis": "Chain independent_metropolis",
    "objectives": "Objective Term parse_objective",
    "observables": "averages compare_with_held_out check_held_out",
    "results": "Evaluation Reference",
    "run": "load_run sample_run",
    "settings": "EvaluateSettings SampleSettings TargetSettings condition_grid",
    "smc": "Evidence evidence",
    "targets": (
        "Condition Density Fluctuation GaussianMixture Kernel MoG4 MoG8 Modes Phi4 Rings Target "
        "XY check_target parse_target"
    ),
}
__all__, __getattr__, __dir__ = lazily(__name__, HOMES)

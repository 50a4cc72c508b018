"""Public names in the groups that their users think in; a name in no group is shown last."""

import importlib
from collections.abc import Iterator

import rkl

# A group is a title and names. The divergences are found in the catalogue and not listed.
GROUPS: dict[str, dict[str, str]] = {
    "rkl": {
        "Divergences": "",
        "Write one of your own": "Divergence FDivergence row_sum row_max row_logsumexp",
        "Compute it": "exact per_token monte_carlo sampled_terms variational_bound",
        "What is known of p and q": "LinearHead TopK Sampled draw",
        "Names and texts": "catalogue parse",
        "Runs": "load save",
    },
    "rkl.distill": {
        "Distil": "distill DistillSettings dry_run Distilled DistillTrainer DistillConfig",
        "The loss": "distill_loss KDLoss Head read_head",
        "Teachers": "Teacher AlignedTeacher SortedTeacher TextTeacher PublishedTeacher "
        "ServerTeacher CachedTeacher cache_teacher write_cache dry_run_cache CacheSettings",
        "Models and text": "load_model load_tokenizer new_model new_tokenizer Shape tokenize "
        "show_example PadRows",
        "The student's own text": "Writer ModelWriter ServerWriter Sampling Reply "
        "CollapseLimits generate_run GenerateSettings",
        "Evaluate and compare": "evaluate_run EvaluateSettings evaluate_pair PairSettings "
        "Comparison compare_runs Evaluations judge_runs judge_cost JudgeSettings Judged "
        "report_runs load_run",
        "Errors": "CollapseError DivergedError ServerError",
    },
    "rkl.fit": {
        "Fit": "fit_to_samples Method Fit Reached FitSettings read_data",
        "Precision for recall": "reject Accepted distil_rejection",
        "Draw, evaluate, compare": "sample_run SampleSettings evaluate_run EvaluateSettings "
        "DataEvaluation compare_runs report_runs",
        "Runs": "load_run load_critic save_run",
    },
    "rkl.sample": {
        "Fit": "fit_to_target TargetFit TargetSettings",
        "Targets": "XY Phi4 GaussianMixture MoG4 MoG8 Rings parse_target",
        "A target of your own": "Density Target Condition Modes Kernel Fluctuation check_target "
        "condition_grid",
        "Architectures for lattices": "CoarseToFine CoarseToFineField CheckerboardRealNVP",
        "Objectives": "Objective Term parse_objective",
        "Draws and averages": "independent_metropolis Chain expectation reweight averages "
        "sample_run SampleSettings",
        "Log Z": "thermodynamics Thermodynamics Importance evidence Evidence annealed_importance "
        "thermodynamic_integration mbar",
        "Evaluate": "evaluate_on_target Evaluation Reference judge_coverage judge_ratios Coverage "
        "Mode compare_with_held_out check_held_out evaluate_run EvaluateSettings compare_runs "
        "report_runs load_run NotCoveredError",
        "Markov chains": "markov_chain Walk HeatBath Phi4HeatBath Metropolis RandomWalk Wolff",
    },
    "rkl.bayes": {
        "Estimate": "bayes_act Estimate Act Diagnostics EstimateSettings Intrinsic",
        "Posterior draws": "Draws read_draws",
        "Families": "ExponentialFamily family_of GaussianRegression PoissonRegression "
        "LogisticRegression",
        "Beside the estimate": "Region Table check_invariance divergence_between",
        "Simpler models and clusterings": "project Projection partition_act PartitionAct",
        "Runs": "load_run Estimated evaluate_run EvaluateSettings compare_runs report_runs",
    },
    "rkl.flows": {
        "Architectures": "Architecture Coupling NSF MAF MixedSplines CircularSplines MultiScale",
        "Train": "train Training Moment Critic Data",
        "Draw": "draw latent",
        "Compare": "FlowComparison",
    },
    "rkl.metrics": {
        "Precision and recall of two densities": "pr_curve Curve operating_point OperatingPoint",
        "What a divergence looks at": "pr_spectrum Spectrum pr_weight spectrum_text",
        "Of samples": "measure Measured pr_curve_sampled SampledCurve prdc PRDC prdc_ceiling "
        "copies Copies prd_curve equal_precision frechet_distance frechet_bias earth_mover "
        "histogram_overlap",
        "Of text": "rouge_l distinct_n distinct_n_together self_bleu length words",
    },
    "rkl.stats": {
        "Means with errors": "Mean mean clustered_mean BatchMeans jackknife to_json",
        "Chains": "ess ess_and_rhat ess_tail rhat autocorrelation_time integrated_time",
        "Tails": "Tail tail pareto_k",
        "Weighted draws": "quantile interpolated_quantile resample",
    },
    "rkl.plots": {
        "Figures": "training_curves divergence_by_rank head_tail head_tail_by_step "
        "precision_recall bars estimates posterior",
        "For a page": "to_svg",
    },
    "rkl.testing": {"Laws": "check_divergence"},
}


def catalogue_names() -> list[str]:
    """The divergences of rkl itself, KL and reverse KL first."""
    ours = [cls.__name__ for cls in rkl.catalogue().values() if cls.__module__.startswith("rkl.")]
    return sorted(ours, key=lambda name: (name not in ("KL", "ReverseKL"), name.lower()))


def groups(package: str) -> dict[str, list[str]]:
    """The names of a package under the titles of their groups, and those in no group under More.

    Raises:
        ValueError: A name in a group is not public, or is in two.
    """
    found = {title: names.split() for title, names in GROUPS[package].items()}
    if package == "rkl":
        found["Divergences"] = catalogue_names()
    grouped = [name for names in found.values() for name in names]
    public = importlib.import_module(package).__all__
    twice = {name for name in grouped if grouped.count(name) > 1}
    if faults := set(grouped) - set(public) | twice:
        raise ValueError(
            f"GROUPS[{package!r}] of {__file__} must hold public names of {package}, each once; "
            f"look at {', '.join(sorted(faults))}."
        )
    more = [name for name in public if name not in grouped]
    return found | ({"More": more} if more else {})


def public() -> Iterator[tuple[str, str]]:
    """Every package and public name."""
    for package in GROUPS:
        for names in groups(package).values():
            yield from ((package, name) for name in names)

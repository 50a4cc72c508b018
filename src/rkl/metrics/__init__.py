"""Measures of how near a model is to its target: tensors in, values with their errors out."""

from rkl.lazy import lazily

HOMES = {
    "clusters": "equal_precision prd_curve",
    "frechet": "frechet_bias frechet_distance",
    "neighbours": "PRDC Copies copies prdc prdc_ceiling",
    "overlap": "earth_mover histogram_overlap",
    "precision_recall": (
        "Curve OperatingPoint SampledCurve Spectrum operating_point pr_curve pr_curve_sampled "
        "pr_spectrum pr_weight"
    ),
    "precision_recall.spectrum": "spectrum_text",
    "samples": "Measured measure",
    "text": "distinct_n distinct_n_together length rouge_l self_bleu words",
}
__all__, __getattr__, __dir__ = lazily(__name__, HOMES)

"""Common parts of fit and sample: architectures, their training and their critics."""

from rkl.lazy import lazily

HOMES = {
    "architectures": (
        "MAF NSF Architecture CircularSplines Coupling MixedSplines MultiScale draw latent"
    ),
    "compare": "FlowComparison",
    "critic": "Critic",
    "rows": "Data",
    "training": "Moment Training train",
}
__all__, __getattr__, __dir__ = lazily(__name__, HOMES)

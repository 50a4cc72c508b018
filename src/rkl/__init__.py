"""rkl: the divergence you minimise decides what you get, so choose it, in one place."""

import importlib

_HOMES = {
    "divergences": "AKL KL AlphaBeta Amari Divergence FDivergence Jeffreys JensenShannon "
    "NeymanChiSquare PearsonChiSquare PrecisionHalf PrecisionRecall RecallHalf ReverseKL SkewKL "
    "SkewReverseKL SquaredHellinger ToDi TotalVariation catalogue parse",
    "estimators": "LinearHead TopK exact monte_carlo per_token variational_bound",
    "runs": "load",
}
_HOME = {name: f"rkl.{module}" for module, names in _HOMES.items() for name in names.split()}
__all__ = list(_HOME)
__version__ = "0.1.0"


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'rkl' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__

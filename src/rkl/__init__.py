"""rkl: the divergence you minimise decides what you get, so choose it, in one place."""

import importlib

_DIVERGENCES = "rkl.divergences"  # whose classes are all names of rkl, and listed there alone
_HOMES = {
    "divergences": "Divergence FDivergence catalogue parse row_logsumexp row_max row_sum",
    "estimators": "LinearHead Sampled TopK draw exact monte_carlo per_token sampled_terms "
    "variational_bound",
    "runs": "load save",
}
_HOME = {name: f"rkl.{module}" for module, names in _HOMES.items() for name in names.split()}
__version__ = "0.2.0"


def _home(name: str) -> str | None:
    """The module in which a name of rkl is at home."""
    return _HOME.get(name) or (_DIVERGENCES if name[0].isupper() else None)


def __getattr__(name: str):
    if name == "__all__":
        return __dir__()
    if (home := _home(name)) is None:
        raise AttributeError(f"module 'rkl' has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted({*_HOME, *importlib.import_module(_DIVERGENCES).__all__})

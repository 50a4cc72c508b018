"""Names of a package that import their module when they are first asked for."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from rkl.extras import optional_import


def lazily(
    package: str, homes: Mapping[str, str]
) -> tuple[list[str], Callable[[str], Any], Callable[[], list[str]]]:
    """``__all__``, ``__getattr__`` and ``__dir__`` of a package, which so costs nothing to import.

    Args:
        package: Its ``__name__``.
        homes: By module of the package, the names that it takes from it, parted by spaces.

    >>> names, get, _ = lazily("rkl", {"checks": "number integer"})
    >>> names, get("integer").__module__
    (['number', 'integer'], 'rkl.checks')
    """
    home = {name: f"{package}.{module}" for module, them in homes.items() for name in them.split()}

    def get(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        with optional_import(f"{package}.{name}"):
            return getattr(importlib.import_module(home[name]), name)

    return list(home), get, lambda: list(home)

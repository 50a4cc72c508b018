"""Extras: the packages that parts of rkl need beyond its core, and the line that installs them."""

import importlib.util
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

# By extra, as in pyproject.toml: its packages, as they are imported. Where several have a package
# and nothing else decides, the first one is named.
EXTRAS: Mapping[str, str] = {
    "metrics": "pandas PIL",
    "bayes": "xarray h5netcdf h5py pandas",
    "flows": "zuko xarray h5netcdf h5py pandas PIL",
    "distill": "transformers accelerate tokenizers huggingface_hub jinja2 pandas",
    "report": "matplotlib jinja2 markupsafe",
    "arviz": "arviz",
    "data": "datasets",
    "peft": "peft",
    "gguf": "gguf",
    "studies": "sklearn",
}
_EXTRA_OF_PART = {name: name for name in EXTRAS} | dict.fromkeys(("fit", "sample"), "flows")


class optional_import:  # noqa: N801
    """Within the block, a package that is missing from an extra is an error with what to type.

    The extra is that of the part of rkl that asks for the package.

    Args:
        what: What needs the package: the subject of the sentence.

    >>> with optional_import("A flow"):
    ...     raise ModuleNotFoundError("No module named 'zuko'", name="zuko")
    Traceback (most recent call last):
    ModuleNotFoundError: A flow needs zuko: pip install 'rkl[flows]'
    """

    def __init__(self, what: str):
        self.what = what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if not isinstance(error, ModuleNotFoundError) or error.name is None:
            return
        package = error.name.partition(".")[0]
        if extra := _extra(package, error):
            raise _missing(self.what, package, extra) from None


def require(extra: str, what: str) -> None:
    """Refuse to begin without the packages of an extra.

    Args:
        extra: Its name.
        what: What needs it: the subject of the sentence.

    Raises:
        ModuleNotFoundError: One of them is not installed; the message says what to type.
    """
    for package in EXTRAS[extra].split():
        if importlib.util.find_spec(package) is None:
            raise _missing(what, package, extra)


def _missing(what: str, package: str, extra: str) -> ModuleNotFoundError:
    return ModuleNotFoundError(f"{what} needs {package}: pip install 'rkl[{extra}]'")


def _extra(package: str, error: BaseException) -> str | None:
    """The extra with a package that the innermost part of rkl needs; None without any."""
    having = [extra for extra, packages in EXTRAS.items() if package in packages.split()]
    asking = (_EXTRA_OF_PART.get(part) for part in _parts(error))
    return next((extra for extra in asking if extra in having), next(iter(having), None))


def _parts(error: BaseException) -> Iterator[str]:
    """Parts of rkl whose code runs where an error was raised, from the inside outwards."""
    inner = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    outer = [frame for frame, _ in traceback.walk_stack(inner[0].f_back)] if inner else []
    for frame in [*reversed(inner), *outer]:
        package, _, module = frame.f_globals.get("__name__", "").partition(".")
        if package == "rkl":
            yield module.partition(".")[0]

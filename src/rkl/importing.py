"""``module:name`` in a text: what may be imported, out of which folder, and what it must be.

Importing a module runs its code. What Python code asks for is imported. What stands in a file,
such as ``run.json``, is imported only if whoever reads the file allows that very name: the
readers of runs do so in :func:`only`, and the command line runs every command in it.
"""

import contextlib
import importlib
import re
import sys
import traceback
from collections.abc import Collection, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

_NAME = r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*:[A-Za-z_]\w*"


@dataclass(frozen=True)
class _Limits:
    """Importable modules, the file that names them, and one more folder to search."""

    names: frozenset[str]
    source: str
    folder: str | None


_LIMITS: ContextVar[_Limits | None] = ContextVar("rkl_imports", default=None)


@contextlib.contextmanager
def only(
    names: Collection[str] = (), *, source: Any = None, folder: str | None = None
) -> Iterator[None]:
    """Within the block, import nothing by name but these, and what a block around it allows.

    Args:
        names: Each as "module:name".
        source: The file that names are read from, for the message of a refusal.
        folder: Where modules may lie, besides where Python looks; it is on ``sys.path`` while
            one of them is imported, and no longer.

    Raises:
        TypeError: The names are a single text.
        ValueError: One of them is no "module:name".

    >>> with only(["fractions:Fraction"]):
    ...     import_object("fractions:Decimal")
    Traceback (most recent call last):
    ValueError: fractions:Decimal, which a file names, is not imported: that would run its code. \
If you trust it, say --allow fractions:Decimal, or allow=['fractions:Decimal'] in Python.
    """
    if isinstance(names, str) or not isinstance(names, Collection):
        raise TypeError(f"allow must be a list such as ['mine:Mine']; got {names!r}.")
    for name in names:
        check_name("allow", name)
    around = _LIMITS.get()
    if around is not None:
        names = {*names, *around.names}
        source, folder = source or around.source, folder or around.folder
    token = _LIMITS.set(_Limits(frozenset(names), str(source or ""), folder))
    try:
        yield
    finally:
        _LIMITS.reset(token)


def check_name(argument: str, name: Any) -> str:
    """Refuse what is no "module:name"."""
    if not isinstance(name, str) or not re.fullmatch(_NAME, name):
        raise ValueError(f"{argument} must be module:name, such as mine:Mine; got {name!r}.")
    return name


def names_in(*texts: Any) -> list[str]:
    """Every "module:name" in these texts.

    >>> names_in("0.5*kl + 0.5*my_package.losses:Mine(mu=0.1)", None)
    ['my_package.losses:Mine']
    """
    return [it for text in texts if isinstance(text, str) for it in re.findall(_NAME, text)]


def import_object(name: str) -> Any:
    """Import the object "module:name", if that is allowed; it is not called.

    Raises:
        ValueError: It may not, or cannot: the message says which file and line is at fault.
    """
    check_name("the name", name)
    limits = _LIMITS.get()
    if limits is not None and name not in limits.names:
        raise ValueError(
            f"{name}, which {limits.source or 'a file'} names, is not imported: that would run "
            f"its code. If you trust it, say --allow {name}, or allow=[{name!r}] in Python."
        )
    module, _, attribute = name.partition(":")
    try:
        with _on_path(None if limits is None else limits.folder):
            return getattr(importlib.import_module(module), attribute)
    except (Exception, SystemExit) as error:
        raise ValueError(f"{name} cannot be imported: {_reason(error)}.") from error


@contextlib.contextmanager
def _on_path(folder: str | None) -> Iterator[None]:
    """While a module is imported: its folder on sys.path, and no limits on its own code."""
    added = [] if folder is None or folder in sys.path else [folder]
    token = _LIMITS.set(None)
    sys.path += added
    importlib.invalidate_caches()
    try:
        yield
    finally:
        _LIMITS.reset(token)
        for entry in added:
            with contextlib.suppress(ValueError):  # the module took it off itself
                sys.path.remove(entry)


def _reason(error: BaseException) -> str:
    """The reason of a failed import, with the file and line of the user's code."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}, line {error.lineno}: {error.msg}"
    frames = traceback.extract_tb(error.__traceback__)
    passing = __file__, importlib.__file__
    frames = [it for it in frames if it.filename not in passing and it.filename[0] != "<"]
    where = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    if isinstance(error, SystemExit):
        return f"its code ends the program, with exit code {error.code!r}{where}"
    kind = "" if isinstance(error, ImportError | AttributeError) else f"{type(error).__name__}: "
    return f"{kind}{str(error).rstrip('.')}{where}"

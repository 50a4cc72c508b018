"""Docstrings, also where Python runs with -OO and has stripped them."""

import ast
import inspect
import re
import sys
import textwrap
from typing import Any


def documentation(described: Any) -> str:
    """The docstring of a function, a class or an object, with its indentation removed.

    With -OO it is read from the source; it is empty where there is none.
    """
    if sys.flags.optimize < 2:
        return inspect.getdoc(described) or ""
    if inspect.isroutine(described):
        return _from_source(described)
    kind = described if isinstance(described, type) else type(described)
    for base in kind.__mro__[:-1]:
        if text := _from_source(base):
            return text
    return ""


def _from_source(described: Any) -> str:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(described)))
    except (OSError, TypeError, SyntaxError):  # made at run time, or installed without source
        return ""
    node = tree.body[0] if tree.body else None
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return ""
    return ast.get_docstring(node) or ""


def without_markup(text: str) -> str:
    """A docstring as it is read in a terminal, without the roles of reStructuredText.

    >>> without_markup("As :func:`rkl.exact` and :class:`~rkl.divergences.KL` do with ``p``.")
    'As rkl.exact and KL do with p.'
    """
    text = re.sub(r":\w+:`~[\w.]*?(\w+)`", r"\1", text)
    return re.sub(r":\w+:`([^`]+)`", r"\1", text).replace("``", "")

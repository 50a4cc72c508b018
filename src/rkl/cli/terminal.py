"""Standard streams that take any text, warnings in one line, and causes of errors in words."""

import codecs
import contextlib
import os
import sys
import traceback
import unicodedata
import warnings
from collections.abc import Iterator
from typing import Any, TextIO

from rkl.runs.processes import main_process
from rkl.text import one_line

PLAIN = {
    "−": "-",
    "–": "-",
    "—": "-",
    "±": "+-",
    "‖": "||",
    "∥": "||",
    "·": "*",
    "×": "x",
    "∞": "inf",
    "→": "->",
    "↔": "<->",
    "←": "<-",
    "≤": "<=",
    "≥": ">=",
    "≠": "!=",
    "≈": "~",
    "∝": "~",
    "∈": "in",
    "∑": "sum",
    "∏": "prod",
    "∫": "int",
    "√": "sqrt",
    "∂": "d",
    "∇": "grad",
    "…": "...",
    "‘": "'",
    "’": "'",
    "“": '"',
    "”": '"',
    "█": "#",
    "━": "-",
    "─": "-",
    "│": "|",
    "•": "*",
    "✓": "yes",
    "✗": "no",
}
_ERRORS = "rkl.plain"


def plain(text: str) -> str:
    r"""The text in ASCII: signs by what they mean, Greek letters by name, the rest as \u escapes.

    >>> plain("D(p ‖ q) = −0.3 ± 0.1, 10⁻³ at χ")
    'D(p || q) = -0.3 +- 0.1, 10^-3 at chi'
    """
    written, raised = [], False
    for character in text:
        raises = unicodedata.decomposition(character).startswith("<super>")
        written += ["^"] if raises and not raised else []
        written.append(_plain_character(character))
        raised = raises
    return "".join(written)


def prepare_streams() -> None:
    """Give Python standard streams that can be written to, whatever text comes.

    A stream that was closed before Python started is replaced by the null device; characters
    that the encoding of a stream lacks are written as :func:`plain` writes them.
    """
    for descriptor in range(3):  # or the next file that is opened would get the number
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    codecs.register_error(_ERRORS, _replace)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        stream: Any = getattr(sys, name)
        with contextlib.suppress(AttributeError, ValueError, OSError):  # a notebook's, or closed
            stream.reconfigure(errors=_ERRORS)


def discard(stream: TextIO) -> None:
    """Send the rest of a stream that cannot be written to into the null device."""
    with contextlib.suppress(AttributeError, ValueError, OSError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


@contextlib.contextmanager
def one_line_warnings() -> Iterator[None]:
    """Print warnings as one line each, without the file and the source line that gave them."""
    before = warnings.formatwarning
    warnings.formatwarning = _format_warning
    try:
        yield
    finally:
        warnings.formatwarning = before


@contextlib.contextmanager
def first_speaks() -> Iterator[None]:
    """Print the results of one process of those that share a run, the first."""
    if main_process():
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as null, contextlib.redirect_stdout(null):
        yield


def root_cause(error: BaseException) -> BaseException:
    """The first exception of the chain that ended in this one."""
    seen = {id(error)}
    while True:
        hidden = error.__suppress_context__
        cause = error.__cause__ or (None if hidden else error.__context__)
        if cause is None or id(cause) in seen:
            return error
        seen.add(id(cause))
        error = cause


def place_of_import(error: BaseException) -> str:
    """The file and line of the import that failed, which tell whose package is broken."""
    frames = [
        it for it in traceback.extract_tb(error.__traceback__) if not it.filename.startswith("<")
    ]
    if not isinstance(error, ImportError) or error.name is None or not frames:
        return ""
    return f" ({frames[-1].filename}, line {frames[-1].lineno})"


def out_of_memory(error: BaseException) -> bool:
    """True where Python, NumPy or torch could not get the memory that they asked for."""
    words = "can't allocate memory", "out of memory", "Unable to allocate", "Storage size"
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(it in str(error) for it in words)
    )


def in_words(error: BaseException) -> str:
    """The message of an exception after its type, on one line."""
    message = one_line(error)
    return f"{type(error).__name__}{': ' * bool(message)}{message}"


def _format_warning(message: Any, *_where: Any) -> str:
    process = "" if main_process() else f"process {os.environ['RANK']}: "
    return f"rkl: warning: {process}{one_line(message)}\n"


def _replace(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return plain(error.object[error.start : error.end]), error.end


def _plain_character(character: str) -> str:
    if character.isascii():
        return character
    if character in PLAIN:
        return PLAIN[character]
    simpler = unicodedata.normalize("NFKD", character)
    plain_letters = "".join(PLAIN.get(it, it if it.isascii() else "") for it in simpler)
    if plain_letters:
        return plain_letters
    if unicodedata.combining(character):
        return ""
    name = unicodedata.name(simpler[0], "")
    if name.startswith("GREEK ") and " LETTER " in name:
        letter = name.partition(" LETTER ")[2].split(" ")[0].lower()
        letter = {"lamda": "lambda"}.get(letter, letter)
        return letter.capitalize() if "CAPITAL" in name else letter
    return character.encode("ascii", "backslashreplace").decode()

"""Refusals of arguments: each names the argument, the value and the expected values.

:func:`warn` is for what is unusual and not wrong.
"""

import math
import os
import sys
import sysconfig
import warnings
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from torch import device as Device

LARGEST_INTEGER = 2**63 - 1  # that torch and numpy hold
LARGEST_COUNT = 10**9  # of steps, rows or draws: beyond it lies a slip of the hand
LARGEST_SEED = 2**62  # to which parts of a run may add
LARGEST_RATE = 1e3  # of learning, and of what is counted in standard deviations
SHOWN = 80  # characters of a value in a message
INSTALLED = (os.path.dirname(__file__), *map(sysconfig.get_path, ("stdlib", "purelib", "platlib")))


def short_repr(value: Any) -> str:
    """The value as a message shows it: on one line, and not longer than that.

    >>> short_repr("a" * 1000)[60:]
    'aaaaaaaaaa... (1,000 letters)'
    """
    if isinstance(value, int) and abs(value) > LARGEST_INTEGER:
        return f"an integer of {value.bit_length():,} bits"
    text = repr(value)
    if len(text) <= SHOWN:
        return text
    size = f" ({len(value):,} letters)" if isinstance(value, str) else ""
    return f"{text[: SHOWN - 10].rstrip(chr(92))}...{size}"


def warn(message: str) -> None:
    """Warn at the line of the user's code from which rkl was called, at any depth within rkl."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(INSTALLED):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def number(
    name: str,
    value: float,
    *,
    above: float = -math.inf,
    at_least: float = -math.inf,
    below: float = math.inf,
    at_most: float = math.inf,
    unequal: tuple[float, ...] = (),
    what: str = "",
) -> None:
    """Refuse a parameter that is not a finite number in its range.

    Raises:
        TypeError: It is not a number.
        ValueError: It is out of range.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        got = f"{short_repr(value)}{what}.{_way_to_python(value)}"
        raise TypeError(f"{name} must be a number; got {got}")
    limits = [f"above {above}"] * (above > -math.inf)
    limits += [f"at least {at_least}"] * (at_least > -math.inf)
    limits += [f"below {below}"] * (below < math.inf)
    limits += [f"at most {at_most:g}"] * (at_most < math.inf)
    limits += [f"other than {' and '.join(map(str, unequal))}"] * bool(unequal)
    inside = above < value < below and at_least <= value <= at_most and value not in unequal
    finite = abs(value) <= LARGEST_INTEGER if isinstance(value, int) else math.isfinite(value)
    if not (finite and inside):
        got = short_repr(value) if isinstance(value, int) else value
        raise ValueError(f"{name} must be {', '.join(['finite', *limits])}; got {got}{what}.")


def integer(
    name: str, value: int, *, at_least: int | None = None, at_most: int = LARGEST_INTEGER
) -> None:
    """Refuse what is not an integer in its range.

    Raises:
        TypeError: It is not an integer.
        ValueError: It is out of range.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        range_of = "" if at_least is None else f" of at least {at_least}"
        got = f"{short_repr(value)}.{_way_to_python(value)}"
        raise TypeError(f"{name} must be an integer{range_of}; got {got}")
    if at_least is not None and value < at_least:
        raise ValueError(f"{name} must be at least {at_least}; got {short_repr(value)}.")
    if not -LARGEST_INTEGER <= value <= at_most:
        raise ValueError(f"{name} must be at most {at_most:,}; got {short_repr(value)}.")


def _way_to_python(value: Any) -> str:
    """Advice for a number of NumPy or torch, whose arithmetic and JSON differ from Python's."""
    return " Take its .item()." if getattr(value, "ndim", None) == 0 else ""


def floats(name: str, value: "Tensor") -> None:
    """Refuse what is not a tensor of real floating-point numbers of 16 bits or more.

    Raises:
        TypeError: It is another type.
    """
    import torch  # which the command line does not load for its help

    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a tensor; got a {type(value).__name__}.")
    if not value.is_floating_point():
        raise TypeError(f"{name} must hold floating-point numbers; got {value.dtype}.")
    if value.dtype.itemsize < 2:
        raise TypeError(f"{name} must have 16 bits or more; got {value.dtype}: take .bfloat16().")


def device(value: str | None) -> "Device":
    """The device of this name; without one, a GPU if there is one, else the CPU.

    GPUs are counted and not initialised: a process can still be forked.

    Raises:
        ValueError: There is no such device.
    """
    import torch

    gpus = torch.cuda.device_count()
    if value is None:
        return torch.device("cuda" if gpus else "cpu")
    try:
        chosen = torch.device(value)
        if chosen.type != "cuda":
            torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise ValueError(f"device must be cpu, cuda, cuda:1 or the like; got {value!r}.") from None
    if chosen.type == "cuda" and (chosen.index or 0) >= gpus:
        count = f"{gpus} GPUs" if gpus else "no GPU, and computes on the cpu"
        raise ValueError(f"device must be one that torch finds; got {value}, it finds {count}.")
    return chosen


def choice(name: str, value: Any, choices: Collection[Any]) -> None:
    """Refuse what is none of these, with a ValueError."""
    if value not in choices:
        listed = ", ".join(map(str, choices))
        raise ValueError(f"{name} must be one of {listed}; got {short_repr(value)}.")


def text(name: str, value: str) -> None:
    """Refuse what is not a text that a file can hold.

    Raises:
        TypeError: It is not a text.
        ValueError: It is empty, or holds a null character or half of a surrogate pair.
    """
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a text; got {short_repr(value)}.")
    if not value.strip():
        raise ValueError(f"{name} must not be empty; got {short_repr(value)}.")
    if "\0" in value:
        raise ValueError(f"{name} must not hold a null character; got {short_repr(value)}.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} must be Unicode; got {short_repr(value)}, with half of a surrogate pair at "
            f"character {error.start + 1}. A name with other bytes must be renamed."
        ) from None


def path(name: str, value: str | os.PathLike) -> None:
    """Refuse what cannot be the name of a file or folder.

    Raises:
        TypeError: It is not a path.
        ValueError: It is empty, too long, not Unicode, or holds a null character.
    """
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"{name} must be a path; got {short_repr(value)}.")
    words = os.fspath(value)
    if isinstance(words, bytes):
        raise TypeError(f"{name} must be a path in letters; got {short_repr(value)}.")
    text(name, words)
    if any(len(os.fsencode(part)) > 255 for part in words.split(os.sep)):
        raise ValueError(
            f"{name} is longer than the name of a file may be; got {short_repr(words)}."
        )

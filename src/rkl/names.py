"""Values by their names: the catalogue of a class, and the reader of ``name(setting=value)``.

Every divergence, target, architecture and family is spelt as its repr, or the same in kebab case;
``package.module:Name`` is imported where a reader says what it must be.
"""

import ast
import dataclasses
import difflib
import functools
import inspect
import math
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

from rkl.importing import import_object

_STRING = r"'[^']*'|\"[^\"]*\""
_NAME = r"(?<![\w.])[A-Za-z_][\w-]*(?:\.[A-Za-z_]\w*)*(?::[A-Za-z_]\w*)?"
_CONSTANTS = {"True": True, "False": False, "None": None}

Base = TypeVar("Base")


class Stack(tuple):
    """Names and numbers that make one vector, written [a, b, 0] or stack(a, b, 0)."""

    def __str__(self) -> str:
        return f"[{', '.join(map(str, self))}]"


def concrete(base: type[Base]) -> list[type[Base]]:
    """A class and all that derive from it, generation by generation, without the abstract ones."""
    kinds: list[type[Base]] = [base]
    for kind in kinds:
        kinds += [it for it in kind.__subclasses__() if it not in kinds]
    return [it for it in kinds if not inspect.isabstract(it)]


def catalogue(base: type[Base], *, besides: Collection[type] = ()) -> dict[str, type[Base]]:
    """Every class that derives from one, by its command-line name; it is listed by existing.

    Args:
        base: The class.
        besides: Classes to leave out, as those with a leading underscore are.

    >>> class Shape: pass
    >>> class RoundShape(Shape): pass
    >>> list(catalogue(Shape))
    ['round-shape', 'shape']
    """
    named = {
        kebab(cls.__name__): cls
        for cls in concrete(base)
        if not cls.__name__.startswith("_") and cls not in besides
    }
    return dict(sorted(named.items()))


def kebab(name: str) -> str:
    """The name of a class in kebab case: a word begins at a capital before or behind two letters.

    >>> [kebab(name) for name in ("SkewReverseKL", "LKHybrid", "AMiD", "ToDi", "CoarseToFine")]
    ['skew-reverse-kl', 'lk-hybrid', 'amid', 'todi', 'coarse-to-fine']
    """
    return re.sub("(?<!^)(?=[A-Z][a-z]{2})|(?<=[a-z]{2})(?=[A-Z])", "-", name).lower()


def read(
    text: str,
    known: Mapping[str, Callable],
    *,
    names: tuple[str, ...] = (),
    kind: type | None = None,
    summed: bool = False,
) -> Any:
    """A value from its repr, or from the same in kebab case; nothing else is accepted.

    Args:
        text: Such as "nsf(transforms=2)".
        known: What makes the values, by name.
        names: Identifiers allowed as settings, kept as strings: ("mu",) in normal(loc=mu). A list
            of them, or stack(a, b), is a :class:`Stack`.
        kind: The class that a name must be a subclass of, which is looked at before anything
            is called. Without one nothing is imported.
        summed: Whether a weighted sum of values is one too.

    Raises:
        ValueError: The text cannot be read; the message names the part at fault.

    >>> from fractions import Fraction
    >>> read("fraction(numerator=1, denominator=2)", {"fraction": Fraction})
    Fraction(1, 2)
    """
    try:
        return _Reader(text, known, names, kind, summed).value()
    except (SyntaxError, TypeError, ValueError, RecursionError, MemoryError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else error
        raise ValueError(f"Cannot read {text[:200]!r}: {reason}") from error


class _Reader:
    """One text: its words replaced by identifiers, and its tree turned into a value."""

    def __init__(
        self,
        text: str,
        known: Mapping[str, Callable],
        names: tuple[str, ...],
        kind: type | None,
        summed: bool,
    ):
        self.known, self.names, self.kind, self.summed = dict(known), names, kind, summed
        self.words: list[str] = []
        self.source = re.sub(f"{_STRING}|{_NAME}", self._word, text.strip())

    def _word(self, match: re.Match) -> str:
        if match[0][0] in "'\"" or match[0] in _CONSTANTS:
            return match[0]
        self.words.append(match[0])
        return f"_{len(self.words) - 1}"

    def _word_of(self, identifier: str | None) -> str:
        if identifier is None:
            raise ValueError("settings are given as name=value, not as **.")
        return self.words[int(identifier[1:])]

    def value(self):
        if not self.source:
            raise ValueError("it is empty.")
        try:
            tree = ast.parse(self.source, mode="eval").body
        except SyntaxError as error:
            where = (error.offset or 1) - 1
            raise ValueError(f"{self._with_words(error.msg)}, near {where}.") from None
        return self._build(tree)

    def _with_words(self, message: str) -> str:
        return re.sub(r"\b_(\d+)\b", lambda m: self.words[int(m[1])], message)

    def _build(self, node: ast.expr):
        match node:
            case ast.BinOp(left, ast.Add(), right) if self.summed:
                return self._build(left) + self._build(right)
            case ast.BinOp(ast.Constant(float() | int() as weight), ast.Mult(), right) if (
                self.summed
            ):
                return weight * self._build(right)
            case ast.BinOp(ast.UnaryOp(ast.USub()), ast.Mult(), _):
                raise ValueError("weights must be positive.")
            case ast.Name(name):
                return self._make(self._word_of(name), [])
            case ast.Call(ast.Name(name), [], keywords):
                return self._make(self._word_of(name), keywords)
            case ast.Call(ast.Name(name)):
                spelt = self._word_of(name)
                example = "akl(mu=0.5)" if self.summed else f"{spelt}(setting=value)"
                raise ValueError(f"{spelt} takes its settings by name, as in {example}.")
        expected = "names, weights and sums, as in 0.5*kl + 0.5*akl(mu=0.5)"
        raise ValueError(f"expected {expected if self.summed else 'name(setting=value)'}.")

    def _make(self, name: str, keywords: list[ast.keyword]):
        make = self._maker(name)
        if self.kind and not (isinstance(make, type) and issubclass(make, self.kind)):
            article = "an" if self.kind.__name__[0] in "AEIOU" else "a"
            raise ValueError(f"{name} is {make!r}, not {article} {self.kind.__name__}.")
        settings = {}
        for keyword in keywords:
            setting = self._word_of(keyword.arg)
            if setting in settings:
                raise ValueError(f"{name} is given {setting} twice.")
            settings[setting] = self._setting(setting, keyword.value)
        _refuse_unknown(make, name, settings)
        return make(**settings)

    def _maker(self, name: str) -> Callable:
        for kebab, make in self.known.items():
            if name in (kebab, getattr(make, "__name__", kebab), full_name(make)):
                return make
        if ":" in name and self.kind is not None:
            return import_object(name)
        spelt = {plain(kebab): kebab for kebab in self.known}
        if plain(name) in spelt and not {":", "."} & set(name):
            return self.known[spelt[plain(name)]]
        near = difflib.get_close_matches(plain(name), spelt, 1, 0.75)
        meant = f" (did you mean {spelt[near[0]]}?)" if near else ""
        raise ValueError(f"none is called {name!r}{meant}; there are {', '.join(self.known)}.")

    def _setting(self, setting: str, node: ast.expr):
        if isinstance(node, ast.Name):
            return self._name(setting, node)
        match node:
            case ast.UnaryOp(ast.USub(), ast.Name(name)) if self._word_of(name) == "inf":
                return -math.inf
        if self.names and (parts := self._parts(node)):
            return Stack(self._part(setting, part) for part in parts)
        try:
            return ast.literal_eval(node)
        except ValueError:
            got = self._with_words(ast.unparse(node))
            raise ValueError(f"{setting} must be a number or a string; got {got}.") from None

    def _name(self, setting: str, node: ast.Name) -> str | float:
        word = self._word_of(node.id)
        if word == "inf" and self.names and word not in self.names:
            return math.inf
        if word not in self.names:
            allowed = f"one of {', '.join(self.names)}" if self.names else "a number or a string"
            raise ValueError(f"{setting} must be {allowed}; got {word}.")
        return word

    def _parts(self, node: ast.expr) -> list[ast.expr]:
        """Entries of a list with names, or of a call of stack; none of any other node."""
        match node:
            case ast.Call(ast.Name(name), args, []) if self._word_of(name) == "stack":
                return args
            case ast.List(parts) | ast.Tuple(parts) if any(map(_is_name, parts)):
                return parts
        return []

    def _part(self, setting: str, node: ast.expr) -> str | int | float:
        if isinstance(node, ast.Name):
            return self._name(setting, node)
        try:
            value = ast.literal_eval(node)
        except ValueError:
            value = None
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            got = self._with_words(ast.unparse(node))
            raise ValueError(f"{setting} must be a number or a string in each place; got {got}.")
        return value


def _is_name(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) or (
        isinstance(node, ast.Constant) and isinstance(node.value, str)
    )


def plain(name: str) -> str:
    """The name without capitals, hyphens and underscores."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def full_name(make: Any) -> str | None:
    """Import name of a class or a function, as "module:name"; None without a name."""
    module, name = (getattr(make, attribute, None) for attribute in ("__module__", "__qualname__"))
    return f"{module}:{name}" if module and name else None


def with_module(value: Any) -> str:
    """The repr of a value, with the module in front where its class is not of rkl.

    >>> from fractions import Fraction
    >>> with_module(Fraction(1, 2))
    'fractions:Fraction(1, 2)'
    """
    module = type(value).__module__
    return repr(value) if module.partition(".")[0] == "rkl" else f"{module}:{value!r}"


def _refuse_unknown(make: Callable, name: str, settings: dict) -> None:
    allowed = _settings_of(make)
    for setting in settings:
        if allowed is not None and setting not in allowed:
            has = f"it has {', '.join(allowed)}" if allowed else "it has no settings"
            raise ValueError(f"{name} has no setting {setting!r}; {has}.")


@functools.cache
def _settings_of(make: Callable) -> tuple[str, ...] | None:
    """Names of the settings of a class or a function; None if it takes any."""
    if dataclasses.is_dataclass(make):
        return tuple(field.name for field in dataclasses.fields(make))
    parameters = inspect.signature(make).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return tuple(parameter.name for parameter in parameters)

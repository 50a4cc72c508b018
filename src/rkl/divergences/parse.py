"""Reading a divergence, or any other value of a catalogue, from its repr or kebab case."""

import ast
import dataclasses
import difflib
import functools
import inspect
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from rkl.divergences.base import Divergence
from rkl.importing import import_object

_STRING = r"'[^']*'|\"[^\"]*\""
_NAME = r"(?<![\w.])[A-Za-z_][\w-]*(?:\.[A-Za-z_]\w*)*(?::[A-Za-z_]\w*)?"
_CONSTANTS = {"True": True, "False": False, "None": None}


class Stack(tuple):
    """Names and numbers that make one vector, written [a, b, 0] or stack(a, b, 0)."""

    def __str__(self) -> str:
        return f"[{', '.join(map(str, self))}]"


def catalogue() -> dict[str, type[Divergence]]:
    """Every divergence by its command-line name; every subclass is listed.

    >>> list(catalogue())[:3]
    ['akl', 'alpha-beta', 'amari']
    """

    def descendants(cls):
        return [cls, *(d for child in cls.__subclasses__() for d in descendants(child))]

    named = {
        _kebab(cls.__name__): cls
        for cls in descendants(Divergence)
        if not inspect.isabstract(cls) and not cls.__name__.startswith("_")
    }
    return dict(sorted(named.items()))


def _kebab(name: str) -> str:
    """The name of a class in kebab case: a word has three letters, or capitals behind a word.

    >>> [_kebab(name) for name in ("SkewReverseKL", "LKHybrid", "AMiD", "ToDi")]
    ['skew-reverse-kl', 'lk-hybrid', 'amid', 'todi']
    """
    return re.sub("(?<!^)(?=[A-Z][a-z]{2})|(?<=[a-z]{2})(?=[A-Z]{2})", "-", name).lower()


def parse(
    text: str,
    catalogue: Mapping[str, Callable] | None = None,
    names: tuple[str, ...] = (),
    kind: type | None = None,
):
    """A value from its repr, or from the same in kebab case; nothing else is accepted.

    A name that is not in the catalogue may be ``package.module:Name``, which is imported if
    a ``kind`` is given; from a file, only if it is allowed
    (:mod:`rkl.importing`).

    Args:
        text: Such as "akl(mu=0.3)", or a sum such as "0.5*kl + 0.5*my_package.losses:Mine".
        catalogue: The values that may be made, by name; by default every divergence.
        names: Identifiers allowed as settings, kept as strings: ("mu",) in normal(loc=mu). A list
            of them, or stack(a, b), is a :class:`Stack`.
        kind: Class of which the named class must be a subclass, checked before anything
            is called; Divergence for the default catalogue. Without one nothing is imported.

    Raises:
        ValueError: The text cannot be read; the message names the part at fault.
        TypeError: The text is not a string, or another argument of the wrong type.

    >>> parse("akl(mu=0.3)")
    AKL(mu=0.3, straddle='tail')
    >>> parse("0.5*kl + 0.5*reverse-kl") == parse("0.5 * KL() + 0.5 * ReverseKL()")
    True
    """
    _check(text, catalogue, names, kind)
    try:
        return _Reader(text, catalogue, names, kind).value()
    except (SyntaxError, TypeError, ValueError, RecursionError, MemoryError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else error
        raise ValueError(f"Cannot read {text[:200]!r}: {reason}") from error


def _check(text, catalogue, names, kind) -> None:
    if not isinstance(text, str):
        raise TypeError(f"text must be a string such as 'akl(mu=0.5)'; got {text!r}.")
    if catalogue is not None and not isinstance(catalogue, Mapping):
        raise TypeError(f"catalogue must map names to what makes the values; got {catalogue!r}.")
    if not isinstance(names, tuple) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"names must be a tuple of strings such as ('mu',); got {names!r}.")
    if kind is not None and not isinstance(kind, type):
        raise TypeError(f"kind must be a class; got {kind!r}.")


class _Reader:
    """One text: its words replaced by identifiers, and its tree turned into a value."""

    def __init__(self, text: str, catalogue, names: tuple, kind: type | None):
        self.known = _divergences() if catalogue is None else dict(catalogue)
        self.summed = catalogue is None
        self.kind = Divergence if catalogue is None else kind
        self.names = names
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
        plain = {_plain(kebab): kebab for kebab in self.known}
        if _plain(name) in plain and not {":", "."} & set(name):
            return self.known[plain[_plain(name)]]
        near = difflib.get_close_matches(_plain(name), plain, 1, 0.75)
        meant = f" (did you mean {plain[near[0]]}?)" if near else ""
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


def _plain(name: str) -> str:
    """The name without capitals, hyphens and underscores."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def same_name(name: str, kind: type[Divergence]) -> bool:
    """True if a divergence of this class has this name, in any spelling.

    >>> from rkl import ReverseKL
    >>> same_name("ReverseKL", ReverseKL), same_name("rkl", ReverseKL), same_name("kl", ReverseKL)
    (True, True, False)
    """
    names = (kind.__name__, *kind.aliases)
    return name == full_name(kind) or _plain(name) in map(_plain, names)


def full_name(make: Any) -> str | None:
    """Import name of a class or a function, as "module:name"; None without a name."""
    module, name = (getattr(make, attribute, None) for attribute in ("__module__", "__qualname__"))
    return f"{module}:{name}" if module and name else None


def with_module(value: Any) -> str:
    """The repr of a value, with the module in front where its class is not of rkl.

    >>> with_module(parse("akl"))
    "AKL(mu=0.5, straddle='tail')"
    """
    module = type(value).__module__
    return repr(value) if module.partition(".")[0] == "rkl" else f"{module}:{value!r}"


def _divergences() -> dict[str, type[Divergence]]:
    classes = catalogue()
    return classes | {alias: cls for cls in classes.values() for alias in cls.aliases}


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

"""Reading a divergence, or any other value of a catalogue, from its repr or kebab case."""

from collections.abc import Callable, Mapping

from rkl import names as spellings
from rkl.divergences.base import Divergence
from rkl.names import full_name, plain, read


def catalogue() -> dict[str, type[Divergence]]:
    """Every divergence by its command-line name; every subclass is listed.

    >>> list(catalogue())[:3]
    ['akl', 'alpha-beta', 'amari']
    """
    return spellings.catalogue(Divergence)


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
            of them, or stack(a, b), is a :class:`rkl.names.Stack`.
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
    if catalogue is None:
        return read(text, _divergences(), names=names, kind=Divergence, summed=True)
    return read(text, catalogue, names=names, kind=kind)


def _check(text, catalogue, names, kind) -> None:
    if not isinstance(text, str):
        raise TypeError(f"text must be a string such as 'akl(mu=0.5)'; got {text!r}.")
    if catalogue is not None and not isinstance(catalogue, Mapping):
        raise TypeError(f"catalogue must map names to what makes the values; got {catalogue!r}.")
    if not isinstance(names, tuple) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"names must be a tuple of strings such as ('mu',); got {names!r}.")
    if kind is not None and not isinstance(kind, type):
        raise TypeError(f"kind must be a class; got {kind!r}.")


def same_name(name: str, kind: type[Divergence]) -> bool:
    """True if a divergence of this class has this name, in any spelling.

    >>> from rkl import ReverseKL
    >>> same_name("ReverseKL", ReverseKL), same_name("rkl", ReverseKL), same_name("kl", ReverseKL)
    (True, True, False)
    """
    names = (kind.__name__, *kind.aliases)
    return name == full_name(kind) or plain(name) in map(plain, names)


def _divergences() -> dict[str, type[Divergence]]:
    classes = catalogue()
    return classes | {alias: cls for cls in classes.values() for alias in cls.aliases}

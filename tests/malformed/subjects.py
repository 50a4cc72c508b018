"""How a table of malformed inputs is written: good arguments, and one of them spoilt at a time.

A subject is a public function with arguments that it accepts; a fault replaces one of them. So
whatever a function says of a fault is owed to that argument alone, all others being known good.
"""

import contextlib
import dataclasses
import io
from collections.abc import Callable
from typing import Any, NamedTuple

from rkl import cli

DELIBERATE = (
    ValueError,
    TypeError,
    FileNotFoundError,
    FileExistsError,
    NotImplementedError,
    ImportError,
)
ABSENT = object()  # in place of an argument: it is left out


class Fault(NamedTuple):
    """One argument, or a field of it after a dot, spoilt in one way.

    ``says`` are further words of the message: what was got, or what was expected. ``named`` is
    the argument's name in it, where the message has another for it, such as a file and a line.
    ``needs`` is a package that rkl does not install, without which the message is another.
    """

    argument: str
    kind: str
    value: Any
    says: tuple[str, ...] = ()
    named: str | None = None
    needs: str | None = None


class Subject(NamedTuple):
    """A public function, the arguments that it accepts, and what it must refuse.

    A costly one takes minutes when it accepts them; other tests see that it does.
    """

    function: str
    call: Callable[..., Any]
    good: Callable[[], dict[str, Any]]
    faults: list[Fault]
    costly: bool = False

    def accepted(self) -> Any:
        return self.call(**self.good())

    def refuse(self, fault: Fault) -> Any:
        return self.call(**spoilt(self.good(), fault))


def fault(argument, kind, value, *says, named=None, needs=None):
    return Fault(argument, kind, value, says, named, needs)


def spoilt(arguments, fault):
    """The arguments, one of them or a field of it being another."""
    name, _, field = fault.argument.partition(".")
    value = fault.value() if isinstance(fault.value, Lazy) else fault.value
    if value is ABSENT:
        return {key: it for key, it in arguments.items() if key != name}
    if field:
        whole = arguments[name]
        replace = getattr(whole, "_replace", None) or (
            lambda **change: dataclasses.replace(whole, **change)
        )
        value = replace(**{field: value})
    return arguments | {name: value}


class Lazy(NamedTuple):
    """A value that is made when it is needed, in the folder that a test works in."""

    make: Callable[[], Any]

    def __call__(self) -> Any:
        return self.make()


class UsageError(ValueError):
    """What the command line said on stderr before it ended with code 2."""


def command(*words):
    """A function that runs ``rkl WORDS --flag value ...`` and raises what is said of it.

    Its arguments are flags, True for one without a value. Those whose name begins with an
    underscore are lists of words, and come first.
    """

    def run(**flags):
        line = [*words, *(word for name, them in flags.items() if name[0] == "_" for word in them)]
        for name, value in flags.items():
            if name[0] != "_":
                flag = f"--{name.replace('_', '-')}"
                line += [flag] if value is True else [f"{flag}={value}"]
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = cli.main(line)
        said = err.getvalue()
        if code == 0:
            return out.getvalue()
        assert code == 2, f"the exit code is {code}: {said}"
        assert out.getvalue() == "", "it printed before it complained"
        assert said.startswith("rkl: error: ")
        assert said.endswith("\n")
        raise UsageError(said.removeprefix("rkl: error: ").removesuffix("\n"))

    return run

"""Settings, declared once as a frozen dataclass: its fields are the flags and the keys of a file.

The type and the default of a field say how it is read, and the Args of the docstring what it does;
its metadata may hold another ``help``, a ``metavar``, ``choices``, ``positional`` for a word
without flag, and ``instead_of``, a setting of the file that the flag replaces beside its own.
A field without a default must be given, on the command line or by the file.
"""

import argparse
import dataclasses
import json
import re
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from rkl.cli.documentation import documentation, without_markup
from rkl.runs.typed import conform, without_none

COMMON = "seed", "device"  # flags that every command has, settings or not
Settings = TypeVar("Settings")


def add_flags(parser: argparse.ArgumentParser, settings: type, title: str = "settings") -> None:
    """Give the parser a flag for every setting, and --config for a file that holds them."""
    group, described = parser.add_argument_group(title), _descriptions(settings)
    for name, (field, kind) in _fields(settings).items():
        if name not in COMMON:
            flag = f"--{name.replace('_', '-')}"
            words, how = _help(field, described.get(name, "")), _reading(field, kind)
            if field.metadata.get("positional"):  # --config may say it, so that it may be absent
                group.add_argument(name, nargs="?", help=words, **how)
            else:
                flags = [f"-{name}", flag] if len(name) == 1 else [flag]
                group.add_argument(*flags, default=argparse.SUPPRESS, help=words, **how)
    group.add_argument(
        "--config",
        type=path,
        metavar="FILE",
        help="settings from YAML, or from an earlier run or a .json of it; flags override it",
    )


def gather(
    settings: type[Settings], parsed: argparse.Namespace, earlier: Path | None = None
) -> Settings:
    """The settings: of the flags, else of --config or of an earlier run, else the defaults.

    Raises:
        ValueError: A key of the file is unknown, a value has the wrong type, one is missing.
    """
    fields = _fields(settings)
    if "device" not in fields:
        refuse_device(parsed)
    config = parsed.config or earlier
    given = _read(config, "config" if parsed.config else "out") if config else {}
    unknown = sorted(given.keys() - fields.keys())
    if unknown:
        raise ValueError(f"config: {config} sets {unknown[0]!r}; known are {', '.join(fields)}.")
    values = {name: conform(name, fields[name][1], value) for name, value in given.items()}
    flags = {
        name: conform(name, fields[name][1], value)
        for name, value in vars(parsed).items()
        if name in fields and not (value is None and fields[name][0].metadata.get("positional"))
    }
    for name in flags:
        values.pop(fields[name][0].metadata.get("instead_of", ""), None)
    values |= flags
    missing = [
        name if field.metadata.get("positional") else f"--{name.replace('_', '-')}"
        for name, (field, _kind) in fields.items()
        if name not in values and _default(field) is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{', '.join(missing)} must be given, here or in --config FILE.")
    return settings(**values)


def refuse_device(parsed: argparse.Namespace) -> None:
    """Refuse a device other than the CPU for a command without a choice of it."""
    if (device := getattr(parsed, "device", "cpu")) != "cpu":
        raise ValueError(f"device must be cpu, the only one of this command; got {device!r}.")


def is_set(name: str, words: Sequence[str]) -> bool:
    """True if words set this by its flag, by --config, or by the run in --out that they resume."""
    values = {flag: _value_of(flag, words) for flag in (f"--{name}", "--config", "--out")}
    if values[f"--{name}"] is not None:
        return True
    resumed = values["--out"] if "--resume" in words else None
    earlier = Path(values["--config"] or resumed or "")
    source = earlier / "run.json" if earlier.is_dir() else earlier
    return source.is_file() and _read(source, "config").get(name) is not None


def _value_of(flag: str, words: Sequence[str]) -> str | None:
    """The word after a flag."""
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word == flag:
            return following
        if word.startswith(f"{flag}="):
            return word.partition("=")[2]
    return None


def _fields(settings: type) -> dict[str, tuple[dataclasses.Field, Any]]:
    kinds = typing.get_type_hints(settings)
    return {field.name: (field, kinds[field.name]) for field in dataclasses.fields(settings)}


def _default(field: dataclasses.Field) -> Any:
    made = field.default_factory
    return field.default if made is dataclasses.MISSING else made()


def _descriptions(settings: type) -> dict[str, str]:
    """Descriptions in the Args of the docstring by name, each on one line."""
    listed = documentation(settings).partition("Args:\n")[2]
    entries = re.findall(r"^ +(\w+): (.*(?:\n {8}.*)*)", listed, re.MULTILINE)
    return {name: " ".join(without_markup(text).split()) for name, text in entries}


def _help(field: dataclasses.Field, described: str) -> str:
    """Help of a field, with its default."""
    words, default = [field.metadata.get("help", described)], _default(field)
    if default is dataclasses.MISSING:
        words.append("(required)")
    elif isinstance(default, bool):
        words.append(f"(default: --{'' if default else 'no-'}{field.name.replace('_', '-')})")
    elif default not in (None, (), ""):
        words.append(f"(default: {default})")
    return " ".join(words).strip().replace("%", "%%")


def _reading(field: dataclasses.Field, kind: Any) -> dict[str, Any]:
    """Arguments of argparse for a value of this kind."""
    kind, _optional = without_none(kind)
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if choices := field.metadata.get("choices"):
        return {"choices": list(choices)}
    if typing.get_origin(kind) is Literal:
        return {"choices": typing.get_args(kind)}
    several = typing.get_origin(kind) is tuple
    kind = typing.get_args(kind)[0] if several else kind
    named = field.name.rpartition("_")[2] if kind in (str, Path) else kind.__name__
    read = path if kind is Path else kind
    how = {"type": read, "metavar": field.metadata.get("metavar", named.upper())}
    return how | ({"action": "extend", "nargs": "+"} if several else {})


def path(text: str) -> Path:
    """A path; empty ones are refused, as they mean the working folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError("it must not be empty")
    return Path(text)


def _read(path: Path, argument: str) -> dict[str, Any]:
    import yaml

    path = path / "run.json" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"{argument}: there is no file {path}.")
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".json":
            values = json.loads(text, object_pairs_hook=_set_once)
        else:
            _check_yaml(yaml.compose(text, yaml.SafeLoader))
            values = yaml.safe_load(text)
    except RecursionError:
        raise ValueError(f"{argument}: {path} is nested too deeply to be settings.") from None
    except (ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{argument}: {path} cannot be read: {reason}") from None
    values = {} if values is None else values
    if isinstance(values, dict) and isinstance(values.get("settings"), dict):
        beside = [str(name) for name in values if name != "settings"]
        if beside and path.suffix != ".json":
            raise ValueError(
                f"{argument}: {path} sets {beside[0]} beside settings, whose names alone would be "
                "read; put all names on one level."
            )
        values = values["settings"]  # of a run.json, or of what an evaluation says of itself
    if not isinstance(values, dict):
        raise ValueError(
            f"{argument}: {path} must hold names with their values; got {values!r:.80}."
        )
    try:
        return _set_once((str(name).replace("-", "_"), it) for name, it in values.items())
    except ValueError as error:
        raise ValueError(f"{argument}: {path}: {error}") from None


def _set_once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """A dict of names and values; refuses a name that is there twice, as JSON and YAML do not."""
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"{name} is set twice")
        values[name] = value
    return values


def _check_yaml(node: Any) -> None:
    """Refuse names that are there twice, and numbers that YAML reads in base 8 or 60."""
    pairs = node.value if getattr(node, "id", "") == "mapping" else []
    _set_once((name.value, value) for name, value in pairs if isinstance(name.value, str))
    for name, value in pairs:
        number = value.tag.rpartition(":")[2] in ("int", "float") and value.style is None
        if number and re.match(r"[-+]?0\d|.*:", value.value):
            raise ValueError(
                f"{name.value}: {value.value} is a number in base 8 or 60 in YAML; write it "
                "without zeros in front and without colons"
            )

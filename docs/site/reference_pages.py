"""Reference tables, made from the catalogues, the parsers and the sources of rkl itself."""

import argparse
import ast
import dataclasses
import importlib
import importlib.util
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from public_names import public

import rkl
from rkl import cli
from rkl.bayes.families import families
from rkl.cli.commands import MADE_BY
from rkl.cli.documentation import without_markup
from rkl.cli.settings import add_flags
from rkl.flows.architectures.base import catalogue as architectures
from rkl.metrics import pr_spectrum, spectrum_text
from rkl.sample import parse_target
from rkl.sample.targets import Target
from rkl.sample.targets.parse import catalogue as targets

ROOT = Path(__file__).resolve().parents[2]
SOURCE = Path(rkl.__file__).parent
SETTINGS_OF = {  # verbs whose flags are settings of the wing that made the run
    "sample": "SampleSettings",
    "generate": "GenerateSettings",
    "evaluate": "EvaluateSettings",
}
KNOWN = {  # what a target may offer, by the method that it then has
    "sample": "exact draws",
    "log_normaliser": "log Z",
    "kernel": "a Markov chain",
    "modes": "modes",
    "derived": "response coefficients",
    "architecture": "an architecture",
}


def cell(text: str) -> str:
    """Text as it may stand in a cell of a Markdown table."""
    return re.sub(r"([|*_<\[])", r"\\\1", " ".join(text.split()))


def code(text: str) -> str:
    """Text as code in a cell of a Markdown table."""
    return f"`{text}`".replace("|", r"\|") if text else ""


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown, of cells that are Markdown already."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def sentence(described: object) -> str:
    """The first sentence of a docstring."""
    first = without_markup(inspect.getdoc(described) or "").partition("\n\n")[0]
    return " ".join(first.split())


def linked(name: str, described: object) -> str:
    """The name as code, linked to its page where it is public."""
    for package, public_name in public():
        if getattr(importlib.import_module(package), public_name) is described:
            return f"[{code(name)}](../api/{package}/{public_name}.rst)"
    return code(name)


def fields(described: type) -> str:
    """The settings of a dataclass with their defaults."""
    if not dataclasses.is_dataclass(described):
        return ""
    words = []
    for field in dataclasses.fields(described):
        if field.init:
            missing = field.default is dataclasses.MISSING
            words.append(code(field.name if missing else f"{field.name}={field.default!r}"))
    return ", ".join(words)


def arguments(law: type) -> str:
    """The names of the arguments of a distribution."""
    names = inspect.signature(law).parameters
    return ", ".join(code(name) for name in names if name != "validate_args")


def divergences() -> str:
    """The catalogue of divergences."""
    spec = importlib.util.spec_from_file_location("readme_table", ROOT / "docs" / "table.py")
    assert spec is not None
    assert spec.loader is not None
    readme = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(readme)
    rows, looks = [], []
    for name, cls in rkl.catalogue().items():
        if not cls.__module__.startswith("rkl."):
            continue
        called, _, formula = sentence(cls).rstrip(".").partition(", ")
        names = ", ".join([linked(name, cls), *map(code, cls.aliases)])
        rows.append(
            [names, f"{cell(called)}: {cell(formula)}", fields(cls), readme.properties(cls())]
        )
        if isinstance(divergence := cls(), rkl.FDivergence):
            line, weight, _atoms = spectrum_text(divergence).splitlines()
            bars = re.search(r"1/256 (.{17}) 256", line)
            shown = bars[1].replace(" ", "·") if bars else ""
            spectrum = pr_spectrum(divergence)
            atoms = ", ".join(f"{slope:g}" for slope in spectrum.atom_slopes.tolist())
            looks.append([linked(name, cls), code(shown), weight.partition(" ")[2].strip(), atoms])
    heads = ["name", "D(p ‖ q)", "parameters", "properties at the defaults"]
    looks_heads = ["name", "slopes 1/256 to 256", "share of the weight", "single slopes"]
    return (
        "# Divergences\n\np is the target, q the model; values are in nats. The names are those "
        "of the command line; *exact only*: no f-divergence, and not estimated from samples. "
        "[Which divergence](../docs/choose.md) helps to choose.\n\n"
        f"{table(heads, rows)}\n\n## What each looks at\n\nEvery f-divergence is a mixture of "
        "precision-recall divergences. Weight at slopes below 1 is on recall, above 1 on "
        "precision; a bar is an octave ([mathematics](mathematics.md)).\n\n"
        f"{table(looks_heads, looks)}\n"
    )


def target_rows() -> Iterator[list[str]]:
    """A row for each target."""
    for name, cls in targets().items():
        if not cls.__module__.startswith("rkl."):
            continue
        # those of a lattice depend on its size or its couplings
        known = isinstance(cls.conditions, tuple)
        ranges = cls.conditions if known else parse_target(f"{name}(side=8)").conditions
        conditions = ", ".join(
            f"{it.name} from {it.low:g} to {it.high:g} {it.unit}".strip() for it in ranges
        )
        offered = [
            words
            for method, words in KNOWN.items()
            if getattr(cls, method) is not getattr(Target, method)
        ]
        domain = cls.domain if isinstance(cls.domain, str) else repr(cls.domain)
        yield [
            linked(name, cls),
            cell(sentence(cls)),
            fields(cls),
            domain,
            conditions,
            ", ".join(offered),
        ]


def family_rows() -> Iterator[list[str]]:
    """A row for each family whose act has a closed form."""
    for law, kind in sorted(families().items(), key=lambda it: it[0].__name__):
        if kind.__module__.startswith("rkl."):
            said = sentence(kind)
            yield [linked(law.__name__, law), arguments(law), cell(said)]


def numerical_rows() -> Iterator[list[str]]:
    """A row for each distribution of ours whose act is found numerically."""
    module = importlib.import_module("rkl.bayes.families")
    closed = set(families())
    for name in module.__all__:
        law = getattr(module, name)
        is_law = inspect.isclass(law) and issubclass(law, torch.distributions.Distribution)
        if is_law and law not in closed:
            yield [linked(name, law), arguments(law), cell(sentence(law))]


def architecture_rows() -> Iterator[list[str]]:
    """A row for each architecture of a flow."""
    for name, cls in architectures().items():
        if cls.__module__.startswith("rkl."):
            domain = cls.domain if isinstance(cls.domain, str) else "any"
            yield [linked(name, cls), cell(sentence(cls)), fields(cls), domain]


def flag_table(parser: argparse.ArgumentParser) -> Iterator[str]:
    """The words and flags of a parser, a table for each of its groups."""
    for group in parser._action_groups:
        rows = []
        for action in group._group_actions:
            if action.help == argparse.SUPPRESS or isinstance(action, argparse._HelpAction):
                continue
            value = "" if action.nargs == 0 else str(action.metavar or "")
            if action.choices is not None and not action.metavar:
                value = " ".join(map(str, action.choices))
            flags = ", ".join(map(code, action.option_strings)) or code(
                str(action.metavar or action.dest)
            )
            rows.append(
                [
                    flags,
                    code(value if action.option_strings else ""),
                    cell((action.help or "").replace("%%", "%")),
                ]
            )
        if rows:
            title = {"positional arguments": "words", "options": "flags"}.get(
                str(group.title), str(group.title)
            )
            yield f"**{title}**\n\n{table(['flag', 'value', ''], rows)}\n"


def further_settings(command: str) -> Iterator[str]:
    """Tables of the flags that depend on the kind of a run, or on another way in."""
    wanted = []
    if command == "fit":
        wanted = [
            ("settings, with --target", importlib.import_module("rkl.sample").TargetSettings)
        ]
    if command in SETTINGS_OF:
        for wing in ("distill", "fit", "sample", "bayes"):
            found = getattr(importlib.import_module(f"rkl.{wing}"), SETTINGS_OF[command], None)
            if found is not None:
                wanted.append((f"settings, where {MADE_BY[wing]} made RUN", found))
    if command == "evaluate":
        wanted.append(
            ("settings of two models", importlib.import_module("rkl.distill").PairSettings)
        )
    for title, settings in wanted:
        parser = argparse.ArgumentParser(add_help=False)
        add_flags(parser, settings, title)
        yield from flag_table(parser)


def parser_of(command: str) -> argparse.ArgumentParser:
    """The parser of one command."""
    whole = cli._parser([command])
    actions = [it for it in whole._actions if isinstance(it, argparse._SubParsersAction)]
    return actions[0].choices[command]


def commands() -> str:
    """Every command with its examples and all its flags."""
    parts = [
        "# Commands\n\n`rkl COMMAND --help` prints the same in a terminal. Settings may stand in "
        "a file too: `--config FILE`.\n"
    ]
    for command in cli.available():
        parser = parser_of(command)
        examples = (parser.epilog or "").partition("Examples:\n")[2].partition("\n\n")[0]
        lines = "\n".join(line.strip() for line in examples.splitlines())
        parts.append(f"## rkl {command}\n\n{(parser.description or '').partition(chr(10))[0]}\n")
        parts.append(f"```text\n{lines}\n```\n")
        parts += [*flag_table(parser), *further_settings(command)]
    return "\n".join(parts)


def message(node: ast.expr) -> str:
    """The text of a message in a source, with … where a value is put in."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(message(part) for part in parts)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return message(left) + message(right)
    return "…"


def errors(source: str) -> Iterator[tuple[str, str]]:
    """The class and the message of every exception that a source raises with a text.

    >>> list(errors("def f(x):\\n    raise ValueError(f'x must be 1; got {x}.')"))
    [('ValueError', 'x must be 1; got ….')]
    """
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Raise(exc=ast.Call(func=ast.Name(id=name), args=[first, *_])):
                text = " ".join(message(first).split())
                if len(text.replace("…", "")) > 12:
                    yield name, text


def error_page() -> str:
    """The exceptions of rkl, and the messages of every part."""
    classes = []
    for package, name in public():
        described = getattr(importlib.import_module(package), name)
        if inspect.isclass(described) and issubclass(described, BaseException):
            classes.append([linked(f"{package}.{name}", described), cell(sentence(described))])
    codes = inspect.getdoc(cli.main) or ""
    returns = " ".join(codes.partition("Returns:")[2].split())
    parts = [
        "# Errors\n\nA message names the argument, what was got, what was expected and what to "
        "do. `ValueError` and `TypeError` mean that a call cannot be done as asked.\n",
        f"**Exit codes of commands.** {cell(returns)}\n",
        table(["exception", ""], classes) + "\n",
        "## Messages\n\nSearch this page for the words of a message; … stands for a value.\n",
    ]
    by_part: dict[str, dict[tuple[str, str], None]] = {}
    for path in sorted(SOURCE.rglob("*.py")):
        part = path.relative_to(SOURCE.parent).with_suffix("").parts[1]
        found = by_part.setdefault(part, {})
        found.update(dict.fromkeys(errors(path.read_text("utf-8"))))
    for part, found in by_part.items():
        if found:
            rows = [[cell(text), code(name)] for name, text in sorted(found, key=lambda it: it[1])]
            title = "rkl" if part == "__init__" else f"rkl.{part}"
            parts.append(f"### {title}\n\n{table(['message', 'exception'], rows)}\n")
    return "\n".join(parts)


def write_reference(folder: Path, write: Callable[[Path, str], None]) -> None:
    """Write every page of tables."""
    write(folder / "divergences.md", divergences())
    heads = ["name", "", "parameters", "domain", "conditions", "provides"]
    write(
        folder / "targets.md",
        (
            "# Targets\n\nUnnormalised densities that `rkl fit --target` and `rkl evidence` take "
            "by name. Your own is `module:function` or a subclass of "
            f"{{class}}`rkl.sample.Target`.\n\n{table(heads, target_rows())}\n"
        ),
    )
    heads = ["distribution", "parameters", ""]
    write(
        folder / "families.md",
        (
            "# Families\n\nDistributions of data whose Bayes acts have a closed form: T is the "
            "sufficient statistic, η the natural parameter, A the log-partition. `--family` takes "
            "the name in any case, with or without hyphens, as in "
            "`log-normal(loc=mu, scale=sigma)`; some names of other libraries are read too, as in "
            "`gaussian(mu=..., sigma=...)`.\n\n"
            f"{table(heads, family_rows())}\n\n## Found numerically\n\nThe act of any other "
            "distribution of `torch.distributions` is found numerically, and that of these:\n\n"
            f"{table(heads, numerical_rows())}\n"
        ),
    )
    heads = ["name", "", "parameters", "domain"]
    write(
        folder / "architectures.md",
        (
            "# Architectures\n\nWhat `rkl fit --flow` builds. Your own is a subclass of "
            "{class}`rkl.flows.Architecture`.\n\n"
            f"{table(heads, architecture_rows())}\n"
        ),
    )
    write(folder / "commands.md", commands())
    write(folder / "errors.md", error_page())

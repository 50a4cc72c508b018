"""The pages of the Python reference: one per package and one per public name."""

import importlib
import inspect
import re
from collections.abc import Callable
from pathlib import Path

from public_names import GROUPS, groups

LEADS = {
    "rkl": "Divergences, and what computes them.",
    "rkl.distill": "Distil language models.",
    "rkl.fit": "Fit normalizing flows to rows and images.",
    "rkl.sample": "Draw from densities that are known up to a constant.",
    "rkl.bayes": "The one value to report of posterior draws.",
    "rkl.flows": "What fitting and sampling share: architectures, training, draws.",
    "rkl.metrics": "Precision and recall, distances of samples, measures of text.",
    "rkl.stats": "Means with their errors, chains, tails, quantiles.",
    "rkl.plots": "One function per figure: arrays in, a figure out.",
    "rkl.testing": "The laws that a divergence obeys.",
}


LITERAL = re.compile(r"(``.*?``|:[\w:]+:`[^`]*`|`[^`]*`_{0,2})")


def escaped(text: str) -> str:
    """A line of prose in which stars, bars and last underscores are letters and no markup.

    >>> print(escaped("Draws, [*batch, 1] of ``[*shape]``, |m| and chain__."))
    Draws, [\\*batch, 1] of ``[*shape]``, \\|m\\| and chain\\_\\_.
    """
    parts = LITERAL.split(text)
    parts[::2] = [re.sub(r"(?<!\\)([*|]|_(?=_*(\W|$)))", r"\\\1", part) for part in parts[::2]]
    return "".join(parts)


def directive(described: object) -> str:
    """The directive of autodoc for an object, with its options."""
    if not inspect.isclass(described):
        return "autofunction"
    return "autoexception" if issubclass(described, BaseException) else "autoclass"


def summary(described: object) -> str:
    """The first sentence of a docstring, or its first paragraph."""
    text = inspect.getdoc(described) or ""
    paragraph = " ".join(text.partition("\n\n")[0].split())
    return escaped(paragraph)


def page(package: str, title: str, name: str) -> str:
    """The page of one public name, in reStructuredText as docstrings are."""
    kind = directive(getattr(importlib.import_module(package), name))
    options = "" if kind == "autofunction" else "   :members:\n   :show-inheritance:\n"
    return (
        f":orphan:\n\n{name}\n{'=' * len(name)}\n\n"
        f".. rst-class:: trail\n\n:doc:`{package} </api/{package}>` › {title}\n\n"
        f".. currentmodule:: {package}\n\n"
        f".. {kind}:: {name}\n{options}"
    )


def package_page(package: str) -> str:
    """The names of a package in their groups, each with its first sentence."""
    lines = [package, "=" * len(package), "", LEADS[package], ""]
    module = importlib.import_module(package)
    for title, names in groups(package).items():
        lines += [title, "-" * len(title), "", ".. list-table::", "   :widths: 30 70", ""]
        for name in names:
            lines.append(f"   * - :py:obj:`{name} <{package}.{name}>`")
            lines.append(f"     - {summary(getattr(module, name))}")
        lines.append("")
    return "\n".join(lines)


def write_api(folder: Path, write: Callable[[Path, str], None]) -> None:
    """Write every page."""
    for package in GROUPS:
        write(folder / f"{package}.rst", package_page(package))
        for title, names in groups(package).items():
            for name in names:
                write(folder / package / f"{name}.rst", page(package, title, name))

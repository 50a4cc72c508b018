"""Bring the table of divergences in docs/figures.md up to date with the catalogue.

    python docs/table.py

Names, formulas and properties come from the classes; the last column is written by hand and kept.
"""

import inspect
import re
from pathlib import Path

import rkl

PAGE = Path(__file__).with_name("figures.md")
BEGIN, END = "<!-- table: divergences -->", "<!-- end of table -->"
HEADINGS = "name", "D(p ‖ q)", "properties", "take it when"


def properties(divergence: rkl.Divergence) -> str:
    """Which of the properties that rkl computes it has, in words."""
    sampled = isinstance(divergence, rkl.FDivergence)
    has = {
        "bounded": divergence.bounded,
        "symmetric": divergence.symmetric,
        "scale-free": isinstance(divergence, rkl.FDivergence) and divergence.scale_free,
        "exact only": not sampled,
    }
    return ", ".join(word for word, holds in has.items() if holds)


def row(name: str, cls: type[rkl.Divergence], when: str) -> str:
    """The row of one divergence, at its defaults."""
    sentence = (inspect.getdoc(cls) or "").partition("\n")[0].rstrip(".")
    called, _, formula = sentence.partition(", ")
    names = " ".join(f"`{it}`" for it in (name, *cls.aliases))
    cells = names, f"{called}: {formula}".replace("|", r"\|"), properties(cls()), when
    return f"| {' | '.join(cells)} |"


def table(written: str) -> str:
    """The table, its last column taken from one written before."""
    rows = re.findall(r"^\| `([^`]+)`.* \| (.*) \|$", written, flags=re.M)
    when = dict(rows)
    ours = {
        name: cls for name, cls in rkl.catalogue().items() if cls.__module__.startswith("rkl.")
    }
    lines = [f"| {' | '.join(HEADINGS)} |", "|---" * len(HEADINGS) + "|"]
    return "\n".join(lines + [row(name, cls, when.get(name, "")) for name, cls in ours.items()])


def between(text: str) -> str:
    """What stands between the two marks."""
    return text.split(BEGIN)[1].split(END)[0].strip()


def main() -> None:
    """Write the table anew."""
    text = PAGE.read_text(encoding="utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    new = f"{before}{BEGIN}\n{table(between(text))}\n{END}{after}"
    PAGE.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()

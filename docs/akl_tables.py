"""Bring the tables of docs/studies/akl-language.md up to date with the csv files of the study.

    python docs/akl_tables.py

A table stands between two marks, the first of which has its title; the text around is written by
hand.
"""

import re
from pathlib import Path

from rkl.studies.akl.language import answers

PAGE = Path(__file__).parent / "studies" / "akl-language.md"
FIGURES = Path(__file__).parent / "figures"
FILES = "akl-language.csv", "akl-language-flat.csv", "akl-language-real.csv"
MARKED = re.compile(r"(<!-- table: (.+?) -->\n\n).*?(<!-- end of table -->)", re.DOTALL)


def tables() -> dict[str, str]:
    """The tables by their titles, as Markdown."""
    paths = [FIGURES / name for name in FILES]
    rows = [row for path in paths if path.exists() for row in answers.read(path)]
    asked = answers.questions(answers.Rows(rows))
    return {table.title: table.to_markdown() for _, found in asked for table in found}


def filled(page: str) -> str:
    """The page with the tables of today."""
    found = tables()
    return MARKED.sub(lambda it: f"{it[1]}{found[it[2]]}\n\n{it[3]}", page)


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")

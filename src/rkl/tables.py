"""A table, and a number with its error: as text, HTML, Markdown, JSON and a data frame of pandas.

Text prints an error in units of the last digit, 0.123(4); HTML and Markdown print 0.123 ± 0.004.
"""

import html
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, SupportsFloat, overload

from rkl.extras import optional_import

Cell = str | bool | int | float | tuple[float, float] | tuple[float, float, str] | None
MAX_PRINTED_ROWS = 40
ROUNDING = 1e-12  # of a value, up to which an error is that of arithmetic
WIDTH = 100  # letters, beyond which units stand below the names of columns
PLAIN = -4, 6  # powers of ten between which a number with an error is written without one
GROUPED = 1e4, 1e15  # numbers between which digits before the point are grouped by thousands


@dataclass(frozen=True)
class Table:
    """Rows of cells under named columns; the first column names the rows.

    Attributes:
        title: Title of the table.
        columns: Names of the columns, each with its unit in brackets, as "risk (nats)".
        rows: One cell per column: text, a number, a pair (value, standard error), a pair with a
            mark, as "*", that the notes explain, or None.
        notes: Sentences below the table; a single text is one.

    >>> table = Table("Fits", ["run", "risk (nats)"], [["a", (0.1234, 0.004)], ["b", None]])
    >>> print(table.text())
    Fits
    <BLANKLINE>
    run  risk (nats)
    a       0.123(4)
    b              –
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    notes: Sequence[str] = ()

    def __post_init__(self):
        if isinstance(self.notes, str):
            object.__setattr__(self, "notes", (self.notes,) if self.notes else ())
        for i, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                expected = f"the {len(self.columns)} of columns"
                raise ValueError(f"rows[{i}] must hold {expected}; got {len(row)} cells.")
            for cell in row:
                _check_cell(f"rows[{i}]", cell)

    def __str__(self) -> str:
        return self.text(MAX_PRINTED_ROWS)

    def text(self, limit: int | None = None) -> str:
        """The table as lines of text, numbers to the right, of at most ``limit`` rows."""
        body = [[cell_text(cell) for cell in row] for row in self.rows[:limit]]
        columns = [[head, *cells] for head, *cells in zip(self.columns, *body, strict=True)]
        if sum(max(map(len, column)) + 2 for column in columns) > WIDTH:
            columns = [[*_name_and_unit(head), *cells] for head, *cells in columns]
        aligned = []
        for column, words in zip(columns, self.holds_text(), strict=True):
            width = max(map(len, column))
            aligned.append([c.ljust(width) if words else c.rjust(width) for c in column])
        lines = ["  ".join(line) for line in zip(*aligned, strict=True)]
        notes = self._notes(limit)
        return "\n".join([self.title, "", *map(str.rstrip, lines), *[""][: len(notes)], *notes])

    def holds_text(self) -> list[bool]:
        """For each column, True if it holds words and not numbers alone; the first always does."""
        columns = zip(*self.rows, strict=True) if self.rows else ((),) * len(self.columns)
        return [not i or any(isinstance(c, str) for c in cells) for i, cells in enumerate(columns)]

    def to_html(self, limit: int | None = None) -> str:
        """The ``<table>`` as HTML, everything in it escaped; without title and notes."""
        classes = [' class="text"' if words else "" for words in self.holds_text()]
        heads = zip(self.columns, classes, strict=True)
        head = "".join(f'<th scope="col"{kind}>{_escape(name)}</th>' for name, kind in heads)
        body = []
        for row in self.rows[:limit]:
            first, *others = (_escape(cell_text(cell, plus_minus=True)) for cell in row)
            cells = "".join(
                f"<td{kind}>{cell}</td>" for cell, kind in zip(others, classes[1:], strict=True)
            )
            body.append(f'<tr><th scope="row">{first}</th>{cells}</tr>')
        rows = "\n".join(body)
        return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table>"

    def _repr_html_(self) -> str:
        notes = "".join(f"<p>{_escape(note)}</p>" for note in self._notes(MAX_PRINTED_ROWS))
        caption = f"<caption>{_escape(self.title)}</caption>"
        table = self.to_html(MAX_PRINTED_ROWS)
        return f"{table.replace('<table>', f'<table>{caption}', 1)}{notes}"

    def to_markdown(self) -> str:
        """The table in Markdown; without title and notes."""
        body = [[cell_text(cell, plus_minus=True) for cell in row] for row in self.rows]
        rules = ["---" if words else "---:" for words in self.holds_text()]
        lines = [[*map(_in_one_line, self.columns)], rules]
        lines += [[*map(_in_one_line, cells)] for cells in body]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def to_dict(self) -> dict[str, Any]:
        """The table as a dict for JSON: a value with its error is a list of the two."""
        rows = [[list(c) if isinstance(c, tuple) else c for c in row] for row in self.rows]
        columns, notes = list(self.columns), list(self.notes)
        return {"title": self.title, "columns": columns, "rows": rows, "notes": notes}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> "Table":
        """The table of a dict from :meth:`to_dict`."""
        rows = [
            tuple(tuple(c) if isinstance(c, list) else c for c in row) for row in record["rows"]
        ]
        return cls(record["title"], tuple(record["columns"]), rows, tuple(record["notes"]))

    def to_dataframe(self) -> Any:
        """A data frame of pandas; a value with an error becomes two columns.

        Raises:
            ImportError: There is no pandas.
        """
        with optional_import("to_dataframe"):
            import pandas
        frame: dict[str, list] = {}
        for i, name in enumerate(self.columns):
            cells = [row[i] for row in self.rows]
            frame[name] = [cell[0] if isinstance(cell, tuple) else cell for cell in cells]
            if any(isinstance(cell, tuple) for cell in cells):
                errors = [cell[1] if isinstance(cell, tuple) else None for cell in cells]
                frame[f"{name}, error"] = errors
        return pandas.DataFrame(frame)

    def _notes(self, limit: int | None) -> list[str]:
        hidden = 0 if limit is None else len(self.rows) - limit
        return [*([f"... and {hidden:,} more rows"] if hidden > 0 else []), *self.notes]


def table_of(
    title: str, values: Mapping[str, Any], notes: Sequence[str] = (), *, counted: str = ""
) -> Table:
    """A table of named numbers, or of arrays of one shape, which may be pairs (values, errors).

    Numbers have a row each. Arrays are columns, with a row for each place, counted from 0.

    Args:
        title: Title of the table.
        values: Numbers, texts, arrays, or pairs of a value and its standard error; what is None is
            left out.
        notes: Sentences below the table.
        counted: What the places of arrays are, as "condition".

    >>> print(table_of("Two means", {"a": (0.1234, 0.004), "b": None, "c": 3}))
    Two means
    <BLANKLINE>
          value
    a  0.123(4)
    c         3
    """
    columns = {name: _cells(value) for name, value in values.items() if value is not None}
    if all(len(cells) == 1 for cells in columns.values()):
        rows = [(name, cells[0]) for name, cells in columns.items()]
        return Table(title, ("", "value"), rows, notes)
    places = enumerate(zip(*columns.values(), strict=True))
    return Table(title, (counted, *columns), [(str(i), *row) for i, row in places], notes)


def _cells(value: Any) -> list[Any]:
    if isinstance(value, tuple):
        return list(zip(*map(_cells, value), strict=True))
    return [value] if isinstance(value, str | int | float) else value.flatten().tolist()


def cell_text(cell: Cell, *, plus_minus: bool = False) -> str:
    """A cell as text: a value with its error to the error's leading digit, others to four digits.

    >>> cell_text(12345), cell_text(0.123456), cell_text((1.5, 0.3, "*")), cell_text(None)
    ('12,345', '0.1235', '1.5(3)*', '–')
    """
    match cell:
        case None:
            return "–"
        case str():
            return cell
        case bool():
            return "yes" if cell else "no"
        case int():
            return f"{cell:,}".replace("-", "−")
        case (value, error, *mark):
            return with_error(value, error, plus_minus=plus_minus) + "".join(map(str, mark))
    return _number(float(cell))


@overload
def pair_of(record: Mapping[str, Any]) -> tuple[float, float]: ...
@overload
def pair_of(record: Mapping[str, Any] | None) -> tuple[float, float] | None: ...
def pair_of(record: Mapping[str, Any] | None) -> tuple[float, float] | None:
    """Value and error of a mean that was read from JSON, nan where it held null."""
    if record is None:
        return None
    value, error = nan_of_null([record["value"], record["error"]])
    return value, error


def nan_of_null(values: Sequence[float | None]) -> list[float]:
    """Numbers that were read from JSON, nan where it held null."""
    return [math.nan if value is None else value for value in values]


def with_error(value: SupportsFloat, error: SupportsFloat, *, plus_minus: bool = False) -> str:
    """A value with its standard error, in units of the last digit or behind ±.

    The last digit is the error's first, or its second if the first is 1.

    >>> with_error(0.12345, 0.0042), with_error(12.3, 0.16), with_error(1234.0, 25)
    ('0.123(4)', '12.30(16)', '1,230(20)')
    >>> with_error(0.12345, 0.0042, plus_minus=True), with_error(2.5e-9, 4e-10, plus_minus=True)
    ('0.123 ± 0.004', '(2.5 ± 0.4)e−9')
    >>> with_error(1.0234e-21, 6e-24), with_error(0.5, math.nan)
    ('1.023(6)e−21', '0.5(?)')
    """
    value, error = float(value), abs(float(error))
    if not math.isfinite(value) or error <= ROUNDING * abs(value):
        return _number(value)
    if not math.isfinite(error):
        return f"{_number(value)} ± ?" if plus_minus else f"{_number(value)}(?)"
    power = math.floor(math.log10(max(abs(value), error)))
    if PLAIN[0] <= power < PLAIN[1]:
        return _in_digits(value, error, plus_minus)
    mantissa = _in_digits(value / 10.0**power, error / 10.0**power, plus_minus)
    mantissa = f"({mantissa})" if plus_minus else mantissa
    return f"{mantissa}e{power}".replace("-", "−")


def _in_digits(value: float, error: float, plus_minus: bool) -> str:
    leading, exponent = f"{error:.1e}".split("e")
    digits = -int(exponent) + leading.startswith("1")
    places = max(digits, 0)
    if plus_minus:
        text = f"{value:,.{places}f} ± {error:,.{places}f}"
    else:
        in_last = round(error, digits) * (10**digits if digits > 0 else 1)
        text = f"{round(value, digits):,.{places}f}({in_last:,.0f})"
    return text.replace("-", "−")


def _number(value: float) -> str:
    if math.isnan(value):
        return "undefined"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    grouped = GROUPED[0] <= abs(value) < GROUPED[1]
    text = f"{value:,.0f}" if grouped else f"{value:.4g}"
    return re.sub(r"e\+?(-?)0*", r"e\1", text).replace("-", "−")


def _name_and_unit(head: str) -> tuple[str, str]:
    name, bracket, unit = head.rpartition(" (")
    return (name, unit[:-1]) if bracket and unit.endswith(")") else (head, "")


def _escape(text: str) -> str:
    return html.escape(text, quote=False)


def _in_one_line(cell: str) -> str:
    """A cell of Markdown, which ends at a bar and at the end of a line."""
    return " ".join(cell.split()).replace("|", r"\|")


def _check_cell(argument: str, cell: object) -> None:
    if isinstance(cell, tuple):
        mark = cell[2] if len(cell) == 3 else ""
        numbers = all(isinstance(it, int | float) for it in cell[:2])
        if len(cell) not in (2, 3) or not numbers or not isinstance(mark, str):
            raise ValueError(
                f"{argument} must hold pairs (value, standard error), which may have a mark; got "
                f"{cell}."
            )
    elif not (cell is None or isinstance(cell, str | int | float)):
        got = type(cell).__name__
        raise TypeError(f"{argument} must hold text, numbers or pairs; got a {got}.")

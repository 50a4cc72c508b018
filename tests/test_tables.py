import importlib
import inspect
import math
import typing

import pytest

from rkl.tables import MAX_PRINTED_ROWS, Table, cell_text, pair_of, with_error

TABLE = Table(
    "Runs <&>",
    ("run", "risk (nats)", "steps", "finished"),
    [("a|b", (0.12345, 0.0042), 12345, True), ("c", (2.0, 0.3, "*"), None, False)],
    "* Of a heavy tail.",
)


def test_text_aligns_words_to_the_left_and_numbers_to_the_right():
    assert str(TABLE).splitlines() == [
        "Runs <&>",
        "",
        "run  risk (nats)   steps  finished",
        "a|b     0.123(4)  12,345       yes",
        "c        2.0(3)*       –        no",
        "",
        "* Of a heavy tail.",
    ]


def test_units_stand_below_the_names_of_a_wide_table():
    wide = Table("t", ["at", *(f"quantity {k} (unit {k})" for k in range(9))], [["a", *range(9)]])
    _, _, names, units, row = str(wide).splitlines()
    assert names.split() == ["at", *(word for k in range(9) for word in ("quantity", str(k)))]
    assert units.split() == [word for k in range(9) for word in ("unit", str(k))]
    assert row.split() == ["a", *map(str, range(9))]
    assert len(names) == len(units) == len(row)


def test_a_long_table_prints_its_first_rows_and_says_how_many_follow():
    long = Table("t", ["k"], [[k] for k in range(MAX_PRINTED_ROWS + 3)])
    assert str(long).endswith(f"{MAX_PRINTED_ROWS - 1}\n\n... and 3 more rows")
    assert "... and 3 more rows" in long._repr_html_()
    assert long.text().endswith(str(MAX_PRINTED_ROWS + 2))
    assert long.to_html().count("<tr>") == MAX_PRINTED_ROWS + 4


def test_html_escapes_everything_and_writes_errors_behind_a_sign():
    shown = TABLE._repr_html_()
    assert "<caption>Runs &lt;&amp;&gt;</caption>" in shown
    assert '<th scope="row">a|b</th><td>0.123 ± 0.004</td>' in shown
    assert "<p>* Of a heavy tail.</p>" in shown
    assert "Runs" not in TABLE.to_html()


def test_markdown_escapes_the_bar_that_parts_cells():
    lines = TABLE.to_markdown().splitlines()
    assert lines[1] == "| --- | ---: | ---: | ---: |"
    assert lines[2] == r"| a\|b | 0.123 ± 0.004 | 12,345 | yes |"
    table = Table("", ["run", "log p(x|y)"], [["two\nlines", 1]])
    assert table.to_markdown().splitlines()[::2] == [r"| run | log p(x\|y) |", "| two lines | 1 |"]


def test_a_table_read_from_json_prints_as_before():
    assert str(Table.from_dict(TABLE.to_dict())) == str(TABLE)
    assert TABLE.to_dict()["rows"][0] == ["a|b", [0.12345, 0.0042], 12345, True]


def test_a_data_frame_has_a_column_of_errors_where_there_are_some():
    frame = TABLE.to_dataframe()
    assert list(frame) == ["run", "risk (nats)", "risk (nats), error", "steps", "finished"]
    assert frame["risk (nats), error"].tolist() == [0.0042, 0.3]


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        ((1.0, 1e-16), "1"),
        ((0.5, 0.0), "0.5"),
        ((0.5, math.nan), "0.5(?)"),
        ((math.inf, math.nan), "∞"),
        ((-0.5, 0.2), "−0.5(2)"),
        ((0.0, 0.26), "0.0(3)"),
        ((1234567.0, 2345.0), "1.235(2)e6"),
        ((3e-7, 1.2e-8), "3.00(12)e−7"),
        ((0.09996, 0.00098), "0.1000(10)"),
        (-12, "−12"),
        (123456.7, "123,457"),
        (1.5e-7, "1.5e−7"),
        (6.02e23, "6.02e23"),
        (math.nan, "undefined"),
        ("kl()", "kl()"),
    ],
)
def test_a_number_is_printed_to_the_digits_that_its_error_leaves(cell, text):
    assert cell_text(cell) == text


def test_the_printed_error_is_that_of_the_value_to_within_its_rounding():
    """Values and errors over 40 powers of ten: one digit is printed, or two of which one is 1."""
    for power in range(-20, 20):
        for share in (0.0123, 0.2, 0.0999, 1.0, 3.7):
            value, error = 1.23456 * 10.0**power, share * 1.23456 * 10.0**power
            value_text, _, error_text = with_error(value, error, plus_minus=True).partition(" ± ")
            tail = error_text.partition(")")[2] or "e0"
            error_text = error_text.partition(")")[0]
            scale = 10.0 ** int(tail[1:].replace("−", "-"))
            got = [
                float(it.strip("(").replace(",", "")) * scale for it in (value_text, error_text)
            ]
            assert got[1] == pytest.approx(error, rel=0.26)
            assert abs(got[0] - value) <= 0.51 * error


@pytest.mark.parametrize("value", [0.12345, -3.7, 1234.5, 9.96, 1e-7, 0.0995, 1.02e-21, -6e23])
@pytest.mark.parametrize("error", [0.0042, 0.16, 0.096, 25.0, 3e-9, 0.95, 6e-24, 3e21])
def test_an_error_in_parentheses_is_that_of_the_last_digits(value, error):
    text = with_error(value, error).replace("−", "-").replace(",", "")
    if error <= 1e-12 * abs(value):  # what is left of it is rounding, and is not printed
        assert text == cell_text(value).replace("−", "-").replace(",", "")
        return
    shown, _, rest = text.partition("(")
    last, _, power = rest.partition(")")
    scale = float(f"1{power}")
    unit = 10 ** -len(shown.partition(".")[2])
    # what double precision leaves of a value that is 16 digits longer than its error
    off = max(unit * scale, error / 2, 1e-15 * abs(value))
    assert float(shown) * scale == pytest.approx(value, abs=0.5001 * off)
    assert float(last) * scale * (unit if unit < 1 else 1) == pytest.approx(error, rel=0.26)
    if error / abs(value) > 1e-9:
        assert len(text) < 25


def test_a_mean_in_json_is_a_pair_and_none_is_none():
    assert pair_of({"value": 1.0, "error": 0.5}) == (1.0, 0.5)
    assert pair_of(None) is None
    assert all(map(math.isnan, pair_of({"value": None, "error": None})))


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ([[1, 2, 3]], ValueError, r"rows\[0\] must hold the 2 of columns; got 3 cells"),
        ([["a", (1.0, 0.1)], ["b", (1.0, "c")]], ValueError, r"rows\[1\] must hold pairs"),
        ([["a", [1.0]]], TypeError, r"rows\[0\] must hold text, numbers or pairs; got a list"),
    ],
)
def test_rows_that_are_none_are_refused(rows, error, message):
    with pytest.raises(error, match=message):
        Table("t", ["a", "b"], rows)


def test_what_prints_as_a_table_is_a_table_in_a_notebook():
    shown = {}
    for wing in ("bayes", "distill", "fit", "flows", "metrics", "sample", "stats"):
        module = importlib.import_module(f"rkl.{wing}")
        for cls in filter(inspect.isclass, (getattr(module, name) for name in module.__all__)):
            table = inspect.getattr_static(cls, "table", None)
            table = getattr(table, "func", table)  # of a cached property
            kind = typing.get_type_hints(table).get("return") if table else None
            if inspect.isclass(kind) and issubclass(kind, Table):
                shown[cls.__name__] = hasattr(cls, "_repr_html_")
    assert {"Estimate", "Region", "Measured", "Comparison"} <= shown.keys()
    assert all(shown.values()), shown

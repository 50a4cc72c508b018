"""Numbers as text, with their errors in units of the last digit."""

import math

ROUNDING = 1e-12  # of a value, up to which an error is that of arithmetic
PLAIN = -4, 6  # powers of ten between which a number is written without one
Cell = str | int | float | tuple[float, float] | None


def parenthesised(cell: Cell) -> str:
    """A cell as text, an error given in units of the last digit.

    The last digit is the error's first, or its second if the first is 1.

    >>> parenthesised((0.12345, 0.0042)), parenthesised((12.3, 0.16)), parenthesised((1234.0, 25))
    ('0.123(4)', '12.30(16)', '1230(20)')
    >>> parenthesised((1.0234e-21, 6e-24)), parenthesised((6.11e23, 3e21))
    ('1.023(6)e−21', '6.11(3)e23')
    >>> parenthesised(0.123456), parenthesised((0.5, math.nan)), parenthesised(None)
    ('0.1235', '0.5(?)', '–')
    """
    match cell:
        case None:
            return "–"
        case (value, error):
            return _with_error(value, error)
        case float() if not math.isfinite(cell):
            return "undefined" if math.isnan(cell) else "∞" if cell > 0 else "−∞"
        case float():
            return f"{cell:.4g}".replace("-", "−")
    return str(cell)


def _with_error(value: float, error: float) -> str:
    if not math.isfinite(value) or abs(error) <= ROUNDING * abs(value):
        return parenthesised(value)
    if not math.isfinite(error):
        return f"{parenthesised(value)}(?)"
    power = math.floor(math.log10(max(abs(value), error)))
    if PLAIN[0] <= power < PLAIN[1]:
        return _in_last_digit(value, error)
    mantissa = _in_last_digit(value / 10.0**power, error / 10.0**power)
    return f"{mantissa}e{power}".replace("-", "−")


def _in_last_digit(value: float, error: float) -> str:
    leading, exponent = f"{error:.1e}".split("e")
    digits = -int(exponent) + leading.startswith("1")
    shown = round(error, digits)
    in_last = f"{shown:.0f}" if digits <= 0 else f"{shown * 10**digits:.0f}"
    return f"{round(value, digits):.{max(digits, 0)}f}({in_last})".replace("-", "−")

"""Text from others, such as a name or a line of their data, escaped for terminals and Markdown."""

import re
from typing import Any

# Controls but for ends of lines and tabs, and marks that turn the direction of writing.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def printable(value: Any) -> str:
    r"""Text for a terminal, with controls as escapes.

    >>> printable("\x1b[31mred\x07")
    '\\x1b[31mred\\x07'
    """
    return _CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode(), str(value))


def one_line(value: Any) -> str:
    """The same on one line."""
    return printable(" ".join(str(value).split()))


def markdown(value: Any) -> str:
    r"""Text that Markdown shows as it is: no markup, no HTML, no second line.

    >>> print(markdown("t<script> [x](y)"))
    t\<script\> \[x\](y)
    """
    return re.sub(r"([^\w\s.,;:/+=%'()@-]|_)", r"\\\1", one_line(value))


def markdown_code(value: Any) -> str:
    """The same as code in a line, between more backticks than it has in a row.

    >>> markdown_code("akl(mu=0.5)"), markdown_code("a`b")
    ('`akl(mu=0.5)`', '``a`b``')
    """
    text = one_line(value)
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    space = " " * (text[:1] == "`" or text[-1:] == "`")
    return f"{fence}{space}{text}{space}{fence}"

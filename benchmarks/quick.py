"""``--quick``: every benchmark in less than a minute of CPU time, to see that it runs.

Its figures say nothing about speed. A flag that is given beside it keeps its value.
"""

import argparse
import sys


def parse(parser: argparse.ArgumentParser, **small) -> argparse.Namespace:
    """The arguments of a benchmark; with --quick these are the defaults."""
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    if "--quick" in sys.argv[1:]:
        for action in parser._actions:
            action.required = action.required and action.dest not in small
        parser.set_defaults(**small)
    return parser.parse_args()

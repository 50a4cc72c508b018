"""The script that measures the house, on sources made up."""

import ast
import textwrap

import house
import pytest


def test_code_is_counted_without_blank_lines_comments_and_docstrings():
    source = textwrap.dedent(
        '''
        """What this is,

        at length.
        """

        # a comment
        TEXT = """one
        two"""  # two lines of code


        def verb(x):
            """A docstring."""
            return x
        '''
    )
    assert house.code_lines(source, ast.parse(source)) == 4


def test_circles_are_found_and_straight_lines_are_not():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a", "e"}, "e": set(), "f": {"f"}}
    assert house.circles(graph) == [["b", "c"], ["f"]]


def test_imports_within_functions_count_and_those_for_types_do_not():
    source = textwrap.dedent(
        """
        from typing import TYPE_CHECKING
        from . import a
        if TYPE_CHECKING:
            from rkl import types
        def later():
            from rkl.b import name
        """
    )
    modules = {"rkl", "rkl.w", "rkl.w.a", "rkl.b", "rkl.types"}
    assert house.imported(ast.parse(source), "rkl.w", modules) == {"rkl.w.a", "rkl.b"}


@pytest.mark.parametrize(
    ("name", "bare"),
    [("found", True), ("chosen", True), ("masked", True), ("read", False), ("embed", False)]
    + [("masked_rows", False), ("drawn", True), ("head", False), ("feed", False)],
)
def test_bare_participles_are_told_from_verbs_and_nouns(name, bare):
    assert bool(house.PARTICIPLE.fullmatch(name)) == bare

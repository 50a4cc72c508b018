"""Text of others stays text: on a terminal, and in the Markdown of a model card."""

from typing import Any

import pytest
from markdown_it import MarkdownIt

from rkl.distill.card import model_card
from rkl.runs import Run
from rkl.runs.progress import say
from rkl.text import markdown, markdown_code, printable

HOSTILE = [
    "t<script>alert(1)</script>",
    "<!-- a comment",
    "![x](https://example.org/x.png)",
    "[click](javascript:alert(1))",
    "**bold** _it_ `code` ~~gone~~",
    "a\n\n# heading\n\n- item",
    "```\nblock",
    "https://example.org & co &lt; |a|b|",
    "\\[escaped\\] \\`",
    "`` ` ```",
    '"quoted" {braces} {0} {name!r}',
]
every_text = pytest.mark.parametrize("text", HOSTILE)


def shown(source):
    """The kinds of tokens that a reader of Markdown finds, and the text that it shows."""
    tokens = MarkdownIt("commonmark").parse(source)
    inline = [it for token in tokens for it in token.children or []]
    return {it.type for it in [*tokens, *inline]}, "".join(it.content for it in inline)


@every_text
def test_markdown_shows_a_name_as_it_is(text):
    kinds, said = shown(f"a {markdown(text)} b")
    assert kinds <= {"paragraph_open", "paragraph_close", "inline", "text", "text_special"}
    assert said == f"a {' '.join(text.split())} b"


@every_text
def test_code_is_code_whatever_stands_in_it(text):
    kinds, said = shown(f"a {markdown_code(text)} b")
    assert kinds <= {"paragraph_open", "paragraph_close", "inline", "text", "code_inline"}
    assert said == f"a {' '.join(text.split())} b"


def card_of(folder, text):
    """What a reader of Markdown finds in the card of a run whose names are all this text."""
    names: dict[str, Any] = dict.fromkeys(
        ("teacher", "student", "data", "divergence", "drop_layers"), text
    )
    run = Run.create(folder, "distill", names, seed=0)
    held_out = {"blocks": 1, "origin": text}
    run.update(
        data={"rows": 1, "blocks": 1, "fingerprint": text, "held_out": held_out},
        result={"steps": 1, "tokens": 2, "held_out_loss": None},
        versions={"rkl": text},
    )
    card = model_card(run).removeprefix("---\n").split("\n---\n", 1)[1]
    return [it.type for it in MarkdownIt("commonmark").parse(card)], shown(card)[0]


@every_text
def test_a_model_card_holds_no_markup_of_the_names_in_it(text, tmp_path):
    name = text.replace("/", " ").replace("\n", " ")
    blocks, parts = card_of(tmp_path / name, text)
    plain_blocks, plain_parts = card_of(tmp_path / "plain", "name")
    assert blocks == plain_blocks
    assert parts <= plain_parts | {"text_special"}


def test_a_terminal_obeys_nothing_in_the_text_of_others(capsys):
    say("first \x1b[2J\x07 line\n\tsecond \u202e line \x9b31m é 中")
    said = capsys.readouterr().err
    assert said == "first \\x1b[2J\\x07 line\n\tsecond \\u202e line \\x9b31m é 中\n"
    assert printable("a\rb\x7f") == "a\\rb\\x7f"

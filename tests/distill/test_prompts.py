"""Prompts cut off their completions: the same tokens as by tokenizing every prompt alone."""

import random

import material
import pytest
from tokenizers import Regex, pre_tokenizers, processors
from transformers import AddedToken

from rkl.distill.text import prompts
from rkl.distill.text.data import show_example, tokenize
from rkl.distill.text.encoding import encode
from rkl.distill.text.prompts import WORDS, encode_completions

PIECES = (
    *("a", "an", " the", "it", "'s", "'LL", "e\u0301", "\u4f60\u597d", "\U0001f600", "12", "3456"),
    *(" ", "  ", "\n", "\r\n", "\n \n", "\t", "\xa0", "\x1c", ".", " ...", ".\n", "!?", "_x", "-"),
    *("<|end|>", "<|end", "|>", "<b>", "<bb>", "word", " words words", "A b C d", "s s s"),
)


def texts(count=60):
    chance = random.Random(0)
    made = ["".join(chance.choices(PIECES, k=chance.randint(1, 14))) for _ in range(count)]
    return [*made, material.TEXT[1000:1200], "", " "]


def split(expression):
    cut = pre_tokenizers.Split(Regex(expression), "isolated", invert=False)
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([cut, as_bytes])


def plain():
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


SPLITS = {
    "GPT-2": plain(),
    "SmolLM": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain()]),
    **{f"expression {i}": split(it) for i, it in enumerate(sorted(WORDS))},
    "prefixed": pre_tokenizers.ByteLevel(add_prefix_space=True),
    "other": split(r"\w+ \w+|\s+|[^\s\w]+"),
}
TOKENS = {
    "none": [],
    "some": ["<b>", "<bb>"],
    "greedy": [AddedToken("<b>", lstrip=True, rstrip=True, single_word=True), "the word"],
}
AROUND = {"none": None, "begin": "<b> $A", "both": "<b> $A <|end|>", "other": "$A <b>"}


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("splits", SPLITS)
def test_completions_begin_where_prompts_alone_end(splits, tokens, around, monkeypatch):
    tokenizer = material.tokenizer()
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = SPLITS[splits]
    tokenizer.add_tokens([*TOKENS[tokens], "<b>"])
    if AROUND[around] is not None:
        special = [(it, tokenizer.convert_tokens_to_ids(it)) for it in ("<b>", "<|end|>")]
        backend.post_processor = processors.TemplateProcessing(AROUND[around], None, special)
    rows = [(text[:at], text[at:]) for text in texts(25) for at in range(len(text) + 1)]
    alone = list(encode(tokenizer, (prompt for prompt, _ in rows), goes_on=True))
    whole = list(encode(tokenizer, (prompt + completion for prompt, completion in rows)))
    expected = [
        (list(ids), prompts.agreeing(prompt, ids), len(prompt))
        for prompt, ids in zip(alone, whole, strict=True)
    ]
    slow = []
    one_by_one = prompts._one_by_one
    monkeypatch.setattr(
        prompts, "_one_by_one", lambda *given: slow.append(given) or one_by_one(*given)
    )
    counted = []
    found = [
        (list(ids), *rest) for ids, *rest in encode_completions(tokenizer, rows, counted.append)
    ]
    assert found == expected
    assert sum(counted) == sum(2 * len(prompt) + len(completion) for prompt, completion in rows)
    if splits in ("prefixed", "other") or tokens == "greedy" or around == "other":
        assert slow
    else:
        assert not slow


@pytest.mark.parametrize("split", ["plain", "prefixed"])
@pytest.mark.parametrize("ends", [False, True])
def test_an_end_of_text_token_in_a_prompt_is_not_trained_on(split, ends):
    tokenizer = material.tokenizer()
    end, number = tokenizer.eos_token, tokenizer.eos_token_id
    backend = tokenizer.backend_tokenizer
    if split == "prefixed":  # of which every prompt is tokenized alone
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    prompt = tokenizer(f"Is it?{end}")["input_ids"]
    if ends:
        backend.post_processor = processors.TemplateProcessing(f"$A {end}", None, [(end, number)])
    rows = [{"prompt": f"Is it?{end}", "completion": " It is."}]
    shown = show_example(tokenize(rows, tokenizer), tokenizer)
    assert shown.strip("[ ") == f"Is it?{end}] It is.{end}"
    alone = tokenize([{"prompt": rows[0]["prompt"]}], tokenizer, prompts=True)
    assert alone[0]["input_ids"].tolist() == prompt

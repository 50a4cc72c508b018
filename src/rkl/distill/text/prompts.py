"""Prompts with their completions as tokens, and how many of these the prompt alone has too.

A byte-level tokenizer cuts a text into words from left to right, by an expression that looks no
further back than a word's beginning, and each word into tokens by itself. One that begins with a
space between two letters begins there whatever follows. So of a prompt only what is behind the
last such place is tokenized alone. Other tokenizers are given every prompt alone.
"""

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerBase

from rkl.distill.text.encoding import (
    MAX_BATCH_CHARACTERS,
    Advance,
    batches,
    encode,
    encode_without_places,
    leaves_all_to_its_backend,
    special_tokens,
)

_LAST_WORD = re.compile(r".*[A-Za-z](?= [A-Za-z])", re.DOTALL)
_CONTRACTED = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
WORDS = {_CONTRACTED + digits + _REST for digits in (r"|\p{N}{1,3}", r"|\p{N}")}  # Llama 3, Qwen 2

Placed = tuple[Sequence[int], int, int]


def encode_completions(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[tuple[str, str]], advance: Advance
) -> Iterator[Placed]:
    """The tokens of each prompt with its completion, and where the completion begins.

    Args:
        tokenizer: Any.
        rows: Prompts and completions.
        advance: Called with the number of characters that are done.

    Returns:
        The tokens, as :func:`rkl.distill.text.encoding.encode` gives them; how many of them, from
        the first on, the prompt alone has too; how many tokens the prompt alone has.
    """
    sizes = _bytes_of_tokens(tokenizer)
    around = None if sizes is None else special_tokens(tokenizer, "a")
    if around is not None and around[1] not in ([], [tokenizer.eos_token_id]):
        around = None
    done = 0
    for texts in batches(prompt + completion for prompt, completion in rows):
        some = rows[done : done + len(texts)]
        done += len(texts)
        if around is not None and sum(map(len, texts)) <= MAX_BATCH_CHARACTERS:
            yield from _by_words(tokenizer, [it for it, _ in some], texts, sizes, around)
        else:
            yield from _one_by_one(tokenizer, some)
        advance(sum(len(prompt) for prompt, _ in some) + sum(map(len, texts)))


def _one_by_one(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[tuple[str, str]]
) -> Iterator[Placed]:
    prompts = encode(tokenizer, (prompt for prompt, _ in rows), goes_on=True)
    whole = encode(tokenizer, (prompt + completion for prompt, completion in rows))
    for prompt, ids in zip(prompts, whole, strict=True):
        yield ids, agreeing(prompt, ids), len(prompt)


def _by_words(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    texts: Sequence[str],
    sizes: Any,
    around: tuple[list[int], list[int]],
) -> Iterator[Placed]:
    before, behind = around
    ends = [tokenizer.eos_token_id]

    def full(ids: list[int]) -> list[int]:
        ids = [*before, *ids] if before else ids
        return ids[:-1] if not behind and ids[-1:] == ends else ids

    whole = encode_without_places(tokenizer, texts, special=False)
    starts = [match.end() if (match := _LAST_WORD.match(it)) else 0 for it in prompts]
    last = [prompt[start:] for prompt, start in zip(prompts, starts, strict=True)]
    rest = encode_without_places(tokenizer, last, special=False)
    for prompt, start, text, ids, tail in zip(prompts, starts, texts, whole, rest, strict=True):
        places = np.cumsum(sizes[ids])
        size = len(prompt[:start].encode())
        first = int(np.searchsorted(places, size)) + 1 if size else 0
        known = places.size and places[-1] == len(text.encode())
        if size and not (known and places[first - 1] == size):
            yield from _one_by_one(tokenizer, [(prompt, text[len(prompt) :])])
            continue
        alone = [*before, *ids[:first], *tail]
        yield full(ids), agreeing(alone, full(ids)), len(alone)


def _bytes_of_tokens(tokenizer: PreTrainedTokenizerBase) -> Any:
    """Bytes per token; None unless texts are cut as the module says."""
    if not leaves_all_to_its_backend(tokenizer) or getattr(tokenizer, "split_special_tokens", 0):
        return None
    backend: Any = tokenizer.backend_tokenizer
    model, added = backend.model, backend.get_added_tokens_decoder()
    if not isinstance(model, BPE) or model.dropout or backend.normalizer is not None:
        return None
    if model.continuing_subword_prefix or model.end_of_word_suffix or model.byte_fallback:
        return None
    if not _begins_words_with_spaces(backend.pre_tokenizer):
        return None
    if any(it.lstrip or it.rstrip or it.single_word or " " in it.content for it in added.values()):
        return None
    vocabulary = backend.get_vocab(True)
    sizes = np.zeros(max(vocabulary.values(), default=0) + 1, np.int64)
    for token, number in vocabulary.items():  # each byte is written as one character
        sizes[number] = len(token)
    for number, token in added.items():
        sizes[number] = len(token.content.encode())
    return sizes


def _begins_words_with_spaces(splits: Any) -> bool:
    """True for bytes cut by the expression of GPT-2, Llama 3 or Qwen 2, single digits apart."""
    if splits is None:
        return False
    state = json.loads(splits.__getstate__())
    parts = state["pretokenizers"] if state["type"] == "Sequence" else [state]
    parts = [it for it in parts if not (it["type"] == "Digits" and it["individual_digits"])]
    to_bytes = parts[-1] if parts else {}
    if to_bytes.get("type") != "ByteLevel" or to_bytes["add_prefix_space"]:
        return False
    if to_bytes["use_regex"]:
        return len(parts) == 1
    if len(parts) != 2 or parts[0]["type"] != "Split":
        return False
    known = parts[0]["pattern"].get("Regex") in WORDS
    return known and parts[0]["behavior"] == "Isolated" and not parts[0]["invert"]


def agreeing(ids: Sequence[int], others: Sequence[int]) -> int:
    """Length of the common prefix of two sequences of tokens."""
    if ids == others[: len(ids)]:
        return len(ids)
    pairs = zip(ids, others, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))

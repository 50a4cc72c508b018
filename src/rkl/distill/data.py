"""Rows of text into blocks of tokens: which are read, which of them are trained on.

A row is one of three, told apart by its columns:

=========================  ==================================================  ============
columns                    meaning                                             trained on
=========================  ==================================================  ============
``text``                   plain text                                          all of it
``prompt, completion``     two texts, or two lists of messages                 completion
``messages``               a chat, put into words by the tokenizer's template  assistant
=========================  ==================================================  ============
"""

import bisect
import itertools
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from rkl.distill.limits import check_count
from rkl.distill.sources import Row, kind_of

IGNORED = -100  # the label of a token that is not trained on, in all of transformers
_AT_ONCE = 1000  # rows given to the tokenizer in one call
_MARKS_TURNS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_BLANK_LINE = re.compile(r"\n\s*\n")
_SHORTEST_PASSAGE = 40  # characters; a shorter one is a heading, and recurs without meaning

Message = dict[str, Any]
Example = tuple[list[int], list[bool]]  # tokens, and which of them are trained on


@dataclass(frozen=True)
class TokenDataset(Dataset):
    """Blocks of tokens, map-style: ``{"input_ids", "labels"}``, the label −100 where untrained.

    The first token of a block is never trained on: nothing stands before it to predict it from.

    Args:
        kind: What its rows were: "text", "completion" or "messages".
        tokens: The tokens of all blocks, one after another.
        trained: Which of them are trained on.
        bounds: Where each block begins, and where the last one ends.
        rows: Number of rows it was made of.
        cut_tokens: Tokens left out because their rows were longer than a block.
    """

    kind: str
    tokens: Tensor
    trained: Tensor
    bounds: Tensor
    rows: int
    cut_tokens: int

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index must be below {len(self)}; got {index}.")
        index %= len(self)
        block = slice(int(self.bounds[index]), int(self.bounds[index + 1]))
        tokens = self.tokens[block].long()
        return {"input_ids": tokens, "labels": tokens.where(self.trained[block], IGNORED)}

    @property
    def trained_tokens(self) -> int:
        """Number of tokens trained on in one pass."""
        return int(self.trained.sum())

    def __str__(self) -> str:
        lost = f"; {self.cut_tokens:,} tokens cut off" if self.cut_tokens else ""
        return (
            f"{self.rows:,} rows of {self.kind} in {len(self):,} blocks: {len(self.tokens):,} "
            f"tokens, {self.trained_tokens:,} of them trained on{lost}"
        )


def tokenize(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int = 1024,
    packing: bool = True,
) -> TokenDataset:
    """Rows as blocks of at most ``max_length`` tokens, the same ones every time.

    Plain text gets an end-of-text token behind each row and loses nothing: rows longer than a
    block are cut into several. Packed, all rows are one stream cut every ``max_length`` tokens.
    A row with a prompt stays whole, so that no completion loses its prompt, and one longer than
    a block loses its end. Packed, such rows share blocks by best fit. Tokens of a block attend
    to all that stands before them, an earlier row included; teacher and student do so alike.

    Completions and assistant turns alone are trained on: -100 elsewhere. A chat template with
    generation blocks says itself which tokens are the assistant's. Otherwise they are found by
    rendering the chat up to each turn, and a template for which these renderings do not begin
    one another is refused.

    Args:
        rows: What :func:`rkl.distill.sources.read_rows` gave.
        tokenizer: The student's, which is the teacher's.
        max_length: Longest block, in tokens, at least 2.
        packing: Whether rows share blocks.

    Raises:
        ValueError: If no token would be trained on, or the tokenizer lacks what the rows need.
    """
    check_count("max_length", max_length, at_least=2)
    if not rows:
        raise ValueError("data has no rows.")
    kind = kind_of(rows[0], "the first row")
    examples = _EXAMPLES[kind](rows, tokenizer)
    if kind == "text":
        blocks, cut = _stream(examples, max_length, packing), 0
    else:
        whole = list(examples)
        blocks = [(ids[:max_length], trained[:max_length]) for ids, trained in whole]
        cut = sum(len(ids) for ids, _ in whole) - sum(len(ids) for ids, _ in blocks)
        _warn_of_cut(whole, max_length, cut)
        blocks = [block for block in blocks if any(block[1][1:])]
        blocks = _best_fit(blocks, max_length) if packing else blocks
    return _dataset(kind, blocks, len(rows), cut, max_length)


def show_example(
    dataset: Dataset | Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    index: int = 0,
) -> str:
    """A block as text, what is not trained on between brackets."""
    example = dataset[index]
    pairs = zip(list(example["input_ids"]), list(example["labels"]), strict=True)
    parts = []
    for trained, stretch in itertools.groupby(pairs, lambda pair: int(pair[1]) != IGNORED):
        text = str(tokenizer.decode([int(token) for token, _ in stretch]))
        parts.append(text if trained else f"[{text}]")
    return "".join(parts)


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """At most so many of the items, evenly spaced, the first among them."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def passages(rows: Iterable[Row]) -> Iterator[str | Row]:
    """What a run notes down of its rows, to tell later whether it was trained on some of them.

    A row with a prompt, whole; of a text its paragraphs, so that a file is known again by its
    parts. Paragraphs below 40 characters count only where a text has no other.
    """
    for row in rows:
        if "text" not in row:
            yield row
            continue
        paragraphs = [part.strip() for part in _BLANK_LINE.split(row["text"])]
        long = [part for part in paragraphs if len(part) >= _SHORTEST_PASSAGE]
        yield from long or [row["text"].strip()]


def _dataset(kind: str, blocks: Sequence[Example], rows: int, cut: int, max_length: int):
    if not any(any(trained[1:]) for _, trained in blocks):
        raise ValueError(
            f"data has no trained tokens: in none of {rows:,} rows of {kind} is there anything "
            f"to predict within max_length={max_length} tokens."
        )
    sizes = torch.tensor([0, *(len(ids) for ids, _ in blocks)])
    trained = torch.tensor([bit for _, bits in blocks for bit in [False, *bits[1:]]])
    tokens = torch.tensor([token for ids, _ in blocks for token in ids], dtype=torch.int32)
    return TokenDataset(kind, tokens, trained, sizes.cumsum(0), rows, cut)


def _stream(examples: Iterator[Example], max_length: int, packing: bool) -> list[Example]:
    """Blocks of plain text; a last one of a single token would have nothing to predict."""
    texts = [ids for ids, _ in examples]
    texts = [list(itertools.chain(*texts))] if packing else texts
    pieces = [ids[i : i + max_length] for ids in texts for i in range(0, len(ids), max_length)]
    return [(ids, [True] * len(ids)) for ids in pieces if len(ids) > 1]


def _warn_of_cut(examples: Sequence[Example], max_length: int, cut: int) -> None:
    if cut:
        long = sum(len(ids) > max_length for ids, _ in examples)
        warnings.warn(
            f"{long:,} of {len(examples):,} rows are longer than max_length={max_length} and "
            f"lose their end, {cut:,} tokens in all.",
            stacklevel=3,
        )


def _best_fit(rows: Sequence[Example], max_length: int) -> list[Example]:
    """Rows put into blocks, the longest first, each where it leaves the least room."""
    blocks: list[Example] = []
    room: list[tuple[int, int]] = []  # (tokens left, block), sorted
    for ids, trained in sorted(rows, key=lambda row: -len(row[0])):
        place = bisect.bisect_left(room, (len(ids), -1))
        if place == len(room):
            block, left = len(blocks), max_length
            blocks.append(([], []))
        else:
            left, block = room.pop(place)
        blocks[block][0].extend(ids)
        blocks[block][1].extend([False, *trained[1:]])  # not predicted from another row
        bisect.insort(room, (left - len(ids), block))
    return blocks


def _text_examples(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> Iterator[Example]:
    end = end_of_text(tokenizer)
    for ids in encode(tokenizer, (row["text"] for row in rows)):
        yield [*ids, end], [True] * (len(ids) + 1)


def _completion_examples(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase
) -> Iterator[Example]:
    if not isinstance(rows[0]["prompt"], str):
        for number, row in enumerate(rows, 1):
            chat = [*row["prompt"], *row["completion"]]
            yield _chat_by_turns(chat, tokenizer, f"row {number}", len(row["prompt"]))
        return
    end, merged = end_of_text(tokenizer), 0
    prompts = encode(tokenizer, (row["prompt"] for row in rows))
    both = encode(tokenizer, (row["prompt"] + row["completion"] for row in rows))
    for prompt, ids in zip(prompts, both, strict=True):
        known = _agreeing(prompt, ids)
        merged += known < len(prompt)
        yield [*ids, end], [place >= known for place in range(len(ids) + 1)]
    if merged:
        warnings.warn(
            f"In {merged:,} of {len(rows):,} rows the tokens of the prompt change once the "
            "completion follows it; they are trained on from the first that changes. End the "
            "prompts, or begin the completions, where a token ends.",
            stacklevel=4,
        )


def _chat_examples(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> Iterator[Example]:
    marked = _MARKS_TURNS.search(_template(tokenizer)) and tokenizer.is_fast
    for number, row in enumerate(rows, 1):
        one = _chat_by_marks if marked else _chat_by_turns
        yield one(row["messages"], tokenizer, f"row {number}")


_EXAMPLES = {
    "text": _text_examples,
    "completion": _completion_examples,
    "messages": _chat_examples,
}


def _chat_by_marks(
    messages: list[Message], tokenizer: PreTrainedTokenizerBase, place: str
) -> Example:
    """A chat whose template marks what the assistant says."""
    try:
        encoded: Any = tokenizer.apply_chat_template(
            messages, return_assistant_tokens_mask=True, return_dict=True
        )
    except TemplateError as error:
        raise ValueError(f"{place}: the chat template refuses it: {error}.") from None
    trained = [bool(bit) for bit in encoded["assistant_masks"]]
    if not any(trained) and any(message["role"] == "assistant" for message in messages):
        raise ValueError(
            f"{place}: the chat template has generation blocks, but marks none of the "
            "assistant's turns with them."
        )
    return list(encoded["input_ids"]), trained


def _chat_by_turns(
    messages: list[Message], tokenizer: PreTrainedTokenizerBase, place: str, since: int = 0
) -> Example:
    """A chat whose assistant's turns, from message ``since``, are found by what they add to it."""
    whole = render(messages, tokenizer, place)
    (ids,) = encode(tokenizer, [whole], special=False)
    trained = [False] * len(ids)
    for turn, message in enumerate(messages):
        if turn < since or message["role"] != "assistant":
            continue
        if not turn:
            raise ValueError(
                f"{place}: the chat begins with the assistant, and the chat template has no "
                "generation blocks to say where that turn starts."
            )
        before = render(messages[:turn], tokenizer, place, reply=True)
        until = render(messages[: turn + 1], tokenizer, place)
        if not (until.startswith(before) and whole.startswith(until)):
            raise ValueError(
                f"{place}: the chat template renders message {turn + 1} differently when others "
                "follow, so what the assistant said cannot be told. Give a template with "
                "{% generation %} blocks, or a chat with one assistant turn, the last."
            )
        start, stop = (
            _agreeing(part, ids) for part in encode(tokenizer, [before, until], special=False)
        )
        trained[start:stop] = [True] * (stop - start)
    return ids, trained


def render(
    messages: list[Message],
    tokenizer: PreTrainedTokenizerBase,
    place: str,
    reply: bool = False,
) -> str:
    """A chat in the words of the tokenizer's template, up to where a reply begins if wanted."""
    _template(tokenizer)
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=reply)
    except TemplateError as error:
        raise ValueError(f"{place}: the chat template refuses it: {error}.") from None
    return str(text)


def _template(tokenizer: PreTrainedTokenizerBase) -> str:
    if not tokenizer.chat_template:
        raise ValueError(
            "The tokenizer has no chat template, which rows of messages need: set "
            "tokenizer.chat_template, or give rows with text or with prompt and completion."
        )
    return str(tokenizer.get_chat_template())


def end_of_text(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends a row; a tokenizer must have one."""
    end: Any = tokenizer.eos_token_id
    if end is None:
        raise ValueError(
            "The tokenizer has no EOS token to put behind each row, without which a student "
            "would not learn to stop: set tokenizer.eos_token."
        )
    return end


def encode(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], *, special: bool = True
) -> Iterator[list[int]]:
    """The tokens of texts, without the end-of-text token that some tokenizers put behind them.

    Args:
        tokenizer: Any.
        texts: Taken a batch at a time.
        special: Whether the tokenizer puts its special tokens, which a chat in words has already.
    """
    texts, end = iter(texts), [tokenizer.eos_token_id]
    while batch := list(itertools.islice(texts, _AT_ONCE)):
        # verbose: no advice on texts longer than the model's context; they are cut below
        encoded: Any = tokenizer(
            batch, add_special_tokens=special, return_attention_mask=False, verbose=False
        )
        for ids in encoded["input_ids"]:
            yield ids[:-1] if special and ids[-1:] == end else ids


def _agreeing(ids: Sequence[int], others: Sequence[int]) -> int:
    """How many tokens two sequences have in common before they part."""
    pairs = zip(ids, others, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))

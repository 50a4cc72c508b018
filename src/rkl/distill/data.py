"""Rows of text into blocks of tokens: which are read, which of them are trained on.

A row is one of three, told apart by its columns:

=========================  ==================================================  ============
columns                    meaning                                             trained on
=========================  ==================================================  ============
``text``                   plain text                                          all of it
``prompt, completion``     two texts, or two lists of messages                 completion
``messages``               a chat, put into words by the tokenizer's template  assistant
=========================  ==================================================  ============

Messages may come with ``tools``, which the template is given.
"""

import bisect
import collections
import itertools
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from rkl.distill.chats import ChatTemplate, NothingToTrainOnError, Rendered
from rkl.distill.limits import check_count
from rkl.distill.sources import TOOLS, Row, Rows, kind_of, read_rows

IGNORED = -100  # the label of a token that is not trained on, in all of transformers
_AT_ONCE = 1000  # rows given to the tokenizer in one call
_BLANK_LINE = re.compile(r"\n\s*\n")
SHORTEST_PASSAGE = 40  # characters; a shorter one is a heading, and recurs without meaning

_PLACES = 3  # of rows left out that are named

Example = tuple[list[int], list[bool]]  # tokens, and which of them are trained on
Numbered = Iterator[tuple[int, Example]]  # examples, each with the index of its row


class LeftOut:
    """Rows that give nothing to train on, by the reason.

    Args:
        rows: All rows, for their places.
    """

    def __init__(self, rows: Rows):
        self._rows = rows
        self._reasons: dict[str, tuple[list[int], dict[str, None]]] = {}

    def add(self, row: int, reason: str, detail: Iterable[str] = ()) -> None:
        """Count a row."""
        rows, details = self._reasons.setdefault(reason, ([], {}))
        rows.append(row)
        details |= dict.fromkeys(detail)

    def __len__(self) -> int:
        return sum(len(rows) for rows, _ in self._reasons.values())

    def __str__(self) -> str:
        return "; ".join(self._told(reason) for reason in self._reasons)

    def _told(self, reason: str) -> str:
        rows, details = self._reasons[reason]
        found = f" (found: {', '.join([*details][:5])})" if details else ""
        places = ", ".join(self._rows.place(row) for row in rows[:_PLACES])
        more = f" and {len(rows) - _PLACES:,} more" if len(rows) > _PLACES else ""
        return f"{reason}{found}: {places}{more}"


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
        left_out: Number of rows that gave nothing to train on.
        reasons: Why they did not, in words.
    """

    kind: str
    tokens: Tensor
    trained: Tensor
    bounds: Tensor
    rows: int
    cut_tokens: int
    left_out: int = 0
    reasons: str = ""

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
        if self.left_out:
            lost += f"; {self.left_out:,} rows left out ({self.reasons})"
        used = f"{self.rows - self.left_out:,} of " if self.left_out else ""
        return (
            f"{used}{self.rows:,} rows of {self.kind} in {len(self):,} blocks: "
            f"{len(self.tokens):,} tokens, {self.trained_tokens:,} of them trained on{lost}"
        )


def tokenize(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int = 1024,
    packing: bool = True,
    train_on: Literal["all", "last"] = "all",
) -> TokenDataset:
    """Rows as blocks of at most ``max_length`` tokens, the same ones every time.

    Plain text gets an end-of-text token behind each row and loses nothing: rows longer than a
    block are cut into several. Packed, all rows are one stream cut every ``max_length`` tokens.
    A row with a prompt stays whole, so that no completion loses its prompt, and one longer than
    a block loses its end. Packed, such rows share blocks by best fit. Tokens of a block attend
    to all that stands before them, an earlier row included; teacher and student do so alike.

    Completions and assistant turns alone are trained on: -100 elsewhere. Each turn is trained on
    as the chat template renders it when it is said; a chat whose rendering changes afterwards
    gives several texts (:mod:`rkl.distill.chats`). A template with generation blocks says itself
    which tokens are the assistant's. Rows with nothing to train on are left out and warned of.

    Args:
        rows: What :func:`rkl.distill.sources.read_rows` gave.
        tokenizer: The student's, which is the teacher's.
        max_length: Longest block, in tokens, at least 2.
        packing: Whether rows share blocks.
        train_on: Of a chat, "all" turns of the assistant or the "last".

    Raises:
        ValueError: If no token would be trained on, or the tokenizer lacks what the rows need.
    """
    check_count("max_length", max_length, at_least=2)
    if train_on not in ("all", "last"):
        raise ValueError(f"train_on must be all or last; got {train_on!r}.")
    if not len(rows):
        raise ValueError("data has no rows.")
    rows = read_rows(rows)
    kind = kind_of(rows[0], rows.place(0))
    left_out, cut = LeftOut(rows), 0
    if kind == "text":
        texts = list(_text_examples(rows, tokenizer, left_out))
        blocks = _stream(texts, max_length, packing)
        _warn_of_losses((), max_length, 0, rows, left_out if blocks else LeftOut(rows))
    else:
        whole = list(
            _chat_examples(rows, tokenizer, left_out, train_on)
            if holds_chats(rows)
            else _completion_examples(rows, tokenizer)
        )
        blocks = _shortened(whole, max_length, left_out)
        cut = sum(max(len(ids) - max_length, 0) for _, (ids, _) in whole)
        told = left_out if blocks else LeftOut(rows)
        _warn_of_losses([ids for _, (ids, _) in whole], max_length, cut, rows, told)
        blocks = _best_fit(blocks, max_length) if packing else blocks
    return _dataset(kind, blocks, rows, cut, left_out)


class NoTrainedTokensError(ValueError):
    """No row of some data gives anything to train on."""


def holds_chats(rows: Sequence[Row]) -> bool:
    """True if rows are put into words by a chat template."""
    return "messages" in rows[0] or not isinstance(rows[0].get("prompt", ""), str)


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
        long = [part for part in paragraphs if len(part) >= SHORTEST_PASSAGE]
        yield from long or [row["text"].strip()]


def _dataset(kind: str, blocks: Sequence[Example], rows: Rows, cut: int, left_out: LeftOut):
    if not blocks:
        raise NoTrainedTokensError(
            f"data has no trained tokens: in none of {len(rows):,} rows of {kind} is there "
            f"anything to train on. {left_out}."
        )
    sizes = torch.tensor([0, *(len(ids) for ids, _ in blocks)])
    trained = torch.tensor([bit for _, bits in blocks for bit in [False, *bits[1:]]])
    tokens = torch.tensor([token for ids, _ in blocks for token in ids], dtype=torch.int32)
    return TokenDataset(
        kind, tokens, trained, sizes.cumsum(0), len(rows), cut, len(left_out), str(left_out)
    )


def _stream(examples: list[tuple[int, Example]], max_length: int, packing: bool) -> list[Example]:
    """Blocks of plain text; a last one of a single token would have nothing to predict."""
    texts = [ids for _, (ids, _) in examples]
    if packing:
        texts = [list(itertools.chain(*texts))]
    pieces = [ids[i : i + max_length] for ids in texts for i in range(0, len(ids), max_length)]
    return [(ids, [True] * len(ids)) for ids in pieces if len(ids) > 1]


def _shortened(
    examples: list[tuple[int, Example]], max_length: int, left_out: LeftOut
) -> list[Example]:
    """The examples without what is beyond a block, and without those that lose all by that."""
    kept, lost = [], {}
    for row, (ids, trained) in examples:
        if any(trained[1:max_length]):
            kept.append((row, (ids[:max_length], trained[:max_length])))
        else:
            lost[row] = any(trained[1:])
    rows = {row for row, _ in kept}
    for row, cut in lost.items():
        if row not in rows:
            longer = f"no answer begins within max_length={max_length} tokens"
            left_out.add(row, longer if cut else "the answer is empty")
    return [example for _, example in kept]


def _warn_of_losses(
    examples: Sequence[list[int]], max_length: int, cut: int, rows: Rows, left_out: LeftOut
) -> None:
    """Warn of what is not trained on: ends of rows, and rows."""
    lost = []
    if cut:
        long = sum(len(ids) > max_length for ids in examples)
        lost.append(
            f"{long:,} of {len(examples):,} rows are longer than max_length={max_length} and "
            f"lose their end, {cut:,} tokens in all."
        )
    if len(left_out):
        lost.append(
            f"{len(left_out):,} of {len(rows):,} rows have nothing to train on and are left out: "
            f"{left_out}."
        )
    if lost:
        warnings.warn(" ".join(lost), stacklevel=3)


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


def _text_examples(rows: Rows, tokenizer: PreTrainedTokenizerBase, left_out: LeftOut) -> Numbered:
    end, encoded = end_of_text(tokenizer), encode(tokenizer, (row["text"] for row in rows))
    _warn_of_doubled_beginnings([row["text"] for row in rows], tokenizer)
    for row, ids in enumerate(encoded):
        if rows[row]["text"]:
            yield row, ([*ids, end], [True] * (len(ids) + 1))
        else:
            left_out.add(row, "the text is empty")


def _completion_examples(rows: Rows, tokenizer: PreTrainedTokenizerBase) -> Numbered:
    end, merged = end_of_text(tokenizer), 0
    _warn_of_doubled_beginnings([row["prompt"] for row in rows], tokenizer)
    prompts = encode(tokenizer, (row["prompt"] for row in rows))
    both = encode(tokenizer, (row["prompt"] + row["completion"] for row in rows))
    for row, (prompt, ids) in enumerate(zip(prompts, both, strict=True)):
        known = _agreeing(prompt, ids)
        merged += known < len(prompt)
        yield row, ([*ids, end], [place >= known for place in range(len(ids) + 1)])
    if merged:
        warnings.warn(
            f"In {merged:,} of {len(rows):,} rows the tokens of the prompt change once the "
            "completion follows it; they are trained on from the first that changes. End the "
            "prompts, or begin the completions, where a token ends.",
            stacklevel=4,
        )


def _warn_of_doubled_beginnings(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> None:
    """Warn of texts that begin with what the tokenizer, or a chat template, puts there."""
    begin = str(tokenizer.bos_token or "")
    (nothing,) = encode(tokenizer, [""])
    adds = bool(begin) and nothing[:1] == [tokenizer.bos_token_id]
    if adds and (count := sum(text.startswith(begin) for text in texts)):
        warnings.warn(
            f"{count:,} of {len(texts):,} rows begin with {begin}, which the tokenizer puts in "
            "front of every row: it is there twice. Take it out of the text.",
            stacklevel=5,
        )
        return
    special = [str(it) for it in tokenizer.added_tokens_decoder.values() if it.special]
    opening = [it for it in special if it not in (tokenizer.eos_token, begin)]
    if tokenizer.chat_template and opening:
        counts = collections.Counter(
            next((it for it in opening if text.startswith(it)), "") for text in texts
        )
        del counts[""]
        if counts:
            token, count = counts.most_common(1)[0]
            warnings.warn(
                f"{count:,} of {len(texts):,} rows begin with {token}, as if a chat template had "
                "written them. Such text is trained on as it is, questions too; rows of messages "
                "train on the answers alone.",
                stacklevel=5,
            )


def _chat_examples(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    left_out: LeftOut,
    train_on: str,
) -> Numbered:
    template = ChatTemplate(tokenizer)
    if not template.ends_turns:
        warnings.warn(
            "The chat template writes nothing behind what the assistant says, so that a student "
            "does not learn from it where to stop.",
            stacklevel=4,
        )
    rendered = _rendered(rows, template, left_out, train_on)
    while batch := list(itertools.islice(rendered, _AT_ONCE)):
        examples = _encode_answers(tokenizer, [text for _, text in batch])
        for (row, text), (ids, trained) in zip(batch, examples, strict=True):
            if template.marks:
                ids, trained = _marked(template, text, trained, rows.place(row))
            yield row, (ids, trained)
    if template.ignored:
        warnings.warn(
            f"The chat template does not write {', '.join(sorted(template.ignored))}, which rows "
            "have: the student does not see it.",
            stacklevel=4,
        )


def _rendered(
    rows: Rows, template: ChatTemplate, left_out: LeftOut, train_on: str
) -> Iterator[tuple[int, Rendered]]:
    for number, row in enumerate(rows):
        split = "prompt" in row
        messages = [*row["prompt"], *row["completion"]] if split else row["messages"]
        how = {"tools": row.get(TOOLS), "since": len(row["prompt"]) if split else 0}
        try:
            texts = template.answers(messages, rows.place(number), last=train_on == "last", **how)
        except NothingToTrainOnError as nothing:
            left_out.add(number, nothing.reason, nothing.detail)
            continue
        yield from ((number, text) for text in texts)


def _encode_answers(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[Rendered]
) -> Iterator[Example]:
    """The tokens of texts, and which of them belong to answers.

    A token that begins before an answer and ends in it is part of it; one that begins in it and
    ends behind it is not. A special token belongs where it begins, for some take the spaces that
    follow with them.
    """
    if not tokenizer.is_fast:
        yield from (_encode_slowly(tokenizer, text) for text in texts)
        return
    encoded: Any = tokenizer(
        [text.text for text in texts],
        add_special_tokens=False,
        return_attention_mask=False,
        return_offsets_mapping=True,
        verbose=False,
    )
    special = tokenizer.added_tokens_decoder
    for text, ids, offsets in zip(
        texts, encoded["input_ids"], encoded["offset_mapping"], strict=True
    ):
        places = [
            begin if token in special else end - 1
            for token, (begin, end) in zip(ids, offsets, strict=True)
        ]
        trained = [False] * len(ids)
        for start, stop in text.answers:
            first, behind = (bisect.bisect_left(places, place) for place in (start, stop))
            trained[first:behind] = [True] * (behind - first)
        yield list(ids), trained


def _encode_slowly(tokenizer: PreTrainedTokenizerBase, text: Rendered) -> Example:
    """The same with a tokenizer that does not tell where its tokens stand."""
    (ids,) = encode(tokenizer, [text.text], special=False)
    trained = [False] * len(ids)
    for span in text.answers:
        parts = encode(tokenizer, (text.text[:place] for place in span), special=False)
        start, stop = (_agreeing(part, ids) for part in parts)
        trained[start:stop] = [True] * (stop - start)
    return ids, trained


def _marked(template: ChatTemplate, text: Rendered, trained: list[bool], place: str) -> Example:
    """What the generation blocks of a template mark, of the answers that are trained on."""
    encoded = template.encode_with_marks(text, place)
    ids, marks = list(encoded["input_ids"]), [bool(it) for it in encoded["assistant_masks"]]
    if not any(marks):
        raise ValueError(
            f"{place}: the chat template has generation blocks, but marks none of the "
            "assistant's turns with them."
        )
    kept: list[bool] = []
    for marked, group in itertools.groupby(enumerate(marks), lambda it: it[1]):
        run = [index for index, _ in group]
        wanted = marked and (len(ids) != len(trained) or any(trained[it] for it in run))
        kept += [wanted] * len(run)
    return ids, kept


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

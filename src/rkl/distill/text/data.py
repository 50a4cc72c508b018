"""Rows of text into blocks of tokens: which are read, which of them are trained on.

A row is one of three, told apart by its columns:

=========================  ==================================================  ============
columns                    meaning                                             trained on
=========================  ==================================================  ============
``text``                   plain text                                          all of it
``prompt, completion``     two texts, or two lists of messages                 completion
``messages``               a chat, put into words by the tokenizer's template  assistant
``prompt``                 a text, or a list of messages, to reply to          the reply
=========================  ==================================================  ============

Rows with a prompt may have a ``teacher_prompt``, which the teacher reads in its place, or a
``privileged_context``, which it reads behind the prompt. Messages may come with ``tools``, which
the template is given. Rows with a prompt alone are for training on the student's own text.
"""

import bisect
import collections
import heapq
import itertools
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from rkl.checks import warn
from rkl.distill.limits import check_count
from rkl.distill.text import token_cache
from rkl.distill.text.chats import ChatTemplate, NothingToTrainOnError, Rendered
from rkl.distill.text.encoding import Advance, encode, encode_batch, end_of_text
from rkl.distill.text.prompts import agreeing, encode_completions
from rkl.distill.text.sources import TEACHER_PROMPT, TOOLS, Row, Rows, Some, kind_of, read_rows
from rkl.runs.progress import Progress

IGNORED = -100  # the label of a token that is not trained on, in all of transformers
TEACHER_IDS, TEACHER_LABELS = "teacher_input_ids", "teacher_labels"  # columns: what it reads
_CHATS_AT_ONCE = 200  # given to the tokenizer in one call
_BLANK_LINE = re.compile(r"\n\s*\n")
SHORTEST_PASSAGE = 40  # characters; a shorter one is a heading, and recurs without meaning

_PLACES = 3  # of rows left out that are named
MANY_CHARACTERS, MANY_CHATS = 2**21, 2000  # from which on progress is shown, tokens kept

Example = tuple[Sequence[int], bytes | bytearray]  # tokens, and 1 where one is trained on
Span = tuple[int, int]  # of tokens of the examples: the first, and the one behind the last


class Examples:
    """The tokens of many texts, one after another, and which of them are trained on.

    Attributes:
        rows: The index of the row of each text.
        bounds: Where each text begins in ``tokens``, and where the last one ends.
        tokens: The tokens of all.
        trained: For each token, 1 where it is trained on, else 0.
    """

    def __init__(self):
        self.rows, self.bounds = array("q"), array("q", [0])
        self.tokens, self.trained = array("i"), bytearray()

    def add(
        self, row: int, ids: Sequence[int], trained: bytes | bytearray, end: Sequence[int] = ()
    ) -> None:
        """Append a text, and what ends it."""
        self.rows.append(row)
        if isinstance(ids, list):
            self.tokens.fromlist(ids)  # faster than extend
        else:
            self.tokens.extend(ids)
        self.tokens.extend(end)
        self.trained += trained
        self.bounds.append(len(self.tokens))

    def row_at(self, token: int) -> int:
        """The index of the row that a token belongs to."""
        return self.rows[bisect.bisect_right(self.bounds, token) - 1]

    def spans(self) -> Iterator[Span]:
        """Start and end of each text."""
        return itertools.pairwise(self.bounds)


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
        kind: What its rows were: "text", "completion", "messages" or "prompt".
        tokens: The tokens of all blocks, one after another.
        trained: Which of them are trained on.
        bounds: Where each block begins, and where the last one ends.
        rows: Number of rows it was made of.
        cut_tokens: Tokens left out because their rows were longer than a block.
        left_out: Number of rows that gave nothing to train on.
        reasons: Why they did not, in words.
        begins: Which tokens begin a text; None where each block is one. Blocks then have
            ``position_ids`` that begin anew with each text, by which models keep texts apart.
        columns: What else each block has, by the name of the column; blocks are then of one
            text each.
    """

    kind: str
    tokens: Tensor
    trained: Tensor
    bounds: Tensor
    rows: int
    cut_tokens: int
    left_out: int = 0
    reasons: str = ""
    begins: Tensor | None = None
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index must be below {len(self)}; got {index}.")
        index %= len(self)
        block = slice(int(self.bounds[index]), int(self.bounds[index + 1]))
        tokens = self.tokens[block].long()
        row = {"input_ids": tokens, "labels": tokens.where(self.trained[block], IGNORED)}
        if self.begins is not None:
            place = torch.arange(len(tokens))
            row["position_ids"] = place - place.where(self.begins[block], 0).cummax(0).values
        return row | {name: values[index] for name, values in self.columns.items()}

    def unpacked(self) -> "TokenDataset":
        """The same with a block for each text, or each part of one that was cut.

        A part of a single token, from which nothing is predicted, is left out.
        """
        if self.begins is None:
            return self
        starts = self.begins.nonzero()[:, 0]
        ends = torch.cat([starts[1:], self.bounds[-1:]])
        long = ends - starts > 1
        kept = torch.repeat_interleave(long, ends - starts)
        bounds = torch.cat([starts.new_zeros(1), (ends - starts)[long].cumsum(0)])
        how = {"tokens": self.tokens[kept], "trained": self.trained[kept], "bounds": bounds}
        return replace(self, **how, begins=None)

    def sample(self, count: int) -> list[list[int]]:
        """The tokens of at most so many blocks, evenly spaced."""
        places = spread(range(len(self)), count)
        return [self[place]["input_ids"].tolist() for place in places]

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
    rows: Some,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int = 1024,
    packing: bool = True,
    train_on: Literal["all", "last"] = "all",
    prompts: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    column: str | None = None,
) -> TokenDataset:
    """Rows as blocks of at most ``max_length`` tokens, the same ones every time.

    Plain text gets an end-of-text token behind each row and loses nothing: rows longer than a
    block are cut into several. Packed, all rows are one stream cut every ``max_length`` tokens.
    A row with a prompt stays whole, so that no completion loses its prompt, and one longer than
    a block loses its end. Packed, such rows share blocks by best fit. Rows of one block have
    ``position_ids`` that begin anew, by which models of transformers keep them apart, and the
    first token of each is not trained on.

    Completions and assistant turns alone are trained on: -100 elsewhere. Each turn is trained on
    as the chat template renders the chat that ends with it; a chat whose rendering changes
    afterwards gives several texts. A template with generation blocks marks the assistant's
    tokens itself. Rows with nothing to train on are left out and warned
    of.

    Args:
        rows: Rows of text, of prompt and completion, or of messages, as a list of dicts, a data
            set, also a streamed one, or a data frame.
        tokenizer: The student's tokenizer.
        max_length: Longest block, in tokens, at least 2.
        packing: Whether rows share blocks.
        train_on: Of a chat, "all" turns of the assistant or the "last".
        prompts: Whether rows with a prompt alone are taken, which somebody will reply to.
        chat_template_kwargs: What else the chat template is called with.
        column: The column that names the teacher of each row, where there are several; blocks
            then have it too, and rows share none.

    Raises:
        ValueError: If no token would be trained on, or the tokenizer lacks what the rows need.
    """
    check_count("max_length", max_length, at_least=2)
    if train_on not in ("all", "last"):
        raise ValueError(f"train_on must be all or last; got {train_on!r}.")
    rows = read_rows(rows, column=column)
    if not rows:
        raise ValueError("data has no rows.")
    if kind_of(rows[0], rows.place(0)) == "prompt" and not prompts:
        raise NoTrainedTokensError(
            f"{rows.place(0)}: a row with a prompt alone has nothing to train on; expected prompt "
            "and completion, or lmbda=1 (--lmbda 1), where the student writes every completion."
        )
    prompted = any(TEACHER_PROMPT in row for row in rows)
    packing = packing and column is None and not prompted
    how: Any = {"max_length": max_length, "packing": packing, "train_on": train_on}
    if chat_template_kwargs:
        how["chat_template_kwargs"] = dict(chat_template_kwargs)
    key = None
    if column is None and not prompted and _is_large(rows):
        key = token_cache.key_of(rows, tokenizer, [rows.source, rows.unit, rows.numbers], **how)
    if key is not None and (found := token_cache.load(key)) is not None:
        notes = found.pop("notes")
        dataset = TokenDataset(**found)
    else:
        dataset, notes = _tokenize(rows, tokenizer, **how, column=column)
        if key is not None:
            token_cache.save(key, vars(dataset) | {"notes": notes})
    for note in notes:
        warn(note)
    return dataset


def _is_large(rows: Rows) -> bool:
    """True if tokenizing takes so long that its progress is shown and its result kept."""
    return len(rows) >= MANY_CHATS if holds_chats(rows) else _characters(rows) >= MANY_CHARACTERS


def _characters(rows: Rows) -> int:
    """Of what the tokenizer is given; prompts twice, alone and with their completions."""
    times = {"text": 1, "prompt": 2, "completion": 1}
    return sum(times[it] * len(row[it]) for row in rows for it in times.keys() & row.keys())


def _tokenize(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    packing: bool,
    train_on: str,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    column: str | None = None,
) -> tuple["TokenDataset", list[str]]:
    kind, left_out, notes = kind_of(rows[0], rows.place(0)), LeftOut(rows), []
    template = ChatTemplate(tokenizer, chat_template_kwargs or {}) if holds_chats(rows) else None
    examples = _examples(rows, tokenizer, template, left_out, train_on, notes)
    if kind == "prompt":
        spans = _whole(examples, max_length, left_out)
        losses = _losses(examples, None, left_out, rows)
        blocks = [[span] for span in spans]
    elif kind == "text":
        blocks = _cut(examples, max_length, packing)
        losses = _losses(examples, None, left_out, rows)
    else:
        spans = _shorten(examples, max_length, left_out)
        losses = _losses(examples, max_length, left_out, rows)
        blocks = _best_fit(spans, max_length) if packing else [[span] for span in spans]
    cut = 0 if kind in ("text", "prompt") else _cut_tokens(examples, max_length)
    columns: dict[str, list[Any]] = {}
    if any(TEACHER_PROMPT in row for row in rows):

        def encode_rows(others: Rows) -> Examples:
            return _examples(others, tokenizer, template, LeftOut(others), train_on, [])

        spans = [span for (span,) in blocks]
        spans, columns = _for_teacher(rows, examples, spans, encode_rows, left_out)
        blocks = [[span] for span in spans]
    if column is not None:
        columns[column] = [rows[examples.row_at(start)][column] for ((start, _),) in blocks]
    dataset = _dataset(kind, examples, blocks, rows, cut, left_out)
    dataset = replace(dataset, columns=columns)
    return dataset, [*losses, *notes]


def _for_teacher(
    rows: Rows,
    examples: Examples,
    spans: Sequence[Span],
    encode_rows: Callable[[Rows], Examples],
    left_out: LeftOut,
) -> tuple[list[Span], dict[str, list[Any]]]:
    """The teacher's version of each text, whose trained tokens must be the same.

    Args:
        rows: All rows, some with a prompt for the teacher.
        examples: The texts as the student reads them.
        spans: Of those that are trained on, perhaps cut.
        encode_rows: Rows as texts.
        left_out: Takes the rows of which the two differ.

    Returns:
        The spans without these rows, and columns with a text for each, None where the teacher
        reads the student's.
    """
    places = [place for place, row in enumerate(rows) if TEACHER_PROMPT in row]
    others = rows.some(places)
    others[:] = [{**row, "prompt": row[TEACHER_PROMPT]} for row in others]
    texts, of_row = encode_rows(others), collections.defaultdict(list)
    for number, span in zip(texts.rows, texts.spans(), strict=True):
        of_row[places[number]].append(span)
    whole: dict[int, tuple[int, int, int]] = {}  # by its first token: row, number in it, end
    counts: collections.Counter[int] = collections.Counter()
    for row, (start, stop) in zip(examples.rows, examples.spans(), strict=True):
        whole[start] = row, counts[row], stop
        counts[row] += 1
    kept, refused, read = [], set(), []
    for start, stop in spans:
        row, number, end = whole[start]
        if TEACHER_PROMPT not in rows[row]:
            kept.append((start, stop))
            read.append(None)
            continue
        found = of_row[row][number] if len(of_row[row]) == counts[row] else None
        same = found is not None and _trained(texts, *found) == _trained(examples, start, end)
        if found is None or not same:
            refused.add(row)
            continue
        kept.append((start, stop))
        read.append(_teacher_text(texts, found, len(_trained(examples, start, stop))))
    for row in sorted(refused):
        left_out.add(row, "the completion has other tokens behind the teacher's prompt")
    pairs = [
        (span, it) for span, it in zip(kept, read, strict=True) if whole[span[0]][0] not in refused
    ]
    columns: dict[str, list[Any]] = {TEACHER_IDS: [], TEACHER_LABELS: []}
    for _, text in pairs:
        for name, at in ((TEACHER_IDS, 0), (TEACHER_LABELS, 1)):
            columns[name].append(None if text is None else text[at])
    return [span for span, _ in pairs], columns


def _trained(examples: Examples, start: int, stop: int) -> list[int]:
    """The tokens of a text that are predicted: never its first."""
    return [examples.tokens[at] for at in range(start + 1, stop) if examples.trained[at]]


def _teacher_text(texts: Examples, span: Span, count: int) -> tuple[Tensor, Tensor]:
    """The tokens of a text up to so many trained ones, and their labels."""
    start, stop = span
    trained = [at for at in range(start + 1, stop) if texts.trained[at]][:count]
    stop = trained[-1] + 1 if trained else stop
    ids = torch.tensor(texts.tokens[start:stop], dtype=torch.int64)
    labels = torch.full_like(ids, IGNORED)
    places = torch.tensor(trained, dtype=torch.int64) - start
    labels[places] = ids[places]
    return ids, labels


def _examples(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate | None,
    left_out: LeftOut,
    train_on: str,
    notes: list[str],
) -> Examples:
    """The rows as tokens; what is to be warned of goes into ``notes``."""
    if {"messages", "completion", "text"}.isdisjoint(rows[0]):
        return _prompt_examples(rows, tokenizer, template, left_out, notes)
    if template is not None:
        with _tokenizing("tokenizing chats", len(rows), MANY_CHATS) as shown:
            return _chat_examples(rows, template, left_out, train_on, notes, shown.advance)
    with _tokenizing("tokenizing", _characters(rows), MANY_CHARACTERS) as shown:
        if "text" in rows[0]:
            return _text_examples(rows, tokenizer, left_out, notes, shown.advance)
        return _completion_examples(rows, tokenizer, notes, shown.advance)


def _tokenizing(label: str, total: int, shown_from: int) -> Progress:
    return Progress(label, total, share=True, shown=total >= shown_from)


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
    """A block as text, what is not trained on between brackets.

    Args:
        dataset: Rows with ``input_ids`` and ``labels``, as :func:`tokenize` makes them.
        tokenizer: The tokenizer that they were made with.
        index: Which row.
    """
    count = len(cast(Sequence, dataset))
    if not -count <= index < count:
        raise ValueError(f"index must be that of one of {count:,} rows; got {index}.")
    example = dataset[index]
    for name in ("input_ids", "labels"):
        if name not in example:
            raise ValueError(f"dataset: row {index} must have {name}; got {list(example)}.")
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
    """Digests of a run's rows, to recognise later if it was trained on one of them.

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


def _dataset(
    kind: str,
    examples: Examples,
    blocks: Sequence[Sequence[Span]],
    rows: Rows,
    cut: int,
    left_out: LeftOut,
) -> TokenDataset:
    """The blocks, each of some spans, of which the first token is not predicted from another."""
    if not blocks:
        raise NoTrainedTokensError(
            f"data has no trained tokens: in none of {len(rows):,} rows of {kind} is there "
            f"anything to train on. {left_out}."
        )
    tokens = np.frombuffer(examples.tokens, np.int32)
    trained = np.frombuffer(examples.trained, np.bool)
    spans = [span for block in blocks for span in block]
    lengths = np.fromiter((stop - start for start, stop in spans), np.int64, len(spans))
    chosen = [slice(*span) for span in spans]
    bits = np.concatenate([trained[it] for it in chosen])
    is_first = np.zeros(len(tokens), np.bool)
    is_first[np.frombuffer(examples.bounds, np.int64)[:-1]] = True
    begins = np.concatenate([is_first[it] for it in chosen])
    begins[np.cumsum(lengths) - lengths] = True
    bits[begins] = False
    blocks_end = np.cumsum([0, *map(len, blocks)])
    bounds = np.concatenate([[0], np.cumsum(lengths)])[blocks_end]
    return TokenDataset(
        kind,
        torch.from_numpy(np.concatenate([tokens[it] for it in chosen])),
        torch.from_numpy(bits),
        torch.from_numpy(bounds),
        len(rows),
        cut,
        len(left_out),
        str(left_out),
        torch.from_numpy(begins) if begins.sum() > len(blocks) else None,
    )


def _cut(examples: Examples, max_length: int, packing: bool) -> list[list[Span]]:
    """Blocks of plain text; a last one of a single token would have nothing to predict."""
    texts = [(0, len(examples.tokens))] if packing else examples.spans()
    return [
        [(start, min(start + max_length, end))]
        for begin, end in texts
        for start in range(begin, end, max_length)
        if end - start > 1
    ]


def _whole(examples: Examples, max_length: int, left_out: LeftOut) -> list[Span]:
    """The prompts, but those that are longer than a block."""
    spans = []
    for row, (start, end) in zip(examples.rows, examples.spans(), strict=True):
        if end - start <= max_length:
            spans.append((start, end))
        else:
            left_out.add(row, f"the prompt is longer than max_length={max_length} tokens")
    return spans


def _shorten(examples: Examples, max_length: int, left_out: LeftOut) -> list[Span]:
    """The texts without what is beyond a block, and without those that lose all by that."""
    kept, rows, lost = [], set(), {}
    for row, (start, end) in zip(examples.rows, examples.spans(), strict=True):
        stop = min(end, start + max_length)
        if examples.trained.find(1, start + 1, stop) >= 0:
            kept.append((start, stop))
            rows.add(row)
        else:
            lost[row] = examples.trained.find(1, start + 1, end) >= 0
    for row, cut in lost.items():
        if row not in rows:
            longer = f"no answer begins within max_length={max_length} tokens"
            left_out.add(row, longer if cut else "the answer is empty")
    return kept


def _cut_tokens(examples: Examples, max_length: int) -> int:
    return sum(max(stop - start - max_length, 0) for start, stop in examples.spans())


def _losses(
    examples: Examples, max_length: int | None, left_out: LeftOut, rows: Rows
) -> Iterator[str]:
    """A sentence on the text that is not trained on: ends of long rows, and whole rows."""
    lost = []
    if max_length is not None and (cut := _cut_tokens(examples, max_length)):
        long = sum(stop - start > max_length for start, stop in examples.spans())
        lost.append(
            f"{long:,} of {len(examples.rows):,} rows are longer than max_length={max_length} "
            f"and lose their end, {cut:,} tokens in all."
        )
    if len(left_out):
        lost.append(
            f"{len(left_out):,} of {len(rows):,} rows have nothing to train on and are left out: "
            f"{left_out}."
        )
    if lost:
        yield " ".join(lost)


def _best_fit(spans: Sequence[Span], max_length: int) -> list[list[Span]]:
    """Texts put into blocks, the longest first, each where it leaves the least room."""
    blocks: list[list[Span]] = []
    with_room: dict[int, list[int]] = {}  # blocks by the tokens left in them, each a heap
    rooms: list[int] = []  # the keys, sorted
    for start, stop in sorted(spans, key=lambda span: span[0] - span[1]):
        size = stop - start
        place = bisect.bisect_left(rooms, size)
        if place == len(rooms):
            block, left = len(blocks), max_length
            blocks.append([])
        else:
            left = rooms[place]
            block = heapq.heappop(with_room[left])
            if not with_room[left]:
                del rooms[place], with_room[left]
        blocks[block].append((start, stop))
        left -= size
        if left not in with_room:
            bisect.insort(rooms, left)
        heapq.heappush(with_room.setdefault(left, []), block)
    return blocks


def _text_examples(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    left_out: LeftOut,
    notes: list[str],
    advance: Advance,
) -> Examples:
    examples, end = Examples(), end_of_text(tokenizer)
    notes += _doubled_beginnings([row["text"] for row in rows], tokenizer)
    encoded = encode(tokenizer, (row["text"] for row in rows), advance=advance)
    for row, ids in enumerate(encoded):
        if rows[row]["text"]:
            examples.add(row, ids, b"\1" * (len(ids) + 1), [end])
        else:
            left_out.add(row, "the text is empty")
    return examples


def _completion_examples(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, notes: list[str], advance: Advance
) -> Examples:
    examples, end, merged = Examples(), end_of_text(tokenizer), 0
    notes += _doubled_beginnings([row["prompt"] for row in rows], tokenizer)
    pairs = [(row["prompt"], row["completion"]) for row in rows]
    encoded = encode_completions(tokenizer, pairs, advance)
    for row, (ids, known, prompt) in enumerate(encoded):
        merged += known < prompt
        trained = bytes(known) + b"\1" * (len(ids) + 1 - known)
        examples.add(row, ids, trained, [end])
    if merged:
        notes.append(
            f"In {merged:,} of {len(rows):,} rows the tokens of the prompt change once the "
            "completion follows it; they are trained on from the first that changes. End the "
            "prompts, or begin the completions, where a token ends."
        )
    return examples


def _doubled_beginnings(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """A note on texts that begin with what the tokenizer, or a chat template, puts there."""
    begin = str(tokenizer.bos_token or "")
    (nothing,) = encode(tokenizer, [""])
    adds = bool(begin) and nothing[:1] == [tokenizer.bos_token_id]
    if adds and (count := sum(text.startswith(begin) for text in texts)):
        yield (
            f"{count:,} of {len(texts):,} rows begin with {begin}, which the tokenizer puts in "
            "front of every row: it is there twice. Take it out of the text."
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
            yield (
                f"{count:,} of {len(texts):,} rows begin with {token}, as if a chat template had "
                "written them. Such text is trained on as it is, questions too; rows of messages "
                "train on the answers alone."
            )


def _prompt_examples(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate | None,
    left_out: LeftOut,
    notes: list[str],
) -> Examples:
    """Prompts up to where a reply begins."""
    if template is None:
        texts = [row["prompt"] for row in rows]
        notes += _doubled_beginnings(texts, tokenizer)
    else:
        texts = [prompt_text(row, rows.place(place), template) for place, row in enumerate(rows)]
    examples, special = Examples(), template is None
    for row, ids in enumerate(encode(tokenizer, texts, special=special, goes_on=True)):
        if len(ids):
            examples.add(row, ids, bytes(len(ids)))
        else:
            left_out.add(row, "the prompt is empty")
    return examples


def prompt_text(row: Row, place: str, template: ChatTemplate) -> str:
    """The messages of a prompt in the words of a template, up to where a reply begins."""
    try:
        messages = template.prepare(row["prompt"], place)
    except NothingToTrainOnError as nothing:
        raise ValueError(f"{place}: {nothing.reason}.") from None
    return template.render(messages, place, reply=True, tools=row.get(TOOLS))


def _chat_examples(
    rows: Rows,
    template: ChatTemplate,
    left_out: LeftOut,
    train_on: str,
    notes: list[str],
    advance: Advance,
) -> Examples:
    examples, tokenizer = Examples(), template.tokenizer
    if not template.ends_turns:
        notes.append(
            "The chat template writes nothing behind what the assistant says, so that a student "
            "does not learn from it where to stop."
        )
    rendered, done = _rendered(rows, template, left_out, train_on), 0
    while batch := list(itertools.islice(rendered, _CHATS_AT_ONCE)):
        encoded = _encode_answers(tokenizer, [text for _, text in batch])
        for (row, text), (ids, trained) in zip(batch, encoded, strict=True):
            if template.marks:
                ids, trained = _marked(template, text, trained, rows.place(row))
            examples.add(row, ids, trained)
        advance(batch[-1][0] + 1 - done)
        done = batch[-1][0] + 1
    if template.ignored:
        notes.append(
            f"The chat template does not write {', '.join(sorted(template.ignored))}, which rows "
            "have: the student does not see it."
        )
    return examples


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
    encoded = encode_batch(tokenizer, [text.text for text in texts], special=False)
    special = tokenizer.added_tokens_decoder
    for text, ids, encoding in zip(texts, encoded["input_ids"], encoded.encodings, strict=True):

        def place(
            token: int, ids: Sequence[int] = ids, placed: Any = encoding.token_to_chars
        ) -> int:
            begin, end = placed(token)
            return begin if ids[token] in special else end - 1

        trained = bytearray(len(ids))
        for span in text.answers:
            first, behind = (bisect.bisect_left(range(len(ids)), it, key=place) for it in span)
            trained[first:behind] = b"\1" * (behind - first)
        yield ids, trained


def _encode_slowly(tokenizer: PreTrainedTokenizerBase, text: Rendered) -> Example:
    """The same with a tokenizer that does not tell where its tokens stand."""
    (ids,) = encode(tokenizer, [text.text], special=False)
    trained = bytearray(len(ids))
    for span in text.answers:
        parts = encode(tokenizer, (text.text[:place] for place in span), special=False)
        start, stop = (agreeing(part, ids) for part in parts)
        trained[start:stop] = b"\1" * (stop - start)
    return ids, trained


def _marked(
    template: ChatTemplate, text: Rendered, trained: bytes | bytearray, place: str
) -> Example:
    """Tokens inside the template's generation blocks, of the answers that are trained on."""
    encoded = template.encode_with_marks(text, place)
    ids, marks = list(encoded["input_ids"]), [bool(it) for it in encoded["assistant_masks"]]
    if not any(marks):
        raise ValueError(
            f"{place}: the chat template has generation blocks, but marks none of the "
            "assistant's turns with them."
        )
    kept = bytearray()
    for marked, group in itertools.groupby(enumerate(marks), lambda it: it[1]):
        run = [index for index, _ in group]
        wanted = marked and (len(ids) != len(trained) or any(trained[it] for it in run))
        kept += bytes([wanted]) * len(run)
    return ids, kept

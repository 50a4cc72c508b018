"""The same text in the tokens of two tokenizers, aligned at the bytes that both divide it at."""

import json
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias, cast

import numpy as np
from transformers import PreTrainedTokenizerBase

from rkl.distill.text.encoding import special_tokens

SPACE = "\u2581"  # what sentencepiece writes for a space
MAX_READINGS = 4096  # rows whose translation is kept
_ANCHOR = "\n"  # before text that is not the beginning, for tokenizers that put a space there

IntArray: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]


class Span(NamedTuple):
    """A stretch of text that begins and ends between tokens on both sides, with none inside.

    Attributes:
        source: Begin and end in the tokens of the source.
        target: Begin and end in those of the target.
        atom: Number of the common atom with just these bytes; -1 where there is none.
    """

    source: tuple[int, int]
    target: tuple[int, int]
    atom: int


class Reading(NamedTuple):
    """A text in the tokens of the target, and the spans that it has in common with the source."""

    tokens: list[int]
    spans: list[Span]


class TokenTable:
    """The bytes that the tokens of a tokenizer stand for.

    Byte-level tokenizers (GPT-2, Llama 3, Qwen) and those of sentencepiece's form, with a mark
    for spaces and tokens for single bytes (Llama 2, Gemma), are read.

    Args:
        tokenizer: A tokenizer with a backend of the tokenizers library.
        name: What a message calls it.

    Attributes:
        spelling: The bytes of each token; None for special tokens and unused numbers.
        special: The text of each special token.
        prefix: The special tokens that the tokenizer puts before a text.

    Raises:
        ValueError: The bytes of its tokens cannot be told.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: str = "tokenizer"):
        self.tokenizer: Any = tokenizer
        kinds = _decoder_kinds(tokenizer, name)
        added = tokenizer.added_tokens_decoder
        self.special = {it: str(token.content) for it, token in added.items() if token.special}
        vocabulary = tokenizer.get_vocab()
        self.spelling: list[bytes | None] = [None] * (max(vocabulary.values()) + 1)
        self.from_fallback: set[int] = set()
        for token, number in vocabulary.items():
            if number in self.special:
                continue
            if "ByteLevel" in kinds:
                literal = number in added
                self.spelling[number] = token.encode() if literal else _from_byte_level(token)
            elif "ByteFallback" in kinds and (byte := _fallback_byte(token)) is not None:
                self.spelling[number] = byte
                self.from_fallback.add(number)
            else:
                self.spelling[number] = token.replace(SPACE, " ").encode()
        around = special_tokens(tokenizer, "a")
        self.prefix = [] if around is None else around[0]

    def __len__(self) -> int:
        return len(self.spelling)

    def by_bytes(self, limit: int) -> dict[bytes, int]:
        """The token below a limit that stands for each string of bytes.

        Of several with the same bytes it is the one that is no fallback, or else the first.
        """
        found: dict[bytes, int] = {}
        order = sorted(range(min(len(self), limit)), key=lambda it: (it in self.from_fallback, it))
        for number in order:
            if spelling := self.spelling[number]:
                found.setdefault(spelling, number)
        return found

    def encode(self, texts: Sequence[str], begins: Sequence[bool]) -> list[list[int]]:
        """The tokens of texts, in which no special token is read.

        Args:
            texts: Ordinary text.
            begins: Whether each is the beginning of a text, where some tokenizers put a space.
        """
        if not texts:
            return []
        encoded = self._encode(texts)
        for at, (text, begin) in enumerate(zip(texts, begins, strict=True)):
            if not begin and text and self._puts_a_space:
                encoded[at] = self._encode_inside(text, encoded[at])
        return encoded

    def bytes_of(self, tokens: Sequence[int]) -> bytes:
        """The bytes of ordinary tokens."""
        return b"".join(self.spelling[it] or b"" for it in tokens)

    @cached_property
    def _puts_a_space(self) -> bool:
        return self.bytes_of(self._encode(["a"])[0]) == b" a"

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        how = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        return self.tokenizer(list(texts), **how)["input_ids"]

    def _encode_inside(self, text: str, alone: list[int]) -> list[int]:
        (ids,) = self._encode([_ANCHOR + text])
        length = 0
        for at, token in enumerate(ids):
            if length == len(_ANCHOR) + 1:
                return ids[at:]
            length += len(self.spelling[token] or b"")
        return alone


class Translation:
    """Reads tokens of one tokenizer in those of another.

    Ordinary text goes through its bytes. A special token becomes the one of the same text, or the
    end of a text the other's end; any other is read as the text that it is written as, and lies in
    no span. What is not UTF-8, such as half a character, is not read, nor what follows it.

    Args:
        source: The tokens that are given.
        target: The tokens that they are read in.
        target_logits: Number of logits of the model that reads them.

    Attributes:
        source_atoms: The tokens of the source whose bytes are a token of the target too.
        target_atoms: These, in the same order.
    """

    def __init__(self, source: TokenTable, target: TokenTable, target_logits: int | None = None):
        self.source, self.target = source, target
        self._target_logits = limit = len(target) if target_logits is None else target_logits
        theirs = target.by_bytes(limit)
        ours = source.by_bytes(len(source))
        pairs = [(number, theirs[it]) for it, number in ours.items() if it in theirs]
        self.counterparts = {
            ours: theirs for ours, theirs in _counterparts(source, target) if theirs < limit
        }
        self._atom_of_bytes = {
            bytes(cast(bytes, source.spelling[it])): at for at, (it, _) in enumerate(pairs)
        }
        taken = {it for _, it in pairs}
        self._atom_of_special: dict[int, int] = {}
        for ours, theirs in self.counterparts.items():
            if theirs not in taken:  # two ends may have one counterpart
                self._atom_of_special[ours] = len(pairs)
                pairs.append((ours, theirs))
                taken.add(theirs)
        self.source_atoms, self.target_atoms = (
            np.array([pair[side] for pair in pairs], dtype=np.int64) for side in (0, 1)
        )
        self._kept: OrderedDict[bytes, Reading] = OrderedDict()

    def read(self, rows: Sequence[Sequence[int]]) -> list[Reading]:
        """Whole texts, each from its beginning, with the special tokens that the target begins by.

        Args:
            rows: Tokens of the source.
        """
        keys = [np.asarray(row, dtype=np.int64).tobytes() for row in rows]
        missing = {key: row for key, row in zip(keys, rows, strict=True) if key not in self._kept}
        if missing:
            made = self._read([*missing.values()], begin=True)
            self._kept.update(zip(missing, made, strict=True))
        found = [self._kept[key] for key in keys]
        while len(self._kept) > MAX_READINGS:
            self._kept.popitem(last=False)
        return found

    def continuation(self, tokens: Sequence[int]) -> list[int]:
        """The tokens of the target for text that goes on from other text."""
        return self._read([tokens], begin=False)[0].tokens

    def columns(self, *, prefix: bool) -> tuple[IntArray, IntArray]:
        """The common atom that each token of the source, and of the target, counts as.

        A token that one side alone has counts as the common token that its text begins with in
        the other's tokens, or else the longest that its bytes begin with; without ``prefix``, and
        where there is none, as none of them: its number is the number of atoms.

        Args:
            prefix: Whether such tokens count as what they begin with.
        """
        count, limit = len(self.source_atoms), self._target_logits
        of_source, of_target = (np.full(it, count) for it in (len(self.source), limit))
        of_source[self.source_atoms] = of_target[self.target_atoms] = np.arange(count)
        if prefix:
            ours, theirs = of_source.copy(), of_target.copy()
            self._fill(of_source, self.source, self.target, theirs)
            self._fill(of_target, self.target, self.source, ours)
        return of_source, of_target

    def _fill(
        self, column: IntArray, table: TokenTable, other: TokenTable, known: IntArray
    ) -> None:
        """Give the unmatched tokens of one side the atoms that they begin with on the other."""
        count = len(self.source_atoms)
        size = min(len(column), len(table))
        alone = [it for it in range(size) if column[it] == count and table.spelling[it]]
        texts = [_decoded(cast(bytes, table.spelling[it])) for it in alone]
        readable = [text if whole else "" for text, whole in texts]
        encoded = other.encode(readable, [False] * len(readable))
        for token, ids in zip(alone, encoded, strict=True):
            first = ids[0] if ids and ids[0] < len(known) else None
            found = count if first is None else int(known[first])
            column[token] = found if found < count else self._longest(table.spelling[token])

    def _longest(self, spelling: bytes | None) -> int:
        whole = spelling or b""
        found = (self._atom_of_bytes.get(whole[:it]) for it in range(len(whole), 0, -1))
        return next((it for it in found if it is not None), len(self.source_atoms))

    def _read(self, rows: Sequence[Sequence[int]], *, begin: bool) -> list[Reading]:
        parts = [[*self._parts(row)] for row in rows]
        texts, begins = [], []
        for of_row in parts:
            for place, part in enumerate(of_row):
                if part.text is not None:
                    texts.append(part.text)
                    begins.append(begin and (place == 0 or (place == 1 and of_row[0].is_begin)))
        encoded = iter(self.target.encode(texts, begins))
        return [self._joined(it, encoded, begin=begin) for it in parts]

    def _parts(self, row: Sequence[int]) -> Iterator["_Part"]:
        """The ordinary stretches and the special tokens of a row, up to what cannot be read."""
        start = 0
        special = [at for at, token in enumerate(row) if token in self.source.special]
        for at in [*special, len(row)]:
            if start < at:
                text, whole = _decoded(self.source.bytes_of(row[start:at]))
                ends = np.cumsum([len(self.source.spelling[it] or b"") for it in row[start:at]])
                yield _Part(start, at, text, ends)
                if not whole:
                    return
            if at < len(row):
                token = row[at]
                counterpart = self.counterparts.get(token)
                is_begin = at == 0 and token == self.source.tokenizer.bos_token_id
                text = None
                if counterpart is None and not is_begin:
                    text = self.source.special[token]
                yield _Part(at, at + 1, text, None, token, counterpart, is_begin)
            start = at + 1

    def _joined(self, parts: list["_Part"], encoded: Iterator[list[int]], *, begin: bool):
        tokens: list[int] = [*self.target.prefix] if begin else []
        spans: list[Span] = []
        for part in parts:
            place = len(tokens)
            if part.text is not None:
                ids = next(encoded)
                tokens += ids
                if part.ends is not None:
                    spans += self._spans(part, ids, place)
            elif part.counterpart is not None and not (part.is_begin and self.target.prefix):
                tokens.append(part.counterpart)
                atom = self._atom_of_special.get(cast(int, part.token), -1)
                spans.append(Span((part.start, part.stop), (place, place + 1), atom))
        return Reading(tokens, spans)

    def _spans(self, part: "_Part", ids: list[int], place: int) -> list[Span]:
        """The spans of a stretch of ordinary text, as far as both sides have the same bytes."""
        ours, theirs = cast(str, part.text).encode(), self.target.bytes_of(ids)
        shift = 1 if theirs == b" " + ours else 0  # a space before all text, of the target alone
        limit = _common_length(ours, theirs[shift:])
        ends = np.cumsum([len(self.target.spelling[it] or b"") for it in ids]) - shift
        of_source = cast(IntArray, part.ends)
        common = np.intersect1d(of_source, ends)
        common = common[(common > 0) & (common <= limit)]
        left = np.searchsorted(of_source, common, side="right")
        right = np.searchsorted(ends, common, side="right")
        spans, before, begin = [], (0, 0), 0
        for source, target, end in zip(
            left.tolist(), right.tolist(), common.tolist(), strict=True
        ):
            if not (shift and begin == 0):  # the target's first token has one more space
                spans.append(
                    Span(
                        (part.start + before[0], part.start + source),
                        (place + before[1], place + target),
                        self._atom_of_bytes.get(ours[begin:end], -1),
                    )
                )
            before, begin = (source, target), end
        return spans


class _Part(NamedTuple):
    """A stretch of a row: ordinary text, or one special token.

    Attributes:
        start: Its first token.
        stop: Behind its last one.
        text: What the target reads as text; None of a special token that it has too.
        ends: Bytes up to the end of each token; None of a special token.
        token: The special token.
        counterpart: The target's.
        is_begin: True of the token that begins a text.
    """

    start: int
    stop: int
    text: str | None
    ends: IntArray | None = None
    token: int | None = None
    counterpart: int | None = None
    is_begin: bool = False


def _counterparts(source: TokenTable, target: TokenTable) -> Iterator[tuple[int, int]]:
    """Special tokens that mean the same: of one text, or both the end, or both the beginning."""
    by_text = {text: number for number, text in target.special.items()}
    for number, text in source.special.items():
        if text in by_text:
            yield number, by_text[text]
            continue
        for name in ("eos_token_id", "bos_token_id"):
            other = getattr(target.tokenizer, name)
            if number == getattr(source.tokenizer, name) and other is not None:
                yield number, other
                break


def _decoder_kinds(tokenizer: Any, name: str) -> set[str]:
    """The kinds of decoders of a tokenizer, which say how its tokens are spelt."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = None if backend is None else backend.decoder
    described = None if decoder is None else json.loads(decoder.__getstate__())
    kinds = {it["type"] for it in _flat(described)}
    if not kinds & {"ByteLevel", "ByteFallback", "Metaspace"}:
        got = ", ".join(sorted(kinds)) or "none"
        raise ValueError(
            f"{name} must be byte-level or of sentencepiece's form, so that the bytes of its "
            f"tokens are known; its decoder is {got}."
        )
    return kinds


def _flat(decoder: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    if decoder is None:
        return
    yield decoder
    for inner in decoder.get("decoders", ()):
        yield from _flat(inner)


def _byte_of_character() -> dict[str, int]:
    """The byte that each character of a byte-level token stands for, as GPT-2 defined it.

    Printable characters of Latin-1 stand for themselves; the other 68 bytes, in order, are the
    characters from 256 on.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [it for it in range(256) if it not in printable]
    return {chr(it): it for it in printable} | {chr(256 + at): it for at, it in enumerate(others)}


_BYTE_OF = _byte_of_character()


def _from_byte_level(token: str) -> bytes:
    try:
        return bytes(_BYTE_OF[it] for it in token)
    except KeyError:  # a token that was added as text
        return token.encode()


def _fallback_byte(token: str) -> bytes | None:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return None


def _decoded(text: bytes) -> tuple[str, bool]:
    """As much of some bytes as is UTF-8, and whether that is all."""
    try:
        return text.decode(), True
    except UnicodeDecodeError as error:
        return text[: error.start].decode(), False


def _common_length(ours: bytes, theirs: bytes) -> int:
    """Number of bytes from the first on that are the same."""
    size = min(len(ours), len(theirs))
    if ours[:size] == theirs[:size]:
        return size
    pair = (np.frombuffer(it[:size], dtype=np.uint8) for it in (ours, theirs))
    return int((next(pair) != next(pair)).argmax())

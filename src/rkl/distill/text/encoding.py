"""Texts into tokens, by the tokenizer's batch call, in batches that take little memory."""

import itertools
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

MAX_BATCH_TEXTS = 1000  # given to the tokenizer in one call
MAX_BATCH_CHARACTERS = 2**17  # the tokenizer holds some hundred bytes for each
OVERLAP = 2**11  # characters that the pieces of a long text have in common
AGREEING = 16  # tokens before a joint, and behind it, that both pieces must have


def end_of_text(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends a row; a tokenizer must have one."""
    end: Any = tokenizer.eos_token_id
    if end is None:
        raise ValueError(
            "The tokenizer has no EOS token to put behind each row, without which a student "
            "would not learn to stop: set tokenizer.eos_token."
        )
    return end


Advance = Callable[[int], None]  # told how many more characters, or rows, are done


def encode(
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    *,
    special: bool = True,
    goes_on: bool = False,
    advance: Advance | None = None,
) -> Iterator[Sequence[int]]:
    """The tokens of texts, without the end-of-text token that some tokenizers put behind them.

    One that a text has of itself is left out too, unless the text goes on behind it.

    Args:
        tokenizer: Any.
        texts: Taken a batch at a time.
        special: Whether the tokenizer puts its special tokens, which a chat in words has already.
        goes_on: Whether the texts are prompts, whose own end-of-text token is part of them.
        advance: Called with the number of characters of each batch that is done.
    """
    end = tokenizer.eos_token_id
    cuts = special and (not goes_on or _puts_end(tokenizer))
    for batch in batches(texts):
        if len(batch) == 1 and len(batch[0]) > MAX_BATCH_CHARACTERS:
            encoded = [encode_long(tokenizer, batch[0], special=special, advance=advance)]
        else:
            encoded = encode_without_places(tokenizer, batch, special=special)
            if advance is not None:
                advance(sum(map(len, batch)))
        for ids in encoded:
            yield ids[:-1] if cuts and len(ids) and ids[-1] == end else ids


def _puts_end(tokenizer: PreTrainedTokenizerBase) -> bool:
    """True if the tokenizer puts the end-of-text token behind each text."""
    around = special_tokens(tokenizer, "a")
    return around is None or around[1][-1:] == [tokenizer.eos_token_id]


def encode_batch(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, special: bool
) -> Any:
    """The tokenizer's batch call, without what is not used of it."""
    return tokenizer(
        list(texts),
        add_special_tokens=special,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # no advice on texts longer than the model's context: blocks are cut
    )


def encode_without_places(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, special: bool
) -> list[list[int]]:
    """The tokens alone, a tenth faster: the backend does not work out where each stands."""
    if not leaves_all_to_its_backend(tokenizer):
        return encode_batch(tokenizer, texts, special=special)["input_ids"]
    encode_batch(tokenizer, [""], special=special)  # sets up the backend as a call would
    backend: Any = tokenizer.backend_tokenizer
    encoded = backend.encode_batch_fast(list(texts), add_special_tokens=special)
    return [it.ids for it in encoded]


def leaves_all_to_its_backend(tokenizer: PreTrainedTokenizerBase) -> bool:
    """False for a kind of tokenizer that does more to texts than its backend."""
    names, kind = ("__call__", "_encode_plus"), type(tokenizer)
    return all(
        getattr(kind, name, None) is getattr(PreTrainedTokenizerFast, name) for name in names
    )


def batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """The texts in lists of bounded size; a text that is longer than a batch has its own."""
    batch: list[str] = []
    size = 0
    for text in texts:
        if batch and (len(batch) == MAX_BATCH_TEXTS or size + len(text) > MAX_BATCH_CHARACTERS):
            yield batch
            batch, size = [], 0
        batch.append(text)
        size += len(text)
    if batch:
        yield batch


def encode_long(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    special: bool = True,
    piece: int = MAX_BATCH_CHARACTERS,
    overlap: int = OVERLAP,
    advance: Advance | None = None,
) -> Sequence[int]:
    """The tokens of one long text, encoded in pieces that overlap.

    A tokenizer looks no further than a word or a sentence around each token, so that two pieces
    give the same tokens away from their ends. They are joined in the middle of a stretch where
    both give the same tokens at the same places. The text is encoded whole where there is no such
    stretch, where the tokenizer does not tell places, and where its special tokens are not
    simply put around those of the text.

    Args:
        tokenizer: Any.
        text: The text.
        special: Whether the tokenizer puts its special tokens.
        piece: Characters encoded at a time.
        overlap: Characters that a piece shares with the next.
        advance: Called with the number of characters of each piece that is done.
    """
    around = special_tokens(tokenizer, text[:100]) if special else ([], [])
    if tokenizer.is_fast and around is not None:
        joined = array("i", around[0])
        pieces = _pieces(tokenizer, text, piece, overlap, advance)
        if _join(pieces, overlap, joined):
            joined.extend(around[1])
            return joined
    return encode_batch(tokenizer, [text], special=special)["input_ids"][0]


def special_tokens(
    tokenizer: PreTrainedTokenizerBase, sample: str
) -> tuple[list[int], list[int]] | None:
    """The special tokens that the tokenizer puts before and after a text."""
    bare, full = (
        encode_batch(tokenizer, [sample], special=it)["input_ids"][0] for it in (False, True)
    )
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start], full[start + len(bare) :]
    return None


Places = Callable[[int], tuple[int, int]]  # of tokens, one at a time: few of them are asked for
Placed = tuple[list[int], Places, int]  # tokens, their places in a piece, its start


def _pieces(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    piece: int,
    overlap: int,
    advance: Advance | None,
) -> Iterator[Placed]:
    for start in range(0, max(len(text) - overlap, 1), piece - overlap):
        part = text[start : start + piece]
        (encoding,) = encode_batch(tokenizer, [part], special=False).encodings
        yield encoding.ids, encoding.token_to_chars, start
        if advance is not None:
            advance(min(len(part), piece - overlap))


def _join(pieces: Iterable[Placed], overlap: int, joined: "array[int]") -> bool:
    """Append the tokens of all pieces; False where two of them cannot be joined."""
    last: Placed | None = None
    taken = 0  # of the last piece
    for piece in pieces:
        if last is not None:
            joint = _joint(last, piece, overlap)
            if joint is None:
                return False
            kept, first = joint
            joined.extend(last[0][taken:kept])
            taken = first
        last = piece
    if last is not None:
        joined.extend(last[0][taken:])
    return True


def _joint(left: Placed, right: Placed, overlap: int) -> tuple[int, int] | None:
    """Number of tokens to take of the left piece, and the first to take of the right one.

    Of the stretches of tokens that both pieces have in the overlap, the joint is the place
    nearest to the middle of the overlap that has enough of them on both sides.
    """
    (ids, place, start), (others, other_place, other_start) = left, right
    placed = ((index, *other_place(index)) for index in range(len(others)))
    at = {
        (others[index], begin + other_start, end + other_start): index
        for index, begin, end in itertools.takewhile(lambda it: it[1] < overlap, placed)
    }
    run, best = 0, None
    first = next((i for i in range(len(ids), 0, -1) if place(i - 1)[0] + start < other_start), 0)
    previous, middle = -2, other_start + overlap / 2
    for index in range(first, len(ids)):
        begin, end = place(index)
        found = at.get((ids[index], begin + start, end + start), -2)
        run = run + 1 if found == previous + 1 and run else int(found >= 0)
        previous = found
        if run >= 2 * AGREEING:
            distance = abs(place(index - AGREEING)[0] + start - middle)
            if best is None or distance < best[0]:
                best = distance, index - AGREEING, found - AGREEING
    return None if best is None else best[1:]

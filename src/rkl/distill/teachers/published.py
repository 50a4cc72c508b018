"""A teacher's top-k log-probabilities as others have published them, beside the rows."""

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rkl.checks import LARGEST_COUNT
from rkl.distill.known import distinct_atoms
from rkl.distill.limits import check_count
from rkl.distill.teachers import captures
from rkl.distill.teachers.cache import row_keys
from rkl.distill.teachers.teacher import Teacher
from rkl.distill.text.batches import PadRows, shifted
from rkl.distill.text.data import IGNORED, tokenize
from rkl.distill.text.sources import (
    TEACHER_PROMPT,
    Row,
    Rows,
    Some,
    read_rows,
    read_whole_rows,
    rows_as_lists,
)
from rkl.estimators import TopK
from rkl.runs import fingerprint

MIN_AGREEMENT = 0.5  # share of places whose own token is among the atoms, where rows fit
MAX_OFFSET = 4  # tokens that a template may put behind the last one with log-probabilities
ROUNDING = 0.1  # nats between two writings of one log-probability of -20, in bfloat16
_COLUMNS = {"target_logprobs", "target_token_ids", "target_mask"}
_COLUMNS |= {captures.LOGPROBS, captures.INDICES}


class PublishedTeacher(Teacher):
    """A teacher known at the rows of a data set, by its column of top-k log-probabilities.

    The columns are those of Axolotl 0.19: at each place a list of ``{"token": "token_id:5",
    "logprob": -0.1}``; or a list of log-probabilities, with the tokens in ``target_token_ids``
    and, once preprocessed, ``target_mask``. Places may be those of the whole row or of its end, at
    their own token or at the one before: of these, the one is taken at which the tokens of the
    row are among the atoms. Log-probabilities are taken as they are; Axolotl's preprocessing has
    divided by the mass of the top k.

    With ``compression`` the columns are those of DistillKit's captures, ``compressed_logprobs``
    and ``bytepacked_indices``, and texts that were packed into one row are read apart.

    ``rows`` are what to train on: tokens, with labels where the teacher is known. Keep both with
    :func:`cache_teacher`, in whose folder they are mapped from the disk. ``numbers`` are the
    indices of the given rows that they come from.

    Args:
        rows: Rows of ``input_ids`` and ``labels``; or, with a tokenizer, of text, of prompt and
            completion, or of messages.
        vocab: Number of tokens that the teacher gives logits.
        column: Name of the column of log-probabilities.
        tokenizer: What makes tokens of rows that have none.
        max_length: Tokens that are kept of a row that is tokenized.
        compression: How a capture of DistillKit was compressed: ``compression_config.yaml``, which
            lies beside it, or its entries, which are those of ``logprob_compressor``.

    Raises:
        ValueError: A row lacks a column, or its atoms do not fit its tokens.
    """

    reads_any_text = False

    def __init__(
        self,
        rows: Some,
        *,
        vocab: int,
        column: str = "target_logprobs",
        tokenizer: PreTrainedTokenizerBase | None = None,
        max_length: int = 1024,
        compression: Mapping[str, Any] | str | os.PathLike | None = None,
    ):
        check_count("vocab", vocab)
        self.vocab, self.rows, self.numbers = vocab, [], []
        self._known: dict[str, list[dict[int, float]]] = {}
        how = None if compression is None else captures.read_compression(compression)
        for number, whole in enumerate(rows_as_lists(rows)):
            where = rows.place(number) if isinstance(rows, Rows) else f"row {number}"
            for row in [whole] if how is None else captures.apart(whole):
                if how is None:
                    atoms = _places(row, column, where)
                else:
                    atoms = captures.places_of(row, how, where)
                places = [*_checked(atoms, where, vocab)]
                rest = {name: it for name, it in row.items() if name not in _COLUMNS | {column}}
                tokens = _tokens(rest, tokenizer, max_length, where)
                self._add(tokens, places, number, where)
        if not self.rows:
            raise ValueError("rows must give a token with log-probabilities; got none.")

    def _add(
        self, row: dict[str, list[int]], places: list[dict[int, float]], number: int, where: str
    ) -> None:
        offset = _offset(places, row["input_ids"], where)
        atoms = dict(enumerate(places, offset))  # by the position of the token that they are of
        labels = [
            label if position and atoms.get(position) else IGNORED
            for position, label in enumerate(row["labels"])
        ]
        chosen = [position for position, label in enumerate(labels) if label != IGNORED]
        if chosen:
            self.rows.append({"input_ids": row["input_ids"], "labels": labels})
            self.numbers.append(number)
            known = [atoms[position] for position in chosen]
            before = self._known.setdefault(_key(self.rows[-1]), known)
            if not all(map(_alike, before, known)):
                raise ValueError(
                    f"{where} has the tokens and labels of an earlier row, but other "
                    "log-probabilities: expected those of one teacher."
                )

    def __str__(self) -> str:
        told = fingerprint(self.contents())
        return f"log-probabilities of {len(self._known):,} rows, sha256 {told}"

    def include(self, other: "PublishedTeacher") -> None:
        """Know the rows of another one too, such as those held out; ``rows`` stay as they are."""
        self._known |= other._known

    def contents(self) -> Iterator[bytes]:
        """All that it knows, for a digest."""
        return (repr(it).encode() for it in self._known.items())

    def check_rows(self, rows: Any, max_length: int | None = None) -> None:
        """Refuse rows of which some are unknown."""
        for place in range(len(rows)):
            batch = shifted(PadRows(max_length=max_length)([rows[place]]))
            self._of(row_keys(batch.inputs, batch.predicting)[0])

    def observe(
        self,
        inputs: Mapping[str, Any],
        predicting: Bool[Tensor, "rows steps"],
        *,
        vocab: int | None = None,
    ) -> TopK:
        """The published atoms of these rows."""
        tokens = [atoms for key in row_keys(inputs, predicting) for atoms in self._of(key)]
        k = max(map(len, tokens), default=1)
        index = torch.zeros(len(tokens), k, dtype=torch.long)
        logp = torch.full((len(tokens), k), -math.inf)
        for place, atoms in enumerate(tokens):
            index[place, : len(atoms)] = torch.tensor([*atoms])
            logp[place, : len(atoms)] = torch.tensor([*atoms.values()])
        size = self.vocab if vocab is None else vocab
        if index.numel() and int(index.max()) >= size:
            raise ValueError(
                f"teacher: token {int(index.max())} is published, but teacher and student share "
                f"{size} tokens."
            )
        device = predicting.device
        return TopK(logp.to(device), distinct_atoms(index, logp.isneginf(), size).to(device))

    def _of(self, key: str) -> list[dict[int, float]]:
        if key and key not in self._known:
            raise ValueError(
                "a row is not among those that the teacher is known at: its tokens, or which of "
                "them are trained on, are others. Train on the teacher's own rows, unpacked."
            )
        return self._known.get(key, [])


def read_published(
    data: str,
    split: str,
    tokenizer: PreTrainedTokenizerBase,
    shape: Mapping[str, Any],
    **how: Any,
) -> tuple[Rows, PublishedTeacher]:
    """The rows of some data for people, and the teacher in a column of them.

    Rows of tokens are decoded for them; others are tokenized.

    Args:
        data: What the rows are read from.
        split: Which split of it.
        tokenizer: The student's.
        shape: What :func:`rkl.distill.tokenize` is called with; a row longer than its
            ``max_length`` is refused, as its log-probabilities are of the whole.
        how: For :class:`PublishedTeacher`.

    Raises:
        ValueError: Naming the row, where one has no log-probabilities or others than these.
    """
    whole = read_whole_rows(data, split=split)
    for at, row in enumerate(whole):
        if (column := how["column"]) not in row:
            raise ValueError(
                f"teacher: {whole.place(at)} has no column {column!r}; it has {', '.join(row)}."
            )
    if "input_ids" in whole[0]:
        ids = [_ids(row, whole.place(at)) for at, row in enumerate(whole)]
        texts = ({"text": tokenizer.decode(it)} for it in ids)
        rows, known = Rows(texts, whole.source, whole.unit, whole.numbers), whole
    else:
        rows = read_rows(data, split=split)
        known = _tokenized(rows, whole, tokenizer, shape)
    teacher = PublishedTeacher(known, **how)
    for at, row in zip(teacher.numbers, teacher.rows, strict=True):
        if (count := len(row["input_ids"])) > shape["max_length"]:
            raise ValueError(
                f"max_length must be at least {count}, the tokens of {known.place(at)}, for a row "
                f"with log-probabilities is not cut; got {shape['max_length']}."
            )
        pairs = zip(row["input_ids"], row["labels"], strict=True)
        if wrong := [it for it in pairs if it[1] not in (it[0], IGNORED)]:
            raise ValueError(
                f"{known.place(at)}: labels must be the tokens themselves, or {IGNORED} where one "
                f"is not trained on; got {wrong[0][1]} for token {wrong[0][0]}."
            )
    return rows, teacher


def _ids(row: Row, place: str) -> list[int]:
    if "input_ids" not in row:
        raise ValueError(f"{place}: expected input_ids, as in the first row; got {[*row]}.")
    return [*map(int, row["input_ids"])]


def _tokenized(
    rows: Rows, whole: Rows, tokenizer: PreTrainedTokenizerBase, shape: Mapping[str, Any]
) -> Rows:
    """The whole rows with their tokens and labels."""
    found = []
    for at, row in enumerate(rows):
        if TEACHER_PROMPT in row:
            raise ValueError(
                f"{rows.place(at)}: teacher_prompt and privileged_context need a teacher that "
                "reads them in the run; got one in a column of the data."
            )
        how = {**shape, "max_length": LARGEST_COUNT, "packing": False}
        texts = tokenize(rows.some([at]), tokenizer, **how)
        if len(texts) != 1:
            raise ValueError(
                f"{rows.place(at)} gives {len(texts)} texts, of which one must be meant."
            )
        tokens = {name: texts[0][name].tolist() for name in ("input_ids", "labels")}
        found.append({**whole[at], **tokens})
    return Rows(found, rows.source, rows.unit, rows.numbers)


def _alike(some: dict[int, float], others: dict[int, float]) -> bool:
    """True of two lists of atoms but for rounding in half precision."""
    common = some.keys() & others.keys()
    return all(
        some[it] == others[it] or abs(some[it] - others[it]) <= ROUNDING for it in common
    ) and 2 * len(common) >= min(len(some), len(others))


def _key(row: dict[str, list[int]]) -> str:
    batch = shifted(PadRows()([row]))
    return row_keys(batch.inputs, batch.predicting)[0]


def _tokens(
    row: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase | None,
    max_length: int,
    where: str,
) -> dict[str, list[int]]:
    """The tokens of a row, and their labels."""
    if "input_ids" in row:
        tokens = [*map(int, row["input_ids"])]
        return {"input_ids": tokens, "labels": [*map(int, row.get("labels", tokens))]}
    if tokenizer is None:
        raise ValueError(f"tokenizer must be given: {where} has no input_ids, but {[*row]}.")
    texts = tokenize([dict(row)], tokenizer, max_length=max_length, packing=False)
    if len(texts) != 1:
        raise ValueError(f"{where} gives {len(texts)} texts, of which one must be meant.")
    return {name: texts[0][name].tolist() for name in ("input_ids", "labels")}


def _places(row: Mapping[str, Any], column: str, where: str) -> Iterator[dict[int, float]]:
    """The atoms at each place with their log-probabilities; none where nothing is known."""
    if row.get(column) is None:
        raise ValueError(f"{where} has no column {column!r}; it has {[*row]}.")
    if not _is_listing(row[column]):
        got = f"{str(row[column]):.60}"
        raise ValueError(f"{where}: {column} must hold a list for each place; got {got}.")
    masks = row.get("target_mask")
    for place, values in enumerate(row[column]):
        if not values or (masks is not None and not any(masks[place])):
            yield {}
            continue
        if isinstance(values[0], Mapping):
            pairs = [(it["token"].removeprefix("token_id:"), it["logprob"]) for it in values]
        elif row.get("target_token_ids") is None:
            raise ValueError(f"{where} has no column 'target_token_ids'; it has {[*row]}.")
        else:
            pairs = zip(row["target_token_ids"][place], values, strict=True)
        yield {int(token): float(logp) for token, logp in pairs if logp > -math.inf}


def _is_listing(column: Any) -> bool:
    """True for a list of lists, of which some may be None."""

    def is_list(value: Any) -> bool:
        return isinstance(value, Iterable) and not isinstance(value, str | Mapping)

    return is_list(column) and all(it is None or is_list(it) for it in column)


def _checked(
    places: Iterable[dict[int, float]], where: str, vocab: int
) -> Iterator[dict[int, float]]:
    """The same, once their atoms are seen to be tokens with log-probabilities."""
    for place, atoms in enumerate(places):
        wrong = [it for it in atoms.items() if not (0 <= it[0] < vocab and it[1] <= 1e-2)]
        if wrong:
            token, logp = wrong[0]
            raise ValueError(
                f"{where}: place {place} holds token {token} with log-probability {logp}; "
                f"expected a token below {vocab} and at most 0."
            )
        yield atoms


def _offset(places: list[dict[int, float]], tokens: list[int], where: str) -> int:
    """Position of the token that the first place is of: where the tokens are among the atoms."""

    def agreement(offset: int) -> float:
        met = [
            tokens[position] in atoms
            for position, atoms in enumerate(places, offset)
            if atoms and position < len(tokens)
        ]
        return sum(met) / max(len(met), 1) if 2 * len(met) >= present else 0.0

    present = sum(map(bool, places))
    end = max(len(tokens) - len(places), 0)
    candidates = range(max(end - MAX_OFFSET, 0), end + 2)
    best = max(candidates, key=agreement)
    if present and agreement(best) < MIN_AGREEMENT:
        raise ValueError(
            f"{where}: the log-probabilities of {len(places)} places do not fit its "
            f"{len(tokens)} tokens: at best {agreement(best):.0%} of its tokens are among them. "
            "Is it the tokenizer and the template that they were made with?"
        )
    return best

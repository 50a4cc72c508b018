"""A teacher's top-k log-probabilities as others have published them, beside the rows."""

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rkl.distill import captures
from rkl.distill.batches import PadRows, shifted
from rkl.distill.cache import row_keys
from rkl.distill.data import IGNORED, tokenize
from rkl.distill.known import distinct_atoms
from rkl.distill.limits import check_count
from rkl.distill.teachers import Teacher
from rkl.estimators import TopK
from rkl.runs import fingerprint

MIN_AGREEMENT = 0.5  # share of places whose own token is among the atoms, where rows fit
MAX_OFFSET = 4  # tokens that a template may put behind the last one with log-probabilities
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
    :func:`cache_teacher`, in whose folder they are mapped from the disk.

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
        rows: Iterable[Mapping[str, Any]],
        *,
        vocab: int,
        column: str = "target_logprobs",
        tokenizer: PreTrainedTokenizerBase | None = None,
        max_length: int = 1024,
        compression: Mapping[str, Any] | str | os.PathLike | None = None,
    ):
        check_count("vocab", vocab)
        self.vocab, self.rows = vocab, []
        self._known: dict[str, list[dict[int, float]]] = {}
        how = None if compression is None else captures.read_compression(compression)
        for number, whole in enumerate(rows):
            for row in [whole] if how is None else captures.apart(whole):
                if how is None:
                    atoms = _places(row, column, number)
                else:
                    atoms = captures.places_of(row, how, number)
                places = [*_checked(atoms, number, vocab)]
                rest = {name: it for name, it in row.items() if name not in _COLUMNS | {column}}
                tokens = _tokens(rest, tokenizer, max_length, number)
                self._add(tokens, places, number)
        if not self.rows:
            raise ValueError("rows must give a token with log-probabilities; got none.")

    def _add(self, row: dict[str, list[int]], places: list[dict[int, float]], number: int) -> None:
        offset = _offset(places, row["input_ids"], number)
        atoms = dict(enumerate(places, offset))  # by the position of the token that they are of
        labels = [
            label if position and atoms.get(position) else IGNORED
            for position, label in enumerate(row["labels"])
        ]
        chosen = [position for position, label in enumerate(labels) if label != IGNORED]
        if chosen:
            self.rows.append({"input_ids": row["input_ids"], "labels": labels})
            self._known[_key(self.rows[-1])] = [atoms[position] for position in chosen]

    def __str__(self) -> str:
        told = fingerprint(repr(it).encode() for it in self._known.items())
        return f"log-probabilities of {len(self._known):,} rows, sha256 {told}"

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


def _key(row: dict[str, list[int]]) -> str:
    batch = shifted(PadRows()([row]))
    return row_keys(batch.inputs, batch.predicting)[0]


def _tokens(
    row: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase | None,
    max_length: int,
    number: int,
) -> dict[str, list[int]]:
    """The tokens of a row, and their labels."""
    if "input_ids" in row:
        tokens = [*map(int, row["input_ids"])]
        return {"input_ids": tokens, "labels": [*map(int, row.get("labels", tokens))]}
    if tokenizer is None:
        raise ValueError(f"tokenizer must be given: row {number} has no input_ids, but {[*row]}.")
    texts = tokenize([dict(row)], tokenizer, max_length=max_length, packing=False)
    if len(texts) != 1:
        raise ValueError(f"row {number} gives {len(texts)} texts, of which one must be meant.")
    return {name: texts[0][name].tolist() for name in ("input_ids", "labels")}


def _places(row: Mapping[str, Any], column: str, number: int) -> Iterator[dict[int, float]]:
    """The atoms at each place with their log-probabilities; none where nothing is known."""
    if row.get(column) is None:
        raise ValueError(f"row {number} has no column {column!r}; it has {[*row]}.")
    masks = row.get("target_mask")
    for place, values in enumerate(row[column]):
        if not values or (masks is not None and not any(masks[place])):
            yield {}
            continue
        if isinstance(values[0], Mapping):
            pairs = [(it["token"].removeprefix("token_id:"), it["logprob"]) for it in values]
        elif row.get("target_token_ids") is None:
            raise ValueError(f"row {number} has no column 'target_token_ids'; it has {[*row]}.")
        else:
            pairs = zip(row["target_token_ids"][place], values, strict=True)
        yield {int(token): float(logp) for token, logp in pairs if logp > -math.inf}


def _checked(
    places: Iterable[dict[int, float]], number: int, vocab: int
) -> Iterator[dict[int, float]]:
    """The same, once their atoms are seen to be tokens with log-probabilities."""
    for place, atoms in enumerate(places):
        wrong = [it for it in atoms.items() if not (0 <= it[0] < vocab and it[1] <= 1e-2)]
        if wrong:
            token, logp = wrong[0]
            raise ValueError(
                f"row {number}: place {place} holds token {token} with log-probability {logp}; "
                f"expected a token below {vocab} and at most 0."
            )
        yield atoms


def _offset(places: list[dict[int, float]], tokens: list[int], number: int) -> int:
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
            f"row {number}: the log-probabilities of {len(places)} places do not fit its "
            f"{len(tokens)} tokens: at best {agreement(best):.0%} of its tokens are among them. "
            "Is it the tokenizer and the template that they were made with?"
        )
    return best

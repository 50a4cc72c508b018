"""Batches of labelled rows: padded to one length, their labels put where they are predicted."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rkl.distill.text.data import IGNORED, TEACHER_IDS, TEACHER_LABELS

SOURCES = "sources"  # a column of batches: who wrote each token
TEACHER_MASK = "teacher_attention_mask"  # another, beside those of data: what the teacher reads
OF_TEACHER = TEACHER_IDS, TEACHER_MASK, TEACHER_LABELS
ROUTE = "teacher_of_row"  # another: the number of each row's teacher, where there are several
DATA, STUDENT, TEACHER = 0, 1, 2  # its values


class Batch(NamedTuple):
    """A batch, its labels taken out and shifted to the positions that predict them."""

    inputs: dict[str, Any]
    predicting: Bool[Tensor, "rows steps"]
    targets: Int[Tensor, " tokens"]


def shifted(inputs: Mapping[str, Any]) -> Batch:
    """Take the labels out of a batch; the first token of a row is never predicted."""
    if inputs.get("labels") is None:
        raise ValueError(
            f"the batch must have labels, {IGNORED} where a token is not trained on; "
            f"got {', '.join(inputs)}."
        )
    others = "labels", SOURCES, ROUTE, *OF_TEACHER
    rest = {name: value for name, value in inputs.items() if name not in others}
    labels = inputs["labels"][:, 1:]
    predicting = labels != IGNORED
    return Batch(rest, predicting, labels[predicting])


def for_teacher(
    batch: Batch, inputs: Mapping[str, Any], *, routed: bool
) -> tuple[dict[str, Any], Bool[Tensor, "rows steps"]]:
    """The inputs that a teacher reads for a batch, and the places where it predicts the targets.

    Args:
        batch: As the student reads it.
        inputs: All columns of it.
        routed: Whether the teacher wants the number of each row's teacher.
    """
    read, predicting = batch.inputs, batch.predicting
    if TEACHER_IDS in inputs:
        read = {"input_ids": inputs[TEACHER_IDS], "attention_mask": inputs[TEACHER_MASK]}
        labels = inputs[TEACHER_LABELS][:, 1:]
        predicting = labels != IGNORED
        alike = torch.equal(predicting.sum(1), batch.predicting.sum(1))
        if not alike or not torch.equal(labels[predicting], batch.targets):
            raise ValueError(
                f"{TEACHER_LABELS} must be the tokens of labels, row by row: those that teacher "
                "and student are compared at."
            )
    if routed and ROUTE in inputs:
        read = read | {ROUTE: inputs[ROUTE]}
    return read, predicting


def teacher_prompts_in(
    batch: Mapping[str, Any], prompts: Sequence[Sequence[int]]
) -> list[list[int]] | None:
    """The prompts that the teacher reads in place of the student's; None where it reads these.

    Args:
        batch: Of the data.
        prompts: The student's prompts in its first rows.
    """
    if TEACHER_IDS not in batch:
        return None
    found = []
    columns = (batch[name] for name in ("labels", *OF_TEACHER))
    for prompt, labels, ids, mask, of_teacher in zip(prompts, *columns, strict=False):
        before = int((labels[1 : len(prompt)] != IGNORED).sum())
        trained = (of_teacher[1:] != IGNORED).nonzero()[:, 0] + 1
        stop = int(trained[before]) if before < len(trained) else int(mask.sum())
        found.append(ids[:stop].tolist())
    return found


def attended(inputs: Mapping[str, Any]) -> Bool[Tensor, "rows positions"]:
    """Mask of the text in a batch, without padding.

    Without a mask texts are told apart by positions, and padding is at position 0 with nothing
    behind it. So is a text of one token, which has nothing to predict.
    """
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    if mask is not None and mask.ndim == 2:
        return mask.bool()
    if mask is not None or positions is None:
        return torch.ones_like(inputs["input_ids"], dtype=torch.bool)
    following = torch.cat([positions[:, 1:], torch.zeros_like(positions[:, :1])], 1)
    return (positions > 0) | (following == 1)


def texts_of(inputs: Mapping[str, Any]) -> Iterator[tuple[int, list[int]]]:
    """The row of each text of a batch, and its places there."""
    there = attended(inputs)
    positions = None if inputs.get("attention_mask") is not None else inputs.get("position_ids")
    for row in range(len(there)):
        places = there[row].nonzero()[:, 0].tolist()
        starts = [0]
        if positions is not None:
            starts = [at for at, it in enumerate(places) if positions[row, it] == 0] or [0]
        for start, end in zip(starts, [*starts[1:], len(places)], strict=True):
            if places[start:end]:
                yield row, places[start:end]


def sources_of(inputs: Mapping[str, Any], batch: Batch) -> Int[Tensor, " tokens"] | None:
    """The source of each target of a batch; None where all are of the data set."""
    sources = inputs.get(SOURCES)
    return None if sources is None else sources[:, 1:][batch.predicting]


@dataclass(frozen=True)
class PadRows:
    """A collator: rows of tokens cut to one length, then padded on the right.

    Rows with ``position_ids``, or with ``seq_lengths`` as TRL packs them, hold several texts that
    must not see one another: models of transformers tell them apart by positions that begin anew,
    but only where there is no attention mask. So they get none (padding at the right end is
    seen by nothing that counts), and the first token of each text is not trained on.

    Rows may have ``teacher_input_ids`` and ``teacher_labels``, the text that the teacher reads in
    place of the student's; None where it reads that. Its labels must be the row's, token by token.

    Columns of text or of single numbers, such as the name of a row, are left out.

    Args:
        pad_token_id: What stands where a row has ended; it is neither attended nor trained on.
        max_length: Tokens that are kept of each row; None keeps all.
    """

    pad_token_id: int = 0
    max_length: int | None = None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        filling = {"input_ids": self.pad_token_id, "labels": IGNORED}
        prompted = any(row.get(TEACHER_IDS) is not None for row in rows)
        texts = [(row.get(TEACHER_IDS), row.get(TEACHER_LABELS)) for row in rows]
        rows = [_with_positions(row) for row in rows]
        packed = any("position_ids" in row for row in rows)
        if packed:  # a row without positions is one text
            rows = [{"position_ids": range(len(row["input_ids"])), **row} for row in rows]
        if not packed or any("attention_mask" in row for row in rows):
            rows = [{"attention_mask": [1] * len(row["input_ids"]), **row} for row in rows]
        if prompted and packed:
            raise ValueError(f"{TEACHER_IDS} goes with rows of one text; got position_ids.")
        cut = {
            name: [torch.as_tensor(row[name])[: self.max_length] for row in rows]
            for name, value in rows[0].items()
            if name not in OF_TEACHER and _has_entries(value)
        }
        if prompted:
            read = [
                _aligned(ids, labels, own, wanted)
                for (ids, labels), own, wanted in zip(
                    texts, cut["input_ids"], cut["labels"], strict=True
                )
            ]
            cut[TEACHER_IDS] = [ids for ids, _ in read]
            cut[TEACHER_MASK] = [torch.ones_like(ids) for ids, _ in read]
            cut[TEACHER_LABELS] = [labels for _, labels in read]
            filling |= {TEACHER_IDS: self.pad_token_id, TEACHER_LABELS: IGNORED}
        return {
            name: pad_sequence(column, batch_first=True, padding_value=filling.get(name, 0))
            for name, column in cut.items()
        }


def _has_entries(value: Any) -> bool:
    return (isinstance(value, Sequence) and not isinstance(value, str | bytes)) or (
        getattr(value, "ndim", 0) > 0
    )


def _aligned(ids: Any, labels: Any, own: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """The text that a teacher reads, cut behind the last token that the student is trained on."""
    if ids is None:
        return own, wanted
    if labels is None or len(ids) != len(labels):
        raise ValueError(f"{TEACHER_LABELS} must have a label for each of {TEACHER_IDS}.")
    ids, labels = torch.as_tensor(ids), torch.as_tensor(labels).clone()
    labels[:1] = IGNORED
    places, targets = (labels != IGNORED).nonzero()[:, 0], wanted[1:][wanted[1:] != IGNORED]
    if not torch.equal(labels[places[: len(targets)]], targets):
        raise ValueError(
            f"{TEACHER_LABELS} must be the tokens of labels, those that teacher and student are "
            f"compared at; got {labels[places].tolist()} beside {targets.tolist()}."
        )
    if not len(targets):
        return ids, torch.full_like(labels, IGNORED)
    stop = int(places[len(targets) - 1]) + 1
    return ids[:stop], labels[:stop]


def _with_positions(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row whose texts are told apart by positions alone, and are not predicted from another."""
    row = dict(row)
    lengths = row.pop("seq_lengths", None)
    if lengths is not None and "position_ids" not in row:
        total, tokens = int(sum(lengths)), len(row["input_ids"])
        if total != tokens:
            raise ValueError(
                f"seq_lengths must add up to the {tokens} tokens of the row; got {total}."
            )
        row["position_ids"] = torch.cat([torch.arange(int(it)) for it in lengths])
    if "position_ids" in row and "labels" in row and "attention_mask" not in row:
        first = torch.as_tensor(row["position_ids"]) == 0
        row["labels"] = torch.as_tensor(row["labels"]).masked_fill(first, IGNORED)
    return row

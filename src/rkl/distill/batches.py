"""Batches of labelled rows: padded to one length, their labels put where they are predicted."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rkl.distill.data import IGNORED

SOURCES = "sources"  # a column of batches: who wrote each token
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
    rest = {
        name: value for name, value in inputs.items() if name not in ("labels", SOURCES, ROUTE)
    }
    labels = inputs["labels"][:, 1:]
    predicting = labels != IGNORED
    return Batch(rest, predicting, labels[predicting])


def for_teacher(
    batch: Batch, inputs: Mapping[str, Any], *, routed: bool
) -> tuple[dict[str, Any], Bool[Tensor, "rows steps"]]:
    """What a teacher reads of a batch, and where it predicts the targets.

    Args:
        batch: As the student reads it.
        inputs: All columns of it.
        routed: Whether the teacher wants the number of each row's teacher.
    """
    read = batch.inputs
    if routed and ROUTE in inputs:
        read = read | {ROUTE: inputs[ROUTE]}
    return read, batch.predicting


def attended(inputs: Mapping[str, Any]) -> Bool[Tensor, "rows positions"]:
    """Where a batch holds text, and not padding.

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


def sources_of(inputs: Mapping[str, Any], batch: Batch) -> Int[Tensor, " tokens"] | None:
    """Who wrote each target of a batch; None where all are of the data set."""
    sources = inputs.get(SOURCES)
    return None if sources is None else sources[:, 1:][batch.predicting]


@dataclass(frozen=True)
class PadRows:
    """A collator: rows of tokens cut to one length, then padded on the right.

    Rows with ``position_ids``, or with ``seq_lengths`` as TRL packs them, hold several texts that
    must not see one another: models of transformers tell them apart by positions that begin anew,
    but only where there is no attention mask. So they get none (padding at the right end is
    seen by nothing that counts), and the first token of each text is not trained on.

    Args:
        pad_token_id: What stands where a row has ended; it is neither attended nor trained on.
        max_length: Tokens that are kept of each row; None keeps all.
    """

    pad_token_id: int = 0
    max_length: int | None = None

    def __call__(self, rows: list[Mapping[str, Any]]) -> dict[str, Tensor]:
        filling = {"input_ids": self.pad_token_id, "labels": IGNORED}
        rows = [_with_positions(row) for row in rows]
        packed = any("position_ids" in row for row in rows)
        if packed:  # a row without positions is one text
            rows = [{"position_ids": range(len(row["input_ids"])), **row} for row in rows]
        if not packed or any("attention_mask" in row for row in rows):
            rows = [{"attention_mask": [1] * len(row["input_ids"]), **row} for row in rows]
        return {
            name: pad_sequence(
                [torch.as_tensor(row[name])[: self.max_length] for row in rows],
                batch_first=True,
                padding_value=filling.get(name, 0),
            )
            for name in rows[0]
        }


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

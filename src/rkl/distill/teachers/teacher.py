"""Teachers: the protocol, a model, and the base below the student's own adapters."""

import abc
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from transformers import (
    PreTrainedTokenizerBase,
)

from rkl.distill.known import Observed
from rkl.distill.models.heads import Head, read_head
from rkl.distill.models.lora import adapters_off, is_adapted


class Teacher(abc.ABC):
    """Whatever can say, of the tokens that a batch predicts, how probable each atom is.

    To write one, give it

    - ``vocab``, the number of its atoms;
    - ``observe``, which says what is known of p at the predicted tokens of a batch;
    - ``model``, where it is a model of transformers, which can then write text (``seq_kd``);
    - ``reads_any_text = False``, where it can observe the rows of one data set alone.
    """

    vocab: int
    model: nn.Module | None = None
    reads_any_text: bool = True
    needs_rows_apart: bool = False  # whether it knows rows that have a block each alone
    is_routed: bool = False  # whether it wants the number of each row's teacher with a batch

    def check_rows(self, rows: Any, max_length: int | None = None) -> None:
        """Refuse rows that it cannot observe; most teachers can observe any."""
        return

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse a student's tokenizer that it does not share, where it knows its own."""
        return

    def follow(self, step: int) -> None:
        """Change with the student, after a step of it; most teachers stay as they are."""
        return

    def save(self, folder: Path) -> None:
        """Keep in a checkpoint what has changed of it since the beginning."""
        return

    def load(self, folder: Path) -> None:
        """Go on as a checkpoint left it."""
        return

    def writing(self) -> AbstractContextManager:
        """While this lasts, ``model`` writes as the teacher does."""
        return nullcontext()

    @abc.abstractmethod
    def observe(
        self,
        inputs: Mapping[str, Any],
        predicting: Bool[Tensor, "rows steps"],
        *,
        vocab: int | None = None,
    ) -> Observed:
        """The distribution p as far as it is known, constant to autograd, row after row.

        Logits or the head that yields them; or, at temperature 1,

        - an :class:`rkl.TopK` of the likeliest atoms, which servers give: both distributions are
          coarsened to these atoms and the rest. Tokens with fewer atoms than others are filled
          up with log-probability -inf at any index not used yet;
        - a :class:`rkl.Sampled` of atoms drawn from p: the loss is then an unbiased estimate.

        Args:
            inputs: The batch as the student gets it, without its labels.
            predicting: Where the next token is one to compare; of all positions but the last.
            vocab: How many atoms to keep, from the first on.
        """


class ModelTeacher(Teacher):
    """A model, run beside the student in its own mode and precision, and left as it was."""

    def __init__(self, model: nn.Module):
        self.head = read_head(model, "teacher")
        self.vocab, self.model = self.head.vocab, model

    def observe(self, inputs, predicting, *, vocab=None):
        return self.head.observe(inputs, predicting, vocab=vocab)


class AdapterBase(Teacher):
    """The base model below a PEFT student's adapters: no second copy of its weights.

    Args:
        head: The head of the student, a PeftModel.
    """

    def __init__(self, head: Head):
        if not is_adapted(head.model):
            raise ValueError(
                "teacher='base' needs a PEFT student, whose adapters can be switched off; "
                f"got a {type(head.model).__name__}."
            )
        self.head = head
        self.vocab, self.model = head.vocab, head.model

    def writing(self):
        return adapters_off(self.model)

    def observe(self, inputs, predicting, *, vocab=None):
        with self.writing():
            return self.head.observe(inputs, predicting, vocab=vocab)


def check_teacher(teacher: Any) -> None:
    """Refuse what is no teacher, with a TypeError."""
    if teacher != "base" and not isinstance(teacher, nn.Module | Teacher):
        raise TypeError(
            f"teacher must be a model, 'base' or a rkl.distill.Teacher; got {teacher!r}. "
            "rkl.distill.load_model gives a model."
        )


def as_teacher(
    teacher: nn.Module | str | Teacher, student: Head, device: str | torch.device
) -> Teacher:
    """A teacher, made of a model or of the base of the student's adapters where it is none."""
    check_teacher(teacher)
    if isinstance(teacher, Teacher):
        return teacher
    if isinstance(teacher, str):
        return AdapterBase(student)
    if getattr(teacher, "hf_device_map", None) is None:
        teacher.to(device)
    return ModelTeacher(teacher)

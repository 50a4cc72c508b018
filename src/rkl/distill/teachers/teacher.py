"""Teachers: the protocol, a model, and the base below the student's own adapters."""

import abc
import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from transformers import (
    PreTrainedTokenizerBase,
)

from rkl.distill.known import Known, Observed
from rkl.distill.models.heads import Head, read_head
from rkl.distill.models.lora import adapters_off, is_adapted
from rkl.distill.writing.rollouts import ModelWriter, Writer
from rkl.distill.writing.sampling import Sampling
from rkl.divergences import Divergence


class Teacher(abc.ABC):
    """Whatever can say, of the tokens that a batch predicts, how probable each atom is.

    To write one, give it

    - ``vocab``, the number of its atoms;
    - ``observe``, which says what is known of p at the predicted tokens of a batch;
    - ``model``, where it is a model of transformers, which can then write text (``seq_kd``);
    - ``reads_any_text = False``, where it can observe the rows of one data set alone;
    - ``shares_tokens = False`` and ``student_view``, where its atoms are not the student's tokens.
    """

    vocab: int
    model: nn.Module | None = None
    reads_any_text: bool = True
    needs_rows_apart: bool = False  # whether it knows rows that have a block each alone
    is_routed: bool = False  # whether it wants the number of each row's teacher with a batch
    shares_tokens: bool = True  # whether it reads and writes the student's tokens

    def check_rows(self, rows: Any, max_length: int | None = None) -> None:
        """Refuse rows that it cannot observe; most teachers can observe any."""
        return

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse a student's tokenizer that it does not share, where it knows its own."""
        return

    def check_divergence(self, divergence: Divergence) -> None:
        """Refuse a divergence that means nothing on what it tells; most take any."""
        return

    def student_view(
        self, q: Known, inputs: Mapping[str, Any], predicting: Bool[Tensor, "rows steps"]
    ) -> Known:
        """The student's distributions over the atoms that ``observe`` tells of, differentiable.

        Most teachers tell of the student's own tokens, and so leave them as they are. One that
        does not gives a row for each predicted token too; where a token is not to be compared,
        both give the same one atom all mass.

        Args:
            q: What is known of the student at the predicted tokens.
            inputs: What ``observe`` got.
            predicting: What ``observe`` got.
        """
        return q

    def figures(
        self, inputs: Mapping[str, Any], predicting: Bool[Tensor, "rows steps"]
    ) -> dict[str, tuple[float, float]]:
        """Figures of a batch for the log: a sum and a count for each of the same names."""
        return {}

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

    def writer(
        self,
        sampling: Sampling,
        ends: Sequence[int],
        *,
        context: float = math.inf,
        vocab: int | None = None,
        banned: Collection[int] = (),
    ) -> Writer:
        """A writer of the teacher's text, in the student's tokens, where it has a ``model``.

        Args:
            sampling: How tokens are drawn.
            ends: The student's tokens that end a reply.
            context: Most tokens of a prompt and its reply together.
            vocab: Only the student's tokens below this one are written.
            banned: Tokens of the student's that are never written.
        """
        how: Any = {"context": context, "vocab": vocab, "banned": banned}
        return ModelWriter(cast(nn.Module, self.model), sampling, ends, around=self.writing, **how)

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

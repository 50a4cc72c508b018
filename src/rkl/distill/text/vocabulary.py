"""The tokens that teacher and student share, and a check that the data contain no others."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

MAX_DIFFERING = 0.05  # share of the tokens in which two versions of one tokenizer may differ
MAX_NAMED = 3  # tokens named in a message
SAMPLE = 64  # passages that both tokenizers are to split alike


@dataclass(frozen=True)
class Vocabulary:
    """The atoms that a teacher and a student share.

    Attributes:
        size: How many, from the first on.
        differing: What stands at a number for the teacher and for the student, where that is not
            the same; None where a tokenizer has no such token.
    """

    size: int
    differing: Mapping[int, tuple[str | None, str | None]] = field(default_factory=dict)

    def foreign(self, tokens: Int[Tensor, "*shape"]) -> Bool[Tensor, "*shape"]:
        """Mask of tokens outside the shared vocabulary."""
        numbers = torch.tensor(sorted(self.differing), dtype=tokens.dtype, device=tokens.device)
        return (tokens >= self.size) | torch.isin(tokens, numbers)

    def check(self, name: str, tokens: Int[Tensor, " tokens"]) -> None:
        """Refuse data that use tokens which teacher and student do not share.

        Raises:
            ValueError: They do; some are named.
        """
        found = tokens.unique()
        found = found[self.foreign(found)].tolist()
        if found:
            raise ValueError(
                f"{name}: {len(found):,} of its tokens are not the same for teacher and student, "
                f"so that their probabilities cannot be compared: {self._named(found)}. Expected "
                f"tokens that both tokenizers have at the same number, below {self.size:,}."
            )

    def told(self) -> str:
        """In which tokens the two differ, and what is compared, as a warning says it."""
        return (
            f"The tokenizers of teacher and student differ in {len(self.differing):,} tokens, "
            f"none of which the data use: {self._named(sorted(self.differing))}. The first "
            f"{self.size:,} tokens are compared."
        )

    def _named(self, numbers: list[int]) -> str:
        words = []
        for number in numbers[:MAX_NAMED]:
            teacher, student = self.differing.get(number, (None, None))
            if teacher is None and student is None:
                words.append(f"{number} (one of the models has no logit for it)")
            else:
                sides = (
                    f"none in the {name}'s" if token is None else f"{token!r} in the {name}'s"
                    for name, token in (("teacher", teacher), ("student", student))
                )
                words.append(f"{number} ({', '.join(sides)})")
        more = len(numbers) - MAX_NAMED
        return "; ".join(words) + (f"; and {more:,} more" if more > 0 else "")


def share_vocabulary(
    teacher: int,
    student: int,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
    student_tokenizer: PreTrainedTokenizerBase | None = None,
) -> Vocabulary:
    """The atoms that the teacher and the student share, from the first on.

    Vocabularies are often padded, to different sizes, with rows that stand for no token: then
    the atoms are the tokenizer's tokens. Versions of one tokenizer that differ in a few tokens,
    such as a padding token added or a reserved one renamed, share the others; different
    tokenizers are refused.

    Args:
        teacher: The teacher's number of logits.
        student: The student's number of logits.
        teacher_tokenizer: The teacher's tokenizer, where it is at hand.
        student_tokenizer: The student's tokenizer, where it is at hand.
    """
    logits = min(teacher, student)
    found = [_by_number(it) for it in (teacher_tokenizer, student_tokenizer) if it is not None]
    if not found:
        if teacher == student:
            return Vocabulary(student)
        raise ValueError(
            f"teacher has {teacher} logits but the student {student}, and no tokenizer says which "
            "of them are tokens. Pass processing_class, the tokenizer that both of them use."
        )
    one, other = found[0], found[-1]
    shared = min(max(one), max(other)) + 1
    differing = {
        number: (one.get(number), other.get(number))
        for number in sorted(one.keys() | other.keys())
        if one.get(number) != other.get(number)
    }
    if len(differing) > MAX_DIFFERING * shared:
        names = sorted({it for pair in differing.values() for it in pair if it is not None})
        raise ValueError(
            f"teacher and student must share a tokenizer; theirs differ in {len(names)} tokens, "
            f"{names[0]!r} among them, so that their probabilities cannot be compared. Two "
            "tokenizers are compared with teacher_alignment (--teacher-alignment bytes)."
        )
    if logits < (1 - MAX_DIFFERING) * shared:
        raise ValueError(
            f"teacher has {teacher} logits and the student {student}, fewer than the {shared} "
            "tokens of the tokenizer; teacher and student must share one."
        )
    if teacher == student and not differing:
        return Vocabulary(student)
    return Vocabulary(min(shared, logits), differing)


def common_vocabulary(
    teacher: int,
    student: int,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
    student_tokenizer: PreTrainedTokenizerBase | None = None,
) -> int:
    """Number of atoms that :func:`share_vocabulary` finds."""
    return share_vocabulary(teacher, student, teacher_tokenizer, student_tokenizer).size


def check_splits_alike(
    passages: list[list[int]],
    teacher: PreTrainedTokenizerBase,
    student: PreTrainedTokenizerBase,
) -> str:
    """Refuse tokenizers that split most of some passages differently.

    Two tokenizers of the same tokens may still differ, as where one of them lower-cases: the
    teacher would then read tokens that it has never seen.

    Args:
        passages: Tokens of the student's tokenizer.
        teacher: The teacher's tokenizer.
        student: The student's tokenizer.

    Returns:
        A warning where some passages are split differently, else an empty text.
    """
    if teacher is student or _written_out(teacher) == _written_out(student) is not None:
        return ""
    differing, first = 0, ""
    for passage in passages:
        # A block may begin or end within a character, of which bytes alone are no text.
        text = str(student.decode(passage, skip_special_tokens=True)).strip("\ufffd")
        ours: Any = student(text, add_special_tokens=False)["input_ids"]
        theirs: Any = teacher(text, add_special_tokens=False)["input_ids"]
        if ours != theirs:
            differing += 1
            first = first or _first_difference(ours, theirs, student, teacher)
    if not differing:
        return ""
    words = (
        f"the tokenizers of teacher and student split {differing} of {len(passages)} passages "
        f"of the data differently: {first}"
    )
    if differing > math.ceil(len(passages) / 2):
        raise ValueError(
            f"teacher and student must share a tokenizer; {words}. The teacher would read tokens "
            "that its own tokenizer does not make. Two tokenizers are compared with "
            "teacher_alignment (--teacher-alignment bytes)."
        )
    return f"{words[0].upper()}{words[1:]}. The student's is used."


def _by_number(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    return {number: token for token, number in tokenizer.get_vocab().items()}


def _written_out(tokenizer: Any) -> str | None:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return None if backend is None else backend.to_str()


def _first_difference(ours: Any, theirs: Any, student: Any, teacher: Any) -> str:
    pairs = zip(ours, theirs, strict=False)
    place = next((at for at, (it, other) in enumerate(pairs) if it != other), 0)
    sides = (
        f"{tokenizer.convert_ids_to_tokens(ids[place : place + MAX_NAMED])} by the {name}'s"
        for ids, tokenizer, name in ((theirs, teacher, "teacher"), (ours, student, "student"))
    )
    return ", ".join(sides)

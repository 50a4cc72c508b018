"""A student as its own teacher: as it began, as its moving average, or as it is now."""

import copy
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from rkl.distill.models.heads import Head, read_head
from rkl.distill.teachers.teacher import Teacher
from rkl.runs import save_tensors

KINDS = "base", "ema", "live"
FILE = "teacher.safetensors"  # of a checkpoint: the moving average


class SelfTeacher(Teacher):
    """The student itself, in evaluation mode and held constant.

    On the same text "live" gives the student's own distribution, but for its dropout, and "base"
    and "ema" begin there: the divergence then begins at 0. They pay where the loss has a term of
    labels, or the teacher lags behind.

    The moving average of weights in half precision is kept in single precision, and the copy has
    it rounded: a step of the average is often below what half precision can add to a weight.

    Args:
        student: The head of the student.
        kind: "base", a copy of it as it is now; "ema", a copy that follows it; "live", itself.
        device: Where the copy runs.
        rate: Share of the way to the student that the moving average goes at a time, in (0, 1].
        sync_steps: Steps between two of them.
    """

    def __init__(
        self,
        student: Head,
        kind: str,
        *,
        device: str | torch.device,
        rate: float = 0.05,
        sync_steps: int = 1,
    ):
        self.kind, self.rate, self.sync_steps = kind, rate, sync_steps
        self.student = student
        self.head = student
        if kind != "live":
            frozen = copy.deepcopy(student.model).to(device)
            frozen.requires_grad_(False)
            self.head = read_head(frozen, "teacher")
        self.vocab = student.vocab
        self.model: nn.Module | None = self.head.model
        weights = _distinct(self.head.model) if kind == "ema" else {}
        self._average = {
            name: it.to(torch.promote_types(it.dtype, torch.float32))
            for name, it in weights.items()
        }

    def observe(self, inputs, predicting, *, vocab=None):
        return self.head.observe(inputs, predicting, vocab=vocab)

    def follow(self, step: int) -> None:
        """Move the moving average towards the student, every so many steps."""
        if self.kind != "ema" or step % self.sync_steps:
            return
        student = _distinct(self.student.model)
        for name, mean in self._average.items():
            mean.lerp_(student[name].to(mean), self.rate)
        _copy(self._average, _distinct(self.head.model))

    def save(self, folder: Path) -> None:
        """Keep the moving average in a checkpoint."""
        if self.kind == "ema":
            save_tensors(folder / FILE, self._average)

    def load(self, folder: Path) -> None:
        """Go on with the moving average of a checkpoint."""
        if self.kind != "ema":
            return
        if not (folder / FILE).is_file():
            raise FileNotFoundError(
                f"teacher_model_kind: {folder} holds no moving average, {FILE}: it is not a "
                "checkpoint of a training with teacher_model_kind='ema'."
            )
        _copy(load_file(folder / FILE), self._average)
        _copy(self._average, _distinct(self.head.model))


def load_average(model: nn.Module, file: Path) -> None:
    """Give a model the weights of a moving average that a checkpoint holds."""
    _copy(load_file(file), _distinct(model))


def _copy(source: Mapping[str, torch.Tensor], target: Mapping[str, torch.Tensor]) -> None:
    """Copy tensors into those of the same names, in the precision of these."""
    for name, tensor in target.items():
        tensor.copy_(source[name])


def _distinct(model: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters, tied ones once."""
    return {name: it.detach() for name, it in model.named_parameters()}

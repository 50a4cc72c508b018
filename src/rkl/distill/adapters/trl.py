"""TRL: any divergence in its GKDTrainer and its DistillationTrainer, and their subclasses."""

import inspect
import math
from typing import Any

import torch
from torch import Tensor

from rkl.distill.adapters.shards import whole
from rkl.distill.limits import read_divergence
from rkl.distill.loss import distill_loss
from rkl.distill.models.heads import Head, read_head
from rkl.divergences import AKL, KL, Divergence
from rkl.estimators import LinearHead, per_token


class DivergenceMixin:
    """A mixin by which a TRL trainer minimises any divergence; ``beta`` is then ignored.

    Write ``class Mine(DivergenceMixin, GKDTrainer)``, or with ``DistillationTrainer``, and give
    ``Mine(..., divergence=AKL(mu=0.5))`` what the trainer takes. Sampling, logging, denominators
    and temperature stay TRL's: GKDTrainer's temperature is that of the sampling alone, and its
    denominator on text that the student wrote counts the tokens of the data set's.

    Args:
        *args: As for the trainer.
        divergence: A divergence, or its text, as ``rkl.parse`` reads it.
        **kwargs: As for the trainer.
    """

    def __init__(self, *args: Any, divergence: Divergence | str = AKL(), **kwargs: Any):
        self.divergence = read_divergence(divergence)
        super().__init__(*args, **kwargs)
        trainer: Any = self
        unwrap = trainer.accelerator.unwrap_model
        self._student_head = read_head(unwrap(trainer.model), "model")
        self._teacher_head = read_head(unwrap(trainer.teacher_model), "teacher_model")

    def generalized_jsd_loss(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor | None = None,
        beta: float = 0.5,
        temperature: float = 1.0,
        reduction: str = "batchmean",
        num_items_in_batch: int | Tensor | None = None,
    ) -> Tensor:
        """The loss of GKDTrainer, on labels at the positions that predict them."""
        if reduction != "batchmean":
            raise ValueError(f"reduction must be 'batchmean'; got {reduction!r}.")
        return distill_loss(
            teacher=teacher_logits,
            student=student_logits,
            divergence=self.divergence,
            labels=labels,
            shift=False,
            temperature=temperature,
            num_items_in_batch=num_items_in_batch,
        )

    def _compute_loss(
        self, unwrapped_student: Any, inputs: dict[str, Any], num_items_in_batch: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The loss of DistillationTrainer, the sum of the student's entropies, their number."""
        trainer: Any = self
        states = trainer._get_last_hidden_state
        parts = [
            torch.cat([inputs[f"prompt_{part}"], inputs[f"completion_{part}"]], 1)
            for part in ("ids", "mask")
        ]
        steps = inputs["completion_ids"].shape[1]
        more = {
            name: inputs[name] for name in inspect.signature(states).parameters if name in inputs
        }
        student = states(unwrapped_student, *parts, steps, **more)
        trainer.teacher_model.eval()
        teacher = trainer.accelerator.unwrap_model(trainer.teacher_model)
        with torch.no_grad():
            redirected = trainer._forward_redirection(
                trainer.teacher_model, teacher, states, teacher, *parts, steps, **more
            )
        mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
        q = _known(self._student_head, student)
        loss = distill_loss(
            teacher=_known(self._teacher_head, redirected),
            student=q,
            divergence=self.divergence,
            mask=mask,
            shift=False,
            temperature=trainer.temperature,
            num_items_in_batch=num_items_in_batch,
        )
        q = q._replace(hidden=q.hidden[mask != 0].detach(), temperature=trainer.temperature)
        return loss, _entropy(q), mask.sum()


def _known(head: Head, hidden: Tensor) -> LinearHead:
    """The head with the hidden states that TRL computes, in their precision."""
    if head.linear is None:
        raise ValueError(
            f"{type(head.model).__name__} has a head that cannot be read, so that hidden states "
            "say nothing of its logits. Take GKDTrainer, or rkl.distill.DistillTrainer."
        )
    weight, bias = (
        None if it is None else whole(it).to(hidden)
        for it in (head.linear.weight, head.linear.bias)
    )
    return LinearHead(hidden, weight, bias, head.scale, head.softcap)  # pyright: ignore[reportArgumentType]


def _entropy(known: LinearHead) -> Tensor:
    """Sum over tokens of the entropy, log V less the divergence from the uniform distribution."""
    tokens, vocab = len(known.hidden), len(known.weight)
    if not tokens:
        return known.hidden.new_zeros(())
    uniform = known.hidden.new_zeros(1, vocab).expand(tokens, vocab)
    values = per_token({"kl": KL()}, p=known, q=uniform)["kl"]
    return (math.log(vocab) - values).sum()

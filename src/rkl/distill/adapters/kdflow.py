"""KDFlow: any divergence by ``--kd_loss_fn``."""

from typing import Any

import torch
from torch import Tensor

from rkl.checks import choice
from rkl.distill.limits import read_divergence
from rkl.divergences import Divergence


def register(divergence: Divergence | str, name: str | None = None) -> Any:
    """Register a divergence with ``kdflow.loss.register_loss``, and return its loss.

    KDFlow imports the files in its folder ``kdflow/loss``: one of them, of two lines, calls this.
    ``--kd_loss_fn "akl(mu=0.3)"`` is then the divergence of that text. KDFlow's temperature
    counts, and its sum over tokens, denominator and ``kd_ratio``; its other settings do not.

    Args:
        divergence: A divergence, or its text, as ``rkl.parse`` reads it.
        name: What ``--kd_loss_fn`` calls it; by default its text.
    """
    from kdflow.loss import register_loss  # pyright: ignore[reportMissingImports]: a peer

    loss = loss_of(divergence)
    register_loss(str(divergence) if name is None else name)(loss)
    return loss


def loss_of(divergence: Divergence | str) -> Any:
    """The function that KDFlow calls, on logits [tokens, vocab], in nats per token."""
    value = read_divergence(divergence)

    def loss(
        student_logits: Tensor,
        teacher_logits: Tensor,
        temperature: float = 1.0,
        reduction: str = "none",
        **settings: Any,
    ) -> Tensor:
        choice("reduction", reduction, ("none", "mean", "sum"))
        q, p = (
            (it.to(torch.promote_types(it.dtype, torch.float32)) / temperature).log_softmax(-1)
            for it in (student_logits, teacher_logits.detach())
        )
        each = value(p, q)
        return each if reduction == "none" else getattr(each, reduction)()

    return loss

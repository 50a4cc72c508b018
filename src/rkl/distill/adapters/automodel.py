"""NeMo Automodel: the loss of its distillation recipe, for ``kd_loss_fn`` in YAML."""

from typing import Any

from torch import Tensor, nn

from rkl.distill.adapters.shards import whole
from rkl.distill.limits import read_divergence
from rkl.distill.loss import distill_loss
from rkl.divergences import Divergence


class KDLoss(nn.Module):
    """The interface of ``nemo_automodel.components.loss.kd_loss.KDLoss``, with any divergence.

    In YAML, ``kd_loss_fn`` with ``_target_: rkl.distill.KDLoss`` and ``divergence: akl(mu=0.5)``.
    With the default divergence it is Automodel's own loss, the square of the temperature included.
    Vocabularies that tensor parallelism has put into shards are gathered.

    Args:
        ignore_index: Label of a token that is not trained on.
        temperature: What the logits of both are divided by; the loss is multiplied by its square.
        fp32_upcast: Taken for the sake of a recipe: sums over the vocabulary are always taken in
            single precision or better.
        tp_group: Must be None; shards that are DTensors say themselves where the others are.
        chunk_size: Taken for the sake of a recipe: the loss keeps no probabilities.
        divergence: A divergence, or its text, as ``rkl.parse`` reads it.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        temperature: float = 1.0,
        fp32_upcast: bool = True,
        tp_group: Any = None,
        chunk_size: int = 0,
        divergence: Divergence | str = "kl",
    ):
        super().__init__()
        if tp_group is not None:
            raise ValueError(
                f"tp_group must be None; got {tp_group!r}. A divergence needs whole vocabularies, "
                "which DTensors are gathered to by themselves."
            )
        self.ignore_index, self.temperature = ignore_index, temperature
        self.fp32_upcast, self.tp_group, self.chunk_size = fp32_upcast, tp_group, chunk_size
        self.divergence = read_divergence(divergence)

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor,
        num_batch_labels: int | None = None,
    ) -> Tensor:
        """Mean over labels that count, or sum over ``num_batch_labels``, in nats.

        Labels lie at the positions that predict them, as the recipe puts them.
        """
        student, teacher, labels = map(whole, (student_logits, teacher_logits, labels))
        loss = distill_loss(
            teacher=teacher,
            student=student,
            divergence=self.divergence,
            labels=labels,
            shift=False,
            temperature=self.temperature,
            num_items_in_batch=num_batch_labels,
            ignore_index=self.ignore_index,
        )
        return loss * self.temperature**2

"""Axolotl: any divergence in its distillation from top-k log-probabilities, by a plugin.

In YAML, in the place of Axolotl's own ``KDPlugin``::

    plugins: [rkl.distill.adapters.axolotl.DivergencePlugin]
    kd_trainer: true
    kd_divergence: jensen-shannon(beta=0.3)
    kd_alpha: 0.9
    kd_ce_alpha: 0.1
    kd_temperature: 1.0

All else is Axolotl's: data, collators, servers, denominator. The classes are made when they are
asked for, as they are Axolotl's own with a part exchanged.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from rkl.distill.adapters.shards import whole
from rkl.distill.known import distinct_atoms, lost_in_the_rest
from rkl.distill.limits import read_divergence
from rkl.distill.loss import distill_loss
from rkl.distill.models.heads import Head, read_head
from rkl.divergences import KL, Divergence
from rkl.estimators import LinearHead, TopK


def __getattr__(name: str) -> Any:
    if name not in ("DivergencePlugin", "DivergenceArgs"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _classes()[name]


@functools.cache
def _classes() -> dict[str, type]:
    from axolotl.integrations import kd  # pyright: ignore[reportMissingImports]: a peer

    class DivergenceArgs(kd.KDArgs):
        """The settings of Axolotl's distillation, and the divergence."""

        kd_divergence: str = "kl"

    class DivergencePlugin(kd.KDPlugin):
        """Axolotl's plugin for distillation, with another loss."""

        def get_input_args(self) -> str:
            return f"{__name__}.DivergenceArgs"

        def get_trainer_cls(self, cfg: Any) -> Any:
            trainer = super().get_trainer_cls(cfg)
            return None if trainer is None else with_loss(trainer, cfg)

    return {"DivergenceArgs": DivergenceArgs, "DivergencePlugin": DivergencePlugin}


def with_loss(trainer: type, cfg: Any) -> type:
    """The trainer with the loss that a configuration asks for.

    Raises:
        ValueError: The configuration asks for what a divergence on a top k is not.
    """
    if cfg.kd_normalize_topk:
        raise ValueError(
            "kd_normalize_topk must be false with kd_divergence, which takes all tokens beyond "
            f"the top k as one; got {cfg.kd_normalize_topk!r}."
        )
    if cfg.kd_beta:
        raise ValueError(
            f"kd_beta must be left out beside kd_divergence; got {cfg.kd_beta!r}. Type "
            f"kd_divergence: jensen-shannon(beta={cfg.kd_beta})."
        )
    divergence = read_divergence(cfg.kd_divergence)

    class DivergenceTrainer(trainer):
        """The trainer whose loss reads the whole of the student's head: bias, scale, soft cap."""

        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs)
            own: Any = self
            self._kd_loss_fn = TopKLoss(
                divergence,
                read_head(own.accelerator.unwrap_model(own.model)),
                own.args.kd_temperature or 1.0,
                own.args.kd_alpha,
                own.args.kd_ce_alpha,
            )

    return DivergenceTrainer


class TopKLoss:
    """The interface of Axolotl's loss: a sum over tokens, in nats.

    α T² D + h CE, where D is on the k atoms and the rest as one. The distributions at
    temperature T are compared at the position where they lie; labels are shifted.

    Args:
        divergence: The divergence.
        head: The student's head.
        temperature: What the student's logits are divided by; the targets were already.
        alpha: Weight of the divergence.
        hard_label_weight: Weight of the cross-entropy on the labels.
    """

    def __init__(
        self,
        divergence: Divergence,
        head: Head,
        temperature: float = 1.0,
        alpha: float | None = 1.0,
        hard_label_weight: float | None = 0.0,
    ):
        if (reason := lost_in_the_rest(divergence)) is not None:
            raise ValueError(
                f"kd_divergence: {divergence} on the teacher's top k: {reason}, so that most of "
                "it may lie among the other tokens. Take kl or jensen-shannon."
            )
        if head.linear is None:
            raise ValueError(f"{type(head.model).__name__} has a head that cannot be read.")
        self.divergence, self.head, self.temperature = divergence, head, temperature
        self.alpha = 1.0 if alpha is None else alpha
        self.hard_label_weight = hard_label_weight or 0.0

    def __call__(
        self,
        lm_head_weight: Tensor,
        student_hidden_states: Tensor,
        target_token_ids: Tensor,
        target_logprobs: Tensor,
        target_mask: Tensor,
        true_labels: Tensor,
    ) -> Tensor:
        """The loss of a batch, of targets [rows, positions, k]."""
        bias = whole(self.head.linear.bias)  # pyright: ignore[reportOptionalMemberAccess]
        student = LinearHead(
            student_hidden_states, whole(lm_head_weight), bias, self.head.scale, self.head.softcap
        )
        present = target_mask.bool() & target_logprobs.isfinite()
        chosen = present.any(-1)
        index = distinct_atoms(target_token_ids[chosen], ~present[chosen], len(student.weight))
        logp = target_logprobs.float().masked_fill(~present, -torch.inf)[chosen]
        loss = (
            self.alpha
            * self.temperature**2
            * distill_loss(
                teacher=TopK(logp, index),
                student=student._replace(
                    hidden=student.hidden[chosen], temperature=float(self.temperature)
                ),
                divergence=self.divergence,
                num_items_in_batch=1,
            )
        )
        if not self.hard_label_weight:
            return loss
        labels = true_labels.clamp_min(0)[..., 1:, None]  # one atom has all the mass
        entropy = distill_loss(
            teacher=TopK(torch.zeros_like(labels, dtype=logp.dtype), labels),
            student=student._replace(hidden=student.hidden[:, :-1]),
            divergence=KL(),
            labels=true_labels[:, 1:],
            shift=False,
            num_items_in_batch=1,
        )
        return loss + self.hard_label_weight * entropy

"""What a student says of the same held-out text at some steps of its training."""

from collections.abc import Collection
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback

from rkl.distill.heads import inference


class Snapshots(TrainerCallback):
    """Records a student's distributions while it is trained, and takes no part in it.

    They are told by rank under the teacher: the token that the teacher finds likeliest first.

    Args:
        tokens: Rows of held-out text; the distributions are those behind each of its tokens.
        ranking: The atoms behind each token, in the teacher's order.
        one: Which of all tokens, row after row, is also shown by itself.
        at: The steps, 0 being before the first.

    Attributes:
        mean: At each step, q by rank, averaged over all tokens.
        single: The same for the one token.
    """

    def __init__(
        self,
        tokens: Int[Tensor, "rows length"],
        ranking: Int[Tensor, "tokens vocab"],
        *,
        one: int,
        at: Collection[int],
    ):
        self.tokens, self.ranking, self.one, self.at = tokens, ranking, one, at
        self.mean: dict[int, Tensor] = {}
        self.single: dict[int, Tensor] = {}

    def on_train_begin(self, args, state, control, model: Any = None, **kwargs):
        self._take(model, state.global_step)

    def on_step_end(self, args, state, control, model: Any = None, **kwargs):
        self._take(model, state.global_step)

    def _take(self, model: PreTrainedModel, step: int) -> None:
        if step in self.at:
            ranked = probabilities(model, self.tokens).gather(-1, self.ranking)
            self.mean[step], self.single[step] = ranked.mean(0), ranked[self.one]


def probabilities(
    model: PreTrainedModel, tokens: Int[Tensor, "rows length"]
) -> Float[Tensor, "tokens vocab"]:
    """What a model says of the token behind each of these, row after row, on the CPU."""
    with inference(model):
        logits = model(input_ids=tokens.to(model.device), use_cache=False).logits
    return logits.float().softmax(-1).flatten(0, 1).cpu()


def median_token(p: Float[Tensor, "tokens vocab"]) -> int:
    """The token at which a teacher is as sure as it mostly is: of median entropy."""
    entropy = torch.special.entr(p).sum(-1)
    return int((entropy == entropy.median()).nonzero()[0])

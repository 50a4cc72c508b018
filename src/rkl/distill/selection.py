"""The choice of the best evaluation, and the detection of divergence."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerState

from rkl.distill.models.sharded import is_finite

_largest: Any = torch._foreach_norm  # pyright: ignore[reportPrivateImportUsage]
PATIENCE = 10  # steps in a row without a finite loss before a run is stopped


class DivergedError(ArithmeticError):
    """A loss, a gradient or an evaluation is NaN, so that training on cannot help.

    Args:
        step: The step at which it was noticed, counted from 1; 0 before the first.
        reason: What was NaN, in words.
        advice: What else there is to say.
        sound: True if the weights before the step give finite logits on its batch.

    Attributes:
        remedy: What to try against it, in words.
    """

    when = "at"
    remedy = (
        "Try a smaller --learning-rate, or --max-gradient 1, and see that no weight of the "
        "teacher is NaN."
    )

    def __init__(self, step: int, reason: str, advice: str = "", *, sound: bool = False):
        when = f"{self.when} step {step:,}" if step else "before the first step"
        super().__init__(f"{reason} {when}. {advice}".strip())
        self.step, self.reason, self.sound = step, reason, sound


def rank(metrics: Mapping[str, Any], metric: str = "eval_loss") -> tuple[float, ...]:
    """The order of evaluations: NaN last, then fewer infinite tokens, then the smaller mean.

    >>> rank({"eval_loss": 0.5}) < rank({"eval_loss": math.inf, "eval_infinite_tokens": 1})
    True
    >>> rank({"eval_loss": math.inf}) < rank({"eval_loss": math.nan})
    True
    """
    loss, prefix = metrics[metric], metric.removesuffix("loss")
    if math.isnan(loss):
        return (1.0, math.inf, math.inf)
    if math.isfinite(loss):
        return (0.0, 0.0, loss)
    elsewhere = metrics.get(f"{prefix}finite_loss", math.inf)
    return (0.0, metrics.get(f"{prefix}infinite_tokens", math.inf), elsewhere)


def best_row(state: TrainerState, metric: str = "eval_loss") -> Mapping[str, Any] | None:
    """The log row of the best evaluation so far."""
    rows = (row for row in reversed(state.log_history) if metric in row)
    return next((row for row in rows if row["step"] == state.best_global_step), None)


def improves(metrics: Mapping[str, Any], state: TrainerState, metric: str = "eval_loss") -> bool:
    """True if an evaluation is better than the best so far; NaN is never."""
    if math.isnan(metrics[metric]):
        return False
    best = best_row(state, metric) if state.best_global_step else None
    return best is None or rank(metrics, metric) < rank(best, metric)


def not_finite(tensors: Iterable[Tensor]) -> Tensor:
    """A flag that is true if any number in some tensors is infinite or NaN, without a copy."""
    tensors = [tensor for tensor in tensors if tensor.numel() and tensor.is_floating_point()]
    by_device: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        by_device.setdefault(tensor.device, []).append(tensor)
    flags = [
        ~torch.stack([it.isfinite() for it in _largest(group, math.inf)]).all()
        for group in by_device.values()
    ]
    if not flags:
        return torch.tensor(False)
    return torch.stack([flag.to(flags[0].device) for flag in flags]).any()


def bad_weights(model: nn.Module) -> str | None:
    """The name of the first weight that is infinite or NaN."""
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and not is_finite(weight):
            return name
    return None

"""verl: any f-divergence by ``distillation_loss.loss_mode``, from the tokens that were drawn."""

from typing import Any

import torch
from torch import Tensor

from rkl.distill.limits import read_divergence
from rkl.divergences import Divergence, FDivergence
from rkl.divergences.base import slope_from_terms
from rkl.estimators import monte_carlo


def register(divergence: Divergence | str, name: str | None = None) -> Any:
    """Register an f-divergence with verl's ``register_distillation_loss``, and return its loss.

    A module of yours calls this, and verl imports it, in each process, where
    ``VERL_USE_EXTERNAL_MODULES`` names it. verl then knows the teacher at the tokens that the
    student drew, which is enough for D(p ‖ q) and its gradient, both without bias:

    - with ``use_policy_gradient`` the loss of a token is ∂F/∂q there, less its value at p = q, and
      verl takes it for a reward; for reverse KL that is log q/p, verl's own "k1";
    - without, it is the term of the divergence, and its gradient is ∂F/∂q times that of log q;
      for reverse KL the value of "k1" with the gradient of "k2".

    Args:
        divergence: An f-divergence, or its text, as ``rkl.parse`` reads it.
        name: What ``loss_mode`` calls it; by default its text.
    """
    from verl.trainer.distillation import losses  # pyright: ignore[reportMissingImports]: a peer
    from verl.utils.metric import (  # pyright: ignore[reportMissingImports]: a peer
        AggregationType,
        Metric,
    )
    from verl.workers.utils.padding import (  # pyright: ignore[reportMissingImports]: a peer
        no_padding_2_padding,
    )

    value = read_divergence(divergence)
    if not isinstance(value, FDivergence):
        raise TypeError(
            f"divergence must be an f-divergence, for verl knows the teacher at drawn tokens "
            f"alone; got {value!r}."
        )

    def loss(config: Any, distillation_config: Any, model_output: Any, data: Any) -> tuple:
        logq = no_padding_2_padding(model_output["log_probs"], data)
        logp = no_padding_2_padding(data["teacher_logprobs"], data).squeeze(-1)
        mask = data["response_mask"].bool()
        mask = mask.to_padded_tensor(False) if mask.is_nested else mask
        rewarded = distillation_config.distillation_loss.use_policy_gradient
        terms, slopes = terms_and_slopes(value, logp - logq)
        loss = slopes if rewarded else terms + slopes * (logq - logq.detach())
        mean = Metric(AggregationType.MEAN, terms[mask].mean())
        return loss, {"distillation/divergence": mean}

    names = [str(divergence) if name is None else name]
    settings = losses.DistillationLossSettings(names=names, use_estimator=True)
    return losses.register_distillation_loss(settings)(loss)


def terms_and_slopes(divergence: FDivergence, log_ratio: Tensor) -> tuple[Tensor, Tensor]:
    """At tokens drawn from q: terms whose mean is D, and ∂F/∂q less its value at p = q.

    E_q[∂F/∂q ∇log q] is the gradient of D, from which a constant takes nothing.
    """
    ratio = log_ratio.detach().flatten()
    terms = monte_carlo(divergence, ratio, sampled_from="q")
    even = torch.zeros_like(ratio[:1])
    slopes = slope_from_terms(divergence, ratio, in_p=False)
    slopes = slopes - slope_from_terms(divergence, even, in_p=False)
    return terms.reshape(log_ratio.shape), slopes.reshape(log_ratio.shape)

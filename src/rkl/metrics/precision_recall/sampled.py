"""The precision-recall curve from samples at which the ratio of the densities is known."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from rkl.checks import floats
from rkl.metrics.precision_recall.curve import checked_slopes
from rkl.stats import Mean, mean
from rkl.tables import Table, table_of


class SampledCurve(NamedTuple):
    """Precision and recall at each slope λ, each with its pointwise standard error."""

    slopes: Float[Tensor, " slopes"]
    precision: Mean
    recall: Mean

    def table(self) -> Table:
        """A row for each slope."""
        figures = {"slope": self.slopes, "precision": self.precision, "recall": self.recall}
        return table_of("Precision-recall curve", figures)

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


def pr_curve_sampled(
    *,
    log_ratio_p: Float[Tensor, " p_samples"] | None = None,
    log_ratio_q: Float[Tensor, " q_samples"] | None = None,
    slopes: Float[Tensor, " slopes"] | None = None,
) -> SampledCurve:
    r"""The precision–recall curve of q against p, by Monte Carlo, from the ratio r = p/q.

        α(λ) = E_q min(1, λr) = E_p min(λ, 1/r),    β(λ) = α(λ)/λ

    Samples of either distribution will do, in independent draws; the terms are bounded by 1 and by
    λ, so that nothing can go wrong in the tails. Given both, they are one stratified sample of
    their mixture m, in which α is the mean of min(λp, q)/m, less the multiple of q/m − 1 that
    leaves least variance. So the error is nowhere far above the smaller of the two, and vanishes
    at both ends, where α tends to λ and to 1. That takes normalised densities.

    Errors are pointwise, and those at different slopes go together.

    Source: Verine et al. (2023), arXiv 2302.00628; Owen and Zhou (2000), JASA 95, 135, eq. (9),
    for the mixture.

    Args:
        log_ratio_p: log p(x) − log q(x) in nats at samples x from p.
        log_ratio_q: The same at samples from q.
        slopes: The λ, positive and finite; by default 33 of them, from 1/256 to 256.

    Returns:
        Slopes, precision and recall, in double precision.

    Raises:
        TypeError: A ratio is no tensor of floats.
        ValueError: There are no ratios, one is nan, or one is infinite on the side where its
            own distribution would have no mass.

    >>> ratio = torch.tensor([0.5, 1.0, 1.5])
    >>> pr_curve_sampled(log_ratio_q=ratio.log(), slopes=torch.ones(1)).precision
    Mean(value=tensor([0.8333], dtype=torch.float64), error=tensor([0.1667], dtype=torch.float64))
    """
    if log_ratio_p is None and log_ratio_q is None:
        raise ValueError("log_ratio_p or log_ratio_q must be given; got neither.")
    at_p = None if log_ratio_p is None else checked_ratio("log_ratio_p", log_ratio_p, -math.inf)
    at_q = None if log_ratio_q is None else checked_ratio("log_ratio_q", log_ratio_q, math.inf)
    slopes = checked_slopes(slopes)
    points = [_precision(at_p, at_q, math.log(lam)) for lam in slopes.tolist()]
    precision = Mean(*(torch.stack(parts) for parts in zip(*points, strict=True)))
    return SampledCurve(slopes, precision, Mean(*(part / slopes for part in precision)))


def _precision(at_p: Tensor | None, at_q: Tensor | None, log_lam: float) -> Mean:
    if at_q is None and at_p is not None:
        return mean((-at_p).clamp_max(log_lam).exp())
    if at_p is None and at_q is not None:
        return mean((log_lam + at_q).clamp_max(0.0).exp())
    laws = [it for it in (at_p, at_q) if it is not None]
    share = [len(it) / sum(map(len, laws)) for it in laws]
    over_q = [_log_mixture(it, *map(math.log, share)) for it in laws]  # log m/q
    terms = [((log_lam + it).clamp_max(0.0) - m).exp() for it, m in zip(laws, over_q, strict=True)]
    return _mean_with_control(terms, [(-m).exp() for m in over_q], share)


def _log_mixture(log_ratio: Tensor, log_share_p: float, log_share_q: float) -> Tensor:
    """Log m/q for the mixture m of p and q."""
    return torch.logaddexp(log_share_p + log_ratio, torch.full_like(log_ratio, log_share_q))


def _mean_with_control(terms: list[Tensor], control: list[Tensor], share: list[float]) -> Mean:
    """The mean over the strata of a mixture, and a control whose mean there is 1."""
    together = list(zip(share, terms, control, strict=True))
    spread = sum(s * g.var(correction=0) for s, _, g in together)
    shared = sum(s * ((h - h.mean()) * g).mean() for s, h, g in together)
    slope = torch.as_tensor(shared / spread if spread > 0 else 0.0)
    left = [(s, mean(h - slope * (g - 1))) for s, h, g in together]
    value = torch.stack([s * it.value for s, it in left]).sum()
    return Mean(value, torch.stack([s * it.error for s, it in left]).norm())


def checked_ratio(name: str, log_ratio: Tensor, never: float) -> Tensor:
    """Log-ratios in double precision, no longer tracked.

    Raises:
        TypeError: They are no tensor of floats.
        ValueError: There are none, one is nan, or one is the infinity ``never``.
    """
    floats(name, log_ratio)
    if log_ratio.ndim != 1 or not len(log_ratio):
        raise ValueError(
            f"{name} must be [samples], with one sample at least; got {list(log_ratio.shape)}."
        )
    log_ratio = log_ratio.detach().double()
    wrong = log_ratio.isnan() | (log_ratio == never)
    if wrong.any():
        raise ValueError(
            f"{name} must be log p − log q, and neither nan nor {never} at a sample; "
            f"got {log_ratio[wrong][0].item()} at {int(wrong.sum())} of {len(wrong)}."
        )
    return log_ratio

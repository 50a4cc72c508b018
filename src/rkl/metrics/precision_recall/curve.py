"""Precision and recall of one distribution against another, as a curve over slopes."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from rkl.checks import floats
from rkl.tables import Table, table_of

SLOPES = tuple(2.0 ** (octave / 2) for octave in range(-16, 17))  # 1/256 to 256, and 1 itself


class Curve(NamedTuple):
    """Precision and recall at each slope λ; precision = λ · recall."""

    slopes: Float[Tensor, " slopes"]
    precision: Float[Tensor, "*batch slopes"]
    recall: Float[Tensor, "*batch slopes"]

    def table(self) -> Table:
        """A row for each slope."""
        figures = {
            "slope": self.slopes.expand_as(self.precision),
            "precision": self.precision,
            "recall": self.recall,
        }
        return table_of("Precision-recall curve", figures)

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


def pr_curve(
    *,
    p: Float[Tensor, "*batch atoms"],
    q: Float[Tensor, "*batch atoms"],
    slopes: Float[Tensor, " slopes"] | None = None,
) -> Curve:
    r"""The precision–recall curve of q against p, exactly, on a finite support.

        precision α(λ) = Σ min(λp, q),    recall β(λ) = α(λ)/λ

    α rises with λ to the mass of q where p has any; β falls with λ from the mass of p where q
    has any. At λ = 1 both are 1 − TV. The divergences are PrecisionRecall(λ) = min(λ, 1) − α(λ).

    Source: Sajjadi et al. (2018), arXiv 1806.00035, theorem 1; Verine et al. (2023),
    arXiv 2302.00628, for the divergences.

    Args:
        p: Log-probabilities of the target, in nats.
        q: Log-probabilities of the model, in nats.
        slopes: The λ, positive and finite; by default 33 of them, from 1/256 to 256, half an
            octave apart.

    Returns:
        Slopes, precision and recall, the last two in [0, 1] and of shape [*batch, slopes]; all
        in single precision or better.

    >>> p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.9, 0.1])
    >>> curve = pr_curve(p=p.log(), q=q.log(), slopes=torch.tensor([0.5, 1.0, 2.0]))
    >>> curve.precision, curve.recall
    (tensor([0.3500, 0.6000, 1.0000]), tensor([0.7000, 0.6000, 0.5000]))
    """
    p, q = _checked(p, q)
    slopes = checked_slopes(slopes).to(p)
    p, q = p.exp(), q.exp()
    precision = torch.stack([torch.minimum(lam * p, q).sum(-1) for lam in slopes.unbind()], -1)
    return Curve(slopes, precision, precision / slopes)


def checked_slopes(slopes: Tensor | None) -> Tensor:
    """The slopes asked for, or the default ones, in double precision.

    Raises:
        TypeError: They are no tensor of floats.
        ValueError: They are none, or not all positive and finite.
    """
    slopes = torch.tensor(SLOPES, dtype=torch.float64) if slopes is None else slopes
    floats("slopes", slopes)
    if slopes.ndim != 1:
        raise ValueError(f"slopes must be [slopes]; got the shape {list(slopes.shape)}.")
    if not len(slopes) or not ((slopes > 0) & (slopes < math.inf)).all():
        raise ValueError(f"slopes must be positive and finite; got {slopes.tolist()}.")
    return slopes.detach().double()


def _checked(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Normalised log-probabilities, in single precision or better."""
    floats("p", p)
    floats("q", q)
    if p.shape != q.shape or not p.ndim or not p.numel():
        raise ValueError(
            f"p and q must be [*batch, atoms], alike and not empty; got {list(p.shape)} "
            f"and {list(q.shape)}."
        )
    p, q = (it.float() if it.dtype.itemsize < 4 else it for it in (p, q))
    for name, logs in (("p", p), ("q", q)):
        total = logs.logsumexp(-1)
        if not (total.abs() < 1e-2).all():
            worst = total.flatten()[total.abs().nan_to_num(math.inf).argmax()].exp()
            raise ValueError(
                f"{name} must hold normalised log-probabilities; their exponentials sum to "
                f"{worst:.4g}. Logits want a log_softmax first."
            )
    return p, q

"""The acts of one data set, from posterior draws by :func:`rkl.bayes.bayes_act`, and exactly.

The loss is about the data again: all 2 N observations of the same groups, a regression on which
group each belongs to.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from rkl.bayes import GaussianRegression, Intrinsic, bayes_act
from rkl.divergences import KL, ReverseKL
from rkl.studies.neyman_scott import variance

GROUPS, CHAINS, DRAWS = 10, 4, 500
DIVERGENCES = {
    "forward KL": KL(),
    "symmetric KL": KL() + ReverseKL(),
    "intrinsic": Intrinsic(),
    "reverse KL": ReverseKL(),
}


class Compared(NamedTuple):
    """One act's σ: from draws, with its Monte Carlo error, and by quadrature."""

    drawn: tuple[float, float]
    exact: float


def compare(seed: int) -> Mapping[str, Compared]:
    """The acts under the reference prior, of which independent draws can be had."""
    generator = torch.Generator().manual_seed(seed)
    x = variance.observations(2, GROUPS, 1, generator)
    data = variance.statistics([x])
    exact = variance.bayesian(data, variance.FLAT)
    draws = _posterior(x[0], generator)
    design = torch.eye(GROUPS, dtype=torch.float64).repeat_interleave(2, 0)
    acts = {}
    for name, divergence in DIVERGENCES.items():
        act = bayes_act(draws, _data_again, divergence, design=design).act
        drawn = act["sigma"].item(), act.error["sigma"].item()
        acts[name] = Compared(drawn, exact[name].sqrt().item())
    return acts


def _data_again(theta: Mapping[str, Tensor], design: Tensor) -> GaussianRegression:
    return GaussianRegression(design, theta["mu"], theta["sigma"])


def _posterior(x: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Independent draws: S / σ² is χ² of N degrees of freedom, and the means given σ² normal."""
    mean = x.mean(1)
    scatter = (x - mean[:, None]).square().sum()
    shape = 2, CHAINS, DRAWS, GROUPS
    one, other = torch.randn(shape, generator=generator, dtype=torch.float64)
    sigma = (scatter / one.square().sum(-1)).sqrt()
    return {"mu": mean + sigma[..., None] / 2**0.5 * other, "sigma": sigma}

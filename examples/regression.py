"""A regression of counts: coefficients to report, and which of them could be left out.

python examples/regression.py

The sampler is a random walk, so that its draws depend on one another as those of any chain do:
the printed errors know it. Draws of your own take the place of ``sampled``.
"""

import torch
from torch import Tensor

from rkl import KL
from rkl.bayes import bayes_act, project

generator = torch.Generator().manual_seed(3)
NAMES = ("intercept", "age", "dose", "noise")
DESIGN = torch.randn(60, 4, generator=generator, dtype=torch.float64)
DESIGN[:, 0] = 1.0
TRUTH = torch.tensor([0.5, 0.6, -0.3, 0.0], dtype=torch.float64)
COUNTS = torch.poisson((DESIGN @ TRUTH).exp(), generator=generator)


def log_posterior(beta: Tensor) -> Tensor:
    """Poisson counts, Normal(0, 2) priors; of beta [chains, 4]."""
    predictor = beta @ DESIGN.T
    return (COUNTS * predictor - predictor.exp()).sum(-1) - beta.square().sum(-1) / 8


def sampled(chains: int = 4, warmup: int = 1_000, draws: int = 8_000) -> Tensor:
    """Draws [chains, draws, 4] by Metropolis' random walk."""
    beta = TRUTH + 0.1 * torch.randn(chains, 4, generator=generator, dtype=torch.float64)
    log_density, kept = log_posterior(beta), []
    for _ in range(warmup + draws):
        step = beta + 0.1 * torch.randn(chains, 4, generator=generator, dtype=torch.float64)
        proposed = log_posterior(step)
        accepted = torch.rand(chains, generator=generator).log() < proposed - log_density
        beta = torch.where(accepted[:, None], step, beta)
        log_density = torch.where(accepted, proposed, log_density)
        kept.append(beta)
    return torch.stack(kept[warmup:], 1)


def main() -> None:
    draws = {"beta": sampled()}
    family = "poisson-regression(coefficients=beta)"
    print("columns:", ", ".join(NAMES), "\n")
    print(bayes_act(draws, family, design=DESIGN), end="\n\n")

    # What each column is worth, by what the whole model predicts: forward KL
    subsets = {"without " + name: [i for i in range(4) if NAMES[i] != name] for name in NAMES[1:]}
    print(project(draws, family, subsets, KL(), design=DESIGN))


if __name__ == "__main__":
    main()

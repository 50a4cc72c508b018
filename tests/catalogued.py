"""Every divergence there is, at its defaults and at its edges: what the laws are tested on."""

import pytest
import torch

import rkl

# Not those that other test files define, which are in the catalogue once they are imported.
OURS = [cls for cls in rkl.catalogue().values() if cls.__module__.startswith("rkl.")]
ALL = [cls() for cls in OURS] + [
    rkl.PrecisionRecall(0.1),
    rkl.PrecisionRecall(10.0),
    rkl.PrecisionHalf(0.2),
    rkl.PrecisionHalf(5.0),
    rkl.RecallHalf(0.2),
    rkl.RecallHalf(5.0),
    rkl.JensenShannon(0.9),
    rkl.SkewKL(0.9),
    rkl.Amari(-2.0),
    rkl.Amari(3.0),
    rkl.AlphaBeta(1.2, -0.2),
    rkl.AlphaBeta(-0.5, 1.5),
    rkl.AKL(0.0),
    rkl.AKL(0.99, straddle="head"),
    rkl.AMiD(-1.0, 0.3),
    rkl.AMiD(1.0, 0.3),
    rkl.AMiD(3.0, 0.9),
    rkl.EntropyAwareReverseKL(0.0),
    rkl.LKHybrid(0.5),
    rkl.TAID(0.2),
    rkl.TAID(1.0),
    0.3 * rkl.KL() + 0.7 * rkl.ReverseKL(),
    0.5 * rkl.AKL() + 0.5 * rkl.ToDi(),
    0.5 * rkl.TAID() + 2.0 * rkl.NegLogAcceptance() + rkl.AMiD(),
]
F = [d for d in ALL if isinstance(d, rkl.FDivergence)]
every = pytest.mark.parametrize("divergence", ALL, ids=repr)
every_f = pytest.mark.parametrize("divergence", F, ids=repr)


def pair(*shape, scale=3.0, seed=0):
    """Two batches of log-probabilities in double precision."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    return logits.log_softmax(-1).unbind()

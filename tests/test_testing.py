"""check_divergence judges: every divergence here is wrong in one way, and must be refused."""

import math

import pytest
import torch

import rkl
from rkl.testing import check_divergence


class _Nothing(rkl.FDivergence):
    def integrand(self, logp, logq):
        return 0 * (logp.exp() + logq.exp())


class _Detached(rkl.Divergence):
    def integrand(self, logp, logq):
        return rkl.KL().integrand(logp, logq.detach())


class _NaNWhenMasked(rkl.FDivergence):
    def integrand(self, logp, logq):
        return logp.exp() * (logp - logq)


class _MixesRows(rkl.Divergence):
    def held(self, logp, logq):
        return (rkl.KL()(logp, logq).max(),)

    def integrand(self, logp, logq, largest):
        return rkl.KL().integrand(logp, logq) / largest.clamp_min(1e-300)


class _CrossEntropy(rkl.FDivergence):
    def integrand(self, logp, logq):
        return -logp.exp() * torch.where(logp == -math.inf, 0.0, logq)


class _OrderMatters(rkl.Divergence):
    def integrand(self, logp, logq):
        return rkl.KL().excess(logp, logq) * torch.arange(1, 1 + logp.shape[-1])


class _NotHomogeneous(rkl.FDivergence):
    def integrand(self, logp, logq):
        return (logp.exp() - logq.exp()).square()


class _HoldsInSecret(rkl.FDivergence):
    def held(self, logp, logq):
        return (torch.ones_like(logp),)

    def integrand(self, logp, logq, one=1.0):
        return one * rkl.KL().integrand(logp, logq)


class _ForgetsTheRare(rkl.FDivergence):
    def integrand(self, logp, logq):
        return torch.where(logq == -math.inf, 0.0, rkl.KL().integrand(logp, logq))


class _EntropyDropped(rkl.Divergence):
    def integrand(self, logp, logq):
        return -logp.exp() * torch.where(logp == -math.inf, 0.0, logq)


class _NotConvex(rkl.FDivergence):
    def integrand(self, logp, logq):
        return rkl.TotalVariation().integrand(logp, logq) * 2 - rkl.SquaredHellinger().integrand(
            logp, logq
        )


class _NotIncreasing(rkl.TAID):
    """Merging atoms may move its target r, and with it KL(r ‖ q), either way."""

    @property
    def increasing_in(self):
        return (rkl.KL(),)


class _Negative(rkl.Divergence):
    def integrand(self, logp, logq):
        return rkl.KL().integrand(logp, logq) - 3 * rkl.ReverseKL().integrand(logp, logq)


@pytest.mark.parametrize(
    ("toy", "law"),
    [
        (_EntropyDropped, "of a distribution from itself"),
        (_NotConvex, "is not convex"),
        (_NotIncreasing, "grows when atoms are merged"),
        (_Negative, "is negative"),
        (_Nothing, "is 0 between every two"),
        (_Detached, "the gradient is not that of the value"),
        (_NaNWhenMasked, "masked on both sides"),
        (_MixesRows, "mixes the rows"),
        (_CrossEntropy, "is not c F"),
        (_OrderMatters, "depends on the order of atoms"),
        (_NotHomogeneous, "is not c F"),
        (_HoldsInSecret, "holds nothing"),
        (_ForgetsTheRare, "masked on one side"),
    ],
)
def test_a_wrong_divergence_is_refused(toy, law):
    with pytest.raises(AssertionError, match=law):
        check_divergence(toy())

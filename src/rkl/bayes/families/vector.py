"""Families whose components are vectors or matrices."""

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch.distributions import Categorical, Dirichlet, MultivariateNormal

from rkl.bayes.families.base import ExponentialFamily, Fixed
from rkl.bayes.families.scalar import (
    dirichlet_log_fisher,
    dirichlet_newton,
    dirichlet_partition,
    dirichlet_start,
)


@dataclass(frozen=True, eq=False)
class CategoricalFamily(ExponentialFamily):
    """Categorical(probs): T = one-hot x, η = log probs.

    One number more than needed: a constant added to η changes nothing.
    """

    law = Categorical
    events = (1,)
    names = ("log probs",)
    mean_names = ("probs",)
    parameters = ("probs",)

    def natural(self, law: Categorical):
        given = law.__dict__
        return (given["logits"] if "probs" not in given else given["probs"].log(),)

    def from_natural(self, natural):
        return Categorical(logits=natural[0])

    def statistic(self, x):
        # The number of classes is unknown to x alone: as many as the largest asks for.
        return (torch.nn.functional.one_hot(x.long()).double(),)

    def log_partition(self, natural):
        return natural[0].logsumexp(-1)

    def mean(self, natural):
        return (natural[0].softmax(-1),)

    def from_mean(self, mean):
        self.check_mean(mean)
        return (mean[0].log(),)

    def kl(self, p, q):
        logp, logq = p[0].log_softmax(-1), q[0].log_softmax(-1)
        return (logp.exp() * (logp - logq)).sum(-1)

    def log_fisher(self, law: Categorical):
        """Of all probabilities but the last, −Σ log probs."""
        return -self.natural(law)[0].sum(-1)

    def mean_inside(self, mean):
        return ((mean[0] > 0).all(-1),)


@dataclass(frozen=True, eq=False)
class DirichletFamily(ExponentialFamily):
    """Dirichlet(concentration): T = log x, η = concentration, h = Π 1/x."""

    law = Dirichlet
    events = (1,)
    names = ("concentration",)
    mean_names = ("E log x",)
    parameters = ("concentration",)

    def natural(self, law: Dirichlet):
        return (law.concentration,)

    def from_natural(self, natural):
        return Dirichlet(natural[0])

    def statistic(self, x):
        return (x.log(),)

    def log_partition(self, natural):
        return dirichlet_partition(natural[0])

    def mean(self, natural):
        return (torch.digamma(natural[0]) - torch.digamma(natural[0].sum(-1, keepdim=True)),)

    def start(self, mean):
        return (dirichlet_start(mean[0]),)

    def newton(self, natural, gap):
        return (dirichlet_newton(natural[0], gap[0]),)

    def log_fisher(self, law: Dirichlet):
        return dirichlet_log_fisher(law.concentration)

    def inside(self, natural):
        return ((natural[0].isfinite() & (natural[0] > 0)).all(-1),)

    def mean_inside(self, mean):
        return (mean[0].isfinite().all(-1) & (mean[0].logsumexp(-1) < 0),)


@dataclass(frozen=True, eq=False)
class MultivariateNormalFamily(ExponentialFamily):
    """MultivariateNormal(loc, covariance Σ): T = (x − o, (x − o)(x − o)ᵀ) about an origin o.

    η = (Σ⁻¹ (loc − o), −½ Σ⁻¹).
    """

    law = MultivariateNormal
    events = (1, 2)
    names = ("precision · loc", "−½ precision")
    mean_names = ("E x", "E x xᵀ")
    parameters = ("loc", "covariance_matrix")
    origin: Fixed = 0.0

    def about(self, law: MultivariateNormal):
        return dataclasses.replace(self, origin=law.loc)

    def natural(self, law: MultivariateNormal):
        precision = law.precision_matrix
        shift = (precision @ (law.loc - self.origin).unsqueeze(-1)).squeeze(-1)
        return shift, -precision / 2

    def from_natural(self, natural):
        loc = self._loc(natural)
        return MultivariateNormal(loc + self.origin, precision_matrix=-2 * natural[1])

    def statistic(self, x):
        x = x - self.origin
        return x, x.unsqueeze(-1) * x.unsqueeze(-2)

    def log_partition(self, natural):
        quadratic = (natural[0] * self._loc(natural)).sum(-1)
        return (quadratic - (-natural[1] / math.pi).logdet()) / 2

    def mean(self, natural):
        loc = self._loc(natural)
        return loc, torch.linalg.inv(-2 * natural[1]) + loc.unsqueeze(-1) * loc.unsqueeze(-2)

    def from_mean(self, mean):
        self.check_mean(mean)
        loc, second = mean
        precision = torch.linalg.inv(second - loc.unsqueeze(-1) * loc.unsqueeze(-2))
        return (precision @ loc.unsqueeze(-1)).squeeze(-1), -precision / 2

    def kl(self, p, q):
        shift = self._loc(p) - self._loc(q)
        distance = -2 * (shift * (q[1] @ shift.unsqueeze(-1)).squeeze(-1)).sum(-1)
        root = torch.linalg.cholesky(-2 * p[1])
        half = torch.linalg.solve_triangular(root, 2 * (p[1] - q[1]), upper=False)
        excess = torch.linalg.solve_triangular(root, half.mT, upper=False)
        eye = torch.eye(excess.shape[-1], dtype=excess.dtype, device=excess.device)
        trace = excess.diagonal(dim1=-2, dim2=-1).sum(-1)
        return (trace - (eye + excess).logdet() + distance) / 2

    def log_fisher(self, law: MultivariateNormal):
        """Of loc and the lower triangle of the covariance, (d + 2) log det Σ⁻¹ − d log 2."""
        size = law.loc.shape[-1]
        return (size + 2) * law.precision_matrix.logdet() - size * math.log(2)

    def inside(self, natural):
        return natural[0].isfinite().all(-1), positive_definite(-natural[1])

    def mean_inside(self, mean):
        loc, second = mean
        spread = second - loc.unsqueeze(-1) * loc.unsqueeze(-2)
        return loc.isfinite().all(-1), positive_definite(spread)

    def _loc(self, natural):
        return torch.linalg.solve(-2 * natural[1], natural[0].unsqueeze(-1)).squeeze(-1)


def positive_definite(matrix: torch.Tensor) -> torch.Tensor:
    """Whether a symmetric matrix is finite and positive definite [*batch]."""
    finite = matrix.isfinite().all(-1).all(-1)
    info = torch.linalg.cholesky_ex(torch.where(finite[..., None, None], matrix, 0.0)).info
    return finite & (info == 0)

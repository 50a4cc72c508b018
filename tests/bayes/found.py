"""Every exponential family there is: found, not listed, with laws of random parameters.

And an independent measure of all of them: sums over nodes of densities that need not be
normalised, so that no log-partition, digamma or Bessel function enters.
"""

import functools
import itertools

import pytest
import torch
from torch.distributions import constraints, transform_to

from rkl.bayes.families import families

DESIGN = torch.tensor([[1.0, -0.6], [1.0, 0.2], [1.0, 0.9]], dtype=torch.float64)
FIXED = {
    "Binomial": {"total_count": 7},
    "GaussianRegression": {"design": DESIGN},
    "Laplace": {"loc": torch.tensor(0.3, dtype=torch.float64)},
    "LogisticRegression": {"design": DESIGN},
    "Multinomial": {"total_count": 4},
    "NegativeBinomial": {"total_count": 2.5},
    "PoissonRegression": {"design": DESIGN},
}
SIZES = {0: (), 1: (3,), 2: (2, 2)}
PAIRS = {"GaussianRegression", "LogisticRegression", "MultivariateNormal", "PoissonRegression"}
WISHART = {"df": constraints.greater_than(3.0), "covariance_matrix": constraints.positive_definite}

FAMILIES = {
    law.__name__: kind
    for law, kind in families().items()
    if kind.__module__.startswith("rkl.")  # and none that a test has made up
}
every_family = pytest.mark.parametrize("name", FAMILIES)


def size_of(name):
    """The number of unconstrained numbers behind one law."""
    return sum(torch.Size(shape).numel() for _, shape in _parameters(name).values())


def law_of(name, numbers):
    """The laws [*batch] of unconstrained numbers [*batch, size]."""
    own, at = {}, 0
    for parameter, (constraint, shape) in _parameters(name).items():
        count = torch.Size(shape).numel()
        free = numbers[..., at : at + count]
        free = free.unflatten(-1, shape) if shape else free.squeeze(-1)
        own[parameter], at = transform_to(constraint)(free), at + count
    return FAMILIES[name].distribution(**own, **FIXED.get(name, {}))


def laws(name, *batch, seed=0, spread=0.5):
    """Random laws of a family, in double precision."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(*batch, size_of(name), generator=generator, dtype=torch.float64)
    return law_of(name, spread * numbers)


def _parameters(name):
    kind = FAMILIES[name]
    known = WISHART if name == "Wishart" else kind.distribution.arg_constraints
    axes = {parameter: known[parameter].event_dim for parameter in kind.parameters}
    return {
        parameter: (known[parameter], (2,) if n == 1 and name in PAIRS else SIZES[n])
        for parameter, n in axes.items()
    }


def one(components, *index):
    """One law of a batch, component by component."""
    return tuple(component[index] for component in components)


# What follows is a density of one law at nodes: log of p, up to a constant, times what volume
# the node stands for.


@functools.cache
def lattice(low, high, step, axes=1):
    points = torch.arange(low, high, step, dtype=torch.float64)
    return torch.cartesian_prod(*[points] * axes).reshape(-1, axes).unbind(-1)


def line():
    """Nodes for a real x, or for the log or logit of one, whose tails are exponential."""
    return lattice(-200, 200, 0.02)[0]


def counts(most):
    return torch.arange(most, dtype=torch.float64)


def _binomial(law, trials):
    k = counts(trials + 1)
    return k * law.logits - torch.lgamma(k + 1) - torch.lgamma(trials - k + 1)


def _categorical(law):
    return law.logits


@functools.cache
def _compositions():
    every = [x for x in itertools.product(range(5), repeat=3) if sum(x) == 4]
    return torch.tensor(every, dtype=torch.float64)


def _negative_binomial(law):
    k = counts(3000)
    return torch.lgamma(k + law.total_count) - torch.lgamma(k + 1) + k * law.probs.log()


def _multivariate_normal(law):
    x = torch.stack(lattice(-20, 20, 0.25, 2), -1) - law.loc
    return -((x @ law.precision_matrix) * x).sum(-1) / 2


def _dirichlet(law):
    t, u = lattice(-120, 120, 0.5, 2)
    logs = torch.stack([t, u, torch.zeros_like(t)], -1).log_softmax(-1)
    return logs @ law.concentration


def _wishart(law):
    """In the logs a, b of the Cholesky factor's diagonal and its corner c."""
    a, b, c = torch.cartesian_prod(
        lattice(-10, 3, 0.16)[0], lattice(-14, 3, 0.16)[0], lattice(-18, 18, 0.25)[0]
    ).unbind(-1)
    first, last, corner = (2 * a).exp(), c.square() + (2 * b).exp(), a.exp() * c
    ((v00, v01), (_, v11)) = law.precision_matrix
    trace = v00 * first + 2 * v01 * corner + v11 * last
    return (law.df - 3) * (a + b) - trace / 2 + 3 * a + 2 * b


def _gaussian_regression(law):
    x = torch.stack(lattice(-12, 12, 0.25, 3), -1)
    return -((x - DESIGN @ law.coefficients) / law.scale).square().sum(-1) / 2


def _poisson_regression(law):
    k = torch.stack(lattice(0, 50, 1, 3), -1)
    return k @ (DESIGN @ law.coefficients) - torch.lgamma(k + 1).sum(-1)


DENSITIES = {
    "Bernoulli": lambda law: _binomial(law, 1),
    "Beta": lambda law: (
        law.concentration1 * torch.nn.functional.logsigmoid(line())
        + law.concentration0 * torch.nn.functional.logsigmoid(-line())
    ),
    "Binomial": lambda law: _binomial(law, 7),
    "Categorical": _categorical,
    "Dirichlet": _dirichlet,
    "Exponential": lambda law: line() - law.rate * line().exp(),
    "Gamma": lambda law: law.concentration * line() - law.rate * line().exp(),
    "GaussianRegression": _gaussian_regression,
    "Geometric": lambda law: counts(3000) * (-law.probs).log1p(),
    "InverseGamma": lambda law: -law.concentration * line() - law.rate * (-line()).exp(),
    "Laplace": lambda law: line() - line().exp() / law.scale,
    "LogisticRegression": lambda law: (
        torch.stack(lattice(0, 2, 1, 3), -1) @ (DESIGN @ law.coefficients)
    ),
    "LogNormal": lambda law: -((line() - law.loc) / law.scale).square() / 2,
    "Multinomial": lambda law: (
        _compositions() @ law.logits - torch.lgamma(_compositions() + 1).sum(-1)
    ),
    "MultivariateNormal": _multivariate_normal,
    "NegativeBinomial": _negative_binomial,
    "Normal": lambda law: -((line() - law.loc) / law.scale).square() / 2,
    "OneHotCategorical": _categorical,
    "Poisson": lambda law: counts(300) * law.rate.log() - torch.lgamma(counts(300) + 1),
    "PoissonRegression": _poisson_regression,
    "VonMises": lambda law: (
        law.concentration * (lattice(0, 2 * torch.pi, torch.pi / 200)[0] - law.loc).cos()
    ),
    "Wishart": _wishart,
}


def log_masses(name, law):
    """The log-probabilities of a law's nodes, normalised by their sum."""
    return DENSITIES[name](law).log_softmax(-1)


def summed_kl(name, p, q):
    """KL(p ‖ q) in nats between two single laws, by summation over the nodes."""
    logp, logq = log_masses(name, p), log_masses(name, q)
    return (logp.exp() * (logp - logq)).sum()

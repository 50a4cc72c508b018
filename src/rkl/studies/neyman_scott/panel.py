r"""A panel of two answers each: a common effect, and as many intercepts as persons.

logit P(y_i1 = 1) = α_i and logit P(y_i2 = 1) = α_i + β. A person gives one of four pairs of
answers, and nothing but the numbers of the four enters, so that all of it is quadrature in one
α and in β.

The joint distribution of all answers is an exponential family with natural parameters α_i and α_i
+ β: the reverse-KL act has their posterior means, the forward-KL act the posterior means of the
probabilities, as nearly as one β for all lets it.

Source: Andersen (1970), J. R. Stat. Soc. B 32; Abrevaya (1997), Economics Letters 55, for the
limit 2β of maximum likelihood.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from rkl.studies.neyman_scott.acts import Estimates, grid

EFFECT, CENTRE, SPREAD = 1.0, 1.0, 2.0  # the truth: β, and α_i ~ N(CENTRE, SPREAD²)
EFFECT_SCALE = 3.0  # of the prior β ~ N(0, EFFECT_SCALE²)
EFFECTS = 61  # nodes in β
PAIRS = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
NEWTON = 12  # steps
FRACTIONS = torch.tensor([1.0, 0.5, 0.2, 0.05, 0.0], dtype=torch.float64)  # of a step, tried
BLOCK = 25  # data sets at once: arrays that fit a cache

Counts = Float[Tensor, "replications pairs"]


def simulate(persons: int, replications: int, seed: int) -> Counts:
    """Simulate the number of persons with each pair of answers, from the truth above."""
    generator = torch.Generator().manual_seed(seed)
    shape = replications, persons
    alpha = CENTRE + SPREAD * torch.randn(shape, generator=generator, dtype=torch.float64)
    p = torch.stack([alpha, alpha + EFFECT], 2).sigmoid()
    answers = torch.rand(p.shape, generator=generator, dtype=torch.float64) < p
    pair = answers[..., 0] + 2 * answers[..., 1].long()
    return torch.nn.functional.one_hot(pair, 4).sum(1).double()


@dataclass(frozen=True)
class Prior:
    """Of one intercept: N(centre, spread²), or Jeffreys' rule for it given β.

    Jeffreys' rule, the root of the information p₁q₁ + p₂q₂, has a mass that depends on β; as
    with the variance of Neyman and Scott, that factor comes once for each person.
    """

    centre: float = 0.0
    spread: float | None = 1.0

    def nodes(self) -> Float[Tensor, " nodes"]:
        """Evenly spaced values of α."""
        if self.spread is None:
            return torch.linspace(-40, 40, 81, dtype=torch.float64)
        return self.centre + self.spread * torch.linspace(-8, 8, 33, dtype=torch.float64)

    def log_density(self, alpha: Tensor, beta: Tensor) -> Tensor:
        """Up to a constant."""
        if self.spread is not None:
            return -0.5 * ((alpha - self.centre) / self.spread).square()
        return 0.5 * torch.logaddexp(_log_variance(alpha), _log_variance(alpha + beta))


PRIORS: Mapping[str, Prior] = {
    "the truth, α ~ N(1, 4)": Prior(CENTRE, SPREAD),
    "proper but wrong, α ~ N(0, 1)": Prior(),
    "Jeffreys' rule for each α": Prior(spread=None),
}


class Moments(NamedTuple):
    """Posterior means: of β, and for one person of each pair of α and both probabilities."""

    beta: Estimates
    alpha: Counts
    p: Float[Tensor, "replications pairs 2"]


def classical(counts: Counts) -> dict[str, Estimates]:
    """Estimates of β without a prior; not finite where nobody changed in one direction."""
    ratio = (counts[:, 2] / counts[:, 1]).log()
    return {"maximum likelihood": 2 * ratio, "conditional likelihood": ratio}


def bayesian(counts: Counts, prior: Prior) -> dict[str, Estimates]:
    """Estimates of β from a posterior."""
    parts = [_bayesian(it, prior) for it in counts.split(BLOCK)]
    return {name: torch.cat([it[name] for it in parts]) for name in parts[0]}


def _bayesian(counts: Counts, prior: Prior) -> dict[str, Estimates]:
    def log_prior(beta: Tensor) -> Tensor:
        return -0.5 * (beta / EFFECT_SCALE).square()

    def height(beta: Tensor) -> Tensor:
        each = [it.logsumexp(-1) for it in _joint(prior, beta)]
        return (counts[:, None] * torch.stack(each, -1)).sum(-1) + log_prior(beta)

    (beta,), _ = grid(height, torch.zeros(len(counts), 1).double(), 12.0, (EFFECTS,), (-9, 9))
    weight = height(beta).softmax(1)
    mean = _moments(prior, beta, weight)

    def mode(alpha: Tensor, beta: Tensor, counts: Tensor) -> Tensor:
        said = alpha * PAIRS[:, 0] + (alpha + beta) * PAIRS[:, 1]
        each = said - softplus(alpha) - softplus(alpha + beta) + prior.log_density(alpha, beta)
        return -(counts * each).sum() - log_prior(beta)

    return {
        "MAP": _minimise(mode, mean, counts),
        "posterior mean": mean.beta,
        "posterior mean of the odds ratio": (weight.log() + beta).logsumexp(1),
        "posterior median": _interpolate(weight.cumsum(1) - weight / 2, beta, 0.5),
        "forward KL": _minimise(_forward, mean, counts, mean.p),
        "symmetric KL": _minimise(_symmetric, mean, counts, mean.p, mean.alpha, mean.beta),
        "reverse KL": mean.beta,
    }


def _log_variance(logit: Tensor) -> Tensor:
    """The log of p (1 - p)."""
    return logsigmoid(logit) + logsigmoid(-logit)


def _joint(prior: Prior, beta: Tensor) -> Iterator[Tensor]:
    """The log density of α, on its nodes, and of each pair of answers, given β."""
    alpha, beta = prior.nodes(), beta[..., None]
    shared = prior.log_density(alpha, beta) - softplus(alpha) - softplus(alpha + beta)
    for first, second in PAIRS:
        yield shared + alpha * first + (alpha + beta) * second


def _moments(prior: Prior, beta: Tensor, weight: Tensor) -> Moments:
    """Moments of the posterior that the acts need."""
    alpha, first, second = [], [], []
    nodes = prior.nodes()
    for joint in _joint(prior, beta):
        mass = joint.softmax(-1) * weight[..., None]
        alpha.append((mass * nodes).sum((1, 2)))
        first.append((mass * nodes.sigmoid()).sum((1, 2)))
        second.append((mass * (nodes + beta[..., None]).sigmoid()).sum((1, 2)))
    p = torch.stack([torch.stack(first, 1), torch.stack(second, 1)], 2)
    return Moments((weight * beta).sum(1), torch.stack(alpha, 1), p)


def _forward(alpha: Tensor, beta: Tensor, counts: Tensor, p: Tensor) -> Tensor:
    """The risk under KL(P_θ ‖ P_t), up to a constant."""
    eta = torch.stack([alpha, alpha + beta], 1)
    return (counts[:, None] * (softplus(eta) - p * eta)).sum()


def _symmetric(
    alpha: Tensor, beta: Tensor, counts: Tensor, p: Tensor, mean_alpha: Tensor, mean_beta: Tensor
) -> Tensor:
    """The risk under the sum of both KLs, Σ E[(p - q)(η_p - η_q)], up to a constant."""
    eta = torch.stack([alpha, alpha + beta], 1)
    natural = torch.stack([mean_alpha, mean_alpha + mean_beta], 1)
    return (counts[:, None] * ((eta - natural) * eta.sigmoid() - p * eta)).sum()


def _minimise(
    loss: Callable[..., Tensor], start: Moments, counts: Counts, *given: Tensor
) -> Estimates:
    """β at the minimum over it and the four α: Newton's method, all data sets at once."""

    def whole(at: Tensor, counts: Tensor, *given: Tensor) -> Tensor:
        unused = (counts == 0) * at[:4].square()  # a pair that nobody gave has an α to spare
        return loss(at[:4], at[4], counts, *given) + unused.sum()

    at = torch.cat([start.alpha, start.beta[:, None]], 1)
    derivative, curvature = (
        torch.func.vmap(it(whole)) for it in (torch.func.grad, torch.func.hessian)
    )
    for _ in range(NEWTON):
        slope = derivative(at, counts, *given)
        values, vectors = torch.linalg.eigh(curvature(at, counts, *given))
        turned = (slope[:, None] @ vectors)[:, 0] / values.abs().clamp_min(1e-9)
        step = (vectors @ turned[..., None])[..., 0]
        tried = at - FRACTIONS[:, None, None] * step
        losses = torch.stack([torch.func.vmap(whole)(it, counts, *given) for it in tried])
        at = tried[losses.argmin(0), torch.arange(len(at))]
    return at[:, 4]


def _interpolate(x: Tensor, y: Tensor, at: float) -> Estimates:
    """The y where x, which rises, passes a value."""
    right = (x < at).sum(1, keepdim=True).clamp(1, x.shape[1] - 1)
    (x0, x1), (y0, y1) = ((it.gather(1, right - 1), it.gather(1, right)) for it in (x, y))
    return (y0 + (at - x0) / (x1 - x0) * (y1 - y0))[:, 0]

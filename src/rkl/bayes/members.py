"""The member of a simpler family with the least expected loss over the posterior's draws."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.distributions import Distribution

from rkl.bayes.charts import chart_of
from rkl.bayes.families.regression import by_rows
from rkl.bayes.generic import influences, laws_of, on_all, over_few, posterior_loss
from rkl.bayes.losses import Intrinsic, NodeLoss, PosteriorLoss, between
from rkl.bayes.minimise import minimise
from rkl.bayes.nodes import nodes_for
from rkl.bayes.questions import Question, Variables
from rkl.bayes.subfamilies import Subfamily
from rkl.divergences import FDivergence

HELD = 2**20  # log-densities over which a loss that needs every draw is minimised
STARTS = 4  # draws that a minimiser starts from
ASTRAY = 1e-6  # mass of a law that may lie beyond the nodes
ROUNDS, BEYOND, DEAR = 6, 1.5, 1e3  # of choosing nodes; how far past a member; nats
OWN = "of the subfamily: "  # before its variables, where they stand beside those of the family


def best_member(whole: Question, one: Subfamily) -> tuple[PosteriorLoss, "Member"]:
    """The loss, on nodes that reach as far as the best member does, and that member.

    Raises:
        ValueError: No member has a finite loss, or no nodes reach the best.
    """
    reach, missed = one.theta, 0.0
    for _ in range(ROUNDS):
        loss = _loss(whole, one, reach)
        found = _member(loss, one)
        missed = _missed(loss, found.law).max().item()
        if missed <= ASTRAY:
            return loss, found
        reach = found.reach
    raise ValueError(
        f"subfamily {one.name} must keep to where the posterior's laws have mass; its best "
        f"member has {missed:.2g} of its own elsewhere, where the divergence is not known."
    )


def _loss(whole: Question, one: Subfamily, reach: Variables) -> PosteriorLoss:
    """The expected loss over the draws; its laws are also those of the subfamily's variables.

    Nodes are chosen for the laws of the draws and for those of as many ``reach``.
    """
    divergence, weights = whole.divergence, whole.draws.weights
    one_law = one.model.law({name: x[:1] for name, x in one.theta.items()})
    alike = type(one_law) is type(whole.model.law({k: x[:1] for k, x in whole.theta.items()}))

    def either(theta: Mapping[str, Tensor]) -> Distribution:
        own = {k.removeprefix(OWN): x for k, x in theta.items() if k.startswith(OWN)}
        law = one.model.law(own) if own else whole.model.law(theta)
        return law if alike else by_rows(law)

    laws = laws_of(whole.theta, either, None if weights is None else weights.flatten())
    loss = posterior_loss(laws, divergence, seed=whole.seed)
    theirs, own = loss.laws, {OWN + name: x for name, x in reach.items()}
    p, q = theirs.at(theirs.spread(1)), theirs.of({name: x[:1] for name, x in own.items()})
    if loss.nodes is None and between(divergence, p, q) is not None:
        return loss
    if loss.nodes is not None and loss.nodes.kind == "enumeration":
        return loss

    def both(theta: Mapping[str, Tensor]) -> Distribution:
        parts = (
            {name: x for name, x in theta.items() if (name in own) is ours}
            for ours in (False, True)
        )
        return _Halves(*(theirs.law(part) for part in parts))

    mixed = replace(theirs, theta={**theirs.theta, **own}, law=both)
    criterion = divergence if isinstance(divergence, FDivergence) else None
    nodes = nodes_for(mixed, criterion, seed=whole.seed)
    needed = p.event_shape != () or (loss.nodes is not None and loss.nodes.kind == "importance")
    if nodes.kind == "importance" and not needed:  # a sample would not show an infinite loss
        raise ValueError(
            f"subfamily {one.name} must have its mass where the posterior's laws have theirs; "
            "no nodes along the line follow the laws of both."
        )
    return posterior_loss(laws, divergence, nodes=nodes, seed=whole.seed)


class _Halves(Distribution):
    """Each law of one kind mixed with one of another: of both, nodes shall miss nothing."""

    arg_constraints = {}  # pyright: ignore

    def __init__(self, base_dist: Distribution, other: Distribution):
        self.base_dist, self.other = base_dist, other
        super().__init__(base_dist.batch_shape, base_dist.event_shape, validate_args=False)

    @property
    def support(self):
        return self.base_dist.support

    def log_prob(self, value):
        both = self.base_dist.log_prob(value), self.other.log_prob(value)
        return torch.logaddexp(*both) - math.log(2)

    def sample(self, sample_shape=()):
        ones, others = self.base_dist.sample(sample_shape), self.other.sample(sample_shape)
        coins = torch.rand(ones.shape[: ones.ndim - len(self.event_shape)]) < 0.5
        return torch.where(coins.reshape(coins.shape + (1,) * len(self.event_shape)), ones, others)


@dataclass(frozen=True, eq=False)
class Member:
    """A member of a subfamily.

    Attributes:
        law: As the loss takes it, of batch shape [1, *batch].
        variables: Those of the whole family's that stand for it, with zeros for what is left out.
        own: The subfamily's own.
        influence: By how much each draw moves the variables, [draws, *shape].
        accuracy: By how much its expected loss may exceed the least, in nats.
        reach: Members from where the draws are to beyond this one.
    """

    law: Distribution
    variables: Variables
    own: Variables
    influence: Variables
    accuracy: float
    reach: Variables


def _member(loss: PosteriorLoss, one: Subfamily) -> Member:
    """The member of least loss on the nodes there are; of mass beyond them a price is asked."""
    theta = one.theta
    chart = chart_of(theta, one.model.law)
    drawn = chart.coordinates(theta)
    held = over_few(loss, HELD)

    def law(t: Tensor) -> Distribution:
        return loss.laws.of({OWN + name: x for name, x in chart.point(t[None]).items()})

    starts = torch.cat([drawn.mean(0, keepdim=True), drawn[loss.laws.spread(STARTS)]])
    scale = drawn.std(0, correction=0)
    scale = torch.where(scale > 0, scale, 1.0)
    price = _price(loss.divergence) if isinstance(loss, NodeLoss) else 0.0

    def expected(t: Tensor) -> Tensor:
        member = law(t)
        away = price * _missed(loss, member).sum() if price else 0.0
        value = held.expected(member) + away
        if not value.requires_grad:  # as torch has it where supports differ
            raise ValueError("the loss is infinite")
        return value

    try:
        least = minimise(expected, starts, scale=scale, smooth=loss.smooth)
    except ValueError as error:
        raise ValueError(
            f"subfamily {one.name} must have a member of finite divergence from the posterior: "
            f"{error}"
        ) from error
    settled = on_all(loss, law, least, held is not loss and loss.smooth)
    values, influence = influences(
        lambda t: one.placed({name: x[0] for name, x in chart.point(t[None]).items()}),
        settled,
        least,
    )
    point = settled.point
    own = {k: x[0] for k, x in chart.point(point[None]).items()}
    far = torch.linspace(0, BEYOND, len(drawn), dtype=torch.float64)[:, None]
    reach = chart.point(starts[0] + far * (point - starts[0]))
    return Member(law(point), values, own, influence, settled.decrement, reach)


def _missed(loss: PosteriorLoss, law: Distribution) -> Tensor:
    """The mass [members] of a law that is on no node, where nodes should hold it all."""
    if not isinstance(loss, NodeLoss) or loss.nodes.kind == "importance":
        return torch.zeros(1, dtype=torch.float64)
    return torch.relu(1 - ASTRAY / 2 - loss.nodes.log_mass(law).exp().sum(-1))


def _price(divergence: FDivergence | Intrinsic) -> float:
    """What mass costs where the posterior's laws have none, or as much as drives it from there."""
    if isinstance(divergence, Intrinsic):
        return DEAR
    nowhere = torch.tensor([-math.inf], dtype=torch.float64)
    return min(DEAR, divergence.excess(nowhere, torch.zeros_like(nowhere)).item())

"""Points and weights over which a divergence between distributions is a sum, chosen once."""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.distributions import (
    Distribution,
    Independent,
    MixtureSameFamily,
    Multinomial,
    TransformedDistribution,
    VonMises,
    constraints,
)
from torch.distributions.constraints import Constraint

from rkl.bayes.loss.logits import Halves, on_logits
from rkl.bayes.loss.quadrature import (
    COARSE,
    ORDER,
    UNDERFLOW_LOG_MASS,
    Panels,
    line_of,
    refine_panels,
)
from rkl.bayes.model import Laws, moving_edge, support_of
from rkl.divergences import FDivergence, Jeffreys
from rkl.randomness import random_numbers
from rkl.stats import resample

PROBES, SAMPLES = 24, 64  # distributions that decide where nodes go, and draws of each at first
SOME = 4096  # distributions on which the nodes are checked first, before all
ATOMS = 2**13  # of a product of finite sets that is enumerated
ZERO_LOG_WEIGHT = -1e4  # a log weight of 0, in arithmetic that infinity would spoil
NEGLIGIBLE_LOG_MASS = -100.0  # a log mass that counts in infinite divergences alone
NEGLIGIBLE = -69.0  # a log mass, 1e-30, that an act cannot depend on
ORDINARY_ROUNDS, ROUNDS = 3, 10  # of placing nodes, the later where distributions were missed
MISSED = 1e-5  # by which the total of a distribution that was missed differs from 1
MAX_MISSING = 0.1  # mass of an act that a sample of nodes may lack
CLOSE, MAX_DEFECT = 1e-10, 1e-3  # by which the totals should miss 1 at most, and may not


@dataclass(frozen=True)
class Nodes:
    r"""Points x and weights w with D(p ‖ q) = Σ F(w p(x), w q(x)), F being homogeneous."""

    points: Tensor  # [m, *batch, *event], or 1 in place of an axis of the batch
    log_weight: Float[Tensor, "members m"]
    kind: Literal["enumeration", "quadrature", "importance"]
    defect: float = 0.0  # by which the total of some distribution misses 1
    coarse: "Nodes | None" = None  # a poorer rule over the same panels
    far: Bool[Tensor, " m"] | None = (
        None  # nodes at which no distribution has any mass to speak of
    )
    masked: bool = False  # supports differ: beyond its own a distribution has no mass
    logits: bool = False  # the points are logits of numbers in the unit interval

    def __len__(self) -> int:
        return self.log_weight.shape[-1]

    def only(self, mask: Tensor) -> "Nodes":
        """Some of the nodes."""
        far = None if self.far is None else self.far[mask]
        weight = self.log_weight[:, mask]
        return replace(self, points=self.points[mask], log_weight=weight, far=far)

    def log_density(self, law: Distribution) -> Float[Tensor, "lead members m"]:
        """Log p(x) of distributions [lead, *batch], the batch flattened to members."""
        points = self.points.unsqueeze(1)
        law = (on_logits(law) if self.logits else None) or law
        if self.masked:
            support: Any = support_of(law)
            inside = support.check(points)
            low = torch.as_tensor(support.lower_bound, dtype=points.dtype)
            logs = _log_prob(law, torch.where(inside, points, low))
            logs = torch.where(inside, logs, -math.inf)
        else:
            logs = _log_prob(law, points)
        return logs.reshape(len(self), law.batch_shape[0], -1).permute(1, 2, 0)

    def log_mass(self, law: Distribution) -> Float[Tensor, "lead members m"]:
        """Log w p(x)."""
        return self.log_density(law) + self.log_weight


def _log_prob(law: Distribution, points: Tensor) -> Tensor:
    """Log p(x) of points [m, 1, *batch, *event], with slopes that are finite.

    Far out densities overflow on the way to 0: they become nan, or -inf with a slope of nan. Such
    points are moved to where the distribution has mass, and take no part in slopes. A distribution
    that is nan elsewhere misses its total, and is refused for that.
    """
    logs = law.log_prob(points)
    lost = ~logs.detach().isfinite()
    if law.event_shape or not lost.any():
        return logs
    values = torch.where(logs.isnan(), ZERO_LOG_WEIGHT, logs.detach())
    best = values.argmax(0, keepdim=True)
    mass = torch.take_along_dim(points.expand_as(logs), best, 0)
    return torch.where(lost, values, law.log_prob(torch.where(lost, mass, points)))


def nodes_for(
    laws: Laws, divergence: FDivergence | None = None, *, size: int = 4096, seed: int = 0
) -> Nodes:
    r"""The nodes for all of these distributions, and for what lies among them.

    - A finite support is enumerated.
    - A line, half-line, interval, circle or the counts are cut into panels, in a coordinate that
      reaches the end of the tails (of Beta distributions and their like the logit), until the
      totals of some distributions and the divergences between them stand; each has nodes that
      integrate, or sum, polynomials exactly.
    - Anything else is sampled from the posterior predictive r = E p, with weights 1/(m r); so is
      a line on which distributions are too narrow for where they lie.

    Except for the last, whose totals hold on average by construction, every distribution must have
    the total 1.

    Args:
        laws: The distributions.
        divergence: What will be integrated; by default both Kullback–Leibler divergences.
        size: Number of nodes of an importance sample.
        seed: Of its random numbers. Nothing else is random, except where panels are begun.

    Raises:
        ValueError: The support moves from draw to draw, or a distribution has another total than
            1.

    >>> theta = {"loc": torch.tensor([0.0, 1.0, 2.0]).double()}
    >>> laws = Laws(theta, lambda t: torch.distributions.Normal(t["loc"], 1.0), torch.ones(3) / 3)
    >>> nodes = nodes_for(laws)
    >>> nodes.kind, nodes.defect < 1e-12
    ('quadrature', True)
    """
    try:
        if on_logits(laws.at(slice(None))) is None:
            return _nodes(laws, divergence or Jeffreys(), size, seed)
        by_logits = replace(laws, law=lambda theta: on_logits(laws.law(theta)))
        nodes = _nodes(by_logits, divergence or Jeffreys(), size, seed)
        coarse = nodes.coarse and replace(nodes.coarse, logits=True)
        return replace(nodes, logits=True, coarse=coarse)
    except NotImplementedError as error:
        raise ValueError(
            f"family must make distributions that have a support and can be sampled; {error}"
        ) from error


def _nodes(laws: Laws, divergence: FDivergence, size: int, seed: int) -> Nodes:
    every = laws.at(slice(None))
    if edge := moving_edge(every):
        if (atoms := _atoms_of_all(every)) is not None:
            return _with_defect(laws, *atoms, masked=True)
        raise ValueError(
            f"the support of {type(every).__name__} moves from draw to draw ({edge}), and its "
            f"divergences have no closed form: only the KLs between uniform or Pareto "
            "distributions, and losses on finite supports, can follow. Hold the edge fixed: give "
            "a number in place of the variable that moves it."
        )
    first = laws.at(laws.spread(1))
    atoms = _atoms(first)
    if atoms is not None:
        return _with_defect(laws, *atoms)
    with random_numbers(seed), torch.no_grad():
        return _quadrature(laws, divergence, size) if _on_line(first) else _importance(laws, size)


def with_slopes(laws: Laws, nodes: Nodes) -> Nodes:
    """The nodes without those of next to no mass at which a log-density has no finite slopes.

    There a slope or a curvature of the log-density overflows to nan, and one nan would be the
    slope of the whole loss.

    Raises:
        ValueError: The log-density has none where some distribution has mass.
    """
    if nodes.kind == "importance" or nodes.masked:
        return nodes
    rows = laws.spread(PROBES // 4).tolist()
    rows += [int(i) for x in laws.theta.values() for i in _extremes(x)]
    coarse = nodes.coarse and replace(nodes.coarse, coarse=None)
    lost_by_part = []
    for rule in (nodes, coarse):
        if rule is None:
            continue
        counts = torch.zeros(len(rule), dtype=torch.int64)
        for row in dict.fromkeys(rows):
            theta = {name: x[row : row + 1] for name, x in laws.theta.items()}
            counts[_without_slopes(laws, rule, theta, torch.arange(len(rule)))] += 1
        lost_by_part.append(counts)
    if not any(counts.any() for counts in lost_by_part):
        return nodes
    heavy = [_totals(laws, rule)[1] > NEGLIGIBLE for rule in (nodes, coarse) if rule is not None]
    # A draw on the edge of its domain, such as a rate of 0, has none; slopes are those of acts.
    spoilt = heavy[0] & (2 * lost_by_part[0] > len(dict.fromkeys(rows)))
    if bool(spoilt.any()):
        at = nodes.points[spoilt][0].flatten()[0].item()
        raise ValueError(
            f"the log-density of the family has no finite slope at {at:.6g}, where it has mass."
        )
    lost = [(counts > 0) & ~mass for counts, mass in zip(lost_by_part, heavy, strict=True)]
    rest = nodes.only(~lost[0])
    return rest if coarse is None else replace(rest, coarse=coarse.only(~lost[1]))


def _extremes(x: Tensor) -> Tensor:
    flat = x.reshape(len(x), -1)[:, :4]
    return torch.cat([flat.argmin(0), flat.argmax(0)])


def _without_slopes(
    laws: Laws, nodes: Nodes, theta: Mapping[str, Tensor], places: Tensor
) -> Tensor:
    """Those of some nodes at which the log-density of one draw has no finite slopes.

    Nodes are halved until a half is sound: one nan spoils every sum that contains it.
    """
    if not len(places) or _slopes_are_finite(laws, nodes.only(places), theta):
        return places[:0]
    if len(places) == 1:
        return places
    halves = places.chunk(2)
    return torch.cat([_without_slopes(laws, nodes, theta, half) for half in halves])


def _slopes_are_finite(laws: Laws, nodes: Nodes, theta: Mapping[str, Tensor]) -> bool:
    leaves = {k: x.detach().requires_grad_() for k, x in theta.items() if x.is_floating_point()}
    with torch.enable_grad():
        total = nodes.log_mass(laws.of({**theta, **leaves})).sum()
        if not leaves or not total.requires_grad:
            return True
        first = torch.autograd.grad(
            total, list(leaves.values()), create_graph=True, materialize_grads=True
        )
        flat = torch.cat([x.flatten() for x in first])
        if not flat.isfinite().all() or not flat.requires_grad:
            return bool(flat.isfinite().all())
        second = torch.autograd.grad(flat.sum(), list(leaves.values()), materialize_grads=True)
    return all(bool(x.isfinite().all()) for x in second)


def joint(laws: Laws) -> bool:
    """True for more coordinates than a grid can hold: the nodes are an importance sample."""
    law = laws.at(laws.spread(1))
    return _atoms(law) is None and not _on_line(law)


def _on_line(law: Distribution) -> bool:
    return _support(law).event_dim == 0 and law.event_shape == ()


def independent_parts(law: Distribution) -> Distribution:
    """The distribution rid of Independent: by the chain rule both KLs of a product are sums."""
    while isinstance(law, Independent):
        law = law.base_dist
    return law


def _support(law: Distribution) -> Constraint:
    if isinstance(law, MixtureSameFamily):
        return _support(law.component_distribution)
    support = support_of(law)
    if support is None:
        raise NotImplementedError(f"{type(law).__name__} has no support.")
    return support


def _atoms(law: Distribution) -> tuple[Tensor, Tensor] | None:
    """The atoms of a finite support [m, *batch, *event], and the log weight that each has."""
    members = law.batch_shape[1:].numel()
    support = _support(law)
    low, high = _ends(law)
    if law.event_shape == () and support.is_discrete and low is not None and high is not None:
        steps = torch.arange(int((high - low).max()) + 1).double()
        steps = steps.reshape(-1, *[1] * high.ndim)
        inside = low + steps <= high  # members may differ in how many atoms they have
        weight = torch.where(inside, 0.0, ZERO_LOG_WEIGHT).double().reshape(len(steps), members).T
        return torch.minimum(low + steps, high), weight
    if isinstance(support, type(constraints.one_hot)):
        points = torch.eye(law.event_shape[-1], dtype=torch.float64)
    elif (axes := _axes(law)) is not None:
        points = torch.cartesian_prod(*axes).reshape(-1, *law.event_shape)
    elif isinstance(law, Multinomial) and _outcomes(law) <= ATOMS:
        points = _counts_of_classes(law)
    else:
        return None
    points = points.reshape(len(points), *[1] * (len(law.batch_shape) - 1), *law.event_shape)
    return points, torch.zeros(members, len(points), dtype=torch.float64)


def _outcomes(law: Multinomial) -> int:
    return math.comb(law.total_count + law.event_shape[-1] - 1, law.total_count)


def _counts_of_classes(law: Multinomial) -> Tensor:
    """All counts [m, classes] with the total of a multinomial, as trials between bars."""
    places = law.total_count + law.event_shape[-1] - 1
    bars = itertools.combinations(range(places), law.event_shape[-1] - 1)
    edges = torch.tensor([(-1, *each, places) for each in bars], dtype=torch.float64)
    return edges.diff(dim=-1) - 1


def _atoms_of_all(law: Distribution) -> tuple[Tensor, Tensor] | None:
    """The union of the atoms of distributions whose finite supports differ."""
    support = support_of(law)
    if law.event_shape or support is None or not support.is_discrete:
        return None
    ends = [getattr(support, f"{side}_bound", None) for side in ("lower", "upper")]
    if any(end is None for end in ends):
        return None
    low, high = (torch.as_tensor(end).double().expand(law.batch_shape) for end in ends)
    points = torch.arange(int(low.min()), int(high.max()) + 1).double()
    members = law.batch_shape[1:].numel()
    weight = torch.zeros(members, len(points), dtype=torch.float64)
    return points.reshape(len(points), *[1] * (len(law.batch_shape) - 1)), weight


def _ends(law: Distribution) -> tuple[Tensor | None, Tensor | None]:
    """The least and the greatest value [*batch], where there is one; of a mixture, of any part."""
    if isinstance(law, MixtureSameFamily):
        low, high = _ends(law.component_distribution)
        return (
            None if low is None else low.amin(-1),
            None if high is None else high.amax(-1),
        )
    support = support_of(law)
    if isinstance(support, type(constraints.boolean)):
        zero_one = torch.tensor(0.0), torch.tensor(1.0)
    else:
        zero_one = (getattr(support, f"{end}_bound", None) for end in ("lower", "upper"))
    low, high = (
        None if x is None else torch.as_tensor(x).double().expand(law.batch_shape)[0]
        for x in zero_one
    )
    return low, high


def _axes(law: Distribution) -> list[Tensor] | None:
    if not isinstance(law, Independent) or law.event_shape.numel() < 2:
        return None
    part = independent_parts(law)
    low, high = (
        _ends(part) if part.event_shape == () and _support(part).is_discrete else (None, None)
    )
    if low is None or high is None or (low != low.min()).any() or (high != high.max()).any():
        return None
    axis = torch.arange(int(low.min()), int(high.max()) + 1).double()
    fits = law.event_shape.numel() * math.log(len(axis)) <= math.log(ATOMS)
    return [axis] * law.event_shape.numel() if fits else None


def _with_defect(laws: Laws, points: Tensor, log_weight: Tensor, masked: bool = False) -> Nodes:
    nodes = Nodes(points, log_weight, "enumeration", masked=masked)
    totals, _ = _totals(laws, nodes)
    return replace(nodes, defect=_refuse(totals))


def _refuse(totals: Tensor) -> float:
    """The largest defect; too large a one is an error."""
    off = (totals - 1).abs().amax(-1).nan_to_num(math.inf)
    worst = int(off.argmax())
    if off[worst] > MAX_DEFECT:
        total = totals[worst][(totals[worst] - 1).abs().argmax()].item()
        raise ValueError(
            f"family must make distributions of total 1 over their support; that of draw {worst} "
            f"has {total:.6g} on the nodes. Is it normalised, not far narrower than the draws are "
            "spread, without mass nearer than 1e-16 to the end of an interval, and is its "
            "log-density a number wherever it has mass?"
        )
    return off[worst].item()


def _totals(laws: Laws, nodes: Nodes) -> tuple[Tensor, Tensor]:
    """The totals [draws, members] on the nodes, and the largest log mass [m] of each node."""
    totals, peak = [], torch.full((len(nodes),), -math.inf, dtype=torch.float64)
    for rows in laws.chunks(nodes.log_weight.numel()):
        logs = nodes.log_mass(laws.at(rows))
        totals.append(logs.exp().sum(-1))
        peak = torch.maximum(peak, logs.amax((0, 1)))
    return torch.cat(totals), peak


def _quadrature(laws: Laws, divergence: FDivergence, size: int) -> Nodes:
    probes, some = laws.spread(PROBES), laws.spread(SOME)
    panels = _place_panels(laws, probes, divergence)
    for i in range(ROUNDS):
        totals, _ = _totals(laws.only(some), _of_rule(panels, ORDER))
        off = (totals - 1).abs().amax(-1).nan_to_num(math.inf)
        late = i >= ORDINARY_ROUNDS
        if off.max() < (MISSED if late else CLOSE) or (late and panels.is_full):
            break
        worst = some[off.topk(min(PROBES // 3, len(some))).indices]
        probes = torch.cat([probes, worst]).unique()
        panels = _place_panels(laws, probes, divergence)
    nodes = _of_rule(panels, ORDER)
    totals, peak = _totals(laws, nodes)
    resolvable = panels.is_full or _is_normalised(laws.at(laws.spread(1)))
    if resolvable and (totals - 1).abs().max() > MAX_DEFECT:
        return _importance(laws, size)
    defect, mask = _refuse(totals), peak > UNDERFLOW_LOG_MASS
    u, v = panels.rule(ORDER)[0][mask], panels.rule(COARSE)[0]
    coarse = _of_rule(panels, COARSE).only((v >= u.min()) & (v <= u.max()))
    far = peak[mask] < NEGLIGIBLE_LOG_MASS
    return replace(nodes.only(mask), defect=defect, coarse=coarse, far=far)


def _is_normalised(law: Distribution) -> bool:
    """True for distributions of torch and rkl, whose densities integrate to 1."""
    match law:
        case Independent():
            return _is_normalised(law.base_dist)
        case MixtureSameFamily():
            return _is_normalised(law.component_distribution)
        case Halves():
            return _is_normalised(law.base_dist) and _is_normalised(law.other)
    own = ("torch.distributions.", "rkl.bayes.families.named", "rkl.bayes.loss.logits")
    return type(law).__module__.startswith(own) and type(law) is not TransformedDistribution


def _place_panels(laws: Laws, probes: Tensor, divergence: FDivergence) -> Panels:
    law = laws.at(probes)
    sample = law.sample(torch.Size([SAMPLES])).double()
    line = line_of(*_ends(law), _kind(law), sample.flatten(0, 1))
    return refine_panels(law, line, sample, divergence, every=len(probes) == len(laws))


def _of_rule(panels: Panels, order: int) -> Nodes:
    _, x, log_weight = panels.rule(order)
    return Nodes(x, log_weight.reshape(len(x), -1).T, "quadrature")


def _kind(law: Distribution) -> Literal["circle", "counts", "line"]:
    """The kind of support of a distribution of numbers; of angles, torch reports real numbers."""
    inner = getattr(law, "component_distribution", getattr(law, "base_dist", None))
    if isinstance(law, VonMises):
        return "circle"
    if inner is not None and _kind(inner) == "circle":
        return "circle"
    return "counts" if _support(law).is_discrete else "line"


def _importance(laws: Laws, size: int) -> Nodes:
    """A sample of the posterior predictive r, weighted by 1/(m r)."""
    points = laws.at(resample(laws.weights.log(), count=size, offset=0.5)).sample()
    members = laws.at(slice(0, 1)).batch_shape[1:].numel()
    nodes = Nodes(points, torch.zeros(members, size, dtype=torch.float64), "importance")
    density = torch.full((members, size), -math.inf, dtype=torch.float64)
    for rows in laws.chunks(size * members):
        weighted = nodes.log_density(laws.at(rows)) + laws.weights[rows].log()[:, None, None]
        density = torch.logaddexp(density, weighted.logsumexp(0))
    nodes = replace(nodes, log_weight=-math.log(size) - density)
    totals, _ = _totals(laws, nodes)
    return replace(nodes, defect=(totals - 1).abs().max().item())

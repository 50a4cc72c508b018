"""Simpler families: the member of each that stands for the posterior best, and what it loses."""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from rkl.bayes.act import Estimate, bayes_act
from rkl.bayes.answer import Act, elements
from rkl.bayes.axes import places_of_axes
from rkl.bayes.diagnostics import diagnose, mean_of_diagnosed, nan_where
from rkl.bayes.draws import Draws, read_draws
from rkl.bayes.families.regression import Regression, by_rows
from rkl.bayes.identified import Unidentified, find_unidentified, sentences, without_unidentified
from rkl.bayes.loss.between import Intrinsic, Weights, between
from rkl.bayes.loss.expected import (
    NodeLoss,
    PosteriorLoss,
    node_mass,
    posterior_loss,
    thin_loss,
)
from rkl.bayes.loss.logits import Halves
from rkl.bayes.loss.nodes import nodes_for
from rkl.bayes.model import (
    Model,
    Theta,
    family_in,
    labels_of,
    laws_of,
    probe,
    read_family,
    support_of,
)
from rkl.bayes.problem import Problem, Variables
from rkl.bayes.solve.closed import (
    Solution,
    directions_of,
    excess_risk,
    minimum_risk,
    nearest,
    solve,
)
from rkl.bayes.solve.errors import Averages, Point, average_draws
from rkl.bayes.solve.numerical import influences, refine_on_all
from rkl.bayes.solve.unconstrained import chart_of, minimise, scale_of
from rkl.bayes.tables import Table
from rkl.divergences import FDivergence, ReverseKL
from rkl.names import Stack
from rkl.randomness import random_numbers
from rkl.runs import finite_or_null
from rkl.stats import Mean
from rkl.tables import Cell, cell_text

MAX_NUMBERS = 6  # numbers of an act that are printed
RISK, EXCESS = "risk (nats)", "excess (nats)"
MAX_LOG_DENSITIES = 2**20  # log-densities over which a loss that needs every draw is minimised
STARTS = 4  # draws that a minimiser starts from
MAX_MASS_BEYOND = 1e-6  # mass of a distribution that may lie beyond the nodes
ROUNDS, REACH, MAX_PRICE = 6, 1.5, 1e3  # of choosing nodes; how far past a member; nats
OWN_PREFIX = "of the subfamily: "  # before its variables, beside those of the family


@dataclass(frozen=True, eq=False)
class Subfamily:
    """A simpler family, and how its variables follow from the posterior.

    Attributes:
        name: What it is called.
        model: Its distributions.
        problem: That of the whole family, its draws such that the model takes them.
        places: By variable, where in the whole family's the numbers go that are kept of it:
            [kept, all], of 0 and 1.
        zeros: By variable, the shape of those of which no number is kept.
    """

    name: str
    model: Model
    problem: Problem
    places: Mapping[str, Tensor] = field(default_factory=dict)
    zeros: Mapping[str, torch.Size] = field(default_factory=dict)

    @property
    def theta(self) -> Variables:
        """All draws of its variables [draws, *shape], in the shape that its act has."""
        draws = self.problem.draws
        return {
            name: self.problem.align(name, draws[name].flatten(0, 1), self.model)
            for name in self.model.names
        }

    def place(self, variables: Mapping[str, Tensor]) -> Variables:
        """The variables [*lead, *shape] with zeros for what was left out."""
        name, first = next(iter(variables.items()))
        lead = first.shape[: first.ndim - len(self.problem.shape(name, self.model))]
        placed = {k: x @ self.places[k] if k in self.places else x for k, x in variables.items()}
        return placed | {k: first.new_zeros((*lead, *size)) for k, size in self.zeros.items()}

    def within(self, whole: Problem) -> bool:
        """True if it lies in the exponential family of the whole, under the same wrappings."""
        law = self.model.law(probe(self.problem.draws, self.model.names))
        base = self.model.unwrap(law).base
        if whole.family is None or family_in(base) != whole.family:
            return False
        again = whole.structure.wrap(base)
        with random_numbers(0), torch.no_grad():
            x = law.sample()
            try:
                log_p, log_q = law.log_prob(x), again.log_prob(x)
            except ValueError:  # over other events, or beyond the support
                return False
        return log_p.shape == log_q.shape and torch.allclose(log_p, log_q)


def read_subfamilies(whole: Problem, given: Any) -> list[Subfamily]:
    """The subfamilies of one text or object, of a list, or of a dict by name.

    Raises:
        ValueError: One does not go with the whole family, or two have one name.
        TypeError: They are none of these.
    """
    match given:
        case Mapping():
            named = list(given.items())
        case list() | tuple():
            named = [(None, one) for one in given]
        case _ if isinstance(given, str) or callable(given):
            named = [(None, given)]
        case _:
            raise TypeError(
                f"subfamilies must be a family, a list or a dict of families; got {given!r}."
            )
    if not named:
        raise ValueError("subfamilies must hold at least one; got none.")
    subfamilies_read = [_read(whole, name, one) for name, one in named]
    names = [whole.model.text, *(one.name for one in subfamilies_read)]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(
            f"subfamilies must have names of their own; got {twice[0]} twice. "
            "Hand over a dict by names that you choose."
        )
    return subfamilies_read


def _read(whole: Problem, name: str | None, given: Any) -> Subfamily:
    if isinstance(given, list | tuple | range):
        return _of_columns(whole, name, list(given))
    if not (isinstance(given, str) or callable(given)):
        raise TypeError(
            "each subfamily must be a text, a class, a callable or a list of columns; "
            f"got {given!r}."
        )
    model = read_family(given, whole.draws, whole.model.design)
    if model.events is not None:  # its axes stand among those of the whole family
        events = {**(whole.model.events or {}), **model.events}
        arrays = {key: whole.draws.of(key) for key in events}
        model = replace(model, places=places_of_axes(arrays, events))
    subfamily = Subfamily(name or model.text, model, whole)
    _refuse_unlike(subfamily)
    return subfamily


def _refuse_unlike(subfamily: Subfamily) -> None:
    whole, model = subfamily.problem, subfamily.model
    law, other = model.law(probe(whole.draws, model.names)), whole.model.law(whole.few)
    shape, batch = law.batch_shape[1:], other.batch_shape[1:]
    # A text has parameters of each member of a batch; a callable decides what they share.
    short = model.events is not None and len(shape) <= len(batch)
    fits = shape == batch or (
        short and all(n in (1, m) for n, m in zip(shape, batch, strict=False))
    )
    if _counts(law) != _counts(other):
        raise ValueError(
            f"subfamily {subfamily.name} must make distributions as {whole.model.text} does: "
            "one of them has a density and the other counts."
        )
    if law.event_shape != other.event_shape or not fits:
        raise ValueError(
            f"subfamily {subfamily.name} must make distributions as {whole.model.text} does, of a "
            f"batch {list(batch)} and events {list(other.event_shape)}; got {list(shape)} and "
            f"{list(law.event_shape)}."
        )


def _counts(law: Distribution) -> bool:
    support = support_of(law)
    return support is not None and support.is_discrete


def _of_columns(whole: Problem, name: str | None, columns: list) -> Subfamily:
    model, settings = whole.model, whole.model.settings or {}
    coefficients = settings.get("coefficients")
    regression = model.kind is not None and issubclass(model.kind, Regression)
    if not (regression and isinstance(coefficients, str | Stack)):
        raise ValueError(
            f"a list of columns, {columns!r}, needs a regression by its name, such as "
            f"'logistic-regression(coefficients=beta)', and its design=; got {model.text}."
        )
    parts = coefficients if isinstance(coefficients, Stack) else Stack([coefficients])
    names = [label for label in labels_of(model.design) if label in model.columns]
    columns_kept = _column_places(columns, model.columns, names, parts)
    places, first = {}, 0
    for part in parts:
        size = (
            whole.draws.shape(part)[-1] if isinstance(part, str) and _is_vector(model, part) else 1
        )
        own_places = [i - first for i in columns_kept if first <= i < first + size]
        first += size
        if isinstance(part, str):
            places[part] = torch.eye(size, dtype=torch.float64)[own_places]
    return _shorter(whole, name or f"columns {', '.join(map(str, columns))}", places)


def _is_vector(model: Model, name: str) -> bool:
    return bool((model.events or {}).get(name, 0))


def _shorter(whole: Problem, name: str, places: Mapping[str, Tensor]) -> Subfamily:
    """The model with only some numbers of some variables, and zeros for the others."""
    model, shorter = whole.model, {k: whole.draws[k] for k in whole.model.names}
    zeros = {}
    for variable, place in places.items():
        if not len(place):
            zeros[variable] = whole.shape(variable)
            del shorter[variable]
        elif _is_vector(model, variable):
            shorter[variable] = shorter[variable] @ place.T
    partial = {k: x for k, x in places.items() if k in shorter and _is_vector(model, k)}
    names = tuple(shorter)

    def make(theta: Theta) -> Distribution:
        full = {k: theta[k] @ partial[k] if k in partial else theta[k] for k in names}
        like = full[names[0]]
        # without the axis of the draws, which others have
        full |= {k: like.new_zeros(whole.draws.shape(k)) for k in zeros}
        return model.make(Theta({k: full[k] for k in model.names}))

    draws = Draws(shorter, whole.draws.weights)
    events = {k: n for k, n in (model.events or {}).items() if k in names}
    some_draws = probe(draws, names)
    reduced = Model(
        *(name, names, make),
        events=events,
        design=model.design,
        few=some_draws,
        places=model.places,
    )
    problem = replace(whole, draws=draws, model=reduced)
    return Subfamily(name, reduced, problem, partial, zeros)


def _column_places(
    columns: list, labels: tuple[str, ...], design: list[str], parts: Stack
) -> list[int]:
    """The places of columns, given by number or by name, among the labels of the coefficients.

    A number counts columns as the design has them. A name is that of a column of the design, or
    of a variable where each column has its own.
    """
    count = len(labels)
    place_of: dict[Any, int] = dict(enumerate(range(count)))
    if {*design} == {*labels} and len(design) == len({*labels}):
        place_of |= {i: labels.index(label) for i, label in enumerate(design)}
    place_of |= {label: i for i, label in enumerate(labels)}
    if len(parts) == count:
        place_of |= {part: i for i, part in enumerate(parts) if isinstance(part, str)}
        labels = tuple(str(part) for part in parts)
    places = [place_of.get(column, -1) for column in columns]
    if not places or min(places) < 0 or len(set(places)) < len(places):
        raise ValueError(
            f"columns must be some of {', '.join(labels)}, each once; got {columns!r}."
        )
    return places


def best_member(whole: Problem, one: Subfamily) -> tuple[PosteriorLoss, "Member"]:
    """The loss, on nodes that reach as far as the best member does, and that member.

    Raises:
        ValueError: No member has a finite loss, or no nodes reach the best.
    """
    reach, missed = one.theta, 0.0
    for _ in range(ROUNDS):
        loss = _loss(whole, one, reach)
        member = _member(loss, one)
        missed = _mass_beyond(loss, member.law).max().item()
        if missed <= MAX_MASS_BEYOND:
            return loss, member
        reach = member.reach
    raise ValueError(
        f"subfamily {one.name} must keep to where the posterior's distributions have mass; its "
        f"best member has {missed:.2g} of its own elsewhere, where the divergence is not known."
    )


def _loss(whole: Problem, one: Subfamily, reach: Variables) -> PosteriorLoss:
    """The expected loss over the draws, with the subfamily's variables beside the family's.

    Nodes are chosen for the distributions of the draws and for those of as many ``reach``.
    """
    divergence, weights = whole.divergence, whole.draws.weights
    one_law = one.model.law({name: x[:1] for name, x in one.theta.items()})
    alike = type(one_law) is type(whole.model.law({k: x[:1] for k, x in whole.theta.items()}))

    def either(theta: Mapping[str, Tensor]) -> Distribution:
        own_theta = {
            k.removeprefix(OWN_PREFIX): x for k, x in theta.items() if k.startswith(OWN_PREFIX)
        }
        law = one.model.law(own_theta) if own_theta else whole.model.law(theta)
        return law if alike else by_rows(law)

    laws = laws_of(whole.theta, either, None if weights is None else weights.flatten())
    loss = posterior_loss(laws, divergence, seed=whole.seed)
    theirs, own_theta = loss.laws, {OWN_PREFIX + name: x for name, x in reach.items()}
    p, q = theirs.at(theirs.spread(1)), theirs.of({name: x[:1] for name, x in own_theta.items()})
    if loss.nodes is None and between(divergence, p, q) is not None:
        return loss
    if loss.nodes is not None and loss.nodes.kind == "enumeration":
        return loss

    def both(theta: Mapping[str, Tensor]) -> Distribution:
        parts = (
            {name: x for name, x in theta.items() if (name in own_theta) is ours}
            for ours in (False, True)
        )
        return Halves(*(theirs.law(part) for part in parts))

    mixed = replace(theirs, theta={**theirs.theta, **own_theta}, law=both)
    criterion = divergence if isinstance(divergence, FDivergence) else None
    nodes = nodes_for(mixed, criterion, seed=whole.seed)
    needed = p.event_shape != () or (loss.nodes is not None and loss.nodes.kind == "importance")
    if nodes.kind == "importance" and not needed:  # a sample would not show an infinite loss
        raise ValueError(
            f"subfamily {one.name} must have its mass where the posterior's distributions have "
            "theirs; no nodes along the line follow the distributions of both."
        )
    return posterior_loss(laws, divergence, nodes=nodes, seed=whole.seed)


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
    """The member of least loss on the nodes there are; mass beyond them is penalised."""
    theta = one.theta
    chart = chart_of(theta, one.model.law)
    drawn = chart.coordinates(theta)
    thinned = thin_loss(loss, MAX_LOG_DENSITIES)

    def law(t: Tensor) -> Distribution:
        return loss.laws.of({OWN_PREFIX + name: x for name, x in chart.point(t[None]).items()})

    starts = torch.cat([drawn.mean(0, keepdim=True), drawn[loss.laws.spread(STARTS)]])
    scale = scale_of(drawn)
    price = _price(loss.divergence) if isinstance(loss, NodeLoss) else 0.0

    def penalised_risk(t: Tensor) -> Tensor:
        member = law(t)
        away = price * _mass_beyond(loss, member).sum() if price else 0.0
        value = thinned.risk(member) + away
        if not value.requires_grad:  # as torch has it where supports differ
            raise ValueError("the loss is infinite")
        return value

    try:
        least = minimise(penalised_risk, starts, scale=scale, smooth=loss.smooth)
    except ValueError as error:
        raise ValueError(
            f"subfamily {one.name} must have a member of finite divergence from the posterior: "
            f"{error}"
        ) from error
    settled = refine_on_all(loss, law, least, thinned is not loss and loss.smooth)
    values, influence = influences(
        lambda t: one.place({name: x[0] for name, x in chart.point(t[None]).items()}),
        settled,
        least,
    )
    point = settled.point
    own_variables = {k: x[0] for k, x in chart.point(point[None]).items()}
    far = torch.linspace(0, REACH, len(drawn), dtype=torch.float64)[:, None]
    reach = chart.point(starts[0] + far * (point - starts[0]))
    return Member(law(point), values, own_variables, influence, settled.decrement, reach)


def _mass_beyond(loss: PosteriorLoss, law: Distribution) -> Tensor:
    """The mass [members] of a distribution that is on no node, where nodes should hold it all."""
    if not isinstance(loss, NodeLoss) or loss.nodes.kind == "importance":
        return torch.zeros(1, dtype=torch.float64)
    return torch.relu(1 - MAX_MASS_BEYOND / 2 - loss.nodes.log_mass(law).exp().sum(-1))


def _price(divergence: FDivergence | Intrinsic) -> float:
    """The loss per unit of mass where the posterior has none, bounded."""
    if isinstance(divergence, Intrinsic):
        return MAX_PRICE
    nowhere = torch.tensor([-math.inf], dtype=torch.float64)
    return min(MAX_PRICE, divergence.excess(nowhere, torch.zeros_like(nowhere)).item())


@dataclass(frozen=True, eq=False)
class Submodel:
    """The member of a simpler family with the least posterior expected divergence.

    Attributes:
        act: The member, by its parameters. Of a regression, each column has its coefficient, 0
            where it was left out.
        risk: The posterior mean of the divergence, in nats, [*batch].
        excess: By how much that exceeds the risk of the whole family's act, in nats; its error is
            that of the difference, over the same draws.
        method: How it was found.
        accuracy: By how much the risk may exceed the least, in nats.
        warnings: What the reader should know, one sentence each.
    """

    act: Act
    risk: Mean
    excess: Mean
    method: str
    accuracy: float
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Projection:
    """The act of a family, and that of every simpler one by its name."""

    full: Estimate
    submodels: Mapping[str, Submodel]

    @functools.cached_property
    def table(self) -> Table:
        """A row for each family, and for each member of the batch."""
        full = self.full
        none = torch.zeros(full.problem.batch, dtype=torch.float64)
        parameters = {name: full.act.parameters[name] for name in full.problem.model.names}
        act = replace(full.act, parameters=parameters)
        every = {full.family: (act, full.risk, Mean(none, none))}
        every |= {name: (x.act, x.risk, x.excess) for name, x in self.submodels.items()}
        return Table(
            f"Families in place of {full.family} under {full.divergence}",
            ("family", RISK, EXCESS, "act"),
            [row for name, found in every.items() for row in self._rows(name, *found)],
            self._notes(),
            {name: found[0] for name, found in every.items()},
        )

    def __str__(self) -> str:
        return str(self.table)

    def _repr_html_(self) -> str:
        return self.table._repr_html_()

    def to_dict(self) -> dict[str, Any]:
        """Everything but the draws, as JSON can hold it."""
        return finite_or_null(self.table.to_dict())

    def to_dataframe(self) -> Any:
        """The table, a data frame of pandas."""
        return self.table.to_dataframe()

    def _rows(self, name: str, act: Act, risk: Mean, excess: Mean) -> list[tuple[Cell, ...]]:
        batch = self.full.problem.batch
        cells = (
            zip(*(x.expand(batch).flatten().tolist() for x in mean), strict=True)
            for mean in (risk, excess)
        )
        problem = self.full.problem
        texts = [_act_text(problem, act, member) for member in range(batch.numel())]
        labels = elements(f"{name} ", batch, self.full.problem.batch_axes)
        return [(label.strip(), *row) for label, *row in zip(labels, *cells, texts, strict=True)]

    def _notes(self) -> tuple[str, ...]:
        notes = [
            f"{name}: {x.method}" + f", within {x.accuracy:.1g} nats" * (x.accuracy > 1e-9)
            for name, x in self.submodels.items()
        ]
        notes += [f"{name}: {text}" for name, x in self.submodels.items() for text in x.warnings]
        return (*notes, *(f"Warning: {text}" for text in self.full.diagnostics.warnings))


def _act_text(problem: Problem, act: Act, member: int) -> str:
    texts, batch = [], problem.batch
    for name, mean in act.parameters.items():
        value, error = mean
        is_variable = name in problem.model.names and problem.shape(name) == value.shape
        axes = problem.axes(name) if is_variable else [None] * value.ndim
        if batch and value.shape[: len(batch)] == batch:
            value, error = (x.flatten(0, len(batch) - 1)[member] for x in mean)
            axes = axes[len(batch) :]
        pairs = zip(value.flatten().tolist(), error.flatten().tolist(), strict=True)
        labels = elements(name, value.shape, axes)
        texts += [
            f"{k} = {cell_text(pair)}"
            for k, pair in zip(labels, pairs, strict=True)
            if not math.isnan(pair[0])
        ]
    return ", ".join(texts[:MAX_NUMBERS] + ["..."] * (len(texts) > MAX_NUMBERS))


def project(
    draws: Any,
    family: Any,
    subfamilies: Any,
    divergence: Any = ReverseKL(),
    *,
    weights: Any = None,
    design: Any = None,
    seed: int = 0,
) -> Projection:
    r"""The member t of each simpler family that minimises E[D(P_θ ‖ P_t) | data].

    The posterior stays that of the whole family: a simpler one is not fitted to the data but to
    what the whole family predicts. Its excess risk over the whole family's act says what it costs
    to leave something out. Under both KLs, within one exponential family, it is by Pythagoras the
    divergence from that act, and no draws are needed again.

    Source: Goutis and Robert (1998); Piironen, Paasiniemi and Vehtari (2020), arXiv 1810.02406,
    for KL().

    Args:
        draws: The posterior: whatever :func:`rkl.bayes.read_draws` reads.
        family: The whole family, as in ``bayes_act``.
        subfamilies: One simpler family, a list of them, or a dict by their names: a text with
            fixed numbers such as "normal(loc=0, scale=sigma)"; a class or a callable from theta to
            distributions; or for a regression a list of the columns of the design that are kept,
            by number, or by name where the design is a data frame.
        divergence: The loss, D(posterior draw ‖ member).
        weights: Weight of every draw, [chains, draws].
        design: As in ``bayes_act``.
        seed: Random seed, for families whose divergences are estimated from samples.

    Returns:
        The act of the whole family, and the members with their risks.

    Raises:
        ValueError: A family does not go with the draws, with the whole family or the divergence.
        TypeError: An argument is of the wrong kind.

    >>> generator = torch.Generator().manual_seed(0)
    >>> mu, z = torch.randn(2, 4, 500, generator=generator, dtype=torch.float64)
    >>> draws = {"mu": 1 + 0.1 * mu, "sigma": (0.1 * z).exp()}
    >>> family, simpler = "normal(loc=mu, scale=sigma)", "normal(loc=0, scale=sigma)"
    >>> result = project(draws, family, simpler)
    >>> loc, scale = result.full.act["loc"], result.full.act["scale"]
    >>> torch.allclose(result.submodels[simpler].excess.value, (loc / scale).square() / 2)
    True
    """
    full = bayes_act(read_draws(draws, weights), family, divergence, design=design, seed=seed)
    asked = read_subfamilies(full.problem, subfamilies)
    kl = full.problem.weights
    near = [one for one in asked if kl is not None and one.within(full.problem)]
    by_name = _by_pythagoras(full, kl, near) if kl is not None and near else {}
    return Projection(full, {x.name: by_name.get(x.name) or _over_draws(full, x) for x in asked})


def _by_pythagoras(full: Estimate, weights: Weights, asked: list[Subfamily]):
    whole = full.problem
    averages = average_draws(whole, directions_of(weights))
    best = solve(whole, averages, weights)
    return {one.name: _nearest(full, weights, averages, best, one) for one in asked}


def _nearest(
    full: Estimate, weights: Weights, averages: Averages, best: Solution, one: Subfamily
) -> Submodel:
    total = full.problem.total
    solution = nearest(one.problem, one.model, averages, weights)

    def outputs(at: Point) -> dict[str, Tensor]:
        measure = excess_risk(averages, at, weights)
        (act, _), (member, variables) = best.at(at), solution.at(at)
        risk = minimum_risk(averages, at, weights) + measure(member)
        excess = measure(member) - measure(act)
        return {RISK: total(risk), EXCESS: total(excess)} | one.place(variables)

    unsure = _unsure(full)
    means = {
        name: Mean(x.value, nan_where(x.error, unsure))
        for name, x in averages.with_errors(outputs, separate=False).items()
    }
    risk, excess = means.pop(RISK), means.pop(EXCESS)
    endless, unsure = full.risk.value.isinf(), full.risk.error.isnan()
    risk = Mean(torch.where(endless, torch.inf, risk.value), nan_where(risk.error, unsure))
    law = full.problem.structure.wrap(averages.family.from_natural(solution.natural))
    act, warnings = _drop_unidentified(
        full.problem, one, Act(means, law), solution.variables, None
    )
    return Submodel(act, risk, excess, solution.method, solution.accuracy, warnings)


def _drop_unidentified(
    whole: Problem,
    one: Subfamily,
    act: Act,
    variables: Variables,
    loss: PosteriorLoss | None,
) -> tuple[Act, tuple[str, ...]]:
    own_problem = replace(one.problem, model=one.model)
    some_draws = probe(one.problem.draws, one.model.names)
    some_draws = {name: one.problem.align(name, x, one.model) for name, x in some_draws.items()}
    mass = node_mass(loss) if loss is not None else None
    unidentified = find_unidentified(own_problem.law, variables, some_draws, mass=mass)
    placed = Unidentified(
        *(
            {k: x > 0 for k, x in one.place({k: m.double() for k, m in masks.items()}).items()}
            for masks in unidentified
        )
    )

    def labels(name: str) -> list[str]:
        mask = placed.unused[name]
        is_variable = whole.shape(name) == mask.shape if name in whole.model.names else False
        return elements(name, mask.shape, whole.axes(name) if is_variable else None)

    point = one.place(variables)
    clean = without_unidentified(replace(act, point=point), placed, {})
    return clean, tuple(sentences(placed, labels))


def _unsure(full: Estimate) -> Tensor:
    """Mask [*batch] of members in which no normal error holds of what the act averages."""
    batch = full.problem.batch
    errors = (mean.error.isnan().reshape(*batch, -1).any(-1) for mean in full.act.natural or ())
    return functools.reduce(torch.logical_or, errors, torch.zeros(batch, dtype=torch.bool))


def _over_draws(full: Estimate, one: Subfamily) -> Submodel:
    whole, draws = full.problem, full.problem.draws
    loss, member = best_member(whole, one)
    risk = whole.losses_at(loss, member.law)
    best = loss.laws.of({name: x[None] for name, x in full.act.point.items()})
    excess = risk - whole.losses_at(loss, best)
    shape = (draws.chains, draws.draws)
    moved = {name: x.unflatten(0, shape) for name, x in member.influence.items()}
    events = {name: max(0, x.ndim - 2 - len(whole.batch)) for name, x in moved.items()}
    averaged = {RISK: risk, EXCESS: excess, **moved}
    judgement = diagnose(averaged, draws, events)
    means_by_name = {
        name: mean_of_diagnosed(name, x, draws, judgement) for name, x in averaged.items()
    }
    for name, other in ((RISK, None), (EXCESS, best)):
        sampled = whole.sampling_error(loss, member.law, other)
        mean = means_by_name[name]
        means_by_name[name] = Mean(mean.value, mean.error.hypot(sampled))
    means = {name: Mean(x, means_by_name[name].error) for name, x in member.variables.items()}
    law = one.model.at(member.own)
    how = "in closed form"
    if loss.nodes is not None:
        how = f"on {len(loss.nodes):,} nodes ({loss.nodes.kind})"
    act, warnings = _drop_unidentified(whole, one, Act(means, law), member.own, loss)
    return Submodel(
        act,
        means_by_name[RISK],
        means_by_name[EXCESS],
        f"minimised over the draws {how}",
        member.accuracy,
        warnings,
    )

"""Simpler families: the member of each that stands for the posterior best, and what it loses."""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rkl.bayes.act import Estimate, bayes_act
from rkl.bayes.answer import Act, elements
from rkl.bayes.averages import NO_ERROR, judged, masked, mean_of
from rkl.bayes.closed import Weights
from rkl.bayes.draws import read_draws
from rkl.bayes.identified import Unidentified, sentences, unidentified, without_unidentified
from rkl.bayes.laws import probe
from rkl.bayes.losses import PosteriorLoss, node_mass
from rkl.bayes.members import best_member
from rkl.bayes.pythagoras import (
    Averages,
    Point,
    Solved,
    averages,
    directions_of,
    least,
    nearest,
    solve,
    towards,
)
from rkl.bayes.questions import Question, Variables
from rkl.bayes.subfamilies import Subfamily, read_subfamilies
from rkl.bayes.tables import Cell, Table, parenthesised
from rkl.divergences import ReverseKL
from rkl.stats import Mean

SHOWN = 6  # numbers of an act that are printed
ROUNDING = 1e-13  # error of a mean of equal numbers, relative to them
RISK, EXCESS = "risk (nats)", "excess (nats)"


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
        none = torch.zeros(full.question.batch, dtype=torch.float64)
        own = {name: full.act.parameters[name] for name in full.question.model.names}
        act = replace(full.act, parameters=own)
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
        return self.table.to_dict()

    def to_dataframe(self) -> Any:
        """The table, a data frame of pandas."""
        return self.table.to_dataframe()

    def _rows(self, name: str, act: Act, risk: Mean, excess: Mean) -> list[tuple[Cell, ...]]:
        batch = self.full.question.batch
        cells = (
            zip(*(x.expand(batch).flatten().tolist() for x in mean), strict=True)
            for mean in (risk, excess)
        )
        question = self.full.question
        told = [_told(question, act, member) for member in range(batch.numel())]
        labels = elements(f"{name} ", batch, self.full.question.batch_axes)
        return [(label.strip(), *row) for label, *row in zip(labels, *cells, told, strict=True)]

    def _notes(self) -> tuple[str, ...]:
        told = [
            f"{name}: {x.method}" + f", within {x.accuracy:.1g} nats" * (x.accuracy > 1e-9)
            for name, x in self.submodels.items()
        ]
        told += [f"{name}: {text}" for name, x in self.submodels.items() for text in x.warnings]
        return (*told, *(f"Warning: {text}" for text in self.full.diagnostics.warnings))


def _told(question: Question, act: Act, member: int) -> str:
    """The parameters of one member of a batch, as text."""
    told, batch = [], question.batch
    for name, mean in act.parameters.items():
        value, error = mean
        known = name in question.model.names and question.shape(name) == value.shape
        axes = question.axes(name) if known else [None] * value.ndim
        if batch and value.shape[: len(batch)] == batch:
            value, error = (x.flatten(0, len(batch) - 1)[member] for x in mean)
            axes = axes[len(batch) :]
        pairs = zip(value.flatten().tolist(), error.flatten().tolist(), strict=True)
        labels = elements(name, value.shape, axes)
        told += [
            f"{k} = {parenthesised(pair)}"
            for k, pair in zip(labels, pairs, strict=True)
            if not math.isnan(pair[0])
        ]
    return ", ".join(told[:SHOWN] + ["..."] * (len(told) > SHOWN))


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
            laws; or for a regression a list of the columns of the design that are kept, by
            number, or by name where the design is a data frame.
        divergence: The loss, D(posterior draw ‖ member).
        weights: Weight of every draw, [chains, draws].
        design: As in ``bayes_act``.
        seed: Of the random numbers of a family whose divergences need some.

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
    asked = read_subfamilies(full.question, subfamilies)
    kl = full.question.weights
    near = [one for one in asked if kl is not None and one.within(full.question)]
    found = _by_pythagoras(full, kl, near) if kl is not None and near else {}
    return Projection(full, {x.name: found.get(x.name) or _over_draws(full, x) for x in asked})


def _by_pythagoras(full: Estimate, weights: Weights, asked: list[Subfamily]):
    """The submodels by their names, from one pass over the draws."""
    whole = full.question
    known = averages(whole, directions_of(weights))
    best = solve(whole, known, weights)
    return {one.name: _nearest(full, weights, known, best, one) for one in asked}


def _nearest(
    full: Estimate, weights: Weights, known: Averages, best: Solved, one: Subfamily
) -> Submodel:
    """A submodel, its errors those of a function of the averages."""
    total = full.question.total
    found = nearest(one.question, one.model, known, weights)

    def outputs(at: Point) -> dict[str, Tensor]:
        measure = towards(known, at, weights)
        (act, _), (member, variables) = best.at(at), found.at(at)
        risk = least(known, at, weights) + measure(member)
        excess = measure(member) - measure(act)
        return {RISK: total(risk), EXCESS: total(excess)} | one.placed(variables)

    unsure = _unsure(full)
    means = {
        name: Mean(x.value, masked(x.error, unsure))
        for name, x in known.with_errors(outputs, separate=False).items()
    }
    risk, excess = means.pop(RISK), means.pop(EXCESS)
    endless, unsure = full.risk.value.isinf(), full.risk.error.isnan()
    risk = Mean(torch.where(endless, torch.inf, risk.value), masked(risk.error, unsure))
    law = full.question.unwrapped.wrap(known.family.from_natural(found.natural))
    act, told = _identified(full.question, one, Act(means, law), found.variables, None)
    return Submodel(act, risk, excess, found.method, found.accuracy, told)


def _identified(
    whole: Question,
    one: Subfamily,
    act: Act,
    variables: Variables,
    loss: PosteriorLoss | None,
) -> tuple[Act, tuple[str, ...]]:
    """The member without values of what it does not depend on, and the sentences on these."""
    own = replace(one.question, model=one.model)
    few = probe(one.question.draws, one.model.names)
    few = {name: one.question.aligned(name, x, one.model) for name, x in few.items()}
    mass = node_mass(loss) if loss is not None else None
    found = unidentified(own.law, variables, few, mass=mass)
    placed = Unidentified(
        *(
            {k: x > 0 for k, x in one.placed({k: m.double() for k, m in masks.items()}).items()}
            for masks in found
        )
    )

    def labels(name: str) -> list[str]:
        mask = placed.unused[name]
        known = whole.shape(name) == mask.shape if name in whole.model.names else False
        return elements(name, mask.shape, whole.axes(name) if known else None)

    point = one.placed(variables)
    clean = without_unidentified(replace(act, point=point), placed, {})
    return clean, tuple(sentences(placed, labels))


def _unsure(full: Estimate) -> Tensor:
    """Where [*batch] no normal error holds of what the act averages."""
    batch = full.question.batch
    errors = (mean.error.isnan().reshape(*batch, -1).any(-1) for mean in full.act.natural or ())
    return functools.reduce(torch.logical_or, errors, torch.zeros(batch, dtype=torch.bool))


def _over_draws(full: Estimate, one: Subfamily) -> Submodel:
    """A submodel by minimisation of the expected loss over the draws themselves."""
    whole, draws = full.question, full.question.draws
    loss, found = best_member(whole, one)
    risk = whole.losses_at(loss, found.law)
    excess = risk - whole.losses(dict(full.act.point), loss)
    shape = (draws.chains, draws.draws)
    moved = {name: x.unflatten(0, shape) for name, x in found.influence.items()}
    events = {name: max(0, x.ndim - 2 - len(whole.batch)) for name, x in moved.items()}
    seen = judged({RISK: risk, EXCESS: excess, **moved}, draws, events)

    def averaged(name: str, values: Tensor) -> Mean:
        mean = mean_of(values, draws)
        value = torch.where(seen.surely_infinite(name), torch.inf, mean.value)
        rounded = mean.error <= ROUNDING * mean.value.abs()
        error = torch.where(rounded, 0.0, masked(mean.error, seen.pareto_k[name] >= NO_ERROR))
        return Mean(value, error)

    means = {
        name: Mean(x, averaged(name, moved[name]).error) for name, x in found.variables.items()
    }
    law = one.model.at(found.own)
    how = "in closed form"
    if loss.nodes is not None:
        how = f"on {len(loss.nodes):,} nodes ({loss.nodes.kind})"
    act, told = _identified(whole, one, Act(means, law), found.own, loss)
    return Submodel(
        act,
        averaged(RISK, risk),
        averaged(EXCESS, excess),
        f"minimised over the draws {how}",
        found.accuracy,
        told,
    )

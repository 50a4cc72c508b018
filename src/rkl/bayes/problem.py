"""The problem of a Bayes act: a posterior, a family and a loss."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent

from rkl.bayes.draws import Draws
from rkl.bayes.families import ExponentialFamily, Natural
from rkl.bayes.loss.between import AnyLoss, Intrinsic, Weights, weights_of
from rkl.bayes.loss.expected import NodeLoss, PosteriorLoss, posterior_loss
from rkl.bayes.model import (
    Laws,
    Model,
    Unwrapped,
    align,
    family_in,
    laws_of,
    moving_edge,
    probe,
    whole_parameters,
)

Variables = dict[str, Tensor]
SAME_PARAMETER = (
    1e-9  # relative difference of natural parameters at which two distributions are one
)


@dataclass(frozen=True, eq=False)
class Problem:
    """A posterior, a family, and the loss under which one distribution stands for all."""

    draws: Draws
    model: Model
    divergence: AnyLoss
    compiled: bool | None = None
    seed: int = 0

    def __post_init__(self):
        if self.model.few is None:
            few = probe(self.draws, self.model.names)
            object.__setattr__(self, "model", replace(self.model, few=few))

    def __getstate__(self) -> dict[str, Any]:
        """The fields alone: what is computed from them holds functions, which no pickle takes."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @functools.cached_property
    def few(self) -> Variables:
        """A few draws, used to detect the distribution type."""
        few = self.model.few or {}
        return {name: few[name] for name in self.model.names}

    def with_draw(self, chain: int, draw: int) -> "Problem":
        """The problem with one more draw among the few that decide the distribution type."""
        place = torch.tensor([[chain, draw]])
        few = {name: torch.cat([x, self.draws.at(name, place)]) for name, x in self.few.items()}
        return replace(self, model=replace(self.model, few=few))

    @functools.cached_property
    def structure(self) -> Unwrapped:
        """The distributions of a few draws, without what leaves divergences unchanged."""
        return self.model.unwrap(self.model.law(self.few))

    @functools.cached_property
    def family(self) -> ExponentialFamily | None:
        """The exponential family that contains the distributions."""
        return family_in(self.structure.base)

    @property
    def weights(self) -> Weights | None:
        """The weights of both KLs, where the act needs nothing of the draws but means."""
        if self.family is None or isinstance(self.divergence, Intrinsic):
            return None
        return weights_of(self.divergence)

    @property
    def batch(self) -> torch.Size:
        """Batch shape of the distribution that is reported."""
        shape = self.structure.base.batch_shape[1:]
        return shape[: len(shape) - self.structure.joint]

    def total(self, values: Tensor) -> Tensor:
        """The loss of one event from those of its parts: their sum over what Independent joins."""
        joint = self.structure.joint
        return values.sum(tuple(range(-joint, 0))) if joint else values

    def law(self, variables: Mapping[str, Tensor]) -> Distribution:
        """The distributions of n draws, without fixed bijections but with Independent."""
        base, joint, *_ = self.model.unwrap(self.model.law(variables))
        return Independent(base, joint) if joint else base

    def wrap(self, base: Distribution, variables: Variables) -> Distribution:
        """The distribution [*batch] with this base, its bijections those of one draw."""
        if self.model.settings is not None:
            return self.model.at(variables)
        law = self.model.law({name: x[None] for name, x in variables.items()})
        return self.model.unwrap(law).wrap(base)

    def any(self, parts: Tensor) -> Tensor:
        """Mask [*batch]: any over what Independent joins."""
        return parts.flatten(len(self.batch)).any(-1) if self.structure.joint else parts

    def shape(self, name: str, model: Model | None = None) -> torch.Size:
        """Shape of a variable in the act, or in that of a smaller model.

        A text speaks of each member of a batch by itself, so that what they share in the
        posterior they need not share in the act. What Independent joins, they do.
        """
        events = (model or self.model).events
        drawn = torch.Size(self.draws.shape(name))
        return drawn if events is None else self.batch + drawn[len(drawn) - events[name] :]

    @functools.cached_property
    def passes(self) -> dict[tuple[str, ...], Any]:
        """Results of passes over the draws, by direction, for the act and excesses over it."""
        return {}

    @functools.cached_property
    def batch_axes(self) -> list[list[str] | None]:
        """Names of the members of the batch, along each of its axes."""
        size = len(self.batch)
        for name in self.model.names:
            event = (self.model.events or {}).get(name, 0)
            shape = torch.Size(self.draws.shape(name))
            if shape[:size] == self.batch and len(shape) - event >= size:
                return self.draws.labels(name)[:size]
        return [None] * size

    def axes(self, name: str) -> list[list[str] | None]:
        """Names of the elements of a variable in the act, along each of its axes."""
        labels_of_draw, shape = self.labels(name), self.shape(name)
        if torch.Size(self.draws.shape(name)) == shape:
            return labels_of_draw
        events = len(shape) - len(self.batch)
        return [
            *self.batch_axes,
            *(labels_of_draw[len(labels_of_draw) - events :] if events else []),
        ]

    def labels(self, name: str) -> list[list[str] | None]:
        """Names of the elements of a draw of a variable, along each of its axes.

        Coefficients without names of their own are called as the columns of the design.
        """
        labels_of_draw, model = self.draws.labels(name), self.model
        coefficient = name == (model.settings or {}).get("coefficients")
        if coefficient and labels_of_draw and labels_of_draw[-1] is None:
            columns = list(model.columns)
            named = columns != list(map(str, range(len(columns))))
            if named and len(columns) == self.draws.shape(name)[-1]:
                return [*labels_of_draw[:-1], columns]
        return labels_of_draw

    @functools.cached_property
    def whole(self) -> tuple[str, ...]:
        """The variables that are whole numbers and move the end of a finite support."""
        return whole_parameters(self.laws) if moving_edge(self.model.law(self.few)) else ()

    def is_law(self, variables: Mapping[str, Tensor]) -> bool:
        """False of a fraction where the family takes whole numbers."""
        return all(bool((variables[k] == variables[k].round()).all()) for k in self.whole)

    @functools.cached_property
    def origins(self) -> dict[str, str]:
        """Variable -> parameter of the base distribution that equals it; others are left out."""
        keys = {}
        for name, drawn in self.few.items():
            drawn = self.align(name, drawn) if name in self.model.places else drawn
            equal = [key for key in self._parameters() if _equals(drawn, self._parameter(key))]
            keys |= {name: equal[0]} if equal else {}
        return keys

    def _parameters(self):
        constraints = self.structure.base.arg_constraints
        given = [key for key in constraints if key in vars(self.structure.base)]
        return [*given, *(key for key in constraints if key not in given)]

    def _parameter(self, key: str) -> Tensor:
        return torch.as_tensor(getattr(self.structure.base, key))

    @functools.cached_property
    def theta(self) -> Variables:
        """All draws of the variables [draws, *shape], in the shape that the act has."""
        return {
            name: self.align(name, self.draws[name].flatten(0, 1)) for name in self.model.names
        }

    def align(self, name: str, drawn: Tensor, model: Model | None = None) -> Tensor:
        """Draws [n, ...] of a variable, in the shape that the act has."""
        model = model or self.model
        if model.events is not None:
            places = model.places.get(name)
            drawn = align(drawn, model.events[name], 1 + len(self.batch), places)
        return drawn.expand(len(drawn), *self.shape(name, model))

    @functools.cached_property
    def laws(self) -> Laws:
        """The distributions of all draws."""
        weights = self.draws.weights
        return laws_of(self.theta, self.law, None if weights is None else weights.flatten())

    @property
    def some(self) -> Laws:
        """The distributions of some draws."""
        theta = {name: self.align(name, x) for name, x in self.few.items()}
        return laws_of(theta, self.law)

    @functools.cached_property
    def loss(self) -> PosteriorLoss:
        """The posterior expected loss, over all draws."""
        return posterior_loss(self.laws, self.divergence, seed=self.seed)

    def losses(self, variables: Variables, loss: PosteriorLoss | None = None) -> Tensor:
        """The loss of each draw at the distribution of some variables [chains, draws, *batch]."""
        loss = loss or self.loss
        return self.losses_at(loss, loss.laws.of({name: x[None] for name, x in variables.items()}))

    def losses_at(self, loss: PosteriorLoss, law: Distribution) -> Tensor:
        """The loss of each draw [chains, draws, *batch] at a distribution [1, *batch]."""
        with torch.no_grad():
            each = by_member(loss, law)
        return each.reshape(self.draws.chains, self.draws.draws, *self.batch, -1).sum(-1)

    def sampling_error(
        self, loss: PosteriorLoss, law: Distribution, other: Distribution | None = None
    ) -> Tensor:
        """Standard error [*batch] of the risk of a distribution [1, *batch] from sampled nodes.

        With ``other`` that of the excess over its risk, on the same nodes. 0 where no nodes are
        sampled.
        """
        if not isinstance(loss, NodeLoss) or loss.nodes.kind != "importance":
            return torch.zeros(self.batch, dtype=torch.float64)
        terms = loss.at_nodes(law) if other is None else loss.at_nodes(law) - loss.at_nodes(other)
        terms = terms.reshape(*self.batch, -1, terms.shape[-1]).sum(-2)
        return (terms - terms.mean(-1, keepdim=True)).square().sum(-1).sqrt()

    def shrunk(self, name: str, parameter: Tensor) -> Tensor:
        """The variable [*shape] that a parameter [*batch, ...] of the act is shared from."""
        value, shape = parameter, self.shape(name)
        for axis in range(value.ndim):
            if axis >= len(shape) or shape[axis] == 1:
                value = value.narrow(axis, 0, 1)
        return value.reshape(shape)

    def natural(self, family: ExponentialFamily, variables: Variables) -> Natural:
        """The natural parameter of the distributions of variables [n, ...] each."""
        return family.natural(self.model.base(variables))

    def holds(self, family: ExponentialFamily, natural: Natural) -> Variables | None:
        """The variables of the distribution with this natural parameter, if the model contains it.

        A model that is smaller than its exponential family does not: a
        parameter is fixed, or shared by what Independent joins.
        """
        if self.origins.keys() != set(self.model.names):
            return None
        law = family.from_natural(natural)
        variables = {
            name: self.shrunk(name, getattr(law, key)) for name, key in self.origins.items()
        }
        try:
            again = self.natural(family, {name: x[None] for name, x in variables.items()})
        except ValueError:  # outside the domain
            return None
        pairs = zip(again, natural, strict=True)
        good = all(
            bool(((a[0] - b).abs() <= SAME_PARAMETER * b.abs().amax()).all()) for a, b in pairs
        )
        return variables if good else None


def by_member(loss: PosteriorLoss, law: Distribution) -> Tensor:
    """The loss of each draw, for each member of the batch by itself [draws, *batch]."""
    return loss.by_member(law)


def _equals(drawn: Tensor, parameter: Tensor) -> bool:
    """True if draws [n, *shape] are a parameter [n, *batch, ...], shared along later axes."""
    if drawn.ndim > parameter.ndim:
        return False
    aligned = drawn.reshape(*drawn.shape, *[1] * (parameter.ndim - drawn.ndim))
    try:
        return bool((aligned == parameter).all())
    except RuntimeError:
        return False

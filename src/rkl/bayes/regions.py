"""The lowest-loss credible region: the draws closest to the act, whatever they are called."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rkl.bayes.estimate import Estimate, elements
from rkl.bayes.questions import Question, by_member
from rkl.bayes.tables import Cell, Table
from rkl.divergences.base import number


@dataclass(frozen=True, eq=False)
class Region:
    """All θ whose loss D(P_θ ‖ P_act) is at most a threshold.

    It does not move with the parametrisation, nor with a bijection of the data, for the loss
    does not; an interval of highest density does.

    Source: Bernardo (2005), "Intrinsic credible regions", definition 1, for other losses.

    Attributes:
        prob: Its posterior probability.
        threshold: The largest loss inside, in nats, [*batch].
        inside: Which draws are in it, [chains, draws, *batch].
        ranges: The least and the greatest value inside of every variable, by name.
    """

    prob: float
    threshold: Tensor
    inside: Tensor
    ranges: Mapping[str, tuple[Tensor, Tensor]]
    estimate: Estimate = field(repr=False)

    def contains(self, theta: Mapping[str, Any]) -> Tensor:
        """Whether these values of the variables are in the region, [*batch].

        Raises:
            ValueError: A variable is missing, or has another shape than its draws.
            TypeError: A variable is no number.
        """
        question, given = self.estimate.question, {}
        if not isinstance(theta, Mapping):
            needed = ", ".join(question.model.names)
            raise TypeError(f"theta must be a mapping with {needed}; got {theta!r:.60}.")
        for name in question.model.names:
            if name not in theta:
                needed = ", ".join(question.model.names)
                raise ValueError(f"theta must have {needed}; got {', '.join(theta) or 'nothing'}.")
            try:
                value = torch.as_tensor(theta[name], dtype=torch.float64)
            except (TypeError, ValueError) as error:
                raise TypeError(f"{name} must be numbers; got {theta[name]!r:.60}.") from error
            shape = question.shape(name)
            if value.shape not in (shape, torch.Size(question.draws.shape(name))):
                raise ValueError(f"{name} must be {list(shape)}; got {list(value.shape)}.")
            given[name] = value.expand(shape)[None] if value.ndim else value.expand(1, *shape)
        return distance(self.estimate, given) <= self.threshold

    def __str__(self) -> str:
        return str(self.table())

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()

    def to_dataframe(self) -> Any:
        """The ranges, a data frame of pandas."""
        return self.table().to_dataframe()

    def to_dict(self) -> dict[str, Any]:
        """Everything but the draws, as JSON can hold it."""
        ranges = {name: [end.tolist() for end in ends] for name, ends in self.ranges.items()}
        return {"prob": self.prob, "threshold": self.threshold.tolist(), "ranges": ranges}

    def table(self) -> Table:
        """The least and the greatest value inside of every number."""
        rows: list[tuple[Cell, ...]] = []
        for name, (low, high) in self.ranges.items():
            ends = zip(low.flatten().tolist(), high.flatten().tolist(), strict=True)
            names = elements(name, low.shape)
            rows += [(label, *pair) for label, pair in zip(names, ends, strict=True)]
        title = (
            f"The {self.prob:.0%} of the draws closest to the act under {self.estimate.divergence}"
        )
        told = (
            "One region in all variables together: each range is its shadow on one of them, and "
            f"holds more than {self.prob:.0%} of the draws by itself."
        )
        joint = len(rows) > max(1, self.estimate.question.batch.numel())
        return Table(title, ("variable", "from", "to"), rows, (told,) if joint else ())


def region(estimate: Estimate, prob: float = 0.9) -> Region:
    """The region of posterior probability ``prob`` about the act of an estimate.

    Raises:
        ValueError: ``prob`` does not lie strictly between 0 and 1.
    """
    number("prob", prob, above=0, below=1)
    question = estimate.question
    losses = question.losses({name: estimate.act[name] for name in question.model.names})
    threshold = _quantile(losses.flatten(0, 1), prob, question.draws.weights)
    inside = losses <= threshold
    ranges = {name: _range(question, name, inside) for name in question.model.names}
    return Region(prob, threshold, inside, ranges, estimate)


def distance(estimate: Estimate, theta: Mapping[str, Tensor]) -> Tensor:
    """D(P_θ ‖ P_act) of one θ [1, ...], [*batch]."""
    question = estimate.question
    loss = question.loss
    act = {name: estimate.act[name][None] for name in question.model.names}
    laws = dataclasses.replace(loss.laws, theta=theta, weights=torch.ones(1, dtype=torch.float64))
    at = dataclasses.replace(loss, laws=laws)
    with torch.no_grad():
        return by_member(at, at.laws.of(act)).reshape(*question.batch, -1).sum(-1)


def _quantile(losses: Tensor, prob: float, weights: Tensor | None) -> Tensor:
    """The smallest of the losses [draws, *batch] such that those up to it weigh ``prob``."""
    ordered = losses.sort(0)
    if weights is None:
        return ordered.values[math.ceil(prob * len(losses) * (1 - 1e-12)) - 1]
    share = weights.flatten()[ordered.indices].cumsum(0)
    place = (share < prob * (1 - 1e-12)).sum(0, keepdim=True).clamp_max(len(losses) - 1)
    return ordered.values.gather(0, place)[0]


def _range(question: Question, name: str, inside: Tensor) -> tuple[Tensor, Tensor]:
    """The ends of a variable [*batch, ...] among the draws inside; of all members if shared."""
    x, inside, batch = question.theta[name], inside.flatten(0, 1), len(question.batch)
    if x.shape[1 : 1 + batch] != question.batch:
        inside, batch = inside.reshape(len(inside), -1).all(-1), 0
    inside = inside.reshape(inside.shape + (1,) * (x.ndim - 1 - batch))
    low = torch.where(inside, x, torch.inf).amin(0)
    return low, torch.where(inside, x, -torch.inf).amax(0)

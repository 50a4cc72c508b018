"""The answer to a problem: the act, its risk and their errors."""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution

from rkl import tables
from rkl.bayes.tables import Table
from rkl.names import Stack
from rkl.runs import finite_or_null
from rkl.stats import Mean, to_json
from rkl.tables import Cell, cell_text, table_of

if TYPE_CHECKING:
    from rkl.bayes.problem import Problem

ERROR_ROUNDING = 1e-6  # relative, of errors that are the same
MAX_ELEMENTS = 12  # elements of one parameter that are printed


@dataclass(frozen=True, eq=False, repr=False)
class Act(Mapping):
    """The reported distribution: act["scale"], with its Monte Carlo error in act.error["scale"].

    Attributes:
        parameters: Value and standard error by name, [*batch, ...] each: those of the
            distribution, and the variables of the posterior that stand for it.
        distribution: The distribution of torch itself, of batch shape [*batch].
        natural: Components of its natural parameter, where it has one.
        mean: Components of its mean parameter, where it has one.
        point: The variables of the posterior that the distribution is made of, [*batch, ...];
            finite also where the distribution does not depend on them.
        unused: By variable, where the distribution does not depend on its numbers: they are nan
            among the parameters, for any value gives the same distribution.
        combined: By variable, the numbers of which only combinations change the distribution, such
            as a sum; they have no errors.
    """

    parameters: Mapping[str, Mean]
    distribution: Distribution
    natural: tuple[Mean, ...] | None = None
    mean: tuple[Mean, ...] | None = None
    point: Mapping[str, Tensor] = field(default_factory=dict)
    unused: Mapping[str, Tensor] = field(default_factory=dict)
    combined: Mapping[str, Tensor] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Tensor:
        return self._parameter(name).value

    def __iter__(self) -> Iterator[str]:
        return iter(self.parameters)

    def __len__(self) -> int:
        return len(self.parameters)

    def __repr__(self) -> str:
        return f"Act({', '.join(self.summary(self.parameters))})"

    def _repr_html_(self) -> str:
        rows = []
        for name, (value, error) in self.parameters.items():
            pairs = zip(value.flatten().tolist(), error.flatten().tolist(), strict=True)
            rows += list(zip(elements(name, value.shape), pairs, strict=True))
        return Table("Parameters of the act", ("parameter", "value"), rows)._repr_html_()

    def summary(self, names: Iterable[str]) -> Iterator[str]:
        """These parameters as text, of long ones the shape; without those of no influence."""
        for name in names:
            value, error = self.parameters[name]
            if name in self.unused and bool(self.unused[name].all()):
                continue
            alone = not value.ndim
            text = cell_text((value.item(), error.item())) if alone else list(value.shape)
            yield f"{name}={text}"

    @property
    def error(self) -> dict[str, Tensor]:
        """Monte Carlo standard errors by name; nan where no normal theory holds."""
        return {name: mean.error for name, mean in self.parameters.items()}

    def _parameter(self, name: str) -> Mean:
        if name not in self.parameters:
            raise KeyError(f"the act has no {name!r}; it has {', '.join(self.parameters)}")
        return self.parameters[name]


@dataclass(frozen=True, eq=False)
class Diagnostics:
    """Effective draws, tails and warnings.

    Attributes:
        chains: Number of chains.
        draws: Number of draws of each.
        judged: Number of draws, of all chains, that ess, rhat and pareto_k look at.
        ess: Effective number of these draws for what was averaged, the least over its components
            (of very many, over some).
        rhat: Rank-normalised split R-hat of what was averaged, the largest; nan where unknown.
        pareto_k: Tail index of every quantity that was averaged, by its name, [*batch]; where an
            act was minimised, of the influence that a draw has on each number. At 1/2 and above
            its mean has no normal error, at 1 and above perhaps no mean at all; nan where no
            tail can be fitted, as where draws are tied.
        method: Method by which the act was computed.
        accuracy: Estimated excess of its risk over the least, in nats, from the minimiser; 0
            for a closed form.
        warnings: One sentence each.
    """

    chains: int
    draws: int
    judged: int
    ess: float
    rhat: float
    pareto_k: Mapping[str, Tensor]
    method: str
    accuracy: float
    warnings: tuple[str, ...] = ()

    def table(self) -> tables.Table:
        """The figures, a row each, with the warnings."""
        figures = {
            "chains": self.chains,
            "draws of each": self.draws,
            "effective draws, the least": self.ess,
            "R-hat, the largest": self.rhat,
            "Pareto-k, the largest": self.worst_k(),
            "method": self.method,
            "excess risk over the least, estimated (nats)": self.accuracy,
        }
        return table_of("Diagnostics of what was averaged", figures, self.warnings)

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()

    def worst_k(self) -> float:
        """The largest tail index there is, or nan."""
        shapes = (k[~k.isnan()] for k in self.pareto_k.values())
        return max((k.max().item() for k in shapes if k.numel()), default=math.nan)


@dataclass(frozen=True, eq=False, repr=False)
class Answer:
    """A Bayes act and its risk, with their errors: what :class:`rkl.bayes.Estimate` holds."""

    family: str
    divergence: Any
    act: Act
    risk: Mean
    diagnostics: Diagnostics
    problem: "Problem"

    def __repr__(self) -> str:
        summary = ", ".join(self.act.summary(self.problem.model.names))
        return f"{type(self).__name__}({summary}; {self.family} under {self.divergence})"

    def to_dict(self) -> dict[str, Any]:
        """Everything but the draws, as JSON can hold it: None for what is not finite."""
        act = self.act
        diagnostics = self.diagnostics
        record = {
            "family": self.family,
            "design": _plain(self.problem.model.design),
            "divergence": str(self.divergence),
            "variables": list(self.problem.model.names),
            "act": {name: to_json(mean) for name, mean in act.parameters.items()},
            "labels": {name: self.labels(name) for name in self.problem.model.names},
            "unused": {name: mask.tolist() for name, mask in act.unused.items() if mask.any()},
            "natural": None if act.natural is None else [to_json(mean) for mean in act.natural],
            "mean": None if act.mean is None else [to_json(mean) for mean in act.mean],
            "risk": to_json(self.risk),
            "diagnostics": vars(diagnostics)
            | {"pareto_k": {name: k.tolist() for name, k in diagnostics.pareto_k.items()}}
            | {"warnings": list(diagnostics.warnings)},
        }
        return finite_or_null(record)

    def to_dataframe(self) -> Any:
        """Every number of the act and its risk, a data frame of pandas."""
        return self.table(every=True).to_dataframe()

    def __str__(self) -> str:
        return str(self.table())

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()

    def table(self, every: bool = False) -> Table:
        """The act and its risk, of long parameters the first elements or ``every`` one."""
        rows: list[tuple[Cell, ...]] = []
        parameters = self.act.parameters if every else self._variables()
        for name, mean in {**parameters, "risk": self.risk}.items():
            unit = " (nats)" * (mean is self.risk)
            values, errors, labels = self._identified_numbers(name, mean)
            labels = [label + unit for label in labels]
            if not labels:
                continue
            if not every and self._is_shared(name, mean):
                rows.append((f"{name}, each of {len(values):,}", (values[0], errors[0])))
                continue
            shown = len(values) if every else MAX_ELEMENTS
            rows += list(zip(labels, zip(values, errors, strict=True), strict=True))[:shown]
            if len(values) > shown:
                rows.append((f"{name}, {len(values) - shown:,} more", None))
        title = f"Bayes act of {self.family} under {self.divergence}"
        return Table(title, ("parameter", "value"), rows, self._notes())

    def _identified_numbers(
        self, name: str, mean: Mean
    ) -> tuple[list[float], list[float], list[str]]:
        """Numbers that the distribution depends on, their errors and labels."""
        used = ~mean.value.flatten().isnan()
        value, error = mean.value.flatten()[used], mean.error.flatten()[used]
        labels = list(itertools.compress(self.labels(name), used.tolist()))
        return value.tolist(), error.tolist(), labels

    def _is_shared(self, name: str, mean: Mean) -> bool:
        """True of a variable without batch axes whose act is the same in each member."""
        problem = self.problem
        if name not in problem.model.names or mean.value.numel() < 2:
            return False
        alone = mean.value.shape == problem.batch and not problem.draws.shape(name)
        if not alone or not bool((mean.value == mean.value.flatten()[0]).all()):
            return False
        # each error was found beside what its member does not share, and rounded with it
        error = mean.error.flatten()
        return torch.allclose(error, error[:1].expand_as(error), ERROR_ROUNDING, 0.0, True)

    def labels(self, name: str) -> list[str]:
        """The names of the elements of a parameter of the act, or of "risk"."""
        value = (self.risk if name == "risk" else self.act.parameters[name]).value
        return elements(name, value.shape, self._axes(name, value.shape))

    def _axes(self, name: str, shape: torch.Size) -> list[list[str] | None] | None:
        problem = self.problem
        settings = problem.model.settings or {}
        variable = settings.get(name, name)
        if variable in problem.model.names:
            return problem.axes(variable)
        if isinstance(variable, Stack):
            return [*problem.batch_axes, self._stack_labels(variable)]
        batch = problem.batch
        return problem.batch_axes if shape == batch else None

    def _stack_labels(self, parts: Stack) -> list[str]:
        labels: list[str] = []
        for part in parts:
            labels += self.labels(part) if isinstance(part, str) else [f"{part:g}"]
        return labels

    def _variables(self) -> dict[str, Mean]:
        return {name: self.act.parameters[name] for name in self.problem.model.names}

    def _notes(self) -> tuple[str, ...]:
        diagnostics = self.diagnostics
        design = self.problem.model.design
        notes = () if design is None else (f"design: {_short(design)}",)
        how = (
            f"{diagnostics.ess:,.0f} effective draws of {diagnostics.judged:,}; Pareto-k at most "
            f"{cell_text(diagnostics.worst_k())}; {diagnostics.method}"
        )
        exact = (
            ()
            if not diagnostics.accuracy
            else (f"risk within {diagnostics.accuracy:.1g} nats of the least",)
        )
        return (*notes, how, *exact, *(f"Warning: {text}" for text in diagnostics.warnings))


def elements(
    name: str, shape: torch.Size, axes: Sequence[Sequence[str] | None] | None = None
) -> list[str]:
    """The name of every element of a parameter, by its number or its label along each axis.

    >>> elements("mu", torch.Size([2])), elements("sigma", torch.Size([]))
    (['mu[0]', 'mu[1]'], ['sigma'])
    >>> elements("theta", torch.Size([2]), [["Choate", "Deerfield"]])
    ['theta[Choate]', 'theta[Deerfield]']
    """
    if not shape:
        return [name]
    names_by_axis = axes or [None] * len(shape)
    places = [
        list(map(str, range(n))) if labels is None else labels
        for n, labels in zip(shape, names_by_axis, strict=True)
    ]
    return [f"{name}[{', '.join(place)}]" for place in itertools.product(*places)]


def _short(design: Any) -> str:
    shape = getattr(design, "shape", None)
    if isinstance(design, Mapping):
        return f"columns {', '.join(map(str, design))}"
    kind = "ndarray" if isinstance(design, np.ndarray) else type(design).__name__
    return str(design) if shape is None else f"{kind} {list(shape)}"


def _plain(design: Any) -> Any:
    match design:
        case None | bool() | int() | float() | str():
            return design
        case Mapping():
            return {str(key): _plain(value) for key, value in design.items()}
        case list() | tuple():
            return [_plain(value) for value in design]
        case Tensor():
            return design.tolist()
    if hasattr(design, "to_numpy") and hasattr(design, "columns"):  # a data frame
        rows = design.to_numpy().tolist()
        return {"columns": [str(name) for name in design.columns], "rows": rows}
    tolist = getattr(design, "tolist", None)
    return tolist() if callable(tolist) else str(design)

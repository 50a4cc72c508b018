"""Settings of ``rkl fit --target``, and of sampling and evaluation of its runs."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rkl.checks import LARGEST_COUNT, LARGEST_RATE, LARGEST_SEED, integer, number
from rkl.flows.architectures import Architecture, parse_architecture
from rkl.flows.precision import single_precision
from rkl.flows.runs import budget_of, check_budget
from rkl.names import with_module
from rkl.sample.architecture import default_architecture
from rkl.sample.objectives import Objective, parse_objective
from rkl.sample.targets.base import Condition, Target, check_values
from rkl.sample.targets.parse import parse_target, spelling

VALUES = 8  # of the first condition, where none are given


@dataclass(frozen=True)
class TargetSettings:
    """The density to fit, its conditions, the objective and the budget.

    Args:
        target: Unnormalised density: "xy(side=8)", or "module:function(event_shape=(2,))".
        objective: Terms "1.0*source:divergence", joined by +, on the sources target, data and
            critic; or a variant of AdvNF. Default: reverse KL, and with data KL on them too.
        divergence: Instead of an objective, one divergence on the target.
        data: Draws of the target: .npz with x and condition, such as rkl sample writes; or
            .npy where the target has no conditions.
        condition: Conditions to train at: "T=0.5:1.5" or "T=0.9"; by default the target's ranges.
        flow: Architecture, with settings in brackets; by default that of the target.
        start_from: A run on a lattice of another side, whose weights are the initial ones.
        steps: Budget in steps.
        minutes: Budget in minutes; by default 2.
        batch: Draws in a step, all conditions together.
        strata: Conditions in a step.
        anneal: Train with particles cooled to the target, the default on the line and for
            splines of angles up to 8 coordinates; beyond, begin with the target flattened, the
            default without data.
        log_z: "learned" allows divergences that are not scale-free where log Z is unknown.
        lr: Highest learning rate.
        seed: Random seed.
        device: Always cpu: targets and their chains are computed there.
    """

    target: str = field(metadata={"metavar": "TARGET"})
    objective: str | None = None
    divergence: str | None = field(default=None, metadata={"metavar": "D"})
    data: Path | None = field(default=None, metadata={"metavar": "DRAWS"})
    condition: str | None = field(default=None, metadata={"metavar": "RANGES"})
    flow: str | None = None
    start_from: Path | None = field(default=None, metadata={"metavar": "RUN"})
    steps: int | None = field(default=None, metadata={"metavar": "N"})
    minutes: float | None = field(default=None, metadata={"metavar": "M"})
    batch: int = 512
    strata: int = 32
    anneal: bool | None = None
    log_z: Literal["learned"] | None = None
    lr: float = 5e-3
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self):
        if self.device != "cpu":
            raise ValueError(
                f"device must be 'cpu', where targets are computed; got {self.device!r}."
            )
        check_budget(self)
        if self.objective is not None and self.divergence is not None:
            raise ValueError(
                f"one of objective and divergence; got {self.objective} and {self.divergence}."
            )
        if self.lr is not None:
            number("lr", self.lr, above=0, at_most=LARGEST_RATE)
        integer("seed", self.seed, at_most=LARGEST_SEED)
        for name in ("batch", "strata"):
            integer(name, getattr(self, name), at_most=LARGEST_COUNT)
        object.__setattr__(self, "target", spelling(self.parsed_target, self.target))
        object.__setattr__(self, "flow", with_module(self.architecture))
        _ = self.parsed_objective, self.ranges

    @property
    def parsed_target(self) -> Target:
        """The target, parsed."""
        return parse_target(self.target)

    @property
    def architecture(self) -> Architecture:
        """The architecture, parsed; by default that of the target."""
        return (
            default_architecture(self.parsed_target)
            if self.flow is None
            else parse_architecture(self.flow)
        )

    @property
    def parsed_objective(self) -> Objective:
        """The objective, parsed."""
        if self.divergence is not None:
            return parse_objective(f"target:{self.divergence}")
        if self.objective is not None:
            return parse_objective(self.objective)
        return parse_objective("reverse-kl" if self.data is None else "fkl-rkl")

    @property
    def ranges(self) -> tuple[Condition, ...]:
        """The conditions, each with its training range."""
        return parse_ranges(self.condition, self.parsed_target)

    @property
    def budget(self) -> dict[str, Any]:
        """Budget in steps or in minutes, as arguments of :func:`fit_to_target`."""
        return budget_of(self)

    @property
    def how(self) -> dict[str, Any]:
        """The other arguments of :func:`fit_to_target`."""
        names = "seed", "batch", "strata", "anneal", "log_z", "lr"
        return {name: getattr(self, name) for name in names}


def parse_ranges(text: str | None, target: Target) -> tuple[Condition, ...]:
    """The conditions of a target, with ranges from a text such as "T=0.5:1.5, K=0".

    Raises:
        ValueError: It cannot be read, or a name is no condition.

    >>> parse_ranges("T=0.5:1.5", parse_target("xy(side=2)"))
    (Condition(name='T', low=0.5, high=1.5, unit='J', above=0.0, at_least=None),)
    """
    ranges, given = {it.name: it for it in target.conditions}, set()
    for part in [] if text is None else text.split(","):
        name, _, limits = (it.strip() for it in part.partition("="))
        if name not in ranges:
            has = ", ".join(ranges) or "none"
            raise ValueError(f"condition: those of {target} are {has}; got {part.strip()!r}.")
        if name in given:
            raise ValueError(f"condition: {name} is given twice; got {text!r}.")
        given.add(name)
        low, colon, high = limits.partition(":")
        try:
            one, other = float(low), float(high if colon else low)
        except ValueError:
            one = other = math.nan
        if not -math.inf < one <= other < math.inf:
            raise ValueError(
                f"condition: {part.strip()!r} cannot be read; expected a value such as "
                f"{name}=0.9, or a range such as {name}=0.5:1.5."
            )
        ranges[name] = ranges[name]._replace(low=one, high=other)
    check_values(target, [[it.low for it in ranges.values()]])
    return tuple(ranges.values())


@dataclass(frozen=True)
class SampleSettings:
    """The number of draws of a target, their condition, and the chains.

    Args:
        n: Number of draws, all chains together; rounded up to the same for each.
        out: File to write: .nc as in ArviZ, .npz with the same arrays by name, or .npy for the
            states alone.
        condition: A value of every condition: "T=0.9".
        chains: Number of chains, each corrected by Metropolis.
        seed: Random seed.
        device: Device to compute on.
    """

    n: int = field(default=1000, metadata={"metavar": "N"})
    out: Path = Path("samples.npy")
    condition: str | None = None
    chains: int = 4
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self):
        object.__setattr__(self, "out", Path(self.out))
        integer("n", self.n, at_least=1, at_most=LARGEST_COUNT)
        integer("chains", self.chains, at_least=1, at_most=LARGEST_COUNT)
        integer("seed", self.seed, at_most=LARGEST_SEED)


@dataclass(frozen=True)
class EvaluateSettings:
    """The conditions and draws that a flow of a target is measured with.

    Args:
        data: Draws of the target by other means, x with their conditions (.npz).
        condition: Conditions to measure at, "T=0.9" or "T=0.5:1.5"; by default those of training.
        values: Number of values of the first condition.
        draws: Draws of each chain.
        chains: Chains under each condition.
        reference: Compare with draws of the target without the flow: exact ones, its own Markov
            chains, or particles cooled to it.
        strict: Fail unless the flow is shown to cover its target.
        seed: Random seed.
        device: Device to compute on.
    """

    data: Path | None = field(default=None, metadata={"metavar": "DRAWS"})
    condition: str | None = field(default=None, metadata={"metavar": "RANGES"})
    values: int = field(default=VALUES, metadata={"metavar": "N"})
    draws: int = field(default=2_000, metadata={"metavar": "N"})
    chains: int = field(default=8, metadata={"metavar": "N"})
    reference: bool = False
    strict: bool = False
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self):
        if self.data is not None:
            object.__setattr__(self, "data", Path(self.data))
        integer("seed", self.seed, at_most=LARGEST_SEED)
        for name, least in (("values", 1), ("draws", 4), ("chains", 1)):
            integer(name, getattr(self, name), at_least=least, at_most=LARGEST_COUNT)


@single_precision()
def condition_grid(
    ranges: Sequence[Condition], values: int = VALUES
) -> Float[Tensor, "rows conditions"]:
    """Values across the range of the first condition, at both ends of every other.

    >>> from rkl.sample import XY
    >>> condition_grid(XY(side=2).conditions, 3)
    tensor([[0.0500],
            [1.0500],
            [2.0500]])
    """
    integer("values", values, at_least=1, at_most=LARGEST_COUNT)
    columns = []
    for k, condition in enumerate(ranges):
        several = (2 if k else values) if condition.low < condition.high else 1
        columns.append(torch.linspace(condition.low, condition.high, several).tolist())
    rows = sorted(itertools.product(*columns), key=lambda row: row[1:])
    return torch.tensor(rows).reshape(len(rows), len(columns))

"""One fit of the study of AdvNF: a flow, an objective, so many draws of the target, a budget."""

import functools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rkl.divergences import KL, ReverseKL
from rkl.flows import Architecture
from rkl.sample import fit_to_target, independent_metropolis, markov_chain
from rkl.sample.architecture import default_architecture
from rkl.sample.coverage import Coverage, judge_coverage
from rkl.sample.objectives import VARIANTS, Objective, Term
from rkl.sample.observables import compare_with_held_out
from rkl.sample.targets import Target

NO_DATA, WITH_DATA = "ours, no data", "ours, with data"
OURS = {
    NO_DATA: Objective((Term(1.0, ReverseKL()),)),
    WITH_DATA: Objective((Term(1.0, ReverseKL()), Term(1.0, KL(), "data"))),
}
QUANTITIES = (
    "acceptance", "acceptance_error", "ess", "ess_at_target", "v", "bracket", "reached", "missing",
    "overlap", "overlap_floor",
)  # fmt: skip
WARM, TIMED = 3, 50  # steps that show what a beginning costs, and what a step
CHAINS, APART, UNTIL = 50, 10, 500  # chains at a temperature, sweeps between draws and before them


@dataclass(frozen=True)
class Plan:
    """The sizes of one part.

    Args:
        target: The density to sample.
        baseline: The affine flow of the seven variants.
        cpu_s: CPU seconds of each fit.
        ours: The flow of the other two; by default that of the target.
        values: Number of equidistant conditions, of the draws of the target and of the figures.
        ensembles: Draws of the target that are trained on, all conditions together.
        batch: Draws of a step.
        lr: Learning rate of the variants.
        draws: Draws at each condition for a figure.
        seeds: Number of seeds.
    """

    target: Target
    baseline: Architecture
    cpu_s: float
    ours: Architecture | None = None
    values: int = 8
    ensembles: tuple[int, ...] = (100, 1_000, 10_000)
    batch: int = 256
    lr: float = 2e-3
    draws: int = 2_000
    seeds: int = 3

    @property
    def conditions(self) -> Tensor:
        """[values, 1], over the whole range of the target."""
        (it,) = self.target.conditions
        return torch.linspace(it.low, it.high, self.values)[:, None]

    @property
    def flat(self) -> bool:
        """True if draws are points of the plane."""
        return self.target.event_shape == (2,)

    def flow(self, name: str) -> Architecture:
        """The flow that a way of this name fits."""
        return (self.ours or default_architecture(self.target)) if name in OURS else self.baseline


@dataclass(frozen=True)
class Way:
    """One way to fit a flow.

    Attributes:
        name: Name of a variant of AdvNF, or of ours.
        ensemble: Number of draws of the target that it gets.
    """

    name: str
    ensemble: int

    @property
    def objective(self) -> Objective:
        """The objective that it minimises."""
        return OURS.get(self.name) or VARIANTS[self.name]


@dataclass(frozen=True)
class Fit:
    """Result of one fit.

    Attributes:
        way: The way to fit.
        seed: Seed of the draws of the target, the flow and its training.
        steps: Number of steps within the budget.
        cpu_s: CPU seconds that it took.
        gradient: Norm of the gradient of a step at its end, where its mean is next to nothing:
            what is left is noise.
        conditions: Conditions at which it was measured.
        figures: Under each quantity its value at each condition.
        samples: A few draws at the first condition, of a distribution in the plane.
    """

    way: Way
    seed: int
    steps: int
    cpu_s: float
    gradient: float
    conditions: list[float]
    figures: dict[str, list[float]]
    samples: list[Any] = field(default_factory=list)


def ways(plan: Plan) -> Iterator[Way]:
    """All of them; those that read data, once for each ensemble."""
    for name, objective in {**VARIANTS, **OURS}.items():
        reads = objective.uses("data") or objective.uses("critic")
        for ensemble in plan.ensembles if reads else (0,):
            yield Way(name, ensemble)


def fit(plan: Plan, way: Way, seed: int) -> Fit:
    """Fit once, and measure by draws of the target that were not trained on."""
    target, conditions = plan.target, plan.conditions
    each = math.ceil(max(plan.ensembles) / plan.values)
    trained = exact_draws(plan, each, 2 * seed)
    held_out = exact_draws(plan, plan.draws, 2 * seed + 1)
    how: dict[str, Any] = {"objective": way.objective, "seed": seed}
    if way.ensemble:
        how["data"] = _choose(trained, conditions, way.ensemble, seed)
    if way.name not in OURS:
        how |= {"anneal": False, "lr": plan.lr, "batch": plan.batch, "strata": plan.values}
    architecture = plan.flow(way.name)
    steps = _affordable(plan, architecture, how)
    began = time.process_time()
    fitted = fit_to_target(architecture, target, steps=steps, every=max(1, steps // 20), **how)
    flow, done = fitted.flow, fitted.training
    spent = time.process_time() - began
    judged = [
        _figures(plan, flow, k, held_out[k], how["data"][0] if way.ensemble else None, seed)
        for k in range(plan.values)
    ]
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(seed)
        samples = flow(conditions[0]).sample((1_000,)).tolist() if plan.flat else []
    return Fit(
        way,
        seed,
        done.steps,
        spent,
        done.history[-1].get("gradient", math.nan),
        conditions[:, 0].tolist(),
        {name: [it[name] for it in judged] for name in QUANTITIES},
        samples,
    )


@functools.lru_cache(maxsize=2)
def exact_draws(plan: Plan, each: int, seed: int) -> Tensor:
    """Independent draws of the target [conditions, each, *event]: exact ones, or a heat bath's."""
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return plan.target.sample(plan.conditions, (each,)).transpose(0, 1)
    except NotImplementedError:
        draws = math.ceil(each / CHAINS)
        how: dict[str, Any] = {"chains": CHAINS, "every": APART, "warm_up": UNTIL, "seed": seed}
        x = markov_chain(plan.target, plan.conditions, draws=draws, **how).x
        assert x is not None
        return x.flatten(1, 2)[:, :each]


def _choose(x: Tensor, conditions: Tensor, ensemble: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draws of every condition that together make an ensemble, and their conditions."""
    order = torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(seed))
    rows = x[:, order].transpose(0, 1).flatten(0, 1)[:ensemble]  # conditions take turns
    return rows, conditions.repeat(x.shape[1], 1)[:ensemble]


def _affordable(plan: Plan, architecture: Architecture, how: dict[str, Any]) -> int:
    """Steps that the budget buys, from the time of a few, which is not charged."""
    spent = []
    for steps in (WARM, WARM, WARM + TIMED):  # the first for what torch sets up once
        began = time.process_time()
        fit_to_target(architecture, plan.target, steps=steps, **how)
        spent.append(time.process_time() - began)
    each = max(spent[2] - spent[1], 1e-3) / TIMED
    return max(1, int((plan.cpu_s - spent[1]) / each) + WARM)


def _figures(plan: Plan, flow: nn.Module, k: int, held_out: Tensor, train, seed: int):
    target, condition = plan.target, plan.conditions[k]
    coverage = judge_coverage(
        target, flow, condition, held_out=held_out, train=train, draws=plan.draws, seed=seed
    )
    assert coverage.eubo is not None
    assert coverage.target_ess is not None
    figures = {
        "acceptance": coverage.weights.acceptance.value,
        "acceptance_error": coverage.weights.acceptance.error,
        "ess": coverage.weights.ess.value,
        "ess_at_target": coverage.target_ess.value,
        "v": coverage.weights.v.value,
        "bracket": coverage.eubo.value - coverage.elbo.value,
        "reached": math.nan if coverage.reached is None else coverage.reached.value,
        "missing": _missing(coverage),
    }
    chain = independent_metropolis(target, flow, condition, draws=plan.draws, chains=1, seed=seed)
    beside = compare_with_held_out(target, flow, chain, held_out)
    for name, key in (("overlap", "overlap[-2, 0]"), ("overlap_floor", "overlap[-2, 0]_floor")):
        figures[name] = beside[key].value if key in beside else math.nan
    return {name: float(it) for name, it in figures.items()}


def _missing(coverage: Coverage) -> float:
    return sum(it.missing for it in coverage.modes) if coverage.modes else math.nan

"""Fit a flow to an unnormalised density, at all its conditions at once.

The gradient of terms on the target is the path gradient; with particles, or without a path, it is
that of the score function.
"""

import functools
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.func import functional_call

from rkl.checks import floats, integer
from rkl.divergences import FDivergence, ReverseKL
from rkl.flows.architectures import Architecture, CircularSplines, Conditioned, Scaled, draw
from rkl.flows.architectures.circular import CircularFlow
from rkl.flows.architectures.mixed import Bounded
from rkl.flows.architectures.placed import Placed
from rkl.flows.critic import Critic, Ratio
from rkl.flows.precision import single_precision
from rkl.flows.training import Moment, Training, train
from rkl.flows.weights import along_path, is_likelihood, on_data, on_draws
from rkl.randomness import one_at_a_time, random_numbers
from rkl.runs import Run
from rkl.sample.architecture import MAX_COOLED_SIZE, build_flow
from rkl.sample.domain import check_domain
from rkl.sample.lattice import CoarseToFine, CoarseToFineField, SitesDistribution
from rkl.sample.objectives import Objective, as_objective
from rkl.sample.particles import Particles
from rkl.sample.targets.base import Condition, Target, check_values, exact_log_z, without_bounds
from rkl.sample.targets.check import check_log_prob
from rkl.sample.targets.domains import check_inside

COLDEST = 0.02  # inverse temperature at which annealing begins
FASTEST, SLOWEST = 0.4, 0.7  # shares of the budget between which it ends
ENOUGH = 0.5  # share of effective draws at which it goes on
STEP = 1.03  # by this factor
GROUPS = 128  # conditions of the particles
AT_ENDS = 0.005  # share of the range of a condition that is seen at either of its ends
DEEPEST = 100.0  # nats below the highest log p/q of a condition, below which draws count alike
WIDEST = math.log(100)  # log-ratios of a critic are cut off there

LogProb = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class TargetFit:
    """A flow fitted to a target, with its training.

    Attributes:
        flow: ``flow(condition)`` has ``log_prob`` in nats and ``sample``.
        training: One row per so many steps, with ``free_energy_bound``, E_q[log q − log p] in
            nats and no KL, as log Z is unknown; ``v``, the variance of log p/q per coordinate;
            ``ess`` and ``acceptance`` of the draws of a step; ``beta`` while it is annealed, or
            ``nll`` of particles, in nats.
    """

    flow: nn.Module
    training: Training

    def _repr_html_(self) -> str:
        return self.training._repr_html_()


@one_at_a_time()
@single_precision()
def fit_to_target(
    flow: Architecture | nn.Module,
    target: Target,
    conditions: Float[Tensor, "strata conditions"] | Sequence[Condition] | None = None,
    objective: Objective | FDivergence | str = ReverseKL(),  # noqa: B008
    *,
    data: tuple[Tensor, Tensor] | None = None,
    steps: int | None = None,
    minutes: float | None = None,
    seed: int = 0,
    batch: int = 512,
    strata: int = 32,
    anneal: bool | None = None,
    critic: Critic | None = None,
    log_z: Literal["learned"] | None = None,
    lr: float = 5e-3,
    clip: float = 10.0,
    ema: float = 0.998,
    run: Run | None = None,
    every: int = 100,
) -> TargetFit:
    """Minimise a sum of divergences D(target ‖ flow), averaged over conditions.

    Args:
        flow: An architecture, built here, or a flow over the events of the target; of coordinates
            with bounds an architecture, or what an earlier fit returned.
        target: The density, up to log Z of each condition.
        conditions: Values to train at; or ranges to draw from, by default the target's.
        objective: A divergence, a sum of terms, its text, or the name of a variant of AdvNF.
        data: Draws of the target [rows, *event], and their conditions.
        steps: The budget in steps, or
        minutes: in minutes.
        seed: Random seed.
        batch: Draws of a step, all conditions together.
        strata: Number of strata of each condition, equal in every step; Latin squares for several.
        anneal: By default on the line and for splines of angles: up to 8 coordinates the
            likelihood of particles is added to the target's terms, and particles replace data;
            beyond, without data, the β of p^β rises.
        critic: Critic that learns the ratio of a term on the critic.
        log_z: "learned" estimates it in each step for terms that are not scale-free.
        lr: Highest learning rate.
        clip: Greatest norm of the gradient.
        ema: Decay of the average of the parameters.
        run: Run folder for checkpoints and log; an interrupted fit continues from there.
        every: Steps between rows of the history.

    Raises:
        ValueError, TypeError: An argument does not fit; the message names it.
    """
    chosen = as_objective(objective)
    anneal = _anneals(flow, target, chosen, data, anneal)
    _check_terms(chosen, target, data is not None or _cools(target, anneal), log_z)
    given = _Conditions(target, conditions, strata)
    each = _draws(batch, given.count)
    with random_numbers(seed):
        fitted = (
            flow
            if isinstance(flow, nn.Module)
            else build_flow(flow, target, given.training_ranges)
        )
        trained, aim = fitted, without_bounds(target)
        if target.chart.bounded:
            trained, data = _without_bounds(fitted, target, data)
        _check_target(trained, aim, given, chosen, anneal)
        fitting = _Fitting(trained, aim, chosen, given, each, anneal, data, critic)
    budget: dict[str, Any] = {"steps": steps, "minutes": minutes, "seed": seed, "every": every}
    budget |= {"lr": lr, "clip": clip, "ema": ema, "run": run, "also": fitting.stateful()}
    return TargetFit(fitted, train(trained, fitting, **budget))


def _without_bounds(flow: nn.Module, target: Target, data) -> tuple[nn.Module, Any]:
    if not isinstance(flow, Bounded):
        raise ValueError(
            f"flow must be an architecture for {target}, whose coordinates have bounds, or what "
            f"a fit to it returned; got a {type(flow).__name__}."
        )
    if not isinstance(data, tuple) or len(data) != 2:
        return flow.flow, data
    x, condition = data
    target.check(x, condition)
    check_inside("data", target.chart, x)
    return flow.flow, (target.chart.to_unbounded(x)[0], condition)


def _check_target(flow, target: Target, given: "_Conditions", chosen: Objective, anneal) -> None:
    dtype = next(flow.parameters()).dtype
    middle = torch.tensor([(it.low + it.high) / 2 for it in given.training_ranges])
    gradient = chosen.uses("target") and not _cools(target, anneal)
    check_log_prob(target, middle, dtype=dtype, gradient=gradient)


def _draws(batch: int, conditions: int) -> int:
    """Draws of one condition in a step."""
    integer("batch", batch)
    if batch < 2 * conditions:
        raise ValueError(
            f"batch must be at least two draws for each of {conditions} conditions; got {batch!r}."
        )
    return batch // conditions


def _anneals(flow, target: Target, objective: Objective, data, anneal: bool | None) -> bool:
    if not isinstance(target, Target):
        raise TypeError(f"target must be a Target such as XY(side=8); got {target!r}.")
    splines = isinstance(flow, CircularSplines | CircularFlow) or (
        isinstance(flow, Conditioned) and isinstance(flow.flow, CircularFlow)
    )
    if anneal is not None or (target.domain == "circle" and not splines):
        return bool(anneal)
    # Draws alone do not keep the target's terms from losing modes; particles beside them do.
    return data is None or (_cools(target, True) and objective.uses("target"))


def _cools(target: Target, anneal: bool) -> bool:
    return anneal and math.prod(target.event_shape) <= MAX_COOLED_SIZE


def _check_terms(objective: Objective, target: Target, drawn: bool, log_z) -> None:
    if log_z not in (None, "learned"):
        raise ValueError(f"log_z must be 'learned' or None; got {log_z!r}.")
    for term in objective.terms:
        if term.estimator != "target" and not drawn:
            raise ValueError(f"data must be given for the term {term} of the objective; got None.")
        free = term.divergence.scale_free or log_z == "learned" or _has_log_z(target)
        if term.estimator == "target" and not free:
            raise ValueError(
                f"objective: log Z of {target} is unknown, and it moves the minimiser of "
                f"{term.divergence}. Take a scale-free divergence, such as ReverseKL() or KL(), "
                "or log_z='learned' (--log-z learned)."
            )


def _has_log_z(target: Target) -> bool:
    return exact_log_z(target, torch.tensor([[it.low for it in target.conditions]])) is not None


def _of_target(target: Target, ranges: Any) -> tuple[Condition, ...]:
    """Ranges of all conditions of a target, in its order."""
    named = [getattr(it, "name", it) for it in ranges]
    expected = [it.name for it in target.conditions]
    if named != expected:
        raise ValueError(
            f"conditions must be a tensor, or ranges of {', '.join(expected)}; got a "
            f"{type(ranges).__name__} with {named}."
        )
    return tuple(ranges)


class _Conditions:
    """Values of the conditions of a step, one for each stratum."""

    def __init__(self, target: Target, chosen: Tensor | Sequence[Condition] | None, strata: int):
        self.values = values = chosen if isinstance(chosen, Tensor) else None
        self.ranges = target.conditions
        if chosen is not None and values is None:
            self.ranges = _of_target(target, chosen)
            for end in ("low", "high"):
                check_values(target, [[getattr(it, end) for it in self.ranges]])
        if values is not None:
            floats("conditions", values)
            if values.ndim != 2 or values.shape[1] != len(self.ranges) or not len(values):
                names = ", ".join(it.name for it in self.ranges)
                raise ValueError(
                    f"conditions must be [strata, {len(self.ranges)}], for {names}; "
                    f"got {list(values.shape)}."
                )
            check_values(target, values)
        integer("strata", strata, at_least=1)
        self.count = strata if values is None else len(values)

    @property
    def training_ranges(self) -> tuple[Condition, ...]:
        """Each condition with its least and its greatest value."""
        if self.values is None:
            return tuple(self.ranges)
        columns = zip(self.ranges, self.values.T, strict=True)
        return tuple(it._replace(low=float(v.min()), high=float(v.max())) for it, v in columns)

    def draw(self, count: int | None = None) -> Float[Tensor, "strata conditions"]:
        """One value in each stratum, or in each of so many."""
        count = self.count if count is None else count
        if self.values is not None:
            return self.values[torch.arange(count) % self.count]
        columns = []
        for k, condition_range in enumerate(self.ranges):
            order = torch.randperm(count) if k else torch.arange(count)
            share = (order + torch.rand(count)) / count
            inner = (1 + 2 * AT_ENDS) * share - AT_ENDS  # the ends themselves are seen too
            columns.append(
                condition_range.low
                + (condition_range.high - condition_range.low) * inner.clamp(0, 1)
            )
        return torch.stack(columns, -1) if columns else torch.empty(count, 0)


class _Rows:
    """Draws of the target, used equally often for every condition."""

    def __init__(self, target: Target, data: tuple[Tensor, Tensor]):
        if not isinstance(data, tuple) or len(data) != 2:
            raise TypeError("data must be a pair: the draws, and their conditions.")
        self.x, self.condition = data
        target.check(self.x, self.condition)
        check_values(target, self.condition)
        if len(self.x) != len(self.condition) or not len(self.x):
            raise ValueError(
                f"data must be as many draws as conditions; got {len(self.x)} "
                f"and {len(self.condition)}."
            )
        if target.conditions:
            _, group, counts = self.condition.unique(
                dim=0, return_inverse=True, return_counts=True
            )
        else:
            group, counts = torch.zeros(len(self.x), dtype=torch.long), torch.tensor([len(self.x)])
        self.order, self.counts = group.argsort(stable=True), counts
        self.starts = counts.cumsum(0) - counts

    def draw(self, batch: int) -> tuple[Tensor, Tensor]:
        """Rows [groups, each] of all conditions, as many of each as fit into the batch."""
        each = max(2, batch // len(self.counts))
        share = torch.rand(len(self.counts), each)
        picked = (share * self.counts[:, None]).long() + self.starts[:, None]
        rows = self.order[picked]
        return self.x[rows], self.condition[rows]


class _Fitting:
    """The loss of a step, and its inverse temperature β."""

    def __init__(self, flow, target, objective, conditions, draws, anneal, data, critic):
        self.flow, self.target, self.objective = flow, target, objective
        self.conditions, self.draws = conditions, draws
        self.dtype = next(flow.parameters()).dtype
        self.rows = None if data is None else _Rows(target, data)
        self.particles: Particles | None = None
        if _cools(target, anneal):
            self.particles = Particles(target, conditions.draw(GROUPS).to(self.dtype))
        self.anneal = anneal and self.particles is None
        self.beta = COLDEST if self.anneal else 1.0
        self.share = 0.0
        self.place()
        self.critic: Ratio | None = None
        if objective.uses("critic"):
            size = math.prod(target.event_shape) + int(target.chart.circle.sum())
            critic = critic or Critic()
            self.critic = critic.build((size,), len(target.conditions), WIDEST)
        law = self.law(conditions.draw().to(self.dtype))
        if law.event_shape != torch.Size(target.event_shape):
            raise ValueError(
                f"flow must have events of shape {list(target.event_shape)}, as {target} has; "
                f"got {list(law.event_shape)}."
            )
        check_domain(law, target, torch.ones((), dtype=self.dtype))
        if isinstance(law, SitesDistribution):
            _check_integrated(law, target)

    def place(self) -> None:
        """Set mean and width of a flow that has none, from the events of this step."""
        seen, flow = self.particles or self.rows, self.flow
        if seen is None:
            return
        x = seen.x.reshape(-1, *self.target.event_shape)
        if isinstance(flow, Placed) and flow.fresh:
            lead = seen.x.shape[: seen.x.ndim - len(self.target.event_shape)]
            given = seen.condition.expand(*lead, seen.condition.shape[-1])
            rows = given.reshape(len(x), -1).to(self.dtype)
            flow.place(x.to(self.dtype), *((rows,) if self.target.conditions else ()))
        elif isinstance(flow, Scaled) and (flow.scale == 1).all() and (flow.shift == 0).all():
            circle = self.target.chart.circle
            flow.shift.copy_(torch.where(circle, 0.0, x.mean(0)))
            flow.scale.copy_(torch.where((x.std(0) > 0) & ~circle, x.std(0), 1.0))

    def stateful(self) -> dict[str, Any]:
        """Objects that are saved with the flow."""
        states: dict[str, Any] = {"annealing": self}
        states |= {} if self.particles is None else {"particles": self.particles}
        if self.critic is None:
            return states
        return states | {"critic": self.critic, "critic_optimizer": self.critic.optimizer}

    def state_dict(self) -> dict[str, float]:
        return {"beta": self.beta, "share": self.share}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        self.beta, self.share = state_dict["beta"], state_dict.get("share", 0.0)

    def law(self, condition: Tensor, held: bool = False) -> Any:
        """Distribution of the flow; with ``held``, its parameters have no gradient."""
        arguments = (condition,) if self.target.conditions else ()
        if not held:
            return self.flow(*arguments)
        values = {name: it.detach() for name, it in self.flow.named_parameters()}
        return functional_call(self.flow, values, arguments)

    def log_prob(self, x: Tensor, condition: Tensor) -> Tensor:
        log_p = self.target.log_prob(x, condition)
        return log_p if self.beta == 1 else self.beta * log_p

    def __call__(self, moment: Moment) -> Tensor:
        terms, share = [], 1.0
        if self.particles is not None:
            terms.append(self.on_particles(self.particles, moment))
            share = min(1.0, (moment.progress - FASTEST) / (SLOWEST - FASTEST))
            share = self.share = max(self.share, share)  # of a larger budget it would fall
        for term in self.objective.terms if share > 0 else ():
            loss = {"target": self.on_target, "data": self.on_data, "critic": self.on_critic}
            value = loss[term.estimator](term.divergence, moment)
            terms.append(share * term.weight * value)
        return functools.reduce(operator.add, terms)

    def on_particles(self, particles: Particles, moment: Moment) -> Tensor:
        """Minus the mean log-likelihood of particles."""
        x, condition = self._particles_of_step(particles)
        nll = -self.law(condition).log_prob(x).mean()
        moment.log(nll=nll)
        return nll

    def on_target(self, divergence: FDivergence, moment: Moment) -> Tensor:
        condition = self.conditions.draw().to(self.dtype)
        law = self.law(condition)
        log_ratio, log_q = _log_ratio(self, law, condition)
        detached = log_ratio.detach()
        self.tell(moment, detached)
        if _has_log_z(self.target) and self.beta == 1:
            log_ratio = log_ratio - self.target.log_normaliser(condition)
        else:
            log_ratio = log_ratio - (detached.logsumexp(0) - math.log(len(detached)))
        if log_q is None:
            return along_path(divergence, log_ratio.flatten()).mean()
        losses = [on_draws(divergence, *it) for it in zip(log_ratio.T, log_q.T, strict=True)]
        return torch.stack(losses).mean()

    def tell(self, moment: Moment, log_ratio: Float[Tensor, "draws strata"]) -> None:
        """Log figures of the draws, and raise β if the draws are good enough."""
        draws = len(log_ratio)
        ess = (2 * log_ratio.logsumexp(0) - (2 * log_ratio).logsumexp(0)).exp().mean() / draws
        first, other = log_ratio[: draws // 2], log_ratio[draws // 2 : 2 * (draws // 2)]
        moment.log(
            free_energy_bound=-log_ratio.mean(),
            v=log_ratio.var(0).mean() / math.prod(self.target.event_shape),
            ess=ess,
            acceptance=(other - first).clamp_max(0).exp().mean(),
        )
        if not self.anneal:
            return
        moment.log(beta=self.beta)
        # The draws of a flow that has lost modes look effective: ESS alone must not set the pace.
        floor, ceiling = (
            COLDEST ** max(0.0, 1 - moment.progress / end) for end in (SLOWEST, FASTEST)
        )
        risen = self.beta * (STEP if float(ess) > ENOUGH else 1.0)
        self.beta = max(self.beta, floor, min(risen, ceiling))

    def on_data(self, divergence: FDivergence, moment: Moment) -> Tensor:
        x, condition = self._data()
        log_q = self.law(condition).log_prob(x)
        moment.log(nll=-log_q.detach().mean())
        if is_likelihood(divergence):
            return on_data(divergence, torch.zeros_like(log_q).flatten(), log_q.flatten()).mean()
        log_ratio = self.log_prob(x, condition) - log_q.detach()
        if _has_log_z(self.target):
            log_ratio = log_ratio - self.target.log_normaliser(condition)
        else:  # E_p[q/p] = 1
            log_ratio = log_ratio + ((-log_ratio).logsumexp(1) - math.log(x.shape[1]))[:, None]
        return on_data(divergence, log_ratio.flatten(), log_q.flatten()).mean()

    def _particles_of_step(self, particles: Particles) -> tuple[Tensor, Tensor]:
        batch = self.draws * self.conditions.count
        strata = max(self.conditions.count, math.ceil(batch / particles.each))
        return particles.draw(strata, batch // strata)

    def _data(self) -> tuple[Tensor, Tensor]:
        """Data or particles [conditions, each, *event], with their conditions."""
        if self.rows is None:
            assert self.particles is not None
            x, condition = self._particles_of_step(self.particles)
            return x.transpose(0, 1), condition[:, None].expand(-1, len(x), -1)
        x, condition = self.rows.draw(self.draws * self.conditions.count)
        return x.to(self.dtype), condition.to(self.dtype)

    def on_critic(self, divergence: FDivergence, moment: Moment) -> Tensor:
        assert self.critic is not None
        x, condition = self._data()
        flat = condition.flatten(0, 1)
        law = self.law(flat)
        drawn = law.rsample() if law.has_rsample else draw(law)[0]
        p, q = self.critic_input(x.flatten(0, 1)), self.critic_input(drawn)
        given = flat if self.target.conditions else None
        share = 1 - moment.progress
        moment.log(critic=self.critic.update(p, q.detach(), given, share))
        log_ratio = self.critic(q, given)
        if law.has_rsample:
            return along_path(divergence, log_ratio).mean()
        return on_draws(divergence, log_ratio, law.log_prob(drawn)).mean()

    def critic_input(self, x: Tensor) -> Tensor:
        """Inputs of a critic: angles as points of the circle."""
        x, circle = x.flatten(1), self.target.chart.circle.flatten()
        return torch.cat([x[:, ~circle], x[:, circle].cos(), x[:, circle].sin()], 1)


def _log_ratio(fitting: _Fitting, law: Distribution, condition: Tensor):
    """Log p − log q [draws, strata]; and log q, if the draws do not depend on the parameters."""
    shape = (fitting.draws,)
    if isinstance(law, SitesDistribution):
        return law.path_log_ratio(fitting.log_prob, shape, fitting.beta), None
    batch = (fitting.draws, *condition.shape)
    if not fitting.target.conditions:
        shape = (fitting.draws, len(condition))
    # Along the path log p − log q changes within modes; how it differs between modes, only the
    # score function sees, and it is quiet where particles have led the flow near p.
    if law.has_rsample and fitting.particles is None:
        x = law.rsample(torch.Size(shape))
        constant_log_q = fitting.law(condition, held=True).log_prob(x)
        return fitting.log_prob(x, condition.expand(batch)) - constant_log_q, None
    x, _ = draw(law, shape)
    log_q = law.log_prob(x)
    log_ratio = fitting.log_prob(x, condition.expand(batch)) - log_q.detach()
    # Without density the loss is infinite, and one draw from the heavy tails of a flow outweighs
    # all others. Below the floor a draw counts as one at it; weights have no floor.
    floor = log_ratio.detach().amax(0) - DEEPEST
    return torch.maximum(log_ratio, floor), log_q


def _check_integrated(law: SitesDistribution, target: Target) -> None:
    if law.integrates(target.log_prob):
        return
    circular = target.domain == "circle"
    generic = CoarseToFine(integrate="none") if circular else CoarseToFineField()
    remedy = target.architecture() or generic
    raise ValueError(
        f"flow draws a part of the sites exactly for {law.flow.architecture}, which {target} is "
        f"not; build it from {remedy}."
    )

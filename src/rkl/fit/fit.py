"""Fit a flow to data under the divergence of your choice."""

import copy
import math
import time
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from rkl.checks import LARGEST_COUNT, integer, number, warn
from rkl.divergences import KL, FDivergence
from rkl.fit.data import read_data
from rkl.fit.guard import Guard, LogProb, anneal, slope_of
from rkl.fit.mixtures import begin_as_mixture
from rkl.fit.operating import check_point, reach
from rkl.fit.result import SPLINED, Fit
from rkl.flows.architectures import Architecture, draw
from rkl.flows.architectures.coupling import CouplingFlow
from rkl.flows.architectures.splines import start_as_identity
from rkl.flows.critic import Critic, Ratio, ScaledCritic, lessons
from rkl.flows.precision import single_precision
from rkl.flows.rows import Data
from rkl.flows.standardise import Standardised, Units
from rkl.flows.training import Moment, Training, train
from rkl.flows.weights import along_path, bounded_on_data, is_likelihood, on_data, on_draws
from rkl.randomness import one_at_a_time, random_numbers
from rkl.runs import Run
from rkl.stats import Mean, mean

Estimator = Literal["data", "draws", "path", "both"]
CRITIC_BEGINS = 0.8  # share of the maximum-likelihood phase after which the critic learns too
FULL_RATE = 1_000  # rows from which the learning rate is the full one, and no mixture the start
BLURRED = 150  # rows up to which the noise on them is the full one
ERRORS = 2.0  # standard errors by which training must gain on its start, to be kept
BLUR = 0.3  # standard deviation of that noise, in standard units
WIDEST = 10.0  # log-ratios are cut off at ± log(WIDEST · max(λ, 1/λ))


@dataclass(frozen=True)
class Method:
    """Settings of a fit beside its divergence; the defaults are stable.

    A fit begins with maximum likelihood. Then the slope λ of the divergence, if it has one, goes
    from 1 to its value; plain likelihood keeps a share of the loss; and precision at the slope,
    measured against the start of this phase, decides which parameters are kept: the fit does not
    end below maximum likelihood.

    Args:
        estimator: "data" (reweighted maximum likelihood), "draws" (score function), "path"
            (reparameterised), "both" (the mean of the first two); None chooses: "data" where no
            datum can weigh more than 1, "draws" elsewhere.
        critic: Critic that learns log p/q if the log-density of the data is unknown.
        start: Share of the budget for maximum likelihood.
        anchor: Weight of plain likelihood after it.
        batch: Rows in a step; all of them, where they are fewer.
        lr: Highest learning rate; None takes 2e-3, and less below 1,000 rows, as their root.
        noise: Standard deviation of noise on the rows of a table, in standard units; the rows are
            shrunk to keep their moments. None takes 0.3 up to 150 rows and less above, as 1/rows.
        clip: Greatest norm of the gradient.
        ema: Decay of the average of the parameters.
        held_out: Share of the rows to hold out.
        draws: Draws from which precision is measured during training.
        guard: Whether held-out likelihood, and after it the guard, choose the parameters;
            else the last ones are kept. In many dimensions two fits overlap so little that the
            guard counts every change as a loss.
    """

    estimator: Estimator | None = None
    critic: Critic = field(default_factory=Critic)
    start: float = 0.5
    anchor: float = 0.1
    batch: int = 512
    lr: float | None = None
    noise: float | None = None
    clip: float = 10.0
    ema: float = 0.999
    held_out: float = 0.1
    draws: int = 2048
    guard: bool = True

    def __post_init__(self):
        if not isinstance(self.guard, bool):
            raise TypeError(f"guard must be True or False; got {self.guard!r}.")
        if self.estimator not in (None, "data", "draws", "path", "both"):
            expected = "'data', 'draws', 'path', 'both' or None"
            raise ValueError(f"estimator must be {expected}; got {self.estimator!r}.")
        number("start", self.start, above=0, below=1)
        number("anchor", self.anchor, at_least=0, below=1)
        number("held_out", self.held_out, above=0, below=1)
        for name in ("batch", "draws"):
            value = getattr(self, name)
            integer(name, value, at_least=2, at_most=LARGEST_COUNT)
        if self.noise is not None:
            number("noise", self.noise, at_least=0)

    def rate(self, rows: int) -> float:
        """The highest learning rate for so many rows."""
        return 2e-3 * min(1.0, rows / FULL_RATE) ** 0.5 if self.lr is None else self.lr

    def blur(self, rows: Data) -> float:
        """The noise on these rows, in standard units."""
        if self.noise is not None:
            return self.noise
        return BLUR * min(1.0, BLURRED / len(rows)) if len(rows.event_shape) == 1 else 0.0


@one_at_a_time()
@single_precision()
def fit_to_samples(
    flow: Architecture | nn.Module,
    data: Any,
    divergence: FDivergence = KL(),
    *,
    steps: int | None = None,
    minutes: float | None = None,
    seed: int = 0,
    labels: Any = None,
    dequantise: bool | None = None,
    log_prob: LogProb | None = None,
    method: Method | None = None,
    with_critic: bool = False,
    target_precision: float | None = None,
    budget: float | None = None,
    run: Run | None = None,
    every: int | None = None,
) -> Fit:
    """Minimise D(data ‖ flow) over a flow, for any f-divergence.

    KL is maximum likelihood. Others weigh each datum or draw by p/q, exact where the density of
    the data is known, else learnt by a critic. PrecisionHalf(lam) and RecallHalf(lam) trade
    precision for recall with weights in [0, 1], so that the flow stays a density model.

    Args:
        flow: An architecture, built here, or a flow over events of the shape of a row.
        data: Any source of :func:`read_data`, or its result.
        divergence: Any f-divergence.
        steps: The budget in steps, or
        minutes: in minutes, critics included: up to a half of it, if an operating point is set.
        seed: Random seed.
        labels: Class of each row, which conditions the flow.
        dequantise: Whether to spread quantised values, such as grey levels, over one step.
        log_prob: Log-density of the data in nats, if known, at events [batch, *event], conditions.
        method: All other settings.
        with_critic: Whether to train a critic at the end if the divergence needs none.
        target_precision: Precision at slope 1 for rejection to reach.
        budget: Draws per sample that rejection may take, by default 20; without a target all
            are used.
        run: Run folder for checkpoints and log; an interrupted fit continues from there.
        every: Steps between evaluations on held-out rows; by default 1/25 of all, 25 at least.

    Returns:
        The flow in the user's units, its critic and history; ``reached``, if a point was set.

    Raises:
        TypeError, ValueError: The data cannot be fitted, or settings are invalid.
        FloatingPointError: No step had a finite gradient.

    >>> from rkl.flows import Coupling
    >>> fitted = fit_to_samples(Coupling(2, (8,)), 5 + torch.randn(500, 2), steps=100)
    >>> fitted.flow().sample((1000,)).mean().round().item()
    5.0
    """
    check_point(target_precision, budget)
    if not isinstance(divergence, FDivergence):
        raise TypeError(f"divergence must be an f-divergence; got {divergence!r}.")
    if isinstance(data, Data) and (labels is not None or dequantise is not None):
        raise ValueError(
            "labels and dequantise say how data are read, and these have been: give them to "
            "read_data."
        )
    rows = data if isinstance(data, Data) else read_data(data, labels, dequantise=dequantise)
    if rows is not data:
        for note in rows.notes:
            warn(f"data: {note}.")
    method = method or Method()
    problem = _Problem(flow, rows, divergence, method, log_prob, seed)
    aimed = target_precision is not None or budget is not None
    learnt = with_critic or aimed or (problem.guided and log_prob is None)
    share = share_of_steps(divergence, critic=learnt, aimed=aimed)
    done = problem.train(steps, minutes and minutes * share, run, every)
    problem.seconds = math.inf if minutes is None else 60 * minutes * (1 - share)
    return problem.finish(done, learnt, target_precision, budget)


def share_of_steps(divergence: FDivergence, *, critic: bool, aimed: bool) -> float:
    """Share of a budget in minutes that the steps of the flow take, before critics follow.

    Args:
        divergence: Divergence that is minimised.
        critic: Whether a critic follows.
        aimed: Whether an operating point is set, which a second critic measures.

    >>> share_of_steps(KL(), critic=True, aimed=True)
    0.5
    """
    if aimed:
        return 0.5
    if not critic:
        return 1.0
    return 0.75 if is_likelihood(divergence) else 0.9


def _standardise(
    flow: Architecture | nn.Module, rows: Data, training: Data, held_out: Data, seed: int
) -> Standardised:
    """The flow in the user's units, with its columns bent if the held-out rows agree."""
    if isinstance(flow, Architecture):
        with random_numbers(seed):
            flow = flow.build(rows.event_shape, rows.conditions)
    if not isinstance(flow, nn.Module):
        raise TypeError(f"flow must be an architecture or a module; got {flow!r}.")
    start_as_identity(flow)
    if isinstance(flow, CouplingFlow):
        flow.within = SPLINED  # networks see what splines would bend
    device = next(flow.parameters()).device
    units = Units.of_rows(training)
    if units.bending is not None:
        plain = Units.of_rows(training, bend=False)
        scores = [it.gaussian(held_out.values).mean() for it in (units, plain)]
        units = units if scores[0] >= scores[1] else plain
    if len(training) < FULL_RATE:  # on the CPU, where the rows are
        flow, units = begin_as_mixture(flow.cpu(), training, held_out, units, seed)
    return Standardised(flow, units).to(device)


class _Draws(NamedTuple):
    """Events of the flow, standardised, with their log-density and conditions."""

    value: Tensor
    log_q: Tensor
    condition: Tensor | None


class _Problem:
    """One fit: its loss, and its evaluations between steps.

    Attributes:
        seconds: Time for the critics after the last step.
    """

    seconds = math.inf

    def __init__(self, flow, data, divergence, method, log_prob, seed):
        rows, held_out = data.split(method.held_out, seed)
        self.classes, self.method, self.divergence = data.classes, method, divergence
        self.scaled = scaled = _standardise(flow, data, rows, held_out, seed)
        self.plain = Units.of_rows(rows, bend=False)
        self.blur = method.blur(rows)
        self.flow, self.seed, self.log_prob = scaled.flow, seed, log_prob
        self.device = scaled.shift.device
        self.rows, self.held_out = rows.to(self.device), held_out.to(self.device)
        self.guided = not is_likelihood(divergence)
        self.lam = slope_of(divergence)
        self.estimator = method.estimator or ("data" if bounded_on_data(divergence) else "draws")
        bound = math.log(WIDEST * max(self.lam, 1 / self.lam))
        with random_numbers(seed + 1):
            shape = rows.event_shape
            self.ratio: Ratio = method.critic.build(shape, rows.conditions, bound)
            self.ratio.to(self.device, scaled.dtype)
        exact = None if log_prob is None else self._exact
        self.guard = Guard(self.flow, self.ratio, divergence, exact)
        self.settings: dict[str, Any] = {"divergence": repr(divergence), "seed": seed}
        if isinstance(flow, Architecture):
            of_rkl = type(flow).__module__.startswith("rkl.")
            spelt = repr(flow) if of_rkl else f"{type(flow).__module__}:{flow!r}"
            self.settings |= {"flow": spelt, "estimator": method.estimator or "auto"}
            names = "start", "anchor", "batch", "lr", "held_out", "guard"
            self.settings |= {name: getattr(method, name) for name in names}
        self.initial = copy.deepcopy(self.flow.state_dict())
        self.frozen = copy.deepcopy(self.flow).requires_grad_(False)
        self.also = {"critic": self.ratio, "optimizer": self.ratio.optimizer, "guard": self.guard}
        self.also = self.also if self.guided else {}

    def train(
        self, steps: int | None, minutes: float | None, run: Run | None, every: int | None
    ) -> Training:
        method = self.method
        rate = method.rate(len(self.rows))
        how: dict[str, Any] = {"lr": rate, "clip": method.clip, "ema": method.ema, "early": True}
        every = every if every is not None else max(25, (steps or 2500) // 25)
        how |= {"seed": self.seed, "also": self.also, "run": run, "every": every}
        how |= {"steps": steps, "minutes": minutes, "watch": self.watch}
        return train(self.flow, self.objective, **how)

    def _batch(self) -> tuple[Tensor, Tensor | None]:
        """Standardised rows with their conditions, blurred with unchanged moments."""
        size = self.method.batch
        batch = self.rows.batch(size) if size < len(self.rows) else self.rows.spread()
        value = self.scaled.standardise(batch.values)
        if self.blur:
            value = (value + self.blur * torch.randn_like(value)) / math.hypot(1, self.blur)
        return value, batch.condition

    def _draws(self, condition: Tensor | None, count: int) -> _Draws:
        value, log_q = draw(self._law(condition), () if condition is not None else (count,))
        return _Draws(value, log_q, condition)

    def _law(self, condition: Tensor | None) -> Any:
        return self.flow() if condition is None else self.flow(condition)

    def _exact(self, value: Tensor, condition: Tensor | None) -> Tensor:
        assert self.log_prob is not None
        given = () if condition is None else (condition,)
        event = self.scaled.units.decode(value)
        log_p = self.log_prob(event, *given) - self.scaled.units.encode(event)[1]
        return log_p.to(value.dtype)

    def _log_ratio(self, value: Tensor, log_q: Tensor, condition: Tensor | None) -> Tensor:
        if self.log_prob is None:
            return self.ratio(value, condition)
        return self.ratio.cut_off(self._exact(value, condition) - log_q)

    def objective(self, moment: Moment) -> Tensor:
        value, condition = self._batch()
        log_q = self._law(condition).log_prob(value)
        likelihood = -log_q.mean()
        if not self.guided:
            return likelihood
        late = self.guard.begun or moment.progress > CRITIC_BEGINS * self.method.start
        learning = self.log_prob is None and late
        if not self.guard.begun and not learning:
            return likelihood
        draws = self._draws(condition, len(value))
        for _ in range(self.method.critic.updates if learning else 0):
            rate = 1 - moment.progress / 2
            moment.log(critic=self.ratio.update(value, draws.value, condition, rate))
        if not self.guard.begun:
            return likelihood
        since = (moment.progress - self.method.start) / (1 - self.method.start)
        since = self.guard.advance(since)
        guided = self._divergence_loss(
            anneal(self.divergence, 2 * since), value, log_q, draws, moment
        )
        anchor = 1 - (1 - self.method.anchor) * min(1.0, 4 * since)
        return anchor * likelihood + (1 - anchor) * guided

    def _divergence_loss(
        self, divergence: FDivergence, value: Tensor, log_q: Tensor, draws: _Draws, moment: Moment
    ) -> Tensor:
        if self.estimator == "path":
            return self._along_path(divergence, draws.condition, len(value))
        parts, ratio = [], log_q
        if self.estimator in ("data", "both"):
            with torch.no_grad():
                ratio = self._log_ratio(value, log_q, draws.condition)
            parts.append(on_data(divergence, ratio, log_q).mean())
        if self.estimator in ("draws", "both"):
            with torch.no_grad():
                ratio = self._log_ratio(draws.value, draws.log_q, draws.condition)
            again = self._law(draws.condition).log_prob(draws.value)
            parts.append(on_draws(divergence, ratio, again).mean())
        moment.log(cut_off=(ratio.abs() >= self.ratio.bound).to(log_q.dtype).mean())
        return torch.stack(parts).mean()

    def _along_path(self, divergence: FDivergence, condition: Tensor | None, count: int) -> Tensor:
        """The gradient through the draws alone; the flow's density in it is held constant."""
        value = self._law(condition).rsample(() if condition is not None else (count,))
        log_q = value.new_zeros(len(value))
        if self.log_prob is not None:
            self.frozen.load_state_dict(self.flow.state_dict())
            law = self.frozen() if condition is None else self.frozen(condition)
            log_q = law.log_prob(value)
        return along_path(divergence, self._log_ratio(value, log_q, condition)).mean()

    def watch(self, moment: Moment) -> float | None:
        """Held-out likelihood and, in the second phase, the gain in the divergence."""
        with random_numbers(self.seed + 2):  # the same draws of latents every time
            mean_held_out = self.held_out_log_prob().mean().item()
            moment.log(held_out=mean_held_out)
            if not self.guided:
                return mean_held_out if self.method.guard else None
            if not self.guard.begun and moment.progress < self.method.start:
                return None
            index = torch.randint(len(self.rows), (self.method.draws,), device=self.device)
            condition = self.rows.rows(index).condition
            score = self.guard.score(moment, condition, self.method.draws)
            return score if self.method.guard else None

    def held_out_log_prob(self) -> Tensor:
        """Log-density of the first rows held out, with noise on their levels."""
        count = min(len(self.held_out), self.method.draws)
        return self._log_prob(self.held_out.rows(torch.arange(count, device=self.device)).spread())

    def _log_prob(self, rows: Data) -> Tensor:
        law = self.scaled() if rows.condition is None else self.scaled(rows.condition)
        return law.log_prob(rows.values).double()

    @torch.no_grad()
    def scores(self) -> tuple[Mean, Mean]:
        """The log-density of all rows held out under the flow, and under a Gaussian."""
        with random_numbers(self.seed + 2):
            rows = self.held_out.spread()
        places = torch.arange(len(rows), device=self.device).split(self.method.draws)
        held_out = torch.cat([self._log_prob(rows.rows(index)) for index in places])
        return mean(held_out), mean(self.plain.to(self.device).gaussian(rows.values))

    def keep_start(self, done: Training) -> Training:
        """The fit, with the initial flow unless the final one is better by two errors."""
        if self.guided or not self.method.guard or not done.best_step:
            return done
        trained = copy.deepcopy(self.flow.state_dict())
        densities = []
        with random_numbers(), torch.no_grad():
            for state in (self.initial, trained):
                torch.manual_seed(self.seed + 2)
                self.flow.load_state_dict(state)
                densities.append(self.held_out_log_prob())
        gain = densities[1] - densities[0]
        if len(gain) < 2 or gain.mean() > ERRORS * gain.std() / math.sqrt(len(gain)):
            return done
        self.flow.load_state_dict(self.initial)
        return replace(done, best=densities[0].mean().item(), best_step=0)

    def finish(
        self,
        done: Training,
        learnt: bool,
        target_precision: float | None,
        budget: float | None,
    ) -> Fit:
        """The fit, with a critic if one is needed, and at its operating point."""
        done = self.keep_start(done)
        aimed = target_precision is not None or budget is not None
        least = self.method.critic.lessons_after(done.steps) if aimed else 50
        log_density, gaussian = self.scores()
        began = time.perf_counter()
        seconds = self.seconds / 2 if aimed else self.seconds
        critic = self.final_critic(done.steps, least, seconds) if learnt else None
        rows = self.held_out, self.rows, self.classes
        figures: dict[str, Any] = {"log_density": log_density, "gaussian": gaussian}
        fitted = Fit(self.scaled, critic, done, *rows, settings=self.settings, **figures)
        guarded = self.method.guard and not self.guided  # else it may well be
        if guarded and fitted.below_gaussian is not None:
            warn(fitted.below_gaussian)
        aim = self.method.critic, target_precision, budget, self.seed
        left = self.seconds - (time.perf_counter() - began)
        fitted = replace(fitted, reached=reach(fitted, *aim, left)) if aimed else fitted
        return replace(fitted, critic_seconds=time.perf_counter() - began if learnt else 0.0)

    def final_critic(self, steps: int, least: int, seconds: float) -> ScaledCritic:
        """The critic of the final flow, trained on for a tenth of the steps, or more."""
        with random_numbers(self.seed + 3):
            count = max(least, steps // (10 if self.guided else 3))
            for progress in lessons("critic", count, seconds):
                value, condition = self._batch()
                drawn = self._draws(condition, len(value))
                self.ratio.update(value, drawn.value, condition, 0.5 * (1 - progress))
        return ScaledCritic(self.ratio.requires_grad_(False), self.scaled.units)

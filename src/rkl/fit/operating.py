"""From a fitted flow to the operating point that was set, measured on held-out rows."""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rkl.checks import number
from rkl.fit.result import Fit, Reached
from rkl.flows.architectures import draw
from rkl.flows.critic import Critic, lessons
from rkl.flows.precision import single_precision
from rkl.flows.rows import Data
from rkl.flows.training import Moment, train
from rkl.metrics.precision_recall import OperatingPoint, operating_point
from rkl.randomness import one_at_a_time, random_numbers
from rkl.runs import Run
from rkl.stats import Mean, mean

DRAWS = 20_000  # on which a constant is fitted
KEPT = 10_000  # accepted draws that are told from data
BATCH = 512  # of them in a step
TRIED = 5  # steps of a critic that are timed
ROUNDS = 1_000  # of rejection, row by row
MOST = 20.0  # draws per sample, beyond which rejection is not tried
DEARER = 1.4  # by this factor, where the precision is not reached
POINTS = 2 + math.ceil(math.log(MOST) / math.log(DEARER))  # budgets that may be judged
WIDEST = math.log(100)


def check_point(target_precision: float | None, budget: float | None) -> None:
    """Refuse an operating point that does not exist."""
    if target_precision is not None:
        number("target_precision", target_precision, above=0, below=1)
    if budget is not None:
        number("budget", budget, at_least=1)


def reach(
    fitted: Fit,
    chosen: Critic,
    target: float | None,
    budget: float | None,
    seed: int,
    seconds: float = math.inf,
) -> Reached:
    """The mildest rejection of a fit that has a precision, or the precision at a budget.

    The critic that rejects cannot detect its own errors. So a second critic learns to tell
    accepted samples from data, and its success on rows that neither critic was trained on is
    P(A) − Q(A) for the set A where it votes for data; precision at slope 1 is at most 1 less
    that. While the precision is too low, more draws are spent, until the seconds are over.
    """
    began = time.perf_counter()
    with random_numbers(seed + 4):
        judge, most = _Judge(fitted, chosen), MOST if budget is None else budget
        if target is None:
            return judge.precision_bound(None, most, seconds)
        spent, best, left = 1.0, None, seconds
        while True:
            reached = judge.precision_bound(target, spent, left)
            value = reached.precision.value.item()
            if best is None or (value > best.precision.value.item() and not reached.hurried):
                best = reached
            over = reached.met or spent >= min(most, judge.useful)
            before, left = left, seconds - (time.perf_counter() - began)
            if over or reached.hurried or left < before - left:  # as long as this one took
                best = reached if reached.met else best
                return replace(
                    best, judged=tuple(judge.found), hurried=reached.hurried or not over
                )
            spent = min(most, judge.useful, spent * DEARER)


def seconds_of_update(fitted: Fit, chosen: Critic, batch: int) -> float:
    """Seconds of one step of a critic, with the draws that it learns from."""
    with random_numbers():
        shape, conditions = fitted.trained_on.event_shape, fitted.trained_on.conditions
        ratio = chosen.build(shape, conditions, WIDEST).to(fitted.flow.dtype)
        began = time.perf_counter()
        for _ in range(TRIED):
            rows = fitted.trained_on.batch(batch)
            law = fitted.flow() if rows.condition is None else fitted.flow(rows.condition)
            value, _ = draw(law, (batch,) if rows.condition is None else ())
            p, q = (fitted.flow.standardise(it) for it in (rows.values, value))
            ratio.update(p, q, rows.condition)
        return (time.perf_counter() - began) / TRIED


class _Judge:
    """A critic that learns to tell accepted samples of a flow from data."""

    def __init__(self, fitted: Fit, chosen: Critic):
        assert fitted.critic is not None
        self.lessons = max(1, chosen.lessons_after(fitted.training.steps) // 2)
        self.scaled, self.rejects = fitted.flow, fitted.critic
        device = fitted.flow.shift.device
        self.rows = fitted.trained_on.to(device)
        self.held_out = fitted.held_out.to(device).spread()
        shape, conditions = self.rows.event_shape, self.rows.conditions
        self.ratio = chosen.build(shape, conditions, WIDEST).to(device, fitted.flow.dtype)
        log_ratio = self._draws(DRAWS)[2].double().cpu()
        self.normaliser = (log_ratio.logsumexp(0) - math.log(DRAWS)).item()
        self.log_ratio = log_ratio - self.normaliser
        self.found: list[tuple[float, float, float]] = []
        self.useful = max(1.0, self.log_ratio.max().exp().item())  # then all that is left is p

    def point(self, budget: float) -> OperatingPoint:
        point = operating_point(self.log_ratio, budget=min(budget, self.useful))
        return point._replace(target_precision=min(1.0, point.target_precision))

    def precision_bound(self, target: float | None, budget: float, seconds: float) -> Reached:
        """Upper bound of the precision at a budget, within the seconds."""
        (precision, hurried), point = self.precision(budget, seconds), self.point(budget)
        figures = point.budget, *precision.pair()
        if not hurried:
            self.found.append(figures)
        judged = tuple(self.found)
        return Reached(target, precision, point, self.normaliser, judged, hurried)

    def _draws(self, count: int) -> tuple[Data, Tensor, Tensor]:
        """Rows, draws under their conditions, and log-ratios of these by the rejecting critic."""
        rows = self.rows.batch(count)
        law = self.scaled() if rows.condition is None else self.scaled(rows.condition)
        value, _ = draw(law, (count,) if rows.condition is None else ())
        with torch.no_grad():
            return rows, value, self.rejects(value, rows.condition)

    def _accept(self, point: OperatingPoint) -> tuple[Tensor, Tensor, Tensor | None]:
        """Rows, accepted draws under their conditions, and these conditions."""
        rows, value, log_ratio = self._draws(math.ceil(KEPT * point.budget))
        log_keep = log_ratio - self.normaliser + math.log(point.accept_lam)
        keep = torch.rand_like(log_keep).log() < log_keep
        given = None if rows.condition is None else rows.condition[keep]
        return self._inner(rows.values[keep]), self._inner(value[keep]), given

    def _inner(self, value: Tensor) -> Tensor:
        return self.scaled.standardise(value)

    def precision(self, budget: float, seconds: float) -> tuple[Mean, bool]:
        """Precision on held-out rows after training the judge; and whether time was short."""
        point, step = self.point(budget), 0
        p, q, given = self._accept(point)
        for progress in lessons("critic of what is kept", self.lessons, seconds):
            index = torch.randint(len(q), (BATCH,), device=q.device)
            condition = None if given is None else given[index]
            self.ratio.update(p[index], q[index], condition, 1 - progress)
            step += 1
        _, q, given = self._accept(point)
        with torch.no_grad():
            above = self.ratio(q, given) > 0
            above_held_out = (
                self.ratio(self._inner(self.held_out.values), self.held_out.condition) > 0
            )
        seen, taken = mean(above_held_out.double().cpu()), mean(above.double().cpu())
        least = (1 - seen.value + taken.value).clamp(max=point.target_precision)
        return Mean(least, torch.hypot(seen.error, taken.error)), step < self.lessons


@torch.no_grad()
def draw_kept(
    law: Any,
    log_ratio: Callable[[Tensor, Tensor | None], Tensor],
    log_lam: float,
    count: int,
    condition: Tensor | None = None,
) -> tuple[Tensor, int]:
    """Accepted draws, under the condition of each row if there are any; and their cost.

    Args:
        law: Distribution of a flow, batched by the conditions if there are any.
        log_ratio: log p/q of draws under their conditions, in nats.
        log_lam: The logarithm of rejection's constant.
        count: Number to accept; that of the conditions, if there are any.
        condition: Conditions, one row each.

    Returns:
        The accepted draws, and the number of draws made.

    Raises:
        RuntimeError: Some row has none after a thousand rounds.
    """
    samples = torch.empty(0)
    left, made = torch.arange(count), 0
    for _ in range(ROUNDS):
        value = law.sample(() if condition is not None else (len(left),))
        value = value[left.to(value.device)] if condition is not None else value
        given = None if condition is None else condition[left.to(condition.device)]
        log_keep = log_ratio(value, given) + log_lam
        keep = torch.rand_like(log_keep).log() < log_keep
        if not made:
            samples = value.new_empty(count, *value.shape[1:])
        samples[left.to(value.device)[keep]] = value[keep]
        made, left = made + len(left), left[~keep.cpu()]
        if not len(left):
            return samples, made
    raise RuntimeError(f"{len(left)} of {count} samples were not accepted in {ROUNDS} rounds.")


@one_at_a_time()
@single_precision()
def distil_rejection(
    fitted: Fit,
    *,
    budget: float | None = None,
    accept_lam: float | None = None,
    target_precision: float | None = None,
    anchor: float = 0.5,
    steps: int | None = None,
    minutes: float | None = None,
    batch: int = 512,
    lr: float = 1e-3,
    seed: int = 0,
    critic: Callable[..., Tensor] | None = None,
    run: Run | None = None,
) -> Fit:
    r"""Train a flow to draw, at one draw each, the samples that rejection accepts at K.

    Maximum likelihood on accepted draws, E_q[min(1, λr) ∇log q′]/α(λ), each weighted instead of
    rejected, beside an anchor of maximum likelihood on the data. In expectation the first is
    maximum likelihood on data weighted by min(1, 1/(λr)); but the number of draws is unlimited.

    Source: Verine et al. (2024), arXiv 2311.00460, for the accepted distribution.

    Args:
        fitted: A fit, which stays as it is.
        budget: Rejection's strength as K draws per sample, or
        accept_lam: as its constant λ, or
        target_precision: as the precision of accepted draws, by the critic.
        anchor: Share of the likelihood of the data in the loss.
        steps: The budget in steps, or
        minutes: in minutes.
        batch: Draws, and rows, in a step.
        lr: Highest learning rate.
        seed: Random seed.
        critic: log p/q at draws [batch, *event] under conditions, or None of them; by default
            the critic of the fit. One of features may work better than one of pixels.
        run: Run folder for checkpoints and log.

    Returns:
        The new flow, without a critic: the old critic has the ratio of the old flow.
    """
    critic = fitted.critic if critic is None else critic
    if critic is None:
        raise ValueError("fitted has no critic to reject by; fit with_critic=True.")
    number("anchor", anchor, at_least=0, below=1)
    knob = {"budget": budget, "accept_lam": accept_lam, "target_precision": target_precision}
    with random_numbers(seed + 5):
        lesson = _Lesson(fitted, critic, anchor, batch)
        lesson.point = operating_point(lesson.draw(DRAWS)[1].double().cpu(), **knob)
    how: dict[str, Any] = {"steps": steps, "minutes": minutes, "lr": lr, "seed": seed, "run": run}
    how["watch"] = lesson.watch
    done = train(lesson.student, lesson, **how)
    rest = fitted.held_out, fitted.trained_on, fitted.classes
    log_density = lesson.log_density(len(fitted.held_out))
    figures: dict[str, Any] = {"log_density": log_density, "gaussian": fitted.gaussian}
    return Fit(lesson.student, None, done, *rest, settings=fitted.settings, **figures)


class _Lesson:
    """The loss of a step of distillation."""

    point: OperatingPoint

    def __init__(self, fitted: Fit, critic: Callable[..., Tensor], anchor: float, batch: int):
        self.teacher, self.critic = fitted.flow, critic
        self.anchor, self.batch = anchor, batch
        self.student = copy.deepcopy(fitted.flow)
        self.student.flow.requires_grad_(True)
        self.rows, self.held_out = (
            it.to(fitted.flow.shift.device) for it in (fitted.trained_on, fitted.held_out)
        )

    def draw(self, count: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Draws of the teacher under the conditions of rows, with their log-ratio."""
        condition = self.rows.batch(count).condition
        law = self.teacher() if condition is None else self.teacher(condition)
        value, _ = draw(law, (count,) if condition is None else ())
        with torch.no_grad():
            return value, self.critic(value, condition), condition

    def __call__(self, moment: Moment) -> Tensor:
        real = self.rows.batch(self.batch)
        value, log_ratio, condition = self.draw(self.batch)
        weight = (log_ratio + math.log(self.point.accept_lam)).clamp(max=0).exp()
        given = real.condition, condition
        laws = [self.student() if it is None else self.student(it) for it in given]
        likelihood = laws[0].log_prob(real.values).mean()
        accepted = (self.point.budget * weight * laws[1].log_prob(value)).mean()
        moment.log(accepted=-accepted, likelihood=likelihood)
        return -self.anchor * likelihood - (1 - self.anchor) * accepted

    def watch(self, moment: Moment) -> None:
        """Log the held-out likelihood, which selects nothing."""
        moment.log(held_out=self.log_density(BATCH).value)

    @torch.no_grad()
    def log_density(self, count: int) -> Mean:
        with random_numbers(0):  # the same noise every time
            rows = self.held_out.rows(torch.arange(min(len(self.held_out), count))).spread()
        law = self.student() if rows.condition is None else self.student(rows.condition)
        return mean(law.log_prob(rows.values).double().cpu())

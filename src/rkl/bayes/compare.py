"""A table of the act and every other common estimate, with their excess risks."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from rkl.bayes.answer import Answer, elements
from rkl.bayes.diagnostics import mean_of, nan_where
from rkl.bayes.families import Natural
from rkl.bayes.identified import not_used
from rkl.bayes.loss.between import AnyLoss, Intrinsic, Weights, check_loss
from rkl.bayes.loss.expected import expected_seconds, needs_sample
from rkl.bayes.modes import LogDensity, modes
from rkl.bayes.problem import Problem, Variables
from rkl.bayes.regions import periodic
from rkl.bayes.solve.closed import directions_of, excess_risk
from rkl.bayes.solve.errors import Point, average_draws
from rkl.bayes.tables import ROUNDING, Table, zero_rounding
from rkl.divergences import KL, Jeffreys, JensenShannon, ReverseKL
from rkl.stats import interpolated_quantile, quantile
from rkl.tables import Cell

LossOf = Callable[[Variables], tuple[Tensor, Tensor | None]]
LOSSES: dict[str, AnyLoss] = {
    "reverse KL": ReverseKL(),
    "forward KL": KL(),
    "Jeffreys": Jeffreys(),
    "Jensen–Shannon": JensenShannon(),
    "intrinsic": Intrinsic(),
}
MAX_SECONDS = 8.0  # seconds; what takes longer is left out unless it is asked for
COLUMNS = 6  # numbers of the parameters that have a column each


def compare(
    estimate: Answer,
    answer: Callable[[Problem], Answer],
    log_posterior: LogDensity | str | None = None,
    losses: Iterable[AnyLoss] | None = None,
) -> Table:
    """Every common estimate by its parameters, and its excess risk under every loss.

    The excess over the risk of the loss's own act is a mean of paired differences between draws,
    for the two KLs and their sum by Pythagoras, with its Monte Carlo error for estimates that are
    held fixed. Of several parameters the excess is that of the distribution which they make.

    Args:
        estimate: Of the posterior and the family to compare for.
        answer: Finds the act under another loss.
        log_posterior: For the modes: a callable from theta, n draws by name, to n log densities
            with respect to the variables as they are named; or the name of a variable that holds
            the log density of every draw.
        losses: Those beside the estimate's own; by default the five of ``LOSSES``, without what
            would take more than some seconds; a note names what was left out.

    Raises:
        ValueError: ``log_posterior`` names no such variable, or gives no log densities.
        TypeError: Some of ``losses`` are none.
    """
    problem = estimate.problem
    asked = _by_name(losses)
    if estimate.divergence not in asked.values():
        asked |= {loss_name(estimate.divergence, "own"): estimate.divergence}
    estimates, notes = {}, []
    for name, divergence in asked.items():
        again = dataclasses.replace(problem, divergence=divergence)
        if divergence == estimate.divergence:
            estimates[name] = estimate
        elif losses is None and needs_sample(again.some, divergence):
            notes.append(
                f"{name} is left out: between joint distributions it takes an importance sample, "
                f"and seconds to minutes. Ask by losses=[{divergence!r}], or --losses and its name"
            )
        else:
            try:
                seconds = 0.0 if losses is not None else _expected_seconds(again)
                if seconds > MAX_SECONDS:
                    notes.append(
                        f"{name} is left out: it would take some {seconds:.0f} s or more. Ask by "
                        f"losses=[{divergence!r}], or --losses and its name"
                    )
                    continue
                estimates[name] = answer(again)
            except ValueError as error:
                notes.append(f"{name} is left out: {error}")
    candidates = {name: variables_of(one) for name, one in estimates.items()}
    judges = {name: excess_over(one) for name, one in estimates.items()}
    candidates |= {
        "posterior mean": means_of(problem),
        "posterior median": _medians(problem.theta, problem.draws.weights),
    }
    if angles := sorted(periodic(problem)):
        notes.append(
            f"{', '.join(angles)} on a circle: posterior mean and median depend on where it is cut"
        )
    densest, mode_notes = modes(problem, log_posterior)
    candidates |= densest
    unused = {name: one.act.unused for name, one in estimates.items()}
    notes += [f"{name}: {text}" for name, text in _unused_in(estimates).items()]
    return side_by_side(problem, candidates, judges, (*notes, *mode_notes), unused)


def _unused_in(estimates: Mapping[str, Answer]) -> dict[str, str]:
    texts = {name: not_used(one.act.unused, one.labels) for name, one in estimates.items()}
    if len(set(texts.values())) == 1:
        text = next(iter(texts.values()))
        return {"every act": text} if text else {}
    return {name: text for name, text in texts.items() if text}


def _expected_seconds(problem: Problem) -> float:
    if problem.weights is not None:
        return 0.0
    draws = problem.draws.chains * problem.draws.draws
    return expected_seconds(problem.some, problem.divergence, draws)


def variables_of(estimate: Answer) -> Variables:
    """The variables of the posterior that the reported distribution is made of."""
    return dict(estimate.act.point)


def _by_name(losses: Iterable[AnyLoss] | None) -> dict[str, AnyLoss]:
    if losses is None:
        return dict(LOSSES)
    if isinstance(losses, str) or not isinstance(losses, Iterable):
        raise TypeError(f"losses must be a list such as [rkl.JensenShannon()]; got {losses!r}.")
    given = list(losses)
    for divergence in given:
        check_loss(divergence)
    return {loss_name(divergence, str(divergence)): divergence for divergence in given}


def loss_name(divergence: AnyLoss, other: str) -> str:
    """The name of one of ``LOSSES`` in words; ``other`` for any other loss."""
    return next((name for name, known in LOSSES.items() if known == divergence), other)


def excess_over(estimate: Answer) -> LossOf:
    """The excess risk [*batch] over that of the act, and its error where it has one."""
    problem, act = estimate.problem, variables_of(estimate)
    if problem.weights is not None:
        return _exact_excess(estimate, problem.weights, act)
    least, loss = problem.losses(act), problem.loss

    def law(variables: Variables):
        return loss.laws.of({name: x[None] for name, x in variables.items()})

    def excess(variables: Variables):
        difference = mean_of(problem.losses(variables) - least, problem.draws)
        error = problem.sampling_error(loss, law(variables), law(act))
        return zero_rounding(difference.value), zero_rounding(difference.error.hypot(error))

    return excess


def _exact_excess(estimate: Answer, weights: Weights, act: Variables) -> LossOf:
    """Excess risk by Pythagoras, exact for these draws; its error by the shifts of batches."""
    problem = estimate.problem
    averages = average_draws(problem, directions_of(weights))
    unsure = _without_error(estimate)

    def natural(variables: Variables) -> Natural:
        law = {name: x[None] for name, x in variables.items()}
        return problem.natural(averages.family, law)

    own_natural = natural(act)

    def excess(variables: Variables):
        t = natural(variables)

        def outputs(at: Point) -> dict[str, Tensor]:
            measure = excess_risk(averages, at, weights)
            value = measure(t) - measure(own_natural)  # which have an axis in place of the lead
            return {"": problem.total(value if at is not averages.here else value[0])}

        value, error = averages.with_errors(outputs, not problem.structure.joint)[""]
        error = torch.where(value.abs() < ROUNDING, 0.0, nan_where(error, unsure))
        return zero_rounding(value), error

    return excess


def _without_error(estimate: Answer) -> Tensor:
    """Mask [*batch] of members whose act has no error, so that no excess over it has one."""
    batch, mask = estimate.problem.batch, torch.zeros(estimate.problem.batch, dtype=torch.bool)
    for name in estimate.problem.model.names:
        # of these the loss has no slope, and what has no estimate needs no error
        free = (estimate.act.unused, estimate.act.combined)
        lost = estimate.act.error[name].isnan()
        for masks in free:
            lost = lost & ~masks[name] if name in masks else lost
        if lost.shape[: len(batch)] == batch:
            mask = mask | lost.reshape(*batch, -1).any(-1)
        else:
            mask = mask | lost.any()
    return mask


def means_of(problem: Problem) -> Variables:
    """The posterior mean of every variable."""
    weights = problem.draws.weights
    if weights is None:
        return {name: x.mean(0) for name, x in problem.theta.items()}
    return {name: torch.tensordot(weights.flatten(), x, 1) for name, x in problem.theta.items()}


def _medians(theta: Variables, weights: Tensor | None) -> Variables:
    if weights is None:
        return {
            name: interpolated_quantile(x.reshape(len(x), -1), 0.5).reshape(x.shape[1:])
            for name, x in theta.items()
        }
    return {name: quantile(x, 0.5, weights.flatten()) for name, x in theta.items()}


def side_by_side(
    problem: Problem,
    candidates: dict[str, Variables],
    judges: dict[str, LossOf],
    notes: tuple[str, ...] = (),
    unused: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> Table:
    """One row for each estimate, and for each member of the batch.

    Args:
        problem: What was asked.
        candidates: By name, the variables of every estimate.
        judges: By name, the excess over the act of a loss.
        notes: Below the table.
        unused: By the name of an act, masks of the numbers that it does not depend on. What no
            act depends on has no column.
    """
    batch = problem.batch
    labels = elements("", batch, problem.batch_axes) if batch else [""]
    first = next(iter(candidates.values()))
    masks = unused or {}
    shown_acts = {
        name: _nan_where_unused(at, masks.get(name, {})) for name, at in candidates.items()
    }
    parts = {name: _parts(problem, name, x) for name, x in first.items()}
    columns_used = {name: _columns_used(name, first[name], masks, batch) for name in first}
    wide = sum(map(sum, columns_used.values())) > COLUMNS
    shown = {} if wide else parts
    columns = [
        "estimate",
        *(
            k
            for name, labels in shown.items()
            for k in itertools.compress(labels, columns_used[name])
        ),
    ]
    columns += [f"excess {name} (nats)" for name in judges]
    by_estimate: list[list[tuple[Cell, ...]]] = []
    for name, at in candidates.items():
        if problem.is_law(at):
            excess = [_cells(judge(at), batch) for judge in judges.values()]
        else:
            excess = [[None] * len(labels)] * len(judges)
            names = ", ".join(problem.whole)
            notes = (*notes, f"{name} has no excess: {names} must be whole, and is not there")
        numbers = [_numbers(shown_acts[name][key], batch, columns_used[key]) for key in shown]
        by_estimate.append([])
        for i, label in enumerate(labels):
            row_numbers = [x for each in numbers for x in each[i]]
            row = (f"{name} {label}".strip(), *row_numbers, *(cells[i] for cells in excess))
            by_estimate[-1].append(row)
    # what is compared stands together: all estimates of a member, then those of the next
    rows = [rows[i] for i in range(len(labels)) for rows in by_estimate]
    wide_note = ("there are too many parameters for a column each: see .acts",) if wide else ()
    title = f"Estimates of {problem.model.text} and their excess risks"
    return Table(title, columns, rows, (*notes, *wide_note), shown_acts)


def _nan_where_unused(at: Variables, unused: Mapping[str, Tensor]) -> Variables:
    return {
        name: x.masked_fill(unused[name], torch.nan) if name in unused else x
        for name, x in at.items()
    }


def _columns_used(
    name: str, x: Tensor, masks: Mapping[str, Mapping[str, Tensor]], batch: torch.Size
) -> list[bool]:
    used = torch.full(x.shape, not masks)
    for unused in masks.values():
        used = used | ~unused.get(name, torch.zeros(x.shape, dtype=torch.bool))
    rows = used if _by_member(used, batch) else used.expand(*batch, *used.shape)
    return rows.reshape(batch.numel(), -1).any(0).tolist()


def _parts(problem: Problem, name: str, x: Tensor) -> list[str]:
    lead = len(problem.batch) if _by_member(x, problem.batch) else 0
    return elements(name, x.shape[lead:], problem.axes(name)[lead:])


def _by_member(x: Tensor, batch: torch.Size) -> bool:
    return x.shape[: len(batch)] == batch


def _numbers(x: Tensor, batch: torch.Size, mask: list[bool]) -> list[list[float | None]]:
    """For each member, the numbers selected by a mask; None where there is no estimate."""
    rows = x if _by_member(x, batch) else x.expand(*batch, *x.shape)
    rows = rows.reshape(batch.numel(), -1)[:, torch.tensor(mask)]
    return [[None if math.isnan(value) else value for value in row] for row in rows.tolist()]


def _cells(excess: tuple[Tensor, Tensor | None], batch: torch.Size) -> list[Cell]:
    value, error = excess
    values = value.expand(batch).flatten().tolist()
    if error is None:
        return values
    return list(zip(values, error.expand(batch).flatten().tolist(), strict=True))

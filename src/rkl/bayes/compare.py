"""The act beside every other common estimate, and what each of them loses."""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from rkl.bayes.acts import answer
from rkl.bayes.averages import mean_of
from rkl.bayes.closed import Weights
from rkl.bayes.estimate import Estimate, elements
from rkl.bayes.losses import AnyLoss, Intrinsic
from rkl.bayes.modes import LogDensity, modes
from rkl.bayes.pythagoras import averages, directions_of, towards
from rkl.bayes.questions import Question, Variables
from rkl.bayes.tables import Cell, Table
from rkl.divergences import KL, Jeffreys, JensenShannon, ReverseKL

LossOf = Callable[[Variables], tuple[Tensor, Tensor | None]]
LOSSES: dict[str, AnyLoss] = {
    "reverse KL": ReverseKL(),
    "forward KL": KL(),
    "Jeffreys": Jeffreys(),
    "Jensen–Shannon": JensenShannon(),
    "intrinsic": Intrinsic(),
}
COLUMNS = 6  # numbers of the parameters that have a column each


def compare(estimate: Estimate, log_posterior: LogDensity | str | None = None) -> Table:
    """Every common estimate by its parameters, and its excess risk under every loss.

    The excess over the risk of the loss's own act is exact for the two KLs and their sum, by
    Pythagoras; elsewhere it is the mean of the paired differences between draws, with its Monte
    Carlo error. Of several parameters the excess is that of the law which they make.

    Args:
        estimate: Of the posterior and the family to compare for.
        log_posterior: For the modes: a callable from theta, n draws by name, to n log densities
            with respect to the variables as they are named; or the name of a variable that holds
            the log density of every draw.

    Raises:
        ValueError: ``log_posterior`` names no such variable, or gives no log densities.
    """
    question = estimate.question
    losses = LOSSES | (
        {} if estimate.divergence in LOSSES.values() else {"own": estimate.divergence}
    )
    candidates, notes = {}, []
    for name, divergence in losses.items():
        if divergence == estimate.divergence:
            candidates[name] = _variables(estimate)
            continue
        try:
            candidates[name] = _variables(
                answer(dataclasses.replace(question, divergence=divergence))
            )
        except ValueError as error:
            notes.append(f"{name} is left out: {error}")
    judges = {name: _excess(question, losses[name], act) for name, act in candidates.items()}
    candidates |= {"posterior mean": means_of(question), "posterior median": _medians(question)}
    found, told = modes(question, log_posterior)
    candidates |= found
    return _table(question, candidates, judges, (*notes, *told))


def _variables(estimate: Estimate) -> Variables:
    return {name: estimate.act[name] for name in estimate.question.model.names}


def _excess(question: Question, divergence: AnyLoss, act: Variables) -> LossOf:
    """The excess risk [*batch] over that of the act, and its error where it has one."""
    again = dataclasses.replace(question, divergence=divergence)
    if again.weights is not None:
        return _exact_excess(again, again.weights, act)
    loss = question.expected(divergence)
    least = question.losses(loss, act)

    def paired(variables: Variables):
        found = mean_of(question.losses(loss, variables) - least, question.draws)
        return found.value, found.error

    return paired


def _exact_excess(question: Question, weights: Weights, act: Variables) -> LossOf:
    known = averages(question, directions_of(weights))
    measure = towards(known, known.here, weights)

    def of(variables: Variables) -> Tensor:
        law = {name: x[None] for name, x in variables.items()}
        natural = question.natural(known.family, law)
        return question.total(measure(tuple(x[0] for x in natural)))

    return lambda variables: (of(variables) - of(act), None)


def means_of(question: Question) -> Variables:
    """The posterior mean of every variable."""
    weights = question.draws.weights
    if weights is None:
        return {name: x.mean(0) for name, x in question.theta.items()}
    return {name: torch.tensordot(weights.flatten(), x, 1) for name, x in question.theta.items()}


def _medians(question: Question) -> Variables:
    """The median of every number; of weighted draws, where half of the weight is reached."""
    weights = question.draws.weights
    if weights is None:
        return {name: x.quantile(0.5, 0) for name, x in question.theta.items()}
    found = {}
    for name, x in question.theta.items():
        ordered = x.sort(0)
        share = weights.flatten()[ordered.indices].cumsum(0)
        place = (share < 0.5 * (1 - 1e-12)).sum(0, keepdim=True)
        found[name] = ordered.values.gather(0, place)[0]
    return found


def _table(
    question: Question,
    candidates: dict[str, Variables],
    judges: dict[str, LossOf],
    notes: tuple[str, ...],
) -> Table:
    """One row for each estimate, and for each member of the batch."""
    batch = question.batch
    labels = elements("", batch) if batch else [""]
    first = next(iter(candidates.values()))
    parts = {
        name: elements(name, x.shape[len(batch) :] if _by_member(x, batch) else x.shape)
        for name, x in first.items()
    }
    wide = sum(map(len, parts.values())) > COLUMNS
    shown = {} if wide else parts
    columns = ["estimate", *(label for names in shown.values() for label in names)]
    columns += [f"excess {name} (nats)" for name in judges]
    rows: list[tuple[Cell, ...]] = []
    for name, at in candidates.items():
        excess = [_cells(judge(at), batch) for judge in judges.values()]
        numbers = [_numbers(at[key], batch) for key in shown]
        for i, label in enumerate(labels):
            own = [x for each in numbers for x in each[i]]
            rows.append((f"{name} {label}".strip(), *own, *(cells[i] for cells in excess)))
    told = ("there are too many parameters for a column each: see .acts",) if wide else ()
    title = f"Estimates of {question.model.text}, and what each loses beside the best"
    return Table(title, columns, rows, (*notes, *told), candidates)


def _by_member(x: Tensor, batch: torch.Size) -> bool:
    return x.shape[: len(batch)] == batch


def _numbers(x: Tensor, batch: torch.Size) -> list[list[float]]:
    """For each member, its numbers."""
    rows = x if _by_member(x, batch) else x.expand(*batch, *x.shape)
    return rows.reshape(batch.numel(), -1).tolist()


def _cells(excess: tuple[Tensor, Tensor | None], batch: torch.Size) -> list[Cell]:
    value, error = excess
    values = value.expand(batch).flatten().tolist()
    if error is None:
        return values
    return list(zip(values, error.expand(batch).flatten().tolist(), strict=True))

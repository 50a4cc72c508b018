"""The flow, the critic and the operating point of a run."""

import math
import os
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from rkl.fit.result import Reached
from rkl.fit.settings import FitSettings
from rkl.flows.architectures.mixture import MixtureStart, with_state
from rkl.flows.critic import ScaledCritic
from rkl.flows.precision import single_precision
from rkl.flows.rows import Data
from rkl.flows.runs import WEIGHTS
from rkl.flows.standardise import Standardised, Units
from rkl.flows.training import load_state
from rkl.importing import only
from rkl.runs import Run
from rkl.runs.integrity import check_finite
from rkl.runs.typed import settings_from


@single_precision()
def load_run(path: str | os.PathLike, *, allow: Collection[str] = ()) -> nn.Module:
    """The flow of a run, in the user's units: ``flow()`` has ``log_prob`` and ``sample``.

    Args:
        path: The folder of the run.
        allow: Names that its ``run.json`` may import, each "module:name".
    """
    return load_fit(path, allow=allow)[0]


@single_precision()
def load_critic(path: str | os.PathLike, *, allow: Collection[str] = ()) -> ScaledCritic:
    """The critic of a run: log p/q of events in the user's units.

    Args:
        path: The folder of the run.
        allow: Names that its ``run.json`` may import, each "module:name".

    Raises:
        ValueError: The run has none.
    """
    critic = load_fit(path, allow=allow)[1]
    if critic is None:
        raise ValueError(
            f"path: {path} has no critic: neither maximum likelihood nor distilling needs one. "
            "Fit with --critic."
        )
    return critic


def settings_of(run: Run, *, allow: Collection[str] = ()) -> FitSettings:
    """Settings of the fit of a run; only names in ``allow`` are imported for them."""
    source = run.path / "run.json"
    with only(allow, source=source):
        return settings_from(FitSettings, run.settings, source)


def load_fit(
    path: str | os.PathLike, *, allow: Collection[str] = ()
) -> tuple[Standardised, ScaledCritic | None, tuple[str, ...]]:
    """The flow of a run fitted to data, its critic if it has one, and its classes."""
    run = Run.open(path)
    if run.kind != "fit":
        raise ValueError(f"path: {path} is a run of kind {run.kind!r}; expected 'fit'.")
    if not (run.path / WEIGHTS).exists():
        raise FileNotFoundError(
            f"path: {path} has no {WEIGHTS}: the run was not finished; what was "
            "fitted in Python is written by fitted.save(folder)."
        )
    run.check_files(WEIGHTS)
    state = load_state(run.path / WEIGHTS)
    settings = settings_of(run, allow=allow)
    units, classes = Units.of_state(state["units"]), tuple(state["classes"])
    shape = tuple(units.shift.shape)
    built = settings.architecture.build(shape, len(classes))
    inner = with_state(built, state["flow"], state.get("within"))
    flow = Standardised(inner, units).requires_grad_(False)
    start = inner.named_parts() if isinstance(inner, MixtureStart) else ()
    check_finite([*flow.named_parameters(), *start], run.path / WEIGHTS, "flow")
    if state["critic"] is None:
        return flow, None, classes
    chosen = replace(settings.method.critic, hidden=tuple(state["critic_hidden"]))
    ratio = chosen.build(shape, len(classes), state["bound"])
    critic = ScaledCritic(ratio.requires_grad_(False), units)
    critic.ratio.load_state_dict(state["critic"])
    check_finite(critic.named_parameters(), run.path / WEIGHTS, "critic")
    return flow, critic, classes


@dataclass(frozen=True)
class HeldPoint:
    """The operating point of a run.

    Attributes:
        log_lam: The logarithm of rejection's constant, of the critic's ratio as it is.
        budget: Draws per sample.
        judged: Budgets that the fit measured, each with an upper bound of the precision, and its
            standard error.
    """

    log_lam: float
    budget: float
    judged: tuple[tuple[float, float, float], ...]


def kept_point(reached: Reached) -> dict[str, Any]:
    """The record of an operating point in a run."""
    log_lam = math.log(reached.point.accept_lam) - reached.log_normaliser
    judged = [list(it) for it in reached.judged]
    return {"log_lam": log_lam, "budget": reached.point.budget, "judged": judged}


def load_point(path: str | os.PathLike) -> HeldPoint | None:
    """The operating point of a run's fit; None without one."""
    state = load_state(Path(path) / WEIGHTS).get("reached")
    if state is None:
        return None
    judged = tuple(tuple(it) for it in state["judged"])
    return HeldPoint(state["log_lam"], state["budget"], judged)


def rows_of(data: Data) -> list[bytes]:
    """Rows of the data, in the form whose digests a run stores: the same in single and double.

    A row beyond single precision is taken as it is.
    """
    single = data.values.float()
    rows = zip(
        single.numpy(), data.values.numpy(), single.isfinite().flatten(1).all(1), strict=True
    )
    return [(one if finite else other).tobytes() for one, other, finite in rows]


def count_fitted(run: Run, data: Data) -> int:
    """Number of rows that a run was fitted to; earlier runs stored the digests of whole rows."""
    whole = [row.tobytes() for row in data.values.numpy()]
    return max(run.count_seen(rows_of(data)), run.count_seen(whole))

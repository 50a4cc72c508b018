"""``rkl fit --start-from RUN --distil-budget K``: rejection of a run's flow, trained into it."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rkl import checks
from rkl.fit.load import count_fitted, load_critic, load_run, settings_of
from rkl.fit.operating import distil_rejection
from rkl.fit.result import Fit
from rkl.fit.settings import FitSettings
from rkl.flows.rows import Data
from rkl.flows.training import Training
from rkl.importing import names_in
from rkl.runs import Run

SAME = "data", "flow", "labels", "dequantise", "held_out", "seed"  # they say which rows were seen


def distillation(settings: FitSettings, data: Data) -> Callable[..., Fit]:
    """A function that trains the flow of ``settings.start_from`` to draw its accepted samples.

    Raises:
        ValueError: That run has no critic, or was fitted to other rows.
    """
    fitted = _fit_of(settings, data)
    how: dict[str, Any] = {
        "batch": settings.batch,
        "lr": settings.method.rate(len(fitted.trained_on)),
        "seed": settings.seed,
    }
    return partial(distil_rejection, fitted, budget=settings.distil_budget, **how)


def _fit_of(settings: FitSettings, data: Data) -> Fit:
    path: Any = settings.start_from
    run = Run.open(path)
    if run.kind != "fit":
        raise ValueError(f"start_from: {path} holds no flow that was fitted to data.")
    allow = names_in(settings.flow, settings.divergence)  # which whoever calls has said
    flow, critic = load_run(path, allow=allow), load_critic(path, allow=allow)
    earlier = settings_of(run, allow=allow)
    for name in SAME:
        was, now = getattr(earlier, name), getattr(settings, name)
        if (now.resolve() if isinstance(now, Path) else now) != was:
            raise ValueError(f"start_from: {name} must be that of {path}, {was}; got {now}.")
    trained_on, held_out = data.split(earlier.held_out, earlier.seed)
    if count_fitted(run, trained_on) < len(trained_on):
        raise ValueError(f"start_from: {settings.data} no longer holds the rows of {path}.")
    device, untrained = checks.device(settings.device), Training([], 0, 0.0, None, None, None)
    scaled: Any = flow.to(device)
    rows = held_out, trained_on, data.classes
    return Fit(scaled, critic.to(device), untrained, *rows)

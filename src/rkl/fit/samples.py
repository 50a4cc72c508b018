"""``rkl sample`` of a flow fitted to data."""

import math
import os
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rkl import checks
from rkl.fit.load import HeldPoint, load_critic, load_fit, load_point
from rkl.fit.operating import draw_kept
from rkl.fit.rejection import reject
from rkl.fit.settings import SampleSettings
from rkl.flows.architectures import latent
from rkl.flows.critic import ScaledCritic
from rkl.flows.files import write_samples
from rkl.flows.precision import single_precision
from rkl.flows.runs import (
    check_samples,
)
from rkl.randomness import random_numbers
from rkl.runs import Run, check_out_file
from rkl.tables import with_error

FAR = 20.0  # standard deviations, beyond which a sample is no likely one of the data
BATCH = 10_000  # samples made at a time


@single_precision()
def sample_run(
    path: str | os.PathLike,
    settings: SampleSettings,
    *,
    allow: Collection[str] = (),
    overwrite: bool = False,
) -> str:
    """Draw samples of the flow of a run and write them, in the user's units.

    Args:
        path: The folder of the run.
        settings: Number of samples, and trade-off.
        allow: Names that its ``run.json`` may import, each "module:name".
        overwrite: Replace a file there.

    Returns:
        A line with the file and the cost in draws.

    Raises:
        FileExistsError: There is such a file, or it is one of a run.
    """
    check_out_file(settings.out, overwrite=overwrite)
    flow, _critic, classes = load_fit(path, allow=allow)
    if settings.out.suffix not in (".npy", ".csv"):
        raise ValueError(f"out must end in .npy or .csv; got {settings.out}.")
    condition = _condition(settings.condition, classes)
    device = checks.device(settings.device)
    flow.to(device)
    condition = None if condition is None else condition.to(device)
    with random_numbers(settings.seed), torch.no_grad():
        bound = math.inf if settings.truncation is None else settings.truncation
        law = flow() if condition is None else flow(condition)
        law = latent(law, settings.latent_temperature, bound)
        point = None if _changed_latents(settings) else load_point(path)
        chosen = settings.budget is not None or settings.target_precision is not None
        if not chosen and point is not None:
            critic = load_critic(path, allow=allow).to(device)
            samples, cost = _at_point(law, critic, condition, settings.n, point)
        elif not chosen:
            counts = [min(BATCH, settings.n - i) for i in range(0, settings.n, BATCH)]
            samples, cost = torch.cat([law.sample(torch.Size([it])) for it in counts]), ""
        else:
            _refuse_changed_latents(settings)
            wanted = settings
            if point is not None and settings.target_precision is not None:
                wanted = _judged_budget(settings, point)
            samples, cost = _rejection_sample(
                law, load_critic(path, allow=allow), condition, wanted
            )
            if wanted.target_precision is not None:
                cost += (
                    "; the precision is the critic's own claim, which nothing has judged: fit "
                    "with --target-precision"
                )
    columns = (Run.open(path).record["data"] or {}).get("columns", ())
    check_samples(samples)
    away = flow.units.spread_of(samples).abs().flatten(1).amax(1) > FAR
    if away.any():
        cost += (
            f"; {int(away.sum()):,} of them lie more than {FAR:g} standard deviations from the "
            "mean of the data"
        )
    samples = flow.to_levels(samples) if settings.levels else samples
    write_samples(settings.out, samples.cpu().numpy(), columns)
    return f"{settings.n:,} samples in {settings.out}{cost}"


def _condition(named: str | None, classes: tuple[str, ...]) -> Tensor | None:
    if not classes:
        if named is not None:
            raise ValueError(f"condition: the flow has no classes; got {named!r}.")
        return None
    if named is None:
        raise ValueError(
            f"condition must say which class to draw, one of {', '.join(classes)}: the flow was "
            f"fitted with labels. Say --condition {classes[0]}."
        )
    if named not in classes:
        raise ValueError(f"condition must be one of {', '.join(classes)}; got {named!r}.")
    return torch.nn.functional.one_hot(torch.tensor(classes.index(named)), len(classes)).float()


def _at_point(
    law: Any,
    critic: ScaledCritic,
    condition: Tensor | None,
    count: int,
    operating_point: HeldPoint,
) -> tuple[Tensor, str]:
    def log_ratio(value: Tensor, _: Tensor | None) -> Tensor:
        return critic(value, condition)

    parts, made = [], 0
    for start in range(0, count, BATCH):
        size = min(BATCH, count - start)
        part, cost = draw_kept(law, log_ratio, operating_point.log_lam, size)
        parts, made = [*parts, part], made + cost
    words = (
        f", {made / count:.3g} draws each, at the operating point of the fit (--budget 1 for none)"
    )
    return torch.cat(parts), words


def _judged_budget(settings: SampleSettings, point: HeldPoint) -> SampleSettings:
    wanted = settings.target_precision
    for budget, value, error in sorted(point.judged):
        if wanted is not None and value - 2 * error >= wanted:
            return replace(settings, target_precision=None, budget=budget)
    if not point.judged:
        raise ValueError(
            f"target_precision={wanted} cannot be drawn at: the minutes of the fit ended before "
            "its critics had judged any budget. Fit with more --minutes, or say --budget."
        )
    best = max(point.judged, key=lambda it: it[1])
    raise ValueError(
        f"target_precision={wanted} was judged at no budget of the fit; the best was at most "
        f"{with_error(*best[1:3])}, at budget={best[0]:.3g}. Fit with --target-precision "
        f"{wanted}, or say --budget."
    )


def _changed_latents(settings: SampleSettings) -> bool:
    return settings.latent_temperature != 1 or settings.truncation is not None


def _refuse_changed_latents(settings: SampleSettings) -> None:
    if _changed_latents(settings):
        raise ValueError(
            "budget and target_precision go with the flow's own latents, which the critic knows; "
            f"got latent_temperature={settings.latent_temperature}, "
            f"truncation={settings.truncation}."
        )


def _rejection_sample(
    law: Any, critic: ScaledCritic, condition: Tensor | None, settings: SampleSettings
) -> tuple[Tensor, str]:
    critic.to(settings.device)
    accepted_samples = reject(
        law,
        lambda value: critic(value, condition),
        n=settings.n,
        budget=settings.budget,
        target_precision=settings.target_precision,
    )
    accepted = with_error(*accepted_samples.acceptance)
    return (
        accepted_samples.samples,
        f", {accepted_samples.cost:.3g} draws each (accepted: {accepted})",
    )

"""Evidence and draws of a target without a flow: particles cooled from a broad distribution.

Coordinates with bounds are mapped to the line. A pilot population picks the β, such that weights
stay nearly equal, and the size of the moves. Islands of particles then follow this fixed plan,
which makes the Z of each island unbiased.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from rkl.checks import LARGEST_COUNT, integer, number
from rkl.randomness import random_numbers
from rkl.sample.lost_modes import LostMode, find_lost_mode
from rkl.sample.mcmc.kernels import kernel_of_angles
from rkl.sample.targets.base import Target, check_condition, without_bounds
from rkl.sample.targets.domains import Chart
from rkl.sample.tempering import Rung, Sampler, log_mean
from rkl.stats import Mean, resample
from rkl.tables import Table, table_of

WIDTH = 100.0  # standard deviation of the broad distribution on the line
NARROWER = 10.0  # factor by which it is narrower for the other half of the islands
MIN_ACCEPTED = 0.05  # share of moves below which particles do not move enough
SHOWN = 4  # coordinates of a place that are printed
MAX_ERROR = 0.5  # nats of log Z above which islands disagree
MAX_GAP, MIN_GAP_ERRORS = 0.5, 2.0  # nats and errors by which halves of the islands likely differ
APART = 4.0  # errors of a normal distribution by which they differ for sure
DRIFT = 20  # moves at β = 1 after which particles are as before, if they follow the target
MAX_DRIFT = 4.0  # errors of a normal distribution by which they may differ


@dataclass(frozen=True)
class Evidence:
    r"""Log Z of a target, and draws of it, from particles without a flow.

    Attributes:
        log_z: In nats, with the standard error that islands give, [rows].
        x: Draws of equal weight, [rows, islands, particles, \*event], of islands of equal weight.
        by_island: Log Z of each island in nats, [rows, islands]; the mean of Z is unbiased.
        accepted: Least share of the moves that were accepted at any β, [rows].
        rungs: Number of β.
        width: Standard deviation of the broad distribution on the line.
        condition: The conditions, one a row.
        doubts: Reasons for each row not to trust its figures, a sentence each.
    """

    log_z: Mean
    x: Float[Tensor, "rows islands particles *event"]
    by_island: Float[Tensor, "rows islands"]
    accepted: Float[Tensor, " rows"]
    rungs: int
    width: float
    condition: Float[Tensor, "rows conditions"]
    doubts: tuple[tuple[str, ...], ...]

    def table(self) -> Table:
        """Log Z under each condition, with the reasons not to trust it."""
        figures = {"log Z (nats)": self.log_z, "least share of accepted moves": self.accepted}
        islands, particles = self.x.shape[1:3]
        title = f"{islands} islands of {particles:,} particles, {self.rungs} β"
        notes = [f"{i}: {doubt}" for i, doubts in enumerate(self.doubts) for doubt in doubts]
        return table_of(title, figures, notes, counted="condition")

    def __str__(self) -> str:
        return str(self.table())

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


@torch.no_grad()
def evidence(
    target: Target,
    condition: Float[Tensor, "rows conditions"] | None = None,
    *,
    particles: int = 512,
    islands: int = 8,
    width: float = WIDTH,
    sweeps: int = 1,
    seed: int = 0,
) -> Evidence:
    r"""Log Z of a target under each condition, and draws, by sequential Monte Carlo.

    Particles move by Hamiltonian Monte Carlo where the log-density has a gradient, else by a
    random walk; angles at a temperature move by the kernel of their target, those of XY by a heat
    bath. They find modes that are not much further from 0 than ``width``, each in proportion to
    its mass as long as modes come apart one after another.

    Source: Del Moral, Doucet and Jasra (2006), J. R. Statist. Soc. B 68, 411; Neal (2011), arXiv
    1206.1901, for the moves.

    On the line half of the islands begin from a distribution ten times narrower. If their Z is
    smaller, the others count alone; if it is larger, that is one of the ``doubts``. Others are
    islands that differ, moves that are hardly ever accepted, particles that drift in further moves
    under the target itself, and a mode that some particle met and all have lost: from the highest
    and the steepest points of the way maxima are climbed, and the mass about them is compared with
    the share of particles there (:mod:`rkl.sample.lost_modes`; up to 64 coordinates, and not with
    the kernel of a target). A mode so narrow or so far that no point of the way was uphill to it
    is not detected.

    Args:
        target: The density, up to log Z of each condition; of coordinates with bounds too, which
            are mapped to the line, log Z being that over the coordinates of the target.
        condition: The conditions, one a row; of a target without conditions none.
        particles: Particles of an island, 16 at least.
        islands: Independent populations, 4 at least.
        width: Standard deviation of the broad distribution about 0, on the line.
        sweeps: Moves at each β.
        seed: Random seed.

    Returns:
        log Z with its error, and the particles.

    Raises:
        ValueError: An argument does not fit, or the log-density is not finite anywhere.

    >>> from rkl.sample import MoG8
    >>> found = evidence(MoG8(), torch.tensor([[0.5]]), particles=128, islands=4)
    >>> abs(found.log_z.value.item()) < 4.5 * found.log_z.error.item()  # it is normalised
    True
    """
    condition = check_condition(target, condition)
    condition = condition[None] if condition.ndim == 1 else condition
    if condition.ndim != 2 or not len(condition):
        raise ValueError(
            f"condition must be [rows, {len(target.conditions)}]; got {list(condition.shape)}."
        )
    integer("particles", particles, at_least=16, at_most=LARGEST_COUNT)
    integer("islands", islands, at_least=4, at_most=LARGEST_COUNT)
    integer("sweeps", sweeps, at_least=1, at_most=LARGEST_COUNT)
    number("width", width, above=0)
    chart, target = target.chart, without_bounds(target)
    circle = bool(target.chart.circle.all())
    sizes = (
        [(width, islands)]
        if circle
        else [(width, -(-islands // 2)), (width / NARROWER, islands // 2)]
    )
    with random_numbers(seed):
        paths, samplers = [], []
        for wide, count in sizes:
            sampler = Sampler(target, condition, wide, sweeps, kernel_of_angles(target))
            samplers.append(sampler)
            pilot = sampler.run(1, min(4, islands) * particles)
            paths.append(_follow(sampler, count, particles, pilot.plan))
        return _join(samplers[-1], width, paths, chart)


class _Path(NamedTuple):
    log_z: Float[Tensor, "rows islands"]
    x: Float[Tensor, "rows islands particles coordinates"]
    candidates: Float[Tensor, "rows candidates coordinates"]
    accepted: Float[Tensor, " rows"]
    change: Float[Tensor, "rows islands"]  # of the mean log-density as they move on at β = 1
    plan: list[Rung]


def _follow(sampler: Sampler, islands: int, particles: int, plan: list[Rung]) -> _Path:
    cooled = sampler.run(islands, particles, plan)
    points = cooled.points
    for _ in range(DRIFT):
        points, _ = sampler.move(points, plan[-1])
    change = points.log_p.mean(2) - cooled.points.log_p.mean(2)
    log_z, candidates, accepted = cooled.log_z[-1], cooled.candidates, cooled.accepted
    return _Path(log_z, points.x, candidates, accepted, change, plan)


def _join(sampler: Sampler, width: float, paths: list[_Path], chart: Chart) -> Evidence:
    """The findings of both widths, in the coordinates of a chart."""
    target, condition = sampler.target, sampler.asked
    each = [log_mean(it.log_z) for it in paths]
    rows, doubts, log_z, error, x = len(condition), [], [], [], []
    for row in range(rows):
        chosen, why = list(range(len(paths))), []
        if len(paths) == 2:
            (one, other), (a, b) = (
                [getattr(it, k)[row] for it in each] for k in ("value", "error")
            )
            gap, errors = (one - other).item(), torch.hypot(a, b).item()
            sure = normal_errors(abs(gap) / errors, paths[1].log_z.shape[1] * 2 - 2) > APART
            likely = abs(gap) > MAX_GAP and abs(gap) > MIN_GAP_ERRORS * errors
            if sure or likely:
                chosen = [0] if gap > 0 else [1] if sure else chosen
                if gap < 0:
                    why.append(
                        f"particles of N(0, {width:g}²) lost what those of N(0, "
                        f"{width / NARROWER:g}²) found: log Z is {one:.4g} and {other:.4g}."
                    )
        log_z_of_row = log_mean(torch.cat([paths[k].log_z[row : row + 1] for k in chosen], 1))
        why += _doubts([paths[k] for k in chosen], row, log_z_of_row.error.item())
        log_z.append(log_z_of_row.value[0])
        error.append(log_z_of_row.error[0])
        x.append(_draws_of_equal_weight(paths, chosen, row))
        candidates = torch.cat([it.candidates[row] for it in paths])
        log_z_of = Mean(log_z_of_row.value[0], log_z_of_row.error[0])
        density = sampler.density(row)
        lost = find_lost_mode(density, candidates, x[-1], log_z_of) if len(candidates) else None
        if lost is not None:
            place = chart.to_bounded(lost.x.reshape(target.event_shape))[0]
            why.append(_lost_mode_doubt(lost, place.flatten()))
        doubts.append(tuple(why))
    least = torch.stack([it.accepted for it in paths]).amin(0)
    by_island = torch.cat([it.log_z for it in paths], 1)
    drawn = torch.stack(x).to(condition)
    drawn = chart.to_bounded(drawn.reshape(*drawn.shape[:3], *target.event_shape))[0]
    mean = Mean(torch.stack(log_z), torch.stack(error))
    rungs = sum(len(it.plan) for it in paths)
    return Evidence(mean, drawn, by_island, least, rungs, width, condition, tuple(doubts))


def _draws_of_equal_weight(paths: list[_Path], chosen: list[int], row: int) -> Tensor:
    """Particles of as many islands as there are, drawn in proportion to their Z."""
    x = torch.cat([paths[k].x[row] for k in chosen])
    log_z = torch.cat([paths[k].log_z[row] for k in chosen])
    islands, particles = sum(it.x.shape[1] for it in paths), x.shape[1]
    log_w = log_z.repeat_interleave(particles)
    places = resample(log_w, count=islands * particles)
    return x.flatten(0, 1)[places].reshape(islands, particles, -1)


def _doubts(paths: list[_Path], row: int, error: float) -> list[str]:
    sentences = []
    if not error <= MAX_ERROR:
        sentences.append(
            f"islands of particles differ: log Z has an error of {error:.2g} nats, above "
            f"{MAX_ERROR}."
        )
    accepted = min(it.accepted[row].item() for it in paths)
    if accepted < MIN_ACCEPTED:
        sentences.append(
            f"particles hardly moved: at some β a share of {accepted:.2g} of the moves was "
            f"accepted, below {MIN_ACCEPTED}."
        )
    change = torch.cat([it.change[row] for it in paths])
    drift = (change.mean().abs() / (change.std() / len(change) ** 0.5).clamp_min(1e-12)).item()
    if normal_errors(drift, len(change) - 1) > MAX_DRIFT:
        sentences.append(
            f"particles do not follow the target yet: as they move on under it, their mean "
            f"log-density changes by {drift:.1f} errors."
        )
    return sentences


def _lost_mode_doubt(lost: LostMode, x: Tensor) -> str:
    """The doubt about a mode at x that particles met on their way and have lost."""
    place = ", ".join(f"{it:.3g}" for it in x[:SHOWN].tolist()) + ", ..." * (len(x) > SHOWN)
    return (
        f"particles lost a mode that they met: about x = ({place}) the density has "
        f"{lost.share:.2g} of their Z, and {lost.particles:.2g} of the particles are there."
    )


def normal_errors(errors: float, degrees: int) -> float:
    """Errors of a normal distribution as rare as these, whose size so many degrees estimate.

    Source: Wallace (1959), Ann. Math. Statist. 30, 1121, equation 2.1.

    >>> round(normal_errors(5.0, 7), 1), round(normal_errors(5.0, 1_000), 1)
    (3.2, 5.0)
    """
    share = (8 * degrees + 1) / (8 * degrees + 3)
    return share * math.sqrt(degrees * math.log1p(errors**2 / degrees))

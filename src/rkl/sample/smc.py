r"""Evidence and draws of a target without a flow: particles cooled from a broad distribution.

    Z = Z₀ Πₖ ⟨(p/p₀)^(βₖ₊₁ − βₖ)⟩    over weighted particles of p₀^(1 − β) p^β at βₖ

The broad distribution p₀ is normal on the line and uniform on the circle; coordinates with bounds
are mapped to the line. A pilot population picks
the β, such that weights stay nearly equal, and the size of the moves. Islands of particles then
follow this plan whatever they meet, so that the Z of each island is unbiased.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from rkl.checks import number
from rkl.sample.lost_modes import MAX_SIZE, LogDensity, find_lost_mode
from rkl.sample.mcmc.kernels import check_whole, kernel_of_angles, seeded
from rkl.sample.targets.base import Kernel, Target, check_condition, without_bounds
from rkl.stats import Mean, jackknife, resample

WIDTH = 100.0  # standard deviation of the broad distribution on the line
NARROWER = 10.0  # factor by which it is narrower for the other half of the islands
EQUAL, EQUAL_BY_KERNEL = 0.95, 0.85  # effective share of particles that a step in β leaves
MIN_SHARE = 0.5  # effective share below which an island is resampled
LEAPFROGS = 5  # of a Hamiltonian move
SMALLEST = 0.05  # share of the largest step that a move may take, by chance
ACCEPTED = {"gradient": 0.65, "walk": 0.3}  # shares of moves that the pilot aims at
WALKS = 5  # moves of a random walk at each β
LOWEST = -1e30  # log-density in place of -inf, so that differences are finite
MAX_RUNGS = 5_000
MIN_ACCEPTED = 0.05  # share of moves below which particles do not move enough
SHOWN = 4  # coordinates of a place that are printed
MAX_ERROR = 0.5  # nats of log Z above which islands disagree
MAX_GAP, MIN_GAP_ERRORS = 0.5, 2.0  # nats and errors by which halves of the islands likely differ
APART = 4.0  # errors of a normal distribution by which they differ for sure
DRIFT = 20  # moves at β = 1 after which particles are as before, if they follow the target
MAX_DRIFT = 4.0  # errors of a normal distribution by which they may differ
CANDIDATES = 16  # highest particles of an island, at each β, and steepest, from which to climb


@dataclass(frozen=True)
class Evidence:
    r"""Log Z of a target, and draws of it, from particles that owe nothing to a flow.

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


class _Rung(NamedTuple):
    """What the pilot chose for one β of each row: it, the size of a step, and its scales."""

    beta: Float[Tensor, " rows"]
    step: Float[Tensor, " rows"]
    scale: Float[Tensor, "rows coordinates"]


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

    On the line half of the islands begin from a distribution ten times narrower. Where they find
    less, the others count alone; where they find more, that is one of the ``doubts``. So are
    islands that differ, moves that are hardly ever accepted, particles that drift as they move on
    under the target itself, and a mode that some particle met and all have lost: from the highest
    and the steepest points of the way maxima are climbed, and the mass about them is compared with
    the share of particles there (:mod:`rkl.sample.lost_modes`; up to 64 coordinates, and not with
    the kernel of a target). A mode so narrow or so far that no point of the way was uphill to it
    remains unseen.

    Args:
        target: The density, up to log Z of each condition; of coordinates with bounds too, which
            are mapped to the line, log Z being that over the coordinates of the target.
        condition: The conditions, one a row; of a target without conditions none.
        particles: Particles of an island, 16 at least.
        islands: Populations that have nothing to do with each other, 4 at least.
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
    check_whole("particles", particles, 16)
    check_whole("islands", islands, 4)
    check_whole("sweeps", sweeps, 1)
    number("width", width, above=0)
    if target.chart.bounded:
        how: dict[str, Any] = {"particles": particles, "islands": islands, "width": width}
        found = evidence(without_bounds(target), condition, sweeps=sweeps, seed=seed, **how)
        return replace(found, x=target.chart.to_bounded(found.x)[0])
    circle = bool(target.chart.circle.all())
    sizes = (
        [(width, islands)]
        if circle
        else [(width, -(-islands // 2)), (width / NARROWER, islands // 2)]
    )
    with seeded(seed, condition.device):
        paths, samplers = [], []
        for wide, count in sizes:
            sampler = _Sampler(target, condition, wide, sweeps)
            samplers.append(sampler)
            pilot = sampler.run(1, min(4, islands) * particles, None)
            paths.append(sampler.run(count, particles, pilot.plan))
        return _joined(samplers[-1], width, paths)


def _joined(sampler: "_Sampler", width: float, paths: list["_Path"]) -> Evidence:
    """The result of both halves of the islands, row by row."""
    target, condition = sampler.target, sampler.asked
    each = [_mean(it.log_z) for it in paths]
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
        found = _mean(torch.cat([paths[k].log_z[row : row + 1] for k in chosen], 1))
        why += _doubts([paths[k] for k in chosen], row, found.error.item())
        log_z.append(found.value[0])
        error.append(found.error[0])
        x.append(_weighed(paths, chosen, row))
        candidates = torch.cat([it.candidates[row] for it in paths])
        log_z_of = Mean(found.value[0], found.error[0])
        why += _lost(sampler, row, candidates, x[-1], log_z_of)
        doubts.append(tuple(why))
    least = torch.stack([it.accepted for it in paths]).amin(0)
    by_island = torch.cat([it.log_z for it in paths], 1)
    drawn = torch.stack(x).to(condition)
    drawn = drawn.reshape(*drawn.shape[:3], *target.event_shape)
    mean = Mean(torch.stack(log_z), torch.stack(error))
    rungs = sum(len(it.plan) for it in paths)
    return Evidence(mean, drawn, by_island, least, rungs, width, condition, tuple(doubts))


def _mean(by_island: Float[Tensor, "rows islands"]) -> Mean:
    """Log of the mean Z, in nats; its error by the jackknife."""
    top = by_island.amax(1)
    mean = jackknife(torch.log, (by_island - top[:, None]).exp().mT[:, None])
    return Mean(mean.value + top, mean.error)


def _weighed(paths: list["_Path"], chosen: list[int], row: int) -> Tensor:
    """Particles of as many islands as there are, drawn in proportion to their Z."""
    x = torch.cat([paths[k].x[row] for k in chosen])
    log_z = torch.cat([paths[k].log_z[row] for k in chosen])
    islands, particles = sum(it.x.shape[1] for it in paths), x.shape[1]
    log_w = log_z.repeat_interleave(particles)
    places = resample(log_w, count=islands * particles)
    return x.flatten(0, 1)[places].reshape(islands, particles, -1)


def _doubts(paths: list["_Path"], row: int, error: float) -> list[str]:
    found = []
    if not error <= MAX_ERROR:
        found.append(
            f"islands of particles differ: log Z has an error of {error:.2g} nats, above "
            f"{MAX_ERROR}."
        )
    accepted = min(it.accepted[row].item() for it in paths)
    if accepted < MIN_ACCEPTED:
        found.append(
            f"particles hardly moved: at some β a share of {accepted:.2g} of the moves was "
            f"accepted, below {MIN_ACCEPTED}."
        )
    change = torch.cat([it.change[row] for it in paths])
    drift = (change.mean().abs() / (change.std() / len(change) ** 0.5).clamp_min(1e-12)).item()
    if normal_errors(drift, len(change) - 1) > MAX_DRIFT:
        found.append(
            f"particles do not follow the target yet: as they move on under it, their mean "
            f"log-density changes by {drift:.1f} errors."
        )
    return found


def _lost(
    sampler: "_Sampler", row: int, candidates: Tensor, x: Tensor, log_z: Mean
) -> Iterator[str]:
    """A mode that particles met on their way and have lost, if there is one."""
    if not len(candidates):
        return
    found = find_lost_mode(sampler.density(row), candidates, x, log_z)
    if found is None:
        return
    place = ", ".join(f"{it:.3g}" for it in found.x[:SHOWN].tolist())
    place += ", ..." * (len(found.x) > SHOWN)
    yield (
        f"particles lost a mode that they met: about x = ({place}) the density has "
        f"{found.share:.2g} of their Z, and {found.held:.2g} of the particles are there."
    )


def normal_errors(errors: float, degrees: int) -> float:
    """Errors of a normal distribution as rare as these, whose size so many degrees estimate.

    Source: Wallace (1959), Ann. Math. Statist. 30, 1121, equation 2.1.

    >>> round(normal_errors(5.0, 7), 1), round(normal_errors(5.0, 1_000), 1)
    (3.2, 5.0)
    """
    share = (8 * degrees + 1) / (8 * degrees + 3)
    return share * math.sqrt(degrees * math.log1p(errors**2 / degrees))


class _Path(NamedTuple):
    log_z: Float[Tensor, "rows islands"]
    x: Float[Tensor, "rows islands particles coordinates"]
    candidates: Float[Tensor, "rows candidates coordinates"]
    accepted: Float[Tensor, " rows"]
    change: Float[Tensor, "rows islands"]
    plan: list[_Rung]


class _State(NamedTuple):
    """Particles [rows, islands, particles, coordinates], log p there and its gradient."""

    x: Tensor
    log_p: Tensor
    score: Tensor

    def taken(self, index: Tensor) -> "_State":
        """The particles at these places of each island."""
        wide = index[..., None].expand(*index.shape, self.x.shape[-1])
        parts = self.x.gather(2, wide), self.log_p.gather(2, index), self.score.gather(2, wide)
        return _State(*parts)

    def where(self, chosen: Tensor, other: "_State") -> "_State":
        """These particles where they are chosen, and the others elsewhere."""
        wide = chosen[..., None]
        return _State(
            torch.where(wide, self.x, other.x),
            torch.where(chosen, self.log_p, other.log_p),
            torch.where(wide, self.score, other.score),
        )


class _Sampler:
    """Moves and weights of particles of one target under several conditions."""

    def __init__(self, target: Target, condition: Tensor, width: float, sweeps: int):
        self.target, self.width, self.sweeps = target, width, sweeps
        self.size = math.prod(target.event_shape)
        self.circle = target.chart.circle.flatten()
        self.asked = condition
        self.condition, self.dtype = _precise(target, condition)
        self.gradient = _has_gradient(target, self.condition)
        self.kernel = kernel_of_angles(target)
        self.kept: list[Tensor] = []

    def run(self, islands: int, particles: int, plan: list[_Rung] | None) -> _Path:
        """Cool particles along a plan, or along one that is made on the way."""
        rows = len(self.condition)
        state = self.computed(self.broad(rows, islands, particles))
        log_w = torch.full(state.log_p.shape, -math.log(particles), dtype=torch.float64)
        log_z = torch.zeros(rows, islands, dtype=torch.float64)
        beta, accepted = torch.zeros(rows, dtype=self.dtype), torch.ones(rows, dtype=self.dtype)
        step, made = torch.full_like(beta, 0.5), list[_Rung]()
        self.kept = [state.x[:, :, :0].flatten(1, 2)]
        if (state.log_p <= LOWEST).flatten(1).all(1).any():
            raise ValueError(
                f"target: the log-density of {self.target} is finite at none of "
                f"{islands * particles:,} points drawn from the broad distribution."
            )
        while bool((beta < 1).any()):
            gain = (state.log_p - self.log_broad(state.x)).double()
            if plan is None:
                rung = _Rung(self.next_beta(beta, gain, log_w), step, self.scales(state, log_w))
            else:
                rung = plan[len(made)]
            log_w = log_w + (rung.beta - beta)[:, None, None].double() * gain
            increment = log_w.logsumexp(2)
            log_z, log_w, beta = log_z + increment, log_w - increment[..., None], rung.beta
            state, log_w = self.resampled(state, log_w, all_of=bool((beta >= 1).all()))
            share = torch.zeros_like(beta)
            for _ in range(self.sweeps):
                state, moved = self.moved(state, rung)
                share = share + moved / self.sweeps
            made.append(rung)
            self.keep(state.log_p, state.x)
            accepted = torch.minimum(accepted, share)
            if plan is None and self.kernel is None:
                aim = ACCEPTED["gradient" if self.gradient else "walk"]
                step = step * (1.5 * (share - aim)).exp()
            if len(made) > MAX_RUNGS:
                raise ValueError(
                    f"target: {MAX_RUNGS:,} values of β were too few to cool particles to "
                    f"{self.target}; β is {beta.min().item():.3g}. None are enough where the "
                    "density cannot be normalised, as one that is constant or grows outwards."
                )
        if plan is None:
            return _Path(log_z, state.x, self.kept[0], accepted, torch.zeros_like(log_z), made)
        before, kept = state.log_p.mean(2), torch.cat(self.kept, 1)
        for _ in range(DRIFT):
            state, _ = self.moved(state, made[-1])
        return _Path(log_z, state.x, kept, accepted, state.log_p.mean(2) - before, made)

    def keep(self, priority: Tensor, x: Tensor) -> None:
        """Keep the points of highest priority, from which modes are looked for."""
        if self.kernel is not None or self.size > MAX_SIZE:
            return
        index = priority.topk(min(CANDIDATES, priority.shape[2]), 2).indices[..., None]
        kept = x.gather(2, index.expand(*index.shape[:3], x.shape[-1]))
        self.kept.append(kept.flatten(1, 2))

    def density(self, row: int) -> LogDensity:
        """The target under one condition, at points [*batch, coordinates]."""
        one = _Sampler(self.target, self.asked[row : row + 1], self.width, self.sweeps)

        def computed(x: Tensor) -> _State:
            found = one.computed(x.reshape(1, 1, -1, self.size))
            shapes = x.shape, x.shape[:-1], x.shape
            return _State(*(it.reshape(to) for it, to in zip(found, shapes, strict=True)))

        def difference(a: Tensor, b: Tensor) -> Tensor:
            return self.wrapped(_State(b - a, b, b)).x

        def slope(x: Tensor) -> tuple[Tensor, Tensor]:
            found = computed(x)
            return found.log_p, found.score

        return LogDensity(
            lambda x: computed(x).log_p, slope if self.gradient else None, difference
        )

    def broad(self, *shape: int) -> Tensor:
        """Draws of the broad distribution."""
        size = (*shape, self.size)
        if not self.circle.any():
            return self.width * torch.randn(size, dtype=self.dtype)
        angles = math.pi * (2 * torch.rand(size, dtype=self.dtype) - 1)
        if self.circle.all():
            return angles
        return torch.where(self.circle, angles, self.width * torch.randn(size, dtype=self.dtype))

    def log_broad(self, x: Tensor) -> Tensor:
        """Log-density of the broad distribution, in nats."""
        normal = -(x / self.width).square() / 2 - math.log(self.width * math.sqrt(2 * math.pi))
        return torch.where(self.circle, -math.log(2 * math.pi), normal).sum(-1)

    def given(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Events and their conditions, as the target takes them."""
        each = self.condition[:, None, None].expand(*x.shape[:-1], -1)
        return x.reshape(*x.shape[:-1], *self.target.event_shape), each

    def computed(self, x: Tensor) -> _State:
        """Particles with their log-density, and its gradient where it is used."""
        score = torch.zeros_like(x)
        if self.gradient and self.kernel is None:
            with torch.enable_grad():
                y = x.detach().requires_grad_(True)
                log_p = self.target.log_prob(*self.given(y))
                (score,) = torch.autograd.grad(log_p.sum(), y)
            log_p = log_p.detach()
        else:
            log_p = self.target.log_prob(*self.given(x))
        log_p = log_p.to(self.dtype).nan_to_num(LOWEST, LOWEST, LOWEST).clamp_min(LOWEST)
        return _State(x, log_p, score.nan_to_num(0.0, 0.0, 0.0))

    def next_beta(self, beta: Tensor, gain: Tensor, log_w: Tensor) -> Tensor:
        """The largest β at which the particles keep their effective share, row by row."""
        flat, log_w = gain.flatten(1), log_w.flatten(1).log_softmax(1)
        equal = EQUAL if self.kernel is None else EQUAL_BY_KERNEL

        def enough(step: Tensor) -> Tensor:
            moved = step[:, None] * flat
            once, twice = (log_w + k * moved for k in (1, 2))
            return (2 * once.logsumexp(1) - twice.logsumexp(1)).exp() >= equal

        rest = 1 - beta.double()
        low, high = torch.full_like(rest, -60.0), rest.clamp_min(1e-30).log()
        for _ in range(40):
            middle = (low + high) / 2
            fits = enough(middle.exp())
            low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
        risen = (beta.double() + low.exp()).clamp_max(1).to(self.dtype)
        return torch.where(enough(rest), torch.ones_like(beta), risen)

    def scales(self, state: _State, log_w: Tensor) -> Tensor:
        """The standard deviation of each coordinate, [rows, coordinates]; 1 for angles."""
        x = state.x.flatten(1, 2)
        weight = log_w.flatten(1).softmax(1).to(self.dtype)[..., None]
        mean = (weight * x).sum(1, keepdim=True)
        widths = (weight * (x - mean).square()).sum(1).sqrt().clamp_min(1e-12)
        return torch.where(self.circle, 1.0, widths)

    def resampled(self, state: _State, log_w: Tensor, all_of: bool) -> tuple[_State, Tensor]:
        """Islands whose weights have degenerated begin again with equal ones; in the end all."""
        particles = log_w.shape[2]
        poor = (1 / log_w.softmax(2).square().sum(2) < MIN_SHARE * particles) | all_of
        if not poor.any():
            return state, log_w
        index = torch.where(
            poor[..., None], resample(log_w, 2), torch.arange(particles, device=log_w.device)
        )
        return state.taken(index), torch.where(poor[..., None], -math.log(particles), log_w)

    def moved(self, state: _State, rung: _Rung) -> tuple[_State, Tensor]:
        """Particles after a move that leaves p₀^(1 − β) p^β as it is, and what was accepted."""
        if self.kernel is not None:
            return self.moved_by(self.kernel, state, rung)
        return self.guided(state, rung) if self.gradient else self.walked(state, rung)

    def moved_by(self, kernel: Kernel, state: _State, rung: _Rung) -> tuple[_State, Tensor]:
        """Particles after a move of the target's kernel at the temperature T/β."""
        x, each = self.given(state.x)
        hot = each.clone()
        hot[..., 0] = each[..., 0] / rung.beta[:, None, None].clamp_min(1e-9)
        x = kernel.move(self.target, hot, x, 1).reshape(state.x.shape)
        return self.computed(x), torch.ones_like(rung.beta)

    def walked(self, state: _State, rung: _Rung) -> tuple[_State, Tensor]:
        """Particles after a random walk."""
        share = torch.zeros_like(rung.beta)
        for _ in range(WALKS):
            size = rung.step[:, None, None, None] * rung.scale[:, None, None]
            new = self.computed(state.x + size * torch.randn_like(state.x) / self.size**0.5)
            log_ratio = self.tempered(new, rung.beta) - self.tempered(state, rung.beta)
            accept = log_ratio.clamp_max(0).exp()
            state = new.where(torch.rand_like(accept) < accept, state)
            share = share + accept.mean((1, 2)) / WALKS
        return self.wrapped(state), share

    def guided(self, state: _State, rung: _Rung) -> tuple[_State, Tensor]:
        """Particles after a Hamiltonian move, each with a step of its own."""
        size = rung.step[:, None, None, None] * rung.scale[:, None, None]
        size = size * SMALLEST ** torch.rand_like(state.log_p)[..., None]
        momentum = torch.randn_like(state.x)
        before = self.tempered(state, rung.beta) - momentum.square().sum(-1) / 2
        momentum, new = momentum + size / 2 * self.slope(state, rung.beta), state
        met = [state]
        for k in range(LEAPFROGS):
            new = self.computed(new.x + size * momentum)
            met.append(new)
            half = 2 if k == LEAPFROGS - 1 else 1
            momentum = momentum + size / half * self.slope(new, rung.beta)
        x, log_p, score = (torch.cat(it, 2) for it in zip(*met, strict=True))
        # |∇log p|² is 2/σ² of the fall below a maximum: large in the reach of a narrow mode.
        fall = log_p.amax((1, 2), keepdim=True) - log_p + self.size
        self.keep((score * rung.scale[:, None, None]).square().sum(-1) / fall, x)
        after = self.tempered(new, rung.beta) - momentum.square().sum(-1) / 2
        accept = (after - before).nan_to_num(-math.inf).clamp_max(0).exp()
        state = new.where(torch.rand_like(accept) < accept, state)
        return self.wrapped(state), accept.mean((1, 2))

    def tempered(self, state: _State, beta: Tensor) -> Tensor:
        """Log of p₀^(1 − β) p^β, in nats."""
        beta = beta[:, None, None]
        return beta * state.log_p + (1 - beta) * self.log_broad(state.x)

    def slope(self, state: _State, beta: Tensor) -> Tensor:
        """Its gradient."""
        beta = beta[:, None, None, None]
        pull = torch.where(self.circle, 0.0, state.x / self.width**2)
        return beta * state.score - (1 - beta) * pull

    def wrapped(self, state: _State) -> _State:
        """Angles in [−π, π)."""
        if not self.circle.any():
            return state
        wrapped = torch.remainder(state.x + math.pi, 2 * math.pi) - math.pi
        return state._replace(x=torch.where(self.circle, wrapped, state.x))


def _precise(target: Target, condition: Tensor) -> tuple[Tensor, torch.dtype]:
    """The condition in double precision, or as it is where the target computes in that alone."""
    x = torch.zeros(1, *target.event_shape, dtype=torch.float64, device=condition.device)
    try:
        target.log_prob(x, condition[:1].double())
    except Exception:  # of any kind: a function with parameters in single precision
        return condition, condition.dtype
    return condition.double(), torch.float64


def _has_gradient(target: Target, condition: Tensor) -> bool:
    with torch.enable_grad():
        x = torch.zeros(1, *target.event_shape, dtype=condition.dtype).requires_grad_(True)
        try:
            value: Any = target.log_prob(x, condition[:1])
            (score,) = torch.autograd.grad(value.sum(), x, allow_unused=True)
        except RuntimeError:
            return False
    return score is not None

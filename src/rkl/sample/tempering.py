r"""Sequential Monte Carlo along p₀^(1 − β) p^β, from a broad distribution p₀ to a target p.

    Z = Z₀ Πₖ ⟨(p/p₀)^(βₖ₊₁ − βₖ)⟩    over weighted particles of p₀^(1 − βₖ) p^βₖ

The broad distribution is normal on the line and uniform on the circle.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rkl.flows.architectures.circular import wrap_angles
from rkl.sample.lost_modes import MAX_SIZE, LogDensity
from rkl.sample.targets.base import Kernel, Target
from rkl.sample.targets.check import in_double
from rkl.stats import Mean, jackknife, resample

EQUAL, EQUAL_BY_KERNEL = 0.95, 0.85  # effective share of particles that a step in β leaves
MIN_SHARE = 0.5  # effective share below which an island is resampled
LEAPFROGS = 5  # of a Hamiltonian move
MIN_STEP = 0.05  # share of the largest step that a Hamiltonian move may take, by chance
ACCEPTANCE = {"gradient": 0.65, "walk": 0.3}  # shares of moves that the pilot aims at
WALKS = 5  # steps of a random walk at each β
LOWEST = -1e30  # log-density in place of -inf, so that differences are finite
MAX_RUNGS = 5_000
CANDIDATES = 16  # highest particles of an island, at each β, and steepest, from which to climb


def wrap(x: Float[Tensor, "*batch_event"], circle: Bool[Tensor, "*event"]) -> Tensor:
    """Angles in [−π, π), and other coordinates unchanged."""
    if not circle.any():
        return x
    return torch.where(circle, wrap_angles(x), x)


def finite(log_p: Tensor) -> Tensor:
    """Log-densities with a very low number in place of nan and infinities."""
    return log_p.nan_to_num(LOWEST, LOWEST, LOWEST).clamp_min(LOWEST)


class Broad:
    """Independent coordinates: N(0, width²) on the line, uniform on the circle.

    Args:
        circle: True for coordinates that are angles, of the shape of an event.
        width: Standard deviation on the line.
    """

    def __init__(self, circle: Bool[Tensor, "*event"], width: float):
        self.circle, self.width = circle, width

    def sample(self, shape: tuple[int, ...], dtype: torch.dtype) -> Float[Tensor, "*shape_event"]:
        """Independent draws."""
        size = (*shape, *self.circle.shape)
        if not self.circle.any():
            return self.width * torch.randn(size, dtype=dtype)
        angles = math.pi * (2 * torch.rand(size, dtype=dtype) - 1)
        if self.circle.all():
            return angles
        return torch.where(self.circle, angles, self.width * torch.randn(size, dtype=dtype))

    def log_prob(self, x: Float[Tensor, "*batch_event"]) -> Float[Tensor, "*batch"]:
        """Log-density in nats."""
        normal = -(x / self.width).square() / 2 - math.log(self.width * math.sqrt(2 * math.pi))
        terms = torch.where(self.circle, -math.log(2 * math.pi), normal)
        return terms.flatten(x.ndim - self.circle.ndim).sum(-1)

    def score(self, x: Float[Tensor, "*batch_event"]) -> Float[Tensor, "*batch_event"]:
        """Gradient of the log-density."""
        return torch.where(self.circle, 0.0, -x / self.width**2)


class Points(NamedTuple):
    """Points with their log-density, and its gradient where it is used."""

    x: Float[Tensor, "*batch_event"]
    log_p: Float[Tensor, "*batch"]
    score: Float[Tensor, "*batch_event"] | None = None

    def select(self, index: Tensor) -> "Points":
        """The particles at these places of each island, [rows, islands, particles]."""
        wide = index[..., None].expand(*index.shape, self.x.shape[-1])
        score = None if self.score is None else self.score.gather(2, wide)
        return Points(self.x.gather(2, wide), self.log_p.gather(2, index), score)

    def where(self, chosen: Bool[Tensor, "*batch"], other: "Points") -> "Points":
        """These points where they are chosen, and the others elsewhere."""
        wide = chosen.reshape(*chosen.shape, *[1] * (self.x.ndim - chosen.ndim))
        score = None
        if self.score is not None and other.score is not None:
            score = torch.where(wide, self.score, other.score)
        x, log_p = torch.where(wide, self.x, other.x), torch.where(chosen, self.log_p, other.log_p)
        return Points(x, log_p, score)


def metropolis_step(
    points: Points, new: Points, log_ratio: Float[Tensor, "*batch"]
) -> tuple[Points, Float[Tensor, "*batch"]]:
    """The new points where they are accepted, and the probability that they are."""
    accept = log_ratio.nan_to_num(-math.inf).clamp_max(0).exp()
    return new.where(torch.rand_like(accept) < accept, points), accept


def random_walk(
    points: Points,
    evaluate: Callable[[Tensor], Points],
    log_density: Callable[[Points], Tensor],
    step: Tensor | float,
) -> tuple[Points, Float[Tensor, "*batch"]]:
    """A Metropolis step with Gaussian proposals, and the probability that it is accepted.

    Args:
        points: Points to start from.
        evaluate: Points at new places.
        log_density: The log-density that stays invariant, in nats.
        step: Standard deviation of the proposals.
    """
    new = evaluate(points.x + step * torch.randn_like(points.x))
    return metropolis_step(points, new, log_density(new) - log_density(points))


def resample_degenerate(
    log_w: Float[Tensor, "*rows particles"], always: bool = False
) -> tuple[Tensor, Tensor] | None:
    """Places of equal weight and log-weights, for islands with few effective particles.

    Other islands keep their places and weights. None where there is nothing to resample.

    Args:
        log_w: Log-weights, of which those of an island add up to one.
        always: Whether to resample all islands.
    """
    count = log_w.shape[-1]
    poor = (1 / log_w.softmax(-1).square().sum(-1) < MIN_SHARE * count)[..., None] | always
    if not poor.any():
        return None
    places = torch.where(poor, resample(log_w, -1), torch.arange(count, device=log_w.device))
    return places, torch.where(poor, -math.log(count), log_w)


def log_mean(log_z: Float[Tensor, "rows islands"]) -> Mean:
    """Log of the mean Z of islands, in nats; its error by the jackknife."""
    top = log_z.amax(1)
    mean = jackknife(torch.log, (log_z - top[:, None]).exp().mT[:, None])
    return Mean(mean.value + top, mean.error)


class Rung(NamedTuple):
    """One β of each row, the size of a move there, and the scales of the coordinates."""

    beta: Float[Tensor, " rows"]
    step: Float[Tensor, " rows"]
    scale: Float[Tensor, "rows coordinates"]


class Cooled(NamedTuple):
    """Particles at β = 1.

    Attributes:
        log_z: Log Z of each island at each rung in nats, from that of p₀, which is 0.
        points: The particles, [rows, islands, particles, coordinates].
        candidates: Points of the way from which to look for modes.
        accepted: Least share of moves accepted at any β.
        plan: The rungs.
    """

    log_z: Float[Tensor, "rungs rows islands"]
    points: Points
    candidates: Float[Tensor, "rows candidates coordinates"]
    accepted: Float[Tensor, " rows"]
    plan: list[Rung]


class Sampler:
    """Moves and weights of particles of one target under several conditions.

    Args:
        target: The density, without bounds.
        condition: The conditions, one a row.
        width: Standard deviation of the broad distribution on the line.
        sweeps: Moves at each β.
        kernel: A move of the target at any temperature above its own, if there is one.
    """

    def __init__(
        self,
        target: Target,
        condition: Float[Tensor, "rows conditions"],
        width: float,
        sweeps: int = 1,
        kernel: Kernel | None = None,
    ):
        self.target, self.width, self.sweeps, self.kernel = target, width, sweeps, kernel
        self.size = math.prod(target.event_shape)
        self.circle = target.chart.circle.flatten()
        self.broad = Broad(self.circle, width)
        self.asked = condition
        self.condition, self.dtype = in_double(target, condition)
        self.gradient = kernel is None and _has_gradient(target, self.condition)
        self.candidates: list[Tensor] = []

    def run(self, islands: int, particles: int, plan: list[Rung] | None = None) -> Cooled:
        """Cool particles along a plan, or along one made on the way."""
        rows = len(self.condition)
        points = self.evaluate(self.broad.sample((rows, islands, particles), self.dtype))
        log_w = torch.full(points.log_p.shape, -math.log(particles), dtype=torch.float64)
        log_z, path = torch.zeros(rows, islands, dtype=torch.float64), []
        beta, accepted = torch.zeros(rows, dtype=self.dtype), torch.ones(rows, dtype=self.dtype)
        step, done = torch.full_like(beta, 0.5), list[Rung]()
        self.candidates = [points.x[:, :, :0].flatten(1, 2)]
        if (points.log_p <= LOWEST).flatten(1).all(1).any():
            raise ValueError(
                f"target: the log-density of {self.target} is finite at none of "
                f"{islands * particles:,} points drawn from the broad distribution."
            )
        while bool((beta < 1).any()):
            gain = (points.log_p - self.broad.log_prob(points.x)).double()
            if plan is None:
                rung = Rung(self.next_beta(beta, gain, log_w), step, self.scales(points, log_w))
            else:
                rung = plan[len(done)]
            log_w = log_w + (rung.beta - beta)[:, None, None].double() * gain
            increment = log_w.logsumexp(2)
            log_z, log_w, beta = log_z + increment, log_w - increment[..., None], rung.beta
            path.append(log_z)
            resampled = resample_degenerate(log_w, always=bool((beta >= 1).all()))
            if resampled is not None:
                points, log_w = points.select(resampled[0]), resampled[1]
            share = torch.zeros_like(beta)
            for _ in range(self.sweeps):
                points, accept = self.move(points, rung)
                share = share + accept / self.sweeps
            done.append(rung)
            self.add_candidates(points.log_p, points.x)
            accepted = torch.minimum(accepted, share)
            if plan is None and self.kernel is None:
                aim = ACCEPTANCE["gradient" if self.gradient else "walk"]
                step = step * (1.5 * (share - aim)).exp()
            if len(done) > MAX_RUNGS:
                raise ValueError(
                    f"target: {MAX_RUNGS:,} values of β were too few to cool particles to "
                    f"{self.target}; β is {beta.min().item():.3g}. None are enough where the "
                    "density cannot be normalised, as one that is constant or grows outwards."
                )
        return Cooled(torch.stack(path), points, torch.cat(self.candidates, 1), accepted, done)

    def add_candidates(self, priority: Tensor, x: Tensor) -> None:
        """Keep the points of highest priority, from which lost modes are searched."""
        if self.kernel is not None or self.size > MAX_SIZE:
            return
        index = priority.topk(min(CANDIDATES, priority.shape[2]), 2).indices[..., None]
        highest = x.gather(2, index.expand(*index.shape[:3], x.shape[-1]))
        self.candidates.append(highest.flatten(1, 2))

    def density(self, row: int) -> LogDensity:
        """The target under one condition, at points [*batch, coordinates]."""
        one = Sampler(self.target, self.asked[row : row + 1], self.width, kernel=self.kernel)

        def evaluate(x: Tensor) -> tuple[Tensor, Tensor]:
            points = one.evaluate(x.reshape(1, 1, -1, self.size))
            score = points.x if points.score is None else points.score
            return points.log_p.reshape(x.shape[:-1]), score.reshape(x.shape)

        return LogDensity(
            lambda x: evaluate(x)[0],
            evaluate if self.gradient else None,
            lambda a, b: wrap(b - a, self.circle),
        )

    def events(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Events and their conditions, in the form that the target takes."""
        each = self.condition[:, None, None].expand(*x.shape[:-1], -1)
        return x.reshape(*x.shape[:-1], *self.target.event_shape), each

    def evaluate(self, x: Float[Tensor, "rows islands particles coordinates"]) -> Points:
        """Points at these places."""
        if not self.gradient:
            return Points(x, finite(self.target.log_prob(*self.events(x)).to(self.dtype)))
        with torch.enable_grad():
            y = x.detach().requires_grad_(True)
            log_p = self.target.log_prob(*self.events(y))
            (score,) = torch.autograd.grad(log_p.sum(), y)
        return Points(x, finite(log_p.detach().to(self.dtype)), score.nan_to_num(0.0, 0.0, 0.0))

    def next_beta(self, beta: Tensor, gain: Tensor, log_w: Tensor) -> Tensor:
        """The largest β at which the particles keep their effective share, row by row."""
        flat, log_w = gain.flatten(1), log_w.flatten(1).log_softmax(1)
        equal = EQUAL if self.kernel is None else EQUAL_BY_KERNEL

        def enough(step: Tensor) -> Tensor:
            change = step[:, None] * flat
            once, twice = (log_w + k * change for k in (1, 2))
            return (2 * once.logsumexp(1) - twice.logsumexp(1)).exp() >= equal

        rest = 1 - beta.double()
        low, high = torch.full_like(rest, -60.0), rest.clamp_min(1e-30).log()
        for _ in range(40):
            middle = (low + high) / 2
            fits = enough(middle.exp())
            low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
        risen = (beta.double() + low.exp()).clamp_max(1).to(self.dtype)
        return torch.where(enough(rest), torch.ones_like(beta), risen)

    def scales(self, points: Points, log_w: Tensor) -> Float[Tensor, "rows coordinates"]:
        """The standard deviation of each coordinate; 1 for angles."""
        x = points.x.flatten(1, 2)
        weight = log_w.flatten(1).softmax(1).to(self.dtype)[..., None]
        mean = (weight * x).sum(1, keepdim=True)
        widths = (weight * (x - mean).square()).sum(1).sqrt().clamp_min(1e-12)
        return torch.where(self.circle, 1.0, widths)

    def move(self, points: Points, rung: Rung) -> tuple[Points, Float[Tensor, " rows"]]:
        """Particles after a move that leaves p₀^(1 − β) p^β invariant, and the share accepted."""
        if self.kernel is not None:
            return self.move_by(self.kernel, points, rung)
        return self.hamiltonian(points, rung) if self.gradient else self.walk(points, rung)

    def move_by(self, kernel: Kernel, points: Points, rung: Rung) -> tuple[Points, Tensor]:
        """Particles after a move of the kernel at the temperature T/β."""
        x, each = self.events(points.x)
        hot = each.clone()
        hot[..., 0] = each[..., 0] / rung.beta[:, None, None].clamp_min(1e-9)
        x = kernel.move(self.target, hot, x, 1).reshape(points.x.shape)
        return self.evaluate(x), torch.ones_like(rung.beta)

    def walk(self, points: Points, rung: Rung) -> tuple[Points, Tensor]:
        """Particles after some steps of a random walk."""
        share = torch.zeros_like(rung.beta)
        step = rung.step[:, None, None, None] * rung.scale[:, None, None] / self.size**0.5
        for _ in range(WALKS):
            points, accept = random_walk(
                points, self.evaluate, lambda it: self.log_tempered(it, rung.beta), step
            )
            share = share + accept.mean((1, 2)) / WALKS
        return self.wrap(points), share

    def hamiltonian(self, points: Points, rung: Rung) -> tuple[Points, Tensor]:
        """Particles after a Hamiltonian move, each with a step of its own."""
        step = rung.step[:, None, None, None] * rung.scale[:, None, None]
        step = step * MIN_STEP ** torch.rand_like(points.log_p)[..., None]
        momentum = torch.randn_like(points.x)
        before = self.log_tempered(points, rung.beta) - momentum.square().sum(-1) / 2
        momentum, new = momentum + step / 2 * self.score(points, rung.beta), points
        visited = [points]
        for k in range(LEAPFROGS):
            new = self.evaluate(new.x + step * momentum)
            visited.append(new)
            half = 2 if k == LEAPFROGS - 1 else 1
            momentum = momentum + step / half * self.score(new, rung.beta)
        x, log_p, score = (torch.cat(it, 2) for it in zip(*visited, strict=True))
        # |∇log p|² is 2/σ² of the fall below a maximum: large in the reach of a narrow mode.
        fall = log_p.amax((1, 2), keepdim=True) - log_p + self.size
        self.add_candidates((score * rung.scale[:, None, None]).square().sum(-1) / fall, x)
        after = self.log_tempered(new, rung.beta) - momentum.square().sum(-1) / 2
        points, accept = metropolis_step(points, new, after - before)
        return self.wrap(points), accept.mean((1, 2))

    def log_tempered(self, points: Points, beta: Tensor) -> Tensor:
        """Log of p₀^(1 − β) p^β, in nats."""
        beta = beta[:, None, None]
        return beta * points.log_p + (1 - beta) * self.broad.log_prob(points.x)

    def score(self, points: Points, beta: Tensor) -> Tensor:
        """The gradient of :meth:`log_tempered`."""
        assert points.score is not None
        beta = beta[:, None, None, None]
        return beta * points.score + (1 - beta) * self.broad.score(points.x)

    def wrap(self, points: Points) -> Points:
        """Angles in [−π, π)."""
        return points._replace(x=wrap(points.x, self.circle))


def _has_gradient(target: Target, condition: Tensor) -> bool:
    with torch.enable_grad():
        x = torch.zeros(1, *target.event_shape, dtype=condition.dtype).requires_grad_(True)
        try:
            value: Any = target.log_prob(x, condition[:1])
            (score,) = torch.autograd.grad(value.sum(), x, allow_unused=True)
        except RuntimeError:
            return False
    return score is not None

"""Particles cooled from a broad law to a target: draws where there are no data, in all modes."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from rkl.sample.targets import Target
from rkl.stats import resample

WIDE = 10.0  # standard deviation of the law that they are cooled from
LADDER = torch.logspace(-6, 0, 80, dtype=torch.float32)  # their β
MOVES = 4  # at each β
TAKEN = 0.3  # share of the moves that should be accepted


class Particles:
    r"""Draws of a target, as many for each of some conditions, made anew little by little.

    They come from N(0, 10²) along N(0, 10²)^(1 − β) p^β: at each β they are weighed, resampled
    and moved by a random walk. While all is one mode they are everywhere in it, and as modes
    come apart they stay in each with its mass, up to noise of the resampling. Later they walk on
    inside their modes. That is no fair sample where modes appear far from all others, and
    random walks serve few coordinates only; a flow fitted to them is corrected by its weights.

    Source: Del Moral, Doucet and Jasra (2006), J. R. Statist. Soc. B 68, 411, for sequential
    Monte Carlo; Gabrié, Rotskoff and Vanden-Eijnden (2022), PNAS 119, arXiv 2105.12603, for
    walkers beside the flow that is trained on them.

    Args:
        target: A density without bounds; of angles they come from the uniform one.
        condition: Values of its conditions.
        each: Particles of each.

    >>> from rkl.sample import MoG8
    >>> with torch.random.fork_rng():
    ...     _ = torch.manual_seed(0)
    ...     Particles(MoG8(), torch.full((8, 1), 0.5)).x.flatten(0, 1).std(0).round()
    tensor([3., 3.])
    """

    x: Float[Tensor, "each conditions *event"]

    def __init__(
        self, target: Target, condition: Float[Tensor, "conditions values"], each: int = 128
    ):
        self.target, self.condition, self.each = target, condition, each
        self.event = len(target.event_shape)
        shape = (each, len(condition), *target.event_shape)
        self.circle = target.chart.circle
        self.x = self._broad(shape, condition.dtype)
        self.log_p = self._log_prob(self.x, condition.expand(each, *condition.shape))
        self.step = torch.full_like(condition[:, 0] if condition.shape[1] else self.log_p[0], WIDE)
        self._cool()

    def _broad(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if not self.circle.any():
            return WIDE * torch.randn(shape, dtype=dtype)
        angles = math.pi * (2 * torch.rand(shape, dtype=dtype) - 1)
        if self.circle.all():
            return angles
        return torch.where(self.circle, angles, WIDE * torch.randn(shape, dtype=dtype))

    @torch.no_grad()
    def _cool(self) -> None:
        before, columns = 0.0, torch.arange(len(self.condition))
        rows = torch.arange(self.each)[:, None].expand(-1, len(columns))
        for beta in LADDER.tolist():
            log_w = (beta - before) * (self.log_p - self._log_broad(self.x))
            kept = resample(log_w)
            self.x, self.log_p = self.x[kept, columns], self.log_p.gather(0, kept)
            for _ in range(MOVES):
                taken = self._move(rows, columns.expand_as(rows), beta)
                self.step = self.step * (taken.to(self.step).mean(0) - TAKEN).exp()
            before = beta

    @torch.no_grad()
    def draw(
        self, strata: int, draws: int
    ) -> tuple[Float[Tensor, "draws strata *event"], Float[Tensor, "strata values"]]:
        """Some particles of some conditions, one in each stratum of them, after one more move."""
        strata = min(strata, len(self.condition))
        start = torch.arange(strata) * len(self.condition) / strata
        columns = (start + torch.rand(strata) * len(self.condition) / strata).long()
        rows = torch.rand(self.each, strata).argsort(0)[:draws]
        columns_of = columns.expand_as(rows)
        self._move(rows, columns_of, 1.0)
        return self.x[rows, columns_of], self.condition[columns]

    def _move(self, rows: Tensor, columns: Tensor, beta: float) -> Tensor:
        """One step of a random walk; where it was accepted."""
        x, log_p, given = self.x[rows, columns], self.log_p[rows, columns], self.condition[columns]
        new = x + self._beside(self.step[columns]) * torch.randn_like(x)
        if self.circle.any():
            wrapped = torch.remainder(new + math.pi, 2 * math.pi) - math.pi
            new = torch.where(self.circle, wrapped, new)
        log_new = self._log_prob(new, given)
        gain = beta * (log_new - log_p)
        gain = gain + (1 - beta) * (self._log_broad(new) - self._log_broad(x))
        taken = torch.rand_like(gain) < gain.exp()
        self.x[rows, columns] = torch.where(self._beside(taken), new, x)
        self.log_p[rows, columns] = torch.where(taken, log_new, log_p)
        return taken

    def _beside(self, of_each: Tensor) -> Tensor:
        return of_each.reshape(*of_each.shape, *[1] * self.event)

    def _log_prob(self, x: Tensor, condition: Tensor) -> Tensor:
        """Log p in nats, finite, so that differences of it are."""
        lowest = -1e30
        log_p = self.target.log_prob(x, condition).to(x.dtype)
        return log_p.nan_to_num(lowest, lowest, lowest)

    def _log_broad(self, x: Tensor) -> Tensor:
        x = torch.where(self.circle, 0.0, x)
        return -(x / WIDE).square().flatten(x.ndim - self.event).sum(-1) / 2

    def state_dict(self) -> dict[str, Tensor]:
        """Where they are."""
        return {"x": self.x, "log_p": self.log_p, "step": self.step}

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Go on from there."""
        self.x, self.log_p, self.step = (state_dict[name] for name in ("x", "log_p", "step"))

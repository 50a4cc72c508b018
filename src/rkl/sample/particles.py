"""Particles cooled from a broad distribution to a target: draws in all modes, without data."""

import torch
from jaxtyping import Float
from torch import Tensor

from rkl.sample.targets.base import Target
from rkl.sample.tempering import ACCEPTANCE, Broad, Points, finite, random_walk, wrap
from rkl.stats import resample

WIDTH = 10.0  # standard deviation of the distribution that they are cooled from
LADDER = torch.logspace(-6, 0, 80, dtype=torch.float32)  # their β
MOVES = 4  # at each β


class Particles:
    r"""Draws of a target under several conditions, refreshed little by little.

    They come from N(0, 10²) along N(0, 10²)^(1 − β) p^β: at each β they are weighted, resampled
    and moved by a random walk. At first there is one mode with particles everywhere, and when
    modes separate they stay in each with its mass, up to noise of the resampling. Later they walk
    inside their modes. The sample is biased if modes appear far from all others, and
    random walks work for few coordinates only; a flow fitted to them is corrected by its weights.

    Source: Del Moral, Doucet and Jasra (2006), J. R. Statist. Soc. B 68, 411, for sequential
    Monte Carlo; Gabrié, Rotskoff and Vanden-Eijnden (2022), PNAS 119, arXiv 2105.12603, for
    walkers beside the flow that is trained on them.

    Args:
        target: A density without bounds; angles come from the uniform distribution.
        condition: Values of its conditions.
        each: Number of particles for each.

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
        shape = (each, len(condition), *target.event_shape)
        self.circle = target.chart.circle
        self.broad = Broad(self.circle, WIDTH)
        self.x = self.broad.sample(shape[:2], condition.dtype)
        self.log_p = self._evaluate(self.x, condition.expand(each, *condition.shape)).log_p
        self.step = torch.full((len(condition),), WIDTH, dtype=condition.dtype)
        self._cool()

    @torch.no_grad()
    def _cool(self) -> None:
        before, columns = 0.0, torch.arange(len(self.condition))
        rows = torch.arange(self.each)[:, None].expand(-1, len(columns))
        for beta in LADDER.tolist():
            places = resample((beta - before) * (self.log_p - self.broad.log_prob(self.x)))
            self.x, self.log_p = self.x[places, columns], self.log_p.gather(0, places)
            for _ in range(MOVES):
                accept = self._move(rows, columns.expand_as(rows), beta)
                self.step = self.step * (accept.mean(0) - ACCEPTANCE["walk"]).exp()
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
        condition, step = self.condition[columns], self.step[columns]
        points, accept = random_walk(
            Points(self.x[rows, columns], self.log_p[rows, columns]),
            lambda x: self._evaluate(wrap(x, self.circle), condition),
            lambda it: beta * it.log_p + (1 - beta) * self.broad.log_prob(it.x),
            step.reshape(*step.shape, *[1] * self.circle.ndim),
        )
        self.x[rows, columns], self.log_p[rows, columns] = points.x, points.log_p
        return accept

    def _evaluate(self, x: Tensor, condition: Tensor) -> Points:
        return Points(x, finite(self.target.log_prob(x, condition).to(x.dtype)))

    def state_dict(self) -> dict[str, Tensor]:
        """The positions of the particles."""
        return {"x": self.x, "log_p": self.log_p, "step": self.step}

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Restore the positions."""
        self.x, self.log_p, self.step = (state_dict[name] for name in ("x", "log_p", "step"))

"""Eight Gaussians on a ring and a flow too small for them: precision and recall without error."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Distribution

from rkl.divergences import (
    KL,
    FDivergence,
    JensenShannon,
    PearsonChiSquare,
    PrecisionHalf,
    PrecisionRecall,
    RecallHalf,
    ReverseKL,
)
from rkl.fit import Fit, Method, fit_to_samples
from rkl.fit.fit import Estimator
from rkl.flows import NSF, Critic, Moment, latent, train
from rkl.flows.weights import along_path
from rkl.metrics.precision_recall import operating_point, pr_curve
from rkl.metrics.precision_recall.curve import SLOPES
from rkl.studies.precision_recall.rows import ML, Seed

RADIUS, SCALE, MODES = 2.0, 0.2, 8
EDGE = RADIUS + 6 * SCALE  # of the square that is integrated over; what lies outside is one atom
SHOWN = 700  # draws kept for the pictures
LOW, HIGH = 0.1, 10.0  # slopes of support recall and of precision


@dataclass(frozen=True)
class Way:
    """One way to fit the flow.

    Args:
        divergence: The divergence that is minimised.
        exact: Whether p/q is known; else a critic estimates it.
        estimator: Estimator of the gradient; None is the default one.
        published: Whether to follow the paper, without our stabilisation.
        guard: Whether the guard of the fit chooses the parameters to keep.
    """

    divergence: FDivergence
    exact: bool = True
    estimator: Estimator | None = None
    published: bool = False
    guard: bool = True

    @property
    def method(self) -> str:
        """Name of the method in the rows."""
        how = "" if self.estimator is None else f", {self.estimator}"
        how = ", as published" if self.published else how
        return f"{name_of(self.divergence)}{how}{'' if self.guard else ', no guard'}"

    @property
    def ratio(self) -> str:
        """Source of p/q: "exact" or "critic"."""
        return "exact" if self.exact else "critic"


def name_of(divergence: FDivergence) -> str:
    """Short name of a divergence: its class and λ.

    >>> name_of(PrecisionHalf(lam=10.0))
    'PrecisionHalf(10)'
    """
    lam = getattr(divergence, "lam", None)
    return f"{type(divergence).__name__}{'' if lam is None else f'({lam:g})'}"


WAYS = (
    Way(PrecisionRecall(lam=10.0)),
    Way(PrecisionRecall(lam=10.0), exact=False),
    Way(PrecisionHalf(lam=10.0)),
    Way(PrecisionHalf(lam=10.0), exact=False),
    Way(PrecisionRecall(lam=10.0), exact=False, estimator="path"),
    Way(PrecisionRecall(lam=10.0), exact=False, estimator="path", published=True),
    Way(RecallHalf(lam=0.3)),
    Way(RecallHalf(lam=0.3), exact=False),
    Way(PrecisionRecall(lam=0.3)),
    Way(PrecisionRecall(lam=10.0), guard=False),
    Way(PrecisionRecall(lam=10.0), exact=False, guard=False),
    Way(PrecisionHalf(lam=10.0), guard=False),
    Way(RecallHalf(lam=0.3), guard=False),
    Way(ReverseKL()),
    Way(JensenShannon()),
    Way(PearsonChiSquare()),
    Way(PrecisionRecall(lam=3.0)),
    Way(RecallHalf(lam=0.1)),
)
FIRST = "PrecisionRecall(10)", "RecallHalf(0.3)", "PrecisionRecall(10), as published"


@dataclass(frozen=True)
class Plan:
    """The sizes of the part.

    Args:
        flow: Architecture of the flow.
        ways: Ways to fit it, beside maximum likelihood.
        seeds: Number of data sets, and of fits of each.
        rows: Points in a data set.
        steps: Steps of every fit, with those of maximum likelihood at its start.
        batch: Points in a step.
        cells: Cells along one side of the grid.
        temperatures: Temperatures of the latents of the flow of maximum likelihood.
        bounds: Bounds of its latents, in standard deviations.
        budgets: Budgets of rejection for it, in draws per sample.
    """

    flow: NSF = NSF(transforms=2, hidden=(32, 32), bins=4)  # noqa: RUF009
    ways: tuple[Way, ...] = WAYS
    seeds: int = 3
    rows: int = 10_000
    steps: int = 1000
    batch: int = 256
    cells: int = 240
    temperatures: tuple[float, ...] = (0.9, 0.7)
    bounds: tuple[float, ...] = (2.5, 2.0)
    budgets: tuple[float, ...] = (1.1, 1.3)


def log_prob(x: Float[Tensor, "*batch 2"]) -> Float[Tensor, "*batch"]:
    """Log-density of the ring, in nats."""
    terms = -(x[..., None, :] - _modes().to(x)).square().sum(-1) / (2 * SCALE**2)
    return terms.logsumexp(-1) - math.log(MODES * 2 * math.pi * SCALE**2)


def draws(count: int, seed: int) -> Float[Tensor, "count 2"]:
    """Draws from the ring."""
    generator = torch.Generator().manual_seed(seed)
    which = torch.randint(MODES, (count,), generator=generator)
    return _modes()[which] + SCALE * torch.randn(count, 2, generator=generator)


def _modes() -> Tensor:
    angle = 2 * math.pi * torch.arange(MODES) / MODES
    return RADIUS * torch.stack([angle.cos(), angle.sin()], 1)


class Grid:
    """Cells of the plane, over which distributions are summed.

    Args:
        cells: Number along one side.
    """

    def __init__(self, cells: int):
        along = (torch.arange(cells) + 0.5) * (2 * EDGE / cells) - EDGE
        self.points = torch.cartesian_prod(along, along)
        self.log_area = 2 * math.log(2 * EDGE / cells)
        self.log_p = self._atoms(log_prob(self.points.double()))
        self.slopes = torch.tensor(sorted({*SLOPES, LOW, 0.3, 3.0, HIGH}), dtype=torch.float64)

    def _atoms(self, log_density: Tensor) -> Tensor:
        """Log-masses of the cells, and of all outside, which is almost nothing for p."""
        inside = log_density.double() + self.log_area
        outside = (1 - inside.exp().sum()).clamp_min(1e-12).log()
        return torch.cat([inside, outside[None]]).log_softmax(0)

    def log_q(self, law: Distribution) -> Tensor:
        """Log-masses of a distribution."""
        with torch.no_grad():
            return self._atoms(law.log_prob(self.points))

    def judge(self, log_q: Tensor, cost: float = 1.0) -> dict[str, Any]:
        """Precision and recall of a distribution at a few slopes, and its whole curve."""
        curve = pr_curve(p=self.log_p, q=log_q, slopes=self.slopes)
        slopes, precision = self.slopes.tolist(), curve.precision.tolist()
        at = dict(zip(slopes, precision, strict=True))
        values = {"precision(10)": at[HIGH], "precision(3)": at[3.0], "both(1)": at[1.0]}
        values |= {"recall(0.3)": at[0.3] / 0.3, "recall(0.1)": at[LOW] / LOW, "cost": cost}
        exactly = {name: (round(value, 9), 0.0) for name, value in values.items()}
        return {"figures": exactly, "curve": (slopes, precision)}

    def reject(self, log_q: Tensor, log_ratio: Tensor, budget: float) -> tuple[Tensor, float]:
        """The distribution after rejection by a ratio that may be wrong, and its cost in draws.

        The constant is fitted on 20,000 draws, as in practice.
        """
        drawn = torch.multinomial(log_q.exp().float(), 20_000, replacement=True)
        lam = operating_point(log_ratio[drawn].double(), budget=budget).accept_lam
        log_accepted = (log_ratio + math.log(lam)).clamp_max(0.0)
        share = (log_q + log_accepted).logsumexp(0)
        return log_q + log_accepted - share, math.exp(-share.item())


def run(plan: Plan, seed: int) -> Iterator[Seed]:
    """All distributions of one data set with their scores; maximum likelihood comes first."""
    grid, data = Grid(plan.cells), draws(plan.rows, 1000 + seed)
    fitted = _fit(plan, data, Way(KL()), seed)
    yield _seed(grid, (ML, "none"), seed, fitted.flow(), fitted.history)
    yield from _sampling(plan, grid, fitted, seed)
    for way in plan.ways:
        if way.published:
            law, history = as_published(plan, data, way, seed)
        else:
            fitted = _fit(plan, data, way, seed)
            law, history = fitted.flow(), fitted.history
        yield _seed(grid, (way.method, way.ratio), seed, law, history)


def _fit(plan: Plan, data: Tensor, way: Way, seed: int) -> Fit:
    how: dict[str, Any] = {"steps": plan.steps, "seed": seed}
    how |= {"method": Method(batch=plan.batch, estimator=way.estimator, guard=way.guard)}
    how |= {"log_prob": log_prob if way.exact else None, "with_critic": way.divergence == KL()}
    return fit_to_samples(plan.flow, data, way.divergence, **how)


def _seed(grid: Grid, way: tuple[str, str], seed: int, law: Distribution, history: list) -> Seed:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        points = law.sample(torch.Size([SHOWN])).tolist()
    return Seed(*way, seed, **grid.judge(grid.log_q(law)), samples=points, history=history)


def _sampling(plan: Plan, grid: Grid, fitted: Fit, seed: int) -> Iterator[Seed]:
    law = fitted.flow()
    cooled = {f"latent temperature {t:g}": latent(law, temperature=t) for t in plan.temperatures}
    cooled |= {f"truncation at {bound:g}": latent(law, bound=bound) for bound in plan.bounds}
    for name, other in cooled.items():
        yield _seed(grid, (name, "none"), seed, other, [])
    log_q = grid.log_q(law)
    exact = grid.log_p - log_q
    assert fitted.critic is not None
    with torch.no_grad():
        learnt = torch.cat([fitted.critic(grid.points).double(), exact[-1:]])
    for name, ratio in (("exact", exact), ("critic", learnt)):
        for budget in plan.budgets:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                accepted, cost = grid.reject(log_q, ratio, budget)
            yield Seed(f"rejection, budget {budget:g}", name, seed, **grid.judge(accepted, cost))


def as_published(
    plan: Plan, data: Tensor, way: Way, seed: int
) -> tuple[Distribution, list[dict[str, Any]]]:
    """The paper's estimator: no annealing, no anchor of likelihood, no guard.

    It begins with as much maximum likelihood as the others, on the same critic.

    Source: Verine et al. (2023), arXiv 2302.00628, algorithm 1.
    """
    half = plan.steps // 2
    start = fit_to_samples(
        plan.flow, data, KL(), steps=half, seed=seed, method=Method(batch=plan.batch)
    )
    flow, scaled = start.flow.flow, start.flow
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        ratio = Critic().build((2,), 0, math.log(10 * max(HIGH, 1 / HIGH)))

    def objective(moment: Moment) -> Tensor:
        rows = data[torch.randint(len(data), (plan.batch,))]
        value = flow().rsample((plan.batch,))
        moment.log(critic=ratio.update(scaled.standardise(rows), value.detach()))
        return along_path(way.divergence, ratio(value)).mean()

    every = max(25, plan.steps // 25)
    done = train(flow, objective, steps=plan.steps - half, lr=2e-3, seed=seed, every=every)
    return scaled(), done.history

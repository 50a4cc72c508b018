"""Digits: precision and recall by neighbours, in the pixels and in unseen features."""

import math
import statistics
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
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
from rkl.extras import optional_import
from rkl.fit import Fit, Method, distil_rejection, fit_to_samples, reject
from rkl.flows import Coupling, Critic, latent
from rkl.flows.architectures import Architecture
from rkl.flows.critic import Ratio
from rkl.metrics.neighbours import prdc
from rkl.readers import read as read_file
from rkl.studies.precision_recall.ring import Way
from rkl.studies.precision_recall.rows import ML, Pair, Seed

SELDOM = 20  # pictures in which a pixel must be more than 0, for the flow to have it
MOST = 10_000  # draws at a time, which fit the memory
SETS = 3  # of draws of each distribution, as many in each as there are real ones
SHOWN = 36  # pictures kept
COMPONENTS = 20  # principal ones, of the pixels
OF_FEATURES = "critic of features"
OF_PIXELS = "critic"
K = 3  # neighbour that a ball reaches to
AXES = {
    f"{space}: precision and recall": (f"{space}: recall", f"{space}: precision")
    for space in ("features", "components")
}
DRAWN = (
    (ML, "none"),
    ("real against real", "none"),
    ("latent temperature 0.7", "none"),
    ("rejection, budget 10", OF_FEATURES),
    ("PrecisionHalf(1), no guard", "critic"),
    ("distilled, budget 4", OF_FEATURES),
)
READING = (
    "Precision is the share of draws inside a ball about a real picture, recall the share of "
    "real pictures inside a ball about a draw: once in the last hidden layer of a classifier, "
    "once in the first principal components of the pixels. A critic of pixels has not seen the "
    "former, a critic of features not the latter. The real pictures that count are "
    "none that anything was trained on; “real against real” has as many that it was.\n\n"
    "Fits take the same number of steps and end with their last parameters, but for two. “Stopped "
    "early” is maximum likelihood where held-out likelihood was highest; a fit not said to be "
    "without its guard keeps the parameters by which it gained most over its start, as its "
    "critics have it. What is distilled takes as many steps again: the flow of maximum likelihood "
    "learns to draw what the critic of features accepts of it; at budget 1 that is all, which "
    "shows what the steps alone do."
)


@dataclass(frozen=True)
class Plan:
    """The sizes of the part.

    Args:
        data: IDX file of images, or none for the digits of scikit-learn.
        levels: Number of grey levels; none for all 256.
        flow: Architecture of the flow.
        ways: Ways to fit it, beside maximum likelihood.
        critic: Settings of the critic.
        critic_steps: Steps of the critic of features.
        seeds: Number of fits of each.
        steps: Steps of every fit.
        batch: Pictures in a step.
        lr: Highest learning rate.
        most: Real pictures to compare draws with, not trained on; and number of draws.
        budgets: Budgets of rejection for the flow of maximum likelihood, in draws per sample.
        temperatures: Temperatures of its latents.
        bounds: Bounds of its latents, in standard deviations.
        distilled: Budgets at which rejection is distilled into it.
    """

    data: str | None = None
    levels: int | None = None
    flow: Architecture = Coupling(transforms=8, hidden=(128, 128))  # noqa: RUF009
    ways: tuple[Way, ...] = tuple(
        Way(it, exact=False, guard=False)
        for it in (
            PrecisionHalf(lam=1.0),
            PrecisionHalf(lam=3.0),
            PrecisionRecall(lam=3.0),
            RecallHalf(lam=1.0),
            ReverseKL(),
            JensenShannon(),
            PearsonChiSquare(),
        )
    ) + (Way(PrecisionHalf(lam=1.0), exact=False),)
    critic: Critic = Critic(hidden=(128, 128), lr=1e-3)  # noqa: RUF009
    critic_steps: int = 600
    seeds: int = 3
    steps: int = 800
    batch: int = 256
    lr: float = 2e-3
    most: int = 600
    budgets: tuple[float, ...] = (2.0, 4.0, 10.0)
    temperatures: tuple[float, ...] = (0.85, 0.7)
    bounds: tuple[float, ...] = (2.0,)
    distilled: tuple[float, ...] = (1.0, 4.0)


# Of 256 levels the flow learns the noise of empty paper, and no digits in the time there is.
MNIST = Plan(
    levels=8,
    flow=Coupling(transforms=8, hidden=(256, 256)),
    critic=Critic(hidden=(64, 64), lr=1e-3),
    ways=(Way(PrecisionHalf(lam=1.0), exact=False, guard=False),),
    steps=400,
    most=1000,
    budgets=(10.0,),
    distilled=(1.0, 4.0),
)


@dataclass(frozen=True)
class Pictures:
    """Pictures in whole grey levels, with their classes.

    Attributes:
        values: The pictures, or the pixels of them that vary.
        classes: Class of each picture.
        side: Side of a picture, in pixels.
        places: Places of the values among the pixels of a picture.
    """

    values: Int[Tensor, "rows *event"]
    classes: Int[Tensor, " rows"]
    side: int
    places: Int[Tensor, " pixels"]

    def split(self, count: int, seed: int) -> tuple["Pictures", "Pictures"]:
        """Pictures to measure by, and the others, at random."""
        order = torch.randperm(len(self.values), generator=torch.Generator().manual_seed(seed))
        first, other = (
            replace(self, values=self.values[it], classes=self.classes[it])
            for it in (order[:count], order[count:])
        )
        return first, other

    def montage(self, values: Tensor) -> list:
        """A few of the values as pictures."""
        canvas = torch.zeros(min(SHOWN, len(values)), self.side**2)
        canvas[:, self.places] = values[:SHOWN].flatten(1).to(canvas.dtype)
        return canvas.reshape(-1, self.side, self.side).tolist()


def read(plan: Plan) -> Pictures:
    """The pictures of a plan.

    Raises:
        ImportError: scikit-learn is not installed.
        FileNotFoundError: There is no such IDX file, or none of its labels beside it.
    """
    if plan.data is None:
        return _digits()
    pictures = _idx(Path(plan.data))
    if plan.levels is None:
        return pictures
    return replace(pictures, values=pictures.values * plan.levels // 256)


@cache
def _digits() -> Pictures:
    with optional_import("The study of digits"):
        from sklearn.datasets import load_digits  # pyright: ignore[reportMissingImports]
    digits: Any = load_digits()
    values = torch.from_numpy(digits.data).long()
    places = ((values > 0).sum(0) >= SELDOM).nonzero().flatten()
    return Pictures(values[:, places], torch.from_numpy(digits.target).long(), 8, places)


@cache
def _idx(path: Path) -> Pictures:
    labels = path.with_name(path.name.replace("images-idx3", "labels-idx1"))
    if labels == path or not labels.is_file():
        raise FileNotFoundError(
            f"data: {path} must be named ...images-idx3..., with ...labels-idx1... beside it."
        )
    values, classes = (
        torch.from_numpy(read_file(it).values.astype("int64")) for it in (path, labels)
    )
    if values.ndim != 3 or values.shape[1] != values.shape[2] or len(classes) != len(values):
        raise ValueError(
            f"data: {path} must hold square pictures, each with its label; got "
            f"{list(values.shape)} and {len(classes)} labels."
        )
    side = values.shape[-1]
    return Pictures(values, classes, side, torch.arange(side**2))


class Spaces:
    """Real pictures in both spaces of features, and comparisons with them.

    Args:
        judges: Pictures to compare with, not trained on.
        others: Training pictures of flows, critics and the classifier.
        seed: Seed of the noise and of the classifier.
    """

    def __init__(self, judges: Pictures, others: Pictures, seed: int):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.real = spread(judges.values)
            self.rest = spread(others.values[: len(self.real)])
            self.levels = float(others.values.max()) + 1
            self.features = self._classifier(others)
        pixels = self.real.flatten(1)
        self.centre = pixels.mean(0)
        self.axes = torch.linalg.svd(pixels - self.centre, full_matrices=False)[2][:COMPONENTS]

    def _classifier(self, pictures: Pictures) -> nn.Module:
        size, classes = len(pictures.places), int(pictures.classes.max()) + 1
        hidden = nn.Linear(size, 64), nn.SiLU(), nn.Linear(64, 32), nn.SiLU()
        model = nn.Sequential(nn.Flatten(1), *hidden, nn.Linear(32, classes))
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
        for _ in range(500):
            rows = torch.randint(len(pictures.values), (256,))
            x = spread(pictures.values[rows]) / self.levels
            loss = nn.functional.cross_entropy(model(x), pictures.classes[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return model[:-1].requires_grad_(False)

    def in_both(self, values: Tensor) -> dict[str, Tensor]:
        """The values in both spaces: features and components."""
        values = values.to(self.real.dtype)
        components = (values.flatten(1) - self.centre) @ self.axes.T
        return {"features": self.of(values), "components": components}

    def of(self, values: Tensor) -> Tensor:
        """The features, on a scale of about 1."""
        return self.features(values.to(self.real.dtype) / self.levels)

    def critic(self, plan: Plan, pictures: Pictures, law: Distribution, seed: int) -> Ratio:
        """A critic of pictures against draws, by their features."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            count = min(4 * len(pictures.values), MOST)
            drawn = self.of(law.sample(torch.Size([count])).detach())
            ratio = plan.critic.build(drawn.shape[1:], 0, math.log(100))
            for step in range(plan.critic_steps):
                rows = torch.randint(len(pictures.values), (plan.batch,))
                real = self.of(spread(pictures.values[rows]))
                fake = drawn[torch.randint(len(drawn), (plan.batch,))]
                ratio.update(real, fake, lr=1 - step / plan.critic_steps)
        return ratio.requires_grad_(False)

    def compare(self, sets: Sequence[Tensor]) -> dict[str, Pair]:
        """Precision and recall of sets of draws of one distribution, averaged."""
        pairs: dict[str, list[Pair]] = {}
        real = self.in_both(self.real)
        for fake in map(self.in_both, sets):
            for space in real:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "in high dimension")
                    scores = prdc(real=real[space], fake=fake[space], k=K)
                for name in ("precision", "recall"):
                    value, error = getattr(scores, name)
                    pair = value.item(), error.item()
                    pairs.setdefault(f"{space}: {name}", []).append(pair)
        mean = statistics.fmean  # the sets have the real ones in common: errors do not average out
        return {
            name: (mean(value for value, _ in it), mean(error for _, error in it))
            for name, it in pairs.items()
        }


def spread(values: Int[Tensor, "rows *event"]) -> Float[Tensor, "rows *event"]:
    """Grey levels with uniform noise of one level, as flows are fitted to them."""
    return values + torch.rand(values.shape)


def run(plan: Plan, seed: int) -> Iterator[Seed]:
    """All distributions of one seed with their scores; maximum likelihood comes first."""
    judges, pictures = read(plan).split(plan.most, seed)
    spaces = Spaces(judges, pictures, seed)
    judge = _Judge(plan, pictures, spaces, seed)
    fitted = _fit(plan, pictures.values, KL(), seed, guard=False)
    yield judge.distribution((ML, "none"), fitted.flow(), fitted.history)
    best = _fit(plan, pictures.values, KL(), seed)
    yield judge.distribution((f"{ML}, stopped early", "none"), best.flow(), best.history)
    ceiling, shown = spaces.compare([spaces.rest]), pictures.montage(spaces.rest)
    yield Seed("real against real", "none", seed, ceiling, samples=shown)
    for t in plan.temperatures:
        yield judge.distribution(
            (f"latent temperature {t:g}", "none"), latent(fitted.flow(), t), []
        )
    for bound in plan.bounds:
        cut = latent(fitted.flow(), bound=bound)
        yield judge.distribution((f"truncation at {bound:g}", "none"), cut, [])
    of_features = spaces.critic(plan, pictures, fitted.flow(), seed)
    critics = {OF_PIXELS: fitted.critic, OF_FEATURES: lambda x, _=None: of_features(spaces.of(x))}
    for name, critic in critics.items():
        for budget in plan.budgets:
            yield judge.reject_by(fitted.flow(), critic, budget, name)
    for budget in plan.distilled:
        how: dict[str, Any] = {"budget": budget, "steps": plan.steps, "batch": plan.batch}
        how |= {"critic": critics[OF_FEATURES], "seed": seed}
        again = distil_rejection(fitted, **how)
        name = f"distilled, budget {budget:g}", OF_FEATURES
        yield judge.distribution(name, again.flow(), again.history)
    for way in plan.ways:
        fitted = _fit(plan, pictures.values, way.divergence, seed, way.guard)
        yield judge.distribution((way.method, way.ratio), fitted.flow(), fitted.history)


def _fit(
    plan: Plan, values: Tensor, divergence: FDivergence, seed: int, guard: bool = True
) -> Fit:
    how: dict[str, Any] = {"critic": plan.critic, "batch": plan.batch, "lr": plan.lr}
    method = Method(draws=1024, guard=guard, **how)
    how = {"steps": plan.steps, "seed": seed, "method": method, "dequantise": True}
    with_critic = not guard and divergence == KL()
    return fit_to_samples(plan.flow, values, divergence, with_critic=with_critic, **how)


def _accept(law: Distribution, critic: Any, budget: float, count: int) -> tuple[Tensor, float]:
    if budget == 1:
        return law.sample(torch.Size([count])).detach(), 1.0
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "budget=.* buys nothing")  # then it costs less
        accepted = reject(law, critic, n=count, budget=budget)
    return accepted.samples, accepted.cost


class _Judge:
    """Scores of draws from a distribution, compared with the real pictures."""

    def __init__(self, plan: Plan, pictures: Pictures, spaces: Spaces, seed: int):
        self.plan, self.pictures, self.spaces, self.seed = plan, pictures, spaces, seed

    def distribution(self, way: tuple[str, str], law: Distribution, history: list) -> Seed:
        """Scores at one draw per sample."""
        size = len(self.spaces.real)
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(self.seed)
            return self._seed(way, law.sample(torch.Size([SETS * size])), 1.0, history)

    def reject_by(self, law: Distribution, critic: Any, budget: float, ratio: str) -> Seed:
        """Scores after rejection by a critic, at the cost of the budget."""
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            drawn, cost = _accept(law, critic, budget, SETS * len(self.spaces.real))
        return self._seed((f"rejection, budget {budget:g}", ratio), drawn, cost, [])

    def _seed(self, way: tuple[str, str], drawn: Tensor, cost: float, history: list) -> Seed:
        figures = self.spaces.compare(list(drawn.tensor_split(SETS)))
        figures["cost"] = cost, 0.0
        return Seed(
            *way, self.seed, figures, samples=self.pictures.montage(drawn), history=history
        )

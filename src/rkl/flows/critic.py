"""A critic: a network that learns log p/q from samples of both."""

import copy
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rkl.checks import number
from rkl.divergences import FDivergence, JensenShannon
from rkl.estimators import variational_bound
from rkl.flows.architectures.splines import check_sizes
from rkl.flows.standardise import Units
from rkl.flows.weights import bends_everywhere
from rkl.runs.progress import Progress

FORGETS = 0.9  # decay of the running normaliser
FEWEST_LESSONS = 300  # from which a critic in a few coordinates begins to be of use
SMALLEST_IMAGE = 8  # sides below which an image is read as a vector
FEW = 8  # coordinates up to which waves of them help, and do not yet overfit
WAVES = 2.0, 4.0  # per standard deviation: a plain network learns narrow modes ten times slower


@dataclass(frozen=True)
class Critic:
    """Settings of a critic: a network that maximises the variational bound of a divergence.

    The bound of any auxiliary divergence is tight where the score is log p/q, whatever the flow
    is trained for. Do not take PrecisionRecall: its slope vanishes
    wherever the critic is on the right side of λ, and it stops learning there.

    Args:
        hidden: Widths of the hidden layers.
        divergence: Auxiliary f-divergence whose bound is maximised.
        lr: Learning rate.
        updates: Steps of the critic for each step of the flow.
        lessons: Steps at the end of a fit that is asked for an operating point, or three times
            those of the fit where they are fewer, but at least 300; half as many for the second
            critic, which judges the first.
        flat: Whether to allow a divergence whose bound has no slope at some ratios.
    """

    hidden: tuple[int, ...] = (64, 64, 64)
    divergence: FDivergence = JensenShannon()  # noqa: RUF009
    lr: float = 3e-3
    updates: int = 1
    lessons: int = 3000
    flat: bool = False

    def __post_init__(self):
        check_sizes(self.hidden, updates=self.updates, lessons=self.lessons)
        number("lr", self.lr, above=0)
        if not isinstance(self.divergence, FDivergence):
            raise TypeError(f"divergence must be an f-divergence; got {self.divergence!r}.")
        if not self.flat and not bends_everywhere(self.divergence):
            raise ValueError(
                f"divergence: a critic cannot learn from the dual of {self.divergence}: its slope "
                "vanishes at whole ranges of the ratio, where the critic then stays wrong. Train "
                "it on another, such as JensenShannon(), which serves any divergence of the "
                "flow; or say flat=True."
            )

    def lessons_after(self, steps: int) -> int:
        """Steps of the critic after a fit of ``steps``: at most three times those, or 300.

        A fit of seconds does not spend a minute on its critic.
        """
        return min(self.lessons, max(FEWEST_LESSONS, 3 * steps))

    def build(self, event_shape: tuple[int, ...], conditions: int, bound: float) -> "Ratio":
        """A critic of events of this shape, its log-ratios cut off at ± bound nats."""
        return Ratio(self, event_shape, conditions, bound)


class Ratio(nn.Module):
    """log p/q as a critic has learnt it, normalised so that E_q[p/q] = 1, and cut off."""

    log_normaliser: Tensor

    def __init__(
        self, chosen: Critic, event_shape: tuple[int, ...], conditions: int, bound: float
    ):
        super().__init__()
        self.chosen, self.event_shape, self.bound = chosen, torch.Size(event_shape), bound
        features = _features(event_shape, chosen.hidden[0])
        with torch.no_grad():
            size = features(torch.zeros(1, *event_shape)).shape[1]
        self.features = features
        self.head = _head(size + conditions, chosen.hidden)
        self.register_buffer("log_normaliser", torch.zeros(()))
        self.optimizer = torch.optim.Adam(self.parameters(), lr=chosen.lr, betas=(0.5, 0.99))

    def score(
        self,
        value: Float[Tensor, "batch *event"],
        condition: Float[Tensor, "batch conditions"] | None = None,
    ) -> Float[Tensor, " batch"]:
        """Output of the network, before it is normalised and cut off."""
        inside = self.features(value)
        inside = inside if condition is None else torch.cat([inside, condition], 1)
        return self.head(inside).squeeze(1)

    def forward(
        self,
        value: Float[Tensor, "batch *event"],
        condition: Float[Tensor, "batch conditions"] | None = None,
    ) -> Float[Tensor, " batch"]:
        """Log p(x) − log q(x) in nats."""
        return self.cut_off(self.score(value, condition) - self.log_normaliser)

    def cut_off(self, log_ratio: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Log-ratios within ± bound; larger ones are guesses, and would bias the gradient."""
        return log_ratio.clamp(-self.bound, self.bound)

    def update(
        self,
        p: Float[Tensor, "batch *event"],
        q: Float[Tensor, "batch *event"],
        condition: Float[Tensor, "batch conditions"] | None = None,
        lr: float = 1.0,
    ) -> Float[Tensor, ""]:
        """One step up the bound, from events of p and of q under the same conditions.

        Args:
            p: Events of p, data.
            q: Events of q, draws of the flow.
            condition: Their conditions.
            lr: Share of the learning rate to take.

        Returns:
            The bound in nats, before the step.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr * self.chosen.lr
        both = torch.cat([p, q])
        given = None if condition is None else torch.cat([condition, condition])
        score_p, score_q = self.score(both, given).split([len(p), len(q)])
        bound = variational_bound(self.chosen.divergence, score_p=score_p, score_q=score_q)
        self.optimizer.zero_grad()
        (-bound).backward()
        if bool(bound.isfinite()):
            self.optimizer.step()
        new = score_q.detach().logsumexp(0) - math.log(len(q))
        self.log_normaliser.lerp_(new, 1 - FORGETS)
        return bound.detach()


def lessons(name: str, count: int, seconds: float = math.inf) -> Iterator[float]:
    """The progress in [0, 1) before each of ``count`` steps of a critic, or for the seconds given.

    Shows the progress.
    """
    began, step, progress = time.perf_counter(), 0, 0.0
    with Progress(name, 1, share=True) as shown:
        while progress < 1:
            yield progress
            step += 1
            progress = max(step / count, (time.perf_counter() - began) / max(seconds, 1e-9))
            shown.update(progress, words=f"step {step}")


class ScaledCritic(nn.Module):
    """The critic in the user's units; a ratio has none.

    Args:
        ratio: The critic of standardised events.
        units: The standardisation.
    """

    def __init__(self, ratio: Ratio, units: Units):
        super().__init__()
        self.ratio, self.units = ratio, copy.deepcopy(units)

    def forward(self, value: Tensor, condition: Tensor | None = None) -> Tensor:
        """Log p(x) − log q(x) in nats, of [*batch, *event]."""
        inner = self.units.encode(value)[0].to(self.ratio.log_normaliser.dtype)
        batch = inner.shape[: inner.ndim - len(self.ratio.event_shape)]
        if condition is not None:
            condition = condition.expand(*batch, condition.shape[-1]).flatten(0, -2)
        log_ratio = self.ratio(inner.reshape(-1, *self.ratio.event_shape), condition)
        return log_ratio.reshape(batch)


def _head(inputs: int, hidden: tuple[int, ...]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in zip((inputs, *hidden), hidden, strict=False):
        layers += [nn.Linear(before, after), nn.SiLU()]
    return nn.Sequential(*layers, nn.Linear(hidden[-1], 1))


class _Waves(nn.Module):
    """Standardised coordinates with sines and cosines of them."""

    def forward(self, value: Tensor) -> Tensor:
        value = value.flatten(1)
        waves = [wave(rate * value) for rate in WAVES for wave in (torch.sin, torch.cos)]
        return torch.cat([value, *waves], 1)


def _features(event_shape: tuple[int, ...], width: int) -> nn.Module:
    if len(event_shape) > 1 and min(event_shape[-2:]) >= SMALLEST_IMAGE:
        return _convolutions(event_shape, width)
    return _Waves() if math.prod(event_shape) <= FEW else nn.Flatten(1)


def _convolutions(event_shape: tuple[int, ...], width: int) -> nn.Sequential:
    """Two halvings of an image, [channels, height, width] or without channels."""
    channels = event_shape[0] if len(event_shape) == 3 else 1
    shaped = nn.Identity() if len(event_shape) == 3 else nn.Unflatten(1, (1, event_shape[0]))
    return nn.Sequential(
        shaped,
        nn.Conv2d(channels, width // 4, 3, stride=2, padding=1),
        nn.SiLU(),
        nn.Conv2d(width // 4, width // 2, 3, stride=2, padding=1),
        nn.SiLU(),
        nn.Flatten(1),
    )

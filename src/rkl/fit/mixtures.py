"""Mixtures of Gaussians as the start of flows of few rows, chosen by BIC.

From a Gaussian start a flow cannot learn clusters from few rows: a mixture has fewer parameters.
Its components are those of EM or, if rows have classes, the classes.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rkl.flows.architectures.mixture import MixtureStart, latent_map
from rkl.flows.rows import Data
from rkl.flows.standardise import Units
from rkl.randomness import random_numbers

Kind = Literal["full", "tied", "diag"]
KINDS: tuple[Kind, ...] = ("full", "tied", "diag")
MAX_COMPONENTS = 8
MAX_SWEEPS = 200  # of EM
SETTLED = 1e-3  # nats a row, by which a sweep of EM gains where it has converged
STARTS = 5  # of EM, each from other rows
NEAR = 0.3  # nats a row, by which runs of EM that are averaged are less likely than the best
SHRUNK = 0.2  # rows with the covariance within components that each of them is given
FLOOR = 1e-4  # share of the variance of a column that it has within each component at least
MAX_COLUMNS = 64
TRIED = 2  # numbers of components without a gain, after which no more are tried


@dataclass(frozen=True)
class Mixture:
    """A mixture of Gaussians; with classes, one component for the events of each class.

    Attributes:
        log_weight: Logarithms of the weights of the components.
        mean: Mean of each.
        root: Cholesky factor of the covariance of each.
        kind: Form of the covariances: any, the same for all, or diagonal.
        of_classes: Whether the components are the classes.
    """

    log_weight: Float[Tensor, " components"]
    mean: Float[Tensor, "components columns"]
    root: Float[Tensor, "components columns columns"]
    kind: Kind
    of_classes: bool = False

    def __len__(self) -> int:
        return len(self.mean)

    @property
    def numbers(self) -> int:
        """Number of free parameters."""
        count, size = self.mean.shape
        square = size * (size + 1) // 2
        spread = {"full": count * square, "tied": square, "diag": count * size}[self.kind]
        return spread + count * size + (0 if self.of_classes else count - 1)

    def log_parts(self, rows: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows components"]:
        """The log-density of each component."""
        away = (rows[:, None] - self.mean).permute(1, 2, 0)
        inner = torch.linalg.solve_triangular(self.root, away, upper=False)
        size = self.root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        constant = rows.shape[1] / 2 * math.log(2 * math.pi)
        return -inner.square().sum(1).T / 2 - size - constant

    def log_prob(
        self,
        rows: Float[Tensor, "rows columns"],
        condition: Float[Tensor, "rows conditions"] | None = None,
    ) -> Float[Tensor, " rows"]:
        """The log-density; of rows with classes, that of their class."""
        weight = self.log_weight if not self.of_classes or condition is None else condition.log()
        return (self.log_parts(rows) + weight).logsumexp(1)

    def transform(self, matrix: Float[Tensor, "columns columns"]) -> "Mixture":
        """The mixture of the images of its events under a linear map."""
        root = torch.linalg.cholesky(matrix @ self.root @ self.root.mT @ matrix.T)
        return Mixture(self.log_weight, self.mean @ matrix.T, root, self.kind, self.of_classes)


def begin_as_mixture(
    flow: nn.Module, training: Data, held_out: Data, units: Units, seed: int
) -> tuple[nn.Module, Units]:
    """The flow with a mixture for its latents, and its units, if a mixture is better.

    Better than a Gaussian of the rows in the given units: by BIC, and on held-out rows.
    Units with and without bends are tried.
    """
    size = training.values[0].numel()
    if len(training.event_shape) != 1 or not 1 < size <= MAX_COLUMNS:
        return flow, units
    given = () if training.condition is None else (training.condition[:1],)
    with torch.no_grad():
        to_latents = latent_map(flow(*given))
    if to_latents is None:
        return flow, units
    with random_numbers(seed):
        rows, judges = training.spread(), held_out.spread()
    plain = units if units.bending is None else Units.of_rows(training, bend=False)
    least, best = _gaussian_bic(units, rows), None
    for one in {id(it): it for it in (units, plain)}.values():
        inner, log_slope = _in_spread_units(one, rows)
        candidate = best_mixture(inner, rows.condition, seed)
        if candidate is None:
            continue
        cost = (
            candidate[1] - log_slope.sum().item() + _numbers_of_bend(one) * math.log(len(rows)) / 2
        )
        if cost < least:
            least, best = cost, (one, candidate[0])
    if best is None or (len(best[1]) == 1 and best[1].kind != "diag"):  # what it begins as anyway
        return flow, units
    chosen, mixture = best
    inner, log_slope = _in_spread_units(chosen, judges)
    density = mixture.log_prob(inner, judges.condition) + log_slope
    if density.mean() < units.gaussian(judges.values).mean():
        return flow, units
    mix = _matrix(chosen.mix)
    mixture = mixture.transform(to_latents if mix is None else to_latents @ mix)
    mixture = mixture if mixture.of_classes else _with_outliers(mixture, len(rows))
    kind = next(flow.parameters()).dtype
    log_weight, mean, root = (
        it.to(kind) for it in (mixture.log_weight, mixture.mean, mixture.root)
    )
    return MixtureStart(flow, log_weight, mean, root, mixture.of_classes), chosen


def _with_outliers(mixture: Mixture, rows: int) -> Mixture:
    """The mixture with the Gaussian of all standardised rows added, at the weight of one row.

    Without it the density of a row far from every component is arbitrarily low.
    """
    shares = torch.tensor([rows / (rows + 1), 1 / (rows + 1)], dtype=torch.float64).log()
    log_weight = torch.cat([mixture.log_weight + shares[0], shares[1:]])
    mean = torch.cat([mixture.mean, torch.zeros_like(mixture.mean[:1])])
    root = torch.cat([mixture.root, torch.eye(mean.shape[1]).to(mixture.root)[None]])
    return Mixture(log_weight, mean, root, "full")


def _in_spread_units(units: Units, rows: Data) -> tuple[Tensor, Tensor]:
    """Events bent and in units of their spread, but with their correlations; and log slopes."""
    inner, log_slope = units.encode(rows.values)
    mix, inner = _matrix(units.mix), inner.double()
    log_slope = log_slope.double().expand(len(inner))
    if mix is None:
        return inner, log_slope
    return inner @ torch.linalg.inv(mix).T, log_slope - torch.linalg.slogdet(mix)[1]


def _matrix(mix: object) -> Tensor | None:
    return mix.double() if isinstance(mix, Tensor) else None


def _gaussian_bic(units: Units, rows: Data) -> float:
    size = rows.values.shape[1]
    numbers = size + size * (size + 1) // 2 + _numbers_of_bend(units)
    return numbers * math.log(len(rows)) / 2 - units.gaussian(rows.values).sum().item()


def _numbers_of_bend(units: Units) -> int:
    return 0 if units.bending is None else 2 * int(units.bending.bent.sum())


def best_mixture(
    rows: Float[Tensor, "rows columns"],
    condition: Float[Tensor, "rows conditions"] | None,
    seed: int,
) -> tuple[Mixture, float] | None:
    """The mixture of least BIC and that, in nats; None where nothing can be fitted.

    Of the number of components and the kind of covariances that are best, runs of EM that are
    nearly as likely are averaged: which of several maxima a run ends in is chance, and their mean
    has the better density on new rows.
    """
    best, least = None, math.inf
    for runs in _candidates(rows, condition, seed):
        densities = [it.log_prob(rows, condition) for it in runs]
        cost = min(bic(it, density) for it, density in zip(runs, densities, strict=True))
        if cost < least:
            best, least = _average(runs, [it.mean().item() for it in densities]), cost
    return None if best is None else (best, least)


def _candidates(rows: Tensor, condition: Tensor | None, seed: int) -> Iterator[list[Mixture]]:
    if condition is not None:
        if condition.shape[1] > 1 and (condition.sum(0) > 0).all():
            share = condition.to(rows)
            yield from ([_moments(rows, share, kind, of_classes=True)] for kind in KINDS)
        return
    for kind in KINDS if len(rows) >= 2 * (rows.shape[1] + MAX_COMPONENTS) else KINDS[-1:]:
        least, worse = math.inf, 0
        for count in range(1, MAX_COMPONENTS + 1):
            runs = _runs(rows, count, kind, seed)
            yield runs
            cost = min(bic(it, it.log_prob(rows)) for it in runs)
            least, worse = (cost, 0) if cost < least else (least, worse + 1)
            if worse == TRIED:
                break


def _average(runs: list[Mixture], densities: list[float]) -> Mixture:
    """The mean of the mixtures that are nearly as likely as the best, each maximum once."""
    best = max(densities)
    near = [i for i, one in enumerate(densities) if one > best - NEAR]
    first = {i: next(j for j in near if abs(densities[j] - densities[i]) < SETTLED) for i in near}
    apart = sorted(set(first.values()))
    if len(apart) == 1:
        return runs[apart[0]]
    weight = {i: list(first.values()).count(i) / len(near) for i in apart}
    log_weight = torch.cat([runs[i].log_weight + math.log(weight[i]) for i in apart])
    mean, root = (torch.cat([getattr(runs[i], it) for i in apart]) for it in ("mean", "root"))
    return Mixture(log_weight, mean, root, runs[0].kind)


def bic(mixture: Mixture, log_density: Float[Tensor, " rows"]) -> float:
    """Schwarz's criterion in nats; less is better."""
    return mixture.numbers * math.log(len(log_density)) / 2 - log_density.sum().item()


def _runs(rows: Tensor, count: int, kind: Kind, seed: int) -> list[Mixture]:
    generator = torch.Generator().manual_seed(seed)
    return [_run(rows, count, kind, generator) for _ in range(STARTS if count > 1 else 1)]


def _run(rows: Tensor, count: int, kind: Kind, generator: torch.Generator) -> Mixture:
    mixture, last = _moments(rows, _nearest(rows, count, generator), kind), -math.inf
    for _ in range(MAX_SWEEPS - 1):
        joint = mixture.log_parts(rows) + mixture.log_weight
        density = joint.logsumexp(1)
        share, now = (joint - density[:, None]).exp(), density.mean().item()
        if now - last < SETTLED:
            break
        mixture, last = _moments(rows, share, kind), now
    return mixture


def _nearest(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """One-hot nearest centre of each row [rows, count], for centres far from each other.

    Source: Arthur and Vassilvitskii (2007), k-means++.
    """
    index = [int(torch.randint(len(rows), (), generator=generator))]
    distance = (rows - rows[index[0]]).square().sum(1)
    for _ in range(count - 1):
        weight = distance if distance.sum() > 0 else torch.ones_like(distance)
        index.append(int(torch.multinomial(weight, 1, generator=generator)))
        distance = torch.minimum(distance, (rows - rows[index[-1]]).square().sum(1))
    nearest = torch.cdist(rows, rows[index]).argmin(1)
    return torch.nn.functional.one_hot(nearest, count).to(rows)


def _moments(rows: Tensor, share: Tensor, kind: Kind, of_classes: bool = False) -> Mixture:
    """The mixture whose components have the moments of their shares of the rows [rows, count].

    Each covariance is shrunk a little to that within all components, and none is singular.

    Source: Friedman (1989), J. Am. Stat. Assoc. 84, 165.
    """
    number = share.sum(0).clamp_min(1e-9)
    mean = share.T @ rows / number[:, None]
    away = rows[:, None] - mean
    if kind == "diag":
        scatter = torch.einsum("nk,nkd->kd", share, away.square()).diag_embed()
    else:
        scatter = torch.einsum("nk,nkd,nke->kde", share, away, away)
    within = scatter.sum(0) / number.sum()
    covariance = (scatter + SHRUNK * within) / (number + SHRUNK)[:, None, None]
    covariance = within.expand_as(covariance) if kind == "tied" else covariance
    root = torch.linalg.cholesky(covariance + FLOOR * rows.var(0, correction=0).diag())
    return Mixture((number / number.sum()).log(), mean, root, kind, of_classes)

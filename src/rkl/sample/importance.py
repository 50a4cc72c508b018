"""Log Z, expectations, free energy and entropy from the log-ratios of a flow's draws."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rkl.checks import floats, integer
from rkl.stats import Mean, pareto_k, to_json
from rkl.tables import Table, table_of

HEAVY = 0.7  # Pareto k above which neither a mean nor its error can be trusted
LIGHT = 20.0  # means that the largest term of a mean must reach before its tail can be judged
MIN_NORMAL_SITES = 16  # sites from which log-weights are sums of many terms, and so about normal
APART = (
    0.03  # allowed deviation of acceptance or ESS from normal weights, beyond 4 standard errors
)


@dataclass(frozen=True)
class Importance:
    r"""Quality of a proposal q for a target p, from log p(x) − log q(x) at draws x of q.

    If log-weights are normal with variance s², as sums over many sites are, the effective share
    is exp(−s²) and independent Metropolis accepts erfc(s/2). If the measured values differ,
    the weights have a heavy tail, or q lacks some of p; ``warnings`` then has a sentence. None
    of it detects a mode that q never draws; see :mod:`rkl.sample.coverage`.

    Attributes:
        log_z: log of the mean weight, in nats, [\*conditions].
        ess: Effective share of the draws, in (0, 1], [\*conditions].
        acceptance: E min(1, w′/w) over independent pairs, the acceptance of a long chain.
        variance: Variance s² of the log-weights under q, in nats².
        tail: Pareto k of the large weights, 0 at most where the largest is below 20 means; above
            0.7 nothing here can be trusted.
        sites: Number of sites that s² is divided by.
        draws: Number of draws for each condition.
    """

    log_z: Mean
    ess: Mean
    acceptance: Mean
    variance: Mean
    tail: Float[Tensor, "*conditions"]
    sites: int
    draws: int

    @property
    def v(self) -> Mean:
        """Variance of the log-weights per site, which does not depend on the lattice's size."""
        return Mean(self.variance.value / self.sites, self.variance.error / self.sites)

    @property
    def predicted_ess(self) -> Float[Tensor, "*conditions"]:
        """exp(−s²), the effective share of normal log-weights."""
        return (-self.variance.value).exp()

    @property
    def predicted_acceptance(self) -> Float[Tensor, "*conditions"]:
        """erfc(s/2), the acceptance of normal log-weights."""
        return torch.special.erfc(self.variance.value.sqrt() / 2)

    @property
    def warnings(self) -> list[str]:
        """Reasons not to trust the figures, a sentence each; none if log-weights look normal."""
        sentences = []
        predictions = (
            ("acceptance", self.acceptance, self.predicted_acceptance),
            ("ESS", self.ess, self.predicted_ess),
        )
        for name, measured, predicted in predictions if self.sites >= MIN_NORMAL_SITES else ():
            apart = (measured.value - predicted).abs()
            wrong = ~(apart <= APART + 4 * measured.error)
            if wrong.any():
                k = int(torch.where(wrong, apart.nan_to_num(math.inf), -1).flatten().argmax())
                sentences.append(
                    f"{name} departs from the law of normal log-weights under "
                    f"{int(wrong.sum())} of {wrong.numel()} conditions, at worst "
                    f"{measured.value.flatten()[k]:.3f} for {predicted.flatten()[k]:.3f}: heavy "
                    "tails, or a part of the target that the flow lacks."
                )
        heavy = self.tail > HEAVY
        if heavy.any():
            sentences.append(
                f"the weights have a Pareto k of up to {self.tail.max():.2f} under "
                f"{int(heavy.sum())} of {heavy.numel()} conditions: above {HEAVY} neither figures "
                "nor errors can be trusted."
            )
        return sentences

    def table(self) -> Table:
        """The figures under each condition, with the reasons not to trust them."""
        figures = {
            "log Z (nats)": self.log_z,
            "effective share": self.ess,
            "acceptance": self.acceptance,
            "variance of log-weights per site (nats²)": self.v,
            "Pareto-k": self.tail,
        }
        title = f"Weights of {self.draws:,} draws under each condition"
        return table_of(title, figures, self.warnings, counted="condition")

    def __str__(self) -> str:
        return str(self.table())

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()

    def to_dict(self) -> dict[str, Any]:
        """All figures as a dict for JSON."""
        named = {name: to_json(getattr(self, name)) for name in ("log_z", "ess", "acceptance")}
        return named | {
            "v": to_json(self.v),
            "predicted_ess": self.predicted_ess.tolist(),
            "predicted_acceptance": self.predicted_acceptance.tolist(),
            "pareto_k": self.tail.tolist(),
            "draws": self.draws,
            "warnings": self.warnings,
        }


def reweight(log_ratio: Float[Tensor, "*conditions draws"], *, sites: int = 1) -> Importance:
    r"""Measure the draws of a flow by their log-ratios, condition by condition, never pooled.

        log Z = log mean w,   ESS = (mean w)² / mean w²,   w = p/q at independent draws of q

    Errors are those of the delta method.

    Args:
        log_ratio: log p(x) − log q(x) in nats, p up to log Z; −∞ where p has no mass.
        sites: Number of sites, for the variance per site.

    >>> generator = torch.Generator().manual_seed(0)
    >>> log_ratio = 0.5 * torch.randn(100_000, generator=generator, dtype=torch.float64)
    >>> found = reweight(log_ratio)  # s² = 1/4: ESS exp(-1/4), acceptance erfc(1/4)
    >>> round(found.ess.value.item(), 2), round(found.acceptance.value.item(), 2)
    (0.78, 0.72)
    """
    log_ratio = check_log_ratio("log_ratio", log_ratio)
    integer("sites", sites, at_least=1)
    weight, top = _weights(log_ratio)
    log_z = top.squeeze(-1), weight - 1
    ess = 1 / weight.square().mean(-1, keepdim=True)
    centred = log_ratio - log_ratio.mean(-1, keepdim=True)
    variance = centred.square().mean(-1)
    pairs = _pairs(weight)
    acceptance = pairs.mean(-1, keepdim=True)
    return Importance(
        Mean(log_z[0], _error(log_z[1])),
        Mean(ess.squeeze(-1), _error(ess * (2 * weight - ess * weight.square()))),
        Mean(acceptance.squeeze(-1), _error(2 * pairs - acceptance * weight)),
        Mean(variance.nan_to_num(math.inf), _error(centred.square())),
        tail_of(weight, side="upper"),
        sites,
        log_ratio.shape[-1],
    )


def tail_of(
    terms: Float[Tensor, "*columns draws"], *, side: Literal["both", "upper"] = "both"
) -> Float[Tensor, "*columns"]:
    """Pareto k of the terms of a mean; 0 at most where no term is large, as k is noise there.

    Args:
        terms: Contribution of every draw to a mean, or its influence on it.
        side: "upper" where the terms are not negative.
    """
    k = pareto_k(terms.movedim(-1, 0), side=side)
    size = terms.abs()
    light = size.amax(-1) < LIGHT * size.mean(-1)
    return torch.where(light.to(k.device), k.clamp_max(0.0), k)


def tails_of_averages(
    values: Float[Tensor, "*conditions draws"], log_ratio: Float[Tensor, "*conditions draws"]
) -> tuple[Float[Tensor, "*conditions"], Float[Tensor, "*conditions"]]:
    """Pareto k of the weighted mean of values, and of their weighted variance.

    Args:
        values: Values to average, at independent draws of q.
        log_ratio: log p(x) − log q(x) there in nats, p up to log Z.
    """
    weight = _weights(check_log_ratio("log_ratio", log_ratio))[0]
    mean, moved = _expectation(values.double(), weight)
    square = (values.double() - mean.value[..., None]).square()
    return tail_of(moved), tail_of(_expectation(square, weight)[1])


def expectation(
    values: Float[Tensor, "*conditions draws"], log_ratio: Float[Tensor, "*conditions draws"]
) -> Mean:
    """E_p of values at draws of q, self-normalised, with its standard error.

    Source: Owen (2013), Monte Carlo theory, methods and examples, eq. (9.8).

    Args:
        values: Values to average, at independent draws of q.
        log_ratio: log p(x) − log q(x) there in nats, p up to log Z.

    >>> expectation(torch.tensor([1.0, 4.0]), torch.tensor([0.0, 0.0])).value
    tensor(2.5000, dtype=torch.float64)
    """
    floats("values", values)
    weight = _weights(check_log_ratio("log_ratio", log_ratio))[0]
    if values.shape != log_ratio.shape:
        raise ValueError(
            f"values must be {list(log_ratio.shape)}, as log_ratio is; got {list(values.shape)}."
        )
    return _expectation(values.double(), weight)[0]


@dataclass(frozen=True)
class Thermodynamics:
    """Thermodynamic functions of a whole system at each temperature, with k_B = 1.

    Attributes:
        log_z: In nats.
        energy: ⟨E⟩, in the unit of T.
        free_energy: F = −T log Z, in the unit of T.
        entropy: S = log Z + ⟨E⟩/T, in nats.
        heat_capacity: Var(E)/T², in nats.
        gap: log Z(β′) − log Z(β) + ∫⟨E⟩ dβ between neighbouring temperatures, in nats: zero but
            for its error, if both belong to one distribution. [temperatures − 1]
        tails: Pareto k of each of the first five; above 0.7 it cannot be trusted.
    """

    log_z: Mean
    energy: Mean
    free_energy: Mean
    entropy: Mean
    heat_capacity: Mean
    gap: Mean
    tails: Mapping[str, Float[Tensor, " temperatures"]] = field(default_factory=dict)

    @property
    def consistency(self) -> float:
        """Root mean square of the gaps over their errors: about 1."""
        return (self.gap.value / self.gap.error).square().mean().sqrt().item()

    def table(self) -> Table:
        """The functions at each temperature."""
        figures = {
            "log Z (nats)": self.log_z,
            "⟨E⟩ (unit of T)": self.energy,
            "F (unit of T)": self.free_energy,
            "S (nats)": self.entropy,
            "heat capacity (nats)": self.heat_capacity,
        }
        return table_of("Thermodynamic functions", figures, counted="temperature")

    def __str__(self) -> str:
        return str(self.table())

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


def thermodynamics(
    log_ratio: Float[Tensor, "temperatures draws"],
    energy: Float[Tensor, "temperatures draws"],
    temperature: Float[Tensor, " temperatures"],
) -> Thermodynamics:
    r"""Log Z, F, S and ⟨E⟩ from a flow's draws, and whether d log Z/dβ = −⟨E⟩.

    The integral between neighbours is that of a cubic in log β with the slopes that Var(E)
    gives, of E less its limit at T = 0 as the two coldest temperatures have it; neighbours a
    factor of 1.5 apart cost it some 1e-3 nats per 100 sites.

    Args:
        log_ratio: log p(x) − log q(x) at independent draws, with p = exp(−E/T), in nats.
        energy: E of the whole system at each draw, in the unit of T.
        temperature: T of each row, above 0.
    """
    floats("energy", energy)
    floats("temperature", temperature)
    log_ratio = check_log_ratio("log_ratio", log_ratio)
    if energy.shape != log_ratio.shape or log_ratio.ndim != 2:
        raise ValueError(
            "energy and log_ratio must be [temperatures, draws], alike; "
            f"got {list(energy.shape)} and {list(log_ratio.shape)}."
        )
    if temperature.shape != log_ratio.shape[:1] or not (temperature > 0).all():
        raise ValueError(
            f"temperature must be {list(log_ratio.shape[:1])} numbers above 0; "
            f"got {temperature.tolist()}."
        )
    weight, top = _weights(log_ratio)
    t, energy = temperature.double()[:, None], energy.double()
    mean, moved = _expectation(energy, weight)
    centred = energy - mean.value[:, None]
    variance, moved_variance = _expectation(centred.square(), weight)
    log_z = Mean(top.squeeze(-1), _error(weight - 1))
    entropy = log_z.value + mean.value / t[:, 0]
    free = Mean(-t[:, 0] * log_z.value, t[:, 0] * log_z.error)
    capacity = Mean(variance.value / t[:, 0] ** 2, variance.error / t[:, 0] ** 2)
    gap = _gap(
        1 / t, (log_z.value, weight - 1), (mean.value, moved), (variance.value, moved_variance)
    )
    of_z, of_entropy = tail_of(weight, side="upper"), weight - 1 + moved / t
    tails = {"log_z": of_z, "free_energy": of_z, "energy": tail_of(moved)}
    tails |= {"entropy": tail_of(of_entropy), "heat_capacity": tail_of(moved_variance)}
    return Thermodynamics(
        log_z, mean, free, Mean(entropy, _error(of_entropy)), capacity, gap, tails
    )


def _gap(beta: Tensor, log_z: tuple, mean: tuple, variance: tuple) -> Mean:
    """Value and error of the gap; each quantity comes with the influence of every draw."""
    if len(beta) < 2:
        return Mean(beta.new_zeros(0), beta.new_zeros(0))
    first, last = beta[:-1], beta[1:]
    width = (last / first).log()
    cold = (1 / beta[:, 0]).argsort()[:2]
    slope = (mean[0][cold[1]] - mean[0][cold[0]]) / (1 / beta[cold[1]] - 1 / beta[cold[0]])
    ground = mean[0][cold[0]] - slope / beta[cold[0]]
    near = first * (width / 2 + width.square() / 12), -(first * width).square() / 12
    far = last * (width / 2 - width.square() / 12), (last * width).square() / 12

    def end(rows: slice, sign: int, factors: tuple) -> tuple[Tensor, Tensor]:
        at = (log_z, (mean[0] - ground, mean[1]), variance)
        triples = list(zip((sign, *factors), at, strict=True))
        value = torch.stack([c * it[0][rows, None] for c, it in triples]).sum(0)
        moved = torch.stack([c * it[1][rows] for c, it in triples]).sum(0)
        return value[:, 0], _error(moved)

    lower, upper = end(slice(None, -1), -1, near), end(slice(1, None), 1, far)
    value = lower[0] + upper[0] + ground * (last - first)[:, 0]
    return Mean(value, torch.hypot(lower[1], upper[1]))


def check_log_ratio(name: str, log_ratio: Any) -> Tensor:
    """Log-ratios in double precision, refused if they are invalid."""
    floats(name, log_ratio)
    if not log_ratio.ndim or log_ratio.shape[-1] < 2 or not log_ratio.numel():
        raise ValueError(
            f"{name} must be [*conditions, draws] with at least 2 draws; "
            f"got {list(log_ratio.shape)}."
        )
    wrong = log_ratio.isnan() | (log_ratio == math.inf)
    if wrong.any():
        raise ValueError(
            f"{name} must hold numbers, or -inf; got {int(wrong.sum())} that are nan or +inf."
        )
    if (log_ratio == -math.inf).all(-1).any():
        raise ValueError(f"{name} must have a draw of finite log-ratio; got -inf for all.")
    return log_ratio.detach().double()


def _weights(log_ratio: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of mean 1, and the log of their mean before."""
    top = log_ratio.logsumexp(-1, keepdim=True) - math.log(log_ratio.shape[-1])
    return (log_ratio - top).exp(), top


def _error(moved: Tensor) -> Tensor:
    return moved.std(-1) / math.sqrt(moved.shape[-1])


def _expectation(values: Tensor, weight: Tensor) -> tuple[Mean, Tensor]:
    inside = torch.where(weight > 0, values, 0.0)
    mean = (weight * inside).mean(-1)
    moved = weight * (inside - mean[..., None])
    return Mean(mean, _error(moved)), moved


def _pairs(weight: Tensor) -> Tensor:
    """The mean of min(w, w′) over all other draws, at each draw, for weights of mean 1."""
    ordered, order = weight.sort(-1)
    count = weight.shape[-1]
    above = torch.arange(count - 1, -1, -1, dtype=weight.dtype, device=weight.device)
    mean = (ordered.cumsum(-1) - ordered + above * ordered) / (count - 1)
    return torch.empty_like(mean).scatter_(-1, order, mean)

"""Optimal budgeted rejection: draws of a distribution filtered by a ratio, at a chosen cost."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.distributions import Distribution

from rkl.checks import number
from rkl.flows.precision import single_precision
from rkl.metrics.precision_recall import OperatingPoint, operating_point
from rkl.stats import Mean, mean
from rkl.tables import Table, table_of

LogRatio = Callable[[Tensor], Tensor]
BATCH = 4_096  # draws at a time


@dataclass(frozen=True)
class Accepted:
    """Accepted samples, and their cost.

    Attributes:
        samples: The accepted draws, [n, *event].
        log_ratio: log p − log q of each, in nats, by the argument.
        point: The fitted operating point: budget, constant and precision.
        draws: Number of draws made for them, without the pilot.
        acceptance: Share of these draws that was accepted, with its standard error; its mean
            should be 1/budget.
    """

    samples: Shaped[Tensor, "n *event"]
    log_ratio: Float[Tensor, " n"]
    point: OperatingPoint
    draws: int
    acceptance: Mean

    @property
    def cost(self) -> float:
        """Draws per accepted sample."""
        return self.draws / len(self.samples)

    def table(self) -> Table:
        """Their number, cost and precision; the precision is by the ratio that was given."""
        figures = {
            "accepted samples": len(self.samples),
            "draws per sample": self.cost,
            "share accepted": self.acceptance,
            "precision at slope 1, by the ratio": self.point.target_precision,
        }
        return table_of("Accepted samples", figures)

    def __str__(self) -> str:
        return str(self.table())

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


@single_precision()
def reject(
    law: Distribution,
    log_ratio: LogRatio,
    *,
    n: int,
    budget: float | None = None,
    accept_lam: float | None = None,
    target_precision: float | None = None,
    pilot: int = 10_000,
) -> Accepted:
    r"""Draw from a distribution and accept each draw x with probability min(1, λ p(x)/q(x)).

    Accepted draws have the distribution min(λp, q)/α(λ), at 1/α(λ) draws each: among all ways of
    accepting one draw in K it is the one closest to p, under every f-divergence. The constant λ
    is fitted exactly on the ratios of a pilot of draws, which are then discarded. With
    ``accept_lam`` the pilot only estimates the cost.

    Random numbers come from torch's global generator: seed it, or fork it, outside.

    Source: Verine et al. (2024), arXiv 2311.00460.

    Args:
        law: Distribution of a flow: q, without batch dimensions.
        log_ratio: log p − log q in nats at draws [draws, *event]: a target's log-density less
            that of q, or a critic. With ratios known up to a factor a budget is still right, the
            other two arguments are not.
        n: Number of samples to accept.
        budget: Draws per accepted sample, at least 1.
        accept_lam: The constant λ.
        target_precision: Precision at slope 1 of what is accepted.
        pilot: Number of draws to fit the constant on.

    Returns:
        Accepted: samples in the order drawn, with their cost.

    Raises:
        ValueError: Not exactly one of the three is given, none of the pilot's ratios allows it,
            the budget exceeds the pilot, or a ratio is nan.
        RuntimeError: Draws are accepted a hundred times less often than in the pilot.

    >>> from torch.distributions import Normal
    >>> p, q = Normal(0.0, 1.0), Normal(0.0, 2.0)
    >>> with torch.random.fork_rng():
    ...     _ = torch.manual_seed(0)
    ...     found = reject(q, lambda x: p.log_prob(x) - q.log_prob(x), n=9_000, budget=1.8)
    >>> round(found.cost, 1), round(found.samples.std().item(), 1)  # at 2 it would be p itself
    (1.8, 1.0)
    """
    _check(law, n, pilot)
    if budget is not None and budget > pilot:
        raise ValueError(
            f"budget must be at most the {pilot:,} draws of the pilot, on which the constant is "
            f"fitted; got {budget:g}."
        )
    knob = {"budget": budget, "accept_lam": accept_lam, "target_precision": target_precision}
    with torch.no_grad():
        point = operating_point(_draw(law, log_ratio, pilot)[1].double(), **knob)
        return _accept(law, log_ratio, n, point)


def _accept(law: Distribution, log_ratio: LogRatio, n: int, point: OperatingPoint) -> Accepted:
    log_lam, most = torch.tensor(point.accept_lam).double().log(), 100 * n * point.budget + BATCH
    samples, ratios, flags, accepted, draws = [], [], [], 0, 0
    while accepted < n:
        if draws > most:
            raise RuntimeError(
                f"only {accepted} of {draws:,} draws were accepted, where the pilot promised one "
                f"in {point.budget:.4g}: log_ratio answers otherwise than before."
            )
        x, ratio = _draw(law, log_ratio, BATCH)
        uniform = torch.rand(len(x), dtype=torch.float64, device=x.device)
        keep = uniform.log() < ratio.double() + log_lam.to(x.device)
        samples.append(x[keep])
        ratios.append(ratio[keep])
        flags.append(keep)
        accepted, draws = accepted + int(keep.sum()), draws + len(x)
    every = torch.cat(flags)
    last = int(every.nonzero()[n - 1]) + 1  # what was drawn beyond is no cost
    accepted_draws = torch.cat(samples)[:n], torch.cat(ratios)[:n]
    return Accepted(*accepted_draws, point, last, mean(every.double().cpu()))


def _draw(law: Distribution, log_ratio: LogRatio, count: int) -> tuple[Tensor, Tensor]:
    x = law.sample(torch.Size([count]))
    ratio = log_ratio(x)
    if not isinstance(ratio, Tensor) or ratio.shape != (count,):
        got = list(ratio.shape) if isinstance(ratio, Tensor) else type(ratio).__name__
        raise ValueError(f"log_ratio must return [{count}], one number for each draw; got {got}.")
    if ratio.isnan().any():
        raise ValueError(f"log_ratio is nan at {int(ratio.isnan().sum())} of {count} draws.")
    return x, ratio


def _check(law: Distribution, n: int, pilot: int) -> None:
    if not isinstance(law, Distribution):
        raise TypeError(f"law must be a distribution of torch; got a {type(law).__name__}.")
    if law.batch_shape:
        raise ValueError(f"law must have no batch dimensions; got {list(law.batch_shape)}.")
    for name, value in (("n", n), ("pilot", pilot)):
        number(name, value, at_least=1)
        if not isinstance(value, int):
            raise TypeError(f"{name} must be an integer; got {value!r}.")

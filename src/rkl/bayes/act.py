"""The Bayes act: the distribution of a family that is closest to the posterior on average."""

import reprlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from rkl.bayes.answer import Answer
from rkl.bayes.compare import compare
from rkl.bayes.draws import Draws, read_draws, with_exact_simplexes
from rkl.bayes.loss.between import check_loss
from rkl.bayes.model import PROBE, Model, family_in, read_family
from rkl.bayes.problem import Problem
from rkl.bayes.regions import Region, region
from rkl.bayes.report import posterior_figure
from rkl.bayes.solve.act import answer
from rkl.bayes.solve.streaming import check_domain
from rkl.bayes.tables import Table
from rkl.checks import integer
from rkl.divergences import ReverseKL

if TYPE_CHECKING:
    from rkl.plots import Figure


@dataclass(frozen=True, eq=False, repr=False)
class Estimate(Answer):
    """A Bayes act, its risk and diagnostics: the result of :func:`rkl.bayes.bayes_act`.

    Attributes:
        family: The family, as text.
        divergence: The loss.
        act: The reported distribution, by its parameters.
        risk: The posterior mean of the loss at the act, in nats, [*batch].
        diagnostics: Effective draws, tails and warnings.
        problem: The posterior, the family and the loss, for comparisons and regions.
    """

    def compare(
        self,
        log_posterior: Callable[[Mapping[str, Tensor]], Tensor] | str | None = None,
        losses: Iterable[Any] | None = None,
    ) -> Table:
        """The act beside every other common estimate, and what each loses: see ``compare``."""
        return compare(self, log_posterior, losses)

    def region(self, prob: float = 0.9) -> Region:
        """The draws that are closest to the act, together of posterior probability ``prob``."""
        return region(self, prob)

    def plot(self, prob: float = 0.9) -> "Figure":
        """Every marginal posterior with the common estimates marked and the region shaded."""
        return posterior_figure(self, self.compare(), self.region(prob))


def bayes_act(
    draws: Any,
    family: Any,
    divergence: Any = ReverseKL(),
    *,
    weights: Any = None,
    design: Any = None,
    compiled: bool | None = None,
    seed: int = 0,
) -> Estimate:
    r"""The Bayes act argmin over t of E[D(P_θ ‖ P_t) | data].

    With ReverseKL its natural parameter is the posterior mean of the natural parameter, with KL
    its mean parameter that of the mean parameter: neither depends on how the family is
    parametrised. Any other divergence is minimised numerically. The act depends on which
    experiment the loss is about: eight schools again, or a ninth.

    Source: Brand (2017), arXiv 1707.06366.

    Args:
        draws: The posterior: whatever :func:`rkl.bayes.read_draws` reads.
        family: The distribution of one experiment, given the parameters: a text such as
            "normal(loc=mu, scale=sigma)", a class of torch.distributions whose parameters are
            called as the draws are, or a callable from theta, n draws by name, to n distributions.
        divergence: The loss, D(posterior draw ‖ act).
        weights: Weight of every draw, [chains, draws].
        design: Given to a callable as its second argument, or to a regression.
        compiled: Compile the pass over the draws; by default where this saves time.
        seed: Random seed, for families whose divergences are estimated from samples.

    Returns:
        The act with its errors, its risk in nats, and diagnostics.

    Raises:
        ValueError: The draws, the family or the act itself do not exist; the message says why.
        TypeError: An argument is of the wrong kind.

    >>> import torch
    >>> generator = torch.Generator().manual_seed(0)
    >>> scale = 1 + torch.rand(4, 1000, generator=generator, dtype=torch.float64)
    >>> estimate = bayes_act({"sigma": scale}, "normal(loc=0, scale=sigma)")
    >>> torch.allclose(estimate.act["sigma"], scale.pow(-2).mean().rsqrt())
    True
    """
    check_loss(divergence)
    integer("seed", seed)
    held = with_exact_simplexes(read_draws(draws, weights))
    model = read_family(family, held, design)
    try:
        found = answer(Problem(held, model, divergence, compiled, seed))
    except ValueError as error:
        if where := _astray(model, held):
            first, _, _ = str(error).partition("\n")
            raise ValueError(f"{first} {where}") from error
        raise
    return Estimate(**vars(found))


def _astray(model: Model, draws: Draws) -> str | None:
    """The first draw that makes no law of the family, where others do."""
    for chain, part, chunk in draws.chunks(model.names):
        if _makes(model, chunk):
            continue
        first, last = 0, part.stop - part.start
        if not any(_makes(model, _rows(chunk, i, i + 1)) for i in range(min(last, PROBE))):
            return None
        while last - first > 1:
            middle = (first + last) // 2
            good = _makes(model, _rows(chunk, first, middle))
            first, last = (middle, last) if good else (first, middle)
        values = {name: x.tolist() for name, x in _rows(chunk, first, first + 1).items()}
        said = ", ".join(f"{name} = {reprlib.repr(x[0])}" for name, x in values.items())
        return f"See chain {chain}, draw {part.start + first}: {said}."
    return None


def _rows(chunk: Mapping[str, Tensor], first: int, last: int) -> dict[str, Tensor]:
    return {name: x[first:last] for name, x in chunk.items()}


def _makes(model: Model, theta: Mapping[str, Tensor]) -> bool:
    """Whether these draws make laws that are inside their family."""
    try:
        law = model.base(theta)
        check_domain(law)
        if family := family_in(law):
            family.check(family.natural(law))
    except (RuntimeError, ValueError):
        return False
    return True

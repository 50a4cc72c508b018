"""The claim of the paper on reverse KL about the problem of Neyman and Scott, and two like it.

The claim: the reverse-KL act, invariant to the parametrisation, is consistent for the variance of
many small groups under any non-degenerate prior, where maximum likelihood, MAP and forward KL are
not. Tested in the problem itself (``variance``), in a panel of answers with an intercept for each
person (``panel``) and with errors in both variables (``errors-in-variables``).

Source: Brand (2017), arXiv 1707.06366; Neyman and Scott (1948), Econometrica 16.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from rkl.studies.neyman_scott import lines, panel, variance
from rkl.studies.study import Outcome, Pair, Part, mean_over_seeds
from rkl.tables import Table, cell_text

if TYPE_CHECKING:
    from rkl.report import Block, Section

CLASSICAL = "no prior"
WORDS = "prior", "design", "quantity", "estimator"
COLUMNS = *WORDS, "N", "truth", "replications", "mean", "se", "sd", "rmse"


@dataclass(frozen=True)
class Plan:
    """The sizes of a part.

    Args:
        sizes: Numbers of unknowns beside the estimated one.
        replications: Data sets of each size.
    """

    sizes: tuple[int, ...] = (10, 100, 1_000, 10_000)
    replications: int = 200


@dataclass(frozen=True)
class Row:
    """One estimator of one number, over the replications in which it is finite.

    Attributes:
        prior: The prior, or "no prior".
        design: Design of the data.
        quantity: Name of the estimated quantity.
        estimator: Name of the estimator.
        size: N, the number of other unknowns.
        truth: Its true value.
        count: Replications in which it is finite.
        mean: Mean of the estimates, with its standard error.
        sd: Standard deviation of the estimates; undefined for one.
        rmse: Root mean square error about the truth.
    """

    prior: str
    design: str
    quantity: str
    estimator: str
    size: int
    truth: float
    count: int
    mean: Pair
    sd: float
    rmse: float

    @classmethod
    def of(cls, values: Tensor, truth: float, **labels: Any) -> "Row":
        """The row of some estimates, at least one."""
        mean = mean_over_seeds(values.tolist())
        sd = values.std().item() if len(values) > 1 else math.nan
        rmse = (values - truth).square().mean().sqrt().item()
        return cls(truth=truth, count=len(values), mean=mean, sd=sd, rmse=rmse, **labels)

    def cells(self) -> list[str]:
        """Cells of the csv."""
        words = (getattr(self, it) for it in WORDS)
        numbers = (f"{it:.6g}" for it in (*self.mean, self.sd, self.rmse))
        return [*words, str(self.size), f"{self.truth:g}", str(self.count), *numbers]


@dataclass(frozen=True)
class Problem(Part):
    """One problem, under all priors and by all estimators.

    Attributes:
        truths: The estimated quantities, with their true values.
        designs: Functions from N, the number of replications and a seed to data.
        priors: Priors by name.
        classical: Function from the data to estimates by name, a tensor or one for each quantity.
        bayesian: The same, from the data and a prior.
        drawn: The estimators in the figures, the widest line first.
        sizes: Name of the things that N counts.
        reading: Explanation of the figures.
        with_draws: Whether the acts are also computed from posterior draws of one data set.
    """

    truths: Mapping[str, float]
    designs: Mapping[str, Callable[[int, int, int], Any]]
    priors: Mapping[str, Any]
    classical: Callable[[Any], Mapping[str, Any]]
    bayesian: Callable[[Any, Any], Mapping[str, Any]]
    drawn: Sequence[str]
    sizes: str
    reading: str
    with_draws: bool = False

    def jobs(self, seed: int) -> list[tuple[str, int, int]]:
        return [(design, size, seed) for design in self.designs for size in self.plan.sizes]

    def compute(self, design: str, size: int, seed: int) -> list[dict[str, Any]]:
        return [asdict(it) for it in self.rows(design, size, seed)]

    def rows(self, design: str, size: int, seed: int) -> Iterator[Row]:
        """All estimates from data sets of one size; every prior sees the same data."""
        data = self.designs[design](size, self.plan.replications, seed)
        estimates = {CLASSICAL: self.classical(data)}
        estimates |= {name: self.bayesian(data, prior) for name, prior in self.priors.items()}
        for prior, by_name in estimates.items():
            for name, values in by_name.items():
                each = values if isinstance(values, tuple) else (values,)
                for x, (quantity, truth) in zip(each, self.truths.items(), strict=True):
                    finite = x[x.isfinite()]
                    if len(finite):
                        labels = {"prior": prior, "design": design, "quantity": quantity}
                        yield Row.of(finite, truth, estimator=name, size=size, **labels)

    def outcome(self, results: Sequence[Sequence[Mapping[str, Any]]], seed: int) -> Outcome:
        from rkl.report import Section

        rows = [Row(**{**it, "mean": tuple(it["mean"])}) for part in results for it in part]
        blocks: list[Block | Table] = [_from_draws(seed)] if self.with_draws else []
        sections = [Section("Results", self.reading, blocks)]
        for design in self.designs:
            for quantity in self.truths:
                chosen = [it for it in rows if (it.design, it.quantity) == (design, quantity)]
                sections.append(_section(self, chosen))
        summary = (
            f"{self.plan.replications} data sets of each size. At N = {max(self.plan.sizes):,} "
            f"reverse KL estimates {rows[0].quantity} = {rows[0].truth:g} by:"
        )
        cells = (it.cells() for it in rows)
        return Outcome(COLUMNS, cells, summary, sections, list(_estimates(self, rows)))


PARTS: Mapping[str, Problem] = {
    "variance": Problem(
        title="One variance, many unknown means",
        plan=Plan(),
        truths={"σ²": variance.SIGMA2},
        designs={name: partial(variance.simulate, it) for name, it in variance.DESIGNS.items()},
        priors=variance.PRIORS,
        classical=variance.classical,
        bayesian=variance.bayesian,
        drawn=(
            "reverse KL",
            "posterior mean of σ²",
            "conditional likelihood",
            "forward KL",
            "intrinsic",
            "symmetric KL",
            "Wallace-Freeman",
            "maximum likelihood",
            "MAP in σ",
        ),
        sizes="number of groups N",
        reading=(
            "Reverse KL estimates σ² by 1 / E[1/σ²]: it is consistent exactly when the marginal "
            "posterior of σ² is. So are the posterior's mean and "
            "median. Forward KL adds the mean posterior variance of a group's mean, which does "
            "not vanish when groups stay small; the intrinsic loss follows it, because forward "
            "KL is the smaller of the two wherever the estimate exceeds the draw.\n\n"
            "The marginal posterior is consistent under the reference prior, under the skewed "
            "proper prior of σ² and under the hierarchical one. It is not under Jeffreys' rule, "
            "whose power of σ grows with the number of means, nor under a proper prior of the "
            "means that is fixed and wrong."
        ),
        with_draws=True,
    ),
    "panel": Problem(
        title="A common effect, many unknown intercepts",
        plan=Plan(),
        truths={"β": panel.EFFECT},
        designs={"two answers each": panel.simulate},
        priors=panel.PRIORS,
        classical=panel.classical,
        bayesian=panel.bayesian,
        drawn=(
            "reverse KL",
            "conditional likelihood",
            "symmetric KL",
            "forward KL",
            "MAP",
            "maximum likelihood",
        ),
        sizes="number of persons N",
        reading=(
            "β is a natural parameter, so that reverse KL reports its posterior mean. Forward KL "
            "averages probabilities, which flattens the curve, and stays below even if the "
            "prior is the truth. Reverse KL fails where the marginal posterior of β does: under "
            "a wrong prior of the intercepts, and under Jeffreys' rule for each of them, which "
            "leads to about 2β, as does maximum likelihood. The conditional likelihood "
            "needs no prior of the intercepts."
        ),
    ),
    "errors-in-variables": Problem(
        title="A line through points with errors in both coordinates",
        plan=Plan(),
        truths={"β": lines.SLOPE, "σ²": lines.SIGMA2},
        designs={"points on a line": lines.simulate},
        priors=lines.PRIORS,
        classical=lines.classical,
        bayesian=lines.bayesian,
        drawn=(
            "reverse KL",
            "marginal likelihood",
            "forward KL",
            "intrinsic",
            "symmetric KL",
            "maximum likelihood",
            "MAP in places, angle, σ",
            "least squares",  # of the slope alone, hence last
        ),
        sizes="number of points N",
        reading=(
            "A prior flat in the true x is not flat along the line: a steeper line has more room "
            "for the same x. That factor comes once for each point, and under it the marginal "
            "posterior of the slope is that of least squares, too flat however many points there "
            "are; so is every act. Flat along the line, or under the true distribution of x, the "
            "slope is right, and σ² is as in the first problem: right for reverse KL, half as "
            "much again for forward KL, half for maximum likelihood."
        ),
    ),
}


def _estimates(problem: Problem, rows: Sequence[Row]) -> Iterator[str]:
    """Estimates by reverse KL at the largest N, prior by prior."""
    first = rows[0].design, rows[0].quantity, "reverse KL", max(problem.plan.sizes)
    for row in rows:
        if (row.design, row.quantity, row.estimator, row.size) == first:
            yield f"{cell_text(row.mean, plus_minus=True)}: {row.prior}"


def _section(problem: Problem, rows: Sequence[Row]) -> "Section":
    """One quantity in one design: the figure, and tables of the largest N and the smallest."""
    from rkl import plots
    from rkl.report import Section, figure_block

    design, quantity = rows[0].design, rows[0].quantity
    panels = {
        prior: {
            name: _series([it for it in rows if it.prior in (prior, CLASSICAL)], name)
            for name in problem.drawn
            if any(it.estimator == name for it in rows)
        }
        for prior in problem.priors
    }
    figure = plots.estimates(
        panels,
        truth=problem.truths[quantity],
        label=f"estimate of {quantity}",
        sizes=problem.sizes,
        logarithmic=quantity == "σ²",
    )
    title = f"{quantity}, {design}"
    block = figure_block(f"{title}: estimate against N", figure, _CAPTION)
    sizes = problem.plan.sizes
    tables = [_table(problem, rows, size) for size in dict.fromkeys((max(sizes), min(sizes)))]
    return Section(title, blocks=[block, *tables])


def _series(rows: Sequence[Row], name: str) -> tuple[list[int], list[float], list[float]]:
    """Sizes, means and standard deviations of one estimator."""
    chosen = [it for it in rows if it.estimator == name]
    return [it.size for it in chosen], [it.mean[0] for it in chosen], [it.sd for it in chosen]


def _table(problem: Problem, rows: Sequence[Row], size: int) -> Table:
    """Mean and standard error by estimator and prior."""
    chosen = [it for it in rows if it.size == size]
    cells = {(it.estimator, it.prior): it.mean for it in chosen}
    columns = [CLASSICAL, *problem.priors]
    body = [
        [name, *(cells.get((name, prior)) for prior in columns)]
        for name in dict.fromkeys(it.estimator for it in chosen)
    ]
    return Table(f"Mean estimate at N = {size:,}", ["", *columns], body, _TABLED)


def _from_draws(seed: int) -> Table:
    from rkl.studies.neyman_scott.draws import CHAINS, DRAWS, GROUPS, compare

    body = [[name, *act] for name, act in compare(seed).items()]
    title = f"σ of one data set, N = {GROUPS}, J = 2, reference prior"
    columns = ["act", "bayes_act, from draws", "quadrature"]
    caption = f"{CHAINS * DRAWS:,} independent draws; ± is the error that bayes_act states."
    return Table(title, columns, body, caption)


_CAPTION = (
    "The mean over the data sets, and one standard deviation of them on either side; the truth "
    "dashed. Estimators that agree lie on one another, the later one narrower."
)
_TABLED = "Mean over the data sets in which the estimate is finite, and its standard error."

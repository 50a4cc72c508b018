"""What the paper on reverse KL says of the problem of Neyman and Scott, and of two like it.

The claim: the reverse-KL act, invariant to the parametrisation, is consistent for the variance of
many small groups under any non-degenerate prior, where maximum likelihood, MAP and forward KL are
not. Tested in the problem itself (``variance``), in a panel of answers with an intercept for each
person (``panel``) and with errors in both variables (``errors-in-variables``).

Source: Brand (2017), arXiv 1707.06366; Neyman and Scott (1948), Econometrica 16.
"""

import csv
import io
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from rkl.runs import Run, write_atomic
from rkl.stats import mean
from rkl.studies.neyman_scott import lines, panel, variance
from rkl.studies.study import torch_threads

if TYPE_CHECKING:
    from rkl.report import Section, Table

SIZES = 10, 100, 1_000, 10_000
REPLICATIONS = 200
CLASSICAL = "no prior"
WORDS = "prior", "design", "quantity", "estimator"
COLUMNS = *WORDS, "N", "truth", "replications", "mean", "se", "sd", "rmse"


@dataclass(frozen=True)
class Row:
    """One estimator of one number, over the replications in which it is finite.

    Attributes:
        prior: The prior, or "no prior".
        design: How the data are laid out.
        quantity: What is estimated.
        estimator: How.
        size: N, how many unknowns there are beside it.
        truth: Its true value.
        values: The estimates.
    """

    prior: str
    design: str
    quantity: str
    estimator: str
    size: int
    truth: float
    values: Tensor

    @property
    def mean(self) -> tuple[float, float]:
        """Of the estimates, with its standard error."""
        value, error = mean(self.values)
        return value.item(), error.item()

    @property
    def sd(self) -> float:
        """Of the estimates; undefined for one."""
        return self.values.std().item() if len(self.values) > 1 else math.nan

    @property
    def rmse(self) -> float:
        """About the truth."""
        return (self.values - self.truth).square().mean().sqrt().item()

    def cells(self) -> list[str]:
        """As the csv has it."""
        words = (getattr(self, it) for it in WORDS)
        numbers = (f"{it:.6g}" for it in (*self.mean, self.sd, self.rmse))
        return [*words, str(self.size), f"{self.truth:g}", str(len(self.values)), *numbers]


@dataclass(frozen=True)
class Part:
    """One problem.

    Attributes:
        title: Of its report.
        truths: What is estimated, and its true value.
        designs: From N, the number of replications and a seed to their data.
        priors: By name.
        classical: From the data to estimates by name, a tensor or one for each quantity.
        bayesian: The same, from the data and a prior.
        drawn: The estimators in the figures, the widest line first.
        sizes: What N counts.
        says: What to see.
    """

    title: str
    truths: Mapping[str, float]
    designs: Mapping[str, Callable[[int, int, int], Any]]
    priors: Mapping[str, Any]
    classical: Callable[[Any], Mapping[str, Any]]
    bayesian: Callable[[Any, Any], Mapping[str, Any]]
    drawn: Sequence[str]
    sizes: str
    says: str

    def rows(self, sizes: Sequence[int], replications: int, seed: int) -> Iterator[Row]:
        """All estimates; every prior sees the same data."""
        for design, simulate in self.designs.items():
            for size in sizes:
                data = simulate(size, replications, seed)
                found = {CLASSICAL: self.classical(data)}
                found |= {name: self.bayesian(data, it) for name, it in self.priors.items()}
                for prior, estimates in found.items():
                    for name, x in estimates.items():
                        yield from self._of_each(x, prior, design, name, size)

    def _of_each(
        self, estimates: Any, prior: str, design: str, name: str, size: int
    ) -> Iterator[Row]:
        each = estimates if isinstance(estimates, tuple) else (estimates,)
        for x, (quantity, truth) in zip(each, self.truths.items(), strict=True):
            finite = x[x.isfinite()]
            if len(finite):
                yield Row(prior, design, quantity, name, size, truth, finite)


PARTS: Mapping[str, Part] = {
    "variance": Part(
        title="One variance, many unknown means",
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
        says=(
            "Reverse KL estimates σ² by 1 / E[1/σ²]: it goes where the marginal posterior of σ² "
            "goes, and so is consistent exactly when that is. So are the posterior's mean and "
            "median. Forward KL adds the mean posterior variance of a group's mean, which does "
            "not vanish when groups stay small; the intrinsic loss follows it, because forward "
            "KL is the smaller of the two wherever the estimate exceeds the draw.\n\n"
            "The marginal posterior is consistent under the reference prior, under the skewed "
            "proper prior of σ² and under the hierarchical one. It is not under Jeffreys' rule, "
            "whose power of σ grows with the number of means, nor where the means' own law is "
            "fixed and wrong, proper as it is."
        ),
    ),
    "panel": Part(
        title="A common effect, many unknown intercepts",
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
        says=(
            "β is a natural parameter, so that reverse KL reports its posterior mean. Forward KL "
            "averages probabilities, which flattens the curve, and stays below even where the "
            "prior is the truth. Reverse KL breaks where the marginal posterior of β does: under "
            "a wrong law of the intercepts, and under Jeffreys' rule for each of them, which "
            "sends it to about 2β, where maximum likelihood goes. The conditional likelihood "
            "needs no law of the intercepts at all."
        ),
    ),
    "errors-in-variables": Part(
        title="A line through points with errors in both coordinates",
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
        says=(
            "A prior flat in the true x is not flat along the line: a steeper line has more room "
            "for the same x. That factor comes once for each point, and under it the marginal "
            "posterior of the slope is that of least squares, too flat however many points there "
            "are; every act follows. Flat along the line, or under the true law of x, the slope "
            "is right, and σ² is what it is in the first problem: right for reverse KL, half as "
            "much again for forward KL, half for maximum likelihood."
        ),
    ),
}


def study(
    part: str,
    out: str | os.PathLike,
    *,
    overwrite: bool = False,
    seed: int = 0,
    device: str = "cpu",
) -> Path:
    """Test the claim in one problem, and write its figures.

    Args:
        part: "variance", "panel" or "errors-in-variables".
        out: The folder to write: a csv of all estimates, figures, a report.
        overwrite: Whether to replace the run that is there.
        seed: What the data are drawn from.
        device: The cpu, for which the sums are small enough.

    Returns:
        The report.
    """
    if part not in PARTS:
        raise ValueError(f"part must be one of {', '.join(PARTS)}; got {part!r}.")
    if device != "cpu":
        raise ValueError(f"device must be 'cpu', for which this is little work; got {device!r}.")
    problem = PARTS[part]
    settings = {"part": part, "sizes": SIZES, "replications": REPLICATIONS}
    run = Run.create(out, "studies.neyman_scott", settings, seed=seed, overwrite=overwrite)
    with run.running(), torch_threads(1):
        rows = list(problem.rows(SIZES, REPLICATIONS, seed))
        write_atomic(run.path / f"{part}.csv", _csv(rows))
        _report(run, problem, rows)
    return run.path / "report.html"


def _csv(rows: Sequence[Row]) -> str:
    page = io.StringIO()
    table = csv.writer(page, lineterminator="\n")
    table.writerow(COLUMNS)
    table.writerows(row.cells() for row in rows)
    return page.getvalue()


def _report(run: Run, problem: Part, rows: Sequence[Row]) -> None:
    from rkl.report import Section, Settings, render, write

    blocks = [_through_draws(run.record["seed"])] if problem is PARTS["variance"] else []
    first = Section("What came out", problem.says, blocks)
    sections = [
        _section(run, problem, [it for it in rows if [it.design, it.quantity] == chosen])
        for chosen in ([design, it] for design in problem.designs for it in problem.truths)
    ]
    last = Section("Settings", blocks=[Settings(run.record)])
    page = render(problem.title, [first, *sections, last], lead=_lead(problem, rows))
    write(run.path / "report.html", page)


def _lead(problem: Part, rows: Sequence[Row]) -> str:
    """What reverse KL came to at the largest N, prior by prior."""
    from rkl.report import written

    row = rows[0]
    told = [
        f"{written(it.mean)} ({it.prior})"
        for it in rows
        if (it.design, it.quantity, it.estimator, it.size)
        == (row.design, row.quantity, "reverse KL", max(SIZES))
    ]
    return (
        f"{REPLICATIONS} data sets of each size. At N = {max(SIZES):,} reverse KL estimates "
        f"{row.quantity} = {row.truth:g} by {'; '.join(told)}."
    )


def _section(run: Run, problem: Part, rows: Sequence[Row]) -> "Section":
    """One quantity in one design: the figure, and tables of the largest N and the smallest."""
    from rkl import plots
    from rkl.report import Section, drawn

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
    block = drawn(f"{title}: estimate against N", figure, _CAPTION)
    name = re.sub(r"\W+", "-", f"{_FILES[quantity]} {design}")
    write_atomic(run.path / f"{name}.svg", block.svg)
    tables = [_table(problem, rows, size) for size in (max(SIZES), min(SIZES))]
    return Section(title, blocks=[block, *tables])


def _series(rows: Sequence[Row], name: str) -> tuple[list[int], list[float], list[float]]:
    """Sizes, means and standard deviations of one estimator."""
    chosen = [it for it in rows if it.estimator == name]
    return [it.size for it in chosen], [it.mean[0] for it in chosen], [it.sd for it in chosen]


def _table(problem: Part, rows: Sequence[Row], size: int) -> "Table":
    """Mean and standard error by estimator and prior."""
    from rkl.report import Table

    chosen = [it for it in rows if it.size == size]
    cells = {(it.estimator, it.prior): it.mean for it in chosen}
    columns = [CLASSICAL, *problem.priors]
    body = [
        [name, *(cells.get((name, prior)) for prior in columns)]
        for name in dict.fromkeys(it.estimator for it in chosen)
    ]
    return Table(f"Mean estimate at N = {size:,}", ["", *columns], body, _TABLED)


def _through_draws(seed: int) -> "Table":
    """One data set's acts by the library's own verb."""
    from rkl.report import Table
    from rkl.studies.neyman_scott.draws import CHAINS, DRAWS, GROUPS, compare

    body = [[name, *found] for name, found in compare(seed).items()]
    title = f"σ of one data set, N = {GROUPS}, J = 2, reference prior"
    columns = ["act", "bayes_act, from draws", "quadrature"]
    caption = f"{CHAINS * DRAWS:,} independent draws; ± is the error that bayes_act states."
    return Table(title, columns, body, caption)


_FILES = {"σ²": "variance", "β": "slope"}
_CAPTION = (
    "The mean over the data sets, and one standard deviation of them on either side; the truth "
    "dashed. Estimators that agree lie on one another, the later one narrower."
)
_TABLED = "Mean over the data sets in which the estimate is finite, and its standard error."

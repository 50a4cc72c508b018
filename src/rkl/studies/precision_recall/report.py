"""Flows trained for precision or for recall, compared with sampling for it.

Eight Gaussians on a ring with a flow too small for them (``ring``), where precision and recall
are sums over a grid; the digits of scikit-learn (``digits``) and those of MNIST (``mnist``), where
they are counted by neighbours in two spaces of features, one of which no critic has seen.

Source: Verine et al. (2023), arXiv 2302.00628; Verine et al. (2024), arXiv 2311.00460.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from rkl.studies.precision_recall import images, ring
from rkl.studies.precision_recall.rows import COLUMNS, ML, Row, Seed, rows_of
from rkl.studies.study import Outcome, Part
from rkl.tables import Table, cell_text

if TYPE_CHECKING:
    from rkl.report import Block, Section

MAX_FREE_COST = 1.001  # draws per sample that count as one
MAX_LOSS = 0.06  # of precision where recall is gained, or the other way round


@dataclass(frozen=True)
class Trade(Part):
    """Precision and recall of many ways to fit and to sample, on one set of data.

    Attributes:
        run: All distributions from one seed.
        axes: Horizontal and vertical axis by the title of the figure: recall and precision.
        drawn: Methods whose samples, and curves where they are known, are drawn.
        reading: Explanation of the figures.
        needs_data: True if the images come from a file of the user's.
    """

    run: Callable[[Any, int], Iterable[Seed]]
    axes: Mapping[str, tuple[str, str]]
    drawn: Sequence[tuple[str, str]]
    reading: str
    needs_data: bool = False

    def prepare(self, device: str, data: str | os.PathLike | None) -> "Trade":
        super().prepare(device, None)
        part = self
        if (data is None) == self.needs_data:
            wanted = "must be the IDX file of the images" if data is None else "is for mnist alone"
            raise ValueError(f"data {wanted}; got {data}.")
        if isinstance(self.plan, images.Plan):
            plan = replace(self.plan, data=None if data is None else os.fspath(data))
            images.read(plan)  # refused before anything is written
            part = replace(part, plan=plan)
        return part

    def jobs(self, seed: int) -> list[tuple[int]]:
        return [(each,) for each in range(seed, seed + self.plan.seeds)]

    def compute(self, seed: int) -> list[dict[str, Any]]:
        return [asdict(it) for it in self.run(self.plan, seed)]

    def outcome(self, results: Sequence[Sequence[Mapping[str, Any]]], seed: int) -> Outcome:
        from rkl.report import Section

        seeds = [Seed.read(it) for one in results for it in one]
        rows = rows_of(seeds)
        sections = [
            Section("Results", self.reading, [*_points(self, rows), *_tables(rows)]),
            _pictures(self, seeds),
            *_curves(self, seeds),
            _training(self, seeds),
        ]
        summary = (
            f"{len(rows[0].values)} seeds. The best methods at one draw per sample, "
            f"among those that lose at most {MAX_LOSS:g} of the other of precision and recall:"
        )
        return Outcome(
            COLUMNS, (it.cells() for it in rows), summary, sections, list(_best(self, rows))
        )


PARTS: Mapping[str, Trade] = {
    "ring": Trade(
        title="Precision and recall: eight Gaussians on a ring",
        plan=ring.Plan(),
        run=ring.run,
        axes={"Precision at λ = 10, recall at λ = 0.1": ("recall(0.1)", "precision(10)")},
        drawn=(
            (ML, "none"),
            ("PrecisionRecall(10)", "exact"),
            ("PrecisionRecall(10)", "critic"),
            ("PrecisionRecall(10), as published", "critic"),
            ("RecallHalf(0.3)", "exact"),
            ("ReverseKL", "exact"),
            ("rejection, budget 1.1", "critic"),
        ),
        reading=(
            "Both seeds are known, so that precision α(λ) and recall β(λ) are sums over a grid, "
            "and the errors are those over seeds alone: new data, a new flow, a new critic. "
            "Every fit takes the same number of steps, the maximum likelihood that it begins "
            "with included."
        ),
    ),
    "digits": Trade(
        title="Precision and recall: the digits of scikit-learn",
        plan=images.Plan(),
        run=images.run,
        axes=images.AXES,
        drawn=images.DRAWN,
        reading=images.READING,
    ),
    "mnist": Trade(
        title="Precision and recall: MNIST",
        plan=images.MNIST,
        run=images.run,
        axes=images.AXES,
        drawn=images.DRAWN,
        reading=images.READING,
        needs_data=True,
    ),
}


def _label(method: str, ratio: str) -> str:
    return method if ratio == "none" else f"{method}, {ratio}"


def _best(part: Trade, rows: Sequence[Row]) -> Iterator[str]:
    """The methods that gained most at one draw per sample without losing much of the other."""
    by = {(it.method, it.ratio, it.quantity): it for it in rows}
    free = [
        (it.method, it.ratio)
        for it in rows
        if it.quantity == "cost" and it.mean[0] < MAX_FREE_COST
    ]
    for axes in part.axes.values():
        for wanted, other in (axes, axes[::-1]):
            fair = [it for it in free if by[(*it, other)].gain[0] > -MAX_LOSS]
            best = max(fair, key=lambda it: by[(*it, wanted)].mean[0])
            most, likely = (
                cell_text(by[(*way, wanted)].mean, plus_minus=True) for way in (best, (ML, "none"))
            )
            yield f"{wanted}: {_label(*best)}, {most} (maximum likelihood {likely})"


def _points(part: Trade, rows: Sequence[Row]) -> "list[Block]":
    from rkl.plots.operating import operating_points
    from rkl.report import figure_block

    blocks = []
    for title, (recall, precision) in part.axes.items():
        by = {(it.method, it.ratio, it.quantity): it.mean for it in rows}
        names = dict.fromkeys((it.method, it.ratio) for it in rows)
        points = {
            _label(*name): (by[(*name, recall)], by[(*name, precision)])
            for name in names
            if (*name, recall) in by
        }
        sampled = frozenset(name for name in points if name.startswith(_SAMPLED))
        figure = operating_points(points, recall=recall, precision=precision, hollow=sampled)
        blocks.append(figure_block(title, figure, _POINTS))
    return blocks


def _tables(rows: Sequence[Row]) -> list[Table]:
    quantities = list(dict.fromkeys(it.quantity for it in rows))
    names = dict.fromkeys((it.method, it.ratio) for it in rows)
    by = {(it.method, it.ratio, it.quantity): it for it in rows}

    def body(value: Callable[[Row], Any]) -> list[list[Any]]:
        return [
            [
                _label(*name),
                *(value(by[(*name, it)]) if (*name, it) in by else None for it in them),
            ]
            for name in names
        ]

    def value(row: Row) -> Any:
        return row.mean[0] if row.quantity == "cost" else row.mean

    them = quantities
    first = Table("Every method", ["", *them], body(value), _TABLED)
    them = [it for it in quantities if it != "cost"]
    second = Table("Gain over maximum likelihood", ["", *them], body(lambda it: it.gain), _GAINED)
    return [first, second]


def _pictures(part: Trade, seeds: Sequence[Seed]) -> "Section":
    from rkl.plots.operating import clouds, montages
    from rkl.report import Section, figure_block

    shown = {
        _label(it.method, it.ratio): torch.tensor(it.samples)
        for it in seeds
        if it.samples and it.seed == seeds[0].seed and (it.method, it.ratio) in part.drawn
    }
    if not shown:
        return Section("Samples")
    flat = next(iter(shown.values())).ndim == 2
    figure = (clouds if flat else montages)(shown)
    block = figure_block("Draws", figure, "The first seed.")
    return Section("Samples", blocks=[block])


def _curves(part: Trade, seeds: Sequence[Seed]) -> "list[Section]":
    from rkl import plots
    from rkl.report import Section, figure_block

    curves, bands = {}, {}
    for method, ratio in part.drawn:
        mine = [it.curve for it in seeds if (it.method, it.ratio) == (method, ratio)]
        if not mine or not mine[0][0]:
            continue
        slopes = torch.tensor(mine[0][0]).double()
        precision = torch.tensor([it[1] for it in mine]).double()
        middle = precision.mean(0)
        curves[_label(method, ratio)] = middle.numpy(), (middle / slopes).numpy()
        if len(mine) > 1:
            error = 2 * precision.std(0) / len(mine) ** 0.5
            bands[_label(method, ratio)] = (middle - error).numpy(), (middle + error).numpy()
    if not curves:
        return []
    figure = plots.precision_recall(curves, bands=bands, between=("ring", "flow"))
    block = figure_block("Precision against recall, over all slopes", figure, _CURVED)
    return [Section("The curves", blocks=[block, _spectrum()])]


def _spectrum() -> "Block":
    from rkl.metrics.precision_recall import pr_spectrum
    from rkl.plots.trade_offs import spectrum
    from rkl.report import figure_block

    looking = {ring.name_of(it): it for it in _LOOKING}
    slopes = torch.logspace(-2, 2, 401, dtype=torch.float64)
    spectra = {name: pr_spectrum(it, slopes) for name, it in looking.items()}
    weights = {
        name: (it.density * slopes * slopes.clamp_max(1.0)).numpy() for name, it in spectra.items()
    }
    atoms = {
        name: list(zip(it.atom_slopes.tolist(), it.atom_weights.tolist(), strict=True))
        for name, it in spectra.items()
    }
    figure = spectrum(slopes.numpy(), weights, atoms=atoms)
    return figure_block("Weight of the divergences along the curve", figure, _LOOKED)


def _training(part: Trade, seeds: Sequence[Seed]) -> "Section":
    from rkl import plots
    from rkl.report import Section, figure_block

    blocks = []
    for key, label in (("held_out", "held-out log-likelihood (nats)"), ("divergence", "D (nats)")):
        curves = {}
        for it in seeds:
            if it.seed == seeds[0].seed and (it.method, it.ratio) in part.drawn:
                steps = [row for row in it.history if key in row]
                if steps:
                    pair = [row["step"] for row in steps], [row[key] for row in steps]
                    curves[_label(it.method, it.ratio)] = pair
        if curves:
            figure = plots.training_curves(curves, label=label)
            blocks.append(figure_block(f"In training: {label}", figure, _TRAINED[key]))
    return Section("Training", blocks=blocks)


_SAMPLED = ("latent", "truncation", "rejection")
_LOOKING = (
    ring.PrecisionRecall(lam=10.0),
    ring.PrecisionHalf(lam=10.0),
    ring.RecallHalf(lam=0.3),
    ring.KL(),
    ring.ReverseKL(),
)
_POINTS = (
    "Mean over seeds and its standard error. Hollow: sampled otherwise from the flow of maximum "
    "likelihood; filled: trained otherwise."
)
_TABLED = (
    "Mean over seeds and its standard error, or that from the samples where it is larger; cost: "
    "draws per sample."
)
_GAINED = "Mean of the differences, seed by seed, and its standard error."
_CURVED = "Mean over seeds, and two standard errors of it on either side."
_LOOKED = "The weight of each slope of the curve; a needle is a single one."
_TRAINED = {
    "held_out": "Of rows that were not trained on, the first seed.",
    "divergence": "What is minimised, from the middle on, the first seed; by the critic's ratio "
    "where the exact one is not known.",
}

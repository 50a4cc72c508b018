"""What flows trained for precision or for recall come to, beside sampling for it.

Eight Gaussians on a ring with a flow too small for them (``ring``), where precision and recall
are sums over a grid; the digits of scikit-learn (``digits``) and those of MNIST (``mnist``), where
they are counted by neighbours in two spaces of features, one of which no critic has seen.

Source: Verine et al. (2023), arXiv 2302.00628; Verine et al. (2024), arXiv 2311.00460.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rkl.runs import Run, check_out, write_atomic
from rkl.studies.precision_recall import images, ring
from rkl.studies.precision_recall.rows import ML, Row, Seed, rows_of, to_csv
from rkl.studies.study import in_processes

if TYPE_CHECKING:
    from rkl.report import Block, Section

WORKERS = 2  # processes, of one thread each
FREE, MUCH = 1.001, 0.06  # draws per sample that count as one; a loss of precision or recall


@dataclass(frozen=True)
class Part:
    """One set of data.

    Attributes:
        title: Of its report.
        plan: Its sizes.
        run: All laws from one seed.
        axes: What is drawn against what, by the title of the figure: recall and precision.
        drawn: Methods whose samples, and curves where they are known, are shown.
        says: What to see.
    """

    title: str
    plan: Any
    run: Callable[[Any, int], Iterable[Seed]]
    axes: Mapping[str, tuple[str, str]]
    drawn: Sequence[tuple[str, str]]
    says: str


PARTS: Mapping[str, Part] = {
    "ring": Part(
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
        says=(
            "Both laws are known, so that precision α(λ) and recall β(λ) are sums over a grid, "
            "and the errors are those over seeds alone: new data, a new flow, a new critic. "
            "Every fit takes the same number of steps, the maximum likelihood that it begins "
            "with included."
        ),
    ),
    "digits": Part(
        title="Precision and recall: the digits of scikit-learn",
        plan=images.Plan(),
        run=images.run,
        axes=images.AXES,
        drawn=images.DRAWN,
        says=images.SAYS,
    ),
    "mnist": Part(
        title="Precision and recall: MNIST",
        plan=images.MNIST,
        run=images.run,
        axes=images.AXES,
        drawn=images.DRAWN,
        says=images.SAYS,
    ),
}


def study(
    part: str,
    out: str | os.PathLike,
    *,
    overwrite: bool = False,
    seed: int = 0,
    device: str = "cpu",
    data: str | os.PathLike | None = None,
) -> Path:
    """Fit, sample and measure in every way, and write the figures.

    Args:
        part: "ring", "digits" or "mnist".
        out: The folder to write: a csv of all figures, pictures, a report.
        overwrite: Whether to replace the run that is there.
        seed: Of the first data set and fit; the others follow.
        device: The cpu, for which this is made.
        data: IDX file of images, with its labels beside it, for "mnist".

    Returns:
        The report.
    """
    if part not in PARTS:
        raise ValueError(f"part must be one of {', '.join(PARTS)}; got {part!r}.")
    if device != "cpu":
        raise ValueError(f"device must be 'cpu', for which this is made; got {device!r}.")
    plan = PARTS[part].plan
    if (data is None) == (part == "mnist"):
        told = "must be the IDX file of the images" if data is None else "is for mnist alone"
        raise ValueError(f"data {told}, in part {part!r}; got {data}.")
    if isinstance(plan, images.Plan):
        plan = replace(plan, data=None if data is None else os.fspath(data))
        inputs = {"data": data}
        check_out(out, overwrite=overwrite, resumable=False, inputs=inputs)
        images.read(plan)  # refused before anything is written
    return conducted(part, plan, out, overwrite=overwrite, seed=seed)


def conducted(
    part: str, plan: Any, out: str | os.PathLike, *, overwrite: bool = False, seed: int = 0
) -> Path:
    """One part in the sizes of a plan."""
    settings = {"part": part, "plan": {name: repr(it) for name, it in vars(plan).items()}}
    run = Run.create(out, "studies.precision_recall", settings, seed=seed, overwrite=overwrite)
    with run.running():
        laws = _all_laws(PARTS[part], plan, range(seed, seed + plan.seeds))
        rows = rows_of(laws)
        write_atomic(run.path / f"{part}.csv", to_csv(rows))
        _report(run, PARTS[part], rows, laws)
    return run.path / "report.html"


def _all_laws(part: Part, plan: Any, seeds: Sequence[int]) -> list[Seed]:
    """Seed by seed, in processes of one thread each where there are several."""
    columns = [part.run] * len(seeds), [plan] * len(seeds), seeds
    return [law for laws in in_processes(_laws, *columns, workers=WORKERS) for law in laws]


def _laws(run: Callable[[Any, int], Iterable[Seed]], plan: Any, seed: int) -> list[Seed]:
    return list(run(plan, seed))


def _report(run: Run, part: Part, rows: Sequence[Row], laws: Sequence[Seed]) -> None:
    from rkl.report import Section, Settings, render, write

    sections = [
        Section("What came out", part.says, [*_points(run, part, rows), *_tables(rows)]),
        _pictures(run, part, laws),
        *_curves(part, laws),
        _training(part, laws),
        Section("Settings", blocks=[Settings(run.record)]),
    ]
    page = render(part.title, [it for it in sections if it.blocks], lead=_lead(part, rows))
    write(run.path / "report.html", page)


def _told(method: str, ratio: str) -> str:
    return method if ratio == "none" else f"{method}, {ratio}"


def _lead(part: Part, rows: Sequence[Row]) -> str:
    """Who gained most at one draw per sample without losing much of the other, in words."""
    from rkl.report import written

    by = {(it.method, it.ratio, it.quantity): it for it in rows}
    free = [key[:2] for key, it in by.items() if key[2] == "cost" and it.mean[0] < FREE]
    told = []
    for axes in part.axes.values():
        for wanted, other in (axes, axes[::-1]):
            fair = [it for it in free if by[(*it, other)].gain[0] > -MUCH]
            best = max(fair, key=lambda it: by[(*it, wanted)].mean[0])
            told.append(
                f"most {wanted}: {_told(*best)}, {written(by[(*best, wanted)].mean)} (maximum "
                f"likelihood {written(by[(ML, 'none', wanted)].mean)})"
            )
    return (
        f"{len(rows[0].values)} seeds. At one draw per sample, losing at most {MUCH:g} of the "
        f"other, {'; '.join(told)}."
    )


def _points(run: Run, part: Part, rows: Sequence[Row]) -> "list[Block]":
    """Precision against recall, a point per method."""
    from rkl.plots.operating import operating_points
    from rkl.report import drawn

    blocks = []
    for i, (title, (recall, precision)) in enumerate(part.axes.items()):
        by = {(it.method, it.ratio, it.quantity): it.mean for it in rows}
        names = dict.fromkeys((it.method, it.ratio) for it in rows)
        points = {
            _told(*name): (by[(*name, recall)], by[(*name, precision)])
            for name in names
            if (*name, recall) in by
        }
        sampled = frozenset(name for name in points if name.startswith(_SAMPLED))
        figure = operating_points(points, recall=recall, precision=precision, hollow=sampled)
        block = drawn(title, figure, _POINTS)
        write_atomic(run.path / f"points-{i + 1}.svg", block.svg)
        blocks.append(block)
    return blocks


def _tables(rows: Sequence[Row]) -> "list[Block]":
    """All quantities, and what each gained over maximum likelihood."""
    from rkl.report import Table

    quantities = list(dict.fromkeys(it.quantity for it in rows))
    names = dict.fromkeys((it.method, it.ratio) for it in rows)
    by = {(it.method, it.ratio, it.quantity): it for it in rows}

    def body(value: Callable[[Row], Any]) -> list[list[Any]]:
        return [
            [_told(*name), *(value(by[(*name, it)]) if (*name, it) in by else None for it in them)]
            for name in names
        ]

    def value(it: Row) -> Any:
        return it.mean[0] if it.quantity == "cost" else it.mean

    them = quantities
    first = Table("Every method", ["", *them], body(value), _TABLED)
    them = [it for it in quantities if it != "cost"]
    second = Table("Gain over maximum likelihood", ["", *them], body(lambda it: it.gain), _GAINED)
    return [first, second]


def _pictures(run: Run, part: Part, laws: Sequence[Seed]) -> "Section":
    from rkl.plots.operating import clouds, montages
    from rkl.report import Section, drawn

    shown = {
        _told(it.method, it.ratio): torch.tensor(it.samples)
        for it in laws
        if it.samples and it.seed == laws[0].seed and (it.method, it.ratio) in part.drawn
    }
    if not shown:
        return Section("Samples")
    flat = next(iter(shown.values())).ndim == 2
    figure = (clouds if flat else montages)(shown)
    block = drawn("Draws", figure, "The first seed.")
    write_atomic(run.path / "samples.svg", block.svg)
    return Section("Samples", blocks=[block])


def _curves(part: Part, laws: Sequence[Seed]) -> "list[Section]":
    """The curves with a band of two standard errors, and where the divergences look."""
    from rkl import plots
    from rkl.report import Section, drawn

    curves, bands = {}, {}
    for method, ratio in part.drawn:
        mine = [it.curve for it in laws if (it.method, it.ratio) == (method, ratio)]
        if not mine or not mine[0][0]:
            continue
        slopes = torch.tensor(mine[0][0]).double()
        precision = torch.tensor([it[1] for it in mine]).double()
        middle = precision.mean(0)
        curves[_told(method, ratio)] = middle.numpy(), (middle / slopes).numpy()
        if len(mine) > 1:
            error = 2 * precision.std(0) / len(mine) ** 0.5
            bands[_told(method, ratio)] = (middle - error).numpy(), (middle + error).numpy()
    if not curves:
        return []
    figure = plots.precision_recall(curves, bands=bands, between=("ring", "flow"))
    block = drawn("Precision against recall, over all slopes", figure, _CURVED)
    return [Section("The curves", blocks=[block, _spectrum()])]


def _spectrum() -> "Block":
    from rkl.metrics.precision_recall import pr_spectrum
    from rkl.plots.trade_offs import spectrum
    from rkl.report import drawn

    wanted = {ring.named(it): it for it in _LOOKING}
    slopes = torch.logspace(-2, 2, 401, dtype=torch.float64)
    found = {name: pr_spectrum(it, slopes) for name, it in wanted.items()}
    weights = {
        name: (it.density * slopes * slopes.clamp_max(1.0)).numpy() for name, it in found.items()
    }
    atoms = {
        name: list(zip(it.atom_slopes.tolist(), it.atom_weights.tolist(), strict=True))
        for name, it in found.items()
    }
    figure = spectrum(slopes.numpy(), weights, atoms=atoms)
    return drawn("Where on the curve the divergences look", figure, _LOOKED)


def _training(part: Part, laws: Sequence[Seed]) -> "Section":
    from rkl import plots
    from rkl.report import Section, drawn

    blocks = []
    for key, label in (("held_out", "held-out log-likelihood (nats)"), ("divergence", "D (nats)")):
        curves = {}
        for it in laws:
            if it.seed == laws[0].seed and (it.method, it.ratio) in part.drawn:
                steps = [row for row in it.history if key in row]
                if steps:
                    pair = [row["step"] for row in steps], [row[key] for row in steps]
                    curves[_told(it.method, it.ratio)] = pair
        if curves:
            figure = plots.training_curves(curves, label=label)
            blocks.append(drawn(f"In training: {label}", figure, _TRAINED[key]))
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

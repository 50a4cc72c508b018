"""The report of a flow fitted to data: its samples, precision against recall, and training."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rkl.divergences import FDivergence, parse
from rkl.metrics.clusters import prd_curve
from rkl.metrics.samples import Measured
from rkl.tables import with_error

if TYPE_CHECKING:
    from rkl.report import Block, Section

Rows = Sequence[Mapping[str, Any]]  # of metrics.jsonl


def data_page(
    real: Tensor | None,
    fake: Tensor,
    measured: Measured | None,
    metrics: Rows,
    settings: Mapping[str, Any],
    free: tuple[Tensor, Tensor] | None = None,
) -> str:
    """The report as HTML.

    Args:
        real: Held-out rows, [rows, features]; None where the data are no longer there.
        fake: Samples of the flow, [samples, features].
        measured: Comparison of both.
        metrics: Rows of metrics.jsonl.
        settings: Contents of run.json, for the end of the report.
        free: Rows and samples in units of the spread, for the curve; by default unscaled.
    """
    from rkl.report import Section, Settings, render

    divergence = settings["settings"]["divergence"]
    sections = [_samples(real, fake, measured, free), _training(metrics)]
    looked = parse(divergence)
    if isinstance(looked, FDivergence):
        sections.append(_spectrum(divergence, looked))
    sections.append(Section("Settings", blocks=[Settings(settings)]))
    lead = f"A flow was fitted under {divergence}." + _result(measured)
    return render("Samples of a flow", [it for it in sections if it.blocks], lead=lead)


def _result(measured: Measured | None) -> str:
    if measured is None:
        return " Its samples were not compared with held-out rows."
    precision, recall = (
        with_error(*measured.scores[name].pair(), plus_minus=True)
        for name in ("precision", "recall")
    )
    return f" On held-out rows its samples have precision {precision} and recall {recall}."


def _samples(
    real: Tensor | None,
    fake: Tensor,
    measured: Measured | None,
    free: tuple[Tensor, Tensor] | None,
) -> "Section":
    from rkl import plots
    from rkl.plots.lattices import planes
    from rkl.report import Section, figure_block

    sides = {"held out": real, "flow": fake}
    blocks: list[Block] = []
    if fake.shape[1] == 2:
        panels = {name: it.numpy() for name, it in sides.items() if it is not None}
        blocks.append(figure_block("Samples", planes(panels, columns=2), "On one scale."))
    if real is None or measured is None:
        return Section("Samples", _GONE if real is None else _FEW.format(len(real)), blocks)
    one, other = (real, fake) if free is None else free
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        curve = prd_curve(real=one, fake=other, clusters=min(20, len(one) + len(other)))
    precision, recall = curve.precision, curve.recall
    low, high = (
        (precision.value + sign * precision.error).clamp(0, 1).numpy() for sign in (-2, 2)
    )
    drawing = plots.precision_recall(
        {"flow": (precision.value.numpy(), recall.value.numpy())},
        bands={"flow": (low, high)},
        between=("data", "flow"),
    )
    drawings = [figure_block("Precision against recall, over all slopes", drawing, _CURVE_SAYS)]
    if caught:  # too few clusters hold real samples
        drawings = []
    notes = f"{measured.about}.", *measured.notes
    return Section(
        "Samples",
        blocks=[
            *blocks,
            *drawings,
            replace(measured.table(), title="Scores", notes=notes),
        ],
    )


def _training(metrics: Rows) -> "Section":
    from rkl import plots
    from rkl.report import Section, figure_block

    blocks = []
    for name, (title, label) in _TRACES.items():
        pairs = [(row["step"], row[name]) for row in metrics if row.get(name) is not None]
        if pairs:
            curve = [it[0] for it in pairs], [it[1] for it in pairs]
            blocks.append(figure_block(title, plots.training_curves({name: curve}, label=label)))
    return Section("Training", blocks=blocks)


def _spectrum(name: str, divergence: FDivergence) -> "Section":
    from rkl.metrics.precision_recall import pr_spectrum
    from rkl.plots.trade_offs import spectrum
    from rkl.report import Section, figure_block

    slopes = torch.logspace(-2, 2, 81, dtype=torch.float64)
    weighting = pr_spectrum(divergence, slopes)
    weights = (weighting.density * slopes * slopes.clamp_max(1.0)).numpy()
    atoms = list(zip(weighting.atom_slopes.tolist(), weighting.atom_weights.tolist(), strict=True))
    figure = spectrum(slopes.numpy(), {name: weights}, atoms={name: atoms})
    return Section(
        "Weight of the divergence along the curve",
        blocks=[figure_block("Its spectrum", figure, _LOOKS)],
    )


_TRACES = {
    "loss": ("Loss in training", "loss (nats)"),
    "held_out": ("Likelihood of what was held out", "log-density (nats per row)"),
    "divergence": ("The divergence, by the critic", "D (nats)"),
}
_GONE = "The data that the flow was fitted to are no longer where they were: nothing is compared."
_FEW = "{} held-out rows are too few for scores, which need at least 20."
_CURVE_SAYS = (
    "From the shares of 20 clusters, with a band of two standard errors. Differences within a "
    "cluster do not count, which makes the curve too high; the noise of shares makes it too low: "
    "the notes have the scores of two samples of one distribution. Up: precise; right: diverse."
)
_LOOKS = "Weight left of 1 is on recall, right of 1 on precision; needles are single slopes."

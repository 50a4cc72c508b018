"""The report of one estimate or several: the posterior, what is reported of it, what it costs."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rkl.bayes.estimate import Estimate, elements
from rkl.bayes.tables import Table

if TYPE_CHECKING:
    from rkl.bayes.run import Estimated
    from rkl.plots import Figure
    from rkl.report import Block, Section

PANELS = 6  # marginals that are drawn
DRAWN = 20_000  # draws that a histogram is made of


def page(found: Mapping[str, "Estimated"], records: Sequence[Mapping[str, Any]]) -> str:
    """The report as HTML."""
    from rkl.report import Section, Settings, render

    sections = []
    for name, it in found.items():
        title = "The estimate" if len(found) == 1 else name
        sections.append(_section(title, it))
    kept = {name: dict(record) for name, record in zip(found, records, strict=True)}
    values = next(iter(kept.values())) if len(kept) == 1 else kept
    sections.append(Section("Settings", blocks=[Settings(values)]))
    first = next(iter(found.values())).estimate
    lead = f"{first.family} under {first.divergence}." if len(found) == 1 else ""
    return render("Which number to report", sections, lead=lead)


def posterior_figure(
    estimate: Estimate, comparison: Table | None = None, region: Any = None
) -> "Figure":
    """Every marginal posterior, up to six, with the acts marked and the region shaded."""
    from rkl.plots import posterior

    shown = dict(list(_marginals(estimate).items())[:PANELS])
    acts = {"act": estimate.act} if comparison is None else comparison.acts
    marks = {name: _numbers(values) for name, values in acts.items()}
    ranges = {} if region is None else _ranges(region, shown)
    return posterior(shown, marks, regions=ranges)


def _marginals(estimate: Estimate) -> dict[str, Any]:
    question = estimate.question
    found = {}
    for name in question.model.names:
        if len(found) >= PANELS:
            break
        values = question.draws[name].flatten(0, 1)
        values = values[:: max(1, len(values) // DRAWN)].reshape(-1, max(1, values[0].numel()))
        for i, label in enumerate(elements(name, question.draws[name].shape[2:])[:PANELS]):
            found[label] = values[:, i].numpy()
    return found


def _numbers(values: Mapping[str, Tensor]) -> dict[str, float]:
    found = {}
    for name, value in values.items():
        value = torch.as_tensor(value)
        pairs = zip(elements(name, value.shape), value.flatten().tolist(), strict=True)
        found |= {label: x for label, x in pairs if math.isfinite(x)}
    return found


def _ranges(region: Any, shown: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    low, high = (_numbers({name: ends[i] for name, ends in region.ranges.items()}) for i in (0, 1))
    return {name: (low[name], high[name]) for name in shown if name in low and name in high}


def _section(title: str, it: "Estimated") -> "Section":
    from rkl.report import Section, drawn

    blocks: list[Block] = [
        _table(it.estimate.table()),
        drawn(
            "The posterior, and what is reported of it",
            posterior_figure(it.estimate, it.comparison, it.region),
            "Grey: the draws of each parameter. Lines: the estimates. Shaded: the values that "
            "occur in the credible region, which holds the draws whose laws are closest to the "
            "reported one; it is the same region in every parametrisation.",
        ),
        _table(it.region.table()),
        _table(it.comparison),
        *_bars(it.comparison),
    ]
    return Section(title, blocks=blocks)


def _table(table: Table) -> "Block":
    from rkl.report import Table as Shown

    return Shown(table.title, table.columns, table.rows, " ".join(table.notes))


def _bars(table: Table) -> list["Block"]:
    """What each estimate loses beyond the least, under each loss."""
    from rkl.plots import bars
    from rkl.report import drawn

    blocks = []
    for place, column in enumerate(table.columns):
        if not column.startswith("excess"):
            continue
        values, errors = {}, {}
        for row in table.rows:
            match row[place]:
                case (value, error):
                    values[str(row[0])], errors[str(row[0])] = value, error
                case float() | int() as value:
                    values[str(row[0])] = value
        if values:
            title = column[0].upper() + column[1:]
            drawing = bars(values, errors=errors, label=column)
            caption = "What each estimate loses beyond the best under this loss: less is better."
            blocks.append(drawn(title, drawing, caption))
    return blocks

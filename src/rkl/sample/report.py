"""The report of a flow fitted to a target: results, coverage and cost."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rkl.sample.results import (
    Evaluation,
    Reference,
    figures,
    thermal_columns,
    thermal_tail,
)
from rkl.sample.targets.base import has_temperature
from rkl.stats import Mean
from rkl.tables import Table

if TYPE_CHECKING:
    from rkl.report import Block, Section

SHOWN = 4  # conditions of which draws are shown
POINTS = 2_000  # points in a panel
COSTED = "energy", "magnetization"  # by which the cost of averages is judged, where there are any
Rows = Sequence[Mapping[str, Any]]  # of metrics.jsonl
FLOW = "flow, after Metropolis"


def target_page(found: Evaluation, metrics: Rows, settings: Mapping[str, Any]) -> str:
    """The report as HTML.

    Args:
        found: The evaluation, with a reference.
        metrics: Rows of metrics.jsonl.
        settings: Contents of run.json, for the end of the report.
    """
    from rkl.report import Section, Settings, render

    sections = [
        _results(found),
        _trust(found),
        _draws(found),
        *_training(metrics),
        *_cost(found, metrics),
        Section("Settings", blocks=[Settings(settings)]),
    ]
    return render(f"Draws of {found.target}", sections, lead=_lead(found))


def _lead(evaluation: Evaluation) -> str:
    chains, draws = evaluation.chain.accepted.shape[-2:]
    low, high = evaluation.chain.acceptance.min(), evaluation.chain.acceptance.max()
    verdict = {
        True: "It covers the target under every condition measured.",
        False: "IT DOES NOT COVER THE TARGET: read the reasons before using it.",
        None: "Its coverage of the target is unknown.",
    }[evaluation.passed]
    least, most = f"{low:.0%}", f"{high:.0%}"
    accepts = least if least == most else f"{least} to {most}"
    under = f"each of {len(evaluation.condition)}" if len(evaluation.condition) > 1 else "one"
    return (
        f"One flow for every condition, corrected by {chains} Metropolis chains of {draws:,} "
        f"draws under {under}; it accepts {accepts} of the proposals. {verdict}"
    ).replace("%", " %")


def _name_of(reference: Reference) -> str:
    return reference.source + " (not to be trusted)" * (not reference.mixed)


def _results(evaluation: Evaluation) -> "Section":
    from rkl.plots.lattices import against
    from rkl.report import Section, figure_block

    blocks: list[Block] = []
    if len(evaluation.condition) > 1:
        units, reference = evaluation.units(), evaluation.reference
        source = _name_of(reference) if reference is not None and reference.mixed else None
        panels = {}
        for name, mean in evaluation.averages.items():
            title = f"{_words(name)} ({units[name]})" if name in units else _words(name)
            panels[title] = _by_series(evaluation, FLOW, mean)
            if reference is not None:
                panels[title] |= _by_series(
                    evaluation, _name_of(reference), reference.averages[name]
                )
        band = source if len(_series(evaluation)) == 1 else None
        how: dict[str, Any] = {"label": _label(evaluation), "band": band}
        blocks.append(figure_block("Averages", against(panels, **how), _AVERAGES_SAYS))
        blocks.append(figure_block("Thermodynamics", _thermal_figure(evaluation), _THERMAL_SAYS))
    units = evaluation.units()
    named = {
        f"{_words(n)} ({units[n]})" if n in units else n: mean
        for n, mean in evaluation.averages.items()
    }
    thermal = thermal_columns(evaluation)
    tails = [*map(evaluation.tails.get, evaluation.averages)]
    thermal_tails = [thermal_tail(evaluation, name) for name in thermal]
    notes = ["With standard errors.", *["k_B = 1."][: has_temperature(evaluation.target)]]
    tables = [
        figures(evaluation, "Averages, after Metropolis", named, tails, notes),
        figures(evaluation, "Thermodynamics, from the weights", thermal, thermal_tails, notes),
    ]
    judged = evaluation.reference is not None and evaluation.reference.mixed
    agreement = [_agreement(evaluation)] if judged else []
    return Section("What it gives", blocks=[*blocks, *agreement, *tables])


def _thermal_figure(evaluation: Evaluation) -> Any:
    from rkl.plots.lattices import against

    columns = thermal_columns(evaluation)
    del columns["log Z (nats)"]
    panels = {title: _by_series(evaluation, "flow", it) for title, it in columns.items()}
    reference, band = evaluation.reference, None
    if reference is not None and reference.log_z is not None:
        log_z, of = evaluation.thermodynamics.log_z, reference.log_z
        zero = torch.zeros_like(of.error)
        apart = Mean(log_z.value - of.value, log_z.error)
        source = reference.log_z_source
        doubted = source == reference.source and not reference.mixed
        source += " (not to be trusted)" * doubted
        title = f"log Z, less that of {source} (nats)"
        panels[title] = _by_series(evaluation, "flow", apart)
        panels[title] |= _by_series(evaluation, source, Mean(zero, of.error))
        band = source if len(_series(evaluation)) == 1 and not doubted else None
    return against(panels, label=_label(evaluation), band=band)


def _agreement(evaluation: Evaluation) -> Table:
    rows = [
        [_words(name), it.square().mean().sqrt().item(), it.abs().max().item()]
        for name, it in evaluation.deviations().items()
    ]
    columns = ["quantity", "rms z over conditions", "largest |z|"]
    assert evaluation.reference is not None
    together = _TOGETHER if evaluation.reference.log_z_seconds else ""
    return Table("Agreement with the reference", columns, rows, _AGREEMENT_SAYS + together)


def _trust(evaluation: Evaluation) -> "Section":
    from rkl.plots.lattices import against
    from rkl.report import Section, figure_block

    weights, blocks = evaluation.weights, []
    nothing = torch.zeros_like(weights.predicted_ess)
    if len(evaluation.condition) > 1:
        panels = {
            "acceptance": _by_series(evaluation, "measured", weights.acceptance)
            | _by_series(evaluation, "erfc(s/2)", Mean(weights.predicted_acceptance, nothing)),
            "ESS, share of draws": _by_series(evaluation, "measured", weights.ess)
            | _by_series(evaluation, "exp(−s²)", Mean(weights.predicted_ess, nothing)),
            "v = var(log w)/sites": _by_series(evaluation, "measured", weights.v),
        }
        how: Any = {"label": _label(evaluation), "logarithmic": ("v = var(log w)/sites",)}
        blocks.append(figure_block("How near the flow is", against(panels, **how), _NEAR_SAYS))
    blocks.append(_chains(evaluation))
    worst = max(evaluation.coverage, key=lambda it: len(it.reasons))
    at = evaluation.conditions()[evaluation.coverage.index(worst)]
    modes = [[it.name, *(mass.pair() for mass in it.masses), it.missing] for it in worst.modes]
    if len(modes) > 1:
        columns = ["mode", "target", "flow", "flow, reweighted", "missing"]
        blocks.append(Table(f"Masses of the modes at {at}", columns, modes, _MODES_SAYS))
    sentences = [
        worst.verdict if evaluation.passed is None else evaluation.why or "nothing is missing."
    ]
    sentences += [*evaluation.reference_warnings, *evaluation.warnings]
    text = "\n\n".join(it[:1].upper() + it[1:] for it in sentences)
    return Section("Whether to trust it", text, blocks)


def _chains(evaluation: Evaluation) -> Table:
    judged = evaluation.chain.diagnose(evaluation.values).values()
    ratio = torch.stack([it["rhat"] for it in judged]).nan_to_num(1.0).amax(0)
    time = torch.stack([it["time"] for it in judged]).nan_to_num(1.0).amax(0)
    least = torch.stack([*evaluation.effective.values()]).nan_to_num(0.0).amin(0)
    figures = (
        evaluation.chain.acceptance,
        evaluation.chain.longest_rejection_run,
        ratio,
        time,
        least,
    )
    rows = [
        [at, *(it[k].item() for it in figures)] for k, at in enumerate(evaluation.conditions())
    ]
    columns = ["condition", "accepted", "longest run without an accepted proposal (draws)"]
    columns += [
        "R-hat, largest",
        "autocorrelation time, longest (draws)",
        "effective draws, least",
    ]
    return Table("The chains of the flow", columns, rows, _CHAINS_SAY)


def _draws(evaluation: Evaluation) -> "Section":
    from rkl.plots.lattices import histograms, planes
    from rkl.report import Section, figure_block

    rows = _spread(len(evaluation.condition))
    name = next(iter(evaluation.values))
    unit = evaluation.units().get(name, "")
    panels: dict[str, dict[str, Any]] = {
        at: {} for at in (evaluation.conditions()[k] for k in rows)
    }
    for k, panel in zip(rows, panels.values(), strict=True):
        if evaluation.reference is not None:
            values = evaluation.reference.values[name][k].flatten().numpy()
            panel[_name_of(evaluation.reference)] = values
        panel[FLOW] = evaluation.values[name][k].flatten().numpy()
    label = f"{_words(name)} ({unit})" if unit else _words(name)
    blocks = [figure_block("How often", histograms(panels, label=label), _HISTOGRAM_SAYS)]
    last = {
        evaluation.conditions()[k]: evaluation.chain.x[k, 0, -1]
        for k in _spread(len(evaluation.condition), 7)
    }
    figure = evaluation.target.figure(last)
    if figure is not None:
        blocks.append(figure_block("Configurations", *figure))
    if evaluation.target.event_shape == (2,):
        for k in dict.fromkeys((rows[0], rows[-1])):
            drawing = planes(_points(evaluation, k), marks=_missing(evaluation, k))
            blocks.append(
                figure_block(f"The plane, {evaluation.conditions()[k]}", drawing, _PLANE_SAYS)
            )
    return Section("Draws", blocks=blocks)


def _points(evaluation: Evaluation, row: int) -> dict[str, Any]:
    panels: dict[str, Tensor] = {}
    if evaluation.reference is not None:
        panels[_name_of(evaluation.reference)] = evaluation.reference.x[row]
    panels[FLOW] = evaluation.chain.x[row]
    flat = {name: it.flatten(0, 1) for name, it in panels.items()}
    return {name: it[:: -(-len(it) // POINTS)].numpy() for name, it in flat.items()}


def _missing(evaluation: Evaluation, row: int) -> dict[str, Any]:
    target, modes = evaluation.target, evaluation.coverage[row].modes
    lost = [k for k, it in enumerate(modes) if it.missing]
    if not lost:
        return {}
    x = evaluation.chain.x[row, 0, :1]
    target_modes = target.modes(x, evaluation.condition[row].expand(1, -1))
    centres = None if target_modes is None else target_modes.centres
    return {} if centres is None else {FLOW: centres[lost].cpu().numpy()}


def _training(metrics: Rows) -> list["Section"]:
    from rkl.plots import training_curves
    from rkl.report import Section, figure_block

    blocks = []
    for title, names, label, logarithmic in _TRACES:
        curves = {}
        for name in names:
            pairs = [(row["step"], row[name]) for row in metrics if row.get(name) is not None]
            if pairs:
                curves[name] = [it[0] for it in pairs], [it[1] for it in pairs]
        if curves:
            drawing = training_curves(curves, label=label, logarithmic=logarithmic)
            blocks.append(figure_block(title, drawing))
    return [Section("Training", _TRAINING, blocks)] if blocks else []


def _cost(evaluation: Evaluation, metrics: Rows) -> list["Section"]:
    from rkl.report import Section

    drawn = evaluation.reference
    if drawn is None:
        return []
    trained = float(metrics[-1]["seconds"]) if metrics else 0.0
    name, of_flow = _slowest(evaluation.effective, evaluation.seconds)
    other, theirs = _slowest(drawn.effective, drawn.seconds)
    log_z = evaluation.thermodynamics.log_z.error.max().item()
    columns = ["method", "training (s)", "drawing (s)", "effective draws per second (worst)"]
    columns += ["error of log Z (nats, worst)", "what it gives"]
    rows = [
        ["flow and Metropolis", trained, evaluation.seconds, of_flow, None, _GIVES["flow"]],
        [
            "the flow's weights",
            trained,
            evaluation.weights_seconds,
            None,
            log_z,
            _GIVES["weights"],
        ],
        [drawn.source, 0.0, drawn.seconds, theirs, None, _GIVES["chain"]],
    ]
    if drawn.log_z is not None and drawn.log_z_seconds:
        error = drawn.log_z.error.max().item()
        source = drawn.log_z_source
        rows.append([source, 0.0, drawn.log_z_seconds, None, error, _GIVES["integration"]])
    caption = f"The worst of all quantities and conditions: {_words(name)} and {_words(other)}."
    return [
        Section(
            "What it costs",
            _judgement(evaluation, trained, of_flow, theirs) if evaluation.passed else _NOT_JUDGED,
            [Table("On this machine, in this run", columns, rows, caption)],
        )
    ]


def _slowest(effective: Mapping[str, Tensor], seconds: float) -> tuple[str, float]:
    """The quantity with the fewest effective draws under any condition, and their rate."""
    effective = {name: effective[name] for name in COSTED if name in effective} or effective
    least = {name: it[it > 0].min().item() for name, it in effective.items() if (it > 0).any()}
    name = min(least, key=least.__getitem__)
    return name, len(next(iter(effective.values()))) * least[name] / seconds


def _judgement(evaluation: Evaluation, trained: float, of_flow: float, of_reference: float) -> str:
    drawn = evaluation.reference
    assert drawn is not None
    first, second = (
        (drawn.source, "the flow") if of_reference > of_flow else ("the flow", drawn.source)
    )
    mixing = "Averages belong to Markov chains where these mix well, as they do here."
    mixing = mixing if of_reference > of_flow else "The chains mix slowly here."
    factor = max(of_flow, of_reference) / min(of_flow, of_reference)
    sentences = [
        f"Plain averages: {first} is {factor:.3g} times faster than {second} "
        f"({of_reference:,.0f} effective draws per second by {drawn.source}, {of_flow:,.0f} by "
        f"the flow, its {trained:.0f} s of training not counted). {mixing} What the flow adds are "
        "independent draws at any condition, without burn-in, and log Z."
    ]
    if drawn.log_z is not None and drawn.log_z_seconds:
        error, of = (
            it.error.max().item() for it in (evaluation.thermodynamics.log_z, drawn.log_z)
        )
        alone = drawn.log_z_seconds * (of / error) ** 2
        whole = trained + evaluation.weights_seconds
        first, second = (
            ("The flow", "integration") if whole < alone else ("Integration", "the flow")
        )
        sentences.append(
            f"log Z: the flow is within {error:.2g} nats everywhere after {whole:.0f} s, training "
            f"included, at {len(evaluation.condition)} conditions and any other that it was "
            f"trained on; {drawn.log_z_source} would take {alone:.0f} s for the same error. "
            f"{first} is cheaper than {second} here, by a factor of "
            f"{max(whole, alone) / min(whole, alone):.2g}."
        )
    return "\n\n".join(sentences)


def _by_series(evaluation: Evaluation, name: str, of: Mean) -> dict[str, Any]:
    """Conditions, values and errors for each value of all conditions but the first."""
    series = _series(evaluation)
    named = {f"{name}, {more}" if more else name: rows for more, rows in series.items()}
    first = evaluation.condition[:, 0] if evaluation.condition.shape[1] else torch.zeros(1)
    columns = (first, of.value, of.error)
    return {key: tuple(it[rows].numpy() for it in columns) for key, rows in named.items()}


def _series(evaluation: Evaluation) -> dict[str, list[int]]:
    series: dict[str, list[int]] = {}
    for k, row in enumerate(evaluation.condition.tolist()):
        pairs = zip(evaluation.target.conditions[1:], row[1:], strict=True)
        name = ", ".join(f"{it.name} = {value:.3g}" for it, value in pairs)
        series.setdefault(name, []).append(k)
    return series


def _label(evaluation: Evaluation) -> str:
    first = evaluation.target.conditions[0]
    return f"{first.name} ({first.unit})" if first.unit else first.name


def _spread(rows: int, most: int = SHOWN) -> list[int]:
    return sorted({round(k) for k in torch.linspace(0, rows - 1, min(rows, most)).tolist()})


def _words(name: str) -> str:
    return {"magnetization": "|m|", "specific_heat": "specific heat"}.get(
        name, name.replace("_", " ")
    )


_TRACES = (
    ("Variance of the log-weights", ("v",), "v, per site", True),
    ("Shares", ("ess", "acceptance", "beta"), "share", False),
    ("On data", ("nll",), "−log q (nats)", False),
)
_TRAINING = (
    "Figures of the draws of single steps, all conditions together. The bound on −log Z that is "
    "minimised is not shown: it varies with the conditions that a step draws."
)
_GIVES = {
    "flow": "averages, at any condition, no burn-in",
    "weights": "log Z, free energy and entropy at any condition",
    "chain": "averages, where it was run",
    "integration": "log Z, at the temperatures that were asked for",
}
_AVERAGES_SAYS = (
    "Points: the flow after Metropolis, one standard error. Line and band: the reference, two "
    "standard errors. Metropolis makes the draws exact in the limit of long chains for any flow; "
    "a bad flow has fewer effective draws."
)
_THERMAL_SAYS = (
    "From the weights of independent draws. log Z is with respect to dx, or dθ in radians; N is "
    "the number of sites or coordinates, F = −T log Z, S = log Z + ⟨E⟩/T; the differential "
    "entropy of angles may be negative."
)
_AGREEMENT_SAYS = (
    "z is the difference over its standard error: rms z is about 1 where the two agree, and its "
    "own error is about 1/√(2 conditions)."
)
_TOGETHER = " The errors of log Z by integration go together, for it begins at T = ∞."
_NEAR_SAYS = (
    "Acceptance and effective share, measured and predicted from s², the variance of the "
    "log-weights, if these are normal. Where they differ, weights have heavy tails, or a part of "
    "the target is missing. v does not depend on the size of the lattice: lower is better."
)
_NOT_JUDGED = (
    "Coverage was not shown. Fast draws of a part of the target are no gain, so no method is "
    "called cheaper here."
)
_CHAINS_SAY = (
    "Of the quantity that is worst under each condition. R-hat above 1.01 or fewer than 400 "
    "effective draws: the errors are uncertain."
)
_MODES_SAYS = (
    "Mass of each mode: in the target, in the flow's draws, and in these reweighted. The draws of "
    "a flow that lacks a mode cannot show it, however good their weights look."
)
_HISTOGRAM_SAYS = "Grey: the reference. Line: the flow after Metropolis."
_PLANE_SAYS = "Crosses mark modes that the flow lacks."

"""What the paper on adaptive KL says of the two KLs, tested on its toy.

The toy: free logits over 80 atoms are fitted to a fixed teacher p. The head is what AKL calls so
at mu = 0.5. The claims: both KLs reach the teacher; on the way, forward KL fits the head first
and reverse KL the tail first.

Source: Wu et al., Rethinking Kullback-Leibler Divergence in Knowledge Distillation for Large
Language Models, arXiv 2404.02657.
"""

import csv
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rkl.divergences import AKL, KL, Divergence, ReverseKL
from rkl.estimators import exact
from rkl.runs import Run, write_atomic

if TYPE_CHECKING:
    from rkl.report import Block, Section

PARTS = ("toy",)
ATOMS = 80
STEPS = 400
REPEATS = 20  # teachers of each kind
KINDS = "peaked", "two bumps", "zipf"
STARTS = "random", "uniform"
DIVERGENCES: Mapping[str, Divergence] = {
    "forward-kl": KL(),
    "reverse-kl": ReverseKL(),
    "akl": AKL(),
}
# The paper's Adam divides each logit's gradient by its own size, which is what the claim is about.
DESCENTS = {"gradient descent": (torch.optim.SGD, 5.0), "Adam": (torch.optim.Adam, 0.2)}
DRAWN = "two bumps"  # the paper's kind of teacher; its first one, from a random start, is drawn
SHOWN = 0, 5, 20, 100, STEPS
HEAD = AKL(mu=0.5)

CLAIMS = (
    "forward KL fits the head first",
    "reverse KL fits the tail first",
    "forward KL favours the head more than reverse KL",
)

Counts = dict[str, Any]


@dataclass(frozen=True)
class Problem:
    """Teachers and where their students start, one fit each.

    Attributes:
        names: Kind of teacher, start and number of each fit.
        logp: The teachers, likeliest atom first.
        start: The students' first logits.
        head: Which atoms are the teacher's head.
    """

    names: Sequence[tuple[str, str, int]]
    logp: Float[Tensor, "fits atoms"]
    start: Float[Tensor, "fits atoms"]
    head: Bool[Tensor, "fits atoms"]


@dataclass(frozen=True)
class Trace:
    """How fits under one divergence went.

    Attributes:
        gaps: Sum of abs(p - q) over the head and over the tail, before each step and at the end.
        q: What the students said then.
    """

    gaps: Float[Tensor, "steps fits 2"]
    q: Float[Tensor, "steps fits atoms"]


def study(
    part: str,
    out: str | os.PathLike,
    *,
    overwrite: bool = False,
    seed: int = 0,
    device: str = "cpu",
) -> Path:
    """Test a claim, and write its figures.

    Args:
        part: Which one: "toy".
        out: The folder to write: ``toy.csv``, figures, ``run.json`` with the counts, a report.
        overwrite: Whether to replace the run that is there.
        seed: What teachers and starts are drawn from.
        device: Where to compute.

    Returns:
        The report.
    """
    if part not in PARTS:
        raise ValueError(f"part must be 'toy'; got {part!r}.")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device: {device!r} cannot be computed on: {reason}") from None
    settings = {"part": part, "atoms": ATOMS, "steps": STEPS, "repeats": REPEATS}
    run = Run.create(out, "studies.akl", settings, seed=seed, overwrite=overwrite)
    with run.running():
        toy = problem(seed, repeats=REPEATS, device=device)
        traces = {
            descent: {name: fit(toy, it, descent, STEPS) for name, it in DIVERGENCES.items()}
            for descent in DESCENTS
        }
        write_atomic(run.path / "toy.csv", _csv(toy, traces))
        run.update(counts=count(toy, traces))
        _report(run, toy, traces)
    return run.path / "report.html"


def problem(seed: int, *, repeats: int, device: str = "cpu") -> Problem:
    """Teachers of every kind, and for each of them a student from every start."""
    generator = torch.Generator().manual_seed(seed)
    names, teachers, starts = [], [], []
    for kind in KINDS:
        for repeat in range(repeats):
            logp = _teacher(kind, generator).log_softmax(-1)
            noise = torch.randn(ATOMS, generator=generator, dtype=torch.float64)
            for start in STARTS:
                names.append((kind, start, repeat))
                teachers.append(logp)
                starts.append(noise if start == "random" else torch.zeros_like(noise))
    order = torch.stack(teachers).sort(descending=True, stable=True)
    index, chosen = HEAD.search(order.values)
    head = torch.zeros_like(order.values, dtype=torch.bool).scatter(-1, index, chosen)
    tensors = order.values, torch.stack(starts).gather(-1, order.indices), head
    return Problem(names, *(tensor.to(device) for tensor in tensors))


def _teacher(kind: str, generator: torch.Generator) -> Float[Tensor, " atoms"]:
    """The log of an unnormalised teacher over the atoms."""
    atom = torch.arange(ATOMS, dtype=torch.float64)
    if kind == "peaked":
        return 2 * torch.randn(ATOMS, generator=generator, dtype=torch.float64)
    if kind == "zipf":
        exponent = 0.8 + 0.6 * torch.rand((), generator=generator, dtype=torch.float64)
        return -exponent * (1 + atom).log()
    where, size, weight = torch.rand(3, 2, 1, generator=generator, dtype=torch.float64)
    where, size = 10 + 60 * where, 2 + 8 * size
    bumps = -0.5 * ((atom - where) / size) ** 2 - size.log() + (0.2 + weight).log()
    return bumps.logsumexp(0)


def fit(toy: Problem, divergence: Divergence, descent: str, steps: int) -> Trace:
    """Fit free logits to every teacher, all at once and none aware of the others."""
    optimizer_class, rate = DESCENTS[descent]
    logits = toy.start.clone().requires_grad_()
    optimizer = optimizer_class([logits], lr=rate)
    p, weight, q = toy.logp.exp(), torch.ones_like(toy.logp[:, 0]), []
    for step in range(steps + 1):
        q.append(logits.detach().softmax(-1))
        if step < steps:
            optimizer.zero_grad()
            exact(divergence, p=toy.logp, q=logits, weight=weight, compiled=False).backward()
            optimizer.step()
    said = torch.stack(q)
    gap = (p - said).abs()
    parts = [gap.masked_fill(~part, 0.0).sum(-1) for part in (toy.head, ~toy.head)]
    return Trace(torch.stack(parts, -1), said)


def order(trace: Trace) -> Float[Tensor, " fits"]:
    """What is left of the head's gap over what is left of the tail's, half-way.

    Both are relative to the start, and half-way is the first step at which the whole gap is below
    half of what it was. Below 1 the head was fitted first, above 1 the tail. Nan: never half-way.
    """
    left = trace.gaps / trace.gaps[0]
    whole = trace.gaps.sum(-1) / trace.gaps[0].sum(-1)
    halved = whole < 0.5
    step = halved.to(torch.int8).argmax(0)  # the first of the largest
    head, tail = left[step, torch.arange(len(step), device=step.device)].unbind(-1)
    return (head / tail).where(halved.any(0), torch.nan)


def count(toy: Problem, traces: Mapping[str, Mapping[str, Trace]]) -> Counts:
    """In how many fits each claim holds, descent by descent and start by start."""
    counts: Counts = {}
    for descent, by_name in traces.items():
        for start in STARTS:
            chosen = torch.tensor([name[1] == start for name in toy.names])
            ratio = {name: order(trace).cpu()[chosen] for name, trace in by_name.items()}
            left = {
                name: trace.gaps[-1].sum(-1).cpu()[chosen].max().item()
                for name, trace in by_name.items()
            }
            forward, reverse = ratio["forward-kl"], ratio["reverse-kl"]
            holding = forward < 1, reverse > 1, forward < reverse
            counts[f"{descent}, {start} start"] = {
                "fits": int(chosen.sum()),
                **dict(zip(CLAIMS, (int(it.sum()) for it in holding), strict=True)),
                "largest gap left": left,
            }
    return counts


def _csv(toy: Problem, traces: Mapping[str, Mapping[str, Trace]]) -> str:
    page = io.StringIO()
    table = csv.writer(page, lineterminator="\n")
    table.writerow(
        ["descent", "divergence", "teacher", "start", "number", "step", "head_gap", "tail_gap"]
    )
    steps = [it for it in range(STEPS + 1) if it < 20 or it % (10 if it < 100 else 50) == 0]
    for descent, by_name in traces.items():
        for name, trace in by_name.items():
            for gaps, labels in zip(trace.gaps.unbind(1), toy.names, strict=True):
                for step in steps:
                    numbers = (f"{gap:.6e}" for gap in gaps[step].tolist())
                    table.writerow([descent, name, *labels, step, *numbers])
    return page.getvalue()


def _report(run: Run, toy: Problem, traces: Mapping[str, Mapping[str, Trace]]) -> None:
    from rkl.report import Section, Settings, render, write

    counts = run.record["counts"]
    drawn = toy.names.index((DRAWN, "random", 0))
    sections = [
        Section("The claims, counted", _SAYS, [_table(counts)]),
        *(_pictures(run, toy, it, descent, drawn) for descent, it in traces.items()),
        Section("Settings", blocks=[Settings(run.record)]),
    ]
    page = render("The toy of adaptive KL", sections, lead=_lead(counts))
    write(run.path / "report.html", page)


def _lead(counts: Counts) -> str:
    """The counts of both starts together, in words."""
    told = []
    for descent in DESCENTS:
        both = [counts[f"{descent}, {start} start"] for start in STARTS]
        head, tail, favours, fits = (sum(it[key] for it in both) for key in (*CLAIMS, "fits"))
        told.append(
            f"By {descent}, forward KL fitted the head first in {head} of {fits} fits and reverse "
            f"KL the tail first in {tail}; forward KL favoured the head more than reverse KL in "
            f"{favours}."
        )
    return f"Free logits over {ATOMS} atoms, fitted to fixed teachers. {' '.join(told)}"


def _table(counts: Counts) -> "Block":
    from rkl.report import Table

    rows = [[key, *(found[key] for found in counts.values())] for key in ("fits", *CLAIMS)]
    for name in DIVERGENCES:
        gaps = (found["largest gap left"][name] for found in counts.values())
        rows.append([f"largest Σ |p − q| left, {name}", *gaps])
    caption = f"{STEPS} steps; {REPEATS} teachers of each kind: {', '.join(KINDS)}."
    return Table("In how many fits", ["", *counts], rows, caption)


def _pictures(
    run: Run, toy: Problem, traces: Mapping[str, Trace], descent: str, drawn: int
) -> "Section":
    from rkl import plots
    from rkl.report import Figure, Section

    students = {
        name: {step: trace.q[step, drawn].cpu().numpy() for step in SHOWN}
        for name, trace in traces.items()
    }
    p, head = toy.logp[drawn].exp().cpu().numpy(), int(toy.head[drawn].sum())
    gaps = {name: trace.gaps[:, drawn].T.cpu().numpy() for name, trace in traces.items()}
    steps = list(range(STEPS + 1))
    drawings = {
        "Rank by rank": plots.head_tail(p, students, head=head, logarithmic=False),
        "Gap of head and tail": plots.head_tail_by_step(
            steps, {name: (both[0], both[1]) for name, both in gaps.items()}
        ),
    }
    blocks = []
    for title, drawing in drawings.items():
        whole = f"{title}, {descent}"
        svg = plots.to_svg(drawing, whole)
        write_atomic(run.path / f"{whole.lower().replace(',', '').replace(' ', '-')}.svg", svg)
        blocks.append(Figure(whole, svg, _CAPTIONS[title]))
    return Section(f"One fit, {descent}", blocks=blocks)


_SAYS = (
    "A part is fitted first if, when the whole gap Σ |p − q| has fallen to half, less is left of "
    "that part's gap than of the other's, each relative to its start. The teacher's head is its "
    "most probable atoms up to half of its mass.\n\n"
    "The gradient of forward KL, q − p, is large where the teacher is; that of reverse KL, "
    "q (log q/p − KL), where the student says what the teacher would not. Gradient descent "
    "follows these sizes. Adam divides each logit's gradient by its own running size, so that "
    "every logit moves by about the learning rate at first, whatever the divergence says: the "
    "order then depends on how far each logit has to go, and little of the claim is left."
)
_CAPTIONS = {
    "Rank by rank": (
        "The teacher shaded, the students over it; a dotted line ends the teacher's head. "
        "Compare the columns of early steps."
    ),
    "Gap of head and tail": "What is left of Σ |p − q| over the head and over the tail.",
}

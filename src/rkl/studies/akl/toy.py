"""The claims of the paper on adaptive KL about the two KLs, tested on its toy.

The toy: free logits over 80 atoms are fitted to a fixed teacher p. The head is that of AKL
at mu = 0.5. The claims: both KLs reach the teacher; on the way, forward KL fits the head first
and reverse KL the tail first.

Source: Wu et al., Rethinking Kullback-Leibler Divergence in Knowledge Distillation for Large
Language Models, arXiv 2404.02657.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rkl.divergences import AKL, KL, Divergence, ReverseKL
from rkl.estimators import exact
from rkl.studies.study import Outcome, Part
from rkl.tables import Table

if TYPE_CHECKING:
    from rkl.report import Section

ATOMS = 80
KINDS = "peaked", "two bumps", "zipf"
STARTS = "random", "uniform"
DIVERGENCES: Mapping[str, Divergence] = {
    "forward-kl": KL(),
    "reverse-kl": ReverseKL(),
    "akl": AKL(),
}
# The paper's Adam divides each logit's gradient by its own size, which is what the claim is about.
DESCENTS = {"gradient descent": (torch.optim.SGD, 5.0), "Adam": (torch.optim.Adam, 0.2)}
DRAWN = "two bumps", "random", 0  # the fit that is drawn: the paper's kind of teacher
HEAD = AKL(mu=0.5)

CLAIMS = (
    "forward KL fits the head first",
    "reverse KL fits the tail first",
    "forward KL favours the head more than reverse KL",
)

Counts = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """The sizes of the toy.

    Args:
        steps: Steps of each fit.
        repeats: Teachers of each kind.
        shown: Steps at which one fit is drawn.
    """

    steps: int = 400
    repeats: int = 20
    shown: tuple[int, ...] = (0, 5, 20, 100, 400)


@dataclass(frozen=True)
class Problem:
    """Teachers and where their students start, one fit each.

    Attributes:
        names: Kind of teacher, start and number of each fit.
        logp: The teachers, likeliest atom first.
        start: The students' first logits.
        head: True for atoms in the teacher's head.
    """

    names: Sequence[tuple[str, str, int]]
    logp: Float[Tensor, "fits atoms"]
    start: Float[Tensor, "fits atoms"]
    head: Bool[Tensor, "fits atoms"]


@dataclass(frozen=True)
class Trace:
    """Course of the fits under one divergence.

    Attributes:
        gaps: Sum of abs(p - q) over the head and over the tail, before each step and at the end.
        q: The probabilities of the students then.
    """

    gaps: Float[Tensor, "steps fits 2"]
    q: Float[Tensor, "steps fits atoms"]


@dataclass(frozen=True)
class Toy(Part):
    """Fits of free logits under every divergence, by both optimisers.

    Attributes:
        device: Device to compute on.
    """

    device: str = "cpu"
    workers: int = field(default=1, kw_only=True)

    def prepare(self, device: str, data: Any) -> "Toy":
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"device: {device!r} cannot be computed on: {reason}") from None
        super().prepare("cpu", data)
        return replace(self, device=device)

    def jobs(self, seed: int) -> list[tuple[str, str, int]]:
        return [(descent, name, seed) for descent in DESCENTS for name in DIVERGENCES]

    def compute(self, descent: str, name: str, seed: int) -> dict[str, Any]:
        toy = problem(seed, repeats=self.plan.repeats, device=self.device)
        trace = fit(toy, DIVERGENCES[name], descent, self.plan.steps)
        drawn = toy.names.index(DRAWN)
        q = {str(step): trace.q[step, drawn].tolist() for step in self.plan.shown}
        return {"descent": descent, "name": name, "gaps": trace.gaps.tolist(), "q": q}

    def outcome(self, results: Sequence[Mapping[str, Any]], seed: int) -> Outcome:
        from rkl.report import Section

        toy = problem(seed, repeats=self.plan.repeats)
        gaps: dict[str, dict[str, Tensor]] = {descent: {} for descent in DESCENTS}
        students: dict[str, dict[str, dict]] = {descent: {} for descent in DESCENTS}
        for result in results:
            descent, name = result["descent"], result["name"]
            gaps[descent][name] = torch.tensor(result["gaps"], dtype=torch.float64)
            q = {int(step): torch.tensor(it).numpy() for step, it in result["q"].items()}
            students[descent][name] = q
        counts = count(toy, gaps)
        pictures = [_pictures(toy, gaps[it], students[it], it) for it in DESCENTS]
        sections = [
            Section("The claims, counted", _READING, [_table(self.plan, counts)]),
            *pictures,
        ]
        summary = f"Free logits over {ATOMS} atoms were fitted to fixed teachers."
        points = list(_shares(counts))
        rows = _rows(toy, gaps)
        return Outcome(COLUMNS, rows, summary, sections, points, {"counts": counts})


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
    """Fit free logits to every teacher, all at once and independently."""
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
    student = torch.stack(q)
    gap = (p - student).abs()
    parts = [gap.masked_fill(~part, 0.0).sum(-1) for part in (toy.head, ~toy.head)]
    return Trace(torch.stack(parts, -1), student)


def order(gaps: Float[Tensor, "steps fits 2"]) -> Float[Tensor, " fits"]:
    """Ratio of the head's remaining gap to the tail's, half-way.

    Both are relative to the start, and half-way is the first step at which the whole gap is below
    half of what it was. Below 1 the head was fitted first, above 1 the tail. Nan: never half-way.
    """
    left = gaps / gaps[0]
    whole = gaps.sum(-1) / gaps[0].sum(-1)
    halved = whole < 0.5
    step = halved.to(torch.int8).argmax(0)  # the first of the largest
    head, tail = left[step, torch.arange(len(step), device=step.device)].unbind(-1)
    return (head / tail).where(halved.any(0), torch.nan)


def count(toy: Problem, gaps: Mapping[str, Mapping[str, Tensor]]) -> Counts:
    """Number of fits in which each claim holds, by descent and start."""
    counts: Counts = {}
    for descent, by_name in gaps.items():
        for start in STARTS:
            chosen = torch.tensor([name[1] == start for name in toy.names])
            ratio = {name: order(it)[chosen] for name, it in by_name.items()}
            left = {name: it[-1].sum(-1)[chosen].max().item() for name, it in by_name.items()}
            forward, reverse = ratio["forward-kl"], ratio["reverse-kl"]
            holding = forward < 1, reverse > 1, forward < reverse
            counts[f"{descent}, {start} start"] = {
                "fits": int(chosen.sum()),
                **dict(zip(CLAIMS, (int(it.sum()) for it in holding), strict=True)),
                "largest gap left": left,
            }
    return counts


COLUMNS = (
    *("descent", "divergence", "teacher", "start", "number", "step", "head_gap", "tail_gap"),
)


def _rows(toy: Problem, gaps: Mapping[str, Mapping[str, Tensor]]) -> Iterator[list[Any]]:
    for descent, by_name in gaps.items():
        for name, of_fits in by_name.items():
            steps = [
                it for it in range(len(of_fits)) if it < 20 or it % (10 if it < 100 else 50) == 0
            ]
            for one, labels in zip(of_fits.unbind(1), toy.names, strict=True):
                for step in steps:
                    numbers = (f"{gap:.6e}" for gap in one[step].tolist())
                    yield [descent, name, *labels, step, *numbers]


def _shares(counts: Counts) -> Iterator[str]:
    for descent in DESCENTS:
        both = [counts[f"{descent}, {start} start"] for start in STARTS]
        head, tail, favours, fits = (sum(it[key] for it in both) for key in (*CLAIMS, "fits"))
        yield (
            f"By {descent}, forward KL fitted the head first in {head} of {fits} fits and reverse "
            f"KL the tail first in {tail}; forward KL favoured the head more than reverse KL in "
            f"{favours}."
        )


def _table(plan: Plan, counts: Counts) -> Table:

    rows = [[key, *(it[key] for it in counts.values())] for key in ("fits", *CLAIMS)]
    for name in DIVERGENCES:
        largest = (it["largest gap left"][name] for it in counts.values())
        rows.append([f"largest Σ |p − q| left, {name}", *largest])
    caption = f"{plan.steps} steps; {plan.repeats} teachers of each kind: {', '.join(KINDS)}."
    return Table("In how many fits", ["", *counts], rows, caption)


def _pictures(
    toy: Problem,
    gaps: Mapping[str, Tensor],
    students: Mapping[str, Mapping[int, Any]],
    descent: str,
) -> "Section":
    from rkl import plots
    from rkl.report import Section, figure_block

    chosen = toy.names.index(DRAWN)
    p, head = toy.logp[chosen].exp().numpy(), int(toy.head[chosen].sum())
    parts = {name: it[:, chosen].T.numpy() for name, it in gaps.items()}
    steps = list(range(len(next(iter(gaps.values())))))
    drawings = {
        "Rank by rank": plots.head_tail(p, students, head=head, logarithmic=False),
        "Gap of head and tail": plots.head_tail_by_step(
            steps, {name: (both[0], both[1]) for name, both in parts.items()}
        ),
    }
    blocks = [
        figure_block(f"{title}, {descent}", drawing, _CAPTIONS[title])
        for title, drawing in drawings.items()
    ]
    return Section(f"One fit, {descent}", blocks=blocks)


_READING = (
    "A part is fitted first if, when the whole gap Σ |p − q| has fallen to half, less is left of "
    "that part's gap than of the other's, each relative to its start. The teacher's head is its "
    "most probable atoms up to half of its mass.\n\n"
    "The gradient of forward KL, q − p, is large where the teacher is; that of reverse KL, "
    "q (log q/p − KL), where the student has mass and the teacher little. Gradient descent "
    "follows these sizes. Adam divides each logit's gradient by its own running size, so that "
    "every logit moves by about the learning rate at first, whatever the divergence: the "
    "order then depends on how far each logit has to go, and little of the claim is left."
)
_CAPTIONS = {
    "Rank by rank": (
        "The teacher shaded, the students over it; a dotted line ends the teacher's head. "
        "Compare the columns of early steps."
    ),
    "Gap of head and tail": "The remaining Σ |p − q| over the head and over the tail.",
}

PARTS: Mapping[str, Toy] = {"toy": Toy("The toy of adaptive KL", Plan())}

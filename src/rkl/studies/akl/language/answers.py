"""The answers of the study in language models: tables and drawings out of the rows of its csv."""

import csv
import itertools
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from rkl.stats import mean
from rkl.studies.akl.language.lessons import BOTH, COST, EQUAL, FLAT, ORDER, OWN, PARENTS
from rkl.tables import Table

if TYPE_CHECKING:
    from rkl.report import Section

Row = Mapping[str, Any]
Cell = tuple[float, float] | None
OF_FIT = "question", "student", "divergence", "lmbda", "optimizer", "seed", "steps"
OF_TIME = "step", "epochs", "cpu_seconds"
ON_TEXT = (
    *("forward_kl", "reverse_kl", "js", "tv", "akl", "head_gap", "tail_gap", "cross_entropy"),
    *("agreement", "entropy", "in_teachers_nucleus", "in_students_nucleus"),
)
OF_REPLIES = (
    *("own_reverse_kl", "own_tv", "precision", "recall", "density", "coverage"),
    *("rouge_l", "distinct_2", "self_bleu", "length"),
)
OF_TABLE = "own_reverse_kl", "precision", "recall", "rouge_l", "distinct_2", "self_bleu"
COLUMNS = (
    *OF_FIT,
    *OF_TIME,
    *ON_TEXT,
    *(f"prose_{name}" for name in ON_TEXT),
    "tv_between_students",
    *OF_REPLIES,
)
DISTANCES = "forward_kl", "reverse_kl", "js", "tv", "cross_entropy"
FALLEN = 0.05  # of the whole gap, after which head and tail are compared
ROUNDING = 1e-9  # of a mean, below which the spread of seeds is that of arithmetic
# Two-sided 5 % points of Student's t, by the number of seeds; that of eight, which is strict, of
# more than eight.
QUANTILES = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36}


def cells(rows: Iterable[Row]) -> Iterator[list[str]]:
    """The lines of the csv."""
    for row in rows:
        yield [_written(row.get(name)) for name in COLUMNS]


def read(path: str | os.PathLike) -> Iterator[dict[str, Any]]:
    """The rows of a csv that the study wrote."""
    with open(path, newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            yield {name: _KINDS.get(name, float)(text) for name, text in line.items() if text}


_KINDS = {name: str for name in ("question", "student", "divergence", "optimizer")}
_KINDS |= dict.fromkeys(("seed", "steps", "step"), int)


def _written(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


class Rows:
    """Rows of the study, found by what they are of."""

    def __init__(self, rows: Iterable[Row]):
        self.rows = list(rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __bool__(self) -> bool:
        return bool(self.rows)

    def of(self, **cells: Any) -> "Rows":
        """Those with these cells."""
        return Rows(row for row in self if all(row.get(k) == it for k, it in cells.items()))

    def last(self) -> "Rows":
        """Those of the end of a fit."""
        return Rows(row for row in self if row["step"] == row["steps"])

    def values(self, column: str) -> list[Any]:
        """The different values of a column, in order."""
        return list(dict.fromkeys(row[column] for row in self))

    def by_seed(self, column: str) -> dict[int, float]:
        """A column by the seed, where it is known; of several rows of a seed the last."""
        return {row["seed"]: row[column] for row in self if row.get(column) is not None}

    def mean(self, column: str) -> Cell:
        """Mean over the seeds, and its standard error."""
        return average([*self.by_seed(column).values()])

    def less(self, others: "Rows", column: str) -> list[float]:
        """Differences from others, of each seed that both have."""
        here, there = self.by_seed(column), others.by_seed(column)
        return [here[seed] - there[seed] for seed in here if seed in there]


def average(values: Sequence[float]) -> Cell:
    """A mean and its standard error; None of no values."""
    if not values:
        return None
    found = mean(torch.tensor(values, dtype=torch.float64))
    return float(found.value), float(found.error)


def is_clear(differences: Sequence[float]) -> bool:
    """True if the mean of differences is not 0 at the level of 5 %, by Student's t over them."""
    gain = average(differences)
    if gain is None or not gain[1] > ROUNDING * abs(gain[0]):
        return False
    return abs(gain[0]) > QUANTILES[min(len(differences), max(QUANTILES))] * gain[1]


def flatness(rows: Rows) -> Table | None:
    """Do both KLs end at one student, and at the teacher?"""
    rows = rows.of(question=FLAT).last()
    body = []
    for student in rows.values("student"):
        for steps in rows.of(student=student).values("steps"):
            some = rows.of(student=student, steps=steps)
            of = {name: some.of(divergence=name) for name in PARENTS}
            epochs = some.rows[0]["epochs"]
            body.append(
                [
                    f"{student}, {steps:,} steps",
                    epochs,
                    *(of[name].mean("tv") for name in PARENTS),
                    of[BOTH[1]].mean("tv_between_students"),
                ]
            )
    if not body:
        return None
    names = (f"{name} to teacher" for name in PARENTS)
    columns = ["", "epochs", *names, "reverse-kl to kl"]
    return Table("Until flat: total variation per token", columns, body, _FLAT)


def order(rows: Rows) -> Table | None:
    """Is the head fitted first, or the tail?"""
    alone = rows.of(question=ORDER)
    rest = [it for it in rows.of(question=EQUAL) if it["student"] not in alone.values("student")]
    rows = Rows([*alone, *_longest_of_each(Rows(rest))])
    body = []
    for student in rows.values("student"):
        for optimizer in rows.values("optimizer"):
            ahead: dict[str, dict[int, float]] = {}
            for name in PARENTS:
                some = rows.of(student=student, optimizer=optimizer, divergence=name)
                falls = {seed: _fall(some.of(seed=seed)) for seed in some.values("seed")}
                known = {seed: it for seed, it in falls.items() if it is not None}
                if not known:
                    continue
                ahead[name] = {seed: head - tail for seed, (_, head, tail) in known.items()}
                first = _sign([*ahead[name].values()], "head", "tail")
                columns = (average(it) for it in zip(*known.values(), strict=True))
                label = f"{student}, {optimizer}, {name}"
                body.append([label, *columns, average([*ahead[name].values()]), first])
            if all(name in ahead for name in BOTH):
                kl, reverse = (ahead[name] for name in BOTH)
                more = [kl[seed] - reverse[seed] for seed in kl if seed in reverse]
                favours = _sign(more, "kl favours the head", "kl favours the tail")
                label = f"{student}, {optimizer}, kl less reverse-kl"
                body.append([label, None, None, None, average(more), favours])
    columns = "", "steps", "head fell by", "tail fell by", "head less tail", "first"
    return Table("First steps", columns, body, _ORDER) if body else None


def _longest_of_each(rows: Rows) -> Iterator[Row]:
    """Of each student the fits with the most steps."""
    for student in rows.values("student"):
        some = rows.of(student=student)
        yield from some.of(steps=max(some.values("steps")))


def _sign(differences: Sequence[float], above: str, below: str) -> str:
    if not is_clear(differences):
        return "neither"
    return above if sum(differences) > 0 else below


def _fall(rows: Rows) -> tuple[float, float, float] | None:
    """The step at which the whole gap has fallen enough, and by how much both parts have.

    Fits are looked at after few steps, between which the gaps are taken on straight lines: so all
    are compared when they have come equally far.
    """
    parts = "step", "head_gap", "tail_gap"
    start, *rest = [tuple(row[name] for name in parts) for row in rows]
    enough = (1 - FALLEN) * sum(start[1:])
    for before, after in itertools.pairwise([start, *rest]):
        if sum(after[1:]) <= enough:
            share = (sum(before[1:]) - enough) / (sum(before[1:]) - sum(after[1:]))
            pairs = zip(before, after, strict=True)
            step, head, tail = ((1 - share) * old + share * new for old, new in pairs)
            return step, 1 - head / start[1], 1 - tail / start[2]
    return None


def comparison(rows: Rows) -> list[Table]:
    """Every divergence, and how much AKL gains over it: at equal steps, and in equal time."""
    timed, rows = rows.of(question=COST), rows.of(question=EQUAL)
    tables = []
    for student in rows.values("student"):
        some, costs = rows.of(student=student), _costs(timed.of(student=student))
        most = longest(some)
        names = most.values("divergence")
        shown = *DISTANCES, "agreement"
        columns = ["", *map(_in_words, shown)]
        values = [[name, *(most.of(divergence=name).mean(it) for it in shown)] for name in names]
        if costs:
            columns.append("time of a step")
            values = [[*row, costs.get(row[0])] for row in values]
        steps = max(some.values("steps"))
        title = f"{student} student, {steps:,} steps"
        tables.append(Table(title.capitalize(), columns, values, _EQUAL))
        akl, others = most.of(divergence="akl"), [name for name in names if name != "akl"]
        columns = ["", *map(_in_words, DISTANCES)]
        gains = []
        for name in others:
            of = most.of(divergence=name)
            gains.append([name, *(_marked(of.less(akl, it)) for it in DISTANCES)])
        tables.append(Table(f"Less AKL, {student} student, equal steps", columns, gains, _GAINS))
        if len(some.values("steps")) == 1:
            continue
        body = []
        for name in others:
            if (cost := costs.get(name)) is not None:
                gains = (_marked(_in_time(some, name, it, cost)) for it in DISTANCES)
                body.append([name, cost, *gains])
        title = f"Less AKL, {student} student, equal time"
        if body:
            tables.append(Table(title, ["", "time", *columns[1:]], body, _TIME))
    return tables


def longest(rows: Rows) -> Rows:
    """The ends of the fits with the most steps."""
    return rows.of(steps=max(rows.values("steps"))).last() if rows else rows


def _in_words(name: str) -> str:
    return name.replace("_", " ")


def _marked(differences: Sequence[float]) -> Any:
    gain = average(differences)
    return (*gain, "*") if gain and is_clear(differences) else gain


def _costs(timed: Rows) -> dict[str, float]:
    """Time of a step under each divergence over that under AKL, the mean over seeds."""
    seconds = {
        it: timed.of(divergence=it).by_seed("cpu_seconds") for it in timed.values("divergence")
    }
    akl = seconds.get("akl", {})
    shares = {
        name: average([it[seed] / akl[seed] for seed in it if seed in akl])
        for name, it in seconds.items()
    }
    return {name: it[0] for name, it in shares.items() if it}


def _in_time(rows: Rows, name: str, column: str, cost: float) -> list[float]:
    """A divergence less AKL, of which each has the time that the slower one takes for its steps.

    A value between two numbers of steps is taken on the straight line through both in log steps.
    """
    fewer, steps = sorted(rows.values("steps"))[-2:]
    taken = {name: min(1.0, 1 / cost), "akl": min(1.0, cost)}  # the slower gets all its steps
    found = {}
    for it, share in taken.items():
        ends = [rows.of(divergence=it, steps=n).last().by_seed(column) for n in (fewer, steps)]
        along = -math.log(share) / math.log(steps / fewer)
        both = ends[0].keys() & ends[1].keys()
        found[it] = {k: ends[1][k] + along * (ends[0][k] - ends[1][k]) for k in sorted(both)}
    return [found[name][k] - found["akl"][k] for k in found[name] if k in found["akl"]]


def writing(rows: Rows) -> list[Table]:
    """Quality and diversity of the replies."""
    rows = rows.of(question=EQUAL)
    tables = []
    for student in rows.values("student"):
        some = longest(rows.of(student=student))
        names = some.values("divergence")
        body = [[name, *(some.of(divergence=name).mean(it) for it in OF_TABLE)] for name in names]
        columns = ["", *map(_in_words, OF_TABLE)]
        tables.append(Table(f"Replies of the {student} student", columns, body, _REPLIES))
    return tables


def trade_off(rows: Rows) -> list[Table]:
    """Does the slope of precision and recall move a student along their trade-off?"""
    rows = rows.of(question=EQUAL)
    shown = "in_teachers_nucleus", "in_students_nucleus", "entropy", "precision", "recall"
    tables = []
    for student in rows.values("student"):
        some = longest(rows.of(student=student))
        names = [name for name in some.values("divergence") if "half" in name]
        body = [[name, *(some.of(divergence=name).mean(it) for it in shown)] for name in names]
        for half in ("precision-half", "recall-half"):
            ends = [name for name in names if name.startswith(half)]
            if len(ends) > 1:
                low, high = (some.of(divergence=it) for it in (ends[0], ends[-1]))
                moved = (_marked(high.less(low, it)) for it in shown)
                body.append([f"{half}: highest lam less lowest", *moved])
        columns = ["", *map(_in_words, shown)]
        if body:
            title = f"Precision and recall, {student} student"
            tables.append(Table(title, columns, body, _TRADE))
    return tables


def own_text(rows: Rows) -> Table | None:
    """Does the divergence still matter on own text, and in which mixture with the data?"""
    own = rows.of(question=OWN).last()
    like = {name: own.rows[0][name] for name in ("student", "steps")} if own else {}
    names = own.values("divergence")
    given = [it for it in rows.of(question=EQUAL, **like).last() if it["divergence"] in names]
    rows = Rows([*given, *own]) if own else own
    shown = "forward_kl", "reverse_kl", "own_reverse_kl", "precision", "recall", "distinct_2"
    body = []
    for name in rows.values("divergence"):
        for lmbda in rows.values("lmbda"):
            some = rows.of(divergence=name, lmbda=lmbda)
            if some:
                body.append([f"{name}, lmbda {lmbda:g}", *(some.mean(it) for it in shown)])
    for lmbda in rows.values("lmbda"):
        some = [rows.of(divergence=name, lmbda=lmbda) for name in rows.values("divergence")]
        spread = [_spread(some, it) for it in shown]
        body.append([f"largest less smallest, lmbda {lmbda:g}", *spread])
    columns = ["", *map(_in_words, shown)]
    return Table("Own text", columns, body, _OWN) if body else None


def _spread(some: Sequence[Rows], column: str) -> Cell:
    """Largest less smallest over divergences, seed by seed."""
    known = [it.by_seed(column) for it in some if it]
    seeds = [seed for seed in known[0] if all(seed in it for it in known)] if known else []
    pairs = [[it[seed] for it in known] for seed in seeds]
    return average([max(it) - min(it) for it in pairs])


def questions(rows: Rows) -> Iterator[tuple[str, list[Table]]]:
    """Every question that was asked, with the tables that answer it."""
    asked = {
        "Do forward and reverse KL end at one student?": [flatness(rows)],
        "Which is fitted first, head or tail?": [order(rows)],
        "Does AKL gain over the others?": comparison(rows),
        "Quality and diversity of what is written": writing(rows),
        "Does lam move a student along the trade-off?": trade_off(rows),
        "Does the divergence matter on own text?": [own_text(rows)],
    }
    for question, tables in asked.items():
        if found := [it for it in tables if it is not None]:
            yield question, found


def sections(rows: Iterable[Row]) -> "list[Section]":
    """The report: a section for each question."""
    from rkl.report import Section

    rows = Rows(rows)
    made = [Section(question, blocks=tables) for question, tables in questions(rows)]
    if pictures := _curves(rows):
        made.append(Section("Until flat", blocks=pictures))
    return made


def _curves(rows: Rows) -> list[Any]:
    """Distance from the teacher against steps, of the longest fits of the first seed."""
    from rkl import plots
    from rkl.report import figure_block

    rows = rows.of(question=FLAT)
    made = []
    for student in rows.values("student"):
        mine = rows.of(student=student, steps=max(rows.values("steps")))
        mine = mine.of(seed=mine.rows[0]["seed"]) if mine else mine
        curves = {}
        for name in mine.values("divergence"):
            some = [row for row in mine.of(divergence=name) if row["step"]]
            curves[f"{name} to teacher"] = [it["step"] for it in some], [it["tv"] for it in some]
        between = [row for row in mine if row.get("tv_between_students") and row["step"]]
        if between:
            values = [it["tv_between_students"] for it in between]
            curves["reverse-kl to kl"] = [it["step"] for it in between], values
        if curves:
            drawing = plots.training_curves(curves, label="total variation per token")
            made.append(figure_block(f"Until flat, {student} student", drawing, _DRAWN))
    return made


_FLAT = (
    "Means over seeds with their standard errors, on held-out text. The fits of both numbers of "
    "steps are separate ones, whose rate falls to 0: what more steps would change is seen from "
    "one to the other."
)
_ORDER = (
    f"When the whole gap Σ |p − q| has fallen by {FALLEN:.0%} of itself: after how many steps, "
    "and by how much its parts over the teacher's head and tail have fallen, each of itself; "
    "between the steps that were looked at, on straight lines. "
    "One of them is called first where the difference is not 0 at the level of 5 % (Student's t "
    "over seeds). A student without fits for its first steps alone is looked at in those of the "
    "comparison."
)
_EQUAL = (
    "Means over seeds with their standard errors, per token of held-out text, in nats. Time of a "
    "step: over AKL's, medians of steps taken in turns."
)
_GAINS = (
    "Differences seed by seed: above 0 AKL is better. An asterisk: not 0 at the level of 5 %, by "
    "Student's t. There are many such cells, of which one in twenty has it by chance."
)
_TIME = (
    "Each has the time that the slower of the two takes for all its steps; time: of a step, over "
    "AKL's, medians of steps taken in turns. Between two numbers of steps values are taken on a "
    "straight line in log steps."
)
_REPLIES = (
    "Own: on the text of the student. Precision and recall: of replies against "
    "the teacher's replies to the same prompts, by 5 neighbours in the space of all-MiniLM-L6-v2. "
    "ROUGE-L is against the text itself, which is one of many good replies; a model that writes "
    "the likeliest words has a high one."
)
_TRADE = (
    "In teacher's nucleus: mass of the student within the smallest set of tokens that holds 90 % "
    "of the teacher's, which is precision; in student's nucleus the other way round, which is "
    "recall."
)
_OWN = "Held-out text is the data's; own is the student's, whose reverse KL is what it adds up to."
_DRAWN = "The first seed, the longest fits, on held-out text."

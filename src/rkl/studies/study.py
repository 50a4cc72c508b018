"""A part of a study: its run folder, its jobs in processes, its csv, figures and report.

A paper is a folder here, with a mapping ``PARTS`` of :class:`Part`. The results of a part's jobs
are in the run folder as JSON until all are there: ``--resume`` repeats none of them.
"""

import abc
import contextlib
import csv
import io
import json
import math
import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rkl.extras import require
from rkl.runs import PREPARED, REPORT, Run, check_out, remove_folder, write_atomic
from rkl.runs.progress import Progress, say
from rkl.stats import mean
from rkl.tables import Table

if TYPE_CHECKING:
    from rkl.report import Section

WORKERS = 2  # processes
PATIENCE = 5.0  # seconds in which a process that is told to end must have ended
JOBS = "jobs"  # folder of the results that are there, while a study lasts

Lines = Iterable[Sequence[Any]]  # of a csv
Pair = tuple[float, float]  # a value and its standard error


@dataclass(frozen=True)
class Outcome:
    """Results of a part.

    Attributes:
        columns: Names of the columns of the csv.
        rows: Its rows, numbers formatted.
        summary: At most three sentences at the head of the report.
        points: The rest, as a list below them.
        sections: Sections of the report. Each of its figures is written as an SVG too.
        record: Entries of ``run.json`` beside the usual ones.
    """

    columns: Sequence[str]
    rows: Iterable[Sequence[Any]]
    summary: str
    sections: "Sequence[Section]"
    points: Sequence[str] = ()
    record: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Part(abc.ABC):
    """One claim of a paper, and how it is tested.

    To add one, write a frozen dataclass with

    - ``jobs``, the arguments of each computation;
    - ``compute``, one of them, whose result JSON can write;
    - ``outcome``, the results of the part from those of all jobs.

    Attributes:
        title: Title of its report.
        plan: Its sizes, a dataclass, which ``run.json`` keeps.
        workers: Most processes that the jobs are shared among.
    """

    title: str
    plan: Any
    workers: int = field(default=WORKERS, kw_only=True)

    def prepare(self, device: str, data: str | os.PathLike | None) -> "Part":
        """The part on a device and some data, of which most take the CPU and none.

        Raises:
            ValueError: It cannot be computed there, or so.
        """
        if device != "cpu":
            raise ValueError(f"device must be 'cpu', for which this is made; got {device!r}.")
        if data is not None:
            raise ValueError(f"data: this part reads none; got {data}.")
        return self

    def begin(self, folder: Path, seed: int) -> "Part":
        """The part with what its jobs need, which it writes into a folder; most need nothing.

        Called before the first job, and again where a run goes on, with what is there.
        """
        return self

    def announce(self, jobs: Sequence[tuple[Any, ...]]) -> str:
        """A sentence for whoever waits: what these jobs are, and how long they take."""
        return ""

    def so_far(
        self, results: Iterable[Any]
    ) -> tuple[Sequence[str], Iterable[Sequence[Any]]] | None:
        """Columns and rows of the csv after some of the jobs; None: it is written at the end."""
        return None

    @abc.abstractmethod
    def jobs(self, seed: int) -> Sequence[tuple[Any, ...]]:
        """The arguments of each job; they can be pickled."""

    @abc.abstractmethod
    def compute(self, *arguments: Any) -> Any:
        """The result of one job."""

    @abc.abstractmethod
    def outcome(self, results: Sequence[Any], seed: int) -> Outcome:
        """Results of the part from those of all jobs."""


def run_study(
    paper: str,
    parts: Mapping[str, Part],
    part: str,
    out: str | os.PathLike,
    *,
    overwrite: bool = False,
    resume: bool = False,
    seed: int = 0,
    device: str = "cpu",
    data: str | os.PathLike | None = None,
) -> Path:
    """Test one claim of a paper, and write the figures.

    Args:
        paper: The name of its folder.
        parts: All of its parts.
        part: Name of the part to run.
        out: The folder to write: a csv of all figures, pictures, a report.
        overwrite: Replaces the run that is there.
        resume: Goes on with the run that is there.
        seed: Random seed.
        device: Device to compute on.
        data: A file or a folder that a part reads and that is not part of rkl.

    Returns:
        The report.
    """
    if part not in parts:
        raise ValueError(f"part must be one of {', '.join(parts)}; got {part!r}.")
    check_out(out, overwrite=overwrite, resume=resume, inputs={"data": data})
    chosen = parts[part].prepare(device, data)
    how: Any = {"overwrite": overwrite, "resume": resume, "seed": seed}
    return run_part(paper, part, chosen, out, **how)


def run_part(
    paper: str,
    name: str,
    part: Part,
    out: str | os.PathLike,
    *,
    overwrite: bool = False,
    resume: bool = False,
    seed: int = 0,
) -> Path:
    """Compute a part as it is, and write its csv, its figures and its report.

    Raises:
        ModuleNotFoundError: The extra for figures and reports is missing.
    """
    require("report", "A study")
    settings = {"part": name, "plan": {key: repr(it) for key, it in vars(part.plan).items()}}
    how: Any = {"overwrite": overwrite, "resume": resume, "seed": seed}
    with Run.create(out, f"studies.{paper}", settings, **how) as run:
        if resume and run.record["status"] == "finished" and (run.path / REPORT).is_file():
            return run.path / REPORT
        with run.running():
            part = part.begin(run.path / PREPARED, seed)
            table = run.path / f"{name}.csv"
            results = _results(run, part, seed, table)
            with torch_threads(1):
                outcome = part.outcome(results, seed)
            write_atomic(table, to_csv(outcome.columns, outcome.rows))
            write_atomic(run.path / f"{name}.md", to_markdown(part.title, outcome))
            run.update(**outcome.record)
            _write_report(run, part.title, outcome)
            for folder in (JOBS, PREPARED):
                if (run.path / folder).exists():
                    remove_folder(run.path / folder)
    return run.path / REPORT


def _results(run: Run, part: Part, seed: int, table: Path) -> list[Any]:
    folder = run.path / JOBS
    folder.mkdir(exist_ok=True)
    jobs = dict(enumerate(part.jobs(seed)))
    files = {number: folder / f"{number}.json" for number in jobs}
    missing = [number for number in jobs if not files[number].exists()]

    def done() -> Iterator[Any]:
        return (json.loads(path.read_bytes()) for path in files.values() if path.exists())

    def keep(place: int, result: Any) -> None:
        write_atomic(files[missing[place]], json.dumps(result))
        if (lines := part.so_far(done())) is not None:
            write_atomic(table, to_csv(*lines))
        shown.update(shown.done + 1)

    if missing:
        if words := part.announce([jobs[number] for number in missing]):
            say(words)
        columns = zip(*(jobs[number] for number in missing), strict=True)
        workers = min(part.workers, WORKERS)
        with Progress("job", len(jobs)) as shown:
            shown.begin(len(jobs) - len(missing))
            in_processes(part.compute, *columns, workers=workers, done=keep)
    return list(done())


def to_csv(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table as text."""
    page = io.StringIO()
    table = csv.writer(page, lineterminator="\n")
    table.writerow(columns)
    table.writerows(rows)
    return page.getvalue()


def to_markdown(title: str, outcome: Outcome) -> str:
    """The tables of a report as a page of Markdown."""
    parts = [f"# {title}", outcome.summary, *(f"- {point}" for point in outcome.points)]
    for section in outcome.sections:
        tables = [it for it in section.blocks if isinstance(it, Table)]
        if tables:
            parts += [f"## {section.title}", section.text]
        for table in tables:
            parts += [f"**{table.title}**", table.to_markdown(), *table.notes]
    return "\n\n".join(part for part in parts if part) + "\n"


def _write_report(run: Run, title: str, outcome: Outcome) -> None:
    from rkl.report import Figure, Section, Settings, render, write

    for block in [it for section in outcome.sections for it in section.blocks]:
        if isinstance(block, Figure):
            write_atomic(run.path / f"{file_name(block.title)}.svg", block.svg)
    sections = [it for it in outcome.sections if it.blocks or it.text]
    sections.append(Section("Settings", blocks=[Settings(run.record)]))
    page = render(title, sections, lead=outcome.summary, points=outcome.points)
    write(run.path / REPORT, page)


def file_name(title: str) -> str:
    """A title in small letters with hyphens.

    >>> file_name("σ², J = 2: estimate against N")
    'variance-j-2-estimate-against-n'
    """
    for sign, word in {"σ²": "variance", "β": "slope", "λ": "slope"}.items():
        title = title.replace(sign, word)
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def mean_over_seeds(values: Sequence[float], *, geometric: bool = False) -> Pair:
    """The mean and its standard error; those of a geometric mean are not logarithms.

    >>> value, error = mean_over_seeds([1.0, 2.0, 3.0])
    >>> round(value, 6), round(error, 6)
    (2.0, 0.57735)
    """
    numbers = torch.tensor(values, dtype=torch.float64)
    value, error = (it.item() for it in mean(numbers.log() if geometric else numbers))
    return (math.exp(value), math.exp(value) * error) if geometric else (value, error)


def paired_gain(
    values: Sequence[float], reference: Sequence[float], *, geometric: bool = False
) -> Pair:
    """Gain of values over a reference, seed by seed: the mean and its standard error.

    A geometric gain is a factor.

    >>> paired_gain([1.0, 4.0], [0.5, 2.0], geometric=True)
    (2.0, 0.0)
    """
    value, other = (torch.tensor(it, dtype=torch.float64) for it in (values, reference))
    gains = value / other if geometric else value - other
    return mean_over_seeds(gains.tolist(), geometric=geometric)


def in_processes(
    function: Callable[..., Any],
    *columns: Iterable[Any],
    workers: int = WORKERS,
    threads: int | None = 1,
    done: Callable[[int, Any], None] = lambda place, result: None,
) -> list[Any]:
    """The values of a function for rows of arguments, computed in processes of their own.

    Ctrl-C reaches this process alone, which ends the others; so does any other early end. Where
    it is killed, they end by themselves.
    One worker is this process itself.

    Args:
        function: A function of a module, importable by other processes.
        columns: The first arguments, the second ones, and so on.
        workers: Number of processes; no more are started than there are rows.
        threads: Threads of torch in each process; None leaves torch's number.
        done: Called in this process with the index of a row and its value, when it is there.
    """
    rows = list(zip(*columns, strict=True))
    workers = min(workers, len(rows))
    if workers <= 1:
        values = []
        with torch_threads(threads):
            for place, row in enumerate(rows):
                values.append(function(*row))
                done(place, values[-1])
        return values
    others = set(multiprocessing.active_children())
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _begin, (threads,))
    try:
        with _interrupt_blocked():
            places = {pool.submit(function, *row): place for place, row in enumerate(rows)}
        values = [None] * len(rows)
        for future in as_completed(places):
            values[places[future]] = future.result()
            done(places[future], values[places[future]])
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        _end(set(multiprocessing.active_children()) - others)
        raise
    pool.shutdown()
    return values


@contextlib.contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Set torch's number of threads within the block; None leaves it.

    Two threads on arrays that fit a cache take twice as long as one, and much longer where others
    compute beside them.
    """
    if count is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _begin(threads: int | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if threads is not None:
        torch.set_num_threads(threads)


def _end_with_parent() -> None:
    """End this process with the one that began it, which cannot do so where it is killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@contextlib.contextmanager
def _interrupt_blocked() -> Iterator[None]:
    """Let processes started in the block ignore Ctrl-C; this one receives it at the end."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end(processes: Iterable[Any]) -> None:
    for process in processes:
        process.terminate()
    for process in processes:
        process.join(PATIENCE)
        if process.is_alive():
            process.kill()

"""CPU time and peak memory of a divergence between two heads, against what cannot be spared.

    python benchmarks/linear_head.py --all                        # the catalogue, V = 32,000
    python benchmarks/linear_head.py --all --one-process          # do all its graphs survive?
    python benchmarks/linear_head.py --divergence "akl(mu=0.3)" --vocab 151936
    python benchmarks/linear_head.py --peers --memory --out results.csv

The floor is the four matrix products S, T, dX, dW over the same chunks of tokens. Time is CPU
time of one thread. Every row is measured in a process of its own, in which the contender and
the floor take turns; its ratio is the median, over repetitions, of its time over the mean of
the floors right before and right after. Not the minimum: whatever slows the machine down for a
moment may strike the floor as well as the contender, so the smallest ratio is the one with the
unluckiest floor. The csv holds every repetition.
"""

import argparse
import csv
import gc
import multiprocessing
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace

for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # before torch reads them
    os.environ[variable] = "1"
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import contenders  # noqa: E402
import quick  # noqa: E402
import torch  # noqa: E402
from torch._dynamo.utils import counters  # noqa: E402

from rkl import AKL, AMiD, JensenShannon, ToDi, catalogue, exact, parse  # noqa: E402
from rkl.divergences import Divergence, SkewKL, SkewReverseKL  # noqa: E402

LARGE = 151_936
VOCABULARIES = 32_000, 49_152, LARGE
MEGABYTE = 2**20


@dataclass(frozen=True)
class Work:
    """One row of the table: who, on what."""

    contender: str
    divergence: str
    vocab: int
    tokens: int
    chunk: int | None
    repeats: int


@dataclass(frozen=True)
class Row:
    """One repetition, or one peak of memory, as it goes into the csv."""

    kind: str  # "cpu_s" or "peak_extra_mb"
    contender: str
    divergence: str
    vocab: int
    tokens: int
    chunk: int | None
    repetition: int
    value: float
    floor_before: float
    floor_after: float
    graphs: int  # compiled in this process so far
    load: float
    versions: str

    @property
    def ratio(self) -> float:
        return 2 * self.value / (self.floor_before + self.floor_after)


def main() -> int:
    settings = _arguments()
    print(versions(), f"load {os.getloadavg()}", "one thread, float32", sep="; ", flush=True)
    rows = list(_one_process(settings) if settings.one_process else _solo(settings))
    if settings.out and rows:
        _write(settings.out, rows)
    print(f"load at the end {os.getloadavg()}")
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--vocab", type=int, action="append", help="vocabulary; may be repeated; default 32000")
    add("--tokens", type=int, default=1024)
    add("--chunk", type=int, help="tokens whose logits exist at one time; default: rkl's own")
    add("--divergence", action="append", default=[], help='as its repr, e.g. "AKL(mu=0.3)"')
    add("--all", action="store_true", help="every divergence of the catalogue")
    add("--one-process", action="store_true", help="compile them all in one process")
    add("--eager", action="store_true", help="ours eager too, not only compiled")
    add("--peers", action="store_true", help="TRL, Liger and AKL.py too (group bench)")
    add("--memory", action="store_true", help="peak memory too")
    add("--repeats", type=int, default=5)
    add("--out", type=Path, help="csv of every repetition")
    small = {"vocab": [512], "tokens": 64, "divergence": ["akl"], "repeats": 1}
    settings = quick.parse(parser, **small, memory=True, eager=True)
    settings.vocab = settings.vocab or [VOCABULARIES[0]]
    chosen = [parse(text) for text in settings.divergence]
    if settings.all or not chosen:
        chosen += [cls() for cls in catalogue().values() if cls() not in chosen]
    settings.divergence = chosen
    return settings


def _solo(settings: argparse.Namespace) -> Iterator[Row]:
    """Each contender in a process of its own, so that none lives off another's graphs."""
    for vocab in settings.vocab:
        for divergence in settings.divergence:
            names = list(contenders.OURS)[: 2 if settings.eager else 1]
            names += contenders.peers_of(divergence) if settings.peers else []
            for name in names:
                yield from _contender(settings, name, divergence, vocab)


def _contender(settings, name: str, divergence: Divergence, vocab: int) -> list[Row]:
    work = _work(settings, name, divergence, vocab)
    if not contenders.installed(name):
        print_note(work, "not installed (group bench)")
        return []
    try:
        rows = _in_fresh_process(measure_time, work)
        _print_own_ratio(rows)
        if settings.memory:
            rows.append(_in_fresh_process(measure_memory, work, rows[0].chunk))
            ours = rows[-1].contender in contenders.OURS
            print_memory(rows[-1], target_megabytes(rows[-1]) if ours else None)
    except Exception as error:  # one that fails must not cost the hours of the others
        print_note(work, failure(error))
        return []
    return rows


def _work(settings, name: str, divergence: Divergence, vocab: int) -> Work:
    tokens, chunk, repeats = settings.tokens, settings.chunk, settings.repeats
    return Work(name, repr(divergence), vocab, tokens, chunk, repeats)


def _one_process(settings: argparse.Namespace) -> Iterator[Row]:
    """All compiled in one process, where torch may stop compiling and say nothing."""
    for vocab in settings.vocab:
        works = [_work(settings, "ours compiled", d, vocab) for d in settings.divergence]
        together = _in_fresh_process(measure_all, works)
        alone = _in_fresh_process(measure_time, works[-1])
        for work in works:
            _print_own_ratio([row for row in together if row.divergence == work.divergence])
        last = [row for row in together if row.divergence == works[-1].divergence]
        _print_one_process(last, alone, len(works))
        yield from (*together, *alone)


def _in_fresh_process(function: Callable, *arguments):
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(function, *arguments).result()


def measure_all(works: list[Work]) -> list[Row]:
    return [row for work in works for row in measure_time(work)]


def measure_time(work: Work) -> list[Row]:
    """Contender and floor in turns: F C F C F."""
    torch.set_num_threads(1)
    problem, run = _prepare(work)
    divergence = parse(work.divergence)
    chunk, step = _best_chunk(work, problem, divergence, run)
    _check(problem, divergence, step())  # the second call: a ragged last chunk compiles anew
    at_once = contenders.tokens_at_once(problem, work.chunk)
    turns = take_turns(step, lambda: contenders.floor(problem, at_once), work.repeats, _cpu_time)
    return [_row("cpu_s", work, chunk, number, *seconds) for number, seconds in enumerate(turns)]


def take_turns(
    step: Callable, floor: Callable, repeats: int, seconds: Callable[[Callable], float]
) -> Iterator[tuple[float, float, float]]:
    """Seconds of a step and of the floors right before and after it, in turns: F C F C F."""
    floor()
    before = seconds(floor)
    for _ in range(repeats):
        value = seconds(step)
        after = seconds(floor)
        yield value, before, after
        before = after


def _prepare(work: Work):
    peers = {name: peer.run for name, peer in contenders.PEERS.items()}
    return contenders.make_problem(work.tokens, work.vocab), (contenders.OURS | peers)[
        work.contender
    ]


def _best_chunk(work, problem, divergence, run):
    """Ours and the floor share their chunk; a peer takes the best of a small scan."""
    if work.contender in contenders.OURS:
        run(problem, divergence, work.chunk)
        at_once = contenders.tokens_at_once(problem, work.chunk)
        return at_once, lambda: run(problem, divergence, work.chunk)

    def compile_anew(chunk):
        torch._dynamo.reset()  # or the graphs of one chunk would count against the next
        return lambda: run(problem, divergence, chunk)

    best = fastest(contenders.PEERS[work.contender].chunks, compile_anew, _cpu_time)
    torch._dynamo.reset()
    run(problem, divergence, best)
    return best, lambda: run(problem, divergence, best)


def fastest(chunks: Iterable, step_of: Callable, seconds: Callable[[Callable], float]):
    """The chunk whose step takes least time, each after a warm-up."""
    times = {}
    for chunk in chunks:
        step = step_of(chunk)
        step()
        times[chunk] = seconds(step)
    return min(times, key=times.__getitem__)


def _check(problem: contenders.Problem, divergence: Divergence, gradients) -> None:
    """Raise unless a contender's dX is ours of a few tokens alone, in float64."""
    few, tokens = 8, len(problem.hidden)
    p = contenders.LinearHead(
        problem.teacher_hidden[:few].double(), problem.teacher_weight.double()
    )
    hidden = problem.hidden[:few].detach().double().requires_grad_()
    q = contenders.LinearHead(hidden, problem.weight.detach().double())
    weight = torch.full((few,), 1 / tokens, dtype=torch.float64)
    value = exact(divergence, p=p, q=q, weight=weight, chunk=few, compiled=False)
    expected = torch.autograd.grad(value, hidden)[0]
    worst = (gradients[0][:few] - expected).abs().max() / expected.abs().max()
    if not worst < 1e-3:
        raise RuntimeError(f"{divergence}: dX is off by {worst:.2g} of its largest entry.")


def _cpu_time(step: Callable) -> float:
    gc.collect()
    start = time.process_time()
    step()
    return time.process_time() - start


def _row(kind, work, chunk, repetition, value, before, after) -> Row:
    graphs = counters["stats"]["unique_graphs"]
    row = (kind, work.contender, work.divergence, work.vocab, work.tokens, chunk, repetition)
    return Row(*row, value, before, after, graphs, os.getloadavg()[0], versions())


def measure_memory(work: Work, chunk: int | None) -> Row:
    """Peak resident set of one step over that after import, inputs and a tiny compilation."""
    torch.set_num_threads(1)
    problem, run = _prepare(work)
    divergence = parse(work.divergence)
    tiny = contenders.make_problem(2, 8)
    if "compiled" in work.contender:
        torch.compile(lambda x: x.log_softmax(-1).exp())(torch.zeros(2, 8))
    else:
        run(tiny, divergence, chunk)
    gc.collect()
    with _peak_resident() as peak:
        run(problem, divergence, chunk)
    return _row("peak_extra_mb", work, chunk, 0, peak.megabytes, 0.0, 0.0)


@contextmanager
def _peak_resident() -> Iterator[SimpleNamespace]:
    """By the kernel's own high-water mark where it may be reset, else by sampling."""
    peak, before = SimpleNamespace(megabytes=0.0), _status("VmRSS")
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        with _sampled(peak):
            yield peak
        peak.megabytes -= before
    else:
        yield peak
        peak.megabytes = _status("VmHWM") - before


@contextmanager
def _sampled(peak: SimpleNamespace) -> Iterator[None]:
    done = threading.Event()

    def watch():
        while not done.wait(0.002):
            peak.megabytes = max(peak.megabytes, _status("VmRSS"))

    thread = threading.Thread(target=watch)
    thread.start()
    yield
    done.set()
    thread.join()


def _status(field: str) -> float:
    """A field of the process's status, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def target_ratio(contender: str, divergence: Divergence, vocab: int) -> float:
    """What README.md here promises of ours."""
    if contender == "ours eager":
        return {JensenShannon: 2.0, AKL: 2.2}.get(type(divergence), 1.7)
    slow, mixed = (AKL, AMiD, ToDi), (JensenShannon, SkewKL, SkewReverseKL)
    bound = 1.3 if isinstance(divergence, slow) else 1.2 if isinstance(divergence, mixed) else 1.15
    return bound + (0.1 if vocab >= LARGE else 0.0)


def target_megabytes(row: Row) -> float:
    d_weight = row.vocab * contenders.STUDENT_WIDTH * 4
    return (d_weight + 2 * row.chunk * row.vocab * 4) / MEGABYTE + 350


def _print_own_ratio(rows: list[Row]) -> None:
    first = rows[0]
    ours = first.contender in contenders.OURS
    divergence = parse(first.divergence)
    print_ratio(rows, target_ratio(first.contender, divergence, first.vocab) if ours else None)


def print_ratio(rows: list[Row], target: float | None) -> None:
    """The median ratio, its range, and whether the target is reached, if there is one."""
    first, ratios = rows[0], [row.ratio for row in rows]
    ratio = statistics.median(ratios)
    fastest = min(row.value for row in rows) / min(row.floor_after for row in rows)
    print_note(
        first,
        f"{ratio:6.3f} x floor  [{min(ratios):.3f} to {max(ratios):.3f}; minima {fastest:.3f}]  "
        f"chunk {first.chunk}  graphs {rows[-1].graphs}  {verdict(ratio, target, '.2f')}",
    )


def print_note(work: Work | Row, note: str) -> None:
    print(f"{work.vocab:>7} {work.contender:<15} {work.divergence:<32} {note}", flush=True)


def failure(error: Exception) -> str:
    """One line of an error."""
    return f"FAILED: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def print_memory(row: Row, target: float | None) -> None:
    """The peak of memory, and whether the target is reached, if there is one."""
    reached = verdict(row.value, target, ".0f")
    print_note(row, f"{row.value:6.0f} MiB extra  chunk {row.chunk}  {reached}")


def verdict(value: float, target: float | None, form: str) -> str:
    """Whether a value is at most its target; empty where there is none."""
    if target is None:
        return ""
    return f"{'reached' if value <= target else 'MISSED'} (at most {target:{form}})"


def _print_one_process(last: list[Row], alone: list[Row], divergences: int) -> None:
    graphs = last[-1].graphs
    enough = "reached" if graphs >= divergences else "MISSED"
    print(f"{graphs} graphs for {divergences} divergences: {enough}")
    ratios = [statistics.median(row.ratio for row in rows) for rows in (last, alone)]
    close = "reached" if abs(ratios[0] - ratios[1]) <= 0.05 else "MISSED"
    print(
        f"the last, {last[0].divergence}: {ratios[0]:.3f} after all the others, "
        f"{ratios[1]:.3f} alone: {close} (apart by at most 0.05)"
    )


def versions() -> str:
    """Of Python, torch, rkl and the peers."""
    found = [f"python {sys.version.split()[0]}"]
    for package in ("torch", "rkl", "trl", "liger-kernel"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"{package} not installed")
    return ", ".join(found)


def _write(path: Path, rows: list[Row]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(asdict(rows[0])))
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


if __name__ == "__main__":
    raise SystemExit(main())

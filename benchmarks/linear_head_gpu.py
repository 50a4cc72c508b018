"""GPU time and peak memory of a divergence between two heads in bfloat16, and whether it is right.

    python benchmarks/linear_head_gpu.py --out gpu.csv                 # the catalogue, 5 minutes
    python benchmarks/linear_head_gpu.py --divergence akl --no-peers --minutes 2
    python benchmarks/linear_head_gpu.py --device cpu --tokens 64 --vocab 512 --widths 32 64

8,192 tokens, widths 2,048 (student) and 4,096 (teacher), 151,936 atoms: dX and dW of the mean
divergence per token, compiled, beside TRL's kernel, Liger's fused losses, and the floor. The floor
is the four matrix products S, T, dX, dW, all in bfloat16, over chunks of the fastest size.

Each divergence is compared with float64 before it is timed: dX and dW of 64 tokens, and the dX of
the same tokens from the step of all, may be off by what rounding explains. Each entry of the
gradient G in the logits and of the result is rounded to bfloat16, with an error of at most
u = 2^-8 of it and a mean square of at most u²/3 of its square. The errors are independent, so that
those of a row of dX = G W have an expected square of at most u²/3 (Σ G² |W|² + |dX|²): the bound
is the root of this without the 3. Products are added up in single precision; its 6e-8 adds about
1e-5 to a logit, which is far below. A divergence may switch (the head of AKL) and a token lie on
the edge, where rounding decides: the token that is furthest off does not count.

--minutes is a limit: what would not be done by then is left out and named. The csv is written row
by row, so that an interrupted run keeps what it has measured. On a CPU time is CPU time.
"""

import time

STARTED = time.monotonic()  # before torch is imported, which counts

import argparse  # noqa: E402
import csv  # noqa: E402
import gc  # noqa: E402
import os  # noqa: E402
import platform  # noqa: E402
import subprocess  # noqa: E402
from collections.abc import Callable  # noqa: E402
from dataclasses import asdict, dataclass, fields  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import NamedTuple  # noqa: E402

import contenders  # noqa: E402
import linear_head  # noqa: E402
import quick  # noqa: E402
import torch  # noqa: E402
from contenders import Gradients, Problem  # noqa: E402
from linear_head import MEGABYTE, Work, fastest, print_memory, print_note, print_ratio  # noqa: E402
from torch import Tensor  # noqa: E402
from torch._dynamo.utils import counters  # noqa: E402

from rkl import AKL, KL, FDivergence, JensenShannon, ReverseKL, catalogue, kernels, parse  # noqa: E402
from rkl.divergences import Divergence  # noqa: E402

OURS = "ours compiled"
PEERS = "TRL chunked", "Liger Triton", "Liger compiled", "Liger eager"
FIRST = KL(), JensenShannon(), AKL(), ReverseKL()  # measured before the rest of the catalogue
COMPARED = 64  # tokens whose gradients are computed in float64
PARTS = 16  # of the vocabulary, each of which dW is compared in
FLOOR_CHUNKS = 512, 1024, 2048, 4096, 8192
OWN_CHUNKS = 512, 1024, 2048, 4096
FIRST_ESTIMATE = 20.0  # seconds of a contender before any is measured, compiling included


@dataclass(frozen=True)
class Row(linear_head.Row):
    """One repetition, one peak of memory, or one error, as it goes into the csv."""

    student_width: int
    teacher_width: int
    device: str
    driver: str
    seconds_since_start: float


class Machine(NamedTuple):
    """How time and memory are measured on a device."""

    name: str
    driver: str
    unit: str
    seconds: Callable[[Callable], float]
    peak_megabytes: Callable[[Callable], float]


class Reference(NamedTuple):
    """A few tokens in double precision: hidden states, head and logits of p and q."""

    places: Tensor
    hidden: Tensor
    weight: Tensor
    logp: Tensor
    logits: Tensor


class Errors(NamedTuple):
    """The largest errors of gradients, over the bounds of what rounding explains."""

    hidden: float
    weight: float


def main() -> int:
    settings = _arguments()
    machine = machine_of(settings.device)
    print(machine.name, f"driver {machine.driver}", linear_head.versions(), sep="; ")
    print(f"bfloat16, load {os.getloadavg()}", flush=True)
    with Bench(settings, machine) as bench:
        for divergence in settings.divergence:
            bench.compare(divergence)
        bench.vary_chunk(settings.divergence[0])
    bench.summarise()
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", help="cuda (default), cuda:1, or cpu, to see that it runs")
    add("--tokens", type=int, default=8192)
    add("--vocab", type=int, default=linear_head.LARGE)
    add("--widths", type=int, nargs=2, default=[2048, 4096], metavar=("STUDENT", "TEACHER"))
    add("--chunk", type=int, help="tokens whose logits exist at one time; default: rkl's own")
    add("--divergence", action="append", default=[], help="as its repr; default: the catalogue")
    add("--peers", action=argparse.BooleanOptionalAction, default=True, help="TRL, Liger")
    add("--repeats", type=int, default=10)
    add("--minutes", type=float, default=5.0, help="what would end later is left out")
    add("--out", type=Path, help="csv of every repetition")
    gpu = torch.cuda.is_available()
    small = {"device": "cuda" if gpu else "cpu", "tokens": 64, "vocab": 512, "widths": [32, 64]}
    settings = quick.parse(
        parser, **small, divergence=["akl", "kl"], peers=False, repeats=2, chunk=32
    )
    settings.device = settings.device or "cuda"
    if settings.device.startswith("cuda") and not gpu:
        parser.error("torch finds no GPU; --device cpu --quick shows that everything runs.")
    every = [*FIRST, *(cls() for cls in catalogue().values())]
    chosen = [parse(text) for text in settings.divergence] or every
    settings.divergence = list(dict.fromkeys(chosen))
    return settings


class Bench:
    """The contenders on one problem, until the time is over."""

    def __init__(self, settings: argparse.Namespace, machine: Machine):
        self.settings, self.machine = settings, machine
        self.problem = contenders.make_problem(
            settings.tokens, settings.vocab, settings.widths, settings.device, torch.bfloat16
        )
        self.chunk = contenders.tokens_at_once(self.problem, settings.chunk)
        self.reference = reference_of(self.problem)
        self.longest: dict[bool, float] = {}  # seconds of ours and of a peer
        self.left_out: list[str] = []
        self.missed: list[str] = []
        self.floor_chunk = self._fastest_floor()

    def __enter__(self) -> "Bench":
        out = self.settings.out
        self.file = out.open("w", newline="", encoding="utf-8") if out else None
        if self.file:
            self.csv = csv.DictWriter(self.file, [field.name for field in fields(Row)])
            self.csv.writeheader()
        return self

    def __exit__(self, *of_error) -> None:
        if self.file:
            self.file.close()

    def compare(self, divergence: Divergence) -> None:
        """Ours, then the peers, then whether ours takes the least memory."""
        names = [OURS]
        if self.settings.peers:
            at_hand = contenders.peers_of(divergence, torch.device(self.settings.device).type)
            names += [name for name in PEERS if name in at_hand]
        peaks = {name: self._within_time(name, divergence) for name in names}
        found = {name: row for name, row in peaks.items() if row is not None}
        others = [row.value for name, row in found.items() if name != OURS]
        if OURS in found and others:
            self._judge(found[OURS].value <= min(others), f"memory of {divergence}")
            print_memory(found[OURS], min(others))

    def vary_chunk(self, divergence: Divergence) -> None:
        """Time of ours with other chunks than its own."""
        for chunk in OWN_CHUNKS:
            if chunk < self.settings.tokens and chunk != self.chunk:
                self._within_time(OURS, divergence, chunk)

    def summarise(self) -> None:
        """Goals that were missed, and what there was no time for."""
        print(f"MISSED: {'; '.join(self.missed)}" if self.missed else "no goal was missed")
        if self.left_out:
            print(f"left out after {self.settings.minutes:g} minutes: {'; '.join(self.left_out)}")
        print(f"{time.monotonic() - STARTED:.0f} s, load at the end {os.getloadavg()}")

    def _within_time(self, name: str, divergence: Divergence, chunk: int | None = None):
        """The row of the peak of memory of a contender; None without time or success."""
        work = Work(
            name,
            repr(divergence),
            self.settings.vocab,
            self.settings.tokens,
            chunk or self.settings.chunk,
            self.settings.repeats,
        )
        if not contenders.installed(name):
            print_note(work, "not installed (group bench)")
            return None
        began = time.monotonic()
        left = STARTED + 60 * self.settings.minutes - began
        if left < self.longest.get(name == OURS, min(FIRST_ESTIMATE, 6 * self.settings.minutes)):
            of_chunk = f" in chunks of {chunk}" if chunk else ""
            self.left_out.append(f"{name} {divergence}{of_chunk}")
            return None
        try:
            return self._measure(work, divergence)
        except Exception as error:  # the others go on
            print_note(work, linear_head.failure(error))
            self._judge(name != OURS, f"{name} {divergence} failed")
            return None
        finally:
            gc.collect()
            took = time.monotonic() - began
            self.longest[name == OURS] = max(took, self.longest.get(name == OURS, 0.0))

    def _measure(self, work: Work, divergence: Divergence) -> Row:
        """Errors, then time, then the peak of memory."""
        run = _contender(work.contender)
        chunk = self._chunk_of(work, divergence, run)
        failures = len(kernels._FAILED)
        self._check(work, divergence, run, chunk)
        if len(kernels._FAILED) > failures:
            raise RuntimeError("it could not be compiled.")

        def step() -> Gradients:
            return run(self.problem, divergence, chunk)

        turns = linear_head.take_turns(step, self._floor, work.repeats, self.machine.seconds)
        rows = [
            self._write(work, self.machine.unit, chunk, number, *seconds)
            for number, seconds in enumerate(turns)
        ]
        own_chunk = work.contender == OURS and work.chunk == self.settings.chunk
        target = target_ratio(divergence) if own_chunk else None
        print_ratio(rows, target)
        ratio = sorted(row.ratio for row in rows)[len(rows) // 2]
        self._judge(target is None or ratio <= target, f"time of {divergence}")
        peak = self._write(work, "peak_extra_mb", chunk, 0, self.machine.peak_megabytes(step))
        print_memory(peak, None)
        return peak

    def _check(self, work: Work, divergence: Divergence, run, chunk: int | None) -> None:
        """Errors of the compared tokens within all; of ours, also of these alone in two chunks."""
        # All first: the compiler chooses its kernels for the number of rows that it sees first.
        run(self.problem, divergence, chunk)
        of_all = run(self.problem, divergence, chunk)[0][self.reference.places]
        few = select(self.problem, self.reference.places)
        of_all = of_all * (len(self.problem.hidden) / len(few.hidden))
        found = {"within all": errors_of(self.reference, divergence, of_all, None).hidden}
        if work.contender == OURS:
            gradients = run(few, divergence, -(-len(few.hidden) // 2))
            alone = errors_of(self.reference, divergence, *gradients)
            found |= {"alone": alone.hidden, "head": alone.weight}
        for name, value in found.items():
            self._write(work, f"error {name}", chunk, 0, value)
        worst = max(found.values())
        reached = linear_head.verdict(worst, 1.0 if work.contender == OURS else None, "g")
        listed = ", ".join(f"{value:.2f} {name}" for name, value in found.items())
        print_note(work, f"errors over bounds: {listed}  {reached}")
        self._judge(not reached or worst <= 1, f"errors of {divergence}")

    def _chunk_of(self, work: Work, divergence: Divergence, run) -> int | None:
        """Of a peer the best of a small scan, or its default where each compiles for seconds."""
        if work.contender == OURS:
            return work.chunk or self.chunk
        chunks = contenders.PEERS[work.contender].chunks
        if "compiled" in work.contender or len(chunks) == 1:
            return chunks[0]
        return fastest(
            chunks,
            lambda chunk: lambda: run(self.problem, divergence, chunk),
            self.machine.seconds,
        )

    def _floor(self) -> Gradients:
        return contenders.floor(self.problem, self.floor_chunk)

    def _fastest_floor(self) -> int:
        tokens, vocab = len(self.problem.hidden), len(self.problem.weight)
        chunks = sorted({min(tokens, chunk) for chunk in (*FLOOR_CHUNKS, self.chunk)})

        def of(chunk: int) -> Callable:
            return lambda: contenders.floor(self.problem, chunk)

        chunk = fastest(chunks, of, self.machine.seconds)
        seconds = self.machine.seconds(of(chunk))
        student, teacher = self.settings.widths
        operations = 2 * tokens * vocab * (3 * student + teacher)
        print(
            f"floor: {1e3 * seconds:.1f} ms, {operations / seconds / 1e12:.3g} TFLOP/s, in chunks "
            f"of {chunk} tokens; ours in chunks of {self.chunk}",
            flush=True,
        )
        return chunk

    def _write(self, work, kind, chunk, repetition, value, before=0.0, after=0.0) -> Row:
        row = Row(
            *(kind, work.contender, work.divergence, work.vocab, work.tokens, chunk, repetition),
            *(value, before, after, counters["stats"]["unique_graphs"], os.getloadavg()[0]),
            *(linear_head.versions(), *self.settings.widths),
            *(self.machine.name, self.machine.driver, time.monotonic() - STARTED),
        )
        if self.file:
            self.csv.writerow(asdict(row))
            self.file.flush()
        return row

    def _judge(self, reached: bool, what: str) -> None:
        if not reached:
            self.missed.append(what)


def target_ratio(divergence: Divergence) -> float | None:
    """The goal for ours; None for what is no f-divergence."""
    if isinstance(divergence, AKL):
        return 1.4
    return 1.25 if isinstance(divergence, FDivergence) else None


def _contender(name: str) -> contenders.Contender:
    return contenders.OURS[name] if name in contenders.OURS else contenders.PEERS[name].run


def select(problem: Problem, places: Tensor) -> Problem:
    """The problem of some of its tokens."""
    hidden = problem.hidden.detach()[places].requires_grad_()
    return Problem(hidden, problem.weight, problem.teacher_hidden[places], problem.teacher_weight)


@torch.no_grad()
def reference_of(problem: Problem) -> Reference:
    """Tokens spread evenly over all, the first and the last among them."""
    tokens = len(problem.hidden)
    count = min(COMPARED, tokens)
    places = torch.arange(count, device=problem.hidden.device) * (tokens - 1) // max(1, count - 1)
    few = select(problem, places)
    hidden, weight = few.hidden.double(), few.weight.double()
    logp = (few.teacher_hidden.double() @ few.teacher_weight.double().T).log_softmax(-1)
    return Reference(places, hidden, weight, logp, hidden @ weight.T)


def errors_of(
    reference: Reference, divergence: Divergence, d_hidden: Tensor, d_weight: Tensor | None
) -> Errors:
    """Errors of gradients of the mean over the tokens, over their bounds; see above."""
    logits = reference.logits.clone().requires_grad_()
    value = divergence(reference.logp, logits.log_softmax(-1)).mean()
    (gradient,) = torch.autograd.grad(value, logits)
    unit = torch.finfo(torch.bfloat16).eps / 2
    squares, width = gradient.square(), reference.weight.square().sum(-1)
    expected = gradient @ reference.weight
    bound = unit * (squares @ width + expected.square().sum(-1)).sqrt()
    of_tokens = (d_hidden.double() - expected).norm(dim=-1) / bound
    in_hidden = of_tokens.sort().values[max(0, len(of_tokens) - 2)]
    if d_weight is None:
        return Errors(in_hidden.item(), 0.0)
    expected = gradient.T @ reference.hidden
    of_atoms = squares.T @ reference.hidden.square().sum(-1) + expected.square().sum(-1)
    error = (d_weight.double() - expected).square().sum(-1)
    parts = zip(error.tensor_split(PARTS), of_atoms.tensor_split(PARTS), strict=True)
    in_weight = [part.sum().sqrt() / (unit * allowed.sum().sqrt()) for part, allowed in parts]
    return Errors(in_hidden.item(), torch.stack(in_weight).max().item())


def machine_of(device: str) -> Machine:
    """The way to measure on a device."""
    if torch.device(device).type != "cuda":
        torch.set_num_threads(1)
        name = platform.processor() or platform.machine()
        return Machine(name, "none", "cpu_s", linear_head._cpu_time, _peak_resident)
    torch.cuda.set_device(device)
    name = torch.cuda.get_device_name()
    return Machine(name, _driver(), "gpu_s", _event_seconds, _peak_allocated)


def _driver() -> str:
    words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return (done.stdout.splitlines() or ["unknown"])[0].strip()


def _event_seconds(step: Callable) -> float:
    """Between two events of the GPU, so that waiting for the host counts."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def _peak_allocated(step: Callable) -> float:
    """Memory allocated by a step beyond what was before it, in MiB; its results are in it."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / MEGABYTE


def _peak_resident(step: Callable) -> float:
    gc.collect()
    with linear_head._peak_resident() as peak:
        step()
    return peak.megabytes


if __name__ == "__main__":
    raise SystemExit(main())

"""Run the numerical tests under every vector width that the processor has.

python tests/portable.py [--all] [ARGUMENTS OF PYTEST ...]

PyTorch holds each kernel several times, for wider and wider vectors, and sums in another order in
each; so do MKL and OpenBLAS. A test that holds under all of them holds on processors that have
only some. Numerical tests are the doctests, and all files of tests but those that run the
command line; --all runs these too. Each width is tried with 1 and with 2 threads.
"""

import ast
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
WIDTHS = {  # ATEN_CPU_CAPABILITY, and what makes the libraries of linear algebra alike
    "default": {"MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "OPENBLAS_CORETYPE": "Nehalem"},
    "avx2": {"MKL_ENABLE_INSTRUCTIONS": "AVX2", "OPENBLAS_CORETYPE": "Haswell"},
    "avx512": {},
}
THREADS = (1, 2)
COMMAND_LINE = "rkl.cli"
# PyTorch takes the variable at its word: only running a kernel shows that the processor can.
PROBE = """
import torch
for dtype in (torch.float32, torch.float64, torch.int64):
    x = torch.arange(1000).to(dtype)
    (x * x + 1).sum(), x.sort()
    if dtype.is_floating_point:
        x.exp().log(), x.softmax(0), x.reshape(25, 40) @ x.reshape(40, 25)
print(torch.backends.cpu.get_cpu_capability())
"""


class Setting(NamedTuple):
    """A vector width and a number of threads, and what became of the tests under them."""

    width: str
    threads: int
    outcome: str


def environment(width: str, threads: int = 1) -> dict[str, str]:
    """The variables of a process that is to compute so."""
    libraries = WIDTHS.get(width, {}) if platform.machine() in {"x86_64", "AMD64"} else {}
    count = str(threads)
    sizes = {"OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "OPENBLAS_NUM_THREADS": count}
    return {**os.environ, **libraries, **sizes, "ATEN_CPU_CAPABILITY": width}


def available(width: str) -> bool:
    """True if kernels of a width run on this processor, tried in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROBE],
        env=environment(width),
        capture_output=True,
        text=True,
    )
    return done.returncode == 0 and done.stdout.strip().lower() == width


def imports(file: Path) -> set[str]:
    """The modules that a file imports at its head, and the names that it takes from packages."""
    found = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            found |= {it.name for it in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{it.name}" for it in node.names)}
    return found


def numerical() -> list[str]:
    """What holds doctests, and the files of tests that run no command line."""
    files = sorted(ROOT.glob("tests/**/test_*.py"))
    files = [file for file in files if file.parent.name != "malformed"]
    quiet = [file for file in files if COMMAND_LINE not in imports(file)]
    return ["src", "docs", "README.md", *(str(it.relative_to(ROOT)) for it in quiet)]


def tried(words: list[str]) -> Iterator[Setting]:
    """Run pytest with such arguments under every setting, and say what became of each."""
    for width in WIDTHS:
        there = available(width)
        for threads in THREADS:
            if not there:
                yield Setting(width, threads, "not run: this processor lacks it")
                continue
            print(f"== {width}, {threads} thread{'s' * (threads > 1)}", flush=True)
            began = time.monotonic()
            code = subprocess.call(
                [sys.executable, "-m", "pytest", "-q", *words],
                cwd=ROOT,
                env=environment(width, threads),
            )
            minutes = (time.monotonic() - began) / 60
            outcome = "failed" if code else "passed"
            yield Setting(width, threads, f"{outcome} in {minutes:.1f} minutes")


def main(words: list[str]) -> int:
    """Print a line for each setting; 0 if something was run and nothing failed."""
    selected = [] if "--all" in words else numerical()
    words = ["-n", "2", *(it for it in words if it != "--all"), *selected]
    settings = list(tried(words))
    print(f"\nATEN_CPU_CAPABILITY under {platform.processor() or platform.machine()}:")
    for it in settings:
        print(f"{it.width:8}  {it.threads} thread{'s' if it.threads > 1 else ' '}  {it.outcome}")
    ran = [it for it in settings if not it.outcome.startswith("not run")]
    return int(not ran or any(it.outcome.startswith("failed") for it in ran))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""CPU time of the Bayes act of many Normal laws, against what cannot be spared; and memory.

    python benchmarks/bayes.py                               # 4,000 draws of 10,000 laws
    python benchmarks/bayes.py --arviz 100 --out rows.csv    # needs arviz
    python benchmarks/bayes.py --lazy 25000000               # 10^8 draws from a file of 1.6 GB

The floor is one fused pass, compiled, over the same draws: each location and each scale read
once, one logarithm and one reciprocal of each scale, three sums per law. Time is CPU time of one
thread. Contender and floor take turns in one process; a ratio is the median, over repetitions, of
the contender's time over the mean of the floors right before and right after. The csv holds every
repetition.
"""

import argparse
import csv
import gc
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # before torch reads them
    os.environ[variable] = "1"

import numpy as np  # noqa: E402
import quick  # noqa: E402
import torch  # noqa: E402
from linear_head import _peak_resident  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.distributions import Normal  # noqa: E402

from rkl import KL, ReverseKL  # noqa: E402
from rkl.bayes.draws import Draws, read_draws  # noqa: E402
from rkl.bayes.model import read_family  # noqa: E402
from rkl.bayes.problem import Problem  # noqa: E402
from rkl.bayes.solve.closed import act_and_risk, directions_of, solve  # noqa: E402
from rkl.bayes.solve.errors import average_draws  # noqa: E402
from rkl.bayes.solve.streaming import one_pass  # noqa: E402
from rkl.divergences import Divergence  # noqa: E402
from rkl.stats import Mean  # noqa: E402

NAMES = ("mu", "sigma")
BLOCK = 200  # rows of the floor's blocks
GOAL = 1.5  # of ours
OURS = "reverse KL", "KL"
ARVIZ = "arviz.summary"


@dataclass(frozen=True)
class Row:
    """One repetition, as it goes into the csv."""

    contender: str
    chains: int
    draws: int
    laws: int
    repetition: int
    cpu_s: float
    floor_before: float
    floor_after: float
    load: float
    versions: str

    @property
    def ratio(self) -> float:
        return 2 * self.cpu_s / (self.floor_before + self.floor_after)


def main() -> None:
    settings = _arguments()
    torch.set_num_threads(1)
    print(_versions(), f"load {os.getloadavg()}", "one thread, float64", sep="; ", flush=True)
    if settings.lazy:
        measure_memory(settings.chains, settings.lazy)
        return
    rows = list(measure_time(settings))
    if settings.out:
        with settings.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(asdict(rows[0])))
            writer.writeheader()
            writer.writerows(asdict(row) for row in rows)
    print(f"load at the end {os.getloadavg()}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--chains", type=int, default=4)
    add("--draws", type=int, default=1_000, help="of each chain")
    add("--laws", type=int, default=10_000)
    add("--repeats", type=int, default=15)
    add("--arviz", type=int, default=0, help="laws that arviz.summary is shown, once")
    add("--lazy", type=int, default=0, help="draws of each chain of a file; measures memory only")
    add("--out", type=Path, help="csv of every repetition")
    return quick.parse(parser, draws=200, laws=50, repeats=1)


def measure_time(settings: argparse.Namespace) -> Iterator[Row]:
    """F C F C F, for each contender."""
    generator = torch.Generator().manual_seed(0)
    shape = settings.chains, settings.draws, settings.laws
    mu, noise = torch.randn(2, *shape, generator=generator, dtype=torch.float64).unbind()
    sigma = (0.1 * noise).exp()
    floor = _floor(mu, sigma)
    check(mu, sigma)
    for name, step in _contenders(mu, sigma, settings.arviz).items():
        shape = (*shape[:2], settings.arviz if name == ARVIZ else settings.laws)
        before = _cpu_time(floor)
        first = _cpu_time(step)  # compiles
        rows = []
        for repetition in range(settings.repeats if name != ARVIZ else 1):
            value = _cpu_time(step) if name != ARVIZ else first
            after = _cpu_time(floor)
            load = os.getloadavg()[0]
            rows.append(Row(name, *shape, repetition, value, before, after, load, _versions()))
            before = after
        _print(rows, first, settings.laws)
        yield from rows


def _contenders(mu: Tensor, sigma: Tensor, arviz_laws: int) -> dict[str, Callable]:
    draws = Draws({"mu": mu, "sigma": sigma})
    found = {
        "bare sum": lambda: [(m.sum(0), s.sum(0)) for m, s in zip(mu, sigma, strict=True)],
        OURS[0]: lambda: act(draws, ReverseKL(), True),
        "of that, the pass": lambda: one_pass(draws, normal, NAMES, ("reverse",), compiled=True),
        OURS[1]: lambda: act(draws, KL(), True),
        "reverse KL, uncompiled": lambda: act(draws, ReverseKL(), False),
    }
    if arviz_laws:
        found[ARVIZ] = _summary(mu, sigma, arviz_laws)
    return found


def normal(theta: dict[str, Tensor]) -> Normal:
    return Normal(theta["mu"], theta["sigma"], validate_args=False)


def act(draws: Draws, loss: Divergence, compiled: bool | None) -> dict[tuple, Mean]:
    """An act and its risk with their errors: all of ``bayes_act`` but the diagnostics."""
    model = read_family("normal(loc=mu, scale=sigma)", draws)
    problem = Problem(draws, model, loss, compiled)
    weights = problem.weights
    assert weights is not None  # as both losses are KLs
    averages = average_draws(problem, directions_of(weights))
    return act_and_risk(problem, averages, weights, solve(problem, averages, weights))


def check(mu: Tensor, sigma: Tensor) -> None:
    """Raise unless the scales of the acts are their closed forms: nobody is timed for less."""
    mu, sigma = mu[..., :3], sigma[..., :3]
    draws = Draws({"mu": mu, "sigma": sigma})
    mu, sigma = mu.flatten(0, 1), sigma.flatten(0, 1)
    scales = {
        ReverseKL(): sigma.pow(-2).mean(0).rsqrt(),
        KL(): (sigma.square().mean(0) + mu.var(0, correction=0)).sqrt(),
    }
    for loss, scale in scales.items():
        torch.testing.assert_close(act(draws, loss, False)["parameter", "sigma"].value, scale)


def _transcendentals(mu: Tensor, sigma: Tensor, total: Tensor) -> Tensor:
    """Sums per law; eight rows at a time, the fastest of 2, 4, 5, 8, 10, 20 and all."""
    mu, sigma = (x.unflatten(0, (-1, 8)) for x in (mu, sigma))
    rows = (x.sum(1).sum(0) for x in (mu, sigma.log(), sigma.reciprocal()))
    return total + torch.stack(list(rows))


def _floor(mu: Tensor, sigma: Tensor) -> Callable:
    compiled = torch.compile(_transcendentals, fullgraph=True, dynamic=False)
    run = lambda: _passed(compiled, mu, sigma)  # noqa: E731
    run()
    return run


def _passed(function: Callable, mu: Tensor, sigma: Tensor) -> Tensor:
    total = mu.new_zeros(3, mu.shape[-1])
    for chain in range(len(mu)):
        for start in range(0, mu.shape[1], BLOCK):
            part = slice(start, start + BLOCK)
            total = function(mu[chain, part], sigma[chain, part], total)
    return total


def _summary(mu: Tensor, sigma: Tensor, laws: int) -> Callable:
    import arviz  # pyright: ignore[reportMissingImports]: an extra

    arrays = {"mu": mu[..., :laws].numpy(), "sigma": sigma[..., :laws].numpy()}
    return lambda: arviz.summary(arviz.from_dict(posterior=arrays))


def _cpu_time(step: Callable) -> float:
    gc.collect()
    start = time.process_time()
    step()
    return time.process_time() - start


def measure_memory(chains: int, draws: int) -> None:
    """Peak resident set of reading a file too large to hold, beside that of a hundredth of it."""
    with tempfile.TemporaryDirectory() as folder:
        for count in (draws // 100, draws):
            path = Path(folder) / f"{count}.nc"
            _write_posterior(path, chains, count)
            act(read_draws(_small(folder, chains)), ReverseKL(), None)
            gc.collect()
            start, began = time.process_time(), time.perf_counter()
            with _peak_resident() as peak:
                found = act(read_draws(path), ReverseKL(), None)
            seconds = time.process_time() - start
            scale, risk = found["parameter", "sigma"], found["risk", ""]
            print(
                f"{chains * count:,} draws, {path.stat().st_size / 2**20:,.0f} MiB: peak "
                f"{peak.megabytes:.0f} MiB above what was resident, {seconds:.1f} s of CPU, "
                f"{time.perf_counter() - began:.1f} s; "
                f"scale {scale.value:.6f} +- {scale.error:.2g}, "
                f"risk {risk.value:.6f} +- {risk.error:.2g} nats",
                flush=True,
            )


def _small(folder: str, chains: int) -> Path:
    path = Path(folder) / "small.nc"
    if not path.exists():
        _write_posterior(path, chains, 1_000)
    return path


def _write_posterior(path: Path, chains: int, draws: int) -> None:
    """A NetCDF file as ArviZ writes it, 2^20 draws at a time."""
    import h5netcdf

    generator = np.random.default_rng(0)
    with h5netcdf.File(path, "w") as file:
        group = file.create_group("posterior")
        group.dimensions = {"chain": chains, "draw": draws}
        held = [group.create_variable(name, ("chain", "draw"), float) for name in NAMES]
        for chain in range(chains):
            for start in range(0, draws, 2**20):
                part = slice(start, min(start + 2**20, draws))
                size = part.stop - part.start
                held[0][chain, part] = generator.normal(size=size)
                held[1][chain, part] = np.exp(0.1 * generator.normal(size=size))


def _print(rows: list[Row], first: float, laws: int) -> None:
    ratios = [row.ratio * laws / row.laws for row in rows]
    ratio = statistics.median(ratios)
    fastest = min(row.cpu_s for row in rows) / min(row.floor_after for row in rows)
    verdict = ""
    if rows[0].contender in OURS:
        verdict = f"{'reached' if ratio <= GOAL else 'MISSED'} (at most {GOAL})"
    print(
        f"{rows[0].contender:<22} {ratio:9.3f} x floor  [{min(ratios):.3f} to {max(ratios):.3f}; "
        f"minima {fastest:.3f}]  {statistics.median(row.cpu_s for row in rows):.3f} s for "
        f"{rows[0].laws:,} laws, first call {first:.1f} s  load {rows[-1].load:.1f}  {verdict}",
        flush=True,
    )


def _versions() -> str:
    found = [f"python {'.'.join(map(str, sys.version_info[:3]))}", f"torch {torch.__version__}"]
    for name in ("rkl", "xarray", "arviz"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} not installed")
    return ", ".join(found)


if __name__ == "__main__":
    main()

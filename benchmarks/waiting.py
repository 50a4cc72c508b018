"""Threads that wait for work: how long they should spin, on a quiet and on a busy machine.

    python benchmarks/waiting.py --out benchmarks/figures/waiting.csv

Between two products of matrices the threads of OpenMP wait. GNU's library, which PyTorch brings,
lets them spin 300,000 turns by default (libgomp's manual, GOMP_SPINCOUNT); a spinning thread takes
the processor from whoever has work. Every cell is a process of its own,
which trains one model for some seconds, beside as many busy processes as the load says. Settings
take turns within a repetition. The unit is rows, or tokens, a second of wall-clock time.
"""

import argparse
import contextlib
import csv
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator

import quick

SETTINGS: dict[str, dict[str, str]] = {
    "default": {},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    **{
        f"spin {count:,}": {"GOMP_SPINCOUNT": str(count)} for count in (10**3, 10**4, 10**5, 10**6)
    },
    "one thread": {"OMP_NUM_THREADS": "1"},
}
VARIABLES = "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS", "MKL_NUM_THREADS"
LOADS = 0, 2, 8
FIELDS = ("model", "load", "setting", "repetition", "per_second", "machine_load")
MODELS = "encoder 128", "encoder 512", "coupling"
BUSY = "while True: pass"


def step_of(model: str):
    """A training step of a model, and the tokens or rows in it."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    if model == "coupling":
        from rkl.flows import Coupling

        flow = Coupling(transforms=4, hidden=(64, 64)).build((8,))
        parameters, x = list(flow.parameters()), torch.randn(512, 8)

        def loss():
            return -flow().log_prob(x).mean()

        count = 512
    else:
        width = int(model.split()[1])
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True)
        network = nn.TransformerEncoder(layer, 2)
        parameters, x = list(network.parameters()), torch.randn(8, 64, width)

        def loss():
            return network(x).square().mean()

        count = 8 * 64
    optimizer = torch.optim.Adam(parameters)

    def step():
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return step, count


def measure(model: str, seconds: float) -> float:
    """Tokens, or rows, per second of training."""
    import time

    step, count = step_of(model)
    step()
    began, steps = time.perf_counter(), 0
    while (passed := time.perf_counter() - began) < seconds:
        step()
        steps += 1
    return steps * count / passed


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    """Other processes that never rest."""
    others = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def cell(setting: str, seconds: float) -> dict[str, float]:
    """The speed of every model in a new process with these variables."""
    clean = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    command = [sys.executable, __file__, "--measure", str(seconds)]
    environment = clean | SETTINGS[setting]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="waiting.csv")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.5)
    parser.add_argument("--measure", type=float, help=argparse.SUPPRESS)
    options = quick.parse(parser, repetitions=1, seconds=0.2, out=os.devnull)
    if options.measure is not None:
        print(json.dumps({model: measure(model, options.measure) for model in MODELS}))
        return
    loads = LOADS[:1] if options.quick else LOADS
    rows = []
    for repetition in range(options.repetitions):
        for load in loads:
            with busy(load):
                for setting in SETTINGS:
                    speeds = cell(setting, options.seconds)
                    now = os.getloadavg()[0]
                    rows += [
                        (model, load, setting, repetition, round(speed, 1), round(now, 2))
                        for model, speed in speeds.items()
                    ]
    with open(options.out, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(FIELDS)
        writer.writerows(rows)
    print(table(rows))


def table(rows) -> str:
    """Medians in thousands a second, a line for each model and load."""
    lines = [f"{'':24}" + "".join(f"{setting:>14}" for setting in SETTINGS)]
    for model, load in dict.fromkeys((row[0], row[1]) for row in rows):
        medians = [
            statistics.median(row[4] for row in rows if row[:3] == (model, load, setting))
            for setting in SETTINGS
        ]
        name = f"{model}, {load} others"
        lines.append(f"{name:24}" + "".join(f"{median / 1000:>14.2f}" for median in medians))
    return "\n".join(lines)


if __name__ == "__main__":
    main()

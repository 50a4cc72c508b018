"""Time and memory of precision, recall, density and coverage, against their matrix products.

    python benchmarks/neighbours.py --out benchmarks/figures/neighbours-10000.csv

The floor is what a search that looks at every pair cannot spare: the three products real by
real, fake by fake and real by fake, in the same blocks of rows. Time is CPU time of one thread;
contender and floor take turns, and a ratio is the median, over repetitions, of the contender's
time over the mean of the floors right before and right after. Memory is the peak of the resident
set over what was resident with the two arrays in place, in a process of its own.
"""

import argparse
import csv
import os
import statistics
import subprocess
import sys
import time
import warnings

for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # before torch reads them
    os.environ[variable] = "1"

import quick  # noqa: E402
import torch  # noqa: E402
from linear_head import _peak_resident  # noqa: E402

from rkl.metrics.neighbours import BLOCK, prdc  # noqa: E402

GOAL, FROM = 1.3, 512  # features from which on it holds
FIELDS = ("samples", "features", "errors", "repetition", "cpu_s", "floor", "ratio", "load")


def pair(samples, features):
    return torch.randn(2, samples, features, generator=torch.Generator().manual_seed(0)).unbind()


def timed(work):
    start = time.process_time()
    work()
    return time.process_time() - start


def products(real, fake):
    for x, y in ((real, real), (fake, fake), (real, fake)):
        for rows in x.split(max(16, BLOCK // len(y))):
            rows @ y.T


def repetitions(samples, features, subsamples, count):
    real, fake = pair(samples, features)
    floors = [timed(lambda: products(real, fake)) for _ in range(2)][1:]
    for i in range(count):
        ours = timed(lambda: prdc(real=real, fake=fake, subsamples=subsamples))
        floors.append(timed(lambda: products(real, fake)))
        floor = (floors[-2] + floors[-1]) / 2
        row = (samples, features, bool(subsamples), i, ours, floor, ours / floor)
        yield dict(zip(FIELDS, (*row, os.getloadavg()[0]), strict=True))


def memory(samples, features):
    """Of one call without errors, in MB."""
    real, fake = pair(samples, features)
    prdc(real=real[:100], fake=fake[:100], subsamples=0)
    with _peak_resident() as peak:
        prdc(real=real, fake=fake, subsamples=0)
    return round(peak.megabytes)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--features", type=int, nargs="+", default=[64, 512, 2048])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory", type=int, metavar="FEATURES", help="print the peak alone")
    parser.add_argument("--out", help="a csv of all repetitions")
    asked = quick.parse(parser, samples=300, features=[16], repeats=1)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if asked.memory:
        print(memory(asked.samples, asked.memory))
        return
    rows = []
    for features in asked.features:
        for subsamples in (0, 20):
            found = list(repetitions(asked.samples, features, subsamples, asked.repeats))
            rows += found
            ratio = statistics.median(row["ratio"] for row in found)
            seconds = statistics.median(row["cpu_s"] for row in found)
            goal = "no goal" if features < FROM else "MISSED" if ratio > GOAL else "reached"
            told = "with errors" if subsamples else goal
            print(f"{features:5} features: {seconds:6.2f} s, {ratio:.2f} of the products, {told}")
        alone = [sys.executable, __file__, f"--samples={asked.samples}", f"--memory={features}"]
        said = subprocess.run(alone, capture_output=True, text=True, check=True).stdout
        print(f"{features:5} features: {said.strip()} MB beyond the arrays")
    if asked.out:
        with open(asked.out, "w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()

"""CPU time of the divergence between two heads in bfloat16, beside the same in float32.

    python benchmarks/half_heads.py --out benchmarks/figures/bfloat16-heads-16000.csv

AKL of 256 tokens, 16,000 atoms, widths 512 (student) and 1,024 (teacher), value and gradients, one
thread. The two take turns; a ratio is the time in bfloat16 over the mean of the times in float32
right before and right after it.
"""

import argparse
import csv
import os
import statistics
import time

os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"

import quick  # noqa: E402
import torch  # noqa: E402

import rkl  # noqa: E402

TOKENS, VOCAB, WIDTHS = 256, 16_000, (512, 1024)


def head(width, dtype, *, seed, tokens):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=generator)
    weight = 3 / width**0.5 * torch.randn(VOCAB, width, generator=generator)
    return rkl.LinearHead(hidden.to(dtype), weight.to(dtype))


def seconds(dtype, compiled, tokens):
    q, p = (head(width, dtype, seed=seed, tokens=tokens) for seed, width in enumerate(WIDTHS))
    q = rkl.LinearHead(q.hidden.requires_grad_(), q.weight.requires_grad_())
    start = time.process_time()
    rkl.exact(rkl.AKL(), p=p, q=q, compiled=compiled).backward()
    return time.process_time() - start


def main():
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--repeats", type=int, default=15)
    options.add_argument("--tokens", type=int, default=TOKENS)
    options.add_argument("--out")
    chosen = quick.parse(options, repeats=2, tokens=32)
    rows = []
    for compiled in (False, True):
        for dtype in (torch.bfloat16, torch.float32):
            seconds(dtype, compiled, chosen.tokens)  # to warm up
        before = seconds(torch.float32, compiled, chosen.tokens)
        for repetition in range(chosen.repeats):
            half, after = (
                seconds(torch.bfloat16, compiled, chosen.tokens),
                seconds(torch.float32, compiled, chosen.tokens),
            )
            ratio = 2 * half / (before + after)
            rows.append([compiled, repetition, half, after, ratio, os.getloadavg()[0]])
            before = after
        ratios = [row[4] for row in rows if row[0] == compiled]
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(f"compiled={compiled}: {middle:.2f}, quartiles {low:.2f} to {high:.2f}")
    if chosen.out:
        with open(chosen.out, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            names = "compiled", "repetition", "bfloat16_s", "float32_s", "ratio", "load"
            writer.writerows([names, *rows])


if __name__ == "__main__":
    main()

"""A lattice flow's draws and log Z of the XY model, against chains that know only the energy.

    python benchmarks/log_z.py --stages 8:10 --out log-z-8.csv
    python benchmarks/log_z.py --stages 8:10 16:15 --out log-z-16.csv
    python benchmarks/log_z.py --stages 8:10 --ring-exchange 1 --out log-z-k1.csv

Each stage SIDE:MINUTES trains a flow for that long, from the weights of the stage before where
there is one (0 minutes: not at all), then measures it at 32 temperatures from 0.05 to 2.05: v,
effective share and acceptance of independent Metropolis-Hastings, what both should be if
log-weights were normal, and log Z with its error from as many draws. The peers give log Z at the
same temperatures with more and more effort, up to --most seconds, and heat bath and Wolff energies
and |m|. Draws, exact draws and sweeps of the heat bath also take turns on the clock: medians. Time
is CPU time of one thread, which the minutes of training are too unless other processes hold the
core; with more --threads in training, what it took is the time on the wall.
"""

import argparse
import csv
import math
import os
import statistics
import time

for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # before torch reads them
    os.environ[variable] = "1"

import quick  # noqa: E402
import torch  # noqa: E402

from rkl.sample import (  # noqa: E402
    CoarseToFine,
    HeatBath,
    annealed_importance,
    averages,
    fit_to_target,
    independent_metropolis,
    markov_chain,
    mbar,
    reweight,
    thermodynamic_integration,
)
from rkl.sample.mcmc import Wolff  # noqa: E402
from rkl.sample.targets import XY  # noqa: E402
from rkl.stats import integrated_time  # noqa: E402

BLOCK = 1024
PEERS = {
    "thermodynamic integration": lambda target, at, effort: thermodynamic_integration(
        target, at, draws=125 * effort
    ),
    "MBAR": lambda target, at, effort: mbar(target, at, draws=125 * effort),
    "annealed importance": lambda target, at, effort: annealed_importance(
        target, at, particles=32 * effort
    ),
}
FIELDS = (
    "side", "ring_exchange", "seed", "what", "effort", "temperature", "trained_s", "cpu_s", "load",
    "log_z", "log_z_error", "v", "ess", "ess_normal", "acceptance", "acceptance_normal",
    "effective_per_s", "draws_per_s", "z",
)  # fmt: skip


def weigh(flow, target, at, draws, seed):
    """Log-ratios of so many draws at every temperature, [temperatures, draws]."""
    torch.manual_seed(seed)
    parts = []
    for _ in range(0, draws, BLOCK):
        x, log_q = flow(at).sample_and_log_prob((BLOCK,))
        parts.append(target.log_prob(x, at.expand(BLOCK, *at.shape)) - log_q)
    return torch.cat(parts).double().T


def of_flow(flow, target, at, args):
    """One row a temperature."""
    start = time.process_time()
    with torch.no_grad():
        log_ratio = weigh(flow, target, at, args.draws, args.seed)
    drawing = time.process_time() - start
    found = reweight(log_ratio, sites=target.side**2)
    chain = independent_metropolis(target, flow, at, draws=args.draws // 4, seed=args.seed)
    deviation = log_ratio.std(1).tolist()
    for k, s in enumerate(deviation):
        yield {
            "what": "flow",
            "effort": args.draws,
            "temperature": at[k, 0].item(),
            "cpu_s": drawing,
            "log_z": found.log_z.value[k].item(),
            "log_z_error": found.log_z.error[k].item(),
            "v": s**2 / target.side**2,
            "ess": found.ess.value[k].item(),
            "ess_normal": math.exp(-(s**2)),
            "acceptance": chain.acceptance[k].mean().item(),
            "acceptance_normal": math.erfc(s / 2),
            "effective_per_s": found.ess.value[k].item() * log_ratio.numel() / drawing,
        }


def of_reference(flow, target, args):
    """How many standard errors the chains' means lie from those of a file."""
    with open(args.reference, newline="", encoding="utf-8") as file:
        known = list(csv.DictReader(file))
    at = torch.tensor([[float(row["T"])] for row in known])
    chain = independent_metropolis(target, flow, at, draws=args.draws, chains=4, seed=args.seed)
    found = averages(target, chain.measure(target), at)
    for name, column, error in (
        ("energy", "energy_per_site", "energy_err"),
        ("magnetization", "abs_m", "abs_m_err"),
        ("specific_heat", "specific_heat_per_site", "specific_heat_err"),
    ):
        scores = []
        for k, row in enumerate(known):
            width = math.hypot(found[name].error[k].item(), float(row[error]))
            scores.append((found[name].value[k].item() - float(row[column])) / width)
            yield {"what": f"reference: {name}", "temperature": at[k].item(), "z": scores[-1]}
        rms = math.sqrt(sum(z**2 for z in scores) / len(scores))
        print(f"{name}: rms z {rms:.2f}, largest {max(map(abs, scores)):.1f}", flush=True)


def of_clock(flow, target, at, rounds=5):
    """Draws per second of all temperatures together, whatever they are worth."""
    draws = BLOCK * 64 // target.side**2 // 4
    contenders = {
        "independent draws": lambda: flow(at).sample_and_log_prob((draws,)),
        "exact draws": lambda: independent_metropolis(target, flow, at, draws=draws, chains=1),
        "heat bath sweeps": lambda: markov_chain(
            target, at, draws=8, chains=draws // 8, warm_up=0
        ),
    }
    taken = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, work in contenders.items():
            start = time.process_time()
            with torch.no_grad():
                work()
            taken[name].append(time.process_time() - start)
    for name, seconds in taken.items():
        middle = statistics.median(seconds)
        yield {"what": name, "cpu_s": middle, "draws_per_s": draws * len(at) / middle}


def of_peers(target, at, args):
    for name, peer in PEERS.items():
        effort, taken = 1, 0.0
        while 4 * taken < args.most:
            start = time.process_time()
            found = peer(target, at, effort)
            taken = time.process_time() - start
            for k, (value, error) in enumerate(zip(found.value, found.error, strict=True)):
                yield {
                    "what": name,
                    "effort": effort,
                    "temperature": at[k, 0].item(),
                    "cpu_s": taken,
                    "log_z": value.item(),
                    "log_z_error": error.item(),
                }
            effort *= 4


def of_chains(target, at, args):
    """Effective draws of all temperatures per second, if all mixed as the one of the row does."""
    kernels = {"heat bath": HeatBath()} | ({} if target.ring_exchange else {"Wolff": Wolff()})
    for name, kernel in kernels.items():
        start = time.process_time()
        walk = markov_chain(
            target,
            at,
            draws=500,
            chains=16,
            kernel=kernel,
            warm_up=200,
            measure=target.observables,
        )
        taken = time.process_time() - start
        slowest = [
            max(
                integrated_time(walk.values[of][k]).max().item()
                for of in ("energy", "magnetization")
            )
            for k in range(len(at))
        ]
        for k, tau in enumerate(slowest):
            yield {
                "what": name,
                "temperature": at[k, 0].item(),
                "cpu_s": taken,
                "effective_per_s": 500 * 16 * len(at) / tau / taken,
            }


def train(flow, target, minutes, args):
    """Seconds of training: CPU time of one thread, or with more of them time on the wall."""
    if not minutes:
        return 0.0
    clock = time.process_time if args.threads == 1 else time.perf_counter
    torch.set_num_threads(args.threads)
    start = clock()
    fit_to_target(flow, target, minutes=minutes, seed=args.seed)
    torch.set_num_threads(1)
    return clock() - start


def stage(value):
    side, minutes = value.split(":")
    return int(side), float(minutes)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stages", type=stage, nargs="+", default=[(8, 10.0)])
    parser.add_argument("--ring-exchange", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="of training")
    parser.add_argument("--draws", type=int, default=16_384, help="of the flow, a temperature")
    parser.add_argument("--most", type=float, default=60, help="CPU seconds of a peer; 0: none")
    parser.add_argument("--reference", help="csv of means of 8 x 8 at K = 0, to be compared with")
    parser.add_argument("--out", required=True, help="csv")
    parser.add_argument("--temperatures", type=int, default=32, help="from 0.05 to 2.05")
    small = {"stages": [(4, 0.03)], "draws": 1024, "most": 0.1, "temperatures": 3}
    args = quick.parse(parser, **small, out=os.devnull)
    temperatures = torch.linspace(0.05, 2.05, args.temperatures)[:, None]
    with open(args.out, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        smaller, trained = None, 0.0
        for side, minutes in args.stages:
            target = XY(side=side, ring_exchange=args.ring_exchange)
            torch.manual_seed(args.seed)
            flow = CoarseToFine.of(target).build((side**2,), 1)
            if smaller is not None:
                flow.start_from(smaller)
            trained += train(flow, target, minutes, args)
            rows = [
                *of_flow(flow, target, temperatures, args),
                *of_clock(flow, target, temperatures),
            ]
            rows = [row | {"trained_s": trained} for row in rows]
            if args.reference and (side, args.ring_exchange) == (8, 0):
                rows += of_reference(flow, target, args)
            if args.most:
                rows += of_peers(target, temperatures, args)
                rows += of_chains(target, temperatures, args)
            shared = {"side": side, "ring_exchange": args.ring_exchange, "seed": args.seed}
            for row in rows:
                figures = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}
                writer.writerow(shared | {"load": f"{os.getloadavg()[0]:.2f}"} | figures)
            file.flush()
            print(f"side {side}: {len(rows)} rows, after {trained:.0f} s of training", flush=True)
            smaller = flow


if __name__ == "__main__":
    main()

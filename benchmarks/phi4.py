"""A flow of φ⁴ at a published coupling, trained from coarse to fine and from small to large.

    python benchmarks/phi4.py --stages 8:300:128 16:300:64 32:400:32 --out phi4.csv

Each stage SIDE:STEPS:BATCH trains a flow for so many steps of so many draws, from the weights of
the stage before where there is one, at m² = −4 and the λ at which the correlation length of side
32 is a quarter of it (Albergo et al., arXiv 1904.12072, table I; de Haan et al., arXiv
2110.02673, have 66 % effective draws there). Then it is judged by independent draws. With
--all-sites the flow draws all of them, where it otherwise leaves half to the law of the target.
Time is CPU time of one thread.
"""

import argparse
import csv
import os
import time

for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # before torch reads them
    os.environ[variable] = "1"

import quick  # noqa: E402
import torch  # noqa: E402

from rkl.sample import CoarseToFineField, fit_to_target, reweight  # noqa: E402
from rkl.sample.targets import Phi4  # noqa: E402

BLOCK = 512
FIELDS = (
    "side", "lambda", "seed", "steps", "batch", "trained_s", "draws", "drawing_s", "ess",
    "ess_error", "acceptance", "v", "ess_normal", "log_z", "log_z_error", "pareto_k",
)  # fmt: skip


def judged(flow, target, condition, draws: int) -> dict:
    """What independent draws show."""
    start, parts = time.process_time(), []
    with torch.no_grad():
        for _ in range(0, draws, BLOCK):
            x, log_q = flow(condition).sample_and_log_prob((BLOCK,))
            parts.append(target.log_prob(x, condition.expand(BLOCK, 1)) - log_q)
    spent = time.process_time() - start
    found = reweight(torch.cat(parts), sites=target.side**2)
    return {
        "draws": len(parts) * BLOCK,
        "drawing_s": spent,
        "ess": found.ess.value.item(),
        "ess_error": found.ess.error.item(),
        "acceptance": found.acceptance.value.item(),
        "v": found.v.value.item(),
        "ess_normal": found.predicted_ess.item(),
        "log_z": found.log_z.value.item(),
        "log_z_error": found.log_z.error.item(),
        "pareto_k": found.tail.item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--stages", nargs="+", required=True)
    parser.add_argument("--all-sites", action="store_true")
    parser.add_argument("--coupling", type=float, default=4.572)
    parser.add_argument("--draws", type=int, default=8192)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", required=True)
    small = {"stages": ["4:5:32", "8:5:32"], "draws": 512, "out": os.devnull}
    args = quick.parse(parser, **small)
    torch.set_num_threads(1)
    condition, smaller, trained = torch.tensor([[args.coupling]]), None, 0.0
    with open(args.out, "w", newline="") as file:
        rows: csv.DictWriter[str] = csv.DictWriter(file, FIELDS, lineterminator="\n")
        rows.writeheader()
        for stage in args.stages:
            side, steps, batch = map(int, stage.split(":"))
            target = Phi4(side)
            torch.manual_seed(args.seed)
            architecture = CoarseToFineField() if args.all_sites else CoarseToFineField.of(target)
            flow = architecture.build((side**2,), 1)
            if smaller is not None:
                flow.start_from(smaller)
            how = {"steps": steps, "batch": batch, "lr": 5e-3 if smaller is None else 2e-3}
            start = time.process_time()
            fit_to_target(flow, target, condition, anneal=False, seed=args.seed, **how)
            trained += time.process_time() - start
            torch.manual_seed(args.seed)
            row = {"side": side, "lambda": args.coupling, "seed": args.seed, "steps": steps}
            row |= {"batch": batch, "trained_s": trained}
            row |= judged(flow, target, condition[0], args.draws)
            rows.writerow({k: f"{v:.5g}" if type(v) is float else v for k, v in row.items()})
            file.flush()
            print(row, flush=True)
            smaller = flow


if __name__ == "__main__":
    main()

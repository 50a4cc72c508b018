"""Whether flows fitted without data have all modes of their target, with the masses of the truth.

    python benchmarks/modes.py --out modes.csv
    python benchmarks/modes.py --targets mog8 rings --seeds 0 --steps 2000 --out rows.csv

Each target is fitted at the defaults of fit_to_target, over its whole range of scales, and judged
at five scales from end to end: effective share of the flow's draws and of the target's, the mode
whose mass after reweighting is furthest from the truth, and whether judge_coverage passes. Time
is CPU time of one thread.
"""

import argparse
import csv
import os
import time

for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # before torch reads them
    os.environ[variable] = "1"

import quick  # noqa: E402
import torch  # noqa: E402

from rkl.sample import fit_to_target, judge_coverage  # noqa: E402
from rkl.sample.architecture import default_architecture  # noqa: E402
from rkl.sample.targets import GaussianMixture, MoG4, MoG8, Rings  # noqa: E402

TARGETS = {
    "mog8": MoG8(),
    "rings": Rings(),
    "mog4": MoG4(),
    "unequal": GaussianMixture(
        means=((0.0, 0.0), (3.0, 1.0), (-2.0, 3.0), (1.0, -4.0), (-4.0, -2.0)),
        weights=(0.4, 0.25, 0.2, 0.1, 0.05),
    ),
}
FIELDS = (
    "target", "seed", "steps", "cpu_s", "scale", "ess", "target_ess", "reached", "reached_error",
    "modes", "missing", "worst_mass", "its_error", "passed",
)  # fmt: skip


def truth(target, scale: float) -> torch.Tensor:
    """The mass of each mode: of what is nearest to a centre, or to a ring."""
    if isinstance(target, Rings):
        return torch.full((target.rings,), 1 / target.rings)
    if not isinstance(target, GaussianMixture):
        return target.masses
    torch.manual_seed(0)  # where modes overlap, draws of a heavy one are nearer to a light one
    x = target.sample(torch.tensor([scale]), (2_000_000,))
    nearest = torch.cdist(x, target.centres.to(x)).argmin(-1)
    return nearest.bincount(minlength=len(target.centres)) / len(x)


def judged(target, flow, scale: float, draws: int) -> dict:
    """What is found at one scale; masses relative to the truth."""
    found = judge_coverage(target, flow, torch.tensor([scale]), draws=draws)
    true = truth(target, scale)
    after = torch.stack([it.reweighted.value for it in found.modes]) / true
    error = torch.stack([it.reweighted.error for it in found.modes]) / true
    worst = int((after - 1).abs().argmax())
    assert found.target_ess is not None
    assert found.reached is not None
    return {
        "scale": scale,
        "ess": found.weights.ess.value.item(),
        "target_ess": found.target_ess.value.item(),
        "reached": found.reached.value.item(),
        "reached_error": found.reached.error.item(),
        "modes": len(found.modes),
        "missing": sum(it.missing for it in found.modes),
        "worst_mass": after[worst].item(),
        "its_error": error[worst].item(),
        "passed": found.passed,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--draws", type=int, default=100_000)
    parser.add_argument("--out", required=True)
    small = {"targets": ["mog4"], "seeds": [0], "steps": 20, "draws": 1_000}
    args = quick.parse(parser, **small, out=os.devnull)
    torch.set_num_threads(1)
    with open(args.out, "w", newline="") as file:
        rows: csv.DictWriter[str] = csv.DictWriter(file, FIELDS, lineterminator="\n")
        rows.writeheader()
        for name in args.targets:
            for seed in args.seeds:
                target, start = TARGETS[name], time.process_time()
                flow = fit_to_target(
                    default_architecture(target), target, steps=args.steps, seed=seed
                ).flow
                spent = time.process_time() - start
                (it,) = target.conditions
                for scale in torch.linspace(it.low, it.high, 5).tolist():
                    row = {"target": name, "seed": seed, "steps": args.steps, "cpu_s": spent}
                    row |= judged(target, flow, scale, args.draws)
                    rows.writerow(
                        {k: f"{v:.5g}" if type(v) is float else v for k, v in row.items()}
                    )
                    file.flush()
                    print(row, flush=True)


if __name__ == "__main__":
    main()

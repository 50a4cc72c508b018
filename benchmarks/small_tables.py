"""Flows on tables of 150 to 569 rows, beside a Gaussian and a mixture chosen by BIC.

    python benchmarks/small_tables.py --out benchmarks/figures/small-tables.csv

Held-out log-density in 5-fold cross-validation, nats per row, on scikit-learn's wine, iris,
diabetes and breast cancer. Differences are of the same rows, with their standard errors.
Diabetes has a column of two levels: its rows are spread over their steps, the same for all
methods. Needs scikit-learn (`rkl[studies]`).
"""

import argparse
import csv
import os
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import quick
import torch
from sklearn import datasets
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import KFold

from rkl.fit import fit_to_samples, read_data
from rkl.flows.architectures import parse_architecture

TABLES = "wine", "iris", "diabetes", "breast_cancer"
SPREAD = ("diabetes",)
COMPONENTS = 8  # at most
KINDS = "full", "tied", "diag", "spherical"
COLUMNS = (
    "table", "rows", "columns", "flow", "budget", "seed", "log_density", "less_gaussian",
    "less_gaussian_error", "less_mixture", "less_mixture_error", "mixtures", "kept_steps",
    "seconds",
)  # fmt: skip


def mixture(
    rows: np.ndarray, test: np.ndarray, seed: int, components: int
) -> tuple[np.ndarray, str]:
    """Log-densities of the mixture with the least BIC, of columns in units of their spread."""
    mean, spread = rows.mean(0), rows.std(0)
    rows, test = (rows - mean) / spread, (test - mean) / spread
    found = []
    for kind in KINDS:
        for count in range(1, components + 1):
            how: dict[str, Any] = {"covariance_type": kind, "n_init": 3, "random_state": seed}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    fitted = GaussianMixture(count, **how).fit(rows)
                except ValueError:  # a covariance that is singular
                    continue
            found.append((fitted.bic(rows), count, kind, fitted))
    _, count, kind, fitted = min(found, key=lambda it: it[:2])
    return fitted.score_samples(test) - np.log(spread).sum(), f"{count} {kind}"


def gaussian(rows: np.ndarray, test: np.ndarray) -> np.ndarray:
    rows, test = torch.from_numpy(rows), torch.from_numpy(test)
    return (
        torch.distributions.MultivariateNormal(rows.mean(0), rows.T.cov()).log_prob(test).numpy()
    )


def folds(name: str, seed: int, count: int) -> Iterator[tuple[Any, np.ndarray, np.ndarray]]:
    """Rows to fit, as they are and spread over their levels, and rows to test."""
    values = getattr(datasets, f"load_{name}")().data
    torch.manual_seed(seed)
    for train, test in KFold(count, shuffle=True, random_state=seed).split(values):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data = read_data(values[train], dequantise=name in SPREAD)
            tested = read_data(values[test], step=data.step).spread().values.numpy()
        yield data, data.spread().values.numpy(), tested


MIXTURES: dict[tuple[str, int, int], tuple[np.ndarray, str]] = {}  # of each fold, for all budgets


def measured(
    name: str, flow: str, budget: dict[str, Any], seed: int, asked: argparse.Namespace
) -> dict[str, Any]:
    parts, kinds, kept, began = [], [], [], time.perf_counter()
    for fold, (data, rows, test) in enumerate(folds(name, seed, asked.folds)):
        if (name, seed, fold) not in MIXTURES:
            MIXTURES[name, seed, fold] = mixture(rows, test, seed, asked.components)
        mixed, kind = MIXTURES[name, seed, fold]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fitted = fit_to_samples(parse_architecture(flow), data, seed=seed, **budget)
        with torch.no_grad():
            own = fitted.flow().log_prob(torch.from_numpy(test)).double().numpy()
        parts.append(np.stack([own, gaussian(rows, test), mixed]))
        kinds.append(kind)
        kept.append(fitted.training.best_step)
    own, plain, mixed = np.concatenate(parts, 1)
    row = {"table": name, "rows": len(own), "columns": test.shape[1], "flow": flow}
    row |= {"budget": " ".join(f"{value} {name}" for name, value in budget.items())}
    row |= {"seed": seed, "log_density": own.mean()}
    for against, other in (("gaussian", plain), ("mixture", mixed)):
        gain = own - other
        row[f"less_{against}"] = gain.mean()
        row[f"less_{against}_error"] = gain.std(ddof=1) / len(gain) ** 0.5
    row |= {"mixtures": ", ".join(kinds), "kept_steps": " ".join(map(str, kept))}
    return row | {"seconds": time.perf_counter() - began}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("small-tables.csv"))
    parser.add_argument("--tables", nargs="+", default=TABLES)
    parser.add_argument("--flows", nargs="+", default=["coupling"])
    parser.add_argument("--steps", type=int, nargs="*", default=[1000])
    parser.add_argument("--minutes", type=float, nargs="*", default=[])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--components", type=int, default=COMPONENTS, help="most of a mixture")
    small = {"tables": ["iris"], "steps": [20], "seeds": [0], "folds": 2, "components": 1}
    asked = quick.parse(parser, **small, out=Path(os.devnull))
    budgets = [{"steps": it} for it in asked.steps] + [{"minutes": it} for it in asked.minutes]
    with asked.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for name in asked.tables:
            for flow in asked.flows:
                for budget in budgets:
                    for seed in asked.seeds:
                        row = measured(name, flow, budget, seed, asked)
                        writer.writerow(
                            {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()}
                        )
                        file.flush()
                        print(name, flow, budget, seed, f"{row['log_density']:.3f}",
                              f"{row['less_gaussian']:.3f} {row['less_gaussian_error']:.3f}",
                              f"{row['less_mixture']:.3f} {row['less_mixture_error']:.3f}",
                              row["kept_steps"], f"{row['seconds']:.0f} s", file=sys.stderr,
                              flush=True)  # fmt: skip


if __name__ == "__main__":
    main()

"""Eight schools: one value for each of these, or for a ninth? Two experiments, two answers.

python examples/eight_schools.py [eight_schools.nc]

Draws of your own take the place of ``posterior``: an InferenceData of PyMC or Stan,
``mcmc.get_samples(group_by_chain=True)`` of NumPyro, or the path of a file.
"""

import sys

import numpy as np
import torch
import xarray as xr
from torch.distributions import Normal

from rkl.bayes import bayes_act

EFFECT = np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ERROR = np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def posterior(chains: int = 4, draws: int = 1000, seed: int = 0) -> xr.DataTree:
    """Exact draws, by way of a grid of tau; mu ~ Normal(0, 5), tau ~ HalfCauchy(5)."""
    random = np.random.default_rng(seed)
    grid = np.linspace(0.01, 100, 10_000)
    spread = ERROR**2 + grid[:, None] ** 2
    precision = 1 / 25 + (1 / spread).sum(1)
    centre = (EFFECT / spread).sum(1) / precision
    fit = (EFFECT**2 / spread + np.log(spread)).sum(1) - centre**2 * precision + np.log(precision)
    weight = np.exp(-fit / 2) / (1 + (grid / 5) ** 2)
    at = random.choice(len(grid), (chains, draws), p=weight / weight.sum())
    tau, mu = grid[at], centre[at] + random.normal(size=at.shape) / precision[at] ** 0.5
    share = tau[..., None] ** 2 / spread[at]
    theta = share * EFFECT + (1 - share) * mu[..., None]
    theta += (share * ERROR**2) ** 0.5 * random.normal(size=theta.shape)
    named = {
        "mu": (("chain", "draw"), mu),
        "tau": (("chain", "draw"), tau),
        "theta": (("chain", "draw", "school"), theta),
    }
    return xr.DataTree.from_dict({"posterior": xr.Dataset(named)})


def these_again(theta, error):
    """What comes out if the same schools are tested again, with these errors."""
    return Normal(theta.theta, error)


def ninth(theta, error):
    """What comes out at another school of the population."""
    return Normal(theta.mu, (theta.tau**2 + error**2).sqrt())


def main() -> None:
    draws = posterior()
    if sys.argv[1:]:
        draws.to_netcdf(sys.argv[1], engine="h5netcdf")

    print(bayes_act(draws, these_again, design=torch.tensor(ERROR)), end="\n\n")
    for error in (1.0, 10.0, 20.0):
        print(bayes_act(draws, ninth, design=error), end="\n\n")
    print(bayes_act(draws, ninth, design=10.0).region(0.9))


if __name__ == "__main__":
    main()

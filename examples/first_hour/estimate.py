# %% [markdown]
# # Estimate: from posterior draws to the number in the paper
#
# A sampler returned thousands of draws, and the paper has room for one value of each parameter. In
# this hour you read a posterior that PyMC wrote, find out that its averages contradict one
# another, compute the values that do not depend on how the model was written, with their Monte
# Carlo errors and a region, and compose the sentence for the paper.
#
# rkl is installed as [README](../../README.md#install) says. PyMC and Stan are not needed.

# %%
from pathlib import Path

import numpy as np
import torch
from torch.distributions import ExpTransform, Gamma, LogNormal

from rkl import KL
from rkl.bayes import bayes_act, check_invariance, read_draws

# %% [markdown]
# ## The posterior
#
# The air conditioning of an airliner failed twelve times; these are the hours between the failures
# (Proschan 1963, *Technometrics* 5, 375, the ninth aircraft). The model is a gamma distribution
# with mean `mu` and standard deviation `sigma`. Many programs name it by a shape `alpha` and a
# rate `beta` instead, so the file holds these too.
#
# The file, [air_conditioning.nc](air_conditioning.nc), was written by the next cell. Set `SAMPLE =
# True` to sample again: that needs PyMC, and takes half a minute.

# %%
HOURS = np.array([3, 5, 7, 18, 43, 85, 91, 98, 100, 130, 230, 487.0])
SAMPLE = False

posterior = Path(globals().get("__file__", "")).parent / "air_conditioning.nc"
if SAMPLE:
    import pymc as pm

    with pm.Model():
        mu = pm.LogNormal("mu", np.log(100), 1)
        sigma = pm.LogNormal("sigma", np.log(100), 1)
        pm.Deterministic("alpha", (mu / sigma) ** 2)
        pm.Deterministic("beta", mu / sigma**2)
        pm.Gamma("hours", mu=mu, sigma=sigma, observed=HOURS)
        data = pm.sample(1000, chains=4, cores=1, random_seed=1, progressbar=False)
    posterior = Path("posterior.nc")
    data.to_netcdf(str(posterior))

# %% [markdown]
# rkl reads the file without PyMC and without ArviZ. `bayes_act` below takes the path, or what
# `pm.sample` returned; `read_draws` is for looking at the draws, here 4 chains of 1,000.

# %%
draws = read_draws(posterior)
print(f"{draws.chains} chains of {draws.draws:,} draws of {', '.join(draws.names)}")

# %% [markdown]
# ## Four averages, two answers
#
# The usual thing to report is the posterior mean. Here is the mean time between failures, once as
# the average of `mu`, and once computed from the averages of `alpha` and `beta`:

# %%
average = {name: draws[name].mean().item() for name in ("mu", "sigma", "alpha", "beta")}
print(f"average of mu:                       {average['mu']:5.1f} hours")
print(f"average of alpha / average of beta:  {average['alpha'] / average['beta']:5.1f} hours")

# %% [markdown]
# It is the same posterior. Which of the two gets into the paper was decided when somebody chose
# the arguments of `Gamma`. The mode moves in the same way, and so does the interval of highest
# density.
#
# ## The act
#
# rkl compares distributions of *data* and not their names. Imagine new intervals that come from
# the reported values: how much worse would each draw explain them than the reported values do? The
# **Bayes act** consists of the values for which this is least, on average over the draws. The
# family is the distribution of one observation, in the names of the draws:

# %%
estimate = bayes_act(posterior, "gamma(concentration=alpha, rate=beta)")
estimate

# %% [markdown]
# The error is that of Monte Carlo: what would change if the sampler ran again. It is not the
# uncertainty about the parameter, which the region below shows. The risk is how much is lost by
# reporting one distribution instead of all draws, in nats per observation.
#
# A function from draws to distributions of torch is a family too. This one uses the other two
# names, and the answer is the same distribution:


# %%
def by_moments(theta):
    return Gamma((theta.mu / theta.sigma) ** 2, theta.mu / theta.sigma**2)


renamed = bayes_act(posterior, by_moments)
print(f"from alpha and beta: {estimate.act.distribution.mean:.3f} hours")
print(f"from mu and sigma:   {renamed.act['mu']:.3f} ± {renamed.act.error['mu']:.3f} hours")

# %% [markdown]
# For a gamma distribution under this loss the averages of `alpha` and `beta` happen to be right.
# In most models no average is, and rkl finds the values by minimisation.
#
# ## The other estimates
#
# `compare` lists the common estimates with the excess risk of each under five losses: 0 is the
# best that can be reported under that loss. With the log density of the posterior as a function it
# computes the modes as well. There are two of them, because a mode depends on the names.


# %%
def log_posterior(theta):
    shape, rate = (theta.mu / theta.sigma) ** 2, theta.mu / theta.sigma**2
    likelihood = Gamma(shape[:, None], rate[:, None]).log_prob(torch.from_numpy(HOURS)).sum(-1)
    prior = LogNormal(np.log(100), 1.0)
    return likelihood + prior.log_prob(theta.mu) + prior.log_prob(theta.sigma)


table = renamed.compare(log_posterior)
table

# %% [markdown]
# `check_invariance` measures how much each answer changes under another parametrisation. Here it
# is log `mu` and log `sigma`, in which PyMC and Stan sample internally; the unit is a posterior
# standard deviation.

# %%
moved = check_invariance(
    renamed, {"mu": ExpTransform().inv, "sigma": ExpTransform().inv}, log_posterior
)
moved

# %% [markdown]
# ## The region
#
# The region holds the 90 % of the draws whose distributions are closest to the act. It does not
# depend on the parametrisation either. It is one set in both parameters, so its range of each is
# wider than an interval of that parameter alone.

# %%
region = renamed.region(0.9)
region

# %% The posterior of the two parameters with the estimates marked and the region shaded.
renamed.plot(0.9)

# %% [markdown]
# ## Which loss
#
# The act above is that of `ReverseKL()`, the default: it suits values that are reported. If the
# one distribution is to *predict*, take `KL()`. It adds the uncertainty about the parameters to
# the spread of the data, so `sigma` is larger:

# %%
predictive = bayes_act(posterior, by_moments, KL())
predictive

# %% [markdown]
# [Which number should I report?](../../docs/which-number.md) has more on losses, on models where
# an average does not exist, on groups, and on mixtures whose labels change places.
#
# ## How far to trust it
#
# The last line of an estimate has its diagnostics. They look at what was averaged, not at each
# parameter: effective draws, R-hat, and the tails. From a Pareto-k of 0.5 on, errors are marked as
# unknown; from 1 on, the act is refused. Warnings name chains that disagree.

# %%
diagnostics = renamed.diagnostics
print(f"{diagnostics.ess:,.0f} effective draws of {diagnostics.judged:,}")
print(f"R-hat at most {diagnostics.rhat:.3f}, Pareto-k at most {diagnostics.worst_k():.2f}")
print(f"warnings: {', '.join(diagnostics.warnings) or 'none'}")

# %% [markdown]
# ## The sentence
#
# With a Monte Carlo error of one hour, the digit before the point is the last one to print.

# %%
low, high = region.ranges["mu"]
sentence = (
    f"The mean time between failures is {renamed.act['mu']:.0f} hours (Bayes estimate under "
    f"reverse Kullback–Leibler loss; {low:.0f} to {high:.0f} hours in the joint 90 % region of "
    f"lowest loss; Monte Carlo error {renamed.act.error['mu']:.1f} hours from "
    f"{diagnostics.ess:,.0f} effective draws)."
)
print(sentence)

# %% [markdown]
# ## From Stan
#
# Hand over the fit of cmdstanpy, or the pattern of the CSV files that Stan wrote, one for each
# chain. There is no compiler for Stan here, so this cell first writes such files from the draws
# above; with files of your own, only its last two lines are needed.

# %%
for chain in range(draws.chains):
    columns = [draws[name][chain].numpy() for name in ("lp", "alpha", "beta")]
    np.savetxt(
        f"chain_{chain + 1}.csv",
        np.column_stack(columns),
        delimiter=",",
        header="lp__,alpha,beta",
        comments="",
    )

of_stan = bayes_act("chain_*.csv", "gamma(concentration=alpha, rate=beta)")
print(f"from CSV of Stan: {of_stan.act.distribution.mean:.3f} hours")

# %% [markdown]
# [The list of sources](../../docs/estimate.md#sources-of-draws) has NumPyro, R, emcee and plain
# arrays too.
#
# ## The same on the command line
#
# With the file in the folder, one command prints the table, the comparison and the region, and
# writes them with a page of figures, `runs/failures/report.html`:
#
# ```sh
# rkl estimate air_conditioning.nc --family "gamma(concentration=alpha, rate=beta)" \
#     --prob 0.9 --out runs/failures
# ```
#
# Next: [designs and regressions](../../docs/estimate.md#designs), and [a simpler
# model](../../docs/estimate.md#a-simpler-model) that predicts nearly the same.

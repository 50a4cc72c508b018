# %% [markdown]
# # Fit: from your table to samples, at the precision you choose
#
# You have a table and want more rows like it. A flow that is too small for the table makes
# mistakes: it invents rows between the kinds, or it leaves rare kinds out. In this hour you fit
# flows to a table under losses that weigh the two mistakes differently, draw samples at a
# precision that you set, and measure them, and samples of another program, with errors.
#
# rkl is installed as [README](../../README.md#install) says.

# %%
import tempfile
from pathlib import Path

import numpy as np
import torch
from matplotlib import pyplot as plt

import rkl
from rkl import PrecisionRecall
from rkl.fit import Method, fit_to_samples, read_data, reject
from rkl.flows import Coupling, Critic
from rkl.metrics import measure, prd_curve

# %% [markdown]
# ## The table
#
# In place of yours, this cell writes one: two measurements of 3,000 animals of three kinds, of
# which one is rare. The numbers are invented. The last 1,000 rows go into a file of their own,
# which no flow sees: all measurements are made against them.

# %%
random = np.random.default_rng(0)
CENTRES = np.array([[40.0, 3600.0], [47.0, 5000.0], [52.0, 3800.0]])
SHARES = [0.50, 0.38, 0.12]
SPREADS = np.array([1.2, 160.0])

kinds = random.choice(3, 3000, p=SHARES)
animals = CENTRES[kinds] + SPREADS * random.normal(size=(3000, 2))
for name, part in {"train.csv": animals[:2000], "test.csv": animals[2000:]}.items():
    np.savetxt(name, part, "%.3f", delimiter=",", header="length_mm,mass_g", comments="")

# %% [markdown]
# `read_data` reads a table of text, NPY, NPZ, Parquet, NetCDF, a folder of images, an array or a
# data frame, and refuses what cannot be fitted, with the reason.

# %%
train, test = read_data("train.csv"), read_data("test.csv")
print(f"{len(train):,} rows to fit, {len(test):,} to measure with, of {', '.join(train.columns)}")

# %% [markdown]
# ## Maximum likelihood, and a precision to reach
#
# The flow is small on purpose: two couplings leave bridges between the three clusters. Forward KL,
# the default, is maximum likelihood. With `target_precision` two critics are trained after it. The
# first learns the ratio of the densities of table and flow, by which draws are accepted or
# rejected; the second measures the precision of what was accepted, at slope λ = 1 of the curve
# below: the mass that accepted draws and table have in common. Rejection stays as mild as the
# precision allows.

# %%
flow = Coupling(transforms=2, hidden=(16, 16))
method = Method(batch=256, critic=Critic(lessons=300))
likelihood = fit_to_samples(flow, train, steps=600, method=method, target_precision=0.8)
print(likelihood.reached)

# %% [markdown]
# The precision is an upper bound with its standard error, because a better critic could still see
# a difference. Draw at that point, 1,000 samples:

# %%
torch.manual_seed(0)
density, reached = likelihood.flow(), likelihood.reached


def log_ratio(rows):
    return likelihood.critic(rows) - reached.log_normaliser


accepted = reject(density, log_ratio, n=1000, accept_lam=reached.point.accept_lam)
print(f"{accepted.cost:.2f} draws for each accepted sample")

# %% [markdown]
# A budget in place of a precision: `reject(density, likelihood.critic, n=1000, budget=2.0)`.
#
# ## Precision or recall, trained in
#
# The precision-recall divergence has one number, λ. Above 1 it weighs precision more, below 1
# recall. Each fit spends half of its steps on maximum likelihood, and keeps those parameters
# unless it finds better ones by its own measure.

# %%
fits = {"maximum likelihood": likelihood}
for lam in (10.0, 0.3):
    divergence = PrecisionRecall(lam=lam)
    fits[f"λ = {lam:g}"] = fit_to_samples(flow, train, divergence, steps=600, method=method)

samples = {name: fitted.flow().sample((1000,)) for name, fitted in fits.items()}
samples["with rejection"] = accepted.samples

# %% The table (grey) and the samples of each flow.
figure, axes = plt.subplots(2, 2, sharex=True, sharey=True, figsize=(6, 5))
for panel, (name, rows) in zip(axes.flat, samples.items(), strict=True):
    panel.plot(*test.values.T, ".", color="0.6", markersize=2)
    panel.plot(*rows.T, ".", markersize=2)
    panel.set_title(name)
for panel in axes[1]:
    panel.set_xlabel("length (mm)")
for panel in axes[:, 0]:
    panel.set_ylabel("mass (g)")

# %% [markdown]
# ## Measured, with errors
#
# `measure` compares samples with rows that were held out: precision, recall, density and coverage
# by nearest neighbours, precision and recall by clusters, and the Fréchet distance. The columns
# have different units, so each is divided by its spread. Beside the scores of halves are those of
# real rows against real rows: a perfect model would score as they do. Given the rows of the fit,
# `measure` also looks for copies of them.

# %%
scores = {
    name: measure(real=test.values, fake=rows, train=train.values, standardise=True)
    for name, rows in samples.items()
}
scores["maximum likelihood"]

# %% [markdown]
# The four sets of samples side by side. Precision is the share of the samples that the table
# supports, recall the share of the table that the samples reach; by clusters, precision is taken
# at slope 4 of the curve below and recall at slope 1/4.

# %%
PRECISION, RECALL = "precision of clusters, slope 4", "recall of clusters, slope 1/4"


def print_scores(name, score):
    precision, recall = score[PRECISION], score[RECALL]
    print(
        f"{name:20} precision {precision.value:.3f} ± {precision.error:.3f}   "
        f"recall {recall.value:.3f} ± {recall.error:.3f}"
    )


for name in samples:
    print_scores(name, scores[name].scores)

# %% [markdown]
# λ = 10 bought precision, and paid with recall: some kinds are drawn less often than the table has
# them. For λ = 0.3 there was nothing to gain at this slope, because maximum likelihood covers the
# table already. Rejection costs draws and gains more than either: where samples may cost draws,
# take it first. The [study](../../docs/studies/precision-recall.md) compares the two with exact
# ratios and several seeds.
#
# ## Samples from elsewhere
#
# `measure` needs arrays alone, so samples of any program can be scored. Here a file with draws of
# one Gaussian, and a file with rows of the table that were moved a little, as an overfitted model
# would return them:

# %%
rows = train.values.double().numpy()
gaussian = random.multivariate_normal(rows.mean(0), np.cov(rows.T), size=1000)
np.save("gaussian.npy", gaussian)
np.save("copies.npy", rows[:1000] + 0.01 * SPREADS * random.normal(size=(1000, 2)))

for name in ("gaussian", "copies"):
    elsewhere = torch.from_numpy(np.load(f"{name}.npy")).to(test.values)
    samples[name] = elsewhere
    scores[name] = measure(real=test.values, fake=elsewhere, train=train.values, standardise=True)
    print_scores(name, scores[name].scores)

# %% [markdown]
# The copies have excellent scores. The last row of their table shows what they are: too many of
# them are nearer to a row of the fit than to a held-out one.

# %%
scores["copies"]

# %% [markdown]
# ## The precision-recall curve
#
# Precision and recall are two points of one curve; each divergence looks at a part of it. The
# dashed line is another sample of the table itself, which a perfect model would match.

# %% Precision and recall by clusters, with one standard error.
scale = test.values.std(0)
figure, axes = plt.subplots()
for name, rows in {**samples, "the table itself": train.values[:1000]}.items():
    if name == "copies":
        continue
    curve = prd_curve(real=test.values / scale, fake=rows / scale)
    precision, recall = curve.precision, curve.recall
    dash = "--" if name == "the table itself" else "-"
    (line,) = axes.plot(recall.value, precision.value, dash, label=name)
    low, high = precision.value - precision.error, precision.value + precision.error
    axes.fill_between(recall.value, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1.02), ylim=(0, 1.02))
axes.legend()

# %% [markdown]
# ## Keep the flow
#
# A fit can be written as a run folder, and read again in another program:

# %%
folder = likelihood.save(Path(tempfile.mkdtemp()) / "flow")
again = rkl.load(folder)
print(torch.equal(again().log_prob(test.values), density.log_prob(test.values)))

# %% [markdown]
# ## The same on the command line
#
# ```sh
# rkl fit --data train.csv --steps 600 --target-precision 0.8 --out runs/likelihood
# rkl sample runs/likelihood -n 1000 --out samples.npy
# rkl evaluate runs/likelihood --data test.csv
# rkl metrics --real test.csv --fake samples.npy --train train.csv --standardise
# ```
#
# The second command draws at the precision of the first. Without `--flow` the flow is larger than
# the one above. Images in place of rows: `rkl fit --data
# images/ --flow "multi-scale(scales=2)"`; [From data to a flow](../../docs/fit.md) has the
# details, and [files](../../docs/files.md) what can be read.

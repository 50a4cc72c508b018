# %% [markdown]
# # Sample: from a Hamiltonian of your own to log Z with errors
#
# You have a Hamiltonian that is in no library, and want draws of exp(−E/T), averages, log Z and
# the free energy at every temperature of a range, each with an error. rkl fits one flow to the
# whole range, without data, and corrects its draws, so that the results are those of your
# Hamiltonian and not of the flow. [Sample](../../docs/sample.md) has the rest.
#
# The example is a ring of six sites with a double well at each and springs between neighbours.
# It is small enough that a transfer matrix gives log Z exactly, so that every figure below can
# be compared. It takes less than a minute.

# %% [markdown]
# ## The Hamiltonian
#
# $$E(x) = \sum_i \Bigl[ (x_i^2 - 1)^2 + \tfrac{k}{2} (x_i - x_{i+1})^2 \Bigr]$$
#
# A target is a frozen dataclass with `log_prob` in nats, up to log Z. A condition called T is
# a temperature, and `log_prob` is then −E/T. Batches come first: x is [..., sites], T is
# [..., 1]. `observables` are optional; what you return appears in every table, with its `units`.

# %%
from dataclasses import dataclass

import torch

from rkl.sample import Condition, Target, check_target


@dataclass(frozen=True)
class Ring(Target):
    """Double wells on a ring, with springs; energies in units of the barrier."""

    spring: float = 0.5
    event_shape = (6,)
    conditions = (Condition("T", 0.5, 2.0),)
    units = {"energy": "barriers per site", "order": ""}

    def energy(self, x):
        wells = (x.square() - 1).square()
        springs = self.spring / 2 * (x - x.roll(1, -1)).square()
        return (wells + springs).sum(-1)

    def log_prob(self, x, condition):
        return -self.energy(x) / condition[..., 0]

    def observables(self, x, condition):
        return {"energy": self.energy(x) / 6, "order": x.mean(-1).square()}


ring = Ring()
check_target(ring)  # raises an error that says what is wrong

# %% [markdown]
# ## What is exact here
#
# Z is the trace of the sixth power of the transfer matrix, on a grid of 301 points. Its
# derivative in 1/T is the mean energy. Your Hamiltonian will not have this.


# %%
def exact(temperature):
    """Log Z in nats, and the energy per site."""
    x = torch.linspace(-3.5, 3.5, 301, dtype=torch.float64)
    beta = torch.tensor(1 / temperature, dtype=torch.float64, requires_grad=True)
    well = (x.square() - 1).square()
    bond = (well[:, None] + well) / 2 + ring.spring / 2 * (x[:, None] - x).square()
    matrix = (-beta * bond).exp() * (x[1] - x[0])
    log_z = torch.linalg.eigvalsh(matrix).pow(6).sum().log()
    (slope,) = torch.autograd.grad(log_z, beta)
    return log_z.item(), -slope.item() / 6


exact(1.0)

# %% [markdown]
# ## One flow for all temperatures
#
# Nothing but `log_prob` goes in. The fit minimises the reverse KL divergence, D(flow ‖ target),
# over the whole range of T. Alone it would be content with one well; up to eight coordinates
# rkl therefore adds the likelihood of particles that are cooled to the target. Give your own
# fits minutes instead of 200 small steps: `minutes=10`.

# %%
from rkl.flows import NSF
from rkl.sample import fit_to_target

fit = fit_to_target(NSF(transforms=2, hidden=(64,)), ring, steps=200, seed=0)
last = fit.training.history[-1]
print(f"after {last['step']} steps {last['ess']:.0%} of the draws are effective")

# %% [markdown]
# ## Is the flow right?
#
# The density q of the flow is known for every draw, and so is the weight w = p/q. The mean of
# w is Z. `reference=True` also draws the target *without* the flow, by particles cooled from a
# broad distribution: a flow that never visits one of two wells looks good by its own draws, and
# only other draws show what it lacks. `passed` is True if the flow covers these draws and no
# average and no log Z deviates from theirs.

# %%
from rkl.sample import evaluate_on_target

temperatures = torch.tensor([[0.5], [0.75], [1.0], [1.5], [2.0]])
evaluation = evaluate_on_target(
    fit.flow, ring, temperatures, draws=500, chains=8, reference=True, seed=1
)
weights, log_z = evaluation.weights, evaluation.thermodynamics.log_z
print("   T  effective  accepted  log Z (nats)      exact  Pareto k")
for row, (temperature,) in enumerate(temperatures.tolist()):
    print(
        f"{temperature:4}  {weights.ess.value[row]:9.0%}  {evaluation.chain.acceptance[row]:8.0%}"
        f"  {log_z.value[row]:6.3f} ± {log_z.error[row]:.3f}"
        f"  {exact(temperature)[0]:6.3f}  {weights.tail[row]:8.2f}"
    )
print(f"\ncovers the target: {evaluation.passed}")
print(f"compared with draws by {evaluation.reference.source}")

# %% [markdown]
# An effective share of 60 % means that 100 draws are worth 60 independent ones of the target.
# Where Pareto k is above 0.7 neither the figure nor its error can be trusted. `print(evaluation)`
# prints all of it as tables: averages, F, the entropy and v, the variance of log w per site.

# %% log Z of the flow less the exact one, and the energy per site; bars are two standard errors
from matplotlib import pyplot as plt

T = temperatures[:, 0]
energy = evaluation.thermodynamics.energy  # of the whole ring
truth = torch.tensor([exact(t) for t in T.tolist()])
figure, (left, right) = plt.subplots(1, 2, figsize=(7.5, 3.2), layout="constrained")
left.axhline(0, color="gray", linewidth=1)
left.errorbar(T, log_z.value - truth[:, 0], 2 * log_z.error, fmt="o")
left.set(xlabel="T", ylabel="log Z less the exact one (nats)")
grid = torch.linspace(0.5, 2.0, 40)
right.plot(grid, [exact(t)[1] for t in grid.tolist()], label="exact")
right.errorbar(T, energy.value / 6, 2 * energy.error / 6, fmt="o", label="weighted draws")
right.set(xlabel="T", ylabel="energy per site")
right.legend()
figure.savefig("ring.png")

# %% [markdown]
# ## Draws, and an average of your own
#
# `independent_metropolis` makes a Markov chain with the flow as its proposal: it converges to
# your target for any flow; a bad flow repeats states more often. T may be any value of the
# range, also one that nothing was computed at before. By default each chain begins at one of 16
# draws of the flow, chosen by their weights. `start` gives states of your own: here all chains
# begin in the well at +1.

# %%
from rkl.sample import averages, independent_metropolis

condition = torch.tensor([0.9])
chain = independent_metropolis(
    ring, fit.flow, condition, draws=2_000, chains=4, seed=2, start=torch.ones(4, 6)
)
print(f"{tuple(chain.x.shape)} is chains, draws, sites")
print(f"acceptance {chain.acceptance.item():.2f}")
print(f"longest run without an accepted proposal: {chain.longest_rejection_run.item()} draws")

values = chain.measure(ring)
values["neighbours"] = (chain.x * chain.x.roll(1, -1)).mean(-1)  # ⟨x_i x_(i+1)⟩
diagnoses = chain.diagnose(values)
for name, mean in averages(ring, values, condition).items():
    effective, rhat = (diagnoses[name][it].item() for it in ("ess_bulk", "rhat"))
    print(
        f"{name:10} {mean.value:.4f} ± {mean.error:.4f}"
        f"   {effective:,.0f} effective draws, R-hat {rhat:.3f}"
    )
print(f"exact energy {exact(0.9)[1]:.4f}")

# %% [markdown]
# ## Keep them
#
# An array for numpy, or `chain.to_arviz(**values)` for ArviZ (`pip install 'rkl[arviz]'`),
# with the log-densities as sample statistics.

# %%
import numpy as np

np.savez("chains.npz", x=chain.x, log_p=chain.log_p, log_q=chain.log_q, **values)
print(*np.load("chains.npz"))

# %% [markdown]
# ## The same on the command line
#
# With `Ring` in a file `my_ring.py` where you are:
#
# ```sh
# rkl fit --target "my_ring:Ring(spring=0.5)" --minutes 5 --out RUN
# rkl evaluate RUN --reference --strict --allow my_ring:Ring
# rkl sample RUN --condition T=0.9 -n 10000 --out chains.nc --allow my_ring:Ring
# rkl report RUN --allow my_ring:Ring
# ```
#
# A run stores the name of your module and not its code, so that it is imported only if you
# allow it. `rkl fit` chooses the architecture itself, and a larger one than here.
#
# ## When not to do this
#
# For plain averages at a few temperatures a Markov chain is nearly always faster. Take a flow
# for log Z and the free energy at *every* temperature, for independent draws, and where chains
# do not mix: [when a Markov chain is faster](../../docs/sample.md#when-a-markov-chain-is-faster).
# If you only need log Z once, `rkl.sample.evidence(ring, condition)` takes no flow at all.

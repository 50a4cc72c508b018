"""Markov chains for targets: reference draws, and log Z along a ladder of temperatures."""

from rkl.sample.mcmc.kernels import HeatBath, Metropolis, RandomWalk, Wolff
from rkl.sample.mcmc.log_z import annealed_importance, mbar, thermodynamic_integration
from rkl.sample.mcmc.phi4 import Phi4HeatBath
from rkl.sample.mcmc.walks import Walk, markov_chain

__all__ = [
    "HeatBath",
    "Metropolis",
    "Phi4HeatBath",
    "RandomWalk",
    "Walk",
    "Wolff",
    "annealed_importance",
    "markov_chain",
    "mbar",
    "thermodynamic_integration",
]

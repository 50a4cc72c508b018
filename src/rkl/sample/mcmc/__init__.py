"""Markov chains for targets."""

from rkl.sample.mcmc.kernels import HeatBath, Metropolis, RandomWalk, Wolff
from rkl.sample.mcmc.phi4 import Phi4HeatBath
from rkl.sample.mcmc.walks import Walk, markov_chain

__all__ = [
    "HeatBath",
    "Metropolis",
    "Phi4HeatBath",
    "RandomWalk",
    "Walk",
    "Wolff",
    "markov_chain",
]

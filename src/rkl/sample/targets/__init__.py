"""Targets: unnormalised densities that depend on conditions, with domain, units and modes."""

from rkl.sample.targets.base import Condition, Density, Target, catalogue, parse_target
from rkl.sample.targets.check import check_target
from rkl.sample.targets.lattices import XY, Phi4
from rkl.sample.targets.plane import GaussianMixture, MoG4, MoG8, Rings

__all__ = [
    "XY",
    "Condition",
    "Density",
    "GaussianMixture",
    "MoG4",
    "MoG8",
    "Phi4",
    "Rings",
    "Target",
    "catalogue",
    "check_target",
    "parse_target",
]

"""Targets: unnormalised densities that depend on conditions, with domain, units and modes."""

from rkl.lazy import lazily

HOMES = {
    "base": "Condition Density Fluctuation Kernel Modes Target",
    "check": "check_target",
    "lattices": "XY Phi4",
    "parse": "catalogue parse_target",
    "plane": "GaussianMixture MoG4 MoG8 Rings",
}
__all__, __getattr__, __dir__ = lazily(__name__, HOMES)

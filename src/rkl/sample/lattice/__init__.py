"""Flows of fields and angles on periodic square lattices."""

from rkl.sample.lattice.base import SitesDistribution
from rkl.sample.lattice.coarse_to_fine import CoarseToFine, LatticeDistribution, LatticeFlow
from rkl.sample.lattice.field import CoarseToFineField
from rkl.sample.lattice.realnvp import CheckerboardRealNVP

__all__ = [
    "CheckerboardRealNVP",
    "CoarseToFine",
    "CoarseToFineField",
    "LatticeFlow",
    "LatticeDistribution",
    "SitesDistribution",
]

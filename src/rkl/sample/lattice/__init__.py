"""Flows of fields and angles on periodic square lattices."""

from rkl.sample.lattice.coarse_to_fine import CoarseToFine, LatticeFlow, LatticeLaw
from rkl.sample.lattice.field import CoarseToFineField
from rkl.sample.lattice.law import SitesLaw
from rkl.sample.lattice.realnvp import CheckerboardRealNVP

__all__ = [
    "CheckerboardRealNVP",
    "CoarseToFine",
    "CoarseToFineField",
    "LatticeFlow",
    "LatticeLaw",
    "SitesLaw",
]

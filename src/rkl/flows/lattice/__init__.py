"""Flows of fields and angles on periodic square lattices."""

from rkl.flows.lattice.coarse_to_fine import CoarseToFine, LatticeFlow, LatticeLaw
from rkl.flows.lattice.field import CoarseToFineField
from rkl.flows.lattice.law import SitesLaw
from rkl.flows.lattice.realnvp import CheckerboardRealNVP

__all__ = [
    "CheckerboardRealNVP",
    "CoarseToFine",
    "CoarseToFineField",
    "LatticeFlow",
    "LatticeLaw",
    "SitesLaw",
]

"""Flows of angles on periodic square lattices."""

from rkl.flows.lattice.coarse_to_fine import CoarseToFine, LatticeFlow, LatticeLaw

__all__ = ["CoarseToFine", "LatticeFlow", "LatticeLaw"]

"""Solvers of a problem: in closed form from one pass over the draws, or numerical."""

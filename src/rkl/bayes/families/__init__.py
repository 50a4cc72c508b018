"""Exponential families: one geometry, from which every closed-form Bayes act follows."""

from rkl.bayes.families import scalar as scalar
from rkl.bayes.families import vector as vector
from rkl.bayes.families.base import ExponentialFamily, Natural, families, family_of

__all__ = ["ExponentialFamily", "Natural", "families", "family_of"]

"""Exponential families: one geometry, from which every closed-form Bayes act follows."""

from rkl.bayes.families import discrete as discrete
from rkl.bayes.families import gamma as gamma
from rkl.bayes.families import normal as normal
from rkl.bayes.families.base import ExponentialFamily, Natural, Terms, families, family_of
from rkl.bayes.families.between import divergence_between
from rkl.bayes.families.regression import GaussianRegression, LogisticRegression, PoissonRegression

__all__ = [
    "ExponentialFamily",
    "GaussianRegression",
    "LogisticRegression",
    "Natural",
    "PoissonRegression",
    "Terms",
    "divergence_between",
    "families",
    "family_of",
]

"""Exponential families: one geometry, from which every closed-form Bayes act follows."""

from rkl.bayes.families import discrete as discrete
from rkl.bayes.families import gamma as gamma
from rkl.bayes.families import normal as normal
from rkl.bayes.families.base import ExponentialFamily, Natural, Terms, families, family_of
from rkl.bayes.families.named import (
    BetaBinomial,
    GeneralizedPareto,
    Gompertz,
    HurdlePoisson,
    Kumaraswamy,
    NegativeBinomial2,
    OrderedLogistic,
    TruncatedNormal,
    Weibull,
    ZeroInflatedNegativeBinomial,
    ZeroInflatedPoisson,
)
from rkl.bayes.families.regression import GaussianRegression, LogisticRegression, PoissonRegression

__all__ = [
    "BetaBinomial",
    "ExponentialFamily",
    "GaussianRegression",
    "GeneralizedPareto",
    "Gompertz",
    "HurdlePoisson",
    "Kumaraswamy",
    "LogisticRegression",
    "Natural",
    "NegativeBinomial2",
    "OrderedLogistic",
    "PoissonRegression",
    "Terms",
    "TruncatedNormal",
    "Weibull",
    "ZeroInflatedNegativeBinomial",
    "ZeroInflatedPoisson",
    "families",
    "family_of",
]

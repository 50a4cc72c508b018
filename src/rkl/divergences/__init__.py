r"""Divergences D(p ‖ q) between a target p and a model q, in nats.

p is imitated: a teacher, a data set, a Boltzmann density, a posterior draw.
q is learned: a student, a flow, an estimate. The target always comes first.
"""

from rkl.divergences.adaptive import AKL, AlphaBeta, ToDi
from rkl.divergences.base import Divergence, FDivergence
from rkl.divergences.f_divergences import (
    KL,
    Amari,
    Jeffreys,
    JensenShannon,
    NeymanChiSquare,
    PearsonChiSquare,
    PrecisionHalf,
    PrecisionRecall,
    RecallHalf,
    ReverseKL,
    SkewKL,
    SkewReverseKL,
    SquaredHellinger,
    TotalVariation,
)
from rkl.divergences.parse import catalogue, parse

__all__ = [
    "AKL",
    "KL",
    "AlphaBeta",
    "Amari",
    "Divergence",
    "FDivergence",
    "Jeffreys",
    "JensenShannon",
    "NeymanChiSquare",
    "PearsonChiSquare",
    "PrecisionHalf",
    "PrecisionRecall",
    "RecallHalf",
    "ReverseKL",
    "SkewKL",
    "SkewReverseKL",
    "SquaredHellinger",
    "ToDi",
    "TotalVariation",
    "catalogue",
    "parse",
]

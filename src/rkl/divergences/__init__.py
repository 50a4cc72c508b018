r"""Divergences D(p ‖ q) between a target p and a model q, in nats.

p is imitated: a teacher, a data set, a Boltzmann density, a posterior draw.
q is learned: a student, a flow, an estimate. The target always comes first.
"""

# adaptive and f_divergences list their own names: a new class is named in its own file.
from rkl.divergences import adaptive, f_divergences, rows
from rkl.divergences.adaptive import *  # noqa: F403
from rkl.divergences.base import Divergence, FDivergence
from rkl.divergences.f_divergences import *  # noqa: F403
from rkl.divergences.parse import catalogue, parse
from rkl.divergences.rows import *  # noqa: F403

__all__ = ["Divergence", "FDivergence", "catalogue", "parse"]
__all__ += adaptive.__all__
__all__ += f_divergences.__all__
__all__ += rows.__all__

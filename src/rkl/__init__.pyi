from rkl.divergences import *  # noqa: F403
from rkl.estimators import LinearHead as LinearHead
from rkl.estimators import Sampled as Sampled
from rkl.estimators import TopK as TopK
from rkl.estimators import draw as draw
from rkl.estimators import exact as exact
from rkl.estimators import monte_carlo as monte_carlo
from rkl.estimators import per_token as per_token
from rkl.estimators import sampled_terms as sampled_terms
from rkl.estimators import variational_bound as variational_bound
from rkl.runs import load as load
from rkl.runs import save as save

__version__: str

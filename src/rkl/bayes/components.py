"""The components of a mixture act in the order of their means, where draws do not label them."""

import itertools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, MixtureSameFamily

from rkl.bayes.averages import SWAPPED, most_exchanged
from rkl.bayes.generic import GenericAct
from rkl.bayes.questions import Question

TRIED = 6  # variables of which every set may be what the components have
SAME = 1e-9  # relative difference of log-densities of the same mixture in another order


def sort_components(question: Question, found: GenericAct) -> GenericAct:
    """The same act with its components sorted by their means.

    Draws with labels that change places start the minimiser at any of them, so that two losses,
    or two runs, would list the components differently. Labels that do not change places stay.
    """
    keys = _keys(question.law(question.few))
    if keys is None or keys.ndim != 2 or most_exchanged(keys)[0] <= SWAPPED:
        return found
    law = question.law({name: x[None] for name, x in found.theta.items()})
    at_act = _keys(law)
    if at_act is None:
        return found
    order, count = at_act[0].argsort(stable=True), at_act.shape[-1]
    if torch.equal(order, torch.arange(count)):
        return found
    axes = {k: x.shape.index(count) for k, x in found.theta.items() if count in x.shape}
    for names in _subsets(list(axes)[:TRIED]):
        moved = {
            name: x.index_select(axes[name], order) if name in names else x
            for name, x in found.theta.items()
        }
        if _same(law, question.law({name: x[None] for name, x in moved.items()})):
            influence = {
                name: x.index_select(1 + axes[name], order) if name in names else x
                for name, x in found.influence.items()
            }
            return replace(found, theta=moved, influence=influence)
    return found


def _subsets(names: list[str]) -> Any:
    sizes = range(len(names), 0, -1)
    return itertools.chain.from_iterable(itertools.combinations(names, size) for size in sizes)


def _keys(law: Distribution) -> Tensor | None:
    """What the components of mixtures are sorted by [n, components]; None where there is nothing.

    Their means, or their locations where they have no mean; of vectors the first coordinate.
    """
    while isinstance(law, Independent):
        law = law.base_dist
    if not isinstance(law, MixtureSameFamily) or len(law.batch_shape) != 1:
        return None
    parts: Any = law.component_distribution
    for name in ("mean", "loc"):
        try:
            keys = getattr(parts, name)
        except (AttributeError, NotImplementedError):
            continue
        keys = keys.expand(parts.batch_shape + parts.event_shape)
        keys = keys.flatten(2)[..., 0] if keys.ndim > 2 else keys
        if keys.isfinite().all():
            return keys.detach()
    return None


def _same(law: Distribution, other: Distribution) -> bool:
    """Whether two mixtures of batch shape [1] have the same density at draws of one of them."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        x = law.sample(torch.Size([16]))
        return torch.allclose(law.log_prob(x), other.log_prob(x), rtol=SAME, atol=SAME)

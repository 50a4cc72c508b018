"""The numbers among the variables that the reported distribution does not depend on.

Any value of such a number gives the same distribution, so none of them is an estimate.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution, MixtureSameFamily
from torch.distributions.transforms import Transform

from rkl.bayes.answer import Act
from rkl.bayes.families.regression import Regression
from rkl.bayes.model import LawOf
from rkl.bayes.problem import Variables
from rkl.bayes.solve.unconstrained import chart_of
from rkl.stats import Mean

RELATIVE_ROUNDING = 1e-9  # relative change of a parameter that is rounding
RANK = 1e-9  # relative singular value below which a direction changes nothing
ROWS = 8  # draws whose values replace a number, to test its influence
STEP, ORDER = 1e-4, 1e-6  # along a direction, and the share of a movement that is rounding
LISTED = 8  # numbers without an estimate that a sentence names
MAX_COORDINATES = 100  # coordinates whose combinations are searched
NO_MASS = 1e-12  # probability at a node that is none


class _Numbers(NamedTuple):
    """From draws to what their distributions consist of, and the size that counts as 0."""

    of: Callable[[Variables], list[Tensor]]
    floor: float


class Unidentified(NamedTuple):
    """Numbers without an estimate, by variable, as masks [*shape].

    Attributes:
        unused: Each may take any value by itself.
        combined: Only combinations of them change the distribution, such as a sum.
    """

    unused: dict[str, Tensor]
    combined: dict[str, Tensor]


def find_unidentified(
    law: LawOf,
    at: Variables,
    draws: Variables,
    mass: Callable[[Distribution], Tensor] | None = None,
) -> Unidentified:
    """The numbers of an act that its distribution does not depend on.

    Args:
        law: From parameters [n, *shape] to n distributions.
        at: The act, [*shape] each.
        draws: Some draws, [n, *shape] each: values that a number is replaced by.
        mass: From a distribution to its log-mass at nodes, for a class of others, which may keep
            parameters that it does not use.

    >>> law = lambda t: torch.distributions.Normal(t["a"] + 0 * t["b"], 1.0)
    >>> few = {"a": torch.randn(4).double(), "b": torch.randn(4).double()}
    >>> find_unidentified(law, {name: x[0] for name, x in few.items()}, few).unused
    {'a': tensor(False), 'b': tensor(True)}
    """
    at = {name: x.detach().clone() for name, x in at.items()}

    def parameters(theta: Variables) -> list[Tensor]:
        return _parameters(law(theta))

    def masses(theta: Variables) -> list[Tensor]:
        assert mass is not None  # it is, where this is called
        return [mass(law(theta)).exp()]

    by_mass = mass is not None and _is_foreign(law({name: x[None] for name, x in at.items()}))
    numbers = _Numbers(masses, NO_MASS) if by_mass else _Numbers(parameters, 0.0)
    unused = _find_unused(numbers, at, draws)
    return Unidentified(unused, _find_combined(law, numbers, at, draws, unused))


def without_unidentified(
    act: Act, unidentified: Unidentified, variables: Mapping[str, str]
) -> Act:
    """The act with nan in place of numbers that it does not depend on.

    Numbers of which only combinations are identified keep their values and lose their errors.

    Args:
        act: The act.
        unidentified: Its numbers without an estimate.
        variables: Parameter of the act -> variable that it is.
    """
    parameters = dict(act.parameters)
    for name, mean in parameters.items():
        variable = variables.get(name, name)
        if variable not in unidentified.unused:
            continue
        unused, combined = (masks[variable] for masks in unidentified)
        if unused.shape == mean.value.shape:
            error = mean.error.masked_fill(unused | combined, math.nan)
            parameters[name] = Mean(mean.value.masked_fill(unused, math.nan), error)
    return replace(
        act, parameters=parameters, unused=unidentified.unused, combined=unidentified.combined
    )


def sentences(unidentified: Unidentified, labels: Callable[[str], list[str]]) -> list[str]:
    """Sentences on numbers that have no estimate."""
    texts = [text] if (text := not_used(unidentified.unused, labels)) else []
    if combined := labels_in(unidentified.combined, labels):
        texts.append(
            f"{joined_labels(combined)}: the distribution depends on combinations of them only; "
            "other values give the same one"
        )
    return texts


def not_used(unused: Mapping[str, Tensor], labels: Callable[[str], list[str]]) -> str:
    """The sentence on numbers that a distribution does not depend on; empty without any."""
    names = labels_in(unused, labels)
    if not names:
        return ""
    verb = "is" if len(names) == 1 else "are"
    return (
        f"{joined_labels(names)} {verb} not used by the family: any value gives the same "
        "distribution, so none is shown"
    )


def joined_labels(labels: list[str]) -> str:
    """Labels in a sentence, of many the first."""
    more = [f"{len(labels) - LISTED:,} more"] if len(labels) > LISTED else []
    return ", ".join([*labels[:LISTED], *more])


def labels_in(masks: Mapping[str, Tensor], labels: Callable[[str], list[str]]) -> list[str]:
    """The labels of the numbers in masks, a whole variable by its name."""
    names = []
    for name, mask in masks.items():
        if mask.numel() and bool(mask.all()):
            names.append(name)
        elif bool(mask.any()):
            pairs = zip(labels(name), mask.flatten().tolist(), strict=True)
            names += [label for label, inside in pairs if inside]
    return names


def _find_unused(numbers: _Numbers, at: Variables, draws: Variables) -> dict[str, Tensor]:
    slopes = _slopes(numbers, at)
    largest = max((x.abs().max().item() for x in slopes.values() if x.numel()), default=0.0)
    masks = {name: torch.zeros(x.shape, dtype=torch.bool) for name, x in at.items()}
    flat = [
        (name, i)
        for name, x in slopes.items()
        for i in (x.abs().flatten() <= RELATIVE_ROUNDING * largest).nonzero()[:, 0].tolist()
    ]
    for name, i in _without_effect(numbers, at, draws, flat):
        masks[name].view(-1)[i] = True
    return masks


def _without_effect(
    numbers: _Numbers, at: Variables, draws: Variables, places: list[tuple[str, int]]
) -> list[tuple[str, int]]:
    """Those of the places at which no value of the draws changes the distribution."""
    if not places or not _changes(numbers, at, draws, places):
        return places
    if len(places) == 1:
        return []
    half = len(places) // 2
    sides = places[:half], places[half:]
    return [place for side in sides for place in _without_effect(numbers, at, draws, side)]


def _changes(
    numbers: _Numbers, at: Variables, draws: Variables, places: list[tuple[str, int]]
) -> bool:
    """True if some draw's values at these places change the distribution."""
    rows = len(next(iter(draws.values())))
    try:
        here = _of_one(numbers, at)
    except (RuntimeError, ValueError):
        return True
    for row in range(0, rows, max(1, rows // ROWS)):
        other = {name: x.clone() for name, x in at.items()}
        for name, i in places:
            other[name].view(-1)[i] = draws[name][row].reshape(-1)[i]
        try:
            if not _same(here, _of_one(numbers, other), numbers.floor):
                return True
        except (RuntimeError, ValueError):
            return True
    return False


def _of_one(numbers: _Numbers, variables: Variables) -> list[Tensor]:
    return numbers.of({name: x[None] for name, x in variables.items()})


def _same(here: list[Tensor], there: list[Tensor], floor: float) -> bool:
    alike = (
        x.shape == y.shape
        and torch.allclose(x.double(), y.double(), RELATIVE_ROUNDING, floor, True)
        for x, y in zip(here, there, strict=False)
    )
    return len(here) == len(there) and all(alike)


def _slopes(numbers: _Numbers, at: Variables) -> dict[str, Tensor]:
    """Slopes of a random combination of the distribution's parameters; 0 of whole numbers."""
    leaves = {name: x.requires_grad_() for name, x in at.items() if x.is_floating_point()}
    with torch.enable_grad():
        pulled = _pull_back(_of_one(numbers, at), list(leaves.values()))
    slopes = dict(zip(leaves, pulled, strict=True))
    for x in leaves.values():
        x.requires_grad_(False)
    return {name: slopes.get(name, torch.zeros(x.shape)) for name, x in at.items()}


def _pull_back(numbers: list[Tensor], leaves: list[Tensor], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    parts = [x for x in numbers if x.requires_grad]
    if not parts:
        return [torch.zeros_like(x) for x in leaves]
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in parts]
    total = sum((w * x).sum() for w, x in zip(weights, parts, strict=True))
    slopes = torch.autograd.grad(total, leaves, retain_graph=True, allow_unused=True)  # pyright: ignore
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, slopes, strict=True)]


def _parameters(law: Any, visited: frozenset[int] = frozenset()) -> list[Tensor]:
    """All numbers that a distribution, and its parts, are made of."""
    if id(law) in visited:  # a transform and its inverse hold each other
        return []
    if isinstance(law, Regression):
        extra_names = ("scale", "offset", "trials")
        return [law.predictor, *(x for key, x in vars(law).items() if key in extra_names)]
    if isinstance(law, Tensor):
        return [law] if law.dtype.is_floating_point or law.dtype == torch.int64 else []
    visited = visited | {id(law)}
    if isinstance(law, list | tuple):
        return [x for part in law for x in _parameters(part, visited)]
    if isinstance(law, Distribution | Transform):
        parts = (part for key, part in vars(law).items() if not key.startswith("_cached"))
        return [x for part in parts for x in _parameters(part, visited)]
    return []


def _is_foreign(law: Distribution) -> bool:
    """True if its parameters do not show what it depends on.

    A class from elsewhere may keep what it does not use; a component may have no weight.
    """
    parts = [x for x in vars(law).values() if isinstance(x, Distribution)]
    is_ours = type(law).__module__.partition(".")[0] in ("torch", "rkl")
    return not is_ours or isinstance(law, MixtureSameFamily) or any(map(_is_foreign, parts))


def _find_combined(
    law: LawOf, numbers: _Numbers, at: Variables, draws: Variables, unused: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    never = {name: torch.zeros(x.shape, dtype=torch.bool) for name, x in at.items()}
    real = {name: x for name, x in draws.items() if x.is_floating_point()}
    if sum(at[name].numel() for name in real) > MAX_COORDINATES:
        return never
    try:
        chart = chart_of(real, lambda t: law({**draws, **t}))
        point = chart.coordinates({name: at[name][None] for name in real})[0]
        whole = {name: at[name][None] for name in at if name not in real}
        leaf = point.requires_grad_()
        with torch.enable_grad():
            made = numbers.of({**whole, **chart.point(leaf[None])})
            pulls = [_pull_back(made, [leaf], i)[0] for i in range(len(leaf) + 4)]
    except (RuntimeError, ValueError):  # on an edge, where there is no chart
        return never
    null = _null_space(torch.stack(pulls))
    if not null.shape[1] or not point.isfinite().all():
        return never
    for direction in null.T:
        ends = (chart.point((point.detach() + step * direction)[None]) for step in (STEP, -STEP))
        ahead, back = ends
        for name in real:  # central differences: what moves in second order only does not count
            moved = (ahead[name] - back[name]).abs()[0]
            never[name] |= (moved > ORDER * moved.max()) & (moved > 0) & ~unused[name]
    return never


def _null_space(slopes: Tensor) -> Tensor:
    """Directions [k, null] in which nothing changes, beside those of single coordinates."""
    size = slopes.square().sum(0).sqrt()
    used = size > RELATIVE_ROUNDING * size.max()
    if not slopes.isfinite().all() or int(used.sum()) < 2:
        return slopes.new_zeros(slopes.shape[1], 0)
    _, values, rows = torch.linalg.svd(slopes[:, used] / size[used])
    flat = rows[values <= RANK * values[0]]
    null = slopes.new_zeros(slopes.shape[1], len(flat))
    null[used] = (flat / size[used]).T / (flat / size[used]).abs().amax(-1)
    return null

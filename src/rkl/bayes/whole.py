"""Acts some of whose parameters are whole numbers, such as trials: these are searched through."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.distributions import Distribution

from rkl.bayes.charts import Chart, chart_of
from rkl.bayes.laws import moving_edge, support_of
from rkl.bayes.minimise import Minimum, minimise
from rkl.bayes.nodes import Laws

SWEEPS = 8  # over all whole numbers, until none changes
Function = Callable[[Chart], Callable[[Tensor], Tensor]]


def whole_parameters(laws: Laws) -> tuple[str, ...]:
    """The parameters that are whole numbers in all draws and move the end of a finite support.

    >>> theta = {"n": torch.tensor([5.0, 6.0]), "p": torch.tensor([0.0, 1.0])}
    >>> law = lambda t: torch.distributions.Binomial(t["n"], t["p"])
    >>> whole_parameters(Laws(theta, law, torch.ones(2) / 2))
    ('n',)
    """
    law = laws.at(slice(None))
    support = None if law.event_shape else support_of(law)
    if support is None or not support.is_discrete or not moving_edge(law):
        return ()
    return tuple(
        name
        for name, x in laws.theta.items()
        if bool((x == x.round()).all()) and moving_edge(_moved_alone(laws, name))
    )


def _moved_alone(laws: Laws, name: str) -> Distribution:
    """The laws of draws of which only one parameter moves."""
    theta = {key: x if key == name else x[:1].expand_as(x) for key, x in laws.theta.items()}
    return laws.of(theta)


def chart_without(
    laws: Laws, names: tuple[str, ...], transforms: Mapping | None = None
) -> tuple[Chart, dict[str, Tensor]]:
    """The chart of all other parameters, and their draws."""
    free = {name: x for name, x in laws.theta.items() if name not in names}

    def law(theta: Mapping[str, Tensor]) -> Distribution:
        rows = len(next(iter(theta.values())))
        return laws.law({**theta, **{name: laws.theta[name][:rows] for name in names}})

    return chart_of(free, law, transforms), free


def search(
    laws: Laws, names: tuple[str, ...], chart: Chart, start: Mapping[str, Tensor], at: Tensor,
    function: Function, scale: Tensor, smooth: bool,
) -> Chart:  # fmt: skip
    """The chart with the whole numbers of least loss, the other parameters minimised over.

    One number at a time is moved, by steps that double while the loss falls.

    Args:
        laws: Of the draws, between whose extremes the numbers lie.
        names: Of the whole parameters.
        chart: Of the others.
        start: The whole numbers to start from, [*shape] each.
        at: The coordinates of the others to start from.
        function: From a chart with whole numbers to the loss as a function of coordinates.
        scale: Of the coordinates.
        smooth: Whether the loss is.
    """
    known: dict[tuple[int, ...], Minimum] = {}
    shapes = {name: laws.theta[name].shape[1:] for name in names}
    flat = torch.cat([laws.theta[name].reshape(len(laws), -1) for name in names], -1)
    low, high = flat.amin(0), flat.amax(0)

    def chart_at(numbers: Tensor) -> Chart:
        pieces = numbers.split([shape.numel() for shape in shapes.values()])
        pairs = zip(shapes.items(), pieces, strict=True)
        return replace(chart, fixed={name: x.reshape(shape) for (name, shape), x in pairs})

    def solve(numbers: Tensor, coordinates: Tensor) -> Minimum:
        key = tuple(int(x) for x in numbers.tolist())
        if key not in known:
            of = function(chart_at(numbers))
            known[key] = minimum_of(of, coordinates[None], scale, smooth)
        return known[key]

    numbers = torch.cat([start[name].reshape(-1) for name in names]).double()
    found = solve(numbers, at)
    for _ in range(SWEEPS):
        before = numbers
        for place in range(len(numbers)):
            numbers, found = _along(place, numbers, found, solve, low[place], high[place])
        if torch.equal(before, numbers):
            break
    return chart_at(numbers)


def _along(place, numbers, found, solve, low, high) -> tuple[Tensor, Minimum]:
    """The best value of one of the numbers: steps double while the loss falls, then shrink."""
    step, falling = 1.0, True
    while step >= 1:
        better = False
        for sign in (1, -1):
            trial = numbers.clone()
            trial[place] = (numbers[place] + sign * step).clamp(low, high)
            if torch.equal(trial, numbers):
                continue
            there = solve(trial, found.point)
            if there.value < found.value:
                numbers, found, better = trial, there, True
                break
        falling = falling and better
        step = 2 * step if better and falling else step // 2
    return numbers, found


def minimum_of(of, starts: Tensor, scale: Tensor, smooth: bool) -> Minimum:
    """The minimum, also where there is nothing to minimise over."""
    if starts.shape[-1]:
        return minimise(of, starts, scale=scale, smooth=smooth)
    with torch.no_grad():
        value = of(starts[0]).item()
    return Minimum(starts[0], value, starts[0], lambda vectors: vectors, 0.0, True, 1)

"""The laws every target obeys, for those of rkl and for your own."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from rkl.checks import warn
from rkl.randomness import random_numbers
from rkl.sample.domain import check_architecture
from rkl.sample.targets.base import Kernel, Target, exact_draws

MAX_ROUNDING = 0.01  # nats of a log-density, above which it is computed in double precision


def check_target(target: Target, *, draws: int = 64) -> None:
    """Test a target on the laws that every target obeys.

    Its log-density is finite with a finite gradient, one value per x, independent of the rest of
    the batch; in angles it has the period 2 pi; each observable has a unit and one value per
    x; single precision keeps its digits; exact draws, where there are any, have a mean score
    of 0, also after a move of its kernel. Modes have names, response coefficients are derived
    from observables, and an architecture builds a flow of its events.

    Args:
        target: The target to test.
        draws: Number of random x.

    Raises:
        AssertionError: It breaks a law; the message names the target and the law.
        TypeError: It is no target.
        ValueError: There are too few draws.

    >>> from rkl.sample import XY
    >>> check_target(XY(side=4))
    """
    if not isinstance(target, Target):
        raise TypeError(f"target must be a Target such as XY(side=8); got {target!r}.")
    if not isinstance(draws, int) or draws < 2:
        raise ValueError(f"draws must be a number of 2 or more; got {draws!r}.")
    generator = torch.Generator().manual_seed(0)
    z = 2 * torch.randn(draws, *target.event_shape, generator=generator, dtype=torch.float64)
    x = target.chart.to_bounded(z)[0]
    low, high = (
        torch.tensor([getattr(it, end) for it in target.conditions], dtype=x.dtype)
        for end in ("low", "high")
    )
    u = torch.rand(draws, len(low), generator=generator, dtype=x.dtype)
    condition = low + (high - low) * u
    _check_density(target, x, condition)
    _check_observables(target, x, condition)
    _check_abilities(target, x, condition)
    _check_sampler(target, (low + high) / 2)


@torch.enable_grad()
def check_log_prob(
    target: Target, condition: Tensor, *, dtype: torch.dtype, gradient: bool, draws: int = 64
) -> None:
    """Refuse a log-density that no fit can use, before the fit begins.

    Args:
        target: The target.
        condition: One value of its conditions, [conditions].
        dtype: The precision of the flow.
        gradient: Whether the fit needs the gradient in x.
        draws: Number of x at which it is computed.

    Raises:
        ValueError: It fails, has another shape than [*batch], is nan, mixes the rows of a batch,
            or has no gradient.
        TypeError: It is no tensor of floating-point numbers.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(draws, *target.event_shape, generator=generator).to(dtype)
    each = condition.to(dtype).expand(draws, -1)
    value = call_log_prob(target, x, each)
    if value.shape != (draws,):
        shape = ", ".join(map(str, x.shape))
        raise ValueError(
            f"target: log_prob of {target} must return one number for each x, [{draws}] for x "
            f"[{shape}]; got {list(value.shape)}."
        )
    if not value.is_floating_point():
        raise TypeError(
            f"target: log_prob of {target} must return floating-point numbers; got {value.dtype}."
        )
    if value.isnan().any():
        raise ValueError(
            f"target: log_prob of {target} is nan at {int(value.isnan().sum())} of {draws} x from "
            "N(0, 1); it must be a number, or -inf where the density is 0 (torch.where)."
        )
    alone, finite = call_log_prob(target, x[:1], each[:1]), value[:1].isfinite()
    apart = (alone - value[:1]).abs()[finite]
    if (apart > 1e-4 * (1 + value[:1].abs()[finite])).any():
        raise ValueError(
            f"target: log_prob of {target} mixes the rows of a batch: of the first x alone it is "
            f"{alone.item():.6g}, beside others {value[0].item():.6g}. Sum over its own axes only."
        )
    if gradient:
        _check_gradient(target, x, each)


def call_log_prob(target: Target, x: Tensor, condition: Tensor) -> Tensor:
    """log_prob of a target; its failures become ValueErrors with the place."""
    try:
        value = target.log_prob(x, condition)
    except Exception as error:
        raise ValueError(
            f"target: log_prob of {target} fails for x {list(x.shape)} of {x.dtype} and condition "
            f"{list(condition.shape)}: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(value, Tensor):
        raise TypeError(
            f"target: log_prob of {target} must return a tensor; got a {type(value).__name__}."
        )
    return value


def in_double(target: Target, condition: Tensor) -> tuple[Tensor, torch.dtype]:
    """Conditions in double precision, if the density takes it, and the precision of its events.

    A function with parameters in single precision often does not.
    """
    x = torch.zeros(1, *target.event_shape, dtype=torch.float64, device=condition.device)
    try:
        call_log_prob(target, x, condition[:1].double())
    except (TypeError, ValueError):
        return condition, condition.dtype
    return condition.double(), torch.float64


def precise_log_prob(
    target: Target, x: Float[Tensor, "*batch_event"], condition: Float[Tensor, "*batch conditions"]
) -> Float[Tensor, "*batch"]:
    """The log-density of x, in double precision where single precision would round it too much."""
    log_p = target.log_prob(x, condition)
    if not log_p.numel() or log_p.dtype == torch.float64:
        return log_p
    size = log_p.abs().where(log_p.isfinite(), 0.0).amax().item()
    rounding = size * torch.finfo(log_p.dtype).eps
    if rounding < MAX_ROUNDING:
        return log_p
    one = condition[(0,) * (condition.ndim - 1)][None]
    if in_double(target, one)[1] == torch.float64:
        log_p = target.log_prob(x.double(), condition.double())
    if log_p.dtype != torch.float64:
        warn(
            f"target: log_prob of {target} is of size {size:.2g} nats, which {log_p.dtype} rounds "
            f"by up to {rounding:.2g}: take a constant off it, or let it take x in double "
            "precision."
        )
    return log_p


def _check_gradient(target: Target, x: Tensor, condition: Tensor) -> None:
    lacking = (
        f"target: log_prob of {target} has no gradient in x, which this fit needs: from x to "
        "what it returns it must be made of operations of torch, without numpy(), item() or "
        "detach()."
    )
    x = x.detach().requires_grad_(True)
    try:
        value = target.log_prob(x, condition)
    except RuntimeError as error:
        raise ValueError(f"{lacking} ({error})") from error
    if not value.requires_grad:
        raise ValueError(lacking)
    (score,) = torch.autograd.grad(value.sum(), x, allow_unused=True)
    if score is None:
        raise ValueError(lacking)
    nowhere = int((value == -math.inf).sum())
    if nowhere:
        raise ValueError(
            f"target: log_prob of {target} is -inf at {nowhere} of {len(x)} x from N(0, 1), and "
            "this fit needs a gradient wherever its flow goes; say where x lies, as by "
            "domain='positive', domain=(0, 1), or a tuple with one entry for each coordinate."
        )
    wrong = (~score.isfinite()).flatten(1).any(1) & value.isfinite()
    if wrong.any():
        raise ValueError(
            f"target: the gradient of log_prob of {target} is not finite at {int(wrong.sum())} of "
            f"{len(x)} x drawn from N(0, 1), although log_prob is."
        )


def _score(target, x, condition):
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        value = target.log_prob(x, condition)
        law = f"{target}: log_prob has no gradient in x; it must be made of operations of torch."
        assert value.requires_grad, law
        (score,) = torch.autograd.grad(value.sum(), x)
    return value.detach(), score


def _check_density(target, x, condition):
    value = target.log_prob(x, condition)
    assert value.shape == x.shape[:1], f"{target}: log_prob must be [*batch], one value per x."
    value, score = _score(target, x, condition)
    assert value.isfinite().all(), f"{target}: log_prob is not finite everywhere."
    assert score.isfinite().all(), f"{target}: the gradient of log_prob is not finite."
    scale = 1 + value.abs().max()
    alone = target.log_prob(x[:1], condition[:1])
    assert (alone - value[:1]).abs().max() < 1e-9 * scale, f"{target} mixes the rows of a batch."
    single = target.log_prob(x.float(), condition.float())
    assert (single - value).abs().max() < 1e-4 * scale, f"{target} loses its digits in float32."
    circle = target.chart.circle
    if circle.any():
        turned = target.log_prob(x + 2 * torch.pi * circle.to(x), condition)
        law = f"{target} has not the period 2 pi in its angles."
        assert (turned - value).abs().max() < 1e-9 * scale, law


def _check_observables(target, x, condition):
    measured = target.observables(x, condition)
    law = f"{target} measures {list(measured)} but has units for {list(target.units)}."
    assert measured.keys() == target.units.keys(), law
    for name, values in measured.items():
        assert values.shape == x.shape[:1], f"{target}: {name} must be [*batch], one per x."


def _check_abilities(target, x, condition):
    kernel = target.kernel()
    assert kernel is None or isinstance(kernel, Kernel), (
        f"{target}: kernel must be None or have a method move; got {kernel!r}."
    )
    if kernel is not None:
        with random_numbers():
            moved = kernel.move(target, condition, x, 1)
        law = f"{target}: a move of its kernel must return finite x of the same shape."
        assert moved.shape == x.shape, law
        assert moved.isfinite().all(), law
    modes = target.modes(x, condition)
    if modes is not None:
        count = len(modes.names)
        inside = modes.labels.shape == x.shape[:1] and not modes.labels.is_floating_point()
        inside = inside and bool(((modes.labels >= 0) & (modes.labels < count)).all())
        law = f"{target}: the labels of its modes must be numbers below {count}, one for each x."
        assert inside, law
    for name, fluctuation in target.derived(condition).items():
        law = f"{target} derives {name} from {fluctuation.of}, which it does not measure."
        assert fluctuation.of in target.units, law
    architecture = target.architecture()
    if architecture is not None:
        check_architecture(architecture, target)
        with random_numbers():
            architecture.build(target.event_shape, len(target.conditions))


def _check_sampler(target, condition, draws: int = 20_000):
    """E[d log p/dx] = 0: each mean within 5 standard errors, 2 in a million by chance."""
    each, kernel = condition.expand(draws, -1), target.kernel()
    with random_numbers(0):
        x = exact_draws(target, condition, (draws,))
        if x is None:
            return
        moved = x if kernel is None else kernel.move(target, each, x, 1)
    for rows, law in (
        (x, "the draws of sample do not follow log_prob."),
        (moved, "its kernel does not leave it invariant."),
    ):
        _, score = _score(target, rows, each)
        z = score.mean(0) / score.std(0) * draws**0.5
        assert z.abs().max() < 5, f"{target}: {law}"

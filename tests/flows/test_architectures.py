"""Every architecture builds a normalised density with exact draws, and so does its repr."""

import math
import subprocess
import sys

import pytest
import torch
from torch.distributions import Normal

from rkl.divergences import parse
from rkl.flows.architectures import (
    MAF,
    NSF,
    Coupling,
    MixedSplines,
    MultiScale,
    Scaled,
    catalogue,
    draw,
    latent,
)

MIXED = MixedSplines(transforms=2, hidden=(16,), bins=4)
SMALL = {
    "nsf": NSF(transforms=2, hidden=(16,), bins=4),
    "nsf coupled": NSF(transforms=2, hidden=(16,), bins=4, passes=2),
    "maf": MAF(transforms=2, hidden=(16,)),
    "maf coupled": MAF(transforms=2, hidden=(16,), passes=2),
    "coupling": Coupling(transforms=3, hidden=(16,)),
    "mixed, without angles": MIXED,
}
IMAGES = {
    "multi-scale": MultiScale(scales=2, couplings=6, hidden=8),
    "coupling": SMALL["coupling"],
    "nsf": SMALL["nsf"],
}
vectors = pytest.mark.parametrize("architecture", SMALL.values(), ids=SMALL)
images = pytest.mark.parametrize("architecture", IMAGES.values(), ids=IMAGES)


def flow_of(architecture, event, conditions=0, seed=0, dtype=torch.float64):
    """A flow away from its start, where it may be the identity."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        flow = architecture.build(event, conditions).to(dtype)
        for parameter in flow.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return flow.requires_grad_(False)


def law_of(flow, conditions):
    if not conditions:
        return flow()
    given = torch.tensor([[0.3, -1.0], [1.5, 0.2]], dtype=torch.float64)[:, :conditions]
    return flow(given)


def integral(law, points=401):
    """Of the density over a box that holds all of many draws, with room around them."""
    drawn, _ = draw(law, (10_000,))
    drawn = drawn.reshape(-1, 2)
    low, high = drawn.amin(0), drawn.amax(0)
    room = 0.3 * (high - low)
    axes = [
        torch.linspace(a, b, points, dtype=torch.float64)
        for a, b in zip(low - room, high + room, strict=True)
    ]
    grid = torch.cartesian_prod(*axes)
    grid = grid[:, None].expand(-1, *law.batch_shape, -1) if law.batch_shape else grid
    area = math.prod(axis[1] - axis[0] for axis in axes)
    return law.log_prob(grid).exp().sum(0) * area


@vectors
@pytest.mark.parametrize("conditions", [0, 2])
def test_a_density_integrates_to_one_for_each_condition(architecture, conditions):
    total = integral(law_of(flow_of(architecture, (2,), conditions), conditions))
    torch.testing.assert_close(total, torch.ones_like(total), atol=1e-4, rtol=0)


@vectors
@pytest.mark.parametrize("conditions", [0, 2])
def test_the_density_of_a_draw_is_that_of_evaluating_it(architecture, conditions):
    law = law_of(flow_of(architecture, (3,), conditions), conditions)
    value, log_q = draw(law, (50,))
    assert value.shape == (50, *law.batch_shape, 3)
    torch.testing.assert_close(law.log_prob(value), log_q, atol=1e-9, rtol=0)


@vectors
@pytest.mark.parametrize("conditions", [0, 2])
def test_an_expanded_law_is_the_same_for_each_of_a_batch(architecture, conditions):
    flow = Scaled(flow_of(architecture, (3,), conditions), torch.ones(3), 2 * torch.ones(3))
    law = law_of(flow, conditions)
    wide = law.expand((5, *law.batch_shape))
    assert wide.batch_shape == (5, *law.batch_shape)
    value, log_q = draw(wide, (4,))
    assert value.shape == (4, 5, *law.batch_shape, 3)
    torch.testing.assert_close(law.log_prob(value), log_q, atol=1e-9, rtol=0)


@images
@pytest.mark.parametrize("event", [(4, 8), (3, 4, 4)], ids=str)
@pytest.mark.parametrize("conditions", [0, 2])
def test_images_are_drawn_and_evaluated_alike(architecture, event, conditions):
    law = law_of(flow_of(architecture, event, conditions), conditions)
    value, log_q = draw(law, (5,))
    assert value.shape == (5, *law.batch_shape, *event)
    torch.testing.assert_close(law.log_prob(value), log_q, atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    ("architecture", "event"),
    [(Coupling(5, (16,)), (5,)), (Coupling(4, (16,)), (2, 2)), (IMAGES["multi-scale"], (2, 4, 4))],
    ids=str,
)
def test_the_jacobian_of_a_flow_of_ours_is_that_of_its_map(architecture, event):
    flow = flow_of(architecture, event)
    value = torch.randn(event, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    jacobian = torch.autograd.functional.jacobian(lambda x: flow.encode(x, None)[0], value)
    size = math.prod(event)
    expected = jacobian.reshape(size, size).slogdet().logabsdet
    latent_value, found = flow.encode(value, None)
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)
    back, log_jacobian = flow.decode(latent_value, None)
    torch.testing.assert_close(back, value, atol=1e-10, rtol=0)
    torch.testing.assert_close(log_jacobian, -found, atol=1e-9, rtol=0)
    assert (jacobian.reshape(size, size) != 0).sum() > 2 * size  # the coordinates are mixed


@vectors
def test_the_inverse_holds_in_single_precision(architecture):
    law = flow_of(architecture, (4,), dtype=torch.float32)()
    value, log_q = draw(law, (500,))
    torch.testing.assert_close(law.log_prob(value), log_q, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    "architecture", [SMALL["coupling"], SMALL["nsf coupled"], IMAGES["multi-scale"]], ids=str
)
def test_draws_depend_on_the_parameters_differentiably(architecture):
    flow = flow_of(architecture, (4, 4)).requires_grad_()
    value, log_q = flow().rsample_and_log_prob((3,))
    (value.sum() + log_q.sum()).backward()
    moved = [name for name, it in flow.named_parameters() if it.grad is None or not it.grad.any()]
    assert moved == []
    drawn, _ = draw(flow(), (3,))
    assert not drawn.requires_grad


@vectors
def test_what_is_saved_and_loaded_is_the_same_to_the_bit(architecture):
    flow = flow_of(architecture, (3,), 1, seed=0, dtype=torch.float32)
    again = flow_of(parse(repr(architecture), catalogue()), (3,), 1, seed=1, dtype=torch.float32)
    again.load_state_dict(flow.state_dict())
    given, value = torch.tensor([[0.5]]), torch.randn(20, 1, 3)
    assert torch.equal(again(given).log_prob(value), flow(given).log_prob(value))


def test_every_architecture_is_in_the_catalogue_and_small_here():
    own = {name for name, cls in catalogue().items() if "architectures" in cls.__module__}
    assert {type(it) for it in [*SMALL.values(), *IMAGES.values()]} >= {
        catalogue()[name] for name in own if catalogue()[name].domain != "circle"
    }


def test_importing_zuko_leaves_the_validation_of_distributions_on():
    code = (
        "from torch.distributions import Distribution as D; from rkl.flows import NSF\n"
        "NSF().build((2,))\n"
        "import sys; print('zuko' in sys.modules, D._validate_args)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["True", "True"], done.stderr


@pytest.mark.parametrize("architecture", [it for it in SMALL.values() if it != MIXED], ids=repr)
def test_cooled_latents_have_the_density_of_their_draws(architecture):
    law = latent(flow_of(architecture, (2,))(), temperature=0.7, bound=1.5)
    value, log_q = draw(law, (100,))
    torch.testing.assert_close(law.log_prob(value), log_q, atol=1e-9, rtol=0)
    total = integral(law)
    # The edge of the cut is a jump, which a grid of step h meets with an error of order h.
    torch.testing.assert_close(total, torch.ones_like(total), atol=0.02, rtol=0)


def test_latents_that_are_angles_are_not_cooled():
    with pytest.raises(TypeError, match="with normal latents returns; got a MixedLaw"):
        latent(MIXED.build((2,))(), temperature=0.7)


def test_latents_cut_off_are_a_truncated_normal_law():
    base = latent(Coupling(2, (4,)).build((2,)).double()(), temperature=2.0, bound=1.0).base
    torch.manual_seed(0)
    value = base.sample((20_000,))
    assert value.abs().max() <= 2.0
    normal = Normal(0.0, 1.0)
    inside = (2 * normal.cdf(torch.tensor(1.0)) - 1).item()
    variance = 4 * (1 - 2 * math.exp(normal.log_prob(torch.tensor(1.0)).item()) / inside)
    assert value.var().item() == pytest.approx(variance, rel=0.03)  # 40,000 draws: error 0.5 %
    assert base.log_prob(torch.tensor([2.1, 0.0], dtype=torch.float64)) == -math.inf


@pytest.mark.slow
def test_a_compiled_coupling_is_the_same_flow():
    plain = flow_of(Coupling(4, (16,)), (6,), dtype=torch.float32)
    compiled = flow_of(Coupling(4, (16,), compiled=True), (6,), dtype=torch.float32)
    compiled.load_state_dict(plain.state_dict())
    value = torch.randn(64, 6)
    torch.testing.assert_close(compiled().log_prob(value), plain().log_prob(value))
    drawn, log_q = compiled().rsample_and_log_prob((64,))
    torch.testing.assert_close(plain().log_prob(drawn), log_q, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Coupling().build((1,)), "two coordinates"),
        (lambda: MultiScale(scales=2).build((1, 6, 8)), "divisible by 4"),
        (lambda: MultiScale().build((16,)), "height, width"),
        (lambda: NSF(bins=0), "bins must be at least 1"),
        (lambda: Coupling().build((2,))(torch.zeros(3, 1)), "condition must be"),
        (lambda: Coupling().build((2,), 2)(), "condition must be"),
        (lambda: latent(Coupling().build((2,))(), temperature=0.0), "temperature must be"),
        (lambda: latent(Coupling().build((2,))(), bound=0.0), "bound must be"),
    ],
    ids=lambda it: it if isinstance(it, str) else "",
)
def test_what_cannot_be_built_is_refused_with_the_reason(make, said):
    with pytest.raises(ValueError, match=said):
        make()


@pytest.mark.parametrize("hidden", [64, [64], (0.5,)], ids=str)
def test_widths_that_are_no_tuple_of_integers_are_refused(hidden):
    with pytest.raises(TypeError, match="hidden must be"):
        Coupling(hidden=hidden)


def test_a_law_that_no_flow_made_has_no_latents():
    with pytest.raises(TypeError, match="what a flow with normal latents returns"):
        latent(Normal(0.0, 1.0))

import math

import pytest
import torch
from catalogued import F
from torch.distributions import (
    Bernoulli,
    Categorical,
    Gamma,
    Independent,
    Normal,
    Poisson,
    StudentT,
    Uniform,
)

import rkl
from rkl.bayes.loss.between import Intrinsic, between, orders
from rkl.bayes.loss.expected import DirectLoss, NodeLoss, needs_sample, posterior_loss, slopes
from rkl.bayes.loss.nodes import nodes_for
from rkl.bayes.loss.quadrature import has_kinks
from rkl.bayes.model import laws_of

every_loss = pytest.mark.parametrize("divergence", [*F, Intrinsic()], ids=repr)


def normals(count=30, seed=0):
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(2, count, generator=g, dtype=torch.float64)
    weights = torch.rand(count, generator=g, dtype=torch.float64)
    theta = {"loc": z[0] / 3, "scale": (z[1] / 40).exp()}
    return laws_of(theta, lambda t: Normal(t["loc"], t["scale"]), weights)


def at(loss, point):
    """The law of a leaf (loc, log scale), and the leaf."""
    leaf = torch.tensor(point, dtype=torch.float64, requires_grad=True)
    return loss.laws.of({"loc": leaf[:1], "scale": leaf[1:].exp()}), leaf


@pytest.fixture(scope="module")
def nodes():
    return nodes_for(normals(), rkl.Jeffreys())


@every_loss
def test_the_expected_loss_is_the_weighted_mean_of_every_draw_s(divergence, nodes):
    loss = posterior_loss(normals(), divergence, nodes=nodes)
    law, leaf = at(loss, [0.2, 0.03])
    losses, by_draw = loss.by_draw(law, leaf)
    expected = loss.risk(law)
    (slope,) = torch.autograd.grad(expected, leaf)
    torch.testing.assert_close(expected.detach(), loss.laws.weights @ losses, rtol=1e-12, atol=0)
    torch.testing.assert_close(slope, loss.laws.weights @ by_draw, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(loss.by_member(law), losses)
    assert (losses >= 0).all()


@pytest.mark.parametrize("divergence", [d for d in F if not has_kinks(d)], ids=repr)
def test_its_second_derivatives_are_those_of_differences(divergence, nodes):
    loss = posterior_loss(normals(), divergence, nodes=nodes)

    def slope(point, create_graph=False):
        law, leaf = at(loss, point)
        return torch.autograd.grad(loss.risk(law), leaf, create_graph=create_graph)[0], leaf

    first, leaf = slope([0.2, 0.03], create_graph=True)
    rows = [torch.autograd.grad(x, leaf, retain_graph=True)[0] for x in first]
    step = 1e-5
    columns = [
        (slope([0.2 + a, 0.03 + b])[0] - slope([0.2 - a, 0.03 - b])[0]) / (2 * step)
        for a, b in ((step, 0.0), (0.0, step))
    ]
    # The halves of KL have a jump in their second derivative at each node and draw.
    rough = isinstance(divergence, rkl.divergences.PrecisionHalf | rkl.divergences.RecallHalf)
    torch.testing.assert_close(
        torch.stack(rows), torch.stack(columns, -1), rtol=0.02 if rough else 1e-7, atol=1e-8
    )


def test_what_the_nodes_add_sums_to_the_whole(nodes):
    loss = posterior_loss(normals(), rkl.JensenShannon(), nodes=nodes)
    assert isinstance(loss, NodeLoss)
    law, leaf = at(loss, [0.2, 0.03])
    values, by_node = loss.by_node(law, leaf)
    losses, by_draw = loss.by_draw(law, leaf)
    torch.testing.assert_close(values.sum(), loss.laws.weights @ losses)
    torch.testing.assert_close(by_node.sum(0), loss.laws.weights @ by_draw)


@pytest.mark.parametrize("divergence", [rkl.KL(), rkl.ReverseKL(), Intrinsic()], ids=repr)
def test_nodes_and_closed_forms_agree(divergence, nodes):
    closed = posterior_loss(normals(), divergence)
    on_nodes = posterior_loss(normals(), divergence, nodes=nodes)
    assert isinstance(closed, DirectLoss)
    assert isinstance(on_nodes, NodeLoss)
    law, leaf = at(closed, [0.2, 0.03])
    for mine, other in zip(closed.by_draw(law, leaf), on_nodes.by_draw(law, leaf), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12)


def test_the_losses_of_a_batch_are_added_up_and_those_of_independent_parts_are_joint():
    g = torch.Generator().manual_seed(0)
    loc = torch.randn(20, 3, generator=g, dtype=torch.float64) / 2
    batch = laws_of({"loc": loc}, lambda t: StudentT(4.0, t["loc"]))
    joint = laws_of({"loc": loc}, lambda t: Independent(StudentT(4.0, t["loc"]), 1))
    zero = {"loc": torch.zeros(1, 3).double()}
    added, whole = (posterior_loss(x, rkl.KL()) for x in (batch, joint))
    by_member = added.by_member(added.laws.of(zero))
    assert by_member.shape == (20, 3)
    torch.testing.assert_close(by_member.sum(-1), added.by_draw(added.laws.of(zero))[0])
    # Of both KLs the chain rule makes sums.
    torch.testing.assert_close(by_member.sum(-1), whole.by_draw(whole.laws.of(zero))[0])
    hellinger = posterior_loss(joint, rkl.SquaredHellinger(), size=2000)
    assert hellinger.nodes.kind == "importance"
    alone = posterior_loss(batch, rkl.SquaredHellinger())
    affinities = 1 - alone.by_member(alone.laws.of(zero))
    exact = 1 - affinities.prod(-1)
    found = hellinger.by_draw(hellinger.laws.of(zero))[0]
    torch.testing.assert_close(found, exact, rtol=0.3, atol=0.02)


def test_the_intrinsic_loss_is_the_smaller_divergence_and_finite_between_uniform_laws():
    narrow, wide = Uniform(0.0, 1.0), Uniform(0.0, 3.0)
    for p, q in ((narrow, wide), (wide, narrow)):
        assert Intrinsic().between(p, q).item() == pytest.approx(math.log(3))
    p, q = Normal(0.0, 1.0), Normal(0.0, 2.0)
    smaller = min(rkl.KL().between(p, q), rkl.ReverseKL().between(p, q))
    assert Intrinsic().between(p, q) == smaller
    with pytest.raises(NotImplementedError, match="no closed form between StudentT"):
        Intrinsic().between(StudentT(3.0), StudentT(4.0))


def test_closed_forms_come_from_torch_or_from_an_exponential_family_or_not_at_all():
    gamma = Gamma(torch.tensor([2.0]).double(), 1.0), Gamma(torch.tensor([3.0]).double(), 1.0)
    hellinger = between(rkl.SquaredHellinger(), *gamma)
    affinity = math.exp(math.lgamma(2.5) - (math.lgamma(2) + math.lgamma(3)) / 2)
    assert hellinger.item() == pytest.approx(1 - affinity, rel=1e-12)
    assert between(rkl.JensenShannon(), *gamma) is None
    student = StudentT(torch.tensor([3.0]).double())
    assert between(rkl.KL(), student, student) is None


def test_a_sum_of_amari_divergences_knows_its_orders():
    known = 0.5 * rkl.SquaredHellinger() + 2.0 * rkl.Jeffreys() + rkl.Amari(3.0)
    assert orders(known) == [(0.125, 0.5), (2.0, 1.0), (2.0, 0.0), (1.0, 3.0)]
    assert orders(known + rkl.TotalVariation()) is None
    assert orders(rkl.AKL()) is None
    assert orders(Intrinsic()) is None


def test_only_total_variation_and_its_kin_have_kinks():
    assert {type(d).__name__ for d in F if has_kinks(d)} == {"TotalVariation", "PrecisionRecall"}
    assert has_kinks(rkl.KL() + 0.01 * rkl.TotalVariation())


def test_slopes_of_many_outputs_are_their_jacobian():
    leaf = torch.tensor([0.3, 0.7]).double().requires_grad_()
    outputs = torch.stack([leaf[0] * leaf[1], leaf[0].exp(), leaf[1].square()])
    expected = torch.tensor([[0.7, 0.3], [math.exp(0.3), 0.0], [0.0, 1.4]]).double()
    torch.testing.assert_close(slopes(outputs, leaf), expected)
    assert slopes(outputs.detach(), None).shape == (3, 0)


def test_a_loss_that_is_none_of_ratios_is_the_divergence_itself_on_a_finite_support():
    g = torch.Generator().manual_seed(0)
    p = torch.randn(10, 4, generator=g, dtype=torch.float64).softmax(-1)
    loss = posterior_loss(laws_of({"p": p}, lambda t: Categorical(t["p"])), rkl.AKL())
    q = torch.full((1, 4), 0.25).double()
    found = loss.by_draw(loss.laws.of({"p": q}))[0]
    torch.testing.assert_close(found, rkl.AKL()(p.log(), q.log().expand(10, 4)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("law", [lambda t: Normal(t["a"], 1.0), lambda t: Poisson(t["a"].exp())])
def test_elsewhere_it_is_refused_with_the_reason(law):
    laws = laws_of({"a": torch.zeros(5).double()}, law)
    with pytest.raises(ValueError, match=r"AKL.* is no f-divergence.* is not finite"):
        posterior_loss(laws, rkl.AKL())
    with pytest.raises(TypeError, match="divergence must be one, such as"):
        posterior_loss(laws, "kl")


@pytest.mark.parametrize(
    "divergence", [rkl.SquaredHellinger(), rkl.Amari(0.3), rkl.PearsonChiSquare() + 2 * rkl.KL()]
)
def test_the_divergence_of_independent_parts_is_closed_and_that_of_the_sums_of_atoms(divergence):
    p, q = torch.tensor([[0.2, 0.5, 0.7]]).double(), torch.tensor([[0.3, 0.4, 0.9]]).double()
    found = between(divergence, *(Independent(Bernoulli(x), 1) for x in (p, q)))
    atoms = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3).double()
    logs = [Bernoulli(x).log_prob(atoms).sum(-1) for x in (p, q)]
    torch.testing.assert_close(found, divergence.excess(*logs).sum(-1, keepdim=True))


def test_only_joint_laws_without_a_closed_form_take_a_sample():
    theta = {"loc": torch.linspace(0, 1, 8).double()[:, None].expand(8, 3)}
    joint = laws_of(theta, lambda t: Independent(Normal(t["loc"], 1.0), 1))
    line = laws_of(theta, lambda t: Normal(t["loc"], 1.0))
    assert needs_sample(joint, rkl.JensenShannon())
    assert not needs_sample(line, rkl.JensenShannon())
    assert not needs_sample(joint, rkl.Jeffreys())
    assert not needs_sample(joint, rkl.SquaredHellinger())

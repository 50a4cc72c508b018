"""What looks at whole distributions: tensors that vary, statistics with a gradient, labels."""

import dataclasses
import functools
import math
from dataclasses import dataclass

import jaxtyping
import pytest
import torch
from catalogued import pair

import rkl
from rkl import LinearHead, TopK, exact, per_token
from rkl.kernels import chunk_step
from rkl.testing import check_divergence


def kl(p, q):
    return (p * (p / q).log()).sum(-1)


def alpha_mixture(p, q, alpha, lam):
    """As in the docstring of AMiD, in probabilities."""
    if alpha == 1:
        a = p**lam * q ** (1 - lam)
    else:
        k = (1 - alpha) / 2
        a = (lam * p**k + (1 - lam) * q**k) ** (1 / k)
    return a / a.sum(-1, keepdim=True)


def taid(p, q, t):
    r = p**t * q.detach() ** (1 - t)
    return kl(r / r.sum(-1, keepdim=True), q)


def lk_hybrid(p, q, eta):
    tv = (p - q).abs().sum(-1) / 2
    lam = (-eta * torch.minimum(p, q).sum(-1)).exp().detach()
    return lam * kl(p, q) + (1 - lam) * tv


def entropy_aware(p, q, tau):
    return kl(q, p) + (-(p * p.log()).sum(-1) > tau) * kl(p, q)


NAIVE = {
    rkl.TAID(0.2): lambda p, q: taid(p, q, 0.2),
    rkl.TAID(1.0): lambda p, q: taid(p, q, 1.0),
    rkl.LKHybrid(): lambda p, q: lk_hybrid(p, q, 3.0),
    rkl.NegLogAcceptance(): lambda p, q: -torch.minimum(p, q).sum(-1).log(),
    rkl.EntropyAwareReverseKL(1.0): lambda p, q: entropy_aware(p, q, 1.0),
} | {
    rkl.AMiD(alpha, 0.3): lambda p, q, alpha=alpha: kl(p, alpha_mixture(p, q, alpha, 0.3))
    for alpha in (-3.0, -1.0, 0.0, 0.5, 1.0, 3.0)
}


@pytest.mark.parametrize("divergence", NAIVE, ids=repr)
def test_value_and_gradient_are_those_of_the_formula_in_probabilities(divergence):
    a, b = pair(40, 9, scale=2.0)
    b = b.clone().requires_grad_()
    expected = NAIVE[divergence](a.softmax(-1), b.softmax(-1))
    (slope,) = torch.autograd.grad(expected.sum(), b)
    value, gradient = chunk_step(divergence, a, b.detach(), torch.ones(40, dtype=a.dtype))
    torch.testing.assert_close(value, expected.detach(), rtol=1e-10, atol=1e-13)
    # near agreement the excess is summed up to the fifth power of a log-ratio below 0.02
    torch.testing.assert_close(gradient, slope, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("alpha", [-3.0, 0.5, 1.0])
def test_the_normaliser_of_amid_has_a_share_in_the_gradient(alpha):
    a, b = pair(40, 9, scale=2.0)
    b = b.clone().requires_grad_()
    divergence = rkl.AMiD(alpha, 0.3)
    gradient = chunk_step(divergence, a, b.detach(), torch.ones(40, dtype=a.dtype))[1]
    p, q = a.softmax(-1), b.softmax(-1)
    k = (1 - alpha) / 2
    mixed = (0.3 * p**k + 0.7 * q**k) ** (1 / k) if k else p**0.3 * q**0.7
    frozen = kl(p, mixed / mixed.sum(-1, keepdim=True).detach())
    (wrong,) = torch.autograd.grad(frozen.sum(), b)
    assert (gradient - wrong).norm() > 0.1 * gradient.norm()


@pytest.mark.parametrize("divergence", NAIVE, ids=repr)
def test_bfloat16_heads_give_the_value_of_double_precision(divergence):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randn(33, 8, generator=generator),
        torch.randn(60, 8, generator=generator),
    )
    teacher = torch.randn(33, 60, generator=generator)
    student = [x.to(torch.bfloat16).requires_grad_() for x in (hidden, weight)]
    value = exact(divergence, p=teacher, q=LinearHead(*student))
    value.backward()
    double = [x.detach().double().requires_grad_() for x in student]
    expected = exact(divergence, p=teacher.double(), q=LinearHead(*double))
    expected.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    for x, y in zip(student, double, strict=True):
        # gradients are stored with 8 bits
        assert (x.grad.double() - y.grad).norm() < 1.6e-2 * y.grad.norm()


@pytest.mark.parametrize("scale", [50.0, 300.0])
def test_a_small_acceptance_keeps_its_digits_in_single_precision(scale):
    a, b = pair(20, 9, scale=scale)
    b = b.clone().requires_grad_()
    value, gradient = chunk_step(
        rkl.NegLogAcceptance(), a.float(), b.detach().float(), torch.ones(20)
    )
    truth = -torch.minimum(a.log_softmax(-1), b.log_softmax(-1)).logsumexp(-1)
    (slope,) = torch.autograd.grad(truth.sum(), b)
    torch.testing.assert_close(value.double(), truth.detach(), rtol=1e-5, atol=1e-5)
    # logarithms of 1,000 are rounded by 6e-5
    torch.testing.assert_close(gradient.double(), slope, rtol=1e-3, atol=1e-4)
    pulls = (truth > 20) & (slope.abs().sum(-1) > 1)
    assert pulls.sum() > 5  # where the pull of total variation is below 1e-8


# A new value of a varying field neither recompiles nor changes what the eager step computes.


def with_value(divergence, share):
    return dataclasses.replace(divergence, **dict.fromkeys(divergence.varying, share))


VARYING = [cls() for cls in rkl.catalogue().values() if cls.varying]


def test_what_varies_is_said_by_the_class():
    assert {type(it).__name__: it.varying for it in VARYING} == {
        "AKL": ("mu",),
        "AMiD": ("lam",),
        "EntropyAwareReverseKL": ("tau",),
        "LKHybrid": ("eta",),
        "TAID": ("t",),
    }


@pytest.mark.slow
@pytest.mark.parametrize("divergence", VARYING, ids=repr)
def test_a_new_value_of_what_varies_compiles_nothing(divergence, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # it cannot be traced
    torch._dynamo.utils.counters.clear()
    a, b = torch.randn(2, 21, 300, generator=torch.Generator().manual_seed(0))
    for share in (0.2, 0.3, 0.9):
        changed = 0.5 * with_value(divergence, share) + rkl.KL()
        eager, compiled = (exact(changed, p=a, q=b, compiled=it) for it in (False, True))
        torch.testing.assert_close(compiled, eager)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("divergence", VARYING, ids=repr)
def test_all_values_of_what_varies_share_one_compiled_function(divergence, monkeypatch):
    from rkl import kernels

    seen = []

    def eager(function, step):
        seen.append(step)
        return functools.partial(function, step)

    monkeypatch.setattr(kernels, "_compiled", eager)
    a, b = 5 * torch.randn(2, 21, 300, generator=torch.Generator().manual_seed(0))
    values = {}
    for share in (0.2, 0.9):
        changed = 0.5 * with_value(divergence, share) + rkl.KL()
        values[share] = exact(changed, p=a, q=b, compiled=True)
        assert torch.equal(values[share], exact(changed, p=a, q=b, compiled=False))
    assert len({*seen}) == 1
    assert values[0.2] != values[0.9]


# Divergences of one's own that use each extension; the package knows none of them.


@dataclass(frozen=True)
class _Renyi(rkl.Divergence):
    """A function of a sum over atoms: log Σ p^α q^(1−α) / (α − 1)."""

    alpha: float = 0.5

    def integrand(self, logp, logq):
        return rkl.Amari(self.alpha).excess(logp, logq)

    def outer(self, total):
        return (self.alpha * (self.alpha - 1) * total).log1p() / (self.alpha - 1)


@dataclass(frozen=True)
class _DKD(rkl.Divergence):
    """Decoupled distillation: KL between hit and miss, and β KL between the misses.

    The second is KL(p ‖ q) less the first, over the mass that p leaves to the misses.
    """

    takes_labels = True
    varying = ("beta",)
    beta: float = 2.0

    def held(self, logp, logq, beta, labels):
        hit = torch.arange(logp.shape[-1]) == labels[:, None]
        logp_hit = logp.gather(-1, labels[:, None])
        return beta, hit, logp_hit, logp.masked_fill(hit, -math.inf).logsumexp(-1, keepdim=True)

    def statistics(self, logp, logq, beta, hit, logp_hit, logp_miss):
        logq_hit = logq.masked_fill(~hit, -math.inf).logsumexp(-1, keepdim=True)
        return logq_hit, logq.masked_fill(hit, -math.inf).logsumexp(-1, keepdim=True)

    def integrand(self, logp, logq, beta, hit, logp_hit, logp_miss, logq_hit, logq_miss):
        nowhere = (logp == -math.inf) & (logq == -math.inf)
        p, q = logp.masked_fill(nowhere, 0.0), logq.masked_fill(nowhere, 0.0)
        miss = rkl.KL().excess(p - logp_miss, q - logq_miss).masked_fill(hit | nowhere, 0.0)
        coarse = rkl.KL().excess(logp_hit, logq_hit) + rkl.KL().excess(logp_miss, logq_miss)
        return beta * miss + hit * coarse


def dkd(p, q, labels, beta):
    """Zhao et al. (2022), arXiv 2203.08679, eq. (7), with α = 1, row by row."""
    rows = []
    for row_p, row_q, label in zip(p, q, labels.tolist(), strict=True):
        others = [v for v in range(len(row_p)) if v != label]
        p_hit, q_hit = row_p[label], row_q[label]
        target = p_hit * (p_hit / q_hit).log() + (1 - p_hit) * ((1 - p_hit) / (1 - q_hit)).log()
        rows.append(target + beta * kl(row_p[others] / (1 - p_hit), row_q[others] / (1 - q_hit)))
    return torch.stack(rows)


@pytest.mark.parametrize("divergence", [_Renyi(), _Renyi(3.0), _DKD(), _DKD(0.5)], ids=repr)
def test_a_divergence_of_ones_own_may_use_every_extension(divergence):
    check_divergence(divergence)
    check_divergence(0.5 * divergence + rkl.TAID())


def test_an_outer_function_of_the_sum_is_differentiated():
    a, b = pair(40, 9)
    b = b.clone().requires_grad_()
    expected = (a.softmax(-1) ** 3 * b.softmax(-1) ** -2).sum(-1).log() / 2
    (slope,) = torch.autograd.grad(expected.sum(), b)
    value, gradient = chunk_step(_Renyi(3.0), a, b.detach(), torch.ones(40, dtype=a.dtype))
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(gradient, slope)


def head(seed, tokens=21, width=5, vocab=12):
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(n, width, generator=generator).double() for n in (tokens, vocab)]
    return LinearHead(*(x.requires_grad_() for x in tensors))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("hard", [0.0, 0.4])
def test_labels_reach_the_coefficients_on_every_path(hard, compiled):
    teacher, student = head(0), head(1)
    labels = torch.randint(12, (21,), generator=torch.Generator().manual_seed(2))
    a, b = (x.hidden @ x.weight.T for x in (teacher, student))
    plain = dkd(a.softmax(-1), b.softmax(-1), labels, 2.0)
    entropy = torch.nn.functional.cross_entropy(b, labels)
    expected = torch.autograd.grad(plain.mean() + hard * entropy, student[:2])
    settings = {"p": teacher, "q": student, "labels": labels, "chunk": 8}
    value = exact(_DKD(), hard_label_weight=hard, compiled=compiled, **settings)
    torch.testing.assert_close(value, plain.mean() + hard * entropy)
    for one, other in zip(torch.autograd.grad(value, student[:2]), expected, strict=True):
        torch.testing.assert_close(one, other)
    each = per_token({"dkd": _DKD(), "kl": rkl.KL()}, **settings)
    torch.testing.assert_close(each["dkd"], plain.detach())
    combined = exact(0.5 * _DKD() + rkl.KL(), compiled=compiled, **settings)
    torch.testing.assert_close(combined, 0.5 * plain.mean() + each["kl"].mean())


def test_labels_that_are_missing_or_beyond_a_top_k_are_refused():
    a, b = torch.randn(2, 3, 9).double()
    for call in (
        lambda: exact(_DKD(), p=a, q=b),
        lambda: per_token({"dkd": _DKD()}, p=a, q=b),
        lambda: _DKD()(a.log_softmax(-1), b.log_softmax(-1)),
    ):
        with pytest.raises(ValueError, match="labels must be given: .*DKD.* got None"):
            call()
    top = TopK(*a.log_softmax(-1).topk(9))
    with pytest.raises(ValueError, match=r"p must be the whole .* true token.* got a TopK"):
        exact(_DKD(), p=top, q=b, labels=torch.zeros(3, dtype=torch.long))


@dataclass(frozen=True)
class _ReadsTheField(rkl.Divergence):
    varying = ("t",)
    t: float = 0.5

    def held(self, logp, logq, t):
        return ()

    def integrand(self, logp, logq):
        return self.t * rkl.KL().excess(logp, logq)


class _WrongShape(rkl.Divergence):
    def statistics(self, logp, logq):
        return (logq.exp().sum(-1),)

    def integrand(self, logp, logq, total):
        return rkl.KL().excess(logp, logq)


class _OuterOfAnF(rkl.FDivergence):
    def integrand(self, logp, logq):
        return rkl.KL().integrand(logp, logq)

    def outer(self, total):
        return total.sqrt()


class _DetachedStatistic(rkl.AMiD):
    """The gradient is that of another value: the normaliser is taken for a constant."""

    def statistics(self, logp, logq, *held):
        return super().statistics(logp, logq.detach(), *held)


class _SharesOfAnother(rkl.Divergence):
    def integrand(self, logp, logq):
        return rkl.KL().excess(logp, logq)

    def by_atom(self, logp, logq):
        return 2 * rkl.KL().excess(logp, logq)


class _CountsTheLabel(rkl.Divergence):
    """Depends on the number of the true token, not only on which atom it is."""

    takes_labels = True

    def held(self, logp, logq, labels):
        return (1.0 + labels[:, None],)

    def integrand(self, logp, logq, number):
        return number * rkl.KL().excess(logp, logq)


@pytest.mark.parametrize(
    ("toy", "law"),
    [
        (_ReadsTheField, "held must read t from its tensor"),
        (_WrongShape, "a coefficient must be"),
        (_OuterOfAnF, "not a function of it"),
        (_DetachedStatistic, "the gradient is not that of the value"),
        (_SharesOfAnother, "shares of the atoms are not the whole"),
        (_CountsTheLabel, "depends on the order of atoms"),
    ],
)
def test_a_wrong_use_of_an_extension_is_refused(toy, law):
    with pytest.raises(AssertionError, match=law):
        check_divergence(toy())


def test_the_shares_of_atoms_add_up_where_nothing_is_shared():
    logp = torch.tensor([[0.0, -math.inf]])
    shares = rkl.NegLogAcceptance().by_atom(logp, logp.flip(-1))
    assert shares.tolist() == [[math.inf, math.inf]]
    assert rkl.NegLogAcceptance().by_atom(logp, logp).tolist() == [[0.0, 0.0]]


def test_templates_are_the_defaults_of_what_varies_alone():
    assert rkl.AKL(mu=0.3, straddle="head").template() == rkl.AKL(straddle="head")
    assert (0.5 * rkl.TAID(0.3) + rkl.AMiD(1.0, 0.3)).template() == (
        0.5 * rkl.TAID() + rkl.AMiD(1.0)
    )
    assert rkl.KL().template() == rkl.KL()

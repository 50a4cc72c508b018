"""Parity with the losses that others train with, written out here in float64.

Each reference takes (student logits, teacher logits), the order of the code it comes from,
and returns one value per token. Ours is always D(p ‖ q) with the teacher as p. Where a
convention differs, the table below says how: it is the map for whoever comes from there.

====================================  ==================================================
theirs                                ours
====================================  ==================================================
TRL, Liger: beta = 0                  KL(): forward
TRL, Liger: beta = 1                  ReverseKL()
TRL, Liger: 0 < beta < 1              JensenShannon(beta): beta weighs the teacher in both
DistiLLM: skewed_forward_kl(lam)      SkewKL(alpha=lam), less the teacher's entropy
DistiLLM: skewed_reverse_kl(lam)      SkewReverseKL(alpha=lam)
DistiLLM: js_distance(lam)            JensenShannon(beta=1 - lam): lam weighs the student
DistiLLM: symmetric_kl(lam)           (1 - lam) * KL() + lam * ReverseKL()
ABKD: ab_div(alpha, beta)             AlphaBeta(alpha, beta)
AKL.py: mu                            AKL(mu): the atom that straddles mu is tail
temperature                           LinearHead(temperature=...), no factor of its square
labels of -100                        weights of 0
====================================  ==================================================
"""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax, nll_loss, softmax

import rkl
from rkl.divergences import AlphaBeta, SkewKL, SkewReverseKL, TotalVariation

TOKENS, VOCAB = 7, 60


def generalised_jsd(student, teacher, beta):
    """TRL's GKD and GOLD, and Liger's chunked loss: the mixture in log space."""
    student, teacher = log_softmax(student, -1), log_softmax(teacher, -1)
    if beta in (0, 1):
        model, target = (student, teacher) if beta == 0 else (teacher, student)
        return kl_div(model, target, reduction="none", log_target=True).sum(-1)
    parts = torch.stack([student + math.log1p(-beta), teacher + math.log(beta)])
    mixture = parts.logsumexp(0)
    of_teacher = kl_div(mixture, teacher, reduction="none", log_target=True)
    of_student = kl_div(mixture, student, reduction="none", log_target=True)
    return (beta * of_teacher + (1 - beta) * of_student).sum(-1)


def jsd_of_probabilities(student, teacher, beta):
    """TRL's server distillation: the mixture as a mean of probabilities."""
    logq, logp = log_softmax(student, -1), log_softmax(teacher, -1)
    logm = ((1 - beta) * logq.exp() + beta * logp.exp()).log()
    to_teacher, to_student = logp.exp() * (logp - logm), logq.exp() * (logq - logm)
    return (beta * to_teacher + (1 - beta) * to_student).sum(-1)


def kl_by_normalisers(student, teacher):
    """TRL's chunked kernel: forward KL as a mean gap less a difference of normalisers."""
    gap = (softmax(teacher, -1) * (teacher - student)).sum(-1)
    return gap - teacher.logsumexp(-1) + student.logsumexp(-1)


def reverse_kl_by_normalisers(student, teacher):
    """TRL's chunked kernel, reverse."""
    return kl_by_normalisers(teacher, student)


def skewed_forward_kl(student, teacher, lam):
    """DistiLLM: a cross-entropy to the mixture; it drops the teacher's entropy."""
    p, q = softmax(teacher, -1), softmax(student, -1)
    return -(p * (lam * p + (1 - lam) * q).log()).sum(-1)


def skewed_reverse_kl(student, teacher, lam):
    """DistiLLM: KL of the student to the mixture, the student's entropy kept."""
    p, q = softmax(teacher, -1), softmax(student, -1)
    mixture = (1 - lam) * p + lam * q
    return -(q * mixture.log() - q * log_softmax(student, -1)).sum(-1)


def js_distance(student, teacher, lam):
    """DistiLLM: its lam weighs the student, where TRL's beta weighs the teacher."""
    p, q = softmax(teacher, -1), softmax(student, -1)
    mixture = ((1 - lam) * p + lam * q).log()
    of_student = (q * (log_softmax(student, -1) - mixture)).sum(-1)
    of_teacher = (p * (log_softmax(teacher, -1) - mixture)).sum(-1)
    return lam * of_student + (1 - lam) * of_teacher


def symmetric_kl(student, teacher, lam):
    """DistiLLM: its lam weighs the reverse divergence."""
    forward, reverse = (generalised_jsd(student, teacher, beta) for beta in (0, 1))
    return (1 - lam) * forward + lam * reverse


def tv_distance(student, teacher):
    """DistiLLM."""
    return 0.5 * (softmax(teacher, -1) - softmax(student, -1)).abs().sum(-1)


def ab_div(student, teacher, alpha, beta):
    """ABKD, where neither exponent nor their sum is 0."""
    p, q = softmax(teacher, -1), softmax(student, -1)
    both = alpha + beta
    rest = alpha / both * p**both + beta / both * q**both
    return -(p**alpha * q**beta - rest).sum(-1) / (alpha * beta)


def akl_by_sorting(student, teacher, mu):
    """AKL.py, arXiv 2404.02657: the vocabulary sorted, the gaps of head and tail."""
    p, q = softmax(teacher, -1), softmax(student, -1).detach()
    ranked, order = p.sort(dim=-1, descending=True)
    errors = (ranked - q.gather(-1, order)).abs()
    tail = ranked.cumsum(-1) > mu
    tail[..., 0] = False
    head_gap = errors.masked_fill(tail, 0.0).sum(-1)
    tail_gap = errors.masked_fill(~tail, 0.0).sum(-1)
    forward, reverse = (generalised_jsd(student, teacher, beta) for beta in (0, 1))
    return (head_gap * forward + tail_gap * reverse) / (head_gap + tail_gap)


def token_wise_kl(student, teacher):
    """ToDi, arXiv 2505.16297: each atom's own mix of the two KLs, the mix held."""
    logp, logq = log_softmax(teacher, -1), log_softmax(student, -1)
    mix = (logp - logq).sigmoid().detach()
    forward, reverse = logp.exp() * (logp - logq), logq.exp() * (logq - logp)
    return (mix * forward + (1 - mix) * reverse).sum(-1)


def with_parameters(reference, **parameters):
    return lambda student, teacher: reference(student, teacher, **parameters)


PAIRS = {
    "TRL and Liger, beta = 0": (with_parameters(generalised_jsd, beta=0), rkl.KL()),
    "TRL and Liger, beta = 1": (with_parameters(generalised_jsd, beta=1), rkl.ReverseKL()),
    **{
        f"{name}, beta = {beta}": (with_parameters(reference, beta=beta), rkl.JensenShannon(beta))
        for name, reference in (
            ("TRL and Liger", generalised_jsd),
            ("TRL's server distillation", jsd_of_probabilities),
        )
        for beta in (0.5, 0.1, 0.9)
    },
    "TRL's chunked kernel, forward": (kl_by_normalisers, rkl.KL()),
    "TRL's chunked kernel, reverse": (reverse_kl_by_normalisers, rkl.ReverseKL()),
    "DistiLLM, skewed reverse": (with_parameters(skewed_reverse_kl, lam=0.1), SkewReverseKL(0.1)),
    "DistiLLM, skewed reverse, 0.7": (
        with_parameters(skewed_reverse_kl, lam=0.7),
        SkewReverseKL(0.7),
    ),
    "DistiLLM, JS": (with_parameters(js_distance, lam=0.9), rkl.JensenShannon(1 - 0.9)),
    "DistiLLM, symmetric": (
        with_parameters(symmetric_kl, lam=0.9),
        (1 - 0.9) * rkl.KL() + 0.9 * rkl.ReverseKL(),
    ),
    "DistiLLM, total variation": (tv_distance, TotalVariation()),
    "ABKD": (with_parameters(ab_div, alpha=0.2, beta=0.7), AlphaBeta(0.2, 0.7)),
    "ABKD, both above 1": (with_parameters(ab_div, alpha=1.2, beta=1.5), AlphaBeta(1.2, 1.5)),
    "AKL, mu = 0.5": (with_parameters(akl_by_sorting, mu=0.5), rkl.AKL(0.5)),
    "AKL, mu = 0": (with_parameters(akl_by_sorting, mu=0.0), rkl.AKL(0.0)),
    "AKL, mu = 0.95": (with_parameters(akl_by_sorting, mu=0.95), rkl.AKL(0.95)),
    "ToDi": (token_wise_kl, rkl.ToDi()),
}
PAIRS_WITH_GRADIENT = PAIRS | {
    # What it drops from the value is constant in the student.
    "DistiLLM, skewed forward": (with_parameters(skewed_forward_kl, lam=0.1), SkewKL(0.1)),
}
# Near p = q the excess is summed by a series, with a relative error of 0.02³ on terms that
# are themselves of the order of 0.02²; all else is float64.
TOLERANCE = {"rtol": 1e-6, "atol": 1e-9}


@pytest.fixture(params=[0.3, 3.0], ids=["near", "far"])
def logits(request):
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, TOKENS, VOCAB, generator=generator, dtype=torch.float64)
    return (request.param * student).requires_grad_(), request.param * teacher


def assert_same(ours, theirs, student):
    """Value, and gradient in the student's logits or in its hidden states and head."""
    torch.testing.assert_close(ours, theirs, **TOLERANCE)
    own, expected = (torch.autograd.grad(value, student) for value in (ours, theirs))
    torch.testing.assert_close(own, expected, **TOLERANCE)


def weights():
    return torch.linspace(0.1, 1.3, TOKENS, dtype=torch.float64)


@pytest.mark.parametrize("name", PAIRS)
def test_value_is_that_of_the_peer_token_by_token(name, logits):
    reference, divergence = PAIRS[name]
    student, teacher = logits
    ours = rkl.per_token({"it": divergence}, p=teacher, q=student)["it"]
    torch.testing.assert_close(ours, reference(student, teacher).detach(), **TOLERANCE)


@pytest.mark.parametrize("name", PAIRS_WITH_GRADIENT)
def test_gradient_is_that_of_the_peer(name, logits):
    reference, divergence = PAIRS_WITH_GRADIENT[name]
    student, teacher = logits
    ours = rkl.exact(divergence, p=teacher, q=student, weight=weights())
    theirs = weights() @ reference(student, teacher)
    expected = torch.autograd.grad(theirs, student)[0]
    torch.testing.assert_close(torch.autograd.grad(ours, student)[0], expected, **TOLERANCE)


@pytest.mark.parametrize("lam", [0.1, 0.6])
def test_distillm_drops_the_entropy_of_the_teacher_from_its_skewed_kl(lam, logits):
    student, teacher = logits
    ours = rkl.per_token({"it": SkewKL(lam)}, p=teacher, q=student)["it"]
    entropy = -(softmax(teacher, -1) * log_softmax(teacher, -1)).sum(-1)
    theirs = skewed_forward_kl(student, teacher, lam).detach() - entropy
    torch.testing.assert_close(ours, theirs, **TOLERANCE)


@pytest.mark.parametrize("beta", [0, 0.3, 1])
def test_temperature_of_a_head_divides_the_logits_and_multiplies_nothing(beta):
    """TRL and Liger divide both logits by the temperature, and leave out its square."""
    student, teacher = heads()
    ours = rkl.exact(
        _generalised(beta),
        p=rkl.LinearHead(*teacher, temperature=2.5),
        q=rkl.LinearHead(*student, temperature=2.5),
    )
    theirs = generalised_jsd(*(h @ w.T / 2.5 for h, w in (student, teacher)), beta).mean()
    assert_same(ours, theirs, student)


def test_tokens_labelled_minus_100_are_tokens_of_weight_zero(logits):
    """TRL's batchmean with labels: a sum over the tokens kept, over their number."""
    student, teacher = logits
    kept = torch.tensor([1, 0, 1, 1, 0, 0, 1], dtype=torch.float64)
    ours = rkl.exact(rkl.JensenShannon(), p=teacher, q=student, weight=kept / kept.sum())
    theirs = generalised_jsd(student, teacher, 0.5)[kept.bool()].mean()
    assert_same(ours, theirs, student)


def test_hard_label_term_is_that_of_liger():
    """Liger: half the divergence at the temperature, half the cross-entropy at temperature 1."""
    student, teacher = heads()
    labels = torch.arange(TOKENS) * 5 % VOCAB
    logits = student[0] @ student[1].T
    soft = generalised_jsd(logits / 2.0, teacher[0] @ teacher[1].T / 2.0, 0.5).sum()
    hard = nll_loss(log_softmax(logits, -1), labels, reduction="sum")
    theirs = 0.5 * soft / TOKENS + 0.5 * hard / TOKENS
    ours = rkl.exact(
        rkl.JensenShannon(),
        p=rkl.LinearHead(*teacher, temperature=2.0),
        q=rkl.LinearHead(*student, temperature=2.0),
        weight=torch.full((TOKENS,), 0.5 / TOKENS, dtype=torch.float64),
        labels=labels,
        hard_label_weight=1.0,
    )
    assert_same(ours, theirs, student)


def test_published_akl_objective_adds_half_a_cross_entropy(logits):
    student, teacher = logits
    labels = torch.arange(TOKENS)
    ours = rkl.exact(rkl.AKL(), p=teacher, q=student, labels=labels, hard_label_weight=0.5)
    theirs = akl_by_sorting(student, teacher, 0.5).mean() + 0.5 * cross_entropy(student, labels)
    assert_same(ours, theirs, student)


@pytest.mark.parametrize("beta", [0, 0.5, 1])
def test_top_k_teacher_is_trls_support_with_a_tail_bucket(beta, logits):
    """TRL's server distillation: the teacher's top k, and one class for all the rest."""
    student, teacher = logits
    top, index = log_softmax(teacher, -1).topk(8)
    ours = rkl.exact(_generalised(beta), p=rkl.TopK(top, index), q=student)
    gathered = log_softmax(student, -1).gather(-1, index)
    theirs = generalised_jsd(with_tail_bucket(gathered), with_tail_bucket(top), beta).mean()
    assert_same(ours, theirs, student)


def test_official_akl_is_nan_where_teacher_and_student_agree_and_ours_is_zero():
    same = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert akl_by_sorting(same, same, 0.5).isnan().all()
    assert rkl.exact(rkl.AKL(), p=same, q=same) == 0


def heads():
    generator = torch.Generator().manual_seed(1)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    student = (random(TOKENS, 5).requires_grad_(), random(VOCAB, 5).requires_grad_())
    return student, (random(TOKENS, 9), random(VOCAB, 9))


def with_tail_bucket(logp):
    rest = (-logp.logsumexp(-1, keepdim=True).expm1()).log()
    return torch.cat([logp, rest], -1)


def _generalised(beta):
    return {0: rkl.KL(), 1: rkl.ReverseKL()}.get(beta) or rkl.JensenShannon(beta)

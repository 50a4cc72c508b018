"""The formulas of test_parity, against the installed TRL and Liger (group bench).

Their Triton kernels need a GPU; their chunked losses and TRL's torch fall-backs run here.
They work in float32, so the tolerances are those of float32 sums over the vocabulary.
"""

import pytest
import torch

import rkl

pytestmark = [
    pytest.mark.peers,
    pytest.mark.filterwarnings("default"),  # theirs are not ours to mend
]
TOKENS, VOCAB = 33, 1000
TOLERANCE = {"rtol": 1e-4, "atol": 1e-6}
BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]


@pytest.fixture(scope="module")
def trl():
    return pytest.importorskip("trl")


@pytest.fixture(scope="module")
def liger():
    return pytest.importorskip("liger_kernel.chunked_loss")


@pytest.fixture
def heads():
    """(student hidden, student weight), (teacher hidden, teacher weight)."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    student = random(TOKENS, 16).requires_grad_(), (random(VOCAB, 16) / 2).requires_grad_()
    return student, (random(TOKENS, 24), random(VOCAB, 24) / 2)


def divergence_of(beta):
    """TRL's and Liger's beta: 0 is forward KL, 1 reverse, between them the teacher's weight."""
    return {0.0: rkl.KL(), 1.0: rkl.ReverseKL()}.get(beta) or rkl.JensenShannon(beta)


def ours(beta, student, teacher, temperature=1.0, softcap=None, scale=1.0, **settings):
    p, q = (
        rkl.LinearHead(*head, scale=scale, softcap=softcap, temperature=temperature)
        for head in (teacher, student)
    )
    return rkl.exact(divergence_of(beta), p=p, q=q, **settings)


def assert_same(own, theirs, student):
    torch.testing.assert_close(own, theirs, **TOLERANCE)
    gradients = (torch.autograd.grad(value, student) for value in (own, theirs))
    for of_ours, of_theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(of_ours, of_theirs, **TOLERANCE)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_gkd_loss_of_trl(beta, temperature, trl, heads):
    from trl.experimental.gkd import GKDTrainer

    student, teacher = heads
    logits = (hidden @ weight.T for hidden, weight in heads)
    theirs = GKDTrainer.generalized_jsd_loss(*logits, beta=beta, temperature=temperature)
    assert_same(ours(beta, student, teacher, temperature), theirs, student)


def test_gkd_loss_of_trl_over_labelled_tokens_only(trl, heads):
    from trl.experimental.gkd import GKDTrainer

    student, teacher = heads
    labels = torch.arange(TOKENS).where(torch.arange(TOKENS) % 3 > 0, -100)
    logits = (hidden @ weight.T for hidden, weight in heads)
    theirs = GKDTrainer.generalized_jsd_loss(*logits, labels=labels)
    kept = (labels != -100).float()
    assert_same(ours(0.5, student, teacher, weight=kept / kept.sum()), theirs, student)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize(
    "head",
    [{}, {"temperature": 2.0}, {"scale": 0.7, "softcap": 5.0, "temperature": 1.5}],
    ids=["plain", "temperature", "scale and soft cap"],
)
def test_chunked_kernel_of_trl(beta, head, trl, heads):
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    student, teacher = heads
    scale, softcap = head.get("scale", 1.0), head.get("softcap")
    per_token, _ = ChunkedDivergenceFunction.apply(
        *(student[0], student[1], None, teacher[0], teacher[1], None),
        *(beta, head.get("temperature", 1.0), scale, softcap, scale, softcap),
    )
    assert_same(ours(beta, student, teacher, **head), per_token.mean(), student)


@pytest.mark.parametrize("beta", BETAS)
def test_self_distillation_loss_of_trl(beta, trl, heads):
    from trl.experimental.sdpo.loss_utils import compute_divergence

    student, teacher = heads
    logp_student, logp_teacher = ((h @ w.T).log_softmax(-1) for h, w in heads)
    theirs = compute_divergence(logp_student, logp_teacher, beta).mean()
    assert_same(ours(beta, student, teacher), theirs, student)


@pytest.mark.parametrize("beta", BETAS)
def test_chunked_loss_of_liger(beta, liger, heads):
    student, teacher = heads
    loss = liger.LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, temperature=2.0, compiled=False
    )
    theirs = loss(*student, *teacher, torch.zeros(TOKENS, dtype=torch.long))
    assert_same(ours(beta, student, teacher, temperature=2.0), theirs, student)


def test_hard_label_term_of_liger(liger, heads):
    """Half the divergence at the temperature, half the cross-entropy at temperature 1."""
    student, teacher = heads
    labels = torch.arange(TOKENS).where(torch.arange(TOKENS) % 3 > 0, -100)
    loss = liger.LigerFusedLinearJSDLoss(temperature=2.0, compiled=False, chunk_size=8)
    theirs = loss(*student, *teacher, labels)
    kept = (labels != -100).float()
    own = ours(
        *(0.5, student, teacher, 2.0),
        weight=0.5 * kept / kept.sum(),
        labels=labels.clamp_min(0),
        hard_label_weight=1.0,
    )
    assert_same(own, theirs, student)
